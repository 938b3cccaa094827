"""A user who asks to be forgotten is: in the journal, on the disk, and for every query; what was learned stays."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Gateway, MakeGateway, eventually
from fake_vllm import FakeVllm

from telemetry.errors import StateLocked
from telemetry.events import Answerer, Interaction, Signal
from telemetry.journal import Journal
from telemetry.retention import BATCH, expire, keep_to
from understudy.cli import main
from understudy.forget import forget
from understudy.mask import mask_all


def config_of(gw: Gateway, tmp_path: Path) -> str:
    return str(next(tmp_path.glob("understudy-*.yaml")))


def on_disk(gw: Gateway) -> bytes:
    """All that the journal's files hold, the write-ahead log included."""
    path = gw.settings.journal_path
    return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))


def talk(gw: Gateway, user: str, text: str) -> str:
    before = len(gw.interactions())
    said = gw.chat(text, headers={"x-understudy-user": user})
    gw.interaction(before + 1)
    name = str(said.json()["id"])
    gw.feedback({"response_id": name, "kind": "comment", "text": f"comment on {text}", "user": user})
    gw.feedback({"response_id": name, "kind": "thumb", "value": True, "user": user})
    return name


def test_forget_erases_one_user_and_nobody_else(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    talk(gw, "ann", "pineapple-one")
    talk(gw, "bob", "durian-two")
    about_ann = talk(gw, "ann", "pineapple-three")
    gw.feedback({"response_id": about_ann, "kind": "comment", "text": "a reviewer on pineapple", "user": "eve"})
    before = gw.sums()
    ann = gw.interactions()[0].user
    assert b"pineapple" in on_disk(gw)
    assert main(["forget", "--user", "ann", "--config", config_of(gw, tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["interactions"], said["signals"], said["versions"]) == (2, 5, [])
    with gw.journal() as journal:
        eventually(journal.scrub)
    disk = on_disk(gw)
    assert b"pineapple" not in disk
    assert str(ann).encode() not in disk
    assert b"durian-two" in disk
    assert b"comment on durian" in disk
    kept = gw.interactions()
    assert [i.messages is None for i in kept] == [True, False, True]
    assert kept[0].user == kept[2].user != ann, "one unknown user is still one"
    assert len({s.subject for s in gw.signals("comment")}) == 3
    assert gw.sums() == before, "the sums say nothing of a person, and stay"
    assert main(["forget", "--user", "ann", "--config", config_of(gw, tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["interactions"] == 0


def test_what_was_forgotten_can_be_counted_anew(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gw = gateway(fake, reward={"window": "1s"})
    for n in range(3):
        talk(gw, "ann", f"text {n}")
    gw.sums()
    gw.stop()
    config = config_of(gw, tmp_path)
    assert main(["forget", "--user", "ann", "--config", config]) == 0
    assert main(["rebuild", "--config", config]) == 0, capsys.readouterr().out


def test_another_tenants_user_of_the_same_name_stays(gateway: MakeGateway, fake: FakeVllm, tmp_path: Path) -> None:
    gw = gateway(fake)
    gw.chat("one", headers={"x-understudy-user": "ann", "x-understudy-tenant": "acme"})
    gw.chat("two", headers={"x-understudy-user": "ann", "x-understudy-tenant": "rival"})
    gw.wait_interactions(2)
    assert main(["forget", "--user", "ann", "--tenant", "acme", "--config", config_of(gw, tmp_path)]) == 0
    assert {i.tenant: i.messages is None for i in gw.interactions()} == {"acme": True, "rival": False}


def test_a_user_whose_facts_fill_several_batches_is_forgotten_whole(tmp_path: Path) -> None:
    from gateway.auth import Pseudonyms
    from router.store_sqlite import SqliteStore

    journal, store = Journal(tmp_path / "j.db"), SqliteStore(tmp_path / "s.db")
    key = store.secret("pseudonyms", b"k" * 32)
    ann = Pseudonyms(key).of("t", "ann")
    facts = [
        Interaction(
            event_id=f"e{n}", at=1.0 * n, request_id=f"r{n}", route="r", tenant="t", session=f"s{n}",
            answerer=Answerer("a", "m"), user=ann if n % 2 else "other", answer=f"text {n}",
        )
        for n in range(5000)
    ]  # fmt: skip
    journal.append(facts)
    found = forget(journal, store, "t", "ann")
    assert (found.interactions, found.signals, found.scrubbed) == (2500, 0, True)
    kept = [fact for _, fact in journal.read(0, 10_000) if isinstance(fact, Interaction)]
    assert {(fact.user == "other", fact.answer is None) for fact in kept} == {(True, False), (False, True)}
    assert [fact.request_id for fact in kept] == [f"r{n}" for n in range(5000)], "order and names are as they were"
    journal.close()
    store.close()


def test_forget_without_a_key_of_pseudonyms_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "understudy.yaml"
    config.write_text(
        f"state: sqlite:///{tmp_path}/u.db\n"
        "routes: {assistant: {upstreams: ['http://127.0.0.1:9'], arms: {champion: {model: base}}}}\n"
    )
    assert main(["forget", "--user", "ann", "--config", str(config)]) == 1
    assert "no key of pseudonyms" in capsys.readouterr().err


# Retention


def aged(path: Path, n: int) -> Journal:
    journal = Journal(path)
    journal.append(
        [
            Interaction(
                event_id=f"e{at}", at=float(at), request_id=f"r{at}", route="r", tenant="t", session="s",
                answerer=Answerer("a", "m"), messages=[{"role": "user", "content": f"secret {at}."}],
                answer="an answer",
            )
            if at % 2
            else Signal(event_id=f"e{at}", at=float(at), kind="comment", tenant="t", text=f"secret {at}.")
            for at in range(n)
        ]
    )  # fmt: skip
    return journal


def test_text_goes_when_it_is_too_old_and_only_then(tmp_path: Path) -> None:
    journal = aged(tmp_path / "j.db", 3 * BATCH)
    went = 0
    while batch := expire(journal, before=2 * BATCH):
        went += batch
    assert went == 2 * BATCH
    journal.scrub()
    disk = b"".join(file.read_bytes() for file in tmp_path.glob("j.db*"))
    assert f"secret {2 * BATCH - 1}.".encode() not in disk
    assert f"secret {2 * BATCH}.".encode() in disk
    assert len(journal.read(0, 10_000)) == 3 * BATCH, "the facts stay"
    journal.close()


def test_retention_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = aged(tmp_path / "j.db", 2 * BATCH)
    assert expire(journal, before=10 * BATCH) == BATCH
    journal.close()
    journal = Journal(tmp_path / "j.db")
    assert expire(journal, before=10 * BATCH) == BATCH
    assert expire(journal, before=10 * BATCH) == 0
    journal.close()


def test_a_fact_from_a_clock_ahead_does_not_keep_what_comes_after_it(tmp_path: Path) -> None:
    journal = aged(tmp_path / "j.db", 10)
    ahead = Signal(event_id="ahead", at=1e12, kind="comment", tenant="t", text="from the future")
    journal.append([ahead, msgspec.structs.replace(ahead, event_id="old", at=5.0, text="an old one")])
    assert expire(journal, before=100.0) == 12
    assert not any(fact.text for _, fact in journal.read(0, 100) if isinstance(fact, Signal))
    journal.close()


def test_what_is_told_today_of_long_ago_takes_no_fresh_text_with_it(tmp_path: Path) -> None:
    journal = aged(tmp_path / "j.db", 10)
    told = Signal(event_id="o", at=-1e6, received_at=20.0, kind="outcome", tenant="t", value=1.0)
    journal.append([told])
    assert expire(journal, before=5.0) == 5
    assert sum(fact.messages is not None for _, fact in journal.read(0, 100) if isinstance(fact, Interaction)) == 3
    journal.close()


def test_a_slow_recogniser_locks_nobody_out(tmp_path: Path) -> None:
    journal, other = aged(tmp_path / "j.db", 10), Journal(tmp_path / "j.db")

    def slow(text: str) -> str:
        other.know("still", b"writable")
        return "***"

    assert mask_all(journal, slow, since=0.0) == (10, True)
    assert b"secret" not in b"".join(file.read_bytes() for file in tmp_path.glob("j.db*"))
    journal.close()
    other.close()


def test_text_goes_though_the_journal_could_not_be_opened_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(tmp_path / "j.db", 2 * BATCH + 7).close()
    monkeypatch.setattr("telemetry.retention.PAUSE", 0.05)
    real, tries = Journal, []

    def shy(path: Path) -> Journal:
        tries.append(path)
        if len(tries) == 1:
            raise StateLocked("another program has it")
        return real(path)

    monkeypatch.setattr("telemetry.retention.Journal", shy)
    stopping = threading.Event()
    thread = threading.Thread(target=keep_to, args=(tmp_path / "j.db", 1.0, stopping))
    thread.start()
    eventually(lambda: b"secret" not in b"".join(file.read_bytes() for file in tmp_path.glob("j.db*")), 10)
    stopping.set()
    thread.join()


def test_a_user_is_forgotten_though_text_goes_at_the_same_time(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gw = gateway(fake)
    talk(gw, "ann", "pineapple")
    ann = gw.interactions()[0].user
    with gw.journal() as journal:
        read = journal.read

        def and_meanwhile(after: int = 0, limit: int = 1000) -> Any:
            found = read(after, limit)
            assert main(["forget", "--user", "ann", "--config", config_of(gw, tmp_path)]) == 0
            return found

        monkeypatch.setattr(journal, "read", and_meanwhile)
        assert expire(journal, time.time() + 10) > 0
    assert ann not in {i.user for i in gw.interactions()}


def test_the_journal_can_be_written_while_text_goes(tmp_path: Path) -> None:
    journal = aged(tmp_path / "j.db", BATCH)
    other = sqlite3.connect(tmp_path / "j.db")
    other.execute("BEGIN").execute("SELECT COUNT(*) FROM facts").fetchone()
    assert expire(journal, before=BATCH) == BATCH
    other.close()
    assert journal.scrub()
    journal.close()


# The commands


def test_signals_lists_what_was_heard_and_reading_texts_leaves_a_record(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gw = gateway(fake)
    talk(gw, "ann", "pineapple \x1b[2J")
    config = config_of(gw, tmp_path)
    assert main(["signals", "--config", config, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["arm"]) for row in rows] == [("thumb", "champion"), ("comment", "champion")]
    assert "pineapple" not in json.dumps(rows)
    assert main(["signals", "--config", config, "--kind", "comment", "--text", "--limit", "5"]) == 0
    shown = capsys.readouterr().out
    assert "pineapple" in shown.replace("\n", "")
    assert "\x1b[2J" not in shown, "a text does not steer the terminal"
    assert "thumb" not in shown
    with gw.journal() as journal:
        ((at, who, _),) = journal.reads()
    assert "command line" in who
    assert abs(at - time.time()) < 60


def test_feedback_can_be_sent_from_a_shell(
    gateway: MakeGateway, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    gw = gateway(fake)
    name = gw.chat("hi").json()["id"]
    base = ["feedback", "send", "--base-url", f"{gw.url}/v1", "--response-id", name]
    assert main([*base, "--kind", "thumb", "--value", "true", "--user", "ann"]) == 0
    assert gw.signals()[0].event_id in capsys.readouterr().out
    assert main([*base, "--kind", "rating", "--value", "9"]) == 1
    assert "from 1 to 5" in capsys.readouterr().err
    assert main(["feedback", "send", "--base-url", "http://127.0.0.1:9", "--trace-id", "x", "--kind", "copy"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_keys_rotate_keeps_the_last_two(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gw = gateway(fake)
    config = config_of(gw, tmp_path)
    assert main(["keys", "rotate", "--config", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["still_valid"] == ["0"]
    assert main(["keys", "rotate", "--config", config]) == 1
    assert "does not sign yet" in capsys.readouterr().err
    with gw.store() as store:
        names = {name for name in store.secrets() if name.startswith("tokens:")}
    assert names == {"tokens:0", f"tokens:{found['signs_next']}"}


# Other recognisers


def shout(text: str) -> str:
    """What `understudy mask --using test_forget:shout` calls."""
    return text.replace("pineapple", "[FRUIT]")


def test_another_recogniser_goes_over_what_is_kept(
    gateway: MakeGateway, fake: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gw = gateway(fake)
    talk(gw, "ann", "pineapple")
    gw.settled()
    config = config_of(gw, tmp_path)
    assert main(["mask", "--using", "test_forget:shout", "--config", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"] == 3
    with gw.journal() as journal:
        eventually(journal.scrub)
    disk = on_disk(gw)
    assert b"pineapple" not in disk
    assert disk.count(b"[FRUIT]") >= 3, "the question, its answer, the comment"
    for wrong, why in (
        ("nothing", "names no function"),
        ("no.such:f", "cannot be imported"),
        ("json:loads", "fails"),
        ("builtins:len", "is no"),
    ):
        assert main(["mask", "--using", wrong, "--config", config]) == 1
        assert why in capsys.readouterr().err
