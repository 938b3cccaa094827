"""What the router is asked and what it answers."""

from __future__ import annotations

import msgspec


class Snapshot(msgspec.Struct, frozen=True):
    """The weights of every arm of a route, as the controller published them; gateways draw from nothing else."""

    route: str
    version: int
    at: float
    policy: str
    holdout: float
    """Share of sessions that draw uniformly, for ever, whatever the weights."""
    segments: dict[str, dict[str, float]]
    """Segment → arm → weight; weights of a segment sum to 1. Segment "" is every one that is not here."""
    full: bool = False
    """No more segments get sums of their own: sessions of one that is not here count under ""."""
    price: float = 0.0
    """Reward given up for one unit of currency, where cost counts."""
    segmenter: str = ""
    """Version of what tells prompts apart, where they are the segments."""
    lead: str = ""
    """The arm of the config whose place a champion from the registry has taken."""
    versions: tuple[str, ...] = ()
    """Arms that are versions of the registry, by name: each is dressed as `lead` is, but for the model."""
    kept: tuple[str, ...] = ()
    """Arms that no session draws any more, and that those which have one may keep."""
    rollout: str = ""
    """The rollout under way, of `challenger` against `control`; the challenger has a weight once it is in canary."""
    challenger: str = ""
    control: str = ""
    shadow: float = 0.0
    """Share of requests of which the challenger gets a copy, whose answer nobody sees."""


class Choice(msgspec.Struct, frozen=True):
    """The arm that a session drew, and with what probability it had been drawn."""

    arm: str
    propensity: float
    snapshot: int = 0
    segment: str = ""
    holdout: bool = False
    policy: str = ""
    rollout: str = ""
    """The rollout that the session takes part in, and the propensity of the other one of its two arms."""
    rival: float = 0.0


class Cell(msgspec.Struct, frozen=True, order=True):
    """Where a reward is counted."""

    segment: str
    arm: str
    bucket: int
    """Start of the time bucket, Unix seconds."""
    metric: str = ""
    """What is counted: "" the sessions' rewards; `cost`, `latency` and others stand beside them."""


class Sums(msgspec.Struct, frozen=True):
    """Σw, Σwr and Σwr² of session rewards r in [0, 1] with weights w."""

    n: float = 0.0
    s: float = 0.0
    ss: float = 0.0

    def plus(self, other: Sums, times: float = 1.0) -> Sums:
        return Sums(self.n + times * other.n, self.s + times * other.s, self.ss + times * other.ss)
