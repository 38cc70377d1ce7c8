"""`Database`: transactions on the ledger's tables, whichever backend holds them.

`sqlite.py` and `postgres.py` say how to connect, how writers queue, how the rules become triggers
and what the errors of the database mean; everything else is the same for both and stands here.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine, event, insert, select
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from society.errors import (
    AlreadyLeased,
    ClaimClosed,
    InvariantViolated,
    LeaseLost,
    NotANotebook,
    NotebookInUse,
    NotIndependent,
    SocietyError,
    UsageError,
)
from society.memory.schema import SCHEMA_VERSION, Clock, counters, create_tables, meta
from society.memory.sqlite import Sqlite

_BY_NAME: dict[str, type[SocietyError]] = {
    error.__name__: error
    for error in (AlreadyLeased, ClaimClosed, InvariantViolated, LeaseLost, NotIndependent)
}


class Backend(Protocol):
    """What differs between the databases that can hold a ledger."""

    address: str
    """Path or URL, without a password."""
    shared: bool
    """Whether other machines can open it."""
    read_only: bool
    engine: Engine

    @property
    def path(self) -> Path | str:
        """The file, or the address."""

    def turn(self) -> AbstractContextManager[None]:
        """Wait until this process may write."""

    def settle(self, *, durable: bool) -> None:
        """After a transaction that was committed: wait for the disk, if it is to be durable."""

    def tables(self, connection: Connection) -> frozenset[str]:
        """Names of all tables that are there."""

    def create_rules(self, connection: Connection) -> None:
        """Create the triggers for all rules and actions."""

    def drop_rules(self, connection: Connection) -> None:
        """Drop all triggers, for a migration or an import."""

    def problem(self, connection: Connection) -> str | None:
        """What is broken, if that can be seen."""

    def reason(self, error: BaseException) -> str:
        """What the database said."""

    def trouble(self, error: BaseException) -> SocietyError:
        """What an error that is no refusal means, and what to do."""

    def damaged(self, reason: str) -> SocietyError:
        """The error for a database that is broken."""


class Database:
    """Connections to one ledger. Safe to use from several threads."""

    def __init__(self, place: Path | str, *, read_only: bool) -> None:
        """Prepare connections; nothing is opened yet.

        Args:
            place: A file, or a URL as `Ledger.open` takes it.
            read_only: Never write.

        Raises:
            UsageError: a URL of another kind.
        """
        self.backend = backend(place, read_only=read_only)
        self.generation = 0
        """Grows when a connection was lost: what was written without waiting for the disk may be
        gone, and what was read of it is to be read again."""
        self._engine = self.backend.engine
        event.listen(self._engine, "invalidate", self._lost)

    def _lost(self, *_: object) -> None:
        self.generation += 1

    @property
    def path(self) -> Path | str:
        """The file, or the address; for messages."""
        return self.backend.path

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written."""
        return self.backend.read_only

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent snapshot; never waits for writers.

        Raises:
            NotebookDamaged: the database cannot be read.
        """
        with self.translated(), self._engine.connect() as connection:
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
            NotebookDamaged: the database cannot be written.
        """
        with self.translated():
            with self.backend.turn(), self._engine.connect() as connection:
                connection = connection.execution_options(society_durable=durable)
                with connection.begin():
                    yield connection
                    if visible:
                        connection.exec_driver_sql(
                            "UPDATE counters SET value = value + 1 WHERE name = 'version'"
                        )
            self.backend.settle(durable=durable)

    def initialise(self, secret_seed: int | None) -> None:
        """Create the tables in an empty database, or check that an existing one can be read.

        Raises:
            NotANotebook: it is no ledger, or one of another schema version.
            NotebookDamaged: it is corrupted, or cannot be reached or written.
        """
        if self.read_only:
            with self.read() as connection:
                self._check(connection)
            return
        with self.write(visible=False) as connection:
            if not self.backend.tables(connection):
                create_tables(connection)
                self.backend.create_rules(connection)
                fill(connection, secret_seed)
            self._check(connection)

    def _check(self, connection: Connection) -> None:
        if not {"meta", "outbox"} <= self.backend.tables(connection):
            raise NotANotebook(
                f"{self.path} is a database but no notebook's ledger. Name another one."
            )
        version = stored(connection, "schema")
        if version != str(SCHEMA_VERSION):
            raise NotANotebook(self._of_another_version(version))
        if not self.read_only:
            problem = self.backend.problem(connection)
            if problem is not None:
                raise self.backend.damaged(problem)

    def _of_another_version(self, version: str) -> str:
        found = (
            f"The ledger {self.path} has schema {version}; this version of society reads schema "
            f"{SCHEMA_VERSION}."
        )
        if version.isdigit() and int(version) > SCHEMA_VERSION:
            return f"{found} Install a newer version of society, or start a new folder with --lab."
        folder = self.path.parent if isinstance(self.path, Path) else "FOLDER"
        return f"{found} Bring it up to date with `society memory upgrade --lab {folder}`."

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the database's errors into the project's, keeping the original as the cause."""
        try:
            yield
        except IntegrityError as error:
            raise refused(self.backend.reason(error)) from error
        except DataError as error:
            raise refused(self.backend.reason(error)) from error
        except PoolTimeout as error:
            raise NotebookInUse(
                f"All connections to the ledger {self.path} are in use by this process. Use fewer "
                "threads, or try again."
            ) from error
        except DBAPIError as error:
            raise self.backend.trouble(error) from error


def backend(place: Path | str, *, read_only: bool) -> Backend:
    """The backend for a file or a URL.

    Raises:
        UsageError: a URL of another kind.
    """
    scheme, found, rest = str(place).partition("://") if isinstance(place, str) else ("", "", "")
    if not found:
        return Sqlite(Path(place), read_only=read_only)
    if scheme == "sqlite" and rest.startswith("/"):
        return Sqlite(Path(rest[1:]), read_only=read_only)
    if scheme in ("postgresql", "postgres"):
        from society.memory.postgres import Postgres

        return Postgres(str(place), read_only=read_only)
    raise UsageError(
        f"No ledger can be kept at a {scheme}:// address. Give a file, sqlite:////ABSOLUTE/PATH, "
        "or postgresql://USER@HOST/DATABASE."
    )


def fill(connection: Connection, secret_seed: int | None) -> None:
    """Write what a new ledger starts with: its version, identity and secret."""
    if secret_seed is None:
        secret = os.urandom(32)
    else:
        secret = hashlib.sha256(f"society secret {secret_seed}".encode()).digest()
    values = {
        "schema": str(SCHEMA_VERSION),
        "id": secrets.token_hex(8),
        "secret": secret.hex(),
        "created_at": str(connection.execute(select(Clock())).scalar_one()),
    }
    connection.execute(insert(meta), [{"key": key, "value": values[key]} for key in values])
    connection.execute(insert(counters).values(name="version", value=1))


def stored(connection: Connection, key: str) -> str:
    """What the ledger says about itself: `schema`, `id`, ..."""
    return str(connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one())


def refused(message: str) -> SocietyError:
    """The error for a write that a constraint or a rule has refused with a message."""
    name, _, reason = message.partition(": ")
    if name in _BY_NAME:
        return _BY_NAME[name](f"The ledger refused a write: {reason}.")
    return InvariantViolated(f"The ledger refused a write: {message}.")
