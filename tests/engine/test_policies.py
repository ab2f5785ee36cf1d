"""The engine's decisions, without a clock, a camera or luck."""

import numpy as np
import pytest

from engine.policies import (
    changed_tokens,
    looks_again,
    motion,
    motion_strength,
    neighbours,
    similarity,
    skips,
    still_tokens,
    thumbnail,
)
from engine.scheduling import HOLDER_IDLE_S, frame_rate, gives_way, idle_sessions, next_session, shown_ages, take_at


def test_next_session_is_the_one_whose_last_service_lies_furthest_back():
    assert next_session({1: 5.0, 2: 3.0, 3: 9.0}, now_monotonic=10.0) == 2
    assert next_session({7: 3.0, 4: 3.0}, now_monotonic=10.0) == 4, "equal waits go by the session opened first"


def test_every_session_is_served_once_per_round_whatever_newcomers_do():
    served = dict.fromkeys(range(5), 0.0)
    order = []
    for now in range(1, 26):
        served[4 + now] = float(now)  # a newcomer a frame
        order.append(next_session(served, now))
        served[order[-1]] = now + 0.5
    assert order[:5] == [0, 1, 2, 3, 4], order
    assert order.index(5) < order.index(10), "newcomers are served in the order they came"


def test_idle_means_quiet_for_the_timeout_or_longer():
    assert idle_sessions({1: 40.0, 2: 40.1, 3: 99.0}, now_monotonic=100.0, timeout_s=60.0) == [1]


def test_the_frame_rate_is_measured_over_the_window_and_falls_when_frames_stop():
    times = [i / 20 for i in range(21)]
    assert frame_rate(times, 1.0) == pytest.approx(20)
    assert frame_rate(times, 5.0) == pytest.approx(4)
    assert frame_rate(times, 20.0) == 0.0
    assert frame_rate([], 1.0) == frame_rate([1.0], 1.0) == frame_rate([1.0, 1.0], 1.0) == 0.0


def room(seed=0, face=False, shift=0):
    """A still room as a camera sees it: the same walls, new noise; with `face`, a mouth that has moved."""
    rows, columns = np.mgrid[0:240, 0:320]
    picture = 110 + 60 * np.sin(columns / 40) + 40 * np.cos(rows / 30)
    picture = np.roll(picture, shift, axis=1)[..., None].repeat(3, axis=2)
    if face:
        picture[100:112, 150:175] -= 60
    noise = np.random.default_rng(seed).normal(0, 3, picture.shape)
    return thumbnail((picture + noise).clip(0, 255).astype(np.uint8))


def test_camera_noise_is_alike_a_moving_mouth_only_to_the_frame_measure():
    still, noisy, speaking, panned = room(0), room(1), room(2, face=True), room(3, shift=25)
    for measure in ("frame", "patch"):
        assert similarity(measure, still, still) == pytest.approx(1, abs=1e-6)
        assert similarity(measure, noisy, still) > 0.99
        assert similarity(measure, panned, still) < 0.98
    assert similarity("frame", speaking, still) > 0.99, "blind to it"
    assert similarity("patch", speaking, still) < 0.97, "sees it"


def test_two_black_pictures_are_alike():
    black = np.zeros((64, 64, 3), np.float32)
    assert similarity("frame", black, black) == similarity("patch", black, black) == 1.0


def flat(level: float) -> np.ndarray:
    return np.full((64, 64, 3), level, np.float32)


def lit(share: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """The room's thumbnail in so much of its light."""
    shown = room() * share + np.random.default_rng(seed).normal(0, 1, (64, 64, 3)) * noise
    return shown.clip(0, 255).astype(np.float32)


@pytest.mark.parametrize(
    "what, before, now",
    [
        ("a scene after black", flat(0), lit(1)),
        ("black after a scene", lit(1), flat(0)),
        ("a lamp switched off", lit(1), lit(0.5)),
        ("a lamp switched on", lit(0.5), lit(1)),
        ("grey after black", flat(0), flat(128)),
        ("lighter grey", flat(100), flat(110)),
        ("white after black", flat(0), flat(255)),
        ("red light in place of blue", flat(40) + np.array([60, 0, 0]), flat(40) + np.array([0, 0, 60])),
        ("an exposure one stop up", lit(0.4), lit(0.8)),
        ("fog: half of the contrast at the same brightness", lit(1), (lit(1) + lit(1).mean()) / 2),
        ("the negative", lit(1), 255 - lit(1)),
    ],
)
@pytest.mark.parametrize("measure", ["frame", "patch"])
def test_brightness_counts_in_both_measures(measure, what, before, now):
    assert similarity(measure, now.astype(np.float32), before.astype(np.float32)) < 0.98, what


@pytest.mark.parametrize("level", [0, 20, 127.5, 128, 240, 255])
def test_an_even_picture_with_a_cameras_noise_is_alike_itself(level):
    pictures = [(flat(level) + np.random.default_rng(seed).normal(0, 1, (64, 64, 3))).astype(np.float32) for seed in (1, 2)]
    for measure in ("frame", "patch"):
        assert similarity(measure, *pictures) > 0.99, (measure, level)


def test_a_small_bright_thing_is_seen_by_patches():
    before, now = flat(0), flat(0)
    before[10:14, 10:14] = now[10:14, 40:44] = 255
    assert similarity("patch", now, before) <= 0.5
    assert similarity("frame", now, before) < 0.99, "a hundredth of the picture, moved"


def test_a_frame_is_skipped_with_the_probability_of_the_formula():
    draws = np.random.default_rng(0).random(20_000)
    for alike, threshold, expected in ((0.99, 0.98, 0.5), (0.995, 0.98, 0.75), (1.0, 0.98, 1.0), (0.97, 0.98, 0.0)):
        share = np.mean([skips(alike, threshold, 0, 10, draw) for draw in draws])
        assert share == pytest.approx(expected, abs=0.02), (alike, share)


def test_after_the_most_skips_in_a_row_a_frame_is_computed():
    assert [skips(1.0, 0.98, skipped, 3, 0.5) for skipped in range(5)] == [True, True, True, False, False]


def test_when_the_model_looks_anew():
    def looks(policy, frames=1, alike=1.0):
        return looks_again(policy, frames, every=3, alike=alike, threshold=0.95)

    assert looks("fresh") and not looks("kept", frames=1000, alike=0.0)
    assert [looks("every", frames) for frames in (1, 2, 3)] == [False, False, True]
    assert looks("changed", alike=0.9) and not looks("changed", frames=1000, alike=0.96)


def pixels(seed=0, noise=3.0, light=0.0) -> np.ndarray:
    """A still picture of 96x128 as a camera sees it: noise by seed, brightness `light` levels up."""
    rows, columns = np.mgrid[0:96, 0:128]
    picture = (110 + 60 * np.sin(columns / 9) + 40 * np.cos(rows / 7))[..., None].repeat(3, axis=2)
    return (picture + light + np.random.default_rng(seed).normal(0, noise, picture.shape)).clip(0, 255).astype(np.uint8)


def with_block(picture: np.ndarray, row: int, column: int, side=16, levels=40) -> np.ndarray:
    changed = picture.astype(int)
    changed[row : row + side, column : column + side] -= levels
    return changed.clip(0, 255).astype(np.uint8)


def test_a_token_has_changed_from_the_threshold_on_and_its_eight_neighbours_are_beside_it():
    before = pixels(noise=0)
    after = with_block(before, 32, 48, levels=5)
    assert not changed_tokens(after, before, 5.1).any()
    changed = changed_tokens(after, before, 5.0)
    assert changed.shape == (6, 8) and changed.dtype == bool and changed.sum() == 1 and changed[2, 3]
    around = neighbours(changed)
    assert around.sum() == 8 and not around[2, 3] and around[1:4, 2:5].sum() == 8
    corner = neighbours(changed_tokens(with_block(before, 0, 0, levels=50), before, 6.0))
    assert corner.sum() == 3 and corner[:2, :2].sum() == 3


def test_camera_noise_changes_no_token_and_a_cut_changes_all():
    assert not changed_tokens(pixels(1), pixels(2), 6.0).any()
    assert changed_tokens(pixels(1), 255 - pixels(1), 6.0).mean() > 0.9


def test_each_difference_counts_in_both_directions():
    dark, light = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert changed_tokens(dark, light, 255.0).all() and changed_tokens(light, dark, 255.0).all()


def test_what_is_still_is_still_through_noise_and_flicker_of_the_light_and_an_edge_that_moves_is_not():
    assert still_tokens(pixels(1), pixels(2, light=0.6)).min() == 1.0
    still = still_tokens(with_block(pixels(1), 36, 52, side=4, levels=60), pixels(2))
    assert still.shape == (6, 8) and still.dtype == np.float32
    assert still[1:4, 2:5].max() == 0.0 and still[0].min() == still[:, 6:].min() == 1.0


def test_stillness_fades_out_evenly_between_the_two_limits():
    def still(levels, **limits):
        before = np.full((32, 48, 3), 100, np.uint8)
        return still_tokens(before + np.uint8(levels), before, **limits)

    for levels, expected in ((0, 1), (3, 1), (4, 2 / 3), (5, 1 / 3), (6, 0), (9, 0)):
        assert still(levels) == pytest.approx(np.full((2, 3), expected), abs=1e-6), levels
    assert still(5, low=4.0, high=8.0) == pytest.approx(np.full((2, 3), 0.75), abs=1e-6)


def test_motion_is_the_root_mean_square_difference():
    still = np.zeros((64, 64, 3), np.float32)
    half = still.copy()
    half[:32] = 10.0
    assert motion(still, still) == 0.0 and motion(half, still) == pytest.approx(10 / 2**0.5)


def test_the_strength_follows_the_formula_of_the_paper():
    assert motion_strength([0.0], 1.0) == 1.0, "a still scene keeps all"
    assert motion_strength([10.0, 20.0, 5.0], 1.0, rate=0.5, scale=40.0) == pytest.approx(0.5 * (1 - 0.5) + 0.5)
    assert motion_strength([99.0], 0.4, rate=0.25, scale=40.0) == pytest.approx(0.75 * 0.4), "clipped at full motion"
    assert motion_strength([], 0.6, rate=1.0) == 1.0
    strength = 1.0
    for _ in range(10):
        strength = motion_strength([50.0], strength)
    assert strength < 0.01, "it goes to zero while the motion lasts"


def test_a_place_for_a_token_cache_is_given_up_only_by_who_does_not_use_it():
    assert gives_way({}, 2, 100.0) == (True, None)
    assert gives_way({1: 99.0, 2: 98.0}, 2, 100.0) == (False, None), "both are at work"
    assert gives_way({1: 99.0, 2: 100.0 - HOLDER_IDLE_S}, 2, 100.0) == (True, 2)
    assert gives_way({1: 10.0, 2: 20.0}, 2, 100.0) == (True, 1), "the one unused for longest"
    assert gives_way({}, 0, 100.0) == (False, None)


def test_what_is_seen_ages_until_the_next_picture_is_there():
    steady = [(i / 10 + 0.2, i / 10) for i in range(50)]  # 10 frames a second, each 200 ms old when it is shown
    ages = shown_ages(steady, 5.1)
    assert ages.min() == pytest.approx(0.2, abs=0.01) and ages.max() == pytest.approx(0.3, abs=0.01)
    assert np.median(ages) == pytest.approx(0.25, abs=0.02)
    repeated = [(i / 10 + 0.2, 0.0) for i in range(50)]
    assert shown_ages(repeated, 5.1).max() > 4.9, "a repeated picture is as old as its frame"
    assert shown_ages([], 1.0).size == shown_ages(steady[:1], 1.0).size == shown_ages(steady, 100.0).size == 0


def test_the_next_frame_is_taken_as_late_as_its_encode_allows():
    """A quarter more than the encode takes, and two milliseconds: later it would wait, earlier its frame would be older."""
    for encode_s in (0.0, 0.01, 0.02, 0.4):
        assert take_at(10.0, encode_s) == pytest.approx(10.0 - 1.25 * encode_s - 0.002, abs=1e-9)
