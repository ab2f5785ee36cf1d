"""What can be asked for over HTTP, told to programs (GET /openapi.json) and to people (GET /docs).

The document is made from `EditParams`, `LIMITS` and `CHOICES`, so a changed limit cannot be forgotten here. The page
is made from the document: plain HTML with nothing loaded from anywhere, readable on a machine without a network.
"""

import base64
import dataclasses
import functools
import html
import io
import json

from PIL import Image
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from qwen_realtime import CHOICES, LIMITS, MAX_PROMPT_CHARS, EditParams
from serving.access import FAILURES, KINDS
from serving.decoding import LIMITS as PICTURE_LIMITS
from serving.edit import FORMATS, MAX_BODY_BYTES
from serving.proxy import public_address

PICTURE = {
    "type": "string",
    "format": "byte",
    "contentEncoding": "base64",
    "description": "A picture file (JPEG, PNG, WebP, GIF, BMP, TIFF, ...) in base64; data:...;base64, in front is fine. "
    + PICTURE_LIMITS.sentence(),
}
ANSWERS = {
    400: "Bad input. The text says what came and what is allowed.",
    401: "No login or key, or a wrong one.",
    403: "A page of another site, or a name of this server that it does not know.",
    405: "The path has no such method.",
    406: "The Accept header wants none of the types there are.",
    408: "The body came too slowly.",
    413: f"The body is larger than {MAX_BODY_BYTES:,} bytes.",
    415: "The body is not application/json, or is compressed.",
    500: f"The request was good and the model failed. Kind: {', '.join(FAILURES)}. Nothing else of the server is harmed.",
    503: "All places are taken, or the model is loading, or it could not be loaded. Retry-After says when to try again.",
}
COMMON = (401, 403, 405)
MODES = {"one": ["edit"], "two": ["blend", "references"], "three": ["references"]}


@functools.cache
def example_picture() -> str:
    """A picture small enough to be read in an example, in base64."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def setting_schema(field: dataclasses.Field) -> dict:
    """The JSON schema of one field of EditParams."""
    name = field.name
    if name in CHOICES:
        schema = {"type": "string", "enum": list(CHOICES[name])}
    elif name in LIMITS:
        low, high = LIMITS[name]
        kind = "number" if isinstance(field.default, float) else "integer"
        schema = {"type": [kind, "null"] if field.default is None else kind, "minimum": low, "maximum": high}
    elif isinstance(field.default, bool):
        schema = {"type": "boolean"}
    else:
        schema = {"type": "string", "maxLength": MAX_PROMPT_CHARS}
        if field.default is dataclasses.MISSING:
            schema |= {"minLength": 1, "pattern": r"\S"}
    if field.default is not dataclasses.MISSING:
        schema["default"] = field.default
    return {"description": field.metadata["means"], **schema}


def edit_schema(pictures: str) -> dict:
    """The body of POST /edit with "one" picture, "two" or "three"."""
    settings = {field.name: setting_schema(field) for field in dataclasses.fields(EditParams)}
    settings["mode"] = settings["mode"] | {"enum": MODES[pictures]}
    properties = {"image": PICTURE, **settings}
    properties["format"] = {"type": "string", "enum": list(FORMATS), "default": "png",
                            "description": "Of the picture in a JSON answer; for bytes the Accept header says it."}  # fmt: skip
    properties["use_cfg"] = {"type": "boolean", "description": "Short for cfg_scale: true is 4, as in the stock pipeline; "
                             "false is 1, off. Not together with cfg_scale."}  # fmt: skip
    required = ["image", "prompt"]
    if pictures != "one":
        settings["mode"].pop("default")  # it depends on the pictures and blend_ratio
        properties["mode"] = settings["mode"]
    for name, ordinal, has in (
        ("ref_image", "second", pictures != "one"),
        ("ref_image_2", "third", pictures == "three"),
    ):
        absent = {"type": "null", "description": f"No {ordinal} picture."}
        properties[name] = PICTURE | {"description": f"The {ordinal} picture, in base64."} if has else absent
        required += [name] if has else []
    body = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return body | {"not": {"required": ["use_cfg", "cfg_scale"]}}


def _answers(*statuses: int) -> dict:
    answers = {}
    for status in statuses:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
        answers[str(status)] = {"description": ANSWERS[status], "content": content}
        if status == 503:
            header = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            answers["503"]["headers"] = {"Retry-After": header}
    return answers


def _get(summary: str, media_type: str, schema: dict, operation: str) -> dict:
    ok = {"description": summary, "content": {media_type: {"schema": schema}}}
    return {"get": {"summary": summary, "operationId": operation, "responses": {"200": ok, **_answers(*COMMON)}}}


def _edit_operation() -> dict:
    body = {"image": example_picture(), "prompt": "make it black and white", "width": 64, "height": 64}
    two = body | {"ref_image": example_picture()}
    three = two | {"ref_image_2": example_picture()}
    bytes_headers = {
        "Server-Timing": ("Milliseconds of each stage: denoise;dur=12.3, ...", "string"),
        "X-Age-Ms": ("Milliseconds from the queue to done.", "number"),
        "X-Seed": ("The seed.", "integer"),
        "X-Notes": ("What to know of this edit, if anything: that the picture was cut, for example.", "string"),
    }
    ok = {
        "description": "The picture: in JSON, or its bytes if the Accept header prefers image/png or image/jpeg.",
        "headers": {n: {"description": d, "schema": {"type": t}} for n, (d, t) in bytes_headers.items()},
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
        },
    }
    content = {
        "schema": {"anyOf": [{"$ref": f"#/components/schemas/Edit{n}"} for n in ("One", "Two", "Three")]},
        "examples": {
            "one": {"summary": "One picture", "value": body},
            "references": {"summary": "Two pictures, both for the model", "value": two},
            "three": {"summary": "Three pictures, all for the model", "value": three},
            "blend": {"summary": "Two pictures mixed, then edited", "value": two | {"blend_ratio": 0.3}},
        },
    }
    return {
        "summary": "Edit a picture, or up to three together, by instruction.",
        "description": (
            "Waits in a queue that is fair by address. Hang up and the edit stops within one step. "
            "Pictures come in the request: nothing is fetched from an address and no path is opened."
        ),
        "operationId": "edit",
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {"200": ok, **_answers(400, *COMMON, 406, 408, 413, 415, 500, 503)},
    }


def _schemas() -> dict:
    kinds = sorted({*KINDS.values(), *FAILURES, "loading", "failed_to_load", "page_only"})
    number, whole = {"type": "number"}, {"type": "integer"}
    answer = {
        "image": {"type": "string", "contentEncoding": "base64"},
        "format": {"enum": list(FORMATS)},
        "width": whole,
        "height": whole,
        "seed": whole,
        "stages_ms": {"type": "object", "additionalProperties": number},
        "age_ms": number | {"description": "From the engine's mailbox to done."},
        "notes": {"type": "array", "items": {"type": "string"}, "description": "What to know of this edit."},
        "elapsed": number | {"description": "Seconds, from the request's headers to the answer."},
    }
    ready = {
        "state": {"enum": ["loading", "warming", "ready", "failed"]},
        "text": {"type": "string"},
        "fraction": number,
    }
    health = {
        "state": {"enum": ["loading", "ready", "failed"]},
        "phase": ready["state"],
        "text": {"type": "string"},
        "fraction": number,
        "choice": {"type": "object", "description": "Which model, and why."},
        "queue": {"type": "object", "description": "POST /edit: running, waiting, places, held_bytes."},
        "live": {"type": "object", "description": "Live views: sockets, sessions, waiting."},
        "memory_bytes": {"type": "object", "description": "Of the process, and of the GPU."},
        "description": {"type": "object", "description": "What runs, when ready."},
        "stats": {"type": "object", "description": "How it fares, when ready."},
    }
    return {
        "EditOne": edit_schema("one"),
        "EditTwo": edit_schema("two"),
        "EditThree": edit_schema("three"),
        "Answer": {"type": "object", "properties": answer, "required": list(answer)},
        "Ready": {"type": "object", "properties": ready, "required": list(ready)},
        "Health": {"type": "object", "properties": health, "required": list(health)[:8]},
        "Refusal": {
            "type": "object",
            "properties": {
                "error": {"type": "string"},
                "kind": {"type": "string", "enum": kinds},
                "detail": {"type": "string", "description": "The same text as error."},
            },
            "required": ["error", "kind", "detail"],
        },
    }


def openapi(*, locked: bool = False) -> dict:
    """The OpenAPI 3.1 document; `locked` adds that a login or a key is needed."""
    ready = _get(
        "Whether an edit would be taken now.", "application/json", {"$ref": "#/components/schemas/Ready"}, "ready"
    )
    unready = {"description": "Not now: the text says why.", "content": ready["get"]["responses"]["200"]["content"]}
    ready["get"]["responses"]["503"] = unready
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Realtime image editor",
            "version": "1",
            "description": "Edits pictures by instruction with Qwen-Image-Edit. Live views use the socket /live.",
        },
        "servers": [{"url": "."}],  # beside this document, whatever a proxy puts in front of it
        "paths": {
            "/edit": {"post": _edit_operation()},
            "/health": _get(
                "Alive, and how it fares.", "application/json", {"$ref": "#/components/schemas/Health"}, "health"
            ),
            "/ready": ready,
            "/metrics": _get("For Prometheus.", "text/plain", {"type": "string"}, "metrics"),
        },
        "components": {"schemas": _schemas()},
    }
    if locked:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "login": {"type": "http", "scheme": "basic"},
        }
        document["security"] = [{"bearer": []}, {"key": []}, {"login": []}]
    return document


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


def docs_page(document: dict, address: str, *, locked: bool = False) -> str:
    """The document as a page; `address` is where the examples send their requests."""
    schemas = document["components"]["schemas"]
    edit = document["paths"]["/edit"]["post"]
    fields = schemas["EditThree"]["properties"] | {"mode": schemas["EditOne"]["properties"]["mode"]}
    fields["mode"] = fields["mode"] | {"enum": list(CHOICES["mode"])}
    rows = [(name, _allowed(name, field), field.get("description", "")) for name, field in fields.items()]
    answers = [(status, "", answer["description"]) for status, answer in edit["responses"].items()]
    others = [(path, "", item["get"]["summary"]) for path, item in document["paths"].items() if "get" in item]
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
<h3>Answers</h3>{_table(("status", "", "meaning"), answers)}
<p>Every answer but 200 is <code>{{"error": what came and what is allowed, "kind": one word for programs, "detail": as error}}</code>.</p>
<h2>Others</h2>{_table(("GET", "", "meaning"), others)}
<h2>The live socket <code>/live</code></h2>
<pre><code>{_text(SOCKET)}</code></pre>
<p>The newest frame wins: frames that come faster than they are edited are dropped and counted.</p>
</main></body></html>"""


def _text(text: object) -> str:
    return html.escape(str(text))


def _allowed(name: str, field: dict) -> str:
    if "enum" in field:
        said = ", ".join(field["enum"])
    elif "minimum" in field:
        said = f"{field['minimum']:g} to {field['maximum']:.10g}"
    elif "maxLength" not in field:
        said = "base64" if "contentEncoding" in field else "true, false"
    else:
        said = f"at most {field['maxLength']} characters"
    if name in ("image", "prompt"):
        return f"{said}; required"
    default = field.get("default")
    return said if default in (None, "") else f"{said}; {json.dumps(default)} if not said"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    used = [i for i, head in enumerate(heads) if head]
    top = "".join(f"<th>{_text(heads[i])}</th>" for i in used)
    body = "".join(
        "<tr>" + "".join(f"<td>{'<code>' * (i == 0)}{_text(row[i])}{'</code>' * (i == 0)}</td>" for i in used) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


class DocumentDesk:
    """The handlers of /openapi.json and /docs."""

    def __init__(self, *, locked: bool):
        self._locked = locked
        self._document = openapi(locked=locked)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def docs(self, request: Request) -> Response:
        page = docs_page(self._document, public_address(request), locked=self._locked)
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})
