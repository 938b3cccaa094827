"""The learner end to end on real parts: feedback in a journal → a challenger that passed its gate, on a real vLLM."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conversations import asked, compared, journal, said

from learner.gate_report import read
from learner.registry import Registry
from learner.replica import Replica, listing, unload_adapter
from learner.rounds import last_round
from router.store_sqlite import SqliteStore
from telemetry.events import Fact
from understudy.demo import tiny_model
from understudy.demo.vllm_server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CONFIG = """\
state: sqlite:///{folder}/understudy.db
capture: {{retention: 3650d}}
routes:
  assistant:
    upstreams: [{url}]
    arms: {{champion: {{model: base}}}}
    learner:
      base: {base}
      folder: {folder}/learner
      min_pairs: 40
      min_interval: 0s
      dataset: {{window: 3650d, held_out: 0.3}}
      train: {{max_epochs: 2, evaluate_every: 5, max_length: 96}}
      gate:
        margins: {{preference: 0.3, refusals: 0.2, form: 0.2}}
        max_length_ratio: 3x
        max_slowdown: 9x
        temperature: 0.7
"""


def feedback(count: int = 240) -> Iterator[Fact]:
    """People compare, vote and correct: they prefer the right category to a hedge."""
    chance = random.Random(8)
    for n in range(count):
        question, user = chance.choice(tiny_model.questions()), f"u{n % 120}"
        good = asked(question.text, question.answer, user=user, session=f"s{n}", at=60.0 * n)
        bad = asked(question.text, chance.choice(tiny_model.HEDGES), user=user, session=f"s{n}", at=60.0 * n + 1)
        yield good
        match n % 3:
            case 0:
                yield from (bad, compared(good, bad))
            case 1:
                yield from (bad, said("thumb", good, 1.0), said("thumb", bad, 0.0))
            case _:
                yield from (bad, said("correction", bad, text=question.answer))


def understudy(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "understudy", *words, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def found(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def config(vllm: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("learning")
    file = folder / "understudy.yaml"
    file.write_text(CONFIG.format(folder=folder, url=vllm.url, base=vllm.models.base))
    journal(folder / "understudy.db", feedback()).close()
    yield file
    for name in set(listing(Replica(vllm.url)).adapters) - {"careful", "hasty"}:
        unload_adapter(Replica(vllm.url), name)


@pytest.fixture(scope="module")
def learned(config: Path) -> dict[str, Any]:
    """A round that was killed in its training, and again in its gate, and then gone on with."""
    command = [sys.executable, "-m", "understudy", "learn", "once", "--config", str(config)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    runs = config.parent / "learner" / "runs"
    deadline = time.monotonic() + 200
    while not list(runs.glob("*.work/training/*/step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    store = SqliteStore(config.parent / "understudy.db")
    while last_round(store, "assistant").step != "gate" and second.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert last_round(store, "assistant").step == "gate"
    return found(understudy(config, "learn", "once", "--json"))


def test_feedback_becomes_a_challenger_that_vllm_serves(
    learned: dict[str, Any], config: Path, vllm: VllmServer
) -> None:
    assert (learned["number"], learned["step"]) == (1, "done")
    assert "new pairs" in learned["reason"]
    name = learned["version"]
    assert name in listing(Replica(vllm.url)).adapters
    registry = Registry(SqliteStore(config.parent / "understudy.db"))
    assert registry.alias("assistant", "challenger") == name
    assert registry.version(name).served_hash == registry.version(name).adapter_hash
    assert registry.metrics(name)["held_out_accuracy"] > 0.8


def test_it_passed_its_gate_and_the_report_says_why(learned: dict[str, Any], config: Path) -> None:
    registry = Registry(SqliteStore(config.parent / "understudy.db"))
    assert registry.tags(learned["version"])["gate"] == "pass"
    assert registry.metrics(learned["version"])["gate_win rate"] > 0.5
    report = read(config.parent / "learner" / "gates" / learned["version"]).report
    assert report.verdict == "pass"
    assert report.main.users >= 20
    assert (config.parent / "learner" / "gates" / learned["version"] / "gate.html").is_file()
    again = understudy(config, "gate", "--json")
    assert (again.returncode, json.loads(again.stdout)["verdict"]) == (0, "pass"), again.stderr


def test_it_answers_as_people_prefer(learned: dict[str, Any], vllm: VllmServer) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{vllm.url}/v1", api_key="none")
    questions = random.Random(1).sample(tiny_model.questions(), 40)

    def is_right(model: str, n: int) -> bool:
        said = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": questions[n].text}],
            temperature=0.7,
            seed=n,
            max_tokens=24,
        )
        return tiny_model.is_good(questions[n], said.choices[0].message.content or "")

    with ThreadPoolExecutor(16) as pool:
        base, ours = (sum(pool.map(partial(is_right, model), range(40))) for model in ("base", learned["version"]))
    assert ours >= base + 4


def test_nothing_new_is_trained_while_it_waits(learned: dict[str, Any], config: Path) -> None:
    again = found(understudy(config, "learn", "once", "--force", "--json"))
    assert again["learned"] is False
    assert learned["version"] in again["waiting"]


def test_status_and_lineage_know_it(learned: dict[str, Any], config: Path) -> None:
    status = found(understudy(config, "learn", "status", "--json"))
    (version,) = status["versions"]
    assert version["aliases"] == ["challenger"]
    walked = found(understudy(config, "lineage", learned["version"], "--json"))
    assert walked["dataset"]["hash"] == version["dataset"]
    assert len(walked["examples"]) > 50
    shown = understudy(config, "lineage", walked["examples"][0]["id"])
    assert learned["version"] in shown.stdout
    explained = understudy(config, "dataset", "show", walked["dataset"]["folder"], walked["examples"][0]["id"])
    assert "chosen" in explained.stdout


def test_it_comes_out_the_same_to_the_bit_when_made_again(
    learned: dict[str, Any], config: Path, tmp_path: Path
) -> None:
    again = found(
        understudy(config, "learn", "reproduce", learned["version"], "--out", str(tmp_path / "again"), "--json")
    )
    assert again["same"] is True


def test_dropped_it_leaves_the_replica_and_stays_in_the_registry(
    learned: dict[str, Any], config: Path, vllm: VllmServer
) -> None:
    found(understudy(config, "learn", "drop", "--why", "only a test", "--json"))
    assert learned["version"] not in listing(Replica(vllm.url)).adapters
    (version,) = found(understudy(config, "learn", "status", "--json"))["versions"]
    assert (version["aliases"], version["tags"]["dropped"]) == ([], "only a test")
