"""Versions on replicas: on all or none, never under another's name, gone only when nobody needs them."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import eventually
from fake_replica import FakeReplica, Json, error

from learner import replica as one_replica
from learner.hashes import folder_hash
from learner.lint import lint
from learner.registry import Registry, Tampered, Version, install
from learner.serving import (
    Agreement,
    Expected,
    Fleet,
    Full,
    InUse,
    Replica,
    ServingFailed,
    Unreachable,
    agreement,
    in_flight,
    listing,
    load,
    reconcile,
    unload,
    warm,
)
from router.store_sqlite import SqliteStore
from understudy.demo.tiny_model import questions
from understudy.demo.vllm_server import VllmServer


@pytest.fixture
def fakes() -> Iterator[list[FakeReplica]]:
    with FakeReplica() as one, FakeReplica() as two:
        yield [one, two]


def fleet(*fakes: FakeReplica, capacity: int = 3, served_folder: str | None = None) -> Fleet:
    return Fleet([fake.replica for fake in fakes], capacity, served_folder)


Make = Callable[..., Version]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Registers and installs versions: of an adapter's folder, or of made-up weights."""
    with contextlib.closing(SqliteStore(tmp_path / "state.db")) as store:

        def one(adapter: Path | None = None) -> Version:
            run = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
            if adapter is not None:
                shutil.copytree(adapter, run / "adapter")
            else:
                (run / "adapter").mkdir(parents=True)
                (run / "adapter" / "adapter_model.safetensors").write_text(run.name)
            new = Version(
                route="assistant",
                base="base",
                base_hash="",
                tokenizer_hash="",
                template_hash="",
                adapter_hash=folder_hash(run / "adapter"),
                dataset=run.name,
                created=0.0,
            )
            version = Registry(store).register(new, tmp_path / "versions")
            install(run, version)
            return version

        yield one


def test_a_version_is_loaded_where_it_is_missing(fakes: list[FakeReplica], make: Make) -> None:
    version = make()
    assert load(fleet(fakes[0]), version) == [fakes[0].replica]
    assert load(fleet(*fakes), version) == [fakes[1].replica]
    assert load(fleet(*fakes), version) == []
    assert [fake.adapters for fake in fakes] == [{version.name: str(version.adapter)}] * 2
    body = {"lora_name": version.name, "lora_path": str(version.adapter)}
    assert [fake.asked("/v1/load_lora_adapter") for fake in fakes] == [[body], [body]], "once, and nothing in place"


def test_replicas_are_told_the_path_as_they_see_it(fakes: list[FakeReplica], make: Make) -> None:
    version = make()
    load(fleet(fakes[0], served_folder="/mnt/versions/"), version)
    assert fakes[0].adapters == {version.name: f"/mnt/versions/{version.name}/adapter"}
    assert load(fleet(fakes[0], served_folder="/mnt/versions"), version) == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            (500, error("rank 32 is greater", "InternalServerError", 500)),
            "does not load .*: status 500, rank 32 is gre",
        ),
        ((404, error("No adapter found", "NotFoundError", 404)), "finds no adapter at .*; mount the versions there"),
        ((404, {"detail": "Not Found"}), "loads no adapters; start vLLM with .*ALLOW_RUNTIME_LORA_UPDATING=True"),
        ((401, {"error": "Unauthorized"}), "status 401, .*Unauthorized.*; set its api_key"),
        ((400, error("conflicts with a base", "InvalidUserInput", 400)), "status 400, conflicts with a base"),
        ((200, "Success, but not listed"), "does not load .*: status 200"),
        (None, "does not answer POST /v1/load_lora_adapter .*; see whether it runs"),
    ],
)
def test_one_replica_that_refuses_means_none_serves_it(
    fakes: list[FakeReplica], make: Make, answer: tuple[int, object] | None, why: str
) -> None:
    version = make()
    fakes[0].adapters["other"] = "/other"
    fakes[1].wrong["/v1/load_lora_adapter"] = lambda _: answer
    with pytest.raises(ServingFailed, match=f"{fakes[1].url}.*{why}"):
        load(fleet(*fakes), version)
    assert [fake.adapters for fake in fakes] == [{"other": "/other"}, {}]


def test_a_replica_that_loads_but_does_not_say_so_is_taken_back_too(fakes: list[FakeReplica], make: Make) -> None:
    version = make()

    def silently(body: Json) -> None:
        fakes[1].adapters[body["lora_name"]] = body["lora_path"]

    fakes[1].wrong["/v1/load_lora_adapter"] = silently
    with pytest.raises(Unreachable, match=fakes[1].url):
        load(fleet(*fakes), version)
    assert [fake.adapters for fake in fakes] == [{}, {}]


def test_what_cannot_be_taken_back_is_said(fakes: list[FakeReplica], make: Make) -> None:
    fakes[0].wrong["/v1/unload_lora_adapter"] = lambda _: (500, "out of order")
    fakes[1].wrong["/v1/load_lora_adapter"] = lambda _: (500, "broken")
    with pytest.raises(ServingFailed, match=rf"broken; and .* could not be taken back: {fakes[0].url}.*out of order"):
        load(fleet(*fakes), make())


def test_what_another_process_loaded_meanwhile_stays(fakes: list[FakeReplica], make: Make) -> None:
    version = make()

    def raced(body: Json) -> tuple[int, object]:
        fakes[0].adapters[body["lora_name"]] = body["lora_path"]
        return 400, error("has already been loaded", "InvalidUserInput", 400)

    fakes[0].wrong["/v1/load_lora_adapter"] = raced
    assert load(fleet(*fakes), version) == [fakes[1].replica]
    fakes[0].adapters.clear()
    fakes[1].adapters.clear()
    fakes[1].wrong["/v1/load_lora_adapter"] = lambda _: (500, "broken")
    with pytest.raises(ServingFailed, match="broken"):
        load(fleet(*fakes), version)
    assert list(fakes[0].adapters) == [version.name]


@pytest.mark.parametrize("listed", ["adapter", "base"])
def test_a_name_that_stands_for_something_else_is_refused(fakes: list[FakeReplica], make: Make, listed: str) -> None:
    version = make()
    if listed == "adapter":
        fakes[1].adapters[version.name] = "/old/path"
    else:
        cards = [{"id": version.name, "root": "/m", "parent": None}]
        fakes[1].wrong["/v1/models"] = lambda _: (200, {"data": cards})
    why = "serves .* from /old/path, not from" if listed == "adapter" else "serves its base as"
    with pytest.raises(ServingFailed, match=f"{fakes[1].url} {why}"):
        load(fleet(*fakes), version)
    assert fakes[0].adapters == {}
    assert fakes[0].asked("/v1/load_lora_adapter") == []


def test_no_replica_is_asked_for_what_was_tampered_with(fakes: list[FakeReplica], make: Make) -> None:
    version = make()
    weights = version.adapter / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_text("others")
    with pytest.raises(Tampered):
        load(fleet(*fakes), version)
    assert [fake.seen for fake in fakes] == [[], []]


def running(*names: str, at: float = 2e9) -> str:
    labels = f'max_lora="3",running_lora_adapters="{",".join(names)}",waiting_lora_adapters=""'
    return f"vllm:lora_requests_info{{{labels}}} {at}"


def test_a_full_replica_refuses_and_says_who_could_go(fakes: list[FakeReplica], make: Make) -> None:
    version = make()
    fakes[1].adapters |= {"needed": "/n", "answering": "/a", "idle": "/i"}
    fakes[1].metrics += running("answering")
    with pytest.raises(Full, match=rf"{fakes[1].url} serves needed, .*\(3\); unload one of idle, or start"):
        load(fleet(*fakes), version, needed={"needed"})
    assert fakes[0].adapters == {}
    with pytest.raises(Full, match="none is idle: wait"):
        load(fleet(*fakes), version, needed={"needed", "idle"})
    fakes[1].wrong["/metrics"] = lambda _: (404, "")
    with pytest.raises(Full, match="unload one of those that are not in flight"):
        load(fleet(*fakes), version)
    assert load(fleet(*fakes, capacity=4), version) == [fake.replica for fake in fakes]


def test_after_a_restart_what_is_missing_is_loaded_and_told(fakes: list[FakeReplica], make: Make) -> None:
    first, second = make(), make()
    for version in (first, second):
        load(fleet(*fakes), version)
    fakes[1].adapters = {"mine": "/mine"}
    nobody = Replica("http://127.0.0.1:9")
    done = reconcile(Fleet([nobody, *fleet(*fakes).replicas], 3), [first, second])
    assert done.loaded == [(fakes[1].url, first.name), (fakes[1].url, second.name)]
    assert done.others == [(fakes[1].url, "mine")]
    assert [url for url, _ in done.unreachable] == [nobody.url]
    assert done.refused == []
    assert set(fakes[1].adapters) == {"mine", first.name, second.name}
    assert reconcile(fleet(*fakes), [first, second]).loaded == []


def test_one_version_that_a_replica_refuses_keeps_no_other_away(fakes: list[FakeReplica], make: Make) -> None:
    bad, good, third = make(), make(), make()
    shutil.rmtree(bad.folder)
    done = reconcile(fleet(fakes[0], capacity=1), [bad, good, third])
    assert done.loaded == [(fakes[0].url, good.name)]
    assert [name for _, name, _ in done.refused] == [bad.name, third.name]
    assert "holds nothing" in done.refused[0][2]
    assert f"serves {good.name}, as many as it may (1); none is idle" in done.refused[1][2]


def test_a_version_is_unloaded_only_when_nobody_needs_it(fakes: list[FakeReplica], make: Make) -> None:
    version, fake = make(), fakes[0]
    load(fleet(fake), version)
    fake.metrics += running("x", version.name) + "\n"
    with pytest.raises(InUse, match=f"{fake.url} is answering with {version.name}"):
        unload(fake.replica, version.name, set)
    fake.metrics += running("x", at=2.0000001e9) + "\n"  # a newer series
    with pytest.raises(InUse, match=f"sessions still need {version.name}"):
        unload(fake.replica, version.name, lambda: {version.name})
    assert fake.adapters
    assert unload(fake.replica, version.name, set)
    assert not unload(fake.replica, version.name, set)
    assert fake.adapters == {}


def test_what_is_in_flight_is_known_or_refused(fakes: list[FakeReplica]) -> None:
    fake = fakes[0]
    assert in_flight(fake.replica) == set(), "nothing was answered since it started"
    fake.metrics += f"{running('a', 'b', at=1.75e9)}\n{running('c', at=1.5e9)}\n{running(at=1.25e9)}\n"
    assert in_flight(fake.replica) == {"a", "b"}
    fake.adapters["a"] = "/a"
    fake.metrics = "# TYPE vllm:num_requests_running gauge\n"
    with pytest.raises(ServingFailed, match="so what is in flight is not known; start vLLM"):
        unload(fake.replica, "a", set)
    assert fake.adapters == {"a": "/a"}


def test_the_key_is_sent_and_never_shown(fakes: list[FakeReplica], make: Make) -> None:
    replica = Replica(fakes[0].url, "hush")
    load(Fleet([replica], 3), make())
    assert {key for _, key, _ in fakes[0].seen} == {"Bearer hush"}
    assert "hush" not in repr(Fleet([replica], 3))
    fakes[0].wrong["/v1/models"] = lambda _: None
    with pytest.raises(Unreachable) as raised:
        listing(replica)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("body", ["no json", "[]", {"data": []}, {"data": [1]}, {}, {"data": [{"parent": None}]}])
def test_a_server_that_is_no_vllm_is_said(fakes: list[FakeReplica], body: object) -> None:
    fakes[0].wrong["/v1/models"] = lambda _: (200, body)
    with pytest.raises(ServingFailed, match=r"is it vLLM\?"):
        listing(fakes[0].replica)


def test_a_replica_that_hangs_is_given_up() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unreachable, match="timed out"):
            one_replica._call(Replica(url), "GET", "/v1/models", None, 0.2)


def test_each_difference_counts_once_whatever_follows_it(fakes: list[FakeReplica]) -> None:
    prompt, answer = [7, 8], list(range(100, 180))
    fakes[0].says = {
        "mine": [*prompt, *answer],
        "twice": [*prompt, *answer[:40], -1, -1, *answer[42:]],
        "base": [*prompt, *answer[:5], -1, *answer[6:]],
    }
    chat = [{"role": "user", "content": "1234567"}, {"role": "user", "content": "12345678"}]
    one = Expected(prompt, answer, chat)
    assert agreement(fakes[0].replica, "mine", [one]) == Agreement(80, 80, 1, 1, 1, 1, 1, 1)
    found = agreement(fakes[0].replica, "twice", [one, Expected(prompt, answer[:3]), one._replace(prompt=[7, 9])])
    assert found == Agreement(163, 159, 2, 2, 2, 1, 2, 2)
    assert (found.share, found.holds(0.9)) == (159 / 163, False), "another prompt than PEFT's"
    assert all(body["temperature"] == 0 and body["model"] for body in fakes[0].asked("/v1/completions"))


def test_a_base_that_takes_on_the_version_answering_beside_it_is_found(fakes: list[FakeReplica]) -> None:
    fake, answering, alone = fakes[0], threading.Event(), threading.Lock()
    fake.says = {"mine": [7, 8, 1, 2, 3], "base": [7, 8, 9, 9, 9]}

    def mixed(body: Json) -> tuple[int, object]:
        if body.get("ignore_eos"):
            answering.set()
        elif body["model"] == "base" and body["max_tokens"] == 1 and not alone.acquire(blocking=False):
            assert answering.wait(10)
            return 200, {"model": "base", "choices": [{"token_ids": [1]}]}
        return fake.right("/v1/completions", body)

    fake.wrong["/v1/completions"] = mixed
    found = agreement(fake.replica, "mine", [Expected([7, 8], [1, 2, 3])])
    assert found == Agreement(3, 3, 1, 1, 0, 0, 1, 0)
    assert not found.holds(0.0)
    assert "restart it with a larger" in found.touched


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (Agreement(100, 99, 4, 3, 2, 2), True),
        (Agreement(100, 98, 4, 4, 2, 2), False),
        (Agreement(100, 100, 0, 0, 0, 0), True),
        (Agreement(1000, 990, 10, 0, 2, 2), False),
        (Agreement(100, 100, 4, 4, 2, 1), False),
        (Agreement(100, 100, 4, 4, 2, 2, 4, 3), True),
        (Agreement(100, 100, 4, 4, 2, 2, 4, 1), False),
    ],
)
def test_a_version_may_be_drawn_when_it_agrees_is_felt_leaves_the_base_alone_and_reads_the_same_prompts(
    found: Agreement, holds: bool
) -> None:
    assert found.holds() is holds


def test_a_comparison_that_says_nothing_is_refused(fakes: list[FakeReplica]) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        agreement(fakes[0].replica, "mine", [])
    with pytest.raises(ValueError, match="each of one token at least"):
        agreement(fakes[0].replica, "mine", [Expected([1], [])])
    fakes[0].wrong["/v1/completions"] = lambda body: (200, {"model": body["model"], "choices": [{"token_ids": None}]})
    with pytest.raises(ServingFailed, match="gave no token_ids for mine"):
        agreement(fakes[0].replica, "mine", [Expected([1], [2])])


def test_an_answer_by_another_model_is_no_answer(fakes: list[FakeReplica]) -> None:
    fakes[0].wrong["/v1/completions"] = lambda _: (200, {"model": "base"})
    with pytest.raises(ServingFailed, match="was asked for mine and answered as 'base'"):
        warm(fakes[0].replica, "mine")
    with pytest.raises(ValueError, match="no model is named"):
        warm(fakes[0].replica, "")
    assert len(fakes[0].seen) == 1


# The same with the real vLLM.

ON_VLLM = [pytest.mark.vllm, pytest.mark.timeout(600)]

PEFT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
for text in texts:
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)[0].tolist()
    print(json.dumps([prompt, whole[len(prompt):], chat]))
"""


def greedy_by_peft(base: Path, adapter: Path) -> list[Expected]:
    """In a process of its own: torch would be in the way of all other tests."""
    texts = json.dumps([question.text for question in questions()[::30]])
    command = [sys.executable, "-c", PEFT, str(base), str(adapter), texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [Expected(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def served(vllm: VllmServer, make: Make) -> Iterator[tuple[Replica, Version]]:
    """A copy of `hasty`, whose greedy answers the base does not give, loaded as a version of its own."""
    replica, version = Replica(vllm.url), make(vllm.models.hasty)
    assert lint(version.adapter) == []
    assert load(Fleet([replica], 3), version) == [replica]
    yield replica, version
    with contextlib.suppress(ServingFailed):
        one_replica.unload_adapter(replica, version.name)


class TestOnVllm:
    pytestmark = ON_VLLM

    def test_a_version_is_served_under_its_name_from_its_folder(self, served: tuple[Replica, Version]) -> None:
        replica, version = served
        assert listing(replica).adapters[version.name] == str(version.adapter)
        assert listing(replica).base == "base"
        assert warm(replica, version.name) < 30.0
        assert load(Fleet([replica], 3), version) == []
        assert unload(replica, version.name, set)
        assert version.name not in listing(replica).adapters
        assert reconcile(Fleet([replica], 3), [version]).loaded == [(replica.url, version.name)]

    def test_a_fourth_adapter_is_refused_and_the_others_named(
        self, served: tuple[Replica, Version], make: Make
    ) -> None:
        replica, version = served
        with pytest.raises(Full, match=f"unload one of {version.name}, hasty, or start vLLM"):
            load(Fleet([replica], 3), make(), needed={"careful"})

    def test_what_peft_says_is_what_vllm_says(self, served: tuple[Replica, Version], vllm: VllmServer) -> None:
        replica, version = served
        expected = greedy_by_peft(vllm.models.base, version.adapter)
        found = agreement(replica, version.name, expected)
        assert found.holds()
        assert found.share >= 0.99
        assert found.telling == found.telling_equal >= 3, "the base says something else"
        assert found.prompts_equal == found.prompts == len(expected)
        for other in ("careful", "base"):
            assert not agreement(replica, other, expected[:3]).holds()

    def test_an_answer_in_the_making_keeps_its_version_and_outlives_it(self, served: tuple[Replica, Version]) -> None:
        replica, version = served
        body = {"model": version.name, "prompt": ["Hello"] * 4, "n": 32, "max_tokens": 128, "ignore_eos": True}
        said: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: said.append(httpx.post(f"{replica.url}/v1/completions", json=body, timeout=120))
        )
        asking.start()
        eventually(lambda: version.name in in_flight(replica), 30)
        with pytest.raises(InUse, match="is answering with"):
            unload(replica, version.name, set)
        assert one_replica.unload_adapter(replica, version.name)
        assert not said, "the answer was still in the making"
        asking.join(120)
        assert said[0].json()["usage"]["completion_tokens"] == 4 * 32 * 128
        eventually(lambda: in_flight(replica) == set())

    @pytest.mark.parametrize("wrong", [{"r": 64}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}])
    def test_what_lint_finds_vllm_refuses(self, vllm: VllmServer, make: Make, tmp_path: Path, wrong: Json) -> None:
        broken = shutil.copytree(vllm.models.careful, tmp_path / "broken")
        config = json.loads((broken / "adapter_config.json").read_text())
        (broken / "adapter_config.json").write_text(json.dumps(config | wrong))
        assert lint(broken)
        with pytest.raises(ServingFailed, match=f"{vllm.url} does not load assistant-v1-.*: status 500"):
            load(Fleet([Replica(vllm.url)], 3), make(broken))

    def test_a_folder_that_the_replica_does_not_see_is_said(self, vllm: VllmServer, make: Make) -> None:
        with pytest.raises(ServingFailed, match="finds no adapter at /elsewhere/assistant-v1-"):
            load(Fleet([Replica(vllm.url)], 3, "/elsewhere"), make())
