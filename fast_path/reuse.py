"""Token reuse: keys, values and velocities of the last frame serve again where the picture did not change.

A transformer step costs what its rows cost: at 512x512, 1024 rows of noise, as many of each reference, some 220 of text. From one
frame of a stream to the next most of the reference's tokens are what they were. Two approximations follow:
- within a frame, the references' keys and values of the first step serve the later steps. They depend on the time and on
  the noise tokens only through their attention to them;
- from frame to frame, a token that did not change keeps its keys, its values and its velocity at every step. Only changed
  tokens are rows, of the noise and of the references; they attend to everything, new or kept. With the same noise a kept
  velocity gives the same latents, so a still region stays still to the bit. Text keeps its keys and values as long as the
  very embeddings stay; new ones are rows again.

This is not exact: a cached token has not attended to what changed elsewhere. So the number of rows is rounded up, and the
padding goes to the neighbours of what changed, over which the VAE and the model look, then to all others, those first
that were computed longest ago: staleness is bounded, and few shapes are recorded. (With 30 % changed this computes 31 %
of the tokens at 512x512. What it costs in dB is in the README's table.)

A CUDA graph is recorded for each number of rows. When it first comes that stalls the stream by 150 to 250 ms on an H200.
So a number that has no recording is rounded up further to one that has, if it is near, and its neighbours are recorded
ahead: one step at a time and evenly, while the GPU is busy with a frame (`record_ahead`).
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fast_path.attention import EIGHT
from fast_path.graphs import Graphs
from fast_path.kernels import Destinations
from fast_path.layers import Block
from fast_path.transformer import FusedTransformer, Sample
from pipeline.images import EditError
from quantization.rows import Quantized

BUCKETS = 16  # row counts are rounded up to this fraction of all: to a number of units
SPARE_UNITS = 2  # this many more units are computed rather than recording what is wanted
AHEAD_EVERY = 4  # frames from one recording to the next that nothing waits for: all are there after some 2 seconds


def served_by(wanted: int, all_units: int, is_recorded: Callable[[int], bool]) -> int:
    """How many units a frame computes that needs `wanted`: the least that has a recording, up to SPARE_UNITS more.

    Never all for a few, which is another computation; and `wanted` itself if none of these has one.
    """
    near = range(wanted, min(wanted + SPARE_UNITS + 1, all_units))
    return next((units for units in near if is_recorded(units)), wanted)


def next_to_record(wanted: int, all_units: int, frames_since: int, is_recorded: Callable[[int], bool]) -> int | None:
    """What to record before a frame asks for it: near what the last one wanted, `frames_since` the last recording.

    None if there is nothing to do, or not yet: each recording may cost the stream a frame.
    """
    if frames_since < AHEAD_EVERY:
        return None
    near = (wanted + distance for distance in (0, 1, -1, 2, -2))
    return next((units for units in near if 0 < units < all_units and not is_recorded(units)), None)


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

    def serve(self, fused: FusedTransformer) -> None:
        """For another build of the transformer's fast path: what the one before computed is forgotten."""
        if fused is not self._fused:
            self.clear()
            self._fused = fused
            fused.token_caches.add(self)

    def clear(self) -> None:
        """Forgets all and frees its memory: the next frame computes everything."""
        self._graphs.clear()
        self._key = self._times = self._embeds = self._changed = self._kept = self._velocities = None
        self._whole = False  # whether every cached token is of a frame that was completed
        self._sample: Sample | None = None  # the last frame's at its first step, if it computed a part
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # for a recording of N units: N is the key
        self._wanted = self._since_recorded = self._recordings_seen = 0
        self.computed = np.zeros((0, 0), bool)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*(self._kept or ()), *(self._velocities or ())))

    @property
    def recordings(self) -> int:
        """How often a CUDA graph was recorded."""
        return self._graphs.recordings

    def begin(self, changed: np.ndarray | None, neighbours: np.ndarray | None = None) -> None:
        """Before each frame: bool (rows, columns) of the output's tokens, those that changed since they were last computed.

        None if that is not known, or if anything else has changed: the frame then computes all of them. `neighbours`, those
        next to changed ones, come first where the rows are padded, in this frame or later.
        """
        self._changed, self._neighbours = changed, neighbours

    @torch.no_grad()
    def velocity(self, sample: Sample, step: int) -> torch.Tensor:
        """(1, N, C) for step `step` of the sample's `times`; steps come in order. Raises EditError for a batch."""
        if sample.latents.shape[0] != 1:
            raise EditError(f"Token reuse with a batch of {sample.latents.shape[0]}. Allowed: 1.")
        if step == 0:
            self._open(sample)
        assert self._kept is not None and self._velocities is not None  # `_open` has made them
        modulation, out = self._fused.modulations.get(sample.time, sample.times)
        # Of the memory, not of this object: recordings hold the function, and a circle would keep gigabytes until some
        # garbage collection.
        function = partial(_step, self._fused, self._kept, self._velocities, step, self._with_text, sample.shapes)
        inputs = (modulation, out, *sample.tensors, self._tokens, self._reference_tokens)
        velocity = self._graphs.run((step, self._with_text), function, *inputs)
        self._whole = step == len(sample.times) - 1
        return velocity

    def _open(self, sample: Sample) -> None:
        """Decides which tokens this frame computes."""
        (_, rows, columns), *references = sample.shapes
        count, given = rows * columns, sample.prompt_embeds
        key = (sample.shapes, given.shape[1], len(sample.times), given.dtype, self._fused.eight_bit_attention)
        if key != self._key:
            self._allocate(key, sample)
        self._whole, self._times = self._whole and self._times == sample.times, sample.times
        same = self._embeds is not None and self._embeds.data_ptr() == given.data_ptr() and self._embeds.shape == given.shape
        changed = self._changed
        fits = changed is not None and changed.shape == (rows, columns) and all(r == sample.shapes[0] for r in references)
        if changed is None or not (fits and self._whole):
            chosen = np.ones(count, bool)
        else:
            chosen = changed.reshape(-1).copy()
            if self._neighbours is not None:
                self._pending |= self._neighbours.reshape(-1)
            least, unit = int(chosen.sum()), _unit(count)
            self._wanted = max(1, -(-least // unit))
            units = served_by(self._wanted, -(-count // unit), partial(self._is_recorded, sample, not same))
            wanted = min(count, units * unit)
            age = np.where(chosen, -1, self._age + self._pending * (int(self._age.max()) + 1))
            chosen[np.argsort(-age, kind="stable")[: wanted - least]] = True
        whole = bool(chosen.all())
        self._with_text = whole or not same
        self._sample = None if whole else sample
        if self.recordings != self._recordings_seen:
            self._recordings_seen, self._since_recorded = self.recordings, 0
        self._since_recorded += 1
        self._embeds = given  # held, so that its memory is not given to other embeddings
        self._age, self._pending = np.where(chosen, 0, self._age + 1), self._pending & ~chosen
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
        self._kept = [_new_buffer(self._fused, sample) for _ in sample.times]
        self._velocities = [torch.zeros_like(sample.latents) for _ in sample.times]
        count = sample.latents.shape[1]
        self._age = np.zeros(count, int)
        self._pending = np.zeros(count, bool)  # next to a change, and not computed since
        self._key = key

    # Recording

    def _blank(self, sample: Sample, units: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of some tokens for a recording of this many units, among the noise's tokens and among the references'."""
        if units not in self._places:
            count, device = sample.latents.shape[1], self._fused.device
            tokens = torch.arange(min(count, units * _unit(count)), device=device)
            both = [tokens + j * count for j in range(len(sample.shapes) - 1)]
            self._places[units] = tokens, torch.cat(both)
        return self._places[units]

    def _inputs(self, sample: Sample, step: int, units: int) -> tuple[torch.Tensor, ...]:
        modulation = self._fused.modulations.get(sample.times[step], sample.times)
        return (*modulation, *sample.tensors, *self._blank(sample, units))

    def _step_to_record(self, sample: Sample, with_text: bool, units: int) -> int | None:
        steps = range(len(sample.times))
        return next((i for i in steps if not self._graphs.knows((i, with_text), *self._inputs(sample, i, units))), None)

    def _is_recorded(self, sample: Sample, with_text: bool, units: int) -> bool:
        return self._step_to_record(sample, with_text, units) is None

    @torch.no_grad()
    def record_ahead(self) -> None:
        """Between two frames, on CUDA: now and then records one step for a number of rows that may be wanted soon.

        It costs the host some tens of milliseconds and the GPU nearly nothing. `next_to_record` decides; no recording
        is pushed out for it.
        """
        sample = self._sample
        if sample is None or self._graphs.full:
            return
        with_text, all_units = self._with_text, -(-self._age.size // _unit(self._age.size))
        is_recorded = partial(self._is_recorded, sample, with_text)
        units = next_to_record(self._wanted, all_units, self._since_recorded, is_recorded)
        if units is None:
            return
        step = self._step_to_record(sample, with_text, units)
        assert step is not None and self._kept is not None and self._velocities is not None
        inputs = self._inputs(sample, step, units)
        self._rehearse(step, with_text, sample, inputs)
        function = partial(_step, self._fused, self._kept, self._velocities, step, with_text, sample.shapes)
        self._graphs.record((step, with_text), function, *inputs)

    def _rehearse(self, step: int, with_text: bool, sample: Sample, inputs: tuple[torch.Tensor, ...]) -> None:
        """Runs the step once through the first and the last block, on memory of its own.

        That compiles, measures and looks up whatever these shapes need, in a thirtieth of the model's time.
        """
        short = copy.copy(self._fused)
        short.blocks = [self._fused.blocks[0], self._fused.blocks[-1]]
        kept, velocities = [_new_buffer(short, sample)] * (step + 1), [torch.zeros_like(sample.latents)] * (step + 1)
        _step(short, kept, velocities, step, with_text, sample.shapes, *inputs)


def _unit(count: int) -> int:
    """How many of `count` tokens make a unit."""
    return max(1, count // BUCKETS)


def _new_buffer(fused: FusedTransformer, sample: Sample) -> torch.Tensor:
    """For one step's keys and values: (L, 2, S, H, d)."""
    length = sum(t.shape[1] for t in sample.tensors)
    shape = (len(fused.blocks), 2, length, fused.heads, fused.width // fused.heads)
    return sample.latents.new_zeros(shape, dtype=EIGHT if fused.eight_bit_attention else None)


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
    and `references` are int64 indices among those of the noise and of all references.
    """
    text, noise = prompt_embeds.shape[1], latents.shape[1]
    reference_rows = text + noise + references
    parts = [torch.arange(text, device=tokens.device)] if with_text else []
    pictures = latents[0].index_select(0, tokens)
    parts.append(text + tokens)
    if step == 0:
        pictures = torch.cat([pictures, conditions[0].index_select(0, references)])
        parts.append(reference_rows)
    else:
        # Eight bytes at a time: these kernels take a thread for each number.
        first, now = (k.flatten(3).view(torch.int64) for k in (kept[0], kept[step]))
        now.index_copy_(2, reference_rows, first.index_select(2, reference_rows))
    row_types = [torch.full_like(part, kind) for part, kind in zip(parts, (0, 1, 2)[not with_text :], strict=False)]
    rows = _Rows(torch.cat(parts), torch.cat(row_types), text if with_text else 0, len(tokens))
    strategy = _Kept(fused, kept[step], rows, fused.rope(shapes, text))
    found = fused.run(strategy, prompt_embeds[0] if with_text else None, pictures, modulation, out.unsqueeze(0))
    velocities[step].index_copy_(1, tokens, found.unsqueeze(0))
    return velocities[step].clone()


class _Rows(NamedTuple):
    """The rows of a forward: places among all tokens, row_types (see `kernels`), and how many are text and noise, in this order."""

    places: torch.Tensor
    row_types: torch.Tensor
    text: int
    noise: int


class _Kept:
    """Attention of some rows to all tokens: keys and values of the rows are put among the kept ones and read with them."""

    def __init__(self, fused: FusedTransformer, kept: torch.Tensor, rows: _Rows, rope: tuple[torch.Tensor, torch.Tensor]):
        self._fused, self._kept, self._rope = fused, kept, rope
        self.text, self.row_types = rows.text, rows.row_types.int()
        self.noise = slice(rows.text, rows.text + rows.noise)
        self._places = rows.places.int()

    def attend(self, i: int, block: Block, h: torch.Tensor | Quantized, only_noise: bool = False) -> torch.Tensor | Quantized:
        """(R, D), or for the noise alone (N, D)."""
        fused, (k, v) = self._fused, self._kept[i]
        qkv = fused.qkv(block, h, self.text)
        q = qkv[:, 0] if k.dtype == qkv.dtype else torch.empty_like(qkv[:, 0], dtype=k.dtype)
        fused.norm_rope(block, qkv, self.row_types, self._places, self._rope, Destinations(q, k, v, self._places), move_q=False)
        q = q[self.noise if only_noise else slice(None)]
        return fused.attend(block, q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), alone=True)
