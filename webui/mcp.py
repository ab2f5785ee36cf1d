"""What Gradio's MCP server needs from us, so that each client gives pictures its own way and gets one back.

Gradio tells a language model to upload a file first and to give the tool the address that the upload returns, an
address of this very server. `own_file` reads the path out of it: nothing is fetched, and the path is checked as that of
any uploaded file.
"""

from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
from anyio.to_thread import run_sync

FILE_ROUTE = "/gradio_api/file="


def mcp_missing() -> str | None:
    """Why MCP cannot be served here; None when it can."""
    try:
        import mcp  # noqa: F401
    except ImportError:
        return 'MCP needs a package that is not here: pip install "gradio[mcp]"'
    return None


def own_file(address: str) -> str | None:
    """The path in an address of Gradio's route for files, http://.../gradio_api/file=PATH; None for another address.

    Whether a file of that path was uploaded is for the caller to check, and the only check that is needed: the host may
    be any name that this server has on the way to its caller.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    _, found, path = parts.path.partition(FILE_ROUTE)
    return unquote(path) if found and path and parts.scheme in ("http", "https") and "://" not in unquote(path) else None


def with_own_files(value):
    """What came for one input, with files of this server's addresses as the uploaded files that they stand for."""
    if isinstance(value, dict):
        path = own_file(value["path"]) if isinstance(value.get("path"), str) else None
        if path is not None:  # with `meta`, by which Gradio checks that the file lies in its upload folder
            return value | {"path": path, "url": None, "meta": {"_type": "gradio.FileData"}}
        return {name: with_own_files(item) for name, item in value.items()}
    return [with_own_files(item) for item in value] if isinstance(value, (list, tuple)) else value


def answer_in_full(demo: gr.Blocks) -> None:
    """Makes the MCP server of a launched page answer alike with and without a progress token.

    Gradio takes what an endpoint returns as one value when the client sent no token: the picture and what is told about
    it then come as the text of a Python tuple. (`GradioMCPServer._execute_tool_without_progress` in Gradio 6.31.)
    """

    async def outputs(job) -> list:
        result = await run_sync(job.result)
        return list(result) if isinstance(result, tuple) else [result]

    server: Any = demo.mcp_server_obj
    server._execute_tool_without_progress = outputs
