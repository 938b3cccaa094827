"""Composition of the learner: settings become a source of facts, a policy, a registry, a cycle."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from learner import answers, clusters, gating
from learner.dataset import Source
from learner.lineage import Archive
from learner.plan import DatasetPolicy, Learner, Runner
from learner.registry import Registry, RegistryError
from learner.rounds import owner_name
from learner.serving import Fleet, Replica
from learner.workshop import Workshop
from router.casting import lead_of
from router.store import Store
from telemetry.errors import UnderstudyError
from telemetry.journal import Journal
from understudy.config_text import ConfigError, problems_of, read
from understudy.settings import Settings


def code_version() -> str:
    try:
        return version("understudy")
    except PackageNotFoundError:
        return "source"


def source(settings: Settings, route: str, journal: Journal) -> Source:
    return Source(journal, route, settings.capture.retention, code_version())


def learner_of(settings: Settings, route: str) -> Learner | None:
    return settings.routes[route].learner


def dataset_policy(settings: Settings, route: str, file: Path | None) -> DatasetPolicy:
    """The policy in `file`, or the route's own; what is not written has its default. Raises `ConfigError`."""
    learner = learner_of(settings, route)
    if file is None:
        return learner.dataset if learner is not None else DatasetPolicy()
    document = read(file, {}, frozenset())
    problems = list(document.problems)
    policy = None
    try:
        policy = DatasetPolicy.model_validate(document.data)
    except ValidationError as error:
        problems += problems_of(error, document, DatasetPolicy.model_json_schema())
    if problems or policy is None:
        raise ConfigError(file, problems)
    return policy


def datasets_folder(settings: Settings, route: str) -> Path:
    learner = learner_of(settings, route)
    return (learner.folder if learner is not None else Path("understudy-learner")) / "datasets"


def folders(settings: Settings) -> list[Path]:
    """The folders of the routes' learners that have made anything yet."""
    found = {datasets_folder(settings, route).parent for route in settings.routes}
    return sorted(folder for folder in found if folder.is_dir())


class NoLearner(UnderstudyError):
    """The route has no `learner` in the config."""


def workshop(settings: Settings, route: str, journal: Journal, store: Store) -> Workshop:
    """What the route's rounds of learning are made with. Raises NoLearner."""
    plan = learner_of(settings, route)
    if plan is None:
        raise NoLearner(f"route {route} has no learner; write routes.{route}.learner: {{base: ./models/base}}")
    registry(store, plan.folder)
    upstreams = settings.routes[route].upstreams
    fleet = Fleet(
        [Replica(upstream.url, upstream.api_key) for upstream in upstreams],
        plan.max_loras,
        f"{plan.served_folder}/versions" if plan.served_folder is not None else None,
    )
    return Workshop(
        route=route,
        plan=plan,
        source=source(settings, route, journal),
        documents=store,
        fleet=fleet,
        runner=clusters.planned(plan.runner, plan.folder),
        generate=answers.peft(str(plan.runner.python) if plan.runner.python else None, plan.threads),
        owner=owner_name(),
        threads=plan.threads,
        gpu=gpu_for(plan.runner),
        arms=frozenset(arm.model for arm in settings.routes[route].arms.values()),
        lead=settings.routes[route].arms[lead_of(settings.routes[route].arms)],
        score=answers.peft_scores(str(plan.runner.python) if plan.runner.python else None, plan.threads),
        gate=gating.gate,
        rolls_out=settings.routes[route].rollout is not None,
    )


def gpu_for(runner: Runner) -> tuple[bool, int | None]:
    """Whether a runner trains on GPUs, and how many bytes one has where that can be known."""
    if runner.kind == "kubernetes":
        return runner.gpus > 0, None
    if runner.kind == "skypilot":
        return runner.accelerators is not None, None
    try:
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return bool(said), int(said[0]) << 20 if said else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return False, None


def archive(settings: Settings, route: str, journal: Journal, store: Store) -> Archive:
    """Where the learner's things of a route are found."""
    folder = datasets_folder(settings, route).parent
    return Archive(route, folder, registry(store, folder), journal)


def registry(store: Store, folder: Path) -> Registry:
    """The registry, with what the versions' cards say that the store has lost."""
    found = Registry(store)
    if (folder / "versions").is_dir():
        with suppress(RegistryError):  # a stranger's card; who registers the next version is told
            found.restore(folder / "versions")
    return found
