"""What can be asked for over HTTP, told to programs (GET /openapi.json) and to people (GET /docs).

FastAPI makes the document from the routes and their models; what they do not say stands here: the refusals, and the
body of POST /edit, which its handler reads itself. The page is made from the document: plain HTML with nothing loaded
from anywhere, readable on a machine without a network.
"""

import base64
import functools
import html
import io
import json
from collections.abc import Sequence
from typing import Any

from fastapi.openapi.models import APIKey, HTTPBase
from fastapi.openapi.models import SecurityBase as SecurityModel
from fastapi.openapi.utils import get_openapi
from fastapi.params import Security
from fastapi.requests import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security.base import SecurityBase
from PIL import Image
from starlette.routing import BaseRoute

from serving.access import FAILURES
from serving.edit import MAX_BODY_BYTES
from serving.models import EDIT_BODIES, FORMATS, RefusalBody, allowed
from serving.proxy import public_address
from serving.version import VERSION

ANSWERS = {
    400: "Bad input. The text says what came and what is allowed.",
    401: "No login or key, or a wrong one.",
    403: "A page of another site, or a name of this server that it does not know.",
    405: "The path has no such method.",
    406: "The Accept header wants none of the types there are.",
    408: "The body came too slowly.",
    413: f"The body is larger than {MAX_BODY_BYTES:,} bytes.",
    415: "The body is not application/json, or is compressed.",
    429: "Too many wrong logins came from this address. Retry-After says when to try again.",
    500: f"The request was good and the model failed. Kind: {', '.join(FAILURES)}. Nothing else of the server is harmed.",
    503: "All places are taken, or the model is loading, or it could not be loaded. Retry-After says when to try again.",
}
COMMON = (401, 403, 405, 429)


@functools.cache
def example_picture() -> str:
    """A picture small enough to be read in an example, in base64."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These answers and those that every route has, for a route's `responses`."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*COMMON, *statuses}):
        answers[status] = {"model": RefusalBody, "description": ANSWERS[status]}
        if status in (429, 503):
            header = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            answers[status]["headers"] = {"Retry-After": header}
    return answers


def edit_request() -> dict:
    """What the document says of POST /edit's body: one of three models, and examples."""
    body = {"image": example_picture(), "prompt": "make it black and white", "width": 64, "height": 64}
    two = body | {"ref_image": example_picture()}
    three = two | {"ref_image_2": example_picture()}
    content = {
        # Written out here: in a component of its own openapi-typescript makes a field with a default a required one.
        "schema": {"oneOf": [model.model_json_schema() for model in EDIT_BODIES]},
        "examples": {
            "one": {"summary": "One picture", "value": body},
            "references": {"summary": "Two pictures, both for the model", "value": two},
            "three": {"summary": "Three pictures, all for the model", "value": three},
            "blend": {"summary": "Two pictures mixed, then edited", "value": two | {"blend_ratio": 0.3}},
        },
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def edit_answer() -> dict:
    """What the document says of POST /edit's good answer in addition to its model."""
    headers = {
        "Server-Timing": ("Milliseconds of each stage: denoise;dur=12.3, ...", "string"),
        "X-Age-Ms": ("Milliseconds from the queue to done.", "number"),
        "X-Seed": ("The seed.", "integer"),
        "X-Notes": ("What to know of this edit, if anything: that the picture was cut, for example.", "string"),
    }
    return {
        "description": "The picture: in JSON, or its bytes if the Accept header prefers image/png or image/jpeg.",
        "headers": {name: {"description": about, "schema": {"type": kind}} for name, (about, kind) in headers.items()},
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
    }


class Scheme(SecurityBase):
    """A way to bring the key or the login, for the document only: `Guard` reads it."""

    def __init__(self, name: str, model: SecurityModel):
        self.scheme_name, self.model = name, model

    async def __call__(self) -> None: ...


LOCKS = [
    Security(Scheme("bearer", HTTPBase(scheme="bearer"))),
    Security(Scheme("key", APIKey.model_validate({"in": "header", "name": "X-API-Key"}))),
    Security(Scheme("login", HTTPBase(scheme="basic"))),
]


def openapi(routes: Sequence[BaseRoute]) -> dict:
    """The OpenAPI document of these routes."""
    return get_openapi(
        title="Realtime image editor",
        version=VERSION,
        description="Edits pictures by instruction with Qwen-Image-Edit. Live views use the socket /live.",
        servers=[{"url": "."}],  # where this document is, whatever a proxy puts in front of it
        routes=routes,
    )


# ------------------------------------------------------------------------------------------------------- for people

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
code, pre { font: 14px/1.45 ui-monospace, Menlo, Consolas, monospace; }
h2 code { font-size: 1em; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: .4rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
@media (max-width: 40rem) {
  thead { display: none; }
  td { display: block; border: 0; padding: 0; }
  tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
}
"""
CURL = """printf '{{"prompt": "make it a pencil sketch", "image": "%s"}}' \\
  "$(base64 < photo.jpg | tr -d '\\n')" |
curl {address}/edit -d @- -o edited.png{key} \\
  -H 'Content-Type: application/json' -H 'Accept: image/png'"""
PYTHON = """import base64, httpx

with open("photo.jpg", "rb") as photo:
    image = base64.b64encode(photo.read()).decode()
body = {{"image": image, "prompt": "make it a pencil sketch"}}
answer = httpx.post("{address}/edit", json=body, timeout=600{key})
answer.raise_for_status()
with open("edited.png", "wb") as edited:
    edited.write(base64.b64decode(answer.json()["image"]))"""
SOCKET = """browser to server
  binary  uint32 frame number, JPEG or PNG bytes            (little endian)
  text    {"type": "params", "prompt": "...", any other setting of /edit}
  text    {"type": "link", "quality": 30..95}               of the JPEGs that come back
  text    {"type": "stop"}
server to browser
  text    {"type": "ack", "number"}         on receipt: send at most three
                                            frames that are not acknowledged
  text    {"type": "params" | "status" | "error", ...}
  text    {"type": "stats", "memory"}       each second while there are pictures
  binary  uint32 frame number, uint32 n, n bytes of JSON, JPEG bytes"""


def docs_page(document: dict, address: str) -> str:
    """The document as a page; `address` is where the examples send their requests."""
    edit, locked = document["paths"]["/edit"]["post"], "securitySchemes" in document["components"]
    bodies = edit["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    fields: dict[str, list[str]] = {}
    for body in bodies:
        for name, field in body["properties"].items():
            if field.get("type") != "null" and (said := _allowed(field)) not in fields.setdefault(name, []):
                fields[name].append(said)
    about, required = bodies[-1]["properties"], bodies[0]["required"]
    rows = [
        (name, "; ".join([*ways, *(["required"] if name in required else [])]), about[name].get("description", ""))
        for name, ways in sorted(fields.items(), key=lambda item: item[0] not in required)
    ]
    answers = [(status, answer["description"]) for status, answer in edit["responses"].items()]
    others = [(path, item["get"]["description"]) for path, item in document["paths"].items() if "get" in item]
    curl = CURL.format(address=address, key=' \\\n  -H "X-API-Key: $KEY"' if locked else "")
    python = PYTHON.format(address=address, key=', headers={"X-API-Key": key}' if locked else "")
    lock = "<p>A login or a key is needed: <code>Authorization: Bearer KEY</code>, <code>X-API-Key: KEY</code>, or " \
           "HTTP Basic.</p>" if locked else ""  # fmt: skip
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Realtime image editor: HTTP</title><style>{STYLE}</style></head><body><main>
<h1>Realtime image editor: HTTP</h1>
<p>{_text(document["info"]["description"])} This page for programs: <a href="openapi.json">openapi.json</a>.</p>{lock}
<h2><code>POST /edit</code></h2>
<p>{_text(edit["summary"])} {_text(edit["description"])}</p>
<pre><code>{_text(curl)}</code></pre>
<pre><code>{_text(python)}</code></pre>
<h3>Request</h3>{_table(("field", "allowed", "meaning"), rows)}
<h3>Answers</h3>{_table(("status", "meaning"), answers)}
<p>Every answer but 200 is <code>{{"error": what came and what is allowed, "kind": one word for programs, "detail": as error}}</code>.</p>
<h2>Others</h2>{_table(("GET", "meaning"), others)}
<h2>The live socket <code>/live</code></h2>
<pre><code>{_text(SOCKET)}</code></pre>
<p>The newest frame wins: frames that come faster than they are edited are dropped and counted.</p>
</main></body></html>"""


def _text(text: object) -> str:
    return html.escape(str(text))


def _allowed(field: dict) -> str:
    default = field.get("default")
    return allowed(field) if default in (None, "") else f"{allowed(field)}; {json.dumps(default)} if not said"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows whose first cell is a name."""
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><td><code>{_text(name)}</code></td>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


class DocumentDesk:
    """The handlers of /openapi.json and /docs, over the routes that they describe."""

    def __init__(self, routes: Sequence[BaseRoute]):
        self._document = functools.cache(lambda: openapi(routes))  # when first asked for: it takes a while

    async def openapi(self) -> Response:
        return JSONResponse(self._document())

    async def docs(self, request: Request) -> Response:
        page = docs_page(self._document(), public_address(request))
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})
