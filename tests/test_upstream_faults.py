"""Our HTTP client before servers that misbehave, written by hand: over TLS and plain, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from gateway.upstream import Cut, Garbage, Refused, Replica, TimedOut, Timeouts, UpstreamError

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
QUICK = Timeouts(connect=1.0, first_byte=1.0, idle=1.0)
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a coroutine on one of the event loops that the gateway may have."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(test, 20))

    return run


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def secure(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context for 127.0.0.1, which we trust as users say it: by SSL_CERT_FILE."""
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


class Server:
    """One that answers each connection with `handle`; counts them, and keeps what it was asked."""

    def __init__(self, handle: Handler, context: ssl.SSLContext | None = None) -> None:
        self._handle, self._context = handle, context
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self.connections = 0
        self.asked: list[bytes] = []

    @contextlib.asynccontextmanager
    async def replica(self, scheme: str = "http", host: str = "127.0.0.1") -> AsyncIterator[Replica]:
        """Our client of it."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._context)
        replica = Replica(f"{scheme}://{host}:{server.sockets[0].getsockname()[1]}")
        try:
            yield replica
        finally:
            replica.close()
            server.close()
            for task, writer in self._open.items():
                task.cancel()
                writer.transport.abort()
            while self._open:
                await asyncio.wait(self._open)
            for _ in range(20):  # turns of the event loop in which what was closed is let go, handshakes too
                await asyncio.sleep(0.001)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            await self._handle(reader, writer)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError, asyncio.CancelledError):
                await writer.wait_closed()
            del self._open[task]

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """The next request's body."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        self.asked.append(body)
        return body


async def ask(replica: Replica, body: bytes = b"{}", timeouts: Timeouts = QUICK) -> tuple[int, bytes]:
    reply = await replica.post("/v1/x", b"", body, timeouts)
    return reply.status, await whole(reply)


async def whole(reply: Any) -> bytes:
    return b"".join([piece async for piece in pieces(reply)])


async def pieces(reply: Any) -> AsyncIterator[bytes]:
    while piece := await reply.read():
        yield piece


# TLS


def test_over_tls_answers_come_and_connections_are_used_again(run: Any, secure: ssl.SSLContext) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            body = await server.request(reader)
            writer.write(OK.replace(b"content-length: 2", b"content-length: %d" % len(body))[:-2] + body)

    server = Server(handle, secure)

    async def test() -> None:
        async with server.replica("https") as replica:
            for size in (2, 100_000, 3_000_000):
                body = b"x" * size
                assert await ask(replica, body) == (200, body)

    run(test())
    assert server.connections == 1


def test_over_tls_a_stream_comes_piece_by_piece(run: Any, secure: ssl.SSLContext) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(STREAM)
        for n in range(5):
            writer.write(chunked(b"data: %d\n\n" % n))
            await asyncio.sleep(0.02)
        writer.write(b"0\r\n\r\n")
        await reader.read()

    server = Server(handle, secure)

    async def test() -> None:
        async with server.replica("https") as replica:
            reply = await replica.post("/v1/x", b"", b"{}", QUICK)
            assert [piece async for piece in pieces(reply)] == [b"data: %d\n\n" % n for n in range(5)]

    run(test())


def test_a_certificate_of_nobody_we_trust_is_refused(
    run: Any, secure: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)

    server = Server(handle, secure)

    async def test() -> None:
        async with server.replica("https") as replica:
            with pytest.raises(Refused, match=r"(?i)certificate.*verif.*SSL_CERT_FILE"):
                await ask(replica)
            assert replica.is_down

    run(test())
    assert server.asked == []


def test_a_certificate_for_another_host_is_refused(run: Any, secure: ssl.SSLContext) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)

    server = Server(handle, secure)

    async def test() -> None:
        async with server.replica("https", "localhost") as replica:
            with pytest.raises(Refused, match=r"(?i)certificate"):
                await ask(replica)

    run(test())
    assert server.asked == []


def test_a_server_without_tls_behind_an_https_url_is_refused(run: Any, secure: ssl.SSLContext) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    async def test() -> None:
        async with Server(handle).replica("https") as replica:
            with pytest.raises(Refused):
                await ask(replica)

    run(test())


def test_a_server_with_tls_behind_an_http_url_is_an_error_at_once(run: Any, secure: ssl.SSLContext) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)

    server = Server(handle, secure)

    async def test() -> None:
        async with server.replica("http") as replica:
            with pytest.raises((Refused, Garbage)):
                await ask(replica)

    run(test())


def test_a_handshake_that_never_ends_is_given_up(run: Any, secure: ssl.SSLContext) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test() -> None:
        async with Server(handle).replica("https") as replica:
            with pytest.raises(TimedOut, match=r"within 0\.2 s"):
                await ask(replica, timeouts=Timeouts(connect=0.2))
            assert replica.in_flight == 0

    run(test())


# Early answers


@pytest.mark.parametrize("after", ["keeps it open", "closes"])
def test_an_answer_before_the_request_was_read_is_relayed_at_once(
    run: Any, secure: ssl.SSLContext, scheme: str, after: str
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if server.connections == 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n{  }")
            await writer.drain()
            await asyncio.sleep(0.3 if after == "closes" else 5)
        else:
            await server.request(reader)
            writer.write(OK)

    server = Server(handle, secure if scheme == "https" else None)

    async def test() -> None:
        async with server.replica(scheme) as replica:
            began = time.perf_counter()
            assert await ask(replica, b"x" * 30_000_000, Timeouts(1.0, 10.0, 10.0)) == (413, b"{  }")
            assert time.perf_counter() - began < 3
            if scheme == "http":  # over TLS the hand-written server takes in all that is sent
                assert await ask(replica) == (200, b"{}")
                assert server.connections == 2, "what was not sent stands in the way on the first connection"

    run(test())


def test_a_request_that_is_read_slowly_gets_there(run: Any, secure: ssl.SSLContext, scheme: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        await server.request(reader)
        writer.write(OK)

    server = Server(handle, secure if scheme == "https" else None)

    async def test() -> None:
        async with server.replica(scheme) as replica:
            assert await ask(replica, b"x" * 20_000_000, Timeouts(1.0, 10.0, 10.0)) == (200, b"{}")

    run(test())
    assert [len(body) for body in server.asked] == [20_000_000]


# Half-closed and raced


def test_a_server_that_will_say_no_more_after_its_answer_is_not_asked_again_there(run: Any) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)
        writer.write_eof()
        await reader.read()

    server = Server(handle)

    async def test() -> None:
        async with server.replica() as replica:
            for _ in range(3):
                assert await ask(replica) == (200, b"{}")
                await asyncio.sleep(0.05)

    run(test())
    assert server.connections == 3
    assert len(server.asked) == 3


@pytest.mark.parametrize("said", [b"", OK[:20], OK[:-1]], ids=["nothing", "half a head", "half a body"])
def test_a_server_that_half_closes_too_early_has_cut_its_answer(run: Any, said: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(said)
        writer.write_eof()
        await reader.read()

    server = Server(handle)

    async def test() -> None:
        async with server.replica() as replica:
            with pytest.raises(Cut if said else Refused):
                await ask(replica)
            assert replica.in_flight == 0

    run(test())


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_that_dies_as_it_is_used_again_is_replaced_and_the_request_sent_once(
    run: Any, secure: ssl.SSLContext, scheme: str, how: str
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)
        await reader.read(1)  # the next request has begun to come
        if how == "reset":
            writer.transport.abort()

    server = Server(handle, secure if scheme == "https" else None)

    async def test() -> None:
        async with server.replica(scheme) as replica:
            for n in range(4):
                assert await ask(replica, b"%d" % n) == (200, b"{}")

    run(test())
    assert server.asked == [b"0", b"1", b"2", b"3"]
    assert server.connections == 4


def test_a_server_that_always_closes_is_not_asked_for_ever(run: Any) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    server = Server(handle)

    async def test() -> None:
        async with server.replica() as replica:
            with pytest.raises(Refused, match="closed the connection without an answer"):
                await ask(replica)

    run(test())
    assert server.connections == 1


# Slow readers


class Slow:
    """A reader that is full until it is told otherwise."""

    def __init__(self) -> None:
        self.full = True
        self.on_full: Callable[[bool], None] | None = None

    def take(self) -> None:
        self.full = False
        assert self.on_full is not None
        self.on_full(False)


def test_a_server_is_held_up_by_a_slow_reader_and_nothing_is_lost(
    run: Any, secure: ssl.SSLContext, scheme: str
) -> None:
    piece, count, written = b"x" * 65_536, 600, [0]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(STREAM)
        for _ in range(count):
            writer.write(chunked(piece))
            await writer.drain()
            written[0] += len(piece)
        writer.write(b"0\r\n\r\n")
        await reader.read()

    server = Server(handle, secure if scheme == "https" else None)

    async def test() -> None:
        async with server.replica(scheme) as replica:
            reply = await replica.post("/v1/x", b"", b"{}", Timeouts(1.0, 1.0, 0.3))
            slow, got = Slow(), [0]

            def put(data: bytes) -> None:
                got[0] += len(data)

            relaying = asyncio.create_task(reply.relay(put, slow))
            await asyncio.sleep(1.0)  # longer than the upstream may be silent: but it is not the upstream
            held = written[0]
            assert held < count * len(piece) / 2, "what the system's buffers hold"
            await asyncio.sleep(0.2)
            assert written[0] == held
            slow.take()
            await relaying
            assert got[0] == count * len(piece)

    run(test())


# Back-off


def test_a_replica_that_cannot_be_reached_rests_longer_each_time_and_is_well_again_at_once(run: Any) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)

    server = Server(handle)

    async def test() -> None:
        async with server.replica() as replica:
            port, replica._port = replica._port, 9
            rests = []
            for _ in range(8):
                with pytest.raises(Refused):
                    await ask(replica)
                rests.append(replica.down_until - time.monotonic())
            assert rests == pytest.approx([0.5, 1, 2, 4, 8, 8, 8, 8], abs=0.1)
            replica._port = port
            assert await ask(replica) == (200, b"{}")
            assert not replica.is_down
            assert replica.failures == 0

    run(test())


def test_what_was_raised_keeps_nothing_of_the_request(run: Any) -> None:
    """The garbage collector comes seldom."""
    import gc

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(b"no HTTP at all\r\n\r\n")

    server = Server(handle)

    async def test() -> None:
        async with server.replica() as replica:
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    with contextlib.suppress(UpstreamError):
                        await ask(replica, b"x" * 100_000)
                await asyncio.sleep(0.05)
                assert [one for one in gc.get_objects() if isinstance(one, UpstreamError)] == []
            finally:
                gc.enable()

    run(test())
