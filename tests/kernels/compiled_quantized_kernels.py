"""The Triton kernels of the 8-bit linear layers compile for a Hopper GPU that is not here, and fit into its shared memory.

The interpreter takes what the compiler refuses. Not collected by itself: the interpreter, once asked for, stays, so this
needs a process of its own. `test_kernels.py` runs this file.
"""

import re

import pytest
import triton.language as tl
from support.hopper import assembled, compiled
from triton.experimental.gluon import language as gl

from fast_path.kernels import _norm_quantize_kernel
from quantization.overlapping import overlapping_kernel
from quantization.products import _persistent_kernel, _product_kernel
from quantization.rows import _pieces, _quantize_rows_kernel, _rotate_rows_kernel
from quantization.tiles import PAIR_CANDIDATES

ALIGNED = ("second", "columns", "depth", "width")
TYPES = (
    dict.fromkeys(("row_scales", "column_scales", "norms", "limits", "out_scales", "scales"), "*fp32")
    | dict.fromkeys(("rows", "first", "second", "columns", "depth", "programs", "width", "stride", "gate_stride"), "i32")
    | {"row_types": "*i32", "eps": "fp32"}
)


FIRST_OF_ITS_FORM = {config.form: config for config in reversed(PAIR_CANDIDATES)}.values()


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c in FIRST_OF_ITS_FORM else pytest.mark.endurance) for c in PAIR_CANDIDATES],
    ids=str,
)
@pytest.mark.parametrize("kind, eight", [("i8", False), ("fp8e4nv", True)])
def test_products(tmp_path, config, kind, eight):
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP": 8, "GELU": eight,
        "HAS_BIAS": True, "EIGHT": eight, "SUM": tl.int32 if kind == "i8" else tl.float32,
    }  # fmt: skip
    kernel, shapes = _persistent_kernel, ([config.block_m, config.block_k], [config.block_n, config.block_k])
    matrices = [f"tensordesc<{kind}{shape}>" for shape in shapes]
    if config.form == "gluon":
        kernel, constants = overlapping_kernel, constants | {"STAGES": config.stages, "WARPS": config.warps}
        number = gl.int8 if kind == "i8" else gl.float8e4nv
        layouts = [gl.NVMMASharedLayout.get_default_for(shape, number) for shape in shapes]
        matrices = [f"tensordesc<{kind}{shape},{layout!r}>" for shape, layout in zip(shapes, layouts, strict=True)]
    elif config.form != "persistent":
        kernel, constants = _product_kernel, constants | {"TMA": config.form == "tma", "EVEN": True}
    if config.form == "pointer":
        matrices = [f"*{kind}"] * 2
    types = TYPES | dict(zip("ab", matrices, strict=True)) | {"out": "*fp8e4nv" if eight else "*bf16"}
    made = compiled(kernel, constants, config.warps, types, ALIGNED, config.stages)
    assembled(made, tmp_path)
    assert "wgmma.mma_async" in made.asm["ptx"], "Hopper's own matrix instruction"
    assert ("cp.async.bulk.tensor" in made.asm["ptx"]) == (config.form != "pointer")
    waits = re.findall(r"wgmma.wait_group.sync.aligned (\d)", made.asm["ptx"])
    assert config.form != "gluon" or waits.count("1") == 1, "a product is under way while another is waited for"


@pytest.mark.parametrize("kind, largest", [("i8", 127.0), ("fp8e4nv", 448.0)])
def test_rows(kind, largest):
    numbers, types = {"LARGEST": largest, "TINY": 1e-30}, TYPES | {"values": f"*{kind}"}
    block, parts = _pieces(12288)
    assert (block, parts) == (4096, 3)
    gelu = numbers | {"GELU": True}
    made = compiled(_quantize_rows_kernel, gelu | {"BLOCK": block, "PARTS": parts}, 8, types, ALIGNED)
    assert "tanh.approx.f32" in made.asm["ptx"] and re.search(r"ld\.global\S*\.v4", made.asm["ptx"]), "16 bytes a load"
    assert compiled(_rotate_rows_kernel, gelu | {"GROUP": 256, "BLOCK": 16384}, 16, types, ALIGNED)
    norm = {"HAS_Y": True, "CLIP": False, "NORMS": kind != "i8", "BLOCK": 4096}
    assert compiled(_norm_quantize_kernel, numbers | norm, 4, types, ALIGNED)
