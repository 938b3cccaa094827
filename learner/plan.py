"""What an operator writes about learning: which feedback makes a dataset, and when and how a challenger is trained.

Only shapes and their checks, as in `router.policy`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, model_validator

from learner.spec import Hyper, Loss
from router.policy import Duration, Factor, Fraction, FrozenMap, Name, PositiveDuration, Text, Written, fault

Share = Annotated[float, Field(gt=0, le=1)]


class DatasetPolicy(Written):
    """Which feedback becomes examples, and which examples are kept."""

    window: PositiveDuration = Field(
        30 * 86400.0, description="Feedback that came in this time before the newest fact."
    )
    tenants: tuple[Name, ...] = Field((), description="Of these tenants only; all where none is written.")
    task_types: tuple[Text, ...] = Field((), description="Of these task types only; all where none is written.")
    consent: Literal["assumed", "said"] = Field(
        "assumed", description="Where an app does not say what its user agreed to: learn from it, or not."
    )
    replay: Fraction = Field(0.0, description="Share of the training examples that is drawn from before the window.")
    held_out: float = Field(0.1, gt=0, lt=0.9, description="Share of the examples that is kept for evaluation.")
    salt: Text = Field("understudy", description="Another one splits users otherwise.")
    min_agreement: Fraction = Field(0.66, description="Weighted share of the votes on an example that must agree.")
    user_share: Share = Field(0.01, description="Largest share of the examples that one user may give.")
    synthetic_share: Fraction = Field(0.2, description="Largest share of examples that no user gave.")
    most_alike: Fraction = Field(0.9, description="Pairs whose answers are as alike as this are dropped.")
    near_duplicate: Fraction = Field(0.8, description="Examples as alike as this are one.")
    clip: float = Field(5.0, ge=1, description="Largest weight against uneven chances to be heard.")
    answer_chars: tuple[int, int] = Field((1, 20_000), description="Shortest and longest answer, in characters.")
    prompt_chars: int = Field(50_000, gt=0, description="Longest prompt, in characters.")
    votes_per_minute: float = Field(20.0, gt=0, description="A user who gives more feedback than this is a machine.")
    pairs_per_prompt: int = Field(4, ge=1, description="Pairs made from votes on one prompt, at most.")
    goldens: tuple[Path, ...] = Field(
        (), description="Files (JSON lines or YAML) or folders of prompts that are for evaluation: never learned from."
    )
    format: Literal["jsonl", "parquet"] = Field("jsonl", description="Of the shards.")
    shard: int = Field(10_000, gt=0, description="Examples of a shard, at most.")


class Runner(Written):
    """Where training runs."""

    kind: Literal["local", "kubernetes", "skypilot"] = Field("local", description="This machine, a Job, or SkyPilot.")
    python: Path | None = Field(None, description="Python of another virtual environment; null for this one's.")
    image: Text | None = Field(None, description="Container image with Understudy's learner extra (kubernetes).")
    namespace: Text = Field("default", description="Of the Job (kubernetes).")
    volume: Text | None = Field(
        None, description="Volume claim (kubernetes), or bucket or volume (skypilot), that holds the learner's folder."
    )
    gpus: int = Field(0, ge=0, description="GPUs of the Job (kubernetes).")
    accelerators: Text | None = Field(None, description='Such as "H100:1" (skypilot).')
    cloud: Text | None = Field(None, description="Where (skypilot); null for the cheapest.")

    @model_validator(mode="after")
    def _elsewhere_needs_a_volume_and_a_job_an_image(self) -> Runner:
        needed = {"local": (), "kubernetes": ("image", "volume"), "skypilot": ("volume",)}[self.kind]
        for key in needed:
            if getattr(self, key) is None:
                raise fault(f"is needed where kind is {self.kind}", key)
        return self


class Phase(Written):
    """How often to train from some number of pairs on."""

    pairs: int = Field(ge=1, description="Accepted pairs in the window from which on this holds.")
    every: PositiveDuration = Field(description="Longest time between trainings.")


class Judge(Written):
    """The model that says which of two answers is better, through litellm."""

    model: Text = Field(description='As litellm names it, such as "openai/gpt-5-mini".')
    api_base: Text | None = Field(None, description="Base URL where it is not the provider's usual one.")
    api_key: Text | None = Field(None, repr=False, description="Its key; write it as ${NAME}.")
    timeout: PositiveDuration = Field(60.0, description="For one verdict; without one by then nobody has won.")
    at_once: int = Field(8, ge=1, description="Questions that it is asked at once, at most.")
    patience: PositiveDuration = Field(
        4 * 3600.0, description="For all duels of a gate; what it did not say by then is no verdict."
    )
    prompt: Text | None = Field(None, description="What good answers are like here, told to the judge; null for ours.")


class Margins(Written):
    """How much worse than the champion is too little to matter: shares of the items looked at."""

    win_rate: Fraction = Field(0.05, description="Below a half, where the main metric is preference.")
    preference: Fraction = Field(0.05, description="Accuracy on held-out pairs; of each signal, cohort and round, too.")
    goldens: Fraction = Field(0.1, description="Goldens that hold with the champion only, less those with it alone.")
    refusals: Fraction = Field(0.02, description="Prompts that are refused more, or less.")
    form: Fraction = Field(0.02, description="Answers that are broken, or repeat themselves.")


class Gate(Written):
    """What a challenger must show before any user meets it."""

    main: Literal["win_rate", "preference"] = Field(
        "win_rate",
        description="What it must be better in: duels with the champion, or telling what people preferred.",
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="Chance that one no better passes, or a sound one fails.")
    margins: Margins = Field(default_factory=Margins, description="How much worse is too little to matter.")
    max_length_ratio: Factor = Field(1.1, description='Tokens of its answers, beside the champion\'s, such as "1.1x".')
    max_slowdown: Factor = Field(1.5, description="Seconds of its answers, beside the champion's.")
    max_divergence: Fraction | None = Field(
        None, description="Share of tokens at which it may say other ones than the champion; null for no limit."
    )
    min_users: int = Field(20, ge=6, description="Users whose items there must be, to tell anything.")
    pairs: int = Field(1500, ge=1, description="Held-out pairs to look at, at most.")
    duels: int = Field(1500, ge=1, description="Held-out prompts to have both versions answer, at most.")
    temperature: float = Field(
        0.0, ge=0, le=2, description="Of both versions' answers in duels: what apps use, or 0 for the likeliest answer."
    )
    judge: Judge | None = Field(None, description="Who judges duels; null for a model of what people preferred.")
    allow_code: bool = Field(False, description="Run the code that goldens ask for, on this machine.")
    retries: int = Field(2, ge=0, description="Rounds that are trained otherwise after one that was refused.")


class Learner(Written):
    """How challengers are trained."""

    base: Text = Field(description="The model that adapters are trained on: a folder or a hub name.")
    folder: Path = Field(Path("understudy-learner"), description="Where datasets, runs and versions are kept.")
    served_folder: Path | None = Field(
        None, description="The same folder as the vLLM replicas see it; null where they see it under the same path."
    )
    min_pairs: int = Field(500, ge=1, description="New accepted pairs that start a training.")
    negative_rate: Fraction = Field(0.2, description="Share of bad sessions in 7 days that starts a training, too.")
    every: PositiveDuration = Field(7 * 86400.0, description="Longest time between trainings.")
    phases: tuple[Phase, ...] = Field((), description="Another longest time once there are more pairs.")
    min_interval: Duration = Field(86400.0, description="Shortest time between trainings.")
    dataset: DatasetPolicy = Field(
        default_factory=lambda: DatasetPolicy(replay=0.3), description="Which feedback is learned from."
    )
    method: Literal["auto", "dpo", "kto"] = Field(
        "auto", description="auto: DPO on pairs and corrections, or KTO where there are far fewer pairs than votes."
    )
    loss: Loss = Field("sigmoid+sft", description="Of DPO; robust or conservative where labels are often wrong.")
    train: FrozenMap[str, Any] = Field(
        default={}, description="Overrides of the recipe, such as {learning_rate: 1e-5}."
    )
    start: Literal["base", "champion"] = Field("base", description="A fresh adapter each round, or the champion's.")
    seed: int = Field(0, description="Of the training.")
    threads: int = Field(2, ge=1, description="CPU threads of the training; with another number the last bits differ.")
    max_loras: int = Field(3, ge=2, description="As vLLM was started with: adapters that are served at once.")
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(16, description="As vLLM was started with.")
    trackers: tuple[Literal["mlflow", "wandb"], ...] = Field((), description="Where runs are logged besides.")
    runner: Runner = Field(default_factory=Runner, description="Where training runs.")
    gate: Gate = Field(default_factory=Gate, description="What a challenger must pass before any user meets it.")

    @model_validator(mode="after")
    def _what_is_trained_can_be_served(self) -> Learner:
        try:
            rank = msgspec.convert(dict(self.train), Hyper).rank
        except msgspec.ValidationError as error:
            keys = ", ".join(Hyper.__struct_fields__)
            raise fault(f"cannot be used ({error}); the keys are {keys}", "train") from None
        if rank > self.max_lora_rank:
            raise fault(f"has a rank of {rank}, more than max_lora_rank; vLLM would not serve it", "train")
        return self
