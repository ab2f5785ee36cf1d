"""Files: a diffusers folder quantised once, a quantised transformer written and read.

A quantised model is a diffusers folder whose `transformer/` holds `quantization.json` and `quantized-*.safetensors` in
place of diffusers' files. Stock refuses it by name, where otherwise it would read 8-bit weights without their scales and
say nothing.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from quantization import QuantizationError
from quantization.layer import QuantizedLinear
from quantization.swap import Swapped, cannot_swap, default_filter, no_rotation

NOTE, FILES = "quantization.json", "quantized-*.safetensors"


def save_quantized(transformer: nn.Module, folder: Path) -> None:
    """Write a swapped transformer into `folder`: config.json, quantization.json, one safetensors file.

    Raises QuantizationError unless its quantised layers are of one kind.
    """
    layers = {n: m for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    kinds = {m.kind for m in layers.values()}
    if len(kinds) != 1:
        raise QuantizationError(f"the model's quantised layers are of the kinds {sorted(kinds)}. Allowed: one kind.")
    folder.mkdir(parents=True, exist_ok=True)
    save_config: Any = transformer.save_config  # of a diffusers model
    save_config(folder)
    tensors = {name: t.contiguous() for name, t in transformer.state_dict().items()}
    # Layers that share a buffer are views of it, which safetensors refuses: each is copied to be written on its own.
    tensors = {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in tensors.items()}
    save_file(tensors, folder / FILES.replace("*", "00001"), {"format": "pt"})
    _write_note(folder, kinds.pop(), {name: layer.group for name, layer in layers.items()})


def quantize_folder(
    model: Path, out: Path, kind: type[QuantizedLinear], group: Callable[[str], int] = no_rotation
) -> Swapped:
    """Write the diffusers folder `model` to `out` with its transformer quantised, one file of weights at a time.

    Raises QuantizationError if `out` is in use or within `model`, or `model` is no diffusers folder with all its weights.
    """
    _check_folders(model, out)
    source, target = model / "transformer", out / "transformer"
    files = sorted(source.glob("*.safetensors"))
    linears = {n: m for n, m in _empty_transformer(source).named_modules() if isinstance(m, nn.Linear)}
    skipped = {n: why for n, m in linears.items() if (why := default_filter(m, n) or cannot_swap(m, group(n)))}
    groups = {name: group(name) for name in linears if name not in skipped}
    _check_files(source, files, {f"{name}.weight" for name in groups})
    prepare_folder(model, out)
    before = after = 0
    for number, file in enumerate(files, 1):
        tensors = {}
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - no dict
                tensor, name = stored.get_tensor(key), key.removesuffix(".weight")
                if name not in groups or name == key:
                    tensors[key] = tensor
                    continue
                weight = kind.quantize_weight(tensor, groups[name])
                tensors[key], tensors[f"{name}.scale"] = weight[:2]
                before, after = before + tensor.nbytes, after + weight.values.nbytes + weight.scales.nbytes
        save_file(tensors, target / FILES.replace("*", f"{number:05}"), {"format": "pt"})
    shutil.copy(source / "config.json", target)
    _write_note(target, kind.kind, groups)
    return Swapped(list(groups), skipped, before, after)


def prepare_folder(model: Path, out: Path) -> None:
    """Make `out` a copy of the diffusers folder `model` with an empty transformer; files are linked where possible.

    Raises QuantizationError as `quantize_folder` does, and has written nothing then.
    """
    _check_folders(model, out)
    (out / "transformer").mkdir(parents=True, exist_ok=True)
    for entry in model.iterdir():
        if entry.is_dir() and entry.name != "transformer":
            shutil.copytree(entry, out / entry.name, copy_function=_link)
        elif entry.is_file():
            _link(str(entry), str(out / entry.name))


def is_quantized(folder: Path) -> str | None:
    """The kind, "int8" or "fp8", if the diffusers folder's transformer was quantised by this program, else None.

    Raises QuantizationError if its quantization.json cannot be read.
    """
    return _read_note(folder / "transformer")[0] if (folder / "transformer" / NOTE).is_file() else None


def load_quantized(folder: Path, kinds: Iterable[type[QuantizedLinear]], *, device="cpu", dtype=torch.bfloat16):
    """The transformer of a quantised diffusers folder, 8-bit weights read straight to `device`: no float copy anywhere.

    `dtype` is that of everything that is not quantised. Raises QuantizationError if the folder is of no kind in `kinds`,
    or its files and its note do not fit each other.
    """
    source = folder / "transformer"
    name_of_kind, groups = _read_note(source)
    by_name = {kind.kind: kind for kind in kinds}
    if name_of_kind not in by_name:
        raise QuantizationError(f'{source} is quantised as "{name_of_kind}". Allowed: {", ".join(by_name)}.')
    model = _empty_transformer(source)
    _put_empty_layers(model, by_name[name_of_kind], groups, dtype, source)
    expected = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    eight_bit = {f"{name}.{parameter}" for name in groups for parameter in ("weight", "scale")}
    for file in sorted(source.glob(FILES)):
        model.load_state_dict(_read(file, expected, eight_bit, device, dtype), strict=False, assign=True)
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise QuantizationError(f"the files in {source} lack {len(missing)} tensors: {', '.join(missing[:3])}.")
    return model.requires_grad_(False).eval()


def _put_empty_layers(model: nn.Module, kind: type[QuantizedLinear], groups: dict[str, int], dtype, source: Path) -> None:
    """Quantised layers on the meta device in place of the linear ones that `groups` names."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, group in groups.items():
        if name not in linears:
            raise QuantizationError(f"{source / NOTE} names {name}, which is no linear layer of its config.json.")
        sizes = linears[name].in_features, linears[name].out_features, linears[name].bias is not None
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, kind(*sizes, group=group, dtype=dtype, device="meta"))


def _read(file: Path, expected: dict[str, tuple], eight_bit: set[str], device, dtype: torch.dtype) -> dict:
    """The tensors of one file; those in `eight_bit` have to have the expected dtype already, others are cast."""
    tensors = {}
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for key in stored.keys():  # noqa: SIM118 - no dict
                tensor = stored.get_tensor(key)
                wanted, shape = expected.get(key, (None, tensor.shape))
                if tensor.shape != shape or (key in eight_bit and tensor.dtype != wanted):
                    given = f"{tensor.dtype} {tuple(tensor.shape)}"
                    raise QuantizationError(f"{file}: {key} is {given}, not {wanted} {tuple(shape)}.")
                tensors[key] = tensor if key in eight_bit else tensor.to(dtype)
    except (SafetensorError, OSError) as error:
        raise QuantizationError(f"{file} cannot be read: {error}") from error
    return tensors


def _check_folders(model: Path, out: Path) -> None:
    if not (model / "model_index.json").is_file() or not (model / "transformer" / "config.json").is_file():
        raise QuantizationError(f"{model} is no diffusers folder with a transformer.")
    if is_quantized(model):
        raise QuantizationError(f"{model} is quantised already.")
    if model.resolve() in (out.resolve(), *out.resolve().parents):
        raise QuantizationError(f"{out} is within {model}. Allowed: a folder outside the model's.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizationError(f"{out} is not empty. Allowed: an empty or a new folder.")


def _check_files(source: Path, files: list[Path], needed: set[str]) -> None:
    """QuantizationError unless the files hold all needed tensors."""
    found = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                found.update(stored.keys())
        except (SafetensorError, OSError) as error:
            raise QuantizationError(f"{file} cannot be read: {error}") from error
    if missing := sorted(needed - found):
        text = f"the *.safetensors in {source} lack {len(missing)} of {len(needed)} weights: {', '.join(missing[:3])}."
        raise QuantizationError(text)


def _empty_transformer(source: Path) -> nn.Module:
    """The model that config.json describes with parameters on the meta device; its rotary tables are real."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    try:
        config: Any = QwenImageTransformer2DModel.load_config(source)
    except (OSError, ValueError) as error:
        raise QuantizationError(f"{source / 'config.json'} cannot be read: {error}") from error
    with init_empty_weights():
        model = QwenImageTransformer2DModel.from_config(config)
    assert isinstance(model, nn.Module)  # a pair with what was not used, if that is asked for
    return model


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)  # a hub folder holds links to its blobs
    except OSError:
        shutil.copy2(source, target)


def _write_note(folder: Path, kind: str, groups: dict[str, int]) -> None:
    """quantization.json: the kind, and for each quantised layer the length of its rotation's groups."""
    (folder / NOTE).write_text(json.dumps({"kind": kind, "layers": groups}, indent=1) + "\n")


def _read_note(folder: Path) -> tuple[str, dict[str, int]]:
    """(kind, groups) as `_write_note` has written them. Raises QuantizationError."""
    try:
        note = json.loads((folder / NOTE).read_text())
        kind, groups = note["kind"], note["layers"]
        if isinstance(kind, str) and all(isinstance(group, int) for group in groups.values()):
            return kind, groups
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise QuantizationError(f'{folder / NOTE} does not say {{"kind": ..., "layers": {{name: group, ...}}}}.')
