"""Stands in for `learner.train`, without a model: what it does, its spec's `run_name` says.

It has no imports but the standard library's, so that it runs under any Python. Files beside the output steer it and
tell of it: `starts` has a line for each start, `hold` keeps it at work for as long as it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    work = Path(spec["output"] + ".work")
    before = read(work / "starts")
    with (work / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    say(event="begin", arguments=sys.argv[2:], others=[pid for pid in before if is_alive(pid)], env=dict(os.environ))
    print("a line that is no event")
    print(f"{spec['run_name']} it is", file=sys.stderr, flush=True)
    match spec["run_name"]:
        case "raises":
            raise ValueError("the base is another one now")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leaves nothing":
            return
        case "slow to end":
            signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.4), sys.exit(1)))
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (work / "child").write_text(str(child.pid))
    while (work / "hold").exists():
        (work / "held").touch()
        time.sleep(0.02)
    leave(Path(spec["output"]))
    say(event="end")


def leave(output: Path) -> None:
    """An artifact, whole at once. The hash is `learner.hashes.folder_hash` of one file."""
    body = b"weights"
    line = f"adapter_model.safetensors\0{hashlib.sha256(body).hexdigest()}\n"
    result = {"folder": str(output), "adapter_hash": hashlib.sha256(line.encode()).hexdigest(), "metrics": {"x": 1.0}}
    beside = output.with_name(f".{output.name}.new")
    (beside / "adapter").mkdir(parents=True)
    (beside / "adapter" / "adapter_model.safetensors").write_bytes(body)
    (beside / "result.json").write_text(json.dumps(result))
    beside.rename(output)


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def read(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    """A zombie is not: in a container nobody may reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
