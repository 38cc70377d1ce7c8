"""The hypothesis exchange in the ledger: listing, taking and returning ideas. All inside SQL.

What a hypothesis is at this moment is decided by the database's clock, never by what was stored
last: a take that ran out counts as open again, and an idea that somebody is screening, taken or
not, counts as taken. So nothing is ever listed as open that somebody works on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    RowMapping,
    Select,
    and_,
    case,
    exists,
    literal,
    literal_column,
    null,
    or_,
    select,
    update,
)

from society.errors import AlreadyLeased, InvariantViolated
from society.exchange import admit
from society.memory.entries import CLOCK, check_hypothesis, known
from society.memory.schema import LeaseState, hypotheses, leases, runs, scopes
from society.records import (
    Entry,
    HypothesisDropped,
    HypothesisState,
    NewHypothesis,
    RunKind,
    Scope,
)

_OPEN, _TAKEN = HypothesisState.OPEN.value, HypothesisState.TAKEN.value
_WAITING = hypotheses.c.state.in_([_OPEN, _TAKEN])

# A screening lease's subject is the variant's fingerprint, so that at most one of them is living.
_AT_WORK = and_(
    leases.c.scope == hypotheses.c.scope,
    leases.c.subject == hypotheses.c.variant,
    leases.c.state == literal_column(f"'{LeaseState.LIVING.value}'"),  # for the partial index
    leases.c.expires_at > CLOCK,
)
_SCREENED = exists().where(
    runs.c.scope == hypotheses.c.scope,
    runs.c.variant == hypotheses.c.variant,
    runs.c.kind == RunKind.SCREENING.value,
)
_SCREENING_NOW = exists().where(_AT_WORK)
_RAN_OUT = and_(hypotheses.c.state == _TAKEN, hypotheses.c.taken_until <= CLOCK)


def _as_of_now(column: Any, by_lease: Any, otherwise: Any) -> Any:
    """A stored value, unless the lease of a run or a deadline that passed says otherwise."""
    return case(
        (and_(_WAITING, leases.c.token.is_not(None)), by_lease),
        (_RAN_OUT, otherwise),
        else_=column,
    )


_STATE = _as_of_now(hypotheses.c.state, literal(_TAKEN), literal(_OPEN))
_NOW: Mapping[str, Any] = {
    "state": _STATE,
    "taken_by": _as_of_now(hypotheses.c.taken_by, leases.c.holder, null()),
    "taken_until": _as_of_now(hypotheses.c.taken_until, leases.c.expires_at, null()),
}


def listing(
    scope: Scope | None = None,
    *,
    id: str | None = None,
    state: HypothesisState | None = None,
    society: str | None = None,
    variant: str | None = None,
    last: int | None = None,
) -> Select[Any]:
    """Hypotheses as they are now, in order of posting; `None` means any.

    Args:
        scope: Task and tier.
        id: Only this one.
        state: As of now; `OPEN` leaves out what somebody tests or has tested.
        society: Where it was posted.
        variant: Fingerprint.
        last: The latest so many, the latest first.
    """
    query = (
        select(*(_NOW.get(c.name, c).label(c.name) for c in hypotheses.c))
        .select_from(hypotheses.outerjoin(leases, _AT_WORK))
        .order_by(hypotheses.c.number if last is None else hypotheses.c.number.desc())
        .limit(last)
    )
    if scope is not None:
        number = select(scopes.c.number).where(
            scopes.c.task == scope.task, scopes.c.tier == scope.tier
        )
        query = query.where(hypotheses.c.scope == number.scalar_subquery())
    if state is not None:
        stored = [_OPEN, _TAKEN] if state.value in (_OPEN, _TAKEN) else [state.value]
        query = query.where(hypotheses.c.state.in_(stored), state.value == _STATE)
    if state is HypothesisState.OPEN:
        query = query.where(~_SCREENED)
    for column, wanted in (("id", id), ("society", society), ("variant", variant)):
        if wanted is not None:
            query = query.where(hypotheses.c[column] == wanted)
    return query


def take(tx: Connection, id: str, society: str, holder: str, ttl_s: float) -> None:
    """Give an open hypothesis to somebody, until a deadline.

    Raises:
        AlreadyLeased: somebody tests it, or it was tested or dropped.
        InvariantViolated: there is no such hypothesis.
    """
    taken = tx.execute(
        update(hypotheses)
        .where(
            hypotheses.c.id == id,
            or_(hypotheses.c.state == _OPEN, _RAN_OUT),
            ~_SCREENED,
            ~_SCREENING_NOW,
        )
        .values(state=_TAKEN, taken_by=holder, taken_in=society, taken_until=CLOCK + ttl_s)
    )
    if taken.rowcount == 1:
        return
    row = tx.execute(listing(id=id)).mappings().first()
    if row is None:
        raise InvariantViolated(f"No hypothesis {id!r}.")
    raise AlreadyLeased(_why_not(row))


def _why_not(row: RowMapping) -> str:
    if row["state"] == _TAKEN:
        return (
            f"{row['taken_by']} tests hypothesis {row['id']} until {row['taken_until']:.0f}. "
            "Take another one."
        )
    reason = f": {row['dropped_because']}" if row["dropped_because"] else ""
    state = HypothesisState.TESTED.value if row["state"] == _OPEN else row["state"]
    return f"Hypothesis {row['id']} was {state} before{reason}. Take another one."


def give_back(tx: Connection, id: str, holder: str, society: str | None) -> None:
    """Reopen a hypothesis that `holder` has taken; does nothing when that is no longer so."""
    mine = [hypotheses.c.id == id, hypotheses.c.state == _TAKEN, hypotheses.c.taken_by == holder]
    if society is not None:
        mine.append(hypotheses.c.taken_in == society)
    tx.execute(
        update(hypotheses)
        .where(*mine)
        .values(state=_OPEN, taken_by=None, taken_in=None, taken_until=None)
    )


# --- admission -----------------------------------------------------------------------------------


def admitted(tx: Connection, scope: int, entries: Sequence[Entry], limit: int) -> tuple[Entry, ...]:
    """The entries without the hypotheses that the exchange has no room for.

    Ideas that were had or screened before are left out. A hypothesis that has to leave for a better
    one is dropped before anything else is written. See `society.exchange`.

    Args:
        tx: The commit's transaction, which holds the write lock.
        scope: Number of the scope.
        entries: What somebody wants to commit.
        limit: How many hypotheses of the scope may be open.
    """
    ideas = [one for one in entries if isinstance(one, NewHypothesis)]
    for one in ideas:
        check_hypothesis(one)
    new = {one.variant.fingerprint: one for one in reversed(ideas)}  # the first of equals counts
    new = {mark: one for mark, one in new.items() if not known(tx, scope, mark)}
    closing = {one.hypothesis_id for one in entries if isinstance(one, HypothesisDropped)}
    query = listing(state=HypothesisState.OPEN).where(hypotheses.c.scope == scope)
    waiting = {
        row["id"]: row["priority"] / row["cost"]
        for row in tx.execute(query).mappings()
        if row["id"] not in closing
    }
    let_in, dropped = admit(list(new.values()), waiting, limit)
    chosen = {id(one) for one in let_in}
    rest = [one for one in entries if not isinstance(one, NewHypothesis) or id(one) in chosen]
    return (*dropped, *rest)
