"""`kubectl` and `sky` for tests: a program on PATH that writes down what it is asked and really runs the job.

    python fake_cluster.py STATE kubectl|sky …

STATE is a folder. `calls` has a line of JSON for each call. `trouble` holds how many calls fail from now on. A job is a
folder `jobs/NAME`: what was applied, the pid, and the exit code once it has ended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

STATE, PROGRAM, *WORDS = [Path(sys.argv[1]), *sys.argv[2:]] if len(sys.argv) > 2 else [Path(), ""]


def install(state: Path, programs: Path) -> None:
    """Put `kubectl`, `sky`, and a `python` for their jobs, into folder `programs`."""
    (state / "jobs").mkdir(parents=True)
    programs.mkdir()
    for name in ("kubectl", "sky"):
        script(programs / name, f"{sys.executable} {Path(__file__).resolve()} {state} {name}")
    script(programs / "python", sys.executable)


def script(path: Path, command: str) -> None:
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)


def main() -> None:
    with (STATE / "calls").open("a") as calls:
        calls.write(json.dumps([PROGRAM, *WORDS]) + "\n")
    trouble = STATE / "trouble"
    if trouble.exists() and (left := int(trouble.read_text())) > 0:
        trouble.write_text(str(left - 1))
        sys.exit("Warning: look out\nThe connection to the server was refused")
    (kubectl if PROGRAM == "kubectl" else sky)()


def kubectl() -> None:
    words = [word for word in WORDS[2:] if word != "--ignore-not-found=true"]  # after --namespace NAME
    match words:
        case ["get", "job", name, "-o", "json"]:
            if job(name).exists():
                print(json.dumps({"kind": "Job", "status": job_status(name)}))
        case ["apply", "-f", "-"]:
            manifest = json.load(sys.stdin)
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            env = {one["name"]: one["value"] for one in container["env"]}
            start(manifest["metadata"]["name"], manifest, container["command"], env)
        case ["delete", "job", name, "--wait=true"]:
            shutil.rmtree(job(name))
        case ["logs", of, "--tail=20"]:
            print((job(of.removeprefix("job/")) / "log").read_text(), end="")
        case _:
            sys.exit(f"error: unknown command {words}")


def job_status(name: str) -> dict[str, Any]:
    match code(name):
        case None:
            return {"active": 1, "ready": 1}
        case 0:
            return {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
    why = {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}
    return {"failed": 1, "conditions": [{"type": "Failed", "status": "True", **why}]}


def sky() -> None:
    match WORDS:
        case ["jobs", "queue", "--all", "--verbose", "--output", "json"]:
            print(json.dumps([record(number, path.name) for number, path in enumerate(jobs())], indent=2))
        case ["jobs", "launch", "--name", name, "--yes", "--detach-run", path]:
            task = yaml.safe_load(Path(path).read_text())
            start(f"{len(jobs())}.{name}", task, ["sh", "-c", task["run"]], task["envs"])
        case ["jobs", "logs", "--no-follow", "--name", name]:
            print((max(path for path in jobs() if path.name.endswith(name)) / "log").read_text(), end="")
        case _:
            sys.exit(f"Error: No such command {WORDS}")


def record(number: int, name: str) -> dict[str, Any]:
    status = {None: "RUNNING", 0: "SUCCEEDED"}.get(code(name), "FAILED")
    reason = "the job failed" if status == "FAILED" else None
    return {"job_id": number, "job_name": name.partition(".")[2], "status": status, "failure_reason": reason}


def start(name: str, asked: dict[str, Any], command: list[str], env: dict[str, str]) -> None:
    job(name).mkdir()
    (job(name) / "asked").write_text(json.dumps(asked))
    (job(name) / "env").write_text(json.dumps(env))
    with (job(name) / "log").open("w") as log:
        subprocess.Popen(
            ["sh", "-c", '"$@"; echo $? > "$0.new"; mv "$0.new" "$0"', str(job(name) / "code"), *command],
            env=os.environ | env,
            cwd=STATE,  # not in the checkout, whose `learner` would come first
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


def code(name: str) -> int | None:
    path = job(name) / "code"
    return int(path.read_text()) if path.exists() else None


def job(name: str) -> Path:
    return STATE / "jobs" / name


def jobs() -> list[Path]:
    return sorted((STATE / "jobs").iterdir())


if __name__ == "__main__":
    main()
