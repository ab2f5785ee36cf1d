"""The HTTP side: GET /health, POST /edit and the live socket, given to the page's launch or to any Starlette app.

The routes never touch the model: they speak to a `RealtimeEngine` through sessions. The engine may still be loading
when the first browser arrives (the page is served at once, the model follows), so the routes hold an `EngineHolder`,
which knows whether it is loading, ready or failed, and says so to everybody who asks.

The live socket, one connection per view:

    browser -> server   binary  uint32 frame number, JPEG or PNG bytes       (little endian, as everything here)
                        text    {"type": "params", any EditParams fields}    {"type": "stop"}
    server -> browser   text    {"type": "ack", "number"}                    on receipt, not on completion
                        text    {"type": "params" | "status" | "error", ...}
                        binary  uint32 frame number, uint32 n, n bytes of JSON, JPEG bytes

Three tasks work side by side: one receives and acknowledges, one decodes the newest picture and hands it to the
session, one encodes results and sends them. With the engine's own thread, frame k is encoded while k+1 is edited and
k+2 is decoded. Every hand-over holds one frame, so a slow model or link loses frames but never builds a backlog.
JPEG work runs in a small thread pool: neither the event loop nor the engine's thread waits for it.

A page of another site can open sockets to this one and post to it, and browsers tell where it came from: a request
whose Origin is not this host is refused. `launch(auth=...)` of Gradio guards only Gradio's own routes, so `Guard`
checks the same login here.
"""

import asyncio
import base64
import binascii
import json
import logging
import math
import secrets
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass
from urllib.parse import urlsplit

import numpy as np
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from images import EditError, encode_jpeg, encode_png, fit, open_image
from qwen_realtime import LIMITS, SIZE_MULTIPLE, EditParams

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 4 * 2**20  # one live frame; a 1024x1024 JPEG has about 0.3 MB
MAX_FRAME_PIXELS = 2048 * 2048
MAX_TEXT_BYTES = 64 * 2**10
MAX_BODY_BYTES = 64 * 2**20  # two photographs in base64
HEADER = struct.Struct("<I")
RESULT_HEADER = struct.Struct("<II")


class EngineHolder:
    """The engine, or how far its loading has come. Written by the loader's thread, read by everybody."""

    def __init__(self, engine=None, choice: dict | None = None):
        self._changed = threading.Condition()
        self._engine = engine
        self._state = "loading" if engine is None else "ready"
        self._text, self._fraction = ("Starting", 0.0) if engine is None else ("Ready", 1.0)
        self.choice = choice or {}  # which model and why: {"model", "lora", "reason", "how_to_get_other"}

    @property
    def engine(self):
        """The engine, or None while it is loading or when loading failed."""
        return self._engine

    def progress(self, text: str, fraction: float) -> None:
        with self._changed:
            self._text, self._fraction = text, min(max(float(fraction), 0.0), 1.0)
            self._changed.notify_all()

    def ready(self, engine) -> None:
        with self._changed:
            self._engine, self._state, self._text, self._fraction = engine, "ready", "Ready", 1.0
            self._changed.notify_all()

    def fail(self, text: str) -> None:
        with self._changed:
            self._engine, self._state, self._text = None, "failed", text
            self._changed.notify_all()

    def status(self) -> dict:
        """{"state": "loading" | "ready" | "failed", "text", "fraction", "choice"} and, when ready, what runs."""
        with self._changed:
            status = {"state": self._state, "text": self._text, "fraction": self._fraction, "choice": self.choice}
            engine = self._engine
        if engine is not None:
            status["description"] = plain(engine.description)
            status["default_size"] = engine.default_size
        return status

    def wait(self, timeout: float) -> dict:
        """The status, after the next change or `timeout` seconds, at once when there is nothing to wait for."""
        with self._changed:
            if self._state == "loading":
                self._changed.wait(timeout)
        return self.status()


class Guard:
    """Who may use the routes: everybody, or who logged in on the page (its cookie) or sends HTTP Basic credentials."""

    def __init__(self, auth: tuple[str, str] | None = None):
        self._auth = None if auth is None else tuple(part.encode() for part in auth)

    def allows(self, connection: HTTPConnection) -> bool:
        return self._auth is None or self._has_cookie(connection) or self._has_password(connection)

    @staticmethod
    def _has_cookie(connection: HTTPConnection) -> bool:
        # Gradio's App keeps its logins as {token: user}; served alone, the app has no such thing.
        app = connection.scope.get("app")
        tokens, cookie_id = getattr(app, "tokens", None), getattr(app, "cookie_id", None)
        names = (f"access-token-{cookie_id}", f"access-token-unsecure-{cookie_id}")
        return bool(tokens) and any(connection.cookies.get(name) in tokens for name in names)

    def _has_password(self, connection: HTTPConnection) -> bool:
        scheme, _, value = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(value, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        # Both are compared, in constant time, so that neither can be guessed letter by letter.
        return secrets.compare_digest(user, self._auth[0]) & secrets.compare_digest(password, self._auth[1])


class Refusal(Exception):
    """An answer other than 200: its HTTP status, what the caller reads, and when to try again."""

    def __init__(self, status: int, text: str, retry_after_s: int | None = None):
        super().__init__(text)
        self.status, self.retry_after_s = status, retry_after_s

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="image editor"'
        return JSONResponse({"error": str(self)}, self.status, headers)


def create_routes(holder: EngineHolder, auth: tuple[str, str] | None = None) -> list:
    """The Starlette routes /health, /edit and /live over the holder's engine; `auth` = (user, password) guards all."""
    guard = Guard(auth)
    pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="picture")
    opening = asyncio.Semaphore(2)  # large uploads opened at one time: each may take hundreds of MB

    async def health(request: Request) -> Response:
        if not guard.allows(request):
            return Refusal(401, "Log in first.").response()
        status = holder.status()
        if holder.engine is not None:
            status["stats"] = plain(holder.engine.stats())
        return JSONResponse(status)

    async def edit(request: Request) -> Response:
        try:
            if not same_origin(request):
                raise Refusal(403, f"Requests from {request.headers.get('origin')} are not allowed here.")
            if not guard.allows(request):
                raise Refusal(401, "Log in first.")
            engine = _ready_engine(holder)
            body = await _read_body(request)
            async with opening:
                loop = asyncio.get_running_loop()
                job = await loop.run_in_executor(pool, parse_edit, body, engine.default_size)
            del body
            return await _answer_edit(request, engine, job, pool)
        except EditError as error:
            return Refusal(400, str(error)).response()
        except Refusal as refusal:
            return refusal.response()

    async def live(websocket: WebSocket) -> None:
        if not same_origin(websocket) or not guard.allows(websocket):
            await websocket.close(1008)  # before accepting: the browser sees a plain 403
            return
        await LiveConnection(websocket, holder, pool).run()

    return [
        Route("/health", health, methods=["GET"]),
        Route("/edit", edit, methods=["POST"]),
        WebSocketRoute("/live", live),
    ]


def same_origin(connection: HTTPConnection) -> bool:
    """Whether the Origin header, which every browser sends with a socket and a post, names this host.

    No Origin means no browser, so no foreign page either. Behind a proxy the public name is in X-Forwarded-Host, a
    header that a foreign page cannot set.
    """
    origin = connection.headers.get("origin")
    if origin is None:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    hosts = (connection.headers.get("host"), connection.headers.get("x-forwarded-host"))
    ours = {host.strip().lower().removesuffix(default_port) for host in hosts if host}
    return bool(parts.netloc) and parts.netloc.lower().removesuffix(default_port) in ours


def output_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) of a result with the picture's own shape and the area of a square of `side` pixels.

    Both are multiples of 16, as the model needs; of the nearest pairs, the one whose shape differs least, so that
    cropping to it takes no more than a few pixels.
    """
    aspect = width / height
    ideal = (side * aspect**0.5, side / aspect**0.5)
    low, high = (int(limit) for limit in LIMITS["width"])
    options = [
        {min(max(int(round_(x / SIZE_MULTIPLE)) * SIZE_MULTIPLE, low), high) for round_ in (math.floor, math.ceil)}
        for x in ideal
    ]
    pairs = [(w, h) for w in sorted(options[0]) for h in sorted(options[1])]
    return min(pairs, key=lambda p: (round(abs(math.log(p[0] / p[1] / aspect)), 6), abs(p[0] * p[1] - side * side)))


def plain(value):
    """The value as JSON can carry it: dataclasses as dicts, numpy numbers as numbers, what is neither as text."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN, and browsers refuse it
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# ---------------------------------------------------------------------------------------------------- POST /edit


def _ready_engine(holder: EngineHolder):
    status = holder.status()
    if status["state"] == "loading":
        text = f"The model is loading ({status['fraction']:.0%}: {status['text']}). Try again shortly."
        raise Refusal(503, text, retry_after_s=5)
    if status["state"] == "failed":
        raise Refusal(503, f"The model could not be loaded: {status['text']}")
    return holder.engine


async def _read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f'The content type is "{kind}". Allowed: "application/json".')
    body = bytearray()
    async for chunk in request.stream():  # the length header may be absent or wrong: count what really comes
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refusal(413, f"The request is too large. At most {MAX_BODY_BYTES:,} bytes are allowed.")
    return bytes(body)


def read_json(text: bytes | str) -> dict:
    """A JSON object; EditError on anything else, NaN and infinite numbers among it."""

    def refuse(name: str):
        raise EditError(f"{name} is not a number that JSON knows.")

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is text that nobody can write
    except EditError:
        raise
    except (ValueError, RecursionError) as error:
        raise EditError(f"This is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise EditError(f"A JSON object was expected, not {type(value).__name__}.")
    return value


def read_base64(value, name: str) -> bytes:
    """The bytes of a base64 text, with or without the data:...;base64, in front that a browser puts there."""
    if not isinstance(value, str):
        raise EditError(f'"{name}" must be a picture in base64, not {type(value).__name__}.')
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditError(f'"{name}" is not base64: {error}.') from None


def parse_edit(body: bytes, side: int):
    """(images, params, format) of a POST /edit body. Without a size the result keeps the first picture's shape.

    With a second picture, and no mode said, a blend ratio means "blend" and none means "references".
    """
    fields = read_json(body)
    data_format = fields.pop("format", "png")
    if data_format not in ("png", "jpeg"):
        raise EditError(f'The format is {data_format!r}. Allowed: "png", "jpeg".')
    if "image" not in fields:
        raise EditError('"image" is missing: a picture in base64.')
    pictures = [read_base64(fields.pop("image"), "image")]
    if fields.get("ref_image") is not None:
        pictures.append(read_base64(fields["ref_image"], "ref_image"))
        fields.setdefault("mode", "blend" if "blend_ratio" in fields else "references")
    fields.pop("ref_image", None)
    if len(pictures) == 1 and fields.get("mode", "edit") != "edit":
        raise EditError(f'The mode "{fields["mode"]}" needs a second picture in "ref_image".')
    if "prompt" not in fields:
        raise EditError('"prompt" is missing: what to change.')
    EditParams.from_dict(fields)  # what is wrong with the settings is said before the pictures cost anything
    images = [open_image(picture) for picture in pictures]
    if fields.get("width") is None and fields.get("height") is None:
        fields["width"], fields["height"] = output_size(images[0].shape[1], images[0].shape[0], side)
    params = EditParams.from_dict(fields)
    return fitted(images, params), params, data_format


def fitted(images: list[np.ndarray], params: EditParams) -> list[np.ndarray]:
    """The pictures at the output's size where the engine would make them so: a photograph of 60 megapixels then
    neither waits in memory for its turn nor costs the inference thread the resizing.
    """
    if params.reference_area != "output" or params.width is None or params.height is None:
        return images
    return [fit(image, params.width, params.height, params.fit) for image in images]


async def _answer_edit(request: Request, engine, job, pool) -> Response:
    images, params, data_format = job
    try:
        session = engine.open_session()
    except EditError as error:
        raise Refusal(503, str(error), retry_after_s=2) from None
    try:
        result = await _result_or_gone(request, session, session.submit(images, params))
    finally:
        session.close()
    if result is None:
        return Response(status_code=499)  # the caller left; nobody reads this
    if result.error is not None:
        raise result.error
    encode = encode_png if data_format == "png" else encode_jpeg
    data = await asyncio.get_running_loop().run_in_executor(pool, encode, result.image)
    answer = {
        "image": base64.b64encode(data).decode(),
        "format": data_format,
        "width": result.image.shape[1],
        "height": result.image.shape[0],
        "seed": params.seed,
        "stages_ms": plain(result.stages_ms),
        "age_ms": round(result.age_ms, 1),
    }
    return JSONResponse(answer)


async def _result_or_gone(request: Request, session, number: int):
    """The session's result of frame `number`, or None as soon as the caller has hung up."""

    async def result():
        async for candidate in session:
            if candidate.number == number:
                return candidate
        raise EditError("The session was closed before the picture was done.")

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(result()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


# ------------------------------------------------------------------------------------------------------- WS /live


class _Gone(Exception):
    """The other side of the socket has left."""


class LiveConnection:
    """One browser's live view: its socket, its settings, its session of the engine."""

    STATUS_EVERY_S = 0.3  # while loading
    RETRY_BUSY_S = 1.0

    def __init__(self, websocket: WebSocket, holder: EngineHolder, pool: ThreadPoolExecutor):
        self._websocket, self._holder, self._pool = websocket, holder, pool
        self._sending = asyncio.Lock()
        self._fresh = asyncio.Event()
        self._inbox: tuple[int, bytes] | None = None  # the newest undecoded frame: number, file bytes
        self._fields: dict = {}  # settings as the browser sent them
        self._params = None  # the same, checked; None until there is a prompt
        self._session = None
        self._results: asyncio.Task | None = None
        self._numbers: dict[int, tuple[int, float]] = {}  # engine's frame number -> browser's, time of arrival
        self._overwritten = 0  # frames that a newer one replaced before they were decoded

    async def run(self) -> None:
        await self._websocket.accept()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._announce())
                tasks.create_task(self._feed())
                await self._receive()
        except* _Gone:
            pass
        finally:
            self._close_session()

    # -- incoming

    async def _receive(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise _Gone
            data = message.get("bytes")
            if data is not None:
                await self._on_frame(data)
            else:
                await self._on_text(message.get("text") or "")

    async def _on_frame(self, data: bytes) -> None:
        if not HEADER.size < len(data) <= MAX_FRAME_BYTES:
            text = f"A frame had {len(data):,} bytes. Allowed: {HEADER.size + 1} to {MAX_FRAME_BYTES:,}."
            await self._say("error", message=text)
            return
        number = HEADER.unpack_from(data)[0]
        self._overwritten += self._inbox is not None
        self._inbox = (number, data[HEADER.size :])
        self._fresh.set()
        await self._say("ack", number=number)

    async def _on_text(self, text: str) -> None:
        try:
            if len(text) > MAX_TEXT_BYTES:
                raise EditError(f"A message had {len(text):,} characters. At most {MAX_TEXT_BYTES:,} are allowed.")
            message = read_json(text)
            kind = message.pop("type", None)
            if kind == "params":
                await self._on_params(message)
            elif kind == "stop":
                self._inbox = None
                self._close_session()
            else:
                raise EditError(f'The message type is {kind!r}. Allowed: "params", "stop".')
        except EditError as error:
            await self._say("error", message=str(error))

    async def _on_params(self, changes: dict) -> None:
        """Settings may come one at a time; those not named stay. A refused change leaves all as they were."""
        fields = self._fields | changes
        if fields.get("mode", "edit") != "edit":
            raise EditError(
                f'The live view has one picture, so the mode {fields["mode"]!r} is not possible: "edit" is.'
            )
        params = EditParams.from_dict(fields)
        self._fields, self._params = fields, params
        if self._inbox is not None:
            self._fresh.set()  # a frame that came before the prompt need not wait for the next
        await self._say("params", **fields)

    # -- to the engine

    async def _feed(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._fresh.wait()
            session = await self._open_session() if self._params is not None else None
            self._fresh.clear()
            if self._inbox is None or session is None:
                continue
            arrived = time.monotonic()
            (number, data), self._inbox = self._inbox, None
            try:
                image = await loop.run_in_executor(self._pool, open_image, data, MAX_FRAME_PIXELS)
                if session is not self._session:
                    continue  # stopped meanwhile
                submitted = session.submit([image], self._params)
            except EditError as error:
                await self._say("error", number=number, message=str(error))
                continue
            self._numbers[submitted] = (number, arrived)

    async def _open_session(self):
        """This connection's session; waits, and says so, while the model is loading or all places are taken.

        None when the browser has stopped meanwhile.
        """
        if self._session is not None and self._session.closed:
            self._close_session()  # the engine freed it while it was idle
        while self._session is None:
            if self._inbox is None:
                return None
            engine = self._holder.engine
            if engine is None:
                await asyncio.sleep(self.STATUS_EVERY_S)  # _announce tells the browser why
                continue
            try:
                self._session = engine.open_session()
            except EditError as error:
                await self._say("status", state="busy", text=str(error))
                await asyncio.sleep(self.RETRY_BUSY_S)
                continue
            self._numbers.clear()
            self._results = self._tasks.create_task(self._send_results(self._session))
            await self._say("status", **self._holder.status())
        return self._session

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if self._results is not None:
            self._results.cancel()
            self._results = None
        if session is not None:
            session.close()

    # -- outgoing

    async def _announce(self) -> None:
        """Tells how the loading goes until it has ended, one way or the other."""
        said = None
        while True:
            status = self._holder.status()
            if status != said:
                await self._say("status", **status)
                said = status
            if status["state"] == "ready":
                return
            await asyncio.sleep(self.STATUS_EVERY_S)

    async def _send_results(self, session) -> None:
        loop = asyncio.get_running_loop()
        async for result in session:
            number, arrived = self._numbers.pop(result.number, (None, None))
            for older in [n for n in self._numbers if n < result.number]:
                del self._numbers[older]  # dropped by the engine for a newer one
            if number is None:
                continue
            if result.error is not None:
                await self._say("error", number=number, message=str(result.error))
                continue
            data = await loop.run_in_executor(self._pool, encode_jpeg, result.image)
            meta = json.dumps(self._meta(result, arrived)).encode()
            await self._send(bytes=RESULT_HEADER.pack(number, len(meta)) + meta + data)

    def _meta(self, result, arrived: float) -> dict:
        params = result.params
        return {
            "stages_ms": {name: round(ms, 2) for name, ms in result.stages_ms.items()},
            "age_ms": round(result.age_ms, 1),
            "server_ms": round((time.monotonic() - arrived) * 1000, 1),  # decoded, waited, edited and encoded
            "fps": round(result.fps, 2),
            "dropped": result.dropped + self._overwritten,
            "width": result.image.shape[1],
            "height": result.image.shape[0],
            "prompt": params.prompt,
            "steps": params.steps,
            "seed": params.seed,
        }

    async def _say(self, kind: str, **fields) -> None:
        await self._send(text=json.dumps({"type": kind, **fields}))

    async def _send(self, **message) -> None:
        try:
            async with self._sending:
                await self._websocket.send({"type": "websocket.send", **message})
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise _Gone from None
