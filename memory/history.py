"""Results that people bring along: a `results.tsv` as autoresearch loops write it.

One line per experiment, tab-separated, below a header such as

    commit  val_bpb  memory_gb  status  description

They become priors: prose that agents and people find by meaning. Nobody here made these runs, so
their scores are compared with nothing and are evidence for nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from society.errors import UsageError
from society.records import NewPrior, Scope, SocietyState

if TYPE_CHECKING:
    from society.memory.ledger import Ledger

ELSEWHERE = "elsewhere"
"""Tier of what was run on hardware that nobody knows here: no run is ever on it."""

SCORES = ("val_bpb", "score")
"""Names of the column with the score; the first that is there counts."""

_KNOWN = ("commit", *SCORES, "status", "description")


@dataclass(frozen=True, slots=True)
class Brought:
    """What an import of results did."""

    added: int
    known: int
    """Rows that had been imported before."""
    society: str | None
    """The record they were added under; None when nothing was new."""


def read_results(path: Path, source: str) -> tuple[NewPrior, ...]:
    """The rows of a `results.tsv`.

    Empty lines and lines that begin with `#` are skipped; columns may be missing, and those that
    are not known are kept in the description. The score of a crash is no score.

    Args:
        path: The file, UTF-8.
        source: What the rows are said to come from.

    Raises:
        UsageError: it cannot be read; names the line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read: {reason}.") from error
    return tuple(parse_results(text.replace("\0", ""), source, str(path)))


def parse_results(text: str, source: str, name: str) -> Iterator[NewPrior]:
    """`read_results` of a text; `name` is what messages call it."""
    lines = ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1))
    filled = ((number, line) for number, line in lines if line.strip() and line[0] != "#")
    number, first = next(filled, (1, ""))
    header = _header(first, f"{name}, line {number}")
    seen: Counter[tuple[str, str]] = Counter()
    for number, line in filled:
        row = _row(header, line, f"{name}, line {number}")
        prior = _prior(row, source, f"{name}, line {number}", row.get("commit") or f"line {number}")
        seen[prior.label, prior.description] += 1
        times = seen[prior.label, prior.description]
        yield prior if times == 1 else _again(prior, times)


def bring(
    ledger: Ledger,
    priors: Sequence[NewPrior],
    *,
    task_key: str,
    settings: Mapping[str, object],
    home: str = "",
) -> Brought:
    """Write those priors down that the ledger does not hold yet, all in one transaction.

    Args:
        ledger: Where to.
        priors: From `read_results`.
        task_key: The task they are about, e.g. `pretrain/cpu`.
        settings: Kept with the record that they belong to: `task`, `profile`.
        home: Identity of the notebook folder.
    """
    scope = Scope(task_key, ELSEWHERE)
    held = {(one.source, one.label, one.description) for one in ledger.priors(scope)}
    new = [one for one in priors if (one.source, one.label, one.description) not in held]
    if not new:
        return Brought(0, len(priors), None)
    record = ledger.start_society(0, {**settings, "study": "history"}, home=home)
    try:
        ledger.commit(scope, record.id, "history", new, key=f"history/{record.id}")
    finally:
        ledger.set_society_state(record.id, SocietyState.FINISHED)
    return Brought(len(new), len(priors) - len(new), record.id)


def _header(line: str, where: str) -> list[str]:
    names = [cell.strip().lower() for cell in line.split("\t")]
    if not {"commit", "description"} & set(names) or len(set(names)) < len(names):
        raise UsageError(
            f"{where}: expected a header of tab-separated names like `commit val_bpb memory_gb "
            f"status description`, found {line[:60]!r}."
        )
    return names


def _row(header: Sequence[str], line: str, where: str) -> dict[str, str]:
    """Cells by column; a description may hold tabs if it comes last."""
    cells = line.split("\t")
    if len(cells) > len(header):
        if header[-1] != "description":
            raise UsageError(f"{where}: {len(cells)} cells for {len(header)} columns.")
        cells[len(header) - 1 :] = [" ".join(cells[len(header) - 1 :])]
    return dict(zip(header, (cell.strip() for cell in cells), strict=False))


def _prior(row: Mapping[str, str], source: str, where: str, label: str) -> NewPrior:
    status = row.get("status", "").lower() or "unknown"
    described = row.get("description") or "no description"
    rest = [f"{name} {cell}" for name, cell in row.items() if name not in _KNOWN and cell]
    return NewPrior(
        source=source,
        label=label,
        score=None if status == "crash" else _score(row, where),
        status=status,
        description=f"{described} ({', '.join(rest)})" if rest else described,
    )


def _score(row: Mapping[str, str], where: str) -> float | None:
    name = next((name for name in SCORES if name in row), None)
    if name is None or not row[name]:
        return None
    try:
        score = float(row[name])
    except ValueError:
        raise UsageError(f"{where}: {name} is {row[name]!r}, expected a number.") from None
    return score if math.isfinite(score) else None


def _again(prior: NewPrior, times: int) -> NewPrior:
    """The same experiment once more in one file: a result of its own."""
    return NewPrior(
        prior.source, f"{prior.label} #{times}", prior.score, prior.status, prior.description
    )
