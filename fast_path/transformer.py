"""The transformer of Qwen-Image written for one GPU and few rows: the stock model's weights, a third of its kernels.

At 256x256 a frame has some 500 image tokens and 220 of text, and every block reads 450 MB of weights for them. What
costs is, in this order: launching kernels, reading weights for the text's few rows, and passing activations through
memory between operations that do almost nothing. So here
- a block is twelve kernels: four matrix products for each stream, with bias and GELU inside them, one attention, and
  three small fused operations (see `kernels`) over the rows of both streams; q, k and v are one product, written where
  attention reads them;
- the last block computes what the output reads: noise tokens. Its text and its references end as keys and values;
- times are looked up (`modulation`), rotary tables are made once for each layout, and a whole step is one CUDA graph.

Running the text's products on a second GPU stream while the image's run gained nothing on an H200: each fills the chip.

The weights are the loaded model's own (see `layers`).
"""

import math
import warnings
import weakref
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, QwenEmbedRope
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast_path.attention import EIGHT, attend_fp8, norm_rope_quantize
from fast_path.graphs import Graphs
from fast_path.kernels import Destinations, qk_norm_rope, residual_norm_modulate, residual_norm_modulate_quantize
from fast_path.layers import Block
from fast_path.modulation import Modulations
from fast_path.unsupported import UnsupportedError
from fast_path.watch import foreign
from pipeline.content_cache import ContentCache
from quantization.languages import triton
from quantization.rows import Quantized


class Sample(NamedTuple):
    """One prediction that is wanted."""

    latents: torch.Tensor  # (B, N, C)
    conditions: torch.Tensor  # (B, M, C), the references
    prompt_embeds: torch.Tensor  # (B, T, J), unpadded
    shapes: tuple[tuple[int, int, int], ...]  # (frames, rows, columns) of tokens: the output's, then each reference's
    time: float  # the schedule's timestep
    times: tuple[float, ...] = ()  # all that it will ask for: what a time costs to prepare is paid for all at once

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a forward reads of it, its rows in dimension 1."""
        return self.latents, self.conditions, self.prompt_embeds


class Attention(Protocol):
    """What `FusedTransformer.run` asks for: which rows a forward computes, and what they attend to.

    Rows are (R, D): text first, then noise and references in any order. Each sample attends to itself (`_Joint`), or the
    rows that changed attend to all tokens of their stream (`reuse`).
    """

    @property
    def text(self) -> int:
        """How many of the rows, from the first, are text."""
        ...

    @property
    def row_types(self) -> torch.Tensor:
        """int32 (R,): rows of the modulation's tables, see `kernels`."""
        ...

    @property
    def noise(self) -> torch.Tensor | slice:
        """Which rows are noise, in the order of the result."""
        ...

    def attend(self, i: int, block: Block, h: torch.Tensor | Quantized, only_noise: bool = False) -> torch.Tensor | Quantized:
        """The attention output (R, D) of block `i` for its normed input h (R, D); (N, D) for the noise if `only_noise`.

        It may be `Quantized` if `block.out_input_dtype` is e4m3.
        """
        ...


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
        first: Any = transformer.transformer_blocks[0]
        self.heads, self.width = first.num_attention_heads, first.dim
        self.eps, self.qk_eps = first.img_norm1.eps, first.attn.norm_q.eps
        self.blocks = [Block(block) for block in transformer.transformer_blocks]

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
        found = self.graphs.run(("velocities", key, self.eight_bit_attention), step, *tables, *(t for s in samples for t in s.tensors))
        return [found] if isinstance(found, torch.Tensor) else list(found)

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
        count = len(tensors) // 5  # of each sample two tables of its modulation, then of each its `Sample.tensors`
        tables, inputs = tensors[: 2 * count], tensors[2 * count :]
        samples = [inputs[i : i + 3] for i in range(0, 3 * count, 3)]
        words = torch.cat([embeds.flatten(0, 1) for _, _, embeds in samples])
        pictures = [torch.cat([latents, conditions], 1).flatten(0, 1) for latents, conditions, _ in samples]
        modulation = tables[0] if count == 1 else torch.cat(tables[::2], 1)
        y = self.run(_Joint(self, layout), words, torch.cat(pictures), modulation, torch.stack(tables[1::2]))
        parts = y.split([latents.shape[0] * latents.shape[1] for latents, _, _ in samples])
        parts = tuple(part.view(latents.shape) for part, (latents, _, _) in zip(parts, samples, strict=True))
        return parts[0] if count == 1 else parts

    def run(self, strategy: Attention, words: torch.Tensor | None, pictures: torch.Tensor, modulation, out) -> torch.Tensor:
        """All blocks over rows of text, (T, J) or none, and of pictures, (R, C): (N, C) for the rows that are noise.

        `strategy` says what the rows are and attends for them. modulation: (L, K, 6, D), contiguous in L, a row for each row
        type; out: (samples, 2, D), shift and scale of the last norm.
        """
        model, text = self.transformer, strategy.text
        x = model.img_in(pictures)
        if words is not None:
            x = torch.cat([model.txt_in(model.txt_norm(words)), x])
        row_types = strategy.row_types
        h = self._norm(self.blocks[0].qkv_input_dtype, x, None, None, modulation[0, :, 0], modulation[0, :, 1], row_types)
        for i, block in enumerate(self.blocks[:-1]):
            now, then = modulation[i].unbind(1), modulation[i + 1].unbind(1)  # six of (K, D) each
            y = block.out(strategy.attend(i, block, h), text)
            h = self._norm(block.mlp_input_dtype, x, y, now[2], now[3], now[4], row_types)
            y = block.mlp(h, text)
            h = self._norm(self.blocks[i + 1].qkv_input_dtype, x, y, now[5], then[0], then[1], row_types)
        # The last block: keys and values of all, the rest for the noise alone.
        block, now, i = self.blocks[-1], modulation[-1].unbind(1), len(self.blocks) - 1
        attended = strategy.attend(i, block, h, only_noise=True)
        x, row_types = x[strategy.noise].contiguous(), row_types[strategy.noise].contiguous()
        h = self._norm(block.mlp_input_dtype, x, block.out(attended, 0), now[2], now[3], now[4], row_types)
        y = block.mlp(h, 0)
        shift, scale = (out[:, j : j + 1].expand(-1, 3, -1).reshape(-1, self.width) for j in range(2))
        h = residual_norm_modulate(x, y, now[5], shift, scale, row_types, model.norm_out.norm.eps)
        return model.proj_out(h)

    def _norm(self, output_dtype: torch.dtype | None, x, y, gate, shift, scale, row_types: torch.Tensor) -> torch.Tensor | Quantized:
        """`residual_norm_modulate`, in 8-bit rows of `output_dtype` if the layers after it read those."""
        if output_dtype is None:
            return residual_norm_modulate(x, y, gate, shift, scale, row_types, self.eps)
        return residual_norm_modulate_quantize(x, y, gate, shift, scale, row_types, self.eps, output_dtype)

    def qkv(self, block: Block, h: torch.Tensor | Quantized, text: int) -> torch.Tensor:
        """(R, 3, H, d), queries and keys neither normed nor rotated yet."""
        return block.qkv(h, text).view(-1, 3, self.heads, self.width // self.heads)

    def norm_rope(
        self, block: Block, qkv, row_types, positions, rope: tuple[torch.Tensor, torch.Tensor], to: Destinations | None, move_q=True
    ) -> None:
        """`qk_norm_rope` with the block's norms, or the same to 8 bits if that is what `to` holds."""
        given = (qkv, row_types, positions, block.norms, *rope, self.qk_eps)
        if to is not None and to.k.dtype == EIGHT:
            norm_rope_quantize(*given, block.scales, to, move_q)
        else:
            qk_norm_rope(*given, to if move_q or to is None else to._replace(q=None))

    def attend(self, block: Block, q, k, v, alone: bool = False) -> torch.Tensor | Quantized:
        """(B * R, D) from queries (B, R, H, d), keys and values (B, S, H, d).

        With `alone=True` the caller passes the result on whole (no concatenation, no indexing), so it may be returned as
        8-bit rows, the form the output projection reads.
        """
        if k.dtype == EIGHT:
            if alone and block.out_input_dtype == EIGHT:
                return attend_fp8(q, k, v, block.scales, eight_bit=True)
            attended = attend_fp8(q, k, v, block.scales)
            assert isinstance(attended, torch.Tensor)
            return attended.to(block.norms.dtype).flatten(0, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not q.is_cuda:
            attended = F.scaled_dot_product_attention(q, k, v)
        else:
            with sdpa_kernel(self._backend(q, k, v)):
                attended = F.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _backend(self, q, k, v) -> SDPBackend:
        """Chosen by measurement for lengths of the same order: one more word in a prompt measures nothing again."""
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
        row_types, positions, destinations, noise, runs = ([], []), ([], []), ([], []), [], []
        begin = image = tables = 0
        texts = sum(batch * text for _, batch, text in key)
        for n, (shapes, batch, text) in enumerate(key):
            tokens = [math.prod(shape) for shape in shapes]
            length = text + sum(tokens)
            runs.append((begin, batch, length, text, tokens[0]))
            for _ in range(batch):
                row_types[0].append(torch.full((text,), 3 * n))
                row_types[1].append(torch.full((length - text,), 3 * n + 2).index_fill_(0, torch.arange(tokens[0]), 3 * n + 1))
                positions[0].append(tables + torch.arange(text))
                positions[1].append(tables + torch.arange(text, length))
                destinations[0].append(begin + torch.arange(text))
                destinations[1].append(begin + torch.arange(text, length))
                noise.append(texts + image + torch.arange(tokens[0]))
                begin, image = begin + length, image + length - text
            tables += length
        in_rows = (torch.cat(a + b).int().to(self.device) for a, b in (row_types, positions, destinations))
        of_types, of_positions, of_destinations = in_rows
        ropes = [self.rope(shapes, text) for shapes, _, text in key]
        cos, sin = (torch.cat(t) for t in zip(*ropes, strict=True))
        return _Layout(texts, of_types, of_positions, of_destinations, torch.cat(noise).to(self.device), cos, sin, runs)


class _Layout(NamedTuple):
    """Of the rows of a forward, all text before all pictures; in attention each sample's text stands before its picture."""

    text: int
    row_types: torch.Tensor  # int32 (R,): see `kernels`
    positions: torch.Tensor  # int32 (R,), indices of cos and sin
    destinations: torch.Tensor  # int32 (R,), the rows' indices in attention's order
    noise: torch.Tensor  # int64, the rows that are noise
    cos: torch.Tensor
    sin: torch.Tensor
    runs: list[tuple[int, int, int, int, int]]  # in attention: where a sample begins, its batch, length, text, noise


class _Joint:
    """Attention of each sample to itself."""

    def __init__(self, fused: FusedTransformer, layout: _Layout):
        self._fused, self._layout = fused, layout
        self.text, self.row_types, self.noise = layout.text, layout.row_types, layout.noise
        self._alone = len(layout.runs) == 1 and layout.runs[0][1] == 1  # then the rows are in attention's order already

    def attend(self, i: int, block: Block, h: torch.Tensor | Quantized, only_noise: bool = False) -> torch.Tensor | Quantized:
        """(R, D), or for the noise alone (N, D)."""
        fused, layout = self._fused, self._layout
        joint = qkv = fused.qkv(block, h, self.text)
        to = None
        if fused.eight_bit_attention or not self._alone:
            joint = torch.empty_like(qkv, dtype=EIGHT if fused.eight_bit_attention else qkv.dtype)
            q, k, v = joint.unbind(1)
            to = Destinations(q, k, v, None if self._alone else layout.destinations)
        fused.norm_rope(block, qkv, self.row_types, layout.positions, (layout.cos, layout.sin), to)
        attended = []
        for begin, batch, length, text, noise in layout.runs:
            q, k, v = joint[begin : begin + batch * length].view(batch, length, 3, *joint.shape[2:]).unbind(2)
            q = q[:, text : text + noise] if only_noise else q
            attended.append(fused.attend(block, q, k, v, self._alone))
        attended = attended[0] if len(attended) == 1 else torch.cat(attended)
        return attended if self._alone or only_noise else attended[layout.destinations]


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
    return min(times, key=times.__getitem__) if times else SDPBackend.MATH


def _check(transformer: Any) -> None:
    """UnsupportedError unless every layer is of the kind that is written down above, and on CUDA without Triton."""
    kind = type(transformer)  # by its name: the model's own attributes have no types
    if kind is not QwenImageTransformer2DModel:
        raise UnsupportedError(f"the transformer is a {kind.__name__}")
    if transformer.device.type == "cuda" and triton is None:
        raise UnsupportedError("its kernels need Triton, which is not installed")
    if reason := foreign(transformer):
        raise UnsupportedError(reason)
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
    epsilons = set()
    for block in transformer.transformer_blocks:
        attn = block.attn
        epsilons.add(tuple(n.eps for n in (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)))
        epsilons.add(tuple(n.eps for n in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)))
        if type(block.attn.processor) is not QwenDoubleStreamAttnProcessor2_0:
            raise UnsupportedError(f"the attention is a {type(block.attn.processor).__name__}")
        if block.attn.processor._attention_backend is not None or block.attn.processor._parallel_config is not None:
            raise UnsupportedError(f"its attention has a backend chosen by hand, {block.attn.processor._attention_backend}")
        if getattr(block.attn, "fused_projections", False):
            raise UnsupportedError("its projections are fused by diffusers")
    if any(len(set(each)) > 1 for each in epsilons) or len(epsilons) > 2:
        raise UnsupportedError("its norms have different epsilons")
