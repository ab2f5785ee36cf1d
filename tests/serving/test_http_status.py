"""What the server says about itself: alive, ready, in numbers, and in a document that its own examples hold to."""

import asyncio
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import jsonschema
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from support.http import StubPipeline, b64, post, serving
from support.pictures import grey

from pipeline.images import EditError, encode_jpeg, open_image
from qwen_realtime import CHOICES, LIMITS, EditParams, RealtimeEngine
from server import EngineHolder, Guard, create_routes
from serving.document import docs_page, openapi
from serving.models import check_edit
from serving.status import resident_bytes


def get(holder: EngineHolder, path: str, headers: dict | None = None) -> httpx.Response:
    app = FastAPI(routes=create_routes(holder))

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8086") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def engine():
    with RealtimeEngine(StubPipeline()) as engine:
        yield engine


def test_ready_tells_loading_warming_ready_and_failed_apart_while_health_is_always_200(engine):
    holder = EngineHolder(choice={"model": "stub"})
    holder.progress("Reading", 0.4)
    loading = get(holder, "/ready")
    assert loading.status_code == 503 and int(loading.headers["retry-after"]) > 0
    assert loading.json() == {"state": "loading", "text": "Reading", "fraction": 0.4}
    holder.progress("Editing a first picture", 0.95, warming=True)
    assert get(holder, "/ready").json()["state"] == "warming" and get(holder, "/ready").status_code == 503
    health = get(holder, "/health")  # the page knows three states: warming is the end of loading
    assert health.status_code == 200 and (health.json()["state"], health.json()["phase"]) == ("loading", "warming")
    holder.ready(engine)
    assert get(holder, "/ready").status_code == 200 and get(holder, "/ready").json()["state"] == "ready"
    holder.fail("no such folder")
    failed = get(holder, "/ready")
    assert failed.status_code == 503 and "retry-after" not in failed.headers  # waiting does not help
    assert failed.json()["state"] == "failed" and "no such folder" in failed.json()["text"]
    assert get(holder, "/health").status_code == 200


def test_health_says_how_far_loading_is_then_what_runs():
    holder = EngineHolder(choice={"model": "stub", "reason": "a test"})
    with serving(holder) as address:
        holder.progress("Reading", 0.4)
        health = httpx.get(f"http://{address}/health").json()
        assert (health["state"], health["text"], health["fraction"]) == ("loading", "Reading", 0.4)
        with RealtimeEngine(StubPipeline()) as engine:
            holder.ready(engine)
            health = httpx.get(f"http://{address}/health").json()
        assert health["state"] == "ready" and health["default_size"] == 64 and health["choice"]["reason"] == "a test"
        assert health["description"]["model"] == "stub" and health["stats"]["sessions"] == 0
        holder.fail("no such folder")
        health = httpx.get(f"http://{address}/health").json()
        assert (health["state"], health["text"]) == ("failed", "no such folder")


def test_health_tells_model_choice_queue_live_views_and_memory(engine):
    health = get(EngineHolder(engine, {"model": "stub", "reason": "a test"}), "/health").json()
    assert health["choice"]["reason"] == "a test" and health["description"]["model"] == "stub"
    assert health["queue"] == {"running": 0, "waiting": 0, "places": 40, "held_bytes": 0}
    assert health["live"] == {"sockets": 0, "sessions": 0, "waiting": 0}
    assert health["decoder"] == {"running": 0, "waiting": 0, "held_pixels": 0, "refused": 0, "killed": 0}
    assert 10e6 < health["memory_bytes"]["process"] < 1e12 and resident_bytes() > 10e6
    assert health["stats"]["latency_p95_ms"] >= 0


def metrics(text: str) -> dict[str, float]:
    """Prometheus's text format as its own library reads it: {name and labels: value}."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {
        sample.name + "".join(sorted(f"{{{key}={value}}}" for key, value in sample.labels.items())): sample.value
        for sample in samples
    }
    assert len(values) == len(samples), "twice"
    return values


def test_metrics_are_prometheus_text_in_base_units_and_count_what_happened(engine):
    with serving(EngineHolder(engine)) as address:
        before = metrics(httpx.get(f"http://{address}/metrics").text)
        assert post(address, {"image": b64(grey()), "prompt": "keep"}).status_code == 200
        assert post(address, {"image": "", "prompt": "keep"}).status_code == 400
        answer = httpx.get(f"http://{address}/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    after = metrics(answer.text)
    prefix = "image_editor_"
    assert after[prefix + "frames_total"] == before[prefix + "frames_total"] + 1
    for status in (200, 400):
        assert after[prefix + f"http_request_duration_seconds_count{{path=/edit}}{{status={status}}}"] == 1
        assert after[prefix + f"http_request_duration_seconds_sum{{path=/edit}}{{status={status}}}"] > 0
    assert after[prefix + "phase{phase=ready}"] == after[prefix + "ready"] == 1
    names = {re.split("[{]", name)[0].removeprefix(prefix) for name in after}
    assert names >= {
        "errors_total", "dropped_total", "sessions", "live_sessions", "queue_requests", "stage_seconds",
        "latency_seconds", "process_resident_memory_bytes", "frames_per_second", "frame_age_seconds", "skipped_ratio",
        "computed_ratio", "cache_hit_ratio", "decoder_killed_total",
    }  # fmt: skip
    stats = engine.stats()
    assert after[prefix + "stage_seconds{stage=total}"] == pytest.approx(stats.stages_ms["total"] / 1000)
    assert after[prefix + "latency_seconds{percentile=95}"] == pytest.approx(stats.latency_p95_ms / 1000)
    assert (after[prefix + "skipped_ratio"], after[prefix + "computed_ratio"]) == (0, 1)
    assert abs(after["process_resident_memory_bytes"] - resident_bytes()) < 100e6


@pytest.mark.parametrize(
    "accept, kind",
    [
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text; version=1.0.0"),
        ("text/plain;version=x", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=;escaping=?", "application/openmetrics-text"),
        ("image/png", "text/plain; version=0.0.4"),
    ],
)
def test_the_accept_header_chooses_the_metrics_format_and_no_header_breaks_it(accept, kind):
    answer = get(EngineHolder(), "/metrics", headers={"accept": accept})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)


def test_prometheus_own_check_has_nothing_to_say_of_the_metrics(engine):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    text = get(EngineHolder(engine), "/metrics").content
    run = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=20)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_metrics_are_there_before_the_model_is_and_each_application_has_its_own():
    holder = EngineHolder()
    values = metrics(get(holder, "/metrics").text)
    assert values["image_editor_ready"] == 0 and values["image_editor_phase{phase=loading}"] == 1
    assert "image_editor_frames_total" not in values
    assert not any("http_request" in name for name in metrics(get(holder, "/metrics").text)), "of another application"


# The document


def edit_bodies(document: dict) -> list[dict]:
    """The schemas of POST /edit's body, for one, two and three pictures."""
    return document["paths"]["/edit"]["post"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]


def parts(value, path: tuple = ()):
    """(path, object) of every JSON object in the document."""
    if isinstance(value, dict):
        yield path, value
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from parts(each, (*path, key))


@pytest.mark.parametrize("auth", [None, ("ann", "s3cret")])
def test_what_reads_the_document_needs_no_flags(auth):
    document = openapi(create_routes(EngineHolder(), auth))
    assert document["openapi"].startswith("3.1.")
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for path, part in parts(document):
        if isinstance(reference := part.get("$ref"), str):
            assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], path
        if "properties" in part and "components" in path:
            # Generators of types take a field with a default for one that is always there: right in an answer only.
            optional = part["properties"].keys() - set(part.get("required", ()))
            assert not any("default" in part["properties"][name] for name in optional), path
        if isinstance(part.get("type"), str) and "default" in part:
            jsonschema.validate(part["default"], part)
    for body in edit_bodies(document):
        jsonschema.Draft202012Validator.check_schema(body)
        assert "$ref" not in json.dumps(body) and body["additionalProperties"] is False


def test_the_document_tells_how_many_pictures_go_with_which_mode():
    one, two, three = (jsonschema.Draft202012Validator(body) for body in edit_bodies(openapi(create_routes(EngineHolder()))))
    picture = b64(grey())
    bodies = [{"image": picture, "prompt": "x"}]
    bodies += [bodies[0] | {"ref_image": picture}, bodies[0] | {"ref_image": picture, "ref_image_2": picture}]
    for mode, takes in ((None, (1, 2, 3)), ("edit", (1,)), ("blend", (2,)), ("references", (2, 3))):
        for count, schema in enumerate((one, two, three), 1):
            for pictures, body in enumerate(bodies, 1):
                asked = body if mode is None else body | {"mode": mode}
                assert schema.is_valid(asked) == (count == pictures and count in takes), (mode, count, pictures)
                try:
                    check_edit(asked)
                except EditError:
                    assert pictures not in takes
                else:
                    assert pictures in takes



def test_the_document_has_every_setting_with_the_engines_own_limits_and_defaults():
    bodies = edit_bodies(openapi(create_routes(EngineHolder())))
    assert [body["title"] for body in bodies] == ["EditOne", "EditTwo", "EditThree"]
    for body in bodies:
        for field in dataclasses.fields(EditParams):
            schema = body["properties"][field.name]
            assert schema["description"] == field.metadata["means"]
            number = schema["anyOf"][0] if field.default is None else schema
            if field.name in LIMITS:
                assert (number["minimum"], number["maximum"]) == LIMITS[field.name]
                assert number["type"] == ("number" if field.type is float else "integer")
            if field.name in CHOICES and field.name != "mode":
                assert tuple(schema["enum"]) == CHOICES[field.name]
            if field.name not in ("prompt", "mode"):
                assert schema.get("default") == field.default
    modes = [body["properties"]["mode"] for body in bodies]
    assert (modes[0]["const"], modes[1]["enum"], modes[2]["const"]) == ("edit", ["blend", "references"], "references")


def test_every_example_of_the_document_is_answered_with_200(engine):
    document = openapi(create_routes(EngineHolder()))
    examples = document["paths"]["/edit"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    with serving(EngineHolder(engine)) as address:
        for example in examples.values():
            answer = post(address, example["value"])
            assert answer.status_code == 200, answer.text
        assert httpx.get(f"http://{address}/openapi.json").json() == document
    assert len(examples) == 4


def test_the_docs_pages_program_works_as_it_stands(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(encode_jpeg(grey(200)))
    with serving(EngineHolder(engine)) as address:
        page = httpx.get(f"http://{address}/docs").text
        shell, program = (html.unescape(code) for code in re.findall("<pre><code>(.*?)</code>", page, re.DOTALL)[:2])
        exec(compile(program, "the docs page", "exec"), {})
        assert open_image(Path("edited.png").read_bytes()).shape == (64, 64, 3)
        if shutil.which("curl"):
            Path("edited.png").unlink()
            subprocess.run(["bash", "-c", shell], check=True, timeout=20, env=os.environ | {"NO_PROXY": "127.0.0.1"})
            assert open_image(Path("edited.png").read_bytes()).shape == (64, 64, 3)


def test_the_document_says_how_to_log_in_only_where_one_must():
    open_document, locked = (openapi(create_routes(EngineHolder(), auth)) for auth in (None, ("ann", "s3cret")))
    for item in open_document["paths"].values():
        assert all("security" not in operation for operation in item.values())
    for item in locked["paths"].values():
        assert all(operation["security"] == [{"bearer": []}, {"key": []}, {"login": []}] for operation in item.values())
    assert {each["type"] for each in locked["components"]["securitySchemes"].values()} == {"http", "apiKey"}
    assert "X-API-Key" not in docs_page(open_document, "http://x") and "X-API-Key" in docs_page(locked, "http://x")


def test_the_docs_page_names_every_field_and_answer_and_loads_nothing_from_anywhere(engine):
    answer = get(EngineHolder(engine), "/docs")
    page, document = answer.text, openapi(create_routes(EngineHolder()))
    operation = document["paths"]["/edit"]["post"]
    for name in (
        *(field.name for field in dataclasses.fields(EditParams)),
        *operation["responses"],
        "ref_image",
        "/live",
    ):
        assert name in page, name
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["openapi.json"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://127.0.0.1:8086/edit" in page  # the examples are for this server


def test_a_host_header_cannot_write_into_the_docs_page(engine):
    app = FastAPI(routes=create_routes(EngineHolder(engine), guard=Guard()))

    async def ask(host):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.get("/docs", headers={"host": host})

    for host in ('"><script>alert(1)</script>', "[", "a b"):
        answer = asyncio.run(ask(host))
        assert answer.status_code == 200 and "<script" not in answer.text
