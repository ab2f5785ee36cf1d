"""The door of the page: what every request meets before Gradio reads it.

Our own routes ask their `Guard` and bound their bodies themselves (`serving.access`, `serving.edit`); Gradio's ask less.
`Door` is an ASGI middleware around the page's application that asks for them, by path:

- A path that the page does not need is not there: Gradio has routes for its editors, its monitor and its proxy.
- The guard's three questions: a name of this server, an origin, the login. What a person who has not logged in needs
  to see the form is open; nothing else is.
- A body is read here, within bytes and seconds, and its cost is known before it is parsed; an upload is counted on its way.
- One address has a bounded number of events in Gradio's queue, of direct calls and of uploads. An event that no one
  listens to ends.
- A wrong login is counted, and more of them from the same address wait (`serving.guesses`).

It knows paths and Gradio's queue, and nothing of how a route is written.
"""

import asyncio
import collections
import logging
import os
import re
import reprlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketClose

from pipeline.images import EditError
from serving.access import Guard, Refusal, crosses_sites
from serving.connections import address_of
from serving.json_bounds import Bounds, check_json, read_json

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2 * 2**20  # of an event of the page: numbers, words and the paths of uploads
MAX_MCP_BYTES = 64 * 2**20  # pictures in base64
BODY_TIMEOUT_S = 20.0
UPLOAD_TIMEOUT_S = 600.0
MAX_UPLOAD_PARTS = 32
MAX_FOLDER_BYTES = 16 * 2**30  # all that was uploaded and made, until it is deleted by age
MAX_EVENTS = 12  # of one address, waiting and running
MAX_CALLS = 8  # of one address at a time: uploads, and events that are called without the queue
MAX_STREAMS = 256  # answers of one address that stay open: heartbeats and queue listeners
UNHEARD_S = 30.0  # from joining the queue, or from the last listener's leaving

API = "/gradio_api"
# What a person who is not logged in may ask for: the form and what draws it.
OPEN = re.compile(
    r"/|/login/?|/logout|/login_check/?|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d+)?|/theme\.css"
    r"|/(static|assets|svelte)/.*|/gradio_api/(startup-events|login_check/?|theme\.css|app_id/?)"
)
CALLS = r"(run|api)/[^/]+/?|component_server"
QUEUE = r"queue/join|call/(v2/)?[^/]+/?"
LISTEN = re.compile(rf"{API}/(queue/data|call/(?:v2/)?[^/]+/([0-9a-f]+))")
GETS = re.compile(
    rf"{OPEN.pattern}|/config/?"
    rf"|{API}/(user/?|token/?|info/?|openapi\.json|upload_progress|file=.*|file/.*|heartbeat/[^/]+|queue/data|call/.+|mcp.*)"
)
POSTS = re.compile(rf"/login/?|{API}/(upload|cancel|reset/?|{QUEUE}|{CALLS}|mcp.*)")


class Door:
    """`app` behind the questions. `own` are the paths of our routes, which ask for themselves. `blocks` gives the page;
    `folder` holds its files; `abandon(session)` stops what a page that no one listens to has running.
    """

    def __init__(
        self,
        app,
        *,
        guard: Guard,
        own: frozenset[str],
        blocks: Callable,
        folder: Path,
        max_file_bytes: int,
        abandon: Callable[[str], None],
    ):
        self._app, self._guard, self._own, self._blocks = app, guard, own, blocks
        self._folder, self._max_file_bytes, self._abandon = folder, max_file_bytes, abandon
        self._calls: collections.Counter[str] = collections.Counter()
        self._streams: collections.Counter[str] = collections.Counter()
        self._listeners: collections.Counter[str | None] = collections.Counter()
        self._left: dict[str, float] = {}  # sessions with events and without a listener: since when, monotonic
        self._reaper: asyncio.Task | None = None

    async def __call__(self, scope, receive, send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path in self._own:
            await self._app(scope, receive, send)
            return
        started = False

        async def note(message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            if scope["type"] == "websocket":
                raise Refusal(404, f"There is no socket {path} here.")
            await self._let_in(HTTPConnection(scope), scope, receive, note)
        except (Refusal, EditError) as error:
            if scope["type"] == "websocket":
                await WebSocketClose(1008)(scope, receive, send)
            elif not started:
                refusal = error if isinstance(error, Refusal) else Refusal(400, str(error))
                response = refusal.response()
                if refusal.status == 401:
                    # As Gradio words it, for its clients; and no word of Basic, or a browser would ask beside the form.
                    body = {"detail": "Not authenticated", "error": str(refusal), "kind": refusal.kind}
                    response = JSONResponse(body, 401)
                await response(scope, receive, send)
        except ClientDisconnect:
            log.info("%s: the sender left", path)  # no answer, and no traceback: anyone can leave any number of times
        except Exception:
            if started:
                raise
            log.exception("%s %s failed", scope.get("method"), path)
            text = "The server failed on this request; its log says why."
            await Refusal(500, text, kind="failed").response()(scope, receive, send)

    # -- the questions

    async def _let_in(self, connection: HTTPConnection, scope, receive, send) -> None:
        path, method = scope["path"], scope["method"]
        reads = method in ("GET", "HEAD")
        self._guard.check_host(connection)
        known = (GETS if reads else POSTS).fullmatch(path)
        if not known and method == "DELETE" and path.startswith(f"{API}/mcp"):
            known = True
        if not known:
            raise Refusal(404, "There is nothing here.")
        if not reads or path == "/logout":
            self._guard.check_origin(connection)
            if "origin" not in connection.headers and crosses_sites(connection):
                raise Refusal(403, "A page of another site asked for this. Open this page itself.")
        login = path.rstrip("/") == "/login"
        if self._guard.locked and not login and not OPEN.fullmatch(path):
            self._guard.check_login(connection)
        address = address_of(scope["client"])
        if login:
            await self._log_in(address, scope, receive, send)
        elif reads:
            await self._stream(address, scope, receive, send)
        elif path == f"{API}/upload":
            with self._one_of(self._calls, address, MAX_CALLS, "uploads and calls"):
                await self._upload(connection, scope, receive, send)
        else:
            await self._post(address, scope, receive, send)

    async def _log_in(self, address: str, scope, receive, send) -> None:
        receive = await self._read(receive, 64 * 2**10)
        wrong = self._guard.try_login(address)  # counted as wrong until it turns out right: many may come at once

        async def watch(message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] < 400:
                    wrong.take_back()
                if scope["scheme"] == "https":
                    message = message | {"headers": [_secured(*header) for header in message["headers"]]}
            await send(message)

        await self._app(scope, receive, watch)

    # -- bodies

    async def _read(self, receive, most: int, *, json: bool = False, check: Callable[[dict], None] | None = None):
        """The whole body, bounded; returns a `receive` that gives it. `check` is given the object that its JSON is."""
        chunks, size, bounds = [], 0, Bounds()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "The sender left.")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise Refusal(413, f"The request is too large. At most {most:,} bytes are allowed.")
                    if json:
                        bounds.add(chunks[-1])
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            text = f"Of the request {size:,} bytes came in {BODY_TIMEOUT_S:g} s. Send it faster."
            raise Refusal(408, text) from None
        body = b"".join(chunks)
        if json:
            await asyncio.to_thread(check_json, body) if size > 2**20 else check_json(body)
            if check is not None:  # at most MAX_BODY_BYTES
                check(read_json(body))
        given = False

        async def again():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    async def _upload(self, connection: HTTPConnection, scope, receive, send) -> None:
        """Counts bytes and parts as they pass; what is too much ends it."""
        most = self._max_file_bytes + 2**20
        if connection.headers.get("content-length", "0").isdigit():
            declared = int(connection.headers.get("content-length", "0")[:20])
            if declared > most:
                raise Refusal(413, f"The upload has {declared:,} bytes. At most {most:,} are allowed.")
        stored = await asyncio.to_thread(folder_bytes, self._folder)
        if stored > MAX_FOLDER_BYTES:
            raise Refusal(
                503, f"{stored:,} bytes of uploads and results are stored. Try again later.", retry_after_s=60
            )
        size = parts = 0
        late = asyncio.get_running_loop().time() + UPLOAD_TIMEOUT_S

        async def count():
            nonlocal size, parts
            try:
                async with asyncio.timeout_at(late):
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, f"The upload took more than {UPLOAD_TIMEOUT_S:g} s.") from None
            data = message.get("body", b"")
            size, parts = size + len(data), parts + data.lower().count(b"content-disposition:")
            if size > most:
                raise Refusal(413, f"The upload is too large. At most {most:,} bytes are allowed.")
            if parts > MAX_UPLOAD_PARTS:
                raise Refusal(413, f"The upload has more than {MAX_UPLOAD_PARTS} files. Send them in several.")
            return message

        await self._app(scope, count, send)

    # -- events

    async def _post(self, address: str, scope, receive, send) -> None:
        path = scope["path"]
        mcp = path.startswith(f"{API}/mcp")
        if re.fullmatch(f"{API}/({CALLS})", path) or mcp:
            with self._one_of(self._calls, address, MAX_CALLS, "uploads and calls"):
                most, check = (MAX_MCP_BYTES, None) if mcp else (MAX_BODY_BYTES, partial(self._check_event, path))
                receive = await self._read(receive, most, json=True, check=check)
                await self._app(scope, receive, send)
            return
        receive = await self._read(receive, MAX_BODY_BYTES, json=True, check=partial(self._check_event, path))
        if re.fullmatch(f"{API}/({QUEUE})", path):
            own = sum(address_of(e.request.client) == address for e in self._events().values() if e.request is not None)
            if own >= MAX_EVENTS:
                text = (
                    f"{own} edits from your address are waiting or running. At most {MAX_EVENTS} may. Try again later."
                )
                raise Refusal(503, text, retry_after_s=5)
            if self._reaper is None or self._reaper.done():
                self._reaper = asyncio.create_task(self._reap())
        await self._app(scope, receive, send)

    def _check_event(self, path: str, body: dict) -> None:
        """Raises a Refusal unless it names an event of the page and brings it a list: on others Gradio fails."""
        if not re.fullmatch(f"{API}/({QUEUE}|run/[^/]+/?|api/[^/]+/?)", path):
            return
        events, index, name = self._blocks().fns, body.get("fn_index"), path.rstrip("/").rpartition("/")[2]
        if index is None and not path.rstrip("/").endswith("queue/join"):
            known = any(event.api_name == name for event in events.values())
        else:
            known = type(index) is int and index in events
        if not known:
            raise Refusal(404, f"The page has no event {reprlib.repr(name if index is None else index)}.")
        if "/call/v2/" not in path and not isinstance(body.get("data"), list):
            raise EditError(f'An event takes {{"data": [...]}}. Its data here is {reprlib.repr(body.get("data"))}.')

    async def _stream(self, address: str, scope, receive, send) -> None:
        match = LISTEN.fullmatch(scope["path"])
        if not match and "/heartbeat/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        session = None
        if match:
            event = self._events().get(match[2]) if match[2] else None
            asked = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=16).get("session_hash", [""])[0]
            session = event.session_hash if event is not None else match[2] or asked
        with self._one_of(self._streams, address, MAX_STREAMS, "open answers"):
            self._listeners[session] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._listeners[session] -= 1
                if not self._listeners[session]:
                    del self._listeners[session]

    def _events(self) -> dict:
        queue = getattr(self._blocks(), "_queue", None)
        return {} if queue is None else queue.event_ids_to_events

    async def _reap(self) -> None:
        """Ends events that no one listens to; returns when there are no events."""
        while events := list(self._events().values()):
            now = time.monotonic()
            silent = {event.session_hash for event in events} - self._listeners.keys()
            self._left = {session: self._left.get(session, now) for session in silent}
            for session, since in self._left.items():
                if now - since > UNHEARD_S:
                    log.info("a page or a caller waits for no answer any more: what it has in the queue ends")
                    queue = self._blocks()._queue
                    await queue.clean_events(session_hash=session)
                    queue.pending_messages_per_session.pop(session, None)
                    self._abandon(session)
            await asyncio.sleep(min(1.0, UNHEARD_S / 4))

    def _one_of(self, counter: collections.Counter, address: str, most: int, what: str) -> "_Place":
        if counter[address] >= most:
            raise Refusal(503, f"{most} {what} of your address are open. Try again later.", retry_after_s=5)
        return _Place(counter, address)


class _Place:
    """One of the few that an address may have."""

    def __init__(self, counter: collections.Counter, address: str):
        self._counter, self._address = counter, address

    def __enter__(self) -> None:
        self._counter[self._address] += 1

    def __exit__(self, *exc) -> None:
        self._counter[self._address] -= 1
        if not self._counter[self._address]:
            del self._counter[self._address]


def _secured(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header; a cookie is for TLS alone. Gradio gives the login in two cookies, one of them for pages without TLS."""
    bare = name.lower() == b"set-cookie" and b"; secure" not in value.lower()
    return name, value + b"; Secure" if bare else value


def folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # deleted meanwhile
                continue
    return total
