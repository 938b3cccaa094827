from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from router.policy import Arm, Split, Thompson, seconds
from understudy.config_text import key_paths
from understudy.settings import (
    STARTER,
    ConfigError,
    Problem,
    Settings,
    accepted_but_unused,
    check,
    digest,
    explain,
    load,
    schema,
)

SAMPLE = """\
listen: {host: 127.0.0.1, port: 4000, workers: 1}
state: sqlite:///understudy.db            # or redis://localhost:6379/0
archive: null                             # or s3://bucket/understudy, file:///var/lib/understudy
capture: {text: full, retention: 30d, redact: [email, phone, card, key]}   # full | redacted | off
routes:
  assistant:
    upstreams: [http://127.0.0.1:8000]    # vLLM replicas; each serves every arm
    arms:
      champion: {model: base}             # more appear as the learner makes them
    reward: {window: 10m, signals: {copy: 0.3, edit: -0.4, regenerate: -0.6, thumb: 1.0}, outcome: null}
    policy: {kind: thompson, unit: session, segment_by: task_type, half_life: 7d, refresh: 1s,
             floor: 0.02, holdout: 0.05, prior: {mass: 20}}
    rollout: {stages: [{share: 0.05, min_sessions: 200, min_time: 1h}, {share: 0.2}, {share: 0.5},
                       {share: 1.0}],
              alpha: 0.05, margin: 0.02,
              guardrails: [{metric: error_rate, worse_by: 1.5x, action: rollback},
                           {metric: latency_p99, above: 2s, action: pause}]}
    learner: {base: ./models/base, min_pairs: 500, every: 7d,
              gate: {main: win_rate, max_length_ratio: 1.1x, judge: {model: openai/judge, api_key: k}}}
"""

# One route in block style; a test adds its own lines below and counts from here.
ROUTE = """\
routes:
  assistant:
    upstreams: [http://127.0.0.1:8000]
    arms:
      champion: {model: base}
      concise: {model: base}
"""
NEXT = 7
SECRET = "hunter2-very-secret"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str) -> Path:
        path = tmp_path / "understudy.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


@pytest.fixture
def settle(write: Any) -> Any:
    def settled(text: str, **env: str) -> Settings:
        return load(write(text), env)

    return settled


@pytest.fixture
def problems(write: Any) -> Any:
    def found(text: str, **env: str) -> list[tuple[int, str, str, str]]:
        return [(p.line, p.key, p.message, p.hint) for p in check(write(text), env)]

    return found


# ---- what loads ----------------------------------------------------------------------------------------


def test_the_designs_sample_loads(settle: Any) -> None:
    settings = settle(SAMPLE)
    route = settings.routes["assistant"]
    assert route.upstreams[0].url == "http://127.0.0.1:8000"
    assert route.arms["champion"] == Arm(model="base")
    assert isinstance(route.policy, Thompson)
    assert (route.policy.half_life, route.policy.refresh, route.policy.segment_by) == (
        604800.0,
        1.0,
        "task_type",
    )
    assert (route.policy.prior.mean, route.policy.prior.mass) == (None, 20)
    assert (route.reward.window, route.reward.signals["edit"]) == (600.0, -0.4)
    assert [stage.share for stage in route.rollout.stages] == [0.05, 0.2, 0.5, 1.0]
    assert route.rollout.guardrails[0].worse_by == 1.5
    assert route.rollout.guardrails[1].above == 2.0
    assert settings.capture.retention == 30 * 86400


def test_the_starter_loads_and_sets_nothing_that_is_unused(settle: Any) -> None:
    settings = settle(STARTER)
    assert settings.routes["assistant"].upstreams[0].url == "http://127.0.0.1:8000"
    assert accepted_but_unused(settings) == []


def test_a_route_needs_only_upstreams_and_an_arm(settle: Any) -> None:
    settings = settle(ROUTE)
    route = settings.routes["assistant"]
    assert route.policy == Thompson()
    assert (route.timeouts.connect, route.timeouts.first_byte, route.timeouts.idle) == (2.0, 60.0, 60.0)
    assert (settings.listen.port, settings.listen.max_body, settings.listen.max_header_bytes) == (
        4000,
        32 * 1024 * 1024,
        64 * 1024,
    )
    assert route.reward.signals["rating"] == 1.0


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("500ms", 0.5),
        ("30s", 30),
        ("10m", 600),
        ("1h", 3600),
        ("7d", 604800),
        ("1.5h", 5400),
        (3, 3.0),
        ("3", 3.0),
    ],
)
def test_durations_become_seconds(written: object, expected: float) -> None:
    assert seconds(written) == expected


@pytest.mark.parametrize("written", ["ten minutes", "-5m", "5 years", "", True, None, -1, float("nan"), 10**400])
def test_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match='write one like "500ms"'):
        seconds(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("10MB", 10 << 20), ("64kb", 64 << 10), ("1GiB", 1 << 30), ("4096", 4096), ("77", 77)],
)
def test_sizes_become_bytes(settle: Any, written: str, expected: int) -> None:
    assert settle(f"{ROUTE}listen: {{max_body: {written}}}").listen.max_body == expected


@pytest.mark.parametrize(
    "written",
    [
        "http://gpu:8000",
        "http://gpu:8000/",
        "http://gpu:8000/v1",
        "http://gpu:8000/v1/",
        "{url: http://gpu:8000/v1}",
    ],
)
def test_an_upstream_may_be_written_with_or_without_v1(settle: Any, written: str) -> None:
    route = settle(ROUTE.replace("[http://127.0.0.1:8000]", f"[{written}]")).routes["assistant"]
    assert [upstream.url for upstream in route.upstreams] == ["http://gpu:8000"]


def test_an_arm_at_a_provider_needs_no_upstream(settle: Any) -> None:
    text = "routes: {r: {arms: {a: {provider: openai, model: gpt-5, api_key: '${KEY}'}}}}"
    assert settle(text, KEY=SECRET).routes["r"].arms["a"].api_key == SECRET


def test_off_and_dates_are_text_and_small_numbers_are_numbers(settle: Any) -> None:
    text = f"{ROUTE}      dated: {{model: on, prompt_version: 2026-01-02, params: {{low: 1e-3, top: 5}}}}\n"
    settings = settle(text + "capture: {text: off}\n")
    arm = settings.routes["assistant"].arms["dated"]
    assert (settings.capture.text, arm.model, arm.prompt_version) == ("off", "on", "2026-01-02")
    assert arm.params == {"low": 0.001, "top": 5}


def test_an_anchor_can_be_merged_and_overridden(settle: Any) -> None:
    text = ROUTE.replace("champion: {model: base}", "champion: &c {model: base, system: Be kind.}")
    arms = settle(text.replace("concise: {model: base}", "concise: {<<: *c, model: other}")).routes["assistant"].arms
    assert (arms["concise"].model, arms["concise"].system) == ("other", "Be kind.")


@pytest.mark.parametrize(
    ("state", "journal", "expected"),
    [
        ("sqlite:///a.db", "null", "a.db"),
        ("sqlite:////var/a.db", "null", "/var/a.db"),
        ("redis://localhost:6379/0", "null", "understudy.db"),
        ("unix:///run/redis.sock", "null", "understudy.db"),
        ("rediss://:pw@cache:6380/1", "j.db", "j.db"),
    ],
)
def test_the_journal_is_the_state_file_unless_written(settle: Any, state: str, journal: str, expected: str) -> None:
    assert settle(f"{ROUTE}state: '{state}'\njournal: {journal}\n").journal_path == Path(expected)


def test_otel_comes_from_the_environment_unless_written(settle: Any) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert settle(ROUTE).otel.endpoint is None
    assert settle(ROUTE, **env).otel.endpoint == "http://collector:4318"
    assert settle(f"{ROUTE}otel: {{endpoint: http://mine:4318}}", **env).otel.endpoint == "http://mine:4318"


# ---- references ----------------------------------------------------------------------------------------


def test_references_are_filled_from_the_environment(settle: Any) -> None:
    text = f"""{ROUTE}      far:
        model: ${{NAME:-small}}-${{SIZE}}
        system: Write $${{NAME}} as it is.
        params:
          temperature: ${{TEMPERATURE}}
          seed: "${{SEED:-7}}"
listen:
  port: ${{PORT}}
journal: ${{JOURNAL:-}}
"""
    settings = settle(text, SIZE="8b", TEMPERATURE="0.7", PORT="4100")
    arm = settings.routes["assistant"].arms["far"]
    assert (arm.model, arm.system) == ("small-8b", "Write ${NAME} as it is.")
    assert arm.params == {"temperature": 0.7, "seed": 7}
    assert (settings.listen.port, settings.journal) == (4100, None)


def test_a_reference_cannot_become_structure(settle: Any) -> None:
    text = "routes: {r: {upstreams: [http://gpu], arms: {a: {model: '${M}'}}}}"
    assert settle(text, M="x, system: evil\nstate: y").routes["r"].arms["a"].model == "x, system: evil\nstate: y"


def test_a_key_of_digits_stays_text(settle: Any) -> None:
    text = "routes: {r: {upstreams: [{url: http://gpu, api_key: '${KEY}'}], arms: {a: {model: m}}}}"
    assert settle(text, KEY="00123").routes["r"].upstreams[0].api_key == "00123"


def test_every_missing_variable_is_named_at_its_line(problems: Any) -> None:
    assert problems(f"{ROUTE}state: ${{STATE}}\nlisten:\n  port: ${{PORT}}\n") == [
        (
            NEXT,
            "state",
            "environment variable STATE is not set",
            "set it before starting, or give a default as ${STATE:-default}",
        ),
        (
            NEXT + 2,
            "listen.port",
            "environment variable PORT is not set",
            "set it before starting, or give a default as ${PORT:-default}",
        ),
    ]


def test_a_broken_reference_says_how_to_write_one(problems: Any) -> None:
    assert problems(f"{ROUTE}journal: ${{1x}}\n") == [
        (NEXT, "journal", "not a reference", "write ${NAME} or ${NAME:-default}; $${ is a plain ${")
    ]


# ---- the file itself -----------------------------------------------------------------------------------


def test_a_missing_file_says_how_to_make_one(tmp_path: Path, settle: Any) -> None:
    path = tmp_path / "nowhere.yaml"
    (problem,) = check(path)
    assert (problem.line, problem.key, problem.message) == (0, "", "there is no such file")
    advice, _, lines = problem.hint.partition("\n\n")
    assert advice == "save these lines there, with your own address and model:"
    assert settle(lines).routes["assistant"].arms["champion"].model == "base"
    assert problem.render(path).startswith(f"{path}: there is no such file; save these lines")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    (problem,) = check(tmp_path)
    assert problem.message == "cannot be read (Is a directory)"


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "understudy.yaml"
    path.write_bytes(b"state: \xff\n")
    assert check(path) == [Problem(0, "", "is not UTF-8 text", "save it as UTF-8")]


@pytest.mark.parametrize("text", ["", "\n# only a comment\n", "---\n", "null\n"])
def test_an_empty_file(problems: Any, text: str) -> None:
    ((line, key, message, hint),) = problems(text)
    assert (line, key, message) == (0, "", "is empty")
    assert hint.startswith("start with these lines:")


def test_a_list_at_the_top(problems: Any) -> None:
    assert problems("# mine\n- routes\n") == [
        (2, "", "must be a mapping of keys", 'begin with a key such as "routes:"')
    ]


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        (
            "state: sqlite:///a.db\nlisten: {port: 4000\nroutes: {}\n",
            3,
            'close every { and [, and inside them put quotes around "${NAME}"',
        ),
        ("listen:\n\tport: 4000\n", 2, "indent with spaces, not tabs"),
        ("listen:\n  host: a: b\n", 2, "check the indentation and the colons here and on the line above"),
        (
            "listen:\n    host: a\n  port: 1\n",
            3,
            "check the indentation and the colons here and on the line above",
        ),
        (f"a: 1\nkey: *{SECRET}\n", 2, "quote a value that begins with * or &"),
        ("state: a\n---\nstate: b\n", 2, "keep one document, without a second ---"),
        ("listen: {port: ${PORT}}\n", 1, 'close every { and [, and inside them put quotes around "${NAME}"'),
    ],
)
def test_malformed_yaml_is_shown_at_its_line(problems: Any, text: str, line: int, hint: str) -> None:
    ((at, key, message, said),) = problems(text)
    assert (at, key, said) == (line, "", hint)
    assert message.startswith("not valid YAML: ")
    assert SECRET not in message


def test_an_alias_of_itself(problems: Any) -> None:
    found = problems(f"{ROUTE}      far: {{model: m, params: &p {{again: *p}}}}\n")
    assert found == [
        (
            NEXT,
            "routes.assistant.arms.far.params.again",
            "an alias that contains itself",
            "write the value out",
        )
    ]


def test_a_deep_file_does_not_crash(problems: Any) -> None:
    assert problems("a: " + "[" * 5000) == [(0, "", "is nested too deeply", "")]


def test_a_yaml_tag(problems: Any) -> None:
    assert (
        NEXT,
        "journal",
        "a YAML tag that has no meaning here",
        "remove the tag, or quote the value",
    ) in problems(f"{ROUTE}journal: !!python/name:os.system x\n")


def test_a_key_written_twice(problems: Any) -> None:
    assert problems(f"{ROUTE}state: sqlite:///a.db\nstate: sqlite:///b.db\n") == [
        (NEXT + 1, "state", f"written twice, first on line {NEXT}", "keep one of the two")
    ]


def test_two_arms_of_one_name(problems: Any) -> None:
    assert problems(f"{ROUTE}      champion: {{model: other}}\n") == [
        (
            NEXT,
            "routes.assistant.arms.champion",
            "written twice, first on line 5",
            "give each one its own name",
        )
    ]


# ---- keys and values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "key", "hint"),
    [
        ("    polcy: {kind: thompson}\n", "routes.assistant.polcy", 'did you mean "policy"?'),
        ("sate: sqlite:///a.db\n", "sate", 'did you mean "state"?'),
        ("      far: {modle: m}\n", "routes.assistant.arms.far.modle", 'did you mean "model"?'),
        (
            "    policy: {kind: thompson, halflife: 7d}\n",
            "routes.assistant.policy.halflife",
            'did you mean "half_life"?',
        ),
        (
            "    policy: {kind: split, shares: {champion: 1}, share: 1}\n",
            "routes.assistant.policy.share",
            'did you mean "shares"?',
        ),
        ("    half_life: 7d\n", "routes.assistant.half_life", "it belongs at routes.<name>.policy.half_life"),
        (
            "listen: {zzz: 1}\n",
            "listen.zzz",
            "the keys here are host, port, workers, max_body, max_header_bytes, try_page",
        ),
        (
            "    rollout: {stages: [{share: 1, min_tim: 1h}]}\n",
            "routes.assistant.rollout.stages[0].min_tim",
            'did you mean "min_time"?',
        ),
    ],
)
def test_an_unknown_key_names_the_one_meant(problems: Any, lines: str, key: str, hint: str) -> None:
    found = problems(ROUTE + lines)
    assert (NEXT, key, "unknown key", hint) in found
    assert all(message == "unknown key" or message == "required key is missing" for _, _, message, _ in found)


def test_an_unknown_key_of_an_upstream(problems: Any) -> None:
    text = ROUTE.replace("[http://127.0.0.1:8000]", "[http://a, {url: http://b, apikey: x}]")
    assert problems(text) == [(3, "routes.assistant.upstreams[1].apikey", "unknown key", 'did you mean "api_key"?')]


TEXT = ("must be text", "put quotes around it")
MAPPING = ("must be a mapping of keys", "put keys under it, or remove it for its default")
DURATION = ("not a duration", 'write one like "500ms", "30s", "10m", "1h" or "7d", or a number of seconds')


@pytest.mark.parametrize(
    ("lines", "key", "message", "hint"),
    [
        ("      far: {}\n", "arms.far.model", "required key is missing", "add it"),
        ("      far: {model: 7}\n", "arms.far.model", *TEXT),
        ("      far:\n", "arms.far", *MAPPING),
        ("      'far away': {model: m}\n", "arms.far away", "not a usable name",
         "start with a letter or digit and use only letters, digits and . _ : / @ + -"),
        ("      far: {model: m, api_key: k}\n", "arms.far.api_key", "needs a provider",
         "set provider beside it, or put url and api_key under upstreams"),
        ("      far: {model: m, params: {model: x}}\n", "arms.far.params.model", "cannot be overridden",
         "write it as the arm's own model"),
        ("      far: {model: m, gain: 0.1}\n", "arms.far.gain", "is over a parent", "write parent beside it"),
        ("      far: {model: m, parent: near}\n      near: {model: n, parent: far}\n", "arms.far.parent",
         "descends from itself", "name the arm that it was made from"),
        ("      far: {model: m, max_share: 0.01}\n", "arms.far.max_share", "is less than floor and holdout give",
         "write 0.036 or more"),
        ("      far: {model: m, max_share: 0}\n", "arms.far.max_share", "must be more than 0", "raise it"),
        ("    reward: {outcome: {name: sale, worst: 1}}\n", "reward.outcome.best", "is the same as worst",
         "write the two values between which the outcome lies"),
        ("    reward: {cost: {}}\n", "reward.cost", "needs a weight or a budget",
         "write one of them, such as {budget: 0.002}"),
        ("    timeouts: {connect: fast}\n", "timeouts.connect", *DURATION),
        ("    timeouts: {idle: 0}\n", "timeouts.idle", "must be longer than 0",
         'write a duration like "30s", "10m" or "7d"'),
        ("    reward: {signals: {thumbs: 1}}\n", "reward.signals.thumbs", "unknown signal",
         'did you mean "thumb"?'),
        ("    reward: {signals: {zzz: 1}}\n", "reward.signals.zzz", "unknown signal",
         "the kinds are thumb, rating, comparison, copy, accept, edit, correction, flag, regenerate, retry, user_edit, "
         "rephrase, complaint, thanks, stop, abandon, escalation"),
        ("    reward: {signals: {thumb: 2}}\n", "reward.signals.thumb", "must be at most 1", "lower it"),
        ("    reward: {signals: [thumb]}\n", "reward.signals", *MAPPING),
        ("    policy: {kind: thomson}\n", "policy.kind", "must be thompson, top_two, epsilon, linear or split",
         'did you mean "thompson"?'),
        ("    policy: {half_life: 7d}\n", "policy", "has no kind",
         "add kind: epsilon, linear, split, thompson or top_two"),
        ("    policy: {kind: thompson, half_life: 0s}\n", "policy.half_life", "must be longer than 0",
         'write a duration like "30s", "10m" or "7d"'),
        ("    policy: {kind: thompson, holdout: 1}\n", "policy.holdout", "must be less than 1", "lower it"),
        ("    policy: {kind: thompson, holdout: -0.1}\n", "policy.holdout", "must be at least 0", "raise it"),
        ("    policy: {kind: thompson, floor: 0.6}\n", "policy.floor",
         "a floor of 0.6 for 2 arms is more than 1", "lower it to 0.5 or less"),
        ("    policy: {kind: thompson, prior: {mean: 1.5}}\n", "policy.prior.mean", "must be less than 1",
         "lower it"),
        ("    policy: {kind: thompson, segment_by: tenants}\n", "policy.segment_by",
         "must be task_type, tenant or prompt", 'did you mean "tenant"?'),
        ("    policy: {kind: split}\n", "policy.shares", "required key is missing", "add it"),
        ("    policy: {kind: split, shares: {champion: 0.5, concise: 0.4}}\n", "policy.shares",
         "the shares sum to 0.9", "make them sum to 1"),
        ("    policy: {kind: split, shares: {champion: 0.5, conside: 0.5}}\n", "policy.shares.conside",
         "no arm of that name", "the arms here are champion, concise"),
        ("    policy: {kind: split, shares: {champion: half}}\n", "policy.shares.champion",
         "must be a number", "write it without quotes or a unit"),
        ("    rollout: {stages: [{share: 0.5}, {share: 0.2}]}\n", "rollout.stages[1].share", "does not rise",
         "make it more than the 0.5 before it"),
        ("    rollout: {stages: []}\n", "rollout.stages", "must not be empty", "write at least one"),
        ("    rollout: {guardrails: [{metric: error_rat, above: 1, action: pause}]}\n",
         "rollout.guardrails[0].metric", "must be error_rate, latency_p50, latency_p95, latency_p99, first_byte_p50, "
         "first_byte_p95, first_byte_p99, "
         "satisfaction, flag_rate, signal_rate or sample_ratio",
         'did you mean "error_rate"?'),
        ("    rollout: {guardrails: [{metric: error_rate, action: pause}]}\n", "rollout.guardrails[0]",
         "has no limit", 'add worse_by (such as "1.5x") or above (such as "2s")'),
        ("    rollout: {guardrails: [{metric: error_rate, worse_by: lots, action: pause}]}\n",
         "rollout.guardrails[0].worse_by", "not a factor", 'write one like "1.5x"'),
        ("    learner: {min_pairs: 5}\n", "learner.base", "required key is missing", "add it"),
    ],
)  # fmt: skip
def test_a_wrong_value_under_a_route(problems: Any, lines: str, key: str, message: str, hint: str) -> None:
    assert problems(ROUTE + lines) == [(NEXT, f"routes.assistant.{key}", message, hint)]


@pytest.mark.parametrize(
    ("lines", "key", "message", "hint"),
    [
        ("listen: {port: http}\n", "listen.port", "must be a whole number",
         "write digits only, without quotes or a unit"),
        ("listen: {port: 70000}\n", "listen.port", "must be at most 65535", "lower it"),
        ("listen: {max_body: huge}\n", "listen.max_body", "not a size",
         'write one like "64KB", "10MB" or "1GB", or a number of bytes'),
        ("listen: 4000\n", "listen", *MAPPING),
        ("listen:\n", "listen", *MAPPING),
        ("capture: {text: redact}\n", "capture.text", "must be full, redacted or off",
         'did you mean "redacted"?'),
        ("capture: {redact: email}\n", "capture.redact", "must be a list", "write it as [one, another]"),
        ("capture: {redact: [email, phon]}\n", "capture.redact[1]", "must be email, phone, card, key or iban",
         'did you mean "phone"?'),
        ("capture: {retention: month}\n", "capture.retention", *DURATION),
        ("auth: {require_key: maybe}\n", "auth.require_key", "must be true or false", "write true or false"),
        ("state: sqlite://understudy.db\n", "state", "names no file",
         "write three slashes and a path: sqlite:///understudy.db"),
        ("state: redis://\n", "state", "names no host", "write one like redis://localhost:6379/0"),
        ("state: postgres://db\n", "state", "not a state URL",
         "write sqlite:///path, redis://host:6379/0, rediss://host:6379/0 or unix:///socket"),
        ("archive: /var/lib\n", "archive", "not a URL",
         "write one like s3://bucket/understudy or file:///var/lib/understudy"),
        ("otel: {endpoint: collector:4318}\n", "otel.endpoint", "must begin with http:// or https://",
         "write one like http://127.0.0.1:8000"),
        ("journal: [a]\n", "journal", "must be a path", "put quotes around it"),
    ],
)  # fmt: skip
def test_a_wrong_value_at_the_top(problems: Any, lines: str, key: str, message: str, hint: str) -> None:
    assert problems(ROUTE + lines) == [(NEXT, key, message, hint)]


@pytest.mark.parametrize(
    ("written", "at", "message"),
    [
        ("[ftp://gpu]", "[0]", "must begin with http:// or https://"),
        ("[127.0.0.1:8000]", "[0]", "must begin with http:// or https://"),
        ("['http://']", "[0]", "names no host"),
        ("[http://gpu:port]", "[0]", "not a URL"),
        (f"['http://me:{SECRET}@gpu']", "[0]", "carries a user or password"),
        ("['http://gpu?x=1']", "[0]", "carries a query"),
        ("[http://gpu, {url: ftp://gpu}]", "[1].url", "must begin with http:// or https://"),
        ("[http://gpu, http://gpu/v1]", "[1]", "written twice"),
        ("http://gpu", "", "must be a list"),
        ("[]", "", 'arm "champion" has nowhere to go'),
    ],
)
def test_a_wrong_upstream(problems: Any, written: str, at: str, message: str) -> None:
    ((line, key, said, hint),) = problems(ROUTE.replace("[http://127.0.0.1:8000]", written))
    assert (line, key, said) == (3, f"routes.assistant.upstreams{at}", message)
    assert hint


def test_a_route_without_upstreams_says_where_to_add_them(problems: Any) -> None:
    assert problems("routes:\n  r:\n    arms: {a: {model: m}}\n") == [
        (2, "routes.r.upstreams", 'arm "a" has nowhere to go', "add upstreams: [http://127.0.0.1:8000]")
    ]


@pytest.mark.parametrize(
    ("text", "line", "key", "message"),
    [
        ("state: sqlite:///a.db\n", 1, "routes", "required key is missing"),
        ("routes: {}\n", 1, "routes", "must not be empty"),
        ("routes:\n  r:\n    upstreams: [http://gpu]\n", 2, "routes.r.arms", "required key is missing"),
        (
            "routes:\n  r:\n    upstreams: [http://gpu]\n    arms: {}\n",
            4,
            "routes.r.arms",
            "must not be empty",
        ),
    ],
)
def test_routes_and_arms_are_needed(problems: Any, text: str, line: int, key: str, message: str) -> None:
    ((at, named, said, hint),) = problems(text)
    assert (at, named, said) == (line, key, message)
    assert hint in ("add it", "write at least one")


def test_all_problems_come_at_once_in_the_files_order(write: Any) -> None:
    path = write(
        "sate: x\nroutes:\n  assistant:\n    upstreams: ['${UP}']\n    arms: {champion: {modle: base}}\n    polcy: {}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value).splitlines() == [
        f'{path}:1: sate: unknown key; did you mean "state"?',
        f"{path}:4: routes.assistant.upstreams[0]: environment variable UP is not set; "
        "set it before starting, or give a default as ${UP:-default}",
        f"{path}:5: routes.assistant.arms.champion.model: required key is missing; add it",
        f'{path}:5: routes.assistant.arms.champion.modle: unknown key; did you mean "model"?',
        f'{path}:6: routes.assistant.polcy: unknown key; did you mean "policy"?',
    ]


def test_the_format_for_people() -> None:
    problem = Problem(12, "routes.assistant.polcy", "unknown key", 'did you mean "policy"?')
    assert problem.render("understudy.yaml") == (
        'understudy.yaml:12: routes.assistant.polcy: unknown key; did you mean "policy"?'
    )


# ---- secrets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(set(key_paths(schema())), key=str))
def test_no_message_repeats_a_value(write: Any, key: str) -> None:
    """A secret put under any key, by mistake or by a reference, never comes back in an error."""
    for value in ("${SECRET}", "[${SECRET}]", "*" + SECRET):
        quoted = value if value.startswith("*") else json.dumps(value)
        parts, depth, text = re.sub(r"\[\]", "", key).replace("<name>", "r").split("."), 0, ""
        for part in parts[:-1]:
            text += f"{' ' * depth}{part}:\n"
            depth += 1
        path = write(f"{text}{' ' * depth}{parts[-1]}: {quoted}\n")
        for problem in check(path, {"SECRET": SECRET}):
            assert SECRET not in problem.render(path)


SECRETIVE = f"""\
state: redis://:{SECRET}@cache:6379/0
archive: s3://bucket/x?token={SECRET}
routes:
  r:
    upstreams: [{{url: http://gpu, api_key: "{SECRET}"}}]
    arms:
      a:
        provider: openai
        model: m
        api_key: "{SECRET}"
        params: {{max_tokens: 5, extra_headers: {{Authorization: "Bearer {SECRET}"}}}}
"""


def test_explain_and_repr_hide_secrets(settle: Any) -> None:
    settings = settle(SECRETIVE)
    rows = {row.key: row.value for row in explain(settings)}
    assert SECRET not in repr(rows)
    assert rows["state"] == "redis://***@cache:6379/0"
    assert rows["routes.r.upstreams[0].api_key"] == "***"
    assert rows["routes.r.arms.a.params"] == {"max_tokens": 5, "extra_headers": {"Authorization": "***"}}
    shown = repr(settings.model_copy(update={"routes": {}})) + repr(settings.routes["r"].upstreams)
    assert SECRET not in shown


# ---- what the command line shows -----------------------------------------------------------------------


def test_explain_tells_what_was_set(settle: Any) -> None:
    rows = {row.key: row for row in explain(settle(f"{ROUTE}    policy: {{kind: thompson, floor: 0.02}}\n"))}
    assert rows["routes.assistant.policy.floor"].source == "set"
    assert rows["routes.assistant.policy.half_life"].source == "default"
    assert rows["listen.port"][1:] == (4000, "Port to listen on; 0 for any free one.", "default")
    assert rows["routes.assistant.upstreams[0].url"].value == "http://127.0.0.1:8000"
    assert all(row.meaning for row in rows.values())


def test_the_rows_of_a_default_rollouts_stages_are_defaults(settle: Any) -> None:
    rows = {row.key: row for row in explain(settle(f"{ROUTE}    rollout: {{alpha: 0.1}}\n"))}
    assert rows["routes.assistant.rollout.alpha"].source == "set"
    assert rows["routes.assistant.rollout.stages[0].share"].source == "default"


def test_every_key_of_the_schema_is_described() -> None:
    shape = schema()
    for model in (shape, *shape["$defs"].values()):
        for key, field in model["properties"].items():
            # A description that says what its model says already is left to the model.
            said = {**shape["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}), **field}
            assert said.get("description"), f"{model['title']}.{key}"
    json.dumps(shape)


def test_the_schema_allows_what_the_sample_writes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    jsonschema.validate(yaml.safe_load(SAMPLE), schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"routes": {}}, schema())


def test_what_this_version_leaves_undone_is_named(settle: Any) -> None:
    assert accepted_but_unused(settle(SAMPLE)) == []
    (note,) = accepted_but_unused(settle(SAMPLE.replace("archive: null", "archive: s3://bucket/facts")))
    assert note.startswith("archive is accepted, but this version does not act on it yet")


def test_there_may_be_no_admin_listener(settle: Any) -> None:
    assert settle(f"{ROUTE}admin: null\n").admin is None
    assert (settle(ROUTE).admin.host, settle(ROUTE).admin.port) == ("127.0.0.1", 4001)
    assert settle(f"{ROUTE}admin: {{port: 4002}}\n").admin.host == "127.0.0.1"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "hooks.example.org/x", "https:///x", "file:///etc/passwd"])
def test_a_webhook_is_a_web_url(problems: Any, url: str) -> None:
    ((_, key, said, _),) = problems(f"{ROUTE}    rollout: {{webhook: '{url}'}}\n")
    assert key == "routes.assistant.rollout.webhook"
    assert said == "is no web URL"


def test_a_webhook_is_not_shown(settle: Any) -> None:
    found = settle(f"{ROUTE}    rollout: {{webhook: 'https://hooks.example.org/T0/B0/s3cret'}}\n")
    assert "s3cret" not in str(explain(found)) + repr(found)


def test_cost_needs_the_price_of_every_arm(problems: Any) -> None:
    ((_, key, *said),) = problems(f"{ROUTE}    reward: {{cost: {{weight: 1}}}}\n")
    assert key == "routes.assistant.arms.champion.price"
    assert said == ["is needed by reward.cost", "write what a million tokens cost"]


def test_an_outcome_is_a_name_or_a_mapping_with_its_scale(settle: Any) -> None:
    def outcome(written: str) -> Any:
        return settle(f"{ROUTE}    reward: {{outcome: {written}}}\n").routes["assistant"].reward.outcome

    assert outcome("sale").model_dump() == {"name": "sale", "worst": 0.0, "best": 1.0}
    assert outcome("{name: minutes, worst: 60, best: 0}").best == 0.0


def test_the_digest_follows_the_meaning_and_not_the_writing(settle: Any) -> None:
    plain = digest(settle(ROUTE))
    assert re.fullmatch("[0-9a-f]{64}", plain)
    assert plain == digest(settle(f"# a comment\nlisten: {{port: 4000}}\n{ROUTE}    timeouts: {{idle: 1m}}\n"))
    assert plain != digest(settle(f"{ROUTE}    timeouts: {{idle: 2m}}\n"))


# ---- immutable -----------------------------------------------------------------------------------------


def test_settings_cannot_be_changed(settle: Any) -> None:
    settings = settle(ROUTE)
    route = settings.routes["assistant"]
    with pytest.raises(ValidationError, match="frozen"):
        settings.state = "sqlite:///b.db"
    for change in (
        lambda: settings.routes.update(other=route),
        lambda: route.arms.pop("champion"),
        lambda: route.arms["champion"].params.__setitem__("temperature", 2),
        lambda: route.reward.signals.clear(),
    ):
        with pytest.raises(TypeError, match="immutable"):
            change()
    assert isinstance(route.upstreams, tuple)


def test_settings_travel_to_a_worker(settle: Any) -> None:
    settings = settle(SAMPLE)
    assert pickle.loads(pickle.dumps(settings)) == settings == copy.deepcopy(settings)


def test_split_shares_may_miss_one_by_rounding(settle: Any) -> None:
    thirds = "{champion: 0.3333333, concise: 0.6666666}"
    policy = settle(f"{ROUTE}    policy: {{kind: split, shares: {thirds}}}\n").routes["assistant"].policy
    assert isinstance(policy, Split)
    assert policy.shares["concise"] == 0.6666666
