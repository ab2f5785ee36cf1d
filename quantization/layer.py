"""What INT8 and FP8 linear layers share: the layer, choosing its backend, putting layers into a model, files.

A quantised layer keeps its weight in 8 bits with a float32 scale for each output; inputs are quantised as they come, by
a scale for each row. It is no `nn.Linear`: whoever looks for those to fuse a LoRA must do so before. `int8_linear` and
`fp8_linear` add the number format and the ways to multiply it; those for one shape are measured against each other the
first time that it comes, never inside a CUDA graph's recording, and the reason stays readable (`QuantizedLinear.choice`).

Why not torchao: its int8 was slower than bf16 on an H200 and its fp8 needed one and a half minutes of compiling for each
size (2-step frames, torch 2.11); here nothing is compiled but a few small kernels, once.

A quantised model is a diffusers folder whose `transformer/` holds `quantization.json` and `quantized-*.safetensors` in
place of diffusers' files: stock refuses it by name, where it would read 8-bit weights without their scales in silence.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from quantization import products as kernels
from quantization.choices import PAIRS, TABLE
from quantization.products import Config, Quantized, quantize_rows

MULTIPLE = 16  # inputs and outputs: 16 bytes are what tensor cores and the memory accelerator take
# Layers of Qwen-Image that stay as they are: they are read once a step or run on one row, and errors there reach all.
# And of its text encoder: what is not read at all, and what is small and sees pixels.
KEPT = ("img_in", "txt_in", "time_text_embed", "norm_out", "proj_out", "img_mod", "txt_mod", "lm_head", "visual")
# What the fast path multiplies with at once, in its order: the text's layers and the image's of Qwen-Image, the text
# encoder's layers of one input. They are quantised and moved into one piece of memory each, so that nothing has to be
# laid together later, when the GPU is full.
TOGETHER = (
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.to_add_out", "attn.to_out.0"),
    ("txt_mlp.net.0.proj", "img_mlp.net.0.proj"),
    ("txt_mlp.net.2", "img_mlp.net.2"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
NOTE, FILES = "quantization.json", "quantized-*.safetensors"
_CHUNK = 2**21  # numbers that are quantised at a time: intermediates in float32 take 8 MB each
_COLD_BYTES = 160e6  # weights in a measurement: more than twice the 60 MB of L2 on Hopper


class Choice(NamedTuple):
    """How a product is computed, and why so."""

    backend: str
    config: Config | None
    reason: str


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (N, K) and the rows of x in 8 bits. Takes x (..., K), or rows that are `Quantized` already.

    Subclasses give `kind`, `eight_bit` (the dtype), `backends(device, dtype, rows)` and `_run`. `forced` names a backend
    for a layer or, set on the class, for all of them. Raises ValueError for sizes that are no multiples of 16.
    """

    kind: str
    eight_bit: torch.dtype
    forced: str | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, group: int = 0, dtype=None, device=None):
        super().__init__()
        if why := refusal(inputs, outputs, group):
            raise ValueError(why)
        self.in_features, self.out_features, self.group = inputs, outputs, group
        self._float = dtype or torch.get_default_dtype()

        def parameter(*shape, dtype):
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = parameter(outputs, inputs, dtype=self.eight_bit)
        self.scale = parameter(outputs, dtype=torch.float32)
        self.bias = parameter(outputs, dtype=self._float) if bias else None

    @classmethod
    def from_float(cls, linear: nn.Linear, group: int = 0) -> "QuantizedLinear":
        """The layer quantised where its weight lies, `group` inputs at a time rotated before. The bias is carried."""
        return cls.all_from_float([linear], group)[0]

    @classmethod
    def all_from_float(cls, linears: list[nn.Linear], group: int = 0, device=None) -> list["QuantizedLinear"]:
        """Layers of one input quantised into one piece of memory on `device`: written where they stay, some rows at a
        time, so that of the float weights only those rows are ever there.
        """
        first = linears[0]
        whole = cls(
            first.in_features, sum(linear.out_features for linear in linears), first.bias is not None,
            group=group, dtype=first.weight.dtype, device=first.weight.device if device is None else device,
        )  # fmt: skip
        layers = whole.parts([linear.out_features for linear in linears])
        for layer, linear in zip(layers, linears, strict=True):
            for begin in range(0, layer.out_features, max(1, _CHUNK // layer.in_features)):
                rows = slice(begin, begin + max(1, _CHUNK // layer.in_features))
                weight = cls.quantize_weight(linear.weight.detach()[rows].to(whole.weight.device), group)
                layer.weight.data[rows].copy_(weight.values)
                layer.scale.data[rows].copy_(weight.scales)
            if layer.bias is not None:
                layer.bias.data.copy_(linear.bias)
        return layers

    @classmethod
    def quantize_weight(cls, weight: torch.Tensor, group: int = 0) -> Quantized:
        """(N, K) with a scale for each output, in PyTorch on every device: the same bits wherever it is done."""
        return kernels._quantize_rows_torch(weight, cls.eight_bit, group, gelu=False)

    @staticmethod
    def merged(layers: list["QuantizedLinear"], device=None) -> "QuantizedLinear":
        """Layers of one input as one on `device`, outputs side by side. Theirs become views of its memory: nothing is
        held twice. Where they lie there like that already, nothing moves.
        """
        first = layers[0]
        if len({(type(layer), layer.in_features, layer.group, layer.bias is None) for layer in layers}) != 1:
            raise ValueError(f"only layers of one kind and one input can be merged: {layers}")
        counts, bias = [layer.out_features for layer in layers], first.bias is not None
        device = first.weight.device if device is None else torch.device(device)
        wholes = []
        for name in ("weight", "scale", "bias")[: 2 + bias]:
            pieces = [getattr(layer, name).data for layer in layers]
            whole = _adjoining(pieces, device)
            if whole is None:
                whole = pieces[0].new_empty(sum(counts), *pieces[0].shape[1:], device=device)
                for layer, piece, part in zip(layers, pieces, whole.split(counts), strict=True):
                    setattr(layer, name, nn.Parameter(part.copy_(piece), False))
            wholes.append(whole)
        return first._of(Quantized(*wholes[:2]), wholes[2] if bias else None, first.group, first.dtype)

    def parts(self, counts: list[int]) -> list["QuantizedLinear"]:
        """Layers of so many outputs each, one after the other: views of this one's parameters."""
        weights = map(Quantized, self.weight.data.split(counts), self.scale.data.split(counts))
        biases = [None] * len(counts) if self.bias is None else self.bias.data.split(counts)
        return [self._of(weight, bias, self.group, self.dtype) for weight, bias in zip(weights, biases, strict=True)]

    @property
    def reads(self) -> tuple[torch.dtype, int]:
        """Layers of which this is equal read the same `Quantized` rows."""
        return self.eight_bit, self.group

    @property
    def dtype(self) -> torch.dtype:
        """Of results for inputs that come quantised."""
        return self._float if self.bias is None else self.bias.dtype

    def quantize(self, x: torch.Tensor, gelu: bool = False) -> Quantized:
        """Rows (R, K) as this layer reads them, GELU and rotation included."""
        return quantize_rows(x, self.eight_bit, self.group, gelu)

    def forward(self, x: torch.Tensor | Quantized, gelu: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
        """(..., N) in x's dtype; of `Quantized` rows (R, N) in the bias's. `gelu` (tanh form) follows the sum.

        `out`: where to write, contiguous (R, N) of that dtype.
        """
        given = isinstance(x, Quantized)
        shape, dtype = ((len(x.scales),), self.dtype) if given else (x.shape[:-1], x.dtype)
        if not given:
            if x.shape[-1] != self.in_features:
                raise ValueError(f"the input is {tuple(x.shape)}. Allowed: (..., {self.in_features}).")
            x = self.quantize(x.reshape(-1, self.in_features).contiguous())
        if out is None:
            out = torch.empty(len(x.scales), self.out_features, dtype=dtype, device=x.values.device)
        if len(x.scales):
            choice = self.choice(len(x.scales), out.dtype)
            self._run(x, choice.backend, choice.config, out, gelu)
        return out.view(*shape, self.out_features)

    def choice(self, rows: int, dtype: torch.dtype) -> Choice:
        """What runs for so many rows: what is forced, measured before, in the table, or measured now. See `Choice`."""
        device, bucket = self.weight.device, row_bucket(rows)
        possible = self.backends(device, dtype, rows)
        if self.forced is not None and self.forced not in possible:
            raise ValueError(f'the backend "{self.forced}" was forced. Possible here: {", ".join(possible)}.')
        wanted = [self.forced] if self.forced else possible
        if device.type != "cuda":
            return Choice(wanted[0], None, "the only one on a CPU")
        key = (self.kind, bucket, self.out_features, self.in_features)
        known = _measured.get((*key, dtype, device, tuple(wanted)))
        if known is not None:
            return known
        if key in TABLE and TABLE[key][0] in wanted and _table_holds(TABLE[key][1], rows, device, dtype):
            return Choice(*TABLE[key], "the fastest on an H200 (table)")
        if torch.cuda.is_current_stream_capturing():
            config = kernels.CANDIDATES[0] if wanted[0] == "triton" else None
            return Choice(wanted[0], config, "not measured: the first call of this shape was recorded")
        made = _measured[(*key, dtype, device, tuple(wanted))] = self._measure(rows, dtype, wanted)
        return made

    def backends(self, device: torch.device, dtype: torch.dtype, rows: int) -> list[str]:
        """What can multiply there, what should be fastest first. Never empty."""
        raise NotImplementedError

    def _run(self, x: Quantized, backend: str, config: Config | None, out: torch.Tensor, gelu: bool) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _measure(self, rows: int, dtype: torch.dtype, backends: list[str]) -> Choice:
        """Times every way to compute this shape, weights cold, as in a model where each layer is read once a step."""
        x = self.quantize(torch.randn(rows, self.in_features, device=self.weight.device, dtype=dtype))
        copies = [self] + [self._copy() for _ in range(int(min(16, _COLD_BYTES // self.weight.nbytes + 1)))]
        out = torch.empty(rows, self.out_features, dtype=dtype, device=self.weight.device)
        times, failed = {}, {}
        for way in self._ways(rows, backends):
            try:
                calls = [lambda layer=layer, way=way: layer._run(x, *way, out, False) for layer in copies]
                times[way] = kernels.measure_us(calls)
            except Exception as error:  # too much shared memory, a form that this GPU or this Triton has not
                failed[way] = error
        if not times:
            raise RuntimeError(f"nothing multiplies {rows} x {tuple(self.weight.shape)} here: {failed}")
        best = min(times, key=times.get)
        text = f"{times[best]:.1f} us for {rows} rows"
        for backend in dict.fromkeys(b for b, _ in times if b != best[0]):
            text += f"; {backend} {min(t for (b, _), t in times.items() if b == backend):.1f} us"
        return Choice(*best, f"measured here: {text}" + (f" ({best[1]})" if best[1] else ""))

    def _ways(self, rows: int, backends: list[str]) -> list[tuple[str, Config | None]]:
        most = row_bucket(rows)  # what serves these serves their whole class
        configs = [config for config in kernels.CANDIDATES if kernels.fits(config, most, self.weight.device)]
        return [(b, c) for b in backends for c in (configs if b == "triton" else [None])]

    def _copy(self) -> "QuantizedLinear":
        return self._of(Quantized(self.weight.data.clone(), self.scale.data), self.bias, self.group, self.dtype)

    @classmethod
    def _of(cls, weight: Quantized, bias: torch.Tensor | None, group: int, dtype: torch.dtype) -> "QuantizedLinear":
        """The layer of these parameters, whose results are of `dtype`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        (made.out_features, made.in_features), made.group, made._float = weight.values.shape, group, dtype
        made._fill(weight, bias)
        return made

    def _fill(self, weight: Quantized, bias: torch.Tensor | None) -> None:
        self.weight, self.scale = nn.Parameter(weight.values, False), nn.Parameter(weight.scales, False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def _apply(self, fn, recurse=True):
        """`to`, `cuda` and their like may move the 8-bit weight and its scale, but not change their dtypes."""
        kept = {name: getattr(self, name).data for name in ("weight", "scale")}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            moved = getattr(self, name)
            if moved.dtype != data.dtype:
                moved.data = data.to(moved.device)
        self._float = fn(torch.empty(0, dtype=self._float)).dtype
        return self

    def extra_repr(self) -> str:
        rotated = f", rotated by {self.group}" if self.group else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{rotated}"


class QuantizedPair:
    """Two layers of one shape and one kind, the first for some rows and the second for those behind them, as one product.

    Each is given as layers of one input whose outputs stand side by side. All their parameters become views of one
    memory, so that one launch can read both weights; they run on. Whether one launch or two is faster is looked up or
    measured (`choice`), and always two where a backend is forced.
    """

    def __init__(self, first: list[QuantizedLinear], second: list[QuantizedLinear]):
        self.whole = QuantizedLinear.merged([*first, *second])
        if self.whole.weight.is_cuda:
            torch.cuda.empty_cache()  # pieces that were left behind are too small for the next pair: they would pile up
        self.out_features = self.whole.out_features // 2
        self.parts = tuple(self.whole.parts([self.out_features] * 2))

    @staticmethod
    def possible(first: list, second: list) -> bool:
        layers = [*first, *second]
        if not all(isinstance(layer, QuantizedLinear) for layer in layers):
            return False
        kinds = {(type(layer), layer.in_features, layer.group, layer.bias is None, layer.dtype) for layer in layers}
        return len(kinds) == 1 and sum(m.out_features for m in first) == sum(m.out_features for m in second)

    def quantize(self, x: torch.Tensor, gelu: bool = False) -> Quantized:
        return self.whole.quantize(x, gelu)

    @property
    def norm_writes(self) -> torch.dtype | None:
        """What the norm before may write for these layers, or None if only `quantize` knows."""
        return None if self.whole.group else self.whole.eight_bit

    @functools.cached_property
    def limits(self) -> torch.Tensor:
        """float32 (2, 2), see `quantized_kernels.multiply`."""
        norms = []
        for m in self.parts:  # some rows at a time: in float32 the weight is four times as large
            rows = m.weight.split(max(1, _CHUNK // m.in_features))
            norms.append((torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in rows]) * m.scale).max())
        biases = [m.scale.new_zeros(()) if m.bias is None else m.bias.abs().max().float() for m in self.parts]
        return torch.stack([torch.stack(pair) for pair in zip(norms, biases, strict=True)])

    def __call__(self, x: torch.Tensor | Quantized, first: int, gelu: bool = False) -> torch.Tensor:
        """(R, N) for rows (R, K) of which the `first` are the first layer's. `gelu` (tanh form) follows the sum."""
        x = x if isinstance(x, Quantized) else self.quantize(x)
        rows, dtype = len(x.scales), self.whole.dtype
        out = torch.empty(rows, self.out_features, dtype=dtype, device=x.values.device)
        choice = self.choice(rows, first, dtype)
        if choice.backend == "together":
            return self._multiply(x, first, out, choice.config, gelu)
        return self._apart(x, first, out, gelu)

    def then(self, reader: "QuantizedPair", x: torch.Tensor | Quantized, first: int) -> Quantized:
        """GELU(self(x)) as `reader` reads it: quantised where the sums are, if `x` brings norms and it reads e4m3."""
        rows = len(x.scales) if isinstance(x, Quantized) else 0
        if rows and x.norms is not None and reader.norm_writes == torch.float8_e4m3fn:
            choice = self.choice(rows, first, self.whole.dtype)
            if choice.config is not None:
                out = kernels.empty(rows, self.out_features, reader.norm_writes, x.values.device)
                return self._multiply(x, first, out, choice.config, True, self.limits)
        return reader.quantize(self(x, first), gelu=True)

    def choice(self, rows: int, first: int, dtype: torch.dtype) -> Choice:
        """Backend "together" or "apart". `config` is what is best together, None where that cannot be done."""
        whole = self.whole
        device, bucket = whole.weight.device, row_bucket(rows)
        if device.type != "cuda" or "triton" not in whole.backends(device, dtype, rows):
            return Choice("apart", None, "one product for both needs the Triton kernel")
        if whole.forced is not None:
            return Choice("apart", None, f'the backend "{whole.forced}" was forced')
        key = (whole.kind, bucket, self.out_features, whole.in_features)
        known = _measured.get(("pair", *key, dtype, device))
        if known is not None:
            return known
        if key in PAIRS and _table_holds(PAIRS[key][1], rows, device, dtype):
            return Choice(*PAIRS[key], "the fastest on an H200 (table)")
        if torch.cuda.is_current_stream_capturing():
            return Choice("apart", None, "not measured: the first call of this shape was recorded")
        made = _measured["pair", *key, dtype, device] = self._measure(rows, first, dtype)
        return made

    def _multiply(self, x, first, out, config, gelu, limits=None):
        whole = self.whole
        weight = Quantized(whole.weight, whole.scale)
        return kernels.multiply(x, weight, whole.bias, out, config, gelu, first, limits)

    def _apart(self, x: Quantized, first: int, out: torch.Tensor, gelu: bool) -> torch.Tensor:
        for layer, rows in zip(self.parts, (slice(0, first), slice(first, None)), strict=True):
            if len(out[rows]):
                layer(x.part(rows), gelu, out=out[rows])
        return out

    @torch.no_grad()
    def _measure(self, rows: int, first: int, dtype: torch.dtype) -> Choice:
        """Times one launch in the ways of `PAIR_CANDIDATES` against two, weights cold."""
        device = self.whole.weight.device
        x = self.quantize(torch.randn(rows, self.whole.in_features, device=device, dtype=dtype))
        out = torch.empty(rows, self.out_features, dtype=dtype, device=device)
        more = int(min(16, _COLD_BYTES // self.whole.weight.nbytes + 1))
        pairs = [self] + [QuantizedPair(*([part._copy()] for part in self.parts)) for _ in range(more)]
        apart = kernels.measure_us([lambda pair=pair: pair._apart(x, first, out, False) for pair in pairs])
        times, failed = {}, {}
        for config in kernels.PAIR_CANDIDATES:
            if kernels.fits(config, rows, device):
                calls = [lambda pair=pair, c=config: pair._multiply(x, first, out, c, False) for pair in pairs]
                try:
                    times[config] = kernels.measure_us(calls)
                except Exception as error:  # as in `QuantizedLinear._measure`
                    failed[config] = error
        if not times:
            return Choice("apart", None, f"no way to multiply both together works here: {failed}")
        best = min(times, key=times.get)
        reason = f"measured here: together {times[best]:.1f} us ({best}), apart {apart:.1f} us for {rows} rows"
        return Choice("together" if times[best] < apart else "apart", best, reason)


_measured: dict[tuple, Choice] = {}  # of this process: layers of one shape share it


def _table_holds(config: Config | None, rows: int, device: torch.device, dtype: torch.dtype) -> bool:
    """The tables are of an H200 and of results in 16 bits: tiles of float32 results may not fit its shared memory."""
    runs = config is None or kernels.fits(config, row_bucket(rows), device)
    return runs and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) == (9, 0)


def row_bucket(rows: int) -> int:
    """Row counts up to the next power of two are one shape class, from 64 on."""
    return max(64, 1 << (rows - 1).bit_length())


def refusal(inputs: int, outputs: int, group: int = 0) -> str | None:
    """Why a layer of this size cannot be quantised, or None."""
    if inputs % MULTIPLE or outputs % MULTIPLE:
        return f"{inputs} inputs and {outputs} outputs. Allowed: multiples of {MULTIPLE}."
    if group not in kernels.GROUPS or (group and inputs % group):
        return f"{inputs} inputs cannot be rotated by {group}. Allowed: {kernels.GROUPS} that divide them."
    return None


# Into a model --------------------------------------------------------------------------------------------------------


class Swapped(NamedTuple):
    """What `swap_linears` did: the names it swapped, why it skipped the others, and bytes of weights before and after."""

    swapped: list[str]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{len(self.swapped)} linear layers quantised, {self.bytes_before / 1e9:.2f} -> {self.bytes_after / 1e9:.2f} GB; "
            f"{len(self.skipped)} kept"
        )


def default_filter(linear: nn.Linear, name: str) -> str | None:
    """Why this layer of Qwen-Image stays as it is; None to quantise it."""
    kept = [part for part in name.split(".") if part in KEPT]
    return f"{kept[0]} is kept in full precision" if kept else None


def rotate_down_projections(name: str) -> int:
    """256 for the layers behind a GELU, whose inputs have the outliers; 0 for all others.

    An option, not the default. On an H200 it makes a frame 7 % slower at 512x512. It gains 14 dB of a layer's SQNR where
    a few inputs are 50 times as large as the others; on the pocket model INT8 pictures are 52.7 dB from float's without
    and 53.4 dB with it, and their distance to the computed answers is the same.
    """
    return 256 if name.endswith("mlp.net.2") else 0


def no_rotation(name: str) -> int:
    return 0


def swap_linears(
    module: nn.Module,
    kind: type[QuantizedLinear],
    filter: Callable[[nn.Linear, str], str | None] = default_filter,
    group: Callable[[str], int] = no_rotation,
    device: torch.device | str | None = None,
) -> Swapped:
    """Puts `kind` in place of every `nn.Linear` in `module` for which `filter(linear, name)` gives no reason not to.

    `group(name)` is the length of the rotation's groups. With `device`, layer after layer goes there to be quantised and
    stays, those of `TOGETHER` side by side: of a model on the CPU no float layer ever lies on the GPU. Fuse a LoRA
    before. A `ValueError` changes nothing of the layers that it names.
    """
    linears, skipped = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}, {}
    for name, linear in linears.items():
        why = filter(linear, name)
        if type(linear) is not nn.Linear:
            why = why or f"a {type(linear).__name__} is more than a linear layer"
        if why := why or refusal(linear.in_features, linear.out_features, group(name)):
            skipped[name] = why
    wanted = {name: linear for name, linear in linears.items() if name not in skipped}
    after = 0
    for names in _together({n: (m.in_features, group(n), m.bias is None, m.weight.dtype) for n, m in wanted.items()}):
        layers = kind.all_from_float([wanted[name] for name in names], group(names[0]), device)
        for name, layer in zip(names, layers, strict=True):
            layer.train(wanted[name].training)
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer)
            after += sum(p.nbytes for p in layer.parameters())
    before = sum(p.nbytes for linear in wanted.values() for p in linear.parameters())
    return Swapped(list(wanted), skipped, before, after)


def move_quantized(module: nn.Module, device: torch.device) -> None:
    """Moves the 8-bit layers in `module`, those of a group of `TOGETHER` into one memory."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, QuantizedLinear)}
    for names in _together({n: (type(m), m.in_features, m.group, m.bias is None) for n, m in layers.items()}):
        QuantizedLinear.merged([layers[name] for name in names], device)


def _together(kinds: dict[str, tuple]) -> list[list[str]]:
    """The names in the groups of `TOGETHER`, where all of a group are there and of one kind; the others alone."""
    groups, left = [], dict(kinds)
    for name in kinds:
        if name not in left:
            continue
        found = [name]
        for group in TOGETHER:
            prefixes = [name.removesuffix(own) for own in group if name == own or name.endswith(f".{own}")]
            names = [prefixes[0] + own for own in group] if prefixes else []
            if names and len({left.get(n) for n in names} - {None}) == 1 and all(n in left for n in names):
                found = names
        groups.append(found)
        for n in found:
            del left[n]
    return groups


def swapper(kind: type[QuantizedLinear]) -> Callable[..., Swapped]:
    """`swap_linears` for one kind of layers."""

    def swap(module: nn.Module, filter=default_filter, group=no_rotation, device=None) -> Swapped:
        return swap_linears(module, kind, filter, group, device)

    return swap


def _adjoining(pieces: list[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """Tensors (n, ...) as one if they follow each other in one memory on `device` already."""
    first = pieces[0]
    memory, place = first.untyped_storage()._cdata, first.storage_offset()
    for piece in pieces:
        if piece.untyped_storage()._cdata != memory or piece.storage_offset() != place or not piece.is_contiguous():
            return None
        place += piece.numel()
    if device.type != first.device.type or device.index not in (None, first.device.index):
        return None
    return first.as_strided((sum(map(len, pieces)), *first.shape[1:]), first.stride())


# Files ---------------------------------------------------------------------------------------------------------------


def save_quantized(transformer: nn.Module, folder: Path) -> None:
    """Writes a swapped transformer into `folder`: config.json, quantization.json, one safetensors file."""
    layers = {n: m for n, m in transformer.named_modules() if isinstance(m, QuantizedLinear)}
    kinds = {m.kind for m in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"the model's quantised layers are of the kinds {sorted(kinds)}. Allowed: one kind.")
    folder.mkdir(parents=True, exist_ok=True)
    transformer.save_config(folder)
    tensors = {name: t.contiguous() for name, t in transformer.state_dict().items()}
    # Merged layers are views of one memory, which safetensors refuses: each is written for itself.
    tensors = {name: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for name, t in tensors.items()}
    save_file(tensors, folder / FILES.replace("*", "00001"), {"format": "pt"})
    _write_note(folder, kinds.pop(), {name: layer.group for name, layer in layers.items()})


def quantize_folder(
    model: Path, out: Path, kind: type[QuantizedLinear], group: Callable[[str], int] = no_rotation
) -> Swapped:
    """Writes the diffusers folder `model` to `out` with its transformer quantised, one file of weights at a time.

    Raises ValueError if `out` is in use or `model` is no diffusers folder.
    """
    prepare_folder(model, out)
    source, target = model / "transformer", out / "transformer"
    linears = {n: m for n, m in _empty_transformer(source).named_modules() if isinstance(m, nn.Linear)}
    skipped = {n: why for n, m in linears.items() if (why := _why_not(m, n, group))}
    chosen = {name: group(name) for name in linears if name not in skipped}
    before = after = 0
    for number, file in enumerate(sorted(source.glob("*.safetensors")), 1):
        tensors = {}
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - no dict
                tensor, name = stored.get_tensor(key), key.removesuffix(".weight")
                if name not in chosen or name == key:
                    tensors[key] = tensor
                    continue
                weight = kind.quantize_weight(tensor, chosen[name])
                tensors[key], tensors[f"{name}.scale"] = weight[:2]
                before, after = before + tensor.nbytes, after + weight.values.nbytes + weight.scales.nbytes
        save_file(tensors, target / FILES.replace("*", f"{number:05}"), {"format": "pt"})
    shutil.copy(source / "config.json", target)
    _write_note(target, kind.kind, chosen)
    return Swapped(list(chosen), skipped, before, after)


def prepare_folder(model: Path, out: Path) -> None:
    """Makes `out` a copy of the diffusers folder `model` with an empty transformer; files are linked where possible."""
    if not (model / "model_index.json").is_file() or not (model / "transformer" / "config.json").is_file():
        raise ValueError(f"{model} is no diffusers folder with a transformer.")
    if is_quantized(model):
        raise ValueError(f"{model} is quantised already.")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty.")
    (out / "transformer").mkdir(parents=True)
    for entry in model.iterdir():
        if entry.is_dir() and entry.name != "transformer":
            shutil.copytree(entry, out / entry.name, copy_function=_link)
        elif entry.is_file():
            _link(str(entry), str(out / entry.name))


def is_quantized(folder: Path) -> str | None:
    """The kind, "int8" or "fp8", if the diffusers folder's transformer was quantised by this program, else None."""
    note = folder / "transformer" / NOTE
    return json.loads(note.read_text())["kind"] if note.is_file() else None


def load_quantized(folder: Path, kinds: Iterable[type[QuantizedLinear]], *, device="cpu", dtype=torch.bfloat16):
    """The transformer of a quantised diffusers folder, 8-bit weights read straight to `device`: no float copy anywhere.

    `dtype` is that of everything that is not quantised. Raises ValueError if the folder is of no kind in `kinds`, or
    files and note do not fit each other.
    """
    source = folder / "transformer"
    note = json.loads((source / NOTE).read_text())
    kind = {k.kind: k for k in kinds}.get(note["kind"])
    if kind is None:
        raise ValueError(f'{source} is quantised as "{note["kind"]}". Allowed: {", ".join(k.kind for k in kinds)}.')
    model = _empty_transformer(source)
    for name, group in note["layers"].items():
        linear = model.get_submodule(name)
        layer = kind(
            linear.in_features, linear.out_features, linear.bias is not None, group=group, dtype=dtype, device="meta"
        )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    expected = {name: t.dtype for name, t in model.state_dict().items()}
    scales = {f"{name}.scale" for name in note["layers"]}
    eight_bit = {f"{name}.weight" for name in note["layers"]}
    for file in sorted(source.glob(FILES)):
        tensors = {}
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for key in stored.keys():  # noqa: SIM118 - no dict
                tensor = stored.get_tensor(key)
                if key in eight_bit | scales and tensor.dtype != expected.get(key):
                    raise ValueError(f"{file}: {key} is {tensor.dtype}, not {expected.get(key)}.")
                tensors[key] = tensor if key in eight_bit | scales else tensor.to(dtype)
        model.load_state_dict(tensors, strict=False, assign=True)
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"the files in {source} lack {len(missing)} tensors: {', '.join(missing[:3])}.")
    return model.requires_grad_(False).eval()


def _why_not(linear: nn.Linear, name: str, group: Callable[[str], int]) -> str | None:
    return default_filter(linear, name) or refusal(linear.in_features, linear.out_features, group(name))


def _empty_transformer(source: Path) -> nn.Module:
    """The model that config.json describes with parameters on the meta device; its rotary tables are real."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        return QwenImageTransformer2DModel.from_config(QwenImageTransformer2DModel.load_config(source))


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)  # a hub folder holds links to its blobs
    except OSError:
        shutil.copy2(source, target)


def _write_note(folder: Path, kind: str, layers: dict[str, int]) -> None:
    """quantization.json: the kind, and for each quantised layer the length of its rotation's groups."""
    (folder / NOTE).write_text(json.dumps({"kind": kind, "layers": layers}, indent=1) + "\n")
