"""The HTTP side: routes for the page's launch, or served alone to many clients at once.

    python server.py                              port 8086 of this machine; GET /docs tells how to use it
    python server.py --host 0.0.0.0 --api-key KEY

| route | |
|---|---|
| GET /health, /ready, /metrics | alive and how it fares; whether an edit would be taken now; for Prometheus |
| POST /edit | one picture or two, edited |
| WS /live | a stream of frames, the newest wins |
| GET /openapi.json, /docs | all this for programs, and for people |

The routes never touch the model: they speak to a `RealtimeEngine` through sessions, so any number of clients share one
engine, fairly. It may still be loading when the first one comes, so the routes hold an `EngineHolder`. What each route
does is in `serving/`; this module joins them and is the program that serves them without the page.
"""

import argparse
import asyncio
import contextlib
import logging
import os

# As the page's program does, and for the same reasons (see `webui_realtime`). Read when torch and Pillow are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.requests import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from serving.access import KINDS, Guard, Refusal, plain, refusal_body
from serving.connections import bound
from serving.document import LOCKS, DocumentDesk, edit_answer, edit_request, refusals
from serving.edit import MAX_BODY_BYTES, EditDesk, parse_edit
from serving.endpoint import Endpoint
from serving.farewell import SERVER_S, TOLD_S, Farewell, close_engine, end
from serving.holder import EngineHolder
from serving.json_bounds import read_json
from serving.live import MAX_FRAME_BYTES, LiveConnection, LiveRoom
from serving.models import EditAnswer, Ready
from serving.proxy import BehindProxy
from serving.startup import add_flags, check_flags, create_guard, load_engine, warn_if_open
from serving.status import StatusDesk
from serving.version import VERSION

__all__ = [
    "MAX_BODY_BYTES", "EngineHolder", "Guard", "create_app", "create_routes", "main",
    "parse_args", "parse_edit", "plain", "read_json",
]  # fmt: skip

log = logging.getLogger("server")

DEFAULT_PORT = 8086
WAITING_EDITS = 32


def create_routes(
    holder: EngineHolder,
    auth: tuple[str, str] | None = None,
    *,
    guard: Guard | None = None,
    waiting_edits: int = WAITING_EDITS,
) -> list:
    """The FastAPI routes over the holder's engine. `guard` decides who may come in; `auth` = (user, password) is
    short for a guard with that login. `waiting_edits` may wait in POST /edit, not counting those that run.
    """
    guard = guard or Guard(auth)
    registry = CollectorRegistry()
    pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="picture")
    desk = EditDesk(holder, pool, waiting=waiting_edits)
    room = LiveRoom(holder, pool)
    status = StatusDesk(holder, desk.queue, room, registry)

    async def live(websocket: WebSocket) -> None:
        try:
            guard.check(websocket)
        except Refusal:
            await websocket.close(1008)  # before accepting: the browser sees a plain 403
            return
        await LiveConnection(websocket, room).run()

    router = APIRouter(
        route_class=Endpoint.of(guard, registry), responses=refusals(), dependencies=LOCKS if guard.locked else []
    )
    document = DocumentDesk(router.routes)

    def add(path: str, handler, *methods: str, **about) -> None:
        router.add_api_route(path, handler, methods=list(methods), **about)

    add("/edit", desk.edit, "POST", operation_id="edit", summary="Edit a picture, or up to three, by instruction.",
        response_model=EditAnswer, openapi_extra=edit_request(),
        responses={200: edit_answer()} | refusals(400, 406, 408, 413, 415, 500, 503))  # fmt: skip
    add("/health", status.health, "GET", operation_id="health", summary="Alive, and how it fares.",
        response_model_exclude_unset=True)  # fmt: skip
    add("/ready", status.ready, "GET", operation_id="ready", summary="Whether an edit would be taken now.",
        responses={503: {"model": Ready, "description": "Not now: the text says why."}})  # fmt: skip
    add("/metrics", status.metrics, "GET", operation_id="metrics", summary="For Prometheus.", response_class=Response,
        response_model=None, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    add("/openapi.json", document.openapi, "GET", include_in_schema=False)
    add("/docs", document.docs, "GET", include_in_schema=False)
    router.add_api_websocket_route("/live", live)
    return router.routes


def create_app(holder: EngineHolder, guard: Guard | None = None, *, waiting_edits: int = WAITING_EDITS) -> FastAPI:
    """The routes as an application of their own; "/" leads to /docs."""

    async def home() -> Response:
        return RedirectResponse("docs")

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # the only kind it is asked for
        text = f"There is no {request.url.path} here. See /docs."
        text = text if error.status_code == 404 else error.detail
        return JSONResponse(refusal_body(text, KINDS.get(error.status_code, "")), error.status_code, error.headers)

    guard = guard or Guard()
    routes = create_routes(holder, guard=guard, waiting_edits=waiting_edits)
    routes.append(Endpoint.of(guard, CollectorRegistry())("/", home, methods=["GET"], include_in_schema=False))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, routes=routes)  # /docs and /openapi.json are ours
    app.add_exception_handler(HTTPException, refuse)
    return app


# --------------------------------------------------------------------------------------------------------- the program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def places(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10_000):
            raise argparse.ArgumentTypeError(f"{text!r} is no length of a queue: expected 1 to 10000")
        return int(text)

    parser = argparse.ArgumentParser(description="Edit pictures by instruction over HTTP, for many clients at once.")
    add_flags(parser, host="127.0.0.1", port=DEFAULT_PORT)
    queue_help = f"edits that may wait; over it the answer is 503 (default {WAITING_EDITS})"
    parser.add_argument("--queue", type=places, default=WAITING_EDITS, metavar="N", help=queue_help)
    options = parser.parse_args(argv)
    check_flags(parser, options)
    return options


class _Server(uvicorn.Server):
    """Loads the model once the port is ours, and not if it is not; ends as `serving.farewell` says."""

    def __init__(self, config: uvicorn.Config, holder: EngineHolder, load: threading.Thread, farewell: Farewell):
        super().__init__(config)
        self._holder, self._load, self._farewell = holder, load, farewell

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the farewell's

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            log.info("listening at %s://%s:%d, see /docs", scheme, host, self.config.port)
            self._load.start()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._farewell.asked.is_set()

    async def shutdown(self, sockets=None) -> None:
        self._holder.leave()
        await asyncio.sleep(TOLD_S)
        await asyncio.to_thread(close_engine, self._holder)
        await super().shutdown(sockets)
        self._holder.decoder.close()


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.info("version %s", VERSION)
    for chatty in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    guard, holder = create_guard(options, local_pages=True), EngineHolder()
    warn_if_open(options.host, locked=guard.locked)
    config = uvicorn.Config(
        BehindProxy(
            create_app(holder, guard, waiting_edits=options.queue),
            trusted=options.forwarded_allow_ips,
            root_path=options.root_path,
        ),
        host=options.host,
        port=options.port,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,  # `BehindProxy` does it, and must see the address that the connection comes from
        ws_max_size=2 * MAX_FRAME_BYTES,  # up to here we say what is too large; beyond, the socket is closed
        ws_per_message_deflate=False,  # pictures do not shrink, and what a peer sends must not grow
        ws_ping_interval=10.0,  # a machine that vanished without a word is noticed within 20 s
        ws_ping_timeout=10.0,
        timeout_graceful_shutdown=SERVER_S,
    )
    bound(config)
    load = threading.Thread(target=load_engine, args=(holder, options), name="loader", daemon=True)
    with Farewell() as farewell:
        _Server(config, holder, load, farewell).run()
        end()


if __name__ == "__main__":
    main()
