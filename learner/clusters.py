"""Training on machines elsewhere: a Kubernetes Job, or a managed job of SkyPilot.

Both are told what to run through their own command line, `kubectl` and `sky`, and both see the learner's folder under
the path that it has here: a shared volume, or a bucket that is mounted here too. A job is named after its spec. So a
second start finds the first one's job and waits for it, and a job that outlives its runner is not lost.

Formats: the Job API, batch/v1 (pod failure policies since 1.31), and the "SkyPilot YAML" of SkyPilot 0.14.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from learner.plan import Runner as Plan
from learner.runners import (
    Local,
    Runner,
    Say,
    environment,
    event_of,
    found,
    last_line,
    train_command,
    whole,
    work_of,
    write,
)
from learner.spec import Artifact, TrainingFailed, TrainingInterrupted, TrainSpec


class KubernetesJob(msgspec.Struct, frozen=True, kw_only=True):
    """A Job, through `kubectl`. The claim is mounted in the pod where `mount` is here."""

    image: str
    """With `understudy[learner]` installed."""
    volume: str
    """Name of the volume claim that holds the learner's folder."""
    mount: str
    """Path of that volume, here and in the pod."""
    namespace: str = "default"
    context: str = ""
    """Of kubectl's config; its current one where none is named."""
    gpus: int = 0
    node_selector: dict[str, str] = {}
    service_account: str = ""
    secret: str = ""
    """Name of a Secret whose keys become environment variables: `HF_TOKEN`, `WANDB_API_KEY`."""
    retries: int = 1
    """Pods that may fail before the Job does; those that the cluster itself stops do not count."""
    hours: float = 24.0
    """Longest time that it may take."""
    pause: float = 10.0
    """Seconds between looks."""
    patience: float = 600.0
    """Seconds without an answer from the cluster, or the artifact of a job that is done, until it is given up."""

    def run(self, spec: TrainSpec, say: Say) -> Artifact:
        return run_elsewhere(self, spec, say)

    def look(self, name: str) -> State:
        there = self._kubectl("get", "job", name, "--ignore-not-found=true", "-o", "json")
        return job_state(json.loads(there)) if there.strip() else ABSENT

    def start(self, spec: TrainSpec, before: State) -> None:
        if before.phase in ("done", "failed"):  # it left no artifact, and is in the way of a new try
            self._kubectl("delete", "job", job_name(spec), "--ignore-not-found=true", "--wait=true")
        self._kubectl("apply", "-f", "-", body=json.dumps(job_manifest(self, spec)))

    def last_words(self, name: str) -> str:
        return self._kubectl("logs", f"job/{name}", "--tail=20")

    def _kubectl(self, *words: str, body: str | None = None) -> str:
        where = ["--namespace", self.namespace, *(["--context", self.context] if self.context else [])]
        return ask("kubectl", *where, *words, body=body)


class SkyPilot(msgspec.Struct, frozen=True, kw_only=True):
    """A managed job of SkyPilot (`sky jobs launch`), which is started again where its machine is taken away.

    Not `sky launch`: what that starts is neither recovered nor found again by name.
    """

    storage: str
    """Bucket (`s3://…`, `gs://…`) or SkyPilot volume that holds the learner's folder."""
    mount: str
    """Where it is mounted, here and in the job."""
    accelerators: str | None = None
    """Such as `H100:1`."""
    infra: str | None = None
    """`aws`, `gcp/us-central1`, `k8s`, …; the cheapest where none is named."""
    use_spot: bool = False
    image: str | None = None
    """Such as `docker:ORG/IMAGE:TAG`, with `understudy[learner]` installed; else `setup` installs it."""
    setup: str = "pip install 'understudy[learner]'"
    retries: int = 1
    """New tries after an error of the trainer; recoveries do not count."""
    pause: float = 30.0
    """Seconds between looks."""
    patience: float = 600.0
    """Seconds without an answer from SkyPilot, or the artifact of a job that is done, until it is given up."""

    def run(self, spec: TrainSpec, say: Say) -> Artifact:
        return run_elsewhere(self, spec, say)

    def look(self, name: str) -> State:
        said = ask("sky", "jobs", "queue", "--all", "--verbose", "--output", "json")
        return sky_state(json.loads(said[said.find("[") :] or "[]"), name)

    def start(self, spec: TrainSpec, before: State) -> None:
        import yaml

        task = work_of(spec) / "task.yaml"
        task.write_text(yaml.safe_dump(sky_task(self, spec), sort_keys=False), encoding="utf-8")
        ask("sky", "jobs", "launch", "--name", job_name(spec), "--yes", "--detach-run", str(task), limit=1800.0)

    def last_words(self, name: str) -> str:
        return ask("sky", "jobs", "logs", "--no-follow", "--name", name)


class Cluster(Protocol):
    """What runs jobs elsewhere."""

    @property
    def mount(self) -> str: ...
    @property
    def pause(self) -> float: ...
    @property
    def patience(self) -> float: ...
    def look(self, name: str) -> State: ...
    def start(self, spec: TrainSpec, before: State) -> None: ...
    def last_words(self, name: str) -> str: ...


def planned(plan: Plan, folder: Path) -> Runner:
    """The runner that the config asks for. `folder` is the learner's."""
    if plan.kind == "local":
        return Local(None if plan.python is None else str(plan.python))
    mount = str(folder.resolve())
    if plan.kind == "kubernetes":
        return KubernetesJob(
            image=plan.image or "", volume=plan.volume or "", mount=mount, namespace=plan.namespace, gpus=plan.gpus
        )
    return SkyPilot(
        storage=plan.volume or "", mount=mount, accelerators=plan.accelerators, infra=plan.cloud, image=plan.image
    )


class State(NamedTuple):
    """How a job stands."""

    phase: Literal["absent", "at work", "done", "failed"]
    detail: str


ABSENT: Final = State("absent", "it is not there")


# What is asked for, and how it stands. Pure.


def job_name(spec: TrainSpec) -> str:
    """The same for the same spec, and a DNS label."""
    body = msgspec.json.encode(spec, order="deterministic")
    return f"understudy-{hashlib.sha256(body).hexdigest()[:16]}"


def require_below(mount: str, spec: TrainSpec) -> None:
    """Raises TrainingFailed where a path of `spec` means nothing on the machine of the job."""
    paths = {"dataset": spec.dataset, "output": spec.output}
    if Path(spec.base).is_absolute() or Path(spec.base).exists():  # else it is a hub name
        paths["base"] = spec.base
    if spec.start is not None:
        paths["start"] = spec.start
    for key, path in paths.items():
        if not Path(os.path.normpath(path)).is_relative_to(mount):
            raise TrainingFailed(f"{key} {path} is not below {mount}, all that a job elsewhere can see; move it there")


def job_manifest(job: KubernetesJob, spec: TrainSpec) -> dict[str, Any]:
    """A batch/v1 Job. Events go to a file on the volume, since a Job's own log ends with its pod."""
    labels = {"app.kubernetes.io/name": "understudy", "app.kubernetes.io/component": "learner"}
    launcher = ["accelerate", "launch", "--num_processes", str(job.gpus)] if job.gpus > 1 else ["python"]
    command = train_command(spec, launcher)
    container: dict[str, Any] = {
        "name": "train",
        "image": job.image,
        "command": ["sh", "-c", 'exec "$@" >> "$0"', str(work_of(spec) / "events.jsonl"), *command],
        "env": [{"name": name, "value": value} for name, value in environment(spec).items()],
        "resources": {"limits": {"nvidia.com/gpu": job.gpus}} if job.gpus else {},
        "volumeMounts": [{"name": "learner", "mountPath": job.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if job.secret:
        container["envFrom"] = [{"secretRef": {"name": job.secret}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [
            {"name": "learner", "persistentVolumeClaim": {"claimName": job.volume}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # PyTorch's workers need more than 64 MB
        ],
    }
    if job.node_selector:
        pod["nodeSelector"] = job.node_selector
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(spec), "namespace": job.namespace, "labels": labels},
        "spec": {
            "backoffLimit": job.retries,
            "activeDeadlineSeconds": round(job.hours * 3600),
            "ttlSecondsAfterFinished": 7 * 86400,
            "podReplacementPolicy": "Failed",  # never two that write
            "podFailurePolicy": {
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def job_state(job: dict[str, Any]) -> State:
    """From what `kubectl get job -o json` prints."""
    status = job.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["status"] == "True" and condition["type"] in ("Complete", "Failed"):
            why = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
            return State("done" if condition["type"] == "Complete" else "failed", why)
    counts = {"running": status.get("active", 0), "failed": status.get("failed", 0)}
    return State("at work", ", ".join(f"{number} {what}" for what, number in counts.items() if number) or "waiting")


def sky_task(job: SkyPilot, spec: TrainSpec) -> dict[str, Any]:
    """A task as "SkyPilot YAML". Buckets are cached: the other mode knows neither appending nor renaming."""
    resources = {
        "infra": job.infra,
        "accelerators": job.accelerators,
        "image_id": job.image,
        "use_spot": job.use_spot,
        "job_recovery": {"max_restarts_on_errors": job.retries},
    }
    task: dict[str, Any] = {
        "name": job_name(spec),
        "resources": {name: value for name, value in resources.items() if value is not None},
        "envs": environment(spec),
    }
    if "://" in job.storage:
        task["file_mounts"] = {job.mount: {"source": job.storage, "mode": "MOUNT_CACHED"}}
    else:
        task["volumes"] = {job.mount: job.storage}
    if job.setup and not job.image:
        task["setup"] = job.setup
    return task | {"run": shlex.join(train_command(spec))}


def sky_state(queue: list[dict[str, Any]], name: str) -> State:
    """The newest job of that name, from what `sky jobs queue --output json` prints."""
    mine = [job for job in queue if job.get("job_name") == name]
    if not mine:
        return ABSENT
    newest = max(mine, key=lambda job: job["job_id"])
    status = str(newest["status"])
    detail = ": ".join(filter(None, (status, newest.get("failure_reason"))))
    if status == "SUCCEEDED":
        return State("done", detail)
    return State("failed" if status == "CANCELLED" or status.startswith("FAILED") else "at work", detail)


# At the edge.


def run_elsewhere(cluster: Cluster, spec: TrainSpec, say: Say) -> Artifact:
    if artifact := whole(spec.output):
        return artifact
    require_below(cluster.mount, spec)
    state = cluster.look(job_name(spec))
    if state.phase != "at work":
        write(spec)
        cluster.start(spec, state)
    return wait(cluster, spec, say)


def wait(cluster: Cluster, spec: TrainSpec, say: Say) -> Artifact:
    """Until the job has ended. Says its state when that changes, and its events where they come through the folder."""
    name, events = job_name(spec), work_of(spec) / "events.jsonl"
    known, read = ABSENT, events.stat().st_size if events.exists() else 0
    heard = time.monotonic()
    while True:
        state = look(cluster, name)
        read = tell(events, read, say)
        if state.phase != "absent" and state != known:
            known = state
            say({"event": "job", "name": name, **state._asdict()})
        if state.phase == "failed":
            raise TrainingFailed(f"job {name} failed ({state.detail}): {last_words(cluster, name)}")
        if state.phase == "at work":
            heard = time.monotonic()
        late = time.monotonic() - heard > cluster.patience
        if state.phase == "absent" and late:
            raise TrainingFailed(f"nothing was heard of job {name} for {cluster.patience:g} s: {state.detail}")
        if state.phase == "done":
            with nullcontext() if late else suppress(TrainingFailed):  # network folders cache, buckets upload
                return found(spec)
        time.sleep(cluster.pause)


def look(cluster: Cluster, name: str) -> State:
    try:
        return cluster.look(name)
    except TrainingFailed as error:
        return ABSENT._replace(detail=str(error))


def last_words(cluster: Cluster, name: str) -> str:
    try:
        return last_line(cluster.last_words(name))
    except TrainingFailed as error:
        return f"its log cannot be read: {error}"


def tell(events: Path, begin: int, say: Say) -> int:
    """Say the events that were written after byte `begin`; where the next ones begin."""
    try:
        with events.open("rb") as file:
            file.seek(begin)
            written = file.read()
    except FileNotFoundError:
        return begin
    ended = written[: written.rfind(b"\n") + 1]  # the last line may still be being written
    for line in ended.splitlines():
        if (event := event_of(line)) is not None:
            say(event)
    return begin + len(ended)


def ask(program: str, *words: str, body: str | None = None, limit: float = 120.0) -> str:
    """What a program prints. Raises TrainingFailed where it is not there, fails or does not end."""
    if (path := shutil.which(program)) is None:
        raise TrainingFailed(f"`{program}` is not on PATH, and this runner works through it; install it")
    try:
        done = subprocess.run([path, *words], input=body, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise TrainingInterrupted(f"`{program} {' '.join(words)}` did not end in {limit:g} s") from None
    if done.returncode:
        raise TrainingInterrupted(f"`{program} {' '.join(words)}` failed: {last_line(done.stderr or done.stdout)}")
    return done.stdout
