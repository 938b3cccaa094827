"""What is asked of a challenger: the main metric, the guards, and the items that speak to each. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from learner.halves import Evidence, Row, evidence
from learner.measured import Duel, GoldenResult, Measured, Preference, Side
from learner.plan import Gate

Form = Literal["more", "less", "ratio", "won", "lost"]
"""Of the number that is looked at: what the challenger has more or less of than the champion, its sum over the
champion's, or the mean of its own or the champion's."""
Item = Preference | Duel | GoldenResult
SHOWN = 3
EXCERPT = 600
MOST_SLICES = 12


class Shown(msgspec.Struct, frozen=True):
    """An item that decided a check. Holds text of users: it must go when the dataset's does (`gate_report.without`)."""

    id: str
    user: str
    prompt: str
    champion: str
    challenger: str
    note: str = ""


class Seen(NamedTuple):
    """An item and each version's number for it."""

    item: Item
    user: str
    champion: float
    challenger: float


class Question(NamedTuple):
    """A number that must not be above its limit; of the main metric, that must be."""

    name: str
    what: str
    form: Form
    limit: float
    seen: Sequence[Seen]
    is_main: bool = False
    is_extra: bool = False
    """Looked at besides: it blocks only where there is enough to tell."""
    is_list: bool = False
    """Goldens: all that there are."""
    untold: int = 0
    """Items for which nobody could tell."""

    @property
    def room(self) -> float:
        """How far the limit is from where the versions are alike."""
        return self.limit - _ALIKE[self.form]

    def evidence(self, seed: int) -> Evidence:
        return evidence(map(_ROWS[self.form], self.seen), seed, () if self.is_list else _EXTREMES[self.form])

    def deciding(self, best: bool = False) -> tuple[Shown, ...]:
        """The items that speak most against the challenger, or for it; of one user each."""
        sign = 1.0 if self.is_main == best else -1.0

        def speaks(seen: Seen) -> float:
            row = _ROWS[self.form](seen)
            return sign * (row.top - _ALIKE[self.form] * row.bottom)

        chosen: dict[str, Seen] = {}
        for seen in sorted(self.seen, key=lambda seen: (-speaks(seen), seen.item.id)):
            if len(chosen) == SHOWN or speaks(seen) <= 0:
                break
            chosen.setdefault(seen.user, seen)
        return tuple(shown(seen.item) for seen in chosen.values())

    def said(self, found: Evidence, alpha: float, champion: float, challenger: float) -> str:
        """The number in words, with the levels of both versions."""
        if found.value is None:
            return f"{self.what}: nothing was measured"
        low, high = found.interval(alpha)
        if self.form == "ratio":
            return f"{found.value:.2f} times the champion's {self.what} {_between(low, high, '.2f')}"
        if self.form in ("won", "lost"):
            return f"{self.what} {found.value:.1%} {_between(low, high, '.1%')}"
        if self.form == "less":
            low, high = 0.0 - high, 0.0 - low
        levels = f"{self.what} {challenger:.1%}, the champion {champion:.1%}"
        points = f"{levels}: {100 * (challenger - champion):+.1f} points"
        return points if self.is_list else f"{points} {_between(100 * low, 100 * high, '+.1f')}"

    @property
    def limit_said(self) -> str:
        if self.form == "ratio":
            return f"at most {self.limit:g}"
        if self.form in ("more", "less"):
            return f"at most {100 * self.limit:.1f} points {self.form}"
        return f"at most {self.limit:.1%}"


_ROWS: dict[Form, Callable[[Seen], Row]] = {
    "more": lambda seen: Row(seen.user, seen.challenger - seen.champion),
    "less": lambda seen: Row(seen.user, seen.champion - seen.challenger),
    "ratio": lambda seen: Row(seen.user, seen.challenger, seen.champion),
    "won": lambda seen: Row(seen.user, seen.challenger),
    "lost": lambda seen: Row(seen.user, seen.champion),
}
_ALIKE: dict[Form, float] = {"more": 0.0, "less": 0.0, "ratio": 1.0, "won": 0.5, "lost": 0.5}
"""What the number is where the versions are alike."""
_EXTREMES: dict[Form, tuple[float, ...]] = {
    "more": (-1.0, 1.0),
    "less": (-1.0, 1.0),
    "ratio": (),
    "won": (0.0, 1.0),
    "lost": (0.0, 1.0),
}


def main_question(measured: Measured, policy: Gate) -> Question:
    if policy.main == "win_rate":
        return Question("win rate", "of its duels with the champion it wins", "won", 0.5, scored(measured), True)
    return Question("preference", "held-out pairs ranked as people did", "more", 0.0, ranked(measured), True)


def guard_questions(measured: Measured, policy: Gate, trusted: bool) -> list[Question]:
    """All guards; `trusted`: whether the duels' winners may be believed."""
    margins = policy.margins

    def of(value: Callable[[Duel, Side], float]) -> list[Seen]:
        both = (Seen(duel, duel.user, value(duel, "champion"), value(duel, "challenger")) for duel in measured.duels)
        return [seen for seen in both if math.isfinite(seen.champion) and math.isfinite(seen.challenger)]

    refused = of(lambda duel, side: duel.refused[side])
    broken, repetitive = of(lambda duel, side: duel.broken[side]), of(lambda duel, side: duel.repetitive[side])
    tokens, seconds = of(lambda duel, side: duel.tokens[side]), of(lambda duel, side: duel.seconds[side])
    asked = [
        Question("refuses more", "prompts refused", "more", margins.refusals, refused),
        Question("refuses less", "prompts refused", "less", margins.refusals, refused),
        Question("broken", "answers broken", "more", margins.form, broken),
        Question("repetitive", "answers that repeat themselves", "more", margins.form, repetitive),
        Question("length", "tokens", "ratio", policy.max_length_ratio, tokens),
        Question("seconds", "time", "ratio", policy.max_slowdown, seconds),
    ]
    if policy.max_divergence is not None:
        shares = ((duel, duel.divergence) for duel in measured.duels)
        told = [Seen(duel, duel.user, 0.0, it) for duel, it in shares if it is not None and math.isfinite(it)]
        asked.append(Question("divergence", "tokens that differ:", "more", policy.max_divergence, told))
    if policy.main == "win_rate":
        asked.append(_preference("preference", ranked(measured), margins.preference))
    elif trusted:
        most = 0.5 + margins.win_rate
        asked.append(Question("duels lost", "of its duels it loses", "lost", most, scored(measured), is_extra=True))
    for name, kinds in _LISTS.items():
        asked += _goldens(measured, name, kinds, margins.goldens)
    return [*asked, *_slices(measured, margins.preference)]


_LISTS: dict[str, Collection[str]] = {
    "goldens to refuse": {"refuse"},
    "goldens to answer": {"answer"},
    "goldens": {"text", "regex", "json_schema", "tool_call", "rubric", "code"},
}


def _goldens(measured: Measured, name: str, kinds: Collection[str], margin: float) -> list[Question]:
    goldens = [one for one in measured.goldens if one.kind in kinds]
    seen = [
        Seen(one, one.id, float(one.passed["champion"] or 0), float(one.passed["challenger"] or 0))
        for one in goldens
        if None not in one.passed.values()
    ]
    untold = len(goldens) - len(seen)
    least = max(margin, 1 / max(1, len(seen)))  # one may be luck; the operator marks those that must hold
    asked = Question(name, "goldens that hold", "less", least, seen, is_list=True, untold=untold)
    return [asked] if goldens else []


def _slices(measured: Measured, margin: float) -> list[Question]:
    asked = []
    for name, word in (("signal", "signal"), ("cohort", "cohort"), ("dataset", "round")):
        parts: dict[str, list[Seen]] = {}
        for seen in ranked(measured):
            parts.setdefault(getattr(seen.item, name), []).append(seen)
        largest = sorted(parts, key=lambda part: (-len(parts[part]), part))[:MOST_SLICES] if len(parts) > 1 else []
        asked += [_preference(f"preference, {word} {part or '(none)'}", parts[part], margin, True) for part in largest]
    return asked


def _preference(name: str, seen: Sequence[Seen], margin: float, is_extra: bool = False) -> Question:
    return Question(name, "held-out pairs ranked as people did", "less", margin, seen, is_extra=is_extra)


def scored(measured: Measured) -> list[Seen]:
    told = ((duel, duel.score) for duel in measured.duels)
    return [Seen(duel, duel.user, 1.0 - score, score) for duel, score in told if score is not None and 0 <= score <= 1]


def ranked(measured: Measured) -> list[Seen]:
    return [Seen(one, one.user, _right(one.champion), _right(one.challenger)) for one in measured.preferences]


def _right(margin: float) -> float:
    """1 if the preferred answer is the likelier one, ½ at no difference; what is no number is wrong."""
    return 0.0 if not math.isfinite(margin) else 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0


def shown(item: Item) -> Shown:
    """An item for people to read."""
    match item:
        case Preference():
            margins = [f"{margin:+.3f} nats a token" for margin in (item.champion, item.challenger)]
            note = f"{item.signal}: the preferred answer's margin"
            return Shown(item.id, item.user, "", margins[0], margins[1], note)
        case Duel():
            texts = [_clipped(item.answers[side]) for side in ("champion", "challenger")]
            won = (
                "nobody could tell" if item.score is None else {0.0: "it lost", 1.0: "it won"}.get(item.score, "a tie")
            )
            faults = [name for name in ("broken", "repetitive", "refused") if getattr(item, name)["challenger"]]
            size = f"{item.tokens['challenger']} tokens in {item.seconds['challenger']:.1f} s"
            beside = f"the champion's {item.tokens['champion']} in {item.seconds['champion']:.1f} s"
            note = ", ".join([won, *faults, size, beside])
            return Shown(item.id, item.user, _clipped(item.prompt), texts[0], texts[1], note)
        case GoldenResult():
            texts = [_clipped(item.answers[side]) for side in ("champion", "challenger")]
            note = f"{item.kind} of {item.owner}: {item.why.get('challenger', '')}"
            return Shown(item.id, "", "", texts[0], texts[1], _clipped(note))


def _between(low: float, high: float, form: str) -> str:
    return f"({low:{form}} to {high:{form}})" if math.isfinite(low) else "(too few users for an interval)"


def _clipped(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…"


def values_of(measured: Measured, names: Iterable[str]) -> dict[str, int]:
    """How many different ones of each there are among the pairs."""
    return {name: len({getattr(one, name) for one in measured.preferences}) for name in names}
