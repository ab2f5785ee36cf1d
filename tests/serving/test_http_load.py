"""Many clients at once, for a few seconds: what `benchmarks/serving/load.py` judges in two minutes on the embedded model."""

import asyncio
import json
import socket
import struct
import threading

import numpy as np
import pytest
from support.http import Browser, StubPipeline, b64, post, serving, wait_until
from support.pictures import grey

from benchmarks.serving import load
from pipeline.images import encode_jpeg
from qwen_realtime import RealtimeEngine
from server import EngineHolder
from serving.status import resident_bytes

FRAME_S = 0.012


class SlowPipeline(StubPipeline):
    """A model that takes its time, so that the clients must share it."""

    def decode(self, latents, width, height):
        threading.Event().wait(FRAME_S)
        return super().decode(latents, width, height)


@pytest.fixture(scope="module")
def address():
    with RealtimeEngine(SlowPipeline()) as engine, serving(EngineHolder(engine)) as address:
        yield address


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.endurance)])
def test_sixteen_live_views_and_eight_posting_clients_are_served_alike_and_a_killed_one_is_gone(address, seconds):
    report = asyncio.run(load.run(address, seconds, side=64))
    assert load.complaints(report) == [], report
    assert report["live"]["p95_ms"] < 1000 and report["posting"]["p95_ms"] < 3000, report
    frames = report["live"]["frames"] + report["posting"]["frames"]
    assert frames > 0.5 * report["seconds"] / FRAME_S, report  # the model was what they waited for
    assert 0.7 < report["share"] < 1.3, report  # a posting client is away between its edits


def test_the_load_programs_judgement_can_fail():
    group = {"spread": 0.05, "frames_per_client": [20, 21]}
    good = {"unexpected": {}, "live": group, "posting": None, "killed_client_freed_s": 0.1}
    assert load.complaints(good) == []
    for bad in (
        {"unexpected": {"500: oh": 3}},
        {"live": group | {"spread": 0.3}},
        {"posting": group | {"spread": None}},
        {"killed_client_freed_s": 2.5},
    ):
        assert len(load.complaints(good | bad)) == 1, bad


def test_only_a_server_of_this_machine_is_put_under_load():
    with pytest.raises(SystemExit):
        load.main(["--url", "http://example.org"])


def raw_frame(kind: int, data: bytes) -> bytes:
    """A message as a browser puts it on the wire, with a mask of zeros (RFC 6455, section 5.2)."""
    length = struct.pack(">B", 0x80 | len(data)) if len(data) < 126 else struct.pack(">BH", 0x80 | 126, len(data))
    return struct.pack(">B", 0x80 | kind) + length + bytes(4) + data


def test_a_live_view_that_never_reads_is_sent_no_more_costs_no_memory_and_harms_nobody(address):
    host, port = address.split(":")
    handshake = (
        f"GET /live HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    picture = encode_jpeg(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    params = json.dumps({"type": "params", "prompt": "keep", "width": 512, "height": 512}).encode()
    before = resident_bytes()
    with socket.create_connection((host, int(port)), timeout=2.0) as deaf, Browser(address) as reader:
        deaf.sendall(handshake.encode())
        assert b" 101 " in deaf.recv(64)  # the last that it reads
        deaf.sendall(raw_frame(1, params))
        sent = 0
        with pytest.raises(TimeoutError):  # the server stops reading from whom it cannot write to
            while sent < 2 * 2**30:
                deaf.sendall(raw_frame(2, struct.pack("<I", 1) + picture))
                sent += len(picture)
        reader.params(prompt="keep")
        reader.frame(7, grey())
        assert reader.until("picture")["number"] == 7
        assert post(address, {"image": b64(grey()), "prompt": "keep"}).status_code == 200
        grown = resident_bytes() - before
    # 221 MB of JPEG are 4 GB of pictures at the output's size; 40 to 65 MB are what the decoding threads' allocators keep.
    assert grown < 96 * 2**20, f"{grown / 2**20:.0f} MB after {sent / 2**20:.0f} MB"
    wait_until(lambda: asyncio.run(load.health(address, {}))["live"]["sockets"] == 0, "the sockets are gone")
