"""The whole house on real parts: real vLLM, real Redis, two workers, the real openai client."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from redis_server import RedisServer

from router.controller import matured
from router.store_redis import RedisStore
from telemetry.events import Interaction, Signal
from telemetry.journal import Journal
from understudy import replay
from understudy.demo import tiny_model
from understudy.demo.story import gateway
from understudy.demo.vllm_server import VllmServer, free_port

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RECORDING = Path(__file__).parents[2] / "shared/data/conversations/realhumaneval_even.jsonl"


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class House:
    """A running `understudy serve` and what it left behind."""

    def __init__(self, folder: Path, vllm: str, redis: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.state = redis
        self.config = folder / "understudy.yaml"
        self.config.write_text(
            f"listen: {{port: {self.port}, workers: 2}}\n"
            f"state: {redis}\n"
            f"journal: {folder / 'journal.db'}\n"
            "routes:\n"
            "  assistant:\n"
            f"    upstreams: [{vllm}]\n"
            "    arms: {champion: {model: hasty}, challenger: {model: careful}}\n"
            "    policy: {kind: thompson, refresh: 500ms}\n"
            "    reward: {window: 1s}\n"
        )

    def serve(self) -> Any:
        return gateway(self.config, self.url, self.folder / "gateway.log")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="test", timeout=60)

    def facts(self) -> list[Any]:
        journal = Journal(self.folder / "journal.db")
        try:
            return [fact for _, fact in journal.read(0, 100_000)]
        finally:
            journal.close()

    def sums(self) -> Any:
        store = RedisStore(self.state)
        try:
            return store.sums("assistant")
        finally:
            store.close()

    def settled(self) -> bool:
        """The controller has counted all that is journaled, and the window of all signals is over."""
        journal, store = Journal(self.folder / "journal.db"), RedisStore(self.state)
        try:
            return store.marked("journal") == store.marked(matured(1.0)) == journal.last()
        finally:
            journal.close()
            store.close()


@pytest.fixture(scope="module")
def house(vllm: VllmServer, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"), vllm.url, redis.url)
    with house.serve():
        yield house


def eventually(what: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.05)


def live(client: openai.OpenAI, user: str, question: tiny_model.Question) -> str:
    """A simulated session; the model that served it."""
    headers = {"x-understudy-user": user, "x-understudy-session": user}
    served = ""
    for _ in range(2):
        answer = client.chat.completions.create(
            model="assistant",
            messages=[{"role": "user", "content": question.text}],
            temperature=0.7,
            extra_headers=headers,
        )
        served = served or answer.model
        if tiny_model.is_good(question, answer.choices[0].message.content or ""):
            feedback = {"response_id": answer.id, "kind": "copy", "user": user}
            client.post("/feedback", body=feedback, cast_to=dict[str, Any])
            break
    return served


def test_the_openai_client_gets_what_vllm_gives(house: House) -> None:
    question = tiny_model.questions()[0]
    messages: Any = [{"role": "user", "content": question.text}]
    with house.client() as client:
        assert [model.id for model in client.models.list()] == ["assistant"]
        answer = client.chat.completions.create(model="assistant", messages=messages, temperature=0)
        assert answer.choices[0].message.content
        assert answer.model in ("hasty", "careful")
        chunks = list(client.chat.completions.create(model="assistant", messages=messages, temperature=0, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
        usage = client.chat.completions.create(
            model="assistant", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        assert list(usage)[-1].usage
        tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
        assert client.chat.completions.create(model="assistant", messages=messages, tools=[tool]).id  # type: ignore[list-item]
        schema = {"type": "object", "properties": {"category": {"enum": ["fruit", "animal"]}}, "required": ["category"]}
        shaped = client.chat.completions.create(
            model="assistant",
            messages=messages,
            response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
        )
        assert "category" in json.loads(shaped.choices[0].message.content or "")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nothing", messages=messages)


def test_the_better_arm_wins_most_sessions_though_a_worker_is_killed(house: House) -> None:
    chance = random.Random(1)
    people = [(f"user-{n}", chance.choice(tiny_model.questions())) for n in range(400)]
    with house.client() as client, ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda person: live(client, *person), people[:200]))
        os.kill(worker_of(house), signal.SIGKILL)
        served += list(pool.map(lambda person: live(client, *person), people[200:]))
    late = Counter(served[-100:])
    assert late["careful"] / late.total() > 0.8, late
    eventually(house.settled)
    command = [sys.executable, "-m", "understudy", "rebuild", "--json", "--config", str(house.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["routes"][0]["sessions"] > 100


def worker_of(house: House) -> int:
    """The process id of a worker: a child of the supervisor that holds the port."""
    inodes = {
        line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if f":{house.port:04X} " in line
    }
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or b"spawn_main" not in (process / "cmdline").read_bytes():
            continue
        links = [os.readlink(fd) for fd in (process / "fd").iterdir() if fd.exists() or fd.is_symlink()]
        if any(f"socket:[{inode}]" in links for inode in inodes):
            return int(process.name)
    raise AssertionError("no worker holds the port")


def test_recorded_conversations_go_through_without_a_failure(house: House) -> None:
    if not RECORDING.exists():
        pytest.skip("the recorded conversations are not beside the project")
    rows = replay.read(RECORDING)
    tally = replay.play(rows, house.url, "assistant", as_fast=True, max_tokens=4)
    assert tally.failures == []
    assert tally.requests == len(rows)
    assert tally.unanswerable == sum(not row.messages for row in rows)  # a real vLLM refuses an empty conversation
    assert tally.signals["copy"] == sum(len(row.copies) for row in rows)


def test_a_restart_loses_nothing(vllm: VllmServer, redis: RedisServer, tmp_path: Path) -> None:
    house = House(tmp_path, vllm.url, f"{redis.url.rsplit('/', 1)[0]}/1")
    accepted: list[str] = []
    for round_ in range(2):
        with house.serve(), house.client() as client:
            for n in range(5):
                answer = client.chat.completions.create(
                    model="assistant",
                    messages=[{"role": "user", "content": f"Question {round_} {n}"}],
                    max_tokens=4,
                )
                vote = {"response_id": answer.id, "kind": "thumb", "value": n % 2 == 0}
                accepted += client.post("/feedback", body=vote, cast_to=dict[str, Any])["ids"]
            eventually(house.settled)
        before = house.sums()
        assert sum(sums.n for sums in before.values()) == 5 * (round_ + 1)
    facts = house.facts()
    assert [f.event_id for f in facts if isinstance(f, Signal)] == accepted
    assert sum(isinstance(f, Interaction) for f in facts) == 10
    assert house.sums() == before


def test_the_gateway_serves_while_redis_is_away(vllm: VllmServer, tmp_path: Path) -> None:
    with RedisServer() as redis:
        house = House(tmp_path, vllm.url, redis.url)
        with house.serve(), house.client() as client:
            ask = {"model": "assistant", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            answer = client.chat.completions.create(**ask)  # type: ignore[call-overload]
            redis.stop()
            answer = client.chat.completions.create(**ask)  # type: ignore[call-overload]
            vote = {"response_id": answer.id, "kind": "thumb", "value": True}
            client.post("/feedback", body=vote, cast_to=dict[str, Any])
            redis.start()
            eventually(lambda: sum(sums.n for sums in house.sums().values()) == 1)


def test_serve_says_what_is_wrong_with_redis(tmp_path: Path) -> None:
    house = House(tmp_path, "http://127.0.0.1:9", f"redis://127.0.0.1:{free_port()}/0")
    command = [sys.executable, "-m", "understudy", "serve", "--config", str(house.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Redis at" in done.stderr
    assert "Traceback" not in done.stderr
