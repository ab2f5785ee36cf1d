"""Gives memory back to the system that large pictures on a CPU left free inside the process.

glibc keeps freed blocks below others that still live: after a few dozen pictures of odd sizes a process of 0.7 GB holds
1.4 GB, of which it uses half. `malloc_trim` gives the pages in between back. The call takes 5 ms, but the next frame has to
be given its pages again, a tenth of its time at 256x256. So it is made when nothing was computed for a second, and after
a picture so large that this is little.
"""

import ctypes
import functools
import threading
import time
from collections.abc import Callable

LARGE_PIXELS = 2**19  # of an output: 724x724
IDLE_S = 1.0


@functools.cache
def malloc_trim() -> Callable[[int], int] | None:
    """glibc's function of this name; None where the C library is another one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return None


class HostMemory:
    """Trims after large frames and when frames have stopped coming. For a model on the CPU; a GPU's activations lie elsewhere."""

    def __init__(self, trim: Callable[[int], int] | None, idle_s: float = IDLE_S):
        self._trim, self._idle_s = trim, idle_s
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._last_monotonic = 0.0
        self._waiter: threading.Thread | None = None  # lives while frames come, and ends with its trim

    def computed(self, pixels: int) -> None:
        """To be called after a frame whose output has this many pixels."""
        if self._trim is None:
            return
        if pixels >= LARGE_PIXELS:
            self._trim(0)
            return
        with self._lock:
            self._last_monotonic = time.monotonic()
            if self._waiter is None:
                self._waiter = threading.Thread(target=self._trim_when_idle, name="trim", daemon=True)
                self._waiter.start()

    def _trim_when_idle(self) -> None:
        while True:
            with self._lock:
                left_s = self._last_monotonic + self._idle_s - time.monotonic()
                if left_s <= 0:
                    self._waiter = None
                    break
            if self._closed.wait(left_s):
                return
        if self._trim is not None:
            self._trim(0)

    def close(self) -> None:
        """After the last frame: no thread of this is left."""
        self._closed.set()
        with self._lock:
            waiter = self._waiter
        if waiter is not None:
            waiter.join()
