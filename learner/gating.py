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
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from learner import evaluate, expectations, gate_report
from learner.contest import Champion, Contest, Limits
from learner.diagnosis import Diagnosis, adjusted, diagnose, overridden
from learner.gate import Report, decide
from learner.judge import judge_of
from learner.loaded import Left, keep, take_off
from learner.measured import Measured
from learner.proof import AGREEMENT, expected_answers
from learner.registry import Unknown, Version
from learner.replica import Unreachable, listing
from learner.rounds import Round
from learner.shards import MANIFEST, dataset_name, manifest, read
from learner.spec import TrainSpec
from learner.workshop import Refused, Say, Workshop
from router.rollout import Refused as NotNow
from router.rollout_controller import load, propose
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
    lead = shop.lead
    known = shop.registry.metrics(version.name).get(AGREEMENT)
    contest = Contest(
        challenger=version,
        champion=champion_of(shop, version),
        fleet=shop.fleet,
        score=shop.score,
        expected=expected_answers(shop, version, data) if known is None else (),
        agreement=known,
        system=lead.system if lead is not None else None,
        params=lead.params if lead is not None else {},
        dataset=data,
        earlier=_earlier(shop, data),
        goldens=expectations.load(shop.plan.dataset.goldens),
        judge=judge_of(policy.judge) if policy.judge is not None else None,
        allow_code=policy.allow_code,
        limits=Limits(pairs=policy.pairs, duels=policy.duels, temperature=policy.temperature),
    )
    measured = evaluate.measure(contest)
    if measured.agreement is None:
        raise Unreachable(f"{version.name} is not served by every replica: {'; '.join(measured.notes)}; load it first")
    report = decide(measured, policy, int(hashlib.sha256(version.name.encode()).hexdigest()[:8], 16))
    hyper = msgspec.convert(version.spec, TrainSpec).hyper
    diagnosis = diagnose(report, manifest(data), version.metrics, hyper)
    report = gate_report.without(report, ids=_gone(contest, measured))
    page = gate_report.write(shop.folder / "gates" / version.name, report, diagnosis).page
    if report.main.value is not None:
        shop.registry.measure(version.name, {f"gate_{report.main.name}": report.main.value})
    shop.registry.tag(version.name, TAG, report.verdict)
    return Gated(report, diagnosis, page)


def check_gate(shop: Workshop) -> None:
    """Raises Refused or BadGoldens for what no gate could tell, before anything is trained."""
    goldens = expectations.load(shop.plan.dataset.goldens)
    if shop.gate is None:
        return
    policy, kinds = shop.plan.gate, {golden.kind for golden in goldens}
    if "code" in kinds and not policy.allow_code:
        raise Refused("there are goldens with code to run; write learner.gate.allow_code: true, or take them out")
    if "rubric" in kinds and policy.judge is None:
        raise Refused("there are goldens with a rubric, and nobody to judge them; name a learner.gate.judge")
    if policy.judge is not None:
        judge_of(policy.judge).ready()
    if shop.lead is not None and shop.lead.provider is not None:
        raise Refused(
            f"route {shop.route}'s leading arm is answered by {shop.lead.provider}, so no version can be measured "
            "beside it; lead with an arm on the route's own upstreams"
        )


def champion_of(shop: Workshop, challenger: Version) -> Champion:
    """The registry's champion; else the model of the config's leading arm. Raises Refused where that is not known."""
    alias = shop.registry.alias(shop.route, "champion")
    has = listing(shop.fleet.replicas[0])
    name = alias or (shop.lead.model if shop.lead is not None else has.base)
    with suppress(Unknown):
        version = shop.registry.version(name)
        return Champion(name, version.base, str(version.adapter))
    if name == has.base:
        return Champion(name, challenger.base)
    adapter = has.adapters.get(name)
    if adapter is None or not Path(adapter).is_dir():
        raise Refused(
            f"the champion {name} is neither a version nor the base {has.base}, and its adapter "
            f"{adapter or 'is not loaded'} is not found here, so nothing can be measured beside it"
        )
    return Champion(name, challenger.base, adapter)


def _gone(contest: Contest, measured: Measured) -> set[str]:
    """Examples that were erased from their dataset while they were looked at."""
    there = {one.id for folder in (contest.dataset, *contest.earlier) for one in read(folder)}
    return ({one.id for one in measured.duels} | {one.id for one in measured.preferences}) - there


def gated(shop: Workshop, round: Round, say: Say) -> Round:
    """The step: the round after it. Raises Unmeasured where it must be tried again, Unreachable."""
    if rolled_out(shop, round.version):
        return replace(round, step="done")
    version, data = shop.registry.version(round.version), Path(round.dataset)
    assert shop.gate is not None
    report, diagnosis, page = shop.gate(shop, version, data)
    say("gate", {"verdict": report.verdict, "why": report.why, "page": str(page)})
    if report.verdict == "pass":
        _roll_out(shop, version, report)
        return replace(round, step="done")
    if diagnosis.again:
        raise Unmeasured(f"{version.name} is neither passed nor refused: {diagnosis.why}; the report is {page}")
    why = f"{version.name} did not pass its gate ({report.verdict}): {report.why}. Likely {diagnosis.why}"
    return replace(round, step="refuse", tried=(*round.tried, diagnosis), why=f"{why}. The report is {page}")


def refuse(shop: Workshop, round: Round, say: Say) -> Round:
    """The step after a gate that was not passed: the version is taken off, and the round trains anew or ends.

    Raises Refused where there is nothing to be tried.
    """
    if rolled_out(shop, round.version):  # an operator did so, in spite of the gate
        return replace(round, step="done", why="")
    let_go(shop, round.version)
    if not trainable(shop, round.tried):
        raise Refused(round.why)
    say("gate", {"note": f"{round.why}; training again with {adjusted(shop.plan.gate, round.tried)}"})
    return replace(round, step="dataset", spec=None, version="", why="")


def rolled_out(shop: Workshop, version: str) -> bool:
    """Whether the version's rollout is under way, or was."""
    _, rollout = load(shop.documents, shop.route)
    return rollout is not None and rollout.challenger == version


def let_go(shop: Workshop, version: str) -> None:
    """A version that plays no part any more leaves the replicas; it may be gated and rolled out by hand later."""
    if version and not rolled_out(shop, version):
        shop.registry.move(shop.route, "challenger", None, version)
        if version not in keep(shop.stage):
            with suppress(Left):  # `learn watch` takes it off when it can
                take_off(shop.stage, [version])


def trainable(shop: Workshop, tried: tuple[Diagnosis, ...]) -> bool:
    """Whether another training would be another one: more feedback alone makes none, nor what was tried before."""
    changes = _of_training(adjusted(shop.plan.gate, tried))
    return bool(changes) and changes not in [
        _of_training(adjusted(shop.plan.gate, tried[:n])) for n in range(len(tried))
    ]


def _of_training(changes: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (changes or {}).items() if key != "min_pairs"}


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


def _earlier(shop: Workshop, data: Path) -> list[Path]:
    """The route's datasets that versions learned from before this one, the newest first."""
    learned = {version.dataset for version in shop.registry.versions(shop.route)} - {dataset_name(data)}
    found = [path.parent for path in (shop.folder / "datasets").glob(f"[!.]*/{MANIFEST}")]
    known = [(float(manifest(one)["journal"]["until"]), one) for one in found if dataset_name(one) in learned]
    until = float(manifest(data)["journal"]["until"])
    return [one for at, one in sorted(known, reverse=True) if at < until][:MOST_EARLIER]
