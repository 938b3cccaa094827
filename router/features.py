"""What kind of request this is: a few features of its body, in a few levels each, as a short key. Pure.

    the body's fields → what is asked, and a sample of it → levels → "f1:length3.code0.tools1" → a vector in [0, 1]

Where requests are routed by their features the key is a session's segment, so rewards are counted by key, and the sums
of a key's sessions are all that a regression on its vector needs (`router.linear`). There are only as many keys as
there are combinations of levels, whatever clients send, and a request takes only so long: what is asked is its last
message, of that `SAMPLE` bytes at either end are looked into, and more than `LONG` bytes are not taken apart at all.
Patterns are sought in the JSON as it came: within a string a quote is escaped, so no text looks like a field's name.

A new version of the key (`f2:`) is due when a level's meaning changes. A key that names other features than are asked
for now is read as far as it goes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

FeatureName = Literal["length", "turns", "code", "tools", "schema", "image", "script"]
DEFAULT: tuple[FeatureName, ...] = ("length", "code", "tools", "schema", "script")

VERSION = "f1:"
LONG = 64 * 1024
SAMPLE = 4 * 1024
READ = 512
"""Bytes of its text whose script is told."""

_CODE = (b"```", b";\\n", b"{\\n", b"):\\n", b"</")
_BEYOND_ASCII = bytes(range(128, 256))
_ESCAPED = re.compile(rb"\\u(?:0[3-9a-f]|1[0-9a-d]|[3-9a-c]|d[0-7])", re.IGNORECASE)
"""A letter beyond Latin, Greek onwards, as some clients write it."""
_PART = re.compile(r"([a-z]+)([0-9])")
_items = msgspec.json.Decoder(list[msgspec.Raw])
_NOTHING = msgspec.Raw(b"null")

Fields = Mapping[str, msgspec.Raw]


class Asked(NamedTuple):
    """What a request asks."""

    fields: Fields
    size: int
    """Bytes of the last message, as JSON."""
    turns: int
    """Messages so far."""
    sample: bytes
    """Of the last message, both ends."""


class Feature(NamedTuple):
    levels: int
    level: Callable[[Asked], int]


def key_of(names: Sequence[FeatureName], fields: Fields) -> str:
    """The key of a request, from its body's fields as raw JSON. Never raises."""
    asked = _asked(fields)
    return VERSION + ".".join([f"{name}{FEATURES[name].level(asked)}" for name in names])


def keys_of(names: Sequence[FeatureName]) -> Iterator[str]:
    """Every key there can be."""
    for levels in product(*(range(FEATURES[name].levels) for name in names)):
        yield VERSION + ".".join(f"{name}{level}" for name, level in zip(names, levels, strict=True))


def is_key_of(key: str, names: Sequence[FeatureName]) -> bool:
    """Whether `key` says all of these features."""
    return not np.isnan(vector_of(key, names)).any()


def vector_of(key: str, names: Sequence[FeatureName]) -> NDArray[np.float64]:
    """The key's levels [D], each from 0 to 1; NaN where it does not say, and all NaN where it is no key of ours."""
    parts = key.removeprefix(VERSION).split(".") if key.startswith(VERSION) else []
    said = {found[1]: int(found[2]) for part in parts if (found := _PART.fullmatch(part))}
    return np.array([said[name] / (FEATURES[name].levels - 1) if name in said else np.nan for name in names])


def _asked(fields: Fields) -> Asked:
    whole = fields.get("messages") or fields.get("input") or fields.get("prompt") or _NOTHING
    last, turns = whole, 1
    if len(whole) > LONG:
        turns = LONG
    elif bytes(memoryview(whole)[:1]) == b"[":
        try:
            items = _items.decode(whole)
        except (msgspec.MsgspecError, RecursionError):  # raw JSON is looked into only now: 1e999, say
            items = []
        last, turns = (items[-1], len(items)) if items else (whole, 0)
    return Asked(fields, len(last), turns, _sample(last))


def _sample(raw: msgspec.Raw) -> bytes:
    if len(raw) <= 2 * SAMPLE:
        return bytes(raw)
    view = memoryview(raw)
    return bytes(view[:SAMPLE]) + bytes(view[-SAMPLE:])


def _length(asked: Asked) -> int:
    """Below 128 bytes 0, below 256 1, … from 4,096 on 6."""
    return min(6, max(0, asked.size.bit_length() - 7))


def _turns(asked: Asked) -> int:
    """Up to 2 messages 0, up to 6 1, up to 14 2, more 3."""
    return min(3, max(0, (asked.turns + 1).bit_length() - 2))


def _code(asked: Asked) -> int:
    """Lines that end as code does."""
    sample = asked.sample
    for mark in _CODE if b"\\n" in sample else ():
        if mark in sample:
            return 1
    return 0


def _tools(asked: Asked) -> int:
    tools = asked.fields.get("tools") or asked.fields.get("functions")
    return int(tools is not None and len(tools) > len(b"null"))


def _schema(asked: Asked) -> int:
    """The answer must be JSON: `response_format`, or `text` of the Responses API."""
    wanted = asked.fields.get("response_format") or asked.fields.get("text")
    return int(wanted is not None and b'"json_' in _sample(wanted))


def _image(asked: Asked) -> int:
    return int(b'"image_url"' in asked.sample or b'"input_image"' in asked.sample)


def _script(asked: Asked) -> int:
    """Most of the text is not Latin: even Vietnamese is ASCII for the most part."""
    start = max(0, asked.sample.find(b'"content"'))
    text = asked.sample[start : start + READ]
    if not text.isascii():
        return int(2 * len(text.translate(None, _BEYOND_ASCII)) < len(text))
    return int(b"\\u" in text and 12 * len(_ESCAPED.findall(text)) > len(text))


FEATURES: dict[FeatureName, Feature] = {
    "length": Feature(7, _length),
    "turns": Feature(4, _turns),
    "code": Feature(2, _code),
    "tools": Feature(2, _tools),
    "schema": Feature(2, _schema),
    "image": Feature(2, _image),
    "script": Feature(2, _script),
}
