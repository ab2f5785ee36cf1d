"""One path of ours as a FastAPI route: the guard before it, every error as JSON, CORS headers, a timed answer.

FastAPI calls the handler and writes its model; this adds what is the same for all of them. Whatever a handler raises, the
caller reads a `RefusalBody`. Only the kinds of `access.FAILURES` are 500: the request was good, the model failed.
"""

import logging
import time

from fastapi.requests import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Histogram
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from pipeline.images import EditError
from serving.access import Guard, Refusal, failure_kind

log = logging.getLogger(__name__)


class Endpoint(APIRoute):
    """A route that answers every method of its path: the page's own router would answer GET /edit with the page."""

    guard: Guard
    seconds: Histogram  # from the request's headers to the answer's, by path and status

    @classmethod
    def of(cls, guard: Guard, registry: CollectorRegistry) -> type["Endpoint"]:
        """The class of routes behind this guard, for `APIRouter(route_class=...)`; `registry` gets their times."""
        seconds = Histogram(
            "image_editor_http_request_duration_seconds",
            "From the request's headers to its answer, by path and status.",
            ["path", "status"],
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=registry,
        )
        return type("Endpoint", (cls,), {"guard": guard, "seconds": seconds})

    def matches(self, scope):
        match, child_scope = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL else match), child_scope

    async def handle(self, scope, receive, send) -> None:
        await self.app(scope, receive, send)

    def get_route_handler(self):
        run = super().get_route_handler()

        async def answer(request: Request) -> Response:
            began = time.monotonic()
            try:
                response = await self._answer(request, run)
            except Refusal as refusal:
                response = refusal.response()
            except EditError as error:
                kind = failure_kind(error)
                response = Refusal(500 if kind else 400, str(error), kind=kind).response()
            except ClientDisconnect:
                response = Response(status_code=499)  # its reader has left
            except Exception:
                log.exception("%s %s failed", request.method, self.path)
                text = "The server failed on this request; its log says why."
                response = Refusal(500, text, kind="failed").response()
            self.seconds.labels(self.path, response.status_code).observe(time.monotonic() - began)
            response.headers.setdefault("Cache-Control", "no-store")
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers.update(self.guard.cors_headers(request))
            return response

        return answer

    async def _answer(self, request: Request, run) -> Response:
        # HEAD is GET: the server leaves the body out.
        own = self.methods or set()
        methods = sorted({*own, *({"HEAD"} if "GET" in own else ())})
        allowed = ", ".join(methods)
        if request.method == "OPTIONS" and self.guard.cors_headers(request).get("Access-Control-Allow-Origin"):
            # A browser's question before the request itself; it brings no credentials and gets nothing but this.
            headers = {
                "Access-Control-Allow-Methods": allowed,
                "Access-Control-Allow-Headers": "Authorization, Content-Type, X-API-Key",
                "Access-Control-Max-Age": "600",
            }
            if "access-control-request-private-network" in request.headers:  # a public page that asks for a private host
                headers["Access-Control-Allow-Private-Network"] = "true"
            return Response(status_code=204, headers=headers)
        self.guard.check(request)
        if request.method not in methods:
            text = f"{request.method} is not possible on {self.path}. Allowed: {allowed}."
            response = Refusal(405, text).response()
            response.headers["Allow"] = allowed
            return response
        return await run(request)
