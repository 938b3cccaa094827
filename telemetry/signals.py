"""Detectors: what a request tells about an earlier answer, and about its own. Pure functions, each with a version.

`detect` is the way in. Whether a request belongs to an earlier answer is decided elsewhere; here the pair is given:

    the same input again                           regenerate   (at a steady rhythm: poll, which takes those back)
    the same beginning, another last user turn     user_edit
    the earlier input, its answer, and then …      edit         the answer that came back is not the one that was sent
        … a user turn                              complaint, thanks, rephrase
    the answer itself                              stop, escalation
    nothing for a while                            abandon, session_length   (`after_silence`)

An SDK's own retry gives no signal, and an answer that failed gets none. Without text (capture is off) only equal
inputs, stops and silence can be seen. A signal's event id is made from its detector and the request, so that detecting
twice counts once; its reason never quotes a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

from telemetry.events import Interaction, Signal, answer_name
from telemetry.tone import tone
from telemetry.wording import CAP, Turn, canonical, cut_from, grams, likeness, said_again, turns

REGENERATE = "regenerate/1"
USER_EDIT = "user_edit/1"
EDIT = "assistant_edit/1"
REPHRASE = "rephrase/1"
TONE = "tone/1"
STOP = "stop/1"
ESCALATION = "escalation/1"
ABANDON = "abandon/1"
SESSION_LENGTH = "session_length/1"
COMPARED = "compared/1"

ANOTHER_TEXT = 0.2
"""Likeness below which what came back is no edit of the answer but something else in its place."""
LONGEST_EDIT = 65_536
"""Characters of an edited answer that are kept."""
TIMEOUTS = (5, 10, 15, 20, 30, 45, 60, 90, 100, 120, 180, 240, 300, 600, 900, 1200, 1800, 3600)
"""Seconds after which clients and proxies give up by themselves."""
RECENT = 64
"""Requests of a session among which the one is sought that an earlier answer stands for."""
RHYTHM = 4
"""Equal requests with equal pauses between them that are a machine's."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a route's operator may set; times in seconds."""

    again: float = 1800.0
    """The same input again after a longer time is a new question."""
    rephrase: float = 180.0
    """Longest pause before a rephrase."""
    silence: float = 1800.0
    """A session without a request for so long is over."""
    escalation_tools: frozenset[str] = frozenset()
    """Tools whose call hands the conversation to a person."""


RULES = Rules()


def detect(
    earlier: Interaction | None, new: Interaction, session: Sequence[Interaction] = (), rules: Rules = RULES
) -> list[Signal]:
    """The signals that `new` gives, about its own answer and about that of `earlier`, which it follows on.

    `session`: all requests of the session so far, oldest first; without them a poll looks like a regeneration, and
    examples at the beginning of a prompt like answers of ours.
    """
    if new.sdk_retry:
        return []
    found = [*_stopped(new), *_escalated(new, earlier, rules)]
    if earlier is not None and _may_judge(new, earlier):
        found += _about(earlier, new, session, rules)
    return found


def heard_from(
    session: Sequence[Interaction], new: Interaction, rules: Rules = RULES, continued: Interaction | None = None
) -> list[Signal]:
    """`detect` for the request that gave the answer that `new` continues, if it is known, and for the one before it.

    That is the last one to the same input, or the last one. `session`: its requests, oldest first.
    """
    before = [i for i in session if i.event_id != new.event_id and i.at <= new.at]
    same = [i for i in before if new.input_hash is not None and i.input_hash == new.input_hash]
    earlier = same[-1] if same else before[-1] if before else None
    found = detect(earlier, new, before, rules)
    if continued is not None and (earlier is None or continued.event_id != earlier.event_id):
        named = {signal.event_id for signal in found}
        found += [signal for signal in detect(continued, new, before, rules) if signal.event_id not in named]
    return found


def tells(new: Interaction, rules: Rules = RULES) -> bool:
    """Whether a request that follows on nothing may give a signal, now or after a silence."""
    return new.error == "client_left" or new.escalated or bool(rules.escalation_tools and new.tool_calls)


def alike(answer: str | None, new: Interaction) -> float:
    """How like an earlier answer the last assistant turn of `new` is, 0 to 1; 1 where a text is not known."""
    returned = next((text for role, text in reversed(turns(new.messages)) if role == "assistant"), None)
    if not answer or returned is None:
        return 1.0
    return likeness(grams(canonical(answer)), grams(canonical(returned)))


def _may_judge(new: Interaction, earlier: Interaction) -> bool:
    """The same user has had an answer that did not fail, and (but for a stop) saw its end before asking again."""
    patience = 1.0 if earlier.error == "client_left" else 0.0  # the gateway may hear later that the client left
    return (
        earlier.event_id != new.event_id
        and earlier.error in (None, "client_left")
        and earlier.tenant == new.tenant
        and (earlier.user is None or new.user is None or earlier.user == new.user)
        and new.at >= _end(earlier) - patience
    )


def _about(earlier: Interaction, new: Interaction, session: Sequence[Interaction], rules: Rules) -> Iterator[Signal]:
    pause = max(0.0, new.at - _end(earlier))
    hashed = earlier.input_hash is not None and earlier.input_hash == new.input_hash
    asked, now = turns(earlier.messages), turns(new.messages)
    if hashed or (asked and asked == now):
        if pause <= rules.again:
            yield from _again(earlier, new, session, certain=hashed)
        return
    if not asked or not now:
        return
    place = _answered_at(asked, now)
    if place is None:
        if pause <= rules.again:
            yield from _asked_otherwise(earlier, new, asked, now, session)
        return
    yield from _edited(earlier, new, now[place][1])
    if len(now) == place + 2 and now[-1][0] == "user":
        yield from _toned(earlier, new, now[-1][1])
        previous = next((text for role, text in reversed(asked) if role == "user"), "")
        if pause <= rules.rephrase and said_again(now[-1][1], previous):
            yield _signal(REPHRASE, "rephrase", new, earlier, "the next turn asks again in much the same words", 0.9)


def _again(earlier: Interaction, new: Interaction, session: Sequence[Interaction], certain: bool) -> Iterator[Signal]:
    """A regeneration; once it turns out to be a rhythm, a poll in the place of those that began it."""
    equal = [i for i in session if i.input_hash == new.input_hash and i.at < new.at and not i.sdk_retry]
    series = [*equal, new] if new.input_hash else []
    if not _steady(series[-RHYTHM:]):
        reason = "the same messages were sent again"
        yield _signal(REGENERATE, "regenerate", new, earlier, reason, 1.0 if certain else 0.95)
    elif not _steady(series[-RHYTHM - 1 : -1]):
        for before, one in pairwise(series[-RHYTHM:-1]):
            yield _signal(REGENERATE, "poll", one, before, "the same messages are sent at a steady rhythm", 0.9)


def _steady(series: Sequence[Interaction]) -> bool:
    pauses = [b.at - a.at for a, b in pairwise(series)]
    return len(series) == RHYTHM and max(pauses) - min(pauses) <= 0.25 + 0.05 * max(pauses)


def _answered_at(asked: list[Turn], now: list[Turn]) -> int | None:
    """Where in `now` the answer to `asked` stands; the app may have dropped the oldest turns."""
    lengths = (len(asked), *range(min(len(asked) - 1, 64), 0, -1))
    return next(
        (n for n in lengths if len(now) > n and now[n][0] == "assistant" and asked[-n:] == now[:n]),
        None,
    )


def _asked_otherwise(
    earlier: Interaction, new: Interaction, asked: list[Turn], now: list[Turn], session: Sequence[Interaction]
) -> Iterator[Signal]:
    """The user went back and put the last turn differently.

    Sure where the beginning has an answer of ours. A first question may simply be another one, and what a template
    begins with is nobody's turn: there only wording tells.
    """
    last = next((n for n in range(len(asked) - 1, -1, -1) if asked[n][0] == "user"), -1)
    if last < 0 or now[-1][0] != "user" or asked[:last] != now[:-1]:
        return
    before = now[:-2] if len(now) > 2 and now[-2][0] == "assistant" else []
    ours = bool(before) and any(turns(i.messages) == before for i in session[-RECENT:] if i.error is None)
    if ours or said_again(now[-1][1], asked[last][1]):
        reason = "the last user turn was put differently"
        yield _signal(USER_EDIT, "user_edit", new, earlier, reason, 0.97 if ours else 0.8)


def _edited(earlier: Interaction, new: Interaction, returned: str) -> Iterator[Signal]:
    """The answer that the app sends back says something else than the one it got.

    What is missing may have been cut by the app, and what stands around it added, so neither is an edit. Nor is another
    of several choices, and only the first is kept.
    """
    if not earlier.answer or returned == earlier.answer or earlier.choices > 1:
        return
    sent, back = canonical(earlier.answer), canonical(returned)
    if max(len(returned), len(earlier.answer)) > CAP:  # cut at different places by what canonical texts leave out
        sent, back = (text[: min(len(sent), len(back)) - 64] for text in (sent, back))
    if not sent or not back or cut_from(back, sent) or cut_from(sent, back):
        return
    alike = likeness(grams(sent), grams(back))
    if alike >= ANOTHER_TEXT:
        kept = {"value": round(alike, 4), "text": returned[:LONGEST_EDIT]}
        yield _signal(EDIT, "edit", new, earlier, "the answer came back edited", 0.95, **kept)


def _toned(earlier: Interaction, new: Interaction, turn: str) -> Iterator[Signal]:
    if (heard := tone(turn)) is not None:
        yield _signal(TONE, heard.kind, new, earlier, heard.reason, heard.confidence)


def _stopped(new: Interaction) -> Iterator[Signal]:
    """The client left while the answer came; before its first words, or at a time-out's second, that tells nothing."""
    if new.error != "client_left" or new.first_byte is None:
        return
    seen = new.answer if "off" not in new.redacted else new.stream
    gave_up = any(-0.15 <= new.duration - limit <= 0.1 for limit in TIMEOUTS)
    if seen and not gave_up:
        yield _signal(STOP, "stop", new, new, "the client left in the middle of the answer", 0.9)


def _escalated(new: Interaction, earlier: Interaction | None, rules: Rules) -> Iterator[Signal]:
    if new.escalated:
        about = earlier if earlier is not None and _may_judge(new, earlier) else new
        yield _signal(ESCALATION, "escalation", new, about, "the app handed the conversation to a person", 1.0)
        return
    calls = new.tool_calls if rules.escalation_tools and isinstance(new.tool_calls, list) else []
    if any(isinstance(call, dict) and call.get("name") in rules.escalation_tools for call in calls):
        yield _signal(ESCALATION, "escalation", new, new, "the answer called a tool that hands over to a person", 1.0)


def compared(comparison: Signal) -> list[Signal]:
    """What a side-by-side verdict says of each answer: for the winner and against the loser, or against both.

    A tie says nothing of either. Who holds but one answer's token speaks for that one.
    """
    said = comparison.target if isinstance(comparison.target, dict) and comparison.kind == "comparison" else {}
    winner, loser, both = said.get("winner"), said.get("loser"), said.get("both_bad", ())
    verdicts = [(winner, loser, 1.0), (loser, winner, 0.0), *((one, None, 0.0) for one in both)]
    own = comparison.response_id
    named = [(_answer(one), _answer(other), value) for one, other, value in verdicts]
    return [
        msgspec.structs.replace(
            comparison,
            event_id=f"{COMPARED}:{comparison.event_id}:{name}",
            response_id=name,
            trace_id=None,
            session=None,
            value=value,
            name=other,
            text=None,
            target=None,
            source="detected",
            detector=COMPARED,
            reason="it was compared with another answer",
        )
        for name, other, value in named
        if name is not None and (comparison.source != "token" or name == own)
    ]


def _answer(name: object) -> str | None:
    return answer_name(name) if isinstance(name, str) else None


def after_silence(session: Sequence[Interaction], now: float, rules: Rules = RULES) -> list[Signal]:
    """What a session's end tells, once nothing has come for `rules.silence` seconds; oldest request first.

    Its length in requests that users made; and that it was abandoned, if its last answer was not waited for. An
    answer that was read to its end and got no reply may have been all that was wanted.
    """
    asked = [i for i in session if not i.sdk_retry]
    if not asked or now - max(map(_end, asked)) < rules.silence:
        return []
    last = asked[-1]
    length = Signal(
        event_id=f"{SESSION_LENGTH}:{last.tenant}:{last.session}",
        at=_end(last),
        received_at=_end(last) + rules.silence,
        kind="session_length",
        tenant=last.tenant,
        session=last.session,
        subject=last.user,
        value=float(len(asked)),
        source="detected",
        detector=SESSION_LENGTH,
        reason=f"no request for {rules.silence:g} s",
        verified=True,
    )
    if last.error != "client_left":
        return [length]
    return [length, _signal(ABANDON, "abandon", last, last, "the client left, and nothing came after", 0.7)]


def _end(i: Interaction) -> float:
    return i.at + i.duration


def _signal(
    detector: str, kind: str, new: Interaction, about: Interaction, reason: str, confidence: float, **more: Any
) -> Signal:
    """The signal of `kind` that the request `new` gives about the answer of `about`."""
    return Signal(
        event_id=f"{detector}:{new.event_id}",
        at=new.at,
        received_at=new.at,
        kind=kind,
        tenant=new.tenant,
        response_id=about.request_id,
        subject=new.user,
        source="detected",
        detector=detector,
        confidence=confidence,
        reason=reason,
        verified=True,
        **more,
    )
