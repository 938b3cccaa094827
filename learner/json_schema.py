"""JSON Schema (2020-12), as much of it as says what an answer must be. Pure but for `pattern`, which is run apart.

A keyword that is not known here is a fault of the schema: left out of account it would let wrong answers pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from learner.isolated import matches

ANNOTATIONS = frozenset(["$schema", "$id", "title", "description", "default", "examples", "format", "deprecated"])
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and isinstance(value, int | float) and value == value // 1,
}
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool], str]] = {
    "minimum": ("number", lambda value, bound: value >= bound, "is below"),
    "maximum": ("number", lambda value, bound: value <= bound, "is above"),
    "exclusiveMinimum": ("number", lambda value, bound: value > bound, "is not above"),
    "exclusiveMaximum": ("number", lambda value, bound: value < bound, "is not below"),
    "minLength": ("string", lambda value, bound: value >= bound, "is shorter than"),
    "maxLength": ("string", lambda value, bound: value <= bound, "is longer than"),
    "minItems": ("array", lambda value, bound: value >= bound, "has fewer items than"),
    "maxItems": ("array", lambda value, bound: value <= bound, "has more items than"),
}
KEYWORDS = frozenset(
    [*_BOUNDS, "type", "enum", "const", "properties", "required", "additionalProperties", "items", "pattern", "anyOf"]
)


def fault(schema: Any, at: str = "") -> str:
    """What is wrong with a schema; else nothing."""
    if isinstance(schema, bool):
        return ""
    if not isinstance(schema, dict):
        return f"must be a schema{at}"
    if unknown := sorted(str(key) for key in schema.keys() - KEYWORDS - ANNOTATIONS):
        return f"has the keyword {unknown[0]}{at}, which is not known here; use {', '.join(sorted(KEYWORDS))}"
    named = schema.get("type", [])
    if wrong := [one for one in ([named] if isinstance(named, str) else named) if one not in _TYPES]:
        return f"has the type {wrong[0]}{at}, which is none"
    if wrong := [key for key in _BOUNDS if key in schema and not _TYPES["number"](schema[key])]:
        return f"has a {wrong[0]}{at} that is no number"
    shapes = {"enum": list, "required": list, "properties": dict, "anyOf": list, "pattern": str}
    if wrong := [key for key, shape in shapes.items() if not isinstance(schema.get(key, shape()), shape)]:
        return f"has a {wrong[0]}{at} of another shape than JSON Schema's"
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except (re.error, OverflowError, RecursionError) as error:
            return f"has a pattern{at} that cannot be used: {error}"
    below = [(f" in {key}", one) for key, one in schema.get("properties", {}).items()]
    below += [(f" in {key}", schema[key]) for key in ("items", "additionalProperties") if key in schema]
    below += [(" in anyOf", one) for one in schema.get("anyOf", [])]
    return next((why for where, one in below if (why := fault(one, at + where))), "")


def misfit(value: Any, schema: Any, at: str = "it") -> str:
    """Where a value is not as a schema says; else nothing."""
    if isinstance(schema, bool):
        return "" if schema else f"{at} must not be there"
    named = schema.get("type", [])
    if (types := [named] if isinstance(named, str) else named) and not any(_TYPES[one](value) for one in types):
        return f"{at} is no {' or '.join(types)}"
    if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
        return f"{at} is not one of {schema['enum']}"
    if "const" in schema and not same(value, schema["const"]):
        return f"{at} is not {schema['const']!r}"
    for key, (kind, holds, said) in _BOUNDS.items():
        if key in schema and _TYPES[kind](value):
            size = value if kind == "number" else len(value)
            if not holds(size, schema[key]):
                return f"{at} {said} {schema[key]}"
    if "pattern" in schema and isinstance(value, str) and not matches(schema["pattern"], value).passed:
        return f"{at} does not match {schema['pattern']}"
    if "anyOf" in schema and all(misfit(value, one, at) for one in schema["anyOf"]):
        return f"{at} fits none of anyOf"
    if isinstance(value, list) and "items" in schema:
        return next((why for n, one in enumerate(value) if (why := misfit(one, schema["items"], f"{at}[{n}]"))), "")
    return _misfit_of_object(value, schema, at) if isinstance(value, dict) else ""


def _misfit_of_object(value: dict[str, Any], schema: Mapping[str, Any], at: str) -> str:
    if missing := [key for key in schema.get("required", []) if key not in value]:
        return f"{at} has no {missing[0]}"
    known = schema.get("properties", {})
    for key, one in value.items():
        if why := misfit(one, known.get(key, schema.get("additionalProperties", True)), f"{at}.{key}"):
            return why
    return ""


def same(one: Any, other: Any) -> bool:
    """Equal, but for Python true is 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
