"""Sizes and shapes: which output a picture gets, and how any size meets the model's grid.

The model computes tokens of 16x16 pixels; people have pictures of any size. So a picture of (w, h) goes in padded to
the next multiples of 16 and what comes out is cut back to (w, h). The padding repeats the edge, at the right and at the
bottom: token (r, c) of the picture stays token (r, c), and no pixel moves. (Scaling to the grid instead would move the
far edge by up to 15 pixels, and cropping to it loses up to 15.) The model's picture never leaves the pipeline's steps:
everything else speaks of (w, h).

"The same shape" means the same aspect within one pixel, which is the best that whole numbers allow. Sizes are
(width, height) in pixels. Plain arithmetic, without a model.
"""

import math
from typing import overload

import numpy as np
import torch

TOKEN = 16  # pixels on a side of a token: the VAE's factor of 8 times the transformer's 2x2 patches


def on_grid(width: int, height: int, unit: int = TOKEN) -> tuple[int, int]:
    """The size at which the model computes: the next multiples of `unit`."""
    return -(-width // unit) * unit, -(-height // unit) * unit


@overload
def padded(pixels: np.ndarray, unit: int = TOKEN) -> np.ndarray: ...


@overload
def padded(pixels: torch.Tensor, unit: int = TOKEN) -> torch.Tensor: ...


def padded(pixels: np.ndarray | torch.Tensor, unit: int = TOKEN) -> np.ndarray | torch.Tensor:
    """A numpy array (H, W, 3) or a tensor (B, H, W, 3) on the grid: its last column and row repeated.

    Returned as it is if it is on the grid.
    """
    if isinstance(pixels, np.ndarray):
        height, width = pixels.shape[:2]
        right, bottom = (side - own for side, own in zip(on_grid(width, height, unit), (width, height), strict=True))
        return np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="edge") if right or bottom else pixels
    height, width = pixels.shape[1:3]
    right, bottom = (side - own for side, own in zip(on_grid(width, height, unit), (width, height), strict=True))
    if right:
        pixels = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, right, -1)], dim=2)
    if bottom:
        pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, bottom, -1, -1)], dim=1)
    return pixels


def aspect(size: tuple[int, int]) -> float:
    """Width by height."""
    return size[0] / size[1]


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether `size` can be scaled to `other` as a whole: the aspects are equal within one pixel of `other`."""
    (w, h), (width, height) = size, other
    return min(abs(height - width * h / w), abs(width - height * w / h)) <= 1


def in_shape(
    shape: tuple[int, int], *, width: int | None = None, height: int | None = None, area: float = 0.0, longest: int
) -> tuple[int, int]:
    """The size of a picture's shape with this `width`, or this `height`, or about this `area` in pixels.

    `shape` is any (width, height). Given both sides, they are the answer. A picture that has the area already, as
    nearly as whole sides allow, keeps its size. By area no side is above `longest`, or below 1; a side that follows
    from a given one may be: the caller knows its limits.
    """
    w, h = shape
    if width is not None and height is not None:
        return width, height
    if width is not None:
        return width, max(1, round(width * h / w))
    if height is not None:
        return max(1, round(height * w / h)), height
    long, short = max(w, h), min(w, h)
    if abs(w * h - area) <= short + long / 2 + 1 and long <= longest:  # the most that the rounding below leaves
        return w, h
    first = min(longest, max(1, round(math.sqrt(area * long / short))))  # the longer side: its rounding costs the least
    second = max(1, round(first * short / long))
    return (first, second) if w >= h else (second, first)
