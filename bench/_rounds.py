"""A measuring: the upstream and the load on core 1, gateways on core 0, visited in turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _bars import median
from _gateways import KEY, Target, start
from _processes import NotInstalled, free_port, pin, stop, wait_for
from _traffic import CONNECTIONS, Load, Tally

HERE = Path(__file__).resolve().parent


class Generator:
    """The load generator's process, on core 1."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "_traffic.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, preexec_fn=pin(1))

    def ask(self, load: Load) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        self.process.stdin.flush()

    def done(self, within: float) -> bool:
        """Wait so long at most for the load that was asked for."""
        return bool(select.select([self.process.stdout], [], [], within)[0])

    def tally(self) -> Tally:
        assert self.process.stdout is not None
        return Tally(**json.loads(self.process.stdout.readline()))

    def run(self, load: Load) -> Tally:
        self.ask(load)
        return self.tally()


@dataclass(slots=True)
class Bench:
    """What all parts share. `targets`: the gateways that are compared, once a part needed them."""

    options: argparse.Namespace
    folder: Path
    upstream: int
    generator: Generator
    stack: contextlib.ExitStack
    targets: list[Target] | None = None
    not_installed: dict[str, str] = field(default_factory=dict)
    errors: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def run(self, load: Load) -> Tally:
        """Failures are counted, for whichever part it is."""
        tally = self.generator.run(load)
        self.failed(tally)
        return tally

    def failed(self, tally: Tally) -> None:
        self.errors += tally.errors
        self.reasons.update(tally.reasons)

    def gateways(self) -> list[Target]:
        """Started when first asked for, and warm."""
        if self.targets is None:
            self.targets = []
            for name in self.options.only:
                try:
                    target = start(name, self.upstream, self.folder, self.options)
                except NotInstalled as error:
                    self.not_installed[name] = str(error)
                    continue
                if target.process is not None:
                    self.stack.callback(stop, target.process)
                self.targets.append(target)
            for target in self.targets:
                for shape in self.options.shapes:
                    slow = target.name == "litellm" or self.options.quick
                    self.run(load_of(target, shape, 64 if slow else 2000 if shape == "unary" else 200, "w"))
        return self.targets

    def release(self) -> None:
        """Stop the gateways that are compared: what comes now has the cores alone."""
        for target in self.targets or ():
            if target.process is not None and target.process.poll() is None:
                stop(target.process)
        self.targets = None


def load_of(target: Target, shape: str, requests: int, salt: str, **more: Any) -> Load:
    return Load(target.port, target.model, shape, requests, salt=salt, key=KEY, routes=target.routes, **more)


@dataclass(slots=True)
class Cost:
    """One visit: CPU a request in µs, by role and in `total`, while all connections are busy."""

    us: dict[str, float]
    per_second: float


def visit(bench: Bench, target: Target, shape: str, requests: int, salt: str) -> Cost:
    """The controller's part is counted too: it is waited for."""
    before = target.costs()
    tally = bench.run(load_of(target, shape, max(CONNECTIONS, requests), salt))
    time.sleep(0.1)  # what the gateway does after the last byte belongs to it
    target.settle()
    us = {"worker": 0.0} if target.workers else {}
    for pid, seconds in target.costs().items():
        role = target.role(pid)
        us[role] = us.get(role, 0.0) + (seconds - before.get(pid, 0.0)) / max(1, tally.answered) * 1e6
    us["total"] = sum(us.values())
    return Cost(us, tally.answered / tally.seconds if tally.seconds else 0.0)


def summed(costs: list[Cost]) -> dict[str, Any]:
    """Medians over the rounds, and the rounds."""
    return {
        "cpu_us": {role: round(median([c.us.get(role, 0.0) for c in costs]), 1) for role in costs[0].us},
        "cpu_us_rounds": [round(c.us["total"], 1) for c in costs],
        "per_second": round(median([c.per_second for c in costs]), 1),
    }


@contextlib.contextmanager
def bench(options: argparse.Namespace, folder: Path) -> Any:
    """The upstream and the load generator, running; all that was started is stopped at the end."""
    with contextlib.ExitStack() as stack:
        port = free_port()
        upstream = subprocess.Popen([sys.executable, str(HERE / "_upstream.py"), str(port)], preexec_fn=pin(1))
        stack.callback(stop, upstream)
        wait_for(port, "the upstream")
        generator = Generator()
        stack.callback(stop, generator.process)
        yield Bench(options, folder, port, generator, stack)
