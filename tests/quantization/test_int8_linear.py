"""INT8 layers, and what they share with FP8: exact integers, errors within bounds, models swapped, written and read."""

import copy
import doctest
import inspect
import json
import pydoc
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from skimage import data
from support import ROOT
from support.models import KINDS, same_weights, sqnr_db
from torch import nn

import fp8_linear
import int8_linear
from fp8_linear import Fp8Linear
from int8_linear import Int8Linear, rotate_down_projections, swap_linears
from pipeline.images import fit
from pipeline.quantize import quantize_main
from pocket_model.edits import EDITS, split
from pocket_model.evaluate import edit_picture, psnr, tensor
from quantization import QuantizationError
from quantization.folder import FILES, NOTE, is_quantized, load_quantized, quantize_folder, save_quantized
from quantization.layer import QuantizedLinear
from quantization.pair import QuantizedPair
from quantization.rows import Quantized, rotate
from quantization.swap import swap_linears as swap_to_kind

WEIGHTS = ROOT / "pocket_model" / "weights"

def linear(inputs=512, outputs=256, bias=True, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias).requires_grad_(False)


def rows_of(count: int, inputs: int, outliers: str = "none", seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator)
    if outliers == "channels":  # as models have them: a few inputs that are large in every row
        x[:, torch.randperm(inputs, generator=generator)[: inputs // 200]] *= 50
    return x


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 512, 4096])
def test_on_the_cpu_integers_are_multiplied_and_their_sums_are_exact(rows):
    """Whole numbers with their largest at 127 quantise to themselves: then the layer has nothing to round."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, 128), generator=generator).float()
    weight = torch.randint(-127, 128, (48, 128), generator=generator).float()
    x[:, 0], weight[:, 0] = 127, -127
    layer = Int8Linear.from_float(linear(128, 48, bias=False))
    layer._fill(Int8Linear.quantize_weight(weight), None)
    exact = (x.long() @ weight.long().t()).float()
    # Scales of 1 in float32 are 127 * (1 / 127): the product is one unit in the last place away at most.
    assert torch.equal(layer.quantize(x).values.float(), x) and torch.equal(layer.weight.float(), weight)
    assert torch.allclose(layer(x), exact, rtol=3e-7, atol=0)


def test_the_fast_operation_runs(monkeypatch):
    calls, real = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append((a.dtype, b.dtype)) or real(a, b))
    layer = Int8Linear.from_float(linear())
    layer(rows_of(20, 512))
    assert calls == [(torch.int8, torch.int8)]
    assert layer.choice(20, torch.float32) == ("int_mm", None, "the only one on a CPU")


@pytest.mark.parametrize("kind, outliers, group, least_db", [
    (Int8Linear, "none", 0, 37.0),
    (Int8Linear, "channels", 0, 22.0),
    (Int8Linear, "channels", 16, 30.0),
    (Int8Linear, "channels", 256, 36.0),
    # e4m3 has 3 bits behind the point, an error of 2.6 % for each operand: 28.6 dB, whatever the data.
    (Fp8Linear, "none", 0, 28.0),
    (Fp8Linear, "channels", 0, 27.5),
    (Fp8Linear, "channels", 256, 27.5),
])  # fmt: skip
def test_the_error_stays_within_its_bound(kind, outliers, group, least_db):
    """Seen: 38.3, 23.5, 34.1 and 38.8 dB for INT8 with 3072 inputs."""
    layer, x = linear(3072, 256), rows_of(64, 3072, outliers)
    value = sqnr_db(kind.from_float(layer, group)(x), layer(x))
    assert value > least_db, f"{value:.1f} dB"


def test_a_rotation_pays_where_outliers_are():
    layer, x = linear(3072, 256), rows_of(64, 3072, "channels")
    plain, rotated = (sqnr_db(Int8Linear.from_float(layer, group)(x), layer(x)) for group in (0, 256))
    assert rotated > plain + 10, f"{plain:.1f} -> {rotated:.1f} dB"


@pytest.mark.parametrize("group", [16, 256])
def test_rotations_are_orthogonal_and_no_row_gathers_the_mean(group):
    matrix = rotate(torch.eye(group), group)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(group), atol=1e-6)
    assert torch.allclose(matrix.sum(0).abs(), torch.ones(group), atol=1e-5), "regular: equal sums"
    x = torch.randn(3, 2 * group)
    assert torch.allclose(rotate(x, group)[:, group:], rotate(x[:, group:], group), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (7, 512), (2, 5, 512), (2, 3, 4, 512), (0, 512)])
def test_any_leading_shape_and_the_bias_is_kept(kind, bias, shape):
    layer = linear(bias=bias)
    if bias:
        layer.bias.fill_(100.0)
    made = kind.from_float(layer)
    x = torch.randn(shape)
    got, exact = made(x), layer(x)
    assert got.shape == exact.shape and got.dtype == exact.dtype
    assert got.numel() == 0 or (got - exact).abs().max() < 0.1, "a tenth of an output, far from a bias of 100"
    assert (made.bias is None) == (not bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_inputs_dtype(kind, dtype):
    layer = linear().to(dtype)
    made, x = kind.from_float(layer), rows_of(9, 512).to(dtype)
    assert made(x).dtype == dtype
    assert sqnr_db(made(x).float(), F.linear(x.float(), layer.weight.float(), layer.bias.float())) > 27


@pytest.mark.parametrize("kind", KINDS)
def test_gelu_and_quantised_rows_and_a_place_for_the_result(kind):
    layer, x, out = kind.from_float(linear()), rows_of(9, 512), torch.zeros(12, 256)
    assert torch.allclose(layer(x, gelu=True), F.gelu(layer(x), approximate="tanh"), atol=1e-6)
    rows = layer.quantize(x)
    got = layer(rows.part(slice(2, 9)), out=out[3:10])
    assert torch.allclose(got, layer(x)[2:], atol=1e-5)
    assert torch.equal(out[3:10], got) and not out[:3].any() and not out[10:].any()
    before = layer.quantize(x, gelu=True).dequantized()
    assert sqnr_db(before, F.gelu(x, approximate="tanh")) > 27


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_the_bias(kind):
    layer = linear()
    assert torch.equal(kind.from_float(layer)(torch.zeros(3, 512)), layer.bias.expand(3, -1))


def test_a_large_row_does_not_disturb_the_others():
    layer, x = Int8Linear.from_float(linear()), rows_of(4, 512)
    alone = layer(x)
    x[0] *= 1000
    assert torch.equal(layer(x)[1:], alone[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "inputs, outputs, group", [(100, 64, 0), (64, 100, 0), (8, 8, 0), (128, 64, 256), (64, 64, 32)]
)
def test_odd_sizes_are_refused_by_name(kind, inputs, outputs, group):
    with pytest.raises(ValueError, match="Allowed"):
        kind.from_float(linear(inputs, outputs), group)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_width_are_refused(kind):
    with pytest.raises(ValueError, match=r"\(3, 256\).*512"):
        kind.from_float(linear())(torch.zeros(3, 256))


def test_a_backend_that_is_not_there_cannot_be_forced():
    layer = Int8Linear.from_float(linear())
    layer.forced = "triton"
    with pytest.raises(ValueError, match="int_mm"):
        layer(rows_of(3, 512))
    layer.forced = "int_mm"
    layer(rows_of(3, 512))


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_casting_leave_8_bits_and_scales_as_they_are(kind):
    layer, x = kind.from_float(linear()), rows_of(5, 512)
    cast = kind.from_float(linear()).to(torch.bfloat16)
    assert cast.weight.dtype == kind.eight_bit and cast.scale.dtype == torch.float32
    assert torch.equal(cast.weight.float(), layer.weight.float()) and torch.equal(cast.scale, layer.scale)
    assert cast.bias.dtype == torch.bfloat16
    assert (cast(x) - layer(x)).abs().max() < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_gives_results_of_the_float_layers_dtype_also_without_a_bias(kind, bias):
    layers = [kind.from_float(linear(bias=bias, seed=seed).to(torch.bfloat16)) for seed in range(2)]
    whole = kind.merged(layers)
    rows = whole.quantize(rows_of(5, 512))
    for layer in (*layers, whole, *whole.parts([256, 256]), copy.deepcopy(layers[0])):
        assert layer.dtype == layer(rows).dtype == torch.bfloat16
        assert layer.to(torch.float16)(rows).dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layers_are_their_layers_and_share_their_memory(kind):
    parts, x = [kind.from_float(linear(seed=seed)) for seed in range(3)], rows_of(5, 512)
    expected = torch.cat([part(x) for part in parts], dim=1)
    whole = QuantizedLinear.merged(parts)
    assert torch.equal(whole(x), expected)
    assert torch.equal(torch.cat([part(x) for part in parts], dim=1), expected), "the parts still run"
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == {whole.weight.untyped_storage().data_ptr()}
    with pytest.raises(ValueError, match="one kind"):
        QuantizedLinear.merged([parts[0], kind.from_float(linear(), 256)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_its_layers_on_their_rows_and_shares_their_memory(kind):
    text, image = ([kind.from_float(linear(outputs=n, seed=seed + n)) for n in (96, 160)] for seed in (0, 1))
    x = rows_of(9, 512)
    expected = torch.cat([torch.cat([m(x[rows]) for m in part], 1) for part, rows in ((text, slice(4)), (image, slice(4, 9)))])
    pair = QuantizedPair(text, image)
    for first, rows in ((4, slice(9)), (0, slice(4, 9))):
        assert torch.equal(pair(x[rows], first), expected[rows])
    assert torch.equal(torch.cat([m(x[4:]) for m in image], 1), expected[4:]), "the layers still run"
    memory = {m.weight.untyped_storage().data_ptr() for m in (*text, *image, pair.whole, *pair.parts)}
    assert len(memory) == 1
    assert pair.choice(9, 4, torch.float32).backend == "separate"
    reader = QuantizedPair([kind.from_float(linear(256, 64))], [kind.from_float(linear(256, 64, seed=1))])
    hidden = F.gelu(expected, approximate="tanh")
    assert sqnr_db(pair.then(reader, x, 4).dequantized(), hidden) > 27


def test_what_cannot_be_a_pair():
    layers = [Int8Linear.from_float(linear()), Fp8Linear.from_float(linear()), Int8Linear.from_float(linear(), 256)]
    others = [linear(), layers[1], layers[2], Int8Linear.from_float(linear(outputs=128))]
    assert QuantizedPair.possible([layers[0]], [Int8Linear.from_float(linear())])
    assert not any(QuantizedPair.possible([layers[0]], [other]) for other in others)


def test_limits_bound_every_sum_of_a_pair():
    pair = QuantizedPair(*([Fp8Linear.from_float(linear(seed=seed))] for seed in range(2)))
    x = pair.quantize(rows_of(40, 512)).dequantized()
    for part, (norm, bias) in zip(pair.parts, pair.limits, strict=True):
        weight = Quantized(part.weight.data, part.scale.data).dequantized()
        assert torch.allclose(norm, weight.norm(dim=1).max(), rtol=1e-4) and bias == part.bias.abs().max()
        assert (x @ weight.t() + part.bias).abs().max() < (x.norm(dim=1) * norm + bias).max()


# --- a model --------------------------------------------------------------------------------------------------------


def small_model() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48}
    return QwenImageTransformer2DModel(**sizes, axes_dims_rope=(8, 12, 12)).eval()


@torch.no_grad()
def velocity(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.proj_out.weight.dtype
    return model(
        hidden_states=torch.randn(1, 16, 64, generator=generator).to(dtype),
        timestep=torch.full((1,), 0.5).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, 48, generator=generator).to(dtype),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0].float()


def same_velocity(a: nn.Module, b: nn.Module) -> None:
    """Weights read from a file may lie at other alignments, float32 kernels then add in another order."""
    assert sqnr_db(velocity(a), velocity(b)) > 55, sqnr_db(velocity(a), velocity(b))


def test_swapping_reports_what_it_did_and_why_not():
    model = small_model()
    exact = velocity(model)
    report = swap_linears(model, group=rotate_down_projections)
    assert len(report.swapped) == 2 * 12, "q, k, v, out, up, down of two streams in two blocks"
    linears = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Int8Linear))}
    assert set(report.swapped) | set(report.skipped) == linears
    assert all(isinstance(model.get_submodule(name), Int8Linear) for name in report.swapped)
    assert "img_mod" in report.skipped["transformer_blocks.1.img_mod.1"] and "proj_out" in report.skipped
    assert report.bytes_after < 0.3 * report.bytes_before, "float32 before"
    down = model.transformer_blocks[0]
    assert (down.img_mlp.net[2].group, down.txt_mlp.net[2].group, down.attn.to_q.group) == (256, 256, 0)
    assert sqnr_db(velocity(model), exact) > 30
    again = swap_linears(model)
    assert not again.swapped and not set(again.skipped) & set(report.swapped)


@pytest.mark.parametrize("door", [int8_linear, fp8_linear], ids=lambda door: door.__name__)
def test_the_example_in_a_doors_docstring_prints_what_it_says_and_help_describes_what_it_offers(door):
    results = doctest.testmod(door)
    assert results.failed == 0 and results.attempted >= 6, results
    layer = Int8Linear if door is int8_linear else Fp8Linear
    assert list(inspect.signature(door.swap_linears).parameters) == ["module", "filter", "group", "device"]
    for documented in (layer, door.swap_linears):
        assert documented.__module__ == door.__name__, "go-to-definition leads here"
        text = pydoc.plain(pydoc.render_doc(documented))
        assert all(word in text for word in ("bfloat16", "Raises", "multiples of 16", layer.__name__)), text
    public = [getattr(door, name) for name in door.__all__]
    public += [member for name, member in inspect.getmembers(layer, inspect.isroutine) if name in vars(layer)]
    assert all(inspect.getdoc(member) for member in public if callable(member))


def test_a_layer_itself_is_no_model():
    with pytest.raises(ValueError, match="Allowed: a module that contains layers"):
        swap_linears(linear())


@pytest.mark.parametrize("answer", [True, False, 1])
def test_a_filter_that_answers_yes_or_no_is_refused_before_anything_is_swapped(answer):
    model = nn.Sequential(linear(), linear(256, 64))
    with pytest.raises(ValueError, match=f"returned {answer}.*Allowed: None"):
        swap_linears(model, lambda layer, name: None if name == "0" else answer)
    assert all(type(layer) is nn.Linear for layer in model)


def test_a_filter_of_ones_own_and_layers_that_cannot_be_swapped():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"a": nn.Linear(32, 32), "b": nn.Linear(32, 30), "c": nn.Linear(32, 32), "d": Special(32, 32)}
    )
    report = swap_linears(model, lambda linear, name: "not c" if name == "c" else None)
    assert report.swapped == ["a"]
    assert (
        report.skipped["c"] == "not c" and "multiples of 16" in report.skipped["b"] and "Special" in report.skipped["d"]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, kind, merged):
    model = small_model()
    swap_to_kind(model, kind, group=rotate_down_projections)
    if merged:
        attention = model.transformer_blocks[0].attn
        QuantizedLinear.merged([attention.to_q, attention.to_k, attention.to_v])
    save_quantized(model, tmp_path / "transformer")
    again = load_quantized(tmp_path, KINDS, dtype=torch.float32)
    same_weights(again, model)
    same_velocity(again, model)
    assert is_quantized(tmp_path) == kind.kind


def test_a_folder_is_quantised_once_file_by_file_as_in_memory(tmp_path):
    """Two files of weights; the result is what swapping in memory gives, and the other parts are beside it."""
    source = tmp_path / "model"
    small_model().save_pretrained(source / "transformer", max_shard_size="500KB")
    (source / "vae").mkdir()
    (source / "vae" / "config.json").write_text("{}")
    (source / "model_index.json").write_text("{}")
    assert len(list((source / "transformer").glob("*.safetensors"))) > 1
    quantize_main(Int8Linear, "", [str(source), str(tmp_path / "out"), "--rotate"])
    expected = small_model()
    swap_linears(expected, group=rotate_down_projections)
    loaded = load_quantized(tmp_path / "out", KINDS, dtype=torch.float32)
    same_weights(loaded, expected)
    same_velocity(loaded, expected)
    assert (tmp_path / "out" / "vae" / "config.json").read_text() == "{}"
    with pytest.raises(OSError, match="no file named"):
        QwenImageTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    for arguments in ([source, tmp_path / "out"], [tmp_path / "out", tmp_path / "new"], [tmp_path, tmp_path / "new"]):
        with pytest.raises(SystemExit):
            quantize_main(Int8Linear, "", [*map(str, arguments)])


def test_files_that_do_not_fit_their_note_are_refused(tmp_path):
    model = small_model()
    swap_linears(model)
    folder = tmp_path / "transformer"
    save_quantized(model, folder)
    with pytest.raises(ValueError, match=r"int8.*Allowed: fp8"):
        load_quantized(tmp_path, [Fp8Linear])
    note = json.loads((folder / NOTE).read_text())
    (folder / NOTE).write_text(json.dumps(note | {"kind": "fp8"}))
    with pytest.raises(ValueError, match="int8"):
        load_quantized(tmp_path, KINDS)
    (folder / NOTE).write_text(json.dumps(note))
    next(folder.glob(FILES)).unlink()
    with pytest.raises(ValueError, match="lack"):
        load_quantized(tmp_path, KINDS)
    with pytest.raises(ValueError, match="one kind"):
        save_quantized(small_model(), folder)


def saved(tmp_path: Path) -> Path:
    model = small_model()
    swap_linears(model)
    save_quantized(model, tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"kind": "int8"}', '{"kind": "int8", "layers": []}', '{"kind": 8, "layers": {}}',
    '{"kind": "int8", "layers": {"transformer_blocks.0.attn.to_q": "16"}}', '{"kind": "int8", "layers": {"nothing.like.it": 0}}',
    '{"kind": "int8", "layers": {"transformer_blocks.0": 0}}', '{"kind": "int8", "layers": {"transformer_blocks.0.attn.to_q": 7}}'])  # fmt: skip
def test_a_note_that_says_nothing_or_nonsense_is_refused_in_a_sentence(tmp_path, note):
    (saved(tmp_path) / NOTE).write_text(note)
    with pytest.raises(QuantizationError, match=r"quantization\.json|rotated by 7"):
        load_quantized(tmp_path, KINDS)


@pytest.mark.parametrize("damage", ["cut", "no safetensors", "other shapes", "no config", "config no JSON"])
def test_a_damaged_quantised_folder_is_refused_in_a_sentence_that_names_the_file(tmp_path, damage):
    folder = saved(tmp_path)
    file, config = next(folder.glob(FILES)), folder / "config.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "no safetensors":
        file.write_bytes(b"PK not at all")
    elif damage == "other shapes":
        tensors = load_file(file)
        tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].clone()
        save_file(tensors, file)
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text("{")
    with pytest.raises(QuantizationError, match=re.escape(str(file if damage in ("cut", "no safetensors", "other shapes") else config))):
        load_quantized(tmp_path, KINDS)


@pytest.mark.parametrize("wrong", ["a file is missing", "within itself", "itself", "a file is there"])
def test_what_cannot_be_quantised_as_a_folder_is_refused_before_anything_is_written(tmp_path, wrong):
    source = tmp_path / "model"
    small_model().save_pretrained(source / "transformer", max_shard_size="500KB")
    (source / "model_index.json").write_text("{}")
    out = {"within itself": source / "int8", "itself": source}.get(wrong, tmp_path / "out")
    if wrong == "a file is missing":
        sorted((source / "transformer").glob("*.safetensors"))[-1].unlink()
    if wrong == "a file is there":
        out.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QuantizationError, match="lack" if wrong == "a file is missing" else "Allowed"):
        quantize_folder(source, out, Int8Linear)
    assert sorted(tmp_path.rglob("*")) == before


# --- the pocket model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_pocket_models_pictures_stay_the_same(kind, pocket_copy):
    """PSNR above 35 dB against the float picture (seen: 47 to 52 dB INT8, 42 to 46 FP8), and the answer as near as before."""
    edits = [next(e for e in EDITS if e.family == family) for family in ("negative", "sepia", "mirror")]
    source = fit(data.astronaut(), 128, 128)
    pipeline = pocket_copy()

    def pictures() -> list[torch.Tensor]:
        return [edit_picture(pipeline, [source], split(edit)[1][0], 128, 2) for edit in edits]

    before = pictures()
    swap_to_kind(pipeline.transformer, kind)
    after = pictures()
    values = [psnr(a, b) for a, b in zip(after, before, strict=True)]
    assert min(values) > 35, values
    truth = [edit.answer(tensor(source)).clamp(0, 1) for edit in edits]
    falls = [psnr(b, t) - psnr(a, t) for a, b, t in zip(after, before, truth, strict=True)]
    assert max(falls) < 0.3, falls
