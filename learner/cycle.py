"""One round of learning, top to bottom: is it due → dataset → train → register → serve → a challenger nobody draws yet.

A round's state stands in the store and is written after each step; each step, done again, gives what it gave. So a
round that was killed anywhere is taken up where it was, by whoever comes next, and ends as if nothing had happened. One
process at a time works on a route (`learner.rounds`). A route has one challenger: no round begins while there is one.

    dataset    the journal and the policy decide its bytes; a folder with a manifest is whole
    train      the spec decides the adapter; the trainer goes on from its last checkpoint
    register   one adapter of one dataset is one version, whoever registers it
    serve      loaded on every replica, checked token by token against PEFT, else taken off again
    done       the version is the route's challenger
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from learner import dataset, hashes, registry, serving
from learner.answers import Generate
from learner.due import Due, Facts, due, not_yet
from learner.erase import erase_everywhere
from learner.lint import lint
from learner.plan import Learner
from learner.recipes import parameters_of, recipe
from learner.registry import Registry, Version
from learner.rounds import Busy, Round, last_round, working
from learner.runners import Event, Runner
from learner.serving import Fleet
from learner.shards import manifest, manifest_hash, read
from learner.spec import Artifact, Hyper, Method, TrainSpec
from router.store import Documents
from telemetry.errors import StateError, UnderstudyError

CHECKED = 32
"""Held-out prompts on which replicas are compared with PEFT."""
CHECKED_TOKENS = 64
FEW_PAIRS = 0.2
"""With fewer pairs than this share of the single votes, KTO on these votes knows more than DPO on the pairs."""


class Interrupted(UnderstudyError):
    """The disk is full, say: the round stays where it is."""


class Refused(UnderstudyError):
    """A round that must not go on: the message says why, and what to do."""


PASSING = (Busy, Interrupted, StateError, serving.Unreachable, serving.Full, serving.InUse)


class Workshop(NamedTuple):
    """What a route's rounds are made with."""

    route: str
    plan: Learner
    source: dataset.Source
    documents: Documents
    fleet: Fleet
    runner: Runner
    generate: Generate
    owner: str
    threads: int = 2
    gpu: tuple[bool, int | None] = (False, None)
    """Whether training has one, and its bytes of memory if they are known."""

    @property
    def registry(self) -> Registry:
        return Registry(self.documents)

    @property
    def folder(self) -> Path:
        return self.plan.folder.resolve()


Say = Callable[[str, Event], None]
"""Told each step as it begins, and what happens in it."""


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
            }
            while state.round.active:
                say(state.round.step, {})
                state.put(steps[state.round.step](shop, state.round, say))
        except PASSING:
            raise
        except OSError as error:
            raise Interrupted(f"step {state.round.step} was interrupted ({error}); the next try goes on") from error
        except UnderstudyError as error:
            state.put(replace(state.round, step="failed", why=str(error), ended=now()))
            raise
        state.put(replace(state.round, ended=now()))
        return state.round


def _dataset(shop: Workshop, round: Round, say: Say) -> Round:
    built = dataset.build(shop.source, shop.plan.dataset, shop.folder / "datasets")
    say("dataset", {"folder": str(built.folder), "examples": built.manifest["examples"]})
    until = float(built.manifest["journal"]["until"])
    return replace(round, step="train", dataset=str(built.folder), until=until, spec=plan_run(shop, built.folder))


def _train(shop: Workshop, round: Round, say: Say) -> Round:
    artifact = _artifact(shop, round, say)
    if artifact.collapsed:
        raise Refused(
            f"the adapter collapsed in training ({artifact.stopped}): answers that were preferred became unlikely; "
            "nothing is registered. A lower learning_rate or a higher sft_weight under learner.train helps"
        )
    return replace(round, step="register")


def _artifact(shop: Workshop, round: Round, say: Say) -> Artifact:
    if round.spec is None:
        raise Refused("the round has no training spec; begin another one with `understudy learn once --force`")
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
    registry.install(Path(artifact.folder), version)
    return replace(round, step="serve", version=version.name)


def _serve(shop: Workshop, round: Round, say: Say) -> Round:
    version = shop.registry.version(round.version)
    if (now := hashes.base_hash(hashes.located(version.base))) != version.base_hash:
        was = version.base_hash[:12]
        raise Refused(f"the base at {version.base} changed under {version.name}: it is {now[:12]}, and was {was}")
    expected = expected_answers(shop, version, Path(round.dataset))
    loaded = serving.load(shop.fleet, version, needed=keep(shop))
    try:
        for replica in shop.fleet.replicas:
            found = serving.agreement(replica, version.name, expected)
            say("serve", {"replica": replica.url, "agreement": found.share, "tokens": found.tokens})
            if not found.holds():
                raise Refused(
                    f"{replica.url} says {found.share:.1%} of PEFT's tokens with {version.name}; the adapter is felt "
                    f"in {found.telling_equal} of {found.telling} places, and {found.prompts_equal} of {found.prompts} "
                    "prompts are the same: is its base, template or dtype another one?"
                )
            serving.warm(replica, version.name)
    except BaseException:
        for replica in loaded:
            with suppress(serving.ServingFailed):  # why it came to this is what must be said
                serving.unload(replica, version.name, tuple)
        raise
    shop.registry.served(version.name, version.adapter_hash)
    if not shop.registry.move(shop.route, "challenger", version.name, None) and (
        shop.registry.alias(shop.route, "challenger") != version.name
    ):
        raise Refused(f"route {shop.route} has got another challenger meanwhile; one at a time")
    return replace(round, step="done")


def expected_answers(shop: Workshop, version: Version, data: Path) -> list[serving.Expected]:
    """What PEFT says to prompts that were held out."""
    prompts = [one.messages for one in read(data) if one.split == "held_out"][:CHECKED]
    prompts = prompts or [[{"role": "user", "content": "Hello"}]]
    said = shop.generate(version.base, str(version.adapter), prompts, CHECKED_TOKENS)
    return [
        serving.Expected(one["prompt_ids"], one["token_ids"], messages)
        for one, messages in zip(said, prompts, strict=True)
    ]


def keep(shop: Workshop) -> list[str]:
    """Versions of the route that stay loaded."""
    return [name for name in shop.registry.aliases(shop.route).values() if name]


def expire(shop: Workshop, now: float) -> int:
    """Take the text that has been kept long enough out of datasets; how many examples went. `now`: Unix seconds."""
    before = now - shop.source.retention
    why = "data that it was trained on was too old to be kept"
    return erase_everywhere(shop.folder, shop.registry, shop.route, lambda one: one.text_from < before, why)[0]


def reconcile(shop: Workshop) -> serving.Reconciled:
    """Load the versions that have a part on replicas that were restarted."""
    return serving.reconcile(shop.fleet, [shop.registry.version(name) for name in keep(shop)])


def drop(shop: Workshop, why: str, now: Callable[[], float] = time.time) -> Round:
    """Give up the round under way or its challenger: taken off the replicas, kept in the registry with the reason."""
    with working(shop.documents, shop.route, shop.owner, now) as state:
        name = shop.registry.alias(shop.route, "challenger")
        if name is None and not state.round.active:
            raise Refused(
                f"route {shop.route} has neither a round under way nor a challenger; there is nothing to drop"
            )
        if name is not None:
            shop.registry.tag(name, "dropped", why)
            shop.registry.move(shop.route, "challenger", None, name)
            for replica in shop.fleet.replicas:
                serving.unload(replica, name, lambda: keep(shop))
        state.put(replace(state.round, step="dropped", why=why, ended=now()))
        return state.round


def reproduce(shop: Workshop, name: str, out: Path, say: Say) -> tuple[Version, Artifact]:
    """Train a version again from what it was made of: the same bytes on the same machine and threads.

    Raises Refused where its dataset or base is gone or another one.
    """
    version = shop.registry.version(name)
    spec = msgspec.convert(version.spec, TrainSpec)
    data = dataset_of(shop.folder / "datasets", version.dataset) or Path(spec.dataset)
    if not (data / "manifest.json").is_file() or manifest_hash(data) != version.dataset:
        raise Refused(f"{name} was trained on dataset {version.dataset[:12]}, which is gone or had data erased since")
    again = replace(spec, dataset=str(data), output=str(out.resolve()), run_name=f"{name} again")
    return version, shop.runner.run(again, lambda event: say("train", event))


def dataset_of(folder: Path, wanted: str) -> Path | None:
    """The dataset whose manifest has that hash."""
    return next((path.parent for path in folder.glob("[!.]*/manifest.json") if hashes.file_hash(path) == wanted), None)


def plan_run(shop: Workshop, data: Path) -> TrainSpec:
    """The whole run, decided before it begins."""
    base, plan = hashes.located(shop.plan.base), shop.plan
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
        base=plan.base,
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
    known = Facts(now, last.began, shop.registry.alias(shop.route, "challenger"))
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
