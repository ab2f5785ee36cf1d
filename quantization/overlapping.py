"""The product of 8-bit matrices in Gluon, for Hopper: one block's product runs while the next one is begun.

Triton waits for each block's product with int8 before it begins the next. Here the kernel itself says when to wait: the
next block's product is under way before the last one's is waited for.
"""

from quantization.languages import barrier, begin_load, gl, gluon, hopper, mbarrier

if gluon is not None:
    from quantization.rows import gelu_tanh, result_bound
    from quantization.tiles import locate_tile

    @gluon.jit
    def _fetch(a, b, row, column, k, a_ring, b_ring, bars, step, wanted, STAGES: gl.constexpr):
        """Starts the load of one block of both matrices into their slots of the rings, if `wanted`."""
        bar = bars.index(step % STAGES)
        mbarrier.expect(bar, a.block_type.nbytes + b.block_type.nbytes, pred=wanted)
        begin_load(a, [row, k], bar, a_ring.index(step % STAGES), pred=wanted)
        begin_load(b, [column, k], bar, b_ring.index(step % STAGES), pred=wanted)

    @gluon.jit(do_not_specialize=["rows", "first", "programs"], do_not_specialize_on_alignment=["row_scales", "norms"])
    def overlapping_kernel(
        a, b, row_scales, column_scales, bias, out, norms, limits, out_scales,
        rows, first, second, columns, depth, programs,
        BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
        STAGES: gl.constexpr, WARPS: gl.constexpr,
        GELU: gl.constexpr, HAS_BIAS: gl.constexpr, SUM: gl.constexpr, EIGHT: gl.constexpr,
    ):  # fmt: skip
        """One product is always under way while the next is begun; blocks are loaded STAGES ahead, across tiles too.

        There are as many programs as can run at a time, and a program computes every `programs`-th tile."""
        WIDE: gl.constexpr = 128 if gl.int32 == SUM and BLOCK_N > 128 else BLOCK_N  # columns of one instruction
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
        row, end, column, weight = locate_tile(gl.program_id(0), rows, first, second, columns, BLOCK_M, BLOCK_N, GROUP)
        for i in gl.static_range(STAGES):
            _fetch(a, b, row, weight + column, i * BLOCK_K, a_ring, b_ring, bars, i, True, STAGES)
        step = 0
        for tile in range(gl.program_id(0), tiles, programs):
            then_row, then_end, then_column, then_weight = locate_tile(
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
                barrier()  # all warps are done with the block before this one: its slot is free
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
                value = gelu_tanh(value)
            if EIGHT:
                most = result_bound(norms, limits, down, down < end, weight)
                value = value * (448.0 / most)[:, None]
                gl.store(out_scales + down, most * (1.0 / 448.0), mask=(down < end) & (column == 0))
            result = gl.convert_layout(value.to(out.dtype.element_ty), WRITE)
            down = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, WRITE))
            across = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, WRITE))
            at = down.to(gl.int64)[:, None] * columns + across[None, :]
            gl.store(out + at, result, mask=(down < end)[:, None] & (across < columns)[None, :])
            row, end, column, weight = then_row, then_end, then_column, then_weight
