"""Token reuse: keys, values and velocities of the last frame serve again where the picture did not change.

A transformer step costs what its rows cost: at 512x512, 1024 rows of noise, as many of each reference, some 220 of text. From one
frame of a stream to the next most of the reference's tokens are what they were. Two approximations follow:
- within a frame, the references' keys and values of the first step serve the later steps. They depend on the time and on
  the noise tokens only through what they heard of them;
- from frame to frame, a token that did not change keeps its keys, its values and its velocity at every step. Only changed
  tokens are rows, of the noise and of the references; they attend to everything, new or kept. With the same noise a kept
  velocity gives the same latents, so a still region stays still to the bit. Text keeps its keys and values as long as the
  very embeddings stay; new ones are rows again.

This is not exact: what is kept has not heard of what changed elsewhere. So the number of rows is rounded up, and the
spare places go to the tokens that were computed longest ago: nothing gets old for ever, and few shapes are recorded.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fast_path.graphs import Graphs
from fast_path.kernels import Places, qk_norm_rope
from fast_path.transformer import FusedTransformer, Sample
from images import EditError

BUCKETS = 16  # row counts are rounded up to this fraction of all


class TokenCache:
    """One stream's memory. `begin` says what changed, then the pipeline's `denoise` asks for each step's `velocity`.

    It holds 2 L S D numbers for each step (1.7 GB at 512x512 with one reference) and CUDA graphs of its own.
    `computed` is bool (rows, columns): the tokens that the last frame computed. Not for batches or for guidance.
    """

    def __init__(self, fused: FusedTransformer):
        self._fused = fused
        self._graphs = Graphs()
        self.clear()
        fused.token_caches.add(self)

    def clear(self) -> None:
        """Forgets all and frees its memory: the next frame computes everything."""
        self._graphs.clear()
        self._key = self._times = self._embeds = self._changed = self._kept = self._velocities = None
        self._whole = False  # whether all that is kept is of one frame or another, none of a frame that broke off
        self.computed = np.zeros((0, 0), bool)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*(self._kept or ()), *(self._velocities or ())))

    def begin(self, changed: np.ndarray | None) -> None:
        """Before each frame: bool (rows, columns) of the output's tokens, those that changed since they were last computed.

        None if that is not known, or if anything else has changed: the frame then computes all of them.
        """
        self._changed = changed

    @torch.no_grad()
    def velocity(self, sample: Sample, step: int) -> torch.Tensor:
        """(1, N, C) for step `step` of the sample's `times`; steps come in order. Raises EditError for a batch."""
        if sample.latents.shape[0] != 1:
            raise EditError(f"Token reuse with a batch of {sample.latents.shape[0]}. Allowed: 1.")
        if step == 0:
            self._open(sample)
        modulation, out = self._fused.modulations.get(sample.time, sample.times)
        # Of the memory, not of this object: recordings hold the function, and a circle would keep gigabytes until some
        # garbage collection.
        function = partial(_step, self._fused, self._kept, self._velocities, step, self._with_text, sample.shapes)
        inputs = (modulation, out, *sample[:3], self._tokens, self._reference_tokens)
        velocity = self._graphs.run((step, self._with_text), function, *inputs)
        self._whole = step == len(sample.times) - 1
        return velocity

    def _open(self, sample: Sample) -> None:
        """Decides which tokens this frame computes."""
        (_, rows, columns), *references = sample.shapes
        count, given = rows * columns, sample.prompt_embeds
        key = (sample.shapes, given.shape[1], len(sample.times), given.dtype)
        if key != self._key:
            self._allocate(key, sample)
        self._whole, self._times = self._whole and self._times == sample.times, sample.times
        changed = self._changed
        fits = changed is not None and changed.shape == (rows, columns) and all(r == sample.shapes[0] for r in references)
        if not (fits and self._whole):
            chosen = np.ones(count, bool)
        else:
            chosen = changed.reshape(-1).copy()
            unit = max(1, count // BUCKETS)
            wanted = min(count, -(-max(1, int(chosen.sum())) // unit) * unit)
            age = np.where(chosen, -1, self._age)
            chosen[np.argsort(-age, kind="stable")[: wanted - int(chosen.sum())]] = True
        whole = bool(chosen.all())
        same = self._embeds is not None and self._embeds.data_ptr() == given.data_ptr() and self._embeds.shape == given.shape
        self._with_text = whole or not same
        self._embeds = given  # held, so that its memory is not given to other embeddings
        self._age = np.where(chosen, 0, self._age + 1)
        self.computed = chosen.reshape(rows, columns)
        tokens = np.flatnonzero(chosen)
        conditions = np.arange(sample.conditions.shape[1])
        if not whole:
            conditions = np.concatenate([tokens + j * count for j in range(len(references))])
        device = self._fused.device
        both = torch.from_numpy(np.concatenate([tokens, conditions]))
        both = both.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else both
        self._tokens, self._reference_tokens = both.split([len(tokens), len(conditions)])
        self._changed, self._whole = None, False

    def _allocate(self, key: tuple, sample: Sample) -> None:
        self.clear()
        fused, steps = self._fused, len(sample.times)
        length = sum(t.shape[1] for t in sample[:3])
        shape = (len(fused.blocks), 2, length, fused.heads, fused.width // fused.heads)
        self._kept = [sample.latents.new_zeros(shape) for _ in range(steps)]
        self._velocities = [torch.zeros_like(sample.latents) for _ in range(steps)]
        self._age = np.zeros(sample.latents.shape[1], int)
        self._key = key


def _step(
    fused: FusedTransformer,
    kept: list[torch.Tensor],
    velocities: list[torch.Tensor],
    step: int,
    with_text: bool,
    shapes: tuple[tuple[int, int, int], ...],
    modulation: torch.Tensor,
    out: torch.Tensor,
    latents: torch.Tensor,
    conditions: torch.Tensor,
    prompt_embeds: torch.Tensor,
    tokens: torch.Tensor,
    references: torch.Tensor,
) -> torch.Tensor:
    """One forward over the rows that are computed: chosen tokens of the noise, at the first step of the references too.

    kept: of each step (L, 2, S, H, d), text first, then noise, then references; velocities (1, N, C) of each step; `tokens`
    and `references` are int64 places among those of the noise and of all references.
    """
    text, noise = prompt_embeds.shape[1], latents.shape[1]
    beside = text + noise + references
    parts = [torch.arange(text, device=tokens.device)] if with_text else []
    pictures = latents[0].index_select(0, tokens)
    parts.append(text + tokens)
    if step == 0:
        pictures = torch.cat([pictures, conditions[0].index_select(0, references)])
        parts.append(beside)
    else:
        kept[step].index_copy_(2, beside, kept[0].index_select(2, beside))
    kinds = [torch.full_like(part, kind) for part, kind in zip(parts, (0, 1, 2)[not with_text :], strict=False)]
    rows = _Rows(torch.cat(parts), torch.cat(kinds), text if with_text else 0, len(tokens))
    attention = _Kept(fused, kept[step], rows, fused.rope(shapes, text))
    found = fused.run(attention, prompt_embeds[0] if with_text else None, pictures, modulation, out.unsqueeze(0))
    velocities[step].index_copy_(1, tokens, found.unsqueeze(0))
    return velocities[step].clone()


class _Rows(NamedTuple):
    """The rows of a forward: places among all tokens, kinds (see `kernels`), and how many are text and noise, in this order."""

    places: torch.Tensor
    kinds: torch.Tensor
    text: int
    noise: int


class _Kept:
    """Attention of some rows to all tokens: keys and values of the rows are put among the kept ones and read with them."""

    def __init__(self, fused: FusedTransformer, kept: torch.Tensor, rows: _Rows, rope: tuple[torch.Tensor, torch.Tensor]):
        self._fused, self._kept, self._rope = fused, kept, rope
        self.text, self.kinds = rows.text, rows.kinds.int()
        self.noise = slice(rows.text, rows.text + rows.noise)
        self._places = rows.places.int()

    def hear(self, i: int, block, h, only_noise: bool = False) -> torch.Tensor:
        """(R, D), or for the noise alone (N, D)."""
        fused, (k, v) = self._fused, self._kept[i]
        qkv, to = fused.qkv(block, h, self.text), Places(None, k, v, self._places)
        qk_norm_rope(qkv, self.kinds, self._places, block.norms, *self._rope, fused.qk_eps, to)
        q = qkv[self.noise if only_noise else slice(None), 0]
        return fused.attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))[0]
