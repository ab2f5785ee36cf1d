"""Every picture that enters the editor is normalised once: any file or mode becomes uint8 (H, W, 3) RGB.

`picture_files` opens them with Pillow; numpy carries. A person's camera, clipboard and disk hold palettes, alpha, CMYK,
16-bit scans, EXIF rotation and animations; the modules above see none of that. A person's picture changes its size only
by `fit`: cropped or padded, never stretched. `resample` is the model's side of it: Pillow's resampling for tensors, on
whatever device they are, so that a frame on the GPU need not come back to the CPU to be made smaller.
"""

import functools
import hashlib
import io

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.geometry import same_shape
from pipeline.picture_files import MAX_PIXELS, EditError, check_size, open_image


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


def _uint8_pixels(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as uint8 (B, H, W, 3)."""
    if tensor.dtype == torch.uint8:
        rows = tensor[None] if tensor.ndim == 3 else tensor
        if rows.ndim == 4 and rows.shape[3] == 3 and 0 not in rows.shape:
            check_size(rows.shape[2], rows.shape[1], MAX_PIXELS)
            return rows.detach()
    elif tensor.is_floating_point():
        rows = tensor[None] if tensor.ndim == 3 else tensor
        if rows.ndim == 4 and rows.shape[1] == 3 and 0 not in rows.shape:
            check_size(rows.shape[3], rows.shape[2], MAX_PIXELS)
            low, high = rows.aminmax()
            if not (low >= 0 and high <= 1):  # also catches NaN
                raise EditError(f"The float tensor spans {low.item()} to {high.item()}. Allowed: 0 to 1.")
            return (rows.detach().float() * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
    raise EditError(
        f"The tensor is {tensor.dtype} of shape {tuple(tensor.shape)}. Allowed: uint8 (H, W, 3) or (B, H, W, 3), "
        "float (3, H, W) or (B, 3, H, W) in [0, 1]."
    )
