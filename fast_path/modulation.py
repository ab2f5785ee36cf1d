"""The modulation cache: what depends on the time alone is computed once for each time.

In every block a linear layer for each stream turns the time's embedding into shifts, scales and gates. Its input is one
row, whatever the picture: in Qwen-Image 6.8 of the 20.4 billion parameters (13.6 GB) make 120 times 18,432 numbers, the
same ones for every frame at the same noise level. They are kept (6.6 MB a level) and the weights may leave the GPU. A level
that was never asked for brings them back, block by block, for as long as it takes to compute it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.content_cache import ContentCache


class Modulations:
    """The table of one transformer: for each time, shifts, scales and gates of all blocks and of the output norm.

    `blocks` (L, 3, 6, D): for text, noise tokens and reference tokens, in the order shift, scale, gate of the attention,
    then of the MLP. References differ from the noise only in a model with `zero_cond_t`. `out` (2, D): shift, scale.
    """

    def __init__(self, transformer, max_entries: int = 64):
        self.transformer = transformer
        self.layers = [layer for block in transformer.transformer_blocks for layer in (block.img_mod, block.txt_mod)]
        self._cache = ContentCache(max_entries)

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    def get(self, time: float, times: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks, out) for the pipeline's timestep `time`; if it is new, all of `times` are computed together."""
        if time not in self._cache:
            self.expect((time, *times))
        return self._cache.get(time, lambda: self._compute([time])[0])

    def expect(self, times: Sequence[float]) -> None:
        """Computes those of `times` that are new. The weights behind them come to the GPU once, not for each."""
        missing = [t for t in dict.fromkeys(times) if t not in self._cache]
        for t, table in zip(missing, self._compute(missing) if missing else (), strict=True):
            self._cache.get(t, lambda table=table: table)

    def clear(self) -> None:
        """Forgets all times; call it when a weight behind them changes."""
        self._cache.clear()

    def summary(self) -> dict[str, int]:
        """entries, bytes, hits, misses."""
        return self._cache.summary()

    @torch.no_grad()
    def _compute(self, times: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        model, device = self.transformer, self.device
        width, dtype = model.inner_dim, model.proj_out.weight.dtype
        tables = [
            (
                torch.empty(len(model.transformer_blocks), 3, 6, width, dtype=dtype, device=device),
                torch.empty(2, width, dtype=dtype, device=device),
            )
            for _ in times
        ]
        embedded = [self._embed(t, dtype, device) for t in times]
        for i, block in enumerate(model.transformer_blocks):
            with _visiting(block.img_mod, device), _visiting(block.txt_mod, device):
                for (blocks, _), embedding in zip(tables, embedded, strict=True):
                    # One time after the other, as stock runs them: the same numbers to the last bit.
                    image = block.img_mod(embedding).view(-1, 6, width)
                    blocks[i, 0] = block.txt_mod(embedding[:1]).view(6, width)
                    blocks[i, 1], blocks[i, 2] = image[0], image[-1]
        for (_, out), embedding in zip(tables, embedded, strict=True):
            norm = model.norm_out
            scale, shift = norm.linear(norm.silu(embedding[:1]).to(dtype)).view(2, width)
            out[0], out[1] = shift, scale
        return tables

    def _embed(self, time: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(1, D), or (2, D) with the references' time 0, from the timestep as the pipeline hands it to the model."""
        t = torch.tensor([time], device=device).to(dtype) / 1000
        if self.transformer.zero_cond_t:
            t = torch.cat([t, t * 0])
        return self.transformer.time_text_embed(t, torch.empty(0, dtype=dtype, device=device))


class _visiting:
    """A module on `device` for as long as the block runs; its weights at home stay where they are."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device, self.home = module, device, None

    def __enter__(self):
        parameters = list(self.module.parameters())
        if parameters[0].device != self.device:
            self.home = [(p, p.data) for p in parameters]
            for p in parameters:
                p.data = p.data.to(self.device, non_blocking=True)

    def __exit__(self, *exception):
        for p, data in self.home or ():
            p.data = data
