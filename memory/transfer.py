"""Taking a memory elsewhere: every record as JSON Lines or Parquet, and back into an empty ledger.

An export is one consistent snapshot of all tables, read and written piece by piece, so that its
size does not matter. It is lossless: integers, texts and floats come back bit for bit. What is
not in it can be made again, or must not leave the ledger:

- the secret behind the seeds, because who knows it knows the seeds of audits to come. The ledger
  that imports draws a secret of its own; the seeds drawn so far are facts and come along;
- the ledger's identity, because two ledgers that go on from the same records are two ledgers;
- tallies, and how far semantic indexes have read, because they follow from the rest.

An import is one transaction. It checks rows against columns, constraints, references, fingerprints,
the rules of the notebook that can be checked afterwards, and the header's counts, before anything
is visible. How exports look is said in `exports.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sqlalchemy import Connection, Integer, func, insert, select
from sqlalchemy.exc import DatabaseError

from society.errors import UsageError
from society.memory import schema
from society.memory.database import Backend, Database
from society.memory.exports import (
    BATCH,
    FORMAT,
    FORMAT_VERSION,
    PRIVATE,
    TABLES,
    Format,
    Header,
    Row,
    bad,
    read_header,
    read_rows,
    write_lines,
    write_parquet,
)
from society.memory.rows import to_variant
from society.memory.rules import RULES
from society.memory.sqlite import WORDS as SQLITE

if TYPE_CHECKING:
    from sqlalchemy import Table

    from society.memory.folder import NotebookFolder

_LASTING_RULES = (
    "leases_not_by_author", "leases_of_claim", "leases_same_seed_as_screening",
    "leases_data_seed_of_the_list", "runs_repeat_the_lease", "runs_not_by_author",
    "claims_come_from_screening", "verdicts_try_accepted", "evidence_is_not_the_screening_run",
    "evidence_is_about_the_claim", "evidence_is_independent", "champions_have_a_claim",
    "champions_were_accepted", "champions_revert_to_one", "champions_screened",
    "refusals_name_runs_of_the_scope",
)  # fmt: skip
"""Rules about a new row that hold for it ever after. The others are about the moment of writing."""


# --- exporting -----------------------------------------------------------------------------------


def write_export(
    folder: NotebookFolder, out: Path | IO[str], form: Format = Format.JSONL
) -> Header:
    """Write every record of a notebook; one consistent snapshot, also beside a running society.

    Args:
        folder: The notebook.
        out: File or folder to write, or a text stream (JSON Lines only).
        form: How.

    Raises:
        UsageError: `out` cannot be written, or is a folder with something in it.
        NotANotebook: there is no notebook, or one of another version.
        NotebookDamaged: the ledger cannot be read.
    """
    with (
        closing(Database(folder.require().ledger, read_only=True)) as database,
        _readable(database).read() as tx,
    ):
        header, rows = header_of(tx), partial(stored_rows, tx)
        if form is Format.PARQUET and isinstance(out, Path):
            write_parquet(header, rows, out)
        else:
            write_lines(header, rows, out)
    return header


def _readable(database: Database) -> Database:
    database.initialise(None)
    return database


def header_of(tx: Connection) -> Header:
    """The header of an export of this snapshot."""
    rows = {
        name: int(
            tx.execute(_exported(table, select(func.count()).select_from(table))).scalar_one()
        )
        for name, table in TABLES.items()
    }
    stored = {
        key: value for key, value in tx.execute(select(schema.meta.c.key, schema.meta.c.value))
    }
    origin = stored.get("origin", stored["id"])
    return Header(FORMAT, FORMAT_VERSION, int(stored["schema"]), origin, rows)


def _exported(table: Table, query: Any) -> Any:
    """A query restricted to the rows of a table that are exported."""
    if table is schema.meta:
        return query.where(table.c.key.not_in(PRIVATE))
    if table is schema.counters:
        return query.where(table.c.name.not_like("recall:%"))
    return query


def stored_rows(tx: Connection, table: Table) -> Iterator[dict[str, Any]]:
    """The exported rows of a table as they are stored, in the order of its key."""
    keys: list[Any] = [table.c.number] if table is schema.variants else list(table.primary_key)
    if tx.dialect.name == "postgresql":  # not in the order of the server's language
        keys = [key if isinstance(key.type, Integer) else key.collate("C") for key in keys]
    query = _exported(table, select(table)).order_by(*keys)
    found = tx.execute(query.execution_options(yield_per=BATCH))
    return (dict(row) for row in found.mappings())


# --- importing -----------------------------------------------------------------------------------


def read_export(folder: NotebookFolder, path: Path) -> Header:
    """Fill an empty notebook with an export; all of it, or nothing.

    The caller owns the folder. A ledger is made where there is none.

    Args:
        folder: The notebook; with a ledger that is shared, that one must be empty.
        path: A JSON Lines file, or a folder of Parquet files.

    Raises:
        UsageError: the notebook holds something, or the export is not what it should be; the
            message names the line.
        NotebookDamaged: the ledger cannot be written.
    """
    header = read_header(path)
    place = folder.ledger
    made = isinstance(place, Path) and not place.exists()
    try:
        with closing(Database(place, read_only=False)) as database:
            database.initialise(None)
            with database.write(visible=False) as tx:
                _require_empty(tx, folder)
                fill(database.backend, tx, header, read_rows(path), path)
    except BaseException:
        if made and isinstance(place, Path):
            for end in ("", "-wal", "-shm"):
                place.with_name(place.name + end).unlink(missing_ok=True)
        raise
    return header


def _require_empty(tx: Connection, folder: NotebookFolder) -> None:
    for name, table in TABLES.items():
        if table is schema.meta or table is schema.counters:
            continue
        count = tx.execute(select(func.count()).select_from(table)).scalar_one()
        if count:
            raise UsageError(
                f"The notebook {folder.path} is not empty ({count} rows in {name}), and a memory "
                "is imported into an empty one only. Name a new folder with --lab."
            )


def fill(backend: Backend, tx: Connection, header: Header, rows: Iterable[Row], path: Path) -> None:
    """Write and check all rows in a transaction on an empty ledger, then set up its rules again."""
    backend.drop_rules(tx)
    with _references_checked_last(tx, path):
        _forget(tx)
        found = _insert(tx, rows, path)
        _compare(header, found, path)
        tx.execute(insert(schema.meta).values(key="origin", value=header.ledger))
    _check_fingerprints(tx, path)
    _check_rules(tx, path)
    _count_runs(tx)
    backend.create_rules(tx)


def _forget(tx: Connection) -> None:
    """Remove what a new ledger writes about itself and an export brings along."""
    tx.execute(schema.meta.delete().where(schema.meta.c.key.not_in(PRIVATE)))
    tx.execute(schema.meta.delete().where(schema.meta.c.key == "origin"))
    tx.execute(schema.counters.delete().where(schema.counters.c.name.not_like("recall:%")))


def _insert(tx: Connection, rows: Iterable[Row], path: Path) -> Counter[str]:
    """Insert rows in batches; how many there were of each table."""
    found: Counter[str] = Counter()
    for name, where, batch in _batches(rows):
        try:
            tx.execute(insert(TABLES[name]), batch)
        except DatabaseError as error:
            raise bad(path, where, f"a row of {name} is refused: {_reason(error)}") from error
        found[name] += len(batch)
    return found


def _reason(error: DatabaseError) -> str:
    return str(error.orig).strip().splitlines()[0]


def _batches(rows: Iterable[Row]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Rows of the same table that follow each other, at most so many at a time."""
    batch: list[dict[str, Any]] = []
    current = first = last = ""
    for where, name, values in rows:
        if batch and (name != current or len(batch) == BATCH):
            yield current, f"{first} to {last}", batch
            batch = []
        if not batch:
            current, first = name, where
        batch.append(values)
        last = where
    if batch:
        yield current, f"{first} to {last}", batch


def _compare(header: Header, found: Counter[str], path: Path) -> None:
    for name in TABLES:
        if found[name] != header.rows.get(name, 0):
            raise UsageError(
                f"{path} is incomplete or was changed: it should hold {header.rows.get(name, 0)} "
                f"rows of {name}, and there are {found[name]}. Export the memory again."
            )


@contextmanager
def _references_checked_last(tx: Connection, path: Path) -> Iterator[None]:
    """Tables cite each other in circles, so that references are checked when all rows are there."""
    if tx.dialect.name == "sqlite":
        tx.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        yield
        broken = tx.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise _inconsistent(path, f"a row of {broken[0]} cites a missing one of {broken[2]}")
        return
    held = tx.exec_driver_sql(
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE contype = 'f' AND connamespace = current_schema()::regnamespace"
    ).all()
    for table, name, _ in held:
        tx.exec_driver_sql(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')
    yield
    for table, name, definition in held:
        try:
            tx.exec_driver_sql(f'ALTER TABLE {table} ADD CONSTRAINT "{name}" {definition}')
        except DatabaseError as error:
            raise _inconsistent(path, f"a row of {table}: {_reason(error)}") from error


def _check_fingerprints(tx: Connection, path: Path) -> None:
    found = tx.execute(select(schema.variants).execution_options(yield_per=BATCH))
    for row in found.mappings():
        if to_variant(row).fingerprint != row["fingerprint"]:
            raise _inconsistent(
                path, f"variant {row['fingerprint'][:12]} is not what its fingerprint says"
            )


def _check_rules(tx: Connection, path: Path) -> None:
    """Try the rules that a row keeps for ever on all rows."""
    words = _words(tx)
    lasting = [rule for rule in RULES if rule.name in _LASTING_RULES]
    assert len(lasting) == len(_LASTING_RULES)
    for rule in lasting:
        condition = re.sub(r"\bNEW\.", "checked.", rule.spoken(words).condition)
        key = next(iter(schema.metadata.tables[rule.table].primary_key)).name
        broken = tx.exec_driver_sql(
            f"SELECT checked.{key} FROM {rule.table} checked WHERE {condition} LIMIT 1"
        ).first()
        if broken is not None:
            reason = rule.message.partition(": ")[2]
            raise _inconsistent(path, f"in {rule.table}, row {broken[0]}: {reason}")
    unfinished = tx.exec_driver_sql(
        "SELECT r.id FROM runs r JOIN leases l ON l.token = r.token"
        " WHERE l.run_id <> r.id OR l.state <> 'finished' LIMIT 1"
    ).first()
    if unfinished is not None:
        raise _inconsistent(path, f"run {unfinished[0]} is not the end of its lease")


def _words(tx: Connection) -> Mapping[str, str]:
    """What the placeholders of the rules mean to this database."""
    if tx.dialect.name == "postgresql":
        from society.memory.postgres import WORDS as POSTGRES

        return POSTGRES
    return SQLITE


def _count_runs(tx: Connection) -> None:
    """Fill the tallies, in the order in which the runs were made."""
    runs = schema.runs
    query = select(runs.c.scope, runs.c.society, runs.c.kind, runs.c.outcome, runs.c.cost)
    sums: dict[tuple[Any, ...], list[float]] = {}
    found = tx.execute(query.order_by(runs.c.number).execution_options(yield_per=BATCH))
    for *key, words in found:
        cost = json.loads(words)
        total = sums.setdefault(tuple(key), [0, 0.0, 0.0])
        for place, value in enumerate((1, cost["wall_s"], cost["flops"])):
            total[place] += value
    names = [column.name for column in schema.tallies.columns]
    if sums:
        values = [dict(zip(names, (*key, *total), strict=True)) for key, total in sums.items()]
        tx.execute(insert(schema.tallies), values)


def _inconsistent(path: Path, problem: str) -> UsageError:
    return UsageError(f"{path} breaks a rule of the notebook: {problem}. Nothing was imported.")
