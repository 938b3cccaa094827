"""Which arms a route has under a snapshot, who stands in for whom, and how a request is dressed for one.

Beside the config's arms there may be versions of the registry (`Snapshot.versions`): each is dressed as the config's
arm `lead` is, but its model is its own name. What follows from a snapshot is worked out once and kept with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from gateway.openai import Ask, Fields, with_system_prompt
from gateway.upstream import Replica, Timeouts
from router.arms import Choice, Snapshot
from router.casting import dressed
from router.features import FeatureName
from router.policy import Arm

_USAGE: Fields = {"include_usage": msgspec.Raw(b"true")}
_options = msgspec.json.Decoder(Fields)


@dataclass(frozen=True, slots=True)
class Route:
    """A model name that apps ask for, and who can answer it."""

    name: str
    arms: Mapping[str, Arm]
    """Those of the config; a snapshot may name more."""
    replicas: list[Replica]
    timeouts: Timeouts
    segment_by: str | None = None
    features: tuple[FeatureName, ...] = ()


@dataclass(frozen=True, slots=True)
class Lineup:
    """A route's arms under one snapshot."""

    snapshot: Snapshot
    arms: Mapping[str, Arm]
    """The config's and the versions, by name."""
    held: frozenset[str]
    """Those that a session which has one keeps."""
    stand_ins: tuple[str, ...]
    """Who answers, in this order, while no replica serves the arm that a session has."""
    versions: frozenset[str]
    """Models of the arms that are versions: those that a replica forgets when it restarts."""

    def in_turn(self, choice: Choice) -> Iterator[str]:
        """The arm that was chosen, if there is one of that name, then those that stand in for it.

        For one that an operator named, none does.
        """
        if choice.arm in self.arms:
            yield choice.arm
        if choice.policy != "pinned":
            yield from (name for name in self.stand_ins if name != choice.arm)


def lineup(config: Mapping[str, Arm], snapshot: Snapshot) -> Lineup:
    """What `snapshot` makes of the arms in the config; versions of a lead that is not there are no arms."""
    lead = config.get(snapshot.lead)
    versions = {name: dressed(lead, name) for name in snapshot.versions if name not in config} if lead else {}
    arms = {**config, **versions}
    weighted: set[str] = set().union(*snapshot.segments.values())
    return Lineup(
        snapshot=snapshot,
        arms=arms,
        held=frozenset(arms.keys() & (weighted | set(snapshot.kept))),
        stand_ins=tuple(dict.fromkeys(name for name in _stand_ins(config, versions, snapshot) if name in arms)),
        versions=frozenset(versions),
    )


def _stand_ins(config: Mapping[str, Arm], versions: Mapping[str, Arm], snapshot: Snapshot) -> Iterable[str]:
    """The control, or the champion where nothing is tried; who may stay; the arm they came from; all of the config."""
    weights = snapshot.segments.get("", {})
    drawn = sorted((name for name, weight in weights.items() if weight > 0.0), key=lambda name: -weights[name])
    champions = [name for name in drawn if name in versions and name != snapshot.challenger]
    named = [name for name in drawn if name in config and name != snapshot.challenger]
    return (snapshot.control, *champions, *snapshot.kept, snapshot.lead, *named, *config)


class Lineups:
    """The lineup of each route under the snapshot that it has now, for one worker."""

    def __init__(self, routes: Mapping[str, Route], snapshots: Mapping[str, Snapshot]) -> None:
        """`snapshots`: those in use, which come to be others from time to time."""
        self._routes = routes
        self._snapshots = snapshots
        self._known: dict[str, Lineup] = {}

    def of(self, route: str) -> Lineup:
        snapshot = self._snapshots[route]
        known = self._known.get(route)
        if known is None or known.snapshot is not snapshot:
            known = self._known[route] = lineup(self._routes[route].arms, snapshot)
        return known


def dress(fields: Fields, endpoint: str, ask: Ask, arm: Arm) -> bool:
    """Change a request's fields, in place, into those for `arm`. True if the answer's usage chunk must go again."""
    fields["model"] = msgspec.Raw(msgspec.json.encode(arm.model))
    for name, value in arm.params.items():
        fields[name] = msgspec.Raw(msgspec.json.encode(value))
    if arm.system is not None:
        with_system_prompt(fields, endpoint, arm.system)
    asked = ask.stream_options is not None and ask.stream_options.include_usage
    if not ask.stream or asked or endpoint not in ("chat/completions", "completions"):
        return False
    options = _USAGE if ask.stream_options is None else _options.decode(fields["stream_options"]) | _USAGE
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode(options))
    return True
