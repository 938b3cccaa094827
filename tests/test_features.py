"""From a request's body to the key of its kind: what is told, and that no body costs much or raises."""

from __future__ import annotations

import json
import time
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.features import FEATURES, FeatureName, Fields, key_of, keys_of, vector_of

ALL = tuple(FEATURES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
READ = ["messages", "input", "prompt", "tools", "functions", "response_format", "text"]


def fields_of(body: dict[str, Any] | bytes) -> Fields:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])


def levels(**body: Any) -> dict[str, int]:
    key = key_of(ALL, fields_of(body))
    return {part[:-1]: int(part[-1]) for part in key.removeprefix("f1:").split(".")}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts]} | more


def test_every_name_that_can_be_written_is_a_feature() -> None:
    assert get_args(FeatureName) == ALL


def test_a_plain_question_is_at_the_lowest_level_of_all() -> None:
    assert levels(**chat("What is a bandit?")) == dict.fromkeys(ALL, 0)


@pytest.mark.parametrize(("size", "level"), [(10, 0), (100, 1), (300, 2), (600, 3), (1200, 4), (3000, 5), (9000, 6)])
def test_length_is_the_last_messages_in_doublings(size: int, level: int) -> None:
    assert levels(**chat("x" * 5000, "x" * size))["length"] == level
    assert levels(prompt="x" * size, model="m")["length"] in (level, level - 1)


@pytest.mark.parametrize(("messages", "level"), [(1, 0), (2, 0), (3, 1), (6, 1), (7, 2), (14, 2), (15, 3), (400, 3)])
def test_turns_count_the_messages_in_doublings(messages: int, level: int) -> None:
    assert levels(**chat(*["hi"] * messages))["turns"] == level


@pytest.mark.parametrize(
    ("feature", "body"),
    [
        ("code", chat("Fix this:\n```\nx = 1\n```")),
        ("code", chat("int main() {\n  return 0;\n}")),
        ("code", chat("def f(x):\n    return x")),
        ("tools", chat("hi", tools=[{"type": "function", "function": {"name": "f"}}])),
        ("tools", chat("hi", functions=[{"name": "f"}])),
        ("schema", chat("hi", response_format={"type": "json_schema", "json_schema": {}})),
        ("schema", chat("hi", response_format={"type": "json_object"})),
        ("schema", {"input": "hi", "text": {"format": {"type": "json_schema"}}}),
        ("image", {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:" + "A" * 20_000}}]}]}),
        ("image", {"input": [{"content": [{"type": "input_image", "image_url": "https://…"}]}]}),
        ("script", chat("Объясни, что такое бандит")),
        ("script", chat("解释一下什么是多臂老虎机")),
        ("script", chat("ما هو اللص ذو الأذرع المتعددة؟")),
        ("script", chat("밴딧이 뭔지 설명해 줘")),
    ],
)
def test_a_feature_is_seen(feature: str, body: dict[str, Any]) -> None:
    assert levels(**body)[feature] == 1


@pytest.mark.parametrize(
    ("feature", "body"),
    [
        ("code", chat("Tell me a story; a sad one.\n\nAbout a {hero}")),
        ("tools", chat("hi", tools=[])),
        ("tools", chat("hi", tools=None)),
        ("schema", chat("hi", response_format={"type": "text"})),
        ("schema", chat("hi", response_format=None)),
        ("image", chat('I wrote "image_url" in quotes')),
        ("script", chat("Xin chào, bạn có khỏe không? Tôi muốn hỏi về việc này.")),
        ("script", chat("Où est l’été à Łódź? “Naïve”, đúng vậy 🙂 — π ≈ 3.14")),
    ],
)
def test_a_feature_is_not_seen_where_it_is_not(feature: str, body: dict[str, Any]) -> None:
    assert levels(**body)[feature] == 0


def test_escaped_letters_are_of_the_same_script() -> None:
    for text, level in (("Объясни", 1), ("解释一下", 1), ("Où est l’été", 0)):
        escaped = fields_of(json.dumps({"messages": [{"content": text}]}).encode())
        assert key_of(("script",), escaped) == f"f1:script{level}"


@given(st.dictionaries(st.sampled_from(READ) | st.text(max_size=5), JSON))
def test_any_json_object_has_one_of_the_keys_there_can_be(body: dict[str, Any]) -> None:
    assert key_of(ALL, fields_of(body)) in KEYS


KEYS = set(keys_of(ALL))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("value", ["3", "null", "[]", "{}", '""', "[null]", "[1e999]", "[[[[]]]]", "true"])
def test_odd_values_have_a_key(name: str, value: str) -> None:
    assert key_of(ALL, fields_of(f'{{"{name}": {value}}}'.encode())) in KEYS


@pytest.mark.parametrize("name", ["messages", "input"])
def test_raw_json_that_is_broken_or_nested_has_a_key(name: str) -> None:
    for raw in (b"[", b"[1,", b'["\xff"]', b"[" * 30_000, b"[" * 30_000 + b"]" * 30_000, b""):
        assert key_of(ALL, {name: msgspec.Raw(raw)}) in KEYS


def test_a_huge_conversation_takes_no_longer_to_look_at_than_one_a_hundredth_of_it() -> None:
    """Beyond LONG nothing is taken apart, so time does not grow with the size."""
    small, large = (fields_of(chat(*["x"] * n)) for n in (2000, 100_000))
    assert key_of(("turns", "length"), large) == "f1:turns3.length6"

    def took(fields: Fields) -> float:
        times = []
        for _ in range(20):
            began = time.perf_counter()
            key_of(ALL, fields)
            times.append(time.perf_counter() - began)
        return min(times)

    assert took(large) < 5 * took(small)


def test_there_are_few_keys_and_each_has_its_own_vector() -> None:
    assert len(KEYS) == 7 * 4 * 2**5
    vectors = np.array([vector_of(key, ALL) for key in KEYS])
    assert len(np.unique(vectors, axis=0)) == len(KEYS)
    assert vectors.min() == 0.0
    assert vectors.max() == 1.0


def test_a_key_is_read_as_far_as_it_goes() -> None:
    np.testing.assert_allclose(vector_of("f1:length3.code1", ("code", "length")), [1.0, 0.5])
    np.testing.assert_array_equal(vector_of("f1:length3", ("code", "length")), [np.nan, 0.5])
    for foreign in ("", "code", "f2:length3", "f1:", "f1:length", "f1:length99"):
        assert np.isnan(vector_of(foreign, ("code", "length"))).all()
