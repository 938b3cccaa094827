"""The house rules that can be read from the source: who imports whom, and that a wheel is enough."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {
    "telemetry": set(),
    "router": {"telemetry"},
    "gateway": {"router", "telemetry"},
    "learner": {"router", "telemetry"},
    "understudy": {"learner", "gateway", "router", "telemetry"},
}
OURS = {*BELOW, "tests", "bench"}
ONLY_IN = {
    "opentelemetry": ["telemetry/otel.py", "telemetry/otlp.py"],
    "torch": ["learner/train.py", "learner/lora.py", "understudy/demo/*"],
    "trl": ["learner/train.py", "understudy/demo/*"],
    "peft": ["learner/train.py", "learner/lora.py", "understudy/demo/*"],
    "litellm": ["gateway/providers.py", "learner/judge.py"],
    "sklearn": ["router/calibrate.py", "router/segments.py", "learner/reward_model.py"],
    "scipy": [],
}
HEAVY = ["litellm", "torch", "transformers", "trl", "peft", "vllm", "sklearn", "scipy"]
WRITTEN = {".py", ".js", ".css", ".html", ".lua", ".sql"}


def files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*") if path.suffix in WRITTEN)


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in BELOW:
        for path in files(package):
            if path.suffix == ".py":
                yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """The modules a file imports, wherever in it, by their full names."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, level=0) if module:
                yield module
            case ast.ImportFrom(module=module, level=level, names=aliases):
                folder = name.split("/")[:-level]
                yield from (".".join(filter(None, [*folder, module, alias.name])) for alias in aliases)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def top(module: str) -> str:
    return module.partition(".")[0]


def dotted(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def run(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-W", "default", "-c", code, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_imports_between_our_packages_only_point_down() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, tree in sources()
        for module in imported(name, tree)
        if top(module) in OURS - BELOW[name.split("/")[0]] - {name.split("/")[0]}
    ]
    assert wrong == []


def test_a_heavy_library_is_imported_only_in_the_file_that_needs_it() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, tree in sources()
        for module in imported(name, tree)
        if not any(fnmatch(name, allowed) for allowed in ONLY_IN.get(top(module), ["*"]))
    ]
    assert wrong == []


def test_the_gateway_has_neither_httpx_nor_base_http_middleware() -> None:
    wrong = []
    for name, tree in sources():
        if name.startswith("gateway/"):
            wrong += [f"{name} imports {module}" for module in imported(name, tree) if top(module) == "httpx"]
            wrong += [
                f"{name}:{getattr(node, 'lineno', '?')} names BaseHTTPMiddleware"
                for node in ast.walk(tree)
                if "BaseHTTPMiddleware" in (getattr(node, field, None) for field in ("id", "attr", "name"))
            ]
    assert wrong == []


def test_no_file_is_longer_than_500_lines() -> None:
    paths = [path for package in BELOW for path in files(package)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("router/store.py", "from . import arms", ["router.arms"]),
        ("understudy/demo/a.py", "from ..cli import main", ["understudy.cli.main"]),
        ("router/__init__.py", "def f():\n    import gateway.app as g", ["gateway.app"]),
        ("router/store.py", "from importlib import *\nimport_module('torch.nn')", ["importlib", "torch.nn"]),
    ],
)
def test_the_reader_of_imports_sees(name: str, source: str, expected: list[str]) -> None:
    assert list(imported(name, ast.parse(source))) == expected


IMPORT_QUIETLY = """
import importlib, sys, threading
sys.dont_write_bytecode = True
*modules, heavy = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
    loaded = sorted(set(heavy.split()) & set(sys.modules))
    if loaded:
        sys.exit(f"import {module} loads {', '.join(loaded)}")
    if threading.active_count() > 1:
        sys.exit(f"import {module} starts a thread")
"""


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    modules = {dotted(name) for name, _ in sources() if not name.startswith(("learner/", "understudy/"))}
    modules -= {"gateway.providers"}
    done = run(IMPORT_QUIETLY, *sorted(modules), "understudy.cli", " ".join(HEAVY), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, unpacked; built with the environment's hatchling, else with pip's own."""
    folder = tmp_path_factory.mktemp("wheel")
    try:
        import hatchling as hatchling

        isolation = ["--no-build-isolation"]
    except ModuleNotFoundError:
        isolation = []
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", *isolation]
    done = subprocess.run(
        [*build, "--wheel-dir", str(folder), str(ROOT)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("understudy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_file_of_the_packages(unpacked: Path) -> None:
    ours = {path.relative_to(ROOT).as_posix() for package in BELOW for path in files(package)}
    assert ours - {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")} == set()
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == set(BELOW)


IMPORT_FROM_WHEEL = """
import importlib, pathlib, sys
sys.dont_write_bytecode = True
wheel, checkout, *modules = sys.argv[1:]
sys.path[:] = [wheel, *(entry for entry in sys.path if entry != checkout)]
for module in modules:
    found = importlib.import_module(module).__file__
    if not pathlib.Path(found).is_relative_to(wheel):
        sys.exit(f"{module} came from {found}")
"""


def test_the_packages_import_from_the_wheel_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    optional = {*HEAVY, "tokenizers", "safetensors", "sklearn"}
    modules = [
        dotted(name) for name, tree in sources() if not optional & {top(module) for module in imported(name, tree)}
    ]
    modules = [module for module in modules if not module.startswith("understudy.demo")]
    assert set(BELOW) <= set(modules)
    done = run(IMPORT_FROM_WHEEL, str(unpacked), str(ROOT), *modules, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
