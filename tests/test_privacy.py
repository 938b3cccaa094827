"""What is kept of a prompt, an answer and a comment: everything, a redacted text, or nothing."""

from __future__ import annotations

import random
import time
import uuid
from typing import Any

import msgspec
import pytest

from telemetry.privacy import Capture, Kept, redact

ALL = ("email", "phone", "card", "key")
REDACTED = Capture("redacted")


def clean(text: str) -> str:
    return redact(text, ALL)[0]


def kept(
    messages: Any = None, answer: str = "", tool_calls: list[dict[str, Any]] | None = None, capture: Capture = REDACTED
) -> tuple[Any, str | None, Any, tuple[str, ...]]:
    raw = msgspec.Raw(msgspec.json.encode(messages)) if messages is not None else None
    found, names = capture.keep(raw, answer, tool_calls or [])
    asked, called = (msgspec.json.decode(part) if part is not None else None for part in (found[0], found[2]))
    return asked, found.answer, called, names


@pytest.mark.parametrize(
    "email", ["ann@example.com", "a.b-c+tag@mail.example.co.uk", "jürgen@bücher.example", "x_1%y@1.example.org"]
)
def test_an_email_address_is_masked(email: str) -> None:
    assert redact(f"Write to {email}, please.", ALL) == ("Write to [email], please.", {"email"})
    assert clean(f"<{email}>") == "<[email]>"


@pytest.mark.parametrize("text", ["look @ this", "@ann said so", "a@b", "from x import y as @z"])
def test_an_at_sign_alone_is_no_email_address(text: str) -> None:
    assert redact(text, ALL) == (text, set())


@pytest.mark.parametrize(
    "phone",
    [
        "+49 171 1234567", "+4917112345678", "0171 2345678", "030-1234567", "(555) 123-4567", "555-123-4567",
        "555.123.4567", "+1 (555) 123-4567", "555-1234",
    ],
)  # fmt: skip
def test_a_phone_number_is_masked(phone: str) -> None:
    assert redact(f"Call {phone} today", ALL) == ("Call [phone] today", {"phone"})
    assert clean(f"tel:{phone}.") == "tel:[phone]."


def test_phone_numbers_side_by_side_are_masked() -> None:
    assert clean("555-123-4567 555-987-6543") == "[phone] [phone]"
    assert clean("+49 171 1234567, +49 171 7654321") == "[phone], [phone]"
    left = clean("0171 1234567 0171 7654321")
    assert "1234567" not in left
    assert "7654321" not in left


@pytest.mark.parametrize(
    "card",
    [
        "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "378282246310005",
        "3782 822463 10005", "4222222222222", "6304000000000000000",
    ],
)  # fmt: skip
def test_a_card_number_is_masked(card: str) -> None:
    assert redact(f"My card is {card}.", ALL) == ("My card is [card].", {"card"})


@pytest.mark.parametrize("after", ["12/27", "123", "12/27 123", "1227 123", "0"])
@pytest.mark.parametrize("card", ["4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111"])
def test_a_card_number_is_masked_with_other_numbers_around_it(card: str, after: str) -> None:
    assert clean(f"pay {card} {after}").startswith("pay [card]")
    left = clean(f"item 7 {card} {after}")
    assert "[card]" in left
    assert "1111" not in left


@pytest.mark.parametrize(
    "number", ["4111 1111 1111 1112", "4111111111111112", "1234567890123456", "5555-5555-5555-4445"]
)
def test_a_long_number_that_is_no_card_is_kept(number: str) -> None:
    assert redact(f"Order {number} came", ALL) == (f"Order {number} came", set())


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-abcdefghijklmnop1234", "us_abcdefghijklmnopqrstuv", "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "hf_abcdefghijklmnopqrst", "xoxb-123456789012-abcdefghij", "AKIAIOSFODNN7EXAMPLE", "glpat-abcdefghij0123456789",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    ],
)  # fmt: skip
def test_a_key_is_masked(key: str) -> None:
    assert redact(f"export KEY={key} # mine", ALL) == ("export KEY=[key] # mine", {"key"})


@pytest.mark.parametrize(
    "text",
    [
        "In 2024 it rained.",
        "from 2019 to 2024",
        "1999, 2000 and 2001",
        "It costs 12.50 or 1299, not 99999.",
        "call 112 or 911",
        "at 10:30 on 24 May",
        "version 3.11.7",
        "room 101-102",
        "sk-short and task-list",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "018f3a5c2b7e41d4a716446655440000",
        "commit 54b97c4",
    ],
)
def test_years_short_numbers_and_hashes_are_kept(text: str) -> None:
    assert redact(text, ALL) == (text, set())


def test_uuids_are_kept() -> None:
    rng = random.Random(1)
    ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2000)]
    ids += ["550e8400-e29b-41d4-a716-446655440000", "12345678-1234-4234-8234-123456789012", str(uuid.UUID(int=0))]
    assert [i for i in ids if clean(f"id {i} here") != f"id {i} here"] == []
    assert clean(f"{ids[-2]} 555-123-4567") == f"{ids[-2]} [phone]"


def test_several_secrets_of_one_text_are_masked_and_named() -> None:
    found = redact("ann@example.com, bob@example.com or 555-123-4567", ALL)
    assert found == ("[email], [email] or [phone]", {"email", "phone"})


def test_only_the_recognisers_that_were_named_look() -> None:
    text = "ann@example.com 555-123-4567"
    assert redact(text, ()) == (text, set())
    assert redact(text, ("phone",)) == ("ann@example.com [phone]", {"phone"})
    assert Capture("redacted", ("email",)).line(text) == "[email] 555-123-4567"


@pytest.mark.parametrize("unit", ["a", "1", "1 ", "a.", "a@", "4111 ", "-", "+", "(", "eyJ-", "11-"])
def test_a_long_text_takes_no_time_to_speak_of(unit: str) -> None:
    began = time.process_time()
    redact(unit * (100_000 // len(unit)), ALL)
    assert time.process_time() - began < 2.0, "an image in base64 would stop the gateway"


# What of a request and its answer.


def test_nested_messages_are_masked_wherever_there_is_text() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "I am ann@example.com"}, {"type": "image_url", "n": 3, "ok": None}],
        },
        {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"to": "555-123-4567", "n": 2}'}}]},
    ]
    asked, said, called, names = kept(messages)
    assert asked == [
        messages[0],
        {
            "role": "user",
            "content": [{"type": "text", "text": "I am [email]"}, {"type": "image_url", "n": 3, "ok": None}],
        },
        {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"to": "[phone]", "n": 2}'}}]},
    ]
    assert (said, called, names) == (None, None, ("email", "phone"))


def test_an_answer_and_the_arguments_of_its_tools_are_masked() -> None:
    arguments = '{"card": 4111111111111111, "key": "sk-abcdefghijklmnopqrst"}'
    tools = [{"id": "call_1", "function": {"name": "pay", "arguments": arguments}}]
    asked, said, called, names = kept("mail ann@example.com", "Mailed ann@example.com", tools)
    assert (asked, said) == ("mail [email]", "Mailed [email]")
    assert called[0]["function"] == {"name": "pay", "arguments": '{"card": [card], "key": "[key]"}'}
    assert names == ("card", "email", "key")
    assert tools[0]["function"] == {"name": "pay", "arguments": arguments}, "what was sent is not changed"


def test_a_text_without_secrets_is_kept_as_it_is() -> None:
    messages = [{"role": "user", "content": "Hello, 2024! Grüße"}]
    assert kept(messages, "Hi") == (messages, "Hi", None, ())
    assert kept(None, "", []) == (None, None, None, ())


def test_full_keeps_all_of_it() -> None:
    tools = [{"function": {"arguments": "ann@example.com"}}]
    found = kept(["ann@example.com"], "555-123-4567", tools, Capture("full"))
    assert found == (["ann@example.com"], "555-123-4567", tools, ())


def test_off_keeps_nothing() -> None:
    raw = msgspec.Raw(b'["hello"]')
    assert Capture("off").keep(raw, "hi", [{"function": {}}]) == (Kept(None, None, None), ("off",))


def test_a_line_of_feedback_is_kept_as_the_policy_says() -> None:
    text = "ask ann@example.com"
    assert Capture("full").line(text) == text
    assert REDACTED.line(text) == "ask [email]"
    assert Capture("off").line(text) is None
    assert [Capture(policy).line(None) for policy in ("full", "redacted", "off")] == [None] * 3  # type: ignore[arg-type]
    assert Capture("full").line("") == ""
