"""A LoRA file as changes of a model's layers, whatever program trained it.

Trainers write the same numbers under many names. A key is a layer's name in some style and the name of a field:

    transformer_blocks.0.attn.to_q           .lora_A.weight      diffusers, DiffSynth (`.lora_A.default.weight`)
    transformer.transformer_blocks.0...      .lora_A.weight      diffusers, SimpleTuner; OneTrainer with `.lora_down`
    diffusion_model.transformer_blocks.0...  .lora_A.weight      ai-toolkit, ComfyUI
    base_model.model.transformer_blocks.0... .lora_A.weight      peft
    lora_unet_transformer_blocks_0_attn_to_q .lora_down.weight   kohya, musubi; `lora_transformer_` OneTrainer
    lycoris_transformer_blocks_0_attn_to_q   .lokr_w1            LyCORIS, SimpleTuner

A layer is found by its name with every dot as an underscore, after the words in front are taken off: so one rule reads
all of them, and an underscore that is part of a name is told from one that was a dot by the model's own layers. A key
that is not understood, a layer that is not the model's and a value that is no number refuse the file: what is applied
only in part gives wrong pictures without a word. diffusers reads some of the styles, drops `dora_scale`, and only warns
of what is left over.

The change of W (out, in) at weight 1, in float32, with the file's up (out, r), down (r, in):

    LoRA  alpha / r * up @ down                                       arXiv 2106.09685; alpha / sqrt(r) for rsLoRA
    LoHa  alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)                   arXiv 2108.06098
    LoKr  alpha / r * kron(w1, w2), each whole or a product           LyCORIS, arXiv 2309.14859
    diff  the difference itself, of norms and biases too
    DoRA  W becomes magnitude * (W + d) / |W + d|, d one of the above arXiv 2402.09353

Without `alpha` in file or metadata the factor is 1. `ss_network_alpha` is not read: it is the trainer's default for all
layers, and kohya writes each layer's own as a tensor.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pipeline.picture_files import EditError, clip

ALLOWED = "Allowed: a .safetensors file of LoRA, DoRA, LoHa, LoKr or differences for the transformer of this model."
_NAMES = r"(?:\.(?!weight|bias|scale|alpha)[\w-]+)*"  # peft writes the adapter's name between the field and `.weight`
_FIELD_NAMES = [
    ("down", rf"(?:[._]lora(?:_A|_a|[._]down)|\.lora_linear_layer\.down){_NAMES}(?:\.weight)?$"),
    ("up", rf"(?:[._]lora(?:_B|_b|[._]up)|\.lora_linear_layer\.up){_NAMES}(?:\.weight)?$"),
    ("up_bias", rf"(?:[._]lora(?:_B|[._]up)){_NAMES}\.bias$"),
    ("alpha", r"(?:[._]lora(?:_A|_B|[._]down|[._]up)?(?:\.(?!alpha$)[\w-]+)*)?\.alpha$"),
    ("magnitude", rf"\.(?:dora_scale|magnitude|lora_magnitude_vector{_NAMES}(?:\.weight)?)$"),
    ("shape", r"\.reshape_weight$"),
    *((name, rf"\.{name}{_NAMES}$") for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((name, rf"\.{name}{_NAMES}$") for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    ("diff", r"\.(?:diff|w_norm)$"),
    ("diff_bias", r"\.(?:diff_b|b_norm)$"),
]  # fmt: skip
_FIELDS = [(name, re.compile(pattern)) for name, pattern in _FIELD_NAMES]
# What is no sum of the above, by the names that only it has; the first that is found names the file.
_OTHERS = [
    ("OFT", r"[._]b?oft_"),
    ("(IA)3", r"\.on_input$|ia3_"),
    ("GLoRA", r"\.[ab][12](?:\.weight)?$"),
    ("a Tucker decomposition", r"lora_mid|hada_t[12]|lokr_t2"),
    ("AdaLoRA", r"lora_E|ranknum"),
    ("VeRA", r"vera_"),
    ("a LoRA of an embedding", r"lora_embedding_"),
    ("8-bit or 4-bit weights", r"qweight|wscales|weight_scale|scale_weight|scaled_fp8|comfy_quant"),
    ("whole weights in place of changes", r"\.set_weight$|(?:^|\.)(?:weight|bias)$"),
]
_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?[._]|lora_text_encoder|text_encoders?[._\d]|te\d?[._])"
)
_WORDS = ("base_model_", "model_", "diffusion_model_", "transformer_", "unet_", "dit_", "pipe_", "module_", "lora_unet_",
          "lora_transformer_", "lora_dit_", "lycoris_")  # fmt: skip
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# The same layer under the name that other code has for it.
_ALIASES = [("_attn_to_out_0", "_attn_to_out"), ("_mod_1", "_mod"), ("_mod_1", "_mod_lin"),
            ("_timestep_embedder_linear_1", "_timestep_embedder_0"), ("_timestep_embedder_linear_2", "_timestep_embedder_2")]  # fmt: skip
_PARTS = {
    "LoRA": ({"down", "up"},),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "LoKr": ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}),
    "diff": ({"diff"},),
}
_CHANGES_BASE = ("pissa", "olora", "corda")  # initial values of peft that are taken out of the model's own weights
_MAX_KEY = 500


def tensor_of(layer: nn.Module, name: str) -> torch.Tensor:
    """The layer's parameter or buffer of this name."""
    tensor = getattr(layer, name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


@dataclass(frozen=True)
class Change:
    """What a file does to one layer. `tensors` are as stored, by field; `factor` is alpha / rank."""

    kind: str | None  # a key of _PARTS, None if only the bias changes
    tensors: dict[str, torch.Tensor]
    factor: float
    peaks: dict[str, float]  # the largest magnitude of each field of numbers

    def get(self, field: str, device: torch.device) -> torch.Tensor:
        """A field in float32 on `device`; the dimensions of size 1 that a convolution would have are left out."""
        tensor = self.tensors[field].to(device, torch.float32)
        return tensor.flatten(1) if tensor.dim() > 2 else tensor

    def _matrix(self, name: str, device: torch.device) -> torch.Tensor:
        """One factor of LoHa or LoKr: whole, or the product of its two."""
        if name in self.tensors:
            return self.get(name, device)
        return self.get(f"{name}_a", device) @ self.get(f"{name}_b", device)

    def added_to(self, weight: torch.Tensor, factor: float) -> torch.Tensor:
        """`weight` (any dtype) plus `factor` times the change, in float32: a new tensor."""
        base, device = weight.float(), weight.device
        if self.kind == "LoRA":
            return torch.addmm(base, self.get("up", device), self.get("down", device), alpha=factor)
        if self.kind == "LoHa":
            change = self._matrix("hada_w1", device).mul_(self._matrix("hada_w2", device))
        elif self.kind == "LoKr":
            change = torch.kron(self._matrix("lokr_w1", device), self._matrix("lokr_w2", device))
        else:
            change = self.get("diff", device)
        return torch.add(base, change.reshape(base.shape), alpha=factor)

    @torch.no_grad()
    def fuse(self, layer: nn.Module, weight: float) -> None:
        """Puts the change, `weight` times, into the layer's parameters where they lie.

        Of DoRA the way from W to the trained weights is gone `weight` times: 0 changes nothing, 1 is as trained.
        """
        if self.kind is not None and "magnitude" in self.tensors:
            present = tensor_of(layer, "weight")
            trained = self.added_to(present, self.factor)
            magnitude = self.get("magnitude", trained.device)  # (out,), (out, 1): of rows; (1, in): of columns
            along_rows = magnitude.dim() == 1 or magnitude.shape[0] != 1 or trained.shape[0] == 1
            norm = trained.norm(dim=1 if along_rows else 0, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
            trained *= magnitude.reshape(norm.shape) / norm
            present.copy_(torch.lerp(present.float(), trained, weight))
        elif self.kind is not None:
            tensor_of(layer, "weight").copy_(self.added_to(tensor_of(layer, "weight"), self.factor * weight))
        for field, factor in (("up_bias", self.factor * weight), ("diff_bias", weight)):
            if field in self.tensors:
                bias = tensor_of(layer, "bias")
                bias.copy_(bias.float() + factor * self.get(field, bias.device))

    def misfit(self, layer: nn.Module) -> str | None:
        """Why the change cannot be this layer's, in words, or None."""
        shapes = {name: tuple(_flat(t).shape) for name, t in self.tensors.items()}
        weight, bias = tuple(tensor_of(layer, "weight").shape), getattr(layer, "bias", None)
        if self.kind is not None and (shape := _shape(self.kind, shapes)) != weight:
            return f"is {_size(weight)}, its change {_size(shape) if shape else 'of parts that do not fit each other'}"
        for field in {"up_bias", "diff_bias"} & shapes.keys():
            if bias is None or shapes[field] != tuple(bias.shape):
                return f"has {'no bias' if bias is None else f'a bias of {len(bias)}'}, its change one of {_size(shapes[field])}"
        if "magnitude" in shapes and shapes["magnitude"] not in (weight[:1], (weight[0], 1), (1, weight[-1])):
            return f"is {_size(weight)}, its magnitudes {_size(shapes['magnitude'])}"
        if "shape" in self.tensors and tuple(self.tensors["shape"].tolist()) != weight:
            return f"is {_size(weight)}, the file makes it {_size(self.tensors['shape'].tolist())}"
        return None

    def reach(self) -> float:
        """A bound on the largest number of the change at weight 1: what is beyond the model's dtype is refused."""
        peak = self.peaks

        def product(name: str) -> float:
            if name in peak:
                return peak[name]
            return peak[f"{name}_a"] * peak[f"{name}_b"] * len(self.tensors[f"{name}_b"])

        factor = abs(self.factor)
        change = {
            "LoRA": lambda: factor * peak["up"] * peak["down"] * len(self.tensors["down"]),
            "LoHa": lambda: factor * product("hada_w1") * product("hada_w2"),
            "LoKr": lambda: factor * product("lokr_w1") * product("lokr_w2"),
            "diff": lambda: peak["diff"],
            None: lambda: 0.0,
        }[self.kind]()
        return max(change, factor * peak.get("up_bias", 0.0), peak.get("diff_bias", 0.0), peak.get("magnitude", 0.0))


def read_lora(path: Path, transformer: nn.Module, name: str | None = None) -> dict[str, Change]:
    """The changes of the transformer's layers in the file, by the layers' names. The whole file is checked.

    `name` is what an error calls the file. Raises EditError for what is no whole safetensors file, what is no LoRA, what
    fits the model only in part, what gives a layer twice, and numbers that are none.
    """
    name = name or str(path)
    try:
        keys, metadata, tensors = _open(path)
        fields = _fields(keys, layers := _layers(transformer))
        scaling = _Scaling(metadata, path, tensors.get("lokr_factor") is not None)
        changes = {layer: _change(layer, of, tensors, scaling) for layer, of in fields.items()}
        _check_fit(changes, layers, fields)
        for layer, change in changes.items():
            for field, tensor in change.tensors.items():
                if field != "shape":
                    change.peaks[field] = _checked_peak(fields[layer][field], tensor)
    except _Refused as error:
        raise EditError(f'The LoRA "{clip(name, 200)}" cannot be used: {error} {ALLOWED}') from None
    return changes


class _Refused(Exception):
    """The reason, a whole sentence."""


def _open(path: Path) -> tuple[list[str], dict[str, str], dict[str, torch.Tensor]]:
    """Keys, metadata and tensors of a file. The tensors are views of the file: nothing is read yet."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if what := _not_safetensors(start, path):
            raise _Refused(f"it is {what}.")
        with safe_open(path, framework="pt") as stored:
            keys = list(stored.keys())
            return keys, stored.metadata() or {}, {key: stored.get_tensor(key) for key in keys}
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
        reason = clip(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise _Refused(f"it is no whole safetensors file ({reason}).") from None


def _not_safetensors(start: bytes, path: Path) -> str | None:
    """What a file that begins with `start` is, if it is known to be something else."""
    if not start:
        return "empty"
    if start.startswith(b"GGUF"):
        return "a GGUF file"
    if (
        start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
        or path.suffix.lower() in PICKLES
    ):
        return "a pickle, which may run any program when it is opened"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: the file itself was not downloaded"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    return None


PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def _layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The layers that a file may change. What adapters of peft have added to a layer is not the model's."""
    found = {}
    for name, module in transformer.named_modules():
        if not {"base_layer", "lora_A", "lora_B", "lora_magnitude_vector"} & set(name.split(".")):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.is_floating_point():
                found[name] = module
    return found


def _fields(keys: list[str], layers: dict[str, nn.Module]) -> dict[str, dict[str, str]]:
    """{layer: {field: key}}; a layer that the model does not have goes by its name in the file."""
    flat = {name.replace(".", "_"): name for name in layers}
    if len(flat) < len(layers):
        raise _Refused("two layers of this model differ only by dots and underscores.")
    for name in list(flat):
        for ours, theirs in _ALIASES:
            if name.endswith(ours):
                flat.setdefault(name.removesuffix(ours) + theirs, flat[name])
    for key in keys:
        if _TEXT_ENCODER.match(key):
            raise _Refused(f'it changes the text encoder too, by its key "{clip(key)}".')
    fields, unknown = {}, []
    for key in keys:
        if len(key) > _MAX_KEY:
            raise _Refused(f'its key "{clip(key)}" has {len(key)} characters.')
        if key == "lokr_factor":  # of musubi, see `_Scaling`
            continue
        field, match = next(((f, m) for f, pattern in _FIELDS if (m := pattern.search(key))), (None, None))
        if match is None or match.start() == 0:
            unknown.append(key)
            continue
        layer = _layer(key[: match.start()], flat)
        former = fields.setdefault(layer, {}).setdefault(field, key)
        if former != key:
            raise _Refused(f'it changes {clip(layer)} twice, by "{clip(former)}" and by "{clip(key)}".')
    if unknown:
        _refuse_unknown(unknown, len(keys))
    if not fields:
        raise _Refused("it has no keys.")
    return fields


def _layer(name: str, flat: dict[str, str]) -> str:
    text = _WRAPPERS.sub("", name).replace(".", "_").replace("_processor_", "_")
    while text not in flat:
        word = next((word for word in _WORDS if text.startswith(word)), None)
        if word is None:
            return name
        text = text.removeprefix(word)
    return flat[text]


def _refuse_unknown(keys: list[str], count: int):
    for kind, pattern in _OTHERS:
        if found := next((key for key in keys if re.search(pattern, key)), None):
            raise _Refused(f'it holds {kind}, by its key "{clip(found)}".')
    raise _Refused(f'{len(keys)} of its {count} keys are not known, for example "{clip(keys[0])}".')


class _Scaling:
    """alpha / rank of a layer: by its own tensor, or by what peft wrote into the metadata or the file's companion."""

    def __init__(self, metadata: dict[str, str], path: Path, musubi: bool):
        self.musubi = musubi  # its whole LoKr factors are scaled by alpha / their longer side, LyCORIS' are not
        text, companion = metadata.get("lora_adapter_metadata"), path.with_name("adapter_config.json")
        self.config = None
        try:
            if text is None and path.name == "adapter_model.safetensors" and companion.is_file():
                text = companion.read_text()
            if text is not None:
                config = json.loads(text)
                config = {key.removeprefix("transformer."): value for key, value in config.items()}
                patterns = dict(config.get("alpha_pattern") or {})
                if any(not re.fullmatch(r"[\w.]+", pattern) for pattern in patterns):
                    raise ValueError("a pattern that is no name")
                self.config = {"lora_alpha": config["lora_alpha"] if "lora_alpha" in config else config.get("alpha"),
                               "patterns": {key.removeprefix("transformer."): value for key, value in patterns.items()},
                               "root": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora"))}  # fmt: skip
                if str(config.get("init_lora_weights", "")).lower().startswith(_CHANGES_BASE):
                    raise _Refused(f"it was trained on other weights ({clip(str(config['init_lora_weights']), 20)}).")
        except (ValueError, AttributeError, TypeError, OSError, RecursionError) as error:
            raise _Refused(f"the settings that peft wrote with it cannot be read ({clip(str(error))}).") from None

    def factor(self, layer: str, kind: str | None, tensors: dict[str, torch.Tensor]) -> float:
        if self.config is not None and self.config["dora"] and kind == "LoRA" and "magnitude" not in tensors:
            raise _Refused(f"it is a DoRA without the magnitudes of {clip(layer)}.")
        rank = self._rank(kind, tensors)
        if rank is None:
            return 1.0
        if rank == 0:
            raise _Refused(f"its change of {clip(layer)} has rank 0.")
        if "alpha" in tensors:
            return self._number(layer, tensors["alpha"]) / rank
        if self.config is None or self.config["lora_alpha"] is None:
            return 1.0
        alpha = self.config["lora_alpha"]
        alpha = next(
            (value for end, value in self.config["patterns"].items() if f".{layer}".endswith(f".{end}")), alpha
        )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise _Refused(f"alpha of {clip(layer)} is {clip(repr(alpha), 40)}, which is no number.")
        return alpha / (math.sqrt(rank) if self.config["root"] else rank)

    def _rank(self, kind: str | None, tensors: dict[str, torch.Tensor]) -> int | None:
        """None where alpha says nothing: differences, and LoKr of two whole factors."""
        by = {"LoRA": ("down",), "LoHa": ("hada_w1_b",), "LoKr": ("lokr_w2_b", "lokr_w1_b")}.get(kind or "", ())
        for field in by:
            if field in tensors:
                return tensors[field].shape[0] if tensors[field].dim() else 0
        return max(tensors["lokr_w2"].shape, default=0) if kind == "LoKr" and self.musubi else None

    @staticmethod
    def _number(layer: str, alpha: torch.Tensor) -> float:
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(value := alpha.float().item()):
            raise _Refused(f"alpha of {clip(layer)} is {clip(str(alpha.tolist()), 40)}, which is no number.")
        return value


def _change(layer: str, keys: dict[str, str], tensors: dict[str, torch.Tensor], scaling: _Scaling) -> Change:
    of = {field: tensors[key] for field, key in keys.items()}
    kinds = [kind for kind, parts in _PARTS.items() if any(part & of.keys() for part in parts)]
    if len(kinds) > 1:
        raise _Refused(f"it changes {clip(layer)} in two ways, {' and '.join(kinds)}.")
    kind = kinds[0] if kinds else None
    parts = _PARTS[kind] if kind else ()
    whole = [part for part in parts if part <= of.keys()]
    started = [part for part in parts if part & of.keys()]
    # LoKr has two factors, each in one of two forms.
    complete = len(whole) == len(started) and (kind != "LoKr" or [min(p)[:7] for p in whole] == ["lokr_w1", "lokr_w2"])
    if kind == "diff" or kind is None:
        complete = complete and "magnitude" not in of and bool({"diff", "diff_bias"} & of.keys())
    if not complete or (kind != "LoRA" and "up_bias" in of):
        there = ", ".join(f'"{clip(key)}"' for key in list(keys.values())[:3])
        raise _Refused(f"its change of {clip(layer)} is not whole, it has only {there}.")
    factor = scaling.factor(layer, kind, of)
    return Change(kind, {field: tensor for field, tensor in of.items() if field != "alpha"}, factor, {})


def _check_fit(changes: dict[str, Change], layers: dict[str, nn.Module], fields: dict) -> None:
    misfits = {}
    for name, change in changes.items():
        why = change.misfit(layers[name]) if name in layers else "is no layer of it"
        if why:
            misfits[name] = why
    if misfits:
        name, why = next(iter(misfits.items()))
        count = len(changes) - len(misfits)
        raise _Refused(
            f"{count} of its {len(changes)} layers fit this model; for example {clip(name)} {clip(why, 150)}."
        )


def _checked_peak(key: str, tensor: torch.Tensor) -> float:
    """The largest magnitude."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        peak = _peak(tensor) if tensor.is_floating_point() and tensor.dtype.itemsize <= 8 else None
    except (NotImplementedError, RuntimeError):  # a dtype of fewer than 8 bits, which torch can only store
        peak = None
    if peak is None:
        raise _Refused(f'its tensor "{clip(key)}" is of {dtype}. Floating point of 8 to 64 bits is read.')
    if not math.isfinite(peak):
        raise _Refused(f'its tensor "{clip(key)}" holds numbers that are not finite in float32.')
    return peak


def _peak(tensor: torch.Tensor) -> float:
    """The largest magnitude; not a number or infinite if one of them is."""
    return tensor.to(torch.float32).abs().max().item() if tensor.numel() else 0.0


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.dim() > 2 and tensor.numel() == tensor.shape[0] * tensor.shape[1] else tensor


def _shape(kind: str, shapes: dict[str, tuple]) -> tuple | None:
    """The shape of a change whose parts have these, None if they do not fit each other."""

    def product(a: tuple, b: tuple) -> tuple | None:
        return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None

    def factor(name: str) -> tuple | None:
        return shapes[name] if name in shapes else product(shapes[f"{name}_a"], shapes[f"{name}_b"])

    if kind == "diff":
        return shapes["diff"]
    if kind == "LoRA":
        return product(shapes["up"], shapes["down"])
    if kind == "LoHa":
        return factor("hada_w1") if factor("hada_w1") == factor("hada_w2") else None
    first, second = factor("lokr_w1"), factor("lokr_w2")
    if not first or not second or len(first) != 2 or len(second) != 2:
        return None
    return first[0] * second[0], first[1] * second[1]


def _size(shape) -> str:
    return "x".join(map(str, shape)) or "one number"
