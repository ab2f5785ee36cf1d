"""Many thousand frames, sessions coming and going: is memory flat, is every newest frame delivered, is nothing crossed?

    python -m benchmarks.serving soak                              10,000 delivered frames, at most 600 s, this machine
    python -m benchmarks.serving soak --frames 2000 --seconds 60 --out soak.json

Clients open a session, send bursts of frames faster than they are taken, with one technique, prompt, size and seed
after another, send what is no picture and frames that fail, cancel, leave without a word or in the middle of a frame.
Two engines run at a time. Most frames go through a pipeline whose transformer knows the answer, the reference itself:
all that the engine does is real, and a frame takes milliseconds. A share goes through the pocket model.

Each frame carries the numbers of its client and of itself as black and white squares, with a checksum; the prompt may
turn the picture's brightness upside down, so its part shows too. The last frame of each burst must be delivered; each
result that is seen must show its own client's number and, unless it repeats the last one, its own; on the pipeline that
knows the answer also its own prompt and seed.

The file: {"kind": "soak", "device", versions, "commit", "seconds", "frames" delivered, "submitted", "skipped",
"dropped", "asked_errors", "sessions", "pocket_frames", "resident_mb" and on CUDA "allocated_mb" {"after_warm_up",
"end", "most"}, "complaints"}. After warm-up is the median between a fifth and two fifths of the way, the end that of
the last fifth. The exit status is 1 if there is a complaint.
"""

import argparse
import json
import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does (see `webui_realtime`)

import random
import statistics
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.instruments import Memory
from benchmarks.result_file import ResultFile, environment
from cached_pipeline import CachedQwenImageEditPipeline, load_pipeline
from pipeline.geometry import on_grid, padded
from pipeline.images import EditError, resample
from qwen_realtime import EditParams, EditResult, EngineConfig, RealtimeEngine, Session

SQUARES = 8  # on a side
SYNC = 0xA5C3  # the first 16 squares: eight of them white
DARK, BRIGHT = 40, 215
SIZES = (64, 128)
IDLE_S = 3.0  # a session left behind is freed after so long
PATIENCE_S = 120.0
FLAT = 1.05  # memory at the end, of that after warm-up
SLACK_MB = 8.0


# Frames that say whose they are ---------------------------------------------------------------------------------------


class Identity(NamedTuple):
    client: int
    number: int
    inverted: bool = False  # dark is bright


def _bits(value: int) -> list[int]:
    return [value >> i & 1 for i in range(15, -1, -1)]


def _checksum(client: int, number: int) -> int:
    return zlib.crc32(client.to_bytes(2) + number.to_bytes(2)) & 0xFFFF


def draw(client: int, number: int, size: int) -> np.ndarray:
    """uint8 (size, size, 3): both numbers, below 65536, in squares."""
    bits = [bit for value in (SYNC, client, number, _checksum(client, number)) for bit in _bits(value)]
    squares = np.where(np.array(bits).reshape(SQUARES, SQUARES), BRIGHT, DARK).astype(np.uint8)
    side = size // SQUARES
    return np.repeat(squares.repeat(side, 0).repeat(side, 1)[..., None], 3, axis=2)


def read(grey: np.ndarray) -> Identity | None:
    """What `draw` drew, from brightness (size, size) after an edit; None if the checksum is wrong."""
    side = grey.shape[0] // SQUARES
    inner = slice(side // 4, side - side // 4)
    blocks = grey.astype(np.float32).reshape(SQUARES, side, SQUARES, side)
    blocks = blocks[:, inner, :, inner].mean(axis=(1, 3)).reshape(-1)
    white = np.array(_bits(SYNC), bool)
    bright, dark = blocks[:16][white].mean(), blocks[:16][~white].mean()
    ones = ((blocks > (bright + dark) / 2) == (bright > dark)).astype(int)
    sync, client, number, checksum = (int("".join(map(str, ones[i : i + 16])), 2) for i in range(0, 64, 16))
    if sync != SYNC or checksum != _checksum(client, number):
        return None
    return Identity(client, number, bool(bright < dark))


# A pipeline that knows the answer -------------------------------------------------------------------------------------


class StraightThrough:
    """In the place of the transformer: the velocity that leads to the first reference's latents and the prompt's value.

    Channels of the latents: 16 of brightness (a token's 4x4 squares), 1 of the prompt; the rest keeps the noise.
    """

    def velocities(self, samples) -> list[torch.Tensor]:
        found = []
        for sample in samples:
            velocity = torch.zeros_like(sample.latents)
            tokens = sample.latents.shape[1]
            velocity[..., :16] = sample.latents[..., :16] - sample.conditions[:, :tokens, :16]
            velocity[..., 16] = sample.latents[..., 16] - sample.prompt_embeds.mean()
            found.append(velocity / (sample.time / 1000))
        return found


def prompt_value(prompt: str) -> float:
    return zlib.crc32(prompt.encode()) % 200 / 100 - 1


class ThroughPipeline(CachedQwenImageEditPipeline):
    """The real pipeline with caches, schedules, noise and denoise loop; what is replaced are the networks in it.

    Its pictures: red is the reference's brightness, green the prompt's value, blue the seed's noise.
    """

    def enable_fast_path(self) -> list:
        self.fused_transformer = StraightThrough()
        return []

    def token_cache(self):
        raise EditError("There are no keys and values to reuse here.")

    def expect(self, times: Sequence[float]) -> None:
        """Nothing is kept for a noise level here."""

    def _run_text_encoder(self, prompt: str, pictures: list, reader: tuple) -> torch.Tensor:
        return torch.full((1, 8, 16), prompt_value(prompt), device=self._execution_device)

    def _encode_pictures(self, pictures, width: int, height: int) -> torch.Tensor:
        pixels = padded(resample(pictures.on(self._execution_device), width, height, "lanczos"))  # (b, H, W, 3)
        height, width = pixels.shape[1:3]
        grey = pixels.float().mean(dim=3) / 127.5 - 1
        squares = grey.unflatten(2, (width // 16, 4, 4)).unflatten(1, (height // 16, 4, 4)).mean(dim=(3, 6))
        squares = squares.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # (b, tokens, 16)
        return torch.nn.functional.pad(squares, (0, self.latent_channels * 4 - 16))

    def decode(self, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
        columns, rows = (side // 16 for side in on_grid(width, height))
        red = latents[..., :16].reshape(-1, rows, columns, 4, 4).permute(0, 1, 3, 2, 4)
        red = red.reshape(-1, rows * 4, columns * 4)
        green, blue = (latents[..., c].reshape(-1, rows, columns) for c in (16, 17))
        sides = [(red, 4), (green, 16), (blue / 4, 16)]
        pixels = torch.stack([x.repeat_interleave(n, 1).repeat_interleave(n, 2) for x, n in sides], dim=3)
        return ((pixels[:, :height, :width] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# Clients --------------------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """One engine with its clients: what they ask for, and how many frames it shall deliver."""

    name: str
    engine: RealtimeEngine
    prompts: dict[str, bool]  # and whether they turn the brightness upside down
    styles: tuple[dict, ...]
    frames: int
    clients: int
    noise: Callable[[EditParams], np.ndarray] | None = None  # where blue shows it


def expected_noise(pipeline: ThroughPipeline) -> Callable[[EditParams], np.ndarray]:
    """What blue should be, (rows, columns) of 255, by the settings. Give it no engine's pipeline: that is its thread's."""
    lock = threading.Lock()

    def noise(params: EditParams) -> np.ndarray:
        with lock:
            found = pipeline.initial_noise(params.width, params.height, params.seed)[0, :, 17].cpu().numpy()
        return ((found.reshape(params.height // 16, params.width // 16) / 4 + 1) * 127.5).clip(0, 255)

    return noise


@dataclass
class Report:
    """What the clients saw; all of them write it."""

    complaints: Counter = field(default_factory=Counter)
    counts: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    next_client: int = 0

    def count(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.counts[what] += by

    def complain(self, text: str) -> None:
        with self.lock:
            self.complaints[text] += 1

    def new_client(self) -> int:
        with self.lock:
            self.next_client += 1
            return self.next_client % 65536


STYLES = (
    {},
    {"steps": 1},
    {"steps": 4},
    {"skip_similar": "frame"},
    {"skip_similar": "patch", "max_skipped": 3},
    {"embeds": "every", "embeds_every": 3},
    {"embeds": "changed"},
    {"embeds": "kept"},
    {"embeds": "every", "embeds_every": 1, "embeds_background": True},
    {"stream_batch": True},
    {"start_from_previous": 0.3},
    {"blend_still": 0.5},
    {"start_from_previous": 0.3, "blend_still": 0.5, "motion_aware": True},
)
POCKET_STYLES = (
    *STYLES,
    {"reuse": "steps"},
    {"reuse": "frames"},
    {"reuse": "frames", "embeds": "kept"},
    {"transition_frames": 3},
)
THROUGH_PROMPTS = {f"prompt {i}": False for i in range(50)}
POCKET_PROMPTS = {"leave it as it is": False, "make it black and white": False, "make it sepia": False}
POCKET_PROMPTS |= {"make it a negative": True}


class Client:
    """One session from its opening to its end."""

    def __init__(self, kind: Kind, report: Report, luck: random.Random):
        self.kind, self.report, self.luck = kind, report, luck
        self.key = report.new_client()
        self.sent: dict[int, tuple[int, EditParams]] = {}  # the engine's number of a frame: ours, and its settings
        self.failing: set[int] = set()  # numbers of frames that are meant to fail
        self.drawn = 0
        self.seen = 0

    def live(self, over: Callable[[], bool]) -> None:
        session = self.kind.engine.open_session()
        self.report.count("sessions")
        for _ in range(self.luck.randint(1, 6)):
            if over():
                break
            self._burst(session)
        end = self.luck.random()
        if end < 0.15:
            return  # leaves without a word: freed when it has been idle for long
        if end < 0.3:
            self._submit(session, self._params())  # and goes in the middle of it
        session.close()

    def _params(self) -> EditParams:
        prompt, size = self.luck.choice(list(self.kind.prompts)), self.luck.choice(SIZES)
        params = EditParams(prompt=prompt, width=size, height=size, seed=self.luck.randrange(100))
        return params.replace(**self.luck.choice(self.kind.styles))

    def _submit(self, session: Session, params: EditParams, on_step=None) -> int:
        if self.luck.random() < 0.8 or not self.drawn:  # else the last picture again, which may be skipped
            self.drawn += 1
        number = session.submit([draw(self.key, self.drawn, params.width)], params, on_step)
        self.sent[number] = self.drawn, params
        self.report.count("submitted")
        return number

    def _burst(self, session: Session) -> None:
        params, chance = self._params(), self.luck.random()
        if chance < 0.1:
            self._no_picture(session, params)
        elif chance < 0.15:
            self._failing_frame(session, params)
        # Some wait for each frame, some send faster than frames are taken.
        waits = self.luck.random() < 0.5
        for _ in range(self.luck.randint(1, 15)):
            number = self._submit(session, params)
            if waits:
                self._await(session, number)
            elif (result := session.latest()) is not None and result.number > self.seen:
                self._check(result)
        if self.luck.random() < 0.1:
            session.cancel()
            number = self._submit(session, params)
        self._await(session, number)

    def _no_picture(self, session: Session, params: EditParams) -> None:
        try:
            session.submit([np.zeros((16, 16), np.uint8)], params)
        except EditError:
            self.report.count("asked_errors")
        else:
            self.report.complain("what is no picture was taken")

    def _failing_frame(self, session: Session, params: EditParams) -> None:
        def fail(step: int, steps: int) -> None:
            raise ValueError("asked for")

        number = self._submit(session, params.replace(skip_similar="off"), fail)
        self.failing.add(number)
        try:
            session.result(number, PATIENCE_S)
        except EditError:
            self.report.count("asked_errors")
        else:
            self.report.complain("a frame that failed was delivered")

    def _await(self, session: Session, number: int) -> None:
        """The newest frame: it must come."""
        try:
            self._check(session.result(number, PATIENCE_S))
        except (EditError, TimeoutError) as error:
            what = ", ".join(f"{k} {v}" for k, v in self._changes(number).items()) or "no technique"
            self.report.complain(f"{self.kind.name}: a newest frame was lost ({what}): {str(error)[:200]}")

    def _changes(self, number: int) -> dict:
        params = self.sent[number][1]
        default = EditParams(prompt="-")
        names = ("prompt", "seed", "width", "height")
        return {k: v for k, v in vars(params).items() if v != getattr(default, k) and k not in names}

    def _check(self, result: EditResult) -> None:
        if result.error is not None:
            if result.number not in self.failing:
                self.report.complain(f"{self.kind.name}: an error that no one asked for: {str(result.error)[:200]}")
            return
        self.seen = max(self.seen, result.number)
        drawn, params = self.sent[result.number]
        self.report.count("checked")
        wrong = self._wrong(result, drawn, params)
        if wrong:
            what = ", ".join(f"{k} {v}" for k, v in self._changes(result.number).items()) or "no technique"
            self.report.complain(f"{self.kind.name}: {wrong} ({what})")

    def _wrong(self, result: EditResult, drawn: int, params: EditParams) -> str | None:
        picture = result.image
        if picture.shape != (params.height, params.width, 3) or result.params != params:
            return "another size or other settings came back"
        through = self.kind.name == "through"
        found = read(picture[..., 0] if through else picture.mean(axis=2))
        if found is None and not params.transition_frames:  # between two prompts it may be grey
            return "unreadable"
        if found is None:
            return None
        if found.client != self.key:
            return "crossed: another session's picture"
        if found.inverted != self.kind.prompts[params.prompt] and not params.transition_frames:
            return "crossed: another prompt's picture"
        if found.number != drawn and not (result.skipped and found.number < drawn):
            return "another frame's picture"
        if through:
            if abs(picture[..., 1].mean() - (prompt_value(params.prompt) + 1) * 127.5) > 2:
                return "crossed: another prompt"
            blue = picture[::16, ::16, 2]
            if not params.start_from_previous and np.abs(blue - self.kind.noise(params)).max() > 2:
                return "crossed: another seed"
        return None


# The soak -------------------------------------------------------------------------------------------------------------


def run(
    frames: int, seconds: float, *, device: str = "cpu", pocket_share: float = 0.04, pipeline=None, seed: int = 0
) -> dict:
    """The report of about `frames` delivered frames, or of as many as `seconds` allow. `pipeline`: the pocket model."""
    pocket = pipeline or load_pipeline("pocket", device=device)
    through, reference = (ThroughPipeline(**pocket.components) for _ in range(2))
    few = max(1, round(frames * pocket_share))
    report, began = Report(), time.perf_counter()
    config = EngineConfig(idle_timeout_s=IDLE_S, max_sessions=1000)
    samples: list[tuple[float, float, float]] = []  # progress, resident and allocated MB
    failing = logging.getLogger("engine.loop")
    level = failing.level
    failing.setLevel(logging.CRITICAL + 1)  # hundreds of frames that are meant to fail
    try:
        with RealtimeEngine(through, config) as first, RealtimeEngine(pocket, config) as second:
            kinds = (
                Kind("through", first, THROUGH_PROMPTS, STYLES, frames - few, 6, expected_noise(reference)),
                Kind("pocket", second, POCKET_PROMPTS, POCKET_STYLES, few, 2),
            )
            _soak(kinds, report, began + seconds, samples, seed)
            stats = [kind.engine.stats() for kind in kinds]
    finally:
        failing.setLevel(level)
        pocket.disable_fast_path()
    delivered = sum(s.frames for s in stats)
    if delivered < frames:
        report.complaints[f"the time given was over after {delivered} of {frames} frames"] += 1
    result = {
        "seconds": round(time.perf_counter() - began, 1),
        "frames": delivered,
        "pocket_frames": stats[1].frames,
        **{name: report.counts[name] for name in ("submitted", "checked", "sessions", "asked_errors")},
        **{name: sum(getattr(s, name) for s in stats) for name in ("skipped", "dropped", "errors")},
        "resident_mb": _flatness(report, "resident memory", [(p, mb) for p, mb, _ in samples]),
    }
    if device != "cpu":
        result["allocated_mb"] = _flatness(report, "GPU memory", [(p, mb) for p, _, mb in samples])
    return result | {"complaints": [f"{text} ({times} times)" for text, times in report.complaints.items()]}


def _soak(kinds, report: Report, ends_s: float, samples: list, seed: int) -> None:
    """Runs all clients to their end, one thread each, and writes memory down meanwhile."""

    def work(kind: Kind, luck: random.Random) -> None:
        def over() -> bool:
            return time.perf_counter() > ends_s or kind.engine.stats().frames >= kind.frames

        while not over():
            try:
                Client(kind, report, luck).live(over)
            except Exception as error:  # a client must not end the soak unseen
                traceback.print_exc()
                report.complain(f"{kind.name}: {type(error).__name__}: {str(error)[:200]}")

    threads = [
        threading.Thread(target=work, args=(kind, random.Random(f"{seed} {kind.name} {i}")))
        for kind in kinds
        for i in range(kind.clients)
    ]
    for thread in threads:
        thread.start()
    wanted, process = sum(kind.frames for kind in kinds), Memory(torch.device("cpu"))
    while any(thread.is_alive() for thread in threads):
        done = sum(min(kind.engine.stats().frames, kind.frames) for kind in kinds)
        allocated = torch.cuda.memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
        samples.append((done / wanted, (process.resident_gb() or 0.0) * 1e3, allocated))
        next((thread for thread in threads if thread.is_alive()), threads[0]).join(0.2)


def _flatness(report: Report, what: str, samples: list[tuple[float, float]]) -> dict:
    """The level after warm-up and at the end, and a complaint if it rose."""
    early = [mb for progress, mb in samples if 0.2 <= progress < 0.4] or [samples[0][1]]
    late = [mb for progress, mb in samples if progress >= 0.8] or [samples[-1][1]]
    after, end = statistics.median(early), statistics.median(late)
    if end > after * FLAT + SLACK_MB:
        report.complaints[f"{what} rose from {after:.0f} to {end:.0f} MB"] += 1
    return {"after_warm_up": round(after, 1), "end": round(end, 1), "most": round(max(mb for _, mb in samples), 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=10_000, help="to be delivered (default 10000)")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most (default 600)")
    parser.add_argument("--pocket-share", type=float, default=0.04, help="of the frames (default 0.04)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="where the code runs without its git history")
    parser.add_argument("--out", type=Path, help="result file to write")
    args = parser.parse_args(argv)
    report = run(args.frames, args.seconds, device=args.device, pocket_share=args.pocket_share, seed=args.seed)
    data = {"kind": "soak", **environment(torch.device(args.device), args.commit), **report}
    if args.out:
        file = ResultFile(args.out, {})
        file.data = data
        file.write()
    print(json.dumps(data))
    return int(bool(report["complaints"]))
