"""One version, told by the programs wherever a person or a program may look for it."""

import re

import httpx
import pytest
from support import ROOT
from support.http import StubPipeline, serving

import server
import webui_realtime
from qwen_realtime import RealtimeEngine
from serving.holder import EngineHolder
from serving.version import VERSION


def test_the_changelog_begins_with_the_version_that_the_programs_tell(capsys):
    newest = re.search(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == VERSION
    for program in (server, webui_realtime):
        with pytest.raises(SystemExit) as end:
            program.parse_args(["--version"])
        assert end.value.code == 0 and capsys.readouterr().out == f"{VERSION}\n"


def test_health_and_the_document_of_the_routes_tell_the_version():
    with RealtimeEngine(StubPipeline()) as engine, serving(EngineHolder(engine)) as address:
        assert httpx.get(f"http://{address}/health").json()["version"] == VERSION
        assert httpx.get(f"http://{address}/openapi.json").json()["info"]["version"] == VERSION
