"""What an answer costs beside what it is worth: an arm's value is its reward − λ · cost − μ · seconds. Pure.

Costs and times are measured on the sessions that have a reward and kept as sums beside it, per arm over all segments;
they vary so much less between sessions than between arms that their means are taken for certain. Where the operator
wrote a budget instead of λ, λ is the smallest one at which the shares that it brings about cost no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from router.arms import Cell, Sums
from router.bandit import Floats
from router.casting import is_version, lead_of
from router.policy import Arm, Learned, Reward
from router.reward import NOT_DRAWN
from router.weights import mean_of, shares
from telemetry.events import Interaction

COST, LATENCY = "cost", "latency"
HALVINGS = 24


@dataclass(frozen=True, slots=True)
class Priced:
    """What a session of each arm costs, and how much reward that is held to be worth."""

    price: float
    """λ: reward given up for one unit of currency."""
    costs: Mapping[str, float]
    """A session's, by arm; empty where no cost counts."""
    burdens: Mapping[str, float]
    """By arm, in units of reward."""


def measured(terms: Reward, arms: Mapping[str, Arm], answers: Iterable[Interaction]) -> dict[str, float]:
    """Metric → what a session's answers took; what is not known of all of them is left out."""
    answers = [answer for answer in answers if answer.answerer.policy not in NOT_DRAWN]
    found: dict[str, float] = {}
    if terms.cost and all(_billed(i, arms) for i in answers):
        found[COST] = sum(_cost(i, arms) for i in answers)
    if terms.latency and answers:
        found[LATENCY] = sum(i.duration for i in answers) / len(answers)
    return found


def priced(policy: Learned, arms: Mapping[str, Arm], cells: Mapping[Cell, Sums], now: float, terms: Reward) -> Priced:
    """The burdens of `terms` as of `now` (Unix seconds)."""
    burden = np.zeros(len(arms))
    if terms.latency:
        burden = terms.latency.weight * mean_of(LATENCY, policy, arms, cells, now)
    if terms.cost is None:
        return Priced(0.0, {}, _named(arms, burden))
    costs = mean_of(COST, policy, arms, cells, now)
    price = terms.cost.weight or _price_within(terms.cost.budget or 0.0, policy, arms, cells, now, costs, burden)
    return Priced(price, _named(arms, costs), _named(arms, burden + price * costs))


def _price_within(
    budget: float,
    policy: Learned,
    arms: Mapping[str, Arm],
    cells: Mapping[Cell, Sums],
    now: float,
    costs: Floats,
    burden: Floats,
) -> float:
    """The smallest λ at which a session costs no more than `budget` on average, on the route as a whole."""
    whole = policy.model_copy(update={"segment_by": None})

    def spent(price: float) -> float:
        row = shares(whole, arms, cells, now, _named(arms, burden + price * costs))[""]  # type: ignore[arg-type]
        drawn = (1.0 - policy.holdout) * np.array(list(row.values())) + policy.holdout / len(arms)
        return float(drawn @ costs)

    apart = float(costs.max() - costs.min())
    if apart <= 0.0 or spent(0.0) <= budget:
        return 0.0
    low, high = 0.0, 2.0 / apart  # at which the dearest arm would need two rewards more than the cheapest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def _arm(answer: Interaction, arms: Mapping[str, Arm]) -> Arm | None:
    """Whose price an answer has: a version's (whose arm is named after it) is the lead's, as whom it is dressed."""
    who = answer.answerer
    return arms.get(who.arm) or (arms[lead_of(arms)] if is_version(who.arm) else None)


def _billed(answer: Interaction, arms: Mapping[str, Arm]) -> bool:
    arm = _arm(answer, arms)
    return bool(arm and arm.price) and answer.tokens_in is not None and answer.tokens_out is not None


def _cost(answer: Interaction, arms: Mapping[str, Arm]) -> float:
    arm = _arm(answer, arms)
    assert arm is not None
    price = arm.price
    assert price is not None
    return ((answer.tokens_in or 0) * price.input + (answer.tokens_out or 0) * price.output) / 1e6


def _named(arms: Mapping[str, Arm], row: Floats) -> dict[str, float]:
    return dict(zip(arms, row.tolist(), strict=True))
