"""How much of a prompt and an answer is kept: all of it, redacted, or nothing.

The recognisers know shapes, and checksums where a shape has one (card numbers: Luhn, ISO/IEC 7812-1). They err
towards removing: a number that passes as a card number goes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec


def _is_card(digits: str) -> bool:
    numbers = [int(d) for d in digits if d.isdigit()]
    doubled = [d if place % 2 == 0 else d * 2 - 9 * (d > 4) for place, d in enumerate(reversed(numbers))]
    return 13 <= len(numbers) <= 19 and sum(doubled) % 10 == 0


_PATTERNS = {
    "email": re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+"),
    "key": re.compile(
        r"\b(?:(?:sk|pk|rk|us|ghp|gho|github_pat|xox[abprs]|hf|glpat)[-_][A-Za-z0-9_-]{16,}"
        r"|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
    ),
    "card": re.compile(r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)"),
    "phone": re.compile(r"(?<![\w.])\+?\(?\d{1,4}\)?(?:[ .-]?\(?\d{2,4}\)?){2,5}(?![\w.]*\d)"),
}


def redact(text: str, recognisers: tuple[str, ...]) -> tuple[str, set[str]]:
    """`text` with what the recognisers found replaced by [name], and the names of those that found something."""
    found = set()
    for name, pattern in _PATTERNS.items():
        if name not in recognisers:
            continue

        def replace(match: re.Match[str], name: str = name) -> str:
            digits = sum(c.isdigit() for c in match[0])
            if (name == "card" and not _is_card(match[0])) or (name == "phone" and not 7 <= digits <= 15):
                return match[0]
            found.add(name)
            return f"[{name}]"

        text = pattern.sub(replace, text)
    return text, found


class Kept(NamedTuple):
    """What of a request and its answer may be kept."""

    messages: msgspec.Raw | None = None
    answer: str | None = None
    tool_calls: msgspec.Raw | None = None


@dataclass(frozen=True, slots=True)
class Capture:
    """The capture policy. `text`: full, redacted or off; `redact`: names of recognisers."""

    text: Literal["full", "redacted", "off"] = "full"
    redact: tuple[str, ...] = ("email", "phone", "card", "key")

    def keep(
        self, messages: msgspec.Raw | None, answer: str, tool_calls: list[dict[str, Any]]
    ) -> tuple[Kept, tuple[str, ...]]:
        """What to keep of a request and its answer, and which recognisers removed something."""
        if self.text == "off":
            return Kept(), ("off",)
        calls = msgspec.Raw(msgspec.json.encode(tool_calls)) if tool_calls else None
        if self.text == "full":
            return Kept(messages, answer or None, calls), ()
        found: set[str] = set()
        asked = self._walk(msgspec.json.decode(messages), found) if messages else None
        said = self._walk(answer, found) if answer else None
        called = self._walk(tool_calls, found) if tool_calls else None
        kept = Kept(
            msgspec.Raw(msgspec.json.encode(asked)) if asked is not None else None,
            said,
            msgspec.Raw(msgspec.json.encode(called)) if called is not None else None,
        )
        return kept, tuple(sorted(found))

    def line(self, text: str | None) -> str | None:
        """What to keep of a text that came as feedback."""
        if text is None or self.text == "off":
            return None
        return text if self.text == "full" else redact(text, self.redact)[0]

    def _walk(self, value: Any, found: set[str]) -> Any:
        if isinstance(value, str):
            clean, names = redact(value, self.redact)
            found |= names
            return clean
        if isinstance(value, list):
            return [self._walk(item, found) for item in value]
        if isinstance(value, dict):
            return {key: self._walk(item, found) for key, item in value.items()}
        return value
