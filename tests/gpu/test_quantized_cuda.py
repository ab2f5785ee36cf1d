"""8-bit linear layers on a GPU: every kernel form against exact integers, every backend, recordings. Skipped without one."""

import pytest
import torch
import torch.nn.functional as F
from support.models import sqnr_db
from torch import nn

from fast_path.graphs import Graphs
from fast_path.kernels import residual_norm_modulate, residual_norm_modulate_quantize
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from quantization.choices import Choices, row_bucket
from quantization.languages import triton
from quantization.layer import QuantizedLinear
from quantization.pair import QuantizedPair
from quantization.products import multiply
from quantization.rows import Quantized, quantize_rows, quantize_rows_torch
from quantization.swap import swap_linears
from quantization.tiles import CANDIDATES, PAIR_CANDIDATES, Config, fits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or triton is None, reason="needs a CUDA GPU and Triton"
)
SHAPES = [(1, 3072, 3072), (17, 256, 768), (220, 12288, 3072), (513, 3072, 9216), (100, 272, 80)]


def linear(inputs=3072, outputs=3072) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False)


def whole_numbers(config: Config, *shapes: tuple[int, int]) -> tuple[list[torch.Tensor], torch.dtype]:
    """int8 matrices, and a dtype that holds all sums of their products exactly.

    Shared memory has no room for the largest tiles' float32 results: theirs are bfloat16, of few ones and many zeros.
    """
    needed = config.stages * (config.block_m + config.block_n) * config.block_k + config.block_m * config.block_n * 4
    if config.form not in ("persistent", "gluon") or needed < 2**17 + 2**16:
        return [torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda") for shape in shapes], torch.float32
    some = [torch.randint(-1, 2, s, device="cuda") * (torch.rand(s, device="cuda") < 0.3) for s in shapes]
    return [t.to(torch.int8) for t in some], torch.bfloat16


def usable(config: Config, rows: int) -> bool:
    return fits(config, row_bucket(rows), torch.device("cuda"))


@pytest.mark.parametrize("rows, inputs, outputs", SHAPES)
@pytest.mark.parametrize("config", CANDIDATES, ids=str)
def test_integer_sums_are_exact(config, rows, inputs, outputs):
    if not usable(config, rows):
        pytest.skip("not for this shape or this GPU")
    (a, b), dtype = whole_numbers(config, (rows, inputs), (outputs, inputs))
    exact = torch._int_mm(F.pad(a, (0, 0, 0, max(0, 17 - rows))), b.t())[:rows]
    ones = torch.ones(max(rows, outputs), device="cuda")
    out = torch.full((rows, outputs), float("nan"), device="cuda", dtype=dtype)
    multiply(Quantized(a, ones[:rows]), Quantized(b, ones[:outputs]), None, out, config)
    assert torch.equal(out.float(), exact.float())


@pytest.mark.parametrize("rows, first, inputs, outputs", [(732, 220, 3072, 768), (300, 1, 12288, 272), (65, 64, 80, 96)])
@pytest.mark.parametrize("config", dict.fromkeys((*CANDIDATES, *PAIR_CANDIDATES)), ids=str)
def test_two_weights_in_one_launch_are_exact(config, rows, first, inputs, outputs):
    if not usable(config, rows):
        pytest.skip("not for this shape or this GPU")
    (a, b), dtype = whole_numbers(config, (rows, inputs), (2 * outputs, inputs))
    both = torch._int_mm(F.pad(a, (0, 0, 0, max(0, 17 - rows))), b.t())[:rows].float()
    exact = torch.cat([both[:first, :outputs], both[first:, outputs:]])
    ones = torch.ones(max(rows, 2 * outputs), device="cuda")
    x, weight = Quantized(a, ones[:rows]), Quantized(b, ones[: 2 * outputs])
    out = torch.full((rows, outputs), float("nan"), device="cuda", dtype=dtype)
    assert torch.equal(multiply(x, weight, None, out, config, first=first).float(), exact)


def pair_of(kind, inputs=3072, outputs=768) -> QuantizedPair:
    return QuantizedPair(*([kind.from_float(linear(inputs, outputs))] for _ in range(2)))


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_a_pair_is_its_two_layers_and_says_how_it_runs(kind, monkeypatch):
    monkeypatch.setattr(QuantizedPair, "choices", Choices({}))
    pair, x = pair_of(kind), torch.randn(300, 3072, device="cuda", dtype=torch.bfloat16)
    rows = pair.quantize(x)
    expected = torch.cat([pair.parts[0](rows.part(slice(0, 70))), pair.parts[1](rows.part(slice(70, None)))])
    joint = pair.multiply(rows, 70, torch.empty_like(expected), pair.choice(300, 70, x.dtype).config, False)
    for got in (pair(x, 70), joint):
        assert sqnr_db(got, expected) > 50, "bfloat16 once"
    assert pair.choice(300, 70, x.dtype).reason.startswith("measured here: joint")
    monkeypatch.setattr(kind, "forced", "triton")
    assert pair.choice(300, 70, x.dtype).backend == "separate"


@pytest.mark.parametrize("outliers", [False, True])
def test_e4m3_rows_leave_a_product_quantised_nearly_as_well_as_on_their_own(outliers):
    up, down = pair_of(Fp8Linear, 3072, 1024), pair_of(Fp8Linear, 1024, 256)
    x = torch.randn(300, 3072, device="cuda", dtype=torch.bfloat16)
    if outliers:
        x[:, ::200] *= 50
    x[7] = 0.0
    x[9] = up.parts[1].weight[5].float().to(x.dtype)  # as large a sum as can be
    rows = up.quantize(x)
    rows = rows._replace(norms=rows.dequantized().norm(dim=1))
    got, own = up.then(down, rows, 70), up.then(down, rows._replace(norms=None), 70)
    exact = F.gelu(up(rows, 70).float(), approximate="tanh")
    assert got.values.float().abs().max() < 448
    # Without row 9: one number is most of its power, and on its own that one is 448 without any error.
    others = [i for i in range(300) if i != 9]
    assert sqnr_db(got.dequantized()[others], exact[others]) > sqnr_db(own.dequantized()[others], exact[others]) - 1.5


def test_the_integer_reference_is_exact_itself():
    a = torch.randint(-127, 128, (64, 3072), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (96, 3072), dtype=torch.int8, device="cuda")
    assert torch.equal(torch._int_mm(a, b.t()).cpu(), a.cpu().int() @ b.cpu().int().t())


@pytest.mark.parametrize("eight_bit", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("width", [256, 3072, 12288])
@pytest.mark.parametrize("group", [0, 16, 256])
@pytest.mark.parametrize("gelu", [False, True])
def test_rows_are_quantised_as_defined(eight_bit, width, group, gelu):
    x = torch.randn(37, width, device="cuda", dtype=torch.bfloat16)
    x[3], x[5, 0] = 0.0, 100.0
    got = quantize_rows(x, eight_bit, group, gelu)
    expected = quantize_rows_torch(x, eight_bit, group, gelu)
    if not group and not gelu:
        assert torch.equal(got.values.float(), expected.values.float()) and torch.equal(got.scales, expected.scales)
    # Rotations are multiplied in TF32, 10 bits behind the point: a few roundings to 8 bits fall to the other side.
    assert sqnr_db(got.dequantized(), expected.dequantized()) > (45 if eight_bit == torch.int8 else 35)


@pytest.mark.parametrize("eight_bit", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("with_y", [False, True])
def test_norm_and_modulation_end_in_8_bits(eight_bit, with_y):
    x, y = (torch.randn(732, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randn(3, 6, 3072, device="cuda", dtype=torch.bfloat16).unbind(1)
    a, b, kinds = x.clone(), x.clone(), torch.randint(3, (732,), device="cuda", dtype=torch.int32)
    y = y if with_y else None
    normed = residual_norm_modulate(a, y, table[2], table[3], table[4], kinds, 1e-6)
    expected = quantize_rows(normed, eight_bit)
    got = residual_norm_modulate_quantize(b, y, table[2], table[3], table[4], kinds, 1e-6, eight_bit)
    assert torch.equal(a, b)
    # The same arithmetic compiled twice: the norm may differ in its last bit.
    assert sqnr_db(got.dequantized(), expected.dequantized()) > 50
    if eight_bit == torch.float8_e4m3fn:
        assert torch.allclose(got.norms, normed.float().norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
@pytest.mark.parametrize("rows", [1, 16, 17, 220, 4096])
@pytest.mark.parametrize("outliers", [False, True])
def test_every_backend_is_near_the_float_layer(kind, rows, outliers):
    layer = linear()
    x = torch.randn(rows, 3072, device="cuda", dtype=torch.bfloat16)
    if outliers:
        x[:, ::200] *= 50
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    made = kind.from_float(layer)
    least = 27 if kind is Fp8Linear else 20 if outliers else 30
    for backend in made.backends(x.device, x.dtype, rows):
        made.forced = backend
        assert made.choice(rows, x.dtype).backend == backend
        assert sqnr_db(made(x), exact) > least, backend
        assert sqnr_db(made(x, gelu=True), F.gelu(exact, approximate="tanh")) > least - 2, backend


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_the_choice_is_measured_once_says_why_and_is_recorded(kind, monkeypatch):
    monkeypatch.setattr(QuantizedLinear, "choices", Choices({}))
    made, graphs = kind.from_float(linear()), Graphs()
    x = torch.randn(512, 3072, device="cuda", dtype=torch.bfloat16)
    expected = graphs.run("layer", made, x)
    choice = made.choice(512, x.dtype)
    assert choice.reason.startswith("measured here") and "us" in choice.reason
    monkeypatch.setattr(kind, "measure", None)  # a second measurement would fail
    assert made.choice(300, x.dtype) == choice
    assert torch.equal(graphs.run("layer", made, x), expected), "replayed"
    assert graphs.recordings == 1


def test_moving_to_the_gpu_layer_by_layer_leaves_no_float_copy_there():
    model = nn.Sequential(*(nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(16)))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    report = swap_linears(model, Int8Linear, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    assert len(report.swapped) == 16
    # The 8-bit weights, and one layer in bfloat16 with its float32 intermediates.
    assert peak < report.bytes_after + 2048 * 2048 * (2 + 4 * 4), f"{peak / 1e6:.0f} MB"


def test_on_an_h200_the_table_stands_for_a_measurement(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the table is Hopper's")
    made, config = Int8Linear.from_float(linear()), CANDIDATES[0]
    monkeypatch.setattr(QuantizedLinear, "choices", Choices({("int8", 512, 3072, 3072): ("triton", config)}))
    monkeypatch.setattr(Int8Linear, "measure", None)
    choice = made.choice(400, torch.bfloat16)
    assert choice[:2] == ("triton", config) and "table" in choice.reason
    x = torch.randn(400, 3072, device="cuda", dtype=torch.bfloat16)
    assert sqnr_db(made(x), F.linear(x.float(), linear().weight.float(), linear().bias.float())) > 30
