"""Which versions of a route's model there are, what each was made from, and which one holds which part.

The semantics are MLflow's model registry's (mlflow.org, "Model Registry": immutable numbered versions, movable aliases,
tags), kept in a store's documents, each changed by compare-and-set:

    version/{route}/{number}   a `Version`: never removed, so neither number nor name comes twice
    aliases/{route}            champion, challenger, previous → version's name
    tags/{version}             what was decided about it, such as `quarantined`
    metrics/{version}          what was measured on it after training

A version's folder holds its adapter and its card, so `Registry.restore` makes the first kind anew from the folders.
What can go wrong, as a tree:

RegistryError
├── Unknown      no such version, or not of this route
├── Conflict     a name or a folder already stands for something else
└── Tampered     a version's files are not those that were registered
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from learner.hashes import folder_hash
from router.store import Documents
from telemetry.errors import UnderstudyError

Alias = Literal["champion", "challenger", "previous"]
CARD = "card.json"
ADAPTER = "adapter"

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)-v(\d+)-([0-9a-f]{8})")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
_HASH = re.compile(r"[0-9a-f]{64}")


class RegistryError(UnderstudyError):
    """The registry refuses; the message says what stands in the way and what to do."""


class Unknown(RegistryError):
    """No such version, or not one of this route."""


class Conflict(RegistryError):
    """A name or a folder already stands for something else."""


class Tampered(RegistryError):
    """A version's files are not those that were registered."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter and all that it was made from. The last four fields are the registry's to fill."""

    route: str
    base: str
    """The model that the adapter is for: a folder, or a hub name."""
    base_hash: str
    tokenizer_hash: str
    template_hash: str
    adapter_hash: str
    """`learner.hashes.folder_hash` of its files."""
    dataset: str
    """SHA-256 of the manifest of what it was trained on."""
    created: float
    """Unix seconds."""
    parent: str | None = None
    """Name of the version that it shall replace."""
    spec: dict[str, Any] = {}
    """The training run, as `learner.spec.TrainSpec` holds it."""
    seed: int = 0
    packages: dict[str, str] = {}
    metrics: dict[str, float] = {}
    """Of its training; what is measured later is `Registry.metrics`."""
    name: str = ""
    """`{route}-v{number}-{first 8 digits of adapter_hash}`: the name it is served under, too, and of its folder.

    What of a route cannot be in a folder's name is `-` there; routes that look alike so share their numbers.
    """
    number: int = 0
    folder: str = ""
    """Where `install` puts it."""
    served_hash: str = ""
    """Hash of the files that replicas were told to load, when they first were; "" until then."""

    @property
    def adapter(self) -> Path:
        """What a replica is told to load."""
        return Path(self.folder) / ADAPTER


_version = msgspec.json.Decoder(Version)
_aliases = msgspec.json.Decoder(dict[Alias, str])
_tags = msgspec.json.Decoder(dict[str, str])
_metrics = msgspec.json.Decoder(dict[str, float])


class Registry:
    """The versions of all routes. Many processes may use one store at once; `StateError`s come through."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def register(self, new: Version, versions: Path) -> Version:
        """Give `new` the next number of its route, a name and a folder below `versions`.

        What has the same adapter and dataset as a version of the route is that version, whoever registers it. Cards
        found in `versions` count as registered, so a store that was emptied gives no number a second time.
        """
        _check(new)
        self.restore(versions)
        while True:
            known = self._numbered(new.route)
            for version in known:
                if _origin(version) == _origin(new):
                    return version
            number = known[-1].number + 1 if known else 1
            name = f"{_in_names(new.route)}-v{number}-{new.adapter_hash[:8]}"
            version = replace(new, number=number, name=name, folder=str(versions.resolve() / name), served_hash="")
            if self._documents.swap(_place(version), None, _json(version)):
                return version

    def version(self, name: str) -> Version:
        """Raises Unknown."""
        match = _NAME.fullmatch(name)
        body = self._documents.read(_at(match[1], int(match[2]))) if match else None
        version = _version.decode(body) if body else None
        if version is None or version.name != name:
            raise Unknown(f"no version {name!r} is registered; see which ones are, or restore them from their folder")
        return version

    def versions(self, route: str) -> list[Version]:
        """All of a route's, oldest first."""
        return [version for version in self._numbered(route) if version.route == route]

    def trained_on(self, dataset: str) -> list[str]:
        """Names of all routes' versions that were trained on a dataset, by its hash."""
        bodies = [self._documents.read(name) for name in self._documents.names("version/")]
        return [version.name for body in bodies if body and (version := _version.decode(body)).dataset == dataset]

    def alias(self, route: str, alias: Alias) -> str | None:
        return self.aliases(route).get(alias)

    def aliases(self, route: str) -> dict[Alias, str]:
        body = self._documents.read(f"aliases/{route}")
        return _aliases.decode(body) if body else {}

    def move(self, route: str, alias: Alias, to: str | None, expected: str | None) -> bool:
        """Point an alias at another version, or (None) at none; False if it is not where it was `expected`."""
        return self.move_all(route, {alias: (expected, to)})

    def move_all(self, route: str, moves: Mapping[Alias, tuple[str | None, str | None]]) -> bool:
        """Move aliases (expected, to) in one step, all of them or, if one is elsewhere than expected, none."""
        for _, to in moves.values():
            if to is not None and self.version(to).route != route:
                raise Unknown(f"{to} is no version of route {route!r}; move its own route's alias")
        while True:
            body = self._documents.read(f"aliases/{route}")
            now = _aliases.decode(body) if body else {}
            if any(now.get(alias) != expected for alias, (expected, _) in moves.items()):
                return False
            wanted = now | {alias: to for alias, (_, to) in moves.items()}
            after = {alias: to for alias, to in wanted.items() if to is not None}
            if self._documents.swap(f"aliases/{route}", body, _json(after)):
                return True

    def tag(self, name: str, key: str, value: str | None) -> None:
        """Set a version's tag; None takes it off."""

        def change(tags: dict[str, str]) -> dict[str, str]:
            others = {k: v for k, v in tags.items() if k != key}
            return others if value is None else others | {key: value}

        self._change(f"tags/{self.version(name).name}", _tags, change)

    def tags(self, name: str) -> dict[str, str]:
        body = self._documents.read(f"tags/{name}")
        return _tags.decode(body) if body else {}

    def measure(self, name: str, metrics: Mapping[str, float]) -> None:
        """Keep what was measured on a version; of one metric the last value."""
        _check_finite(metrics)
        self._change(f"metrics/{self.version(name).name}", _metrics, lambda known: known | dict(metrics))

    def metrics(self, name: str) -> dict[str, float]:
        """Of its training, and what was measured since."""
        body = self._documents.read(f"metrics/{name}")
        return self.version(name).metrics | (_metrics.decode(body) if body else {})

    def served(self, name: str, served_hash: str) -> None:
        """Remember what replicas were told to load, once: another hash under this name raises Tampered."""

        def change(version: Version) -> Version:
            if served_hash != version.adapter_hash:
                raise Tampered(
                    f"{name} is to be served with files of hash {served_hash[:12]}, but was registered with "
                    f"{version.adapter_hash[:12]}; register other weights as a new version"
                )
            return replace(version, served_hash=served_hash)

        self._change(_place(self.version(name)), _version, change)

    def restore(self, versions: Path) -> list[Version]:
        """Register what the cards below `versions` say and this store does not know; what was added.

        Aliases, tags and later metrics are not on cards. Raises Conflict where a card contradicts the store.
        """
        added = []
        for path in sorted(versions.resolve().glob(f"[!.]*/{CARD}")):
            version = replace(_card(path), folder=str(path.parent))
            if self._documents.swap(_place(version), None, _json(version)):
                added.append(version)
                continue
            body = self._documents.read(_place(version))
            known = _version.decode(body) if body else version
            if not _same(known, version):
                raise Conflict(
                    f"{path} says {version.name}, but {known.name} is registered under its number with another origin; "
                    "move that folder away, or use the store that it was registered in"
                )
        return added

    def _numbered(self, route: str) -> list[Version]:
        """All that share the route's numbers, oldest first."""
        names = self._documents.names(f"version/{_in_names(route)}/")
        bodies = [self._documents.read(name) for name in names]
        return sorted((_version.decode(body) for body in bodies if body), key=lambda version: version.number)

    def _change(self, name: str, decoder: msgspec.json.Decoder[Any], change: Callable[[Any], Any]) -> None:
        while True:
            body = self._documents.read(name)
            if self._documents.swap(name, body, _json(change(decoder.decode(body) if body else {}))):
                return


def install(artifact: Path, version: Version) -> Path:
    """Copy `artifact/adapter` to the version's folder, with its card; that folder.

    There whole or not at all, read-only and on disk; what is already there with the same content stays. Raises
    Tampered if the artifact is not what was registered, Conflict if other content has the folder.
    """
    target = Path(version.folder)
    if not target.exists():
        _verify(artifact / ADAPTER, version, "an artifact that changed after its run is not to be trusted: train again")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{version.name}.", dir=target.parent))
        try:
            _fill(beside, artifact / ADAPTER, version)
            verify(beside, version)
            _rename(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    if not (target / CARD).is_file() or not _same(_card(target / CARD), version):
        raise Conflict(f"{target} is there and is not {version.name}; move it away: a version's folder is never reused")
    verify(target, version)
    return target


def verify(folder: Path, version: Version) -> None:
    """Raises Tampered unless the version's folder still holds the adapter that was registered."""
    _verify(folder / ADAPTER, version, "it was tampered with: do not serve it; restore it from a backup or train anew")


def _verify(adapter: Path, version: Version, otherwise: str) -> None:
    found = folder_hash(adapter) if adapter.is_dir() else "nothing"
    if found != version.adapter_hash:
        registered = version.adapter_hash[:12]
        raise Tampered(f"{adapter} holds {found[:12]}, not {registered} as registered for {version.name}; {otherwise}")


def _rename(beside: Path, target: Path) -> None:
    try:
        os.rename(beside, target)
    except OSError:
        if not target.exists():  # else another process was first, and the caller looks at what it put there
            raise
    _sync(target.parent)


def _fill(folder: Path, adapter: Path, version: Version) -> None:
    for source in sorted(path for path in adapter.rglob("*") if path.is_file()):
        copy = folder / ADAPTER / source.relative_to(adapter)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    (folder / CARD).write_bytes(msgspec.json.format(_json(version), indent=2))
    for path in [*folder.rglob("*"), folder]:
        # vLLM may be another user: mkdtemp lets no other in, and PEFT keeps weights to their owner.
        path.chmod(0o755 if path.is_dir() else 0o444)
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _card(path: Path) -> Version:
    try:
        version = _version.decode(path.read_bytes())
        _check(version)
    except (msgspec.MsgspecError, UnicodeDecodeError, RegistryError) as error:
        raise Conflict(f"{path} is no version's card ({error}); move its folder away") from error
    if version.name != path.parent.name or not _NAME.fullmatch(version.name):
        raise Conflict(f"{path} is the card of {version.name!r}; a version's folder has its name: rename it back")
    return version


def _check(version: Version) -> None:
    if not re.match("[A-Za-z0-9]", version.route):
        raise RegistryError(f"route {version.route!r} cannot begin a version's name; begin it with a letter or digit")
    if not _HASH.fullmatch(version.adapter_hash):
        raise RegistryError(f"adapter_hash {version.adapter_hash!r} is no SHA-256; take Artifact.adapter_hash")
    _check_finite(version.metrics)


def _check_finite(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RegistryError(f"metric {name!r} is {value}; leave out what could not be measured")


def _origin(version: Version) -> tuple[str, str, str]:
    return version.route, version.adapter_hash, version.dataset


def _same(one: Version, other: Version) -> bool:
    return one.name == other.name and _origin(one) == _origin(other)


def _place(version: Version) -> str:
    return _at(_in_names(version.route), version.number)


def _at(route_in_names: str, number: int) -> str:
    return f"version/{route_in_names}/{number}"


def _in_names(route: str) -> str:
    return _NOT_IN_NAMES.sub("-", route)


def _json(value: object) -> bytes:
    return msgspec.json.encode(value, order="deterministic")
