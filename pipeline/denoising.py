"""From noise to a picture, step by step: one picture alone, or many that are at different steps, in one forward.

`start` makes a `Denoising`, which holds all that one picture needs and nothing of any other; `advance` takes every
picture of a list one step further; `denoise` does both until the picture is finished. They are the pipeline's methods
of these names (its step 4).

Pictures that are advanced together may differ in everything: size, references, prompt and its length, time, guidance.
This is StreamDiffusion's stream batch (arXiv 2312.12491, "Batching the denoise step"): a stream that keeps as many
pictures under way as there are steps gets a finished one from every forward. On the fast path a forward holds the rows
of all samples one behind the other, each attending to itself: nothing is padded or masked, and who rides along changes
a picture by rounding only. The stock transformer runs one sample after the other, for the same results. (A cache of
diffusers' own, `transformer.enable_cache`, keeps what it saw last, whosever it was: with it, one picture at a time.)

Guidance, if `cfg_scale` is above 1 (`sampling.true_cfg`, with its rescaled length, in every mode):

    mode              what the negative is                            predictions  forwards of k steps
    none              there is none                                   k            k
    full              predicted, in a forward of its own              2 k          2 k
    batched           predicted, in the forward of the positive       2 k          k
    self_negative     the first reference itself                      k            k
    onetime_negative  predicted at the first step, in that forward    k + 1        k

The last two are approximate; `sampling.virtual_velocity` derives them. Their first reference and their first step say
once what the negative's clean picture is, and every step is guided away from that. Forwards are those of the fast path;
the stock transformer runs one for each prediction.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fast_path.transformer import Sample
from pipeline import vision_language
from pipeline.images import EditError
from pipeline.sampling import (
    CFG_MODES,
    MAX_CFG_DELTA,
    Schedule,
    euler_step,
    predicted_clean,
    true_cfg,
    virtual_velocity,
)


@dataclass(frozen=True)
class References:
    """Encoded references of one edit: packed latents (B, N, 4z), one shape (frames, rows, columns) of tokens each."""

    latents: torch.Tensor
    shapes: tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class Denoising:
    """One picture (or a batch of B that go in step) on its way. `start` makes it, `advance` moves it.

    `latents` (B, N, 4z) and `prompt_embeds` (B or 1, L, D) with their `mask` may be replaced between two steps; a
    prompt's dtype is that of the latents.
    """

    latents: torch.Tensor
    references: References
    prompt_embeds: torch.Tensor
    mask: torch.Tensor | None
    schedule: Schedule
    shapes: tuple[tuple[int, int, int], ...]  # the output's (frames, rows, columns) of tokens, then each reference's
    negative_prompt_embeds: torch.Tensor | None = None
    negative_mask: torch.Tensor | None = None
    cfg_scale: float = 1.0
    cfg_mode: str = "none"  # "none" also where the scale or a missing negative prompt leaves nothing to guide
    cfg_delta: float = 1.0
    negative_clean: torch.Tensor | None = None  # the clean latents that a residual mode guides away from
    token_cache: Any = None
    transformer_kwargs: dict[str, Any] = field(default_factory=dict)
    scheduler: Any = None  # one that steps by a rule of its own, for this picture alone
    step: int = 0  # steps done

    @property
    def steps(self) -> int:
        return len(self.schedule.times)

    @property
    def finished(self) -> bool:
        return self.step == self.steps


class _Wanted(NamedTuple):
    """A prediction for a picture as it stands: under its prompt ("cond") or its negative one ("uncond")."""

    picture: Denoising
    context: str

    @property
    def prompt(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A row for each of the latents': (B, L, D), mask (B, L) or None."""
        p = self.picture
        embeds, mask = (
            (p.prompt_embeds, p.mask) if self.context == "cond" else (p.negative_prompt_embeds, p.negative_mask)
        )
        assert embeds is not None
        batch = len(p.latents)
        return embeds.expand(batch, -1, -1), None if mask is None else mask.expand(batch, -1)

    @property
    def conditions(self) -> torch.Tensor:
        return self.picture.references.latents.expand(len(self.picture.latents), -1, -1)


def start(
    pipe,
    latents: torch.Tensor,
    references: References,
    prompt_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    schedule: Schedule,
    **options,
) -> Denoising:
    """A picture before its first step; nothing runs yet. `latents` (B, N, 4z) are noise at the schedule's first sigma.

    `options`: `negative_prompt_embeds`, `negative_mask`, `cfg_scale` (1: no guidance), `cfg_mode` ("full"), `cfg_delta`
    (1), `token_cache`, `transformer_kwargs`. Guidance needs `cfg_scale` > 1 and a negative prompt; self_negative reads
    none and needs none. `cfg_delta` is the magnitude of the virtual negative in the two residual modes. `token_cache` as
    `pipe.token_cache()` makes it.
    Raises EditError for an unknown mode, a delta outside 0 to 2, a token cache with guidance or a batch, and for
    self_negative if the first reference's grid is not the output's: its latents would lie at other places.
    """
    pipe.fast_path.look(pipe, "transformer")
    return _started(pipe, latents, references, prompt_embeds, mask, schedule, **options)


def _started(
    pipe,
    latents: torch.Tensor,
    references: References,
    prompt_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    schedule: Schedule,
    *,
    negative_prompt_embeds: torch.Tensor | None = None,
    negative_mask: torch.Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_mode: str = "full",
    cfg_delta: float = 1.0,
    token_cache=None,
    transformer_kwargs: dict[str, Any] | None = None,
) -> Denoising:
    if cfg_mode not in CFG_MODES:
        raise EditError(f"The cfg_mode is {cfg_mode!r}. Allowed: {', '.join(CFG_MODES)}.")
    if not (math.isfinite(cfg_delta) and 0.0 <= cfg_delta <= MAX_CFG_DELTA):
        raise EditError(f"The cfg_delta is {cfg_delta!r}. Allowed: 0 to {MAX_CFG_DELTA:g}.")
    if cfg_scale <= 1 or (negative_prompt_embeds is None and cfg_mode != "self_negative"):
        cfg_mode = "none"
    if cfg_mode in ("self_negative", "onetime_negative"):
        if schedule.settings is not None:
            raise EditError(f'cfg_mode "{cfg_mode}" does not know how a {type(pipe.scheduler).__name__} steps. Allowed: full, batched.')
        if pipe.scheduler.config.invert_sigmas:
            raise EditError(f'cfg_mode "{cfg_mode}" needs sigmas that fall to 0; this scheduler inverts them.')
    if cfg_mode != "none" and token_cache is not None:
        raise EditError(f'Tokens cannot be reused with guidance (cfg_mode "{cfg_mode}"). Turn one of them off.')
    if token_cache is not None and len(latents) > 1:
        raise EditError(f"Tokens are reused for one picture at a time; {len(latents)} were given.")
    shapes = ((1, schedule.height // pipe._unit, schedule.width // pipe._unit), *references.shapes)
    most = text_positions(pipe.transformer, shapes)
    for embeds in (prompt_embeds, negative_prompt_embeds):
        vision_language.check_length(0 if embeds is None else embeds.shape[1], 0, most)
    scheduler = None
    if schedule.settings is not None:
        scheduler = copy.deepcopy(pipe.scheduler)
        schedule.prepare(scheduler)
    return Denoising(
        latents,
        references,
        prompt_embeds.to(latents.dtype),
        mask,
        schedule,
        shapes,
        None if negative_prompt_embeds is None else negative_prompt_embeds.to(latents.dtype),
        negative_mask,
        cfg_scale,
        cfg_mode,
        cfg_delta,
        _first_reference(references, shapes) if cfg_mode == "self_negative" else None,
        token_cache,
        transformer_kwargs or {},
        scheduler,
    )


def text_positions(transformer, shapes) -> int:
    """How many tokens of text there are positions for, behind pictures of `shapes` (frames, rows, columns) in tokens."""
    table = transformer.pos_embed
    sides = [side for _, rows, columns in shapes for side in (rows, columns)]
    return len(table.pos_freqs) - max(side // 2 if table.scale_rope else side for side in sides)


@torch.no_grad()
def advance(pipe, pictures: list[Denoising]) -> None:
    """One step of every picture, in one forward of the fast path; a second one for the negatives of mode "full".

    Nothing waits for the GPU, but for the lengths of padded prompts. If it raises, no picture has moved: each can be
    tried again alone. Raises ValueError for a picture that is finished or given twice.
    """
    if any(p.finished for p in pictures) or len({id(p) for p in pictures}) < len(pictures):
        raise ValueError("a picture is finished or given twice: none of them was advanced")
    together = [_Wanted(p, "cond") for p in pictures]
    together += [_Wanted(p, "uncond") for p in pictures if _rides_along(p)]
    apart = [_Wanted(p, "uncond") for p in pictures if p.cfg_mode == "full"]
    predicted = {
        (id(wanted.picture), wanted.context): velocity
        for forward in (together, apart)
        for wanted, velocity in zip(forward, _predict(pipe, forward), strict=True)
    }
    stochastic = pipe.scheduler.config.get("stochastic_sampling", False)
    moved = [_step(p, predicted[id(p), "cond"], predicted.get((id(p), "uncond")), stochastic) for p in pictures]
    for p, (latents, clean) in zip(pictures, moved, strict=True):
        p.latents, p.negative_clean, p.step = latents, clean, p.step + 1


@torch.no_grad()
def denoise(
    pipe,
    latents: torch.Tensor,
    references: References,
    prompt_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    schedule: Schedule,
    *,
    on_step: Callable[[int, int], None] | None = None,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    **options,
) -> torch.Tensor:
    """Noise (B, N, 4z) to clean packed latents of the same shape and dtype. Nothing in the loop waits for the GPU.

    `options` are those of `start`. `on_step(i, steps)` is called before step i (from 0); what it raises stops the
    loop. `on_step_end(i, latents, prompt_embeds)` may replace both.
    """

    def take(picture: Denoising) -> None:
        if on_step is not None:
            on_step(picture.step, picture.steps)
        pipe._current_timestep = schedule.timesteps[picture.step]
        pipe.advance([picture])

    def first(state: tuple) -> Denoising:
        picture = _started(pipe, latents, references, prompt_embeds, mask, schedule, **options)
        if picture.scheduler is not None:  # nothing else is under way: the pipeline's own object steps, as in stock
            schedule.prepare(pipe.scheduler)
            picture.scheduler = pipe.scheduler
        take(picture)
        return picture

    picture = None
    while not (pipe._interrupt or (picture is not None and picture.finished)):  # stock's way to stop: set by a callback
        if picture is None:
            picture = pipe.fast_path.settled(pipe, "transformer", first)
        else:
            take(picture)
        if on_step_end is not None:
            i = picture.step - 1
            picture.latents, picture.prompt_embeds = on_step_end(i, picture.latents, picture.prompt_embeds)
            pipe.fast_path.look(pipe, "transformer")  # a callback may do anything to it
    pipe._current_timestep, pipe._interrupt = None, False
    return latents if picture is None else picture.latents


def _step(p: Denoising, velocity: torch.Tensor, negative: torch.Tensor | None, stochastic: bool):
    """The latents after this step, from what was predicted, and the clean ones that later steps are guided away from."""
    if p.scheduler is not None:
        if negative is not None:
            velocity = true_cfg(velocity, negative, p.cfg_scale).to(velocity.dtype)
        latents = p.scheduler.step(velocity, p.schedule.timesteps[p.step], p.latents, return_dict=False)[0]
        return latents.to(p.latents.dtype), None
    sigma, next_sigma = p.schedule.sigmas[p.step], p.schedule.sigmas[p.step + 1]
    clean = p.negative_clean
    if p.cfg_mode == "onetime_negative" and negative is not None:
        clean = predicted_clean(p.latents, negative, sigma)
    elif clean is not None:
        negative = virtual_velocity(p.latents, clean, sigma)
    if negative is not None:
        negative = negative if clean is None else p.cfg_delta * negative
        velocity = true_cfg(velocity, negative, p.cfg_scale).to(velocity.dtype)
    return euler_step(p.latents, velocity, sigma, next_sigma, stochastic), clean


def _rides_along(picture: Denoising) -> bool:
    """Whether the negative is predicted in this step, in the forward of the positive."""
    return picture.cfg_mode == "batched" or (picture.cfg_mode == "onetime_negative" and picture.step == 0)


def _first_reference(references: References, shapes: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    """The first reference's latents (B, N, 4z), float32, which lie where the output's do. EditError if they do not."""
    (_, rows, columns), (_, own_rows, own_columns) = shapes[:2]
    if (own_rows, own_columns) != (rows, columns):
        raise EditError(
            f'cfg_mode "self_negative" guides away from the first reference, which must have the output\'s size: it '
            f"has {own_rows}x{own_columns} tokens, the output {rows}x{columns}. Allowed: a reference area and aspect "
            'like the output\'s, or cfg_mode "onetime_negative".'
        )
    return references.latents[:, : rows * columns].float()


def _predict(pipe, wanted: list[_Wanted]) -> list[torch.Tensor]:
    """The velocities (B, N, 4z), in order. On the fast path one forward, and one more for each token cache."""
    fused = pipe.fused_transformer
    if fused is None or any(any(w.picture.transformer_kwargs.values()) for w in wanted):
        return [_stock_velocity(pipe.transformer, w) for w in wanted]
    samples = [_samples(w) for w in wanted]
    caches = [w.picture.token_cache for w in wanted]
    for cache in filter(None, caches):
        cache.serve(fused)
    shared = [sample for rows, cache in zip(samples, caches, strict=True) if cache is None for sample in rows]
    predicted = iter(fused.velocities(shared) if shared else [])
    velocities = []
    for w, rows, cache in zip(wanted, samples, caches, strict=True):
        parts = [next(predicted) if cache is None else cache.velocity(sample, w.picture.step) for sample in rows]
        velocities.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return velocities


def _samples(wanted: _Wanted) -> list[Sample]:
    """One sample for all rows of a picture, or one for each if their prompts differ in length."""
    p, (embeds, mask), conditions = wanted.picture, wanted.prompt, wanted.conditions
    rows = [(slice(None), embeds)] if mask is None else vision_language.unpad(embeds, mask)
    times = p.schedule.times
    return [Sample(p.latents[b], conditions[b], e, p.shapes, times[p.step], times) for b, e in rows]


def _stock_velocity(transformer, wanted: _Wanted) -> torch.Tensor:
    p, (embeds, mask), (batch, tokens) = wanted.picture, wanted.prompt, wanted.picture.latents.shape[:2]
    with transformer.cache_context(wanted.context):
        return transformer(
            hidden_states=torch.cat([p.latents, wanted.conditions], dim=1),
            timestep=p.schedule.timesteps[p.step].expand(batch).to(p.latents.dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[list(p.shapes)] * batch,
            return_dict=False,
            **p.transformer_kwargs,
        )[0][:, :tokens]
