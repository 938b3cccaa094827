"""Can training be killed at any moment? Runs that are, and gone on with, against one that was not.

    python bench/learner_kills.py [--kills 20] [--pairs 400] [--seed 0] [--json]

Each trial starts the same run anew, sends it SIGKILL at a random moment between its start and its end (also while a
checkpoint or the artifact is being written), runs the same spec again in another process, and compares the weights.
Bars: the largest difference is at most 1e-6; no trial loses more than one checkpoint's interval of steps; no half of
an artifact is ever seen.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from msgspec.structs import replace
from preferences import TINY, dataset, pairs, spec

from learner.lint import WEIGHTS, read_safetensors
from learner.runners import whole
from learner.spec import TrainSpec, save
from understudy.demo.tiny_model import build

ROOT = Path(__file__).resolve().parents[1]
EVERY = 10
SAME = 1e-6


def trained(job: TrainSpec, kill_after: float | None = None) -> tuple[list[dict[str, Any]], float]:
    """The events of a run, and how long it took from the first; it is killed so many seconds after that."""
    save(job, Path(f"{job.output}.json"))
    command = [sys.executable, "-m", "learner.train", f"{job.output}.json", "--events"]
    events: list[dict[str, Any]] = []
    began = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        killer: threading.Timer | None = None
        for line in child.stdout or ():
            events.append(json.loads(line))
            if len(events) == 1:
                began = time.monotonic()
                if kill_after is not None:
                    killer = threading.Timer(kill_after, child.kill)
                    killer.start()
        said = child.stderr.read() if child.stderr else ""
    if killer is not None:
        killer.cancel()
    if kill_after is None and child.returncode:
        raise SystemExit(f"training failed:\n{said}")
    return events, time.monotonic() - began


def difference(one: str, other: str) -> float:
    """The largest between two adapters' weights."""
    import numpy as np

    pairs_of = zip(*(read_safetensors(Path(folder) / "adapter" / WEIGHTS) for folder in (one, other)), strict=True)
    return max(float(np.abs(a.bits.view("<f4") - b.bits.view("<f4")).max()) for a, b in pairs_of)


def last(events: list[dict[str, Any]], kind: str) -> int:
    return max((event["step"] for event in events if event["event"] == kind), default=0)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    base = build(ROOT / ".cache/demo", lambda _: None).base
    trials = []
    with tempfile.TemporaryDirectory() as made:
        data = dataset(Path(made) / "data", pairs(options.pairs))
        hyper = replace(TINY, evaluate_every=EVERY, dropout=0.05, patience=1000)
        straight = spec(base, data, Path(made) / "straight", hyper, threads=options.threads)
        events, seconds = trained(straight)
        steps = last(events, "step")
        for number in range(options.kills):
            job = replace(straight, output=str(Path(made) / f"run-{number}"))
            killed, _ = trained(job, kill_after=chance.uniform(0, seconds))
            halves = Path(job.output).exists() and whole(job.output) is None
            again, _ = trained(job)
            resumed = last(again, "start") if any(event["event"] == "start" for event in again) else steps
            reached = max(last(killed, "step"), last(killed, "look"))
            trials.append(
                {
                    "reached": reached,
                    "resumed_from": resumed,
                    "lost": max(0, reached - resumed),
                    "difference": difference(straight.output, job.output),
                    "half_seen": halves,
                }
            )
            if not options.json:
                print(f"killed at step {reached} of {steps}, went on from {resumed}", file=sys.stderr)
    worst, lost = max(one["difference"] for one in trials), max(one["lost"] for one in trials)
    return {
        "kills": options.kills,
        "steps": steps,
        "interval": EVERY,
        "seconds_undisturbed": round(seconds, 2),
        "trials": trials,
        "bars": [
            {"what": "largest difference of a weight", "value": worst, "bar": SAME, "met": worst <= SAME},
            {"what": "steps lost, at most", "value": lost, "bar": EVERY, "met": lost <= EVERY},
            {"what": "half artifacts seen", "value": sum(one["half_seen"] for one in trials), "bar": 0}
            | {"met": not any(one["half_seen"] for one in trials)},
        ],
    }


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--kills", type=int, default=20)
    about.add_argument("--pairs", type=int, default=400, help="of which three in four are trained on (400)")
    about.add_argument("--threads", type=int, default=2)
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['kills']} kills of a run of {found['steps']} steps, a checkpoint every {found['interval']}")
    for bar in found["bars"]:
        print(f"{'met ' if bar['met'] else 'MISSED '}{bar['what']}: {bar['value']} (bar {bar['bar']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
