"""What stock's methods change about a pipeline is seen by the fast path, or refused by name before a picture is made.

Every public method of the stock pipeline, of its mixins and of its diffusers components is decided here. One that a new
diffusers adds fails the first test until someone decides.
"""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from support.stock_changes import (
    CHANGES,
    WIDTHS,
    HalvedAttention,
    _state,
    add_adapter,
    after_adapter,
    after_lora,
    edit,
    fuse_and_unload,
    fuse_and_unload_in_the_component,
    in_place,
    load_adapter,
    load_lora,
    offload_to_disk,
    register,
    replaced_data,
)
from torch import nn

import fast_path
from cached_pipeline import CachedQwenImageEditPipeline, load_pipeline
from fast_path.watch import Component
from pipeline.images import EditError

TOLERANCE = 1e-4  # float32 rounding of other kernels, through a step
VISIBLE = 1e-3


@pytest.fixture(autouse=True)
def widths(pocket):
    block = pocket.transformer.transformer_blocks[1]
    WIDTHS.update(dim=block.dim, mlp=block.img_mlp.net[2].in_features)


@pytest.fixture
def plain(pocket):
    pocket.disable_fast_path()
    pocket.clear_caches()
    return copy.deepcopy(pocket)


@pytest.fixture
def fast(plain):
    """A pipeline whose fast path is in, has run, and holds a cached result of everything."""
    pipe = copy.deepcopy(plain)
    report = pipe.enable_fast_path()
    assert all(line.applied for line in report), report
    edit(pipe)
    return pipe


# --- every public method, decided -------------------------------------------------------------------------------------


# What changes a picture, or could: done to a pipeline on the fast path it has the effect that it has on a plain one.
PIPELINE = {
    "to": lambda p, _: p.to(torch.bfloat16),
    "register_modules": register,
    "load_lora_weights": load_lora,
    "load_lora_into_transformer": lambda p, f: p.load_lora_into_transformer(_state(f), p.transformer, adapter_name="a"),
    "unload_lora_weights": after_lora(lambda p: p.unload_lora_weights()),
    "fuse_lora": fuse_and_unload,
    "unfuse_lora": after_lora(lambda p: (p.fuse_lora(components=["transformer"]), edit(p), p.unfuse_lora(components=["transformer"]))),
    "set_adapters": after_lora(lambda p: p.set_adapters(["a"], [0.3])),
    "disable_lora": after_lora(lambda p: p.disable_lora()),
    "enable_lora": after_lora(lambda p: (p.disable_lora(), edit(p), p.enable_lora())),
    "delete_adapters": after_lora(lambda p: p.delete_adapters("a")),
    "set_lora_device": after_lora(lambda p: p.set_lora_device(["a"], "cpu")),
    "enable_lora_hotswap": lambda p, _: p.enable_lora_hotswap(target_rank=8),
    "save_pretrained": lambda p, f: p.save_pretrained(f),
    "save_lora_weights": after_lora(lambda p: p.save_lora_weights("/dev/null", transformer_lora_layers={})),
    "enable_group_offload": lambda p, _: p.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "remove_all_hooks": lambda p, _: (p.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), edit(p), p.remove_all_hooks()),
    "reset_device_map": lambda p, _: p.reset_device_map(),
    "enable_attention_slicing": lambda p, _: p.enable_attention_slicing(),
    "disable_attention_slicing": lambda p, _: p.disable_attention_slicing(),
    "set_attention_slice": lambda p, _: p.set_attention_slice(1),
    "enable_xformers_memory_efficient_attention": lambda p, _: p.enable_xformers_memory_efficient_attention(),
    "disable_xformers_memory_efficient_attention": lambda p, _: p.disable_xformers_memory_efficient_attention(),
    "set_use_memory_efficient_attention_xformers": lambda p, _: p.set_use_memory_efficient_attention_xformers(False),
    "maybe_free_model_hooks": lambda p, _: p.maybe_free_model_hooks(),
    "register_to_config": lambda p, _: p.register_to_config(a=1),
    "components": lambda p, _: p.components,
}
PIPELINE_NEEDS_A_GPU = {"enable_model_cpu_offload", "enable_sequential_cpu_offload"}  # tests/gpu/test_stock_methods_cuda.py
PIPELINE_MAKES_OR_READS = set(
    """
    attention_kwargs check_inputs config config_name current_timestep device download dtype encode_prompt extract_init_dict
    from_config from_pipe from_pretrained fused_loras get_active_adapters get_config_dict get_list_adapters guidance_scale
    has_compatibles hf_device_map ignore_for_config interrupt load_config lora_scale lora_state_dict model_cpu_offload_seq
    name_or_path num_fused_loras num_timesteps numpy_to_pil pack_weights parameters prepare_latents progress_bar push_to_hub
    register_for_auto_class save_config set_progress_bar_config to_json_file to_json_string transformer_name write_lora_layers
    """.split()
)
COMPILED = "compiles for seconds on a CPU: what it leaves is set by hand in test_torch_compile_in_place_is_seen"
TRANSFORMER = {
    "load_lora_adapter": load_adapter,
    "set_adapters": after_adapter(lambda p: p.transformer.set_adapters(["a"], [0.3])),
    "set_adapter": after_adapter(lambda p: p.transformer.set_adapter("a")),
    "add_adapter": add_adapter,
    "disable_adapters": after_adapter(lambda p: p.transformer.disable_adapters()),
    "enable_adapters": after_adapter(lambda p: (p.transformer.disable_adapters(), edit(p), p.transformer.enable_adapters())),
    "fuse_lora": fuse_and_unload_in_the_component,
    "unfuse_lora": after_adapter(lambda p: (p.transformer.fuse_lora(), edit(p), p.transformer.unfuse_lora())),
    "unload_lora": after_adapter(lambda p: p.transformer.unload_lora()),
    "disable_lora": after_adapter(lambda p: p.transformer.disable_lora()),
    "enable_lora": after_adapter(lambda p: (p.transformer.disable_lora(), edit(p), p.transformer.enable_lora())),
    "delete_adapters": after_adapter(lambda p: p.transformer.delete_adapters("a")),
    "enable_lora_hotswap": lambda p, _: p.transformer.enable_lora_hotswap(target_rank=8),
    "set_attn_processor": lambda p, _: p.transformer.set_attn_processor(HalvedAttention()),
    "set_attention_backend": lambda p, _: p.transformer.set_attention_backend("_native_math"),
    "reset_attention_backend": lambda p, _: (p.transformer.set_attention_backend("_native_math"), p.transformer.reset_attention_backend()),
    "fuse_qkv_projections": lambda p, _: p.transformer.fuse_qkv_projections(),
    "unfuse_qkv_projections": lambda p, _: (p.transformer.fuse_qkv_projections(), edit(p), p.transformer.unfuse_qkv_projections()),
    "enable_cache": lambda p, _: p.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5)),
    "disable_cache": lambda p, _: (p.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5)), edit(p), p.transformer.disable_cache()),
    "enable_layerwise_casting": lambda p, _: p.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "enable_group_offload": offload_to_disk,
    "enable_gradient_checkpointing": lambda p, _: p.transformer.enable_gradient_checkpointing(),
    "disable_gradient_checkpointing": lambda p, _: p.transformer.disable_gradient_checkpointing(),
    "to": lambda p, _: p.transformer.to(torch.float64).to(torch.float32),
    "float": lambda p, _: p.transformer.float(),
    "half": lambda p, _: p.transformer.half().float(),
    "set_use_memory_efficient_attention_xformers": lambda p, _: p.transformer.set_use_memory_efficient_attention_xformers(False),
    "disable_xformers_memory_efficient_attention": lambda p, _: p.transformer.disable_xformers_memory_efficient_attention(),
    "enable_xformers_memory_efficient_attention": lambda p, _: p.transformer.enable_xformers_memory_efficient_attention(),
    "register_to_config": lambda p, _: p.transformer.register_to_config(note=1),
    "dequantize": lambda p, _: p.transformer.dequantize(),
    "save_pretrained": lambda p, f: p.transformer.save_pretrained(f),
    "save_lora_adapter": after_adapter(lambda p: None),
}
VAE = {
    "enable_tiling": lambda p, _: p.vae.enable_tiling(16, 16, 8, 8),
    "disable_tiling": lambda p, _: (p.vae.enable_tiling(16, 16, 8, 8), edit(p), p.vae.disable_tiling()),
    "enable_slicing": lambda p, _: p.vae.enable_slicing(),
    "disable_slicing": lambda p, _: (p.vae.enable_slicing(), edit(p), p.vae.disable_slicing()),
    "clear_cache": lambda p, _: p.vae.clear_cache(),
    "enable_group_offload": lambda p, _: p.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "enable_layerwise_casting": lambda p, _: p.vae.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "register_to_config": lambda p, _: p.vae.register_to_config(latents_mean=[0.5 * m + 0.1 for m in p.vae.config.latents_mean]),
    "to": lambda p, _: p.vae.to(torch.float64).to(torch.float32),
}
# Of no single GPU's or CPU's picture: other devices, many processes, training, or a cost of seconds.
MODEL_NOT_HERE = {
    "cuda": "needs a GPU", "compile_repeated_blocks": COMPILED, "enable_parallelism": "needs several processes",
    "enable_npu_flash_attention": "an NPU", "disable_npu_flash_attention": "an NPU", "set_use_npu_flash_attention": "an NPU",
    "enable_xla_flash_attention": "a TPU", "disable_xla_flash_attention": "a TPU", "set_use_xla_flash_attention": "a TPU",
}  # fmt: skip
MODEL_MAKES_OR_READS = set(
    """
    active_adapters attn_processors cache_context config config_name device dtype extract_init_dict forward from_config
    from_pretrained from_single_file get_config_dict get_memory_footprint has_compatibles ignore_for_config
    is_cache_enabled is_gradient_checkpointing load_config num_parameters push_to_hub register_for_auto_class save_config
    to_json_file to_json_string blend_h blend_v decode encode tiled_decode tiled_encode
    """.split()
)


def public(cls):
    """The names that diffusers gives a class, of whatever base."""
    return {n for base in cls.__mro__ if base.__module__.startswith("diffusers.") for n in vars(base) if not n.startswith("_")}


def test_every_public_method_of_the_stock_classes_is_decided():
    decided = PIPELINE.keys() | PIPELINE_NEEDS_A_GPU | PIPELINE_MAKES_OR_READS
    assert public(QwenImageEditPlusPipeline) - decided == set(), "decide here what becomes of the fast path"
    decided = TRANSFORMER.keys() | MODEL_NOT_HERE.keys() | MODEL_MAKES_OR_READS
    assert public(QwenImageTransformer2DModel) - decided == set(), "decide here what becomes of the fast path"
    inherited = (public(AutoencoderKLQwenImage) & public(QwenImageTransformer2DModel)) - {"enable_tiling"}
    assert public(AutoencoderKLQwenImage) - inherited - VAE.keys() - MODEL_MAKES_OR_READS == set(), "decide here"


@pytest.mark.parametrize(
    "owner, method", [(o, n) for o, acts in (("pipe", PIPELINE), ("transformer", TRANSFORMER), ("vae", VAE)) for n in acts]
)
def test_a_stock_method_after_the_fast_path_has_the_effect_of_the_plain_path(plain, fast, tmp_path, owner, method):
    act = {"pipe": PIPELINE, "transformer": TRANSFORMER, "vae": VAE}[owner][method]

    def outcome(pipe):
        """What comes out, twice, or how it fails: some methods leave a model that stock cannot run."""
        try:
            act(pipe, tmp_path)
            return torch.cat([edit(pipe), edit(pipe)])
        except Exception as error:
            return f"{type(error).__name__} {error}"[:60]

    expected, found = outcome(plain), outcome(fast)
    if isinstance(expected, str):
        assert found == expected
        return
    assert isinstance(found, torch.Tensor), found
    difference = (found - expected).abs().max().item()
    tolerance = 0.05 if method == "to" and owner == "pipe" else TOLERANCE  # half precision
    assert difference < tolerance, (difference, fast.fast_path.report)


@pytest.mark.parametrize("act", [load_lora, fuse_and_unload, load_adapter, fuse_and_unload_in_the_component, add_adapter, register])
def test_what_is_compared_above_can_be_seen(plain, tmp_path, act):
    before = edit(plain)
    act(plain, tmp_path)
    assert (edit(plain) - before).abs().max() > VISIBLE


# --- weights, layers, objects -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_the_models_is_seen_by_the_fast_path_and_by_the_caches(plain, fast, change):
    before = edit(plain)
    for pipe in (plain, fast):
        torch.manual_seed(5)
        change(pipe)
    after = edit(plain)
    assert (after - before).abs().max() > 1e-5, "the change can be seen"
    difference = (edit(fast) - after).abs().max().item()
    assert difference < min(TOLERANCE, (after - before).abs().max().item() / 2), (difference, fast.fast_path.report)


@pytest.mark.parametrize("name", ["transformer.transformer_blocks.0.img_mod.1", "transformer.transformer_blocks.0.attn.norm_q",
                                  "vae.decoder.conv_in", "text_encoder.model.visual.patch_embed.proj"])  # fmt: skip
def test_weights_changed_without_a_trace_are_read_again_after_clear_caches(plain, fast, name):
    before = edit(fast)
    for pipe in (plain, fast):
        component, _, layer = name.partition(".")
        getattr(pipe, component).get_submodule(layer).weight.data.mul_(2)
        pipe.clear_caches()
    found, expected = edit(fast), edit(plain)
    assert (found - before).abs().max() > 1e-5 and (found - expected).abs().max() < TOLERANCE


def test_what_is_refused_is_named_in_the_report_and_comes_back(fast, caplog):
    handle = fast.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    edit(fast)
    line = next(line for line in fast.description["fast_path"] if line["name"] == "fused_transformer")
    assert not line["applied"] and "hook of transformer_blocks.0" in line["reason"]
    edit(fast)
    assert sum("hook of transformer_blocks.0" in record.message for record in caplog.records) == 1, "said once"
    handle.remove()
    edit(fast)
    assert fast.fused_transformer is not None and all(line.applied for line in fast.fast_path.report)


def test_autocast_runs_the_stock_modules_and_what_was_cached_without_it_is_not_served(plain, fast):
    before = edit(plain)
    with torch.autocast("cpu", torch.bfloat16):
        difference = (edit(fast) - edit(plain)).abs().max().item()
        assert fast.fused_transformer is None and "autocast" in fast.fast_path.report[0].reason
    assert difference < TOLERANCE, difference
    assert (edit(fast) - before).abs().max() < TOLERANCE and fast.fused_transformer is not None


def test_torch_compile_in_place_is_seen(fast):
    calls = []
    block = fast.transformer.transformer_blocks[0]
    block._compiled_call_impl = lambda *args, **kwargs: calls.append(1) or block._call_impl(*args, **kwargs)
    edit(fast)
    assert calls and "torch.compile" in next(line.reason for line in fast.fast_path.report if not line.applied)


def test_a_token_cache_of_another_build_is_not_read(plain, fast):
    def run(pipe, cache):
        embeds, mask = pipe.encode_prompt("sepia")
        references = pipe.encode_references(np.zeros((32, 32, 3), np.uint8), area=1024)
        inputs = pipe.initial_noise(32, 32), references, embeds, mask, pipe.schedule(1, 32, 32)
        return pipe.denoise(*inputs, **({"token_cache": cache} if cache else {}))

    cache = fast.token_cache()
    cache.begin(None)
    run(fast, cache)
    for pipe in (plain, fast):
        replaced_data(pipe)
    cache.begin(np.zeros((2, 2), bool))
    assert (run(fast, cache) - run(plain, None)).abs().max() < TOLERANCE


def test_a_look_at_a_component_costs_little_and_changes_nothing(plain):
    """What a look costs at full size is in `fast_path.watch`; here, that what runs leaves the number as it was."""
    for name in ("transformer", "text_encoder", "vae"):
        seen, module = Component(), getattr(plain, name)
        edit(plain)
        number = seen.look(module)
        edit(plain)
        assert seen.look(module) == number, name
        seen.look(copy.deepcopy(module))
        assert seen.version != number


# --- layers that are not plain ----------------------------------------------------------------------------------------


class Quantised(torch.Tensor):
    """As a library for quantisation has them: numbers in another form, behind the functions of a tensor."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, requires_grad=False)

    def __init__(self, data):
        self.numbers, self.scale = (data / data.abs().max() * 127).round().to(torch.int8), data.abs().max() / 127

    def plain(self):
        return self.numbers.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            other = cls.__new__(cls, args[0])
            other.numbers, other.scale = args[0].numbers, args[0].scale
            return other
        unwrapped = torch.utils._pytree.tree_map(lambda a: a.plain() if isinstance(a, cls) else a, (args, kwargs or {}))
        return function(*unwrapped[0], **unwrapped[1])


class GGUFLike(nn.Parameter):
    pass


class Linear4bit(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.9


def quantised_tensor(layer):
    layer.weight = nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)


def parameter_of_a_kind_of_its_own(layer):
    layer.weight = GGUFLike(layer.weight.detach(), requires_grad=False)


@pytest.mark.parametrize("change, named", [(quantised_tensor, "Quantised"), (parameter_of_a_kind_of_its_own, "GGUFLike"), (None, "Linear4bit")])
@pytest.mark.parametrize("before", [True, False])
def test_layers_of_other_libraries_are_refused_by_name_and_the_plain_path_works(plain, change, named, before):
    fast = copy.deepcopy(plain)
    if not before:
        fast.enable_fast_path()
        edit(fast)
    for pipe in (plain, fast):
        block = pipe.transformer.transformer_blocks[0]
        if change:
            change(block.attn.to_q)
        else:
            block.attn.to_q.__class__ = Linear4bit
    if before:
        fast.enable_fast_path()
    assert (edit(fast) - edit(plain)).abs().max() < TOLERANCE
    line = next(line for line in fast.fast_path.report if line.name == "fused_transformer")
    assert not line.applied and named in line.reason, line


def test_a_lora_for_a_quantised_transformer_is_refused_by_name(plain, tmp_path):
    from int8_linear import Int8Linear
    from quantization.swap import swap_linears

    swap_linears(plain.transformer, Int8Linear)
    with pytest.raises(EditError, match="quantised to int8"):
        load_lora(plain, tmp_path)


def test_casting_every_layer_runs_as_in_stock(plain):
    other = copy.deepcopy(plain)
    apply_layerwise_casting(other.text_encoder, torch.bfloat16, torch.float32)
    assert (edit(other) - edit(plain)).abs().max() < 0.05


def test_hooks_on_the_whole_text_encoder_are_called(plain):
    expected = edit(plain)
    other = copy.deepcopy(plain)
    apply_group_offloading(other.text_encoder, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    calls = []
    other.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    assert (edit(other) - expected).abs().max() < TOLERANCE and calls


# --- as stock ---------------------------------------------------------------------------------------------------------


def test_a_stock_pipeline_becomes_a_cached_one(pocket):
    stock = QwenImageEditPlusPipeline(**pocket.components)
    pipe = CachedQwenImageEditPipeline.from_pipe(stock)
    assert all(getattr(pipe, name) is getattr(stock, name) for name in stock.config if not name.startswith("_"))
    assert (edit(pipe) - edit(pocket)).abs().max() == 0
    assert QwenImageEditPlusPipeline.from_pipe(pipe).transformer is stock.transformer


def test_prompts_are_embedded_without_a_transformer_and_a_vae(pocket):
    folder = pocket._origin.folder
    pipe = CachedQwenImageEditPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=torch.float32)
    embeds, mask = pipe.encode_prompt("make it a pencil sketch", np.zeros((64, 64, 3), np.uint8))
    expected, _ = pocket.encode_prompt("make it a pencil sketch", np.zeros((64, 64, 3), np.uint8))
    assert mask is None and torch.equal(embeds, expected)
    report = {line.name: line for line in pipe.enable_fast_path()}
    assert report["fused_text_encoder"].applied and "no transformer" in report["fused_transformer"].reason


def test_a_folder_saved_with_the_fast_path_in_is_read_by_stock_and_by_us(fast, plain, tmp_path):
    fast.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "QwenImageEditPlusPipeline"
    stock = DiffusionPipeline.from_pretrained(tmp_path, processor=plain.processor, dtype=torch.float32)
    assert type(stock) is QwenImageEditPlusPipeline
    ours = CachedQwenImageEditPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    for name in ("transformer", "vae", "text_encoder"):
        expected = getattr(plain, name).state_dict()
        for loaded in (stock, ours):
            found = getattr(loaded, name).state_dict()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    assert (tmp_path / "processor" / "video_preprocessor_config.json").is_file(), "stock's processor asks for it"


def test_any_number_of_pictures_is_edited_in_the_library(fast, plain, photo):
    pictures = [photo(32, 32, seed) for seed in range(5)]
    settings = {"width": 32, "height": 32, "num_inference_steps": 1, "reference_area": 1024, "output_type": "pt", "true_cfg_scale": 1.0}
    found = [p(pictures, "sepia", generator=torch.Generator().manual_seed(0), **settings).images for p in (plain, fast)]
    assert (found[0] - found[1]).abs().max() < TOLERANCE
    with pytest.raises(EditError, match=r"4 reference pictures were given\. Allowed: 1 to 3"):
        plain.open_references(pictures[:4])


class Slower(FlowMatchEulerDiscreteScheduler):
    steps_made = 0

    def step(self, model_output, timestep, sample, **kwargs):
        self.steps_made += 1
        return super().step(0.5 * model_output, timestep, sample, **kwargs)


@pytest.mark.parametrize("kind", [FlowMatchLCMScheduler, Slower])
@pytest.mark.parametrize("guided", [False, True])
def test_a_scheduler_with_a_step_of_its_own_steps_as_in_stock(plain, fast, monkeypatch, kind, guided, photo):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_module
    from PIL import Image

    monkeypatch.setattr(stock_module, "VAE_IMAGE_SIZE", 32 * 32)
    for pipe in (plain, fast):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    stock = QwenImageEditPlusPipeline(**plain.components)
    stock.set_progress_bar_config(disable=True)
    settings = {"width": 32, "height": 32, "num_inference_steps": 3, "output_type": "latent"}
    settings |= {"prompt_embeds": plain.encode_prompt("sepia")[0], "true_cfg_scale": 3.0 if guided else 1.0}
    settings |= {"negative_prompt_embeds": plain.encode_prompt("dark")[0]} if guided else {}
    found = []
    for pipe in (stock, plain, fast):
        torch.manual_seed(3)
        found.append(pipe(Image.fromarray(photo(32, 32)), generator=torch.Generator().manual_seed(0), **settings).images)
    assert (found[0] - found[1]).abs().max() < TOLERANCE and (found[0] - found[2]).abs().max() < TOLERANCE
    if kind is Slower:
        assert plain.scheduler.steps_made == 6 and fast.scheduler.steps_made == 3, "the pipelines' own objects stepped"


def test_pictures_at_different_steps_each_have_a_scheduler_of_their_own(plain):
    plain.scheduler = Slower.from_config(plain.scheduler.config)
    embeds, mask = plain.encode_prompt("sepia")
    references = plain.encode_references(np.zeros((32, 32, 3), np.uint8), area=1024)
    inputs = [(plain.initial_noise(32, 32, s), references, embeds, mask, plain.schedule(2 + s, 32, 32)) for s in range(2)]
    alone = [plain.denoise(*each) for each in inputs]
    pictures = [plain.start(*each) for each in inputs]
    while any(not p.finished for p in pictures):
        plain.advance([p for p in pictures if not p.finished])
    assert all(torch.equal(p.latents, expected) for p, expected in zip(pictures, alone))


def test_a_scheduler_that_cannot_make_the_schedule_says_so(plain):
    plain.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(EditError, match="FlowMatchHeunDiscreteScheduler"):
        edit(plain)


def test_a_changed_scheduler_setting_is_seen(plain):
    before = plain.schedule(4, 64, 64).sigmas.clone()
    plain.scheduler.register_to_config(base_shift=2.0, max_shift=2.0)
    assert not torch.equal(plain.schedule(4, 64, 64).sigmas, before)


def test_copies_and_pickles_are_whole(fast, plain):
    import pickle

    for module in fast.text_encoder.modules():  # what transformers leaves where an earlier test ran the stock model cannot be pickled
        module._forward_hooks.clear()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert (edit(other) - edit(plain)).abs().max() < TOLERANCE and other.fused_transformer is not None
        with torch.no_grad():
            other.transformer.proj_out.weight.zero_()
    assert (edit(fast) - edit(plain)).abs().max() < TOLERANCE, "a copy is a copy"


def test_components_that_are_handed_out_run_in_stock(fast, plain):
    stock = QwenImageEditPlusPipeline(**fast.components)
    edit(fast)
    assert fast.fused_transformer is not None and fast.fast_path.keep_weights
    assert all(getattr(stock, n) is getattr(fast, n) for n in ("transformer", "vae", "text_encoder"))


def test_compiled_and_wrapped_transformers_run_as_they_are(plain):
    expected = edit(plain)
    plain.enable_fast_path()
    plain.transformer = torch.compile(plain.transformer, backend="eager", dynamic=False)
    assert (edit(plain) - expected).abs().max() < TOLERANCE
    assert "OptimizedModule" in next(line.reason for line in plain.fast_path.report if not line.applied)


def test_the_scale_of_a_lora_reaches_the_layers(plain, fast, tmp_path):
    for pipe in (plain, fast):
        load_lora(pipe, tmp_path)
    found = [edit(p, attention_kwargs={"scale": s}) for p in (plain, fast) for s in (0.0, 0.5)]
    assert (found[0] - found[2]).abs().max() < TOLERANCE and (found[1] - found[3]).abs().max() < TOLERANCE
    assert (found[0] - found[1]).abs().max() > VISIBLE


def test_a_callback_may_change_the_model_between_steps(plain, fast, tmp_path):
    def load(pipe, step, timestep, tensors):
        if step == 0:
            load_adapter(pipe, tmp_path)
        return {}

    found = [edit(p, num_inference_steps=2, callback_on_step_end=load) for p in (plain, fast)]
    assert (found[0] - found[1]).abs().max() < TOLERANCE


# --- prompts are bounded by what the model has positions for ----------------------------------------------------------


def test_a_prompt_is_bounded_in_tokens_where_tokens_are_made(plain, fast):
    for pipe in (plain, fast):
        with pytest.raises(EditError, match=r"The prompt is too long: it has \d+ tokens, \d+ of them for the pictures\. Allowed: 3968\."):
            pipe(np.zeros((64, 64, 3), np.uint8), "\N{GRINNING FACE}\N{UNICORN FACE}" * 1500, width=32, height=32)
        with pytest.raises(EditError, match="Allowed: 3968"):
            edit(pipe, negative_prompt="\N{GRINNING FACE}" * 3000, true_cfg_scale=3.0)


def test_embeddings_that_came_from_elsewhere_are_bounded_too(plain):
    embeds = plain.encode_prompt("sepia")[0]
    with pytest.raises(EditError, match=r"it has 4097 tokens\. Allowed: 4095"):
        plain(np.zeros((32, 32, 3), np.uint8), prompt_embeds=embeds[:, :1].expand(-1, 4097, -1), width=32, height=32,
              reference_area=1024, num_inference_steps=1, true_cfg_scale=1.0)  # fmt: skip


def test_the_longest_prompt_that_is_allowed_runs(plain):
    """Bounds of one more and one less: the table's last position is used."""
    embeds = plain.encode_prompt("sepia")[0][:, :1].expand(-1, 4095, -1)
    references = plain.encode_references(np.zeros((32, 32, 3), np.uint8), area=1024)
    plain.transformer.transformer_blocks = plain.transformer.transformer_blocks[:1]
    plain.start(plain.initial_noise(32, 32), references, embeds, None, plain.schedule(1, 32, 32))
    table = plain.transformer.pos_embed
    assert len(table([[(1, 2, 2), (1, 2, 2)]], max_txt_seq_len=4095, device=torch.device("cpu"))[1]) == 4095
    assert len(table([[(1, 2, 2), (1, 2, 2)]], max_txt_seq_len=4096, device=torch.device("cpu"))[1]) == 4095, "one is missing"


def test_a_loaded_pipeline_may_move_its_weights():
    pipe = load_pipeline("pocket")
    assert not pipe.fast_path.keep_weights
    pipe.enable_fast_path()
    assert not pipe.fast_path.keep_weights and not copy.deepcopy(pipe).fast_path.keep_weights


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bit_layers_are_put_in_again_after_a_change(kind):
    pipe = load_pipeline("pocket", quantize=kind, text_encoder_quantize=kind)
    assert all(line.applied for line in pipe.enable_fast_path())
    before = edit(pipe)
    pipe.clear_caches()
    assert torch.equal(edit(pipe), before)
    in_place(pipe)
    changed = edit(pipe)
    pipe.disable_fast_path()
    assert (changed - edit(pipe)).abs().max() < 0.05 < (changed - before).abs().max(), "the modulation is read again"


def test_parts_are_those_of_the_pipeline():
    assert list(fast_path.PARTS) == ["single_frame_vae", "fused_transformer", "fused_text_encoder"]
