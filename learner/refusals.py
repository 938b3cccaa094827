"""Does an answer refuse? By how refusals of assistants begin. Pure.

English wording only: in other languages nothing is taken for a refusal. Used to keep refusals from being preferred by
accident; a real policy on what to refuse is a matter of goldens.
"""

from __future__ import annotations

import re

_OPENING = 200
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able|afraid)\b.{0,60}\b(?:can(?:no|')t|cannot|unable|not able|won't)"
    r"|(?:i|we) (?:can(?:no|')t|cannot|can not|won't|will not|must decline|have to decline|am unable|am not able)"
    r" (?:to )?(?:help|assist|provide|do|comply|fulfil|answer|create|write|support|participate|engage)"
    r"|i must (?:decline|refuse)|i (?:decline|refuse) to|as an ai(?: language model)?,? i (?:can|am|do)(?:no|')?t)",
    re.IGNORECASE | re.DOTALL,
)


def refuses(answer: str) -> bool:
    """Whether the answer's first sentences say that it will not do what was asked."""
    return _REFUSAL.search(answer[:_OPENING].replace("’", "'")) is not None
