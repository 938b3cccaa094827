"""Whether vLLM takes an adapter's folder, said before a replica is asked.

What it accepts is read in vLLM 0.32: `lora/peft_helper.py` (the config), `lora/lora_model.py` and `lora/utils.py` (the
tensors). We are stricter where vLLM would serve something else than what was trained, or nothing new: it ignores
`trainable_token_indices`, takes a pickled `adapter_model.bin`, and looks for neither NaN nor weights that are all zero;
its saved modules are for classifiers. Safetensors are read with numpy alone (8 bytes length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` can be; an adapter's own rank may be any up to it."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways to begin that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA's kin change them."""
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias",
    "alora_invocation_tokens": "Activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "modules_to_save": "whole modules beside LoRA",
    "trainable_token_indices": "trained tokens",
}
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}
_EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""The exponent's bits: all set in NaN and the infinities (IEEE 754), and numpy knows no bfloat16."""
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class Tensor(NamedTuple):
    """One entry of a safetensors file; `bits` are its numbers, undecoded."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: np.ndarray[Any, Any]


def lint(folder: Path, max_lora_rank: int = 16) -> list[str]:
    """What keeps the adapter in `folder` from being served, and what to do about each; [] if nothing does.

    `max_lora_rank` is the server's; ValueError if vLLM knows no such one.
    """
    if max_lora_rank not in SERVER_RANKS:
        known = ", ".join(map(str, SERVER_RANKS))
        raise ValueError(f"vLLM has no --max-lora-rank {max_lora_rank}; take one of {known}")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        return [f"{folder / CONFIG} cannot be read ({error}); name the folder that PEFT's save_pretrained wrote"]
    if not isinstance(config, dict):
        return [f"{folder / CONFIG} is no JSON object; name the folder that PEFT's save_pretrained wrote"]
    found = [*lint_config(config, max_lora_rank)]
    try:
        tensors = read_safetensors(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        pickled = " (adapter_model.bin is pickled: never load it)" if (folder / "adapter_model.bin").exists() else ""
        return [*found, f"{folder / WEIGHTS} cannot be read ({error}){pickled}; save with safe_serialization=True"]
    return found or [*lint_tensors(tensors, config)]


def lint_config(config: Mapping[str, Any], max_lora_rank: int) -> Iterator[str]:
    """What is wrong with an `adapter_config.json`."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}; vLLM serves LORA only: train with LoraConfig"
    alpha = config.get("lora_alpha")
    if not _is_number(alpha):
        yield f"lora_alpha is {alpha!r}; set a number"
    if not isinstance(config.get("target_modules"), (list, str)) or not config["target_modules"]:
        yield "target_modules names nothing; name the linear layers that were trained, or all-linear"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            yield f"{key} is {config[key]!r}; it must be an object of names and numbers"
    patterns = _pattern(config, "rank_pattern")
    for where, rank in [
        ("r", config.get("r")),
        *((f"rank_pattern of {key!r}", rank) for key, rank in patterns.items()),
    ]:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            yield f"{where} is {rank!r}; it must be a whole number from 1"
        elif rank > max_lora_rank:
            enough = next((each for each in SERVER_RANKS if each >= rank), None)
            raised = f"start vLLM with --max-lora-rank {enough}, or " if enough else ""
            yield f"{where} is {rank}, the server takes up to {max_lora_rank}; {raised}train with a lower rank"
    for key, alpha in _pattern(config, "alpha_pattern").items():
        if not _is_number(alpha):
            yield f"alpha_pattern of {key!r} is {alpha!r}; set a number"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}; vLLM serves no biases: train with bias='none'"
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            yield f"{key} is {config[key]!r}; vLLM does not serve {what}: train without"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield (
            f"init_lora_weights is {init!r}, which changed the base's weights, and vLLM serves the base as it is; "
            "train with init_lora_weights=True, or convert (path_initial_model_for_weight_conversion)"
        )


def lint_tensors(tensors: list[Tensor], config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the weights, given a config with which nothing is."""
    sides: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            yield f"{tensor.name} is no lora_A or lora_B; train nothing else (no embeddings, heads or biases)"
        elif not _targeted(match["module"], config["target_modules"]):
            yield f"{tensor.name} is none of target_modules; the weights belong to another config: save both again"
        else:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        yield from _lint_numbers(tensor)
    for module, pair in sides.items():
        yield from _lint_pair(module, pair, _rank(module, config))
    if not sides:
        yield "there are no lora_A and lora_B at all; save the adapter after training, not the base"
    elif not any((pair["B"].bits << 1).any() for pair in sides.values() if "B" in pair):
        yield "every lora_B is zero: it would answer as the base does; it was not trained, or saved too early"


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a file, mapped and not loaded. ValueError, KeyError or TypeError where it is not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("its header's length is wrong; it is cut off, or no safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    data = np.memmap(path, mode="r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    return [_tensor(name, entry, data) for name, entry in sorted(header.items())]


def _tensor(name: str, entry: Mapping[str, Any], data: np.ndarray[Any, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"the numbers of {name} lie behind its end; it is cut off")
    kind = _DTYPES.get(dtype)
    if kind is None:
        return Tensor(name, dtype, shape, np.empty(0, np.uint8))
    if end - begin != kind.itemsize * math.prod(shape):
        raise ValueError(f"{name} has {end - begin} bytes, not those of shape {list(shape)}")
    return Tensor(name, dtype, shape, data[begin:end].view(kind))


def _lint_numbers(tensor: Tensor) -> Iterator[str]:
    if tensor.dtype not in _DTYPES:
        yield f"{tensor.name} is {tensor.dtype}; vLLM takes {', '.join(_DTYPES)}: save it as one of them"
        return
    exponent = _EXPONENTS[tensor.dtype]
    wrong = int(((tensor.bits & exponent) == exponent).sum())
    if wrong:
        yield f"{tensor.name} has {wrong} numbers that are NaN or infinite; the training diverged: lower its rate"


def _lint_pair(module: str, pair: Mapping[str, Tensor], rank: int) -> Iterator[str]:
    if len(pair) < 2:
        yield f"{module} has lora_{next(iter(pair))} and not its other half; save the adapter again"
        return
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        yield (
            f"{module} has lora_A {list(a)} and lora_B {list(b)}, but the config says rank {rank}; the weights belong "
            "to another config: save both again"
        )


def _targeted(module: str, targets: list[str] | str) -> bool:
    """PEFT's rule: a name is a module's whole path or the end of it; a string is `all-linear` or a pattern of it."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _rank(module: str, config: Mapping[str, Any]) -> int:
    """PEFT's rule: the first pattern that matches the end of the path, from a dot on."""
    for key, rank in _pattern(config, "rank_pattern").items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return int(rank)
    return int(config["r"])


def _pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    written = config.get(key)
    return written if isinstance(written, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
