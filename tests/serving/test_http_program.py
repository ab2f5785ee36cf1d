"""`python server.py`, started as a person starts it: it loads, edits, is locked when told so, and ends."""

import base64
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from support import ROOT
from support.http import Browser, b64, wait_until
from support.pictures import grey

from pipeline.images import open_image
from server import main
from serving.startup import KEY_VARIABLE

KEY = "k3y-of-the-house"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(address, process, its log) of a server with a key, as soon as it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("program") / "log.txt"
    command = [
        sys.executable,
        "server.py",
        "--model",
        "pocket",
        "--device",
        "cpu",
        "--port",
        str(port),
        "--api-key",
        KEY,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            yield f"127.0.0.1:{port}", process, log
        finally:
            process.kill()
            process.wait()


def get(address, path, **headers) -> httpx.Response | None:
    try:
        return httpx.get(f"http://{address}/{path}", headers={"x-api-key": KEY} | headers, timeout=20)
    except httpx.TransportError:
        return None


def test_it_answers_while_it_loads_then_edits_then_ends_with_its_live_views(program):
    address, process, log = program
    wait_until(lambda: get(address, "ready") is not None, "it answers")
    first = get(address, "ready")
    assert first.status_code == 503 and first.json()["state"] in ("loading", "warming"), first.text
    wait_until(lambda: get(address, "ready").status_code == 200 or process.poll() is not None, "it is ready")
    assert process.poll() is None, log.read_text()

    assert get(address, "health", **{"x-api-key": "wrong"}).status_code == 401
    health = get(address, "health").json()
    assert health["choice"]["model"] == "pocket" and "--model pocket" in health["choice"]["reason"]

    body = {"image": b64(grey()), "prompt": "make it black and white", "width": 64, "height": 64, "steps": 1}
    answer = httpx.post(f"http://{address}/edit", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert open_image(base64.b64decode(answer.json()["image"])).shape == (64, 64, 3)

    with Browser(address, additional_headers={"authorization": f"Bearer {KEY}"}) as browser:
        browser.params(prompt="make it black and white", width=64, height=64, steps=1)
        browser.frame(1, grey())
        assert browser.until("picture")["number"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    text = log.read_text()
    assert f"listening at http://{address}" in text and "Traceback" not in text and KEY not in text


def test_a_port_in_use_ends_it_without_loading_anything():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit) as end:
            main(["--model", "pocket", "--port", str(other.getsockname()[1])])
    assert end.value.code != 0


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(SystemExit):  # a key that would not be taken as a flag is not taken from here either
        main(["--port", "1"])
