"""From one conversation's facts to votes: who held which answer for better than which other one. Pure.

    comparison                                 a pair; a tie is a vote for neither
    regenerate, whose second answer was        a pair: that one over the first, where the prompt is the same to the byte
      accepted, copied or kept
    edit, correction                           a pair, the user's text over the answer; and a correction (SFT)
    thumb, rating, flag                        a vote on one answer; the votes on a prompt make pairs (`learner.curate`)
    copy, accept, thanks, retained             a weak vote for it
    complaint, rephrase, retry, regenerate     a vote against it, and nothing more: an answer to a rephrased question is
                                               no better answer to the old one

Stops, silence and hand-overs tell how a session went, not what was wrong with a text, so nothing is learned from them
here. Each vote carries the ids of the facts that it comes from.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from learner.examples import Example, Kind, example_id
from learner.people import person
from router.reward import GONE, Heard, counted
from telemetry.events import Interaction, Signal, answer_name, names_of
from telemetry.signals import ANOTHER_TEXT
from telemetry.wording import canonical, grams, likeness

VERDICTS: Mapping[str, float] = {
    "flag": -1.0,
    "complaint": -0.5,
    "rephrase": -0.4,
    "regenerate": -0.4,
    "retry": -0.4,
    "copy": 0.3,
    "accept": 0.5,
    "thanks": 0.3,
}
"""What a behaviour says of an answer, from -1 (bad) to 1; votes say it themselves."""
KEPT = 0.3
RETAINED = 0.97
"""An answer that survived to this share was kept as it was."""
CONSENTS = frozenset(["train"])
TURNS = frozenset(["system", "developer", "user", "assistant", "tool"])


@dataclass(frozen=True, slots=True)
class Rules:
    """Of which answers the text may be learned from."""

    consent_assumed: bool = True
    text_after: float = 0.0
    """Unix seconds: what is older must not be used any more."""


class Vote(NamedTuple):
    """One person's word on one item: on a pair, or on one answer."""

    example: Example
    strength: float
    """0 to 1."""
    tie: bool = False
    """For neither; `chosen` and `rejected` are then in no order."""
    signal: str = ""
    """Id of what they said or did."""
    verified: bool = True
    """A key or a token vouches that they may speak for the answer."""
    owners: tuple[str, ...] = ()
    """Whose sessions the answers are from, beside who votes."""


@dataclass(slots=True)
class Harvest:
    """What a conversation gave."""

    votes: list[Vote] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    """Why answers that were judged cannot be learned from."""


def harvest(
    session: Sequence[Interaction],
    signals: Iterable[Heard],
    rules: Rules,
    elsewhere: Callable[[str, str], Interaction | None] = lambda tenant, name: None,
) -> Harvest:
    """The votes in a session (its requests on one route, oldest first) and in the signals about it.

    `elsewhere`: an answer of (tenant, name) in another session, which one of these was compared with.
    """
    found = Harvest()
    heard = sorted(signals, key=lambda row: (row[1].received_at or row[1].at, row[1].at, row[1].event_id))
    by_name = {name: answer for answer in session for name in names_of(answer)}
    by_event = {answer.event_id: answer for answer in session}
    standing = counted(
        [(place, signal) for place, (_, signal) in enumerate(heard) if signal.kind not in GONE],
        {name: answer.event_id for name, answer in by_name.items()},
    )
    opinions: dict[str, list[Signal]] = {}
    for event, _, signal in standing:
        if event in by_event and signal.kind != "comparison":
            opinions.setdefault(event, []).append(signal)
    usable = _Usable(rules, found.unusable, _silenced(session))
    talk = _Talk(session, opinions)
    for event, about in sorted(opinions.items()):
        answer = by_event[event]
        if any(_speaks(signal) for signal in about) and usable(answer):
            found.votes += _votes_on(answer, about, talk, usable)
    for signal in _last_of_each(heard):
        named = _named(signal)
        answers = [by_name.get(name) or elsewhere(signal.tenant, name) for name in named]
        found.votes += _comparison(signal, [answer for answer in answers if answer is not None], usable)
    return found


class _Talk:
    """A session, and what was said of its answers."""

    def __init__(self, session: Sequence[Interaction], opinions: Mapping[str, Sequence[Signal]]) -> None:
        self.session = session
        self.opinions = opinions
        self.by_event = {one.event_id: one for one in session}

    @cached_property
    def asked_again(self) -> dict[bytes, list[Interaction]]:
        """Requests by their messages, to the byte."""
        found: dict[bytes, list[Interaction]] = {}
        for one in self.session:
            found.setdefault(msgspec.json.encode(one.messages), []).append(one)
        return found


def _votes_on(answer: Interaction, about: Sequence[Signal], talk: _Talk, usable: _Usable) -> Iterator[Vote]:
    for signal in about:
        if (text := _put_right(signal, answer)) is not None:
            source = talk.by_event.get(_told_by(signal))
            if signal.source == "detected" and (source is None or not usable.agreed(source)):
                continue  # the text stood in a later request, whose user must agree, too
            came_with = (source.event_id,) if source is not None else ()
            for kind in ("pair", "correction"):
                rejected = answer.answer if kind == "pair" else None
                yield _vote(kind, signal.kind, (answer,), signal, text, rejected, 1.0, usable, came_with)
            continue
        second = _second(signal, answer, talk) if signal.kind == "regenerate" else None
        if second is not None and usable(second):
            accepted, strength = _acceptance(second, talk)
            if accepted is not None:
                both = (second, answer)
                yield _vote(
                    "pair", "regenerate", both, signal, second.answer, answer.answer, strength, usable, accepted
                )
                continue
        verdict = _verdict(signal)
        if verdict:
            reason = "retained" if signal.kind == "edit" else signal.kind
            chosen, rejected = (answer.answer, None) if verdict > 0 else (None, answer.answer)
            yield _vote("unpaired", reason, (answer,), signal, chosen, rejected, abs(verdict), usable)


def _told_by(signal: Signal) -> str:
    """The request that a detected signal was seen in."""
    return signal.event_id.partition(":")[2]


def _verdict(signal: Signal) -> float:
    """What it says of the answer, -1 to 1; 0 for nothing."""
    match signal.kind:
        case "thumb":
            return 1.0 if signal.value else -1.0
        case "rating":
            return 0.0 if signal.value is None else (signal.value - 3.0) / 2.0
        case "edit":
            return KEPT if signal.value is not None and RETAINED <= signal.value <= 1.0 else 0.0
        case kind:
            return VERDICTS.get(kind, 0.0)


def _speaks(signal: Signal) -> bool:
    return bool(_verdict(signal)) or (signal.kind in ("edit", "correction") and bool(signal.text))


def _put_right(signal: Signal, answer: Interaction) -> str | None:
    """The whole answer as the user would have had it; a piece of it that was edited is not one."""
    if signal.kind not in ("edit", "correction") or not signal.text or signal.target is not None:
        return None
    text = clean(signal.text)
    if signal.kind == "edit" and (signal.value is None or signal.value < RETAINED):
        alike = likeness(grams(canonical(text)), grams(canonical(answer.answer or "")))
        return text if alike >= ANOTHER_TEXT else None
    return text if signal.kind == "correction" and text else None


def _second(signal: Signal, first: Interaction, talk: _Talk) -> Interaction | None:
    """The answer that was asked for in the place of the first, to the same messages to the byte."""
    same = [
        one
        for one in talk.asked_again.get(msgspec.json.encode(first.messages), ())
        if one.at >= first.at and one.event_id != first.event_id
    ]
    named = next((one for one in same if one.event_id == _told_by(signal)), None)
    return named or (same[0] if same and signal.source != "detected" else None)


def _acceptance(answer: Interaction, talk: _Talk) -> tuple[tuple[str, ...] | None, float]:
    """The facts that show that an answer was taken, and how surely; None if nothing does, or one speaks against it."""
    about = [(signal, _verdict(signal)) for signal in talk.opinions.get(answer.event_id, ())]
    if any(verdict < 0 or _put_right(signal, answer) for signal, verdict in about):
        return None, 0.0
    good = [signal for signal, verdict in about if verdict > 0]
    if good:
        return tuple(signal.event_id for signal in good), max(0.5, *(_verdict(signal) for signal in good))
    kept = next((later for later in talk.session if _goes_on_from(later, answer)), None)
    return ((kept.event_id,), 0.5) if kept is not None else (None, 0.0)


def _goes_on_from(later: Interaction, answer: Interaction) -> bool:
    """The conversation went on with the answer as it was given."""
    if later.at <= answer.at or later.event_id == answer.event_id:
        return False
    if later.thread is not None and answer.thread is not None:
        return bool(later.thread.after_said) and later.thread.after_said == answer.thread.said
    asked, said = answer.messages, later.messages
    if not isinstance(asked, list) or not isinstance(said, list) or len(said) < len(asked) + 2:
        return False
    returned = said[len(asked)]
    return said[: len(asked)] == asked and isinstance(returned, dict) and returned.get("content") == answer.answer


def _last_of_each(heard: Iterable[Heard]) -> Iterable[Signal]:
    """Comparisons as users made them, the last one of each event."""
    own = [signal for _, signal in heard if signal.kind == "comparison" and signal.source != "detected"]
    return {(signal.tenant, signal.event_id): signal for signal in own}.values()


def _named(comparison: Signal) -> list[str]:
    """The two answers that a comparison is about, the winner first if there is one."""
    said = comparison.target if isinstance(comparison.target, dict) else {}
    named = said.get("both_bad") or said.get("tie") or [said.get("winner"), said.get("loser")]
    names = [answer_name(name) for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return names if len(names) == 2 else []


def _comparison(signal: Signal, answers: Sequence[Interaction], usable: _Usable) -> Iterator[Vote]:
    if len(answers) != 2 or any(answer.tenant != signal.tenant for answer in answers):
        return
    first, second = answers
    if first.route != second.route or (signal.source == "token" and not _same_person(first, second)):
        return  # who holds one answer's token does not speak for another's
    if not (usable(first) and usable(second)):
        return
    if "both_bad" in signal.target:
        for bad in answers:
            yield _vote("unpaired", "comparison", (bad,), signal, None, bad.answer, 1.0, usable)
    elif usable.prompt(first) != usable.prompt(second):
        usable.unusable["the answers compared have different prompts"] += 1
    else:
        made = _vote("pair", "comparison", (first, second), signal, first.answer, second.answer, 1.0, usable)
        yield made._replace(tie="tie" in signal.target)


def _same_person(first: Interaction, second: Interaction) -> bool:
    return first.session == second.session or (first.user is not None and first.user == second.user)


def _silenced(session: Sequence[Interaction]) -> float:
    """When a session's user first said that it is not to be learned from: what comes later may repeat what was said."""
    return min((one.at for one in session if one.consent not in (None, *CONSENTS)), default=float("inf"))


class _Usable:
    """Whether an answer may and can be learned from; why not is counted, once an answer."""

    def __init__(self, rules: Rules, unusable: Counter[str], silenced: float) -> None:
        self.rules = rules
        self.unusable = unusable
        self._silenced = silenced
        self._known: dict[str, bool] = {}
        self._prompts: dict[str, list[dict[str, Any]] | None] = {}

    def __call__(self, answer: Interaction) -> bool:
        if answer.event_id not in self._known:
            reason = why_not(answer, self.rules) if answer.at < self._silenced else "its user did not agree"
            if reason is not None:
                self.unusable[reason] += 1
            self._known[answer.event_id] = reason is None
        return self._known[answer.event_id]

    def agreed(self, request: Interaction) -> bool:
        """Whether a request's own text may be learned from."""
        return agreed(request, self.rules) and request.at < self._silenced

    def prompt(self, answer: Interaction) -> list[dict[str, Any]]:
        if answer.event_id not in self._prompts:
            self._prompts[answer.event_id] = prompt_of(answer)
        return self._prompts[answer.event_id] or []


def agreed(answer: Interaction, rules: Rules) -> bool:
    """Its user agreed to training, or did not say where that is enough."""
    return answer.consent in CONSENTS or (answer.consent is None and rules.consent_assumed)


def why_not(answer: Interaction, rules: Rules) -> str | None:
    """Why an answer cannot be learned from; None if it can."""
    if not agreed(answer, rules):
        return "its user did not agree"
    if answer.at < rules.text_after:
        return "too old to be kept"
    if answer.error is not None:
        return "the answer failed"
    if answer.tool_calls:
        return "the answer calls tools"
    if not answer.answer or not clean(answer.answer):
        return "no text is kept"
    if answer.finish_reason in ("length", "content_filter"):
        return "the answer was cut"
    if answer.previous is not None:
        return "the conversation before it is not kept with it"
    if answer.choices > 1:
        return "one of several choices"
    return None if prompt_of(answer) is not None else "the prompt is no chat of text"


def prompt_of(answer: Interaction) -> list[dict[str, Any]] | None:
    """What was asked, as chat messages of text in canonical form; None where it is none."""
    messages = answer.messages
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}] if answer.endpoint == "responses" else None
    if not isinstance(messages, list) or not messages:
        return None
    turns = [_turn(message) for message in messages]
    if None in turns or messages[-1].get("role") == "assistant":  # the answer would only end what the app began
        return None
    return turns  # type: ignore[return-value]


def _turn(message: Any) -> dict[str, Any] | None:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in TURNS:
        return None
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        return None
    turn = {"role": role, "content": clean(content) if content is not None else ""}
    more = ("tool_call_id", "name") if role == "tool" else ("tool_calls",)  # a user's name is nobody's business here
    return turn | {key: message[key] for key in more if message.get(key)}


def clean(text: str) -> str:
    """Canonical form of a text to learn: composed (Unicode NFC), one kind of line end, no white space around it."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _vote(
    kind: Kind,
    reason: str,
    answers: tuple[Interaction, ...],
    signal: Signal,
    chosen: str | None,
    rejected: str | None,
    strength: float,
    usable: _Usable,
    more: tuple[str, ...] = (),
) -> Vote:
    judged = answers[-1]
    prompt = usable.prompt(judged)
    chosen, rejected = (clean(text) if text is not None else None for text in (chosen, rejected))
    user = signal.subject or judged.user
    example = Example(
        id=example_id(kind, prompt, chosen, rejected),
        kind=kind,
        messages=prompt,
        reason=reason,
        chosen=chosen,
        rejected=rejected,
        events=tuple(sorted({signal.event_id, *(answer.event_id for answer in answers), *more})),
        route=judged.route,
        tenant=judged.tenant,
        user=user,
        users=(person(judged.tenant, user, judged.session),),
        session=judged.session,
        task_type=judged.task_type,
        country=judged.country,
        at=max(signal.received_at or signal.at, *(answer.at for answer in answers)),
        text_from=min(answer.at for answer in answers),
        arms=tuple(answer.answerer.arm for answer in answers),
        propensity=min(answer.answerer.propensity for answer in answers),
    )
    return Vote(
        example,
        strength * signal.confidence,
        signal=signal.event_id,
        verified=signal.verified,
        owners=tuple(sorted({person(one.tenant, one.user, one.session) for one in answers})),
    )
