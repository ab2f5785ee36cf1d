"""What reading a picture file will cost, told from its markers, without decoding anything.

A file of 100 kB can ask for minutes of work: a progressive JPEG repeats a scan over 64 megapixels a thousand times, or a
header consists of a million empty segments. Here the markers are counted. JPEG, PNG, WebP, GIF and BMP say enough of
themselves for an estimate; the other formats do not, and are taken for expensive.

The estimate is in pixels: how many are computed, each scan of a JPEG again. 100 million take about a second.
"""

import re
import struct
from dataclasses import dataclass

from pipeline.picture_files import EditError

MAX_SCANS = 100  # of a JPEG; encoders write about 10
MAX_SEGMENTS = 2_000  # of a JPEG, scans not counted; a colour profile has at most 255
MAX_CHUNKS = 40_000  # of a PNG; 64 MB in pieces of 4 kB are 16,000
MAX_WORK = 2_000_000_000  # pixels times scans; what no file says of itself counts as much
_WEIGHT = 2  # a pixel of a PNG, WebP or GIF takes about as long as two of a JPEG
_PIECE = 2**20  # searched at a time, so that other threads get their turn

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # not a stuffed zero, a fill byte or a restart
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF: the ones between are tables
_ALONE = frozenset((0x01, 0xD8, *range(0xD0, 0xD8)))  # markers without a segment


@dataclass(frozen=True)
class Cost:
    """`work` in pixels. `extra_bytes` are what a file carries in addition to pixels (EXIF, profiles, text).

    `size` is (width, height) of a format whose reader takes no longer than `work` says, whatever follows; else None.
    """

    work: int
    extra_bytes: int = 0
    size: tuple[int, int] | None = None


def inspect(data: bytes) -> Cost:
    """What opening this file costs at most. Raises EditError on a file that asks for more than any honest one does."""
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    size = _simple_size(data)
    return Cost(MAX_WORK if size is None else min(size[0] * size[1] * _WEIGHT, MAX_WORK))


def _jpeg(data: bytes) -> Cost:
    at, scans, segments, extra, size = 2, 0, 0, 0, None
    while (marker := _next_marker(data, at)) is not None:
        if not scans:
            extra += marker - at  # fill bytes, which Pillow reads one by one
        kind, at = data[marker + 1], marker + 2
        if kind == 0xD9:  # the end; what follows is another picture, which is not opened
            break
        if kind in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if kind == 0xDA:
            scans += 1
        else:
            segments += 1
        if kind in _FRAMES and size is None and len(data) >= at + 7:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = width, height
        elif kind == 0xFE or 0xE0 <= kind <= 0xEF:
            extra += length
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise EditError(
                f"The JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments: no camera or program writes so "
                "many. Save it again and resend."
            )
        if size is not None and size[0] * size[1] * scans > MAX_WORK:
            raise EditError(
                f"The JPEG computes {size[0] * size[1]:,} pixels {scans} times. Allowed: {MAX_WORK:,} in all. Save it as a "
                "baseline JPEG, or smaller, and resend."
            )
        at += max(length, 2)
    return Cost(MAX_WORK) if size is None else Cost(size[0] * size[1] * max(scans, 1), extra, size)


def _next_marker(data: bytes, at: int) -> int | None:
    while at < len(data):
        found = _MARKER.search(data, at, at + _PIECE + 1)
        if found is not None:
            return found.start()
        at += _PIECE
    return None


def _png(data: bytes) -> Cost:
    if len(data) < 24:
        return Cost(MAX_WORK)
    width, height = struct.unpack_from(">II", data, 16)
    at, chunks, extra = 8, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise EditError(f"The PNG has more than {MAX_CHUNKS:,} chunks. Save it again and resend.")
        if kind == b"IEND":
            break
        extra += length if kind not in (b"IHDR", b"PLTE", b"IDAT") else 0
        at += 12 + length
    return Cost(min(width * height * _WEIGHT, MAX_WORK), extra, (width, height))


def _simple_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP, GIF or BMP whose header is whole, None of anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        if data[12:16] == b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if data[12:16] == b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        return struct.unpack_from("<HH", data, 6)
    if data[:2] == b"BM" and len(data) >= 26 and int.from_bytes(data[14:18], "little") >= 40:
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(width), abs(height)
    return None
