"""The demo as a picture: who was pleased, who answered, both decisions, and where the winner comes from. SVG, by hand.

One drawing of about a hundred lines needs no plotting library, and a browser or an editor shows it as it is.
"""

from __future__ import annotations

import html
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from understudy.demo.people import COHORTS, Visit
from understudy.rollout_report import estimate

WIDTH, LEFT, RIGHT = 960, 70, 24
TOP, HIGH, GAP = 84, 190, 46
PARTS = 40
"""Stretches of sessions that the curves have."""
PAPER, INK, FAINT = "#fffdf8", "#2b2a33", "#8d8a97"
COLOURS = ("#9aa5b1", "#2f7d5b", "#c0533e", "#7a5ea8")
TINTS = {"cooks": "#c98a2b", "builders": "#3b6ea5", "readers": "#8a5a9e"}


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a time."""

    at: float
    text: str
    good: bool = True


def draw(visits: Sequence[Visit], names: Mapping[str, str], marks: Sequence[Mark], lineage: Sequence[str]) -> str:
    """An SVG document. `names`: model → what people call it, in the order in which they are drawn."""
    visits = sorted(visits, key=lambda one: one.at)
    edges = [round(len(visits) * n / PARTS) for n in range(PARTS + 1)]
    bins = [visits[a:b] for a, b in pairwise(edges)]
    times = [one.at for one in visits]

    def x(count: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * count / max(1, len(visits))

    middles = [x((a + b) / 2) for a, b in pairwise(edges)]
    places = [(x(bisect_left(times, mark.at)), mark) for mark in marks]
    second = TOP + HIGH + GAP
    foot = second + HIGH + 46
    height = foot + 22 * len(lineage) + 40
    body = [
        _text(LEFT, 34, "A challenger takes over, and a worse one rolls itself back", 20, weight=600),
        _text(
            LEFT, 56, f"{len(visits)} sessions of simulated users on a real vLLM; every number was measured", 13, FAINT
        ),
        *_pleased(bins, middles),
        *_shares(bins, middles, names, second),
        *_marked(places, second + HIGH),
        _text(WIDTH - RIGHT, second + HIGH + 20, "sessions, in order", 12, FAINT, anchor="end"),
        _text(LEFT, foot, "Lineage of the winner", 14, weight=600),
        *(_text(LEFT, foot + 22 * (n + 1), line, 13) for n, line in enumerate(lineage)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="{PAPER}"/>{"".join(body)}</svg>\n'
    )


def _pleased(bins: Sequence[Sequence[Visit]], xs: Sequence[float]) -> list[str]:
    """Share of pleased sessions: all, with its 95 % interval (Wilson), and each cohort's as a thin line."""
    found = _frame(TOP, "sessions that pleased")
    known = [(at, _wilson([one.pleased for one in part])) for at, part in zip(xs, bins, strict=True) if part]
    upper = [(at, _y(TOP, high)) for at, (_, _, high) in known]
    lower = [(at, _y(TOP, low)) for at, (_, low, _) in known]
    band = " ".join(f"{a:.1f},{b:.1f}" for a, b in [*upper, *lower[::-1]])
    found.append(f'<polygon points="{band}" fill="{INK}" opacity="0.12"/>')
    for place, cohort in enumerate(COHORTS):
        wide = [[one for part in bins[max(0, n - 2) : n + 3] for one in part] for n in range(len(bins))]
        own = [
            (at, _y(TOP, sum(one.pleased for one in mine) / len(mine)))
            for at, part in zip(xs, wide, strict=True)
            if (mine := [one for one in part if one.cohort == cohort])
        ]
        found.append(_line(own, TINTS[cohort], 1.2))
        found.append(_text(WIDTH - RIGHT - 60 - 84 * (len(COHORTS) - 1 - place), TOP - 8, cohort, 12, TINTS[cohort]))
    return [*found, _line([(at, _y(TOP, mean)) for at, (mean, _, _) in known], INK, 2.4)]


def _shares(bins: Sequence[Sequence[Visit]], xs: Sequence[float], names: Mapping[str, str], top: float) -> list[str]:
    """Who answered, stacked."""
    found = _frame(top, "sessions answered by")
    below = [0.0] * len(bins)
    for place, (model, name) in enumerate(names.items()):
        shares = [sum(one.model == model for one in part) / len(part) if part else 0.0 for part in bins]
        above = [b + s for b, s in zip(below, shares, strict=True)]
        upper = [(at, _y(top, share)) for at, share in zip(xs, above, strict=True)]
        lower = [(at, _y(top, share)) for at, share in zip(xs, below, strict=True)]
        area = " ".join(f"{a:.1f},{b:.1f}" for a, b in [*upper, *lower[::-1]])
        found.append(f'<polygon points="{area}" fill="{COLOURS[place % len(COLOURS)]}" opacity="0.85"/>')
        found.append(_text(LEFT + 170 + 230 * place, top - 8, name, 12, COLOURS[place % len(COLOURS)], weight=600))
        below = above
    return found


def _marked(places: Sequence[tuple[float, Mark]], bottom: float) -> list[str]:
    found = []
    for n, (at, mark) in enumerate(places):
        colour = "#2f7d5b" if mark.good else "#c0533e"
        anchor, shift = ("end", -5) if at > WIDTH * 0.7 else ("start", 5)
        found.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}" stroke="{colour}" stroke-dasharray="4 3"/>'
        )
        place = bottom - 10 - 18 * (n % 3)
        found.append(_text(at + shift, place, mark.text, 12, INK, anchor=anchor, weight=600, halo=True))
    return found


def _frame(top: float, name: str) -> list[str]:
    found = [_text(LEFT, top - 8, name, 13, INK, weight=600)]
    for level in (0.0, 0.5, 1.0):
        y = _y(top, level)
        found.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{FAINT}" opacity="0.35"/>')
        found.append(_text(LEFT - 8, y + 4, f"{level:.0%}", 12, FAINT, anchor="end"))
    return found


def _y(top: float, share: float) -> float:
    return round(top + HIGH * (1.0 - share), 1)


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(
    x: float, y: float, said: str, size: int, colour: str = INK, *, anchor: str = "start", weight: int = 400,
    halo: bool = False,
) -> str:  # fmt: skip
    under = f' paint-order="stroke" stroke="{PAPER}" stroke-width="4"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}"{under}>{html.escape(said)}</text>'
    )


def _wilson(seen: Sequence[bool]) -> tuple[float, float, float]:
    """A share and its 95 % interval."""
    found = estimate(sum(seen) / len(seen), len(seen))
    assert found is not None
    return found["value"], found["low"], found["high"]


def gained(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """How much larger a share is after than before, with its 95 % interval (Newcombe 1998, his method 10)."""
    (p, p_low, p_high), (q, q_low, q_high) = _wilson(before), _wilson(after)
    low = q - p - math.hypot(q - q_low, p_high - p)
    high = q - p + math.hypot(q_high - q, p - p_low)
    return q - p, low, high
