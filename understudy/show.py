"""Tables for people, by Rich. Every number that is an estimate is shown with its interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """The numbers, and below them in words what moved each arm; readable from 80 columns on."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("route and arm", no_wrap=True)
    for name in ("weight", "last hour", "mean reward, 95 %", "P(best)", "sessions"):
        table.add_column(name, justify="right", no_wrap=True)
    route = None
    for row in rows:
        if row["route"] != route:
            route = row["route"]
            table.add_row(f"[bold]{escape(route)}[/]")
        share = row["share_last_hour"]
        low, high = row["interval"]
        table.add_row(
            f"  {escape(row['arm'])}",
            f"{row['weight']:.1%}",
            "–" if share is None else f"{share:.1%}",
            f"{row['mean']:.3f} [{low:.3f}, {high:.3f}]".replace("[", r"\["),
            f"{row['p_best']:.3f}",
            f"{row['sessions']:.0f}",
        )
    return Group(table, *(sentence(row) for row in rows))


def sentence(row: Mapping[str, Any]) -> str:
    """An arm's model and what moved it."""
    moved = ", ".join(f"{count} {kind}" for kind, count in row["moved_by"].items()) or "nothing yet"
    return f"[bold]{escape(row['arm'])}[/] ({escape(row['model'])}) was moved by {moved}"


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


def findings(found: Iterable[Finding]) -> None:
    for finding in found:
        mark = "[green]good[/]" if finding.ok else "[red]bad [/]"
        console.print(f"{mark}  {finding.check:<22} {escape(finding.detail)}", soft_wrap=True)


def explained(rows: Iterable[Explained]) -> None:
    table = Table()
    for name in ("key", "value", "from", "meaning"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(escape(row.key), escape(str(row.value)), row.source, escape(row.meaning))
    console.print(table)


def keys(rows: Iterable[Mapping[str, Any]]) -> None:
    table = Table()
    for name in ("id", "tenant", "role", "created", "revoked"):
        table.add_column(name)
    for row in rows:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        table.add_row(row["id"], row["tenant"], row["role"], created, "yes" if row["revoked"] else "")
    console.print(table)


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
