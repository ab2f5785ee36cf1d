"""Every picture that enters the editor is normalised here, once: any file or mode becomes uint8 (H, W, 3) RGB.

Pillow opens; numpy carries. A person's camera, clipboard and disk hold palettes, alpha, CMYK, 16-bit scans, EXIF
rotation and animations; the modules above see none of that. Sizes are checked on the header, before a pixel is
decoded, so that a small file that claims a billion pixels costs nothing. A person's picture changes its size only by
`fit`: cropped or padded, never stretched. `resample` is the model's side of it: Pillow's resampling for tensors, on
whatever device they are, so that a frame on the GPU need not come back to the CPU to be made smaller.

What a person can act on is raised as `EditError`, here and in every module above: the page shows its text, HTTP sends
it with a 4xx. The text says what came and what is allowed.
"""

import contextlib
import functools
import hashlib
import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from pipeline.geometry import same_shape

MAX_PIXELS = 64_000_000
_MAX_ASPECT = 200  # of width to height: more than this is no picture, and resizing it would make lines of one pixel
# What cameras, browsers and scanners write (JPEG includes MPO). Pillow knows more; one of them (EPS) runs another program on the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "DIB", "TGA")
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

    Alpha is laid over white, EXIF rotation applied, 16-bit scaled to 8, of an animation the first frame is taken.
    A numpy array may be uint8, uint16 or float in [0, 1], of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
    Raises EditError on what is empty, broken, cut off, no picture, or more than `max_pixels` pixels.
    """
    if isinstance(data, np.ndarray):
        data = _from_array(data)
        if data.ndim == 3 and data.shape[2] == 3:
            _check_size(data.shape[1], data.shape[0], max_pixels)
            return np.ascontiguousarray(data)
        data = Image.fromarray(data)
    if isinstance(data, (bytes, bytearray, memoryview)):
        if len(data) == 0:
            raise EditError("The picture is empty (0 bytes). Send a JPEG, PNG, WebP or another picture file.")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)  # reads the header only
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
    _check_size(*image.size, max_pixels)
    try:
        return np.array(_to_rgb(image))  # a copy: what Pillow lends is read-only
    except _OPEN_ERRORS as error:
        raise EditError(f"The picture is broken or cut off ({error}). Save it again and resend.") from None


def fit(image: np.ndarray, width: int, height: int, mode: str = "crop", quick: bool = False) -> np.ndarray:
    """The picture at (height, width, 3), aspect kept: "crop" fills and cuts the middle, "pad" shows all on black.

    `image` is uint8 (H, W, 3). Returned unchanged when it already has the size; scaled as a whole when it has the shape
    (`geometry.same_shape`): nothing is cut or padded for a fraction of a pixel. Bicubic, or `quick` (bilinear): to
    512x512 from half of that 3 ms in place of 4.4.
    """
    _check_fit(width, height, mode)
    h, w = image.shape[:2]
    if (w, h) == (width, height):
        return image
    picture, filter_ = Image.fromarray(image), Image.Resampling.BILINEAR if quick else Image.Resampling.BICUBIC
    if same_shape((w, h), (width, height)):
        return np.array(picture.resize((width, height), filter_, reducing_gap=3.0))
    if mode == "crop":
        scale = max(width / w, height / h)
        box_w, box_h = width / scale, height / scale
        left, top = max(0.0, (w - box_w) / 2), max(0.0, (h - box_h) / 2)
        box = (left, top, min(w, left + box_w), min(h, top + box_h))  # min, max: rounding must not leave the picture
        # One resampling straight from the box: no intermediate picture, the crop is exact to a fraction of a pixel.
        return np.array(picture.resize((width, height), filter_, box=box, reducing_gap=3.0))
    scale = min(width / w, height / h)
    inner = (max(1, min(width, round(w * scale))), max(1, min(height, round(h * scale))))
    result = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    resized = picture.resize(inner, filter_, reducing_gap=3.0)
    result[top : top + inner[1], left : left + inner[0]] = np.asarray(resized)
    return result


def fit_in_shape(image: np.ndarray, width: int, height: int, mode: str = "crop") -> np.ndarray:
    """The picture cut or padded to the shape of `width` x `height`, its pixels as they are; see `fit`."""
    _check_fit(width, height, mode)
    h, w = image.shape[:2]
    if same_shape((w, h), (width, height)):
        return image
    scale = (min if mode == "crop" else max)(w / width, h / height)
    target_w, target_h = max(1, round(width * scale)), max(1, round(height * scale))
    if mode == "crop":
        left, top = (w - target_w) // 2, (h - target_h) // 2
        return np.ascontiguousarray(image[top : top + target_h, left : left + target_w])
    left, top = (target_w - w) // 2, (target_h - h) // 2
    return np.pad(image, ((top, target_h - h - top), (left, target_w - w - left), (0, 0)))


def _check_fit(width: int, height: int, mode: str) -> None:
    if mode not in ("crop", "pad"):
        raise EditError(f'The fit is "{mode}". Allowed: "crop", "pad".')
    if width < 1 or height < 1:
        raise EditError(f"The size is {width}x{height}. Both sides must be at least 1.")


def resample(pixels: torch.Tensor, width: int, height: int, method: str) -> torch.Tensor:
    """uint8 (B, H, W, 3) to uint8 (B, height, width, 3) as Pillow does it; `method` is "lanczos" or "bicubic".

    On the CPU it is Pillow. Elsewhere it is two matrix products with Pillow's own coefficients, rounded to 8 bits
    after each as Pillow rounds: at most 1.3 values in a thousand differ, by one level. torch's own antialiased
    bicubic differs in a fifth of the values, by up to 24 levels (it does not clip between the passes), and torch has
    no Lanczos.
    """
    if pixels.shape[1:3] == (height, width):
        return pixels
    if pixels.device.type == "cpu":
        filter_ = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}[method]
        resized = [np.array(Image.fromarray(p.numpy()).resize((width, height), filter_)) for p in pixels]
        return torch.from_numpy(np.stack(resized))
    return _resample_by_matrix(pixels, width, height, method)


class Pictures:
    """One reference slot: one picture for the whole batch, or one for each row. uint8 (b, H, W, 3), b = 1 or B."""

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels
        self._host = pixels  # where the digests are read from: asking the GPU for the bytes back would wait for it
        self._digests: list[bytes] | None = None

    @staticmethod
    def open(value) -> "Pictures":
        """What `open_image` reads, or a tensor: uint8 (H, W, 3) or (B, H, W, 3), float (3, H, W) or (B, 3, H, W) in
        [0, 1]. A list of such of one size is a batch. Raises EditError.
        """
        if isinstance(value, Pictures):
            return value
        if isinstance(value, (list, tuple)):
            rows = [Pictures.open(v).pixels for v in value]
            sizes = sorted({f"{r.shape[2]}x{r.shape[1]}" for r in rows})
            if len(sizes) != 1:
                raise EditError(f"A batch of pictures has the sizes {', '.join(sizes) or 'none'}. One size is allowed.")
            return Pictures(rows[0] if len(rows) == 1 else torch.cat(rows))  # of one, cat is a copy: 3 ms a megapixel
        if isinstance(value, torch.Tensor):
            return Pictures(_uint8_pixels(value))
        pixels = open_image(value)
        return Pictures(torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())[None])

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pixels.shape[2], self.pixels.shape[1]

    @property
    def digests(self) -> list[bytes]:
        """One content digest a picture. blake2b reads about 1 GB/s: 0.2 ms at 256x256."""
        if self._digests is None:
            rows = self._host.cpu().contiguous().numpy()
            shape = repr(rows.shape[1:]).encode()
            self._digests = [hashlib.blake2b(row.data, digest_size=16, key=shape).digest() for row in rows]
        return self._digests

    def on(self, device: torch.device) -> torch.Tensor:
        """The pixels on `device`; the copy replaces the original, so a frame crosses to the GPU once."""
        if self.pixels.device != device:
            self.pixels = _upload(self.pixels, device)
        return self.pixels

    def row(self, index: int) -> "Pictures":
        """The single picture that row `index` of the batch sees."""
        if len(self) == 1:
            return self
        one = Pictures(self.pixels[index : index + 1])
        one._host = self._host[index : index + 1]
        return one

    def repeat(self, times: int) -> "Pictures":
        """Each row of a batch `times` times in a row; a shared picture stays one."""
        if times == 1 or len(self) == 1:
            return self
        return Pictures(self.pixels.repeat_interleave(times, dim=0))


def download(pixels: torch.Tensor) -> np.ndarray:
    """A tensor's bytes on the host. From a GPU through pinned memory, which copies without a stop in between."""
    if not pixels.is_cuda:
        return pixels.numpy()
    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    torch.cuda.current_stream(pixels.device).synchronize()
    return host.numpy()


def _upload(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a GPU on a stream of its own: the copy runs while the GPU still computes what was asked before."""
    if device.type != "cuda" or pixels.is_cuda:
        return pixels.to(device)
    current, aside = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(aside):
        moved = pixels.pin_memory().to(device, non_blocking=True)
    current.wait_stream(aside)
    moved.record_stream(current)
    return moved


@functools.lru_cache(maxsize=8)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def blend(first: np.ndarray, second: np.ndarray, ratio: float) -> np.ndarray:
    """`second`, cropped to `first`'s size, mixed in: 0 = first alone, 1 = second alone. uint8 (H, W, 3) each."""
    if not 0.0 <= ratio <= 1.0:
        raise EditError(f"The blend ratio is {ratio}. Allowed: 0 (first picture only) to 1 (second picture only).")
    h, w = first.shape[:2]
    second = fit(second, w, h, "crop")
    mixed = first.astype(np.float32) * (1.0 - ratio) + second.astype(np.float32) * ratio
    return (mixed + 0.5).astype(np.uint8)


def encode_jpeg(rgb: np.ndarray, quality: int = 85) -> bytes:
    """uint8 (H, W, 3) as JPEG bytes. About 0.8 ms at 512x512, against 81 for PNG: the live view's format."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_png(rgb: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    """uint8 (H, W, 3) as PNG bytes, exact; `text` (prompt, seed, ...) is kept in the file as UTF-8 text chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, str(value))
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def _resample_by_matrix(pixels: torch.Tensor, width: int, height: int, method: str) -> torch.Tensor:
    h, w = pixels.shape[1:3]
    x = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    if w != width:  # across first, then down, 8 bits between: the order and the rounding are Pillow's
        x = (x @ _coefficients(w, width, method, pixels.device).T + 0.5).floor().clamp(0, 255)
    if h != height:
        x = (_coefficients(h, height, method, pixels.device) @ x + 0.5).floor().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@functools.lru_cache(maxsize=32)
def _coefficients(size_in: int, size_out: int, method: str, device: torch.device) -> torch.Tensor:
    """float32 (size_out, size_in), rows sum to 1: `precompute_coeffs` of Pillow's Resample.c."""
    reach = 3.0 if method == "lanczos" else 2.0
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # when shrinking the filter widens: that is the antialiasing
    matrix = np.zeros((size_out, size_in))
    for i in range(size_out):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - reach * stretch + 0.5))
        last = min(size_in, int(centre + reach * stretch + 0.5))
        weights = _FILTERS[method]((np.arange(first, last) - centre + 0.5) / stretch)
        matrix[i, first:last] = weights / weights.sum()
    matrix = np.round(matrix * 2**22) / 2**22  # Pillow's fixed point: decides which way an exact half rounds
    return torch.from_numpy(matrix).float().to(device)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS = {"lanczos": _lanczos, "bicubic": _bicubic}


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise EditError(f"The picture is {width}x{height}: it has no pixels.")
    if width * height > max_pixels:
        raise EditError(
            f"The picture is {width}x{height}, {width * height:,} pixels. At most {max_pixels:,} pixels are allowed."
        )
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise EditError(
            f"The picture is {width}x{height}. One side may be at most {_MAX_ASPECT} times the other: crop it first."
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


def _uint8_pixels(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as uint8 (B, H, W, 3)."""
    if tensor.dtype == torch.uint8:
        rows = tensor[None] if tensor.ndim == 3 else tensor
        if rows.ndim == 4 and rows.shape[3] == 3 and 0 not in rows.shape:
            _check_size(rows.shape[2], rows.shape[1], MAX_PIXELS)
            return rows.detach()
    elif tensor.is_floating_point():
        rows = tensor[None] if tensor.ndim == 3 else tensor
        if rows.ndim == 4 and rows.shape[1] == 3 and 0 not in rows.shape:
            _check_size(rows.shape[3], rows.shape[2], MAX_PIXELS)
            low, high = rows.aminmax()
            if not (low >= 0 and high <= 1):  # also catches NaN
                raise EditError(f"The float tensor spans {low.item()} to {high.item()}. Allowed: 0 to 1.")
            return (rows.detach().float() * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
    raise EditError(
        f"The tensor is {tensor.dtype} of shape {tuple(tensor.shape)}. Allowed: uint8 (H, W, 3) or (B, H, W, 3), "
        "float (3, H, W) or (B, 3, H, W) in [0, 1]."
    )


def _eight_bit(values: np.ndarray, white: float) -> np.ndarray:
    return (np.clip(values / white, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """First frame, rotated upright, over white, 8 bits, RGB."""
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image.load()
    with contextlib.suppress(*_OPEN_ERRORS):  # damaged EXIF: the pixels are good, only the hint how to turn is lost
        image = ImageOps.exif_transpose(image)
    # A deep or float picture has one channel and no alpha; Pillow's convert would clip it at 255, not scale it.
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.float64)
        # Mode I is 32-bit storage in which readers put 16-bit data; anything above that is scaled by its own top.
        image = Image.fromarray(_eight_bit(deep, max(65535.0, deep.max())))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = values.max()
        image = Image.fromarray(_eight_bit(values, 1.0 if top <= 1.0 else max(255.0, top)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
