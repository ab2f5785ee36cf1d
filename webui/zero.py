"""Spaces that lend a GPU for the length of a call (ZeroGPU): single edits, one call each.

There, CUDA exists only inside a function that `spaces.GPU` decorates, which runs in a process of its own, forked when it
is first called and taken away when it has been idle. A thread that owns the model for hours, as the engine's does, cannot
be had. So the pipeline is loaded in the main process before the page is launched, and each edit starts an engine inside
the call, without the fast path, whose recordings would be lost with the process. Nothing there can live from frame to
frame: the live view, videos, POST /edit and the steps' progress are left out, and the page says so.
"""

import os
from collections.abc import Callable
from typing import NoReturn

from engine.contract import Pipeline
from engine.fitting import Fitted
from pipeline.images import EditError
from qwen_realtime import EditParams, EditResult, EngineConfig, EngineStats, RealtimeEngine

CALL_S = 60  # what a call may take; people have a daily share of seconds, so it is no more than an edit needs
ONE_AT_A_TIME = (
    "This Space lends its GPU for one edit at a time (ZeroGPU), so there is no live view, no video and no HTTP here: "
    "upload a photo, or two. Duplicate it to a Space with its own GPU, or run the program on your own, to have them."
)


def zero_gpu() -> bool:
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


class ZeroEngine:
    """What the page needs of an engine, each edit in a call of its own."""

    def __init__(self, pipeline: Pipeline, config: EngineConfig):
        import spaces  # pyright: ignore[reportMissingImports] - installed on those Spaces only

        self.pipeline, self.config = pipeline, config
        self.default_size: int = config.default_size or pipeline.default_size
        self.description = {**pipeline.description, "default_size": self.default_size, "fast_path": [], "gpu": "ZeroGPU"}
        self._on_the_gpu = spaces.GPU(duration=CALL_S)(self._edit)

    def warm_up(self) -> None:
        """No one's share of seconds is spent on a first picture."""

    def _edit(self, images: list | Fitted, params: EditParams) -> EditResult:
        """Runs in the process that has the GPU. An error comes back as a result: it must cross to the other process."""
        config = EngineConfig(max_sessions=1, default_size=self.default_size, fast_path=False)
        with RealtimeEngine(self.pipeline, config) as engine:
            try:
                return engine.edit(images, params)
            except EditError as error:
                return EditResult(
                    number=1, image=None, error=EditError(str(error)), params=params, stages_ms={}, age_ms=0.0, dropped=0,
                    fps=0.0,
                )  # fmt: skip

    def open_session(self) -> NoReturn:
        raise EditError(ONE_AT_A_TIME)

    def open_single(self) -> "SingleEdit":
        return SingleEdit(self._on_the_gpu)

    def stats(self) -> EngineStats:
        return RealtimeEngine(self.pipeline, self.config).stats()

    def close(self) -> None:
        """Nothing is left running between calls."""


class SingleEdit:
    """What the page needs of an engine's session, for one edit. Neither its steps nor a stop can cross to the process that
    has the GPU: `on_step` is not called, and an edit that runs is run to its end.
    """

    def __init__(self, call: Callable[[list | Fitted, EditParams], EditResult]):
        self._call = call

    def __enter__(self) -> "SingleEdit":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be stopped."""

    def submit(self, images: list | Fitted, params: EditParams, on_step: Callable[[int, int], None] | None = None) -> int:
        self._edit = images, params
        return 1

    def result(self, number: int, timeout: float | None = None) -> EditResult:
        """Makes the call and waits for it, however long it takes. Raises EditError."""
        result = self._call(*self._edit)
        if result.error is not None:
            raise EditError(str(result.error))
        return result
