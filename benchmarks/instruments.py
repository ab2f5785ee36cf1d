"""What the benchmark measures with: a clock that does not disturb, memory, the machine's ceiling, unseen pictures.

The frame is timed from end to end with the GPU drained at its two ends only, as a person waits for it. Inside it nothing
may wait: a synchronisation between two stages would let the GPU run dry where the real pipeline keeps it fed. Stages
are therefore CUDA events, recorded in passing and read when the frame is over.
"""

import contextlib
import statistics
import time
from pathlib import Path

import numpy as np
import torch


class Clock:
    """Times one frame after another: `start`, a `mark` at the end of each stage, `stop`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens: dict[str, int] = {}  # what the transformer saw; the subject writes it in passing
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._began = 0.0

    def start(self) -> None:
        self.tokens, self._marks = {}, []
        self._drain()
        self._began = time.perf_counter()
        self.mark("")

    def mark(self, stage: str) -> None:
        """All since the mark before belongs to `stage`. On CUDA the time is the GPU's, and nothing waits for it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter() * 1e3))

    def stop(self) -> float:
        """Milliseconds since `start`, the GPU's work included."""
        self._drain()
        return (time.perf_counter() - self._began) * 1e3

    def stages_ms(self) -> dict[str, float]:
        """Milliseconds of each stage; parts of one name are added. Call after `stop`."""
        stages: dict[str, float] = {}
        for (_, began), (stage, ended) in zip(self._marks, self._marks[1:]):
            spent = began.elapsed_time(ended) if self.device.type == "cuda" else ended - began
            stages[stage] = stages.get(stage, 0.0) + spent
        return stages

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Memory:
    """Resident and peak memory in GB (1e9 bytes): of the GPU's tensors, or of the whole process on a CPU (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # elsewhere than on Linux: `peak_gb` says None
                Path("/proc/self/clear_refs").write_text("5")

    def resident_gb(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 1e9
        return _process_memory_gb("VmRSS")

    def peak_gb(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return _process_memory_gb("VmHWM")

    def graphs_gb(self) -> float:
        """Scratch space that recorded CUDA graphs hold. The allocator counts it as free between replays; it is not."""
        if self.device.type != "cuda":
            return 0.0
        segments = torch.cuda.memory_snapshot()
        private = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
        return sum(s["total_size"] - s["allocated_size"] for s in private) / 1e9


def _process_memory_gb(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(field + ":")), None)


def ceiling_tflops(device: torch.device) -> float:
    """What a large matrix product reaches here and now: 8192^3 in bfloat16 on CUDA, 2048^3 in float32 on a CPU.

    Random numbers, as zeros draw less power and clock higher. Median of three groups.
    """
    cuda = device.type == "cuda"
    side, dtype, calls = (8192, torch.bfloat16, 10) if cuda else (2048, torch.float32, 1)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out, clock, spent_ms = torch.empty_like(a), Clock(device), []
    for _ in range(4):
        clock.start()
        for _ in range(calls):
            torch.matmul(a, b, out=out)
        spent_ms.append(clock.stop())
    return 2.0 * side**3 * calls / statistics.median(spent_ms[1:]) / 1e9


def denoise_flop(config, tokens: dict[str, int], steps: int, batch: int) -> float:
    """Floating-point operations of the transformer in one frame; `tokens` as the subjects write them.

    A forward is 12 d^2 multiply-adds a token and block, and the joint attention. Modulation is not counted, whichever subject
    computes it: it is one token's worth. Guidance adds a forward with the negative prompt's tokens.
    """
    d = config.num_attention_heads * config.attention_head_dim
    flop = 0.0
    for text in ("text", "negative_text"):
        if text in tokens:
            n = tokens["noise"] + tokens["reference"] + tokens[text]
            flop += config.num_layers * (24.0 * d * d * n + 4.0 * n * n * d)
    return steps * batch * flop


def pictures(width: int, height: int, seed: int = 0):
    """Endless distinct uint8 pictures (H, W, 3), C-contiguous as decoders give them: smooth colour fields with a little
    noise, none seen twice.
    """
    random = np.random.default_rng(seed)
    while True:
        coarse = random.uniform(0, 255, (5, 5, 3))
        rows, columns = np.linspace(0, 3.999, height), np.linspace(0, 3.999, width)
        r, c = rows.astype(int), columns.astype(int)
        fr, fc = (rows - r)[:, None, None], (columns - c)[None, :, None]
        top = coarse[r][:, c] * (1 - fc) + coarse[r][:, c + 1] * fc
        bottom = coarse[r + 1][:, c] * (1 - fc) + coarse[r + 1][:, c + 1] * fc
        picture = top * (1 - fr) + bottom * fr + random.normal(0, 4, (height, width, 3))
        yield picture.clip(0, 255).astype(np.uint8, order="C")
