"""What the commands about gates and rollouts print for people. Every estimate has its interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from learner.diagnosis import Diagnosis
from learner.gate import Check, Report
from understudy.show import console

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
LISTED = 10


def gate(report: Report, diagnosis: Diagnosis, page: Path) -> None:
    console.print(f"[{COLOURS[report.verdict]}]{report.verdict}[/]: {escape(report.why)}")
    console.print(
        f"{escape(report.challenger)} beside {escape(report.champion)}; referee: {escape(report.referee.name)}"
    )
    table = Table("check", "verdict", "value", "limit", "of", "why", box=None, padding=(0, 2, 0, 0))
    for one in report.checks:
        table.add_row(
            one.name, f"[{COLOURS[one.verdict]}]{one.verdict}[/]", _interval(one), _number(one.limit),
            f"{one.n} of {one.users}" if one.n else "", escape(one.why),
        )  # fmt: skip
    console.print(table)
    for note in report.notes:
        console.print(f"[dim]{escape(note)}[/]")
    if diagnosis.causes:
        console.print(f"likely {escape(diagnosis.why)}")
    console.print(f"the whole report, with the examples that decided it: {escape(str(page))}")


def _interval(one: Check) -> str:
    if one.value is None:
        return ""
    bounds = "" if one.lower is None or one.upper is None else f" [{one.lower:.3f}, {one.upper:.3f}]"
    return escape(f"{one.value:.3f}{bounds}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def rollouts(found: Sequence[Mapping[str, Any]]) -> None:
    console.print(shown(found))


def watch(look: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
    """Until every rollout has ended, or Ctrl-C."""
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            found = look()
            live.update(shown(found))
            if not any(one["rollout"] and one["rollout"]["active"] for one in found):
                return
            time.sleep(1.0)


def shown(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    return Group(*(part for one in found for part in _route(one)))


def _route(one: Mapping[str, Any]) -> list[RenderableType]:
    head = f"[bold]{escape(one['route'])}[/]  champion {escape(one['champion'])}"
    rollout, standing = one["rollout"], one["standing"]
    if not one["enabled"]:
        return [f"{head}; it has no rollout in the config"]
    if rollout is None:
        return [f"{head}; nothing was rolled out yet"]
    parts: list[RenderableType] = [head, _where(rollout), _steps(one["stages"])]
    if standing is not None:
        parts += [_difference(standing), _sides(standing)]
        if standing["guardrails"]:
            parts.append(_guardrails(standing["guardrails"]))
    return [*parts, *(_decision(said) for said in one["decisions"][:LISTED])]


def _where(rollout: Mapping[str, Any]) -> str:
    phase = rollout["phase"].replace("_", " ")
    said = f"{escape(rollout['challenger'])} is [bold]{phase}[/]"
    if rollout["active"]:
        drawn = rollout["drawn"]
        share = "" if drawn is None else f", draws {drawn['share']:.1%} of new sessions"
        said += f"; at most {rollout['cap']:.0%}{share}"
    if rollout["waiting_for"]:
        said += f"; waits for {escape(rollout['waiting_for'])}"
    return said + (f" ({escape(rollout['why'])})" if rollout["why"] else "")


def _steps(stages: Sequence[Mapping[str, Any]]) -> str:
    looks = {"done": "[dim]{}[/]", "current": "[bold reverse] {} [/]", "ahead": "{}"}
    return "  →  ".join(looks[stage["state"]].format(escape(stage["shown"])) for stage in stages)


def _difference(standing: Mapping[str, Any]) -> str:
    said = escape(standing["said"])
    if standing["difference"] is None:
        return said
    bounds = escape(f"[{standing['lower']:+.3f}, {standing['upper']:+.3f}]")
    late = "; [red]no controller has looked since[/]" if standing["late"] else ""
    return f"reward {standing['difference']:+.3f} {bounds}, each bound at {standing['level']:.0%}, always: {said}{late}"


def _sides(standing: Mapping[str, Any]) -> Table:
    table = Table("arm", "sessions", "judged", "reward, 95 %", "satisfied, 95 %", box=None, padding=(0, 2, 0, 0))
    for name in ("challenger", "control"):
        side = standing[name]
        judged = str(side["judged"])
        table.add_row(
            f"{name} {escape(side['arm'])}", str(side["sessions"]), judged, _mean(side["reward"], "{:.3f}"),
            _mean(side["satisfied"], "{:.1%}"),
        )  # fmt: skip
    return table


def _guardrails(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("guardrail", "limit", "challenger", "control", "tripped", "then", box=None, padding=(0, 2, 0, 0))
    for one in rows:
        tripped = "[red]yes[/]" if one["tripped"] else f"{one['evidence']:.0%} of the way"
        excused = " (excused)" if one["excused"] else ""
        table.add_row(
            one["metric"], one["limit"], _mean(one["challenger"], "{:.3g}"), _mean(one["control"], "{:.3g}"), tripped,
            one["action"] + excused,
        )  # fmt: skip
    return table


def _mean(found: Mapping[str, Any] | None, form: str) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{form.format(found['value'])} (of {found['of']})"
    return escape(f"{form.format(found['value'])} [{form.format(found['low'])}, {form.format(found['high'])}]")


def _decision(said: Mapping[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(said["at"]))
    line = f"[dim]{when}[/] {said['verb']} by {escape(said['actor'])}: {escape(said['why'])}"
    return line + (_impact(said["found"]["impact"]) if said["found"].get("impact") else "")


def _impact(found: Mapping[str, Any]) -> str:
    """Before and after a promotion, on another line."""
    before, after = found["before"], found["after"]
    if before["reward"] is None or after["reward"] is None or found["difference"] is None:
        return ""
    sure = "significant" if found["significant"] else "not significant"
    bounds = escape(f"[{found['lower']:+.3f}, {found['upper']:+.3f}]")
    return (
        f"\n         impact: reward {before['reward']:.3f} (of {before['sessions']}) → {after['reward']:.3f} (of "
        f"{after['sessions']}), difference {found['difference']:+.3f} {bounds}, {sure}"
    )
