"""`NotebookFolder`: where the files of a notebook lie, and who owns them.

One folder holds one notebook::

    lab/
    ├── ledger.sqlite        every fact (this package)
    ├── recall/              the semantic index, rebuilt from the ledger at any time
    ├── checkpoints.sqlite   the agents' graphs
    ├── logs/                one JSON file per society
    ├── report/              what a society wrote at its end
    └── owner.lock           held by the process that runs a society here
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from society.errors import NotANotebook, NotebookDamaged, NotebookInUse


class FileLock:
    """An exclusive lock on a file that names its holder; the kernel frees it when that one dies."""

    def __init__(self, path: Path) -> None:
        """Name the lock file; nothing is opened yet."""
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting.

        Returns:
            Whether it is held now. False: another process (or handle) holds it.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def holder(self) -> int | None:
        """Process id of the holder, as it wrote it; None when nothing is written."""
        try:
            written = self.path.read_text().strip()
        except FileNotFoundError:
            return None
        return int(written) if written.isdigit() else None


class NotebookFolder:
    """The paths of one notebook. Creating the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        """Name the folder; nothing is touched yet."""
        self.path = Path(path)

    def __repr__(self) -> str:
        """The path, for messages."""
        return f"NotebookFolder({str(self.path)!r})"

    @property
    def ledger(self) -> Path:
        """The SQLite file with every fact."""
        return self.path / "ledger.sqlite"

    @property
    def recall(self) -> Path:
        """The folder of the semantic index."""
        return self.path / "recall"

    @property
    def recall_lock(self) -> Path:
        """Held by the process that has the semantic index open."""
        return self.path / "recall.lock"

    @property
    def checkpoints(self) -> Path:
        """The SQLite file of the agents' graphs."""
        return self.path / "checkpoints.sqlite"

    @property
    def logs(self) -> Path:
        """The folder of JSON logs."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The folder of reports."""
        return self.path / "report"

    @property
    def owner_lock(self) -> Path:
        """Held by the process that runs a society here."""
        return self.path / "owner.lock"

    def exists(self) -> bool:
        """Whether a ledger lies here."""
        return self.ledger.is_file()

    def create(self) -> NotebookFolder:
        """Make the folder and its subfolders, and check that it can be written.

        Raises:
            NotebookDamaged: it cannot be made or written (permissions, full disk).
        """
        try:
            for folder in (self.path, self.logs, self.report):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return self

    def require(self) -> NotebookFolder:
        """Return this folder if it holds a notebook.

        Raises:
            NotANotebook: there is no ledger in it.
        """
        if not self.exists():
            found = "an empty or foreign folder" if self.path.is_dir() else "nothing"
            raise NotANotebook(
                f"No notebook at {self.path}: found {found}, expected a file "
                f"{self.ledger.name}. Start one with `society run --lab {self.path}`, or name "
                "the folder of an existing one."
            )
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the notebook for the duration of a `with` block.

        Raises:
            NotebookInUse: another process owns it; the message names its process id.
            NotebookDamaged: the lock file cannot be written.
        """
        self.create()
        lock = FileLock(self.owner_lock)
        try:
            held = lock.acquire()
        except OSError as error:
            raise _unwritable(self.owner_lock, error) from error
        if not held:
            raise NotebookInUse(
                f"The notebook {self.path} is in use by process {lock.holder() or 'unknown'}. "
                "Wait for it, stop it, or choose another folder with --lab."
            )
        try:
            yield
        finally:
            lock.release()


def _unwritable(path: Path, error: OSError) -> NotebookDamaged:
    reason = error.strerror or str(error)
    return NotebookDamaged(
        f"Cannot write the notebook at {path}: {reason}. Check its permissions and the free disk "
        "space, or choose another folder with --lab."
    )
