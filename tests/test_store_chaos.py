"""The chaos bench, small: it must pass on a sound store, and its comparison must be able to fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from store_chaos import Cell, Sums, difference

ROOT = Path(__file__).parents[1]


def test_sums_survive_random_kills() -> None:
    ran = subprocess.run(
        [sys.executable, "bench/store_chaos.py", "--workers", "3", "--contributions", "1500", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stdout, ran.stderr
    said = json.loads(ran.stdout)
    assert said["contributions"] == said["counted"] == 1500
    assert said["kills"]["redis"] >= 1
    assert said["kills"]["worker"] >= 1
    assert said["bars"][0]["met"], said


def test_the_comparison_sees_what_is_missing_and_what_is_twice() -> None:
    cell = Cell("", "one", 1)
    assert difference({cell: Sums(1, 0.5, 0.25)}, {}) == 1.0
    assert difference({cell: Sums(1, 0.5, 0.25)}, {cell: Sums(2, 1.0, 0.5)}) == 0.5
    assert difference({cell: Sums(1, 0.5, 0.25)}, {cell: Sums(1, 0.5, 0.25)}) == 0.0
