"""A dataset's examples as other tools read them: Hugging Face `datasets` (for TRL), Argilla, Label Studio.

Rows are made by pure functions, one example at a time; writers put them into a folder that is there whole or not at
all. Texts are written as they are. Whose feedback it was is left out unless it is asked for.

Sources: TRL 1.16 "Dataset formats and types" (conversational); the Hub's "Manual Configuration" of data files;
`Dataset.from_disk` and `Record.from_dict` of Argilla 2.8; Label Studio's "Task format".
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Literal
from zlib import crc32

import msgspec

from learner.examples import Example, Kind, Split
from telemetry.errors import UnderstudyError

Row = dict[str, Any]
Write = Callable[[Row], None]
AGENT: Final = "understudy"


class CannotExport(UnderstudyError):
    """There is nothing to export, or something where it should go."""


def metadata(example: Example, with_users: bool = False) -> Row:
    """What each export tells of an example besides its texts. No value is null: types stay the same in every row."""
    told = {
        "id": example.id,
        "reason": example.reason,
        "weight": float(example.weight),
        "events": list(example.events),
        "route": example.route,
        "task_type": example.task_type or "",
        "synthetic": example.synthetic,
        "split": example.split,
    }
    return told | {"user": example.user or ""} if with_users else told


def chosen_comes_first(example: Example) -> bool:
    """Whoever judges a pair must not learn from its order; the same pair has the same order always."""
    return crc32(example.id.encode()) % 2 == 0


# Hugging Face.

CONFIGS: Final[dict[Kind, str]] = {
    "pair": "preference",
    "correction": "prompt_completion",
    "unpaired": "unpaired_preference",
}
HUB_SPLITS: Final[dict[Split, str]] = {"train": "train", "held_out": "test"}
_TYPES: dict[str, Any] = {"weight": "float64", "synthetic": "bool", "label": "bool"}


def hugging_face_row(example: Example, with_users: bool = False) -> Row:
    """A row of TRL's conversational format: preference, prompt-completion, or unpaired preference."""
    row: Row = {"prompt": example.messages}
    match example.kind:
        case "pair":
            row |= {"chosen": _answer(example.chosen), "rejected": _answer(example.rejected)}
        case "correction":
            row |= {"completion": _answer(example.chosen)}
        case "unpaired":
            wanted = example.chosen is not None
            row |= {"completion": _answer(example.chosen if wanted else example.rejected), "label": wanted}
    return row | metadata(example, with_users)


def write_hugging_face(examples: Iterable[Example], folder: Path, *, with_users: bool = False) -> Counter[str]:
    """JSON lines and a card: `datasets.load_dataset(folder, CONFIG)`. How many rows each `CONFIG/SPLIT` got."""
    rows: Counter[str] = Counter()
    columns: dict[str, list[str]] = {}
    plain = dict.fromkeys(CONFIGS.values(), True)
    with made(folder) as beside, ExitStack() as stack:
        files: dict[str, Write] = {}
        for example in examples:
            config, row = CONFIGS[example.kind], hugging_face_row(example, with_users)
            name = f"{config}/{HUB_SPLITS[example.split]}"
            if name not in files:
                files[name] = stack.enter_context(lines(beside / f"{name}.jsonl"))
            files[name](row)
            rows[name] += 1
            columns[config] = list(row)
            plain[config] = plain[config] and all(map(_is_plain, example.messages))
        _require(rows, "examples")
        described = {name: _features(own, plain[name]) for name, own in columns.items()}
        (beside / "README.md").write_text(card(folder.name, rows, described), encoding="utf-8")
    return rows


def card(title: str, rows: Mapping[str, int], features: Mapping[str, list[Row]]) -> str:
    """The dataset card. Its front matter says which files are which split, and the type of every column: the loader
    would guess from the first rows, and fail where later ones have other shapes."""
    import yaml

    configs = [name for name in CONFIGS.values() if name in features]
    matter = {
        "pretty_name": title,
        "task_categories": ["text-generation"],
        "tags": ["trl", "human-feedback", AGENT],
        "configs": [
            {
                "config_name": name,
                **({"default": True} if name == configs[0] else {}),
                "data_files": [
                    {"split": split, "path": f"{name}/{split}.jsonl"}
                    for split in HUB_SPLITS.values()
                    if f"{name}/{split}" in rows
                ],
            }
            for name in configs
        ],
        "dataset_info": [{"config_name": name, "features": features[name]} for name in configs],
    }
    table = "\n".join(f"| `{name.replace('/', '` | `')}` | {number} |" for name, number in sorted(rows.items()))
    return f"""---
{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---

# {title}

Preferences that Understudy made from what users of a model did and said, in TRL's conversational format. `test` is
held out: whoever has an example there has none in `train`.

| subset | split | rows |
| --- | --- | --- |
{table}

`reason` is what made it an example, `weight` how much it counts (1 on average), `events` the ids of the facts that it
comes from, `synthetic` whether no user gave it. Texts stand as the gateway kept them.
"""


def _features(columns: Iterable[str], plain: bool) -> list[Row]:
    """Types as a card names them. Prompts with tool calls or parts have no one shape, and stay JSON."""
    described: list[Row] = []
    for name in columns:
        # New for each column: YAML would write the same list once and point at it, which the loader does not bear.
        messages = [{"name": "role", "dtype": "string"}, {"name": "content", "dtype": "string"}]
        match name:
            case "prompt":
                described.append({"name": name, "list": messages if plain else "json"})
            case "chosen" | "rejected" | "completion":
                described.append({"name": name, "list": messages})
            case "events":
                described.append({"name": name, "list": "string"})
            case _:
                described.append({"name": name, "dtype": _TYPES.get(name, "string")})
    return described


def _answer(text: str | None) -> list[Row]:
    return [{"role": "assistant", "content": text}]


def _is_plain(message: Row) -> bool:
    return set(message) == {"role", "content"} and isinstance(message["content"], str)


# Argilla. Pairs and single answers are asked about differently, so they are two datasets.

Asked = Literal["pairs", "answers"]


def argilla_record(example: Example, with_users: bool = False) -> Row:
    """A record as `Record.from_dict` reads it; what users said is suggested, for people to agree with or not."""
    fields: Row = {"prompt": turns(example.messages)}
    if example.kind == "pair":
        first = chosen_comes_first(example)
        better = (example.chosen, example.rejected)
        fields["answer-1"], fields["answer-2"] = better if first else better[::-1]
        suggested = {"better": "1" if first else "2"}
    else:
        (fields["answer"],) = example.texts
        suggested = {"wanted": "no" if example.chosen is None else "yes"}
    return {
        "id": example.id,
        "fields": fields,
        "metadata": metadata(example, with_users),
        "suggestions": {name: {"value": value, "score": None, "agent": AGENT} for name, value in suggested.items()},
        "responses": {},
        "vectors": {},
    }


def write_argilla(examples: Iterable[Example], folder: Path, *, with_users: bool = False) -> Counter[str]:
    """`argilla.Dataset.from_disk(folder / "pairs")`, and "answers". How many records each got."""
    rows: Counter[str] = Counter()
    with made(folder) as beside, ExitStack() as stack:
        files: dict[str, Write] = {}
        for example in examples:
            name: Asked = "pairs" if example.kind == "pair" else "answers"
            if name not in files:
                _put_json(beside / name / ".argilla" / "settings.json", argilla_settings(name))
                _put_json(beside / name / ".argilla" / "dataset.json", {"name": f"{folder.name}-{name}"})
                files[name] = stack.enter_context(array(beside / name / "records.json"))
            files[name](argilla_record(example, with_users))
            rows[name] += 1
        _require(rows, "examples")
    return rows


def argilla_settings(asked: Asked) -> Row:
    """Fields, questions and metadata, as `Settings.from_json` reads them."""
    fields = {"answer-1": "Answer 1", "answer-2": "Answer 2"} if asked == "pairs" else {"answer": "Answer"}
    name, title, options = _QUESTIONS[asked]
    question = {
        "name": name,
        "title": title,
        "required": True,
        "settings": {
            "type": "label_selection",
            "options": [{"value": value, "text": text} for value, text in options.items()],
        },
    }
    text = {"type": "text", "use_markdown": True}
    return {
        "guidelines": None,
        "fields": [
            {"name": "prompt", "title": "Conversation", "required": True, "settings": {"type": "chat"}},
            *({"name": key, "title": shown, "required": True, "settings": text} for key, shown in fields.items()),
        ],
        "questions": [question],
        "vectors": [],
        "metadata": [
            *({"name": key, "title": key, "settings": {"type": "terms"}} for key in ("reason", "route", "task_type")),
            {"name": "weight", "title": "weight", "settings": {"type": "float"}},
        ],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
    }


_QUESTIONS: Final[dict[Asked, tuple[str, str, dict[str, str]]]] = {
    "pairs": ("better", "Which answer is better?", {"1": "Answer 1", "2": "Answer 2", "same": "Neither"}),
    "answers": ("wanted", "Is this what should be answered?", {"yes": "Yes", "no": "No"}),
}


# Label Studio. Pairs only. Not by its tag `Pairwise`: what that writes as `to_name`, the import of predictions refuses.

LABELING_CONFIG: Final = """\
<View>
  <Header value="Which answer is better?"/>
  <Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>
  <View style="display: flex; gap: 1em">
    <View style="flex: 1"><Text name="left" value="$left"/></View>
    <View style="flex: 1"><Text name="right" value="$right"/></View>
  </View>
  <Choices name="better" toName="prompt" choice="single-radio" showInline="true" required="true">
    <Choice value="left" hotkey="1"/>
    <Choice value="right" hotkey="2"/>
    <Choice value="neither" hotkey="3"/>
  </Choices>
</View>
"""


def label_studio_task(example: Example, with_users: bool = False) -> Row:
    """A task, with what users said as a prediction."""
    first = chosen_comes_first(example)
    left, right = (example.chosen, example.rejected) if first else (example.rejected, example.chosen)
    result = {
        "id": example.id[:10],
        "type": "choices",
        "from_name": "better",
        "to_name": "prompt",
        "value": {"choices": ["left" if first else "right"]},
    }
    return {
        "data": {"prompt": turns(example.messages), "left": left, "right": right, **metadata(example, with_users)},
        "predictions": [{"model_version": AGENT, "result": [result]}],
    }


def write_label_studio(examples: Iterable[Example], folder: Path, *, with_users: bool = False) -> Counter[str]:
    """`tasks.json` to import and `config.xml` for the project. How many pairs there are, and how many were left out."""
    rows: Counter[str] = Counter()
    with made(folder) as beside:
        with array(beside / "tasks.json") as write:
            for example in examples:
                if example.kind == "pair":
                    write(label_studio_task(example, with_users))
                rows["pairs" if example.kind == "pair" else "left out"] += 1
        _require({"pairs": rows["pairs"]}, "pairs")
        (beside / "config.xml").write_text(LABELING_CONFIG, encoding="utf-8")
    return rows


FORMATS: Final = {
    "huggingface": write_hugging_face,
    "argilla": write_argilla,
    "label-studio": write_label_studio,
}


# What they share.


def turns(messages: Iterable[Row]) -> list[Row]:
    """Messages as role and text. What is no text is named in brackets, calls of tools stand as JSON."""
    return [{"role": str(message.get("role", "")), "content": _text(message)} for message in messages]


def _text(message: Row) -> str:
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [_part(part) for part in content or ()]
    if calls := message.get("tool_calls"):
        parts.append(json.dumps(calls, ensure_ascii=False))
    return "\n".join(parts)


def _part(part: Any) -> str:
    if isinstance(part, dict):
        return str(part["text"]) if "text" in part else f"[{part.get('type', 'part')}]"
    return str(part)


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, which becomes it at the end; if anything fails, nothing is left."""
    if folder.exists():
        raise CannotExport(f"{folder} is there already; name a folder that is not")
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def lines(path: Path) -> Iterator[Write]:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        yield lambda row: file.writelines((msgspec.json.encode(row), b"\n"))


@contextmanager
def array(path: Path) -> Iterator[Write]:
    """One JSON array, written as it comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        before = iter([b"[\n"])
        yield lambda row: file.writelines((next(before, b",\n"), msgspec.json.encode(row)))
        file.write(next(before, b"") + b"\n]\n")


def _put_json(path: Path, value: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def _require(rows: Mapping[str, int], what: str) -> None:
    if not any(rows.values()):
        raise CannotExport(f"there are no {what} to export")
