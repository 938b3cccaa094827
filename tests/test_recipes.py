"""What a model of some size is trained with."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from learner.recipes import BILLION, MILLION, TABLE, parameters_of, recipe
from learner.spec import Hyper

GIB = 2**30


def test_larger_models_learn_at_lower_rates_and_no_rate_is_stocks() -> None:
    sizes = (MILLION, 135 * MILLION, 8 * BILLION, 70 * BILLION)
    rates = [recipe(size, gpu=False).learning_rate for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(sizes)
    assert min(rates) > 1e-6
    assert [below for below, _ in TABLE] == sorted(below for below, _ in TABLE)


def test_without_a_gpu_nothing_is_asked_that_needs_one() -> None:
    for size in (MILLION, 500 * MILLION, 8 * BILLION):
        found = recipe(size, gpu=False, gpu_memory=None)
        assert (found.precision, found.quantize) == ("float32", False)


@pytest.mark.parametrize(
    ("size", "memory", "quantize"),
    [(MILLION, 8, False), (8 * BILLION, 80, False), (8 * BILLION, 16, True), (70 * BILLION, 141, True)],
)
def test_a_model_that_does_not_fit_in_half_precision_is_quantized(size: int, memory: int, quantize: bool) -> None:
    found = recipe(size, gpu=True, gpu_memory=memory * GIB)
    assert found.precision == "bfloat16"
    assert found.quantize is quantize


@pytest.mark.parametrize("memory", [None, 16, 24, 48, 80, 141])
@pytest.mark.parametrize("size", [MILLION, 500 * MILLION, 3 * BILLION, 8 * BILLION, 70 * BILLION])
def test_memory_changes_the_batch_and_never_the_step(size: int, memory: int | None) -> None:
    plain = recipe(size, gpu=False)
    found = recipe(size, gpu=True, gpu_memory=None if memory is None else memory * GIB)
    assert found.batch * found.accumulate == plain.batch * plain.accumulate
    assert found.learning_rate == plain.learning_rate


def test_more_memory_never_makes_the_batch_smaller_where_nothing_else_changes() -> None:
    found = [recipe(8 * BILLION, gpu=True, gpu_memory=memory * GIB) for memory in range(24, 160, 8)]
    for less, more in pairwise(found):
        same = (less.quantize, less.gradient_checkpointing) == (more.quantize, more.gradient_checkpointing)
        assert not same or more.batch >= less.batch
    assert found[0].gradient_checkpointing
    assert not found[-1].gradient_checkpointing


def test_a_recipe_is_a_whole_hyper_that_can_be_overridden() -> None:
    assert isinstance(recipe(10**15, gpu=True), Hyper)


def safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}} | {name: {"shape": shape} for name, shape in shapes.items()})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def test_parameters_are_counted_over_all_files_from_their_headers(tmp_path: Path) -> None:
    safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": [3, 4], "b": [5]})
    safetensors(tmp_path / "model-00002-of-00002.safetensors", {"c": [2, 2, 2], "scalar": []})
    assert parameters_of(tmp_path) == 12 + 5 + 8 + 1


def test_a_folder_without_weights_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no"):
        parameters_of(tmp_path)
    for body in (b"", b"\xff" * 20, struct.pack("<Q", 4) + b"[1]}", struct.pack("<Q", 8) + b'{"a": 1}'):
        (tmp_path / "model.safetensors").write_bytes(body)
        with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
            parameters_of(tmp_path)
