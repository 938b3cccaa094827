"""The calibrated reward: predictions from behaviour, corrected by votes, in bounds whatever the votes are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.arms import Cell, Sums
from router.bandit import BUCKET
from router.calibrate import FOLDS, Calibration, calibrated, corrections, fit, fold_of, metric_of, pattern_of
from router.controller import Controller, calibration_of
from router.plan import RoutePlan
from router.policy import Arm, Reward, Thompson
from router.store_sqlite import SqliteStore
from router.weights import beliefs
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal

ARMS = {arm: Arm(model=arm) for arm in "ab"}
HOURS = 50
NOW = HOURS * float(BUCKET)
LONG = Thompson(half_life=1e9)


def did(arm: str, hour: int, pattern: tuple[str, ...], n: float, voted: float, good: float) -> dict[Cell, Sums]:
    return {Cell("", arm, hour * BUCKET, metric_of(pattern)): Sums(n, voted, good)}


def world(
    seed: int, satisfied: Mapping[str, float], votes: Mapping[str, float], sessions: int = 2000
) -> dict[Cell, Sums]:
    """Simulated sessions: happy users copy more, but those of arm b show it less; arms are voted on unequally."""
    chance = np.random.default_rng(seed)
    cells: dict[Cell, Sums] = {}
    copies = {"a": (0.2, 0.7), "b": (0.4, 0.5)}
    for arm, share in satisfied.items():
        for _ in range(sessions):
            good = bool(chance.random() < share)
            seen = {"copy": chance.random() < copies[arm][good], "edit": chance.random() < (0.4, 0.2)[good]}
            voted = float(chance.random() < votes[arm])
            metric = metric_of([kind for kind, happened in seen.items() if happened])
            cell = Cell("", arm, int(chance.integers(HOURS)) * BUCKET, metric)
            cells[cell] = cells.get(cell, Sums()).plus(Sums(1.0, voted, voted * good))
    return cells


def fitted(cells: Mapping[Cell, Sums]) -> Calibration:
    found = fit(cells, NOW, 100)
    assert isinstance(found, Calibration), found
    return found


def test_votes_correct_a_model_that_is_wrong_about_an_arm() -> None:
    truth = {"a": 0.6, "b": 0.75}
    plain, corrected, covered = [], [], []
    for seed in range(40):
        cells = world(seed, truth, {"a": 0.05, "b": 0.2})
        found = beliefs(LONG, ARMS, calibrated(fitted(cells), cells), NOW)
        bare = {c: v for c, v in calibrated(fitted(cells), cells).items() if not c.metric}
        wrong = beliefs(LONG, ARMS, bare, NOW)
        plain.append([wrong.of("", arm).mean - truth[arm] for arm in truth])
        corrected.append([found.of("", arm).mean - truth[arm] for arm in truth])
        intervals = [found.of("", arm).interval() for arm in truth]
        covered += [low <= truth[arm] <= high for arm, (low, high) in zip(truth, intervals, strict=True)]
    error = np.std(corrected, axis=0) / len(corrected) ** 0.5
    assert np.abs(np.mean(plain, axis=0)).max() > 0.03, "the case must be one that misleads the model"
    assert (np.abs(np.mean(corrected, axis=0)) < 0.01 + 3 * error).all(), (np.mean(corrected, axis=0), error)
    assert np.mean(covered) > 0.88


def test_with_behaviour_a_mean_is_known_better_than_by_votes_alone() -> None:
    """As many votes, but behaviour that tells much: the interval of two votes in ten shrinks."""
    cells: dict[Cell, Sums] = {}
    for hour in range(HOURS):
        cells |= did("a", hour, ("copy",), 20.0, 4.0, 4.0) | did("a", hour, ("edit",), 20.0, 4.0, 0.0)
    model = fitted(cells)
    by_votes = {Cell("", "a", hour * BUCKET): Sums(8.0, 4.0, 4.0) for hour in range(HOURS)}
    one = {"a": ARMS["a"]}
    assert beliefs(LONG, one, calibrated(model, cells), NOW).sds[0, 0] < beliefs(LONG, one, by_votes, NOW).sds[0, 0]
    assert model.brier < 0.1 * model.baseline


def test_what_is_too_little_to_learn_from_is_said() -> None:
    assert fit({}, NOW, 100) == "0 good and 0 bad votes; 100 are needed, and 20 of each"
    good = {c: v for hour in range(HOURS) for c, v in did("a", hour, ("copy",), 9.0, 9.0, 9.0).items()}
    assert "20 of each" in str(fit(good, NOW, 100))
    bare = {c: v for hour in range(HOURS) for c, v in did("a", hour, (), 9.0, 9.0, 4.0).items()}
    assert fit(bare, NOW, 100) == "nothing but votes was heard"
    assert fit(did("a", 7, ("copy",), 500.0, 400.0, 200.0), NOW, 100) == "the votes came within too few hours"


def test_no_vote_predicts_itself() -> None:
    """Each fold's model is the one that all other hours give."""
    cells = world(1, {"a": 0.6, "b": 0.7}, {"a": 0.2, "b": 0.2})
    model = fitted(cells)
    for fold in range(FOLDS):
        flipped = {c: Sums(v.n, v.s, v.s - v.ss) if fold_of(c.bucket) == fold else v for c, v in cells.items()}
        assert fitted(flipped).coefficients[fold] == pytest.approx(model.coefficients[fold])
        assert fitted(flipped).version != model.version


def test_a_version_is_of_what_was_learned() -> None:
    cells = world(2, {"a": 0.6, "b": 0.7}, {"a": 0.2, "b": 0.2})
    first, again = fit(cells, 1.0, 100), fit(dict(reversed(cells.items())), 2.0, 100)
    assert isinstance(first, Calibration)
    assert isinstance(again, Calibration)
    assert first.version == again.version
    assert msgspec.json.decode(msgspec.json.encode(first), type=Calibration) == first


@settings(max_examples=30, deadline=None)
@given(
    votes=st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, HOURS - 1), st.sampled_from([(), ("copy",), ("copy", "edit")]),
            st.integers(0, 10_000), st.booleans(),
        ),
        min_size=5, max_size=30,
    )
)  # fmt: skip
def test_poisoned_votes_move_no_reward_out_of_bounds(votes: list[tuple[str, int, tuple[str, ...], int, bool]]) -> None:
    cells = world(3, {"a": 0.6, "b": 0.7}, {"a": 0.1, "b": 0.1}, 300)
    for arm, hour, pattern, n, good in votes:
        for cell, sums in did(arm, hour, pattern, float(n), float(n), float(n * good)).items():
            cells[cell] = cells.get(cell, Sums()).plus(sums)
    model = fit(cells, NOW, 50)
    if isinstance(model, str):
        return
    found = beliefs(LONG, ARMS, calibrated(model, cells), NOW)
    assert ((found.means >= 0.0) & (found.means <= 1.0)).all()
    assert np.isfinite(found.sds).all()
    assert found.best.sum() == pytest.approx(1.0)
    for fold in range(FOLDS):
        assert 0.0 < model.predict(("copy", "unknown"), fold) < 1.0


def test_an_arm_without_votes_is_doubted() -> None:
    by, variance = corrections(np.array([400.0, 0.0]), np.array([40.0, 0.0]), np.array([80.0, 0.0]))
    assert by[0] == pytest.approx(0.1, abs=0.005)
    assert by[1] == 0.0
    assert variance[1] > 50 * variance[0]


def test_patterns_have_names() -> None:
    for pattern in ((), ("copy",), ("copy", "edit")):
        assert pattern_of(metric_of(pattern)) == pattern
    assert metric_of(["edit", "copy"]) == metric_of(["copy", "edit"])


def test_the_controller_calibrates_when_there_are_votes_enough(tmp_path: Path) -> None:
    journal, store = Journal(tmp_path / "journal.db"), SqliteStore(tmp_path / "state.db")
    plan = RoutePlan("r", ARMS, LONG, Reward(mode="calibrated", min_votes=50))
    controller = Controller([plan], journal, store, "one")

    def lived(start: int, count: int) -> list[Fact]:
        facts: list[Fact] = []
        for n in range(start, start + count):
            at, name, good = (n % HOURS) * float(BUCKET), f"r{n}", n % 3 > 0
            facts.append(Interaction(f"e{n}", at, name, "r", "t", f"s{n}", Answerer("ab"[n % 2], "m")))
            facts.append(Signal(f"b{n}", at + 1, "copy" if good else "edit", "t", response_id=name))
            if n % 4 == 0:
                facts.append(Signal(f"v{n}", at + 2, "thumb", "t", response_id=name, value=float(good)))
        return facts

    def settle(now: float) -> None:
        while controller.step(now):
            pass

    journal.append(lived(0, 100))
    settle(NOW + 1000.0)
    assert calibration_of(store, "r") is None, "25 votes are too few"
    journal.append(lived(100, 300))
    settle(NOW + 1100.0)
    model = calibration_of(store, "r")
    assert model is not None
    assert (model.kinds, model.votes) == (("copy", "edit"), 100)
    found = beliefs(LONG, ARMS, calibrated(model, store.sums("r")), NOW)
    assert found.of("", "a").mean == pytest.approx(2 / 3, abs=0.1)
    journal.append(lived(400, 100))
    settle(NOW + 1200.0)
    assert calibration_of(store, "r") == model, "it is not due"
    settle(NOW + 1100.0 + 86401.0)
    again = calibration_of(store, "r")
    assert again is not None
    assert again.votes == 125
    journal.close()
    store.close()
