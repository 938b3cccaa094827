"""The benchmarks run and say what they should. Their numbers are not looked at: machines differ."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH / script), *words], capture_output=True, text=True, timeout=120)


def test_gateway_load_judges_every_bar_and_says_what_is_not_installed() -> None:
    done = run(
        "gateway_load.py",
        "--quick",
        "--json",
        "--vllm-router",
        "/nowhere/vllm-router",
        "--only",
        "direct,understudy,vllm-router",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == 0, found["reasons"]
    assert "vllm-router" in found["not_installed"]
    bars = {part: [bar for bar in found["bars"] if bar["part"] == part] for part in found["parts"]}
    assert {part: len(of) for part, of in bars.items()} == {
        "cpu": 4, "latency": 3, "streams": 3, "flat": 5, "state": 3, "start": 2,
    }  # fmt: skip
    assert not [bar for bar in bars["cpu"] if bar["value"] is not None], "nobody was there to compare with"
    measured = [bar for part in ("latency", "streams", "flat", "start") for bar in bars[part]]
    assert not [bar for bar in measured if bar["met"] is None]
    for shape in found["parts"]["cpu"]["understudy"]["shapes"].values():
        assert shape["cpu_us"]["total"] >= shape["cpu_us"]["worker"]


def test_gateway_load_loses_no_stream_when_the_gateway_is_told_to_stop() -> None:
    done = run("gateway_load.py", "--quick", "--json", "--parts", "streams")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["parts"]["streams"]
    assert found["drain"]["lost"] == 0
    assert found["late_ms"]["p99"] > 0


def test_gateway_load_prints_the_table_of_its_bars() -> None:
    done = run("gateway_load.py", "--quick", "--parts", "start")
    assert done.returncode == 0, done.stderr
    assert "| start | ready after" in done.stdout
    assert "--parts start" in done.stdout


def test_gateway_load_refuses_what_it_does_not_know() -> None:
    done = run("gateway_load.py", "--only", "direct,nothing")
    assert done.returncode == 2
    assert "nothing is none of" in done.stderr


def test_routing_replay_says_how_far_each_bar_is_met(tmp_path: Path) -> None:
    data = tmp_path / "rewards.jsonl"
    rows = ({"arms": {"a": {"reward": 0.2}, "b": {"reward": 0.9 - n % 3 / 10}}} for n in range(120))
    data.write_text("\n".join(map(json.dumps, rows)))
    done = run("routing_replay.py", str(data), "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    scenarios = found["scenarios"]
    assert scenarios["thompson"]["mean_regret"] < scenarios["uniform"]["mean_regret"]
    assert {"what", "value", "bar", "met"} == set(found["bars"][0])


def test_routing_replay_names_a_bad_line(tmp_path: Path) -> None:
    data = tmp_path / "rewards.jsonl"
    data.write_text('{"arms": {"a": {"reward": 1}}}\n{"arms": 1}\n')
    done = run("routing_replay.py", str(data))
    assert done.returncode == 1
    assert f"{data}:2:" in done.stderr


def test_rollback_simulation_reports_rates_with_their_errors_and_medians_beside_their_bars() -> None:
    done = run("rollback_simulation.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["runs"] > 0
    assert found["seconds"] > 0
    for one in found["false_rollback"].values():
        for rate in filter(None, (one["ours"], one["naive"])):
            assert 0 <= rate["rate"] <= 1
            assert 0 <= rate["standard_error"] <= 1
    assert any(one["naive"] for one in found["false_rollback"].values())
    assert {one["bar"] for one in found["caught"].values()} == {1100, 3600}
    assert all({"median", "low", "high"} <= set(one) for one in found["caught"].values())


def test_ope_coverage_says_how_far_each_bar_is_met(tmp_path: Path) -> None:
    data = tmp_path / "rewards.jsonl"
    rows = (
        {"source": "ab"[n % 2], "arms": {"x": {"reward": n % 3 / 2}, "y": {"reward": n % 5 / 4}, "z": {"reward": 0.3}}}
        for n in range(300)
    )
    data.write_text("\n".join(map(json.dumps, rows)))
    done = run("ope_coverage.py", str(data), "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["logged_by"] for row in found["pairs"]} == {"adaptive", "skewed"}
    assert {row["target"] for row in found["pairs"]} == {"only x", "only y", "only z", "even", "by_source"}
    assert all(row["answered"] + row["refused"] == found["data"]["runs"] for row in found["pairs"])
    assert {"what", "value", "se", "bar", "met"} == set(found["bars"][0])


def test_ope_coverage_names_a_bad_line(tmp_path: Path) -> None:
    data = tmp_path / "rewards.jsonl"
    data.write_text('{"arms": {"a": {"reward": 1}, "b": {"reward": 0}}}\n{"arms": {"a": {"reward": 1}}}\n')
    done = run("ope_coverage.py", str(data))
    assert done.returncode == 1
    assert f"{data}:2:" in done.stderr


def test_router_cost_says_how_far_each_bar_is_met() -> None:
    done = run("router_cost.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {bar["what"].split(",")[0].split(" ")[0] for bar in found["bars"]} == {"choose", "recompute", "refresh"}
    assert all(bar["value"] > 0 for bar in found["bars"])


def test_segments_says_what_clusters_earn(tmp_path: Path) -> None:
    data = tmp_path / "rewards.jsonl"
    topics = {
        "code": ["python", "list", "loop", "class", "error", "string", "compile", "return", "import", "function"],
        "cook": ["oven", "flour", "butter", "bake", "sauce", "onion", "garlic", "simmer", "dish", "recipe"],
    }
    chance, rows = random.Random(0), []
    for n in range(900):
        about = "code" if n % 2 else "cook"
        text = " ".join(chance.sample(topics[about], 5))
        rewards = {"a": {"reward": float(n % 2)}, "b": {"reward": 1.0 - n % 2}}
        rows.append({"prompt": text, "source": about, "arms": rewards})
    data.write_text("\n".join(map(json.dumps, rows)))
    done = run("segments.py", str(data), "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["mean_reward"]
    assert found["none"] < 0.7 < found["sources"]
    assert found["none"] < found["clusters"] <= 1.0


def test_telemetry_cost_says_how_far_each_bar_is_met() -> None:
    done = run("telemetry_cost.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["detection"]["requests"] == 300
    assert found["detection"]["signals"] > 30, "each third conversation holds a complaint"
    assert found["span"]["dropped"] == 0
    assert all(row["met"] in (True, False) for row in found["bars"])


def test_dataset_build_measures_a_build_and_holds_what_must_hold_at_any_size() -> None:
    done = run("dataset_build.py", "--events", "2000", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["examples"] > 100
    assert found["same_bytes"] is True
    assert not any(found["straddling"].values())
    assert found["goldens_kept_out"] == 50


def test_gate_planted_refuses_the_bad_and_says_how_far_each_bar_is_met() -> None:
    done = run("gate_planted.py", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["fault"] for row in found["bad"]} >= {"verbose", "collapsed", "sycophantic", "slow"}
    assert not [row for row in found["bad"] if row["verdict"] == "pass" or row["at_300"] == "pass"]
    assert sum(row["verdict"] == "fail" for row in found["bad"]) >= 10
    assert found["judge_down"]["inconclusive"] == 1.0
    assert {"what", "value", "bar", "met"} == set(found["bars"][0])


def test_gate_planted_compares_the_tests() -> None:
    done = run("gate_planted.py", "--tests", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["tests"]
    assert max(row["halves"] for row in rows) < max(row["student"] for row in rows)


@pytest.mark.parametrize("script", ["learner_quality.py", "learner_speed.py", "learner_kills.py", "learner_poison.py"])
def test_benches_of_the_training_say_what_they_measure(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
