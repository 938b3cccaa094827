"""`understudy dataset`, `learn` and `lineage`: what they print, and what they say to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversations import asked, journal
from test_dataset import chats

from understudy.cli import main

CONFIG = """\
state: sqlite:///{folder}/understudy.db
capture: {{retention: 3650d}}
routes:
  assistant:
    upstreams: [http://127.0.0.1:9]
    arms: {{champion: {{model: base}}}}
    learner: {{base: {folder}/base, folder: {folder}/learner, min_pairs: 1000000, negative_rate: 0.9,
              dataset: {{held_out: 0.2}}}}
  other:
    upstreams: [http://127.0.0.1:9]
    arms: {{champion: {{model: base}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "understudy.yaml"
    file.write_text(CONFIG.format(folder=tmp_path))
    journal(tmp_path / "understudy.db", chats()).close()
    return file


def run(config: Path, *words: str) -> int:
    return main([*words, "--config", str(config)])


def built(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(config, "dataset", "build", "--route", "assistant", "--json", *words) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_build_says_what_is_kept_and_what_each_filter_dropped(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = config.with_name("policy.yaml")
    policy.write_text("answer_chars: [50, 1000]\nheld_out: 0.2\n")
    assert run(config, "dataset", "build", "--route", "assistant", "--policy", str(policy)) == 0
    out = capsys.readouterr().out
    assert "train:" in out
    assert "length: too short or too long" in out


def test_show_lists_examples_and_leads_one_back_to_its_facts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = built(config, capsys)["folder"]
    assert run(config, "dataset", "show", folder, "--json") == 0
    example = json.loads(capsys.readouterr().out)["examples"][0]
    assert run(config, "dataset", "show", folder, example["id"][:10], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {fact["event_id"] for fact in found["facts"]} == set(example["events"])
    assert run(config, "dataset", "show", folder, example["id"][:10]) == 0
    assert "signal thumb by" in capsys.readouterr().out


def test_reading_an_example_is_put_on_record(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from telemetry.journal import Journal

    folder = built(config, capsys)["folder"]
    assert run(config, "dataset", "show", folder, "0") in (0, 1)
    assert run(config, "dataset", "show", folder) == 0
    assert run(config, "dataset", "export", folder, "--to", "huggingface", "--out", str(config.with_name("out"))) == 0
    reads = Journal(config.with_name("understudy.db")).reads()
    name = Path(folder).name
    assert [what for _, _, what in reads] == ["example 0", f"dataset {name}", f"export of dataset {name}"]


@pytest.mark.parametrize("format", ["huggingface", "argilla", "label-studio"])
def test_export_writes_another_tools_format(config: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    folder, out = built(config, capsys)["folder"], config.with_name("export")
    assert run(config, "dataset", "export", folder, "--to", format, "--out", str(out)) == 0
    assert any(out.rglob("*.json*"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["dataset", "build"], 2, "--route must be one of assistant, other"),
        (["dataset", "build", "--route", "none"], 2, "--route must be one of"),
        (["dataset", "show", "nowhere"], 1, "is no dataset"),
        (["learn", "once", "--route", "other"], 1, "route other has no learner"),
        (["lineage", "nothing", "--route", "assistant"], 1, "'nothing' is no version, dataset, example or answer"),
        (["learn", "reproduce", "assistant-v1-00000000", "--out", "x", "--route", "assistant"], 1, "no version"),
        (["learn", "drop", "--route", "assistant"], 1, "there is nothing to drop"),
    ],
)
def test_bad_input_is_said(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str
) -> None:
    try:
        found = run(config, *words)
    except SystemExit as left:
        found = int(str(left.code))
    assert found == code
    assert says in capsys.readouterr().err


def test_a_bad_policy_is_named_by_line_and_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = config.with_name("policy.yaml")
    policy.write_text("held_out: 0.2\nuser_shares: 0.01\n")
    assert run(config, "dataset", "build", "--route", "assistant", "--policy", str(policy)) == 1
    assert 'policy.yaml:2: user_shares: unknown key; did you mean "user_share"?' in capsys.readouterr().err


def test_nothing_due_is_no_failure(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "learn", "once", "--route", "assistant") == 0
    assert "999940 more new pairs are needed" in " ".join(capsys.readouterr().out.split())
    assert run(config, "learn", "status", "--route", "assistant") == 0
    assert "no version is registered yet" in capsys.readouterr().out


def test_a_round_that_failed_says_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "learn", "once", "--route", "assistant", "--force") == 1
    assert "is no folder here" in capsys.readouterr().err
    assert run(config, "learn", "status", "--route", "assistant", "--json") == 0
    assert json.loads(capsys.readouterr().out)["round"]["step"] == "failed"


def test_an_empty_journal_fails_with_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "understudy.yaml"
    file.write_text(CONFIG.format(folder=tmp_path))
    journal(tmp_path / "understudy.db", [asked("What?", "x")]).close()
    assert run(file, "dataset", "build", "--route", "assistant") == 1
    assert "nobody voted" in capsys.readouterr().err
    assert not list((tmp_path / "learner" / "datasets").glob("*"))
