"""Upgrading a ledger that an older version of society wrote, in one transaction, with a backup.

Each step is written down as it was when its version appeared and is never changed afterwards, so
that it does not depend on what `schema.py` says today. A test upgrades a stored ledger of every
version and compares the result, table by table, with a new one.

What was recorded stays as it is: a step may add columns and tables, and may close ideas that were
run or that are repeated; it never removes or rewrites a fact.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    text,
)
from sqlalchemy.pool import NullPool

from society.errors import NotANotebook, NotebookDamaged
from society.memory.database import Backend, Database, stored
from society.memory.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from alembic.operations import Operations

FIRST_SHARED = 3
"""The oldest schema that a PostgreSQL database can hold."""
BUSY_S = 30.0
"""How long an upgrade waits for a writer."""


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What an upgrade did."""

    before: int
    """Schema version it found."""
    after: int
    backup: Path | str | None
    """Where the ledger of before was kept: a file, or the name of the schema that holds a copy of
    each table in the same PostgreSQL database. None when it was up to date."""
    changes: tuple[str, ...] = ()
    """What is new or different, one sentence each."""


def upgrade(place: Path | str) -> Upgraded:
    """Bring a ledger to this version's schema; all of it, or nothing.

    A file is copied first; in a PostgreSQL database the tables are. The caller owns the notebook's
    folder; readers may go on reading the old contents until the end. (PostgreSQL holds ledgers
    since schema 3: there is nothing older.)

    Args:
        place: A file, or the address of a shared ledger.

    Raises:
        NotANotebook: the file is no ledger, or a newer version of society wrote it.
        NotebookDamaged: it cannot be read or written, or does not pass the final checks.
        NotebookInUse: another process writes to it.
        LedgerUnreachable: the server does not answer.
    """
    with closing(Database(place, read_only=False)) as database:
        if not isinstance(database.path, Path):
            done = _upgrade_shared(database)
            database.initialise(None)
            return done
        if not database.path.is_file():
            raise NotANotebook(f"No ledger at {place}. Name the folder of an existing notebook.")
        return _upgrade(database, database.path)


def _upgrade(database: Database, file: Path) -> Upgraded:
    engine = _engine(file)
    backup: Path | None = None
    try:
        with (
            database.translated(),
            database.backend.turn(),
            engine.connect() as connection,
            connection.begin(),
        ):
            before = version_of(connection, file)
            if before == SCHEMA_VERSION:
                return Upgraded(before, before, None)
            backup = _back_up(file, before)
            changes = _migrate(connection, database.backend, file, before)
    except BaseException:
        if backup is not None:
            backup.unlink(missing_ok=True)
        raise
    finally:
        engine.dispose()
    return Upgraded(before, SCHEMA_VERSION, backup, changes)


def _upgrade_shared(database: Database) -> Upgraded:
    """Upgrade a PostgreSQL ledger, whose server undoes a change of tables like any other."""
    with database.write(visible=False) as connection:
        if not database.backend.tables(connection):  # an empty database: there is nothing old
            return Upgraded(SCHEMA_VERSION, SCHEMA_VERSION, None)
        before = _shared_version(connection, database)
        if before == SCHEMA_VERSION:
            return Upgraded(before, before, None)
        backup = _copy_tables(connection, database, before)
        changes = _migrate(connection, database.backend, database.path, before)
    return Upgraded(before, SCHEMA_VERSION, backup, changes)


def _shared_version(connection: Connection, database: Database) -> int:
    if not {"meta", "outbox"} <= database.backend.tables(connection):
        raise NotANotebook(
            f"{database.path} is a database but no notebook's ledger. Name another one."
        )
    found = stored(connection, "schema")
    version = int(found) if found.isdigit() else 0
    if not FIRST_SHARED <= version <= SCHEMA_VERSION:
        raise NotANotebook(
            f"The ledger {database.path} has schema {found}; this version of society knows "
            f"{FIRST_SHARED} to {SCHEMA_VERSION}. Read it with the version of society that wrote "
            "it."
        )
    return version


def _copy_tables(connection: Connection, database: Database, version: int) -> str:
    """Copy every table of a PostgreSQL ledger into a schema of its own; the schema's name."""
    taken = set(connection.exec_driver_sql("SELECT nspname FROM pg_catalog.pg_namespace").scalars())
    names = (f"society_schema{version}{n}" for n in ("", *(f"_{i}" for i in range(2, 100))))
    name = next(one for one in names if one not in taken)
    connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    for table in sorted(database.backend.tables(connection)):
        connection.exec_driver_sql(f'CREATE TABLE {name}."{table}" AS TABLE "{table}"')
    return name


def version_of(connection: Connection, file: Path) -> int:
    """The schema version of a SQLite ledger.

    Raises:
        NotANotebook: it is no ledger, or of a version that cannot be upgraded from here.
    """
    known = "SELECT count(*) FROM sqlite_master WHERE name IN ('meta', 'outbox')"
    if connection.exec_driver_sql(known).scalar_one() != 2:
        raise NotANotebook(
            f"{file} is a SQLite file but no notebook's ledger. Name another folder."
        )
    found = connection.exec_driver_sql("SELECT value FROM meta WHERE key = 'schema'").scalar_one()
    version = int(found) if str(found).isdigit() else 0
    if not 1 <= version <= SCHEMA_VERSION:
        raise NotANotebook(
            f"The ledger {file} has schema {found}; this version of society knows 1 to "
            f"{SCHEMA_VERSION}. Read it with the version of society that wrote it."
        )
    return version


def _engine(file: Path) -> Engine:
    """Connections that check foreign keys at the end only, and begin with the write lock."""

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(file, timeout=BUSY_S, isolation_level=None)

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _back_up(file: Path, version: int) -> Path:
    """A consistent copy beside the file; an earlier backup is never overwritten."""
    names = (f"{file.name}.schema{version}{n}.bak" for n in ("", *(f".{i}" for i in range(2, 100))))
    place = next(path for path in map(file.with_name, names) if not path.exists())
    draft = place.with_suffix(".part")
    try:
        with (
            closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(draft)) as copy,
        ):
            source.backup(copy)
            if copy.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise NotebookDamaged(f"The ledger {file} is damaged. Restore it from a backup.")
        draft.replace(place)
    except (sqlite3.Error, OSError) as error:
        raise NotebookDamaged(
            f"The backup {place} cannot be written: {error}. Free some disk space; the ledger was "
            "not changed."
        ) from error
    finally:
        for leftover in (draft, *(draft.with_name(draft.name + end) for end in ("-wal", "-shm"))):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
    return place


def _migrate(
    connection: Connection, backend: Backend, place: Path | str, before: int
) -> tuple[str, ...]:
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    rows = _row_counts(connection, backend)
    backend.drop_rules(connection)
    operations = Operations(MigrationContext.configure(connection))
    changes: list[str] = []
    for version in range(before, SCHEMA_VERSION):
        changes += _STEPS[version](operations, connection)
    connection.execute(
        text("UPDATE meta SET value = :version WHERE key = 'schema'"),
        {"version": str(SCHEMA_VERSION)},
    )
    _check(connection, backend, place, rows)
    backend.create_rules(connection)
    return tuple(changes)


def _row_counts(connection: Connection, backend: Backend) -> dict[str, int]:
    return {
        name: int(connection.exec_driver_sql(f'SELECT count(*) FROM "{name}"').scalar_one())
        for name in sorted(backend.tables(connection))
        if not name.startswith("sqlite")
    }


def _check(
    connection: Connection, backend: Backend, place: Path | str, rows: dict[str, int]
) -> None:
    """No row may be missing, and none may cite what is not there (a server sees to that itself)."""
    now = _row_counts(connection, backend)
    lost = [name for name, count in rows.items() if now.get(name, -1) < count]
    broken, damage = None, "ok"
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        damage = str(connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one())
    if lost or broken or damage != "ok":
        what = (
            f"rows of {lost[0]} would be lost"
            if lost
            else f"a row of {broken[0]} cites a missing one of {broken[2]}"
            if broken
            else str(damage)
        )
        raise NotebookDamaged(
            f"The ledger {place} cannot be upgraded: {what}. It was not changed; restore it from a "
            "backup, or read it with the version of society that wrote it."
        )


# --- 1 to 2: studies -----------------------------------------------------------------------------

_KINDS = "'screening', 'calibration', 'verification', 'reproduction', 'audit', 'study'"
_STUDY_CHECKS = (
    ("data_seed_of_a_study", "kind = 'study' OR (data_seed IS NULL AND repeat = 0)"),
    ("study_without_claim", "repeat >= 0 AND (kind <> 'study' OR claim_id IS NULL)"),
)


def _to_2(op: Operations, connection: Connection) -> list[str]:
    with op.batch_alter_table("seeds") as seeds:
        seeds.drop_constraint("list_known", type_="check")
        seeds.create_check_constraint(
            "list_known", "list IN ('screening', 'verification', 'audit', 'study')"
        )
    for name in ("leases", "runs"):
        with op.batch_alter_table(name) as table:
            table.add_column(Column("data_seed", Integer))
            table.add_column(Column("repeat", Integer, nullable=False, server_default=text("0")))
            table.drop_constraint("kind_known", type_="check")
            table.create_check_constraint("kind_known", f"kind IN ({_KINDS})")
            for check in _STUDY_CHECKS:
                table.create_check_constraint(*check)
            if name == "leases":
                table.drop_constraint("list_and_split_of_kind", type_="check")
                table.create_check_constraint("list_and_split_of_kind", _LIST_AND_SPLIT)
                table.create_foreign_key(
                    "data_seed_is_drawn", "seeds", ["scope", "data_seed"], ["scope", "seed"]
                )
    op.create_index(
        "two_attempts_per_study_seed", "runs",
        ["scope", "variant", "seed", "repeat", "attempt"], unique=True,
        sqlite_where=text("kind = 'study' AND data_seed IS NULL"),
    )  # fmt: skip
    op.create_index(
        "two_attempts_per_pair_of_study_seeds", "runs",
        ["scope", "variant", "seed", "data_seed", "repeat", "attempt"], unique=True,
        sqlite_where=text("kind = 'study' AND data_seed IS NOT NULL"),
    )  # fmt: skip
    _create_study_tables(op)
    return ["Preregistered studies can be recorded."]


_LIST_AND_SPLIT = (
    "(kind IN ('screening', 'reproduction') AND list = 'screening' AND split = 'validation')"
    " OR (kind IN ('calibration', 'verification') AND list = 'verification' AND split = 'holdout')"
    " OR (kind = 'audit' AND list = 'audit' AND split = 'holdout')"
    " OR (kind = 'study' AND list = 'study' AND split = 'holdout')"
)


def _create_study_tables(op: Operations) -> None:
    op.create_table(
        "studies",
        Column("number", Integer, primary_key=True),
        Column("id", Text, nullable=False, unique=True),
        _scope(),
        _society(),
        *_needed(Text, "kind", "title", "plan"),
        *_needed(Float, "registered_at"),
    )
    op.create_index("studies_of_scope", "studies", ["scope", "kind"])
    op.create_table(
        "study_results",
        Column("study", Text, ForeignKey("studies.id"), primary_key=True),
        _society(),
        *_needed(Text, "result"),
        *_needed(Float, "concluded_at"),
    )
    op.create_table(
        "study_runs",
        Column("study", Text, ForeignKey("study_results.study"), primary_key=True),
        Column("run_id", Text, ForeignKey("runs.id"), primary_key=True),
        *_needed(Integer, "place"),
    )


# --- 2 to 3: a shared memory ---------------------------------------------------------------------


def _to_3(op: Operations, connection: Connection) -> list[str]:
    connection.exec_driver_sql(
        "INSERT INTO meta (key, value) VALUES ('id', ?)", (secrets.token_hex(8),)
    )
    op.add_column("societies", Column("home", Text, nullable=False, server_default=text("''")))
    renamed = _rename_recall(connection)
    _number_variants(op)
    with op.batch_alter_table("runs") as runs:
        runs.drop_constraint("score_if_completed", type_="check")
        runs.create_check_constraint(
            "score_if_completed",
            "(score IS NULL) = (outcome <> 'completed') AND (score IS NULL OR score <> 'NaN')",
        )
    tested, repeated = _change_hypotheses(op, connection)
    _create_memory_tables(op)
    _change_indexes(op)
    _fill_tallies(connection)
    return [
        "The ledger has an identity, variants are numbered, and runs are counted as they come.",
        *_some("Societies whose setting `recall` is called `knowledge` now", renamed),
        *_some("Hypotheses marked as tested, because their variant had been screened", tested),
        *_some("Hypotheses closed, because they repeat an earlier one", repeated),
    ]


def _some(words: str, count: int) -> list[str]:
    return [f"{words}: {count}."] if count else []


def _rename_recall(connection: Connection) -> int:
    """What agents know when they propose is the setting `knowledge` now."""
    stored = connection.exec_driver_sql("SELECT id, settings FROM societies").all()
    count = 0
    for identity, words in stored:
        settings = json.loads(words)
        if settings.get("recall") in ("shared", "own"):
            settings["knowledge"] = settings.pop("recall")
            connection.exec_driver_sql(
                "UPDATE societies SET settings = ? WHERE id = ?",
                (json.dumps(settings, sort_keys=True), identity),
            )
            count += 1
    return count


def _number_variants(op: Operations) -> None:
    """In the order they were kept, from 1."""
    op.add_column("variants", Column("number", Integer))
    op.execute(
        "UPDATE variants SET number = place.number FROM (SELECT fingerprint,"
        " row_number() OVER (ORDER BY rowid) AS number FROM variants) AS place"
        " WHERE place.fingerprint = variants.fingerprint"
    )
    with op.batch_alter_table("variants") as variants:
        variants.alter_column("number", existing_type=Integer(), nullable=False)
        variants.create_unique_constraint("variants_are_numbered", ["number"])


def _change_hypotheses(op: Operations, connection: Connection) -> tuple[int, int]:
    """How many were found to be tested, and how many repeat an earlier one that is not closed.

    Whoever had taken one is gone, since this process owns the notebook: its deadline has passed.
    Of several open ideas about the same variant the earliest keeps its place; the others stay as
    they were written, but for their state.
    """
    with op.batch_alter_table("hypotheses") as table:
        table.add_column(Column("cost", Float, nullable=False, server_default=text("1")))
        table.add_column(Column("taken_until", Float))
        table.add_column(Column("dropped_because", Text))
        table.drop_constraint("state_known", type_="check")
        table.create_check_constraint(
            "state_known", "state IN ('open', 'taken', 'tested', 'dropped')"
        )
    op.execute("UPDATE hypotheses SET state = 'open' WHERE state = 'taken' AND taken_by IS NULL")
    op.execute("UPDATE hypotheses SET taken_until = posted_at WHERE state = 'taken'")
    tested = _close(connection, _TESTED, "state = 'tested', run_id = why")
    repeated = _close(
        connection, _REPEATED, "state = 'dropped', dropped_because = 'the same as ' || why"
    )
    with op.batch_alter_table("hypotheses") as table:
        table.create_check_constraint("cost_is_positive", "cost > 0")
        table.create_check_constraint(
            "taken_until_a_deadline",
            "state <> 'taken' OR (taken_by IS NOT NULL AND taken_until IS NOT NULL)",
        )
        table.create_check_constraint(
            "dropped_for_a_reason", "(state = 'dropped') = (dropped_because IS NOT NULL)"
        )
    op.create_index(
        "one_idea_at_a_time", "hypotheses", ["scope", "variant"], unique=True,
        sqlite_where=text("state IN ('open', 'taken')"),
    )  # fmt: skip
    return tested, repeated


_TESTED = (
    "SELECT h.id, (SELECT r.id FROM runs r WHERE r.scope = h.scope AND r.variant = h.variant"
    " AND r.kind = 'screening' ORDER BY r.number LIMIT 1) AS why"
    " FROM hypotheses h WHERE h.state IN ('open', 'taken') AND why IS NOT NULL"
)
_REPEATED = (
    "SELECT h.id, (SELECT o.id FROM hypotheses o WHERE o.scope = h.scope"
    " AND o.variant = h.variant AND o.number < h.number AND o.state IN ('open', 'taken')"
    " ORDER BY o.number LIMIT 1) AS why"
    " FROM hypotheses h WHERE h.state IN ('open', 'taken') AND why IS NOT NULL"
)


def _close(connection: Connection, which: str, change: str) -> int:
    """Close hypotheses by a query for (id, why), and let the semantic index read them again."""
    found = connection.exec_driver_sql(f"{which} ORDER BY h.number").all()
    for identity, why in found:
        connection.exec_driver_sql(
            f"UPDATE hypotheses SET {change} FROM (SELECT ? AS why) WHERE id = ?", (why, identity)
        )
        connection.exec_driver_sql(
            "INSERT INTO outbox (kind, ref) VALUES ('hypothesis', ?)", (identity,)
        )
    return len(found)


def _create_memory_tables(op: Operations) -> None:
    op.create_table(
        "refusals",
        Column("number", Integer, primary_key=True),
        _scope(),
        _society(),
        *_needed(Text, "agent"),
        Column("variant", Text, ForeignKey("variants.fingerprint"), nullable=False),
        *_needed(Text, "reason"),
        Column("run_id", Text, ForeignKey("runs.id")),
        *_needed(Text, "note"),
        *_needed(Float, "refused_at"),
        CheckConstraint(
            "reason IN ('duplicate', 'near_duplicate', 'dead_end', 'same_idea')",
            name="reason_known",
        ),
    )
    op.create_index("refusals_of_society", "refusals", ["scope", "society", "reason"])
    op.create_table(
        "priors",
        Column("number", Integer, primary_key=True),
        Column("id", Text, nullable=False, unique=True),
        _scope(),
        _society(),
        *_needed(Text, "source", "label"),
        Column("score", Float),
        *_needed(Text, "status", "description"),
        *_needed(Float, "imported_at"),
        UniqueConstraint("scope", "source", "label", "description"),
    )
    op.create_table(
        "sources",
        Column("digest", Text, primary_key=True),
        *_needed(Text, "content"),
        *_needed(Float, "kept_at"),
    )
    op.create_table(
        "tallies",
        Column("scope", Integer, ForeignKey("scopes.number"), primary_key=True),
        Column("society", Text, ForeignKey("societies.id"), primary_key=True),
        Column("kind", Text, primary_key=True),
        Column("outcome", Text, primary_key=True),
        *_needed(Integer, "runs"),
        *_needed(Float, "wall_s", "flops"),
    )


def _change_indexes(op: Operations) -> None:
    """For what agents and status pages ask each time: nothing of it may read all rows."""
    op.create_index("runs_in_order", "runs", ["scope", "number"])
    op.create_index("runs_of_society", "runs", ["society", "scope", "number"])
    op.create_index("insights_of_scope", "insights", ["scope", "number"])
    op.drop_index("activities_of_society", "activities")
    op.create_index(
        "activities_of_society", "activities", ["society", "role", "duty", "started_at"]
    )


def _fill_tallies(connection: Connection) -> None:
    connection.exec_driver_sql(
        "INSERT INTO tallies (scope, society, kind, outcome, runs, wall_s, flops)"
        " SELECT scope, society, kind, outcome, count(*),"
        " total(json_extract(cost, '$.wall_s')), total(json_extract(cost, '$.flops'))"
        " FROM runs GROUP BY scope, society, kind, outcome"
    )


# --- 3 to 4: what language models cost ------------------------------------------------------------


def _to_4(op: Operations, connection: Connection) -> list[str]:
    with op.batch_alter_table("refusals") as refusals:
        refusals.drop_constraint("reason_known", type_="check")
        refusals.create_check_constraint(
            "reason_known",
            "reason IN ('duplicate', 'near_duplicate', 'dead_end', 'same_idea', 'broken',"
            " 'advised_against')",
        )
    tokens = BigInteger().with_variant(Integer, "sqlite")
    op.create_table(
        "calls",
        Column("number", Integer, primary_key=True, autoincrement=False),
        _society(),
        *_needed(Text, "agent", "purpose", "model", "outcome"),
        Column("prompt_tokens", tokens, nullable=False),
        Column("completion_tokens", tokens, nullable=False),
        *_needed(Float, "dollars", "wall_s", "called_at"),
        CheckConstraint("prompt_tokens >= 0 AND completion_tokens >= 0", name="tokens_are_counts"),
        CheckConstraint("dollars >= 0 AND dollars < 1000000000", name="dollars_are_spent"),
        CheckConstraint("wall_s >= 0 AND wall_s < 1000000000", name="wall_s_is_a_time"),
        CheckConstraint("outcome <> 'cached' OR dollars = 0", name="cached_costs_nothing"),
    )
    op.create_index("calls_of_society", "calls", ["society", "agent"])
    return ["Requests to language models, and what they cost, can be recorded."]


def _needed(
    kind: type[Text] | type[Float[float]] | type[Integer], *names: str
) -> Sequence[Column[object]]:
    return [Column(name, kind, nullable=False) for name in names]


def _scope() -> Column[int]:
    return Column("scope", Integer, ForeignKey("scopes.number"), nullable=False)


def _society() -> Column[str]:
    return Column("society", Text, ForeignKey("societies.id"), nullable=False)


_STEPS: dict[int, Callable[[Operations, Connection], list[str]]] = {
    1: _to_2,
    2: _to_3,
    3: _to_4,
}
"""Version found -> how to get to the next one."""
