"""Wherever an upstream's stream is split, and wherever it breaks, its events arrive unharmed: every byte is tried.

As vLLM frames events (LF) and as others do (CRLF). Over sockets the fake waits between its writes, so that the gateway
reads the pieces apart; `test_streams.py` tries streams of every kind.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from conftest import ROUTE, Gateway, ask, eventually
from fake_vllm import Behaviour, FakeVllm, dumps

from gateway.openai import UsageFilter, read_stream
from telemetry.events import Interaction

APART = 0.0005
"""Seconds between two writes of the fake."""
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
LF, CRLF = b"\n\n", b"\r\n\r\n"


def chunk(**fields: Any) -> bytes:
    return b"data: " + dumps({"id": "c", **fields})


def delta(**said: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said}]}


CALL = {"index": 0, "id": "1", "function": {"name": "f", "arguments": ""}}
MORE_OF_CALL = {"index": 0, "function": {"name": None, "arguments": '{"q":"né'}}
TEXT = chunk(**delta(content="né日👩‍🚀"))
ONLY_USAGE = chunk(choices=[], usage=USAGE)
END = b"data: [DONE]"
EVENTS = (
    TEXT,
    chunk(**delta(tool_calls=[CALL])),
    chunk(**delta(tool_calls=[MORE_OF_CALL]), usage={}),  # with choices: not the one to be taken out
    b": keep-alive",
    ONLY_USAGE,
    END,
)


def test_a_word_that_is_a_nul_takes_no_other_place() -> None:
    def event(model: str, word: str) -> bytes:
        return chunk(model=model, choices=[{"index": 0, "delta": {"content": word}}]) + LF

    said = event("a", "Hi ") + event("\0", "\0") + event("SECRET", "\0")
    assert read_stream(said).text == "Hi \0\0"


def framed(events: tuple[bytes, ...], blank: bytes, asked: bool = True) -> bytes:
    """A stream of these events, without the usage chunk if that was not asked for."""
    return b"".join(event + blank for event in events if asked or event != ONLY_USAGE)


@dataclass
class Line:
    """A gateway with its upstream, and one client's connection to it."""

    gw: Gateway
    fake: FakeVllm
    wire: http.client.HTTPConnection

    asked: list[str] = field(default_factory=list)
    """The ids of its requests whose facts were not looked at."""

    def chat(self, asked: bool) -> bytes:
        self.wire.request("POST", "/v1/chat/completions", request(asked))
        said = self.wire.getresponse()
        assert said.status == 200
        self.asked.append(said.headers["x-request-id"])
        return said.read()

    def facts(self) -> list[Interaction]:
        """The interactions of the latest requests, one each."""
        ids, self.asked = self.asked, []

        def found() -> list[Interaction]:
            return [fact for fact in self.gw.interactions() if fact.request_id in ids]

        eventually(lambda: {fact.request_id for fact in found()} == set(ids))
        assert sorted(fact.request_id for fact in found()) == sorted(ids)
        return found()


def request(asked: bool) -> bytes:
    return dumps(ask(stream=True, stream_options={"include_usage": asked}))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeVllm]]:
    folder = tmp_path_factory.mktemp("framing")
    config = folder / "understudy.yaml"
    with FakeVllm(["base"]) as fake:
        config.write_text(
            f"state: sqlite:////{str(folder).lstrip('/')}/state.db\n"
            f"routes: {{{ROUTE}: {{upstreams: ['{fake.url}'], arms: {{champion: {{model: base}}}}}}}}\n"
        )
        gw = Gateway(config).start()
        yield gw, fake
        gw.stop()


@pytest.fixture
def line(served: tuple[Gateway, FakeVllm]) -> Iterator[Line]:
    gw, fake = served
    fake.clear()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", gw.port, timeout=20)) as wire:
        yield Line(gw, fake, wire)


BLANKS = pytest.mark.parametrize("blank", [LF, CRLF], ids=["LF", "CRLF"])
EACH_WAY = pytest.mark.parametrize(
    ("blank", "asked"),
    [(LF, False), (LF, True), (CRLF, False)],
    ids=["LF, usage not asked for", "LF, usage asked for", "CRLF, usage not asked for"],
)


# The filter alone


@BLANKS
def test_the_usage_chunk_and_nothing_else_is_taken_out_at_every_split_in_three(blank: bytes) -> None:
    events = (TEXT, ONLY_USAGE, END)
    data, expected = framed(events, blank), framed(events, blank, asked=False)
    for a, b in itertools.combinations_with_replacement(range(len(data) + 1), 2):
        usage = UsageFilter()
        assert b"".join([*map(usage.feed, (data[:a], data[a:b], data[b:])), usage.end()]) == expected, (a, b)


@BLANKS
def test_an_event_leaves_the_filter_with_its_last_byte(blank: bytes) -> None:
    data = framed(EVENTS[:2], blank)
    first = len(EVENTS[0] + blank)
    usage = UsageFilter()
    left = list(itertools.accumulate(len(usage.feed(data[at : at + 1])) for at in range(len(data))))
    assert left == [0] * (first - 1) + [first] * (len(data) - first) + [len(data)]


def test_a_comment_of_other_framing_does_not_hide_the_usage_chunk() -> None:
    usage = UsageFilter()
    sent = b": keep-alive\n\n" + framed((TEXT, ONLY_USAGE, END), CRLF)
    assert usage.feed(sent) + usage.end() == b": keep-alive\n\n" + framed((TEXT, END), CRLF)


# Over sockets


@EACH_WAY
def test_a_stream_split_at_any_byte_arrives_byte_for_byte_and_is_read_right(
    line: Line, blank: bytes, asked: bool
) -> None:
    data, expected = framed(EVENTS, blank), framed(EVENTS, blank, asked)
    for at in range(1, len(data)):
        line.fake.script(Behaviour("split", data=data, offsets=(at,), delay=APART))
        assert line.chat(asked) == expected, at
    for fact in line.facts():
        assert (fact.error, fact.status, fact.stream, fact.answer) == (None, 200, True, "né日👩‍🚀")
        assert (fact.tokens_in, fact.tokens_out) == (3, 4)
        assert [(c["name"], c["arguments"]) for c in fact.tool_calls] == [("f", '{"q":"né')]


@EACH_WAY
def test_a_stream_cut_at_any_byte_ends_in_an_error_event(line: Line, blank: bytes, asked: bool) -> None:
    data = framed((TEXT, ONLY_USAGE, END), blank)
    for at in range(1, data.index(END) + 1):
        came, last = broken(line, data[:at], asked).rsplit(b"data: ", 1)
        assert json.loads(last)["error"]["code"] == "upstream_cut", at
        assert last.endswith(b"}\n\n")
        if asked:
            assert came == data[:at] + b"\n\n", at  # what was sent is ended by the blank line
        else:
            whole, ended, _ = data[:at].rpartition(blank)
            assert came == (whole + ended).replace(ONLY_USAGE + blank, b""), at  # half an event is dropped
    assert {(f.error, f.status, f.finish_reason) for f in line.facts()} == {("upstream_cut", 200, "error")}


def broken(line: Line, sent: bytes, asked: bool) -> bytes:
    """What the client gets when the upstream sends this much of a stream and dies."""
    line.fake.script(Behaviour("garbage", data=STREAM_HEAD + b"%x\r\n%b\r\n" % (len(sent), sent)))
    return line.chat(asked)


@BLANKS
def test_the_openai_client_raises_our_error_wherever_a_stream_was_cut(line: Line, blank: bytes) -> None:
    data = framed((TEXT, ONLY_USAGE), blank)
    for at in (1, 20, data.index("日".encode()) + 1, len(TEXT) + 1, len(TEXT + blank), len(data)):
        line.fake.script(Behaviour("garbage", data=STREAM_HEAD + b"%x\r\n%b\r\n" % (at, data[:at])))
        with pytest.raises(openai.APIError) as raised:
            list(line.gw.client().chat.completions.create(**ask(), stream=True))
        assert raised.value.code == "upstream_cut", at


@pytest.mark.parametrize("asked", [True, False])
def test_a_client_slower_than_a_long_stream_gets_it_whole(line: Line, asked: bool) -> None:
    events = (*(chunk(**delta(content=f"{n} " + "日" * 4000)) for n in range(400)), ONLY_USAGE, END)
    data = framed(events, LF)
    assert len(data) > 4 * 1024 * 1024, "more than the gateway's copy holds"
    line.fake.script(Behaviour("raw_stream", data=data))
    body = request(asked)
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", line.gw.port))
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        said = http.client.HTTPResponse(wire, method="POST")
        said.begin()
        assert b"".join(iter(lambda: said.read(8192), b"")) == framed(events, LF, asked)
    line.asked = [said.headers["x-request-id"]]
    (fact,) = line.facts()
    assert (fact.error, fact.status) == (None, 200)
    assert fact.answer is not None
    assert fact.answer.startswith("0 日")
