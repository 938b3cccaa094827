"""Do segments learned from prompts pay? Mean reward by policy on recorded rewards, and what telling them apart costs.

    python bench/segments.py DATA.jsonl [--json]

DATA has a prompt a line: {"prompt": text, "arms": {NAME: {"reward": r}, …}}, and may name where it comes from
("source"). Half of the prompts teach the segments (`router.segments.fit`; no reward is looked at), the other half is
routed `--passes` times over by the controller's own weights (`router.weights.shares`), computed anew every 25 prompts;
each prompt stands for a session and shows the reward of the drawn arm only. Compared: no segments, the clusters, the
known sources, and two that know all rewards: the best single arm, and the best arm of each cluster.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from router.arms import Cell, Sums
from router.policy import Arm, Thompson
from router.segments import Segmenter, assign, fit
from router.weights import shares

REFRESH = 25
POLICIES = ("none", "clusters", "sources")


def load(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rewards = {name: float(arm["reward"]) for name, arm in row["arms"].items()}
                rows.append({"prompt": str(row["prompt"]), "source": str(row.get("source", "")), "rewards": rewards})
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{path}:{number}: no prompt with rewards: {error!r}") from None
    return rows


def routed(rewards: np.ndarray, names: Sequence[str], arms: Sequence[str], passes: int, seed: int) -> float:
    """Mean reward of Thompson sampling over `passes` random orders of the prompts [N, K] in their segments `names`."""
    chance = np.random.default_rng(seed)
    policy = Thompson(kind="thompson", segment_by="prompt", floor=0.0, holdout=0.0)
    served = {name: Arm(model=name) for name in arms}
    cells: dict[Cell, Sums] = {}
    weights: Mapping[str, Mapping[str, float]] = {}
    total, seen = 0.0, 0
    for order in (chance.permutation(len(rewards)) for _ in range(passes)):
        for i in order:
            if seen % REFRESH == 0:
                weights = shares(policy, served, cells, 0.0)
            share = weights.get(names[i], weights[""])
            arm = int(chance.choice(len(arms), p=[share[name] for name in arms]))
            r = float(rewards[i, arm])
            cell = Cell(names[i], arms[arm], 0)
            cells[cell] = cells.get(cell, Sums()).plus(Sums(1.0, r, r * r))
            total, seen = total + r, seen + 1
    return total / seen


def measure(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    arms = list(rows[0]["rewards"])
    rewards = np.array([[row["rewards"][arm] for arm in arms] for row in rows])
    texts = [row["prompt"] for row in rows]
    found: dict[str, list[float]] = {name: [] for name in (*POLICIES, "best_single_arm", "best_arm_of_each_cluster")}
    sizes, fitting, telling = [], [], []
    for run in range(options.runs):
        order = np.random.default_rng(options.seed + run).permutation(len(rows))
        taught, used = order[: len(rows) // 2], order[len(rows) // 2 :]
        began = time.perf_counter()
        segmenter = fit([texts[i] for i in taught], 0.0, run)
        fitting.append(time.perf_counter() - began)
        if not isinstance(segmenter, Segmenter):
            raise SystemExit(f"no segments: {segmenter}")
        began = time.perf_counter()
        clusters = [assign(segmenter, texts[i]) for i in used]
        telling.append((time.perf_counter() - began) / len(used))
        sizes.append(len(segmenter.names))
        kinds = {"none": [""] * len(used), "clusters": clusters, "sources": [rows[i]["source"] for i in used]}
        for name, segments in kinds.items():
            found[name].append(routed(rewards[used], segments, arms, options.passes, run))
        found["best_single_arm"].append(float(rewards[used].mean(0).max()))
        places = [np.array([c == name for c in clusters]) for name in set(clusters)]
        best = sum(rewards[used][place].sum(0).max() for place in places) / len(used)
        found["best_arm_of_each_cluster"].append(float(best))
    gains = np.array(found["clusters"]) - np.array(found["none"])
    return {
        "prompts": len(rows),
        "arms": len(arms),
        "runs": options.runs,
        "sessions_a_run": options.passes * (len(rows) - len(rows) // 2),
        "clusters": {"median": float(np.median(sizes)), "least": min(sizes), "most": max(sizes)},
        "mean_reward": {name: round(float(np.mean(values)), 4) for name, values in found.items()},
        "clusters_gain": round(float(gains.mean()), 4),
        "clusters_gain_se": round(float(gains.std(ddof=1) / len(gains) ** 0.5), 4),
        "fit_seconds": round(float(np.median(fitting)), 2),
        "assign_us": round(float(np.median(telling)) * 1e6, 1),
    }


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("data", type=Path, help="prompts with recorded rewards, JSON lines")
    about.add_argument("--runs", type=int, default=20, help="random halves (20)")
    about.add_argument("--passes", type=int, default=4, help="times that the routed half is served (4)")
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--quick", action="store_true", help="two halves: shows that it works")
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    options.runs = 2 if options.quick else options.runs
    data = measure(load(options.data), options)
    if options.json:
        print(json.dumps(data, indent=2))
        return 0
    sessions, clusters = data["sessions_a_run"], data["clusters"]["median"]
    print(f"{data['prompts']} prompts, {data['arms']} arms; {sessions} sessions in each of {data['runs']} runs")
    for name, value in data["mean_reward"].items():
        print(f"  {name.replace('_', ' '):<28}{value:.4f}")
    print(f"clusters earn {data['clusters_gain']:+.4f} ± {data['clusters_gain_se']:.4f} (standard error) over none")
    print(f"{clusters:g} clusters (median), {data['fit_seconds']} s a fit, {data['assign_us']} µs a prompt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
