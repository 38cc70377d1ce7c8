"""Rules for every test: no network but loopback, repeatable examples, a cache of its own."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import pytest_socket
from chroma import chroma_server
from postgres import postgres_server, postgres_url

__all__ = ["chroma_server", "postgres_server", "postgres_url"]

LOOPBACK = ["127.0.0.1", "::1"]
_CACHE = pytest.StashKey[str]()

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Prepared data goes to a folder of this session, unless one is given.

    Programs hold back what they print, as they do where nobody has told Python otherwise.
    """
    os.environ.pop("PYTHONUNBUFFERED", None)
    if "SOCIETY_CACHE" not in os.environ:
        config.stash[_CACHE] = tempfile.mkdtemp(prefix="society-test-cache-")
        os.environ["SOCIETY_CACHE"] = config.stash[_CACHE]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove that folder."""
    made = config.stash.get(_CACHE, None)
    if made is not None:
        os.environ.pop("SOCIETY_CACHE", None)
        shutil.rmtree(made, ignore_errors=True)


def pytest_runtest_setup() -> None:
    """Connections leave this machine from no test; unix sockets and socket pairs work."""
    pytest_socket.socket_allow_hosts(LOOPBACK, allow_unix_socket=True)


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str


def society(*arguments: object, cwd: Path | None = None, **environment: str) -> Finished:
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "society", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session", name="society")
def _society():
    """The command as a function of its arguments; runs in a process of its own."""
    return society


@pytest.fixture(scope="session")
def small_lab(tmp_path_factory):
    """The notebook of a finished synthetic society. Read only: copy it to change it."""
    lab = tmp_path_factory.mktemp("small") / "lab"
    done = society(
        "run", "--task", "synthetic", "--runs", 40, "--agents", 4, "--seed", 3, "--slots", 2,
        "--lab", lab,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    (lab / "stdout.txt").write_text(done.out)
    return lab


@pytest.fixture(scope="session", name="unpack")
def _unpack():
    """Lay a stored ledger of a schema version into a folder: (version, folder) -> folder."""

    def unpack(version, folder):
        folder.mkdir(parents=True)
        packed = Path(__file__).parent / "data" / f"ledger-v{version}.sqlite.xz"
        (folder / "ledger.sqlite").write_bytes(lzma.decompress(packed.read_bytes()))
        return folder

    return unpack


@pytest.fixture(scope="session", name="plain_best_fit")
def _plain_best_fit():
    """Best-fit packing as a function of documents, groups, rows and capacity."""
    return plain_best_fit


def plain_best_fit(documents, groups, rows, capacity, buffer_size=1000, read=128):
    """Best fit with a list and two scans, as one would write it down: (rows, capacity)."""

    def reader():
        while True:
            at = 0
            for size in groups:
                group = documents[at : at + size]
                at += size
                for start in range(0, size, read):
                    yield group[start : start + read]

    batches, waiting, found = reader(), [], []
    for _ in range(rows):
        row = []
        while len(row) < capacity:
            while len(waiting) < buffer_size:
                waiting.extend(next(batches))
            room = capacity - len(row)
            fitting = [i for i, document in enumerate(waiting) if len(document) <= room]
            if fitting:
                best = max(fitting, key=lambda i: len(waiting[i]))  # the first of the longest
                row.extend(waiting.pop(best))
            else:
                shortest = min(range(len(waiting)), key=lambda i: len(waiting[i]))
                row.extend(waiting.pop(shortest)[:room])
        found.append(row)
    return np.asarray(found)
