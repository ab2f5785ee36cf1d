"""What one frame of a session computes, in three stages.

    begin     pictures at the output's size, skipped or not, embeddings, references, which tokens have changed
    denoise   noise to latents; in a stream batch `advance`, one step of every frame on its way
    finish    latents to a picture, and on to the host; `collect` waits for it there

A stage only queues work; on a GPU nothing waits before `collect`. With `overlap` the first and the last stage run on a
CUDA stream of their own, so that the engine can queue the next frame's first stage and the last frame's third stage
while this frame's second stage runs. A stage that reads what another stream made waits for its event, on the GPU.

What the techniques decide is in `policies`; here it is done. What stays from frame to frame is in `memory`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from engine.contract import DenoisingPicture, Pipeline, StreamBatchPipeline
from engine.embeddings import Embeddings
from engine.errors import EngineError
from engine.fitting import framed, sized
from engine.memory import NO_EMBEDDING, RenderedFrame, SessionMemory, Work
from engine.policies import least_similarity, motion, motion_strength, skips, still_tokens, thumbnail
from engine.settings import EditParams
from engine.streams import Download, Streams
from engine.token_caches import TokenCaches
from pipeline.content_cache import ContentCache
from pipeline.geometry import on_grid, padded
from pipeline.images import blend, fit
from pipeline.picture_files import is_line
from pipeline.sampling import Schedule

START_LEVELS = 4  # strengths of a start with motion_aware: each is a schedule that the fast path keeps tables for


def prepare_pictures(images: list[np.ndarray], params: EditParams, width: int, height: int) -> list[np.ndarray]:
    """The references as the model gets them: as `fitting.sized` makes them, then blended."""
    images = sized(images, params, width, height)
    if params.mode != "blend":
        return images
    first, second = images
    return [blend(first, second, params.blend_ratio)]


def readable(picture: np.ndarray) -> np.ndarray:
    """The picture, uint8 (H, W, 3); a line of pixels with the padding of its tokens, without which the models read none."""
    return padded(picture) if is_line(*picture.shape[1::-1]) else picture


class FrameEditor:
    """The stages, on one pipeline. `clock` is monotonic seconds, `draw` a number in [0, 1)."""

    def __init__(
        self,
        pipeline: Pipeline,
        device: torch.device,
        draw: Callable[[], float],
        clock: Callable[[], float],
        reuse_sessions: int,
    ):
        self._pipe, self._device, self._draw = pipeline, device, draw
        self._batching = cast(StreamBatchPipeline, pipeline)  # asked only for frames in a stream batch
        self.streams = Streams(device)
        self.embeddings = Embeddings(pipeline, self.streams)
        self.token_caches = TokenCaches(pipeline, reuse_sessions, clock)
        self._schedules = ContentCache(64)

    # First stage

    def begin(self, work: Work) -> None:
        """Everything before the denoise; or sets `work.repeats` for a frame that is like the one before."""
        pipe, params, memory, (width, height) = self._pipe, work.params, work.memory, work.size
        with self.streams.on(self.streams.sides):
            with work.watch.stage("prepare"):
                pictures = [readable(picture) for picture in prepare_pictures(work.images, params, width, height)]
                looks = params.skip_similar != "off" or params.embeds == "changed" or params.motion_aware
                thumbnails = [thumbnail(picture) for picture in pictures] if looks else []
                on_tokens = [padded(picture) for picture in pictures]
                work.rendered = RenderedFrame(
                    params, work.size, on_tokens, thumbnails, work.submitted_monotonic, work.check
                )
                if self._is_repeated(work):
                    memory.skipped += 1
                    work.repeats = memory.newest
                    return
                opened = pipe.open_references(pictures)
                if params.motion_aware:
                    self._follow_motion(memory, thumbnails)
            work.check()
            with work.watch.stage("encode_prompt"):
                self.embeddings.embed(work, opened)
            work.check()
            with work.watch.stage("encode_references"):
                area = "output"
                if params.reference_area == "stock":
                    area, opened = None, pipe.open_references([framed(pictures[0], width, height), *opened[1:]])
                columns, rows = on_grid(width, height) if is_line(width, height) else (width, height)
                work.references = pipe.encode_references(opened, area=area, width=columns, height=rows)
            work.check()
            with work.watch.stage("prepare"):
                self.token_caches.plan(work)
            work.ready = self.streams.event()
            if memory.pending is not None and memory.pending.after is None:
                memory.pending.after = work.ready
        memory.newest, memory.skipped = work.rendered, 0

    def _is_repeated(self, work: Work) -> bool:
        """Whether the frame is skipped: only its pictures differ from the last frame's, and only by a little."""
        memory, params, last = work.memory, work.params, work.memory.newest
        if params.skip_similar == "off" or memory.fade is not None or last is None:
            return False
        if (last.params, last.size) != (params, work.size) or last.cancelled:
            return False
        alike = least_similarity(params.skip_similar, work.rendered.thumbnails, last.thumbnails)
        return skips(alike, params.skip_threshold, memory.skipped, params.max_skipped, self._draw())

    def _follow_motion(self, memory: SessionMemory, thumbnails: list[np.ndarray]) -> None:
        before = memory.newest.thumbnails if memory.newest is not None else []
        if len(before) == len(thumbnails):
            memory.motions.append(max(motion(*pair) for pair in zip(thumbnails, before, strict=True)))
        memory.strength = motion_strength(memory.motions, memory.strength)

    # Second stage

    def denoise(self, work: Work) -> None:
        """All steps of one frame."""
        inputs, options = self._inputs(work)
        with work.watch.stage("denoise"):
            if work.cache is not None:
                self.token_caches.begin(work)
            work.rendered.latents = self._pipe.denoise(*inputs, **options, on_step=work.check)
            self._settle(work)

    def enter(self, work: Work) -> None:
        """Puts a frame into the stream batch, before its first step."""
        inputs, options = self._inputs(work)
        work.picture = self._batching.start(*inputs, **options)

    def advance(self, works: list[Work]) -> None:
        """One step of every frame, in one forward. Those that are finished then have latents, and no `picture`."""
        pictures = [_picture(work) for work in works]
        for work, picture in zip(works, pictures, strict=True):
            work.check(picture.step, picture.steps)
        with contextlib.ExitStack() as stack:
            for work in works:
                stack.enter_context(work.watch.stage("denoise"))
            self._batching.advance(pictures)
            for work, picture in zip(works, pictures, strict=True):
                if picture.finished:
                    work.rendered.latents, work.picture = picture.latents, None
                    self._settle(work)

    def _inputs(self, work: Work) -> tuple[tuple, dict]:
        """What the pipeline's `denoise` and `start` are given, on the stream that denoises."""
        params, (width, height) = work.params, work.size
        if work.ready is not None:
            self.streams.wait_for(work.ready)
            self.streams.hand_over(work.references.latents, *work.prompt, *work.negative)
        noise = self._pipe.initial_noise(width, height, params.seed)  # fixed: a still scene stays still
        schedule = self._pipe.schedule(params.steps, width, height)  # the pipeline caches both
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
        """Prepares at once all schedules that motion may choose: one by one, each would stall the stream for 2 s."""
        levels = range(1, START_LEVELS + 1) if params.motion_aware else ()
        shares = (share, *(params.start_from_previous * i / START_LEVELS for i in levels))
        late = [started_late(schedule, 1.0 - each) for each in shares]
        self._pipe.expect([time for each in late for time in each.times])
        return late[0]

    def _last_result(self, work: Work) -> RenderedFrame | None:
        """The last result if it shows the same edit: this frame may start from it, and keep parts of it."""
        last, params = work.memory.result, work.params
        if last is None or last.size != work.size or len(last.pictures) != len(work.rendered.pictures):
            return None
        names = ("negative_prompt", "seed", "mode", "cfg_scale", "reference_area", "fit")
        names += () if work.memory.fade is not None else ("prompt",)
        return last if all(getattr(last.params, n) == getattr(params, n) for n in names) else None

    def _settle(self, work: Work) -> None:
        """After the last step: blends in the last result where the picture is still, and remembers the new one."""
        rendered, memory = work.rendered, work.memory
        last, share = self._last_result(work), work.params.blend_still
        if work.params.motion_aware:
            share *= memory.strength
        if last is not None and share > 0:
            still = share * np.min([still_tokens(*pair) for pair in self._pairs(rendered, last)], axis=0)
            kept = torch.from_numpy(still.reshape(1, -1, 1))
            kept = kept.pin_memory().to(self._device, non_blocking=True) if rendered.latents.is_cuda else kept
            before = torch.where(last.latents.isfinite(), last.latents, rendered.latents)
            rendered.latents = torch.lerp(rendered.latents.float(), before.float(), kept).to(rendered.latents.dtype)
        if work.cache is not None:
            self.token_caches.note_computed(work)
        work.finite = torch.isfinite(
            rendered.latents
        ).all()  # read with the picture: reading it here would stall the GPU
        work.ready, memory.result = self.streams.event(), rendered
        work.prompt, work.negative, work.references = NO_EMBEDDING, NO_EMBEDDING, None

    @staticmethod
    def _pairs(now: RenderedFrame, before: RenderedFrame) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pictures now and before, each at the size that the model computes."""
        size = on_grid(*now.size)
        both = ([fit(picture, *size, now.params.fit) for picture in frame.pictures] for frame in (now, before))
        return list(zip(*both, strict=True))

    # Third stage

    def finish(self, work: Work) -> None:
        """Decodes, and asks for the picture on the host."""
        with self.streams.on(self.streams.sides):
            if work.ready is not None:
                self.streams.wait_for(work.ready)
                self.streams.hand_over(work.rendered.latents, work.finite)
            with work.watch.stage("decode"):
                assert work.finite is not None
                picture = self._pipe.decode(work.rendered.latents, *work.size)[0]
                work.download = Download(picture, work.finite)

    def collect(self, work: Work) -> np.ndarray:
        """Waits for the picture, uint8 (H, W, 3). Raises EngineError if it is not finite."""
        if work.repeats is not None:
            if work.repeats.image is None:
                raise EngineError("The frame that this one repeats has failed.", "failed")
            return work.repeats.image
        assert work.download is not None
        image, finite = work.download.wait()
        params, (width, height) = work.params, work.size
        if not finite:
            raise EngineError(
                f"The model gave no finite picture at {width}x{height}, {params.steps} steps, "
                f"cfg_scale {params.cfg_scale:g}. Change the prompt, the seed, the steps or the dtype.",
                "not_finite",
            )
        work.rendered.image, work.rendered.check = image, None
        return image


def _picture(work: Work) -> DenoisingPicture:
    assert work.picture is not None
    return work.picture


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
