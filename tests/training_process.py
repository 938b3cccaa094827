"""A process that has torch loaded and does what tests ask of it: loading takes seconds and is in the way of others.

process = TrainingProcess()
done = process.do("train", spec=str(path))      → Done(result, events), or raises Failed with what was said
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Done(NamedTuple):
    result: Any
    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


class Failed(Exception):
    """What was asked for raised this."""

    def __init__(self, said: str, events: list[dict[str, Any]]) -> None:
        super().__init__(said)
        self.events = events


class TrainingProcess:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self._lock = threading.Lock()

    def do(self, what: str, **words: Any) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"what": what, **words}) + "\n")
            self._process.stdin.flush()
            events = []
            for line in self._process.stdout:
                said = json.loads(line)
                if "failed" in said:
                    raise Failed(said["failed"], events)
                if "result" in said:
                    return Done(said["result"], events)
                events.append(said)
        raise AssertionError(f"the training process ended with {self._process.wait()}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()


class Crash(BaseException):
    """Ends a run in its tracks, as far as that can be done from within."""


def train(say: Any, spec: str, crash_at: int = 0, memory: int = 0, file_size: int = 0) -> Any:
    """Run a spec; end it after the step `crash_at`; give it so many MiB of memory more, or files of so many bytes."""
    import msgspec

    from learner.job import limit_memory
    from learner.spec import load
    from learner.train import run

    def heard(event: dict[str, Any]) -> None:
        say(event)
        if crash_at and event["event"] == "step" and event["step"] >= crash_at:
            raise Crash(f"crashed at step {event['step']}")

    with limits():
        if memory:
            limit_memory(memory)
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        return msgspec.to_builtins(run(load(Path(spec)), heard))


def losses(say: Any, hyper: dict[str, Any], logps: Any, reference: Any, tokens: Any, pairs: Any) -> Any:
    import msgspec
    import torch

    from learner import lora
    from learner.spec import Hyper

    numbers = (torch.tensor(values, dtype=torch.float64) for values in (logps, reference, tokens))
    return lora.losses(msgspec.convert(hyper, Hyper), *numbers, torch.tensor(pairs)).tolist()


def rows(say: Any, base: str, examples: list[dict[str, Any]], lower: bool = False, **words: Any) -> Any:
    """The rows of examples and what was left out; `lower` by a tokenizer that loses capitals."""
    import msgspec
    from tokenizers import normalizers

    from learner import lora
    from learner.examples import Example
    from learner.rows import encode, ends_of

    tokenizer = lora.tokenizer_of(Path(base))
    if lower:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    if "template" in words:
        tokenizer.chat_template = words["template"]
    found = msgspec.convert(examples, list[Example])
    encoded, left_out = encode(
        found, words.get("method", "dpo"), tokenizer, ends_of(Path(base), tokenizer), words.get("max_length", 96)
    )
    texts = [[tokenizer.decode(ids) for ids in (row.prompt, row.chosen, row.rejected)] for row in encoded]
    return {"texts": texts, "left_out": left_out}


def main_said(say: Any, words: list[str], stdin: str = "") -> Any:
    """What `python -m learner.train` says to these words, and its exit code."""
    from learner.train import main

    out, err = io.StringIO(), io.StringIO()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    finally:
        sys.stdin = before
    return {"code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Soft limits as they were, afterwards."""
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)
    before = [resource.getrlimit(kind) for kind in kinds]
    try:
        yield
    finally:
        for kind, limit in zip(kinds, before, strict=True):
            resource.setrlimit(kind, limit)


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr

    def say(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=out, flush=True)

    sys.path.insert(0, str(ROOT))
    for line in sys.stdin:
        words = json.loads(line)
        try:
            say({"result": globals()[words.pop("what")](say, **words)})
        except (Exception, Crash) as error:
            say({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
