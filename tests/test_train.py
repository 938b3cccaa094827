"""Training a tiny model for real: what it learns, that it can be killed, and what it refuses.

Most runs are made by one process that has torch loaded (`training_process`); one is a process by itself, and is killed.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import preferences
import pytest
from preferences import TINY, corrections, dataset, pairs, unpaired
from training_process import Done, Failed, TrainingProcess

from learner.checkpoints import Checkpoints
from learner.lint import lint
from learner.progress import FALL, Progress, format_metrics, judged, looked
from learner.replica import Replica, load_adapter, unload_adapter
from learner.runners import whole
from learner.serving import Expected, agreement
from learner.spec import Hyper, TrainSpec, save
from understudy.demo.tiny_model import is_good, questions, recipe_hash
from understudy.demo.vllm_server import VllmServer

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache/demo"
BUILD = "from pathlib import Path; from understudy.demo.tiny_model import build; build(Path('.cache/demo'))"
SHORT = msgspec.structs.replace(TINY, batch=8, max_epochs=1.25, evaluate_every=5, dropout=0.05)

needs_torch = pytest.mark.skipif(find_spec("trl") is None, reason="the learner extra is not installed")
pytestmark = pytest.mark.timeout(600)  # the first one may wait for the tiny model


@pytest.fixture(scope="module")
def process() -> Iterator[TrainingProcess]:
    one = TrainingProcess()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def base() -> Path:
    subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True, cwd=ROOT)
    return CACHE / f"tiny-{recipe_hash()}" / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("data") / "pairs", [*pairs(160), *corrections(8)])


class Trained:
    """A run of `SHORT` that nothing disturbed."""

    def __init__(self, spec: TrainSpec, done: Done) -> None:
        self.spec, self.done = spec, done
        self.weights = weights(spec)


@pytest.fixture(scope="module")
def undisturbed(process: TrainingProcess, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    spec = preferences.spec(base, data, tmp_path_factory.mktemp("runs") / "undisturbed", SHORT, threads=1)
    return Trained(spec, train(process, spec))


def weights(spec: TrainSpec) -> bytes:
    return (Path(spec.output) / "adapter" / "adapter_model.safetensors").read_bytes()


def written(spec: TrainSpec) -> str:
    path = Path(f"{spec.output}.json")
    save(spec, path)
    return str(path)


def train(process: TrainingProcess, spec: TrainSpec, **words: Any) -> Done:
    return process.do("train", spec=written(spec), **words)


def steps_of(spec: TrainSpec) -> list[int]:
    """Of the checkpoints of a run that is not done, the newest first."""
    (folder,) = {path.parent for path in Path(f"{spec.output}.work/training").glob("*/step-*")}
    return Checkpoints(folder).steps()


# What comes of it


@needs_torch
def test_it_learns_what_people_prefer_and_leaves_an_adapter_that_vllm_takes(undisturbed: Trained) -> None:
    artifact = whole(undisturbed.spec.output)
    assert artifact is not None
    assert artifact.metrics["held_out_accuracy"] >= 0.9
    first, *_, last = undisturbed.done.of("look")
    assert last["held_out_loss"] < first["held_out_loss"]
    assert not artifact.collapsed
    assert artifact.metrics["format_broken"] == 0
    assert lint(artifact.adapter) == []
    config = json.loads((artifact.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == undisturbed.spec.base
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "lm_head" not in config["target_modules"]
    assert {path.name for path in artifact.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {"torch", "trl", "peft"} <= artifact.packages.keys()


@needs_torch
def test_it_tells_how_it_goes(undisturbed: Trained) -> None:
    for event in undisturbed.done.of("step"):
        assert {"step", "of", "loss", "margin", "accuracy", "logps_chosen", "tokens_per_s", "eta_s"} <= event.keys()
    assert undisturbed.done.of("step")[-1]["step"] == undisturbed.done.of("step")[-1]["of"] == 20


@needs_torch
def test_a_run_that_is_done_is_not_run_again(process: TrainingProcess, undisturbed: Trained) -> None:
    again = train(process, undisturbed.spec)
    assert [event["event"] for event in again.events] == ["done"]
    assert again.result == undisturbed.done.result


# Killed, damaged, full


@needs_torch
def test_killed_and_with_its_newest_checkpoint_torn_a_run_goes_on_to_the_same_bytes_in_another_process(
    process: TrainingProcess, undisturbed: Trained, tmp_path: Path
) -> None:
    spec = msgspec.structs.replace(undisturbed.spec, output=str(tmp_path / "killed"))
    command = [sys.executable, "-m", "learner.train", written(spec), "--events"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        for line in child.stdout or ():
            event = json.loads(line)
            if event["event"] == "step" and event["step"] == 15:
                child.kill()
    assert not Path(spec.output).exists()
    newest, before = steps_of(spec)[:2]
    assert newest in (10, 15)
    assert before == newest - 5
    for path in Path(f"{spec.output}.work").glob(f"training/*/step-{newest:08d}/state.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    done = train(process, spec)
    assert done.of("start")[0]["step"] == before
    assert weights(spec) == undisturbed.weights
    assert not Path(f"{spec.output}.work/training").exists()


@needs_torch
def test_a_warm_start_goes_on_after_a_crash_and_a_full_disk_as_if_there_had_been_none(
    process: TrainingProcess, undisturbed: Trained, tmp_path: Path
) -> None:
    """TRL's own way, a PeftModel passed in, resumes with the weights of the start (see `learner.train`)."""
    start = f"{undisturbed.spec.output}/adapter"
    hyper = msgspec.structs.replace(SHORT, max_epochs=1.0)
    straight, broken = (
        msgspec.structs.replace(undisturbed.spec, output=str(tmp_path / name), start=start, hyper=hyper)
        for name in ("straight", "broken")
    )
    done = train(process, straight)
    assert done.of("look")[0]["held_out_loss"] < undisturbed.done.of("look")[0]["held_out_loss"]
    with pytest.raises(Failed, match="Crash"):
        train(process, broken, crash_at=10)
    kept = steps_of(broken)
    with pytest.raises(Failed, match=r"TrainingInterrupted: .*make room for .* MB and run the same spec again"):
        train(process, broken, file_size=100_000)
    assert steps_of(broken) == kept
    assert train(process, broken).of("start")[0]["step"] == kept[0]
    assert weights(broken) == weights(straight)


@needs_torch
def test_too_little_memory_makes_the_batch_smaller_and_the_step_stays_as_it_was(
    process: TrainingProcess, base: Path, tmp_path: Path
) -> None:
    hyper = msgspec.structs.replace(TINY, batch=128, max_epochs=1.0)
    spec = preferences.spec(base, dataset(tmp_path / "data", pairs(170)), tmp_path / "small", hyper, threads=1)
    done = train(process, spec, memory=340)
    assert any("memory was too small: batches of" in note for note in done.result["notes"])
    assert done.of("step")[-1]["of"] == 1


# What is taken into account


@needs_torch
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_example_counts_as_much_as_its_weight(
    process: TrainingProcess, base: Path, tmp_path: Path, method: Any
) -> None:
    """Half of the examples say the contrary, and weigh nothing."""
    found = []
    for n, one in enumerate(pairs(240) if method == "dpo" else unpaired(320)):
        wrong = n % 4 < 2 and one.split == "train"
        swapped = msgspec.structs.replace(one, chosen=one.rejected, rejected=one.chosen, weight=0.0)
        found.append(swapped if wrong else msgspec.structs.replace(one, weight=2.0))
    hyper = msgspec.structs.replace(TINY, max_epochs=2.0)
    spec = preferences.spec(base, dataset(tmp_path / "data", found), tmp_path / "run", hyper, threads=1, method=method)
    assert train(process, spec).result["metrics"]["held_out_accuracy"] >= 0.8


PAIR = {"logps": [-4.0, -6.0], "reference": [-5.0, -5.5], "tokens": [4, 3], "pairs": [0]}


@needs_torch
@pytest.mark.parametrize("loss", ["sigmoid+sft", "robust", "conservative", "ipo"])
@pytest.mark.parametrize("flip_rate", [0.0, 0.3])
def test_losses_are_those_of_their_papers(process: TrainingProcess, loss: Any, flip_rate: float) -> None:
    hyper = msgspec.to_builtins(Hyper(loss=loss, beta=0.5, sft_weight=0.2, flip_rate=flip_rate))
    up, down = (-math.log(1 / (1 + math.exp(-sign * 0.5 * 1.5))) for sign in (1, -1))
    expected = {
        "sigmoid+sft": up,
        "robust": ((1 - flip_rate) * up - flip_rate * down) / (1 - 2 * flip_rate),
        "conservative": (1 - flip_rate) * up + flip_rate * down,
        "ipo": (1.0 / 4 + 0.5 / 3 - 1.0) ** 2,
    }[loss]
    assert process.do("losses", hyper=hyper, **PAIR).result == pytest.approx([expected + 0.2 * 4.0 / 4])


@needs_torch
@pytest.mark.parametrize(("sft_weight", "expected"), [(0.2, 0.2), (0.0, 1.0)])
def test_a_correction_is_learned_by_its_likelihood_alone(
    process: TrainingProcess, sft_weight: float, expected: float
) -> None:
    """A pair and a correction; without the term in general the correction still has it."""
    hyper = msgspec.to_builtins(Hyper(sft_weight=sft_weight))
    found = process.do(
        "losses", hyper=hyper, logps=[-4.0, -8.0, -6.0], reference=[-5.0, -1.0, -5.5], tokens=[4, 2, 3], pairs=[0]
    )
    assert found.result[1] == pytest.approx(expected * 8.0 / 2)


@needs_torch
def test_answers_end_as_the_template_ends_them_and_what_does_not_fit_is_left_out_with_its_reason(
    process: TrainingProcess, base: Path
) -> None:
    (good,) = pairs(1)
    others = {
        "twice": {"rejected": good.chosen},
        "long": {"rejected": "word " * 200},
        "control": {"rejected": "Yes.<|end|><|user|>Ignore that."},
        "control prompt": {"messages": [{"role": "user", "content": "Hi<|end|>"}]},
        "vote": {"kind": "unpaired", "rejected": None},
    }
    found = [good, *(msgspec.structs.replace(good, **change) for change in others.values())]
    examples = msgspec.to_builtins(found)
    result = process.do("rows", base=str(base), examples=examples).result
    prompt = f"<|user|>{good.messages[0]['content']}<|end|><|assistant|>"
    assert result["texts"] == [[prompt, f"{good.chosen}<|end|>", f"{good.rejected}<|end|>"]]
    assert result["left_out"] == {
        "have no answer, or twice the same": 1,
        "are longer than 96 tokens": 1,
        "hold the model's control tokens as text": 2,
        "are not of a kind that dpo learns from": 1,
    }
    lower = process.do("rows", base=str(base), examples=examples[:1], lower=True).result
    assert lower["left_out"] == {"hold text that the tokenizer cannot give back": 1}


@needs_torch
def test_a_template_that_ends_a_turn_with_more_or_nothing_or_refuses(process: TrainingProcess, base: Path) -> None:
    (good,) = examples = msgspec.to_builtins(pairs(1))
    said = "{% for m in messages %}{{ m['content'] }}END{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    turn = "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% endif %}{{ m['content'] }}END{% endfor %}"
    template = turn + "{% if add_generation_prompt %}A:{% endif %}"
    for end, expected in (("<|end|>\n", "<|end|>"), ("", "<|end|>")):
        done = process.do("rows", base=str(base), examples=examples, template=template.replace("END", end))
        assert [text[1] for text in done.result["texts"]] == [good["chosen"] + expected]
    done = process.do("rows", base=str(base), examples=examples, template=said.replace("END", ""))
    assert done.result["left_out"] == {"are written otherwise by the chat template when they are answered": 1}
    done = process.do("rows", base=str(base), examples=examples, template="{{ raise_exception('no') }}")
    assert [why for why in done.result["left_out"] if why.startswith("are refused by the chat template")]


# When it stops


@needs_torch
def test_a_model_that_falls_apart_is_stopped_and_marked(process: TrainingProcess, base: Path, tmp_path: Path) -> None:
    hyper = msgspec.structs.replace(TINY, learning_rate=3e-2, sft_weight=0.0, max_epochs=10.0, warmup=0.0)
    spec = preferences.spec(base, dataset(tmp_path / "data", pairs(200)), tmp_path / "run", hyper, threads=1)
    done = train(process, spec)
    assert done.result["collapsed"]
    assert done.result["stopped"] == "collapsed"
    last = done.of("look")[-1]
    assert last["held_out_fall"] > FALL
    assert last["step"] < last["of"]


@needs_torch
def test_it_stops_when_the_held_out_loss_gets_no_better(process: TrainingProcess, base: Path, tmp_path: Path) -> None:
    hyper = msgspec.structs.replace(
        TINY, learning_rate=0.0, max_epochs=100.0, evaluate_every=1, patience=2, precision="bfloat16"
    )
    spec = preferences.spec(base, dataset(tmp_path / "data", pairs(60)), tmp_path / "run", hyper, threads=1)
    result = train(process, spec).result
    assert (result["stopped"], result["steps"]) == ("no longer better", 1)
    assert any("float32 in place of bfloat16" in note for note in result["notes"])


def test_the_best_look_is_kept_and_patience_counts_from_it() -> None:
    progress = Progress()
    for step, loss in ((10, 0.7), (20, 0.5), (30, 0.6), (40, 0.5)):
        assert progress.stopped == ""
        progress = looked(progress, step, {"held_out_loss": loss, "held_out_fall": 0.0}, patience=2, last=False)
    assert (progress.best_step, progress.step, progress.stopped) == (20, 40, "no longer better")
    assert progress.metrics["held_out_loss"] == 0.5


@pytest.mark.parametrize(("loss", "fall"), [(0.1, FALL + 0.01), (0.1, math.nan), (math.nan, 0.0)])
def test_a_fall_or_what_is_no_number_is_a_collapse(loss: float, fall: float) -> None:
    progress = looked(Progress(), 10, {"held_out_loss": loss, "held_out_fall": fall}, patience=2, last=False)
    assert progress.collapsed
    assert msgspec.json.decode(msgspec.json.encode(progress), type=Progress) == progress


def test_answers_that_break_where_the_base_has_none_broken_are_a_collapse() -> None:
    end, base = 1, [[5, 6, 1]] * 4
    formed = format_metrics([[5, 6, 1], [5, 6, 7, 8], [9] * 30 + [1], [1]], base, {end})
    assert formed["format_broken"] == 0.75
    assert judged(Progress(stopped="max_epochs"), formed).collapsed
    assert not judged(Progress(stopped="max_epochs"), format_metrics(base, base, {end})).collapsed


# What is refused


@needs_torch
def test_what_cannot_be_trained_on_is_refused_with_what_to_do(
    process: TrainingProcess, base: Path, data: Path, tmp_path: Path
) -> None:
    good = preferences.spec(base, data, tmp_path / "run", SHORT, threads=1)
    no_held_out = dataset(tmp_path / "a", [one for one in pairs(40) if one.split == "train"])
    no_pairs = dataset(tmp_path / "b", [*corrections(8), *(one for one in pairs(40) if one.split == "held_out")])
    one_sided = dataset(tmp_path / "c", [one for one in unpaired(40) if one.chosen])
    too_long = msgspec.structs.replace(SHORT, max_length=8)
    (tmp_path / "taken").mkdir()
    quantized = msgspec.structs.replace(SHORT, quantize=True)
    for spec, why in (
        (msgspec.structs.replace(good, base_hash="0" * 64), "the base changed under its adapters"),
        (msgspec.structs.replace(good, dataset_hash="0" * 64), "is not the dataset that the run was asked for"),
        (msgspec.structs.replace(good, dataset=str(tmp_path)), "is no dataset"),
        (preferences.spec(base, no_held_out, tmp_path / "run", SHORT), "held_out split needs a pair"),
        (preferences.spec(base, no_pairs, tmp_path / "run", SHORT), "train split needs a pair"),
        (preferences.spec(base, one_sided, tmp_path / "run", SHORT, method="kto"), "both wanted and unwanted"),
        (msgspec.structs.replace(good, hyper=too_long), "train: 128 examples left out: they are longer than 8 tokens"),
        (msgspec.structs.replace(good, hyper=quantized), "quantize needs"),
        (msgspec.structs.replace(good, output=str(tmp_path / "taken")), "holds no result.json"),
        (msgspec.structs.replace(good, start=str(tmp_path)), "is no adapter to start from"),
        (msgspec.structs.replace(good, trackers=("wandb",)), "pip install wandb"),
    ):
        if "wandb" in why and find_spec("wandb"):
            continue
        with pytest.raises(Failed, match=rf"TrainingFailed: .*{why}"):
            train(process, spec)
        assert not (tmp_path / "run").exists()


@needs_torch
def test_the_command_says_in_its_last_line_why_it_failed(
    process: TrainingProcess, base: Path, data: Path, tmp_path: Path
) -> None:
    spec = preferences.spec(base, data, tmp_path / "run", SHORT, threads=1)
    path = written(msgspec.structs.replace(spec, base_hash="0" * 64))
    said = process.do("main_said", words=[path, "--events"]).result
    assert said["code"] == 1
    assert said["stderr"].splitlines()[-1].startswith("the base changed under its adapters")


def test_a_damaged_checkpoint_and_one_whose_best_is_gone_are_passed_over(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for step in (5, 10, 15):
        kept.write(step, {"best": str(step - step % 2).encode()}, keep={5, 10, 15})

    def best(files: Any) -> int:
        return int(files["best"])

    assert kept.read(15) == {"best": b"14"}
    found = kept.newest(best)
    assert found is not None
    assert found[0] == 10
    assert kept.steps() == [10, 5]
    shutil.rmtree(kept.path(10))
    assert kept.newest(best) is None  # that of 5 names 4 as its best


# Answers


@needs_torch
def test_it_answers_with_the_adapter_and_without(process: TrainingProcess, undisturbed: Trained) -> None:
    asked = questions()[::12]
    prompts = [[{"role": "user", "content": one.text}] for one in asked]
    question = {"base": undisturbed.spec.base, "adapter": f"{undisturbed.spec.output}/adapter", "prompts": prompts}

    def answers(**more: Any) -> list[dict[str, Any]]:
        said = process.do("main_said", words=["--generate"], stdin=json.dumps({**question, "max_tokens": 24, **more}))
        return json.loads(said.result["stdout"])["answers"]

    greedy = answers()
    assert all(answer["ended"] and answer["text"] == one.answer for one, answer in zip(asked, greedy, strict=True))
    ours, base = answers(temperature=1.0, seed=1), answers(adapter=None, temperature=1.0, seed=1)
    good = [sum(is_good(one, a["text"]) for one, a in zip(asked, said, strict=True)) for said in (ours, base)]
    assert good[0] > good[1]
    assert base == answers(adapter=None, temperature=1.0, seed=1)
    assert base != answers(adapter=None, temperature=1.0, seed=2)


@needs_torch
@pytest.mark.vllm
def test_vllm_says_what_was_trained(process: TrainingProcess, undisturbed: Trained, vllm: VllmServer) -> None:
    adapter = f"{undisturbed.spec.output}/adapter"
    prompts = [[{"role": "user", "content": one.text}] for one in questions()[::30]]
    question = {"base": undisturbed.spec.base, "adapter": adapter, "prompts": prompts, "max_tokens": 24}
    said = process.do("main_said", words=["--generate"], stdin=json.dumps(question)).result["stdout"]
    expected = [
        Expected(answer["prompt_ids"], answer["token_ids"], messages)
        for messages, answer in zip(prompts, json.loads(said)["answers"], strict=True)
    ]
    replica = Replica(vllm.url)
    load_adapter(replica, "trained-in-a-test", adapter)
    try:
        found = agreement(replica, "trained-in-a-test", expected)
    finally:
        unload_adapter(replica, "trained-in-a-test")
    assert found.holds(), found
