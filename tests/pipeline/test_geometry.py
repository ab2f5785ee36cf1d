"""Sizes and shapes: arithmetic, and what an unedited picture looks like after the way through the engine."""

import math

import numpy as np
import pytest
import torch

from engine.fitting import LONGEST, Fitted, at_output_size, framed, size_in_shape
from pipeline.geometry import in_shape, on_grid, padded, same_shape
from pipeline.images import EditError, fit, fit_in_shape
from qwen_realtime import EditParams

SHAPES = [(1000, 667), (431, 777), (1920, 1080), (3000, 600), (64, 64), (97, 61), (37, 41), (1, 1), (5, 900), (5000, 25)]


def edit(**changes) -> EditParams:
    return EditParams(prompt="keep it unchanged", **changes)


def ramp(width: int, height: int) -> np.ndarray:
    """Every pixel says where it is: red across, green down."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([across, down, 0 * down], axis=2).round().astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [64, 256, 512, 1024])
def test_the_size_has_the_pictures_shape_within_a_pixel_and_the_area_asked_for(shape, side):
    w, h = size_in_shape(shape, side)
    short, long = min(shape), max(shape)
    assert abs(min(w, h) - max(w, h) * short / long) <= 0.5 or min(w, h) == 1, (w, h)
    assert min(w, h) >= 1 and max(w, h) <= LONGEST
    if max(w, h) < LONGEST:
        assert abs(math.sqrt(w * h) / side - 1) <= 1 / min(w, h), (w, h)
    assert size_in_shape((w, h), side) == (w, h), "what was sized once stays as it is"
    assert same_shape(shape, (w, h))


def test_one_side_keeps_the_shape_and_one_that_would_be_too_long_is_refused_with_both_sizes():
    assert size_in_shape((1000, 667), 256, width=500) == (500, 334)
    assert size_in_shape((1000, 667), 256, height=500) == (750, 500)
    assert size_in_shape((1000, 667), 256, 500, 500) == (500, 500)
    with pytest.raises(EditError, match=r"5x900 would become 100x18000\. Allowed: sides of at most 2048"):
        size_in_shape((5, 900), 256, width=100)


def test_the_same_shape_is_that_within_a_pixel_of_the_result():
    assert same_shape((1000, 667), (304, 203)) and same_shape((1000, 667), (304, 202))
    assert not same_shape((1000, 667), (304, 208)) and not same_shape((3, 2), (512, 512))


def test_the_grid_is_met_by_repeating_the_edge():
    picture = ramp(37, 21)
    on = padded(picture)
    assert on.shape == (32, 48, 3) and np.array_equal(on[:21, :37], picture)
    assert (on[:21, 37:] == picture[:, -1:]).all() and (on[21:, :37] == picture[-1:]).all()
    assert np.array_equal(padded(torch.from_numpy(picture)[None])[0].numpy(), on)
    even = ramp(48, 32)
    assert padded(even) is even and on_grid(1, 17) == (16, 32)


@pytest.mark.parametrize("shape", [(1000, 667), (431, 777), (97, 61), (3000, 600)])
def test_a_picture_of_the_shape_is_scaled_whole_and_one_of_another_is_cut_or_padded_with_a_note(shape):
    picture = ramp(*shape)
    kept = at_output_size([picture], edit(), 128)
    assert kept.notes == () and kept.images[0].shape == (*kept.size[::-1], 3)
    corners = kept.images[0][[0, 0, -1, -1], [0, -1, 0, -1], :2].astype(int)
    assert np.abs(corners - [[0, 0], [255, 0], [0, 255], [255, 255]]).max() <= 3, "all four corners are there"
    assert at_output_size(kept, edit(), 999) is kept
    for kind, word in (("crop", "cut"), ("pad", "padded with black")):
        result = at_output_size([picture], edit(width=100, height=100, fit=kind), 128)
        assert result.size == (100, 100)
        assert result.notes == (f"fit: picture 1 of {shape[0]}x{shape[1]} was {word} to the shape of 100x100",)


def test_fitting_a_shape_keeps_the_pixels_as_they_are():
    picture = ramp(90, 60)
    cut, shown = fit_in_shape(picture, 10, 10, "crop"), fit_in_shape(picture, 10, 10, "pad")
    assert np.array_equal(cut, picture[:, 15:75])
    assert shown.shape == (90, 90, 3) and np.array_equal(shown[15:75], picture) and not shown[:15].any()
    assert fit_in_shape(picture, 31, 21) is picture, "the shape within a pixel"
    with pytest.raises(EditError, match="stretch"):
        fit_in_shape(picture, 10, 10, "stretch")


def test_a_reference_at_another_resolution_lies_on_its_grid_as_the_output_on_its_own():
    on = framed(ramp(900, 600), 75, 50)
    assert on.shape == (768, 960, 3), "as 80x64 to 75x50"
    assert (on[:600, 900:] == on[:600, 899:900]).all()


def test_each_reference_is_whole_in_its_own_shape():
    bands = np.zeros((900, 300, 3), np.uint8)
    for i in range(3):
        bands[300 * i : 300 * (i + 1), :, i] = 255
    wide = fit(bands.swapaxes(0, 1), 960, 400)
    images = at_output_size([wide, bands, bands[:, :100]], edit(mode="references"), 128).images
    assert (198 * 82, 74 * 221, 42 * 382) == (16236, 16354, 16044), "near 128 * 128"
    assert [image.shape[1::-1] for image in images] == [(198, 82), (74, 221), (42, 382)]
    for image in images[1:]:
        thirds = [third.reshape(-1, 3).mean(0).argmax() for third in np.array_split(image, 3)]
        assert thirds == [0, 1, 2], "red, green and blue are all there"


def test_by_area_no_side_leaves_its_bounds():
    assert in_shape((5000, 25), area=256 * 256, longest=2048) == (2048, 10)
    assert in_shape((1, 1), area=0.1, longest=2048) == (1, 1)
    assert isinstance(at_output_size([ramp(5, 900)], edit(), 256), Fitted)
