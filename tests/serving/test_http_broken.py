"""What is sent to POST /edit by those who mean no good or know no better: never a 5xx, never a hang, no memory kept.

Two sources: schemathesis invents requests from the OpenAPI document, and a corpus of files, texts and numbers that
have broken servers before. Every answer must be one that the document promises."""

import base64
import gc
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile

import httpx
import pytest
from PIL import Image, ImageSequence
from support import ROOT
from support.http import b64, serving
from support.pictures import grey

from benchmarks.serving.soak import ThroughPipeline
from engine.host_memory import malloc_trim
from qwen_realtime import EditParams, RealtimeEngine
from server import EngineHolder, create_routes
from serving.document import openapi
from serving.status import resident_bytes

LONGEST_S = 10.0  # for one answer; a good one takes some milliseconds
KEPT_BYTES = 24 * 2**20  # the second half of the passes may leave this much: the allocator's own ups and downs


@pytest.fixture(scope="module")
def address(pocket):
    # Every setting is real here; only the networks are not, which take the time.
    with RealtimeEngine(ThroughPipeline(**pocket.components)) as engine, serving(EngineHolder(engine)) as address:
        yield address


PROMISED = {int(status) for status in openapi(create_routes(EngineHolder()))["paths"]["/edit"]["post"]["responses"]}


def ask(client: httpx.Client, content: bytes, about: str, **headers) -> int:
    answer = client.post("/edit", content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code in PROMISED and answer.status_code < 500, (about, answer.status_code, answer.text[:300])
    if answer.status_code != 200:
        refusal = answer.json()
        assert set(refusal) == {"error", "kind", "detail"} and refusal["detail"] == refusal["error"], (about, refusal)
        assert 5 < len(refusal["error"]) < 600, (about, refusal)
    return answer.status_code


# The corpus


def texts() -> dict[str, bytes]:
    """Bodies that are no good JSON, or JSON that is no good."""
    good = json.dumps({"image": b64(grey()), "prompt": "keep"}).encode()
    bodies = {
        "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"7", "open": b"{", "zeros": b"\0" * 999,
        "cut off": good[:-1], "twice": good + good, "comment": good + b"//", "utf-16": good.decode().encode("utf-16"),
        "bad utf-8": b'{"prompt": "\xff\xfe"}', "deep": b'{"a":' * 50_000, "deep list": b"[" * 100_000,
        "long number": b'{"steps": ' + b"9" * 100_000 + b"}", "form": b"image=x&prompt=y",
        "twice the same key": good[:-1] + b', "prompt": 5, "prompt": "x"}', "many keys": json.dumps({f"k{n}": n for n in range(50_000)}).encode(),
        "long key": json.dumps({"k" * 10**6: 1}).encode(), "proto": good[:-1] + b', "__proto__": {"steps": 1}}',
        "surrogate": good[:-1] + b', "negative_prompt": "\\ud800"}', "nul": good[:-1] + b', "negative_prompt": "\\u0000"}',
    }  # fmt: skip
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E400", "0x10", "01", "+1", ".5", "1_0"):
        for field in ("steps", "blend_ratio", "cfg_scale", "seed", "width"):
            bodies[f"{field} {number}"] = good[:-1] + f', "{field}": {number}'.encode() + b"}"
    return bodies


def values() -> dict[str, bytes]:
    """A good body with one value of another kind or beyond the limits, for every field there is."""
    odd = [None, True, False, "", " ", "x" * 5000, "\x00", "NaN", "1", -1, 0, 1.5, 2**31, 2**32, 2**63, 10**30, 1e308,
           -1e308, 5e-324, [], {}, [1], {"a": 1}, "../../etc/passwd", "'; DROP TABLE x; --", "\U0001f600" * 500]  # fmt: skip
    good = {"image": b64(grey()), "prompt": "keep", "width": 64, "height": 64}
    fields = [*EditParams.__dataclass_fields__, "use_cfg", "image", "ref_image", "format", "unknown", "Prompt", "__class__", ""]
    return {f"{name} = {value!r:.40}": json.dumps(good | {name: value}).encode() for name in fields for value in odd}


def files(passes_random: random.Random) -> dict[str, bytes]:
    """Picture files cut off, damaged, or that claim to be what they are not."""
    picture = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    whole = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA"):
        file = io.BytesIO()
        picture.save(file, kind)
        whole[kind] = file.getvalue()
    film = io.BytesIO()
    frames = [picture.rotate(20 * n) for n in range(5)]
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    whole["film"] = film.getvalue()
    assert sum(1 for _ in ImageSequence.Iterator(Image.open(film))) == 5
    found = dict(whole)
    for kind, data in whole.items():
        for share in (0.02, 0.3, 0.6, 0.9, 0.99):
            found[f"{kind} cut at {share}"] = data[: int(len(data) * share)]
        for number in range(12):
            damaged = bytearray(data)
            for _ in range(passes_random.choice((1, 3, 20))):
                # The beginning says sizes, counts and offsets: that is where damage does most.
                where = passes_random.randrange(min(len(damaged), passes_random.choice((40, 200, 10**6))))
                damaged[where] = passes_random.randrange(256)
            found[f"{kind} damaged {number}"] = bytes(damaged)
        found[f"{kind} and more"] = data + os.urandom(1000)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("a.png", whole["PNG"])
    endless = bytearray(whole["TIFF"])
    endless[-4:] = endless[4:8]  # perhaps a chain of directories that leads to itself
    return found | {
        "tiff in a circle": bytes(endless), "pickle": pickle.dumps({"a": [1, 2]}), "zip": archive.getvalue(),
        "numpy": b"\x93NUMPY\x01\x00" + b"x" * 100, "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "pdf": b"%PDF-1.4\n", "html": b"<html></html>", "mp4": b"\0\0\0\x18ftypmp42", "noise": os.urandom(5000),
        "huge ppm": b"P6 99999 99999 255\n", "negative bmp": b"BM" + b"\xff" * 60, "empty ppm": b"P6 0 0 255\n",
    }  # fmt: skip


def corpus(seed: int):
    """(what it is, body) of everything that one pass sends."""
    yield from texts().items()
    yield from values().items()
    for name, data in files(random.Random(seed)).items():
        for field in ("image", "ref_image") if seed == 0 else ("image",):
            yield f"{name} as {field}", json.dumps({"image": b64(grey()), "prompt": "x", field: b64(data)}).encode()
    text = base64.b64encode(b64(grey()).encode()).decode()
    for broken in (
        "====",
        "%%%%",
        "YQ",
        "YQ=",
        "YQ===",
        "Y Q = =",
        "Yé==",
        "-_-_",
        "data:",
        "data:,",
        "data:;base64",
        text,
    ):
        yield f"base64 {broken[:12]}", json.dumps({"image": broken, "prompt": "x"}).encode()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("passes", [2, pytest.param(6, marks=pytest.mark.endurance)])
def test_a_corpus_of_broken_input_is_answered_as_promised_and_leaves_no_memory_behind(address, passes):
    statuses, memory = [], []
    with httpx.Client(base_url=f"http://{address}", timeout=LONGEST_S) as client:
        for seed in range(passes):
            statuses += [ask(client, body, about) for about, body in corpus(seed)]
            gc.collect()
            if (trim := malloc_trim()) is not None:
                trim(0)  # what is free in the process is not kept by anything
            memory.append(resident_bytes())
        after = client.get("/health").json()
    assert statuses.count(400) > 250 * passes and statuses.count(200) > 25 * passes, {s: statuses.count(s) for s in set(statuses)}
    assert memory[-1] - memory[passes // 2 - 1] < KEPT_BYTES, [f"{count / 2**20:.0f} MB" for count in memory]
    assert after["queue"] == {"running": 0, "waiting": 0, "places": 40, "held_bytes": 0}
    assert after["stats"]["sessions"] == 0 and after["stats"]["errors"] == 0


def test_odd_headers_are_answered_as_promised(address):
    body = json.dumps({"image": b64(grey()), "prompt": "keep"}).encode()
    odd = ["", ",", ";", "*", "/", "a/b;q=", "q=1", "*/*;q=1e999", "*/*;q=-1", "x" * 8000, "image/png;q=nan"]
    with httpx.Client(base_url=f"http://{address}", timeout=LONGEST_S) as client:
        for name in ("accept", "content-type", "content-encoding", "origin", "authorization", "x-api-key", "cookie",
                     "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"):  # fmt: skip
            for value in odd:
                ask(client, body, f"{name}: {value[:20]}", **{name: value})


@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.endurance)])
def test_schemathesis_finds_nothing_that_the_document_does_not_promise(address, tmp_path, examples):
    # By the program, in a process of its own: all phases and checks, and its own idea of what is broken.
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://{address}/openapi.json", "--no-color", "--seed", "1",
        "--phases", "examples,coverage,fuzzing", "--max-examples", str(examples), "--request-timeout", str(LONGEST_S),
    ]  # fmt: skip
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": "support.schemathesis_hooks",
        "PYTHONPATH": str(ROOT / "tests"),
        "NO_PROXY": "127.0.0.1",
    }
    run = subprocess.run(command, capture_output=True, text=True, timeout=60 + 2 * examples, env=environment, cwd=tmp_path)
    assert run.returncode == 0 and "No issues found" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]
    text = httpx.get(f"http://{address}/metrics").text
    good = re.search(r'duration_seconds_count{path="/edit",status="200"} ([0-9.]+)', text)
    assert float(good[1]) > 50, "it hardly sent a good request"
