"""Detectors: what they see, and what they must not take for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from telemetry.events import SIGNAL_KINDS, Answerer, Interaction, Signal
from telemetry.signals import RULES, Rules, after_silence, alike, compared, detect, heard_from, tells
from telemetry.tone import tone
from telemetry.wording import canonical, cut_from, grams, likeness, prose, said_again, turns

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

SYSTEM = {"role": "system", "content": "You are helpful."}
QUESTION = {"role": "user", "content": "How do I hash a string in Python?"}
ANSWER = "Use the `hashlib` module:\n\n```python\nimport hashlib\nhashlib.sha256(b'x').hexdigest()\n```\n\nThat is all."
FAULTS = ["upstream_refused", "upstream_timeout", "upstream_cut", "upstream_garbage", "upstream_error", "internal"]


def interaction(name: str, at: float, messages: Any = None, **fields: Any) -> Interaction:
    return Interaction(
        **{
            "event_id": name, "at": at, "request_id": f"r-{name}", "route": "assistant", "tenant": "t", "session": "s",
            "answerer": Answerer("a", "m"), "user": "u", "duration": 2.0, "messages": messages, "first_byte": 0.2,
            "answer": ANSWER, "stream": True, "status": 200, **fields,
        }
    )  # fmt: skip


FIRST = interaction("first", 0.0, [SYSTEM, QUESTION], input_hash="h1")


def turn(text: str, *, returned: str = ANSWER, at: float = 60.0, **fields: Any) -> Interaction:
    """The user's next request after `FIRST`."""
    asked = [SYSTEM, QUESTION, {"role": "assistant", "content": returned}, {"role": "user", "content": text}]
    return interaction("next", at, asked, input_hash="h2", turn=1, **fields)


def kinds(signals: list[Signal]) -> list[str]:
    return [signal.kind for signal in signals]


def the(signals: list[Signal]) -> Signal:
    assert len(signals) == 1, kinds(signals)
    return signals[0]


# The same again.


def test_the_same_input_again_is_a_regeneration_of_the_earlier_answer() -> None:
    signal = the(detect(FIRST, interaction("again", 30.0, FIRST.messages, input_hash="h1")))
    assert (signal.kind, signal.response_id, signal.subject, signal.at) == ("regenerate", "r-first", "u", 30.0)
    assert (signal.event_id, signal.detector, signal.source) == ("regenerate/1:again", "regenerate/1", "detected")


def test_hashes_alone_are_enough() -> None:
    earlier = interaction("a", 0.0, input_hash="h", answer=None, redacted=("off",))
    again = interaction("b", 9.0, input_hash="h", answer=None, redacted=("off",))
    assert kinds(detect(earlier, again)) == ["regenerate"]


def test_a_clock_in_the_instructions_does_not_hide_a_regeneration() -> None:
    later = [{"role": "system", "content": "It is 12:01."}, QUESTION]
    signal = the(detect(FIRST, interaction("again", 30.0, later, input_hash="h9")))
    assert signal.kind == "regenerate"
    assert signal.confidence < 1


@pytest.mark.parametrize("error", FAULTS)
def test_a_second_try_after_a_fault_says_nothing(error: str) -> None:
    earlier = msgspec.structs.replace(FIRST, error=error)
    assert detect(earlier, interaction("again", 30.0, FIRST.messages, input_hash="h1")) == []
    assert detect(earlier, turn("That is wrong.")) == []


@pytest.mark.parametrize(
    "fields",
    [{"at": 1.0}, {"user": "another"}, {"tenant": "another"}, {"at": 2 * RULES.again}],
    ids=["side by side", "another user", "another tenant", "much later"],
)
def test_equal_inputs_are_not_always_a_regeneration(fields: dict[str, Any]) -> None:
    again = {"at": 30.0, "messages": FIRST.messages, "input_hash": "h1"} | fields
    assert detect(FIRST, interaction("again", **again)) == []


@given(count=st.integers(1, 9), said=st.sampled_from(["", "thanks!", "That is wrong.", QUESTION["content"]]))
def test_an_sdk_retry_gives_no_signal_ever(count: int, said: str) -> None:
    same = interaction("x", 30.0, FIRST.messages, input_hash="h1", sdk_retry=count, error="client_left")
    assert detect(FIRST, same, (FIRST, same)) == []
    assert detect(FIRST, turn(said, returned="Another text.", sdk_retry=count)) == []


def test_a_steady_rhythm_is_a_poll_and_takes_back_what_it_had_been_taken_for() -> None:
    polls = [interaction(f"p{n}", 60.0 * n, FIRST.messages, input_hash="h1") for n in range(8)]
    journal: dict[str, Signal] = {}
    for n in range(1, len(polls)):
        for signal in detect(polls[n - 1], polls[n], polls[: n + 1]):
            journal[signal.event_id] = signal  # as the reward counts: the last one of an event id
    assert {signal.kind for signal in journal.values()} == {"poll"}


def test_impatient_users_are_no_pollers() -> None:
    at = [0.0, 9.0, 31.0, 38.0, 80.0]
    tries = [interaction(f"i{n}", when, FIRST.messages, input_hash="h1") for n, when in enumerate(at)]
    heard = [detect(tries[n - 1], tries[n], tries[: n + 1]) for n in range(1, len(tries))]
    assert [kinds(one) for one in heard] == [["regenerate"]] * 4


def test_a_request_follows_on_the_last_one_to_the_same_input_or_on_the_last_one() -> None:
    between = turn("And then?")
    again = interaction("again", between.at + 300.0, FIRST.messages, input_hash="h1")
    (signal,) = heard_from([FIRST, between], again)
    assert (signal.kind, signal.response_id) == ("regenerate", "r-first")
    assert heard_from([FIRST, between, again], between) == []
    assert heard_from([], FIRST) == []


# Another last turn.


def edited_turn(text: str, depth: int) -> tuple[Interaction, Interaction, tuple[Interaction, ...]]:
    """A request whose last turn was put differently, after `depth` answers of ours."""
    messages, past = [SYSTEM, QUESTION], [FIRST]
    for n in range(depth):
        messages = [*messages, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": f"And {n}?"}]
        past.append(interaction(f"i{n}", 50.0 * (n + 1), messages, input_hash=f"i{n}"))
    new = interaction("new", 50.0 * depth + 30, [*messages[:-1], {"role": "user", "content": text}], input_hash="n")
    return past[-1], new, (*past, new)


def test_another_last_turn_after_an_answer_of_ours_is_an_edit_of_that_turn() -> None:
    signal = the(detect(*edited_turn("Something else altogether, please.", 2)))
    assert (signal.kind, signal.response_id) == ("user_edit", "r-i1")


def test_a_first_turn_counts_as_edited_only_if_its_words_say_so() -> None:
    assert kinds(detect(*edited_turn("How do I hash a string in Python using sha-256?", 0))) == ["user_edit"]
    assert detect(*edited_turn("How do I sort a string in Python?", 0)) == []


def test_examples_in_a_prompt_are_no_answers_of_ours() -> None:
    def shots(name: str, at: float, text: str) -> Interaction:
        examples = [{"role": "user", "content": "tide"}, {"role": "assistant", "content": "nature"}]
        return interaction(name, at, [*examples, {"role": "user", "content": text}], input_hash=name, answer="nature")

    one, two = shots("a", 0.0, "chess"), shots("b", 9.0, "jazz and blues")
    assert detect(one, two, (one, two)) == []


# The answer that comes back.


def test_an_edited_answer_is_kept_as_a_correction() -> None:
    better = ANSWER.replace("sha256", "blake2b").replace("That is all", "Mind the salt")
    signal = the(detect(FIRST, turn("And files?", returned=better)))
    assert (signal.kind, signal.response_id, signal.text) == ("edit", "r-first", better)
    assert signal.value is not None
    assert 0.5 < signal.value < 1


HARMLESS = {
    "line ends": ANSWER.replace("\n", "\r\n"),
    "one line": " ".join(ANSWER.split()),
    "fence without a language": ANSWER.replace("```python", "```"),
    "no marks": ANSWER.replace("```python\n", "").replace("```", "").replace("`", ""),
    "cut": ANSWER[:60],
    "cut with a mark": ANSWER[:60] + " …",
    "middle cut": ANSWER[:50] + " [...] " + ANSWER[-20:],
    "typographic": ANSWER.replace("'", "’"),
    "escaped": ANSWER.replace("'", "&#x27;"),
    "labelled": f"Assistant: {ANSWER}",
    "with a footer": f"{ANSWER}\n\nSources: 1",
    "another text": "[this message was deleted]",
    "nothing": "",
}


@pytest.mark.parametrize("returned", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_apps_do_to_an_answer_is_no_edit(returned: str) -> None:
    assert detect(FIRST, turn("And files?", returned=returned)) == []


@pytest.mark.parametrize("thought", ["<think>\nHm.\n</think>\n\n", "Hm, a hash.</think>\n"])
def test_reasoning_may_stay_behind(thought: str) -> None:
    earlier = msgspec.structs.replace(FIRST, answer=thought + ANSWER)
    assert detect(earlier, turn("And files?")) == []


def test_the_answer_is_found_though_the_app_dropped_old_turns() -> None:
    old = [QUESTION, {"role": "assistant", "content": "Long ago."}, {"role": "user", "content": "And a file?"}]
    earlier = interaction("e", 0.0, old, answer=ANSWER)
    kept = [old[-1], {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Thank you!"}]
    assert kinds(detect(earlier, interaction("n", 60.0, kept))) == ["thanks"]


def test_tool_calls_between_are_not_turns_of_the_user() -> None:
    loop = [*FIRST.messages, {"role": "assistant", "content": None}, {"role": "tool", "content": "that is wrong"}]
    assert detect(FIRST, interaction("n", 5.0, loop)) == []


@given(st.text(max_size=300))
def test_canonical_texts_are_canonical_and_never_more_than_cuts_of_themselves(text: str) -> None:
    once = canonical(text)
    assert cut_from(once[: len(once) // 2], once)
    assert canonical("\r\n".join(f"  {line} " for line in text.splitlines())).replace(" ", "") == once.replace(" ", "")


# The next turn.


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Thanks!", "thanks"),
        ("thank you so much, that helped", "thanks"),
        ("Perfect, now do the same for files", "thanks"),
        ("That's not what I asked for.", "complaint"),
        ("it still doesn’t work", "complaint"),
        ("No, that is wrong.", "complaint"),
        ("You forgot the salt", "complaint"),
        ("How do I hash a file?", None),
        ("Write a thank you note to my boss", None),
        ("Translate: “this is wrong, you forgot everything”", None),
        ("Thanks in advance for the next one", None),
        ("My boss says the report is wrong, please rewrite it", None),
        ("```\nthis is wrong\n```", None),
        ("> that is not what I asked for\nhm", None),
        ("print('thank you')", None),
        ("AssertionError: that is wrong", None),
        ("das ist falsch, das wollte ich nicht", None),
        ("ça ne marche pas du tout", None),
        ("no funciona", None),
        ("это не работает", None),
        ("ありがとう", None),
        ("", None),
    ],
)
def test_praise_and_blame_are_heard_in_english_and_only_from_the_user(said: str, kind: str | None) -> None:
    heard = tone(said)
    assert (heard.kind if heard else None) == kind
    assert kinds(detect(FIRST, turn(said))) == ([kind] if kind else [])


def test_reasons_never_quote_the_user() -> None:
    signal = the(detect(FIRST, turn("That is wrong, it does not work, Zebulon.")))
    assert "Zebulon" not in json.dumps(msgspec.to_builtins(signal))


def test_the_tone_model_is_small() -> None:
    assert (ROOT / "telemetry" / "tone.json").stat().st_size <= 100_000


def test_a_rephrase_says_it_again_with_more_or_fewer_words_and_soon() -> None:
    assert kinds(detect(FIRST, turn("How do I hash a string in Python with a salt?"))) == ["rephrase"]
    assert detect(FIRST, turn("How do I reverse a string in Python?")) == []
    assert detect(FIRST, turn("How do I hash a string in Python with a salt?", at=RULES.rephrase + 3)) == []
    assert not said_again("go on", "go on")


@given(st.text(max_size=60), st.text(max_size=60))
def test_likeness_is_symmetric_and_whole_for_equals(a: str, b: str) -> None:
    one, other = grams(a), grams(b)
    assert likeness(one, other) == likeness(other, one)
    assert 0 <= likeness(one, other) <= 1 == likeness(one, one)
    assert said_again(a, b) == said_again(b, a)


# The answer itself, and its absence.


def test_a_client_that_leaves_in_the_middle_has_stopped_the_answer() -> None:
    stopped = interaction("x", 0.0, [QUESTION], error="client_left", answer="Use the", duration=3.3)
    signal = the(detect(None, stopped))
    assert (signal.kind, signal.response_id, signal.event_id) == ("stop", "r-x", "stop/1:x")


@pytest.mark.parametrize(
    "fields",
    [
        {"first_byte": None},
        {"answer": None},
        {"duration": 59.98},
        {"error": None},
        *({"error": error} for error in FAULTS),
    ],
)
def test_time_outs_and_faults_are_no_stops(fields: dict[str, Any]) -> None:
    left = {"error": "client_left", "answer": "Use the", "duration": 3.3} | fields
    assert detect(None, interaction("x", 0.0, [QUESTION], **left)) == []


def test_a_tool_that_hands_over_is_an_escalation() -> None:
    calls = [{"index": 0, "id": "c", "name": "call_a_human", "arguments": "{}"}]
    called = interaction("x", 0.0, [QUESTION], tool_calls=calls)
    rules = Rules(escalation_tools=frozenset(["call_a_human"]))
    assert kinds(detect(None, called, rules=rules)) == ["escalation"]
    assert detect(None, called) == []


def test_a_session_is_over_only_after_a_silence() -> None:
    session = [FIRST, turn("And files?")]
    assert after_silence(session, 62.0 + RULES.silence - 1) == []
    length = the(after_silence(session, 62.0 + RULES.silence))
    assert (length.kind, length.value, length.session, length.response_id) == ("session_length", 2.0, "s", None)
    left = [FIRST, turn("And files?", error="client_left")]
    assert kinds(after_silence(left, 1e6)) == ["session_length", "abandon"]
    assert after_silence([], 1e6) == []


# All of them.


def everything() -> list[Signal]:
    better = turn("Thanks!", returned=ANSWER.replace("sha256", "md5"), error="client_left", answer="So", duration=1.1)
    again = interaction("again", 30.0, FIRST.messages, input_hash="h1")
    return [*detect(FIRST, better), *detect(FIRST, again), *detect(*edited_turn("What?", 1))]


def test_detecting_twice_counts_once_and_every_kind_is_known() -> None:
    once = everything()
    assert kinds(once) == ["stop", "edit", "thanks", "regenerate", "user_edit"]
    assert len({signal.event_id for signal in once}) == len(once)
    assert everything() == once
    assert {signal.kind for signal in once} <= SIGNAL_KINDS
    assert all(0 < signal.confidence <= 1 and signal.reason for signal in once)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(json_values, json_values, st.text(max_size=20))
def test_whatever_an_app_sends_is_read_without_an_error(asked: Any, now: Any, answer: str) -> None:
    detect(interaction("a", 0.0, asked, answer=answer), interaction("b", 9.0, now))


def test_requests_of_other_endpoints_have_turns_too() -> None:
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "image_url"}]}]
    assert turns("Hi") == turns(["Hi"]) == turns(parts) == turns(msgspec.Raw(b'"Hi"')) == [("user", "Hi")]
    assert turns(None) == turns([1, 2]) == turns({}) == []


def test_prose_has_no_code_and_no_quotes() -> None:
    text = 'Look:\n```\nx is wrong\n```\n> you said so\nfoo(x) == 3\n    indented\nIt says "bad" here, don\'t it?'
    assert " ".join(prose(text).split()) == "Look: It says here, don't it?"


# The benchmark.


def bench(*words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "bench" / "detectors.py"), "--quick", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_bars_on_generated_sessions_are_met() -> None:
    found = bench()
    assert [bar["what"] for bar in found["bars"] if not bar["met"]] == []
    assert found["generated"]["retries"] > 0


def test_real_edits_are_told_from_reformattings() -> None:
    if not (DATA / "edits").is_dir():
        pytest.skip("no real edits: ../shared/data/edits is not there")
    found = bench("--edits", str(DATA / "edits"), "--conversations", str(next((DATA / "conversations").glob("*"))))
    met = {bar["what"]: bar["met"] for bar in found["bars"]}
    assert met["edit precision"]
    assert found["edits"]["recall"]["value"] >= 0.9
    assert met["rephrase precision"]
    assert found["rephrase"]["labelled"] >= 300


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"user": 1}\n')
    command = [sys.executable, str(ROOT / "bench" / "detectors.py"), "--quick", "--conversations", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"{file}:1:" in done.stderr


# Side by side.


def verdict(target: Any, **fields: Any) -> Signal:
    known = {"event_id": "c1", "at": 9.0, "kind": "comparison", "tenant": "t", "subject": "ann", "target": target}
    return Signal(**(known | fields))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"winner": "a", "loser": "b"}, {"a": 1.0, "b": 0.0}),
        ({"both_bad": ["a", "b"]}, {"a": 0.0, "b": 0.0}),
        ({"tie": ["a", "b"]}, {}),
        (None, {}),
        ("a", {}),
    ],
)
def test_a_comparison_speaks_of_both_answers(target: Any, said: dict[str, float]) -> None:
    heard = compared(verdict(target))
    assert {s.response_id: s.value for s in heard} == said
    assert len({s.event_id for s in heard}) == len(heard)
    assert all((s.subject, s.kind, s.source) == ("ann", "comparison", "detected") for s in heard)
    assert [found for s in heard for found in compared(s)] == []


def test_a_token_speaks_for_its_own_answer_only() -> None:
    target = {"winner": "chatcmpl-0190aa01", "loser": "chatcmpl-0190aa02"}
    (heard,) = compared(verdict(target, source="token", response_id="0190aa02"))
    assert (heard.response_id, heard.value) == ("0190aa02", 0.0)


def test_likeness_of_an_answer_and_what_came_back() -> None:
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The sky is blue because of air."}]
    new = interaction("n", 1.0, [*asked, {"role": "user", "content": "ok"}])
    assert alike("The sky is blue because of the air.", new) > 0.7
    assert alike("Bananas grow on plants, not on trees.", new) < 0.2
    assert alike(None, new) == alike("x", interaction("m", 1.0, None)) == 1.0, "texts that are not known"


@given(
    error=st.sampled_from([None, "client_left", *FAULTS]),
    first_byte=st.sampled_from([None, 0.2]),
    answer=st.sampled_from([None, "", ANSWER]),
    escalated=st.booleans(),
    tool_calls=st.sampled_from([None, [], [{"name": "call_a_person"}], [{"name": "search"}]]),
    sdk_retry=st.integers(0, 1),
    redacted=st.sampled_from([(), ("off",)]),
    tools=st.sampled_from([frozenset[str](), frozenset(["call_a_person"])]),
)
def test_a_request_that_follows_on_nothing_tells_nothing_unless_it_may(tools: frozenset[str], **fields: Any) -> None:
    rules = Rules(escalation_tools=tools)
    first = interaction("first", 0.0, [SYSTEM, QUESTION], input_hash="h1", **fields)
    told = [*heard_from([first], first, rules), *after_silence([first], 1e6, rules)]
    assert tells(first, rules) or set(kinds(told)) <= {"session_length"}


@pytest.mark.parametrize("text", [b"[1e999]", b"[" * 9999 + b"]" * 9999, b"nothing", b"null"])
def test_what_cannot_be_read_has_no_turns(text: bytes) -> None:
    assert turns(msgspec.Raw(text)) == []
