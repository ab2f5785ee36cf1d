"""The engine's decisions, without a clock, a camera or luck."""

import numpy as np
import pytest

from policies import embeds_anew, frame_rate, idle_sessions, next_session, similarity, skips, thumbnail


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


def test_a_frame_is_skipped_with_the_probability_of_the_formula():
    draws = np.random.default_rng(0).random(20_000)
    for alike, threshold, expected in ((0.99, 0.98, 0.5), (0.995, 0.98, 0.75), (1.0, 0.98, 1.0), (0.97, 0.98, 0.0)):
        share = np.mean([skips(alike, threshold, 0, 10, draw) for draw in draws])
        assert share == pytest.approx(expected, abs=0.02), (alike, share)


def test_after_the_most_skips_in_a_row_a_frame_is_computed():
    assert [skips(1.0, 0.98, skipped, 3, 0.5) for skipped in range(5)] == [True, True, True, False, False]


def test_when_the_model_looks_anew():
    def looks(policy, frames=1, alike=1.0):
        return embeds_anew(policy, frames, every=3, alike=alike, threshold=0.95)

    assert looks("fresh") and not looks("kept", frames=1000, alike=0.0)
    assert [looks("every", frames) for frames in (1, 2, 3)] == [False, False, True]
    assert looks("changed", alike=0.9) and not looks("changed", frames=1000, alike=0.96)
