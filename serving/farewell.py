"""How both programs end: SIGTERM or SIGINT, a sentence to every caller, exit code 0, within seconds; a second signal ends at once.

The order matters. First the holder says that the program is stopping: a new edit is refused with a sentence, live sockets
are closed with one. Then the engine closes, so that every edit in it fails at once and its caller is answered. Only then
the server goes. The process leaves by `os._exit`: a thread that is loading a model or encoding a video is inside C++ code,
which Python can neither end nor wait for.
"""

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from serving.holder import EngineHolder

TOLD_S = 0.5  # until every live socket has looked at the holder: `serving.live` does every 0.3 s
ENGINE_S = 1.5  # the engine stops within one step; a step of a large picture on a CPU may take longer
SERVER_S = 2  # for the answers that are on their way

log = logging.getLogger(__name__)


class Farewell:
    """Takes the signals while it is entered; `asked` is set by the first. To be entered on the main thread."""

    def __init__(self):
        self.asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Farewell":
        self._before = {which: signal.signal(which, self._on_signal) for which in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _on_signal(self, which: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            os._exit(128 + which)
        self.asked.set()


def close_engine(holder: EngineHolder) -> None:
    """Closes the engine, if it is there; returns after `ENGINE_S` also when its thread is still in a step."""
    engine = holder.engine
    if engine is None:
        return
    closing = threading.Thread(target=engine.close, name="closing", daemon=True)
    closing.start()
    closing.join(ENGINE_S)


def end() -> None:
    """Ends the process with exit code 0."""
    log.info("stopped")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
