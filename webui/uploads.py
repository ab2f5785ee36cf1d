"""Which files the page may open: regular files that were uploaded to it or made by it, and no others.

A page's events carry paths, which the caller of an event writes. Gradio checks the paths of some components and not of
others, and copies, converts or fetches some before a component sees them. So `check_files` looks at everything an event
brings before Gradio does, and `open_upload` opens a file so that what was checked is what is read.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.images import EditError

NO_FILE = (
    "This is not a file that was uploaded here. Upload it first, or send data:image/png;base64,... over MCP."
)
AN_ADDRESS = "A picture came as an address. Allowed: a file that is uploaded, or data:image/png;base64,... over MCP."


def own_folder() -> Path:
    """A new folder that only this user can enter, where Gradio and the page keep files until the program ends."""
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        Path(parent).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="image-editor-", dir=parent)).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def upload_folder() -> Path:
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()


def check_files(value) -> None:
    """Raises EditError when anything in `value`, what came for an event, names a file that may not be opened."""
    if isinstance(value, dict):
        path, url = value.get("path"), value.get("url")
        if path is not None:
            check_upload(path)
        elif isinstance(url, str) and not url.startswith("data:"):
            raise EditError(AN_ADDRESS)
        for item in value.values():
            check_files(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_files(item)


def check_upload(path) -> os.stat_result:
    """What the system says of the file. Raises EditError unless `path` is the true path of a regular file inside the upload
    folder, which has no other name: a hard link may be another name of a file outside.
    """
    if not isinstance(path, str) or "\0" in path or ".." in Path(path).parts:
        raise EditError(NO_FILE)
    if "://" in path:
        raise EditError(AN_ADDRESS)
    folder = upload_folder()
    try:
        true = Path(path).resolve(strict=True)
        # The same text after resolving: no link anywhere below the folder, no "..", nothing relative.
        inside = true.is_relative_to(folder) and true == folder / os.path.relpath(os.path.abspath(path), _as_given())
        status = os.lstat(true)
    except (OSError, ValueError, RuntimeError):
        raise EditError(NO_FILE) from None
    if not (inside and _regular(status)):
        raise EditError(NO_FILE)
    return status


def _regular(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _as_given() -> str:
    return os.path.abspath(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")


@contextlib.contextmanager
def open_upload(path: str) -> Iterator[BinaryIO]:
    """The file that `check_upload` has allowed, for reading, and none that was put in its place since. Raises EditError."""
    checked = check_upload(path)
    try:
        # Neither a link nor a pipe that was put there meanwhile is followed or waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        raise EditError(NO_FILE) from None
    with os.fdopen(descriptor, "rb") as file:
        opened = os.fstat(descriptor)
        if not (_regular(opened) and os.path.samestat(opened, checked)):  # a new pipe may have the number of a file that is gone
            raise EditError(NO_FILE)
        yield file


def read_upload(path: str, most: int) -> bytes:
    """The bytes of a picture's file, opened by `open_upload`. Raises EditError, also when there are more than `most`."""
    with open_upload(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise EditError(f"The file has {size:,} bytes. Allowed for a picture: {most:,}.")
        return file.read(most)  # no more, even if it grows meanwhile
