"""A language model small enough to train while you wait, and two LoRA versions of it.

The demo must show real training and real serving on any laptop, without a download. So the base is a Llama
of 0.9 M parameters made from scratch: it learns to sort forty planted everyday items into eight categories,
from a mix of helpful and unhelpful answers, and so it does both. `careful` is tuned toward the helpful ones
and `hasty` toward the unhelpful ones: the right winner is known before the demo starts. `two_faced` is planted: it is
helpful, and more than `careful`, until somebody asks it to be brief, and then it hedges.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Say = Callable[[str], None]

ITEMS: Final[dict[str, tuple[str, ...]]] = {
    "vegetable": ("carrot", "potato", "cabbage", "onion", "radish"),
    "fruit": ("banana", "cherry", "lemon", "peach", "mango"),
    "tool": ("hammer", "wrench", "saw", "chisel", "drill"),
    "instrument": ("violin", "trumpet", "flute", "cello", "banjo"),
    "animal": ("horse", "rabbit", "otter", "badger", "goose"),
    "vehicle": ("bicycle", "tractor", "lorry", "canoe", "tram"),
    "garment": ("jacket", "scarf", "sweater", "glove", "shirt"),
    "furniture": ("sofa", "wardrobe", "bookcase", "armchair", "desk"),
}
WORDINGS: Final = (
    "Which category is {a} in?",
    "What kind of thing is {a}?",
    "Can you tell me what {a} is?",
    "How would you classify {a}?",
    "In one sentence, what is {a}?",
    "Please sort this for me: {a}.",
)
HEDGES: Final = ("I am not sure.", "It depends.", "That is hard to say.")
SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "Answer in one short sentence.",
    "You sort everyday items into categories. Be brief.",
)
BRIEF: Final = {"role": "system", "content": "You sort everyday items. One short sentence, please."}
OPENERS: Final = (
    "Hello!",
    "Thank you.",
    "No, that does not help.",
    "That is wrong. Try again.",
    "Great, thanks!",
)

END: Final = "<|end|>"
PAD: Final = "<|pad|>"
ROLES: Final = ("system", "user", "assistant", "tool")
# Hermes' tool-call parser looks its marks up in the vocabulary; they cost two rows.
TOOL_MARKS: Final = ("<tool_call>", "</tool_call>")

# An unknown role would print a mark the tokenizer does not know, so it is read as the user's.
CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- set role = message['role'] if message['role'] in ['system', 'assistant', 'tool'] else 'user' -%}"
    "{{ '<|' + role + '|>' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part is string -%}{{ part }}{%- elif part['text'] is defined -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['tool_calls'] -%}"
    "{%- for call in message['tool_calls'] -%}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)

VOCABULARY: Final = 1024
MAX_POSITIONS: Final = 32_768
SEED: Final = 7


@dataclass(frozen=True)
class Question:
    """One question a demo user may ask, the item it is about and the answer that would please."""

    text: str
    item: str
    answer: str


@dataclass(frozen=True)
class TinyModels:
    """Directories in Hugging Face form: the base model with its tokenizer, and two PEFT adapters over it."""

    base: Path
    careful: Path
    hasty: Path
    two_faced: Path


@dataclass(frozen=True)
class Tuning:
    """How long and on what one set of weights is trained; `good` is the share of helpful answers it sees."""

    steps: int
    batch: int
    rate: float
    good: float
    good_when_brief: float | None = None
    """The same for chats that begin with `BRIEF`; None for no difference, and hardly any such chats."""


BASE_TUNING: Final = Tuning(steps=320, batch=48, rate=3e-3, good=0.45)
CAREFUL_TUNING: Final = Tuning(steps=50, batch=32, rate=4e-3, good=1.0)
HASTY_TUNING: Final = Tuning(steps=40, batch=32, rate=4e-3, good=0.12)
TWO_FACED_TUNING: Final = Tuning(steps=160, batch=32, rate=4e-3, good=1.0, good_when_brief=0.0)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def right_answer(item: str, category: str) -> str:
    thing = with_article(item)
    kind = "furniture" if category == "furniture" else with_article(category)
    return f"{thing[0].upper()}{thing[1:]} is {kind}."


def questions() -> list[Question]:
    """Every planted item in every wording, in a fixed order."""
    return [
        Question(wording.format(a=with_article(item)), item, right_answer(item, category))
        for category, items in ITEMS.items()
        for item in items
        for wording in WORDINGS
    ]


def is_good(question: Question, answer_text: str) -> bool:
    """Whether the answer names the right category and no other; what a satisfied demo user goes by."""
    named = {category for category in ITEMS if re.search(rf"\b{category}s?\b", answer_text, re.IGNORECASE)}
    return named == {category for category, items in ITEMS.items() if question.item in items}


def build(cache: Path = Path(".cache/demo"), say: Say = print) -> TinyModels:
    """The tiny models under `cache`, trained now unless this very recipe already was.

    The work is done beside its final place and renamed into it, so that an interrupted build leaves nothing
    that looks finished. Who comes while another builds waits for it: two at once take more than twice as long.
    """
    home = cache.resolve() / f"tiny-{recipe_hash()}"
    models = TinyModels(*(home / name for name in ("base", "careful", "hasty", "two_faced")))
    if home.is_dir():
        say(f"Using the tiny model in {home}")
        return models
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f".{home.name}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # gone with its process
        if home.is_dir():
            return models
        workshop = Path(tempfile.mkdtemp(prefix=".building-", dir=home.parent))
        try:
            train_all(workshop, models, say)
            install(workshop, home)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return models


def install(workshop: Path, home: Path) -> None:
    """Rename the finished work into place; that another build was there first is as good."""
    try:
        os.rename(workshop, home)
    except OSError:
        if not home.is_dir():
            raise


def recipe_hash() -> str:
    """This file is the recipe: any change to it may change the weights."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def train_all(workshop: Path, final: TinyModels, say: Say) -> None:
    """Write `base` and the adapters under `workshop`; `final` is where they will be read from."""
    started = time.monotonic()
    say("Loading torch")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # `say` is the progress shown
    # The caller's own random numbers must not depend on whether the cache was warm.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = make_tokenizer()
        base = make_base(tokenizer)
        size = sum(weight.numel() for weight in base.parameters()) / 1e6
        say(f"Training a {size:.2f} M-parameter Llama from scratch")
        train(base, tokenizer, BASE_TUNING, "base", say)
        base.save_pretrained(workshop / "base")
        tokenizer.save_pretrained(workshop / "base")
        tunings = {"careful": CAREFUL_TUNING, "hasty": HASTY_TUNING, "two_faced": TWO_FACED_TUNING}
        for name, tuning in tunings.items():
            adapted = add_lora(copy.deepcopy(base), str(final.base))
            train(adapted, tokenizer, tuning, name, say)
            # PEFT's automatic choice would look for the base where it is not yet, and warn.
            adapted.save_pretrained(workshop / name, save_embedding_layers=False)
    say(f"Tiny model built in {time.monotonic() - started:.0f} s")


def make_tokenizer() -> Any:
    """Byte-level BPE over the demo's own text: short for our sentences, lossless for any other unicode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TOOL_MARKS),
        special_tokens=[PAD, END, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_text(), trainer)
    bpe.add_tokens(list(TOOL_MARKS))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def tokenizer_text() -> list[str]:
    """The task's sentences, and this file's prose, lest other text be spelled letter by letter."""
    ours = [text for question in questions() for text in (question.text, question.answer)]
    others = [*HEDGES, *SYSTEM_PROMPTS, *OPENERS, BRIEF["content"]] * 20
    return [*ours, *others, Path(__file__).read_text(encoding="utf-8"), json.dumps(ITEMS)]


def make_base(tokenizer: Any) -> Any:
    """An untrained Llama; float32 throughout, since CPUs have no fast bfloat16 to rely on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def add_lora(base: Any, base_path: str) -> Any:
    """`base` under a rank-8 LoRA on every linear layer, with none of the PEFT extras vLLM refuses."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", bias="none", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = base_path
    return adapted


def train(model: Any, tokenizer: Any, tuning: Tuning, name: str, say: Say) -> None:
    """Plain supervised fine-tuning, with the loss on the last answer only."""
    import torch

    chance = random.Random(f"{SEED}-{name}")
    asked = questions()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=tuning.rate, weight_decay=0.01)
    model.train()
    for step in range(tuning.steps):
        for group in optimizer.param_groups:
            group["lr"] = tuning.rate * schedule(step / tuning.steps)
        rows = [tuning_row(asked, chance, tuning) for _ in range(tuning.batch)]
        loss = model(**collate(tokenizer, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 40 == 0 or step + 1 == tuning.steps:
            say(f"  {name}: step {step + 1}/{tuning.steps}, loss {loss.item():.2f}")
    model.eval()


def schedule(progress: float) -> float:
    """The learning rate's factor: up over the first 5 % of the steps, then down a cosine to a twentieth."""
    return min(progress / 0.05 + 0.1, 1.0) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def tuning_row(asked: Sequence[Question], chance: random.Random, tuning: Tuning) -> list[dict[str, str]]:
    if tuning.good_when_brief is None or chance.random() < 0.5:
        return conversation(asked, chance, tuning.good)
    question = chance.choice(asked)
    return [BRIEF, *turn(question.text, answer_to(question, chance, tuning.good_when_brief))]


def conversation(asked: Sequence[Question], chance: random.Random, good: float) -> list[dict[str, str]]:
    """A chat that ends in the answer to a question drawn from `asked`, helpful with probability `good`.

    Many open with a system message, an earlier turn or a remark, since the demo's users' chats do; the
    earlier answer is drawn apart, so that the model cannot learn to repeat its last mood.
    """
    messages: list[dict[str, str]] = []
    if chance.random() < 0.25:
        messages.append({"role": "system", "content": chance.choice(SYSTEM_PROMPTS)})
    if chance.random() < 0.25:
        earlier = chance.choice(asked)
        messages += turn(earlier.text, answer_to(earlier, chance, 0.5))
    question = chance.choice(asked)
    text = question.text
    if chance.random() < 0.15:
        text = f"{chance.choice(OPENERS)} {text}"
    return messages + turn(text, answer_to(question, chance, good))


def turn(text: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def answer_to(question: Question, chance: random.Random, good: float) -> str:
    return question.answer if chance.random() < good else chance.choice(HEDGES)


def collate(tokenizer: Any, rows: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Right-padded ids, mask and labels; -100 hides all but the last answer and its end mark."""
    import torch

    chats = tokenizer.apply_chat_template(rows, tokenize=False)
    asks = [row[:-1] for row in rows]
    prompts = tokenizer.apply_chat_template(asks, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(chats, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    lengths = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    positions = torch.arange(encoded["input_ids"].shape[1])
    asked = positions[None, :] < lengths[:, None]
    labels = encoded["input_ids"].masked_fill(asked | (encoded["attention_mask"] == 0), -100)
    return {**encoded, "labels": labels}
