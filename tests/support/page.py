"""The program in its own process, a headless Chromium with a camera, and what the page shows as arrays. The fixtures
`program`, `ready`, `browser` and `open_page` of `conftest.py` are made of these.

Nothing here sleeps: every wait is on a condition with a time limit that only a failure reaches."""

import base64
import io
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from benchmarks.live_view import CHROMIUM, CHROMIUM_FLAGS
from pipeline.images import open_image
from pocket_model.phrasings import preset_prompts
from support import ROOT

PRESETS = dict(preset_prompts())  # label -> prompt
PATIENCE_S = 90  # no claim: only how long a broken page may hang before the test fails


# The program and the browser


class Program:
    def __init__(self, log: Path, *flags: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = log
        started = time.monotonic()
        command = [sys.executable, "webui_realtime.py", "--model", "pocket", "--port", str(self.port), *flags]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            self.await_answer()
        except BaseException:
            self.close()
            raise
        self.served_after_s = time.monotonic() - started

    def close(self):
        self.process.terminate()
        self.process.wait(PATIENCE_S)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def await_answer(self):
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(self.url, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass

    def health(self) -> dict:
        return httpx.get(self.url + "health", timeout=PATIENCE_S).json()

    def until(self, condition, what: str) -> dict:
        end = time.monotonic() + PATIENCE_S
        while not condition(health := self.health()):
            assert time.monotonic() < end, f"never came true: {what}. {health}"
        return health


def write_camera(file: Path, picture: np.ndarray) -> Path:
    """An MJPEG for `launch_browser` that shows one picture."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=95)
    file.write_bytes(data.getvalue() * 4)
    return file


def launch_browser(playwright, film: Path) -> Browser:
    """A headless Chromium whose camera shows this MJPEG."""
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    flags = [*CHROMIUM_FLAGS, f"--use-file-for-fake-video-capture={film}"]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=flags)


class Pages:
    """Opens pages, each in a fresh context, and collects the errors that they write to the console."""

    def __init__(self, browser: Browser):
        self._browser, self._contexts = browser, []
        self.errors: list[str] = []
        expect.set_options(timeout=PATIENCE_S * 1000)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for context in self._contexts:
            context.close()

    def open(self, url: str, script: str = "", **options) -> Page:
        context = self._browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self._contexts.append(context)
        context.set_default_timeout(PATIENCE_S * 1000)
        page = context.new_page()
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.add_init_script(script)
        page.goto(url)
        page.wait_for_selector(".live")
        return page


def live(page: Page, name: str) -> str:
    return page.locator(".live").get_attribute(f"data-{name}")


def frames(page: Page) -> int:
    return int(live(page, "frames"))


def await_frames(page: Page, more: int, prompt: str | None = None):
    """Until `more` further frames have been shown, and one with this prompt."""
    page.wait_for_function(
        "([least, prompt]) => { const data = document.querySelector('.live').dataset;"
        " return Number(data.frames) >= least && (prompt === null || data.prompt === prompt); }",
        arg=[frames(page) + more, prompt],
    )


def pixels(page: Page, selector: str) -> np.ndarray:
    """What the <video> or <canvas> shows, at its own size, uint8 (H, W, 3)."""
    url = page.evaluate(
        """(selector) => {
        const from = document.querySelector(selector), to = document.createElement("canvas");
        to.width = from.videoWidth || from.width;
        to.height = from.videoHeight || from.height;
        to.getContext("2d").drawImage(from, 0, 0);
        return to.toDataURL("image/png");
    }""",
        selector,
    )
    return open_image(base64.b64decode(url.partition(",")[2]))


def start_live(page: Page, preset: str = "Black and white"):
    page.locator(".live").get_by_role("button", name=preset, exact=True).click()
    page.get_by_role("button", name="Start", exact=True).click()
    await_frames(page, 1)


# What is wrong with the page as it stands, as lists of tags
UNNAMED = """() => [...document.querySelectorAll("button, input, select, textarea, [role=slider], [role=tab], video, canvas")]
    .filter((each) => each.checkVisibility() && each.type !== "file" && !each.closest("[aria-hidden=true]"))
    .filter((each) => !(each.getAttribute("aria-label") || each.getAttribute("aria-labelledby") || each.title ||
        each.innerText?.trim() || each.querySelector("img[alt]:not([alt=''])") || [...(each.labels || [])].some((label) => label.innerText.trim())))
    .map((each) => each.outerHTML.slice(0, 200))"""
CUT = """() => [...document.querySelectorAll("button, .message, .truth dd, h1, label")]
    .filter((each) => each.checkVisibility() && !each.closest(".chips"))
    .filter((each) => { const box = each.getBoundingClientRect(); return box.right > innerWidth + 1 || box.left < -1; })
    .map((each) => each.outerHTML.slice(0, 200))"""
