"""Any picture file, PIL image or array becomes uint8 (H, W, 3) RGB. Needs Pillow and numpy only.

Sizes are checked on the header, before a pixel is decoded: a small file that claims a billion pixels costs nothing. What
follows the header may still be hostile. `open_image` therefore suits pictures of the person who runs the program; a file
from outside goes through `serving.decoding`, which runs this module in a process that can be ended. That process is why
torch is not imported here: it starts in a fraction of a second.

What a person can act on is raised as `EditError`, here and in every module above: the page shows its text, HTTP sends
it with a 4xx. The text says what came and what is allowed.
"""

import contextlib
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
_STRIP_PIXELS = 2**18
MAX_ASPECT = 200  # of width to height: more than this is no picture, and resizing it would make lines of one pixel
# What cameras, browsers and scanners write (JPEG includes MPO). Pillow knows more; one of them (EPS) runs another program on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "DIB", "TGA")
# What Pillow's readers are seen to raise on damaged files.
_OPEN_ERRORS = (
    UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, TypeError,
    RuntimeError,  # AVIF's
    struct.error, zlib.error,
)  # fmt: skip
_BOMBS = (
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # its own limits: 179 and 89 megapixels


class EditError(ValueError):
    """What a person can act on: the text says what came and what is allowed."""


def named(value) -> str:
    """What came, for an error: its type and the beginning of what it is."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def clip(text: str, length: int = 100) -> str:
    """A name that came from elsewhere, for an error: printable and no longer than `length` characters."""
    text = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


def open_image(data, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`data` (file bytes, a PIL image or a numpy array) as uint8 (H, W, 3) RGB, C-contiguous.

    Alpha is composited over white, EXIF rotation applied, 16-bit scaled to 8, of an animation the first frame is taken.
    A numpy array may be uint8, uint16 or float in [0, 1], of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
    Raises EditError on what is empty, broken, cut off, no picture, or more than `max_pixels` pixels.
    """
    if isinstance(data, np.ndarray):
        data = _from_array(data)
        if data.ndim == 3 and data.shape[2] == 3:
            check_size(data.shape[1], data.shape[0], max_pixels)
            return np.ascontiguousarray(data)
        data = Image.fromarray(data)
    if isinstance(data, (bytes, bytearray, memoryview)):
        if len(data) == 0:
            raise EditError("The picture is empty (0 bytes). Send a JPEG, PNG, WebP or another picture file.")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
        except _BOMBS:
            raise EditError(f"The picture is too large. At most {max_pixels:,} pixels are allowed.") from None
        except _OPEN_ERRORS:
            raise EditError(
                f"The file ({len(data):,} bytes) is not a picture that can be read. "
                "Send a JPEG, PNG, WebP, GIF, BMP or TIFF."
            ) from None
    elif isinstance(data, Image.Image):
        image = data
    else:
        raise EditError(f"A picture was expected as bytes, a PIL image or a numpy array, not {type(data).__name__}.")
    check_size(*image.size, max_pixels)
    try:
        return _to_rgb(image, ours=image is not data)
    except _OPEN_ERRORS as error:
        raise EditError(f"The picture is broken or cut off ({error}). Save it again and resend.") from None


def is_line(width: int, height: int) -> bool:
    """Whether one side is so much longer than the other that neither a person nor the vision-language model sees a picture."""
    return max(width, height) > MAX_ASPECT * min(width, height)


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise EditError(f"The picture is {width}x{height}: it has no pixels.")
    if width * height > max_pixels:
        raise EditError(
            f"The picture is {width}x{height}, {width * height:,} pixels. At most {max_pixels:,} pixels are allowed."
        )
    if is_line(width, height):
        raise EditError(
            f"The picture is {width}x{height}. One side may be at most {MAX_ASPECT} times the other: crop it first."
        )


def _from_array(array: np.ndarray) -> np.ndarray:
    """The array as uint8 (H, W), (H, W, 3) or (H, W, 4), or uint16 (H, W)."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise EditError(f"The array has shape {array.shape}. Allowed: (H, W), (H, W, 1), (H, W, 3), (H, W, 4).")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return _eight_bit(array.astype(np.float64), 65535.0)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise EditError(f"The float array spans {array.min()} to {array.max()}. Allowed: 0 to 1, finite.")
        return _eight_bit(array, 1.0)
    raise EditError(f"The array is of {array.dtype}. Allowed: uint8, uint16, bool, float in [0, 1].")


def _eight_bit(values: np.ndarray, white: float) -> np.ndarray:
    return (np.clip(values / white, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _to_rgb(image: Image.Image, ours: bool) -> np.ndarray:
    """First frame, rotated upright, over white, 8 bits, RGB. The image itself is turned if it is `ours`: no copy then."""
    if image.tell() != 0:  # `n_frames` is not asked: for a GIF or a TIFF it walks through the whole file
        image.seek(0)
    image.load()
    with contextlib.suppress(*_OPEN_ERRORS):  # damaged EXIF: the pixels are good, only the hint how to turn is lost
        image = ImageOps.exif_transpose(image, in_place=ours) or image
    # A deep or float picture has one channel and no alpha; Pillow's convert would clip it at 255, not scale it.
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(np.asarray(image))
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        if image.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
        rgb[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return rgb


def _strips(image: Image.Image):
    """(top, the rows from there on): what is made of them on the way to RGB is then small compared with the picture."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _from_deep(deep: np.ndarray) -> np.ndarray:
    """int or float (H, W) as uint8 (H, W, 3)."""
    if deep.dtype.kind == "f":
        top = float(np.nanmax(deep, initial=0.0, where=np.isfinite(deep)))
        white = 1.0 if top <= 1.0 else max(255.0, top)
    else:  # mode I is 32-bit storage in which readers put 16-bit data; anything above that is scaled by its own top
        white = max(65535.0, float(deep.max()))
    rgb = np.empty((*deep.shape, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // deep.shape[1])
    for top in range(0, deep.shape[0], rows):
        strip = np.nan_to_num(deep[top : top + rows].astype(np.float64), posinf=white, neginf=0.0)
        rgb[top : top + rows] = _eight_bit(strip, white)[:, :, None]
    return rgb
