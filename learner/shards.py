"""A dataset's files: examples in shards, each with its hash, and the manifest that names them.

The rows are in one order and each is one canonical line, so equal examples are equal bytes. Parquet holds the same
lines, one a row beside the columns that one filters by; its bytes depend on the version of the library that writes
them, so what names a dataset is always the hash of the lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from learner.examples import KINDS, SPLITS, Example, decode, encode
from learner.hashes import file_hash
from telemetry.errors import UnderstudyError

MANIFEST = "manifest.json"
NO_PARQUET = "Parquet needs pyarrow; install Understudy's learner extra, or write `format: jsonl`"


class BadDataset(UnderstudyError):
    """A dataset that cannot be used; says which file and what to do."""


class Shard(NamedTuple):
    name: str
    examples: int
    sha256: str
    """Of the lines it holds."""


def in_order(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda one: (SPLITS.index(one.split), KINDS.index(one.kind), one.id))


def write(folder: Path, examples: Iterable[Example], format: str, size: int) -> list[Shard]:
    """Write the shards into `folder`, at most `size` examples each."""
    shards = []
    for (split, kind), group in groupby(in_order(examples), key=lambda one: (one.split, one.kind)):
        own = list(group)
        for number, start in enumerate(range(0, len(own), size)):
            lines = [encode(one) for one in own[start : start + size]]
            name = f"{split}-{kind}-{number:05}.{format}"
            write_shard(folder / name, lines, f".{format}")
            shards.append(Shard(name, len(lines), digest(lines)))
    return shards


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Last of all: a folder with a manifest is whole."""
    body = json.dumps(manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    _durably(folder / f".{MANIFEST}", body.encode())
    os.replace(folder / f".{MANIFEST}", folder / MANIFEST)


def manifest(folder: Path) -> dict[str, Any]:
    """Raises `BadDataset`."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(found, dict) or not isinstance(found.get("shards"), list):
            raise ValueError("it names no shards")
    except FileNotFoundError:
        raise BadDataset(
            f"{folder} is no dataset: it has no {MANIFEST}; `understudy dataset build` makes one"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadDataset(f"{folder / MANIFEST} cannot be read ({error}); build the dataset anew") from None
    return found


def manifest_hash(folder: Path) -> str:
    """SHA-256 of a dataset's manifest, and so of all its content."""
    return file_hash(folder / MANIFEST)


def dataset_name(folder: Path) -> str:
    """What versions know a dataset by: the hash of its manifest, as it was before anything was erased."""
    erased = manifest(folder).get("erased")
    return str(erased["from"]) if erased else manifest_hash(folder)


def read(folder: Path) -> Iterator[Example]:
    """All examples in their order. Raises `BadDataset` where a shard is not what the manifest says."""
    for shard in manifest(folder)["shards"]:
        path = folder / shard["name"]
        lines = lines_of(path)
        if digest(lines) != shard["sha256"]:
            raise BadDataset(f"{path} was changed since the dataset was built; build it anew")
        yield from examples(lines)


def examples(lines: Iterable[bytes]) -> Iterator[Example]:
    """Raises `BadDataset` at a line that is none."""
    for line in lines:
        try:
            yield decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadDataset(f"a line is no example ({error}); build the dataset anew") from None


def lines_of(path: Path) -> list[bytes]:
    """The lines of a shard, whatever the manifest says of them. Raises `BadDataset`."""
    try:
        return path.read_bytes().splitlines() if path.suffix == ".jsonl" else _read_parquet(path)
    except OSError as error:
        raise BadDataset(f"{path} cannot be read ({error.strerror}); build the dataset anew") from None


def write_shard(path: Path, lines: Sequence[bytes], suffix: str) -> None:
    (_write_lines if suffix == ".jsonl" else _write_parquet)(path, lines)


def digest(lines: Sequence[bytes]) -> str:
    hashed = hashlib.sha256()
    for line in lines:
        hashed.update(line + b"\n")
    return hashed.hexdigest()


def _write_lines(path: Path, lines: Sequence[bytes]) -> None:
    _durably(path, b"".join(line + b"\n" for line in lines))


def _durably(path: Path, body: bytes) -> None:
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(path: Path, lines: Sequence[bytes]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadDataset(NO_PARQUET) from None
    rows = [decode(line) for line in lines]
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in rows]
        for name in (
            "id",
            "kind",
            "reason",
            "chosen",
            "rejected",
            "weight",
            "tenant",
            "user",
            "task_type",
            "at",
            "split",
        )
    }
    columns["events"] = [list(row.events) for row in rows]
    columns["messages"] = [json.dumps(row.messages, ensure_ascii=False, sort_keys=True) for row in rows]
    columns["example"] = [line.decode() for line in lines]
    parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def _read_parquet(path: Path) -> list[bytes]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadDataset(NO_PARQUET) from None
    return [line.encode() for line in parquet.read_table(path, columns=["example"]).column("example").to_pylist()]
