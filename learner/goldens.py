"""Prompts that are kept for evaluation, and so must never be learned from.

A prompt is taken for a golden where the two are near-duplicates, where most of a golden's words stand in it in runs of
five, or where one of its turns says the same. Files are JSON lines or YAML: texts, lists of them, or mappings with
`prompt`, `messages`, `question` or `instruction`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from learner.examples import Example
from learner.near import Signature, likeness, signature
from telemetry.errors import UnderstudyError
from telemetry.wording import canonical

ALIKE = 0.7
RUN = 5
HELD = 0.6
"""Share of a golden's runs of words that must stand in a prompt."""
_BANDS = 4
_WORD = re.compile(r"\w+")
_KEYS = ("prompt", "messages", "question", "instruction", "input")
SUFFIXES = (".jsonl", ".json", ".yaml", ".yml")


class BadGoldens(UnderstudyError):
    """A file of goldens that cannot be read; names it and what to do."""


class Goldens:
    """The texts of goldens, and whether an example holds one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted({plain for text in texts if (plain := _plain(text))})
        self._exact = set(self._texts)
        self._seen: dict[str, bool] = {}
        self._runs: dict[tuple[str, ...], list[int]] = {}
        self._sizes: list[int] = []
        self._signed: list[Signature] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        for place, text in enumerate(self._texts):
            runs = _runs(text)
            self._sizes.append(len(runs))
            for run in runs:
                self._runs.setdefault(run, []).append(place)
            signed = signature(text)
            self._signed.append(signed)
            for key in _keys(signed):
                self._bands.setdefault(key, []).append(place)

    def __len__(self) -> int:
        return len(self._texts)

    def digest(self) -> str:
        """SHA-256 of the texts, in whatever files they stand."""
        return hashlib.sha256("\n".join(self._texts).encode()).hexdigest()

    def hold(self, example: Example) -> bool:
        """Whether the example's prompt is one of these, or holds one."""
        if not self._texts:
            return False
        own = [_plain(str(turn.get("content", ""))) for turn in example.messages if turn.get("role") == "user"]
        whole = " ".join(own)
        return any(self._known(text) for text in {*own, whole} if text)

    def _known(self, text: str) -> bool:
        """Many ask the same, so each text is looked at once."""
        if text not in self._seen:
            self._seen[text] = self._matches(text)
        return self._seen[text]

    def _matches(self, text: str) -> bool:
        if text in self._exact:
            return True
        held = Counter(place for run in _runs(text) for place in self._runs.get(run, ()))
        if any(count >= HELD * self._sizes[place] for place, count in held.items()):
            return True
        signed = signature(text)
        near = {place for key in _keys(signed) for place in self._bands.get(key, ())}
        return any(likeness(signed, self._signed[place]) >= ALIKE for place in near)


def load(paths: Sequence[Path]) -> Goldens:
    """The goldens in files and folders. Raises `BadGoldens`."""
    return Goldens(text for path in paths for file in _files(path) for text in _texts(_read(file), file))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not path.is_file():
        raise BadGoldens(f"{path} is neither a file nor a folder; write where the goldens are")
    return [path]


def _read(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return yaml.safe_load(text)  # JSON too
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadGoldens(f"{file} cannot be read as goldens: {error}") from None


def _texts(found: Any, file: Path) -> Iterator[str]:
    match found:
        case str():
            yield found
        case list() if found and all(isinstance(one, dict) and "role" in one for one in found):
            yield from (str(one.get("content", "")) for one in found if one["role"] == "user")
        case list():
            for one in found:
                yield from _texts(one, file)
        case dict():
            named = [found[key] for key in _KEYS if found.get(key)]
            if not named and not any(isinstance(value, list | dict) for value in found.values()):
                raise BadGoldens(f"{file} has an entry without a prompt; give it one of {', '.join(_KEYS)}")
            for one in named or found.values():
                if isinstance(one, str | list | dict):
                    yield from _texts(one, file)


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(canonical(text).lower()))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}


def _keys(signed: Signature) -> list[tuple[int, bytes]]:
    return [(at, signed[at : at + _BANDS].tobytes()) for at in range(0, len(signed), _BANDS)]
