"""Behind a proxy: whose request it is, by which name it was asked for, and under which path.

A proxy (nginx, Caddy, a load balancer) ends TLS and passes requests on, often under another name and without a part of
the path. What a request said before stands in the headers X-Forwarded-For, -Proto, -Host and -Port. Anyone can write
these headers, so they count only when the connection comes from an address that the operator trusts. From any other
address they are removed, before Gradio or a route reads them.

`BehindProxy` is the outermost layer of both programs. Below it `scope["client"]` and `scope["scheme"]` are the
visitor's own, and X-Forwarded-Host, where it is present, can be believed as far as a proxy can be believed.
"""

import re
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

TRUSTED = "127.0.0.1,::1"  # a proxy on this machine
ROOT_PATH = re.compile(r"(https?://[^\s/?#@]+)?(/[\w.~%-]+)*/?", re.ASCII)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:\d{1,5})?", re.ASCII | re.IGNORECASE)
_PREFIX = "image_editor.prefix"  # in the scope
_HOST, _PORT, _PROTO = b"x-forwarded-host", b"x-forwarded-port", b"x-forwarded-proto"
_FORWARDED = (_HOST, _PORT, _PROTO, b"x-forwarded-for", b"x-forwarded-prefix", b"forwarded")


def client_address(scope) -> str:
    """The visitor's address, "" where it is not known. Call it below `BehindProxy`."""
    client = scope.get("client")
    return client[0] if client else ""


def public_address(connection: HTTPConnection) -> str:
    """Where the visitor found the program, as "https://editor.example/edit"; "" where the headers say nothing usable."""
    host = connection.headers.get("x-forwarded-host") or connection.headers.get("host", "")
    scheme = connection.scope["scheme"]
    return f"{scheme}://{host}{connection.scope.get(_PREFIX, '')}" if HOST.fullmatch(host) else ""


class BehindProxy:
    """An ASGI layer that applies what trusted proxies say of a request, and removes what others say.

    `trusted`: addresses and networks with commas between them, "*" for all. `root_path`: the path, or the whole
    address, under which the proxy offers the program; it is cut off where the proxy has left it on.
    """

    def __init__(self, app, *, trusted: str = TRUSTED, root_path: str = ""):
        everyone = "*" in trusted
        self._app = ProxyHeadersMiddleware(app, "*" if everyone else [name.strip() for name in trusted.split(",")])
        parts = urlsplit(root_path)
        self._public_host, self._prefix = parts.netloc.encode(), parts.path.rstrip("/")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = scope | {"headers": self._headers(scope)} | self._path(scope)
        await self._app(scope, receive, send)

    def _headers(self, scope) -> list[tuple[bytes, bytes]]:
        said = {name: value for name, value in reversed(scope["headers"]) if name in _FORWARDED}
        if not said:
            return scope["headers"]
        if client_address(scope) not in self._app.trusted_hosts:
            return [header for header in scope["headers"] if header[0] not in _FORWARDED]
        # Each proxy of a chain may append to these; the first value is what the visitor's browser said.
        first = {name: value.split(b",")[0].strip() for name, value in said.items()}
        own = dict(scope["headers"])
        host = first.get(_HOST) or own.get(b"host", b"")
        host = self._public_host or _with_port(host, first.get(_PORT), own.get(b"origin"), own.get(b"referer"))
        others = [header for header in scope["headers"] if header[0] not in (_HOST, _PORT, _PROTO)]
        return [*others, (_HOST, host), *([(_PROTO, first[_PROTO])] if _PROTO in first else [])]

    def _path(self, scope) -> dict:
        if not self._prefix:
            return {}
        # Starlette would cut the prefix off once more where it finds it again: off the route /edit under the prefix /edit.
        cut = {"root_path": "", _PREFIX: self._prefix}
        if scope["path"].startswith(self._prefix + "/"):  # a path that is exactly the prefix may be a route of that name
            raw, prefix = scope.get("raw_path"), self._prefix.encode()
            cut |= {"path": scope["path"][len(prefix) :]}
            cut |= {"raw_path": raw[len(prefix) :]} if raw and raw.startswith(prefix) else {}
        return cut


def _with_port(host: bytes, port: bytes | None, *pages: bytes | None) -> bytes:
    """The host as the browser asked for it. Many proxies pass the name on without its port (nginx's $host): then the
    port is X-Forwarded-Port, or that of the page of this name that the browser says it is on (`pages`: the Origin and
    Referer headers). Another port of the name can pass for ours that way, as it can where cookies are concerned.
    """
    if re.search(rb":\d+$", host):
        return host
    if port and port.isdigit():
        return host if port in (b"80", b"443") else host + b":" + port
    for page in pages:
        found = re.match(rb"https?://" + re.escape(host) + rb"(:\d+)(?:/|$)", page or b"", re.IGNORECASE)
        if found:
            return host + found[1]
    return host
