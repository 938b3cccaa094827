"""What learning costs: the router's own arithmetic on recorded rewards, against uniform shares and a Beta bandit.

    python bench/routing_replay.py DATA.jsonl              # 200 orders of the prompts, about a minute
    python bench/routing_replay.py DATA.jsonl --quick --json

DATA has a prompt a line with the reward in [0, 1] of every arm: {"arms": {NAME: {"reward": r}, …}}. Each run shuffles
the prompts, draws an arm for each from the current weights, and sees only that arm's reward. Regret is what the best
single arm would have earned more, summed over all prompts; with n prompts it grows as √n, so bars for other n scale
so. All runs go side by side as arrays through `router.bandit`: the functions that the controller calls.

Scenarios: fresh weights for each prompt; weights up to 100 and 500 prompts old; one reward in ten seen; a floor and
a holdout, for their price; arms whose rewards are seen at different rates (is the estimated mean biased?); and a
leading arm that gets worse by 0.18 half-way (how many prompts until its share is at most 10 %), for several half-lives,
each with its price in regret where nothing drifts. A prompt stands for a session, `--pace` of them an hour.

Left out: prompts' features, costs, more than one segment.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from router.bandit import believe, probability_best, with_floor
from router.policy import Prior

PRIOR = Prior()
DROP, DROP_AT, LONG_GONE = 0.18, 1500, 0.10


@dataclass(frozen=True)
class Scenario:
    """How one bandit is run. `decay` multiplies all sums after each prompt; `seen` is the rate of rewards by arm."""

    policy: str = "thompson"
    refresh: int = 1
    seen: tuple[float, ...] | float = 1.0
    decay: float = 1.0
    floor: float = 0.0
    holdout: float = 0.0
    drop: bool = False


def replay(rewards: np.ndarray, scenario: Scenario, runs: int, seed: int) -> dict[str, np.ndarray]:
    """Run `scenario` over `rewards` [n, K] in `runs` random orders. Returns arrays by run."""
    chance = np.random.default_rng(seed)
    n, k = rewards.shape
    orders = np.stack([chance.permutation(n) for _ in range(runs)])
    if scenario.drop:  # long enough to see the end
        orders = np.concatenate([orders, np.stack([chance.permutation(n) for _ in range(runs)])], axis=1)
    best = int(rewards.mean(0).argmax())
    seen = np.broadcast_to(np.asarray(scenario.seen, float), (k,))
    sums = np.zeros((3, runs, k))
    totals = np.zeros((2, 2, runs, k))  # undiscounted: Σw and Σwr of the rewards seen; w = 1, and 1 / propensity
    weights = np.full((runs, k), 1.0 / k)
    regret, rows = np.zeros(runs), np.arange(runs)
    gone = np.full(runs, np.inf)
    for t in range(orders.shape[1]):
        if t % scenario.refresh == 0:
            weights = _weights(scenario, sums, chance, k)
        arm = (chance.random(runs)[:, None] > np.cumsum(weights, axis=1)[:, :-1]).sum(1)
        shown = rewards[orders[:, t]]
        if scenario.drop and t >= DROP_AT:
            shown = shown.copy()
            shown[:, best] = np.maximum(0.0, shown[:, best] - DROP)
            gone = np.where((weights[:, best] <= LONG_GONE) & np.isinf(gone), t - DROP_AT, gone)
        got = shown[rows, arm]
        regret += shown[:, best] - got
        heard = chance.random(runs) < seen[arm]
        if scenario.decay < 1.0:
            sums *= scenario.decay
        one = np.zeros((runs, k))
        one[rows, arm] = heard
        sums += np.stack([one, one * got[:, None], one * (got**2)[:, None]])
        each = np.stack([one, one / np.maximum(weights, 1e-12)])
        totals += np.stack([each, each * got[:, None]], axis=1)
        if scenario.drop and np.isfinite(gone).all():
            break
    with np.errstate(invalid="ignore"):
        plain, weighted = totals[:, 1] / totals[:, 0]  # an arm that was never heard has no average
    return {"regret": regret, "gone": gone, "plain": plain, "weighted": weighted}


def _weights(scenario: Scenario, sums: np.ndarray, chance: np.random.Generator, k: int) -> np.ndarray:
    n, s, ss = sums
    if scenario.policy == "uniform":
        return np.full(n.shape, 1.0 / k)
    if scenario.policy == "beta":  # fractional updates of Beta(1, 1), one draw a prompt
        draws = chance.beta(1.0 + s, 1.0 + n - s)
        return np.eye(k)[draws.argmax(1)]
    best = probability_best(*believe(n, s, ss, PRIOR.mean, PRIOR.mass))
    return (1.0 - scenario.holdout) * with_floor(best, scenario.floor) + scenario.holdout / k


def decay_of(half_life_prompts: float) -> float:
    return 2.0 ** (-1.0 / half_life_prompts)


def measure(rewards: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    n, k = rewards.shape
    scale = (n / 3609) ** 0.5
    rates = tuple(np.linspace(0.05, 0.20, k)[np.argsort(np.argsort(rewards.mean(0)))].tolist())
    scenarios = {
        "thompson": Scenario(),
        "uniform": Scenario("uniform"),
        "beta": Scenario("beta"),
        "stale_100": Scenario(refresh=100),
        "stale_500": Scenario(refresh=500),
        "seen_10_percent": Scenario(seen=0.1),
        "floor_2_holdout_5": Scenario(floor=0.02, holdout=0.05),
        "signal_rates_5_to_20_percent": Scenario(seen=rates, floor=0.02, holdout=0.05),
    }
    found: dict[str, Any] = {}
    for number, (name, scenario) in enumerate(scenarios.items()):
        began = time.perf_counter()
        result = replay(rewards, scenario, options.runs, options.seed + number)
        regret = result["regret"]
        found[name] = asdict(scenario) | {
            "mean_regret": round(float(regret.mean()), 2),
            "standard_error": round(float(regret.std(ddof=1) / len(regret) ** 0.5), 2),
            "p95_regret": round(float(np.quantile(regret, 0.95)), 2),
            "seconds": round(time.perf_counter() - began, 1),
        }
        if "rates" in name:
            for estimate in ("weighted", "plain"):
                off = result[estimate] - rewards.mean(0)
                found[name][f"bias_{estimate}"] = [round(float(b), 4) for b in np.nanmean(off, axis=0)]
                errors = np.nanstd(off, axis=0) / np.sqrt((~np.isnan(off)).sum(0))
                found[name][f"bias_{estimate}_se"] = [round(float(e), 4) for e in errors]
            found[name]["rates"] = [round(r, 3) for r in rates]
    found["drop"] = drops(rewards, options, found["thompson"]["mean_regret"])
    return {
        "data": {"prompts": n, "arms": k, "means": [round(float(m), 4) for m in rewards.mean(0)], "runs": options.runs},
        "bars": bars(found, scale),
        "scenarios": found,
    }


def drops(rewards: np.ndarray, options: argparse.Namespace, regret: float) -> list[dict[str, Any]]:
    """For each half-life: how soon a worse leader is left, and what forgetting costs when nothing drifts."""
    rows = []
    for half_life in options.half_lives:
        decay = decay_of(half_life)
        still = replay(rewards, Scenario(decay=decay), options.runs, options.seed)["regret"].mean()
        gone = replay(rewards, Scenario(decay=decay, drop=True), options.runs, options.seed)["gone"]
        rows.append(
            {
                "half_life_prompts": half_life,
                "half_life_hours": round(half_life / options.pace, 2),
                "median_prompts_until_left": float(np.median(gone)),
                "never_left": round(float(np.isinf(gone).mean()), 3),
                "mean_regret_without_drift": round(float(still), 2),
                "times_the_regret_without_forgetting": round(float(still) / regret, 2),
            }
        )
    return rows


def bars(found: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Each bar: its number here, and whether it is met. Regrets are scaled by √n from 3,609 prompts."""
    fresh = found["thompson"]
    quick = [d for d in found["drop"] if d["times_the_regret_without_forgetting"] <= 2.0]
    left = min((d["median_prompts_until_left"] for d in quick), default=float("inf"))
    bias = max(abs(b) for b in found["signal_rates_5_to_20_percent"]["bias_weighted"])
    rows = [
        ("mean regret", fresh["mean_regret"], 8.5 * scale),
        ("p95 regret", fresh["p95_regret"], 16 * scale),
        ("100 prompts stale, times fresh", found["stale_100"]["mean_regret"] / fresh["mean_regret"], 1.4),
        ("10 % of rewards seen", found["seen_10_percent"]["mean_regret"], 23 * scale),
        ("bias with unlike signal rates", bias, 0.01),
        ("prompts until a worse leader is left, at ≤ 2 × the regret", left, 430),
    ]
    return [{"what": w, "value": round(v, 3), "bar": round(b, 3), "met": v <= b} for w, v, b in rows]


def load(path: Path) -> np.ndarray:
    """Rewards [n, K] of the file; arms in the order of the first line. SystemExit names a bad line."""
    rows, names = [], None
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        try:
            arms = json.loads(line)["arms"]
            names = names or list(arms)
            rows.append([float(arms[name]["reward"]) for name in names])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f'{path}:{number}: not {{"arms": {{NAME: {{"reward": r}}}}}}: {error!r}') from None
    if not rows:
        raise SystemExit(f"{path}: no prompts")
    return np.array(rows)


def show(data: dict[str, Any]) -> None:
    d = data["data"]
    print(f"{d['prompts']} prompts, {d['arms']} arms with means {d['means']}, {d['runs']} orders\n")
    print(f"{'scenario':<32}{'regret':>8}{'± se':>7}{'p95':>8}")
    for name, row in data["scenarios"].items():
        if name != "drop":
            print(f"{name:<32}{row['mean_regret']:>8}{row['standard_error']:>7}{row['p95_regret']:>8}")
    print("\nthe leader drops by 0.18 after 1,500 prompts:")
    for row in data["scenarios"]["drop"]:
        print(
            f"  half-life {row['half_life_prompts']:>6.0f} prompts: left after {row['median_prompts_until_left']:>6.0f}"
            f" (median); without drift {row['times_the_regret_without_forgetting']} × the regret"
        )
    print()
    for row in data["bars"]:
        print(f"{'met ' if row['met'] else 'MISS'}  {row['what']}: {row['value']} (bar {row['bar']})")


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("data", type=Path, help="recorded rewards, JSON lines")
    about.add_argument("--runs", type=int, default=200, help="random orders (200)")
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--pace", type=float, default=100.0, help="prompts an hour, to say half-lives in hours (100)")
    about.add_argument(
        "--half-lives", type=lambda text: [float(h) for h in text.split(",")], default=[200, 300, 500, 1000]
    )
    about.add_argument("--quick", action="store_true", help="few orders: shows that it works")
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    if options.quick:
        options.runs, options.half_lives = min(options.runs, 8), options.half_lives[:1]
    data = measure(load(options.data), options)
    print(json.dumps(data, indent=2)) if options.json else show(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
