"""Searching a notebook by meaning: with its index, or passage by passage where that is in use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from society.cli_common import task_of
from society.errors import RecallUnavailable, UnknownName, UsageError
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import Filter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from society.memory.reader import LedgerReader

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([mhdw])")
_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True, slots=True)
class Found:
    """One passage that was found."""

    similarity: float
    """Cosine, at most 1."""
    kind: str
    ref: str
    """Id of the record."""
    text: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which passages count, as the command line says it; None lets all pass."""

    kind: str | None = None
    knob: str | None = None
    outcome: str | None = None
    agent: str | None = None
    since: str | None = None
    until: str | None = None

    def filter(self, ledger: LedgerReader) -> Filter:
        """The filter that is meant.

        Raises:
            UnknownName: there is no such kind, outcome or knob.
            UsageError: a time cannot be read.
        """
        now = ledger.now()
        where = Filter(
            kinds=None if self.kind is None else (self.kind,),
            knob=self.knob,
            outcome=self.outcome,
            agent=self.agent,
            since=None if self.since is None else moment("--since", self.since, now),
            until=None if self.until is None else moment("--until", self.until, now),
        ).check()
        if self.knob is not None:
            _check_knob(ledger, self.knob)
        return where


def find(lab: Path, text: str, k: int, wanted: Wanted, note: Callable[[str], None]) -> list[Found]:
    """The `k` passages nearest in meaning, nearest first.

    Args:
        lab: The notebook's folder.
        text: A question, a statement or knob names.
        k: How many at most.
        wanted: Which passages count.
        note: Told why the index was not used, if it was not.
    """
    from society.memory.recall import OFF, Recall

    folder = NotebookFolder(lab).require()
    with Ledger.open(folder.ledger) as ledger:
        where, lower = wanted.filter(ledger), lower_is_better(ledger)
        try:
            with Recall.open(folder, ledger, lower_is_better=lower) as recall:
                recall.sync(ledger)
                hits = recall.search(text, k, where)
        except RecallUnavailable as error:
            if folder.recall_address != OFF:
                note(f"note: {error} Searching without it.")
            return _scan(lab, text, k, where, lower)
    return [Found(round(hit.similarity, 4), hit.kind, hit.ref, hit.text) for hit in hits]


def _scan(lab: Path, text: str, k: int, where: Filter, lower: bool) -> list[Found]:
    from society.memory.frames import Memory

    with Memory(lab, lower_is_better=lower) as memory:
        rows: list[dict[str, Any]] = memory.search(text, k, where).to_dict("records")  # type: ignore[assignment]
    return [
        Found(round(one["similarity"], 4), one["kind"], one["ref"], one["text"]) for one in rows
    ]


def moment(option: str, text: str, now: float) -> float:
    """A time as Unix seconds: `2h` or `3d` ago, or a date, in UTC unless it says otherwise.

    Raises:
        UsageError: it is none of them.
    """
    ago = _AGO.fullmatch(text.strip())
    if ago is not None:
        return now - float(ago[1]) * _SECONDS[ago[2]]
    try:
        read = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is no time; write how long ago it was (30m, 2h, 3d, 1w), or a "
            "date: 2026-03-01, or 2026-03-01T12:30 (UTC)."
        ) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def _check_knob(ledger: LedgerReader, knob: str) -> None:
    """Accept a knob of the last society's task, or one that some passage is about."""
    from society.experiments.space import Space
    from society.memory.prose import Prose

    records = ledger.societies()
    known = {name for one in records[-1:] for name in Space.of(task_of(one)).knobs}
    if knob in known or any(knob in one.knobs for one in Prose(ledger).all()):
        return
    raise UnknownName("knob", knob, known)


def lower_is_better(ledger: LedgerReader) -> bool:
    """Whether lower scores are better in the task of the last society."""
    records = ledger.societies()
    return not records or task_of(records[-1]).direction.sign < 0
