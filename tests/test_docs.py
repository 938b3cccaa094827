"""What the documentation says is true: its commands parse, its config loads, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from understudy import cli, settings
from understudy.config_text import key_paths

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            line.strip() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.split("\n")
        ]
        lines += re.findall(r"`([^`\n]+)`", text)
        found += [line.split("#")[0].strip() for line in lines if line.startswith("understudy ")]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_documentation_parses(command: str) -> None:
    words = shlex.split(command)[1:]
    if command.endswith("…") or "|" in command:
        pytest.skip("an abbreviation")
    cli.parser().parse_args(words)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_every_config_in_the_documentation_loads(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        assert settings.check(path, {"VLLM_KEY": "k"}) == []


def test_the_starter_config_loads(tmp_path: Path) -> None:
    path = tmp_path / "understudy.yaml"
    path.write_text(settings.STARTER)
    assert settings.check(path) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_config_key_says_what_it_means() -> None:
    assert key_paths(settings.schema())
    for definition in settings.schema()["$defs"].values():
        for name, field in definition.get("properties", {}).items():
            said = field.get("description") or "$ref" in field  # a part: its own keys say it
            assert said, f"{definition['title']}.{name}"


def test_help_of_every_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [],
        ["serve"],
        ["status"],
        ["arms"],
        ["doctor"],
        ["config"],
        ["keys", "create"],
        ["replay"],
        ["demo"],
    ):
        with pytest.raises(SystemExit) as left:
            cli.main([*words, "--help"])
        assert left.value.code == 0
        assert "usage: understudy" in capsys.readouterr().out
