"""One round of learning, top to bottom: is it due → dataset → train → register → serve → gate → a rollout.

A round's state stands in the store and is written after each step; each step, done again, gives what it gave. So a
round that was killed anywhere is taken up where it was, by whoever comes next, and ends as if nothing had happened. One
process at a time works on a route (`learner.rounds`). A route has one challenger: no round begins while there is one.

    dataset    the journal and the policy decide its bytes; a folder with a manifest is whole
    train      the spec decides the adapter; the trainer goes on from its last checkpoint
    register   one adapter of one dataset is one version, whoever registers it
    serve      loaded on every replica, checked token by token against PEFT, else taken off again
    gate       better than the champion on what people held out, and not worse in anything; else trained otherwise
    done       the version is the route's challenger, and its rollout has been asked for
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from learner import dataset, hashes, registry, serving
from learner.diagnosis import pairs_wanted
from learner.due import Due, Facts, due, not_yet
from learner.erase import erase_everywhere
from learner.gating import Unmeasured, as_adjusted, check_gate, gated, let_go, refuse
from learner.lint import lint
from learner.loaded import Left, changed, keep, reconcile, take_off
from learner.proof import prove
from learner.recipes import parameters_of, recipe
from learner.registry import Unknown, Version
from learner.rounds import Busy, Round, State, last_round, working
from learner.shards import MANIFEST, dataset_name, manifest, manifest_hash
from learner.spec import Artifact, Hyper, Method, TrainingInterrupted, TrainSpec
from learner.workshop import Refused, Say, Workshop
from router.rollout_controller import load
from telemetry.errors import StateError, UnderstudyError

FEW_PAIRS = 0.2
"""With fewer pairs than this share of the single votes, KTO on these votes knows more than DPO on the pairs."""


class Interrupted(UnderstudyError):
    """The disk is full, say: the round stays where it is."""


PASSING = (
    *(Busy, Interrupted, StateError, TrainingInterrupted, Unmeasured),
    *(serving.Unreachable, serving.Full, serving.InUse),
)
MOST_TRIES = 5
"""Interruptions of a round by what is not just away; then it has failed."""


def once(shop: Workshop, say: Say, force: bool = False, now: Callable[[], float] = time.time) -> Round | Due:
    """Take up the route's round, or begin one if it is due (or `force`d), and go on to its end.

    What is not due, and when it will be, where there is nothing to do. Raises UnderstudyErrors: what may pass by itself
    (`PASSING`) leaves the round where it is, to be taken up again; others have ended it, and are its `why`.
    """
    with working(shop.documents, shop.route, shop.owner, now) as state:
        if not state.round.active:
            found = why_now(shop, state.round, now(), force)
            if found.reason is None:
                return found
            state.begin(found.reason, found.new_pairs)
        try:
            steps: dict[str, Callable[[Workshop, Round, Say], Round]] = {
                "dataset": _dataset,
                "train": _train,
                "register": _register,
                "serve": _serve,
                "gate": gated,
                "refuse": refuse,
            }
            while state.round.active:
                say(state.round.step, {})
                state.put(steps[state.round.step](as_adjusted(shop, state.round), state.round, say))
        except (UnderstudyError, OSError) as error:
            told = _ended(state, error, now())
            if state.round.step == "failed":
                with suppress(UnderstudyError, OSError):  # why it failed is what must be said
                    let_go(shop, state.round.version)
            raise told from error
        state.put(replace(state.round, ended=now(), until=state.round.reaches, tries=0))
        return state.round


def _ended(state: State, error: UnderstudyError | OSError, now: float) -> UnderstudyError:
    """What to say of a step that failed; the round stays where it is if that may pass by itself, at most a few times.

    What was refused was learned from all the same: the same facts would be refused again.
    """
    round, said = state.round, str(error)
    if isinstance(error, Busy):
        return error
    if isinstance(error, PASSING) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
        waits = isinstance(error, (StateError, serving.Unreachable)) or round.tries < MOST_TRIES
        if waits:
            _keep(state, replace(round, tries=round.tries + 1, why=said))
            return error if isinstance(error, UnderstudyError) else Interrupted(f"step {round.step}: {said}; try again")
    reaches = round.reaches if isinstance(error, Refused) and round.reaches else round.until
    _keep(state, replace(round, step="failed", why=said, ended=now, until=reaches))
    return error if isinstance(error, UnderstudyError) else Refused(said)


def _keep(state: State, round: Round) -> None:
    with suppress(StateError, Busy):  # what went wrong before is what must be said
        state.put(round)


def _dataset(shop: Workshop, round: Round, say: Say) -> Round:
    check_gate(shop)  # what it cannot do is said before anything is trained
    built = dataset.build(shop.source, shop.plan.dataset, shop.folder / "datasets")
    say("dataset", {"folder": str(built.folder), "examples": built.manifest["examples"]})
    reaches = float(built.manifest["journal"]["until"])
    return replace(round, step="train", dataset=str(built.folder), reaches=reaches, spec=plan_run(shop, built.folder))


def _train(shop: Workshop, round: Round, say: Say) -> Round:
    if round.spec is None or _lost_examples(round.spec):
        return replace(round, step="dataset", spec=None)
    artifact = _artifact(shop, round, say)
    if artifact.collapsed:
        raise Refused(
            f"the adapter collapsed in training ({artifact.stopped}): answers that were preferred became unlikely; "
            "nothing is registered. A lower learning_rate or a higher sft_weight under learner.train helps"
        )
    return replace(round, step="register")


def _lost_examples(spec: TrainSpec) -> bool:
    """Whether text that must go was taken out of the dataset since it was built."""
    data = Path(spec.dataset)
    erased = (data / MANIFEST).is_file() and dataset_name(data) == spec.dataset_hash != manifest_hash(data)
    return erased and not Path(spec.output).exists()


def _artifact(shop: Workshop, round: Round, say: Say) -> Artifact:
    assert round.spec is not None
    return shop.runner.run(round.spec, lambda event: say("train", event))


def _register(shop: Workshop, round: Round, say: Say) -> Round:
    artifact, spec = _artifact(shop, round, say), round.spec
    assert spec is not None
    if faults := lint(artifact.adapter, shop.plan.max_lora_rank):
        raise Refused(f"vLLM would not serve {artifact.adapter}: {'; '.join(faults)}")
    new = Version(
        route=shop.route,
        base=spec.base,
        base_hash=spec.base_hash,
        tokenizer_hash=artifact.tokenizer_hash,
        template_hash=artifact.template_hash,
        adapter_hash=artifact.adapter_hash,
        dataset=spec.dataset_hash,
        created=round.began,
        parent=shop.registry.alias(shop.route, "champion"),
        spec=msgspec.to_builtins(spec),
        seed=spec.seed,
        packages=artifact.packages,
        metrics=artifact.metrics,
    )
    version = shop.registry.register(new, shop.folder / "versions")
    if why := shop.registry.tags(version.name).get("dropped"):
        raise Refused(
            f"it came out as {version.name}, which was dropped ({why}); change learner.seed or wait for new facts"
        )
    registry.install(Path(artifact.folder), version)
    return replace(round, step="serve", version=version.name)


def _serve(shop: Workshop, round: Round, say: Say) -> Round:
    version = shop.registry.version(round.version)
    if why := changed(version):
        raise Refused(why)
    serving.load(shop.fleet, version, needed=keep(shop.stage))
    try:
        prove(shop, version, Path(round.dataset), say)
        shop.registry.served(version.name, version.adapter_hash)
        if not shop.registry.move(shop.route, "challenger", version.name, None) and (
            shop.registry.alias(shop.route, "challenger") != version.name
        ):
            raise Refused(f"route {shop.route} has got another challenger meanwhile; one at a time")
    except serving.Unreachable:
        raise  # it is tried again when the replica is back
    except UnderstudyError:
        if version.name not in keep(shop.stage):
            with suppress(Left):  # why it came to this is what must be said
                take_off(shop.stage, [version.name])
        raise
    return replace(round, step="gate" if shop.gate is not None else "done")


def drop(shop: Workshop, why: str, now: Callable[[], float] = time.time) -> Round:
    """Give up the round under way or its challenger: taken off the replicas, kept in the registry with the reason.

    Raises Refused where an arm of the config still draws it, Left where a replica still has it.
    """
    with working(shop.documents, shop.route, shop.owner, now) as state:
        under_way = state.round.version if state.round.active else ""
        named = (shop.registry.alias(shop.route, "challenger"), under_way)
        names = [name for name in dict.fromkeys(named) if name]
        if not names and not state.round.active:
            raise Refused(
                f"route {shop.route} has neither a round under way nor a challenger; there is nothing to drop"
            )
        _, rollout = load(shop.documents, shop.route)
        if rollout is not None and rollout.active and rollout.challenger in names:
            raise Refused(f"{rollout.challenger} is being rolled out; `understudy rollout abort` first")
        if drawn := shop.arms.intersection(names):
            raise Refused(f"an arm of route {shop.route} draws {', '.join(drawn)}; take it out of the config first")
        for name in names:
            with suppress(Unknown):
                shop.registry.tag(name, "dropped", why)
            shop.registry.move(shop.route, "challenger", None, name)
        reaches = max(state.round.until, state.round.reaches)
        state.put(replace(state.round, step="dropped", why=why, ended=now(), until=reaches))
        take_off(shop.stage, names)
        return state.round


def expire(shop: Workshop, now: float) -> int:
    """Take the text that has been kept long enough out of datasets; how many examples went. `now`: Unix seconds."""
    before = now - shop.source.retention
    why = "data that it was trained on was too old to be kept"
    return erase_everywhere(shop.folder, shop.registry, lambda one: one.text_from < before, why, "expired")[0]


def replicas_kept(shop: Workshop) -> serving.Reconciled:
    """Load what replicas miss that were restarted, and take off what has no part any more."""
    last = last_round(shop.documents, shop.route)
    return reconcile(shop.stage, [last.version] if last.active and last.version else [])


def reproduce(shop: Workshop, name: str, out: Path, say: Say) -> tuple[Version, Artifact]:
    """Train a version again from what it was made of: the same bytes on the same machine and threads.

    Raises Refused where its dataset or base is gone or another one.
    """
    version = shop.registry.version(name)
    spec = msgspec.convert(version.spec, TrainSpec)
    data = dataset_of(shop.folder / "datasets", version.dataset) or Path(spec.dataset)
    if not (data / MANIFEST).is_file() or manifest_hash(data) != version.dataset:
        raise Refused(f"{name} was trained on dataset {version.dataset[:12]}, which is gone or had data erased since")
    if why := changed(version):
        raise Refused(why)
    if out.exists():
        raise Refused(f"{out} is there already; name a folder to be made")
    again = replace(spec, dataset=str(data), output=str(out.resolve()), run_name=f"{name} again")
    return version, shop.runner.run(again, lambda event: say("train", event))


def dataset_of(folder: Path, wanted: str) -> Path | None:
    """The dataset whose manifest has that hash."""
    return next((path.parent for path in folder.glob("[!.]*/manifest.json") if hashes.file_hash(path) == wanted), None)


def plan_run(shop: Workshop, data: Path) -> TrainSpec:
    """The whole run, decided before it begins."""
    base, plan = hashes.located(shop.plan.base), shop.plan
    named = str(base.resolve()) if Path(plan.base).is_dir() else plan.base
    counts = manifest(data)["examples"]["train"]
    paired, single = counts["pair"] + counts["correction"], counts["unpaired"]
    method = plan.method if plan.method != "auto" else method_for(paired, single)
    try:
        hyper = replace(recipe(parameters_of(base), *shop.gpu), loss=plan.loss)
    except ValueError as error:
        raise Refused(str(error)) from None
    try:
        hyper = msgspec.convert(msgspec.to_builtins(hyper) | dict(plan.train), Hyper)
    except msgspec.ValidationError as error:
        keys = ", ".join(Hyper.__struct_fields__)
        raise Refused(f"learner.train of route {shop.route}: {error}; the keys are {keys}") from None
    champion = shop.registry.alias(shop.route, "champion")
    start = shop.registry.version(champion).adapter if plan.start == "champion" and champion else None
    name = manifest_hash(data)
    spec = TrainSpec(
        base=named,
        base_hash=hashes.base_hash(base),
        dataset=str(data),
        dataset_hash=name,
        output="",
        method=method,
        hyper=hyper,
        seed=plan.seed,
        threads=shop.threads,
        start=str(start) if start else None,
        trackers=plan.trackers,
        run_name=f"{shop.route} {name[:12]}",
    )
    digest = hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).hexdigest()
    return replace(spec, output=str(shop.folder / "runs" / f"{name[:12]}-{digest[:8]}"))


def method_for(paired: int, single: int) -> Method:
    return "kto" if paired < FEW_PAIRS * single else "dpo"


def why_now(shop: Workshop, last: Round, now: float, force: bool = False) -> Due:
    """Whether a round should begin, and why; if not, when."""
    wanted = pairs_wanted(last.tried) if last.step == "failed" else 0
    known = Facts(now, last.began, shop.registry.alias(shop.route, "challenger"), wanted=wanted)
    early = not_yet(known, shop.plan, force)
    if early is not None:
        return early
    return due(known._replace(seen=dataset.look(shop.source, shop.plan.dataset, last.until)), shop.plan, force)


def status(shop: Workshop, now: Callable[[], float] = time.time) -> dict[str, Any]:
    """The last round, when the next one is due, and the route's versions, newest first."""
    last = last_round(shop.documents, shop.route)
    found = None if last.active else why_now(shop, last, now())
    aliases = shop.registry.aliases(shop.route)
    waits = "" if found is None else found.reason or found.waiting
    return {
        "round": {
            "number": last.number,
            "step": last.step,
            "reason": last.reason,
            "why": last.why,
            "began": last.began,
        },
        "next": waits or f"round {last.number} goes on with `understudy learn once`",
        "versions": [
            {
                "name": version.name,
                "aliases": [alias for alias, name in aliases.items() if name == version.name],
                "tags": shop.registry.tags(version.name),
                "metrics": shop.registry.metrics(version.name),
                "dataset": version.dataset,
                "parent": version.parent,
                "created": version.created,
            }
            for version in reversed(shop.registry.versions(shop.route))
        ],
    }
