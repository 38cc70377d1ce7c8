"""How each kind of `Entry` is written: one short function each, inside the commit's transaction."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Connection,
    Select,
    Table,
    and_,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from society.errors import InvariantViolated
from society.memory import schema
from society.memory.rows import dump, study_text, variant_values
from society.records import (
    Crown,
    Decision,
    Entry,
    HypothesisDropped,
    HypothesisState,
    NewClaim,
    NewHypothesis,
    NewInsight,
    NewPrior,
    NewRefusal,
    NewStudy,
    Noise,
    RunKind,
    Scope,
    StudyResult,
    Variant,
    Verdict,
)

CLOCK: Any = schema.Clock()
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
        add_variant(tx, variant)
    return fingerprint


def add_variant(tx: Connection, variant: Variant) -> None:
    """Store a variant that is not known yet."""
    number = _next_number(schema.variants).scalar_subquery()
    tx.execute(insert(schema.variants).values(number=number, **variant_values(variant)))


def next_number(tx: Connection, table: Table) -> int:
    """Number of the next row of a table; the write lock is held, so nobody else takes it."""
    return int(tx.execute(_next_number(table)).scalar_one())


def _next_number(table: Table) -> Select[Any]:
    return select(func.coalesce(func.max(table.c.number), 0) + 1)


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
    missing = sorted(set(entry.evidence) - _existing(tx, entry.evidence))
    if missing:
        raise InvariantViolated(
            f"An insight cites {', '.join(map(repr, missing))}: there is no run, claim, insight or "
            "study of this id. Cite what is in the notebook."
        )
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


def _existing(tx: Connection, ids: Sequence[str]) -> set[str]:
    """Which of these ids are those of a run, claim, insight or study."""
    missing = list(dict.fromkeys(ids))
    found: set[str] = set()
    for table in (schema.runs, schema.claims, schema.insights, schema.studies):
        for start in range(0, len(missing), 500):
            some = table.c.id.in_(missing[start : start + 500])
            found.update(tx.execute(select(table.c.id).where(some)).scalars())
        missing = [one for one in missing if one not in found]
    return found


def known(tx: Connection, scope: int, fingerprint: str) -> bool:
    """Whether a variant was proposed or screened before, so that proposing it adds nothing."""
    ideas, made = schema.hypotheses, schema.runs
    posted = exists().where(ideas.c.scope == scope, ideas.c.variant == fingerprint)
    screened = exists().where(
        made.c.scope == scope,
        made.c.variant == fingerprint,
        made.c.kind == RunKind.SCREENING.value,
    )
    return bool(tx.execute(select(or_(posted, screened))).scalar())


def check_hypothesis(entry: NewHypothesis) -> None:
    """Refuse a priority or cost that ideas cannot be ranked by.

    Raises:
        InvariantViolated: one of them is not finite, or the cost is not above 0.
    """
    if not (math.isfinite(entry.priority) and math.isfinite(entry.cost) and entry.cost > 0):
        raise InvariantViolated(
            f"A hypothesis about {entry.variant.describe()} has the priority {entry.priority} and "
            f"the cost {entry.cost}: both must be finite, and the cost above 0."
        )


def _hypothesis(tx: Connection, by: Author, entry: NewHypothesis) -> None:
    check_hypothesis(entry)
    scopes = schema.scopes
    task = tx.execute(select(scopes.c.task).where(scopes.c.number == by.scope)).scalar_one()
    if entry.variant.task != task:
        raise InvariantViolated(
            f"A hypothesis of {task} is about a variant of {entry.variant.task}, which cannot be "
            "run here."
        )
    if known(tx, by.scope, entry.variant.fingerprint):
        return
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
            cost=entry.cost,
            state=HypothesisState.OPEN.value,
            posted_at=CLOCK,
        )
    )


def _dropped(tx: Connection, by: Author, entry: HypothesisDropped) -> None:
    """Close it, unless somebody has taken, tested or dropped it meanwhile."""
    table = schema.hypotheses
    named = table.c.id == entry.hypothesis_id
    if tx.execute(select(table.c.id).where(named)).first() is None:
        raise InvariantViolated(f"No hypothesis {entry.hypothesis_id!r}.")
    ran_out = and_(table.c.state == HypothesisState.TAKEN.value, table.c.taken_until <= CLOCK)
    tx.execute(
        update(table)
        .where(named, or_(table.c.state == HypothesisState.OPEN.value, ran_out))
        .values(
            state=HypothesisState.DROPPED.value,
            dropped_because=entry.reason,
            taken_by=None,
            taken_in=None,
            taken_until=None,
        )
    )


def _refusal(tx: Connection, by: Author, entry: NewRefusal) -> None:
    tx.execute(
        insert(schema.refusals).values(
            number=next_number(tx, schema.refusals),
            scope=by.scope,
            society=by.society,
            agent=by.agent,
            variant=keep_variant(tx, entry.variant),
            reason=entry.reason.value,
            run_id=entry.run_id,
            note=entry.note,
            refused_at=CLOCK,
        )
    )


def _prior(tx: Connection, by: Author, entry: NewPrior) -> None:
    number = next_number(tx, schema.priors)
    tx.execute(
        insert(schema.priors).values(
            number=number,
            id=f"p{number:05d}",
            scope=by.scope,
            society=by.society,
            source=entry.source,
            label=entry.label,
            score=entry.score,
            status=entry.status,
            description=entry.description,
            imported_at=CLOCK,
        )
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
    HypothesisDropped: _dropped,
    NewRefusal: _refusal,
    NewPrior: _prior,
    Noise: _noise,
    NewStudy: _study,
    StudyResult: _study_result,
}


def write(tx: Connection, by: Author, entry: Entry) -> None:
    """Write one entry in the transaction `tx`."""
    _WRITERS[type(entry)](tx, by, entry)
