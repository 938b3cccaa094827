"""A rollout with a past: simulated sessions through the real draw, journal and controller, hours in a second."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from conftest import eventually

from learner.registry import Registry, Version
from router.arms import Snapshot
from router.bandit import draw
from router.rollout import Rollout
from router.rollout_controller import load, propose
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal
from understudy.compose import build_controller, open_store
from understudy.serve import admin_server
from understudy.settings import Settings
from understudy.settings import load as settings_of

ROUTE = "assistant"
STAGES = [
    {"share": 0.1, "min_sessions": 20, "min_time": 0},
    {"share": 0.3, "min_sessions": 150, "min_time": 0},
    {"share": 0.5, "min_sessions": 700, "min_time": "8h"},
    {"share": 1.0},
]
HOURS = 6
SLOWER = 1.15


def config(folder: Path, **route: Any) -> Settings:
    """Settings of a route with a rollout, whose state lies in `folder`; other fields of the route in `route`."""
    wanted: dict[str, Any] = {
        "upstreams": ["http://127.0.0.1:9"],
        "arms": {"champion": {"model": "base"}},
        "policy": {"kind": "thompson", "holdout": 0.05},
        "rollout": {"stages": STAGES, "interval": "1s"},
    } | route
    path = folder / "understudy.yaml"
    state = f"sqlite:////{str(folder / 'state.db').lstrip('/')}"
    path.write_text(yaml.safe_dump({"state": state, "routes": {ROUTE: wanted}}, sort_keys=False))
    return settings_of(path)


def plant(
    settings: Settings,
    looks: int = 24,
    at_once: int = 80,
    good: tuple[float, float] = (0.66, 0.58),
    errors: tuple[float, float] = (0.012, 0.01),
    alert: Callable[[str, Mapping[str, Any]], None] = lambda *_: None,
) -> Rollout:
    """Let `at_once` sessions come before each of `looks` looks, the last one now; the rollout after them.

    `good` and `errors`: chances of a good vote and of a failure with challenger and control.
    """
    chance, started = random.Random(5), time.time() - HOURS * 3600.0
    store, journal = open_store(settings), Journal(settings.journal_path)
    registry = Registry(store)
    first, second = (registry.register(version(digit), settings.journal_path.parent) for digit in "12")
    registry.move(ROUTE, "champion", first.name, None)
    controller = build_controller(settings, "planted", alert=alert)
    why = "the gate passed: +0.05 [+0.01, +0.09] on 400 held-out prompts"
    propose(store, registry, ROUTE, second.name, "learner", why, started - 60.0)
    for look in range(looks + 1):
        now = started + look * HOURS * 3600.0 / looks
        while controller.step(now):
            pass
        snapshot = store.snapshot(ROUTE)
        assert snapshot is not None
        if look < looks:
            journal.append(
                [fact for n in range(at_once) for fact in _session(f"{look}-{n}", now, snapshot, chance, good, errors)]
            )
    rollout = load(store, ROUTE)[1]
    assert rollout is not None
    journal.close()
    store.close()
    return rollout


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The real admin listener; its address."""
    server = admin_server(settings)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        eventually(lambda: server.started or not thread.is_alive(), 20)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def version(digit: str) -> Version:
    """One that was made of nothing, to be registered."""
    some = 64 * digit
    return Version(
        route=ROUTE, base="base", base_hash=some, tokenizer_hash=some, template_hash=some, adapter_hash=some,
        dataset=some, created=1.0,
    )  # fmt: skip


def _session(
    name: str,
    now: float,
    snapshot: Snapshot,
    chance: random.Random,
    good: tuple[float, float],
    errors: tuple[float, float],
) -> list[Fact]:
    choice = draw(snapshot, chance.random())
    side = 0 if choice.arm == snapshot.challenger else 1
    who = Answerer(
        choice.arm,
        choice.arm,
        policy=choice.policy,
        propensity=choice.propensity,
        holdout=choice.holdout,
        rollout=choice.rollout,
        rival=choice.rival,
    )
    took = chance.lognormvariate(0.2, 0.4) * (SLOWER if side == 0 else 1.0)
    failed = chance.random() < errors[side]
    asked = Interaction(
        f"i-{name}", now, name, ROUTE, "acme", f"s-{name}", who,
        status=502 if failed else 200, error="upstream_cut" if failed else None,
        duration=took, first_byte=took / 8, input_hash=name,
    )  # fmt: skip
    if failed or chance.random() > 0.7:
        return [asked]
    value = float(chance.random() < good[side])
    return [asked, Signal(f"v-{name}", now, "thumb", "acme", response_id=name, value=value)]
