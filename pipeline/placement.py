"""The loaded model onto a device, quantised on the way, in the order that needs the least memory there."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pipeline.images import EditError
from quantization.folder import is_quantized, load_quantized
from quantization.layer import QuantizedLinear
from quantization.swap import Swapped, move_quantized, swap_linears

# What a frame does not read, or not as a whole: modulation of known times, the vocabulary head, the word table.
UNREAD = {"img_mod", "txt_mod", "lm_head", "embed_tokens"}
Kind = type[QuantizedLinear]


def quantized_transformer(
    folder: Path, kinds: Mapping[str, Kind], quantize: Kind | None, lora: str | None, dtype: torch.dtype
) -> dict:
    """{"transformer": model} if the folder's transformer was quantised before, else {}. Raises EditError.

    Read to the CPU: `place` knows what of it belongs on a GPU. `quantize` is what the caller asked for.
    """
    stored = is_quantized(folder)
    if stored is None:
        return {}
    if quantize is not None and quantize.kind != stored:
        raise EditError(f"The folder {folder} is quantised to {stored}: it cannot be loaded as {quantize.kind}.")
    if lora not in (None, "", "none"):
        raise EditError("A LoRA cannot be fused into a quantised model: python int8_linear.py MODEL OUT --lora NAME")
    return {"transformer": load_quantized(folder, kinds.values(), dtype=dtype)}


def quantize(module: torch.nn.Module, kind: Kind, device: torch.device) -> Swapped:
    """Puts layers of one kind into a transformer or a text encoder, each layer quantised on `device`."""
    return swap_linears(module, kind, device=device)


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


def finish(
    pipeline,
    device: torch.device,
    lora: tuple[str | None, float],
    kinds: Mapping[str, Kind | None],
    tell: Callable[[str, float], None],
) -> None:
    """Fuses the LoRA, quantises the components named in `kinds`, and moves all to `device`.

    Weights that are quantised go to the device one layer at a time: no float copy of a model ever lies on it.
    """
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    if not kinds:
        tell(f"Moving the model to {device}", 0.6)
        place(pipeline, device)
    if lora[0] not in (None, "", "none"):
        tell(f"Fusing the LoRA {lora[0]}", 0.7)  # where the weights are: on the CPU if they are quantised next
        pipeline.change_lora(*lora)
    for name, kind in kinds.items():
        tell(f"Quantising the {name.replace('_', ' ')} to {kind.kind}", 0.8)
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
