"""A training run made ready: what cannot be trained on is refused, the rest is read. No torch here.

Refused, each with a sentence: another base than the run was asked for, another dataset, a split without a pair (or, for
KTO, without wanted and unwanted answers), a tracker that is not installed, an output that is something else.
"""

from __future__ import annotations

import importlib.util
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from learner.checkpoints import Checkpoints
from learner.examples import SPLITS
from learner.hashes import base_hash, located, template_hash, tokenizer_hash
from learner.rows import Row, encode, ends_of, examples_of
from learner.spec import Method, TrainingFailed, TrainSpec

Say = Callable[[dict[str, Any]], None]

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Job:
    """What a trainer is made from; it stays the same when one has to be made again with a smaller batch."""

    spec: TrainSpec
    base: Path
    tokenizer: Any
    ends: frozenset[int]
    train: list[Row]
    held_out: list[Row]
    work: Path
    checkpoints: Checkpoints
    say: Say
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.say({"event": "note", "note": text})


def ready(spec: TrainSpec, tokenizer_of: Callable[[Path], Any], gpu: bool, say: Say) -> Job:
    """The job of a spec. Raises TrainingFailed."""
    if Path(spec.output).exists():
        raise TrainingFailed(f"{spec.output} is there and holds no result.json; move it away or name another output")
    for tracker in spec.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise TrainingFailed(f"the run is to be tracked in {tracker}, which is not here: pip install {tracker}")
    if spec.hyper.quantize and not (gpu and importlib.util.find_spec("bitsandbytes")):
        missing = "the package bitsandbytes" if gpu else "a GPU"
        raise TrainingFailed(f"quantize needs {missing}, which is not here; train with quantize off, or elsewhere")
    if not 0 <= spec.hyper.flip_rate < 0.5:
        raise TrainingFailed(f"flip_rate is {spec.hyper.flip_rate}; give less than 0.5, where labels say nothing")
    try:
        base = located(spec.base)
    except FileNotFoundError as error:
        raise TrainingFailed(str(error)) from None
    if base_hash(base) != spec.base_hash:
        raise TrainingFailed(f"the base changed under its adapters: {base} is not the model of this run; restore it")
    dataset = Path(spec.dataset)
    tokenizer = tokenizer_of(base)
    ends = ends_of(base, tokenizer)
    examples = examples_of(dataset, spec.dataset_hash)
    rows, notes = {}, []
    for split in SPLITS:
        found = [example for example in examples if example.split == split]
        rows[split], left_out = encode(found, spec.method, tokenizer, ends, spec.hyper.max_length)
        told = [f"{split}: {count} examples left out: they {why}" for why, count in sorted(left_out.items())]
        notes += told
        _refuse_one_sided(spec.method, split, rows[split], told)
    work = Path(f"{spec.output}.work") / "training"
    work.mkdir(parents=True, exist_ok=True)
    train = _mixed(rows["train"], spec.seed)
    job = Job(
        spec, base, tokenizer, ends, train, rows["held_out"], work, Checkpoints(work / _fingerprint(spec, base)), say
    )
    for note in notes:
        job.note(note)
    if spec.hyper.precision == "bfloat16" and not gpu:
        job.note("float32 in place of bfloat16, which is slow and coarse without a GPU")
    return job


def limit_memory(mib: int) -> None:
    """Let this process take so much more: it makes its batches smaller before the machine has no memory left."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (mib << 20), resource.RLIM_INFINITY))


def reference_path(job: Job) -> Path:
    """Where log-probabilities under the base are kept, by what decides them."""
    spec = job.spec
    key = [spec.base_hash, spec.dataset_hash, spec.hyper.max_length, spec.method, spec.seed, spec.hyper.precision]
    key += [spec.hyper.quantize, tokenizer_hash(job.base), template_hash(job.base)]
    return job.work / f"reference-{sha256(msgspec.json.encode(key)).hexdigest()[:12]}"


def _refuse_one_sided(method: Method, split: str, rows: list[Row], left_out: list[str]) -> None:
    if method == "dpo" and any(row.is_pair for row in rows):
        return
    if method == "kto" and any(row.chosen for row in rows) and any(row.rejected for row in rows):
        return
    needs = "a pair" if method == "dpo" else "both wanted and unwanted answers"
    raise TrainingFailed(". ".join([f"the dataset's {split} split needs {needs} that can be used", *left_out]))


def _mixed(rows: list[Row], seed: int) -> list[Row]:
    """In an order of the seed's: TRL's KTO takes rows as they come, and neighbours in a dataset are alike."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def _fingerprint(spec: TrainSpec, base: Path) -> str:
    """Of all that decides the weights: from another run's checkpoints nothing goes on."""
    same = msgspec.structs.replace(spec, output="", trackers=(), run_name="")
    processes = os.environ.get("WORLD_SIZE", "1")
    text = [tokenizer_hash(base), template_hash(base)]
    return sha256(msgspec.json.encode([same, text, processes, [version(one) for one in PACKAGES]])).hexdigest()[:12]
