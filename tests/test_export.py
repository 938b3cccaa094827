"""Exports, read back by the tools they are for where those are installed, else field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from learner.examples import Example, example_id
from learner.export import (
    FORMATS,
    CannotExport,
    argilla_record,
    argilla_settings,
    chosen_comes_first,
    hugging_face_row,
    label_studio_task,
    metadata,
    write_argilla,
    write_hugging_face,
    write_label_studio,
)

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue? 你好\n"}]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {}}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
    {"role": "tool", "tool_call_id": "1", "content": "a cat"},
]


def example(chosen: str | None, rejected: str | None = None, **more: Any) -> Example:
    kind = "pair" if chosen is not None and rejected is not None else more.pop("kind", "unpaired")
    messages = more.pop("messages", QUESTION)
    own = {"reason": "comparison", "events": ("i1", "s1"), "user": "pseudonym", "session": "se", **more}
    return Example(
        example_id(kind, messages, chosen, rejected), kind, messages, chosen=chosen, rejected=rejected, **own
    )


PAIR = example("Scattering.\n", "Because.", weight=1.5, route="assistant", task_type="why")
CORRECTION = example("Rayleigh scattering.", kind="correction", reason="edit")
WANTED = example("Scattering.", reason="copy")
UNWANTED = example(None, "Because.", reason="flag", split="held_out")
EVERY = [PAIR, CORRECTION, WANTED, UNWANTED]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`datasets.load_dataset`, offline and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    cache = str(tmp_path_factory.mktemp("cache"))
    yield lambda folder, config=None: datasets.load_dataset(str(folder), config, cache_dir=cache)
    datasets.enable_progress_bars()


def test_each_kind_is_a_row_of_trls_conversational_format() -> None:
    assert hugging_face_row(PAIR) == {
        "prompt": QUESTION,
        "chosen": [{"role": "assistant", "content": "Scattering.\n"}],
        "rejected": [{"role": "assistant", "content": "Because."}],
        **metadata(PAIR),
    }
    assert hugging_face_row(CORRECTION) == {
        "prompt": QUESTION,
        "completion": [{"role": "assistant", "content": "Rayleigh scattering."}],
        **metadata(CORRECTION),
    }
    assert hugging_face_row(WANTED)["label"] is True
    assert hugging_face_row(UNWANTED)["label"] is False
    assert hugging_face_row(UNWANTED)["completion"][0]["content"] == "Because."


def test_every_row_tells_where_it_comes_from_and_a_user_only_if_asked() -> None:
    told = metadata(PAIR)
    assert (told["id"], told["reason"], told["weight"], told["events"]) == (PAIR.id, "comparison", 1.5, ["i1", "s1"])
    for make in (hugging_face_row, argilla_record, label_studio_task):
        assert "pseudonym" not in json.dumps(make(PAIR))
        assert "pseudonym" in json.dumps(make(PAIR, with_users=True))
    assert None not in metadata(Example("x", "pair", [], "r"), with_users=True).values()


@pytest.mark.parametrize("format", FORMATS)
def test_users_stay_out_of_what_is_written(tmp_path: Path, format: str) -> None:
    FORMATS[format](EVERY, tmp_path / "out")
    FORMATS[format](EVERY, tmp_path / "named", with_users=True)
    found = {
        name: any(b"pseudonym" in path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file())
        for name in ("out", "named")
    }
    assert found == {"out": False, "named": True}


def test_datasets_loads_what_was_written(tmp_path: Path, load: Any) -> None:
    rows = write_hugging_face(EVERY, tmp_path / "mine")
    assert rows == {
        "preference/train": 1,
        "prompt_completion/train": 1,
        "unpaired_preference/train": 1,
        "unpaired_preference/test": 1,
    }
    (row,) = load(tmp_path / "mine")["train"]  # pairs are the default
    assert row == hugging_face_row(PAIR)
    (row,) = load(tmp_path / "mine", "prompt_completion")["train"]
    assert row == hugging_face_row(CORRECTION)
    unpaired = load(tmp_path / "mine", "unpaired_preference")
    assert list(unpaired["train"]) == [hugging_face_row(WANTED)]
    assert list(unpaired["test"]) == [hugging_face_row(UNWANTED)]


def test_datasets_loads_shapes_that_come_only_after_its_first_block(tmp_path: Path, load: Any) -> None:
    """It reads 10 MB at a time, and would take types from the first: whole weights, no events, plain messages."""
    long = [{"role": "user", "content": "h" * 100_000}]
    first = [example("yes", "no", messages=long, events=(), at=float(number)) for number in range(110)]
    last = example("yes", "no", messages=CALLS, weight=1.5)
    write_hugging_face([*first, last], tmp_path / "mine")
    train = load(tmp_path / "mine")["train"]
    assert len(train) == 111
    assert train[110] == hugging_face_row(last)
    assert train[0] == hugging_face_row(first[0])


def test_the_card_has_front_matter_and_counts(tmp_path: Path) -> None:
    write_hugging_face([PAIR, UNWANTED], tmp_path / "mine")
    _, matter, body = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    configs = yaml.safe_load(matter)["configs"]
    assert [(config["config_name"], config.get("default")) for config in configs] == [
        ("preference", True),
        ("unpaired_preference", None),
    ]
    assert configs[1]["data_files"] == [{"split": "test", "path": "unpaired_preference/test.jsonl"}]
    assert "| `unpaired_preference` | `test` | 1 |" in body


def test_the_better_answer_is_on_either_side_and_always_on_the_same() -> None:
    pairs = [example(f"good {number}", "bad") for number in range(100)]
    firsts = [chosen_comes_first(pair) for pair in pairs]
    assert 30 < sum(firsts) < 70
    for pair, first in zip(pairs, firsts, strict=True):
        fields, task = argilla_record(pair)["fields"], label_studio_task(pair)
        assert fields["answer-1" if first else "answer-2"] == pair.chosen
        assert argilla_record(pair)["suggestions"]["better"]["value"] == ("1" if first else "2")
        (result,) = task["predictions"][0]["result"]
        (side,) = result["value"]["choices"]
        assert task["data"][side] == pair.chosen


def test_argilla_gets_two_datasets_whose_records_fit_their_settings(tmp_path: Path) -> None:
    assert write_argilla(EVERY, tmp_path / "mine") == {"pairs": 1, "answers": 3}
    for name, asked in (("pairs", "better"), ("answers", "wanted")):
        folder = tmp_path / "mine" / name
        settings = json.loads((folder / ".argilla" / "settings.json").read_bytes())
        assert settings == argilla_settings(name)  # type: ignore[arg-type]
        assert json.loads((folder / ".argilla" / "dataset.json").read_bytes()) == {"name": f"mine-{name}"}
        (question,) = settings["questions"]
        options = {option["value"] for option in question["settings"]["options"]}
        for record in json.loads((folder / "records.json").read_bytes()):
            assert set(record["fields"]) == {field["name"] for field in settings["fields"]}
            assert set(record["suggestions"]) == {question["name"]} == {asked}
            assert record["suggestions"][asked]["value"] in options
            assert {one["name"] for one in settings["metadata"]} < set(record["metadata"])
            assert record["metadata"]["events"] == ["i1", "s1"]
    values = [argilla_record(one)["suggestions"]["wanted"]["value"] for one in EVERY[1:]]
    assert values == ["yes", "yes", "no"]


def test_label_studio_gets_pairs_and_a_config_that_names_their_data(tmp_path: Path) -> None:
    assert write_label_studio(EVERY, tmp_path / "mine") == {"pairs": 1, "left out": 3}
    (task,) = json.loads((tmp_path / "mine" / "tasks.json").read_bytes())
    root = ElementTree.parse(tmp_path / "mine" / "config.xml").getroot()
    shown = {tag.get("value", "")[1:] for tag in root.iter() if tag.get("value", "").startswith("$")}
    assert shown == {"prompt", "left", "right"}
    assert set(metadata(PAIR)) | shown == set(task["data"])
    (choices,) = root.iter("Choices")
    (result,) = task["predictions"][0]["result"]
    assert (result["from_name"], result["to_name"]) == (choices.get("name"), choices.get("toName"))
    assert set(result["value"]["choices"]) < {choice.get("value") for choice in choices}
    assert {tag.get("name") for tag in root.iter()} >= {result["to_name"]}


def test_messages_that_are_more_than_text_are_told_in_text() -> None:
    told = label_studio_task(example("yes", "no", messages=CALLS))["data"]["prompt"]
    assert told == [
        {"role": "user", "content": "What is this?\n[image_url]"},
        {"role": "assistant", "content": '[{"id": "1", "type": "function"}]'},
        {"role": "tool", "content": "a cat"},
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_there_whole_or_not_at_all(tmp_path: Path, format: str) -> None:
    def failing() -> Iterator[Example]:
        yield PAIR
        raise OSError("the dataset cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        FORMATS[format](failing(), tmp_path / "mine")
    with pytest.raises(CannotExport, match=r"there are no (examples|pairs) to export"):
        FORMATS[format]([], tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []
    FORMATS[format](EVERY, tmp_path / "mine")
    with pytest.raises(CannotExport, match="mine is there already"):
        FORMATS[format](EVERY, tmp_path / "mine")


def test_label_studio_refuses_where_there_are_only_single_answers(tmp_path: Path) -> None:
    with pytest.raises(CannotExport, match="no pairs"):
        write_label_studio([WANTED], tmp_path / "mine")
