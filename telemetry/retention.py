"""Text goes when it is too old: prompts, answers and comments are taken out of the journal's facts, numbers stay."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing
from pathlib import Path

from telemetry.errors import StateError
from telemetry.journal import Journal, came
from telemetry.privacy import stripped

log = logging.getLogger("understudy.retention")

BATCH = 500
"""Facts at once: the journal is locked that long."""
PAUSE = 60.0
_MARK = "text gone until"


def expire(journal: Journal, before: float) -> int:
    """Take the text out of the next `BATCH` facts that are older than `before` (Unix seconds); how many they were.

    How far it got is kept beside the facts, so a journal is gone through once, whoever does it. Facts come nearly in
    the order of their times: one that is late by a day goes a day later.
    """
    done = int(journal.known(_MARK) or b"0")
    facts = journal.read(done, BATCH)
    last = max((place for place, (_, fact) in enumerate(facts) if came(fact) < before), default=-1)
    old = [seq for seq, _ in facts[: last + 1]]  # what came before an old one is old, whatever its clock said
    if old:
        journal.rewrite(old, stripped)
        journal.know(_MARK, str(old[-1]).encode())
    return len(old)


def keep_to(path: Path, retention: float, stopping: threading.Event) -> None:
    """Until `stopping`: take out of the journal at `path` the text that is older than `retention` seconds."""
    complained, dirty = "", True  # who was here before may have been stopped in between
    while not stopping.is_set():
        went = 0
        try:
            with closing(Journal(path)) as journal:
                while (went := expire(journal, time.time() - retention)) == BATCH and not stopping.wait(0.05):
                    dirty = True
                dirty = (dirty or went > 0) and not journal.scrub()
            complained = ""
        except StateError as error:
            if str(error) != complained:
                log.warning("text older than %g days stays for now: %s", retention / 86400.0, error)
            complained = str(error)
        stopping.wait(1.0 if dirty else PAUSE)
