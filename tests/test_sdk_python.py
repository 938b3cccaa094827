"""The Python client: what an app says arrives once, joined to its answer; the app gets an id and no trouble."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import httpx2
import numpy as np
import openai
import pytest
from conftest import ROUTE, Gateway, MakeGateway, ask, eventually
from fake_vllm import Behaviour, FakeVllm

from telemetry.events import Signal, answer_name

SDK = Path(__file__).resolve().parent.parent / "sdk" / "python"
sys.path.insert(0, str(SDK / "src"))

from understudy_client import AsyncFeedback, Feedback, wrap  # noqa: E402
from understudy_client import _sender as sender  # noqa: E402
from understudy_client._feedback import FIELDS, Tokens  # noqa: E402

Told = tuple[int, dict[str, str], object] | str
OK = 202


class Desk:
    """A feedback endpoint that answers as told, and then takes everything. `cut`: reads, says nothing, hangs up."""

    def __init__(self, script: Iterable[Told] = (), port: int = 0, hold: threading.Event | None = None) -> None:
        desk = self
        self.script = list(script)
        self.requests: list[tuple[dict[str, str], list[Any]]] = []
        self.kept: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                items = json.loads(self.rfile.read(int(self.headers["content-length"])))
                desk.requests.append(({k.lower(): v for k, v in self.headers.items()}, items))
                if hold is not None:
                    hold.wait(20)
                told = desk.script.pop(0) if desk.script else OK
                if told == "cut":
                    return
                if told == "keep and cut":
                    desk.kept += items
                    return
                status, headers, body = told if isinstance(told, tuple) else (OK, {}, {"accepted": len(items)})
                wrong = {problem["index"] for problem in body.get("errors", ())} if isinstance(body, dict) else set()
                desk.kept += [item for i, item in enumerate(items) if status == OK and i not in wrong]
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Desk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def ids(self) -> list[str]:
        return [item["event_id"] for item in self.kept]


@pytest.fixture
def quick() -> Iterator[Callable[..., Feedback]]:
    """Makes clients that do not wait for company; closed at the end."""
    made: list[Feedback] = []

    def make(url: str, api_key: str | None = None, **options: Any) -> Feedback:
        made.append(Feedback(url, api_key, **{"flush_every": 0.01} | options))
        return made[-1]

    yield make
    for one in made:
        one.close(0.0)


def v1(gw: Gateway) -> str:
    return f"{gw.url}/v1"


def answered(gw: Gateway, text: str = "hello", headers: dict[str, str] | None = None) -> str:
    return str(gw.chat(text, headers).json()["id"])


def flushed(feedback: Any, timeout: float = 20.0) -> None:
    assert feedback.flush(timeout), "not flushed in time"


def signal(gw: Gateway, event_id: str) -> Signal:
    (found,) = [s for s in gw.signals() if s.event_id == event_id]
    return found


# Each kind arrives

SAID: list[tuple[Callable[[Any, str, str], str], str, float | None, dict[str, Any] | None]] = [
    (lambda f, a, b: f.thumb(a, True), "thumb", 1.0, None),
    (lambda f, a, b: f.thumb(a, False), "thumb", 0.0, None),
    (lambda f, a, b: f.thumb(a, np.True_), "thumb", 1.0, None),
    (lambda f, a, b: f.rate(a, 4), "rating", 4.0, None),
    (lambda f, a, b: f.rate(a, np.float32(2.5)), "rating", 2.5, None),
    (lambda f, a, b: f.rate(a, Decimal("4.5")), "rating", 4.5, None),
    (lambda f, a, b: f.correct(a, "better 考"), "correction", None, None),
    (lambda f, a, b: f.compare(a, b), "comparison", None, {"winner": "a", "loser": "b"}),
    (lambda f, a, b: f.tie(a, b), "comparison", None, {"tie": ["a", "b"]}),
    (lambda f, a, b: f.both_bad(a, b), "comparison", None, {"both_bad": ["a", "b"]}),
    (lambda f, a, b: f.comment(a, "hm \ud800"), "comment", None, None),
    (lambda f, a, b: f.copy(a), "copy", None, None),
    (lambda f, a, b: f.copy(a, 0.5), "copy", 0.5, None),
    (lambda f, a, b: f.outcome("resolved", 1, response_id=a), "outcome", 1.0, None),
    (lambda f, a, b: f.send("dwell", response_id=a, value=3.5), "dwell", 3.5, None),
    (lambda f, a, b: f.send("survey", response_id=a, name="nps", value=9), "survey", 9.0, None),
]


def test_each_kind_arrives_as_it_was_said_and_is_about_its_answer(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake, auth={"require_key": True})
    key = gw.key("acme")
    bearer = {"authorization": f"Bearer {key}"}
    a, b = answered(gw, "one", bearer), answered(gw, "two", bearer)
    feedback = quick(v1(gw), key)
    ids = [say(feedback, a, b) for say, *_ in SAID]
    flushed(feedback)
    assert (feedback.accepted, feedback.refused, feedback.invalid, feedback.waiting) == (len(SAID), 0, 0, 0)
    found = {s.event_id: s for s in gw.signals()}
    names = {"a": a, "b": b}
    for event_id, (_, kind, value, target) in zip(ids, SAID, strict=True):
        said = found[event_id]
        assert (said.kind, said.value, said.response_id, said.tenant) == (kind, value, answer_name(a), "acme")
        if target:
            said_of = {k: [names[x] for x in v] if isinstance(v, list) else names[v] for k, v in target.items()}
            assert said.target == said_of
    summary = gw.http.get(f"/v1/feedback/{a}", headers=bearer).json()
    assert {s["kind"] for s in summary["signals"]} >= {kind for _, kind, *_ in SAID if kind != "comparison"}


def test_what_is_known_of_who_and_when_arrives(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake)
    answer = answered(gw, headers={"x-understudy-user": "anna"})
    feedback = quick(v1(gw), user="anna")
    when = datetime.now(UTC) - timedelta(hours=1)
    mine = str(uuid.uuid4())
    assert feedback.thumb(answer, True, event_id=mine, at=when) == mine
    other = feedback.thumb(answer, False, user=7, at=when.isoformat())  # type: ignore[arg-type]
    flushed(feedback)
    assert signal(gw, mine).subject == gw.interaction().user
    assert signal(gw, other).subject not in (None, gw.interaction().user)
    assert [signal(gw, i).at for i in (mine, other)] == [pytest.approx(when.timestamp())] * 2


def test_an_outcome_of_a_session_is_joined_to_it(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake)
    answered(gw, headers={"x-understudy-session": "s-1"})
    feedback = quick(v1(gw))
    event_id = feedback.outcome("resolved", 1, session_id="s-1")
    flushed(feedback)
    said = signal(gw, event_id)
    assert (said.session, said.name, said.value) == (gw.interaction().session, "resolved", 1.0)


def test_the_tenant_is_said_where_a_key_does_not(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake)
    feedback = quick(v1(gw), tenant="acme")
    event_id = feedback.thumb("chatcmpl-x", True)
    client = wrap(gw.client(**{"X-Understudy-Tenant": "acme"}))
    wrapped_id = client.understudy.thumb("chatcmpl-x", True)
    flushed(feedback)
    flushed(client.understudy)
    assert [signal(gw, i).tenant for i in (event_id, wrapped_id)] == ["acme", "acme"]


# The openai client


def test_a_wrapped_client_speaks_for_its_answers_with_their_tokens(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake, auth={"require_key": True})
    feedback = quick(v1(gw))
    plain = gw.client(gw.key("acme"))
    client = wrap(plain, feedback)
    assert isinstance(client, openai.OpenAI)
    ways: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(**ask("one")),
        lambda: client.chat.completions.with_raw_response.create(**ask("two")).parse(),
        lambda: list(client.chat.completions.create(**ask("three"), stream=True))[-1],
        lambda: client.responses.create(model=ROUTE, input="four"),
        lambda: list(client.responses.create(model=ROUTE, input="five", stream=True))[-1].response,
        lambda: client.completions.create(model=ROUTE, prompt="six"),
        lambda: client.with_options(timeout=20).chat.completions.create(**ask("seven")),
        lambda: plain.chat.completions.create(**ask("eight")),
    ]
    answers = [way() for way in ways]
    by_object = [client.understudy.thumb(answer, True) for answer in answers]
    by_id = [client.understudy.rate(answer.id, 5) for answer in answers]
    flushed(client.understudy)
    assert (feedback.accepted, feedback.refused) == (2 * len(ways), 0)
    facts = gw.wait_interactions(len(ways))
    of = {fact.response_id: fact.request_id for fact in facts}
    for event_ids in (by_object, by_id):
        for answer, event_id in zip(answers, event_ids, strict=True):
            said = signal(gw, event_id)
            assert (said.source, said.verified, said.response_id) == ("token", True, of[answer.id])


def test_an_outcome_goes_without_token_as_no_token_may_say_it(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake)
    client = wrap(gw.client(), quick(v1(gw)), session="s-1")
    answer = client.chat.completions.create(**ask())
    ids = [client.understudy.outcome("resolved", 1, response_id=answer), client.understudy.outcome("revenue", 3)]
    flushed(client.understudy)
    first, second = (signal(gw, i) for i in ids)
    assert (first.source, first.response_id) == ("callback", answer_name(answer.id))
    assert second.session == gw.interaction().session


def test_a_key_is_used_rather_than_a_token_so_that_another_user_may_vote(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    client = wrap(gw.client(gw.key("acme")), user="anna")
    answer = client.chat.completions.create(**ask())
    hers, his = client.understudy.thumb(answer, True), client.understudy.thumb(answer, False, user="ben")
    flushed(client.understudy)
    assert signal(gw, hers).subject == gw.interaction().user
    assert signal(gw, his).subject not in (None, gw.interaction().user)
    assert {signal(gw, i).source for i in (hers, his)} == {"callback"}
    client.understudy.close()


@pytest.mark.parametrize("name", ["anna", "Zoë 考", "utf-8''x", " a\r\nb ", "50%", 7])
def test_user_and_session_go_with_each_request(gateway: MakeGateway, fake: FakeVllm, name: Any) -> None:
    gw = gateway(fake)
    client = wrap(gw.client(), user=name, session=name)
    client.chat.completions.create(**ask())
    written = str(name).replace("\r\n", "").strip()
    gw.chat(metadata={"user_id": written, "session_id": written})
    first, second = gw.wait_interactions(2)
    assert (first.user, first.session) == (second.user, second.session)
    vote = client.understudy.thumb(first.response_id, True)
    flushed(client.understudy)
    assert signal(gw, vote).subject == first.user


def test_a_stream_stays_a_stream_and_may_be_voted_on_before_its_end(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    client = wrap(gw.client())
    fake.script(Behaviour("hang_mid_stream", after=2))
    with client.chat.completions.create(**ask(), stream=True) as stream:
        first = next(stream)
        vote = client.understudy.thumb(first, True)
        flushed(client.understudy)
        fake.release()
        assert {chunk.id for chunk in stream} == {first.id}
    assert signal(gw, vote).response_id in (first.id, gw.interaction().request_id)


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_an_http_client_of_the_apps_own_will_do(gateway: MakeGateway, fake: FakeVllm, library: Any) -> None:
    gw = gateway(fake)
    with library.Client() as http, Feedback(v1(gw)) as feedback:
        plain = openai.OpenAI(base_url=v1(gw), api_key="none", http_client=http)
        client = wrap(plain, feedback, user="Zoë")
        vote = client.understudy.thumb(client.chat.completions.create(**ask()), True)
    gw.chat(metadata={"user_id": "Zoë"})
    assert signal(gw, vote).source == "token"
    assert len({fact.user for fact in gw.wait_interactions(2)}) == 1


def test_many_wraps_of_one_client_share_a_queue_a_hook_and_the_tokens(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    plain = gw.client()
    before = set(threading.enumerate())
    answers = [wrap(plain, user=f"u{i}").chat.completions.create(**ask(str(i))) for i in range(5)]
    last = wrap(plain)
    votes = [last.understudy.thumb(answer, True) for answer in answers]
    flushed(last.understudy)
    assert {signal(gw, vote).kind for vote in votes} == {"thumb"}
    new = [thread.name for thread in set(threading.enumerate()) - before]
    assert new.count("understudy-feedback") == 1
    assert [len(hooks) for hooks in plain._client.event_hooks.values()] == [1, 1]
    assert all(last.understudy._tokens.of(answer.id) for answer in answers)
    last.understudy.close()
    again = wrap(plain)
    vote = again.understudy.thumb(answers[0], True)
    flushed(again.understudy)
    assert signal(gw, vote).value == 1.0


def test_the_apps_own_hooks_go_on_and_a_failed_request_raises_as_ever(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    seen: list[Any] = []
    plain = gw.client()
    plain._client.event_hooks = {"response": [seen.append]}
    client = wrap(plain)
    client.chat.completions.create(**ask())
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "x"}])
    assert [response.status_code for response in seen] == [200, 404]


@pytest.mark.parametrize("client", [None, 5, "openai", object()])
def test_what_is_no_openai_client_cannot_be_wrapped(client: Any) -> None:
    with pytest.raises(TypeError, match="openai"):
        wrap(client)


def test_of_the_tokens_the_last_are_kept() -> None:
    tokens = Tokens(2)
    for name in "abc":
        tokens.remember(name, f"token {name}")
    assert [tokens.of(f"chatcmpl-{name}") for name in "abc"] == [None, "token b", "token c"]
    assert (tokens.of("resp_c"), tokens.of("c"), tokens.of("xc"), tokens.of("-" * 10_000)) == (
        "token c",
        "token c",
        None,
        None,
    )


# asyncio


def test_asyncio_apps_say_it_without_waiting_and_await_the_end(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    answer = answered(gw)

    async def main() -> list[str]:
        async with AsyncFeedback(v1(gw)) as feedback:
            ids = [feedback.thumb(answer, True), feedback.rate(answer, 3), feedback.correct(answer, "better")]
            assert await feedback.flush(20)
            assert feedback.waiting == 0
            return [*ids, feedback.copy(answer)]

    ids = asyncio.run(main())
    assert [signal(gw, i).kind for i in ids] == ["thumb", "rating", "correction", "copy"]


def test_an_async_client_is_wrapped_alike(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    key = gw.key("acme")

    async def main(feedback: AsyncFeedback | None) -> list[str]:
        async with openai.AsyncOpenAI(base_url=v1(gw), api_key=key, max_retries=0) as plain:
            client = wrap(plain, feedback, user="Zoë")
            assert isinstance(client, openai.AsyncOpenAI)
            assert isinstance(client.understudy, AsyncFeedback)
            whole = await client.chat.completions.create(**ask("one"))
            chunks = [chunk async for chunk in await client.chat.completions.create(**ask("two"), stream=True)]
            ids = [client.understudy.thumb(whole, True), client.understudy.thumb(chunks[0].id, False)]
            assert await client.understudy.aclose(20)
            return ids

    for feedback, source in ((AsyncFeedback(v1(gw)), "token"), (None, "callback")):
        said = [signal(gw, i) for i in asyncio.run(main(feedback))]
        assert [(s.value, s.source) for s in said] == [(1.0, source), (0.0, source)]
        assert {s.subject for s in said} == {gw.interaction().user}


def test_flushing_leaves_the_loop_free() -> None:
    hold = threading.Event()

    async def main(url: str) -> bool:
        async with AsyncFeedback(url, flush_every=0) as feedback:
            feedback.thumb("x", True)
            flushing: Awaitable[bool] = asyncio.ensure_future(feedback.flush(20))
            await asyncio.sleep(0)
            hold.set()
            return await flushing

    with Desk(hold=hold) as desk:
        assert asyncio.run(main(desk.url))


# A gateway that is away

AWAY: list[tuple[str, list[Told]]] = [
    ("no answer", ["cut", "cut"]),
    ("kept, and the answer lost", ["keep and cut"]),
    ("503", [(503, {"retry-after": "0"}, {"error": {"message": "later"}}), (503, {}, b"<html>")]),
    ("500", [(500, {}, b"")]),
    ("429", [(429, {"retry-after": "0"}, {"error": {"message": "slowly"}})] * 2),
    ("a date", [(503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, {})]),
    ("no gateway", [(200, {}, b"welcome"), (202, {}, b"[]"), (202, {}, {"accepted": 1, "errors": 5})]),
    ("nonsense", [(503, {"retry-after": "soon"}, b"\xff"), (202, {}, b"[" * 100_000)]),
]


@pytest.mark.parametrize("script", [script for _, script in AWAY], ids=[name for name, _ in AWAY])
def test_what_the_gateway_did_not_take_is_sent_again_and_counts_once(
    quick: Callable[..., Feedback], script: list[Told], caplog: pytest.LogCaptureFixture
) -> None:
    with Desk(script) as desk:
        feedback = quick(desk.url)
        ids = [feedback.thumb(f"chatcmpl-{i}", True) for i in range(5)]
        flushed(feedback)
    assert set(desk.ids) == set(ids)
    assert (feedback.accepted, feedback.refused, feedback.dropped) == (5, 0, 0)
    assert not desk.script
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_gateway_that_is_down_and_comes_up_gets_everything(quick: Callable[..., Feedback]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    feedback = quick(f"http://127.0.0.1:{port}/v1", batch=7)
    ids = [feedback.thumb(f"chatcmpl-{i}", True) for i in range(50)]
    assert not feedback.flush(0.05)
    eventually(lambda: feedback._sender._failures)
    with Desk(port=port) as desk:
        ids += [feedback.rate(f"chatcmpl-{i}", 5) for i in range(50)]
        flushed(feedback)
    assert desk.ids == ids


def test_before_a_real_gateway_nothing_is_lost_and_nothing_counts_twice(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake)
    answers = [answered(gw, str(i)) for i in range(4)]
    with Desk(["cut", (429, {"retry-after": "0"}, {}), "keep and cut", (503, {}, {})]) as desk:
        feedback = quick(desk.url, batch=3)
        ids = [feedback.thumb(answer, bool(i % 2), user="anna") for i in range(3) for answer in answers]
        flushed(feedback)
        for item in desk.kept:
            assert gw.feedback(item).status_code == 202
    assert len(desk.kept) > len(ids)
    assert {s.event_id for s in gw.signals("thumb")} == set(ids)
    for answer in answers:
        (thumbs,) = gw.http.get(f"/v1/feedback/{answer}").json()["signals"]
        assert (thumbs["count"], thumbs["mean"]) == (1, 0.0)


def test_what_one_user_says_too_fast_waits_and_others_do_not(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake, auth={"feedback_per_minute": 120})
    answer = answered(gw)
    feedback = quick(v1(gw))
    fast = [feedback.copy(answer, 0.5, user="fast") for _ in range(123)]
    calm = [feedback.thumb(answer, True, user=f"calm {i}") for i in range(20)]
    flushed(feedback, 30)
    arrived = [s.event_id for s in gw.signals()]
    assert sorted(arrived) == sorted(fast + calm)
    assert [i for i in arrived if i in set(fast)] == fast
    assert feedback.refused == 0


def test_what_is_limited_by_index_goes_later_and_newer_words_on_its_answer_do_not_overtake(
    quick: Callable[..., Feedback],
) -> None:
    problem = {"index": 0, "status": 429, "message": "slowly", "retry_after": 0}
    with Desk([(202, {"retry-after": "0"}, {"accepted": 1, "errors": [problem]})]) as desk:
        feedback = quick(desk.url, batch=2)
        up, other = feedback.thumb("a", True), feedback.thumb("b", True)
        eventually(lambda: desk.kept)
        down, third = feedback.thumb("a", False), feedback.thumb("c", True)
        flushed(feedback)
    assert sorted(desk.ids) == sorted([up, other, down, third])
    assert desk.ids.index(up) < desk.ids.index(down)


# What the gateway will not take


def test_bad_items_are_counted_and_the_good_ones_among_them_kept(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback], caplog: pytest.LogCaptureFixture
) -> None:
    gw = gateway(fake)
    answer = answered(gw)
    feedback = quick(v1(gw), flush_every=0.2)
    for i in range(20):
        feedback.rate(answer, 5 if i == 13 else 9, event_id=f"rating {i}")
        feedback.send("nonsense", response_id=answer)
    flushed(feedback)
    assert (feedback.accepted, feedback.refused) == (1, 39)
    assert [s.event_id for s in gw.signals()] == ["rating 13"]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_batch_that_is_refused_for_its_first_items_sake_is_cut_until_the_good_ones_are_through(
    quick: Callable[..., Feedback],
) -> None:
    too_large: list[Told] = [(413, {}, {"error": {"message": "too large", "code": "too_large"}})] * 5
    with Desk(too_large) as desk:
        feedback = quick(desk.url, flush_every=0.2)
        ids = [feedback.thumb(f"chatcmpl-{i}", True) for i in range(16)]
        flushed(feedback)
    assert [len(items) for _, items in desk.requests][:5] == [16, 8, 4, 2, 1]
    assert desk.ids == ids[1:]
    assert (feedback.accepted, feedback.refused) == (15, 1)


def test_a_wrong_key_is_noticed_at_once_and_tokens_still_speak(
    gateway: MakeGateway, fake: FakeVllm, quick: Callable[..., Feedback]
) -> None:
    gw = gateway(fake, auth={"require_key": True})
    said = gw.chat(headers={"authorization": f"Bearer {gw.key('acme')}"})
    before = len(gw.signals())
    feedback = quick(v1(gw), "us-wrong", flush_every=0.2)
    for i in range(30):
        feedback.thumb(f"chatcmpl-{i}", True)
    vote = feedback.thumb(said.json()["id"], True, token=said.headers["x-understudy-feedback-token"])
    feedback.thumb(said.json()["id"], True, token="not.one")
    flushed(feedback)
    assert (feedback.accepted, feedback.refused) == (1, 31)
    assert [s.event_id for s in gw.signals()[before:]] == [vote]


@pytest.mark.parametrize("status", [302, 401, 404, 405])
def test_what_no_repetition_would_mend_is_given_up_and_not_followed(
    quick: Callable[..., Feedback], status: int
) -> None:
    with Desk([(status, {"location": "/v1/elsewhere"}, b"no")] * 3) as desk:
        feedback = quick(desk.url)
        feedback.thumb("x", True)
        flushed(feedback)
    assert feedback.refused == len(desk.requests) == 1


# What the app gets wrong


class Hostile:
    id = property(lambda self: 1 / 0)

    def __str__(self) -> str:
        raise RuntimeError("no name")

    __repr__ = __str__

    def __float__(self) -> float:
        raise KeyError("no number")


def loop() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


BAD: list[Callable[[Feedback], str]] = [
    lambda f: f.thumb(None, True),  # type: ignore[arg-type]
    lambda f: f.thumb("", True),
    lambda f: f.thumb(5, True),  # type: ignore[arg-type]
    lambda f: f.thumb(Hostile(), True),
    lambda f: f.thumb("x", object()),  # type: ignore[arg-type]
    lambda f: f.thumb("x", Hostile()),  # type: ignore[arg-type]
    lambda f: f.rate("x", float("nan")),
    lambda f: f.rate("x", float("inf")),
    lambda f: f.rate("x", loop()),  # type: ignore[arg-type]
    lambda f: f.rate("x", 10**5000),
    lambda f: f.correct("x", b"bytes"),  # type: ignore[arg-type]
    lambda f: f.comment("x", "x" * 300_000),
    lambda f: f.compare("x", None),  # type: ignore[arg-type]
    lambda f: f.tie(None, "x"),  # type: ignore[arg-type]
    lambda f: f.outcome("resolved", 1),
    lambda f: f.thumb("x", True, user=Hostile()),  # type: ignore[arg-type]
    lambda f: f.thumb("x", True, event_id=Hostile()),  # type: ignore[arg-type]
    lambda f: f.thumb("x", True, at=timedelta(1)),  # type: ignore[arg-type]
    lambda f: f.thumb("x", True, usr="anna"),  # type: ignore[call-arg]
    lambda f: f.thumb("x", True, kind="rating"),  # type: ignore[call-arg]
    lambda f: f.send("flag", response_id="x", value={1, 2}),
    lambda f: f.send(Hostile(), response_id="x"),  # type: ignore[arg-type]
    lambda f: f.send("flag"),
]


def test_a_wrong_argument_is_counted_and_logged_and_never_raised(caplog: pytest.LogCaptureFixture) -> None:
    with Desk() as desk, Feedback(desk.url) as feedback:
        ids = [say(feedback) for say in BAD]
        assert feedback.invalid == len(BAD)
        good = feedback.thumb("x", True)
        flushed(feedback)
    assert desk.ids == [good]
    assert len(set(ids)) == len(BAD)
    assert all(isinstance(i, str) and i for i in ids)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_what_is_said_is_what_it_was_at_that_moment(quick: Callable[..., Feedback]) -> None:
    with Desk() as desk:
        feedback = quick(desk.url, flush_every=0.2)
        target = {"line": 1}
        feedback.send("flag", response_id="x", target=target)
        target["line"] = 2
        flushed(feedback)
    assert desk.kept[0]["target"] == {"line": 1}


def test_an_apps_log_handler_that_fails_stops_nothing(quick: Callable[..., Feedback]) -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("the disk is full")

    handler = Failing()
    sender.log.addHandler(handler)
    try:
        with Desk(["cut"]) as desk:
            feedback = quick(desk.url)
            feedback.thumb("", True)
            vote = feedback.thumb("x", True)
            flushed(feedback)
            assert desk.ids == [vote]
    finally:
        sender.log.removeHandler(handler)


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "127.0.0.1:4000/v1"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "http:///v1"},
        {"api_key": "a\r\nb"},
        {"api_key": "schlüssel"},
        {"tenant": "a\nb"},
        {"batch": 0},
        {"batch": 1001},
        {"max_queue": 0},
        {"flush_every": -1},
        {"flush_every": float("nan")},
        {"timeout": 0},
    ],
)
def test_a_client_that_cannot_work_is_refused_when_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Feedback(**{"base_url": "http://127.0.0.1/v1"} | options)


def test_the_fields_are_the_gateways() -> None:
    from gateway.feedback import Item

    assert set(Item.__struct_fields__) - {"kind"} == FIELDS


# The queue


def test_the_queue_is_bounded_and_what_does_not_fit_is_counted(quick: Callable[..., Feedback]) -> None:
    hold = threading.Event()
    with Desk(hold=hold) as desk:
        feedback = quick(desk.url, max_queue=10, batch=4)
        ids = [feedback.thumb(f"chatcmpl-{i}", True) for i in range(25)]
        assert (feedback.waiting, feedback.dropped) == (10, 15)
        hold.set()
        flushed(feedback)
        assert desk.ids == ids[:10]
        last = feedback.thumb("chatcmpl-x", True)
        flushed(feedback)
        assert desk.ids[-1] == last


def test_items_go_in_batches_in_order_with_the_key(quick: Callable[..., Feedback]) -> None:
    with Desk() as desk:
        feedback = quick(desk.url + "/", "us-key", batch=20, flush_every=60.0)
        ids = [feedback.thumb(f"chatcmpl-{i}", True) for i in range(100)]
        eventually(lambda: len(desk.kept) == 100)
    assert desk.ids == ids
    assert [len(items) for _, items in desk.requests] == [20] * 5
    assert {headers["authorization"] for headers, _ in desk.requests} == {"Bearer us-key"}


def test_a_batch_is_at_most_a_megabyte(quick: Callable[..., Feedback]) -> None:
    with Desk() as desk:
        feedback = quick(desk.url, flush_every=60.0)
        for i in range(40):
            feedback.comment(f"chatcmpl-{i}", "x" * 100_000)
        flushed(feedback)
    assert len(desk.kept) == 40
    assert max(int(headers["content-length"]) for headers, _ in desk.requests) <= sender.BATCH_BYTES + 2


def test_many_threads_lose_nothing(quick: Callable[..., Feedback]) -> None:
    with Desk() as desk:
        feedback = quick(desk.url)
        ids: list[list[str]] = [[] for _ in range(8)]

        def say(mine: list[str]) -> None:
            mine += [feedback.thumb(f"chatcmpl-{i}", True) for i in range(200)]

        threads = [threading.Thread(target=say, args=(mine,)) for mine in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        flushed(feedback)
    assert sorted(desk.ids) == sorted(event_id for mine in ids for event_id in mine)
    assert feedback.accepted == 1600


def test_after_closing_nothing_is_taken_and_no_thread_is_left() -> None:
    with Desk() as desk:
        with Feedback(desk.url, flush_every=60.0) as feedback:
            vote = feedback.thumb("x", True)
            thread = feedback._sender._thread
        assert thread is not None
        assert not thread.is_alive()
        feedback.thumb("y", True)
        assert feedback.close()
    assert (desk.ids, feedback.dropped, feedback.closed) == ([vote], 1, True)


def test_closing_before_a_gateway_that_is_away_drops_what_is_left() -> None:
    feedback = Feedback("http://127.0.0.1:1/v1", flush_every=0)
    feedback.thumb("x", True)
    assert not feedback.close(0.05)
    assert (feedback.waiting, feedback.dropped) == (0, 1)
    eventually(lambda: feedback._sender._thread is None)


# The process


def script(code: str, *arguments: str) -> str:
    """What a Python of its own wrote, which has the package and nothing else."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + code,
         str(SDK / "src"), *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_queued_when_the_interpreter_ends_is_sent() -> None:
    code = """
from understudy_client import Feedback
feedback = Feedback(sys.argv[2], flush_every=60.0)
print(*[feedback.thumb(f"chatcmpl-{i}", True) for i in range(300)])
"""
    with Desk(["cut"]) as desk:
        assert script(code, desk.url).split() == desk.ids


def test_a_gateway_that_is_away_does_not_hold_the_end_up_for_ever() -> None:
    code = """
from understudy_client import Feedback
Feedback(sys.argv[2], timeout=0.2).thumb("x", True)
print("ended")
"""
    hold = threading.Event()
    with Desk(hold=hold) as desk:
        assert script(code, desk.url).split() == ["ended"]
        assert script(code, "http://127.0.0.1:1/v1").split() == ["ended"]
        hold.set()


def test_importing_and_making_a_client_starts_no_thread_and_loads_no_other_library() -> None:
    code = """
import threading
from understudy_client import Feedback
Feedback("http://127.0.0.1:1/v1")
print(threading.active_count())
"""
    assert script(code).split() == ["1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_sends_its_own_and_not_its_parents() -> None:
    code = """
import os
from understudy_client import Feedback
feedback = Feedback(sys.argv[2], flush_every=60.0)
print(feedback.thumb("parent", True), flush=True)
child = os.fork()
if not child:
    assert feedback.waiting == 0
    print(feedback.thumb("child", True), flush=True)
    os._exit(0 if feedback.flush(20) else 1)
assert os.waitpid(child, 0)[1] == 0
assert feedback.waiting == 1
"""
    with Desk() as desk:
        ids = script(code, desk.url).split()
    assert [item["response_id"] for item in desk.kept] == ["child", "parent"]
    assert sorted(desk.ids) == sorted(ids)


# The decisions


def items(n: int, tokened: bool = False) -> list[sender.Item]:
    return [sender.Item(i, 0.0, str(i), tokened, b"{}") for i in range(n)]


def test_the_pause_grows_is_bounded_and_never_shorter_than_asked_for() -> None:
    pauses = [sender.pause_after(n, None, 1.0) for n in range(1, 2000)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (sender.FIRST_PAUSE, sender.LONGEST_PAUSE)
    assert sender.pause_after(3, None, 0.0) == sender.pause_after(3, None, 1.0) / 2
    assert sender.pause_after(1, 7.0, 0.0) == 7.0 < sender.pause_after(1, 7.0, 1.0)
    assert sender.pause_after(1, 0.0, 0.0) == sender.FIRST_PAUSE
    assert sender.pause_after(1, 1e12, 0.0) == sender.LONGEST_TOLD


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert sender.retry_after(value, 100.0) == seconds


def test_what_a_status_means_for_a_batch() -> None:
    def judged(status: int, n: int = 2, **body: Any) -> sender.Verdict:
        return sender.judge(sender.Reply(status, body), items(n))

    assert judged(202, accepted=2) == sender.Verdict([], [])
    assert judged(429).limited == items(2)
    for status in (0, 200, 204, 408, 425, 500, 503, 599):
        assert (judged(status).back, judged(status).pause) == (items(2), True)
    for status in (400, 401, 403, 413):
        assert (judged(status).back, judged(status).smaller) == (items(2), True)
        assert judged(status, 1).refused == items(1)
    for status in (301, 404, 405, 418):
        assert judged(status).refused == items(2)
    error = {"code": "invalid_api_key"}
    assert judged(401, error=error).refused == items(2)
    both = [*items(1), *items(2, True)]
    mixed = sender.judge(sender.Reply(401, {"error": error}), both)
    assert (mixed.refused, mixed.back) == (both[:1], both[1:])
    assert sender.judge(sender.Reply(401, {"error": error}), items(2, True)).smaller


def test_the_readmes_blocks_run(gateway: MakeGateway, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    gw = gateway(fake)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    text = (SDK / "README.md").read_text(encoding="utf-8").replace("http://127.0.0.1:4000", gw.url)
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    first: dict[str, Any] = {}
    exec(blocks[0], first)
    flushed(first["client"].understudy)
    assert [s.kind for s in gw.signals()] == ["thumb", "outcome"]
    first["client"].close()
    second: dict[str, Any] = {}
    exec(blocks[1].replace("us-…", "us-x").replace('loser="chatcmpl-…"', 'loser="chatcmpl-b"'), second)
    flushed(second["feedback"])
    assert [s.kind for s in gw.signals()][2:] == ["rating", "correction", "comparison"]
