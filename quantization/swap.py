"""Quantised layers into a model: which layers are swapped, which of them share a buffer, and a report of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from quantization import QuantizationError
from quantization.layer import QuantizedLinear, refusal

# Layers of Qwen-Image that stay as they are: they are read once a step or run on one row, and an error there reaches
# everything. And of its text encoder: what is not read at all, and what is small and sees pixels.
FULL_PRECISION = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out", "img_mod", "txt_mod", "lm_head", "visual")
# Groups of layers that the fast path runs as one matrix product, in the order it expects: the text's layers and the
# image's of Qwen-Image, the text encoder's layers that share an input. Each group is quantised straight into one buffer:
# concatenating later would need a second copy on a GPU that is already full.
PACKED_GROUPS = (
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.to_add_out", "attn.to_out.0"),
    ("txt_mlp.net.0.proj", "img_mlp.net.0.proj"),
    ("txt_mlp.net.2", "img_mlp.net.2"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


class Swapped(NamedTuple):
    """What was quantised: the names that were swapped, why the others were skipped, bytes of weights before and after."""

    swapped: list[str]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{len(self.swapped)} linear layers quantised, {self.bytes_before / 1e9:.2f} -> {self.bytes_after / 1e9:.2f} GB; "
            f"{len(self.skipped)} left as they were"
        )


def default_filter(linear: nn.Linear, name: str) -> str | None:
    """Why this layer of Qwen-Image stays in full precision; None to quantise it."""
    parts = [part for part in name.split(".") if part in FULL_PRECISION]
    return f"{parts[0]} stays in full precision" if parts else None


def rotate_down_projections(name: str) -> int:
    """256 for the layers after a GELU, whose inputs have the outliers; 0 for all others.

    An option, not the default. On an H200 it makes a frame 7 % slower at 512x512. It gains 14 dB of a layer's SQNR where
    a few inputs are 50 times as large as the others. On the pocket model INT8 images are 52.7 dB from float's without it
    and 53.4 dB with it, and their distance to the computed answers is the same.
    """
    return 256 if name.endswith("mlp.net.2") else 0


def no_rotation(name: str) -> int:
    """0 for every layer."""
    return 0


def swap_linears(
    module: nn.Module,
    kind: type[QuantizedLinear],
    filter: Callable[[nn.Linear, str], str | None] = default_filter,
    group: Callable[[str], int] = no_rotation,
    device: torch.device | str | None = None,
) -> Swapped:
    """Replace every `nn.Linear` in `module` by `kind`, unless `filter(linear, name)` returns a reason not to.

    `group(name)` is the length of the rotation's groups. With `device`, layers are quantised there one after the other
    and stay there, those of one of `PACKED_GROUPS` in one buffer: no float layer of a model on the CPU is ever on the GPU
    as a whole. Fuse a LoRA before. Raises QuantizationError, before anything is replaced, for a `module` that is
    itself a linear layer and for a filter that returns anything but a text or None.
    """
    if isinstance(module, nn.Linear):
        raise QuantizationError(f"the module is a {type(module).__name__} itself. Allowed: a module that contains layers.")
    linears, skipped = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}, {}
    for name, linear in linears.items():
        why = filter(linear, name)
        if not isinstance(why, str | None):
            allowed = "None to quantise the layer, or the reason not to, a text"
            raise QuantizationError(f'the filter returned {why!r} for the layer "{name}". Allowed: {allowed}.')
        if why := why or cannot_swap(linear, group(name)):
            skipped[name] = why
    wanted = {name: linear for name, linear in linears.items() if name not in skipped}
    after = 0
    for names in _groups({n: (m.in_features, group(n), m.bias is None, m.weight.dtype) for n, m in wanted.items()}):
        layers = kind.all_from_float([wanted[name] for name in names], group(names[0]), device)
        for name, layer in zip(names, layers, strict=True):
            layer.train(wanted[name].training)
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer)
            after += sum(p.nbytes for p in layer.parameters())
    before = sum(p.nbytes for linear in wanted.values() for p in linear.parameters())
    return Swapped(list(wanted), skipped, before, after)


def cannot_swap(linear: nn.Linear, group: int) -> str | None:
    """Why this layer cannot be quantised, or None."""
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__} is more than a linear layer"
    return refusal(linear.in_features, linear.out_features, group)


def move_quantized(module: nn.Module, device: torch.device) -> None:
    """Move the 8-bit layers in `module` to `device`, those of one of `PACKED_GROUPS` into one buffer."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLinear)}
    for names in _groups({n: (type(m), m.in_features, m.group, m.bias is None) for n, m in layers.items()}):
        QuantizedLinear.merged([layers[name] for name in names], device)


def _groups(formats: dict[str, tuple]) -> list[list[str]]:
    """The names of `formats` in groups: those of one of `PACKED_GROUPS` if all are there in one format; the others alone."""
    groups, left = [], dict(formats)
    for name in formats:
        if name not in left:
            continue
        found = [name]
        for group in PACKED_GROUPS:
            prefixes = [name.removesuffix(own) for own in group if name == own or name.endswith(f".{own}")]
            names = [prefixes[0] + own for own in group] if prefixes else []
            if names and len({left.get(n) for n in names} - {None}) == 1 and all(n in left for n in names):
                found = names
        groups.append(found)
        for n in found:
            del left[n]
    return groups
