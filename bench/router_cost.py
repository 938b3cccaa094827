"""What routing costs: choosing an arm, recomputing weights, refreshing very many segments. No network, no disk.

    python bench/router_cost.py [--json] [--quick]

Choosing is what a gateway does for each session: hash it, look its segment's weights up, draw (`router.bandit.draw`).
Recomputing is what the controller does for a segment, from sums to weights; refreshing is all segments of a route from
its cells at once (`router.weights.shares`), as `Controller.step` does when something changed.

Left out: reading cells from a store; encoding a snapshot.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from router.arms import Cell, Snapshot, Sums
from router.bandit import draw, unit_hash
from router.policy import Arm, Thompson
from router.weights import shares

NOW = 1_800_000_000.0


def cells(segments: int, arms: int, seed: int = 0) -> dict[Cell, Sums]:
    """A route's evidence: a bucket of some hundred sessions for each segment and arm."""
    chance = np.random.default_rng(seed)
    found = {}
    for segment in range(segments):
        for arm in range(arms):
            n, mean = float(chance.integers(1, 300)), chance.uniform(0.4, 0.8)
            found[Cell(f"task-{segment}", f"arm-{arm}", int(NOW) - 7200)] = Sums(n, n * mean, n * (mean**2 + 0.04))
    return found


def timed(work: Callable[[int], object], times: int) -> dict[str, float]:
    """Microseconds of one call: median and 99th percentile."""
    taken = np.empty(times)
    for n in range(times):
        began = time.perf_counter_ns()
        work(n)
        taken[n] = time.perf_counter_ns() - began
    return {
        "median_us": round(float(np.median(taken)) / 1e3, 2),
        "p99_us": round(float(np.quantile(taken, 0.99)) / 1e3, 2),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    weights = {f"task-{n}": {"arm-0": 0.2, "arm-1": 0.5, "arm-2": 0.3} for n in range(1000)}
    snapshot = Snapshot("assistant", 1, NOW, "thompson", 0.05, weights | {"": weights["task-0"]})
    names = [(f"7:default/{n:024x}", f"task-{n % 1000}") for n in range(options.times)]
    found: dict[str, Any] = {
        "choose": timed(lambda n: draw(snapshot, unit_hash("assistant", names[n][0]), names[n][1]), options.times)
    }
    for arms in (3, 20):
        one = cells(1, arms)
        policy, listed = Thompson(floor=0.01), {f"arm-{n}": Arm(model="m") for n in range(arms)}
        found[f"recompute_{arms}_arms"] = timed(lambda _, a=(policy, listed, one): shares(*a, NOW), options.times // 20)
    many = cells(options.segments, 5)
    policy = Thompson(segment_by="task_type", max_segments=100_000)
    began = time.perf_counter()
    shares(policy, {f"arm-{n}": Arm(model="m") for n in range(5)}, many, NOW)
    found["refresh"] = {"segments": options.segments, "arms": 5, "seconds": round(time.perf_counter() - began, 3)}
    found["bars"] = [
        {"what": what, "value": value, "bar": bar, "met": value <= bar}
        for what, value, bar in (
            ("choose, p99 µs", found["choose"]["p99_us"], 20.0),
            ("recompute 3 arms, median µs", found["recompute_3_arms"]["median_us"], 150.0),
            ("recompute 20 arms, median µs", found["recompute_20_arms"]["median_us"], 1000.0),
            (f"refresh {options.segments} segments × 5 arms, s", found["refresh"]["seconds"], 2.0),
        )
    ]
    return found


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--times", type=int, default=20_000, help="calls of what is quick (20,000)")
    about.add_argument("--segments", type=int, default=10_000, help="segments to refresh (10,000)")
    about.add_argument("--quick", action="store_true", help="shows that it works, measures little")
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    if options.quick:
        options.times, options.segments = 400, 50
    data = measure(options)
    if options.json:
        print(json.dumps(data, indent=2))
        return 0
    for bar in data["bars"]:
        print(f"{'met ' if bar['met'] else 'MISS'}  {bar['what']}: {bar['value']} (bar {bar['bar']:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
