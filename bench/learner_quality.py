"""Does training make the model better at what people prefer, and does it notice when it does not?

    python bench/learner_quality.py [--pairs 1000] [--seeds 3] [--draws 2] [--json]

People with a planted preference (`tests/preferences.py`) give pairs; a quarter of them is held out. For each seed:

accuracy   how often the adapter prefers, more than the base, the answer that held-out people do
win rate   answers sampled at temperature 1 to held-out people's questions, adapter against base (the champion); the
           planted judge says which is good, and ties are half a win
collapse   plain DPO at the same rate, without the likelihood term: must be stopped and marked
noise      a share of all labels is flipped, also of those that it stops by; accuracy is on labels that are not.
           Compared are the losses, and at 35 % TRL's own script with its sigmoid loss at the same rate

The base answers well in 4 of 10 cases, so an adapter that always does wins 80 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from learner_speed import stock
from msgspec.structs import replace
from preferences import dataset, pairs, spec

from learner.examples import Example
from learner.recipes import parameters_of, recipe
from learner.spec import Artifact, Hyper
from understudy.demo.tiny_model import build, is_good, questions

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ("sigmoid+sft", "robust", "conservative")
ASKED = {question.text: question for question in questions()}


class Bench:
    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.runs = options, work, 0
        self.base = build(ROOT / ".cache/demo", lambda _: None).base
        self.hyper = recipe(parameters_of(self.base))

    def train(self, found: Sequence[Example], seed: int, **changes: Any) -> Artifact:
        from learner.train import run

        self.runs += 1
        place = self.work / f"run-{self.runs}"
        data = dataset(place / "data", found)
        hyper: Hyper = replace(self.hyper, **changes)
        artifact = run(spec(self.base, data, place / "artifact", hyper, seed=seed, threads=self.options.threads))
        print(
            f"  {hyper.loss}: best step {artifact.steps}, {artifact.stopped}, "
            f"accuracy {artifact.metrics['held_out_accuracy']:.3f}, fall {artifact.metrics['held_out_fall']:+.2f}",
            file=sys.stderr,
        )
        return artifact

    def stock(self, found: Sequence[Example], seed: int) -> Path:
        self.runs += 1
        place = self.work / f"run-{self.runs}"
        data = dataset(place / "data", found)
        rate = self.hyper.learning_rate
        stock(self.base, data, place / "stock", self.options.threads, learning_rate=rate, seed=seed)
        return place / "stock"

    def accuracy(self, adapter: Path, held_out: Sequence[Example]) -> float:
        """By the plain logits, apart from what the trainer measures."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from learner import lora
        from learner.rows import encode, ends_of

        tokenizer = lora.tokenizer_of(self.base)
        rows, _ = encode(held_out, "dpo", tokenizer, ends_of(self.base, tokenizer), self.hyper.max_length)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), str(adapter)).eval()
        inputs = lora.stacked(
            [(row.prompt, row.chosen) for row in rows] + [(row.prompt, row.rejected) for row in rows],
            tokenizer.pad_token_id,
        )

        def logps() -> Any:
            with torch.no_grad():
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            each = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
            return (each * inputs["completion_mask"][:, 1:]).sum(1)

        ours = logps()
        with model.disable_adapter():
            gained = ours - logps()
        won = gained[: len(rows)] - gained[len(rows) :]
        return float((won > 0).float().mean() + (won == 0).float().mean() / 2)

    def scores(self, adapter: Path, held_out: Sequence[Example], seed: int) -> tuple[np.ndarray, list[float]]:
        """1 for a win over the base, ½ for a tie, for each question and draw; and how often each was good."""
        from learner import lora

        prompts = [one.messages for one in held_out] * self.options.draws
        asked = [ASKED[messages[0]["content"]] for messages in prompts]
        good = []
        for number, which in enumerate((str(adapter), None)):
            said = lora.generated(
                {"base": str(self.base), "adapter": which, "prompts": prompts, "max_tokens": 24}
                | {"temperature": 1.0, "seed": 2 * seed + number, "threads": self.options.threads}
            )["answers"]
            good.append(np.array([is_good(one, answer["text"]) for one, answer in zip(asked, said, strict=True)]))
        return (1 + good[0].astype(float) - good[1]) / 2, [float(one.mean()) for one in good]


def one_seed(bench: Bench, seed: int) -> dict[str, Any]:
    count = bench.options.pairs
    clean = pairs(count, seed)
    held_out = [one for one in clean if one.split == "held_out"]
    best = bench.train(clean, seed)
    scores, good = bench.scores(best.adapter, held_out, seed)
    found: dict[str, Any] = {
        "accuracy": bench.accuracy(best.adapter, held_out),
        "scores": scores,
        "good": good,
        "fall": best.metrics["held_out_fall"],
        "marked": best.collapsed,
    }
    fallen = bench.train(clean, seed, sft_weight=0.0)
    found |= {"collapsed": fallen.collapsed, "collapsed_fall": fallen.metrics["held_out_fall"]}
    for share in (0.2, 0.35):
        noisy = pairs(count, seed, flipped=share)
        for loss in LOSSES:
            artifact = bench.train(noisy, seed, loss=loss, flip_rate=share)
            found[f"{loss} at {share}"] = bench.accuracy(artifact.adapter, held_out)
    found["stock at 0.35"] = bench.accuracy(bench.stock(noisy, seed), held_out)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        bench = Bench(options, Path(made))
        seeds = []
        for seed in range(options.seeds):
            print(f"seed {seed}", file=sys.stderr)
            seeds.append(one_seed(bench, seed))
    scores = np.concatenate([one.pop("scores") for one in seeds])
    low = scores.mean() - 1.96 * scores.std(ddof=1) / math.sqrt(len(scores))
    accuracy = [one["accuracy"] for one in seeds]

    def mean(name: str) -> float:
        return float(np.mean([one[name] for one in seeds]))

    best = {share: max(LOSSES, key=lambda loss: mean(f"{loss} at {share}")) for share in (0.2, 0.35)}
    cost = 100 * (float(np.mean(accuracy)) - mean(f"{best[0.2]} at 0.2"))
    gain = 100 * (mean(f"{best[0.35]} at 0.35") - mean("stock at 0.35"))
    caught = sum(one["collapsed"] for one in seeds)
    return {
        "pairs": options.pairs,
        "seeds": seeds,
        "means": {name: mean(name) for name in seeds[0] if " at " in name or name == "accuracy"},
        "bars": [
            bar("accuracy on held-out people's pairs, least of the seeds", min(accuracy), 0.90, min(accuracy) >= 0.90),
            bar("win rate against the base", float(scores.mean()), 0.65, scores.mean() >= 0.65),
            bar("its lower 95 % bound", float(low), 0.5, low > 0.5),
            bar("planted collapses stopped and marked", caught, len(seeds), caught == len(seeds)),
            bar("sound runs marked as collapsed", n := sum(one["marked"] for one in seeds), 0, n == 0),
            bar(f"points that 20 % flipped labels cost ({best[0.2]})", cost, 5.0, cost <= 5),
            bar(f"points over stock sigmoid at 35 % flipped ({best[0.35]})", gain, 3.0, gain >= 3),
        ],
    }


def bar(what: str, value: float, bar: float, met: Any) -> dict[str, Any]:
    return {"what": what, "value": round(value, 3), "bar": bar, "met": bool(met)}


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--pairs", type=int, default=1000, help="of which three in four are trained on (1000)")
    about.add_argument("--seeds", type=int, default=3)
    about.add_argument("--draws", type=int, default=2, help="answers to each held-out question (2)")
    about.add_argument("--threads", type=int, default=2)
    about.add_argument("--json", action="store_true", help="print JSON")
    options = about.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found["means"].items():
        print(f"{name:<24}{value:.3f}")
    for row in found["bars"]:
        print(f"{'met ' if row['met'] else 'MISSED '}{row['what']}: {row['value']} (bar {row['bar']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
