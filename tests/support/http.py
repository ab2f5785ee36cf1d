"""The HTTP side under test: a stand-in for a model, a server on a free port, and what speaks to it."""

import base64
import json
import struct
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from benchmarks.live_view import PassThrough
from pipeline.images import encode_png, open_image
from server import EngineHolder, create_routes

PATIENCE_S = 60  # no claim: only how long a broken server may hang before the test fails


class StubPipeline(PassThrough):
    """The five steps without a model: "negative" inverts the first picture, other prompts return it."""

    description = {"model": "stub", "device": "cpu"}  # noqa: RUF012

    def __init__(self):
        super().__init__(64)
        self.started = threading.Semaphore(0)  # one release for each frame that reached its denoise
        self.gate = threading.Event()
        self.gate.set()
        self.references = []

    def await_start(self):
        assert self.started.acquire(timeout=PATIENCE_S), "no frame reached its denoise"

    def encode_references(self, images, *, area, width, height):
        self.references.append(images)
        return images

    def denoise(self, *inputs, **options):
        self.started.release()
        assert self.gate.wait(2 * PATIENCE_S), "the test never opened the gate"
        return super().denoise(*inputs, **options)


@contextmanager
def serving(holder: EngineHolder, auth=None, **options):
    """A uvicorn on a free port in a thread; yields its address without the scheme. `options` go to create_routes."""
    app = FastAPI(routes=create_routes(holder, auth, **options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", forwarded_allow_ips="127.0.0.1"))
    ready = threading.Event()
    startup = server.startup

    async def startup_and_tell(*args, **kwargs):
        await startup(*args, **kwargs)
        ready.set()

    server.startup = startup_and_tell
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(PATIENCE_S), "uvicorn did not start"
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def b64(picture) -> str:
    return base64.b64encode(picture if isinstance(picture, bytes) else encode_png(picture)).decode()


def post(address, body, **options):
    if "content" not in options:
        options["json"] = body
    return httpx.post(f"http://{address}/edit", timeout=PATIENCE_S, **options)


def handshake_status(address, **headers) -> int:
    """The status with which the live socket answers: 101 is open."""
    try:
        with connect(f"ws://{address}/live", additional_headers=headers):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


class Browser:
    """The other side of the live socket, as webui/live/links.js speaks it."""

    def __init__(self, address, **options):
        self._connection = connect(f"ws://{address}/live", **options)
        self.socket = self._connection.__enter__()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.socket.close()

    def params(self, **fields):
        self.socket.send(json.dumps({"type": "params", **fields}))
        return self.until("params")

    def frame(self, number, picture):
        self.socket.send(struct.pack("<I", number) + encode_png(picture))

    def receive(self):
        """A text message as its dict; a picture as {"type": "picture", "number", "meta", "image"}."""
        data = self.socket.recv(timeout=PATIENCE_S)
        if isinstance(data, str):
            return json.loads(data)
        number, length = struct.unpack_from("<II", data)
        meta = json.loads(data[8 : 8 + length])
        return {"type": "picture", "number": number, "meta": meta, "image": open_image(data[8 + length :])}

    def until(self, kind, **fields):
        while True:
            message = self.receive()
            if message["type"] == kind and fields.items() <= message.items():
                return message
            assert message["type"] != "error" or kind == "error", message


def wait_until(condition, what):
    """Polls; the engine has no hook for every state, and a second thread is under way."""
    event, late = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < late, f"never came true: {what}"
        event.wait(0.02)
