"""How pictures meet the output: which size it has, and the pictures brought to it.

One rule for the engine, the page, the routes and the live socket. By default nothing is cut: the result has the first
picture's shape. Where both sides are given and the shape is another, the picture is cut or padded by `params.fit`, and
a note says so. `at_output_size` may be called ahead of the engine, off its thread: a photograph of 60 megapixels then
neither waits in memory for its turn nor costs the inference thread the resizing.
"""

from typing import NamedTuple

import numpy as np

from engine.settings import LIMITS, PICTURES, EditParams
from pipeline.geometry import in_shape, on_grid, same_shape
from pipeline.images import EditError, fit, fit_in_shape

LONGEST = int(LIMITS["width"][1])  # the longest side of a result, either way


class Fitted(NamedTuple):
    """Pictures ready for the engine, which takes them in place of a list."""

    images: list[np.ndarray]  # uint8 (H, W, 3)
    size: tuple[int, int]  # the output's (width, height)
    notes: tuple[str, ...] = ()  # what a person should know of it


def checked_size(images: list, params: EditParams, default_side: int, max_pixels: int) -> tuple[int, int]:
    """The output's (width, height). Raises EditError on what cannot work, before a frame waits for its turn."""
    least, most = PICTURES[params.mode]
    if len(images) < least or len(images) > most:
        allowed = f"{least}" if least == most else f"{least} to {most}"
        raise EditError(f"{len(images)} pictures came. Allowed in mode {params.mode}: {allowed}.")
    for image in images:
        dtype, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
        if not (isinstance(image, np.ndarray) and dtype == np.uint8 and shape[2:] == (3,) and image.size):
            raise EditError(f"A picture came as {dtype} {shape}. Allowed: a numpy array, uint8 (height, width, 3).")
    width, height = size_in_shape(images[0].shape[1::-1], default_side, params.width, params.height)
    if width * height > max_pixels:
        raise EditError(f"The output would be {width}x{height}, {width * height:,} pixels. Allowed: {max_pixels:,}.")
    return width, height


def size_in_shape(
    shape: tuple[int, int], side: int, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """(width, height) of a result with the picture's own shape and the area of a square of `side` pixels.

    One side given keeps the shape too; both given are the answer. Raises EditError if the other side would be too long.
    """
    size = in_shape(shape, width=width, height=height, area=side * side, longest=LONGEST)
    if max(size) > LONGEST:
        raise EditError(
            f"A picture of {shape[0]}x{shape[1]} would become {size[0]}x{size[1]}. Allowed: sides of at most {LONGEST}; "
            "give the longer side, or neither."
        )
    return size


def at_output_size(
    images: list, params: EditParams, default_side: int, max_pixels: int = LONGEST**2, quick: bool = False
) -> Fitted:
    """The pictures as the engine would make them; `quick` by a cheaper filter. Raises EditError."""
    if isinstance(images, Fitted):
        return images
    size = checked_size(images, params, default_side, max_pixels)
    return Fitted(sized(images, params, *size, quick), size, notes(images, params, size))


def sized(
    images: list[np.ndarray], params: EditParams, width: int, height: int, quick: bool = False
) -> list[np.ndarray]:
    """The first picture at the output's size; others too if they are blended with it, else whole at the output's area.

    For the stock area, which the pipeline makes itself, the pictures keep their resolution, and the first one gets the
    output's shape. What was done once stays as it is.
    """
    first, *others = images
    if params.reference_area == "stock":
        meet = [first, *(others if params.mode == "blend" else ())]
        return [*(fit_in_shape(image, width, height, params.fit) for image in meet), *images[len(meet) :]]
    first = fit(first, width, height, params.fit, quick)
    if params.mode == "blend":
        return [first, *(fit(other, width, height, params.fit, quick) for other in others)]
    whole = (in_shape(other.shape[1::-1], area=width * height, longest=LONGEST) for other in others)
    return [first, *(fit(other, *size, quick=quick) for other, size in zip(others, whole, strict=True))]


def notes(images: list[np.ndarray], params: EditParams, size: tuple[int, int]) -> tuple[str, ...]:
    """Which of the pictures that are made to share the output's shape are cut or padded for it."""
    shapes = [image.shape[1::-1] for image in (images if params.mode == "blend" else images[:1])]
    done = "cut" if params.fit == "crop" else "padded with black"
    return tuple(
        f"fit: picture {number} of {w}x{h} was {done} to the shape of {size[0]}x{size[1]}"
        for number, (w, h) in enumerate(shapes, 1)
        if not same_shape((w, h), size)
    )


def framed(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture of the shape of `width` x `height`, its edge repeated so far that it has the shape of their grid.

    For a reference at another resolution than the output's: it then lies on the reference's grid as the output lies on
    its own, and no pixel moves.
    """
    (grid_width, grid_height), (h, w) = on_grid(width, height), image.shape[:2]
    right, bottom = round(w * grid_width / width) - w, round(h * grid_height / height) - h
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge") if right or bottom else image
