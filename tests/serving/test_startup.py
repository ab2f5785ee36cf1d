"""What the program finds out before it chooses a model: about the GPU, and about the hub and its cache on disk."""

import json
import shutil
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from serving.startup import REAL_MEMORY_GB, probe_gpu_gb, probe_hub

MODEL, COMMIT = "Owner/Some-Model", "a" * 40
SHARDS = {
    "transformer/diffusion_pytorch_model.safetensors.index.json": ("t-1.safetensors", "t-2.safetensors"),
    "text_encoder/model.safetensors.index.json": ("e-1.safetensors", "e-2.safetensors"),
}
FILES = ["model_index.json", *SHARDS, *(f"{name.split('/')[0]}/{shard}" for name in SHARDS for shard in SHARDS[name])]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on loopback in the hub's place, with a cache folder that does not exist yet; what it was asked, in `asked`."""

    class Hub(BaseHTTPRequestHandler):
        models, asked = {MODEL}, []

        def do_GET(self):
            self.asked.append(self.path.partition("?")[0])
            known = self.asked[-1].removeprefix("/api/models/") in self.models
            body = json.dumps({"id": MODEL, "siblings": []} if known else {"error": "Repository not found"}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, REAL_MEMORY_GB * 1e9))
        yield Hub
        server.shutdown()


def fill_cache(*left_out: str):
    """The hub's cache with all of the model's files but these."""
    model = Path(constants.HF_HUB_CACHE) / "models--Owner--Some-Model"
    for name in set(FILES) - set(left_out):
        file = model / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(SHARDS.get(name, ()))}}))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)


def test_a_model_that_the_hub_has_and_the_disk_has_room_for_can_be_downloaded(hub):
    assert probe_hub(MODEL) == (False, True)
    assert f"/api/models/{MODEL}" in hub.asked


def test_a_model_whose_every_shard_is_in_the_cache_is_at_hand_and_the_hub_is_not_asked(hub):
    fill_cache()
    assert probe_hub(MODEL) == (True, False) and hub.asked == []


@pytest.mark.parametrize("missing", FILES)
def test_a_cache_that_lacks_one_file_is_not_the_whole_model(hub, missing):
    fill_cache(missing)
    assert probe_hub(MODEL) == (False, True)


def test_offline_only_the_cache_counts(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert probe_hub(MODEL) == (False, False)
    fill_cache()
    assert probe_hub(MODEL) == (True, False) and hub.asked == []


def test_nothing_is_downloaded_onto_a_disk_without_room_for_it(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, REAL_MEMORY_GB * 1e9 - 1))
    assert probe_hub(MODEL) == (False, False) and hub.asked == []


def test_a_model_that_the_hub_does_not_have_or_a_hub_that_does_not_answer_is_no_download(hub, monkeypatch, caplog):
    assert probe_hub("Owner/Unknown") == (False, False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: no one listens
    with caplog.at_level("INFO"):
        assert probe_hub(MODEL) == (False, False)
    assert f"{MODEL} cannot be downloaded" in caplog.text


def test_the_memory_is_that_of_the_gpu_that_the_flag_means(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((device.index or 0) * 10e9 + 5e9, 80e9))
    assert [probe_gpu_gb(device) for device in ("auto", "cuda", "cuda:1", "cpu")] == [5.0, 5.0, 15.0, None]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe_gpu_gb("auto") is probe_gpu_gb("cuda") is None
