"""The HTTP side's claims, over real sockets of a real uvicorn. The engine is the real one; its pipeline is a stub that
the test can hold, except where pictures are judged. Nothing sleeps: every wait is on a condition with a time limit."""

import asyncio
import base64
import io
import itertools
import json
from contextlib import suppress

import httpx
import numpy as np
import pytest
import torch
import websockets.exceptions
from fastapi import FastAPI
from PIL import Image
from support.http import PATIENCE_S, Browser, StubPipeline, b64, post, serving, wait_until
from support.pictures import grey
from websockets.sync.client import connect

from pipeline.images import EditError, encode_png, open_image
from qwen_realtime import EditParams, EngineConfig, RealtimeEngine
from server import MAX_BODY_BYTES, EngineHolder, create_routes, parse_edit, plain, read_json


@pytest.fixture
def stub():
    return StubPipeline()


@pytest.fixture
def engine(stub):
    with RealtimeEngine(stub, EngineConfig(max_sessions=2)) as engine:
        yield engine
        stub.gate.set()


@pytest.fixture
def address(engine):
    with serving(EngineHolder(engine, {"model": "stub", "reason": "a test"})) as address:
        yield address


# The helpers


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '"text"', '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000,
                                  '{"a": "\\ud800"}', b"\xff\xfe{"])  # fmt: skip
def test_what_is_no_json_object_is_an_edit_error(text):
    with pytest.raises(EditError):
        read_json(text)


def test_plain_makes_json_of_anything():
    value = {1: np.float32(2.0), "nan": float("nan"), "tuple": (1, None, True), "dtype": torch.float32}
    assert json.dumps(plain(value)) == '{"1": 2.0, "nan": null, "tuple": [1, null, true], "dtype": "torch.float32"}'


# GET /health


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


# POST /edit


def test_edit_answers_the_edited_picture_at_its_own_shape(address, photo):
    picture = photo(96, 64)
    answer = post(address, {"image": b64(picture), "prompt": "negative", "seed": 7}).json()
    image = open_image(base64.b64decode(answer["image"]))
    assert image.shape == (52, 78, 3) and (answer["width"], answer["height"], answer["seed"]) == (78, 52, 7)
    assert set(answer["stages_ms"]) >= {"encode_prompt", "denoise", "decode", "total"}


def test_edit_is_exact_as_png_and_smaller_as_jpeg_and_takes_a_data_url(address, photo):
    picture = photo(64, 64)
    body = {"image": "data:image/png;base64," + b64(picture), "prompt": "negative"}
    assert np.array_equal(open_image(base64.b64decode(post(address, body).json()["image"])), 255 - picture)
    jpeg = base64.b64decode(post(address, body | {"format": "jpeg"}).json()["image"])
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"


def test_pictures_wait_for_the_model_at_the_outputs_size(photo):
    body = {"image": b64(photo(640, 320)), "ref_image": b64(photo(100, 300)), "prompt": "x"}
    pictures, _, _ = parse_edit(json.dumps(body).encode(), 64)
    assert pictures.size == (91, 46)
    assert [image.shape for image in pictures.images] == [(46, 91, 3), (112, 37, 3)], "each in its own shape"
    pictures, _, _ = parse_edit(json.dumps(body | {"blend_ratio": 0.5}).encode(), 64)
    assert [image.shape for image in pictures.images] == [(46, 91, 3)] * 2
    pictures, _, _ = parse_edit(json.dumps(body | {"reference_area": "stock"}).encode(), 64)
    assert [image.shape for image in pictures.images] == [(320, 640, 3), (300, 100, 3)]


@pytest.mark.parametrize(
    "extra, mode, value",
    [({}, "references", 200), ({"blend_ratio": 0.25}, "blend", 175), ({"mode": "references"}, "references", 200)],
)
def test_a_second_picture_is_blended_if_a_ratio_is_given_and_a_reference_if_not(address, stub, extra, mode, value):
    body = {"image": b64(grey(200)), "ref_image": b64(grey(100)), "prompt": "keep", **extra}
    answer = post(address, body)
    assert answer.status_code == 200, answer.text
    assert len(stub.references[-1]) == (1 if mode == "blend" else 2)
    assert int(stub.references[-1][0][0, 0, 0]) == value


def test_three_pictures_are_three_references_each_whole(address, stub):
    body = {"image": b64(grey(200)), "ref_image": b64(grey(100)), "ref_image_2": b64(grey(50)), "prompt": "keep"}
    for extra in ({}, {"mode": "references"}, {"blend_ratio": 0.25}):
        answer = post(address, body | extra)
        assert answer.status_code == 200, answer.text
        assert [int(picture[0, 0, 0]) for picture in stub.references[-1]] == [200, 100, 50]
    for extra, says in (({"mode": "blend"}, "Three pictures"), ({"mode": "edit"}, "Three pictures"),
                        ({"ref_image": None}, '"ref_image_2" came without "ref_image"')):  # fmt: skip
        answer = post(address, body | extra)
        assert answer.status_code == 400 and says in answer.json()["error"], answer.text


def test_what_is_cut_or_padded_is_said_in_json_and_in_a_header(address, photo):
    body = {"image": b64(photo(96, 64)), "prompt": "negative", "width": 64, "height": 64}
    note = "fit: picture 1 of 96x64 was cut to the shape of 64x64"
    assert post(address, body).json()["notes"] == [note]
    bytes_answer = httpx.post(f"http://{address}/edit", json=body, headers={"Accept": "image/png"})
    assert bytes_answer.headers["x-notes"] == note
    assert post(address, body | {"height": None}).json()["notes"] == []


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
    body = {"image": b64(grey()), "prompt": "negative"}
    del body[missing]
    answer = post(address, body)
    assert answer.status_code == 400 and f'"{missing}" is missing' in answer.json()["error"]


def test_a_body_that_is_too_large_or_no_json_is_refused(address):
    headers = {"content-type": "application/json"}
    assert post(address, None, content=b"x" * 100, headers={"content-type": "text/plain"}).status_code == 415
    assert post(address, None, content=b"{", headers=headers).status_code == 400
    blocks = itertools.chain([b'{"image": "'], (b"A" * 2**20 for _ in range(MAX_BODY_BYTES // 2**20 + 1)))
    with suppress(httpx.WriteError):  # refused while still being sent, which is as good
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
    with engine.open_session(), engine.open_session():
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


# WS /live


def test_live_acknowledges_on_receipt_and_answers_with_the_frame_number(address, photo):
    picture = photo(64, 64)
    with Browser(address) as browser:
        assert browser.until("status")["state"] == "ready"
        browser.params(prompt="negative")
        browser.frame(4_000_000_000, picture)
        assert browser.until("ack")["number"] == 4_000_000_000
        result = browser.until("picture")
    assert result["number"] == 4_000_000_000
    error = np.abs(result["image"].astype(int) - (255 - picture)).mean()
    assert error < 8, error  # JPEG at quality 85 of a noisy picture
    meta = result["meta"]
    assert (meta["width"], meta["height"], meta["prompt"], meta["steps"]) == (64, 64, "negative", 2)
    assert {"stages_ms", "age_ms", "fps", "dropped", "seed"} <= meta.keys() and meta["stages_ms"]["total"] > 0


def test_newest_wins_the_frames_between_are_acknowledged_and_dropped(address, stub):
    with Browser(address) as browser:
        browser.params(prompt="keep")
        stub.gate.clear()
        browser.frame(1, grey(10))
        browser.until("ack", number=1)
        stub.await_start()  # frame 1 is in the model: those that come now wait
        for number in range(2, 7):
            browser.frame(number, grey(10 * number))
            browser.until("ack", number=number)
        stub.gate.set()
        numbers = [browser.until("picture")]
        while numbers[-1]["number"] != 6:
            numbers.append(browser.until("picture"))
    # Besides 1 and 6, one may have been in the engine's mailbox already and one in the decoder. Even 1 may be missing:
    # the model is so quick that the next result can be there before 1 is sent.
    assert len(numbers) <= 4, [result["number"] for result in numbers]
    assert abs(int(numbers[-1]["image"][0, 0, 0]) - 60) < 4
    assert numbers[-1]["meta"]["dropped"] >= 2


def test_a_new_prompt_reaches_the_next_frame_and_other_settings_stay(address):
    with Browser(address) as browser:
        browser.params(prompt="keep", width=96, height=64, seed=3)
        browser.frame(1, grey(10))
        assert browser.until("picture")["meta"]["prompt"] == "keep"
        browser.params(prompt="negative")
        browser.frame(2, grey(10))
        result = browser.until("picture")
    assert result["meta"]["prompt"] == "negative" and result["image"].shape == (64, 96, 3)
    assert result["meta"]["seed"] == 3 and abs(int(result["image"][0, 0, 0]) - 245) < 4


def test_a_frame_before_any_prompt_is_edited_when_the_prompt_comes(address):
    with Browser(address) as browser:
        browser.frame(1, grey(10))
        browser.until("ack")
        browser.params(prompt="negative")
        assert browser.until("picture")["number"] == 1


@pytest.mark.parametrize(
    "message, says",
    [
        ("nonsense", "JSON"),
        (json.dumps({"type": "jump"}), "jump"),
        (json.dumps({"type": "params", "prompt": ""}), "prompt"),
        (json.dumps({"type": "params", "prompt": "x", "colour": 1}), "colour"),
        (json.dumps({"type": "params", "prompt": "x", "steps": 0}), "1 to 8"),
        (json.dumps({"type": "params", "prompt": "x", "mode": "blend"}), "one picture"),
        ("x" * 70_000, "characters"),
        (b"", "bytes"),
        (b"\x01\x00\x00\x00", "bytes"),
        (b"\x01\x00\x00\x00" + b"x" * (4 * 2**20), "bytes"),
        (b"\x01\x00\x00\x00no picture", "not a picture"),
    ],
)
def test_a_bad_message_is_answered_with_an_error_and_the_stream_goes_on(address, message, says):
    with Browser(address) as browser:
        browser.params(prompt="negative")
        browser.socket.send(message)
        assert says in browser.until("error")["message"]
        browser.frame(2, grey(10))
        result = browser.until("picture")
    assert result["number"] == 2 and result["meta"]["prompt"] == "negative"


@pytest.mark.parametrize("size, shape", [({}, (45, 90)), ({"width": 75}, (38, 75)), ({"height": 75}, (75, 148))])
def test_a_live_frame_without_a_size_or_with_one_side_keeps_its_shape(address, photo, size, shape):
    with Browser(address) as browser:
        browser.params(prompt="keep", **size)
        browser.frame(1, photo(97, 49))
        result = browser.until("picture")
    assert result["image"].shape == (*shape, 3) and result["meta"]["notes"] == []


def test_stop_frees_the_session_sends_no_more_and_a_new_frame_starts_again(address, engine, stub):
    with Browser(address) as browser:
        browser.params(prompt="negative")
        stub.gate.clear()
        browser.frame(1, grey(10))
        stub.await_start()
        browser.socket.send(json.dumps({"type": "stop"}))
        wait_until(lambda: engine.stats().sessions == 0, "the session is closed")
        stub.gate.set()
        browser.frame(2, grey(10))
        assert browser.until("picture")["number"] == 2  # and not the picture of frame 1


@pytest.mark.parametrize("how", ["close", "cut"])
def test_a_browser_that_leaves_frees_its_session_while_its_frame_is_in_the_model(address, engine, stub, how):
    browser = Browser(address)
    browser.params(prompt="negative")
    stub.gate.clear()
    browser.frame(1, grey(10))
    stub.await_start()
    assert engine.stats().sessions == 1
    if how == "close":
        browser.socket.close()
    else:
        browser.socket.socket.shutdown(2)  # a killed process: no closing handshake
    wait_until(lambda: engine.stats().sessions == 0, "the session is closed")


def test_a_third_browser_hears_that_all_places_are_taken_and_gets_the_one_that_frees(address, engine):
    with Browser(address) as first, Browser(address) as second, Browser(address) as third:
        for browser in (first, second):
            browser.params(prompt="negative")
            browser.frame(1, grey(10))
            browser.until("picture")
        third.params(prompt="negative")
        third.frame(1, grey(10))
        assert "2" in third.until("status", state="busy")["text"]
        first.socket.close()
        assert third.until("picture")["number"] == 1


def test_two_browsers_never_see_each_others_pictures(address):
    with Browser(address) as dark, Browser(address) as light:
        dark.params(prompt="keep")
        light.params(prompt="keep")
        for number in range(1, 11):
            dark.frame(number, grey(20))
            light.frame(number, grey(220))
            assert abs(int(dark.until("picture")["image"].mean()) - 20) < 4
            assert abs(int(light.until("picture")["image"].mean()) - 220) < 4


def test_the_socket_tells_how_loading_goes_and_edits_the_waiting_frame_when_it_is_done():
    holder = EngineHolder()
    with serving(holder) as address, Browser(address) as browser, RealtimeEngine(StubPipeline()) as engine:
        assert browser.until("status")["state"] == "loading"
        browser.params(prompt="negative")
        browser.frame(1, grey(10))
        holder.progress("Reading", 0.5)
        assert browser.until("status", text="Reading")["fraction"] == 0.5
        holder.ready(engine)
        assert browser.until("status", state="ready")["default_size"] == 64
        assert browser.until("picture")["number"] == 1


def test_an_idle_session_is_freed_by_the_engine_and_the_next_frame_opens_another(stub):
    engine = RealtimeEngine(stub, EngineConfig(idle_timeout_s=0.2))
    with engine, serving(EngineHolder(engine)) as address, Browser(address) as browser:
        browser.params(prompt="negative")
        browser.frame(1, grey(10))
        browser.until("picture")
        wait_until(lambda: engine.stats().sessions == 0, "the session has timed out")
        browser.frame(2, grey(10))
        assert browser.until("picture")["number"] == 2


# Who may come in


def refused(address, **options) -> int:
    with pytest.raises(websockets.exceptions.InvalidStatus) as error, connect(f"ws://{address}/live", **options):
        pass
    return error.value.response.status_code


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://localhost:1", ""])
def test_a_page_of_another_origin_is_refused(address, origin):
    assert refused(address, origin=origin) == 403
    answer = post(address, {"image": b64(grey()), "prompt": "negative"}, headers={"origin": origin})
    assert answer.status_code == 403


def test_the_own_origin_and_the_one_a_proxy_names_are_let_in(address):
    with Browser(address, origin=f"http://{address}") as browser:
        assert browser.until("status")["state"] == "ready"
    headers = {"x-forwarded-host": "editor.example"}
    with Browser(address, origin="https://editor.example", additional_headers=headers) as browser:
        assert browser.until("status")["state"] == "ready"


def test_auth_guards_every_route_and_takes_basic_credentials(engine):
    with serving(EngineHolder(engine), auth=("ann", "s3cret:ü")) as address:
        body = {"image": b64(grey()), "prompt": "negative"}
        good = {"authorization": "Basic " + base64.b64encode("ann:s3cret:ü".encode()).decode()}
        wrong = {"authorization": "Basic " + base64.b64encode(b"ann:guess").decode()}
        for headers in ({}, wrong, {"authorization": "Basic %%"}, {"cookie": "access-token-None=x"}):
            assert httpx.get(f"http://{address}/health", headers=headers).status_code == 401
            answer = post(address, body, headers=headers)
            assert answer.status_code == 401 and "basic" in answer.headers["www-authenticate"].lower()
            assert refused(address, additional_headers=headers) == 403
        assert httpx.get(f"http://{address}/health", headers=good).status_code == 200
        assert post(address, body, headers=good).status_code == 200
        with Browser(address, additional_headers=good) as browser:
            assert browser.until("status")["state"] == "ready"


def test_the_login_cookie_of_the_page_opens_the_routes(engine):
    app = FastAPI(routes=create_routes(EngineHolder(engine), ("ann", "s3cret")))
    app.tokens, app.cookie_id = {"token-1": "ann"}, "abc"  # as gradio.routes.App keeps its logins

    async def statuses():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [
                (await client.get("/health", headers={"cookie": f"access-token-unsecure-abc={token}"})).status_code
                for token in ("token-1", "token-2", "")
            ]

    assert asyncio.run(statuses()) == [200, 401, 401]


# On the embedded model


def test_edit_on_the_embedded_model_equals_the_engine(pocket, photo):
    picture = photo(160, 128)
    with RealtimeEngine(pocket) as engine, serving(EngineHolder(engine)) as address:
        body = {"image": b64(picture), "prompt": "make it black and white", "width": 128, "height": 128, "seed": 5}
        answer = post(address, body)
        assert answer.status_code == 200, answer.text
        image = open_image(base64.b64decode(answer.json()["image"]))
        params = EditParams(prompt="make it black and white", width=128, height=128, seed=5)
        assert np.array_equal(image, engine.edit([picture], params).image)
