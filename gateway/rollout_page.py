"""The page /ui/rollout: what is known of each route's rollout, as HTML. Pure; all that comes in is escaped.

It needs no script. Rows are those of `understudy.rollout_report`: an estimate is {value, low, high, of} and is never
shown without its interval, or, where it has none, without the number that it is of.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gateway.rollout_chart import NARROW, WIDE, bar, difference, signed

Row = Mapping[str, Any]
REFRESH = 10
"""Seconds after which a browser asks again."""
FIRST = 8
"""Decisions that are shown at once; the others unfold."""

PHASES = {
    "pending": ("waits to begin", "wait"),
    "running": ("running", "good"),
    "paused": ("paused", "wait"),
    "promoting": ("promoting", "good"),
    "promoted": ("promoted", "good"),
    "rolling_back": ("rolling back", "bad"),
    "rolled_back": ("rolled back", "bad"),
    "undoing": ("being undone", "bad"),
    "undone": ("undone", "bad"),
}
VERDICTS = {"successful": "good", "failed": "bad", "inconclusive": "wait"}
ACTIONS = {"rollback": "roll back", "pause": "pause", "warn": "warn"}


def page(rows: Sequence[Row], now: float, live: bool = True) -> str:
    """The whole document. `live`: it is loaded again every `REFRESH` seconds."""
    links = "".join(
        f'<a href="#{_anchor(n)}">{escape(row["route"])}{_dot(row)}</a>' for n, row in enumerate(rows) if len(rows) > 1
    )
    turn = (
        f'loads again every {REFRESH} s · <a href="?live=off">hold still</a>'
        if live
        else '<a href="?">load again by itself</a>'
    )
    body = [
        f"<header><h1>Understudy <span>rollouts</span></h1><nav>{links}</nav>",
        f'<p class="quiet">{_when(now)} UTC · {turn}</p></header><main>',
        *(_route(row, _anchor(n), now) for n, row in enumerate(rows)),
        "</main>",
    ]
    return _document("".join(body), live)


def trouble(what: str, live: bool = True) -> str:
    """The document where nothing can be read now."""
    said = f'<main><section><h2>Nothing can be shown now</h2><p class="note bad">{escape(what)}</p></section></main>'
    return _document(f"<header><h1>Understudy <span>rollouts</span></h1></header>{said}", live)


def _document(body: str, live: bool) -> str:
    again = f'<meta http-equiv="refresh" content="{REFRESH}">' if live else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        '<title>Understudy · rollouts</title><link rel="stylesheet" href="/ui/rollout.css"></head>'
        f"<body>{body}</body></html>"
    )


def _route(row: Row, anchor: str, now: float) -> str:
    rollout, standing = row["rollout"], row["standing"]
    if rollout is None:
        said = (
            "No rollout yet. The learner begins one when a challenger passes its gate."
            if row["enabled"]
            else "Nothing is rolled out on this route: the config has no <code>rollout</code> for it."
        )
        parts = [f'<p class="quiet">{said}</p>', _cast(row)]
    else:
        parts = [
            f'<p class="who">{_name(rollout["challenger"])} against {_name(rollout["control"] or row["champion"])}</p>',
            _now(row, now),
            *_notes(rollout, standing, now),
            _steps(row["stages"], rollout),
            '<div class="two">',
            _evidence(row, anchor),
            f'<div class="side">{_shares(rollout, standing)}{_cast(row)}</div></div>',
            _sides(standing),
            _guardrails(standing),
        ]
    phase = f'<span class="chip {PHASES[rollout["phase"]][1]}">{PHASES[rollout["phase"]][0]}</span>' if rollout else ""
    head = f"<h2>{escape(row['route'])} {phase}</h2>"
    return f'<section id="{anchor}">{head}{"".join(parts)}{_log(row["decisions"])}</section>'


def _now(row: Row, now: float) -> str:
    """Where it stands, in a sentence."""
    rollout, stages = row["rollout"], row["stages"]
    said = []
    if rollout["phase"] in ("running", "paused") and rollout["step"] < len(stages):
        stage = stages[rollout["step"]]
        since = _span(now - rollout["step_began"])
        said.append(f"Step {stage['step']} of {len(stages)}, {escape(stage['shown'])}, for {since}.")
    if rollout["waiting_for"]:
        said.append(f"Waits for: {escape(rollout['waiting_for'])}.")
    if rollout["phase"] != "running" and rollout["why"]:
        said.append(f"{escape(rollout['why'][:1].upper() + rollout['why'][1:])}.")
    if not rollout["active"] and rollout["ended"]:
        said.append(f"Ended {_span(now - rollout['ended'])} ago.")
    return f'<p class="now">{" ".join(said)}</p>'


def _notes(rollout: Row, standing: Row | None, now: float) -> list[str]:
    """What needs somebody's eyes."""
    said = []
    if standing is not None:
        if standing["late"]:
            ago = _span(now - standing["at"])
            said.append(("bad", f"Last looked at {ago} ago: is the controller of `understudy serve` running?"))
        said += [("bad", standing[name]) for name in ("unfit", "doubt") if standing[name] and rollout["active"]]
        if (left := standing["budget_left"]) is not None and left <= 0.25:
            what = "The error budget is spent" if left < 0 else f"{left:.0%} of the error budget is left"
            said.append(("bad" if left < 0 else "wait", f"{what}: nothing begins or goes on while it is spent."))
    if rollout["policy_changed"]:
        said.append(
            ("wait", "The config's rollout has changed since its last step; what is shown goes by the new one.")
        )
    return [f'<p class="note {tone}">{escape(text)}</p>' for tone, text in said]


def _steps(stages: Sequence[Row], rollout: Row) -> str:
    halted = {"paused": "stopped", "rolling_back": "stopped bad", "rolled_back": "stopped bad"}
    items = []
    for stage in stages:
        state = halted.get(rollout["phase"], "current") if stage["state"] == "current" else stage["state"]
        here = ' aria-current="step"' if stage["state"] == "current" else ""
        items.append(f'<li class="{escape(state)}"{here}><i></i><span>{escape(stage["shown"])}</span></li>')
    return f'<ol class="steps" aria-label="Steps">{"".join(items)}</ol>'


def _evidence(row: Row, anchor: str) -> str:
    standing = row["standing"]
    if standing is None:
        return '<div class="card"><h3>Difference in reward</h3><p class="quiet">Not looked at yet.</p></div>'
    parts = [f'<p class="{VERDICTS[standing["verdict"]]}">{escape(standing["said"])}</p>']
    judged = standing["challenger"]["judged"] + standing["control"]["judged"]
    if standing["difference"] is not None:
        number, bounds = signed(standing["difference"]), _bounds(standing["lower"], standing["upper"])
        parts.insert(0, f'<p class="large">{number} <span>{bounds}</span></p>')
        words = f"Difference {number} {bounds} after {judged} judged sessions"
        for kind, size in (("wide", WIDE), ("narrow", NARROW)):
            drawn = difference(standing["history"], row["margin"], words, size, f"{anchor}-{kind}")
            parts.append(f'<div class="chart {kind}">{drawn}</div>' if drawn else "")
        parts.append(
            '<p class="quiet key"><span class="zero">no difference</span>'
            f'<span class="margin">−{row["margin"]:g}, too small to matter</span>'
            f'<span class="band">each bound holds at every look with {standing["level"]:.0%}</span></p>'
        )
    return f'<div class="card"><h3>Difference in reward, challenger − control</h3>{"".join(parts)}</div>'


def _shares(rollout: Row, standing: Row | None) -> str:
    drawn, cap = rollout["drawn"], rollout["cap"]
    lines = [_fact("its step allows", _percent(cap))]
    if rollout["shadow"]:
        lines.append(_fact("copied in the shadow", f"{_percent(rollout['shadow'])} of requests"))
    if drawn is not None:
        spread = ""
        if drawn["segments"] > 1:
            spread = f" <small>{_percent(drawn['least'])} to {_percent(drawn['most'])} by segment</small>"
        lines.append(_fact("weights give it", _percent(drawn["share"]) + spread))
    shadow = _shadow(standing["shadow"]) if standing is not None and standing["shadow"] else ""
    drawing = bar(drawn["share"] if drawn is not None else 0.0, cap or None)
    return (
        f'<div class="card"><h3>Share of new sessions</h3>{drawing}<dl>{"".join(lines)}</dl>{shadow}'
        '<p class="quiet">The mark is what its step allows.</p></div>'
    )


def _shadow(found: Row) -> str:
    lines = [_fact("copies compared", f"{found['compared']:,}")]
    lines.append(_fact("failed, shown ones", f"{found['errors']:,}, {found['shown_errors']:,}"))
    return f"<h3>In the shadow</h3><dl>{''.join(lines)}</dl>"


def _cast(row: Row) -> str:
    aliases = row["aliases"]
    champion = _name(aliases["champion"] or row["champion"])
    own = "" if aliases["champion"] else " <small>the config's own</small>"
    lines = [_fact("champion", champion + own)]
    lines += [_fact(name, _name(aliases[name])) for name in ("challenger", "previous")]
    return f'<div class="card"><h3>Parts</h3><dl>{"".join(lines)}</dl></div>'


def _sides(standing: Row | None) -> str:
    if standing is None or not standing["challenger"]["sessions"] + standing["control"]["sessions"]:
        return ""
    sides = standing["challenger"], standing["control"]
    lines = [
        ("sessions", [f"{side['sessions']:,}, {side['judged']:,} judged" for side in sides]),
        ("mean reward", [_mean(side["reward"]) for side in sides]),
        ("satisfied", [_rate(side["satisfied"]) for side in sides]),
    ]
    body = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f'<td data-of="{of}">{cell}</td>' for of, cell in zip(("challenger", "control"), cells, strict=True))
        + "</tr>"
        for name, cells in lines
    )
    head = '<thead><tr><th></th><th scope="col">challenger</th><th scope="col">control</th></tr></thead>'
    return (
        "<h3>Sessions of the rollout <small>95% intervals of this look</small></h3>"
        f'<table class="plain">{head}<tbody>{body}</tbody></table>'
    )


def _guardrails(standing: Row | None) -> str:
    if standing is None or not standing["guardrails"]:
        return ""
    heads = ("guardrail", "challenger", "control", "limit", "evidence of a breach", "then")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(_guardrail(one, heads) for one in standing["guardrails"])
    return (
        "<h3>Guardrails <small>each trips at 100% of its evidence, where chance alone hardly ever gets</small></h3>"
        f'<table class="rails"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _guardrail(one: Row, heads: Sequence[str]) -> str:
    tone = "bad" if one["tripped"] else "wait" if one["evidence"] >= 0.5 else ""
    state = f"{_percent(one['evidence'], 0)}"
    if one["tripped"]:
        state = "tripped, excused" if one["excused"] else "tripped"
    show = _rate if not one["metric"].startswith(("latency", "first_byte")) else _seconds
    cells = (
        show(one["challenger"]),
        show(one["control"]),
        escape(one["limit"]),
        f'{bar(one["evidence"], None, tone)}<span class="{tone}">{state}</span>',
        ACTIONS.get(one["action"], escape(one["action"])),
    )
    name = escape(one["metric"].replace("_", " "))
    drawn = "".join(f'<td data-of="{of}">{cell}</td>' for of, cell in zip(heads[1:], cells, strict=True))
    return f'<tr class="{tone}"><th scope="row">{name}</th>{drawn}</tr>'


def _log(decisions: Sequence[Row]) -> str:
    if not decisions:
        return ""
    lines = [_decision(one) for one in decisions]
    older = ""
    if lines[FIRST:]:
        rest = "".join(lines[FIRST:])
        older = f"<details><summary>{len(lines) - FIRST} before</summary><ol class='log'>{rest}</ol></details>"
    return f"<h3>Decisions</h3><ol class='log'>{''.join(lines[:FIRST])}</ol>{older}"


def _decision(one: Row) -> str:
    found = one["found"]
    evidence = ""
    if found.get("difference") is not None:
        evidence = f" <small>{signed(found['difference'])} {_bounds(found['lower'], found['upper'])}</small>"
    verb = escape(one["verb"].replace("_", " "))
    return (
        f"<li>{_when(one['at'])}<span><b>{verb}</b> <i>by {escape(one['actor'])}</i>{evidence}"
        f"<br>{escape(one['why'])} <small>{escape(one['challenger'])}</small></span></li>"
    )


def _fact(name: str, value: str) -> str:
    return f"<div><dt>{name}</dt><dd>{value}</dd></div>"


def _name(version: str | None) -> str:
    return f"<code>{escape(version)}</code>" if version else "–"


def _mean(found: Row | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:.3f} <small>[{found['low']:.3f}, {found['high']:.3f}]</small>"


def _rate(found: Row | None) -> str:
    if found is None:
        return "–"
    low, high = 100.0 * found["low"], 100.0 * found["high"]
    if low == high:
        return _percent(found["value"])
    return f"{_percent(found['value'])} <small>[{low:.1f}, {high:.1f}]</small>"


def _seconds(found: Row | None) -> str:
    return "–" if found is None else f"{found['value']:.3g} s <small>of {found['of']:,}</small>"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100.0 * share:.{digits}f}%".replace(".0%", "%")


def _bounds(lower: float, upper: float) -> str:
    return f"[{signed(lower)}, {signed(upper)}]"


def _when(at: float) -> str:
    then = time.gmtime(at)
    return (
        f'<time datetime="{time.strftime("%Y-%m-%dT%H:%M:%SZ", then)}">{time.strftime("%d %b %H:%M:%S", then)}</time>'
    )


def _span(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2.0 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _dot(row: Row) -> str:
    return f' <i class="dot {PHASES[row["rollout"]["phase"]][1]}"></i>' if row["rollout"] else ""


def _anchor(place: int) -> str:
    return f"route-{place + 1}"
