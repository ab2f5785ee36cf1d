"""What a result file says in addition to speed: how exact the fast path is, and what a new prompt costs.

In bfloat16 no two orders of the same sum agree. What the fast path may differ by is what the plain path differs by when
every matrix product merely adds its terms in another order: inputs and weights are shuffled alike. Both errors are given
side by side, as relative differences |a - b| / |b| (Frobenius norm) against the plain path as it is.
"""

import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from benchmarks.instruments import pictures
from benchmarks.subjects import PROMPT
from cached_pipeline import CachedQwenImageEditPipeline, References

SIZE, STEPS = 512, 2
NEW_PROMPTS = (
    "turn it into a watercolour painting",
    "make it look like the evening of a warm summer day at the sea, with long shadows",
    "paint it in oil with thick strokes, and let the colours of the sky be those of a thunderstorm that has just passed",
)


@torch.no_grad()
def plain(pipeline: CachedQwenImageEditPipeline) -> dict:
    """The plain path's results on one picture, and how far off the same path with its sums in another order is."""
    picture = next(pictures(SIZE, SIZE, seed=1))
    embeds, _ = pipeline.encode_prompt(PROMPT, picture)
    references = pipeline.encode_references(picture, area=SIZE * SIZE)
    noise, schedule = pipeline.initial_noise(SIZE, SIZE, 0), pipeline.schedule(STEPS, SIZE, SIZE)
    latents = pipeline.denoise(noise, references, embeds, None, schedule)
    with _shuffled_sums():
        other_embeds, _ = pipeline.encode_prompt(PROMPT, picture)
        other_latents = pipeline.denoise(noise, references, embeds, None, schedule)
    return {
        "inputs": (picture, noise, references),
        "results": {"embeddings": embeds, "references": references.latents, "latents": latents},
        "shuffled": {"embeddings": _error(other_embeds, embeds), "latents": _error(other_latents, latents)},
        "picture": pipeline.decode(latents, SIZE, SIZE),
    }


@torch.no_grad()
def compare(pipeline: CachedQwenImageEditPipeline, known: dict) -> dict:
    """`pipeline`, accelerated, against what `plain` gave: every part on the plain path's own inputs."""
    picture, noise, references = known["inputs"]
    results = known["results"]
    schedule = pipeline.schedule(STEPS, SIZE, SIZE)
    given = References(results["references"], references.shapes)
    found = {
        "embeddings": pipeline.encode_prompt(PROMPT, picture)[0],
        "references": pipeline.encode_references(picture, area=SIZE * SIZE).latents,
        "latents": pipeline.denoise(noise, given, results["embeddings"], None, schedule),
    }
    levels = (pipeline.decode(results["latents"], SIZE, SIZE).int() - known["picture"].int()).abs()
    return {
        "width": SIZE,
        "steps": STEPS,
        "fast": {name: _error(value, results[name]) for name, value in found.items()},
        "plain_in_another_order": known["shuffled"],
        "decoded_levels": {"mean": round(levels.float().mean().item(), 3), "max": levels.max().item()},
    }


@torch.no_grad()
def new_prompts(pipeline: CachedQwenImageEditPipeline) -> list[dict]:
    """For prompts of lengths not seen before: text tokens, and what the first frame takes longer than the next, ms."""
    source, found = pictures(SIZE, SIZE, seed=2), []

    def frame_ms(prompt: str) -> tuple[float, int]:
        picture = next(source)
        _drain(pipeline)
        began = time.perf_counter()
        embeds, mask = pipeline.encode_prompt(prompt, picture)
        references = pipeline.encode_references(picture, area=SIZE * SIZE)
        noise, schedule = pipeline.initial_noise(SIZE, SIZE, 0), pipeline.schedule(STEPS, SIZE, SIZE)
        pipeline.decode(pipeline.denoise(noise, references, embeds, mask, schedule), SIZE, SIZE).cpu()
        return (time.perf_counter() - began) * 1e3, embeds.shape[1]

    for _ in range(2):
        frame_ms(PROMPT)
    for prompt in NEW_PROMPTS:
        first_ms, tokens = frame_ms(prompt)
        found.append({"text_tokens": tokens, "extra_ms": round(first_ms - frame_ms(prompt)[0], 1)})
    return found


def _drain(pipeline: CachedQwenImageEditPipeline) -> None:
    if pipeline.transformer.device.type == "cuda":
        torch.cuda.synchronize()


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(f"{((a.float() - b.float()).norm() / b.float().norm()).item():.3g}")


@contextmanager
def _shuffled_sums():
    """Every Linear adds its products in a shuffled order."""
    forward, orders = torch.nn.Linear.forward, {}

    def shuffled(layer, x):
        key = (layer.in_features, x.device)
        if key not in orders:
            generator = torch.Generator().manual_seed(0)
            orders[key] = torch.randperm(layer.in_features, generator=generator).to(x.device)
        return F.linear(x[..., orders[key]], layer.weight[:, orders[key]], layer.bias)

    torch.nn.Linear.forward = shuffled
    try:
        yield
    finally:
        torch.nn.Linear.forward = forward
