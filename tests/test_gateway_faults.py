"""What an app sees, and what is journaled, when something goes wrong: the upstream, the client, or the input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import ROUTE, Gateway, MakeGateway, ask, eventually
from fake_vllm import DONE, Behaviour, FakeVllm, dumps, error

from gateway.asgi import read_body
from gateway.http import protocol
from gateway.openai import ApiError
from telemetry.events import Interaction

MAX_BODY, MAX_HEAD = 64 * 1024, 8 * 1024
FAST = {"connect": "300ms", "first_byte": "300ms", "idle": "300ms"}
BOTH = pytest.mark.parametrize("stream", [False, True])


class House:
    """One gateway and its upstreams for many tests. What each test leaves is checked at the end, too."""

    def __init__(self, gw: Gateway, *fakes: FakeVllm) -> None:
        self.gw = gw
        self.fakes = fakes
        self.fake = fakes[0]
        self._spans: list[tuple[str, float, float, int]] = []

    @contextlib.contextmanager
    def leaves(self) -> Iterator[Callable[[], Interaction]]:
        """The requests made inside leave one interaction, no more: given by the callable, afterwards."""
        began = time.time()
        yield lambda: eventually(lambda: next(iter(self._between(began, ended)), None))
        ended = time.time()
        self._spans.append((os.environ["PYTEST_CURRENT_TEST"], began, ended, 1))

    @contextlib.contextmanager
    def leaves_nothing(self) -> Iterator[None]:
        """What happens inside neither reaches an upstream nor the journal."""
        began, asked = time.time(), len(self.fake.requests)
        yield
        assert len(self.fake.requests) == asked
        self._spans.append((os.environ["PYTEST_CURRENT_TEST"], began, time.time(), 0))

    def _between(self, began: float, ended: float) -> list[Interaction]:
        return [fact for fact in self.gw.interactions() if began <= fact.at <= ended]

    def close(self) -> None:
        self.gw.stop()
        facts = self.gw.interactions()
        found = [(test, sum(began <= f.at <= ended for f in facts)) for test, began, ended, _ in self._spans]
        assert found == [(test, n) for test, _, _, n in self._spans]

    def raw(self, data: bytes) -> httpx.Response:
        """The answer to these very bytes."""
        return raw(self.gw.port, data)


@contextlib.contextmanager
def opened(
    folder: Path, upstreams: int = 1, timeouts: dict[str, str] | None = None, **limits: float
) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        fakes = [stack.enter_context(FakeVllm(["base"])) for _ in range(upstreams)]
        route = {
            "upstreams": [f.url for f in fakes],
            "arms": {"champion": {"model": "base"}},
            "timeouts": timeouts or {},
        }
        state = f"sqlite:////{str(folder).lstrip('/')}/state.db"
        listen = {"max_body": MAX_BODY, "max_header_bytes": MAX_HEAD}
        (folder / "understudy.yaml").write_text(
            json.dumps({"state": state, "listen": listen, "routes": {ROUTE: route}})
        )
        gw = Gateway(folder / "understudy.yaml")
        gw._server.config.http = protocol(MAX_HEAD, **limits)
        house = House(gw.start(), *fakes)
        stack.callback(house.close)
        yield house


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with opened(tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """With short timeouts towards the upstream and towards the client."""
    with opened(tmp_path_factory.mktemp("impatient"), timeouts=FAST, head_seconds=0.2, stall_seconds=0.3) as house:
        yield house


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """With two replicas."""
    with opened(tmp_path_factory.mktemp("pair"), 2, timeouts={"first_byte": "1s"}) as house:
        yield house


@pytest.fixture(autouse=True)
def _unscripted(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"house", "impatient", "pair"} & set(request.fixturenames):
        for fake in request.getfixturevalue(name).fakes:
            fake.clear()


def raw(port: int, data: bytes) -> httpx.Response:
    with socket.create_connection(("127.0.0.1", port), 10) as wire:
        wire.sendall(data)
        return answer(wire)


def answer(wire: socket.socket) -> httpx.Response:
    """The next answer with a content-length."""
    with wire.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = [line.rstrip().split(b": ", 1) for line in iter(file.readline, b"\r\n")]
        said = httpx.Headers([(k, v) for k, v in headers])
        return httpx.Response(status, headers=said, content=file.read(int(said["content-length"])))


def request(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def openai_error(said: httpx.Response) -> dict[str, Any]:
    """The error, checked to be shaped as OpenAI's."""
    assert said.headers["content-type"] == "application/json"
    body = said.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


def only(gw: Gateway) -> Interaction:
    """The one interaction of a gateway, which is stopped to be sure that no other follows."""
    gw.interaction()
    gw.stop()
    (fact,) = gw.interactions()
    return fact


def events(content: bytes) -> list[bytes]:
    return [event for event in content.split(b"\n\n") if event]


# Upstream faults


@BOTH
def test_nobody_listens(gateway: MakeGateway, stream: bool) -> None:
    with socket.socket() as bound:  # and so nobody else listens there
        bound.bind(("127.0.0.1", 0))
        gw = gateway(f"http://127.0.0.1:{bound.getsockname()[1]}")
        said = gw.chat(stream=stream)
    assert (said.status_code, openai_error(said)["code"]) == (502, "upstream_refused")
    fact = only(gw)
    assert (fact.error, fact.status, fact.finish_reason, fact.attempts) == ("upstream_refused", 502, "error", 1)
    assert said.headers["x-request-id"] == fact.request_id


@BOTH
def test_the_connection_is_dropped_at_accept(gateway: MakeGateway, fake: FakeVllm, stream: bool) -> None:
    fake.script(Behaviour("refuse", reset=True))
    gw = gateway(fake)
    assert gw.chat(stream=stream).status_code == 502
    assert only(gw).error == "upstream_refused"


def test_no_connection_within_the_time_allowed(gateway: MakeGateway) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # the system drops further SYNs once its queue is full
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        gw = gateway(f"http://127.0.0.1:{full.getsockname()[1]}", timeouts=FAST)
        said = gw.chat()
        assert (said.status_code, openai_error(said)["code"]) == (504, "upstream_timeout")
        fact = only(gw)
    assert (fact.error, fact.status) == ("upstream_timeout", 504)


@BOTH
def test_no_first_byte_within_the_time_allowed(impatient: House, stream: bool) -> None:
    impatient.fake.script(Behaviour("hang_before_first_byte"))
    with impatient.leaves() as left, pytest.raises(openai.InternalServerError) as raised:
        impatient.gw.client().chat.completions.create(**ask(), stream=stream)
    assert (raised.value.status_code, raised.value.code) == (504, "upstream_timeout")
    impatient.fake.wait_for(lambda: impatient.fake.requests[-1].aborted)
    fact = left()
    assert (fact.error, fact.status, fact.first_byte) == ("upstream_timeout", 504, None)


def test_a_stream_that_falls_silent_ends_in_an_error_event(impatient: House) -> None:
    impatient.fake.script(Behaviour("hang_mid_stream", after=3))
    with impatient.leaves() as left:
        said = impatient.gw.chat(stream=True)
    *whole, last = events(said.content)
    assert len(whole) == 3
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_timeout"
    assert DONE not in said.content
    impatient.fake.wait_for(lambda: impatient.fake.requests[-1].aborted)
    fact = left()
    assert (fact.error, fact.status, fact.stream, fact.finish_reason) == ("upstream_timeout", 200, True, "error")
    assert fact.answer


def test_an_answer_that_falls_silent_is_a_504(impatient: House) -> None:
    impatient.fake.script(Behaviour("hang_mid_stream"))
    with impatient.leaves() as left:
        assert impatient.gw.chat().status_code == 504
    fact = left()
    assert (fact.error, fact.status, fact.answer) == ("upstream_timeout", 504, None)


def test_between_the_bytes_of_a_whole_answer_another_patience_holds(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, timeouts={"first_byte": "60s", "idle": "300ms"})
    fake.script(Behaviour("hang_mid_stream"))
    assert gw.chat().status_code == 504  # the client itself waits for 20 s
    assert gw.interaction().error == "upstream_timeout"


@BOTH
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429, 500, 502, 503])
def test_an_upstreams_own_error_is_kept_whole(house: House, stream: bool, status: int) -> None:
    told = error("no", "SomeError", status, "messages") | {"extra": 1}
    house.fake.script(Behaviour("status", status=status, body=told, headers={"Retry-After": "7", "X-Other": "é"}))
    with house.leaves() as left:
        said = house.gw.chat(stream=stream)
    assert (said.status_code, said.content) == (status, dumps(told))
    assert said.headers["retry-after"] == "7"
    assert said.headers.get_list("content-length") == [str(len(said.content))]
    fact = left()
    assert (fact.error, fact.status, fact.stream, fact.finish_reason) == ("upstream_error", status, False, "error")


CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}


@pytest.mark.parametrize("status", CLASSES)
def test_the_openai_client_raises_what_the_upstream_meant(house: House, status: int) -> None:
    house.fake.script(Behaviour("status", status=status, headers={"retry-after": "7"}))
    with pytest.raises(CLASSES[status]) as raised:
        house.gw.client().chat.completions.create(**ask())
    assert type(raised.value) is CLASSES[status]
    assert raised.value.response.headers["retry-after"] == "7"
    assert raised.value.type == "InternalServerError"  # the upstream's word
    assert raised.value.request_id


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
NOT_HTTP = {
    "not HTTP": b"",
    "endless head": HEAD + b"x-long: " + b"a" * 200_000,
    "many headers": HEAD + b"".join(b"x-%d: %b\r\n" % (i, b"v" * 90) for i in range(2000)),
    "no such status": b"HTTP/1.1 999 Hm\r\ncontent-length: 2\r\n\r\n{}",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\nhello",
    "a NUL in a header": HEAD + b"x-a: b\0c\r\ncontent-length: 2\r\n\r\n{}",
    "a CR in a header": HEAD + b"x-a: b\rx-evil: c\r\ncontent-length: 2\r\n\r\n{}",
    "a bad length": HEAD + b"content-length: 2x\r\n\r\n{}",
    "two framings": HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a bad chunk": HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n",
}


@BOTH
@pytest.mark.parametrize("what", NOT_HTTP)
def test_an_answer_that_is_no_http_is_a_502(house: House, what: str, stream: bool) -> None:
    house.fake.script(Behaviour("garbage", data=NOT_HTTP[what]))
    with house.leaves() as left:
        said = house.gw.chat(stream=stream)
    assert (said.status_code, openai_error(said)["code"]) == (502, "upstream_garbage")
    assert "x-evil" not in said.headers
    fact = left()
    assert (fact.error, fact.status, fact.upstream) == ("upstream_garbage", 502, house.fake.url)


@BOTH
def test_an_answer_that_is_no_json_passes_and_is_journaled_as_garbage(house: House, stream: bool) -> None:
    house.fake.script(Behaviour("bad_json"))
    with house.leaves() as left:
        said = house.gw.chat(stream=stream)
    assert (said.status_code, said.content) == (200, b'{"id": "chatcmpl-')
    fact = left()
    assert (fact.error, fact.status, fact.answer) == ("upstream_garbage", 200, None)


def test_an_empty_answer_is_garbage(house: House) -> None:
    house.fake.script(Behaviour("garbage", data=HEAD + b"content-length: 0\r\n\r\n"))
    with house.leaves() as left:
        assert house.gw.chat().content == b""
    assert left().error == "upstream_garbage"


def test_a_second_answer_behind_the_first_is_ignored(house: House) -> None:
    one = HEAD + b'x-one: 1\r\ncontent-length: 10\r\n\r\n{"id":"1"}'
    two = b'HTTP/1.1 200 OK\r\nx-two: 2\r\ncontent-length: 10\r\n\r\n{"id":"2"}'
    house.fake.script(Behaviour("garbage", data=one + two))
    with house.leaves() as left:
        said = house.gw.chat()
    assert (said.status_code, said.content) == (200, b'{"id":"1"}')
    assert said.headers["x-one"] == "1"
    assert "x-two" not in said.headers
    assert left().error is None


def test_trailers_are_no_headers(house: House) -> None:
    body = b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx-trailer: 1\r\ncontent-type: text/html\r\n\r\n"
    house.fake.script(Behaviour("garbage", data=HEAD + body))
    said = house.gw.chat()
    assert said.headers.get_list("content-type") == ["application/json"]
    assert "x-trailer" not in said.headers


@BOTH
@pytest.mark.parametrize("reset", [False, True])
def test_a_close_before_any_byte_is_a_502(house: House, stream: bool, reset: bool) -> None:
    house.fake.script(Behaviour("close_before_answer", n=None, reset=reset))
    with house.leaves() as left:
        said = house.gw.chat(stream=stream)
    assert (said.status_code, openai_error(said)["code"]) == (502, "upstream_refused")
    assert left().error == "upstream_refused"


@BOTH
@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_cut_in_its_body_is_a_502(house: House, stream: bool, reset: bool) -> None:
    house.fake.script(Behaviour("die_mid_body", reset=reset))
    with house.leaves() as left:
        said = house.gw.chat(stream=stream)
    assert (said.status_code, openai_error(said)["code"]) == (502, "upstream_cut")
    fact = left()
    assert (fact.error, fact.status, fact.answer) == ("upstream_cut", 502, None)


def test_a_reset_does_not_end_a_body_without_length(house: House) -> None:
    house.fake.script(Behaviour("garbage", data=HEAD + b'\r\n{"id":"1"}', reset=True))
    with house.leaves() as left:
        assert house.gw.chat().status_code == 502
    assert left().error in ("upstream_cut", "upstream_refused")  # the reset may overtake the bytes


def test_a_close_does_end_a_body_without_length(house: House) -> None:
    house.fake.script(Behaviour("garbage", data=HEAD + b'\r\n{"id":"1"}'))
    with house.leaves() as left:
        assert house.gw.chat().content == b'{"id":"1"}'
    assert left().error is None


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("after", [1, 4])
def test_a_stream_that_is_cut_ends_in_an_error_event(house: House, usage: bool, reset: bool, after: int) -> None:
    house.fake.script(Behaviour("die_mid_stream", after=after, reset=reset))
    with house.leaves() as left:
        said = house.gw.chat(stream=True, stream_options={"include_usage": usage})
    assert said.status_code == 200
    *whole, last = events(said.content)
    if not reset:  # a reset may overtake what was sent before
        assert len(whole) == after
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in whole)
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_cut"
    assert said.content.endswith(b"\n\n")
    assert b"[DONE]" not in said.content
    fact = left()
    assert (fact.error, fact.status, fact.stream, fact.finish_reason) == ("upstream_cut", 200, True, "error")


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_cut_inside_an_event_still_ends_in_a_readable_error(house: House, usage: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    half = b'data: {"id":"1","choices":[]}\n\ndata: {"id":"1","cho'
    house.fake.script(Behaviour("garbage", data=head + b"%x\r\n%b\r\n" % (len(half), half)))
    said = house.gw.chat(stream=True, stream_options={"include_usage": usage})
    first, *_, last = events(said.content)
    assert first == b'data: {"id":"1","choices":[]}'
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_cut"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_the_openai_client_raises_in_a_cut_stream(house: House, path: str) -> None:
    house.fake.script(Behaviour("die_mid_stream", after=3))
    client = house.gw.client()
    chunks: Any = (
        client.completions.create(model=ROUTE, prompt="x", stream=True)
        if path == "completions"
        else client.chat.completions.create(**ask(), stream=True)
    )
    assert [next(chunks) for _ in range(3)]
    with pytest.raises(openai.APIError) as raised:
        next(chunks)
    assert raised.value.code == "upstream_cut"


def test_an_error_in_a_stream_passes_and_is_journaled(house: House) -> None:
    house.fake.script(Behaviour("error_chunk_mid_stream", after=3))
    with house.leaves() as left:
        said = house.gw.chat(stream=True)
    assert events(said.content)[3:] == [
        b"data: " + dumps(error("EngineCore died", "InternalServerError", 500)),
        b"data: [DONE]",
    ]
    fact = left()
    assert (fact.error, fact.status, fact.stream, fact.finish_reason) == ("upstream_error", 200, True, "error")


@pytest.mark.parametrize("status", [400, 500])
def test_an_error_status_with_a_stream_is_an_error(house: House, status: int) -> None:
    head = b"HTTP/1.1 %d No\r\ncontent-type: text/event-stream\r\ncontent-length: 9\r\n\r\ndata: 1\n\n" % status
    house.fake.script(Behaviour("garbage", data=head))
    with house.leaves() as left:
        said = house.gw.chat(stream=True)
    assert (said.status_code, said.content) == (status, b"data: 1\n\n")
    assert left().error == "upstream_error"


def test_numbers_beyond_reason_do_not_stop_the_journal(house: House) -> None:
    body = b'{"id":"1","usage":{"prompt_tokens":%b},"choices":[{"message":{"content":"x"}}]}' % (b"9" * 40)
    house.fake.script(Behaviour("garbage", data=HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body)))
    with house.leaves() as left:
        assert house.gw.chat().content == body
    assert left().status == 200


# The client leaves


@BOTH
def test_a_client_that_leaves_before_the_first_byte_stops_the_upstream(house: House, stream: bool) -> None:
    house.fake.script(Behaviour("hang_before_first_byte"))
    with house.leaves() as left:
        with socket.create_connection(("127.0.0.1", house.gw.port)) as wire:
            wire.sendall(request(json.dumps(ask(stream=stream)).encode()))
            house.fake.wait_for(lambda: house.fake.hanging == 1)
        house.fake.wait_for(lambda: house.fake.requests[-1].aborted)
    fact = left()
    assert (fact.error, fact.status, fact.first_byte, fact.finish_reason) == ("client_left", 0, None, "error")
    assert fact.upstream == house.fake.url


@pytest.mark.parametrize("kind", ["hang_mid_stream", "slow"])
def test_a_client_that_leaves_mid_stream_stops_the_upstream(house: House, kind: Any) -> None:
    house.fake.script(Behaviour(kind, after=2, delay=0.05))
    with house.leaves() as left:
        with house.gw.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as said:
            assert next(said.iter_raw()).startswith(b"data: ")
        house.fake.wait_for(lambda: house.fake.requests[-1].aborted)
    fact = left()
    assert (fact.error, fact.status, fact.stream) == ("client_left", 200, True)
    assert fact.first_byte is not None


def test_a_client_that_leaves_in_its_own_body_leaves_nothing(house: House) -> None:
    with house.leaves_nothing(), socket.create_connection(("127.0.0.1", house.gw.port)) as wire:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")


def test_a_client_that_only_half_closes_is_gone_too(house: House) -> None:
    house.fake.script(Behaviour("hang_before_first_byte"))
    with house.leaves() as left, socket.create_connection(("127.0.0.1", house.gw.port)) as wire:
        wire.sendall(request(json.dumps(ask()).encode()))
        house.fake.wait_for(lambda: house.fake.hanging == 1)
        wire.shutdown(socket.SHUT_WR)
        house.fake.wait_for(lambda: house.fake.requests[-1].aborted)
    assert left().error == "client_left"


# Another replica


def first_of(house: House, session: str) -> tuple[FakeVllm, FakeVllm]:
    """The replica that this session asks first, and the other."""
    before = [len(fake.requests) for fake in house.fakes]
    asked(house.gw, session)
    a, b = house.fakes
    return (a, b) if len(a.requests) > before[0] else (b, a)


def asked(gw: Gateway, session: str, **fields: Any) -> httpx.Response:
    return gw.chat(headers={"x-understudy-session": session}, **fields)


@BOTH
@pytest.mark.parametrize("how", ["close_before_answer", "502", "503"])
@pytest.mark.parametrize("session", ["s1", "s2"])
def test_another_replica_is_asked_when_one_gives_no_answer(pair: House, how: Any, stream: bool, session: str) -> None:
    first, second = first_of(pair, session)
    fault = Behaviour("status", status=int(how)) if how.isdigit() else Behaviour(how, n=None)
    first.script(fault)
    with pair.leaves() as left:
        said = asked(pair.gw, session, stream=stream)
    assert said.status_code == 200
    assert second.requests[-1].headers["x-request-id"] == said.headers["x-request-id"]
    assert first.requests[-1].headers["x-request-id"] != said.headers["x-request-id"]
    fact = left()
    assert (fact.error, fact.status, fact.attempts, fact.upstream) == (None, 200, 2, second.url)
    assert fact.request_id == said.headers["x-request-id"]


def test_a_replica_that_is_gone_is_asked_last_for_a_while(
    gateway: MakeGateway, fake: FakeVllm, other_fake: FakeVllm
) -> None:
    fake.stop()
    gw = gateway(fake, other_fake)
    answers = [asked(gw, f"s{i}") for i in range(10)]
    assert {said.status_code for said in answers} == {200}
    attempts = [fact.attempts for fact in gw.wait_interactions(10)]
    assert 2 in attempts
    assert len(other_fake.requests) == 10


def test_when_no_replica_answers_the_last_ones_error_is_told(pair: House) -> None:
    for fake in pair.fakes:
        fake.script(Behaviour("status", status=503, headers={"retry-after": "3"}))
    before = [len(fake.requests) for fake in pair.fakes]
    with pair.leaves() as left:
        said = pair.gw.chat()
    assert (said.status_code, said.headers["retry-after"]) == (503, "3")
    assert [len(fake.requests) for fake in pair.fakes] == [n + 1 for n in before]
    fact = left()
    assert (fact.error, fact.status, fact.attempts) == ("upstream_error", 503, 2)


@pytest.mark.parametrize(
    ("behaviour", "stream", "kind"),
    [
        *[(Behaviour("status", status=s), False, "upstream_error") for s in (400, 404, 422, 429, 500)],
        (Behaviour("hang_before_first_byte"), False, "upstream_timeout"),
        (Behaviour("garbage"), False, "upstream_garbage"),
        (Behaviour("die_mid_body"), False, "upstream_cut"),
        (Behaviour("die_mid_stream"), True, "upstream_cut"),
        (Behaviour("error_chunk_mid_stream"), True, "upstream_error"),
        (Behaviour("bad_json"), False, "upstream_garbage"),
    ],
)
def test_no_other_replica_is_asked_once_one_may_have_begun(
    pair: House, behaviour: Behaviour, stream: bool, kind: str
) -> None:
    first, second = first_of(pair, "s")
    first.script(behaviour)
    before = len(first.requests), len(second.requests)
    with pair.leaves() as left:
        asked(pair.gw, "s", stream=stream)
    fact = left()
    assert (fact.error, fact.attempts, fact.upstream) == (kind, 1, first.url)
    assert (len(first.requests), len(second.requests)) == (before[0] + 1, before[1])


# Slow clients


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"POST /v1/models HTTP/1.1\r\nhost: x\r\nx-slow:"])
def test_a_head_that_never_ends_is_closed(impatient: House, sent: bytes) -> None:
    with impatient.leaves_nothing(), socket.create_connection(("127.0.0.1", impatient.gw.port), 10) as wire:
        wire.sendall(sent)
        got = wire.makefile("rb").read()
    assert got.startswith(b"HTTP/1.1 408 ") if sent else got == b""


def test_a_second_head_that_never_ends_is_closed_once_the_first_is_answered(impatient: House) -> None:
    with socket.create_connection(("127.0.0.1", impatient.gw.port), 10) as wire:
        for more in (b"", b"GET /healthz HT"):
            wire.sendall(request(body()))
            assert answer(wire).status_code == 200
            wire.sendall(more)
        assert wire.makefile("rb").read().startswith(b"HTTP/1.1 408 ")


def test_a_request_may_take_longer_than_its_head(impatient: House) -> None:
    impatient.fake.script(Behaviour("slow", delay=0.05))  # some 0.5 s in all
    said = impatient.gw.chat(stream=True)
    assert said.content.endswith(DONE)


def test_a_body_that_stops_coming_is_a_408() -> None:
    async def read() -> bytes:
        pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}])

        async def receive() -> Any:
            for piece in pieces:
                return piece
            return await asyncio.get_running_loop().create_future()

        return await read_body({}, receive, 100, patience=0.01)

    with pytest.raises(ApiError) as raised:
        asyncio.run(read())
    assert raised.value.status == 408
    assert (b"connection", b"close") in raised.value.headers


def test_a_client_that_does_not_read_its_stream_is_let_go(impatient: House) -> None:
    data = (b"data: " + b"x" * 60_000 + b"\n\n") * 800  # more than all buffers on the way hold
    impatient.fake.script(Behaviour("split", data=data, offsets=tuple(range(60_008, len(data), 60_008))))
    n = len(impatient.fake.requests)
    with impatient.leaves() as left, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", impatient.gw.port))
        wire.sendall(request(body(stream=True)))
        impatient.fake.wait_for(lambda: len(impatient.fake.requests) > n and impatient.fake.requests[n].aborted)
    fact = left()
    assert (fact.error, fact.status, fact.stream) == ("client_left", 200, True)


# Bad input


def body(**fields: Any) -> bytes:
    return json.dumps(ask(**fields)).encode()


BAD: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, None),
    "half": (b'{"model": "assistant"', 400, None),
    "trailing": (b'{"model": "assistant"} x', 400, None),
    "NaN": (b'{"model": "assistant", "temperature": NaN}', 400, None),
    "array": (b"[]", 400, None),
    "string": (b'"assistant"', 400, None),
    "null": (b"null", 400, None),
    "no model": (b'{"messages": []}', 400, "model"),
    "empty model": (body(model=""), 400, "model"),
    "null model": (body(model=None), 400, "model"),
    "number model": (body(model=7), 400, "model"),
    "unknown route": (body(model="nobody"), 404, "model"),
    "unknown route with a line break": (body(model="x\r\nx-evil: 1"), 404, "model"),
    "an arm": (body(model=f"{ROUTE}:champion"), 404, "model"),
    "stream of the wrong type": (body(stream="yes"), 400, "stream"),
    "stream_options of the wrong type": (body(stream=True, stream_options=[]), 400, "stream_options"),
    "messages of the wrong type": (body(messages="hello"), 400, "messages"),
    "a message of the wrong type": (body(messages=["hello"]), 400, "messages"),
    "metadata of the wrong type": (body(metadata={"session_id": 7}), 400, "metadata"),
    "half a surrogate pair": (b'{"model": "\\ud800"}', 400, None),
    "invalid UTF-8": (b'{"model": "assistant", "x": "\xff"}', 400, None),
    "UTF-16": ('{"model": "assistant"}'.encode("utf-16"), 400, None),
    "deep arrays": (b'{"model": "assistant", "x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400, None),
    "deep objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, None),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_openais_words(house: House, what: str) -> None:
    sent, status, param = BAD[what]
    with house.leaves_nothing():
        said = house.gw.http.post("/v1/chat/completions", content=sent)
    assert said.status_code == status
    told = openai_error(said)
    assert (told["type"], told["param"]) == ("invalid_request_error", param)
    assert "x-evil" not in said.headers


@pytest.mark.parametrize(
    "options", ['{"x": "\\ud800"}', '{"x": 1e999}', '{"\\ud800": 1}', '{"x": ' + "[" * 900 + "]" * 900 + "}"]
)
def test_odd_stream_options_are_no_fault_of_ours(house: House, options: str) -> None:
    sent = body(stream=True)[:-1] + b', "stream_options": ' + options.encode() + b"}"
    said = house.gw.http.post("/v1/chat/completions", content=sent)
    assert said.status_code in (200, 400)
    if said.status_code == 400:
        openai_error(said)


@pytest.mark.parametrize("odd", ["1e999", "[" * 500 + "]" * 500, "9" * 400])
def test_odd_messages_are_passed_on_and_leave_a_fact(house: House, odd: str) -> None:
    sent = b'{"model": "%b", "messages": [{"role": "user", "content": %b}]}' % (ROUTE.encode(), odd.encode())
    with house.leaves() as left:
        assert house.gw.http.post("/v1/chat/completions", content=sent).status_code == 200
    assert left().error is None


def test_the_openai_client_raises_what_we_meant(house: House) -> None:
    client = house.gw.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**ask() | {"model": "nobody"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**ask(), extra_body={"stream": "yes"})
    assert wrong.value.param == "stream"
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(**ask("x" * MAX_BODY))
    assert (large.value.status_code, large.value.code) == (413, "too_large")


def test_a_body_over_the_limit_is_refused_by_its_length_alone(house: House) -> None:
    with house.leaves_nothing():
        said = house.raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
    assert (said.status_code, openai_error(said)["code"]) == (413, "too_large")


def test_a_chunked_body_is_refused_once_it_is_over_the_limit(house: House) -> None:
    with house.leaves_nothing(), socket.create_connection(("127.0.0.1", house.gw.port), 10) as wire:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        wire.sendall((b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 5)  # and its end never comes
        said = answer(wire)
    assert (said.status_code, openai_error(said)["code"]) == (413, "too_large")


def test_a_body_at_the_limit_is_taken(house: House) -> None:
    sent = body().ljust(MAX_BODY)
    assert house.gw.http.post("/v1/chat/completions", content=sent).status_code == 200
    chunked = (sent[i : i + 10_000] for i in range(0, MAX_BODY, 10_000))
    assert house.gw.http.post("/v1/chat/completions", content=chunked).status_code == 200
    assert house.gw.http.post("/v1/chat/completions", content=sent + b" ").status_code == 413


@pytest.mark.parametrize(
    "head",
    [
        b"x-long: " + b"a" * MAX_HEAD + b"\r\n\r\n",
        b"x-long: " + b"a" * (MAX_HEAD + 100),
        b"a" * (MAX_HEAD + 100),
        b"x: y\r\n" * (MAX_HEAD // 6),
    ],
    ids=["one value", "a value without end", "a name without end", "many"],
)
def test_a_head_over_the_limit_is_a_431(house: House, head: bytes) -> None:
    with house.leaves_nothing():
        said = house.raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + head)
    assert (said.status_code, openai_error(said)["type"]) == (431, "invalid_request_error")
    assert said.headers["connection"] == "close"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/caf\xe9 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://[x HTTP/1.1\r\nhost: x\r\n\r\n",
        request(b"{}", b"transfer-encoding: chunked"),
        request(b"{}", b"content-length: 3"),
        request(b"{}", b"x-bad: a\0b"),
    ],
    ids=["TLS", "version", "path", "target", "two framings", "two lengths", "NUL"],
)
def test_what_is_no_http_is_a_400(house: House, sent: bytes) -> None:
    with house.leaves_nothing():
        said = house.raw(sent)
    assert said.status_code == 400
    openai_error(said)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("DELETE", "/v1/responses", 405, "POST"),
        ("PUT", "/v1/feedback", 405, "POST, OPTIONS"),
        ("DELETE", "/v1/feedback/x", 405, "GET, OPTIONS"),
        ("POST", "/v1/models", 405, "GET"),
        ("POST", "/v1/nothing", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("GET", "/", 404, None),
        ("GET", "/v1/%ff%0d%0ax-evil:1", 404, None),
        ("GET", "/admin/routes", 404, None),
    ],
)
def test_wrong_methods_and_paths(house: House, method: str, path: str, status: int, allow: str | None) -> None:
    with house.leaves_nothing():
        said = house.gw.http.request(method, path, json={})
    assert said.status_code == status
    assert openai_error(said)["type"] == "invalid_request_error"
    assert said.headers.get("allow") == allow
    assert "x-evil" not in said.headers


def test_nothing_of_the_clients_headers_comes_back(house: House) -> None:
    evil = {
        "x-request-id": "evil",
        "traceparent": "00-evil",
        "x-understudy-session": "s\tevil",
        "x-stainless-retry-count": "evil",
    }
    said = house.gw.chat(headers=evil)
    assert said.status_code == 200
    assert "evil" not in str(said.headers)
    assert "evil" not in str(house.fake.requests[-1].headers)


def test_the_connection_lives_on_after_an_error(house: House) -> None:
    with socket.create_connection(("127.0.0.1", house.gw.port), 10) as wire:
        for sent, status in ((b"{", 400), (body(model="nobody"), 404), (body(), 200)):
            wire.sendall(request(sent))
            assert answer(wire).status_code == status
    eventually(lambda: house.gw.http.get("/healthz").status_code == 200)
