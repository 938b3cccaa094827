"""Which versions the replicas must have: those with a part, and those that an operator wrote as arms; no others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from learner import hashes, serving
from learner.registry import Registry, Unknown, Version
from learner.serving import Fleet, Reconciled, Replica, ServingFailed
from telemetry.errors import UnderstudyError


class Stage(NamedTuple):
    """A route's replicas and what may be loaded there."""

    route: str
    registry: Registry
    fleet: Fleet
    arms: Collection[str]
    """Models of the route's arms, as the config has them."""


class Left(UnderstudyError):
    """Something could not be taken off some replica; says which."""


def keep(stage: Stage) -> list[str]:
    """Versions that stay loaded, each once."""
    named = [*stage.registry.aliases(stage.route).values(), *sorted(stage.arms)]
    return [name for name in dict.fromkeys(named) if _version(stage, name) is not None]


def reconcile(stage: Stage, making: Collection[str] = ()) -> Reconciled:
    """Load what replicas that were restarted miss, and take off versions of the route that have no part any more.

    `making`: versions that a round is about to serve. Raises nothing that concerns one replica or version only.
    """
    wanted = [(version, _unfit(version)) for name in keep(stage) if (version := _version(stage, name)) is not None]
    done = serving.reconcile(stage.fleet, [version for version, why in wanted if why is None])
    done.refused.extend(("every replica", version.name, why) for version, why in wanted if why is not None)
    stay = {*keep(stage), *making}  # looked at again: somebody may have dropped one meanwhile
    of_url = {replica.url: replica for replica in stage.fleet.replicas}
    for url, name in [*done.others, *done.loaded]:
        if name not in stay and _version(stage, name) is not None and (why := off(of_url[url], name, stay)):
            done.refused.append((url, name, why))
    return done


def take_off(stage: Stage, names: Iterable[str]) -> None:
    """Unload versions from every replica. Raises Left, with all that it could not, after it tried all."""
    stay = keep(stage)
    tried = [(name, off(replica, name, stay)) for name in names for replica in stage.fleet.replicas]
    if left := [f"{name}: {why}" for name, why in tried if why]:
        raise Left(f"still loaded: {'; '.join(left)}; `understudy learn watch` takes it off when it can")


def off(replica: Replica, name: str, stay: Collection[str]) -> str:
    """Unload a version; why not, if it could not be."""
    try:
        serving.unload(replica, name, lambda: stay)
    except ServingFailed as error:
        return str(error)
    return ""


def changed(version: Version) -> str | None:
    """How the base under a version is another one than it was trained on; None if it is the same."""
    base = hashes.located(version.base)
    for what, now, was in (
        ("weights", hashes.base_hash(base), version.base_hash),
        ("tokenizer", hashes.tokenizer_hash(base), version.tokenizer_hash),
        ("chat template", hashes.template_hash(base), version.template_hash),
    ):
        if now != was:
            where = f"the base at {version.base} changed under {version.name}"
            return f"{where}: its {what} is {now[:12] or 'gone'}, and was {was[:12]}"
    return None


def _unfit(version: Version) -> str | None:
    try:
        return changed(version)
    except OSError as error:
        return f"its base cannot be read: {error}"


def _version(stage: Stage, name: str) -> Version | None:
    """A version of the route; None for any other name."""
    try:
        version = stage.registry.version(name)
    except Unknown:
        return None
    return version if version.route == stage.route and Path(version.folder).is_dir() else None
