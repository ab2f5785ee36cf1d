"""A model's folder: where it is, what it must hold, and its processor without torchvision.

`Qwen2VLProcessor` loads a video processor, which needs torchvision, which nothing here uses: pictures alone are edited.
`picture_processor` is the same class with its video half left out; stock's `__call__` runs on it too.
"""

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from transformers import Qwen2VLProcessor

from pipeline.picture_files import EditError, clip

POCKET_FOLDER = Path(__file__).resolve().parent.parent / "pocket_model" / "weights"
TRANSFORMER = "QwenImageTransformer2DModel"
COMPONENTS = ("processor", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
ALLOWED = (
    'Allowed: "pocket", a diffusers folder of Qwen-Image-Edit with a model_index.json, or a hub id such as '
    '"Qwen/Qwen-Image-Edit-2509" (needs the network once).'
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SINGLE_FILES = {".safetensors": "safetensors", ".sft": "safetensors", ".gguf": "GGUF"}


def model_folder(model: str, download: Callable[[], str | Path]) -> Path:
    """The diffusers folder that `model` names; `download()` brings a hub id's. Raises EditError for what is none."""
    if model == "pocket":
        return POCKET_FOLDER
    try:
        path = Path(model).expanduser()
        folder = path if path.is_dir() else None
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
        raise refused(model, f"no path ({_short(error)})") from None
    if exists and folder is None:
        kind = _SINGLE_FILES.get(path.suffix.lower())
        what = f"a single {kind} file; the transformer alone is no model here" if kind else "a file, not a folder"
        raise refused(model, f"it is {what}")
    if folder is None:
        if not is_hub_id(model) or path.suffix.lower() in _SINGLE_FILES:
            near = difflib.get_close_matches(model.lower(), ["pocket"], cutoff=0.7)
            raise refused(model, "there is no such folder, and it is no hub id" + '; "pocket" is near' * bool(near))
        try:
            folder = Path(download())
        except Exception as error:  # the hub's client has a dozen, for names, networks, licences and disks
            raise refused(model, f"it is no folder here and could not be downloaded ({_short(error)})") from error
    _check_index(model, folder)
    return folder


def is_hub_id(text: str) -> bool:
    """Whether `text` could be owner/name on the hub."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def refused(model: str, why: str) -> EditError:
    return EditError(f'The model "{clip(model, 200)}" cannot be loaded: {why}. {ALLOWED}')


def _short(error: Exception) -> str:
    """An error's first line; others' errors are pages."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {clip(text[0], 200)}" if text else type(error).__name__


def reading_failed(model: str, error: Exception) -> EditError:
    """The error for a folder whose index is right and whose files are not."""
    return refused(model, f"its files cannot be read ({_short(error)})")


def _check_index(model: str, folder: Path) -> None:
    file = folder / "model_index.json"
    if not file.is_file():
        try:
            names = sorted(path.name for path in folder.iterdir())
        except OSError as error:
            raise refused(model, f"the folder cannot be read ({_short(error)})") from None
        single = next((name for name in names if Path(name).suffix.lower() in _SINGLE_FILES), None)
        held = f"; it holds {clip(single)}" if single else "" if names else "; it is empty"
        raise refused(model, f"the folder has no model_index.json{held}")
    try:
        index = json.loads(file.read_text())
        transformer = index.get("transformer") or [None, None]
        missing = [name for name in COMPONENTS if not index.get(name)]
        fits, kind = transformer[-1] == TRANSFORMER, index.get("_class_name")
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
        raise refused(model, f"its model_index.json cannot be read ({_short(error)})") from None
    if missing or not fits:
        lacks = f", without {', '.join(missing)}" if missing else f", not one with a {TRANSFORMER}"
        raise refused(model, f"it is a {clip(str(kind), 60)}{lacks}")


def edition(transformer) -> str:
    """ "pocket", "2509" or "2511": no real Qwen-Image transformer has fewer than 20 blocks (it has 60)."""
    if transformer.config.num_layers < 20:
        return "pocket"
    return "2511" if transformer.config.get("zero_cond_t") else "2509"


class _PictureProcessor(Qwen2VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        # The base class takes the components from the signature above: two of them, the third is never asked for.
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As stock, with the video half's settings, which stock's class asks for when it reads the folder."""
        saved = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        (Path(save_directory) / _VIDEO_CONFIG).write_text(json.dumps(_video_config(self.image_processor), indent=2))
        return saved

    def __reduce__(self):  # its name is another class's: pickles say how it is made
        return _restored, (vars(self),)


# A saved pipeline names its components' classes: this one is loadable wherever transformers is.
_PictureProcessor.__name__ = _PictureProcessor.__qualname__ = Qwen2VLProcessor.__name__
_PictureProcessor.__module__ = Qwen2VLProcessor.__module__


_VIDEO_CONFIG = "video_preprocessor_config.json"


def _video_config(image_processor) -> dict:
    """What transformers' video processor would read frames with: the picture's numbers."""
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "size")
    settings = {name: getattr(image_processor, name) for name in names if hasattr(image_processor, name)}
    settings["size"] = dict(settings["size"]) if settings.get("size") else {}
    return {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor"} | settings


def _restored(state: dict) -> "_PictureProcessor":
    processor = object.__new__(_PictureProcessor)
    vars(processor).update(state)
    return processor


def picture_processor(model: str | Path, **hub_options) -> Qwen2VLProcessor:
    """The `processor` component of a diffusers folder or hub id, without its video half; needs no torchvision."""
    return _PictureProcessor.from_pretrained(str(model), subfolder="processor", **hub_options)
