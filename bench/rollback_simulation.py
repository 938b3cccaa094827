"""How often a good challenger is rolled back, and how soon a bad one is: simulated rollouts, thousands of them.

    python bench/rollback_simulation.py --runs 10000        # about three minutes on one core
    python bench/rollback_simulation.py --quick --json      # a second or two; the numbers mean little

A champion and a challenger share the sessions of a route. Each session draws its arm, and is rewarded 1 to 200
sessions later: 1 or 0 at a base rate of 0.6, or graded (a Beta of the same mean). The level of both arms drifts
together: a slow wave of ±0.08 whose phase and length differ from run to run. Every 50 sessions we look, and so does
the bandit where it moves the shares (`router.bandit.thompson_weights` over all rewards so far, floor 0.02, prior mass
20, as the default policy has it). Shares are moved by the bandit, held at 20 % or 5 %, or raised in stages (5, 20,
50 %, a third of the time each).

ours    roll back when the upper bound of the one-sided asymptotic confidence sequence (α = 0.05, `router.stats`) for
        challenger − control lies below 0. The control is all of the champion's traffic, weighted by propensity,
        which tells more than a control of the challenger's size: beside 5 % for the challenger, 95 % leave a
        variance of 1/0.05 + 1/0.95 a session, and 5 % one of 1/0.05 + 1/0.05. ρ is tuned for a difference of 0.1.
naive   roll back when P(challenger is worse) > 95 % by the bandit's own posterior.

False: the challenger is equal, and was rolled back at some look within 4,000 sessions. Caught: it is 0.10 worse; the
median number of sessions (of both arms) before the roll back, in steps of 50, runs never caught counted as infinite.
± is one Monte Carlo standard error; beside a median is its 95 % interval by order statistics. Rewards are scored as
they come, with the baseline of then; those that have not come by a look are not in it.

Left out: discounting of old rewards, segments, the holdout, rewards whose delay or absence depends on the arm, and
differences that change with time. At a held share the bandit does not run, so there is no naive rule beside ours.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # also from a checkout that is not installed

from router.arms import Sums
from router.bandit import thompson_weights
from router.stats import asymptotic, baseline, overlap, tuned_rho, variance_to_detect

Floats = NDArray[np.float64]

LOOK = 50
ALPHA = 0.05
BASE, DRIFT = 0.6, 0.08
MAX_DELAY = 200
FLOOR, MASS, PRIOR_MEAN = 0.02, 20.0, 0.5
RHO = tuned_rho(variance_to_detect(0.1, ALPHA), ALPHA, sides=1)
CHUNK = 2000
"""Runs simulated together."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    shares: str
    """`thompson`, `stages`, or the share that the challenger is held at."""
    graded: bool
    difference: float
    sessions: int
    bar: float
    """The largest false rollback rate, or the largest median of sessions."""


SCENARIOS = [
    Scenario(f"{kind}, {shares}", shares, kind == "graded", 0.0, 4000, 0.05)
    for shares in ("thompson", "stages", "0.2", "0.05")
    for kind in ("0/1", "graded")
] + [
    Scenario(f"{kind}, {share}", share, kind == "graded", -0.1, 3 * bar, bar)
    for share, bar in (("0.2", 1100), ("0.05", 3600))
    for kind in ("0/1", "graded")
]


def simulate(scenario: Scenario, runs: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Sessions until the rule fired, ours and the naive one, inf where it never did; each of shape [runs]."""
    blocks = scenario.sessions // LOOK
    phase, length = random.uniform(0, 2 * math.pi, (runs, 1)), random.uniform(500, 5000, (runs, 1))
    coming = np.zeros((runs, MAX_DELAY // LOOK + 1, 12))  # sums that will be known at this look, the next, …
    arms = np.zeros((runs, 2, 3))  # n, Σr, Σr² of challenger and champion
    evidence = np.zeros((4, runs))
    caught, naive = np.full(runs, math.inf), np.full(runs, math.inf)
    share = np.full(runs, 0.5)
    for block in range(blocks):
        if scenario.shares == "stages":
            share[:] = (0.05, 0.2, 0.5)[3 * block // blocks]
        elif scenario.shares != "thompson":
            share[:] = float(scenario.shares)
        challenger = random.random((runs, LOOK)) < share[:, None]
        moment = block * LOOK + np.arange(LOOK)
        level = BASE + DRIFT * np.sin(phase + 2 * math.pi * moment / length) + scenario.difference * challenger
        delay = random.integers(1, MAX_DELAY, (runs, LOOK), endpoint=True)
        coming += sums(challenger, share[:, None], rewards(level, scenario.graded, random), moment, delay)

        h, g, gr, gg, ggr, ggrr = coming[:, 0, :6].T
        known = baseline(arms[..., 0].sum(axis=1), arms[..., 1].sum(axis=1))  # of earlier looks alone
        arrived = coming[:, 0, 6:].reshape(runs, 2, 3)
        evidence += arrived[..., 0].sum(axis=1), h, gr - known * g, ggrr - 2 * known * ggr + known**2 * gg
        arms += arrived
        coming = np.concatenate([coming[:, 1:], np.zeros((runs, 1, 12))], axis=1)

        seen = (block + 1.0) * LOOK
        _, upper = asymptotic(*evidence, ALPHA, RHO, 1)
        caught[(upper < 0) & np.isinf(caught)] = seen
        if scenario.shares == "thompson":
            share = np.array([thompson_share(one) for one in arms])
            worse = 1.0 - (share - FLOOR) / (1.0 - 2 * FLOOR)
            naive[(worse > 0.95) & np.isinf(naive)] = seen
    return caught, naive


def rewards(level: Floats, graded: bool, random: np.random.Generator) -> Floats:
    """Rewards of mean `level`, of its shape: 0 or 1, or Beta with a third of that variance."""
    if graded:
        return random.beta(2.0 * level, 2.0 * (1.0 - level))
    return (random.random(level.shape) < level).astype(float)


def sums(challenger: NDArray[np.bool_], share: Floats, r: Floats, moment: NDArray[np.int64], delay: Floats) -> Floats:
    """What a block of sessions [runs, LOOK] will add at this look and those after it, shape [runs, looks, 12].

    With the score y = g(r − b), whose b is known only when the reward comes: Σh, Σg, Σgr, Σg², Σg²r, Σg²r², then
    each arm's n, Σr and Σr².
    """
    h = np.broadcast_to(overlap(share, 1.0 - share), r.shape)
    g = np.where(challenger, h / share, -h / (1.0 - share))
    c, k = challenger.astype(float), 1.0 - challenger
    each = np.stack([h, g, g * r, g * g, g * g * r, (g * r) ** 2, c, c * r, c * r * r, k, k * r, k * r * r], axis=-1)
    when = (moment % LOOK + delay) // LOOK
    looks = (when[:, None, :] == np.arange(MAX_DELAY // LOOK + 1)[:, None]).astype(float)
    return looks @ each


def thompson_share(arms: Floats) -> float:
    """The challenger's share by the bandit; arms [2, 3] are n, Σr, Σr² of challenger and champion."""
    seen = {name: Sums(*one) for name, one in zip(("challenger", "champion"), arms.tolist(), strict=True)}
    return thompson_weights(list(seen), seen, mean=PRIOR_MEAN, mass=MASS, floor=FLOOR)["challenger"]


# Telling.


def rate(fired: Floats) -> dict[str, float]:
    share = float(np.isfinite(fired).mean())
    return {"rate": share, "standard_error": math.sqrt(share * (1 - share) / fired.size)}


def middle(fired: Floats) -> dict[str, float | None]:
    """The median and its 95 % interval by order statistics; None stands for never."""
    ordered, half = np.sort(fired), 0.98 * math.sqrt(fired.size)
    at = [fired.size / 2 - half, (fired.size - 1) / 2, fired.size / 2 + half]
    low, median, high = (float(ordered[min(max(math.floor(one), 0), fired.size - 1)]) for one in at)
    found = {"median": median, "low": low, "high": high, "p90": float(ordered[int(0.9 * (fired.size - 1))])}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every scenario, each from its own seed, so that one does not move the others."""
    results: dict[str, dict[str, Any]] = {"false_rollback": {}, "caught": {}}
    started = time.perf_counter()
    for number, scenario in enumerate(SCENARIOS):
        random = np.random.default_rng([options.seed, number])
        sizes = [min(CHUNK, options.runs - done) for done in range(0, options.runs, CHUNK)]
        parts = [simulate(scenario, size, random) for size in sizes]
        ours, naive = (np.concatenate(one) for one in zip(*parts, strict=True))
        if scenario.difference == 0:
            found: dict[str, Any] = {"ours": rate(ours), "bar": scenario.bar}
            found["naive"] = rate(naive) if scenario.shares == "thompson" else None
            results["false_rollback"][scenario.name] = found
        else:
            results["caught"][scenario.name] = {**middle(ours), "bar": scenario.bar}
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "runs": options.runs,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started, 1),
        **results,
    }


def show(data: dict[str, Any]) -> None:
    print(f"$ {data['command']}\n{data['runs']:,} runs, seed {data['seed']}, {data['seconds']} s\n")
    print(f"{'rolled back though equal':<28}{'ours':>16}{'naive':>16}{'bar':>9}")
    for name, one in data["false_rollback"].items():
        cells = [f"{r['rate']:.2%} ± {r['standard_error']:.2%}" if r else "–" for r in (one["ours"], one["naive"])]
        print(f"{name:<28}{cells[0]:>16}{cells[1]:>16}{'≤ ' + format(one['bar'], '.0%'):>9}")
    print(f"\n{'caught when 0.10 worse':<28}{'median sessions':>24}{'90 %':>8}{'bar':>9}")
    for name, one in data["caught"].items():
        n = {key: "never" if value is None else f"{value:,.0f}" for key, value in one.items()}
        median = f"{n['median']} ({n['low']}–{n['high']})"
        print(f"{name:<28}{median:>24}{n['p90']:>8}{'≤ ' + n['bar']:>9}")


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--runs", type=int, help="rollouts of each kind (10,000; at most 1,000,000)")
    about.add_argument("--seed", type=int, default=1)
    about.add_argument("--json", action="store_true", help="print JSON")
    about.add_argument("--quick", action="store_true", help="20 runs: shows that it works, measures little")
    options = about.parse_args()
    options.runs = min(options.runs or (20 if options.quick else 10_000), 1_000_000)
    if options.runs < 1:
        about.error("--runs: at least 1")
    data = run(options)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        show(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
