"""Which files the page may open: regular files that were uploaded to it or made by it, and no others.

A page's events carry paths, and whoever calls an event writes them. Gradio checks the paths of some components and not of
others, and copies, converts or fetches some before a component sees them. So `check_files` looks at everything an event
brings before Gradio does, and `read_upload` opens a file so that what was checked is what is read.
"""

import os
import stat
import tempfile
from pathlib import Path

from pipeline.images import EditError

NO_FILE = (
    "The picture is not a file that was uploaded here. Upload it first, or send data:image/png;base64,... over MCP."
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


def check_upload(path) -> None:
    """Raises EditError unless this is the true path of a regular file inside the upload folder."""
    if not isinstance(path, str) or "\0" in path:
        raise EditError(NO_FILE)
    if "://" in path:
        raise EditError(AN_ADDRESS)
    folder = upload_folder()
    try:
        true = Path(path).resolve(strict=True)
        # The same text after resolving: no link anywhere below the folder, no "..", nothing relative.
        inside = true.is_relative_to(folder) and true == folder / os.path.relpath(os.path.abspath(path), _as_given())
        regular = stat.S_ISREG(os.lstat(true).st_mode)
    except (OSError, ValueError, RuntimeError):
        raise EditError(NO_FILE) from None
    if not (inside and regular):
        raise EditError(NO_FILE)


def _as_given() -> str:
    return os.path.abspath(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")


def read_upload(path: str, most: int) -> bytes:
    """The bytes of a file that `check_upload` allows. Raises EditError, also when there are more than `most`."""
    check_upload(path)
    try:
        # Neither a link nor a pipe that was put there meanwhile is followed or waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        raise EditError(NO_FILE) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise EditError(NO_FILE)
        if status.st_size > most:
            raise EditError(f"The file has {status.st_size:,} bytes. Allowed for a picture: {most:,}.")
        return file.read(most)  # no more, even if it grows meanwhile
