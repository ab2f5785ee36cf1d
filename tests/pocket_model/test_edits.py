"""The edits' answers are usable as truth: exact, repeatable, the same look at any size, and told apart from each other."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from pocket_model.edits import EDITS, split
from pocket_model.phrasings import WORDINGS, preset_prompts

SHAPES = [(128, 128), (160, 240), (256, 256)]  # (height, width); the middle one is neither square nor a power of two
BY_NAME = {edit.name: edit for edit in EDITS}


@pytest.fixture(scope="module")
def pictures(photo):
    """`pictures(height, width, count)` -> (B, 3, H, W) in [0, 1]."""

    def make(height: int, width: int, count: int = 2) -> torch.Tensor:
        arrays = [photo(width, height, seed) for seed in range(count)]
        return torch.stack([torch.from_numpy(a).permute(2, 0, 1).float() / 255 for a in arrays])

    return make


def answer(edit, pictures: torch.Tensor) -> torch.Tensor:
    """Two-picture edits get the batch and the batch rolled by one."""
    return edit.answer(pictures) if edit.pictures == 1 else edit.answer(pictures, pictures.roll(1, 0))


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def words(phrasing: str) -> str:
    return re.sub(r"[^a-z0-9& ]", "", phrasing.lower()).strip()


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_an_answer_is_a_picture_of_the_same_shape(edit, pictures):
    for height, width in SHAPES:
        source = pictures(height, width)
        out = answer(edit, source)
        assert out.shape == source.shape and out.dtype == torch.float32
        assert torch.isfinite(out).all()
        low, high = out.min().item(), out.max().item()
        assert low >= -1e-6 and high <= 1 + 1e-6, f"{height}x{width}: {low}..{high}"  # 1e-6: sums of float32 weights


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_a_flat_picture_gives_a_finite_picture(edit, value):
    """No edge, no variance, no range: every division in the filters meets its zero here."""
    out = answer(edit, torch.full((2, 3, 128, 128), value))
    assert torch.isfinite(out).all()
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6, (out.min().item(), out.max().item())


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_an_answer_repeats_and_leaves_its_input_alone(edit, pictures):
    source = pictures(128, 128)
    before = source.clone()
    first, second = answer(edit, source), answer(edit, source)
    assert torch.equal(first, second)
    assert torch.equal(source, before)
    first.zero_()  # a view of the input would carry this back into it
    assert torch.equal(source, before)


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_a_batch_gives_what_single_pictures_give(edit, pictures):
    first = pictures(128, 160, 3)
    sources = (first, first.roll(1, 0))[: edit.pictures]
    together = edit.answer(*sources)
    apart = torch.cat([edit.answer(*(s[i : i + 1] for s in sources)) for i in range(3)])
    worst = (together - apart).abs().max().item()
    assert worst < 1e-4, worst  # another convolution order moves the last bits, and steep curves amplify them


@pytest.mark.parametrize("name", ["mirror", "upside down", "negative"])
def test_applied_twice_it_gives_the_picture_back(name, pictures):
    source = pictures(128, 160)
    twice = BY_NAME[name].answer(BY_NAME[name].answer(source))
    assert (twice - source).abs().max() < 1e-6  # 1 - (1 - x) rounds


def test_turning_goes_the_way_its_name_says():
    source = torch.zeros(1, 3, 128, 160)
    source[..., :64, :40] = 1  # upper left
    assert BY_NAME["mirror"].answer(source)[..., :64, 120:].min() == 1
    assert BY_NAME["upside down"].answer(source)[..., 64:, :40].min() == 1
    assert torch.equal(BY_NAME["keep unchanged"].answer(source), source)


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.name)
def test_the_look_does_not_depend_on_the_size(edit):
    """The answer at 384, made smaller, is the answer of the smaller picture: radii, lines and cells scale with it."""
    large = F.interpolate(
        torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(4)), (384, 384), mode="bicubic"
    ).clamp(0, 1)
    small = F.interpolate(large, (192, 192), mode="area")
    distance = rms(F.interpolate(answer(edit, large), (192, 192), mode="area"), answer(edit, small))
    # Radii and shifts are whole pixels (up to a quarter off at 192), and the inset's size is a multiple of 8.
    assert distance < (0.12 if edit.name == "corner" else 0.06), f"{distance:.3f}"


@pytest.mark.parametrize("count", [1, 2])
def test_every_two_edits_differ(count, pictures):
    """The evaluation asks which answer is nearest: what two edits make of ordinary pictures must lie well apart."""
    source = pictures(128, 128, 4)
    answers = {edit.name: answer(edit, source) for edit in EDITS if edit.pictures == count}
    pairs = {(a, b): rms(answers[a], answers[b]) for a, b in itertools.combinations(answers, 2)}
    near = min(pairs, key=pairs.get)
    assert pairs[near] >= 0.05, f"{near}: {pairs[near]:.3f}"


def test_a_tint_keeps_light_and_shade(pictures):
    source = pictures(128, 128)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    luma = (source * weights).sum(1)
    for edit in EDITS:
        if edit.family == "tint":
            off = ((edit.answer(source) * weights).sum(1) - luma).abs().mean().item()
            assert off < 0.03, f"{edit.name}: {off:.3f}"  # clipping of bright saturated pixels


def test_two_pictures_land_where_the_edit_says():
    red, blue = torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256)
    red[:, 0], blue[:, 2] = 1, 1
    beside = BY_NAME["side by side"].answer(red, blue)
    assert torch.equal(beside[..., :128], red[..., :128]) and torch.equal(beside[..., 128:], blue[..., 128:])
    assert torch.allclose(BY_NAME["blend"].answer(red, blue), (red + blue) / 2)
    inset = BY_NAME["corner"].answer(red, blue)
    assert torch.equal(inset[0, :, 200, 200], blue[0, :, 0, 0])
    assert torch.equal(inset[0, :, 100, 100], red[0, :, 0, 0])
    white = (inset.amin(1) == 1).sum().item()
    assert white == 96 * 96 - 88 * 88, white  # the frame: 4 pixels round an inset of 88
    moved = BY_NAME["colour transfer"].answer(red * 0.5 + 0.2, blue * 0.5 + 0.2).mean((0, 2, 3))
    assert moved[2] > moved[0] + 0.3, moved


def test_no_phrasing_belongs_to_two_edits():
    owner: dict[str, str] = {}
    for edit in EDITS:
        for phrasing in edit.phrasings:
            assert owner.setdefault(words(phrasing), edit.name) == edit.name, (phrasing, edit.name)


def test_names_are_unique_and_families_have_many_phrasings():
    assert len(BY_NAME) == len(EDITS)
    for family in {edit.family for edit in EDITS}:
        count = len({words(p) for edit in EDITS if edit.family == family for p in edit.phrasings})
        assert count >= 35, f"{family}: {count}"


def test_a_part_of_every_edits_phrasings_is_held_out():
    held_total = total = 0
    for edit in EDITS:
        training, held = split(edit)
        assert training and held, edit.name
        assert not {words(p) for p in training} & {words(p) for p in held}, edit.name
        assert sorted(training + held) == sorted(edit.phrasings), edit.name
        held_total, total = held_total + len(held), total + len(edit.phrasings)
    share = held_total / total
    assert math.isclose(share, 0.1, abs_tol=0.03), f"{share:.3f}"


def test_presets_have_labels_and_sentences():
    presets = preset_prompts()
    assert len({label for label, _ in presets}) == len(presets) >= 20
    assert all(label.strip() and prompt.strip() for label, prompt in presets)
    for edit in EDITS:
        assert WORDINGS[edit.family].pictures == edit.pictures, edit.name
