"""Stream batch: frames at different steps in one forward. Pictures on the embedded model, order and failures on a fake."""

import threading

import numpy as np
import pytest
import torch
from support.engine import PATIENCE_S, BatchingFake, Clock, edit, stream
from support.pictures import grey

from pipeline.images import EditError
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine

SIZE = 64


def test_k_steps_deliver_a_frame_for_each_forward_and_every_picture_is_its_own(pocket, photo, monkeypatch):
    frames = [photo(SIZE, SIZE, seed) for seed in range(5)]
    params = EditParams("sepia", width=SIZE, height=SIZE, steps=3, seed=1)
    forwards = []
    advance = type(pocket).advance
    monkeypatch.setattr(
        type(pocket), "advance", lambda pipe, pictures: (forwards.append(len(pictures)), advance(pipe, pictures))
    )
    with RealtimeEngine(pocket, EngineConfig(fast_path=False)) as engine:
        plain = [engine.edit([frame], params, timeout=PATIENCE_S).image for frame in frames]
        forwards.clear()
        with engine.open_session() as session:
            batched = params.replace(stream_batch=True)
            results = stream(session, [(frame, batched) for frame in frames])
    assert forwards == [1, 2, 3, 3, 3, 2, 1], "once warm every forward finishes a frame, and the last ones come out too"
    for result, image in zip(results, plain, strict=True):
        assert np.array_equal(result.image, image), "who rides along changes nothing"


def test_a_new_prompt_in_mid_stream_is_that_of_its_frame_and_of_those_after_it(pocket, photo):
    picture = photo(SIZE, SIZE, 4)
    params = EditParams("sepia", width=SIZE, height=SIZE, steps=2, stream_batch=True)
    other = params.replace(prompt="make it a pencil sketch with many fine lines")
    with RealtimeEngine(pocket, EngineConfig(fast_path=False)) as engine, engine.open_session() as session:
        alone = {
            p: engine.edit([picture], p.replace(stream_batch=False), timeout=PATIENCE_S).image for p in (params, other)
        }
        order = [params, params, other, other, params]
        for result, asked in zip(stream(session, [(picture, p) for p in order]), order, strict=True):
            assert result.params == asked and np.array_equal(result.image, alone[asked])


@pytest.fixture
def fake():
    return BatchingFake()


def test_frames_come_out_in_order_and_their_latency_counts_every_step(fake):
    clock = Clock()
    params = edit(steps=4, stream_batch=True)
    advance = fake.advance
    fake.advance = lambda pictures: (setattr(clock, "now", clock.now + 0.1), advance(pictures))
    with RealtimeEngine(fake, clock=clock) as engine, engine.open_session() as session:
        results = stream(session, [(grey(), params.replace(seed=seed)) for seed in range(8)])
    assert [result.number for result in results] == list(range(1, 9))
    assert [result.image[0, 0, 0] for result in results] == list(range(8))
    assert [result.age_ms for result in results] == pytest.approx([400] + [500] * 7), "a wait, then four forwards"


@pytest.mark.parametrize("change", [{"stream_batch": False}, {"width": 96}, {"steps": 2}])
def test_after_a_change_what_is_on_its_way_comes_out_first(fake, change):
    params = edit("before", steps=3, stream_batch=True)
    after = params.replace(prompt="after", **change)
    with RealtimeEngine(fake) as engine, engine.open_session() as session:
        results = stream(session, [(grey(), params), (grey(), params), (grey(), after)])
        assert [result.number for result in results] == [1, 2, 3] and all(r.error is None for r in results)
        assert not any({"before", "after"} <= set(prompts) for prompts in fake.together), "no batch mixes them"
        assert results[2].image.shape[1] == after.replace(width=after.width or 64).width


def test_a_failed_forward_is_every_frames_in_it_and_the_next_frame_works(fake, caplog):
    params = edit("good", steps=3, stream_batch=True)
    fake.fail["bad"] = torch.OutOfMemoryError("CUDA out of memory")
    with RealtimeEngine(fake) as engine, engine.open_session() as session, engine.open_session() as other:
        results = stream(session, [(grey(), params), (grey(), params.replace(prompt="bad"))])
        assert [str(result.error)[:13] for result in results] == ["Out of memory"] * 2 and fake.cleared == 1
        assert other.latest() is None
        (after,) = stream(session, [(grey(), params.replace(seed=7))])
        assert after.image[0, 0, 0] == 7 and after.number == 3
        assert engine.stats().errors == 2


def test_a_frame_that_is_not_finite_hurts_no_other_in_its_batch(fake):
    params = edit("good", steps=2, stream_batch=True, seed=9)
    fake.poison.add("bad")
    with RealtimeEngine(fake) as engine, engine.open_session() as session:
        results = stream(session, [(grey(), params), (grey(), params.replace(prompt="bad")), (grey(), params)])
    assert [result.error is None for result in results] == [True, False, True]
    assert "no finite picture" in str(results[1].error) and results[2].image[0, 0, 0] == 9


def test_cancel_forgets_all_that_are_on_their_way(fake):
    params = edit(steps=3, stream_batch=True)
    with RealtimeEngine(fake) as engine, engine.open_session() as session:

        def on_step(step, steps):
            session.cancel()

        number = session.submit([grey()], params, on_step)
        with pytest.raises(EditError, match="cancelled"):
            session.result(number, PATIENCE_S)
        (after,) = stream(session, [(grey(), params.replace(seed=5))])
        assert after.image[0, 0, 0] == 5 and session.flight == [] and engine._sessions.taken == []


def test_a_skipped_frame_waits_for_the_one_that_it_repeats(fake):
    params = edit(steps=3, stream_batch=True, skip_similar="patch", seed=6)
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as session:
        frames = [(grey(value=100), params), (grey(value=180), params)]
        outcomes, sending = [], threading.RLock()

        def on_step(step, steps):
            with sending:
                if len(outcomes) == 1:
                    send(*frames[1], on_step)
                elif len(outcomes) == 2 and step == 0:
                    send(grey(value=181), params, on_step)

        def send(picture, params, on_step):
            with sending:
                outcomes.append(session.submit_for_outcome([picture], params, on_step).outcome)

        send(*frames[0], on_step)
        outcomes[0].result(PATIENCE_S)
        results = [outcome.result(PATIENCE_S) for outcome in outcomes]
        while len(results) < 3:
            results = [outcome.result(PATIENCE_S) for outcome in outcomes]
    assert [(r.number, r.skipped) for r in results] == [(1, False), (2, False), (3, True)]
    assert np.array_equal(results[2].image, results[1].image)


def test_two_streams_do_not_share_a_batch(fake):
    params = edit(steps=3, stream_batch=True)
    with RealtimeEngine(fake) as engine, engine.open_session() as one, engine.open_session() as two:
        first = one.submit([grey()], params.replace(prompt="one", seed=1))
        second = two.submit([grey()], params.replace(prompt="two", seed=2))
        assert two.result(second, PATIENCE_S).image[0, 0, 0] == 2
        assert one.latest() is None or one.latest().number == first
    assert all(len(set(prompts)) == 1 for prompts in fake.together)
