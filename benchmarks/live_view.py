"""What a person at the live view gets: frames a second, latency, order; with a fast model, a slow one, a slow link.

    python -m benchmarks.live_view                       all cases, a minute each; writes benchmarks/results/live-view.json
    python -m benchmarks.live_view --seconds 10 --cases trivial slow-link --out -

The program's own page runs in a headless Chromium with a fake camera at 30 frames a second. Each of its frames carries its
number as black and white blocks, and the model is a stand-in that gives the picture back, at once or after a while. So
whatever the canvas shows can be read: which frame it is, and how much later it is there than the camera's own picture of
it. Nothing of the page is asked for its own opinion; what it writes into its line of truth is noted for comparison.

The slow link is a relay on loopback that lets through a number of bits a second each way, each byte late by half the round
trip, and holds what comes faster in a buffer, as a router does: a sender that does not mind piles up seconds there.

Each row of the file has the machine's load at its end: this is a measurement of two cores that a busy neighbour spoils.
Started with `chrt -r 1`, all of it goes before the neighbour's work, and the row says "realtime".
Exit status 1 when a bar of `BARS` is missed.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.images import EditError, encode_jpeg

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "live-view.json"
SIDE = 512
CAMERA_FPS = 30.0  # at which Chromium plays a fake camera's MJPEG
FILM_FRAMES = 256  # then from the start again: differences of numbers are taken modulo this
BITS = 8
PATIENCE_S = 90  # how long a broken page may hang
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
    "--disable-background-networking", "--no-first-run", "--disable-component-update", "--disable-sync",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- the numbered camera


def numbered(picture: np.ndarray, number: int) -> np.ndarray:
    """The picture, uint8 (H, W, 3), with `number` in its upper eighth: a row of blocks, and their opposites below."""
    picture = picture.copy()
    width, height = picture.shape[1] // BITS, picture.shape[0] // 16
    for bit in range(BITS):
        light = 255 if number >> bit & 1 else 0
        columns = slice(bit * width, (bit + 1) * width)
        picture[:height, columns], picture[height : 2 * height, columns] = light, 255 - light
    return picture


def read_number(picture: np.ndarray) -> int:
    """The number that `numbered` wrote; -1 where there is none."""
    width, height = picture.shape[1] // BITS, picture.shape[0] // 16
    rows = picture[: 2 * height, : BITS * width].mean(2).reshape(2, height, BITS, width)
    upper, lower = rows[:, height // 4 : -height // 4, :, width // 4 : -width // 4].mean((1, 3))
    return (
        -1 if np.any(abs(upper - lower) < 100) else int(sum(1 << bit for bit in range(BITS) if upper[bit] > lower[bit]))
    )


def write_film(path: Path, side: int = SIDE, frames: int = FILM_FRAMES) -> None:
    """An MJPEG for Chromium's fake camera: a pan over soft shapes, each frame with its number."""
    y, x = np.mgrid[0:side, 0 : 2 * side] * (2 * np.pi / side)
    wide = np.stack([np.sin(3 * x + y), np.sin(2 * y - x), np.sin(5 * x) * np.cos(4 * y)], -1)
    wide = (127 + 90 * wide).astype(np.uint8)
    with path.open("wb") as file:
        for number in range(frames):
            at = number * side // frames
            file.write(encode_jpeg(numbered(wide[:, at : at + side], number), 90))


# Reads the blocks of whatever is drawn: in the page, for each picture that is shown.
WATCH = """(bits) => {
  const small = document.createElement("canvas");
  [small.width, small.height] = [bits * 4, 64];
  const context = small.getContext("2d", {willReadFrequently: true});
  window.readNumber = (from) => {
    context.drawImage(from, 0, 0, small.width, small.height);
    const {data} = context.getImageData(0, 0, small.width, 8);
    let number = 0;
    for (let bit = 0; bit < bits; bit++) {
      const light = (row) => data[4 * (row * small.width + bit * 4 + 1)] + data[4 * (row * small.width + bit * 4 + 2)];
      if (Math.abs(light(1) - light(6)) < 200) return -1;
      if (light(1) > light(6)) number |= 1 << bit;
    }
    return number;
  };
  const root = document.querySelector(".live"), edited = document.querySelector(".edited"), camera = document.querySelector(".camera");
  const came = new Map(); // number -> when the camera's own picture of it was there
  const onCamera = (now) => {
    const number = readNumber(camera);
    if (came.get("last") !== number) came.set(number, now).set("last", number);
    camera.requestVideoFrameCallback(onCamera);
  };
  camera.requestVideoFrameCallback(onCamera);
  window.seen = [];
  new MutationObserver(() => {
    const one = {
      edited: readNumber(edited), camera: readNumber(camera), prompt: root.dataset.prompt, level: Number(root.dataset.level),
    };
    requestAnimationFrame(() => { // painted
      one.at = performance.now();
      one.late_ms = one.at - (came.get(one.edited) ?? NaN); // of a frame that was not seen coming: NaN, or a round ago
      window.seen.push(one);
    });
  }).observe(root, {attributes: true, attributeFilter: ["data-frames"]});
}"""


def judge(seen: list[dict], film: int = FILM_FRAMES) -> dict:
    """What the frames that were seen say: rate, latency in ms from the camera's picture to the edited one, what was
    unreadable, what went backwards.
    """
    good = [each for each in seen if each["edited"] >= 0]
    numbers = [each["edited"] for each in good]
    late_ms = [each["late_ms"] for each in good if each["late_ms"] < film / 2 * 1000 / CAMERA_FPS]
    seconds = (seen[-1]["at"] - seen[0]["at"]) / 1000
    thirds = [float(np.median(part)) for part in np.array_split(late_ms, 3)]
    return {
        "frames": len(seen),
        "fps": round((len(seen) - 1) / seconds, 2),
        "latency_p50_ms": round(float(np.percentile(late_ms, 50)), 1),
        "latency_p95_ms": round(float(np.percentile(late_ms, 95)), 1),
        "latency_max_ms": round(max(late_ms), 1),
        "latency_of_thirds_ms": [round(ms, 1) for ms in thirds],
        "longest_pause_ms": round(max(b["at"] - a["at"] for a, b in itertools.pairwise(seen)), 1),
        "unreadable": len(seen) - len(good),
        "backwards": sum((b - a) % film > film // 2 for a, b in itertools.pairwise(numbers)),
        "levels": sorted({each["level"] for each in seen}),
    }


# ---------------------------------------------------------------------------------------------------- the stand-in model


class PassThrough:
    """A pipeline for the engine that gives the picture back; "negative" inverts it, "after 100 ms" takes so long."""

    description = {"model": "pass-through", "lora": None, "device": "cpu", "quantized": None, "dtype": "none"}  # noqa: RUF012

    fast_path = fused_transformer = None

    def __init__(self, side: int = SIDE):
        import torch

        self.device, self.default_size = torch.device("cpu"), side

    def enable_fast_path(self):
        return []

    def cache_summary(self):
        return {}

    def release_memory(self):
        pass

    def token_cache(self):
        raise EditError("the stand-in for a model has no tokens")

    def open_references(self, images):
        return images

    def schedule(self, steps, width, height):
        return steps

    def expect(self, times):
        pass

    def initial_noise(self, width, height, seed):
        return None

    def encode_prompt(self, prompt, images=None):
        return prompt, None

    def encode_references(self, images, *, area, width, height):
        return images

    def denoise(self, latents, references, prompt, mask, steps, *, on_step, **options):
        import torch

        if asked := re.search(r"after (\d+) ms", prompt):
            time.sleep(int(asked[1]) / 1000)  # as with a GPU: the time passes, the cores are free
        for step in range(steps):
            on_step(step, steps)
        return torch.from_numpy((255 - references[0] if "negative" in prompt else references[0]).astype(np.float32))

    def decode(self, latents, width, height):
        import torch

        return latents[None].to(torch.uint8)


def serve(port: int, side: int, max_sessions: int) -> None:
    """The program's page over the stand-in, until the process is ended."""
    sys.path.insert(0, str(ROOT))
    from qwen_realtime import EngineConfig, RealtimeEngine
    from server import EngineHolder
    from webui_realtime import launch, parse_args

    config = EngineConfig(max_sessions=max_sessions)
    with RealtimeEngine(PassThrough(side), config) as engine:
        launch(
            EngineHolder(engine, {"model": "pass-through", "reason": "a measurement"}),
            parse_args(["--port", str(port)]),
        )
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        os._exit(0)  # Gradio's threads have nothing to save


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(side: int = SIDE, max_sessions: int = 8):
    """The page in a process of its own; yields its port."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(port, side, max_sessions), daemon=True)
    process.start()
    try:
        end = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.is_alive() and time.monotonic() < end, "the page is not served"
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.join(PATIENCE_S)


# -------------------------------------------------------------------------------------------------------- the slow link


@dataclass(frozen=True)
class Line:
    up_mbit: float
    down_mbit: float
    round_trip_ms: float
    buffer_bytes: int = 256 * 2**10  # each way; beyond it the sender is held up


class SlowLink:
    """A relay from a port of its own to `port`, in a thread of its own, that is as slow as the line. A context manager.

    All connections share the line, which may be another later. `worst_backlog_ms` is the longest that a byte has waited
    in a buffer; `cut("/live")` breaks off all connections that began with a request for this path.
    """

    def __init__(self, port: int, line: Line):
        self._to, self.line = port, line
        self.worst_backlog_ms = 0.0
        self._loop = asyncio.new_event_loop()
        self._requests: dict[asyncio.StreamWriter, bytes] = {}  # what each connection began with
        self._free_at = {"up": 0.0, "down": 0.0}  # when the line has sent all that it holds, by the loop's clock

    def __enter__(self):
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._await(asyncio.start_server(self._relay, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc):
        self._await(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def cut(self, path: str) -> None:
        self._loop.call_soon_threadsafe(self._cut, f"GET {path} ".encode())

    def _cut(self, request: bytes = b"") -> None:
        for writer, began in self._requests.items():
            if began.startswith(request):
                writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to_there = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        self._requests[to_there] = b""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry("up", reader, to_there))
                group.create_task(self._carry("down", there, writer))
        except* OSError:
            pass
        except* asyncio.CancelledError:
            pass  # by _end alone; asyncio would print a cancelled connection as an error
        finally:
            del self._requests[to_there]
            for each in (writer, to_there):
                each.transport.abort()

    async def _carry(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts: asyncio.Queue = asyncio.Queue()

        async def deliver():
            while True:
                at, data = await parts.get()
                await asyncio.sleep(at - self._loop.time())
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        async def take():
            while True:
                data = await reader.read(4096)
                if way == "up" and not self._requests[writer]:
                    self._requests[writer] = data
                now, line = self._loop.time(), self.line
                rate = (line.up_mbit if way == "up" else line.down_mbit) * 1e6 / 8
                self._free_at[way] = max(self._free_at[way], now) + len(data) / rate
                waits = self._free_at[way] - now
                self.worst_backlog_ms = max(self.worst_backlog_ms, waits * 1000)
                parts.put_nowait((self._free_at[way] + line.round_trip_ms / 2000, data))
                if not data:
                    return
                await asyncio.sleep(waits - line.buffer_bytes / rate)

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            group.create_task(take())


# ------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Case:
    delay_ms: int  # of the model
    line: Line | None = None


SLOW = Line(up_mbit=5, down_mbit=20, round_trip_ms=20)
CASES = {
    "trivial": Case(0),
    "slow-model": Case(100),
    "slow-link": Case(0, SLOW),
    "slow-model-slow-link": Case(100, SLOW),
    "very-slow-link": Case(100, Line(up_mbit=0.5, down_mbit=1, round_trip_ms=100)),
}
# What must hold; of the very slow link only that nothing piles up: its bits alone take longer than 200 ms.
BARS = {
    "trivial": lambda row: row["fps"] >= 25,
    "slow-model": lambda row: row["latency_p95_ms"] < 200 and row["fps"] >= 9 and flat(row),
    "slow-link": lambda row: row["latency_p95_ms"] < 200 and row["fps"] >= 25 and flat(row),
    "slow-model-slow-link": lambda row: row["latency_p95_ms"] < 200 and row["fps"] >= 9 and flat(row),
    "very-slow-link": lambda row: flat(row),
}


def flat(row: dict) -> bool:
    """The last third is no later than the first, but for two frames of the camera: a backlog only ever grows."""
    first, _, last = row["latency_of_thirds_ms"]
    return last <= first + 2000 / CAMERA_FPS


@contextlib.contextmanager
def watched_page(port: int, film: Path):
    """A Chromium that shows the live view of that port, with the film as its camera; yields the page, not yet started."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = [*CHROMIUM_FLAGS, f"--use-file-for-fake-video-capture={film}"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector(".live")
        page.evaluate(WATCH, BITS)
        yield page
        browser.close()


def measure(case: Case, seconds: float, film: Path) -> dict:
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(serving())
        link = stack.enter_context(SlowLink(port, case.line)) if case.line else None
        page = stack.enter_context(watched_page(link.port if link else port, film))
        page.get_by_label("Prompt", exact=True).first.fill(f"after {case.delay_ms} ms")
        page.get_by_role("button", name="Start", exact=True).click()
        page.wait_for_function("window.seen.length > 3")
        page.wait_for_timeout(5000)  # the link's weight is found, caches are warm
        page.evaluate("window.seen.length = 0")
        if link:
            link.worst_backlog_ms = 0.0
        page.wait_for_timeout(seconds * 1000)
        row = judge(page.evaluate("window.seen"))
        truth = {name: page.locator(f".t-{name}").inner_text() for name in ("fps", "latency", "dropped", "link")}
        row["link_backlog_max_ms"] = round(link.worst_backlog_ms, 1) if link else None
        realtime = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
        return row | {"page_says": truth, "load": round(os.getloadavg()[0], 1), "realtime": realtime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", default=str(RESULTS), help="the JSON file, - for none; keeps the cases not run now")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    missed, rows = [], {}
    if options.out != "-" and Path(options.out).exists():
        rows = {row["case"]: row for row in json.loads(Path(options.out).read_text())["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "camera.mjpeg"
        write_film(film)
        for name in options.cases:
            case = CASES[name]
            row = measure(case, options.seconds, film)
            held = BARS[name](row)
            said = {"case": name, "held": held, "delay_ms": case.delay_ms, "line": case.line and asdict(case.line)}
            rows[name] = said | {"seconds": options.seconds, "commit": commit, **row}
            missed += [] if held else [name]
            print(f"{name:22} {row['fps']:5.1f} frames/s  {row['latency_p50_ms']:6.1f} / {row['latency_p95_ms']:6.1f} ms  "
                  f"thirds {row['latency_of_thirds_ms']}  levels {row['levels']}  {'' if held else 'MISSED'}")  # fmt: skip
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, headless Chromium, {SIDE}x{SIDE}",
        "camera_fps": CAMERA_FPS, "rows": [rows[name] for name in CASES if name in rows],
    }  # fmt: skip
    if options.out != "-":
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
