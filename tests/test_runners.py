"""A run in a process of its own: what it is given, what is read of it, and that two never write to one output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_in import is_alive, leave, read

from learner.runners import Local, work_of
from learner.spec import Artifact, TrainingFailed, TrainSpec, save

TESTS = Path(__file__).resolve().parent
RUNNER = """
import sys
from pathlib import Path
from learner.runners import Local
from learner.spec import load
Local(module="stand_in").run(load(Path(sys.argv[1])), lambda event: None)
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent}")


def spec_in(folder: Path, run_name: str = "good", **more: Any) -> TrainSpec:
    return TrainSpec(
        base="hub/name",
        base_hash="b",
        dataset=str(folder / "dataset"),
        dataset_hash="d",
        output=str(folder / "run"),
        run_name=run_name,
        **more,
    )


def run(spec: TrainSpec, runner: Local | None = None) -> tuple[Artifact, list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []
    return (runner or Local(module="stand_in")).run(spec, said.append), said


def until(true: Callable[[], object], within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def held(spec: TrainSpec) -> Path:
    """A file that keeps the stand-in at work."""
    work_of(spec).mkdir(parents=True)
    hold = work_of(spec) / "hold"
    hold.touch()
    return hold


def test_events_are_said_the_rest_is_logged_and_the_artifact_is_read(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    artifact, said = run(spec)
    assert (artifact.folder, artifact.metrics) == (spec.output, {"x": 1.0})
    assert artifact.adapter.joinpath("adapter_model.safetensors").read_bytes() == b"weights"
    assert [event["event"] for event in said] == ["begin", "end"]
    assert said[0]["arguments"] == ["--events"]
    assert (work_of(spec) / "train.log").read_text() == "good it is\n"
    assert (work_of(spec) / "train.out").read_text() == "a line that is no event\n"


def test_threads_and_the_hash_seed_are_set_before_the_trainer_starts(tmp_path: Path) -> None:
    _, said = run(spec_in(tmp_path, threads=3, seed=-1))
    env = said[0]["env"]
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("3", "3")
    assert env["PYTHONHASHSEED"] == str(2**32 - 1)


def test_the_trainer_runs_under_the_python_that_is_named(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nWHICH=other exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    _, said = run(spec_in(tmp_path), Local(python=str(other), module="stand_in"))
    assert said[0]["env"]["WHICH"] == "other"


def test_an_artifact_that_is_whole_is_returned_without_a_run_wherever_it_was_made(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    leave(tmp_path / "made elsewhere")
    (tmp_path / "made elsewhere").rename(spec.output)
    artifact, said = run(spec, Local(module="no_such_module"))
    assert (artifact.folder, said) == (spec.output, [])


def test_an_adapter_that_was_changed_since_is_refused(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    artifact, _ = run(spec)
    (artifact.adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(TrainingFailed, match=r"is not the adapter that .*result.json is about"):
        run(spec)


@pytest.mark.parametrize("body", ["{", '{"folder": "x"}'])
def test_a_result_that_cannot_be_read_is_said(tmp_path: Path, body: str) -> None:
    spec = spec_in(tmp_path)
    Path(spec.output).mkdir()
    (Path(spec.output) / "result.json").write_text(body)
    with pytest.raises(TrainingFailed, match=r"result.json cannot be read as an artifact .* move .* away"):
        run(spec)


def test_a_trainer_that_fails_is_quoted_with_its_last_line_of_this_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"exit code 1: ValueError: the base is another one now; see .*train.log"):
        run(spec_in(tmp_path, "raises"))
    with pytest.raises(TrainingFailed, match=r"killed by SIGKILL .*its last line was: killed it is"):
        run(spec_in(tmp_path, "killed"))
    with pytest.raises(TrainingFailed, match=r"left no .*result.json"):
        run(spec_in(tmp_path, "leaves nothing"))
    assert "ValueError" in (work_of(spec_in(tmp_path)) / "train.log").read_text()


def test_a_trainer_that_says_nothing_is_not_quoted_with_what_another_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="ValueError"):
        run(spec_in(tmp_path, "raises"))
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(0o755)
    with pytest.raises(TrainingFailed, match="exit code 3: it said nothing"):
        run(spec_in(tmp_path), Local(python=str(silent)))


def test_a_python_without_the_trainer_is_said_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"No module named no_such_module \(install understudy\[learner\] for"):
        run(spec_in(tmp_path), Local(module="no_such_module"))


def test_a_killed_runner_takes_its_trainer_along_and_the_next_run_waits_for_that(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, "slow to end")
    hold = held(spec)
    save(spec, tmp_path / "spec.json")
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path / "spec.json")])
    until((work_of(spec) / "held").exists)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    (trainer,) = read(work_of(spec) / "starts")
    (child,) = read(work_of(spec) / "child")
    assert is_alive(trainer)
    threading.Thread(target=lambda: (until(lambda: not is_alive(trainer)), hold.unlink())).start()
    _, said = run(spec)
    assert said[0]["others"] == []
    assert len(read(work_of(spec) / "starts")) == 2
    until(lambda: not is_alive(child))


def test_a_trainer_that_outlives_its_guard_too_is_waited_for(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    hold = held(spec)
    save(spec, tmp_path / "spec.json")
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path / "spec.json")])
    until((work_of(spec) / "held").exists)
    (trainer,) = read(work_of(spec) / "starts")
    guard = int(Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(runner.pid, signal.SIGSTOP)  # it must not end the trainer in its stead
    os.kill(guard, signal.SIGKILL)
    runner.kill()
    runner.wait()
    with pytest.raises(TrainingFailed, match="another run is at work"):
        run(spec, Local(module="stand_in", patience=0.3))
    hold.unlink()
    assert run(spec)[0].folder == spec.output
    assert read(work_of(spec) / "starts") == [trainer]


def test_a_run_of_the_same_waits_and_takes_what_the_first_one_made(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    hold = held(spec)
    first: list[Artifact] = []
    thread = threading.Thread(target=lambda: first.append(run(spec)[0]))
    thread.start()
    until((work_of(spec) / "held").exists)
    with pytest.raises(TrainingFailed, match=r"another run is at work in .*run.work; wait until it is done, or end it"):
        run(spec, Local(module="stand_in", patience=0.2))
    threading.Timer(0.2, hold.unlink).start()
    second, said = run(spec)
    thread.join()
    assert [second] == first
    assert said == []
    assert len(read(work_of(spec) / "starts")) == 1


def test_a_listener_that_fails_ends_the_trainer(tmp_path: Path) -> None:
    spec = spec_in(tmp_path)
    held(spec)

    def fail(event: dict[str, Any]) -> None:
        raise OSError(json.dumps(event)[:9])

    with pytest.raises(OSError, match=r"event"):
        Local(module="stand_in").run(spec, fail)
    assert not [pid for pid in read(work_of(spec) / "starts") if is_alive(pid)]
    (work_of(spec) / "hold").unlink()
    assert run(spec, Local(module="stand_in", patience=0.0))[0].folder == spec.output
