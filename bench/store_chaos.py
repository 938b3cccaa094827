"""Do rewards count once, whatever is killed? Workers, controllers and Redis die at random; the sums must not care.

    python bench/store_chaos.py                             # 8 workers, 100,000 contributions, about a minute
    python bench/store_chaos.py --contributions 5000 --json

Workers (processes) journal answered sessions and votes about them: shuffled, so that votes come before their answers;
many twice; many revised by a later vote. Two controllers (processes) compete for the lease, count the journal and
write the sums to a real Redis. All the while one of them all is killed (SIGKILL) at random and started again, a worker
going back a little so that it repeats itself; twice Redis itself is killed and comes back empty. When all is counted,
the sums in Redis are compared with those of a serial replay: one pass over the journal, the last vote of each session.

A takeover is the time from the death of the controller that holds the lease until the other one holds it.

Left out: a network that splits (fencing is tested in tests/test_controller_faults.py), Redis Cluster, replication.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from redis_server import RedisServer

from router.arms import Cell, Sums
from router.bandit import bucket_of
from router.controller import Controller
from router.plan import RoutePlan
from router.policy import Arm, Reward, Thompson
from router.store_redis import RedisStore
from telemetry.errors import StateError
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
ARMS = {arm: Arm(model=arm) for arm in ("one", "two", "three")}
PLAN = RoutePlan("chaos", ARMS, Thompson(refresh=0.05), Reward())
BEGAN = 1_700_000_000.0
BATCH = 250
REPEATED = 3
"""Batches that a worker which was killed sends again."""


def facts(worker: int, sessions: int) -> list[Fact]:
    """What a worker journals: the same at each call, out of order within a stretch, some of it twice."""
    chance = random.Random(worker)
    found: list[tuple[float, Fact]] = []
    for n in range(sessions):
        name, at = f"{worker}-{n}", BEGAN + chance.uniform(0.0, 86400.0)
        answered = Interaction(f"e{name}", at, name, "chaos", "t", name, Answerer(chance.choice(list(ARMS)), "m"))
        found.append((n + chance.uniform(0, 300), answered))
        for vote in range(chance.choice((1, 1, 2, 3))):
            said = Signal(f"v{name}-{vote}", at + vote, "rating", "t", response_id=name, value=chance.uniform(1.0, 5.0))
            found += [(n + chance.uniform(0, 600), said) for _ in range(chance.choice((1, 1, 1, 2)))]
    return [fact for _, fact in sorted(found, key=lambda row: row[0])]


def work(folder: Path, worker: int, sessions: int) -> None:
    """A worker's process. Its progress lies beside the journal; where it was killed it begins a little earlier."""
    journal, done = Journal(folder / "journal.db"), folder / f"worker-{worker}"
    mine = facts(worker, sessions)
    start = int(done.read_text()) if done.exists() else 0
    for place in range(max(0, start - REPEATED * BATCH), len(mine), BATCH):
        while True:
            with contextlib.suppress(StateError):  # locked by the others for long
                journal.append(mine[place : place + BATCH])
                break
        done.with_suffix(".new").write_text(str(place + BATCH))
        done.with_suffix(".new").replace(done)


def control(folder: Path, url: str, owner: str) -> None:
    """A controller's process."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    Controller([PLAN], Journal(folder / "journal.db"), RedisStore(url), owner).run(stopping)


@dataclass
class Crew:
    """The processes, by name, and how they were started."""

    commands: dict[str, list[str]]
    running: dict[str, subprocess.Popen[bytes]]

    def start(self, name: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), *self.commands[name]]
        self.running[name] = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)

    def kill(self, name: str) -> None:
        os.kill(self.running[name].pid, signal.SIGKILL)
        self.running[name].wait()

    def busy(self, kind: str) -> list[str]:
        return [name for name, process in self.running.items() if name.startswith(kind) and process.poll() is None]


def replayed(folder: Path) -> dict[Cell, Sums]:
    """The sums of one pass over the journal, in its order."""
    answers: dict[str, Interaction] = {}
    votes: dict[str, float] = {}
    journal, after = Journal(folder / "journal.db"), 0
    while page := journal.read(after, 5000):
        after = page[-1][0]
        for _, fact in page:
            if isinstance(fact, Interaction):
                answers[fact.request_id] = fact
            elif fact.response_id is not None and fact.value is not None:
                votes[fact.response_id] = fact.value
    journal.close()
    sums: dict[Cell, Sums] = {}
    for name, rating in votes.items():
        answer, reward = answers[name], 0.5 + 0.5 * (rating - 3.0) / 2.0
        cell = Cell("", answer.answerer.arm, bucket_of(answer.at))
        sums[cell] = sums.get(cell, Sums()).plus(Sums(1.0, reward, reward * reward))
    return sums


def difference(one: dict[Cell, Sums], other: dict[Cell, Sums]) -> float:
    """The largest, relative to the larger magnitude where that is more than 1."""
    worst = 0.0
    for cell in one.keys() | other.keys():
        a, b = one.get(cell, Sums()), other.get(cell, Sums())
        for x, y in ((a.n, b.n), (a.s, b.s), (a.ss, b.ss)):
            worst = max(worst, abs(x - y) / max(1.0, abs(x), abs(y)))
    return worst


def measure(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    each = -(-options.contributions // options.workers)
    kills: dict[str, int] = {"worker": 0, "controller": 0, "redis": 0}
    takeovers: list[float] = []
    with tempfile.TemporaryDirectory() as name, RedisServer() as server:
        folder = Path(name)
        Journal(folder / "journal.db").close()
        commands = {f"worker-{n}": ["work", name, str(n), str(each)] for n in range(options.workers)}
        commands |= {f"controller-{n}": ["control", name, server.url, f"controller-{n}"] for n in range(2)}
        crew, store = Crew(commands, {}), RedisStore(server.url, timeout=0.5)
        began = time.monotonic()
        for one in commands:
            crew.start(one)

        def holder() -> str | None:
            with contextlib.suppress(StateError):
                lease = store.holder()
                return lease.owner if lease and lease.expires > time.time() else None
            return None

        def counted() -> bool:
            journal = Journal(folder / "journal.db")
            try:
                return store.marked("journal") == store.marked("matured:600") == journal.last()
            except StateError:
                return False
            finally:
                journal.close()

        next_redis = [0.3, 0.7]
        while crew.busy("worker") or next_redis:
            time.sleep(chance.uniform(0.05, 0.3))
            progress = sum(int(p.read_text()) for p in folder.glob("worker-?")) / (each * options.workers * 2.9)
            if next_redis and progress > next_redis[0]:
                next_redis.pop(0)
                server.stop()
                server.start()
                kills["redis"] += 1
            elif chance.random() < 0.8 and (busy := crew.busy("worker")):
                crew.kill(victim := chance.choice(busy))
                crew.start(victim)
                kills["worker"] += 1
            elif (owner := holder()) in crew.running:
                crew.kill(owner)
                died = time.monotonic()
                while holder() in (owner, None) and time.monotonic() < died + 20.0:
                    time.sleep(0.02)
                takeovers.append(time.monotonic() - died)
                crew.start(owner)
                kills["controller"] += 1
        journaled = time.monotonic() - began
        deadline = time.monotonic() + 300.0
        while not counted() and time.monotonic() < deadline:
            time.sleep(0.1)
        seconds = time.monotonic() - began
        for one in crew.busy("controller"):
            crew.running[one].terminate()
            crew.running[one].wait()
        expected, found = replayed(folder), store.sums("chaos")
        journal = Journal(folder / "journal.db")
        counts = journal.counts()
        journal.close()
        store.close()
    sessions = sum(v.n for v in expected.values())
    return {
        "bars": [
            bar("sums equal a serial replay", difference(expected, found), 1e-9),
            bar("slowest takeover, s", max(takeovers, default=0.0), 5.0),
        ],
        "workers": options.workers,
        "contributions": sessions,
        "facts": counts,
        "counted": sum(v.n for v in found.values()),
        "kills": kills,
        "takeovers": [round(t, 2) for t in takeovers],
        "seconds": {"journaled": round(journaled, 1), "counted": round(seconds, 1)},
    }


def bar(what: str, value: float, most: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": most, "met": value <= most}


def main() -> int:
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return 0
    if sys.argv[1:2] == ["control"]:
        control(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
        return 0
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--workers", type=int, default=8)
    about.add_argument("--contributions", type=int, default=100_000)
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    data = measure(options)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        print({key: value for key, value in data.items() if key != "bars"})
        for one in data["bars"]:
            print(f"{'met ' if one['met'] else 'MISS'}  {one['what']}: {one['value']:.3g} (bar {one['bar']:g})")
    return 0 if all(one["met"] for one in data["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
