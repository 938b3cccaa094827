"""From the journal to a dataset: a folder of shards with a manifest that says how it came to be.

The same journal and policy give the same bytes on any machine, in whatever order the facts arrived: the dataset's
present is the newest fact's time, rows are sorted by content, and nothing depends on paths, clocks or chance. Memory
holds what was judged, not what was asked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from learner import goldens, shards
from learner.curate import Curated, coverage, curate, shared_out
from learner.due import Look
from learner.examples import KINDS, SPLITS, Example
from learner.goldens import Goldens
from learner.pairs import VERDICTS, Harvest, Rules, harvest
from learner.people import People, cohort, who
from learner.plan import DatasetPolicy
from learner.shards import BadDataset
from learner.split import divide
from learner.weigh import longer, shares, weigh
from router.reward import Heard
from telemetry.events import Interaction, Signal, answer_name, encode, names_of
from telemetry.journal import Journal, came, meant

FORMAT = 1
KINDS_LEARNED = frozenset([*VERDICTS, "thumb", "rating", "comparison", "correction", "edit"])
AT_ONCE = 200
"""Sessions that are read at once."""
FEWEST_USERS = 2
WEEK = 7 * 86400.0
MARGIN = 2 * 86400.0
"""Seconds of the retention that a dataset leaves for the training."""
ABANDONED = 3600.0
"""Seconds after which a build that was not finished never will be."""


class Source(NamedTuple):
    """What a dataset is made from."""

    journal: Journal
    route: str
    retention: float
    """Seconds that text is kept: older text is not used, even where it still stands."""
    version: str
    """Of the code."""


@dataclass(slots=True)
class Built:
    """A dataset, and what went into it."""

    folder: Path
    manifest: dict[str, Any]
    hash: str
    curated: Curated
    unusable: Counter[str] = field(default_factory=Counter)


class Erased(BadDataset):
    """A dataset that had data erased would be filled again."""


class NothingToLearn(BadDataset):
    """The journal holds too little for a dataset; says what is missing."""


def build(source: Source, policy: DatasetPolicy, folder: Path) -> Built:
    """Build the dataset below `folder` and give it the name of its content; at once if it is there already.

    Raises `NothingToLearn`, `BadGoldens`, `StateError`, OSError (a full disk leaves nothing that looks whole).
    """
    with _workplace(folder) as work:  # before the journal is read: what is forgotten meanwhile takes the place away
        denied = goldens.load(policy.goldens)
        until, last = source.journal.newest(), source.journal.last()
        people, sessions = _read(source, policy, until, last)
        found = _harvested(source, policy, until, last, sessions)
        curated = curate(found.votes, people, policy, denied, until)
        examples = _replayed(curated, policy, until)
        divided = divide(examples, policy.held_out)
        curated.drop("straddling", "its prompt is on the other side of the split", divided.left_out)
        examples = shared_out(curated, divided.examples, policy)
        _check(examples, found, source.route)
        examples = weigh(examples, people.requests, policy.clip)
        manifest = _manifest(source, policy, until, last, denied, curated, found, examples)
        name = _write(work, manifest, policy, examples)
        home = folder / f"{source.route.replace('/', '_')}-{name[:12]}"
        _put(work, home, name)
        return Built(home, manifest, name, curated, found.unusable)


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder to build in, gone at the end. Raises BadDataset where somebody took it away."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        yield work
    except FileNotFoundError:
        if work.exists():
            raise
        raise BadDataset(f"{work} was taken away while data of a user was erased; build the dataset again") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def look(source: Source, policy: DatasetPolicy, since: float) -> Look:
    """What there is to learn from, without building it. `since`: what came later is new, Unix seconds."""
    until, last = source.journal.newest(), source.journal.last()
    people, sessions = _read(source, policy, until, last)
    found = _harvested(source, policy, until, last, sessions)
    examples = curate(found.votes, people, policy, goldens.load(policy.goldens), until).examples
    pairs = [one for one in examples if one.kind == "pair"]
    lately = [vote.example for vote in found.votes if vote.example.at >= until - WEEK]
    judged = {one.id: _is_against(one) for one in lately if one.kind != "correction" and one.reason != "comparison"}
    return Look(len(pairs), sum(one.at > since for one in pairs), len(judged), sum(judged.values()))


def _is_against(example: Example) -> bool:
    """Whether the answer that was judged is held for bad: single votes say, and what had to be put right was."""
    return example.kind == "pair" or example.rejected is not None


def _start(source: Source, policy: DatasetPolicy, until: float) -> float:
    """When the oldest feedback that may be used came."""
    return until - (max(policy.window, source.retention) if policy.replay else policy.window)


def _read(source: Source, policy: DatasetPolicy, until: float, last: int) -> tuple[People, list[tuple[str, str]]]:
    """Who gave feedback, and the sessions that were judged."""
    start = _start(source, policy, until)
    people = People()
    sessions: set[tuple[str, str]] = set()
    after = 0
    while facts := source.journal.read(after, 1000):
        after = facts[-1][0]
        signals = []
        for seq, fact in facts:
            if seq > last or came(fact) < start or (isinstance(fact, Interaction) and fact.route != source.route):
                continue
            people.add(fact)
            if isinstance(fact, Signal) and fact.kind in KINDS_LEARNED:
                signals.append(fact)
        sessions |= source.journal.sessions_of(signals)
    return people, sorted(sessions)


def _harvested(
    source: Source, policy: DatasetPolicy, until: float, last: int, sessions: Sequence[tuple[str, str]]
) -> Harvest:
    # Text that is nearly too old would have to leave the dataset before it was trained on.
    kept = source.retention - min(MARGIN, source.retention / 10)
    rules = Rules(policy.consent == "assumed", until - kept)
    start = _start(source, policy, until)
    found, seen = Harvest(), set[tuple[object, ...]]()
    for begins in range(0, len(sessions), AT_ONCE):
        for requests, heard in _with_signals(source, sessions[begins : begins + AT_ONCE], last):
            own = harvest(requests, heard, rules, lambda tenant, name: _answer(source.journal, tenant, name))
            found.unusable += own.unusable
            for vote in own.votes:
                name = vote.example.id, vote.example.events  # a comparison is heard in both answers' sessions
                if vote.example.at >= start and name not in seen:
                    seen.add(name)
                    found.votes.append(vote)
    return found


def _with_signals(
    source: Source, keys: Sequence[tuple[str, str]], last: int
) -> Iterator[tuple[list[Interaction], list[Heard]]]:
    """Of each session its requests on the route, oldest first, and what was heard about them."""
    found = source.journal.sessions(keys, {})
    by_session: dict[tuple[str, str], list[Interaction]] = {}
    for key in sorted(found):
        requests = [fact for seq, fact in found[key] if fact.route == source.route and seq <= last]
        if requests:
            by_session[key] = sorted(requests, key=lambda one: (one.at, one.event_id))
    every = [request for requests in by_session.values() for request in requests]
    place = {(one.tenant, name): (one.tenant, one.session) for one in every for name in names_of(one)}
    heard: dict[tuple[str, str], list[Heard]] = {}
    for row in standing(source.journal, every, last):
        for key in _about(row[1], place):
            heard.setdefault(key, []).append(row)
    for key, requests in by_session.items():
        yield requests, heard.get(key, [])


def standing(journal: Journal, requests: Sequence[Interaction], last: int) -> list[Heard]:
    """The signals about requests as they count, in whatever order they were journaled: of each event id the newest.

    `Journal.heard_about` goes by the order of arrival, as rewards must; here the same facts must give the same bytes.
    """
    rows = [(seq, signal) for seq, signal in journal.signals_about(requests) if seq <= last]
    newest = {
        key: max(journal.event(*key, limit=1000), key=_age) for key in journal.repeated(signal for _, signal in rows)
    }
    rows = [row for row in rows if newest.get((row[1].tenant, row[1].event_id), row[1]) == row[1]]
    traces: dict[tuple[str, str], list[Interaction]] = {}
    found = []
    for seq, signal in rows:
        if signal.response_id is None and signal.trace_id is not None:
            key = signal.tenant, signal.trace_id
            if key not in traces:
                traces[key] = sorted((one for _, one in journal.answers(signal)), key=lambda one: one.event_id)
            if not traces[key]:
                continue
            signal = msgspec.structs.replace(signal, response_id=meant(traces[key], signal.at).request_id)
        found.append((seq, signal))
    return found


def _age(signal: Signal) -> tuple[float, float, bytes]:
    return came(signal), signal.at, encode(signal)


def _about(signal: Signal, place: dict[tuple[str, str], tuple[str, str]]) -> set[tuple[str, str]]:
    """The sessions that a signal speaks of."""
    names = [signal.response_id] if signal.response_id else []
    if isinstance(signal.target, dict):
        for said in signal.target.values():
            names += [name for name in (said if isinstance(said, list) else [said]) if isinstance(name, str)]
    keys = {place.get((signal.tenant, name)) or place.get((signal.tenant, answer_name(name))) for name in names}
    if not names and signal.session:
        keys.add((signal.tenant, signal.session))
    return {key for key in keys if key is not None}


def _answer(journal: Journal, tenant: str, name: str) -> Interaction | None:
    found = journal.answers(Signal(event_id="", at=0.0, kind="", tenant=tenant, response_id=name))
    return found[0][1] if found else None


def _replayed(curated: Curated, policy: DatasetPolicy, until: float) -> list[Example]:
    """The window's examples, and of older ones as many as the policy replays, drawn by a hash."""
    fresh = [one for one in curated.examples if one.at >= until - policy.window]
    older = [one for one in curated.examples if one.at < until - policy.window]
    most = int(len(fresh) * policy.replay / (1 - policy.replay)) if policy.replay < 1 else len(older)
    drawn = sorted(older, key=lambda one: hashlib.sha256(f"{policy.salt}\0{one.id}".encode()).digest())
    curated.drop("replay", f"older than the window, and beyond a share of {policy.replay:g}", drawn[most:])
    return sorted([*fresh, *drawn[:most]], key=lambda one: one.id)


def _check(examples: Sequence[Example], found: Harvest, route: str) -> None:
    if not examples:
        why = "; ".join(f"{count} × {reason}" for reason, count in found.unusable.most_common(3))
        gave = f"{len(found.votes)} votes were heard, and no example is left of them" if found.votes else "nobody voted"
        raise NothingToLearn(
            f"route {route} has nothing to learn from: {gave}{f' (not usable: {why})' if why else ''}; "
            "`understudy signals` shows what is heard, and dataset.window may be too short"
        )
    users = {name for one in examples for name in one.users}
    if len(users) < FEWEST_USERS:
        raise NothingToLearn(
            f"route {route} has feedback of one user only, whose taste is not everybody's; wait for a second one"
        )


def _manifest(
    source: Source,
    policy: DatasetPolicy,
    until: float,
    last: int,
    denied: Goldens,
    curated: Curated,
    found: Harvest,
    examples: Sequence[Example],
) -> dict[str, Any]:
    pairs = [one for one in examples if one.kind == "pair"]
    sides = Counter(longer(one) for one in pairs)
    return {
        "format": FORMAT,
        "route": source.route,
        "code": source.version,
        "policy": policy.model_dump(mode="json", exclude={"goldens"}),
        "goldens": {"texts": len(denied), "sha256": denied.digest()},
        "journal": {"high_water": last, "until": until, "retention": source.retention},
        "votes": curated.votes,
        "unusable": dict(sorted(found.unusable.items())),
        "filters": [
            {"filter": one.filter, "meaning": one.meaning, "dropped": one.count, "shown": [e.id for e in one.examples]}
            for one in curated.dropped
        ],
        "agreement": {"krippendorff_alpha": _rounded(curated.alpha), "pairwise": _rounded(curated.agreement)},
        "examples": {
            split: {kind: sum(one.split == split and one.kind == kind for one in examples) for kind in KINDS}
            for split in SPLITS
        },
        "reasons": dict(sorted(Counter(one.reason for one in examples).items())),
        "users": {split: len({who(one) for one in examples if one.split == split}) for split in SPLITS},
        "coverage": coverage(examples),
        "cohorts": shares(examples, lambda one: "/".join(part or "-" for part in cohort(one))),
        "arms": shares(examples, lambda one: " > ".join(one.arms)),
        "length": {"longer_chosen": sides[1], "shorter_chosen": sides[-1], "equal": sides[0]},
        "oldest_text": min(one.text_from for one in examples),
    }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 6)


def _write(work: Path, manifest: dict[str, Any], policy: DatasetPolicy, examples: Iterable[Example]) -> str:
    """Write shards and manifest; the dataset's name."""
    written = shards.write(work, examples, policy.format, policy.shard)
    manifest["shards"] = [shard._asdict() for shard in written]
    shards.write_manifest(work, manifest)
    work.chmod(0o755)
    return shards.manifest_hash(work)


def _put(work: Path, home: Path, name: str) -> None:
    """Rename into place; a whole dataset that is there stays, a damaged one goes aside."""
    work.stat()  # FileNotFoundError where it was taken away, even if there is a dataset of that name
    if home.exists() and not _is_whole(home, name):
        os.rename(home, home.with_name(f".damaged-{home.name}-{os.getpid()}"))
    try:
        os.rename(work, home)
    except OSError:
        if not _is_whole(home, name):
            raise


def _is_whole(home: Path, name: str) -> bool:
    """Raises BadDataset for one that had data erased: it must not come back by being built again."""
    try:
        if shards.dataset_name(home) != name:
            return False
        if shards.manifest_hash(home) != name:
            raise Erased(f"{home} had data erased that the journal still has; delete the folder to build it again")
        return all(True for _ in shards.read(home))
    except Erased:
        raise
    except BadDataset:
        return False


def sweep(folder: Path, age: float = ABANDONED) -> None:
    """Take away what builds that were killed left `age` seconds ago, and damaged datasets: they hold text, too."""
    for left in [*folder.glob(".building-*"), *folder.glob(".damaged-*")]:
        if time.time() - left.stat().st_mtime >= age:
            shutil.rmtree(left, ignore_errors=True)


def explain(folder: Path, example_id: str, journal: Journal) -> dict[str, Any]:
    """One example back to where it comes from: its texts, and the facts that it was made of.

    Raises `BadDataset` where no example's id begins so.
    """
    found = [one for one in shards.read(folder) if one.id.startswith(example_id)]
    if len(found) != 1:
        what = "no example's id begins" if not found else f"{len(found)} examples' ids begin"
        raise BadDataset(f"in {folder} {what} with {example_id!r}; `understudy dataset show {folder}` lists them")
    example = found[0]
    facts = journal.events(example.tenant, example.events)
    return {"example": example, "facts": facts, "missing": sorted(set(example.events) - {f.event_id for f in facts})}
