"""The product of two 8-bit matrices with its scales, bias and GELU.

The product accumulates int8 x int8 in int32, exactly, or e4m3 x e4m3 in float32. Both scales, the bias and, if asked
for, the GELU are applied to the accumulator, and one rounded number is written.

On Hopper both operands are stored with the summed dimension contiguous, as its 8-bit tensor cores demand. There are four
forms of one kernel (`Config.form`), which are measured against each other:
- "pointer": loads by pointer;
- "tma": loads by the tensor memory accelerator;
- "persistent": with the accelerator too, but only as many programs as the GPU has multiprocessors, each of which fetches
  its next tile while it writes the last;
- "gluon": the same written in Gluon (see `overlapping`).

One launch may hold the products of two weights, one for the first rows and one for the others (see `multiply`): text
alone is so few rows that it leaves most of the GPU idle.

An e4m3 result can be quantised inside the product kernel. e4m3 is floating point, so a scale that is a few bits too
large costs almost nothing, and the bound |x . w| <= |x| |w|, known before the sum, is good enough. For it rows bring
their norms (`Quantized.norms`) and weights theirs (`limits`). An int8 row would lose those bits, so it must be complete
before it is quantised.
"""

import torch
import torch.nn.functional as F

from quantization.languages import GluonDescriptor, TensorDescriptor, gl, gluon, tl, triton
from quantization.rows import Quantized
from quantization.tiles import SHARED_MEMORY, TALL, TALL_ROWS, Config, multiprocessors

if triton is not None:
    from quantization.rows import gelu_tanh, result_bound
    from quantization.tiles import locate_tile
if gluon is not None:
    from quantization.overlapping import overlapping_kernel


def epilogue(total: torch.Tensor, x_scales, weight_scales, bias, out: torch.Tensor, gelu: bool) -> torch.Tensor:
    """What follows the sums (R, N), written to `out` (R, N): both scales, bias, GELU, one rounding to out's dtype."""
    y = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    torch.mul(total, x_scales[:, None], out=y)
    y.mul_(weight_scales)
    if bias is not None:
        y.add_(bias)
    if gelu:
        y = F.gelu(y, approximate="tanh")
    return out if y is out else out.copy_(y)


def multiply(
    x: Quantized, weight: Quantized, bias, out: torch.Tensor | Quantized, config: Config, gelu: bool = False,
    first: int = 0, limits: torch.Tensor | None = None,
) -> torch.Tensor | Quantized:  # fmt: skip
    """`epilogue(x.values @ weight.values.T, ...)` in one kernel. x: (R, K), weight: (N, K), out: (R, N), all contiguous.

    A weight of (2 N, K) with a bias of (2 N,) is two weights: one for the `first` rows and one for the others. `out` may be
    e4m3 `Quantized`, whose scales are written too. That needs the norms of x, and `limits`, float32 (2, 2): for each of
    the two weights the largest norm of an output's weights and the largest magnitude of its bias.
    """
    values, scales = (out, out) if limits is None else out[:2]
    (rows, depth), columns = x.values.shape, values.shape[1]
    second = weight.values.shape[0] - columns
    assert second in (0, columns) and (second or not first), (weight.values.shape, values.shape, first)
    assert x.values.is_contiguous() and weight.values.is_contiguous() and values.is_contiguous()
    a, b = x.values, weight.values
    if config.form != "pointer":
        a = _descriptor(a, [config.block_m, config.block_k], config.form)
        b = _descriptor(b, [config.block_n, config.block_k], config.form)
    tiles = (triton.cdiv(first, config.block_m) + triton.cdiv(rows - first, config.block_m)) * triton.cdiv(
        columns, config.block_n
    )
    eight = x.scales if limits is None else x.norms, x.scales if limits is None else limits, scales
    arguments = (a, b, x.scales, weight.scales, weight.scales if bias is None else bias, values, *eight)
    shared = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GELU": gelu,
        "HAS_BIAS": bias is not None, "SUM": tl.int32 if x.values.dtype == torch.int8 else tl.float32,
        "EIGHT": limits is not None, "num_warps": config.warps,
    }  # fmt: skip
    if config.form == "gluon":
        used = config.stages * (config.block_m + config.block_n) * config.block_k + 10240  # and where results change layout
        programs = min(tiles, min(8 // config.warps, SHARED_MEMORY // used) * multiprocessors(values.device))
        overlapping_kernel[(programs,)](
            *arguments, rows, first, second, columns, depth, programs,
            GROUP=TALL_ROWS // config.block_m, STAGES=config.stages, WARPS=config.warps, **shared,
        )  # fmt: skip
        return out
    shared |= {"GROUP": TALL, "num_stages": config.stages}
    if config.form == "persistent":
        programs = min(tiles, multiprocessors(values.device))
        _persistent_kernel[(programs,)](*arguments, rows, first, second, columns, depth, programs, **shared)
        return out
    even = depth % config.block_k == 0 or config.form != "pointer"
    _product_kernel[(tiles,)](
        *arguments, rows, first, second, columns, depth, TMA=config.form == "tma", EVEN=even, **shared
    )
    return out


def _descriptor(x: torch.Tensor, block: list[int], form: str):
    if form != "gluon":
        return TensorDescriptor.from_tensor(x, block)
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.int8 if x.dtype == torch.int8 else gl.float8e4nv)
    return GluonDescriptor(x, [*x.shape], [x.stride(0), 1], block, layout)


if triton is not None:
    # Row counts change with every prompt, and with them the row where a stream begins. Without `do_not_specialize` some
    # of these numbers would have a kernel compiled again.

    @triton.jit
    def _epilogue(
        total, row, end, column, weight, row_scales, column_scales, bias, out, norms, limits, out_scales, columns,
        GELU: tl.constexpr, HAS_BIAS: tl.constexpr, EIGHT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        scales_end = tl.where(column == 0, end, 0)  # a row's scale is written by its leftmost tile
        row += tl.arange(0, BLOCK_M)
        column += tl.arange(0, BLOCK_N)
        across = column < columns
        down = row < end
        value = total.to(tl.float32) * tl.load(row_scales + row, mask=down, other=0.0)[:, None]
        value = value * tl.load(column_scales + weight + column, mask=across, other=0.0)[None, :]
        if HAS_BIAS:
            value += tl.load(bias + weight + column, mask=across, other=0.0).to(tl.float32)[None, :]
        if GELU:
            value = gelu_tanh(value)
        if EIGHT:
            most = result_bound(norms, limits, row, down, weight)
            value = value * (448.0 / most)[:, None]
            tl.store(out_scales + row, most * (1.0 / 448.0), mask=row < scales_end)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=down[:, None] & across[None, :])

    @triton.jit(do_not_specialize=["rows", "first"], do_not_specialize_on_alignment=["row_scales", "norms"])
    def _product_kernel(
        a, b, row_scales, column_scales, bias, out, norms, limits, out_scales,
        rows, first, second, columns, depth,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
        TMA: tl.constexpr, EVEN: tl.constexpr,
        GELU: tl.constexpr, HAS_BIAS: tl.constexpr, SUM: tl.constexpr, EIGHT: tl.constexpr,
    ):  # fmt: skip
        row, end, column, weight = locate_tile(tl.program_id(0), rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP)
        down, across, inner = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        if not TMA:  # rows beyond the end read other rows: no masks in the loop, and their results are not stored
            a_at = a + (down % rows).to(tl.int64)[:, None] * depth + inner[None, :]
            b_at = b + (weight + across % columns).to(tl.int64)[None, :] * depth + inner[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
        for step in range(tl.cdiv(depth, BLOCK_K)):
            k = step * BLOCK_K
            if TMA:
                x = a.load([row, k])
                w = b.load([weight + column, k]).T
            elif EVEN:
                x = tl.load(a_at + k)
                w = tl.load(b_at + k)
            else:
                x = tl.load(a_at + k, mask=(k + inner < depth)[None, :], other=0.0)
                w = tl.load(b_at + k, mask=(k + inner < depth)[:, None], other=0.0)
            total = tl.dot(x, w, total, out_dtype=SUM)
        _epilogue(
            total, row, end, column, weight, row_scales, column_scales, bias, out, norms, limits, out_scales,
            columns, GELU, HAS_BIAS, EIGHT, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    @triton.jit(do_not_specialize=["rows", "first", "programs"], do_not_specialize_on_alignment=["row_scales", "norms"])
    def _persistent_kernel(
        a, b, row_scales, column_scales, bias, out, norms, limits, out_scales,
        rows, first, second, columns, depth, programs,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
        GELU: tl.constexpr, HAS_BIAS: tl.constexpr, SUM: tl.constexpr, EIGHT: tl.constexpr,
    ):  # fmt: skip
        tiles = (tl.cdiv(first, BLOCK_M) + tl.cdiv(rows - first, BLOCK_M)) * tl.cdiv(columns, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            row, end, column, weight = locate_tile(tile, rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP)
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
            for step in range(tl.cdiv(depth, BLOCK_K)):
                x = a.load([row, step * BLOCK_K])
                w = b.load([weight + column, step * BLOCK_K]).T
                total = tl.dot(x, w, total, out_dtype=SUM)
            _epilogue(
                total, row, end, column, weight, row_scales, column_scales, bias, out, norms, limits, out_scales,
                columns, GELU, HAS_BIAS, EIGHT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
