"""Every pixel stays where it was: the alignment of `benchmarks.alignment`, at small sizes, on the embedded model."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from support.engine import serve

from benchmarks import alignment
from benchmarks.videos import PHOTOS
from cached_pipeline import stock
from engine.fitting import size_in_shape
from pipeline.images import fit, open_image
from qwen_realtime import EditParams, RealtimeEngine

SIDE = 112  # of a square of the results' area: a quarter of a second each


@pytest.fixture(scope="module")
def astronaut():
    return open_image((PHOTOS / "astronaut.jpg").read_bytes())


@pytest.fixture(scope="module")
def engine(pocket):
    with RealtimeEngine(pocket) as engine:
        yield engine
    pocket.disable_fast_path()


def test_the_measure_finds_a_shift_and_a_scale_of_a_pixel(astronaut):
    picture = Image.fromarray(fit(astronaut, 300, 200))
    same = np.asarray(picture)
    shifted = np.asarray(picture.transform((300, 200), Image.Transform.AFFINE, (1, 0, -1, 0, 1, 0.5), Image.Resampling.BICUBIC))
    wider = np.asarray(picture.resize((300, 200), Image.Resampling.BICUBIC, box=(1, 0, 299, 200)))
    assert alignment.displacement(same, same) == {"shift_px": (0, 0), "scale_px": (0, 0)}
    found = alignment.displacement(same, shifted)["shift_px"]
    assert found == (pytest.approx(1, abs=0.1), pytest.approx(-0.5, abs=0.1))
    found = alignment.displacement(same, wider)["scale_px"]
    assert found == (pytest.approx(2, abs=0.5), pytest.approx(0, abs=0.2))


@pytest.mark.parametrize("door", ["library", "engine", "POST /edit"])
@pytest.mark.parametrize("shape", [(1000, 667), (431, 777), (3000, 600), (64, 64), (97, 61)])
def test_an_unedited_picture_stays_where_it_was(pocket, engine, astronaut, door, shape):
    doors = {
        "library": alignment.library(pocket), "engine": alignment.engine_door(engine), "POST /edit": alignment.http(engine),
    }  # fmt: skip
    width, height = size_in_shape(shape, SIDE)
    row = alignment.measure(doors[door], astronaut, shape, width, None if door == "library" else height)
    assert (row["width"], row["height"]) == (width, height)
    assert row["largest_px"] <= alignment.LIMIT_PX, row


def test_a_size_that_was_rounded_by_hand_shifts_nothing(pocket, astronaut):
    """Its shape differs from the picture's by less than a token: the reference once had other tokens than the output."""
    row = alignment.measure(alignment.library(pocket), astronaut, (1000, 667), 304, 208)
    assert row["largest_px"] <= alignment.LIMIT_PX and row["psnr_db"] > 24, row


def test_without_a_size_the_result_has_the_pictures_shape_on_http(engine, astronaut):
    row = alignment.measure(alignment.http(engine), astronaut, (1000, 667), None, None)
    assert (row["width"], row["height"]) == (313, 209) and row["largest_px"] <= alignment.LIMIT_PX, row


def test_at_the_stock_area_the_reference_lies_on_its_grid_as_the_output_on_its_own(engine, pocket, astronaut, monkeypatch):
    """What the model makes of another grid is the model's: the embedded one never saw references of another area."""
    seen = {}
    references, prompt = pocket.encode_references, pocket.encode_prompt
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", 128 * 128)  # the real one is a megapixel: seconds on a CPU
    monkeypatch.setattr(
        pocket, "encode_references", lambda slots, **sizes: seen.update(framed=slots[0].size) or references(slots, **sizes)
    )
    monkeypatch.setattr(pocket, "encode_prompt", lambda text, slots: seen.update(read=slots[0].size) or prompt(text, slots))
    params = EditParams(alignment.PROMPT, width=75, reference_area="stock", steps=1)
    assert engine.edit([fit(astronaut, 150, 106)], params).image.shape == (53, 75, 3)
    assert seen == {"read": (150, 106), "framed": (160, 128)}, "as 80x64 to 75x53"


TECHNIQUES = {
    "reuse": {"reuse": "frames"},
    "still": {"blend_still": 0.8, "start_from_previous": 0.3, "motion_aware": True},
    "stream batch": {"stream_batch": True},
    "skip": {"skip_similar": "frame"},
    "guided": {"cfg_scale": 2.0, "cfg_mode": "self_negative"},
    "pace": {"target_fps": 120.0},
    "padded": {"fit": "pad", "height": 80},
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_works_at_sizes_that_are_not_the_models(engine, astronaut, name):
    params = EditParams(alignment.PROMPT, width=75, **TECHNIQUES[name])
    pictures = [fit(astronaut, 150, 106), fit(astronaut, 150, 106), 255 - fit(astronaut, 150, 106)]
    with engine.open_session() as session:
        results = serve(session, *zip(pictures, itertools.repeat(params)))
    size = (80, 75, 3) if name == "padded" else (53, 75, 3)
    if name != "pace":
        assert [result.image.shape for result in results] == [size] * 3
    else:
        assert all(result.image.shape[0] <= 53 for result in results)
    if name == "reuse":
        assert results[1].computed < 0.2 and results[2].computed == 1.0
        assert np.abs(results[0].image.astype(int) - results[1].image).mean() < 1
    if name == "skip":
        assert not results[2].skipped
    assert bool(results[0].notes) == (name in ("pace", "padded")), results[0].notes


def test_references_of_other_shapes_are_not_reused_and_the_notes_say_so(engine, astronaut):
    pictures = [fit(astronaut, 75, 53), fit(astronaut, 40, 90)]
    params = EditParams(alignment.PROMPT, width=75, mode="references", reuse="frames", blend_still=0.5)
    with engine.open_session() as session:
        results = [session.result(session.submit(pictures, params), 20) for _ in range(2)]
    assert results[1].image.shape == (53, 75, 3) and results[1].computed == 1.0
    assert results[1].notes == ("reuse: off, the references differ in shape",)


def test_the_batch_of_one_call_keeps_an_odd_size(pocket, astronaut):
    picture = torch.from_numpy(fit(astronaut, 75, 53))
    images = pocket(
        [[picture, 255 - picture]], alignment.PROMPT, width=75, reference_area="output", num_inference_steps=1,
        true_cfg_scale=1.0, output_type="np",
    ).images  # fmt: skip
    assert images.shape == (2, 53, 75, 3)
