"""Settings are refused by name, with what came and what is allowed; pictures are put into the form that they ask for."""

import dataclasses

import numpy as np
import pytest
from support.engine import edit
from support.pictures import grey

from engine import settings
from pipeline.images import EditError
from qwen_realtime import LIMITS, EditParams, EngineConfig, prepare_pictures

# Settings


@pytest.mark.parametrize(
    "changes, allowed",
    [
        ({"prompt": ""}, "1 to 2000 characters"),
        ({"prompt": " \n\t "}, "1 to 2000 characters"),
        ({"prompt": "x" * 2001}, "at most 2000 characters"),
        ({"prompt": None}, "at most 2000 characters"),
        ({"prompt": b"sepia"}, "at most 2000 characters"),
        ({"prompt": "half \ud800 pair"}, "valid Unicode"),
        ({"negative_prompt": "x" * 2001}, "at most 2000 characters"),
        ({"negative_prompt": 3}, "at most 2000 characters"),
        *(({"steps": bad}, "whole number from 1 to 8") for bad in (0, 9, -1, 2.5, True, "2", None, [2], float("nan"))),
        *(({"seed": bad}, "whole number from 0 to 4294967295") for bad in (-1, 2**32, 10**400, 0.5, False, "0", None)),
        *(({"width": bad}, "whole number from 1 to 2048") for bad in (0, -16, 2049, 256.5, True, "256", 10**400)),
        *(({"height": bad}, "whole number from 1 to 2048") for bad in (0, 2064, float("inf"), float("nan"), {})),
        *(
            ({"cfg_scale": bad}, "number from 1.0 to 10.0")
            for bad in (0.9, 10.1, float("nan"), float("inf"), True, "4")
        ),
        *(({"blend_ratio": bad}, "number from 0.0 to 1.0") for bad in (-0.01, 1.01, float("-inf"), False, None, 1j)),
        *(({"fit": bad}, "crop, pad") for bad in ("stretch", "", None, 1, ["crop"], np.array(["crop"]))),
        ({"mode": "composite"}, "edit, blend, references"),
        ({"reference_area": 1024}, "output, stock"),
        *(({"stream_batch": bad}, "true, false") for bad in (1, 0, "true", None, 1.0)),
        *(({"transition_frames": bad}, "whole number from 0 to 120") for bad in (-1, 121, 1.5, True)),
        ({"start_from_previous": 0.95}, "number from 0.0 to 0.9"),
        ({"cfg_mode": "self"}, "full, none, batched, self_negative, onetime_negative"),
        ({"reuse": True}, "off, steps, frames"),
        ({"transition": "sudden"}, "linear, spherical"),
    ],
)
def test_a_bad_setting_is_refused_by_name_with_what_came_and_what_is_allowed(changes, allowed):
    with pytest.raises(EditError) as caught:
        EditParams(**{"prompt": "sepia", **changes})
    (name,) = changes
    assert str(caught.value).startswith(name), caught.value
    assert allowed in str(caught.value), caught.value
    assert len(str(caught.value)) < 200, "a huge value must not fill the page"
    with pytest.raises(EditError):
        EditParams.from_dict({"prompt": "sepia", **changes})


def test_an_unknown_setting_raises_and_names_the_allowed_ones():
    with pytest.raises(EditError, match=r"'strength'.*prompt, negative_prompt, steps"):
        EditParams.from_dict({"prompt": "sepia", "strength": 1})
    with pytest.raises(EditError, match="prompt is empty"):
        EditParams.from_dict({"steps": 2})
    with pytest.raises(EditError, match="names and values"):
        EditParams.from_dict([("prompt", "sepia")])
    with pytest.raises(EditError, match="cfg_scale is 11"):
        edit().replace(cfg_scale=11)
    with pytest.raises(EditError, match="'size'"):
        edit().replace(size=64)


def test_both_ends_of_every_range_are_allowed():
    for name, (low, high) in LIMITS.items():
        for value in (low, high, np.float64(low)):
            assert getattr(edit(**{name: value}), name) == value


def test_settings_are_kept_in_one_form_and_frozen():
    params = EditParams(prompt="  sepia\n", steps=4.0, seed=np.int64(7), cfg_scale=2, width=np.int32(256))
    assert (params.prompt, params.steps, params.seed, params.cfg_scale, params.width) == ("sepia", 4, 7, 2.0, 256)
    assert {type(params.steps), type(params.seed), type(params.width)} == {int} and type(params.cfg_scale) is float
    assert hash(params) == hash(params.replace()) and params.replace(steps=1).steps == 1 and params.steps == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.steps = 2


@pytest.mark.parametrize(
    "bad",
    [{"max_sessions": 0}, {"idle_timeout_s": 0}, {"idle_timeout_s": float("nan")}, {"idle_timeout_s": 1e9},
     {"default_size": 250}, {"default_size": 4096}, {"max_pixels": 1}, {"reuse_sessions": -1}],
)  # fmt: skip
def test_a_bad_engine_config_raises_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineConfig(**bad)


# Pictures


def test_the_first_picture_gets_the_outputs_shape_and_the_others_keep_their_own():
    wide, tall = grey(10, 192, 64), grey(210, 64, 128)
    both = edit(mode="references")
    assert [p.shape for p in prepare_pictures([wide, tall], both, 96, 80)] == [(80, 96, 3), (124, 62, 3)]
    first, second = prepare_pictures([wide, tall], both.replace(reference_area="stock"), 96, 80)
    assert first.shape == (64, 77, 3), "cut to the shape, its pixels as they were"
    assert second is tall
    padded = prepare_pictures([wide], edit(fit="pad"), 64, 64)[0]
    assert padded[0].max() == 0 and padded[32].min() == 10, "pad shows all of the picture on black"
    padded = prepare_pictures([wide], edit(fit="pad", reference_area="stock"), 64, 64)[0]
    assert padded.shape == (192, 192, 3) and padded[0].max() == 0 and padded[96].min() == 10


@pytest.mark.parametrize("area, shape", [("output", (80, 96, 3)), ("stock", (64, 77, 3))])
def test_blend_makes_one_picture_of_two_by_the_ratio(area, shape):
    pictures = [grey(10, 192, 64), grey(210, 64, 128)]
    for ratio, value in ((0, 10), (0.25, 60), (1, 210)):
        params = edit(mode="blend", blend_ratio=ratio, reference_area=area)
        (mixed,) = prepare_pictures(pictures, params, 96, 80)
        assert mixed.shape == shape and abs(mixed.astype(int) - value).max() <= 1, (ratio, mixed.mean())


def test_every_setting_says_what_it_means_and_a_limit_or_choice_is_of_a_setting():
    fields = {field.name: field for field in dataclasses.fields(EditParams)}
    assert [name for name, field in fields.items() if not field.metadata.get("means", "").endswith(".")] == []
    assert {*settings.LIMITS, *settings.CHOICES, *settings.SWITCHES} <= set(fields)
