"""The gate as a step of a round: measure, decide, put on record; then roll out, or train otherwise, or give up.

What passed is proposed to the rollout controller, where the route has rollouts. What did not is taken off the replicas
again, and the round trains anew with what the diagnosis says, as often as `gate.retries` allows. What could not be
measured (a judge that is down) is no verdict: the round stays where it is and is tried again.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from learner import evaluate, expectations, gate_report
from learner.diagnosis import Diagnosis, adjusted, diagnose, overridden
from learner.evaluate import Contest, Limits
from learner.gate import Report, decide
from learner.judge import judge_of
from learner.loaded import Left, take_off
from learner.proof import AGREEMENT, expected_answers
from learner.registry import Version
from learner.rounds import Round
from learner.shards import MANIFEST, manifest
from learner.spec import TrainSpec
from learner.workshop import Refused, Say, Workshop
from router.rollout import Refused as NotNow
from router.rollout_controller import propose
from telemetry.errors import UnderstudyError

TAG = "gate"
MOST_EARLIER = 3
"""Earlier datasets whose held-out pairs are looked at."""


class Unmeasured(UnderstudyError):
    """The gate could not tell, for a reason that may pass by itself."""


class Gated(NamedTuple):
    """A verdict, and where it can be read."""

    report: Report
    diagnosis: Diagnosis
    page: Path


def gate(shop: Workshop, version: Version, data: Path) -> Gated:
    """Measure a served version beside the champion and decide; the report is kept beside the versions, tag and metrics
    in the registry. Raises Unreachable where a replica does not answer, BadGoldens."""
    policy = shop.plan.gate
    champion = shop.registry.alias(shop.route, "champion")
    known = shop.registry.metrics(version.name).get(AGREEMENT)
    contest = Contest(
        challenger=version,
        champion=shop.registry.version(champion) if champion else None,
        fleet=shop.fleet,
        score=shop.score,
        expected=expected_answers(shop, version, data) if known is None else (),
        agreement=known,
        dataset=data,
        earlier=[folder for folder in _earlier(shop.folder / "datasets") if folder.name != data.name],
        goldens=expectations.load(shop.plan.dataset.goldens),
        judge=judge_of(policy.judge) if policy.judge is not None else None,
        allow_code=policy.allow_code,
        limits=Limits(pairs=policy.pairs, duels=policy.duels, temperature=policy.temperature),
    )
    report = decide(evaluate.measure(contest), policy, int(hashlib.sha256(version.name.encode()).hexdigest()[:8], 16))
    hyper = msgspec.convert(version.spec, TrainSpec).hyper
    diagnosis = diagnose(report, manifest(data), version.metrics, hyper)
    page = gate_report.write(shop.folder / "gates" / version.name, report, diagnosis).page
    if report.main.value is not None:
        shop.registry.measure(version.name, {f"gate_{report.main.name}": report.main.value})
    shop.registry.tag(version.name, TAG, report.verdict)
    return Gated(report, diagnosis, page)


def gated(shop: Workshop, round: Round, say: Say) -> Round:
    """The step: the round after it. Raises Refused where it ends here, Unmeasured where it must be tried again."""
    version, data = shop.registry.version(round.version), Path(round.dataset)
    report, diagnosis, page = gate(shop, version, data)
    say("gate", {"verdict": report.verdict, "why": report.why, "page": str(page)})
    if report.verdict == "pass":
        _roll_out(shop, version, report)
        return replace(round, step="done")
    if diagnosis.again:
        raise Unmeasured(f"{version.name} is neither passed nor refused: {diagnosis.why}; the report is {page}")
    shop.registry.move(shop.route, "challenger", None, version.name)
    with suppress(Left):  # `learn watch` takes it off when it can
        take_off(shop.stage, [version.name])
    said = f"{version.name} did not pass its gate ({report.verdict}): {report.why}. Likely {diagnosis.why}"
    tried = (*round.tried, diagnosis)
    if not trainable(shop, tried):
        raise Refused(f"{said}. The report is {page}")
    say("gate", {"note": f"{said}; training again with {adjusted(shop.plan.gate, tried)}"})
    return replace(round, step="dataset", spec=None, version="", tried=tried)


def trainable(shop: Workshop, tried: tuple[Diagnosis, ...]) -> bool:
    """Whether there is anything to be tried yet, other than to wait for more feedback."""
    changes = adjusted(shop.plan.gate, tried)
    return bool(changes) and set(changes or ()) != {"min_pairs"}


def as_adjusted(shop: Workshop, round: Round) -> Workshop:
    """The workshop with what the diagnoses of the round's refused challengers changed."""
    changes = adjusted(shop.plan.gate, round.tried) if round.tried else None
    return shop._replace(plan=overridden(shop.plan, changes)) if changes else shop


def _roll_out(shop: Workshop, version: Version, report: Report) -> None:
    if not shop.rolls_out:
        return
    try:
        propose(shop.documents, shop.registry, shop.route, version.name, "learner", report.why, time.time())
    except NotNow as error:
        raise Refused(f"{version.name} passed its gate and is not rolled out: {error}") from error


def _earlier(folder: Path) -> list[Path]:
    """The datasets there are, the newest first."""
    found = [path.parent for path in folder.glob(f"[!.]*/{MANIFEST}")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_EARLIER]
