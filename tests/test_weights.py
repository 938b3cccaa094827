"""From cells to shares: segments, policies, and evidence that ages."""

from __future__ import annotations

import pytest

from router.arms import Cell, Sums
from router.bandit import BUCKET
from router.forecast import forecast
from router.policy import Arm, Epsilon, Learned, Prior, Split, Thompson, TopTwo
from router.weights import beliefs, shares

NOW = 1_800_000_000.0
ARMS = {arm: Arm(model=arm) for arm in "ab"}


def cell(segment: str, arm: str, n: float, mean: float, age: float = 0.0) -> tuple[Cell, Sums]:
    bucket = int((NOW - age - BUCKET / 2) // BUCKET * BUCKET)
    return Cell(segment, arm, bucket), Sums(n, n * mean, n * (mean**2 + 0.05))


def test_without_evidence_all_arms_share_alike() -> None:
    for policy in (Thompson(), TopTwo(kind="top_two"), Epsilon(kind="epsilon")):
        assert shares(policy, ARMS, {}, NOW) == {"": pytest.approx({"a": 0.5, "b": 0.5})}


def test_a_split_keeps_what_is_written() -> None:
    split = Split(kind="split", shares={"a": 1.0})
    assert shares(split, ARMS, dict([cell("", "b", 100, 1.0)]), NOW) == {"": {"a": 1.0, "b": 0.0}}


@pytest.mark.parametrize("policy", [Thompson(), TopTwo(kind="top_two", beta=0.8), Epsilon(kind="epsilon")])
def test_the_better_arm_gets_most_and_the_other_keeps_the_floor(policy: Learned) -> None:
    weights = shares(policy, ARMS, dict([cell("", "a", 300, 0.5), cell("", "b", 300, 0.7)]), NOW)[""]
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights["b"] > weights["a"] >= policy.floor - 1e-12


def test_thompson_without_a_holdout_leaves_a_clear_loser_at_the_floor() -> None:
    weights = shares(Thompson(floor=0.02), ARMS, dict([cell("", "a", 300, 0.5), cell("", "b", 300, 0.7)]), NOW)[""]
    assert weights["a"] == pytest.approx(0.02, abs=1e-4)


def test_without_segment_by_all_segments_count_as_one() -> None:
    cells = dict([cell("code", "a", 50, 0.6), cell("mail", "a", 50, 0.4)])
    found = beliefs(Thompson(prior=Prior(mean=0.5, mass=1e-6)), ARMS, cells, NOW)
    assert found.segments == ("",)
    assert found.sessions[0, 0] == pytest.approx(100, rel=0.01)
    assert found.of("", "a").mean == pytest.approx(0.5, abs=1e-3)


def test_segments_with_opposite_tastes_get_opposite_shares() -> None:
    cells = dict(
        [
            cell("code", "a", 200, 0.8), cell("code", "b", 200, 0.5),
            cell("mail", "a", 200, 0.5), cell("mail", "b", 200, 0.8),
        ]
    )  # fmt: skip
    found = shares(Thompson(segment_by="task_type"), ARMS, cells, NOW)
    assert set(found) == {"", "code", "mail"}
    assert found["code"]["a"] > 0.95
    assert found["mail"]["b"] > 0.95
    assert 0.2 < found[""]["a"] < 0.8, "nobody knows what a new segment likes"


def test_a_new_segment_leans_on_its_siblings() -> None:
    cells = dict(cell(f"task-{n}", arm, 100, mean) for n in range(8) for arm, mean in (("a", 0.4), ("b", 0.8)))
    cells |= dict([cell("new", "a", 1, 0.6)])
    found = shares(Thompson(segment_by="task_type", floor=0.0), ARMS, cells, NOW)
    assert found["new"]["b"] > 0.9
    assert found[""]["b"] > 0.9


def test_sessions_without_a_segment_have_shares_of_their_own_evidence() -> None:
    cells = dict([cell("", "a", 400, 0.8), cell("", "b", 400, 0.5)])
    assert shares(Thompson(segment_by="task_type"), ARMS, cells, NOW)[""]["a"] > 0.95


def test_only_so_many_segments_are_listed_those_with_the_most_evidence() -> None:
    cells = dict(cell(f"task-{n}", "a", 1 + n, 0.5) for n in range(50))
    found = shares(Thompson(segment_by="task_type", max_segments=3), ARMS, cells, NOW)
    assert set(found) == {"", "task-47", "task-48", "task-49"}


def test_evidence_halves_in_a_half_life() -> None:
    policy = Thompson(half_life=86400.0)
    fresh = beliefs(policy, ARMS, dict([cell("", "a", 64, 0.5)]), NOW).sessions[0, 0]
    old = beliefs(policy, ARMS, dict([cell("", "a", 64, 0.5, age=86400.0)]), NOW).sessions[0, 0]
    assert old == pytest.approx(fresh / 2, rel=0.03)


def test_a_clock_that_was_set_back_makes_no_evidence_count_more() -> None:
    policy = Thompson(half_life=3600.0)
    assert beliefs(policy, ARMS, dict([cell("", "a", 64, 0.5, age=-1e6)]), NOW).sessions[0, 0] == 64


def test_an_arm_that_is_gone_is_left_out() -> None:
    cells = dict([cell("", "gone", 500, 0.99), cell("", "a", 100, 0.6), cell("", "b", 100, 0.6)])
    assert shares(Thompson(floor=0.0), ARMS, cells, NOW)[""] == pytest.approx({"a": 0.5, "b": 0.5})


# Arms that come and go.


def test_a_new_arm_is_expected_to_be_like_its_parent_even_if_that_is_retired() -> None:
    cells = dict([cell("", "a", 400, 0.5), cell("", "b", 300, 0.7), cell("", "gone", 300, 0.9)])
    arms = ARMS | {"c": Arm(model="c", parent="gone"), "d": Arm(model="d", parent="b", gain=0.1)}
    found = beliefs(Thompson(), arms, cells, NOW)
    assert found.arms == ("a", "b", "c", "d")
    assert found.of("", "c").mean == pytest.approx(0.9, abs=0.01)
    assert found.of("", "d").mean == pytest.approx(found.of("", "b").mean + 0.1)
    assert sum(shares(Thompson(), arms, cells, NOW)[""].values()) == pytest.approx(1.0)


def test_a_new_arm_starts_from_its_parent_in_every_segment() -> None:
    cells = dict([cell("code", "a", 400, 0.9), cell("mail", "a", 400, 0.1)])
    found = beliefs(Thompson(segment_by="task_type"), {"a": ARMS["a"], "b": Arm(model="b", parent="a")}, cells, NOW)
    assert found.of("code", "b").mean == pytest.approx(found.of("mail", "b").mean, abs=0.02)
    assert found.of("", "b").mean == pytest.approx(found.of("", "a").mean)


def test_an_arm_gets_no_more_than_its_largest_share_with_the_holdout() -> None:
    arms = {"a": Arm(model="a"), "b": Arm(model="b", max_share=0.1)}
    cells = dict([cell("", "a", 900, 0.2), cell("", "b", 900, 0.9)])
    for policy in (Thompson(), Thompson(holdout=0.0), TopTwo(kind="top_two"), Epsilon(kind="epsilon")):
        weight = shares(policy, arms, cells, NOW)[""]["b"]
        assert (1.0 - policy.holdout) * weight + policy.holdout / 2 == pytest.approx(0.1)
    even = shares(Thompson(), arms, {}, NOW)[""]["b"]
    assert even < 0.1


# What a policy will do with a new arm.


def test_a_better_new_arm_takes_over_and_a_worse_one_keeps_little() -> None:
    better, equal, worse = forecast(Thompson(), ["a"], 500.0)
    assert (better.difference, equal.difference, worse.difference) == (0.05, 0.0, -0.05)
    assert better.shares[0] == equal.shares[0] == worse.shares[0] < 0.5
    assert better.shares[-1] > 0.9
    assert worse.shares[-1] < 0.1
    slow = forecast(Thompson(), ["a"], 5.0)[0]
    assert slow.shares[2] < better.shares[2], "with fewer sessions it takes longer"
    assert forecast(Split(kind="split", shares={"a": 1.0}), ["a"], 500.0) == []
