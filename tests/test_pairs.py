"""What each thing that users do makes of an answer: pairs, corrections, single votes, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from conversations import asked, compared, said

from learner.pairs import Harvest, Rules, Vote, harvest, prompt_of
from telemetry.events import Interaction, Signal
from telemetry.signals import detect

GOOD, BAD = "A carrot is a vegetable.", "I am not sure."


def heard(session: Sequence[Interaction], signals: Sequence[Signal], **rules: Any) -> Harvest:
    return harvest(session, list(enumerate(signals)), Rules(**rules))


def kinds(found: Harvest) -> list[tuple[str, str, str | None, str | None]]:
    return [(v.example.kind, v.example.reason, v.example.chosen, v.example.rejected) for v in found.votes]


def test_a_comparison_is_a_pair_with_the_winner_chosen_and_all_three_facts_as_its_origin() -> None:
    one, other = asked("What is a carrot?", GOOD, arm="b", propensity=0.25), asked("What is a carrot?", BAD, arm="a")
    vote = compared(one, other)
    (made,) = heard([one, other], [vote]).votes
    assert (made.example.chosen, made.example.rejected, made.tie) == (GOOD, BAD, False)
    assert made.example.events == tuple(sorted([one.event_id, other.event_id, vote.event_id]))
    assert made.example.arms == ("b", "a")
    assert made.example.messages == [{"role": "user", "content": "What is a carrot?"}]


def test_a_tie_is_a_vote_for_neither_and_both_bad_one_against_each() -> None:
    one, other = asked("What?", GOOD), asked("What?", BAD)
    (tie,) = heard([one, other], [compared(one, other, "tie")]).votes
    assert tie.tie
    found = heard([one, other], [compared(one, other, "both_bad")])
    assert {(v.example.kind, v.example.rejected) for v in found.votes} == {("unpaired", GOOD), ("unpaired", BAD)}


def test_answers_to_different_prompts_are_no_pair() -> None:
    one, other = asked("What is a carrot?", GOOD), asked("What is a potato?", BAD)
    found = heard([one, other], [compared(one, other)])
    assert found.votes == []
    assert sum(found.unusable.values()) == 1


def test_who_holds_one_answers_token_does_not_speak_for_anothers() -> None:
    one, other = asked("What?", GOOD, user="ann"), asked("What?", BAD, user="ben", session="his")
    vote = compared(one, other, source="token")
    lookup = {other.request_id: other}
    assert harvest([one], [(0, vote)], Rules(), lambda tenant, name: lookup.get(name)).votes == []
    by_key = compared(one, other, source="callback")
    assert len(harvest([one], [(0, by_key)], Rules(), lambda tenant, name: lookup.get(name)).votes) == 1


def again(first: Interaction, answer: str = GOOD, **more: Any) -> tuple[Interaction, Signal]:
    second = asked(first.messages, answer, at=20.0, **more)
    (signal,) = [s for s in detect(first, second, [first]) if s.kind == "regenerate"]
    return second, signal


@pytest.mark.parametrize("proof", ["copy", "accept", "thumb"])
def test_a_second_answer_that_was_taken_is_chosen_over_the_first(proof: str) -> None:
    first = asked("What is a carrot?", BAD)
    second, signal = again(first)
    taken = said(proof, second, 1.0)
    found = heard([first, second], [signal, taken])
    pairs = [v.example for v in found.votes if v.example.kind == "pair"]
    assert [(one.chosen, one.rejected, one.reason) for one in pairs] == [(GOOD, BAD, "regenerate")]
    assert set(pairs[0].events) == {first.event_id, second.event_id, signal.event_id, taken.event_id}


def test_a_second_answer_that_the_conversation_went_on_from_was_kept() -> None:
    first = asked("What is a carrot?", BAD)
    second, signal = again(first)
    turns = [*first.messages, {"role": "assistant", "content": GOOD}, {"role": "user", "content": "And a potato?"}]
    later = asked(turns, "A potato is a vegetable.", at=60.0)
    found = heard([first, second, later], [signal])
    assert [(v.example.kind, v.example.chosen) for v in found.votes] == [("pair", GOOD)]


def test_a_second_answer_that_nobody_took_only_speaks_against_the_first() -> None:
    first = asked("What is a carrot?", BAD)
    second, signal = again(first)
    assert kinds(heard([first, second], [signal])) == [("unpaired", "regenerate", None, BAD)]


def test_a_second_answer_that_was_voted_down_is_not_chosen() -> None:
    first = asked("What is a carrot?", BAD)
    second, signal = again(first)
    found = heard([first, second], [signal, said("copy", second), said("thumb", second, 0.0)])
    assert not [v for v in found.votes if v.example.kind == "pair"]


def test_another_prompt_by_a_byte_makes_no_pair() -> None:
    first = asked("What is a carrot?", BAD, input_hash="same")
    second = asked("What is a carrot? ", GOOD, at=20.0, input_hash="same")
    (signal,) = [s for s in detect(first, second, [first]) if s.kind == "regenerate"]
    found = heard([first, second], [signal, said("copy", second)])
    assert not [v for v in found.votes if v.example.kind == "pair"]


def test_a_correction_is_a_pair_and_something_to_imitate() -> None:
    answer = asked("What is a carrot?", BAD)
    found = heard([answer], [said("correction", answer, text=GOOD)])
    assert kinds(found) == [("pair", "correction", GOOD, BAD), ("correction", "correction", GOOD, None)]


def test_an_edit_that_came_back_is_a_pair_with_the_edit_chosen() -> None:
    first = asked("What is a carrot?", "A carrot is a fruit, and I like carrots.")
    edited = "A carrot is a vegetable, and I like carrots."
    turns = [*first.messages, {"role": "assistant", "content": edited}, {"role": "user", "content": "And a pea?"}]
    later = asked(turns, "A pea is a seed.", at=60.0)
    (signal,) = [s for s in detect(first, later, [first]) if s.kind == "edit"]
    assert kinds(heard([first, later], [signal])) == [
        ("pair", "edit", edited, first.answer),
        ("correction", "edit", edited, None),
    ]


def test_a_piece_of_an_answer_that_was_edited_is_not_the_whole() -> None:
    answer = asked("What is a carrot?", BAD * 20)
    assert heard([answer], [said("edit", answer, 0.5, text="word", target={"start": 0, "end": 4})]).votes == []


@pytest.mark.parametrize(
    ("kind", "value", "good", "strength"),
    [
        ("thumb", 1.0, True, 1.0),
        ("thumb", 0.0, False, 1.0),
        ("rating", 5.0, True, 1.0),
        ("rating", 2.0, False, 0.5),
        ("flag", None, False, 1.0),
        ("copy", None, True, 0.3),
        ("edit", 1.0, True, 0.3),
        ("complaint", None, False, 0.5),
        ("rephrase", None, False, 0.4),
    ],
)
def test_a_vote_on_one_answer_is_for_or_against_it(kind: str, value: float | None, good: bool, strength: float) -> None:
    answer = asked("What is a carrot?", GOOD)
    (vote,) = heard([answer], [said(kind, answer, value)]).votes
    assert (vote.example.kind, bool(vote.example.chosen), vote.strength) == ("unpaired", good, strength)


@pytest.mark.parametrize("kind", ["stop", "abandon", "dwell", "outcome", "comment", "escalation", "poll", "user_edit"])
def test_what_says_nothing_of_a_text_is_not_learned_from(kind: str) -> None:
    answer = asked("What is a carrot?", GOOD)
    assert heard([answer], [said(kind, answer, 1.0)]).votes == []
    assert heard([answer], [said("rating", answer, 3.0)]).votes == []


def test_an_answer_to_a_rephrased_question_is_not_chosen_for_the_old_one() -> None:
    first = asked("How do I sort a list in Python?", BAD)
    second = asked("How do I sort a list in Python quickly?", GOOD, at=30.0)
    found = heard([first, second], [said("rephrase", first), said("thumb", second, 1.0)])
    assert not [v for v in found.votes if v.example.kind == "pair"]


@pytest.mark.parametrize(
    ("more", "rules"),
    [
        ({"consent": "none"}, {}),
        ({"consent": "serve"}, {}),
        ({"consent": None}, {"consent_assumed": False}),
        ({"error": "upstream_cut"}, {}),
        ({"error": "client_left"}, {}),
        ({"finish_reason": "length"}, {}),
        ({"tool_calls": [{"name": "search"}]}, {}),
        ({"choices": 2}, {}),
        ({"finish_reason": "content_filter"}, {}),
        ({"previous": "resp_1", "endpoint": "responses"}, {}),
        ({"at": 0.0}, {"text_after": 1_700_000_001.0}),
    ],
)
def test_an_answer_that_may_not_or_cannot_be_learned_from_is_counted_with_the_reason(
    more: dict[str, Any], rules: dict[str, Any]
) -> None:
    answer = asked("What is a carrot?", GOOD, **more)
    found = heard([answer], [said("thumb", answer, 1.0)], **rules)
    assert found.votes == []
    assert sum(found.unusable.values()) == 1


def test_what_came_after_a_no_may_repeat_what_was_said_then() -> None:
    first = asked("My number is 12", "Thank you.", consent="none")
    later = asked("What is a carrot?", GOOD, at=60.0, consent="train")
    assert heard([first, later], [said("thumb", later, 1.0)]).votes == []


def test_an_edit_that_came_in_a_request_whose_user_said_no_is_not_learned() -> None:
    first = asked("What is a carrot?", "A carrot is a fruit, and I like carrots.", consent="train")
    turns = [*first.messages, {"role": "assistant", "content": "A carrot is a vegetable, and I like carrots."}]
    later = asked([*turns, {"role": "user", "content": "And a pea?"}], "A seed.", at=60.0, consent="serve")
    (signal,) = [s for s in detect(first, later, [first]) if s.kind == "edit"]
    assert heard([first, later], [signal]).votes == []


@pytest.mark.parametrize(
    "messages", [[{"role": ["user"], "content": "x"}], [None], "x", [{"role": "user", "content": [1]}]]
)
def test_messages_of_any_shape_are_no_crash(messages: Any) -> None:
    answer = asked("What?", GOOD)
    import msgspec

    odd = msgspec.structs.replace(answer, messages=messages)
    assert heard([odd], [said("thumb", odd, 1.0)]).votes == []


def test_an_answer_that_only_ends_what_the_app_began_is_not_learned() -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A carrot"}]
    answer = asked(turns, " is a vegetable.")
    assert heard([answer], [said("thumb", answer, 1.0)]).votes == []


def test_consent_to_training_is_enough_where_it_must_be_said() -> None:
    answer = asked("What is a carrot?", GOOD, consent="train")
    assert len(heard([answer], [said("thumb", answer, 1.0)], consent_assumed=False).votes) == 1


def test_no_text_is_no_example() -> None:
    for answer in (asked("What?", None), asked("What?", "  \n"), asked([], GOOD), asked([{"role": "user"}], GOOD)):
        assert heard([answer], [said("thumb", answer, 1.0)]).votes == []


def test_of_a_users_votes_on_an_answer_the_last_one_stands() -> None:
    answer = asked("What?", GOOD)
    up, down = said("thumb", answer, 1.0, after=5.0), said("thumb", answer, 0.0, after=9.0)
    for order in ([up, down], [down, up]):
        (vote,) = heard([answer], order).votes
        assert vote.example.rejected == GOOD


def test_the_prompt_is_canonical_and_pictures_are_none() -> None:
    parts = [{"type": "text", "text": "What is\r\nthis? "}]
    assert prompt_of(asked([{"role": "user", "content": parts}], GOOD)) == [
        {"role": "user", "content": "What is\nthis?"}
    ]
    picture = [{"type": "image_url", "image_url": {"url": "data:"}}]
    assert prompt_of(asked([{"role": "user", "content": picture}], GOOD)) is None


def test_equal_examples_have_equal_ids_whoever_gave_them() -> None:
    votes: list[Vote] = []
    for user in ("ann", "ben"):
        answer = asked("What?", GOOD, user=user)
        votes += heard([answer], [said("thumb", answer, 1.0)]).votes
    assert votes[0].example.id == votes[1].example.id
    assert votes[0].example.user != votes[1].example.user
