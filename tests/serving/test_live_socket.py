"""The live socket: frames, settings, errors, sessions. Over real sockets of a real uvicorn; the engine is the real one,
its pipeline is a stub that the test can hold. Nothing sleeps: every wait is on a condition with a time limit."""

import json

import numpy as np
import pytest
from support.http import Browser, StubPipeline, serving, wait_until
from support.pictures import grey

from qwen_realtime import EngineConfig, RealtimeEngine
from server import EngineHolder


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
