"""`understudy gate`: a version beside the champion, before any user meets it."""

from __future__ import annotations

from typing import Any

import msgspec

from understudy.cli.common import Arguments, Commands, command, config_option, emit, json_option
from understudy.cli.learning import shop_of


def add_gate(commands: Commands) -> None:
    help = "Measure a served version beside the champion and decide whether it may be rolled out; exit 1 unless it may."
    gate = command(commands, "gate", _gate, help)
    gate.add_argument("version", nargs="?", help="its name (default: the route's challenger)")
    gate.add_argument("--route", help="needed where the config has several")
    config_option(gate)
    json_option(gate)


def _gate(arguments: Arguments) -> int:
    from learner import gate_report, gating
    from learner.cycle import dataset_of
    from learner.workshop import Refused
    from understudy import show_rollout

    shop = shop_of(arguments)
    name = arguments.version or shop.registry.alias(shop.route, "challenger")
    if name is None:
        raise Refused(f"route {shop.route} has no challenger; name a version, as `understudy learn status` shows it")
    version = shop.registry.version(name)
    data = dataset_of(shop.folder / "datasets", version.dataset)
    if data is None:
        raise Refused(
            f"the dataset {version.dataset[:12]} of {name} is gone, or lost examples: nothing to measure it on"
        )
    report, diagnosis, page = gating.gate(shop, version, data)
    found: dict[str, Any] = {**gate_report.summary(report), "why": report.why, "page": str(page)}
    found["diagnosis"] = msgspec.to_builtins(diagnosis)
    emit(arguments, found, lambda: show_rollout.gate(report, diagnosis, page))
    return 0 if report.verdict == "pass" else 1
