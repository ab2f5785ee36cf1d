"""A quantised model in the program: loaded quantised, quantised while loading, on the fast path, LoRA before."""

import pytest
import torch
from support.lora_files import write_lora
from support.models import KINDS, LAYOUTS, inputs, same_weights, small_model, sqnr_db, stock

from cached_pipeline import load_pipeline
from fast_path.transformer import FusedTransformer
from int8_linear import Int8Linear
from pipeline import placement
from pipeline.folder import POCKET_FOLDER
from pipeline.images import EditError
from pipeline.quantize import quantize_main
from quantization.swap import default_filter, swap_linears


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_fused_transformer_runs_on_8_bit_layers_as_stock_does(kind, group, layout):
    """A number between two 8-bit ones may round either way: the two differ far less than both do from float."""
    model = small_model(zero_cond_t=True)
    given = inputs(model, layout, 2)
    exact = stock(model, *given, layout, 750.0)
    swap_linears(model, kind, group=lambda name: group if name.endswith("mlp.net.2") else 0)
    expected = stock(model, *given, layout, 750.0)
    calls = []
    fused = FusedTransformer(model)
    for block in fused.blocks:
        block._qkv.parts[1].register_forward_hook(lambda layer, given, out: calls.append(type(given[0]).__name__))
    got = fused.velocity(*given, layout, 750.0)
    assert set(calls) == {"Quantized"}, "the norm wrote 8-bit rows"
    assert sqnr_db(got, exact) > 25
    assert (got - expected).square().mean() < 0.5 * (expected - exact).square().mean()


def test_a_float_and_a_quantised_stream_may_be_mixed():
    model, layout = small_model(), LAYOUTS["one reference"]
    given = inputs(model, layout)
    text = ("add_", "to_add_out", "txt_mlp")
    swap_linears(
        model,
        Int8Linear,
        lambda linear, name: default_filter(linear, name) or ("text" if any(t in name for t in text) else None),
    )
    expected = stock(model, *given, layout, 500.0)
    assert sqnr_db(FusedTransformer(model).velocity(*given, layout, 500.0), expected) > 35


def picture(pipeline, photo) -> torch.Tensor:
    return pipeline(
        prompt="negative", image=photo(64, 64), width=64, height=64, num_inference_steps=1, true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(0), reference_area=64 * 64, output_type="uint8",
    ).images.float()  # fmt: skip


def test_a_quantised_folder_loads_as_it_is_and_is_what_quantising_while_loading_gives(tmp_path, photo):
    quantize_main(Int8Linear, "", [str(POCKET_FOLDER), str(tmp_path)])
    stored, made = load_pipeline(str(tmp_path)), load_pipeline("pocket", quantize="int8")
    assert stored.description["quantized"] == made.description["quantized"] == "int8"
    same_weights(stored.transformer, made.transformer)
    before = picture(stored, photo)
    assert all(entry.applied for entry in stored.enable_fast_path())
    assert (picture(stored, photo) - before).abs().mean() < 1.0, "of 255"
    with pytest.raises(EditError, match="int8"):
        load_pipeline(str(tmp_path), quantize="fp8")
    with pytest.raises(EditError, match="--lora"):
        load_pipeline(str(tmp_path), lora="lightning-4")
    with pytest.raises(EditError, match="quantised"):
        made.change_lora(None)


def test_an_unknown_quantisation_is_refused():
    for name in ("quantize", "text_encoder_quantize"):
        with pytest.raises(EditError, match="Allowed: none, int8, fp8"):
            load_pipeline("pocket", **{name: "int3"})


def test_the_text_encoder_too(photo):
    pipeline = load_pipeline("pocket")
    exact = pipeline.encode_prompt("negative", photo(64, 64))[0]
    quantised = load_pipeline("pocket", text_encoder_quantize="int8")
    assert (
        placement.quantization(quantised.text_encoder) == "int8" and placement.quantization(quantised.transformer) is None
    )
    assert sqnr_db(quantised.encode_prompt("negative", photo(64, 64))[0], exact) > 25
    stock = quantised.encode_prompt("negative", photo(64, 64))[0]
    quantised.clear_caches()
    assert all(entry.applied for entry in quantised.enable_fast_path())
    fused = quantised.encode_prompt("negative", photo(64, 64))[0]
    # A number between two 8-bit ones may round either way: the two differ less than both do from float.
    assert sqnr_db(fused, stock) > sqnr_db(stock, exact)


def test_layers_of_one_input_that_are_quantised_in_two_ways_leave_the_text_encoder_as_it_is():
    pipeline = load_pipeline("pocket")
    swap_linears(pipeline.text_encoder, Int8Linear, lambda linear, name: None if name.endswith("q_proj") else "not it")
    report = {entry.name: entry for entry in pipeline.enable_fast_path()}
    assert not report["fused_text_encoder"].applied and "one input" in report["fused_text_encoder"].reason


def test_a_lora_is_fused_before_a_model_is_quantised(tmp_path, pocket):
    """At the start of the program and in a folder; both quantise the weights that the LoRA has changed."""
    lora = tmp_path / "style-lightning.safetensors"
    write_lora(lora, pocket.transformer)
    expected = load_pipeline("pocket", lora=str(lora), lora_weight=0.5, dtype=torch.bfloat16).transformer
    swap_linears(expected, Int8Linear)
    started = load_pipeline("pocket", lora=str(lora), lora_weight=0.5, quantize="int8", dtype=torch.bfloat16)
    same_weights(started.transformer, expected)
    assert started.description["lora"] == str(lora)
    arguments = [str(POCKET_FOLDER), str(tmp_path / "out"), "--lora", str(lora), "--lora-weight", "0.5"]
    quantize_main(Int8Linear, "", arguments)
    stored = load_pipeline(str(tmp_path / "out"), dtype=torch.bfloat16)
    same_weights(stored.transformer, expected)
    assert stored.description["scheduler"] == "lightning"


@pytest.mark.parametrize("parts", [("transformer",), ("transformer", "text_encoder"), ("text_encoder",)])
def test_what_a_frame_does_not_read_stays_off_the_gpu(parts):
    """With the meta device in the GPU's place."""
    names = {"transformer": "quantize", "text_encoder": "text_encoder_quantize"}
    pipeline = load_pipeline("pocket", **{names[part]: "int8" for part in parts})
    placement.place(pipeline, torch.device("meta"))
    for part in ("transformer", "text_encoder", "vae"):
        for name, tensor in [*getattr(pipeline, part).named_parameters(), *getattr(pipeline, part).named_buffers()]:
            stays = part in parts and any(unread in name for unread in placement.UNREAD)
            assert tensor.is_meta != stays, name
