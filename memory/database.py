"""The SQLite file behind the ledger: opening it, transactions, and what its errors mean.

Durability: WAL. A transaction that has returned survives `kill -9` of the process; one that has not
returned is undone as a whole. Facts are written with `synchronous=FULL` and survive a power cut as
well. Leases and heartbeats (`durable=False`) wait for no disk: a power cut ends their holders too.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import QueuePool

from society.errors import (
    AlreadyLeased,
    ClaimClosed,
    InvariantViolated,
    LeaseLost,
    NotANotebook,
    NotebookDamaged,
    NotebookInUse,
    NotIndependent,
    SocietyError,
)
from society.memory.schema import CLOCK, SCHEMA_VERSION, metadata, statements

BUSY_S = 30.0
"""How long a writer waits for another one."""

_BY_NAME: dict[str, type[SocietyError]] = {
    error.__name__: error
    for error in (AlreadyLeased, ClaimClosed, InvariantViolated, LeaseLost, NotIndependent)
}


class Database:
    """Connections to one ledger file. Safe to use from several threads."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Prepare connections to a file; nothing is opened yet."""
        self.path = path
        self.read_only = read_only
        self._engine = _engine(path, read_only=read_only)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent snapshot; never waits for writers.

        Raises:
            NotebookDamaged: the file cannot be read.
        """
        with translated(self.path), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self, *, visible: bool = True, durable: bool = True) -> Iterator[Connection]:
        """One transaction that holds the write lock from its start; all of it or nothing.

        Args:
            visible: Whether the ledger's version grows (not for heartbeats and cursors).
            durable: Whether it must survive a power cut (not needed for leases).

        Raises:
            InvariantViolated: a constraint or trigger refused (or the error it names).
            NotebookInUse: another writer held the lock for longer than `BUSY_S`.
            NotebookDamaged: the file cannot be written.
        """
        with translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(society_write="FULL" if durable else "NORMAL")
            with connection.begin():
                yield connection
                if visible:
                    connection.exec_driver_sql(
                        "UPDATE counters SET value = value + 1 WHERE name = 'version'"
                    )

    def initialise(self, secret_seed: int | None) -> None:
        """Create the tables in an empty file, or check that an existing one can be read.

        Raises:
            NotANotebook: the file is no ledger, or one of another schema version.
            NotebookDamaged: the file is corrupted.
        """
        with translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(
                society_write=None if self.read_only else "FULL"
            )
            with connection.begin():
                tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
                if tables == 0 and not self.read_only:
                    _create(connection, secret_seed)
                self._check(connection)

    def _check(self, connection: Connection) -> None:
        known = connection.exec_driver_sql(
            "SELECT count(*) FROM sqlite_master WHERE name IN ('meta', 'outbox')"
        ).scalar()
        if known != 2:
            raise NotANotebook(
                f"{self.path} is a SQLite file but no notebook's ledger. Name another folder."
            )
        version = connection.exec_driver_sql(
            "SELECT value FROM meta WHERE key = 'schema'"
        ).scalar_one()
        if version != str(SCHEMA_VERSION):
            raise NotANotebook(
                f"The ledger {self.path} has schema {version}; this version of society reads "
                f"schema {SCHEMA_VERSION}. Start a new folder with --lab, or read this one with "
                "the version of society that wrote it."
            )
        if not self.read_only:
            problem = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if problem != "ok":
                raise damaged(self.path, str(problem))


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
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA recursive_triggers = ON")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    synchronous = connection.get_execution_options().get("society_write")
    if synchronous is None:
        connection.exec_driver_sql("BEGIN")
    else:
        connection.exec_driver_sql(f"PRAGMA synchronous = {synchronous}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _create(connection: Connection, secret_seed: int | None) -> None:
    metadata.create_all(connection, checkfirst=False)
    for statement in statements():
        connection.exec_driver_sql(statement)
    if secret_seed is None:
        secret = os.urandom(32)
    else:
        secret = hashlib.sha256(f"society secret {secret_seed}".encode()).digest()
    connection.exec_driver_sql(
        "INSERT INTO meta (key, value)"
        f" VALUES ('schema', ?), ('secret', ?), ('created_at', {CLOCK})",
        (str(SCHEMA_VERSION), secret.hex()),
    )
    connection.exec_driver_sql("INSERT INTO counters (name, value) VALUES ('version', 1)")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the database's errors into the project's, keeping the original as the cause."""
    try:
        yield
    except IntegrityError as error:
        raise _refused(str(error.orig)) from error
    except (DatabaseError, sqlite3.DatabaseError) as error:
        original = getattr(error, "orig", None) or error
        raise damaged(path, str(original)) from error


def _refused(message: str) -> SocietyError:
    name, _, reason = message.partition(": ")
    if name in _BY_NAME:
        return _BY_NAME[name](f"The ledger refused a write: {reason}.")
    return InvariantViolated(f"The ledger refused a write: {message}.")


def damaged(path: Path, reason: str) -> SocietyError:
    """The error for a ledger that answers with `reason`, saying what to do."""
    if "locked" in reason:
        return NotebookInUse(
            f"The ledger {path} has been locked by another process for {BUSY_S:.0f} s. "
            "Stop that process, or try again."
        )
    if "full" in reason:
        advice = "Free some disk space, then go on with --resume; nothing recorded is lost."
    elif "unable to open" in reason or "readonly" in reason:
        advice = "Check that the folder exists and may be written."
    else:
        advice = "Restore the file from a backup, or start a new folder with --lab."
    return NotebookDamaged(f"The ledger {path} cannot be used: {reason}. {advice}")
