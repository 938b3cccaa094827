"""Tables for people, by Rich. Every number that is an estimate is shown with its interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from understudy.doctor import Finding
from understudy.settings import Explained

console = Console(highlight=False)


def arms(rows: list[dict[str, Any]], title: str | None = None) -> None:
    console.print(arms_table(rows, title))


def arms_table(rows: list[dict[str, Any]], title: str | None = None) -> Group:
    """For each route and segment the numbers, and below them why in words; readable from 80 columns on.

    "judged" counts sessions with a reward, older ones less. "served" and "heard" are of the last hour: the share of
    requests, and of sessions in which a signal came.
    """
    places = list(dict.fromkeys((row["route"], row["segment"]) for row in rows))
    parts: list[Table | str] = [title] if title else []
    for place in places:
        here = [row for row in rows if (row["route"], row["segment"]) == place]
        label = f"“{here[0]['label']}”" if here[0].get("label") else ""
        parts += [_place_table(" · ".join(filter(None, (*place, label))), here), *(sentence(row) for row in here)]
    return Group(*parts)


def _place_table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title=escape(name), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    table.add_column("arm", min_width=10, overflow="fold")
    for heading in ("weight", "served", "mean, 95 %", "P(best)", "judged", "heard", "regret"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            escape(row["arm"]),
            f"{row['weight']:.1%}",
            "–" if row["share_last_hour"] is None else f"{row['share_last_hour']:.0%}",
            escape(f"{row['mean']:.2f} [{low:.2f}, {high:.2f}]"),
            f"{row['p_best']:.3f}",
            f"{row['sessions']:.0f}",
            "–" if row["signal_rate"] is None else f"{row['signal_rate']:.0%}",
            f"{row['regret']:.1f}",
        )
    return table


def sentence(row: Mapping[str, Any]) -> str:
    """Why an arm has its share."""
    return f"[bold]{escape(row['arm'])}[/] ({escape(row['model'])}): {escape(row['why'])}"


def status(found: Mapping[str, Any]) -> None:
    controller, journal = found["controller"], found["journal"]
    alive = "[green]alive[/]" if controller["alive"] else "[red]not running[/]: start it with `understudy serve`"
    console.print(f"controller  {escape(str(controller['owner'] or 'none'))}  {alive}")
    console.print(f"            {controller['facts_waiting']} facts wait to be counted")
    console.print(
        f"journal     {escape(journal['path'])}: {journal.get('interaction', 0)} interactions, "
        f"{journal.get('signal', 0)} signals"
    )
    for route in found["routes"]:
        weights = "  ".join(f"{arm} {weight:.1%}" for arm, weight in (route["weights"] or {}).items())
        fresh = f"weights v{route['snapshot']}" if route["snapshot"] else "no weights published yet"
        console.print(f"route       {escape(route['route'])}: {route['policy']}, {fresh}  {weights}")
        if route["segments"]:
            full = "; [yellow]no more get weights of their own[/] (max_segments)" if route["segments_full"] else ""
            console.print(f"            {route['segments']} segments{full}")
        if route["reward"] != "by fixed weights":
            console.print(f"            rewards {escape(route['reward'])}")
        if route["price"]:
            console.print(f"            a unit of currency is worth {route['price']:.3g} of reward")


def rebuilt(rows: Iterable[Mapping[str, Any]], waiting: int) -> None:
    for row in rows:
        mark = "[green]same[/]  " if row["same"] else "[red]differs[/]"
        console.print(
            f"{mark}  {escape(row['route'])}: {row['sessions']:.0f} sessions with a reward in the journal, "
            f"largest difference from the store {row['largest_difference']:.1e}"
        )
    if waiting:
        console.print(f"         {waiting} facts are not counted yet; the controller does that as it comes to them")


ESTIMATORS = {"dr": "doubly robust", "switch_dr": "switch-DR", "snips": "SNIPS", "ips": "IPS"}


def ope(found: Mapping[str, Any]) -> None:
    """What another policy would have earned, beside what was earned, and below it the verdict in words."""
    console.print(_ope_arms(found), _ope_estimates(found))
    console.print(
        f"{found['sessions']:,} judged sessions, effective sample size {found['ess']:.0f}, "
        f"largest weight {found['largest_weight']:.1f}"
    )
    console.print(f"[bold]{escape(found['verdict'])}[/]")
    for note in found["notes"]:
        console.print(escape(note))


def _ope_arms(found: Mapping[str, Any]) -> Table:
    table = Table(title=escape(found["route"]), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("arm", overflow="fold")
    for heading in ("judged", "share", "earned", "share under the policy"):
        table.add_column(heading, justify="right")
    for row in found["arms"]:
        table.add_row(
            escape(row["arm"]),
            str(row["sessions"]),
            f"{row['sessions'] / found['sessions']:.1%}" if found["sessions"] else "–",
            "–" if row["mean"] is None else f"{row['mean']:.3f}",
            "–" if row["policy_share"] is None else f"{row['policy_share']:.1%}",
        )
    return table


def _ope_estimates(found: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("mean reward a session")
    for heading in ("estimate", "± se", "95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    estimates = found["estimates"] or dict.fromkeys(ESTIMATORS)
    lines = [("as served", found["logged"])]
    lines += [(f"{found['policy']['kind']}, {label}", estimates[name]) for name, label in ESTIMATORS.items()]
    for label, one in lines:
        if one is None:
            table.add_row(label, "–", "–", "–")
        else:
            low, high = one["interval"]
            table.add_row(label, f"{one['value']:.3f}", f"{one['se']:.3f}", escape(f"[{low:.3f}, {high:.3f}]"))
    return table


def findings(found: Iterable[Finding]) -> None:
    for finding in found:
        mark = "[green]good[/]" if finding.ok else "[red]bad [/]"
        console.print(f"{mark}  {finding.check:<22} {escape(finding.detail)}", soft_wrap=True)


def explained(rows: Iterable[Explained], newcomers: Iterable[Mapping[str, Any]]) -> None:
    table = Table()
    for name in ("key", "value", "from", "meaning"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(escape(row.key), escape(str(row.value)), row.source, escape(row.meaning))
    console.print(table)
    for route in newcomers:
        title = f"{route['route']}: share of one more arm, if {route['sessions_a_day']:g} sessions a day are judged"
        console.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("after days")
        for day in route["days"]:
            table.add_column(str(day), justify="right")
        for one in route["forecasts"]:
            difference = one["difference"]
            how = f"{abs(difference):g} {'better' if difference > 0 else 'worse'}" if difference else "as good"
            table.add_row(how, *(f"{share:.0%}" for share in one["shares"]))
        console.print(table)


def keys(rows: Iterable[Mapping[str, Any]]) -> None:
    table = Table()
    for name in ("id", "tenant", "role", "may read text", "created", "revoked"):
        table.add_column(name)
    for row in rows:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        text, revoked = ("yes" if row[name] else "" for name in ("text", "revoked"))
        table.add_row(row["id"], row["tenant"], row["role"], text, created, revoked)
    console.print(table)


def signals(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line each: when, what, of which answer of which arm, from where, and why or in which words."""
    for row in rows:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(row["at"]))
        what = row["kind"] if row["value"] is None else f"{row['kind']} {row['value']:g}"
        by = f"{row['route']}/{row['arm']}" if row["arm"] else "no answer known"
        why = " ".join(filter(None, (row["name"], row["reason"], row.get("text"))))
        why = "".join(char if char.isprintable() else "·" for char in why)  # people's texts may steer a terminal
        line = f"{at}  {what:<14}  {by:<20}  {row['answer'] or '':<32}  {row['source']:<8}  {why}"
        console.print(escape(line.rstrip()), soft_wrap=True, highlight=False)
    if not rows:
        console.print("nothing was heard in this time")


def summary(found: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column()
    for key, value in found.items():
        shown = "\n".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {number}" for name, number in value.items())
        table.add_row(key.replace("_", " "), escape(str("–" if shown in (None, "") else shown)))
    console.print(table)


@contextmanager
def progress(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; yields a function that takes how many are done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
