"""Picture 2 placed on picture 1: one flat picture, which is then edited like any other.

The page draws the same thing while its controls move (`collage.js`); what is edited is computed here.
"""

import numpy as np
from PIL import Image

from pipeline.images import EditError

MOST_SIDE = 2048  # of what is computed: no result is larger
LIMITS = {"across": (0.0, 1.0), "down": (0.0, 1.0), "scale": (0.05, 2.0), "opacity": (0.0, 1.0)}


def collage(
    first: np.ndarray, second: np.ndarray, *, across: float, down: float, scale: float, opacity: float
) -> np.ndarray:
    """`second` on `first`, both uint8 (H, W, 3): its middle at (`across`, `down`) of first's width and height, `scale`
    times as wide as first, its aspect ratio unchanged, what is outside of first cut off. Opacity 0 is first alone. Returns uint8 of
    first's shape, shrunk to at most 2048 pixels a side. Raises EditError on a number outside of LIMITS.
    """
    for name, value in {"across": across, "down": down, "scale": scale, "opacity": opacity}.items():
        low, high = LIMITS[name]
        if not low <= value <= high:  # NaN fails it too
            raise EditError(f"{name} is {value!r}. Allowed: {low:g} to {high:g}.")
    below = Image.fromarray(first)
    if max(below.size) > MOST_SIDE:
        below.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.BICUBIC)
    width = max(1, round(scale * below.width))
    height = max(1, round(width * second.shape[0] / second.shape[1]))
    left, top = round(across * below.width - width / 2), round(down * below.height - height / 2)
    # Only what will be seen is resized: at scale 2 a tall picture would be many times the size of the first.
    shown = (max(left, 0), max(top, 0), min(left + width, below.width), min(top + height, below.height))
    if shown[0] >= shown[2] or shown[1] >= shown[3]:
        return np.array(below)
    by_x, by_y = second.shape[1] / width, second.shape[0] / height
    box = tuple((edge - corner) * by for edge, corner, by in zip(shown, (left, top) * 2, (by_x, by_y) * 2, strict=True))
    size = (shown[2] - shown[0], shown[3] - shown[1])
    above = Image.fromarray(second).resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    flat = below.copy()
    flat.paste(above, shown[:2])
    return np.array(Image.blend(below, flat, opacity))
