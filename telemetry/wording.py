"""Texts compared: the turns of a conversation, prose without code and quotes, likeness by character 4-grams. Pure.

Texts may be hostile, so each is cut to `CAP` characters before any work, and nothing here is worse than linear in
that: no alignment, and no pattern that backtracks. Likeness is Dice's coefficient over sets of 4-grams, as VS Code's
Copilot scores how much of its text survived.
"""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import islice
from typing import Any

import msgspec

CAP = 8000
"""Characters of a text that are looked at."""
MANY = 2000
"""A conversation with more messages is not read."""

TORN = 16
"""Characters beside a cut that may be half of something that is left out when it is whole, as a fence."""
SHORT = 12
"""4-grams; a turn with fewer cannot be told from another one."""

Turn = tuple[str, str]
"""Role, text."""

_FENCED = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*$", re.M)
_LABEL = re.compile(r"(?:assistant|ai|bot) ?: ?", re.I)
_FENCE = re.compile(r"(?:```|~~~)\w*")
_EMPHASIS = re.compile(r"[*_`~|]+")
_BULLET = re.compile(r"(?<!\S)[-+#>•]+(?!\S)")
_QUOTED = re.compile(
    r"`[^`\n]{1,400}`|\"[^\"\n]{1,400}\"|“[^“”\n]{1,400}”|«[^«»\n]{1,400}»|(?<!\w)'[^'\n]{1,400}'(?!\w)"
)
_CODE_LINE = re.compile(
    r"^(?:\s{4}|\t|\s*[>$#])|[{};]\s*$|\w\([^()\n]{0,200}\)|\w\s?[-+*/]?==?\s?\S|^\s*\w*(?:Error|Exception)\b"
    r"|^\s*(?:def|class|import|from|return|assert|print|if|for|while|File|Traceback|//)\b.*[:=()]"
)
_LINK = re.compile(r"\[([^\[\]\n]{1,200})\]\([^()\s]{1,500}\)")
_ELISION = re.compile(r"\[?\.\.\.\]?|[\[(](?:truncated|omitted|cut)[\])]", re.I)
_WORD = re.compile(r"\w+")
_PLAIN = str.maketrans("’‘“”–—‑", "''\"\"---", "\u200b\ufeff")


def turns(messages: Any) -> list[Turn]:
    """What a request asked, as turns: chat `messages`, a Responses `input` or a `prompt`; [] if there is no text.

    Instructions (system, developer) are left out: apps put the time of day into them.
    """
    if isinstance(messages, msgspec.Raw):
        try:
            messages = msgspec.json.decode(messages)
        except (msgspec.MsgspecError, RecursionError):
            return []
    if isinstance(messages, str):
        return [("user", messages)]
    if not isinstance(messages, list) or len(messages) > MANY:
        return []
    if messages and all(isinstance(one, str) for one in messages):
        return [("user", "\n".join(messages))]
    said = [(one.get("role", ""), _text(one.get("content"))) for one in messages if isinstance(one, dict)]
    return [(role, text) for role, text in said if isinstance(role, str) and role not in ("system", "developer")]


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = (part.get("text") for part in content[:MANY] if isinstance(part, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def prose(text: str) -> str:
    """`text` without what its writer did not say: code, error messages, quotes."""
    pieces = _FENCED.split(text[:CAP])
    lines = "\n".join(pieces[::2]).split("\n")
    return _QUOTED.sub(" ", "\n".join(line[:1000] for line in lines if not _CODE_LINE.search(line[:1000])))


def canonical(text: str) -> str:
    """`text` as it is after an app has passed it through its own display and back.

    Reasoning, a role's label, code fences, marks of Markdown, entities, typographic quotes and the amount of white
    space are not part of what it says. A mark that stands alone goes in code too, for apps drop the fences as well.
    """
    text = _unreasoned(text[:CAP])
    text = unicodedata.normalize("NFKC", html.unescape(text)).translate(_PLAIN)
    for pattern, kept in ((_FENCE, " "), (_LINK, r"\1"), (_EMPHASIS, " "), (_BULLET, " ")):
        text = pattern.sub(kept, text)
    text = " ".join(text.split())
    label = _LABEL.match(text)
    return text[label.end() :] if label else text


def _unreasoned(text: str) -> str:
    """Without the thoughts before the answer: some servers leave out the tag that opens them."""
    thought, closed, answer = text.partition("</think>")
    if closed:
        return answer
    return "" if thought.lstrip().startswith("<think>") else text


def cut_from(part: str, whole: str) -> bool:
    """`part` is a piece of `whole`, or `whole` with an ellipsis for its middle or end; both canonical."""
    part, whole = _squeezed(part), _squeezed(whole)
    if part in whole:
        return True
    marks = [mark.span() for mark in islice(_ELISION.finditer(part), 16)]
    return any(
        whole.startswith(part[: max(0, start - TORN)]) and whole.endswith(part[end + TORN :]) for start, end in marks
    )


def _squeezed(text: str) -> str:
    return text.replace(" ", "")


def grams(text: str, size: int = 4) -> set[str]:
    """The runs of `size` characters in `text`, case and white space aside; a shorter text is its own only run."""
    text = " ".join(text[:CAP].lower().split())
    return {text[at : at + size] for at in range(max(1, len(text) - size + 1))} if text else set()


def likeness(a: set[str], b: set[str]) -> float:
    """Dice's coefficient: 1 for equal sets, 0 for disjoint ones."""
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def containment(a: set[str], b: set[str]) -> float:
    """How much of the smaller set is in the other one."""
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def said_again(turn: str, previous: str) -> bool:
    """One turn's words stand in the other: things were added or left out, nothing was put in the place of another.

    "how to hash a string" and "how to hash a string using sha-256", but not "how to check if a number is real" and
    "… is even", though these have more characters in common. Turns of a word or two ("go on") are too short to tell.
    """
    a, b = grams(turn), grams(previous)
    shared = containment(a, b)
    if min(len(a), len(b)) < SHORT or shared < 0.8:
        return False
    one, other = set(_WORD.findall(turn[:CAP].lower())), set(_WORD.findall(previous[:CAP].lower()))
    return shared >= 0.97 or (min(len(one), len(other)) >= 3 and (one <= other or other <= one))
