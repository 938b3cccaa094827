"""The rollouts of all routes, as the controller carries them on: facts in, parts out.

Between the journal and each route's `RolloutController`: it reads a rollout's evidence back after a restart, keeps what
people look at (`standing:{route}`) and error budgets (`budget:{route}`) in the store, and says who plays which part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from router.arms import Cell
from router.budget import Spent
from router.casting import Parts, cast, with_challenger
from router.plan import RoutePlan
from router.reward import GONE, by_session, session_reward
from router.reward import Heard as Told
from router.rollout import Rollout
from router.rollout_controller import Registrar, RolloutController
from router.rollout_policy import Rollout as Policy
from router.stats import baseline
from router.store import Store
from router.trial import Heard, Session, Standing
from telemetry.events import Fact, Interaction, Shadow
from telemetry.journal import Journal, came

log = logging.getLogger("understudy.rollout")
CHUNK = 500
"""Sessions whose evidence is read back at once."""
EARLY = 60.0
"""Seconds before a rollout began from which on its facts are looked for: clocks differ."""


class Rollouts:
    """Of all routes. One instance belongs to one controller."""

    def __init__(
        self,
        plans: Iterable[RoutePlan],
        journal: Journal,
        store: Store,
        registrar: Registrar | None,
        alert: Callable[[str, Mapping[str, Any]], None] = lambda *_: None,
    ) -> None:
        """`registrar`: None where no version can ever take a part. `alert` is told a route and what happened."""
        self._plans = {plan.name: plan for plan in plans}
        self._journal, self._store, self._registrar = journal, store, registrar
        self._of: dict[str, RolloutController] = {}
        self._shown: dict[str, bytes] = {}
        self._budgets: dict[str, Spent] = {}
        for plan in self._plans.values():
            if plan.rollout is not None and registrar is not None:
                self._of[plan.name] = RolloutController(
                    plan.name,
                    plan.rollout,
                    store,
                    registrar,
                    journal.append,
                    self._on_record,
                    lambda what, route=plan.name: alert(route, what),  # type: ignore[misc]
                    plan.reward.window,
                )

    def forget(self) -> None:
        """Somebody else was the controller meanwhile: read everything anew."""
        self._shown.clear()
        self._budgets.clear()
        for one in self._of.values():
            one.forget()

    def find(self, read: int, marks: Mapping[str, int], alive: Callable[[], object] = lambda: None) -> None:
        """See where each rollout stands; of one that is new here, read the evidence back, up to the fact `read`.

        `marks`: by route, up to which signal behaviour has waited for its window. `alive` is called once in a while,
        for a rollout may have lasted for weeks.
        """
        for route, one in self._of.items():
            rollout, unread = one.find()
            if unread and rollout is not None:
                try:
                    self._read_back(one, rollout, read, marks[route], alive)
                except BaseException:
                    one.forget()  # half of the evidence is none
                    raise
                shown = standing_of(self._store, route)
                if shown is not None and shown.at >= rollout.began:
                    one.standing = shown  # with the looks of the controller before

    def facts(self, facts: Sequence[tuple[int, Fact]]) -> None:
        """New facts, in the order of arrival."""
        if not self._of:
            return
        for _, fact in facts:
            if isinstance(fact, Interaction) and fact.route in self._of:
                self._of[fact.route].request(fact)
            elif isinstance(fact, Shadow) and fact.route in self._of:
                self._of[fact.route].shadow(fact)

    def settled(
        self,
        route: str,
        session: Session,
        requests: Sequence[tuple[int, Interaction]],
        heard: Sequence[Told],
        mark: int,
    ) -> None:
        """All that is known of a session by now, in whose reward something may have changed."""
        one = self._of.get(route)
        if one is None or not one.takes_part(session):
            return
        own = [fact for _, fact in requests if fact.route == route and not fact.answerer.unopposed]
        reward = session_reward(own, heard, self._plans[route].reward, mark)
        said = [signal for _, signal in heard if signal.kind not in GONE and signal.kind != "poll"]
        flagged = any(signal.kind == "flag" for signal in said)
        one.heard(session, Heard(reward.reward if reward is not None else None, flagged, bool(said)))

    def look(self, facts: Sequence[tuple[int, Fact]], now: float, token: int) -> dict[str, Parts]:
        """Take the steps that are due; by route, who plays what then."""
        return {name: self._look(plan, facts, now, token) for name, plan in self._plans.items()}

    def _look(self, plan: RoutePlan, facts: Sequence[tuple[int, Fact]], now: float, token: int) -> Parts:
        one = self._of.get(plan.name)
        aliases = self._registrar.aliases(plan.name) if self._registrar is not None else {}
        playing = cast(plan.arms, aliases)
        if one is None:
            return Parts(playing, playing.arms)
        budget = self._budget(plan.name, one.policy, facts, now, token)

        def usual() -> float:
            own = [sums for cell, sums in self._store.sums(plan.name).items() if _is_reward_of(cell, playing.champion)]
            return float(baseline(sum(one.n for one in own), sum(one.s for one in own)))

        rollout = one.look(now, playing.champion, usual, budget)
        self._show(plan.name, one, rollout, token)
        if rollout is None or not rollout.active:
            playing = cast(plan.arms, one.aliases())  # they may have moved just now
            return Parts(playing, playing.arms)
        return with_challenger(playing, plan.arms, rollout, one.policy)

    def _read_back(
        self, one: RolloutController, rollout: Rollout, read: int, mark: int, alive: Callable[[], object]
    ) -> None:
        found: list[tuple[int, Fact]] = []
        for rows in self._journal.backwards():
            found += [(seq, _bare(fact)) for seq, fact in rows if seq <= read and _is_of(fact, rollout)]
            alive()
            if came(rows[-1][1]) < rollout.began - EARLY:  # facts come nearly in the order of their times
                break
        self.facts(found[::-1])
        own = [fact for _, fact in found if isinstance(fact, Interaction) and fact.route == rollout.route]
        sessions = [key for fact in own if one.takes_part(key := (fact.tenant, fact.session))]
        for part in _chunks(list(dict.fromkeys(sessions))):
            alive()
            requests = self._journal.sessions(part, {})
            signals = self._journal.heard_about(i for rows in requests.values() for _, i in rows)
            for key, heard in by_session(requests, signals).items():
                self.settled(rollout.route, key, requests[key], heard, mark)
        if sessions:
            log.info("route %s: read %d sessions of %s back", rollout.route, len(set(sessions)), rollout.id)

    def _budget(
        self, route: str, policy: Policy, facts: Sequence[tuple[int, Fact]], now: float, token: int
    ) -> float | None:
        if policy.error_budget is None:
            return None
        name = f"budget:{route}"
        if route not in self._budgets:
            body = self._store.kept(name)
            known = msgspec.json.decode(body, type=Spent) if body else Spent()
            if known.through > self._journal.last():
                known = msgspec.structs.replace(known, through=0)  # of another journal
            self._budgets[route] = known
        own = [(seq, fact) for seq, fact in facts if isinstance(fact, Interaction) and fact.route == route]
        after = self._budgets[route].plus(own, policy.error_budget.window)
        if after != self._budgets[route]:
            self._store.keep(name, msgspec.json.encode(after), token)
            self._budgets[route] = after
        return after.left(policy.error_budget, now)

    def _show(self, route: str, one: RolloutController, rollout: Rollout | None, token: int) -> None:
        body = msgspec.json.encode(one.standing) if one.standing is not None else b""
        fresh = rollout is not None and rollout.phase == "pending"  # how the one before stood is not how it stands
        if (body or fresh) and body != self._shown.get(route):
            self._store.keep(f"standing:{route}", body, token)
            self._shown[route] = body

    def _on_record(self, rollout: str) -> int:
        return max((one.number for one in self._journal.decisions() if one.rollout == rollout), default=0)


def standing_of(store: Store, route: str) -> Standing | None:
    """How the route's rollout stood when it was last looked at."""
    body = store.kept(f"standing:{route}")
    return msgspec.json.decode(body, type=Standing) if body else None


def _is_of(fact: Fact, rollout: Rollout) -> bool:
    return (isinstance(fact, Interaction) and fact.answerer.rollout == rollout.id) or (
        isinstance(fact, Shadow) and fact.rollout == rollout.id
    )


def _bare(fact: Fact) -> Fact:
    """Without what people wrote: a month's facts are held at once."""
    if isinstance(fact, Interaction):
        return replace(fact, messages=None, answer=None, tool_calls=None)
    return replace(fact, answer=None, tool_calls=None) if isinstance(fact, Shadow) else fact


def _is_reward_of(cell: Cell, arm: str) -> bool:
    return cell.arm == arm and cell.metric == ""


def _chunks(sessions: list[Session]) -> Iterator[list[Session]]:
    for at in range(0, len(sessions), CHUNK):
        yield sessions[at : at + CHUNK]
