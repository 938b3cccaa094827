"""The controller: the one writer that turns journaled facts into rewards, rewards into weights.

    facts → sessions they touch → each session's reward → change of its contribution → sums → weights → snapshot

It goes through the journal twice: all facts as they come, and signals once more when they are as old as the reward's
window, for behaviour counts only then (`router.reward`). Two marks in the store say how far it is.

It keeps nothing in memory that matters. A session's reward is always computed anew from all of its facts and applied
under a revision that grows with each fact and with each mark that passes one, so facts may come late, in any order,
twice, or after a restart in the middle, and count once. If the store was emptied, the marks are gone with it, and the
journal is read again from the start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import msgspec
from msgspec.structs import replace

from router.arms import Cell, Snapshot, Sums
from router.calibrate import Calibration, calibrated, fit, metric_of
from router.casting import Parts, billed, capped, cast, fitting, split_shares
from router.plan import RoutePlan
from router.policy import Prompts, Reward, Split
from router.price import measured, priced
from router.refit import Refits, keep, segmenter_of
from router.reward import Heard, Requests, Session, by_session, session_reward
from router.rollout_controller import Registrar
from router.rollouts import Rollouts
from router.store import Change, Store, session_key
from router.weights import shares
from telemetry.errors import Fenced, StateError
from telemetry.events import Fact, Interaction, Signal
from telemetry.journal import Journal, meant
from telemetry.privacy import stripped
from telemetry.signals import Rules, after_silence, alike, compared, heard_from, tells
from telemetry.threads import Threads

log = logging.getLogger("understudy.controller")

LEASE_SECONDS = 4.0
BATCH = 1000
REMEMBERED = 20_000
"""Facts before the mark that a new controller reads to know threads that go on."""
UNFIT_SECONDS = 30.0
PROMPTLY = 0.5
"""Seconds between rounds, at most, where a rollout may have to be stopped."""
TOLD = (
    *("policy", "holdout", "full", "segmenter"),
    *("lead", "versions", "kept", "rollout", "challenger", "control", "shadow"),
)
"""What of a snapshot makes a new one, however little its weights moved."""
SLOWLY = 30.0
"""Seconds after which weights are computed again though no sum changed: evidence ages."""


@dataclass(frozen=True, slots=True)
class Ripened:
    """What has waited for a window since the last look: the mark before, the mark now, the signals between."""

    window: float
    before: int
    mark: int
    signals: list[tuple[int, Signal]]


def rules(terms: Reward) -> Rules:
    """What detectors go by on a route."""
    return Rules(silence=terms.window, escalation_tools=frozenset(terms.escalation_tools))


def matured(window: float) -> str:
    """The name of the mark up to which signals have waited for `window` seconds."""
    return f"matured:{window:g}"


class Controller:
    """`run` until stopped; `step` is one round. Never two at once on a store: the second waits for the lease."""

    def __init__(
        self,
        routes: Iterable[RoutePlan],
        journal: Journal,
        store: Store,
        owner: str,
        told: Callable[[Signal, Interaction], None] | None = None,
        registrar: Registrar | None = None,
        alert: Callable[[str, Mapping[str, Any]], None] = lambda *_: None,
    ) -> None:
        """`told` hears of every signal with its answer, as soon as both are journaled; after a takeover maybe twice.

        `registrar` keeps the aliases of versions, where there are any; `alert` is told a route and what happened to
        its rollout.
        """
        self.routes = {route.name: route for route in routes}
        self._rules = {name: rules(plan.reward) for name, plan in self.routes.items()}
        self._journal = journal
        self._store = store
        self._threads: Threads | None = None
        self._refits = Refits(journal.path)
        self._rollouts = Rollouts(self.routes.values(), journal, store, registrar, alert)
        self._owner = owner
        self._token = -1
        self._told = told
        self._full: set[str] = set()
        """Routes whose segments were said to be too many."""
        self._computed: dict[str, tuple[Any, ...]] = {}
        """By route: of which changes and parts, to which version, in which span of time weights were last computed."""
        self._fit_again: dict[str, float] = {}
        """By route that has too few votes for a model: when to look again."""
        self._ripening: dict[float, tuple[int, float]] = {}
        """By window: beyond this mark no signal is old enough before this time, so there is nothing to look for."""

    def run(self, stopping: threading.Event) -> None:
        """Work until `stopping` is set, waiting a policy's refresh between rounds; outlives any outage of the store."""
        refresh = min((self._pace(route) for route in self.routes.values()), default=1.0)
        complained = ""
        while not stopping.is_set():
            try:
                more = self.step(time.time())
                complained = ""
            except (StateError, Fenced) as error:
                more = False
                if str(error) != complained:
                    log.warning("%s; trying again", error)
                complained = str(error)
            if not more:
                stopping.wait(refresh)
        try:
            self._store.release(self._owner)
        except StateError as error:
            log.warning("the lease was not given back: %s", error)
        self._refits.close()

    @staticmethod
    def _pace(route: RoutePlan) -> float:
        """Seconds between rounds: what is decided on a rollout must soon be so everywhere."""
        pace = route.policy.refresh
        return pace if route.rollout is None else min(pace, route.rollout.interval, PROMPTLY)

    def step(self, now: float) -> bool:
        """Take in at most a batch of new facts and publish what follows. True if more facts are waiting."""
        lease = self._store.lease(self._owner, LEASE_SECONDS, now)
        if lease is None:
            return False
        if lease.token != self._token:
            self._threads, self._token = None, lease.token  # somebody else was the controller meanwhile
            self._rollouts.forget()
        read = self._store.marked("journal")
        if read > self._journal.last():
            read = 0  # another journal than the one this mark was made on
        if self._threads is None:
            self._threads = self._remembered(read)
        try:
            facts, ripened, heard = self._take_in(read, now, lease.token)
        except StateError:
            self._decide((), now, lease.token)  # a rollback waits for no disk
            raise
        self._decide(facts, now, lease.token)
        for one in ripened:
            if one.mark > one.before:
                self._store.mark(matured(one.window), one.mark, lease.token)
        if facts:
            self._store.mark("journal", facts[-1][0], lease.token)
        return heard > 0 or BATCH in (len(facts), *(len(one.signals) for one in ripened))

    def _take_in(self, read: int, now: float, token: int) -> tuple[list[tuple[int, Fact]], list[Ripened], int]:
        """The next facts after `read`, and the signals that ripened; how many signals they told of."""
        facts, company = self._journal.news(read, BATCH)
        end = facts[-1][0] if facts else read
        ripened = [self._ripened(window, end, now) for window in {r.reward.window for r in self.routes.values()}]
        marks = {one.window: one.mark for one in ripened}
        self._rollouts.find(
            read, {name: marks[plan.reward.window] for name, plan in self.routes.items()}, self._alive(now)
        )
        self._rollouts.facts(facts)
        heard = 0
        follows = self._follow(facts)
        stirring = self._stirring(facts, company | follows.keys())
        new = {seq: fact for one in ripened for seq, fact in one.signals} | dict(stirring)
        if new:
            sessions = self._journal.sessions(self._touched(new.values()), new, unread=True)
            heard = self._hear(stirring, follows, sessions, now)
            if self._told is not None:
                self._tell(stirring)
            self._silence(stirring)
            self._settle(sessions, marks, token)
        return facts, ripened, heard

    def _follow(self, facts: Sequence[tuple[int, Fact]]) -> dict[int, str]:
        """Of new requests, by sequence number, the id of the one whose answer each continues, where that is known.

        It may look like another session's: apps change how they begin.
        """
        assert self._threads is not None
        found: dict[int, str] = {}
        for seq, new in facts:
            if isinstance(new, Interaction) and new.route in self.routes:
                earlier = self._threads.find(new, lambda name, new=new: self._likeness(name, new))  # type: ignore[misc]
                self._threads.add(new)
                if earlier is not None:
                    found[seq] = earlier
        return found

    def _likeness(self, request_id: str, new: Interaction) -> float:
        earlier = self._journal.request(new.tenant, request_id)
        return alike(earlier.answer, new) if earlier else 0.0

    def _request(self, request_id: str, tenant: str, session: Sequence[Interaction]) -> Interaction | None:
        """A request that is most often one of a session's last ones."""
        known = next((i for i in reversed(session) if i.request_id == request_id), None)
        return known or self._journal.request(tenant, request_id)

    def _stirring(self, facts: Sequence[tuple[int, Fact]], related: Container[int]) -> list[tuple[int, Fact]]:
        """`facts` without most of them: requests that are alone in their session, and that nobody has reacted to yet.

        They change no reward and give no signal. What comes later finds them in the journal. `related`: sequence
        numbers of requests that something else on record has to do with.
        """
        return [
            (seq, fact)
            for seq, fact in facts
            if not isinstance(fact, Interaction)
            or seq in related
            or (fact.route in self.routes and tells(fact, self._rules[fact.route]))
        ]

    def _decide(self, facts: Sequence[tuple[int, Fact]], now: float, token: int) -> None:
        """Rollouts take their steps, and weights are published."""
        parts = self._rollouts.look(facts, now, token)
        for route in self.routes.values():
            self._publish(route, parts[route.name], now, token)

    def _alive(self, now: float) -> Callable[[], object]:
        """Renews the lease of a round that began at `now` and lasts."""
        began = time.monotonic()
        return lambda: self._store.lease(self._owner, LEASE_SECONDS, now + time.monotonic() - began)

    def _remembered(self, read: int) -> Threads:
        """The threads that another controller knew."""
        threads, after = Threads(), max(0, read - REMEMBERED)
        while after < read and (facts := self._journal.read(after, min(BATCH, read - after), unread=True)):
            after = facts[-1][0]
            for _, fact in facts:
                if isinstance(fact, Interaction):
                    threads.add(fact)
        return threads

    def _ripened(self, window: float, end: int, now: float) -> Ripened:
        """The next signals, of those up to `end`, that have waited for `window` seconds.

        One from the future (a clock was set back) need not wait.
        """
        before = min(self._store.marked(matured(window)), end)
        looked, until = self._ripening.get(window, (-1, 0.0))
        if looked == before and 0.0 < until - now <= window:
            return Ripened(window, before, before, [])
        signals: list[tuple[int, Signal]] = []
        for seq, signal in islice(self._journal.signals(before, end), BATCH):
            heard = signal.received_at or signal.at
            if 0.0 <= now - heard < window:
                self._ripening[window] = seq - 1, heard + window
                return Ripened(window, before, seq - 1, signals)
            signals.append((seq, signal))
        return Ripened(window, before, signals[-1][0] if len(signals) == BATCH else end, signals)

    def _touched(self, facts: Iterable[Fact]) -> list[Session]:
        """The sessions whose reward may have changed; a signal whose answer is not known yet touches none."""
        requests = [fact for fact in facts if isinstance(fact, Interaction)]
        signals = [fact for fact in facts if isinstance(fact, Signal)]
        told_again = self._journal.repeated(signal for signal in signals if signal.source != "detected")
        others = chain.from_iterable(told_again.values())
        heard = {_about(s): s for s in (*signals, *others, *self._journal.in_traces(requests))}.values()
        about = chain(requests, *([i for _, i in self._journal.answers(signal)] for signal in heard))
        return list(dict.fromkeys((i.tenant, i.session) for i in about))

    def _hear(self, new: Sequence[tuple[int, Fact]], follows: Mapping[int, str], sessions: Requests, now: float) -> int:
        """Journal what requests, comparisons and silence tell about answers; how many signals there were."""
        heard: dict[str, Signal] = {}
        said = {(s.tenant, s.event_id): s for _, s in new if isinstance(s, Signal) and s.source != "detected"}
        told_again = self._journal.repeated(said.values())
        for key, signal in said.items():
            if signal.kind == "comparison" or key in told_again:
                heard |= {s.event_id: s for s in self._verdicts(*key)}
        for seq, fact in new:
            if isinstance(fact, Interaction) and fact.route in self.routes:
                before = [
                    i for _, i in sessions[fact.tenant, fact.session] if i.route == fact.route and i.at <= fact.at
                ]
                continued = self._request(follows[seq], fact.tenant, before) if seq in follows else None
                found = heard_from(before, fact, self._rules[fact.route], continued)
                heard |= {s.event_id: s for s in found}
        for requests in sessions.values():
            for name in {i.route for _, i in requests} & self.routes.keys():
                own = [i for _, i in requests if i.route == name]
                ended = after_silence(own, now, self._rules[name])
                heard |= {s.event_id: s for s in ended if s.kind == "abandon"}  # a length is counted when asked for
        fresh = [s for s in heard.values() if s.kind == "poll" or self._is_new(s)]
        if fresh:
            self._journal.append(fresh)
        return len(fresh)

    def _tell(self, facts: Sequence[tuple[int, Fact]]) -> None:
        """Tell of new signals whose answers are there, and of signals that were waiting for a new answer."""
        assert self._told is not None
        answers = {seq: fact for seq, fact in facts if isinstance(fact, Interaction)}
        new = {seq: fact for seq, fact in facts if isinstance(fact, Signal)}
        waited = {seq: s for seq, s in self._journal.signals_about(answers.values()) if seq not in new}
        for seq, signal in (waited | new).items():
            about = self._journal.answers(signal)
            if about and (seq in new or (about[0][0] in answers and about[0][0] > seq)):
                self._told(signal, meant([i for _, i in about], signal.at))

    def _silence(self, facts: Sequence[tuple[int, Fact]]) -> None:
        """Take back text about answers of which none may be kept, which came when that was not known yet."""
        answers = [fact for _, fact in facts if isinstance(fact, Interaction) and "off" in fact.redacted]
        early = {seq for seq, signal in self._journal.signals_about(answers) if stripped(signal) != signal}
        for seq, fact in facts:
            if isinstance(fact, Signal) and stripped(fact) != fact:
                early |= {seq} if any("off" in i.redacted for _, i in self._journal.answers(fact)) else set()
        if early:
            self._journal.rewrite(sorted(early), stripped)
            self._journal.scrub()

    def _verdicts(self, tenant: str, event_id: str) -> list[Signal]:
        """What a comparison says of each answer, as it was sent last; what it said of others before is taken back."""
        versions = self._journal.event(tenant, event_id)
        if not versions:
            return []
        *before, last = versions
        now = {signal.event_id: signal for signal in compared(last)}
        gone = {signal.event_id: signal for one in before for signal in compared(one) if signal.event_id not in now}
        return [*now.values(), *(replace(signal, value=None) for signal in gone.values())]

    def _is_new(self, signal: Signal) -> bool:
        known = self._journal.event(signal.tenant, signal.event_id, 1)
        return not known or (signal.kind == "comparison" and known[-1].value != signal.value)

    def _settle(self, sessions: Requests, marks: Mapping[float, int], token: int) -> None:
        """Bring the sessions' contributions to each route's sums up to date."""
        signals = self._journal.heard_about(i for requests in sessions.values() for _, i in requests)
        changes: dict[str, list[Change]] = {}
        for key, heard in by_session(sessions, signals).items():
            for name in {i.route for _, i in sessions[key]} & self.routes.keys():
                plan = self.routes[name]
                self._rollouts.settled(name, key, sessions[key], heard, marks[plan.reward.window])
                revision, cells = contribution(plan, sessions[key], heard, marks[plan.reward.window])
                changes.setdefault(name, []).append(Change(session_key(*key), revision, cells))
        for name, of_route in changes.items():
            self._store.apply(name, of_route, token)

    def _publish(self, route: RoutePlan, parts: Parts, now: float, token: int) -> None:
        """Publish the route's weights if they moved. While no sum changed only time moves them, and slowly."""
        current, changes = self._store.snapshot(route.name), self._store.changes(route.name)
        about = changes, parts.key, now // SLOWLY
        known = current is not None and self._computed.get(route.name) == (*about, current.version)
        if known and not self._refits.done(route.name):
            return
        new = self.snapshot(route, parts, now, (current.version if current else 0) + 1, token)
        if current is None or _moved(current, new):
            self._store.publish(new, token)
            current = new
        self._computed[route.name] = *about, current.version

    def snapshot(self, route: RoutePlan, parts: Parts, now: float, version: int, token: int) -> Snapshot:
        """What the sums say now, of those who play a part."""
        policy = fitting(route.policy, len(parts.arms))
        if isinstance(policy, Split):
            split = replace(initial_snapshot(route, now), version=version, segments=split_shares(policy, parts))
            return billed(split, parts)
        cells = self._store.sums(route.name)
        calibration = self._calibration(route, cells, now, token)
        if calibration is not None:
            cells = calibrated(calibration, cells)
        full = policy.segment_by is not None and len({cell.segment for cell in cells}) >= policy.max_segments
        if full and route.name not in self._full:
            self._full.add(route.name)
            log.warning("route %s: %d segments, no more get weights of their own", route.name, policy.max_segments)
        cost = priced(policy, parts.arms, cells, now, route.reward)
        segments = shares(policy, parts.arms, cells, now, cost.burdens)
        if parts.rollout is not None:
            segments = capped(segments, parts, policy.holdout)
        segmenter = self._segmenter(route.name, policy.prompts, now, token) if policy.segment_by == "prompt" else ""
        new = Snapshot(route.name, version, now, policy.kind, policy.holdout, segments, full, cost.price, segmenter)
        return billed(new, parts)

    def _segmenter(self, route: str, prompts: Prompts, now: float, token: int) -> str:
        """The version of what tells the route's prompts apart, learned anew if it is due; "" while there is none."""
        last = segmenter_of(self._store, route)
        if last is None or not 0.0 <= now - last.at < prompts.refit:
            new = self._refits.ready(route, last, prompts.clusters, now)
            if new is not None:
                keep(self._store, route, new, token)
                last = new
        return last.version if last is not None else ""

    def _calibration(self, route: RoutePlan, cells: Mapping[Cell, Sums], now: float, token: int) -> Calibration | None:
        """The route's model of its votes, fitted anew if it is due; None while its reward is by fixed weights."""
        if route.reward.mode == "fixed":
            return None
        last = calibration_of(self._store, route.name)
        if last is not None and 0.0 <= now - last.at < route.reward.refit:
            return last
        if last is None and now < self._fit_again.get(route.name, 0.0) <= now + UNFIT_SECONDS:
            return None
        new = fit(cells, now, route.reward.min_votes)
        if isinstance(new, str):
            log.info("route %s: rewards are by fixed weights: %s", route.name, new)
            self._fit_again[route.name] = now + UNFIT_SECONDS
            return last
        if last is None or new.version != last.version:
            about = (route.name, new.version, new.votes, new.brier, new.baseline)
            log.info("route %s: calibration %s from %d votes, squared error %.4f (of their mean: %.4f)", *about)
        self._store.keep(f"calibration:{route.name}", msgspec.json.encode(new), token)
        return new


def _about(signal: Signal) -> tuple[str | None, ...]:
    return signal.tenant, signal.response_id, signal.trace_id, signal.session


def contribution(
    plan: RoutePlan, requests: Sequence[tuple[int, Interaction]], signals: Sequence[Heard], mark: int
) -> tuple[int, dict[Cell, Sums]]:
    """The revision of what a session contributes to the route's sums, and that: {} while there is no reward.

    `mark`: the sequence number up to which signals have waited for the window. The revision grows with each fact,
    and when the mark passes one.
    """
    own = [(seq, i) for seq, i in requests if i.route == plan.name]
    newest = max(seq for seq, _ in (*own, *signals))
    revision = newest + min(mark, newest)
    reward = session_reward([i for _, i in own], signals, plan.reward, mark)
    if reward is None:
        return revision, {}
    took = measured(plan.reward, plan.arms, (i for _, i in own if i.error is None))
    cells = reward.contribution()
    cells |= {reward.cell(metric): Sums(1.0, value, value * value) for metric, value in took.items()}
    if plan.reward.mode == "calibrated":
        good = reward.vote is not None and reward.vote > 0.5
        cells[reward.cell(metric_of(reward.pattern))] = Sums(1.0, float(reward.vote not in (None, 0.5)), float(good))
    return revision, cells


def calibration_of(store: Store, route: str) -> Calibration | None:
    """The route's model of its votes."""
    body = store.kept(f"calibration:{route}")
    return msgspec.json.decode(body, type=Calibration) if body else None


def _moved(old: Snapshot, new: Snapshot) -> bool:
    """Some weight moved by a thousandth, or something else changed: worth a new version."""
    if any(getattr(old, name) != getattr(new, name) for name in TOLD):
        return True
    if old.segments.keys() != new.segments.keys():
        return True
    pairs = [(old.segments[segment], weights) for segment, weights in new.segments.items()]
    return any(a.keys() != b.keys() or any(abs(a[arm] - b[arm]) >= 1e-3 for arm in b) for a, b in pairs)


def initial_snapshot(route: RoutePlan, now: float) -> Snapshot:
    """What a gateway draws from until the controller has published: the policy without any evidence."""
    holdout = 0.0 if isinstance(route.policy, Split) else route.policy.holdout
    fresh = Snapshot(route.name, 0, now, route.policy.kind, holdout, shares(route.policy, route.arms, {}, now))
    return billed(fresh, Parts(cast(route.arms, {}), route.arms))
