"""The format of an exported memory: JSON Lines, or a folder of Parquet files.

The first line of a JSON Lines file, or `memory.json` beside Parquet files, is the header. Then come
the rows of the ledger's tables, one after the other. Nothing is rounded: floats have all digits,
and a text that holds JSON is written as what it holds only where that says it exactly. Files are
written and read piece by piece, so that their size does not matter; what is written appears under
its name when it is complete.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sqlalchemy import Column, Float, Integer, Table

from society.errors import UsageError
from society.memory import schema

if TYPE_CHECKING:
    import pyarrow

FORMAT = "society memory"
FORMAT_VERSION = 1
HEADER_FILE = "memory.json"
BATCH = 1000
"""Rows that are held in memory at a time."""

TABLES: Mapping[str, Table] = {
    name: table for name, table in schema.metadata.tables.items() if name != "tallies"
}
"""What is exported, in this order; tallies are counted again."""


class _Kind(StrEnum):
    """What a column holds."""

    WHOLE = "whole"
    REAL = "real"
    TEXT = "text"
    JSON = "json"
    """A JSON object or list as text."""


_JSON = {
    "societies": {"settings"},
    "variants": {"overrides"},
    "runs": {"cost", "environment", "curve"},
    "verdicts": {"effect"},
    "insights": {"evidence"},
    "studies": {"plan"},
    "study_results": {"result"},
}
"""Columns of the kind JSON."""


def _kind(column: Column[Any]) -> _Kind:
    if isinstance(column.type, Integer):
        return _Kind.WHOLE
    if isinstance(column.type, (Float, schema.Real)):
        return _Kind.REAL
    return _Kind.JSON if column.name in _JSON.get(column.table.name, ()) else _Kind.TEXT


_KINDS = {
    name: {column.name: _kind(column) for column in table.columns} for name, table in TABLES.items()
}
"""Table -> column -> what it holds."""

PRIVATE = ("schema", "id", "secret", "origin")
"""Rows of `meta` that belong to a ledger and not to its contents."""


class Format(StrEnum):
    """How an export is written."""

    JSONL = "jsonl"
    """One object per line; compressed if the file's name ends in `.gz`."""
    PARQUET = "parquet"
    """A folder with one file per table."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an export says about itself."""

    format: str
    version: int
    """Version of the export's own format."""
    schema: int
    """Version of the ledger's tables."""
    ledger: str
    """Identity of the ledger in which the records were first made."""
    rows: Mapping[str, int]
    """Rows by table."""

    @property
    def total(self) -> int:
        """Rows of all tables."""
        return sum(self.rows.values())


Row = tuple[str, str, dict[str, Any]]
"""Where it was read (`line 7`), its table, and its columns."""


Stored = Callable[[Table], Iterator[dict[str, Any]]]
"""The rows of a table as they are stored, in a fixed order."""


# --- writing -------------------------------------------------------------------------------------


def write_lines(header: Header, rows: Stored, out: Path | IO[str]) -> None:
    """Write JSON Lines to a stream, or to a file that is compressed if its name ends in `.gz`.

    Raises:
        UsageError: the file cannot be written.
    """
    if isinstance(out, Path):
        with _draft_file(out) as stream:
            write_lines(header, rows, stream)
        return
    stream = out
    stream.write(json.dumps(asdict(header)) + "\n")
    for name, table in TABLES.items():
        translated = [key for key, kind in _KINDS[name].items() if kind in (_Kind.REAL, _Kind.JSON)]
        for row in rows(table):
            for key in translated:
                row[key] = _spoken(row[key])
            stream.write(json.dumps({"table": name, **row}, allow_nan=False) + "\n")


def _spoken(value: float | str | None) -> Any:
    """A number or a text of JSON as JSON says it; the text as it is, if that would not be exact."""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        with suppress(ValueError):
            found = json.loads(value)
            if isinstance(found, (dict, list)) and _written(found) == value:
                return found
    return value


def _written(value: Any) -> str:
    """JSON as the ledger stores it; the order of keys is that of the value."""
    return json.dumps(value, allow_nan=False)


def write_parquet(header: Header, rows: Stored, out: Path) -> None:
    """Write a folder of Parquet files.

    Raises:
        UsageError: it cannot be written, or there is something in it.
    """
    with _draft_folder(out) as folder:
        _write_tables(header, rows, folder)


def _write_tables(header: Header, rows: Stored, folder: Path) -> None:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetWriter

    (folder / HEADER_FILE).write_text(json.dumps(asdict(header), indent=2) + "\n", "utf-8")
    for name, table in TABLES.items():
        shape = _shape(table)
        with ParquetWriter(folder / f"{name}.parquet", shape) as writer:
            left = rows(table)
            while some := list(islice(left, BATCH)):
                writer.write_batch(RecordBatch.from_pylist(some, schema=shape))


def _shape(table: Table) -> pyarrow.Schema:
    import pyarrow

    types = {_Kind.WHOLE: pyarrow.int64(), _Kind.REAL: pyarrow.float64()}
    return pyarrow.schema(
        [(name, types.get(kind, pyarrow.string())) for name, kind in _KINDS[table.name].items()]
    )


@contextmanager
def _draft_file(out: Path) -> Iterator[IO[str]]:
    """A file that appears under its name when it is complete."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as raw:
            if out.name.endswith(".gz"):
                with (
                    gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,  # the same bytes each time
                    io.TextIOWrapper(packed, "utf-8", newline="\n") as stream,
                ):
                    yield stream
            else:
                with io.TextIOWrapper(raw, "utf-8", newline="\n") as stream:
                    yield stream
        draft.replace(out)
    except OSError as error:
        raise UsageError(f"Cannot write {out}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def _draft_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"Cannot write {out}: it exists already. Name a new folder.")
        draft.mkdir(parents=True)
        yield draft
        draft.replace(out)
    except OSError as error:
        raise UsageError(f"Cannot write {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# --- reading -------------------------------------------------------------------------------------


def is_export(path: Path) -> bool:
    """Whether a file or folder is, or claims to be, an export of a memory.

    Raises:
        UsageError: it cannot be read.
    """
    if path.is_dir():
        return True
    try:
        with _text(path) as stream:
            return stream.read(1) == "{"
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def read_header(path: Path) -> Header:
    """The header of an export.

    Raises:
        UsageError: there is none, or it is of a version that cannot be read here.
    """
    try:
        if path.is_dir():
            first = (path / HEADER_FILE).read_text("utf-8")
        else:
            with _text(path) as stream:
                first = stream.readline()
        found = json.loads(first)
        header = Header(**{field.name: found[field.name] for field in fields(Header)})
        if header.format != FORMAT or not isinstance(header.rows, dict):
            raise ValueError("it is not of this format")
    except FileNotFoundError as error:
        raise UsageError(
            f"No export of a memory at {path}: {error.filename} is missing."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} does not begin with the header of an exported memory. Make one with "
            "`society memory export`."
        ) from error
    _check_versions(header, path)
    return header


def _check_versions(header: Header, path: Path) -> None:
    if header.version != FORMAT_VERSION or header.schema != schema.SCHEMA_VERSION:
        newer = (header.version, header.schema) > (FORMAT_VERSION, schema.SCHEMA_VERSION)
        advice = (
            "Import it with the version of society that wrote it, or a newer one."
            if newer
            else "Upgrade the ledger it was made from with `society memory upgrade`, and export it "
            "again."
        )
        raise UsageError(
            f"{path} has format {header.version} and schema {header.schema}; this version of "
            f"society reads format {FORMAT_VERSION} and schema {schema.SCHEMA_VERSION}. {advice}"
        )


def read_rows(path: Path) -> Iterator[Row]:
    """All rows of an export, checked against the columns of their tables.

    Raises:
        UsageError: something is not as it should be; names the line or the file.
    """
    try:
        yield from _parquet_rows(path) if path.is_dir() else _line_rows(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _line_rows(path: Path) -> Iterator[Row]:
    with _text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                continue
            where = f"line {number}"
            try:
                values = json.loads(line)
                name = values.pop("table")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise bad(
                    path, where, "it is no row of a table; the file may be cut off"
                ) from error
            yield where, name, _checked(path, where, name, values)


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    unknown = sorted({file.stem for file in path.glob("*.parquet")} - set(TABLES))
    if unknown:
        raise bad(path, f"{unknown[0]}.parquet", f"there is no table {unknown[0]!r}")
    for name in TABLES:
        count = 0
        try:
            with ParquetFile(path / f"{name}.parquet") as file:
                for batch in file.iter_batches(BATCH):
                    for values in batch.to_pylist():
                        count += 1
                        where = f"{name}.parquet, row {count}"
                        yield where, name, _checked(path, where, name, values)
        except ArrowException as error:
            reason = f"it is no Parquet file, or damaged ({str(error).splitlines()[0]})"
            raise bad(path, f"{name}.parquet", reason) from error


def _checked(path: Path, where: str, name: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a row as they are stored."""
    kinds = _KINDS.get(name) if isinstance(name, str) else None
    if kinds is None:
        raise bad(path, where, f"there is no table {name!r}")
    if values.keys() != kinds.keys():
        unknown, missing = values.keys() - kinds.keys(), kinds.keys() - values.keys()
        problem = (
            f"{name} has no column {min(unknown)!r}"
            if unknown
            else f"the column {min(missing)!r} of {name} is missing"
        )
        raise bad(path, where, problem)
    if name == "meta" and values["key"] in PRIVATE:
        raise bad(path, where, f"{values['key']!r} of a ledger cannot be imported")
    stored = {key: _value(value, kinds[key]) for key, value in values.items()}
    if _WRONG in stored.values():
        key = next(key for key, value in stored.items() if value is _WRONG)
        raise bad(path, where, f"{name}.{key} cannot be {values[key]!r:.60}")
    return stored


_WRONG: Any = object()
"""Stands for a value that its column cannot hold."""


def _value(value: Any, kind: _Kind) -> Any:
    """A value as it is stored, or `_WRONG`."""
    found = type(value)
    if (
        value is None
        or (found is str and kind in (_Kind.TEXT, _Kind.JSON))
        or (found is int and kind is _Kind.WHOLE)
    ):
        return value
    if kind is _Kind.REAL and (found in (int, float) or value in ("Infinity", "-Infinity")):
        return float(value)
    if kind is _Kind.JSON and found in (dict, list):
        return _written(value)
    return _WRONG


@contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    """A text file, compressed or not."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        source: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(source, "utf-8") as stream:
            yield stream


def bad(path: Path, where: str, problem: str) -> UsageError:
    """The error for a place in an export that is not as it should be."""
    return UsageError(f"{path}, {where}: {problem}. Nothing was imported.")


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UsageError(f"{path} cannot be read: {reason}. Nothing was imported.")
