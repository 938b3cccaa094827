"""Goldens that say what a good answer is, and whether an answer is one.

    - prompt: What is the capital of France?      # or `messages`, as a chat
      owner: geo-team                             # who is asked when it fails
      expect: {text: Paris}                       # one of the kinds below
      must: true                                  # one failure of the challenger is enough

`text`         stands in the answer, whatever the case, white space and Markdown, as whole words
`regex`        matches somewhere in it (Python's)
`json_schema`  the answer is JSON, alone or in a fence, and fits; `learner.json_schema` has the keywords
`tool_call`    {name, arguments}: one of its calls has the name, and these arguments among its own
`rubric`       words by which a judge grades it
`code`         Python that runs after the answer's own code without an error
`refuse`       true: it must be refused; `answer` true: it must not be (`learner.refusals`)

`tools`, `response_format` and `max_tokens` beside them are sent with the prompt. An entry without `expect` is only kept
out of datasets (`learner.goldens`).

Regexes and code are run apart (`learner.isolated`); code only where the operator allows it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from learner import goldens, json_schema
from learner.goldens import EXPECT, BadGoldens
from learner.isolated import Verdict, matches, run_code
from learner.json_schema import same
from learner.refusals import refuses
from telemetry.wording import canonical

Kind = Literal["text", "regex", "json_schema", "tool_call", "rubric", "code", "refuse", "answer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SENT = ("tools", "response_format", "max_tokens")
"""What an entry may send beside its prompt."""
_KEYS = {"id", *goldens.KEYS, "owner", EXPECT, "must", "from", *SENT}
ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWER_CHARS = 100_000
"""Of an answer, looked at."""

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
# What Latin, Greek, Cyrillic and Armenian words are made of; others put no space between words.
_IN_WORDS = r"0-9A-Za-z_\u00c0-\u058f"


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and what its answer must be."""

    id: str
    messages: tuple[dict[str, Any], ...]
    owner: str
    kind: Kind
    expected: Any
    """As it was written for the kind."""
    must: bool = False
    request: dict[str, Any] = {}
    """What is sent beside the messages."""
    where: str
    """File and entry."""


Grade = Callable[[str, str, str], Verdict]
"""(prompt, answer, rubric) → what a judge says."""


def load(paths: Sequence[Path]) -> tuple[Golden, ...]:
    """The goldens with an expectation, in files and folders. Raises `BadGoldens`, which names file and entry."""
    files = dict.fromkeys(file.resolve() for path in paths for file in goldens.files(path))
    found = [golden for file in files for golden in _of_file(file)]
    names: dict[str, Golden] = {}
    prompts: dict[str, list[Golden]] = {}
    for golden in found:
        if (other := names.setdefault(golden.id, golden)) is not golden:
            raise BadGoldens(f"{golden.where} and {other.where} are both called {golden.id!r}; rename or drop one")
        alike = prompts.setdefault(_asked(golden), [])
        for other in alike:
            if why := contradiction(golden, other):
                raise BadGoldens(f"{golden.where} contradicts {other.where}, which asks the same: {why}; keep one")
        alike.append(golden)
    return tuple(found)


def contradiction(one: Golden, other: Golden) -> str:
    """Why no answer could pass both, as far as that can be told from what they say; else nothing."""
    kinds = {one.kind, other.kind}
    if "refuse" in kinds and kinds - {"refuse", "rubric"}:
        return f"one must be refused, the other is {(kinds - {'refuse'}).pop()}"
    if len(kinds) > 1 or one.expected == other.expected:
        return ""
    match one.kind:
        case "text" if _plain(one.expected) != _plain(other.expected):
            return f"{one.expected!r} against {other.expected!r}"
        case "tool_call":
            mine, its = one.expected, other.expected
            shared = mine.get("arguments", {}).keys() & its.get("arguments", {}).keys()
            if mine["name"] != its["name"]:
                return f"a call of {mine['name']} against one of {its['name']}"
            if wrong := sorted(key for key in shared if mine["arguments"][key] != its["arguments"][key]):
                return f"two values of {wrong[0]}"
        case "json_schema" if {type(schema.get("type")) for schema in (one.expected, other.expected)} == {str}:
            if one.expected["type"] != other.expected["type"]:
                return f"{one.expected['type']} against {other.expected['type']}"
        case _:
            pass
    return ""


def check(
    golden: Golden,
    answer: str,
    tool_calls: Sequence[Any] = (),
    *,
    allow_code: bool = False,
    grade: Grade | None = None,
) -> Verdict:
    """Whether the answer is what was expected, and why not."""
    answer = answer[:ANSWER_CHARS]
    match golden.kind:
        case "text":
            held = _holds(answer, golden.expected)
            return Verdict(held, "" if held else f"{golden.expected!r} is not in it")
        case "regex":
            return matches(golden.expected, answer)
        case "json_schema":
            return _fits(answer, golden.expected)
        case "tool_call":
            return _called(tool_calls, golden.expected)
        case "code" if not allow_code:
            return Verdict(None, "code is not run; write allow_code: true to have it run")
        case "code":
            return run_code(code_of(answer), golden.expected)
        case "rubric" if grade is None:
            return Verdict(None, "a rubric needs a judge")
        case "rubric":
            assert grade is not None
            return grade(prompt_of(golden), answer, golden.expected)
        case "refuse" | "answer":
            if not answer.strip() and not tool_calls:
                return Verdict(False, "no answer")
            refused = refuses(answer)
            wanted = golden.kind == "refuse"
            return Verdict(refused == wanted, "" if refused == wanted else "it refuses" if refused else "it answers")


def prompt_of(golden: Golden) -> str:
    """What was asked, to be read by a judge."""
    return prompt_text(golden.messages)


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A chat as one text; of a single turn just what it says."""
    turns = [(str(turn.get("role", "user")), text_of(turn.get("content"))) for turn in messages]
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {text}" for role, text in turns)


def text_of(content: Any) -> str:
    """A turn's text, of parts too."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content or "")


def json_of(answer: str) -> Any:
    """The JSON that an answer is, alone or in its only fence. Raises ValueError."""
    fences = _FENCE.findall(answer)
    text = fences[0][1] if len(fences) == 1 else answer
    try:
        return json.loads(text.strip(), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is too deep") from None


def code_of(answer: str) -> str:
    """The Python of an answer: its fences of that language or of none, else all of it."""
    fences = [(kind.lower(), text) for kind, text in _FENCE.findall(answer)]
    own = [text for kind, text in fences if kind in ("", "python", "py", "python3")]
    return "\n".join(own) if fences else answer


# Reading


def _of_file(file: Path) -> Iterator[Golden]:
    for number, entry in enumerate(_entries(goldens.read(file)), 1):
        if isinstance(entry, dict) and EXPECT in entry:
            yield _golden(entry, f"{file} entry {number}", file.stem)


def _entries(found: Any) -> Iterator[Any]:
    """What is one golden each, as `learner.goldens` has it, in the order it stands in."""
    match found:
        case list() if not all(isinstance(one, dict) and "role" in one for one in found):
            for one in found:
                yield from _entries(one)
        case dict() if EXPECT not in found and not any(found.get(key) for key in goldens.KEYS):
            for one in found.values():
                if isinstance(one, list | dict):
                    yield from _entries(one)
        case _:
            yield found


def _golden(entry: dict[str, Any], where: str, file: str) -> Golden:
    def wrong(what: str) -> BadGoldens:
        return BadGoldens(f"{where}: {what}")

    if unknown := sorted(str(key) for key in entry.keys() - _KEYS):
        raise wrong(f"{unknown[0]} is no key of a golden; they are {', '.join(sorted(_KEYS))}")
    expect, owner, must = entry[EXPECT], entry.get("owner"), entry.get("must", False)
    if not isinstance(expect, dict) or len(expect) != 1 or next(iter(expect)) not in KINDS:
        raise wrong(f"expect must have exactly one of {', '.join(KINDS)}")
    if not isinstance(owner, str) or not owner.strip():
        raise wrong("it has no owner; name who is asked when it fails")
    if not isinstance(must, bool):
        raise wrong("must is true or false")
    ((kind, expected),) = expect.items()
    if fault := _fault(kind, expected):
        raise wrong(f"{kind} {fault}")
    messages = _messages(entry)
    if messages is None:
        raise wrong("it has no prompt; give it a text as prompt, or messages with role and content")
    request = {key: entry[key] for key in SENT if key in entry}
    if kind == "tool_call" and not _offers(request.get("tools"), expected["name"]):
        raise wrong(f"its tools offer no {expected['name']}; without them no model could call it")
    # By what it says: it keeps its name when others are written before it.
    name = f"{file}-{hashlib.sha256(json.dumps([messages, request, expect], default=str).encode()).hexdigest()[:10]}"
    return Golden(
        id=str(entry.get("id", name)), messages=messages, owner=owner.strip(), kind=kind, expected=expected, must=must,
        request=request, where=where,
    )  # fmt: skip


def _messages(entry: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    asked = next((entry[key] for key in goldens.KEYS if entry.get(key)), None)
    if isinstance(asked, str | int | float) and not isinstance(asked, bool):
        return ({"role": "user", "content": str(asked)},)
    turns = asked if isinstance(asked, list) else []
    good = all(isinstance(turn, dict) and turn.get("role") in ROLES and "content" in turn for turn in turns)
    return tuple(turns) if turns and good else None


def _fault(kind: str, expected: Any) -> str:
    """What is wrong with an expectation."""
    match kind:
        case "refuse" | "answer":
            return "" if expected is True else "must be true; for the contrary there is the other one"
        case "json_schema":
            return json_schema.fault(expected) if isinstance(expected, dict) else "must be a schema"
        case "tool_call":
            name = expected.get("name") if isinstance(expected, dict) else None
            arguments = expected.get("arguments", {}) if isinstance(expected, dict) else None
            good = isinstance(name, str) and name and isinstance(arguments, dict)
            return "" if good and expected.keys() <= {"name", "arguments"} else "must be {name, arguments}"
    if kind == "text" and isinstance(expected, int | float) and not isinstance(expected, bool):
        return "is a number; write it in quotes, as it must be said"
    if not isinstance(expected, str) or not (_plain(expected) if kind == "text" else expected.strip()):
        return "must be a text that is not empty"
    try:
        if kind == "regex":
            re.compile(expected)
        if kind == "code":
            compile(expected, "golden", "exec")
    except (re.error, SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"cannot be used: {error}"
    return ""


def _offers(tools: Any, name: str) -> bool:
    named = [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return any(isinstance(function, dict) and function.get("name") == name for function in named)


def _asked(golden: Golden) -> str:
    turns = [[turn.get("role"), _plain(text_of(turn.get("content")))] for turn in golden.messages]
    return json.dumps([turns, golden.request], sort_keys=True, default=str)


# Checking


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", canonical(text)).casefold().split())


def _holds(answer: str, expected: str) -> bool:
    """As whole words, and of numbers not a part ("3" is not in "3.5")."""
    wanted = _plain(expected)
    before = rf"(?<![{_IN_WORDS}])(?<!\d[.,])" if re.match(f"[{_IN_WORDS}]", wanted) else ""
    after = rf"(?![{_IN_WORDS}]|[.,]\d)" if re.search(f"[{_IN_WORDS}]$", wanted) else ""
    return re.search(before + re.escape(wanted) + after, _plain(answer)) is not None


def _called(calls: Sequence[Any], expected: Mapping[str, Any]) -> Verdict:
    seen = []
    for call in calls:
        try:
            name, arguments = call["function"]["name"], call["function"].get("arguments") or "{}"
            given = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            seen.append("a call that is malformed")
            continue
        if name == expected["name"] and _part(expected.get("arguments", {}), given):
            return Verdict(True, "")
        seen.append(f"{name}({json.dumps(given, ensure_ascii=False)[:200]})")
    return Verdict(False, f"it has {', '.join(seen)}" if seen else "it calls nothing")


def _part(expected: Any, given: Any) -> bool:
    if isinstance(expected, dict) and isinstance(given, dict):
        return all(key in given and _part(value, given[key]) for key, value in expected.items())
    return same(expected, given)


def _fits(answer: str, schema: Any) -> Verdict:
    try:
        value = json_of(answer)
    except ValueError as error:
        return Verdict(False, f"it is no JSON: {error}")
    why = json_schema.misfit(value, schema)
    return Verdict(not why, why)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
