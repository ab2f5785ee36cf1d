"""What stands between the VAE's convolutions, fused: bias, residual, norm, SiLU, padding, upsampling, softmax.

A convolution leaves memory-bound work behind: on a GPU each bias, sum, norm and activation would read and write the
whole picture again. Here each gap between two convolutions is one pass. Pictures are (B, H, W, C) contiguous, so that
a pixel's channels are contiguous and a norm over channels stays within one program.

What gets a bias or a residual here, `x`, is a convolution's result that nothing else reads: the sum may take its memory.

Every function takes CPU tensors too. The work is then done by its twin in plain PyTorch, the definition that the tests
hold the kernels to; on CUDA it is the Triton kernel, always. Both compute in float32 and round once, when they store.
No autotuning: the blocks below suit any memory-bound kernel of these shapes, and a kernel compiles in a fraction of a
second, once for each number of channels (Triton keeps the result on disk).
"""

import torch
import torch.nn.functional as F

from quantization.languages import tl, triton

# Scores of the attention that exist at once, in numbers: 256 MiB of float32. Longer pictures take turns of rows.
MAX_SCORES = 2**26


def add_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gamma: torch.Tensor,
    *,
    silu: bool = True,
    keep_sum: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The sum x + bias + residual, and its RMS norm over the channels times `gamma`, through SiLU if asked.

    x, residual (B, H, W, C); bias, gamma (C,). The sum is None if it is not to be kept, and x itself if there is
    nothing to add.
    """
    return (_add_norm_triton if x.is_cuda else _add_norm_torch)(x, bias, residual, gamma, silu, keep_sum)


def add(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """x + bias + residual, shapes as in `add_norm`; x itself if there is nothing to add."""
    if bias is None and residual is None:
        return x
    return _add_resize(x, bias, residual, *x.shape[1:3], 1)


def add_pad(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """x + bias + residual with a row of zeros below and a column of zeros to the right: (B, H + 1, W + 1, C)."""
    return _add_resize(x, bias, residual, x.shape[1] + 1, x.shape[2] + 1, 1)


def add_upsample(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """x + bias + residual with every pixel repeated to two by two: (B, 2 H, 2 W, C)."""
    return _add_resize(x, bias, residual, 2 * x.shape[1], 2 * x.shape[2], 2)


def attention(qkv: torch.Tensor) -> torch.Tensor:
    """Attention of one head over all channels: (B, N, 3 C), which holds q, k and v, to (B, N, C)."""
    if qkv.is_cuda:
        return _attention_by_rows(*qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(*qkv.unsqueeze(1).chunk(3, dim=-1)).squeeze(1)


def _add_resize(x, bias, residual, height: int, width: int, factor: int) -> torch.Tensor:
    """Output pixel (y, x) is the sum at (y // factor, x // factor), zero where that lies outside."""
    return (_add_resize_triton if x.is_cuda else _add_resize_torch)(x, bias, residual, height, width, factor)


# In plain PyTorch -----------------------------------------------------------------------------------------------------


def _sum_torch(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    total = x.float()  # float32 stays where it is
    if bias is not None:
        total.add_(bias)
    if residual is not None:
        total.add_(residual)
    return total


def _add_norm_torch(x, bias, residual, gamma, silu: bool, keep_sum: bool):
    total = _sum_torch(x, bias, residual)
    length = torch.linalg.vector_norm(total, dim=-1, keepdim=True).clamp_min_(1e-12)
    normed = (total * (gamma.numel() ** 0.5 / length)).mul_(gamma)
    normed = F.silu(normed, inplace=True) if silu else normed
    return total.to(x.dtype) if keep_sum else None, normed.to(x.dtype)


def _add_resize_torch(x, bias, residual, height: int, width: int, factor: int) -> torch.Tensor:
    total = _sum_torch(x, bias, residual).to(x.dtype)
    if factor > 1:
        large = F.interpolate(total.permute(0, 3, 1, 2), scale_factor=factor, mode="nearest-exact")
        total = large.permute(0, 2, 3, 1).contiguous()
    below, right = height - total.shape[1], width - total.shape[2]
    return F.pad(total, (0, 0, 0, right, 0, below)) if below or right else total


# In Triton ------------------------------------------------------------------------------------------------------------


def _add_norm_triton(x, bias, residual, gamma, silu: bool, keep_sum: bool):
    _check(x, bias, residual, gamma)
    channels = x.shape[-1]
    pixels, normed = x.numel() // channels, torch.empty_like(x)
    grid, blocks = _blocks(pixels, channels)
    _add_norm_kernel[grid](
        x, bias, residual, gamma, normed, pixels, channels**0.5,
        CHANNELS=channels, SILU=silu, KEEP=keep_sum and not (bias is None and residual is None), **blocks,
    )  # fmt: skip
    return x if keep_sum else None, normed


def _add_resize_triton(x, bias, residual, height: int, width: int, factor: int) -> torch.Tensor:
    _check(x, bias, residual)
    batch, height_in, width_in, channels = x.shape
    out = x.new_empty(batch, height, width, channels)
    pixels = batch * height * width
    grid, blocks = _blocks(pixels, channels)
    _add_resize_kernel[grid](
        x, bias, residual, out, pixels, height, width, height_in, width_in, CHANNELS=channels, FACTOR=factor, **blocks
    )
    return out


def _attention_by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two matrix products around a softmax of float32 scores, q, k, v and result (B, N, C).

    Flash attention ends at 256 channels a head, and what PyTorch falls back to has one block of threads for each few
    queries of a head: with one head most of a large GPU would idle.
    """
    batch, tokens, channels = q.shape
    rows = max(1, MAX_SCORES // (batch * tokens))
    out = []
    for block in q.split(rows, dim=1):
        # The products of half-precision numbers, not rounded to half precision before the softmax.
        exact = {} if q.dtype == torch.float32 else {"out_dtype": torch.float32}
        scores = torch.bmm(block, k.mT, **exact)
        out.append(torch.bmm(_softmax_triton(scores, channels**-0.5, q.dtype), v))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _softmax_triton(scores: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """softmax(scale * scores) over the last dimension."""
    _check(scores)
    out = torch.empty_like(scores, dtype=dtype)
    columns = scores.shape[-1]
    block = triton.next_power_of_2(columns)  # a whole row at once: 4096 at 512x512
    warps = min(max(block // 1024, 4), 32)
    _softmax_kernel[(scores.numel() // columns,)](scores, out, scale, columns, BLOCK=block, num_warps=warps)
    return out


def _check(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """The kernels know one layout and trust the sizes."""
    assert x.is_contiguous(), f"strides {x.stride()} of shape {tuple(x.shape)}"
    for other in others:
        assert other is None or (other.is_contiguous() and other.shape in (x.shape, x.shape[-1:])), other.shape


def _blocks(pixels: int, channels: int):
    """The grid, and the pixels and channels of a program: 2048 numbers for four warps, 16 a thread, in 16-byte loads.

    Small enough that 32x32 pixels of 384 channels occupy every multiprocessor, large enough to hide the loads' latency.
    """
    columns = triton.next_power_of_2(channels)
    rows = max(1, 2048 // columns)
    return (triton.cdiv(pixels, rows),), {"ROWS": rows, "COLUMNS": columns, "num_warps": 4}


if triton is not None:
    # Sizes of pictures are not specialised on: a new one would compile kernels again, and no load would get better.

    @triton.jit
    def _sum_of(x, bias, residual, at, mask, column, CHANNELS: tl.constexpr):
        total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            total += tl.load(bias + column, mask=column < CHANNELS, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        return total

    @triton.jit(do_not_specialize=["pixels"])
    def _add_norm_kernel(
        x, bias, residual, gamma, out, pixels, scale,
        CHANNELS: tl.constexpr, SILU: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        mask = (row < pixels)[:, None] & (column < CHANNELS)[None, :]
        at = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
        total = _sum_of(x, bias, residual, at, mask, column, CHANNELS)
        if KEEP:
            tl.store(x + at, total.to(x.dtype.element_ty), mask=mask)
        # Channels beyond the last are zeros: they add nothing to the length.
        length = tl.sqrt_rn(tl.sum(total * total, axis=1))
        weight = tl.load(gamma + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
        normed = total * (scale / tl.maximum(length, 1e-12))[:, None] * weight[None, :]
        if SILU:
            normed = normed / (1.0 + tl.exp(-normed))
        tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["pixels", "height", "width", "height_in", "width_in"])
    def _add_resize_kernel(
        x, bias, residual, out, pixels, height, width, height_in, width_in,
        CHANNELS: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        mask = (row < pixels)[:, None] & (column < CHANNELS)[None, :]
        picture, y_in, x_in = row // (height * width), row // width % height // FACTOR, row % width // FACTOR
        inside = mask & ((y_in < height_in) & (x_in < width_in))[:, None]
        row_in = (picture * height_in + y_in) * width_in + x_in
        at = row_in.to(tl.int64)[:, None] * CHANNELS + column[None, :]
        total = _sum_of(x, bias, residual, at, inside, column, CHANNELS)
        total = tl.where(inside, total, 0.0)  # the bias is not added outside
        at = row.to(tl.int64)[:, None] * CHANNELS + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)

    @triton.jit  # whose loads are wide if `columns` is a multiple of 16: specialised
    def _softmax_kernel(scores, out, scale, columns, BLOCK: tl.constexpr):
        column = tl.arange(0, BLOCK)
        at, mask = tl.program_id(0).to(tl.int64) * columns + column, column < columns
        row = tl.load(scores + at, mask=mask, other=-float("inf")) * scale
        row = tl.exp(row - tl.max(row))
        tl.store(out + at, (row / tl.sum(row)).to(out.dtype.element_ty), mask=mask)
