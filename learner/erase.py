"""Text that must go leaves the datasets too: because its user asked, or because it has been kept long enough.

A dataset that lost examples says so in its manifest, and keeps the name that versions know it by. It cannot be trained
on any more, for it is another one: the versions that it made are named, so that somebody can decide about them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner import gate_report, shards
from learner.examples import Example, decode
from learner.lineage import datasets
from learner.registry import Registry

log = logging.getLogger("understudy.learner")


def erase(folder: Path, gone: Callable[[Example], bool]) -> int:
    """Take the examples that are `gone` out of a dataset; how many. May be stopped anywhere and done again."""
    manifest = shards.manifest(folder)
    erased = 0
    written: list[dict[str, Any]] = []
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        lines = _lines(folder, shard)
        kept = [line for line in lines if not gone(decode(line))]
        digest = shards.digest(kept)
        if len(kept) < len(lines) or not path.exists():
            beside = path.with_name(f".{path.name}")
            shards.write_shard(beside, kept, path.suffix)
            os.replace(beside, path)
        erased += shard["examples"] - len(kept)
        written.append({"name": shard["name"], "examples": len(kept), "sha256": digest})
    if written != manifest["shards"]:
        name = shards.dataset_name(folder)
        before = manifest.get("erased", {"examples": 0})["examples"]
        manifest |= {"shards": written, "erased": {"from": name, "examples": before + erased}}
        for row in manifest["filters"]:
            row["shown"] = []
        shards.write_manifest(folder, manifest)
    return erased


def erase_everywhere(
    learner: Path, registry: Registry, gone: Callable[[Example], bool], why: str, tag: str = "erased"
) -> tuple[int, list[str]]:
    """`erase` from all datasets of a learner's folder; how many examples, and the versions that had learned from them.

    Such a version is tagged with the reason, and reports of gates show the examples no more. A dataset that cannot be
    read cannot be kept either: it may hold what must go. So it is taken away, and its versions are named too.
    """
    erased, touched = 0, []
    for folder in datasets(learner):
        try:
            if not _concerns(folder, gone):
                continue
            name = shards.dataset_name(folder)
        except (shards.BadDataset, OSError) as error:
            log.warning("%s cannot be read (%s), and is taken away with all reports of gates", folder, error)
            shutil.rmtree(learner / "gates", ignore_errors=True)  # nobody can tell any more what in them is from it
            shutil.rmtree(folder)
            continue
        own = registry.trained_on(name)
        for version in own:  # before: what was erased cannot tell any more whom it concerns
            registry.tag(version, tag, why)
        gate_report.clean(learner / "gates", _ids(folder, gone))
        touched += own
        erased += erase(folder, gone)
    return erased, touched


def _concerns(folder: Path, gone: Callable[[Example], bool]) -> bool:
    """Whether a dataset has something that must go, or lost it already without saying so. Raises BadDataset."""
    for shard in shards.manifest(folder)["shards"]:
        lines = _lines(folder, shard)
        if shards.digest(lines) != shard["sha256"] or any(map(gone, shards.examples(lines))):
            return True
    return False


def _ids(folder: Path, gone: Callable[[Example], bool]) -> set[str]:
    shown = shards.manifest(folder)["shards"]
    return {one.id for shard in shown for one in shards.examples(_lines(folder, shard)) if gone(one)}


def _lines(folder: Path, shard: dict[str, Any]) -> list[bytes]:
    """A shard that is missing holds nothing any more."""
    path = folder / shard["name"]
    return shards.lines_of(path) if path.exists() else []
