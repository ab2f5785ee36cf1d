"""The Triton kernels of the 8-bit linear layers compile for a Hopper GPU that is not here, and fit into its shared memory.

The interpreter takes what the compiler refuses. Not collected by itself: the interpreter, once asked for, stays, so this
needs a process of its own. `test_int8_linear.py` runs this file.
"""

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import quantized_kernels as kernels

SHARED_MEMORY = 232448  # bytes that a program may have on an H200
POINTERS = {
    "row_scales": "*fp32", "column_scales": "*fp32", "norms": "*fp32", "limits": "*fp32", "out_scales": "*fp32",
    "scales": "*fp32", "sums": "*i32", "arrived": "*i32", "kinds": "*i32", "eps": "fp32",
}  # fmt: skip
INTEGERS = ("rows", "first", "second", "columns", "depth", "programs", "width", "stride", "gate_stride")


def compiled(kernel, types: dict[str, str], constants: dict, warps: int, stages: int = 3):
    names = kernel.arg_names
    known = {name: "*bf16" for name in names} | POINTERS | dict.fromkeys(INTEGERS, "i32") | types
    signature = {name: "constexpr" if name in constants else known[name] for name in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in ("second", "columns", "depth", "width")]
    source = ASTSource(
        kernel, signature, {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


@pytest.mark.parametrize("config", kernels.PAIR_CANDIDATES, ids=str)
@pytest.mark.parametrize("kind, eight", [("i8", False), ("fp8e4nv", True)])
def test_products(config, kind, eight):
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP": 8, "GELU": eight,
        "HAS_BIAS": True, "EIGHT": eight, "SUM": tl.int32 if kind == "i8" else tl.float32,
    }  # fmt: skip
    types = {"a": f"*{kind}", "b": f"*{kind}"}
    if config.form != "pointer":
        shapes = {"a": [config.block_m, config.block_k], "b": [config.block_n, config.block_k]}
        types = {name: f"tensordesc<{kind}{shape}>" for name, shape in shapes.items()}
    kernel = kernels._persistent_kernel
    if config.form != "persistent":
        kernel = kernels._product_kernel
        constants |= {"TMA": config.form == "tma", "EVEN": True}
    types["out"] = "*fp8e4nv" if eight else "*bf16"
    made = compiled(kernel, types, constants, config.warps, config.stages)
    assert made.metadata.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in made.asm["ptx"], "Hopper's own matrix instruction"
    assert ("cp.async.bulk.tensor" in made.asm["ptx"]) == (config.form != "pointer")


@pytest.mark.parametrize("kind, largest", [("i8", 127.0), ("fp8e4nv", 448.0)])
def test_rows(kind, largest):
    numbers, types = {"LARGEST": largest, "TINY": 1e-30}, {"values": f"*{kind}"}
    block, parts = kernels._parts(12288)
    assert (block, parts) == (4096, 3)
    made = compiled(kernels._quantize_rows_kernel, types, numbers | {"GELU": True, "BLOCK": block, "PARTS": parts}, 8)
    assert "tanh.approx.f32" in made.asm["ptx"] and "ld.global.v4" in made.asm["ptx"], "16 bytes a load"
    assert compiled(kernels._rotate_rows_kernel, types, numbers | {"GROUP": 256, "GELU": True, "BLOCK": 16384}, 16)
    norm = {"HAS_Y": True, "CLIP": False, "NORMS": kind != "i8", "BLOCK": 4096}
    assert compiled(kernels._norm_quantize_kernel, types, numbers | norm, 4)
