"""What the controller needs to know of a route, as its operator wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.policy import Arm, Policy, Reward
from router.rollout_policy import Rollout


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """A route."""

    name: str
    arms: Mapping[str, Arm]
    policy: Policy
    reward: Reward
    rollout: Rollout | None = None
