"""How far the fast path is from the plain one, and how far the plain one is from itself.

In bfloat16 no two groupings of the same sum agree. What the fast path may differ by is what the plain path differs by
when its matrix products are merely cut up otherwise: the transformer on two equal rows instead of one, the language
model with padding behind the prompt, which its causal attention never sees. Both errors are given side by side, as
relative differences |a - b| / |b| (Frobenius norm) against the plain path as it is.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from benchmarks.instruments import pictures
from benchmarks.subjects import PROMPT
from cached_pipeline import CachedQwenImageEditPipeline, References

SIZE, STEPS, PADDING = 512, 2, 40


@torch.no_grad()
def plain(pipeline: CachedQwenImageEditPipeline) -> dict:
    """The plain path's results on one picture, and how far off the same path in another grouping is."""
    picture = next(pictures(SIZE, SIZE, seed=1))
    embeds, _ = pipeline.encode_prompt(PROMPT, picture)
    with _padded(pipeline.text_encoder.model.language_model):
        regrouped_embeds, _ = pipeline.encode_prompt(PROMPT, picture)
    references = pipeline.encode_references(picture, area=SIZE * SIZE)
    noise, schedule = pipeline.initial_noise(SIZE, SIZE, 0), pipeline.schedule(STEPS, SIZE, SIZE)
    latents = pipeline.denoise(noise, references, embeds, None, schedule)
    twice = pipeline.denoise(noise.expand(2, -1, -1), references, embeds, None, schedule)
    return {
        "inputs": (picture, noise, references),
        "results": {"embeddings": embeds, "references": references.latents, "latents": latents},
        "regrouped": {"embeddings": _error(regrouped_embeds, embeds), "latents": _error(twice[:1], latents)},
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
        "plain_regrouped": known["regrouped"],
        "decoded_levels": {"mean": round(levels.float().mean().item(), 3), "max": levels.max().item()},
    }


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(f"{((a.float() - b.float()).norm() / b.float().norm()).item():.3g}")


@contextmanager
def _padded(language_model):
    forward = language_model.forward

    def longer(inputs_embeds, position_ids, **kwargs):
        padded, positions = F.pad(inputs_embeds, (0, 0, 0, PADDING)), F.pad(position_ids, (0, PADDING))
        out = forward(inputs_embeds=padded, position_ids=positions, **kwargs)
        out.last_hidden_state = out.last_hidden_state[:, :-PADDING]
        return out

    language_model.forward = longer
    try:
        yield
    finally:
        del language_model.forward
