"""Where a thing comes from and what became of it: answer ↔ example ↔ dataset ↔ version, either way.

Nothing is kept for this: datasets name their examples' facts, versions their datasets and parents, answers the version
that gave them. So it holds for what was made before anyone asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from learner.examples import Example
from learner.registry import Registry, Unknown, Version
from learner.shards import BadDataset, dataset_name, read
from telemetry.errors import UnderstudyError
from telemetry.events import Interaction, Signal, answer_name, names_of
from telemetry.journal import Journal

MOST = 1000
"""Examples or answers that are listed."""


class NotFound(UnderstudyError):
    """Nothing has that name."""


class Archive(NamedTuple):
    """Where the learner keeps what it made."""

    route: str
    folder: Path
    registry: Registry
    journal: Journal


def walk(archive: Archive, name: str, tenant: str = "default") -> dict[str, Any]:
    """What `name` is (an answer, an example, a dataset or a version) with all it came from and led to.

    `name`: an answer's or request's id, an example's id, a dataset's hash or folder, or a version; the middle two may
    be cut short. Raises NotFound.
    """
    for look in (_version, _dataset, _answer, _example):
        found = look(archive, name, tenant)
        if found is not None:
            return found
    raise NotFound(f"{name!r} is no version, dataset, example or answer that is known here")


def _version(archive: Archive, name: str, tenant: str) -> dict[str, Any] | None:
    try:
        version = archive.registry.version(name)
    except Unknown:
        return None
    folder = next((path for path in datasets(archive.folder) if dataset_name(path) == version.dataset), None)
    examples = list(_read(folder)) if folder is not None else []
    return {
        "version": _shown(archive, version),
        "dataset": {"hash": version.dataset, "folder": str(folder) if folder else None, "examples": len(examples)},
        "examples": [_brief(one) for one in examples[:MOST]],
        "facts": len({event for one in examples for event in one.events}),
        "parent": version.parent,
        "children": [one.name for one in archive.registry.versions(version.route) if one.parent == version.name],
        "reports": archive.registry.metrics(version.name),
    }


def _shown(archive: Archive, version: Version) -> dict[str, Any]:
    aliases = [alias for alias, to in archive.registry.aliases(version.route).items() if to == version.name]
    return {
        "name": version.name,
        "aliases": aliases,
        "tags": archive.registry.tags(version.name),
        "created": version.created,
        "base": version.base,
        "base_hash": version.base_hash,
        "adapter_hash": version.adapter_hash,
        "served_hash": version.served_hash,
        "seed": version.seed,
        "folder": version.folder,
    }


def _dataset(archive: Archive, name: str, tenant: str) -> dict[str, Any] | None:
    for folder in datasets(archive.folder):
        own = dataset_name(folder)
        if name in (folder.name, str(folder)) or (len(name) >= 8 and own.startswith(name)):
            examples = list(_read(folder))
            return {
                "dataset": {"hash": own, "folder": str(folder), "examples": len(examples)},
                "examples": [_brief(one) for one in examples[:MOST]],
                "versions": trained_on(archive, own),
            }
    return None


def _answer(archive: Archive, name: str, tenant: str) -> dict[str, Any] | None:
    found = archive.journal.answers(Signal(event_id="", at=0.0, kind="", tenant=tenant, response_id=answer_name(name)))
    if not found:
        return None
    answers = [answer for _, answer in found]
    signals = archive.journal.heard_about(answers)
    ids = {answer.event_id for answer in answers}
    return {
        "answer": _said(answers[0]),
        "made_by": answers[0].answerer.model,
        "signals": [{"event_id": signal.event_id, "kind": signal.kind, "value": signal.value} for _, signal in signals],
        "led_to": [*_holding(archive, ids)],
    }


def _said(answer: Interaction) -> dict[str, Any]:
    return {
        "names": names_of(answer),
        "event_id": answer.event_id,
        "at": answer.at,
        "arm": answer.answerer.arm,
        "propensity": answer.answerer.propensity,
        "snapshot": answer.answerer.snapshot,
        "session": answer.session,
    }


def _example(archive: Archive, name: str, tenant: str) -> dict[str, Any] | None:
    if len(name) < 6:
        return None
    for folder in datasets(archive.folder):
        for one in _read(folder):
            if one.id.startswith(name):
                facts = archive.journal.events(one.tenant, one.events)
                return {
                    "example": _brief(one),
                    "came_from": [
                        _said(fact) if isinstance(fact, Interaction) else {"event_id": fact.event_id, "kind": fact.kind}
                        for fact in facts
                        if isinstance(fact, Interaction | Signal)
                    ],
                    "led_to": [*_holding(archive, set(one.events), one.id)],
                }
    return None


def _holding(archive: Archive, events: set[str], only: str | None = None) -> Iterator[dict[str, Any]]:
    """The datasets whose examples were made from one of `events`, and the versions trained on them."""
    for folder in datasets(archive.folder):
        own = [one for one in _read(folder) if (one.id == only if only else events & set(one.events))]
        if own:
            name = dataset_name(folder)
            yield {
                "dataset": name,
                "folder": str(folder),
                "examples": [_brief(one) for one in own[:MOST]],
                "versions": trained_on(archive, name),
            }


def _brief(one: Example) -> dict[str, Any]:
    return {"id": one.id, "kind": one.kind, "reason": one.reason, "split": one.split, "weight": one.weight}


def trained_on(archive: Archive, dataset: str) -> list[str]:
    """The versions that were trained on a dataset, by its hash."""
    return [version.name for version in archive.registry.versions(archive.route) if version.dataset == dataset]


def datasets(folder: Path) -> list[Path]:
    """The datasets in a learner's folder."""
    return sorted(path.parent for path in (folder / "datasets").glob("[!.]*/manifest.json"))


def _read(folder: Path) -> Iterator[Example]:
    try:
        yield from read(folder)
    except BadDataset:  # somebody changed it: what it held cannot be told any more
        return
