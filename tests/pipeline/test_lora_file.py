"""LoRA files as they are found: every key style and dtype gives the same weights, and what is no LoRA is one sentence."""

import copy
import json
import math
import re
import struct

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from support.lora_files import LORA_LINEARS, lightning_keys, lora_pairs

from pipeline import lora
from pipeline.images import EditError
from pipeline.lora_file import read_lora

Q = "transformer_blocks.0.attn.to_q"
PREFIXES = (
    "", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.base_model.model.",
    "base_model.model.transformer.", "base_model.model._orig_mod.", "module.", "pipe.dit.", "lora_unet.", "lora_transformer.",
)  # fmt: skip
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "transformer_", "")
SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_A.default_0.default.weight", ".lora_B.default_0.default.weight"), (".lora_A", ".lora_B"),
    (".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"), (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)  # fmt: skip


def keys(pairs, prefix="transformer.", down=".lora_A.weight", up=".lora_B.weight", flat=False, alpha=None) -> dict:
    state = {}
    for name, tensors in pairs.items():
        name = prefix + (name.replace(".", "_") if flat else name)
        state |= {f"{name}{down}": tensors[0], f"{name}{up}": tensors[1]}
        if alpha is not None:
            state[f"{name}.alpha"] = alpha.clone()
    return state


@pytest.fixture(scope="module")
def one_block(pocket):
    return lora_pairs(pocket.transformer, blocks=1)


def read(path, transformer, state, metadata=None):
    save_file(state, path, metadata)
    return read_lora(path, transformer)


def fused(transformer, path, state, weight=1.0, metadata=None) -> QwenImageTransformer2DModel:
    """A copy of the transformer with the file's LoRA in it."""
    copied = copy.deepcopy(transformer)
    lora.fuse(copied, read(path, copied, state, metadata), weight)
    return copied


def same_changes(got, expected) -> bool:
    return got.keys() == expected.keys() and all(
        got[name].factor == change.factor
        and all(torch.equal(got[name].tensors[field], tensor) for field, tensor in change.tensors.items())
        for name, change in expected.items()
    )


def largest_difference(model, expected: dict[str, torch.Tensor]) -> float:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    return max((state[name] - tensor).abs().max().item() for name, tensor in expected.items())


@pytest.mark.parametrize("alpha", [None, torch.tensor(2.0)], ids=["plain", "alpha"])
def test_every_key_style_is_read_as_the_diffusers_style_is(pocket, tmp_path, one_block, alpha):
    file, transformer = tmp_path / "lora.safetensors", pocket.transformer
    expected = read(file, transformer, keys(one_block, alpha=alpha))
    assert expected.keys() == one_block.keys() and {c.factor for c in expected.values()} == {1.0 if alpha is None else 0.5}
    styles = [(prefix, False, suffix) for prefix in PREFIXES for suffix in SUFFIXES]
    styles += [(prefix, True, suffix) for prefix in FLAT_PREFIXES for suffix in SUFFIXES]
    for prefix, flat, (down, up) in styles:
        got = read(file, transformer, keys(one_block, prefix, down, up, flat, alpha))
        assert same_changes(got, expected), (prefix, flat, down)


@pytest.mark.parametrize("theirs, ours", [
    ("transformer_blocks.0.attn.to_out", "transformer_blocks.0.attn.to_out.0"),
    ("transformer_blocks.0.attn.processor.to_q", Q),
    ("transformer_blocks.0.img_mod", "transformer_blocks.0.img_mod.1"),
    ("lora_unet_transformer_blocks_0_txt_mod_1", "transformer_blocks.0.txt_mod.1"),
    ("diffusion_model.time_text_embed.timestep_embedder.0", "time_text_embed.timestep_embedder.linear_1"),
    ("lora_unet_time_text_embed_timestep_embedder_linear_2", "time_text_embed.timestep_embedder.linear_2"),
    ("lora_unet_norm_out_linear", "norm_out.linear"),
    ("lora_unet_img_in", "img_in"),
    ("lycoris_proj_out", "proj_out"),
    ("transformer.txt_in", "txt_in"),
])  # fmt: skip
def test_a_layer_that_other_code_names_otherwise_is_found(pocket, tmp_path, theirs, ours):
    out_features, in_features = pocket.transformer.get_submodule(ours).weight.shape
    pairs = {theirs: (torch.randn(2, in_features), torch.randn(out_features, 2))}
    assert list(read(tmp_path / "a.safetensors", pocket.transformer, keys(pairs, prefix=""))) == [ours]


def test_the_shapes_of_a_convolution_are_those_of_a_layer(pocket, tmp_path, one_block):
    as_convolution = {name: tuple(t[..., None, None] for t in tensors) for name, tensors in one_block.items()}
    got = fused(pocket.transformer, tmp_path / "a.safetensors", keys(as_convolution))
    expected = fused(pocket.transformer, tmp_path / "b.safetensors", keys(one_block))
    assert largest_difference(got, expected.state_dict()) == 0


def test_the_fields_of_a_layer_may_come_in_any_styles(pocket, tmp_path):
    down, up = pair()
    state = {f"lora_unet_{Q.replace('.', '_')}.lora_down.weight": down, f"transformer.{Q}.lora_B.weight": up, f"{Q}.alpha": ONE}
    (change,) = read(tmp_path / "a.safetensors", pocket.transformer, state).values()
    assert change.factor == 1 / 4 and torch.equal(change.tensors["up"], up)


@pytest.mark.parametrize("style", ["bare", "kohya", "lightning", "alpha of another dtype"])
def test_the_fused_weights_are_those_of_the_diffusers_style_bit_for_bit(pocket, tmp_path, style):
    pairs = lora_pairs(pocket.transformer)
    doubled = {name: (down, up * 2) for name, (down, up) in pairs.items()}  # as alpha 8 of rank 4: a power of two is exact
    state = {
        "bare": lambda: keys(doubled, prefix=""),
        "kohya": lambda: keys(pairs, "lora_unet_", ".lora_down.weight", ".lora_up.weight", True, torch.tensor(8.0)),
        "lightning": lambda: lightning_keys(pairs, 8.0),
        "alpha of another dtype": lambda: keys(pairs, "diffusion_model.", alpha=torch.tensor([8], dtype=torch.int64)),
    }[style]()
    got = fused(pocket.transformer, tmp_path / "a.safetensors", state, 0.5)
    expected = fused(pocket.transformer, tmp_path / "b.safetensors", keys(doubled), 0.5)
    assert largest_difference(got, expected.state_dict()) == 0
    plain = pocket.transformer.state_dict()
    by_hand = {n: plain[n] + 0.5 * 2 * pairs[k][1] @ pairs[k][0] if (k := n.removesuffix(".weight")) in pairs and n != k
               else t for n, t in plain.items()}  # fmt: skip
    assert largest_difference(got, by_hand) < 1e-6, "two roundings of float32 numbers about 1, in another order"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_any_storage_dtype_gives_the_weights_of_its_numbers(pocket, tmp_path, one_block, dtype):
    stored = {name: tuple(t.to(dtype) for t in pair) for name, pair in one_block.items()}
    alpha = torch.tensor(2.0).to(dtype)
    got = fused(pocket.transformer, tmp_path / "a.safetensors", keys(stored, alpha=alpha))
    numbers = {name: tuple(t.float() for t in pair) for name, pair in stored.items()}
    expected = fused(pocket.transformer, tmp_path / "b.safetensors", keys(numbers, alpha=torch.tensor(2.0)))
    assert largest_difference(got, expected.state_dict()) == 0


def test_a_bfloat16_model_is_changed_by_the_product_of_float32(pocket, tmp_path, one_block):
    model = copy.deepcopy(pocket.transformer).to(torch.bfloat16)
    weight = model.get_submodule(Q).weight.float()
    lora.fuse(model, read(tmp_path / "a.safetensors", model, keys(one_block)), 1.0)
    down, up = one_block[Q]
    assert torch.equal(model.get_submodule(Q).weight, torch.addmm(weight, up, down).bfloat16())


def stock_fused(pocket, file, weight) -> dict[str, torch.Tensor]:
    parts = pocket.components | {"transformer": copy.deepcopy(pocket.transformer)}
    pipeline = QwenImageEditPlusPipeline(**parts)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora(components=["transformer"], lora_scale=weight)
    pipeline.unload_lora_weights()
    return pipeline.transformer.state_dict()


@pytest.mark.parametrize("style", ["diffusers", "lightning", "ai-toolkit", "kohya"])
def test_stock_diffusers_fuses_the_same_weights_from_the_styles_that_it_reads(pocket, tmp_path, style):
    pairs, file = lora_pairs(pocket.transformer), tmp_path / "a.safetensors"
    state = {
        "diffusers": lambda: keys(pairs),
        "lightning": lambda: lightning_keys(pairs),
        "ai-toolkit": lambda: keys(pairs, "diffusion_model."),
        "kohya": lambda: keys(pairs, "lora_unet_", ".lora_down.weight", ".lora_up.weight", True, torch.tensor(8.0)),
    }[style]()
    got = fused(pocket.transformer, file, state, 0.7)
    # Stock rounds the product to float32 before it is added, here it is not.
    assert largest_difference(got, stock_fused(pocket, file, 0.7)) < 1e-6


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saved_with_its_metadata_gets_the_scales_that_it_was_trained_with(pocket, tmp_path, rslora):
    trained = copy.deepcopy(pocket.transformer)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False, use_rslora=rslora,
                        rank_pattern={"transformer_blocks.1.attn.to_q": 8}, alpha_pattern={"transformer_blocks.2.attn.to_k": 12})  # fmt: skip
    trained.add_adapter(config)
    state = {name: t for name, t in trained.state_dict().items() if "lora_" in name}
    QwenImageEditPlusPipeline.save_lora_weights(
        tmp_path, {name.replace(".default.", "."): t.contiguous() for name, t in state.items()},
        transformer_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=list)),
    )  # fmt: skip
    got = copy.deepcopy(pocket.transformer)
    changes, _ = lora.open_lora(str(tmp_path), got)
    factors = {name: change.factor for name, change in changes.items()}
    root = math.sqrt if rslora else float
    assert factors[Q] == 2 / root(4) and factors["transformer_blocks.1.attn.to_q"] == 2 / root(8)
    assert factors["transformer_blocks.2.attn.to_k"] == 12 / root(4)
    lora.fuse(got, changes, 1.0)
    expected = merged(trained)
    assert largest_difference(got, expected) < 1e-6


def merged(model) -> dict[str, torch.Tensor]:
    """The weights of a model with peft's adapters merged into them by peft."""
    for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
    return {n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if not re.search(r"\.(lora|hada|lokr)_", n)}


@pytest.mark.parametrize("config", [
    LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], use_dora=True, init_lora_weights=False),
    LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], lora_bias=True, init_lora_weights=False),
    LoHaConfig(r=4, alpha=2, target_modules=["to_q", "net.2"], init_weights=False),
    LoKrConfig(r=4, alpha=2, target_modules=["to_q", "net.2"], init_weights=False),
    LoKrConfig(r=4, alpha=2, target_modules=["to_q", "net.2"], init_weights=False, decompose_both=True),
], ids=["dora", "bias", "loha", "lokr", "lokr of two products"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes its own bias for a tensor that was cut off
def test_what_peft_saved_is_merged_as_peft_does_it(pocket, tmp_path, config):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(pocket.transformer), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif re.search(r"(lora|hada|lokr)_", name):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    got = copy.deepcopy(pocket.transformer)
    changes, _ = lora.open_lora(str(tmp_path), got)
    lora.fuse(got, changes, 1.0)
    expected = merged(model.base_model.model)
    assert largest_difference(got, expected) < 1e-5, "numbers about 1; peft multiplies in another order"
    assert largest_difference(pocket.transformer, expected) > 1e-3, "the LoRA does something"


@pytest.mark.parametrize("field", ["dora_scale", "magnitude"])
@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_dora_gives_its_layers_the_magnitudes_that_it_holds(pocket, tmp_path, one_block, field, along, weight):
    """The file of LyCORIS and ComfyUI; part of the way at part of the weight."""
    w, (down, up) = pocket.transformer.get_submodule(Q).weight.detach(), one_block[Q]
    magnitude = torch.rand(256, 1) + 0.5 if along == "rows" else torch.rand(1, 256) + 0.5
    state = keys({Q: one_block[Q]}, "diffusion_model.", alpha=torch.tensor(2.0))
    got = fused(pocket.transformer, tmp_path / "a.safetensors", state | {f"diffusion_model.{Q}.{field}": magnitude}, weight)
    trained = w + 0.5 * up @ down
    trained = trained / trained.norm(dim=1 if along == "rows" else 0, keepdim=True) * magnitude
    assert (got.get_submodule(Q).weight - (w + weight * (trained - w))).abs().max() < 1e-6


def test_lokr_of_every_form_is_the_kronecker_product(pocket, tmp_path):
    """alpha scales what has a rank. Of two whole factors it says nothing, but in musubi's files, which name their factor."""
    w, random = pocket.transformer.get_submodule(Q).weight.detach(), torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(8, 16, generator=random) * 0.1, torch.randn(32, 16, generator=random) * 0.1
    a, b = torch.randn(32, 4, generator=random) * 0.1, torch.randn(4, 16, generator=random) * 0.1
    first = {"lokr_w1_a": w1[:, :2].contiguous(), "lokr_w1_b": torch.randn(2, 16, generator=random)}
    whole = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e10)}
    for fields, extra, expected in [
        (whole, {}, torch.kron(w1, w2)),
        (whole | {"alpha": torch.tensor(16.0)}, {"lokr_factor": torch.tensor(8)}, torch.kron(w1, w2) / 2),
        ({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(2.0)}, {}, torch.kron(w1, a @ b) / 2),
        (first | {"lokr_w2": w2, "alpha": torch.tensor(1.0)}, {}, torch.kron(first["lokr_w1_a"] @ first["lokr_w1_b"], w2) / 2),
        (first | {"lokr_w2_a": a, "lokr_w2_b": b}, {}, torch.kron(first["lokr_w1_a"] @ first["lokr_w1_b"], a @ b)),
    ]:  # fmt: skip
        state = {f"lycoris_{Q.replace('.', '_')}.{name}": t for name, t in fields.items()} | extra
        got = fused(pocket.transformer, tmp_path / "a.safetensors", state)
        assert (got.get_submodule(Q).weight - (w + expected)).abs().max() < 1e-5, list(fields)


def test_differences_of_weights_biases_and_norms_are_added(pocket, tmp_path):
    norm = "transformer_blocks.0.attn.norm_q"
    layers = {name: pocket.transformer.get_submodule(name) for name in (Q, norm)}
    diff, bias, scale = torch.randn(256, 256), torch.randn(256), torch.randn(64)
    state = {f"diffusion_model.{Q}.diff": diff, f"diffusion_model.{Q}.diff_b": bias, f"lycoris_{norm.replace('.', '_')}.w_norm": scale}
    got = fused(pocket.transformer, tmp_path / "a.safetensors", state, 0.5)
    assert torch.equal(got.get_submodule(Q).weight, layers[Q].weight + 0.5 * diff)
    assert torch.equal(got.get_submodule(Q).bias, layers[Q].bias + 0.5 * bias)
    assert torch.equal(got.get_submodule(norm).weight, layers[norm].weight + 0.5 * scale)


def test_the_lightning_files_of_2509_have_these_720_pairs(tmp_path):
    """Their names and shapes at full width, on the meta device in the model's place."""
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=60)
    shapes = {name: m.weight.shape for name, m in model.named_modules() if any(name.endswith(f".{end}") for end in LORA_LINEARS)}
    state = lightning_keys({n: (torch.zeros(1, i, dtype=torch.bfloat16), torch.zeros(o, 1, dtype=torch.bfloat16))
                            for n, (o, i) in shapes.items()}, alpha=1.0)  # fmt: skip
    assert len(state) == 3 * 720
    changes = read(tmp_path / "a.safetensors", model, state)
    assert changes.keys() == shapes.keys() and {change.factor for change in changes.values()} == {1.0}
    with pytest.raises(EditError, match="offloaded"):
        lora.open_lora(str(tmp_path / "a.safetensors"), model)


def pair(out_features=256, in_features=256, rank=4, dtype=torch.float32):
    return torch.ones(rank, in_features, dtype=dtype) * 0.5, torch.ones(out_features, rank, dtype=dtype) * 0.5


def named(prefix: str, **fields) -> dict:
    return {f"{prefix}.{name}": tensor for name, tensor in fields.items()}


GOOD = keys({Q: pair()})
ONE = torch.ones(1)
REFUSED = {
    "no keys": ({}, "it has no keys"),
    "no LoRA": ({"something.else": ONE}, '1 of its 1 keys are not known, for example "something.else"'),
    "a whole model": ({f"{Q}.weight": torch.ones(256, 256)}, "whole weights in place of changes"),
    "another model": (keys({"double_blocks.0.img_attn.qkv": pair()}), "0 of its 1 layers fit this model; for example transformer.double"),
    "in part": (GOOD | keys({"transformer_blocks.77.attn.to_q": pair()}), "1 of its 2 layers fit.*transformer_blocks.77.* is no layer of it"),
    "wide": (keys({Q: pair(3072, 3072)}), "0 of its 1 layers fit.*to_q is 256x256, its change 3072x3072"),
    "other shape": (keys({Q: pair(256, 512)}), "is 256x256, its change 256x512"),
    "apart": (keys({Q: (torch.ones(4, 256), torch.ones(256, 8))}), "of parts that do not fit each other"),
    "flat": (keys({Q: (torch.ones(256), torch.ones(256))}), "of parts that do not fit each other"),
    "scalar": (keys({Q: (torch.tensor(1.0), torch.tensor(1.0))}), "rank 0|do not fit"),
    "rank 0": (keys({Q: (torch.ones(0, 256), torch.ones(256, 0))}), "rank 0"),
    "half a pair": ({f"{Q}.lora_A.weight": pair()[0]}, f'not whole, it has only "{Q}.lora_A.weight"'),
    "alpha alone": ({f"{Q}.alpha": ONE}, "not whole"),
    "magnitudes alone": ({f"{Q}.dora_scale": torch.ones(256, 1)}, "not whole"),
    "magnitudes of another": (GOOD | {f"{Q}.dora_scale": torch.ones(8, 1)}, "its magnitudes 8x1"),
    "twice": (GOOD | keys({Q: pair()}, "lora_unet_", flat=True), f"it changes {Q} twice, by .*lora_unet.* and by .*transformer"),
    "two adapters": (keys({Q: pair()}, "", ".lora_A.one.weight", ".lora_B.one.weight")
                     | keys({Q: pair()}, "", ".lora_A.two.weight", ".lora_B.two.weight"), "twice"),
    "two kinds": (GOOD | named(Q, diff=torch.ones(256, 256)), "in two ways, LoRA and diff"),
    "nan": (keys({Q: (pair()[0] * math.nan, pair()[1])}), "lora_A.weight.* not finite"),
    "inf": (keys({Q: (pair()[0], pair()[1] * math.inf)}), "lora_B.weight.* not finite"),
    "too large for float32": (keys({Q: (pair()[0].double() * 1e300, pair()[1].double())}), "not finite in float32"),
    "nan alpha": (GOOD | {f"transformer.{Q}.alpha": ONE * math.nan}, r"alpha of .* is \[nan\], which is no number"),
    "many alphas": (GOOD | {f"transformer.{Q}.alpha": torch.ones(3)}, "which is no number"),
    "integers": (keys({Q: tuple(t.to(torch.int8) for t in pair())}), "is of int8"),
    "text encoder": (GOOD | keys({"layers_0_self_attn_q_proj": pair()}, "lora_te_"), "changes the text encoder too"),
    "text encoder of diffusers": (GOOD | keys({"model.layers.0.self_attn.q_proj": pair()}, "text_encoder."), "text encoder too"),
    "text encoder alone": (keys({"layers_0_self_attn_q_proj": pair()}, "lora_te1_"), "text encoder"),
    "OFT": (named(Q, oft_blocks=torch.ones(4, 8, 8)), "it holds OFT"),
    "BOFT": (named(Q, boft_R=torch.ones(4, 8, 8)), "it holds OFT"),
    "GLoRA": (named(Q, **{"a1.weight": pair()[0], "a2.weight": pair()[1]}), "it holds GLoRA"),
    "IA3": (named(Q, weight=torch.ones(256), on_input=torch.tensor(True)), r"it holds \(IA\)3"),
    "Tucker": (GOOD | named(Q, **{"lora_mid.weight": torch.ones(4, 4, 1, 1)}), "Tucker"),
    "scaled fp8": (GOOD | {f"transformer.{Q}.lora_A.weight_scale": ONE}, "8-bit or 4-bit|not known"),
    "other keys": (GOOD | {f"transformer.{Q}.secret": ONE}, "not known"),
    "a long key": (GOOD | {"a" * 100_000 + ".lora_A.weight": ONE}, "has 100014 characters"),
    "LoKr of another size": (named(Q, lokr_w1=torch.ones(4, 4), lokr_w2=torch.ones(4, 4)), "is 256x256, its change 16x16"),
    "half a LoKr": (named(Q, lokr_w1=torch.ones(4, 4)), "not whole"),
    "half a LoHa": (named(Q, hada_w1_a=torch.ones(256, 4), hada_w1_b=torch.ones(4, 256)), "not whole"),
    "another shape on purpose": (GOOD | {f"transformer.{Q}.reshape_weight": torch.tensor([512, 256])}, "the file makes it 512x256"),
    "many layers of another model": (keys({f"layers.{i}.attention.{'to_q' * 20}": pair() for i in range(300)}), "0 of its 300 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_for_this_model_is_one_sentence_and_changes_nothing(pocket, tmp_path, case):
    state, says = REFUSED[case]
    file = tmp_path / "a.safetensors"
    save_file({name: t.clone() for name, t in state.items()}, file)
    with pytest.raises(EditError, match=says) as error:
        read_lora(file, pocket.transformer)
    text = str(error.value).replace(str(tmp_path), "")
    assert "Allowed: a .safetensors file of LoRA" in text and len(text) < 600 and "\n" not in text


@pytest.mark.parametrize("metadata, says", [
    ({"lora_adapter_metadata": "{"}, "settings that peft wrote"),
    ({"lora_adapter_metadata": "[1]"}, "settings that peft wrote"),
    ({"lora_adapter_metadata": "[" * 100_000}, "settings that peft wrote"),
    ({"lora_adapter_metadata": '{"transformer.lora_alpha": "much"}'}, "no number"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}'}, "a pattern that is no name"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "use_dora": true}'}, "a DoRA without the magnitudes"),
    ({"lora_adapter_metadata": '{"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}'}, "trained on other weights"),
])  # fmt: skip
def test_settings_that_cannot_be_read_are_refused(pocket, tmp_path, metadata, says):
    with pytest.raises(EditError, match=says):
        read(tmp_path / "a.safetensors", pocket.transformer, GOOD, metadata)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize("data, says", [
    (b"", "it is empty"),
    (b"PK\x03\x04 archive", "a pickle, which may run any program"),
    (b"\x80\x02}q\x00.", "a pickle"),
    (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    (b"<!DOCTYPE html><html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    (b"broken", "no whole safetensors file"),
    ("Ein Text über alles Mögliche, länger als acht Zeichen.".encode(), "no whole safetensors file"),
    (header(b"{}", 2**60), "no whole safetensors file"),
    (header(b"{"), "no whole safetensors file"),
    (header(b'{"a.lora_A.weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'), "no whole safetensors file"),
    (header(b'{"a.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,9223372036854775807]}}'), "no whole safetensors file"),
    (header(b'{"a.lora_A.weight":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}') + bytes(4), "no whole safetensors file"),
    (header(b"\xff" * 64), "no whole safetensors file"),
])  # fmt: skip
def test_what_is_no_whole_safetensors_file_is_one_sentence(pocket, tmp_path, data, says):
    file = tmp_path / "a.safetensors"
    file.write_bytes(data)
    with pytest.raises(EditError, match=says) as error:
        read_lora(file, pocket.transformer)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_file_cut_off_anywhere_is_refused(pocket, tmp_path):
    save_file(GOOD, file := tmp_path / "a.safetensors")
    data = file.read_bytes()
    for length in (1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(EditError, match="no whole safetensors file"):
            read_lora(file, pocket.transformer)


def test_names_from_a_file_are_shown_printable(pocket, tmp_path):
    with pytest.raises(EditError) as error:
        read(tmp_path / "a.safetensors", pocket.transformer, keys({"\x1b[31m\n\u202eevil": pair()}))
    assert str(error.value).isprintable()


def test_a_change_that_the_models_dtype_cannot_hold_is_refused(pocket, tmp_path, one_block):
    model = copy.deepcopy(pocket.transformer).half()
    large = one_block | {Q: (torch.full((4, 256), 1e3), torch.full((256, 4), 1e3))}
    for state, weight in ((keys(large), 1.0), (keys(one_block), 1e30)):
        save_file(state, file := tmp_path / "a.safetensors")
        with pytest.raises(EditError, match="more than float16 holds"):
            lora.open_lora(str(file), model, weight)
