"""The one benchmark: edits new pictures with stock diffusers, with what others add to it, and with ours, in one run.

    python -m benchmarks.benchmark --weights random --suite goals --seconds 540 --out benchmarks/results/h200.json
    python -m benchmarks.benchmark --weights pocket --sizes 256 --steps 1 2 --runs 5 --out benchmarks/results/cpu.json
    python -m benchmarks.benchmark --tables [--check] # the documents' tables, from the files in benchmarks/results

Weights are the pocket model, `random` (full size, built on the GPU: 62 GB), or a model's folder or id. Subjects:
`stock` is `QwenImageEditPlusPipeline.__call__` on the same modules, `stock-compiled` the same with regional compile,
`cache-dit` the same with that package where it is installed and applies; `plain` is our pipeline without accelerations,
`torchao-int8` and `torchao-fp8` the same on torchao's layers, compiled; `fast` is our pipeline with the fast path,
`fast-int8` and `fast-fp8` with our quantised linear layers in it, and with `-attention` 8-bit attention too. A frame goes from uint8 pictures never seen before on the CPU
to uint8 pictures on the CPU. Subjects that can share one set of modules take turns, frame by frame,
so that a machine's drift meets them alike; the others follow in phases (see `subjects`), and what a large matrix product
reaches is measured before each, so that drift between phases shows.

Cases are the product of the axes, or a suite of such products. `vlm`: `fresh` runs the text encoder on every picture,
`cached` keeps the first picture's embeddings. Stock is always fresh, scales references to a megapixel, and takes no batches.

The file: {"device", versions, "commit", "start", "ceiling_tflops", "fast_path", "phases", "rows", "left_out"}, and with
`--probes` "accuracy" and "new_prompts" (see `probes`). A row has
the case, then `median_ms` and `p95_ms` of `runs` frames, `fps` (pictures a second), `first_frame_s` (the first frame of
the case, with compilation or recording, in no other figure), `peak_memory_gb` during the timed frames and
`resident_memory_gb` before them, `stages_ms` (medians), `tokens`, `blocks_run` (below 1 where some are skipped), the
denoising stage's `tflops`, and `ceiling_share`, their share of the phase's ceiling in bf16 (float32 on a CPU). It is
written after every case, and is whole at any time. What was not measured is in `left_out`, with the reason. The last
line printed is JSON. The exit status is 1 if a subject failed.
"""

import argparse
import gc
import itertools
import json
import os

# As the program does (see `webui_realtime`): the CPU's figures are those that a person gets. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks import probes
from benchmarks.instruments import Clock, Memory, ceiling_tflops, denoise_flop, pictures
from benchmarks.result_file import Budget, ResultFile, environment, reason_of
from benchmarks.subjects import (
    PHASES,
    SUBJECTS,
    Case,
    LeftOutError,
    Models,
    Phase,
    Subject,
    as_run,
    random_pipeline,
    random_transformer,
)
from benchmarks.tables import write_tables
from cached_pipeline import load_pipeline

__all__ = ["main", "pictures", "random_pipeline", "run"]

MIN_RUNS = 3  # of a case that has used up its share of the time: fewer have no median worth the name
OURS = ["stock", "plain", "fast"]
AXES = {
    "sizes": [256],
    "steps": [2],
    "cfg": [1.0],
    "references": [1],
    "areas": ["output"],
    "batch": [1],
    "vlm": ["fresh"],
    "subjects": OURS,
}
# Each suite is a list of products; an axis that is not named has its value above.
SUITES = {
    "goals": [
        {"sizes": [256, 512], "steps": [1, 2], "vlm": ["fresh", "cached"]},
        {"sizes": [1024], "vlm": ["fresh", "cached"]},
    ],
    # What the project that this one started from publishes: 28 steps with guidance, 4, 4 compiled, Lightning with 2.
    "tables": [
        {"sizes": [512], "steps": [4], "subjects": list(SUBJECTS)},
        {"sizes": [256, 384, 512, 640, 768, 1024], "steps": [2, 4]},
        {"sizes": [512], "steps": [28], "cfg": [4.0], "subjects": [n for n in SUBJECTS if not n.startswith("torchao")]},
    ],
    "quantized": [{"sizes": [256, 512], "vlm": ["cached"], "subjects": [n for n in SUBJECTS if n.startswith(("fast", "torchao"))]}],
    "axes": [
        {"sizes": [512], "areas": [256**2, 512**2, 1024**2]},
        {"sizes": [512], "references": [1, 2, 3]},
        {"sizes": [256, 512], "batch": [1, 2, 4]},
    ],
}


# What is to be done ---------------------------------------------------------------------------------------------------


def products(blocks: list[dict]) -> Iterator[tuple[Case, list[str]]]:
    """Every case of the blocks with the subjects asked for it; a block names the axes in which it differs from AXES."""
    for block in blocks:
        axes = AXES | block
        order = ("sizes", "steps", "cfg", "references", "areas", "batch", "vlm")
        for size, steps, cfg, references, area, batch, vlm in itertools.product(*(axes[name] for name in order)):
            pixels = size * size if area == "output" else int(area)
            yield Case(size, size, steps, cfg, references, pixels, batch, vlm), axes["subjects"]


def plan(blocks: list[dict]) -> tuple[list[tuple[Phase, list[tuple[Case, list[str]]]]], dict[str, str]]:
    """Phases with their cases and the subjects of each, nothing twice; and what cannot be run, with the reason."""
    cases, left_out, seen = list(products(blocks)), {}, set()
    phases = []
    for phase in PHASES:
        todo = []
        for case, wanted in cases:
            names = []
            for name in phase.subjects:
                if name not in wanted:
                    continue
                try:
                    key = (name, as_run(name, case))
                except LeftOutError as reason:
                    left_out[f"{name}: {case}"] = str(reason)
                    continue
                if key not in seen:
                    names.append(name)
                seen.add(key)
            if names:
                todo.append((case, names))
        if todo:
            phases.append((phase, todo))
    return phases, left_out


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One subject on one case: its frames so far."""

    name: str
    subject: Subject
    case: Case
    times_ms: list[float] = field(default_factory=list)
    stages_ms: list[dict[str, float]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    first_frame_s: float | None = None
    resident_gb: float | None = None
    peak_gb: float | None = None
    failure: str | None = None

    def run_frame(self, frames: list, clock: Clock, memory: Memory, timed: bool) -> None:
        resident = memory.resident_gb()
        memory.reset_peak()
        clock.start()
        self.subject.edit(frames, self.case, clock)
        spent_ms = clock.stop()
        if self.first_frame_s is None:
            self.first_frame_s = spent_ms / 1e3
        if timed:
            self.times_ms.append(spent_ms)
            self.stages_ms.append(clock.stages_ms())
            self.tokens = clock.tokens
            self.resident_gb = max(filter(None, (self.resident_gb, resident)), default=None)
            self.peak_gb = max(filter(None, (self.peak_gb, memory.peak_gb())), default=None)

    def row(self, weights: str, config, graphs_gb: float, ceiling: float) -> dict:
        """The trial as the file has it."""
        median = statistics.median(self.times_ms)
        stages = {name: statistics.median(s[name] for s in self.stages_ms) for name in self.stages_ms[0]}
        share_run = self.subject.share_run(self.case)
        flop = denoise_flop(config, self.tokens, self.case.steps, self.case.batch) * share_run
        tflops = flop / stages["denoise"] / 1e9
        return {
            "subject": self.name,
            "weights": weights,
            **asdict(self.case),
            "quantize": self.subject.quantize,
            "attention_quantize": self.subject.attention_quantize,
            "text_encoder_quantize": "none",
            "changed_tokens": 1.0,
            "median_ms": round(median, 2),
            "p95_ms": round(float(np.percentile(self.times_ms, 95)), 2),
            "fps": round(self.case.batch * 1e3 / median, 3),
            "runs": len(self.times_ms),
            "first_frame_s": round(self.first_frame_s, 2),
            "peak_memory_gb": None if self.peak_gb is None else round(self.peak_gb + graphs_gb, 2),
            "resident_memory_gb": None if self.resident_gb is None else round(self.resident_gb + graphs_gb, 2),
            "stages_ms": {name: round(ms, 2) for name, ms in stages.items()},
            "tokens": self.tokens,
            "blocks_run": round(share_run, 3),
            "tflops": round(tflops, 3),
            "ceiling_share": round(tflops / ceiling, 3),
        }


def measure(trials: list[Trial], case: Case, runs: int, warmup: int, deadline_s: float, clock: Clock) -> None:
    """The trials in turn, each on new pictures. After the deadline warm-up ends, and MIN_RUNS frames are enough."""
    source, memory = pictures(case.width, case.height), Memory(clock.device)
    for i in range(warmup + runs):
        late = time.perf_counter() > deadline_s
        if late and 0 < i < warmup:
            continue
        if late and i >= warmup + MIN_RUNS:
            break
        for trial in trials:
            if trial.failure is not None:
                continue
            frames = [[next(source) for _ in range(case.batch)] for _ in range(case.references)]
            try:
                if i == 0:
                    trial.subject.prepare(trial.case)
                trial.run_frame(frames, clock, memory, timed=i >= warmup)
            except Exception as error:  # whatever it is, it must not cost the other subjects and cases their figures
                trial.failure = reason_of(error)
            if trial.failure is not None:
                _release_memory(clock.device)


def run_phase(
    phase: Phase, todo: list, models: Models, args, result: ResultFile, budget: Budget, clock: Clock, behind: int
) -> None:
    """All cases of a phase; `behind` is the number of cases in the phases after it."""
    names = [name for name in phase.subjects if any(name in wanted for _, wanted in todo)]
    _release_memory(clock.device)
    ceiling = ceiling_tflops(clock.device)
    with ExitStack() as stack:
        began = time.perf_counter()
        try:
            subjects = stack.enter_context(phase.enter(models))
        except Exception as error:
            result.leave_out(names, None, reason_of(error))
            return
        spent_s = round(time.perf_counter() - began, 2)
        result.data.setdefault("ceiling_tflops", round(ceiling, 3))
        result.data["phases"].append({"subjects": names, "ceiling_tflops": round(ceiling, 3), "start_s": spent_s})
        if models.fast_path and "fast" in names:
            result.data["start"]["fast_path_s"] = spent_s
            result.data["fast_path"] = [line._asdict() for line in models.fast_path]
        if args.probes and "plain" in names:
            models.probe = probes.plain(models.ours)
        elif args.probes and "fast" in names:
            if models.probe:
                result.data["accuracy"] = probes.compare(models.ours, models.probe)
            result.data["new_prompts"] = probes.new_prompts(models.ours)
        for i, (case, wanted) in enumerate(todo):
            if budget.is_over():
                result.leave_out(wanted, case, "the time given was over")
                continue
            deadline_s = budget.deadline_s(len(todo) - i + behind)
            trials = [Trial(name, subjects[name], as_run(name, case)) for name in wanted]
            measure(trials, case, args.runs, args.warmup, deadline_s, clock)
            for trial in trials:
                if trial.failure is not None:
                    result.leave_out([trial.name], trial.case, trial.failure)
                    continue
                config, graphs_gb = models.ours.transformer.config, Memory(clock.device).graphs_gb()
                row = trial.row(args.weights, config, graphs_gb, ceiling)
                result.data["rows"].append(row)
                print(
                    f"{trial.name}: {trial.case}: {row['median_ms']} ms, p95 {row['p95_ms']}, "
                    f"first {row['first_frame_s']} s, {row['runs']} runs",
                    flush=True,
                )
            result.write()


def run(args) -> ResultFile:
    """Measures what the command line asks for."""
    budget, began = Budget(args.seconds), time.perf_counter()
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current device's stream
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    phases, left_out = plan(args.blocks)
    result = ResultFile(args.out, environment(device, args.commit))
    result.data["left_out"] |= left_out
    if args.weights == "random":
        models = Models(random_pipeline(args.device, dtype), lambda: random_transformer(args.device, dtype))
    else:
        ours = load_pipeline(args.weights, device=args.device, dtype=dtype)
        models = Models(ours, lambda: load_pipeline(args.weights, device=args.device, dtype=dtype).transformer)
    result.data["start"] = {"load_s": round(time.perf_counter() - began, 2)}
    result.write()
    for i, (phase, todo) in enumerate(phases):
        if budget.is_over():
            for case, names in todo:
                result.leave_out(names, case, "the time given was over")
            continue
        behind = sum(len(later) for _, later in phases[i + 1 :])
        run_phase(phase, todo, models, args, result, budget, Clock(device), behind)
    result.write()
    return result


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# The command line -----------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and in `blocks` what they make of the axes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="pocket", help="pocket, random (full size), or a model folder or id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--suite", choices=SUITES, help="cases that belong together; an axis given as well replaces its"
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, help=f"default: {' '.join(OURS)}")
    parser.add_argument("--sizes", nargs="+", type=int, help="sides of the square output in pixels")
    parser.add_argument("--steps", nargs="+", type=int)
    parser.add_argument("--cfg", nargs="+", type=float, help="true CFG scales; 1 is none")
    parser.add_argument("--references", nargs="+", type=int, choices=[1, 2, 3])
    parser.add_argument("--areas", nargs="+", help="area of a reference in pixels, or output for the output's")
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--vlm", nargs="+", choices=["fresh", "cached"])
    parser.add_argument("--runs", type=int, default=20, help="timed frames of a case (default 20)")
    parser.add_argument(
        "--warmup", type=int, default=2, help="frames before them (default 2); the first is timed apart"
    )
    parser.add_argument("--seconds", type=float, help="end after about this time, with every case that fits")
    parser.add_argument(
        "--probes", action="store_true", help="also how exact the fast path is, and the cost of a new prompt"
    )
    parser.add_argument("--commit", help="where the code runs without its git history")
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--tables", action="store_true", help="only rewrite the documents' tables from the result files")
    parser.add_argument("--check", action="store_true", help="with --tables: only say whether they are what the files say")
    args = parser.parse_args(argv)
    for name in ("runs", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: at least 1")
    for area in args.areas or []:
        if area != "output" and not area.isdecimal():
            parser.error(f"--areas is {area}: a number of pixels, or output")
    given = {name: getattr(args, name) for name in AXES if getattr(args, name) is not None}
    args.blocks = [block | given for block in SUITES[args.suite]] if args.suite else [given]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.tables:
        write_tables(check=args.check)
        return 0
    result = run(args)
    short = {"out": str(args.out), "rows": len(result.data["rows"]), "left_out": result.data["left_out"]}
    print(json.dumps(short if args.out else result.data))
    return int(result.failed)


if __name__ == "__main__":
    sys.exit(main())
