"""Pace: which steps, size, stream batch and reuse hold a rate or a latency, from what frames were measured to cost.

`Costs` keeps what frames took lately, by what they were (`Plan`), and estimates what was not measured from what was.
`pick` chooses: of all plans that are no more than was asked for, the one that loses least and holds the target.
`Pace` is one stream's: it changes the plan only for a reason that lasts, so that a picture does not flicker between two
sizes. No part of it runs anything: a change takes effect with the next frame, and no one waits for it. The clock is
passed in.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine.settings import EditParams
from pipeline.geometry import TOKEN, in_shape

LEAST_SIDE = 64  # pixels
SCALES = (1.0, 0.75, 0.5)  # of the size that was asked for
KEPT_FRAMES = 9  # a cost is the median over this number of frames
STALE_S = 30.0  # an older measurement no longer counts: other sessions come and go
FEWEST_FRAMES = 3  # with a plan before it is judged
HOLD_S = 2.0  # a plan stays this long before a better one is tried; twice as long after each that was taken back
LONGEST_HOLD_S = 60.0
TOO_SLOW = 1.05  # change to a cheaper plan above this share of the target
ROOM = 0.85  # try a better plan only if it should take at most this share of the target
GAIN = 0.8  # where no plan holds the target, a change must bring the time down to this share
TOKENS_EXPONENT = 0.8  # of the denoise's time: weights are read for few tokens as for many
BATCH_SHARE = 0.9  # what a frame costs in a stream batch, of what it costs alone
REUSE_SHARE = 0.5  # what a frame costs with reuse, before that was measured


class Plan(NamedTuple):
    """How a frame is computed."""

    steps: int
    width: int
    height: int
    stream_batch: bool
    reuse: str
    guidance: str = "none"  # not pace's to change, as are the last two: a frame's cost depends on them
    pictures: int = 1

    def __str__(self) -> str:
        text = f"{self.steps} step{'s' * (self.steps > 1)} at {self.width}x{self.height}"
        text += ", stream batch" if self.stream_batch else ""
        return text + (f", reuse {self.reuse}" if self.reuse != "off" else "")


class Cost(NamedTuple):
    """Milliseconds of one frame."""

    encode: float
    denoise: float  # all its steps; in a stream batch all the forwards that it was in
    decode: float
    latency: float  # submit to done, waiting included

    @property
    def model(self) -> float:
        return self.encode + self.denoise + self.decode


def plan_of(params: EditParams, size: tuple[int, int], pictures: int) -> Plan:
    guidance = params.cfg_mode if params.guided else "none"
    return Plan(params.steps, *size, params.stream_batch, params.reuse, guidance, pictures)


def interval_ms(plan: Plan, cost: Cost, overlap: bool) -> float:
    """Time from one frame of the stream to the next, if nothing else uses the device."""
    denoise = cost.denoise / plan.steps if plan.stream_batch else cost.denoise
    sides = cost.encode + cost.decode
    return max(denoise, sides) if overlap else denoise + sides


class Costs:
    """What frames took lately: running medians by plan."""

    def __init__(self):
        self._measured: dict[Plan, collections.deque[tuple[float, Cost]]] = {}

    def add(self, plan: Plan, cost: Cost, now_monotonic: float) -> None:
        self._measured.setdefault(plan, collections.deque(maxlen=KEPT_FRAMES)).append((now_monotonic, cost))
        if len(self._measured) > 64:
            del self._measured[min(self._measured, key=lambda p: self._measured[p][-1][0])]

    def measured(self, plan: Plan, now_monotonic: float) -> Cost | None:
        """The medians; None without a frame in the last STALE_S."""
        recent = [cost for at, cost in self._measured.get(plan, ()) if now_monotonic - at < STALE_S]
        return Cost(*map(statistics.median, zip(*recent, strict=True))) if recent else None

    def expected(self, plan: Plan, now_monotonic: float) -> Cost | None:
        """Measured, or estimated from the plan most like it that was; None if nothing was."""
        if (cost := self.measured(plan, now_monotonic)) is not None:
            return cost
        known = {p: c for p in self._measured if (c := self.measured(p, now_monotonic)) is not None}
        if not known:
            return None
        like = min(known, key=lambda p: _unlikeness(p, plan))
        return estimate(plan, like, known[like])


def _unlikeness(one: Plan, other: Plan) -> float:
    pixels = abs(math.log2(one.width * one.height / (other.width * other.height)))
    differ = sum(a != b for a, b in zip(one[3:], other[3:], strict=True))
    return 4 * differ + pixels + abs(math.log2(one.steps / other.steps))


def estimate(plan: Plan, known: Plan, cost: Cost) -> Cost:
    """What a frame of `plan` should cost if one of `known` costs this: by steps, pixels, batch and reuse."""
    pixels = plan.width * plan.height / (known.width * known.height)
    encode, decode = cost.encode * pixels, cost.decode * pixels
    denoise = cost.denoise * plan.steps / known.steps * pixels**TOKENS_EXPONENT
    for is_batched, factor in (
        (known.stream_batch, 1 / (BATCH_SHARE * known.steps)),
        (plan.stream_batch, BATCH_SHARE * plan.steps),
    ):
        denoise *= factor if is_batched else 1.0
    for reuses, factor in ((known.reuse == "frames", 1 / REUSE_SHARE), (plan.reuse == "frames", REUSE_SHARE)):
        denoise *= factor if reuses else 1.0
    waits = cost.latency / cost.model if cost.model else 1.0
    return Cost(encode, denoise, decode, (encode + denoise + decode) * waits)


def plans(asked: Plan, may_reuse: bool) -> list[Plan]:
    """What may be computed in the asked plan's place, what loses least first. The asked one is the first."""
    sizes = [_smaller((asked.width, asked.height), scale) for scale in SCALES]
    found: dict[Plan, float] = {}
    for shrunk, (width, height) in enumerate(sizes):
        for steps in range(asked.steps, 0, -1):
            for reuse in dict.fromkeys((asked.reuse, "frames" if may_reuse else asked.reuse)):
                for batch in dict.fromkeys((asked.stream_batch, reuse == "off" and steps > 1)):
                    plan = asked._replace(steps=steps, width=width, height=height, stream_batch=batch, reuse=reuse)
                    loss = 3.0 * shrunk + 3.0 * math.log2(asked.steps / steps)
                    loss += (1.5 if reuse != asked.reuse else 0.0) + (0.5 if batch != asked.stream_batch else 0.0)
                    found.setdefault(plan, loss)
    return sorted(found, key=found.__getitem__)


def _smaller(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """The size times `scale`, in the same shape; its shorter side a multiple of 16, so that no token is padding there.

    A side of less than LEAST_SIDE is not made smaller.
    """
    short = min(size)
    side = max(min(short, LEAST_SIDE), int(short * scale) // TOKEN * TOKEN)
    if scale == 1.0 or side == short:
        return size
    given = {"height": side} if size[1] == short else {"width": side}
    return in_shape(size, **given, longest=max(size))


def pick(candidates: Iterable[Plan], strain: Callable[[Plan], float], room: float) -> Plan:
    """The first candidate whose `strain`, expected time over allowed, is at most `room`; else the one with the least."""
    candidates = list(candidates)
    return next((plan for plan in candidates if strain(plan) <= room), min(candidates, key=strain))


@dataclasses.dataclass(eq=False)
class Pace:
    """One stream's pace. `text` says what it picked and why; empty while it is off."""

    text: str = ""
    _asked: tuple = ()
    _plan: Plan | None = None
    _since_monotonic: float = 0.0
    _frames: int = 0  # computed with the plan
    _hold_s: float = HOLD_S
    _rose: bool = False  # whether the last change was to a better plan

    def choose(
        self,
        params: EditParams,
        asked: Plan,
        may_reuse: bool,
        costs: Costs,
        sessions: int,
        overlap: bool,
        now_monotonic: float,
    ) -> Plan:
        """What the next frame computes. `sessions` share the device now, this one included."""
        if not params.target_fps and not params.latency_budget_ms:
            self.text, self._plan = "", None
            return asked

        def times(plan: Plan) -> list[tuple[float, float]]:
            """(expected, allowed) milliseconds for each target."""
            cost = costs.expected(plan, now_monotonic)
            if cost is None:
                return [(0.0, 1.0)]  # nothing was measured yet
            pairs = [(cost.latency, params.latency_budget_ms)] if params.latency_budget_ms else []
            if params.target_fps:
                pairs.append((interval_ms(plan, cost, overlap) * sessions, 1000.0 / params.target_fps))
            return pairs

        def strain(plan: Plan) -> float:
            return max(expected / allowed for expected, allowed in times(plan))

        wanted = (asked, may_reuse, params.target_fps, params.latency_budget_ms)
        if self._asked != wanted or self._plan is None:
            self._asked, self._hold_s, self._rose = wanted, HOLD_S, False
            self._change(pick(plans(asked, may_reuse), strain, 1.0), now_monotonic)
        elif self._frames >= FEWEST_FRAMES:
            self._adjust(self._plan, plans(asked, may_reuse), strain, now_monotonic)
        self._frames += 1
        assert self._plan is not None
        self.text = self._explained(params, asked, self._plan, strain, times)
        return self._plan

    def _adjust(
        self, current: Plan, candidates: list[Plan], strain: Callable[[Plan], float], now_monotonic: float
    ) -> None:
        held_s = now_monotonic - self._since_monotonic
        if strain(current) > TOO_SLOW:
            other = pick(candidates, strain, 1.0)
            if strain(other) <= 1.0 or strain(other) < GAIN * strain(current):
                self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S) if self._rose else self._hold_s
                self._rose = False
                self._change(other, now_monotonic)
        elif held_s >= self._hold_s:
            better = candidates[: candidates.index(current)]
            other = next((plan for plan in better if strain(plan) <= ROOM), None)
            if other is not None:
                self._rose = True
                self._change(other, now_monotonic)

    def _change(self, plan: Plan, now_monotonic: float) -> None:
        if plan != self._plan:
            self._plan, self._since_monotonic, self._frames = plan, now_monotonic, 0

    @staticmethod
    def _explained(
        params: EditParams,
        asked: Plan,
        picked: Plan,
        strain: Callable[[Plan], float],
        times: Callable[[Plan], list[tuple[float, float]]],
    ) -> str:
        targets = [f"{params.target_fps:g} frames/s"] if params.target_fps else []
        targets += [f"{params.latency_budget_ms:g} ms latency"] if params.latency_budget_ms else []
        expected, allowed = max(times(picked), key=lambda pair: pair[0] / pair[1])
        text = f"pace: {picked} for {' and '.join(targets)}"
        if not expected:
            return f"{text}: nothing is measured yet"
        text += f": {expected:.0f} of {allowed:.0f} ms"
        if picked != asked:
            slow, allowed = max(times(asked), key=lambda pair: pair[0] / pair[1])
            text += f"; as asked, {asked}, it would be {slow:.0f}"
        return text + ("; nothing that may be changed holds it" if strain(picked) > TOO_SLOW else "")
