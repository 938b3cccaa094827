"""Datasets of planted preferences over the demo's questions: people prefer the right category to a hedge or a wrong.

Each example is one user's; the users of `held_out` say nothing in `train`. Of the answers that are not preferred two in
three are hedges, which the base gives itself, and one names a wrong category.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from learner import shards
from learner.examples import Example, Kind, example_id
from learner.hashes import base_hash
from learner.spec import Hyper, TrainSpec
from understudy.demo.tiny_model import HEDGES, ITEMS, Question, questions, right_answer

USERS = 40
HELD_OUT_USERS = 10
TINY = Hyper(
    learning_rate=1e-3, rank=16, alpha=32, batch=16, max_length=96, max_epochs=3, evaluate_every=10, patience=3
)


def pairs(count: int, seed: int = 0, flipped: float = 0.0) -> list[Example]:
    """So many pairs, a quarter of them held out; a share of either has its answers swapped, the rest is the same."""
    chance = random.Random(f"pairs-{seed}")
    found = []
    for n in range(count):
        question, user = chance.choice(questions()), f"u{n % USERS}"
        good, bad = question.answer, worse(question, chance)
        held_out = n % USERS < HELD_OUT_USERS
        chosen, rejected = (bad, good) if chance.random() < flipped else (good, bad)
        found.append(example("pair", question, user, held_out, chosen, rejected, reason="comparison"))
    return found


def corrections(count: int, seed: int = 0) -> list[Example]:
    chance = random.Random(f"corrections-{seed}")
    asked = [chance.choice(questions()) for _ in range(count)]
    return [example("correction", q, f"u{n % USERS}", False, q.answer, None, "correction") for n, q in enumerate(asked)]


def unpaired(count: int, seed: int = 0) -> list[Example]:
    """Wanted and unwanted answers in turn."""
    chance = random.Random(f"unpaired-{seed}")
    found = []
    for n in range(count):
        question, user = chance.choice(questions()), f"u{n // 2 % USERS}"
        wanted = (question.answer, None) if n % 2 else (None, worse(question, chance))
        found.append(example("unpaired", question, user, n // 2 % USERS < HELD_OUT_USERS, *wanted, reason="votes"))
    return found


def worse(question: Question, chance: random.Random) -> str:
    if chance.random() < 2 / 3:
        return chance.choice(HEDGES)
    wrong = [category for category, items in ITEMS.items() if question.item not in items]
    return right_answer(question.item, chance.choice(wrong))


def example(
    kind: Kind, question: Question, user: str, held_out: bool, chosen: str | None, rejected: str | None, reason: str
) -> Example:
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    return Example(
        id=example_id(kind, messages, chosen, rejected), kind=kind, messages=messages, reason=reason, chosen=chosen,
        rejected=rejected, user=user, split="held_out" if held_out else "train",
    )  # fmt: skip


def dataset(folder: Path, found: Iterable[Example]) -> Path:
    """The examples as a dataset's folder."""
    folder.mkdir(parents=True)
    written = shards.write(folder, found, "jsonl", 10_000)
    shards.write_manifest(folder, {"shards": [shard._asdict() for shard in written]})
    return folder


def spec(base: Path, data: Path, output: Path, hyper: Hyper = TINY, **more: Any) -> TrainSpec:
    return TrainSpec(
        base=str(base), base_hash=base_hash(base), dataset=str(data), dataset_hash=shards.manifest_hash(data),
        output=str(output), hyper=hyper, **more,
    )  # fmt: skip
