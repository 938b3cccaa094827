"""Text that must go leaves datasets too, and what was trained on it is named; lineage walks both ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_dataset import chats, policy, source

from learner import shards
from learner.dataset import Built, build, sweep
from learner.erase import erase, erase_everywhere
from learner.examples import Example
from learner.lineage import Archive, NotFound, walk
from learner.registry import Registry, Version
from router.store_sqlite import SqliteStore
from telemetry.events import Interaction
from telemetry.journal import Journal
from understudy.forget import forget


def made(tmp_path: Path) -> tuple[Built, Journal, Registry, Version]:
    """A dataset in a learner's folder, and a version that was trained on it."""
    own = source(tmp_path / "j.db", chats())
    built = build(own, policy(), tmp_path / "learner" / "datasets")
    registry = Registry(SqliteStore(tmp_path / "s.db"))
    version = registry.register(
        Version(
            route="assistant", base="base", base_hash="b" * 64, tokenizer_hash="t" * 64, template_hash="m" * 64,
            adapter_hash="a" * 64, dataset=built.hash, created=1.0, metrics={"held_out_accuracy": 0.9},
        ),
        tmp_path / "learner" / "versions",
    )  # fmt: skip
    return built, own.journal, registry, version


def test_erased_examples_are_nowhere_in_the_folder_and_the_dataset_says_so(tmp_path: Path) -> None:
    built, *_ = made(tmp_path)
    before = list(shards.read(built.folder))
    texts = [text for one in before if one.user == "u3" for text in one.texts]
    assert erase(built.folder, lambda one: one.user == "u3") == 3
    after = list(shards.read(built.folder))
    assert after == [one for one in before if one.user != "u3"]
    everything = b"".join(path.read_bytes() for path in built.folder.iterdir())
    assert not any(text.encode() in everything for text in texts)
    assert shards.manifest(built.folder)["erased"] == {"from": built.hash, "examples": 3}
    assert shards.manifest_hash(built.folder) != built.hash
    assert shards.dataset_name(built.folder) == built.hash
    assert erase(built.folder, lambda one: one.user == "u4") == 3
    assert shards.manifest(built.folder)["erased"] == {"from": built.hash, "examples": 6}


def test_erasing_that_was_interrupted_is_finished_by_the_next(tmp_path: Path) -> None:
    built, *_ = made(tmp_path)

    def gone(one: Example) -> bool:
        return one.user == "u3"

    manifest = (built.folder / "manifest.json").read_bytes()
    erase(built.folder, gone)
    (built.folder / "manifest.json").write_bytes(manifest)  # killed between shards and manifest
    with pytest.raises(shards.BadDataset, match="was changed"):
        list(shards.read(built.folder))
    registry = Registry(SqliteStore(tmp_path / "s.db"))
    assert erase_everywhere(tmp_path / "learner", registry, gone, "asked")[0] == 3
    assert len(list(shards.read(built.folder))) == 57


def test_a_missing_shard_and_what_a_killed_build_left_stop_nobody_from_being_forgotten(tmp_path: Path) -> None:
    built, _, registry, version = made(tmp_path)
    left = tmp_path / "learner" / "datasets" / ".building-x"
    left.mkdir()
    (left / "train-pair-00000.jsonl").write_text("what somebody said")
    next(built.folder.glob("held_out-*")).unlink()
    _, names = erase_everywhere(tmp_path / "learner", registry, lambda one: one.user == "u3", "asked")
    assert names == [version.name]
    sweep(tmp_path / "learner" / "datasets", 0.0)
    assert not left.exists()
    assert not [one for one in shards.read(built.folder) if one.user == "u3"]


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_a_dataset_that_cannot_be_read_is_taken_away_and_the_others_are_erased(tmp_path: Path, damage: str) -> None:
    built, _, registry, version = made(tmp_path)
    odd = tmp_path / "learner" / "datasets" / "a-damaged-one"
    odd.mkdir()
    (odd / "manifest.json").write_text(damage)
    count, names = erase_everywhere(tmp_path / "learner", registry, lambda one: one.user == "u3", "asked")
    assert (count, names) == (3, [version.name])
    assert not odd.exists()
    assert built.folder.exists()


def test_a_version_of_another_route_that_learned_from_it_is_named_too(tmp_path: Path) -> None:
    built, _, registry, version = made(tmp_path)
    fields = {"base_hash": "", "tokenizer_hash": "", "template_hash": "", "created": 1.0}
    other = Version(route="other", base="b", adapter_hash="c" * 64, dataset=built.hash, **fields)  # type: ignore[arg-type]
    other = registry.register(other, tmp_path / "learner" / "versions")
    _, names = erase_everywhere(tmp_path / "learner", registry, lambda one: one.user == "u3", "asked")
    assert sorted(names) == sorted([version.name, other.name])


def test_parquet_loses_them_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    own = source(tmp_path / "j.db", chats())
    built = build(own, policy(format="parquet"), tmp_path / "out")
    assert erase(built.folder, lambda one: one.user == "u3") == 3
    assert len(list(shards.read(built.folder))) == 57


def test_versions_that_learned_from_what_was_erased_are_tagged(tmp_path: Path) -> None:
    _, _, registry, version = made(tmp_path)
    count, names = erase_everywhere(tmp_path / "learner", registry, lambda one: one.user == "u3", "asked")
    assert (count, names) == (3, [version.name])
    assert registry.tags(version.name) == {"erased": "asked"}
    assert erase_everywhere(tmp_path / "learner", registry, lambda one: False, "x") == (0, [])


def test_forgetting_a_user_says_which_versions_hold_their_data(tmp_path: Path) -> None:
    from gateway.auth import Pseudonyms

    store = SqliteStore(tmp_path / "s.db")
    key = store.secret("pseudonyms", os.urandom(32))
    name = Pseudonyms(key).of("default", "ann")
    facts = chats() + [fact for n in range(100, 103) for fact in _chat(n, name)]
    own = source(tmp_path / "j.db", facts)
    built = build(own, policy(), tmp_path / "learner" / "datasets")
    registry = Registry(store)
    version = registry.register(
        Version(route="assistant", base="b", base_hash="", tokenizer_hash="", template_hash="", adapter_hash="a" * 64,
                dataset=built.hash, created=1.0),
        tmp_path / "learner" / "versions",
    )  # fmt: skip
    held = [one for one in shards.read(built.folder) if one.user == name]
    assert held
    found = forget(own.journal, store, "default", "ann", [tmp_path / "learner"])
    assert (found.examples, found.versions) == (len(held), (version.name,))
    assert not [one for one in shards.read(built.folder) if one.user == name]


def _chat(n: int, user: str) -> list[object]:
    from test_dataset import chat

    return list(chat(n, user))


def test_lineage_walks_from_an_answer_to_the_version_and_back(tmp_path: Path) -> None:
    built, journal, registry, version = made(tmp_path)
    archive = Archive("assistant", tmp_path / "learner", registry, journal)
    one = next(iter(shards.read(built.folder)))
    (answer, *_) = [f for f in journal.events("default", one.events) if isinstance(f, Interaction)]

    forward = walk(archive, answer.request_id)
    assert forward["made_by"] == "champion"
    assert [row["dataset"] for row in forward["led_to"]] == [built.hash]
    assert [row["id"] for row in forward["led_to"][0]["examples"]] == [one.id]
    assert forward["led_to"][0]["versions"] == [version.name]
    assert {row["kind"] for row in forward["signals"]} == {"thumb"}

    backward = walk(archive, version.name)
    assert backward["dataset"]["hash"] == built.hash
    assert one.id in {row["id"] for row in backward["examples"]}
    assert backward["reports"] == {"held_out_accuracy": 0.9}

    between = walk(archive, one.id[:12])
    assert answer.event_id in {row["event_id"] for row in between["came_from"]}
    assert between["led_to"][0]["versions"] == [version.name]
    assert walk(archive, built.hash[:12])["versions"] == [version.name]
    assert walk(archive, built.folder.name)["versions"] == [version.name]
    with pytest.raises(NotFound, match="'nothing' is no version"):
        walk(archive, "nothing")


def test_lineage_does_not_cross_tenants(tmp_path: Path) -> None:
    built, journal, registry, _ = made(tmp_path)
    one = next(iter(shards.read(built.folder)))
    (answer, *_) = [f for f in journal.events("default", one.events) if isinstance(f, Interaction)]
    with pytest.raises(NotFound):
        walk(Archive("assistant", tmp_path / "learner", registry, journal), answer.request_id, "acme")
