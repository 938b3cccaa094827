"""A route's round of learning as it stands in the store, and who works on it: one process at a time.

Each change is a compare-and-set, so a process that was taken for dead and is not finds out at its next step.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import msgspec
from msgspec.structs import replace

from learner.diagnosis import Diagnosis
from learner.spec import TrainSpec
from router.store import Documents
from telemetry.errors import StateError, UnderstudyError

Step = Literal["dataset", "train", "register", "serve", "gate", "refuse", "done", "failed", "dropped"]
LEASE = 60.0
"""Seconds for which a process that said nothing more still counts as at work."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """How far one round has come."""

    number: int
    step: Step
    reason: str
    """Why it began."""
    began: float
    ended: float = 0.0
    pairs: int = 0
    """Accepted pairs that were new when it began."""
    until: float = 0.0
    """Of the newest fact that was learned from before it; Unix seconds."""
    reaches: float = 0.0
    """Of the newest fact that it learns from."""
    tries: int = 0
    """How many times its step was interrupted."""
    dataset: str = ""
    spec: TrainSpec | None = None
    version: str = ""
    tried: tuple[Diagnosis, ...] = ()
    """Why the gate refused the round's challengers so far; each was followed by another training."""
    why: str = ""
    """Of a round that failed or was dropped."""
    owner: str = ""
    lease: float = 0.0
    """Until when its owner counts as at work; Unix seconds."""

    @property
    def active(self) -> bool:
        return self.step not in ("done", "failed", "dropped")


class Busy(UnderstudyError):
    """Another process works on this route's round."""


class State:
    """A route's round, as this process holds it."""

    def __init__(
        self, documents: Documents, name: str, owner: str, body: bytes | None, now: Callable[[], float]
    ) -> None:
        self._documents, self._name, self._owner, self._now = documents, name, owner, now
        self._body = body
        self._lock = threading.Lock()
        self.round = decode(body)

    def begin(self, reason: str, pairs: int) -> None:
        """Begin the next round."""
        number, until = self.round.number + 1, self.round.until
        fresh = Round(number=number, step="dataset", reason=reason, began=self._now(), pairs=pairs, until=until)
        self.put(fresh)

    def put(self, round: Round, lease: float = LEASE) -> None:
        """Raises Busy where somebody else took the round over."""
        with self._lock:
            ends = self._now() + lease if lease else 0.0
            round = replace(round, owner=self._owner if lease else "", lease=ends)
            body = msgspec.json.encode(round)
            if not self._documents.swap(self._name, self._body, body):
                self._see_what_stands()
                if not self._documents.swap(self._name, self._body, body):
                    raise Busy(f"{self._name} was taken over by another process, which goes on with it")
            self._body, self.round = body, round

    def _see_what_stands(self) -> None:
        """A write whose answer was lost may have been ours. Raises Busy."""
        stands = self._documents.read(self._name)
        if stands is None:
            raise Busy(f"{self._name} is gone from the store: has it been emptied? Begin the round anew")
        if decode(stands).owner != self._owner:
            raise Busy(f"{self._name} was taken over by another process, which goes on with it")
        self._body = stands

    def renew(self) -> None:
        self.put(self.round)


def decode(body: bytes | None) -> Round:
    """A round; one of another version of the code without its spec, which is then made anew."""
    if body is None:
        return Round(number=0, step="done", reason="", began=0.0)
    try:
        return msgspec.json.decode(body, type=Round)
    except msgspec.ValidationError:
        return msgspec.convert(msgspec.json.decode(body) | {"spec": None, "tried": ()}, Round)


def last_round(documents: Documents, route: str) -> Round:
    return decode(documents.read(_document(route)))


def _document(route: str) -> str:
    return f"learning/{route}"


@contextmanager
def working(documents: Documents, route: str, owner: str, now: Callable[[], float] = time.time) -> Iterator[State]:
    """Hold the route's round: nobody else works on it meanwhile. Raises Busy."""
    name = _document(route)
    state = State(documents, name, owner, documents.read(name), now)
    held_by, until = state.round.owner, state.round.lease
    if held_by not in ("", owner) and 0 < until - now() <= LEASE and not is_gone(held_by):
        raise Busy(
            f"{held_by} (machine:process) works on route {route}, at step {state.round.step}; stop that process first, "
            f"or, should it be dead, try again in {until - now():.0f} s"
        )
    state.renew()
    stopping = threading.Event()
    thread = threading.Thread(target=_renewing, args=(state, stopping), name="learning", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        stopping.set()
        thread.join()
        with suppress(Busy, StateError):
            state.put(state.round, lease=0.0)


def owner_name() -> str:
    """Of this process, for others to see."""
    return f"{_machine()}:{os.getpid()}:{secrets.token_hex(4)}"


def _machine() -> str:
    """Containers may share a host's name, and have processes of their own."""
    try:
        return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def is_gone(owner: str) -> bool:
    """Whether an owner was a process of this machine that is no more."""
    host, _, rest = owner.partition(":")
    pid = rest.partition(":")[0]
    if host != _machine() or not pid.isdigit():
        return False
    if int(pid) == os.getpid():
        return True  # it had our number before us
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _renewing(state: State, stopping: threading.Event) -> None:
    while not stopping.wait(LEASE / 4):
        try:
            state.renew()
        except UnderstudyError:
            continue  # the store may be away; who writes a step's result meets the same, and says it
