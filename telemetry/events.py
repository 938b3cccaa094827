"""The facts: what happened, as immutable records. Everything else is computed from these.

An `Interaction` is one request and its answer; a `Signal` is one thing a user (or a business system) did about an
answer or a session; a `Shadow` is what a challenger would have answered; a `Decision` is a step of a rollout. None is
ever changed: a later signal with the same `event_id`, or about the same (answer, kind, subject), counts instead of the
earlier one, and both stay on record.

Times are Unix seconds (float), durations are seconds, all ids are opaque strings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec

SIGNAL_KINDS = frozenset(
    [
        "thumb",
        "rating",
        "correction",
        "comparison",
        "comment",
        "flag",
        "survey",
        "copy",
        "edit",
        "accept",
        "retry",
        "regenerate",
        "abandon",
        "dwell",
        "first_action",
        "escalation",
        "outcome",
        "user_edit",
        "rephrase",
        "complaint",
        "thanks",
        "stop",
        "poll",
        "session_length",
    ]
)

DETECTED_ONLY = frozenset(["poll", "session_length"])
"""Kinds that nobody can report."""


OPERATIONS: dict[str, str] = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "responses": "chat",
    "embeddings": "embeddings",
}
"""Endpoint → what the conventions for generative AI call the operation."""


class Answerer(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Which arm answered and with what probability it had been drawn."""

    arm: str
    model: str
    """The version at the upstream, by its immutable name."""
    prompt_version: str | None = None
    policy: str = ""
    """Kind of policy that drew (`thompson`, `split`) or `pinned` when an operator named the arm."""
    snapshot: int = 0
    """Version of the weights drawn from; 0 before the first one."""
    segment: str = ""
    propensity: float = 1.0
    holdout: bool = False
    recalled: bool = False
    """The session had this arm already; `propensity` is that of its first draw."""
    rollout: str = ""
    """The rollout that the session takes part in: it drew the challenger or the control."""
    rival: float = 0.0
    """Of such a session: the probability with which it would have drawn the other one of the two."""
    unopposed: bool = False
    """No replica served the rollout's challenger: the request counts for neither of the two."""


class Thread(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Keyed hashes by which the request is found that a later one continues; see `telemetry.threads`."""

    asked: str
    said: str
    exchange: str = ""
    after_asked: str = ""
    after_said: str = ""
    after_exchange: str = ""
    others: tuple[str, ...] = ()
    """`said` for each of the choices beside the first, whichever the app goes on from."""


class Interaction(msgspec.Struct, frozen=True, tag="interaction", tag_field="type", omit_defaults=True):
    """One request, its answer, and everything needed to learn from it later (one row of the event schema)."""

    event_id: str
    at: float
    request_id: str
    """Ours, sent upstream as X-Request-Id; the answer's id contains it when the upstream is vLLM."""
    route: str
    tenant: str
    session: str
    answerer: Answerer
    endpoint: str = "chat/completions"
    response_id: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    parent_span_id: str | None = None
    user: str | None = None
    """Pseudonym: a keyed hash of what the app called the user."""
    task_type: str | None = None
    task_id: str | None = None
    input_hash: str | None = None
    """Keyed hash of the conversation as sent; equal inputs of one tenant have equal hashes."""
    thread: Thread | None = None
    previous: str | None = None
    """The answer that the app says it continues (`previous_response_id`)."""
    turn: int = 0
    """How many earlier assistant turns the request carried."""
    knowledge_version: str | None = None
    retrieval_ids: tuple[str, ...] = ()
    country: str | None = None
    consent: str | None = None
    """Scope the user agreed to (`none`, `serve`, `train`); None where the app did not say."""
    stream: bool = False
    status: int = 0
    """HTTP status the client saw; 0 when it left before any."""
    error: str | None = None
    """None for a complete answer; else `client_left`, `upstream_refused`, `upstream_timeout`, `upstream_cut`,
    `upstream_garbage`, `upstream_error` (its own 4xx or 5xx) or `internal`."""
    finish_reason: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    first_byte: float | None = None
    duration: float = 0.0
    client_latency: float | None = None
    """As the app measured it, when it says so."""
    escalated: bool = False
    """The app says that a person takes over the conversation here."""
    sdk_retry: int = 0
    """`x-stainless-retry-count`: above 0 the SDK asked again, not the user."""
    upstream: str | None = None
    attempts: int = 1
    choices: int = 1
    """How many answers there were to choose from (`n`); the first one is kept."""
    redacted: tuple[str, ...] = ()
    """Which recognisers removed something, or `off` when no text is kept."""
    messages: Any = None
    """What was asked, as JSON; the app's own `messages`, `input` or `prompt`."""
    answer: str | None = None
    tool_calls: Any = None


class Unread(Interaction, frozen=True, tag="interaction", tag_field="type", omit_defaults=True, gc=False):
    """An interaction whose `messages` are JSON still, to be read by `telemetry.wording.turns` if anybody asks.

    Reading them makes objects of all that was said before, and most are never looked at.
    """

    messages: msgspec.Raw = None  # type: ignore[assignment]


class Signal(msgspec.Struct, frozen=True, tag="signal", tag_field="type", omit_defaults=True):
    """One observed behaviour, vote or outcome about one answer (or a whole session)."""

    event_id: str
    at: float
    kind: str
    tenant: str
    received_at: float = 0.0
    response_id: str | None = None
    """The answer's OpenAI id, or our request id."""
    trace_id: str | None = None
    session: str | None = None
    subject: str | None = None
    """Pseudonym of who gave it; one subject has one vote of a kind on an answer."""
    value: float | None = None
    """Number in the kind's own unit: thumb 1/0, rating 1-5, dwell in seconds, outcome as named."""
    name: str | None = None
    """Of an outcome."""
    text: str | None = None
    target: Any = None
    """What part of the answer it is about, or a comparison's winner and loser, as the client sent it."""
    source: str = "callback"
    """`callback` by an app's key, `token` by whoever holds an answer's feedback token, `detected`, `otlp`."""
    detector: str | None = None
    confidence: float = 1.0
    reason: str | None = None
    verified: bool = False
    """A feedback token or an API key vouches that the subject may speak for this answer."""


class Shadow(msgspec.Struct, frozen=True, tag="shadow", tag_field="type", omit_defaults=True):
    """A challenger's answer to a copy of a real request, never shown to anyone, beside the one that was."""

    event_id: str
    at: float
    route: str
    tenant: str
    rollout: str
    model: str
    """The challenger's version."""
    of: str
    """`request_id` of the interaction whose request was copied."""
    user: str | None = None
    """Pseudonym, as the interaction has it."""
    error: str | None = None
    """As of an `Interaction`."""
    duration: float = 0.0
    first_byte: float | None = None
    tokens_out: int | None = None
    characters: int = 0
    """Of the answer's text."""
    finish_reason: str | None = None
    shown_error: str | None = None
    """This and what follows: of the answer that was shown."""
    shown_duration: float = 0.0
    shown_first_byte: float | None = None
    shown_tokens_out: int | None = None
    shown_characters: int = 0
    redacted: tuple[str, ...] = ()
    """As of an `Interaction`."""
    answer: str | None = None
    tool_calls: Any = None


class Decision(msgspec.Struct, frozen=True, tag="decision", tag_field="type", omit_defaults=True):
    """A step of a route's rollout: who decided it, by which policy, and on what evidence."""

    event_id: str
    """The same for the same step, so that one told twice is one."""
    at: float
    route: str
    rollout: str
    number: int
    """Of the rollout's decisions, from 1."""
    verb: str
    """`begin`, `advance`, `pause`, `resume`, `promote`, `promoted`, `rollback`, `rolled_back` or `undo`."""
    actor: str
    """`controller`, `learner`, or who asked for it."""
    why: str = ""
    phase: str = ""
    """That the rollout is in from here on."""
    step: int = 0
    challenger: str = ""
    control: str = ""
    policy: str = ""
    """Digest of the rollout's policy."""
    evidence: dict[str, Any] = {}
    tenant: str = ""
    """Nobody's: a route's rollout is for all of its tenants."""


Fact = Interaction | Signal | Shadow | Decision

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Fact] = msgspec.json.Decoder(Fact)
_skimmer: msgspec.json.Decoder[Fact] = msgspec.json.Decoder(Unread | Signal | Shadow | Decision)


def answer_name(response_id: str) -> str:
    """The name that an answer is kept under: our request id where its own id ends with one, else its own id.

    vLLM writes ours after a prefix, which depends on the endpoint ("chatcmpl-…", "resp_…").
    """
    own = response_id.replace("_", "-").rpartition("-")[2]
    return own if len(own) >= 6 and not own.strip("0123456789abcdef") else response_id


REPLACED = "replaced"
"""The kind of a signal in whose place another one came, under its event id."""
ELSEWHERE = "elsewhere"
"""What stands for a signal at answers of its trace, that it may have been about until it was known better."""


def names_of(answer: Interaction) -> list[str]:
    """All names by which a signal may speak of the answer itself."""
    own, given = answer.request_id, answer.response_id
    if not given or given == own:
        return [own]
    name = answer_name(given)
    return [own, given] if name in (own, given) else [own, given, name]


def encode(fact: Fact) -> bytes:
    """The fact as JSON, its type under `type`."""
    return _encoder.encode(fact)


def decode(body: bytes) -> Fact:
    return _decoder.decode(body)


def skim(body: bytes) -> Fact:
    """As `decode`, but an interaction is `Unread`."""
    return _skimmer.decode(body)


def to_dict(fact: Fact) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.json.decode(encode(fact))
    return built


def new_id() -> str:
    """128-bit id, hex, whose first 48 bits are milliseconds, so ids sort by time (as UUIDv7 does)."""
    return f"{int(time.time() * 1000):012x}{random_hex()}"


_drawn: Iterator[str] = iter(())


def random_hex() -> str:
    """80 random bits, hex. The system is asked for many at once: a call of it costs more than all else in an id."""
    global _drawn
    while True:
        try:
            return next(_drawn)  # one step of the interpreter: no two threads get the same
        except StopIteration:
            many = os.urandom(10 * 256).hex()
            _drawn = iter([many[at : at + 20] for at in range(0, len(many), 20)])


def _forget_drawn() -> None:
    global _drawn
    _drawn = iter(())


os.register_at_fork(after_in_child=_forget_drawn)
