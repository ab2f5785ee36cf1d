"""What each technique of the realtime engine gives and costs: frames a second, latency, loss, flicker, one row each.

    python -m benchmarks.techniques --weights pocket --size 256 --steps 2 --out benchmarks/results/techniques-cpu.json
    python -m benchmarks.techniques --weights random --size 512 --frames 14 --live-seconds 1 --more-videos "30% changed"
    python -m benchmarks.techniques --only reuse --videos "30% changed"      # what it is compared with runs too

A technique is some changed settings (see `benchmarks/catalogue.py`). It runs as a client's session would, on synthetic videos of real
photographs (see `videos`), and twice on each:

- In stream: the next frame is put into the session's mailbox as soon as the engine has taken the last. So every
  technique sees the same frames, each once, as fast as it can take them. Of this come `fps`, skips, shares, `loss_db`
  and flicker. The first WARMUP frames of each run are in no figure. Where a later frame needs something that is made
  once, a CUDA graph or a noise level's modulation, the session streams the video once more, MOST_PASSES times at most,
  and the last time counts. What that costs is in `first_ms`, the first frame from submit to done, and in `longest_ms`,
  the longest time between two results, in any pass; `prepared` is how much was made in the frames that count even so.
- Before a camera, in the same session: CAMERA_FPS frames a second, taken or not, newest wins, for `--live-seconds`. Of
  this come `median_ms` and `p95_ms`: the age of the delivered frames, from submit to done, waiting included; the
  engine's own count. Once more if something was prepared in it.

The pocket model's edits have a computed right answer for each frame as it came, noise and all. `psnr_db` is the
output's distance from it, `loss_db` how much less that is than with the technique it is compared with (`against`,
mostly plain), on the same frames; both are None for other weights. `psnr_to_plain_db` is the distance to that
technique's output, 100 where equal. All are means over frames and edits. `flicker` is the mean absolute difference of
consecutive outputs in levels of 255, `flicker_ratio` the same divided by that of the technique compared with, `jump`
the largest one.

The file is as `benchmark`'s: {"kind": "techniques", "device", versions, "commit", "rows", "left_out"}; rows have its
names where they mean the same. `changed_tokens` is the share of tokens that was computed in the frames that were not
skipped, `changed_in_video` what moved in the scene, `notes` the last three different ones that came with the results,
`wall_s` what the row took. It is written after each row. The exit status is 1 if a technique failed.
"""

import argparse
import functools
import gc
import json
import os

# As the program does (see `webui_realtime`). Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import random
import statistics
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fast_path
from benchmarks import catalogue
from benchmarks.catalogue import Technique, chosen
from benchmarks.instruments import Memory
from benchmarks.result_file import Budget, ResultFile, environment, reason_of
from benchmarks.subjects import LeftOutError, random_pipeline
from benchmarks.videos import SCENES, changed_share, scene, video
from cached_pipeline import QUANTIZATIONS, load_pipeline, quantization_kind
from pipeline import placement
from pipeline.images import EditError
from pocket_model.edits import EDITS, WORDINGS
from qwen_realtime import LIMITS, STAGES, EditParams, EditResult, EngineConfig, RealtimeEngine, Session

WARMUP = 4  # frames of a run in no figure: recordings, a filling stream batch, the first frame of a cache
MOST_PASSES = 4  # of a video in a session, until nothing is made any more in the frames that count
CAMERA_FPS = 30
PATIENCE_S = 120.0  # for one frame
SAME_DB = 100.0
ONE_PICTURE = [edit.name for edit in EDITS if edit.pictures == 1 and edit.name in WORDINGS]
EDIT_NAMES = ("pencil sketch", "sepia", "watercolour")  # lines, colours, areas: the pocket model does all three well


# Figures --------------------------------------------------------------------------------------------------------------


def psnr_db(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures of one shape, SAME_DB where they are equal."""
    error = float(np.square(picture.astype(np.float32) - other).mean()) / 255**2
    return min(SAME_DB, -10 * np.log10(error)) if error else SAME_DB


def differences(pictures: list[np.ndarray]) -> list[float]:
    """Mean absolute difference of each picture from the one before, in levels of 255."""
    return [float(np.abs(b.astype(np.float32) - a).mean()) for a, b in pairwise(pictures)]


def right_answer(edit: str, picture: np.ndarray) -> np.ndarray:
    """What the edit of this frame should be: uint8 (H, W, 3) to the same."""
    x = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 255
    answer = next(e for e in EDITS if e.name == edit).answer(x).clamp(0, 1)
    return (answer[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def at_size_of(picture: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """An output as large as the frame, as the page shows it: the pace may have chosen a smaller one."""
    if picture.shape == frame.shape:
        return picture
    return np.asarray(Image.fromarray(picture).resize(frame.shape[1::-1], Image.Resampling.BICUBIC))


# Running --------------------------------------------------------------------------------------------------------------


def submit(session: Session, picture: np.ndarray, params: EditParams) -> Future:
    """Submits and returns the future of the frame's EditResult, set in the moment it is done."""
    return session.submit_for_outcome([picture], params).outcome


@dataclass
class Shot:
    """One frame's result, when it was done, on the clock of `time.perf_counter`, and what was `prepared` by then."""

    result: EditResult | None = None
    done_s: float = 0.0
    prepared: int = 0


def prepared(pipeline) -> int:
    """How many things the fast path has made that are made once: CUDA graphs, modulation of noise levels."""
    parts = [part for name in fast_path.PARTS if (part := getattr(pipeline, name)) is not None]
    made, fused = sum(part.graphs.recordings for part in parts), pipeline.fused_transformer
    if fused is not None:
        made += fused.modulations.summary()["misses"] + sum(cache.recordings for cache in list(fused.token_caches))
    return made


def stream(session: Session, pipeline, frames: list[np.ndarray], params: list[EditParams]) -> list[Shot]:
    """Every frame's shot, each submitted when the mailbox is empty. Raises the first error that a frame has."""
    shots, futures = [Shot() for _ in frames], []

    def note(shot: Shot, future: Future) -> None:  # on the inference thread
        shot.done_s, shot.prepared = time.perf_counter(), prepared(pipeline)

    for shot, picture, settings in zip(shots, frames, params, strict=True):
        waits_until = time.perf_counter() + PATIENCE_S
        while session.waiting:
            if time.perf_counter() > waits_until:
                raise TimeoutError(f"no frame was taken within {PATIENCE_S:g} s")
            time.sleep(0.0005)
        futures.append(submit(session, picture, settings))
        futures[-1].add_done_callback(functools.partial(note, shot))
    for shot, future in zip(shots, futures, strict=True):
        shot.result = future.result(PATIENCE_S)
        if shot.result.error is not None:
            raise shot.result.error
    return shots


@dataclass
class Streamed:
    """A session's passes through a video, of which the last counts."""

    shots: list[Shot]  # of the last pass
    first_ms: float
    longest_ms: float

    @property
    def counted(self) -> list[Shot]:
        return self.shots[WARMUP:]

    @property
    def span_s(self) -> float:
        return self.shots[-1].done_s - self.shots[WARMUP - 1].done_s

    @property
    def prepared(self) -> int:
        """What was made in the frames that count."""
        return self.shots[-1].prepared - self.shots[WARMUP - 1].prepared


def stream_until_steady(session: Session, pipeline, frames: list[np.ndarray], params: list[EditParams]) -> Streamed:
    """Streams the video until nothing is prepared after its warm-up any more, MOST_PASSES times at most."""
    passes = [stream(session, pipeline, frames, params)]
    while len(passes) < MOST_PASSES and Streamed(passes[-1], 0.0, 0.0).prepared:
        again = [marked(frame, len(passes) * len(frames) + i) for i, frame in enumerate(frames)]
        passes.append(stream(session, pipeline, again, params))
    gaps = [after.done_s - before.done_s for shots in passes for before, after in pairwise(shots)]
    return Streamed(passes[-1], passes[0][0].result.age_ms, max(gaps) * 1000)


def marked(picture: np.ndarray, number: int) -> np.ndarray:
    """A copy that no cache has seen: the first four bytes are another number."""
    picture = picture.copy()
    picture.reshape(-1)[:4] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
    return picture


def before_camera(
    session: Session, pipeline, frames: list[np.ndarray], params: EditParams, seconds: float
) -> list[float]:
    """Ages, once more if something had to be prepared the first time: see `_before_camera`."""
    for _ in range(2):
        before = prepared(pipeline)
        ages = _before_camera(session, frames, params, seconds)
        if prepared(pipeline) == before:
            break
    return ages


def _before_camera(session: Session, frames: list[np.ndarray], params: EditParams, seconds: float) -> list[float]:
    """Ages in ms of the frames delivered while CAMERA_FPS frames a second come, to and fro through `frames`."""
    ages, lock = [], threading.Lock()
    back_and_forth = list(range(len(frames))) + list(range(len(frames) - 2, 0, -1))

    def note(future: Future) -> None:
        if not future.cancelled() and future.exception() is None and future.result().error is None:
            with lock:
                ages.append(future.result().age_ms)

    began, futures, i = time.perf_counter(), [], 0
    while time.perf_counter() < began + seconds or (len(ages) < 3 and time.perf_counter() < began + PATIENCE_S):
        picture = frames[back_and_forth[i % len(back_and_forth)]]
        futures.append(submit(session, marked(picture, 2**31 + i), params))
        futures[-1].add_done_callback(note)
        i += 1
        time.sleep(max(0.0, began + i / CAMERA_FPS - time.perf_counter()))
    futures[-1].result(PATIENCE_S)  # the newest frame is always done
    return ages[1:]  # the first comes after a jump in the video


class Bench:
    """The videos and their right answers, made once, and the outputs that others are compared with."""

    def __init__(self, args):
        self.args = args
        self.clean_share: dict[str, float] = {}
        self.half = (WARMUP + args.frames) // 2  # where a new prompt comes
        self._frames: dict[str, list[np.ndarray]] = {}
        self._answers: dict[tuple, list[np.ndarray]] = {}
        self.outputs: dict[tuple[str, str, str], list[np.ndarray]] = {}  # of (technique, video, edit)
        self.figures: dict[tuple[str, str], dict] = {}  # what rows are compared by, of (technique, video)

    def frames(self, name: str) -> list[np.ndarray]:
        if name not in self._frames:
            size, count = self.args.size, self.args.frames
            clean = list(scene(name, size, size, count))
            self.clean_share[name] = statistics.fmean(changed_share(*pair) for pair in pairwise(clean))
            self._frames[name] = list(video(name, size, size, count, self.args.seed))
        return self._frames[name]

    def answers(self, name: str, edit: str) -> list[np.ndarray]:
        if (name, edit) not in self._answers:
            self._answers[name, edit] = [right_answer(edit, frame) for frame in self.frames(name)]
        return self._answers[name, edit]

    def params(self, technique: Technique, name: str, edit: str) -> list[EditParams]:
        """The settings of each frame, and with a new prompt in the middle those of the next edit from there on."""
        size = self.args.size
        base = EditParams(prompt=WORDINGS[edit].preset, steps=self.args.steps, width=size, height=size)
        base = base.replace(**technique.params)
        if technique.pace:
            rate = technique.pace * self.figures["plain", name]["fps"]
            base = base.replace(target_fps=min(LIMITS["target_fps"][1], rate))
        if not technique.new_prompt:
            return [base] * self.args.frames
        later = base.replace(prompt=WORDINGS[self.next_edit(edit)].preset)
        return [base] * self.half + [later] * (self.args.frames - self.half)

    def next_edit(self, edit: str) -> str:
        """What the prompt changes to."""
        edits = self.args.edits if len(self.args.edits) > 1 else ONE_PICTURE
        return edits[(edits.index(edit) + 1) % len(edits)]

    def right(self, technique: Technique, name: str, edit: str) -> list[np.ndarray]:
        answers = self.answers(name, edit)
        if not technique.new_prompt:
            return answers
        return answers[: self.half] + self.answers(name, self.next_edit(edit))[self.half :]


def measure(bench: Bench, technique: Technique, name: str, engine: RealtimeEngine) -> dict:
    """One row. Raises what a frame raised, and LeftOutError without what it is compared with."""
    if technique.against != technique.name and (technique.against, name) not in bench.figures:
        raise LeftOutError(f"what it is compared with, {technique.against}, was not measured")
    began, args, frames, pipeline = time.perf_counter(), bench.args, bench.frames(name), engine.pipeline
    memory = Memory(torch.device(args.device))
    memory.reset_peak()
    runs, quality, to_other, flicker = [], [], [], []
    for edit in args.edits:
        pipeline.forget_results()  # an earlier row has had the same frames
        params = bench.params(technique, name, edit)
        with engine.open_session() as session:
            runs.append(stream_until_steady(session, pipeline, frames, params))
            if edit == args.edits[-1]:
                ages = before_camera(session, pipeline, frames, params[-1], args.live_seconds)
        shots = runs[-1].shots
        outputs = [at_size_of(shot.result.image, frame) for shot, frame in zip(shots, frames, strict=True)]
        if any(technique.name == other.against for other in catalogue.TECHNIQUES):
            bench.outputs[technique.name, name, edit] = outputs
        if args.weights == "pocket":
            right = bench.right(technique, name, edit)
            quality += [psnr_db(*pair) for pair in zip(outputs[WARMUP:], right[WARMUP:], strict=True)]
        if technique.against != technique.name:
            other = bench.outputs[technique.against, name, edit]
            to_other += [psnr_db(*pair) for pair in zip(outputs[WARMUP:], other[WARMUP:], strict=True)]
        flicker.append(differences(outputs[WARMUP:]))
    shots = [shot for run in runs for shot in run.counted]
    results = [shot.result for shot in shots]
    computed = [result for result in results if not result.skipped]
    mean = {
        "fps": len(shots) / sum(run.span_s for run in runs),
        "psnr_db": statistics.fmean(quality) if quality else None,
        "flicker": statistics.fmean(d for one in flicker for d in one),
    }
    bench.figures[technique.name, name] = mean
    other = bench.figures[technique.against, name]
    return {
        "technique": technique.name,
        "video": name,
        "against": technique.against,
        "settings": technique.params | technique.config,
        "edits": args.edits,
        "subject": "fast",
        "weights": args.weights,
        "width": args.size,
        "height": args.size,
        "steps": args.steps,
        "cfg": technique.params.get("cfg_scale", 1.0),
        "references": 1,
        "reference_area": args.size**2,
        "batch": 1,
        "quantize": args.quantize,
        "attention_quantize": args.attention_quantize,
        "text_encoder_quantize": "none",
        "vlm": technique.params.get("embeds", "fresh"),
        "changed_in_video": round(bench.clean_share[name], 3),
        "changed_tokens": round(statistics.fmean(r.computed for r in computed), 3) if computed else None,
        "skip_rate": round(1 - len(computed) / len(results), 3),
        "frames": len(shots),
        "fps": round(mean["fps"], 3),
        "median_ms": round(float(np.percentile(ages, 50)), 2),
        "p95_ms": round(float(np.percentile(ages, 95)), 2),
        "camera_frames": len(ages),
        "first_ms": round(max(run.first_ms for run in runs), 2),
        "longest_ms": round(max(run.longest_ms for run in runs), 2),
        "prepared": sum(run.prepared for run in runs),
        "psnr_db": _rounded(mean["psnr_db"]),
        "loss_db": _rounded(None if mean["psnr_db"] is None else other["psnr_db"] - mean["psnr_db"]),
        "psnr_to_plain_db": _rounded(statistics.fmean(to_other) if to_other else None),
        "flicker": _rounded(mean["flicker"]),
        "flicker_ratio": _rounded(mean["flicker"] / other["flicker"]) if other["flicker"] else None,
        "jump": _rounded(max(d for one in flicker for d in one)),
        "peak_memory_gb": _rounded(memory.peak_gb()),
        "stages_ms": _means([r.stages_ms for r in computed]),
        "tflops": None,
        "notes": list(dict.fromkeys(note for result in reversed(results) for note in result.notes))[:3],
        "wall_s": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def _means(stages_ms: list[dict]) -> dict:
    return {s: _rounded(statistics.fmean(one[s] for one in stages_ms)) for s in STAGES} if stages_ms else {}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def load(args, device: torch.device):
    """The pipeline. Raises EditError for weights that are not there or cannot be quantised."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.weights != "random":
        kinds = {"quantize": args.quantize, "attention_quantize": args.attention_quantize}
        return load_pipeline(args.weights, device=args.device, dtype=dtype, **kinds)
    pipeline = random_pipeline(args.device, dtype)
    pipeline.attention_quantize = fast_path.attention_kind(pipeline.transformer, args.attention_quantize, device)
    if args.quantize != "none":
        placement.quantize(pipeline.transformer, quantization_kind(args.quantize), device)
        gc.collect()  # the float weights
    return pipeline


def run(args) -> ResultFile:
    """Measures what the command line asks for."""
    budget, device = Budget(args.seconds), torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    result, bench = ResultFile(args.out, {"kind": "techniques", **environment(device, args.commit)}), Bench(args)
    todo = chosen(args.only, args.videos, args.more_videos)
    with ThreadPoolExecutor(1) as pool:  # the videos are made while the weights are
        made = pool.submit(lambda: [bench.frames(name) for name in {name for _, names in todo for name in names}])
        pipeline = load(args, device)
        made.result()
    with ExitStack() as running:
        engine, config = None, None
        for technique, names in todo:
            if engine is None or technique.config != config:
                running.close()
                # Recordings belong to the engine's thread that made them. What else there is of the fast path stays.
                pipeline.release_memory()
                settings = EngineConfig(**technique.config, fast_path=engine is None)
                draw = random.Random(args.seed).random  # the similarity filter's: the same frames are skipped each time
                engine, config = RealtimeEngine(pipeline, settings, draw=draw), technique.config
                running.enter_context(engine)
            for name in names:
                if budget.is_over():
                    result.data["left_out"][f"{technique.name}: {name}"] = "the time given was over"
                    continue
                try:
                    row = measure(bench, technique, name, engine)
                except (LeftOutError, EditError, TimeoutError, RuntimeError) as error:
                    result.data["left_out"][f"{technique.name}: {name}"] = reason_of(error)
                    continue
                result.data["rows"].append(row)
                result.write()
                print(_line(row), flush=True)
    result.write()
    return result


def _line(row: dict) -> str:
    def show(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    return (
        f"{row['technique']}: {row['video']}: {row['fps']:.2f} frames/s, "
        f"{row['median_ms']:.0f} and {row['p95_ms']:.0f} ms, longest {row['longest_ms']:.0f} ms, "
        f"skipped {row['skip_rate']:.0%}, "
        f"computed {show('changed_tokens', '.0%')}, loss {show('loss_db', '.2f')} dB, "
        f"to {row['against']} {show('psnr_to_plain_db', '.1f')} dB, "
        f"flicker {row['flicker']:.2f} (x{show('flicker_ratio', '.2f')}), in {row['wall_s']:.1f} s"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="pocket", help="pocket, random (full size), or a model folder or id")
    parser.add_argument("--attention-quantize", default="none", choices=["none", "fp8"], help="of the fast path")
    parser.add_argument("--quantize", default="none", choices=["none", *QUANTIZATIONS], help="the transformer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256, help="side of the square frames and outputs in pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--frames", type=int, default=24, help=f"of a video, {WARMUP} of them to warm up (default 24)")
    parser.add_argument("--edits", nargs="+", choices=ONE_PICTURE, help="default: " + ", ".join(EDIT_NAMES))
    parser.add_argument("--only", nargs="+", default=[], help="techniques whose name contains one of these")
    parser.add_argument("--videos", nargs="+", default=[], choices=SCENES, help="in the place of the techniques' own")
    more = "in addition to its own, if these are several"
    parser.add_argument("--more-videos", nargs="+", default=[], choices=SCENES, help=more)
    parser.add_argument("--live-seconds", type=float, default=4.0, help="before a camera, each row (default 4)")
    parser.add_argument("--seconds", type=float, help="end after about this time, with every row that fits")
    parser.add_argument("--seed", type=int, default=0, help="of the camera's noise and of the similarity filter")
    parser.add_argument("--commit", help="where the code runs without its git history")
    parser.add_argument("--out", type=Path, help="result file to write")
    args = parser.parse_args(argv)
    if args.frames < WARMUP + 3:
        parser.error(f"--frames is {args.frames}: at least {WARMUP + 3}, of which {WARMUP} warm up")
    # Without right answers another edit tells nothing new.
    args.edits = args.edits or list(EDIT_NAMES if args.weights == "pocket" else EDIT_NAMES[:1])
    if args.only and not chosen(args.only, args.videos, args.more_videos):
        parser.error(f"--only is {' '.join(args.only)}. Names: {', '.join(t.name for t in catalogue.TECHNIQUES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    result = run(args)
    short = {"out": str(args.out), "rows": len(result.data["rows"]), "left_out": result.data["left_out"]}
    print(json.dumps(short if args.out else result.data))
    return int(result.failed)


if __name__ == "__main__":
    sys.exit(main())
