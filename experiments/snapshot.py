"""The files of somebody's repository, as they were when the society started.

They are read once and kept in memory, so that all runs of a society are made with the same ones
while their owner goes on editing. What is large is no file to copy: it is read where it lies.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from society.errors import UsageError

MAX_FILES = 5_000
MAX_BYTES = 128 << 20
"""All files that a run gets a copy of."""
WHOLE_BYTES = 64 << 20
"""A larger file that is read in place is known by its size, its beginning and its end."""
END_BYTES = 1 << 20
MAX_SEEN = 100_000
"""Files below the folders that are read in place."""
NOTEBOOK = ("owner.lock", "ledger.sqlite")
"""What marks a folder as a notebook of the society; it is never copied."""


class Unsafe(Exception):
    """A path that does not lead to a plain file below its folder."""


@dataclass(frozen=True, slots=True)
class Held:
    """One file."""

    data: bytes
    mode: int
    """Permission bits."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Some files of a folder."""

    files: Mapping[str, Held]
    """Path relative to the folder, with `/` -> the file; sorted."""

    @classmethod
    def take(cls, folder: Path, names: Iterable[str], where: str) -> Snapshot:
        """Read these files. Raises `UsageError` if they are too many or too large to copy."""
        wanted = sorted(set(names))
        if len(wanted) > MAX_FILES:
            raise UsageError(
                f"{where}: files: {len(wanted)} files are too many to copy for every run "
                f"(at most {MAX_FILES}); list those that are needed, and data under `read`."
            )
        sizes = {name: (folder / name).stat().st_size for name in wanted}
        if sum(sizes.values()) > MAX_BYTES:
            largest = max(sizes, key=lambda name: sizes[name])
            raise UsageError(
                f"{where}: files: {sum(sizes.values()) >> 20} MiB are too much to copy for every "
                f"run (at most {MAX_BYTES >> 20}); put data under `read`. Largest: {largest}."
            )
        return cls({name: _hold(folder / name) for name in wanted})

    def texts(self, names: Iterable[str], where: str) -> dict[str, str]:
        """These files as text. Raises `UsageError` for one that is none."""
        found = {}
        for name in names:
            try:
                found[name] = self.files[name].data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{where}: editable: {name} is not a text in UTF-8.") from error
        return found

    def write(self, into: Path, instead: Mapping[str, str]) -> None:
        """Write all of them below a folder; those named in `instead` with another text."""
        for name, held in self.files.items():
            data = instead[name].encode() if name in instead else held.data
            place = into / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            place.chmod(held.mode | stat.S_IRUSR | stat.S_IWUSR)

    def changed(self, folder: Path, leave_out: Collection[str]) -> list[str]:
        """Names of the files that are no longer the same below a folder that was written."""
        odd = []
        for name, held in self.files.items():
            if name in leave_out:
                continue
            try:
                same = read_inside(folder, name, len(held.data) + 1) == held.data
            except (OSError, Unsafe):
                same = False
            if not same:
                odd.append(name)
        return odd

    def add_to(self, digest: hashlib._Hash) -> None:
        """Count names and contents."""
        for name, held in self.files.items():
            digest.update(f"{name}\0{hashlib.sha256(held.data).hexdigest()}\n".encode())


def _hold(path: Path) -> Held:
    return Held(path.read_bytes(), stat.S_IMODE(path.stat().st_mode) & 0o777)


def read_inside(folder: Path, name: str, most: int) -> bytes:
    """The first `most` bytes of a file that a stranger may have put there.

    Raises:
        Unsafe: it is no plain file below the folder: a link, a pipe, a device.
        OSError: it cannot be read.
    """
    place = folder / name
    root = folder.resolve()
    if place.parent.resolve() != root.joinpath(*PurePosixPath(name).parent.parts):
        raise Unsafe(f"{name} leads through a link")
    handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unsafe(f"{name} is no plain file")
    with os.fdopen(handle, "rb") as file:
        return file.read(most)


def relative(name: str) -> str | None:
    """A path below a folder in plain form; None for one that leads out of it or names it."""
    path = PurePosixPath(name)
    if path.is_absolute() or "\0" in name or not path.parts or ".." in path.parts:
        return None
    return str(path)


def below(name: str, folders: Iterable[str]) -> bool:
    """Whether a relative path is one of these, or lies in one of them."""
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


def tracked(folder: Path) -> list[str]:
    """What git tracks below a folder; where it tracks nothing, all that is not hidden."""
    asked = ["git", "-C", str(folder), "ls-files", "-z", "--cached"]
    try:
        done = subprocess.run(asked, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return walk(folder, ".")
    names = [name for name in done.stdout.decode(errors="surrogateescape").split("\0") if name]
    return [name for name in names if _is_ours(folder, name)] or walk(folder, ".")


def walk(folder: Path, name: str) -> list[str]:
    """A file, or all files in a folder that are not hidden; links out of the folder are left."""
    start = folder / name
    if not start.is_dir():
        return [name]
    found = []
    for place, folders, files in os.walk(start):
        folders[:] = sorted(one for one in folders if _is_shown(one))
        if any((Path(place) / mark).exists() for mark in NOTEBOOK):
            folders.clear()
            continue
        for file in files:
            path = (Path(place) / file).relative_to(folder).as_posix()
            if _is_shown(file) and _is_ours(folder, path):
                found.append(path)
    return found


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def _is_ours(folder: Path, name: str) -> bool:
    """Whether it is a plain file whose content lies below the folder."""
    try:
        place = (folder / name).resolve(strict=True)
    except OSError:
        return False
    return place.is_file() and place.is_relative_to(folder.resolve())


def add_in_place(digest: hashlib._Hash, label: str, start: Path) -> None:
    """Count what is read where it lies: names, sizes, contents (of a large file: its two ends)."""
    for count, path in enumerate(_files_below(start)):
        if count >= MAX_SEEN:
            digest.update(b"and more\n")
            return
        name = path.relative_to(start).as_posix()
        digest.update(f"{label}\0{name}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        digest.update(_fingerprint(path).encode())


def _files_below(start: Path) -> Iterator[Path]:
    if start.is_file():
        yield start
        return
    for place, folders, files in os.walk(start):
        folders.sort()
        for file in sorted(files):
            path = Path(place) / file
            if path.is_file():
                yield path


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        begin = file.read(END_BYTES)
        file.seek(-END_BYTES, os.SEEK_END)
        return hashlib.sha256(begin + file.read()).hexdigest()
