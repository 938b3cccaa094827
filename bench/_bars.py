"""What is asked of the gateway: a bar a row, with its number, its limit, and whether it is met."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bar:
    """`value` is NaN where it could not be measured; `note` says why, or what the number is made of."""

    part: str
    what: str
    value: float
    limit: float
    unit: str = "×"
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if math.isnan(self.value):
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "what": self.what,
            "value": None if math.isnan(self.value) else round(self.value, 4),
            "limit": self.limit,
            "at_least": self.at_least,
            "unit": self.unit,
            "met": self.met,
            "note": self.note,
        }


def median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of a round's ratio: a slow spell of the machine falls on both."""
    return median([a / b for a, b in zip(ours, theirs, strict=True) if b])


def difference(ours: list[float], theirs: list[float]) -> float:
    return median([a - b for a, b in zip(ours, theirs, strict=True)])


def table(bars: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table, its columns aligned."""
    rows = [("part", "bar", "measured", "limit", "met", "of which")]
    for bar in bars:
        value = (
            "–" if bar["value"] is None else f"{bar['value']:,.3g}" if bar["value"] < 100 else f"{bar['value']:,.0f}"
        )
        limit = f"{'≥' if bar['at_least'] else '≤'} {bar['limit']:g} {bar['unit']}".rstrip()
        met = {True: "yes", False: "**no**", None: "–"}[bar["met"]]
        rows.append((bar["part"], bar["what"], value, limit, met, bar["note"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines
