"""The registry of versions, over both stores, and the folders that it stands for."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from redis_server import RedisServer

from learner.hashes import folder_hash
from learner.registry import Conflict, Registry, RegistryError, Tampered, Unknown, Version, install, verify
from router.store import Store
from router.store_redis import RedisStore
from router.store_sqlite import SqliteStore

ROOT = Path(__file__).resolve().parent.parent
ROUTE = "assistant"
Open = Callable[[], Registry]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same registry again and again, as several processes would."""
    stores: list[Store] = []

    def open_one() -> Registry:
        if request.param == "sqlite":
            stores.append(SqliteStore(tmp_path / "state.db"))
        else:
            stores.append(RedisStore(request.getfixturevalue("redis").url))
        return Registry(stores[-1])

    if request.param == "redis":
        first = RedisStore(request.getfixturevalue("redis").url)
        first._redis.flushall()
        first.close()
    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def registry(opened: Open) -> Registry:
    return opened()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Registry]:
    """A registry whose store knows nothing."""
    with contextlib.closing(SqliteStore(tmp_path / "other.db")) as store:
        yield Registry(store)


def new(weights: str = "a", route: str = ROUTE, dataset: str = "d") -> Version:
    """What a run that made `weights` would register."""
    return Version(
        route=route,
        base="meta/base",
        base_hash="b" * 64,
        tokenizer_hash="t" * 64,
        template_hash="e" * 64,
        adapter_hash=(weights.encode().hex() * 64)[:64],
        dataset=dataset * 64,
        created=1_800_000_000.5,
        spec={"hyper": {"rank": 16}},
        packages={"trl": "1.16.0"},
        metrics={"held_out_accuracy": 0.75},
    )


def artifact(folder: Path, weights: bytes = b"weights") -> Path:
    """What a training run leaves."""
    (folder / "adapter" / "deeper").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter" / "adapter_model.safetensors").chmod(0o600)
    (folder / "adapter" / "deeper" / "note.txt").write_text("a note")
    return folder


def registered(registry: Registry, made: Path, versions: Path, **fields: object) -> Version:
    return registry.register(replace(new(), adapter_hash=folder_hash(made / "adapter"), **fields), versions)


def test_versions_are_numbered_by_route_and_read_as_they_were_registered(opened: Open, tmp_path: Path) -> None:
    one, two = opened(), opened()
    first = one.register(new("a"), tmp_path)
    second = two.register(replace(new("b"), parent=first.name), tmp_path)
    elsewhere = one.register(new("a", "other"), tmp_path)
    assert (first.name, second.name, elsewhere.name) == (
        "assistant-v1-61616161",
        "assistant-v2-62626262",
        "other-v1-61616161",
    )
    assert first == replace(new("a"), name=first.name, number=1, folder=str(tmp_path / first.name))
    assert two.version(first.name) == first
    assert one.versions(ROUTE) == [first, second]
    assert one.versions("nobody") == []


def test_versions_stand_in_the_order_of_their_numbers(registry: Registry, tmp_path: Path) -> None:
    for n in range(11):
        registry.register(new(f"{n:02}"), tmp_path)
    assert [version.number for version in registry.versions(ROUTE)] == list(range(1, 12))


def test_the_same_artifact_is_the_same_version_whoever_registers_it(opened: Open, tmp_path: Path) -> None:
    one, two = opened(), opened()
    first = one.register(new(), tmp_path)
    assert two.register(replace(new(), created=1.0, metrics={}), tmp_path) == first
    again = two.register(new(dataset="e"), tmp_path)
    assert again.name == "assistant-v2-61616161", "the same weights of another dataset are another version"


def test_of_many_that_register_at_once_each_artifact_gets_one_number(opened: Open, tmp_path: Path) -> None:
    registries = [opened() for _ in range(6)]
    with ThreadPoolExecutor(6) as crew:
        found = list(crew.map(lambda n: registries[n].register(new("abc"[n % 3]), tmp_path), range(6)))
    assert found[:3] == found[3:]
    assert sorted(version.number for version in found[:3]) == [1, 2, 3]
    assert registries[0].versions(ROUTE) == sorted(found[:3], key=lambda version: version.number)


REGISTER = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from test_registry import Registry, SqliteStore, new

registry = Registry(SqliteStore(Path(sys.argv[1])))
names = [registry.register(new(weights), Path(sys.argv[2])).name for weights in "abcdefghij"]
print(" ".join(names))
"""


def test_processes_that_register_the_same_get_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REGISTER, str(tmp_path / "state.db"), str(tmp_path)]
    crew = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in crew]
    assert said[0] == said[1]
    assert [name.split("-")[1] for name in said[0]] == [f"v{n}" for n in range(1, 11)]


@pytest.mark.parametrize(
    "name", ["assistant-v1-00000000", "assistant-v2-61616161", "assistant", "", "x/../y", "é-v1-0"]
)
def test_a_name_that_was_not_registered_is_unknown(registry: Registry, tmp_path: Path, name: str) -> None:
    registry.register(new(), tmp_path)
    with pytest.raises(Unknown, match="no version"):
        registry.version(name)


def test_routes_that_look_alike_in_names_never_share_one(registry: Registry, tmp_path: Path) -> None:
    slash, dash = registry.register(new(route="a/b"), tmp_path), registry.register(new(route="a-b"), tmp_path)
    assert (slash.name, dash.name) == ("a-b-v1-61616161", "a-b-v2-61616161")
    assert (registry.versions("a/b"), registry.versions("a-b")) == ([slash], [dash])
    assert registry.version(slash.name).route == "a/b"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"route": "../x"}, "letter or digit"),
        ({"route": ""}, "letter or digit"),
        ({"adapter_hash": "../../x"}, r"Artifact\.adapter_hash"),
        ({"metrics": {"loss": float("nan")}}, "'loss' is nan; leave out"),
    ],
)
def test_what_cannot_be_a_version_is_refused(
    registry: Registry, tmp_path: Path, wrong: dict[str, object], why: str
) -> None:
    with pytest.raises(RegistryError, match=why):
        registry.register(replace(new(), **wrong), tmp_path)
    assert registry.versions(ROUTE) == []


def test_an_alias_moves_only_from_where_it_was_expected(opened: Open, tmp_path: Path) -> None:
    one, two = opened(), opened()
    a, b = (one.register(new(weights), tmp_path).name for weights in "ab")
    assert one.alias(ROUTE, "champion") is None
    assert one.move(ROUTE, "champion", a, None)
    assert not two.move(ROUTE, "champion", b, None)
    assert two.alias(ROUTE, "champion") == a
    assert two.move(ROUTE, "champion", b, a)
    assert two.move(ROUTE, "champion", None, b)
    assert one.aliases(ROUTE) == {}
    assert one.aliases("other") == {}


def test_aliases_move_together_or_not_at_all(registry: Registry, tmp_path: Path) -> None:
    a, b = (registry.register(new(weights), tmp_path).name for weights in "ab")
    registry.move_all(ROUTE, {"champion": (None, a), "challenger": (None, b)})
    assert not registry.move_all(ROUTE, {"champion": (a, b), "previous": (b, a)})
    assert registry.aliases(ROUTE) == {"champion": a, "challenger": b}
    assert registry.move_all(ROUTE, {"champion": (a, b), "previous": (None, a), "challenger": (b, None)})
    assert registry.aliases(ROUTE) == {"champion": b, "previous": a}


def test_an_alias_points_only_at_a_version_of_its_route(registry: Registry, tmp_path: Path) -> None:
    elsewhere = registry.register(new(route="other"), tmp_path).name
    with pytest.raises(Unknown, match="no version of route 'assistant'"):
        registry.move(ROUTE, "champion", elsewhere, None)
    with pytest.raises(Unknown, match="'assistant-v9-00000000' is registered"):
        registry.move(ROUTE, "champion", "assistant-v9-00000000", None)


def test_of_many_that_promote_at_once_one_does(opened: Open, tmp_path: Path) -> None:
    registries = [opened() for _ in range(5)]
    names = [registries[0].register(new(weights), tmp_path).name for weights in "abcde"]
    with ThreadPoolExecutor(5) as crew:
        moved = list(crew.map(lambda n: registries[n].move(ROUTE, "champion", names[n], None), range(5)))
    assert moved.count(True) == 1
    assert registries[0].alias(ROUTE, "champion") == names[moved.index(True)]


def test_tags_are_set_and_taken_off(registry: Registry, tmp_path: Path) -> None:
    name = registry.register(new(), tmp_path).name
    assert registry.tags(name) == {}
    registry.tag(name, "quarantined", "worse in every segment")
    registry.tag(name, "approved_by", "rule")
    registry.tag(name, "approved_by", None)
    registry.tag(name, "never_there", None)
    assert registry.tags(name) == {"quarantined": "worse in every segment"}
    with pytest.raises(Unknown):
        registry.tag("assistant-v9-00000000", "quarantined", "x")


def test_of_many_that_measure_at_once_nothing_is_lost(opened: Open, tmp_path: Path) -> None:
    registries = [opened() for _ in range(4)]
    name = registries[0].register(new(), tmp_path).name
    threads = [
        threading.Thread(target=lambda n=n: [registries[n].measure(name, {f"m{n}.{k}": k}) for k in range(5)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured = {f"m{n}.{k}": float(k) for n in range(4) for k in range(5)}
    assert registries[0].metrics(name) == measured | {"held_out_accuracy": 0.75}
    registries[0].measure(name, {"held_out_accuracy": 0.5})
    assert registries[1].metrics(name)["held_out_accuracy"] == 0.5
    assert registries[1].version(name).metrics == {"held_out_accuracy": 0.75}, "a version does not change"
    with pytest.raises(RegistryError, match="'win_rate' is inf"):
        registries[0].measure(name, {"win_rate": float("inf")})


def test_what_was_served_is_written_once_and_only_what_was_registered(registry: Registry, tmp_path: Path) -> None:
    version = registry.register(new(), tmp_path)
    with pytest.raises(Tampered, match="register other weights as a new version"):
        registry.served(version.name, "f" * 64)
    for _ in range(2):
        registry.served(version.name, version.adapter_hash)
    assert registry.version(version.name) == replace(version, served_hash=version.adapter_hash)
    assert registry.register(new(), tmp_path).served_hash == version.adapter_hash


def test_an_installed_version_is_whole_read_only_and_has_its_card(registry: Registry, tmp_path: Path) -> None:
    made, versions = artifact(tmp_path / "run"), tmp_path / "versions"
    version = registered(registry, made, versions)
    folder = install(made, version)
    assert folder == versions / version.name == Path(version.folder)
    assert folder_hash(version.adapter) == version.adapter_hash
    card = (folder / "card.json").read_bytes()
    assert msgspec.json.decode(card, type=Version) == version
    assert b'\n  "adapter_hash": ' in card
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    files = {"card.json", "adapter_model.safetensors", "note.txt"}
    assert modes == {name: 0o444 if name in files else 0o755 for name in [*files, folder.name, "adapter", "deeper"]}
    assert sorted(path.name for path in versions.iterdir()) == [version.name], "nothing is left beside it"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert install(made, version) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_many_install_the_same_at_once(registry: Registry, tmp_path: Path) -> None:
    made, versions = artifact(tmp_path / "run", b"x" * 1_000_000), tmp_path / "versions"
    version = registered(registry, made, versions)
    with ThreadPoolExecutor(6) as crew:
        assert set(crew.map(lambda _: install(made, version), range(6))) == {Path(version.folder)}
    assert [path.name for path in versions.iterdir()] == [version.name]


def test_an_artifact_that_changed_after_its_run_is_not_installed(registry: Registry, tmp_path: Path) -> None:
    made = artifact(tmp_path / "run")
    version = registered(registry, made, tmp_path / "versions")
    (made / "adapter" / "adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(Tampered, match=r"run/adapter holds .* not .* as registered for assistant-v1-.*: train again"):
        install(made, version)
    assert not (tmp_path / "versions").exists()


def test_a_folder_that_is_something_else_is_never_reused(registry: Registry, tmp_path: Path) -> None:
    made, versions = artifact(tmp_path / "run"), tmp_path / "versions"
    version = registered(registry, made, versions)
    (versions / version.name).mkdir(parents=True)
    with pytest.raises(Conflict, match="move it away: a version's folder is never reused"):
        install(made, version)
    os.rmdir(versions / version.name)
    install(made, version)
    with pytest.raises(Conflict, match="is there and is not"):
        install(made, replace(version, dataset="f" * 64))


@pytest.mark.parametrize("harm", ["changed", "added", "gone"])
def test_a_version_that_was_tampered_with_is_found(registry: Registry, tmp_path: Path, harm: str) -> None:
    made = artifact(tmp_path / "run")
    version = registered(registry, made, tmp_path / "versions")
    folder = install(made, version)
    verify(folder, version)
    weights = folder / "adapter" / "adapter_model.safetensors"
    if harm == "added":
        (folder / "adapter" / "adapter_model.bin").write_bytes(b"pickle")
    else:
        weights.unlink()
    if harm == "changed":
        weights.write_bytes(b"Weights")
    for check in (lambda: verify(folder, version), lambda: install(made, version)):
        with pytest.raises(Tampered, match=f"registered for {version.name}; it was tampered with"):
            check()


def test_an_emptied_store_is_restored_from_the_cards(registry: Registry, other: Registry, tmp_path: Path) -> None:
    versions = tmp_path / "versions"
    made = [artifact(tmp_path / f"run{n}", bytes([n])) for n in range(3)]
    known = [registered(registry, one, versions) for one in made]
    for one, version in zip(made, known, strict=True):
        install(one, version)
    (versions / ".half-done").mkdir()
    (versions / ".half-done" / "card.json").write_text("{")
    moved = versions.rename(tmp_path / "moved")
    found = [replace(version, folder=str(moved / version.name)) for version in known]
    assert other.restore(moved) == found
    assert other.restore(moved) == []
    assert other.versions(ROUTE) == found
    assert other.restore(tmp_path / "none") == []


def test_an_emptied_store_gives_no_number_a_second_time(registry: Registry, other: Registry, tmp_path: Path) -> None:
    versions = tmp_path / "versions"
    for n in range(2):
        made = artifact(tmp_path / f"run{n}", bytes([n]))
        version = registered(registry, made, versions)
        install(made, version)
    assert other.register(new(), versions).number == 3
    assert registered(other, made, versions) == version, "and knows what it had"


def test_a_card_that_contradicts_the_store_is_said(registry: Registry, other: Registry, tmp_path: Path) -> None:
    made = artifact(tmp_path / "run")
    version = registered(registry, made, tmp_path / "versions")
    folder = install(made, version)
    mine = other.register(new(), tmp_path / "elsewhere")
    with pytest.raises(Conflict, match=f"says {version.name}, but {mine.name} is registered under its number"):
        other.restore(tmp_path / "versions")
    folder.rename(folder.with_name("renamed"))
    with pytest.raises(Conflict, match="a version's folder has its name: rename it back"):
        registry.restore(tmp_path / "versions")
    card = tmp_path / "versions" / "renamed" / "card.json"
    card.unlink()
    card.write_text("{}")
    with pytest.raises(Conflict, match="is no version's card"):
        registry.restore(tmp_path / "versions")
