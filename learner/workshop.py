"""What a route's rounds of learning are made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from learner import dataset
from learner.answers import Generate, Score, peft_scores
from learner.loaded import Stage
from learner.plan import Learner
from learner.registry import Registry, Version
from learner.runners import Event, Runner
from learner.serving import Fleet
from router.policy import Arm
from router.store import Documents
from telemetry.errors import UnderstudyError


class Refused(UnderstudyError):
    """A round that must not go on: the message says why, and what to do."""


class Workshop(NamedTuple):
    """What a route's rounds are made with."""

    route: str
    plan: Learner
    source: dataset.Source
    documents: Documents
    fleet: Fleet
    runner: Runner
    generate: Generate
    owner: str
    threads: int = 2
    gpu: tuple[bool, int | None] = (False, None)
    """Whether training has one, and its bytes of memory if they are known."""
    arms: frozenset[str] = frozenset()
    """Models of the route's arms."""
    lead: Arm | None = None
    """The config's arm as which versions are dressed; None for a bare one with the base."""
    score: Score = peft_scores()
    gate: Callable[[Workshop, Version, Path], Any] | None = None
    """What a challenger must pass, `learner.gating.gate`; None where a round ends before."""
    rolls_out: bool = False
    """Whether what passed is rolled out by the controller."""

    @property
    def registry(self) -> Registry:
        return Registry(self.documents)

    @property
    def folder(self) -> Path:
        return self.plan.folder.resolve()

    @property
    def stage(self) -> Stage:
        return Stage(self.route, self.registry, self.fleet, self.arms)


Say = Callable[[str, Event], None]
"""Told each step as it begins, and what happens in it."""
