"""Facts for tests of the learner: requests, answers, and what users said of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal

START = 1_700_000_000.0
_numbers = itertools.count()


def asked(
    prompt: str | list[dict[str, Any]],
    answer: str | None,
    *,
    at: float = 0.0,
    user: str | None = "ann",
    session: str | None = None,
    name: str | None = None,
    arm: str = "champion",
    **more: Any,
) -> Interaction:
    """A request and its answer; `at` in seconds after the beginning."""
    number = next(_numbers)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    fields = {"tenant": "default", "route": "assistant", "finish_reason": "stop", "status": 200} | more
    return Interaction(
        event_id=name or f"i{number}",
        at=START + at,
        request_id=f"{number:032x}",
        session=session or f"session of {user}",
        answerer=Answerer(arm, arm, policy="thompson", propensity=fields.pop("propensity", 1.0)),
        user=user,
        messages=messages,
        answer=answer,
        **fields,
    )


def said(kind: str, about: Interaction, value: float | None = None, *, by: str | None = None, **more: Any) -> Signal:
    """What somebody did about an answer, ten seconds later unless told."""
    after = more.pop("after", 10.0)
    fields = {"event_id": f"s{next(_numbers)}", "response_id": about.request_id, "verified": True} | more
    return Signal(
        at=about.at + after,
        received_at=about.at + after,
        kind=kind,
        tenant=about.tenant,
        subject=by or about.user,
        value=value,
        **fields,
    )


def compared(winner: Interaction, loser: Interaction, verdict: str = "", **more: Any) -> Signal:
    """A comparison; `verdict` may be `tie` or `both_bad`."""
    names = [winner.request_id, loser.request_id]
    target = {verdict: names} if verdict else {"winner": names[0], "loser": names[1]}
    return said("comparison", winner, target=target, **more)


def journal(path: Path, facts: Iterable[Fact]) -> Journal:
    book = Journal(path)
    book.append(list(facts))
    return book
