"""SQLite behind the ledger: one file, one machine, any number of processes.

Durability: WAL. A transaction that has returned survives `kill -9` of the process; one that has not
returned is undone as a whole. One with facts has reached the disk when it returns, and survives a
power cut as well. Leases and heartbeats (`durable=False`) wait for no disk: a power cut ends their
holders too.

Speed: SQLite lets a second writer sleep and try again, up to 100 ms at a time and in no order. So
writers stand in a queue first: a lock on the ledger's folder, which the kernel hands to the one who
has waited longest, and takes from one who dies. And nobody waits for the disk while others wait for
them: the log is synced, and at times copied into the file, after the lock was given back. What is
later in the log is lost before what comes earlier, so nothing can rest on a write that is lost.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from society.errors import NotebookDamaged, NotebookInUse, SocietyError
from society.memory.rules import ACTIONS, RULES, Action, Rule

BUSY_S = 30.0
"""How long a writer waits for another one."""
LOG_BYTES = 4 << 20
"""How long the log may become before it is copied into the file."""

WORDS = {
    "is": "IS",
    "clock": "((julianday('now') - 2440587.5) * 86400.0)",
    "wall_s": "coalesce(json_extract(NEW.cost, '$.wall_s'), 0)",
    "flops": "coalesce(json_extract(NEW.cost, '$.flops'), 0)",
}
"""What the placeholders in the rules mean here."""


class Sqlite:
    """A ledger in one file."""

    shared = False

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Prepare connections to a file; nothing is opened yet."""
        self.path = path
        self.address = str(path)
        self.read_only = read_only
        self.engine = _engine(path, read_only=read_only)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Be the one writer.

        Raises:
            NotebookInUse: another process wrote for `BUSY_S`.
        """
        try:
            handle = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # opening the file will say what is wrong
            yield
            return
        queue = _Queue(handle)
        try:
            held = queue.enter(BUSY_S)
        except OSError:  # no such locks on this file system: SQLite's own have to do
            os.close(handle)
            yield
            return
        if not held:
            raise self._locked()
        try:
            yield
        finally:
            queue.leave()

    def settle(self, *, durable: bool) -> None:
        """After a transaction: wait until the disk has it, and keep the log short.

        Raises:
            NotebookDamaged: the disk does not take it.
        """
        log = Path(f"{self.path}-wal")
        try:
            handle = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # all of it was copied into the file, and synced
            return
        try:
            if durable:
                os.fsync(handle)
            size = os.fstat(handle).st_size
        except OSError as error:
            raise self.damaged(error.strerror or str(error)) from error
        finally:
            os.close(handle)
        if size > LOG_BYTES:
            self._shorten_log()

    def _shorten_log(self) -> None:
        """Copy the log into the file while others write, then the rest of it while nobody does."""
        with self.engine.connect() as connection:
            session: Any = connection.connection.dbapi_connection
            busy, _, _ = session.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if not busy:
                with self.turn():
                    session.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def tables(self, connection: Connection) -> frozenset[str]:
        """Names of all tables."""
        found = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
        return frozenset(found.scalars())

    def create_rules(self, connection: Connection) -> None:
        """Create all triggers."""
        for statement in statements():
            connection.exec_driver_sql(statement)

    def drop_rules(self, connection: Connection) -> None:
        """Drop all triggers."""
        query = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        for name in connection.exec_driver_sql(query).scalars().all():
            connection.exec_driver_sql(f'DROP TRIGGER "{name}"')

    def problem(self, connection: Connection) -> str | None:
        """What is broken in the file, if anything."""
        found = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
        return None if found == "ok" else found

    def reason(self, error: BaseException) -> str:
        """What the database said."""
        return str(getattr(error, "orig", None) or error)

    def trouble(self, error: BaseException) -> SocietyError:
        """The error for a file that cannot be used, saying what to do."""
        reason = self.reason(error)
        return self._locked() if "locked" in reason else self.damaged(reason)

    def damaged(self, reason: str) -> NotebookDamaged:
        """The error for a file that answers with `reason`."""
        if "full" in reason:
            advice = "Free some disk space, then go on with --resume; nothing recorded is lost."
        elif "unable to open" in reason or "readonly" in reason:
            advice = "Check that the folder exists and may be written."
        else:
            advice = "Restore the file from a backup, or start a new folder with --lab."
        return NotebookDamaged(f"The ledger {self.path} cannot be used: {reason}. {advice}")

    def _locked(self) -> NotebookInUse:
        return NotebookInUse(
            f"The ledger {self.path} has been locked by another process for {BUSY_S:.0f} s. "
            "Stop that process, or try again."
        )


class _Queue:
    """A place in the kernel's queue for a lock on an open file."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._guard = threading.Lock()
        self._reached = threading.Event()
        self._gone = False

    def enter(self, seconds: float) -> bool:
        """Wait for one's turn; False when it did not come in time. A thread does the waiting.

        A lock cannot be waited for with a time limit: a thread whose turn comes too late gives it
        back at once.
        """
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            threading.Thread(target=self._wait, daemon=True).start()
        else:
            return True
        if self._reached.wait(seconds):
            return True
        with self._guard:
            self._gone = not self._reached.is_set()
            return not self._gone

    def _wait(self) -> None:
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        with self._guard:
            if self._gone:
                self.leave()
            self._reached.set()

    def leave(self) -> None:
        """Give the turn to the next one, also when a forked process has the file open too."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)


def _engine(path: Path, *, read_only: bool) -> Engine:
    def connect() -> sqlite3.Connection:
        mode = "ro" if read_only else "rwc"
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # `settle` does the rest
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("PRAGMA journal_size_limit = 0")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA recursive_triggers = ON")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    writes = "society_durable" in connection.get_execution_options()
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# --- rules as triggers ---------------------------------------------------------------------------


def statements() -> list[str]:
    """All triggers, in the order to create them.

    SQLite runs the youngest trigger first, so that the rule listed first speaks first.
    """
    made = [_refusing(rule.spoken(WORDS)) for rule in RULES]
    made += [_acting(action.spoken(WORDS)) for action in ACTIONS]
    return made[::-1]


def _refusing(rule: Rule) -> str:
    quoted = rule.message.replace("'", "''")
    return (
        f"CREATE TRIGGER {rule.name} BEFORE {_moment(rule)} WHEN {rule.condition} "
        f"BEGIN SELECT RAISE(ABORT, '{quoted}'); END"
    )


def _acting(action: Action) -> str:
    return (
        f"CREATE TRIGGER {action.name} AFTER {_moment(action)} WHEN {action.condition} "
        f"BEGIN {action.statement}; END"
    )


def _moment(what: Rule | Action) -> str:
    columns = f" OF {', '.join(what.columns)}" if what.columns else ""
    return f"{what.event.upper()}{columns} ON {what.table}"
