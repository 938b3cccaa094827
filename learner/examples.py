"""What a model learns from: examples, as immutable records that a dataset holds one a line.

Three kinds. A *pair* has an answer that was preferred and one that was not (DPO). A *correction* has only what should
have been said (SFT). An *unpaired* example has one answer and whether it was wanted (KTO): then it stands under
`chosen`, else under `rejected`.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

Kind = Literal["pair", "correction", "unpaired"]
KINDS: tuple[Kind, ...] = ("pair", "correction", "unpaired")
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


class Example(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing to learn from, and where it comes from."""

    id: str
    """Hash of the kind and the texts: equal examples have equal ids."""
    kind: Kind
    messages: list[dict[str, Any]]
    """The prompt: chat messages up to the answer."""
    reason: str
    """What made it an example: `comparison`, `regenerate`, `edit`, `correction`, `votes`, `copy`, `flag`, …"""
    chosen: str | None = None
    rejected: str | None = None
    weight: float = 1.0
    """How much it counts, 1 on average over what is trained on."""
    events: tuple[str, ...] = ()
    """Ids of the facts it was made from: interactions and signals."""
    route: str = ""
    tenant: str = "default"
    user: str | None = None
    """Pseudonym of whose feedback it is; of several, whose counts most."""
    users: tuple[str, ...] = ()
    """All whose feedback it is, as `learner.people.person` names them."""
    session: str = ""
    task_type: str | None = None
    country: str | None = None
    at: float = 0.0
    """When its newest fact came, Unix seconds."""
    text_from: float = 0.0
    """When its oldest text came: it must be gone when that has been kept long enough."""
    arms: tuple[str, ...] = ()
    """The arms whose answers it holds, the chosen one's first."""
    propensity: float = 1.0
    """Probability with which the judged answer's arm had been drawn."""
    synthetic: bool = False
    split: Split = "train"

    @property
    def texts(self) -> tuple[str, ...]:
        """The answers it holds."""
        return tuple(text for text in (self.chosen, self.rejected) if text is not None)


def example_id(kind: str, messages: Any, chosen: str | None, rejected: str | None) -> str:
    """24 hex digits of SHA-256 over the kind and the texts."""
    body = msgspec.json.encode([kind, messages, chosen, rejected], order="deterministic")
    return hashlib.sha256(body).hexdigest()[:24]


def encode(example: Example) -> bytes:
    """One line of a dataset, without its end: JSON with sorted keys, so that equal examples are equal bytes."""
    return msgspec.json.encode(example, order="deterministic")


decode = msgspec.json.Decoder(Example).decode
