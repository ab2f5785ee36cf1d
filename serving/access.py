"""Who may come in, and how a request is refused.

Three questions are asked of every request, page, route or socket, in this order. Is it addressed to a name of this
server? (A page of another site can make its own name point here, and is then of the same origin: only the Host header
still tells. Asked where no lock guards a server of one machine.) Does its Origin, which every browser sends with a
socket and a post, name this host, or a site that the operator let in? Does it bring the login or the key? Gradio's
`launch(auth=...)` guards only Gradio's own routes, and its CORS settings do not cover sockets.

A `Refusal` is every answer but a good one, in JSON: {"error": what came and what is allowed, "kind": one word for
programs, "detail": as error}.
"""

import base64
import binascii
import math
import re
import reprlib
import secrets
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse

from pipeline.images import EditError
from serving.connections import address_of
from serving.guesses import Guesses

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
LOOPBACK_ORIGIN = re.compile(rf"https?://({'|'.join(map(re.escape, LOOPBACK_NAMES))})(:\d{{1,5}})?")
EXPOSED_HEADERS = "Retry-After, Server-Timing, X-Age-Ms, X-Seed"

# The kinds of refusal, by status where one status has one kind.
KINDS = {
    400: "bad_input", 401: "login", 403: "forbidden", 404: "no_such_path", 405: "method", 406: "not_acceptable",
    408: "too_slow", 413: "too_large", 415: "content_type", 429: "too_many_tries", 503: "busy",
}  # fmt: skip

FAILURES = ("out_of_memory", "not_finite", "failed")  # the kinds of the engine's own failures


def failure_kind(error: EditError) -> str | None:
    """Which of `FAILURES` it is; None when the request itself was bad."""
    return getattr(error, "kind", None)


class Refusal(Exception):
    """An answer other than 200: its HTTP status, what the caller reads, and when to try again."""

    def __init__(self, status: int, text: str, *, kind: str | None = None, retry_after_s: int | None = None):
        super().__init__(text)
        self.status, self.kind, self.retry_after_s = status, kind or KINDS[status], retry_after_s

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="image editor"'
        return JSONResponse(refusal_body(str(self), self.kind), self.status, headers)


def refusal_body(text: str, kind: str) -> dict[str, str]:
    """What every answer but a good one says. `detail` repeats the text under the name that FastAPI's clients read."""
    return {"error": text, "kind": kind, "detail": text}


class Guard:
    """Who may use the routes. Without `auth` and `api_key` all who can reach them, from a page of this host.

    `auth` = (user, password): the login of the page (its cookie), or HTTP Basic. `api_key`: the header
    `Authorization: Bearer KEY` or `X-API-Key: KEY`, or Basic with the key as the password, which is what a browser
    can ask a person for. `origins`: other sites whose pages may come too, as "https://name", or "*"; they bring the
    key in a header. `hosts`: names under which the server may be addressed, None for any. `local_pages`: whether pages
    that this machine itself serves, at any port, may come as listed ones may; no site elsewhere has such an origin.
    """

    def __init__(
        self,
        auth: tuple[str, str] | None = None,
        api_key: str | None = None,
        *,
        origins: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
        local_pages: bool = False,
    ):
        self._auth = None if auth is None else tuple(part.encode() for part in auth)
        self._key = None if api_key is None else api_key.encode()
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._local_pages = local_pages
        self._guesses = Guesses()

    def let_in(self, host: str) -> None:
        """One more name under which the server may be addressed; a port after it is ignored."""
        if self._hosts is not None:
            self._hosts |= {_host_name(host)}

    @property
    def locked(self) -> bool:
        return self._auth is not None or self._key is not None

    def login(self, user: str, password: str) -> bool:
        """Whether a person may log in on the page: with the login, or with any name and the key as the password.

        Raises nothing and counts nothing: `try_login` counts.
        """
        return self._is_login(user.encode(errors="replace"), password.encode(errors="replace"))

    def try_login(self, address: str) -> "Try":
        """A login that this address tries; counted as wrong until it is taken back. Raises a Refusal, 429."""
        self._check_tries(address)
        return Try(self._guesses, address)

    def check(self, connection: HTTPConnection) -> None:
        """Raises a Refusal, 403, 401 or 429, unless the request may go on."""
        self.check_host(connection)
        self.check_origin(connection)
        self.check_login(connection)

    def check_host(self, connection: HTTPConnection) -> None:
        """Raises a Refusal, 403, when the request is addressed to a name that is not this server's."""
        for host in asked_hosts(connection):
            if self._hosts is not None and _host_name(host) not in self._hosts:
                known = ", ".join(sorted(self._hosts))
                raise Refusal(
                    403,
                    f"This server is not known as {reprlib.repr(host)}. It answers to: {known}. --allow-host adds a name.",
                )

    def check_origin(self, connection: HTTPConnection) -> None:
        """Raises a Refusal, 403, when a page of a site that was not let in asks."""
        if not same_origin(connection) and self._listed_origin(connection) is None:
            origin, hosts = reprlib.repr(connection.headers.get("origin")), " and ".join(asked_hosts(connection))
            raise Refusal(
                403,
                f"Requests from {origin} are not allowed here: this is {hosts}. --cors lets another site in; "
                "a proxy must pass on the name and the port that the browser asked for.",
            )

    def check_login(self, connection: HTTPConnection) -> None:
        """Raises a Refusal where there is a lock: 401 without the login or the key, 429 after too many wrong ones."""
        if not self.locked:
            return
        # What a browser sends by itself, for whichever page asks, counts only when our own page asks.
        own_page = same_origin(connection)
        if own_page and _has_login_cookie(connection):
            return
        address = address_of(connection.scope.get("client"))
        guessed = "authorization" in connection.headers or "x-api-key" in connection.headers
        if guessed:
            self._check_tries(address)
        if self._has_credentials(connection, own_page):
            self._guesses.right(address)
            return
        if guessed:
            self._guesses.wrong(address)
        raise Refusal(401, 'Log in first, or send the key as "Authorization: Bearer KEY" or "X-API-Key: KEY".')

    def cors_headers(self, connection: HTTPConnection) -> dict[str, str]:
        """What lets a page of a listed origin read the answer; nothing for all others."""
        origin = self._listed_origin(connection)
        if origin is None:
            return {"Vary": "Origin"} if self._origins or self._local_pages else {}
        # Never Access-Control-Allow-Credentials: a foreign page brings a key of its own, not a person's cookie.
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": EXPOSED_HEADERS,
            "Vary": "Origin",
        }

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this other site may come: it is listed, or it is of this machine where that is enough."""
        local = self._local_pages and LOOPBACK_ORIGIN.fullmatch(origin.lower()) is not None
        return local or bool(self._origins & {origin.lower(), "*"})

    def _listed_origin(self, connection: HTTPConnection) -> str | None:
        origin = connection.headers.get("origin")
        return origin if origin is not None and self.allows_origin(origin) else None

    def _check_tries(self, address: str) -> None:
        if wait_s := self._guesses.wait_s(address):
            raise Refusal(429, f"Too many wrong logins. Try again in {wait_s} s.", retry_after_s=wait_s)

    def _has_credentials(self, connection: HTTPConnection, own_page: bool) -> bool:
        scheme, _, value = connection.headers.get("authorization", "").partition(" ")
        value = value.strip()
        if scheme.lower() == "bearer" and self._is_key(value.encode("latin-1")):
            return True
        if self._is_key(connection.headers.get("x-api-key", "").encode("latin-1")):
            return True
        if scheme.lower() == "basic" and own_page:
            try:
                user, _, password = base64.b64decode(value, validate=True).partition(b":")
            except (binascii.Error, ValueError):
                return False
            return self._is_login(user, password)
        return False

    def _is_key(self, value: bytes) -> bool:
        return self._key is not None and secrets.compare_digest(value, self._key)

    def _is_login(self, user: bytes, password: bytes) -> bool:
        known = False
        if self._auth is not None:  # both are compared, in constant time: neither can be guessed letter by letter
            known = secrets.compare_digest(user, self._auth[0]) & secrets.compare_digest(password, self._auth[1])
        return known | self._is_key(password)


class Try:
    """A login whose outcome is not known yet."""

    def __init__(self, guesses: Guesses, address: str):
        self._guesses, self._address = guesses, address
        guesses.wrong(address)

    def take_back(self) -> None:
        self._guesses.right(self._address)


def crosses_sites(connection: HTTPConnection) -> bool:
    """Whether a browser says that a page of another site made it ask: for what a mere link could otherwise do."""
    site = connection.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    referer = connection.headers.get("referer")
    return referer is not None and not names_this_host(connection, referer)


def _has_login_cookie(connection: HTTPConnection) -> bool:
    # Gradio's App keeps its logins as {token: user}; served alone, the app has no such thing.
    app = connection.scope.get("app")
    tokens, cookie_id = getattr(app, "tokens", None), getattr(app, "cookie_id", None)
    names = (f"access-token-{cookie_id}", f"access-token-unsecure-{cookie_id}")
    return bool(tokens) and any(connection.cookies.get(name) in tokens for name in names)


def _host_name(host: str) -> str:
    """The Host header without its port: "[::1]:80" is "[::1]"."""
    name, colon, port = host.strip().lower().rpartition(":")
    return name if colon and port.isdigit() else host.strip().lower()


def asked_hosts(connection: HTTPConnection) -> list[str]:
    """Under which names this server was asked for: the Host header and, behind a trusted proxy (see `proxy`),
    X-Forwarded-Host. A page that has made its own name point here can set the second one, so both must be good.
    """
    forwarded = connection.headers.get("x-forwarded-host")
    return [connection.headers.get("host", ""), *([forwarded] if forwarded else [])]


def same_origin(connection: HTTPConnection) -> bool:
    """Whether the Origin header, which every browser sends with a socket and a post, names this host.

    No Origin means no browser, so no foreign page either. A foreign page cannot set X-Forwarded-Host.
    """
    origin = connection.headers.get("origin")
    return origin is None or names_this_host(connection, origin)


def names_this_host(connection: HTTPConnection, address: str) -> bool:
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    default_port = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    ours = {host.strip().lower().removesuffix(default_port) for host in asked_hosts(connection)}
    return bool(parts.netloc) and parts.netloc.lower().removesuffix(default_port) in ours


def plain(value: Any) -> Any:
    """The value as JSON can carry it: dataclasses as dicts, numpy numbers as numbers, what is neither as text."""
    if is_dataclass(value) and not isinstance(value, type):
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
