"""A rollout as operators run it: `understudy serve`, two workers, a controller and Redis, while things are killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import eventually
from fake_vllm import FakeVllm
from redis_server import RedisServer
from rollout_house import registered

from learner.registry import Registry
from router.rollout_controller import load, propose
from router.store import Store
from router.store_redis import RedisStore
from telemetry.errors import StateError
from telemetry.journal import Journal
from understudy.demo.story import gateway
from understudy.demo.vllm_server import free_port

ROUTE = "assistant"
STEPS = ["begin", "start", "advance", "advance", "promote", "promoted"]


class Stage:
    """The real processes, a fake vLLM, and people who like the challenger or not."""

    def __init__(self, folder: Path, redis: RedisServer, fake: FakeVllm) -> None:
        self.folder, self.redis, self.fake = folder, redis, fake
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.journal_path = folder / "journal.db"
        self.liked = {"base": 0.4}
        self.told: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self._stop = threading.Event()
        self.down = False
        """While there is no replica."""
        route = {
            "upstreams": [fake.url],
            "arms": {"champion": {"model": "base"}},
            "policy": {"kind": "thompson", "refresh": "200ms"},
            "rollout": {
                "interval": "200ms", "margin": 0.1,
                "stages": [{"share": share, "min_sessions": 15, "min_time": "1s"} for share in (0.2, 0.5, 1.0)],
            },
        }  # fmt: skip
        config = {
            "listen": {"port": self.port, "workers": 2}, "admin": None, "state": redis.url,
            "journal": str(self.journal_path), "auth": {"feedback_per_minute": 1e6}, "routes": {ROUTE: route},
        }  # fmt: skip
        self.config = folder / "understudy.yaml"
        self.config.write_text(yaml.safe_dump(config))

    @property
    def store(self) -> Store:
        return RedisStore(self.redis.url)

    def version(self, n: int, liked: float) -> str:
        """A version that is loaded on the replica, and proposed."""
        name = registered(self.store, self.folder / "versions", n, ROUTE)
        self.fake.load(name)
        self.liked[name] = liked
        propose(self.store, Registry(self.store), ROUTE, name, "learner", "passed its gate", time.time())
        return name

    def verbs(self) -> list[str]:
        """What was decided; nothing while the store is away."""
        with contextlib.suppress(StateError):
            rollout = load(self.store, ROUTE)[1]
            return [one.verb for one in rollout.decisions] if rollout is not None else []
        return []

    @contextlib.contextmanager
    def people(self, at_once: int = 6) -> Iterator[None]:
        threads = [threading.Thread(target=self._come_and_go, args=(n,)) for n in range(at_once)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _come_and_go(self, seed: int) -> None:
        chance, number = random.Random(seed), 0
        http = httpx.Client(base_url=self.url, timeout=20)
        while not self._stop.is_set():
            number += 1
            body = {"model": ROUTE, "messages": [{"role": "user", "content": f"hello {seed} {number}"}]}
            headers = {"x-understudy-session": f"s{seed}-{number}"}
            nobody = self.down
            try:
                said = http.post("/v1/chat/completions", json=body, headers=headers)
                self.told["nobody" if nobody and said.status_code == 502 else str(said.status_code)] += 1
                if said.status_code != 200:
                    continue
                model = said.json().get("model", "")
                self.models[model] += 1
                vote = {"response_id": said.json()["id"], "kind": "thumb", "value": chance.random() < self.liked[model]}
                http.post("/v1/feedback", json=vote)
            except httpx.TransportError:
                self.told["cut"] += 1
        http.close()

    # Victims.

    def kill_controller(self) -> None:
        with contextlib.suppress(StateError):
            lease = self.store.holder()
            if lease is not None and lease.owner:
                os.kill(int(lease.owner.rpartition(":")[2]), signal.SIGKILL)

    def kill_worker(self, supervisor: int) -> None:
        lease = self.store.holder()
        controller = int(lease.owner.rpartition(":")[2]) if lease is not None and lease.owner else 0
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        for pid in map(int, children):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid != controller and b"resource_tracker" not in words:
                os.kill(pid, signal.SIGKILL)
                return

    def restart_vllm(self, version: str) -> None:
        """It comes back without its adapters; the learner loads them again after a while."""
        self.down = True
        self.fake.restart()
        self.down = False
        threading.Timer(1.5, self.fake.load, [version]).start()

    def restart_redis(self) -> None:
        self.redis.stop()
        time.sleep(0.5)
        self.redis.start()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with RedisServer(durable=True) as redis, FakeVllm(["base"]) as fake:
        yield Stage(tmp_path, redis, fake)


@pytest.mark.parametrize("first", [0, 2], ids=["controller first", "vllm first"])
@pytest.mark.timeout(240)
def test_whatever_is_killed_at_each_transition_the_better_version_is_promoted(stage: Stage, first: int) -> None:
    with gateway(stage.config, stage.url, stage.folder / "gateway.log") as process, stage.people():
        version = stage.version(1, liked=0.95)
        victims: list[Callable[[], object]] = [
            stage.kill_controller,
            lambda: stage.kill_worker(process.pid),
            lambda: stage.restart_vllm(version),
            stage.restart_redis,
        ]
        for place, verb in enumerate(STEPS[1:5]):
            eventually(lambda wanted=place + 2: len(stage.verbs()) >= wanted, 60)
            assert stage.verbs()[place + 1] == verb
            victims[(first + place) % 4]()
        eventually(lambda: stage.verbs() == STEPS, 60)
        eventually(lambda: Registry(stage.store).aliases(ROUTE) == {"champion": version}, 10)
        served = stage.models[version]
        eventually(lambda: stage.models[version] > served + 20, 20)
    assert set(stage.told) - {"200", "cut", "502", "nobody"} == set(), stage.told
    assert stage.told["cut"] <= 12, stage.told  # what was in the killed worker's hands
    assert stage.told["502"] <= 6, stage.told  # and in those of the only replica when it was restarted
    journal = Journal(stage.journal_path)
    assert [one.verb for one in journal.decisions(ROUTE)] == STEPS
    journal.close()


@pytest.mark.timeout(240)
def test_a_worse_version_is_rolled_back_though_its_controller_is_killed(stage: Stage) -> None:
    with gateway(stage.config, stage.url, stage.folder / "gateway.log"), stage.people():
        version = stage.version(1, liked=0.02)
        eventually(lambda: "start" in stage.verbs(), 30)
        stage.kill_controller()
        eventually(lambda: "rollback" in stage.verbs(), 120)
        stage.kill_controller()
        eventually(lambda: stage.verbs()[-2:] == ["rollback", "rolled_back"], 30)
        eventually(lambda: not any(row.get(version) for row in stage.store.snapshot(ROUTE).segments.values()), 15)  # type: ignore[union-attr]
        time.sleep(1.0)  # what was drawn before is answered
        served = stage.models[version]
        time.sleep(1.0)
        assert stage.models[version] == served
    registry = Registry(stage.store)
    assert registry.aliases(ROUTE) == {}
    assert "worse" in registry.tags(version)["quarantined"]
    assert set(stage.told) == {"200"}


@pytest.mark.timeout(240)
def test_an_operator_aborts_and_undoes_at_the_command_line(stage: Stage) -> None:
    def understudy(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "understudy", "rollout", *words, "--config", str(stage.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    with gateway(stage.config, stage.url, stage.folder / "gateway.log"), stage.people():
        first = stage.version(1, liked=0.6)
        eventually(lambda: "start" in stage.verbs(), 30)
        assert "running" in understudy("status").stdout
        assert understudy("pause", "--why", "lunch").returncode == 0
        assert "paused" in understudy("status").stdout
        promoted = understudy("promote")
        assert promoted.returncode == 0, promoted.stderr
        eventually(lambda: Registry(stage.store).aliases(ROUTE) == {"champion": first}, 10)
        second = stage.version(2, liked=0.6)
        eventually(lambda: "start" in stage.verbs(), 30)
        aborted = understudy("abort", "--why", "looks odd")
        assert "rolling back" in aborted.stdout, aborted.stderr
        assert "no controller" not in aborted.stdout
        eventually(lambda: stage.verbs()[-1] == "rolled_back", 10)
        again = understudy("promote")
        assert again.returncode == 1
        assert "rolled back" in again.stderr
        undone = understudy("undo", "--why", "users write letters")
        assert "the config's own arm is the champion again" in undone.stdout, undone.stderr
        eventually(lambda: stage.store.snapshot(ROUTE).versions == (), 10)  # type: ignore[union-attr]
        nothing = understudy("undo")
        assert (nothing.returncode, "nothing to undo" in nothing.stderr) == (1, True)
    tags = Registry(stage.store).tags
    assert "looks odd" in tags(second)["quarantined"]
    assert "users write letters" in tags(first)["quarantined"]
    assert set(stage.told) == {"200"}
