"""May a challenger meet users? From what was measured to a verdict, with the items that decided it. Pure.

Three kinds of checks. A *must* is a fact: it is served, it did not fall apart, no golden that must hold is broken, who
judged the duels agrees with people. The *main* metric must be better: the win rate above ½, or accuracy on held-out
pairs above the champion's. *Guards* must not be worse by more than a margin.

Everything is paired (both versions met the same items) and clustered by user (`learner.halves`), with three claims:

- The challenger is better. One test at α, so one that is no better passes with chance ≤ α.
- It is no worse in any guard. Each guard is tested at α for "worse beyond the margin", and all that block must reject
  that: one beyond a margin passes with chance ≤ α, however many guards there are (Berger 1982, "Multiparameter
  hypothesis testing and acceptance sampling", the intersection–union test).
- It is worse in some guard. That one seems so by chance is likelier the more there are, so these p's are Holm's: a
  challenger within all margins fails with chance ≤ α.

In between a guard is inconclusive. The whole fails if anything fails, passes if the main metric and all guards that
block pass, and is inconclusive else. Extras (accuracy by signal, cohort and round; duels lost, where they are not the
main metric) can fail it; they block only where there is enough to show a harmless challenger harmless: `min_users`,
and a margin of twice the interval's reach.

Goldens are a list that somebody wrote, no sample of anything: they pass by count. They fail beyond the margin if the
difference is no luck (by the same test, Holm's among lists), since one answer may come out otherwise by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import Literal

import msgspec
from msgspec.structs import replace

from learner.halves import Evidence, holm
from learner.measured import Duel, Measured, Preference, Referee, Side
from learner.plan import Gate
from learner.questions import (
    MOST_SLICES,
    SHOWN,
    Item,
    Question,
    Shown,
    guard_questions,
    main_question,
    ranked,
    scored,
    shown,
    values_of,
)

Verdict = Literal["pass", "fail", "inconclusive"]
FORMAT = 1
SERVED = 0.99
"""Share of PEFT's tokens that every replica must say."""
UNTOLD = 0.2
"""Share of questions to a judge that may go unanswered."""
FEW = 30
"""Items below which nothing is called a collapse."""
FAR = 0.25
"""A win rate below this, or an accuracy so far below the champion's, is a collapse."""
_DIGITS = 6


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One question and its answer. Guards are better the lower, the main metric is better the higher."""

    name: str
    kind: Literal["main", "guard", "must"]
    verdict: Verdict
    why: str
    blocks: bool = True
    """Whether the challenger cannot pass while it is inconclusive."""
    value: float | None = None
    limit: float | None = None
    lower: float | None = None
    upper: float | None = None
    """Each bound misses with chance α; None where nothing is known."""
    champion: float | None = None
    challenger: float | None = None
    """Each version's own mean."""
    nats: tuple[float, float] | None = None
    """Mean margins of champion and challenger, nats a token; of preferences."""
    n: int = 0
    users: int = 0
    p: float | None = None
    """That it is on the wrong side of the limit: small where it passes. Lists of goldens are counted, and have none."""
    p_worse: float | None = None
    """Of a guard, Holm's: that it is within the limit; small where it fails."""
    examples: tuple[Shown, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict and all that led to it."""

    format: int = FORMAT
    verdict: Verdict
    why: str
    champion: str
    challenger: str
    dataset: str
    checks: tuple[Check, ...]
    referee: Referee
    divergence: float | None
    alpha: float
    seed: int
    again: bool = False
    """Whoever should have judged was away: the same challenger may be measured again."""
    notes: tuple[str, ...] = ()

    def check(self, name: str) -> Check | None:
        return next((one for one in self.checks if one.name == name), None)

    @property
    def main(self) -> Check:
        return next(one for one in self.checks if one.kind == "main")


def decide(measured: Measured, policy: Gate, seed: int = 0) -> Report:
    """The same measurements, policy and seed give the same report, to the byte."""
    referee = _referee(measured)
    trusted = referee.verdict == "pass"
    needed = policy.main == "win_rate" or policy.judge is not None
    musts = [_served(measured), *_must_goldens(measured), _collapse(measured, trusted)]
    musts += [referee] if needed else []
    main = _main(measured, policy, referee, seed)
    guards = _guards(guard_questions(measured, policy, trusted), policy, seed)
    checks = (*musts, main, *guards)
    verdict, why = _together(checks)
    divergences = [duel.divergence for duel in measured.duels if duel.divergence is not None]
    return Report(
        verdict=verdict,
        why=why,
        champion=measured.champion,
        challenger=measured.challenger,
        dataset=measured.dataset,
        checks=checks,
        referee=measured.referee,
        divergence=_rounded(fmean(divergences)) if divergences else None,
        alpha=policy.alpha,
        seed=seed,
        again=needed and _untold(measured) != "",
        notes=(*measured.notes, *_notes(measured, policy, trusted)),
    )


def _together(checks: Sequence[Check]) -> tuple[Verdict, str]:
    failed = [one for one in checks if one.verdict == "fail"]
    open_ = [one for one in checks if one.verdict == "inconclusive" and one.blocks]
    if found := failed or open_:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        why = "; ".join(f"{one.name}: {one.why}" for one in found[:SHOWN]) + more
        return "fail" if failed else "inconclusive", why
    main = next(one for one in checks if one.kind == "main")
    return "pass", f"{main.name}: {main.why}; nothing that is guarded is worse beyond its margin"


def _notes(measured: Measured, policy: Gate, trusted: bool) -> list[str]:
    notes = []
    if not measured.goldens:
        notes.append("there are no goldens; write some under learner.dataset.goldens")
    if policy.main == "preference" and not trusted:
        notes.append("nobody could be trusted to judge the duels, so the win rate was not looked at")
    for name, count in values_of(measured, ("signal", "cohort", "dataset")).items():
        if count > MOST_SLICES:
            notes.append(f"of {count} {name}s the {MOST_SLICES} with the most pairs were looked at apart")
    return notes


# ---- musts ----


def _served(measured: Measured) -> Check:
    share = measured.agreement
    why = "no replica serves it" if share is None else f"replicas say {share:.1%} of PEFT's tokens"
    verdict: Verdict = "pass" if share is not None and share >= SERVED else "fail"
    return Check(name="served", kind="must", verdict=verdict, why=why, value=_rounded(share), limit=SERVED)


def _must_goldens(measured: Measured) -> list[Check]:
    musts = sorted((one for one in measured.goldens if one.must), key=lambda one: one.id)
    broken = [one for one in musts if one.passed["challenger"] is False]
    untold = [one for one in musts if one.passed["challenger"] is None]
    verdict: Verdict = "fail" if broken else "inconclusive" if untold else "pass"
    why = {
        "fail": f"{len(broken)} of {len(musts)} are broken",
        "inconclusive": f"nobody could tell for {len(untold)} of {len(musts)}",
        "pass": f"all {len(musts)} hold",
    }[verdict]
    examples = tuple(map(shown, (broken or untold)[:SHOWN]))
    name = "goldens that must hold"
    return [Check(name=name, kind="must", verdict=verdict, why=why, n=len(musts), examples=examples)] if musts else []


_SIDES: tuple[Side, Side] = ("challenger", "champion")


def _malformed(duel: Duel, side: Side) -> bool:
    return duel.broken[side] or duel.repetitive[side]


def _collapse(measured: Measured, trusted: bool) -> Check:
    """Whether it fell apart so plainly that no test is needed, nor many users."""
    duels, pairs = measured.duels, measured.preferences
    scores, ranks = scored(measured), ranked(measured)
    found: list[tuple[str, Sequence[Item]]] = []
    if len(duels) >= FEW:
        ours, theirs = (fmean(_malformed(duel, side) for duel in duels) for side in _SIDES)
        if ours >= 0.5 and theirs < ours / 2:
            said = f"{ours:.0%} of its answers are broken or repeat themselves, {theirs:.0%} of the champion's"
            found.append((said, [duel for duel in duels if _malformed(duel, "challenger")]))
    if trusted and len(scores) >= FEW and (won := fmean(seen.challenger for seen in scores)) < FAR:
        found.append((f"it wins {won:.0%} of its duels", [seen.item for seen in scores if seen.challenger < 0.5]))
    if len(pairs) >= FEW:
        lost = [one for one in pairs if not math.isfinite(one.challenger)]
        if len(lost) > 0.1 * len(pairs):
            found.append((f"{len(lost)} of {len(pairs)} of its margins are no numbers", lost))
        fell = fmean(seen.champion - seen.challenger for seen in ranks)
        if fell >= FAR:
            wrong: list[Item] = [seen.item for seen in ranks if seen.challenger < seen.champion]
            found.append((f"{fell:.0%} fewer held-out pairs are ranked as people did", wrong))
    why = "; ".join(said for said, _ in found) or "it did not fall apart"
    items = sorted(found[0][1], key=lambda one: one.id)[:SHOWN] if found else ()
    verdict: Verdict = "fail" if found else "pass"
    n = len(duels) + len(pairs)
    return Check(name="collapse", kind="must", verdict=verdict, why=why, n=n, examples=tuple(map(shown, items)))


def _referee(measured: Measured) -> Check:
    """Whether the winners of duels may be believed: it answered, and agrees with people more often than a coin."""
    who = measured.referee
    verdict: Verdict = "inconclusive"
    if who.name == "nobody":
        why = who.why or "nobody could judge the duels"
    elif untold := _untold(measured):
        why = untold
    elif who.agreement is None or who.least is None:
        why = (
            f"nobody knows whether {who.name} agrees with people: there are no pairs that people judged to ask it about"
        )
    elif not who.least > 0.5:
        why = f"{who.name} agrees with people on {who.agreement:.0%} of {who.pairs} pairs, no more surely than a coin"
    else:
        verdict, why = "pass", f"{who.name} agrees with people on {who.agreement:.0%} of {who.pairs} pairs"
    bare = Check(name="referee", kind="must", verdict=verdict, why=why, limit=0.5, n=who.pairs)
    return replace(bare, value=_rounded(who.agreement), lower=_rounded(who.least))


def _untold(measured: Measured) -> str:
    """Where the referee was away: what it did not tell."""
    who, unscored = measured.referee, len(measured.duels) - len(scored(measured))
    if who.failed > UNTOLD * who.asked:
        return f"{who.name} gave no verdict {who.failed} of {who.asked} times; see that it is up, and ask again"
    if who.name != "nobody" and unscored > UNTOLD * len(measured.duels):
        return (
            f"{who.name} gave no verdict on {unscored} of {len(measured.duels)} duels; see that it is up, and ask again"
        )
    return ""


# ---- the main metric, and guards ----


def _main(measured: Measured, policy: Gate, referee: Check, seed: int) -> Check:
    asked = main_question(measured, policy)
    found = asked.evidence(seed)
    bare = _check(asked, found, policy.alpha)
    verdict: Verdict = "inconclusive"
    p, p_worse = found.p_above(asked.limit), found.p_below(asked.limit)
    if policy.main == "win_rate" and referee.verdict != "pass":
        why = referee.why
    elif found.users < policy.min_users:
        why = f"{found.n} items of {found.users} users; {policy.min_users} users are needed"
    elif p <= policy.alpha:
        verdict, why = "pass", bare.why
    elif p_worse <= policy.alpha:
        verdict, why = "fail", bare.why
    else:
        why = f"{bare.why}{_wanted(bare, policy.alpha)}"
    examples = asked.deciding(best=verdict == "pass")
    return replace(bare, verdict=verdict, why=why, p=_rounded(p), p_worse=_rounded(p_worse), examples=examples)


def _wanted(check: Check, alpha: float) -> str:
    """How many items would find five points in four of five cases."""
    if check.lower is None or check.upper is None:
        return ""
    z = NormalDist().inv_cdf(1.0 - alpha)
    error = (check.upper - check.lower) / 2 / z
    needed = check.n * ((z + NormalDist().inv_cdf(0.8)) * error / 0.05) ** 2
    return f"; about {max(10, round(needed, -1)):.0f} items would find 5 points" if needed > check.n else ""


def _guards(asked: Sequence[Question], policy: Gate, seed: int) -> list[Check]:
    found = [question.evidence(seed) for question in asked]
    worse = [1.0] * len(asked)
    for is_list in (False, True):
        places = [place for place, question in enumerate(asked) if question.is_list == is_list]
        ps = holm([found[place].p_above(0.0 if is_list else asked[place].limit) for place in places])
        for place, p in zip(places, ps, strict=True):
            worse[place] = p
    return [_guard(*row, policy) for row in zip(asked, found, worse, strict=True)]


def _guard(asked: Question, found: Evidence, worse: float, policy: Gate) -> Check:
    bare = _check(asked, found, policy.alpha)
    verdict: Verdict = "inconclusive"
    p = found.p_below(asked.limit)
    few = found.users < policy.min_users and not asked.is_list
    reach = math.inf if few or found.value is None else found.interval(policy.alpha)[1] - found.value
    held = found.value is not None and (found.value <= asked.limit if asked.is_list else p <= policy.alpha and not few)
    if found.value is None:
        why = bare.why
    elif worse <= policy.alpha and found.value > asked.limit:
        verdict, why = "fail", f"{bare.why}; {asked.limit_said}"
    elif asked.untold > UNTOLD * (asked.untold + found.n):
        why = f"nobody could tell for {asked.untold} of {asked.untold + found.n}"
    elif held:
        verdict, why = "pass", f"{bare.why}; {asked.limit_said}"
    else:
        doubt = "it may be worse" if reach <= asked.room or asked.is_list else "too little to tell"
        why = f"{doubt}: {bare.why}; {asked.limit_said}"
    examples = () if verdict == "pass" else asked.deciding()
    return replace(
        bare,
        verdict=verdict,
        why=why,
        blocks=not asked.is_extra or reach <= asked.room / 2,
        p=None if asked.is_list else _rounded(p),
        p_worse=_rounded(worse),
        examples=examples,
    )


def _check(asked: Question, found: Evidence, alpha: float) -> Check:
    """What was found, without a verdict yet."""
    lower, upper = found.interval(alpha) if not asked.is_list else (None, None)
    champion, challenger = _mean(seen.champion for seen in asked.seen), _mean(seen.challenger for seen in asked.seen)
    pairs = [seen.item for seen in asked.seen if isinstance(seen.item, Preference)]
    return Check(
        name=asked.name,
        kind="main" if asked.is_main else "guard",
        verdict="inconclusive",
        why=asked.said(found, alpha, champion, challenger),
        value=_rounded(found.value),
        limit=asked.limit,
        lower=_rounded(lower),
        upper=_rounded(upper),
        champion=_rounded(champion) if found.n else None,
        challenger=_rounded(challenger) if found.n else None,
        nats=(_mean(pair.champion for pair in pairs), _mean(pair.challenger for pair in pairs)) if pairs else None,
        n=found.n,
        users=0 if asked.is_list else found.users,
    )


def _mean(values: Iterable[float]) -> float:
    """Of those that are numbers; 0 of none."""
    found = [value for value in values if math.isfinite(value)]
    return round(fmean(found), _DIGITS) if found else 0.0


def _rounded(value: float | None) -> float | None:
    """JSON has no infinity; what is not known is None."""
    return round(value, _DIGITS) if value is not None and math.isfinite(value) else None
