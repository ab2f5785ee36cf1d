"""The vision-language model as two functions of tensors that a CUDA graph can hold: `encode_image` and `encode_text`.

transformers' vision tower asks the GPU how long its windows are and attends to them one after the other, in every
block: 41 ms for one picture on an H200, for one teraflop of work. All of that follows from the picture's grid, so here
it is worked out once for each grid, on the host, and cached. Attention does not care in which order windows come: they
are sorted by size, and all of one size are one batch. Inside there are no questions and no masks.

Both towers are the same pre-norm block (RMS norm, attention with rotary positions, gated feed-forward), so one function
runs either, in few kernels: what is multiplied with the same input is one multiplication (q/k/v; gate and up), the
residual stream is added to in place, and a rotation is three kernels. The weights are the loaded modules' own. To be
one product, weights are packed into one buffer, of which each Parameter becomes a view (`quantization.side_by_side`): memory
does not grow, and the modules' own forward still runs on the same numbers.

There is no vocabulary head, no key/value cache and no batch: one picture and one prompt at a time. Layers may be 8-bit
ones (`quantization.layer`); those that share an input become one layer too.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from fast_path.graphs import Graphs
from fast_path.text_encoder_check import check, check_alike, check_towers
from fast_path.unsupported import UnsupportedError
from pipeline.content_cache import ContentCache
from quantization.layer import QuantizedLinear
from quantization.side_by_side import pack, round_up

Grid = tuple[int, int]  # (rows, columns) of patches

# Matrix multiplications are at their fastest if rows begin at multiples of 16 bytes, 8 numbers in half precision. The
# real vision tower's feed-forward is 3420 wide, which is none: its rows begin 3424 numbers apart.
_ALIGNMENT = 8
# A CUDA graph is recorded for each length in multiples of this: one for most prompts.
_LENGTHS = 32


class _Norm(NamedTuple):
    weight: torch.Tensor
    eps: float


class _Linear(NamedTuple):
    weight: torch.Tensor  # (outputs, inputs)
    bias: torch.Tensor | None


class _Block(NamedTuple):
    """One block of either tower."""

    norm1: _Norm
    qkv: _Linear | QuantizedLinear
    out: _Linear | QuantizedLinear
    norm2: _Norm
    gate_up: _Linear | QuantizedLinear
    down: _Linear | QuantizedLinear
    activation: Callable
    heads: int
    kv_heads: int
    scale: float


class _Layout(NamedTuple):
    """What follows from a grid of n patches. In window order, patches of a window and windows of one size are contiguous."""

    order: torch.Tensor  # (n,) where each patch of window order comes from
    back: torch.Tensor  # (n / merge^2,) where each merged token is in window order
    cos: torch.Tensor  # (n, 1, 2, head_dim / 2) float32, in window order
    sin: torch.Tensor  # the same, the first half negated
    windows: tuple[tuple[int, int], ...]  # (how many windows, patches in each)


class FusedTextEncoder:
    """A loaded Qwen2.5-VL's vision tower (`encode_image`) and language model (`encode_text`), one CUDA graph replay each.

    The results are the modules' own up to rounding (about 1e-6 in float32). Layers of `text_encoder` share their
    storage afterwards; build it again after moving the model, whose weights are elsewhere then. Raises UnsupportedError, and
    has changed nothing, if the model's form is not known here.
    """

    def __init__(self, text_encoder: Qwen2_5_VLForConditionalGeneration):
        check(text_encoder)
        try:
            visual: Any = text_encoder.model.visual
            language_model: Any = text_encoder.model.language_model
            check_towers(visual, language_model)
            self._merge, self._full = visual.spatial_merge_size, frozenset(visual.fullatt_block_indexes)
            self._window = visual.window_size // self._merge // visual.patch_size  # its side in merged tokens
            patches = visual.patch_embed.proj
            # The kernel is as large as its stride: every patch meets every weight once, as in a Linear.
            self._patches = _Linear(patches.weight.data.flatten(1), None if patches.bias is None else patches.bias.data)
            self._merger, self._merger_norm = visual.merger.mlp, _norm(visual.merger.ln_q)
            self._vision_rotary, self._text_rotary = visual.rotary_pos_emb, language_model.rotary_emb
            self._norm = _norm(language_model.norm)
            # The vocabulary head, which nothing reads here, and the word table, of which `vision_language.word_rows` fetches a
            # prompt's rows: they may lie on the CPU.
            self.unread = (language_model.embed_tokens, text_encoder.lm_head)
            vision = [_vision_parts(block) for block in visual.blocks]
            text = [_text_parts(layer) for layer in language_model.layers]
            for _, qkv, _, _, gate_up, *_ in (*vision, *text):
                check_alike(qkv)
                check_alike(gate_up)
        except AttributeError as error:  # another transformers than those this was written for
            raise UnsupportedError(f"this Qwen2.5-VL is built otherwise: {error}") from error
        home = patches.weight.device
        if home.type == "cuda" and not all(_are_packed(block.mlp.gate_proj, block.mlp.up_proj) for block in visual.blocks):
            # Packed on the GPU, the blocks would leave holes too small for the next block: half a gigabyte of them.
            visual.blocks.to("cpu")
            torch.cuda.empty_cache()
        self._vision_blocks = [_block(*parts, device=home) for parts in vision]
        self._text_blocks = [_block(*parts, device=home) for parts in text]
        self.graphs = Graphs()
        # Not bounded: there are only as many grids as aspect ratios of one area, and one takes half a megabyte.
        self._layouts = ContentCache(32)

    @property
    def device(self) -> torch.device:
        return self._norm.weight.device

    @torch.no_grad()
    def encode_image(self, values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """`visual(values, grid_thw=[[1, rows, columns]]).pooler_output`: (n, D) of n merged tokens, row by row.

        `values` (rows * columns, C * T * P * P) are one picture's patches as the image processor orders them. Raises
        ValueError if they do not fit `grid`, or the grid cannot be merged.
        """
        rows, columns = grid
        if len(values) != rows * columns or rows % self._merge or columns % self._merge:
            raise ValueError(f"{len(values)} patches, grid {grid}: want rows * columns, multiples of {self._merge}")
        layout = self._layouts.get(grid, lambda: self._lay_out(rows, columns))
        return self.graphs.run(("encode_image", grid), partial(self._encode_image, layout), values)

    @torch.no_grad()
    def encode_text(self, embeds: torch.Tensor, positions: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """`language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[:, skip:]`.

        `embeds` (1, L, D) are tokens with the pictures' features in their places, `positions` (3, 1, L) their time, row
        and column; (1, L - skip, D) comes back. What no one attends to any more is not computed for the skipped rows.
        Raises ValueError for a batch.
        """
        if len(embeds) != 1:
            raise ValueError(f"a batch of {len(embeds)} was given. Allowed: 1")
        length = embeds.shape[1]
        if embeds.is_cuda:  # few lengths are recorded; the attention is causal, so rows behind the last change nothing
            padding = round_up(length, _LENGTHS) - length
            embeds, positions = F.pad(embeds, (0, 0, 0, padding)), F.pad(positions, (0, padding))
        return self.graphs.run(("encode_text", skip), partial(self._encode_text, skip), embeds, positions)[:, : length - skip]

    def _encode_image(self, layout: _Layout, values: torch.Tensor) -> torch.Tensor:
        x = F.linear(values.to(self._patches.weight.dtype).index_select(0, layout.order), *self._patches)
        everything = ((1, len(x)),)
        for i, block in enumerate(self._vision_blocks):
            windows = everything if i in self._full else layout.windows
            _attend_(x, block, layout.cos, layout.sin, windows)
            _feed_forward_(x, block)
        x = _normalise(x, self._merger_norm).view(len(layout.back), -1)
        return self._merger(x).index_select(0, layout.back)

    def _encode_text(self, skip: int, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = embeds[0].clone()  # it is added to, and the input is the caller's
        cos, sin = _halves(*(table[0] for table in self._text_rotary(embeds, positions)))
        for block in self._text_blocks[:-1]:
            _attend_(x, block, cos, sin, ((1, len(x)),), causal=True)
            _feed_forward_(x, block)
        _attend_(x, self._text_blocks[-1], cos, sin, ((1, len(x)),), causal=True, skip=skip)
        x = x[skip:]
        _feed_forward_(x, self._text_blocks[-1])
        return _normalise(x, self._norm).unsqueeze(0)

    def _lay_out(self, rows: int, columns: int) -> _Layout:
        merge = self._merge
        shape = (rows // merge, columns // merge)
        tokens = torch.arange(shape[0] * shape[1]).view(shape)
        windows = [
            window.flatten() for band in tokens.split(self._window) for window in band.split(self._window, dim=1)
        ]
        windows.sort(key=len, reverse=True)  # at the right and lower border they are smaller
        merged = torch.cat(windows)
        order = (merged[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        positions = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        # The patches of a merged token are neighbours in the input.
        positions = positions.view(shape[0], merge, shape[1], merge, 2).transpose(1, 2).reshape(-1, 2)[order]
        weight = self._patches.weight
        cos, sin = _halves(*self._vision_rotary(weight, positions.to(weight.device)))
        return _Layout(
            order.to(weight.device),
            torch.argsort(merged).to(weight.device),
            cos,
            sin,
            tuple((len(list(same)), size * merge**2) for size, same in groupby(windows, key=len)),
        )


def _attend_(
    x: torch.Tensor,
    block: _Block,
    cos: torch.Tensor,
    sin: torch.Tensor,
    windows: tuple[tuple[int, int], ...],
    causal: bool = False,
    skip: int = 0,
) -> None:
    """The first half of a block, added to `x` (n, D), to its rows behind `skip` only. `windows` as in `_Layout`."""
    qkv = _multiply(_normalise(x, block.norm1), block.qkv)
    qkv = qkv.view(len(x), block.heads + 2 * block.kv_heads, -1)
    _rotate_(qkv[:, : block.heads + block.kv_heads], cos, sin)
    parts, start = [], 0
    for count, size in windows:
        part = qkv[start : start + count * size].unflatten(0, (count, size)).transpose(1, 2)
        q, k, v = part.split((block.heads, block.kv_heads, block.kv_heads), dim=1)  # (windows, heads, size, head_dim)
        part = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=block.scale, enable_gqa=block.heads != block.kv_heads
        )
        parts.append(part.transpose(1, 2).reshape(count * size, -1))
        start += count * size
    attended = parts[0] if len(parts) == 1 else torch.cat(parts)
    _add_linear_(x[skip:], attended[skip:], block.out)


def _feed_forward_(x: torch.Tensor, block: _Block) -> None:
    """The second half of a block, added to `x` (n, D)."""
    gate, up = _multiply(_normalise(x, block.norm2), block.gate_up).chunk(2, dim=-1)
    _add_linear_(x, block.activation(gate).mul_(up), block.down)


def _multiply(x: torch.Tensor, linear: _Linear | QuantizedLinear) -> torch.Tensor:
    return linear(x) if isinstance(linear, QuantizedLinear) else F.linear(x, *linear)


def _add_linear_(x: torch.Tensor, values: torch.Tensor, linear: _Linear | QuantizedLinear) -> None:
    """x += linear(values)"""
    if isinstance(linear, _Linear) and linear.bias is None:
        x.addmm_(values, linear.weight.t())  # one kernel
    else:
        x.add_(_multiply(values, linear))


def _normalise(x: torch.Tensor, norm: _Norm) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates (n, heads, head_dim) in place by `_halves`, in the dtype of those; they serve all heads."""
    halves = x.unflatten(-1, (2, -1))
    torch.addcmul(halves * cos, halves.flip(-2), sin, out=halves)


def _halves(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, head_dim) as transformers has them -> (n, 1, 2, head_dim / 2), the sine's first half negated.

    (a, b) is rotated to (a cos - b sin, b cos + a sin): with that sign, x cos + swapped x sin.
    """
    cos, sin = (table.unflatten(-1, (2, -1)).unsqueeze(1) for table in (cos, sin))
    return cos.contiguous(), torch.cat((-sin[:, :, :1], sin[:, :, 1:]), dim=2)


def _vision_parts(block: Any) -> tuple:
    """`_block`'s arguments."""
    attention, mlp, heads = block.attn, block.mlp, block.attn.num_heads
    return (
        block.norm1, [attention.qkv], attention.proj,
        block.norm2, [mlp.gate_proj, mlp.up_proj], mlp.down_proj,
        mlp.act_fn, heads, heads, attention.scaling,
    )  # fmt: skip


def _text_parts(layer: Any) -> tuple:
    """`_block`'s arguments."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj,
        layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], mlp.down_proj,
        mlp.act_fn, attention.num_heads, attention.num_key_value_heads, attention.scaling,
    )  # fmt: skip


def _block(norm1, projections, out, norm2, gate_up, down, activation, heads, kv_heads, scale, device) -> _Block:
    """The block on `device`; its layers may come from the CPU."""
    block = _Block(
        _norm(norm1.to(device)), _stack(projections, device), _stack([out], device),
        _norm(norm2.to(device)), _stack(gate_up, device, _ALIGNMENT), _widen(down, device, _ALIGNMENT),
        activation, heads, kv_heads, scale,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the freed pieces are too small for the next block: they would pile up
    return block


def _norm(norm: Any) -> _Norm:
    return _Norm(norm.weight.data, norm.variance_epsilon)


def _are_packed(*linears: nn.Linear) -> bool:
    """Whether the layers' weights are views of one buffer."""
    return len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1


def _stack(linears: list, device: torch.device, multiple: int = 1) -> _Linear | QuantizedLinear:
    """Linear layers that share an input as one; each is padded with zeros to a multiple of `multiple` outputs.

    8-bit ones have such numbers of outputs as they are.
    """
    if isinstance(linears[0], QuantizedLinear):
        return linears[0].to(device) if len(linears) == 1 else QuantizedLinear.merged(linears, device)
    weight = pack(linears, "weight", device, rows=multiple)
    return _Linear(weight, None if linears[0].bias is None else pack(linears, "bias", device, rows=multiple))


def _widen(linear: nn.Linear, device: torch.device, multiple: int) -> _Linear | QuantizedLinear:
    """A linear layer whose inputs are padded to a multiple of `multiple`; the weights there are zeros."""
    if isinstance(linear, QuantizedLinear):
        return linear.to(device)
    weight = pack([linear], "weight", device, columns=multiple)
    return _Linear(weight, None if linear.bias is None else linear.to(device).bias.data)
