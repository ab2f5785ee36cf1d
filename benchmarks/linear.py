"""8-bit linear layers alone, against bfloat16's `F.linear`: quantisation of the rows, product, scales and bias counted.

    python -m benchmarks.linear --out benchmarks/results/h200-linear.json

For the shapes of Qwen-Image's blocks and some numbers of rows. Weights are cold, as in a model that reads each layer once
a step; calls stand one after the other in a CUDA graph. Every way to multiply is measured, as the layers do themselves
for a shape that comes for the first time (`QuantizedLinear.choice`), and the best one counts. `pairs` are two layers, one
for 220 rows of text and one for the picture's, in one launch or in two, without quantisation.
"""

import argparse
import importlib.metadata
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import quantized_kernels as kernels
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from quantized_linear import QuantizedLinear, QuantizedPair

ROWS = (512, 2048, 5120)
SHAPES = ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072))  # inputs, outputs
BARS = {"int8": (1.2, 1.5, 1.75), "fp8": (1.4, 1.65, 1.8)}
TEXT_ROWS = 220
COLD_BYTES = 160e6


@torch.no_grad()
def layers(kind: type[QuantizedLinear], rows: int, inputs: int, outputs: int) -> dict:
    """One row of the table."""
    copies = int(max(4, COLD_BYTES // (inputs * outputs) + 1))
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    floats = [
        nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False) for _ in range(copies)
    ]
    made = [kind.from_float(m) for m in floats]
    choice = made[0]._measure(rows, torch.bfloat16, made[0].backends(x.device, x.dtype, rows))
    quantized, out = made[0].quantize(x), torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)
    how = choice[:2]
    bf16, layer, product = alternately(
        [lambda m=m: F.linear(x, m.weight, m.bias) for m in floats],
        [lambda m=m: m._run(m.quantize(x), *how, out, False) for m in made],
        [lambda m=m: m._run(quantized, *how, out, False) for m in made],
    )
    exact = F.linear(x.float(), floats[0].weight.float(), floats[0].bias.float())
    error = made[0](x).float() - exact
    return {
        "kind": kind.kind,
        "rows": rows,
        "inputs": inputs,
        "outputs": outputs,
        "backend": choice.backend,
        "config": choice.config and list(choice.config),
        "bf16_us": round(bf16, 2),
        "layer_us": round(layer, 2),
        "product_us": round(product, 2),
        "product_tflops": round(2e-6 * rows * inputs * outputs / product, 1),
        "sqnr_db": round(10 * math.log10(exact.square().sum() / error.square().sum()), 2),
        "reason": choice.reason,
    }


def alternately(*calls: list) -> list[float]:
    """Microseconds a call of each list, the best of some turns: a chip that grows hot or slow does so for all of them."""
    turns = [[kernels.measure_us(functions, rounds=2) for functions in calls] for _ in range(5)]
    return [min(times) for times in zip(*turns, strict=True)]


@torch.no_grad()
def pairs(kind: type[QuantizedLinear], rows: int, inputs: int, outputs: int) -> dict:
    """Two layers, together and apart, by `QuantizedPair`'s own measurement."""
    linears = [nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    pair = QuantizedPair(*([kind.from_float(m.requires_grad_(False))] for m in linears))
    choice = pair._measure(TEXT_ROWS + rows, TEXT_ROWS, torch.bfloat16)
    return {
        "kind": kind.kind,
        "rows": TEXT_ROWS + rows,
        "inputs": inputs,
        "outputs": outputs,
        "backend": choice.backend,
        "config": list(choice.config),
        "reason": choice.reason,
    }


def means(rows: list[dict]) -> list[dict]:
    """Geometric means over the shapes, against bfloat16, with the bar."""
    found = []
    for kind, bars in BARS.items():
        for count, bar in zip(ROWS, bars, strict=True):
            these = [r for r in rows if (r["kind"], r["rows"]) == (kind, count)]
            mean = {
                name: round(math.exp(sum(math.log(r["bf16_us"] / r[f"{name}_us"]) for r in these) / len(these)), 3)
                for name in ("layer", "product")
            }
            found.append({"kind": kind, "rows": count, **mean, "bar": bar})
    return found


def environment(commit: str | None) -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {"kind": "linear", "device": torch.cuda.get_device_name(), **versions, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--commit", help="of the code, for the result file")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases = [
        (kind, rows, *shape) for rows in ROWS for shape in SHAPES for kind in (Int8Linear, Fp8Linear)
    ]
    rows = []
    for case in cases:
        rows.append(layers(*case))
        print(rows[-1], flush=True)
    result = environment(args.commit) | {"layers": rows, "means": means(rows), "pairs": [pairs(*c) for c in cases]}
    for line in (*result["means"], *result["pairs"]):
        print(line)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
