"""Train one adapter from preferences: TRL's DPO and KTO over PEFT's LoRA, in a process of its own.

    python -m learner.train SPEC.json [--events] [--memory MIB]    reads a `TrainSpec`, leaves its `Artifact`
    python -m learner.train --generate < QUESTIONS.json            answers of a base, with an adapter or without
    python -m learner.train --score < PAIRS.json                   how likely it finds answers (`learner.lora.scored`)
    accelerate launch -m learner.train SPEC.json                   the same training on several GPUs

refuse what cannot be trained on, read the rest (`learner.job`) → log-probabilities under the base, once → steps; every
`evaluate_every` of them a look at the held-out set (`learner.progress`) and a checkpoint (`learner.checkpoints`) → what
the best step's adapter writes → the artifact, in one rename.

The adapter starts fresh and the reference is the base with the adapter off. TRL has another way for an adapter that is
there already: a `PeftModel` passed in gets a frozen copy named `ref`; a checkpoint then holds that copy in a folder of
its own, and on resuming transformers' `Trainer` loads the adapters in such folders and *not* the policy beside them:
step and optimizer go on over the weights of the start. So a warm start (`TrainSpec.start`) is put into a fresh adapter
here, and a checkpoint is read back by name and refused where a weight is missing.

`--generate` reads {"base", "adapter" (folder or null), "prompts" (lists of chat messages), "max_tokens", "temperature"
(0), "seed" (0)} and prints {"answers": [{"prompt_ids", "token_ids" (with the end, where it came), "text", "ended"}]}.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

# Read when the libraries below are loaded or first used: nobody is told of a run; CUDA's sums come out the same twice;
# a thread that waits soon sleeps (where others use the cores, OpenMP's usual wait made the same run 10 times as long).
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import msgspec
import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import add_fused_lm_head

from learner import lora
from learner.checkpoints import put
from learner.hashes import folder_hash, template_hash, tokenizer_hash
from learner.job import PACKAGES, Job, Say, limit_memory, ready, reference_path
from learner.progress import Progress, bar, format_metrics, judged, looked, progress_in, told_apart
from learner.rows import Row
from learner.runners import RETRY, found, whole
from learner.spec import Artifact, TrainingFailed, TrainingInterrupted, TrainSpec, load

Floats = NDArray[np.float64]

JUDGED = 32
"""Held-out prompts that are answered to judge the format."""
MOST_JUDGED = 256
"""Tokens of such an answer, at most."""


def run(spec: TrainSpec, say: Say = lambda event: None) -> Artifact:
    """The artifact of a spec: the one that is there, or one that is trained now, from its last checkpoint on.

    Raises TrainingFailed, with the reason and what to do.
    """
    if (artifact := whole(spec.output)) is None:
        with lora.same_every_time(spec.threads):
            job = ready(spec, lora.tokenizer_of, torch.cuda.is_available(), say)
            trainer = trained(job)
            progress = judged(trainer.progress, written(job, trainer))
            if trainer.accelerator.is_main_process:
                leave(job, trainer, progress)
            trainer.accelerator.wait_for_everyone()
        artifact = found(spec)
    say({"event": "done", **msgspec.to_builtins(artifact)})
    return artifact


def trained(job: Job) -> Any:
    """A trainer that is done, and has the best step's adapter. Where memory is too small, the batch is made smaller."""
    kind = _Pairs if job.spec.method == "dpo" else _Unpaired
    batch, accumulate = job.spec.hyper.batch, job.spec.hyper.accumulate
    while True:
        trainer = None
        try:
            trainer = kind(job, batch, accumulate)
            trainer.fit()
            return trainer
        except (RuntimeError, MemoryError) as error:
            if not lora.is_out_of_memory(error):
                raise
            # Other processes are not told; they would wait for this one for ever.
            alone = trainer is not None and trainer.accelerator.num_processes == 1
            smaller = max((part for part in range(kind.least, batch // 2 + 1) if batch % part == 0), default=0)
            if not (alone and smaller):
                raise TrainingFailed(
                    f"memory is too small for a batch of {batch}: give a smaller batch, a smaller max_length, "
                    f"gradient_checkpointing or quantize ({str(error).splitlines()[0]})"
                ) from None
        del trainer  # with its model, before the next is loaded
        lora.give_memory_back()
        accumulate, batch = accumulate * batch // smaller, smaller
        job.note(f"memory was too small: batches of {batch}, {accumulate} of them a step")


def written(job: Job, trainer: Any) -> dict[str, float]:
    """What the adapter and the base write, greedily, to some held-out prompts."""
    prompts = {tuple(row.prompt): row for row in job.held_out}
    rows = list(prompts.values())[:: max(1, len(prompts) // JUDGED)][:JUDGED]
    longest = max(len(row.chosen or row.rejected) for row in job.held_out)
    limit = min(2 * longest + 8, MOST_JUDGED)
    found = []
    for adapter in (nullcontext(), trainer.model.disable_adapter()):
        with adapter:
            found.append(lora.answered(trainer.model, job.tokenizer, job.ends, [row.prompt for row in rows], limit))
    return format_metrics(found[0], found[1], job.ends)


def leave(job: Job, trainer: Any, progress: Progress) -> None:
    """Write the artifact's folder, in one rename, and take away what led to it."""
    output = Path(job.spec.output)
    adapter = {
        "adapter_config.json": lora.config_file(trainer.model, job.spec.base),
        "adapter_model.safetensors": lora.weights_of(trainer.model),
    }
    put(job.work / "adapter", adapter)
    result = Artifact(
        folder=job.spec.output,
        adapter_hash=folder_hash(job.work / "adapter"),
        metrics=progress.metrics | trainer.pace.metrics(),
        steps=progress.best_step,
        stopped=progress.stopped,
        collapsed=progress.collapsed,
        notes=tuple(job.notes),
        packages={name: version(name) for name in PACKAGES},
        tokenizer_hash=tokenizer_hash(job.base),
        template_hash=template_hash(job.base),
    )
    files = {f"adapter/{name}": body for name, body in adapter.items()}
    put(output, {**files, "result.json": msgspec.json.format(msgspec.json.encode(result), indent=2)})
    shutil.rmtree(job.work, ignore_errors=True)


class _Learner(Trainer):  # type: ignore[misc]
    """What TRL's trainers do here in a way of our own: rows, reference, looks and checkpoints. Stands before one."""

    least = 1
    """Examples in a batch, at least."""

    def __init__(self, job: Job, batch: int, accumulate: int) -> None:
        self.job, self.batch = job, batch
        self.progress, self.before = Progress(), Progress()
        self.reference: dict[str, Floats] = {}
        self.pace = _Pace(job)
        model = lora.base_of(job.base, job.spec.hyper)
        super().__init__(
            model=model,
            args=self.configured(**self._settings(job.spec, accumulate)),
            data_collator=self.collate,
            train_dataset=Dataset.from_dict({"row": range(len(job.train))}),
            processing_class=job.tokenizer,
            peft_config=lora.config(job.spec.hyper, model),
            callbacks=[self.pace],
        )
        self.remove_callback(PrinterCallback)
        if job.spec.start:
            lora.start_from(self.model, Path(job.spec.start))

    def _settings(self, spec: TrainSpec, accumulate: int) -> dict[str, Any]:
        hyper, gpu = spec.hyper, torch.cuda.is_available()
        return {
            "output_dir": str(self.job.work / "trainer"),
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": accumulate,
            "num_train_epochs": hyper.max_epochs,
            "learning_rate": hyper.learning_rate,
            "warmup_steps": hyper.warmup,
            "beta": hyper.beta,
            "bf16": hyper.precision == "bfloat16" and gpu,
            "gradient_checkpointing": hyper.gradient_checkpointing,
            "disable_dropout": hyper.dropout == 0,
            "max_length": None,
            "seed": spec.seed,
            "data_seed": spec.seed,
            "logging_steps": min(10, hyper.evaluate_every),
            "save_strategy": "no",
            "remove_unused_columns": False,
            "ddp_find_unused_parameters": False,
            "dataloader_pin_memory": gpu,
            "report_to": list(spec.trackers) or "none",
            "run_name": spec.run_name or None,
            "disable_tqdm": True,
        }

    def fit(self) -> None:
        """Train to the end, from the newest checkpoint if there is one; then take the best step's adapter."""
        self.reference = self._reference()
        kept = self.job.checkpoints
        found = kept.newest(lambda files: progress_in(files).best_step)
        if found is not None:
            self.progress = self.before = progress_in(found[1])
        sizes = {"train": len(self.job.train), "held_out": len(self.job.held_out)}
        self.job.say({"event": "start", "step": self.progress.step} | sizes)
        if not self.progress.stopped:
            self.train(resume_from_checkpoint=str(kept.path(found[0])) if found else None)
        best = kept.read(self.progress.best_step)
        if best is None:
            raise TrainingFailed(f"{kept.path(self.progress.best_step)} was damaged; run the same spec again")
        lora.put(self.model, best["adapter.safetensors"], str(kept.path(self.progress.best_step)))

    # Log-probabilities

    def logps(self, said: Sequence[lora.Said]) -> Floats:
        """Of each answer under the model as it is; processes share the work."""
        self.model.eval()
        order = sorted(range(len(said)), key=lambda place: -len(said[place][0]) - len(said[place][1]))
        parts = [order[at : at + 2 * self.batch] for at in range(0, len(order), 2 * self.batch)]
        found: list[tuple[int, float]] = []
        for part in parts[self.accelerator.process_index :: self.accelerator.num_processes]:
            inputs = self._prepare_inputs(
                lora.stacked([said[place] for place in part], self.job.tokenizer.pad_token_id)
            )
            with torch.no_grad(), self.accelerator.autocast():
                found += zip(part, lora.logps(self.model, inputs).tolist(), strict=True)
        result = np.full(len(said), np.nan)
        for place, value in lora.gathered(found):
            result[place] = value
        return result

    def answers(self, rows: Sequence[Row]) -> tuple[Floats, Floats]:
        """Log-probabilities of the rows' chosen and rejected answers; NaN for an answer that there is not."""
        found = []
        for texts in ([row.chosen for row in rows], [row.rejected for row in rows]):
            there = [place for place, text in enumerate(texts) if text]
            values = np.full(len(rows), np.nan)
            values[there] = self.logps([(rows[place].prompt, texts[place]) for place in there])
            found.append(values)
        return found[0], found[1]

    def _reference(self) -> dict[str, Floats]:
        """Log-probabilities under the base: computed once, kept beside the run."""
        path = reference_path(self.job)
        with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(path / "logps.npz") as kept:
            return dict(kept)
        with self.model.disable_adapter():
            chosen, rejected = self.answers(self.job.train)
            held_chosen, held_rejected = self.answers(self.job.held_out)
            mismatched = self.logps(self.mismatched)
        found = {"chosen": chosen, "rejected": rejected, "mismatched": mismatched}
        found |= {"held_chosen": held_chosen, "held_rejected": held_rejected}
        if self.accelerator.is_main_process:
            body = io.BytesIO()
            np.savez(body, allow_pickle=False, **found)
            put(path, {"logps.npz": body.getvalue()})
        self.accelerator.wait_for_everyone()
        return found

    @cached_property
    def mismatched(self) -> list[lora.Said]:
        return []

    # Looks

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Look at the held-out set, and decide whether to go on."""
        rows, step, of = self.job.held_out, int(self.state.global_step), int(self.state.max_steps)
        chosen, rejected = self.answers(rows)
        base, lengths = self.reference["held_chosen"], np.array([max(1, len(row.chosen)) for row in rows])
        metrics = {
            **self.held_out(rows, chosen, rejected),
            "held_out_logps_chosen": float(np.nanmean(chosen / lengths)),
            "held_out_logps_chosen_base": float(np.nanmean(base / lengths)),
            "held_out_fall": float(np.nanmean((base - chosen) / lengths)),
        }
        self.before = self.progress
        self.progress = looked(self.progress, step, metrics, self.job.spec.hyper.patience, step >= of)
        self.job.say({"event": "look", "step": step, "of": of, "best_step": self.progress.best_step, **metrics})
        self.log({f"eval_{name}": value for name, value in metrics.items()})
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        control.should_training_stop |= bool(self.progress.stopped)
        return metrics

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        chance = lora.gathered([lora.chances()])
        if self.accelerator.is_main_process:
            body = io.BytesIO()
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            torch.save({**state, "chance": chance}, body)
            files = {
                "adapter.safetensors": lora.weights_of(self.model),
                "state.pt": body.getvalue(),
                "trainer_state.json": json.dumps(asdict(self.state)).encode(),
                "progress.json": msgspec.json.encode(self.progress),
            }
            keep = {self.progress.best_step, self.before.step, self.before.best_step}
            self.job.checkpoints.write(self.progress.step, files, keep)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = (Path(resume_from_checkpoint) / "adapter.safetensors").read_bytes()
        lora.put(self.model, weights, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = _state(checkpoint)
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            lora.set_chances(_state(checkpoint)["chance"][self.accelerator.process_index])

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        self.pace.tokens += int(inputs["attention_mask"].sum()) * self.accelerator.num_processes
        return super().training_step(model, inputs, *rest)

    # What is not wanted of TRL and transformers

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # of rows' places; they are token ids already

    def _send_telemetry(self) -> None: ...

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


class _Pairs(_Learner, DPOTrainer):  # type: ignore[misc]
    """DPO on pairs, with corrections among them, and a weight for each."""

    configured = DPOConfig

    def __init__(self, job: Job, batch: int, accumulate: int) -> None:
        super().__init__(job, batch, accumulate)
        # TRL's head also computes the entropy, mean and maximum of all logits, which only its own metrics need.
        add_fused_lm_head(self.model.get_base_model(), outputs=("log_probs",))

    def collate(self, features: list[dict[str, int]]) -> dict[str, Any]:
        places = [feature["row"] for feature in features]
        rows = [self.job.train[place] for place in places]
        pairs = [at for at, row in enumerate(rows) if row.is_pair]
        said = [(row.prompt, row.chosen) for row in rows] + [(rows[at].prompt, rows[at].rejected) for at in pairs]
        known = [*self.reference["chosen"][places], *self.reference["rejected"][[places[at] for at in pairs]]]
        return {
            **lora.stacked(said, self.job.tokenizer.pad_token_id),
            "pairs": torch.tensor(pairs, dtype=torch.long),
            "weight": torch.tensor([row.weight for row in rows], dtype=torch.float32),
            "reference": torch.tensor(known, dtype=torch.float32),
        }

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
        pairs, n = inputs["pairs"], len(inputs["weight"])
        found, tokens = lora.logps(model, inputs), inputs["completion_mask"].sum(1)
        each = lora.losses(self.job.spec.hyper, found, inputs["reference"], tokens, pairs)
        ratios = (found - inputs["reference"]).detach()
        gap = ratios[:n][pairs] - ratios[n:]
        metrics = self._metrics["train"]
        if len(pairs):
            metrics["margin"].append(self.beta * gap.mean().item())
            metrics["accuracy"].append((gap > 0).float().mean().item())
        metrics["logps_chosen"].append((found[:n].detach().sum() / tokens[:n].sum()).item())
        return (inputs["weight"] * each).mean()

    def held_out(self, rows: list[Row], chosen: Floats, rejected: Floats) -> dict[str, float]:
        pairs = np.array([place for place, row in enumerate(rows) if row.is_pair])
        found = np.concatenate([chosen, rejected[pairs]])
        known = np.concatenate([self.reference["held_chosen"], self.reference["held_rejected"][pairs]])
        tokens = [len(row.chosen) for row in rows] + [len(rows[place].rejected) for place in pairs]
        each = lora.losses(self.job.spec.hyper, *map(torch.from_numpy, (found, known, np.array(tokens), pairs))).numpy()
        gap = (found - known)[pairs] - (found - known)[len(rows) :]
        weights = [row.weight for row in rows]
        return {"held_out_loss": float(np.average(each, weights=weights)), **told_apart(gap, self.beta)}


class _Unpaired(_Learner, KTOTrainer):  # type: ignore[misc]
    """KTO on answers that were wanted or not; each side counts as much as the other, whatever their numbers."""

    least = 2

    @staticmethod
    def configured(**words: Any) -> Any:
        return KTOConfig(**words, train_sampling_strategy="sequential")

    def collate(self, features: list[dict[str, int]]) -> dict[str, Any]:
        self.precompute_ref_logps = True  # TRL then takes them from here
        places = [feature["row"] for feature in features]
        rows, pad = [self.job.train[place] for place in places], self.job.tokenizer.pad_token_id
        wanted = torch.tensor([bool(row.chosen) for row in rows])
        share = sum(bool(row.chosen) for row in self.job.train) / len(self.job.train)
        weight = torch.tensor([row.weight for row in rows]) * torch.where(wanted, 0.5 / share, 0.5 / (1 - share))
        others = lora.stacked([self.mismatched[place] for place in places], pad)
        known = np.where(wanted.numpy(), self.reference["chosen"][places], self.reference["rejected"][places])
        return {
            **lora.stacked([(row.prompt, row.chosen or row.rejected) for row in rows], pad),
            **{f"KL_{name}": value for name, value in others.items()},
            "label": wanted,
            "weight": weight,
            "ref_logps": torch.tensor(known, dtype=torch.float32),
            "ref_KL_logps": torch.tensor(self.reference["mismatched"][places], dtype=torch.float32),
        }

    @cached_property
    def mismatched(self) -> list[lora.Said]:
        """Each prompt with the answer to the one before, by which KTO estimates the divergence from the base."""
        rows = self.job.train
        return [
            (row.prompt, before.chosen or before.rejected) for row, before in zip(rows, [rows[-1], *rows], strict=False)
        ]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
        weight = inputs.pop("weight")
        # TRL has one weight for each side; as tensors they are one for each example.
        self.desirable_weight, self.undesirable_weight = weight[inputs["label"]], weight[~inputs["label"]]
        return super()._compute_loss(model, inputs, return_outputs)

    def held_out(self, rows: list[Row], chosen: Floats, rejected: Floats) -> dict[str, float]:
        """Loss at no divergence; wanted answers are told apart from unwanted ones, each from each."""
        up, down = chosen - self.reference["held_chosen"], rejected - self.reference["held_rejected"]
        up, down = up[~np.isnan(up)], down[~np.isnan(down)]
        loss = (1 / (1 + np.exp(self.beta * up))).mean() + (1 / (1 + np.exp(-self.beta * down))).mean()
        return {"held_out_loss": float(loss) / 2, **told_apart((up[:, None] - down).ravel(), self.beta)}


class _Pace(TrainerCallback):  # type: ignore[misc]
    """When to log, to look and to write a checkpoint; and how fast it goes."""

    def __init__(self, job: Job) -> None:
        self.job, self.began, self.first, self.seconds, self.tokens = job, 0.0, 0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.monotonic() - self.began
        if state.global_step % self.job.spec.hyper.evaluate_every == 0 or state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs:
            left = (state.max_steps - state.global_step) * self.seconds / max(1, state.global_step - self.first)
            told = {name: logs[name] for name in ("loss", "margin", "accuracy", "logps_chosen") if name in logs}
            pace = {"tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 1), "eta_s": round(left, 1)}
            self.job.say({"event": "step", "step": state.global_step, "of": state.max_steps, **told, **pace})

    def metrics(self) -> dict[str, float]:
        """Of this process; a run that went on from a checkpoint has had others."""
        return {"seconds": self.seconds, "tokens": self.tokens, "tokens_per_s": self.tokens / max(self.seconds, 1e-9)}


def _state(checkpoint: str) -> Any:
    return torch.load(Path(checkpoint) / "state.pt", map_location="cpu", weights_only=True)


def main(words: Sequence[str] | None = None) -> int:
    about = argparse.ArgumentParser(prog="python -m learner.train", description=__doc__.partition("\n")[0])
    about.add_argument("spec", type=Path, nargs="?", help="a TrainSpec as JSON")
    about.add_argument("--events", action="store_true", help="tell how it goes as JSON, an object a line")
    about.add_argument("--memory", type=int, metavar="MIB", help="memory that training may take, beside the libraries'")
    about.add_argument("--generate", action="store_true", help="answer the questions on stdin")
    about.add_argument("--score", action="store_true", help="tell how likely the answers on stdin are")
    options = about.parse_args(words)
    if options.generate or options.score:
        print(json.dumps((lora.generated if options.generate else lora.scored)(json.load(sys.stdin))))
        return 0
    if options.spec is None:
        about.error("name a spec, --generate or --score")
    try:
        if options.memory is not None:
            limit_memory(options.memory)
        with bar() if not options.events else nullcontext(_as_json) as say:
            run(load(options.spec), say if os.environ.get("RANK", "0") == "0" else lambda event: None)
    except (TrainingFailed, msgspec.MsgspecError, OSError) as error:
        print(f"{error}", file=sys.stderr)
        return RETRY if isinstance(error, TrainingInterrupted | OSError) else 1
    return 0


def _as_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())
