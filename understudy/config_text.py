"""From a YAML file to data that remembers its lines, and from pydantic's errors to sentences for people.

Every scalar is read by YAML 1.2's core rules, not PyYAML's 1.1: `off` and `2024-01-01` are text, `1e-3` is a
number. `${NAME}` and `${NAME:-default}` are filled in after parsing, so that a value never becomes structure;
`$${` is a plain `${`. A value is never repeated in a message, since it may be a secret.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

Key = tuple[str | int, ...]
Schema = dict[str, Any]

_TAG = "tag:yaml.org,2002:"
_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<fallback>:-[^}]*)?\}|\$\{")
_FIRST_CONFIG = """\
routes:
  assistant:
    upstreams: [http://127.0.0.1:8000]
    arms:
      champion: {model: base}
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config file; `line` is 0 where the whole file is meant, `key` "" likewise."""

    line: int
    key: str
    message: str
    hint: str = ""

    def render(self, path: str | Path) -> str:
        where = f"{path}:{self.line}" if self.line else str(path)
        said = f"{self.message}; {self.hint}" if self.hint else self.message
        return ": ".join(part for part in (where, self.key, said) if part)


class ConfigError(Exception):
    """A config file that cannot be used, with everything that is wrong with it."""

    def __init__(self, path: str | Path, problems: list[Problem]) -> None:
        super().__init__(path, problems)
        self.path = Path(path)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(problem.render(self.path) for problem in self.problems)


@dataclass(slots=True)
class Document:
    """What a file says, the line of each key, and what was wrong in the text already."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[Key] = field(default_factory=set)

    def line(self, key: Key) -> int:
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


def dotted(key: Key) -> str:
    """routes.assistant.upstreams[0]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def read(path: str | Path, env: Mapping[str, str], free: frozenset[str]) -> Document:
    """The file's data. Below keys named in `free`, whose values have no type of their own, a value that is
    one reference is read as YAML would read it; elsewhere it stays text for its field to convert.

    Raises ConfigError where there is no mapping to speak of: no file, bad YAML, something else at the top.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(Path(path).read_bytes().decode("utf-8-sig"))
        root = loader.get_single_node()
    except FileNotFoundError:
        hint = f"save these lines there, with your own address and model:\n\n{_FIRST_CONFIG}"
        raise ConfigError(path, [Problem(0, "", "there is no such file", hint)]) from None
    except OSError as error:
        raise ConfigError(path, [Problem(0, "", f"cannot be read ({error.strerror})")]) from None
    except UnicodeDecodeError:
        raise ConfigError(path, [Problem(0, "", "is not UTF-8 text", "save it as UTF-8")]) from None
    except yaml.YAMLError as error:
        raise ConfigError(path, [_malformed(error)]) from None
    except RecursionError:
        raise ConfigError(path, [Problem(0, "", "is nested too deeply")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _TAG + "null"):
        raise ConfigError(path, [Problem(0, "", "is empty", f"start with these lines:\n\n{_FIRST_CONFIG}")])
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise ConfigError(path, [Problem(line, "", "must be a mapping of keys", 'begin with a key such as "routes:"')])
    builder = _Builder(env, free, loader)
    builder.document.data = builder.mapping(root, (), frozenset())
    return builder.document


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|(?=[0-9]+[eE])[0-9]+)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)


class _Builder:
    """Turns nodes into data, noting the line of each key and whatever is wrong on the way."""

    def __init__(self, env: Mapping[str, str], free: frozenset[str], loader: _Loader) -> None:
        self.env, self.free, self.loader = env, free, loader
        self.document = Document()

    def problem(self, node: yaml.Node, key: Key, message: str, hint: str = "") -> None:
        self.document.problems.append(Problem(node.start_mark.line + 1, dotted(key), message, hint))
        self.document.broken.add(key)

    def value(self, node: yaml.Node, key: Key, inside: frozenset[int]) -> Any:
        if id(node) in inside:
            return self.problem(node, key, "an alias that contains itself", "write the value out")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, inside | {id(node)})
        if isinstance(node, yaml.SequenceNode):
            items = []
            for place, item in enumerate(node.value):
                self.document.lines[(*key, place)] = item.start_mark.line + 1
                items.append(self.value(item, (*key, place), inside | {id(node)}))
            return items
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, key)

    def mapping(self, node: yaml.MappingNode, key: Key, inside: frozenset[int]) -> dict[str, Any]:
        merges = [(name, value) for name, value in node.value if name.tag == _TAG + "merge"]
        out = {k: v for _, value in reversed(merges) for k, v in self.merged(value, key, inside).items()}
        first: dict[str, int] = {}
        for name, value in node.value:
            if name.tag == _TAG + "merge":
                continue
            if not isinstance(name, yaml.ScalarNode) or not name.value:
                self.problem(name, key, "a key must be plain text", "put quotes around it")
                continue
            here, line = (*key, name.value), name.start_mark.line + 1
            if name.value in first:
                own = key[-1:] == ("arms",) or key == ("routes",)
                hint = "give each one its own name" if own else "keep one of the two"
                self.problem(name, here, f"written twice, first on line {first[name.value]}", hint)
                continue
            first[name.value] = self.document.lines[here] = line
            out[name.value] = self.value(value, here, inside)
        return out

    def merged(self, node: yaml.Node, key: Key, inside: frozenset[int]) -> dict[str, Any]:
        """What `<<` brings in; of several, the earlier wins."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        out: dict[str, Any] = {}
        for part in reversed(parts):
            if isinstance(part, yaml.MappingNode):
                out |= self.value(part, key, inside) or {}
            else:
                self.problem(part, key, "<< takes a mapping", "merge an alias of a mapping, as in <<: *name")
        return out

    def scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        text, tag = node.value, node.tag
        if "${" in text:
            found = _REFERENCE.fullmatch(text)
            filled = self.filled(node, key)
            if filled is None:
                return None
            text, tag = filled, _TAG + "str"
            if found and found["name"]:
                read_as = self.loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
                tag = read_as if not text or self.free & set(key) else tag
        try:
            return _SCALARS[tag.removeprefix(_TAG)](text)
        except (KeyError, ValueError):
            return self.problem(node, key, "a YAML tag that has no meaning here", "remove the tag, or quote the value")

    def filled(self, node: yaml.ScalarNode, key: Key) -> str | None:
        """The text with its references replaced, or None when that cannot be done."""
        wrong = False

        def fill(match: re.Match[str]) -> str:
            nonlocal wrong
            name, fallback = match["name"], match["fallback"]
            if match[0] == "$${":
                return "${"
            if name is None:
                self.problem(node, key, "not a reference", "write ${NAME} or ${NAME:-default}; $${ is a plain ${")
            elif fallback is not None:
                return self.env.get(name) or fallback[2:]
            elif name in self.env:
                return self.env[name]
            else:
                hint = f"set it before starting, or give a default as ${{{name}:-default}}"
                self.problem(node, key, f"environment variable {name} is not set", hint)
            wrong = True
            return ""

        text = _REFERENCE.sub(fill, node.value)
        return None if wrong else text


_SCALARS: dict[str, Any] = {
    "null": lambda _: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": float,
    "str": str,
    "merge": str,
}


def _malformed(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    said = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed")
    hint = ""
    if "alias" in said or "anchor" in said:
        # PyYAML names it, and a secret that begins with * or & reads as one.
        said, hint = "an alias or anchor that YAML cannot follow", "quote a value that begins with * or &"
    elif "\\t" in said:
        hint = "indent with spaces, not tabs"
    elif "flow" in str(getattr(error, "context", "")) or said.startswith("expected ',' or"):
        hint = 'close every { and [, and inside them put quotes around "${NAME}"'
    elif "mapping values" in said or "expected ':'" in said or "block end" in said:
        hint = "check the indentation and the colons here and on the line above"
    elif "another document" in said or "document start" in said:
        said, hint = "a second document begins here", "keep one document, without a second ---"
    return Problem(mark.line + 1 if mark else 0, "", f"not valid YAML: {said}", hint)


# ---- pydantic's errors, as sentences -----------------------------------------------------------------------


def problems_of(error: ValidationError, document: Document, schema: Schema) -> list[Problem]:
    """Each of pydantic's errors as a problem at its line; those that a broken text caused are left out."""
    out = []
    for one in error.errors(include_url=False):
        loc = tuple(one["loc"]) + tuple(one.get("ctx", {}).get("at", ()))
        if one["type"] == "too_short" and one["input"]:
            continue  # pydantic counts only the good items; the bad ones are named themselves
        if one["type"] == "union_tag_invalid":
            loc += (one["ctx"]["discriminator"].strip("'"),)
        key = _written_key(loc, document.data, keep_last=one["type"] in ("missing", "config"))
        if key in document.broken:
            continue
        message, hint = _sentence(one["type"], one, loc, schema)
        out.append(Problem(document.line(key), dotted(key), message, hint))
    return out


def _written_key(loc: Key, data: object, keep_last: bool) -> Key:
    """`loc` without the parts that pydantic adds: union tags, "[key]", fields of a value written short."""
    key: list[str | int] = []
    for place, part in enumerate(loc):
        if isinstance(data, list) and str(part).isdigit() and int(part) < len(data):
            key.append(int(part))
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            key.append(part)
            data = data[part]
        elif keep_last and place == len(loc) - 1 and isinstance(data, dict):
            key.append(part)
    return tuple(key)


def _sentence(kind: str, error: Any, loc: Key, schema: Schema) -> tuple[str, str]:
    ctx = error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key", _nearest_key(str(loc[-1]), loc[:-1], schema)
    if kind in ("value_error", "config"):
        message, _, hint = str(ctx.get("error", ctx.get("text"))).partition("; ")
        return message, hint
    if kind in ("literal_error", "union_tag_invalid"):
        options = re.findall(r"'([^']*)'", str(ctx.get("expected", ctx.get("expected_tags"))))
        written = ctx.get("tag", error["input"])
        near = difflib.get_close_matches(str(written).lower(), options, 1, 0.6)
        return f"must be {_either(options)}", f'did you mean "{near[0]}"?' if near else ""
    if kind == "union_tag_not_found":
        node = _at(schema, {"$ref": "#"}, loc)
        return "has no kind", f"add kind: {_either(list(node.get('discriminator', {}).get('mapping', {})))}"
    for prefix, answer in _ANSWERS.items():
        if kind.startswith(prefix):
            return answer[0].format(**ctx), answer[1]
    return str(error["msg"]), ""


_ANSWERS = {
    "missing": ("required key is missing", "add it"),
    "string_type": ("must be text", "put quotes around it"),
    "path_type": ("must be a path", "put quotes around it"),
    "string_too_short": ("must not be empty", "write a value, or remove the key"),
    "too_short": ("must not be empty", "write at least one"),
    "int_": ("must be a whole number", "write digits only, without quotes or a unit"),
    "float_": ("must be a number", "write it without quotes or a unit"),
    "finite_number": ("must be a finite number", "write a plain number such as 0.5"),
    "bool_": ("must be true or false", "write true or false"),
    "dict_type": ("must be a mapping of keys", "put keys under it, or remove it for its default"),
    "model_": ("must be a mapping of keys", "put keys under it, or remove it for its default"),
    "tuple_type": ("must be a list", "write it as [one, another]"),
    "list_type": ("must be a list", "write it as [one, another]"),
    "greater_than_equal": ("must be at least {ge:g}", "raise it"),
    "greater_than": ("must be more than {gt:g}", "raise it"),
    "less_than_equal": ("must be at most {le:g}", "lower it"),
    "less_than": ("must be less than {lt:g}", "lower it"),
}


def _either(options: list[str]) -> str:
    return " or ".join(part for part in (", ".join(options[:-1]), *options[-1:]) if part)


def _nearest_key(key: str, level: Key, schema: Schema) -> str:
    here = _keys(schema, _at(schema, {"$ref": "#"}, level))
    if near := difflib.get_close_matches(key.lower(), here, 1, 0.7):
        return f'did you mean "{near[0]}"?'
    if elsewhere := [path for path in key_paths(schema) if path.split(".")[-1] == key]:
        return f"it belongs at {elsewhere[0]}"
    return f"the keys here are {', '.join(here)}" if here else ""


def key_paths(schema: Schema) -> Iterator[str]:
    """Every key that can be written, as in routes.<name>.policy.floor."""

    def walk(node: Schema, path: str) -> Iterator[str]:
        node = _deref(schema, node)
        for key, below in node.get("properties", {}).items():
            yield f"{path}.{key}".removeprefix(".")
            yield from walk(below, f"{path}.{key}")
        if isinstance(named := node.get("additionalProperties"), dict):
            yield from walk(named, f"{path}.<name>")
        for below in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from walk(below, path)
        if "items" in node:
            yield from walk(node["items"], f"{path}[]")

    yield from dict.fromkeys(walk({"$ref": "#"}, ""))


def _deref(schema: Schema, node: Schema) -> Schema:
    while "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        node = schema if node["$ref"] == "#" else schema["$defs"][name]
    return node


def _at(schema: Schema, node: Schema, loc: Key) -> Schema:
    """The schema's node at a pydantic location, or an empty one."""
    node = _deref(schema, node)
    if not loc:
        return node
    part, rest = loc[0], loc[1:]
    if part in node.get("properties", {}):
        return _at(schema, node["properties"][part], rest)
    if part in node.get("discriminator", {}).get("mapping", {}):
        return _at(schema, {"$ref": node["discriminator"]["mapping"][part]}, rest)
    if isinstance(part, int) and "items" in node:
        return _at(schema, node["items"], rest)
    if isinstance(node.get("additionalProperties"), dict):
        return _at(schema, node["additionalProperties"], rest)
    return next((found for option in node.get("anyOf", ()) if (found := _at(schema, option, loc))), {})


def _keys(schema: Schema, node: Schema) -> list[str]:
    node = _deref(schema, node)
    return [
        *node.get("properties", {}),
        *(key for option in node.get("anyOf", ()) for key in _keys(schema, option)),
    ]
