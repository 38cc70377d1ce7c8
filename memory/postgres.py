"""PostgreSQL behind the ledger: one server, any number of machines.

Writers take one advisory lock for the length of their transaction, so that writes are serial as on
SQLite, and numbers are in the order of the commits. The triggers take it as well: raw SQL stands in
the same queue. Readers see one snapshot and wait for nobody.

Durability: what a fact's transaction has returned survives a crash of the server. Leases and
heartbeats (`durable=False`) do not wait for the disk: a crash may take those of the last second,
and their holders then finish nothing. A write that does wait takes all before it to the disk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from society.errors import (
    LedgerUnreachable,
    NotANotebook,
    NotebookDamaged,
    NotebookInUse,
    SocietyError,
    UsageError,
)
from society.memory.rules import ACTIONS, ALWAYS, RULES, Action, Rule
from society.memory.schema import metadata
from society.memory.sqlite import BUSY_S

CONNECT_S = 10
"""How long to wait for the server to answer."""
LOCK = 0x50C1E7F
"""Number of the advisory lock that the one writer holds."""

WORDS = {
    "is": "IS NOT DISTINCT FROM",
    "clock": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
    "wall_s": "coalesce(CAST(CAST(NEW.cost AS json) ->> 'wall_s' AS double precision), 0)",
    "flops": "coalesce(CAST(CAST(NEW.cost AS json) ->> 'flops' AS double precision), 0)",
}
"""What the placeholders in the rules mean here."""

_SETTINGS = {
    "lock_timeout": f"{BUSY_S:.0f}s",
    "idle_in_transaction_session_timeout": "60s",  # of one who died without the server noticing
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "jit": "off",
}
"""Settings of a session. The keepalives free the lock of a machine that has vanished."""


class Postgres:
    """A ledger in a PostgreSQL database."""

    shared = True

    def __init__(self, address: str, *, read_only: bool) -> None:
        """Prepare connections to a database; nothing is opened yet.

        Raises:
            UsageError: the address cannot be understood.
        """
        url = _parsed(address)
        self.address = _without_password(url)
        self.path = self.address
        self.read_only = read_only
        self.engine = _engine(url, read_only=read_only)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nothing to do here: each transaction takes the lock on the server."""
        yield

    def settle(self, *, durable: bool) -> None:
        """Nothing to do here: a commit that returns is on the disk."""

    def tables(self, connection: Connection) -> frozenset[str]:
        """Names of all tables and views."""
        found = connection.exec_driver_sql(
            "SELECT relname FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f')"
            " AND relnamespace = (SELECT oid FROM pg_catalog.pg_namespace"
            " WHERE nspname = current_schema())"
        )
        return frozenset(found.scalars())

    def create_rules(self, connection: Connection, without: Collection[str] = ()) -> None:
        """Create all triggers and their functions.

        Args:
            connection: A transaction.
            without: Names of rules to leave out.
        """
        for statement in statements(without):
            connection.exec_driver_sql(statement)

    def drop_rules(self, connection: Connection) -> None:
        """Drop all triggers and their functions."""
        found = connection.exec_driver_sql(
            "SELECT proname FROM pg_catalog.pg_proc WHERE starts_with(proname, 'society_')"
            " AND pronamespace = (SELECT oid FROM pg_catalog.pg_namespace"
            " WHERE nspname = current_schema())"
        )
        for name in found.scalars().all():
            connection.exec_driver_sql(f'DROP FUNCTION "{name}"() CASCADE')

    def problem(self, connection: Connection) -> str | None:
        """Nothing: the server checks its pages itself."""
        return None

    def reason(self, error: BaseException) -> str:
        """What the database said, in one line."""
        original = getattr(error, "orig", None) or error
        primary = getattr(getattr(original, "diag", None), "message_primary", None)
        return " ".join(str(primary or original).split())

    def trouble(self, error: BaseException) -> SocietyError:
        """What an error means that is no refusal, saying what to do."""
        original = getattr(error, "orig", None) or error
        state = str(getattr(original, "sqlstate", None) or "")
        reason = self.reason(error)
        if state == "55P03" or state == "40P01":
            return NotebookInUse(
                f"The ledger {self.address} has been locked by another process for {BUSY_S:.0f} s. "
                "Stop that process, or try again."
            )
        if (isinstance(error, DBAPIError) and error.connection_invalidated) or state[:2] == "57":
            return LedgerUnreachable(
                f"The connection to the ledger {self.address} was lost: {reason}. All that was "
                "acknowledged is kept. See that the server runs; the next call connects again, "
                "and a society goes on with --resume."
            )
        if state == "3D000" or re.search(r'database "[^"]*" does not exist', reason):
            return NotANotebook(
                f"No database at {self.address}. Create it, e.g. by `createdb`, or name another."
            )
        if not state:
            return LedgerUnreachable(
                f"The ledger {self.address} cannot be reached: {reason}. {_advice(reason)}"
            )
        return self.damaged(reason, state)

    def damaged(self, reason: str, state: str = "") -> NotebookDamaged:
        """The error for a database that answers with `reason`."""
        if state == "25006":
            advice = "It was opened for reading only."
        elif state == "42501":
            advice = "Let its owner GRANT this user the rights to create and write tables."
        elif state[:2] == "53":
            advice = "Give the server more room or connections, then go on with --resume."
        else:
            advice = "Look into the server's log; restore the database from a backup if need be."
        return NotebookDamaged(f"The ledger {self.address} cannot be used: {reason}. {advice}")


def _advice(reason: str) -> str:
    if "password" in reason or "authentication" in reason:
        return "Give the password by PGPASSWORD or in ~/.pgpass, and check the user's name."
    if "does not exist" in reason:
        return "Check the user's name."
    return "See that the server runs, and check host and port."


def _parsed(address: str) -> URL:
    try:
        url = make_url(address)
        port_is_a_number = url.port is None or url.port > 0
    except (ArgumentError, ValueError):
        port_is_a_number = False
    if not port_is_a_number or not url.database:
        raise UsageError(
            "The ledger's address is not understood. Give it as "
            "postgresql://USER@HOST:PORT/DATABASE, the password by PGPASSWORD or in ~/.pgpass."
        )
    return url.set(drivername="postgresql+psycopg")


def _without_password(url: URL) -> str:
    """The address as people write it."""
    bare = url.set(drivername="postgresql", query={
        name: value for name, value in url.query.items() if "password" not in name.lower()
    })  # fmt: skip
    return URL.create(
        bare.drivername, bare.username, None, bare.host, bare.port, bare.database, bare.query
    ).render_as_string()


def _engine(url: URL, *, read_only: bool) -> Engine:
    settings = _SETTINGS | ({"default_transaction_read_only": "on"} if read_only else {})
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    given = url.query.get("options", "")
    engine = create_engine(
        url.difference_update_query(["options"]),
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": CONNECT_S,
            "application_name": "society",
            "client_encoding": "utf8",
            "options": f"{options} {given}".strip(),
        },
    )

    def begin(connection: Connection) -> None:
        _begin(connection, read_only=read_only)

    event.listen(engine, "begin", begin)
    return engine


def _begin(connection: Connection, *, read_only: bool) -> None:
    from psycopg import IsolationLevel

    durable = connection.get_execution_options().get("society_durable")
    session: Any = connection.connection.dbapi_connection
    if durable is None or read_only:
        session.isolation_level = IsolationLevel.REPEATABLE_READ
        session.read_only = True
    else:
        session.isolation_level = IsolationLevel.READ_COMMITTED
        session.read_only = False
        off = "" if durable else "set_config('synchronous_commit', 'off', true), "
        connection.exec_driver_sql(f"SELECT {off}pg_advisory_xact_lock({LOCK})")


# --- rules as triggers ---------------------------------------------------------------------------


def statements(without: Collection[str] = ()) -> list[str]:
    """The functions and triggers for all rules and actions, but for those named in `without`.

    One function for each table and event checks the rules in their order; another, after the
    write, does the actions.
    """
    checks: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for table in metadata.tables.values():
        counted = [column.name for column in table.primary_key if column.server_default is not None]
        checks[table.name, "insert"] += [_number(table.name, column) for column in counted]
    for rule in RULES:
        if rule.name not in without:
            checks[rule.table, rule.event].append(_refusing(rule.spoken(WORDS)))
    acts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for action in ACTIONS:
        acts[action.table, action.event].append(_acting(action.spoken(WORDS)))
    lock = f"PERFORM pg_advisory_xact_lock({LOCK});"
    made: list[str] = []
    for (name, happens), steps in checks.items():
        if steps:
            back = "RETURN OLD;" if happens == "delete" else "RETURN NEW;"
            made += _trigger(name, "before", happens, [lock, *steps, back])
    for (name, happens), steps in acts.items():
        made += _trigger(name, "after", happens, [*steps, "RETURN NULL;"])
    kept = {rule.table for rule in RULES if rule.event == "delete" and rule.name not in without}
    return made + _no_truncation(sorted(kept))


def _trigger(table: str, moment: str, happens: str, steps: list[str]) -> list[str]:
    name = f"society_{table}_{moment}_{happens}"
    body = "\n".join(steps)
    return [
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql"
        f" AS $$ BEGIN\n{body}\nEND $$",
        f"CREATE OR REPLACE TRIGGER {name} {moment.upper()} {happens.upper()} ON {table}"
        f" FOR EACH ROW EXECUTE FUNCTION {name}()",
    ]


def _no_truncation(tables: list[str]) -> list[str]:
    """TRUNCATE fires no trigger for a row: it is refused as a statement."""
    refuse = _raise("InvariantViolated: nothing is deleted from ", " || TG_TABLE_NAME")
    return [
        "CREATE OR REPLACE FUNCTION society_no_truncate() RETURNS trigger LANGUAGE plpgsql"
        f" AS $$ BEGIN {refuse} END $$",
        *(
            f"CREATE OR REPLACE TRIGGER society_{table}_no_truncate BEFORE TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION society_no_truncate()"
            for table in tables
        ),
    ]


def _number(table: str, column: str) -> str:
    return (
        f"IF NEW.{column} IS NULL THEN"
        f" NEW.{column} := (SELECT coalesce(max({column}), 0) + 1 FROM {table}); END IF;"
    )


def _refusing(rule: Rule) -> str:
    return f"IF {_when(rule)} THEN {_raise(rule.message)} END IF;"


def _acting(action: Action) -> str:
    return f"IF {_when(action)} THEN {action.statement}; END IF;"


def _when(what: Rule | Action) -> str:
    if not what.columns:
        return what.condition
    changed = " OR ".join(f"NEW.{name} IS DISTINCT FROM OLD.{name}" for name in what.columns)
    return f"({changed})" if what.condition == ALWAYS else f"({changed}) AND ({what.condition})"


def _raise(message: str, more: str = "") -> str:
    """A refusal with the class of a broken constraint."""
    quoted = message.replace("'", "''")
    return (
        f"RAISE EXCEPTION USING MESSAGE = '{quoted}'{more},"
        " ERRCODE = 'integrity_constraint_violation';"
    )
