"""The gateway behind servers that know nothing but ASGI: what clients and the journal see is the same to the byte."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import pytest
from conftest import Gateway, MakeGateway, ask
from fake_vllm import Behaviour, FakeVllm

from gateway.asgi import Plain

EVENT = (
    b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "\u65e5\u672c " * 400}}]}).encode() + b"\n\n"
)
OURS = ("x-request-id", "x-understudy-feedback-token", "server-timing", "date", "connection", "keep-alive")
"""Headers that differ by nature, or by server."""
ANSWERS: dict[str, Behaviour | None] = {
    "as it should": None,
    "an error's status": Behaviour("status", status=422),
    "cut in the middle": Behaviour("die_mid_stream", after=2),
    "every byte alone": Behaviour("split", data=b"event: a\r\ndata: \xff\xfe\r\n\r\ndata: {}\n\n: c\n\n\ndata: [DONE]"),
    "megabytes": Behaviour("split", data=EVENT * 500, offsets=tuple(range(60_001, 500 * len(EVENT), 60_001))),
    "no HTTP": Behaviour("garbage", data=b"hello\r\n\r\n"),
    "dropped": Behaviour("close_before_answer"),
    "cut in its body": Behaviour("die_mid_body"),
}


@pytest.fixture(params=["httptools", "h11"])
def pair(request: pytest.FixtureRequest, gateway: MakeGateway, fake: FakeVllm) -> tuple[Gateway, Gateway]:
    return gateway(fake), gateway(fake, http=request.param)


def said(gw: Gateway, fake: FakeVllm, how: Behaviour | None, asked: dict[str, Any]) -> Any:
    if how is not None:
        fake.script(how)
    found = gw.http.post("/v1/chat/completions", content=json.dumps(asked))
    own = gw.interaction(len(gw.interactions()) or 1)
    headers = {name: value for name, value in found.headers.items() if name not in OURS}
    body = re.sub(rb'"created":\d+', b"", found.content.replace(own.request_id.encode(), b"ID"))
    headers.pop("content-length", None)
    return found.status_code, headers, body, own.status, own.error, own.stream, own.answer


@pytest.mark.parametrize("how", ANSWERS)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_the_same(pair: tuple[Gateway, Gateway], fake: FakeVllm, how: str, stream: bool) -> None:
    asked = ask("Tell me.", stream=stream)
    ours, plain = (said(gw, fake, ANSWERS[how], asked) for gw in pair)
    assert ours == plain
    assert ours[0] != 200 or ours[2]


def test_a_connection_whose_last_piece_filled_the_client_can_be_used_again(
    pair: tuple[Gateway, Gateway], fake: FakeVllm
) -> None:
    for gw in pair:
        for _ in range(3):
            fake.script(Behaviour("split", data=EVENT * 40, offsets=tuple(range(60_001, 40 * len(EVENT), 60_001))))
            assert gw.http.post("/v1/chat/completions", json=ask("Tell me.", stream=True)).content == EVENT * 40
            assert gw.chat("And now?").status_code == 200
        assert len({one.connection for one in fake.asked()[-6:]}) == 1


def test_requests_sent_at_once_are_answered_in_their_order(pair: tuple[Gateway, Gateway], fake: FakeVllm) -> None:
    asked = [json.dumps(ask(f"Number {n}.", stream=n == 0)).encode() for n in range(3)]
    heads = [f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(one)}\r\n" for one in asked]
    heads[-1] += "connection: close\r\n"
    for gw in pair:
        fake.script(Behaviour("slow", delay=0.02))
        with socket.create_connection(("127.0.0.1", gw.port)) as wire:
            wire.sendall(b"".join(f"{head}\r\n".encode() + one for head, one in zip(heads, asked, strict=True)))
            found = b"".join(iter(lambda: wire.recv(65536), b""))
        assert found.count(b"HTTP/1.1 200 OK") == 3
        places = [found.index(text) for text in (b"data: [DONE]", b"Number 1.", b"Number 2.")]
        assert places == sorted(places)
        assert [one.stream for one in gw.wait_interactions(3)] == [True, False, False]


def test_an_answer_without_a_body_has_none_whatever_it_is_called(pair: tuple[Gateway, Gateway], fake: FakeVllm) -> None:
    for gw in pair:
        fake.script(Behaviour("status", status=204, headers={"content-type": "text/event-stream"}))
        body = json.dumps(ask()).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", gw.port)) as wire:
            wire.sendall(head.encode() + body)
            found = b"".join(iter(lambda: wire.recv(65536), b""))
        assert found.startswith(b"HTTP/1.1 204")
        assert found.endswith(b"\r\n\r\n")
        assert b"chunked" not in found


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("broken")])
def test_a_server_that_cannot_send_is_told_of_and_gets_no_more(error: Exception) -> None:
    async def tried() -> tuple[list[bytes], list[str]]:
        sent: list[bytes] = []
        told: list[str] = []

        async def send(message: Any) -> None:
            if message.get("body") == b"two":
                raise error
            sent.append(message.get("body", b"head"))

        async def receive() -> Any:
            await asyncio.Event().wait()

        client = Plain(receive, send)
        client.leaving(lambda: told.append("left"))
        client.on_full = lambda full: told.append("full" if full else "free")
        client.begin(200, [])
        client.write(b"one")
        client.write(b"two")
        client.write(b"x" * 100_000)
        for _ in range(9):
            await asyncio.sleep(0)
        client.write(b"more")
        client.end()
        try:
            await client.finish()
        except RuntimeError:
            told.append("raised")
        return sent, told

    sent, told = asyncio.run(tried())
    assert sent == [b"head", b"one"]
    assert told == ["full", "free", "left"] + ["raised"] * isinstance(error, RuntimeError)


def test_a_client_that_leaves_stops_the_upstream(pair: tuple[Gateway, Gateway], fake: FakeVllm) -> None:
    for gw in pair:
        fake.script(Behaviour("slow", delay=0.05))
        n = len(fake.requests)
        body = json.dumps(ask("Tell me.", stream=True)).encode()
        with socket.create_connection(("127.0.0.1", gw.port)) as wire:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            wire.sendall(head.encode() + body)
            assert wire.recv(1000).startswith(b"HTTP/1.1 200")
        fake.wait_for(lambda n=n: len(fake.requests) > n and fake.requests[n].aborted)
        assert gw.interaction().error == "client_left"
