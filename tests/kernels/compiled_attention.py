"""The kernels of 8-bit attention compile for a Hopper GPU that is not here: nothing spills, accesses are wide.

Not collected by itself: the interpreter, once asked for, stays, so this needs a process of its own. `test_kernels.py`
runs this file.
"""

import re

import pytest
import triton
from support.hopper import assembled, compiled
from triton.experimental.gluon import language as gl

from fast_path import attention

STRIDES = ("q_stride", "k_stride", "v_stride", "out_stride", "sample_stride", "stride")
TYPES = (
    dict.fromkeys(("q", "k", "v"), "*fp8e4nv")
    | dict.fromkeys(("destinations", "row_types", "positions"), "*i32")
    | dict.fromkeys(("cos", "sin", "value_scales", "output_scale", "row_scales"), "*fp32")
    | dict.fromkeys(("eps", "q_factor", "k_factor", "scale"), "fp32")
    | dict.fromkeys((*STRIDES, "tokens", "rows", "keys", "q_sample", "k_sample"), "i32")
)


@pytest.mark.parametrize("move, move_q", [(False, False), (True, False), (True, True)])
def test_norm_rope_quantize(tmp_path, move, move_q):
    constants = {"MOVE": move, "MOVE_Q": move_q, "HEADS": 24, "BLOCK_HEADS": 8, "WIDTH": 128}
    made = compiled(attention._norm_rope_quantize_kernel, constants, 4, TYPES, STRIDES)
    assembled(made, tmp_path)
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return  # it stores queries and keys byte by byte: right, and slower
    stores = re.findall(r"st\.global\.v(\d)\.b(\d+)", made.asm["ptx"])
    assert {int(count) * int(bits) // 8 for count, bits in stores} == {8, 16}, "of values, of queries and keys"
    assert made.metadata.shared == 0, "nothing goes from one thread to another but sums"


def test_transposing(tmp_path):
    types = TYPES | {"v": "*i32", "out": "*i32"}
    made = compiled(attention._transpose_kernel, {"HEADS": 24, "FOURS": 32, "TILE": 16}, 4, types, STRIDES)
    assembled(made, tmp_path)
    loads, stores = (re.findall(rf"{what}\.global\.(v\d)\.b32", made.asm["ptx"]) for what in ("ld", "st"))
    assert loads == stores == ["v4"] * 4


@pytest.mark.parametrize("eight", [False, True])
def test_attention(tmp_path, eight):
    m, n = attention._BLOCK_M, attention._BLOCK_N
    constants = {
        "EIGHT": eight, "HEADS": 24, "WIDTH": 128, "BLOCK_M": m, "BLOCK_N": n, "RAISE": attention._RAISE,
        "STAGES": attention._STAGES, "WARPS": attention._WARPS,
    }  # fmt: skip
    types = TYPES | {"out": "*fp8e4nv" if eight else "*bf16"}
    for name, block in (("q", [m, 128]), ("k", [n, 128]), ("v", [128, n])):
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
        types[name] = f"tensordesc<fp8e4nv{block},{layout!r}>"
    made = compiled(attention._attend_kernel, constants, attention._WARPS, types, STRIDES)
    assembled(made, tmp_path)
    assert "cp.async.bulk.tensor" in made.asm["ptx"] and re.search(r"wgmma.mma_async.*e4m3.e4m3", made.asm["ptx"])
