"""That replicas say with a version what PEFT says with it, token by token, on held-out prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learner import serving
from learner.registry import Version
from learner.shards import read
from learner.workshop import Refused, Say, Workshop

AGREEMENT = "agreement"
"""The metric under which the registry keeps the worst replica's share of equal tokens."""
CHECKED = 32
"""Held-out prompts on which replicas are compared with PEFT."""
CHECKED_TOKENS = 64
GREETING = [{"role": "user", "content": "Hello"}]


def prove(shop: Workshop, version: Version, data: Path, say: Say) -> None:
    """Each replica says with the version what PEFT says, and has it still when all were asked."""
    expected, shares = expected_answers(shop, version, data), []
    for replica in shop.fleet.replicas:
        try:
            found = serving.agreement(replica, version.name, expected)
            serving.warm(replica, version.name)
        except serving.ServingFailed as error:
            _check_there(shop, version)
            raise error
        say("serve", {"replica": replica.url, "agreement": found.share, "tokens": found.tokens})
        if not found.apart:
            raise Refused(f"{replica.url} cannot serve {version.name}: {found.touched}")
        if not found.holds():
            raise Refused(
                f"{replica.url} says {found.share:.1%} of PEFT's tokens with {version.name}; the adapter is felt "
                f"in {found.telling_equal} of {found.telling} places, and {found.prompts_equal} of {found.prompts} "
                "prompts are the same: is its base, template or dtype another one?"
            )
        shares.append(found.share)
    _check_there(shop, version)
    shop.registry.measure(version.name, {AGREEMENT: min(shares)})


def _check_there(shop: Workshop, version: Version) -> None:
    for replica in shop.fleet.replicas:
        if version.name not in serving.listing(replica).adapters:
            raise serving.Unreachable(f"{replica.url} was restarted while {version.name} was compared; try again")


def expected_answers(shop: Workshop, version: Version, data: Path) -> list[serving.Expected]:
    """What PEFT says to held-out prompts, the shorter ones, as far as they fit what was trained."""
    held_out = sorted((one.messages for one in read(data) if one.split == "held_out"), key=_size)
    prompts = held_out[:CHECKED] or [GREETING]
    longest = int(version.spec.get("hyper", {}).get("max_length", 0)) or CHECKED_TOKENS
    said = shop.generate(version.base, str(version.adapter), prompts, CHECKED_TOKENS)
    found = [
        serving.Expected(one["prompt_ids"], one["token_ids"], messages)
        for one, messages in zip(said, prompts, strict=True)
        if len(one["prompt_ids"]) <= longest
    ]
    if not found:
        raise Refused(f"no held-out prompt is short enough ({longest} tokens) to compare the replicas on")
    return found


def _size(messages: list[dict[str, Any]]) -> tuple[int, str]:
    text = str(messages)
    return len(text), text
