"""Copies for a challenger in the shadow: what they tell, and that nobody but the journal ever hears of them."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROUTE, Gateway, MakeGateway, Publisher, ask, eventually, metric
from fake_vllm import Behaviour, FakeVllm, answer_text

from gateway import shadow
from router.bandit import unit_hash

SHADOW = {"versions": ("v2",), "rollout": "r1", "challenger": "v2", "control": "champion", "shadow": 1.0}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def house(gateway: MakeGateway, fake: FakeVllm, publisher: Publisher) -> Gateway:
    """A gateway that copies every request for `v2`."""
    fake.load("v2")
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"champion": 1.0, "v2": 0.0}, **SHADOW)
    return gw


def copies(fake: FakeVllm) -> list[Any]:
    return fake.asked("v2")


def dropped(gw: Gateway) -> float:
    return metric(gw, "understudy_shadow_dropped_total", route=ROUTE)


# What a copy tells


@pytest.mark.parametrize("stream", [False, True])
def test_a_copy_leaves_a_fact_that_holds_both_sides_and_the_client_sees_its_own_answer(
    house: Gateway, fake: FakeVllm, stream: bool
) -> None:
    who = {"x-understudy-user": "ann"}
    for n in range(12):
        said = house.chat(f"q{n} and more", headers=who, stream=stream)
        assert said.status_code == 200
        assert b"v2" not in said.content
    shown = {fact.request_id: fact for fact in house.wait_interactions(12)}
    facts = house.wait_shadows(12)
    assert {fact.of for fact in facts} == set(shown)
    for fact in facts:
        real = shown[fact.of]
        assert (fact.route, fact.tenant, fact.rollout, fact.model) == (ROUTE, real.tenant, "r1", "v2")
        assert fact.user == real.user is not None
        asked = real.messages[0]["content"]
        assert (fact.error, fact.finish_reason, fact.answer) == (None, "stop", answer_text("v2", asked))
        assert fact.characters == len(answer_text("v2", asked))
        assert fact.tokens_out == real.tokens_out == fact.shown_tokens_out
        assert fact.shown_characters == len(answer_text("base", asked))
        assert (fact.shown_error, fact.shown_duration) == (None, real.duration)
        assert fact.shown_first_byte == real.first_byte
        assert fact.first_byte is not None
        assert 0 < fact.first_byte <= fact.duration
        assert fact.at >= real.at
    assert {f.answerer.rollout for f in shown.values()} == {""}, "in the shadow no session takes part"
    requests = fake.asked()
    assert len({r.headers["x-request-id"] for r in requests}) == len(requests) == 24
    assert not {r.headers["x-request-id"] for r in copies(fake)} & set(shown)


def test_the_share_of_requests_is_told_by_their_ids(house: Gateway, fake: FakeVllm, publisher: Publisher) -> None:
    publisher.show(house, {"champion": 1.0}, **SHADOW | {"shadow": 0.3})
    headers = {"x-understudy-session": "always the same"}
    for n in range(60):
        house.chat(f"q{n}", headers=headers)
    expected = {f.request_id for f in house.wait_interactions(60) if unit_hash("shadow", f.request_id) < 0.3}
    assert 5 < len(expected) < 40, "by request, though there is one session"
    assert {fact.of for fact in house.wait_shadows(len(expected))} == expected


def test_a_copy_is_dressed_for_the_challenger_and_not_for_who_answered(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    arms = {
        "champion": {"model": "base", "system": "Be brief.", "params": {"temperature": 0.1}},
        "other": {"model": "good", "system": "Be long.", "params": {"top_p": 0.5}},
    }
    gw = gateway(fake, arms=arms, state=publisher.state)
    publisher.show(gw, {"champion": 0.0, "other": 1.0}, **SHADOW)
    gw.chat("hi", stream=True)
    gw.wait_shadows()
    (copy,) = copies(fake)
    assert copy.json["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    assert copy.json["temperature"] == 0.1
    assert "top_p" not in copy.json
    assert copy.json["stream_options"] == {"include_usage": True}


def test_a_tool_call_in_a_copy_is_kept_as_text(house: Gateway) -> None:
    house.chat("find x", tools=[TOOL])
    fact = house.wait_shadows()[0]
    assert (fact.finish_reason, fact.answer, fact.characters) == ("tool_calls", None, 0)
    assert [(call["name"], call["arguments"]) for call in fact.tool_calls] == [("search", '{"q":"find x"}')]


@pytest.mark.parametrize(
    ("behaviour", "stream", "told"),
    [
        (Behaviour("status", status=500, model="v2"), False, "upstream_error"),
        (Behaviour("error_chunk_mid_stream", model="v2"), True, "upstream_error"),
        (Behaviour("die_mid_stream", model="v2"), True, "upstream_cut"),
        (Behaviour("bad_json", model="v2"), False, "upstream_garbage"),
        (Behaviour("close_before_answer", model="v2"), False, "upstream_refused"),
    ],
)
def test_how_a_copy_fails_is_told_and_concerns_nobody(
    house: Gateway, fake: FakeVllm, behaviour: Behaviour, stream: bool, told: str
) -> None:
    fake.script(behaviour, behaviour)
    assert house.chat("x", stream=stream).status_code == 200
    fact = house.wait_shadows()[0]
    assert (fact.error, fact.finish_reason, fact.shown_error) == (told, "error", None)
    assert house.interaction().error is None


def test_a_failure_that_was_shown_is_compared_and_the_clients_own_is_not(house: Gateway, fake: FakeVllm) -> None:
    for status in (400, 429, 500):
        fake.script(Behaviour("status", status=status, model="base"))
        assert house.chat(f"status {status}").status_code == status
    fake.script(Behaviour("hang_mid_stream", model="base"))
    with house.http.stream("POST", "/v1/chat/completions", json=ask("left", stream=True)) as said:
        next(said.iter_raw())
    house.wait_interactions(4)
    house.chat("last")
    facts = house.wait_shadows(2)
    assert [fact.shown_error for fact in facts] == ["upstream_error", None]
    assert [r.json["messages"][0]["content"] for r in copies(fake)] == ["status 500", "last"]


def test_a_copys_answer_without_end_is_read_in_part(house: Gateway, fake: FakeVllm) -> None:
    fake.script(Behaviour("split", model="v2", data=b"x" * (5 << 20), offsets=(1 << 20, 2 << 20, 3 << 20, 4 << 20)))
    house.chat("x")
    fact = house.wait_shadows()[0]
    assert (fact.error, fact.characters) == (None, 0)


def test_a_challenger_that_is_too_slow_is_told_as_a_timeout(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    fake.script(Behaviour("hang_before_first_byte", model="v2"), Behaviour("hang_mid_stream", model="v2"))
    gw = gateway(fake, state=publisher.state, timeouts={"first_byte": "200ms", "idle": "200ms"})
    publisher.show(gw, {"champion": 1.0}, **SHADOW)
    for text in ("one", "two"):
        assert gw.chat(text, stream=True).status_code == 200
        gw.wait_shadows(1 if text == "one" else 2)
    assert [fact.error for fact in gw.shadows()] == ["upstream_timeout"] * 2
    assert not any(r.aborted for r in fake.asked("base"))


# What is not copied


def test_embeddings_and_what_has_effects_at_the_upstream_are_not_copied(house: Gateway, fake: FakeVllm) -> None:
    def post(path: str, **body: Any) -> None:
        assert house.http.post(f"/v1/{path}", json={"model": ROUTE} | body).status_code == 200

    post("embeddings", input="x")
    post("responses", input="x", store=True)
    post("responses", input="x", previous_response_id="resp_1")
    post("responses", input="x", background=True)
    post("responses", input="x", conversation="conv_1")
    post("responses", input="x", tools=[{"type": "code_interpreter", "container": {"type": "auto"}}])
    post("responses", input="x", tools=[TOOL | {"type": "mcp"}])
    post("responses", input="copied", stream=True, tools=[{"type": "function", "name": "search", "parameters": {}}])
    post("completions", prompt="copied")
    house.wait_shadows(2)
    assert [(r.path, r.json.get("input") or r.json.get("prompt")) for r in copies(fake)] == [
        ("/v1/responses", "copied"),
        ("/v1/completions", "copied"),
    ]
    assert copies(fake)[0].json["store"] is False
    assert {fact.answer for fact in house.shadows()} == {answer_text("v2", "copied")}


def test_what_an_operator_pinned_is_not_copied(house: Gateway, fake: FakeVllm) -> None:
    bearer = {"authorization": f"Bearer {house.key('acme', 'admin')}"}
    house.chat("pinned", headers=bearer, model=f"{ROUTE}:champion")
    house.chat("real")
    house.wait_shadows()
    assert [r.json["messages"][0]["content"] for r in copies(fake)] == ["real"]


def test_a_challenger_that_is_loaded_nowhere_is_dropped_and_no_failure_of_its(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    gw = gateway(fake, state=publisher.state)
    publisher.show(gw, {"champion": 1.0}, **SHADOW)
    for _ in range(3):
        gw.chat()
    eventually(lambda: dropped(gw) == 3)
    assert gw.shadows() == []
    assert metric(gw, "understudy_fallbacks_total") == 0


def test_with_capture_off_a_copy_keeps_no_text(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher, tmp_path: Path
) -> None:
    fake.load("v2")
    gw = gateway(fake, state=publisher.state, capture={"text": "off"})
    publisher.show(gw, {"champion": 1.0}, **SHADOW)
    gw.chat("the zebra secret")
    gw.chat("the zebra secret", tools=[TOOL], stream=True)
    for fact in gw.wait_shadows(2):
        assert (fact.answer, fact.tool_calls, fact.redacted) == (None, None, ("off",))
        assert fact.tokens_out
    gw.stop()
    for file in tmp_path.iterdir():
        assert b"zebra" not in file.read_bytes(), file.name


def test_who_did_not_agree_is_copied_without_text_and_others_redacted(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.load("v2")
    gw = gateway(fake, state=publisher.state, capture={"text": "redacted"})
    publisher.show(gw, {"champion": 1.0}, **SHADOW)
    gw.chat("mail ann@example.com", metadata={"consent": "none"})
    gw.chat("mail ann@example.com")
    silent, masked = gw.wait_shadows(2)
    assert (silent.answer, silent.redacted) == (None, ("off",))
    assert "[email]" in (masked.answer or "")
    assert "email" in masked.redacted


# Bounds


def test_a_challenger_that_hangs_holds_two_copies_and_a_short_queue_and_no_client(
    house: Gateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.script(Behaviour("hang_before_first_byte", model="v2", n=None))
    took = []
    for n in range(100):
        began = time.perf_counter()
        assert house.chat(f"q{n}", stream=n % 2 == 0).status_code == 200
        took.append(time.perf_counter() - began)
    eventually(lambda: dropped(house) == 100 - shadow.MOST_WAITING - shadow.AT_ONCE)
    assert sorted(took)[90] < 1.0
    assert fake.hanging == len(copies(fake)) == shadow.AT_ONCE
    publisher.publish({"champion": 1.0})
    fake.wait_for(lambda: all(r.aborted for r in copies(fake)), 3)
    house.chat("after the rollback")
    house.wait_interactions(101)
    assert (len(copies(fake)), house.shadows()) == (shadow.AT_ONCE, [])


def test_the_next_copy_is_answered_when_one_has_ended(house: Gateway, fake: FakeVllm) -> None:
    fake.script(Behaviour("hang_before_first_byte", model="v2", n=2))
    for n in range(10):
        house.chat(f"q{n}")
    eventually(lambda: fake.hanging == 2)
    assert len(copies(fake)) == 2
    fake.release()
    assert {fact.error for fact in house.wait_shadows(10)} == {None}
    assert dropped(house) == 0


def test_bodies_that_wait_are_bounded_in_bytes(house: Gateway, fake: FakeVllm) -> None:
    fake.script(Behaviour("hang_before_first_byte", model="v2", n=None))
    for n in range(2 + 5):
        house.chat(f"{n}" + "x" * (3 << 20), max_tokens=1)
    eventually(lambda: dropped(house) == 3)


def test_copies_give_way_while_the_worker_is_busy(house: Gateway, fake: FakeVllm) -> None:
    real = shadow.BUSY + 1
    fake.script(Behaviour("hang_mid_stream", model="base", n=real))

    async def stream(client: httpx.AsyncClient) -> int:
        return (await client.post("/v1/chat/completions", json=ask(stream=True))).status_code

    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=real)
        async with httpx.AsyncClient(base_url=house.url, timeout=30, limits=limits) as client:
            return await asyncio.gather(*(stream(client) for _ in range(real)))

    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(asyncio.run, all_of_them())
        eventually(lambda: fake.hanging == real, 20)
        house.chat("while busy")
        eventually(lambda: dropped(house) == 1)
        assert copies(fake) == []
        fake.release()
        assert set(streams.result(30)) == {200}
    house.chat("after")
    eventually(lambda: "after" in [r.json["messages"][0]["content"] for r in copies(fake)])


def test_the_client_has_its_last_byte_before_the_copy_is_asked(house: Gateway, fake: FakeVllm) -> None:
    fake.script(Behaviour("hang_mid_stream", model="base", after=1000))
    body = ask("slow to end", stream=True)
    with house.http.stream("POST", "/v1/chat/completions", json=body) as said:
        pieces = said.iter_raw()
        got = b""
        while b"[DONE]" not in got:
            got += next(pieces)
        assert copies(fake) == []
        fake.release()
        for piece in pieces:
            got += piece
    house.wait_shadows()


def test_a_worker_stops_at_once_though_a_copy_hangs(house: Gateway, fake: FakeVllm) -> None:
    fake.script(Behaviour("hang_before_first_byte", model="v2", n=None))
    for n in range(5):
        house.chat(f"q{n}")
    eventually(lambda: fake.hanging == 2)
    began = time.monotonic()
    house.stop()
    assert time.monotonic() - began < 4
    fake.wait_for(lambda: all(r.aborted for r in copies(fake)))


def test_the_next_stage_drops_what_waits_and_its_sessions_take_part(
    house: Gateway, fake: FakeVllm, publisher: Publisher
) -> None:
    fake.script(Behaviour("hang_before_first_byte", model="v2", n=2))
    for n in range(10):
        house.chat(f"q{n}")
    eventually(lambda: fake.hanging == 2)
    publisher.show(house, {"champion": 0.5, "v2": 0.5}, **SHADOW | {"shadow": 0.0})
    eventually(lambda: fake.hanging == 0)
    for n in range(10):
        house.chat(f"new {n}", headers={"x-understudy-session": f"s{n}"})
    facts = house.wait_interactions(20)[10:]
    assert {(f.answerer.arm, f.answerer.rollout) for f in facts} == {("champion", "r1"), ("v2", "r1")}
    assert house.shadows() == []
