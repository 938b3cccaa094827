"""What the learner's commands print for people."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from learner.dataset import Built
from learner.due import Due
from learner.examples import Example
from learner.rounds import Round
from learner.serving import Reconciled
from telemetry.errors import UnderstudyError
from telemetry.events import Interaction
from understudy.show import console

EXCERPT = 100
LISTED = 8
_NUMBER = re.compile(r"\d[\d.,]*")


def built(found: Built) -> None:
    console.print(f"[bold]{found.folder}[/]")
    _counts(found.manifest)
    for dropped in found.curated.dropped:
        if dropped.count:
            console.print(f"  dropped {dropped.count:>6}  [bold]{dropped.filter}[/]: {escape(dropped.meaning)}")
            for example in dropped.examples[:1]:
                console.print(f"                  [dim]{escape(excerpt(example))}[/]")
    for reason, count in found.unusable.most_common():
        console.print(f"  unusable {count:>5}  {escape(reason)}")


def _counts(manifest: Mapping[str, Any]) -> None:
    for split, kinds in manifest["examples"].items():
        counts = ", ".join(f"{count} {_plural(kind, count)}" for kind, count in kinds.items() if count) or "none"
        console.print(f"  {split.replace('_', ' ')}: {counts}, of {manifest['users'][split]} users")
    agreement = manifest["agreement"]
    if agreement["pairwise"] is not None:
        alpha = "" if agreement["krippendorff_alpha"] is None else f", α {agreement['krippendorff_alpha']:.2f}"
        console.print(f"  people who judged the same agree in {agreement['pairwise']:.0%} of pairs of votes{alpha}")


def _plural(kind: str, count: int) -> str:
    return {"pair": "pairs", "correction": "corrections"}.get(kind, kind) if count != 1 else kind


def dataset(manifest: Mapping[str, Any], examples: Sequence[Example]) -> None:
    _counts(manifest)
    for name in ("coverage", "reasons"):
        console.print(f"  {name}: " + escape(", ".join(f"{key} {count}" for key, count in manifest[name].items())))
    for row in manifest["filters"]:
        if row["dropped"]:
            console.print(f"  dropped {row['dropped']:>6}  [bold]{row['filter']}[/]: {escape(row['meaning'])}")
    table = Table("example", "split", "why", "weight", "chosen over rejected", box=None, padding=(0, 2, 0, 0))
    for one in examples:
        table.add_row(one.id[:12], one.split, f"{one.kind}: {one.reason}", f"{one.weight:.2f}", escape(excerpt(one)))
    console.print(table)


def excerpt(example: Example) -> str:
    """The two answers in a line."""
    said = [f"“{_short(example.chosen)}”" if example.chosen is not None else "–"]
    said += [f"over “{_short(example.rejected)}”"] if example.rejected is not None else []
    return " ".join(said)


def _short(text: str | None) -> str:
    line = " ".join((text or "").split())
    line = "".join(letter if letter.isprintable() else "·" for letter in line)
    return line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…"


def explained(found: Mapping[str, Any]) -> None:
    example: Example = found["example"]
    console.print(
        f"[bold]{example.id}[/] {example.kind} ({example.reason}), weight {example.weight:.2f}, {example.split}"
    )
    for turn in example.messages:
        console.print(f"  [dim]{turn['role']}[/] {escape(_short(turn.get('content')))}")
    for label, text in (("chosen", example.chosen), ("rejected", example.rejected)):
        if text is not None:
            console.print(f"  [bold]{label}[/] {escape(_short(text))}")
    console.print("it comes from")
    for fact in found["facts"]:
        if isinstance(fact, Interaction):
            arm = (
                f"answer of arm {fact.answerer.arm} ({fact.answerer.model}), drawn with {fact.answerer.propensity:.2f}"
            )
            console.print(f"  {fact.event_id}  {arm}, session {fact.session}")
        else:
            why = f" ({escape(fact.reason)})" if fact.reason else ""
            console.print(f"  {fact.event_id}  signal {fact.kind} by {fact.subject or 'nobody known'}{why}")
    for missing in found["missing"]:
        console.print(f"  {missing}  [red]is not in the journal any more[/]")


STEPS = {
    "dataset": "building the dataset",
    "train": "training",
    "register": "registering",
    "serve": "loading it on the replicas, and comparing what they say with PEFT",
    "gate": "gate: measuring it beside the champion",
}


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Told the steps of a round and the trainer's events, shows them; one bar for the training."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = None

        def say(step: str, event: dict[str, Any]) -> None:
            nonlocal task
            if quiet:
                return
            if not event:
                console.print(f"· {STEPS.get(step, step)}")
            elif step == "train" and "held_out_loss" in event:
                console.print(f"  {_looked(event)}")
            elif step == "train" and event.get("of"):
                task = bar.add_task("training", total=event["of"]) if task is None else task
                bar.update(task, completed=event.get("step", 0), description=escape(_live(event)))
            elif step == "serve":
                console.print(
                    f"  {event['replica']} says {event['agreement']:.1%} of {event['tokens']} tokens as PEFT does"
                )
            elif step == "gate" and "verdict" in event:
                console.print(
                    f"  {event['verdict']}: {escape(event['why'])}\n  {escape(event['page'])}", soft_wrap=True
                )
            elif note := event.get("note"):
                console.print(f"  [yellow]{escape(str(note))}[/]")

        yield say


def _looked(event: Mapping[str, Any]) -> str:
    """A look at the held-out set; how much less likely preferred answers became is the alarm."""
    said = f"step {event.get('step')}: held-out accuracy {event.get('held_out_accuracy', 0):.1%}"
    said += f", loss {event['held_out_loss']:.4f}"
    fall = event.get("held_out_fall", 0.0)
    return said + (f", [red]preferred answers fell by {fall:.2f} nats a token[/]" if fall > 0 else "")


def _live(event: Mapping[str, Any]) -> str:
    numbers = [
        f"{name} {event[key]:.3g}"
        for key, name in (
            ("loss", "loss"),
            ("margin", "margin"),
            ("accuracy", "accuracy"),
            ("logps_chosen", "log p(chosen)"),
            ("tokens_per_s", "tokens/s"),
        )
        if isinstance(event.get(key), int | float)
    ]
    return " ".join(["training", *numbers])


def sentence(found: Round | Due) -> str:
    if isinstance(found, Round):
        what = {
            "done": f"{found.version} is served, and the route's challenger",
            "dropped": f"{found.version or 'the round'} was dropped: {found.why}",
            "failed": f"round {found.number} failed: {found.why}",
        }
        return what.get(found.step, f"round {found.number} is at step {found.step}")
    return f"nothing is due: {found.waiting}"


def learned(found: Round | Due) -> None:
    console.print(escape(sentence(found)))


class Teller:
    """Says what is new, a line each, as JSON if asked; the same thing of the same subject once."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._said: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, subject: str, text: str, *, again: bool = False) -> None:
        plain = _NUMBER.sub("#", text)  # "in 52 s" is no news after "in 53 s"
        with self._lock:
            if self._said.get(subject) == plain and not again:
                return
            self._said[subject] = plain
            if self._as_json:
                print(json.dumps({"at": time.time(), "about": subject, "says": text}), flush=True)
            elif text:
                print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    @contextmanager
    def faults(self, subject: str) -> Iterator[None]:
        """Whatever goes wrong is said, and ends only what it happened in."""
        try:
            yield
        except (UnderstudyError, OSError, ValueError) as error:
            self(subject, str(error) or type(error).__name__)

    def replicas(self, found: Reconciled) -> None:
        for replica, version in found.loaded:
            self(f"{replica} {version}", f"{replica} was restarted: {version} is loaded again", again=True)
        told = [f"{replica}: {why}" for replica, why in found.unreachable]
        told += [f"{replica}, {version}: {why}" for replica, version, why in found.refused]
        self("replicas", "; ".join(told))


def status(found: Mapping[str, Any]) -> None:
    last = found["round"]
    if last["number"]:
        console.print(f"round {last['number']} ({escape(last['reason'])}): {last['step']} {escape(last['why'])}")
    console.print(escape(f"next: {found['next']}"))
    if not found["versions"]:
        console.print("no version is registered yet")
        return
    table = Table("version", "part", "held-out accuracy", "trained on", "tags", box=None, padding=(0, 2, 0, 0))
    for row in found["versions"]:
        accuracy = row["metrics"].get("held_out_accuracy")
        shown = "" if accuracy is None else f"{accuracy:.1%}"
        tags = ", ".join(f"{key}: {value}" for key, value in row["tags"].items())
        table.add_row(row["name"], ", ".join(row["aliases"]), shown, row["dataset"][:12], escape(tags))
    console.print(table)


def reproduced(found: Mapping[str, Any]) -> None:
    if found["same"]:
        console.print(f"{found['version']} came out the same to the bit ({found['adapter_hash'][:12]})")
    else:
        console.print(
            f"[red]{found['version']} came out otherwise[/]: {found['adapter_hash'][:12]}, was {found['was'][:12]}"
        )


def lineage(found: Mapping[str, Any], indent: int = 0) -> None:
    """Nested facts as an indented list; long lists are cut."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            console.print(f"{'  ' * indent}[bold]{escape(str(key))}[/]")
            lineage(value, indent + 1)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            console.print(f"{'  ' * indent}[bold]{escape(str(key))}[/] ({len(value)})")
            for one in value[:LISTED]:
                flat = "  ".join(f"{k} {v}" for k, v in one.items() if not isinstance(v, list | dict))
                console.print(f"{'  ' * (indent + 1)}- {escape(flat)}")
                for name, inner in one.items():
                    if isinstance(inner, list) and inner:
                        lineage({name: inner}, indent + 2)
            if len(value) > LISTED:
                console.print(f"{'  ' * (indent + 1)}… and {len(value) - LISTED} more")
        elif value not in (None, "", [], {}):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            console.print(f"{'  ' * indent}{escape(str(key))}: {escape(str(shown))}")
