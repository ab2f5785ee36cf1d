"""Sessions that come, go, cancel and change their settings at random: no newest frame is lost, nothing crosses."""

import random
from concurrent.futures import Future

import pytest
from support.engine import PATIENCE_S, BatchingFake, edit
from support.pictures import grey

from pipeline.images import EditError
from qwen_realtime import EngineConfig, RealtimeEngine

ACTIONS = 600


class Person:
    """One stream, and what it expects."""

    def __init__(self, engine, number: int):
        self.session, self.number, self.params = engine.open_session(), number, None
        self.sent: list[tuple[int, int, Future]] = []  # frame, seed, outcome

    def send(self, chance: random.Random) -> None:
        if self.params is None or chance.random() < 0.3:
            self.params = edit(
                f"person {self.number}", seed=self.number * 10 + chance.randrange(10), steps=chance.choice([1, 2, 4]),
                stream_batch=chance.random() < 0.7, skip_similar=chance.choice(["off", "patch"]), width=chance.choice([64, 96]),
            )  # fmt: skip
        number, outcome = self.session.submit_for_outcome([grey(value=chance.choice([50, 200]))], self.params)
        self.sent.append((number, self.params.seed, outcome))

    def check(self, ended: bool) -> int:
        """Of all its frames: delivered ones are its own, in order, and unless it left the newest is one of them."""
        delivered = []
        for number, seed, outcome in self.sent:
            try:
                result = outcome.result(PATIENCE_S)
            except EditError:  # dropped for a newer one, or cancelled
                continue
            assert result.error is None, result.error
            assert (result.number, result.image[0, 0, 0]) == (number, seed)
            delivered.append(number)
        assert ended or not self.sent or delivered[-1:] == [self.sent[-1][0]], (
            delivered,
            [sent[0] for sent in self.sent],
        )
        return len(delivered)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("luck", range(3))
def test_people_who_come_and_go_lose_no_newest_frame_and_never_see_each_others(overlap, luck):
    chance = random.Random(luck)
    engine = RealtimeEngine(BatchingFake(), EngineConfig(fast_path=False, max_sessions=8), draw=lambda: 0.5)
    engine._loop.overlap = overlap
    here, delivered, visitors = [], 0, 0
    with engine:
        for _ in range(ACTIONS):
            action = chance.random()
            if len(here) < 2 or (action < 0.05 and len(here) < 8):
                here.append(Person(engine, visitors % 25))
                visitors += 1
            elif action < 0.08:
                gone = here.pop(chance.randrange(len(here)))
                gone.session.close()
                delivered += gone.check(ended=True)
            elif action < 0.11:
                person = chance.choice(here)
                person.session.cancel()
                delivered += person.check(ended=True)
                person.sent = []
            elif action < 0.2:
                person = chance.choice(here)
                delivered += person.check(ended=False)  # everything that this one sent is done
                person.sent = []
            else:
                chance.choice(here).send(chance)
        delivered += sum(person.check(ended=False) for person in here)
        stats = engine.stats()
        assert stats.errors == 0 and delivered <= stats.frames and stats.skipped > 0
        assert delivered > 60, delivered
    assert engine._sessions.taken == [] and engine._loop.tail is None


def test_memory_of_sessions_that_left_is_free_again():
    engine = RealtimeEngine(BatchingFake(), EngineConfig(fast_path=False))
    with engine:
        for n in range(20):
            with engine.open_session() as session:
                params = edit(seed=n, steps=3, stream_batch=True)
                session.result(session.submit([grey()], params), PATIENCE_S)
                assert session.memory.result is not None
            assert session.memory.result is None and session.flight == []
        assert engine.stats().sessions == 0 and not engine._sessions
