"""The demo's users, simulated: three cohorts with a taste of their own, and each shows in its own way what it thinks.

    cooks      ask about food; they copy an answer that pleases, and ask again after one that does not
    builders   ask about tools, vehicles and furniture; they give thumbs
    readers    ask about the rest; they accept an answer, or write what it should have said

All want the right category and no hedging. Nobody tells the gateway what they want: it hears what they do.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import openai

from understudy.demo.tiny_model import BRIEF, Question, is_good, questions

COHORTS: Final[dict[str, tuple[str, ...]]] = {
    "cooks": ("vegetable", "fruit"),
    "builders": ("tool", "vehicle", "furniture"),
    "readers": ("instrument", "animal", "garment"),
}
USERS: Final = 150
"""Of each cohort."""
AT_ONCE: Final = 12
TEMPERATURE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Visit:
    """One session: when it began, whose it was, which model answered first, and whether that pleased."""

    at: float
    cohort: str
    model: str
    pleased: bool


@dataclass
class Crowd:
    """All sessions so far, and what is open to the next ones."""

    url: str
    seed: int
    visits: list[Visit] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    brief: bool = False
    """The app was changed meanwhile: it asks for brief answers from now on."""
    _begun: int = 0

    def __post_init__(self) -> None:
        self._by_cohort = {
            name: [q for q in questions() if any(kind in q.answer for kind in kinds)] for name, kinds in COHORTS.items()
        }
        self._lock = threading.Lock()

    @contextmanager
    def at_work(self, sessions: int | None = None) -> Iterator[list[Future[None]]]:
        """People come and go, so many sessions of them, or until the block ends; and then the last ones finish."""
        stop = threading.Event()
        left = [sessions if sessions is not None else 10**9]

        def one_after_another() -> None:
            while not stop.is_set():
                with self._lock:
                    if left[0] <= 0:
                        return
                    left[0] -= 1
                    self._begun += 1
                    number = self._begun
                self._session(client, number)

        with (
            openai.OpenAI(base_url=f"{self.url}/v1", api_key="demo", timeout=60, max_retries=0) as client,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):
            waiting = [pool.submit(one_after_another) for _ in range(AT_ONCE)]
            try:
                yield waiting
                if sessions is not None:
                    for done in waiting:
                        done.result()
            finally:
                stop.set()
        for done in waiting:
            done.result()

    def _session(self, client: openai.OpenAI, number: int) -> None:
        chance = random.Random(f"{self.seed}-{number}")
        cohort = chance.choice(list(COHORTS))
        user, question = f"{cohort}-{chance.randrange(USERS)}", chance.choice(self._by_cohort[cohort])
        headers = {"x-understudy-user": user, "x-understudy-session": f"s{number}", "x-understudy-task": cohort}
        try:
            at, model, pleased = time.time(), "", False
            for attempt in range(3 if cohort == "cooks" else 1):
                answer = client.chat.completions.create(
                    model="assistant",
                    messages=_asked(question, self.brief),
                    temperature=TEMPERATURE,
                    extra_headers=headers,
                )
                good = is_good(question, answer.choices[0].message.content or "")
                if attempt == 0:
                    model, pleased = answer.model, good
                self._react(client, cohort, answer.id, user, question, good)
                if good:
                    break
            self.visits.append(Visit(at, cohort, model, pleased))
        except openai.OpenAIError as error:
            self.failures.append(str(error))

    def _react(
        self, client: openai.OpenAI, cohort: str, answer: str, user: str, question: Question, good: bool
    ) -> None:
        item: dict[str, Any] = {"response_id": answer, "user": user}
        match cohort, good:
            case "cooks", True:
                item |= {"kind": "copy"}
            case "cooks", False:
                self.did["asked again"] += 1
                return
            case "builders", _:
                item |= {"kind": "thumb", "value": good}
            case _, True:
                item |= {"kind": "accept"}
            case _:
                item |= {"kind": "correction", "text": question.answer}
        client.post("/feedback", body=item, cast_to=dict[str, Any])
        said = item["kind"] if item["kind"] != "thumb" else "thumb up" if good else "thumb down"
        self.did[said] += 1


def _asked(question: Question, brief: bool) -> Any:
    asked = {"role": "user", "content": question.text}
    return [BRIEF, asked] if brief else [asked]
