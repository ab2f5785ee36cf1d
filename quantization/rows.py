"""Rows of numbers as 8-bit rows with a scale each: the definition in PyTorch, and the kernels that compute it on CUDA.

A row of activations is quantised by its own largest magnitude, symmetric around zero. One kernel reads the row, may
apply the GELU and a rotation first, and writes 8-bit values and one float32 scale. A kernel that makes rows itself can
end with `store_quantized`: `fast_path.kernels.residual_norm_modulate_quantize` does, so that quantising costs nothing there.

On the CPU the same functions are written in PyTorch: the definition that the kernels are tested against.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from quantization.languages import tl, triton

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
GROUPS = (0, 16, 256)  # lengths of a rotation's groups; 0 is none
TINY = 1e-30  # the least "largest magnitude" of a row: a row of zeros has a finite factor and stays zeros


class Quantized(NamedTuple):
    """Rows of 8-bit numbers: values (R, K) int8 or float8_e4m3fn, scales (R,) float32; the rows are values * scales.

    norms: (R,) float32, the Euclidean norms of the rows, or None where no product needs them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    norms: torch.Tensor | None = None

    def part(self, rows: slice) -> "Quantized":
        """Views of some of the rows."""
        return Quantized(self.values[rows], self.scales[rows], None if self.norms is None else self.norms[rows])

    def dequantized(self) -> torch.Tensor:
        """(R, K) float32"""
        return self.values.float() * self.scales[:, None]


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """Multiply each group of `group` neighbours of x (..., K) by one orthogonal matrix, which spreads outliers over the group.

    Returns float32 (..., K). The matrix is a regular Hadamard matrix (ConvRot, arXiv 2512.03673), whose rows all have the
    same sum. The usual one has a row of ones, which would gather the group's mean in one number. 16 is H4 x H4, where H4
    is 1 with -1 on the antidiagonal; 256 is H16 x H16 with the two factors exchanged, which saves the kernel a
    transposition. Rotating inputs and weights in the same way leaves their products unchanged.

    Raises ValueError for a group that is not in `GROUPS` or does not divide K.
    """
    if group not in GROUPS or (group and x.shape[-1] % group):
        raise ValueError(f"groups of {group} of {x.shape[-1]} numbers. Allowed: {GROUPS} that divide the length.")
    if not group:
        return x.float()
    h4 = 1.0 - 2.0 * torch.eye(4, device=x.device).flip(0)
    h16 = torch.kron(h4, h4) / 4.0
    if group == 16:
        return (x.float().unflatten(-1, (-1, 16)) @ h16).flatten(-2)
    return (h16 @ x.float().unflatten(-1, (-1, 16, 16)) @ h16).mT.flatten(-3)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, group: int = 0, gelu: bool = False) -> Quantized:
    """Quantise the rows of x (R, K), contiguous, to `dtype` (int8 or float8_e4m3fn), symmetric around zero.

    The order is: GELU (tanh form) if `gelu`, rotation in groups, the row's largest magnitude, rounding to even.
    """
    if not x.is_cuda or triton is None:
        return quantize_rows_torch(x, dtype, group, gelu)
    return _quantize_rows_triton(x, dtype, group, gelu)


def empty_rows(rows: int, width: int, dtype: torch.dtype, device, norms: bool = False) -> Quantized:
    """Uninitialised rows for a kernel to write. With `norms` the kernel has to write those too."""
    numbers = torch.empty(2 if norms else 1, rows, dtype=torch.float32, device=device)
    return Quantized(torch.empty(rows, width, dtype=dtype, device=device), *numbers)


def quantize_rows_torch(x: torch.Tensor, dtype: torch.dtype, group: int, gelu: bool) -> Quantized:
    """The definition: `quantize_rows` in PyTorch, the same bits on every device."""
    value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    value = rotate(value, group)
    most = value.abs().amax(1).clamp_min(TINY)
    # PyTorch computes number / tensor as reciprocal * number, which rounds twice; the kernel's division rounds once.
    value = value * (torch.full_like(most, LARGEST[dtype]) / most)[:, None]
    return Quantized((value.round() if dtype == torch.int8 else value).to(dtype), most * (1.0 / LARGEST[dtype]))


def _quantize_rows_triton(x, dtype, group, gelu) -> Quantized:
    count, width = x.shape
    assert x.is_contiguous() and (not group or width % group == 0), (x.shape, x.stride(), group)
    out = empty_rows(count, width, dtype, x.device)
    if group:
        block = triton.next_power_of_2(width)
        _rotate_rows_kernel[(count,)](
            x, *out[:2], width, LARGEST=LARGEST[dtype], TINY=TINY, GROUP=group, GELU=gelu, BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )  # fmt: skip
        return out
    block, parts = _pieces(width)
    _quantize_rows_kernel[(count,)](
        x, *out[:2], width, LARGEST=LARGEST[dtype], TINY=TINY, GELU=gelu, BLOCK=block, PARTS=parts,
        num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out


def _pieces(width: int) -> tuple[int, int]:
    """(length, count) of the pieces of a row. A length is a power of two; masked lanes would cost as much as others."""
    odd = width // (width & -width)
    return (width // odd, odd) if odd <= 7 else (triton.next_power_of_2(width), 1)


if triton is not None:
    if triton.knobs.runtime.interpret:  # the interpreter has no assembly

        @triton.jit
        def _tanh(x):
            return 2.0 * tl.sigmoid(2.0 * x) - 1.0

        @triton.jit
        def _nearest(x):
            return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no fraction there, rounds to even
    else:

        @triton.jit
        def _tanh(x):
            """One instruction, exact to 11 bits: more than bfloat16 has. GELUs are most of the work of quantising a row."""
            return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

        @triton.jit
        def _nearest(x):
            """Round to even. The addition above would be fused with the multiplication before it and would miss ties."""
            return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], tl.int32, True, 1)

    @triton.jit
    def gelu_tanh(x):
        half = 0.5 * x
        return half + half * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x))

    @triton.jit
    def _rounded(value, dtype: tl.constexpr):
        if dtype == tl.int8:
            value = _nearest(value)
        return value.to(dtype)

    @triton.jit
    def store_quantized(value, at, inside, values, scales, row, LARGEST: tl.constexpr, TINY: tl.constexpr):
        most = tl.maximum(tl.max(tl.abs(value)), TINY)
        factor = tl.div_rn(tl.full((), LARGEST, tl.float32), most)
        tl.store(values + at, _rounded(value * factor, values.dtype.element_ty), mask=inside)
        tl.store(scales + row, most * (1.0 / LARGEST))

    @triton.jit
    def _quantize_rows_kernel(
        x, values, scales, width,
        LARGEST: tl.constexpr, TINY: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        row = tl.num_programs(0) - 1 - tl.program_id(0)  # from the last row on: those were written last and are still in L2
        columns = tl.arange(0, BLOCK)
        at = row.to(tl.int64) * width + columns
        kept = ()
        most = TINY
        for part in tl.static_range(PARTS):
            inside = part * BLOCK + columns < width
            value = tl.load(x + at + part * BLOCK, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if GELU:
                value = gelu_tanh(value)
            kept = kept + (value,)  # noqa: RUF005 - Triton knows no star
            most = tl.maximum(most, tl.max(tl.abs(value)))
        factor = tl.div_rn(tl.full((), LARGEST, tl.float32), most)
        for part in tl.static_range(PARTS):
            value = _rounded(kept[part] * factor, values.dtype.element_ty)
            tl.store(values + at + part * BLOCK, value, mask=part * BLOCK + columns < width)
        tl.store(scales + row, most * (1.0 / LARGEST))

    @triton.jit
    def _rotate_rows_kernel(
        x, values, scales, width,
        LARGEST: tl.constexpr, TINY: tl.constexpr, GROUP: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = columns < width
        at = row.to(tl.int64) * width + columns
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            value = gelu_tanh(value)
        i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        signs = ((i // 4 + j // 4 == 3) != (i % 4 + j % 4 == 3)).to(tl.float32)
        hadamard = 0.25 - 0.5 * signs
        value = tl.dot(value, hadamard, input_precision="tf32")
        if GROUP == 256:
            value = tl.permute(tl.reshape(value, (BLOCK // 256, 16, 16)), (0, 2, 1))
            value = tl.dot(tl.reshape(value, (BLOCK // 16, 16)), hadamard, input_precision="tf32")
        store_quantized(value, at, inside, values, scales, row, LARGEST, TINY)

    @triton.jit
    def result_bound(norms, limits, rows, inside, weight):
        """A bound of each row's results, known before the sums: what e4m3 results are scaled by. 1.08 covers the 2^-4 that
        rounding to e4m3 may have added to a row's norm; the sum itself rounds much finer."""
        limits += 2 * (weight > 0).to(tl.int32)
        return tl.load(norms + rows, mask=inside, other=1.0) * tl.load(limits) * 1.08 + (tl.load(limits + 1) + 1e-30)
