"""Does an answer refuse? By how refusals of assistants begin. Pure.

English wording only: in other languages nothing is taken for a refusal. Used to keep refusals from being preferred by
accident; a real policy on what to refuse is a matter of goldens.
"""

from __future__ import annotations

import re

_OPENING = 240
_NOT = r"(?:can(?:no|')t|cannot|can not|couldn't|won't|will not|(?: ?am|'m) (?:unable|not able) to)"
_DO = r"(?:help|assist|provide|comply|fulfill?|answer|create|write|support|participate|engage|discuss|share|give|do)"
_REFUSAL = re.compile(
    rf"\b(?:i|we) ?{_NOT} (?:really )?{_DO}\b(?! but)(?: you)?(?: with)?"
    r" (?:that|this|it|such|any|your request|requests?|you\b|with)"
    rf"|\b(?:i'm|i am) (?:sorry|afraid)[,.]? (?:but )?(?:that )?(?:i|we) ?{_NOT} {_DO}\b(?! but)"
    rf"|^\W*sorry[,.]? (?:but )?(?:i|we) ?{_NOT} {_DO}\b(?! but)"
    r"|\b(?:i|we) (?:must|have to|need to) (?:decline|refuse)\b|\bi (?:decline|refuse) to\b"
    rf"|\bas an ai(?: language model)?,? i ?(?:{_NOT}|do not|don't)",
    re.IGNORECASE,
)


def refuses(answer: str) -> bool:
    """Whether the answer's first sentences say that it will not do what was asked."""
    return _REFUSAL.search(" ".join(answer[:_OPENING].replace("’", "'").split())) is not None
