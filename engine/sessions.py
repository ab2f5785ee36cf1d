"""Sessions: people's streams with their mailboxes and result slots, and the table of all of them with its lock.

A session is one person's stream. Its mailbox has one slot and the newest frame wins: a frame that waited behind a newer
one would only be shown late, so it is dropped and counted. Results go the same way: `latest()` and the async iterator
hold one slot each, so a slow reader misses pictures and never builds a queue. The live socket (`serving.live`) has a
mailbox with the same promise in front of this one: it holds bytes that are not decoded yet, this one holds pixels.

`Session` is what a caller holds; every frame's outcome is a future that it can get. `Sessions` is the table: the
inference thread takes frames from it (`take_next`) and delivers results through it. One lock guards all bookkeeping
(microseconds per frame) and is never held while the model runs. Every clock here is monotonic, in seconds.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import numpy as np

from engine.errors import Cancelled, EngineError
from engine.fitting import Fitted, checked_size, notes
from engine.memory import SessionMemory, Work
from engine.pace import Pace
from engine.scheduling import RATE_FRAMES, frame_rate, idle_sessions, next_session
from engine.settings import EditParams, EngineConfig
from pipeline.images import EditError

HISTORY_FRAMES = 256  # percentiles and means are over this many frames
_ACTIVE_S = 1.0  # a session that got a picture within this time is one of those that share the device
_LOOK_S = 0.002  # how often the thread looks whether the GPU is done with a denoise, while it waits for the next frame


@dataclasses.dataclass(frozen=True, eq=False)
class EditResult:
    """One frame, done or failed: exactly one of `image` and `error` is set."""

    number: int  # the frame's, as `submit` returned it
    image: np.ndarray | None  # uint8 (H, W, 3)
    error: EditError | None
    params: EditParams
    stages_ms: dict[str, float]  # the keys of STAGES, "total" their sum; empty for a failed frame
    age_ms: float  # from submit to done, waiting included
    dropped: int  # frames of this session replaced by newer ones so far
    fps: float  # of this session
    skipped: bool = False  # the last picture again: the frame was like the one before
    notes: tuple[str, ...] = ()  # what a person should know of this frame: "reuse: off, guidance is on"
    computed: float = 1.0  # share of the tokens that were computed, not reused
    waited_ms: float = 0.0  # of age_ms: in the mailbox, until the engine took the frame

    @property
    def picture(self) -> np.ndarray:
        """`image` of a frame that is known to have been done."""
        assert self.image is not None
        return self.image


class Submission(NamedTuple):
    """A frame in the mailbox."""

    number: int  # from 1
    outcome: "concurrent.futures.Future[EditResult]"  # raises EditError if the frame was dropped or cancelled


@dataclasses.dataclass(eq=False)
class Frame:
    """One frame from submit to delivery."""

    session: "Session"
    number: int
    images: list[np.ndarray]
    size: tuple[int, int]  # width, height
    notes: tuple[str, ...]  # of how the pictures meet the size
    params: EditParams
    on_step: Callable[[int, int], None] | None
    submitted_monotonic: float
    waited_ms: float = 0.0  # in the mailbox
    cancelled: bool = False  # set under the lock, read by the inference thread without it
    outcome: "concurrent.futures.Future[EditResult]" = dataclasses.field(default_factory=concurrent.futures.Future)
    _work: Work | None = None  # the rest is the inference thread's
    image: np.ndarray | None = None
    error: EditError | None = None

    def check(self, step: int = 0, steps: int = 0) -> None:
        if self.cancelled:
            raise Cancelled
        if steps and self.on_step is not None:
            self.on_step(step, steps)

    @property
    def work(self) -> Work:
        """There from the moment that the inference thread begins the frame until it delivers it."""
        assert self._work is not None
        return self._work

    @work.setter
    def work(self, work: Work | None) -> None:
        self._work = work

    @property
    def moving(self) -> bool:
        """Whether it is on its way in a stream batch."""
        return self.work.picture is not None and self.error is None and not self.cancelled


class ResultSlot:
    """One async reader: a slot, and at most one wake-up on its way to the event loop. Used with the lock held."""

    def __init__(self, loop: asyncio.AbstractEventLoop, result: EditResult | None):
        self.loop, self.result = loop, result
        self.event = asyncio.Event()
        self.event.set()  # the first pass looks at the slot
        self.waking = False

    def offer(self, result: EditResult | None) -> None:
        """Newest wins; None only wakes the reader, to see that the session has closed."""
        self.result = self.result if result is None else result
        if not self.waking:
            self.waking = True
            with contextlib.suppress(RuntimeError):  # the loop has been closed, and with it the reader
                self.loop.call_soon_threadsafe(self.event.set)

    def take(self) -> EditResult | None:
        result, self.result, self.waking = self.result, None, False
        self.event.clear()
        return result


class Session:
    """One person's stream. Made by `RealtimeEngine.open_session`; every method may be called from any thread.

    Picture arrays are not copied: do not write to them after `submit`, nor to a result's image.
    """

    def __init__(self, table: "Sessions", key: int, now_monotonic: float):
        self._table, self.key = table, key
        self._lock = table.lock
        self._count = 0
        self._pending: Frame | None = None
        self._latest: EditResult | None = None
        self._closed_because: str | None = None
        self._slots: list[ResultSlot] = []
        self._done_times: collections.deque[float] = collections.deque(maxlen=RATE_FRAMES)
        # For the engine, with the lock held.
        self.served_monotonic = self.active_monotonic = now_monotonic
        self.dropped = 0
        # Delivered pictures: (time delivered, time its frame was submitted).
        self.shown: collections.deque[tuple[float, float]] = collections.deque(maxlen=HISTORY_FRAMES)
        # The inference thread's.
        self.memory = SessionMemory()
        self.flight: list[Frame] = []  # a stream batch, the oldest first
        self.pace = Pace()

    @property
    def closed(self) -> bool:
        return self._closed_because is not None

    @property
    def waiting(self) -> bool:
        """Whether a frame is in the mailbox: the next one that comes would replace it."""
        return self._pending is not None

    def submit(
        self, images: list[np.ndarray] | Fitted, params: EditParams, on_step: Callable[[int, int], None] | None = None
    ) -> int:
        """Leaves a frame in the mailbox and returns its number (from 1) at once; a frame still waiting is dropped.

        `images` are uint8 (H, W, 3) of any size, or what `fitting.at_output_size` made of them. `on_step(i, n)` is
        called on the inference thread and must be quick. Raises EditError when the pictures do not suit the mode, the
        output is too large, or the session is closed.
        """
        return self.submit_for_outcome(images, params, on_step).number

    def submit_for_outcome(
        self, images: list[np.ndarray] | Fitted, params: EditParams, on_step: Callable[[int, int], None] | None = None
    ) -> Submission:
        """As `submit`, and the future of the frame's EditResult too, which is set in the moment the frame is done.

        `result` can miss a frame when the next one is done at once, as a repeated frame is; the future cannot.
        """
        if not isinstance(images, Fitted):
            size = checked_size(images, params, self._table.default_size, self._table.config.max_pixels)
            images = Fitted(list(images), size, notes(images, params, size))
        with self._lock:
            if self._closed_because is not None:
                raise EditError(self._closed_because)
            self._count += 1
            if self._pending is not None:
                self.dropped += 1
                self._table.dropped += 1
                self._discard(self._pending, "was dropped: a newer one came")
            self.active_monotonic = now = self._table.clock()
            self._pending = Frame(self, self._count, *images, params=params, on_step=on_step, submitted_monotonic=now)
            self._table.wake()
            return Submission(self._count, self._pending.outcome)

    def latest(self) -> EditResult | None:
        """The newest result, failed ones included; None before the first and after close."""
        with self._lock:
            return self._latest

    def result(self, number: int, timeout: float | None = None) -> EditResult:
        """Waits for this frame. EditError if it failed, was dropped or cancelled; TimeoutError after `timeout` s."""
        with self._lock:
            result = self._latest
            frame = next((frame for frame in self.live_frames() if frame.number == number), None)
        if frame is not None:
            try:
                result = frame.outcome.result(timeout)
            except TimeoutError:
                raise TimeoutError(f"Frame {number} was not done within {timeout} s.") from None
        elif result is None or result.number != number:
            kept = f"Frame {number} is not here: {self._count} came, and only the newest are kept."
            raise EditError(self._closed_because or kept)
        if result.error is not None:
            raise EditError(str(result.error))  # a fresh one: raising adds a traceback
        return result

    async def __aiter__(self) -> AsyncIterator[EditResult]:
        """The latest result if there is one, then each newer one that the reader is quick enough for; ends at close."""
        with self._lock:
            slot = ResultSlot(asyncio.get_running_loop(), self._latest)
            self._slots.append(slot)
        try:
            while True:
                await slot.event.wait()
                with self._lock:
                    result, closed = slot.take(), self.closed
                if result is not None:
                    yield result
                if closed:
                    return
        finally:
            with self._lock:
                self._slots.remove(slot)

    def cancel(self) -> None:
        """Forgets the waiting frame and stops the running one within a denoise step; neither gives a result."""
        with self._lock:
            self._cancel("was cancelled")

    def close(self) -> None:
        """Cancels, ends the iterators and frees the session. May be called twice."""
        self._table.close(self, "This session is closed.")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # For the engine, with the lock held

    def live_frames(self) -> list[Frame]:
        """Its frames that are taken and not delivered, and the one that waits; without cancelled ones."""
        frames = (*self._table.taken, self._pending)
        return [frame for frame in frames if frame is not None and frame.session is self and not frame.cancelled]

    def take(self) -> Frame | None:
        """The frame from the mailbox, if one waits."""
        frame, self._pending = self._pending, None
        return frame

    def count_shown(self, now_monotonic: float, submitted_monotonic: float) -> None:
        """A picture is delivered now; what it shows was submitted then."""
        self._done_times.append(now_monotonic)
        self.shown.append((now_monotonic, submitted_monotonic))

    def fps(self, now_monotonic: float) -> float:
        """Frames per second of this session; falls towards 0 when they stop coming."""
        return frame_rate(self._done_times, now_monotonic)

    def publish(self, frame: Frame, result: EditResult) -> None:
        """Gives the frame's result to everyone who reads or waits."""
        self._offer(result)
        frame.outcome.set_result(result)

    def end(self, why: str) -> None:
        """Cancels its frames and ends its iterators. The session may be held for long; its tensors need not be."""
        self._cancel("was cancelled: its session closed")
        self._closed_because = why
        self.memory, self.flight = SessionMemory(), []
        self._offer(None)

    def _discard(self, frame: Frame, why: str) -> None:
        frame.cancelled = True
        frame.outcome.set_exception(EditError(f"Frame {frame.number} {why}."))

    def _cancel(self, why: str) -> None:
        for frame in self.live_frames():
            self._discard(frame, why)
        self._pending = None

    def _offer(self, result: EditResult | None) -> None:
        self._latest = result
        for slot in self._slots:
            slot.offer(result)


class Sessions:
    """The open sessions, and the frames that the inference thread has taken from them."""

    def __init__(self, config: EngineConfig, default_size: int, clock: Callable[[], float]):
        self.config, self.default_size, self.clock = config, default_size, clock
        self.lock = threading.RLock()
        self._work = threading.Condition(self.lock)  # a frame came, or the engine closes
        self._open: dict[int, Session] = {}
        self._opened = 0
        self.taken: list[Frame] = []  # from their mailboxes, and not delivered
        self.dropped = 0  # frames, of all sessions since the start
        self.closing = False
        self.failure: str | None = None  # why the inference thread ended by itself

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._open.values())

    def open(self) -> Session:
        """A new stream. Raises EditError when `max_sessions` are open or the engine is closed."""
        with self.lock:
            if self.closing:
                raise EditError(self.failure or "The engine is closed.")
            now = self.clock()
            self.close_idle(now)
            if len(self._open) >= self.config.max_sessions:
                raise EditError(
                    f"{len(self._open)} sessions are open. Allowed: at most {self.config.max_sessions}. "
                    f"One is freed after {self.config.idle_timeout_s:g} s without a frame: try again then."
                )
            self._opened += 1
            self._open[self._opened] = session = Session(self, self._opened, now)
            self.wake()  # the thread sleeps until the next session is due to be freed
            return session

    def wake(self) -> None:
        """Lets the inference thread look again. Call it with the lock held."""
        self._work.notify()

    def close(self, session: Session, why: str) -> None:
        """Cancels and frees one session. May be called twice."""
        with self.lock:
            if session.closed:
                return
            session.end(why)
            self.taken = [frame for frame in self.taken if frame.session is not session]
            del self._open[session.key]

    def close_all(self, why: str) -> None:
        """Closes every session; no new one can be opened, and `take_next` returns None from now on."""
        with self.lock:
            self.closing = True
            for session in list(self._open.values()):
                self.close(session, why)
            self.wake()

    def close_idle(self, now_monotonic: float) -> None:
        """Frees the sessions that neither sent nor got a frame for `idle_timeout_s`. Call it with the lock held."""
        timeout_s = self.config.idle_timeout_s
        quiet = {key: s.active_monotonic for key, s in self._open.items() if not s.live_frames()}
        for key in idle_sessions(quiet, now_monotonic, timeout_s):
            why = f"This session was freed after {timeout_s:g} s without a frame. Start it again."
            self.close(self._open[key], why)

    def fail(self, why: str) -> None:
        """The inference thread has died: tells everyone who waits for a frame, and closes all sessions."""
        with self.lock:
            self.failure, self.closing = why, True
            for session in list(self._open.values()):
                for frame in session.live_frames():
                    frame.cancelled, frame.work = True, None
                    result = EditResult(
                        number=frame.number, image=None, error=EngineError(why, "failed"), params=frame.params,
                        stages_ms={}, age_ms=0.0, dropped=session.dropped, fps=0.0,
                    )  # fmt: skip
                    session.publish(frame, result)
                session.take()
                self.close(session, why)

    def take_next(
        self, denoised: Callable[[], bool] | None, until_monotonic: float
    ) -> tuple[Session, Frame | None] | None:
        """Sleeps until a session has something to do and takes its frame; None when the engine closes.

        The frame is None for a session that has nothing but a stream batch on its way. `denoised` asks whether the turn
        before has been denoised (None: there is no such turn). While it has not, this waits until `until_monotonic`;
        then the result is None if no session has anything to do.
        """
        with self.lock:
            while denoised is not None and not (self.closing or denoised()):
                if (spare_s := until_monotonic - self.clock()) <= 0:
                    break
                self._work.wait(min(spare_s, _LOOK_S))  # the denoise may be done before it is expected to be
            while not self.closing:
                now = self.clock()
                self.close_idle(now)
                ready = {key: s.served_monotonic for key, s in self._open.items() if s.waiting or s.flight}
                if ready:
                    session = self._open[next_session(ready, now)]
                    frame = session.take()
                    session.served_monotonic = now
                    if frame is not None:
                        frame.waited_ms = (now - frame.submitted_monotonic) * 1000
                        self.taken.append(frame)
                    return session, frame
                if denoised is not None:
                    return None
                oldest = min((s.active_monotonic for s in self._open.values()), default=None)
                self._work.wait(None if oldest is None else oldest + self.config.idle_timeout_s - now)
        return None

    def give_back(self, frame: Frame) -> float:
        """A taken frame is done, failed or cancelled: its session is served now; the time is returned. With the lock held."""
        self.taken = [other for other in self.taken if other is not frame]
        now = self.clock()
        frame.session.served_monotonic = frame.session.active_monotonic = now
        return now

    def sharing(self, now_monotonic: float) -> int:
        """How many sessions got a picture lately, and so share the device."""
        with self.lock:
            return sum(bool(s.shown) and now_monotonic - s.shown[-1][0] < _ACTIVE_S for s in self)
