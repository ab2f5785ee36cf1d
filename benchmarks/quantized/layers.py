"""8-bit linear layers of Qwen-Image's blocks against bfloat16's, on a GPU: alone, and in their place in a frame.

    python -m benchmarks.quantized layers --out benchmarks/results/h200-linear.json [--measure]

Weights are cold, as in a model that reads each layer once a step; calls stand one after the other in a CUDA graph. What is
compared is replayed in turns. Products are computed as the program computes them: as `quantization.choices` has it
for an H200; where that has no entry, or with `--measure`, in the best of all ways, which takes minutes.

Alone (`layer`): 16-bit rows in, 16-bit rows out; the rows' quantisation in a kernel of its own, product, scales and bias,
against `F.linear`. `product` leaves the quantisation out.

In place (`in_place`): what the fast path runs for a layer, against what it runs in bfloat16. Per shape, inputs -> outputs:
- 3072 -> 9216 (q, k, v): residual, norm, modulation and quantisation in one kernel, product with bias; against residual,
  norm and modulation in one kernel, `F.linear`.
- 3072 -> 12288 (MLP, up): the same, and GELU: in FP8 at the end of the product, which writes e4m3 rows and their scales;
  in INT8 not yet; in bfloat16 at the end of the product.
- 12288 -> 3072 (MLP, down): in FP8 the product with bias, of rows that came as e4m3; in INT8 GELU and quantisation in one
  kernel, then the product; against `F.linear` of rows that came through the GELU.
- 3072 -> 3072 (out): in FP8 the product with bias, of rows that 8-bit attention left as e4m3; in INT8 the rows quantised in
  a kernel of its own, then the product; against `F.linear`.
`in_place_gemm` is that less the time of bfloat16's norm kernel, measured in the same turns, on both sides: the product with
quantisation, bias and epilogue counted, and nothing else. `means` are geometric, over the four shapes.

With `--measure` also `pairs`: two layers, one for 220 rows of text and one for the picture's, in one launch or in two,
without quantisation.
"""

import argparse
import functools
import importlib.metadata
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fast_path.kernels import residual_norm_modulate, residual_norm_modulate_quantize
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from quantization.choices import PAIRS, row_bucket
from quantization.layer import QuantizedLinear
from quantization.pair import QuantizedPair
from quantization.products import multiply
from quantization.rows import Quantized, empty_rows
from quantization.tiles import PAIR_CANDIDATES, Config, fits
from quantization.timing import measure_us, record, replay_us

ROWS = (512, 2048, 5120)
SHAPES = ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072))  # inputs, outputs
BARS = {"int8": (1.2, 1.5, 1.75), "fp8": (1.4, 1.65, 1.8)}
WIDTH, TEXT_ROWS = 3072, 220
COLD_BYTES = 160e6


@torch.no_grad()
def layers(kind: type[QuantizedLinear], rows: int, inputs: int, outputs: int, measure: bool) -> dict:
    """One row of the table."""
    copies = int(max(4, COLD_BYTES // (inputs * outputs) + 1))
    floats = [
        nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False) for _ in range(copies)
    ]
    made = [kind.from_float(m) for m in floats]
    x, out = bfloats(rows, inputs), torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)
    first = made[0]
    find = functools.partial(first.measure, backends=tuple(first.backends(x.device, x.dtype, rows))) if measure else first.choice
    choice = find(rows, x.dtype)
    quantized, how = first.quantize(x), choice[:2]
    norm, plain, ours = in_place(floats, made, x, how, measure)
    bf16, layer, product, norm_us, plain_us, ours_us = alternately(
        [lambda m=m: F.linear(x, m.weight, m.bias) for m in floats],
        [lambda m=m: m.multiply(m.quantize(x), *how, out, False) for m in made],
        [lambda m=m: m.multiply(quantized, *how, out, False) for m in made],
        [norm] * copies,
        plain,
        ours,
    )
    norm_us *= outputs != WIDTH  # the others read what attention and the MLP gave
    exact = F.linear(x.float(), floats[0].weight.float(), floats[0].bias.float())
    error = first(x).float() - exact
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
        "in_place": {"bf16_us": round(plain_us, 2), "layer_us": round(ours_us, 2), "norm_us": round(norm_us, 2)},
        "product_tflops": round(2e-6 * rows * inputs * outputs / product, 1),
        "sqnr_db": round(float(10 * torch.log10(exact.square().sum() / error.square().sum())), 2),
        "reason": choice.reason,
    }


def in_place(floats: list[nn.Linear], made: list[QuantizedLinear], x: torch.Tensor, how: tuple, measure: bool) -> tuple:
    """The norm before a layer alone; then bfloat16's calls and ours, a copy of the weights each: see above."""
    rows, (outputs, inputs) = len(x), made[0].weight.shape
    table, kinds, eight_bit = bfloats(3, 6, WIDTH), torch.ones(rows, dtype=torch.int32, device="cuda"), made[0].eight_bit
    table[:, 0] = 0.0  # the gate: what is added a thousand times over is nothing
    modulation = bfloats(rows, WIDTH), bfloats(rows, WIDTH), *table.unbind(1)[:3], kinds, 1e-6

    def norm():
        return residual_norm_modulate(*modulation)

    out = torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)
    if outputs == WIDTH:
        given = None if eight_bit == torch.int8 else made[0].quantize(x)
        ours = [lambda m=m: m.multiply(given or m.quantize(x, gelu=inputs > WIDTH), *how, out, False) for m in made]
        return norm, [lambda m=m: F.linear(x, m.weight, m.bias) for m in floats], ours

    def quantized():
        return residual_norm_modulate_quantize(*modulation, eight_bit)

    ours = [lambda m=m: m.multiply(quantized(), *how, out, False) for m in made]
    if outputs == 3 * WIDTH:
        return norm, [lambda m=m: F.linear(norm(), m.weight, m.bias) for m in floats], ours
    if eight_bit != torch.int8:
        rows_out, limits = empty_rows(rows, outputs, eight_bit, "cuda"), torch.ones(2, 2, device="cuda")
        config = eight_bit_config(made, quantized(), rows_out, limits, measure)
        ours = [
            lambda m=m: multiply(
                quantized(), Quantized(m.weight, m.scale), m.bias, rows_out, config, True, limits=limits
            )
            for m in made
        ]
    plain = [lambda m=m: torch._addmm_activation(m.bias, norm(), m.weight.t(), use_gelu=True) for m in floats]
    return norm, plain, ours


def eight_bit_config(made: list[QuantizedLinear], x: Quantized, out: Quantized, limits, measure: bool) -> Config:
    """How the product whose result stays e4m3 is computed: as for a pair with the text's rows before these."""
    key = (made[0].kind, row_bucket(len(x.scales) + TEXT_ROWS), *made[0].weight.shape)
    if key in PAIRS and not measure and torch.cuda.get_device_capability() == (9, 0):
        return PAIRS[key][1]

    def time(config: Config) -> float:
        weights = [(Quantized(m.weight, m.scale), m.bias) for m in made]
        return measure_us([lambda w=w: multiply(x, *w, out, config, True, limits=limits) for w in weights])

    return min((c for c in PAIR_CANDIDATES if fits(c, len(x.scales), limits.device)), key=time)


def bfloats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def alternately(*calls: list) -> list[float]:
    """Microseconds a call of each list, the best of some turns: a chip that grows hot or slow does so for all of them."""
    graphs = [record(functions) for functions in calls]
    turns = [[replay_us(graph) / len(functions) for graph, functions in zip(graphs, calls)] for _ in range(12)]
    return [min(times) for times in zip(*turns[2:], strict=True)]


@torch.no_grad()
def pairs(kind: type[QuantizedLinear], rows: int, inputs: int, outputs: int) -> dict:
    """Two layers in one launch and in two, by `QuantizedPair`'s own measurement."""
    linears = [nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    pair = QuantizedPair(*([kind.from_float(m.requires_grad_(False))] for m in linears))
    choice = pair.measure(TEXT_ROWS + rows, TEXT_ROWS, torch.bfloat16)
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
    ratios = {
        "layer": lambda r: r["bf16_us"] / r["layer_us"],
        "product": lambda r: r["bf16_us"] / r["product_us"],
        "in_place": lambda r: r["in_place"]["bf16_us"] / r["in_place"]["layer_us"],
        "in_place_gemm": lambda r: _less_norm(r["in_place"], "bf16_us") / _less_norm(r["in_place"], "layer_us"),
    }
    found = []
    for kind, bars in BARS.items():
        for count, bar in zip(ROWS, bars, strict=True):
            these = [r for r in rows if (r["kind"], r["rows"]) == (kind, count)]
            mean = {name: round(statistics.geometric_mean(map(ratio, these)), 3) for name, ratio in ratios.items()}
            found.append({"kind": kind, "rows": count, **mean, "bar": bar})
    return found


def _less_norm(times: dict, name: str) -> float:
    return times[name] - times["norm_us"]


def environment(commit: str | None) -> dict:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {"kind": "linear", "device": torch.cuda.get_device_name(), **versions, "commit": commit}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--commit", help="of the code, for the result file")
    parser.add_argument("--measure", action="store_true", help="find the best way again, and measure pairs")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    cases = [(kind, rows, *shape) for rows in ROWS for shape in SHAPES for kind in (Int8Linear, Fp8Linear)]
    rows = []
    for case in cases:
        rows.append(layers(*case, args.measure))
        print(rows[-1], flush=True)
    result = environment(args.commit) | {"layers": rows, "means": means(rows)}
    if args.measure:
        result["pairs"] = [pairs(*case) for case in cases]
    for line in (*result["means"], *result.get("pairs", ())):
        print(line)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
