"""The engine, or how far its loading has come.

The routes answer from the first second, the model follows: so they hold an `EngineHolder`, never an engine.
"""

import threading
from typing import Any

from qwen_realtime import RealtimeEngine
from serving.access import plain
from serving.decoding import Decoder
from serving.version import VERSION


class EngineHolder:
    """The engine, or how far its loading has come. Written by the loader's thread, read by all others."""

    def __init__(self, engine: RealtimeEngine | None = None, choice: dict[str, Any] | None = None):
        self._changed = threading.Condition()
        self._engine = engine
        self._state = self._phase = "loading" if engine is None else "ready"
        self._text, self._fraction = ("Starting", 0.0) if engine is None else ("Ready", 1.0)
        self.page_only = ""  # why only the page may edit, where that is so: see `webui.zero`
        self.decoder = Decoder()  # one for all that this process is sent: routes, socket and page share its limits
        self.choice = choice or {}  # which model and why: {"model", "lora", "reason", "how_to_get_other"}

    @property
    def engine(self) -> RealtimeEngine | None:
        """The engine, or None while it is loading or when loading failed."""
        return self._engine

    @property
    def loaded(self) -> RealtimeEngine:
        """The engine, for those who know that it is there."""
        assert self._engine is not None
        return self._engine

    def progress(self, text: str, fraction: float, *, warming: bool = False) -> None:
        """How far loading is; `warming` when the weights are there and a first picture is being edited."""
        with self._changed:
            self._text, self._fraction = text, min(max(float(fraction), 0.0), 1.0)
            self._phase = "warming" if warming else "loading"
            self._changed.notify_all()

    def ready(self, engine: RealtimeEngine) -> None:
        with self._changed:
            self._engine, self._text, self._fraction = engine, "Ready", 1.0
            self._state = self._phase = "ready"
            self._changed.notify_all()

    def fail(self, text: str) -> None:
        with self._changed:
            self._engine, self._text = None, text
            self._state = self._phase = "failed"
            self._changed.notify_all()

    def leave(self) -> None:
        """The program is about to end."""
        with self._changed:
            self._state = self._phase = "stopping"
            self._text = "The program is stopping. Try again when it is back."
            self._changed.notify_all()

    def status(self) -> dict:
        """{"state": "loading" | "ready" | "failed" | "stopping", "phase", "text", "fraction", "choice", "version"}; when ready, what runs.

        The phase is the state, but "warming" in the last part of "loading".
        """
        with self._changed:
            status = {"state": self._state, "phase": self._phase, "text": self._text, "fraction": self._fraction}
            status |= {"choice": self.choice, "version": VERSION}
            engine = self._engine
        failure = getattr(engine, "failure", None)  # of a thread that died: `ready` was true once
        if failure is not None and status["state"] == "ready":
            status |= {"state": "failed", "phase": "failed", "text": failure}
        if engine is not None:
            status["description"] = plain(engine.description)
            status["default_size"] = engine.default_size
        return status

    def wait(self, timeout: float) -> dict:
        """The status, after the next change or `timeout` seconds, at once when there is nothing to wait for."""
        with self._changed:
            if self._state == "loading":
                self._changed.wait(timeout)
        return self.status()


def why_not(status: dict) -> str:
    """Why a status that is neither "ready" nor "loading" lets no edit through, as a sentence."""
    before_it_ran = status["state"] == "failed" and "description" not in status
    return f"The model could not be loaded: {status['text']}" if before_it_ran else status["text"]
