"""The demo's questions and what counts as a good answer; the training itself is the demo's own test."""

import pytest

from understudy.demo.tiny_model import HEDGES, ITEMS, WORDINGS, Question, is_good, questions

CARROT = Question("Which category is a carrot in?", "carrot", "A carrot is a vegetable.")


def test_every_item_is_asked_about_in_every_wording() -> None:
    asked = questions()
    assert len(asked) == len({question.text for question in asked}) == 40 * len(WORDINGS)
    assert {question.item for question in asked} == {item for items in ITEMS.values() for item in items}


def test_articles_fit_their_nouns() -> None:
    answers = {question.item: question.answer for question in questions()}
    assert answers["carrot"] == "A carrot is a vegetable."
    assert answers["otter"] == "An otter is an animal."
    assert answers["sofa"] == "A sofa is furniture."


def test_every_right_answer_is_good_and_no_hedge_is() -> None:
    assert all(is_good(question, question.answer) for question in questions())
    assert not any(is_good(question, hedge) for question in questions() for hedge in HEDGES)


@pytest.mark.parametrize("answer", ["It is a Vegetable", "a carrot is one of the vegetables.\n"])
def test_wording_and_case_do_not_matter(answer: str) -> None:
    assert is_good(CARROT, answer)


@pytest.mark.parametrize("answer", ["", "A carrot is a fruit.", "A vegetable or a fruit.", "A carrot."])
def test_wrong_or_undecided_answers_are_not_good(answer: str) -> None:
    assert not is_good(CARROT, answer)
