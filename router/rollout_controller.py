"""A route's rollout, carried on by whoever holds the controller's lease; and what operators and the learner ask of it.

The document `rollout/{route}` says where it stands; each change is a compare-and-set, so of an operator's promote and
the controller's rollback one comes first and the other is refused. What follows a promotion or a rollback elsewhere
(aliases, tags) is done while the document says that it is under way, and again by whoever finds it so. Evidence is not
kept: it is read from the journal by a controller that begins (`router.trial`).

What is decided must show in the next weights, whatever else fails: a registry or a disk that refuses holds up the
aftermath and the record, and is tried again, but no rollback.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec.structs import replace

from router import analysis
from router.analysis import Move, decide, evidence, impact
from router.rollout import (
    CONTROLLER,
    Alias,
    Refused,
    Rollout,
    Waits,
    approve,
    begin,
    rearranged,
    resume,
    start,
    told,
    turn,
)
from router.rollout_policy import Rollout as Policy
from router.store import Documents
from router.trial import Heard, Judged, Session, Standing, Trial, judged_name
from telemetry.errors import StateError, UnderstudyError
from telemetry.events import Decision, Interaction, Shadow

log = logging.getLogger("understudy.rollout")

UNFIT = ("dropped", "quarantined")
"""Tags of versions that must not be drawn."""
HISTORY = 200


class Registrar(Protocol):
    """Who keeps versions' aliases and tags (`learner.registry.Registry`)."""

    def aliases(self, route: str) -> Mapping[Alias, str]: ...
    def move_all(self, route: str, moves: Mapping[Alias, tuple[str | None, str | None]]) -> bool: ...
    def tag(self, name: str, key: str, value: str | None) -> None: ...
    def tags(self, name: str) -> Mapping[str, str]: ...


class RolloutController:
    """One route's rollout. Told of facts in the order of arrival, asked to `look` once in a while."""

    def __init__(
        self,
        route: str,
        policy: Policy,
        documents: Documents,
        registrar: Registrar,
        journal: Callable[[Sequence[Decision]], None],
        known: Callable[[str], int],
        alert: Callable[[Mapping[str, Any]], None] = lambda _: None,
        window: float = 0.0,
    ) -> None:
        """`journal` puts decisions on record; `known` says how many of a rollout's (by its id) are there already.

        `window`: seconds that users have to react to an answer.
        """
        self.route = route
        self.policy = policy
        self._documents, self._registrar = documents, registrar
        self._journal, self._known, self._alert, self._window = journal, known, alert, window
        self._told: dict[str, int] = {}
        """By rollout: the number of its last decision that is on record."""
        self._warned: set[tuple[str, str]] = set()
        self._complained = ""
        self._looked = 0.0
        self.trial: Trial | None = None
        self.standing: Standing | None = None

    def find(self) -> tuple[Rollout | None, bool]:
        """The rollout as it stands, and whether its evidence must be read from the journal first."""
        rollout = load(self._documents, self.route)[1]
        if rollout is None or rollout.phase not in ("running", "paused"):
            self.trial = None
            if rollout is not None and rollout.phase == "pending":
                self.standing = None
            return rollout, False
        if self.trial is not None and self.trial.id == rollout.id:
            return rollout, False
        self.trial, self.standing, self._looked = Trial(rollout, self._window), None, 0.0
        self._warned.clear()
        return rollout, True

    def forget(self) -> None:
        """Somebody else was the controller meanwhile: what is known here is old."""
        self.trial, self.standing, self._looked = None, None, 0.0
        self._told.clear()

    def request(self, fact: Interaction) -> None:
        if self.trial is not None:
            self.trial.request(fact)

    def shadow(self, fact: Shadow) -> None:
        if self.trial is not None:
            self.trial.shadow(fact)

    def heard(self, session: Session, heard: Heard) -> None:
        if self.trial is not None:
            self.trial.heard(session, heard)

    def aliases(self) -> Mapping[Alias, str]:
        return self._registrar.aliases(self.route)

    def takes_part(self, session: Session) -> bool:
        return self.trial is not None and session in self.trial

    def look(self, now: float, champion: str, baseline: Callable[[], float], budget: float | None) -> Rollout | None:
        """Take the steps that are due; the rollout after them. `champion`: the arm that plays it now.

        `budget`: the share of the error budget that is left. Raises `StateError`s; what was done then stays done.
        """
        body, rollout = load(self._documents, self.route)
        while rollout is not None:
            try:
                self._record(rollout)
            except StateError as error:
                self._complain(f"decisions are not on record yet: {error}")
            try:
                after = self._next(rollout, now, champion, baseline, budget)
            except UnderstudyError as error:
                if rollout.phase not in ("promoting", "undoing", "rolling_back"):
                    raise
                self._complain(f"{rollout.phase.replace('_', ' ')} {rollout.challenger} is not done yet: {error}")
                break
            if after is None:
                break
            if not self._documents.swap(_name(self.route), body, msgspec.json.encode(after)):
                log.info("route %s: somebody else moved the rollout; looking again", self.route)
            body, rollout = load(self._documents, self.route)
        return rollout

    def _next(
        self, rollout: Rollout, now: float, champion: str, baseline: Callable[[], float], budget: float | None
    ) -> Rollout | None:
        """One step; None where nothing is due."""
        match rollout.phase:
            case "pending":
                return self._start(rollout, now, champion, baseline, budget)
            case "promoting":
                if not made_champion(self._registrar, rollout):
                    return None  # somebody moved an alias meanwhile; the next look sees it
                why = f"{rollout.challenger} is the champion"
                return turn(rollout, "promoted", CONTROLLER, why, now, self.policy)
            case "undoing":
                if not unmade_champion(self._registrar, rollout):
                    return None
                return turn(rollout, "undone", CONTROLLER, rollout.why, now, self.policy)
            case "rolling_back":
                return self._rolled_back(rollout, now)
            case "running" | "paused":
                return self._look(rollout, now, champion, budget)
            case _:
                return None

    def _start(
        self, rollout: Rollout, now: float, champion: str, baseline: Callable[[], float], budget: float | None
    ) -> Rollout | None:
        waits: Waits = ""
        if why := self._unfit(rollout) or self._erased(rollout):
            return turn(rollout, "rollback", CONTROLLER, why, now, self.policy)
        if "begin" in self.policy.require_approval and "begin" not in rollout.approved:
            waits = "begin"
        elif budget is not None and budget < 0.0:
            waits = "budget"
        if waits:
            return replace(rollout, waits=waits) if rollout.waits != waits else None
        return start(rollout, champion, baseline(), self.policy, now)

    def _look(self, rollout: Rollout, now: float, champion: str, budget: float | None) -> Rollout | None:
        if self.trial is None or self.trial.id != rollout.id:
            return None  # its evidence is not read yet
        if champion != rollout.control:
            why = f"the champion is {champion} by now, and no longer {rollout.control}"
            return replace(turn(rollout, "rollback", CONTROLLER, why, now, self.policy), at_fault=False)
        if self._looked and 0.0 <= now - self._looked < self.policy.interval:
            return None
        if rollout.phase == "running" and (placed := rearranged(rollout, self.policy, now)) is not None:
            return placed
        self._looked = now
        self.standing = standing = self._stand(rollout, now, budget)
        self._warn(rollout, standing)
        move = decide(rollout, standing, self.policy, now)
        if move is None:
            return None
        return self._moved(rollout, move, standing, now)

    def _moved(self, rollout: Rollout, move: Move, standing: Standing, now: float) -> Rollout:
        found = evidence(standing) | ({"impact": impact(standing)} if move.verb == "promote" else {})
        log.info("route %s: %s %s: %s", self.route, move.verb, rollout.challenger, move.why)
        return turn(rollout, move.verb, CONTROLLER, move.why, now, self.policy, found, move.waits)

    def _stand(self, rollout: Rollout, now: float, budget: float | None) -> Standing:
        assert self.trial is not None
        found = self.trial.standing(rollout, self.policy, now)
        history = _longer(self.standing.history if self.standing is not None else (), found)
        body = self._documents.read(judged_name(rollout.id))
        judged = msgspec.json.decode(body, type=Judged) if body else None
        if judged is not None and judged.judged:
            told = {"judged": judged.judged, "judged_score": judged.score / judged.judged}
            found = replace(found, shadow=found.shadow | told)
        about, doubt = next(self._doubts(rollout, judged), ("", ""))
        unfit = self._unfit(rollout)
        return replace(found, unfit=unfit, doubt_about=about, doubt=doubt, budget_left=budget, history=history)

    def _doubts(self, rollout: Rollout, judged: Judged | None) -> Iterator[tuple[str, str]]:
        """What an operator must look at who has not done so yet."""
        erased = self._erased(rollout)
        if erased and "erased" not in rollout.excused:
            yield "erased", erased
        if judged is not None and judged.lost() and "shadow" not in rollout.excused:
            share = judged.score / judged.judged
            yield "shadow", f"a judge of {judged.judged} shadow answers gives the challenger {share:.0%} of the wins"

    def _erased(self, rollout: Rollout) -> str:
        why = self._registrar.tags(rollout.challenger).get("erased")
        return f"data that {rollout.challenger} learned from was erased: {why}" if why else ""

    def _unfit(self, rollout: Rollout) -> str:
        tags = self._registrar.tags(rollout.challenger)
        return next((f"{rollout.challenger} was {tag}: {tags[tag]}" for tag in UNFIT if tag in tags), "")

    def _rolled_back(self, rollout: Rollout, now: float) -> Rollout | None:
        if rollout.at_fault and "quarantined" not in self._registrar.tags(rollout.challenger):
            self._registrar.tag(rollout.challenger, "quarantined", f"{rollout.id}: {rollout.why}")
        if self._registrar.aliases(self.route).get("challenger") == rollout.challenger:
            self._registrar.move_all(self.route, {"challenger": (rollout.challenger, None)})
        return turn(rollout, "rolled_back", CONTROLLER, rollout.why, now, self.policy)

    def _warn(self, rollout: Rollout, standing: Standing) -> None:
        for one in standing.guardrails:
            if one.tripped and (one.metric, one.action) not in self._warned:
                self._warned.add((one.metric, one.action))
                self._alert({"about": "guardrail", "rollout": rollout.id, **msgspec.to_builtins(one)})

    def _record(self, rollout: Rollout) -> None:
        """Put on record what is not yet, whoever decided it."""
        decisions = (*rollout.before, *rollout.decisions)
        new = [one for one in decisions if one.number > self._told.get(one.rollout, 0)]
        for name in {one.rollout for one in new}:
            self._told[name] = self._known(name)
        new = [one for one in new if one.number > self._told[one.rollout]]
        if new:
            self._journal(new)
            for one in new:
                self._told[one.rollout] = one.number
                self._alert({"about": "decision", **msgspec.to_builtins(replace(one, evidence={}))})

    def _complain(self, what: str) -> None:
        if what != self._complained:
            log.warning("route %s: %s; trying again", self.route, what)
        self._complained = what


def _longer(history: tuple[tuple[float, int, float, float, float], ...], found: Standing) -> Any:
    """The looks so far, thinned to a few hundred that are about as far apart."""
    if found.difference is None or found.lower is None or found.upper is None:
        return history
    judged = found.challenger.judged + found.control.judged
    if history and history[-1][1] == judged:
        return history
    longer = (*history, (found.at, judged, found.difference, found.lower, found.upper))
    return longer if len(longer) <= HISTORY else (*longer[:-1:2], longer[-1])


# What follows elsewhere. Each may be done again, and is then done.


def made_champion(registrar: Registrar, rollout: Rollout) -> bool:
    """The challenger is the champion: one write moves all aliases, so there are never two. False if one moved."""
    aliases = registrar.aliases(rollout.route)
    before = aliases.get("champion")
    if before == rollout.challenger:
        return True
    moves: dict[Alias, tuple[str | None, str | None]] = {
        "champion": (before, rollout.challenger),
        "previous": (aliases.get("previous"), before),
    }
    if aliases.get("challenger") == rollout.challenger:
        moves["challenger"] = rollout.challenger, None
    return registrar.move_all(rollout.route, moves)


def unmade_champion(registrar: Registrar, rollout: Rollout) -> bool:
    """The champion before is the champion again, and this one quarantined. False if somebody moved an alias."""
    by = rollout.decisions[-1].actor
    return _brought_back(registrar, rollout.route, rollout.challenger, f"undone by {by}: {rollout.why}")


def _brought_back(registrar: Registrar, route: str, champion: str, why: str) -> bool:
    aliases = registrar.aliases(route)
    if "quarantined" not in registrar.tags(champion):
        registrar.tag(champion, "quarantined", why)
    if aliases.get("champion") != champion:
        return True
    before = aliases.get("previous")
    return registrar.move_all(route, {"champion": (champion, before), "previous": (before, None)})


# What operators and the learner ask.


def load(documents: Documents, route: str) -> tuple[bytes | None, Rollout | None]:
    body = documents.read(_name(route))
    return body, msgspec.json.decode(body, type=Rollout) if body else None


def propose(
    documents: Documents, registrar: Registrar, route: str, version: str, actor: str, why: str, now: float
) -> Rollout:
    """Ask for a version to be rolled out; the controller starts it. Raises Refused."""
    while True:
        body, last = load(documents, route)
        if last is not None and last.active and last.challenger == version:
            return last
        tags = registrar.tags(version)
        if unfit := next((tag for tag in (*UNFIT, "erased") if tag in tags), None):
            raise Refused(f"{version} was {unfit} ({tags[unfit]}), so it is not rolled out; train another version")
        fresh = begin(last, route, version, actor, why, now)
        aliases = registrar.aliases(route)
        has = aliases.get("challenger")
        if aliases.get("champion") == version:
            raise Refused(f"{version} is route {route}'s champion already; roll out another version")
        if has not in (None, version):
            raise Refused(
                f"route {route} has another challenger, {has}; one at a time: `understudy learn drop` gives it up"
            )
        if has is None and not registrar.move_all(route, {"challenger": (None, version)}):
            raise Refused(f"route {route} got another challenger meanwhile; one at a time")
        if documents.swap(_name(route), body, msgspec.json.encode(fresh)):
            return fresh


def ask(
    documents: Documents,
    route: str,
    verb: Literal["approve", "promote", "pause", "resume", "rollback"],
    actor: str,
    why: str,
    now: float,
    policy: Policy,
    standing: Standing | None = None,
) -> Rollout:
    """An operator's wish. Raises Refused where it cannot be now; the rights are the caller's to look at.

    `approve` agrees to a rollout's beginning, and to nothing else; so does `promote` of one that has not begun.
    """
    while True:
        body, rollout = load(documents, route)
        if rollout is None:
            raise Refused(f"route {route} has no rollout; the learner begins one when a challenger passes its gate")
        if verb == "approve" and "begin" in rollout.approved:
            return rollout
        if rollout.phase == "pending" and verb in ("approve", "promote"):
            after = approve(rollout, "begin", actor, why, now)
        elif verb == "approve":
            raise Refused(
                f"rollout {rollout.id} has begun ({rollout.phase.replace('_', ' ')}); it waits for no approval"
            )
        elif verb == "resume":
            excused = analysis.to_excuse(standing) if standing is not None else ()
            after = resume(rollout, excused, actor, why, now, policy)
        else:
            found = evidence(standing) | {"impact": impact(standing)} if standing is not None else {}
            after = turn(rollout, verb, actor, why, now, policy, found, "operator" if verb == "pause" else "")
        if documents.swap(_name(route), body, msgspec.json.encode(after)):
            return after


def undo(
    documents: Documents, registrar: Registrar, route: str, actor: str, why: str, now: float, policy: Policy
) -> tuple[str, str | None]:
    """Bring back the champion before this one, and end a rollout that is under way; both names (None: the config's).

    Raises Refused if there is none to go back from.
    """
    meant: str | None = None
    while True:
        body, rollout = load(documents, route)
        if rollout is not None and rollout.phase == "promoting":  # first, so that there is something to go back from
            if made_champion(registrar, rollout):
                promoted = turn(rollout, "promoted", actor, f"undo: {why}", now, policy)
                documents.swap(_name(route), body, msgspec.json.encode(promoted))
            continue
        if rollout is not None and rollout.phase == "undoing":
            if unmade_champion(registrar, rollout):
                undone = turn(rollout, "undone", actor, rollout.why, now, policy)
                documents.swap(_name(route), body, msgspec.json.encode(undone))  # else the controller was first
                return rollout.challenger, registrar.aliases(route).get("champion")
            continue
        aliases = registrar.aliases(route)
        champion, before = aliases.get("champion"), aliases.get("previous")
        if meant is not None and champion != meant:
            return meant, champion  # the controller, or somebody else, was quicker
        if champion is None:
            raise Refused(f"route {route}'s champion is the config's own arm; there is nothing to undo")
        if rollout is not None and rollout.phase in ("pending", "running", "paused"):
            with contextlib.suppress(Refused):  # somebody moved it meanwhile
                ask(documents, route, "rollback", actor, f"undo: {why}", now, policy)
            continue
        found, meant = {"undone": champion, "champion": before}, champion
        if rollout is not None and rollout.phase == "promoted" and rollout.challenger == champion:
            after = turn(rollout, "undo", actor, why, now, policy, found)
            documents.swap(_name(route), body, msgspec.json.encode(after))
            continue
        if rollout is not None:
            after = told(rollout, "undo", actor, why, now, found)
            if not documents.swap(_name(route), body, msgspec.json.encode(after)):
                continue
        while not _brought_back(registrar, route, champion, f"undone by {actor}: {why}"):
            pass
        return champion, before


def _name(route: str) -> str:
    return f"rollout/{route}"
