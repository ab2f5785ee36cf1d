"""The realtime engine: sessions put frames in, edited frames come out, one thread runs the model.

Why one thread: the GPU does one thing at a time anyway, CUDA graphs are thread-local, and with a single owner nothing
in the pipeline needs a lock. Everything torch does for a frame happens there; callers only exchange numpy arrays.

A session is one person's stream. Its mailbox has one slot and the newest frame wins: a frame that waited behind a
newer one would only be shown late, so it is dropped and counted. Results go the same way: `latest()` and the async
iterator hold one slot each, a slow reader misses pictures and never builds a queue. The next frame is taken from the
session whose last service lies furthest back, so a fast sender cannot starve a slow one. Whom to serve, whom to free
and when to do less are pure functions in `policies`; every clock here is monotonic, in seconds.

Settings live in two frozen dataclasses (`settings`): `EngineConfig` when the engine is built, `EditParams` with each
frame. A frame carries its own params, so a change of settings never reaches a frame that is already running.

What a session may use again is its own: the last picture, repeated at once when a frame is like the one before
(`skip_similar`), and the last embeddings (`embeds`). Any change of prompt, setting or size computes a frame.

Failures: what a person can act on is an `EditError`. Whatever else a frame raises is logged with its traceback and
reported to its own session as an `EditError`; the thread goes on with the next frame. Cancelling raises inside the
denoise loop's `on_step` and so takes effect within one step. No error keeps a traceback: it would keep tensors alive.

One lock guards all bookkeeping (microseconds per frame) and is never held while the model runs.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import torch

from images import EditError, blend, download, fit
from policies import RATE_FRAMES, embeds_anew, frame_rate, idle_sessions, next_session, similarity, skips, thumbnail
from settings import CHOICES, LIMITS, MAX_PROMPT_CHARS, PICTURES, SIZE_MULTIPLE, EditParams, EngineConfig

__all__ = [
    "CHOICES", "LIMITS", "MAX_PROMPT_CHARS", "PICTURES", "SIZE_MULTIPLE", "STAGES",
    "EditParams", "EditResult", "EngineConfig", "EngineError", "EngineStats", "RealtimeEngine", "Session", "prepare_pictures",
]  # fmt: skip

logger = logging.getLogger(__name__)

STAGES = ("prepare", "encode_prompt", "encode_references", "denoise", "decode", "total")

_HISTORY_FRAMES = 256  # percentiles and stage means of `stats()` are over this many frames


class EngineError(EditError):
    """The frame was good and the model failed on it. `kind`: "out_of_memory", "not_finite" or "failed"."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


@dataclasses.dataclass(frozen=True, eq=False)
class EditResult:
    """One frame, done or failed: exactly one of `image` and `error` is set."""

    number: int  # the frame's, as `submit` returned it
    image: np.ndarray | None  # uint8 (H, W, 3)
    error: EditError | None
    params: EditParams
    stages_ms: dict[str, float]  # the keys of STAGES; empty for a failed frame
    age_ms: float  # from submit to done, waiting included
    dropped: int  # frames of this session replaced by newer ones so far
    fps: float  # of this session
    skipped: bool = False  # the last picture again: the frame was like the one before


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine did since it started; the rate, the percentiles and the means are over its last frames."""

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


def prepare_pictures(images: list[np.ndarray], params: EditParams, width: int, height: int) -> list[np.ndarray]:
    """The references as the model gets them: at the output's size, or for the stock area at their own; then blended."""
    if params.reference_area == "output":
        images = [fit(image, width, height, params.fit) for image in images]
    return [blend(*images, params.blend_ratio)] if params.mode == "blend" else images


def _alike(measure: str, now: list[np.ndarray], before: list[np.ndarray]) -> float:
    """The least of the pictures' similarities; 0 where there is nothing to compare."""
    if not now or len(now) != len(before):
        return 0.0
    return min(similarity(measure, *pair) for pair in zip(now, before, strict=True))


class _Cancelled(Exception):
    """Unwinds a cancelled frame; never leaves this module."""


class _Stopwatch:
    """Milliseconds per stage. On CUDA by events, read after the frame: a synchronize per stage would stall the GPU."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, stage: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((stage, event if self._cuda else time.perf_counter()))

    def read_ms(self) -> dict[str, float]:
        if self._cuda:
            self._marks[-1][1].synchronize()
        marks = [(stage, self._marks[0][1].elapsed_time(at) if self._cuda else at * 1000) for stage, at in self._marks]
        stages = {stage: at - before for (_, before), (stage, at) in itertools.pairwise(marks)}
        return stages | {"total": marks[-1][1] - marks[0][1]}


@dataclasses.dataclass(eq=False)
class _Frame:
    session: "Session"
    number: int
    images: list[np.ndarray]
    params: EditParams
    size: tuple[int, int]  # width, height
    on_step: Callable[[int, int], None] | None
    submitted_monotonic: float
    cancelled: bool = False  # set under the lock, read by the inference thread without it
    outcome: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)  # of EditResult


@dataclasses.dataclass
class _Memory:
    """What a session's next frame may use again. Only the inference thread touches it."""

    params: EditParams | None = None  # of the last computed frame, as are these
    size: tuple[int, int] = (0, 0)
    thumbnails: list[np.ndarray] = dataclasses.field(default_factory=list)
    image: np.ndarray | None = None
    skipped: int = 0  # frames in a row since
    embeds: tuple | None = None  # prompt and negative prompt as the pipeline embedded them
    embeds_of: tuple = ()  # for which words and how many pictures,
    embeds_thumbnails: list[np.ndarray] = dataclasses.field(default_factory=list)  # at the sight of which,
    embeds_frames: int = 0  # and how many frames have used them


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
        self._memory = _Memory()

    @property
    def closed(self) -> bool:
        return self._closed_because is not None

    def submit(
        self, images: list[np.ndarray], params: EditParams, on_step: Callable[[int, int], None] | None = None
    ) -> int:
        """Leaves a frame in the mailbox and returns its number (from 1) at once; a frame still waiting is dropped.

        `images` are uint8 (H, W, 3). `on_step(i, n)` is called on the inference thread and must be quick. Raises
        EditError when the pictures do not suit the mode, the output is too large, or the session is closed.
        """
        size = self._engine._check_frame(images, params)
        with self._lock:
            if self._closed_because is not None:
                raise EditError(self._closed_because)
            self._count += 1
            if self._pending is not None:
                self._dropped += 1
                self._engine._dropped += 1
                self._discard(self._pending, "was dropped: a newer one came")
            self._active_monotonic = now = self._engine._clock()
            self._pending = _Frame(self, self._count, list(images), params, size, on_step, now)
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
                elif closed:
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
        frames = (self._engine._running, self._pending)
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
    """Runs a pipeline for many sessions on one thread. `pipeline` is loaded; `clock` is monotonic seconds, `draw` a number in [0, 1).

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
        self._draw = draw
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
        self._running: _Frame | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._start_error: Exception | None = None
        self._ready = threading.Event()
        self._frames = self._skipped = self._dropped = self._errors = 0
        self._done_times: collections.deque[float] = collections.deque(maxlen=RATE_FRAMES)
        self._ages_ms: collections.deque[float] = collections.deque(maxlen=_HISTORY_FRAMES)
        self._stages_ms: collections.deque[dict] = collections.deque(maxlen=_HISTORY_FRAMES)  # of computed frames
        self._cache_summary: dict[str, dict[str, int]] = {}

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
                raise EditError("The engine is closed.")
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
            ages, stages = list(self._ages_ms) or [0.0], list(self._stages_ms)
            return EngineStats(
                fps=frame_rate(self._done_times, self._clock()),
                latency_p50_ms=float(np.percentile(ages, 50)),
                latency_p95_ms=float(np.percentile(ages, 95)),
                sessions=len(self._sessions),
                frames=self._frames,
                skipped=self._skipped,
                dropped=self._dropped,
                errors=self._errors,
                stages_ms={name: sum(s[name] for s in stages) / len(stages) for name in STAGES} if stages else {},
                cache_summary=self._cache_summary,
                memory=memory,
            )

    def _check_frame(self, images: list[np.ndarray], params: EditParams) -> tuple[int, int]:
        """The output's (width, height). Raises EditError on what cannot work, before it waits for its turn."""
        least, most = PICTURES[params.mode]
        if len(images) < least or len(images) > most:
            allowed = f"{least}" if least == most else f"{least} to {most}"
            raise EditError(f"{len(images)} pictures came. Allowed in mode {params.mode}: {allowed}.")
        for image in images:
            dtype, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
            if not (isinstance(image, np.ndarray) and dtype == np.uint8 and shape[2:] == (3,) and image.size):
                raise EditError(f"A picture came as {dtype} {shape}. Allowed: a numpy array, uint8 (height, width, 3).")
        width, height = params.width or self.default_size, params.height or self.default_size
        if width * height > self.config.max_pixels:
            raise EditError(
                f"The output would be {width}x{height}, {width * height:,} pixels. Allowed: {self.config.max_pixels:,}."
            )
        return width, height

    def _close_session(self, session: Session, why: str) -> None:
        with self._lock:
            if session.closed:
                return
            session._cancel("was cancelled: its session closed")
            session._closed_because = why
            session._memory = _Memory()  # a closed session may be held for long; its tensors need not be
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
            if self._device.type == "cuda" and self._device.index is not None:
                torch.cuda.set_device(self._device)
            report = self.pipeline.enable_fast_path() if self.config.fast_path else []
            self.description = {
                **self.pipeline.description,
                "default_size": self.default_size,
                "fast_path": [{"name": name, "applied": applied, "reason": reason} for name, applied, reason in report],
            }
        except Exception as error:
            self._start_error = error
            return
        finally:
            self._ready.set()
        while self._serve_next():
            pass

    def _next_frame(self) -> _Frame | None:
        """Sleeps until a frame waits and takes the fairest one; None when the engine closes."""
        with self._lock:
            while not self._closing:
                now = self._clock()
                self._free_idle(now)
                waiting = {key: s._served_monotonic for key, s in self._sessions.items() if s._pending is not None}
                if waiting:
                    session = self._sessions[next_session(waiting, now)]
                    self._running, session._pending = session._pending, None
                    return self._running
                oldest = min((s._active_monotonic for s in self._sessions.values()), default=None)
                self._work.wait(None if oldest is None else oldest + self.config.idle_timeout_s - now)
        return None

    def _serve_next(self) -> bool:
        """Waits for a frame, runs it, delivers its picture or its error. False when the engine closes; never raises."""
        frame = self._next_frame()
        if frame is None:
            return False
        image, stages_ms, skipped, error = None, {}, False, None
        try:
            image, stages_ms, skipped = self._edit_or_free(frame)
            self._cache_summary = self.pipeline.cache_summary()
        except _Cancelled:
            pass
        except EngineError as raised:
            error = EngineError(str(raised), raised.kind)
        except EditError as raised:
            error = EditError(str(raised))  # without the traceback, which holds the frame's tensors
        except Exception as raised:
            logger.exception("frame %d of session %d failed", frame.number, frame.session.key)
            error = EngineError(f"The model failed on this frame: {type(raised).__name__}: {raised}", "failed")
        self._deliver(frame, image, stages_ms, skipped, error)
        return True

    def _edit_or_free(self, frame: _Frame) -> tuple[np.ndarray, dict[str, float], bool]:
        try:
            return self._edit_frame(frame)
        except (
            RuntimeError,
            MemoryError,
        ) as raised:  # torch's own is a RuntimeError; cuBLAS and the CPU raise plain ones
            kinds, texts = (torch.OutOfMemoryError, MemoryError), ("out of memory", "allocate memory", "ALLOC_FAILED")
            if not isinstance(raised, kinds) and not any(text in str(raised) for text in texts):
                raise
            logger.warning("frame %d of session %d: %s", frame.number, frame.session.key, str(raised))
        # Outside the handler: nothing holds the failed frame's tensors any more.
        self.pipeline.release_memory()
        (width, height), params = frame.size, frame.params
        raise EngineError(
            f"Out of memory at {width}x{height}, pictures: {len(frame.images)}, cfg_scale {params.cfg_scale:g}, "
            f"reference area {params.reference_area}. Try a smaller size, fewer pictures, cfg_scale 1 or area output.",
            "out_of_memory",
        )

    def _edit_frame(self, frame: _Frame) -> tuple[np.ndarray, dict[str, float], bool]:
        """The work for one frame: uint8 (H, W, 3), milliseconds of each stage, and whether it repeats the last result."""
        pipe, params, (width, height) = self.pipeline, frame.params, frame.size
        memory = frame.session._memory
        watch = _Stopwatch(self._device)

        def check(step: int = 0, steps: int = 0) -> None:
            if frame.cancelled:
                raise _Cancelled
            if steps and frame.on_step is not None:
                frame.on_step(step, steps)

        def done(stage: str) -> None:
            watch.mark(stage)
            check()

        prepared = prepare_pictures(frame.images, params, width, height)
        looks = params.skip_similar != "off" or params.embeds == "changed"
        thumbnails = [thumbnail(picture) for picture in prepared] if looks else []
        if self._repeats(frame, thumbnails):
            memory.skipped += 1
            watch.mark("prepare")
            return memory.image, dict.fromkeys(STAGES, 0.0) | watch.read_ms(), True
        pictures = pipe.open_references(prepared)
        done("prepare")
        prompt, negative = self._embed(frame, pictures, thumbnails)
        done("encode_prompt")
        area = width * height if params.reference_area == "output" else None
        references = pipe.encode_references(pictures, area=area, width=width, height=height)
        done("encode_references")
        latents = pipe.denoise(
            pipe.initial_noise(width, height, params.seed),  # fixed by seed and size: a still scene stays still
            references,
            *prompt,
            pipe.schedule(params.steps, width, height),  # the pipeline keeps both, so a stream computes them once
            negative_prompt_embeds=negative[0],
            negative_mask=negative[1],
            cfg_scale=params.cfg_scale,
            on_step=check,
        )
        finite = torch.isfinite(latents).all()  # read after the decode is queued: reading it here would stall the GPU
        done("denoise")
        image = download(pipe.decode(latents, width, height)[0])
        watch.mark("decode")
        if not finite:
            raise EngineError(
                f"The model gave no finite picture at {width}x{height}, {params.steps} steps, "
                f"cfg_scale {params.cfg_scale:g}. Change the prompt, the seed, the steps or the dtype.",
                "not_finite",
            )
        memory.params, memory.size, memory.thumbnails, memory.image, memory.skipped = params, frame.size, thumbnails, image, 0
        return image, watch.read_ms(), False

    def _repeats(self, frame: _Frame, thumbnails: list[np.ndarray]) -> bool:
        """Whether the frame is skipped: nothing was changed but the pictures, and they but little."""
        memory, params = frame.session._memory, frame.params
        if params.skip_similar == "off" or (memory.params, memory.size) != (params, frame.size):
            return False
        alike = _alike(params.skip_similar, thumbnails, memory.thumbnails)
        return skips(alike, params.skip_threshold, memory.skipped, params.max_skipped, self._draw())

    def _embed(self, frame: _Frame, pictures: list, thumbnails: list[np.ndarray]) -> tuple[tuple, tuple]:
        """(embeddings, mask) of prompt and negative prompt, None and None without guidance: anew, or the last ones."""
        memory, params, pipe = frame.session._memory, frame.params, self.pipeline
        guided = params.cfg_scale > 1
        words = (params.prompt, params.negative_prompt if guided else None, len(pictures))
        if memory.embeds is not None and memory.embeds_of == words:
            alike = _alike("patch", thumbnails, memory.embeds_thumbnails)
            if not embeds_anew(params.embeds, memory.embeds_frames, params.embeds_every, alike, params.embeds_threshold):
                memory.embeds_frames += 1
                return memory.embeds
        prompt = pipe.encode_prompt(params.prompt, pictures)
        negative = pipe.encode_prompt(params.negative_prompt or " ", pictures) if guided else (None, None)
        memory.embeds, memory.embeds_of = (prompt, negative), words
        memory.embeds_thumbnails, memory.embeds_frames = thumbnails, 1
        return memory.embeds

    def _deliver(
        self, frame: _Frame, image: np.ndarray | None, stages_ms: dict, skipped: bool, error: EditError | None
    ) -> None:
        session = frame.session
        with self._lock:
            self._running = None
            now = self._clock()
            session._served_monotonic = session._active_monotonic = now
            if frame.cancelled:
                return
            age_ms = (now - frame.submitted_monotonic) * 1000
            if error is None:
                self._frames += 1
                self._skipped += skipped
                self._ages_ms.append(age_ms)
                if not skipped:
                    self._stages_ms.append(stages_ms)
                self._done_times.append(now)
                session._done_times.append(now)
            else:
                self._errors += 1
            fps = frame_rate(session._done_times, now)
            result = EditResult(
                frame.number, image, error, frame.params, stages_ms, age_ms, session._dropped, fps, skipped
            )
            session._publish(result)
            frame.outcome.set_result(result)
