"""Pictures from outside, opened at a bounded price: bytes, pixels, scans, seconds and memory, told by `Limits`.

The routes, the socket and the page open what they are sent through the one `Decoder` of their process and by nothing
else. `inspection` estimates the work from the file's markers. What is surely cheap, as every frame of a live view, is
opened in this process, in the time that Pillow takes. Everything else goes to a worker: a process with limits of its own
(`decode_worker`), which is ended when a picture takes too long or its sender has left. A second process costs 4 ms for a
megapixel, most of it the copy through a pipe; threads could not be ended, and what a damaged file does to a reader
written in C would happen to the whole program.

There are few workers. Expensive pictures may never have the last one, so cheap ones are not behind them; among
equals it is the turn of the sender with the fewest pictures in work, then of the one that waited longest for a turn. All
pixels that the callers still hold are counted: over the limit no more are opened.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None

from pipeline.picture_files import MAX_PIXELS, EditError, check_size, open_image
from serving import inspection
from serving.decode_worker import REPLY, REQUEST, png_text

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parent.parent
# What a worker may know of the environment: where its libraries are, and no key or password.
_ENVIRONMENT = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "LD_LIBRARY_PATH",
                "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")  # fmt: skip
_ENDED_ITSELF = (0, -getattr(signal, "SIGALRM", 0))
_OUT_OF_TIME = -getattr(signal, "SIGXCPU", 1 << 20)
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from serving import decode_worker; decode_worker.main({}, {})"


@dataclass(frozen=True)
class Limits:
    """What opening pictures may cost, the only home of these numbers but for `inspection`'s counts of markers."""

    file_bytes: int = 64 * 2**20
    frame_bytes: int = 4 * 2**20  # of a live view; a 1024x1024 JPEG has about 0.3 MB
    frame_pixels: int = 2048 * 2048
    pixels: int = MAX_PIXELS  # of one picture
    held_pixels: int = 192_000_000  # of all opened pictures, 3 bytes each, until their callers drop them
    processor_seconds: int = 4  # for one picture
    seconds: float = 15.0  # for one picture, by the clock: a processor that others use too takes longer
    wait_seconds: float = 10.0  # for a worker
    waiting: int = 48  # pictures
    workers: int = 2
    worker_bytes: int = 1536 * 2**20  # of memory, for one worker
    start_seconds: float = 30.0  # for a worker to start
    here_bytes: int = 4 * 2**20  # a file up to this size, of up to this work, is opened in this process
    here_work: int = 4_200_000  # pixels, see `inspection`: a JPEG of 2048x2048, 10 scans of 640x640
    here_extra_bytes: int = 128 * 2**10
    cheap_work: int = 50_000_000  # what may have the last worker: a photograph of 50 megapixels in one scan, a PNG of 25

    def sentence(self) -> str:
        """For people who send pictures."""
        return (
            f"A picture may have {self.file_bytes // 2**20} MB and {self.pixels:,} pixels, a JPEG {inspection.MAX_SCANS} "
            f"scans and {inspection.MAX_WORK:,} pixels in all of them; opening it may take {self.processor_seconds} s of a processor "
            f"and {self.worker_bytes // 2**20} MB of memory."
        )


LIMITS = Limits()


class Busy(EditError):
    """Nothing is wrong with the picture: too many others are being opened. Try again later."""


class Left(Exception):
    """The sender left while its picture was waiting or being opened."""


class Sender:
    """One who sends pictures. `client` is what turns are shared by: an address, or a session of the page."""

    def __init__(self, client: str = ""):
        self.client = client
        self._lock = threading.Lock()
        self._on_leave: Callable[[], None] | None = None
        self.left = False

    def leave(self) -> None:
        """What is being opened for this sender ends now, in whatever thread it is."""
        with self._lock:
            self.left = True
            if self._on_leave is not None:
                self._on_leave()

    @contextlib.contextmanager
    def _ended_by(self, end: Callable[[], None]):
        """Within it, leaving calls `end`. Raises Left."""
        with self._lock:
            if self.left:
                raise Left
            self._on_leave = end
        try:
            yield
        except EditError:
            if not self.left:  # ending the work is what made it fail
                raise
        finally:
            with self._lock:
                self._on_leave = None
        if self.left:
            raise Left


@dataclass(eq=False)
class _Place:
    """In the queue, or with a worker."""

    number: int
    client: str
    work: int  # pixels, as `inspection` estimates them
    worker: "_Worker | None" = None


class Decoder:
    """Opens pictures for all doors of this process. Workers are started when they are first needed."""

    def __init__(self, limits: Limits = LIMITS):
        self.limits = limits
        # For callers with an event loop. Larger than what can wait, so that cheap pictures always find a thread.
        self.pool = ThreadPoolExecutor(limits.waiting + limits.workers + 8, thread_name_prefix="decode")
        self._here = threading.Semaphore(4)  # at a time; a frame of a live view takes 3 ms
        self._changed = threading.Condition()  # its lock is reentrant: pixels are released by the garbage collector
        self._places: dict[int, _Place] = {}
        self._numbers = itertools.count(1)
        self._turns: dict[str, int] = {}  # of each client that is here, the number of its last turn
        self._workers = tuple(_Worker(limits) for _ in range(limits.workers))
        self._idle = list(self._workers)
        self._held_pixels = self._refused = 0
        weakref.finalize(self, _end_all, self._workers)

    def summary(self) -> dict[str, int]:
        """Pictures with a worker ("running") and before one ("waiting"), the pixels that callers hold; since the start,
        the pictures that were refused as Busy and the workers that ended before their picture was open ("killed").
        """
        with self._changed:
            running = sum(place.worker is not None for place in self._places.values())
            return {
                "running": running,
                "waiting": len(self._places) - running,
                "held_pixels": self._held_pixels,
                "refused": self._refused,
                "killed": sum(worker.killed for worker in self._workers),
            }

    def open(self, data: bytes, sender: Sender, *, max_pixels: int | None = None) -> np.ndarray:
        """The picture file as uint8 (H, W, 3), writable. Blocks; call it from a thread.

        Raises EditError on what is broken, too large or too slow, Busy when too many wait, Left when the sender does.
        """
        max_pixels = max_pixels or self.limits.pixels
        cost = self._inspect(data)
        if cost.size is not None:
            check_size(*cost.size, max_pixels)
        if self._is_for_here(data, cost):
            with self._here:
                return _open_here(data, max_pixels)
        with self._worker(sender, cost.work) as worker:
            picture = worker.ask(b"p", data, max_pixels)
            self._hold(picture)
        return picture

    def text(self, data: bytes, sender: Sender) -> dict[str, str]:
        """The text chunks of a PNG, {} where there are none. Raises as `open`."""
        cost = self._inspect(data)
        if self._is_for_here(data, cost):
            with self._here:
                return png_text(data)
        with self._worker(sender, cost.work) as worker:
            return worker.ask(b"t", data, self.limits.pixels)

    async def run(self, sender: Sender, function: Callable, *args):
        """`function(*args)` in a thread of `pool`. When the caller is cancelled, the sender has left."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        except asyncio.CancelledError:
            sender.leave()
            raise

    def close(self) -> None:
        """Ends the workers, and with them what they are opening."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        _end_all(self._workers)

    def _is_for_here(self, data: bytes, cost: inspection.Cost) -> bool:
        limits = self.limits
        return (
            cost.size is not None
            and len(data) <= limits.here_bytes
            and cost.work <= limits.here_work
            and cost.extra_bytes <= limits.here_extra_bytes
        )

    def _hold(self, picture: np.ndarray) -> None:
        """Counts its pixels until its last reference is gone."""
        pixels = picture.size // 3
        with self._changed:
            self._held_pixels += pixels
        weakref.finalize(picture, self._release, pixels).atexit = False

    def _inspect(self, data: bytes) -> inspection.Cost:
        if len(data) > self.limits.file_bytes:
            raise EditError(f"The file has {len(data):,} bytes. Allowed for a picture: {self.limits.file_bytes:,}.")
        return inspection.inspect(data)

    @contextlib.contextmanager
    def _worker(self, sender: Sender, work: int) -> Iterator["_Worker"]:
        """A worker, once it is this picture's turn; ended when the sender leaves."""
        with self._changed:
            if len(self._places) >= self.limits.waiting + self.limits.workers:
                self._refused += 1
                raise Busy(f"{len(self._places)} pictures are waiting to be opened. Try again later.")
            place = _Place(next(self._numbers), sender.client, work)
            self._places[place.number] = place
            self._turns.setdefault(place.client, 0)
        try:
            with sender._ended_by(self._wake):
                self._await_turn(place, sender)
            worker = place.worker
            assert worker is not None  # it is this place's turn
            with sender._ended_by(worker.end):
                yield worker
        finally:
            with self._changed:
                del self._places[place.number]
                if place.worker is not None:
                    self._idle.append(place.worker)
                if all(other.client != place.client for other in self._places.values()):
                    self._turns.pop(place.client, None)
                self._changed.notify_all()

    def _await_turn(self, place: _Place, sender: Sender) -> None:
        deadline = time.monotonic() + self.limits.wait_seconds
        with self._changed:
            while self._next() is not place:
                if sender.left:
                    raise Left
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    self._refused += 1
                    raise Busy(f"No turn to open the picture came in {self.limits.wait_seconds:g} s. Try again later.")
                self._changed.wait(left_s)
            place.worker = self._idle.pop()
            self._turns[place.client] = place.number
            self._changed.notify_all()

    def _next(self) -> _Place | None:
        """The waiting place whose turn it is; None while no place may have one."""
        if not self._idle:
            return None
        limits, places = self.limits, self._places.values()
        most_work = inspection.MAX_WORK
        if sum(place.work > limits.cheap_work for place in places if place.worker) >= max(1, limits.workers - 1):
            most_work = limits.cheap_work
        if self._held_pixels >= limits.held_pixels:
            most_work = limits.here_work
        clients = [place.client for place in places if place.worker is not None]
        return min(
            (place for place in places if place.worker is None and place.work <= most_work),
            key=lambda place: (clients.count(place.client), self._turns[place.client], place.number),
            default=None,
        )

    def _wake(self) -> None:
        # From a thread of its own: who leaves holds the sender's lock, and must not wait for ours.
        threading.Thread(target=self._notify, daemon=True).start()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _release(self, pixels: int) -> None:
        with self._changed:
            self._held_pixels -= pixels
            self._changed.notify_all()


def _open_here(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        return open_image(data, max_pixels)
    except EditError:
        raise
    except Exception as error:  # readers are foreign code with exceptions of their own; a damaged file is its sender's affair
        log.info("a picture of %d bytes made its reader fail: %s: %s", len(data), type(error).__name__, error)
        raise EditError("The picture cannot be read: its file is damaged. Save it again and resend.") from None


class _Worker:
    """One process, started when it is asked and after it was ended. One thread asks at a time; any may end it."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self.killed = 0  # processes that ended, by themselves or by `end`, before their picture was open

    def ask(self, kind: bytes, data: bytes, max_pixels: int) -> Any:
        """The pixels uint8 (H, W, 3), or for b"t" the dict. Raises EditError."""
        for attempt in (1, 2):
            process = self._started()
            timer = threading.Timer(self._limits.seconds, self.end, (process,))
            began = time.monotonic()
            timer.start()
            try:
                _write(process.stdin, REQUEST.pack(kind, max_pixels, len(data)))
                _write(process.stdin, data)
                return self._answer(process, max_pixels)
            except (OSError, EOFError):
                took_s = time.monotonic() - began
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)  # it may be about to end by itself
                self.end(process)
                if attempt == 1 and took_s < 0.5 * self._limits.seconds and process.returncode in _ENDED_ITSELF:
                    continue  # it ended by itself, being idle, as the question came
                self.killed += 1
                if took_s >= self._limits.seconds or process.returncode == _OUT_OF_TIME:
                    text = f"Opening the picture takes more than the {self._limits.processor_seconds} s that one may take."
                else:
                    log.warning("a picture of %d bytes ended its reader (exit code %s)", len(data), process.returncode)
                    text = "The picture cannot be read: its file is damaged."
                raise EditError(f"{text} Save it again as PNG or JPEG, or smaller, and resend.") from None
            finally:
                timer.cancel()

    def end(self, process: subprocess.Popen | None = None) -> None:
        """Ends the process, that one or whichever it is."""
        process = process or self._process
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()

    def _answer(self, process: subprocess.Popen, max_pixels: int) -> Any:
        letter, height, width, length = REPLY.unpack(_read(process.stdout, bytearray(REPLY.size)))
        if letter == b"p":
            if not 0 < height * width <= max_pixels or length != height * width * 3:
                raise EOFError  # the file has made its reader say so
            pixels = np.empty((height, width, 3), np.uint8)
            _read(process.stdout, pixels.data.cast("B"))
            return pixels
        if length > 100 * 2**20:  # Pillow itself stops at 64 MB of text
            raise EOFError
        text = bytes(_read(process.stdout, bytearray(length)))
        if letter == b"t":
            return json.loads(text)
        raise EditError(text.decode(errors="replace"))

    def _started(self) -> subprocess.Popen:
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return self._process
            if self._process is not None:
                for pipe in (self._process.stdin, self._process.stdout):
                    assert pipe is not None
                    pipe.close()
            limits = self._limits
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            environment |= {
                "OPENBLAS_NUM_THREADS": "1",  # each thread would reserve memory that the limit counts
                "OMP_NUM_THREADS": "1",
            }
            program = _PROGRAM.format(limits.worker_bytes, limits.processor_seconds)
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(_ROOT)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
            )  # fmt: skip
            process = self._process
            _widen(process.stdin)
            _widen(process.stdout)
        timer = threading.Timer(limits.start_seconds, self.end, (process,))
        timer.start()
        try:
            if bytes(_read(process.stdout, bytearray(1))) != b"r":
                raise EOFError
        except (OSError, EOFError):
            self.killed += 1
            log.error("the process that opens pictures did not start (exit code %s)", process.wait())
            raise EditError("The picture could not be opened: the server's reader does not start. Its log says why.") from None
        finally:
            timer.cancel()
        return process


def _read(source, target):
    """Fills `target`. Raises EOFError."""
    view = memoryview(target)
    while view:
        count = source.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return target


def _write(target, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def _widen(pipe) -> None:
    """A pipe holds 64 kB, which costs a picture thousands of changes from one process to the other."""
    if fcntl is not None and hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux has it
        with contextlib.suppress(OSError):  # over the system's limit for one user
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)


def _end_all(workers) -> None:
    for worker in workers:
        worker.end()
