"""When and where the segments of prompts are learned: on schedule, from the journal, in a thread beside the controller.

A fit takes seconds and the controller's lease is short, so the controller asks (`Refits.ready`) and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec

from router.segments import Segmenter, fit, inherit, labelled, prompts_of
from router.store import Store
from telemetry.errors import StateError
from telemetry.events import Interaction
from telemetry.journal import Journal

log = logging.getLogger("understudy.controller")

UNFIT_SECONDS = 300.0
"""Until there is a new look at a route whose prompts made no segments."""
MOST_FACTS = 200_000
"""Facts that are looked through for prompts, the newest ones."""
SEED = 0


class Refits:
    """The fits that are under way, at most one at a time."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(1, "segments")
        self._running: dict[str, Future[Segmenter | str]] = {}
        self._again: dict[str, float] = {}

    def ready(self, route: str, last: Segmenter | None, clusters: int | None, now: float) -> Segmenter | None:
        """A new segmenter of the route once it is there; None meanwhile, and where there is nothing to learn."""
        running = self._running.get(route)
        if running is None:
            if not now < self._again.get(route, 0.0) <= now + UNFIT_SECONDS:  # a clock may be set back
                self._running[route] = self._thread.submit(learn, self._journal, route, last, clusters, now)
            return None
        if not running.done():
            return None
        del self._running[route]
        try:
            found = running.result()
        except StateError as error:
            found = str(error)
        except Exception as error:  # one route's prompts must not stop the controller
            log.exception("route %s: its prompts could not be learned from", route)
            found = repr(error)
        if isinstance(found, str):
            log.info("route %s: no new segments of prompts: %s", route, found)
            self._again[route] = now + UNFIT_SECONDS
            return None
        about = (route, len(found.names), sum(found.sizes), found.version, found.agreement)
        log.info("route %s: %d segments of %d prompts, version %s, agreement %.2f", *about)
        return found

    def done(self, route: str) -> bool:
        """Whether it is worth asking: a fit of the route has come to its end."""
        running = self._running.get(route)
        return running is not None and running.done()

    def close(self) -> None:
        """Wait for what is under way; begin nothing more."""
        self._thread.shutdown(cancel_futures=True)


def learn(path: Path, route: str, last: Segmenter | None, clusters: int | None, now: float) -> Segmenter | str:
    """Segments of the newest prompts of a route, by the names that `last` gave those that go on; or why there are none.

    Raises `StateError` if the journal cannot be read.
    """
    with closing(Journal(path)) as journal:
        prompts = prompts_of(route, _newest(journal))
    texts = [prompt.text for prompt in prompts]
    found = fit(texts, now, SEED, clusters)
    if isinstance(found, str):
        return found
    return labelled(inherit(found, last, texts) if last is not None else found, prompts)


def segmenter_of(store: Store, route: str) -> Segmenter | None:
    """What the route's prompts are told apart by now."""
    body = store.kept(_name(route))
    return msgspec.json.decode(body, type=Segmenter) if body else None


def keep(store: Store, route: str, segmenter: Segmenter, token: int) -> None:
    store.keep(_name(route), msgspec.json.encode(segmenter), token)


def _name(route: str) -> str:
    return f"segmenter:{route}"


def _newest(journal: Journal) -> Iterator[Interaction]:
    seen = 0
    for facts in journal.backwards():
        yield from (fact for _, fact in facts if isinstance(fact, Interaction))
        seen += len(facts)
        if seen >= MOST_FACTS:
            return
