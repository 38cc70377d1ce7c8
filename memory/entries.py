"""How each kind of `Entry` is written: one short function each, inside the commit's transaction."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, func, insert, literal_column, select, update

from society.errors import InvariantViolated
from society.memory import schema
from society.memory.rows import dump, study_text, variant_values
from society.records import (
    Crown,
    Decision,
    Entry,
    HypothesisState,
    HypothesisTaken,
    HypothesisTested,
    NewClaim,
    NewHypothesis,
    NewInsight,
    NewStudy,
    Noise,
    Scope,
    StudyResult,
    Variant,
    Verdict,
)

CLOCK: Any = literal_column(schema.CLOCK)
"""The database's clock as an SQL expression."""


@dataclass(frozen=True, slots=True)
class Author:
    """Who commits, and where."""

    scope: int
    society: str
    agent: str


def scope_number(tx: Connection, scope: Scope, *, create: bool) -> int | None:
    """Number of a scope; None when it is unknown and not to be created."""
    known = select(schema.scopes.c.number).where(
        schema.scopes.c.task == scope.task, schema.scopes.c.tier == scope.tier
    )
    number = tx.execute(known).scalar()
    if number is None and create:
        tx.execute(insert(schema.scopes).values(task=scope.task, tier=scope.tier))
        number = tx.execute(known).scalar_one()
    return number


def keep_variant(tx: Connection, variant: Variant) -> str:
    """Store a variant unless it is known; return its fingerprint."""
    fingerprint = variant.fingerprint
    column = schema.variants.c.fingerprint
    if tx.execute(select(column).where(column == fingerprint)).first() is None:
        tx.execute(insert(schema.variants).values(**variant_values(variant)))
    return fingerprint


def next_number(tx: Connection, table: Table) -> int:
    """Number of the next row of a table; the write lock is held, so nobody else takes it."""
    return int(tx.execute(select(func.coalesce(func.max(table.c.number), 0) + 1)).scalar_one())


def _claim(tx: Connection, by: Author, entry: NewClaim) -> None:
    run = (
        tx.execute(select(schema.runs).where(schema.runs.c.id == entry.screening_run))
        .mappings()
        .first()
    )
    if run is None:
        raise InvariantViolated(f"A claim cites the run {entry.screening_run!r}: no such run.")
    number = next_number(tx, schema.claims)
    tx.execute(
        insert(schema.claims).values(
            number=number,
            id=f"c{number:04d}",
            scope=by.scope,
            society=run["society"],
            author=run["agent"],
            variant=run["variant"],
            reference=keep_variant(tx, entry.reference_variant),
            screening_run=entry.screening_run,
            screening_delta=entry.screening_delta,
            family=entry.family,
            alpha=entry.alpha,
            carried_log_e=entry.carried_log_e,
            filed_at=CLOCK,
        )
    )


def _verdict(tx: Connection, by: Author, entry: Verdict) -> None:
    if entry.decision is Decision.ACCEPTED and not entry.runs:
        raise InvariantViolated(f"Claim {entry.claim_id} cannot be accepted without runs.")
    number = next_number(tx, schema.verdicts)
    tx.execute(
        insert(schema.verdicts).values(
            number=number,
            claim_id=entry.claim_id,
            society=by.society,
            decision=entry.decision.value,
            log_e=entry.log_e,
            effect=None if entry.effect is None else dump(entry.effect),
            reason=entry.reason,
            judge=entry.judge,
            decided_at=CLOCK,
        )
    )
    cited = list(dict.fromkeys(entry.runs))
    if cited:
        tx.execute(
            insert(schema.verdict_runs),
            [{"verdict": number, "run_id": run, "place": place} for place, run in enumerate(cited)],
        )


def _crown(tx: Connection, by: Author, entry: Crown) -> None:
    champions = schema.champions
    held = select(func.count()).select_from(champions).where(champions.c.scope == by.scope)
    tx.execute(
        insert(champions).values(
            scope=by.scope,
            number=tx.execute(held).scalar_one(),
            variant=keep_variant(tx, entry.variant),
            claim_id=entry.claim_id,
            screening_run=entry.screening_run,
            reverts=int(entry.reverts),
            society=by.society,
            since=CLOCK,
        )
    )


def _insight(tx: Connection, by: Author, entry: NewInsight) -> None:
    number = next_number(tx, schema.insights)
    tx.execute(
        insert(schema.insights).values(
            number=number,
            id=f"i{number:04d}",
            scope=by.scope,
            society=by.society,
            author=by.agent,
            text=entry.text,
            evidence=json.dumps(entry.evidence),
            posted_at=CLOCK,
        )
    )


def _hypothesis(tx: Connection, by: Author, entry: NewHypothesis) -> None:
    number = next_number(tx, schema.hypotheses)
    tx.execute(
        insert(schema.hypotheses).values(
            number=number,
            id=f"h{number:04d}",
            scope=by.scope,
            society=by.society,
            author=by.agent,
            statement=entry.statement,
            rationale=entry.rationale,
            variant=keep_variant(tx, entry.variant),
            priority=entry.priority,
            state=HypothesisState.OPEN.value,
            posted_at=CLOCK,
        )
    )


def _taken(tx: Connection, by: Author, entry: HypothesisTaken) -> None:
    table = schema.hypotheses
    taken = tx.execute(
        update(table)
        .where(table.c.id == entry.hypothesis_id, table.c.state == HypothesisState.OPEN.value)
        .values(state=HypothesisState.TAKEN.value, taken_by=by.agent, taken_in=by.society)
    )
    if taken.rowcount != 1:
        raise InvariantViolated(f"Hypothesis {entry.hypothesis_id!r} is not open.")


def _tested(tx: Connection, by: Author, entry: HypothesisTested) -> None:
    table = schema.hypotheses
    known = tx.execute(select(table.c.state).where(table.c.id == entry.hypothesis_id)).scalar()
    if known is None:
        raise InvariantViolated(f"No hypothesis {entry.hypothesis_id!r}.")
    if known != HypothesisState.TESTED.value:  # the first test counts
        tx.execute(
            update(table)
            .where(table.c.id == entry.hypothesis_id)
            .values(state=HypothesisState.TESTED.value, run_id=entry.run_id)
        )


def _noise(tx: Connection, by: Author, entry: Noise) -> None:
    number = scope_number(tx, Scope(entry.task, entry.tier), create=True)
    tx.execute(
        insert(schema.noise).values(
            scope=number,
            society=by.society,
            sd=entry.sd,
            low=entry.low,
            high=entry.high,
            seeds=entry.seeds,
            measured_at=CLOCK,
        )
    )


def _study(tx: Connection, by: Author, entry: NewStudy) -> None:
    number = next_number(tx, schema.studies)
    tx.execute(
        insert(schema.studies).values(
            number=number,
            id=f"st{number:03d}",
            scope=by.scope,
            society=by.society,
            kind=entry.kind,
            title=entry.title,
            plan=study_text(entry.plan, "plan"),
            registered_at=CLOCK,
        )
    )


def _study_result(tx: Connection, by: Author, entry: StudyResult) -> None:
    tx.execute(
        insert(schema.study_results).values(
            study=entry.study_id,
            society=by.society,
            result=study_text(entry.result, "result"),
            concluded_at=CLOCK,
        )
    )
    cited = list(dict.fromkeys(entry.evidence))
    if cited:
        tx.execute(
            insert(schema.study_runs),
            [
                {"study": entry.study_id, "run_id": run, "place": place}
                for place, run in enumerate(cited)
            ],
        )


_WRITERS: dict[type, Callable[[Connection, Author, Any], None]] = {
    NewClaim: _claim,
    Verdict: _verdict,
    Crown: _crown,
    NewInsight: _insight,
    NewHypothesis: _hypothesis,
    HypothesisTaken: _taken,
    HypothesisTested: _tested,
    Noise: _noise,
    NewStudy: _study,
    StudyResult: _study_result,
}


def write(tx: Connection, by: Author, entry: Entry) -> None:
    """Write one entry in the transaction `tx`."""
    _WRITERS[type(entry)](tx, by, entry)
