"""Files and folders that are either whole or absent."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUILDING = ".building-"
"""Prefix of a folder that is not finished; a process that was killed leaves it behind."""
CHUNK = 1 << 20


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that readers see complete or not at all; the last writer wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        with suppress(PermissionError):  # a confined run changes no modes; its files stay its own
            Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file; it is free again when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `target` at the end; removed if anything goes wrong.

    Call it under a lock: folders that killed processes left beside the target are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{BUILDING}{target.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{BUILDING}{target.name}-"))
    try:
        folder.chmod(0o755)
        yield folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
