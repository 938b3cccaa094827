"""`understudy forget`: what a user wrote, and who they were, goes from the journal; what was learned in sums stays."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.auth import Pseudonyms
from learner import gate_report
from learner.dataset import sweep
from learner.erase import erase_everywhere
from learner.examples import Example
from learner.people import person
from learner.registry import Registry
from router.store import Store
from telemetry.errors import StateError
from telemetry.events import Fact, Interaction, Shadow, Signal
from telemetry.journal import Journal
from telemetry.privacy import forgotten, stripped

BATCH = 1000


@dataclass(slots=True)
class Forgotten:
    """What went."""

    interactions: int = 0
    signals: int = 0
    scrubbed: bool = True
    """The overwritten text is gone from the write-ahead log too; otherwise it goes when that is next emptied."""
    examples: int = 0
    """Taken out of datasets."""
    versions: tuple[str, ...] = ()
    """Trained versions that learned from the user's data: somebody must decide about them."""

    def shown(self) -> dict[str, Any]:
        return asdict(self)


def forget(journal: Journal, store: Store, tenant: str, user: str, learners: Collection[Path] = ()) -> Forgotten:
    """Erase a user, by the name that the app gives them. May be stopped and begun again at any point.

    `learners`: folders of the routes' learners, whose datasets lose the user's examples first: these are found by the
    journal's facts.

    Raises `StateError` if the store has no key of pseudonyms, so that nobody's hash can be known.
    """
    key = store.secrets().get("pseudonyms")
    if key is None:
        raise StateError("the store has no key of pseudonyms, so no user can be found by name; has it been emptied?")
    name, nobody = Pseudonyms(key).of(tenant, user), secrets.token_hex(12)
    found, after = Forgotten(), 0
    if learners:
        _forget_examples(journal, store, tenant, name, learners, found)
    while facts := journal.naming(name, after, BATCH):
        after = facts[-1][0]
        own = [(seq, fact) for seq, fact in facts if fact.tenant == tenant and _is_of(fact, name)]
        answers = [fact for _, fact in own if isinstance(fact, Interaction)]
        about = {seq for seq, _ in journal.signals_about(answers)}
        about |= {seq for seq, fact in own if isinstance(fact, Signal)}
        journal.rewrite([*about, *(seq for seq, _ in own)], lambda fact: _bare(fact, name, nobody))
        found.interactions += len(answers)
        found.signals += len(about)
    found.scrubbed = journal.scrub()
    return found


def _forget_examples(
    journal: Journal, store: Store, tenant: str, name: str, learners: Collection[Path], found: Forgotten
) -> None:
    events: set[str] = set()
    after = 0
    while facts := journal.naming(name, after, BATCH):
        after = facts[-1][0]
        events |= {fact.event_id for _, fact in facts if fact.tenant == tenant and _is_of(fact, name)}

    def gone(example: Example) -> bool:
        return example.tenant == tenant and (example.user == name or not events.isdisjoint(example.events))

    for folder in sorted({folder.resolve() for folder in learners}):
        sweep(folder / "datasets", 0.0)
        gate_report.clean(folder / "gates", users={person(tenant, name, "")})
        count, versions = erase_everywhere(folder, Registry(store), gone, "data of a user was erased")
        found.examples += count
        found.versions += tuple(versions)


def _is_of(fact: Fact, name: str) -> bool:
    match fact:
        case Interaction() | Shadow():
            return fact.user == name
        case Signal():
            return fact.subject == name
        case _:
            return False


def _bare(fact: Fact, name: str, nobody: str) -> Fact:
    """A fact of the user without them; what somebody else said of an answer to the user loses its text only."""
    return forgotten(fact, nobody) if _is_of(fact, name) else stripped(fact)
