"""Synthetic videos of real photographs: a still scene, a moving camera, moving things, as a webcam would see them.

Why synthetic: what moves, by how much and on how many tokens is known exactly, any frame's right answer can be
computed, and the same seed gives the same frames. The photographs lie in `photos/`, so that a machine
without network has them; the pocket model never saw them: they are three of those that its evaluation holds out.
(astronaut: NASA, public domain; chelsea: Stefan van der Walt, CC0; coffee: Rachel Michetti, CC0; from scikit-image.)

A video is a generator of uint8 frames (H, W, 3). `scene` is what happens, without a camera: a pixel that nothing moves
is equal from frame to frame. `video` adds the camera: shot and read noise, a little flicker of the light, and JPEG.

A token is 16x16 pixels, as the transformer sees them. Speeds are in shares of the picture's width a frame, so that the
same happens at every size.
"""

import functools
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).parent / "photos"
TOKEN = 16
SHARES = (0.1, 0.3, 0.5, 1.0)  # of changed tokens, of which there is a video each
MOVED_LEVELS = 0.5  # mean absolute difference of a token's pixels, of 255, from which something has moved in it

READ_NOISE = 1.2  # standard deviation in levels of 255, at any brightness
SHOT_NOISE = 0.03  # variance in levels for each level of brightness: 2.3 levels in all at mid-grey, indoor light
LIGHT_FLICKER = 0.003  # standard deviation of a frame's brightness, relative
JPEG_QUALITY = 88

PAN = 0.01  # of the width a frame: a hand-held camera
ZOOM = 0.012
OBJECT = 0.012

Box = tuple[float, float, float, float]  # left, top, right, bottom in a photograph's pixels


# The camera -----------------------------------------------------------------------------------------------------------


def camera(scene: Iterator[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """The scene as a webcam gives it: every frame with noise of its own."""
    random = np.random.default_rng(seed)
    for clean in scene:
        light = clean * np.float32(1 + random.normal(0, LIGHT_FLICKER))
        deviation = np.sqrt(READ_NOISE**2 + SHOT_NOISE * light)
        noisy = light + deviation * random.standard_normal(clean.shape, np.float32)
        file = io.BytesIO()
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
        yield np.array(Image.open(file))


# What happens ---------------------------------------------------------------------------------------------------------


@functools.cache
def _photo(name: str) -> Image.Image:
    with Image.open(PHOTOS / f"{name}.jpg") as image:
        return image.convert("RGB")


def _view(name: str, box: Box, width: int, height: int) -> np.ndarray:
    """A rectangle of a photograph at the output's size: uint8 (H, W, 3). Places between pixels are resampled."""
    return np.asarray(_photo(name).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _box(name: str, width: int, height: int, x: float = 0.5, y: float = 0.5, zoom: float = 1.0) -> Box:
    """The largest rectangle of the output's shape, divided by `zoom`; x and y in [0, 1]: where in what is left."""
    full_width, full_height = _photo(name).size
    scale = min(full_width / width, full_height / height) / zoom
    left, top = x * (full_width - scale * width), y * (full_height - scale * height)
    return left, top, left + scale * width, top + scale * height


def _to_and_fro(t: float, length: float) -> float:
    """0 up to `length` and back, at the speed of t."""
    return length - abs(t % (2 * length) - length)


def still(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """A person in a room; nothing moves."""
    picture = _view("astronaut", _box("astronaut", width, height), width, height)
    for _ in range(frames):
        yield picture


def _moving_camera(width: int, height: int, panned: float, zoomed: float) -> np.ndarray:
    """A view after these numbers of frames of panning and of zooming in; both turn round at their ends."""
    zoom = 1.4 * math.exp(_to_and_fro(ZOOM * zoomed, 0.4))
    left, top, right, bottom = _box("coffee", width, height, 0.0, 0.5, zoom)
    spare = _photo("coffee").width - (right - left)
    shift = _to_and_fro(PAN * panned * (right - left), spare)
    return _view("coffee", (left + shift, top, right + shift, bottom), width, height)


def pan(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """The camera turns sideways, by PAN of the width a frame."""
    for i in range(frames):
        yield _moving_camera(width, height, i, 0)


def zoom(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """The camera comes nearer, by ZOOM a frame."""
    for i in range(frames):
        yield _moving_camera(width, height, 0, i)


def moving(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """A third panning, a third zooming, then a thing that moves before a camera at rest; no cut between them."""
    third = frames // 3
    for i in range(frames):
        view = _moving_camera(width, height, min(i, third), min(max(i - third, 0), third))
        yield view if i < 2 * third else _with_object(view, 0.2, i - 2 * third)


def _with_object(background: np.ndarray, size: float, t: float) -> np.ndarray:
    """A cat's face before the background, soft-edged, on a small circle; `size` is its half width, of the picture's."""
    height, width = background.shape[:2]
    side = min(width, height)
    radius = size * side
    # The circle stays in the picture's middle and is large enough that it never stands still.
    angle, orbit = OBJECT * t / 0.06, 0.06 * side
    cx, cy = width / 2 + orbit * math.cos(angle), height / 2 + orbit * math.sin(angle)
    span = math.ceil(2 * radius)
    face = _photo("chelsea").resize((span, span), Image.Resampling.LANCZOS, box=(90, 10, 370, 290))
    shift = (1, 0, span / 2 - cx, 0, 1, span / 2 - cy)  # the face's middle at (cx, cy), between pixels too
    face = np.asarray(face.transform((width, height), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    edge = (np.abs((x - cx) / radius) ** 4 + np.abs((y - cy) / radius) ** 4) ** 0.25  # 1 on the edge of a rounded box
    mask = np.clip((1 - edge) * radius / (0.012 * side), 0, 1)[..., None]  # soft over 1.2 % of the picture
    return (background + mask * (face.astype(np.float32) - background)).round().astype(np.uint8)


def changed_share(before: np.ndarray, after: np.ndarray) -> float:
    """The share of tokens in which something moved between two frames without a camera's noise."""
    rows, columns = before.shape[0] // TOKEN, before.shape[1] // TOKEN
    difference = np.abs(after.astype(np.float32) - before)[: rows * TOKEN, : columns * TOKEN]
    tokens = difference.reshape(rows, TOKEN, columns, TOKEN, 3).mean(axis=(1, 3, 4))
    return float((tokens > MOVED_LEVELS).mean())


@functools.cache
def _object_size(share: float, width: int, height: int) -> float:
    """The size of the moving thing that changes `share` of the tokens on average, found by bisection."""
    background = _view("coffee", _box("coffee", width, height), width, height)
    low, high = 0.02, 0.5
    for _ in range(9):
        size = (low + high) / 2
        shown = [_with_object(background, size, t) for i in range(0, 32, 8) for t in (i, i + 1)]
        found = np.mean([changed_share(*pair) for pair in zip(shown[::2], shown[1::2], strict=True)])
        low, high = (size, high) if found < share else (low, size)
    return size


def changing(width: int, height: int, frames: int, share: float) -> Iterator[np.ndarray]:
    """A thing moves so that on average `share` of the tokens change from frame to frame; 1: the camera moves too."""
    if share < 1:
        background = _view("coffee", _box("coffee", width, height), width, height)
        size = _object_size(share, width, height)
        for i in range(frames):
            yield _with_object(background, size, i)
        return
    for i in range(frames):  # a photograph with detail everywhere: a plain wall would not change however it moves
        box = _box("chelsea", width, height, 0.5 + 0.4 * math.sin(0.15 * i), 0.5 + 0.4 * math.cos(0.15 * i), 1.35)
        yield _view("chelsea", box, width, height)


def talking(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """A person speaks in a still room: only the mouth and what is near it move."""
    left, top, right, bottom = _box("astronaut", width, height)
    scale = width / (right - left)
    picture = _view("astronaut", (left, top, right, bottom), width, height).astype(np.float32)
    mouth_x, mouth_y, reach = (228 - left) * scale, (158 - top) * scale, 24 * scale
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    near = np.exp(-(((x - mouth_x) / reach) ** 2 + ((y - mouth_y) / reach) ** 2) * 0.5)
    near[near < 0.02] = 0  # beyond three times the reach nothing moves at all
    for i in range(frames):
        opened = 0.5 - 0.5 * math.cos(0.9 * i) * math.cos(0.23 * i)  # syllables, louder and softer
        # The jaw goes down: each pixel comes from above.
        source = np.clip(y - 12 * scale * opened * near, 0, height - 1)
        row = source.astype(int)
        part = (source - row)[..., None]
        column = x.astype(int)
        below = np.minimum(row + 1, height - 1)
        yield ((1 - part) * picture[row, column] + part * picture[below, column]).round().astype(np.uint8)


def cut(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """Half a still scene, then another one at once."""
    for i in range(frames):
        name = "astronaut" if i < frames // 2 else "coffee"
        yield _view(name, _box(name, width, height), width, height)


SCENES: dict[str, Callable[[int, int, int], Iterator[np.ndarray]]] = {
    "still": still,
    "moving": moving,
    "pan": pan,
    "zoom": zoom,
    "talking": talking,
    "cut": cut,
    **{f"{share:.0%} changed": functools.partial(changing, share=share) for share in SHARES},
}


def scene(name: str, width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3) frames without a camera. ValueError for a name that is not in SCENES."""
    if name not in SCENES:
        raise ValueError(f"video is {name!r}. Allowed: {', '.join(SCENES)}.")
    return SCENES[name](width, height, frames)


def video(name: str, width: int, height: int, frames: int, seed: int = 0) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3) frames as a webcam gives them, the same for the same seed. ValueError as `scene`."""
    return camera(scene(name, width, height, frames), seed)
