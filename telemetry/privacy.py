"""How much of a prompt and an answer is kept: all of it, redacted, or nothing.

The recognisers know shapes, and checksums where a shape has one (card numbers: Luhn, ISO/IEC 7812-1). They err
towards removing: a number that passes as a card number goes. Other recognisers (Presidio's, say) can go over what is
kept, before it is trained on (`masked`, `understudy mask`).

Which policy holds for an answer is decided by its route, its tenant and what its user agreed to (`Captures`). What was
kept goes when it is too old (`stripped`) or its user asks for it (`forgotten`); the numbers that came of it stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from telemetry.events import Decision, Fact, Interaction, Shadow

# Quantifiers before something that may be missing are bounded: a text may be an image of a megabyte in base64.
_UUID = r"(?P<uuid>\b[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}\b)"
_PATTERNS = {
    "email": re.compile(r"[\w.+%-]{1,64}@[\w-]+(?:\.[\w-]+)+"),
    "key": re.compile(
        r"\b(?:(?:sk|pk|rk|us|ghp|gho|github_pat|xox[abprs]|hf|glpat)[-_][A-Za-z0-9_-]{16,}"
        r"|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,2000}\.[\w-]{8,}\.[\w-]{8,})"
    ),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "card": re.compile(rf"{_UUID}|(?<!\d)\d(?:[ -]?\d){{12,}}"),
    "phone": re.compile(rf"{_UUID}|(?<![\w.])\+?\(?\d{{1,4}}\)?(?:[ .-]?\(?\d{{2,4}}\)?){{2,5}}(?![\w.]{{0,40}}\d)"),
}
_SEPARATOR = re.compile("([ -])")


def redact(text: str, recognisers: tuple[str, ...]) -> tuple[str, set[str]]:
    """`text` with what the recognisers found replaced by [name], and the names of those that found something."""
    found = set()
    for name, pattern in _PATTERNS.items():
        if name in recognisers:
            clean = pattern.sub(_MASKS.get(name, f"[{name}]"), text)
            if clean != text:
                found.add(name)
            text = clean
    return text, found


def _mask_cards(match: re.Match[str]) -> str:
    """A run of digits that is a card number, or the ones in it: an expiry date or a check number may stand beside."""
    if match["uuid"]:
        return match[0]
    if _is_card(_digits(match[0])):
        return "[card]"
    parts = _SEPARATOR.split(match[0])  # digits at even places
    kept: list[str] = []
    at = 0
    while at < len(parts):
        ends = range(min(at + 9, len(parts)), at, -2)
        end = next((end for end in ends if _printed_as_card(parts[at:end:2])), None)
        kept += ["[card]"] if end else parts[at : at + 1]
        at = end or at + 1
        kept += parts[at : at + 1]
        at += 1
    return "".join(kept)


def _printed_as_card(groups: list[str]) -> bool:
    *first, last = map(len, groups)
    shaped = not first or (set(first) == {4} and last <= 4) or (first == [4, 6] and last in (4, 5))
    return shaped and _is_card("".join(groups))


def _is_card(digits: str) -> bool:
    if not 13 <= len(digits) <= 19:
        return False
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return (sum(map(int, digits[::-2])) + sum(doubled) - 9 * sum(d > 9 for d in doubled)) % 10 == 0


def _mask_phones(match: re.Match[str]) -> str:
    if match["uuid"]:
        return match[0]
    if len(_digits(match[0])) <= 15:
        return "[phone]" if len(_digits(match[0])) >= 7 else match[0]
    # More than a number has (ITU-T E.164): several, or something else.
    return " ".join("[phone]" if 7 <= len(_digits(part)) <= 15 else part for part in match[0].split(" "))


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _mask_ibans(match: re.Match[str]) -> str:
    """An account number by its check digits (ISO 13616: mod 97 of it rearranged is 1); letters after it are kept."""
    parts = match[0].split(" ")
    for end in range(len(parts), 0, -1):
        whole = "".join(parts[:end])
        if 15 <= len(whole) <= 34 and int("".join(str(int(c, 36)) for c in whole[4:] + whole[:4])) % 97 == 1:
            return " ".join(["[iban]", *parts[end:]])
    return match[0]


_MASKS = {"card": _mask_cards, "phone": _mask_phones, "iban": _mask_ibans}


Level = Literal["full", "redacted", "off"]
LEVELS: tuple[Level, ...] = ("full", "redacted", "off")
"""How much text is kept, from all to none."""
Recogniser = Literal["email", "phone", "card", "key", "iban"]
RECOGNISERS: tuple[Recogniser, ...] = ("email", "phone", "card", "key", "iban")
CONSENTED = (None, "serve", "train")
"""What a user may have agreed to so that text is kept at all; None is an app that does not say."""


class Kept(NamedTuple):
    """What of a request and its answer may be kept."""

    messages: msgspec.Raw | None = None
    answer: str | None = None
    tool_calls: msgspec.Raw | None = None


@dataclass(frozen=True, slots=True)
class Capture:
    """The capture policy. `text`: full, redacted or off; `redact`: names of recognisers."""

    text: Level = "full"
    redact: tuple[Recogniser, ...] = RECOGNISERS

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

        def mask(text: str) -> str:
            clean, names = redact(text, self.redact)
            found.update(names)
            return clean

        asked = _each_text(msgspec.json.decode(messages), mask) if messages else None
        said = mask(answer) if answer else None
        called = _each_text(tool_calls, mask) if tool_calls else None
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

    def label(self, name: str | None) -> str | None:
        """What to keep of a name that an app gave, of an outcome say: it is no text, but may hold what is masked."""
        return name if name is None or self.text == "full" else redact(name, self.redact)[0]


@dataclass(frozen=True, slots=True)
class Captures:
    """The capture policies of all routes and tenants.

    `default` holds where nothing else is written; of what is written for a route and for a tenant, the stricter.
    """

    default: Capture = field(default_factory=Capture)
    routes: Mapping[str, Level] = field(default_factory=dict)
    tenants: Mapping[str, Level] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all text is kept, but where a user did not agree to it."""
        return {self.default.text, *self.routes.values(), *self.tenants.values()} == {"full"}

    def of(self, route: str, tenant: str, consent: str | None) -> Capture:
        """What may be kept of an answer, and of what is said about it."""
        if consent not in CONSENTED:
            return Capture("off")
        if not self.routes and not self.tenants:
            return self.default
        written = [level for level in (self.routes.get(route), self.tenants.get(tenant)) if level is not None]
        return Capture(strictest(written), self.default.redact) if written else self.default

    def of_any(self, answers: Iterable[tuple[str, str | None]], tenant: str) -> Capture:
        """What may be kept of a text about several answers, (route, consent) each; or about one not known yet."""
        about = list(answers) or [(route, None) for route in ("", *self.routes)]
        levels = [self.of(route, tenant, consent).text for route, consent in about]
        return Capture(strictest(levels), self.default.redact)


def strictest(levels: Iterable[Level]) -> Level:
    return max(levels, key=LEVELS.index)


def stripped(fact: Fact) -> Fact:
    """`fact` without any text that people or models wrote."""
    if isinstance(fact, Decision):
        return fact
    if isinstance(fact, Shadow):
        if fact.answer is None and fact.tool_calls is None:
            return fact
        return msgspec.structs.replace(fact, answer=None, tool_calls=None, redacted=("gone",))
    if isinstance(fact, Interaction):
        if fact.messages is None and fact.answer is None and fact.tool_calls is None:
            return fact
        return msgspec.structs.replace(fact, messages=None, answer=None, tool_calls=None, redacted=("gone",))
    return msgspec.structs.replace(fact, text=None, target=fact.target if fact.kind == "comparison" else None)


def masked(fact: Fact, mask: Callable[[str], str]) -> Fact:
    """`fact` with each of its texts as `mask` returns it."""
    if isinstance(fact, Decision):
        return fact
    if isinstance(fact, Shadow):
        return msgspec.structs.replace(
            fact, answer=_each_text(fact.answer, mask), tool_calls=_each_text(fact.tool_calls, mask)
        )
    if isinstance(fact, Interaction):
        return msgspec.structs.replace(
            fact,
            messages=_each_text(fact.messages, mask),
            answer=_each_text(fact.answer, mask),
            tool_calls=_each_text(fact.tool_calls, mask),
        )
    target = fact.target if fact.kind == "comparison" else _each_text(fact.target, mask)
    return msgspec.structs.replace(fact, text=_each_text(fact.text, mask), target=target)


def _each_text(value: Any, mask: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, list):
        return [_each_text(item, mask) for item in value]
    if isinstance(value, dict):
        return {key: _each_text(item, mask) for key, item in value.items()}
    return value


def forgotten(fact: Fact, nobody: str) -> Fact:
    """`fact` without text and without what could lead back to its user, in whose place stands `nobody`.

    Arm, times, sizes, and what was good or bad stay, so what was learned from it can still be counted anew.
    """
    bare = stripped(fact)
    if isinstance(bare, Interaction):
        return msgspec.structs.replace(
            bare, user=nobody, task_id=None, retrieval_ids=(), country=None, input_hash=None, thread=None, previous=None
        )
    if isinstance(bare, Shadow):
        return msgspec.structs.replace(bare, user=nobody)
    if isinstance(bare, Decision):
        return bare
    return msgspec.structs.replace(bare, subject=nobody)
