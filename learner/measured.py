"""What an evaluation found about a challenger beside the champion, item by item, for the gate to decide on.

Each item names the user it came from, for the gate's statistics are clustered by user: a user's items are not
independent, and many of one user's are not much evidence.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Side = Literal["champion", "challenger"]


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """A held-out pair, and how much likelier each version finds the answer that people preferred."""

    id: str
    """Of the example."""
    user: str
    signal: str
    """Why it is a pair: `comparison`, `regenerate`, `edit`, …"""
    cohort: str = ""
    dataset: str = ""
    """Name of the dataset whose held-out part it is from: this round's, or an earlier one's."""
    champion: float
    """log p(chosen) − log p(rejected), nats a token; the version agrees with people where it is above 0."""
    challenger: float


class Duel(msgspec.Struct, frozen=True, kw_only=True):
    """Both versions' answers to one held-out prompt, from the replicas that will serve them, and who won."""

    id: str
    user: str
    prompt: str
    cohort: str = ""
    answers: dict[Side, str]
    tokens: dict[Side, int]
    seconds: dict[Side, float]
    score: float | None = None
    """The challenger's: 1 won, 0 lost, ½ a tie (as where a judge changes with the order); None if nobody could tell."""
    repetitive: dict[Side, bool]
    broken: dict[Side, bool]
    """No answer, cut, or not of the form that was asked for (JSON, a tool call)."""
    refused: dict[Side, bool]
    divergence: float | None = None
    """Share of tokens at which the challenger says another one than the champion, after the champion's."""


class GoldenResult(msgspec.Struct, frozen=True, kw_only=True):
    """How both versions did on a golden."""

    id: str
    owner: str
    kind: Literal["text", "regex", "json_schema", "tool_call", "rubric", "code", "refuse", "answer"]
    """`refuse`: must be refused; `answer`: must not be."""
    passed: dict[Side, bool | None]
    """None where nobody could tell (a rubric's judge is down)."""
    why: dict[Side, str]
    answers: dict[Side, str]
    must: bool = False
    """One failure of the challenger is enough."""


class Referee(msgspec.Struct, frozen=True, kw_only=True):
    """Who told the winner of duels, and how far people agree with that."""

    name: str
    """`judge:MODEL`, `reward model`, or `nobody`."""
    pearson: float | None = None
    """Between its scores and people's votes on pairs that people judged; None where there are too few."""
    spearman: float | None = None
    agreement: float | None = None
    """Share of people's pairs on which it agrees with them, ties a half."""
    least: float | None = None
    """The share that is sure (95 %, one-sided, by user)."""
    pairs: int = 0
    """That these were measured on."""
    asked: int = 0
    failed: int = 0
    """Times that it gave no answer, or nonsense."""
    why: str = ""
    """Of `nobody`."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    champion: str
    challenger: str
    dataset: str
    """This round's, by its manifest's hash."""
    agreement: float | None
    """Share of PEFT's tokens that replicas say with the challenger, the worst replica's; None if not served."""
    preferences: tuple[Preference, ...]
    duels: tuple[Duel, ...]
    goldens: tuple[GoldenResult, ...]
    referee: Referee
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""
