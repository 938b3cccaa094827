"""Threads: which earlier answer a stateless request continues, whatever clients do to the conversation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import MakeGateway, eventually
from fake_vllm import Behaviour, FakeVllm
from hypothesis import given
from hypothesis import strategies as st

from telemetry.events import Answerer, Interaction
from telemetry.threads import Threads, thread_of

KEY = b"k" * 64
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "conversations" / "realhumaneval_even.jsonl"
Messages = list[dict[str, Any]]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def request(name: str, messages: Any, answer: str = "", at: float = 0.0, **fields: Any) -> Interaction:
    tenant, calls = fields.pop("tenant", "t"), fields.pop("calls", [])
    return Interaction(
        event_id=f"e-{name}", at=at, request_id=name, route="r", tenant=tenant, session=fields.pop("session", name),
        answerer=Answerer("a", "m"), thread=thread_of(tenant, messages, answer, calls, KEY), **fields,
    )  # fmt: skip


def found(*requests: Interaction, **options: Any) -> str | None:
    """What the last one continues."""
    threads = Threads()
    for one in requests[:-1]:
        threads.add(one)
    return threads.find(requests[-1], **options)


ASKED = [{"role": "system", "content": "Be kind."}, user("What is 2 + 2?")]
FIRST = request("first", ASKED, "It is four.\n\nAnything  else?")
NEXT = user("And 3 + 3?")


@pytest.mark.parametrize(
    "sent",
    [
        [*ASKED, said("It is four.\n\nAnything  else?"), NEXT],
        [{"role": "developer", "content": "Now be brief."}, ASKED[1], said("It is four.\n\nAnything  else?"), NEXT],
        [*ASKED, said("It is four. Anything else? "), NEXT],
        [*ASKED, said([{"type": "text", "text": "It is four.\n\nAnything  else?"}]), NEXT],
        [*ASKED, said("It is four.\n\nAnything  else?"), user("No,"), user("3 + 3!")],
    ],
)
def test_a_request_finds_the_answer_that_it_carries(sent: Messages) -> None:
    assert found(FIRST, request("next", sent)) == "first"


def test_one_without_an_answer_or_with_another_one_continues_nothing() -> None:
    assert found(FIRST, request("next", ASKED)) is None
    other = [user("What is 5 + 5?"), said("It is four.\n\nAnything  else?"), NEXT]
    assert found(FIRST, request("next", other)) is None
    assert found(FIRST, request("next", [*ASKED, said("Bananas."), NEXT]), alike=lambda _: 0.05) is None


def test_reasoning_that_the_client_strips_makes_no_difference() -> None:
    thought = request("first", ASKED, "<think>\nTwo and two…\n</think>\n\nFour.")
    assert found(thought, request("next", [*ASKED, said("Four."), NEXT])) == "first"


def test_an_edited_answer_finds_the_likest_one_to_the_same_input() -> None:
    one, two = request("one", ASKED, "It is four."), request("two", ASKED, "Four, I am sure.", at=1.0)
    likeness = {"one": 0.8, "two": 0.5}
    assert found(one, two, request("next", [*ASKED, said("It is 4."), NEXT], at=2.0), alike=likeness.get) == "one"


def test_branches_stay_apart() -> None:
    one, two = request("one", ASKED, "Four."), request("two", ASKED, "4", at=1.0)
    for answer, name in (("Four.", "one"), ("4", "two")):
        assert found(one, two, request("next", [*ASKED, said(answer), NEXT], at=2.0)) == name
    again = request("again", ASKED, "Four.", at=1.5)
    assert found(one, again, request("next", [*ASKED, said("Four."), NEXT], at=2.0)) == "again", "the newest of equals"


def test_dropped_turns_leave_the_last_exchange() -> None:
    long = [*ASKED, said("Four."), user("And the root of 4?")]
    dropped = [user("And the root of 4?"), said("Two."), NEXT]
    assert found(request("first", ASKED, "Four."), request("second", long, "Two."), request("x", dropped)) == "second"


def test_tool_calls_are_turns_too() -> None:
    kept = [{"index": 0, "id": "c1", "name": "look", "arguments": '{"at": 1}'}]
    called = request("first", ASKED, "", calls=kept)
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "7"}
    assert found(called, request("next", [*ASKED, said(None, tool_calls=[call]), result])) == "first"
    other = call | {"id": "c2"}
    assert found(called, request("next", [*ASKED, said(None, tool_calls=[other]), result]), alike=lambda _: 0.0) is None


def test_pictures_count_by_what_they_are() -> None:
    def shown(url: str) -> Messages:
        return [user([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}])]

    one, two = request("one", shown("data:a"), "A cat."), request("two", shown("data:b"), "A cat.")
    assert found(one, two, request("next", [*shown("data:a"), said("A cat."), NEXT])) == "one"


def test_unicode_is_compared_composed() -> None:
    first = request("first", [user("Cafe\u0301?")], "Caf\u00e9\x00 \u202e!")
    assert found(first, request("next", [user("Caf\u00e9?"), said("Cafe\u0301\x00 \u202e!"), NEXT])) == "first"


def test_nothing_is_linked_across_tenants_or_users() -> None:
    sent = [*ASKED, said("Four."), NEXT]
    assert found(request("a", ASKED, "Four.", tenant="acme"), request("b", sent, tenant="umbrella")) is None
    assert found(request("a", ASKED, "Four.", user="ann"), request("b", sent, user="bob")) is None
    assert found(request("a", ASKED, "Four.", user="ann"), request("b", sent)) == "a", "one of the two is not known"
    both = request("a", ASKED, "Four.", user="ann"), request("n", ASKED, "Four.", at=1.0)
    assert found(*both, request("b", sent, at=2.0, user="ann")) == "a", "the same user's rather than the newest"
    named = request("c", "what?", previous="first", tenant="umbrella")
    assert found(FIRST, named) is None


def test_an_answer_that_the_app_names_is_taken_at_its_word() -> None:
    first = request("first", ASKED, "Four.", response_id="resp_1")
    for name in ("resp_1", "first"):
        assert found(first, request("next", "and now?", previous=name)) == "first"
    sent = [*ASKED, said("Four."), NEXT]
    assert found(first, request("next", sent, previous="resp_gone")) is None


def test_what_comes_later_was_not_continued() -> None:
    late = msgspec.structs.replace(FIRST, at=9.0)
    assert found(late, request("next", [*ASKED, said("It is four.\n\nAnything  else?"), NEXT], at=1.0)) is None


def next_turn(n: int, at: float) -> Interaction:
    return request(f"next-{n}", [user(f"q{n}"), said("yes"), NEXT], at=at)


def test_memory_is_bounded_in_number_and_the_latest_are_remembered() -> None:
    threads = Threads(limit=100)
    for n in range(1000):
        threads.add(request(f"r{n}", [user(f"q{n}")], "yes", at=n))
        assert len(threads) <= 100
        for back in (0, 20, 49):
            assert n < back or threads.find(next_turn(n - back, at=1000.0)) == f"r{n - back}"
    assert threads.find(next_turn(899, at=1000.0)) is None


def test_memory_is_bounded_in_time_and_a_lifetime_is_remembered() -> None:
    threads = Threads(lifetime=50.0)
    threads.add(request("old", [user("q1")], "yes", at=0.0))
    threads.add(request("later", [user("q2")], "yes", at=49.0))
    threads.add(request("last", [user("q3")], "yes", at=98.0))
    assert [threads.find(next_turn(n, at=99.0)) for n in (1, 2, 3)] == ["old", "later", "last"]
    threads.add(request("new", [user("q4")], "yes", at=1000.0))
    assert [threads.find(next_turn(n, at=1001.0)) for n in (1, 2, 3, 4)] == [None, None, "last", "new"]
    threads.add(request("newest", [user("q5")], "yes", at=2000.0))
    assert len(threads) == 2


def test_a_request_that_is_told_twice_is_remembered_once() -> None:
    threads = Threads(limit=4)
    for n in range(3):
        threads.add(request(f"r{n}", [user(f"q{n}")], "yes", at=n))
        threads.add(request("r0", [user("q0")], "yes", at=0.0))
    assert len(threads) == 3


anything = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type", "tool_calls", "function", "id"]), below)
    ),
    max_leaves=12,
)


@given(messages=anything, answer=st.text(max_size=20))
def test_any_json_can_be_hashed(messages: Any, answer: str) -> None:
    wrapped = json.loads(json.dumps(messages))
    thread_of("t", wrapped, answer, [], KEY)
    assert thread_of("t", [wrapped], answer, [], KEY) == thread_of("t", [wrapped], answer, [], KEY)


roles = st.sampled_from(["user", "assistant", "tool"])
turns = st.lists(st.tuples(roles, st.text(alphabet="ab ", max_size=4)), max_size=5)


@given(one=turns, other=turns)
def test_hashes_are_equal_only_where_turns_are(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
    def plain(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(role, " ".join(text.split())) for role, text in said]

    def key(said: list[tuple[str, str]]) -> str:
        thread = thread_of(
            "t", [{"role": role, "content": text} for role, text in [("user", "q"), *said]], "x", [], KEY
        )
        assert thread is not None
        return thread.asked

    assert (key(one) == key(other)) == (plain(one) == plain(other))


def test_recorded_and_made_conversations_meet_the_bars() -> None:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    command = [
        sys.executable,
        str(ROOT / "bench" / "threading_replay.py"),
        str(SHARED),
        "--json",
        "--conversations",
        "2000",
    ]
    data = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    assert [bar["what"] for bar in data["bars"] if not bar["met"]] == []


# Through the gateway: a conversation without any session's name.


def test_a_complaint_is_about_the_answer_that_the_conversation_carries(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    first = gw.chat("What is the capital of Australia?").json()
    answer = first["choices"][0]["message"]["content"]
    history = [user("What is the capital of Australia?"), said(answer)]
    gw.chat(messages=[*history, user("No, that is wrong. Try again!")])
    signal = eventually(lambda: gw.signals("complaint"))[0]
    assert signal.response_id == gw.interaction(1).request_id
    assert signal.source == "detected"


def test_links_are_found_though_no_text_is_kept(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, capture={"text": "off"})
    first = gw.chat("hello").json()
    answer = first["choices"][0]["message"]["content"]
    gw.chat(messages=[user("hello"), said(answer), user("and then?")])
    one, two = gw.wait_interactions(2)
    assert (one.messages, one.answer) == (None, None)
    assert found(one, two) == one.request_id


def test_an_edit_is_heard_though_the_conversation_begins_otherwise(gateway: MakeGateway, fake: FakeVllm) -> None:
    """Apps write the time of day into the system prompt, so the second request looks like another session's."""
    gw = gateway(fake, reward={"window": "1s"})

    def clock(time: str) -> dict[str, str]:
        return {"role": "system", "content": f"You help. It is {time}."}

    question = user("What is the capital of Australia?")
    first = gw.chat(messages=[clock("12:00"), question]).json()
    answer = first["choices"][0]["message"]["content"]
    gw.interaction(1)
    gw.chat(messages=[clock("12:01"), question, said(answer), user("No, that is wrong. Try again!")])
    signal = eventually(lambda: gw.signals("complaint"))[0]
    one, two = gw.wait_interactions(2)
    assert one.session != two.session
    assert signal.response_id == one.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_another_choice_is_gone_on_from_and_no_edit(gateway: MakeGateway, fake: FakeVllm, stream: bool) -> None:
    def piece(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "delta" if stream else "message": {"role": "assistant", "content": text}}

    first, second = "Canberra is the capital of Australia.", "The capital of Australia is Canberra, not Sydney."
    if stream:
        pieces = [piece(0, first[:9]), piece(1, second[:5]), piece(1, second[5:]), piece(0, first[9:])]
        events = [json.dumps({"id": "chatcmpl-x", "choices": [one]}).encode() for one in pieces]
        body = b"".join(b"data: %b\n\n" % event for event in [*events, b"[DONE]"])
        fake.script(Behaviour("raw_stream", data=body))
    else:
        body = {"id": "chatcmpl-x", "choices": [piece(0, first), piece(1, second)]}
        fake.script(Behaviour("status", status=200, body=body))
    gw = gateway(fake, reward={"window": "1s"})
    question = user("What is the capital of Australia?")
    gw.chat(messages=[question], n=2, stream=stream)
    one = gw.interaction(1)
    assert (one.answer, one.choices) == (first, 2)
    gw.chat(messages=[question, said(second), user("No, that is wrong. Try again!")])
    two = gw.interaction(2)
    assert found(one, two) == one.request_id
    assert eventually(lambda: gw.signals("complaint"))[0].response_id == one.request_id
    assert gw.signals("edit") == []
