"""The Triton kernels of the 8-bit linear layers, run by Triton's interpreter on CPU tensors, are their definitions.

Not collected by itself: TRITON_INTERPRET=1 has to be set before Triton is imported. `test_kernels.py` runs this file.
"""

import pytest
import torch
from triton.runtime import interpreter

from fast_path.kernels import _norm_quantize_triton, residual_norm_modulate
from quantization import products
from quantization.products import epilogue, multiply
from quantization.rows import Quantized, _quantize_rows_triton, quantize_rows
from quantization.tiles import Config

# Triton 3.6's interpreter turns one-element arrays into loop bounds by int(), which NumPy 2.4 no longer allows.
_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_loop_bounds(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_loop_bounds

FORMS = [
    Config(16, 32, 32, 4, 2),
    Config(16, 32, 32, 4, 2, "tma"),
    Config(16, 32, 32, 4, 2, "persistent"),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Few programs, as no GPU is asked for their number."""
    monkeypatch.setattr(products, "multiprocessors", lambda device: 3)


def int8(*shape, seed=0):
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", FORMS, ids=str)
@pytest.mark.parametrize("rows, columns, depth", [(1, 32, 32), (17, 48, 96), (40, 80, 176), (33, 64, 112)])
def test_integer_sums_are_exact(config, rows, columns, depth):
    """Scales of one and float32 results: sums below 2^24 are exact in them, so nothing may differ."""
    x, weight = (
        Quantized(int8(rows, depth), torch.ones(rows)),
        Quantized(int8(columns, depth, seed=1), torch.ones(columns)),
    )
    got = multiply(x, weight, None, torch.empty(rows, columns), config)
    assert torch.equal(got.int(), x.values.int() @ weight.values.int().t())


@pytest.mark.parametrize("config", FORMS, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scales_bias_and_gelu_follow_the_sums(config, gelu, with_bias):
    x, weight = Quantized(int8(21, 64), torch.rand(21) * 0.01), Quantized(int8(48, 64, seed=1), torch.rand(48) * 0.01)
    bias = torch.randn(48) if with_bias else None
    got = multiply(x, weight, bias, torch.empty(21, 48), config, gelu)
    total = x.values.int() @ weight.values.int().t()
    expected = epilogue(total, x.scales, weight.scales, bias, torch.empty(21, 48), gelu)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("config", FORMS, ids=str)
@pytest.mark.parametrize("rows, first", [(40, 0), (40, 17), (33, 32), (20, 20)])
def test_one_launch_multiplies_the_first_rows_by_one_weight_and_the_others_by_another(config, rows, first):
    x, weight = Quantized(int8(rows, 64), torch.ones(rows)), Quantized(int8(96, 64, seed=1), torch.rand(96))
    bias = torch.randn(96)
    got = multiply(x, weight, bias, torch.full((rows, 48), float("nan")), config, first=first)
    for part, outputs in ((slice(0, first), slice(0, 48)), (slice(first, None), slice(48, None))):
        total = x.values[part].int() @ weight.values[outputs].int().t()
        expected = total.float() * weight.scales[outputs] + bias[outputs]
        assert torch.allclose(got[part], expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_a_result_scaled_by_its_bound_needs_no_second_look_and_never_saturates(config):
    """The second row is a multiple of the longest weight: its sum is as large as the bound allows.

    Written in float32: the interpreter loses the carry where rounding to e4m3 reaches the next power of two.
    """
    x, weight = Quantized(int8(21, 64), torch.rand(21) * 0.01), Quantized(int8(96, 64, seed=1), torch.rand(96) * 0.01)
    x.values[1], x.scales[1], weight.scales[3], bias = weight.values[3], 0.01, 0.02, 0.01 * torch.randn(96)
    x = x._replace(norms=x.dequantized().norm(dim=1))
    whole = weight.dequantized().norm(dim=1)
    limits = torch.stack([torch.stack([whole[p].max(), bias[p].abs().max()]) for p in (slice(0, 48), slice(48, None))])
    out = Quantized(torch.empty(21, 48), torch.full((21,), float("nan")))
    multiply(x, weight, bias, out, config, True, 6, limits)
    expected = multiply(x, weight, bias, torch.empty(21, 48), config, True, 6)
    assert 400 < out.values[1].max() < 448 and out.values.abs().max() < 448
    assert (out.dequantized() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 48, 256, 512, 768])
@pytest.mark.parametrize("group", [0, 16, 256])
@pytest.mark.parametrize("gelu", [False, True])
def test_rows_are_quantised_as_defined(dtype, width, group, gelu):
    if group and width % group:
        pytest.skip("the group does not divide the width")
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * 3
    x[2], x[3, 0] = 0.0, 100.0
    x = x.to(dtype)
    got = _quantize_rows_triton(x, torch.int8, group, gelu)
    expected = quantize_rows(x, torch.int8, group, gelu)
    assert torch.allclose(got.scales, expected.scales, rtol=1e-5, atol=0)
    difference = (got.values.int() - expected.values.int()).abs()
    # Sums in another order: a number that lies between two integers may fall to either. Without sums nothing differs.
    assert difference.max() <= int(group > 0 or gelu) and (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_y", [False, True])
def test_norm_and_modulation_end_in_8_bits(dtype, with_y):
    generator = torch.Generator().manual_seed(0)
    x, y, table = (torch.randn(*s, generator=generator).to(dtype) for s in ((15, 96), (15, 96), (3, 6, 96)))
    now, a, b = table.unbind(1), x.clone(), x.clone()
    y, kinds = y if with_y else None, torch.randint(3, (15,), generator=generator, dtype=torch.int32)
    normed = residual_norm_modulate(a, y, now[2], now[3], now[4], kinds, 1e-6)
    expected = quantize_rows(normed, torch.int8)
    got = _norm_quantize_triton(b, y, now[2], now[3], now[4], kinds, 1e-6, torch.int8)
    # bfloat16: the interpreter cuts where hardware rounds, one unit in the last place of the norm's result.
    relative, steps = (1e-5, 1) if dtype == torch.float32 else (2**-7, 2)
    assert torch.allclose(got.scales, expected.scales, rtol=relative, atol=0)
    assert (got.values.int() - expected.values.int()).abs().max() <= steps
    assert (a.float() - b.float()).abs().max() < 2**-6 * a.float().abs().max()
