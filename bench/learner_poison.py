"""One loud user against everybody: what a tenth of all feedback from one of them does to what is trained.

    python bench/learner_poison.py [--seeds 3] [--json]

Users prefer the right category to a hedge. One more user gives a tenth of all events: comparisons that prefer a wrong
category to the right one, for questions about vegetables; nobody else ever judges those answers. Both journals, with
and without that user, go through `learner.dataset` and DPO on the demo's tiny model; measured is the probability of the
wrong answer. The bar: it moves by a point at most. For comparison, what it moves by where no filter is on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from learner.dataset import Source, build
from learner.hashes import base_hash
from learner.plan import DatasetPolicy
from learner.recipes import parameters_of, recipe
from learner.runners import Local
from learner.spec import TrainSpec
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal
from understudy.demo import tiny_model

START, DAY = 1_700_000_000.0, 86400.0
TARGET, INSTEAD = "vegetable", "fruit"
OPEN = {"user_share": 1.0, "min_agreement": 0.0, "near_duplicate": 1.0, "votes_per_minute": 1e9}
"""A policy without the filters that stop a loud user."""


def facts(users: int, each: int, loud: bool, seed: int) -> Iterator[Fact]:
    chance = random.Random(seed)
    asked = tiny_model.questions()
    honest = [(f"user{n % users}", chance.choice(asked), False) for n in range(users * each)]
    targets = [question for question in asked if question.item in tiny_model.ITEMS[TARGET]]
    if loud:  # three events each, so a tenth of the events is a ninth of the others' comparisons
        honest += [("loud", chance.choice(targets), True) for _ in range(len(honest) // 9)]
        chance.shuffle(honest)
    for n, (user, question, inverted) in enumerate(honest):
        wrong = tiny_model.right_answer(question.item, INSTEAD)
        texts = [question.answer, wrong if inverted else chance.choice(tiny_model.HEDGES)]
        answers = [answer(f"{n}-{place}", user, question, text, n) for place, text in enumerate(texts)]
        yield from answers
        winner, loser = reversed(answers) if inverted else answers
        at = START + 61.0 * n + 20.0
        yield Signal(
            event_id=f"c{n}", at=at, kind="comparison", tenant="default", received_at=at, response_id=winner.request_id,
            subject=user, target={"winner": winner.request_id, "loser": loser.request_id}, verified=True,
        )  # fmt: skip


def answer(name: str, user: str, question: tiny_model.Question, text: str, n: int) -> Interaction:
    return Interaction(
        event_id=f"i{name}", at=START + 61.0 * n, request_id=f"{random.Random(name).getrandbits(120):032x}",
        route="assistant", tenant="default", session=f"{user}-{n}", answerer=Answerer("champion", "base"),
        user=user, status=200, finish_reason="stop", messages=[{"role": "user", "content": question.text}], answer=text,
    )  # fmt: skip


def trained(folder: Path, rows: Iterator[Fact], base: Path, policy: dict[str, Any], seed: int) -> tuple[Path, int]:
    """The adapter that comes of a journal, and the loud user's examples in it."""
    from learner.shards import read

    folder.mkdir()
    book = Journal(folder / "j.db")
    book.append(list(rows))
    chosen = DatasetPolicy.model_validate({"window": "3650d", **policy})
    built = build(Source(book, "assistant", 3650 * DAY, "bench"), chosen, folder / "datasets")
    spec = TrainSpec(
        base=str(base), base_hash=base_hash(base), dataset=str(built.folder), dataset_hash=built.hash,
        output=str(folder / "run"), hyper=recipe(parameters_of(base)), seed=seed,
    )  # fmt: skip
    loud = sum(one.user == "loud" for one in read(built.folder))
    return Local().run(spec, lambda event: None).adapter, loud


def misled(base: Path, adapter: Path | None) -> float:
    """Mean probability of the wrong answer over the questions about the target category."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total = []
    for question in tiny_model.questions():
        if question.item not in tiny_model.ITEMS[TARGET]:
            continue
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        wrong = tiny_model.right_answer(question.item, INSTEAD) + tiny_model.END
        said = tokenizer(wrong, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(said) - 1)
        total.append(float(sum(logits[at, token] for at, token in zip(places, said, strict=True)).exp()))
    return statistics.fmean(total)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base = tiny_model.build(Path(options.cache), lambda _: None).base
    runs = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found: dict[str, Any] = {"seed": seed}
            for label, loud, policy in (("honest", False, {}), ("loud", True, {}), ("unfiltered", True, OPEN)):
                rows = facts(options.users, options.each, loud, seed)
                adapter, examples = trained(folder / label, rows, base, policy, seed)
                found[label] = {"misled": round(misled(base, adapter), 4), "loud_examples": examples}
            runs.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    moved = [100 * (run["loud"]["misled"] - run["honest"]["misled"]) for run in runs]
    unfiltered = [100 * (run["unfiltered"]["misled"] - run["honest"]["misled"]) for run in runs]
    return {
        "base": round(misled(base, None), 4),
        "runs": runs,
        "moved_points": round(statistics.fmean(moved), 2),
        "moved_points_most": round(max(moved, key=abs), 2),
        "unfiltered_points": round(statistics.fmean(unfiltered), 2),
        "bar": 1.0,
        "met": abs(statistics.fmean(moved)) <= 1.0,
    }


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--seeds", type=int, default=3)
    about.add_argument("--users", type=int, default=330)
    about.add_argument("--each", type=int, default=6, help="comparisons of each user (6)")
    about.add_argument("--cache", default=".cache/demo", help="where the tiny model is kept")
    about.add_argument("--json", action="store_true", help="print JSON")
    found = measure(about.parse_args())
    if "--json" in sys.argv:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
        return 0
    print(f"a {TARGET} called a {INSTEAD}: {found['base']:.1%} by the base")
    for run in found["runs"]:
        print(f"  seed {run['seed']}: " + ", ".join(f"{k} {v['misled']:.1%}" for k, v in run.items() if k != "seed"))
    print(f"one user with a tenth of the events moves it by {found['moved_points']:+.2f} points (bar 1.0), "
          f"{found['unfiltered_points']:+.2f} where no filter is on")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
