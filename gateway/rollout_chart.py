"""Drawings of the rollout page as SVG text: the difference with its confidence sequence, and bars. Pure.

Nothing here carries a style of its own: the page's stylesheet colours classes, so that no inline style is needed.
Texts do not scale with a drawing's width, so the page shows a chart of its own to narrow screens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Look = Sequence[float]
"""When, judged sessions, difference, lower, upper."""
WIDE, NARROW = (680, 250), (340, 210)
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 10.0, 36.0


class _Frame(NamedTuple):
    """Where values lie in the drawing."""

    width: float
    height: float
    first: float
    last: float
    low: float
    high: float

    def x(self, sessions: float) -> float:
        share = (sessions - self.first) / (self.last - self.first)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def difference(history: Sequence[Look], margin: float, title: str, size: tuple[int, int], name: str) -> str:
    """The looks so far over judged sessions: a line in its band, lines at 0 and −margin; "" of fewer than two looks.

    `title` says it in words to those who do not see it and is escaped already; `name` tells drawings of a page apart.
    """
    looks = [look for look in history if all(map(math.isfinite, look))]
    if len(looks) < 2 or looks[0][1] >= looks[-1][1]:
        return ""
    width, height = size
    low, high = _reach(looks, margin)
    frame = _Frame(width, height, looks[0][1], looks[-1][1], low, high)
    upper = [(frame.x(look[1]), frame.y(look[4])) for look in looks]
    lower = [(frame.x(look[1]), frame.y(look[3])) for look in looks]
    middle = [(frame.x(look[1]), frame.y(look[2])) for look in looks]
    floor = height - BOTTOM
    inner = f'x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}" height="{floor - TOP}"'
    return "".join(
        [
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title">',
            f'<title id="{name}-title">{title}</title>',
            f'<clipPath id="{name}-inner"><rect {inner}/></clipPath>',
            *_grid(frame, 5 if width > 400 else 3),
            f'<g clip-path="url(#{name}-inner)"><polygon class="band" points="{_points([*upper, *lower[::-1]])}"/>',
            f'<polyline class="bound" points="{_points(upper)}"/><polyline class="bound" points="{_points(lower)}"/>',
            _level(frame, -margin, "margin") if margin else "",
            _level(frame, 0.0, "zero"),
            f'<polyline class="middle" points="{_points(middle)}"/></g>',
            f'<circle class="now" cx="{middle[-1][0]:.1f}" cy="{middle[-1][1]:.1f}" r="3.5"/>',
            f'<text class="about" x="{(LEFT + width - RIGHT) / 2:.1f}" y="{height - 4}" text-anchor="middle">'
            "judged sessions of both</text></svg>",
        ]
    )


def bar(share: float, mark: float | None = None, tone: str = "") -> str:
    """A bar that is filled to `share` of its length, with a mark at another one."""
    filled = 100.0 * min(1.0, max(0.0, share))
    at = f'<rect class="mark" x="{99.2 * min(1.0, max(0.0, mark)):.2f}" width=".8" height="8"/>' if mark else ""
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="empty" width="100" height="8" rx="1"/>'
        f'<rect class="full {tone}" width="{filled:.2f}" height="8" rx="1"/>{at}</svg>'
    )


def _reach(looks: Sequence[Look], margin: float) -> tuple[float, float]:
    """From where to where values are shown: all of the later half's bounds. The first ones are too wide to be told."""
    half = (looks[0][1] + looks[-1][1]) / 2.0
    late = [look for look in looks if look[1] >= half]
    low = min(-margin, 0.0, *(look[3] for look in late))
    high = max(0.0, *(look[4] for look in late))
    room = 0.12 * (high - low) or 0.01
    return low - room, high + room


def _grid(frame: _Frame, most: int) -> list[str]:
    end, floor = frame.width - RIGHT, frame.height - BOTTOM
    drawn = []
    for value in _round_values(frame.low, frame.high, 5):
        y = frame.y(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{signed(value, 2)}</text>')
    for sessions in _round_values(frame.first, frame.last, most):
        x = frame.x(sessions)
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        anchor = "end" if x > end - 18 else "middle"
        drawn.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="{anchor}">{sessions:,.0f}</text>')
    return drawn


def _round_values(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most `most` or one more."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _level(frame: _Frame, value: float, kind: str) -> str:
    y = frame.y(value)
    return f'<line class="{kind}" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def signed(value: float, digits: int = 3) -> str:
    """+0.034, −0.006 with a true minus, 0.00 of nothing."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"
