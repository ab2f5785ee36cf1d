"""The realtime engine: sessions put frames in, edited frames come out, one thread runs the model.

This is the door. Behind it, in `engine/`:

    sessions    people's streams: mailboxes, result slots, and the table of all of them with its lock
    loop        the inference thread: whose turn it is, failures, delivery
    frames      one frame in three stages
    contract    what a pipeline must have to be run here
    settings    `EngineConfig` when the engine is built, `EditParams` with each frame

Callers only exchange numpy arrays; everything torch does for a frame happens on the inference thread. A frame carries
its own params, so a change of settings never reaches a frame that is already running. Mailboxes have one slot and the
newest frame wins. What a person can act on is an `EditError`.
"""

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.contract import Pipeline
from engine.errors import EngineError
from engine.fitting import Fitted
from engine.frames import prepare_pictures
from engine.loop import Loop
from engine.sessions import EditResult, Session, Sessions, Submission
from engine.settings import CHOICES, LIMITS, MAX_PROMPT_CHARS, PICTURES, EditParams, EngineConfig
from engine.statistics import EngineStats, Statistics
from engine.streams import STAGES

__all__ = [
    "CHOICES", "LIMITS", "MAX_PROMPT_CHARS", "PICTURES", "STAGES", "EditParams", "EditResult", "EngineConfig", "EngineError",
    "EngineStats", "RealtimeEngine", "Session", "Submission", "prepare_pictures",
]  # fmt: skip


class RealtimeEngine:
    """Runs a loaded pipeline for many sessions on one thread. `clock` is monotonic seconds, `draw` a number in [0, 1).

    Start it before the first frame, close it to join the thread; or use it as a context manager.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ):
        self.pipeline = pipeline
        self.config = config or EngineConfig()
        self.default_size: int = self.config.default_size or pipeline.default_size
        self._sessions = Sessions(self.config, self.default_size, clock)
        self._statistics = Statistics()
        self._loop = Loop(pipeline, self._sessions, self._statistics, draw)

    @property
    def description(self) -> dict[str, Any]:
        """The model, its fast path and what overlaps, for people and `/health`; empty before the start."""
        return self._loop.description

    @property
    def failure(self) -> str | None:
        """Why the inference thread ended by itself; None while it has not."""
        return self._sessions.failure

    # Life

    def start(self) -> "RealtimeEngine":
        """Starts the thread and returns when the model is ready for frames; raises what kept it from that."""
        self._loop.start()
        if self._loop.start_error is not None:
            self.close()
            raise self._loop.start_error
        return self

    def close(self) -> None:
        """Closes every session, stops the running frame within a step and joins the thread. May be called twice."""
        self._sessions.close_all("The engine is closed.")
        self._loop.join()

    def __enter__(self) -> "RealtimeEngine":
        return self.start()

    def __exit__(self, *exc) -> None:
        self.close()

    # Sessions

    def open_session(self) -> Session:
        """A new stream. Raises EditError when `max_sessions` are open or the engine is closed."""
        return self._sessions.open()

    def open_single(self) -> Session:
        """A session for one edit. It has a name of its own for engines that edit single pictures and have no streams."""
        return self.open_session()

    def warm_up(self) -> None:
        """Edits one grey picture: pays once what the first person would wait for. Raises EditError."""
        grey = np.full((self.default_size, self.default_size, 3), 128, np.uint8)
        self.edit([grey], EditParams(prompt="keep it unchanged"))

    def edit(
        self,
        images: list[np.ndarray] | Fitted,
        params: EditParams,
        on_step: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> EditResult:
        """One edit in a session of its own, blocking. Raises EditError; TimeoutError after `timeout` s, and cancels."""
        if self._loop.thread is None:
            raise RuntimeError("start the engine first")
        with self.open_session() as session:
            return session.result(session.submit(images, params, on_step), timeout)

    def stats(self) -> EngineStats:
        """What the engine did since it started. May be called from any thread, at any time."""
        memory, device = {}, self._loop.device
        if device.type == "cuda":
            memory["allocated"] = torch.cuda.memory_allocated(device)
            memory["reserved"] = torch.cuda.memory_reserved(device)
            memory["peak"] = torch.cuda.max_memory_allocated(device)
        with self._sessions.lock:
            return self._statistics.summary(self._sessions, memory, self._sessions.clock())
