"""FP8 layers: e4m3 numbers rounded as the format says. What they share with INT8 is tested in `test_int8_linear.py`."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

import fp8_linear
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from pipeline.quantize import quantize_main
from quantization.folder import is_quantized, load_quantized
from quantization.rows import quantize_rows

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def test_rows_use_the_whole_range_and_round_to_the_nearest_number_of_the_format():
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 20)[:, None]
    rows = quantize_rows(x, torch.float8_e4m3fn)
    assert torch.equal(rows.values.float().abs().amax(1), torch.full((20,), 448.0))
    scaled = x.double() / rows.scales.double()[:, None]
    numbers = E4M3[E4M3.isfinite()].double()
    nearest = (scaled[..., None] - numbers).abs().amin(-1)
    # Half a unit in the last place may fall to either side after float32 scaling.
    assert ((scaled - rows.values.double()).abs() <= nearest * (1 + 1e-4) + 1e-6).all()


def test_simulated_it_multiplies_exactly_the_rounded_numbers():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64).requires_grad_(False)
    layer, x = Fp8Linear.from_float(linear), torch.randn(9, 256, generator=generator)
    rows = layer.quantize(x)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    exact = (rows.values.double() * rows.scales.double()[:, None]) @ weight.t() + linear.bias.double()
    assert (layer(x) - exact).abs().max() < 1e-5
    assert layer.choice(9, torch.float32).backend == "simulated"
    with pytest.raises(ValueError, match="simulated"):
        layer.forced = "scaled_mm"
        layer(x)


def test_wide_ranges_within_a_row_cost_it_less_than_int8():
    """An exponent for each number: an outlier takes int8's small neighbours away, e4m3's not."""
    linear = nn.Linear(512, 128).requires_grad_(False)
    x = torch.randn(30, 512, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 300.0
    exact = linear(x) - linear.weight[:, 7] * 300.0

    def error(kind):
        layer = kind.from_float(linear)
        one = torch.zeros_like(x)
        one[:, 7] = 300.0
        # What the outlier itself contributes is taken out: its own rounding hides what happens to the others.
        return float((layer(x) - layer(one) + linear.bias - exact).square().mean())

    assert error(Fp8Linear) < error(Int8Linear) / 4


def test_swapping_and_its_report_name_the_kind():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 30))
    report = fp8_linear.swap_linears(model)
    assert report.swapped == ["0"] and "16" in report.skipped["2"]
    assert type(model[0]) is Fp8Linear
    assert "1 linear layers quantised" in str(report)


def test_the_command_writes_a_folder_that_says_it_is_fp8(tmp_path):
    sizes = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48}
    source = tmp_path / "model"
    QwenImageTransformer2DModel(**sizes, axes_dims_rope=(8, 12, 12)).save_pretrained(source / "transformer")
    (source / "model_index.json").write_text("{}")
    quantize_main(Fp8Linear, "", [str(source), str(tmp_path / "out")])
    assert is_quantized(tmp_path / "out") == "fp8"
    loaded = load_quantized(tmp_path / "out", [Fp8Linear], dtype=torch.float32)
    layers = [m for m in loaded.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 12 and {layer.group for layer in layers} == {0}
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
