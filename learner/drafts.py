"""Drafts of goldens from what people corrected and preferred in production, for an owner to review.

A draft is no golden yet: it has no owner, and `draft` in the place of `expect`, so the gate does not ask it. Whoever
owns it from now on writes their name, makes the expectation as strict as it should be (a whole answer seldom is) and
renames `draft` to `expect`. Lying with the goldens, its prompt is kept out of training from the next dataset on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import yaml

from learner.examples import Example
from learner.goldens import Goldens

HEAD = """\
# Drafts of goldens from production. Of each that is worth keeping: write an owner, make the expectation as strict as it
# should be (text, regex, json_schema, tool_call, rubric, code, refuse or answer), and rename `draft` to `expect`.
"""


def drafts(found: Iterable[Example], known: Goldens, most: int) -> list[dict[str, Any]]:
    """So many at most of the held-out examples that are none of the known goldens: corrections first, then pairs.

    Task types take turns, the weightiest example of each first; of each prompt one.
    """
    by_task: defaultdict[str, list[Example]] = defaultdict(list)
    for one in found:
        if one.split == "held_out" and one.kind in ("correction", "pair") and one.chosen and not known.hold(one):
            by_task[one.task_type or ""].append(one)
    for own in by_task.values():
        own.sort(key=lambda one: (one.kind != "correction", -one.weight, one.id))
    turns = chain.from_iterable(zip_longest(*(by_task[task] for task in sorted(by_task))))
    first = {str(one.messages): one for one in reversed([one for one in turns if one is not None])}
    return [_draft(one) for one in list(first.values())[::-1][:most]]


def write(out: Path, found: Iterable[dict[str, Any]]) -> None:
    """As YAML. Raises FileExistsError: somebody's review may be in it."""
    with out.open("x", encoding="utf-8") as file:
        file.write(HEAD)
        yaml.safe_dump(list(found), file, sort_keys=False, allow_unicode=True, width=120)


def _draft(one: Example) -> dict[str, Any]:
    asked = [dict(turn) for turn in one.messages]
    single = len(asked) == 1 and asked[0].get("role") == "user" and isinstance(asked[0].get("content"), str)
    prompt: dict[str, Any] = {"prompt": asked[0]["content"]} if single else {"messages": asked}
    return {**prompt, "owner": "", "draft": {"text": one.chosen}, "from": f"{one.kind} {one.id[:12]} ({one.reason})"}
