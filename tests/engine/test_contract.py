"""The contract between the engine and its pipelines: whoever stands in for the model has what the engine calls."""

import ast
import inspect

import pytest
from support.engine import BatchingFake, FakePipeline
from support.http import StubPipeline

from benchmarks.live_view import ROOT, PassThrough
from benchmarks.serving.soak import ThroughPipeline
from engine import contract

PROTOCOLS = (contract.Pipeline, contract.StreamBatchPipeline, contract.FadingPipeline)
NAMES_OF_A_PIPELINE = {"pipe", "_pipe", "pipeline", "_pipeline", "_batching", "_fading"}


def members(*protocols) -> tuple[set[str], dict[str, inspect.Signature]]:
    """Names of the attributes, and the methods' signatures."""
    attributes, methods = set(), {}
    for protocol in protocols:
        for part in protocol.__mro__:
            if part.__module__ == contract.__name__:
                attributes |= set(part.__annotations__)
                attributes |= {n for n, m in vars(part).items() if isinstance(m, property)}
                methods |= {
                    n: inspect.signature(m) for n, m in vars(part).items() if inspect.isfunction(m) and n[0] != "_"
                }
    return attributes, methods


def missing(pipeline, *protocols) -> list[str]:
    """What the pipeline has not, or cannot be called with as the contract says."""
    attributes, methods = members(*protocols)
    wrong = [name for name in attributes | set(methods) if not hasattr(pipeline, name)]
    for name in set(methods) - set(wrong):
        _, *parameters = methods[name].parameters.values()  # without self
        by_position = [None for p in parameters if p.kind is p.POSITIONAL_ONLY]
        by_name = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert len(by_position) + len(by_name) == len(parameters), f"{name}: the contract leaves open how it is called"
        try:
            inspect.signature(getattr(pipeline, name)).bind(*by_position, **by_name)
        except TypeError as error:
            wrong.append(f"{name}: {error}")
    return wrong


def test_the_real_pipeline_has_all_that_the_engine_calls(pocket):
    assert missing(pocket, *PROTOCOLS) == []
    assert missing(ThroughPipeline(**pocket.components), *PROTOCOLS) == []


@pytest.mark.parametrize("stand_in", [lambda: PassThrough(64), FakePipeline, StubPipeline])
def test_a_stand_in_has_all_that_the_engine_calls_for_a_frame(stand_in):
    assert missing(stand_in(), contract.Pipeline) == []
    assert missing(BatchingFake(), contract.StreamBatchPipeline) == []


def test_what_a_pipeline_lacks_is_named():
    class Older(FakePipeline):
        fused_transformer = property()  # raises AttributeError

        def encode_references(self, images, *, width, height):
            return images

    assert sorted(line.split(":")[0] for line in missing(Older(), contract.Pipeline)) == [
        "encode_references",
        "fused_transformer",
    ]


def test_the_engine_uses_nothing_of_a_pipeline_that_the_contract_does_not_name():
    attributes, methods = members(*PROTOCOLS)
    used = set()
    for file in [*(ROOT / "engine").glob("*.py"), ROOT / "qwen_realtime.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "attr", getattr(node.value, "id", None))
                used |= {node.attr} if owner in NAMES_OF_A_PIPELINE else set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                owner = getattr(node.args[0], "attr", getattr(node.args[0], "id", None))
                assert owner not in NAMES_OF_A_PIPELINE, (
                    f"{file.name}: a member that may be absent is none of the contract's"
                )
    assert used == attributes | set(methods), "what the engine uses, and what the contract names"
