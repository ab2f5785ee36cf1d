"""Picture files that ask for far more than they are, made here."""

import functools
import io
import random
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], 2).astype(np.uint8)).convert(mode)


def repeated_scans(side: int, times: int) -> bytes:
    """A progressive JPEG whose last scan comes that often."""
    data = saved(Image.new("RGB", (side, side), "grey"), "JPEG", progressive=True, quality=5)
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, side: int = 64) -> bytes:
    data = saved(photo(side, side), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


@functools.cache
def huge_headers() -> dict[str, bytes]:
    """Of many formats, tiny files that claim 60,000 x 60,000 pixels or as much as the format can."""
    small = Image.new("RGB", (16, 16))
    jpeg, gif, bmp = bytearray(saved(small, "JPEG")), bytearray(saved(small, "GIF")), bytearray(saved(small, "BMP"))
    at = jpeg.find(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    webp, jp2 = bytearray(saved(small, "WEBP", lossless=True)), bytearray(saved(small, "JPEG2000"))
    webp[21:25] = struct.pack("<I", 16383 | 16383 << 14)
    for box in (jp2.find(b"ihdr") + 4, jp2.find(b"\xff\x51") + 6):
        jp2[box : box + 8] = struct.pack(">II", 60000, 60000)
    tiff = bytearray(saved(small, "TIFF"))
    entries = struct.unpack_from("<I", tiff, 4)[0]
    for entry in range(struct.unpack_from("<H", tiff, entries)[0]):
        where = entries + 2 + 12 * entry
        if struct.unpack_from("<H", tiff, where)[0] in (256, 257):
            tiff[where + 2 : where + 12] = struct.pack("<HII", 4, 1, 60000)
    png = png_with()
    png = png[:16] + struct.pack(">II", 60000, 60000) + png[24:29] + struct.pack(">I", zlib.crc32(png[12:16] + struct.pack(">II", 60000, 60000) + png[24:29])) + png[33:]  # fmt: skip
    icon_png = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png
    ppm = b"P6 60000 60000 255\n" + b"\0" * 99
    tga = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 60000, 60000, 24, 0) + b"\0" * 99
    made = {"jpeg": jpeg, "gif": gif, "bmp": bmp, "webp": webp, "jpeg 2000": jp2, "tiff": tiff, "png": png, "ico": icon_png, "ppm": ppm, "tga": tga}  # fmt: skip
    return {name: bytes(data) for name, data in made.items()}


@functools.cache
def bombs() -> dict[str, bytes]:
    """Files whose headers, text, profiles, frames or tiles are the attack; their pixels are few."""
    zeros = zlib.compress(bytes(900_000), 9)
    frame = b"\x21\xf9\x04\x00\x00\x00\x00\x00\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\x00\x02\x02\x44\x01\x00"
    gif = saved(Image.new("P", (64, 64)), "GIF")[:-1]
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 9)  # in tiles of 16 x 16
    tags = [(256, 4, 1, 4000), (257, 4, 1, 2000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (322, 3, 1, 16),
            (323, 3, 1, 16), (324, 4, 31_250, 8 + 2 + 9 * 12 + 4), (325, 4, 31_250, 8 + 2 + 9 * 12 + 4)]  # fmt: skip
    tiff += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4) + struct.pack("<I", 200) * 31_250
    noise = np.random.default_rng(0).integers(0, 255, (400, 400), np.uint8)
    return {
        "text": png_with(*[chunk(b"zTXt", b"prompt\0\0" + zeros)] * 200),
        "international text": png_with(*[chunk(b"iTXt", b"prompt\0\1\0\0\0" + zeros)] * 200),
        "profile": png_with(chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(30_000_000), 9))),
        "chunks": png_with(chunk(b"abCd", b"") * 300_000),
        "scans": repeated_scans(1000, 1500),
        "segments": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 300_000 + saved(photo(64, 64), "JPEG")[2:],
        "frames": gif + frame * 100_000 + b";",
        "extensions": gif[:13] + b"\x21\xfe\x01x\x00" * 100_000 + gif[13:] + b";",
        "tiles": tiff,
        "jpeg 2000 tiles": saved(Image.fromarray(noise), "JPEG2000", tile_size=(4, 4)),
        "fill bytes": b"\xff\xd8" + b"\xff" * 500_000 + saved(photo(64, 64), "JPEG")[2:],
        "stuffed zeros": saved(photo(64, 64), "JPEG")[:-2] + b"\xff\x00" * 2_000_000 + b"\xff\xd9",
    }


def flipped(count: int, seed: int):
    """Pictures of many formats with 1 to 64 of their bits turned."""
    rng = random.Random(seed)
    sources = [
        saved(photo(96, 64), "JPEG"), saved(photo(96, 64), "JPEG", progressive=True), saved(photo(96, 64), "PNG"),
        saved(photo(96, 64, "RGBA"), "PNG"), saved(photo(96, 64), "WEBP"), saved(photo(96, 64), "GIF"),
        saved(photo(96, 64), "BMP"), saved(photo(96, 64), "TIFF", compression="tiff_lzw"),
        saved(photo(96, 64), "TIFF", compression="jpeg"), saved(photo(96, 64), "JPEG2000"), saved(photo(96, 64), "AVIF"),
        saved(photo(64, 64), "ICO"), saved(photo(96, 64), "TGA"), saved(photo(96, 64), "PPM"),
    ]  # fmt: skip
    for number in range(count):
        data = bytearray(sources[number % len(sources)])
        for _ in range(rng.choice((1, 2, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(data)
