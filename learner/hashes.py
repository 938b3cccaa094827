"""Names that follow from content: of an adapter's folder, of a base model, of its tokenizer and template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATE_FILE = "chat_template.jinja"
WEIGHTS = ("*.safetensors", "*.bin", "config.json")
_AT_ONCE = 1 << 20


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hex."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_AT_ONCE):
            hashed.update(piece)
    return hashed.hexdigest()


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below `folder`."""
    return _of(folder, sorted(path for path in folder.rglob("*") if path.is_file()))


def located(base: str) -> Path:
    """The folder of a base model: itself, or where the hub's client keeps it (downloaded if need be).

    Raises FileNotFoundError where it is neither a folder nor to be had from the hub.
    """
    if Path(base).is_dir():
        return Path(base)
    if base.startswith((".", "/", "~")):
        raise FileNotFoundError(f"base {base} is no folder here; name a model's folder, or its name on the hub")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(base))
    except Exception as error:  # the hub's client has many, of several libraries
        raise FileNotFoundError(f"base {base} is no folder here, and the hub does not give it: {error}") from error


def base_hash(folder: Path) -> str:
    """SHA-256 over a base model's weights and config. Raises FileNotFoundError where there are none."""
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not any(path.suffix != ".json" for path in files):
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors or *.bin); is it a model's folder?")
    return _of(folder, files)


def tokenizer_hash(folder: Path) -> str:
    return _of(folder, [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()])


def template_hash(folder: Path) -> str:
    """Of the chat template's own file; of the tokenizer's config where that holds it."""
    for name in (TEMPLATE_FILE, "tokenizer_config.json"):
        if (folder / name).is_file():
            return file_hash(folder / name)
    return ""


def _of(folder: Path, files: Iterable[Path]) -> str:
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(f"{path.relative_to(folder).as_posix()}\0{file_hash(path)}\n".encode())
    return hashed.hexdigest()
