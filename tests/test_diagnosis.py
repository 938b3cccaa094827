"""Why a challenger was refused, as far as can be told, and what the next round does otherwise."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from learner.diagnosis import Cause, Diagnosis, adjusted, diagnose, overridden, pairs_wanted
from learner.gate import Check, Report, Verdict
from learner.measured import Referee
from learner.plan import Gate, Learner
from learner.spec import Hyper

HYPER = Hyper(learning_rate=2e-5, sft_weight=0.2)
MANIFEST: dict[str, Any] = {
    "policy": {"min_agreement": 0.66, "replay": 0.3},
    "votes": 3000,
    "filters": [{"filter": "disputed", "meaning": "", "dropped": 20, "shown": []}],
    "agreement": {"krippendorff_alpha": 0.8, "pairwise": 0.9},
    "examples": {"train": {"pair": 1500, "correction": 0, "unpaired": 100}, "held_out": {"pair": 150}},
    "users": {"train": 400, "held_out": 45},
    "coverage": {"code": 700, "mail": 900},
    "length": {"longer_chosen": 750, "shorter_chosen": 700, "equal": 50},
}
METRICS = {"held_out_accuracy": 0.7, "held_out_margin": 0.2, "held_out_fall": 0.05}


def report(verdict: Verdict = "fail", main: Verdict = "pass", divergence: float = 0.4, **checks: Verdict) -> Report:
    """`checks`: verdicts by name, with _ for spaces and __ for ", "."""
    found = [Check(name="served", kind="must", verdict="pass", why="they say it")]
    found += [
        Check(name=name.replace("__", ", ").replace("_", " "), kind="guard", verdict=one, why="so it is")
        for name, one in checks.items()
    ]
    found.append(Check(name="win rate", kind="main", verdict=main, why="it wins"))
    return Report(
        verdict=verdict, why="because", champion="v1", challenger="v2", dataset="d", checks=tuple(found),
        referee=Referee(name="judge"), divergence=divergence, alpha=0.05, seed=0,
    )  # fmt: skip


def of(told: Report, manifest: dict[str, Any] | None = None, metrics: dict[str, float] | None = None) -> Diagnosis:
    return diagnose(told, {**MANIFEST, **(manifest or {})}, {**METRICS, **(metrics or {})}, HYPER)


@pytest.mark.parametrize(
    ("told", "manifest", "metrics", "cause", "reason"),
    [
        (report(collapse="fail", broken="fail"), {}, {}, "hyperparameters", "fell apart"),
        (report(repetitive="fail"), {}, {"held_out_fall": 0.5}, "hyperparameters", "0.50 nats"),
        (report(main="fail"), {}, {}, "hyperparameters", "loses its duels"),
        (report(main="fail", preference="fail"), {}, {"held_out_accuracy": 0.35}, "data quality", "35%"),
        (report(preference="fail"), {"agreement": {"pairwise": 0.55}}, {}, "data quality", "55%"),
        (
            report(length="fail"),
            {"length": {"longer_chosen": 900, "shorter_chosen": 100, "equal": 0}},
            {},
            "data quality",
            "learned length",
        ),
        (report(preference__round_earlier="fail"), {}, {}, "diversity", "forgot"),
        (report(preference__cohort_de="fail"), {"users": {"train": 12}}, {}, "diversity", "12 people"),
        (
            report("inconclusive", "inconclusive"),
            {"examples": {"train": {"pair": 80, "correction": 0, "unpaired": 0}}},
            {},
            "volume",
            "80 examples",
        ),
        (report(seconds="fail"), {}, {}, "base", "slower"),
    ],
)
def test_the_signs_of_each_cause_put_it_first(
    told: Report, manifest: dict[str, Any], metrics: dict[str, float], cause: str, reason: str
) -> None:
    found = of(told, manifest, metrics)
    assert found.causes[0].name == cause, found
    assert any(reason in said for said in found.causes[0].reasons)
    assert found.why.startswith(cause)
    assert [one.weight for one in found.causes] == sorted((one.weight for one in found.causes), reverse=True)


def test_what_was_not_measured_is_measured_again_and_not_trained_again() -> None:
    unsure = report("inconclusive", "inconclusive", referee="inconclusive", broken="inconclusive")
    away = msgspec.structs.replace(unsure, again=True)
    assert of(away).again
    assert not of(unsure).again
    assert of(unsure).why == "so it is"
    assert of(away).causes == ()
    assert adjusted(Gate(), [of(away)]) is None
    unserved = report(served="fail")
    unserved = msgspec.structs.replace(unserved, checks=unserved.checks[1:])
    assert of(unserved).again
    assert not of(report(referee="inconclusive", collapse="fail")).again


def test_one_that_passed_has_nothing_wrong() -> None:
    assert of(report("pass")).causes == ()
    assert adjusted(Gate(), [of(report("pass"))]) is None


def test_a_collapse_halves_the_rate_and_holds_on_to_what_was_preferred() -> None:
    changes = adjusted(Gate(), [of(report(collapse="fail"))])
    assert changes == {"train": {"learning_rate": 1e-5, "sft_weight": 0.4}}


def test_one_that_learned_nothing_learns_faster_and_longer() -> None:
    found = of(
        report("inconclusive", "inconclusive", divergence=0.01), {}, {"held_out_accuracy": 0.5, "held_out_fall": 0}
    )
    assert adjusted(Gate(), [found]) == {"train": {"learning_rate": 4e-5, "max_epochs": 4.5}}


def test_bad_labels_bring_the_robust_loss_and_more_agreement() -> None:
    changes = adjusted(Gate(), [of(report(preference="fail"), {"agreement": {"pairwise": 0.5}})])
    assert changes == {"loss": "robust", "dataset": {"min_agreement": 0.8}}


def test_too_little_to_learn_from_waits_for_more() -> None:
    few = {"examples": {"train": {"pair": 80, "correction": 0, "unpaired": 0}}}
    found = of(report("inconclusive", "inconclusive"), few)
    assert adjusted(Gate(), [found]) == {"min_pairs": 1000}
    assert pairs_wanted([found]) == 1000
    assert pairs_wanted([found, of(report(collapse="fail"))]) == 0, "the last one tells"
    assert pairs_wanted([]) == 0


def test_adjustments_add_up_and_what_did_not_help_is_not_done_again() -> None:
    labels = of(report(preference="fail", collapse="fail"), {"agreement": {"pairwise": 0.5}})
    assert [cause.name for cause in labels.causes[:2]] == ["data quality", "hyperparameters"]
    first = adjusted(Gate(retries=3), [labels])
    second = adjusted(Gate(retries=3), [labels, labels])
    assert first == {"loss": "robust", "dataset": {"min_agreement": 0.8}}
    assert second == {**first, "train": {"learning_rate": 1e-5, "sft_weight": 0.4}}


def test_the_budget_ends_it() -> None:
    failed = of(report(collapse="fail"))
    assert adjusted(Gate(retries=0), [failed]) is None
    assert adjusted(Gate(retries=1), [failed]) is not None
    assert adjusted(Gate(retries=1), [failed, failed]) is None
    assert adjusted(Gate(), []) is None


def test_where_only_another_base_would_help_nothing_is_tried() -> None:
    found = of(report(seconds="fail"))
    assert [cause.name for cause in found.causes] == ["base"]
    assert adjusted(Gate(), [found]) is None


def test_what_is_overridden_is_checked_as_if_it_were_written() -> None:
    plan = Learner(base="b", train={"rank": 8}, dataset={"held_out": 0.2})  # type: ignore[arg-type]
    changes = {"loss": "robust", "train": {"learning_rate": 1e-5}, "dataset": {"replay": 0.45}, "min_pairs": 900}
    found = overridden(plan, changes)
    assert (found.loss, found.min_pairs, found.dataset.replay, found.dataset.held_out) == ("robust", 900, 0.45, 0.2)
    assert found.train == {"rank": 8, "learning_rate": 1e-5}
    assert (plan.loss, plan.train) == ("sigmoid+sft", {"rank": 8})
    with pytest.raises(ValidationError):
        overridden(plan, {"loss": "nonsense"})


def test_every_change_can_be_overridden_and_every_reason_travels_as_json() -> None:
    everything = report(
        "fail", "fail", collapse="fail", broken="fail", length="fail", preference__round_earlier="fail", goldens="fail"
    )
    poor = {"agreement": {"pairwise": 0.5}, "users": {"train": 3}, "examples": {"train": {"pair": 5}}}
    found = of(everything, poor)
    assert {cause.name for cause in found.causes} == {"hyperparameters", "data quality", "diversity", "volume"}
    for cause in found.causes:
        overridden(Learner(base="b"), cause.change)
    assert msgspec.json.decode(json.dumps(msgspec.to_builtins(found)), type=Diagnosis) == found
    assert isinstance(found.causes[0], Cause)


def test_a_manifest_and_metrics_of_an_older_version_are_enough() -> None:
    found = diagnose(report(collapse="fail"), {}, {}, HYPER)
    assert found.causes[0].name == "hyperparameters"
