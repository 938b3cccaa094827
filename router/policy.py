"""What an operator writes about routing: arms, the policy that picks one, rewards, rollout and learner.

Only shapes and their checks. Every model is frozen, knows no unknown key, and says in its message what to do:
a message reads `what is wrong; what to write instead`. Durations become float seconds.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from router.features import DEFAULT as DEFAULT_FEATURES
from router.features import FeatureName
from router.segments import MOST_CLUSTERS

K = TypeVar("K")
V = TypeVar("V")

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|[smhdw])?\s*")
SHARE_TOLERANCE = 1e-6


def seconds(value: object) -> float:
    """Seconds of "500ms", "30s", "10m", "1h", "7d", "2w" or a plain number of seconds.

    Raises ValueError on anything else, negative and endless spans among them.
    """
    number, unit = value, 1.0
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        number, unit = (match[1], _UNITS[match[2] or "s"]) if match else (None, 1.0)
    if isinstance(number, str | int | float) and not isinstance(number, bool):
        try:
            span = float(number) * unit
        except OverflowError:
            span = math.inf
        if 0 <= span < math.inf:
            return span
    raise ValueError('not a duration; write one like "500ms", "30s", "10m", "1h" or "7d", or a number of seconds')


def _positive(span: float) -> float:
    if span > 0:
        return span
    raise ValueError('must be longer than 0; write a duration like "30s", "10m" or "7d"')


def _times(value: object) -> object:
    """1.5 of "1.5x"."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*x?\s*", value)
        if not match:
            raise ValueError('not a factor; write one like "1.5x"')
        return float(match[1])
    return value


def _signal_kind(kind: str) -> str:
    if kind in DEFAULT_SIGNALS:
        return kind
    near = difflib.get_close_matches(kind.lower(), DEFAULT_SIGNALS, 1, 0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"the kinds are {', '.join(DEFAULT_SIGNALS)}"
    raise ValueError(f"unknown signal; {hint}")


def _name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*", name):
        return name
    raise ValueError("not a usable name; start with a letter or digit and use only letters, digits and . _ : / @ + -")


def fault(text: str, *at: str) -> PydanticCustomError:
    """An error to raise in a model's validator about the key at `at` below that model."""
    return PydanticCustomError("config", "{text}", {"text": text, "at": at})


class FrozenDict(dict[K, V]):
    """A dict that cannot be changed; copies, pickles and encodes as a dict does."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("configuration is immutable; build a new one with model_copy or load")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict[K, V]], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


# What a person says outright counts most; what is only inferred from behaviour counts less.
DEFAULT_SIGNALS: dict[str, float] = FrozenDict(
    {
        "thumb": 1.0,
        "rating": 1.0,
        "comparison": 1.0,
        "copy": 0.3,
        "accept": 0.5,
        "edit": -0.4,
        "correction": -0.6,
        "flag": -1.0,
        "regenerate": -0.6,
        "retry": -0.6,
        "user_edit": -0.3,
        "rephrase": -0.4,
        "complaint": -0.6,
        "thanks": 0.5,
        "stop": -0.3,
        "abandon": -0.3,
        "escalation": -0.6,
    }
)

FrozenMap = Annotated[dict[K, V], AfterValidator(FrozenDict)]
Duration = Annotated[float, BeforeValidator(seconds, json_schema_input_type=str | float)]
PositiveDuration = Annotated[Duration, AfterValidator(_positive)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=-1, le=1)]
Factor = Annotated[float, Field(gt=1), BeforeValidator(_times, json_schema_input_type=str | float)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(_name)]
SignalKind = Annotated[str, AfterValidator(_signal_kind)]


class Written(BaseModel):
    """Base of everything an operator writes."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class Price(Written):
    """What a model's tokens cost, in any one currency."""

    input: float = Field(0.0, ge=0, description="Of a million tokens in.")
    output: float = Field(0.0, ge=0, description="Of a million tokens out.")


class Arm(Written):
    """One candidate answerer on a route: a model version × a prompt version × parameters."""

    model: Text = Field(description="The model's name at the upstream (or at the provider).")
    provider: Text | None = Field(
        None, description='litellm provider prefix such as "openai"; null means the route\'s own upstreams.'
    )
    api_key: Text | None = Field(None, repr=False, description="Key for the provider; write it as ${NAME}.")
    api_base: Text | None = Field(None, description="Base URL of the provider where it is not the usual one.")
    system: str | None = Field(None, description="System prompt that replaces the app's leading system message.")
    prompt_version: Text | None = Field(None, description="Name under which this arm's prompt is reported.")
    params: FrozenMap[str, Any] = Field(
        default={}, description="Request fields that override the app's, such as temperature or max_tokens."
    )
    parent: Name | None = Field(
        None, description="The arm, still served or not, that this one was made from: it is expected to be like it."
    )
    gain: float = Field(
        0.0, ge=-1, le=1, description="How much more reward than its parent this arm is expected to bring."
    )
    price: Price | None = Field(None, description="What the model's tokens cost; for reward.cost.")
    max_share: float = Field(1.0, gt=0, le=1, description="Largest share of sessions this arm may get.")

    @field_validator("params")
    @classmethod
    def _params_leave_the_request_whole(cls, params: dict[str, Any]) -> dict[str, Any]:
        for key, instead in {
            "model": "write it as the arm's own model",
            "messages": "set system to change the prompt",
            "stream": "the app decides whether to stream",
        }.items():
            if key in params:
                raise fault(f"cannot be overridden; {instead}", key)
        return params

    @model_validator(mode="after")
    def _provider_fields_need_a_provider(self) -> Arm:
        for key in ("api_key", "api_base"):
            if self.provider is None and getattr(self, key) is not None:
                raise fault("needs a provider; set provider beside it, or put url and api_key under upstreams", key)
        return self

    @model_validator(mode="after")
    def _a_gain_needs_a_parent(self) -> Arm:
        if self.gain and self.parent is None:
            raise fault("is over a parent; write parent beside it", "gain")
        return self


class Prior(Written):
    """What is believed of an arm before it was heard."""

    mean: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Reward expected of an arm nobody has judged, 0 to 1; null means as good as the others.",
    )
    mass: float = Field(20.0, gt=0, description="How many sessions that belief is worth.")


class Prompts(Written):
    """How prompts are told apart, where they are segments."""

    clusters: int | None = Field(
        None,
        ge=2,
        le=MOST_CLUSTERS,
        description="How many clusters; null for as many as halves of the prompts agree on.",
    )
    refit: PositiveDuration = Field(86400.0, description="How often they are learned anew from the journal.")


class Learned(Written):
    """What all policies share that learn from rewards."""

    unit: Literal["session"] = Field("session", description="What is assigned to an arm and rewarded as one.")
    segment_by: Literal["task_type", "tenant", "prompt"] | None = Field(
        None,
        description="Learn the shares of each task type, tenant or cluster of prompts apart, pooled with its siblings.",
    )
    prompts: Prompts = Field(default_factory=Prompts, description="How prompts are told apart, by segment_by: prompt.")
    max_segments: int = Field(
        1000, ge=1, le=100_000, description="How many segments get shares of their own; those with most evidence do."
    )
    half_life: PositiveDuration = Field(7 * 86400.0, description="Age at which a reward counts half.")
    refresh: PositiveDuration = Field(1.0, description="How often new weights are published.")
    floor: Fraction = Field(0.02, description="Smallest share of any arm, so that each goes on being measured.")
    holdout: float = Field(
        0.05, ge=0, lt=1, description="Share of sessions drawn evenly over the arms, to compare against."
    )
    prior: Prior = Field(default_factory=Prior, description="Belief about an arm before evidence.")


def least_share(policy: Learned, arms: int) -> float:
    """What any of so many arms gets at least, floor and holdout together."""
    return (1.0 - policy.holdout) * policy.floor + policy.holdout / arms


class Thompson(Learned):
    """Draw each arm with the probability that it is the best one."""

    kind: Literal["thompson"] = Field("thompson", description="Learn the shares from rewards.")


class TopTwo(Learned):
    """Thompson sampling that also tries the runner-up, to tell the two best arms apart sooner."""

    kind: Literal["top_two"] = Field(description="Learn the shares; spend more on the runner-up.")
    beta: float = Field(0.5, gt=0, le=1, description="Share of draws that keep the first draw; 1 is thompson.")


class Epsilon(Learned):
    """The arm that looks best now, and any arm once in a while."""

    kind: Literal["epsilon"] = Field(description="Serve the best-looking arm; a fixed share explores.")
    epsilon: Fraction = Field(0.1, description="Share of sessions drawn evenly over all arms.")


class Linear(Learned):
    """Thompson sampling where an arm's reward is a linear function of what a request is like."""

    kind: Literal["linear"] = Field(description="Learn the shares of each kind of request, told from its features.")
    segment_by: Literal["features"] = Field(  # type: ignore[assignment]
        "features", description="A session's segment is the kind of its first request."
    )
    features: tuple[FeatureName, ...] = Field(
        DEFAULT_FEATURES, min_length=1, description="What tells kinds of requests apart."
    )

    @field_validator("features")
    @classmethod
    def _features_differ(cls, features: tuple[FeatureName, ...]) -> tuple[FeatureName, ...]:
        for place, name in enumerate(features):
            if name in features[:place]:
                raise fault("is written twice; keep one of the two", str(place))
        return features


class Split(Written):
    """Fixed shares, for an A/B test."""

    kind: Literal["split"] = Field(description="Keep the shares as written.")
    shares: FrozenMap[str, Fraction] = Field(
        description="Share of sessions of each arm by name; they sum to 1, and an arm left out gets none."
    )
    unit: Literal["session"] = Field("session", description="What is assigned to an arm and rewarded as one.")
    refresh: PositiveDuration = Field(1.0, description="How often new weights are published.")

    @field_validator("shares")
    @classmethod
    def _shares_sum_to_one(cls, shares: dict[str, float]) -> dict[str, float]:
        total = math.fsum(shares.values())
        if abs(total - 1) > SHARE_TOLERANCE:
            raise ValueError(f"the shares sum to {total:.7g}; make them sum to 1")
        return shares


Policy = Annotated[Thompson | TopTwo | Epsilon | Linear | Split, Field(discriminator="kind")]


class Outcome(Written):
    """The business result that a route is for."""

    name: Text = Field(description="Name under which apps report it, as in {kind: outcome, name: resolved, value: 1}.")
    worst: float = Field(0.0, description="The value that is worth nothing; what is beyond counts the same.")
    best: float = Field(1.0, description="The value that is worth everything; below worst where less is better.")

    @model_validator(mode="after")
    def _has_a_scale(self) -> Outcome:
        if self.worst == self.best:
            raise fault("is the same as worst; write the two values between which the outcome lies", "best")
        return self


def _named(written: object) -> object:
    """{"name": X} of "X"."""
    return {"name": written} if isinstance(written, str) else written


OutcomeOrName = Annotated[Outcome, BeforeValidator(_named, json_schema_input_type=str | Outcome)]


class Cost(Written):
    """How dear an answer may be."""

    weight: float | None = Field(
        None, gt=0, description="Reward given up for one unit of the currency that the arms' prices are in."
    )
    budget: float | None = Field(
        None, gt=0, description="What a session may cost on average; the weight that keeps to it is found."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Cost:
        if (self.weight is None) == (self.budget is None):
            raise fault("needs a weight or a budget; write one of them, such as {budget: 0.002}")
        return self


class Latency(Written):
    """How slow an answer may be."""

    weight: float = Field(gt=0, description="Reward given up for one second of a session's mean answer time.")


class Reward(Written):
    """How a session's signals and outcome become one number."""

    window: PositiveDuration = Field(
        600.0,
        description="How long after an answer its users' behaviour is heard, and then counted. "
        "Votes and outcomes count as they come, and later too.",
    )
    signals: FrozenMap[SignalKind, Weight] = Field(
        default=dict(DEFAULT_SIGNALS),
        description="Weight of each signal kind, -1 (bad) to 1 (good). Written, it replaces the whole table: "
        "a kind left out does not count.",
    )
    outcome: OutcomeOrName | None = Field(
        None,
        description="The business outcome that is a session's reward once it is known; until then signals are. "
        "Its name, or a mapping with its scale.",
    )
    escalation_tools: tuple[Text, ...] = Field(
        (), description="Tools by which a model hands over to a person; a call of one is an escalation."
    )
    mode: Literal["fixed", "calibrated"] = Field(
        "fixed",
        description="fixed: signals have the weights written here. calibrated: behaviour counts as what it says of "
        "the votes that other sessions gave, and votes correct that; fixed until there are enough votes.",
    )
    min_votes: int = Field(200, ge=50, description="Sessions with a vote to have before behaviour is calibrated.")
    refit: PositiveDuration = Field(86400.0, description="How often it is calibrated anew.")
    cost: Cost | None = Field(None, description="Weigh what sessions cost against their reward; needs arms' prices.")
    latency: Latency | None = Field(None, description="Weigh how long answers take against the reward.")
