"""Exact accelerations of the loaded modules: the same numbers, less work.

`apply(pipeline)` puts in what fits the loaded model and says, entry by entry, what it did and why; `remove(pipeline)`
takes everything out again, so the stock path stays reachable for comparison. Nothing here approximates: what a test
can tell apart from stock is rounding only.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fast_path import attention
from fast_path.reuse import TokenCache
from fast_path.text_encoder import FusedTextEncoder
from fast_path.transformer import FusedTransformer
from fast_path.unsupported import UnsupportedError
from fast_path.vae import SingleFrameVAE, single_frame_vae
from pipeline.images import EditError
from pipeline.sampling import is_lightning

__all__ = [
    "Applied", "FusedTextEncoder", "FusedTransformer", "SingleFrameVAE", "TokenCache", "apply", "remove", "single_frame_vae",
]  # fmt: skip

PARTS = ("single_frame_vae", "fused_transformer", "fused_text_encoder")  # attributes of the pipeline


class Applied(NamedTuple):
    """One line of the report: what was tried, whether it is in use, and why (or why not)."""

    name: str
    applied: bool
    reason: str


def apply(pipeline) -> list[Applied]:
    """Puts every acceleration in that fits `pipeline` and sets its attributes of the same names. Call after `.to`."""
    if in_use(pipeline):
        remove(pipeline)
    report = []

    def put(name: str, make: Callable[[], tuple[Any, str]]) -> None:
        try:
            part, reason = make()
            setattr(pipeline, name, part)
            report.append(Applied(name, True, reason))
        except UnsupportedError as error:
            report.append(Applied(name, False, str(error)))

    put("single_frame_vae", lambda: _vae(pipeline))
    put("fused_transformer", lambda: _transformer(pipeline))
    put("fused_text_encoder", lambda: _text_encoder(pipeline))
    if pipeline.transformer.device.type == "cuda":
        report.append(Applied("warm_up", True, _warm_up(pipeline)))
    return report


def attention_kind(transformer, kind: str | None, device: torch.device) -> str:
    """"none" or "fp8", as asked for. Raises EditError for another kind and where 8-bit attention cannot run."""
    if kind in (None, "none"):
        return "none"
    if kind != "fp8":
        raise EditError(f'The quantisation of the attention is "{kind}". Allowed: none, fp8.')
    if reason := attention.refusal(device, transformer.config.attention_head_dim):
        raise EditError(f'The attention cannot be quantised to "fp8" here: {reason}. Allowed here: none.')
    return kind


def in_use(pipeline) -> bool:
    """Whether any part is in."""
    return any(getattr(pipeline, name) is not None for name in PARTS)


def forget_recordings(pipeline) -> None:
    """Frees the memory of CUDA graphs and token caches; a shape that comes again is recorded again."""
    for part in filter(None, (getattr(pipeline, name) for name in PARTS)):
        part.graphs.clear()  # each part's own, so that parts may run at the same time on streams of their own
    if pipeline.fused_transformer is not None:
        for cache in pipeline.fused_transformer.token_caches:
            cache.clear()


def remove(pipeline) -> None:
    """Back to the stock modules, all of them where the pipeline is."""
    if pipeline.fused_transformer is not None:
        pipeline.fused_transformer.modulations.onload()
    if pipeline.fused_text_encoder is not None:
        pipeline.fused_text_encoder.onload()
    if pipeline.single_frame_vae is not None:
        pipeline.vae.to(pipeline.transformer.proj_out.weight.device)
    forget_recordings(pipeline)  # they hold the part that they belong to
    for name in PARTS:
        setattr(pipeline, name, None)


def _vae(pipeline):
    if hasattr(pipeline.vae, "_hf_hook"):
        raise UnsupportedError("the VAE is offloaded: its copy would stay behind")
    reason = "2-D convolutions, channels last; the temporal past is zeros"
    if pipeline.vae.device.type == "cuda":
        reason += "; bias, shortcut, norm and SiLU in one kernel, bytes to latents and back in a CUDA graph each"
    flat = single_frame_vae(pipeline.vae)
    if pipeline.vae.device.type == "cuda":
        reason += f", {sum(p.nbytes for p in pipeline.vae.parameters()) / 1e9:.2f} GB of 3-D convolutions moved to the CPU"
        pipeline.vae.to("cpu")
    return flat, reason


def _transformer(pipeline):
    eight_bit = pipeline.attention_quantize == "fp8"
    fused = FusedTransformer(pipeline.transformer, eight_bit)
    reason = "q, k and v in one product, small operations fused, the last block's unread outputs left out"
    reason += ", attention in 8 bits (e4m3), which is approximate" * eight_bit
    times = _lightning_times(pipeline)
    if times:
        fused.modulations.get(times[0], times)
    if freed := fused.modulations.offload():
        reason += f", a CUDA graph a step, {freed / 1e9:.1f} GB of modulation weights moved to the CPU"
    return fused, reason


def _text_encoder(pipeline):
    fused = FusedTextEncoder(pipeline.text_encoder)
    reason = "no questions to the GPU, windows of one size in one batch, q, k, v and gate, up in one product"
    if freed := fused.offload():
        reason += f", two CUDA graphs, {freed / 1e9:.2f} GB of vocabulary head and word table moved to the CPU"
    return fused, reason


@torch.no_grad()
def _warm_up(pipeline) -> str:
    """One edit at the live size: kernels are compiled, convolutions timed and graphs recorded before anyone waits."""
    began, side = time.perf_counter(), pipeline.default_size
    picture = np.zeros((side, side, 3), np.uint8)
    for _ in range(2):  # run and recorded, then replayed
        embeds, mask = pipeline.encode_prompt("keep everything as it is", picture)
        references = pipeline.encode_references(picture, area=side * side)
        noise, schedule = pipeline.initial_noise(side, side), pipeline.schedule(1, side, side)
        pipeline.decode(pipeline.denoise(noise, references, embeds, mask, schedule), side, side).cpu()
        pipeline.clear_caches()
    return f"{side}x{side} compiled and recorded in {time.perf_counter() - began:.1f} s, so that the first frame does not wait"


def _lightning_times(pipeline) -> tuple[float, ...]:
    """What 1 to 8 steps will ask for, if the schedule is the same at all sizes, as Lightning's is."""
    if not is_lightning(pipeline.scheduler):
        return ()
    size = pipeline.default_size
    return tuple(dict.fromkeys(t for steps in range(1, 9) for t in pipeline.schedule(steps, size, size).times))
