"""How both programs end: in time, with code 0, with a sentence to all who wait."""

import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from support import ROOT
from support.http import PATIENCE_S, b64, wait_until
from support.pictures import grey
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import server
from server import EngineHolder, create_app
from serving.farewell import Farewell

LIMIT_S = 5.0
LARGE = {"image": b64(grey(128, 512, 512)), "prompt": "keep it", "width": 512, "height": 512, "steps": 8}


class Program:
    def __init__(self, name, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address, self.log = f"127.0.0.1:{self.port}", log
        command = [sys.executable, name, "--model", "pocket", "--device", "cpu", "--port", str(self.port)]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)

    def status(self) -> int | None:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"http://{self.address}/ready", timeout=PATIENCE_S).status_code
        except httpx.TransportError:
            return None

    def ends_well(self, which):
        started = time.monotonic()
        self.process.send_signal(which)
        code, took_s = self.process.wait(PATIENCE_S), time.monotonic() - started
        text = self.log.read_text()
        assert code == 0 and took_s < LIMIT_S and "Traceback" not in text, (code, took_s, text)


@pytest.fixture(params=["server.py", "webui_realtime.py"])
def program(request, tmp_path):
    program = Program(request.param, tmp_path / "log.txt")
    try:
        yield program
    finally:
        program.process.kill()
        program.process.wait()


def test_it_ends_in_time_while_the_model_is_still_loading(program):
    wait_until(lambda: program.status() is not None, "it answers")
    program.ends_well(signal.SIGINT)


def test_under_load_every_edit_is_answered_or_told_and_every_socket_closed_with_a_word(program):
    wait_until(lambda: program.status() == 200, "the model is loaded")
    answers = []

    def edit():
        answers.append(httpx.post(f"http://{program.address}/edit", json=LARGE, timeout=PATIENCE_S))

    callers = [threading.Thread(target=edit) for _ in range(6)]
    with connect(f"ws://{program.address}/live") as live:
        for caller in callers:
            caller.start()
        queue = f"http://{program.address}/health"
        wait_until(lambda: httpx.get(queue).json()["queue"]["running"], "an edit runs")
        program.ends_well(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            while live.recv(PATIENCE_S):
                pass
    assert closed.value.rcvd.code == 1001 and "stopping" in closed.value.rcvd.reason
    for caller in callers:
        caller.join(PATIENCE_S)
    assert len(answers) == len(callers)
    for answer in answers:
        told = answer.status_code == 503 and "retry-after" in answer.headers and answer.json()["error"]
        assert answer.status_code == 200 or told, answer.text


def test_a_second_signal_ends_it_at_once():
    code = (
        "import os, signal, time\nfrom serving.farewell import Farewell\n"
        "with Farewell() as f:\n    os.kill(os.getpid(), signal.SIGINT)\n    assert f.asked.wait(5)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE_S).returncode == 128 + signal.SIGINT


def test_a_server_that_ends_opens_no_more_pictures():
    holder, farewell = EngineHolder(), Farewell()
    farewell.asked.set()
    config = uvicorn.Config(create_app(holder), port=0, lifespan="off", log_config=None)
    server._Server(config, holder, threading.Thread(), farewell).run()
    assert holder.status()["state"] == "stopping"
    with pytest.raises(RuntimeError, match="after shutdown"):
        holder.decoder.pool.submit(int)
