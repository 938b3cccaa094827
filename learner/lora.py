"""A base model and an adapter over it, as tensors: loaded, asked how likely an answer is, asked for answers.

Beside `learner.train` the only file that loads torch. Losses are per example; Δ is by how much the summed
log-probability of the chosen answer gained over the reference, less the same of the rejected one.

`sigmoid+sft`   −log σ(βΔ), DPO (Rafailov et al. 2305.18290).
`robust`        unbiased when a share of the labels is flipped (Chowdhury et al. 2403.00409).
`conservative`  labels smoothed by that share (Mitchell 2023, "A note on DPO with noisy preferences"). TRL 1.16 has no
                such loss: it ignores `label_smoothing` for `sigmoid`.
`ipo`           (Δ a token − 1/2β)² (Azar et al. 2310.12036).

To each is added `sft_weight` × the chosen answer's negative log-likelihood a token (Pang et al. 2404.19733): a pair can
also be told apart by making both unlikely, the rejected one more. A correction has that term only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training
from peft import set_peft_model_state_dict as set_adapter_state
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from learner.examples import Example
from learner.hashes import located
from learner.rows import encode, ends_of
from learner.spec import Hyper, TrainingFailed

Said = tuple[list[int], list[int]]
"""Token ids of a prompt and of an answer to it."""

SCORED = 2048
"""Tokens that are scored at once: each needs room for the logits of the whole vocabulary."""
_NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "std::bad_alloc")


@contextmanager
def same_every_time(threads: int) -> Iterator[None]:
    """Deterministic kernels where there are any, and so many threads; all as it was afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warned, level = torch.is_deterministic_algorithms_warn_only_enabled(), transformers_logging.get_verbosity()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # TRL's buffers are large: it took 40 % of the time
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def give_memory_back() -> None:
    """To the machine what was freed: the C library keeps it otherwise, in pieces that nothing large fits into."""
    gc.collect()
    torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def tokenizer_of(base: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_of(base: Path, hyper: Hyper) -> Any:
    """The base, frozen by what is put over it; in 4 bits for QLoRA (Dettmers et al. 2305.14314)."""
    half = hyper.precision == "bfloat16" and torch.cuda.is_available()
    words: dict[str, Any] = {"dtype": torch.bfloat16 if half else torch.float32}
    if not hyper.quantize:
        return AutoModelForCausalLM.from_pretrained(base, **words)
    from transformers import BitsAndBytesConfig

    words["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    words["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model = AutoModelForCausalLM.from_pretrained(base, **words)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=hyper.gradient_checkpointing)


def config(hyper: Hyper, model: Any) -> LoraConfig:
    """Plain LoRA, as vLLM takes it: no bias, no DoRA, no other modules; its targets by name."""
    targets = _linear(model) if hyper.targets == "all-linear" else sorted(hyper.targets)
    return LoraConfig(
        r=hyper.rank, lora_alpha=hyper.alpha, lora_dropout=hyper.dropout, target_modules=targets, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def _linear(model: Any) -> list[str]:
    """Names of the layers that are linear, but for the head, which vLLM serves no adapter on."""
    head = model.get_output_embeddings()
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    return sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})


def weights_of(model: Any) -> bytes:
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {name: weight.contiguous().cpu() for name, weight in sorted(weights.items())}
    body: bytes = safetensors.torch.save(plain, {"format": "pt"})
    return body


def put(model: Any, weights: bytes, source: str) -> None:
    """Give the model's adapter these weights; all of them, or TrainingFailed."""
    new, now = safetensors.torch.load(weights), get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(name for name in new.keys() | now.keys() if name not in new or name not in now)
    wrong = wrong or sorted(name for name in new if new[name].shape != now[name].shape)
    if wrong:
        raise TrainingFailed(f"{source} is no adapter of this shape: {len(wrong)} weights differ, such as {wrong[0]}")
    set_adapter_state(model, new)


def config_file(model: Any, base: str) -> bytes:
    """adapter_config.json as PEFT writes it, but the same each time: sorted, and the base as it was named."""
    written = model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in written.items()}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def start_from(model: Any, folder: Path) -> None:
    """Start from an adapter of the same shape and scale. Raises TrainingFailed where it is of another."""
    ours = model.peft_config["default"]
    try:
        theirs = json.loads((folder / "adapter_config.json").read_bytes())
        weights = (folder / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        raise TrainingFailed(f"{folder} is no adapter to start from: {error.strerror}: {error.filename}") from None
    if (theirs["r"], theirs["lora_alpha"]) != (ours.r, ours.lora_alpha):
        raise TrainingFailed(f"{folder} has rank {theirs['r']} and alpha {theirs['lora_alpha']}; ask for the same")
    put(model, weights, str(folder))


def stacked(said: Sequence[Said], pad: int) -> dict[str, Any]:
    """Prompts with their answers [N, longest], padded on the right; `completion_mask` is 1 on the answers."""
    width = max(len(prompt) + len(answer) for prompt, answer in said)
    ids = torch.full((len(said), width), pad)
    known, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for place, (prompt, answer) in enumerate(said):
        end = len(prompt) + len(answer)
        ids[place, :end] = torch.tensor(prompt + answer)
        known[place, :end] = 1
        answers[place, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": known, "completion_mask": answers}


def logps(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Of each stacked answer the summed log-probability [N]; the model has TRL's head (`add_fused_lm_head`)."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    found = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, use_cache=False,
        fused_lm_head=True,
    )  # fmt: skip
    return found.log_probs.sum(1)


def preference_losses(
    hyper: Hyper, gained: torch.Tensor, lost: torch.Tensor, gained_tokens: torch.Tensor, lost_tokens: torch.Tensor
) -> torch.Tensor:
    """The loss of each pair, from its answers' log-ratios to the reference and their lengths in tokens."""
    up, down = logsigmoid(hyper.beta * (gained - lost)), logsigmoid(hyper.beta * (lost - gained))
    flipped = hyper.flip_rate
    match hyper.loss:
        case "sigmoid+sft":
            return -up
        case "robust":
            return (flipped * down - (1 - flipped) * up) / (1 - 2 * flipped)
        case "conservative":
            return -(1 - flipped) * up - flipped * down
        case "ipo":
            return (gained / gained_tokens - lost / lost_tokens - 1 / (2 * hyper.beta)) ** 2


def losses(
    hyper: Hyper, logps: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """The loss of each example [N].

    The first three have the figures of all chosen answers and behind them, of the examples `pairs`, the rejected ones'.
    """
    n = len(logps) - len(pairs)
    ratios = logps - reference
    each = -logps[:n] / tokens[:n]
    # A correction has nothing else to be learned by, so without the term in general it has it in full.
    scale = torch.full_like(each, hyper.sft_weight or 1.0)
    scale[pairs] = hyper.sft_weight
    preferred = preference_losses(hyper, ratios[:n][pairs], ratios[n:], tokens[:n][pairs], tokens[n:])
    return (scale * each).index_add(0, pairs, preferred)


def answered(
    model: Any, tokenizer: Any, ends: Collection[int], prompts: Sequence[list[int]], limit: int,
    temperature: float = 0.0, seed: int = 0, at_once: int = 64,
) -> list[list[int]]:  # fmt: skip
    """Token ids of an answer to each prompt, up to `limit`, with the end where it came; greedy at temperature 0."""
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    how = GenerationConfig(
        max_new_tokens=limit, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id,
        **drawn or {"do_sample": False},
    )  # fmt: skip
    model.eval()
    torch.manual_seed(seed)
    found: list[list[int]] = []
    for at in range(0, len(prompts), at_once):
        part = prompts[at : at + at_once]
        width = max(map(len, part))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in part])
        known = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part])
        with torch.no_grad():
            written = model.generate(
                input_ids=ids.to(model.device), attention_mask=known.to(model.device), generation_config=how
            )
        found += [_up_to_end(row, ends) for row in written[:, width:].tolist()]
    return found


def _up_to_end(ids: list[int], ends: Collection[int]) -> list[int]:
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


def generated(question: Mapping[str, Any]) -> dict[str, Any]:
    """Answers in float32 of a base, with an adapter as PEFT reads it from its folder or without (`--generate`)."""
    with same_every_time(int(question.get("threads", torch.get_num_threads()))):
        base = located(question["base"])
        tokenizer = tokenizer_of(base)
        model = _with(base, question.get("adapter"))
        ends = ends_of(base, tokenizer)
        prompts = [
            tokenizer(
                tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
                add_special_tokens=False,
            )["input_ids"]
            for messages in question["prompts"]
        ]
        temperature, seed = float(question.get("temperature", 0)), int(question.get("seed", 0))
        found = answered(model, tokenizer, ends, prompts, int(question["max_tokens"]), temperature, seed)
    said = [tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=True) for ids in found]
    return {
        "answers": [
            {"prompt_ids": prompt, "token_ids": ids, "text": text, "ended": ids[-1] in ends}
            for prompt, ids, text in zip(prompts, found, said, strict=True)
        ]
    }


def _with(base: Path, adapter: str | None) -> Any:
    """In float32, with the adapter as PEFT reads it from its folder, or without."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def scored(question: Mapping[str, Any]) -> dict[str, Any]:
    """How likely a base with each of some adapters finds both answers of pairs, in float32 (`--score`).

    Reads {"base", "adapters" (folders, or null for none), "examples" (as a dataset's lines), "max_length"}; gives
    {"scores": for each adapter, for each example, {"chosen", "rejected"} in nats a token, or {"left_out"}, why}.
    """
    with same_every_time(int(question.get("threads", torch.get_num_threads()))):
        base = located(question["base"])
        tokenizer = tokenizer_of(base)
        ends = ends_of(base, tokenizer)
        found = msgspec.convert(question["examples"], list[Example])
        rows, why = [], {}
        for place, example in enumerate(found):
            row, left_out = encode([example], "dpo", tokenizer, ends, int(question["max_length"]))
            if row and row[0].is_pair:
                rows.append((place, row[0]))
            else:
                why[place] = next(iter(left_out), "are no pair")
        scores = []
        for adapter in question["adapters"]:
            model = None
            give_memory_back()
            model = _with(base, adapter)
            said = [(row.prompt, answer) for _, row in rows for answer in (row.chosen, row.rejected)]
            each = _a_token(_where_there_is_room(model).eval(), said, tokenizer.pad_token_id)
            told: list[dict[str, Any]] = [{"left_out": why.get(place)} for place in range(len(found))]
            for n, (place, _) in enumerate(rows):
                told[place] = {"chosen": each[2 * n], "rejected": each[2 * n + 1]}
            scores.append(told)
    return {"scores": scores}


def _a_token(model: Any, said: Sequence[Said], pad: int) -> list[float]:
    """Of each answer its mean log-probability; answers of like length are looked at together."""
    found = [0.0] * len(said)
    for part in _batches([len(prompt) + len(answer) for prompt, answer in said]):
        inputs = {name: values.to(model.device) for name, values in stacked([said[n] for n in part], pad).items()}
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        known = -cross_entropy(logits.float().transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
        mask = inputs["completion_mask"][:, 1:]
        for n, value in zip(part, ((known * mask).sum(1) / mask.sum(1)).tolist(), strict=True):
            found[n] = value
    return found


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts, those of like length together; at most `SCORED` tokens at once, padding and all."""
    part: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda n: (lengths[n], n)):
        if part and (len(part) + 1) * lengths[place] > SCORED:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def _where_there_is_room(model: Any) -> Any:
    """On the GPU if the model fits twice into what is free there: a vLLM beside it has taken its part already."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2 * model.get_memory_footprint():
        return model.to("cuda")
    return model


def gathered(mine: list[Any]) -> list[Any]:
    """The lists of all processes as one, in each of them."""
    if not torch.distributed.is_initialized():
        return mine
    all_of_them: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_of_them, mine)
    return [item for part in all_of_them for item in part]


def chances() -> dict[str, Any]:
    """Where all random numbers stand."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "gpu": gpu}


def set_chances(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["gpu"] is not None:
        torch.cuda.set_rng_state(state["gpu"])
