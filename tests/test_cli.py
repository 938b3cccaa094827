"""The command line, as a person or a script uses it."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from fake_vllm import FakeVllm

from router.arms import Cell
from router.store import Change
from router.store_sqlite import SqliteStore
from telemetry.events import Answerer, Interaction, Signal
from telemetry.journal import Journal
from understudy.cli import main

GOOD = """\
state: sqlite:///{folder}/understudy.db
routes:
  assistant:
    upstreams: [{url}]
    arms: {{champion: {{model: base}}, challenger: {{model: good}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "understudy.yaml"
    path.write_text(GOOD.format(folder=tmp_path, url="http://127.0.0.1:9"))
    return path


def test_wrong_usage_exits_2_and_says_where_the_help_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["nothing"], ["replay"], ["config"], ["arms", "--nothing"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert "--help" in capsys.readouterr().err


def test_config_check_names_line_key_and_the_nearest_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "--config", str(config)]) == 0
    config.write_text(config.read_text().replace("upstreams", "upstream"))
    assert main(["config", "check", "--config", str(config)]) == 1
    assert f'{config}:4: routes.assistant.upstream: unknown key; did you mean "upstreams"?' in capsys.readouterr().out
    assert main(["config", "check", "--config", str(config), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["line"] == 4


def test_a_missing_config_is_said_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.yaml")
    for words in (
        ["serve"],
        ["status"],
        ["arms"],
        ["config", "check"],
        ["config", "explain"],
        ["keys", "list"],
        ["doctor"],
        ["rebuild"],
    ):
        assert main([*words, "--config", missing]) == 1
        said = capsys.readouterr()
        assert "none.yaml" in said.out + said.err


def test_config_explain_shows_every_key_and_hides_secrets(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text().replace("[http://127.0.0.1:9]", "[{url: http://127.0.0.1:9, api_key: hush}]")
    config.write_text(text)
    assert main(["config", "explain", "--config", str(config), "--json"]) == 0
    out = capsys.readouterr().out
    assert "hush" not in out
    found = json.loads(out)
    assert {"key", "value", "meaning", "source"} == set(found["keys"][0])
    better, _, worse = found["new_arm"][0]["forecasts"]
    assert better["shares"][-1] > worse["shares"][-1]
    assert main(["config", "explain", "--sessions", "20", "--config", str(config)]) == 0
    assert "share of one more arm, if 20 sessions a day are judged" in capsys.readouterr().out


def test_config_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["routes"]


def test_status_and_arms_work_before_anything_was_served(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["controller"]["alive"] is False
    assert main(["arms", "--config", str(config), "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)
    assert [arm["arm"] for arm in arms] == ["champion", "challenger"]
    assert all(arm["interval"][0] < arm["mean"] < arm["interval"][1] for arm in arms)
    assert main(["arms", "--config", str(config)]) == 0
    assert "champion" in capsys.readouterr().out


def test_rebuild_finds_a_store_that_differs_from_its_journal_and_mends_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Journal(tmp_path / "understudy.db")) as journal:
        for n in range(3):
            answered = Interaction(f"e{n}", 1e9, f"r{n}", "assistant", "t", f"s{n}", Answerer("champion", "base"))
            journal.append([answered, Signal(f"v{n}", 1e9, "thumb", "t", response_id=f"r{n}", value=1.0)])
    assert main(["rebuild", "--json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["facts_waiting"] == 6, "no controller has come to them yet"
    assert main(["rebuild", "--write", "--config", str(config)]) == 0
    with closing(SqliteStore(tmp_path / "understudy.db")) as store:
        lease = store.lease("bug", 60.0, time.time())
        assert lease
        store.apply("assistant", [Change("1:t/s1", 99, {})], lease.token)
        store.release("bug")
    capsys.readouterr()
    assert main(["rebuild", "--config", str(config)]) == 1
    assert "differs" in capsys.readouterr().out
    assert main(["rebuild", "--write", "--json", "--config", str(config)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["routes"] == [{"route": "assistant", "sessions": 3.0, "largest_difference": 0.0, "same": True}]
    assert main(["rebuild", "--config", str(config)]) == 0
    store = SqliteStore(tmp_path / "understudy.db")
    store.lease("someone", 60.0, time.time())
    assert main(["rebuild", "--write", "--config", str(config)]) == 1
    assert "someone is at work: stop `understudy serve` first" in capsys.readouterr().err
    assert store.sums("assistant")[Cell("", "champion", int(1e9 // 3600 * 3600))].n == 3.0
    store.close()


def test_keys_are_made_listed_and_revoked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--tenant", "acme", "--config", str(config), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["keys", "list", "--config", str(config), "--json"]) == 0
    listed = capsys.readouterr().out
    assert made["key"] not in listed
    assert json.loads(listed)[0]["tenant"] == "acme"
    assert main(["keys", "revoke", made["id"], "--config", str(config)]) == 0
    assert main(["keys", "revoke", "key_none", "--config", str(config)]) == 1


def test_doctor_finds_what_is_wrong(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", str(config)]) == 1
    with FakeVllm(["base"]) as fake:
        config.write_text(GOOD.format(folder=tmp_path, url=fake.url))
        assert main(["doctor", "--config", str(config), "--json"]) == 1
        out = capsys.readouterr().out
        assert "does not serve good" in out
    with FakeVllm(["base", "good"]) as fake:
        config.write_text(GOOD.format(folder=tmp_path, url=fake.url))
        assert main(["doctor", "--config", str(config)]) == 0


def test_replay_says_which_line_is_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = tmp_path / "r.jsonl"
    recording.write_text('{"user": 1, "messages": []}\n{"user": 1}\n')
    assert main(["replay", str(recording), "--route", "assistant"]) == 1
    assert "r.jsonl:2:" in capsys.readouterr().err


def test_serve_says_that_the_port_is_taken(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeVllm(["base"]) as fake:
        config.write_text(f"listen: {{port: {fake.port}}}\n" + config.read_text())
        assert main(["serve", "--config", str(config)]) == 1
        assert f"cannot listen on 127.0.0.1:{fake.port}" in capsys.readouterr().err
