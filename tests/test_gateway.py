"""What an app sees of the gateway when all goes well, over real sockets and through the real OpenAI client."""

from __future__ import annotations

import base64
import json
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import ROUTE, Gateway, MakeGateway, Publisher, ask, eventually
from fake_vllm import DONE, Behaviour, FakeVllm, answer_text, sse, vector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AuthenticationError

from router.policy import Split
from telemetry.events import Interaction

TWO = {"good": {"model": "good"}, "bad": {"model": "bad"}}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


def split(**shares: float) -> dict[str, Any]:
    return {"kind": "split", "shares": shares}


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Through the OpenAI client


def test_chat_answers_as_the_upstream_would(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    answer = gw.client().chat.completions.create(**ask("one two"))
    assert answer.choices[0].message.content == answer_text("base", "one two")
    assert answer.usage is not None
    fact = gw.interaction()
    assert (fact.error, fact.status, fact.finish_reason, fact.stream) == (None, 200, "stop", False)
    assert (fact.tokens_in, fact.tokens_out) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert fact.answer == answer_text("base", "one two")
    assert fact.messages == [{"role": "user", "content": "one two"}]
    assert fact.response_id == answer.id
    assert fact.upstream == fake.url


def test_a_client_that_hangs_up_after_done_has_not_left(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    fake.script(Behaviour("hang_mid_stream", after=1000))
    with gw.http.stream("POST", "/v1/chat/completions", json=ask("one two", stream=True)) as said:
        for line in said.iter_lines():
            if line == "data: [DONE]":
                break
    fact = gw.interaction()
    assert (fact.error, fact.finish_reason) == (None, "stop")


def test_a_streamed_chat_is_the_same_text_and_is_journaled_whole(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    chunks = list(gw.client().chat.completions.create(**ask("one two"), stream=True))
    assert streamed(chunks) == answer_text("base", "one two")
    assert all(chunk.usage is None for chunk in chunks), "usage was not asked for"
    fact = gw.interaction()
    assert (fact.error, fact.stream, fact.finish_reason) == (None, True, "stop")
    assert fact.answer == answer_text("base", "one two")
    assert fact.tokens_out, "we ask for usage for ourselves"
    assert fact.first_byte is not None
    assert 0 < fact.first_byte <= fact.duration


def test_usage_that_was_asked_for_comes(gateway: MakeGateway, fake: FakeVllm) -> None:
    chunks = list(
        gateway(fake).client().chat.completions.create(**ask(), stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


def test_completions_are_served_whole_and_streamed(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    client = gw.client()
    whole = client.completions.create(model=ROUTE, prompt="say it")
    assert whole.choices[0].text == answer_text("base", "say it")
    chunks = client.completions.create(model=ROUTE, prompt="say it", stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    first, second = gw.wait_interactions(2)
    assert first.endpoint == second.endpoint == "completions"
    assert first.answer == second.answer == whole.choices[0].text


def test_responses_are_served_whole_and_streamed(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    client = gw.client()
    whole = client.responses.create(model=ROUTE, input="say it")
    assert whole.output_text == answer_text("base", "say it")
    with client.responses.create(model=ROUTE, input="say it", stream=True) as events:
        last = list(events)[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    for fact in gw.wait_interactions(2):
        assert (fact.error, fact.finish_reason, fact.answer) == (None, "completed", whole.output_text)
        assert fact.tokens_out
    assert gw.interaction(1).response_id == whole.id


def test_embeddings_pass_through_in_base64(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    given_back = gw.client().embeddings.create(model=ROUTE, input=["a", "b"])  # the client asks for base64 by itself
    assert fake.requests[0].json["encoding_format"] == "base64"
    assert [item.embedding for item in given_back.data] == [vector("base", "a"), vector("base", "b")]
    raw = gw.client().embeddings.create(model=ROUTE, input="a", encoding_format="base64").data[0].embedding
    assert list(struct.unpack("<8f", base64.b64decode(str(raw)))) == vector("base", "a")
    assert gw.interaction().error is None


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_pass_through_and_are_journaled(gateway: MakeGateway, fake: FakeVllm, stream: bool) -> None:
    gw = gateway(fake)
    answer = gw.client().chat.completions.create(**ask("find x"), tools=[TOOL], tool_choice="auto", stream=stream)
    if stream:
        deltas = [
            c.choices[0].delta.tool_calls[0].function for c in answer if c.choices and c.choices[0].delta.tool_calls
        ]
        arguments = "".join(d.arguments or "" for d in deltas)
    else:
        arguments = answer.choices[0].message.tool_calls[0].function.arguments
    assert json.loads(arguments) == {"q": "find x"}
    assert fake.requests[0].json["tools"] == [TOOL]
    fact = gw.interaction()
    assert fact.finish_reason == "tool_calls"
    assert [(c["name"], c["arguments"]) for c in fact.tool_calls] == [("search", arguments)]


def test_response_format_passes_through(gateway: MakeGateway, fake: FakeVllm) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}
    gateway(fake).client().chat.completions.create(**ask(), response_format=wanted)
    assert fake.requests[0].json["response_format"] == wanted


def test_unknown_fields_reach_the_upstream_as_they_were_written(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    body = (
        b'{"seed": 1e2 , "guided_x":{"b":1,"a":[1.50,null]},"model":"assistant","big":123456789012345678901234567890,'
        b'"messages":[{"role":"user","content":"h\\u00e9\xc3\xa9","extra":true}],"vllm_xargs":{"z":"\\n"}}'
    )
    assert gw.http.post("/v1/chat/completions", content=body).status_code == 200
    sent = fake.requests[0].body
    for piece in (
        b"1e2",
        b'{"b":1,"a":[1.50,null]}',
        b"123456789012345678901234567890",
        b'"h\\u00e9\xc3\xa9","extra":true',
        b'{"z":"\\n"}',
    ):
        assert piece in sent
    assert fake.requests[0].json == json.loads(body) | {"model": "base"}


def test_the_arms_model_params_and_system_prompt_are_applied(gateway: MakeGateway, fake: FakeVllm) -> None:
    arm = {
        "model": "good",
        "system": "Be brief.",
        "params": {"temperature": 0.1, "max_tokens": 3},
        "prompt_version": "p7",
    }
    gw = gateway(fake, arms={"concise": arm})
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": "hi"}]
    answer = gw.client().chat.completions.create(model=ROUTE, messages=messages, temperature=1.0, top_p=0.5)
    sent = fake.requests[0].json
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["top_p"]) == ("good", 0.1, 3, 0.5)
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, messages[1]]
    assert answer.choices[0].finish_reason == "length"
    fact = gw.interaction()
    assert (fact.answerer.arm, fact.answerer.model, fact.answerer.prompt_version) == ("concise", "good", "p7")
    assert fact.messages == messages, "what the app asked is journaled, not what we made of it"


def test_the_system_prompt_of_responses_becomes_its_instructions(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms={"concise": {"model": "base", "system": "Be brief."}})
    gw.client().responses.create(model=ROUTE, input="x", instructions="old")
    assert fake.requests[0].json["instructions"] == "Be brief."


@pytest.mark.parametrize("messages", [None, []])
def test_a_system_prompt_survives_a_request_without_messages(
    gateway: MakeGateway, fake: FakeVllm, messages: list[object] | None
) -> None:
    gw = gateway(fake, arms={"concise": {"model": "base", "system": "Be brief."}})
    said = gw.http.post("/v1/chat/completions", json={"model": ROUTE, "messages": messages})
    assert said.status_code == 200
    assert fake.requests[0].json["messages"] == [{"role": "system", "content": "Be brief."}]


def test_models_are_the_routes_and_for_admins_their_arms(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO)
    assert [m.id for m in gw.client().models.list()] == [ROUTE]
    assert [m.id for m in gw.client(gw.key("acme")).models.list()] == [ROUTE]
    admin = gw.client(gw.key("acme", "admin"))
    assert [m.id for m in admin.models.list()] == [ROUTE, f"{ROUTE}:good", f"{ROUTE}:bad"]


def test_only_an_admin_may_pin_an_arm(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO)
    pinned = f"{ROUTE}:bad"
    admin = gw.client(gw.key("acme", "admin"))
    assert admin.chat.completions.create(**ask() | {"model": pinned}).model == "bad"
    assert gw.interaction().answerer.policy == "pinned"
    assert gw.chat(model=pinned).status_code == 404
    assert gw.chat(model=pinned, headers={"authorization": f"Bearer {gw.key('beta')}"}).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_answers_carry_our_headers_and_their_id_ends_in_our_request_id(
    gateway: MakeGateway, fake: FakeVllm, stream: bool
) -> None:
    gw = gateway(fake)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    said = gw.chat(stream=stream, headers={"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "theirs"})
    request_id = said.headers["x-request-id"]
    assert request_id == fake.requests[0].headers["x-request-id"] != "theirs"
    answer_id = (json.loads(said.text.split("\n")[0][6:]) if stream else said.json())["id"]
    assert answer_id == f"chatcmpl-{request_id}"
    assert said.headers["x-understudy-feedback-token"].count(".") == 1
    fact = gw.interaction()
    assert said.headers["server-timing"] == f'traceparent;desc="00-{trace}-{fact.span_id}-01"'
    assert fake.requests[0].headers["traceparent"] == f"00-{trace}-{fact.span_id}-01"
    assert (fact.request_id, fact.trace_id, fact.parent_span_id) == (request_id, trace, parent)
    assert len(said.headers.get_list("x-request-id")) == len(said.headers.get_list("content-type")) == 1


@pytest.mark.parametrize(
    "parent", ["00-" + "z" * 32 + "-" + "y" * 16 + "-01", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "junk"]
)
def test_a_broken_traceparent_begins_a_new_trace(gateway: MakeGateway, fake: FakeVllm, parent: str) -> None:
    gw = gateway(fake)
    assert gw.chat(headers={"traceparent": parent}).status_code == 200
    fact = gw.interaction()
    assert fact.trace_id is not None
    assert int(fact.trace_id, 16)
    assert fact.parent_span_id is None


def test_identity_comes_from_headers_then_metadata_then_openais_fields(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    said = {
        "session_id": "s1",
        "user_id": "ann",
        "task_type": "code",
        "task_id": "t9",
        "country": "NL",
        "consent": "train",
    }
    said |= {"knowledge_version": "k3", "retrieval_ids": "a, b"}
    gw.chat(metadata=said, user="bob")
    gw.chat(
        metadata=said, headers={"x-understudy-session": "s2", "x-understudy-user": "eve", "x-understudy-task": "sql"}
    )
    gw.chat(user="ann")
    first, second, third = gw.wait_interactions(3)
    assert (first.task_type, first.task_id, first.country) == ("code", "t9", "NL")
    assert (first.consent, first.knowledge_version, first.retrieval_ids) == ("train", "k3", ("a", "b"))
    assert second.task_type == "sql"
    assert len({first.session, second.session, third.session, "s1", "s2"}) == 5, "sessions are pseudonyms too"
    assert first.user == third.user not in (None, "ann"), "users are journaled under pseudonyms"
    assert second.user != first.user


def test_a_whole_conversation_is_one_session_without_being_told(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    turns: list[dict[str, str]] = [{"role": "user", "content": "begin"}]
    for text in ("more", "and more"):
        answer = gw.client().chat.completions.create(model=ROUTE, messages=turns)
        turns += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": text},
        ]
    gw.chat("another beginning")
    facts = gw.wait_interactions(3)
    assert [f.turn for f in facts] == [0, 1, 0]
    assert facts[0].session == facts[1].session != facts[2].session


def test_health_readiness_and_metrics(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    gw.chat()
    gw.wait_interactions()
    assert gw.http.get("/healthz").status_code == 200
    assert gw.http.get("/readyz").status_code == 200
    page = gw.http.get("/metrics").text
    assert f'understudy_requests_total{{arm="champion",error="",route="{ROUTE}",status="200"}} 1.0' in page
    labels = f'arm="champion",gen_ai_operation_name="chat",gen_ai_request_model="{ROUTE}",gen_ai_response_model="base"'
    assert f"gen_ai_server_time_to_first_token_seconds_count{{{labels}}} 1.0" in page
    assert f'gen_ai_client_token_usage_token_count{{{labels},gen_ai_token_type="output"}} 1.0' in page
    fake.stop()
    assert gw.http.get("/healthz").status_code == 200
    not_ready = gw.http.get("/readyz")
    assert not_ready.status_code == 503
    assert ROUTE in not_ready.text


# Byte identity

# What events may hold: every kind of text, and things that look like framing or like usage.
WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(['"usage"', "[DONE]", "data: ", '"choices":[]', "👩‍🚀", "\\n\\n"])
)
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A stream with its usage chunk, and without."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "base"}
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in draw(st.lists(WORDS, max_size=6))]
    if draw(st.booleans()):  # as vLLM with continuous usage: a chunk with choices and usage stays
        chunks += [{"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": USAGE}]
    events = [sse(head | chunk) for chunk in chunks]
    comment = [b": keep-alive\n\n"] if draw(st.booleans()) else []
    usage = sse(head | {"choices": [], "usage": USAGE})
    return b"".join([*events, *comment, usage, DONE]), b"".join([*events, *comment, DONE])


@pytest.fixture(scope="module")
def one_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeVllm]]:
    """A gateway for hypothesis' many examples."""
    folder = tmp_path_factory.mktemp("bytes")
    config = folder / "understudy.yaml"
    with FakeVllm(["base"]) as fake:
        config.write_text(
            f"state: sqlite:////{folder}/state.db\n"
            f"routes: {{{ROUTE}: {{upstreams: ['{fake.url}'], arms: {{champion: {{model: base}}}}}}}}\n"
        )
        gw = Gateway(config).start()
        yield gw, fake
        gw.stop()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams(), st.booleans())
def test_a_stream_cut_at_every_byte_reaches_the_client_byte_for_byte(
    one_gateway: tuple[Gateway, FakeVllm], stream: tuple[bytes, bytes], usage: bool
) -> None:
    gw, fake = one_gateway
    with_usage, without = stream
    fake.script(Behaviour("split", data=with_usage))
    said = gw.chat(stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))
    assert said.content == (with_usage if usage else without)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streams(), st.booleans(), st.data())
def test_a_stream_cut_anywhere_reaches_the_client_byte_for_byte(
    one_gateway: tuple[Gateway, FakeVllm], stream: tuple[bytes, bytes], usage: bool, data: st.DataObject
) -> None:
    gw, fake = one_gateway
    with_usage, without = stream
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, len(with_usage) - 1), min_size=1, max_size=6))))
    fake.script(Behaviour("split", data=with_usage, offsets=cuts))
    said = gw.chat(stream=True, **({"stream_options": {"include_usage": True}} if usage else {}))
    assert said.content == (with_usage if usage else without)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "né 🙂"}],
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "né 🙂"}]}),
        ("completions", {"prompt": "né 🙂", "stream": True, "stream_options": {"include_usage": True}}),
        ("responses", {"input": "né 🙂", "stream": True}),
        ("embeddings", {"input": "né 🙂"}),
    ],
)  # fmt: skip
def test_every_endpoints_answer_is_the_upstreams_bytes(
    gateway: MakeGateway, fake: FakeVllm, path: str, body: dict[str, Any]
) -> None:
    gw = gateway(fake)
    fake.script(Behaviour("split", n=None))
    said = gw.http.post(f"/v1/{path}", json={"model": ROUTE} | body)
    request = {"x-request-id": said.headers["x-request-id"]}
    direct = httpx.post(f"{fake.url}/v1/{path}", json={"model": "base"} | body, headers=request)
    assert _timeless(said.content) == _timeless(direct.content)
    assert said.headers["content-type"] == direct.headers["content-type"]


def _timeless(body: bytes) -> bytes:
    """The fake's clock may have ticked between the two requests."""
    import re

    return re.sub(rb'"created(_at)?":\d+', b'"created":0', body)


@pytest.mark.parametrize(
    "data",
    [
        b"data: no json\r\n\r\ndata: [DONE]\r\n\r\n",
        b"event: x\ndata: 1\n\n",
        b"no end at all",
        b": only a comment\n\n",
        b"\n\n\n\n\n",
    ],
)  # fmt: skip
def test_streams_of_foreign_framing_pass_untouched(gateway: MakeGateway, fake: FakeVllm, data: bytes) -> None:
    fake.script(Behaviour("raw_stream", data=data))
    assert gateway(fake).chat(stream=True).content == data


def test_events_come_as_soon_as_the_upstream_sends_them(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    fake.script(Behaviour("hang_mid_stream", after=2))
    with gw.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as said:
        pieces = said.iter_raw()
        got = b""
        while got.count(b"\n\n") < 2:
            got += next(pieces)
        fake.release()
        got += b"".join(pieces)
    assert got.endswith(DONE)


# Routing


def test_a_session_keeps_its_arm_when_the_weights_change(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO, policy={"prior": {"mass": 1}, "floor": 0.01, "holdout": 0.0})
    sessions = [f"s{i}" for i in range(20)]
    first = {s: gw.chat("hi", headers={"x-understudy-session": s}).json()["model"] for s in sessions}
    assert set(first.values()) == {"good", "bad"}
    before = gw.interaction(1).answerer.snapshot
    gw.wait_interactions(20)
    for fact in gw.interactions():
        gw.feedback({"response_id": fact.response_id, "kind": "thumb", "value": fact.answerer.arm == "good"})
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "2"}]

    def weight() -> float:
        with gw.store() as store:
            snapshot = store.snapshot(ROUTE)
        return snapshot.segments[""]["good"] if snapshot else 0.5

    eventually(lambda: weight() > 0.9)
    eventually(lambda: _drawn(gw, f"new-{weight()}").answerer.snapshot > before)
    already = len(gw.interactions())
    for session in sessions:
        said = gw.chat(headers={"x-understudy-session": session}, messages=turns)
        assert said.json()["model"] == first[session]
    again = gw.wait_interactions(already + 20)[already:]
    assert all(f.answerer.recalled for f in again)
    by_session = {f.session: f.answerer for f in gw.interactions()[:20]}
    for fact in again:
        assert fact.answerer.propensity == by_session[fact.session].propensity
        assert fact.answerer.snapshot == by_session[fact.session].snapshot


def test_a_session_keeps_its_arm_at_another_worker_though_weights_moved_under_its_first_answer(
    gateway: MakeGateway, fake: FakeVllm, publisher: Publisher
) -> None:
    policy = {"refresh": "50ms"}
    one, two = (gateway(fake, arms=TWO, policy=policy, state=publisher.state) for _ in range(2))
    for n in range(5):
        for gw in (one, two):
            publisher.show(gw, {"good": 0.999, "bad": 0.001}, lead="good")
        headers, slow = {"x-understudy-session": f"s{n}"}, ask("!slow:0.06 x", stream=True)
        with one.http.stream("POST", "/v1/chat/completions", json=slow, headers=headers) as said:
            pieces = said.iter_raw()
            assert b"good" in next(pieces)
            publisher.publish({"good": 0.001, "bad": 0.999}, lead="good")
            for _ in pieces:
                pass
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        assert two.chat(headers=headers, messages=turns).json()["model"] == "good"


def _drawn(gw: Gateway, session: str) -> Interaction:
    """The interaction of one more request in a session of its own."""
    before = len(gw.interactions())
    request_id = gw.chat("x", headers={"x-understudy-session": f"{session}-{before}"}).headers["x-request-id"]
    return eventually(lambda: next((f for f in gw.interactions() if f.request_id == request_id), None))


def test_a_restarted_worker_recalls_the_arm_from_the_store(gateway: MakeGateway, fake: FakeVllm, tmp_path: Any) -> None:
    state = f"sqlite:////{tmp_path}/shared.db"
    one = gateway(fake, arms=TWO, policy=split(good=0.5, bad=0.5), state=state)
    sessions = [f"s{i}" for i in range(12)]
    first = {s: one.chat(headers={"x-understudy-session": s}).json()["model"] for s in sessions}
    one.wait_interactions(12)
    one.stop()
    # Other shares, so that a fresh draw would give "good" to all.
    two = gateway(fake, arms=TWO, policy=split(good=1.0), state=state)
    turns = [*ask("hello")["messages"], {"role": "assistant", "content": "x"}, {"role": "user", "content": "2"}]
    second = {s: two.chat(headers={"x-understudy-session": s}, messages=turns).json()["model"] for s in sessions}
    assert second == first


def test_weights_move_within_two_seconds_of_feedback(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO, policy={"refresh": "1s", "prior": {"mass": 1}, "holdout": 0.0})
    gw.settled()
    while len({f.answerer.arm for f in gw.interactions()}) < 2:
        _drawn(gw, "s")
    before = gw.interactions()[-1].answerer.snapshot
    for fact in gw.interactions():
        said = gw.feedback({"response_id": fact.response_id, "kind": "thumb", "value": fact.answerer.arm == "good"})
        assert said.status_code == 202
    eventually(lambda: _drawn(gw, "after").answerer.snapshot > before, timeout=2.0)
    with gw.store() as store:
        snapshot = store.snapshot(ROUTE)
    assert snapshot is not None
    assert snapshot.segments[""]["good"] > 0.6


def test_split_shares_are_kept(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO, policy=split(good=0.8, bad=0.2))
    for i in range(400):
        gw.chat(headers={"x-understudy-session": f"s{i}"})
    drawn = Counter(f.answerer.arm for f in gw.wait_interactions(400))
    assert 280 <= drawn["good"] <= 360, (
        drawn
    )  # 5 standard deviations either way; the draw is by hash, so it never varies
    assert isinstance(gw.settings.routes[ROUTE].policy, Split)


def test_an_arm_left_out_of_the_shares_gets_nothing(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO, policy=split(good=1.0))
    assert {gw.chat(headers={"x-understudy-session": f"s{i}"}).json()["model"] for i in range(30)} == {"good"}


def test_the_journaled_propensity_is_the_snapshots(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, arms=TWO, policy={"holdout": 0.3, "floor": 0.1})
    gw.settled()
    with gw.store() as store:
        snapshot = eventually(lambda: store.snapshot(ROUTE))
    eventually(lambda: _drawn(gw, "warm").answerer.snapshot == snapshot.version)
    already = len(gw.interactions())
    for i in range(40):
        gw.chat(headers={"x-understudy-session": f"s{i}"})
    for fact in gw.wait_interactions(already + 40)[already:]:
        by = fact.answerer
        assert (by.snapshot, by.policy) == (snapshot.version, "thompson")
        assert by.propensity == pytest.approx(0.3 / 2 + 0.7 * snapshot.segments[""][by.arm])
    held = [f.answerer.holdout for f in gw.interactions()[already:]]
    assert any(held)
    assert not all(held)


def test_the_same_question_again_is_a_regenerate(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    gw.chat("again")
    gw.chat("again")
    signal = eventually(lambda: gw.signals("regenerate"))[0]
    assert signal.response_id == gw.interaction(1).request_id
    assert signal.source == "detected"
    assert eventually(gw.sums)["champion"].s == pytest.approx(0.5 - 0.5 * 0.6)


def test_an_sdk_retry_or_one_after_a_failure_is_no_regenerate(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    gw.chat("again")
    gw.chat("again", headers={"x-stainless-retry-count": "1"})
    fake.script(Behaviour("status", status=500))
    gw.chat("failed")
    gw.chat("failed")
    gw.chat("told apart")
    gw.wait_interactions(5)
    gw.settled()
    assert gw.signals("regenerate") == []
    assert [f.sdk_retry for f in gw.interactions()] == [0, 1, 0, 0, 0]


def test_a_question_in_another_session_is_no_regenerate(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    for session in ("s1", "s2"):
        gw.chat("same", headers={"x-understudy-session": session})
    gw.wait_interactions(2)
    gw.settled()
    assert gw.signals("regenerate") == []


# Capture


@pytest.mark.parametrize("stream", [False, True])
def test_with_capture_off_no_text_is_left_anywhere(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Any, stream: bool
) -> None:
    gw = gateway(fake, capture={"text": "off"})
    said = gw.chat("the zebra secret", stream=stream, tools=[TOOL])
    item = {
        "response_id": gw.interaction().response_id,
        "kind": "comment",
        "text": "zebra",
        "target": {"quote": "zebra"},
    }
    assert said.status_code == 200
    assert gw.feedback(item).status_code == 202
    fact = gw.interaction()
    assert (fact.messages, fact.answer, fact.tool_calls, fact.redacted) == (None, None, None, ("off",))
    gw.stop()
    for file in tmp_path.iterdir():
        assert b"zebra" not in file.read_bytes(), file.name


def test_redacted_capture_masks_personal_data_and_keeps_the_rest(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Any
) -> None:
    gw = gateway(fake, capture={"text": "redacted"})
    private = "mail ann@example.com or pay 4111 1111 1111 1111 with sk-abcdefghijklmnop1234"
    assert private in gw.chat(private).json()["choices"][0]["message"]["content"], "the user gets the text itself"
    fact = gw.interaction()
    gw.feedback({"response_id": fact.response_id, "kind": "comment", "text": private, "target": private})
    assert set(fact.redacted) >= {"email", "card", "key"}
    assert "mail [email] or pay [card] with [key]" in fact.messages[0]["content"]
    assert "[email]" in (fact.answer or "")
    gw.stop()
    for file in tmp_path.iterdir():
        kept = file.read_bytes()
        assert not any(part in kept for part in (b"ann@example", b"4111 1111", b"abcdefghijklmnop1234")), file.name


# Keys


def test_with_require_key_only_a_valid_key_gets_in(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, auth={"require_key": True})
    with pytest.raises(AuthenticationError) as refused:
        gw.client("us-wrong").chat.completions.create(**ask())
    assert refused.value.code == "invalid_api_key"
    assert gw.http.get("/v1/models").status_code == 401
    secret = gw.key("acme")
    gw.client(secret).chat.completions.create(**ask())
    assert gw.interaction().tenant == "acme"


def test_a_revoked_key_stops_working(gateway: MakeGateway, fake: FakeVllm) -> None:
    import msgspec

    gw = gateway(fake, auth={"require_key": True})
    secret = {"authorization": f"Bearer {gw.key('acme')}"}
    assert gw.chat(headers=secret).status_code == 200
    with gw.store() as store:
        store.put_key(msgspec.structs.replace(store.list_keys()[0], revoked=True))
    eventually(lambda: gw.chat(headers=secret).status_code == 401)


def test_an_app_key_cannot_name_another_tenant(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    gw.chat(headers={"authorization": f"Bearer {gw.key('acme')}", "x-understudy-tenant": "beta"})
    gw.chat(headers={"authorization": f"Bearer {gw.key('acme', 'admin')}", "x-understudy-tenant": "beta"})
    assert [f.tenant for f in gw.wait_interactions(2)] == ["acme", "beta"]


def test_a_session_counts_in_the_segment_of_its_task_type(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, policy={"segment_by": "task_type"})
    said = gw.chat("hello", {"x-understudy-task": "code"})
    assert gw.interaction().answerer.segment == "code"
    gw.feedback({"response_id": said.json()["id"], "kind": "thumb", "value": True})
    gw.settled()
    with gw.store() as store:
        assert {cell.segment for cell in store.sums(ROUTE)} == {"code"}
        eventually(lambda: "code" in store.snapshot(ROUTE).segments)  # type: ignore[union-attr]
