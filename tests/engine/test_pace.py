"""Pace, without a model: costs are given, time moves when the test says so; at the end once through the engine."""

import itertools
import random

import pytest
from support.engine import Clock, FakePipeline, edit, serve
from support.pictures import grey

from engine.pace import HOLD_S, Cost, Costs, Pace, Plan, estimate, interval_ms, pick, plan_of, plans
from engine.settings import EditParams
from qwen_realtime import RealtimeEngine

ASKED = Plan(4, 512, 512, False, "off")
FPS = EditParams("sepia", steps=4, target_fps=20.0)


class Device:
    """A GPU whose frames cost what the formula says, give or take `noise`; the engine's part is played here."""

    def __init__(self, ms_a_step=20.0, noise=0.0, reuse=0.4):
        self.ms_a_step, self.now, self.costs, self.pace = ms_a_step, 0.0, Costs(), Pace()
        self.noise, self.reuse, self.chance = noise, reuse, random.Random(0)
        self.picked: list[Plan] = []

    def cost(self, plan: Plan) -> Cost:
        pixels = plan.width * plan.height / 512**2
        denoise = self.ms_a_step * plan.steps * pixels * (self.reuse if plan.reuse == "frames" else 1.0)
        denoise *= plan.steps * 0.9 if plan.stream_batch else 1.0
        denoise *= 1 + self.noise * self.chance.uniform(-1, 1)
        return Cost(3 * pixels, denoise, 4 * pixels, denoise + 8 * pixels)

    def frames(self, count, params=FPS, may_reuse=False, sessions=1):
        for _ in range(count):
            plan = self.pace.choose(params, ASKED, may_reuse, self.costs, sessions, False, self.now)
            cost = self.cost(plan)
            self.now += interval_ms(plan, cost, False) * sessions / 1000
            self.costs.add(plan, cost, self.now)
            self.picked.append(plan)
        return self.picked[-count:]


def test_without_a_target_it_is_as_asked():
    device = Device()
    assert device.frames(5, EditParams("sepia", steps=4)) == [ASKED] * 5 and device.pace.text == ""


def test_a_rate_is_held_with_what_loses_least():
    device = Device()
    last = device.frames(60)[-1]
    assert interval_ms(last, device.cost(last), False) <= 50 * 1.05
    assert (last.width, last.steps, last.stream_batch) in ((512, 2, False), (512, 2, True)), last
    assert "for 20 frames/s" in device.pace.text and "as asked, 4 steps at 512x512" in device.pace.text


def test_reuse_comes_before_fewer_steps_and_a_smaller_size():
    device = Device()
    last = device.frames(60, may_reuse=True)[-1]
    assert last == ASKED._replace(reuse="frames"), last


def test_a_latency_is_held_and_a_stream_batch_is_no_way_to_it():
    device = Device()
    last = device.frames(60, EditParams("sepia", steps=4, latency_budget_ms=50.0))[-1]
    assert not last.stream_batch and device.cost(last).latency <= 50 * 1.05, last


def test_what_cannot_be_held_is_said():
    device = Device(ms_a_step=400.0)
    last = device.frames(60)[-1]
    assert last[:3] == (1, 256, 256) and device.pace.text.endswith("nothing that may be changed holds it")


@pytest.mark.parametrize("may_reuse", [False, True])
@pytest.mark.parametrize("ms_a_step", [20.0, 24.0, 30.0, 400.0])
def test_costs_that_vary_by_a_third_do_not_make_it_flap(ms_a_step, may_reuse):
    device = Device(ms_a_step, noise=0.3)
    device.frames(300, may_reuse=may_reuse)
    changes = sum(a != b for a, b in itertools.pairwise(device.picked[30:]))
    assert changes <= 6, (changes, device.now)


def test_where_nothing_holds_it_does_not_try_one_thing_after_the_other():
    """Everything moves, so that reuse gains nothing: two plans take the same time, give or take the noise."""
    device = Device(300.0, noise=0.3, reuse=1.0)
    for target in (FPS, FPS.replace(latency_budget_ms=10.0)):  # a new target each time, so that both are measured
        device.frames(6, target, may_reuse=True)
    picked = device.frames(200, may_reuse=True)
    assert sum(a != b for a, b in itertools.pairwise(picked)) <= 1, {*picked}


def test_it_does_not_flap_and_comes_back_when_there_is_room():
    device = Device()
    device.frames(200)
    settled = device.picked[20:]
    assert len({*settled}) <= 2 and sum(a != b for a, b in itertools.pairwise(settled)) <= 2, settled
    device.ms_a_step = 5.0
    until = device.now + 60
    while device.now < until:
        device.frames(1)
    assert device.picked[-1] == ASKED, "as asked again, when that is fast enough"
    changes = sum(a != b for a, b in zip(device.picked, device.picked[1:]))
    assert changes < 12, changes


def test_a_better_plan_is_tried_after_a_while_and_less_often_each_time():
    device = Device()
    device.frames(60)
    before = device.picked[-1]
    began = device.now
    device.ms_a_step = 1.0
    while device.picked[-1] == before:
        device.frames(1)
    assert device.now - began <= 30.0 + HOLD_S + 1, "what was measured long ago is not believed for ever"


def test_sessions_share_the_device():
    alone, shared = Device(ms_a_step=10.0), Device(ms_a_step=10.0)
    assert alone.frames(60)[-1] == ASKED
    assert shared.frames(60, sessions=3)[-1] != ASKED


def test_a_new_target_is_taken_up_at_once():
    device = Device()
    device.frames(60)
    assert device.frames(1, EditParams("sepia", steps=4, target_fps=1.0)) == [ASKED]


def test_plans_are_never_more_than_was_asked_and_begin_with_it():
    for may_reuse in (False, True):
        found = plans(ASKED, may_reuse)
        assert found[0] == ASKED and len(set(found)) == len(found)
        assert all(p.steps <= 4 and p.width <= 512 and p.width % 16 == 0 and p.width >= 64 for p in found)
        assert any(p.reuse == "frames" for p in found) == may_reuse
        assert not any(p.stream_batch and p.reuse == "frames" for p in found)
    assert {p.width for p in plans(Plan(1, 64, 80, False, "off"), False)} == {64}


def test_an_estimate_goes_by_steps_and_pixels_and_there_and_back_is_the_same():
    cost = Cost(4.0, 80.0, 6.0, 100.0)
    half = estimate(ASKED._replace(steps=2), ASKED, cost)
    assert half.denoise == 40 and half.encode == 4 and half.latency == pytest.approx(50 * 100 / 90)
    for other in (
        ASKED._replace(stream_batch=True),
        ASKED._replace(reuse="frames"),
        ASKED._replace(width=256, steps=1),
    ):
        back = estimate(ASKED, other, estimate(other, ASKED, cost))
        assert back == pytest.approx(cost)
    batched = ASKED._replace(stream_batch=True)
    assert interval_ms(batched, estimate(batched, ASKED, cost), False) < interval_ms(ASKED, cost, False)


def test_the_first_that_holds_is_picked_or_the_nearest():
    strain = {"a": 3.0, "b": 1.5, "c": 0.9, "d": 0.5}.get
    assert pick("abcd", strain, 1.0) == "c" and pick("ab", strain, 1.0) == "b"


def test_overlap_hides_what_is_beside_the_denoise():
    cost = Cost(4.0, 80.0, 6.0, 100.0)
    assert (interval_ms(ASKED, cost, False), interval_ms(ASKED, cost, True)) == (90, 80)


def test_the_engine_computes_what_pace_picks_and_says_so():
    """The clock moves 30 ms a step: 10 frames a second are three steps."""
    fake, clock = FakePipeline(), Clock()
    inner = fake.denoise

    def denoise(*args, **options):
        clock.now += 0.03 * args[4]
        return inner(*args, **options)

    fake.denoise = denoise
    params = edit(steps=8, latency_budget_ms=100.0, seed=5)
    with RealtimeEngine(fake, clock=clock) as engine, engine.open_session() as session:
        results = serve(session, *[(grey(), params)] * 8)
        assert results[-1].age_ms <= 105 and results[-1].params == params
        (note,) = results[-1].notes
        assert "for 100 ms latency" in note and "as asked, 8 steps" in note
        assert engine.stats().pace == (note,)
        (off,) = serve(session, (grey(), params.replace(latency_budget_ms=0.0)))
        assert off.notes == () and off.age_ms == pytest.approx(240) and engine.stats().pace == ()


def test_a_plan_knows_what_the_frame_was():
    params = EditParams("sepia", steps=3, cfg_scale=2.0, cfg_mode="batched", stream_batch=True)
    assert plan_of(params, (64, 96), 2) == Plan(3, 64, 96, True, "off", "batched", 2)


def test_the_device_is_shared_by_the_sessions_that_got_a_picture_within_the_last_second(monkeypatch):
    clock, shared_by, choose = Clock(), [], Pace.choose

    def noting(self, params, asked, may_reuse, costs, sessions, *rest):
        shared_by.append(sessions)
        return choose(self, params, asked, may_reuse, costs, sessions, *rest)

    monkeypatch.setattr(Pace, "choose", noting)
    with RealtimeEngine(FakePipeline(), clock=clock) as engine, engine.open_session() as one, engine.open_session() as two:
        for session, later_s in ((one, 0), (two, 0), (one, 0.1), (two, 0.8), (two, 0.3), (one, 0.1), (one, 0.1), (one, 2.0)):
            clock.now += later_s
            serve(session, (grey(), edit()))
    # At 0, 0, 0.1, 0.9, 1.2, 1.3, 1.4 and 3.4 s: at 1.2 s the picture of `one` is 1.1 s old. Never fewer than the one itself.
    assert shared_by == [1, 1, 2, 2, 1, 1, 2, 1]
