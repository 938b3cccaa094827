"""The parts of the benchmark. Each measures, and returns its bars and its details."""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from _bars import Bar, difference, median, ratio
from _gateways import Target, start_together, target_of
from _processes import NotInstalled, free_port, stop
from _rounds import Bench, Cost, load_of, summed, visit
from _traffic import Load, Tally
from _understudy import Variant, begin, finish, start_redis

Result = tuple[list[Bar], dict[str, Any]]

DELAY_MS = 50
RATE = 500.0
LATENCY_CONNECTIONS = 128
SAID = {"unary": "unary request", "stream_at_once": "stream, chunks at once", "stream_spaced": "stream, a chunk a ms"}
AGAINST = (
    ("unary", "vllm-router", 0.8),
    ("unary", "litellm", 0.01),
    ("stream_at_once", "vllm-router", 0.6),
    ("stream_spaced", "vllm-router", 0.9),
)


def cpu(bench: Bench) -> Result:
    """CPU a request, ours and others', 32 connections all busy."""
    options, costs = bench.options, dict[tuple[str, str], list[Cost]]()
    for n in range(options.rounds):
        for shape in options.shapes:
            for target in bench.gateways():
                if target.name != "direct":
                    count = options.requests if shape == "unary" else options.streams
                    count = count // 20 if target.name == "litellm" else count  # it needs 100 times as long
                    cost = visit(bench, target, shape, count, f"c{n}")
                    costs.setdefault((target.name, shape), []).append(cost)
    details: dict[str, Any] = {}
    for target in bench.gateways():
        if target.name != "direct":
            shapes = {shape: summed(costs[target.name, shape]) for shape in options.shapes}
            memory = round(target.memory_mb, 1)
            details[target.name] = {"version": target.version, "memory_mb": memory, "shapes": shapes}
    bars = []
    for shape, other, limit in AGAINST:
        ours, theirs = ([c.us["total"] for c in costs.get((name, shape), [])] for name in ("understudy", other))
        what, value, note = f"CPU, {SAID[shape]}: of {other}'s", math.nan, "not measured"
        if ours and theirs:
            value, note = ratio(ours, theirs), f"{median(ours):,.0f} µs to {median(theirs):,.0f} µs"
        bars.append(Bar("cpu", what, value, limit, note=note))
    return bars, details


def latency(bench: Bench) -> Result:
    """What a request takes longer than without a gateway, at a fixed rate (open loop)."""
    options, tallies = bench.options, dict[tuple[str, str], list[Tally]]()
    targets = [target for target in bench.gateways() if target.name != "litellm"]  # it cannot follow
    shapes = ("unary", "stream_at_once")
    requests = int(RATE * options.seconds)
    for n in range(options.rounds):
        for shape in shapes:
            for target in targets:
                more = {"rate": RATE, "delay_ms": DELAY_MS, "connections": LATENCY_CONNECTIONS}
                tally = bench.run(load_of(target, shape, requests, f"l{n}", **more))
                target.settle()
                tallies.setdefault((target.name, shape), []).append(tally)
    details: dict[str, Any] = {}
    for (name, shape), found in tallies.items():
        base = tallies.get(("direct", shape), [])
        for what in ("p50", "p99", "first_p50", "first_p99"):
            own = [getattr(tally, what) * 1e3 for tally in found]
            row = details.setdefault(name, {}).setdefault(shape, {})
            row[f"{what}_ms"] = round(median(own), 3)
            if base and name != "direct":
                row[f"added_{what}_ms"] = round(difference(own, [getattr(t, what) * 1e3 for t in base]), 3)
    bars = []
    for shape, key, what, limit in (
        ("unary", "p50", "added latency at 500/s, p50", 0.5),
        ("unary", "p99", "added latency at 500/s, p99", 3.0),
        ("stream_at_once", "first_p50", "added to a stream's first byte at 500/s, p50", 1.0),
    ):
        row = details.get("understudy", {}).get(shape, {})
        value = row.get(f"added_{key}_ms", math.nan)
        note = "not measured"
        if not math.isnan(value):
            note = f"{row[f'{key}_ms']:.2f} ms to {details['direct'][shape][f'{key}_ms']:.2f} ms"
        bars.append(Bar("latency", what, value, limit, "ms", note=note))
    return bars, details


def streams(bench: Bench) -> Result:
    """Many streams at once at 20 chunks a second; then the same while the gateway is told to stop."""
    options = bench.options
    many, chunks = options.at_once, options.chunks
    ramp = many / 2.0 if not options.quick else 500.0  # streams that begin a second

    def load(port: int, model: str, salt: str) -> Load:
        return Load(port, model, "stream_paced", many, ramp, salt, connections=many, chunks=chunks)

    bare = bench.run(load(bench.upstream, "base", "s0"))
    target = target_of(begin(Variant("streams"), bench.upstream, bench.folder))
    assert target.process is not None
    bench.stack.callback(stop, target.process)
    rest = target.worker_mb
    bench.generator.ask(load(target.port, target.model, "s1"))
    peak = rest
    while not bench.generator.done(0.25):
        peak = max(peak, target.worker_mb)
    ours = bench.generator.tally()
    bench.failed(ours)
    target.settle()
    lost, left = drain(bench, target, load(target.port, target.model, "s2"), many / ramp + chunks * 0.05 / 2)
    details = {
        "streams": many,
        "chunks_each": chunks,
        "late_ms": {name: round(getattr(ours, f"late_{name}") * 1e3, 2) for name in ("p50", "p99", "max")},
        "late_direct_ms": {name: round(getattr(bare, f"late_{name}") * 1e3, 2) for name in ("p50", "p99", "max")},
        "worker_mb_at_rest": round(rest, 1),
        "worker_mb": round(peak, 1),
        "drain": {"lost": lost, "seconds": round(left, 2)},
    }
    bars = [
        Bar(
            "streams", f"{many:,} streams, 20 chunks/s: a chunk late, p99", ours.late_p99 * 1e3, 50.0, "ms",
            note=f"direct {bare.late_p99 * 1e3:.1f} ms; p50 {ours.late_p50 * 1e3:.1f}, most {ours.late_max * 1e3:.0f}",
        ),
        Bar("streams", f"{many:,} streams: memory of the worker", peak, 150.0, "MB", note=f"{rest:.0f} MB before"),
        Bar(
            "streams", f"{many:,} streams: lost when told to stop", lost, 0.0, "",
            note=f"it ended {left:.1f} s after SIGTERM",
        ),
    ]  # fmt: skip
    return bars, details


def drain(bench: Bench, target: Target, load: Load, after: float) -> tuple[int, float]:
    """Tell the gateway to stop `after` seconds: how many streams were cut short, and how long it took to end."""
    assert target.process is not None
    bench.generator.ask(load)
    time.sleep(after)
    target.process.terminate()
    told = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        target.process.wait(45)
    left = time.monotonic() - told
    tally = bench.generator.tally()  # what it lost is a bar, not an error of the benchmark
    bench.reasons.update({f"drain: {reason}": times for reason, times in tally.reasons.items()})
    return load.requests - tally.answered, left


def flat(bench: Bench) -> Result:
    """CPU a unary request must stay what it is with more of anything."""
    options = bench.options
    plain, more = (
        Variant("plain"),
        [
            Variant("50 arms", arms=50),
            Variant("200 routes", routes=200),
            Variant("sessions", rows=options.sessions),
            Variant("journal", rows=options.rows),
            Variant("2 workers", workers=2),
        ],
    )
    costs = compare(bench, [plain, *more])
    base = costs["plain"]

    def bar(name: str, what: str) -> Bar:
        return Bar("flat", f"CPU, unary: {what}", *against(costs[name], base, 1.2))

    scaled = 2.0 / ratio(totals(costs["2 workers"]), totals(base))
    bars = [
        bar("50 arms", "2 → 50 arms"),
        bar("200 routes", "1 → 200 routes"),
        bar("sessions", f"sessions seen → {options.sessions:,}"),
        bar("journal", f"journal of 0 → {options.rows:,} rows"),
        Bar(
            "flat", "two workers, of one (by CPU per request)", scaled, 1.8, at_least=True,
            note=in_all(costs["2 workers"], base),
        ),
    ]  # fmt: skip
    return bars, {name: summed(found) for name, found in costs.items()}


def state(bench: Bench) -> Result:
    """Where state is kept, and whether anyone listens to spans, must hardly matter."""
    variants = [
        Variant("sqlite"),
        Variant("collector on", collector=f"http://127.0.0.1:{bench.upstream}"),
        Variant("collector dead", collector=f"http://127.0.0.1:{free_port()}"),
    ]
    try:
        url, process = start_redis(bench.folder)
        bench.stack.callback(stop, process)
        variants.insert(1, Variant("redis", state=url))
    except NotInstalled as error:
        bench.not_installed["redis-server"] = str(error)
    costs = compare(bench, variants)
    base = costs["sqlite"]
    bars = []
    what, apart, note = "CPU of the worker, unary: Redis and SQLite apart", math.nan, "not measured"
    if "redis" in costs:
        ours, theirs = ([c.us["worker"] for c in costs[name]] for name in ("redis", "sqlite"))
        apart = max(ratio(ours, theirs), 1.0 / ratio(ours, theirs))
        note = f"{median(ours):,.0f} µs to {median(theirs):,.0f} µs; in all {in_all(costs['redis'], base)}"
    bars = [Bar("state", what, apart, 1.05, note=note)]
    bars += [
        Bar("state", f"CPU, unary: {name}, of off", *against(costs[name], base, 1.15))
        for name in ("collector on", "collector dead")
    ]
    return bars, {name: summed(found) for name, found in costs.items()}


def compare(bench: Bench, variants: list[Variant]) -> dict[str, list[Cost]]:
    """Understudy in several variants, side by side, visited in turns; stopped at the end."""
    options, costs = bench.options, dict[str, list[Cost]]()
    with contextlib.ExitStack() as stack:
        lean = [replace(variant, admin=False) for variant in variants]
        targets = start_together(lean, bench.upstream, bench.folder, stack)
        for target, variant in zip(targets, variants, strict=True):
            warm = max(100 if options.quick else 10_000, 5 * target.routes)  # a large journal is slow at first
            bench.run(load_of(target, "unary", options.seen if variant.name == "sessions" else warm, "w"))
            if not options.quick:
                target.settle()
        for n in range(options.rounds):
            for target in targets:
                costs.setdefault(target.name, []).append(visit(bench, target, "unary", options.each, f"v{n}"))
    return costs


def totals(costs: list[Cost]) -> list[float]:
    return [cost.us["total"] for cost in costs]


def in_all(costs: list[Cost], base: list[Cost]) -> str:
    return f"{median(totals(costs)):,.0f} µs to {median(totals(base)):,.0f} µs"


def against(costs: list[Cost], base: list[Cost], limit: float) -> tuple[float, float, str, bool, str]:
    """The tail of a bar: total CPU of `costs` to that of `base`."""
    workers = ratio([c.us["worker"] for c in costs], [c.us["worker"] for c in base])
    note = f"{in_all(costs, base)}; the worker alone {workers:.2f} ×"
    return ratio(totals(costs), totals(base)), limit, "×", False, note


def start(bench: Bench) -> Result:
    """From nothing to ready, on all cores; and what a worker weighs then."""
    seconds, memory = [], []
    for n in range(bench.options.starts):
        began = time.monotonic()
        started = begin(Variant(f"start {n}"), bench.upstream, bench.folder, core=None)
        finish(started, step=0.005)
        seconds.append(time.monotonic() - began)
        time.sleep(0.3 if bench.options.quick else 2.0)
        memory.append(target_of(started).worker_mb)
        stop(started.process)
    spread = f"of {len(seconds)}: {min(seconds):.2f} to {max(seconds):.2f} s"
    bars = [
        Bar("start", "ready after", median(seconds), 1.5, "s", note=spread),
        Bar("start", "memory of a worker at rest", median(memory), 80.0, "MB"),
    ]
    return bars, {"seconds": [round(s, 3) for s in seconds], "worker_mb": [round(m, 1) for m in memory]}


PARTS: dict[str, Callable[[Bench], Result]] = {
    "cpu": cpu,
    "latency": latency,
    "streams": streams,
    "flat": flat,
    "state": state,
    "start": start,
}
COMPARED = ("cpu", "latency")
"""Parts that share the gateways that are compared."""
