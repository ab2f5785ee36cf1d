"""What stock's methods do to a pipeline whose fast path runs from recordings, with weights moved out. The pocket model; needs CUDA."""

import copy

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from support import stock_changes as methods

import fast_path
from cached_pipeline import load_pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Without TF32 other kernels, one step with guidance left out, pictures in [0, 1]: rounding.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def loaded():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = load_pipeline("pocket", device="cuda", dtype=torch.float32)
    block = pipe.transformer.transformer_blocks[1]
    methods.WIDTHS.update(dim=block.dim, mlp=block.img_mlp.net[2].in_features)
    return pipe


@pytest.fixture
def plain(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture
def fast(loaded):
    """On the fast path, everything recorded and replayed once, weights moved out."""
    pipe = copy.deepcopy(loaded)
    report = pipe.enable_fast_path()
    assert [line.name for line in report if line.applied] == [*fast_path.PARTS, "warm_up"], report
    for _ in range(2):
        methods.edit(pipe)
    assert not pipe.transformer.transformer_blocks[0].img_mod[1].weight.is_cuda and not pipe.vae.encoder.conv_in.weight.is_cuda
    return pipe


def assert_alike(fast, plain, tolerance=TOLERANCE):
    """Run and recorded, then replayed."""
    expected = methods.edit(plain)
    for _ in range(3):
        difference = (methods.edit(fast) - expected).abs().max().item()
        assert difference < tolerance, (difference, fast.fast_path.report)


def group_offload(pipe, folder):
    pipe.transformer.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level")


def group_offload_of_blocks(pipe, folder):
    pipe.transformer.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def group_offload_on_a_stream(pipe, folder):
    pipe.transformer.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True
    )


def group_offload_to_disk(pipe, folder):
    pipe.transformer.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


def group_offload_of_all(pipe, folder):
    pipe.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level")


def model_offload(pipe, folder):
    pipe.enable_model_cpu_offload()


def sequential_offload(pipe, folder):
    pipe.enable_sequential_cpu_offload()


def offload_and_back(pipe, folder):
    pipe.enable_model_cpu_offload()
    methods.edit(pipe)
    pipe.remove_all_hooks()
    pipe.to("cuda")


def casting(pipe, folder):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def to_cpu_and_back(pipe, folder):
    pipe.to("cpu")
    pipe.to("cuda")


def slicing(pipe, folder):  # stock's tiles of so small a picture do not suit CUDA's attention
    pipe.vae.enable_slicing()


@pytest.mark.parametrize(
    "act",
    [
        methods.load_lora, methods.fuse_and_unload, methods.load_adapter, methods.fuse_and_unload_in_the_component, methods.register,
        group_offload, group_offload_of_blocks, group_offload_on_a_stream, group_offload_to_disk, group_offload_of_all, model_offload,
        sequential_offload, offload_and_back, casting, to_cpu_and_back, slicing,
    ],
    ids=lambda act: act.__name__,
)  # fmt: skip
def test_a_stock_method_after_recordings_has_the_effect_of_the_plain_path(plain, fast, tmp_path, act):
    for pipe in (plain, fast):
        act(pipe, tmp_path / str(pipe is fast))
    assert_alike(fast, plain)


@pytest.mark.parametrize("change", methods.CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_models_is_seen_by_recordings(plain, fast, change):
    for pipe in (plain, fast):
        torch.manual_seed(5)
        change(pipe)
        for name in ("transformer", "vae", "text_encoder"):
            if change in (methods.new_layer, methods.text_adapter):
                getattr(pipe, name).to("cuda")
    assert_alike(fast, plain)


@pytest.mark.parametrize("name", ["transformer.transformer_blocks.0.img_mod.1", "vae.decoder.conv_in"])
def test_weights_changed_without_a_trace_are_read_again_after_clear_caches(plain, fast, name):
    for pipe in (plain, fast):
        component, _, layer = name.partition(".")
        getattr(pipe, component).get_submodule(layer).weight.data.mul_(2)
        pipe.clear_caches()
    assert_alike(fast, plain)


def test_a_component_that_is_run_by_other_code_has_its_weights_with_it(plain, fast):
    latents = torch.randn(1, 16, 1, 4, 4, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    latents = latents[:, : fast.latent_channels]
    with torch.no_grad():
        expected, found = (p.vae.decode(latents, return_dict=False)[0] for p in (plain, fast))
        assert (expected - found).abs().max() < TOLERANCE
    assert_alike(fast, plain)


def test_a_stock_pipeline_on_the_same_components_runs_in_turns_with_the_fast_path(plain, fast, photo):
    from PIL import Image

    stock = QwenImageEditPlusPipeline(**fast.components)
    stock.set_progress_bar_config(disable=True)
    assert stock.transformer.transformer_blocks[0].img_mod[1].weight.is_cuda, "whoever takes components gets them whole"
    for _ in range(2):
        assert_alike(fast, plain)
        stock(Image.fromarray(photo(32, 32)), "sepia", width=32, height=32, num_inference_steps=1, true_cfg_scale=1.0)
    assert fast.fused_transformer is not None


def test_what_was_refused_comes_back_with_its_recordings_and_its_memory(fast, plain):
    held = torch.cuda.memory_allocated()
    handle = fast.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert_alike(fast, plain)
    assert fast.fused_transformer is None
    assert all(p.is_cuda for p in fast.transformer.parameters()), "the stock transformer runs with all its weights"
    handle.remove()
    assert_alike(fast, plain)
    assert fast.fused_transformer.graphs.recordings > 0
    assert not fast.transformer.transformer_blocks[0].img_mod[1].weight.is_cuda
    assert torch.cuda.memory_allocated() < held * 1.2


def test_autocast_runs_the_stock_modules_where_they_belong(plain, fast):
    with torch.autocast("cuda", torch.bfloat16):
        assert (methods.edit(fast) - methods.edit(plain)).abs().max() < 0.05
        assert fast.fused_transformer is None
    assert_alike(fast, plain)
