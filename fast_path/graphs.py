"""CUDA graphs by shape: a function of tensors is recorded once for each shape of its inputs, and replayed from then on.

At batch one the 20 B transformer launches its kernels more slowly than the GPU runs them: eager, a step at 256x256 and
one at 512x512 take the same time. A replayed graph launches thousands of kernels with one call. The price is one
recording for each new shape, some tens of milliseconds for what is written in few kernels: cheap enough to do when a
shape first comes, so shapes are not padded, bucketed or predicted. Token reuse is the exception: its shapes change with
every frame.

Graphs are recorded and replayed on the engine's one inference thread; recording is thread-local, so that the page's
threads may go on talking to the GPU. Recordings of one object share a memory pool: their scratch space overlaps, which is safe
because what a replay returns is copied out before the next one starts, on the same stream.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch


class Recording(NamedTuple):
    replay: Callable[[], None]  # computes `outputs` from what `inputs` hold
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    single: bool  # the function returned one tensor, no tuple
    function: Callable  # what it has captured by closure has to live as long as the graph reads it


class Graphs:
    """Recordings of functions by shape, at most `max_entries`, the least recently used evicted first.

    On a CPU functions simply run: `recorder` says what can be recorded, and does it.
    """

    def __init__(self, max_entries: int = 48, recorder: "CudaRecorder | None" = None):
        self.max_entries = max_entries
        self.recordings = 0  # how often something was recorded: a steady stream records nothing
        self._entries: OrderedDict[Hashable, Recording] = OrderedDict()
        self._recorder = recorder or CudaRecorder()

    def __len__(self) -> int:
        return len(self._entries)

    def run(self, key: Hashable, function: Callable, *inputs: torch.Tensor) -> Any:
        """`function(*inputs)`: a tensor or a tuple of tensors. They are clones that later calls do not overwrite.

        `key` names everything the function depends on except for the inputs' shapes, dtypes and values. The function must
        ask the GPU nothing, copy nothing from the host, and read no tensors other than the inputs and its own. The first
        call for a key runs it as it is, which fills caches and compiles kernels, and records it afterwards.
        """
        if not self._recorder.records(inputs[0]):
            return function(*inputs)
        key = _kind(key, inputs)
        entry = self._entries.get(key)
        if entry is None:
            outputs = function(*inputs)
            self._add(key, function, inputs)
            return outputs
        self._entries.move_to_end(key)
        for static, given in zip(entry.inputs, inputs, strict=True):
            static.copy_(given)
        entry.replay()
        outputs = tuple(t.clone() for t in entry.outputs)
        return outputs[0] if entry.single else outputs

    def knows(self, key: Hashable, *inputs: torch.Tensor) -> bool:
        """Whether `run` would record nothing."""
        return not self._recorder.records(inputs[0]) or _kind(key, inputs) in self._entries

    @property
    def full(self) -> bool:
        """Whether the next recording evicts another one."""
        return len(self._entries) >= self.max_entries

    def record(self, key: Hashable, function: Callable, *inputs: torch.Tensor) -> None:
        """Record before it is needed, on CUDA. Nothing runs: what a first call compiles and fills has to exist already."""
        self._add(_kind(key, inputs), function, inputs)

    def clear(self) -> None:
        """Forgets all recordings and frees their memory."""
        self._entries.clear()
        self._recorder.clear()

    def _add(self, key: Hashable, function: Callable, inputs: tuple[torch.Tensor, ...]) -> None:
        self.recordings += 1
        self._entries[key] = self._recorder.record(function, inputs)
        if len(self._entries) > self.max_entries:
            self._entries.popitem(last=False)


class CudaRecorder:
    """Records functions as CUDA graphs that share a memory pool."""

    def __init__(self):
        self._pool = self._stream = None

    def records(self, tensor: torch.Tensor) -> bool:
        """Whether a function of this tensor can be recorded."""
        return tensor.is_cuda

    def clear(self) -> None:
        """The next recording starts a new memory pool."""
        self._pool = None

    def record(self, function: Callable, inputs: tuple[torch.Tensor, ...]) -> Recording:
        """Nothing runs here: the GPU goes on with what it was given before."""
        static = tuple(t.clone() for t in inputs)
        current = torch.cuda.current_stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # one for all: libraries keep a workspace for every stream they have seen
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Not `with torch.cuda.graph(...)`: it collects Python's garbage and empties torch's memory cache first, which
            # with a model of this size takes longer than the recording.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = function(*static)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a recording that broke off says so: the cause is what matters
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        single = isinstance(outputs, torch.Tensor)
        return Recording(graph.replay, static, (outputs,) if single else tuple(outputs), single, function)


def _kind(key: Hashable, inputs: tuple[torch.Tensor, ...]) -> Hashable:
    return (key, *((tuple(t.shape), t.dtype, t.device) for t in inputs))
