"""Two quantised layers in one launch: one for the first rows and one for the others."""

import functools

import torch

from quantization import products
from quantization.choices import PAIRS, Choice, Choices, Shape
from quantization.layer import CHUNK, COLD_BYTES, QuantizedLinear
from quantization.rows import Quantized, empty_rows
from quantization.tiles import PAIR_CANDIDATES, Config, fits
from quantization.timing import measure_us


class QuantizedPair:
    """Two layers of one shape and one kind as one product: the first for the first rows, the second for the rest.

    Each is given as a list of layers that share an input, whose outputs are concatenated. All parameters become views of
    one buffer, so that one launch can read both weights; the layers themselves still run. Whether one launch ("joint") or
    two ("separate") are faster is looked up or measured (`choice`). Where a backend is forced there are always two.
    """

    choices = Choices(PAIRS)  # for all pairs: those of one shape share what was measured

    def __init__(self, first: list[QuantizedLinear], second: list[QuantizedLinear]):
        self.whole = QuantizedLinear.merged([*first, *second])
        if self.whole.weight.is_cuda:
            torch.cuda.empty_cache()  # the freed pieces are too small for the next pair: they would pile up
        self.out_features = self.whole.out_features // 2
        self.parts = tuple(self.whole.parts([self.out_features] * 2))

    @staticmethod
    def possible(first: list, second: list) -> bool:
        """Whether the layers can be a pair: all quantised, of one kind, input and dtype, with equal numbers of outputs."""
        layers = [*first, *second]
        if not all(isinstance(layer, QuantizedLinear) for layer in layers):
            return False
        formats = {(type(layer), layer.in_features, layer.group, layer.bias is None, layer.dtype) for layer in layers}
        return len(formats) == 1 and sum(m.out_features for m in first) == sum(m.out_features for m in second)

    def quantize(self, x: torch.Tensor, gelu: bool = False) -> Quantized:
        """Rows x (R, K) in the layers' input format. `gelu` (tanh form) is applied to x before."""
        return self.whole.quantize(x, gelu)

    @property
    def norm_output_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype the norm before these layers may write; None if they need a rotation, which only `quantize` does."""
        return None if self.whole.group else self.whole.eight_bit

    @functools.cached_property
    def limits(self) -> torch.Tensor:
        """float32 (2, 2), what `products.multiply` bounds results by."""
        norms = []
        for m in self.parts:  # some rows at a time: in float32 a weight is four times as large
            rows = m.weight.split(max(1, CHUNK // m.in_features))
            norms.append((torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in rows]) * m.scale).max())
        biases = [m.scale.new_zeros(()) if m.bias is None else m.bias.abs().max().float() for m in self.parts]
        return torch.stack([torch.stack(pair) for pair in zip(norms, biases, strict=True)])

    def __call__(self, x: torch.Tensor | Quantized, first: int, gelu: bool = False) -> torch.Tensor:
        """(R, N) for rows x (R, K): the first layer on the `first` rows, the second on the rest. `gelu` (tanh form) follows."""
        x = x if isinstance(x, Quantized) else self.quantize(x)
        rows, dtype = len(x.scales), self.whole.dtype
        out = torch.empty(rows, self.out_features, dtype=dtype, device=x.values.device)
        choice = self.choice(rows, first, dtype)
        if choice.backend == "joint":
            assert choice.config is not None
            self.multiply(x, first, out, choice.config, gelu)
            return out
        return self._separately(x, first, out, gelu)

    def then(self, following: "QuantizedPair", x: torch.Tensor | Quantized, first: int) -> Quantized:
        """GELU(self(x)) in the input format of `following`.

        It is quantised inside the product kernel if `x` brings norms and `following` reads e4m3.
        """
        eight_bit = following.norm_output_dtype
        if isinstance(x, Quantized) and len(x.scales) and x.norms is not None and eight_bit == torch.float8_e4m3fn:
            choice = self.choice(len(x.scales), first, self.whole.dtype)
            if choice.config is not None and eight_bit is not None:
                out = empty_rows(len(x.scales), self.out_features, eight_bit, x.values.device)
                self.multiply(x, first, out, choice.config, True, self.limits)
                return out
        return following.quantize(self(x, first), gelu=True)

    def choice(self, rows: int, first: int, dtype: torch.dtype) -> Choice:
        """Backend "joint" or "separate". `config` is the best for a joint launch, None where there cannot be one."""
        whole = self.whole
        device = whole.weight.device
        if device.type != "cuda" or "triton" not in whole.backends(device, dtype, rows):
            return Choice("separate", None, "one product for both needs the Triton kernel")
        if whole.forced is not None:
            return Choice("separate", None, f'the backend "{whole.forced}" was forced')
        unmeasured = Choice("separate", None, "not measured: the first call of this shape was recorded")
        shape = Shape(whole.kind, rows, self.out_features, whole.in_features)
        backends = ("joint", "separate")
        return self.choices.find(shape, dtype, device, backends, lambda: self.measure(rows, first, dtype), unmeasured)

    def multiply(
        self,
        x: Quantized,
        first: int,
        out: torch.Tensor | Quantized,
        config: Config,
        gelu: bool,
        limits: torch.Tensor | None = None,
    ) -> None:
        """Both products in one launch, written to `out`; see `products.multiply`."""
        whole = self.whole
        weight = Quantized(whole.weight, whole.scale)
        products.multiply(x, weight, whole.bias, out, config, gelu, first, limits)

    def _separately(self, x: Quantized, first: int, out: torch.Tensor, gelu: bool) -> torch.Tensor:
        for layer, rows in zip(self.parts, (slice(0, first), slice(first, None)), strict=True):
            if len(out[rows]):
                layer(x.part(rows), gelu, out=out[rows])
        return out

    @torch.no_grad()
    def measure(self, rows: int, first: int, dtype: torch.dtype) -> Choice:
        """Time one launch, in the ways of `PAIR_CANDIDATES`, against two, with weights that are not in L2."""
        device = self.whole.weight.device
        x = self.quantize(torch.randn(rows, self.whole.in_features, device=device, dtype=dtype))
        out = torch.empty(rows, self.out_features, dtype=dtype, device=device)
        more = int(min(16, COLD_BYTES // self.whole.weight.nbytes + 1))
        pairs = [self] + [QuantizedPair(*([part.copied()] for part in self.parts)) for _ in range(more)]
        separate = measure_us([functools.partial(pair._separately, x, first, out, False) for pair in pairs])
        times: dict[Config, float] = {}
        failed = {}
        for config in PAIR_CANDIDATES:
            if fits(config, rows, device):
                calls = [functools.partial(pair.multiply, x, first, out, config, False) for pair in pairs]
                try:
                    times[config] = measure_us(calls)
                except Exception as error:  # as in `QuantizedLinear.measure`
                    failed[config] = error
        if not times:
            return Choice("separate", None, f"no way to multiply both in one launch works here: {failed}")
        best = min(times, key=times.__getitem__)
        reason = f"measured here: joint {times[best]:.1f} us ({best}), separate {separate:.1f} us for {rows} rows"
        return Choice("joint" if times[best] < separate else "separate", best, reason)
