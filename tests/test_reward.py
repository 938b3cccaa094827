"""From signals to a session's reward, and what a repeated request tells about the answer before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import reward as rewards
from router.arms import Cell, Sums
from router.bandit import BUCKET
from router.policy import Reward
from router.reward import Heard, SessionReward, counted, score
from telemetry.events import SIGNAL_KINDS, Answerer, Interaction, Signal
from telemetry.journal import Journal
from telemetry.signals import heard_from

WEIGHTS = {"thumb": 1.0, "rating": 0.8, "copy": 0.3, "regenerate": -0.4, "escalation": -1.0}


def regenerated(earlier: Sequence[Interaction], new: Interaction) -> Signal | None:
    return next((s for s in heard_from(earlier, new) if s.kind == "regenerate"), None)


def session_reward(
    answers: list[Interaction], signals: Sequence[Signal], weights: dict[str, float], **options: Any
) -> SessionReward | None:
    """With the weights alone, and signals numbered from 1."""
    terms = Reward.model_construct(signals=weights, window=3600.0, outcome=None)
    return rewards.session_reward(answers, numbered(signals), terms, **options)


def numbered(signals: Iterable[Signal]) -> list[Heard]:
    return list(enumerate(signals, 1))


def answer(name: str, arm: str = "a", policy: str = "thompson", **fields: Any) -> Interaction:
    made = {
        "event_id": f"event-{name}", "at": 1000.0, "request_id": name, "route": "assistant", "tenant": "acme",
        "session": "s1", "answerer": Answerer(arm, "base", policy=policy), "response_id": f"chatcmpl-{name}",
        "trace_id": f"trace-{name}",
    }  # fmt: skip
    return Interaction(**(made | fields))


class Signals:
    """Makes signals, each with an event id of its own unless one is named."""

    def __init__(self) -> None:
        self._made = 0

    def __call__(self, about: str | None, kind: str = "thumb", value: float | None = 1.0, **fields: Any) -> Signal:
        self._made += 1
        made = {"event_id": f"signal-{self._made}", "at": 2000.0, "tenant": "acme", "response_id": about}
        return Signal(**(made | {"kind": kind, "value": value} | fields))


@pytest.fixture
def signal() -> Signals:
    return Signals()


def reward_of(*signals: Signal, answers: list[Interaction] | None = None) -> float | None:
    found = session_reward(answers or [answer("one"), answer("two")], signals, WEIGHTS)
    return found.reward if found else None


# The number.


finite = st.one_of(st.none(), st.floats(-1e6, 1e6))
anything = st.builds(
    Signal,
    event_id=st.sampled_from([f"e{n}" for n in range(9)]),
    at=st.just(1.0),
    kind=st.sampled_from(sorted(SIGNAL_KINDS)),
    tenant=st.just("acme"),
    response_id=st.sampled_from(["one", "chatcmpl-one", "two", "failed", "pinned", "unknown", None]),
    trace_id=st.sampled_from(["trace-one", "trace-two", "unknown", None]),
    subject=st.sampled_from(["ann", "bob", None]),
    value=finite,
)
SOME = [
    answer("one"),
    answer("two", arm="b"),
    answer("failed", error="upstream_cut"),
    answer("pinned", policy="pinned"),
]


@given(
    signals=st.lists(anything, max_size=12),
    weights=st.dictionaries(st.sampled_from(sorted(SIGNAL_KINDS)), st.floats(-5, 5)),
)
def test_a_reward_lies_between_0_and_1_whatever_was_signalled(signals: list[Signal], weights: dict[str, float]) -> None:
    found = session_reward(SOME, signals, weights)
    if found is None:
        return
    assert 0.0 <= found.reward <= 1.0
    assert 1 <= found.answers <= 3, "two answers and the session as a whole"
    assert 1 <= sum(found.moved_by.values()) <= len(signals)
    assert set(found.moved_by) <= set(weights)


@given(signals=st.lists(anything, max_size=12))
def test_only_the_last_of_each_event_and_of_each_slot_counts(signals: list[Signal]) -> None:
    names = {"one": "1", "chatcmpl-one": "1", "trace-one": "1", "two": "2", "trace-two": "2"}
    last = [s for at, s in enumerate(signals) if s.event_id not in {later.event_id for later in signals[at + 1 :]}]
    slots = {}
    for s in last:
        name = s.response_id or s.trace_id
        if (name is None or name in names) and (s.kind != "comparison" or s.source == "detected"):
            named = s.name if s.kind in ("survey", "outcome") else None
            slots[names[name] if name else "session", s.kind, named, s.subject] = s
    found = counted(numbered(signals), names)
    by_slot = {
        (about, s.kind, s.name if s.kind in ("survey", "outcome") else None, s.subject): s for about, _, s in found
    }
    assert by_slot == slots
    assert len(found) == len(slots)


def test_silence_is_no_reward() -> None:
    assert reward_of() is None
    assert session_reward([], [], WEIGHTS) is None


def test_a_signal_without_weight_or_without_meaning_is_silence(signal: Signals) -> None:
    assert reward_of(signal("one", "accept")) is None
    assert reward_of(signal("one", "rating", None)) is None
    assert session_reward([answer("one")], [signal("one", "comment")], {"comment": 1.0}) is None


def test_votes_are_read_on_their_own_scales(signal: Signals) -> None:
    assert [score(signal("one", "thumb", value)) for value in (1.0, 0.0)] == [1.0, -1.0]
    assert [score(signal("one", "rating", value)) for value in (1.0, 2.0, 3.0, 5.0)] == [-1.0, -0.5, 0.0, 1.0]
    assert score(signal("one", "copy", None)) == 1.0
    assert score(signal("one", "outcome", 5.0)) is None


def test_the_evidence_of_an_answer_is_added_up_and_cut(signal: Signals) -> None:
    assert reward_of(signal("one", "copy")) == pytest.approx(0.5 + 0.5 * 0.3)
    assert reward_of(signal("one", "copy"), signal("one", "regenerate")) == pytest.approx(0.5 - 0.5 * 0.1)
    assert reward_of(signal("one"), signal("one", "copy")) == 1.0
    assert reward_of(signal("one", value=0.0), signal("one", "escalation")) == 0.0


def test_a_session_is_the_mean_of_its_answers_that_have_evidence(signal: Signals) -> None:
    answers = [answer("one"), answer("two"), answer("silent")]
    found = session_reward(answers, [signal("one"), signal("two", "regenerate"), signal("two", "copy")], WEIGHTS)
    assert found is not None
    assert found.reward == pytest.approx(0.5 + 0.5 * (1.0 - 0.1) / 2)
    assert found.answers == 2
    assert found.moved_by == {"thumb": 1, "regenerate": 1, "copy": 1}


def test_the_reward_belongs_to_the_arm_the_session_began_with(signal: Signals) -> None:
    answers = [answer("one", "a", at=BUCKET * 7.5), answer("two", "b", at=BUCKET * 9.5)]
    found = session_reward(answers, [signal("two")], WEIGHTS)
    assert found is not None
    assert (found.arm, found.at) == ("a", BUCKET * 7.5)
    assert found.contribution() == {Cell("", "a", BUCKET * 7): Sums(1.0, 1.0, 1.0)}


# What is evidence.


def test_a_failed_answer_is_no_evidence_and_one_that_was_left_early_is(signal: Signals) -> None:
    for error in ("upstream_refused", "upstream_timeout", "upstream_cut", "upstream_garbage", "internal"):
        assert reward_of(signal("one"), answers=[answer("one", error=error)]) is None
    assert reward_of(signal("one"), answers=[answer("one", error="client_left")]) == 1.0


def test_a_pinned_answer_is_no_evidence(signal: Signals) -> None:
    answers = [answer("one"), answer("two", "b", policy="pinned")]
    assert reward_of(signal("two"), answers=answers) is None
    assert reward_of(signal("two", value=0.0), signal("one"), answers=answers) == 1.0
    found = session_reward(answers[::-1], [signal("one")], WEIGHTS)
    assert found is not None
    assert found.arm == "a"


def test_a_signal_about_an_answer_of_elsewhere_is_no_evidence(signal: Signals) -> None:
    assert reward_of(signal("elsewhere")) is None
    assert reward_of(signal(None, trace_id="elsewhere")) is None


def test_the_last_vote_on_an_answer_counts_however_the_answer_was_named(signal: Signals) -> None:
    ways: list[dict[str, Any]] = [
        {"about": "one"},
        {"about": "chatcmpl-one"},
        {"about": None, "trace_id": "trace-one"},
        {"about": "one", "trace_id": "elsewhere", "session": "s1"},
    ]
    for first in ways:
        for last in ways:
            assert reward_of(signal(**first, value=1.0), signal(**last, value=0.0)) == 0.0
            assert reward_of(signal(**first, value=0.0), signal(**last, value=1.0)) == 1.0


def test_the_votes_of_two_subjects_both_count(signal: Signals) -> None:
    ann, bob = signal("one", "copy", subject="ann"), signal("one", "copy", subject="bob")
    assert reward_of(ann, bob) == pytest.approx(0.5 + 0.5 * 0.6)
    found = session_reward([answer("one")], [ann, bob, signal("one", "copy", subject="bob")], WEIGHTS)
    assert found is not None
    assert found.moved_by == {"copy": 2}


def test_outcomes_of_different_names_do_not_replace_each_other(signal: Signals) -> None:
    both = [signal("one", "outcome", name="paid"), signal("one", "outcome", name="solved")]
    assert len(counted(numbered(both), {"one": "one"})) == 2


def test_an_event_sent_again_about_another_answer_moves_there(signal: Signals) -> None:
    vote = signal("one", value=0.0, event_id="vote")
    moved = signal("two", value=0.0, event_id="vote")
    found = session_reward([answer("one"), answer("two")], [signal("two", "copy"), vote, moved], WEIGHTS)
    assert found is not None
    assert found.answers == 1
    assert found.reward == pytest.approx(0.5 - 0.5 * 0.7)


def test_an_event_that_moves_away_leaves_a_later_vote_in_its_place(signal: Signals) -> None:
    first, later = signal("one", value=0.0, event_id="first"), signal("one", value=1.0, event_id="later")
    moved = signal("two", value=0.0, event_id="first")
    assert reward_of(first, later, moved) == pytest.approx(0.5), "one is good, two is bad"


def test_an_event_that_moves_away_gives_back_the_vote_that_it_had_replaced(signal: Signals) -> None:
    early, vote = signal("one", value=0.0, event_id="early"), signal("one", value=1.0, event_id="vote")
    moved = signal("two", value=1.0, event_id="vote")
    assert reward_of(early, vote, moved) == pytest.approx(0.5), "one is bad again, two is good"


def test_an_event_that_moves_to_an_answer_that_does_not_count_is_gone(signal: Signals) -> None:
    answers = [answer("one"), answer("failed", error="upstream_cut")]
    vote, moved = signal("one", event_id="vote"), signal("failed", event_id="vote")
    assert reward_of(vote, moved, answers=answers) is None


def test_a_verdict_on_the_session_stands_beside_those_on_its_answers(signal: Signals) -> None:
    assert reward_of(signal(None, session="s1", value=0.0)) == 0.0
    assert reward_of(signal(None, session="s1", value=0.0), signal("one")) == pytest.approx(0.5)
    changed = [signal(None, session="s1", value=0.0), signal(None, session="s1", value=1.0)]
    assert reward_of(*changed) == 1.0


# The same input again.


def asked(name: str, at: float, **fields: Any) -> Interaction:
    return answer(name, **({"at": at, "input_hash": "same", "user": "ann"} | fields))


def test_the_same_input_again_is_a_wish_for_another_answer_than_the_last() -> None:
    found = regenerated([asked("one", 1.0), asked("two", 2.0)], asked("new", 3.0))
    assert found is not None
    assert (found.kind, found.response_id, found.tenant, found.subject) == ("regenerate", "two", "acme", "ann")
    assert (found.at, found.source, found.verified) == (3.0, "detected", True)


def test_detecting_twice_gives_one_event() -> None:
    one, new = asked("one", 1.0), asked("new", 3.0)
    first, again = regenerated([one], new), regenerated([one, new], new)
    assert first == again
    assert first is not None
    other = regenerated([one, new], asked("newer", 4.0))
    assert other is not None
    assert other.event_id != first.event_id


def test_an_sdk_that_retries_by_itself_says_nothing() -> None:
    assert regenerated([asked("one", 1.0)], asked("new", 2.0, sdk_retry=1)) is None


@pytest.mark.parametrize(
    "error", ["upstream_refused", "upstream_timeout", "upstream_cut", "upstream_error", "internal"]
)
def test_asking_again_after_a_failure_says_nothing(error: str) -> None:
    failed = asked("two", 2.0, error=error)
    assert regenerated([failed], asked("new", 3.0)) is None
    assert regenerated([asked("one", 1.0), failed], asked("new", 3.0)) is None


def test_asking_again_after_leaving_early_counts() -> None:
    assert regenerated([asked("one", 1.0, error="client_left")], asked("new", 2.0)) is not None


def test_another_input_never_counts() -> None:
    assert regenerated([], asked("new", 2.0)) is None
    assert regenerated([asked("one", 1.0, input_hash="other")], asked("new", 2.0)) is None
    assert regenerated([asked("one", 1.0, input_hash=None)], asked("new", 2.0, input_hash=None)) is None


def test_a_request_does_not_repeat_itself_nor_a_later_one() -> None:
    new = asked("new", 2.0)
    assert regenerated([new], new) is None
    assert regenerated([new, asked("later", 3.0)], new) is None


def test_the_same_input_in_another_session_or_of_another_tenant_never_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.db")
    new = asked("new", 3.0)
    journal.append([asked("one", 1.0, session="s2"), asked("two", 2.0, tenant="umbrella"), new])
    earlier = journal.sessions([("acme", "s1")], {})["acme", "s1"]
    journal.close()
    assert regenerated([i for _, i in earlier], new) is None


# When: votes as they come, behaviour once the window is over.

TERMS = Reward(signals=WEIGHTS, window=60.0)


def heard(*signals: Signal, matured: int = rewards.ALL, terms: Reward = TERMS) -> float | None:
    found = rewards.session_reward([answer("one", duration=10.0), answer("two")], numbered(signals), terms, matured)
    return found.reward if found else None


def test_a_vote_counts_as_it_comes_and_however_late(signal: Signals) -> None:
    assert heard(signal("one"), matured=0) == 1.0
    assert heard(signal("one", at=1e9), matured=0) == 1.0
    assert heard(signal("one", "rating", 1.0), matured=0) == pytest.approx(0.1)


def test_behaviour_counts_once_the_answers_first_signal_is_ripe(signal: Signals) -> None:
    copied, again = signal("one", "copy", at=1020.0), signal("one", "regenerate", at=1040.0)
    assert heard(copied, again, matured=0) is None
    assert heard(copied, again, matured=1) == pytest.approx(0.45), "both of the answer, though only the first is ripe"
    assert heard(signal("two", "copy", at=1020.0), again, matured=1) == pytest.approx(0.65), "the other answer's waits"


def test_behaviour_after_the_window_says_nothing_of_the_answer(signal: Signals) -> None:
    assert heard(signal("one", "copy", at=1070.0)) == pytest.approx(0.65), "the window begins at the answer's end"
    assert heard(signal("one", "copy", at=1070.5)) is None
    assert heard(signal("one", "copy", at=1e9, received_at=1030.0)) == pytest.approx(0.65), "a clock that is ahead"
    assert heard(signal("one", "copy", at=0.0, received_at=1e9)) == pytest.approx(0.65), "the app was offline"


def test_a_changed_signal_does_not_unripen_its_answer(signal: Signals) -> None:
    first = signal("one", "copy", at=1020.0)
    assert heard(first, msgspec.structs.replace(first, target="all"), matured=1) == pytest.approx(0.65)


def test_a_verdict_on_the_session_has_the_window_of_its_last_answer(signal: Signals) -> None:
    verdict = signal(None, "escalation", at=1069.0, session="s1")
    assert heard(verdict, matured=0) is None
    assert heard(verdict) == 0.0


@given(signals=st.lists(anything, max_size=12), marks=st.lists(st.integers(0, 12), min_size=2, max_size=2))
def test_more_is_heard_as_the_mark_moves_on(signals: list[Signal], marks: list[int]) -> None:
    def of(mark: int) -> set[str]:
        found = rewards.session_reward(SOME, numbered(signals), TERMS, mark)
        return set(found.moved_by) if found else set()

    assert of(min(marks)) <= of(max(marks))


# The outcome.


def outcome(signal: Signals, value: float | None, **fields: Any) -> Signal:
    return signal("two", "outcome", value, **({"name": "solved"} | fields))


@pytest.mark.parametrize(
    ("terms", "value", "reward"),
    [
        ("solved", 1.0, 1.0),
        ("solved", 0.0, 0.0),
        ("solved", 7.0, 1.0),
        ({"name": "solved", "best": 10}, 7.0, 0.7),
        ({"name": "solved", "worst": 60, "best": 0}, 15.0, 0.75),
        ({"name": "solved", "worst": 60, "best": 0}, 90.0, 0.0),
    ],
)
def test_the_outcome_is_the_reward_once_it_is_known(signal: Signals, terms: Any, value: float, reward: float) -> None:
    known = Reward(signals=WEIGHTS, outcome=terms)
    assert heard(signal("one"), signal("two"), terms=known) == 1.0, "signals stand in until then"
    assert heard(signal("one"), outcome(signal, value, at=1e9), terms=known, matured=0) == pytest.approx(reward)


def test_another_outcome_or_one_without_a_number_decides_nothing(signal: Signals) -> None:
    known = Reward(signals=WEIGHTS, outcome="solved")
    assert heard(signal("one"), outcome(signal, 0.0, name="sold"), terms=known) == 1.0
    assert heard(signal("one"), outcome(signal, None), terms=known) == 1.0
    assert heard(signal("one"), outcome(signal, 0.0)) == 1.0, "a route without an outcome"


def test_the_last_word_on_the_outcome_counts_and_several_people_share_it(signal: Signals) -> None:
    known = Reward(signals=WEIGHTS, outcome="solved")
    assert heard(outcome(signal, 0.0), outcome(signal, 1.0), terms=known) == 1.0
    assert heard(outcome(signal, 0.0, subject="ann"), outcome(signal, 1.0, subject="bob"), terms=known) == 0.5
