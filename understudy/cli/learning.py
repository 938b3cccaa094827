"""Commands about challengers: `learn once | watch | status | drop | reproduce`, and `lineage`."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from understudy import settings as config
from understudy.cli.common import Arguments, Commands, command, config_option, emit, json_option, span
from understudy.cli.datasets import route_named

if TYPE_CHECKING:
    from learner.workshop import Workshop


REPLICAS_EVERY = 15.0
"""Seconds between looks at replicas: one that was restarted lacks its versions until then."""


def add_learn(commands: Commands) -> None:
    about = commands.add_parser("learn", help="Train challengers from what users did.")
    verbs = about.add_subparsers(metavar="once|watch|status|drop|reproduce", required=True)

    help = "Train a challenger if one is due: dataset, training, registry, vLLM. One that was interrupted goes on."
    once = verbs.add_parser("once", help=help, description=f"{help} A gate decides what follows.")
    once.set_defaults(run=_once)
    once.add_argument("--force", action="store_true", help="even if none is due")

    help = "Train challengers whenever they are due, and keep versions loaded on replicas that restart."
    watch = verbs.add_parser("watch", help=help, description=help)
    watch.set_defaults(run=_watch)
    watch.add_argument("--look", type=_pause, default="10m", metavar="SPAN", help="how often to look (default: 10m)")

    help = "The round under way or the last one, the versions and their parts, and what they were measured to be."
    status = verbs.add_parser("status", help=help, description=help)
    status.set_defaults(run=_status)

    help = "Give up the round under way, or the challenger: it leaves the replicas and stays in the registry."
    drop = verbs.add_parser("drop", help=help, description=help)
    drop.set_defaults(run=_drop)
    drop.add_argument("--why", default="dropped at the command line", help="kept with the version")

    help = "Train a version again from what it was made of; exit 1 unless the adapter's bytes are the same."
    reproduce = verbs.add_parser("reproduce", help=help, description=help)
    reproduce.set_defaults(run=_reproduce)
    reproduce.add_argument("version", help="its name")
    reproduce.add_argument("--out", type=Path, required=True, help="folder to be made, for the new adapter")
    for verb in (once, watch, status, drop, reproduce):
        verb.add_argument("--route", help="needed where the config has several")
        config_option(verb)
        json_option(verb)


def add_lineage(commands: Commands) -> None:
    help = "Where an answer, an example, a dataset or a version comes from, and what became of it."
    lineage = command(commands, "lineage", _lineage, help)
    lineage.add_argument("name", help="an answer's id, an example's id, a dataset's hash or folder, or a version")
    lineage.add_argument("--tenant", default="default", help="whose answer it is (default: default)")
    lineage.add_argument("--route", help="needed where the config has several")
    config_option(lineage)
    json_option(lineage)


def _pause(text: str) -> float:
    seconds = span(text)
    if seconds < 1:
        raise argparse.ArgumentTypeError("shorter than a second; a look reads the whole journal")
    return seconds


def shop_of(arguments: Arguments) -> Workshop:
    from telemetry.journal import Journal
    from understudy import learning
    from understudy.compose import open_store

    settings = config.load(arguments.config)
    route = route_named(settings, arguments.route)
    return learning.workshop(settings, route, Journal(settings.journal_path), open_store(settings))


def _once(arguments: Arguments) -> int:
    from learner import cycle
    from learner.rounds import Round
    from understudy import show_learning

    shop = shop_of(arguments)
    with show_learning.progress(quiet=arguments.json) as say:
        found = cycle.once(shop, say, arguments.force)
    data = {"learned": isinstance(found, Round), **(_plain(found) if isinstance(found, Round) else found._asdict())}
    emit(arguments, data, lambda: show_learning.learned(found))
    return 0


def _watch(arguments: Arguments) -> int:
    from learner import cycle
    from learner.judge import judge_of
    from learner.rounds import Round
    from learner.shadowing import judge_shadow
    from telemetry.journal import Journal
    from understudy import show_learning

    shop = shop_of(arguments)
    tell = show_learning.Teller(as_json=arguments.json)

    def keep_replicas(stopping: threading.Event) -> None:
        while not stopping.is_set():
            with tell.faults("replicas"):
                tell.replicas(cycle.replicas_kept(shop))
            stopping.wait(min(arguments.look, REPLICAS_EVERY))

    def judge_shadows(stopping: threading.Event) -> None:
        journal = Journal(config.load(arguments.config).journal_path)
        judge = judge_of(shop.plan.gate.judge) if shop.plan.gate.judge is not None else None
        while judge is not None and not stopping.is_set():
            with tell.faults("shadow"):
                judge_shadow(shop.documents, shop.route, journal, judge)
            stopping.wait(REPLICAS_EVERY)

    stopping = threading.Event()
    for work in (keep_replicas, judge_shadows):
        threading.Thread(target=work, args=(stopping,), name=work.__name__, daemon=True).start()
    try:
        while True:
            with tell.faults("old text"):
                if went := cycle.expire(shop, time.time()):
                    tell("old text", f"{went} examples were too old to be kept and left their datasets")
            with tell.faults("round"), show_learning.progress(quiet=arguments.json) as say:
                found = cycle.once(shop, say)
                tell("round", show_learning.sentence(found), again=isinstance(found, Round))
            time.sleep(arguments.look)
    finally:
        stopping.set()


def _status(arguments: Arguments) -> int:
    from learner import cycle
    from understudy import show_learning

    found = cycle.status(shop_of(arguments))
    emit(arguments, found, lambda: show_learning.status(found))
    return 0


def _drop(arguments: Arguments) -> int:
    from learner import cycle
    from understudy import show_learning

    found = cycle.drop(shop_of(arguments), arguments.why)
    emit(arguments, _plain(found), lambda: show_learning.learned(found))
    return 0


def _reproduce(arguments: Arguments) -> int:
    from learner import cycle
    from understudy import show_learning

    with show_learning.progress(quiet=arguments.json) as say:
        version, artifact = cycle.reproduce(shop_of(arguments), arguments.version, arguments.out, say)
    same = version.adapter_hash == artifact.adapter_hash
    data = {"version": version.name, "same": same, "adapter_hash": artifact.adapter_hash, "was": version.adapter_hash}
    emit(arguments, data, lambda: show_learning.reproduced(data))
    return 0 if same else 1


def _lineage(arguments: Arguments) -> int:
    from learner import lineage
    from telemetry.journal import Journal
    from understudy import learning, show_learning
    from understudy.compose import open_store

    settings = config.load(arguments.config)
    route = route_named(settings, arguments.route)
    archive = learning.archive(settings, route, Journal(settings.journal_path), open_store(settings))
    found = lineage.walk(archive, arguments.name, arguments.tenant)
    emit(arguments, found, lambda: show_learning.lineage(found))
    return 0


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)
