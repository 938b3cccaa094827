"""`understudy rollout status | start | promote | pause | resume | abort | undo`."""

from __future__ import annotations

import getpass
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

from understudy import settings as config
from understudy.cli.common import Arguments, Commands, config_option, emit, json_option
from understudy.cli.datasets import route_named

if TYPE_CHECKING:
    from router.rollout_policy import Rollout
    from router.store import Store
    from understudy.settings import Settings

KEY = "UNDERSTUDY_ADMIN_KEY"
WITHIN = 5.0
"""Seconds for which a command waits to see that the controller has done what it asked for."""

VERBS: dict[str, str] = {
    "start": "Roll a version out that passed its gate; the learner does this by itself.",
    "promote": "Make the challenger the champion now, or agree to what waits for approval.",
    "pause": "Stay at the step it is at; harm still rolls back.",
    "resume": "Go on after a pause; what tripped until now is excused.",
    "abort": "Roll back: the challenger gets no more sessions, and is quarantined.",
    "undo": "Bring back the champion before this one.",
}


def add_rollout(commands: Commands) -> None:
    about = commands.add_parser("rollout", help="See how a challenger earns its traffic; promote, pause, abort, undo.")
    verbs = about.add_subparsers(metavar=f"status|{'|'.join(VERBS)}", required=True)
    help = "Step, shares, the difference with its confidence sequence, guardrails, decisions."
    status = verbs.add_parser("status", help=help, description=help)
    status.add_argument("-w", "--watch", action="store_true", help="show it anew every second, until it has ended")
    status.set_defaults(run=_status)
    every = [status]
    for name, help in VERBS.items():
        verb = verbs.add_parser(name, help=help, description=help)
        verb.set_defaults(run=_start if name == "start" else _undo if name == "undo" else _ask, verb=name)
        if name == "start":
            verb.add_argument("version", help="its name, as `learn status` shows it")
            verb.add_argument("--ungated", action="store_true", help="though it did not pass a gate; goes on record")
        verb.add_argument("--why", default="", help="goes on record")
        verb.add_argument("--key", default=os.environ.get(KEY), help=f"an admin key, where needed (default: ${KEY})")
        every.append(verb)
    for verb in every:
        verb.add_argument("--route", help="needed where the config has several")
        config_option(verb)
        json_option(verb)


def _opened(arguments: Arguments) -> tuple[Settings, Store, str, Rollout]:
    from router.rollout import Refused
    from router.rollout_policy import Rollout as Policy
    from understudy.compose import open_store

    settings = config.load(arguments.config)
    route = route_named(settings, arguments.route)
    policy = settings.routes[route].rollout
    if policy is None and arguments.verb in ("abort", "undo"):
        policy = Policy()  # taken out of the config in the middle: what runs must be stoppable
    if policy is None:
        raise Refused(
            f"route {route} has no rollout in the config; write routes.{route}.rollout: {{}} for the defaults"
        )
    return settings, open_store(settings), route, policy


def _status(arguments: Arguments) -> int:
    from telemetry.journal import Journal
    from understudy import show_rollout
    from understudy.compose import open_store, route_plans
    from understudy.rollout_report import rollout_report

    settings = config.load(arguments.config)
    store, journal, plans = open_store(settings), Journal(settings.journal_path), route_plans(settings)
    plans = [plan for plan in plans if arguments.route in (None, plan.name)]

    def look() -> list[dict[str, Any]]:
        return rollout_report(plans, store, journal, time.time())

    if arguments.watch and not arguments.json:
        show_rollout.watch(look)
        return 0
    found = look()
    emit(arguments, found, lambda: show_rollout.rollouts(found))
    return 0


def _start(arguments: Arguments) -> int:
    from learner.registry import Registry
    from learner.replica import Replica, listing
    from router.rollout import Refused
    from router.rollout_controller import ask, propose

    settings, store, route, policy = _opened(arguments)
    who = _actor(arguments, store, policy, "begin")
    registry = Registry(store)
    version = registry.version(arguments.version)
    gate = registry.tags(version.name).get("gate", "none")
    if gate != "pass" and not arguments.ungated:
        raise Refused(f"{version.name} has not passed a gate ({gate}); `understudy gate` it, or say --ungated")
    for upstream in settings.routes[route].upstreams:
        if version.name not in listing(Replica(upstream.url, upstream.api_key)).adapters:
            raise Refused(f"{upstream.url} does not serve {version.name}; load it there first")
    why = arguments.why or ("it passed its gate" if gate == "pass" else f"asked for without a gate ({gate})")
    rollout = propose(store, registry, route, version.name, who, why, time.time())
    if "begin" in policy.require_approval:
        ask(store, route, "approve", who, why, time.time(), policy)
    emit(arguments, {"rollout": rollout.id, "challenger": version.name}, lambda: print(f"{rollout.id} begins"))
    return 0


def _ask(arguments: Arguments) -> int:
    from router.rollout_controller import ask, load
    from router.rollouts import standing_of

    _, store, route, policy = _opened(arguments)
    verb: Literal["promote", "pause", "resume", "rollback"] = (
        "rollback" if arguments.verb == "abort" else arguments.verb
    )
    _, rollout = load(store, route)
    waiting = rollout is not None and rollout.phase == "pending"
    needs: Literal["begin", "promote"] = "begin" if waiting else "promote"
    who = _actor(arguments, store, policy, needs if verb == "promote" else None)
    why = arguments.why or f"{arguments.verb} by {who}"
    after = ask(store, route, verb, who, why, time.time(), policy, standing_of(store, route))
    done = _seen(store, route, after.challenger, after.phase)
    data = {"rollout": after.id, "challenger": after.challenger, "phase": after.phase, "in_effect": done}
    emit(arguments, data, lambda: print(_sentence(f"{after.id} is {after.phase.replace('_', ' ')}", done)))
    return 0 if done else 1


def _undo(arguments: Arguments) -> int:
    from learner.registry import Registry
    from router.rollout_controller import undo

    _, store, route, policy = _opened(arguments)
    who = _actor(arguments, store, policy, None)
    gone, back = undo(store, Registry(store), route, who, arguments.why or f"undo by {who}", time.time(), policy)
    done = _seen(store, route, gone, "rolling_back")
    now = back or "the config's own arm"
    data = {"undone": gone, "champion": back, "in_effect": done}
    emit(arguments, data, lambda: print(_sentence(f"{now} is the champion again, instead of {gone}", done)))
    return 0 if done else 1


def _seen(store: Store, route: str, challenger: str, phase: str) -> bool:
    """Whether the weights that gateways draw from say so, within a few seconds; they have it half a second later."""
    ends = time.monotonic() + WITHIN
    while time.monotonic() < ends:
        snapshot = store.snapshot(route)
        drawn = snapshot is not None and any(row.get(challenger) for row in snapshot.segments.values())
        if phase == "promoting":
            done = snapshot is not None and snapshot.challenger != challenger and drawn
        else:
            done = phase != "rolling_back" or not drawn
        if done:
            return True
        time.sleep(0.1)
    return False


def _sentence(what: str, done: bool) -> str:
    return what if done else f"{what}; no controller has acted on it yet: is `understudy serve` running?"


def _actor(arguments: Arguments, store: Store, policy: Rollout, needs: Literal["begin", "promote"] | None) -> str:
    """Who asks, for the record. Raises Refused where it takes an admin's key and there is none."""
    from gateway.auth import key_of
    from router.rollout import Refused

    key = key_of(store.list_keys(), arguments.key) if arguments.key else None
    if arguments.key and (key is None or key.role != "admin"):
        raise Refused("that key may not decide on rollouts: it is unknown, revoked or an app's; use an admin's")
    if key is not None:
        return key.id
    if needs in policy.require_approval:
        raise Refused(
            f"to {needs} takes an admin's key (rollout.require_approval): give --key or set {KEY}; "
            "`understudy keys create --role admin` makes one"
        )
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        print("understudy: nobody is known by this process's user number", file=sys.stderr)
        return f"uid {os.getuid()}"
