"""The live socket, one connection per view:

    browser -> server   binary  uint32 frame number, JPEG or PNG bytes       (little endian, as everything here)
                        text    {"type": "params", any EditParams fields}    {"type": "stop"}
                                {"type": "link", "quality": 30..95}          of the JPEGs that come back
    server -> browser   text    {"type": "ack", "number"}                    on receipt, not on completion
                        text    {"type": "params" | "status" | "error", ...}
                                {"type": "stats", "memory": bytes by kind}   each second while there are pictures
                        binary  uint32 frame number, uint32 n, n bytes of JSON, JPEG bytes

Three tasks work side by side: one receives and acknowledges, one decodes the newest picture and hands it to the
session, one encodes results and sends them. With the engine's own thread, frame k is encoded while k+1 is edited and
k+2 is decoded. Every hand-over holds one frame, so a slow model or link loses frames but never builds a backlog. JPEG
work runs in a small thread pool: neither the event loop nor the engine's thread waits for it.

The connection's mailbox holds bytes that are not decoded yet. The session has a second one with the same promise, one
slot in which the newest frame wins, for decoded pixels (`engine.sessions`).

Each result carries `waited_ms` (time in the session's mailbox) and `period_ms` (how often the engine takes a frame of
this session). With a slow model the browser uses both to send one frame per edit, timed to arrive as the engine becomes
free (webui/live/beat.js).

The `LiveRoom` bounds what all connections may take: sockets, and sessions of the engine. Some sessions are
left for POST /edit, and a connection that finds no session free waits in line and is told the position. A socket that has been
silent for long is closed; the engine itself frees a session that has no frames.
"""

import asyncio
import json
import reprlib
import struct
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from starlette.websockets import WebSocket, WebSocketDisconnect

from engine.fitting import Fitted, at_output_size
from pipeline.images import EditError, encode_jpeg
from qwen_realtime import EditParams, EditResult
from serving.access import failure_kind, plain
from serving.decoding import LIMITS, Sender
from serving.holder import EngineHolder
from serving.json_bounds import read_json

MAX_FRAME_BYTES = LIMITS.frame_bytes
MAX_TEXT_BYTES = 64 * 2**10
MAX_SOCKETS = 256
SILENCE_TIMEOUT_S = 600.0  # of a socket; a session ends earlier (EngineConfig.idle_timeout_s)
HEADER = struct.Struct("<I")
RESULT_HEADER = struct.Struct("<II")
QUALITY = (30, 95)  # of a JPEG: what a browser may ask for


class _Gone(Exception):
    """The other side of the socket has left."""


class Beat:
    """How often the engine takes a frame of one session, in ms, seen from the frames that it took.

    One that waited was taken as soon as the engine was free: the time from the frame before is the engine's own. One that
    was taken at once found it idle; had it come sooner, it would have been taken when the one before was done, or sooner.
    """

    AT_ONCE_MS = 2.0

    def __init__(self):
        self._taken_monotonic: float | None = None
        self._periods_ms: deque[float] = deque(maxlen=5)

    def period_ms(self, taken_monotonic: float, waited_ms: float, total_ms: float) -> float:
        """With one more frame, whose stages took `total_ms`: the median of the last few. 0 until there are two."""
        if self._taken_monotonic is not None:
            apart_ms = (taken_monotonic - self._taken_monotonic) * 1000
            self._periods_ms.append(apart_ms if waited_ms > self.AT_ONCE_MS else min(apart_ms, total_ms))
        self._taken_monotonic = taken_monotonic
        return median(self._periods_ms or [0.0])


class LiveRoom:
    """What all live connections share: the pool, the sessions they may open, the line before them. One event loop."""

    def __init__(self, holder: EngineHolder, pool: ThreadPoolExecutor):
        self.holder, self.pool = holder, pool
        self.sockets = 0
        self._sessions: set = set()
        self._line: dict[object, None] = {}  # ordered: the first one in is the next to get a session

    @property
    def sessions(self) -> int:
        """Sessions that live views have now; those that the engine freed while they were idle do not count."""
        self._sessions = {session for session in self._sessions if not session.closed}
        return len(self._sessions)

    def summary(self) -> dict[str, int]:
        return {"sockets": self.sockets, "sessions": self.sessions, "waiting": len(self._line)}

    def take_session(self, who: object):
        """(a session, 0), or (None, the caller's position in line). Asked again and again by those in line."""
        self._line.setdefault(who)
        position = list(self._line).index(who) + 1
        if position > 1:
            return None, position
        engine = self.holder.loaded
        most = engine.config.max_sessions
        if self.sessions >= most - most // 4:  # a quarter is for uploads: live views keep theirs for hours
            return None, position
        try:
            session = engine.open_session()
        except EditError:
            return None, position
        self.leave_line(who)
        self._sessions.add(session)
        return session, 0

    def leave_line(self, who: object) -> None:
        self._line.pop(who, None)


class LiveConnection:
    """One browser's live view: its socket, its settings, its session of the engine."""

    STATUS_EVERY_S = 0.3
    RETRY_BUSY_S = 0.25
    STATS_EVERY_S = 1.0

    def __init__(self, websocket: WebSocket, room: LiveRoom):
        self._websocket, self._room, self._holder, self._pool = websocket, room, room.holder, room.pool
        self._sender = Sender(websocket.client.host if websocket.client else "")
        self._sending = asyncio.Lock()
        self._fresh = asyncio.Event()
        self._inbox: tuple[int, bytes] | None = None  # the newest undecoded frame: number, file bytes
        self._fields: dict = {}  # settings as the browser sent them
        self._params = None  # the same, checked; None until there is a prompt
        self._quality = 85
        self._stats_sent = 0.0  # when, monotonic
        self._session = None
        self._results: asyncio.Task | None = None
        # engine's frame number -> browser's, when it arrived, when it was submitted
        self._numbers: dict[int, tuple[int, float, float]] = {}
        self._overwritten = 0  # frames that a newer one replaced before they were decoded

    async def run(self) -> None:
        await self._websocket.accept()
        if self._room.sockets >= MAX_SOCKETS:
            # Accepted first: a browser hides the reason of a socket that never opened.
            await self._websocket.close(1013, f"{MAX_SOCKETS} live views are open. Try again later.")
            return
        self._room.sockets += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._announce())
                tasks.create_task(self._feed())
                await self._receive()
        except* _Gone:
            pass
        finally:
            self._room.sockets -= 1
            self._room.leave_line(self)
            self._close_session()

    # -- incoming

    async def _receive(self) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_TIMEOUT_S):
                    message = await self._websocket.receive()
            except TimeoutError:
                await self._websocket.close(1001, f"Nothing came for {SILENCE_TIMEOUT_S:g} s.")
                raise _Gone from None
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
            elif kind == "link":
                self._on_link(message)
            elif kind == "stop":
                self._inbox = None
                self._close_session()
            else:
                raise EditError(f'The message type is {reprlib.repr(kind)}. Allowed: "params", "link", "stop".')
        except EditError as error:
            await self._say("error", message=str(error))

    async def _on_params(self, changes: dict) -> None:
        """Settings may come one at a time; those not named stay. A refused change leaves all as they were."""
        fields = self._fields | changes
        if fields.get("mode", "edit") != "edit":
            raise EditError(
                f'The live view has one picture, so the mode {reprlib.repr(fields["mode"])} is not possible: "edit" is.'
            )
        params = EditParams.from_dict(fields)
        self._fields, self._params = fields, params
        if self._inbox is not None:
            self._fresh.set()  # a frame that came before the prompt need not wait for the next
        await self._say("params", **fields)

    def _on_link(self, message: dict) -> None:
        """The browser knows how slow its link is, and asks for lighter pictures."""
        quality, (least, most) = message.get("quality"), QUALITY
        if message.keys() != {"quality"} or type(quality) is not int or not least <= quality <= most:
            raise EditError(
                f"The link is {reprlib.repr(message)}. Allowed: a quality, a whole number from {least} to {most}."
            )
        self._quality = quality

    # -- to the engine

    async def _feed(self) -> None:
        while True:
            await self._fresh.wait()
            session = await self._open_session() if self._params is not None else None
            self._fresh.clear()
            if self._inbox is None or session is None:
                continue
            arrived = time.monotonic()
            (number, data), self._inbox = self._inbox, None
            assert self._params is not None  # or there would be no session
            try:
                picture = await self._holder.decoder.run(self._sender, self._open, data, self._params)
                if session is not self._session:
                    continue  # stopped meanwhile
                submitted = session.submit(picture, self._params)
            except EditError as error:
                await self._say("error", number=number, message=str(error))
                continue
            self._numbers[submitted] = (number, arrived, time.monotonic())

    def _open(self, data: bytes, params: EditParams) -> Fitted:
        """The sent picture, already at the output's size where the engine would scale it: its thread is the busy one."""
        engine = self._holder.loaded
        image = self._holder.decoder.open(data, self._sender, max_pixels=LIMITS.frame_pixels)
        return at_output_size([image], params, engine.default_size, engine.config.max_pixels, quick=True)

    async def _open_session(self):
        """This connection's session; waits, and says so, while the model is loading or all places are taken.

        None when the browser has stopped meanwhile.
        """
        if self._session is not None and self._session.closed:
            self._close_session()  # the engine freed it while it was idle
        told = None
        while self._session is None:
            if self._inbox is None:
                self._room.leave_line(self)
                return None
            if self._holder.status()["state"] != "ready":
                await asyncio.sleep(self.STATUS_EVERY_S)  # _announce tells the browser why
                continue
            self._session, position = self._room.take_session(self)
            if self._session is None:
                if position != told:
                    taken = f"All {self._room.sessions} places for live views are taken: position {position} in line."
                    await self._say("status", state="busy", position=position, text=taken)
                    told = position
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
        """Tells how the loading goes, when the engine fails, and when the program ends; then it closes the socket."""
        said = None
        while True:
            status = self._holder.status()
            if status != said:
                await self._say("status", **status)
                said = status
            if status["state"] == "stopping":
                await self._websocket.close(1001, status["text"])
                raise _Gone
            await asyncio.sleep(self.STATUS_EVERY_S)

    async def _send_results(self, session) -> None:
        loop, beat = asyncio.get_running_loop(), Beat()
        async for result in session:
            known = self._numbers.pop(result.number, None)
            for older in [n for n in self._numbers if n < result.number]:
                del self._numbers[older]  # dropped by the engine for a newer one
            if known is None:
                continue
            number, arrived, submitted = known
            if result.error is not None:
                kind = failure_kind(result.error)
                failure = {"kind": kind} if kind else {}
                await self._say("error", number=number, message=str(result.error), **failure)
                continue
            taken = submitted + result.waited_ms / 1000
            period_ms = beat.period_ms(taken, result.waited_ms, result.stages_ms["total"])
            data = await loop.run_in_executor(self._pool, encode_jpeg, result.picture, self._quality)
            meta = json.dumps(self._meta(result, arrived, period_ms)).encode()
            await self._send(bytes=RESULT_HEADER.pack(number, len(meta)) + meta + data)
            if time.monotonic() - self._stats_sent >= self.STATS_EVERY_S:
                self._stats_sent = time.monotonic()
                await self._say("stats", memory=plain(self._holder.loaded.stats().memory))

    def _meta(self, result: EditResult, arrived: float, period_ms: float) -> dict:
        params = result.params
        return {
            "stages_ms": {name: round(ms, 2) for name, ms in result.stages_ms.items()},
            "age_ms": round(result.age_ms, 1),
            "waited_ms": round(result.waited_ms, 1),  # of these, until the engine took it
            "period_ms": round(period_ms, 1),  # from one taken frame to the next
            "server_ms": round((time.monotonic() - arrived) * 1000, 1),  # decoded, waited, edited and encoded
            "fps": round(result.fps, 2),
            "dropped": result.dropped + self._overwritten,
            "skipped": result.skipped,
            "computed": round(result.computed, 3),  # share of the picture; the rest is as it was
            "notes": list(result.notes),
            "width": result.picture.shape[1],
            "height": result.picture.shape[0],
            "prompt": params.prompt,
            "steps": params.steps,
            "seed": params.seed,
        }

    async def _say(self, kind: str, /, **fields) -> None:
        await self._send(text=json.dumps({"type": kind, **fields}))

    async def _send(self, **message) -> None:
        try:
            async with self._sending:
                await self._websocket.send({"type": "websocket.send", **message})
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise _Gone from None
