"""A round of learning through what can happen to it; trainer and PEFT are stand-ins, the rest is real."""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conversations import asked, journal
from fake_replica import FakeReplica
from test_dataset import chats

from learner import cycle
from learner.dataset import Source
from learner.due import Due
from learner.hashes import folder_hash, template_hash, tokenizer_hash
from learner.loaded import Left, reconcile
from learner.plan import Learner
from learner.registry import Tampered
from learner.rounds import Round, last_round
from learner.runners import whole
from learner.serving import Fleet, ServingFailed, Unreachable
from learner.spec import Artifact, TrainingFailed, TrainingInterrupted, TrainSpec
from learner.workshop import Refused, Workshop
from router.store_sqlite import SqliteStore
from telemetry.errors import StateError

DAY = 86400.0


def safetensors(path: Path, **shapes: tuple[int, ...]) -> None:
    header, data = {}, b""
    for name, shape in shapes.items():
        body = struct.pack("<f", 1.0) * math.prod(shape)
        header[name.replace("__", ".")] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(body)],
        }
        data += body
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


class Trainer:
    """Makes an adapter of the spec's rank at once; first it raises what it is told to."""

    def __init__(self, *faults: Exception, collapsed: bool = False) -> None:
        self.faults = list(faults)
        self.collapsed = collapsed
        self.runs = 0

    def run(self, spec: TrainSpec, say: Callable[[dict[str, Any]], None]) -> Artifact:
        if artifact := whole(spec.output):
            return artifact
        self.runs += 1
        if self.faults:
            raise self.faults.pop(0)
        adapter = Path(spec.output) / "adapter"
        adapter.mkdir(parents=True)
        alpha = 8 if spec.hyper.learning_rate > 2e-5 else 4  # another training makes another adapter
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        sides = {"lora_A": (4, 8), "lora_B": (8, 4)}
        named = {f"base_model__model__m__q_proj__{side}__weight": shape for side, shape in sides.items()}
        safetensors(adapter / "adapter_model.safetensors", **named)
        base = Path(spec.base)
        artifact = Artifact(
            folder=spec.output,
            adapter_hash=folder_hash(adapter),
            metrics={"held_out_accuracy": 0.9},
            collapsed=self.collapsed,
            tokenizer_hash=tokenizer_hash(base),
            template_hash=template_hash(base),
        )
        (Path(spec.output) / "result.json").write_bytes(msgspec.json.encode(artifact))
        return artifact


def peft(base: str, adapter: str | None, prompts: list[Any], most: int) -> list[dict[str, Any]]:
    """Each prompt is one token, its last turn's length; each answer 1, 2, 3."""
    return [{"prompt_ids": [len(prompt[-1]["content"])], "token_ids": [1, 2, 3]} for prompt in prompts]


class Place:
    """A folder with a base, a journal and a store, and replicas before it."""

    def __init__(self, root: Path, replicas: list[FakeReplica]) -> None:
        self.root, self.replicas = root, replicas
        (root / "base").mkdir()
        (root / "base" / "config.json").write_text("{}")
        safetensors(root / "base" / "model.safetensors", w=(2, 2))
        self.source = Source(journal(root / "j.db", chats(25, users=10)), "assistant", 3650 * DAY, "1")
        self.store = SqliteStore(root / "s.db")
        for replica in replicas:
            replica.says = defaultdict(lambda: [0, 1, 2, 3, *[0] * 64])

    def shop(self, trainer: Trainer | None = None, *, arms: tuple[str, ...] = (), **plan: Any) -> Workshop:
        written = {
            "base": str(self.root / "base"),
            "folder": str(self.root / "learner"),
            "min_pairs": 10,
            "min_interval": "0s",
            "train": {"max_length": 100_000},
            "dataset": {"window": "3650d", "held_out": 0.2},
        }
        made = Learner.model_validate(written | plan)
        fleet = Fleet([one.replica for one in self.replicas], made.max_loras)
        return Workshop(
            route="assistant",
            plan=made,
            source=self.source,
            documents=self.store,
            fleet=fleet,
            runner=trainer or Trainer(),
            generate=peft,
            owner="elsewhere:1:a",
            arms=frozenset(arms),
        )

    @property
    def challenger(self) -> str | None:
        return self.shop().registry.alias("assistant", "challenger")

    @property
    def loaded(self) -> list[set[str]]:
        return [set(replica.adapters) for replica in self.replicas]


def quiet(step: str, event: dict[str, Any]) -> None: ...


def learned(shop: Workshop, **more: Any) -> Round:
    found = cycle.once(shop, quiet, **more)
    assert isinstance(found, Round), found
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, [stack.enter_context(FakeReplica()) for _ in range(2)])


def test_a_round_ends_with_a_challenger_on_every_replica(place: Place) -> None:
    done = learned(place.shop())
    assert (done.step, done.number) == ("done", 1)
    assert place.challenger == done.version
    assert place.loaded == [{done.version}] * 2
    again = cycle.once(place.shop(), quiet, force=True)
    assert isinstance(again, Due)
    assert done.version in again.waiting


def test_a_collapsed_adapter_is_not_registered(place: Place) -> None:
    with pytest.raises(Refused, match="collapsed"):
        learned(place.shop(Trainer(collapsed=True)))
    assert place.shop().registry.versions("assistant") == []
    assert "50 more" not in str(cycle.once(place.shop(), quiet))  # what was refused is not new any more


def test_what_may_pass_leaves_the_round_where_it_is(place: Place) -> None:
    trainer = Trainer(TrainingInterrupted("killed by SIGKILL"))
    with pytest.raises(TrainingInterrupted):
        learned(place.shop(trainer))
    assert last_round(place.store, "assistant").step == "train"
    assert learned(place.shop(trainer)).number == 1


def test_what_comes_again_and_again_ends_it(place: Place) -> None:
    trainer = Trainer(*[TrainingInterrupted("killed by SIGKILL") for _ in range(20)])
    for _ in range(cycle.MOST_TRIES + 1):
        with pytest.raises(TrainingInterrupted):
            learned(place.shop(trainer))
    assert last_round(place.store, "assistant").step == "failed"


def test_after_a_training_that_failed_the_same_pairs_are_new_again(place: Place) -> None:
    with pytest.raises(TrainingFailed):
        learned(place.shop(Trainer(TrainingFailed("no such loss"))))
    assert last_round(place.store, "assistant").step == "failed"
    assert learned(place.shop()).step == "done"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_replica_that_is_away_is_waited_for(place: Place, status: int) -> None:
    place.replicas[1].wrong["/v1/models"] = lambda body: (status, "starting")
    with pytest.raises(Unreachable):
        learned(place.shop())
    assert last_round(place.store, "assistant").step == "serve"
    place.replicas[1].wrong.clear()
    trainer = Trainer()
    assert learned(place.shop(trainer)).number == 1
    assert trainer.runs == 0


def test_a_replica_that_restarts_while_it_is_compared_is_asked_again(place: Place) -> None:
    second = place.replicas[1]

    def forget(body: dict[str, Any]) -> tuple[int, object]:
        second.adapters.clear()
        return 404, {"error": {"message": "does not exist"}}

    second.wrong["/v1/completions"] = forget
    with pytest.raises(Unreachable, match="restarted"):
        learned(place.shop())
    second.wrong.clear()
    assert learned(place.shop()).step == "done"
    assert place.loaded[0] == place.loaded[1] != set()


def test_a_version_that_does_not_say_what_peft_says_leaves_every_replica(place: Place) -> None:
    place.replicas[1].says = defaultdict(lambda: [9] * 64)
    with pytest.raises(Refused, match="of PEFT's tokens"):
        learned(place.shop())
    assert place.loaded == [set(), set()]
    assert place.challenger is None


def test_also_where_it_had_been_loaded_by_a_process_that_was_killed(place: Place) -> None:
    done = learned(place.shop())
    registry = place.shop().registry
    registry.move("assistant", "challenger", None, done.version)
    body = place.store.read("learning/assistant")
    place.store.swap("learning/assistant", body, msgspec.json.encode(msgspec.structs.replace(done, step="serve")))
    place.replicas[0].says = defaultdict(lambda: [9] * 64)
    with pytest.raises(Refused):
        learned(place.shop())
    assert place.loaded == [set(), set()]


def test_a_base_or_template_that_changed_is_refused(place: Place) -> None:
    shop = place.shop()
    shop.runner.faults = [TrainingInterrupted("stop")]  # type: ignore[attr-defined]
    with pytest.raises(TrainingInterrupted):
        learned(shop)
    place.replicas[0].wrong["/v1/models"] = lambda body: (503, "")
    with pytest.raises(Unreachable):
        learned(place.shop())
    (place.root / "base" / "chat_template.jinja").write_text("another one")
    place.replicas[0].wrong.clear()
    with pytest.raises(Refused, match="its chat template is"):
        learned(place.shop())


def test_an_adapter_that_was_tampered_with_is_not_served(place: Place) -> None:
    place.replicas[0].wrong["/v1/models"] = lambda body: (503, "")
    with pytest.raises(Unreachable):
        learned(place.shop())
    (weights,) = (place.root / "learner" / "versions").glob("*/adapter/*.safetensors")
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-4] + b"evil")
    place.replicas[0].wrong.clear()
    with pytest.raises(Tampered, match="was tampered with"):
        learned(place.shop())
    assert place.loaded == [set(), set()]


def test_a_missing_base_is_refused_and_a_full_disk_waited_for(place: Place) -> None:
    with pytest.raises(Refused, match="no folder here"):
        learned(place.shop(base=str(place.root / "nothing")))
    place.root.joinpath("learner").rename(place.root / "kept")
    place.root.joinpath("learner").write_text("a file where a folder should be")
    with pytest.raises(cycle.Interrupted, match="step dataset"):
        learned(place.shop())
    place.root.joinpath("learner").unlink()
    assert learned(place.shop()).step == "done"


def test_a_dataset_that_lost_examples_before_it_was_trained_on_is_built_anew(place: Place) -> None:
    trainer = Trainer(TrainingInterrupted("stop"))
    with pytest.raises(TrainingInterrupted):
        learned(place.shop(trainer))
    first = last_round(place.store, "assistant").dataset
    later = 3650 * DAY + 1_700_000_000.0 + 200.0
    assert cycle.expire(place.shop(), later) > 0
    place.source.journal.append([asked("tick", "tock", user="zoe", at=900.0)])
    assert learned(place.shop(trainer)).dataset != first


def test_dropped_a_challenger_leaves_and_does_not_come_back(place: Place) -> None:
    done = learned(place.shop())
    dropped = cycle.drop(place.shop(), "harmful")
    assert (dropped.step, place.challenger, place.loaded) == ("dropped", None, [set(), set()])
    assert place.shop().registry.tags(done.version) == {"dropped": "harmful"}
    with pytest.raises(Refused, match=r"was dropped \(harmful\)"):
        learned(place.shop(), force=True)
    with pytest.raises(Refused, match="nothing to drop"):
        cycle.drop(place.shop(), "again")


def test_a_replica_that_refuses_to_let_go_is_named_and_seen_to_later(place: Place) -> None:
    done = learned(place.shop())
    place.replicas[1].wrong["/v1/unload_lora_adapter"] = lambda body: (500, "no")
    with pytest.raises(Left, match=place.replicas[1].url):
        cycle.drop(place.shop(), "harmful")
    assert place.challenger is None
    assert place.loaded == [set(), {done.version}]
    assert cycle.replicas_kept(place.shop()).refused
    place.replicas[1].wrong.clear()
    cycle.replicas_kept(place.shop())
    assert place.loaded == [set(), set()]


def test_a_round_dropped_while_it_serves_does_not_end_in_a_challenger(place: Place) -> None:
    place.replicas[1].wrong["/v1/completions"] = lambda body: (503, "busy")
    with pytest.raises(Unreachable):
        learned(place.shop())
    place.replicas[1].wrong.clear()
    cycle.drop(place.shop(), "harmful")
    assert place.loaded == [set(), set()]
    with pytest.raises(Refused, match="was dropped"):
        learned(place.shop(), force=True)
    assert place.challenger is None


def test_what_the_config_draws_is_neither_dropped_nor_taken_off_and_loaded_after_a_restart(place: Place) -> None:
    done = learned(place.shop())
    shop = place.shop(arms=(done.version,))
    with pytest.raises(Refused, match="take it out of the config first"):
        cycle.drop(shop, "harmful")
    shop.registry.move("assistant", "challenger", None, done.version)
    place.replicas[0].adapters.clear()
    assert cycle.replicas_kept(shop).loaded == [(place.replicas[0].url, done.version)]
    assert place.loaded == [{done.version}] * 2


def test_adapters_of_others_are_left_alone(place: Place) -> None:
    learned(place.shop())
    place.replicas[0].adapters["somebody-elses"] = "/elsewhere"
    reconcile(place.shop().stage)
    assert "somebody-elses" in place.replicas[0].adapters


def test_one_replica_in_trouble_keeps_no_other_from_what_it_needs(place: Place) -> None:
    done = learned(place.shop())
    for replica in place.replicas:
        replica.adapters.clear()
    place.replicas[0].wrong["/v1/load_lora_adapter"] = lambda body: (500, "out of memory")
    found = cycle.replicas_kept(place.shop())
    assert [name for _, name, _ in found.refused] == [done.version]
    assert place.loaded == [set(), {done.version}]


def test_the_store_away_in_the_middle_leaves_the_round(place: Place) -> None:
    class Away(Trainer):
        def run(self, spec: TrainSpec, say: Callable[[dict[str, Any]], None]) -> Artifact:
            raise StateError("Redis does not answer")

    with pytest.raises(StateError):
        learned(place.shop(Away()))
    assert last_round(place.store, "assistant").step == "train"


def test_held_out_prompts_that_are_too_long_are_not_compared_on(place: Place) -> None:
    def long(base: str, adapter: str | None, prompts: list[Any], most: int) -> list[dict[str, Any]]:
        return [one | {"prompt_ids": [0] * 9} for one in peft(base, adapter, prompts, most)]

    with pytest.raises(Refused, match="short enough"):
        learned(place.shop(train={"max_length": 8})._replace(generate=long))


def test_a_replica_that_refuses_ends_the_round_with_its_words(place: Place) -> None:
    place.replicas[0].wrong["/v1/load_lora_adapter"] = lambda body: (400, {"error": {"message": "rank 4 is too high"}})
    with pytest.raises(ServingFailed, match="rank 4 is too high"):
        learned(place.shop())
    assert last_round(place.store, "assistant").why.endswith("rank 4 is too high")
    assert place.loaded == [set(), set()]


def test_a_version_made_again_must_have_its_dataset_and_base(place: Place, tmp_path: Path) -> None:
    done = learned(place.shop())
    version, artifact = cycle.reproduce(place.shop(), done.version, tmp_path / "again", quiet)
    assert artifact.adapter_hash == version.adapter_hash
    with pytest.raises(Refused, match="there already"):
        cycle.reproduce(place.shop(), done.version, tmp_path / "again", quiet)
    (place.root / "base" / "config.json").write_text('{"other": 1}')
    with pytest.raises(Refused, match="its weights is"):
        cycle.reproduce(place.shop(), done.version, tmp_path / "third", quiet)


def test_a_store_that_was_emptied_gets_its_versions_back_from_their_cards(place: Place) -> None:
    done = learned(place.shop())
    place.store = SqliteStore(place.root / "another.db")
    shop = place.shop()
    assert [one.name for one in shop.registry.restore(shop.folder / "versions")] == [done.version]
