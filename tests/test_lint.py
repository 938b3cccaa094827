"""Adapters that vLLM would refuse, or serve as something else, are found before a replica is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.lint import CONFIG, SERVER_RANKS, WEIGHTS, lint

CLEAN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.0.mlp.down_proj"
Arrays = dict[str, np.ndarray[Any, Any]]


def arrays(rank: int = 4) -> Arrays:
    return {
        f"{module}.lora_{side}.weight": np.full((rank, 6) if side == "A" else (5, rank), 0.5, np.float32)
        for module in (Q, DOWN)
        for side in "AB"
    }


def safetensors(tensors: Arrays, dtype: str | None = None) -> bytes:
    """The file's format, by its documentation; two-byte integers are written as `dtype`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        kind = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "<u2": dtype}[array.dtype.str]
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path, {}, safetensors(arrays()))


def written(folder: Path, config: dict[str, Any], weights: bytes) -> Path:
    (folder / CONFIG).write_text(json.dumps(CLEAN | config))
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def test_a_plain_adapter_passes(folder: Path) -> None:
    assert lint(folder) == []


@pytest.mark.parametrize(
    ("config", "finding"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; vLLM serves LORA only"),
        ({"r": 0}, "r is 0; it must be a whole number from 1"),
        ({"r": "16"}, "r is '16'"),
        ({"r": 17}, "r is 17, the server takes up to 16; start vLLM with --max-lora-rank 32, or train with a lower"),
        ({"r": 513}, "r is 513, the server takes up to 16; train with a lower rank"),
        ({"rank_pattern": {"q_proj": 24}}, "rank_pattern of 'q_proj' is 24, the server takes up to 16; start vLLM"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; it must be an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern of 'q_proj' is 'x'; set a number"),
        ({"lora_alpha": None}, "lora_alpha is None; set a number"),
        ({"target_modules": []}, "target_modules names nothing"),
        ({"bias": "all"}, "bias is 'all'; vLLM serves no biases"),
        ({"use_dora": True}, "use_dora is True; vLLM does not serve DoRA: train without"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*: train without"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, "vLLM does not serve trained tokens"),
        ({"layer_replication": [[0, 2]]}, "vLLM does not serve replicated layers"),
        ({"alora_invocation_tokens": [1]}, "vLLM does not serve Activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the base"),
        ({"init_lora_weights": "olora"}, "train with init_lora_weights=True, or convert"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ],
)
def test_a_config_that_vllm_refuses_is_one_finding(folder: Path, config: dict[str, Any], finding: str) -> None:
    (found,) = lint(written(folder, config, safetensors(arrays())))
    assert re.search(finding, found), found


def test_every_wrong_setting_is_found_at_once(folder: Path) -> None:
    assert len(lint(written(folder, {"use_dora": True, "bias": "all", "r": 64}, b"no weights"))) == 4


@pytest.mark.parametrize("init", [True, False, "gaussian", "EVA", "orthogonal"])
def test_beginnings_that_leave_the_base_alone_pass(folder: Path, init: object) -> None:
    assert lint(written(folder, {"init_lora_weights": init}, safetensors(arrays()))) == []


def test_a_rank_below_the_servers_passes_and_the_servers_must_be_one_it_has(folder: Path) -> None:
    assert all(lint(folder, rank) == [] for rank in SERVER_RANKS[1:])
    assert len(lint(folder, 1)) == 1
    with pytest.raises(ValueError, match="vLLM has no --max-lora-rank 24; take one of 1, 8, 16"):
        lint(folder, 24)


def with_nan(dtype: str) -> bytes:
    """Two of them, among the largest numbers that the type has."""
    tensors = arrays()
    if dtype == "BF16":
        halves = {name: np.full(array.shape, 0x7F7F, np.uint16) for name, array in tensors.items()}
        halves[f"{Q}.lora_A.weight"][1, 2:4] = 0x7FC0, 0xFF80  # NaN and -inf
        return safetensors(halves, "BF16")
    kind = {"F32": np.float32, "F16": np.float16}[dtype]
    tensors = {name: np.full(array.shape, np.finfo(kind).max, kind) for name, array in tensors.items()}
    tensors[f"{Q}.lora_A.weight"][1, 2:4] = np.nan, -np.inf
    return safetensors(tensors)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_numbers_that_are_none_are_found_in_each_type(folder: Path, dtype: str) -> None:
    (found,) = lint(written(folder, {}, with_nan(dtype)))
    assert found.startswith(f"{Q}.lora_A.weight has 2 numbers that are NaN or infinite; the training diverged")


def changed(**arrays_by_name: np.ndarray[Any, Any] | None) -> bytes:
    """The clean weights with others (None: without) under `q.A`, or under a name that is written out."""
    tensors = arrays()
    for short, array in arrays_by_name.items():
        name = f"{Q}.lora_{short[-1]}.weight" if short.startswith("q_") else short
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    return safetensors(tensors)


ONES = np.ones((4, 6), np.float32)


@pytest.mark.parametrize(
    ("weights", "finding"),
    [
        (changed(q_A=None), "has lora_B and not its other half"),
        (changed(q_B=None), "has lora_A and not its other half"),
        (changed(q_A=np.ones((3, 6), np.float32)), "lora_A [3, 6] and lora_B [5, 4], but the config says rank 4"),
        (changed(q_B=np.ones((5, 3), np.float32)), "lora_B [5, 3], but the config says rank 4"),
        (changed(q_A=np.ones(24, np.float32)), "lora_A [24]"),
        (changed(q_A=np.ones((4, 6))), "is F64; vLLM takes F32, F16, BF16"),
        (changed(**{"base_model.model.lm_head.weight": ONES}), "lm_head.weight is no lora_A or lora_B; train nothing"),
        (changed(**{f"{Q}.lora_magnitude_vector": ONES}), "lora_magnitude_vector is no lora_A"),
        (
            changed(**{"base_model.model.x.k_proj.lora_A.weight": ONES}),
            "k_proj.lora_A.weight is none of target_modules",
        ),
        (
            changed(q_B=np.zeros((5, 4), np.float32), **{f"{DOWN}.lora_B.weight": np.zeros((5, 4), np.float32)}),
            "every lora_B is zero: it would answer as the base does",
        ),
        (safetensors({}), "there are no lora_A and lora_B at all"),
    ],
)
def test_weights_that_do_not_fit_are_one_finding(folder: Path, weights: bytes, finding: str) -> None:
    (found,) = lint(written(folder, {}, weights))
    assert finding in found


def test_ranks_and_targets_by_pattern_are_peft_s(folder: Path) -> None:
    tensors = arrays() | {name: array for name, array in arrays(8).items() if "q_proj" in name}
    assert lint(written(folder, {"rank_pattern": {r"layers\.\d+\.self_attn.q_proj": 8}}, safetensors(tensors))) == []
    assert lint(written(folder, {"target_modules": "all-linear"}, safetensors(arrays()))) == []
    assert lint(written(folder, {"target_modules": r".*\.(q|down)_proj"}, safetensors(arrays()))) == []
    found = lint(written(folder, {"target_modules": "q_proj"}, safetensors(arrays())))
    assert len(found) == 5, "a string is a pattern of the whole path"


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (b"", "its header's length is wrong"),
        (b"\xff" * 64, "its header's length is wrong"),
        (safetensors(arrays())[:-4], "lie behind its end; it is cut off"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((4).to_bytes(8, "little") + b"\x80abc", "cannot be read"),
        ((8).to_bytes(8, "little") + b'{"a":{}}', "data_offsets"),
        (safetensors(arrays()).replace(b"[4, 6]", b"[4, 7]"), "bytes, not those of shape [4, 7]"),
    ],
)
def test_a_file_that_is_no_whole_safetensors_file_is_said(folder: Path, weights: bytes, why: str) -> None:
    (found,) = lint(written(folder, {}, weights))
    assert why in found
    assert found.endswith("save with safe_serialization=True")


def test_a_folder_that_is_no_adapter_is_said(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    (found,) = lint(folder)
    assert "adapter_model.bin is pickled: never load it" in found
    for body in (b"{", b"[]", b"\xff"):
        (folder / CONFIG).write_bytes(body)
        (found,) = lint(folder)
        assert found.endswith("name the folder that PEFT's save_pretrained wrote")
    (found,) = lint(folder / "none")
    assert "cannot be read" in found
