"""Many clients at once on this machine: are they served fairly, is anything answered that is not documented?

    python -m benchmarks.serving load                              16 live views, 8 posting, 120 s, a server of its own (pocket)
    python -m benchmarks.serving load --url http://127.0.0.1:8086 --seconds 30 --live 4 --posting 2

Live clients send pictures at a camera's pace and never wait for a result; posting clients send the next edit when they
have the last. In the middle one more live client, a process of its own, is killed without a goodbye, and how long its
session lives on is measured. Only loopback addresses are taken: this is a load, not a tool against others.

The last line is JSON. `spread` is how far the client served most or least is from the mean; `share` is what a posting
client got for one frame of a live one. The exit status is 1 when a spread is above 20 %, when anything was answered
that the documents do not promise, or when the killed client's session lived longer than 2 s.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

ROOT = Path(__file__).resolve().parents[2]
CAMERA_FPS = 15
UNACKNOWLEDGED = 3  # as the page
MAX_SPREAD = 0.2
MAX_FREED_S = 2.0
PATIENCE_S = 60.0

# Without a closing handshake and without reading: what a killed browser leaves behind.
VICTIM = """
import json, struct, sys, time
from websockets.sync.client import connect
url, headers, params = json.loads(sys.argv[1])
picture = sys.stdin.buffer.read()
with connect(url, additional_headers=headers, max_size=None) as socket:
    socket.send(json.dumps({"type": "params"} | params))
    for number in range(10**6):
        socket.send(struct.pack("<I", number) + picture)
        time.sleep(0.1)
"""


def jpegs(side: int, seed: int, count: int = 4) -> list[bytes]:
    """Pictures of which no two are alike, so that no cache answers for the model."""
    files = []
    for picture in np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), np.uint8):
        file = io.BytesIO()
        Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


class Client:
    """What one client saw: results within the measured time, their latencies, and whatever else came."""

    def __init__(self, seed: int):
        self.seed, self.measuring = seed, False
        self.served = asyncio.Event()  # the first result: from then on all clients want something all the time
        self.latencies_ms: list[float] = []
        self.refused = 0  # 503 with Retry-After, or "busy": documented
        self.unexpected: Counter = Counter()

    def done(self, sent: float) -> None:
        self.served.set()
        if self.measuring:
            self.latencies_ms.append((time.monotonic() - sent) * 1000)


async def live_client(client: Client, address: str, headers: dict, params: dict, side: int) -> None:
    pictures, sent, unacknowledged = jpegs(side, client.seed), {}, 0
    try:
        async with connect(f"ws://{address}/live", additional_headers=headers, max_size=None) as connection:
            await connection.send(json.dumps({"type": "params"} | params))

            async def camera():
                nonlocal unacknowledged
                for number in range(10**9):
                    if unacknowledged < UNACKNOWLEDGED:
                        sent[number], unacknowledged = time.monotonic(), unacknowledged + 1
                        await connection.send(struct.pack("<I", number) + pictures[number % len(pictures)])
                    await asyncio.sleep(1 / CAMERA_FPS)

            task = asyncio.create_task(camera())
            try:
                async for message in connection:
                    if isinstance(message, bytes):
                        number = struct.unpack_from("<I", message)[0]
                        client.done(sent.pop(number))
                        for older in [n for n in sent if n < number]:
                            del sent[older]
                        continue
                    message = json.loads(message)
                    if message["type"] == "error":
                        client.unexpected[message["message"]] += 1
                    client.refused += message.get("state") == "busy"
                    unacknowledged -= message["type"] == "ack"
            finally:
                task.cancel()
    except (ConnectionClosed, OSError) as error:
        client.unexpected[f"{type(error).__name__}: {error}"] += 1


async def posting_client(client: Client, address: str, headers: dict, params: dict, side: int) -> None:
    bodies = [params | {"image": base64.b64encode(file).decode()} for file in jpegs(side, client.seed)]
    async with httpx.AsyncClient(timeout=PATIENCE_S, headers=headers | {"accept": "image/jpeg"}) as http:
        for number in range(10**9):
            sent = time.monotonic()
            try:
                answer = await http.post(f"http://{address}/edit", json=bodies[number % len(bodies)])
            except httpx.HTTPError as error:
                client.unexpected[f"{type(error).__name__}: {error}"] += 1
                await asyncio.sleep(0.5)
                continue
            if answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg":
                client.done(sent)
            elif answer.status_code == 503 and "retry-after" in answer.headers:
                client.refused += 1
                await asyncio.sleep(float(answer.headers["retry-after"]))
            else:
                client.unexpected[f"{answer.status_code}: {answer.text[:200]}"] += 1
                await asyncio.sleep(0.5)


async def kill_one(address: str, headers: dict, params: dict, side: int, living: int) -> float:
    """Seconds from the killing of a live client to the end of its session. `living` others have one meanwhile."""

    async def until(count: int) -> float:
        started = time.monotonic()
        while (await health(address, headers))["live"]["sessions"] != count:
            if time.monotonic() - started > PATIENCE_S:
                raise RuntimeError(f"there were never {count} live sessions")
            await asyncio.sleep(0.05)
        return time.monotonic() - started

    argument = json.dumps([f"ws://{address}/live", headers, params])
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, argument], stdin=subprocess.PIPE)
    try:
        victim.stdin.write(jpegs(side, 999, 1)[0])
        victim.stdin.close()
        await until(living + 1)
        victim.kill()
        return await until(living)
    finally:
        victim.kill()
        victim.wait()


async def health(address: str, headers: dict) -> dict:
    async with httpx.AsyncClient(timeout=PATIENCE_S, headers=headers) as http:
        return (await http.get(f"http://{address}/health")).json()


def summary(clients: list[Client], seconds: float) -> dict:
    counts = [len(client.latencies_ms) for client in clients]
    latencies = sorted(ms for client in clients for ms in client.latencies_ms)
    mean = statistics.fmean(counts)
    return {
        "clients": len(clients),
        "frames": sum(counts),
        "frames_per_client": counts,
        "fps": round(sum(counts) / seconds, 2),
        "spread": round(max(abs(count - mean) for count in counts) / mean, 3) if mean else None,
        "p50_ms": round(statistics.median(latencies), 1) if latencies else None,
        "p95_ms": round(latencies[int(0.95 * (len(latencies) - 1))], 1) if latencies else None,
        "refused": sum(client.refused for client in clients),
    }


async def run(
    address: str, seconds: float, *, live: int = 16, posting: int = 8, side: int = 128, steps: int = 1,
    headers: dict | None = None,
) -> dict:  # fmt: skip
    """The report of `seconds` under load, from when every client has its first result."""
    headers = headers or {}
    params = {"prompt": "make it black and white", "width": side, "height": side, "steps": steps}
    lives, posts = [Client(seed) for seed in range(live)], [Client(100 + seed) for seed in range(posting)]
    everybody = lives + posts
    tasks = [asyncio.create_task(live_client(client, address, headers, params, side)) for client in lives]
    tasks += [asyncio.create_task(posting_client(client, address, headers, params, side)) for client in posts]
    try:
        async with asyncio.timeout(PATIENCE_S + seconds):
            await asyncio.gather(*(client.served.wait() for client in everybody))
            before = await health(address, headers)
            started = time.monotonic()
            for client in everybody:
                client.measuring = True
            await asyncio.sleep(seconds / 2)
            freed_s = await kill_one(address, headers, params, side, live) if live else None
            await asyncio.sleep(max(0.0, started + seconds - time.monotonic()))
            measured_s = time.monotonic() - started
            for client in everybody:
                client.measuring = False
            after = await health(address, headers)
    except TimeoutError:
        for client in everybody:
            client.unexpected["no result"] += not client.served.is_set()
        raise RuntimeError(f"did not end in time: {sum((c.unexpected for c in everybody), Counter())}") from None
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:  # a client that broke measured nothing
        if end is not None and not isinstance(end, asyncio.CancelledError):
            raise end
    report = {
        "seconds": round(measured_s, 1),
        "side": side,
        "steps": steps,
        "live": summary(lives, measured_s) if lives else None,
        "posting": summary(posts, measured_s) if posts else None,
        "unexpected": dict(sum((client.unexpected for client in everybody), Counter())),
        "killed_client_freed_s": None if freed_s is None else round(freed_s, 2),
        "server_memory_mb": [round(h["memory_bytes"]["process"] / 2**20, 1) for h in (before, after)],
        "engine_errors": after["stats"]["errors"] - before["stats"]["errors"],
    }
    if lives and posts and report["live"]["frames"]:
        share = (report["posting"]["frames"] / posting) / (report["live"]["frames"] / live)
        report["share"] = round(share, 3)
    return report


def complaints(report: dict) -> list[str]:
    """What the report shows that must not be."""
    found = [f"unexpected: {text} ({count} times)" for text, count in report["unexpected"].items()]
    for name in ("live", "posting"):
        group = report[name]
        if group is not None and (group["spread"] is None or group["spread"] > MAX_SPREAD):
            found.append(f"{name} clients were served unequally: {group['frames_per_client']}")
    if (report["killed_client_freed_s"] or 0) > MAX_FREED_S:
        found.append(f"a killed client's session lived {report['killed_client_freed_s']} s")
    return found


@contextlib.contextmanager
def own_server(arguments: list[str]):
    """(address, process id) of a `server.py` of its own, ready, on a free port; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "server.py"), "--port", str(port), *arguments]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        address = f"127.0.0.1:{port}"
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with status {server.returncode}")
            with contextlib.suppress(httpx.TransportError):
                state = httpx.get(f"http://{address}/ready").json()
                if state["state"] in ("ready", "failed"):
                    break
            time.sleep(0.2)
        yield address, server.pid
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving load", description="Puts a server of this machine under load and judges its answers.")
    parser.add_argument("--url", help="a running server, as http://127.0.0.1:8086 (default: one of its own)")
    parser.add_argument("--model", default="pocket", help="of a server of its own (default pocket)")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--live", type=int, default=16)
    parser.add_argument("--posting", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--api-key")
    options = parser.parse_args(argv)
    headers = {"x-api-key": options.api_key} if options.api_key else {}
    numbers = {"live": options.live, "posting": options.posting, "side": options.size, "steps": options.steps}
    with contextlib.ExitStack() as stack:
        if options.url is None:
            address, _ = stack.enter_context(own_server(["--model", options.model]))
        else:
            address = urlsplit(options.url).netloc
            if urlsplit(options.url).hostname not in ("127.0.0.1", "localhost", "::1"):
                parser.error("only a server of this machine is put under load")
        report = asyncio.run(run(address, options.seconds, headers=headers, **numbers))
    report["complaints"] = complaints(report)
    print(json.dumps(report))
    return 1 if report["complaints"] else 0
