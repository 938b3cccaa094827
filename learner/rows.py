"""Examples as token ids: what a model sees when it learns, and what had to be left out. The tokenizer comes in.

A prompt is what the chat template writes with its generation prompt. An answer's tokens are what the template writes
after it, tokenized apart as a server has it (the prompt comes alone), and end with the template's end of turn; what
some templates write behind that, a line break say, is never sampled and not learned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from learner import shards
from learner.examples import Example, Kind
from learner.spec import Method, TrainingFailed

TRAINED: dict[Method, tuple[Kind, ...]] = {"dpo": ("pair", "correction"), "kto": ("unpaired",)}
"""Kinds of examples that a method learns from."""


class Row(NamedTuple):
    """One example in token ids; an answer that it does not have is empty."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float

    @property
    def is_pair(self) -> bool:
        return bool(self.chosen and self.rejected)


class _LeftOut(Exception):
    """Why an example cannot be learned from."""


def examples_of(folder: Path, expected: str) -> list[Example]:
    """What the dataset holds. Raises TrainingFailed unless it is the one that is meant, and whole."""
    try:
        if shards.manifest_hash(folder) != expected:
            raise TrainingFailed(f"{folder} is not the dataset that the run was asked for; build it or ask anew")
        return list(shards.read(folder))
    except FileNotFoundError:
        raise TrainingFailed(
            f"{folder} is no dataset: it has no manifest; `understudy dataset build` makes one"
        ) from None
    except shards.BadDataset as error:
        raise TrainingFailed(str(error)) from None
    except msgspec.MsgspecError as error:
        raise TrainingFailed(f"{folder} holds what is no example ({error}); build the dataset anew") from None


def ends_of(base: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's makers generate until."""
    path = base / "generation_config.json"
    ends = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not found:
        raise TrainingFailed(f"the tokenizer in {base} has no end-of-text token; answers would never end")
    return frozenset(found)


def encode(
    found: Iterable[Example], method: Method, tokenizer: Any, ends: Collection[int], max_length: int
) -> tuple[list[Row], Counter[str]]:
    """Rows of the examples that can be learned from, and how many cannot, by reason."""
    rows, left_out = [], Counter[str]()
    controls = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for example in found:
        try:
            if example.kind not in TRAINED[method]:
                raise _LeftOut(f"are not of a kind that {method} learns from")
            rows.append(_row(example, tokenizer, controls, ends, max_length))
        except _LeftOut as why:
            left_out[str(why)] += 1
    return rows, left_out


def _row(example: Example, tokenizer: Any, controls: set[int], ends: Collection[int], max_length: int) -> Row:
    for text in (*_contents(example.messages), *example.texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if controls.intersection(ids):
            raise _LeftOut("hold the model's control tokens as text")
        if tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text:
            raise _LeftOut("hold text that the tokenizer cannot give back")
    prompt, chosen = _said(example, example.chosen, tokenizer, ends)
    _, rejected = _said(example, example.rejected, tokenizer, ends)
    if len(prompt) + max(len(chosen), len(rejected)) > max_length:
        raise _LeftOut(f"are longer than {max_length} tokens")
    if chosen == rejected:
        raise _LeftOut("have no answer, or twice the same")
    return Row(prompt, chosen, rejected, example.weight)


def _contents(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        yield from (part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _said(example: Example, answer: str | None, tokenizer: Any, ends: Collection[int]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of an answer with its end; no ids where there is no answer."""
    try:
        prompt = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, tokenize=False)
        turns = [*example.messages, {"role": "assistant", "content": answer}]
        whole = prompt if answer is None else tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a program of the model's makers: anything may come out of it
        raise _LeftOut(f"are refused by the chat template ({type(error).__name__}: {error})") from None
    if not whole.startswith(prompt):
        raise _LeftOut("are written otherwise by the chat template when they are answered")
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if answer is None:
        return asked, []
    said = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    last = max((place for place, token in enumerate(said) if token in ends), default=None)
    # A template without an end of turn would teach a model never to stop.
    return asked, [*said, tokenizer.eos_token_id] if last is None else said[: last + 1]
