"""Drafts of goldens: what becomes one, that nobody asks it before a review, and that a review is never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace
from preferences import corrections, pairs

from learner import drafts, expectations, goldens
from learner.examples import Example
from learner.goldens import Goldens


def held_out() -> list[Example]:
    return [replace(one, split="held_out") for one in [*pairs(60), *corrections(10)]]


def test_corrections_come_first_and_each_prompt_once() -> None:
    found = drafts.drafts(held_out(), Goldens([]), 30)
    assert len(found) == 30
    assert len({one["prompt"] for one in found}) == 30
    kinds = [one["from"].split()[0] for one in found]
    assert kinds == sorted(kinds, key=lambda kind: kind != "correction")
    assert {"correction", "pair"} == set(kinds)


def test_what_was_trained_on_or_is_a_golden_already_is_no_draft() -> None:
    assert drafts.drafts(pairs(20)[:0], Goldens([]), 5) == []
    trained = [one for one in pairs(60) if one.split == "train"]
    assert drafts.drafts(trained, Goldens([]), 5) == []
    known = Goldens([str(one.messages[0]["content"]) for one in held_out()])
    assert drafts.drafts(held_out(), known, 5) == []


def test_a_draft_is_asked_only_after_its_review_and_kept_out_of_training_at_once(tmp_path: Path) -> None:
    file = tmp_path / "drafts.yaml"
    drafts.write(file, drafts.drafts(held_out(), Goldens([]), 3))
    assert expectations.load([file]) == ()
    assert all(goldens.load([file]).hold(one) for one in held_out() if one.messages[0]["content"] in file.read_text())
    entries = yaml.safe_load(file.read_text())
    entries[0] |= {"owner": "ann", "expect": entries[0].pop("draft")}
    file.write_text(yaml.safe_dump(entries))
    (reviewed,) = expectations.load([file])
    assert reviewed.owner == "ann"
    assert expectations.check(reviewed, entries[0]["expect"]["text"]).passed is True


def test_a_file_with_a_review_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "drafts.yaml"
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        drafts.write(file, [])
    assert file.read_text() == "mine"
