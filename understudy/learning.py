"""Composition of the learner: settings become a source of facts, a policy, a registry, a cycle."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from learner.dataset import Source
from learner.plan import DatasetPolicy, Learner
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
