"""A challenger that is good offline and worse live: `two_faced`, put before the gate as any version would be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from learner import gating, hashes, registry, serving
from learner.cycle import dataset_of
from learner.gate import Report
from learner.loaded import keep
from learner.registry import Version
from learner.workshop import Workshop
from router.rollout_controller import propose


def bring_in(shop: Workshop, adapter: Path, say: Callable[[str], None]) -> tuple[Version, Report]:
    """Register and load an adapter that was trained elsewhere, and have the gate judge it on the newest dataset."""
    newest = shop.registry.versions(shop.route)[-1]
    data = dataset_of(shop.folder / "datasets", newest.dataset)
    assert data is not None
    artifact = shop.folder / "planted"
    artifact.mkdir(exist_ok=True)
    if not (artifact / registry.ADAPTER).exists():
        (artifact / registry.ADAPTER).symlink_to(adapter.resolve(), target_is_directory=True)
    wanted = replace(
        newest,
        adapter_hash=hashes.folder_hash(adapter),
        created=time.time(),
        parent=shop.registry.alias(shop.route, "champion"),
        metrics={},
        packages={},
    )
    version = shop.registry.register(wanted, shop.folder / "versions")
    registry.install(artifact, version)
    serving.load(shop.fleet, version, needed=keep(shop.stage))
    say(f"{version.name} was trained elsewhere; it is loaded, and put before the gate")
    report = gating.gate(shop, version, data).report
    say(f"its gate says {report.verdict}: {report.why}")
    return version, report


def roll_out(shop: Workshop, version: Version, report: Report) -> None:
    propose(shop.documents, shop.registry, shop.route, version.name, "the demo", report.why, time.time())
