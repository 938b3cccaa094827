"""How fast does training go, and what memory does it take, beside a script as TRL's documentation would have it?

    python bench/learner_speed.py [--pairs 1000] [--rounds 3] [--json]

Both train the demo's base with the same LoRA on the same pairs in the same batches for three epochs, each time in a
process of its own, in turn. The other script sets the model, the data, the batch, the epochs and the adapter and leaves
`DPOConfig` its defaults, but for `bf16`, which a CPU cannot compute fast. Ours looks at the held-out pairs on the way,
writes checkpoints and judges what the adapter writes: that is in its time, as is computing the reference. Both have the
environment that ours sets for itself.

Time runs from when libraries are loaded until the adapter is written; tokens are those of prompts and answers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from preferences import TINY, dataset, pairs, spec

from learner.shards import read
from understudy.demo.tiny_model import build

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3
FASTER, LARGER = 1.3, 1.1
SIDES = ("chosen", "rejected")
SAME = {"GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def ours(base: Path, data: Path, output: Path, threads: int) -> dict[str, Any]:
    from msgspec.structs import replace

    from learner.train import run

    hyper = replace(TINY, max_epochs=float(EPOCHS), evaluate_every=50, patience=1000)
    began = time.perf_counter()
    artifact = run(spec(base, data, output, hyper, threads=threads))
    return {
        "seconds": time.perf_counter() - began,
        "tokens": artifact.metrics["tokens"],
        "train_seconds": artifact.metrics["seconds"],
    }


def stock(base: Path, data: Path, output: Path, threads: int, **settings: Any) -> dict[str, Any]:
    """Train as the documentation shows; the adapter is then in `output`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(threads)
    began = time.perf_counter()
    rows = [
        {"prompt": one.messages} | {side: [{"role": "assistant", "content": getattr(one, side)}] for side in SIDES}
        for one in read(data)
        if one.split == "train"
    ]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=DPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=TINY.batch,
            num_train_epochs=EPOCHS,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=TINY.rank, lora_alpha=TINY.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)  # it prints where a bench prints its numbers
    at = time.perf_counter()
    trainer.train()
    trained = time.perf_counter() - at
    trainer.save_model(str(output))
    tokens = trainer._total_train_tokens
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "train_seconds": trained}


def child(which: str, folder: Path, threads: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        base = build(ROOT / ".cache/demo", lambda _: None).base
        # Loaded before time runs.
        import trl  # noqa: F401

        import learner.train  # noqa: F401

        found = (ours if which == "ours" else stock)(base, folder, Path(made) / "run", threads)
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": []}
    build(ROOT / ".cache/demo", lambda _: None)
    with tempfile.TemporaryDirectory() as made:
        data = dataset(Path(made) / "data", pairs(options.pairs))
        for _ in range(options.rounds):
            for which, rounds in found.items():
                command = [sys.executable, __file__, "--child", which, str(data), "--threads", str(options.threads)]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SAME)
                if done.returncode:
                    raise SystemExit(f"{which} failed:\n{done.stderr}")
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        which: {
            "tokens_per_s": round(statistics.median(one["tokens"] / one["seconds"] for one in rounds), 1),
            "train_tokens_per_s": round(statistics.median(one["tokens"] / one["train_seconds"] for one in rounds), 1),
            "seconds": round(statistics.median(one["seconds"] for one in rounds), 2),
            "tokens": rounds[0]["tokens"],
            "peak_mib": round(statistics.median(one["peak_mib"] for one in rounds), 1),
        }
        for which, rounds in found.items()
    }
    a, b = rows["ours"], rows["stock"]
    bars = [
        at_least("tokens/s over stock's, all of it", a["tokens_per_s"] / b["tokens_per_s"], FASTER),
        at_least("tokens/s over stock's, steps only", a["train_tokens_per_s"] / b["train_tokens_per_s"], FASTER),
        {"what": "peak memory over stock's", "value": round(a["peak_mib"] / b["peak_mib"], 3), "bar": LARGER}
        | {"met": a["peak_mib"] <= LARGER * b["peak_mib"]},
    ]
    return {"pairs": options.pairs, "rounds": options.rounds, "threads": options.threads, "results": rows, "bars": bars}


def at_least(what: str, value: float, bar: float) -> dict[str, Any]:
    return {"what": what, "value": round(value, 3), "bar": bar, "met": value >= bar}


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--pairs", type=int, default=1000, help="of which three in four are trained on (1000)")
    about.add_argument("--rounds", type=int, default=3, help="times that each trains (3)")
    about.add_argument("--threads", type=int, default=2)
    about.add_argument("--json", action="store_true", help="print JSON")
    about.add_argument("--child", nargs=2, metavar=("WHICH", "DATA"), help=argparse.SUPPRESS)
    options = about.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.threads)
        return 0
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(
        f"{'':8}{'tokens/s':>10}{'in steps':>10}{'seconds':>10}{'peak MiB':>10}   ({found['rounds']} rounds, medians)"
    )
    for which, row in found["results"].items():
        print(
            f"{which:8}{row['tokens_per_s']:>10}{row['train_tokens_per_s']:>10}{row['seconds']:>10}{row['peak_mib']:>10}"
        )
    for bar in found["bars"]:
        print(f"{'met ' if bar['met'] else 'MISSED '}{bar['what']}: {bar['value']} (bar {bar['bar']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
