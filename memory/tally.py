"""What is counted rather than listed: for a status page, and for a society's budget.

Functions for the inside of a transaction. No run is read: a trigger keeps the sums in `tallies`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import Connection, and_, case, exists, func, or_, select

from society.memory import exchange
from society.memory.entries import CLOCK
from society.memory.schema import (
    LeaseState,
    calls,
    champions,
    claims,
    hypotheses,
    insights,
    leases,
    refusals,
    runs,
    tallies,
    verdicts,
)
from society.records import (
    Counts,
    Decision,
    HypothesisState,
    Outcome,
    RefusalReason,
    RunKind,
    Savings,
    Scope,
    Usage,
)

_Enum = TypeVar("_Enum", bound=StrEnum)
_WAITING = (HypothesisState.OPEN, HypothesisState.TAKEN)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a society has made of its budget so far, in all scopes."""

    runs: int
    """Runs that finished, whatever their kind and outcome."""
    wall_s: float
    """Seconds they took, summed."""
    under_way: int
    """Its living leases."""


def spent(tx: Connection, society: str) -> Spent:
    """What a society has spent."""
    sums = select(func.sum(tallies.c.runs), func.sum(tallies.c.wall_s))
    runs, wall_s = tx.execute(sums.where(tallies.c.society == society)).one()
    under_way = tx.execute(_living().where(leases.c.society == society)).scalar_one()
    return Spent(int(runs or 0), float(wall_s or 0.0), int(under_way))


_ANSWERED, _CACHED = "answered", "cached"


def usage(tx: Connection, society: str, agent: str | None = None) -> Usage:
    """What requests to language models have cost, of a society or of one of its agents."""
    query = select(*_SUMS).where(calls.c.society == society)
    if agent is not None:
        query = query.where(calls.c.agent == agent)
    return _usage(tx.execute(query).one())


def usage_by_agent(tx: Connection, society: str) -> Mapping[str, Usage]:
    """What requests of each agent have cost, by name."""
    query = select(calls.c.agent, *_SUMS).where(calls.c.society == society)
    found = tx.execute(query.group_by(calls.c.agent)).all()
    return {agent: _usage(sums) for agent, *sums in sorted(found, key=lambda row: str(row[0]))}


def _sum_unless_cached(column: Any) -> Any:
    """What came from the cache was paid before."""
    return func.sum(case((calls.c.outcome == _CACHED, 0), else_=column))


_SUMS = (
    func.count(),
    func.sum(case((calls.c.outcome.in_([_ANSWERED, _CACHED]), 0), else_=1)),
    func.sum(case((calls.c.outcome == _CACHED, 1), else_=0)),
    *map(_sum_unless_cached, (calls.c.prompt_tokens, calls.c.completion_tokens, calls.c.dollars)),
)


def _usage(sums: Sequence[Any]) -> Usage:
    made, failed, cached, prompt, completion, dollars = sums
    return Usage(
        calls=int(made),
        failed=int(failed or 0),
        cached=int(cached or 0),
        prompt_tokens=int(prompt or 0),
        completion_tokens=int(completion or 0),
        dollars=float(dollars or 0.0),
    )


def decisions(tx: Connection, scope: int) -> Mapping[Decision, int]:
    """The claims of a scope by their latest verdict, zeros included; without the open ones."""
    query = (
        select(verdicts.c.decision, func.count())
        .join(claims, claims.c.id == verdicts.c.claim_id)
        .where(claims.c.scope == scope)
        .group_by(verdicts.c.decision)
    )
    found = Counter({Decision(word): count for word, count in tx.execute(query)})
    for later in (Decision.CONFIRMED, Decision.ROLLED_BACK):  # each follows an acceptance
        found[Decision.ACCEPTED] -= found[later]
    return _complete(Decision, found)


def counts(tx: Connection, scope: Scope, number: int) -> Counts:
    """How much a scope holds."""
    made: Counter[RunKind] = Counter()
    ended: Counter[Outcome] = Counter()
    wall_s = flops = 0.0
    for row in tx.execute(select(tallies).where(tallies.c.scope == number)).mappings():
        made[RunKind(row["kind"])] += row["runs"]
        ended[Outcome(row["outcome"])] += row["runs"]
        wall_s += row["wall_s"]
        flops += row["flops"]
    closed = decisions(tx, number)
    filed, crowned, posted = (
        tx.execute(select(func.count()).select_from(table).where(table.c.scope == number))
        for table in (claims, champions, insights)
    )
    return Counts(
        runs=_complete(RunKind, made),
        outcomes=_complete(Outcome, ended),
        claims_open=int(filed.scalar_one()) - sum(closed.values()),
        verdicts=closed,
        champions=int(crowned.scalar_one()),
        insights=int(posted.scalar_one()),
        hypotheses=_complete(HypothesisState, _hypotheses(tx, scope, number)),
        leases=int(tx.execute(_living().where(leases.c.scope == number)).scalar_one()),
        wall_s=wall_s,
        flops=flops,
    )


def _hypotheses(tx: Connection, scope: Scope, number: int) -> Mapping[HypothesisState, int]:
    """Hypotheses by their state as of now; only those that are not closed are looked at."""
    per_state = select(hypotheses.c.state, func.count()).where(hypotheses.c.scope == number)
    stored = tx.execute(per_state.group_by(hypotheses.c.state))
    found = {HypothesisState(word): count for word, count in stored}
    waiting = exchange.listing(scope).where(hypotheses.c.state.in_(_WAITING)).subquery()
    now = tx.execute(select(waiting.c.state, func.count()).group_by(waiting.c.state))
    for state in _WAITING:
        found.pop(state, None)
    return found | {HypothesisState(word): count for word, count in now}


def _living() -> Any:
    """SQL: how many leases are living and have not run out."""
    return (
        select(func.count())
        .select_from(leases)
        .where(leases.c.state == LeaseState.LIVING.value, leases.c.expires_at > CLOCK)
    )


def _complete(known: Iterable[_Enum], found: Mapping[_Enum, int]) -> Mapping[_Enum, int]:
    """How often each member of an enumeration was seen, zeros included."""
    return {member: found.get(member, 0) for member in known}


def savings(tx: Connection, scope: int) -> Savings:
    """What was not run in a scope, because of what is known.

    A duplicate counts as a run saved for each variant; a near-duplicate or dead end only as long as
    its variant has not been run after all.
    """
    mine = refusals.c.scope == scope
    query = select(refusals.c.reason, func.count()).where(mine).group_by(refusals.c.reason)
    reasons = {RefusalReason(word): count for word, count in tx.execute(query)}
    run = exists().where(
        runs.c.scope == scope,
        runs.c.variant == refusals.c.variant,
        runs.c.kind == RunKind.SCREENING.value,
    )
    guessed = (RefusalReason.NEAR_DUPLICATE.value, RefusalReason.DEAD_END.value)
    counted = or_(
        refusals.c.reason == RefusalReason.DUPLICATE.value,
        and_(refusals.c.reason.in_(guessed), ~run),
    )
    saved = select(func.count(refusals.c.variant.distinct())).where(mine, counted)
    sums = select(func.sum(tallies.c.wall_s), func.sum(tallies.c.runs)).where(
        tallies.c.scope == scope, tallies.c.kind == RunKind.SCREENING.value
    )
    wall_s, made = tx.execute(sums).one()
    return Savings(
        refused=_complete(RefusalReason, Counter(reasons)),
        runs=int(tx.execute(saved).scalar_one()),
        run_s=float(wall_s or 0.0) / int(made) if made else 0.0,
    )
