"""Does a user's next turn complain about the answer before it, or give thanks for it? Pure.

A linear model over words and pairs of words (multinomial logistic regression) whose weights `scripts/train_tone.py`
learnt from texts of its own grammar, and a few patterns that are surer than it. It knows English only: a turn with too
many words that the grammar never used says nothing, whatever its language.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Literal, NamedTuple

from telemetry.wording import prose

Kind = Literal["complaint", "thanks"]
KINDS: tuple[Kind, Kind] = ("complaint", "thanks")

SURE = 0.9
"""The least probability that counts."""
KNOWN = 0.7
"""The least share of words that the grammar knows."""
READ = 32
"""Words at the beginning of a turn that are read: a verdict comes first."""

_WORD = re.compile(r"[^\W\d_]+")
_SHORT_FORMS = (
    (re.compile(r"\b(do|does|did|is|was|are|were|have|has|would|could|should)n'?t\b"), r"\1 not"),
    (re.compile(r"\b(can|won)'?t\b"), r"\1 not"),
    (re.compile(r"\b(that|it|what|there|here)'s\b"), r"\1 is"),
    (re.compile(r"\b(i|you|we|they)'(m|re|ve|ll|d)\b"), r"\1 \2"),
    (re.compile(r"\b(?:thx|thanx|ty|tysm)\b"), "thanks"),
)
_ASKS = re.compile(
    r"(?:how|what|why|when|where|who|which|can|could|would|should|is|are|do|does|write|make|create|generate|translate"
    r"|summari[sz]e|explain|give|show)\b"
)
_NOT_A_VERDICT = re.compile(r"\bin advance\b|\bthank(?:s| you) (?:note|letter|card|e ?mail|message|speech|page)\b")
_OPENING = r"(?:(?:no|nope|but|sorry|hmm|still|well|ok|okay|yes|great|perfect|nice|cool|awesome) )*"
_THE_ANSWER = r"(?:it|this|that|(?:the|your) (?:code|answer|solution|function|result|output)|code)"
_PATTERNS: tuple[tuple[str, Kind, re.Pattern[str]], ...] = (
    ("not what I asked for", "complaint", re.compile(r".*\bnot what i (?:(?:am|m|ve|had) )?(?:ask|want|mean|need)")),
    ("does not work", "complaint", re.compile(
        f"{_OPENING}{_THE_ANSWER} (?:still )?(?:does|did|is|was) (?:still )?not work"
    )),
    ("that is wrong", "complaint", re.compile(
        f"{_OPENING}{_THE_ANSWER} (?:is|was) (?:(?:still|just|all) )?(?:wrong|incorrect|not (?:right|correct|true|it$))"
    )),
    ("you did not", "complaint", re.compile(
        f"{_OPENING}you (?:did not|(?:just )?(?:forgot|missed|ignored|misunderstood)|made a mistake)"
    )),
    ("thanks", "thanks", re.compile(f"{_OPENING}(?:many )?thank(?:s| you)")),
    ("that works", "thanks", re.compile(
        f"{_OPENING}{_THE_ANSWER} (?:worked|works|is perfect)(?: (?:now|perfectly|great|well|fine|thanks)|$)"
    )),
)  # fmt: skip


class Tone(NamedTuple):
    kind: Kind
    confidence: float
    reason: str
    """Which pattern, or the model; never the user's words."""


@cache
def _model() -> dict[str, list[float]]:
    """Weights by feature, of complaint and thanks, against 0 for neither; "" is the bias. Read when first asked."""
    found: dict[str, list[float]] = json.loads(files("telemetry").joinpath("tone.json").read_text("utf-8"))
    return found


def read(text: str) -> list[str]:
    """The first words of what a turn itself says, in lower case, short forms written out."""
    said = " ".join(prose(text)[:1000].split()).lower().replace("’", "'")
    for pattern, long in _SHORT_FORMS:
        said = pattern.sub(long, said)
    return _WORD.findall(said)[:READ]


def features(words: list[str]) -> set[str]:
    """What the model sees: words, and pairs of neighbours, with a mark at both ends."""
    return {*words, *(f"{a} {b}" for a, b in pairwise(["^", *words, "$"]))}


def tone(turn: str) -> Tone | None:
    """The tone of `turn`; None if it has neither, is a request of its own, or is in no English that we know."""
    words = read(turn)
    model = _model()
    said = " ".join(words)
    known = sum(word in model for word in words)
    if not words or known < KNOWN * len(words) or _NOT_A_VERDICT.search(said):
        return None
    for name, kind, pattern in _PATTERNS:
        if pattern.match(said):
            return Tone(kind, 0.95, f"the next turn has the pattern “{name}”")
    if _ASKS.match(said):
        return None
    odds = dict(zip(KINDS, _probabilities(features(words)), strict=True))
    kind = max(KINDS, key=odds.__getitem__)
    return Tone(kind, round(odds[kind], 3), "the next turn reads so") if odds[kind] >= SURE else None


def _probabilities(seen: set[str]) -> tuple[float, float]:
    """Of complaint and of thanks."""
    model = _model()
    weights = [model[""], *filter(None, map(model.get, sorted(seen)))]
    complaint, thanks = (sum(one) for one in zip(*weights, strict=True))
    top = max(0.0, complaint, thanks)
    shares = math.exp(complaint - top), math.exp(thanks - top)
    total = sum(shares) + math.exp(-top)
    return shares[0] / total, shares[1] / total
