"""What the sessions of a rollout tell about its challenger and its control. Pure, and the same in whatever order.

A session takes part if its first answer was drawn in the rollout. Of its requests come errors and times, of its users
the reward (its last revision), flags, and whether they react at all; of copies in the shadow errors, times, lengths.
Everything is kept by session and summed when it is asked for, so a session that is told twice, or revised, counts once
and as it was told last. The scores' baseline is the mean of what was heard (`router.stats` says why it may be any).

The control is all of the champion's concurrent sessions: propensities make up for there being more of them. Times are
compared with an equal number of them, the newest ones.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from router import guardrails
from router.budget import is_failure
from router.reward import NOT_DRAWN
from router.rollout import Rollout
from router.rollout_policy import Guardrail
from router.rollout_policy import Rollout as Policy
from router.stats import asymptotic, tuned_rho, variance_to_detect
from telemetry.events import Interaction, Shadow

DETECT = 0.1
"""The difference in reward that the test finds soonest."""
GOOD = 0.5
"""A session whose reward is above is a satisfied one."""
MOST_TIMES = 20_000
"""Times of each side that are compared, the newest ones."""
LEAST_JUDGED = 20
"""Judged sessions of each side before the test says anything: its bounds claim nothing of the first dozens."""

Verdict = Literal["successful", "failed", "inconclusive"]
Session = tuple[str, str]


class Heard(NamedTuple):
    """What a session's users did so far."""

    reward: float | None
    flagged: bool
    reacted: bool


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One arm in the rollout."""

    sessions: int
    judged: int
    reward: float | None
    """Mean of the judged."""
    satisfied: float | None
    errors: int
    flagged: int
    reacted: int
    latency: dict[str, float] = {}
    """Seconds by quantile: p50, p95, p99."""
    first_byte: dict[str, float] = {}


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """A guardrail, as it stands."""

    metric: str
    action: str
    limit: str
    challenger: float | None
    control: float | None
    evidence: float
    """Between 0 and 1, log e over what is needed: at 1 it trips."""
    tripped: bool


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How a rollout stands: what is decided on, and shown."""

    at: float
    verdict: Verdict
    difference: float | None
    """Challenger's reward − control's, with bounds that hold at every look; None of fewer than two sessions."""
    lower: float | None
    upper: float | None
    better: bool
    """The lower bound is above 0."""
    challenger: Side
    control: Side
    judged_in_step: int
    """The challenger's judged sessions that began in this step; of a shadow, the answers compared in it."""
    guardrails: tuple[Watched, ...]
    shadow: dict[str, Any] = {}
    unfit: str = ""
    """Why the version must not go on, whatever users say: it was quarantined, say."""
    doubt_about: str = ""
    """`erased` or `shadow`: what an operator excuses who goes on."""
    doubt: str = ""
    """Why an operator must look at it: data that it learned from was erased, say."""
    budget_left: float | None = None
    """Share of the error budget; below 0 it is spent."""
    history: tuple[tuple[float, int, float, float, float], ...] = ()
    """Past looks: when, judged sessions, difference, lower, upper."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What a judge said of a shadow so far."""

    most: int
    """That will be judged."""
    judged: int = 0
    score: float = 0.0
    """Sum of the challenger's scores: 1 won, ½ a tie."""
    through: int = 0
    """Sequence number of the newest fact that was looked at."""
    at: float = 0.0

    def lost(self) -> bool:
        """Whether it clearly lost more than half; told once, when all are judged (Hoeffding 1963, at 1 %)."""
        if self.judged < self.most:
            return False
        return self.score / self.judged < 0.5 - math.sqrt(math.log(100.0) / (2 * self.judged))


def judged_name(rollout: str) -> str:
    """The name of the document that holds a rollout's `Judged`."""
    return f"shadow/{rollout}"


BASELINE_MASS = 20.0
"""How many sessions the baseline of the start is worth."""

ROW = np.dtype(
    [
        ("at", "f8"), ("ours", "?"), ("p", "f8"), ("k", "f8"), ("latency", "f8"), ("first_byte", "f8"),
        ("error", "?"), ("reward", "f8"), ("flagged", "?"), ("reacted", "?"),
    ]
)  # fmt: skip
"""Of a session: when it began, whether it is the challenger's, the propensities of challenger (p) and control (k), the
times of its first answer, and what came of it; NaN is not known."""

_COPY = np.dtype(
    [
        ("at", "f8"), ("latency", "f8"), ("first_byte", "f8"), ("error", "?"), ("length", "f8"),
        ("shown_latency", "f8"), ("shown_first_byte", "f8"), ("shown_error", "?"), ("shown_length", "f8"),
    ]
)  # fmt: skip
"""Of a request that was copied: the challenger's answer, and the one that was shown."""

Rows = NDArray[Any]


class Trial:
    """All that is known of one rollout."""

    def __init__(self, rollout: Rollout, window: float = 0.0) -> None:
        """`window`: how many seconds a session's users have to react."""
        self.id = rollout.id
        self._challenger, self._control = rollout.challenger, rollout.control
        self._window = window
        self._place: dict[Session, int] = {}
        self._known = 0
        self._rows: Rows = np.zeros(1024, ROW)
        self._copy: dict[str, int] = {}
        self._copies: Rows = np.zeros(1024, _COPY)

    def __contains__(self, session: Session) -> bool:
        return session in self._place

    def request(self, fact: Interaction) -> None:
        """One request of any session, in any order but for a session's first one, which must come first."""
        who, key = fact.answerer, (fact.tenant, fact.session)
        if who.rollout != self.id or who.unopposed or who.policy in NOT_DRAWN:
            return
        place = self._place.get(key)
        if place is None:
            if who.arm not in (self._challenger, self._control) or not 0.0 < who.rival < 1.0:
                return
            place = self._place[key] = self._known
            self._known += 1
            self._rows = _with_room(self._rows, self._known)
            ours = who.arm == self._challenger
            p, k = (who.propensity, who.rival) if ours else (who.rival, who.propensity)
            self._rows[place] = fact.at, ours, p, k, *_took(fact), False, math.nan, False, False
        if is_failure(fact):
            self._rows[place]["error"] = True

    def heard(self, session: Session, heard: Heard) -> None:
        """What a session's users did, as it stands now."""
        place = self._place.get(session)
        if place is not None:
            row = self._rows[place]
            row["reward"] = math.nan if heard.reward is None else heard.reward
            row["flagged"], row["reacted"] = heard.flagged, heard.reacted

    def shadow(self, fact: Shadow) -> None:
        """One copy of a request."""
        if fact.rollout != self.id:
            return
        place = self._copy.setdefault(fact.event_id, len(self._copy))
        self._copies = _with_room(self._copies, len(self._copy))
        ours = fact.duration, fact.first_byte or fact.duration, fact.error is not None, fact.characters
        shown = fact.shown_duration, fact.shown_first_byte or fact.shown_duration, fact.shown_error is not None
        self._copies[place] = fact.at, *ours, *shown, fact.shown_characters

    @property
    def rows(self) -> Rows:
        """A row a session, in the order in which they came to be known: a view."""
        return self._rows[: self._known]

    def add(self, rows: Rows) -> None:
        """Many sessions at once, which no fact will name (simulated ones)."""
        self._rows = _with_room(self._rows, self._known + len(rows))
        self._rows[self._known : self._known + len(rows)] = rows
        self._known += len(rows)

    def standing(self, rollout: Rollout, policy: Policy, now: float) -> Standing:
        """As of `now`; what is not known here (unfit, budget, history) is left out."""
        rows, copies = self.rows, self._copies[: len(self._copy)]
        n, h, s, ss = _scores(rows, rollout.baseline)
        alpha = policy.alpha * (1.0 - guardrails.SHARE)
        lower, upper = (float(bound) for bound in asymptotic(n, h, s, ss, alpha, _rho(alpha), 1))
        known = math.isfinite(lower)
        stage = rollout.stage(policy)
        shadowing = stage is not None and stage.kind == "shadow"
        in_step = rows["ours"] & (rows["at"] >= rollout.step_began) & ~np.isnan(rows["reward"])
        compared = int((copies["at"] >= rollout.step_began).sum())
        challenger, control = _side(rows[rows["ours"]]), _side(rows[~rows["ours"]])
        enough = min(challenger.judged, control.judged) >= LEAST_JUDGED
        return Standing(
            at=now,
            verdict=_verdict(lower, upper, policy.margin) if enough else "inconclusive",
            difference=s / h if known else None,
            lower=lower if known else None,
            upper=upper if known else None,
            better=enough and lower > 0.0,
            challenger=challenger,
            control=control,
            judged_in_step=compared if shadowing else int(in_step.sum()),
            guardrails=tuple(
                _watched(rail, _in_shadow(rail, copies) if shadowing else _live(rail, rows, now - self._window), policy)
                for rail in policy.guardrails
            ),
            shadow=_compared(copies),
        )


def _with_room(rows: Rows, size: int) -> Rows:
    while size > len(rows):
        rows = np.concatenate([rows, np.zeros_like(rows)])
    return rows


@cache
def _rho(alpha: float) -> float:
    return tuned_rho(variance_to_detect(DETECT, alpha), alpha, 1)


def _watched(rail: Guardrail, found: Found, policy: Policy) -> Watched:
    evidence, ours, theirs = found
    share = max(0.0, evidence / guardrails.needed(policy))
    return Watched(
        metric=rail.metric,
        action=rail.action,
        limit=limit_of(rail),
        challenger=ours,
        control=theirs,
        evidence=min(1.0, share),
        tripped=share >= 1.0,
    )


def limit_of(rail: Guardrail) -> str:
    """As people write it."""
    unit = " s" if rail.metric.startswith(("latency", "first_byte")) else ""
    said = [f"{rail.worse_by:g} × the control's"] if rail.worse_by is not None else []
    said += [f"above {rail.above:g}{unit}"] if rail.above is not None else []
    said += [f"below {rail.below:g}"] if rail.below is not None else []
    return " or ".join(said) or "as drawn"


def _took(fact: Interaction) -> tuple[float, float]:
    """Seconds of an answer and to its first byte; NaN is not known. Who left before the first byte waited that long."""
    if fact.error == "client_left":
        return (math.nan, fact.first_byte) if fact.first_byte is not None else (fact.duration, fact.duration)
    return (math.nan, math.nan) if fact.error else (fact.duration, fact.first_byte or fact.duration)


def _verdict(lower: float, upper: float, margin: float) -> Verdict:
    if upper < 0.0:
        return "failed"
    return "successful" if lower > -margin else "inconclusive"


def _scores(rows: Rows, baseline: float) -> tuple[float, float, float, float]:
    """n, Σh, Σy, Σy² of the judged sessions (`router.stats.scores` with `overlap` weights, written out)."""
    judged = rows[~np.isnan(rows["reward"])]
    # Sessions that are missing on one side (its users react less) must not look like a difference: the nearer the
    # baseline is to the mean, the less they do. It is the start's, moved by what was heard since.
    baseline = (BASELINE_MASS * baseline + float(judged["reward"].sum())) / (BASELINE_MASS + judged.size)
    h = judged["p"] * judged["k"] / (judged["p"] + judged["k"])
    y = np.where(judged["ours"], h / judged["p"], -h / judged["k"]) * (judged["reward"] - baseline)
    return float(judged.size), float(h.sum()), float(y.sum()), float((y * y).sum())


def _side(rows: Rows) -> Side:
    rewards = rows["reward"][~np.isnan(rows["reward"])]
    return Side(
        sessions=rows.size,
        judged=rewards.size,
        reward=_mean(rewards),
        satisfied=_mean(rewards > GOOD),
        errors=int(rows["error"].sum()),
        flagged=int(rows["flagged"].sum()),
        reacted=int(rows["reacted"].sum()),
        latency=_quantiles(_times(rows["latency"])),
        first_byte=_quantiles(_times(rows["first_byte"])),
    )


def _times(times: Rows) -> NDArray[np.float64]:
    newest = times[-MOST_TIMES:]
    return np.asarray(newest[~np.isnan(newest)])


def _quantiles(times: NDArray[np.float64]) -> dict[str, float]:
    if times.size == 0:
        return {}
    levels = (0.5, 0.95, 0.99)
    return {f"p{100 * q:.0f}": float(t) for q, t in zip(levels, np.quantile(times, levels), strict=True)}


Found = tuple[float, float | None, float | None]
"""log e, and what is shown of the challenger and the control."""


def _live(rail: Guardrail, rows: Rows, heard: float) -> Found:
    """`heard`: users of sessions that began before have had their time to react."""
    if rail.metric.startswith(("latency", "first_byte")):
        return _slower(rail, *_side_by_side(rows["ours"], rows[rail.metric.rpartition("_")[0]]))
    if rail.metric == "sample_ratio":
        drawn = rows["ours"], rows["p"], rows["k"]
        e = [guardrails.odds(*drawn), guardrails.rarer(*drawn)]
        return _worst(e), _mean(rows["ours"]), _mean(rows["p"] / (rows["p"] + rows["k"]))
    among, shows = _shown(rail.metric, rows)
    ours, theirs = shows[among["ours"]], shows[~among["ours"]]
    events = among[shows]
    e = _ratios(rail, events["ours"], events["p"], events["k"])
    if rail.above is not None:
        e.append(guardrails.tail(int(ours.sum()), ours.size, rail.above))
    if rail.below is not None:
        unwanted = ours if rail.metric == "satisfaction" else ~shows[among["ours"] & (among["at"] < heard)]
        e.append(guardrails.tail(int(unwanted.sum()), unwanted.size, 1.0 - rail.below))
    if rail.metric == "satisfaction":
        return _worst(e), _mean(~ours), _mean(~theirs)
    return _worst(e), _mean(ours), _mean(theirs)


def _shown(metric: str, rows: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """The sessions that a metric is about, and which of them show it; of satisfaction, that they are not."""
    if metric == "satisfaction":
        judged = rows[~np.isnan(rows["reward"])]
        return judged, judged["reward"] <= GOOD
    return rows, rows[{"error_rate": "error", "flag_rate": "flagged", "signal_rate": "reacted"}[metric]]


def _ratios(rail: Guardrail, ours: Rows, p: Rows, k: Rows) -> list[float]:
    if rail.worse_by is None:
        return []
    more = guardrails.odds(ours, p, k, rail.worse_by)
    if rail.metric != "signal_rate":
        return [more]
    return [more, guardrails.rarer(ours, p, k, rail.worse_by)]  # neither more nor fewer may react


def _side_by_side(ours: Rows, times: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The challenger's newest times, and those of the control's sessions that came next before them: all answers may
    be slow for an hour, in which one of them has a larger share of its sessions than the other."""
    known = ~np.isnan(times)
    ours, times = ours[known], times[known]
    places = np.flatnonzero(ours)[-MOST_TIMES:]
    before = np.maximum.accumulate(np.where(ours, -1, np.arange(ours.size)))[places]
    return np.asarray(times[places]), np.asarray(times[np.unique(before[before >= 0])])


def _slower(rail: Guardrail, ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Found:
    level = guardrails.level_of(rail.metric)
    limits = [rail.above] if rail.above is not None else []
    usual = guardrails.quantile_above(theirs, level)
    if rail.worse_by is not None and usual is not None:
        limits.append(rail.worse_by * usual)
    e = [guardrails.tail(int((ours > limit).sum()), ours.size, 1.0 - level) for limit in limits]
    shown = [float(np.quantile(times, level)) if times.size else None for times in (ours, theirs)]
    return _worst(e), shown[0], shown[1]


def _in_shadow(rail: Guardrail, copies: Rows) -> Found:
    """Each copy stands beside what was shown: one session of each arm, as if drawn with equal chances."""
    if rail.metric == "error_rate":
        ours, theirs = copies["error"], copies["shown_error"]
        who = np.repeat([True, False], [ours.sum(), theirs.sum()])
        even = np.full(who.size, 0.5)
        e = _ratios(rail, who, even, even)
        e += [guardrails.tail(int(ours.sum()), ours.size, rail.above)] if rail.above is not None else []
        return _worst(e), _mean(ours), _mean(theirs)
    if rail.metric.startswith(("latency", "first_byte")):
        good, name = _answered(copies)[-MOST_TIMES:], rail.metric.rpartition("_")[0]
        return _slower(rail, good[name], good[f"shown_{name}"])
    return 0.0, None, None


def _answered(copies: Rows) -> Rows:
    good: Rows = copies[~copies["error"] & ~copies["shown_error"]]
    return good


def _compared(copies: Rows) -> dict[str, Any]:
    """What is shown of a shadow."""
    if not copies.size:
        return {}
    good = _answered(copies)
    lengths = good["length"][good["shown_length"] > 0] / good["shown_length"][good["shown_length"] > 0]
    times = good["latency"][good["shown_latency"] > 0] / good["shown_latency"][good["shown_latency"] > 0]
    return {
        "compared": int(copies.size),
        "errors": int(copies["error"].sum()),
        "shown_errors": int(copies["shown_error"].sum()),
        "length_ratio": float(np.median(lengths)) if lengths.size else None,
        "latency_ratio": float(np.median(times)) if times.size else None,
    }


def _worst(logs: list[float]) -> float:
    """Of several e-values one: their mean is at least the largest over how many they are."""
    return max(logs) - math.log(len(logs)) if logs else 0.0


def _mean(values: Rows) -> float | None:
    return float(values.mean()) if values.size else None
