"""The engine's claims. Scheduling and threads run on a fake pipeline whose denoise the test can hold, pictures on the
embedded model. Nothing sleeps: every wait is on an event with a timeout that only a failure reaches."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from support.engine import PATIENCE_S, Clock, FakePipeline, edit, serve
from support.pictures import grey

from pipeline.images import EditError
from qwen_realtime import (
    STAGES,
    EditParams,
    EngineConfig,
    RealtimeEngine,
)


@pytest.fixture
def fake():
    return FakePipeline()


@pytest.fixture
def engine(fake):
    with RealtimeEngine(fake) as engine:
        yield engine
        fake.gate.set()


# Frames and sessions


def test_an_edit_gives_the_picture_with_its_number_age_and_stages(engine):
    result = engine.edit([grey()], edit(seed=77), timeout=PATIENCE_S)
    assert result.image.shape == (64, 64, 3) and result.image.dtype == np.uint8 and (result.image == 77).all()
    assert result.number == 1 and result.error is None and result.dropped == 0
    assert tuple(result.stages_ms) == STAGES and min(result.stages_ms.values()) >= 0
    parts = sum(result.stages_ms[stage] for stage in STAGES[:-1])
    assert result.stages_ms["total"] == pytest.approx(parts) and result.age_ms >= result.stages_ms["total"]
    assert engine.stats().sessions == 0, "edit frees its session"


def test_all_model_work_happens_on_one_thread_that_close_joins(fake):
    engine = RealtimeEngine(fake).start()
    callers = [threading.Thread(target=engine.edit, args=([grey()], edit())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert fake.threads == {"inference"}
    engine.close()
    engine.close()
    assert not engine._loop.thread.is_alive()
    for use in (engine.open_session, lambda: engine.edit([grey()], edit())):
        with pytest.raises(EditError, match="closed"):
            use()


def test_newest_wins_and_drops_are_counted(engine, fake):
    fake.hold()
    session = engine.open_session()
    first = session.submit([grey()], edit("first"))
    fake.await_start()
    numbers = [session.submit([grey()], edit(f"frame {i}")) for i in range(9)]
    fake.gate.set()
    last = session.result(numbers[-1], PATIENCE_S)
    assert fake.prompts() == ["first", "frame 8"]
    assert (first, last.number, last.dropped, engine.stats().dropped) == (1, 10, 8, 8)
    assert session.latest() is last
    with pytest.raises(EditError, match="Frame 4 is not here: 10 came"):
        session.result(4)


def test_who_waits_for_a_dropped_frame_is_told(engine, fake):
    fake.hold()
    session = engine.open_session()
    session.submit([grey()], edit("first"))
    fake.await_start()
    outcome = session.submit_for_outcome([grey()], edit("second")).outcome  # what `result` waits for
    session.submit([grey()], edit("third"))
    with pytest.raises(EditError, match="Frame 2 was dropped: a newer one came"):
        outcome.result(PATIENCE_S)


def test_a_frame_runs_with_the_settings_it_came_with(engine, fake):
    """A change of settings while a frame runs is the next frame's: params are frozen and travel with the frame."""
    fake.hold()
    session = engine.open_session()
    session.submit([grey()], edit("old", seed=1))
    fake.await_start()
    second = session.submit([grey()], edit("new", seed=2))
    fake.gate.set()
    result = session.result(second, PATIENCE_S)
    assert (result.params.prompt, result.image[0, 0, 0]) == ("new", 2)
    assert fake.prompts() == ["old", "new"]
    assert [call[3] for call in fake.calls if call[0] == "noise"] == [1, 2]


def test_under_load_sessions_are_served_in_turn(fake):
    clock = Clock()
    engine = RealtimeEngine(fake, clock=clock)
    sessions = [engine.open_session() for _ in range(3)]
    done = threading.Event()
    served = []

    def feed(session, who):
        """Each session always has a newer frame waiting; the first sends ten for every frame the others send."""
        clock.now += 1
        for _ in range(10 if who == 0 else 1):
            session.submit([grey()], edit(str(who)), on_step=lambda step, steps: step == 0 and on_frame(session, who))

    def on_frame(session, who):
        served.append(who)
        if len(served) < 12:
            feed(session, who)
        else:
            done.set()

    for who, session in enumerate(sessions):
        feed(session, who)
    with engine:
        assert done.wait(PATIENCE_S)
    assert served[:12] == [0, 1, 2] * 4, served


def test_a_full_engine_refuses_and_a_closed_session_makes_room(fake):
    with RealtimeEngine(fake, EngineConfig(max_sessions=2)) as engine:
        first, _ = engine.open_session(), engine.open_session()
        with pytest.raises(EditError, match=r"2 sessions are open. Allowed: at most 2"):
            engine.open_session()
        first.close()
        first.close()
        engine.open_session()
        assert engine.stats().sessions == 2


@pytest.mark.parametrize(
    "mode, count, allowed",
    [("edit", 2, "1"), ("edit", 0, "1"), ("blend", 1, "2"), ("blend", 3, "2"), ("references", 1, "2 to 3"),
     ("references", 4, "2 to 3")],
)  # fmt: skip
def test_each_mode_says_how_many_pictures_it_takes(engine, mode, count, allowed):
    with pytest.raises(EditError, match=f"^{count} pictures came. Allowed in mode {mode}: {allowed}.$"):
        engine.open_session().submit([grey()] * count, edit(mode=mode))


@pytest.mark.parametrize(
    "bad", [grey().astype(np.float32), grey()[..., 0], grey()[..., :2], grey()[None], grey(width=0, height=8), "picture", None]
)
def test_a_picture_of_another_form_is_refused(engine, bad):
    with pytest.raises(EditError, match="Allowed: a numpy array, uint8"):
        engine.open_session().submit([bad], edit())


def test_open_sizes_take_the_default_and_the_largest_output_is_bounded(fake):
    with RealtimeEngine(fake, EngineConfig(default_size=128, max_pixels=128 * 128)) as engine:
        assert engine.edit([grey()], edit(), timeout=PATIENCE_S).image.shape == (128, 128, 3)
        assert engine.edit([grey(width=128, height=64)], edit(height=64), timeout=PATIENCE_S).image.shape == (64, 128, 3)
        assert engine.edit([grey(width=100, height=67)], edit(), timeout=PATIENCE_S).image.shape == (105, 156, 3)
        with pytest.raises(EditError, match=r"256x128, 32,768 pixels. Allowed: 16,384"):
            engine.edit([grey(width=128, height=64)], edit(width=256))


def test_cfg_encodes_the_negative_prompt_and_an_empty_one_as_a_space(engine, fake):
    engine.edit([grey()], edit("yes", negative_prompt="no"), timeout=PATIENCE_S)
    engine.edit([grey()], edit("yes", negative_prompt="no", cfg_scale=4), timeout=PATIENCE_S)
    engine.edit([grey()], edit("yes", cfg_scale=1.5), timeout=PATIENCE_S)
    passes = [call[1:] for call in fake.calls if call[0] == "denoise"]
    assert passes == [("yes", None, 1.0), ("yes", "no", 4.0), ("yes", " ", 1.5)]


def test_the_reference_area_reaches_the_pipeline(engine, fake):
    engine.edit([grey(width=192)], edit(width=96, height=80), timeout=PATIENCE_S)
    engine.edit([grey(width=192)], edit(width=96, height=80, reference_area="stock"), timeout=PATIENCE_S)
    assert [call[1:] for call in fake.calls if call[0] == "references"] == [
        ([(80, 96, 3)], "output", 96, 80), ([(64, 77, 3)], None, 96, 80)
    ]  # fmt: skip


# Failures


def fails_with(prompt: str, error: BaseException):
    return lambda fake: fake.fail.update({prompt: error})


@pytest.mark.parametrize(
    "break_it, message",
    [
        (fails_with("bad", ValueError("wrong shape")), "^The model failed on this frame: ValueError: wrong shape$"),
        (fails_with("bad", EditError("Too long.")), "^Too long.$"),
        (fails_with("bad", torch.OutOfMemoryError("CUDA out of memory")), "^Out of memory at 64x64.*smaller size"),
        (fails_with("bad", RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")), "^Out of memory"),
        (fails_with("bad", MemoryError()), "^Out of memory"),
        (lambda fake: fake.poison.add("bad"), "^The model gave no finite picture at 64x64, 2 steps"),
    ],
    ids=["exception", "edit-error", "oom", "cublas-oom", "host-oom", "not-finite"],
)
def test_a_failed_frame_is_reported_to_its_own_session_and_the_next_works(engine, fake, break_it, message):
    break_it(fake)
    session, other = engine.open_session(), engine.open_session()
    with pytest.raises(EditError, match=message):
        session.result(session.submit([grey()], edit("bad")), PATIENCE_S)
    failed = session.latest()
    assert failed.image is None and failed.number == 1 and failed.stages_ms == {}
    assert failed.error.__traceback__ is None and failed.error.__context__ is None, "a traceback keeps tensors alive"
    assert other.latest() is None
    assert other.result(other.submit([grey()], edit("good", seed=3)), PATIENCE_S).image[0, 0, 0] == 3
    assert session.result(session.submit([grey()], edit("good", seed=4)), PATIENCE_S).image[0, 0, 0] == 4
    assert (engine.stats().errors, engine.stats().frames) == (1, 2)
    assert fake.cleared == (1 if "memory" in message else 0), "running out of memory frees the caches"


def test_an_unexpected_failure_is_logged_with_its_traceback(engine, fake, caplog):
    fake.fail["bad"] = KeyError("weights")
    with pytest.raises(EditError, match="KeyError"):
        engine.edit([grey()], edit("bad"), timeout=PATIENCE_S)
    assert "Traceback" in caplog.text and "raise self.fail" in caplog.text


def test_a_failed_frame_keeps_no_tensors(engine, fake):
    held = []

    def denoise(latents, *args, **options):
        mine = torch.zeros(8)
        held.append(weakref.ref(mine))
        raise torch.OutOfMemoryError("CUDA out of memory")

    fake.denoise = denoise
    session = engine.open_session()
    with pytest.raises(EditError):
        session.result(session.submit([grey()], edit()), PATIENCE_S)
    gc.collect()
    assert held[0]() is None


def test_what_a_step_callback_raises_is_its_own_frames_error(engine):
    def on_step(step, steps):
        raise EditError("Enough.")

    with pytest.raises(EditError, match="Enough"):
        engine.edit([grey()], edit(), on_step, PATIENCE_S)
    assert engine.edit([grey()], edit(), timeout=PATIENCE_S).image is not None


def test_a_pipeline_that_cannot_start_says_so_to_the_starter(fake):
    def broken():
        raise RuntimeError("no kernel")

    fake.enable_fast_path = broken
    engine = RealtimeEngine(fake)
    with pytest.raises(RuntimeError, match="no kernel"):
        engine.start()
    assert not engine._loop.thread.is_alive()
    with RealtimeEngine(fake, EngineConfig(fast_path=False)) as engine:
        pipelining = {"applied": False, "reason": "a device of the kind cpu does one thing at a time"}
        assert engine.description == {"model": "fake", "default_size": 64, "fast_path": [], "pipelining": pipelining}


# Cancel and close


def test_cancel_stops_the_running_frame_within_a_step_and_forgets_the_waiting_one(engine, fake):
    session = engine.open_session()

    def on_step(step, steps):
        if step == 2:
            session.submit([grey()], edit("waiting"))
            session.cancel()

    with pytest.raises(EditError, match="Frame 1 was cancelled"):
        session.result(session.submit([grey()], edit("running", steps=8), on_step), PATIENCE_S)
    after = session.result(session.submit([grey()], edit("after", steps=1)), PATIENCE_S)
    assert fake.prompts() == ["running", "after"]
    assert fake.steps_done == 3 + 1, "steps 0, 1 and 2 of the first frame, then the one of the last"
    assert session.latest() is after and engine.stats().errors == 0 and after.dropped == 0


def test_cancel_touches_no_other_session(engine, fake):
    fake.hold()
    session, other = engine.open_session(), engine.open_session()
    number = session.submit([grey()], edit(seed=9))
    fake.await_start()
    other.submit([grey()], edit())
    other.cancel()
    other.cancel()
    again = other.submit([grey()], edit(seed=8))
    fake.gate.set()
    assert session.result(number, PATIENCE_S).image[0, 0, 0] == 9
    after = other.result(again, PATIENCE_S)
    assert after.image[0, 0, 0] == 8 and after.dropped == 0, "a cancelled frame is gone from the mailbox"


def test_closing_a_session_while_its_frame_runs_discards_the_result(engine, fake):
    fake.hold()
    session, other = engine.open_session(), engine.open_session()
    number = session.submit([grey()], edit("running"))
    fake.await_start()
    session.close()
    with pytest.raises(EditError, match="session is closed"):
        session.result(number)
    with pytest.raises(EditError, match="session is closed"):
        session.submit([grey()], edit())
    fake.gate.set()
    assert other.result(other.submit([grey()], edit()), PATIENCE_S).image is not None
    assert session.closed and session.latest() is None
    assert (engine.stats().sessions, engine.stats().frames, engine.stats().errors) == (1, 1, 0)


def test_closing_a_session_frees_it_and_its_pictures(engine):
    session = engine.open_session()
    picture = grey()
    result = session.result(session.submit([picture], edit()), PATIENCE_S)
    kept = [weakref.ref(thing) for thing in (session, picture, result)]
    session.close()
    engine.edit([grey()], edit(), timeout=PATIENCE_S)  # the thread has moved on
    del session, picture, result
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_closing_the_engine_stops_a_running_frame_and_tells_who_waits(fake):
    engine = RealtimeEngine(fake).start()
    fake.hold()
    said = []

    def wait():
        try:
            engine.edit([grey()], edit(steps=8))
        except EditError as error:
            said.append(str(error))

    caller = threading.Thread(target=wait)
    caller.start()
    fake.await_start()
    closer = threading.Thread(target=engine.close)
    closer.start()
    caller.join(PATIENCE_S)
    fake.gate.set()
    closer.join(PATIENCE_S)
    assert said == ["Frame 1 was cancelled: its session closed."] and not engine._loop.thread.is_alive()
    assert fake.steps_done == 0


def test_a_result_that_takes_too_long_is_a_timeout_and_edit_then_cancels(engine, fake):
    fake.hold()
    with pytest.raises(TimeoutError, match=r"Frame 1 was not done within 0.01 s"):
        engine.edit([grey()], edit(steps=8), timeout=0.01)
    fake.gate.set()
    engine.edit([grey()], edit(steps=1), timeout=PATIENCE_S)
    assert fake.steps_done == 1


def test_an_idle_session_is_freed_and_says_why(fake):
    clock = Clock()
    with RealtimeEngine(fake, EngineConfig(max_sessions=2, idle_timeout_s=60), clock=clock) as engine:
        quiet, busy = engine.open_session(), engine.open_session()
        clock.now += 59
        busy.result(busy.submit([grey()], edit()), PATIENCE_S)
        assert engine.stats().sessions == 2
        clock.now += 1
        fresh = engine.open_session()  # there is room again
        assert quiet.closed and not busy.closed and not fresh.closed
        with pytest.raises(EditError, match="freed after 60 s without a frame"):
            quiet.submit([grey()], edit())


def test_a_session_whose_frame_runs_or_waits_is_not_idle(fake):
    clock = Clock()
    with RealtimeEngine(fake, EngineConfig(idle_timeout_s=60), clock=clock) as engine:
        fake.hold()
        running, waiting = engine.open_session(), engine.open_session()
        first = running.submit([grey()], edit())
        fake.await_start()
        second = waiting.submit([grey()], edit())
        clock.now += 1000
        engine.open_session()
        fake.gate.set()
        assert running.result(first, PATIENCE_S).age_ms == 1_000_000
        assert waiting.result(second, PATIENCE_S).age_ms == 1_000_000


def test_the_thread_itself_frees_the_idle(fake):
    async def read(engine):
        return [result async for result in engine.open_session()]

    with RealtimeEngine(fake, EngineConfig(idle_timeout_s=0.02)) as engine:  # the real clock: nothing else wakes it
        assert asyncio.run(asyncio.wait_for(read(engine), PATIENCE_S)) == []
        assert engine.stats().sessions == 0


# The async iterator


def test_a_slow_reader_gets_the_newest_and_builds_no_queue(engine):
    async def main():
        loop = asyncio.get_running_loop()
        session = engine.open_session()
        callbacks = []
        schedule, loop.call_soon_threadsafe = loop.call_soon_threadsafe, lambda *a: callbacks.append(a) or schedule(*a)
        results = aiter(session)
        session.submit([grey()], edit("first"))
        seen = [(await asyncio.wait_for(anext(results), PATIENCE_S)).number]
        callbacks.clear()
        for _ in range(20):  # the event loop is blocked here, as by a reader that is busy
            last = session.submit([grey()], edit())
            session.result(last, PATIENCE_S)
        waiting = len(callbacks)
        seen.append((await asyncio.wait_for(anext(results), PATIENCE_S)).number)
        session.close()
        seen += [result.number async for result in results]
        return seen, waiting

    seen, waiting = asyncio.run(main())
    assert seen == [1, 21], seen
    assert waiting == 1, "one wake-up waits in the event loop however many results came"


def test_the_iterator_gives_every_result_to_a_quick_reader_failed_ones_included(engine, fake):
    fake.fail["bad"] = ValueError("wrong shape")

    async def main():
        session = engine.open_session()
        seen = []
        session.submit([grey()], edit("0"))
        async for result in session:
            seen.append((result.number, result.error is None))
            if len(seen) == 5:
                session.close()
            else:
                session.submit([grey()], edit("bad" if len(seen) == 2 else "good"))
        return seen, session

    seen, session = asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert seen == [(1, True), (2, True), (3, False), (4, True), (5, True)]
    assert session._slots == []


def test_a_result_from_before_the_iteration_is_not_lost_and_all_readers_see_it(engine):
    async def main():
        session = engine.open_session()
        number = session.submit([grey()], edit())
        session.result(number, PATIENCE_S)
        readers = [aiter(session), aiter(session)]
        first = [await asyncio.wait_for(anext(reader), PATIENCE_S) for reader in readers]
        await readers[0].aclose()
        await asyncio.wait_for(asyncio.gather(anext(readers[1], None), asyncio.to_thread(session.close)), PATIENCE_S)
        return [result.number for result in first], number

    seen, number = asyncio.run(main())
    assert seen == [number, number]


def test_a_reader_whose_event_loop_has_died_hurts_nobody(engine):
    session = engine.open_session()
    loop = asyncio.new_event_loop()
    results = aiter(session)
    first = session.submit([grey()], edit())
    loop.run_until_complete(asyncio.wait_for(anext(results), PATIENCE_S))
    loop.close()
    for _ in range(2):
        assert session.result(session.submit([grey()], edit()), PATIENCE_S).number > first


# Statistics


def test_stats_count_what_happened(fake):
    clock = Clock()
    with RealtimeEngine(fake, clock=clock) as engine:
        empty = engine.stats()
        assert (empty.fps, empty.frames, empty.latency_p50_ms, empty.stages_ms, empty.memory) == (0, 0, 0, {}, {})
        session = engine.open_session()
        for _ in range(10):

            def tick(step, steps):
                clock.now += 0.05

            result = session.result(session.submit([grey()], edit(), tick), PATIENCE_S)
            assert result.age_ms == pytest.approx(100)
        assert result.fps == pytest.approx(10)
        stats = engine.stats()
        assert stats.fps == pytest.approx(10) and stats.frames == 10 and stats.sessions == 1
        assert stats.latency_p50_ms == pytest.approx(100) and stats.latency_p95_ms == pytest.approx(100)
        assert set(stats.stages_ms) == set(STAGES) and stats.cache_summary == fake.cache_summary()
        assert stats.age_p50_ms == pytest.approx(150, abs=3), "100 ms old when it is shown, 200 when the next one is there"
        assert stats.age_p95_ms == pytest.approx(195, abs=5)
        assert (stats.skip_rate, stats.computed, stats.cache_hits, stats.pace) == (0.0, 1.0, 0.0, ())
        clock.now += 100
        assert engine.stats().fps == 0
    assert engine.description["fast_path"] == [{"name": "vae", "applied": True, "reason": "one frame"}]


# The embedded model


@pytest.fixture(scope="module")
def live(pocket):
    with RealtimeEngine(pocket, EngineConfig(fast_path=False)) as engine:  # the fixture is shared: it stays as it is
        yield engine


def test_two_interleaved_sessions_equal_each_alone(live, photo):
    """Bitwise: nothing of one session may reach the other through a cache, the noise or a buffer."""
    pictures = [photo(160, 128, seed=1), photo(128, 128, seed=2)]
    settings = [
        EditParams("make it black and white", width=128, height=128, seed=1, steps=2),
        EditParams("turn it upside down", width=128, height=128, seed=2, steps=1),
    ]
    live.pipeline.clear_caches()
    alone = [live.edit([p], s, timeout=PATIENCE_S).image for p, s in zip(pictures, settings)]
    assert not np.array_equal(*alone)
    live.pipeline.clear_caches()
    with live.open_session() as first, live.open_session() as second:
        for _ in range(2):
            numbers = [s.submit([p], e) for s, p, e in zip((first, second), pictures, settings)]
            both = [s.result(n, PATIENCE_S).image for s, n in zip((first, second), numbers)]
            for mine, reference in zip(both, alone):
                np.testing.assert_array_equal(mine, reference)


def test_blend_and_references_run_on_the_model_and_differ(live, photo):
    pictures = [photo(128, 128, seed=1), photo(96, 160, seed=2)]
    params = EditParams("blend the two pictures", width=128, height=128, steps=1, mode="references")
    images = [live.edit(pictures, params, timeout=PATIENCE_S).image]
    images.append(live.edit(pictures, params.replace(mode="blend"), timeout=PATIENCE_S).image)
    images.append(live.edit(pictures, params.replace(mode="blend", blend_ratio=1), timeout=PATIENCE_S).image)
    assert [image.shape for image in images] == [(128, 128, 3)] * 3
    assert len({image.tobytes() for image in images}) == 3


def test_the_model_takes_cfg_a_negative_prompt_and_odd_sizes(live, photo):
    params = EditParams("sepia", negative_prompt="blue", cfg_scale=3, width=144, height=112, steps=1, fit="pad")
    result = live.edit([photo(200, 90, seed=3)], params, timeout=PATIENCE_S)
    assert result.image.shape == (112, 144, 3) and tuple(result.stages_ms) == STAGES


def test_an_unchanged_frame_is_served_from_the_caches(live, photo):
    params = EditParams("sepia", width=128, height=128, steps=1, seed=5)
    first = live.edit([photo(128, 128, seed=4)], params, timeout=PATIENCE_S)
    before = live.stats().cache_summary
    again = live.edit([photo(128, 128, seed=4)], params, timeout=PATIENCE_S)
    after = live.stats().cache_summary
    np.testing.assert_array_equal(first.image, again.image)
    assert sum(c["misses"] for c in after.values()) == sum(c["misses"] for c in before.values()), (before, after)
    assert sum(c["hits"] for c in after.values()) > sum(c["hits"] for c in before.values())


def test_cancel_on_the_model_stops_within_a_step(live, photo):
    steps_seen = []
    with live.open_session() as session:

        def on_step(step, steps):
            steps_seen.append((step, steps))
            session.cancel()

        params = EditParams("sepia", width=128, height=128, steps=8)
        with pytest.raises(EditError, match="cancelled"):
            session.result(session.submit([photo(128, 128)], params, on_step), PATIENCE_S)
        params = params.replace(steps=1)
        assert session.result(session.submit([photo(128, 128)], params), PATIENCE_S).image.shape == (128, 128, 3)
    assert len(steps_seen) == 1, steps_seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_the_stages_add_up_and_a_real_out_of_memory_is_survived(photo, monkeypatch):
    from cached_pipeline import load_pipeline

    pipe = load_pipeline("pocket", device="cuda")
    pictures, params = [photo(256, 256)], EditParams("sepia", seed=1)
    with RealtimeEngine(pipe) as engine:
        first = engine.edit(pictures, params, timeout=PATIENCE_S)
        assert sum(first.stages_ms[stage] for stage in STAGES[:-1]) == pytest.approx(first.stages_ms["total"], rel=0.01)
        assert 0 < first.stages_ms["total"] < first.age_ms + 1
        with monkeypatch.context() as broken:
            broken.setattr(pipe, "denoise", lambda *args, **options: torch.empty(2**46, device="cuda"))
            with pytest.raises(EditError, match="Out of memory at 256x256"):
                engine.edit(pictures, params, timeout=PATIENCE_S)
        np.testing.assert_array_equal(engine.edit(pictures, params, timeout=PATIENCE_S).image, first.image)
        assert 0 < engine.stats().memory["allocated"] <= engine.stats().memory["peak"]


# Less work: similar frames, kept embeddings


def test_a_similar_frame_repeats_the_last_picture_and_costs_no_model_work(fake):
    params = edit(skip_similar="patch", seed=7)
    with RealtimeEngine(fake, draw=lambda: 0.5) as engine, engine.open_session() as session:
        results = serve(session, (grey(value=100), params), (grey(value=101), params), (grey(value=180), params))
        assert [result.skipped for result in results] == [False, True, False]
        assert len(fake.prompts()) == 2
        assert np.array_equal(results[1].image, results[0].image) and results[1].number == 2
        assert set(results[1].stages_ms) == set(STAGES) and results[1].stages_ms["denoise"] == 0
        stats = engine.stats()
        assert (stats.frames, stats.skipped, stats.skip_rate) == (3, 1, pytest.approx(1 / 3))
        assert min(stats.stages_ms[stage] for stage in ("total", "prepare")) > 0


def test_without_the_filter_every_frame_is_computed(fake):
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as session:
        results = serve(session, *[(grey(), edit())] * 3)
        assert not any(result.skipped for result in results) and len(fake.prompts()) == 3


def test_any_change_of_prompt_or_setting_or_size_computes_a_frame(fake):
    first = edit(skip_similar="frame")
    changes = [{"prompt": "sepia"}, {"seed": 3}, {"steps": 4}, {"width": 96}, {"cfg_scale": 2.0}, {"max_skipped": 5}]
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as session:
        for change in changes:
            results = serve(session, (grey(), first), (grey(), first), (grey(), first.replace(**change)))
            assert [result.skipped for result in results[1:]] == [True, False], change


@pytest.mark.parametrize("measure", ["frame", "patch"])
def test_a_scene_after_two_black_frames_and_a_lamp_that_goes_out_are_computed_at_once(fake, measure):
    scene = np.random.default_rng(0).integers(60, 200, (64, 64, 3)).astype(np.uint8)
    black, dim = np.zeros_like(scene), scene // 3
    params = edit(skip_similar=measure)
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as session:
        results = serve(session, *[(picture, params) for picture in (black, black, scene, scene, dim, dim)])
    assert [result.skipped for result in results] == [False, True] * 3


def test_a_still_picture_is_computed_again_after_the_most_skips(fake):
    params = edit(skip_similar="patch", max_skipped=2)
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as session:
        results = serve(session, *[(grey(), params)] * 7)
    assert [result.skipped for result in results] == [False, True, True, False, True, True, False]


def test_a_session_never_repeats_the_picture_of_another(fake):
    params = edit(skip_similar="patch")
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as one, engine.open_session() as two:
        (a,) = serve(one, (grey(), params.replace(seed=1)))
        (b,) = serve(two, (grey(), params.replace(seed=2)))
        assert not b.skipped and a.image[0, 0, 0] == 1 and b.image[0, 0, 0] == 2


def test_a_failed_frame_is_not_what_the_next_one_repeats(fake):
    params = edit(skip_similar="patch")
    fake.poison.add("negative")
    with RealtimeEngine(fake, draw=lambda: 0.0) as engine, engine.open_session() as session:
        with pytest.raises(EditError, match="no finite picture"):
            serve(session, (grey(), params))
        fake.poison.clear()
        assert not serve(session, (grey(), params))[0].skipped


@pytest.mark.parametrize(
    "changes, looked",
    [
        ({"embeds": "fresh"}, [1, 1, 1, 1, 1]),
        ({"embeds": "kept"}, [1, 0, 0, 0, 0]),
        ({"embeds": "every", "embeds_every": 2}, [1, 0, 1, 0, 1]),
        ({"embeds": "changed"}, [1, 0, 0, 1, 0]),  # the fourth picture is another one
    ],
)
def test_when_the_vision_language_model_looks_at_a_frame(fake, changes, looked):
    params = edit(**changes)
    counts = []
    with RealtimeEngine(fake) as engine, engine.open_session() as session:
        for value in (100, 101, 100, 180, 181):
            before = sum(call[0] == "prompt" for call in fake.calls)
            serve(session, (grey(value=value), params))
            counts.append(sum(call[0] == "prompt" for call in fake.calls) - before)
    assert counts == looked


def test_kept_embeddings_are_those_of_the_prompt_that_is_asked_for(fake):
    params = edit(embeds="kept")
    with RealtimeEngine(fake) as engine, engine.open_session() as one, engine.open_session() as two:
        serve(one, (grey(), params), (grey(), params.replace(prompt="sepia")), (grey(), params))
        serve(two, (grey(), params.replace(prompt="watercolour")))
        serve(one, (grey(), params.replace(cfg_scale=2.0, negative_prompt="dark")))
    assert fake.prompts() == ["negative", "sepia", "negative", "watercolour", "negative"]
    assert [call[2] for call in fake.calls if call[0] == "denoise"] == [None, None, None, None, "dark"]


def test_a_closed_session_holds_no_embeddings(fake):
    with RealtimeEngine(fake) as engine:
        session = engine.open_session()
        serve(session, (grey(), edit()))
        assert session.memory.embeds is not None
        session.close()
        assert session.memory.embeds is None and session.memory.newest is None


@pytest.mark.parametrize("size", [(1, 664), (664, 1), (1, 1)])
def test_any_whole_width_and_height_is_made_even_a_line_of_pixels(live, photo, size):
    width, height = size
    wanted = EditParams("make it black and white", width=width, height=height, steps=1, mode="references")
    result = live.edit([photo(24, 40), photo(40, 24, seed=1), photo(200, 1, seed=2)], wanted, timeout=PATIENCE_S)
    assert result.image.shape == (height, width, 3)
