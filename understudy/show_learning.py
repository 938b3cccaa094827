"""What the learner's commands print for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from learner.dataset import Built
from learner.examples import Example
from telemetry.events import Interaction
from understudy.show import console

EXCERPT = 100


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
