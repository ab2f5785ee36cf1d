"""The attacks that SECURITY.md counts: what a stranger sends, while somebody else works.

    python -m benchmarks.serving attacks --out benchmarks/results/attacks-cpu.json          all of it, about half an hour
    python -m benchmarks.serving attacks --cases 100 --pictures 60 --videos 6 --minutes 0.2  a look

Against a `server.py` of its own on this machine (Linux), with the embedded model: requests that schemathesis invents,
pictures with flipped bits, hostile files and bodies during the load of 16 live views and 8 posting clients. Damaged videos go through the
page's own video edit, with a cheap function in the model's place. All the time a bystander at an address of its own asks for
/health and for a small edit, and its longest wait is measured.

The file: {"kind": "attacks", "device", versions, "commit", "schemathesis": {"cases", "failures"}, "pictures": {"sent",
"statuses", "wrong"}, "videos": {"sent", "edited", "refused", "unexplained"}, "minutes" of load, "load": the report of
`benchmarks.serving load`, "hostile": {"sent", "statuses"}, "bystander": {"asked", "worst_s" by path, "over_5_s", "statuses"}, "memory_mb":
{"before", "after", "most"} of the server with its children, "complaints"}. The exit status is 1 if there is a complaint.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import httpx
import numpy as np
import torch
from PIL import Image

from benchmarks.result_file import environment
from benchmarks.serving import load
from benchmarks.serving.load import ROOT, own_server
from pipeline.images import EditError
from webui.video_edit import edit_video, probe

# Loopback has a whole network of addresses (Linux): the server shares its places out by address.
BYSTANDER, STRANGER = "127.0.0.2", "127.0.0.3"
HANG_S = 5.0
GIVEN_BACK_MB = 100
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")


class Bystander(threading.Thread):
    """Someone who wants a picture: asks for /health and a small edit, again and again, until `leave`."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self._address, self._gone = address, threading.Event()
        self.waits_s: dict[str, list[float]] = {"/health": [], "/edit": []}
        self.statuses: Counter = Counter()

    def run(self) -> None:
        body = {"image": encoded(picture_file(64, 64, "PNG", 1)), **SMALL}
        with client_at(BYSTANDER, self._address) as client:
            while not self._gone.wait(0.25):
                for path, content in (("/health", None), ("/edit", body)):
                    began = time.monotonic()
                    try:
                        answer = client.request("POST" if content else "GET", path, json=content)
                        self.statuses[str(answer.status_code)] += 1
                    except httpx.HTTPError as error:
                        self.statuses[type(error).__name__] += 1
                    self.waits_s[path].append(time.monotonic() - began)

    def leave(self) -> dict:
        self._gone.set()
        self.join(60)
        return {
            "asked": sum(map(len, self.waits_s.values())),
            "worst_s": {path: round(max(waits, default=0.0), 2) for path, waits in self.waits_s.items()},
            "over_5_s": sum(wait > HANG_S for waits in self.waits_s.values() for wait in waits),
            "statuses": dict(self.statuses),
        }


class Memory(threading.Thread):
    """The most that a process and its children hold, in megabytes."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self._gone, self.most = pid, threading.Event(), 0.0
        self.before = family_mb(pid)

    def run(self) -> None:
        while not self._gone.wait(0.5):
            self.most = max(self.most, family_mb(self._pid))

    def leave(self) -> dict:
        self._gone.set()
        for _ in range(60):  # what is given back is given back within this time
            after = family_mb(self._pid)
            if after - self.before < GIVEN_BACK_MB / 2:
                break
            time.sleep(0.5)
        return {"before": round(self.before), "after": round(after), "most": round(max(self.most, after))}


def family_mb(pid: int) -> float:
    """Resident memory of a process and all below it; Linux."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(family_mb(int(child)) for child in (task / "children").read_text().split())
    return total


# What is sent

SMALL = {"prompt": "make it black and white", "steps": 1, "width": 64, "height": 64}


def client_at(own_address: str, address: str, timeout_s: float = 60.0) -> httpx.Client:
    return httpx.Client(
        base_url=f"http://{address}", timeout=timeout_s, transport=httpx.HTTPTransport(local_address=own_address)
    )


def picture_file(width: int, height: int, kind: str, seed: int, **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def flipped(data: bytes, dice: random.Random) -> bytes:
    """One to forty bits turned over, half the time only in the first 400 bytes: there stand sizes, counts and offsets."""
    damaged = bytearray(data)
    for _ in range(dice.choice((1, 2, 5, 40))):
        where = dice.randrange(min(len(damaged), dice.choice((400, 10**9))))
        damaged[where] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def flipped_pictures(count: int):
    dice = random.Random(7)
    whole = {kind: picture_file(96, 64, kind, 3) for kind in FORMATS}
    whole["progressive"] = picture_file(96, 64, "JPEG", 4, progressive=True)
    for number in range(count):
        kind = list(whole)[number % len(whole)]
        yield kind, flipped(whole[kind], dice)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there 1500 times: 100 kB that take a minute."""
    data = picture_file(1600, 1200, "JPEG", 5, progressive=True, quality=20)
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * 1500 + b"\xff\xd9"


def edit_body(picture: bytes, prompt: str = "x") -> bytes:
    return json.dumps({"image": encoded(picture), "prompt": prompt}).encode()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Made when they are sent and dropped afterwards: together they have some hundred megabytes.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "scans": lambda: edit_body(many_scans()),
    "large PNG": lambda: edit_body(saved(Image.new("RGBA", (7990, 7990)), "PNG")),
    "animation": lambda: edit_body(
        saved(Image.new("L", (64, 64)), "GIF", save_all=True, append_images=[Image.new("L", (64, 64), n) for n in range(256)] * 8)
    ),
    "brackets": lambda: b"[" + b"[],[]," * 8_000_000 + b"[]]",
    "keys": lambda: b"{" + b",".join(b'"%d":0' % n for n in range(3_000_000)) + b"}",
    "emoji": lambda: edit_body(picture_file(64, 64, "PNG", 1), "\U0001f600" * 2000),
    "deep": lambda: b'{"a":' * 200_000,
}


def video_files(folder: Path) -> list[Path]:
    """Small videos with sound in four containers."""
    files = [folder / name for name in ("a.mp4", "b.mkv", "c.mov", "d.avi")]
    for path, codec in zip(files, ("aac", "libopus", "alac", "mp3"), strict=True):
        with av.open(str(path), "w") as out:
            video, audio = out.add_stream("libx264", rate=10), out.add_stream(codec, rate=48000)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            for picture in np.random.default_rng(11).integers(0, 255, (8, 64, 96, 3), np.uint8):
                out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(video.encode(None))
            tone = (0.3 * np.sin(np.arange(38400) / 17)).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 48000, 0
            out.mux(audio.encode(samples))
            out.mux(audio.encode(None))
    return files


# The phases


def by_schemathesis(address: str, cases: int) -> dict:
    """Rounds, each with a seed of its own, until this number of cases was sent. Raises RuntimeError when it does not run."""
    settings = os.environ | {"SCHEMATHESIS_HOOKS": "benchmarks.serving.attack_hooks", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    sent, failures, seed = 0, [], 0
    with tempfile.TemporaryDirectory() as folder:
        while sent < cases:
            seed += 1
            examples = str(min(500, max(10, (cases - sent) // 2)))
            command = [
                sys.executable, "-m", "schemathesis.cli", "run", f"http://{address}/openapi.json", "--no-color", "--seed", str(seed),
                "--phases", "examples,coverage,fuzzing", "--max-examples", examples, "--request-timeout", "30",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=folder, timeout=1800)
            counted = re.findall(r"(\d+) generated", done.stdout)
            if not counted:
                raise RuntimeError(f"schemathesis did not say how much it sent: {done.stdout[-2000:]}{done.stderr[-1000:]}")
            sent += int(counted[-1])
            if done.returncode:
                failures.append(done.stdout[-4000:])
    return {"cases": sent, "failures": failures}


def by_pictures(address: str, count: int) -> dict:
    statuses, wrong = Counter(), []
    with client_at(STRANGER, address) as client:
        for kind, data in flipped_pictures(count):
            answer = client.post("/edit", json={"image": encoded(data), **SMALL})
            statuses[str(answer.status_code)] += 1
            if answer.status_code not in (200, 400, 413):
                wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
    return {"sent": count, "statuses": dict(statuses), "wrong": wrong[:20]}


def by_hostile(address: str, ends: threading.Event, report: dict) -> None:
    """One hostile body a second; every other time the sender leaves after a second."""
    statuses, number = Counter(), 0
    while not ends.wait(1.0):
        name, make = list(HOSTILE.items())[number % len(HOSTILE)]
        number += 1
        with client_at(STRANGER, address, timeout_s=1.0 if number % 2 else 30.0) as client:
            try:
                answer = client.post("/edit", content=make(), headers={"content-type": "application/json"})
                statuses[f"{name}: {answer.status_code}"] += 1
            except httpx.HTTPError as error:
                statuses[f"{name}: {type(error).__name__}"] += 1
    report |= {"sent": number, "statuses": dict(statuses)}


def by_videos(count: int) -> dict:
    """Damaged videos through the page's video edit: each is edited, as far as it goes, or refused in a sentence."""
    dice, edited, refused, unexplained = random.Random(5), 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        whole, out = video_files(Path(name)), Path(name) / "out"
        out.mkdir()
        for number in range(count):
            source = whole[number % len(whole)]
            damaged = source.with_stem("damaged")
            damaged.write_bytes(flipped(source.read_bytes(), dice))
            try:
                probe(damaged)
                *_, outcome = edit_video(damaged, out, lambda picture: 255 - picture)
                outcome.path.unlink()
                edited += 1
            except EditError as error:
                refused += 1
                if not 20 < len(str(error)) < 300:
                    unexplained.append(f"{number}: {str(error)[:300]!r}")
            except Exception as error:  # whatever else it is, it is what is looked for
                unexplained.append(f"{number}: {type(error).__name__}: {error}"[:300])
            for left in out.iterdir():
                unexplained.append(f"{number}: {left.name} is left")
                left.unlink()
    return {"sent": count, "edited": edited, "refused": refused, "unexplained": unexplained}


def warm_up(address: str) -> None:
    """What a server takes once is taken before memory is measured: the model's buffers, a reader of pictures."""
    with client_at(STRANGER, address) as client:
        for data in (picture_file(64, 64, "PNG", 1), picture_file(64, 64, "TIFF", 1), picture_file(2048, 2048, "PNG", 1)):
            client.post("/edit", json={"image": encoded(data), **SMALL}).raise_for_status()


def run(options: argparse.Namespace) -> dict:
    report: dict = {"kind": "attacks", **environment(torch.device("cpu"), options.commit), "minutes": options.minutes}
    with own_server(["--model", "pocket"]) as (address, pid):
        warm_up(address)
        memory, bystander = Memory(pid), Bystander(address)
        memory.start()
        bystander.start()
        report["schemathesis"] = by_schemathesis(address, options.cases)
        report["pictures"] = by_pictures(address, options.pictures)
        ends, hostile = threading.Event(), {}
        sender = threading.Thread(target=by_hostile, args=(address, ends, hostile), daemon=True)
        sender.start()
        report["load"] = asyncio.run(load.run(address, 60 * options.minutes, side=64))
        ends.set()
        sender.join(60)
        report["hostile"] = hostile
        report["bystander"] = bystander.leave()
        report["memory_mb"] = memory.leave()
    report["videos"] = by_videos(options.videos)
    report["complaints"] = complaints(report)
    return report


def complaints(report: dict) -> list[str]:
    found = [f"schemathesis: {text[-600:]}" for text in report["schemathesis"]["failures"]]
    found += [f"picture: {text}" for text in report["pictures"]["wrong"]]
    found += [f"hostile body: {name} ({n} times)" for name, n in report["hostile"]["statuses"].items() if re.search(r": 5(?!03)\d\d", name)]
    found += [f"bystander: {status} ({n} times)" for status, n in report["bystander"]["statuses"].items() if status not in ("200", "503", "429")]
    if report["bystander"]["over_5_s"]:
        found.append(f"a bystander waited too long, in seconds: {report['bystander']['worst_s']}")
    if report["memory_mb"]["after"] - report["memory_mb"]["before"] > GIVEN_BACK_MB:
        found.append(f"memory is not given back: {report['memory_mb']}")
    found += [f"unexpected under load: {text} ({n} times)" for text, n in report["load"]["unexpected"].items()]
    found += [f"video: {text}" for text in report["videos"]["unexplained"]]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving attacks", description="Attacks a server of its own on this machine and counts what happens.")
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--videos", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of the code, for the result file")
    options = parser.parse_args(argv)
    report = run(options)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 1 if report["complaints"] else 0
