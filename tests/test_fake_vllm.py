"""The fake is a server like another: the real openai client and http.client must find vLLM in it."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from fake_vllm import Behaviour, FakeVllm, answer_text, vector
from openai import APIStatusError, InternalServerError, NotFoundError, OpenAI, RateLimitError

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm(["base", "good", "bad"]) as server:
        yield server


@pytest.fixture
def client(fake: FakeVllm) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0, timeout=5) as openai:
        yield openai


def connect(fake: FakeVllm) -> "closing[http.client.HTTPConnection]":
    return closing(http.client.HTTPConnection("127.0.0.1", fake.port, timeout=5))


def ask(connection: http.client.HTTPConnection, said: str = "hello", **fields: object) -> http.client.HTTPResponse:
    body = {"model": "good", "messages": [{"role": "user", "content": said}], **fields}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"X-Request-Id": "abc"})
    return connection.getresponse()


def test_a_chat_carries_our_request_id_and_the_models_words(fake: FakeVllm, client: OpenAI) -> None:
    answer = client.chat.completions.create(model="good", messages=HELLO, extra_headers={"X-Request-Id": "abc"})
    assert answer.id == "chatcmpl-abc"
    assert answer.choices[0].message.content == answer_text("good", "hello")
    assert fake.requests[0].json["messages"] == HELLO
    assert fake.requests[0].headers["x-stainless-retry-count"] == "0"


def test_an_empty_model_is_served_by_the_base(client: OpenAI) -> None:
    assert client.chat.completions.create(model="", messages=HELLO).model == "base"


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_ends_in_a_usage_chunk_only_when_asked(client: OpenAI, usage: bool) -> None:
    options: Any = {"include_usage": True} if usage else None
    with client.chat.completions.create(model="bad", messages=HELLO, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer_text("bad", "hello")
    assert [bool(c.usage) for c in chunks if not c.choices] == [True] * usage


def test_tools_are_called_in_deltas_that_carry_an_index(client: OpenAI) -> None:
    with client.chat.completions.create(model="good", messages=HELLO, stream=True, tools=[TOOL]) as stream:
        choices = [c.choices[0] for c in stream]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert {call.index for call in calls} == {0}
    assert calls[0].function
    assert calls[0].function.name == "look_up"
    assert json.loads("".join((c.function and c.function.arguments) or "" for c in calls)) == {"q": "hello"}
    assert choices[-1].finish_reason == "tool_calls"


def test_reasoning_comes_in_its_own_field(client: OpenAI) -> None:
    asked: Any = [{"role": "user", "content": "!reasoning:"}]
    with client.chat.completions.create(model="good", messages=asked, stream=True) as stream:
        thought = [c.choices[0].delta.model_extra or {} for c in stream]
    assert "".join(t.get("reasoning", "") for t in thought) == Behaviour().text


def test_embeddings_are_equal_as_floats_and_as_base64(fake: FakeVllm, client: OpenAI) -> None:
    implicit = client.embeddings.create(model="base", input=["a", "日"])
    plain = client.embeddings.create(model="base", input=["a", "日"], encoding_format="float")
    assert fake.requests[0].json["encoding_format"] == "base64"
    assert [d.embedding for d in implicit.data] == [d.embedding for d in plain.data]
    assert plain.data[1].embedding == vector("base", "日")


def test_completions_and_responses_answer_and_stream(client: OpenAI) -> None:
    assert client.completions.create(model="good", prompt="hello").choices[0].text == answer_text("good", "hello")
    with client.completions.create(model="good", prompt="hello", stream=True) as parts:
        assert "".join(p.choices[0].text for p in parts) == answer_text("good", "hello")
    answer = client.responses.create(model="good", input="hello", extra_headers={"X-Request-Id": "r"})
    assert (answer.id, answer.output_text) == ("resp_r", answer_text("good", "hello"))
    with client.responses.create(model="good", input="hello", stream=True) as events:
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text


def test_an_unknown_model_is_not_found_as_vllm_says_it(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=HELLO)
    body: Any = caught.value.body
    assert (body["type"], body["param"], body["code"]) == ("NotFoundError", "model", 404)


def test_pages_answer_and_take_only_behaviours_meant_for_them(fake: FakeVllm, client: OpenAI) -> None:
    fake.script(Behaviour("status", status=503), Behaviour("status", path="/health"))
    assert [m.id for m in client.models.list()] == ["base", "good", "bad"]
    with connect(fake) as connection:
        statuses = []
        for path in ("/health", "/health", "/metrics"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
    assert statuses == [500, 200, 200]
    with pytest.raises(InternalServerError):
        client.chat.completions.create(model="good", messages=HELLO)


def test_a_scripted_status_keeps_its_headers_and_is_used_up(fake: FakeVllm, client: OpenAI) -> None:
    fake.script(Behaviour("status", status=429, headers={"Retry-After": "7"}))
    with pytest.raises(RateLimitError) as caught:
        client.chat.completions.create(model="good", messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "7"
    client.chat.completions.create(model="good", messages=HELLO)


def test_a_message_can_ask_for_a_status(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(model="good", messages=[{"role": "user", "content": "!status:418 x"}])
    assert caught.value.status_code == 418


def test_a_stream_that_dies_has_no_end(fake: FakeVllm) -> None:
    with connect(fake) as connection:
        answer = ask(connection, "!die_mid_stream:3", stream=True)
        with pytest.raises(http.client.IncompleteRead) as caught:
            answer.read()
    assert caught.value.partial.count(b"data: ") == 3


def test_a_body_that_dies_is_shorter_than_it_said(fake: FakeVllm) -> None:
    with connect(fake) as connection, pytest.raises(http.client.IncompleteRead):
        ask(connection, "!die_mid_body:").read()


def test_an_error_in_a_stream_comes_as_a_chunk_after_200(fake: FakeVllm) -> None:
    with connect(fake) as connection:
        answer = ask(connection, "!error_chunk_mid_stream:1", stream=True)
        *_, failure, done, rest = answer.read().split(b"\n\n")
    assert answer.status == 200
    assert json.loads(failure.removeprefix(b"data: "))["error"]["code"] == 500
    assert (done, rest) == (b"data: [DONE]", b"")


@pytest.mark.parametrize("kind", ["hang_before_first_byte", "hang_mid_stream"])
def test_a_client_that_leaves_is_recorded_as_an_abort(fake: FakeVllm, kind: str) -> None:
    body = json.dumps({"model": "good", "stream": True, "prompt": f"!{kind}:"}).encode()
    with socket.create_connection(("127.0.0.1", fake.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        fake.wait_for(lambda: fake.hanging == 1)
        assert not fake.requests[0].ended.is_set()
    assert fake.requests[0].ended.wait(5)
    assert fake.requests[0].aborted
    assert fake.hanging == 0


def test_a_released_request_gets_its_answer(fake: FakeVllm) -> None:
    fake.script(Behaviour("hang_mid_stream", after=0))
    with connect(fake) as connection:
        answer = ask(connection, stream=True)
        fake.wait_for(lambda: fake.hanging == 1)
        fake.release()
        assert answer.read().endswith(b"data: [DONE]\n\n")
    fake.wait_for(fake.requests[0].ended.is_set)
    assert not fake.requests[0].aborted


@pytest.mark.parametrize("kind", ["refuse", "close_before_answer"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_closed_door_is_felt_and_then_open_again(fake: FakeVllm, kind: Any, reset: bool) -> None:
    fake.script(Behaviour(kind, reset=reset))
    with connect(fake) as connection:
        with pytest.raises(ConnectionError):
            ask(connection)
        connection.close()
        assert ask(connection).status == 200
    assert fake.refused == (kind == "refuse")
    assert len(fake.requests) == 2 - fake.refused


def test_garbage_is_no_http_and_bad_json_no_json(fake: FakeVllm) -> None:
    with connect(fake) as connection, pytest.raises(http.client.BadStatusLine):
        ask(connection, "!garbage:")
    with connect(fake) as connection, pytest.raises(json.JSONDecodeError):
        json.loads(ask(connection, "!bad_json:").read())


def test_split_and_raw_bodies_arrive_byte_for_byte(fake: FakeVllm) -> None:
    raw = 'data: {"日":"🙂"}\r\n\r\ndata: [DONE]\n\n'.encode()
    fake.script(Behaviour("split", data=raw, offsets=(8, 9, 14)), Behaviour("raw_stream", data=raw))
    with connect(fake) as connection:
        assert ask(connection, stream=True).read() == raw
        assert ask(connection, stream=True).read() == raw
        assert answer_text("good", "!split:").encode() in ask(connection, "!split:").read()
    assert {r.connection for r in fake.requests} == {1}


def test_a_split_body_is_one_http_chunk_a_piece(fake: FakeVllm) -> None:
    fake.script(Behaviour("split", data=b"abcde", offsets=(1, 3)))
    with socket.create_connection(("127.0.0.1", fake.port)) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        connection.sendall(head + b"2\r\n{}\r\n0\r\n\r\n")
        with connection.makefile("rb") as answer:
            assert answer.read().endswith(b"\r\n\r\n1\r\na\r\n2\r\nbc\r\n2\r\nde\r\n0\r\n\r\n")
    assert fake.requests[0].body == b"{}"


@pytest.mark.parametrize("when_reused", [False, True])
def test_a_kept_alive_connection_can_turn_out_closed(fake: FakeVllm, when_reused: bool) -> None:
    fake.script(Behaviour("early_close_keepalive", when_reused=when_reused))
    with connect(fake) as connection:
        answer = ask(connection)
        assert answer.getheader("connection") is None
        assert json.loads(answer.read())["model"] == "good"
        if not when_reused:
            fake.wait_for(lambda: fake.connections == 0)
        with pytest.raises(ConnectionError):
            ask(connection)
    assert len(fake.requests) == 1


def test_a_restart_keeps_the_port(fake: FakeVllm) -> None:
    fake.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", fake.port))
    fake.start()
    with connect(fake) as connection:
        assert ask(connection).status == 200
