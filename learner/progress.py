"""How a run goes: which step was the best, when to stop, whether the model fell apart. Pure.

Training stops when the held-out loss gets no better, not after so many epochs. It stops at once, and for good, when
held-out *chosen* answers become unlikely: a preference loss is content when both answers of a pair go down and the
rejected one faster (Razin et al. 2410.08847, "Unintentional Unalignment"; Pal et al. 2402.13228), and what they lose
goes to something that nobody preferred. Margin and accuracy look fine then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

FALL = math.log(2)
"""Nats a token by which held-out chosen answers may become less likely than under the base: each token half as likely.

Sound runs of `bench/learner_quality.py` end between 0.1 above the base and 0.4 below it, collapsed ones were 0.9 to 5
below at the first look that caught them."""
BROKEN = 0.25
"""Share of held-out prompts whose answer may be broken where the base's is not."""
_GRAM = 4
_REPEATS = 0.5


class Progress(msgspec.Struct, frozen=True):
    """How far a run has come; stands in each of its checkpoints."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    since: int = 0
    """Looks since the best one."""
    stopped: str = ""
    metrics: dict[str, float] = {}
    """Of the best step."""

    @property
    def collapsed(self) -> bool:
        return self.stopped == "collapsed"


def looked(before: Progress, step: int, metrics: dict[str, float], patience: int, last: bool) -> Progress:
    """`before` and a look at the held-out set after `step`; `last` if there is no step after it."""
    loss, fall = metrics["held_out_loss"], metrics["held_out_fall"]
    sound = math.isfinite(loss) and math.isfinite(fall)
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no others
    better = sound and (before.best_loss is None or loss < before.best_loss)
    since = 0 if better else before.since + 1
    if not sound or fall > FALL:
        stopped = "collapsed"
    elif since >= patience:
        stopped = "no longer better"
    else:
        stopped = "max_epochs" if last else ""
    if better:
        return Progress(step, step, loss, 0, stopped, metrics)
    return Progress(step, before.best_step or step, before.best_loss, since, stopped, before.metrics or metrics)


def progress_in(checkpoint: Mapping[str, bytes]) -> Progress:
    return msgspec.json.decode(checkpoint["progress.json"], type=Progress)


def told_apart(gaps: NDArray[np.float64], beta: float) -> dict[str, float]:
    """How often the better answer gained more, and by how much; no difference is half a hit."""
    hits = float((gaps > 0).mean() + (gaps == 0).mean() / 2)
    return {"held_out_accuracy": hits, "held_out_margin": beta * float(gaps.mean())}


def format_metrics(
    ours: Sequence[Sequence[int]], base: Sequence[Sequence[int]], ends: Collection[int]
) -> dict[str, float]:
    """How an adapter's answers to some prompts, as token ids, hold together beside those of its base.

    An answer is broken if it is empty, does not end, or says the same over and over.
    """
    n = max(1, len(ours))
    lost = sum(is_broken(new, ends) and not is_broken(old, ends) for new, old in zip(ours, base, strict=True))
    return {
        "ended": sum(_ends(answer, ends) for answer in ours) / n,
        "ended_base": sum(_ends(answer, ends) for answer in base) / n,
        "repeats": sum(_repeats(answer) for answer in ours) / n,
        "repeats_base": sum(_repeats(answer) for answer in base) / n,
        "tokens_an_answer": sum(map(len, ours)) / n,
        "tokens_an_answer_base": sum(map(len, base)) / n,
        "format_broken": lost / n,
    }


def is_broken(answer: Sequence[int], ends: Collection[int]) -> bool:
    return len(answer) < 2 or not _ends(answer, ends) or _repeats(answer)


def judged(progress: Progress, formed: dict[str, float]) -> Progress:
    """`progress` with what the best step's answers look like; they may tell of a collapse that likelihood does not."""
    stopped = "collapsed" if formed["format_broken"] > BROKEN else progress.stopped
    return msgspec.structs.replace(progress, stopped=stopped, metrics={**progress.metrics, **formed})


def _ends(answer: Sequence[int], ends: Collection[int]) -> bool:
    return bool(answer) and answer[-1] in ends


def _repeats(answer: Sequence[int]) -> bool:
    """Whether more than half of its runs of four tokens occurred before in it."""
    grams = Counter(tuple(answer[at : at + _GRAM]) for at in range(len(answer) - _GRAM + 1))
    return len(grams) > 0 and sum(grams.values()) - len(grams) > _REPEATS * sum(grams.values())


@contextmanager
def bar() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Events of a run as a bar on the terminal, with a line for each look and note."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns) as shown:
        task = shown.add_task("training", total=None)

        def say(event: dict[str, Any]) -> None:
            if "of" in event:
                shown.update(task, completed=event["step"], total=event["of"])
            match event["event"]:
                case "step":
                    shown.update(task, description=f"loss {event['loss']:.3f}, {event['tokens_per_s']:.0f} tokens/s")
                case "look":
                    shown.print(
                        f"step {event['step']}: held-out loss {event['held_out_loss']:.4f}, "
                        f"accuracy {event['held_out_accuracy']:.3f}"
                    )
                case "note":
                    shown.print(event["note"])
                case "done":
                    shown.print(f"{event['folder']}: {event['stopped']}, the best step was {event['steps']}")

        yield say
