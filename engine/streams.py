"""Everything that differs between a GPU and a CPU: CUDA streams and events, the stopwatch, the copy to the host.

On the CPU there is one order of work and no event: each event here is None, and waiting for it does nothing.
"""

import contextlib
import time
from typing import Any

import numpy as np
import torch

STAGES: tuple[str, ...] = ("prepare", "encode_prompt", "encode_references", "denoise", "decode", "total")


class Streams:
    """The streams of one device, next to the current one, on which frames are denoised."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sides: torch.cuda.Stream | None = None  # for a frame's first and last stage; None: the current stream
        self.renewals: torch.cuda.Stream | None = None  # for embeddings that are made in the background

    def start(self, overlap: bool) -> None:
        """On CUDA: a stream for renewals, and with `overlap` one for the first and the last stage."""
        self.renewals = torch.cuda.Stream(self.device)
        self.sides = torch.cuda.Stream(self.device) if overlap else None

    def on(self, stream: torch.cuda.Stream | None):
        """A context in which work goes to `stream`; with None to the current one."""
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Lets the current stream wait for the event, on the GPU: the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def hand_over(self, *tensors: torch.Tensor | None) -> None:
        """Tells torch that the current stream reads what another stream made: torch must not reuse that memory before."""
        for tensor in tensors:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(self.device))

    def event(self) -> torch.cuda.Event | None:
        """An event on the current stream; None on the CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


class Stopwatch:
    """Milliseconds of each stage of one frame. On CUDA by events, which are read when the frame is done."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def stage(self, name: str):
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # on the current stream
        return event

    def read_ms(self) -> dict[str, float]:
        """The keys of STAGES; "total" is the sum of the others."""
        stages = dict.fromkeys(STAGES, 0.0)
        for name, begin, end in self._spans:
            if self._cuda:
                end.synchronize()
            stages[name] += begin.elapsed_time(end) if self._cuda else (end - begin) * 1000
        stages["total"] = sum(stages.values())
        return stages


class Download:
    """A picture on its way to the host, through pinned memory: the copy is asked for, not waited for."""

    def __init__(self, picture: torch.Tensor, finite: torch.Tensor):
        self._event = None
        self._parts = [picture, finite]
        if picture.is_cuda:
            self._parts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in self._parts]
            for host, tensor in zip(self._parts, (picture, finite), strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[np.ndarray, bool]:
        if self._event is not None:
            self._event.synchronize()
        return self._parts[0].numpy(), bool(self._parts[1])
