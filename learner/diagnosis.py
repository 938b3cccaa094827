"""Why did the gate refuse a challenger, and what should the next round do otherwise? Pure.

Signs in the gate's report, the dataset's manifest and the training's metrics each speak for a cause, with a weight;
causes are ranked by their sums. The signs are what the field knows to go wrong, the weights are ours: they order
causes, and are no probabilities. Each cause brings one change, taken from the round's own values:

    hyperparameters   too far: learning rate halved, the likelihood term doubled (2410.08847); too little: doubled,
                      longer; or rewarded more than better (2210.10760): beta doubled
    data quality      the robust loss, which expects flipped labels (2403.00409), and votes that agree more
    diversity         more of earlier rounds (`replay`)
    volume            nothing is trained until there are twice the pairs
    base              nothing that a round can change: somebody has to choose another model

`adjusted` spends the budget: what the next round overrides, or None when it is spent or nothing would help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from learner.gate import Check, Report
from learner.plan import Gate, Learner
from learner.spec import Hyper

CauseName = Literal["data quality", "diversity", "volume", "hyperparameters", "base"]
CAUSES: tuple[CauseName, ...] = ("hyperparameters", "data quality", "diversity", "volume", "base")
"""In the order in which they are tried if nothing speaks for one more than for another: cheapest first."""
FELL = 0.2
"""Nats a token by which preferred answers became less likely: sound runs of `bench/learner_quality.py` stay within 0.1
above the base and below it."""
FEW_PAIRS, FEW_PEOPLE = 500, 50
AGREE = 0.7
"""Share of pairs of votes on one thing that agree, below which labels are doubted; 0.9 among trained annotators."""
MOST_REPLAY = 0.6


class Cause(msgspec.Struct, frozen=True):
    """One reason why, with what speaks for it and what would be changed."""

    name: CauseName
    weight: float
    reasons: tuple[str, ...]
    change: dict[str, Any]
    """Keys of `routes.X.learner` and their new values; empty where a round can change nothing."""


class Diagnosis(msgspec.Struct, frozen=True):
    """Causes, the likeliest first."""

    causes: tuple[Cause, ...]
    again: bool = False
    """The challenger may be as good as it is: measure it again, without training (a judge was down, a replica away)."""
    why: str = ""


class _Sign(NamedTuple):
    cause: CauseName
    weight: float
    reason: str


class _Case(NamedTuple):
    """What is known of a round."""

    report: Report
    manifest: Mapping[str, Any]
    metrics: Mapping[str, float]
    hyper: Hyper

    def failed(self, *names: str) -> list[str]:
        return [one.name for one in self.report.checks if one.verdict == "fail" and one.name in names]

    def worse(self, start: str) -> list[Check]:
        """Failed checks whose names begin so."""
        return [one for one in self.report.checks if one.name.startswith(start) and one.verdict == "fail"]

    @property
    def pairs(self) -> int:
        counts = self.manifest.get("examples", {}).get("train", {})
        return int(counts.get("pair", 0)) + int(counts.get("correction", 0))

    @property
    def single(self) -> int:
        return int(self.manifest.get("examples", {}).get("train", {}).get("unpaired", 0))


def diagnose(report: Report, manifest: Mapping[str, Any], metrics: Mapping[str, float], hyper: Hyper) -> Diagnosis:
    """Of one that did not pass: from its dataset's manifest, its run's metrics and what it was trained with."""
    if report.verdict == "pass":
        return Diagnosis((), why="it passed")
    if unmeasured := _unmeasured(report):
        served = report.check("served")
        return Diagnosis((), again=report.again or (served is not None and served.verdict == "fail"), why=unmeasured)
    case = _Case(report, manifest, metrics, hyper)
    signs = [*_of_training(case), *_of_labels(case), *_of_diversity(case), *_of_volume(case), *_of_base(case)]
    causes = [
        Cause(
            name,
            round(sum(sign.weight for sign in signs if sign.cause == name), 3),
            tuple(sign.reason for sign in signs if sign.cause == name),
            _change(name, case),
        )
        for name in CAUSES
        if any(sign.cause == name for sign in signs)
    ]
    ordered = sorted(causes, key=lambda cause: (-cause.weight, CAUSES.index(cause.name)))
    first = f"{ordered[0].name}: {'; '.join(ordered[0].reasons)}" if ordered else "nothing speaks for any cause"
    return Diagnosis(tuple(ordered), why=first)


def _unmeasured(report: Report) -> str:
    """Why nothing can be said of the training: who should have measured did not."""
    if (served := report.check("served")) and served.verdict == "fail":
        return f"it was not served as it was trained ({served.why}); see to the replicas, then ask again"
    referee = report.check("referee")
    if referee is None or referee.verdict == "pass" or any(one.verdict == "fail" for one in report.checks):
        return ""
    return referee.why


# ---- signs ----


def _of_training(case: _Case) -> Iterator[_Sign]:
    fell = case.metrics.get("held_out_fall", 0.0)
    if fell > FELL:
        yield _Sign("hyperparameters", 2.0, f"preferred answers became {fell:.2f} nats a token less likely in training")
    if case.failed("collapse"):
        yield _Sign("hyperparameters", 2.0, "it fell apart")
    if names := case.failed("broken", "repetitive"):
        yield _Sign("hyperparameters", 2.0, f"its answers lost their form ({', '.join(names)})")
    if case.failed("refuses less", "refuses more", "goldens to refuse", "goldens to answer", "goldens"):
        yield _Sign("hyperparameters", 0.5, "it lost what the champion could do")
    main, accuracy = case.report.main, case.metrics.get("held_out_accuracy")
    if _idle(case):
        yield _Sign("hyperparameters", 1.5, f"it tells apart {accuracy:.0%} of held-out pairs: it has learned little")
    if main.name == "win rate" and main.verdict == "fail" and accuracy is not None and accuracy > 0.6:
        yield _Sign("hyperparameters", 1.5, f"it ranks {accuracy:.0%} of held-out pairs right and loses its duels")


def _idle(case: _Case) -> bool:
    """Whether it hardly moved."""
    accuracy, fell = case.metrics.get("held_out_accuracy"), case.metrics.get("held_out_fall", 0.0)
    divergence = case.report.divergence
    return accuracy is not None and 0.45 <= accuracy < 0.58 and abs(fell) < 0.02 and (divergence or 0.0) < 0.2


def _of_labels(case: _Case) -> Iterator[_Sign]:
    agreement = case.manifest.get("agreement", {}).get("pairwise")
    if agreement is not None and agreement < AGREE:
        yield _Sign("data quality", 1.5, f"people who judged the same agree in {agreement:.0%} of pairs of votes")
    votes = case.manifest.get("votes", 0)
    dropped = {row["filter"]: row["dropped"] for row in case.manifest.get("filters", ())}
    doubted = sum(dropped.get(name, 0) for name in ("disputed", "contradicted", "opposed"))
    if votes and doubted > 0.15 * votes:
        yield _Sign("data quality", 1.0, f"{doubted} of {votes} votes contradict others")
    accuracy = case.metrics.get("held_out_accuracy")
    if accuracy is not None and accuracy < 0.45:
        yield _Sign("data quality", 2.0, f"trained, it ranks {accuracy:.0%} of other people's pairs right")
    if case.failed("preference"):
        yield _Sign("data quality", 1.5, "it ranks fewer held-out pairs as people did")
    longer = case.manifest.get("length", {})
    told = longer.get("longer_chosen", 0) + longer.get("shorter_chosen", 0)
    if case.failed("length"):
        share = longer.get("longer_chosen", 0) / told if told else 0.0
        if share > 0.6:
            yield _Sign(
                "data quality", 2.0, f"in {share:.0%} of pairs the longer answer is preferred: it learned length"
            )
        else:
            yield _Sign("hyperparameters", 1.5, "its answers grew, though longer ones are not preferred")
    if case.worse("goldens") and case.report.main.verdict == "pass":
        yield _Sign("data quality", 1.5, "what pleases people is not what the goldens ask for")


def _of_diversity(case: _Case) -> Iterator[_Sign]:
    parts = [one.name.removeprefix("preference, ") for one in case.worse("preference, ")]
    if (preference := case.report.check("preference")) is None or preference.verdict != "fail":
        if rounds := [part for part in parts if part.startswith("round ")]:
            yield _Sign("diversity", 2.0, f"it forgot what earlier rounds taught ({', '.join(rounds)})")
        if others := [part for part in parts if not part.startswith("round ")]:
            yield _Sign("diversity", 1.5, f"it is worse for some only: {', '.join(others)}")
    people = case.manifest.get("users", {}).get("train")
    if people is not None and people < FEW_PEOPLE:
        yield _Sign("diversity", 1.0, f"it learned from {people} people")
    coverage = case.manifest.get("coverage", {})
    if len(coverage) > 1 and (largest := max(coverage.values())) > 0.8 * sum(coverage.values()):
        yield _Sign("diversity", 0.5, f"{largest / sum(coverage.values()):.0%} of the examples are of one task type")
    if case.failed("goldens", "goldens to refuse", "goldens to answer", "goldens that must hold", "refuses less"):
        yield _Sign("diversity", 1.0, "goldens are lost that no pair kept up")


def _of_volume(case: _Case) -> Iterator[_Sign]:
    count = case.pairs or case.single
    if 0 < count < FEW_PAIRS:
        yield _Sign("volume", 1.5, f"it learned from {count} examples")
    if case.report.verdict == "inconclusive":
        yield _Sign("volume", 1.0, f"too little was held out to tell ({case.report.why})")


def _of_base(case: _Case) -> Iterator[_Sign]:
    """Little speaks for it that does not speak for something else first."""
    low = [one for one in case.report.checks if one.name.startswith("goldens") and (one.champion or 1.0) < 0.5]
    if low:
        yield _Sign("base", 1.0, f"the champion fails most goldens, too ({low[0].name})")
    if _idle(case) and case.pairs >= 4 * FEW_PAIRS:
        yield _Sign("base", 1.0, f"{case.pairs} pairs taught it little")
    if (seconds := case.report.check("seconds")) and seconds.verdict == "fail" and not case.failed("length"):
        yield _Sign("base", 1.0, "it is slower, and not longer: look at how it is served")


# ---- what to do ----


def _change(name: CauseName, case: _Case) -> dict[str, Any]:
    hyper = case.hyper
    if name == "hyperparameters":
        return {"train": _other_hyper(case)}
    if name == "data quality":
        written = case.manifest.get("policy", {}).get("min_agreement", 0.66)
        return {"loss": "robust", "dataset": {"min_agreement": max(0.8, written)}} if hyper.loss != "robust" else {}
    if name == "diversity":
        replay = case.manifest.get("policy", {}).get("replay", 0.0)
        return (
            {"dataset": {"replay": min(MOST_REPLAY, max(0.3, round(1.5 * replay, 3)))}} if replay < MOST_REPLAY else {}
        )
    if name == "volume":
        return {"min_pairs": 2 * max(FEW_PAIRS, case.pairs or case.single)}
    return {}


def _other_hyper(case: _Case) -> dict[str, Any]:
    hyper = case.hyper
    if _idle(case):
        return {"learning_rate": _digits(2 * hyper.learning_rate), "max_epochs": round(1.5 * hyper.max_epochs, 2)}
    lower = {"learning_rate": _digits(hyper.learning_rate / 2)}
    if case.metrics.get("held_out_fall", 0.0) <= FELL and not case.failed("collapse", "broken", "repetitive"):
        return {**lower, "beta": _digits(2 * hyper.beta)}
    if hyper.loss == "sigmoid+sft":
        return {**lower, "sft_weight": min(1.0, _digits(2 * hyper.sft_weight))}
    return lower


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def adjusted(policy: Gate, tried: Sequence[Diagnosis]) -> dict[str, Any] | None:
    """What the next round overrides of `routes.X.learner`, after rounds that were `tried`, oldest first.

    None where the budget of `policy.retries` is spent, or where nothing that a round can change would help. With
    nothing but `min_pairs` there is no point in training again before there is more to learn from.
    """
    merged: dict[str, Any] = {}
    for place, diagnosis in enumerate(tried):
        if place >= policy.retries:
            return None
        changes = (_merged(merged, cause.change) for cause in diagnosis.causes if cause.change)
        new = next((change for change in changes if change != merged), None)
        if new is None:
            return None
        merged = new
    return merged or None


def pairs_wanted(tried: Sequence[Diagnosis]) -> int:
    """How many pairs there should be before the next round; 0 unless too few were why the last failed."""
    likeliest = tried[-1].causes[:1] if tried else ()
    return sum(int(cause.change.get("min_pairs", 0)) for cause in likeliest)


def _merged(before: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(before)
    for key, value in more.items():
        found[key] = _merged(found.get(key, {}), value) if isinstance(value, dict) else value
    return found


def overridden(plan: Learner, overrides: Mapping[str, Any]) -> Learner:
    """`plan` with these, checked as if they had been written. Raises pydantic's ValidationError."""
    written = plan.model_dump(exclude_unset=True)
    whole = plan.model_dump()
    written |= {key: whole[key] for key, value in overrides.items() if isinstance(value, dict)}
    return Learner.model_validate(_merged(written, overrides))
