"""The fused transformer, its kernels and the modulation cache against the stock model that they stand for."""


import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from support.models import LAYOUTS, inputs, small_model, stock

from fast_path.modulation import Modulations
from fast_path.transformer import FusedTransformer, Sample

# The same operations in another grouping: float32 rounding, seen up to 4e-6 on velocities of about 4.
TOLERANCE = 1e-4


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_fused_transformer_is_the_stock_one(layout, batch, zero_cond_t):
    model = small_model(zero_cond_t=zero_cond_t)
    given = inputs(model, layout, batch)
    expected = {time: stock(model, *given, layout, time) for time in (1000.0, 750.0)}
    fused = FusedTransformer(model)
    for time, velocity in expected.items():
        difference = (fused.velocity(*given, layout, time) - velocity).abs().max().item()
        assert difference < TOLERANCE, difference
    assert (expected[1000.0] - expected[750.0]).abs().max() > 0.01, "the time matters"


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_samples_of_any_kind_share_a_forward_and_attend_to_themselves_only(zero_cond_t):
    model = small_model(zero_cond_t=zero_cond_t)
    kinds = ((1, 11, 1000.0), (2, 5, 750.0), (1, 23, 1000.0), (1, 11, 250.0))  # batch, length of the prompt, time
    wanted = []
    for seed, ((batch, text, time), layout) in enumerate(zip(kinds, [*LAYOUTS.values(), LAYOUTS["one reference"]], strict=True)):
        wanted.append(Sample(*inputs(model, layout, batch, text, seed), layout, time))
    expected = [stock(model, *s[:3], s.shapes, s.time) for s in wanted]
    fused = FusedTransformer(model)
    for chosen in ([0, 1, 2, 3], [3, 0], [1], [2, 2]):
        found = fused.velocities([wanted[i] for i in chosen])
        for i, velocity in zip(chosen, found, strict=True):
            assert velocity.shape == expected[i].shape and (velocity - expected[i]).abs().max() < TOLERANCE


def test_the_stock_model_still_runs_on_the_fused_weights_and_nothing_is_held_twice(tmp_path):
    model = small_model()
    given = inputs(model, LAYOUTS["one reference"])
    before = stock(model, *given, LAYOUTS["one reference"], 500.0)
    FusedTransformer(model)
    assert torch.equal(stock(model, *given, LAYOUTS["one reference"], 500.0), before)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_modulation_cache_is_exact_and_computes_each_time_once():
    for zero_cond_t in (False, True):
        model = small_model(zero_cond_t=zero_cond_t)
        cache, calls = Modulations(model), []
        model.transformer_blocks[0].img_mod.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        blocks, out = cache.get(750.0, (1000.0, 750.0))
        assert len(calls) == 2
        cache.get(1000.0, (1000.0, 750.0))
        assert len(calls) == 2, "the schedule's other time was computed with it"
        with torch.no_grad():
            t = torch.tensor([750.0, 0.0][: 1 + zero_cond_t]) / 1000
            temb = model.time_text_embed(t, torch.zeros(1))
            for i, block in enumerate(model.transformer_blocks):
                image = block.img_mod(temb).view(-1, 6, model.inner_dim)
                assert torch.equal(blocks[i, 0], block.txt_mod(temb[:1]).view(6, -1))
                assert torch.equal(blocks[i, 1], image[0]) and torch.equal(blocks[i, 2], image[-1])
            scale, shift = model.norm_out.linear(model.norm_out.silu(temb[:1])).chunk(2, dim=1)
            assert torch.equal(out, torch.cat([shift, scale]))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda model: setattr(model, "_hf_hook", object()), "offloaded"),
        (lambda model: setattr(model, "pos_embed", torch.nn.Identity()), "variant"),
        (lambda model: setattr(model.transformer_blocks[1].attn, "processor", print), "attention"),
        (lambda model: setattr(model, "img_in", type("Int4Linear", (torch.nn.Linear,), {})(64, 96)), "Int4Linear"),
    ],
)
def test_a_model_of_another_form_is_refused_with_its_reason(change, says):
    model = small_model()
    change(model)
    with pytest.raises(TypeError, match=says):
        FusedTransformer(model)


def test_weights_that_were_replaced_instead_of_changed_are_noticed():
    model = small_model()
    fused = FusedTransformer(model)
    fused.weights_changed({"transformer_blocks.0.attn.to_k"})
    model.transformer_blocks[0].attn.to_k.weight.data = model.transformer_blocks[0].attn.to_k.weight.data.clone()
    with pytest.raises(RuntimeError, match="replaced"):
        fused.weights_changed({"transformer_blocks.0.attn.to_k"})


def test_a_changed_modulation_weight_changes_the_velocity():
    model = small_model()
    fused, given, layout = FusedTransformer(model), inputs(model, LAYOUTS["one reference"]), LAYOUTS["one reference"]
    fused.velocity(*given, layout, 500.0)
    with torch.no_grad():
        model.transformer_blocks[0].img_mod[1].weight.mul_(1.5)
    fused.weights_changed({"transformer_blocks.0.img_mod.1"})
    assert (fused.velocity(*given, layout, 500.0) - stock(model, *given, layout, 500.0)).abs().max() < TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_pipeline_denoises_the_same_with_and_without(pocket, photo, steps, monkeypatch):
    def latents(pipe, guided=False):
        embeds, mask = pipe.encode_prompt("make it a pencil sketch", photo(128, 128))
        negative = pipe.encode_prompt("blurred, dark", photo(128, 128))[0] if guided else None
        references = pipe.encode_references(photo(128, 128), area=128 * 128)
        noise, schedule = pipe.initial_noise(128, 128, 3), pipe.schedule(steps, 128, 128)
        scale = 3.0 if guided else 1.0
        return pipe.denoise(noise, references, embeds, mask, schedule, negative_prompt_embeds=negative, cfg_scale=scale)

    plain = {guided: latents(pocket, guided) for guided in (False, True)}
    pocket.enable_fast_path()
    try:
        ran = []
        monkeypatch.setattr(QwenImageTransformer2DModel, "forward", lambda *_, **__: ran.append(1))
        for guided, expected in plain.items():
            difference = (latents(pocket, guided) - expected).abs().max().item()
            assert difference < TOLERANCE, difference
        assert not ran, "the stock transformer was not needed"
    finally:
        pocket.transformer._forward_pre_hooks.clear()
        pocket.disable_fast_path()


def test_prompts_of_different_lengths_share_a_batch(pocket, photo):
    def latents():
        embeds, mask = pocket.encode_prompt(["sepia", "turn this into an oil painting"], photo(64, 64))
        assert mask is not None
        references = pocket.encode_references(photo(64, 64), area=64 * 64)
        return pocket.denoise(pocket.initial_noise(64, 64, 0, 2), references, embeds, mask, pocket.schedule(2, 64, 64))

    plain = latents()
    pocket.enable_fast_path()
    try:
        difference = (latents() - plain).abs().max().item()
        assert difference < TOLERANCE, difference
    finally:
        pocket.disable_fast_path()


def test_the_times_of_one_to_eight_steps_are_ready_when_the_fast_path_is_in(pocket_copy):
    pipe = pocket_copy()
    pipe.enable_fast_path()
    misses = pipe.fused_transformer.modulations.summary()["misses"]
    for steps in range(1, 9):
        schedule = pipe.schedule(steps, 256, 256)
        for time in schedule.times:
            pipe.fused_transformer.modulations.get(time, schedule.times)
    assert pipe.fused_transformer.modulations.summary()["misses"] == misses
