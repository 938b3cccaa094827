"""Who plays which part: the config's arms, with the registry's champion in the lead's place, and the challenger. Pure.

The lead is the config's arm `champion`, or its first. Once a version was promoted it takes the lead's place under its
own name, dressed as the lead is (prompt, parameters, price) but for the model, so that evidence about one version is
never taken for another's. Whoever held the part before is kept: nobody draws it, its sessions may go on with it, and
`undo` brings it back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace

from router.arms import Snapshot
from router.bandit import Floats, with_caps
from router.policy import Arm, Policy, Split
from router.rollout import Alias, Rollout
from router.rollout_policy import Rollout as Rules

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-v\d+-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Cast:
    """The arms that sessions draw, but for the challenger's."""

    arms: Mapping[str, Arm]
    lead: str
    champion: str
    kept: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()


def is_version(arm: str) -> bool:
    """Whether an arm is a version of the registry: such a one is served under the arm's name."""
    return _VERSION.fullmatch(arm) is not None


def lead_of(arms: Mapping[str, Arm]) -> str:
    return "champion" if "champion" in arms else next(iter(arms))


def cast(arms: Mapping[str, Arm], aliases: Mapping[Alias, str]) -> Cast:
    """The parts as the config and the registry's aliases say."""
    lead, champion, previous = lead_of(arms), aliases.get("champion"), aliases.get("previous")
    if champion is None:
        return Cast(arms, lead, lead)
    before = previous or lead
    star = dressed(arms[lead], champion, before)
    playing = {champion if name == lead else name: star if name == lead else arm for name, arm in arms.items()}
    versions = (champion, *([previous] if previous else []))
    return Cast(playing, lead, champion, (before,), versions)


def dressed(lead: Arm, version: str, parent: str | None = None) -> Arm:
    """The arm of a version: as the lead is, but for the model, which the route's own replicas serve; expected to be
    like its parent."""
    elsewhere = dict.fromkeys(("provider", "api_key", "api_base"))
    return lead.model_copy(update={"model": version, "parent": parent, "gain": 0.0, **elsewhere})


@dataclass(frozen=True, slots=True)
class Parts:
    """Who plays what on a route now, and how much of it."""

    cast: Cast
    arms: Mapping[str, Arm]
    """That sessions draw."""
    rollout: Rollout | None = None
    cap: float = 0.0
    shadow: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """The same while nothing changed that weights depend on."""
        told = self.rollout and (self.rollout.id, self.rollout.phase)
        return self.cast.champion, self.cast.kept, told, self.cap, self.shadow


def with_challenger(playing: Cast, arms: Mapping[str, Arm], rollout: Rollout, policy: Rules) -> Parts:
    """The parts while a rollout is under way: `arms` are the config's."""
    if rollout.challenger == playing.champion:  # promoted already, and not written down yet
        return Parts(playing, playing.arms)
    cap = rollout.cap(policy)
    star = dressed(arms[playing.lead], rollout.challenger, playing.champion)
    drawn = {**playing.arms, rollout.challenger: star} if cap > 0.0 else playing.arms
    return Parts(playing, drawn, rollout, cap, rollout.shadow(policy))


def arms_of(snapshot: Snapshot, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms that have a place in a snapshot's weights; `arms` are the config's."""
    found = {}
    for name in snapshot.segments[""]:
        if name in arms:
            found[name] = arms[name]
        elif name in snapshot.versions and snapshot.lead in arms:
            parent = snapshot.control if name == snapshot.challenger else next(iter(snapshot.kept), snapshot.lead)
            found[name] = dressed(arms[snapshot.lead], name, parent)
    return found


def fitting(policy: Policy, arms: int) -> Policy:
    """The policy, whose floor leaves room for so many arms."""
    if isinstance(policy, Split) or policy.floor * arms <= 1.0:
        return policy
    return policy.model_copy(update={"floor": 1.0 / arms})


def capped(weights: Mapping[str, Mapping[str, float]], parts: Parts, holdout: float) -> dict[str, dict[str, float]]:
    """Segments' weights, where the challenger's give it no more of all sessions than its cap. The others share what
    that leaves as they did, up to their largest shares if they can (the challenger is none of the holdout's)."""
    challenger = parts.rollout.challenger if parts.rollout is not None else ""
    if challenger not in parts.arms:
        return {segment: dict(row) for segment, row in weights.items()}
    most = min(1.0, parts.cap / (1.0 - holdout))
    others = [arm for arm in parts.arms if arm != challenger]
    largest: Floats = np.array([parts.arms[arm].max_share for arm in others])
    largest = np.maximum(1e-9, largest - holdout / len(others)) / (1.0 - holdout)
    found = {}
    for segment, row in weights.items():
        own = min(row[challenger], most)
        rest = np.maximum(np.array([row[arm] for arm in others]), 1e-12)
        shared = (1.0 - own) * with_caps(rest / rest.sum(), largest / max(1e-12, 1.0 - own))
        shares = {**dict(zip(others, shared.tolist(), strict=True)), challenger: own}
        found[segment] = {arm: shares[arm] for arm in row}
    return found


def split_shares(policy: Split, parts: Parts) -> dict[str, dict[str, float]]:
    """Fixed shares, where the champion has the lead's, and the challenger what its step gives it of everyone's."""
    lead, champion = parts.cast.lead, parts.cast.champion
    own = {arm: policy.shares.get(lead if arm == champion else arm, 0.0) for arm in parts.cast.arms}
    if parts.rollout is None or parts.cap <= 0.0:
        return {"": own}
    return {"": {arm: share * (1.0 - parts.cap) for arm, share in own.items()} | {parts.rollout.challenger: parts.cap}}


def billed(snapshot: Snapshot, parts: Parts) -> Snapshot:
    """The snapshot, which says who plays what."""
    on = parts.rollout is not None and parts.rollout.phase not in ("rolling_back", "undoing")
    challenger = parts.rollout.challenger if on and parts.rollout is not None else ""
    return replace(
        snapshot,
        lead=parts.cast.lead,
        versions=(*parts.cast.versions, *([challenger] if challenger else [])),
        kept=parts.cast.kept,
        rollout=parts.rollout.id if challenger and parts.rollout is not None else "",
        challenger=challenger,
        control=parts.cast.champion if challenger else "",
        shadow=parts.shadow,
    )
