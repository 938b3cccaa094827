"""Protobuf's wire format, as much of it as OTLP's attributes and spans need.

A message is its fields, in any order. A field is a tag, which holds its number and kind, and its value; one with a
length (a string, bytes, another message) has that before it. Source: protobuf.dev/programming-guides/encoding. Numbers
of fields: opentelemetry-proto 1.x, `common.proto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any

_SMALL = [bytes([n]) for n in range(128)]
_DOUBLE = Struct("<d").pack


def varint(n: int) -> bytes:
    """A number from 0, seven bits a byte, the lowest first."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(tag: bytes, body: bytes) -> bytes:
    """One that has a length."""
    length = len(body)
    return tag + (_SMALL[length] if length < 128 else varint(length)) + body


def text(tag: bytes, words: str) -> bytes:
    return field(tag, words.encode("utf-8", "replace"))  # half a surrogate pair is no reason to lose a span


def key(name: str) -> bytes:
    """The first field of a KeyValue."""
    return text(b"\x0a", name)


def pair(written_key: bytes, value: Any) -> bytes:
    """A KeyValue, which is what attributes are."""
    return written_key + field(b"\x12", any_value(value))


def any_value(value: Any) -> bytes:
    """An AnyValue; what is no boolean, number or string is one of its sequences, or written as text."""
    if isinstance(value, str):
        return text(b"\x0a", value)
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        if 0 <= value < 128:
            return b"\x18" + _SMALL[value]
        if -(1 << 63) <= value < 1 << 63:
            return b"\x18" + varint(value % (1 << 64))
        return any_value(float(value))
    if isinstance(value, float):
        return b"\x21" + _DOUBLE(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return field(b"\x2a", b"".join([field(b"\x0a", any_value(one)) for one in value]))
    return text(b"\x0a", str(value))
