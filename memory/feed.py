"""What lines of the outbox are about, read for prose: a query per kind, whatever their number.

The semantic index is fed in batches of a thousand lines; asking the ledger for each record by
itself would take longer than embedding and indexing them all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select

from society.memory import rows
from society.memory.schema import (
    champions,
    claims,
    hypotheses,
    insights,
    noise,
    priors,
    runs,
    scopes,
    variants,
    verdicts,
)
from society.records import Claim, Hypothesis, Insight, Outcome, Prior, RunKind, Scope, Variant

if TYPE_CHECKING:
    from sqlalchemy import Column, RowMapping, Table

BATCH = 1000
"""Lines of the outbox at a time: below every database's limit on variables of a query."""


@dataclass(frozen=True, slots=True)
class Posted:
    """One line of the outbox: something the semantic index should read."""

    seq: int
    kind: str
    """`run`, `claim`, `verdict`, `insight`, `hypothesis` or `prior`."""
    ref: str
    """Id of the record; of the claim for a verdict."""


@dataclass(frozen=True, slots=True)
class Screened:
    """What prose tells of a screening run. It has no seed and no split."""

    id: str
    scope: Scope
    society: str
    agent: str
    variant: Variant
    outcome: Outcome
    score: float | None
    idea: str
    finished_at: float


@dataclass(frozen=True, slots=True)
class Reign:
    """A champion, from when it was one, and what proposals were compared with."""

    since: float
    variant: Variant
    run: str | None
    """Its screening run."""
    score: float | None
    """Screening score, on the same seed as every proposal's."""


@dataclass(frozen=True, slots=True)
class Floor:
    """A noise floor, from when it was known."""

    since: float
    sd: float


@dataclass(frozen=True, slots=True)
class Records:
    """Records by id, with what was known when they were made."""

    runs: Mapping[str, Screened]
    claims: Mapping[str, Claim]
    hypotheses: Mapping[str, tuple[Scope, Hypothesis]]
    insights: Mapping[str, Insight]
    priors: Mapping[str, Prior]
    reigns: Mapping[Scope, tuple[Reign, ...]]
    floors: Mapping[Scope, tuple[Floor, ...]]


def read(tx: Connection, posted: Sequence[Posted]) -> Records:
    """Everything that prose about these lines needs; runs that are no screenings are left out."""
    wanted: dict[str, set[str]] = {}
    for line in posted:
        wanted.setdefault(line.kind, set()).add(line.ref)
    about = wanted.get("claim", set()) | wanted.get("verdict", set())
    ideas = _rows(tx, hypotheses, hypotheses.c.id, wanted.get("hypothesis", ()))
    tests = {row["run_id"] for row in ideas if row["run_id"] is not None}
    screened = _screened(tx, wanted.get("run", set()) | tests)
    filed = _rows(tx, claims, claims.c.id, about)
    reigning = tx.execute(_REIGNS).mappings().all()
    named = {row["variant"] for row in (*ideas, *screened, *filed, *reigning)}
    known = _variants(tx, named | {row["reference"] for row in filed})
    places = {
        number: Scope(task, tier)
        for number, task, tier in tx.execute(select(scopes.c.number, scopes.c.task, scopes.c.tier))
    }
    closed = {
        row["claim_id"]: rows.to_verdict(row, ())
        for row in sorted(_rows(tx, verdicts, verdicts.c.claim_id, about), key=_number)
    }
    return Records(
        runs={row["id"]: _to_screened(row, known, places) for row in screened},
        claims={row["id"]: rows.to_claim(row, known, closed.get(row["id"])) for row in filed},
        hypotheses={
            row["id"]: (places[row["scope"]], rows.to_hypothesis(row, known)) for row in ideas
        },
        insights={
            row["id"]: rows.to_insight(row)
            for row in _rows(tx, insights, insights.c.id, wanted.get("insight", ()))
        },
        priors={
            row["id"]: rows.to_prior(row)
            for row in _rows(tx, priors, priors.c.id, wanted.get("prior", ()))
        },
        reigns=_by_scope(places, reigning, lambda row: _to_reign(row, known)),
        floors=_by_scope(
            places,
            tx.execute(select(noise).order_by(noise.c.number)).mappings().all(),
            lambda row: Floor(row["measured_at"], row["sd"]),
        ),
    )


_REIGNS = (
    select(
        champions.c.scope, champions.c.since, champions.c.variant,
        runs.c.id.label("run"), runs.c.score,
    )
    .outerjoin(runs, runs.c.id == champions.c.screening_run)
    .order_by(champions.c.scope, champions.c.number)
)  # fmt: skip


def _rows(
    tx: Connection, table: Table, column: Column[Any], ids: Collection[str]
) -> Sequence[RowMapping]:
    found: list[RowMapping] = []
    for some in _chunks(ids):
        found.extend(tx.execute(select(table).where(column.in_(some))).mappings())
    return found


def _chunks(ids: Collection[str]) -> Sequence[Sequence[str]]:
    ordered = sorted(ids)
    return [ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH)]


def _screened(tx: Connection, ids: Collection[str]) -> Sequence[RowMapping]:
    columns = [
        runs.c[name]
        for name in (
            "id", "scope", "society", "agent", "variant", "outcome", "score", "idea", "finished_at",
        )
    ]  # fmt: skip
    found: list[RowMapping] = []
    for some in _chunks(ids):
        query = select(*columns).where(runs.c.id.in_(some), runs.c.kind == RunKind.SCREENING.value)
        found.extend(tx.execute(query).mappings())
    return found


def _variants(tx: Connection, fingerprints: Collection[str]) -> rows.Variants:
    return {
        row["fingerprint"]: rows.to_variant(row)
        for row in _rows(tx, variants, variants.c.fingerprint, fingerprints)
    }


def _to_screened(row: RowMapping, known: rows.Variants, places: Mapping[int, Scope]) -> Screened:
    return Screened(
        id=row["id"],
        scope=places[row["scope"]],
        society=row["society"],
        agent=row["agent"],
        variant=known[row["variant"]],
        outcome=Outcome(row["outcome"]),
        score=row["score"],
        idea=row["idea"],
        finished_at=row["finished_at"],
    )


def _to_reign(row: RowMapping, known: rows.Variants) -> Reign:
    return Reign(row["since"], known[row["variant"]], row["run"], row["score"])


def _by_scope(
    places: Mapping[int, Scope], found: Sequence[RowMapping], make: Any
) -> Mapping[Scope, tuple[Any, ...]]:
    told: dict[Scope, list[Any]] = {}
    for row in found:
        told.setdefault(places[row["scope"]], []).append(make(row))
    return {scope: tuple(ones) for scope, ones in told.items()}


def _number(row: RowMapping) -> int:
    return int(row["number"])
