"""Prompts that are kept for evaluation, and so must never be learned from.

A conversation holds a golden where most of the golden's runs of five characters stand close together in it: reworded a
little, misspelt, or inside another text. Files are JSON lines or YAML: texts, lists of them, or mappings with `prompt`,
`messages`, `question` or `instruction`. What a model should answer may stand beside it (`learner.expectations`).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from learner.examples import Example
from telemetry.errors import UnderstudyError

GRAM = 5
HELD = 0.65
"""Share of a golden's runs of characters that must stand in a text."""
ROOM = 1.5
"""… within so many times the golden's length, and `SPARE` characters."""
SPARE = 16
SHORTEST = 10
"""Characters: a shorter golden is only sought as a whole turn."""
ALONE = 20
"""A shorter turn of a golden of several is nobody's ("Yes.")."""
COMMON = 0.1
"""A run that stands in more of the goldens than this (of `MANY` at least) does not tell them apart."""
MANY = 50
_WORD = re.compile(r"\w+")
KEYS = ("prompt", "messages", "question", "instruction", "input")
"""What a prompt may be called."""
EXPECT = "expect"
"""Beside a prompt: what the answer to it must be, which is not a text to be sought."""
SUFFIXES = (".jsonl", ".json", ".yaml", ".yml")


class BadGoldens(UnderstudyError):
    """A file of goldens that cannot be read; names it and what to do."""


class Goldens:
    """The texts of goldens, and whether an example holds one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted({plain for text in texts if (plain := _plain(text))})
        self._exact = set(self._texts)
        self._seen: dict[str, bool] = {}
        grams = [_grams(text) for text in self._texts]
        times = Counter(gram for own in grams for gram in own)
        common = {gram for gram, count in times.items() if count > max(MANY, COMMON * len(self._texts))}
        self._grams = [own - common or own for own in grams]
        self._places: dict[str, list[int]] = {}
        for place, own in enumerate(self._grams):
            for gram in own if len(self._texts[place]) >= SHORTEST else ():
                self._places.setdefault(gram, []).append(place)

    def __len__(self) -> int:
        return len(self._texts)

    def digest(self) -> str:
        """SHA-256 of the texts, in whatever files they stand."""
        return hashlib.sha256("\n".join(self._texts).encode("utf-8", "surrogatepass")).hexdigest()

    def hold(self, example: Example) -> bool:
        """Whether a turn of the example's prompt, or all of them together, is one of these or holds one."""
        if not self._texts:
            return False
        turns = [str(turn.get("content", "")) for turn in example.messages]
        return any(self._known(text) for text in {*turns, "\n".join(turns)})

    def _known(self, text: str) -> bool:
        """Many ask the same, so each text is looked at once."""
        if text not in self._seen:
            self._seen[text] = self._matches(_plain(text))
        return self._seen[text]

    def _matches(self, text: str) -> bool:
        if text in self._exact:
            return True
        own = _grams(text)
        held = Counter(place for gram in own for place in self._places.get(gram, ()))
        likely = (place for place, count in held.items() if count >= HELD * len(self._grams[place]))
        return any(self._stands_in(place, text) for place in likely)

    def _stands_in(self, place: int, text: str) -> bool:
        """Whether enough of a golden's runs stand close together."""
        wanted, size = self._grams[place], int(ROOM * len(self._texts[place])) + SPARE
        at = [n for n in range(len(text) - GRAM + 1) if text[n : n + GRAM] in wanted]
        inside: Counter[str] = Counter()
        begin = 0
        for end in at:
            inside[text[end : end + GRAM]] += 1
            while at[begin] < end - size:
                gone = text[at[begin] : at[begin] + GRAM]
                inside[gone] -= 1
                if not inside[gone]:
                    del inside[gone]
                begin += 1
            if len(inside) >= HELD * len(wanted):
                return True
        return False


def load(paths: Sequence[Path]) -> Goldens:
    """The goldens in files and folders. Raises `BadGoldens`."""
    return Goldens(text for path in paths for file in files(path) for text in _texts(read(file), file))


def files(path: Path) -> list[Path]:
    """The files of goldens at a path. Raises `BadGoldens`."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not path.is_file():
        raise BadGoldens(f"{path} is neither a file nor a folder; write where the goldens are")
    return [path]


def read(file: Path) -> Any:
    """What a file holds, whatever that is. Raises `BadGoldens`."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return yaml.safe_load(text)  # JSON too
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise BadGoldens(f"{file} cannot be read as goldens: {error}") from None


def _texts(found: Any, file: Path) -> Iterator[str]:
    match found:
        case str() | int() | float() if not isinstance(found, bool):
            yield str(found)
        case list() if found and all(isinstance(one, dict) and "role" in one for one in found):
            turns = [_content(one.get("content")) for one in found if one["role"] == "user"]
            yield "\n".join(turns)
            yield from (turn for turn in turns if len(turn) >= ALONE)
        case list():
            for one in found:
                yield from _texts(one, file)
        case dict():
            named = [found[key] for key in KEYS if found.get(key)]
            nested = EXPECT not in found and any(isinstance(value, list | dict) for value in found.values())
            if not named and not nested:
                raise BadGoldens(f"{file} has an entry without a prompt; give it one of {', '.join(KEYS)}")
            for one in named or found.values():
                if named or isinstance(one, list | dict):
                    yield from _texts(one, file)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content or "")


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def _grams(text: str) -> set[str]:
    return {text[at : at + GRAM] for at in range(max(1, len(text) - GRAM + 1))}
