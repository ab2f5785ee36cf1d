"""Attention of 8-bit queries, keys and values, e4m3, on Hopper's tensor cores; and what makes them 8 bits.

It has twice the tensor cores' rate of bfloat16 and reads half the bytes. e4m3 is floating point, so scales need not be
measured: they only have to keep numbers from overflowing and from underflowing, and 15 powers of two lie between the two.
A norm and a rotation bound queries and keys, |x| <= sqrt(d) max|weight| (`qk_scale`). For values any bound within some
powers of two of their usual size will do, one for each head (`value_scales`). So every number is rounded as soon as it is
known, and keys and values that are cached from other frames have the same scales as new ones.

8-bit tensor cores want the summed dimension contiguous in both operands. For the second product that dimension is the
tokens, so values are transposed before it (`transposed_values`). Their tokens are also put into another order: in each 16,
the one in which a thread holds the first product's results where the second product's operand needs them, so that
probabilities go from one product to the next without leaving their registers.

On the CPU the same functions are written in PyTorch: the definition that the kernels are tested against.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fast_path.kernels import Destinations
from quantization.languages import GluonDescriptor, barrier, begin_load, gl, gluon, hopper, mbarrier, tl, triton
from quantization.rows import Quantized

EIGHT = torch.float8_e4m3fn
LARGEST = 448.0
WIDTH = 128  # numbers of a head that the kernel of attention is written for
# Its tiles, in queries and in keys, its warps, and how many tiles ahead it loads keys and values.
_BLOCK_M, _BLOCK_N, _WARPS, _STAGES = 64, 128, 4, 2
_RAISE = 8.0  # probabilities are at most 2^8 in e4m3, the sum too: the smallest that is not zero is then 2^-17


class Scales(NamedTuple):
    """What numbers are divided by before they are rounded to e4m3: queries, keys, values, and the attention's output."""

    q: float
    k: float
    v: torch.Tensor  # float32 (H,), on the values' device
    output: torch.Tensor  # float32 (1,)


def refusal(device: torch.device, width: int) -> str | None:
    """Why attention of heads of `width` numbers cannot run in 8 bits on `device`, or None."""
    if device.type != "cuda":
        return None  # the definition runs everywhere
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not 9.0 (Hopper)"
    if triton is None:
        return "Triton is not installed"
    if gluon is None:
        return f"Triton {triton.__version__} comes without Gluon, which the kernel is written in"
    return None if width == WIDTH else f"heads are of {width} numbers, not {WIDTH}"


def qk_scale(weights: torch.Tensor) -> float:
    """The scale of vectors that were normed with one of `weights` (..., d) and rotated: none overflows."""
    return math.sqrt(weights.shape[-1]) * float(weights.abs().max()) / LARGEST


def value_scales(norms: torch.Tensor, heads: int) -> torch.Tensor:
    """float32 (H,) from the norms (H * d,) of the rows of the weight that makes values: the largest of each head.

    About as large as a usual value, as what the weight multiplies was normed: 2^8 times that still does not overflow.
    """
    return norms.float().view(heads, -1).amax(1).clamp_min(1e-12)


def output_scale(values: torch.Tensor) -> torch.Tensor:
    """float32 (1,) from the values' scales (H,). An output is a mean of values, the smaller the more values there are."""
    return values.amax(0, keepdim=True) / 8.0


def norm_rope_quantize(
    qkv: torch.Tensor,
    row_types: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    scales: Scales,
    to: Destinations,
    move_q: bool = True,
) -> None:
    """`fast_path.kernels.qk_norm_rope` and the values, rounded once to e4m3 and written to `to`.

    `to.q`, `to.k`, `to.v`: e4m3 (S, H, d), each row contiguous; row r goes to row `to.rows[r]`, or to row r if that is
    None. `to.q` is (R, H, d) in the rows' own order if not `move_q`.
    """
    if qkv.is_cuda:
        _norm_rope_quantize_triton(qkv, row_types, positions, weights, cos, sin, eps, scales, to, move_q)
        return
    x = qkv[:, :2].float()  # (R, 2, H, d)
    x = F.rms_norm(x, x.shape[-1:], eps=eps) * weights[(row_types % 3 == 0).long()].float().unsqueeze(2)
    even, odd, c, s = x[..., 0::2], x[..., 1::2], cos[positions][:, None, None], sin[positions][:, None, None]
    q, k = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).unbind(1)
    own = slice(len(qkv))
    rows = own if to.rows is None else to.rows
    to.q[rows if move_q else own] = _eight(q, scales.q)
    to.k[rows] = _eight(k, scales.k)
    to.v[rows] = _eight(qkv[:, 2].float(), scales.v[:, None])


def attend_fp8(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales, eight_bit: bool = False
) -> torch.Tensor | Quantized:
    """bfloat16 (B, R, H * d) from e4m3 queries (B, R, H, d), keys and values (B, S, H, d).

    Each row is contiguous. Strides of rows are multiples of 16, those of samples are multiples of those. `eight_bit`:
    instead e4m3 rows (B * R, H * d) for a layer that reads such, all with one scale.
    """
    if q.is_cuda:
        return _attend_gluon(q, k, transposed_values(v), scales, eight_bit)
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q * scales.q, k * scales.k, v * scales.v[:, None, None])
    attended = attended.transpose(1, 2).flatten(2)
    if not eight_bit:
        return attended.bfloat16()
    return Quantized(_eight(attended.flatten(0, 1), scales.output), scales.output.expand(attended.shape[0] * attended.shape[1]))


def transposed_values(v: torch.Tensor) -> torch.Tensor:
    """e4m3 (B, H, d, P) from (B, S, H, d): P is the next multiple of 128, what is beyond S is zeros.

    Bits 3, 2, 1, 0 of a token are bits 1, 3, 2, 0 of its column.
    """
    if v.is_cuda:
        return _transposed_values_triton(v)
    batch, count, heads, width = v.shape
    token = torch.arange(count, device=v.device)
    column = (token & ~15) | (token & 1) | (token & 6) << 1 | (token & 8) >> 2
    out = torch.zeros(batch, heads, width, -(-count // _BLOCK_N) * _BLOCK_N, dtype=v.dtype, device=v.device)
    out.view(torch.uint8)[..., column] = v.view(torch.uint8).permute(0, 2, 3, 1)
    return out


def _eight(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    return (x * (1 / scale)).clamp(-LARGEST, LARGEST).to(EIGHT)


def _norm_rope_quantize_triton(qkv, row_types, positions, weights, cos, sin, eps, scales, to, move_q, block=8, warps=4):
    count, _, heads, width = qkv.shape
    block = min(block, triton.next_power_of_2(heads))
    _norm_rope_quantize_kernel[(count, triton.cdiv(heads, block))](
        qkv, to.q, to.k, to.v, row_types if to.rows is None else to.rows, row_types, positions, weights, cos, sin, scales.v,
        to.q.stride(0), to.k.stride(0), to.v.stride(0), eps, 1 / scales.q, 1 / scales.k,
        MOVE=to.rows is not None, MOVE_Q=to.rows is not None and move_q,
        HEADS=heads, BLOCK_HEADS=block, WIDTH=width, num_warps=warps,
    )  # fmt: skip


def _transposed_values_triton(v: torch.Tensor, tile=64, warps=4) -> torch.Tensor:
    batch, count, heads, width = v.shape
    columns = triton.cdiv(count, _BLOCK_N) * _BLOCK_N
    out = v.new_empty(batch, heads, width, columns)
    fours, out_fours = v.view(torch.int32), out.view(torch.int32)
    _transpose_kernel[(columns // tile, heads, batch)](
        fours, out_fours, count, columns // 4, fours.stride(0), fours.stride(1),
        HEADS=heads, FOURS=width // 4, TILE=tile // 4, num_warps=warps,
    )  # fmt: skip
    return out


def _attend_gluon(q: torch.Tensor, k: torch.Tensor, values: torch.Tensor, scales: Scales, eight_bit=False):
    """With `transposed_values`."""
    (batch, rows, heads, width), keys = q.shape, k.shape[1]
    out = q.new_empty(batch, rows, heads * width, dtype=EIGHT if eight_bit else torch.bfloat16)
    row_scales = scales.output.new_empty(batch * rows) if eight_bit else scales.output
    factor = scales.q * scales.k * math.log2(math.e) / math.sqrt(width)
    values = values.flatten(0, 2)
    _attend_kernel[(triton.cdiv(rows, _BLOCK_M), heads, batch)](
        _described(q, _BLOCK_M), _described(k, _BLOCK_N),
        _descriptor(values, [*values.shape], values.stride(0), width, _BLOCK_N), scales.v,
        scales.output, out, row_scales, rows, keys, _sample_rows(q), _sample_rows(k), factor,
        EIGHT=eight_bit, HEADS=heads, WIDTH=width, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, RAISE=_RAISE, STAGES=_STAGES,
        WARPS=_WARPS, num_warps=_WARPS,
    )  # fmt: skip
    return Quantized(out.flatten(0, 1), row_scales) if eight_bit else out


def _sample_rows(x: torch.Tensor) -> int:
    """How many rows a sample of (B, N, H, d) begins after the one before it."""
    return x.stride(0) // x.stride(1)


def _described(x: torch.Tensor, block: int) -> "GluonDescriptor":
    """All rows of (B, N, H, d), and those between its samples, as one matrix."""
    batch, count, heads, width = x.shape
    assert x.stride()[2:] == (width, 1) and (batch == 1 or x.stride(0) % x.stride(1) == 0), (x.shape, x.stride())
    return _descriptor(x, [(batch - 1) * _sample_rows(x) + count, heads * width], x.stride(1), block, width)


def _descriptor(x: torch.Tensor, shape: list[int], stride: int, *block: int) -> "GluonDescriptor":
    layout = gl.NVMMASharedLayout.get_default_for([*block], gl.float8e4nv)
    return GluonDescriptor(x, shape, [stride, 1], [*block], layout)


if triton is not None:

    @triton.jit
    def _norm_rope_quantize_kernel(
        qkv, q, k, v, destinations, row_types, positions, weights, cos, sin, value_scales,
        q_stride, k_stride, v_stride, eps, q_factor, k_factor,
        MOVE: tl.constexpr, MOVE_Q: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Some heads of one row. Their queries and keys are one tile, of which a thread has 16 numbers: what it can
        store at once. With fewer cosines than threads each reads its own; else they come through shared memory."""
        row, first = tl.program_id(0), tl.program_id(1) * BLOCK_HEADS
        own = row.to(tl.int64)
        numbers, both = tl.arange(0, WIDTH)[None, :], tl.arange(0, 2 * BLOCK_HEADS)[:, None]
        is_key, head = both // BLOCK_HEADS, first + both % BLOCK_HEADS
        v_head = first + tl.arange(0, BLOCK_HEADS)[:, None]
        given = qkv + own * (3 * HEADS * WIDTH)
        x = tl.load(given + (is_key * HEADS + head) * WIDTH + numbers, mask=head < HEADS, other=0.0).to(tl.float32)
        value = tl.load(given + (2 * HEADS + v_head) * WIDTH + numbers, mask=v_head < HEADS, other=0.0).to(tl.float32)
        place = own
        if MOVE:
            place = tl.load(destinations + row).to(tl.int64)
        stream = tl.where(tl.load(row_types + row) % 3 == 0, 2, 0)
        pairs = tl.load(positions + row) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        value = value * (1.0 / tl.load(value_scales + v_head, mask=v_head < HEADS, other=1.0))
        weight = tl.load(weights + ((stream + is_key) * WIDTH + numbers)).to(tl.float32)
        c, s = tl.load(cos + pairs)[None, :], tl.load(sin + pairs)[None, :]
        value = tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv)
        tl.store(v + place * v_stride + v_head * WIDTH + numbers, value, mask=v_head < HEADS)
        factor = tl.where(is_key == 1, k_factor, q_factor)
        factor *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + eps)
        even, odd = tl.split(tl.reshape(x * factor * weight, (2 * BLOCK_HEADS, WIDTH // 2, 2)))
        rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (2 * BLOCK_HEADS, WIDTH))
        to = tl.where(is_key == 1, k + place * k_stride, q + (place if MOVE_Q else own) * q_stride)
        tl.store(to + head * WIDTH + numbers, rotated.to(tl.float8e4nv), mask=head < HEADS)

    @triton.jit
    def _even_bytes(low, high):
        return (low & 0x00FF00FF) | ((high & 0x00FF00FF) << 8)

    @triton.jit
    def _low_halves(low, high):
        return (low & 0xFFFF) | (high << 16)

    @triton.jit
    def _high_halves(low, high):
        return ((low >> 16) & 0xFFFF) | (high & -65536)

    @triton.jit(do_not_specialize=["tokens"])
    def _transpose_kernel(
        v, out, tokens, out_stride, sample_stride, stride, HEADS: tl.constexpr, FOURS: tl.constexpr, TILE: tl.constexpr
    ):
        """4 TILE tokens of one head, four bytes at a time: four numbers of a token come, four tokens of a number go."""
        fours, columns = tl.arange(0, FOURS), tl.program_id(0) * TILE + tl.arange(0, TILE)
        head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
        token = columns // 4 * 16 + columns % 4 * 2  # the first of those in the column of fours
        given = v + sample * sample_stride + head * FOURS + token.to(tl.int64)[:, None] * stride + fours[None, :]
        a = tl.load(given, mask=(token < tokens)[:, None], other=0)
        b = tl.load(given + stride, mask=(token + 1 < tokens)[:, None], other=0)
        c = tl.load(given + 8 * stride, mask=(token + 8 < tokens)[:, None], other=0)
        d = tl.load(given + 9 * stride, mask=(token + 9 < tokens)[:, None], other=0)
        ab, ab_odd = _even_bytes(a, b), _even_bytes(a >> 8, b >> 8)
        cd, cd_odd = _even_bytes(c, d), _even_bytes(c >> 8, d >> 8)
        even = tl.join(_low_halves(ab, cd), _high_halves(ab, cd))
        odd = tl.join(_low_halves(ab_odd, cd_odd), _high_halves(ab_odd, cd_odd))
        transposed = tl.trans(tl.reshape(tl.join(even, odd), (TILE, 4 * FOURS)))
        numbers = (sample * HEADS + head) * (4 * FOURS) + tl.arange(0, 4 * FOURS)
        tl.store(out + numbers[:, None] * out_stride + columns[None, :], transposed)


if gluon is not None:
    @gluon.jit
    def _exp2(x):
        return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)

    @gluon.jit
    def _fetch(source, row, column, buffers, barriers, block, wanted, STAGES: gl.constexpr):
        """Starts the load of one block into its slot of the ring, if `wanted`."""
        bar = barriers.index(block % STAGES)
        mbarrier.expect(bar, source.block_type.nbytes, pred=wanted)
        begin_load(source, [row, column], bar, buffers.index(block % STAGES), pred=wanted)

    @gluon.jit
    def _exponentials(s, m, total, scale, LAYOUT: gl.constexpr, RAISE: gl.constexpr):
        """One block of scores s (M, N) more: the new maximum, in powers of two, the new sum, 2^(s - maximum) as the
        operand that the second product reads from registers, and the factor by which all before has to fade."""
        M: gl.constexpr = s.shape[0]
        N: gl.constexpr = s.shape[1]
        more = gl.maximum(m, gl.max(s, 1) * scale - RAISE)
        p = _exp2(s * scale - more[:, None])
        fade = gl.exp2(m - more)
        total = total * fade + gl.sum(p, 1)
        p = gl.reshape(gl.permute(gl.reshape(p, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))
        return more, total, gl.convert_layout(p, LAYOUT, assert_trivial=True).to(gl.float8e4nv), fade

    @gluon.jit(do_not_specialize=["rows", "keys", "q_sample", "k_sample"])
    def _attend_kernel(
        q, k, v, value_scales, output_scale, out, row_scales, rows, keys, q_sample, k_sample, scale,
        EIGHT: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
        RAISE: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    ):  # fmt: skip
        """A block's second product runs while the next block's exponentials are computed. The last block comes first, full or not."""
        S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 32])
        OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 32])
        P: gl.constexpr = gl.DotOperandLayout(0, OUT, 4)
        row, head, sample = gl.program_id(0) * BLOCK_M, gl.program_id(1), gl.program_id(2)
        place, column, upper = sample * k_sample, head * WIDTH, (sample * HEADS + head) * WIDTH
        blocks = (keys + BLOCK_N - 1) // BLOCK_N
        whole = (blocks - 1) * BLOCK_N
        queries = gl.allocate_shared_memory(q.dtype, [1, BLOCK_M, WIDTH], q.layout)
        key_ring = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, WIDTH], k.layout)
        value_ring = gl.allocate_shared_memory(v.dtype, [STAGES, WIDTH, BLOCK_N], v.layout)
        q_bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(q_bar.index(0), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_bars.index(i), count=1)
            mbarrier.init(v_bars.index(i), count=1)
        hopper.fence_async_shared()
        barrier()
        _fetch(q, sample * q_sample + row, column, queries, q_bar, 0, True, 1)
        _fetch(k, place + whole, column, key_ring, k_bars, 0, True, STAGES)
        _fetch(v, upper, whole, value_ring, v_bars, 0, True, STAGES)
        for i in gl.static_range(1, STAGES):
            _fetch(k, place + (i - 1) * BLOCK_N, column, key_ring, k_bars, i, i < blocks, STAGES)
            _fetch(v, upper, (i - 1) * BLOCK_N, value_ring, v_bars, i, i < blocks, STAGES)
        m = gl.full((BLOCK_M,), -1e30, gl.float32, gl.SliceLayout(1, S))
        total = gl.full((BLOCK_M,), 0.0, gl.float32, gl.SliceLayout(1, S))
        nothing = gl.full((BLOCK_M, BLOCK_N), 0.0, gl.float32, S)
        attended = gl.full((BLOCK_M, WIDTH), 0.0, gl.float32, OUT)
        mbarrier.wait(q_bar.index(0), 0)
        mbarrier.wait(k_bars.index(0), 0)
        s = hopper.warpgroup_mma(queries.index(0), key_ring.index(0).permute((1, 0)), nothing, use_acc=False)
        s = gl.where((whole + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S)) < keys)[None, :], s, -1e30)
        attending = hopper.warpgroup_mma_init(attended)
        barrier()
        _fetch(k, place + (STAGES - 1) * BLOCK_N, column, key_ring, k_bars, STAGES, blocks > STAGES, STAGES)
        for block in range(0, blocks - 1):
            then = block + 1
            mbarrier.wait(k_bars.index(then % STAGES), (then // STAGES) & 1)
            keys_then = key_ring.index(then % STAGES).permute((1, 0))
            scores = hopper.warpgroup_mma(queries.index(0), keys_then, nothing, use_acc=False, is_async=True)
            m, total, p, fade = _exponentials(s, m, total, scale, P, RAISE)
            attended, s = hopper.warpgroup_mma_wait(0, deps=(attending, scores))
            attended = attended * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
            mbarrier.wait(v_bars.index(block % STAGES), (block // STAGES) & 1)
            values = value_ring.index(block % STAGES).permute((1, 0))
            attending = hopper.warpgroup_mma(p, values, attended, is_async=True)
            barrier()  # all warps are done with what these overwrite
            k_more, v_more = then + STAGES, block - 1 + STAGES
            _fetch(k, place + (k_more - 1) * BLOCK_N, column, key_ring, k_bars, k_more, k_more < blocks, STAGES)
            wanted = (block > 0) & (v_more < blocks)
            _fetch(v, upper, (v_more - 1) * BLOCK_N, value_ring, v_bars, v_more, wanted, STAGES)
        m, total, p, fade = _exponentials(s, m, total, scale, P, RAISE)
        attended = hopper.warpgroup_mma_wait(0, deps=(attending,))
        attended = attended * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
        last = blocks - 1
        mbarrier.wait(v_bars.index(last % STAGES), (last // STAGES) & 1)
        attended = hopper.warpgroup_mma(p, value_ring.index(last % STAGES).permute((1, 0)), attended)
        W: gl.constexpr = gl.BlockedLayout([1, 16 if EIGHT else 8], [4 if EIGHT else 2, 8 if EIGHT else 16], [WARPS, 1], [1, 0])
        factor = gl.load(value_scales + head) / total
        if EIGHT:
            factor /= gl.load(output_scale)
        attended = attended * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        if EIGHT:
            attended = gl.minimum(gl.maximum(attended, -448.0), 448.0)
        result = gl.convert_layout(attended.to(out.dtype.element_ty), W)
        down = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, W))
        across = column + gl.arange(0, WIDTH, gl.SliceLayout(0, W))
        at = (sample * rows + down).to(gl.int64)[:, None] * (HEADS * WIDTH) + across[None, :]
        gl.store(out + at, result, mask=(down < rows)[:, None])
        if EIGHT:  # all rows have one scale; the layer that reads them expects one for each row
            one = gl.full((BLOCK_M,), 0.0, gl.float32, gl.SliceLayout(1, W)) + gl.load(output_scale)
            gl.store(row_scales + sample * rows + down, one, mask=(down < rows) & (head == 0))
