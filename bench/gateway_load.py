"""What a gateway costs: every bar of the hot path in one run on one machine, and one table.

    python bench/gateway_load.py                       # everything that is installed, about ten minutes
    python bench/gateway_load.py --parts cpu,latency   # some of cpu, latency, streams, flat, state, start
    python bench/gateway_load.py --quick --json        # under a minute; the numbers mean little
    python bench/gateway_load.py --vllm-router /opt/router/bin/vllm-router --litellm-python /opt/litellm/bin/python

Three processes: an upstream written by hand that answers as vLLM does (asyncio protocols over uvloop), a load
generator (the same, 32 keep-alive connections), and the gateway. The gateway has core 0 for itself, the other two
share core 1; on one core they would take each other's time. What is compared is started side by side, then each round
visits every one of them in turn (A B C, A B C, …), so that a slow spell of the machine falls on all. A ratio is the
median of the rounds' ratios.

CPU is user + system time of the gateway's whole process tree, from /proc/<pid>/stat (10 ms ticks: with 10,000
requests one tick is 1 µs a request). Understudy is measured as it is used: a Thompson bandit over two arms, journal in
SQLite with the text of prompts and answers, metrics, one worker, one controller, one supervisor. It is waited for until
the controller has counted all that was journaled, so that its work is in the number. While CPU is counted all
connections are busy (closed loop); latency is measured at a fixed rate (open loop), from the time a request was due, so
that a stall is felt by all that had to wait for it.

Left out: TLS, other bodies than these (about 0.4 KB in, 1 KB out; 64 chunks), other hosts. Every conversation is new to
the gateway, as on a busy day: recalls are not measured. docs/performance.md says what each bar is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from _bars import table
from _gateways import GATEWAYS
from _parts import COMPARED, PARTS
from _rounds import bench
from _understudy import version

SHAPES = ("unary", "stream_at_once", "stream_spaced")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every part in turn; the report as data."""
    load_before = os.getloadavg()[0]
    bars, details = [], {}
    with tempfile.TemporaryDirectory(prefix="gateway-load-") as folder, bench(options, Path(folder)) as shared:
        for part in options.parts:
            if part not in COMPARED:
                shared.release()
            if not options.json:
                print(f"{part} …", file=sys.stderr, flush=True)
            found, details[part] = PARTS[part](shared)
            bars += [bar.to_dict() for bar in found]
    measured = ("requests", "streams", "rounds", "seconds", "at_once", "chunks", "each", "rows", "sessions", "seen")
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "machine": machine(load_before),
        "options": {name: getattr(options, name) for name in measured},
        "bars": bars,
        "parts": details,
        "not_installed": shared.not_installed,
        "errors": shared.errors,
        "reasons": dict(shared.reasons),
    }


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
        "packages": {"understudy": version()} | {name: importlib.metadata.version(name) for name in packages},
    }


# Telling.


def show(data: dict[str, Any]) -> None:
    m = data["machine"]
    print(f"$ {data['command']}")
    print(f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, Python {m['python']}, load {m['load_average_before']}")
    print(", ".join(f"{name} {number}" for name, number in m["packages"].items()))
    others = {name: one["version"] for name, one in data["parts"].get("cpu", {}).items() if name != "understudy"}
    if others:
        print("beside " + ", ".join(f"{name} {number}" for name, number in others.items()))
    for name, why in data["not_installed"].items():
        print(f"{name}: not installed: {why}")
    print()
    print("\n".join(table(data["bars"])))
    if found := data["parts"].get("cpu"):
        print("\nCPU a request, µs, median of rounds:\n")
        print("\n".join(costs(found)))
    if found := data["parts"].get("latency"):
        print("\nLatency, ms, median of rounds:\n")
        print("\n".join(latencies(found)))
    if data["reasons"]:
        print(f"\n{data['errors']} requests failed: {data['reasons']}")


def costs(found: dict[str, Any]) -> list[str]:
    lines = ["| gateway | shape | worker | in all | requests/s | MB |", "|---|---|---|---|---|---|"]
    for name, one in found.items():
        for shape, row in one["shapes"].items():
            worker = row["cpu_us"].get("worker")
            cells = ["–" if worker is None else f"{worker:,.0f}", f"{row['cpu_us']['total']:,.0f}"]
            cells += [f"{row['per_second']:,.0f}", f"{one['memory_mb']:,.0f}"]
            lines.append(f"| {name} | {shape} | " + " | ".join(cells) + " |")
    return lines


def latencies(found: dict[str, Any]) -> list[str]:
    keys = ("p50_ms", "p99_ms", "first_p50_ms", "first_p99_ms")
    lines = ["| gateway | shape | p50 | p99 | first byte p50 | first byte p99 |", "|---|---|---|---|---|---|"]
    for name, shapes in found.items():
        for shape, row in shapes.items():
            cells = [
                f"{row[key]:.2f}" + (f" ({row[f'added_{key}']:+.2f})" if f"added_{key}" in row else "") for key in keys
            ]
            lines.append(f"| {name} | {shape} | " + " | ".join(cells) + " |")
    return lines


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
    about.add_argument("--quick", action="store_true", help="under a minute: shows that it works, measures little")
    about.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    about.add_argument("--only", default=",".join(GATEWAYS), help=f"some of {','.join(GATEWAYS)} (cpu, latency)")
    about.add_argument("--shapes", default=",".join(SHAPES), help=f"some of {','.join(SHAPES)} (cpu)")
    about.add_argument("--vllm-router", default="vllm-router", help="the program, where it is not on the PATH")
    about.add_argument("--vllm-router-policy", default="", help="its --policy; its own default asks upstreams twice")
    about.add_argument("--litellm-python", default=sys.executable, help="a Python that has litellm[proxy]")
    sizes = {  # name: (default, with --quick, at most, what)
        "rounds": (5, 1, 50, "how often each is visited"),
        "requests": (10_000, 300, 1_000_000, "cpu: unary requests a visit"),
        "streams": (1_000, 40, 100_000, "cpu: streams of a shape a visit"),
        "at-once": (1_000, 50, 10_000, "streams: how many at the same time"),
        "chunks": (200, 20, 500, "streams: chunks of each, 20 a second"),
        "each": (5_000, 200, 1_000_000, "flat, state: unary requests a visit"),
        "rows": (1_000_000, 10_000, 10_000_000, "flat: facts in the large journal"),
        "sessions": (1_000_000, 10_000, 10_000_000, "flat: sessions that the journal knows"),
        "seen": (300_000, 300, 10_000_000, "flat: of these, sent through the worker first"),
        "starts": (5, 1, 50, "start: how often"),
    }
    for name, (usual, _, most, what) in sizes.items():
        about.add_argument(f"--{name}", type=int, help=f"{what} ({usual:,}; at most {most:,})")
    options = about.parse_args()
    for name, (usual, quick, most, _) in sizes.items():
        key = name.replace("-", "_")
        asked = getattr(options, key)
        setattr(options, key, max(1, min(most, asked or (quick if options.quick else usual))))
    options.seconds = 0.4 if options.quick else 2.0
    for name, known in (("parts", tuple(PARTS)), ("only", GATEWAYS), ("shapes", SHAPES)):
        chosen = [one.strip() for one in getattr(options, name).split(",") if one.strip()]
        if wrong := [one for one in chosen if one not in known]:
            about.error(f"--{name}: {wrong[0]} is none of {', '.join(known)}")
        setattr(options, name, [one for one in known if one in chosen])
    return options


if __name__ == "__main__":
    sys.exit(main())
