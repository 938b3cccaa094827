"""Versions on vLLM's replicas: loaded on all or none, warm, proven to say what PEFT says, unloaded when idle.

What follows from vLLM 0.32's source (`entrypoints/openai/models/serving.py`, `lora/worker_manager.py`):

- Adapters are a list in each replica's process, gone with a restart (`reconcile`). A name stands for its path for ever:
  cached prefixes are keyed by both, so other weights never come under an old name or path, and files are verified.
- A token without an adapter has the slot −1. vLLM's CPU kernels (`lora/ops/torch_ops`) take that for the last slot:
  once as many adapters as `--max-loras` were ever used, the base answers with the last one's weights where a batch
  holds an adapter's tokens, too. So the base is asked beside a version before that is drawn.
- Unloading takes the name away, no more: answers in the making go on, the weights leave when others need their place,
  and may be read from the folder again until then. So a folder may go only when its version is not in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from learner.registry import ADAPTER, Tampered, Version, verify
from learner.replica import (
    Full,
    InUse,
    Listing,
    Replica,
    ServingFailed,
    Unreachable,
    greedy,
    in_flight,
    listing,
    load_adapter,
    serves,
    unload_adapter,
)

__all__ = [
    "AGREED",
    "Agreement",
    "Expected",
    "Fleet",
    "Full",
    "InUse",
    "Listing",
    "Reconciled",
    "Replica",
    "ServingFailed",
    "Unreachable",
    "agreement",
    "forced",
    "in_flight",
    "listing",
    "load",
    "reconcile",
    "unload",
    "warm",
]

AGREED = 0.99
"""Share of tokens that a replica and PEFT must agree on before a version may be drawn."""
AT_ONCE = 8
"""Requests of a comparison that a replica has at once."""
BESIDE, BESIDE_ASKED, BESIDE_TOKENS = 8, 3, 32
"""Places at which the base is asked beside the version, how often, and the tokens that the version writes meanwhile."""
STRIDE = 32
"""Tokens that a replica writes in one request of a comparison; what follows a difference is written in vain."""


class Fleet(NamedTuple):
    """The replicas that serve one base, all started alike."""

    replicas: Sequence[Replica]
    capacity: int
    """Their `--max-loras`: adapters that one batch can hold; with more, requests would wait for each other."""
    served_folder: str | None = None
    """The folder of versions as the replicas see it; None where they see it as we do."""

    def path(self, version: Version) -> str:
        """Of the version's adapter, as the replicas see it."""
        if self.served_folder is None:
            return str(version.adapter)
        return f"{self.served_folder.rstrip('/')}/{version.name}/{ADAPTER}"


class Reconciled(NamedTuple):
    """What `reconcile` did and found, by replicas' URLs."""

    loaded: list[tuple[str, str]]
    refused: list[tuple[str, str, str]]
    """Replica, version, why."""
    unreachable: list[tuple[str, str]]
    others: list[tuple[str, str]]
    """Adapters that were not asked for: nobody's, or written on vLLM's command line."""


def load(fleet: Fleet, version: Version, needed: Collection[str] = ()) -> list[Replica]:
    """Load a version wherever it is not yet, on all replicas or none; those that loaded it now.

    `needed`: versions that sessions need, which are not proposed to make room. Raises ServingFailed, Tampered.
    """
    verify(Path(version.folder), version)
    path = fleet.path(version)
    missing = [replica for replica in fleet.replicas if not serves(replica, version.name, path)]
    for replica in missing:
        _check_room(replica, fleet.capacity, needed)
    loaded: list[Replica] = []
    try:
        for replica in missing:
            loaded.append(replica)  # before: without an answer it may be loaded all the same
            if not load_adapter(replica, version.name, path):
                loaded.remove(replica)
    except BaseException as error:
        left = [why for replica in loaded if (why := _taken_back(replica, version.name))]
        if left and isinstance(error, ServingFailed):
            raise type(error)(f"{error}; and what was loaded could not be taken back: {'; '.join(left)}") from error
        raise
    return loaded


def reconcile(fleet: Fleet, versions: Iterable[Version]) -> Reconciled:
    """Load what replicas that were restarted miss of `versions`. Raises nothing that concerns one replica only."""
    wanted = {version.name: version for version in versions}
    done = Reconciled([], [], [], [])
    for replica in fleet.replicas:
        try:
            has = listing(replica)
        except ServingFailed as error:
            done.unreachable.append((replica.url, str(error)))
            continue
        done.others.extend((replica.url, name) for name in has.adapters if name not in wanted)
        for version in wanted.values():
            try:
                if _load_if_missing(fleet, replica, version, wanted):
                    done.loaded.append((replica.url, version.name))
            except (ServingFailed, Tampered) as error:
                done.refused.append((replica.url, version.name, str(error)))
    return done


def unload(replica: Replica, name: str, needed: Callable[[], Collection[str]]) -> bool:
    """Take a version off a replica; False if it was not there. Stop drawing its arm first.

    Raises InUse while a session needs it (`needed` tells which are) or an answer of it is in the making.
    """
    if name not in listing(replica).adapters:
        return False
    if name in in_flight(replica):
        raise InUse(f"{replica.url} is answering with {name}; unload it when it is done")
    if name in needed():
        raise InUse(f"sessions still need {name} on {replica.url}; unload it when they ended")
    return unload_adapter(replica, name)


def warm(replica: Replica, name: str) -> float:
    """One short answer by a version, so that no user waits for the first; the seconds it took."""
    began = time.monotonic()
    greedy(replica, "/v1/completions", name, {"prompt": "Hello", "max_tokens": 1})
    return time.monotonic() - began


class Expected(NamedTuple):
    """What PEFT answers greedily, without any penalty: token ids, with the end mark if it came to one."""

    prompt: Sequence[int]
    answer: Sequence[int]
    messages: Sequence[Mapping[str, Any]] | None = None
    """The chat that the prompt was made from, so that the replica's template can be compared, too."""

    def prompt_to(self, at: int) -> list[int]:
        """All that stands before a token of the answer."""
        return [*self.prompt, *self.answer[:at]]


class Agreement(NamedTuple):
    """How far a replica says what PEFT says."""

    tokens: int
    """Of all expected answers."""
    equal: int
    """Of these, what the replica says next, too, after the same tokens."""
    telling: int
    """Answers that the base would not have given; and of these, how many times the version said PEFT's token there."""
    telling_equal: int
    prompts: int
    """Chats of which the replica's template was asked."""
    prompts_equal: int
    beside: int = 0
    """Places where the base was asked again while the version answered beside it; and how often it said the same."""
    beside_equal: int = 0

    @property
    def share(self) -> float:
        return self.equal / self.tokens

    def holds(self, needed: float = AGREED) -> bool:
        """Whether the version may be drawn: enough is equal, the adapter is felt, and prompts are the same."""
        felt = self.telling == 0 or 2 * self.telling_equal > self.telling
        return self.share >= needed and felt and self.apart and self.prompts_equal == self.prompts

    @property
    def apart(self) -> bool:
        """Whether the base stays the base in one batch with the version."""
        return self.beside == 0 or 2 * self.beside_equal > self.beside

    @property
    def touched(self) -> str:
        """What to say of one where it does not."""
        return (
            f"its base answers otherwise beside the version, at {self.beside - self.beside_equal} of {self.beside} "
            "places; vLLM on a CPU does so once as many adapters were used as --max-loras says: restart it with a "
            "larger one"
        )


def agreement(replica: Replica, name: str, expected: Sequence[Expected]) -> Agreement:
    """Compare a served version with PEFT's greedy answers, at each place after PEFT's own tokens.

    After a first other token two free answers differ by nature. So the replica writes on from PEFT's tokens until it
    says another, which counts; PEFT's is put in its place and it writes on from there: what it would say at each
    place, by a request for each difference (not `prompt_logprobs`: vLLM's first compiles for 20 s while all wait, and
    needs a compiler). Where the base first says another token than PEFT, it shows whether the adapter is applied; and
    there the base is asked again beside the version, for a server may apply an adapter to its whole batch.
    """
    if not expected or not all(one.prompt and one.answer for one in expected):
        raise ValueError("there is nothing to compare; give PEFT's answers, each of one token at least")
    base = listing(replica).base
    chats = [one for one in expected if one.messages is not None]
    with ThreadPoolExecutor(AT_ONCE) as pool:  # a replica answers several as fast as one
        ours = list(pool.map(lambda one: list(forced(replica, name, one)), expected))
        others = list(pool.map(lambda one: _first_other(replica, base, one), expected))
        places = [one.prompt_to(at) for one, at in zip(expected, others, strict=True) if at is not None][:BESIDE]
        alone = list(pool.map(lambda prompt: _next(replica, base, prompt), places))
        beside = [pool.submit(_beside, replica, base, name, prompt) for prompt in places]
        same_beside = [found.result() == {token} for found, token in zip(beside, alone, strict=True)]
        prompts = list(pool.map(lambda one: _prompt(replica, name, one.messages or ()) == [*one.prompt], chats))
    told = [same[at] for same, at in zip(ours, others, strict=True) if at is not None]
    return Agreement(
        tokens=sum(map(len, ours)),
        equal=sum(map(sum, ours)),
        telling=len(told),
        telling_equal=sum(told),
        prompts=len(prompts),
        prompts_equal=sum(prompts),
        beside=len(places),
        beside_equal=sum(same_beside),
    )


def _first_other(replica: Replica, model: str, one: Expected) -> int | None:
    """Where a model first says another token than PEFT."""
    return next((at for at, same in enumerate(forced(replica, model, one)) if not same), None)


def forced(replica: Replica, model: str, one: Expected) -> Iterator[bool]:
    """Of each token of the answer, whether the model says it after what comes before it."""
    at = 0
    while at < len(one.answer):
        wanted = one.answer[at : at + STRIDE]
        body = {"prompt": one.prompt_to(at), "max_tokens": len(wanted)}
        said = _token_ids(replica, model, greedy(replica, "/v1/completions", model, body), "token_ids")
        for token, instead in zip(wanted, said, strict=False):
            at += 1
            yield token == instead
            if token != instead:
                break


def _next(replica: Replica, model: str, prompt: Sequence[int]) -> int:
    """The next token."""
    said = greedy(replica, "/v1/completions", model, {"prompt": prompt, "max_tokens": 1})
    return _token_ids(replica, model, said, "token_ids")[0]


def _beside(replica: Replica, base: str, name: str, prompt: Sequence[int]) -> set[int]:
    """The base's next token while the version answers; asked a few times, for the first may come too early."""
    long = {"prompt": prompt, "max_tokens": BESIDE_TOKENS, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(greedy, replica, "/v1/completions", name, long)
        found = {_next(replica, base, prompt) for _ in range(BESIDE_ASKED)}
        answering.result()
    return found


def _prompt(replica: Replica, model: str, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens that the replica makes of a chat."""
    said = greedy(replica, "/v1/chat/completions", model, {"messages": messages, "max_tokens": 1})
    return _token_ids(replica, model, said, "prompt_token_ids")


def _token_ids(replica: Replica, model: str, said: Mapping[str, Any], field: str) -> list[int]:
    """Those of the prompt stand beside a chat's choices; raises ServingFailed where there are none."""
    try:
        ids = said[field] if field in said else said["choices"][0][field]
    except (KeyError, IndexError, TypeError):
        ids = None
    if not isinstance(ids, list) or not ids:
        raise ServingFailed(f"{replica.url} gave no {field} for {model}; is it a vLLM that knows return_token_ids?")
    return ids


def _load_if_missing(fleet: Fleet, replica: Replica, version: Version, needed: Collection[str]) -> bool:
    path = fleet.path(version)
    if serves(replica, version.name, path):
        return False
    verify(Path(version.folder), version)
    _check_room(replica, fleet.capacity, needed)
    return load_adapter(replica, version.name, path)


def _check_room(replica: Replica, capacity: int, needed: Collection[str]) -> None:
    adapters = listing(replica).adapters
    if len(adapters) >= capacity:
        try:
            idle = ", ".join(sorted(set(adapters) - set(needed) - in_flight(replica)))
        except ServingFailed as error:
            idle = f"those that are not in flight ({error})"
        raise Full(
            f"{replica.url} serves {', '.join(adapters)}, as many as it may ({capacity}); "
            f"{f'unload one of {idle}' if idle else 'none is idle: wait'}, or start vLLM with a larger --max-loras"
        )


def _taken_back(replica: Replica, name: str) -> str:
    """Unload what was loaded just now and nobody drew; why it could not be, else nothing."""
    try:
        unload_adapter(replica, name)
    except ServingFailed as error:
        return str(error)
    return ""
