"""Compiles kernels for a Hopper GPU that is not here: the interpreter takes what the compiler refuses."""

import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

SHARED_MEMORY = 232448  # bytes that a program may have on an H200


def compiled(kernel, constants: dict, warps: int, types: dict[str, str], aligned: tuple[str, ...], stages: int = 3):
    """`kernel` with arguments of `types`, pointers to bfloat16 where that says nothing. Pointers and the integers
    `aligned` are multiples of 16. It fits into shared memory."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        Source = ASTSource
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    multiples = [n for n in names if signature[n].startswith("*") or n in aligned]
    source = Source(
        kernel, signature, {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in multiples},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= SHARED_MEMORY
    return made


def assembled(made, folder: Path) -> str:
    """What the assembler says about it. Nothing spills, no product waits for another because it could not follow them."""
    (folder / "kernel.ptx").write_text(made.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    assert "serialized" not in said, said
    return said
