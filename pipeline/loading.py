"""What a model is on disk: its processor without torchvision, its LoRA files, and the schedule that goes with them.

Processor. `Qwen2VLProcessor` loads a video processor, which needs torchvision, which nothing here uses: pictures alone
are edited. `picture_processor` is the same class with its video half left out; stock's `__call__` runs on it too.

LoRA. A file is fused into the weights and its layers are taken out again, so that a LoRA costs nothing per step and
what later fuses, records or quantises the model sees plain Linears, at the same addresses. Lightning LoRAs distil the model to 4 or 8 steps on a
schedule of their own: with one of them, and only then, the scheduler is replaced.
"""

import math
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import Qwen2VLProcessor

from fp8_linear import Fp8Linear
from int8_linear import Int8Linear
from pipeline.images import EditError
from quantization.folder import is_quantized, load_quantized
from quantization.layer import QuantizedLinear
from quantization.swap import Swapped, move_quantized, swap_linears

POCKET_FOLDER = Path(__file__).resolve().parent.parent / "pocket_model" / "weights"

# Sigmas 1 -> [1, 0], 2 -> [1, .75, 0], 4 -> [1, .9, .75, .5, 0] at any size (github.com/ModelTC/Qwen-Image-Lightning).
LIGHTNING_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
# (edition, name) -> (repository, file). There is no file for 2 steps: they use the 4-step one.
LIGHTNING_FILES = {
    ("2509", "lightning-4"): (
        "lightx2v/Qwen-Image-Lightning",
        "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    ),
    ("2509", "lightning-8"): (
        "lightx2v/Qwen-Image-Lightning",
        "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors",
    ),
    ("2511", "lightning-4"): (
        "lightx2v/Qwen-Image-Edit-2511-Lightning",
        "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors",
    ),
}


class _PictureProcessor(Qwen2VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        # The base class takes the components from the signature above: two of them, the third is never asked for.
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)


# A saved pipeline names its components' classes: this one is loadable wherever transformers is.
_PictureProcessor.__name__ = _PictureProcessor.__qualname__ = Qwen2VLProcessor.__name__
_PictureProcessor.__module__ = Qwen2VLProcessor.__module__


def picture_processor(model: str | Path, **hub_options) -> Qwen2VLProcessor:
    """The `processor` component of a diffusers folder or hub id, without its video half; needs no torchvision."""
    return _PictureProcessor.from_pretrained(str(model), subfolder="processor", **hub_options)


def find_lora(name: str, edition: str) -> tuple[str, str | None, bool]:
    """Where a LoRA lies: (folder or hub id, file in it or None, whether it is a Lightning LoRA).

    `name` is "lightning-4" or "lightning-8" (for `edition`, "2509" or "2511"), the path of a file, a hub id, or a hub
    id followed by a file's path in it. Nothing is downloaded here. Raises EditError.
    """
    known = sorted({known for _, known in LIGHTNING_FILES})
    if name in known:
        if (edition, name) not in LIGHTNING_FILES:
            allowed = ", ".join(n for e, n in LIGHTNING_FILES if e == edition) or "none"
            raise EditError(f'There is no LoRA "{name}" for this model ({edition}). Known for it: {allowed}.')
        return *LIGHTNING_FILES[edition, name], True
    path, lightning = Path(name).expanduser(), "lightning" in Path(name).name.lower()
    if path.is_file():
        return str(path.parent), path.name, lightning
    parts = name.split("/")
    if len(parts) >= 3 and parts[-1].endswith(".safetensors") and not path.is_absolute():
        return "/".join(parts[:2]), "/".join(parts[2:]), lightning
    if len(parts) == 2 and all(parts) and not name.endswith(".safetensors"):
        return name, None, lightning
    raise EditError(
        f'The LoRA "{name}" was not found. Allowed: {", ".join(known)}, the path of a .safetensors file, '
        "a hub id (owner/name), or owner/name/file.safetensors."
    )


def add_lora(pipeline, name: str, edition: str, weight: float) -> tuple[bool, list[str]]:
    """Fuses the LoRA `name` (see `find_lora`) into the transformer: (whether it is a Lightning one, layers it changed).

    W + weight * (alpha / rank) * B @ A, for every key style that diffusers reads. Raises EditError for a weight that is
    no number and for a file that does not fit the model.
    """
    folder, file, lightning = find_lora(name, edition)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise EditError(f"The LoRA weight is {weight!r}. Allowed: a finite number; 1 is the LoRA as trained.")
    where = f"{folder}/{file}" if file else folder
    try:
        pipeline.load_lora_weights(folder, weight_name=file, adapter_name="fused")
        if not pipeline.get_list_adapters():  # diffusers only warns when no key belongs to the transformer
            raise ValueError("none of its keys belongs to the transformer")
        layers = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, BaseTunerLayer)]
        pipeline.fuse_lora(components=["transformer"], lora_scale=float(weight))
    except Exception as error:  # diffusers, peft, safetensors and the hub each have their own
        raise EditError(f'The LoRA "{where}" cannot be used with this model: {error}') from error
    finally:
        pipeline.unload_lora_weights()
    return lightning, layers


def edition(transformer) -> str:
    """ "pocket", "2509" or "2511": no real Qwen-Image transformer has fewer than 20 blocks (it has 60)."""
    if transformer.config.num_layers < 20:
        return "pocket"
    return "2511" if transformer.config.get("zero_cond_t") else "2509"


def replace_lora(pipeline, origin: dict, lora: str | None, weight: float | None) -> None:
    """Takes away the LoRA that `origin` names, fuses `lora` if it is one, and notes it there. Raises EditError."""
    if quantization(pipeline.transformer) is not None:
        raise EditError("The transformer is quantised: its LoRA is chosen when the program starts.")
    if origin["lora_layers"]:
        restore_layers(pipeline.transformer, origin["folder"], origin["lora_layers"])
        pipeline.scheduler = type(pipeline.scheduler).from_pretrained(str(origin["folder"]), subfolder="scheduler")
    origin |= {"lora": None, "lora_weight": None, "lora_layers": []}
    if lora is not None:
        lightning, layers = add_lora(pipeline, lora, edition(pipeline.transformer), weight)
        if lightning:
            pipeline.scheduler = lightning_scheduler()
        origin |= {"lora": lora, "lora_weight": float(weight), "lora_layers": layers}


def restore_layers(transformer, folder: Path | None, layers: list[str]) -> None:
    """Copies the named layers' weights from the model's folder over those in memory, where they lie.

    Taking a LoRA away by subtraction would leave its rounding behind; the files have the weights as they were.
    """
    if folder is None:
        raise EditError("This model was not read from a folder: the weights under its LoRA are gone. Load it anew.")
    wanted = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    parameters = {name: p for name, p in transformer.named_parameters() if name in wanted}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in parameters.keys() & set(tensors.keys()):
                parameters.pop(name).data.copy_(tensors.get_tensor(name))
    if parameters:
        raise EditError(f"The folder {folder} has no {', '.join(sorted(parameters)[:3])}: the LoRA cannot be changed.")


# What a frame does not read, or not as a whole: modulation of known times, the vocabulary head, the word table.
UNREAD = {"img_mod", "txt_mod", "lm_head", "embed_tokens"}
QUANTIZATIONS = {kind.kind: kind for kind in (Int8Linear, Fp8Linear)}


def quantized_transformer(folder: Path, quantize: str | None, lora: str | None, dtype: torch.dtype) -> dict:
    """{"transformer": model} if the folder's transformer was quantised before, else {}. Raises EditError.

    Read to the CPU: `place` knows what of it belongs on a GPU.
    """
    if quantize not in (None, "none", *QUANTIZATIONS):
        raise EditError(f'The quantisation is "{quantize}". Allowed: none, {", ".join(QUANTIZATIONS)}.')
    stored = is_quantized(folder)
    if stored is None:
        return {}
    if quantize not in (None, stored):
        raise EditError(f"The folder {folder} is quantised to {stored}: it cannot be loaded as {quantize}.")
    if lora not in (None, "", "none"):
        raise EditError("A LoRA cannot be fused into a quantised model: python int8_linear.py MODEL OUT --lora NAME")
    return {"transformer": load_quantized(folder, QUANTIZATIONS.values(), dtype=dtype)}


def quantize(module, kind: str, device: torch.device) -> Swapped:
    """Puts 8-bit linear layers into a transformer or a text encoder, each layer quantised on `device`. EditError."""
    if kind not in QUANTIZATIONS:
        raise EditError(f'The quantisation is "{kind}". Allowed: none, {", ".join(QUANTIZATIONS)}.')
    return swap_linears(module, QUANTIZATIONS[kind], device=device)


def quantization(module) -> str | None:
    """The kind of the module's 8-bit linear layers, or None."""
    return next((m.kind for m in module.modules() if isinstance(m, QuantizedLinear)), None)


def place(pipeline, device: torch.device) -> None:
    """Moves the pipeline to `device`; of quantised components all but what a frame does not read (`UNREAD`).

    The modulation's 13.6 GB would double what the GPU has to hold: `fast_path.modulation` fetches them, block by block,
    for a time that is new; `vision_language.word_rows` fetches words. To run the stock modules move them after:
    `pipeline.transformer.to(device)`.
    """
    components = [c for c in pipeline.components.values() if isinstance(c, torch.nn.Module)]
    if device.type == "cpu" or not any(map(quantization, components)):
        pipeline.to(device)
        return
    for component in components:
        stays = UNREAD if quantization(component) else set()
        move_quantized(component, device)  # before the others: a `to` of their own would take them apart
        for name, module in component.named_modules():
            if not stays & set(name.split(".")):
                module._apply(lambda tensor: tensor.to(device), recurse=False)


def finish(pipeline, device: torch.device, lora: tuple[str | None, float], transformer, text_encoder, tell) -> None:
    """Fuses the LoRA, quantises to the two kinds given, and moves all to `device`, in the order that needs least there.

    Weights that are quantised go to the device one layer at a time: no float copy of a model ever lies on it.
    """
    kinds = {"transformer": transformer, "text_encoder": text_encoder}
    kinds = {name: kind for name, kind in kinds.items() if kind not in (None, "none")}
    if not kinds:
        tell(f"Moving the model to {device}", 0.6)
        place(pipeline, device)
    if lora[0] not in (None, "", "none"):
        tell(f"Fusing the LoRA {lora[0]}", 0.7)  # where the weights are: on the CPU if they are quantised next
        pipeline.change_lora(*lora)
    for name, kind in kinds.items():
        tell(f"Quantising the {name.replace('_', ' ')} to {kind}", 0.8)
        quantize(getattr(pipeline, name), kind, device)
    if kinds:
        tell(f"Moving the model to {device}", 0.9)
        place(pipeline, device)
    tell("Ready", 1.0)


def usable_device(device: str | torch.device) -> torch.device:
    """`device` as torch knows it. Raises EditError if there is no such device here."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise EditError(f'The device "{device}" is not known to torch: {error}') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA GPU"
        raise EditError(f'The device is "{device}", but {reason}. Allowed here: "cpu".')
    return device


def lightning_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler that Lightning LoRAs were distilled on."""
    return FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER)


def is_lightning(scheduler) -> bool:
    """Whether `scheduler` gives Lightning's noise levels, whoever put it there."""
    decisive = ("use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal", "time_shift_type")
    return all(scheduler.config.get(name) == LIGHTNING_SCHEDULER[name] for name in decisive)
