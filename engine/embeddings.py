"""The embeddings of a session's prompts: when the vision-language model looks again, in the background or not, and fades."""

import logging
from typing import cast

import numpy as np
import torch

from engine.contract import FadingPipeline, Pipeline
from engine.memory import NO_EMBEDDING, Embedding, Embeds, Fade, PendingEmbeds, SessionMemory, Work
from engine.policies import least_similarity, looks_again
from engine.settings import EditParams
from engine.streams import Streams

logger = logging.getLogger(__name__)


class Embeddings:
    """Gives each frame its embeddings, on one pipeline."""

    def __init__(self, pipeline: Pipeline, streams: Streams):
        self._pipe, self._streams = pipeline, streams
        self._fading = cast(FadingPipeline, pipeline)  # asked only for a fade
        self._renewed: torch.cuda.Event | None = None  # after the last renewal

    def embed(self, work: Work, pictures: list) -> None:
        """Sets `work.prompt` and `work.negative`. `pictures` are the references as the pipeline opened them."""
        memory, params = work.memory, work.params
        negates = params.guided and params.cfg_mode != "self_negative"
        words = (params.prompt, params.negative_prompt if negates else None, len(pictures))
        self._adopt(memory)
        last, thumbnails = memory.embeds, work.rendered.thumbnails
        if last is None or last.words != words:
            if last is not None and params.transition_frames and last.words[0] != words[0]:
                assert memory.used is not None
                memory.fade = Fade(memory.used[:, -words_rows(self._fading, last.words[0]) :], params.transition_frames)
            memory.pending, memory.embeds = None, self._look(words, pictures, thumbnails)
        elif self._looks_again(params, last, thumbnails):
            if not params.embeds_background:
                memory.embeds = self._look(words, pictures, thumbnails)
            elif memory.pending is None:
                memory.pending = PendingEmbeds(words, pictures, thumbnails)
        embeds = memory.embeds
        assert embeds is not None
        if embeds is last:
            embeds.frames += 1
        work.prompt, work.negative = embeds.prompt, embeds.negative
        if memory.fade is not None:
            work.prompt = work.prompt._replace(embeds=self._faded(memory, memory.fade, embeds.prompt, params))
        memory.used = work.prompt.embeds

    @staticmethod
    def _looks_again(params: EditParams, last: Embeds, thumbnails: list[np.ndarray]) -> bool:
        alike = least_similarity("patch", thumbnails, last.thumbnails)
        return looks_again(params.embeds, last.frames, params.embeds_every, alike, params.embeds_threshold)

    def _look(self, words: tuple, pictures: list, thumbnails: list[np.ndarray]) -> Embeds:
        # The GPU may still be computing what a renewal left in the pipeline's caches.
        self._streams.wait_for(self._renewed)
        prompt = Embedding(*self._pipe.encode_prompt(words[0], pictures))
        negative = NO_EMBEDDING
        if words[1] is not None:
            negative = Embedding(*self._pipe.encode_prompt(words[1] or " ", pictures))
        return Embeds(prompt, negative, words, thumbnails)

    def renew(self, memory: SessionMemory) -> None:
        """Makes the embeddings that a frame wants in the background; never raises: after a failure the last ones stay.

        On CUDA it queues the work on a stream of its own: call it when the frame's denoise has been queued. On the CPU
        there is one order of work: call it between two frames, so that it makes no frame longer.
        """
        pending = memory.pending
        if pending is None or pending.embeds is not None:
            return
        renewals = self._streams.renewals
        try:
            with self._streams.on(renewals):
                if renewals is not None:
                    assert pending.after is not None
                    renewals.wait_event(pending.after)
                    for picture in pending.pictures:
                        picture.on(self._streams.device).record_stream(renewals)
                pending.embeds = self._look(pending.words, pending.pictures, pending.thumbnails)
                pending.ready = self._renewed = self._streams.event()
        except Exception:
            logger.exception("embeddings could not be renewed; the last ones stay in use")
            memory.pending = None

    def _adopt(self, memory: SessionMemory) -> None:
        """Takes renewed embeddings that may be read. Those of other words are dropped."""
        pending = memory.pending
        if pending is None or pending.embeds is None or (pending.ready is not None and not pending.ready.query()):
            return
        memory.pending = None
        if memory.embeds is not None and memory.embeds.words == pending.words:
            memory.embeds = pending.embeds
            memory.embeds.frames = 0
            self._streams.hand_over(*memory.embeds.tensors)

    def _faded(self, memory: SessionMemory, fade: Fade, prompt: Embedding, params: EditParams) -> torch.Tensor:
        """The prompt's embeddings (1, L, D) of this frame of the fade."""
        aim = prompt.embeds
        assert aim is not None
        fade.done += 1
        if fade.done >= fade.frames or not params.transition_frames:
            memory.fade = None
            return aim
        words = words_rows(self._fading, params.prompt)
        return mixed_prompts(fade.origin, aim, words, fade.done / fade.frames, params.transition)


def words_rows(pipe: FadingPipeline, prompt: str) -> int:
    """How many rows of a prompt's embeddings are the person's words and the part of the template after them."""
    behind = pipe.prompt_template_encode.split("{}")[1]
    return len(pipe.tokenizer(prompt + behind)["input_ids"])


def mixed_prompts(origin: torch.Tensor, aim: torch.Tensor, words: int, share: float, how: str) -> torch.Tensor:
    """Embeddings (1, L, D) `share` of the way from the old prompt's words (1, W, D) to the last `words` rows of `aim`.

    The rows before the words belong to the pictures: the language model attends from left to right, so no prompt has
    changed them. Prompts of different length are aligned at the end, where the template closes and the last rows have
    attended to the whole sentence: a longer old prompt loses its first rows, a shorter one repeats its first row. (On
    the pocket model filling with zeros, repeating and stretching differ little: a fade over 8 frames is 1.13, 1.14 and 1.19
    times as long as the straight way from picture to picture. Repeating keeps the length, so no CUDA graph is recorded
    again.)
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
