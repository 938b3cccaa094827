"""How we ask a replica: what it may send us as a head, and which of its connections are used again."""

from __future__ import annotations

import openai
import pytest
from conftest import MakeGateway, ask
from fake_vllm import Behaviour, FakeVllm

from gateway.upstream import HEAD_LIMIT

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"


@pytest.mark.parametrize("lines", [1, 100], ids=["one header", "many"])
@pytest.mark.parametrize("over", [1, HEAD_LIMIT // 2], ids=["by little", "by much"])
def test_a_whole_head_over_the_limit_is_refused_however_it_came(
    gateway: MakeGateway, fake: FakeVllm, lines: int, over: int
) -> None:
    size = (HEAD_LIMIT + over) // lines + 1
    head = HEAD + b"".join(b"x-%d: %b\r\n" % (n, b"v" * size) for n in range(lines)) + b"\r\n"
    fake.script(Behaviour("garbage", data=head + b"{}"))
    gw = gateway(fake)
    said = gw.chat()
    assert said.status_code == 502
    assert said.json()["error"]["code"] == "upstream_garbage"
    assert f"headers exceed {HEAD_LIMIT} bytes" in said.json()["error"]["message"]
    fact = gw.interaction()
    assert (fact.error, fact.status) == ("upstream_garbage", 502)


def test_a_large_body_is_no_large_head(gateway: MakeGateway, fake: FakeVllm) -> None:
    body = b'{"x":"%b"}' % (b"v" * 2 * HEAD_LIMIT)
    head = HEAD.replace(b"content-length: 2", b"content-length: %d" % len(body))
    fake.script(Behaviour("garbage", data=head + b"x-long: " + b"v" * 8000 + b"\r\n\r\n" + body))
    said = gateway(fake).chat()
    assert (said.status_code, said.content) == (200, body)


@pytest.mark.parametrize("when_reused", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_the_upstream_closed_while_idle_is_replaced_unseen(
    gateway: MakeGateway, fake: FakeVllm, stream: bool, when_reused: bool
) -> None:
    gw = gateway(fake)
    fake.script(Behaviour("early_close_keepalive", when_reused=when_reused))
    for text in ("a", "b", "c"):
        assert gw.chat(text, stream=stream).status_code == 200
    facts = gw.wait_interactions(3)
    assert [(f.error, f.attempts) for f in facts] == [(None, 1)] * 3
    assert [r.json["messages"][0]["content"] for r in fake.requests] == ["a", "b", "c"]
    assert [r.connection for r in fake.requests][1:] == [2, 2]


def test_an_answer_that_was_aborted_leaves_no_connection_to_use_again(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    fake.script(Behaviour("hang_mid_stream"))
    with gw.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as said:
        next(said.iter_raw())
    fake.wait_for(lambda: fake.requests[0].aborted)
    assert gw.chat().status_code == 200
    assert fake.requests[0].connection != fake.requests[1].connection


def test_the_openai_clients_own_retry_is_a_request_but_no_dislike(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    soon = {"retry-after-ms": "1"}
    fake.script(Behaviour("hang_before_first_byte"))
    fake.script(Behaviour("status", status=500, headers=soon), Behaviour("status", status=429, headers=soon))
    with openai.OpenAI(base_url=f"{gw.url}/v1", api_key="none", max_retries=3, timeout=0.5) as client:
        client.chat.completions.create(**ask("patience"))
    facts = gw.wait_interactions(4)
    assert [f.sdk_retry for f in facts] == [0, 1, 2, 3]
    assert [f.error for f in facts] == ["client_left", "upstream_error", "upstream_error", None]
    assert len({f.request_id for f in facts}) == 4
    assert all(sums.n == 0 for sums in gw.sums().values())
    assert gw.signals() == []
