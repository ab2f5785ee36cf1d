"""The transformer's small operations, each one kernel: what stands between two matrix products.

Two functions cover a whole block except for its matrix products and its attention. Eager PyTorch needs some thirty kernels
for the same, each reading and writing all activations. On CUDA they are Triton kernels; on the CPU the same functions
are written in PyTorch: the definition that the kernels are tested against. Arithmetic is float32 inside, rounded once
on the way out, where stock rounds after every operation: equal up to rounding, and nearer to the exact value.

Both streams are in one tensor, all text rows before all image rows. Each row has a type: 0 text, 1 noise, 2
reference (which Qwen-Image-Edit-2511 modulates as at time 0), and for the n-th of several samples 3 n more. A type
is the index of the row's modulation in its tables, so rows of any samples may be in any order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from quantization.languages import tl, triton
from quantization.rows import LARGEST, TINY, Quantized, empty_rows, quantize_rows

if triton is not None:
    from quantization.rows import store_quantized


def residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    row_types: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`x += gate * y` in place (left out if `y` is None), then layer_norm(x) * (1 + scale) + shift as a new tensor.

    x, y: (R, D) contiguous; gate, shift, scale: (K, D), a row for each row type, shift and scale with one row stride; row_types:
    int32 (R,) below K.
    """
    if x.is_cuda:
        return _residual_norm_modulate_cuda(x, y, gate, shift, scale, row_types, eps)
    if y is not None:
        x.copy_(_clip(x.float() + gate[row_types].float() * y.float(), x.dtype))
    normed = F.layer_norm(x.float(), x.shape[1:], eps=eps)
    return (normed * (1 + scale[row_types].float()) + shift[row_types].float()).to(x.dtype)


def residual_norm_modulate_quantize(x, y, gate, shift, scale, row_types, eps: float, dtype: torch.dtype) -> Quantized:
    """`residual_norm_modulate` followed by `quantize_rows` to `dtype`: the same bits, in one kernel on CUDA.

    The other arguments are those of `residual_norm_modulate`: x (R, D) becomes x + gate * y in place, the result is
    normed and modulated. e4m3 rows come with their norms.
    """
    if not x.is_cuda:
        return quantize_rows(residual_norm_modulate(x, y, gate, shift, scale, row_types, eps), dtype)
    return _norm_quantize_triton(x, y, gate, shift, scale, row_types, eps, dtype)


class Destinations(NamedTuple):
    """Where queries, keys and values are written: row r of the products goes to row `rows[r]` of q, k and v.

    q, k, v: (S, H, d), each row contiguous; q may be None: queries then stay where they are. rows: int32 (R,), or None
    for row r to row r, which only `attention.norm_rope_quantize` knows.
    """

    q: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor | None


def qk_norm_rope(
    qkv: torch.Tensor,
    row_types: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    destinations: Destinations | None = None,
) -> None:
    """RMS norm and rotary embedding of queries and keys: in place, or to `destinations`, where the values go too.

    qkv: (R, 3, H, d) contiguous; row_types, positions: int32 (R,); weights: (2, 2, d) as [image or text][q or k]; cos, sin:
    float32 (P, d / 2), for neighbouring pairs of numbers, read at the rows' positions.
    """
    if qkv.is_cuda:
        _qk_norm_rope_cuda(qkv, row_types, positions, weights, cos, sin, eps, destinations)
        return
    x = qkv[:, :2].float()  # (R, 2, H, d)
    x = F.rms_norm(x, x.shape[-1:], eps=eps) * weights[(row_types % 3 == 0).long()].float().unsqueeze(2)
    even, odd, c, s = x[..., 0::2], x[..., 1::2], cos[positions][:, None, None], sin[positions][:, None, None]
    q, k = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(qkv.dtype).unbind(1)
    if destinations is None or destinations.q is None:
        qkv[:, 0] = q
    if destinations is None:
        qkv[:, 1] = k
        return
    for part, to in ((q, destinations.q), (k, destinations.k), (qkv[:, 2], destinations.v)):
        if to is not None:
            to[destinations.rows] = part


def _clip(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As stock: float16 saturates instead of overflowing."""
    return x.clamp(-65504.0, 65504.0) if dtype == torch.float16 else x


def _residual_norm_modulate_cuda(x, y, gate, shift, scale, row_types, eps):
    count, width = x.shape
    out = torch.empty_like(x)
    _residual_norm_modulate_kernel[(count,)](
        x, x if y is None else y, out, shift if gate is None else gate, shift, scale, row_types,
        0 if gate is None else gate.stride(0), shift.stride(0), width, eps,
        HAS_Y=y is not None, CLIP=x.dtype == torch.float16, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


def _norm_quantize_triton(x, y, gate, shift, scale, row_types, eps, dtype) -> Quantized:
    count, width = x.shape
    norms = dtype == torch.float8_e4m3fn
    out = empty_rows(count, width, dtype, x.device, norms)
    _norm_quantize_kernel[(count,)](
        x, x if y is None else y, *out[:2], out.norms if norms else out.scales, shift if gate is None else gate, shift,
        scale, row_types, 0 if gate is None else gate.stride(0), shift.stride(0), width, eps,
        HAS_Y=y is not None, CLIP=x.dtype == torch.float16, LARGEST=LARGEST[dtype], TINY=TINY, NORMS=norms,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


def _qk_norm_rope_cuda(qkv, row_types, positions, weights, cos, sin, eps, destinations):
    count, _, heads, width = qkv.shape
    block = min(8, triton.next_power_of_2(heads))
    own = Destinations(qkv[:, 0], qkv[:, 1], qkv[:, 2], row_types) if destinations is None else destinations
    q = qkv[:, 0] if own.q is None else own.q
    _qk_norm_rope_kernel[(count, (2 if destinations is None else 3) * triton.cdiv(heads, block))](
        qkv, q, own.k, own.v, own.rows, row_types, positions, weights, cos, sin,
        q.stride(0), own.k.stride(0), own.v.stride(0), eps,
        PARTS=2 if destinations is None else 3, MOVE_Q=destinations is not None and destinations.q is not None, MOVE=destinations is not None,
        HEADS=heads, BLOCK_HEADS=block, WIDTH=width, num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _residual_norm_modulated(
        row, x, y, gate, shift, scale, row_types, gate_stride, stride, width, eps,
        HAS_Y: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """What `residual_norm_modulate` computes, for one row: x is written, the result is float32 (BLOCK,)."""
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        at = row.to(tl.int64) * width + columns
        row_type = tl.load(row_types + row)
        modulation = row_type * stride + columns
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_Y:
            added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(gate + row_type * gate_stride + columns, mask=inside, other=0.0).to(tl.float32) * added
            if CLIP:
                value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            rounded = value.to(x.dtype.element_ty)
            tl.store(x + at, rounded, mask=inside)
            value = rounded.to(tl.float32)  # the norm reads what the next block will read
        centred = tl.where(inside, value - tl.sum(value) / width, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
        factor = 1.0 + tl.load(scale + modulation, mask=inside, other=0.0).to(tl.float32)
        return normed * factor + tl.load(shift + modulation, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _residual_norm_modulate_kernel(
        x, y, out, gate, shift, scale, row_types, gate_stride, stride, width, eps,
        HAS_Y: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        moved = _residual_norm_modulated(
            row, x, y, gate, shift, scale, row_types, gate_stride, stride, width, eps, HAS_Y, CLIP, BLOCK
        )
        columns = tl.arange(0, BLOCK)
        at, inside = row.to(tl.int64) * width + columns, columns < width
        tl.store(out + at, moved.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_quantize_kernel(
        x, y, values, scales, norms, gate, shift, scale, row_types, gate_stride, stride, width, eps,
        HAS_Y: tl.constexpr, CLIP: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, NORMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        moved = _residual_norm_modulated(
            row, x, y, gate, shift, scale, row_types, gate_stride, stride, width, eps, HAS_Y, CLIP, BLOCK
        )
        moved = moved.to(x.dtype.element_ty).to(tl.float32)  # the same bits as in two kernels; beyond the row zeros
        if NORMS:
            tl.store(norms + row, tl.sqrt(tl.sum(moved * moved)))
        columns = tl.arange(0, BLOCK)
        at = row.to(tl.int64) * width + columns
        store_quantized(moved, at, columns < width, values, scales, row, LARGEST, TINY)

    @triton.jit
    def _qk_norm_rope_kernel(
        qkv, q, k, v, destinations, row_types, positions, weights, cos, sin, q_stride, k_stride, v_stride, eps,
        PARTS: tl.constexpr, MOVE_Q: tl.constexpr, MOVE: tl.constexpr,
        HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        row, part = tl.program_id(0), tl.program_id(1)
        heads = (part // PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        numbers = tl.arange(0, WIDTH)
        which = part % PARTS  # query, key or value
        inner = heads[:, None] * WIDTH + numbers[None, :]
        inside = (heads < HEADS)[:, None] & (numbers < WIDTH)[None, :]
        given = tl.load(qkv + (row.to(tl.int64) * 3 + which) * HEADS * WIDTH + inner, mask=inside, other=0.0)
        to_row = row.to(tl.int64)
        if MOVE:
            to_row = tl.load(destinations + row).to(tl.int64)
        if which == 2:
            tl.store(v + to_row * v_stride + inner, given, mask=inside)
        else:
            value = given.to(tl.float32)
            stream = tl.where(tl.load(row_types + row) % 3 == 0, 2, 0)
            weight = tl.load(weights + (stream + which) * WIDTH + numbers).to(tl.float32)
            value = value * tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None] * weight[None, :]
            even, odd = tl.split(tl.reshape(value, (BLOCK_HEADS, WIDTH // 2, 2)))
            pairs = tl.load(positions + row) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
            c, s = tl.load(cos + pairs)[None, :], tl.load(sin + pairs)[None, :]
            rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK_HEADS, WIDTH))
            rounded = rotated.to(qkv.dtype.element_ty)
            if which == 1:
                tl.store(k + to_row * k_stride + inner, rounded, mask=inside)
            elif MOVE_Q:
                tl.store(q + to_row * q_stride + inner, rounded, mask=inside)
            else:
                tl.store(q + row.to(tl.int64) * q_stride + inner, rounded, mask=inside)
