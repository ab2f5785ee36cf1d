"""What a model is on disk: LoRA files of every style, processors without torchvision, and what cannot be loaded."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from support.models import LORA_STYLES, write_lora

from cached_pipeline import CachedQwenImageEditPipeline, load_pipeline
from pipeline import loading
from pipeline.images import EditError


@pytest.mark.parametrize("style", LORA_STYLES)
def test_a_lora_is_fused_into_the_weights(pocket, tmp_path, style):
    path = tmp_path / "style.safetensors"
    deltas = write_lora(path, pocket.transformer, style)
    pipe = load_pipeline("pocket", lora=str(path), lora_weight=0.5)
    plain = load_pipeline("pocket").transformer.state_dict()
    fused = pipe.transformer.state_dict()
    assert fused.keys() == plain.keys(), "no adapter layers are left"
    assert len(deltas) == 12 * len(pocket.transformer.transformer_blocks)
    for name, weight in fused.items():
        expected = plain[name] + 0.5 * deltas[name] if name in deltas else plain[name]
        # two roundings of float32 numbers about 1, in another order
        assert torch.allclose(weight, expected, atol=1e-6), (name, (weight - expected).abs().max())
    assert pipe.description["lora"] == str(path) and pipe.description["lora_weight"] == 0.5


def test_a_lightning_lora_brings_its_scheduler_and_others_do_not(pocket, tmp_path):
    base = tmp_path / "base"
    pocket.save_pretrained(base)
    config = loading.LIGHTNING_SCHEDULER | {"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
    FlowMatchEulerDiscreteScheduler.from_config(config).save_pretrained(base / "scheduler")
    for name, terminal in (("My-Lightning-4steps.safetensors", None), ("style.safetensors", 0.02)):
        write_lora(tmp_path / name, pocket.transformer)
        pipe = load_pipeline(str(base), lora=str(tmp_path / name))
        assert pipe.scheduler.config.shift_terminal == terminal, name
        assert pipe.description["scheduler"] == ("lightning" if terminal is None else "base")


def test_known_lightning_files():
    repository, file, lightning = loading.find_lora("lightning-4", "2509")
    assert lightning and repository == "lightx2v/Qwen-Image-Lightning"
    assert file == "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors"
    assert "8steps" in loading.find_lora("lightning-8", "2509")[1]
    assert loading.find_lora("lightning-4", "2511")[0] == "lightx2v/Qwen-Image-Edit-2511-Lightning"
    with pytest.raises(EditError, match="Known for it: lightning-4"):
        loading.find_lora("lightning-8", "2511")
    with pytest.raises(EditError, match="Known for it: none"):
        load_pipeline("pocket", lora="lightning-4")


def transformer_state(pipe):
    return {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fast", [False, True])
def test_a_lora_changed_at_run_time_gives_the_weights_of_a_fresh_start(pocket, tmp_path, fast):
    for seed, name in enumerate(("one", "two")):
        write_lora(tmp_path / f"{name}.safetensors", pocket.transformer, seed=seed)
    one, two = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    pipe = load_pipeline("pocket", lora=one)
    if fast:
        pipe.enable_fast_path()
    addresses = {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}
    assert pipe.change_lora(two, 0.5) > 0
    assert same(transformer_state(pipe), transformer_state(load_pipeline("pocket", lora=two, lora_weight=0.5)))
    assert (pipe.description["lora"], pipe.description["lora_weight"]) == (two, 0.5)
    pipe.change_lora(two, 2.0)
    assert same(transformer_state(pipe), transformer_state(load_pipeline("pocket", lora=two, lora_weight=2.0)))
    pipe.change_lora(None)
    assert same(transformer_state(pipe), transformer_state(load_pipeline("pocket")))
    assert pipe.description["lora"] is None
    assert addresses == {name: p.data_ptr() for name, p in pipe.transformer.named_parameters()}, "changed in place"


def test_the_fast_path_edits_with_the_changed_lora(pocket, tmp_path, photo):
    path = tmp_path / "strong.safetensors"
    write_lora(path, pocket.transformer)
    pipe = load_pipeline("pocket")
    pipe.enable_fast_path()

    def edit(pipe):
        return pipe(photo(64, 64), "sepia", width=64, height=64, num_inference_steps=2, true_cfg_scale=1.0,
                    generator=torch.Generator().manual_seed(0), output_type="latent").images  # fmt: skip

    before = edit(pipe)
    pipe.change_lora(str(path), 1.0)
    plain = load_pipeline("pocket", lora=str(path))
    assert (edit(pipe) - edit(plain)).abs().max() < 1e-4
    assert (edit(pipe) - before).abs().max() > 1e-3, "the LoRA does something"


def test_a_lora_that_cannot_be_used_leaves_the_former_one_in_place(pocket, tmp_path):
    write_lora(tmp_path / "good.safetensors", pocket.transformer)
    pipe = load_pipeline("pocket", lora=str(tmp_path / "good.safetensors"), lora_weight=0.7)
    before = transformer_state(pipe)
    with pytest.raises(EditError):
        pipe.change_lora(str(tmp_path / "missing.safetensors"))
    assert same(transformer_state(pipe), before)
    assert pipe.description["lora_weight"] == 0.7


def test_a_lightning_lora_taken_away_gives_the_model_its_own_schedule_back(pocket, tmp_path):
    base = tmp_path / "base"
    pocket.save_pretrained(base)
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, use_dynamic_shifting=True)
    scheduler.save_pretrained(base / "scheduler")
    write_lora(tmp_path / "x-Lightning.safetensors", pocket.transformer)
    pipe = load_pipeline(str(base), lora=str(tmp_path / "x-Lightning.safetensors"))
    assert pipe.description["scheduler"] == "lightning"
    pipe.change_lora(None)
    assert pipe.description["scheduler"] == "base"


def test_where_a_lora_may_lie(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert loading.find_lora(str(tmp_path / "a.safetensors"), "2509") == (str(tmp_path), "a.safetensors", False)
    assert loading.find_lora("owner/name", "2509") == ("owner/name", None, False)
    assert loading.find_lora("owner/name/sub/x-Lightning.safetensors", "2509") == (
        "owner/name", "sub/x-Lightning.safetensors", True,
    )  # fmt: skip
    for name in ("missing.safetensors", "/nowhere/a.safetensors", "one", "a/b.safetensors"):
        with pytest.raises(EditError, match="was not found"):
            loading.find_lora(name, "2509")


def test_a_lora_that_does_not_fit_is_refused(tmp_path):
    save_file({"something.weight": torch.zeros(2, 2)}, tmp_path / "no.safetensors")
    save_file(
        {"unet.lora_A.weight": torch.zeros(4, 8), "unet.lora_B.weight": torch.zeros(8, 4)}, tmp_path / "un.safetensors"
    )
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    for name in ("no", "un", "broken"):
        with pytest.raises(EditError, match=f"{name}.safetensors"):
            load_pipeline("pocket", lora=str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(EditError, match="The LoRA weight is nan"):
        load_pipeline("pocket", lora=str(tmp_path / "no.safetensors"), lora_weight=float("nan"))


def test_loading_tells_its_progress_and_describes_itself():
    said = []
    pipe = load_pipeline("pocket", progress=lambda text, fraction: said.append((text, fraction)))
    assert said[0][0] == "Reading the model pocket" and said[-1] == ("Ready", 1.0)
    assert [f for _, f in said] == sorted(f for _, f in said)
    description = pipe.description
    assert description | {"parameters": 0} == {
        "model": "pocket", "lora": None, "lora_weight": None, "scheduler": "lightning", "dtype": "float32",
        "device": "cpu", "parameters": 0, "quantized": None, "attention_quantized": None,
    }  # fmt: skip
    assert description["parameters"] > 1_000_000
    json.dumps(description)
    assert loading.edition(pipe.transformer) == "pocket" and pipe.default_size == 256


def test_a_saved_pipeline_is_an_ordinary_folder(pocket, tmp_path, photo):
    pocket.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    again = load_pipeline(str(tmp_path))
    settings = {"width": 64, "height": 64, "num_inference_steps": 1, "reference_area": "output", "true_cfg_scale": 1.0}
    results = [
        pipe(photo(64, 64), "sepia", generator=torch.Generator().manual_seed(0), output_type="pt", **settings).images
        for pipe in (pocket, again)
    ]
    assert torch.equal(*results)
    assert isinstance(again, CachedQwenImageEditPipeline) and again.description["model"] == str(tmp_path)


def test_a_hub_id_is_downloaded_once_and_read_from_its_folder(photo, monkeypatch):
    asked, said = [], []
    download = classmethod(lambda cls, name: asked.append(name) or str(loading.POCKET_FOLDER))
    monkeypatch.setattr(CachedQwenImageEditPipeline, "download", download)
    pipe = load_pipeline("Owner/Some-Model", progress=lambda text, fraction: said.append(text))
    assert asked == ["Owner/Some-Model"] and said[0].startswith("Downloading Owner/Some-Model")
    assert pipe.description["model"] == "Owner/Some-Model"


def test_the_processor_has_no_video_half(pocket):
    assert pocket.processor.get_attributes() == ["image_processor", "tokenizer"]


@pytest.mark.parametrize(
    "kwargs, says",
    [
        ({"model": "/nowhere/at/all"}, 'The model "/nowhere/at/all" cannot be loaded'),
        ({"model": "Qwen/Not-There-Offline"}, 'The model "Qwen/Not-There-Offline" cannot be loaded'),
        ({"model": "."}, "has no model_index.json"),
        ({"model": "pocket", "device": "toaster"}, 'The device "toaster"'),
    ],
)
def test_what_cannot_be_loaded_is_said(kwargs, says):
    with pytest.raises(EditError) as error:
        load_pipeline(**kwargs)
    assert says in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_gpu_is_said():
    with pytest.raises(EditError, match="sees no CUDA GPU"):
        load_pipeline("pocket", device="cuda")
