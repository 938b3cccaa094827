"""Byte identity: whatever the upstream streams, in whatever pieces, the client gets the same bytes (hypothesis).

One thing may be missing: the usage chunk, where the app did not ask for it. The model of that is here in its
simplest form, a list of events with one left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from conftest import ROUTE, Gateway, ask
from fake_vllm import Behaviour, FakeVllm, dumps
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.openai import UsageFilter, read_stream

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "base"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
OVER_SOCKETS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PURE = settings(max_examples=300, deadline=None)

TEXT = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [
            "é🙂日本語",
            "👩‍🚀",
            "\r\n\r\n",
            "\n\n",
            "\\n\\n",
            "data: ",
            "data: [DONE]\n\n",
            '"usage"',
            '"choices":[]',
            "\u2028\0",
        ]
    ),
)


@dataclass(frozen=True)
class Stream:
    events: tuple[bytes, ...]
    dropped: frozenset[int] = frozenset()  # which of them are usage chunks that only we asked for

    @property
    def whole(self) -> bytes:
        return b"".join(self.events)

    @property
    def without_usage(self) -> bytes:
        return b"".join(event for i, event in enumerate(self.events) if i not in self.dropped)

    def expected(self, usage: bool) -> bytes:
        return self.whole if usage else self.without_usage


def encoded(value: dict[str, Any], plain: bool) -> bytes:
    """As vLLM writes JSON, or as Python's own json does, with spaces and escapes."""
    return dumps(value) if plain else json.dumps(value).encode()


def call(name: str | None, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments} if name is not None else {"arguments": arguments}
    return {"tool_calls": [{"index": 0, "type": "function", "function": function}]}


DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, TEXT),
    st.builds(lambda text: {"role": "assistant", "content": "", "reasoning": text}, TEXT),
    st.builds(call, st.one_of(st.none(), TEXT), TEXT),
    st.just({}),
)
COMMENTS = st.sampled_from(
    [b": keep-alive\n\n", b":\n\n", b': "usage" "choices":[]\n\n', b"event: ping\n\n", b"retry: 10\n\n"]
)


@st.composite
def chunks(draw: st.DrawFn) -> bytes:
    choice = {"index": draw(st.integers(0, 1)), "delta": draw(DELTAS), "logprobs": None, "finish_reason": None}
    value: dict[str, Any] = HEAD | {"choices": [choice]}
    if draw(st.booleans()):  # as vLLM with continuous usage: it has choices, so it stays
        value |= {"usage": draw(st.sampled_from([None, USAGE]))}
    return b"data: " + encoded(value, draw(st.booleans())) + b"\n\n"


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """As vLLM frames them: blank lines between events, comments anywhere, a usage chunk near the end."""
    events = draw(st.lists(st.one_of(chunks(), chunks(), COMMENTS), max_size=6))
    dropped = frozenset[int]()
    if draw(st.booleans()):
        dropped = frozenset([len(events)])
        events.append(b"data: " + dumps(HEAD | {"choices": [], "usage": USAGE}) + b"\n\n")
    events += draw(st.sampled_from([[], [b"data: [DONE]\n\n"], [b": bye\n\n", b"data: [DONE]\n\n"], [b"data: half"]]))
    return Stream(tuple(events), dropped)


FOREIGN = st.one_of(
    # CRLF framing, and mixtures: passed on as they are, with or without usage.
    st.lists(chunks(), min_size=1, max_size=5).map(lambda found: b"".join(found).replace(b"\n\n", b"\r\n\r\n")),
    st.lists(st.sampled_from([b"data: 1", b"\r\n", b"\n", b"\r", b": c", "é".encode(), b"\x80"]), max_size=12).map(
        b"".join
    ),
    st.lists(TEXT, max_size=5).map(lambda found: "".join(found).encode("utf-8", "replace")),
    st.binary(max_size=60),
)


def cut(data: bytes, at: tuple[int, ...]) -> list[bytes]:
    return [data[a:b] for a, b in pairwise([0, *at, len(data)])]


def cuts(draw: st.DrawFn, data: bytes) -> tuple[int, ...]:
    """Where to cut: nowhere, after every byte, or anywhere."""
    if len(data) < 2 or draw(st.booleans()):
        return tuple(range(1, len(data))) if draw(st.booleans()) else ()
    return tuple(sorted(draw(st.sets(st.integers(1, len(data) - 1), min_size=1, max_size=8))))


# The filter alone: thousands of splits in no time


def filtered(pieces: list[bytes]) -> bytes:
    usage = UsageFilter()
    return b"".join([*map(usage.feed, pieces), usage.end()])


@PURE
@given(streams(), st.data())
def test_the_filter_takes_out_the_usage_chunk_and_nothing_else(stream: Stream, data: st.DataObject) -> None:
    at = data.draw(st.composite(cuts)(stream.whole))
    assert filtered(cut(stream.whole, at)) == stream.without_usage


@PURE
@given(st.one_of(FOREIGN, streams().filter(lambda s: not s.dropped).map(lambda s: s.whole)), st.data())
@example(b"data: 1\n\r\n\n\r\n\r\n", None)
def test_the_filter_changes_nothing_else_at_all(content: bytes, data: st.DataObject | None) -> None:
    at = data.draw(st.composite(cuts)(content)) if data is not None else tuple(range(1, len(content)))
    assert filtered(cut(content, at)) == content


@PURE
@given(streams(), st.data())
def test_a_whole_event_is_never_held_back(stream: Stream, data: st.DataObject) -> None:
    usage, fed, left = UsageFilter(), b"", b""
    for piece in cut(stream.whole, data.draw(st.composite(cuts)(stream.whole))):
        fed += piece
        left += usage.feed(piece)
        whole = fed[: fed.rfind(b"\n\n") + 2] if b"\n\n" in fed else b""
        due = stream.without_usage[: len(left)]
        assert left == due
        # All that is not left yet is half an event, or the usage chunk.
        assert len(whole) - len(left) <= len(stream.whole) - len(stream.without_usage)


@PURE
@given(st.lists(st.text(max_size=8), max_size=6), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_the_journals_reading_of_a_stream_is_what_the_client_reads(texts: list[str], end: bytes) -> None:
    events = [b"data: " + dumps(HEAD | {"choices": [{"index": 0, "delta": {"content": t}}]}) + end for t in texts]
    assert read_stream(b"".join([*events, b"data: [DONE]", end])).text == "".join(texts)


# Over sockets


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeVllm]]:
    """One gateway for all examples."""
    folder = tmp_path_factory.mktemp("streams")
    config = folder / "understudy.yaml"
    with FakeVllm(["base"]) as fake:
        route = {"upstreams": [fake.url], "arms": {"champion": {"model": "base"}}}
        state = f"sqlite:////{str(folder).lstrip('/')}/state.db"
        config.write_text(json.dumps({"state": state, "routes": {ROUTE: route}}))
        gw = Gateway(config).start()
        yield gw, fake
        gw.stop()


def relayed(served: tuple[Gateway, FakeVllm], data: bytes, at: tuple[int, ...], usage: bool) -> bytes:
    """What the client gets of `data`, sent by the upstream in chunks cut at `at`."""
    gw, fake = served
    whole = Behaviour("raw_stream", data=data)
    fake.script(Behaviour("split", data=data, offsets=at) if at else whole)
    said = gw.chat(stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))
    assert said.status_code == 200
    assert said.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert fake.requests[-1].json["stream_options"]["include_usage"] is True
    return said.content


@OVER_SOCKETS
@given(stream=streams(), usage=st.booleans(), data=st.data())
def test_a_stream_is_relayed_byte_for_byte(
    served: tuple[Gateway, FakeVllm], stream: Stream, usage: bool, data: st.DataObject
) -> None:
    at = data.draw(st.composite(cuts)(stream.whole))
    assert relayed(served, stream.whole, at, usage) == stream.expected(usage)


@OVER_SOCKETS
@given(content=FOREIGN, usage=st.booleans(), data=st.data())
def test_any_bytes_at_all_are_relayed_as_they_are(
    served: tuple[Gateway, FakeVllm], content: bytes, usage: bool, data: st.DataObject
) -> None:
    at = data.draw(st.composite(cuts)(content))
    assert relayed(served, content, at, usage) == content


@pytest.mark.parametrize("usage", [False, True])
def test_several_events_in_one_piece_with_the_usage_chunk_among_them(
    served: tuple[Gateway, FakeVllm], usage: bool
) -> None:
    deltas = [{"content": "é🙂"}, call("search", ""), call(None, '{"q": "日'), call(None, '本"}')]
    events = [b"data: " + dumps(HEAD | {"choices": [{"index": 0, "delta": d}]}) + b"\n\n" for d in deltas]
    events.append(b"data: " + dumps(HEAD | {"choices": [], "usage": USAGE}) + b"\n\n")
    stream = Stream((*events, b": bye\n\n", b"data: [DONE]\n\n"), frozenset([len(deltas)]))
    data = stream.whole
    for at in ((), tuple(range(1, len(data))), (data.index(b'"usage"') + 3,), (data.index("🙂".encode()) + 2,)):
        assert relayed(served, data, at, usage) == stream.expected(usage)


def test_a_stream_of_many_megabytes_is_relayed_whole(served: tuple[Gateway, FakeVllm]) -> None:
    event = b"data: " + dumps(HEAD | {"choices": [{"index": 0, "delta": {"content": "日本語" * 500}}]}) + b"\n\n"
    data = event * 2000 + b"data: [DONE]\n\n"
    at = tuple(range(60_001, len(data), 60_001))
    assert relayed(served, data, at, False) == data


@pytest.mark.parametrize(
    ("path", "asked"), [("responses", {"input": "x"}), ("completions", {"prompt": "x"}), ("chat/completions", ask())]
)
def test_every_endpoints_stream_of_strange_bytes_is_relayed(
    served: tuple[Gateway, FakeVllm], path: str, asked: dict[str, Any]
) -> None:
    gw, fake = served
    data = b"event: a\r\ndata: \xff\xfe\r\n\r\nevent: b\ndata: {}\n\n: c\n\n\ndata: [DONE]"
    fake.script(Behaviour("split", data=data))
    said = gw.http.post(f"/v1/{path}", json=asked | {"model": ROUTE, "stream": True})
    assert said.content == data
