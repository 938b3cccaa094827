"""What PEFT says with an adapter, greedily, and how likely it finds answers: asked of the trainer's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from learner.examples import Example
from learner.spec import TrainingFailed

MODULE = "learner.train"
Generate = Callable[[str, str | None, list[list[dict[str, Any]]], int], list[dict[str, Any]]]
"""(base, adapter or None, prompts, most tokens) → {"prompt_ids", "token_ids", "text"} of each answer."""
Score = Callable[[str, Sequence[str | None], Sequence[Example], int], list[list[dict[str, Any]]]]
"""(base, adapters or None, pairs, most tokens of one) → of each adapter, of each pair {"chosen", "rejected"} in nats a
token, or {"left_out"}: why."""


def peft(python: str | None = None, threads: int = 2, limit: float = 1800.0) -> Generate:
    """Answers by `PYTHON -m learner.train --generate`. Raises TrainingFailed with what it said last."""

    def generate(
        base: str, adapter: str | None, prompts: list[list[dict[str, Any]]], most: int
    ) -> list[dict[str, Any]]:
        question = {"base": base, "adapter": adapter, "prompts": prompts, "max_tokens": most, "threads": threads}
        words = f"{base} did not answer {len(prompts)} prompts"
        found: list[dict[str, Any]] = _asked("--generate", question, python, limit, words)["answers"]
        return found

    return generate


def peft_scores(python: str | None = None, threads: int = 2, limit: float = 3600.0) -> Score:
    """Log-probabilities by `PYTHON -m learner.train --score`. Raises TrainingFailed with what it said last."""

    def score(
        base: str, adapters: Sequence[str | None], pairs: Sequence[Example], most: int
    ) -> list[list[dict[str, Any]]]:
        question = {
            "base": base, "adapters": list(adapters), "examples": msgspec.to_builtins(list(pairs)),
            "max_length": most, "threads": threads,
        }  # fmt: skip
        words = f"{base} did not score {len(pairs)} pairs"
        found: list[list[dict[str, Any]]] = _asked("--score", question, python, limit, words)["scores"]
        return found

    return score


def _asked(mode: str, question: dict[str, Any], python: str | None, limit: float, late: str) -> dict[str, Any]:
    command = [python or sys.executable, "-m", MODULE, mode]
    env = os.environ | {"OMP_NUM_THREADS": str(question["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=limit, env=env
        )
    except subprocess.TimeoutExpired:
        raise TrainingFailed(f"{late} in {limit:g} s") from None
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise TrainingFailed(f"{' '.join(command[1:])} ended with {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
