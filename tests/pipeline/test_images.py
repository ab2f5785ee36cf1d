"""Any picture becomes uint8 RGB of the wanted size, or an EditError that says why not."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import images
from pipeline.images import EditError, Pictures, blend, encode_jpeg, encode_png, fit, open_image, resample


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def is_rgb(picture, height, width):
    assert picture.dtype == np.uint8 and picture.shape == (height, width, 3)
    assert picture.flags.c_contiguous and picture.flags.writeable
    return True


# --- opening ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_becomes_rgb(photo, mode):
    source = Image.fromarray(photo(48, 32))
    picture = source.convert("P").convert("RGBA").convert("P") if mode == "PA" else source.convert(mode)
    assert is_rgb(open_image(picture), 32, 48)


@pytest.mark.parametrize(
    "file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "MPO"]
)
def test_common_files_open_to_their_pixels(photo, file_format):
    source = photo(48, 48)
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 95} if file_format in ("JPEG", "MPO") else {}
    picture = open_image(saved(Image.fromarray(source), file_format, **options))
    assert is_rgb(picture, 48, 48)
    # GIF keeps 256 colours, JPEG is lossy: a few levels on average
    allowed = {"GIF": 20, "JPEG": 8, "MPO": 8}.get(file_format, 0)
    assert np.abs(picture.astype(int) - source).mean() <= allowed


def test_alpha_lies_over_white():
    for mode, clear, half in (("RGBA", (9, 9, 9, 0), (255, 0, 0, 128)), ("LA", (9, 0), (0, 128))):
        image = Image.new(mode, (2, 1))
        image.putdata([clear, half])
        picture = open_image(saved(image, "PNG"))
        assert picture[0, 0].tolist() == [255, 255, 255]
        assert picture[0, 1, 2] == pytest.approx(127, abs=1), "half transparent over white"


def test_a_palettes_transparent_colour_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.putdata([0, 1])
    picture = open_image(saved(image, "PNG", transparency=0))
    assert picture.tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(file_format):
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    picture = open_image(saved(Image.fromarray(deep), file_format))
    assert largest_difference(picture[:, :, 0].ravel(), np.arange(256)) <= 1


def largest_difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_float_pictures_are_scaled():
    assert open_image(Image.fromarray(np.float32([[0.0, 0.5, 1.0]])))[0, :, 0].tolist() == [0, 128, 255]
    assert open_image(Image.fromarray(np.float32([[0.0, 128.0, 255.0]])))[0, :, 0].tolist() == [0, 128, 255]
    assert open_image(Image.fromarray(np.float32([[np.nan, 510.0]])))[0, :, 0].tolist() == [0, 255]


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    picture = open_image(saved(red, "JPEG", quality=95))
    assert largest_difference(picture[8, 8], (220, 30, 40)) < 6


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0)), (2, (0, -1))])
def test_exif_rotation_is_applied(orientation, corner):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_image(saved(Image.fromarray(pixels), "PNG", exif=exif))
    assert picture.shape[:2] == ((32, 16) if orientation in (6, 8) else (16, 32))
    assert picture[corner].tolist() == [255, 255, 255]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of it
def test_damaged_exif_loses_the_rotation_not_the_picture():
    exif = b"Exif\x00\x00II*\x00\xff\xff\xff\x7f"
    assert is_rgb(open_image(saved(Image.new("RGB", (8, 4)), "JPEG", exif=exif)), 4, 8)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert largest_difference(open_image(data)[8, 8], (255, 0, 0)) < 5
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    assert largest_difference(open_image(opened)[8, 8], (255, 0, 0)) < 5, "whatever frame it stands on"


def test_numpy_arrays_of_the_usual_kinds(photo):
    rgb = photo(8, 6)
    assert np.array_equal(open_image(rgb), rgb)
    assert is_rgb(open_image(rgb[::-1, ::-1]), 6, 8)
    assert np.array_equal(open_image(rgb[:, :, 0])[:, :, 1], rgb[:, :, 0])
    assert np.array_equal(open_image(rgb[:, :, :1])[:, :, 2], rgb[:, :, 0])
    assert np.array_equal(open_image(rgb / 255.0), rgb)
    assert np.array_equal(open_image(rgb.astype(np.uint16) * 257), rgb)
    assert open_image(np.dstack([rgb, np.zeros((6, 8), np.uint8)])).min() == 255, "all transparent: white"
    assert open_image(np.eye(4, dtype=bool))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "array, says",
    [
        (np.zeros((4, 4, 2), np.uint8), "shape (4, 4, 2)"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape (2, 4, 4, 3)"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.full((4, 4, 3), 3.0), "spans 3.0 to 3.0"),
        (np.full((4, 4, 3), np.nan), "finite"),
    ],
)
def test_other_arrays_are_refused(array, says):
    with pytest.raises(EditError) as error:
        open_image(array)
    assert says in str(error.value) and "Allowed" in str(error.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, idat, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(8_001, 8_000), (10_000, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_before_it_is_decoded(size):
    with pytest.raises(EditError, match="At most 64,000,000 pixels"):
        open_image(png_header(*size))


def test_the_limit_is_a_parameter_and_counts_for_every_kind(photo):
    picture = photo(10, 10)
    for data in (picture, Image.fromarray(picture), encode_png(picture)):
        assert is_rgb(open_image(data, max_pixels=100), 10, 10)
        with pytest.raises(EditError, match=r"10x10, 100 pixels\. At most 99"):
            open_image(data, max_pixels=99)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged TIFF tags
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_broken_and_truncated_files_say_so(photo, file_format):
    data = saved(Image.fromarray(photo(64, 64)), file_format)
    for cut in (3, 20, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(EditError, match=r"can be read|broken or cut off"):
            open_image(data[:cut])
    random = np.random.default_rng(0)
    for _ in range(40):  # damaged anywhere: a picture or an EditError, nothing else
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 8):
            damaged[at] = random.integers(0, 256)
        try:
            picture = open_image(bytes(damaged), max_pixels=1_000_000)
            assert picture.dtype == np.uint8 and picture.ndim == 3
        except EditError:
            pass


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "0 bytes"),
        (b"hello", "5 bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        ("photo.jpg", "not str"),
        (None, "not NoneType"),
        ([1, 2], "not list"),
    ],
)
def test_what_is_no_picture_is_named(data, says):
    with pytest.raises(EditError) as error:
        open_image(data)
    assert says in str(error.value)


def test_a_format_that_runs_another_program_is_not_opened():
    with pytest.raises(EditError, match="not a picture that can be read"):
        open_image(saved(Image.new("RGB", (8, 8)), "EPS"))


def test_lines_are_no_pictures():
    with pytest.raises(EditError, match="One side may be at most 200 times the other"):
        open_image(np.zeros((1, 300, 3), np.uint8))
    assert is_rgb(open_image(np.zeros((1, 1, 3), np.uint8)), 1, 1)


# --- fitting ------------------------------------------------------------------------------------------------------------


def disc(width: int, height: int, radius: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    inside = (x - width / 2 + 0.5) ** 2 + (y - height / 2 + 0.5) ** 2 < radius**2
    return np.repeat(np.where(inside, 255, 40)[..., None], 3, axis=2).astype(np.uint8)


def test_quick_is_bilinear_which_never_overshoots_and_the_other_is_bicubic_which_does():
    """A step from 100 to 200, enlarged: cubic weights are negative beside an edge, a triangle's never are."""
    step = np.full((16, 16, 3), 100, np.uint8)
    step[:, 8:] = 200
    for mode, size in (("crop", (64, 64)), ("pad", (64, 80))):
        quick, careful = fit(step, *size, mode, quick=True), fit(step, *size, mode)
        inner = slice(8, 72) if mode == "pad" else slice(None)
        assert (quick[inner].min(), quick[inner].max()) == (100, 200)
        assert careful[inner].min() < 98 and careful[inner].max() > 202
        if mode == "crop":
            picture = Image.fromarray(step)
            for found, how in ((quick, Image.Resampling.BILINEAR), (careful, Image.Resampling.BICUBIC)):
                assert np.array_equal(found, np.asarray(picture.resize(size, how)))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("source", [(400, 200), (200, 400), (333, 333), (50, 70), (1280, 720)])
@pytest.mark.parametrize("size", [(128, 128), (256, 128), (96, 160)])
@pytest.mark.parametrize("quick", [False, True])
def test_a_disc_stays_round(mode, source, size, quick):
    picture = fit(disc(*source, radius=min(source) // 4), *size, mode, quick)
    assert is_rgb(picture, size[1], size[0])
    bright = picture[:, :, 0] > 150
    columns, rows = bright.any(axis=0).sum(), bright.any(axis=1).sum()
    pixel = max(size[0] / source[0], size[1] / source[1], 1.0)  # of the source, in the result: the disc's own steps
    assert abs(int(columns) - int(rows)) <= pixel, (columns, rows)


def test_crop_fills_and_keeps_the_middle_and_pad_shows_all():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, :100], picture[:, 100:200], picture[:, 200:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert largest_difference(fit(picture, 50, 50, "crop")[25, [2, 25, 47]], [[0, 255, 0]] * 3) <= 1
    padded = fit(picture, 90, 90, "pad")
    assert not padded[:29].any() and not padded[61:].any(), "black above and below"
    assert largest_difference(padded[45, [5, 45, 85]], [(255, 0, 0), (0, 255, 0), (0, 0, 255)]) <= 1


def test_a_fitting_picture_is_not_touched(photo):
    picture = photo(64, 48)
    for mode in ("crop", "pad"):
        assert fit(picture, 64, 48, mode) is picture


def test_fit_of_extreme_sizes():
    for source in ((1, 1), (1, 200), (2000, 11)):
        for mode in ("crop", "pad"):
            assert is_rgb(fit(np.full((source[1], source[0], 3), 9, np.uint8), 64, 32, mode), 32, 64)
    with pytest.raises(EditError, match=r'The fit is "stretch"\. Allowed: "crop", "pad"'):
        fit(np.zeros((4, 4, 3), np.uint8), 8, 8, "stretch")
    with pytest.raises(EditError, match="The size is 0x8"):
        fit(np.zeros((4, 4, 3), np.uint8), 0, 8)


def test_blend_is_between_the_two_at_the_firsts_size(photo):
    first, second = photo(60, 40), photo(100, 100, seed=1)
    assert np.array_equal(blend(first, second, 0.0), first)
    assert np.array_equal(blend(first, second, 1.0), fit(second, 60, 40, "crop"))
    half = blend(first, second, 0.5).astype(int)
    assert np.abs(half - (first.astype(int) + fit(second, 60, 40)) / 2).max() <= 0.5
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(EditError, match="The blend ratio is"):
            blend(first, second, ratio)


# --- encoding -----------------------------------------------------------------------------------------------------------


def test_png_is_exact_and_carries_text(photo):
    picture = photo(40, 30)
    data = encode_png(picture, {"prompt": "make it snow ☃", "seed": "7"})
    assert np.array_equal(open_image(data), picture)
    assert Image.open(io.BytesIO(data)).text == {"prompt": "make it snow ☃", "seed": "7"}
    assert Image.open(io.BytesIO(encode_png(picture))).text == {}


def test_jpeg_is_close_and_small(photo):
    picture = photo(64, 64)
    assert np.abs(open_image(encode_jpeg(picture, 95)).astype(int) - picture).mean() < 6
    assert len(encode_jpeg(picture, 30)) < len(encode_jpeg(picture)) < len(encode_png(picture))


# --- tensors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lanczos", "bicubic"])
@pytest.mark.parametrize(
    "source, size", [((256, 256), (384, 384)), ((384, 384), (392, 392)), ((640, 480), (448, 320)), ((90, 60), (90, 40))]
)
def test_resampling_without_pillow_is_pillows(photo, method, source, size):
    noise = np.random.default_rng(0).integers(0, 256, (*source[::-1], 3), dtype=np.uint8)
    pixels = torch.from_numpy(np.stack([photo(*source), noise]))
    ours = images._resample_by_matrix(pixels, *size, method)
    pillow = resample(pixels, *size, method)
    assert ours.shape == pillow.shape == (2, size[1], size[0], 3) and ours.dtype == torch.uint8
    difference = (ours.int() - pillow.int()).abs()
    # Exact halves fall differently in float32 than in Pillow's fixed point: by one level, here and there.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 2e-3


def test_resampling_to_the_same_size_is_nothing(photo):
    pixels = torch.from_numpy(photo(32, 32))[None]
    assert resample(pixels, 32, 32, "lanczos") is pixels


def test_digests_are_of_content_and_shape(photo):
    picture = photo(16, 8)
    (digest,) = Pictures.open(picture).digests
    assert Pictures.open(picture.copy()).digests == [digest]
    assert Pictures.open(Image.fromarray(picture)).digests == [digest]
    assert Pictures.open(torch.from_numpy(np.stack([picture, picture]))).digests == [digest, digest]
    changed = picture.copy()
    changed[7, 15, 2] ^= 1
    assert Pictures.open(changed).digests != [digest]
    assert Pictures.open(picture.reshape(16, 8, 3)).digests != [digest]


def test_rows_and_repeats_of_pictures(photo):
    one, two = Pictures.open(photo(8, 8)), Pictures.open([photo(8, 8), photo(8, 8, seed=1)])
    assert one.row(5) is one and one.repeat(3) is one
    assert two.size == (8, 8) and len(two) == 2
    assert two.row(1).digests == [two.digests[1]]
    assert two.repeat(2).digests == [two.digests[0]] * 2 + [two.digests[1]] * 2
