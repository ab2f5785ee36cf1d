"""What the tests of the page share: the program in its own process, a headless Chromium with a camera that shows one
photograph, what the page shows as arrays, and the answers that `pocket_model.edits` computes.

A test module that wants the fixtures says `pytest_plugins = ["page"]`. Nothing here sleeps: every wait is on a condition
with a time limit that only a failure reaches."""

import base64
import io
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.live_view import CHROMIUM, CHROMIUM_FLAGS
from pipeline.images import fit, open_image
from pocket_model.edits import EDITS, preset_prompts

ROOT = Path(__file__).resolve().parent.parent
PRESETS = dict(preset_prompts())  # label -> prompt
PATIENCE_S = 90  # no claim: only how long a broken page may hang before the test fails


# Pictures and their answers


def held_out(name: str, width: int = 256, height: int = 256) -> np.ndarray:
    """A photograph of scikit-image that the pocket model has not seen in training."""
    return fit(open_image((Path(skimage.__file__).parent / "data" / name).read_bytes()), width, height)


def answer(name: str, *pictures: np.ndarray) -> np.ndarray:
    edit = next(edit for edit in EDITS if edit.name == name)
    tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 for picture in pictures]
    return (edit.answer(*tensors)[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


def assert_edited(output: np.ndarray, name: str, *pictures: np.ndarray, at_least_db: float = 18.0):
    """The output is the computed answer and not the input. The model's own bar is 22 dB in the mean over photographs;
    one photograph may lie below, and the camera's and the socket's JPEG cost a little more."""
    right = answer(name, *pictures)
    assert output.shape == right.shape
    to_answer, to_inputs = psnr(output, right), [psnr(output, picture) for picture in pictures]
    assert to_answer >= at_least_db, f"{name}: {to_answer:.1f} dB to the answer, {to_inputs} to the input"
    assert to_answer > max(to_inputs), f"{name}: {to_answer:.1f} dB to the answer, {to_inputs} to the input"


def saturation(picture: np.ndarray) -> float:
    return float((picture.max(2).astype(int) - picture.min(2)).mean())


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
        self.await_answer()
        self.served_after_s = time.monotonic() - started

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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = Program(tmp_path_factory.mktemp("program") / "log.txt")
    yield program
    program.process.terminate()
    program.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def ready(program):
    program.until(lambda health: health["state"] == "ready", "the model is loaded")
    return program


@pytest.fixture(scope="module")
def camera() -> np.ndarray:
    return held_out("coffee.png")


@pytest.fixture(scope="module")
def film(camera, tmp_path_factory) -> Path:
    """What the fake camera shows, as an MJPEG. A test module may have a film of its own under this name."""
    picture = io.BytesIO()
    Image.fromarray(camera).save(picture, "JPEG", quality=95)
    file = tmp_path_factory.mktemp("camera") / "camera.mjpeg"
    file.write_bytes(picture.getvalue() * 4)
    return file


@pytest.fixture(scope="module")
def browser(film):
    assert CHROMIUM, "the page's tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        flags = [*CHROMIUM_FLAGS, f"--use-file-for-fake-video-capture={film}"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, init script, **context options) -> a page; no page may write an error to the console."""
    contexts, errors = [], []

    def open_page(url: str, script: str = "", **options) -> Page:
        options = {"viewport": {"width": 1280, "height": 900}} | options
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_S * 1000)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(script)
        page.goto(url)
        page.wait_for_selector(".live")
        return page

    expect.set_options(timeout=PATIENCE_S * 1000)
    yield open_page
    for context in contexts:
        context.close()
    assert not errors, errors


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
