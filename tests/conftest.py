"""Shared fixtures. The suite runs on the embedded model: real classes, small weights, no network, no GPU."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does: threads that spin starve all else on 2 cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch

torch.set_num_threads(2)
pytest.register_assert_rewrite("page", "http_side", "stand_ins", "hopper", "small_models", "lora_files")  # what tests share: its asserts say their numbers too


def make_photo(width: int = 256, height: int = 256, seed: int = 0) -> np.ndarray:
    """A picture with what photos have: smooth light, edges, colours, fine texture. uint8 (H, W, 3), same by seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = y / height, x / width
    sky, ground = rng.uniform(40, 255, 3), rng.uniform(0, 180, 3)
    image = sky + (ground - sky) * y[..., None]
    for _ in range(6):  # discs and boxes with shading: hard edges at known places
        cx, cy, r = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.25)
        colour = rng.uniform(0, 255, 3)
        disc = ((x - cx) ** 2 + (y - cy) ** 2 < r * r) if rng.random() < 0.6 else (abs(x - cx) < r) & (abs(y - cy) < r)
        image = np.where(disc[..., None], colour * (1.15 - 0.5 * (y - cy + r) / (2 * r))[..., None], image)
    image += 12 * np.sin(2 * np.pi * (x * rng.uniform(5, 30) + y * rng.uniform(5, 30)))[..., None]
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def photo():
    """`photo(width, height, seed)` -> uint8 (H, W, 3)."""
    return make_photo


@pytest.fixture(scope="session")
def pocket():
    """The embedded model in fp32 on the CPU, loaded once. A test that changes it must put it back."""
    from cached_pipeline import load_pipeline

    pipeline = load_pipeline("pocket", device="cpu", dtype=torch.float32)
    # Untrained weights end in zeros: every comparison of outputs would hold. No effect on a trained model.
    if not pipeline.transformer.proj_out.weight.any():
        torch.nn.init.normal_(
            pipeline.transformer.proj_out.weight, std=0.05, generator=torch.Generator().manual_seed(0)
        )
    return pipeline
