"""Training elsewhere: what Kubernetes and SkyPilot are asked for, and how their answers are read.

`kubectl` and `sky` are hand-written programs on PATH that really run the job, with a stand-in for the trainer.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cluster
import pytest
from pydantic import ValidationError
from stand_in import leave, read

from learner import plan
from learner.clusters import (
    KubernetesJob,
    SkyPilot,
    State,
    job_manifest,
    job_name,
    job_state,
    planned,
    require_below,
    sky_state,
    sky_task,
    wait,
)
from learner.runners import Local, work_of
from learner.spec import Artifact, TrainingFailed, TrainSpec

TESTS = Path(__file__).resolve().parent
Cluster = KubernetesJob | SkyPilot


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state of `kubectl` and `sky`, on PATH; jobs find the stand-in as `learner.train`."""
    fake_cluster.install(tmp_path / "state", tmp_path / "programs")
    (tmp_path / "code" / "learner").mkdir(parents=True)
    (tmp_path / "code" / "learner" / "__init__.py").touch()
    shutil.copy(TESTS / "stand_in.py", tmp_path / "code" / "learner" / "train.py")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    return tmp_path / "state"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The learner's, shared with the jobs."""
    (tmp_path / "learner").mkdir()
    return tmp_path / "learner"


@pytest.fixture(params=["kubernetes", "skypilot"])
def cluster(request: pytest.FixtureRequest, state: Path, folder: Path) -> Cluster:
    return kubernetes(folder) if request.param == "kubernetes" else skypilot(folder)


def kubernetes(folder: Path, **more: Any) -> KubernetesJob:
    return KubernetesJob(image="train:1", volume="claim", mount=str(folder), pause=0.02, patience=0.5, **more)


def skypilot(folder: Path, **more: Any) -> SkyPilot:
    return SkyPilot(storage="s3://bucket/learner", mount=str(folder), pause=0.02, patience=0.5, **more)


def spec_in(folder: Path, run_name: str = "good", **more: Any) -> TrainSpec:
    names = {"base": "hub/name", "dataset": str(folder / "dataset"), "output": str(folder / "run"), **more}
    return TrainSpec(base_hash="b", dataset_hash="d", run_name=run_name, **names)


def patient(cluster: Cluster) -> Cluster:
    """As on a slow machine, where a call takes longer than the others' patience."""
    return type(cluster)(**{name: getattr(cluster, name) for name in cluster.__struct_fields__} | {"patience": 30.0})


def run(cluster: Cluster, spec: TrainSpec) -> tuple[Artifact, list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []
    return cluster.run(spec, said.append), said


def calls(state: Path, *words: str) -> list[list[str]]:
    """The calls that have all of these words."""
    every = [json.loads(line) for line in (state / "calls").read_text().splitlines()]
    return [call for call in every if set(words) <= set(call)]


def started(state: Path) -> int:
    return len(calls(state, "apply")) + len(calls(state, "launch"))


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_runs_and_its_artifact_is_read(cluster: Cluster, state: Path, folder: Path) -> None:
    spec = spec_in(folder, threads=3)
    artifact, said = run(cluster, spec)
    assert (artifact.folder, artifact.metrics) == (spec.output, {"x": 1.0})
    phases = [event["phase"] for event in said if event["event"] == "job"]
    assert list(dict.fromkeys(phases)) in (["at work", "done"], ["done"])
    (job,) = (state / "jobs").iterdir()
    assert json.loads((job / "env").read_text())["OMP_NUM_THREADS"] == "3"
    assert run(cluster, spec) == (artifact, [])
    assert started(state) == 1


def test_events_of_a_kubernetes_job_come_through_the_shared_folder(state: Path, folder: Path) -> None:
    _, said = run(kubernetes(folder), spec_in(folder))
    assert [event["event"] for event in said if event["event"] != "job"] == ["begin", "end"]
    (job,) = (state / "jobs").iterdir()
    assert (job / "log").read_text() == "good it is\n"


def test_a_second_start_finds_the_first_ones_job_and_waits_for_it(cluster: Cluster, state: Path, folder: Path) -> None:
    spec = spec_in(folder)
    work_of(spec).mkdir()
    hold = work_of(spec) / "hold"
    hold.touch()
    first: list[Artifact] = []
    thread = threading.Thread(target=lambda: first.append(run(cluster, spec)[0]))
    thread.start()
    until((work_of(spec) / "held").exists)
    phases = []

    def say(event: dict[str, Any]) -> None:
        if event["event"] == "job":
            phases.append(event["phase"])
            hold.unlink(missing_ok=True)

    second = cluster.run(spec, say)
    thread.join()
    assert [second] == first
    assert phases == ["at work", "done"]
    assert started(state) == len(read(work_of(spec) / "starts")) == 1


def test_a_job_that_fails_is_quoted_and_a_new_run_starts_it_anew(cluster: Cluster, state: Path, folder: Path) -> None:
    spec = spec_in(folder, "raises")
    message = r"job understudy-\w{16} failed \((Back|FAILED).*\): ValueError: the base is another one now"
    for starts in (1, 2):
        with pytest.raises(TrainingFailed, match=message):
            run(cluster, spec)
        assert started(state) == starts


def test_an_artifact_that_arrives_after_its_job_is_done_is_waited_for(cluster: Cluster, folder: Path) -> None:
    spec = spec_in(folder, "leaves nothing")
    thread = threading.Thread(target=lambda: (time.sleep(0.4), leave(Path(spec.output))))
    thread.start()
    assert run(patient(cluster), spec)[0].folder == spec.output
    thread.join()


def test_a_job_that_is_done_and_left_nothing_is_given_up(cluster: Cluster, folder: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"training ended well but left no .*result\.json"):
        run(cluster, spec_in(folder, "leaves nothing"))


def test_a_cluster_that_does_not_answer_for_a_while_is_asked_again(cluster: Cluster, state: Path, folder: Path) -> None:
    spec = spec_in(folder)
    work_of(spec).mkdir()
    hold = work_of(spec) / "hold"
    hold.touch()

    def trouble() -> None:
        until((work_of(spec) / "held").exists)
        (state / "trouble").write_text("2")
        until(lambda: (state / "trouble").read_text() == "0")
        hold.unlink()

    thread = threading.Thread(target=trouble)
    thread.start()
    assert run(patient(cluster), spec)[0].folder == spec.output
    thread.join()


def test_a_cluster_that_does_not_answer_any_more_is_given_up(cluster: Cluster, state: Path, folder: Path) -> None:
    spec = spec_in(folder)
    work_of(spec).mkdir()
    hold = work_of(spec) / "hold"
    hold.touch()

    def trouble() -> None:
        until((work_of(spec) / "held").exists)
        (state / "trouble").write_text("1000000")

    thread = threading.Thread(target=trouble)
    thread.start()
    with pytest.raises(TrainingFailed, match=r"nothing was heard of job .* for 0.5 s: .* The connection .* refused"):
        run(cluster, spec)
    thread.join()
    hold.unlink()
    until(Path(spec.output).exists)


class Scripted:
    """A cluster whose job is at work for longer than its patience, and which then does not answer once."""

    mount, pause, patience = "/", 0.01, 0.2

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.silent = False

    def look(self, name: str) -> State:
        if time.monotonic() - self.begin < 0.4:
            return State("at work", "1 running")
        if not self.silent:
            self.silent = True
            raise TrainingFailed("the connection was refused")
        return State("done", "")

    def start(self, spec: TrainSpec, before: State) -> None:
        raise AssertionError("it is there already")

    def last_words(self, name: str) -> str:
        return ""


def test_patience_counts_from_the_last_answer_not_from_the_start(folder: Path) -> None:
    spec = spec_in(folder)
    leave(Path(spec.output))
    cluster = Scripted()
    assert wait(cluster, spec, lambda event: None).folder == spec.output
    assert cluster.silent


def test_without_the_program_on_path_it_is_named(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    name = "kubectl" if isinstance(cluster, KubernetesJob) else "sky"
    with pytest.raises(TrainingFailed, match=f"`{name}` is not on PATH"):
        run(cluster, spec_in(folder))


@pytest.mark.parametrize("key", ["base", "dataset", "output", "start"])
def test_a_path_that_the_job_cannot_see_is_refused(tmp_path: Path, folder: Path, key: str) -> None:
    require_below(str(folder), spec_in(folder))
    for path in (tmp_path / "elsewhere", folder / ".." / "elsewhere"):
        with pytest.raises(TrainingFailed, match=f"{key} .* is not below {folder}"):
            require_below(str(folder), spec_in(folder, **{key: str(path)}))


def test_a_jobs_name_is_its_specs_and_a_dns_label(folder: Path) -> None:
    assert job_name(spec_in(folder)) == job_name(spec_in(folder))
    assert job_name(spec_in(folder)) != job_name(spec_in(folder, seed=1))
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job_name(spec_in(folder)))


def test_the_manifest_has_what_was_configured_and_nothing_else() -> None:
    spec = spec_in(Path("/learner"))
    plain = job_manifest(KubernetesJob(image="train:1", volume="claim", mount="/learner"), spec)
    pod = plain["spec"]["template"]["spec"]
    assert set(pod) == {"restartPolicy", "automountServiceAccountToken", "containers", "volumes"}
    assert pod["containers"][0]["resources"] == {}
    assert pod["containers"][0]["command"][3:] == [
        *("/learner/run.work/events.jsonl", "python", "-m", "learner.train", "/learner/run.work/spec.json", "--events"),
    ]
    assert pod["volumes"][0] == {"name": "learner", "persistentVolumeClaim": {"claimName": "claim"}}
    full = job_manifest(
        KubernetesJob(
            image="train:1",
            volume="claim",
            mount="/learner",
            namespace="ml",
            gpus=2,
            node_selector={"pool": "gpu"},
            service_account="trainer",
            secret="tokens",
            retries=3,
            hours=0.5,
        ),
        spec,
    )
    pod, container = full["spec"]["template"]["spec"], full["spec"]["template"]["spec"]["containers"][0]
    assert (pod["nodeSelector"], pod["serviceAccountName"]) == ({"pool": "gpu"}, "trainer")
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert container["command"][4:10] == ["accelerate", "launch", "--num_processes", "2", "-m", "learner.train"]
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert (full["metadata"]["namespace"], full["spec"]["backoffLimit"]) == ("ml", 3)
    assert full["spec"]["activeDeadlineSeconds"] == 1800


def test_kubectl_is_told_namespace_and_context(state: Path, folder: Path) -> None:
    cluster = kubernetes(folder, namespace="ml", context="staging")
    with pytest.raises(TrainingFailed, match="unknown command"):  # the program for tests knows no contexts
        run(cluster, spec_in(folder))
    assert calls(state)[0][:5] == ["kubectl", "--namespace", "ml", "--context", "staging"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, State("at work", "waiting")),
        ({"active": 1, "failed": 1}, State("at work", "1 running, 1 failed")),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, State("at work", "waiting")),
        ({"conditions": [{"type": "FailureTarget", "status": "True"}], "active": 1}, State("at work", "1 running")),
        ({"conditions": [{"type": "Failed", "status": "False"}], "active": 1}, State("at work", "1 running")),
        ({"conditions": [{"type": "Complete", "status": "True", "reason": "Reached"}]}, State("done", "Reached")),
        (
            {"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}]},
            State("failed", "DeadlineExceeded: too long"),
        ),
    ],
)
def test_a_jobs_status_is_read(status: dict[str, Any], expected: State) -> None:
    assert job_state({"status": status}) == expected


def test_a_task_mounts_a_bucket_or_a_volume_and_sets_up_where_there_is_no_image() -> None:
    spec = spec_in(Path("/learner"))
    plain = sky_task(SkyPilot(storage="gs://bucket", mount="/learner"), spec)
    assert plain["resources"] == {"use_spot": False, "job_recovery": {"max_restarts_on_errors": 1}}
    assert plain["file_mounts"] == {"/learner": {"source": "gs://bucket", "mode": "MOUNT_CACHED"}}
    assert plain["run"] == "python -m learner.train /learner/run.work/spec.json --events"
    assert "understudy[learner]" in plain["setup"]
    full = sky_task(
        SkyPilot(storage="disk", mount="/learner", accelerators="H100:1", infra="k8s", image="docker:o/train:1"),
        spec,
    )
    assert full["resources"]["infra"] == "k8s"
    assert full["volumes"] == {"/learner": "disk"}
    assert {"setup", "file_mounts"} & set(full) == set()


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        ("PENDING", "at work"),
        ("RECOVERING", "at work"),
        ("CANCELLING", "at work"),
        ("CANCELLED", "failed"),
        ("FAILED_NO_RESOURCE", "failed"),
        ("SUCCEEDED", "done"),
    ],
)
def test_of_several_managed_jobs_of_a_name_the_newest_counts(status: str, phase: str) -> None:
    queue = [
        {"job_id": 7, "job_name": "mine", "status": status},
        {"job_id": 3, "job_name": "mine", "status": "FAILED"},
        {"job_id": 9, "job_name": "other", "status": "RUNNING"},
    ]
    assert sky_state(queue, "mine").phase == phase
    assert sky_state(queue, "nobody's").phase == "absent"


def test_the_config_says_which_runner(folder: Path) -> None:
    assert planned(plan.Runner(), folder) == Local()
    assert planned(plan.Runner(python=Path("/venv/bin/python")), folder) == Local(python="/venv/bin/python")
    kubernetes = planned(plan.Runner(kind="kubernetes", image="train:1", volume="claim", gpus=2), folder)
    assert kubernetes == KubernetesJob(image="train:1", volume="claim", mount=str(folder), gpus=2)
    sky = planned(plan.Runner(kind="skypilot", volume="s3://b", accelerators="H100:1", cloud="aws"), folder)
    assert sky == SkyPilot(storage="s3://b", mount=str(folder), accelerators="H100:1", infra="aws")
    for kind in ("skypilot", "kubernetes"):
        with pytest.raises(ValidationError, match=f"is needed where kind is {kind}"):
            plan.Runner(kind=kind, image="train:1")
