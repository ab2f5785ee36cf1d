"""The accelerations give the stock numbers; only rounding may differ."""

import copy

import numpy as np
import pytest
import torch

import fast_path
from engine.loop import LOOK_EVERY_S
from fast_path.unsupported import UnsupportedError
from fast_path.watch import dtype_of
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine


def test_apply_reports_and_remove_restores(pocket, photo):
    with torch.no_grad():
        latents = pocket.encode_references(photo(64, 64), area=64 * 64).latents
        before = pocket.decode(latents, 64, 64)
        report = pocket.enable_fast_path()
        assert [(entry.name, entry.applied) for entry in report] == [(name, True) for name in fast_path.PARTS]
        assert fast_path.in_use(pocket)
        assert all(entry.reason for entry in report)
        decoder = pocket.single_frame_vae.decoder
        ran = []
        handle = decoder.register_forward_hook(lambda *_: ran.append(True))
        fast = pocket.decode(latents, 64, 64)
        handle.remove()
        assert ran, "the fast operation ran"
        assert (fast.int() - before.int()).abs().max() <= 1
        pocket.disable_fast_path()
        assert pocket.single_frame_vae is None
        assert torch.equal(pocket.decode(latents, 64, 64), before)


def test_what_cannot_be_applied_says_why_and_the_stock_path_stays(pocket, monkeypatch):
    def refuse(*_):
        raise UnsupportedError("Strange has no known 2-D form")

    def lacks(*_):
        raise UnsupportedError("its kernels need Triton, which is not installed")

    monkeypatch.setattr(fast_path, "single_frame_vae", refuse)
    monkeypatch.setattr(fast_path, "FusedTransformer", lacks)
    report = pocket.enable_fast_path()
    assert report[:2] == [
        ("single_frame_vae", False, "Strange has no known 2-D form"),
        ("fused_transformer", False, "its kernels need Triton, which is not installed"),
    ]
    assert pocket.single_frame_vae is None and pocket.fused_transformer is None
    assert report[2].applied and pocket.fused_text_encoder is not None
    pocket.disable_fast_path()


def test_a_mistake_in_the_code_is_no_reason_to_go_on_without_a_part(pocket, monkeypatch):
    monkeypatch.setattr(fast_path, "FusedTransformer", lambda: None)  # called with arguments: a TypeError
    with pytest.raises(TypeError, match="argument"):
        pocket.enable_fast_path()
    pocket.disable_fast_path()


def test_an_offloaded_vae_is_left_alone(pocket):
    pocket.vae._hf_hook = object()
    try:
        assert pocket.enable_fast_path()[0] == (
            "single_frame_vae", False, "the VAE is offloaded: its copy would stay behind"
        )  # fmt: skip
        assert pocket.single_frame_vae is None
    finally:
        del pocket.vae._hf_hook
        pocket.disable_fast_path()


def test_the_whole_edit_is_the_same_with_and_without(pocket, photo):
    def edit():
        settings = {"width": 96, "height": 64, "num_inference_steps": 2, "true_cfg_scale": 1.0}
        settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "reference_area": "output"}
        return pocket([photo(96, 64), photo(64, 64, 1)], "put the second picture in a corner", **settings).images

    pocket.clear_caches()
    before = edit()
    pocket.enable_fast_path()
    try:
        difference = (edit() - before).abs().max().item()
        assert 0 < difference < 1e-4, difference  # other kernels ran, and gave the same
    finally:
        pocket.disable_fast_path()


def test_enabling_twice_is_enabling_once(pocket):
    try:
        first = pocket.enable_fast_path()
        part = pocket.fused_transformer
        assert pocket.enable_fast_path() == first
        assert pocket.fused_transformer is not part and fast_path.in_use(pocket)
    finally:
        pocket.disable_fast_path()
    assert not fast_path.in_use(pocket)


def test_moving_the_pipeline_moves_the_fast_path(pocket):
    pocket.enable_fast_path()
    before = pocket.single_frame_vae
    pocket.to("cpu")
    pocket.decode(torch.zeros(1, 4, 4 * pocket.latent_channels), 32, 32)
    assert pocket.single_frame_vae is not None and pocket.single_frame_vae is not before
    pocket.disable_fast_path()


def test_the_dtype_is_told_by_the_first_weight_also_where_stock_left_an_empty_registry_of_hooks(pocket, monkeypatch):
    model = pocket.transformer
    with model.cache_context("cond"):
        pass
    assert not model._diffusers_hook.hooks
    monkeypatch.setattr("fast_path.watch.get_parameter_dtype", lambda module: pytest.fail("every module was walked through: 12 ms"))
    try:
        assert dtype_of(model) is torch.float32
    finally:
        del model._diffusers_hook


def test_what_a_first_call_of_the_stock_models_leaves_on_them_is_no_change(photo):
    from cached_pipeline import load_pipeline

    pipe = load_pipeline("pocket")  # of its own: the session's was called before
    before = {name: pipe.fast_path.look(pipe, name) for name in ("vae", "transformer")}
    pipe(photo(64, 64), "keep", num_inference_steps=1, true_cfg_scale=1.0, width=64, height=64, reference_area="output")
    assert "_diffusers_hook" in vars(pipe.transformer) and "_feat_map" in vars(pipe.vae)
    assert {name: pipe.fast_path.look(pipe, name) for name in before} == before
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert pipe.fast_path.look(pipe, "transformer") != before["transformer"]


def test_an_owner_of_the_pipeline_may_ask_for_whole_looks_now_and_then_and_a_glance_comes_always(pocket_copy, monkeypatch):
    pipe, clock, looks = pocket_copy(), [0.0], []
    monkeypatch.setattr(fast_path.time, "monotonic", lambda: clock[0])
    pipe.enable_fast_path()
    state, component = pipe.fast_path, pipe.fast_path.components["transformer"]
    look = component.look
    monkeypatch.setattr(component, "look", lambda module: looks.append(clock[0]) or look(module))
    state.look_every_s = 0.5
    for clock[0] in (200.0, 200.1, 200.4, 200.5, 200.9):
        state.look(pipe, "transformer")
    assert looks == [200.0, 200.5]
    built = pipe.fused_transformer
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].img_mod[1].weight.mul_(1.5)
    state.look(pipe, "transformer")
    assert pipe.fused_transformer is built, "a change in the middle is seen with the next whole look"
    clock[0] = 201.0
    state.look(pipe, "transformer")
    assert pipe.fused_transformer not in (None, built)
    built, pipe.transformer = pipe.fused_transformer, copy.deepcopy(pipe.transformer)
    state.look(pipe, "transformer")
    assert pipe.fused_transformer not in (None, built), "another object is seen at once"


def test_an_engine_looks_at_each_edit_and_at_a_stream_it_does_not_keep_up_with_twice_a_second(pocket_copy):
    pipe, asked = pocket_copy(), []
    picture = np.full((64, 64, 3), 90, np.uint8)
    params = EditParams("make it black and white", width=64, height=64, steps=1)
    with RealtimeEngine(pipe, EngineConfig(max_sessions=2)) as engine:
        before = engine.edit([picture], params, timeout=60).image
        look_every = engine._loop._look_every
        engine._loop._look_every = lambda seconds: asked.append(seconds) or look_every(seconds)
        with torch.no_grad():
            pipe.transformer.transformer_blocks[0].img_mod[1].weight.mul_(3)
        assert not np.array_equal(engine.edit([picture], params, timeout=60).image, before), "seen by the very next edit"
        with engine.open_session() as one, engine.open_session() as two:  # the second waits for the first
            numbers = [session.submit([picture], params) for session in (one, two)]
            for session, number in zip((one, two), numbers, strict=True):
                session.result(number, 60)
    assert asked == [0.0, 0.0, LOOK_EVERY_S, 0.0] and LOOK_EVERY_S <= 0.5 and pipe.fast_path.look_every_s == 0.0
