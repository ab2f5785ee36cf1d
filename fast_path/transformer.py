"""The transformer of Qwen-Image written for one GPU and few rows: the stock model's weights, a third of its kernels.

At 256x256 a frame has some 500 image tokens and 220 of text, and every block reads 450 MB of weights for them. What
costs is, in this order: launching kernels, reading weights for the text's few rows, and passing activations through
memory between operations that do almost nothing. So here
- a block is twelve kernels: four matrix products for each stream, with bias and GELU inside them, one attention, and
  three small fused operations (see `kernels`) over the rows of both streams; q, k and v are one product, written where
  attention reads them;
- the last block computes what the output reads: noise tokens. Its text and its references end as keys and values;
- times are looked up (`modulation`), rotary tables are made once for each layout, and a whole step is one CUDA graph.

Running the text's products beside the image's on a second GPU stream gained nothing on an H200: each fills the chip.

The weights are the loaded model's own. q, k and v of each stream are moved into one piece of memory, and the layers'
parameters become views of it, so that the stock model still runs on them and nothing is held twice.
"""

import math
import warnings
import weakref
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, QwenEmbedRope
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast_path import attention, kernels
from fast_path.graphs import Graphs
from fast_path.kernels import Places, qk_norm_rope, residual_norm_modulate, residual_norm_modulate_quantize
from fast_path.modulation import Modulations
from fast_path.unsupported import UnsupportedError
from pipeline.content_cache import ContentCache
from quantization.layer import QuantizedLinear
from quantization.pair import QuantizedPair
from quantization.rows import Quantized
from quantization.side_by_side import pack


class Sample(NamedTuple):
    """One prediction that is wanted."""

    latents: torch.Tensor  # (B, N, C)
    conditions: torch.Tensor  # (B, M, C), the references
    prompt_embeds: torch.Tensor  # (B, T, J), unpadded
    shapes: tuple[tuple[int, int, int], ...]  # (frames, rows, columns) of tokens: the output's, then each reference's
    time: float  # the schedule's timestep
    times: tuple[float, ...] = ()  # all that it will ask for: what a time costs to prepare is paid for all at once


class FusedTransformer:
    """`velocities` are the stock model's outputs for the noise tokens, up to rounding.

    Raises UnsupportedError for a model whose layers are not those that are written down here, and on CUDA without Triton.
    """

    def __init__(self, transformer: QwenImageTransformer2DModel, eight_bit_attention: bool = False):
        _check(transformer)
        self.transformer = transformer
        self.eight_bit_attention = eight_bit_attention  # see `attention`; may be changed between two forwards
        self.modulations = Modulations(transformer)
        self.graphs = Graphs()
        self.token_caches: weakref.WeakSet = weakref.WeakSet()  # see `reuse`: they too hold what weights have made
        self.attention_backends: dict[tuple, SDPBackend] = {}
        self._ropes, self._layouts = ContentCache(32), ContentCache(32)
        first = transformer.transformer_blocks[0]
        self.heads, self.width = first.num_attention_heads, first.dim
        self.eps, self.qk_eps = first.img_norm1.eps, first.attn.norm_q.eps
        self.blocks = [_Block(block) for block in transformer.transformer_blocks]

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    def velocity(self, *sample, **named) -> torch.Tensor:
        """(B, N, C): of one sample, given by its fields."""
        return self.velocities([Sample(*sample, **named)])[0]

    @torch.no_grad()
    def velocities(self, samples: list[Sample]) -> list[torch.Tensor]:
        """(B, N, C) of each sample, in one forward: the products are over all rows, each picture attends to itself only.

        Samples may differ in everything: sizes, references, lengths of prompts, times. So nothing is padded or masked.
        """
        key = tuple((s.shapes, *s.prompt_embeds.shape[:2]) for s in samples)
        layout = self._layouts.get(key, lambda: self._layout(key))
        tables = [table for s in samples for table in self.modulations.get(s.time, s.times)]
        step = partial(self._step, layout)
        found = self.graphs.run(("velocities", key, self.eight_bit_attention), step, *tables, *(t for s in samples for t in s[:3]))
        return [found] if len(samples) == 1 else list(found)

    def weights_changed(self, layers: set[str]) -> None:
        """To be told when the named layers' weights were changed in place: what was computed from them is forgotten."""
        if any("_mod." in name or name.startswith(("time_text_embed", "norm_out")) for name in layers):
            self.modulations.clear()
        for block in self.blocks:
            block.check()
            block.scale_values()
        for cache in self.token_caches:
            cache.clear()

    def _step(self, layout: "_Layout", *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        count = len(tensors) // 5
        tables, inputs = tensors[: 2 * count], tensors[2 * count :]
        samples = [inputs[i : i + 3] for i in range(0, 3 * count, 3)]
        words = torch.cat([embeds.flatten(0, 1) for _, _, embeds in samples])
        pictures = [torch.cat([latents, conditions], 1).flatten(0, 1) for latents, conditions, _ in samples]
        modulation = tables[0] if count == 1 else torch.cat(tables[::2], 1)
        y = self.run(_Joint(self, layout), words, torch.cat(pictures), modulation, torch.stack(tables[1::2]))
        parts = y.split([latents.shape[0] * latents.shape[1] for latents, _, _ in samples])
        parts = tuple(part.view(latents.shape) for part, (latents, _, _) in zip(parts, samples, strict=True))
        return parts[0] if count == 1 else parts

    def run(self, attention: "_Joint", words: torch.Tensor | None, pictures: torch.Tensor, modulation, out) -> torch.Tensor:
        """All blocks over rows of text, (T, J) or none, and of pictures, (R, C): (N, C) for the rows that are noise.

        `attention` knows what the rows are (`text` of them text; `kinds`, and `noise` that are noise), and computes what
        they hear. modulation (L, K, 6, D), a row for each kind; out (samples, 2, D).
        """
        model, text = self.transformer, attention.text
        x = model.img_in(pictures)
        if words is not None:
            x = torch.cat([model.txt_in(model.txt_norm(words)), x])
        kinds = attention.kinds
        h = self._norm(self.blocks[0].reads_qkv, x, None, None, modulation[0, :, 0], modulation[0, :, 1], kinds)
        for i, block in enumerate(self.blocks[:-1]):
            now, then = modulation[i].unbind(1), modulation[i + 1].unbind(1)  # six of (K, D) each
            y = block.out(attention.hear(i, block, h), text)
            h = self._norm(block.reads_mlp, x, y, now[2], now[3], now[4], kinds)
            y = block.mlp(h, text)
            h = self._norm(self.blocks[i + 1].reads_qkv, x, y, now[5], then[0], then[1], kinds)
        # The last block: keys and values of all, the rest for the noise alone.
        block, now, i = self.blocks[-1], modulation[-1].unbind(1), len(self.blocks) - 1
        heard = attention.hear(i, block, h, only_noise=True)
        x, kinds = x[attention.noise].contiguous(), kinds[attention.noise].contiguous()
        h = self._norm(block.reads_mlp, x, block.out(heard, 0), now[2], now[3], now[4], kinds)
        y = block.mlp(h, 0)
        shift, scale = (out[:, j : j + 1].expand(-1, 3, -1).reshape(-1, self.width) for j in range(2))
        h = residual_norm_modulate(x, y, now[5], shift, scale, kinds, model.norm_out.norm.eps)
        return model.proj_out(h)

    def _norm(self, reads: torch.dtype | None, x, y, gate, shift, scale, kinds: torch.Tensor) -> torch.Tensor | Quantized:
        """`residual_norm_modulate`, for layers that read 8-bit rows straight into those."""
        if reads is None:
            return residual_norm_modulate(x, y, gate, shift, scale, kinds, self.eps)
        return residual_norm_modulate_quantize(x, y, gate, shift, scale, kinds, self.eps, reads)

    def qkv(self, block: "_Block", h: torch.Tensor | Quantized, text: int) -> torch.Tensor:
        """(R, 3, H, d), queries and keys not yet normed and turned."""
        return block.qkv(h, text).view(-1, 3, self.heads, self.width // self.heads)

    def norm_rope(
        self, block: "_Block", qkv, kinds, positions, rope: tuple[torch.Tensor, torch.Tensor], to: Places | None, move_q=True
    ) -> None:
        """`qk_norm_rope` with the block's norms, or the same to 8 bits if that is what `to` holds."""
        given = (qkv, kinds, positions, block.norms, *rope, self.qk_eps)
        if to is not None and to.k.dtype == attention.EIGHT:
            attention.norm_rope_quantize(*given, block.scales, to, move_q)
        else:
            qk_norm_rope(*given, to if move_q else to._replace(q=None))

    def attend(self, block: "_Block", q, k, v, alone: bool = False) -> torch.Tensor | Quantized:
        """(B * R, D) from queries (B, R, H, d), keys and values (B, S, H, d).

        If they stand `alone`, nothing being put beside or taken from the result, it may be in 8 bits, as its layer reads it.
        """
        if k.dtype == attention.EIGHT:
            if alone and block.reads_heard == attention.EIGHT:
                return attention.attend_fp8(q, k, v, block.scales, eight_bit=True)
            return attention.attend_fp8(q, k, v, block.scales).to(block.norms.dtype).flatten(0, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not q.is_cuda:
            heard = F.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel(self._backend(q, k, v)):
                heard = F.scaled_dot_product_attention(q, k, v)
        return heard.transpose(1, 2).flatten(2).flatten(0, 1)

    def _backend(self, q, k, v) -> SDPBackend:
        """Chosen by measurement for lengths of the same order: a prompt of one word more measures nothing anew."""
        key = (q.shape[0], q.shape[2].bit_length(), k.shape[2].bit_length(), q.dtype)
        if key not in self.attention_backends:
            self.attention_backends[key] = _fastest_backend(q, k, v)
        return self.attention_backends[key]

    def rope(self, shapes, text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 (S, d / 2), text first."""

        def make():
            image, words = self.transformer.pos_embed([list(shapes)], max_txt_seq_len=text, device=self.device)
            both = torch.cat([words, image])
            return both.real.contiguous(), both.imag.contiguous()

        return self._ropes.get((shapes, text), make)

    def _layout(self, key: tuple) -> "_Layout":
        """Of samples of (shapes, B, T)."""
        kinds, positions, places, noise, runs = ([], []), ([], []), ([], []), [], []
        begin = image = tables = 0
        texts = sum(batch * text for _, batch, text in key)
        for n, (shapes, batch, text) in enumerate(key):
            tokens = [math.prod(shape) for shape in shapes]
            length = text + sum(tokens)
            runs.append((begin, batch, length, text, tokens[0]))
            for _ in range(batch):
                kinds[0].append(torch.full((text,), 3 * n))
                kinds[1].append(torch.full((length - text,), 3 * n + 2).index_fill_(0, torch.arange(tokens[0]), 3 * n + 1))
                positions[0].append(tables + torch.arange(text))
                positions[1].append(tables + torch.arange(text, length))
                places[0].append(begin + torch.arange(text))
                places[1].append(begin + torch.arange(text, length))
                noise.append(texts + image + torch.arange(tokens[0]))
                begin, image = begin + length, image + length - text
            tables += length
        rows = [torch.cat(a + b).int().to(self.device) for a, b in (kinds, positions, places)]
        ropes = [self.rope(shapes, text) for shapes, _, text in key]
        cos, sin = (torch.cat(t) for t in zip(*ropes, strict=True))
        return _Layout(texts, *rows, torch.cat(noise).to(self.device), cos, sin, runs)


class _Layout(NamedTuple):
    """Of the rows of a forward, all text before all pictures; in attention each sample's text stands before its picture."""

    text: int
    kinds: torch.Tensor  # int32 (R,): see `kernels`
    positions: torch.Tensor  # int32 (R,), into cos and sin
    places: torch.Tensor  # int32 (R,), the rows' places in attention
    noise: torch.Tensor  # int64, the rows that are noise
    cos: torch.Tensor
    sin: torch.Tensor
    runs: list[tuple[int, int, int, int, int]]  # in attention: where a sample begins, its batch, length, text, noise


class _Joint:
    """Attention of each sample to itself."""

    def __init__(self, fused: FusedTransformer, layout: _Layout):
        self._fused, self._layout = fused, layout
        self.text, self.kinds, self.noise = layout.text, layout.kinds, layout.noise
        self._alone = len(layout.runs) == 1 and layout.runs[0][1] == 1  # then the rows are in attention's order already

    def hear(self, i: int, block: "_Block", h: torch.Tensor | Quantized, only_noise=False) -> torch.Tensor | Quantized:
        """(R, D), or for the noise alone (N, D)."""
        fused, layout = self._fused, self._layout
        joint = qkv = fused.qkv(block, h, self.text)
        to = None
        if fused.eight_bit_attention or not self._alone:
            joint = torch.empty_like(qkv, dtype=attention.EIGHT if fused.eight_bit_attention else qkv.dtype)
            to = Places(*joint.unbind(1), None if self._alone else layout.places)
        fused.norm_rope(block, qkv, self.kinds, layout.positions, (layout.cos, layout.sin), to)
        heard = []
        for begin, batch, length, text, noise in layout.runs:
            q, k, v = joint[begin : begin + batch * length].view(batch, length, 3, *joint.shape[2:]).unbind(2)
            q = q[:, text : text + noise] if only_noise else q
            heard.append(fused.attend(block, q, k, v, self._alone))
        heard = heard[0] if len(heard) == 1 else torch.cat(heard)
        return heard if self._alone or only_noise else heard[layout.places]


class _Block:
    """The layers of one block, for rows that begin with `text` rows of text. q, k and v share memory from here on."""

    def __init__(self, block):
        attn = block.attn
        self._qkv = _pair([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], [attn.to_q, attn.to_k, attn.to_v])
        norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
        self.norms = torch.stack([norm.weight.data for norm in norms]).view(2, 2, -1)  # [image or text][q or k]
        self._values = (attn.to_v, attn.add_v_proj)
        q, k = (attention.qk_scale(self.norms[:, i]) for i in range(2))
        values = torch.empty(attn.heads, device=self.norms.device)
        self.scales = attention.Scales(q, k, values, attention.heard_scale(values))
        self.scale_values()
        self._out = _pair([attn.to_add_out], [attn.to_out[0]])
        self._up = _pair([block.txt_mlp.net[0].proj], [block.img_mlp.net[0].proj])
        self._down = _pair([block.txt_mlp.net[2]], [block.img_mlp.net[2]])
        self.reads_qkv, self.reads_heard, self.reads_mlp = _reads(self._qkv), _reads(self._out), _reads(self._up)

    def qkv(self, h: torch.Tensor, text: int) -> torch.Tensor:
        """(R, D) -> (R, 3 D)"""
        return _by_two(self._qkv, h, text)

    def check(self) -> None:
        """RuntimeError if a layer's weight no longer is the part of the merged one that it was."""
        for merged in self._qkv if isinstance(self._qkv, tuple) else ():
            if isinstance(merged, _Merged):
                merged.check()

    @torch.no_grad()
    def scale_values(self) -> None:
        """What 8-bit values are scaled by, from the weights that make them; in place, where recordings read it."""
        norms = torch.stack([_row_norms(layer) for layer in self._values]).amax(0)
        self.scales.v.copy_(attention.value_scales(norms, len(self.scales.v)))
        self.scales.heard.copy_(attention.heard_scale(self.scales.v))

    def out(self, heard: torch.Tensor | Quantized, text: int) -> torch.Tensor:
        """(R, D) -> (R, D)"""
        return _by_two(self._out, heard, text)

    def mlp(self, h: torch.Tensor, text: int) -> torch.Tensor:
        """(R, D) -> (R, D). Where the rows between are quantised, the GELU is part of that and costs nothing."""
        if isinstance(self._up, QuantizedPair) and isinstance(self._down, QuantizedPair):
            return self._down(self._up.then(self._down, h, text), text)
        late = _alike(self._down)
        return _by_two(self._down, _by_two(self._up, h, text, gelu=not late), text, gelu_before=late)


class _Merged:
    """Linear layers of one input as one; the layers' parameters become views of its memory."""

    def __init__(self, layers: list[nn.Linear]):
        self._layers = layers
        self.weight, self.bias = pack(layers, "weight"), pack(layers, "bias")

    def check(self) -> None:
        whole = self.weight.untyped_storage().data_ptr()
        if any(layer.weight.untyped_storage().data_ptr() != whole for layer in self._layers):
            raise RuntimeError(
                "a layer's weight was replaced, not changed in place: the fast path has to be put in anew"
            )


def _pair(text: list, image: list) -> QuantizedPair | tuple:
    """The text's layers and the image's, each side by side: one product for both, or one each."""
    if QuantizedPair.possible(text, image):
        return QuantizedPair(text, image)
    return tuple(_merged(layers) if len(layers) > 1 else layers[0] for layers in (text, image))


def _row_norms(layer: nn.Linear | QuantizedLinear) -> torch.Tensor:
    """float32 (N,): the Euclidean norms of the weight's rows. A rotation changes none."""
    norms = torch.linalg.vector_norm(layer.weight.float(), dim=1)
    return norms * layer.scale if isinstance(layer, QuantizedLinear) else norms


def _merged(layers: list) -> "_Merged | QuantizedLinear":
    return QuantizedLinear.merged(layers) if isinstance(layers[0], QuantizedLinear) else _Merged(layers)


def _alike(layers: QuantizedPair | tuple) -> bool:
    """Whether one quantisation of rows serves both layers."""
    if isinstance(layers, QuantizedPair):
        return True
    return all(isinstance(layer, QuantizedLinear) for layer in layers) and layers[0].input_format == layers[1].input_format


def _reads(layers: QuantizedPair | tuple) -> torch.dtype | None:
    """The 8-bit dtype that the norm before may write for both layers, or None."""
    if isinstance(layers, QuantizedPair):
        return layers.norm_output_dtype
    return layers[0].eight_bit if _alike(layers) and not layers[0].group else None


def _by_two(
    layers: QuantizedPair | tuple, x: torch.Tensor | Quantized, text: int, gelu=False, gelu_before=False
) -> torch.Tensor:
    """The first layer on the first `text` rows, the second on the others, into one tensor."""
    if isinstance(layers, QuantizedPair):
        return layers(layers.quantize(x, gelu_before) if gelu_before else x, text, gelu)
    if not isinstance(x, Quantized) and _alike(layers):
        x = layers[0].quantize(x, gelu_before)
    quantized = isinstance(x, Quantized)
    like = layers[0].bias if quantized else x
    y = like.new_empty(len(x.values if quantized else x), layers[0].weight.shape[0])
    for layer, rows in zip(layers, (slice(0, text), slice(text, None)), strict=True):
        part = x.part(rows) if quantized else x[rows]
        if len(y[rows]) == 0:
            continue
        if isinstance(layer, QuantizedLinear):
            layer(part, gelu, out=y[rows])
        elif gelu and x.is_cuda:  # in the matrix product's epilogue, which has the tanh form, as the model has
            torch._addmm_activation(layer.bias, part, layer.weight.t(), use_gelu=True, out=y[rows])
        else:
            torch.addmm(layer.bias, part, layer.weight.t(), out=y[rows])
            if gelu:
                y[rows] = F.gelu(y[rows], approximate="tanh")
    return y


@torch.no_grad()
def _fastest_backend(q, k, v) -> SDPBackend:
    """The attention that takes the least time for this shape, of those that torch has for it here."""
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of each reason why a backend is not for this shape
                for _ in range(2):
                    F.scaled_dot_product_attention(q, k, v)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(5):
                    F.scaled_dot_product_attention(q, k, v)
                end.record()
                end.synchronize()
                times[backend] = begin.elapsed_time(end)
        except RuntimeError:  # not for this shape or this GPU
            continue
    return min(times, key=times.get) if times else SDPBackend.MATH


def _check(transformer) -> None:
    """UnsupportedError unless every layer is of the kind that is written down above, and on CUDA without Triton."""
    if type(transformer) is not QwenImageTransformer2DModel:
        raise UnsupportedError(f"the transformer is a {type(transformer).__name__}")
    if transformer.device.type == "cuda" and kernels.triton is None:
        raise UnsupportedError("its kernels need Triton, which is not installed")
    if hasattr(transformer, "_hf_hook"):
        raise UnsupportedError("the transformer is offloaded: its weights come and go")
    config = transformer.config
    if (
        config.guidance_embeds
        or config.get("use_additional_t_cond")
        or type(transformer.pos_embed) is not QwenEmbedRope
    ):
        raise UnsupportedError("this variant of the transformer is not written down here")
    if config.attention_head_dim & (config.attention_head_dim - 1):
        raise UnsupportedError(
            f"heads of {config.attention_head_dim} numbers: only powers of two are written down here"
        )
    for block in transformer.transformer_blocks:
        if type(block.attn.processor) is not QwenDoubleStreamAttnProcessor2_0:
            raise UnsupportedError(f"the attention is a {type(block.attn.processor).__name__}")
    wrapped = {type(m) for m in transformer.modules() if isinstance(m, nn.Linear) or hasattr(m, "base_layer")}
    if wrapped - {nn.Linear}:
        raise UnsupportedError(f"layers of the kind {', '.join(sorted(t.__name__ for t in wrapped - {nn.Linear}))}")
