"""The one config file: read once, checked whole, immutable after.

`load` gives `Settings` or one `ConfigError` that names every problem by line and key; the rest is for the
command line to print.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from learner.plan import Learner
from router.policy import (
    Arm,
    FrozenMap,
    Learned,
    Name,
    Policy,
    PositiveDuration,
    Reward,
    Split,
    Text,
    Thompson,
    Written,
    fault,
    least_share,
)
from router.rollout_policy import Rollout
from telemetry.privacy import RECOGNISERS, Level, Recogniser
from understudy.config_text import ConfigError, Problem, dotted, problems_of, read

__all__ = [
    "STARTER",
    "Admin",
    "Auth",
    "Capture",
    "ConfigError",
    "Explained",
    "Listen",
    "Otel",
    "Problem",
    "Route",
    "Settings",
    "Timeouts",
    "Upstream",
    "accepted_but_unused",
    "check",
    "digest",
    "explain",
    "load",
    "schema",
]

MASK = "***"
_FREE = frozenset({"params", "train"})
_SIZES = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
_SECRET_KEY = re.compile(r"api[-_]?key|secret|passw|authorization|(^|[-_])token$|cookie|webhook", re.IGNORECASE)
_DEFAULT_JOURNAL = Path("understudy.db")


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?b)?\s*", value, re.IGNORECASE)
    if match:
        return int(float(match[1]) * _SIZES[(match[2] or "").lower().replace("i", "")])
    raise ValueError('not a size; write one like "64KB", "10MB" or "1GB", or a number of bytes')


def _web_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # raises where it is no number
    except ValueError:
        raise ValueError("not a URL; write one like http://127.0.0.1:8000") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://; write one like http://127.0.0.1:8000")
    if not parts.hostname:
        raise ValueError("names no host; write one like http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ValueError("carries a user or password; put the secret in api_key instead")
    if parts.query or parts.fragment:
        raise ValueError("carries a query; write only scheme, host, port and path")
    return url.strip().rstrip("/")


def _upstream_url(url: str) -> str:
    return _web_url(url).removesuffix("/v1").rstrip("/")


def _state_url(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    if scheme == "sqlite" and colon:
        if not rest.startswith("/") or len(rest) < 2:
            raise ValueError("names no file; write three slashes and a path: sqlite:///understudy.db")
    elif scheme in ("redis", "rediss"):
        try:
            parts = urlsplit(url)
            named = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            named = False
        if not named:
            raise ValueError(f"names no host; write one like {scheme}://localhost:6379/0")
    elif scheme != "unix" or not rest.startswith("/"):
        raise ValueError(
            "not a state URL; write sqlite:///path, redis://host:6379/0, rediss://host:6379/0 or unix:///socket"
        )
    return url


def _archive_url(url: str) -> str:
    if re.match(r"[a-z][a-z0-9+.-]*://.", url):
        return url
    raise ValueError("not a URL; write one like s3://bucket/understudy or file:///var/lib/understudy")


Bytes = Annotated[int, Field(gt=0), BeforeValidator(_size, json_schema_input_type=str | int)]
WebUrl = Annotated[str, AfterValidator(_web_url)]


class Listen(Written):
    """Where apps reach the gateway."""

    host: Text = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(4000, ge=0, le=65535, description="Port to listen on; 0 for any free one.")
    workers: int = Field(1, ge=1, description="Processes that share the port.")
    max_body: Bytes = Field(32 << 20, description="Largest request body taken (1MB is 1024 × 1024 bytes).")
    max_header_bytes: Bytes = Field(64 << 10, description="Largest request head taken.")
    try_page: bool = Field(True, description="Serve the example chat at /ui/try.")


class Admin(Written):
    """Where the operator sees rollouts: /ui/rollout and /admin/rollout."""

    host: Text = Field("127.0.0.1", description="Address of the admin listener; it asks for no key: keep it private.")
    port: int = Field(4001, ge=0, le=65535, description="Port of the admin listener; 0 for any free one.")


class Capture(Written):
    """Which text is kept."""

    text: Level = Field(
        "full", description="Keep prompts and answers as they are, with personal data masked, or not at all."
    )
    retention: PositiveDuration = Field(30 * 86400.0, description="How long text is kept.")
    redact: tuple[Recogniser, ...] = Field(RECOGNISERS, description="What is masked where text is redacted.")
    tenants: FrozenMap[Name, Level] = Field(
        default={}, description="Text kept of a tenant; where its route says something too, the stricter holds."
    )


class Auth(Written):
    """Who may send requests, and how much feedback."""

    require_key: bool = Field(False, description="Refuse requests without a key made by `understudy keys create`.")
    feedback_per_minute: float = Field(
        120.0, gt=0, description="Items that one user may give, or that may be given on one answer, at each worker."
    )


class Otel(Written):
    """Where spans and log records go."""

    endpoint: WebUrl | None = Field(
        None,
        description="OTLP/HTTP base URL of a collector; OTEL_EXPORTER_OTLP_ENDPOINT where it is not written.",
    )


class Upstream(Written):
    """One OpenAI-compatible server, such as a vLLM replica."""

    url: Annotated[str, AfterValidator(_upstream_url)] = Field(description="Its base URL, with or without /v1.")
    api_key: Text | None = Field(None, repr=False, description="Key sent to it; write it as ${NAME}.")


class Timeouts(Written):
    """How long an upstream may take."""

    connect: PositiveDuration = Field(2.0, description="To accept a connection.")
    first_byte: PositiveDuration = Field(60.0, description="From the request's end to the answer's first byte.")
    idle: PositiveDuration = Field(60.0, description="Between two pieces of an answer.")


def _written_short(value: object) -> object:
    return {"url": value} if isinstance(value, str) else value


def _share(arm: str) -> tuple[str, ...]:
    return "arms", arm, "max_share"


class Route(Written):
    """A model name that apps ask for, and who may answer."""

    upstreams: tuple[
        Annotated[Upstream, BeforeValidator(_written_short, json_schema_input_type=str | Upstream)], ...
    ] = Field((), description="Servers that each serve every arm: URLs, or {url, api_key}.")
    arms: FrozenMap[Name, Arm] = Field(min_length=1, description="Candidates by name; at least one.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="How long an upstream may take.")
    capture: Level | None = Field(None, description="Text kept on this route; null for capture.text.")
    reward: Reward = Field(default_factory=Reward, description="How a session's signals become one number.")
    policy: Policy = Field(default_factory=Thompson, description="How an arm is picked for a session.")
    rollout: Rollout | None = Field(None, description="How a challenger earns traffic; null for no rollouts.")
    learner: Learner | None = Field(None, description="How challengers are trained; null for no training.")

    @model_validator(mode="after")
    def _upstreams_serve_the_arms(self) -> Route:
        if not self.upstreams and (homeless := [name for name, arm in self.arms.items() if arm.provider is None]):
            raise fault(f'arm "{homeless[0]}" has nowhere to go; add upstreams: [http://127.0.0.1:8000]', "upstreams")
        urls = [upstream.url for upstream in self.upstreams]
        for place, url in enumerate(urls):
            if url in urls[:place]:
                raise fault("written twice; list each upstream once", "upstreams", str(place))
        return self

    @model_validator(mode="after")
    def _challengers_have_somewhere_to_be_served(self) -> Route:
        if self.learner is not None and not self.upstreams:
            raise fault("makes versions for vLLM; add upstreams: [http://127.0.0.1:8000]", "learner")
        return self

    @model_validator(mode="after")
    def _webhook_can_be_told(self) -> Route:
        url = urlsplit(self.rollout.webhook) if self.rollout is not None and self.rollout.webhook else None
        if url is not None and (url.scheme not in ("http", "https") or not url.hostname):
            raise fault("is no web URL; write one like https://example.org/hook", "rollout", "webhook")
        if url is not None and (url.username or url.password):
            raise fault("carries a user or password, which would be told to logs; use a path", "rollout", "webhook")
        return self

    @model_validator(mode="after")
    def _policy_fits_the_arms(self) -> Route:
        if isinstance(self.policy, Split):
            for name in self.policy.shares:
                if name not in self.arms:
                    known = ", ".join(self.arms)
                    raise fault(f"no arm of that name; the arms here are {known}", "policy", "shares", name)
        elif self.policy.floor * len(self.arms) > 1:
            most = 1 / len(self.arms)
            raise fault(
                f"a floor of {self.policy.floor:g} for {len(self.arms)} arms is more than 1; "
                f"lower it to {int(most * 1000) / 1000:g} or less",
                "policy",
                "floor",
            )
        return self

    @model_validator(mode="after")
    def _most_shares_can_be_met(self) -> Route:
        most = {name: arm.max_share for name, arm in self.arms.items()}
        if sum(most.values()) < 1:
            first = next(iter(most))
            raise fault(f"the arms' largest shares sum to {sum(most.values()):g}; make them 1 or more", *_share(first))
        for name, share in most.items():
            if isinstance(self.policy, Split):
                if self.policy.shares.get(name, 0.0) > share:
                    raise fault(f"is less than the {self.policy.shares[name]:g} that the policy gives", *_share(name))
            elif share < (least := least_share(self.policy, len(self.arms))) - 1e-9:
                raise fault(f"is less than floor and holdout give; write {least:.3f} or more", *_share(name))
        return self

    @model_validator(mode="after")
    def _costs_are_known(self) -> Route:
        for name, arm in self.arms.items() if self.reward.cost else ():
            if arm.price is None:
                raise fault("is needed by reward.cost; write what a million tokens cost", "arms", name, "price")
        return self

    @model_validator(mode="after")
    def _arms_descend(self) -> Route:
        for name in self.arms:
            seen, arm = {name}, self.arms[name].parent
            while arm in self.arms:
                if arm in seen:
                    raise fault("descends from itself; name the arm that it was made from", "arms", name, "parent")
                seen.add(arm)
                arm = self.arms[arm].parent
        return self


class Settings(Written):
    """Everything in understudy.yaml."""

    listen: Listen = Field(default_factory=Listen, description="Where apps reach the gateway.")
    state: Annotated[str, AfterValidator(_state_url)] = Field(
        "sqlite:///understudy.db",
        repr=False,
        description="Where state is kept: sqlite:///path for one machine, or redis://, rediss://, unix://.",
    )
    journal: Path | None = Field(
        None, description="SQLite file of the journal; null for the state's own file, else ./understudy.db."
    )
    archive: Annotated[str, AfterValidator(_archive_url)] | None = Field(
        None, repr=False, description="Where Parquet files of facts go: s3://bucket/folder or file:///folder."
    )
    capture: Capture = Field(default_factory=Capture, description="Which text is kept.")
    auth: Auth = Field(default_factory=Auth, description="Who may send requests.")
    admin: Admin | None = Field(
        default_factory=Admin, description="Where the operator sees rollouts; null for no such listener."
    )
    otel: Otel = Field(default_factory=Otel, description="Where spans and log records go.")
    routes: FrozenMap[Name, Route] = Field(min_length=1, description="Model names that apps ask for; at least one.")

    @model_validator(mode="after")
    def _prompts_are_kept_to_be_learned_from(self) -> Settings:
        for name, route in self.routes.items():
            by_prompt = isinstance(route.policy, Learned) and route.policy.segment_by == "prompt"
            if by_prompt and (route.capture or self.capture.text) == "off":
                at = ("routes", name, "policy", "segment_by")
                raise fault("learns from prompts that are kept, and none are; keep them redacted", *at)
        return self

    @property
    def sqlite_path(self) -> Path | None:
        """The state's file, or None where state is in Redis; relative unless written with four slashes."""
        prefix = "sqlite:///"
        return Path(self.state.removeprefix(prefix)) if self.state.startswith(prefix) else None

    @property
    def journal_path(self) -> Path:
        return self.journal or self.sqlite_path or _DEFAULT_JOURNAL


class Explained(NamedTuple):
    """One key: its value as JSON would hold it, secrets masked, and whether the file set it."""

    key: str
    value: Any
    meaning: str
    source: Literal["set", "default"]


def load(path: str | Path, env: Mapping[str, str] = os.environ) -> Settings:
    """The settings written at `path`, or ConfigError with every problem found, in the file's order."""
    document = read(path, env, _FREE)
    data = dict(document.data)
    if (endpoint := env.get("OTEL_EXPORTER_OTLP_ENDPOINT")) and isinstance(data.get("otel", {}), dict):
        data["otel"] = {"endpoint": endpoint} | data.get("otel", {})
    settings, problems = None, list(document.problems)
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error, document, schema())
    if problems or settings is None:
        raise ConfigError(path, sorted(dict.fromkeys(problems), key=lambda problem: problem.line))
    return settings


def check(path: str | Path, env: Mapping[str, str] = os.environ) -> list[Problem]:
    """What is wrong with the file at `path`; nothing where it can be used."""
    try:
        load(path, env)
    except ConfigError as error:
        return error.problems
    return []


def schema() -> dict[str, Any]:
    """JSON Schema of the config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Settings.model_json_schema()


def explain(settings: Settings) -> list[Explained]:
    """Every key with its value and meaning, in the order of the config's own shape."""
    return list(_explained(settings, (), written=True))


def _explained(model: BaseModel, key: tuple[str | int, ...], written: bool) -> Iterator[Explained]:
    for name, field in type(model).model_fields.items():
        value, here = getattr(model, name), (*key, name)
        is_set = written and name in model.model_fields_set
        if isinstance(value, BaseModel):
            yield from _explained(value, here, is_set)
            continue
        parts: list[tuple[str | int, Any]] = []
        if isinstance(value, dict):
            parts = list(value.items())
        elif isinstance(value, tuple):
            parts = list(enumerate(value))
        if parts and isinstance(parts[0][1], BaseModel):
            for part, one in parts:
                yield from _explained(one, (*here, part), is_set)
            continue
        plain = _masked(name, model.model_dump(mode="json", include={name})[name])
        yield Explained(dotted(here), plain, field.description or "", "set" if is_set else "default")


def _masked(name: str, value: Any) -> Any:
    if value is not None and _SECRET_KEY.search(name):
        return MASK
    if isinstance(value, dict):
        return {key: _masked(key, below) for key, below in value.items()}
    if isinstance(value, list):
        return [_masked("", below) for below in value]
    if isinstance(value, str) and "://" in value:
        value = re.sub(r"://[^/@\s]*@", f"://{MASK}@", value)
        return re.sub(r"([?&][^=&#\s]*(?:key|secret|passw|token|sig)[^=&#\s]*=)[^&#\s]+", rf"\1{MASK}", value)
    return value


def accepted_but_unused(settings: Settings) -> list[str]:
    """Keys the file sets that this version reads, checks and does not act on yet, as notes."""
    notes = []

    def note(key: str, meanwhile: str) -> None:
        notes.append(f"{key} is accepted, but this version does not act on it yet: {meanwhile}")

    def sets(model: BaseModel, name: str) -> bool:
        return name in model.model_fields_set and getattr(model, name) is not None

    if sets(settings, "archive"):
        note("archive", "facts stay in the journal")
    return notes


def digest(settings: Settings) -> str:
    """SHA-256 of what the settings mean: the same for the same values however they were written."""
    plain = json.dumps(settings.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


STARTER = """\
# Understudy's one config file. Check it with `understudy config check`; see every key with `config explain`.
# A value may refer to the environment: ${NAME}, or ${NAME:-default}.

listen: {host: 127.0.0.1, port: 4000}     # apps use http://127.0.0.1:4000/v1 as their OpenAI base URL

state: sqlite:///understudy.db            # one file holds all; redis://localhost:6379/0 beyond one machine

capture:
  text: full                              # full | redacted | off: which text of prompts and answers is kept
  redact: [email, phone, card, key, iban] # what `redacted` masks

auth:
  require_key: false                      # true: only apps with a key from `understudy keys create` may ask

routes:
  assistant:                              # the model name that your app asks for
    upstreams:                            # vLLM replicas; each serves every arm
      - ${VLLM_URL:-http://127.0.0.1:8000}
    arms:                                 # the candidates: a model, a prompt, parameters
      champion:
        model: base                       # the name vLLM serves it under
      # concise:
      #   model: base
      #   system: Answer in at most three sentences.
      #   params: {temperature: 0.3}
    policy:
      kind: thompson                      # learn who answers; {kind: split, shares: {champion: 1}} fixes it
      floor: 0.02                         # no arm gets less than this share
      holdout: 0.05                       # share drawn evenly, to compare against
    # reward:
    #   signals: {thumb: 1.0, copy: 0.3, edit: -0.4, regenerate: -0.6}
"""
