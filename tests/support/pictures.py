"""Pictures for tests, the answers that `pocket_model.edits` computes to them, and how near a result comes."""

from pathlib import Path

import numpy as np
import torch

from pipeline.images import fit, open_image
from pocket_model.edits import EDITS

SAME_DB = 100.0  # of pictures without a difference


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


def held_out(name: str, width: int = 256, height: int = 256) -> np.ndarray:
    """A photograph of scikit-image that the pocket model has not seen in training."""
    import skimage  # not where a GPU's tests run

    return fit(open_image((Path(skimage.__file__).parent / "data" / name).read_bytes()), width, height)


def grey(value: int = 128, width: int = 64, height: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures of one shape."""
    error = float(np.square(one.astype(np.float64) - other).mean()) / 255**2
    return -10 * np.log10(error) if error else SAME_DB


def answer(name: str, *pictures: np.ndarray) -> np.ndarray:
    edit = next(edit for edit in EDITS if edit.name == name)
    tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 for picture in pictures]
    return (edit.answer(*tensors)[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()


def assert_edited(output: np.ndarray, name: str, *pictures: np.ndarray, at_least_db: float = 18.0):
    """The output is the computed answer and not the input. The model's own bar is 22 dB in the mean over photographs;
    one photograph may lie below, and the camera's and the socket's JPEG cost a little more."""
    right = answer(name, *pictures)
    assert output.shape == right.shape
    to_answer, to_inputs = psnr_db(output, right), [psnr_db(output, picture) for picture in pictures]
    assert to_answer >= at_least_db, f"{name}: {to_answer:.1f} dB to the answer, {to_inputs} to the input"
    assert to_answer > max(to_inputs), f"{name}: {to_answer:.1f} dB to the answer, {to_inputs} to the input"


def saturation(picture: np.ndarray) -> float:
    return float((picture.max(2).astype(int) - picture.min(2)).mean())
