"""What is to be seen of an answer without understanding it: its form, and whether it goes round in circles. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from learner.expectations import json_of, text_of
from learner.measured import Side

GRAM, REPEATED, SHORTEST = 4, 0.5, 24
"""A text of `SHORTEST` tokens repeats itself where of its runs of `GRAM` more than this share came before in it."""
LOOP = 32
"""… or where it ends in a piece of at most so many tokens, three times at least."""
CALL_MARK = "<tool_call>"
"""What a call is written with by many templates; in an answer's text it is one that the server could not read."""


class Answer(NamedTuple):
    """What a version said."""

    text: str = ""
    tool_calls: tuple[Any, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    finish: str = ""
    failed: str = ""
    """Why there is none."""

    @property
    def shown(self) -> str:
        return self.text or (json.dumps(self.tool_calls, ensure_ascii=False) if self.tool_calls else "")


Pair = dict[Side, Answer]


def answer_in(said: Mapping[str, Any], seconds: float) -> Answer:
    """The answer in a chat completion, without thoughts before it. Raises KeyError, TypeError … where there is none."""
    choice = said["choices"][0]
    message, ids = choice["message"], choice.get("token_ids") or []
    used = (said.get("usage") or {}).get("completion_tokens")
    return Answer(
        text=text_of(message.get("content")).rpartition("</think>")[2].strip(),
        tool_calls=tuple(message.get("tool_calls") or ()),
        prompt_ids=tuple(said.get("prompt_token_ids") or ()),
        token_ids=tuple(ids),
        tokens=int(used if used is not None else len(ids)),
        seconds=seconds,
        finish=str(choice.get("finish_reason") or ""),
    )


def broken(mine: Answer, other: Answer, wants_json: bool = False) -> bool:
    """No answer, cut where the other one came to an end, no JSON where people preferred JSON, a malformed tool call."""
    if mine.failed or not (mine.text.strip() or mine.tool_calls):
        return True
    if mine.finish == "length" and other.finish != "length" and not other.failed:
        return True
    if any(not _well_formed(call) for call in mine.tool_calls) or CALL_MARK in mine.text:
        return True
    return wants_json and not mine.tool_calls and not is_json(mine.text)


def _well_formed(call: Any) -> bool:
    try:
        return bool(call["function"]["name"]) and isinstance(json.loads(call["function"]["arguments"] or "{}"), dict)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def is_json(text: str | None) -> bool:
    """An object or a list: a bare number or word is as much prose."""
    try:
        return isinstance(json_of(text or ""), dict | list)
    except ValueError:
        return False


def repeats(tokens: Sequence[Any]) -> bool:
    """Whether a text goes round in circles.

    By the share of its runs of 4 tokens that came before in it (seq-rep-4, Welleck et al. 2020, 1908.04319), or by how
    it ends: greedy decoding that is caught in a loop stays in it.
    """
    count = len(tokens)
    if count < SHORTEST:
        return False
    runs = [tuple(tokens[at : at + GRAM]) for at in range(count - GRAM + 1)]
    if 1.0 - len(set(runs)) / len(runs) > REPEATED:
        return True
    return any(_tail(tokens, period) >= max(SHORTEST, 2 * period) for period in range(1, min(LOOP, count // 3) + 1))


def _tail(tokens: Sequence[Any], period: int) -> int:
    """How many of the last tokens are as those `period` before them."""
    at = len(tokens) - 1
    while at >= period and tokens[at] == tokens[at - period]:
        at -= 1
    return len(tokens) - 1 - at
