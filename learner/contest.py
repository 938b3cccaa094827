"""Who meets whom in an evaluation, on what, and how replicas are asked: a few things at once, beside the users.

Replicas are asked at most `AT_ONCE` things at once, for users are being served beside it. One that does not answer
raises `Unreachable`: nothing is told of half an evaluation.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from learner.answers import Score
from learner.expectations import Golden
from learner.form import Answer, Pair, answer_in
from learner.judge import Judge
from learner.measured import Side
from learner.registry import Version
from learner.replica import Replica, ServingFailed, Silent, Unreachable, greedy, listing
from learner.serving import Expected, Fleet

AT_ONCE = 8
"""Prompts that replicas are asked at once, each by both versions in turn."""
SIDES: tuple[Side, Side] = ("champion", "challenger")
Item = TypeVar("Item")
Found = TypeVar("Found")


class Limits(NamedTuple):
    """How much is looked at, at most."""

    pairs: int = 300
    duels: int = 200
    judged: int = 100
    """Pairs that people judged, put to the judge."""
    padded: int = 30
    """Answers put to it beside the same ones made longer, to see how far it loves length."""
    diverging: int = 24
    """Duels of which the divergence is measured: it takes a request for each difference. Of the others it is None."""
    tokens: int = 512
    """Of an answer."""
    patience: float = 120.0
    """Seconds for one answer; a user would have left."""
    temperature: float = 0.0
    """Of the duels' answers; 0 for the likeliest tokens. Above it both versions draw with one seed a prompt, and no
    divergence is measured."""
    longest: int = 4096
    """Tokens of a pair's prompt and answer."""
    seconds: float = 2 * 3600.0
    """For all answers; what was not asked by then is left out."""


class Champion(NamedTuple):
    """Who is to be beaten, as replicas serve it, and as PEFT finds it."""

    model: str
    base: str
    adapter: str | None = None
    """None for the base itself."""


class Contest(NamedTuple):
    """Who meets whom, and on what."""

    challenger: Version
    champion: Champion
    fleet: Fleet
    score: Score
    expected: Sequence[Expected]
    """What PEFT says with the challenger; empty where its agreement is known."""
    dataset: Path
    """This round's."""
    earlier: Sequence[Path] = ()
    goldens: Sequence[Golden] = ()
    judge: Judge | None = None
    allow_code: bool = False
    limits: Limits = Limits()
    agreement: float | None = None
    """As it was measured when the challenger was loaded."""
    system: str | None = None
    """With which both are served, instead of an app's own; and the fields that override an app's."""
    params: Mapping[str, Any] = MappingProxyType({})


def both(
    contest: Contest, replica: Replica, messages: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any], turned: bool,
) -> Pair:  # fmt: skip
    """Both versions' answers, one after the other; whose comes second may find the prompt in a cache: `turned`."""
    names: dict[Side, str] = {"champion": contest.champion.model, "challenger": contest.challenger.name}
    order = SIDES[::-1] if turned else SIDES
    body = {"messages": _dressed(messages, contest.system), "max_tokens": contest.limits.tokens}
    body |= {**contest.params, **request}
    return {side: ask(replica, names[side], body, contest.limits.patience) for side in order}


def _dressed(messages: Sequence[Mapping[str, Any]], system: str | None) -> list[Mapping[str, Any]]:
    """As the gateway dresses a chat: the arm's own system prompt in the place of the app's first one."""
    if system is None:
        return list(messages)
    rest = messages[1:] if messages and messages[0].get("role") in ("system", "developer") else messages
    return [{"role": "system", "content": system}, *rest]


def ask(replica: Replica, model: str, body: Mapping[str, Any], seconds: float) -> Answer:
    """One greedy answer; what the replica refuses, or does not end in time, is an answer that failed.

    Raises Unreachable, also of a replica that is silent altogether.
    """
    began = time.monotonic()
    try:
        said = greedy(replica, "/v1/chat/completions", model, body, seconds)
        return answer_in(said, time.monotonic() - began)
    except Silent as error:
        listing(replica)  # it is there, and only this answer took too long
        return Answer(failed=str(error), finish="error")
    except Unreachable:
        raise
    except ServingFailed as error:
        return Answer(failed=str(error), finish="error")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        return Answer(failed=f"{replica.url} answered {model} with no chat ({error!r})", finish="error")


def each(work: Callable[[Item], Found], items: Sequence[Item], until: float) -> list[Found | None]:
    """The work on each item, a few at once; None for those that the time did not suffice for.

    Raises what it raises, and then begins no other.
    """
    stop = threading.Event()

    def one(item: Item) -> Found | None:
        if stop.is_set() or time.monotonic() >= until:
            return None
        try:
            return work(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, items))


def hash_bit(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0
