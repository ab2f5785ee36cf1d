"""The layers of one transformer block, for rows of two streams: the first rows are text, the others image.

Each stream has layers of its own. Where both are quantised alike they are one launch (`QuantizedPair`), else one product
each (`SeparateStreams`); both write into one tensor. q, k and v of a stream are one product: their weights are packed into
one buffer, of which the loaded layers' parameters become views, so that the stock model still runs on them and no weight is
stored twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fast_path.attention import Scales, output_scale, qk_scale, value_scales
from quantization.layer import QuantizedLinear
from quantization.pair import QuantizedPair
from quantization.rows import Quantized
from quantization.side_by_side import pack


class Block:
    """The layers of a `QwenImageTransformerBlock`; the first `text` of the R rows that they take are text.

    `qkv_input_dtype`, `out_input_dtype`, `mlp_input_dtype`: the 8-bit dtype of `Quantized` rows that these layers take from
    the operation before them, or None if they want rows in the model's dtype.
    """

    def __init__(self, block: Any):
        attn = block.attn
        self._qkv = _streams([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], [attn.to_q, attn.to_k, attn.to_v])
        norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
        self.norms = torch.stack([norm.weight.data for norm in norms]).view(2, 2, -1)  # [image or text][q or k]
        self._values = (attn.to_v, attn.add_v_proj)
        q, k = (qk_scale(self.norms[:, i]) for i in range(2))
        values = torch.empty(attn.heads, device=self.norms.device)
        self.scales = Scales(q, k, values, output_scale(values))
        self.scale_values()
        self._out = _streams([attn.to_add_out], [attn.to_out[0]])
        self._up = _streams([block.txt_mlp.net[0].proj], [block.img_mlp.net[0].proj])
        self._down = _streams([block.txt_mlp.net[2]], [block.img_mlp.net[2]])
        self.qkv_input_dtype, self.out_input_dtype = self._qkv.norm_output_dtype, self._out.norm_output_dtype
        self.mlp_input_dtype = self._up.norm_output_dtype

    def qkv(self, h: torch.Tensor | Quantized, text: int) -> torch.Tensor:
        """(R, D) -> (R, 3 D)"""
        return self._qkv(h, text)

    def out(self, attended: torch.Tensor | Quantized, text: int) -> torch.Tensor:
        """(R, D) -> (R, D)"""
        return self._out(attended, text)

    def mlp(self, h: torch.Tensor | Quantized, text: int) -> torch.Tensor:
        """(R, D) -> (R, D). Where the rows in between are quantised, the GELU is part of that and costs nothing."""
        up, down = self._up, self._down
        if isinstance(up, QuantizedPair) and isinstance(down, QuantizedPair):
            return down(up.then(down, h, text), text)
        if isinstance(down, QuantizedPair) or down.share_input_format:
            return down(down.quantize(up(h, text), gelu=True), text)
        return down(up(h, text, gelu=True), text)

    def check(self) -> None:
        """RuntimeError if a layer's weight no longer is a view of the packed one."""
        for layer in getattr(self._qkv, "layers", ()):
            if isinstance(layer, _Packed):
                layer.check()

    @torch.no_grad()
    def scale_values(self) -> None:
        """What 8-bit values are divided by, from the weights that make them; in place, where recordings read it."""
        norms = torch.stack([_row_norms(layer) for layer in self._values]).amax(0)
        self.scales.v.copy_(value_scales(norms, len(self.scales.v)))
        self.scales.output.copy_(output_scale(self.scales.v))


class SeparateStreams:
    """The text's layer and the image's, a product each: what `QuantizedPair` is for layers that cannot be a pair."""

    def __init__(self, text: list, image: list):
        self.layers: tuple[Layer, Layer] = _one_layer(text), _one_layer(image)

    @property
    def share_input_format(self) -> bool:
        """Whether the same 8-bit rows serve both layers."""
        text, image = self.layers
        if not isinstance(text, QuantizedLinear) or not isinstance(image, QuantizedLinear):
            return False
        return text.input_format == image.input_format

    @property
    def norm_output_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype that the norm before may write for both layers, or None."""
        first = self.layers[0]
        if not isinstance(first, QuantizedLinear) or not self.share_input_format or first.group:
            return None
        return first.eight_bit

    def quantize(self, x: torch.Tensor, gelu: bool = False) -> Quantized:
        """Rows x (R, K) in the input format that both layers share. `gelu` (tanh form) is applied to x before."""
        first = self.layers[0]
        assert isinstance(first, QuantizedLinear)
        return first.quantize(x, gelu)

    def __call__(self, x: torch.Tensor | Quantized, first: int, gelu: bool = False) -> torch.Tensor:
        """(R, N) for rows x (R, K): the text's layer on the `first` rows, the image's on the rest. `gelu` (tanh form) follows."""
        if not isinstance(x, Quantized) and self.share_input_format:
            x = self.quantize(x)
        first_layer = self.layers[0]
        like = first_layer.bias if isinstance(x, Quantized) else x
        assert like is not None
        out = like.new_empty(len(x.values if isinstance(x, Quantized) else x), first_layer.weight.shape[0])
        for layer, rows in zip(self.layers, (slice(0, first), slice(first, None)), strict=True):
            if len(out[rows]):
                _write(layer, x.part(rows) if isinstance(x, Quantized) else x[rows], out[rows], gelu)
        return out


class _Packed:
    """Linear layers of one input as one; the layers' parameters become views of its buffers."""

    def __init__(self, layers: list[nn.Linear]):
        self._layers = layers
        self.weight, self.bias = pack(layers, "weight"), pack(layers, "bias")

    def check(self) -> None:
        whole = self.weight.untyped_storage().data_ptr()
        if any(layer.weight.untyped_storage().data_ptr() != whole for layer in self._layers):
            raise RuntimeError(
                "a layer's weight was replaced, not changed in place: the fast path has to be enabled again"
            )


Layer = nn.Linear | _Packed | QuantizedLinear


def _streams(text: list, image: list) -> QuantizedPair | SeparateStreams:
    return QuantizedPair(text, image) if QuantizedPair.possible(text, image) else SeparateStreams(text, image)


def _one_layer(layers: list) -> Layer:
    """Layers of one input as one."""
    if len(layers) == 1:
        return layers[0]
    return QuantizedLinear.merged(layers) if isinstance(layers[0], QuantizedLinear) else _Packed(layers)


def _write(layer: Layer, x: torch.Tensor | Quantized, out: torch.Tensor, gelu: bool) -> None:
    """The layer on rows x, written to `out`; `gelu` (tanh form, as the model has it) follows."""
    if isinstance(layer, QuantizedLinear):
        layer(x, gelu, out=out)
        return
    assert not isinstance(x, Quantized)  # only 8-bit layers read those
    if gelu and x.is_cuda:  # in the matrix product's epilogue
        torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True, out=out)
    else:
        torch.addmm(layer.bias, x, layer.weight.t(), out=out)
        if gelu:
            out.copy_(F.gelu(out, approximate="tanh"))


def _row_norms(layer: nn.Linear | QuantizedLinear) -> torch.Tensor:
    """float32 (N,): the Euclidean norms of the weight's rows. A rotation changes none."""
    norms = torch.linalg.vector_norm(layer.weight.float(), dim=1)
    return norms * layer.scale if isinstance(layer, QuantizedLinear) else norms
