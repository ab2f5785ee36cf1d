"""The inference thread: whose turn it is, the three stages of a frame, failures, delivery.

Why one thread: the GPU does one thing at a time anyway, CUDA graphs are thread-local, and with a single owner nothing
in the pipeline needs a lock. Everything torch does for a frame happens here.

The thread serves in turns. A turn is one session's: its waiting frame goes through the three stages of `frames`. In a
stream batch it goes one step, with those frames of the session that are on their way; a session with such frames has a
turn also when nothing waits, so that the last frame of a stream comes out too. The next turn is the session's whose last
one lies furthest back, so a fast sender cannot starve a slow one. Where a GPU can overlap stages, a turn's last stage is
queued after the next turn's first: see `_serve_next`. Whom to serve, whom to free and when to do less are pure functions
in `scheduling`, `policies` and `pace`; every clock here is monotonic, in seconds.

Failures: what a person can act on is an `EditError`. Whatever else a frame raises is logged with its traceback and
reported to its own session as an `EditError`; the thread goes on with the next frame, and the session forgets what it
had kept for reuse. Cancelling raises inside the denoise loop's `on_step` and so takes effect within one step. No error
keeps a traceback: it would keep tensors alive.
"""

import dataclasses
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from engine.contract import Pipeline
from engine.errors import Cancelled, EngineError, is_out_of_memory
from engine.frames import FrameEditor
from engine.host_memory import HostMemory, malloc_trim
from engine.memory import Work
from engine.pace import Cost, Costs
from engine.scheduling import take_at
from engine.sessions import EditResult, Frame, Session, Sessions
from engine.statistics import Statistics
from engine.streams import Stopwatch
from pipeline.images import EditError

LOOK_EVERY_S = 0.5  # while frames wait for the engine

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Turn:
    """What the thread does for one session at a time."""

    session: Session
    frame: Frame | None  # None: those on their way go a step further
    flight: list[Frame]  # the session's stream batch
    done: list[Frame] = dataclasses.field(default_factory=list)  # denoised, skipped or failed, in their order
    asked: torch.cuda.Event | None = None  # its second stage has run; None on the CPU

    def denoised(self) -> bool:
        return self.asked is None or self.asked.query()


class Loop:
    """The thread and what only it touches. `draw` is a number in [0, 1)."""

    def __init__(self, pipeline: Pipeline, sessions: Sessions, statistics: Statistics, draw: Callable[[], float]):
        self._pipeline, self._sessions, self._statistics = pipeline, sessions, statistics
        self._config, self._clock = sessions.config, sessions.clock
        self.device = torch.device(pipeline.device)
        self.overlap = self._config.pipelining and self.device.type == "cuda"  # as of `start`
        self.tail: Turn | None = None  # the turn before, if its last stage is still to be queued
        self.thread: threading.Thread | None = None
        self.start_error: BaseException | None = None
        self.description: dict[str, Any] = {}  # filled by start()
        self._editor = FrameEditor(pipeline, self.device, draw, self._clock, self._config.reuse_sessions)
        self.costs = Costs()
        self._host_memory = HostMemory(malloc_trim() if self.device.type == "cpu" else None)
        self._delivered_monotonic = -math.inf  # when the last frame was
        self._busy_until_monotonic = 0.0  # the end of the denoise that was queued last
        self._encode_s = 0.0  # the encode before it
        self._ready = threading.Event()
        self._told_report: list | None = None  # the fast path's, as it stands in the description

    def start(self) -> None:
        """Starts the thread and returns when the model is ready for frames, or when `start_error` says why it is not."""
        if self.thread is not None:
            raise RuntimeError("the engine was started before")
        self.thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self.thread.start()
        self._ready.wait()

    def join(self) -> None:
        """Waits for the thread's end, after the sessions were closed. On the thread itself, or before the start, returns."""
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def _run(self) -> None:
        try:
            if self.device.type == "cuda":
                if self.device.index is not None:
                    torch.cuda.set_device(self.device)
                self._editor.streams.start(self.overlap)
            report = self._pipeline.enable_fast_path() if self._config.fast_path else []
            self.description = {
                **self._pipeline.description,
                "default_size": self._sessions.default_size,
                "fast_path": [{"name": name, "applied": applied, "reason": reason} for name, applied, reason in report],
                "pipelining": {"applied": self.overlap, "reason": self._why_overlap()},
            }
        except BaseException as error:
            self.start_error = error
            return
        finally:
            self._ready.set()
        try:
            while self._serve_next():
                pass
        except BaseException as error:  # SystemExit from a library, memory at an end: no one would answer any more
            logger.critical("the inference thread died", exc_info=error)
            self.tail = None
            self._sessions.fail(f"The engine has stopped: {type(error).__name__}: {error}. Restart the program.")
        finally:
            self._look_every(0.0)
            self._host_memory.close()

    def _look_every(self, seconds: float) -> None:
        """How often the fast path looks whether its modules were changed: each look at a full-size model takes milliseconds."""
        if self._pipeline.fast_path is not None:
            self._pipeline.fast_path.look_every_s = seconds

    def _tell_fast_path(self) -> None:
        """If the fast path's report has changed since the start (it left a part out), the description says so."""
        fast_path = self._pipeline.fast_path
        report = fast_path.report if fast_path is not None else None
        if report and report is not self._told_report:
            self._told_report = report
            self.description = {**self.description, "fast_path": [line._asdict() for line in report]}

    def _why_overlap(self) -> str:
        if self.overlap:
            return "encode of the next frame and decode of the last run while the denoise runs"
        if not self._config.pipelining:
            return "turned off"
        return f"a device of the kind {self.device.type} does one thing at a time"

    # Turns

    def _next_turn(self) -> Turn | None:
        """The next session's turn. None when the engine closes, or if nothing waits and the turn before is denoised."""
        taken = self._sessions.take_next(
            self.tail.denoised if self.tail is not None else None, take_at(self._busy_until_monotonic, self._encode_s)
        )
        if taken is None:
            return None
        session, frame = taken
        return Turn(session, frame, session.flight)

    def _serve_next(self) -> bool:
        """One turn, or what is left of the one before. False when the engine closes; never raises.

        With overlap the GPU receives: encode(k), decode(k-1), denoise(k). Encode and decode share a stream, so encode(k)
        must be queued before decode(k-1): queued after it, it would wait for denoise(k-1). The host then waits for the
        picture of k-1, which is ready when denoise(k) has hardly begun.
        """
        turn, tail = self._next_turn(), self.tail
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
        self.tail = turn if self.overlap else None
        if turn is not None and not self.overlap:
            self._finish(turn)
            self._deliver_turn(turn)
        if turn is not None:
            self._editor.token_caches.record_ahead(turn.session.memory)
        return True

    def _begin(self, turn: Turn) -> None:
        frame = turn.frame
        if frame is not None:
            frame.work = Work(
                turn.session.memory, frame.images, frame.params, frame.size, frame.submitted_monotonic, frame.check,
                Stopwatch(self.device), list(frame.notes),
            )  # fmt: skip
            self._attempt([frame], self._begin_frame, frame)

    def _begin_frame(self, frame: Frame) -> None:
        # Who changes the model after a result and then submits sees the change at once. A frame that has waited since before the
        # last result is one of a stream that the engine does not keep up with: only there each look costs frames.
        behind = frame.submitted_monotonic < self._delivered_monotonic
        self._look_every(LOOK_EVERY_S if behind else 0.0)
        self._set_pace(frame)
        self._editor.begin(frame.work)

    def _set_pace(self, frame: Frame) -> None:
        """What is computed in place of what was asked for, if a rate or a latency was asked for too."""
        work, asked, pace, now = frame.work, frame.work.plan, frame.session.pace, self._clock()
        sessions = self._sessions.sharing(now)
        may_reuse = self._editor.token_caches.possible(work.params)
        plan = pace.choose(work.params, asked, may_reuse, self.costs, max(1, sessions), self.overlap, now)
        work.notes += [pace.text] if pace.text else []
        if plan != asked:
            names = ("steps", "width", "height", "stream_batch", "reuse")
            work.params = work.params.replace(**{name: getattr(plan, name) for name in names})
            work.size = plan.width, plan.height

    def _denoise(self, turn: Turn) -> None:
        """The turn's frame to its latents, or into the stream batch; and a step of all that are in it."""
        frame, flight = turn.frame, turn.flight
        if frame is not None and frame.error is None and not frame.cancelled and frame.work.repeats is None:
            work, batched = frame.work, frame.work.params.stream_batch
            if not batched or not all(other.work.keeps_step_with(work) for other in flight):
                # What is on its way comes out first: order is kept, and no batch mixes sizes or schedules.
                while flight:
                    self._step(turn)
            self._attempt([frame], self._editor.enter if batched else self._editor.denoise, work)
            if not batched:
                self._expect(work, work.params.steps)
        if frame is not None:
            flight.append(frame)
        if flight:
            self._step(turn)
        turn.asked = self._editor.streams.event()
        if turn.asked is not None:
            self._editor.embeddings.renew(turn.session.memory)

    def _expect(self, work: Work, steps: int) -> None:
        """Estimates until when the GPU is busy with this many steps."""
        if self.overlap and (cost := self.costs.expected(work.plan, self._clock())):
            denoise_s = cost.denoise / 1000 * steps / work.params.steps
            self._busy_until_monotonic = max(self._busy_until_monotonic, self._clock()) + denoise_s
            self._encode_s = cost.encode / 1000

    def _step(self, turn: Turn) -> None:
        """One step of all that are on their way in this session; those in front that need no more leave."""
        flight = turn.flight
        moving = [frame for frame in flight if frame.moving]
        if moving:
            self._attempt(moving, self._editor.advance, [frame.work for frame in moving])
            self._expect(moving[0].work, 1)
        while flight and not flight[0].moving:
            turn.done.append(flight.pop(0))

    def _finish(self, turn: Turn) -> None:
        for frame in turn.done:
            if frame.error is None and not frame.cancelled and frame.work.repeats is None:
                self._attempt([frame], self._editor.finish, frame.work)

    def _deliver_turn(self, turn: Turn) -> None:
        if turn.asked is not None:
            turn.asked.synchronize()  # also where nothing is done: or a stream batch would run on before it is a batch
        for frame in turn.done:
            if frame.cancelled:
                frame.work.memory.newest = None  # whose picture will never come
            elif frame.error is None:
                self._attempt([frame], self._collect, frame)
            self._deliver(frame)
            self._host_memory.computed(frame.size[0] * frame.size[1])
        if turn.asked is None:
            self._editor.embeddings.renew(turn.session.memory)

    def _collect(self, frame: Frame) -> None:
        frame.image = self._editor.collect(frame.work)
        self._statistics.cache_summary = self._pipeline.cache_summary()
        self._tell_fast_path()

    # Failures

    def _attempt(self, frames: list[Frame], stage: Callable[..., None], *arguments) -> None:
        """Runs a stage of these frames of one session. What it raises becomes their error."""
        first, error, out_of_memory = frames[0], None, False
        try:
            stage(*arguments)
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
            self._free_memory()
            (width, height), params = work.size, work.params
            error = EngineError(
                f"Out of memory at {width}x{height}, pictures: {len(work.images)}, cfg_scale {params.cfg_scale:g}, "
                f"area {params.reference_area}. Try a smaller size, fewer pictures, cfg_scale 1 or area output.",
                "out_of_memory",
            )
        for frame in frames:
            frame.error = error

    def _free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # other frames' work may still read what is freed now
        self._editor.token_caches.free_all()
        self._pipeline.release_memory()

    # Delivery

    def _deliver(self, frame: Frame) -> None:
        session, work, frame.work = frame.session, frame.work, None  # it holds keys and values, and the frame
        stages_ms = work.watch.read_ms() if frame.error is None and not frame.cancelled else {}
        with self._sessions.lock:
            now = self._delivered_monotonic = self._sessions.give_back(frame)
            if frame.cancelled:
                return
            skipped = work.repeats is not None and frame.error is None
            latency_ms = (now - frame.submitted_monotonic) * 1000
            if frame.error is not None:
                self._statistics.errors += 1
            else:
                if skipped:
                    self._statistics.add_repeated(latency_ms, now)
                else:
                    self._statistics.add_computed(latency_ms, stages_ms, work.computed, now)
                    self._learn(work, stages_ms, latency_ms, now)
                session.count_shown(now, (work.repeats or work.rendered).submitted_monotonic)
            result = EditResult(
                number=frame.number,
                image=frame.image,
                error=frame.error,
                params=frame.params,
                stages_ms=stages_ms,
                age_ms=latency_ms,
                dropped=session.dropped,
                fps=session.fps(now),
                skipped=skipped,
                notes=tuple(work.notes),
                computed=work.computed,
                waited_ms=frame.waited_ms,
            )
            session.publish(frame, result)

    def _learn(self, work: Work, stages_ms: dict[str, float], latency_ms: float, now_monotonic: float) -> None:
        encode_ms = stages_ms["prepare"] + stages_ms["encode_prompt"] + stages_ms["encode_references"]
        cost = Cost(encode_ms, stages_ms["denoise"], stages_ms["decode"], latency_ms)
        self.costs.add(work.plan, cost, now_monotonic)
