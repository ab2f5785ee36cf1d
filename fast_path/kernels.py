"""The transformer's small operations, each one kernel: what stands between two matrix products.

Two functions cover a whole block beside its matrix products and its attention. Eager PyTorch needs some thirty kernels
for the same, each reading and writing all activations. On CUDA they are Triton kernels; on the CPU the same functions
are written in PyTorch: the definition that the kernels are tested against. Arithmetic is float32 inside, rounded once
on the way out, where stock rounds after every operation: equal up to rounding, and nearer to the exact value.

Both streams lie in one tensor, all text rows before all image rows, and a row's place says how it is modulated: as text,
as noise, or as a reference (which Qwen-Image-Edit-2511 modulates as at time 0).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None


class Rows(NamedTuple):
    """Where rows belong: `text` rows of text; then pictures of `image` rows each, of which the first `noise` are noise."""

    text: int
    image: int
    noise: int


def residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    rows: Rows,
    eps: float,
) -> torch.Tensor:
    """`x += gate * y` in place (left out if `y` is None), then layer_norm(x) * (1 + scale) + shift as a new tensor.

    x, y: (R, D) contiguous; gate, shift, scale: (3, D) for text, noise and references; shift and scale with one row stride.
    """
    if x.is_cuda:
        return _residual_norm_modulate_cuda(x, y, gate, shift, scale, rows, eps)
    row = torch.arange(x.shape[0])
    kind = torch.where(row < rows.text, 0, torch.where((row - rows.text) % rows.image < rows.noise, 1, 2))
    if y is not None:
        x.copy_(_clip(x.float() + gate[kind].float() * y.float(), x.dtype))
    normed = F.layer_norm(x.float(), x.shape[1:], eps=eps)
    return (normed * (1 + scale[kind].float()) + shift[kind].float()).to(x.dtype)


def qk_norm_rope(
    qkv: torch.Tensor,
    text: int,
    weights: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> None:
    """RMS norm and rotary embedding of queries and keys, in place. The first `text` tokens of each row are text.

    qkv: (B, S, 3, H, d) contiguous; weights: (2, 2, d) as [image or text][q or k]; cos, sin: float32 (S, d / 2), for
    neighbouring pairs of numbers.
    """
    if qkv.is_cuda:
        _qk_norm_rope_cuda(qkv, text, weights, cos, sin, eps)
        return
    for part, stream in ((slice(0, text), 1), (slice(text, None), 0)):
        x = qkv[:, part, :2].float()  # (B, tokens, 2, H, d)
        x = F.rms_norm(x, x.shape[-1:], eps=eps) * weights[stream].float().unsqueeze(1)
        even, odd, c, s = x[..., 0::2], x[..., 1::2], cos[part, None, None], sin[part, None, None]
        qkv[:, part, :2] = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(qkv.dtype)


def _clip(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As stock: float16 saturates instead of overflowing."""
    return x.clamp(-65504.0, 65504.0) if dtype == torch.float16 else x


def _residual_norm_modulate_cuda(x, y, gate, shift, scale, rows, eps):
    count, width = x.shape
    out = torch.empty_like(x)
    _residual_norm_modulate_kernel[(count,)](
        x, x if y is None else y, out, shift if gate is None else gate, shift, scale,
        0 if gate is None else gate.stride(0), shift.stride(0), rows.text, rows.image, rows.noise, width, eps,
        HAS_Y=y is not None, CLIP=x.dtype == torch.float16, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out


def _qk_norm_rope_cuda(qkv, text, weights, cos, sin, eps):
    batch, length, _, heads, width = qkv.shape
    block = min(8, triton.next_power_of_2(heads))
    _qk_norm_rope_kernel[(batch * length, 2 * triton.cdiv(heads, block))](
        qkv, weights, cos, sin, text, length, eps, HEADS=heads, BLOCK_HEADS=block, WIDTH=width, num_warps=4,
    )  # fmt: skip


if triton is not None:
    # Row counts change with every prompt: without `do_not_specialize` some of them would compile a kernel anew.

    @triton.jit(do_not_specialize=["text", "image", "noise"])
    def _residual_norm_modulate_kernel(
        x, y, out, gate, shift, scale, gate_stride, stride, text, image, noise, width, eps,
        HAS_Y: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        at = row.to(tl.int64) * width + columns
        kind = tl.where(row < text, 0, tl.where((row - text) % image < noise, 1, 2))
        modulation = kind * stride + columns
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_Y:
            added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(gate + kind * gate_stride + columns, mask=inside, other=0.0).to(tl.float32) * added
            if CLIP:
                value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
            rounded = value.to(x.dtype.element_ty)
            tl.store(x + at, rounded, mask=inside)
            value = rounded.to(tl.float32)  # the norm sees what the next block will read
        centred = tl.where(inside, value - tl.sum(value) / width, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
        factor = 1.0 + tl.load(scale + modulation, mask=inside, other=0.0).to(tl.float32)
        moved = normed * factor + tl.load(shift + modulation, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, moved.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["text", "length"])
    def _qk_norm_rope_kernel(
        qkv, weights, cos, sin, text, length, eps,
        HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        token, part = tl.program_id(0), tl.program_id(1)
        position = token % length
        heads = (part // 2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        numbers = tl.arange(0, WIDTH)
        is_key = part % 2
        at = (token.to(tl.int64) * 3 + is_key) * HEADS * WIDTH + heads[:, None] * WIDTH + numbers[None, :]
        inside = (heads < HEADS)[:, None] & (numbers < WIDTH)[None, :]
        value = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
        which = tl.where(position < text, 2, 0) + is_key
        weight = tl.load(weights + which * WIDTH + numbers).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None] * weight[None, :]
        even, odd = tl.split(tl.reshape(value, (BLOCK_HEADS, WIDTH // 2, 2)))
        pairs = position * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        c, s = tl.load(cos + pairs)[None, :], tl.load(sin + pairs)[None, :]
        turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK_HEADS, WIDTH))
        tl.store(qkv + at, turned.to(qkv.dtype.element_ty), mask=inside)
