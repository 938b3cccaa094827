"""Datasets: built from a journal, the same bytes each time, and explained back to where they come from."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conversations import START, asked, compared, journal, said

from learner import shards
from learner.dataset import NothingToLearn, Source, build, explain, look, sweep
from learner.erase import erase
from learner.plan import DatasetPolicy
from telemetry.errors import UnderstudyError
from telemetry.events import Fact, Interaction
from telemetry.journal import Journal

DAY = 86400.0
WORDS = ["river", "stone", "garden", "window", "lantern", "copper", "valley"]
WORDS += ["thunder", "meadow", "silver", "harbour", "anchor", "basil", "pepper"]


def chat(n: int, user: str, **more: object) -> list[Fact]:
    """One conversation: two answers to a question, of which the first one is liked."""
    chance = random.Random(n)
    question = f"{n} what about the {' '.join(chance.choices(WORDS, k=8))}"
    good = asked(
        question, f"Well, the {' '.join(chance.choices(WORDS, k=9))}", user=user, session=f"s{n}", at=9.0 * n, **more
    )
    bad = asked(
        question, f"No: {' '.join(chance.choices(WORDS, k=7))}", user=user, session=f"s{n}", at=9.0 * n + 1, **more
    )
    return [good, bad, said("thumb", good, 1.0), said("thumb", bad, 0.0)]


def chats(count: int = 60, users: int = 20) -> list[Fact]:
    return [fact for n in range(count) for fact in chat(n, f"u{n % users}")]


def source(path: Path, facts: Iterable[Fact], retention: float = 30 * DAY) -> Source:
    return Source(journal(path, facts), "assistant", retention, "1")


def policy(**more: object) -> DatasetPolicy:
    return DatasetPolicy.model_validate({"held_out": 0.2, **more})


def test_a_journal_becomes_shards_with_a_manifest_that_says_how(tmp_path: Path) -> None:
    built = build(source(tmp_path / "j.db", chats()), policy(shard=20), tmp_path / "out")
    examples = list(shards.read(built.folder))
    assert len(examples) == 60
    assert {one.kind for one in examples} == {"pair"}
    found = json.loads((built.folder / "manifest.json").read_text())
    assert found["examples"]["train"]["pair"] + found["examples"]["held_out"]["pair"] == 60
    assert found["journal"]["high_water"] == 240
    assert [shard["name"] for shard in found["shards"]][:2] == ["train-pair-00000.jsonl", "train-pair-00001.jsonl"]
    assert {row["filter"] for row in found["filters"]} >= {
        "machine",
        "golden",
        "disputed",
        "duplicate",
        "user",
        "straddling",
    }
    assert built.folder.name == f"assistant-{shards.manifest_hash(built.folder)[:12]}"


def test_facts_in_another_order_and_another_process_give_the_same_bytes(tmp_path: Path) -> None:
    facts = chats()
    first = build(source(tmp_path / "a.db", facts), policy(), tmp_path / "a")
    random.Random(4).shuffle(facts)
    source(tmp_path / "b.db", facts).journal.close()
    script = (
        "import sys; from pathlib import Path; from learner.dataset import *; from learner.plan import DatasetPolicy;"
        "from telemetry.journal import Journal;"
        "own = Source(Journal(Path(sys.argv[1])), 'assistant', 30 * 86400.0, '1');"
        "build(own, DatasetPolicy(held_out=0.2), Path(sys.argv[2]))"
    )
    env = os.environ | {"PYTHONHASHSEED": "99"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "b.db"), str(tmp_path / "b")], check=True, env=env)
    (second,) = (tmp_path / "b").iterdir()
    assert second.name == first.folder.name
    assert {p.name: p.read_bytes() for p in second.iterdir()} == {
        p.name: p.read_bytes() for p in first.folder.iterdir()
    }


def test_an_event_that_was_sent_again_counts_by_its_time_whatever_order_it_came_in(tmp_path: Path) -> None:
    facts = chats()
    for n, fact in enumerate(list(facts)):
        if not isinstance(fact, Interaction) and n % 3 == 0:
            changed = {"value": 1.0 - (fact.value or 0.0), "received_at": fact.received_at + 30.0}
            facts.append(msgspec.structs.replace(fact, **changed))
    first = build(source(tmp_path / "a.db", facts), policy(), tmp_path / "a")
    random.Random(4).shuffle(facts)
    second = build(source(tmp_path / "b.db", facts), policy(), tmp_path / "b")
    assert second.hash == first.hash


def test_a_damaged_dataset_is_built_again_and_one_with_erased_data_is_not(tmp_path: Path) -> None:
    own = source(tmp_path / "j.db", chats())
    built = build(own, policy(), tmp_path / "out")
    shard = next(built.folder.glob("train-*.jsonl"))
    shard.write_bytes(b"")
    assert build(own, policy(), tmp_path / "out").folder == built.folder
    assert len(list(shards.read(built.folder))) == 60
    erase(built.folder, lambda one: one.user == "u3")
    with pytest.raises(shards.BadDataset, match="had data erased"):
        build(own, policy(), tmp_path / "out")


def test_parquet_holds_the_same_examples(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    own = source(tmp_path / "j.db", chats())
    lines = build(own, policy(), tmp_path / "out")
    columns = build(own, policy(format="parquet"), tmp_path / "out")
    assert list(shards.read(columns.folder)) == list(shards.read(lines.folder))


def test_building_again_is_building_once(tmp_path: Path) -> None:
    own = source(tmp_path / "j.db", chats())
    assert build(own, policy(), tmp_path / "out").folder == build(own, policy(), tmp_path / "out").folder
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_what_is_too_old_or_before_the_window_is_not_used(tmp_path: Path) -> None:
    old = chat(1, "ann") + chat(2, "ben")
    new = [fact for n in (3, 4) for fact in chat(n, f"late{n}")]
    later = [asked("tick", "tock", user="zoe", at=20 * DAY)]
    moved = [_moved(fact, 19 * DAY) for fact in new]
    own = source(tmp_path / "j.db", [*old, *moved, *later])
    everything = list(shards.read(build(own, policy(), tmp_path / "all").folder))
    assert len(everything) == 4
    within = list(shards.read(build(own, policy(window="2d"), tmp_path / "window").folder))
    assert {one.user for one in within} == {"late3", "late4"}
    kept = list(shards.read(build(own._replace(retention=2 * DAY), policy(), tmp_path / "kept").folder))
    assert {one.user for one in kept} == {"late3", "late4"}
    replayed = list(shards.read(build(own, policy(window="2d", replay=0.34), tmp_path / "replay").folder))
    assert len(replayed) == 3


def _moved(fact: Fact, seconds: float) -> Fact:
    if isinstance(fact, Interaction):
        return msgspec.structs.replace(fact, at=fact.at + seconds)
    return msgspec.structs.replace(fact, at=fact.at + seconds, received_at=fact.received_at + seconds)


def test_a_comparison_across_two_sessions_is_one_pair(tmp_path: Path) -> None:
    facts = chats(10)
    one = asked("Which river is it?", "The long one by the old town.", user="u1", session="left")
    other = asked("Which river is it?", "None at all.", user="u1", session="right")
    vote = compared(one, other, by="u1")
    own = source(tmp_path / "j.db", [*facts, one, other, vote, said("copy", other)])
    found = [row for row in shards.read(build(own, policy(), tmp_path / "out").folder) if row.reason == "comparison"]
    assert [(row.chosen, row.rejected) for row in found] == [(one.answer, other.answer)]


def test_other_routes_and_tenants_stay_apart(tmp_path: Path) -> None:
    facts = chats(20)
    facts += [fact for n in range(40, 50) for fact in chat(n, f"x{n}", route="other")]
    facts += [fact for n in range(60, 70) for fact in chat(n, f"y{n}", tenant="acme")]
    own = source(tmp_path / "j.db", facts)
    every = list(shards.read(build(own, policy(), tmp_path / "out").folder))
    assert {one.route for one in every} == {"assistant"}
    assert {one.tenant for one in every} == {"default", "acme"}
    acme = list(shards.read(build(own, policy(tenants=["acme"]), tmp_path / "acme").folder))
    assert {one.tenant for one in acme} == {"acme"}


def test_an_empty_journal_and_one_user_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(NothingToLearn, match="nobody voted"):
        build(source(tmp_path / "a.db", [asked("What?", "x")]), policy(), tmp_path / "out")
    with pytest.raises(NothingToLearn, match="one user only"):
        build(source(tmp_path / "b.db", chats(30, users=1)), policy(), tmp_path / "out")
    cut = [fact for n in range(5) for fact in chat(n, f"u{n}", finish_reason="length")]
    with pytest.raises(NothingToLearn, match="the answer was cut"):
        build(source(tmp_path / "c.db", cut), policy(), tmp_path / "out")


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source(tmp_path / "j.db", chats()).journal.close()
    script = (
        "import resource, signal, sys; from pathlib import Path; from learner.dataset import *;"
        "from learner.plan import DatasetPolicy; from telemetry.journal import Journal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "own = Source(Journal(Path(sys.argv[1])), 'assistant', 30 * 86400.0, '1');"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "build(own, DatasetPolicy(), Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "j.db"), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_build_during_which_a_user_is_forgotten_comes_to_nothing(tmp_path: Path) -> None:
    own = source(tmp_path / "j.db", chats())

    class Forgetting(Journal):
        def sessions(self, *arguments: Any) -> Any:
            sweep(tmp_path / "out", 0.0)
            return super().sessions(*arguments)

    with pytest.raises(shards.BadDataset, match="was taken away"):
        build(own._replace(journal=Forgetting(tmp_path / "j.db")), policy(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_changed_shard_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    built = build(source(tmp_path / "j.db", chats()), policy(), tmp_path / "out")
    shard = next(built.folder.glob("train-*.jsonl"))
    shard.write_bytes(shard.read_bytes().replace(b"Well", b"Hell", 1))
    with pytest.raises(shards.BadDataset, match="was changed since"):
        list(shards.read(built.folder))
    shard.unlink()
    with pytest.raises(UnderstudyError, match="cannot be read"):
        list(shards.read(built.folder))
    with pytest.raises(shards.BadDataset, match="is no dataset"):
        list(shards.read(tmp_path))


def test_an_example_is_explained_back_to_its_facts(tmp_path: Path) -> None:
    own = source(tmp_path / "j.db", chats())
    built = build(own, policy(), tmp_path / "out")
    one = next(iter(shards.read(built.folder)))
    found = explain(built.folder, one.id[:10], own.journal)
    assert {fact.event_id for fact in found["facts"]} == set(one.events)
    answers = [fact.answer for fact in found["facts"] if isinstance(fact, Interaction)]
    assert sorted(answers) == sorted([one.chosen, one.rejected])
    assert found["missing"] == []
    with pytest.raises(shards.BadDataset, match="no example's id begins with"):
        explain(built.folder, "zzz", own.journal)


def test_a_look_counts_the_pairs_that_would_be_accepted_and_what_was_judged(tmp_path: Path) -> None:
    own = source(tmp_path / "j.db", chats(60))
    assert look(own, policy(), 0.0) == (60, 60, 120, 60)
    assert look(own, policy(), START + 9.0 * 30 + 11.0).new_pairs == 29
    assert look(own, policy(answer_chars=[1, 2]), 0.0).pairs == 0


def test_goldens_do_not_come_through(tmp_path: Path) -> None:
    facts = chats(40)
    prompts = [fact.messages[0]["content"] for fact in facts if isinstance(fact, Interaction)]
    (tmp_path / "g.yaml").write_text("\n".join(f"- prompt: {prompt.upper()}" for prompt in prompts[:20]))
    built = build(source(tmp_path / "j.db", facts), policy(goldens=[str(tmp_path / "g.yaml")]), tmp_path / "out")
    learned = {one.messages[0]["content"] for one in shards.read(built.folder)}
    assert learned
    assert not learned & set(prompts[:20])
    assert built.manifest["goldens"]["texts"] == 10


def test_the_journal_is_not_written(tmp_path: Path) -> None:
    own = source(tmp_path / "j.db", chats(20))
    before = own.journal.last(), own.journal.counts()
    build(own, policy(), tmp_path / "out")
    assert (own.journal.last(), own.journal.counts()) == before
    assert isinstance(own.journal, Journal)
