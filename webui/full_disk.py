"""Uploads when the disk is full: a sentence for the sender, and nothing left behind.

Gradio deletes the temporary files of an upload when its form is malformed or too large. When writing them fails, or the
sender leaves in the middle, they stay, and a disk that is full stays full. Its parser is therefore replaced by one that
deletes them whatever went wrong.
"""

import contextlib
import errno
from pathlib import Path

from gradio import route_utils
from starlette.requests import Request
from starlette.responses import JSONResponse

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: OSError) -> str:
    if error.errno == errno.EFBIG:
        return "The file is larger than the server may write. Send a smaller picture or a shorter video."
    return "The server's disk is full, so nothing could be saved. Try again later, or tell who runs the server."


class _Parser(route_utils.GradioMultiPartParser):
    async def parse(self):
        try:
            return await super().parse()
        except BaseException:
            for file in self._files_to_close_on_error:
                with contextlib.suppress(OSError):  # closing writes what is still in memory, which fails again
                    file.close()
                Path(file.name).unlink(missing_ok=True)
            raise


def handle_full_disk() -> dict:
    """Replaces Gradio's parser; returns the exception handlers that its application takes."""
    route_utils.GradioMultiPartParser = _Parser

    async def answer(request: Request, error: OSError):
        if error.errno not in DISK_FULL:
            raise error
        return JSONResponse({"error": disk_full(error), "detail": disk_full(error), "kind": "disk_full"}, 507)

    return {OSError: answer}
