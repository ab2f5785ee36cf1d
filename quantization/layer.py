"""`QuantizedLinear`: what the INT8 and FP8 linear layers share.

A quantised layer stores its weight in 8 bits with a float32 scale for each output. Inputs are quantised as they come, with
a scale for each row. `int8_linear` and `fp8_linear` add the number format and the ways to multiply it; those for one shape
are measured against each other the first time it comes (`choices`), and the reason stays readable
(`QuantizedLinear.choice`). The layer is no `nn.Linear`: a LoRA has to be fused before a model is quantised.

Why not torchao: its int8 was slower than bf16 on an H200 and its fp8 needed one and a half minutes of compiling for each
size (2-step frames, torch 2.11); here nothing is compiled but a few small kernels, once.
"""

import functools

import torch
from torch import nn

from quantization import QuantizationError
from quantization.choices import LAYERS, Choice, Choices, Shape, row_bucket
from quantization.rows import GROUPS, Quantized, quantize_rows, quantize_rows_torch
from quantization.side_by_side import pack
from quantization.tiles import CANDIDATES, Config, fits
from quantization.timing import measure_us

MULTIPLE = 16  # of inputs and of outputs: tensor cores and the tensor memory accelerator take 16 bytes at a time
CHUNK = 2**21  # numbers that are quantised at a time: intermediates in float32 take 8 MB each
COLD_BYTES = 160e6  # weights in a measurement: more than twice the 60 MB of L2 on Hopper


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (N, K) and the rows of x in 8 bits. x: (..., K), or `Quantized` rows (R, K).

    Parameters: weight (N, K) of `eight_bit`; scale (N,) float32; bias (N,) or None. A float weight is weight * scale.
    `group` inputs at a time are rotated before they are quantised, 0 for none (see `rows.rotate`).

    Subclasses give `kind`, `eight_bit`, `backends` and `multiply`. Raises QuantizationError, a ValueError, for sizes that
    are no multiples of 16.
    """

    kind: str  # the name of the number format: "int8" or "fp8"
    eight_bit: torch.dtype
    forced: str | None = None  # a backend for this layer or, set on the class, for all layers
    choices = Choices(LAYERS)  # for all layers: those of one shape share what was measured

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, group: int = 0, dtype=None, device=None):
        """Uninitialised parameters; `dtype` is the bias's, by default torch's default dtype."""
        super().__init__()
        if why := refusal(inputs, outputs, group):
            raise QuantizationError(why)
        self.in_features, self.out_features, self.group = inputs, outputs, group
        self._float = dtype or torch.get_default_dtype()

        def parameter(*shape, dtype):
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = parameter(outputs, inputs, dtype=self.eight_bit)
        self.scale = parameter(outputs, dtype=torch.float32)
        self.bias = parameter(outputs, dtype=self._float) if bias else None

    @classmethod
    def from_float(cls, linear: nn.Linear, group: int = 0) -> "QuantizedLinear":
        """The layer quantised on the device of its weight. The bias is taken over as it is."""
        return cls.all_from_float([linear], group)[0]

    @classmethod
    def all_from_float(cls, linears: list[nn.Linear], group: int = 0, device=None) -> list["QuantizedLinear"]:
        """Layers that share an input, quantised into one buffer on `device`.

        They are quantised some rows at a time into their final place, so that of the float weights only those rows are
        ever on `device`.
        """
        first = linears[0]
        whole = cls(
            first.in_features, sum(linear.out_features for linear in linears), first.bias is not None,
            group=group, dtype=first.weight.dtype, device=first.weight.device if device is None else device,
        )  # fmt: skip
        layers = whole.parts([linear.out_features for linear in linears])
        for layer, linear in zip(layers, linears, strict=True):
            for begin in range(0, layer.out_features, max(1, CHUNK // layer.in_features)):
                rows = slice(begin, begin + max(1, CHUNK // layer.in_features))
                weight = cls.quantize_weight(linear.weight.detach()[rows].to(whole.weight.device), group)
                layer.weight.data[rows].copy_(weight.values)
                layer.scale.data[rows].copy_(weight.scales)
            if layer.bias is not None:
                layer.bias.data.copy_(linear.bias)
        return layers

    @classmethod
    def quantize_weight(cls, weight: torch.Tensor, group: int = 0) -> Quantized:
        """A weight (N, K) with a scale for each output, computed in PyTorch: the same bits on every device."""
        return quantize_rows_torch(weight, cls.eight_bit, group, gelu=False)

    @staticmethod
    def merged(layers: list["QuantizedLinear"], device=None) -> "QuantizedLinear":
        """Concatenate layers that share an input into one layer on `device`.

        The originals' parameters become views of the new buffer, so no weight is stored twice. If they are already
        adjacent in one buffer, nothing is copied. Raises QuantizationError for layers of different kinds or inputs.
        """
        first = layers[0]
        if len({(type(layer), layer.in_features, layer.group, layer.bias is None) for layer in layers}) != 1:
            raise QuantizationError(f"only layers of one kind and one input can be merged: {layers}")
        weight = Quantized(pack(layers, "weight", device), pack(layers, "scale", device))
        bias = None if first.bias is None else pack(layers, "bias", device)
        return first._from_parameters(weight, bias, first.group, first.dtype)

    def parts(self, counts: list[int]) -> list["QuantizedLinear"]:
        """Layers of `counts` outputs each, in this order, whose parameters are views of this layer's."""
        weights = map(Quantized, self.weight.data.split(counts), self.scale.data.split(counts))
        biases = [None] * len(counts) if self.bias is None else self.bias.data.split(counts)
        return [self._from_parameters(weight, bias, self.group, self.dtype) for weight, bias in zip(weights, biases, strict=True)]

    @property
    def input_format(self) -> tuple[torch.dtype, int]:
        """(dtype, rotation's group) of the rows this layer reads: layers of one format can share `Quantized` rows."""
        return self.eight_bit, self.group

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results for inputs that come quantised."""
        return self._float if self.bias is None else self.bias.dtype

    def quantize(self, x: torch.Tensor, gelu: bool = False) -> Quantized:
        """Rows x (R, K) in this layer's input format. `gelu` (tanh form) is applied to x before."""
        return quantize_rows(x, self.eight_bit, self.group, gelu)

    def forward(self, x: torch.Tensor | Quantized, gelu: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
        """(..., N) in x's dtype, or (R, N) in the bias's dtype for `Quantized` rows. `gelu` (tanh form) follows the sum.

        `out`: where to write, contiguous (R, N) of that dtype. Raises QuantizationError for another width than K.
        """
        already = isinstance(x, Quantized)
        shape, dtype = ((len(x.scales),), self.dtype) if already else (x.shape[:-1], x.dtype)
        if not already:
            if x.shape[-1] != self.in_features:
                raise QuantizationError(f"the input is {tuple(x.shape)}. Allowed: (..., {self.in_features}).")
            x = self.quantize(x.reshape(-1, self.in_features).contiguous())
        if out is None:
            out = torch.empty(len(x.scales), self.out_features, dtype=dtype, device=x.values.device)
        if len(x.scales):
            choice = self.choice(len(x.scales), out.dtype)
            self.multiply(x, choice.backend, choice.config, out, gelu)
        return out.view(*shape, self.out_features)

    def choice(self, rows: int, dtype: torch.dtype) -> Choice:
        """What runs for this number of rows and results of `dtype`: what is forced, else the fastest (see `Choices`).

        Raises QuantizationError if the forced backend cannot run here.
        """
        device = self.weight.device
        possible = tuple(self.backends(device, dtype, rows))
        if self.forced is not None and self.forced not in possible:
            raise QuantizationError(f'the backend "{self.forced}" was forced. Possible here: {", ".join(possible)}.')
        backends = (self.forced,) if self.forced else possible
        if device.type != "cuda":
            return Choice(backends[0], None, "the only one on a CPU")
        config = CANDIDATES[0] if backends[0] == "triton" else None
        unmeasured = Choice(backends[0], config, "not measured: the first call of this shape was recorded")
        shape = Shape(self.kind, rows, self.out_features, self.in_features)
        return self.choices.find(shape, dtype, device, backends, lambda: self.measure(rows, dtype, backends), unmeasured)

    def backends(self, device: torch.device, dtype: torch.dtype, rows: int) -> list[str]:
        """What can multiply on `device` with results of `dtype`, what should be fastest first. Never empty."""
        raise NotImplementedError

    def multiply(self, x: Quantized, backend: str, config: Config | None, out: torch.Tensor, gelu: bool) -> None:
        """The layer on rows x (R, K), R > 0, written to out (R, N), by one of `backends`; `config` is Triton's."""
        raise NotImplementedError

    @torch.no_grad()
    def measure(self, rows: int, dtype: torch.dtype, backends: tuple[str, ...]) -> Choice:
        """Time every way to compute this shape, with weights that are not in L2: a model reads each layer once a step.

        Raises RuntimeError if nothing multiplies here.
        """
        x = self.quantize(torch.randn(rows, self.in_features, device=self.weight.device, dtype=dtype))
        copies = [self] + [self.copied() for _ in range(int(min(16, COLD_BYTES // self.weight.nbytes + 1)))]
        out = torch.empty(rows, self.out_features, dtype=dtype, device=self.weight.device)
        times: dict[tuple[str, Config | None], float] = {}
        failed = {}
        for way in self._ways(rows, backends):
            try:
                times[way] = measure_us([functools.partial(layer.multiply, x, *way, out, False) for layer in copies])
            except Exception as error:  # too much shared memory, or a form that this GPU or this Triton lacks
                failed[way] = error
        if not times:
            raise RuntimeError(f"nothing multiplies {rows} x {tuple(self.weight.shape)} here: {failed}")
        best = min(times, key=times.__getitem__)
        text = f"{times[best]:.1f} us for {rows} rows"
        backend, config = best
        for other in dict.fromkeys(b for b, _ in times if b != backend):
            text += f"; {other} {min(t for (b, _), t in times.items() if b == other):.1f} us"
        return Choice(backend, config, f"measured here: {text}" + (f" ({config})" if config else ""))

    def _ways(self, rows: int, backends: tuple[str, ...]) -> list[tuple[str, Config | None]]:
        configs = [config for config in CANDIDATES if fits(config, row_bucket(rows), self.weight.device)]
        return [(b, c) for b in backends for c in (configs if b == "triton" else [None])]

    def copied(self) -> "QuantizedLinear":
        """The layer with a weight of its own, for measurements; scale and bias are shared."""
        return self._from_parameters(Quantized(self.weight.data.clone(), self.scale.data), self.bias, self.group, self.dtype)

    @classmethod
    def _from_parameters(
        cls, weight: Quantized, bias: torch.Tensor | None, group: int, dtype: torch.dtype
    ) -> "QuantizedLinear":
        """A layer of these parameters, without a copy; its results are of `dtype`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        (made.out_features, made.in_features), made.group, made._float = weight.values.shape, group, dtype
        made._fill(weight, bias)
        return made

    def _fill(self, weight: Quantized, bias: torch.Tensor | None) -> None:
        self.weight, self.scale = nn.Parameter(weight.values, False), nn.Parameter(weight.scales, False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def _apply(self, fn, recurse=True):
        """`to`, `cuda` and similar methods move the 8-bit weight and its scale, but must not change their dtypes."""
        before = {name: getattr(self, name).data for name in ("weight", "scale")}
        super()._apply(fn, recurse)
        for name, data in before.items():
            moved = getattr(self, name)
            if moved.dtype != data.dtype:
                moved.data = data.to(moved.device)
        self._float = fn(torch.empty(0, dtype=self._float)).dtype
        return self

    def extra_repr(self) -> str:
        """What `print` says of the layer."""
        rotated = f", rotated by {self.group}" if self.group else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{rotated}"


def refusal(inputs: int, outputs: int, group: int = 0) -> str | None:
    """Why a layer of this size cannot be quantised, or None."""
    if inputs % MULTIPLE or outputs % MULTIPLE:
        return f"{inputs} inputs and {outputs} outputs. Allowed: multiples of {MULTIPLE}."
    if group not in GROUPS or (group and inputs % group):
        return f"{inputs} inputs cannot be rotated by {group}. Allowed: {GROUPS} that divide them."
    return None
