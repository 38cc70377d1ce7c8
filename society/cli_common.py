"""What the commands share: options, output as text or JSON, and how a notebook is opened."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from society.cleaning import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from society.experiments.space import Space
    from society.experiments.task import Task
    from society.memory.reader import LedgerReader
    from society.records import Scope, SocietyRecord

Lab = Annotated[Path, typer.Option("--lab", help="Folder of the notebook.", show_default=True)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
LAB = Path("lab")


@dataclass(frozen=True, slots=True)
class Opened:
    """A notebook opened for reading, and what its last society works on."""

    ledger: LedgerReader
    record: SocietyRecord
    """The folder's last society; the ledger's last one where the folder has had none."""
    scope: Scope
    task: Task
    space: Space
    others: tuple[SocietyRecord, ...]
    """Societies of other folders on the same ledger, without studies."""


@contextmanager
def reading(lab: Path) -> Iterator[LedgerReader]:
    """The ledger of a notebook, read-only, also beside the process that writes to it.

    Raises:
        NotANotebook: There is none, or nothing has happened in it yet.
    """
    from society.errors import NotANotebook
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger

    with Ledger.open(NotebookFolder(lab).require().ledger, read_only=True) as ledger:
        if not ledger.societies():
            raise NotANotebook(f"The notebook {lab} is empty: no society has worked in it yet.")
        yield ledger


@contextmanager
def opened(lab: Path) -> Iterator[Opened]:
    """A notebook read-only with its last society, also beside the process that writes to it.

    Raises:
        NotANotebook: There is none, or no society has worked in it yet.
    """
    from society.errors import NotANotebook
    from society.experiments.space import Space
    from society.memory.folder import NotebookFolder

    with reading(lab) as ledger:
        everybody = [record for record in ledger.societies() if not record.is_study]
        own, scopes = NotebookFolder(lab).own(everybody), ledger.scopes()
        records = own or everybody
        if not records or not scopes:
            raise NotANotebook(f"No society has worked in the notebook {lab} yet.")
        task = task_of(records[-1])
        scope = _latest_scope(ledger, scopes, task.key, records[-1].id)
        known = {one.id for one in (*own, records[-1])}
        others = tuple(one for one in everybody if one.id not in known)
        yield Opened(ledger, records[-1], scope, task, Space.of(task), others)


def task_of(record: SocietyRecord) -> Task:
    """The task that a society works on, from its recorded settings."""
    from society.experiments.task import known_profiles, load_task

    name = str(record.settings["task"])
    profile = record.settings.get("profile") or next(iter(known_profiles(name)), None)
    return load_task(name, str(profile))


def _latest_scope(ledger: LedgerReader, scopes: Sequence[Scope], key: str, society: str) -> Scope:
    """The scope of the society's last run; before it, of the task's; of its baseline before any."""
    from society.records import SOCIETY_KINDS

    mine = [scope for scope in scopes if scope.task == key] or list(scopes)
    for whose in (society, None):
        made = {
            scope: ledger.runs(scope, kinds=SOCIETY_KINDS, society=whose, last=1) for scope in mine
        }
        last = {scope: runs[-1].number for scope, runs in made.items() if runs}
        if last:
            return max(last, key=lambda scope: last[scope])
    return mine[-1]


def studies_of(ledger: LedgerReader) -> list[dict[str, Any]]:
    """The latest study of each kind, task and tier, each with one sentence about its result."""
    latest = {(study.scope, study.kind): study for study in ledger.studies()}
    return [
        {
            "id": study.id,
            "kind": study.kind,
            "task": study.scope.task,
            "tier": study.scope.tier,
            "title": study.title,
            "concluded": study.result is not None,
            "words": f"{study.id} {study.title}: not concluded; the same command goes on"
            if study.result is None
            else f"{study.id} {study.result.get('summary', study.title)}",
        }
        for study in latest.values()
    ]


def plain(value: Any) -> Any:
    """A record as JSON types: dataclasses become objects, enums their value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def emit_json(value: Any) -> None:
    """Print a value as indented JSON; numbers that JSON does not know become strings."""
    typer.echo(json.dumps(finite(plain(value)), indent=2))


def finite(value: Any) -> Any:
    """The value with infinities and NaN as strings, so that every JSON parser can read it."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def emit_table(rows: Iterable[Sequence[object]], *, gap: str = "  ") -> None:
    """Print rows in aligned columns; the last column is as long as it is."""
    lines = [[visible(cell) for cell in row] for row in rows]
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        typer.echo(gap.join(cells).rstrip())


def emit_fields(values: Mapping[str, object], indent: str = "") -> None:
    """Print `name  value` lines, names aligned."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        typer.echo(f"{indent}{visible(name).ljust(width)}  {visible(value)}")
