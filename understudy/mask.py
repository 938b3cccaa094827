"""`understudy mask`: another recogniser (Presidio's, say) goes over the text that is kept, in nobody's way."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial

from telemetry.events import Fact, encode
from telemetry.journal import Journal, came
from telemetry.privacy import masked

BATCH = 500


def load(name: str) -> Callable[[str], str]:
    """The function that "package.module:function" names. Raises ValueError that says what is wrong with it."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} names no function; write it as package.module:function")
    sys.path.insert(0, "")  # the operator's own modules stand where they are
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from None
    try:
        works = isinstance(found(""), str)
    except Exception as error:  # it is somebody else's
        raise ValueError(f"{name!r} fails on an empty text: {error!r}") from None
    if not works:
        raise ValueError(f"{name!r} is no function from text to text")
    mask: Callable[[str], str] = found
    return mask


def _as_done(done: Mapping[bytes, Fact], fact: Fact) -> Fact:
    return done.get(encode(fact), fact)


def mask_all(journal: Journal, mask: Callable[[str], str], since: float) -> tuple[int, bool]:
    """Put what `mask` makes of them in the place of all kept texts of facts since then (Unix seconds).

    How many facts were looked at, and whether what stood there is gone from the disk. May be stopped and begun again.
    """
    after = looked = 0
    while facts := journal.read(after, BATCH):
        after = facts[-1][0]
        young = [(seq, fact) for seq, fact in facts if came(fact) >= since]
        done = {encode(fact): masked(fact, mask) for _, fact in young}  # before the journal is locked: it may be slow
        journal.rewrite([seq for seq, _ in young], partial(_as_done, done))
        looked += len(young)
    return looked, journal.scrub()
