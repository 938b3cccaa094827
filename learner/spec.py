"""What a training run is asked to do, and what it leaves: the whole interface between the cycle and the trainer.

`run(spec) → artifact` (`learner.runners`): the spec is a JSON file, the trainer a process that reads it, the artifact a
folder that is there whole or not at all. The same spec gives the same bytes on the same machine and threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from telemetry.errors import UnderstudyError

Method = Literal["dpo", "kto"]
Loss = Literal["sigmoid+sft", "robust", "ipo", "conservative"]
LOSSES: tuple[Loss, ...] = ("sigmoid+sft", "robust", "ipo", "conservative")


class Hyper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to train. `learner.recipes` has values for each size of model, with their sources."""

    loss: Loss = "sigmoid+sft"
    beta: float = 0.1
    sft_weight: float = 0.2
    flip_rate: float = 0.2
    """Of `robust` and `conservative`: the share of labels that is expected to be wrong."""
    learning_rate: float = 5e-6
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    batch: int = 8
    """Examples a step on one device; the effective batch is `batch` × `accumulate` × devices."""
    accumulate: int = 1
    max_length: int = 2048
    """Tokens of prompt and answer together; what is longer is left out, and counted."""
    max_epochs: float = 3.0
    """At most; training stops when the held-out set gets no better."""
    warmup: float = 0.1
    evaluate_every: int = 50
    """Steps between looks at the held-out set; a checkpoint is written at each."""
    patience: int = 3
    """Looks without improvement before it stops."""
    precision: Literal["float32", "bfloat16"] = "float32"
    quantize: bool = False
    """QLoRA: the base in 4 bits. Needs a GPU and bitsandbytes."""
    gradient_checkpointing: bool = False


class TrainSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One training run."""

    base: str
    """The model that the adapter is for: a folder in Hugging Face form, or a hub name."""
    base_hash: str
    """`learner.hashes.base_hash` of it; refused where the base is another one now."""
    dataset: str
    """Folder of a dataset (`learner.dataset`)."""
    dataset_hash: str
    """SHA-256 of its manifest."""
    output: str
    """Folder to be made: the artifact. Work in progress stands in `<output>.work` until then."""
    method: Method = "dpo"
    hyper: Hyper = Hyper()
    seed: int = 0
    threads: int = 2
    """CPU threads; another number may give other last bits."""
    start: str | None = None
    """Folder of the adapter to start from; None for a fresh one (the rule, since vLLM puts one adapter on the base)."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    run_name: str = ""


class Artifact(msgspec.Struct, frozen=True):
    """What a run leaves: `adapter/` as PEFT writes it, and beside it `result.json`, which is this."""

    folder: str
    adapter_hash: str
    """SHA-256 over the adapter's files, by name (`learner.hashes.folder_hash`)."""
    metrics: dict[str, float]
    """Of the best step, on the held-out set (`held_out_accuracy`, `held_out_margin`, …); and of the run."""
    steps: int = 0
    stopped: str = ""
    """Why it ended: `no longer better`, `max_epochs`, `collapsed` (then the adapter must not be served)."""
    collapsed: bool = False
    notes: tuple[str, ...] = ()
    """What was done otherwise than asked, such as a halved batch; and what was left out."""
    packages: dict[str, str] = {}
    """Versions of what it was made with."""
    tokenizer_hash: str = ""
    template_hash: str = ""

    @property
    def adapter(self) -> Path:
        return Path(self.folder) / "adapter"


class TrainingFailed(UnderstudyError):
    """A run that left no artifact; says why and what to do."""


class TrainingInterrupted(TrainingFailed):
    """A run that was ended by something else than itself: a signal, a full disk, a cluster that does not answer."""


def load(path: Path) -> TrainSpec:
    return msgspec.json.decode(path.read_bytes(), type=TrainSpec)


def save(spec: TrainSpec, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2))
