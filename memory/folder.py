"""`NotebookFolder`: where the files of a notebook lie, and who owns them.

One folder holds one notebook::

    lab/
    ├── ledger.sqlite        every fact (this package)
    ├── recall/              the semantic index, rebuilt from the ledger at any time
    ├── checkpoints.sqlite   the agents' graphs
    ├── logs/                one JSON file per society
    ├── transcripts/         what language models were asked and answered, a file per society
    ├── answers.sqlite       their answers by question, so that none is paid twice after a crash
    ├── report/              what a society wrote at its end
    └── owner.lock           held by the process that runs a society here

Several folders, also of several machines, may share one ledger: then `shared.json` stands in for
`ledger.sqlite`. It remembers the ledger's address, that of a Chroma server if there is one, and
the folder's own identity, by which it tells its societies from those of the others.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from society.errors import NotANotebook, NotebookDamaged, NotebookInUse, UsageError
from society.records import SocietyState

if TYPE_CHECKING:
    from society.memory.ledger import Ledger
    from society.records import SocietyRecord

ADDRESSES = "postgresql://USER@HOST/DATABASE, or sqlite:////ABSOLUTE/PATH.sqlite on one machine"


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


@dataclass(frozen=True, slots=True)
class Shared:
    """What a folder remembers of the memory it shares with others: the file `shared.json`."""

    ledger: str | None = None
    """Address of the ledger, without a password; None for the folder's own file."""
    recall: str | None = None
    """Address of a Chroma server; None for the folder's own index."""
    home: str = ""
    """Identity of this folder among those that share the ledger; empty where none does."""


class NotebookFolder:
    """The paths of one notebook. Creating the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        """Name the folder; nothing is touched yet."""
        self.path = Path(path)

    def __repr__(self) -> str:
        """The path, for messages."""
        return f"NotebookFolder({str(self.path)!r})"

    @property
    def ledger(self) -> Path | str:
        """What `Ledger.open` opens: the folder's SQLite file, or the address of a shared ledger.

        Raises:
            NotebookDamaged: `shared.json` cannot be read.
        """
        return self.shared.ledger or self.own_ledger

    @property
    def own_ledger(self) -> Path:
        """The SQLite file with every fact, where the ledger is not shared."""
        return self.path / "ledger.sqlite"

    @property
    def shared_file(self) -> Path:
        """Where the addresses of a shared memory are remembered."""
        return self.path / "shared.json"

    @property
    def shared(self) -> Shared:
        """What the folder shares with others; empty fields where nothing is shared.

        Raises:
            NotebookDamaged: `shared.json` cannot be read.
        """
        try:
            return Shared(**json.loads(self.shared_file.read_text("utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return Shared()
        except (OSError, ValueError, TypeError) as error:
            raise NotebookDamaged(
                f"{self.shared_file} cannot be read: {error}. It holds `ledger`, `recall` and "
                "`home`; restore it from a backup, or join the ledger with a new folder."
            ) from error

    @property
    def home(self) -> str:
        """Which societies of the ledger are this folder's: those with this `home`."""
        return self.shared.home

    @property
    def recall_address(self) -> Path | str:
        """Where the semantic index is: the folder `recall`, or the address of a Chroma server."""
        return self.shared.recall or self.recall

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
    def transcripts(self) -> Path:
        """The folder of transcripts of language models; made when the first one is asked."""
        return self.path / "transcripts"

    @property
    def answers(self) -> Path:
        """The SQLite file of language models' answers; it may be deleted at any time."""
        return self.path / "answers.sqlite"

    @property
    def report(self) -> Path:
        """The folder of reports."""
        return self.path / "report"

    @property
    def owner_lock(self) -> Path:
        """Held by the process that runs a society here."""
        return self.path / "owner.lock"

    def exists(self) -> bool:
        """Whether a ledger lies here, or the address of a shared one."""
        return self.shared.ledger is not None or self.own_ledger.is_file()

    def share(
        self, ledger: str | None = None, recall: str | None = None, secret_seed: int | None = None
    ) -> NotebookFolder:
        """Use a shared ledger, a Chroma server or both, from now on; remembered in the folder.

        Nothing is remembered of a ledger that cannot be opened.

        Args:
            ledger: Address of the ledger; one that does not exist yet is created. None to keep
                what is used now.
            recall: Address of the Chroma server; None to keep what is used now.
            secret_seed: Where the seeds of a *new* ledger come from, as for `Ledger.open`.

        Raises:
            UsageError: the address is none, holds a password, or the folder has facts elsewhere.
            NotANotebook: what is at the address is no ledger, or one of another version.
            NotebookDamaged: the ledger cannot be reached, or the folder cannot be written.
        """
        from society.memory.ledger import Ledger

        now = self.shared
        new = replace(now, recall=now.recall if recall is None else recall)
        address = None if ledger is None else ledger_address(ledger)
        if address is not None and address != ledger_address(f"sqlite:///{self.own_ledger}"):
            self._check_free(now, address)
            Ledger.open(address, secret_seed).close()
            new = replace(new, ledger=address, home=now.home or secrets.token_hex(6))
        if new != now:
            self.create()
            self._remember(new)
        return self

    def _check_free(self, now: Shared, address: str) -> None:
        """Refuse to leave facts behind."""
        if now.ledger is None and self.own_ledger.is_file():
            raise UsageError(
                f"{self.path} has a ledger of its own, so it cannot use {address} as well. Take "
                f"another folder with --lab; what is in this one can be brought along by `society "
                f"memory export --out old.jsonl.gz --lab {self.path}`, then `society memory import "
                "old.jsonl.gz --lab NEW` into an empty shared ledger."
            )
        if now.ledger not in (None, address):
            raise UsageError(
                f"{self.path} belongs to the ledger {now.ledger}; take another folder for "
                f"{address}. Contents move by `society memory export` and `society memory import`."
            )

    def _remember(self, shared: Shared) -> None:
        draft = self.shared_file.with_suffix(f".{os.getpid()}")
        try:
            draft.write_text(json.dumps(asdict(shared), indent=2) + "\n", "utf-8")
            os.replace(draft, self.shared_file)
        except OSError as error:
            raise _unwritable(self.shared_file, error) from error

    def own(self, records: Iterable[SocietyRecord]) -> list[SocietyRecord]:
        """Those records of the ledger that were started in this folder, in the same order."""
        home = self.home
        return [record for record in records if record.home == home]

    def end_sessions(self, ledger: Ledger) -> None:
        """Record that nothing of this folder is at work; for the process that owns the folder.

        Its old leases are ended. Those of other folders on the same ledger are left alone: their
        societies may be alive, and the leases of those that are not end when they expire.
        """
        for record in self.own(ledger.societies()):
            if record.state is SocietyState.RUNNING:
                ledger.set_society_state(record.id, SocietyState.STOPPED)
            ledger.release_all(record.id)

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
                f"{self.own_ledger.name} or {self.shared_file.name}. Start one with `society run "
                f"--lab {self.path}`, or name the folder of an existing one."
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


def ledger_address(text: str) -> str:
    """The address of a shared ledger as it is remembered; a relative file is made absolute.

    Raises:
        UsageError: it is none, or it holds a password.
    """
    address = urlsplit(text)
    if address.password or "password=" in address.query:
        raise UsageError(
            "--ledger: leave the password out of the address, because the address is written to "
            "files and messages; put it in the variable PGPASSWORD or in the file ~/.pgpass."
        )
    if address.scheme == "sqlite" and not address.netloc and address.path.strip("/"):
        return f"sqlite:///{os.path.abspath(address.path.removeprefix('/'))}"
    if address.scheme != "postgresql" or not (address.hostname or "host=" in address.query):
        raise UsageError(f"--ledger {text}: expected {ADDRESSES}.")
    return text


def _unwritable(path: Path, error: OSError) -> NotebookDamaged:
    reason = error.strerror or str(error)
    return NotebookDamaged(
        f"Cannot write the notebook at {path}: {reason}. Check its permissions and the free disk "
        "space, or choose another folder with --lab."
    )
