"""Does off-policy evaluation tell the truth? Coverage of its intervals and errors of its estimators, on real rewards.

    python bench/ope_coverage.py DATA.jsonl              # 1,000 logs of each logging policy, some ten seconds
    python bench/ope_coverage.py DATA.jsonl --quick --json

DATA has a prompt a line with the reward in [0, 1] of every arm: {"source": S, "arms": {NAME: {"reward": r}, …}}. A log
is a bootstrap of the prompts (a prompt stands for a session) on which a policy draws an arm with a known propensity
and sees only that arm's reward. What each target policy would have earned is estimated from the log by `router.ope`,
the functions behind `understudy ope`, and compared with the truth: its mean over all prompts and arms of DATA.

Logging policies: `adaptive`, the router's own Thompson weights, renewed every 50 sessions from what the log showed so
far, so that one decision's propensity depends on earlier rewards; and `skewed`, the arms by falling mean at 80 %,
15 %, 5 %, … Both keep the floor (2 %) and the holdout (5 %) of the default policy. Targets: each arm alone, even
shares, and the arm that is best for each source ("by_source", a policy that looks at the session). DR's reward model
is that of `understudy ope`, per source and arm, cross-fitted. Logs whose effective sample size is below 100 are
refused, as the command refuses them; they are counted, and left out of coverage and errors. Beware of an adaptive log's
target most of whose logs are refused: the policy drew that arm often where it happened to look good, so the logs that
are answered flatter it, and no interval made from one of them alone can know.

Beside each rate and error stands its Monte Carlo standard error. Left out: rewards that come late or for some
sessions only, drift, more arms than DATA has, features (`predict` takes them; the command has none).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from router import ope
from router.bandit import believe, probability_best, with_floor
from router.policy import Thompson

POLICY = Thompson()
REFRESH, SIDE_BY_SIDE = 50, 50
ESTIMATORS = ("ips", "snips", "dr", "switch_dr")


def served(weights: np.ndarray) -> np.ndarray:
    """What sessions draw from, given a policy's weights [..., K]: floor and holdout added."""
    return (1 - POLICY.holdout) * with_floor(weights, POLICY.floor) + POLICY.holdout / weights.shape[-1]


def skewed(means: np.ndarray) -> np.ndarray:
    """Shares by falling mean: 0.80, 0.15, 0.05 of three arms."""
    shares = np.array([16.0, 3.0, *[1.0] * (len(means) - 2)])[: len(means)]
    return served((shares / shares.sum())[np.argsort(np.argsort(-means))])


def logs(
    rewards: np.ndarray, how: str, runs: int, n: int, chance: np.random.Generator
) -> Iterator[tuple[np.ndarray, ...]]:
    """Logs of `n` sessions, SIDE_BY_SIDE at a time as arrays: for each its prompts, arms and propensities."""
    k = rewards.shape[1]
    for start in range(0, runs, SIDE_BY_SIDE):
        size = min(SIDE_BY_SIDE, runs - start)
        prompts = chance.integers(len(rewards), size=(size, n))
        arms, propensities = np.empty((size, n), int), np.empty((size, n))
        sums = np.zeros((3, size, k))
        for t in range(0, n, REFRESH):
            now = slice(t, min(t + REFRESH, n))
            if how == "skewed":
                weights = np.broadcast_to(skewed(rewards.mean(0)), (size, k))
            else:
                weights = served(probability_best(*believe(*sums, POLICY.prior.mean, POLICY.prior.mass)))
            u = chance.random(arms[:, now].shape)
            arms[:, now] = (u[..., None] > np.cumsum(weights, axis=1)[:, None, :-1]).sum(-1)
            propensities[:, now] = np.take_along_axis(weights, arms[:, now], axis=1)
            one = arms[:, now, None] == np.arange(k)
            got = rewards[prompts[:, now], arms[:, now]][..., None]
            sums += np.stack([one.sum(1), (one * got).sum(1), (one * got**2).sum(1)])
        yield from zip(prompts, arms, propensities, strict=True)


def targets(rewards: np.ndarray, names: list[str], sources: np.ndarray) -> dict[str, np.ndarray]:
    """The policies to evaluate, as probabilities [prompts, K]."""
    count, k = rewards.shape
    found = {f"only {name}": np.tile(row, (count, 1)) for name, row in zip(names, np.eye(k), strict=True)}
    found["even"] = np.full((count, k), 1 / k)
    best = {source: rewards[sources == source].mean(0).argmax() for source in np.unique(sources)}
    found["by_source"] = np.eye(k)[[best[source] for source in sources]]
    return found


def measure(rewards: np.ndarray, names: list[str], sources: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    n, k = options.sessions or len(rewards), rewards.shape[1]
    policies = targets(rewards, names, sources)
    truth = {name: float((pi * rewards).sum(1).mean()) for name, pi in policies.items()}
    folds = ope.folds_of([str(i) for i in range(n)])
    rows = []
    for seed, how in enumerate(("adaptive", "skewed")):
        chance = np.random.default_rng([options.seed, seed])
        found: dict[str, list[ope.Evaluation]] = {name: [] for name in policies}
        for prompts, arms, propensities in logs(rewards, how, options.runs, n, chance):
            got = rewards[prompts, arms]
            q = ope.predict(arms, got, folds, k, sources[prompts])
            for name, pi in policies.items():
                found[name].append(ope.evaluate(arms, propensities, got, pi[prompts], q))
        rows += [summary(how, name, truth[name], evaluations) for name, evaluations in found.items()]
    return {
        "data": {"prompts": len(rewards), "arms": names, "sessions_a_log": n, "runs": options.runs},
        "bars": bars(rows),
        "pairs": rows,
    }


def summary(how: str, target: str, truth: float, evaluations: list[ope.Evaluation]) -> dict[str, Any]:
    """How far off the estimators were on those logs that were not refused."""
    kept = [one for one in evaluations if one.enough]
    row: dict[str, Any] = {
        "logged_by": how,
        "target": target,
        "truth": round(truth, 4),
        "median_ess": round(float(np.median([one.ess for one in evaluations])), 1),
        "answered": len(kept),
        "refused": len(evaluations) - len(kept),
    }
    for name in ESTIMATORS if kept else ():
        estimates = [getattr(one, name) for one in kept]
        errors = np.array([estimate.value - truth for estimate in estimates])
        covered = np.array([low <= truth <= high for low, high in (estimate.interval for estimate in estimates)])
        squares = errors**2
        rmse = float(np.sqrt(squares.mean()))
        row[name] = {
            "rmse": round(rmse, 5),
            "rmse_se": round(float(squares.std() / len(kept) ** 0.5 / 2 / max(rmse, 1e-12)), 5),
            "bias": round(float(errors.mean()), 5),
            "bias_se": round(float(errors.std() / len(kept) ** 0.5), 5),
            "coverage": round(float(covered.mean()), 4),
            "coverage_se": round(float((covered.mean() * (1 - covered.mean()) / len(kept)) ** 0.5), 4),
            "mean_width": round(float(np.mean([np.subtract(*estimate.interval[::-1]) for estimate in estimates])), 4),
        }
    return row


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The two bars, for each logging policy over all of its targets and at its worst target."""
    found = []
    for how in dict.fromkeys(row["logged_by"] for row in rows):
        here = [row for row in rows if row["logged_by"] == how and row["answered"]]
        if not here:
            continue
        counts = np.array([row["answered"] for row in here])
        coverage = np.array([row["dr"]["coverage"] for row in here])
        se = max(row["dr"]["coverage_se"] for row in here)  # one log serves all targets: not independent
        ratio = [row["dr"]["rmse"] / max(row["ips"]["rmse"], 1e-12) for row in here]
        found += [
            bar(
                f"{how}: coverage of DR's 95 % interval, all targets", float(counts @ coverage / counts.sum()), se, 0.94
            ),
            bar(
                f"{how}: the same, worst target",
                float(coverage.min()),
                here[coverage.argmin()]["dr"]["coverage_se"],
                0.94,
            ),
            bar(f"{how}: RMSE of DR over that of IPS, worst target", max(ratio), None, 1.0, below=True),
        ]
    return found


def bar(what: str, value: float, se: float | None, wanted: float, below: bool = False) -> dict[str, Any]:
    met = value <= wanted if below else value >= wanted
    return {"what": what, "value": round(value, 4), "se": se, "bar": wanted, "met": met}


def load(path: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rewards [n, K], the arms in the first line's order, and each prompt's source. SystemExit names a bad line."""
    rows, sources, names = [], [], []
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        try:
            row = json.loads(line)
            names = names or list(row["arms"])
            rows.append([float(row["arms"][name]["reward"]) for name in names])
            sources.append(str(row.get("source", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f'{path}:{number}: not {{"arms": {{NAME: {{"reward": r}}}}}}: {error!r}') from None
    if not rows or len(names) < 2:
        raise SystemExit(f"{path}: no prompts with two arms")
    return np.array(rows), names, np.array(sources)


def show(data: dict[str, Any]) -> None:
    d = data["data"]
    print(f"{d['prompts']} prompts, {d['sessions_a_log']} sessions a log, {d['runs']} logs of each logging policy\n")
    print(
        f"{'logged by':<10}{'target':<36}{'truth':>7}{'ESS':>7}{'refused':>9}  {'coverage of DR':<16}RMSE: "
        + "  ".join(ESTIMATORS)
    )
    for row in data["pairs"]:
        line = f"{row['logged_by']:<10}{row['target']:<36}{row['truth']:>7.3f}{row['median_ess']:>7.0f}"
        line += f"{row['refused']:>9}  "
        if row["answered"]:
            line += f"{row['dr']['coverage']:.3f} ± {row['dr']['coverage_se']:.3f}   "
            line += "  ".join(f"{row[name]['rmse']:.4f} ± {row[name]['rmse_se']:.4f}" for name in ESTIMATORS)
        print(line)
    print()
    for one in data["bars"]:
        se = "" if one["se"] is None else f" ± {one['se']}"
        print(f"{'met ' if one['met'] else 'MISS'}  {one['what']}: {one['value']}{se} (bar {one['bar']})")
    print(f"{data['seconds']} s")


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("data", type=Path, help="recorded rewards, JSON lines")
    about.add_argument("--runs", type=int, default=1000, help="logs of each logging policy (1000)")
    about.add_argument("--sessions", type=int, help="sessions a log (as many as DATA has prompts)")
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--quick", action="store_true", help="few logs: shows that it works")
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    if options.quick:
        options.runs = min(options.runs, 20)
    began = time.perf_counter()
    data = measure(*load(options.data), options)
    data["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(data, indent=2)) if options.json else show(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
