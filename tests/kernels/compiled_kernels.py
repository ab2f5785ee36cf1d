"""The fused transformer's Triton kernels compile for a Hopper GPU that is not here.

The interpreter takes what the compiler refuses, such as a variable that changes its type in a branch. Not collected by
itself: the interpreter, once asked for, stays, so this needs a process of its own. `test_kernels.py` runs this file.
"""

import pytest
from support.hopper import assembled, compiled

from fast_path import kernels

TYPES = ("bf16", "fp16", "fp32")


def types_of(kernel, floats: str) -> dict[str, str]:
    """Integers and tables as they are, everything else in `floats`."""
    known = {"cos": "*fp32", "sin": "*fp32", "destinations": "*i32", "row_types": "*i32", "positions": "*i32", "eps": "fp32"}
    known |= {name: "i32" for name in kernel.arg_names if name.endswith("stride") or name == "width"}
    return dict.fromkeys(kernel.arg_names, f"*{floats}") | known


@pytest.mark.parametrize("floats", TYPES)
@pytest.mark.parametrize("added", [False, True])
def test_residual_norm_and_modulation(tmp_path, floats, added):
    kernel, constants = kernels._residual_norm_modulate_kernel, {"HAS_Y": added, "CLIP": floats == "fp16", "BLOCK": 4096}
    assembled(compiled(kernel, constants, 4, types_of(kernel, floats), ()), tmp_path)


@pytest.mark.parametrize("floats", TYPES)
@pytest.mark.parametrize("parts, move_q", [(2, False), (3, False), (3, True)])
def test_norm_and_rotation_of_queries_and_keys(tmp_path, floats, parts, move_q):
    constants = {"PARTS": parts, "MOVE_Q": move_q, "MOVE": parts == 3, "HEADS": 24, "BLOCK_HEADS": 8, "WIDTH": 128}
    kernel = kernels._qk_norm_rope_kernel
    assembled(compiled(kernel, constants, 4, types_of(kernel, floats), ()), tmp_path)
