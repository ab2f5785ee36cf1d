"""One edit for the page: pictures read, the model waited for, the edit run and stopped, its result saved and described.

Uploaded files are opened by the `Decoder` and by nothing else: Gradio's own reading of a picture fails on odd files with a
message that no one can act on, drops alpha, depth and rotation in its own ways, and takes what time and memory a file asks for.

What a page has running is a `Job`, one for each of its tabs, found by the page's session and the tab's name: the button
that stops it is another event than the one that runs it, and a closed page stops all that it has running.
"""

import contextlib
import html
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from engine.fitting import Fitted
from pipeline.images import EditError, encode_png, open_image
from qwen_realtime import EditParams, EditResult, RealtimeEngine, Session
from serving.decode_worker import png_text
from serving.decoding import LIMITS, Decoder, Left, Sender
from serving.holder import EngineHolder, why_not
from webui.full_disk import DISK_FULL, disk_full
from webui.uploads import check_upload, read_upload, upload_folder


class Stopped(Exception):
    """The person stopped the job, or left."""


class Job:
    """Something a page runs, and how to stop it: within one step, from any thread."""

    def __init__(self, decoder: Decoder | None = None, page: str = ""):
        self._decoder, self._sender = decoder or Decoder(), Sender(page)
        self._lock = threading.Lock()
        self._session = None
        self.stopped = False

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            if self._session is not None:
                self._session.close()
        self._sender.leave()

    def open(self, data: bytes) -> np.ndarray:
        """A picture file as uint8 (H, W, 3). Raises EditError, and Stopped."""
        return self._decoded(self._decoder.open, data)

    def text(self, data: bytes) -> dict[str, str]:
        """The text chunks of a PNG. Raises EditError, and Stopped."""
        return self._decoded(self._decoder.text, data)

    def _decoded(self, decode: Callable, data: bytes):
        try:
            return decode(data, self._sender)
        except Left:
            raise Stopped from None

    @contextlib.contextmanager
    def session(self, engine: RealtimeEngine, *, single: bool = False) -> Iterator[Session]:
        """A session of the engine that `stop` closes; `single`: for one edit. Raises EditError when none is free, and Stopped."""
        with engine.open_single() if single else engine.open_session() as session:
            with self._lock:
                if self.stopped:
                    raise Stopped
                self._session = session
            try:
                yield session
            except EditError:
                if self.stopped:  # closing the session is what made it fail
                    raise Stopped from None
                raise
            finally:
                with self._lock:
                    self._session = None


class Jobs:
    """What all open pages run now: {(page, tab): job}."""

    def __init__(self, decoder: Decoder | None = None):
        self._decoder = decoder or Decoder()
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str | None, str], Job] = {}

    @contextlib.contextmanager
    def start(self, page: str | None, tab: str) -> Iterator[Job]:
        """A new job. One that the tab still runs is stopped: its result would not be looked at any more."""
        job = Job(self._decoder, page or "")
        with self._lock:
            before, self._jobs[page, tab] = self._jobs.get((page, tab)), job
        if before is not None:
            before.stop()
        try:
            yield job
        finally:
            with self._lock:
                if self._jobs.get((page, tab)) is job:
                    del self._jobs[page, tab]

    def stop(self, page: str | None, tab: str | None = None) -> None:
        """Stops what the tab runs, or all that the page runs."""
        with self._lock:
            jobs = [job for (of, name), job in self._jobs.items() if of == page and tab in (None, name)]
        for job in jobs:
            job.stop()


def read_picture(path: str | None, name: str = "a picture", decode: Callable = open_image) -> np.ndarray:
    """The file as uint8 (H, W, 3), opened by `decode`. Raises EditError, also when there is none."""
    return decode(read_upload(check_chosen(path, name), LIMITS.file_bytes))


def check_chosen(path: str | None, name: str) -> str:
    """The path. Raises EditError when no file was chosen, or one that is too large to be a picture."""
    if path is None:
        raise EditError(f"Choose {name} first: drop a file, paste one, or press the upload field.")
    size = check_upload(path).st_size
    if size > LIMITS.file_bytes:
        raise EditError(f"The file has {size:,} bytes. Allowed for a picture: {LIMITS.file_bytes:,}.")
    return path


def wait_for_engine(holder: EngineHolder, job: Job, progress: Callable) -> RealtimeEngine:
    """The engine, once it is loaded. Raises EditError when it cannot be, and Stopped."""
    status = holder.status()
    while status["state"] == "loading":
        if job.stopped:
            raise Stopped
        progress(status["fraction"], desc=f"The model is loading: {status['text']}")
        status = holder.wait(1.0)
    if status["state"] != "ready":
        raise EditError(why_not(status))
    return holder.loaded


def run_edit(
    engine: RealtimeEngine, images: Fitted, params: EditParams, job: Job, on_step: Callable[[int, int], None]
) -> EditResult:
    """One edit; `on_step(done, of)` is called on this thread, while the engine calls on its own. Raises EditError, Stopped."""
    steps: queue.SimpleQueue = queue.SimpleQueue()
    with job.session(engine, single=True) as session:
        number = session.submit(images, params, on_step=lambda step, of: steps.put((step, of)))
        while True:
            try:
                return session.result(number, timeout=0.1)
            except TimeoutError:
                while not steps.empty():
                    on_step(*steps.get())


def new_folder() -> Path:
    """A folder in Gradio's cache: what lies there is served to the page, and deleted with the rest. Raises EditError."""
    cache = upload_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=cache))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise EditError(disk_full(error)) from None


def telling_name(params: EditParams) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", params.prompt.lower()).strip("-")[:48].strip("-") or "edited"
    return f"{words}-{params.seed}"


@contextlib.contextmanager
def writing(path: Path):
    """Within it the file is written. When the disk is full, nothing is left of it and EditError is raised."""
    try:
        yield path
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno not in DISK_FULL:
            raise
        with contextlib.suppress(OSError):  # another file may be in it
            path.parent.rmdir()
        raise EditError(disk_full(error)) from None


def save_png(result: EditResult, model: str) -> str:
    """A PNG with a telling name and its settings inside, as `settings_inside` reads them back. Raises EditError."""
    params, (height, width) = result.params, result.picture.shape[:2]
    size = {"width": params.width or width, "height": params.height or height}  # a side may have followed from the picture
    made = asdict(params) | size | {"model": model}
    text = {name: str(value) for name, value in made.items()}
    with writing(new_folder() / f"{telling_name(result.params)}.png") as path:
        path.write_bytes(encode_png(result.picture, text))
    return str(path)


def settings_inside(data: bytes, read_text: Callable[[bytes], dict[str, str]] = png_text) -> EditParams | None:
    """The settings that this editor wrote into a picture's file, None where there are none. Never raises on a file's
    account: a picture is a picture, whatever else it carries.
    """
    if b"prompt\0" not in data:  # the name of the text chunk; most pictures need not be read for it
        return None
    try:
        text = read_text(data)
    except EditError:  # said when the picture itself is read
        return None
    if not {"prompt", "seed", "steps"} <= text.keys():
        return None
    known = {field.name: field.default for field in fields(EditParams)}
    try:
        return EditParams(**{name: _read(text[name], default) for name, default in known.items() if name in text})
    except ValueError:  # EditError among them: another program's, or one of ours with other limits
        return None


def _read(text: str, default: Any) -> Any:
    """The value that `str` made this text of; `default` shows its type."""
    if isinstance(default, bool):
        return text.lower() == "true"
    if default is None:
        return None if text.lower() in ("none", "null") else int(text)
    return type(default)(text) if isinstance(default, (int, float)) else text


def describe(result: EditResult) -> str:
    """Markdown: the time of each stage, size, steps, seed, and what the engine has to say of this edit."""
    stages = result.stages_ms
    parts = " · ".join(f"{name.replace('_', ' ')} {ms:.0f}" for name, ms in stages.items() if name != "total")
    height, width = result.picture.shape[:2]
    steps = f"{result.params.steps} step{'s' if result.params.steps > 1 else ''}"
    said = f"{stages.get('total', 0):.0f} ms: {parts}<br>{width}×{height} · {steps} · seed {result.params.seed}"
    return "<br>".join([said, *(html.escape(note) for note in result.notes)])
