"""What a gateway costs: CPU per request and added latency, ours and others', in one run on one machine.

    python bench/gateway_load.py                       # everything that is installed, about three minutes
    python bench/gateway_load.py --quick --json        # a few seconds; the numbers mean little
    python bench/gateway_load.py --litellm-python /tmp/litellm-venv/bin/python

Three processes: an upstream written by hand that answers as vLLM does (asyncio protocols over uvloop), a load
generator (the same, 32 keep-alive connections), and the gateway. The gateway has core 0 for itself, the other two
share core 1; on one core they would take each other's time. All gateways are started, then each round visits every
one of them in turn (A B C, A B C, …), so that a slow spell of the machine falls on all.

CPU is user + system time of the gateway's whole process tree, from /proc/<pid>/stat (10 ms ticks: with 10,000
requests one tick is 1 µs a request). Understudy is measured as it is used: a Thompson bandit over two arms,
journal in SQLite with the text of prompts and answers, metrics, one worker, one controller, one supervisor. Its
controller has core 0 too, and its pauses are part of the latency. While CPU is counted all 32 connections are busy
(closed loop); latency is measured at a fixed rate (open loop), from the time a request was due, so that a stall is
felt by all that had to wait for it.

Left out: TLS, more than one worker, other bodies than these (about 0.4 KB in, 1 KB out; 64 chunks), other hosts.
Every conversation is new to the gateway, as on a busy day; `--turns` is not there: recalls are not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _gateways import GATEWAYS, KEY, NotInstalled, Target, free_port, installed, memory, pin, start, stop, tree
from _traffic import CONNECTIONS, Load, Tally

TRAFFIC = Path(__file__).with_name("_traffic.py")
SHAPES = ("unary", "stream_at_once", "stream_spaced")


class Generator:
    """The load generator's process, on core 1."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TRAFFIC), "load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=pin(1),
        )

    def run(self, load: Load) -> Tally:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(load)) + "\n")
        self.process.stdin.flush()
        return Tally(**json.loads(self.process.stdout.readline()))


@dataclass(slots=True)
class Sample:
    """One round of one shape before one gateway."""

    cpu_us: dict[str, float]
    """CPU a request, µs, by role, and `total`."""
    per_second: float
    p50_ms: float
    p99_ms: float
    errors: int
    reasons: dict[str, int]


def measure(target: Target, shape: str, generator: Generator, options: argparse.Namespace, salt: str) -> Sample:
    """CPU over a closed loop, then latency over an open one."""
    count = options.requests if shape == "unary" else options.streams
    count = max(CONNECTIONS, count // 20) if target.name == "litellm" else count  # it needs 100 times as long
    load = Load(target.port, target.model, shape, count, salt=f"{salt}c", key=KEY)
    before = target.costs()
    closed = generator.run(load)
    time.sleep(0.1)  # what the gateway does after the last byte belongs to it
    after = target.costs()
    spent: dict[str, float] = {}
    for pid, seconds in after.items():
        role = target.role(pid)
        spent[role] = spent.get(role, 0.0) + seconds - before.get(pid, 0.0)
    spent["total"] = sum(spent.values())
    answered = max(1, closed.answered)
    rate = options.rate if shape == "unary" else options.rate / 8
    timed = max(20, int(rate * options.seconds))
    paced = generator.run(Load(target.port, target.model, shape, timed, rate, f"{salt}o", KEY))
    reasons = dict(closed.reasons)
    for reason, times in paced.reasons.items():
        reasons[reason] = reasons.get(reason, 0) + times
    return Sample(
        {role: seconds / answered * 1e6 for role, seconds in spent.items()},
        closed.answered / closed.seconds if closed.seconds else 0.0,
        paced.p50 * 1e3,
        paced.p99 * 1e3,
        closed.errors + paced.errors,
        reasons,
    )


def warm_up(target: Target, generator: Generator, options: argparse.Namespace) -> None:
    for shape in options.shapes:
        count = 64 if target.name == "litellm" or options.quick else 2000 if shape == "unary" else 200
        generator.run(Load(target.port, target.model, shape, count, salt="w", key=KEY))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start everything, measure in turns, stop everything; the report as data."""
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-load-")))
        port = free_port()
        command = [sys.executable, str(TRAFFIC), "upstream", str(port)]
        upstream = subprocess.Popen(command, preexec_fn=pin(1))
        stack.callback(stop, upstream)
        _wait_for(port)
        generator = Generator()
        stack.callback(stop, generator.process)
        targets: list[Target] = []
        for name in options.only:
            try:
                target = start(name, port, folder, options)
            except NotInstalled as error:
                absent[name] = str(error)
                continue
            if target.process is not None:
                stack.callback(stop, target.process)
            targets.append(target)
        for target in targets:
            warm_up(target, generator, options)
        samples: dict[tuple[str, str], list[Sample]] = {}
        load_before = os.getloadavg()[0]
        for n in range(options.rounds):
            for shape in options.shapes:
                for target in targets:
                    sample = measure(target, shape, generator, options, str(n))
                    samples.setdefault((target.name, shape), []).append(sample)
        memories = {t.name: sum(map(memory, tree(t.process.pid))) // 1024 for t in targets if t.process is not None}
    return report(options, targets, absent, samples, memories, load_before)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("the upstream did not start")


# Telling.


def report(
    options: argparse.Namespace,
    targets: list[Target],
    absent: dict[str, str],
    samples: dict[tuple[str, str], list[Sample]],
    memories: dict[str, int],
    load_before: float,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for target in targets:
        shapes: dict[str, Any] = {}
        for shape in options.shapes:
            rounds = samples[target.name, shape]
            base = samples.get(("direct", shape))
            shapes[shape] = {
                "cpu_us": {role: round(median([s.cpu_us[role] for s in rounds]), 1) for role in rounds[0].cpu_us},
                "cpu_us_rounds": [round(s.cpu_us["total"], 1) for s in rounds],
                "per_second": round(median([s.per_second for s in rounds]), 1),
                "p50_ms": round(median([s.p50_ms for s in rounds]), 3),
                "p99_ms": round(median([s.p99_ms for s in rounds]), 3),
                "added_p50_ms": _added(rounds, base, "p50_ms"),
                "added_p99_ms": _added(rounds, base, "p99_ms"),
                "errors": sum(s.errors for s in rounds),
                "reasons": {reason: times for s in rounds for reason, times in s.reasons.items()},
            }
        results[target.name] = {"version": target.version, "memory_mb": memories.get(target.name), "shapes": shapes}
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(load_before),
        "options": {k: getattr(options, k) for k in ("requests", "streams", "rounds", "rate", "seconds", "otel")},
        "results": results,
        "ratios": ratios(results, options.shapes),
        "not_installed": absent,
        "errors": sum(shape["errors"] for one in results.values() for shape in one["shapes"].values()),
    }


def median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def _added(rounds: list[Sample], base: list[Sample] | None, name: str) -> float | None:
    """The median over rounds of what a gateway added to the same round's direct latency."""
    if base is None or rounds is base:
        return None
    return round(median([getattr(a, name) - getattr(b, name) for a, b in zip(rounds, base, strict=True)]), 3)


def ratios(results: dict[str, Any], shapes: list[str]) -> dict[str, dict[str, float]]:
    """How many times our total CPU the others take."""
    if "understudy" not in results:
        return {}
    found: dict[str, dict[str, float]] = {}
    for name, one in results.items():
        if name in ("direct", "understudy"):
            continue
        for shape in shapes:
            ours = results["understudy"]["shapes"][shape]["cpu_us"]["total"]
            theirs = one["shapes"][shape]["cpu_us"]["total"]
            if ours:
                found.setdefault(name, {})[shape] = round(theirs / ours, 2)
    return found


def machine(load_before: float) -> dict[str, Any]:
    model = "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    packages = ("uvicorn", "uvloop", "httptools", "starlette", "msgspec")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": round(load_before, 2),
        "packages": {name: installed(name) for name in packages},
    }


def show(data: dict[str, Any]) -> None:
    m = data["machine"]
    print(f"$ {data['command']}")
    print(f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, Python {m['python']}, load {m['load_average_before']}")
    print(", ".join(f"{name} {version}" for name, version in m["packages"].items()), "\n")
    titles = ("gateway", "shape", "worker µs", "total µs", "+p50 ms", "+p99 ms", "req/s", "errors")
    print("{:<13}{:<16}{:>10}{:>10}{:>10}{:>10}{:>9}{:>8}".format(*titles))
    for name, one in data["results"].items():
        for shape, r in one["shapes"].items():
            added = [r["added_p50_ms"], r["added_p99_ms"]] if name != "direct" else [r["p50_ms"], r["p99_ms"]]
            cells = [r["cpu_us"].get("worker"), r["cpu_us"]["total"] if name != "direct" else None, *added]
            shown = [
                "–" if cell is None else f"{cell:,.2f}" if i > 1 else f"{cell:,.0f}" for i, cell in enumerate(cells)
            ]
            print(
                f"{name:<13}{shape:<16}"
                + "".join(f"{s:>10}" for s in shown)
                + f"{r['per_second']:>9,.0f}{r['errors']:>8}"
            )
    print("\nCPU µs a request, median of rounds; latency added over direct (direct: its own), open loop.")
    for name, one in data["results"].items():
        if one["version"]:
            print(f"{name} {one['version']}, {one['memory_mb']} MB")
    for name, by_shape in data["ratios"].items():
        print(f"{name} takes {', '.join(f'{times}× ({shape})' for shape, times in by_shape.items())} our CPU")
    for name, why in data["not_installed"].items():
        print(f"{name}: not installed: {why}")


def main() -> int:
    options = parse()
    data = run(options)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        show(data)
    return 1 if data["errors"] else 0


def parse() -> argparse.Namespace:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--json", action="store_true", help="print JSON")
    about.add_argument("--quick", action="store_true", help="a few seconds: shows that it works, measures little")
    about.add_argument("--requests", type=int, help="unary requests a round (10,000; at most 1,000,000)")
    about.add_argument("--streams", type=int, help="streams of a shape a round (1,000)")
    about.add_argument("--rounds", type=int, help="how often each gateway is visited (5; at most 50)")
    about.add_argument(
        "--rate", type=float, default=400.0, help="unary requests/s for latency (400); streams an eighth"
    )
    about.add_argument("--only", default=",".join(GATEWAYS), help=f"some of {','.join(GATEWAYS)}")
    about.add_argument("--shapes", default=",".join(SHAPES), help=f"some of {','.join(SHAPES)}")
    about.add_argument("--otel", action="store_true", help="understudy also exports spans (to the upstream)")
    about.add_argument("--litellm-python", default=sys.executable, help="a Python that has litellm[proxy]")
    options = about.parse_args()
    options.requests = min(options.requests or (300 if options.quick else 10_000), 1_000_000)
    options.streams = min(options.streams or (40 if options.quick else 1_000), 100_000)
    options.rounds = min(options.rounds or (1 if options.quick else 5), 50)
    options.seconds = 0.3 if options.quick else 3.0
    for name, known in (("only", GATEWAYS), ("shapes", SHAPES)):
        chosen = [one.strip() for one in getattr(options, name).split(",") if one.strip()]
        if wrong := [one for one in chosen if one not in known]:
            about.error(f"--{name}: {wrong[0]} is none of {', '.join(known)}")
        setattr(options, name, chosen)
    return options


if __name__ == "__main__":
    sys.exit(main())
