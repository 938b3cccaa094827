"""Checkpoints of a run on disk: each is there whole or not at all, and a damaged one is not taken for one.

Files are written into a folder beside, with their SHA-256 in `sums.json`, brought to disk, and the folder is renamed.
After that a checkpoint is never written to. So a process may be killed at any moment, and a disk may lose what it
likes: the newest checkpoint that still is what was written counts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import msgspec

from learner.spec import TrainingInterrupted

_SUMS = "sums.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints:
    """The checkpoints of one run under a folder of their own, by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have one, damaged or not, the newest first."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted((int(name) for name in found if name.isdecimal()), reverse=True)

    def write(self, step: int, files: Mapping[str, bytes], keep: Collection[int]) -> None:
        """Leave the files as the checkpoint of `step`; then drop all but it and those to `keep`.

        Raises TrainingFailed where the disk is full; the others are as they were then.
        """
        put(self.path(step), {**files, _SUMS: msgspec.json.encode(_sums(files), order="deterministic")})
        for other in self.steps():
            if other != step and other not in keep:
                shutil.rmtree(self.path(other), ignore_errors=True)

    def read(self, step: int) -> dict[str, bytes] | None:
        """The files of a checkpoint, or None if it is not what was written."""
        try:
            sums = msgspec.json.decode((self.path(step) / _SUMS).read_bytes(), type=dict[str, str])
            files = {name: (self.path(step) / name).read_bytes() for name in sums}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return files if _sums(files) == sums else None

    def newest(self, needs: Callable[[Mapping[str, bytes]], int]) -> tuple[int, dict[str, bytes]] | None:
        """The newest whole checkpoint, of which that of the step which it `needs` is whole too; damaged ones go."""
        for torn in self.folder.glob(".step-*"):
            shutil.rmtree(torn, ignore_errors=True)
        for step in self.steps():
            files = self.read(step)
            if files is not None and (needs(files) == step or self.read(needs(files)) is not None):
                return step, files
            shutil.rmtree(self.path(step), ignore_errors=True)
        return None


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` with these files, by name below it, in one rename. Raises TrainingFailed where the disk is full."""
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for name, body in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            with (beside / name).open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
        for made in {(beside / name).parent for name in files}:
            _to_disk(made)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        _to_disk(folder.parent)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        if error.errno not in _FULL:
            raise
        size = sum(map(len, files.values())) / 1e6
        raise TrainingInterrupted(
            f"{folder} cannot be written ({error.strerror}): make room for {size:.1f} MB and run the same spec again; "
            "it goes on from its last checkpoint"
        ) from None


def _sums(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}


def _to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
