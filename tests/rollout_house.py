"""A route whose versions are rolled out: a real journal, store, registry and controller, and sessions to be judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learner.registry import Registry, Version
from router.arms import Choice, Snapshot
from router.bandit import draw, unit_hash
from router.controller import Controller
from router.plan import RoutePlan
from router.policy import Arm, Policy, Reward, Thompson
from router.rollout import Rollout
from router.rollout_controller import ask, load, propose
from router.rollout_policy import Rollout as Rules
from router.store import Store
from telemetry.events import Answerer, Decision, Fact, Interaction, Signal
from telemetry.journal import Journal

ROUTE, LEAD = "r", "champion"
BEGAN = 1_800_000_000.0
ARMS = {LEAD: Arm(model="base")}


def rules(*stages: Any, **fields: Any) -> Rules:
    """Quick ones, in which an arm that everybody likes is soon proven."""
    known: dict[str, Any] = {"stages": list(stages) or [{"share": s} for s in (0.2, 0.5, 1.0)], "margin": 0.3}
    for stage in known["stages"]:
        if "share" in stage or "shadow" in stage:
            stage.setdefault("min_sessions", 20)
            stage.setdefault("min_time", 10)
    return Rules.model_validate(known | fields)


def registered(store: Store, folder: Path, n: int, route: str = ROUTE) -> str:
    """The name of the route's nth version."""
    same = "0" * 64
    hashes = dict.fromkeys(("base_hash", "tokenizer_hash", "template_hash"), same)
    new = Version(route=route, base="base", adapter_hash=f"{n:08x}".ljust(64, "0"), dataset=same, created=0.0, **hashes)
    return Registry(store).register(new, folder).name


class House:
    def __init__(self, folder: Path, store: Store, journal: Journal | None = None, **plan: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.store = folder, store
        self.journal = journal or Journal(folder / "journal.db")
        self.registry = Registry(store)
        self.now = BEGAN
        self.alerts: list[Mapping[str, Any]] = []
        self._served = 0
        self.plan(**plan)

    def plan(self, rollout: Rules | None = None, policy: Policy | None = None, arms: Mapping[str, Arm] = ARMS) -> None:
        """Begin anew with a config."""
        self.rules = rollout or rules()
        self._plan = RoutePlan(ROUTE, arms, policy or Thompson(), Reward(), self.rules)
        self.one = self.controller()

    def controller(self, owner: str = "one", store: Any = None, journal: Any = None) -> Controller:
        place = store or self.store
        return Controller(
            [self._plan],
            journal or self.journal,
            place,
            owner,
            registrar=Registry(place),
            alert=lambda _, what: self.alerts.append(what),
        )

    def close(self) -> None:
        self.journal.close()

    def step(self, seconds: float = 2.0, controller: Controller | None = None) -> None:
        """Let time pass, and the controller take in all there is."""
        self.now += seconds
        while (controller or self.one).step(self.now):
            pass

    # What is asked of it.

    def propose(self, n: int = 1) -> str:
        name = registered(self.store, self.folder / "versions", n)
        propose(self.store, self.registry, ROUTE, name, "learner", "passed its gate", self.now)
        return name

    def begun(self, n: int = 1) -> str:
        """A challenger in its first step."""
        name = self.propose(n)
        self.step()
        self.step()
        return name

    def ask(self, verb: Any, who: str = "ann") -> Rollout:
        return ask(self.store, ROUTE, verb, who, f"{verb} by {who}", self.now, self.rules)

    # What is there.

    @property
    def rollout(self) -> Rollout:
        found = load(self.store, ROUTE)[1]
        assert found is not None
        return found

    @property
    def snapshot(self) -> Snapshot:
        found = self.store.snapshot(ROUTE)
        assert found is not None
        return found

    def share(self, arm: str, segment: str = "") -> float:
        """The most of all sessions that an arm is drawn for."""
        weights, h = self.snapshot.segments[segment], self.snapshot.holdout
        even = [name for name in weights if name != self.snapshot.challenger]
        return (1.0 - h) * weights.get(arm, 0.0) + (h / len(even) if arm in even else 0.0)

    @property
    def record(self) -> list[Decision]:
        """Decisions as they lie in the journal."""
        return [fact for _, fact in self.journal.read(0, 10**6) if isinstance(fact, Decision)]

    @property
    def verbs(self) -> list[str]:
        return [one.verb for one in self.record]

    # Sessions.

    def sessions(self, n: int, likes: Mapping[str, float], vote: bool = True, **fields: Any) -> dict[str, int]:
        """So many sessions that draw from the weights, and are liked with 0 or 1 (or not judged); whom they drew."""
        facts: list[Fact] = []
        drawn: dict[str, int] = {}
        for _ in range(n):
            self._served += 1
            session = f"s{self._served}"
            choice = draw(self.snapshot, unit_hash(ROUTE, session))
            drawn[choice.arm] = drawn.get(choice.arm, 0) + 1
            facts += self._session(session, choice, likes.get(choice.arm, 0.5) if vote else None, fields)
        self.journal.append(facts)
        return drawn

    def judged(
        self, challenger: str, n: int, ours: float, theirs: float, p: float = 0.5, segment: str = "", **fields: Any
    ) -> None:
        """n sessions of each side, whatever the weights."""
        rollout, facts = self.rollout.id, []
        for _ in range(n):
            for arm, value in ((challenger, ours), (self.rollout.control, theirs)):
                self._served += 1
                choice = Choice(arm, p, segment=segment, policy="thompson", rollout=rollout, rival=p)
                own = fields if arm == challenger else {}
                facts += self._session(f"s{self._served}", choice, value, own)
        self.journal.append(facts)

    def _session(self, session: str, choice: Choice, value: float | None, fields: Mapping[str, Any]) -> list[Fact]:
        who = Answerer(
            choice.arm, choice.arm, policy=choice.policy, snapshot=choice.snapshot, segment=choice.segment,
            propensity=choice.propensity, holdout=choice.holdout, rollout=choice.rollout, rival=choice.rival,
        )  # fmt: skip
        known: dict[str, Any] = {"at": self.now, "duration": 1.0, "first_byte": 0.2, "status": 200} | dict(fields)
        named = {"event_id": f"e-{session}", "request_id": f"q-{session}", "session": session}
        facts: list[Fact] = [Interaction(route=ROUTE, tenant="t", answerer=who, **named, **known)]
        if value is not None:
            facts.append(Signal(f"v-{session}", self.now, "thumb", "t", response_id=f"q-{session}", value=value))
        return facts
