"""The realtime engine: sessions put frames in, edited frames come out, one thread runs the model.

Why one thread: the GPU does one thing at a time anyway, CUDA graphs are thread-local, and with a single owner nothing
in the pipeline needs a lock. Everything torch does for a frame happens there; callers only exchange numpy arrays.

A session is one person's stream. Its mailbox has one slot and the newest frame wins: a frame that waited behind a
newer one would only be shown late, so it is dropped and counted. Results go the same way: `latest()` and the async
iterator hold one slot each, a slow reader misses pictures and never builds a queue.

The thread serves in turns. A turn is one session's: its waiting frame goes through the three stages of `frames`. In a
stream batch it goes one step, with those of the session that are on their way; a session with such frames has a turn
also when nothing waits, so that the last frame of a stream comes out too. The next turn is the session's whose last one
lies furthest back, so a fast sender cannot starve a slow one. Where a GPU can overlap stages, a turn's last stage is
asked for after the next turn's first: see `_serve_next`. Whom to serve, whom to free and when to do less are pure
functions in `policies` and `pace`; every clock here is monotonic, in seconds.

Settings live in two frozen dataclasses (`settings`): `EngineConfig` when the engine is built, `EditParams` with each
frame. A frame carries its own params, so a change of settings never reaches a frame that is already running.

Failures: what a person can act on is an `EditError`. Whatever else a frame raises is logged with its traceback and
reported to its own session as an `EditError`; the thread goes on with the next frame, and the session forgets what it
had kept for reuse. Cancelling raises inside the denoise loop's `on_step` and so takes effect within one step. No error
keeps a traceback: it would keep tensors alive.

One lock guards all bookkeeping (microseconds per frame) and is never held while the model runs.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import torch

from engine.errors import Cancelled, EngineError, is_out_of_memory
from engine.fitting import Fitted, checked_size, notes
from engine.frames import FrameEditor, prepare_pictures
from engine.memory import SessionMemory, Work
from engine.pace import Cost, Costs, Pace
from engine.scheduling import RATE_FRAMES, frame_rate, idle_sessions, next_session, shown_ages, take_at
from engine.settings import (
    CHOICES,
    LIMITS,
    MAX_PROMPT_CHARS,
    PICTURES,
    EditParams,
    EngineConfig,
)
from engine.streams import STAGES, Stopwatch
from pipeline.images import EditError

__all__ = [
    "CHOICES", "LIMITS", "MAX_PROMPT_CHARS", "PICTURES", "STAGES",
    "EditParams", "EditResult", "EngineConfig", "EngineError", "EngineStats", "RealtimeEngine", "Session", "prepare_pictures",
]  # fmt: skip

logger = logging.getLogger(__name__)

_ACTIVE_S = 1.0  # a session that got a picture within this time is one of those that share the device
_LOOK_S = 0.002  # how often the thread looks whether the GPU is done with a denoise, while it waits for the next frame
_HISTORY_FRAMES = 256  # percentiles and stage means of `stats()` are over this many frames


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


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine did since it started; rates, percentiles and means are over its last frames."""

    fps: float
    latency_p50_ms: float  # submit to done
    latency_p95_ms: float
    sessions: int
    frames: int  # delivered pictures, repeated ones included
    skipped: int  # of these, repeated ones
    dropped: int
    errors: int
    stages_ms: dict[str, float]  # means
    cache_summary: dict[str, dict[str, int]]  # the pipeline's, as of the last frame
    memory: dict[str, int]  # bytes on the GPU: allocated, reserved, peak; empty on the CPU
    age_p50_ms: (
        float  # of what people see, at any moment: since its frame was submitted, until the next picture is there
    )
    age_p95_ms: float
    skip_rate: float  # of delivered pictures
    computed: float  # mean share of the tokens that were computed, not reused
    cache_hits: float  # share of look-ups in the pipeline's caches
    pace: tuple[str, ...]  # what it picked, for each session that asked for a rate or a latency


@dataclasses.dataclass(eq=False)
class _Frame:
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
    outcome: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)  # of EditResult
    work: Work | None = None  # the rest is the inference thread's
    image: np.ndarray | None = None
    error: EditError | None = None

    def check(self, step: int = 0, steps: int = 0) -> None:
        if self.cancelled:
            raise Cancelled
        if steps and self.on_step is not None:
            self.on_step(step, steps)

    @property
    def moving(self) -> bool:
        """Whether it is on its way in a stream batch."""
        return self.work.picture is not None and self.error is None and not self.cancelled


@dataclasses.dataclass(eq=False)
class _Turn:
    session: "Session"
    frame: _Frame | None  # None: those on their way go a step further
    flight: list[_Frame]  # the session's stream batch
    done: list[_Frame] = dataclasses.field(default_factory=list)  # denoised, skipped or failed, in their order
    asked: Any = None  # CUDA event: its second stage has run; None on the CPU

    @property
    def denoised(self) -> bool:
        return self.asked is None or self.asked.query()


class _Outlet:
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

    def __init__(self, engine: "RealtimeEngine", key: int, now_monotonic: float):
        self._engine, self.key = engine, key
        self._lock = engine._lock
        self._served_monotonic = self._active_monotonic = now_monotonic
        self._count = 0
        self._dropped = 0
        self._pending: _Frame | None = None
        self._latest: EditResult | None = None
        self._closed_because: str | None = None
        self._outlets: list[_Outlet] = []
        self._done_times: collections.deque[float] = collections.deque(maxlen=RATE_FRAMES)
        self._shown: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=_HISTORY_FRAMES
        )  # delivered, submitted
        self._memory = SessionMemory()
        self._flight: list[_Frame] = []  # a stream batch, the oldest first
        self._pace = Pace()

    @property
    def closed(self) -> bool:
        return self._closed_because is not None

    def submit(
        self, images: list[np.ndarray] | Fitted, params: EditParams, on_step: Callable[[int, int], None] | None = None
    ) -> int:
        """Leaves a frame in the mailbox and returns its number (from 1) at once; a frame still waiting is dropped.

        `images` are uint8 (H, W, 3) of any size, or what `fitting.at_output_size` made of them. `on_step(i, n)` is called on the inference thread and must be quick. Raises
        EditError when the pictures do not suit the mode, the output is too large, or the session is closed.
        """
        if not isinstance(images, Fitted):
            size = checked_size(images, params, self._engine.default_size, self._engine.config.max_pixels)
            images = Fitted(list(images), size, notes(images, params, size))
        with self._lock:
            if self._closed_because is not None:
                raise EditError(self._closed_because)
            self._count += 1
            if self._pending is not None:
                self._dropped += 1
                self._engine._dropped += 1
                self._discard(self._pending, "was dropped: a newer one came")
            self._active_monotonic = now = self._engine._clock()
            self._pending = _Frame(self, self._count, *images, params=params, on_step=on_step, submitted_monotonic=now)
            self._engine._work.notify()
            return self._count

    def latest(self) -> EditResult | None:
        """The newest result, failed ones included; None before the first and after close."""
        with self._lock:
            return self._latest

    def result(self, number: int, timeout: float | None = None) -> EditResult:
        """Waits for this frame. EditError if it failed, was dropped or cancelled; TimeoutError after `timeout` s."""
        with self._lock:
            result = self._latest
            frame = next((frame for frame in self._live_frames() if frame.number == number), None)
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
            outlet = _Outlet(asyncio.get_running_loop(), self._latest)
            self._outlets.append(outlet)
        try:
            while True:
                await outlet.event.wait()
                with self._lock:
                    result, closed = outlet.take(), self.closed
                if result is not None:
                    yield result
                if closed:
                    return
        finally:
            with self._lock:
                self._outlets.remove(outlet)

    def cancel(self) -> None:
        """Forgets the waiting frame and stops the running one within a denoise step; neither gives a result."""
        with self._lock:
            self._cancel("was cancelled")

    def close(self) -> None:
        """Cancels, ends the iterators and frees the session. May be called twice."""
        self._engine._close_session(self, "This session is closed.")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # The rest is called with the lock held.

    def _live_frames(self) -> list[_Frame]:
        frames = (*self._engine._taken, self._pending)
        return [frame for frame in frames if frame is not None and frame.session is self and not frame.cancelled]

    def _discard(self, frame: _Frame, why: str) -> None:
        frame.cancelled = True
        frame.outcome.set_exception(EditError(f"Frame {frame.number} {why}."))

    def _cancel(self, why: str) -> None:
        for frame in self._live_frames():
            self._discard(frame, why)
        self._pending = None

    def _publish(self, result: EditResult | None) -> None:
        self._latest = result
        for outlet in self._outlets:
            outlet.offer(result)


class RealtimeEngine:
    """Runs a loaded pipeline for many sessions on one thread. `clock` is monotonic seconds, `draw` a number in [0, 1).

    Start it before the first frame, close it to join the thread; or use it as a context manager.
    """

    def __init__(
        self,
        pipeline: Any,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ):
        self.pipeline = pipeline
        self.config = config or EngineConfig()
        self.default_size: int = self.config.default_size or pipeline.default_size
        self.description: dict[str, Any] = {}  # filled by start()
        self._device = torch.device(pipeline.device)
        self._clock = clock
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)  # a frame came, or the engine closes
        self._sessions: dict[int, Session] = {}
        self._opened = 0
        self._taken: list[_Frame] = []  # from their mailboxes, and not delivered
        self._tail: _Turn | None = None  # the turn before, if its last stage is still to be asked for
        self._editor = FrameEditor(pipeline, self._device, draw, clock, self.config.reuse_sessions)
        self._overlap = self.config.pipelining and self._device.type == "cuda"
        self._costs = Costs()
        self._busy_until_monotonic = self._encode_s = (
            0.0  # the denoise that was asked for last, and the encode before it
        )
        self._closing = False
        self._thread: threading.Thread | None = None
        self._start_error: BaseException | None = None
        self.failure: str | None = None  # why the inference thread ended by itself
        self._ready = threading.Event()
        self._frames = self._skipped = self._dropped = self._errors = 0
        self._done_times: collections.deque[float] = collections.deque(maxlen=RATE_FRAMES)
        self._latencies_ms: collections.deque[float] = collections.deque(maxlen=_HISTORY_FRAMES)
        self._stages_ms: collections.deque[dict] = collections.deque(maxlen=_HISTORY_FRAMES)  # of computed frames
        self._computed: collections.deque[float] = collections.deque(maxlen=_HISTORY_FRAMES)
        self._cache_summary: dict[str, dict[str, int]] = {}
        self._told_report: list | None = None  # the fast path's, as it stands in the description

    # Life

    def start(self) -> "RealtimeEngine":
        """Starts the thread and returns when the model is ready for frames; raises what kept it from that."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._thread = threading.Thread(target=self._loop, name="inference", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._start_error is not None:
            self.close()
            raise self._start_error
        return self

    def close(self) -> None:
        """Closes every session, stops the running frame within a step and joins the thread. May be called twice."""
        with self._lock:
            self._closing = True
            for session in list(self._sessions.values()):
                self._close_session(session, "The engine is closed.")
            self._work.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "RealtimeEngine":
        return self.start()

    def __exit__(self, *exc) -> None:
        self.close()

    # Sessions

    def open_session(self) -> Session:
        """A new stream. Raises EditError when `max_sessions` are open or the engine is closed."""
        with self._lock:
            if self._closing:
                raise EditError(self.failure or "The engine is closed.")
            now = self._clock()
            self._free_idle(now)
            if len(self._sessions) >= self.config.max_sessions:
                raise EditError(
                    f"{len(self._sessions)} sessions are open. Allowed: at most {self.config.max_sessions}. "
                    f"One is freed after {self.config.idle_timeout_s:g} s without a frame: try again then."
                )
            self._opened += 1
            self._sessions[self._opened] = session = Session(self, self._opened, now)
            self._work.notify()  # the thread sleeps until the next session is due to be freed
            return session

    def edit(
        self,
        images: list[np.ndarray],
        params: EditParams,
        on_step: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> EditResult:
        """One edit in a session of its own, blocking. Raises EditError; TimeoutError after `timeout` s, and cancels."""
        if self._thread is None:
            raise RuntimeError("start the engine first")
        with self.open_session() as session:
            return session.result(session.submit(images, params, on_step), timeout)

    def stats(self) -> EngineStats:
        memory = {}
        if self._device.type == "cuda":
            memory["allocated"] = torch.cuda.memory_allocated(self._device)
            memory["reserved"] = torch.cuda.memory_reserved(self._device)
            memory["peak"] = torch.cuda.max_memory_allocated(self._device)
        with self._lock:
            now, latencies, stages = self._clock(), list(self._latencies_ms) or [0.0], list(self._stages_ms)
            ages = np.concatenate([[], *(shown_ages(s._shown, now) for s in self._sessions.values())]) * 1000
            looked = [sum(c[kind] for c in self._cache_summary.values()) for kind in ("hits", "misses")]
            return EngineStats(
                fps=frame_rate(self._done_times, now),
                latency_p50_ms=float(np.percentile(latencies, 50)),
                latency_p95_ms=float(np.percentile(latencies, 95)),
                sessions=len(self._sessions),
                frames=self._frames,
                skipped=self._skipped,
                dropped=self._dropped,
                errors=self._errors,
                stages_ms={name: sum(s[name] for s in stages) / len(stages) for name in STAGES} if stages else {},
                cache_summary=self._cache_summary,
                memory=memory,
                age_p50_ms=float(np.percentile(ages, 50)) if ages.size else 0.0,
                age_p95_ms=float(np.percentile(ages, 95)) if ages.size else 0.0,
                skip_rate=self._skipped / max(1, self._frames),
                computed=float(np.mean(self._computed)) if self._computed else 1.0,
                cache_hits=looked[0] / max(1, sum(looked)),
                pace=tuple(s._pace.text for s in self._sessions.values() if s._pace.text),
            )

    def _close_session(self, session: Session, why: str) -> None:
        with self._lock:
            if session.closed:
                return
            session._cancel("was cancelled: its session closed")
            session._closed_because = why
            session._memory, session._flight = SessionMemory(), []  # it may be held for long; its tensors need not be
            self._taken = [frame for frame in self._taken if frame.session is not session]
            session._publish(None)
            del self._sessions[session.key]

    def _free_idle(self, now_monotonic: float) -> None:
        timeout_s = self.config.idle_timeout_s
        quiet = {key: s._active_monotonic for key, s in self._sessions.items() if not s._live_frames()}
        for key in idle_sessions(quiet, now_monotonic, timeout_s):
            why = f"This session was freed after {timeout_s:g} s without a frame. Start it again."
            self._close_session(self._sessions[key], why)

    # The inference thread

    def _loop(self) -> None:
        try:
            if self._device.type == "cuda":
                if self._device.index is not None:
                    torch.cuda.set_device(self._device)
                self._editor.streams.start(self._overlap)
            report = self.pipeline.enable_fast_path() if self.config.fast_path else []
            self.description = {
                **self.pipeline.description,
                "default_size": self.default_size,
                "fast_path": [{"name": name, "applied": applied, "reason": reason} for name, applied, reason in report],
                "pipelining": {"applied": self._overlap, "reason": self._why_overlap()},
            }
        except BaseException as error:
            self._start_error = error
            return
        finally:
            self._ready.set()
        try:
            while self._serve_next():
                pass
        except BaseException as error:  # SystemExit from a library, memory at an end: nobody would answer any more
            logger.critical("the inference thread died", exc_info=error)
            self._die(f"The engine has stopped: {type(error).__name__}: {error}. Restart the program.")

    def _die(self, why: str) -> None:
        """Tells everybody who waits for a frame, and closes all sessions."""
        with self._lock:
            self.failure, self._closing, self._tail = why, True, None
            for session in list(self._sessions.values()):
                for frame in session._live_frames():
                    frame.cancelled, frame.work = True, None
                    result = EditResult(
                        frame.number, None, EngineError(why, "failed"), frame.params, stages_ms={}, age_ms=0.0,
                        dropped=session._dropped, fps=0.0, skipped=False,
                    )  # fmt: skip
                    session._publish(result)
                    frame.outcome.set_result(result)
                session._pending = None
                self._close_session(session, why)

    def _tell_fast_path(self) -> None:
        """What the fast path had to leave out since the start, if its report is another one, goes to the description."""
        report = getattr(getattr(self.pipeline, "fast_path", None), "report", None)  # stand-ins of the pipeline have none
        if report and report is not self._told_report:
            self._told_report = report
            self.description = {**self.description, "fast_path": [line._asdict() for line in report]}

    def _why_overlap(self) -> str:
        if self._overlap:
            return "encode of the next frame and decode of the last run beside the denoise"
        if not self.config.pipelining:
            return "turned off"
        return f"a device of the kind {self._device.type} does one thing at a time"

    def _next_turn(self) -> _Turn | None:
        """Sleeps until a session has something to do and takes its frame; None when the engine closes.

        While the turn before is still denoised, it waits until just before that ends; then None if nothing waits.
        """
        with self._lock:
            until = take_at(self._busy_until_monotonic, self._encode_s)
            while self._tail is not None and not (self._closing or self._tail.denoised):
                if (spare_s := until - self._clock()) <= 0:
                    break
                self._work.wait(min(spare_s, _LOOK_S))  # the denoise may be done before it is expected to be
            while not self._closing:
                now = self._clock()
                self._free_idle(now)
                waiting = {
                    k: s._served_monotonic for k, s in self._sessions.items() if s._pending is not None or s._flight
                }
                if waiting:
                    session = self._sessions[next_session(waiting, now)]
                    frame, session._pending = session._pending, None
                    session._served_monotonic = now
                    if frame is not None:
                        frame.waited_ms = (now - frame.submitted_monotonic) * 1000
                        self._taken.append(frame)
                    return _Turn(session, frame, session._flight)
                if self._tail is not None:
                    return None
                oldest = min((s._active_monotonic for s in self._sessions.values()), default=None)
                self._work.wait(None if oldest is None else oldest + self.config.idle_timeout_s - now)
        return None

    def _serve_next(self) -> bool:
        """One turn, or what is left of the one before. False when the engine closes; never raises.

        Overlapped, the GPU gets turn k's first stage, k-1's third and k's second, in this order: first and third stages
        share a stream, and a first stage behind a third would wait for the denoise before that. The host then waits for
        k-1's picture, which is there when k's denoise has hardly begun.
        """
        turn, tail = self._next_turn(), self._tail
        if turn is None and tail is None:
            return False
        if turn is not None:
            self._begin(turn)
        if tail is not None:
            self._finish(tail)
        if turn is not None:
            self._denoise(turn)
        if tail is not None:
            self._deliver_turn(tail)
        self._tail = turn if self._overlap else None
        if turn is not None and not self._overlap:
            self._finish(turn)
            self._deliver_turn(turn)
        if turn is not None:
            self._editor.token_caches.record_ahead(turn.session._memory)
        return True

    def _begin(self, turn: _Turn) -> None:
        frame = turn.frame
        if frame is not None:
            frame.work = Work(
                turn.session._memory, frame.images, frame.params, frame.size, frame.submitted_monotonic, frame.check,
                Stopwatch(self._device), list(frame.notes),
            )  # fmt: skip
            self._attempt([frame], lambda: (self._set_pace(frame), self._editor.begin(frame.work)))

    def _set_pace(self, frame: _Frame) -> None:
        """What is computed in place of what was asked for, if a rate or a latency was asked for too."""
        work, asked, pace, now = frame.work, frame.work.plan, frame.session._pace, self._clock()
        with self._lock:
            sessions = sum(bool(s._shown) and now - s._shown[-1][0] < _ACTIVE_S for s in self._sessions.values())
        may_reuse = self._editor.token_caches.possible(work.params)
        plan = pace.choose(work.params, asked, may_reuse, self._costs, max(1, sessions), self._overlap, now)
        work.notes += [pace.text] if pace.text else []
        if plan != asked:
            names = ("steps", "width", "height", "stream_batch", "reuse")
            work.params = work.params.replace(**{name: getattr(plan, name) for name in names})
            work.size = plan.width, plan.height

    def _denoise(self, turn: _Turn) -> None:
        """The turn's frame to its latents, or into the stream batch; and a step of all that are in it."""
        frame, flight = turn.frame, turn.flight
        if frame is not None and frame.error is None and not frame.cancelled and frame.work.repeats is None:
            work, batched = frame.work, frame.work.params.stream_batch
            if not batched or not all(other.work.keeps_step_with(work) for other in flight):
                # What is on its way comes out first: order is kept, and no batch mixes sizes or schedules.
                while flight:
                    self._step(turn)
            act = self._editor.enter if batched else self._editor.denoise
            self._attempt([frame], lambda: act(work))
            if not batched:
                self._expect(work, work.params.steps)
        if frame is not None:
            flight.append(frame)
        if flight:
            self._step(turn)
        turn.asked = self._editor.streams.event()
        if turn.asked is not None:
            self._editor.embeddings.renew(turn.session._memory)

    def _expect(self, work: Work, steps: int) -> None:
        """Takes note of how long the GPU will be busy with so many steps."""
        if self._overlap and (cost := self._costs.expected(work.plan, self._clock())):
            denoise_s = cost.denoise / 1000 * steps / work.params.steps
            self._busy_until_monotonic = max(self._busy_until_monotonic, self._clock()) + denoise_s
            self._encode_s = cost.encode / 1000

    def _step(self, turn: _Turn) -> None:
        """One step of all that are on their way in this session; those in front that need no more leave."""
        flight = turn.flight
        moving = [frame for frame in flight if frame.moving]
        if moving:
            self._attempt(moving, lambda: self._editor.advance([frame.work for frame in moving]))
            self._expect(moving[0].work, 1)
        while flight and not flight[0].moving:
            turn.done.append(flight.pop(0))

    def _finish(self, turn: _Turn) -> None:
        for frame in turn.done:
            if frame.error is None and not frame.cancelled and frame.work.repeats is None:
                self._attempt([frame], lambda frame=frame: self._editor.finish(frame.work))

    def _deliver_turn(self, turn: _Turn) -> None:
        if turn.asked is not None:
            turn.asked.synchronize()  # also where nothing is done: or a stream batch would run on before it is a batch
        for frame in turn.done:
            if frame.cancelled:
                frame.work.memory.newest = None  # whose picture will never come
            elif frame.error is None:
                self._attempt([frame], lambda frame=frame: self._collect(frame))
            self._deliver(frame)
        if turn.asked is None:
            self._editor.embeddings.renew(turn.session._memory)

    def _collect(self, frame: _Frame) -> None:
        frame.image = self._editor.collect(frame.work)
        self._cache_summary = self.pipeline.cache_summary()
        self._tell_fast_path()

    def _attempt(self, frames: list[_Frame], stage: Callable[[], None]) -> None:
        """Runs a stage of these frames of one session. What it raises becomes their error."""
        first, error, out_of_memory = frames[0], None, False
        try:
            stage()
            return
        except Cancelled:
            pass
        except EngineError as raised:
            error = EngineError(str(raised), raised.kind)
        except EditError as raised:
            error = EditError(str(raised))  # without the traceback, which holds the frame's tensors
        except Exception as raised:
            out_of_memory = is_out_of_memory(raised)
            if out_of_memory:
                logger.warning("frame %d of session %d: %s", first.number, first.session.key, str(raised))
            else:
                logger.exception("frame %d of session %d failed", first.number, first.session.key)
                error = EngineError(f"The model failed on this frame: {type(raised).__name__}: {raised}", "failed")
        # Outside the handlers: nothing holds the failed stage's tensors any more.
        work = first.work
        if error is None and not out_of_memory:
            work.memory.newest = None  # its picture will never come
        else:
            work.memory.forget()
        for frame in frames:
            frame.work.let_go()
        if out_of_memory:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # other frames' work may still read what is freed now
            self._editor.token_caches.free_all()
            self.pipeline.release_memory()
            (width, height), params = work.size, work.params
            error = EngineError(
                f"Out of memory at {width}x{height}, pictures: {len(work.images)}, cfg_scale {params.cfg_scale:g}, "
                f"area {params.reference_area}. Try a smaller size, fewer pictures, cfg_scale 1 or area output.",
                "out_of_memory",
            )
        for frame in frames:
            frame.error = error

    def _deliver(self, frame: _Frame) -> None:
        session, work, frame.work = frame.session, frame.work, None  # it holds keys and values, and the frame
        stages_ms = work.watch.read_ms() if frame.error is None and not frame.cancelled else {}
        with self._lock:
            self._taken = [other for other in self._taken if other is not frame]
            now = self._clock()
            session._served_monotonic = session._active_monotonic = now
            if frame.cancelled:
                return
            skipped = work.repeats is not None and frame.error is None
            latency_ms = (now - frame.submitted_monotonic) * 1000
            if frame.error is None:
                self._frames += 1
                self._skipped += skipped
                self._latencies_ms.append(latency_ms)
                if not skipped:
                    self._stages_ms.append(stages_ms)
                    self._computed.append(work.computed)
                    self._learn(work, stages_ms, latency_ms, now)
                self._done_times.append(now)
                session._done_times.append(now)
                session._shown.append((now, (work.repeats or work.rendered).submitted_monotonic))
            else:
                self._errors += 1
            fps = frame_rate(session._done_times, now)
            told = (stages_ms, latency_ms, session._dropped, fps, skipped, tuple(work.notes), work.computed)
            result = EditResult(frame.number, frame.image, frame.error, frame.params, *told, frame.waited_ms)
            session._publish(result)
            frame.outcome.set_result(result)

    def _learn(self, work: Work, stages_ms: dict[str, float], latency_ms: float, now_monotonic: float) -> None:
        encode_ms = stages_ms["prepare"] + stages_ms["encode_prompt"] + stages_ms["encode_references"]
        cost = Cost(encode_ms, stages_ms["denoise"], stages_ms["decode"], latency_ms)
        self._costs.add(work.plan, cost, now_monotonic)
