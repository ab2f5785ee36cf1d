"""Kernels of 8-bit linear layers: rows to 8 bits, and the product of two 8-bit matrices with its scales.

A row of activations is quantised by its own largest number: one kernel reads the row, may apply the GELU before it and
a rotation, and writes 8 bits and one float32 scale. `residual_norm_modulate_quantize` does it where the row is made
anyway, so that it costs nothing. The product accumulates int8 x int8 in int32, exactly, or e4m3 x e4m3 in float32; both
scales, the bias and, if asked for, the GELU are applied to the accumulator, and one rounded number is written.

On Hopper both operands lie with the summed dimension contiguous, as its 8-bit tensor cores demand. Four forms of one
kernel are measured against each other (`Config.form`): loads by pointer, loads by the tensor memory accelerator ("tma"),
the latter with as many programs as the GPU has multiprocessors, each of which fetches its next tile while it writes the
last ("persistent"), and that written in Gluon ("gluon"), where the next block's product is under way before the last
one's is waited for: Triton waits for each with int8. One launch may hold the products of two weights, one for the first
rows and one for the others (see `multiply`): text alone is so few rows that it leaves most of the GPU idle.

e4m3 results can leave a product quantised: an exponent forgives a scale that is some bits too large, so a bound known
before the sum serves, |x . w| <= |x| |w|. Rows bring their norms (`Quantized.norms`), weights theirs (`limits`). An int8
row would lose those bits: it has to be seen whole first.

On the CPU the same functions are written in PyTorch: the definition that the kernels are tested against.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch comes without it
    triton = None
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # it came with Triton 3.4
    gluon = None

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
GROUPS = (0, 16, 256)  # lengths of a rotation's groups; 0 is none
_TALL = 32  # rows of tiles that go through a weight together, and rows of Gluon's
_TALL_ROWS = 2048
_SHARED_MEMORY = 227 * 1024  # of a multiprocessor, Hopper
_TINY = 1e-30  # in place of the largest number of a row of zeros: finite inverse, zeros stay zeros


class Quantized(NamedTuple):
    """Rows of 8-bit numbers: values (R, K) int8 or float8_e4m3fn, scales (R,) float32; the rows are values * scales.

    norms (R,) float32: Euclidean, or None where nobody asked for them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    norms: torch.Tensor | None = None

    def part(self, rows: slice) -> "Quantized":
        return Quantized(self.values[rows], self.scales[rows], None if self.norms is None else self.norms[rows])

    def dequantized(self) -> torch.Tensor:
        """(R, K) float32"""
        return self.values.float() * self.scales[:, None]


class Config(NamedTuple):
    """How the Triton kernel computes a product. `form` is "pointer", "tma", "persistent" or "gluon"."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    form: str = "pointer"

    def __str__(self) -> str:
        return f"{self.form} {self.block_m}x{self.block_n}x{self.block_k}, {self.warps} warps, {self.stages} stages"


# What is measured where the table below has no entry: few, because each costs a second of compiling once.
CANDIDATES = (
    Config(64, 128, 128, 4, 4),
    Config(128, 128, 128, 4, 4),
    Config(128, 128, 128, 8, 4),
    Config(64, 128, 128, 4, 4, "tma"),
    Config(128, 128, 128, 8, 4, "tma"),
    Config(128, 256, 128, 8, 4, "persistent"),
    Config(128, 128, 128, 4, 3, "tma"),
    Config(128, 128, 128, 8, 3, "tma"),
    Config(64, 128, 128, 4, 3, "tma"),
    Config(64, 64, 128, 4, 6, "tma"),
    Config(64, 64, 128, 4, 6, "gluon"),
    Config(64, 128, 128, 4, 4, "gluon"),
    Config(128, 128, 128, 4, 3, "gluon"),
    Config(128, 128, 128, 8, 4, "gluon"),
    Config(128, 128, 128, 8, 6, "gluon"),
    Config(128, 256, 128, 8, 4, "gluon"),
    Config(256, 128, 128, 8, 4, "gluon"),
)

PAIR_CANDIDATES = (
    Config(64, 128, 128, 4, 4),
    Config(64, 128, 128, 4, 3, "tma"),
    Config(128, 128, 128, 8, 3, "tma"),
    Config(128, 128, 128, 4, 3, "tma"),
    Config(128, 256, 128, 8, 4, "persistent"),
    Config(64, 128, 128, 4, 4, "gluon"),
    Config(128, 128, 128, 4, 3, "gluon"),
    Config(128, 128, 128, 8, 4, "gluon"),
    Config(128, 256, 128, 8, 4, "gluon"),
    Config(256, 128, 128, 8, 4, "gluon"),
)


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """Each `group` neighbours of the last dimension by one orthogonal matrix: outliers are shared out among them.

    Float32. A regular Hadamard matrix (ConvRot, arXiv 2512.03673), whose rows all have the same sum: the usual one has a
    row of ones, which would gather the group's mean in one number. 16 is H4 x H4 with H4 = 1 but -1 on the antidiagonal;
    256 is H16 x H16 with the two factors exchanged, which saves the kernel a transposition. Inputs and weights rotated
    alike have the products that they had before.
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
    """Rows of x (R, K), contiguous, as `dtype` (int8 or float8_e4m3fn) with a scale each, symmetric around zero.

    In this order: GELU (tanh form), rotation in groups, the row's largest magnitude, rounding to even.
    """
    if not x.is_cuda or triton is None:
        return _quantize_rows_torch(x, dtype, group, gelu)
    return _quantize_rows_triton(x, dtype, group, gelu)


def residual_norm_modulate_quantize(x, y, gate, shift, scale, kinds, eps: float, dtype: torch.dtype) -> Quantized:
    """`fast_path.kernels.residual_norm_modulate` followed by `quantize_rows`, to the same bits, in one kernel on CUDA.

    Its arguments and the quantised type: x (R, D) becomes x + gate * y in place, the result is normed and modulated.
    """
    if not x.is_cuda:
        from fast_path.kernels import residual_norm_modulate  # the package imports this module

        return quantize_rows(residual_norm_modulate(x, y, gate, shift, scale, kinds, eps), dtype)
    return _norm_quantize_triton(x, y, gate, shift, scale, kinds, eps, dtype)


def finish(total: torch.Tensor, x_scales, weight_scales, bias, out: torch.Tensor, gelu: bool) -> torch.Tensor:
    """Into out (R, N), what follows the sums: times both scales, plus bias, GELU, rounded once to out's dtype."""
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
    """`finish(x.values @ weight.values.T, ...)` by the Triton kernel. weight: (N, K) with a scale a row, out: (R, N).

    A weight of (2 N, K), with its bias (2 N,), is two: one for the `first` rows and one for the others. `out` may be
    e4m3 `Quantized`, whose scales are written too: that needs the norms of x, and `limits`, float32 (2, 2), with the
    largest norm of an output's weights and the largest magnitude of its bias, for either weight.
    """
    values, scales = (out, out) if limits is None else out[:2]
    (rows, depth), columns = x.values.shape, values.shape[1]
    second = weight.values.shape[0] - columns
    assert second in (0, columns) and (second or not first), (weight.values.shape, values.shape, first)
    assert x.values.is_contiguous() and weight.values.is_contiguous() and values.is_contiguous()
    a, b = x.values, weight.values
    if config.form != "pointer":
        a = _described(a, [config.block_m, config.block_k], config.form)
        b = _described(b, [config.block_n, config.block_k], config.form)
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
        used = config.stages * (config.block_m + config.block_n) * config.block_k + 10240  # and what tiles pass through
        programs = min(tiles, min(8 // config.warps, _SHARED_MEMORY // used) * _multiprocessors(values.device))
        _overlapping_kernel[(programs,)](
            *arguments, rows, first, second, columns, depth, programs,
            GROUP=_TALL_ROWS // config.block_m, STAGES=config.stages, WARPS=config.warps, **shared,
        )  # fmt: skip
        return out
    shared |= {"GROUP": _TALL, "num_stages": config.stages}
    if config.form == "persistent":
        programs = min(tiles, _multiprocessors(values.device))
        _persistent_kernel[(programs,)](*arguments, rows, first, second, columns, depth, programs, **shared)
        return out
    even = depth % config.block_k == 0 or config.form != "pointer"
    _product_kernel[(tiles,)](
        *arguments, rows, first, second, columns, depth, TMA=config.form == "tma", EVEN=even, **shared
    )
    return out


def fits(config: Config, rows: int, device: torch.device) -> bool:
    """Whether `config` can run there and makes sense for so many rows."""
    capability = torch.cuda.get_device_capability(device)
    if config.form == "gluon" and (gluon is None or capability != (9, 0)):
        return False
    return (config.form == "pointer" or capability >= (9, 0)) and (config.block_m < 2 * rows or config.block_m == 64)


def tensor_cores_take(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel can run there: int8 from Ampere on, e4m3 from Ada on."""
    least = (8, 0) if dtype == torch.int8 else (8, 9)
    return triton is not None and torch.cuda.get_device_capability(device) >= least


def measure_us(functions: list[Callable[[], object]], rounds: int = 4) -> float:
    """Microseconds a call of `functions`, one after the other in a CUDA graph, the best of `rounds` replays.

    Give each its own weights, together larger than the L2 cache, and the weights are read from memory as in a model.
    """
    graph = recorded(functions)
    return min([replay_us(graph) for _ in range(rounds + 1)][1:]) / len(functions)


@torch.no_grad()
def recorded(functions: list[Callable[[], object]]) -> "torch.cuda.CUDAGraph":
    """All of them, one after the other, in a CUDA graph."""
    for function in (functions[0], *functions):
        function()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_measuring_stream(torch.cuda.current_device())):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for function in functions:
                function()
        finally:
            graph.capture_end()
    return graph


def replay_us(graph: "torch.cuda.CUDAGraph") -> float:
    """Microseconds that one replay takes."""
    with torch.cuda.stream(_measuring_stream(torch.cuda.current_device())):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _quantize_rows_torch(x, dtype, group, gelu) -> Quantized:
    value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    value = rotate(value, group)
    most = value.abs().amax(1).clamp_min(_TINY)
    # A number divided by a tensor is its reciprocal times the number in PyTorch: rounded twice, unlike the kernel's.
    value = value * (torch.full_like(most, LARGEST[dtype]) / most)[:, None]
    return Quantized((value.round() if dtype == torch.int8 else value).to(dtype), most * (1.0 / LARGEST[dtype]))


def _quantize_rows_triton(x, dtype, group, gelu) -> Quantized:
    count, width = x.shape
    assert x.is_contiguous() and (not group or width % group == 0), (x.shape, x.stride(), group)
    out = empty(count, width, dtype, x.device)
    if group:
        block = triton.next_power_of_2(width)
        _rotate_rows_kernel[(count,)](
            x, *out[:2], width, LARGEST=LARGEST[dtype], TINY=_TINY, GROUP=group, GELU=gelu, BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )  # fmt: skip
        return out
    block, parts = _parts(width)
    _quantize_rows_kernel[(count,)](
        x, *out[:2], width, LARGEST=LARGEST[dtype], TINY=_TINY, GELU=gelu, BLOCK=block, PARTS=parts,
        num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out


def _norm_quantize_triton(x, y, gate, shift, scale, kinds, eps, dtype) -> Quantized:
    count, width = x.shape
    norms = dtype == torch.float8_e4m3fn
    out = empty(count, width, dtype, x.device, norms)
    _norm_quantize_kernel[(count,)](
        x, x if y is None else y, *out[:2], out.norms if norms else out.scales, shift if gate is None else gate, shift,
        scale, kinds, 0 if gate is None else gate.stride(0), shift.stride(0), width, eps,
        HAS_Y=y is not None, CLIP=x.dtype == torch.float16, LARGEST=LARGEST[dtype], TINY=_TINY, NORMS=norms,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


def empty(rows: int, width: int, dtype: torch.dtype, device, norms: bool = False) -> Quantized:
    """Not yet written; the caller's kernel writes the norms too if it asks for them."""
    numbers = torch.empty(2 if norms else 1, rows, dtype=torch.float32, device=device)
    return Quantized(torch.empty(rows, width, dtype=dtype, device=device), *numbers)


def _parts(width: int) -> tuple[int, int]:
    """A row as some pieces of a power of two each, (length, how many): masked lanes cost as much as others."""
    odd = width // (width & -width)
    return (width // odd, odd) if odd <= 7 else (triton.next_power_of_2(width), 1)


@functools.cache
def _measuring_stream(device: int) -> torch.cuda.Stream:
    """One for all: libraries keep a workspace for every stream that they saw."""
    return torch.cuda.Stream(device)


def _described(x: torch.Tensor, block: list[int], form: str):
    if form != "gluon":
        return TensorDescriptor.from_tensor(x, block)
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.int8 if x.dtype == torch.int8 else gl.float8e4nv)
    return GluonDescriptor(x, [*x.shape], [x.stride(0), 1], block, layout)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


if triton is not None:
    # Row counts change with every prompt, and with them where a stream's rows begin: without `do_not_specialize` some of
    # them would compile a kernel anew.

    if triton.knobs.runtime.interpret:  # which knows no assembly

        @triton.jit
        def _tanh(x):
            return 2.0 * tl.sigmoid(2.0 * x) - 1.0

        @triton.jit
        def _nearest(x):
            return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no fraction there, rounds to even
    else:

        @triton.jit
        def _tanh(x):
            """One instruction, 11 bits: more than bfloat16 keeps. GELUs are most of what a row's quantisation computes."""
            return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)

        @triton.jit
        def _nearest(x):
            """To even. An addition that does it would be fused with the multiplication before it, and know no ties."""
            return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], tl.int32, True, 1)

    @triton.jit
    def _gelu(x):
        half = 0.5 * x
        return half + half * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x))

    @triton.jit
    def _rounded(value, dtype: tl.constexpr):
        if dtype == tl.int8:
            value = _nearest(value)
        return value.to(dtype)

    @triton.jit
    def _store_quantized(value, at, inside, values, scales, row, LARGEST: tl.constexpr, TINY: tl.constexpr):
        most = tl.maximum(tl.max(tl.abs(value)), TINY)
        factor = tl.div_rn(tl.full((), LARGEST, tl.float32), most)
        tl.store(values + at, _rounded(value * factor, values.dtype.element_ty), mask=inside)
        tl.store(scales + row, most * (1.0 / LARGEST))

    @triton.jit
    def _quantize_rows_kernel(
        x, values, scales, width,
        LARGEST: tl.constexpr, TINY: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        row = tl.num_programs(0) - 1 - tl.program_id(0)  # what was written last is still in L2, so are then the first rows
        columns = tl.arange(0, BLOCK)
        at = row.to(tl.int64) * width + columns
        kept = ()
        most = TINY
        for part in tl.static_range(PARTS):
            inside = part * BLOCK + columns < width
            value = tl.load(x + at + part * BLOCK, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if GELU:
                value = _gelu(value)
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
            value = _gelu(value)
        i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        signs = ((i // 4 + j // 4 == 3) != (i % 4 + j % 4 == 3)).to(tl.float32)
        hadamard = 0.25 - 0.5 * signs
        value = tl.dot(value, hadamard, input_precision="tf32")
        if GROUP == 256:
            value = tl.permute(tl.reshape(value, (BLOCK // 256, 16, 16)), (0, 2, 1))
            value = tl.dot(tl.reshape(value, (BLOCK // 16, 16)), hadamard, input_precision="tf32")
        _store_quantized(value, at, inside, values, scales, row, LARGEST, TINY)

    @triton.jit
    def residual_norm_modulated(
        row, x, y, gate, shift, scale, kinds, gate_stride, stride, width, eps,
        HAS_Y: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """What `fast_path.kernels.residual_norm_modulate` computes, for one row: x is written, the result float32 (BLOCK,)."""
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        at = row.to(tl.int64) * width + columns
        kind = tl.load(kinds + row)
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
        return normed * factor + tl.load(shift + modulation, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _norm_quantize_kernel(
        x, y, values, scales, norms, gate, shift, scale, kinds, gate_stride, stride, width, eps,
        HAS_Y: tl.constexpr, CLIP: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, NORMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        moved = residual_norm_modulated(
            row, x, y, gate, shift, scale, kinds, gate_stride, stride, width, eps, HAS_Y, CLIP, BLOCK
        )
        moved = moved.to(x.dtype.element_ty).to(tl.float32)  # the same bits as in two kernels; beyond the row zeros
        if NORMS:
            tl.store(norms + row, tl.sqrt(tl.sum(moved * moved)))
        columns = tl.arange(0, BLOCK)
        at = row.to(tl.int64) * width + columns
        _store_quantized(moved, at, columns < width, values, scales, row, LARGEST, TINY)

    @triton.jit
    def _place(
        tile, rows, first, second, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
    ):
        """A tile's first row and the end of its rows, its first column, and where its weight's rows begin.

        GROUP rows of tiles go through the columns together: their weights stay in L2.
        """
        upper = tl.cdiv(first, BLOCK_M)
        tall, wide = upper + tl.cdiv(rows - first, BLOCK_M), tl.cdiv(columns, BLOCK_N)
        above = tile // (GROUP * wide) * GROUP
        height = tl.minimum(tall - above, GROUP)
        inner = tile % (GROUP * wide)
        m = above + inner % height
        is_first = m < upper
        row = tl.where(is_first, m * BLOCK_M, first + (m - upper) * BLOCK_M)
        return row, tl.where(is_first, first, rows), inner // height * BLOCK_N, tl.where(is_first, 0, second)

    @triton.jit
    def _bound(norms, limits, rows, inside, weight):
        """Of rows' results before the sums are known: what e4m3 numbers are scaled by. 2^-4 is what rounding to e4m3
        may have added to a row's norm; the sum itself rounds much finer."""
        limits += 2 * (weight > 0).to(tl.int32)
        return tl.load(norms + rows, mask=inside, other=1.0) * tl.load(limits) * 1.08 + (tl.load(limits + 1) + 1e-30)

    @triton.jit
    def _finish(
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
            value = _gelu(value)
        if EIGHT:
            most = _bound(norms, limits, row, down, weight)
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
        row, end, column, weight = _place(tl.program_id(0), rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP)
        down, across, inner = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        if not TMA:  # rows beyond the last read others in their place: no masks in the loop, and none of it is stored
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
        _finish(
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
            row, end, column, weight = _place(tile, rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP)
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
            for step in range(tl.cdiv(depth, BLOCK_K)):
                x = a.load([row, step * BLOCK_K])
                w = b.load([weight + column, step * BLOCK_K]).T
                total = tl.dot(x, w, total, out_dtype=SUM)
            _finish(
                total, row, end, column, weight, row_scales, column_scales, bias, out, norms, limits, out_scales,
                columns, GELU, HAS_BIAS, EIGHT, BLOCK_M, BLOCK_N,
            )  # fmt: skip


if gluon is not None:
    # Gluon is young: these two have other names in Triton 3.6 than in 3.9.
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    begin_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

    @gluon.jit
    def _fetch(a, b, row, column, k, a_ring, b_ring, bars, step, wanted, STAGES: gl.constexpr):
        """Begins to load a block of both into their places of the rings, if it is wanted."""
        bar = bars.index(step % STAGES)
        mbarrier.expect(bar, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
        begin_load(a, [row, k], bar, a_ring.index(step % STAGES), pred=wanted)
        begin_load(b, [column, k], bar, b_ring.index(step % STAGES), pred=wanted)

    @gluon.jit(do_not_specialize=["rows", "first", "programs"], do_not_specialize_on_alignment=["row_scales", "norms"])
    def _overlapping_kernel(
        a, b, row_scales, column_scales, bias, out, norms, limits, out_scales,
        rows, first, second, columns, depth, programs,
        BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
        STAGES: gl.constexpr, WARPS: gl.constexpr,
        GELU: gl.constexpr, HAS_BIAS: gl.constexpr, SUM: gl.constexpr, EIGHT: gl.constexpr,
    ):  # fmt: skip
        """One product is always under way while the next is begun; blocks are loaded STAGES ahead, across tiles too.

        As many programs as can run at a time, each computes every so manyth tile."""
        WIDE: gl.constexpr = 128 if gl.int32 == SUM and BLOCK_N > 128 else BLOCK_N  # an instruction's columns
        TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDE, 32])
        DOWN: gl.constexpr = gl.SliceLayout(1, TILE)
        ACROSS: gl.constexpr = gl.SliceLayout(0, TILE)
        LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        PIECE: gl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # 16 bytes
        LANES: gl.constexpr = BLOCK_N // PIECE if BLOCK_N < 32 * PIECE else 32
        WRITE: gl.constexpr = gl.BlockedLayout([1, PIECE], [32 // LANES, LANES], [WARPS, 1], [1, 0])
        a_ring = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_M, BLOCK_K], a.layout)
        b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
        bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(bars.index(i), count=1)
        hopper.fence_async_shared()
        barrier()
        tiles = (gl.cdiv(first, BLOCK_M) + gl.cdiv(rows - first, BLOCK_M)) * gl.cdiv(columns, BLOCK_N)
        blocks = gl.maximum(gl.cdiv(depth, BLOCK_K), STAGES)  # beyond the depth zeros are loaded
        row, end, column, weight = _place(gl.program_id(0), rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP)
        for i in gl.static_range(STAGES):
            _fetch(a, b, row, weight + column, i * BLOCK_K, a_ring, b_ring, bars, i, True, STAGES)
        step = 0
        for tile in range(gl.program_id(0), tiles, programs):
            then_row, then_end, then_column, then_weight = _place(
                tile + programs, rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP
            )
            more = tile + programs < tiles
            down, line = row + gl.arange(0, BLOCK_M, DOWN), column + gl.arange(0, BLOCK_N, LINE)
            row_factor = gl.load(row_scales + down, mask=down < end, other=0.0)
            column_factor = gl.load(column_scales + weight + line, mask=line < columns, other=0.0)
            if HAS_BIAS:
                added = gl.load(bias + weight + line, mask=line < columns, other=0.0)
            total = gl.full((BLOCK_M, BLOCK_N), 0, SUM, TILE)
            for k in range(0, blocks):
                here = (step + k) % STAGES
                mbarrier.wait(bars.index(here), ((step + k) // STAGES) & 1)
                total = hopper.warpgroup_mma(
                    a_ring.index(here), b_ring.index(here).permute((1, 0)), total, use_acc=k > 0, is_async=True
                )
                total = hopper.warpgroup_mma_wait(1, deps=(total,))
                barrier()  # all warps are done with the block before this one: its place is free
                ahead = k - 1 + STAGES
                same = ahead < blocks
                _fetch(
                    a, b, gl.where(same, row, then_row), gl.where(same, weight + column, then_weight + then_column),
                    gl.where(same, ahead, ahead - blocks) * BLOCK_K,
                    a_ring, b_ring, bars, step + k + STAGES - 1, (k > 0) & (same | more), STAGES,
                )  # fmt: skip
            total = hopper.warpgroup_mma_wait(0, deps=(total,))
            barrier()
            step += blocks
            _fetch(
                a, b, then_row, then_weight + then_column, (STAGES - 1) * BLOCK_K,
                a_ring, b_ring, bars, step + STAGES - 1, more, STAGES,
            )  # fmt: skip
            value = total.to(gl.float32) * row_factor[:, None] * gl.convert_layout(column_factor, ACROSS)[None, :]
            if HAS_BIAS:
                value += gl.convert_layout(added.to(gl.float32), ACROSS)[None, :]
            if GELU:
                value = _gelu(value)
            if EIGHT:
                most = _bound(norms, limits, down, down < end, weight)
                value = value * (448.0 / most)[:, None]
                gl.store(out_scales + down, most * (1.0 / 448.0), mask=(down < end) & (column == 0))
            result = gl.convert_layout(value.to(out.dtype.element_ty), WRITE)
            down = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, WRITE))
            across = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, WRITE))
            at = down.to(gl.int64)[:, None] * columns + across[None, :]
            gl.store(out + at, result, mask=(down < end)[:, None] & (across < columns)[None, :])
            row, end, column, weight = then_row, then_end, then_column, then_weight
