"""Open connections: how many there may be, and how long one may take to say what it wants.

uvicorn gives a request as much time for its head as its sender likes, and accepts connections until the process has no
descriptor left. `Connection` is uvicorn's own HTTP protocol with four bounds: a time for the head of a request, a time
in which a client must take what was sent to it, a number of connections in all, and one for each address. The protocol
class is the only place where both are known: an ASGI application is called when the head is already there, and
uvicorn's `limit_concurrency` too looks at a request, not at a connection.

A newcomer over the bound takes the place of the connection that has been waiting longest without a request, so a crowd
that says nothing cannot keep out those who say something. Where every connection is in use, the newcomer reads 503.
"""

import asyncio
import ipaddress
import logging
from asyncio import constants as asyncio_constants
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0  # from connecting, or from the end of the answer before, to the end of the head
STALL_TIMEOUT_S = 30.0  # in which a client must make room for more of an answer
MAX_CONNECTIONS = 1024
TLS_TIMEOUT_S = 10.0
_SENTENCE = b"Too many connections are open. Try again in a while."
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 10\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_SENTENCE), _SENTENCE)
)


def address_of(client: tuple | None) -> str:
    """Whom a connection is counted for: the address, of IPv6 the network of 2^64 addresses that one customer has."""
    host = client[0] if client else ""
    if ":" not in host:
        return host
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return host if address.is_loopback else str(ipaddress.ip_network((address, 64), strict=False))


class Connection(H11Protocol):
    """uvicorn's protocol over h11, bounded. `most` is set by `bound`."""

    most = MAX_CONNECTIONS
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()
        if self._crowded():
            transport.write(FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def handle_websocket_upgrade(self, event) -> None:
        self._stop_waiting()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._await_head()
            self._follow()  # the next request may have come with the one before

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if self.flow is not None:
            self.flow.resume_writing()

    @property
    def waiting(self) -> bool:
        """Whether no request of it is being answered."""
        return self._deadline is not None

    def _await_head(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._too_late)

    def _follow(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _due(self) -> float:
        assert self._deadline is not None  # it waits
        return self._deadline.when()

    def _too_late(self) -> None:
        self._deadline = None
        self.transport.abort()

    def _crowded(self) -> bool:
        """Whether this connection is one too many, after the longest waiting one has been sent away for it."""
        own = address_of(self.client)
        others: list[Any] = [other for other in self.connections if other is not self]  # uvicorn's protocols, of any kind
        of_address = [other for other in others if address_of(other.client) == own]
        for group, most in ((of_address, self.most // 2), (others, self.most)):
            if len(group) < most:
                continue
            waiting = [other for other in group if isinstance(other, Connection) and other.waiting]
            if not waiting:
                return True
            oldest = min(waiting, key=Connection._due)
            oldest._stop_waiting()
            oldest.connections.discard(oldest)
            oldest.transport.abort()
        return False


def bound(config: Config) -> None:
    """Makes a uvicorn serve through `Connection`, from the next connection on; it may be running already."""
    if not config.loaded:
        config.load()
    most = min(MAX_CONNECTIONS, max(16, raise_descriptor_limit() // 2))
    config.http_protocol_class = type("Connection", (Connection,), {"most": most})
    # asyncio takes the time for a TLS handshake from here, and uvicorn passes on no other; its own is a minute.
    asyncio_constants.SSL_HANDSHAKE_TIMEOUT = TLS_TIMEOUT_S
    accept_log = logging.getLogger("asyncio")
    if not any(isinstance(kind, _OnceAMinute) for kind in accept_log.filters):
        accept_log.addFilter(_OnceAMinute())


def raise_descriptor_limit() -> int:
    """How many files and sockets this process may have open, after asking for four times what connections need."""
    try:
        import resource  # there is none on Windows
    except ImportError:
        return 2 * MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MAX_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft


class _OnceAMinute(logging.Filter):
    """Without descriptors asyncio tries to accept two thousand times a second, and logs a traceback each time."""

    def __init__(self):
        super().__init__()
        self._said = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        if "out of system resource" not in record.getMessage():
            return True
        if record.created - self._said < 60:
            return False
        self._said = record.created
        record.exc_info = record.exc_text = None
        record.msg, record.args = "no file descriptor is left for another connection: raise the limit (ulimit -n)", ()
        return True
