"""The fused text encoder gives the loaded model's numbers; what it asks of the GPU can be recorded and replayed."""

import copy

import pytest
import torch
from support.graphs import EagerRecorder
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from fast_path.graphs import Graphs
from fast_path.text_encoder import FusedTextEncoder
from fast_path.watch import Away
from pipeline.vision_language import word_rows

# Other kernels add in another order: float32 rounding, relative to the largest value.
ROUNDING = 1e-5
# The real model's patches and windows, heads of 80, and a feed-forward whose width is no multiple of 8.
VISION = {
    "depth": 3, "hidden_size": 160, "num_heads": 2, "intermediate_size": 108, "out_hidden_size": 64, "patch_size": 14,
    "window_size": 112, "fullatt_block_indexes": [1],
}  # fmt: skip
TEXT = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "rope_parameters": {"mrope_section": [2, 3, 3]},
}  # fmt: skip


def make_encoder(vision=None, text=None):
    """A small Qwen2.5-VL of the real form. Untrained biases are zeros and norms ones, so all weights are redrawn."""
    config = Qwen2_5_VLConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, **(text or {})},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        parameter.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.1)
    return encoder


@pytest.fixture(scope="module")
def plain():
    """The model as it is loaded. Nothing may change it."""
    return make_encoder()


@pytest.fixture(scope="module")
def fused(plain):
    """(a copy of `plain`, the fused encoder built on it)."""
    encoder = copy.deepcopy(plain)
    return encoder, FusedTextEncoder(encoder)


@pytest.fixture(scope="module")
def pocket_calls(pocket_copy, photo):
    """The embedded model's text encoder, and the calls of its towers for an edit of two pictures."""
    pipeline, calls = pocket_copy(), {"see": [], "read": []}
    model = pipeline.text_encoder.model

    def keep_see(_, args, kwargs, output):
        calls["see"].append((args[0].clone(), tuple(kwargs["grid_thw"][0, 1:].tolist()), output.pooler_output))

    def keep_read(_, args, kwargs, output):
        calls["read"].append((kwargs["inputs_embeds"].clone(), kwargs["position_ids"], output.last_hidden_state))

    hooks = [
        model.visual.register_forward_hook(keep_see, with_kwargs=True),
        model.language_model.register_forward_hook(keep_read, with_kwargs=True),
    ]
    for prompt in ("make it snow", "turn the first picture into a drawing of the second"):
        pipeline.encode_prompt(prompt, [photo(256, 256), photo(320, 192, seed=1)])
    for hook in hooks:
        hook.remove()
    return pipeline.text_encoder, calls


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def patches(rows, columns, seed=0):
    return torch.randn(rows * columns, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def tokens(length, seed=0):
    """Embeddings (1, L, 64) and positions (3, 1, L): text, a picture of 4 columns, text."""
    embeds = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).repeat(3, 1, 1)
    if length > 16:
        picture = torch.arange(8)
        positions[:, 0, 4:12] = 4 + torch.stack([torch.zeros_like(picture), picture // 4, picture % 4])
        positions[:, 0, 12:] -= 4
    return embeds, positions


@torch.no_grad()
def plainly_see(encoder, values, grid):
    visual = encoder.model.visual
    return visual(values, grid_thw=torch.tensor([[1, *grid]])).pooler_output


@torch.no_grad()
def plainly_read(encoder, embeds, positions):
    return encoder.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


def storages(encoder):
    """Bytes of the distinct storages behind the parameters."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in encoder.parameters()}


# 28x28 has windows of 64, 32 and 16 patches; 20x36 of 64, 32 (lying and standing) and 16; 6x10 none of full height.
@pytest.mark.parametrize("grid", [(28, 28), (20, 36), (36, 20), (16, 24), (6, 10), (2, 2)])
def test_it_sees_what_the_vision_tower_sees(plain, fused, grid):
    values = patches(*grid)
    expected, seen = plainly_see(plain, values, grid), fused[1].encode_image(values, grid)
    assert seen.shape == expected.shape == (grid[0] * grid[1] // 4, 64)
    assert relative(seen, expected) < ROUNDING


@pytest.mark.parametrize("length", [1, 17, 64, 131])
def test_it_reads_what_the_language_model_reads(plain, fused, length):
    embeds, positions = tokens(length)
    expected, read = plainly_read(plain, embeds, positions), fused[1].encode_text(embeds, positions)
    assert read.shape == expected.shape == (1, length, 64)
    assert relative(read, expected) < ROUNDING


@pytest.mark.parametrize("skip", [1, 20, 63])
def test_skipped_rows_are_left_out_and_the_others_do_not_change(plain, fused, skip):
    embeds, positions = tokens(64)
    expected = plainly_read(plain, embeds, positions)[:, skip:]
    read = fused[1].encode_text(embeds, positions, skip=skip)
    assert read.shape == expected.shape and relative(read, expected) < ROUNDING


def test_one_key_and_value_head_for_each_query_head_is_read_too():
    encoder = make_encoder(text={"num_key_value_heads": 4})
    embeds, positions = tokens(24)
    expected = plainly_read(encoder, embeds, positions)
    assert relative(FusedTextEncoder(encoder).encode_text(embeds, positions), expected) < ROUNDING


def test_the_embedded_model_sees_two_pictures_and_reads_two_prompts(pocket_calls):
    encoder, calls = pocket_calls
    fused = FusedTextEncoder(encoder)
    assert len(calls["see"]) == 2 and calls["see"][0][1] != calls["see"][1][1], "pictures of two shapes"
    for values, grid, expected in calls["see"]:
        assert relative(fused.encode_image(values, grid), expected) < ROUNDING
    assert len({embeds.shape[1] for embeds, *_ in calls["read"]}) == 2, "prompts of two lengths"
    for embeds, positions, expected in calls["read"]:
        assert relative(fused.encode_text(embeds, positions), expected) < ROUNDING
        assert relative(fused.encode_text(embeds, positions, skip=64), expected[:, 64:]) < ROUNDING


def test_positions_matter(fused):
    embeds, positions = tokens(24)
    flat = torch.arange(24).repeat(3, 1, 1)
    assert relative(fused[1].encode_text(embeds, positions), fused[1].encode_text(embeds, flat)) > 0.01


def test_in_bfloat16_it_is_as_near_to_the_exact_result_as_the_plain_path(plain):
    half = copy.deepcopy(plain).to(torch.bfloat16)
    for name, buffer in half.named_buffers():  # as loading does it: frequencies stay in float32
        buffer.data = plain.get_buffer(name).clone()
    values, (embeds, positions) = patches(20, 36), tokens(64)
    exact = plainly_see(plain, values, (20, 36)), plainly_read(plain, embeds, positions)
    values, embeds = values.bfloat16(), embeds.bfloat16()
    stock = plainly_see(half, values, (20, 36)), plainly_read(half, embeds, positions)
    fused = FusedTextEncoder(half)
    ours = fused.encode_image(values, (20, 36)), fused.encode_text(embeds, positions)
    for which in range(2):
        assert ours[which].dtype == torch.bfloat16
        error, allowed = (float((x[which].float() - exact[which]).norm()) for x in (ours, stock))
        assert 0 < error < 1.2 * allowed, f"{error} against {allowed}"  # both are rounding: they differ by chance


class _Attentions(TorchFunctionMode):
    """Counts attention calls and remembers whether one had a mask."""

    def __init__(self):
        super().__init__()
        self.shapes, self.masked = [], False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.append(tuple(args[0].shape))
            self.masked |= len(args) > 3 or (kwargs or {}).get("attn_mask") is not None
        return function(*args, **(kwargs or {}))


def test_windows_of_one_size_are_one_call_and_nothing_is_masked(fused):
    with _Attentions() as attentions:
        fused[1].encode_image(patches(28, 28), (28, 28))
    windowed = [(9, 2, 64, 80), (6, 2, 32, 80), (1, 2, 16, 80)]
    assert attentions.shapes == [*windowed, (1, 2, 784, 80), *windowed]
    with _Attentions() as reading:
        fused[1].encode_text(*tokens(64))
    assert reading.shapes == [(1, 4, 64, 16)] * 3
    assert not attentions.masked and not reading.masked


class _Operations(TorchDispatchMode):
    """Counts what runs; fails on what asks the device a question or brings it data from the host."""

    refused = ("_local_scalar_dense", "nonzero", "lift_fresh", "_to_copy", "arange", "scalar_tensor", "pin_memory")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        moves = name == "_to_copy" and (kwargs or {}).get("device") is None  # a change of dtype on the device is none
        if any(name.startswith(refused) for refused in self.refused) and not moves:
            raise AssertionError(f"{name} runs inside the recorded function")
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_the_plain_path_ask(plain):
    with pytest.raises(AssertionError, match="inside the recorded function"), _Operations():
        plainly_see(plain, patches(16, 24), (16, 24))


def test_a_second_call_asks_nothing_and_brings_nothing_from_the_host(fused):
    values, (embeds, positions) = patches(20, 36), tokens(40)
    seen, read = fused[1].encode_image(values, (20, 36)), fused[1].encode_text(embeds, positions, skip=8)
    with _Operations():
        assert torch.equal(fused[1].encode_image(values, (20, 36)), seen)
        assert torch.equal(fused[1].encode_text(embeds, positions, skip=8), read)


def test_one_more_layer_is_few_more_kernels():
    values, (embeds, positions) = patches(16, 16), tokens(40)
    counts = []
    for layers in (2, 3):
        fused = FusedTextEncoder(
            make_encoder(
                {"depth": layers, "fullatt_block_indexes": [0]},
                {"num_hidden_layers": layers, "num_key_value_heads": 4},  # not every CPU attention shares key heads
            )
        )
        fused.encode_image(values, (16, 16)), fused.encode_text(embeds, positions)
        with _Operations() as seeing:
            fused.encode_image(values, (16, 16))
        with _Operations() as reading:
            fused.encode_text(embeds, positions)
        counts.append((seeing.count, reading.count))
    # 14 and 12 on a GPU; here an RMS norm is up to 8 operations instead of one.
    assert counts[1][0] - counts[0][0] <= 14 + 2 * 7, counts
    assert counts[1][1] - counts[0][1] <= 12 + 2 * 7, counts


def test_what_is_recorded_once_serves_all_inputs_of_its_shape(plain):
    fused = FusedTextEncoder(copy.deepcopy(plain))
    fused.graphs = Graphs(recorder=EagerRecorder())
    for _ in range(2):
        for seed in (0, 1):
            for grid in ((16, 24), (24, 16)):  # as many patches in other windows
                values = patches(*grid, seed)
                assert relative(fused.encode_image(values, grid), plainly_see(plain, values, grid)) < ROUNDING
            embeds, positions = tokens(40, seed)
            expected = plainly_read(plain, embeds, positions + seed)
            for skip in (0, 8):
                read = fused.encode_text(embeds, positions + seed, skip)
                assert relative(read, expected[:, skip:]) < ROUNDING
    assert len(fused.graphs) == fused.graphs.recordings == 2 + 2


def test_the_models_own_forward_still_gives_its_numbers(plain, fused):
    values, (embeds, positions) = patches(20, 36), tokens(40)
    # The same numbers in the same matrices; a longer stride may choose another kernel.
    assert relative(plainly_see(fused[0], values, (20, 36)), plainly_see(plain, values, (20, 36))) < 1e-6
    assert relative(plainly_read(fused[0], embeds, positions), plainly_read(plain, embeds, positions)) < 1e-6
    state = fused[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert list(state) == list(plain.state_dict())


def test_weights_are_shared_with_the_model_and_follow_it(plain):
    encoder = copy.deepcopy(plain)
    fused = FusedTextEncoder(encoder)
    values, (embeds, positions) = patches(16, 24), tokens(40)
    before = fused.encode_image(values, (16, 24)), fused.encode_text(embeds, positions)
    for parameter in encoder.parameters():
        parameter.mul_(1.25)
    after = fused.encode_image(values, (16, 24)), fused.encode_text(embeds, positions)
    expected = plainly_see(encoder, values, (16, 24)), plainly_read(encoder, embeds, positions)
    for old, new, want in zip(before, after, expected):
        assert relative(old, want) > 0.01 and relative(new, want) < ROUNDING


@pytest.mark.parametrize("ids", [[7], [3, 99, 3, 3, 0, 99], list(range(100)) + [90] * 196])
def test_a_prompts_own_word_table_holds_its_words_to_the_bit_and_each_once(plain, ids):
    words = plain.model.language_model.embed_tokens
    table, rows = word_rows(words, ids, torch.device("cpu"))
    assert torch.equal(table[rows], words(torch.tensor(ids)))
    assert len(table) == len(set(ids))


@pytest.mark.parametrize("fast", [False, True])
def test_a_live_prompt_looks_its_words_up_once(pocket_copy, photo, fast):
    pipeline, asked = pocket_copy(), []
    if fast:
        pipeline.enable_fast_path()
    words = pipeline.text_encoder.model.language_model.embed_tokens
    words.register_forward_hook(lambda _, ids, rows: asked.append(ids[0].numel()))
    for seed in range(3):
        pipeline.encode_prompt("make it snow", photo(256, 256, seed=seed))
    assert len(asked) == 1 and asked[0] < 100, "each word once, and a picture's placeholder too"
    pipeline.encode_prompt("make it rain", photo(256, 256))
    assert len(asked) == 2


def test_the_word_table_may_lie_elsewhere_but_not_be_of_another_kind(plain):
    encoder = copy.deepcopy(plain)
    encoder.model.language_model.embed_tokens.to("meta")
    with pytest.raises(TypeError, match=r"embed_tokens is no plain one"):
        FusedTextEncoder(encoder)
    encoder = copy.deepcopy(plain)
    encoder.model.language_model.embed_tokens.to(torch.bfloat16)
    with pytest.raises(TypeError, match="not all of one kind"):
        FusedTextEncoder(encoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_not_read_as_a_whole_leaves_the_gpu_and_comes_back(plain, tied):
    encoder = copy.deepcopy(plain).cuda()
    words, head = encoder.model.language_model.embed_tokens, encoder.lm_head
    if tied:
        head.weight = words.weight
    fused, ids = FusedTextEncoder(encoder), [3, 99, 3, 0]
    before = words(torch.tensor(ids).cuda())
    away = Away(fused.device)
    assert away.take(fused.unread) == words.weight.nbytes * (1 if tied else 2)
    assert not words.weight.is_cuda and not head.weight.is_cuda and away.take(fused.unread) == 0
    table, rows = word_rows(words, ids, before.device)
    assert torch.equal(table[rows], before) and away.take(FusedTextEncoder(encoder).unread) == 0
    away.bring_back()
    assert words.weight.is_cuda and (head.weight is words.weight) == tied and head.weight.is_cuda
    assert torch.equal(words(torch.tensor(ids).cuda()), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_vision_tower_is_laid_anew_without_holes(plain):
    encoder = copy.deepcopy(plain).cuda()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    fused = FusedTextEncoder(encoder)
    assert torch.cuda.memory_allocated() - before < 100_000, "rows filled up, and rounding to whole pieces"
    assert all(p.is_cuda for p in encoder.parameters())
    values = patches(16, 24)
    assert relative(fused.encode_image(values.cuda(), (16, 24)).cpu(), plainly_see(plain, values, (16, 24))) < 1e-3, "TF32 at most"


def test_memory_does_not_grow_and_building_again_takes_none(plain):
    encoder = copy.deepcopy(plain)
    before = storages(encoder)
    first = FusedTextEncoder(encoder)
    after = storages(encoder)
    # Three blocks of each tower: q/k/v weights and biases (text), gate/up weights (both) and biases (vision) are one.
    assert len(after) == len(before) - 3 * (2 * 2 + 1) - 3 * (1 + 1)
    # Rows are filled up from 108 to 112 in the vision tower's feed-forward: 12 vectors of 160 and 8 biases a block.
    assert sum(after.values()) - sum(before.values()) == 3 * 4 * (12 * 160 + 8)
    second = FusedTextEncoder(encoder)
    assert storages(encoder) == after
    values = patches(16, 24)
    assert torch.equal(first.encode_image(values, (16, 24)), second.encode_image(values, (16, 24)))


def test_a_fused_model_can_be_saved_and_loaded(plain, fused, tmp_path):
    fused[0].save_pretrained(tmp_path)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())


class _Quantised(nn.Linear):
    pass


def _offload(encoder):
    encoder.model.visual._hf_hook = object()


def _offload_by_forward(encoder):
    encoder.model.language_model.layers[1].forward = lambda *args, **kwargs: None


def _quantise(encoder):
    encoder.model.language_model.layers[2].mlp.down_proj = _Quantised(96, 64, bias=False)


def _adapt(encoder):
    nn.utils.parametrizations.weight_norm(encoder.model.visual.blocks[0].attn.proj)


def _store_as_integers(encoder):
    weight = encoder.model.visual.blocks[0].attn.proj.weight.to(torch.int8)
    encoder.model.visual.blocks[0].attn.proj.weight = nn.Parameter(weight, requires_grad=False)


def _mix(encoder):
    encoder.model.language_model.norm.to(torch.bfloat16)


def _dilate(encoder):
    encoder.model.visual.patch_embed.proj.stride = (2, 7, 7)


def _leave_out(encoder):
    del encoder.model.visual.blocks[2].mlp.up_proj


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_offload, "offloaded"),
        (_offload_by_forward, r"forward of model\.language_model\.layers\.1 has been replaced"),
        (_quantise, r"model\.language_model\.layers\.2\.mlp\.down_proj is a _Quantised"),
        (_adapt, r"ParametrizedLinear"),
        (_store_as_integers, r"model\.visual\.blocks\.0\.attn\.proj is no plain one: Parameter, torch\.int8"),
        (_mix, "not all of one kind"),
        (_dilate, "kernel is not its stride"),
        (_leave_out, "built otherwise: .*up_proj"),
    ],
)
def test_a_changed_model_is_refused_with_the_reason_and_left_alone(plain, change, reason):
    encoder = copy.deepcopy(plain)
    change(encoder)
    before = storages(encoder)
    with pytest.raises(TypeError, match=reason):
        FusedTextEncoder(encoder)
    assert storages(encoder) == before


def test_other_models_and_settings_are_refused_with_the_reason():
    with pytest.raises(TypeError, match="a Linear is not known here"):
        FusedTextEncoder(nn.Linear(2, 2))
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    with pytest.raises(TypeError, match="sliding window"):
        FusedTextEncoder(make_encoder(text=sliding))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    with pytest.raises(TypeError, match='rotary positions are "dynamic"'):
        FusedTextEncoder(make_encoder(text={"rope_parameters": dynamic}))


@pytest.mark.parametrize(("count", "grid"), [(784, (28, 27)), (64, (4, 8)), (27, (3, 9))])
def test_patches_that_do_not_fit_the_grid_are_refused(fused, count, grid):
    with pytest.raises(ValueError, match="patches, grid"):
        fused[1].encode_image(torch.zeros(count, 1176), grid)


def test_a_batch_is_refused(fused):
    embeds, positions = tokens(24)
    with pytest.raises(ValueError, match="a batch of 2"):
        fused[1].encode_text(embeds.repeat(2, 1, 1), positions.repeat(1, 2, 1))
