"""POST /edit: one to three pictures in base64 and what to change, answered with the picture.

What a request may cost is bounded before it costs it. Its place in the `EditQueue` is taken before its body is read,
the bytes that all requests hold are counted, the settings are checked before a picture is opened, and a
picture's size before it is decoded. Everything is in the request: nothing is fetched and no path is opened.

The queue is fair by client address: of the edits that wait, the next is of the client with the fewest in the engine,
and among those of the one whose last turn lies furthest back. One address may take half of the places, so it cannot
shut out the others. Over the bound the answer is 503 with Retry-After, an estimate from the frames done lately.

A client that hangs up is noticed while its edit waits and while it runs: its place is freed at once, and the engine
stops within one step.
"""

import asyncio
import base64
import functools
import itertools
import math
import reprlib
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from fastapi.requests import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from engine.fitting import LONGEST, Fitted, at_output_size
from pipeline.images import EditError, encode_jpeg, encode_png, open_image
from qwen_realtime import EditParams, EditResult, RealtimeEngine
from serving.access import Refusal, plain
from serving.connections import address_of
from serving.decoding import Busy, Sender
from serving.holder import EngineHolder, why_not
from serving.json_bounds import Bounds, read_json
from serving.models import FORMATS, EditAnswer, Format, check_edit

MAX_BODY_BYTES = 64 * 2**20  # photographs in base64
MAX_HELD_BYTES = 512 * 2**20  # bodies and opened pictures of all requests
BODY_TIMEOUT_S = 60.0
EDIT_TIMEOUT_S = 600.0  # no edit takes so long: only an engine that hangs
MAX_RETRY_AFTER_S = 60
OFFERS = ("application/json", *FORMATS.values())


# ------------------------------------------------------------------------------------------------------ the queue


class Ticket:
    """One request's place in the queue, from its headers to its answer."""

    def __init__(self, queue: "EditQueue", client: str, number: int):
        self._queue, self.client, self.number = queue, client, number
        self.held_bytes = 0
        self.called: asyncio.Event | None = None  # set when its turn has come; None before it waits for one
        self.running = False

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *exc) -> None:
        self._queue.leave(self)

    def hold(self, count: int) -> None:
        """This request now holds `count` bytes. Raises a Refusal, 503, when all requests would hold too many."""
        before, self.held_bytes = self.held_bytes, count
        if self._queue.held_bytes > MAX_HELD_BYTES:
            self.held_bytes = before
            raise self._queue.full(f"The waiting requests hold {self._queue.held_bytes:,} bytes.")

    async def turn(self) -> None:
        """Returns when this request may use the engine."""
        self.called = asyncio.Event()
        self._queue.call()
        await self.called.wait()


class EditQueue:
    """At most `running()` requests in the engine and `waiting` before it. Used from one event loop only.

    A request takes its place with `enter`, waits with `Ticket.turn` until it may use the engine, and frees both with
    `leave`, which the ticket calls when its `with` block ends.
    """

    def __init__(self, running: Callable[[], int], waiting: int, frame_s: Callable[[], float]):
        """`frame_s` gives the seconds that a frame takes now: what Retry-After is estimated from."""
        self._running, self._waiting, self._frame_s = running, waiting, frame_s
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._turns = 0
        self._last_turns: dict[str, int] = {}  # of each client that is here; a new one enters at the end

    @property
    def held_bytes(self) -> int:
        return sum(ticket.held_bytes for ticket in self._tickets.values())

    def summary(self) -> dict[str, int]:
        """Requests running and waiting, the places for both, and the bytes that they hold."""
        running = sum(ticket.running for ticket in self._tickets.values())
        return {
            "running": running,
            "waiting": len(self._tickets) - running,
            "places": self._running() + self._waiting,
            "held_bytes": self.held_bytes,
        }

    def enter(self, client: str) -> Ticket:
        """A place for a request of this client. Raises a Refusal, 503, when there is none, or no more for this client."""
        places = self._running() + self._waiting
        own = sum(ticket.client == client for ticket in self._tickets.values())
        if len(self._tickets) >= places:
            raise self.full(f"{len(self._tickets)} edits are waiting or running; there are {places} places.")
        if own >= max(1, places // 2):
            raise self.full(f"{own} edits from your address are waiting or running, half of the {places} places.")
        ticket = Ticket(self, client, next(self._numbers))
        self._tickets[ticket.number] = ticket
        self._last_turns.setdefault(client, self._turns)
        return ticket

    def full(self, why: str) -> Refusal:
        """The refusal, 503, that says why and when to try again. Returned, not raised."""
        seconds = math.ceil(len(self._tickets) * self._frame_s())
        return Refusal(503, f"{why} Try again later.", retry_after_s=min(max(seconds, 1), MAX_RETRY_AFTER_S))

    def leave(self, ticket: Ticket) -> None:
        """Frees this ticket's place, and gives its turn to the next. Does nothing for one that has left."""
        self._tickets.pop(ticket.number, None)
        if all(other.client != ticket.client for other in self._tickets.values()):
            self._last_turns.pop(ticket.client, None)
        self.call()

    def call(self) -> None:
        """Gives free turns to those that wait for one."""
        while True:
            tickets = self._tickets.values()
            running = [ticket.client for ticket in tickets if ticket.running]
            waiting = {t.number: t.client for t in tickets if t.called is not None and not t.running}
            if len(running) >= self._running() or not waiting:
                return
            ticket = self._tickets[next_turn(waiting, running, self._last_turns)]
            self._turns += 1
            self._last_turns[ticket.client] = self._turns
            ticket.running = True
            assert ticket.called is not None  # it waits
            ticket.called.set()


def next_turn(waiting: dict[int, str], running: list[str], last_turns: dict[str, int]) -> int:
    """Of the waiting {number: client} the number whose turn it is: of the client with the fewest running, among those
    of the one whose last turn lies furthest back, and of its own the first that came.
    """
    return min(waiting, key=lambda n: (running.count(waiting[n]), last_turns[waiting[n]], n))


# -------------------------------------------------------------------------------------------------- what was asked


def negotiate(accept: str | None) -> str:
    """The media type of `OFFERS` that an Accept header likes best; JSON where it has no preference. Refusal 406."""
    wanted: dict[str, float] = {}
    for item in (accept or "*/*").split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            wanted[kind] = max(wanted.get(kind, 0.0), min(float(quality), 1.0))
        except ValueError:
            continue

    def quality_of(offer: str) -> float:
        ranges = (offer, f"{offer.split('/')[0]}/*", "*/*")  # the most exact one counts
        return next((wanted[r] for r in ranges if r in wanted), 0.0)

    best = max(OFFERS, key=quality_of)  # the first of equals
    if not quality_of(best) > 0:
        raise Refusal(406, f"The answer can be {', '.join(OFFERS)}, and the Accept header wants none of them.")
    return best


def parse_edit(
    body: bytes, side: int, max_pixels: int = LONGEST**2, decode: Callable[[bytes], np.ndarray] = open_image
) -> tuple[Fitted, EditParams, Format]:
    """(pictures, params, format) of a POST /edit body: `read_edit` and `open_edit`."""
    pictures, params, data_format = read_edit(body)
    return open_edit(pictures, params, side, max_pixels, decode), params, data_format


def read_edit(body: bytes) -> tuple[list[bytes], EditParams, Format]:
    """(picture files, params, format) of a POST /edit body; no picture is opened. Raises EditError."""
    edit = check_edit(read_json(body))
    return edit.pictures, edit.params(), edit.format


def open_edit(
    pictures: list[bytes], params: EditParams, side: int, max_pixels: int, decode: Callable[[bytes], np.ndarray]
) -> Fitted:
    """The pictures at the output's size. Without a size the result keeps the first picture's shape."""
    return at_output_size([decode(picture) for picture in pictures], params, side, max_pixels)


def check_headers(request: Request) -> None:
    """Refuses by the headers alone what the body could not make good."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f'The content type is {reprlib.repr(kind)}. Allowed: "application/json".')
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Refusal(415, f"The content encoding is {reprlib.repr(coding)}. Allowed: none.")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()


def _too_large() -> Refusal:
    return Refusal(413, f"The request is too large. At most {MAX_BODY_BYTES:,} bytes are allowed.")


async def read_body(request: Request, ticket: Ticket) -> bytes:
    body, bounds = bytearray(), Bounds()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():  # the length header may be absent: count what really comes
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
                ticket.hold(len(body))
                bounds.add(chunk)
    except TimeoutError:
        text = f"Of the request {len(body):,} bytes came in {BODY_TIMEOUT_S:g} s. Send it faster."
        raise Refusal(408, text) from None
    return bytes(body)


# --------------------------------------------------------------------------------------------------- doing it


class EditDesk:
    """The handler of POST /edit and its queue.

    `edit` raises a Refusal or an EditError for every answer but a good one, and ClientDisconnect when the caller leaves.
    """

    def __init__(self, holder: EngineHolder, pool: ThreadPoolExecutor, *, waiting: int):
        self._holder, self._pool = holder, pool
        self._opening = asyncio.Semaphore(2)  # large bodies read at one time: each may take hundreds of MB
        self.queue = EditQueue(self._running_places, waiting, self._frame_s)

    async def edit(self, request: Request) -> EditAnswer | Response:
        """Waits in a queue that is fair by address. Hang up and the edit stops within one step.

        Pictures come in the request: nothing is fetched from an address and no path is opened.
        """
        began = time.monotonic()
        media_type = negotiate(request.headers.get("accept"))
        engine = ready_engine(self._holder)
        check_headers(request)
        loop = asyncio.get_running_loop()
        client = address_of(request.scope.get("client"))
        with self.queue.enter(client) as ticket:
            body = await read_body(request, ticket)
            async with self._opening:
                files, params, data_format = await loop.run_in_executor(self._pool, read_edit, body)
            del body
            ticket.hold(sum(map(len, files)))
            pictures = await self._opened(request, client, files, params, engine)
            del files
            ticket.hold(sum(image.nbytes for image in pictures.images))
            result = await unless_gone(request, self._run(ticket, engine, pictures, params))
            if result.error is not None:
                raise result.error
            if media_type != "application/json":
                data_format: Format = next(name for name, kind in FORMATS.items() if kind == media_type)
            encode = encode_png if data_format == "png" else encode_jpeg
            data = await loop.run_in_executor(self._pool, encode, result.picture)
        if media_type != "application/json":
            return _bytes_answer(result, data, data_format)
        return _json_answer(result, data, data_format, began)

    async def _opened(self, request: Request, client: str, files: list[bytes], params: EditParams, engine: RealtimeEngine) -> Fitted:
        """The opened pictures. When the caller hangs up, opening them ends."""
        decoder, sender = self._holder.decoder, Sender(client)
        decode = functools.partial(decoder.open, sender=sender)
        sizes = engine.default_size, engine.config.max_pixels
        try:
            return await unless_gone(request, decoder.run(sender, open_edit, files, params, *sizes, decode))
        except Busy as error:
            raise Refusal(503, str(error), retry_after_s=5) from None

    async def _run(self, ticket: Ticket, engine: RealtimeEngine, pictures: Fitted, params: EditParams) -> EditResult:
        """The EditResult. However this ends, the session is closed and its frame stops within a step."""
        try:
            async with asyncio.timeout(EDIT_TIMEOUT_S):
                await ticket.turn()
                try:
                    session = engine.open_session()
                except EditError as error:
                    raise self.queue.full(str(error)) from None
                with session:
                    number = session.submit(pictures, params)
                    async for result in session:
                        if result.number == number:
                            return result
        except TimeoutError:
            raise Refusal(503, f"The edit was not done within {EDIT_TIMEOUT_S:g} s.", retry_after_s=60) from None
        ready_engine(self._holder)  # which says why, if the engine has gone
        raise Refusal(503, "The session was closed before the picture was done.", retry_after_s=5)

    def _running_places(self) -> int:
        engine = self._holder.engine
        # The quarter that live views leave; the engine does one frame at a time, so more would not be faster.
        return 1 if engine is None else max(1, engine.config.max_sessions // 4)

    def _frame_s(self) -> float:
        engine = self._holder.engine
        return 1.0 if engine is None else engine.stats().stages_ms.get("total", 1000.0) / 1000


def ready_engine(holder: EngineHolder) -> RealtimeEngine:
    """The engine; Refusal 503 while there is none, and where only the page may use it."""
    status = holder.status()
    if status["state"] == "loading":
        text = f"The model is loading ({status['fraction']:.0%}: {status['text']}). Try again shortly."
        raise Refusal(503, text, kind="loading", retry_after_s=5)
    if status["state"] == "failed":
        raise Refusal(503, why_not(status), kind="failed" if "description" in status else "failed_to_load")
    if status["state"] == "stopping":
        raise Refusal(503, why_not(status), kind="stopping", retry_after_s=10)
    if holder.page_only:
        raise Refusal(503, holder.page_only, kind="page_only")
    return holder.loaded


async def unless_gone(request: Request, work: Coroutine):
    """What `work` returns or raises. When the caller hangs up first, work is cancelled and ClientDisconnect raised."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # the place is free when this returns


def _bytes_answer(result: EditResult, data: bytes, data_format: Format) -> Response:
    timing = ", ".join(f"{name};dur={ms:.1f}" for name, ms in plain(result.stages_ms).items())
    headers = {"Server-Timing": timing, "X-Age-Ms": str(round(result.age_ms, 1)), "X-Seed": str(result.params.seed)}
    if result.notes:
        headers["X-Notes"] = "; ".join(result.notes).encode("ascii", "replace").decode()
    return Response(data, media_type=FORMATS[data_format], headers=headers)


def _json_answer(result: EditResult, data: bytes, data_format: Format, began_monotonic: float) -> EditAnswer:
    return EditAnswer(
        image=base64.b64encode(data).decode(),
        format=data_format,
        width=result.picture.shape[1],
        height=result.picture.shape[0],
        seed=result.params.seed,
        stages_ms=plain(result.stages_ms),
        age_ms=round(result.age_ms, 1),
        notes=list(result.notes),
        elapsed=round(time.monotonic() - began_monotonic, 3),
    )
