"""A model's folder: what is loaded, what it says of itself, and what cannot be loaded."""

import json
import shutil

import pytest
import torch

from cached_pipeline import CachedQwenImageEditPipeline, load_pipeline
from pipeline import folder
from pipeline.picture_files import EditError, clip


def test_loading_tells_its_progress_and_describes_itself():
    said = []
    pipe = load_pipeline("pocket", progress=lambda text, fraction: said.append((text, fraction)))
    assert said[0][0] == "Reading the model pocket" and said[-1] == ("Ready", 1.0)
    assert [f for _, f in said] == sorted(f for _, f in said)
    description = pipe.description
    assert description | {"parameters": 0} == {
        "model": "pocket", "lora": None, "lora_weight": None, "scheduler": "lightning", "dtype": "float32",
        "device": "cpu", "parameters": 0, "quantized": None, "attention_quantized": None, "fast_path": [],
    }  # fmt: skip
    assert description["parameters"] > 1_000_000
    json.dumps(description)
    assert folder.edition(pipe.transformer) == "pocket" and pipe.default_size == 256


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
    download = classmethod(lambda cls, name: asked.append(name) or str(folder.POCKET_FOLDER))
    monkeypatch.setattr(CachedQwenImageEditPipeline, "download", download)
    pipe = load_pipeline("Owner/Some-Model", progress=lambda text, fraction: said.append(text))
    assert asked == ["Owner/Some-Model"] and said[0].startswith("Downloading Owner/Some-Model")
    assert pipe.description["model"] == "Owner/Some-Model"


def test_the_processor_has_no_video_half(pocket):
    assert pocket.processor.get_attributes() == ["image_processor", "tokenizer"]


ALLOWED = 'Allowed: "pocket", a diffusers folder of Qwen-Image-Edit with a model_index.json, or a hub id'


@pytest.mark.parametrize("model, says", [
    ("/nowhere/at/all", "there is no such folder, and it is no hub id"),
    ("Qwen/Not-There-Offline", "is no folder here and could not be downloaded"),
    ("pockt", 'it is no hub id; "pocket" is near'),
    ("Pocket", '"pocket" is near'),
    ("Qwen-Image-Edit-2509", "it is no hub id"),
    ("Qwen//Qwen-Image-Edit", "it is no hub id"),
    ("https://huggingface.co/Qwen/Qwen-Image-Edit-2509", "it is no hub id"),
    ("Qwen/Qwen Image Edit", "it is no hub id"),
    ("nowhere/file.safetensors", "there is no such folder"),
    ("", "the folder has no model_index.json|no such folder"),
    ("a" * 5000, "no path|no such folder"),
    ("a\0b", "no path|no such folder"),
    ("Qwen/a\nb", "it is no hub id"),
    ("~nobody-here/model", "no path|no such folder"),
    (".", "the folder has no model_index.json"),
])  # fmt: skip
def test_a_model_that_is_nowhere_is_one_sentence_that_says_what_is_allowed(model, says):
    with pytest.raises(EditError, match=says) as error:
        load_pipeline(model)
    text = str(error.value)
    assert ALLOWED in text and len(text) < 800 and "\n" not in text
    assert text.startswith(f'The model "{clip(model, 200)}" cannot be loaded: ')


@pytest.mark.parametrize("name, says", [
    ("model.safetensors", "a single safetensors file; the transformer alone is no model here"),
    ("model.GGUF", "a single GGUF file"),
    ("model.txt", "a file, not a folder"),
    ("model.ckpt", "a file, not a folder"),
])  # fmt: skip
def test_a_single_file_is_refused_by_what_it_is(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(EditError, match=says) as error:
        load_pipeline(str(tmp_path / name))
    assert ALLOWED in str(error.value)


INDEX = json.loads((folder.POCKET_FOLDER / "model_index.json").read_text())


@pytest.mark.parametrize("index, says", [
    (None, "the folder has no model_index.json; it is empty"),
    ("", "its model_index.json cannot be read"),
    ("{", "its model_index.json cannot be read"),
    ("[]", "its model_index.json cannot be read"),
    ("[" * 100_000, "its model_index.json cannot be read"),
    ("{}", "without processor, scheduler"),
    (json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}), "it is a FluxPipeline, without"),
    (json.dumps(INDEX | {"transformer": ["diffusers", "FluxTransformer2DModel"]}), "not one with a QwenImageTransformer2DModel"),
    (json.dumps(INDEX | {"transformer": 3}), "its model_index.json cannot be read"),
    (json.dumps(INDEX), "its files cannot be read"),
])  # fmt: skip
def test_a_folder_that_is_no_model_of_this_family_is_refused_by_what_it_lacks(tmp_path, index, says):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(EditError, match=says) as error:
        load_pipeline(str(tmp_path))
    text = str(error.value).replace(str(tmp_path), "")
    assert ALLOWED in text and len(text) < 700 and "\n" not in text


def test_a_folder_of_single_files_says_which_one_it_holds(tmp_path):
    (tmp_path / "qwen.gguf").touch()
    with pytest.raises(EditError, match=r"no model_index.json; it holds qwen.gguf"):
        load_pipeline(str(tmp_path))


def test_a_damaged_model_is_one_sentence(tmp_path):
    shutil.copytree(folder.POCKET_FOLDER, tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EditError, match="its files cannot be read") as error:
        load_pipeline(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


def test_a_device_that_is_unknown_is_said():
    with pytest.raises(EditError, match='The device "toaster"'):
        load_pipeline("pocket", device="toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_gpu_is_said():
    with pytest.raises(EditError, match="sees no CUDA GPU"):
        load_pipeline("pocket", device="cuda")
