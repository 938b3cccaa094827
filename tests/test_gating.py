"""The gate as a step of a round: what follows a verdict, though somebody is killed or an operator is quicker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_cycle import Place, quiet
from test_cycle import place as place

from learner import cycle
from learner.diagnosis import Cause, Diagnosis
from learner.gate import Check, Report
from learner.gating import Gated, Unmeasured, check_gate
from learner.measured import Referee
from learner.registry import Version
from learner.rounds import Round, last_round
from learner.workshop import Refused, Workshop
from router.policy import Arm
from router.rollout_controller import load, propose

SLOWER = Cause("hyperparameters", 1.0, ("it went too far",), {"train": {"learning_rate": 1e-5}})
MORE = Cause("volume", 2.0, ("few pairs",), {"min_pairs": 1000})


class Killed(BaseException):
    """As by a signal: nothing that comes after is done."""


def gated(version: str, verdict: Any, *causes: Cause, again: bool = False) -> Gated:
    main = Check(name="win rate", kind="main", verdict=verdict, why="so it is", value=0.5)
    report = Report(
        verdict=verdict, why="because", champion="base", challenger=version, dataset="d", checks=(main,),
        referee=Referee(name="nobody"), divergence=None, alpha=0.05, seed=0,
    )  # fmt: skip
    return Gated(report, Diagnosis(causes, again, "of that"), Path("gate.html"))


def with_gate(place: Place, *verdicts: Callable[[Workshop, Version], Gated], **plan: Any) -> Workshop:
    """Gates that say one thing after the other, the last one for ever."""
    said = list(verdicts)

    def gate(shop: Workshop, version: Version, data: Path) -> Gated:
        return (said.pop(0) if len(said) > 1 else said[0])(shop, version)

    return place.shop(**plan)._replace(gate=gate, rolls_out=True)


def says(verdict: str, *causes: Cause, again: bool = False) -> Callable[[Workshop, Version], Gated]:
    return lambda shop, version: gated(version.name, verdict, *causes, again=again)


def rounds(shop: Workshop, most: int = 12) -> Sequence[Round | BaseException]:
    """Rounds until one has ended."""
    found: list[Any] = []
    for _ in range(most):
        try:
            found.append(cycle.once(shop, quiet))
        except (Refused, Unmeasured, Killed) as error:
            found.append(error)
        if not last_round(shop.documents, shop.route).active:
            return found
    return found


def test_what_passed_is_rolled_out_once_though_it_was_killed_right_after(place: Place) -> None:
    def die(shop: Workshop, version: Version) -> Gated:
        propose(shop.documents, shop.registry, shop.route, version.name, "learner", "passed", time.time())
        raise Killed

    shop = with_gate(place, die, says("fail"))
    killed, done = rounds(shop)
    assert isinstance(killed, Killed)
    assert isinstance(done, Round)
    _, rollout = load(place.store, "assistant")
    assert rollout is not None
    assert (done.step, rollout.challenger, rollout.number) == ("done", done.version, 1)
    assert all(done.version in loaded for loaded in place.loaded)


def test_a_version_that_an_operator_rolls_out_meanwhile_stays_loaded(place: Place) -> None:
    def quicker(shop: Workshop, version: Version) -> Gated:
        propose(shop.documents, shop.registry, shop.route, version.name, "operator", "in spite of it", time.time())
        return gated(version.name, "fail", SLOWER)

    (done,) = rounds(with_gate(place, quicker))
    assert isinstance(done, Round)
    assert (done.step, place.challenger) == ("done", done.version)
    assert all(done.version in loaded for loaded in place.loaded)


def test_what_was_refused_leaves_the_replicas_and_is_trained_otherwise(place: Place) -> None:
    shop = with_gate(place, says("fail", SLOWER), says("pass"))
    (done,) = rounds(shop)
    assert isinstance(done, Round)
    assert done.spec is not None
    assert (done.step, done.spec.hyper.learning_rate) == ("done", 1e-5)
    versions = [version.name for version in shop.registry.versions("assistant")]
    assert len(versions) == 2
    assert place.challenger == versions[1]
    assert all(versions[0] not in loaded for loaded in place.loaded)


def test_a_refusal_that_was_killed_goes_on_to_the_same_end(place: Place) -> None:
    shop = with_gate(place, says("fail", SLOWER), says("pass"))
    deaths = iter([True, True])

    def killing(step: str, event: Any) -> None:
        if step == "refuse" and not event and next(deaths, False):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            cycle.once(shop, killing)
        assert last_round(place.store, "assistant").step == "refuse"
    done = cycle.once(shop, quiet)
    assert isinstance(done, Round)
    assert (done.step, len(done.tried)) == ("done", 1)


def test_more_feedback_alone_is_no_reason_to_train_the_same_again(place: Place) -> None:
    shop = with_gate(place, says("fail", SLOWER), says("inconclusive", MORE))
    (refused,) = rounds(shop)
    assert isinstance(refused, Refused)
    assert len(shop.registry.versions("assistant")) == 2
    assert place.challenger is None
    assert last_round(place.store, "assistant").step == "failed"


def test_a_judge_that_stays_down_blocks_nobody_for_ever(place: Place) -> None:
    shop = with_gate(place, says("inconclusive", again=True))
    told = rounds(shop)
    assert all(isinstance(one, Unmeasured) for one in told)
    assert len(told) > 3
    assert place.challenger is None
    assert not any(place.loaded)


def test_what_no_gate_could_tell_is_said_before_anything_is_trained(place: Place, tmp_path: Path) -> None:
    goldens = tmp_path / "goldens.yaml"
    goldens.write_text("- {prompt: write a sort, owner: ann, expect: {code: 'assert True'}}\n")
    plan = place.shop().plan
    coded = plan.model_copy(update={"dataset": plan.dataset.model_copy(update={"goldens": (goldens,)})})
    shop = with_gate(place, says("pass"))
    with pytest.raises(Refused, match="allow_code"):
        check_gate(shop._replace(plan=coded))
    with pytest.raises(Refused, match="anthropic"):
        check_gate(shop._replace(lead=Arm(model="claude", provider="anthropic")))
    check_gate(shop)
