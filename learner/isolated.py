"""What others wrote, run in a process of its own that can be ended: a regex, and the code of an answer with its test.

Python's `re` cannot be interrupted and may take for ever ("(a+)+$"), and so may code. Code has a folder of its own to
write in, no environment, limits on time, memory and files, no network where the kernel lets a user have a network of
their own (`unshare`), and an audit hook (PEP 578) that refuses sockets, processes, signals and writing elsewhere. That
stops accidents, not an attacker.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import NamedTuple

REGEX_SECONDS, CODE_SECONDS = 2.0, 10.0
CODE_MEMORY, CODE_WRITES = 512 * 2**20, 2**20
"""Bytes."""


class Verdict(NamedTuple):
    passed: bool | None
    """None where nobody could tell."""
    why: str


_SEARCH = "import json,re,sys; p,t=json.load(sys.stdin); sys.exit(0 if re.search(p,t) else 3)"

_RUN = """
import ctypes, json, os, resource, sys
asked = json.load(sys.stdin)
try:  # a user's own, empty network: CLONE_NEWUSER | CLONE_NEWNET
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
except (OSError, AttributeError):
    pass
for kind, most in asked["limits"].items():
    limit = getattr(resource, kind, None)
    if limit is not None:
        resource.setrlimit(limit, (most, most))
refused = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "ctypes.",
    "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.",
    "signal.", "pty.",
)
own, writing = os.path.realpath(os.getcwd()) + os.sep, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def hook(event, args):
    if event == "open":
        path, _, flags = args
        if not flags & writing or isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(own):
            return
    elif not event.startswith(refused):
        return
    raise PermissionError(event + " is not allowed here")
sys.addaudithook(hook)
names = {"__name__": "answer"}
for part in ("answer", "test"):
    try:
        exec(compile(asked[part], part, "exec"), names)
    except BaseException as error:
        print(f"\\n{part}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        sys.exit(4)
print("\\n" + asked["word"], flush=True)
"""


def matches(pattern: str, text: str, seconds: float = REGEX_SECONDS) -> Verdict:
    """Whether the regex is found in the text; None where that took too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH], input=json.dumps([pattern, text]).encode(),
            capture_output=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Verdict(None, f"the regex was not done in {seconds:g} s; write one that does not backtrack")
    if done.returncode not in (0, 3):
        return Verdict(None, f"the regex could not be run: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return Verdict(done.returncode == 0, "" if done.returncode == 0 else f"{pattern!r} does not match")


def run_code(code: str, test: str, seconds: float = CODE_SECONDS) -> Verdict:
    """Whether the test runs to its end after the code, in Python, in a process with limits."""
    word = secrets.token_hex(16)  # the answer's code may end the process well before the test was run
    limits = {
        "RLIMIT_CPU": int(seconds) + 1, "RLIMIT_AS": CODE_MEMORY, "RLIMIT_FSIZE": CODE_WRITES, "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
    }  # fmt: skip
    asked = json.dumps({"answer": code, "test": test, "word": word, "limits": limits})
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "said"), "w+b") as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _RUN], stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=folder,
            env={}, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(asked.encode("utf-8", "surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"it was not done in {seconds:g} s")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(max(0, said.tell() - 2000))
        lines = said.read().decode(errors="replace").split("\n")
    if process.returncode == 0 and word in lines:
        return Verdict(True, "")
    told = [line for line in lines if line.startswith(("answer: ", "test: "))]
    return Verdict(False, told[-1][:300] if told else f"it ended with {process.returncode} before the test was done")
