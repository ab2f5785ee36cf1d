"""Which way to multiply is chosen: from the table, measured once and remembered, or not measured while a graph is recorded."""

import pytest
import torch

from quantization.choices import LAYERS, PAIRS, Choice, Choices, Shape, row_bucket
from quantization.tiles import CANDIDATES, PAIR_CANDIDATES, Config

GPU, OTHER_GPU = torch.device("cuda", 0), torch.device("cuda", 1)
CONFIG = Config(64, 128, 128, 4, 4)
TABLE = {("int8", 512, 96, 64): ("triton", CONFIG)}
UNMEASURED = Choice("int_mm", None, "not measured")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A Hopper GPU that records nothing; change `capability` and `recording`."""
    state = {"capability": (9, 0), "recording": False}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state["capability"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["recording"])
    return state


class Measuring:
    """Measures nothing, but counts: the n-th measurement names n."""

    def __init__(self):
        self.count = 0

    def __call__(self) -> Choice:
        self.count += 1
        return Choice("triton", CONFIG, f"measurement {self.count}")


def find(found: Choices, measure, rows=400, dtype=torch.bfloat16, device=GPU, backends=("triton", "int_mm"), outputs=96):
    return found.find(Shape("int8", rows, outputs, 64), dtype, device, backends, measure, UNMEASURED)


def test_a_shape_is_measured_once_for_its_class_of_rows():
    found, measure = Choices({}), Measuring()
    assert {find(found, measure, rows).reason for rows in (257, 300, 512)} == {"measurement 1"}
    assert find(found, measure, 513).reason == "measurement 2"
    assert [row_bucket(rows) for rows in (1, 64, 65, 512, 513)] == [64, 64, 128, 512, 1024]


@pytest.mark.parametrize("other", [
    {"dtype": torch.float16}, {"device": OTHER_GPU}, {"backends": ("triton",)}, {"outputs": 128},
], ids=str)  # fmt: skip
def test_what_was_measured_holds_for_nothing_else(other):
    found, measure = Choices({}), Measuring()
    find(found, measure)
    assert find(found, measure, **other).reason == "measurement 2"


def test_two_owners_share_nothing():
    measure = Measuring()
    find(Choices({}), measure)
    find(Choices({}), measure)
    assert measure.count == 2


def test_on_an_h200_the_table_stands_for_a_measurement():
    measure = Measuring()
    assert find(Choices(TABLE), measure) == ("triton", CONFIG, "the fastest on an H200 (table)")
    assert measure.count == 0


@pytest.mark.parametrize("other", [
    {"rows": 513}, {"outputs": 112}, {"dtype": torch.float32}, {"backends": ("int_mm",)},
], ids=str)  # fmt: skip
def test_the_table_holds_for_its_shapes_for_16_bits_and_for_what_is_possible(other):
    measure = Measuring()
    find(Choices(TABLE), measure, **other)
    assert measure.count == 1


@pytest.mark.parametrize("capability", [(8, 9), (10, 0)])
def test_other_gpus_measure_for_themselves(hopper, capability):
    hopper["capability"], measure = capability, Measuring()
    find(Choices(TABLE), measure)
    assert measure.count == 1


def test_nothing_is_measured_while_a_graph_is_recorded_and_it_is_measured_afterwards(hopper):
    found, measure = Choices({}), Measuring()
    hopper["recording"] = True
    assert find(found, measure) == UNMEASURED and measure.count == 0
    assert find(Choices(TABLE), measure).backend == "triton", "the table needs no measurement"
    hopper["recording"] = False
    assert find(found, measure).reason == "measurement 1"
    hopper["recording"] = True
    assert find(found, measure).reason == "measurement 1", "remembered"


def test_the_tables_name_backends_and_configurations_that_there_are():
    assert {backend for backend, _ in LAYERS.values()} <= {"triton", "scaled_mm", "int_mm"}
    assert all((backend == "triton") == (config in CANDIDATES) for backend, config in LAYERS.values())
    assert {backend for backend, _ in PAIRS.values()} == {"joint", "separate"}
    assert all(config in PAIR_CANDIDATES for _, config in PAIRS.values())
    for table in (LAYERS, PAIRS):
        assert all(kind in ("int8", "fp8") and rows == row_bucket(rows) for kind, rows, _, _ in table)
