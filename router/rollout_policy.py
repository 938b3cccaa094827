"""What an operator writes about rollouts: steps, test, guardrails, who must agree. Only shapes and their checks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from router.policy import Duration, Factor, Fraction, PositiveDuration, Text, Written, fault


class Stage(Written):
    """One step of a rollout: one of `share`, `shadow`, `pause` and `analysis`."""

    share: float | None = Field(None, gt=0, le=1, description="Share of sessions that the challenger gets at most.")
    shadow: float | None = Field(
        None, gt=0, le=1, description="Share of requests of which the challenger gets a copy; nobody sees its answers."
    )
    pause: Literal[True] | PositiveDuration | None = Field(
        None, description="Wait that long, or (true) until an operator resumes."
    )
    analysis: Literal["not_worse", "better"] | None = Field(
        None, description="Wait until the test says that the challenger is not worse (beyond margin), or better."
    )
    min_sessions: int = Field(
        200, ge=0, description="Judged sessions of the challenger (answers, in a shadow) to see before the next step."
    )
    min_time: Duration = Field(3600.0, description="Time to spend before the next step.")

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Stage:
        said = [kind for kind in STEPS if getattr(self, kind) is not None]
        if len(said) != 1:
            raise ValueError(f"must have one of {', '.join(STEPS)}; write {{share: 0.05}}, say")
        return self

    @property
    def kind(self) -> StepKind:
        return next(kind for kind in STEPS if getattr(self, kind) is not None)


HALF = 0.5
"""The share above which a challenger must be shown to be no worse."""
StepKind = Literal["share", "shadow", "pause", "analysis"]
STEPS: tuple[StepKind, ...] = ("share", "shadow", "pause", "analysis")

Metric = Literal[
    "error_rate",
    "latency_p50",
    "latency_p95",
    "latency_p99",
    "first_byte_p50",
    "first_byte_p95",
    "first_byte_p99",
    "satisfaction",
    "flag_rate",
    "signal_rate",
    "sample_ratio",
]


class Guardrail(Written):
    """A limit that stops a rollout at once."""

    metric: Metric = Field(
        description="What is watched: failed sessions, seconds, sessions with a reward above a half, with a flag, with "
        "any reaction, or whether each arm got the sessions that it was to get."
    )
    worse_by: Factor | None = Field(None, description='Trip when this many times the control\'s, such as "1.5x".')
    above: Duration | None = Field(None, description="Trip above this: seconds of a latency, fraction of a rate.")
    below: Fraction | None = Field(None, description="Trip below this satisfaction or signal rate.")
    action: Literal["rollback", "pause", "warn"] = Field(description="What to do when it trips.")

    @model_validator(mode="after")
    def _has_a_limit_that_fits(self) -> Guardrail:
        if self.metric == "sample_ratio":
            if (self.worse_by, self.above, self.below) != (None, None, None):
                raise ValueError("has no limit to write: any ratio but the one that was drawn trips it")
            return self
        if self.metric in ("satisfaction", "signal_rate"):
            if self.above is not None:
                raise fault("makes no sense of what should be high; write below", "above")
        elif self.below is not None:
            raise fault("makes no sense of what should be low; write above", "below")
        elif self.above is not None and self.above > 1 and self.metric.endswith("_rate"):
            raise fault("is a fraction of sessions; write 0 to 1", "above")
        if self.worse_by is None and self.above is None and self.below is None:
            instead = (
                "below (such as 0.6)" if self.metric in ("satisfaction", "signal_rate") else 'above (such as "2s")'
            )
            raise ValueError(f'has no limit; add worse_by (such as "1.5x") or {instead}')
        return self


class ErrorBudget(Written):
    """How much may fail before no new version is tried."""

    objective: float = Field(0.99, gt=0, lt=1, description="Share of requests that must be answered.")
    window: PositiveDuration = Field(28 * 86400.0, description="Over this time.")


GUARDRAILS = (
    Guardrail(metric="error_rate", worse_by=1.5, action="rollback"),
    Guardrail(metric="latency_p95", worse_by=2.0, action="rollback"),
    Guardrail(metric="flag_rate", worse_by=2.0, action="rollback"),
    Guardrail(metric="signal_rate", worse_by=1.5, action="pause"),
    Guardrail(metric="sample_ratio", action="pause"),
)


class Rollout(Written):
    """How a challenger earns traffic."""

    stages: tuple[Stage, ...] = Field(
        (Stage(shadow=0.1, min_time=600.0), Stage(share=0.05), Stage(share=0.2), Stage(share=0.5), Stage(share=1.0)),
        min_length=1,
        description="Steps, with rising shares: {shadow: 0.1}, {share: 0.05}, {pause: 1h}, {analysis: better}.",
    )
    alpha: float = Field(0.05, gt=0, lt=1, description="Chance of a wrong decision that is accepted.")
    margin: float = Field(0.02, ge=0, lt=1, description="Loss of reward that is too small to matter.")
    guardrails: tuple[Guardrail, ...] = Field(GUARDRAILS, description="Limits that stop a rollout at once.")
    patience: PositiveDuration = Field(
        14 * 86400.0, description="How long a step may stay undecided before the rollout pauses for an operator."
    )
    require_approval: tuple[Literal["begin", "promote"], ...] = Field(
        (), description="What waits for somebody with an admin key."
    )
    error_budget: ErrorBudget | None = Field(
        None, description="Nothing begins or goes on while more failed than this allows; null for no budget."
    )
    interval: PositiveDuration = Field(1.0, description="How often a rollout is looked at.")
    webhook: Text | None = Field(
        None, repr=False, description="URL that is told of every decision and every guardrail that trips (POST, JSON)."
    )

    @field_validator("stages")
    @classmethod
    def _shares_rise(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        last = 0.0
        for place, stage in enumerate(stages):
            if stage.shadow is not None and last:
                raise fault("comes after the challenger is in canary; put it first", str(place), "shadow")
            if stage.share is not None and stage.share <= last:
                raise fault(f"does not rise; make it more than the {last:g} before it", str(place), "share")
            last = stage.share or last
        first = next((place for place, stage in enumerate(stages) if stage.share is not None), None)
        if first is not None and (stages[first].share or 0.0) > HALF:
            raise fault(
                f"gives more than half before anything is proven; begin with {HALF:g} or less", str(first), "share"
            )
        if not last:
            raise ValueError("give the challenger no share of sessions; add {share: 0.05}, say")
        return stages
