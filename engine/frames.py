"""What one frame of a session computes, in three stages, and what a session remembers from one frame to the next.

    begin     pictures at the output's size, skipped or not, embeddings, references, which tokens have changed
    denoise   noise to latents; in a stream batch `advance`, one step of every frame on its way
    finish    latents to a picture, and on to the host; `collect` waits for it there

A stage only asks for work; on a GPU nothing waits before `collect`. With `overlap` the first and the last stage run on
a CUDA stream of their own, so that the engine can ask for the next frame's first stage and the last frame's third while
this frame's second runs: who needs what another stream made waits for its event, on the GPU.

`SessionMemory` holds what later frames may use again: the last result, embeddings, keys and values. It is one session's
and never shared. When a frame fails `forget` empties it, so that nothing of a broken frame reaches the next one. What
the techniques decide is in `policies`; here it is done.
"""

import collections
import contextlib
import dataclasses
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.fitting import framed, sized
from engine.pace import Plan, plan_of
from engine.policies import (
    MOTION_WINDOW,
    TOKEN,
    changed_tokens,
    looks_again,
    motion,
    motion_strength,
    neighbours,
    similarity,
    skips,
    still_tokens,
    thumbnail,
)
from engine.scheduling import gives_way
from engine.settings import EditParams
from pipeline.content_cache import ContentCache
from pipeline.geometry import on_grid, padded
from pipeline.images import EditError, blend, fit
from pipeline.sampling import Schedule

logger = logging.getLogger(__name__)

STAGES = ("prepare", "encode_prompt", "encode_references", "denoise", "decode", "total")
START_LEVELS = 4  # strengths of a start with motion_aware: each is a schedule that the fast path keeps tables for


class EngineError(EditError):
    """The frame was good and the model failed on it. `kind`: "out_of_memory", "not_finite" or "failed"."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


class Cancelled(Exception):
    """Unwinds a cancelled frame; never reaches a caller of the engine."""


def prepare_pictures(images: list[np.ndarray], params: EditParams, width: int, height: int) -> list[np.ndarray]:
    """The references as the model gets them: as `fitting.sized` makes them, then blended."""
    images = sized(images, params, width, height)
    return [blend(*images, params.blend_ratio)] if params.mode == "blend" else images


def is_out_of_memory(error: Exception) -> bool:
    """torch has a kind of its own for it, a RuntimeError; cuBLAS and the CPU raise plain ones."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "allocate memory", "ALLOC_FAILED")
    )


class Stopwatch:
    """Milliseconds of each stage of one frame. On CUDA by events, which are read when the frame is done."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def stage(self, name: str):
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # on the current stream
        return event

    def read_ms(self) -> dict[str, float]:
        """The keys of STAGES; "total" is the sum of the others."""
        stages = dict.fromkeys(STAGES, 0.0)
        for name, begin, end in self._spans:
            if self._cuda:
                end.synchronize()
            stages[name] += begin.elapsed_time(end) if self._cuda else (end - begin) * 1000
        stages["total"] = sum(stages.values())
        return stages


@dataclasses.dataclass(eq=False)
class Shown:
    """A computed frame as the ones after it need it. `latents` and `image` come as the stages go."""

    params: EditParams
    size: tuple[int, int]
    pictures: list[np.ndarray]  # as the model got them, padded to the grid: what moves is judged token by token
    thumbnails: list[np.ndarray]
    submitted_monotonic: float
    check: Callable[[], None] | None  # raises Cancelled if the image will never come; None when it is there
    latents: torch.Tensor | None = None  # clean, packed (1, N, C)
    image: np.ndarray | None = None  # uint8 (H, W, 3)

    @property
    def cancelled(self) -> bool:
        try:
            if self.check is not None:
                self.check()
        except Cancelled:
            return True
        return False


@dataclasses.dataclass(eq=False)
class Embeds:
    """(embeddings, mask) of prompt and negative prompt, (None, None) without one, as read beside pictures."""

    prompt: tuple
    negative: tuple
    words: tuple  # prompt, negative prompt, number of pictures
    thumbnails: list[np.ndarray]
    frames: int = 1  # that have used them

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (*self.prompt, *self.negative) if t is not None]


@dataclasses.dataclass(eq=False)
class Renewal:
    """Embeddings that are made beside the frames. `embeds` come with the run, and are there when `ready` says so."""

    words: tuple
    pictures: list
    thumbnails: list[np.ndarray]
    embeds: Embeds | None = None
    after: Any = None  # CUDA events, None on the CPU: the pictures are there,
    ready: Any = None  # the embeddings are


@dataclasses.dataclass(eq=False)
class Fade:
    """A prompt on its way to the next: from its words' embeddings (1, words, D), `done` of `frames` frames."""

    origin: torch.Tensor
    frames: int
    done: int = 0


@dataclasses.dataclass(eq=False)
class SessionMemory:
    """What a session's next frame may use again. Only the inference thread touches it."""

    newest: Shown | None = None  # the last frame that was begun, skipped ones apart
    result: Shown | None = None  # the last one that was denoised
    skipped: int = 0  # frames in a row that repeat `newest`
    embeds: Embeds | None = None
    used: torch.Tensor | None = None  # the prompt's embeddings as the last frame had them, faded or not
    renewal: Renewal | None = None
    fade: Fade | None = None
    motions: collections.deque = dataclasses.field(default_factory=lambda: collections.deque(maxlen=MOTION_WINDOW))
    strength: float = 1.0  # of what is kept from the last frame, by `policies.motion_strength`
    cache: Any = None  # keys and values of the tokens, see fast_path.reuse
    cache_used_monotonic: float = 0.0
    cache_lost: bool = False  # to another session, and nobody was told yet
    seen_with: tuple = ()  # settings, size and number of pictures for which
    # The pictures as each token last saw them when it was computed.
    seen: list[np.ndarray] = dataclasses.field(default_factory=list)

    def forget(self) -> None:
        """Lets go of everything that a later frame would build on: after a failure the next one starts afresh."""
        if self.cache is not None:
            self.cache.clear()
        self.newest = self.result = self.embeds = self.used = self.renewal = self.fade = None
        self.seen_with, self.seen, self.skipped, self.strength = (), [], 0, 1.0
        self.motions.clear()


@dataclasses.dataclass(eq=False)
class Work:
    """One frame on its way through the stages. `check(step, steps)` raises Cancelled, or tells how far it is."""

    memory: SessionMemory
    images: list[np.ndarray]
    params: EditParams  # what is computed: as asked, or as pace picked
    size: tuple[int, int]  # width, height
    submitted_monotonic: float
    check: Callable[..., None]
    watch: Stopwatch
    notes: list[str] = dataclasses.field(default_factory=list)
    shown: Shown | None = None  # what this frame computes,
    repeats: Shown | None = None  # or which earlier one it shows again
    prompt: tuple = ()
    negative: tuple = (None, None)
    references: Any = None
    cache: Any = None
    changed: np.ndarray | None = None  # bool (rows, columns), None = all
    computed: float = 1.0  # share of the tokens
    picture: Any = None  # a denoising.Denoising, in a stream batch
    finite: torch.Tensor | None = None
    ready: Any = None  # event: the last stage's work is done on its stream
    download: "_Download | None" = None

    def let_go(self) -> None:
        """After a failure: of everything that holds the device's memory."""
        self.picture = self.references = self.cache = self.download = self.finite = None
        self.prompt, self.negative = (), (None, None)

    def keeps_step_with(self, other: "Work") -> bool:
        """Whether both can be in one stream batch."""
        return (self.size, self.params.steps) == (other.size, other.params.steps)

    @property
    def plan(self) -> Plan:
        return plan_of(self.params, self.size, len(self.images))

    @property
    def guided(self) -> bool:
        return self.params.cfg_scale > 1 and self.params.cfg_mode != "none"


class FrameEditor:
    """The stages, on one pipeline. `clock` is monotonic seconds, `draw` a number in [0, 1)."""

    def __init__(self, pipeline: Any, device: torch.device, draw: Callable, clock: Callable, reuse_sessions: int):
        self._pipe, self._device, self._draw, self._clock = pipeline, device, draw, clock
        self._reuse_sessions = reuse_sessions
        self._holders: weakref.WeakSet[SessionMemory] = weakref.WeakSet()  # of token caches
        self._records_ahead = True
        self._schedules = ContentCache(64)
        self._side = self._beside = self._renewed = (
            None  # streams of the VAE and of renewals, event of the last renewal
        )

    def use_streams(self, overlap: bool) -> None:
        """On CUDA: a stream for renewals, and with `overlap` one for the first and the last stage."""
        self._beside = torch.cuda.Stream(self._device)
        self._side = torch.cuda.Stream(self._device) if overlap else None

    # First stage

    def begin(self, work: Work) -> None:
        """Everything before the denoise; or sets `work.repeats` for a frame that is like the one before."""
        pipe, params, memory, (width, height) = self._pipe, work.params, work.memory, work.size
        with self._on(self._side):
            with work.watch.stage("prepare"):
                pictures = prepare_pictures(work.images, params, width, height)
                looks = params.skip_similar != "off" or params.embeds == "changed" or params.motion_aware
                thumbnails = [thumbnail(picture) for picture in pictures] if looks else []
                on_tokens = [padded(picture) for picture in pictures]
                work.shown = Shown(params, work.size, on_tokens, thumbnails, work.submitted_monotonic, work.check)
                if self._is_repeated(work):
                    memory.skipped += 1
                    work.repeats = memory.newest
                    return
                opened = pipe.open_references(pictures)
                if params.motion_aware:
                    self._follow_motion(memory, thumbnails)
            work.check()
            with work.watch.stage("encode_prompt"):
                self._embed(work, opened)
            work.check()
            with work.watch.stage("encode_references"):
                area = "output"
                if params.reference_area == "stock":
                    area, opened = None, pipe.open_references([framed(pictures[0], width, height), *opened[1:]])
                work.references = pipe.encode_references(opened, area=area, width=width, height=height)
            work.check()
            with work.watch.stage("prepare"):
                self._plan_reuse(work)
            work.ready = self.event()
            if memory.renewal is not None and memory.renewal.after is None:
                memory.renewal.after = work.ready
        memory.newest, memory.skipped = work.shown, 0

    def _is_repeated(self, work: Work) -> bool:
        """Whether the frame is skipped: nothing was changed but the pictures, and they but little."""
        memory, params, last = work.memory, work.params, work.memory.newest
        if params.skip_similar == "off" or memory.fade is not None or last is None:
            return False
        if (last.params, last.size) != (params, work.size) or last.cancelled:
            return False
        alike = _alike(params.skip_similar, work.shown.thumbnails, last.thumbnails)
        return skips(alike, params.skip_threshold, memory.skipped, params.max_skipped, self._draw())

    def _follow_motion(self, memory: SessionMemory, thumbnails: list[np.ndarray]) -> None:
        before = memory.newest.thumbnails if memory.newest is not None else []
        if len(before) == len(thumbnails):
            memory.motions.append(max(motion(*pair) for pair in zip(thumbnails, before, strict=True)))
        memory.strength = motion_strength(memory.motions, memory.strength)

    # Embeddings: by policy anew, in the background, faded

    def _embed(self, work: Work, pictures: list) -> None:
        """Sets `work.prompt` and `work.negative`."""
        memory, params = work.memory, work.params
        negates = work.guided and params.cfg_mode != "self_negative"
        words = (params.prompt, params.negative_prompt if negates else None, len(pictures))
        self._adopt(memory)
        last, thumbnails = memory.embeds, work.shown.thumbnails
        if last is None or last.words != words:
            if last is not None and params.transition_frames and last.words[0] != words[0]:
                memory.fade = Fade(memory.used[:, -words_rows(self._pipe, last.words[0]) :], params.transition_frames)
            memory.renewal, memory.embeds = None, self._look(words, pictures, thumbnails)
        elif self._is_read_anew(params, last, thumbnails):
            if not params.embeds_background:
                memory.embeds = self._look(words, pictures, thumbnails)
            elif memory.renewal is None:
                memory.renewal = Renewal(words, pictures, thumbnails)
        if memory.embeds is last:
            last.frames += 1
        work.prompt, work.negative = memory.embeds.prompt, memory.embeds.negative
        if memory.fade is not None:
            work.prompt = self._faded(memory, params), work.prompt[1]
        memory.used = work.prompt[0]

    @staticmethod
    def _is_read_anew(params: EditParams, last: Embeds, thumbnails: list[np.ndarray]) -> bool:
        alike = _alike("patch", thumbnails, last.thumbnails)
        return looks_again(params.embeds, last.frames, params.embeds_every, alike, params.embeds_threshold)

    def _look(self, words: tuple, pictures: list, thumbnails: list[np.ndarray]) -> Embeds:
        if self._renewed is not None:  # what a renewal left in the pipeline's caches may still be in the making
            torch.cuda.current_stream(self._device).wait_event(self._renewed)
        prompt = self._pipe.encode_prompt(words[0], pictures)
        negative = (None, None) if words[1] is None else self._pipe.encode_prompt(words[1] or " ", pictures)
        return Embeds(prompt, negative, words, thumbnails)

    def renew(self, memory: SessionMemory) -> None:
        """Makes the embeddings that a frame asked for in the background; never raises, the last ones serve on.

        On CUDA beside the frames, on a stream of its own: call it when the frame's denoise has been asked for. On the
        CPU, where everything waits for everything, call it between two frames: no frame is longer for it.
        """
        renewal = memory.renewal
        if renewal is None or renewal.embeds is not None:
            return
        try:
            with self._on(self._beside):
                if self._beside is not None:
                    self._beside.wait_event(renewal.after)
                    for picture in renewal.pictures:
                        picture.on(self._device).record_stream(self._beside)
                renewal.embeds = self._look(renewal.words, renewal.pictures, renewal.thumbnails)
                renewal.ready = self._renewed = self.event()
        except Exception:
            logger.exception("embeddings could not be renewed; the last ones serve on")
            memory.renewal = None

    def _adopt(self, memory: SessionMemory) -> None:
        """Takes renewed embeddings that are there. Those of other words are let go of."""
        renewal = memory.renewal
        if renewal is None or renewal.embeds is None or (renewal.ready is not None and not renewal.ready.query()):
            return
        memory.renewal = None
        if memory.embeds is not None and memory.embeds.words == renewal.words:
            memory.embeds = renewal.embeds
            memory.embeds.frames = 0
            self._hand_over(*memory.embeds.tensors)

    def _faded(self, memory: SessionMemory, params: EditParams) -> torch.Tensor:
        """The prompt's embeddings (1, L, D) of this frame of the fade."""
        fade, aim = memory.fade, memory.embeds.prompt[0]
        fade.done += 1
        if fade.done >= fade.frames or not params.transition_frames:
            memory.fade = None
            return aim
        words = words_rows(self._pipe, params.prompt)
        return mixed_prompts(fade.origin, aim, words, fade.done / fade.frames, params.transition)

    # Reuse of keys and values

    def _plan_reuse(self, work: Work) -> None:
        """Sets `work.cache` and `work.changed` if this frame may use them; else notes why it may not."""
        memory, params = work.memory, work.params
        if params.reuse == "off":
            memory.cache = None
            return
        why = self._refuses_reuse(work)
        if why is None:
            why = self._hold_cache(memory)
        if why is not None:
            work.notes.append(f"reuse: off, {why}")
            memory.seen_with = ()
            return
        if memory.cache_lost:
            work.notes.append("reuse: all is computed, another session had this one's place meanwhile")
            memory.cache_lost = False
        work.cache = memory.cache
        with_what = (params, work.size, len(work.shown.pictures))
        if params.reuse == "frames" and memory.seen_with == with_what and memory.fade is None:
            pairs = zip(work.shown.pictures, memory.seen, strict=True)
            changed = np.logical_or.reduce([changed_tokens(*pair, params.reuse_threshold) for pair in pairs])
            if changed.mean() <= params.reuse_most:
                work.changed = changed
        memory.seen_with = with_what if memory.fade is None else ()

    def _refuses_reuse(self, work: Work) -> str | None:
        if work.guided:
            return "guidance is on"
        if work.params.stream_batch:
            return "in a stream batch the frame before is not there yet"
        if work.params.reference_area != "output":
            return "the references are not at the output's area"
        if any(picture.shape != work.shown.pictures[0].shape for picture in work.shown.pictures):
            return "the references differ in shape"
        return None

    def may_reuse(self, params: EditParams) -> bool:
        """Whether frames with these settings could reuse tokens."""
        guided = params.cfg_scale > 1 and params.cfg_mode != "none"
        known = getattr(self._pipe, "fused_transformer", None) is not None
        return known and not guided and params.reference_area == "output" and self._reuse_sessions > 0

    def _hold_cache(self, memory: SessionMemory) -> str | None:
        """Gives the session a token cache; or says why it gets none."""
        now = self._clock()
        if memory.cache is None:
            held = {id(m): m for m in self._holders if m.cache is not None}
            may, loser = gives_way({key: m.cache_used_monotonic for key, m in held.items()}, self._reuse_sessions, now)
            if not may:
                return f"{len(held)} other sessions hold the {self._reuse_sessions} places for it"
            if loser is not None:
                held[loser].cache, held[loser].cache_lost, held[loser].seen_with = None, True, ()
            try:
                memory.cache = self._pipe.token_cache()
            except EditError as error:
                return str(error)
            memory.seen_with = ()
            self._holders.add(memory)
        memory.cache_used_monotonic = now
        return None

    def record_ahead(self, memory: SessionMemory) -> None:
        """Between two frames: lets the session's token cache prepare for shares that may come; never raises."""
        if memory.cache is None or not self._records_ahead:
            return
        try:
            memory.cache.record_ahead()
        except Exception:
            logger.exception("nothing is recorded ahead any more: a new share of changed tokens stalls its first frame")
            self._records_ahead = False

    def free_caches(self) -> None:
        """Takes the token caches of all sessions, when memory runs out."""
        for memory in list(self._holders):
            memory.cache, memory.seen_with = None, ()

    # Second stage

    def denoise(self, work: Work) -> None:
        """All steps of one frame."""
        inputs, options = self._inputs(work)
        with work.watch.stage("denoise"):
            if work.cache is not None:
                work.cache.begin(work.changed, None if work.changed is None else neighbours(work.changed))
            work.shown.latents = self._pipe.denoise(*inputs, **options, on_step=work.check)
            self._settle(work)

    def enter(self, work: Work) -> None:
        """Puts a frame into the stream batch, before its first step."""
        inputs, options = self._inputs(work)
        work.picture = self._pipe.start(*inputs, **options)

    def advance(self, works: list[Work]) -> None:
        """One step of every frame, in one forward. Those that are finished then have latents, and no `picture`."""
        for work in works:
            work.check(work.picture.step, work.picture.steps)
        with contextlib.ExitStack() as stack:
            for work in works:
                stack.enter_context(work.watch.stage("denoise"))
            self._pipe.advance([work.picture for work in works])
            for work in works:
                if work.picture.finished:
                    work.shown.latents, work.picture = work.picture.latents, None
                    self._settle(work)

    def _inputs(self, work: Work) -> tuple[tuple, dict]:
        """What the pipeline's `denoise` and `start` are given, on the stream that denoises."""
        params, (width, height) = work.params, work.size
        if work.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(work.ready)
            self._hand_over(work.references.latents, *work.prompt, *work.negative)
        noise = self._pipe.initial_noise(width, height, params.seed)  # fixed: a still scene stays still
        schedule = self._pipe.schedule(params.steps, width, height)  # the pipeline keeps both
        last, share = self._last_result(work), params.start_from_previous
        if params.motion_aware:
            share *= round(work.memory.strength * START_LEVELS) / START_LEVELS
        if last is not None and share > 0:
            key = (schedule.times, width, height, share)
            schedule = self._schedules.get(key, lambda: self._started_late(schedule, share, params))
            noise = start_from(noise, last.latents, 1.0 - share)
        options = {
            "negative_prompt_embeds": work.negative[0],
            "negative_mask": work.negative[1],
            "cfg_scale": params.cfg_scale,
            "cfg_mode": params.cfg_mode,
            "cfg_delta": params.cfg_delta,
            "token_cache": work.cache,
        }
        return (noise, work.references, *work.prompt, schedule), options

    def _started_late(self, schedule: Schedule, share: float, params: EditParams) -> Schedule:
        """With all that motion may choose made ready at once: one by one, each would stall the stream for 2 s."""
        levels = range(1, START_LEVELS + 1) if params.motion_aware else ()
        shares = (share, *(params.start_from_previous * i / START_LEVELS for i in levels))
        late = [started_late(schedule, 1.0 - each) for each in shares]
        self._pipe.expect([time for each in late for time in each.times])
        return late[0]

    def _last_result(self, work: Work) -> Shown | None:
        """The last result if this frame shows the same edit: it may start from it, and keep of it."""
        last, params = work.memory.result, work.params
        if last is None or last.size != work.size or len(last.pictures) != len(work.shown.pictures):
            return None
        names = ("negative_prompt", "seed", "mode", "cfg_scale", "reference_area", "fit")
        names += () if work.memory.fade is not None else ("prompt",)
        return last if all(getattr(last.params, n) == getattr(params, n) for n in names) else None

    def _settle(self, work: Work) -> None:
        """After the last step: blends what is still, and takes note of the result."""
        shown, memory = work.shown, work.memory
        last, share = self._last_result(work), work.params.blend_still
        if work.params.motion_aware:
            share *= memory.strength
        if last is not None and share > 0:
            still = share * np.min([still_tokens(*pair) for pair in self._pairs(shown, last)], axis=0)
            kept = torch.from_numpy(still.reshape(1, -1, 1))
            kept = kept.pin_memory().to(self._device, non_blocking=True) if shown.latents.is_cuda else kept
            before = torch.where(last.latents.isfinite(), last.latents, shown.latents)
            shown.latents = torch.lerp(shown.latents.float(), before.float(), kept).to(shown.latents.dtype)
        if work.cache is not None:
            work.computed = float(work.cache.computed.mean())
            memory.seen = _updated(memory.seen, shown.pictures, work.cache.computed)
        work.finite = torch.isfinite(shown.latents).all()  # read with the picture: reading it here would stall the GPU
        work.ready, memory.result = self.event(), shown
        work.prompt, work.negative, work.references = (), (None, None), None

    @staticmethod
    def _pairs(shown: Shown, last: Shown) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pictures now and before, each at the size that the model computes."""
        size = on_grid(*shown.size)
        both = ([fit(picture, *size, shown.params.fit) for picture in s.pictures] for s in (shown, last))
        return list(zip(*both, strict=True))

    # Third stage

    def finish(self, work: Work) -> None:
        """Decodes, and asks for the picture on the host."""
        with self._on(self._side):
            if work.ready is not None:
                torch.cuda.current_stream(self._device).wait_event(work.ready)
                self._hand_over(work.shown.latents, work.finite)
            with work.watch.stage("decode"):
                picture = self._pipe.decode(work.shown.latents, *work.size)[0]
                work.download = _Download(picture, work.finite)

    def collect(self, work: Work) -> np.ndarray:
        """Waits for the picture, uint8 (H, W, 3). Raises EngineError if it is not finite."""
        if work.repeats is not None:
            if work.repeats.image is None:
                raise EngineError("The frame that this one repeats has failed.", "failed")
            return work.repeats.image
        image, finite = work.download.wait()
        params, (width, height) = work.params, work.size
        if not finite:
            raise EngineError(
                f"The model gave no finite picture at {width}x{height}, {params.steps} steps, "
                f"cfg_scale {params.cfg_scale:g}. Change the prompt, the seed, the steps or the dtype.",
                "not_finite",
            )
        work.shown.image, work.shown.check = image, None
        return image

    # Streams

    def _on(self, stream):
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def _hand_over(self, *tensors: torch.Tensor | None) -> None:
        """Tells torch that the current stream reads what another one made: its memory must wait for that."""
        for tensor in tensors:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def event(self):
        """An event on the current stream; None on the CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event


class _Download:
    """A picture on its way to the host, through pinned memory: the copy is asked for, not waited for."""

    def __init__(self, picture: torch.Tensor, finite: torch.Tensor):
        self._event = None
        self._parts = [picture, finite]
        if picture.is_cuda:
            self._parts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in self._parts]
            for host, tensor in zip(self._parts, (picture, finite), strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[np.ndarray, bool]:
        if self._event is not None:
            self._event.synchronize()
        return self._parts[0].numpy(), bool(self._parts[1])


def _alike(measure: str, now: list[np.ndarray], before: list[np.ndarray]) -> float:
    """The least of the pictures' similarities; 0 where there is nothing to compare."""
    if not now or len(now) != len(before):
        return 0.0
    return min(similarity(measure, *pair) for pair in zip(now, before, strict=True))


def _updated(seen: list[np.ndarray], now: list[np.ndarray], computed: np.ndarray) -> list[np.ndarray]:
    """The pictures as each token last saw them, after a frame that computed these tokens."""
    if computed.all() or len(seen) != len(now):
        return [picture.copy() for picture in now]
    rows, columns = computed.shape
    for old, new in zip(seen, now, strict=True):
        by_token = [p.reshape(rows, TOKEN, columns, TOKEN, 3).swapaxes(1, 2) for p in (old, new)]
        by_token[0][computed] = by_token[1][computed]
    return seen


# Latents and embeddings


def started_late(schedule: Schedule, sigma: float) -> Schedule:
    """The schedule with as many steps from `sigma` on, instead of from 1: every level times `sigma`."""
    times = tuple(t * sigma for t in schedule.times)
    levels = {"sigmas": schedule.sigmas * sigma, "timesteps": schedule.timesteps * sigma}
    return dataclasses.replace(schedule, **levels, times=times)


def start_from(noise: torch.Tensor, previous: torch.Tensor, sigma: float) -> torch.Tensor:
    """Latents at noise level `sigma` whose clean picture is `previous`: (1 - sigma) previous + sigma noise.

    Flow matching's own line from picture to noise: at `sigma` the model finds what it was trained to find there.
    All (1, N, C). Where `previous` is not finite, a frame that failed, it is noise.
    """
    return torch.where(previous.isfinite(), torch.lerp(previous.float(), noise.float(), sigma).to(noise.dtype), noise)


def words_rows(pipe, prompt: str) -> int:
    """How many rows of a prompt's embeddings are the person's words and what the template puts behind them."""
    behind = pipe.prompt_template_encode.split("{}")[1]
    return len(pipe.tokenizer(prompt + behind)["input_ids"])


def mixed_prompts(origin: torch.Tensor, aim: torch.Tensor, words: int, share: float, how: str) -> torch.Tensor:
    """Embeddings (1, L, D) `share` of the way from the old prompt's words (1, W, D) to the last `words` rows of `aim`.

    The rows in front of the words are the present pictures': the language model reads from left to right, so no prompt
    has reached them. Prompts of different length are laid on each other at the end, where the template closes and the
    last rows have read the whole sentence; a longer old one loses rows in front, a shorter one repeats its first. (On
    the pocket model filling with zeros, repeating and stretching differ little: a fade over 8 frames is 1.13, 1.14 and 1.19
    times as long as the straight way from picture to picture. This one keeps the length: nothing is recorded anew.)
    """
    origin = origin[:, -words:]
    origin = torch.cat([origin[:, :1].expand(-1, words - origin.shape[1], -1), origin], dim=1)
    return torch.cat([aim[:, :-words], _between(origin, aim[:, -words:], share, how)], dim=1)


def _between(a: torch.Tensor, b: torch.Tensor, share: float, how: str) -> torch.Tensor:
    """Row by row on the straight line, or on the arc between the rows' directions with the length on the line.

    The arc has the more even steps: the largest of 8 on the pocket model is 0.31 of the way, on the line 0.39.
    """
    mixed = torch.lerp(a.float(), b.float(), share)
    if how == "spherical":
        lengths = torch.lerp(a.float().norm(dim=-1, keepdim=True), b.float().norm(dim=-1, keepdim=True), share)
        directions = [torch.nn.functional.normalize(x.float(), dim=-1) for x in (a, b)]
        angle = (directions[0] * directions[1]).sum(-1, keepdim=True).clamp(-1.0, 1.0).acos()
        arc = (directions[0] * ((1 - share) * angle).sin() + directions[1] * (share * angle).sin()) / angle.sin()
        mixed = torch.where(angle.sin().abs() < 1e-4, mixed, arc * lengths)  # no arc between rows that point alike
    return mixed.to(b.dtype)
