"""What PEFT answers with an adapter, greedily: asked of the trainer in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from learner.spec import TrainingFailed

MODULE = "learner.train"
Generate = Callable[[str, str | None, list[list[dict[str, Any]]], int], list[dict[str, Any]]]
"""(base, adapter or None, prompts, most tokens) → {"prompt_ids", "token_ids", "text"} of each answer."""


def peft(python: str | None = None, threads: int = 2, limit: float = 1800.0) -> Generate:
    """Answers by `PYTHON -m learner.train --generate`. Raises TrainingFailed with what it said last."""

    def generate(
        base: str, adapter: str | None, prompts: list[list[dict[str, Any]]], most: int
    ) -> list[dict[str, Any]]:
        question = {"base": base, "adapter": adapter, "prompts": prompts, "max_tokens": most, "threads": threads}
        command = [python or sys.executable, "-m", MODULE, "--generate"]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                command, input=json.dumps(question), capture_output=True, text=True, timeout=limit, env=env
            )
        except subprocess.TimeoutExpired:
            raise TrainingFailed(f"{base} did not answer {len(prompts)} prompts in {limit:g} s") from None
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
            raise TrainingFailed(f"{' '.join(command[1:])} ended with {done.returncode}: {last}")
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["answers"]
        return found

    return generate
