"""Which function runs, is recorded, replayed or evicted: the bookkeeping of `Graphs`, with a recorder that needs no GPU."""

import pytest
import torch
from support.graphs import EagerRecorder

from fast_path.graphs import Graphs


@pytest.fixture
def graphs():
    return Graphs(max_entries=3, recorder=EagerRecorder())


def times(factor):
    return lambda x: x * factor


def row(width: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((1, width), float(value))


def test_on_the_cpu_a_graph_is_the_function_itself():
    graphs, calls = Graphs(), []
    graphs.run("double", lambda x: calls.append(1) or x * 2, row(2))
    assert graphs.run("double", lambda x: calls.append(1) or x * 2, row(2)).tolist() == [[2, 2]]
    assert len(calls) == 2 and len(graphs) == graphs.recordings == 0 and graphs.knows("double", row(2))


def test_the_first_call_for_a_key_is_recorded_and_later_ones_replay_it_on_their_own_inputs(graphs):
    assert not graphs.knows("times", row(2))
    assert graphs.run("times", times(2), row(2, 1)).tolist() == [[2, 2]]
    assert graphs.knows("times", row(2)) and (len(graphs), graphs.recordings) == (1, 1)
    # The key promises that the function is the same: what was recorded runs, not what is given now.
    assert graphs.run("times", times(9), row(2, 5)).tolist() == [[10, 10]]
    assert graphs.recordings == 1


def test_a_result_belongs_to_the_caller_one_tensor_or_several(graphs):
    for key, function in {"one": times(2), "several": lambda x: (x + 1, x + 2)}.items():
        graphs.run(key, function, row(1))
        first = graphs.run(key, function, row(1, 10))
        second = graphs.run(key, function, row(1, 20))
        assert isinstance(first, torch.Tensor) == (key == "one")
        values = [float(t) for result in (first, second) for t in ([result] if key == "one" else result)]
        assert values == ([20, 40] if key == "one" else [11, 12, 21, 22]), "a later replay wrote into an earlier result"


@pytest.mark.parametrize(
    "other", [("times", row(3)), ("other", row(2)), ("times", row(2).double()), ("times", row(2).T)],
    ids=["width", "key", "dtype", "orientation"],
)  # fmt: skip
def test_another_key_shape_or_type_is_another_recording(graphs, other):
    graphs.run("times", times(2), row(2))
    key, x = other
    assert not graphs.knows(key, x)
    graphs.run(key, times(2), x)
    assert graphs.knows(key, x) and graphs.knows("times", row(2)) and graphs.recordings == 2


def test_every_input_counts_not_only_the_first(graphs):
    graphs.run("sum", torch.add, row(1), row(2))
    assert not graphs.knows("sum", row(1), row(3))


def test_the_recording_that_was_not_used_for_longest_is_evicted(graphs):
    for width in (1, 2, 3):
        assert not graphs.full
        graphs.run("times", times(2), row(width))
    assert graphs.full
    graphs.run("times", times(2), row(1))  # now 2 is the one unused for longest
    graphs.run("times", times(2), row(4))
    assert [width for width in (1, 2, 3, 4) if graphs.knows("times", row(width))] == [1, 3, 4]
    assert len(graphs) == 3 and graphs.recordings == 4


def test_what_is_recorded_ahead_is_known_and_counts_and_gives_its_results(graphs):
    graphs.record("times", times(2), row(2))
    assert graphs.knows("times", row(2)) and (len(graphs), graphs.recordings) == (1, 1)
    assert graphs.run("times", times(9), row(2, 3)).tolist() == [[6, 6]]
    for width in (3, 4, 5):
        graphs.record("times", times(2), row(width))
    assert len(graphs) == 3 and not graphs.knows("times", row(2))


def test_a_function_that_fails_is_not_recorded(graphs):
    with pytest.raises(ZeroDivisionError):
        graphs.run("bad", lambda x: x * (1 / 0), row(1))
    assert len(graphs) == graphs.recordings == 0 and not graphs.knows("bad", row(1))


def test_cleared_graphs_know_nothing_and_begin_a_new_memory_pool():
    recorder = EagerRecorder()
    graphs = Graphs(recorder=recorder)
    for width in (1, 2):
        graphs.run("times", times(2), row(width))
    assert recorder.pools == 1
    graphs.clear()
    assert len(graphs) == 0 and not graphs.knows("times", row(1))
    assert graphs.run("times", times(3), row(1)).tolist() == [[3]] and recorder.pools == 2
