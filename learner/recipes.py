"""How to train a model of some size, where nobody says otherwise: one table, with where its numbers come from. Pure.

Rates are for LoRA. Its best rate is about ten times that of full fine-tuning, up to fifteen in short runs, whatever the
rank; it belongs on all linear layers; and it likes small batches (Schulman et al. 2025, "LoRA Without Regret", Thinking
Machines). What full DPO was trained with: 5e-7 for 0.5 B (TRL's own script; 5e-6 with LoRA), 5e-7 with β 0.1 and
batches of 32 for 7 B (Zephyr, 2310.16944), 5e-7 for 8 B and 2e-7 for 70 B (Tülu 3, 2411.15124), with a warm-up of a
tenth and a linear decay.

The row for tiny models is measured (`bench/learner_quality.py`): between 1e-3 and 4e-3 one of 0.9 M learns the same,
and without the likelihood term it collapses at 2e-3. The others are what the sources say, not measured by us.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from msgspec.structs import replace

from learner.spec import Hyper

MILLION, BILLION = 10**6, 10**9

TABLE: tuple[tuple[int, Hyper], ...] = (
    (20 * MILLION, Hyper(learning_rate=2e-3, batch=16, max_length=512, evaluate_every=20)),
    (BILLION, Hyper(learning_rate=1e-5, batch=8, accumulate=4, max_length=1024, evaluate_every=25)),
    (13 * BILLION, Hyper(learning_rate=5e-6, batch=8, accumulate=4, max_length=2048, evaluate_every=25)),
    (70 * BILLION, Hyper(learning_rate=2e-6, batch=8, accumulate=4, max_length=2048, evaluate_every=25)),
)
"""Below how many parameters a row holds; the last one for anything larger too."""

_HALF, _QUARTER = 2.0, 0.6
"""Bytes a weight in bfloat16, and in 4 bits with what quantizing keeps besides (Dettmers et al. 2305.14314)."""
_SPARE = 2 * 2**30
"""Bytes for the adapter, its optimizer and what the libraries take."""
_USABLE = 0.9
"""Share of a GPU's memory that can be had whole."""


def recipe(parameters: int, gpu: bool = False, gpu_memory: int | None = None) -> Hyper:
    """How to train a model of so many parameters; `gpu_memory` is the bytes of one GPU, if they are known.

    On a GPU in bfloat16; in 4 bits if it would not fit otherwise, with activations computed twice if that saves the
    batch. The effective batch stays as it is. A batch that is too large still is made smaller while training.
    """
    row = next((row for below, row in TABLE if parameters < below), TABLE[-1][1])
    if not gpu:
        return row
    half = replace(row, precision="bfloat16")
    if gpu_memory is None:
        return half
    usable = _USABLE * gpu_memory - _SPARE
    if parameters * _HALF + _activations(parameters, 2 * row.max_length, True) > usable:
        half = replace(half, quantize=True)
    left = usable - parameters * (_QUARTER if half.quantize else _HALF)
    whole = row.batch * row.accumulate
    twice = left < 2 * _activations(parameters, 2 * row.max_length, False)
    fits = left / _activations(parameters, 2 * row.max_length, twice)
    batch = max((part for part in (1, 2, 4, 8, 16, 32) if part <= fits and whole % part == 0), default=1)
    return replace(half, batch=batch, accumulate=whole // batch, gradient_checkpointing=twice)


def parameters_of(folder: Path) -> int:
    """How many weights a model in Hugging Face form has, by the headers of its safetensors files.

    Raises FileNotFoundError where there are none, ValueError where one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors; is it a model's folder?")
    return sum(math.prod(shape) for path in files for shape in _shapes(path))


def _shapes(path: Path) -> list[list[int]]:
    """A safetensors file begins with 8 bytes, the length of the JSON that follows and says what is in it."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}); load the model again") from None


def _activations(parameters: int, tokens: int, twice: bool) -> float:
    """Bytes that a step keeps for so many tokens: about 34 × hidden × layers each in half precision (Korthikanti et al.
    2205.05198, without attention's squares), 2 × if they are computed twice and 34 × one layer at a time.

    Hidden and layers follow from parameters ≈ 12 × layers × hidden² and hidden ≈ 128 × layers, as in most models.
    """
    layers = max(1.0, math.cbrt(parameters / (12 * 128**2)))
    return tokens * 128 * layers * ((2 * layers + 34) if twice else 34 * layers)
