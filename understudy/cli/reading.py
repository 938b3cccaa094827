"""Commands that read what the controller counted: `status`, `arms`, `rebuild`, `ope`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from understudy import settings as config
from understudy.cli.common import Arguments, Commands, command, config_option, emit, json_option, opened, span


def add_status(commands: Commands) -> None:
    status = command(commands, "status", _status, "Who controls, how far it has read, how fresh the weights are.")
    config_option(status)
    json_option(status)


def _status(arguments: Arguments) -> int:
    from understudy import report, show

    plans, store, journal = opened(arguments)
    found = report.status(plans, store, journal, time.time())
    emit(arguments, found, lambda: show.status(found))
    return 0


def add_arms(commands: Commands) -> None:
    arms = command(commands, "arms", _arms, "Each arm's weight, share and posterior, and what moved it.")
    config_option(arms)
    json_option(arms)


def _arms(arguments: Arguments) -> int:
    from understudy import report, show

    plans, store, journal = opened(arguments)
    found = report.arms(plans, store, journal, time.time())
    emit(arguments, found, lambda: show.arms(found))
    return 0


def add_rebuild(commands: Commands) -> None:
    help = "Count the journal anew and compare with the store; exit 1 if they differ."
    rebuild = command(commands, "rebuild", _rebuild, help)
    config_option(rebuild)
    json_option(rebuild)
    rebuild.add_argument("--write", action="store_true", help="put it in the store's place; `serve` must be stopped")


def _rebuild(arguments: Arguments) -> int:
    from understudy import rebuild, show

    plans, store, journal = opened(arguments)
    if arguments.write:
        rebuild.replace(plans, store, journal)
    rows = rebuild.compare(plans, store, journal)
    waiting = max(0, journal.last() - store.marked("journal"))
    data = {"routes": rows, "facts_waiting": waiting, "written": arguments.write}
    emit(arguments, data, lambda: show.rebuilt(rows, waiting))
    return 0 if all(row["same"] for row in rows) else 1


def add_ope(commands: Commands) -> None:
    help = "What another policy would have earned in the sessions that were served; exit 1 if it cannot be said."
    ope = commands.add_parser(
        "ope",
        help=help,
        description=f"{help} A split has its written shares. A policy that learns is replayed: in each session, the "
        "weights that it would have published at its start from the rewards known by then (those that the served "
        "sessions brought, not those that its own would have), floor and holdout included.",
        epilog='FILE holds for example "policy: {kind: split, shares: {champion: 0.5, challenger: 0.5}}".',
    )
    ope.set_defaults(run=_ope)
    ope.add_argument(
        "--policy", type=Path, required=True, metavar="FILE", help="a YAML file with `policy:`, as under a route"
    )
    ope.add_argument(
        "--since", type=span, default="7d", metavar="SPAN", help="sessions that began in this time (default: 7d)"
    )
    ope.add_argument("--route", help="needed where the config has several")
    config_option(ope)
    json_option(ope)


def _ope(arguments: Arguments) -> int:
    from telemetry.journal import Journal
    from understudy import ope, show
    from understudy.compose import route_plans

    settings = config.load(arguments.config)
    name = arguments.route or next(iter(settings.routes))
    if name not in settings.routes or (arguments.route is None and len(settings.routes) > 1):
        print(f"understudy ope: --route must be one of {', '.join(settings.routes)}", file=sys.stderr)
        return 2
    policy = ope.load_policy(arguments.policy, settings.routes[name])
    plan = next(plan for plan in route_plans(settings) if plan.name == name)
    try:
        now = time.time()
        found = ope.examine(plan, policy, Journal(settings.journal_path), now - arguments.since, now)
    except ValueError as error:
        print(f"understudy: the journal cannot be evaluated: {error}", file=sys.stderr)
        return 1
    emit(arguments, found, lambda: show.ope(found))
    return 1 if found["refused"] else 0
