"""What goes wrong with a frame: the model's failures, cancelling, and how an exhausted memory is recognised."""

import torch

from pipeline.images import EditError


class EngineError(EditError):
    """The frame was good and the model failed on it. `kind`: "out_of_memory", "not_finite" or "failed"."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


class Cancelled(Exception):
    """Unwinds a cancelled frame; never reaches a caller of the engine."""


def is_out_of_memory(error: Exception) -> bool:
    """torch has a kind of its own for it, a RuntimeError; cuBLAS and the CPU raise plain ones."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "allocate memory", "ALLOC_FAILED")
    )
