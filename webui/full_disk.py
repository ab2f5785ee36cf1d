"""Uploads that fail, on a full disk or by what was sent: a sentence for the sender, and nothing left behind.

Gradio deletes the temporary files of an upload when its form is malformed or too large. When writing them fails, when the
sender leaves in the middle, or when a part is no file or has a name that no file can have, they stay, and a disk that is
full stays full. Its parser is therefore replaced by one that looks at the parts and deletes them whatever went wrong.
"""

import contextlib
import errno
import reprlib
from pathlib import Path

from gradio import route_utils
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: Exception) -> str:
    """What to say of an error whose `errno` is one of DISK_FULL."""
    if getattr(error, "errno", None) == errno.EFBIG:
        return "The file is larger than the server may write. Send a smaller picture or a shorter video."
    return "The server's disk is full, so nothing could be saved. Try again later, or tell who runs the server."


class _Parser(route_utils.GradioMultiPartParser):
    async def parse(self):
        try:
            form = await super().parse()
            for name, part in form.multi_items():
                _check_part(name, part)
            return form
        except BaseException as error:
            for file in self._files_to_close_on_error:
                with contextlib.suppress(OSError):  # closing writes what is still in memory, which fails again
                    file.close()
                Path(file.name).unlink(missing_ok=True)
            if isinstance(error, (ValueError, LookupError, TypeError, AssertionError)):  # of the form's bytes
                raise MultiPartException(f"The upload is not a form that can be read ({error}).") from None
            raise


def _check_part(name: str, part) -> None:
    """Raises MultiPartException, which Gradio answers as 400, unless it is a file to be stored."""
    if name != "files" or not isinstance(part, route_utils.GradioUploadFile):
        raise MultiPartException(f"The form has {reprlib.repr(name)} in it. Allowed: files, under the name 'files'.")
    if Path(part.filename or "").name in ("", ".."):
        raise MultiPartException(f"A file is named {reprlib.repr(part.filename)}. Send it under a name of its own.")


def handle_full_disk() -> dict:
    """Replaces Gradio's parser; returns the exception handlers that its application takes."""
    route_utils.GradioMultiPartParser = _Parser

    async def answer(request: Request, error: OSError):
        if error.errno not in DISK_FULL:
            raise error
        return JSONResponse({"error": disk_full(error), "detail": disk_full(error), "kind": "disk_full"}, 507)

    return {OSError: answer}
