"""LoRA files: found, fused into the weights, taken away again. `lora_file` reads them.

A file is fused into the weights where they lie, so that a LoRA costs nothing per step, recordings stay valid, and what
later fuses, records or quantises the model sees plain Linears. Lightning LoRAs distil the model to 4 or 8 steps on a
schedule of their own: with one of them, and only then, the scheduler is replaced.

A change is all or nothing: the new file is read and checked as a whole, and the former weights are found in the model's
folder, before the first number is changed.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.folder import edition, is_hub_id
from pipeline.lora_file import PICKLES, Change, read_lora, tensor_of
from pipeline.picture_files import EditError, clip
from pipeline.placement import quantization
from pipeline.sampling import lightning_scheduler

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
_ALLOWED = (
    f"Allowed: {', '.join(sorted({name for _, name in LIGHTNING_FILES}))}, the path of a .safetensors file, "
    "a hub id (owner/name), or owner/name/file.safetensors."
)
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers, of peft


@dataclass
class Origin:
    """Where a pipeline's weights came from."""

    model: str | None = None
    folder: Path | None = None
    lora: str | None = None
    lora_weight: float | None = None
    lora_layers: list[str] = field(default_factory=list)  # whose weights are not those of the folder
    scheduler: FlowMatchEulerDiscreteScheduler | None = (
        None  # the model's own, while a Lightning LoRA's is in its place
    )


def find_lora(name: str, edition: str) -> tuple[str, str | None, bool]:
    """Where a LoRA lies: (folder or hub id, file in it or None, whether it is a Lightning LoRA).

    `name` is "lightning-4" or "lightning-8" (for `edition`, "2509" or "2511"), the path of a file or of a folder with
    one LoRA in it, a hub id, or a hub id followed by a file's path in it. Nothing is downloaded here. Raises EditError.
    """
    known = sorted({known for _, known in LIGHTNING_FILES})
    if name in known:
        if (edition, name) not in LIGHTNING_FILES:
            allowed = ", ".join(n for e, n in LIGHTNING_FILES if e == edition) or "none"
            raise EditError(f'There is no LoRA "{name}" for this model ({edition}). Known for it: {allowed}.')
        return *LIGHTNING_FILES[edition, name], True
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError, TypeError):  # too long, a zero byte, no such user
        raise EditError(f'The LoRA "{clip(str(name), 200)}" is no path and no hub id. {_ALLOWED}') from None
    lightning = "lightning" in path.name.lower()
    if is_folder and name.strip():
        file = _only(sorted(p.name for p in path.glob("*.safetensors")), f'The LoRA "{clip(name, 200)}" is a folder')
        return str(path), file, lightning or "lightning" in file.lower()
    if path.suffix.lower() in PICKLES:
        raise EditError(
            f'The LoRA "{clip(name, 200)}" is a pickle, which may run any program when it is opened. {_ALLOWED}'
        )
    if is_file:
        return str(path.parent), path.name, lightning
    parts = name.split("/")
    in_a_repository = len(parts) >= 3 and is_hub_id("/".join(parts[:2])) and not {"", ".", ".."} & set(parts)
    if in_a_repository and name.endswith(".safetensors"):
        return "/".join(parts[:2]), "/".join(parts[2:]), lightning
    if is_hub_id(name) and not name.endswith(".safetensors"):
        return name, None, lightning
    raise EditError(f'The LoRA "{clip(name, 200)}" was not found. {_ALLOWED}')


def _only(names: list[str], where: str) -> str:
    """The one LoRA among the files `names`. Raises EditError where several could be meant."""
    usual = [name for name in names if name in _USUAL_NAMES]
    if len(names) == 1 or len(usual) == 1:
        return (usual or names)[0]
    held = ", ".join(clip(name) for name in names[:8]) + ", ..." * (len(names) > 8)
    raise EditError(f"{where} of {len(names)} .safetensors files{': ' * bool(names)}{held}. {_ALLOWED}")


def open_lora(name: str, transformer: nn.Module, weight: float = 1.0) -> tuple[dict[str, Change], bool]:
    """The changes of a LoRA (see `find_lora`), and whether it is a Lightning one. Checked as a whole: `fuse` can follow.

    A hub's file is downloaded unless it is here already. Raises EditError for what does not fit the transformer, and for
    a weight that is no finite number or more than the transformer's dtype holds.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise EditError(f"The LoRA weight is {clip(repr(weight))}. Allowed: a finite number; 1 is the LoRA as trained.")
    folder, file, lightning = find_lora(name, edition(transformer))
    if Path(folder).is_dir():
        assert file is not None
        path = Path(folder) / file
    else:
        path = _download(folder, file)
        lightning |= "lightning" in path.name.lower()
    changes = read_lora(path, transformer, name)
    for layer, change in changes.items():
        present = tensor_of(transformer.get_submodule(layer), "weight")
        if present.is_meta:
            raise EditError("The model's weights are offloaded: its LoRA is chosen before that.")
        if not change.reach() * abs(weight) <= torch.finfo(present.dtype).max / 2:
            dtype = str(present.dtype).removeprefix("torch.")
            raise EditError(
                f'The LoRA "{clip(name, 200)}" at weight {weight:g} changes {clip(layer)} by more than {dtype} holds. '
                "Allowed: a weight near 1."
            )
    return changes, lightning


def _download(repository: str, file: str | None) -> Path:
    """A hub's file on this machine; of a repository its only one."""
    try:
        if file is None:
            try:
                names = HfApi().list_repo_files(repository)
            except Exception as error:  # without the hub: what was downloaded before
                try:
                    cached = Path(snapshot_download(repository, local_files_only=True))
                except Exception:
                    raise error from None
                names = [path.relative_to(cached).as_posix() for path in cached.rglob("*.safetensors")]
            file = _only(
                sorted(n for n in names if n.endswith(".safetensors")), f"The LoRA {repository} is a repository"
            )
        return Path(hf_hub_download(repository, file))
    except EditError:
        raise
    except Exception as error:  # the hub's client has a dozen, for names, networks, licences and disks
        reason = clip(str(error).strip().split("\n")[0], 200)
        where = f"{repository}/{file}" if file else repository
        raise EditError(
            f'The LoRA "{clip(where, 200)}" could not be downloaded ({type(error).__name__}: {reason}). {_ALLOWED}'
        ) from error


def fuse(transformer: nn.Module, changes: dict[str, Change], weight: float) -> None:
    """Adds `weight` times the changes to the layers' weights where they lie, in float32 on their device.

    W + weight * (alpha / rank) * B @ A, and what `lora_file` says of the other kinds.
    """
    for layer, change in changes.items():
        change.fuse(transformer.get_submodule(layer), float(weight))


def replace_lora(pipeline, origin: Origin, lora: str | None, weight: float) -> None:
    """Takes away the LoRA that `origin` names, fuses `lora` if it is one, and notes it there.

    Raises EditError before anything is changed.
    """
    transformer = pipeline.transformer
    if quantization(transformer) is not None:
        raise EditError("The transformer is quantised: its LoRA is chosen when the program starts.")
    changes, lightning = {}, False
    if lora is not None:
        changes, lightning = open_lora(lora, transformer, weight)
    if origin.lora_layers:
        restore_layers(transformer, origin.folder, origin.lora_layers)
    if origin.scheduler is not None:
        pipeline.scheduler, origin.scheduler = origin.scheduler, None
    origin.lora, origin.lora_weight, origin.lora_layers = None, None, []
    if lora is not None:
        origin.lora_layers = list(changes)  # first: if memory runs out in the middle they can be restored
        fuse(transformer, changes, weight)
        origin.lora, origin.lora_weight = lora, float(weight)
        if lightning:
            origin.scheduler, pipeline.scheduler = pipeline.scheduler, lightning_scheduler()


@torch.no_grad()
def restore_layers(transformer: nn.Module, folder: Path | None, layers: list[str]) -> None:
    """Copies the named layers' weights from the model's folder over those in memory, where they lie.

    Taking a LoRA away by subtraction would leave its rounding behind; the files have the weights as they were. Raises
    EditError before anything is changed.
    """
    if folder is None:
        raise EditError("This model was not read from a folder: the weights under its LoRA are gone. Load it again.")
    wanted = {}
    for layer in layers:
        module = transformer.get_submodule(layer)
        wanted |= {
            f"{layer}.{kind}": p for kind in ("weight", "bias") if (p := getattr(module, kind, None)) is not None
        }
    where = {}
    try:
        for file in sorted((folder / "transformer").glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                where |= {name: file for name in wanted.keys() & set(tensors.keys())}
        if missing := sorted(wanted.keys() - where.keys()):
            raise EditError(f"The folder {folder} has no {clip(missing[0])}: the LoRA cannot be changed.")
        for file in sorted(set(where.values())):
            with safe_open(file, framework="pt") as tensors:
                for name in (name for name, its in where.items() if its == file):
                    wanted[name].copy_(tensors.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise EditError(
            f"The folder {folder} cannot be read ({clip(str(error))}): the LoRA cannot be changed."
        ) from error
