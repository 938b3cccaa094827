"""A gate's report for machines (`gate.json`), for people (`gate.html`), and for the registry (`summary`).

The page is one file without scripts or anything from elsewhere, and says who wrote what it shows: users and models, so
every text is escaped. Both files hold prompts and answers of users; `without` takes a user's out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from learner.diagnosis import Diagnosis
from learner.gate import Check, Report
from learner.questions import Shown
from telemetry.errors import UnderstudyError

JSON, PAGE = "gate.json", "gate.html"
GONE = "(taken out)"
_WIDE, _HIGH = 220, 18
_STYLE = """
:root { color-scheme: light dark; --pass: #1a7f37; --fail: #c62828; --inconclusive: #9a6700; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 strong { text-transform: uppercase; }
.pass { color: var(--pass); } .fail { color: var(--fail); } .inconclusive { color: var(--inconclusive); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
blockquote { margin: .2rem 0; padding-left: .6rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; }
svg { display: block; } svg line { stroke: currentColor; } svg .limit { stroke-dasharray: 2 2; }
small, footer { opacity: .75; }
"""


class Document(msgspec.Struct, frozen=True):
    """What `gate.json` holds."""

    report: Report
    diagnosis: Diagnosis | None = None


class Paths(NamedTuple):
    json: Path
    page: Path


class BadReport(UnderstudyError):
    """A report that cannot be read; says which file and what to do."""


def write(folder: Path, report: Report, diagnosis: Diagnosis | None = None) -> Paths:
    """Both files into `folder`, each whole or as it was before; the JSON last."""
    folder.mkdir(parents=True, exist_ok=True)
    body = msgspec.json.encode(Document(report, diagnosis), order="deterministic")
    paths = Paths(folder / JSON, folder / PAGE)
    _put(paths.page, page(report, diagnosis).encode("utf-8", "replace"))
    _put(paths.json, msgspec.json.format(body, indent=2) + b"\n")
    return paths


def read(folder: Path) -> Document:
    """Raises `BadReport`."""
    path = folder / JSON
    try:
        return msgspec.json.decode(path.read_bytes(), type=Document)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise BadReport(f"{path} cannot be read ({error}); evaluate the version again") from None


def _put(path: Path, body: bytes) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with work.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def without(report: Report, users: Collection[str] = (), ids: Collection[str] = ()) -> Report:
    """The report without the text of items of these users or with these ids; the numbers stay."""

    def kept(one: Shown) -> Shown:
        gone = one.user in users or one.id in ids
        return Shown(one.id, "", GONE, GONE, GONE, GONE) if gone else one

    checks = tuple(replace(check, examples=tuple(map(kept, check.examples))) for check in report.checks)
    return replace(report, checks=checks)


def clean(folder: Path, ids: Collection[str] = (), users: Collection[str] = ()) -> None:
    """Take the text of these items, or of these people's (`people.who`), out of all reports below a folder.

    One that cannot be read is taken away: it may hold what must go.
    """
    for path in folder.glob(f"*/{JSON}"):
        try:
            known = read(path.parent)
        except BadReport:
            shutil.rmtree(path.parent)
            continue
        after = without(known.report, users, ids)
        if after != known.report:
            write(path.parent, after, known.diagnosis)


def summary(report: Report) -> dict[str, Any]:
    """What the registry keeps with the version: the verdict and the numbers, no text of users."""
    main = report.main
    return {
        "verdict": report.verdict,
        "why": report.why,
        "champion": report.champion,
        "dataset": report.dataset,
        "main": {"name": main.name, "value": main.value, "lower": main.lower, "upper": main.upper, "n": main.n},
        "checks": {check.name: check.verdict for check in report.checks},
        "divergence": report.divergence,
        "referee": report.referee.name,
    }


# ---- the page ----


def page(report: Report, diagnosis: Diagnosis | None = None) -> str:
    title = f"{report.challenger} beside {report.champion}: {report.verdict}"
    return "".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>",
            f'<h1><strong class="{report.verdict}">{report.verdict}</strong> '
            f"{escape(report.challenger)} beside {escape(report.champion)}</h1>",
            f"<p>{escape(report.why)}</p>",
            _diagnosis(diagnosis),
            f"<h2>Checks</h2>{_checks(report.checks)}",
            f"<p><small>Intervals: each bound misses with chance {report.alpha:g}. The dashed line is the limit. "
            "p: that it is on the wrong side of the limit.</small></p>",
            _referee(report),
            *(f"<p>{escape(note)}</p>" for note in report.notes),
            "<h2>What decided it</h2>",
            *map(_examples, (check for check in report.checks if check.examples)),
            f"<footer><p>Dataset {escape(report.dataset)}, seed {report.seed}.</p></footer></main></body></html>\n",
        )
    )


def _diagnosis(found: Diagnosis | None) -> str:
    if found is None:
        return ""
    rows = (
        f"<li><b>{escape(cause.name)}</b> ({cause.weight:g}): {escape('; '.join(cause.reasons))}. "
        f"{_change(cause.change)}</li>"
        for cause in found.causes
    )
    if found.causes:
        return f"<h2>Why, probably</h2><ol>{''.join(rows)}</ol>"
    return f"<h2>Why</h2><p>{escape(found.why)}</p>"


def _change(change: dict[str, Any]) -> str:
    if not change:
        return "No round can change that."
    return f"The next round would have <code>{escape(msgspec.json.encode(change).decode())}</code>"


def _checks(checks: Iterable[Check]) -> str:
    head = "<tr><th>check</th><th>verdict</th><th>why</th><th>value</th><th>interval</th><th>p</th><th>of</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(map(_row, checks))}</table></div>'


def _row(check: Check) -> str:
    margins = (
        "" if check.nats is None else f"<br><small>margins {check.nats[0]:+.3f}, {check.nats[1]:+.3f} nats</small>"
    )
    aside = "" if check.blocks else "<br><small>does not block</small>"
    of = f"{check.n} items, {check.users} users" if check.users else f"{check.n} items" if check.n else ""
    return (
        f"<tr><th scope=row>{escape(check.name)}<br><small>{check.kind}</small></th>"
        f'<td class="{check.verdict}">{check.verdict}{aside}</td>'
        f"<td>{escape(check.why)}{margins}</td>"
        f'<td class="number">{_number(check.value)}</td><td>{_interval(check)}</td>'
        f'<td class="number">{_number(check.p)}</td><td class="number">{of}</td></tr>\n'
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interval(check: Check) -> str:
    """The interval and the limit on one line, as SVG."""
    if check.lower is None or check.upper is None or check.limit is None or check.value is None:
        return ""
    low, high = min(check.lower, check.limit, check.value), max(check.upper, check.limit, check.value)
    room = (high - low) or 1.0

    def x(value: float) -> str:
        return f"{5 + (_WIDE - 10) * (value - low) / room:.1f}"

    said = f"{check.lower:.4g} to {check.upper:.4g}, limit {check.limit:.4g}"
    return (
        f'<svg class="{check.verdict}" width="{_WIDE}" height="{_HIGH}" role="img"><title>{said}</title>'
        f'<line x1="{x(check.lower)}" x2="{x(check.upper)}" y1="9" y2="9" stroke-width="2"/>'
        f'<circle cx="{x(check.value)}" cy="9" r="4" fill="currentColor"/>'
        f'<line class="limit" x1="{x(check.limit)}" x2="{x(check.limit)}" y1="0" y2="{_HIGH}"/></svg>'
        f"<small>{said}</small>"
    )


def _referee(report: Report) -> str:
    who = report.referee
    told = {"agreement": who.agreement, "Pearson": who.pearson, "Spearman": who.spearman}
    measured = ", ".join(f"{name} {value:.2f}" for name, value in told.items() if value is not None) or "not measured"
    asked = f"{who.asked} asked, {who.failed} without a verdict"
    why = f" {escape(who.why)}" if who.why else ""
    divergence = (
        "" if report.divergence is None else f" {report.divergence:.0%} of its tokens differ from the champion's."
    )
    judged = f"Duels were judged by {escape(who.name)}: {measured} with people on {who.pairs} pairs; {asked}."
    return f"<p>{judged}{why}{divergence}</p>"


def _examples(check: Check) -> str:
    return f'<h3 class="{check.verdict}">{escape(check.name)}</h3>{"".join(map(_example, check.examples))}'


def _example(one: Shown) -> str:
    prompt = f"<p>Prompt</p><blockquote>{escape(one.prompt)}</blockquote>" if one.prompt else ""
    return (
        f"<section><p><code>{escape(one.id)}</code> {escape(one.note)}</p>{prompt}"
        f"<p>Champion</p><blockquote>{escape(one.champion)}</blockquote>"
        f"<p>Challenger</p><blockquote>{escape(one.challenger)}</blockquote></section>\n"
    )
