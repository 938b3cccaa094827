"""Our HTTP/1.1 client: an asyncio protocol over httptools with a pool of connections for each replica.

A request's way: `Replica.post` → a connection from the pool (or a new one) → bytes written → `Reply` with status and
headers, once the first piece of a stream or the whole of another answer is here → the rest of a stream goes on from
where it is received to who waits for it (`relay`), no coroutine woken between → back to the pool.

Whatever goes wrong is one of four `UpstreamError`s, and each says whether the upstream can have begun to work.
A pooled connection that the upstream closed while it lay idle is replaced once, silently: nothing was answered.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

HIGH_WATER = 256 * 1024
"""Bytes of a body that wait for the client before we stop reading from the upstream."""
IDLE_SECONDS = 30.0
"""A pooled connection older than this is not used again (vLLM's uvicorn closes them after 5 s; both may race)."""
HEAD_LIMIT = 64 * 1024


class UpstreamError(Exception):
    """The upstream did not answer properly. `kind` as in `Interaction.error`; `status` for the client."""

    kind = "upstream_refused"
    status = 502


class Refused(UpstreamError):
    """No connection, or closed before any byte of an answer."""


class TimedOut(UpstreamError):
    kind = "upstream_timeout"
    status = 504


class ConnectTimedOut(TimedOut):
    """Not even a connection: the request was not sent."""


class Cut(UpstreamError):
    """The answer ended before its end."""

    kind = "upstream_cut"


class Garbage(UpstreamError):
    """Not HTTP."""

    kind = "upstream_garbage"


class Reader(Protocol):
    """Who gets an answer, and may be slower than it comes."""

    on_full: Callable[[bool], None] | None
    """Told True when more should not be sent for now, False when it may be."""

    @property
    def full(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect; from the request to the first byte of the answer's body; between its bytes."""

    connect: float = 2.0
    first_byte: float = 60.0
    idle: float = 60.0


class _Connection(asyncio.Protocol):
    """One connection; it carries one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.used = 0
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        """Wakes who waits; it outlives an exchange, for one that is late costs less than one for each."""
        self.draining: asyncio.Future[None] | None = None
        """Until the system takes more of what was sent; None while it does."""
        self.put: Callable[[bytes], None] | None = None
        """Where pieces of the body go as they come; None while they are kept to be taken."""
        self.begin()

    def begin(self) -> None:
        """Ready for another exchange."""
        self._parser = httptools.HttpResponseParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []
        self.buffered = 0
        self.seen = 0
        self.head_done = False
        self.streams = False
        """Whether its pieces are to be passed on as they come: server-sent events that are no error's."""
        self.complete = False
        self.reusable = False
        self.failure: Exception | None = None
        self._paused = self._held = False
        self._touched = self._loop.time()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        if self.complete:  # bytes after the end of an answer: nothing we asked for
            self.abort()
            return
        self.seen += len(data)
        begun = self.buffered > 0
        self._touched = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.failure = Garbage(f"the upstream's answer is not HTTP: {error}")
            self.abort()
        if self.put is not None:
            if self.body:
                self._pass_on(self.put)
        elif self.streams:
            self._wake()
            if self.buffered > HIGH_WATER:
                self._pause(True)
        elif self.buffered and not begun:  # from here on another patience holds
            self._wake()
        elif not self.head_done and self.seen > HEAD_LIMIT:
            self.failure = Garbage(f"the upstream's headers exceed {HEAD_LIMIT} bytes")
            self.abort()
        if self.complete or self.closed:
            self._wake()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._set_alarm(None)
        if error is None and self.head_done and not self.complete and self._ends_at_close:
            self.complete = self.failure is None
        self._wake()
        if self.draining is not None and not self.draining.done():
            self.draining.set_result(None)

    def pause_writing(self) -> None:
        self.draining = self._loop.create_future()

    def resume_writing(self) -> None:
        if self.draining is not None and not self.draining.done():
            self.draining.set_result(None)
        self.draining = None

    # httptools

    def on_message_begin(self) -> None:
        if self.complete:
            raise Garbage("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_done:  # trailers are nothing that we relay
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:  # 100 Continue and its kin announce the real answer
            self.headers = []
            return
        if not 200 <= status < 600:
            raise Garbage(f"there is no status {status}")
        # A whole head may come in one read, perhaps with its body: then its own size counts.
        if self.seen > HEAD_LIMIT and sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_LIMIT:
            raise Garbage("its headers are too large")
        self.head_done = True
        self.status = status
        if self.draining is not None and not self.draining.done():
            self.draining.set_result(None)  # an answer before all was sent: who sends need not go on
        names = dict(self.headers)
        self._ends_at_close = b"content-length" not in names and b"transfer-encoding" not in names
        self.streams = (
            status < 400
            and status not in (204, 304)
            and names.get(b"content-type", b"").startswith(b"text/event-stream")
        )

    def on_body(self, data: bytes) -> None:
        self.body.append(data)
        self.buffered += len(data)

    def on_message_complete(self) -> None:
        if self.head_done:
            self.complete = True
            self.reusable = self._parser.should_keep_alive() and self.draining is None

    # The exchange

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    async def sent(self, timeout: float) -> bool:
        """Until the system took what was sent. False if it did not within `timeout` s."""
        if self.draining is not None:
            try:
                async with asyncio.timeout(timeout):
                    await self.draining
            except TimeoutError:
                return False
        return True

    async def wait(self, first: float, idle: float, whole: bool = False) -> bool:
        """Until a piece of a stream is here, or all of another answer, or (`whole`) of either; or it can come no more.

        False if `first` s passed without a byte of the body, or later `idle` s between two.
        """
        asked = self._loop.time()
        while not (self.complete or self.closed or (self.streams and self.body and not whole)):
            begun = whole or (self.head_done and self.buffered > 0)
            due = max(self._touched, asked) + idle if begun else asked + first
            if self._held:
                due = self._loop.time() + idle  # it is not the upstream that is slow
            elif self._loop.time() >= due:
                return False
            self._set_alarm(due)
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True

    def _set_alarm(self, due: float | None) -> None:
        """Wake who waits no later than that (loop time); None for never."""
        if self._alarm is not None:
            if due is not None and self._alarm.when() <= due:
                return  # it rings too early, and is set anew then
            self._alarm.cancel()
        self._alarm = None if due is None else self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._wake()

    def take(self) -> bytes:
        data = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        self.body.clear()
        self.buffered = 0
        if self._paused and not self._held:
            self._pause(False)
        return data

    def hold(self, on: bool) -> None:
        """Let the upstream wait, for who reads its answer is slow; or no more."""
        self._held, self._touched = on, self._loop.time()
        self._pause(on)

    def _pass_on(self, put: Callable[[bytes], None]) -> None:
        try:
            put(self.take())
        except Exception as error:  # the event loop would only write it to its log
            self.failure, self.complete = error, False
            self.abort()

    def _pause(self, on: bool) -> None:
        if on != self._paused and self.transport is not None and not self.closed:
            self._paused = on
            if on:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def failed(self) -> Exception | None:
        """What went wrong, to be raised, and not kept: what is raised holds all that the caller does."""
        failure, self.failure = self.failure, None
        return failure

    def abort(self) -> None:
        self.closed = True
        self._set_alarm(None)
        if self.transport is not None:
            self.transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Reply:
    """An upstream's answer whose head is here. `read` it to the end, or `abort` it: that stops the generation."""

    def __init__(self, connection: _Connection, replica: Replica, timeouts: Timeouts) -> None:
        self.status: int = connection.status
        self.headers = connection.headers
        self.streams = connection.streams
        self._connection = connection
        self._replica = replica
        self._timeouts = timeouts
        self._done = False

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def read(self) -> bytes:
        """The next piece of the body as it came; b"" at its end. Raises `Cut`, `TimedOut` or `Garbage`."""
        connection = self._connection
        if not connection.body and not await connection.wait(self._timeouts.idle, self._timeouts.idle):
            self.abort()
            raise _silent(self._timeouts.idle)
        if connection.body:
            return connection.take()
        self._end()
        return b""

    async def relay(self, put: Callable[[bytes], None], reader: Reader) -> None:
        """Have every piece `put` as it comes, no faster than `reader` takes it; return at the end.

        Raises `Cut`, `TimedOut` or `Garbage`, and what `put` raises.
        """
        connection = self._connection
        if connection.body:
            put(connection.take())
        connection.put, reader.on_full = put, connection.hold
        try:
            if reader.full:
                connection.hold(True)
            if not await connection.wait(self._timeouts.idle, self._timeouts.idle, whole=True):
                self.abort()
                raise _silent(self._timeouts.idle)
        finally:
            connection.put = reader.on_full = None
            connection.hold(False)  # the last piece may have filled the reader; the next answer is another's
        self._end()

    def _end(self) -> None:
        """The body ended: as it should, or before. Raises what went wrong."""
        if not self._connection.complete:
            self.abort()
            raise self._connection.failed() or _cut()
        if not self._done:
            self._done = True
            self._replica.give_back(self._connection)

    async def read_all(self) -> bytes:
        if self._connection.complete:
            body = self._connection.take()
            self._end()
            return body
        parts = []
        while data := await self.read():
            parts.append(data)
        return b"".join(parts)

    def abort(self) -> None:
        """Drop the connection unless the answer was read to its end."""
        if not self._done:
            self._done = True
            self._connection.abort()
            self._connection.body.clear()  # nobody takes it, and the garbage collector comes seldom
            self._replica.in_flight -= 1


@dataclass
class Replica:
    """One vLLM server and its pool of connections. Belongs to one event loop."""

    url: str
    api_key: str | None = None
    in_flight: int = 0
    failures: int = 0
    down_until: float = 0.0
    """Loop time before which it is tried last: it refused connections."""
    missing: set[str] = field(default_factory=set)
    """Models that it is known not to serve."""
    _idle: list[_Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self._host = parts.hostname or ""
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if self._tls else None
        authorization = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        self._fixed = f"host: {parts.netloc.rsplit('@', 1)[-1]}\r\n{authorization}".encode("latin-1")

    @property
    def is_down(self) -> bool:
        return time.monotonic() < self.down_until

    async def post(self, path: str, headers: bytes, body: bytes, timeouts: Timeouts) -> Reply:
        """Send a request; return when the head and the first piece of the body are here. Raises `UpstreamError`.

        `headers`: whole lines, each ended by CRLF; host, authorization and content-length are added here.
        """
        head = b"POST %b HTTP/1.1\r\n%b%bcontent-length: %d\r\n\r\n" % (
            (self._base + path).encode("latin-1"), self._fixed, headers, len(body),
        )  # fmt: skip
        return await self._exchange(head + body, timeouts)

    async def get(self, path: str, timeouts: Timeouts) -> Reply:
        head = b"GET %b HTTP/1.1\r\n%b\r\n" % ((self._base + path).encode("latin-1"), self._fixed)
        return await self._exchange(head, timeouts)

    async def _exchange(self, data: bytes, timeouts: Timeouts) -> Reply:
        self.in_flight += 1
        connection: _Connection | None = None
        try:
            while True:
                connection = self._pooled() or await self._connect(timeouts.connect)
                fresh = connection.used == 0
                connection.used += 1
                connection.send(data)
                sent = connection.draining is None or await connection.sent(timeouts.first_byte)
                if not sent or not await connection.wait(timeouts.first_byte, timeouts.idle):
                    if connection.buffered:
                        raise _silent(timeouts.idle)
                    raise TimedOut(f"{self.url} sent no byte of an answer within {timeouts.first_byte:g} s")
                if connection.complete or (connection.streams and connection.body):
                    self.failures, self.down_until = 0, 0.0
                    return Reply(connection, self, timeouts)
                if connection.failure is not None:
                    raise connection.failed() or _cut()
                if connection.seen:
                    raise _cut()
                if fresh:
                    raise Refused(f"{self.url} closed the connection without an answer")
        except BaseException:
            self.in_flight -= 1
            if connection is not None:
                connection.abort()
            raise

    def _pooled(self) -> _Connection | None:
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and now - connection.idle_since < IDLE_SECONDS:
                connection.begin()
                return connection
            connection.abort()
        return None

    async def _connect(self, timeout: float) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except TimeoutError:
            self._failed()
            raise ConnectTimedOut(f"{self.url} accepted no connection within {timeout:g} s") from None
        except OSError as error:
            self._failed()
            why = error.strerror or str(error)
            if isinstance(error, ssl.SSLCertVerificationError):
                why += "; name the authority that signed it in SSL_CERT_FILE"
            raise Refused(f"{self.url} cannot be reached: {why}") from None
        return connection

    def _failed(self) -> None:
        """Back off: 0.5 s, 1 s, 2 s … 8 s before this replica is tried before others again."""
        self.failures += 1
        self.down_until = time.monotonic() + min(8.0, 0.25 * 2 ** min(self.failures, 5))

    def give_back(self, connection: _Connection) -> None:
        self.in_flight -= 1
        if connection.reusable and not connection.closed and len(self._idle) < 256:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()


def _silent(idle: float) -> TimedOut:
    return TimedOut(f"the upstream was silent for {idle:g} s in the middle of its answer")


def _cut() -> Cut:
    return Cut("the upstream closed the connection in the middle of its answer")
