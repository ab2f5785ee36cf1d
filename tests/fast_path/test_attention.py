"""8-bit attention: its definition against attention in float32, and its kernels without a GPU."""


import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from support.models import LAYOUTS, inputs, small_model, sqnr_db, stock

from cached_pipeline import load_pipeline
from fast_path import TokenCache, attention
from fast_path.attention import EIGHT, Scales
from fast_path.kernels import Destinations, qk_norm_rope
from fast_path.transformer import FusedTransformer, Sample
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from pipeline.images import EditError
from quantization.swap import swap_linears


def given(rows: int, heads: int, width: int) -> tuple:
    """What the norm and the rotation need, for rows of text and of pictures."""
    torch.manual_seed(0)
    qkv, angles = torch.randn(rows, 3, heads, width).bfloat16(), torch.randn(rows, width // 2)
    kinds, positions = (torch.arange(rows) % 3).int(), torch.randperm(rows).int()
    weights = (1 + 0.3 * torch.randn(2, 2, width)).bfloat16()
    return qkv, kinds, positions, weights, angles.cos(), angles.sin(), 1e-6


def scales_of(weights: torch.Tensor, values: torch.Tensor) -> Scales:
    return Scales(*(attention.qk_scale(weights[:, i]) for i in range(2)), values, attention.output_scale(values))


def test_no_query_or_key_overflows_however_it_is_normed_and_turned():
    qkv, kinds, positions, weights, *rest = given(64, 2, 16)
    qkv[...] = 0
    qkv[torch.arange(64), :, :, torch.arange(64) % 16] = 1000.0  # all of a vector in one number, as large as can be
    plain, scales = qkv.clone(), scales_of(weights, torch.ones(2))
    qk_norm_rope(plain, kinds, positions, weights, *rest)
    q, k, v = torch.zeros_like(qkv, dtype=EIGHT).unbind(1)
    attention.norm_rope_quantize(qkv, kinds, positions, weights, *rest, scales, Destinations(q, k, v, None))
    for got, wanted, scale in ((q, plain[:, 0], scales.q), (k, plain[:, 1], scales.k)):
        assert wanted.float().abs().max() <= 448 * scale * 1.01
        assert sqnr_db(got.float() * scale, wanted) > 30
    assert v.float().max() == 448, "what is too large for its scale saturates"


@pytest.mark.parametrize("heads, width", [(2, 16), (3, 40), (4, 128)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0], ids=lambda s: f"values-of-{s}")
def test_it_attends_as_attention_in_float32_does(heads, width, spread):
    batch, tokens, queries = 2, 150, 60
    qkv, kinds, positions, weights, *rest = given(batch * tokens, heads, width)
    qkv[:, 2] *= spread
    plain, joint = qkv.clone(), torch.zeros_like(qkv, dtype=EIGHT)
    qk_norm_rope(plain, kinds, positions, weights, *rest)
    scales = scales_of(weights, torch.full((heads,), 3 * spread))
    attention.norm_rope_quantize(qkv, kinds, positions, weights, *rest, scales, Destinations(*joint.unbind(1), None))
    q, k, v = plain.view(batch, tokens, 3, heads, width).float().permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(q[:, :, 30 : 30 + queries], k, v).transpose(1, 2).flatten(2)
    q, k, v = joint.view(batch, tokens, 3, heads, width).unbind(2)
    got = attention.attend_fp8(q[:, 30 : 30 + queries], k, v, scales)
    assert got.dtype == torch.bfloat16 and got.shape == (batch, queries, heads * width)
    assert sqnr_db(got, exact) > 24, sqnr_db(got, exact)


def test_scattered_rows_are_the_rows_in_their_own_order():
    qkv, kinds, positions, weights, *rest = given(20, 2, 16)
    scales = scales_of(weights, torch.rand(2) + 1)
    places = torch.randperm(50)[:20].int()
    own, kept, moved = (torch.zeros(n, 3, 2, 16).to(EIGHT) for n in (20, 50, 50))
    q = torch.zeros(20, 2, 16).to(EIGHT)
    everything = (qkv, kinds, positions, weights, *rest, scales)
    attention.norm_rope_quantize(*everything, Destinations(*own.unbind(1), None))
    attention.norm_rope_quantize(*everything, Destinations(*moved.unbind(1), places))
    attention.norm_rope_quantize(*everything, Destinations(q, kept[:, 1], kept[:, 2], places), move_q=False)
    assert own.float().any(2).all()
    assert torch.equal(moved.float()[places], own.float())
    assert torch.equal(q.float(), own[:, 0].float()) and torch.equal(kept[:, 1:].float(), moved[:, 1:].float())


def test_a_heads_values_are_scaled_by_the_largest_row_that_makes_them():
    weight = torch.randn(6, 32)
    norms = weight.norm(dim=1)
    norms[4:] = 0.0
    scales = attention.value_scales(norms, 3)
    assert torch.equal(scales[:2], norms[:4].view(2, 2).amax(1)) and 0 < scales[2] < 1e-9, "zeros stay zeros"


def test_why_it_cannot_run_is_said(monkeypatch):
    cuda = torch.device("cuda")
    assert attention.refusal(torch.device("cpu"), 16) is None, "the definition runs there"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert "8.9" in attention.refusal(cuda, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "triton", None)
    assert "Triton is not installed" in attention.refusal(cuda, 128)
    monkeypatch.setattr(attention, "triton", torch)  # for its version
    monkeypatch.setattr(attention, "gluon", None)
    assert "Gluon" in attention.refusal(cuda, 128)
    monkeypatch.setattr(attention, "gluon", torch)
    assert attention.refusal(cuda, 128) is None
    assert "64 numbers, not 128" in attention.refusal(cuda, 64)


# In the transformer and the program


@pytest.mark.parametrize("kind", [None, Int8Linear, Fp8Linear])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_transformer_with_8_bit_attention_is_near_the_stock_one(layout, kind):
    """Two pictures at once where they fit together: then rows are not in attention's order."""
    model, batch = small_model(zero_cond_t=True), 2 if len(layout) == 2 else 1
    wanted = inputs(model, layout, batch)
    exact = stock(model, *wanted, layout, 750.0)
    if kind is not None:
        swap_linears(model, kind)
    fused = FusedTransformer(model)
    before = fused.velocity(*wanted, layout, 750.0)
    fused.eight_bit_attention = True
    got = fused.velocity(*wanted, layout, 750.0)
    assert sqnr_db(got, exact) > 25 and not torch.equal(got, before)
    assert fused.blocks[0].out_input_dtype == (None if kind is None else kind.eight_bit)


def test_token_reuse_keeps_8_bit_keys_and_values():
    fused, layout = FusedTransformer(small_model()), LAYOUTS["one reference"]
    sample = Sample(*inputs(fused.transformer, layout), layout, 1000.0, (1000.0,))
    exact = fused.velocity(*sample)
    sizes = []
    for fused.eight_bit_attention in (False, True):
        cache = TokenCache(fused)
        cache.begin(None)
        assert sqnr_db(cache.velocity(sample, 0), exact) > 25
        nothing = np.zeros(layout[0][1:], bool)
        cache.begin(nothing)
        again = cache.velocity(sample, 0)
        assert 0 < cache.computed.sum() < nothing.size and sqnr_db(again, exact) > 25
        sizes.append(sum(t.nbytes for t in cache._kept))
    assert sizes[0] == 4 * sizes[1], "float32 before"


def test_a_change_of_the_layers_that_make_values_changes_their_scales_in_place():
    model = small_model()
    fused = FusedTransformer(model)
    scales = fused.blocks[0].scales
    before, at = scales.v.clone(), scales.v.data_ptr()
    for layer in (model.transformer_blocks[0].attn.to_v, model.transformer_blocks[0].attn.add_v_proj):
        layer.weight.data.mul_(4.0)
    fused.weights_changed({"transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_v_proj"})
    assert torch.allclose(scales.v, 4 * before) and scales.v.data_ptr() == at
    assert torch.allclose(scales.output, scales.v.max() / 8)
    assert scales.v.grad_fn is None, "else it would keep the weights in float32: 4.5 GB of the full-size model"


def test_the_program_s_model_says_how_it_attends_and_refuses_what_it_does_not_know(pocket, photo, monkeypatch):
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)  # stock's megapixel references take seconds
    pipeline = load_pipeline("pocket", attention_quantize="fp8")
    assert pipeline.description["attention_quantized"] == "fp8"
    picture, given = photo(64, 64), {"num_inference_steps": 1, "width": 64, "height": 64, "true_cfg_scale": 1.0}
    exact = pipeline(picture, "sepia", **given, generator=torch.Generator().manual_seed(0), output_type="pt").images
    report = {line.name: line.reason for line in pipeline.enable_fast_path()}
    assert "attention in 8 bits (e4m3), which is approximate" in report["fused_transformer"]
    got = pipeline(picture, "sepia", **given, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert 25 < sqnr_db(got, exact) < 60
    assert pocket.description["attention_quantized"] is None
    with pytest.raises(EditError, match=r'The quantisation of the attention is "int4"\. Allowed: none, fp8\.'):
        load_pipeline("pocket", attention_quantize="int4")
