"""The process that opens hostile pictures: one at a time, from its standard input, until that ends.

    in   one letter (b"p": picture, b"t": text chunks), uint64 most pixels, uint64 n, n bytes of file  (little endian)
    out  b"r" once, when it is ready; then for each file one letter (b"p", b"t", b"e": an error's text), uint32 height,
         uint32 width, uint64 n, n bytes: pixels uint8 (height, width, 3), JSON or the text

Only Pillow and numpy are imported, so it starts in a fraction of a second. It limits its own memory and processor time
where the platform can; `serving.decoding` limits its time by the clock, and ends it. It ends by itself when it has had
nothing to do for `IDLE_S` or has opened a large picture: its memory is then given back for certain.
"""

import contextlib
import io
import json
import os
import signal
import struct
import warnings

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipeline.picture_files import EditError, open_image

try:
    import resource
except ImportError:  # Windows has none
    resource = None

REQUEST, REPLY = struct.Struct("<cQQ"), struct.Struct("<cIIQ")
IDLE_S = 60
LARGE_PIXELS = 8_000_000


def main(memory_bytes: int, processor_seconds: int) -> None:
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what a reader written in C prints must not come between the answers, nor fill a log
        os.dup2(silence, descriptor)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with contextlib.suppress(ImportError):  # an AV1 reader with a thread for each of many cores needs memory for each
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 2
    _limit("RLIMIT_AS", memory_bytes)
    _limit("RLIMIT_CORE", 0)
    if hasattr(os, "nice"):
        os.nice(5)  # live views come first
    target.write(b"r")
    target.flush()
    while True:
        _alarm(IDLE_S)
        header = source.read(REQUEST.size)
        _alarm(0)
        if len(header) < REQUEST.size:
            return
        kind, max_pixels, length = REQUEST.unpack(header)
        _limit("RLIMIT_CPU", int(sum(os.times()[:2])) + 1 + processor_seconds)
        pixels = _answer(target, kind, source.read(length), max_pixels)
        target.flush()
        if pixels > LARGE_PIXELS:
            return


def _answer(target, kind: bytes, data: bytes, max_pixels: int) -> int:
    """Writes the answer; returns how many pixels it had."""
    try:
        if kind == b"t":
            text = json.dumps(png_text(data)).encode()
            target.write(REPLY.pack(b"t", 0, 0, len(text)) + text)
            return 0
        pixels = open_image(data, max_pixels)
    except EditError as error:
        text = str(error)
    except MemoryError:
        text = "The picture needs too much memory to be opened. Save it again as PNG or JPEG, or smaller, and resend."
    except Exception as error:  # readers are foreign code with exceptions of their own; a damaged file is its sender's affair
        text = f"The picture cannot be read: its file is damaged ({type(error).__name__}). Save it again and resend."
    else:
        height, width = pixels.shape[:2]
        target.write(REPLY.pack(b"p", height, width, pixels.nbytes))
        target.write(pixels.data.cast("B"))
        return height * width
    told = text.encode(errors="replace")[:2000]
    target.write(REPLY.pack(b"e", 0, 0, len(told)) + told)
    return 0


def png_text(data: bytes) -> dict[str, str]:
    """What the PNG says of itself in words; empty for any other file."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            assert isinstance(image, PngImageFile)
            return {str(key): str(value) for key, value in image.text.items()}
    except Exception:  # whether it is a picture is said elsewhere
        return {}


def _limit(name: str, value: int) -> None:
    if resource is None or not hasattr(resource, name):
        return
    which = getattr(resource, name)
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(which, (value, hard))
    except (ValueError, OSError):  # macOS refuses some; the clock and the sizes still limit
        return


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)
