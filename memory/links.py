"""What is linked to one record: a few queries by its id, never a walk over the whole notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, exists, func, or_, select

from society.memory import rows
from society.memory.schema import (
    champions,
    claims,
    hypotheses,
    insights,
    priors,
    refusals,
    runs,
    scopes,
    societies,
    studies,
    study_runs,
    verdict_runs,
    verdicts,
)
from society.records import Refusal, Scope

_TABLES: Mapping[str, Any] = {
    "run": runs,
    "claim": claims,
    "hypothesis": hypotheses,
    "insight": insights,
    "study": studies,
    "prior": priors,
    "society": societies,
}
"""Kinds of records that have an id of their own."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What an id names."""

    kind: str
    """`run`, `claim`, `hypothesis`, `insight`, `study`, `prior` or `society`."""
    scope: Scope | None
    """Task and tier it belongs to; None for a society."""


@dataclass(frozen=True, slots=True)
class Links:
    """Ids of what is linked to a record, in order of recording."""

    runs: tuple[str, ...] = ()
    """Of the same variant, on the same task and tier."""
    made_for: tuple[str, ...] = ()
    """Runs made for a claim."""
    claims: tuple[str, ...] = ()
    """About the variant, or resting on the run."""
    hypotheses: tuple[str, ...] = ()
    """About the variant."""
    insights: tuple[str, ...] = ()
    """That cite the record."""
    studies: tuple[str, ...] = ()
    """That rest on the run."""
    refusals: tuple[Refusal, ...] = ()
    """That name the run, or refused the variant."""
    crowned: tuple[int, ...] = ()
    """Places in the champion history of the same task and tier that the variant has had."""


def whereabouts(tx: Connection, id: str) -> Whereabouts | None:
    """What an id names; None if nothing does."""
    for kind, table in _TABLES.items():
        if kind == "society":
            found = tx.execute(select(table.c.id).where(table.c.id == id)).first()
            if found is not None:
                return Whereabouts(kind, None)
            continue
        query = (
            select(scopes.c.task, scopes.c.tier)
            .join(table, table.c.scope == scopes.c.number)
            .where(table.c.id == id)
        )
        row = tx.execute(query).first()
        if row is not None:
            return Whereabouts(kind, Scope(row.task, row.tier))
    return None


def latest(tx: Connection) -> dict[str, str]:
    """The latest id of each kind that there is any record of."""
    found = {}
    for kind, table in _TABLES.items():
        last = tx.execute(select(table.c.id).order_by(table.c.number.desc()).limit(1)).scalar()
        if last is not None:
            found[kind] = str(last)
    return found


def about(
    tx: Connection, id: str, where: Whereabouts, fingerprint: str | None, known: rows.Variants
) -> Links:
    """What is linked to a record.

    Args:
        tx: A read.
        id: The record's id.
        where: What it is.
        fingerprint: Of its variant, if it has one.
        known: The ledger's variants.
    """
    citing = select(insights.c.id).where(insights.c.evidence.contains(f'"{id}"', autoescape=True))
    if where.scope is None or fingerprint is None:
        return Links(insights=_ids(tx, citing.order_by(insights.c.number)))
    scope = (
        select(scopes.c.number)
        .where(scopes.c.task == where.scope.task, scopes.c.tier == where.scope.tier)
        .scalar_subquery()
    )

    def here(table: Any, *columns: str) -> Select[Any]:
        same = or_(*(table.c[name] == fingerprint for name in columns or ("variant",)))
        return select(table.c.id).where(table.c.scope == scope, same).order_by(table.c.number)

    return Links(
        runs=_ids(tx, here(runs).where(runs.c.id != id)),
        made_for=_ids(tx, select(runs.c.id).where(runs.c.claim_id == id).order_by(runs.c.number)),
        claims=_ids(tx, _claims_about(id, scope, fingerprint, where.kind)),
        hypotheses=_ids(tx, here(hypotheses).where(hypotheses.c.id != id)),
        insights=_ids(tx, citing.order_by(insights.c.number)),
        studies=_ids(tx, select(study_runs.c.study).where(study_runs.c.run_id == id)),
        refusals=_refusals(tx, id, scope, fingerprint, known),
        crowned=tuple(
            tx.execute(
                select(champions.c.number)
                .where(champions.c.scope == scope, champions.c.variant == fingerprint)
                .order_by(champions.c.number)
            ).scalars()
        ),
    )


def _refusals(
    tx: Connection, id: str, scope: Any, fingerprint: str, known: rows.Variants
) -> tuple[Refusal, ...]:
    query = select(refusals).where(
        refusals.c.scope == scope,
        or_(refusals.c.variant == fingerprint, refusals.c.run_id == id),
    )
    found = tx.execute(query.order_by(refusals.c.number)).mappings().all()
    return tuple(rows.to_refusal(row, known) for row in found)


def _claims_about(id: str, scope: Any, fingerprint: str, kind: str) -> Select[Any]:
    """Claims that a run prompted, serves or decided; otherwise all on the variant."""
    query = select(claims.c.id).where(claims.c.id != id).order_by(claims.c.number)
    if kind != "run":
        return query.where(claims.c.scope == scope, claims.c.variant == fingerprint)
    cites = exists().where(
        and_(
            verdicts.c.claim_id == claims.c.id,
            verdict_runs.c.verdict == verdicts.c.number,
            verdict_runs.c.run_id == id,
        )
    )
    made_for = exists().where(runs.c.id == id, runs.c.claim_id == claims.c.id)
    return query.where(claims.c.scope == scope, or_(claims.c.screening_run == id, cites, made_for))


def held(tx: Connection, society: str) -> dict[str, int]:
    """How many records of each kind a society has made."""
    tables = (runs, claims, hypotheses, insights, studies, priors, refusals)
    return {
        table.name: int(
            tx.execute(
                select(func.count()).select_from(table).where(table.c.society == society)
            ).scalar_one()
        )
        for table in tables
    }


def _ids(tx: Connection, query: Select[Any]) -> tuple[str, ...]:
    return tuple(tx.execute(query).scalars())
