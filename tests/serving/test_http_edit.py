"""POST /edit: what it answers, in which order it serves, what it refuses before it costs anything, and what a failing
model looks like from outside. Over real sockets; the engine is real, its pipeline a stub that the test can hold."""

import base64
import contextlib
import io
import itertools
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from support.http import PATIENCE_S, Browser, StubPipeline, b64, post, serving, wait_until
from support.pictures import grey
from websockets.exceptions import ConnectionClosed

from pipeline.images import EditError, encode_png, open_image
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine
from server import EngineHolder, parse_edit
from serving import edit as edit_module
from serving import live as live_module
from serving.access import Refusal, failure_kind
from serving.edit import MAX_BODY_BYTES, negotiate, next_turn


class NotedPipeline(StubPipeline):
    """Notes the order of the prompts, and fails as the prompt says."""

    def __init__(self):
        super().__init__()
        self.prompts = []

    def denoise(self, latents, references, prompt, *args, **options):
        self.prompts.append(prompt)
        picture = super().denoise(latents, references, prompt, *args, **options)
        if prompt == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if prompt == "broken":
            raise RuntimeError("a kernel failed")
        if prompt == "refused":
            raise EditError("This prompt has 9000 tokens. Allowed: 1000.")
        return picture * float("nan") if prompt == "nan" else picture


class SteppedPipeline(StubPipeline):
    """Each step waits for a permit."""

    def __init__(self):
        super().__init__()
        self.permits, self.steps = threading.Semaphore(0), 0

    def denoise(self, latents, references, prompt, mask, steps, *, on_step, **options):
        self.started.release()
        for step in range(steps):
            assert self.permits.acquire(timeout=PATIENCE_S), "the test gave no permit"
            self.steps += 1
            on_step(step, steps)
        return torch.from_numpy(references[0].astype(np.float32))


@pytest.fixture
def stub():
    return NotedPipeline()


@pytest.fixture
def engine(stub):
    with RealtimeEngine(stub, EngineConfig(max_sessions=4)) as engine:  # a quarter for /edit: one turn at a time
        yield engine
        stub.gate.set()


@pytest.fixture
def address(engine):
    with serving(EngineHolder(engine), waiting_edits=7) as address:
        yield address


def queue(address) -> dict:
    return httpx.get(f"http://{address}/health").json()["queue"]


def body(prompt="keep", **fields) -> dict:
    return {"image": b64(grey()), "prompt": prompt, **fields}


class Callers:
    """Posts in the background, each from an address of its own choice (as a proxy on this machine names it)."""

    def __init__(self, address):
        self._address, self._pool = address, ThreadPoolExecutor(16)
        self._count = 0

    def post(self, prompt, caller):
        """Returns when the request has its place."""
        answer = self._pool.submit(post, self._address, body(prompt), headers={"x-forwarded-for": caller})
        self._count += 1
        wait_until(lambda: sum(queue(self._address)[k] for k in ("running", "waiting")) == self._count, "a place")
        return answer


# What it answers


@pytest.mark.parametrize(
    "accept, media_type",
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("image/png", "image/png"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("image/*", "image/png"),
        ("image/*, image/png;q=0.1", "image/jpeg"),
        ("image/jpeg;q=0.5, image/png;q=0.4", "image/jpeg"),
        ("text/html, image/avif, image/webp, image/*, */*;q=0.8", "image/png"),
        ("application/json;q=x, image/jpeg", "image/jpeg"),
        ("application/json;q=0, */*", "image/png"),
    ],
)
def test_the_accept_header_chooses_the_answers_type(accept, media_type):
    assert negotiate(accept) == media_type


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "*/*;q=0", "nonsense", ";;;", "image/png;q=nan"])
def test_an_accept_header_that_wants_none_of_the_types_is_a_406(accept):
    with pytest.raises(Refusal) as refusal:
        negotiate(accept)
    assert refusal.value.status == 406


def test_the_picture_as_bytes_is_the_one_in_the_json_and_the_timings_are_in_headers(address, photo):
    asked = {"image": b64(photo(64, 64)), "prompt": "negative", "seed": 7}
    in_json = open_image(base64.b64decode(post(address, asked).json()["image"]))
    answer = post(address, asked, headers={"accept": "image/png"})
    assert answer.headers["content-type"] == "image/png" and np.array_equal(open_image(answer.content), in_json)
    stages = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert float(stages["total"]) > 0 and {"denoise", "decode"} <= stages.keys()
    assert answer.headers["x-seed"] == "7" and float(answer.headers["x-age-ms"]) > 0
    jpeg = post(address, asked | {"format": "png"}, headers={"accept": "image/jpeg"})
    assert jpeg.headers["content-type"] == "image/jpeg" and jpeg.content[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("prompt, kind", [("no memory", "out_of_memory"), ("nan", "not_finite"), ("broken", "failed")])
def test_a_failure_of_the_model_is_a_500_of_its_kind_and_the_next_edit_works(address, prompt, kind):
    answer = post(address, body(prompt))
    assert answer.status_code == 500 and answer.json()["kind"] == kind and answer.json()["error"], answer.text
    assert "Traceback" not in answer.text
    assert post(address, body()).status_code == 200


@pytest.mark.parametrize("prompt, kind", [("no memory", "out_of_memory"), ("nan", "not_finite"), ("broken", "failed")])
def test_a_failure_of_the_model_is_told_to_the_live_view_and_the_next_frame_works(address, prompt, kind):
    with Browser(address) as browser:
        browser.params(prompt=prompt)
        browser.frame(1, grey())
        error = browser.until("error")
        assert (error["number"], error["kind"]) == (1, kind)
        browser.params(prompt="keep")
        browser.frame(2, grey())
        assert browser.until("picture")["number"] == 2


def test_an_error_that_names_its_kind_needs_no_known_beginning():
    error = EditError("The card fell off the bus.")
    assert failure_kind(error) is None
    error.kind = "failed"
    assert failure_kind(error) == "failed"


def test_what_the_pipeline_finds_wrong_with_the_request_is_a_400(address):
    answer = post(address, body("refused"))
    assert answer.status_code == 400 and answer.json() == {
        "error": "This prompt has 9000 tokens. Allowed: 1000.",
        "kind": "bad_input",
        "detail": "This prompt has 9000 tokens. Allowed: 1000.",
    }


def test_an_error_of_the_server_itself_is_a_500_in_json_without_its_text(address, monkeypatch):
    monkeypatch.setattr(edit_module, "encode_png", lambda image: 1 / 0)
    answer = post(address, body())
    assert answer.status_code == 500 and answer.json()["kind"] == "failed" and "division" not in answer.text
    monkeypatch.undo()
    assert post(address, body()).status_code == 200


def test_edit_answers_the_edited_picture_at_its_own_shape(address, photo):
    picture = photo(96, 64)
    answer = post(address, {"image": b64(picture), "prompt": "negative", "seed": 7}).json()
    image = open_image(base64.b64decode(answer["image"]))
    assert image.shape == (52, 78, 3) and (answer["width"], answer["height"], answer["seed"]) == (78, 52, 7)
    assert set(answer["stages_ms"]) >= {"encode_prompt", "denoise", "decode", "total"}


def test_edit_is_exact_as_png_and_smaller_as_jpeg_and_takes_a_data_url(address, photo):
    picture = photo(64, 64)
    asked = {"image": "data:image/png;base64," + b64(picture), "prompt": "negative"}
    assert np.array_equal(open_image(base64.b64decode(post(address, asked).json()["image"])), 255 - picture)
    jpeg = base64.b64decode(post(address, asked | {"format": "jpeg"}).json()["image"])
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"


def test_pictures_wait_for_the_model_at_the_outputs_size(photo):
    asked = {"image": b64(photo(640, 320)), "ref_image": b64(photo(100, 300)), "prompt": "x"}
    pictures, _, _ = parse_edit(json.dumps(asked).encode(), 64)
    assert pictures.size == (91, 46)
    assert [image.shape for image in pictures.images] == [(46, 91, 3), (112, 37, 3)], "each in its own shape"
    pictures, _, _ = parse_edit(json.dumps(asked | {"blend_ratio": 0.5}).encode(), 64)
    assert [image.shape for image in pictures.images] == [(46, 91, 3)] * 2
    pictures, _, _ = parse_edit(json.dumps(asked | {"reference_area": "stock"}).encode(), 64)
    assert [image.shape for image in pictures.images] == [(320, 640, 3), (300, 100, 3)]


@pytest.mark.parametrize(
    "extra, mode, value",
    [({}, "references", 200), ({"blend_ratio": 0.25}, "blend", 175), ({"mode": "references"}, "references", 200)],
)
def test_a_second_picture_is_blended_if_a_ratio_is_given_and_a_reference_if_not(address, stub, extra, mode, value):
    asked = {"image": b64(grey(200)), "ref_image": b64(grey(100)), "prompt": "keep", **extra}
    answer = post(address, asked)
    assert answer.status_code == 200, answer.text
    assert len(stub.references[-1]) == (1 if mode == "blend" else 2)
    assert int(stub.references[-1][0][0, 0, 0]) == value


def test_three_pictures_are_three_references_each_whole(address, stub):
    asked = {"image": b64(grey(200)), "ref_image": b64(grey(100)), "ref_image_2": b64(grey(50)), "prompt": "keep"}
    for extra in ({}, {"mode": "references"}, {"blend_ratio": 0.25}):
        answer = post(address, asked | extra)
        assert answer.status_code == 200, answer.text
        assert [int(picture[0, 0, 0]) for picture in stub.references[-1]] == [200, 100, 50]
    for extra, says in (({"mode": "blend"}, "Three pictures"), ({"mode": "edit"}, "Three pictures"),
                        ({"ref_image": None}, '"ref_image_2" came without "ref_image"')):  # fmt: skip
        answer = post(address, asked | extra)
        assert answer.status_code == 400 and says in answer.json()["error"], answer.text


def test_what_is_cut_or_padded_is_said_in_json_and_in_a_header(address, photo):
    asked = {"image": b64(photo(96, 64)), "prompt": "negative", "width": 64, "height": 64}
    note = "fit: picture 1 of 96x64 was cut to the shape of 64x64"
    assert post(address, asked).json()["notes"] == [note]
    bytes_answer = httpx.post(f"http://{address}/edit", json=asked, headers={"Accept": "image/png"})
    assert bytes_answer.headers["x-notes"] == note
    assert post(address, asked | {"height": None}).json()["notes"] == []


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"image": None}, "base64"),
        ({"image": "%%%"}, "base64"),
        ({"image": b64(b"no picture")}, "not a picture"),
        ({"image": ""}, "empty"),
        ({"image": b64(encode_png(grey(1))[:60])}, "picture"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 2001}, "2000"),
        ({"steps": 9}, "1 to 8"),
        ({"steps": True}, "1 to 8"),
        ({"width": 65.5}, "whole number from 1 to 2048"),
        ({"width": 100_000}, "2048"),
        ({"blend_ratio": 1.5}, "0.0 to 1.0"),
        ({"fit": "stretch"}, "crop, pad"),
        ({"format": "gif"}, "png"),
        ({"mode": "blend"}, "second picture"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_input_is_a_400_that_says_what_is_allowed_and_the_next_edit_works(address, changes, says):
    good = {"image": b64(grey()), "prompt": "negative"}
    answer = post(address, good | changes)
    assert answer.status_code == 400 and says in answer.json()["error"], answer.text
    assert post(address, good).status_code == 200


@pytest.mark.parametrize("missing", ["image", "prompt"])
def test_a_missing_field_is_named(address, missing):
    asked = {"image": b64(grey()), "prompt": "negative"}
    del asked[missing]
    answer = post(address, asked)
    assert answer.status_code == 400 and f'"{missing}" is missing' in answer.json()["error"]


def test_a_body_that_is_too_large_or_no_json_is_refused(address):
    headers = {"content-type": "application/json"}
    assert post(address, None, content=b"x" * 100, headers={"content-type": "text/plain"}).status_code == 415
    assert post(address, None, content=b"{", headers=headers).status_code == 400
    blocks = itertools.chain([b'{"image": "'], (b"A" * 2**20 for _ in range(MAX_BODY_BYTES // 2**20 + 1)))
    with contextlib.suppress(httpx.WriteError):  # refused while still being sent, which is as good
        assert post(address, None, content=blocks, headers=headers).status_code == 413
    assert httpx.get(f"http://{address}/edit").status_code == 405


def test_while_loading_edit_is_503_with_retry_after_and_when_failed_says_why():
    holder = EngineHolder()
    with serving(holder) as address:
        answer = post(address, {})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0 and "loading" in answer.text
        holder.fail("no such folder")
        answer = post(address, {})
        assert answer.status_code == 503 and "no such folder" in answer.text


def test_when_all_places_are_taken_edit_is_503_with_retry_after(address, engine):
    with contextlib.ExitStack() as sessions:
        for _ in range(4):
            sessions.enter_context(engine.open_session())
        answer = post(address, {"image": b64(grey()), "prompt": "negative"})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0


def test_a_caller_who_hangs_up_frees_the_place(address, engine, stub):
    stub.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"http://{address}/edit",
            json={"image": b64(grey()), "prompt": "negative"},
            timeout=httpx.Timeout(PATIENCE_S, read=0.3),
        )
    wait_until(lambda: engine.stats().sessions == 0, "the session is closed")


# The queue


def test_the_next_turn_goes_to_whoever_has_the_fewest_running_then_to_the_longest_not_served():
    waiting, last = {3: "ann", 4: "ann", 5: "bob", 6: "eve"}, {"ann": 1, "bob": 2, "eve": 4}
    assert next_turn(waiting, [], last) == 3
    assert next_turn(waiting, ["ann"], last) == 5
    assert next_turn(waiting, ["ann", "bob"], last) == 6
    assert next_turn(waiting, ["ann", "bob", "eve"], last) == 3


def test_a_caller_with_many_edits_does_not_keep_another_waiting(address, stub):
    stub.gate.clear()
    callers = Callers(address)
    answers = [callers.post(f"ann {n}", "10.0.0.1") for n in range(4)]
    answers += [callers.post(f"bob {n}", "10.0.0.2") for n in range(2)]
    stub.gate.set()
    assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 6
    assert stub.prompts == ["ann 0", "ann 1", "bob 0", "ann 2", "bob 1", "ann 3"]


def test_over_the_bound_the_answer_is_503_with_retry_after_and_the_waiting_ones_are_served(engine, stub):
    with serving(EngineHolder(engine), waiting_edits=2) as address:
        stub.gate.clear()
        callers = Callers(address)
        answers = [callers.post("keep", f"10.0.0.{n}") for n in range(3)]
        assert queue(address) | {"held_bytes": 0} == {"running": 1, "waiting": 2, "places": 3, "held_bytes": 0}
        refused = post(address, body())
        assert refused.status_code == 503 and refused.json()["kind"] == "busy" and "3 places" in refused.text
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        stub.gate.set()
        assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 3
        assert post(address, body()).status_code == 200
        assert queue(address) == {"running": 0, "waiting": 0, "places": 3, "held_bytes": 0}


def test_one_address_gets_at_most_half_of_the_places(address, stub):
    stub.gate.clear()
    callers = Callers(address)
    answers = [callers.post("keep", "10.0.0.1") for _ in range(4)]
    refused = post(address, body(), headers={"x-forwarded-for": "10.0.0.1"})
    assert refused.status_code == 503 and "your address" in refused.text
    answers.append(callers.post("keep", "10.0.0.2"))
    stub.gate.set()
    assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 5


def send_and_leave(address, prompt, then=lambda: None, **fields):
    """A request whose sender is gone without a word once `then` returns."""
    data = json.dumps(body(prompt, **fields)).encode()
    head = f"POST /edit HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        then()


def test_a_caller_who_leaves_while_waiting_frees_the_place_and_is_never_edited(address, stub):
    stub.gate.clear()
    running = Callers(address).post("first", "10.0.0.1")
    send_and_leave(address, "left", lambda: wait_until(lambda: queue(address)["waiting"] == 1, "it waits"))
    wait_until(lambda: queue(address)["waiting"] == 0, "the place is free")
    stub.gate.set()
    assert running.result(PATIENCE_S).status_code == 200
    assert post(address, body("last")).status_code == 200 and stub.prompts == ["first", "last"]


def test_a_caller_who_leaves_stops_the_model_within_one_step():
    stub = SteppedPipeline()
    with RealtimeEngine(stub) as engine, serving(EngineHolder(engine)) as address:

        def two_steps():
            stub.await_start()
            stub.permits.release(2)
            wait_until(lambda: stub.steps == 2, "two steps")

        send_and_leave(address, "left", two_steps, steps=8)
        wait_until(lambda: queue(address)["running"] == 0, "the place is free")
        stub.permits.release(1 + 2)  # the step that had begun, and the next edit's two
        assert post(address, body("next", steps=2)).status_code == 200
        assert stub.steps == 2 + 1 + 2


def test_a_session_freed_while_idle_makes_room_for_the_next_in_line(stub):
    engine = RealtimeEngine(stub, EngineConfig(max_sessions=1, idle_timeout_s=0.3))
    with engine, serving(EngineHolder(engine)) as address, Browser(address) as first, Browser(address) as second:
        first.params(prompt="keep")
        first.frame(1, grey())
        first.until("picture")
        second.params(prompt="keep")
        second.frame(1, grey())
        assert second.until("status", state="busy")["position"] == 1
        assert second.until("picture")["number"] == 1


def test_live_views_that_wait_are_told_their_position_and_move_up_when_one_leaves(engine, address):
    browsers = [Browser(address) for _ in range(5)]  # 4 sessions, one of them kept for /edit
    for number, browser in enumerate(browsers):
        browser.params(prompt="keep")
        browser.frame(1, grey())
        if number < 3:
            browser.until("picture")
        else:
            assert browser.until("status", state="busy")["position"] == number - 2
    assert httpx.get(f"http://{address}/health").json()["live"] == {"sockets": 5, "sessions": 3, "waiting": 2}
    assert post(address, body()).status_code == 200, "live views took the place of POST /edit"
    browsers[0].socket.close()
    assert browsers[3].until("picture")["number"] == 1
    assert browsers[4].until("status", position=1)["state"] == "busy"
    for browser in browsers[1:]:
        browser.socket.close()
    wait_until(lambda: engine.stats().sessions == 0, "all sessions are freed")


def test_one_live_view_too_many_is_told_to_try_later_and_a_silent_one_is_closed(address, monkeypatch):
    monkeypatch.setattr(live_module, "MAX_SOCKETS", 1)
    with Browser(address) as first:
        first.until("status")
        with Browser(address) as second, pytest.raises(ConnectionClosed) as closed:
            second.receive()
        assert closed.value.rcvd.code == 1013 and "1 live views" in closed.value.rcvd.reason
        first.params(prompt="keep")  # unharmed
    wait_until(lambda: httpx.get(f"http://{address}/health").json()["live"]["sockets"] == 0, "the socket is gone")
    monkeypatch.setattr(live_module, "SILENCE_TIMEOUT_S", 0.2)
    with Browser(address) as silent, pytest.raises(ConnectionClosed) as closed:
        silent.until("never")
    assert closed.value.rcvd.code == 1001 and "0.2 s" in closed.value.rcvd.reason


# Limits


def answer_to(address, data: bytes) -> bytes:
    """What comes back for these bytes while the sender keeps the connection open."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        return connection.recv(65536)


HEAD = b"POST /edit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_length_that_is_too_large_is_refused_before_any_of_it_is_sent(address):
    assert b" 413 " in answer_to(address, HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1))
    assert b" 413 " in answer_to(address, HEAD + b"Content-Length: %s\r\n\r\n" % (b"9" * 18))


def test_a_body_that_does_not_come_is_a_408_and_frees_its_place(address, monkeypatch):
    monkeypatch.setattr(edit_module, "BODY_TIMEOUT_S", 0.2)
    assert b" 408 " in answer_to(address, HEAD + b'Content-Length: 1000\r\n\r\n{"image":')
    assert queue(address)["waiting"] == 0


def test_requests_together_hold_a_bounded_number_of_bytes(address, stub, monkeypatch):
    asked = body(padding := "keep", negative_prompt="x" * 1900)
    monkeypatch.setattr(edit_module, "MAX_HELD_BYTES", 2 * grey().nbytes)
    stub.gate.clear()
    callers = Callers(address)
    answers = [callers.post(padding, f"10.0.0.{n}") for n in range(2)]
    wait_until(lambda: queue(address)["held_bytes"] == 2 * grey().nbytes, "both pictures are held")
    refused = post(address, asked)
    assert refused.status_code == 503 and "retry-after" in refused.headers and "bytes" in refused.text
    stub.gate.set()
    assert [answer.result(PATIENCE_S).status_code for answer in answers] == [200] * 2
    assert post(address, asked).status_code == 200


def png_header(width, height) -> bytes:
    """A PNG that claims a size and has the pixels of one."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_a_small_file_that_claims_many_pixels_is_refused_unopened(address, side):
    answer = post(address, body() | {"image": b64(png_header(side, side))})
    assert answer.status_code == 400 and "pixels" in answer.json()["error"], answer.text


@pytest.mark.parametrize("headers", [{"content-encoding": "gzip"}, {"content-type": "text/json"}, {"content-type": ""}])
def test_another_type_or_a_compressed_body_is_a_415(address, headers):
    content = json.dumps(body()).encode()
    answer = post(address, None, content=content, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == 415 and answer.json()["kind"] == "content_type"


@pytest.mark.parametrize("path", ["edit", "health", "ready", "metrics", "docs", "openapi.json"])
def test_another_method_is_a_405_that_names_the_ones_there_are(address, path):
    for method in ("PUT", "DELETE", "PATCH", "GET" if path == "edit" else "POST", "OPTIONS", "TRACE"):
        answer = httpx.request(method, f"http://{address}/{path}")
        assert answer.status_code == 405 and answer.json()["kind"] == "method"
        assert answer.headers["allow"] == ("POST" if path == "edit" else "GET, HEAD")


def test_nothing_is_fetched_for_a_caller_and_no_path_is_opened(address, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(base64.b64decode(b64(grey())))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        for text in (
            url,
            str(secret),
            f"file://{secret}",
            secret.as_uri(),
            {"path": str(secret)},
            [url],
            f"data:,{url}",
        ):
            for field in ("image", "ref_image"):
                answer = post(address, body() | {field: text})
                assert answer.status_code == 400 and "base64" in answer.json()["error"], answer.text
        with pytest.raises(TimeoutError):
            listener.accept()


# On the embedded model


def test_edit_on_the_embedded_model_equals_the_engine(pocket, photo):
    picture = photo(160, 128)
    with RealtimeEngine(pocket) as engine, serving(EngineHolder(engine)) as address:
        asked = {"image": b64(picture), "prompt": "make it black and white", "width": 128, "height": 128, "seed": 5}
        answer = post(address, asked)
        assert answer.status_code == 200, answer.text
        image = open_image(base64.b64decode(answer.json()["image"]))
        params = EditParams(prompt="make it black and white", width=128, height=128, seed=5)
        assert np.array_equal(image, engine.edit([picture], params).image)
