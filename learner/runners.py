"""Where training runs: `run(spec) → artifact`. Here: a process of this machine; `learner.clusters` has the others.

An artifact that is already whole is returned without a run. One process at a time writes to an output: the trainer
itself holds a lock on `<output>.work`. Should its runner be killed, a guard ends it, and the next run waits for that.
(PR_SET_PDEATHSIG would reach the trainer but not what it started, and fires when a thread ends, not the process.)
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import msgspec

from learner import spec as specs
from learner.hashes import folder_hash
from learner.spec import Artifact, TrainingFailed, TrainingInterrupted, TrainSpec

Event = dict[str, Any]
Say = Callable[[Event], None]

MODULE: Final = "learner.train"
RETRY: Final = 75
"""Exit code of a trainer that met something which may pass, as a full disk (EX_TEMPFAIL of sysexits.h)."""

GUARD: Final = """
import os, signal, subprocess, sys, threading
lock, *command = sys.argv[1:]
child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[int(lock)], process_group=0)
def end(number):
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass
def when_the_runner_is_gone():
    while os.read(0, 4096):
        pass
    end(signal.SIGTERM)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        end(signal.SIGKILL)
threading.Thread(target=when_the_runner_is_gone, daemon=True).start()
code = child.wait()
end(signal.SIGKILL)
os._exit(code if code >= 0 else 128 - code)
"""
"""Parent of the trainer and of what it starts. The runner holds the other end of its stdin, and nobody else does."""


class Runner(Protocol):
    def run(self, spec: TrainSpec, say: Say) -> Artifact:
        """Train as `spec` says, and tell `say` each event. Raises TrainingFailed where no artifact comes of it."""
        ...


class Local(msgspec.Struct, frozen=True):
    """A process on this machine. Its stderr goes to `<output>.work/train.log`, what it prints besides events to
    `train.out`: libraries print at any time, and what it said last must be why it failed."""

    python: str | None = None
    """Python of a virtual environment with `understudy[learner]`; this one's where none is named."""
    module: str = MODULE
    patience: float = 30.0
    """Seconds to wait for another run that writes to the same output."""

    def run(self, spec: TrainSpec, say: Say) -> Artifact:
        if artifact := whole(spec.output):
            return artifact
        with locked(work_of(spec), self.patience) as lock:
            if artifact := whole(spec.output):  # the run that was waited for was the same
                return artifact
            write(spec)
            with (work_of(spec) / "train.log").open("ab") as log, (work_of(spec) / "train.out").open("ab") as out:
                begin = log.tell()
                code = self._train(spec, lock, log, out, say)
            if code:
                kind = TrainingInterrupted if code > 128 or code == RETRY else TrainingFailed
                raise kind(self._why(spec, code, begin))
        return found(spec)

    def _train(self, spec: TrainSpec, lock: BinaryIO, log: BinaryIO, out: BinaryIO, say: Say) -> int:
        command = train_command(spec, [self.python or sys.executable], self.module)
        guard = subprocess.Popen(
            [sys.executable, "-IS", "-c", GUARD, str(lock.fileno()), *command],
            env=os.environ | environment(spec),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
        with guard:  # however this is left, its stdin closes, and at that it ends what still runs
            for line in guard.stdout or ():
                if (event := event_of(line)) is None:
                    out.write(line)
                else:
                    say(event)
        return guard.returncode

    def _why(self, spec: TrainSpec, code: int, begin: int) -> str:
        log = work_of(spec) / "train.log"
        line = last_line(log.read_bytes()[begin:].decode(errors="replace") if log.exists() else "")
        if code > 128:
            name = signal.Signals(code - 128).name
            line = f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; its last line was: {line}"
        if f"No module named {self.module.partition('.')[0]}" in line:
            line += f" (install understudy[learner] for {self.python or sys.executable})"
        return f"training for {spec.output} ended with exit code {code}: {line}; see {log}"


def work_of(spec: TrainSpec) -> Path:
    return Path(f"{spec.output}.work")


def environment(spec: TrainSpec) -> dict[str, str]:
    """Environment variables of the trainer: those that must stand before it starts."""
    return {
        "PYTHONHASHSEED": str(spec.seed % 2**32),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(spec.threads),
        "MKL_NUM_THREADS": str(spec.threads),
    }


def train_command(spec: TrainSpec, launcher: Sequence[str] = ("python",), module: str = MODULE) -> list[str]:
    return [*launcher, "-m", module, str(work_of(spec) / "spec.json"), "--events"]


def whole(output: str) -> Artifact | None:
    """The artifact in folder `output`, which may have another path where it was made. TrainingFailed if broken."""
    path = Path(output) / "result.json"
    try:
        artifact = msgspec.json.decode(path.read_bytes(), type=Artifact)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        message = f"{path} cannot be read as an artifact ({error}); move {output} away, run again"
        raise TrainingFailed(message) from error
    artifact = msgspec.structs.replace(artifact, folder=output)
    if (there := folder_hash(artifact.adapter)) != artifact.adapter_hash:
        raise TrainingFailed(
            f"{artifact.adapter} is not the adapter that {path} is about (its hash is {there[:12]}…, "
            f"not {artifact.adapter_hash[:12]}…): it was changed since; move {output} away, run again"
        )
    return artifact


def found(spec: TrainSpec) -> Artifact:
    if artifact := whole(spec.output):
        return artifact
    raise TrainingFailed(f"training ended well but left no {spec.output}/result.json; see {work_of(spec)}")


def write(spec: TrainSpec) -> None:
    work_of(spec).mkdir(parents=True, exist_ok=True)
    specs.save(spec, work_of(spec) / "spec.json")


def locked(work: Path, patience: float) -> BinaryIO:
    """The open file of a lock on `work`. A process that inherits it holds the lock, too."""
    deadline = time.monotonic() + patience
    while True:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / "lock").open("ab")
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        file.close()
        if time.monotonic() > deadline:
            raise TrainingInterrupted(f"another run is at work in {work}; wait until it is done, or end it")
        time.sleep(0.1)


def event_of(line: bytes) -> Event | None:
    with suppress(msgspec.DecodeError):
        event = msgspec.json.decode(line)
        return event if isinstance(event, dict) else None
    return None


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
