"""Stages of neighbouring frames asked for in overlapped order: what the engine does on a GPU, here made to do on the CPU.

The order, the pictures and the failures are the same on both; that streams wait for each other is the GPU suite's.
"""

import contextlib

import numpy as np
import pytest
import torch
from support.engine import PATIENCE_S, BatchingFake, Clock, FakePipeline, backlog, edit, stream
from support.pictures import grey

from engine import loop
from engine.pace import Cost, plan_of
from pipeline.images import EditError
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine


class OrderedFake(FakePipeline):
    """Notes its stages by seed and prompt."""

    def encode_references(self, images, **options):
        self.calls.append(("encode", int(images[0][0, 0, 0])))
        return super().encode_references(images, **options)

    def denoise(self, latents, references, *args, **options):
        self.calls.append(("steps", int(references[0][0, 0, 0])))
        return super().denoise(latents, references, *args, **options)

    def decode(self, latents, width, height):
        self.calls.append(("decode", int(latents[0, 0, 0].nan_to_num())))
        return super().decode(latents, width, height)


@contextlib.contextmanager
def overlapped(pipeline, **options):
    """An engine that overlaps as on a GPU."""
    engine = RealtimeEngine(pipeline, EngineConfig(fast_path=False), **options)
    engine._loop.overlap = True
    with engine:
        yield engine


def test_the_next_frame_is_encoded_before_the_last_is_decoded_and_that_before_the_next_denoise():
    fake = OrderedFake()
    with overlapped(fake) as engine:
        sessions = [engine.open_session() for _ in range(3)]
        results = backlog(engine, fake, [(s, grey(value=n), edit(seed=n)) for n, s in enumerate(sessions, start=1)])
    assert [result.image[0, 0, 0] for result in results] == [1, 2, 3]
    order = [call[:2] for call in fake.calls if call[0] in ("encode", "steps", "decode")]
    assert order == [
        ("encode", 1), ("steps", 1),
        ("encode", 2), ("decode", 1), ("steps", 2),
        ("encode", 3), ("decode", 2), ("steps", 3),
        ("decode", 3),
    ]  # fmt: skip


def test_a_frame_that_nothing_follows_comes_out_at_once():
    with overlapped(OrderedFake()) as engine:
        for seed in (1, 2):
            assert engine.edit([grey()], edit(seed=seed), timeout=PATIENCE_S).image[0, 0, 0] == seed


def test_overlapped_frames_are_bitwise_those_that_come_one_by_one(pocket, photo):
    """One stream that builds every frame on the one before, beside another that does not."""
    frames = [photo(64, 64, seed) for seed in (1, 1, 2, 2)]
    settings = [
        EditParams("sepia", width=64, height=64, seed=1, start_from_previous=0.3, blend_still=0.5, motion_aware=True),
        EditParams("make it a pencil sketch", width=64, height=64, seed=2, embeds="every", embeds_background=True),
    ]

    def run(engine):
        with engine.open_session() as one, engine.open_session() as two:
            rounds = [
                backlog(engine, None, [(session, frame, params) for session, params in zip((one, two), settings)])
                for frame in frames
            ]
        return [[result.image for result in results] for results in rounds]

    with RealtimeEngine(pocket, EngineConfig(fast_path=False)) as engine:
        expected = run(engine)
    with overlapped(pocket) as engine:
        for mine, theirs in zip(run(engine), expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_one_stream_overlaps_itself_and_keeps_its_order():
    fake = OrderedFake()
    with overlapped(fake) as engine, engine.open_session() as session:
        results = stream(session, [(grey(value=n), edit(seed=n)) for n in range(1, 7)])
    assert [result.number for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result.image[0, 0, 0] for result in results] == [1, 2, 3, 4, 5, 6]
    order = [call[:2] for call in fake.calls if call[0] in ("encode", "decode")]
    assert order.index(("encode", 2)) < order.index(("decode", 1)), "the next frame was there in time"


def test_a_stream_batch_overlaps_too():
    fake = BatchingFake()
    with overlapped(fake) as engine, engine.open_session() as session:
        results = stream(session, [(grey(), edit(seed=n, steps=3, stream_batch=True)) for n in range(6)])
    assert [(r.number, r.image[0, 0, 0]) for r in results] == [(n + 1, n) for n in range(6)]


def test_a_failed_frame_is_its_sessions_and_the_one_behind_it_works():
    fake = OrderedFake()
    fake.poison.add("nan")
    fake.fail["broken"] = RuntimeError("a kernel failed")
    fake.fail["memory"] = torch.OutOfMemoryError("CUDA out of memory")
    with overlapped(fake) as engine:
        sessions = [engine.open_session() for _ in range(6)]
        prompts = ["nan", "good", "broken", "good", "memory", "good"]
        results = backlog(
            engine, fake, [(s, grey(), edit(p, seed=n)) for n, (s, p) in enumerate(zip(sessions, prompts))]
        )
        assert [result.error is None for result in results] == [False, True] * 3
        assert [result.image[0, 0, 0] for result in results[1::2]] == [1, 3, 5]
        assert engine._loop.tail is None or not engine._sessions.taken


def test_a_skipped_frame_comes_after_the_one_that_it_repeats():
    with overlapped(OrderedFake(), draw=lambda: 0.0) as engine, engine.open_session() as session:
        params = edit(skip_similar="patch", seed=3)
        results = stream(session, [(grey(value=100), params), (grey(value=101), params)])
    assert [r.skipped for r in results] == [False, True] and np.array_equal(results[0].image, results[1].image)


def test_cancel_and_close_reach_a_frame_that_only_waits_to_be_decoded():
    fake = OrderedFake()
    fake.hold()
    with overlapped(fake) as engine:
        session, other = engine.open_session(), engine.open_session()
        number = session.submit([grey()], edit(seed=1))
        fake.await_start()
        second = other.submit([grey()], edit(seed=2))
        session.close()
        fake.gate.set()
        assert other.result(second, PATIENCE_S).image[0, 0, 0] == 2
        with pytest.raises(EditError, match="closed"):
            session.result(number)
    assert engine._sessions.taken == [] and ("decode", 1) not in [call[:2] for call in fake.calls]


def test_pipelining_can_be_turned_off_and_says_why_it_is():
    with RealtimeEngine(FakePipeline(), EngineConfig(pipelining=False)) as engine:
        assert engine.description["pipelining"] == {"applied": False, "reason": "turned off"}
    with RealtimeEngine(FakePipeline()) as engine:
        assert not engine.description["pipelining"]["applied"] and "cpu" in engine.description["pipelining"]["reason"]


@pytest.fixture
def taken(monkeypatch):
    """What `take_at` was asked: (busy until, length of an encode), once for each turn."""
    asked, real = [], loop.take_at
    monkeypatch.setattr(loop, "take_at", lambda *args: asked.append(args) or real(*args))
    return asked


@pytest.mark.parametrize("batch, busy_s", [(False, 0.4), (True, 0.1)], ids=["all four steps", "one step of a stream batch"])
def test_the_next_frame_is_due_by_what_frames_of_its_kind_took_lately(taken, batch, busy_s):
    clock, params = Clock(), edit(steps=4, stream_batch=batch)
    with overlapped(BatchingFake(), clock=clock) as engine, engine.open_session() as session:
        cost = Cost(encode=20.0, denoise=400.0, decode=30.0, latency=450.0)
        engine._loop.costs.add(plan_of(params, (64, 64), 1), cost, clock())
        before = len(taken)
        stream(session, [(grey(), params)])
    assert next(args for args in taken[before:] if args != (0.0, 0.0)) == pytest.approx((clock() + busy_s, 0.02))


def test_without_overlap_no_frame_waits_for_the_one_before(taken):
    with RealtimeEngine(BatchingFake(), EngineConfig(fast_path=False), clock=Clock()) as engine, engine.open_session() as session:
        engine._loop.costs.add(plan_of(edit(), (64, 64), 1), Cost(20.0, 400.0, 30.0, 450.0), 1000.0)
        stream(session, [(grey(), edit())] * 2)
    assert set(taken) == {(0.0, 0.0)}
