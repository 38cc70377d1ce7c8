"""Leases and the seeds they stand on: what may be run next, where, and by whom.

Functions for the inside of a transaction, which `Ledger` opens; those that write need the write
lock. They find the work and the seed; whether a lease may be given is decided by `rules.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Connection,
    Float,
    RowMapping,
    Select,
    Text,
    and_,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)

from society.errors import AlreadyLeased, AlreadyRun, InvariantViolated, LeaseLost
from society.memory import rows
from society.memory.entries import CLOCK, add_variant, keep_variant, scope_number
from society.memory.schema import (
    LeaseState,
    hypotheses,
    leases,
    meta,
    runs,
    scopes,
    seeds,
    variants,
)
from society.records import (
    Environment,
    HypothesisState,
    Lease,
    Outcome,
    RunKind,
    Scope,
    SeedList,
    Split,
    Variant,
)

POOL_KINDS = (RunKind.CALIBRATION, RunKind.VERIFICATION)
"""Kinds of runs that stand on verification seeds and count as evidence."""

_LISTS: Mapping[RunKind, tuple[SeedList, Split, tuple[RunKind, ...]]] = {
    RunKind.SCREENING: (SeedList.SCREENING, Split.VALIDATION, (RunKind.SCREENING,)),
    RunKind.REPRODUCTION: (SeedList.SCREENING, Split.VALIDATION, (RunKind.REPRODUCTION,)),
    RunKind.CALIBRATION: (SeedList.VERIFICATION, Split.HOLDOUT, POOL_KINDS),
    RunKind.VERIFICATION: (SeedList.VERIFICATION, Split.HOLDOUT, POOL_KINDS),
    RunKind.AUDIT: (SeedList.AUDIT, Split.HOLDOUT, (RunKind.AUDIT,)),
    RunKind.STUDY: (SeedList.STUDY, Split.HOLDOUT, (RunKind.STUDY,)),
}
"""Kind of run -> its seed list, its split, and the kinds that share its seeds."""

POOL_KINDS_OF: Mapping[SeedList, tuple[RunKind, ...]] = {
    SeedList.SCREENING: (RunKind.SCREENING,),
    SeedList.VERIFICATION: POOL_KINDS,
    SeedList.AUDIT: (RunKind.AUDIT,),
    SeedList.STUDY: (RunKind.STUDY,),
}
"""Seed list -> the kinds of runs whose scores are a variant's results on it."""

_LIVING = LeaseState.LIVING.value


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks for a lease, and of what."""

    scope: Scope
    society: str
    holder: str
    variant: Variant
    kind: RunKind
    ttl_s: float
    claim_id: str | None = None
    idea: str = ""


@dataclass(frozen=True, slots=True)
class _Place:
    """A seed of a list that a lease is about to stand on."""

    position: int
    seed: int
    attempt: int
    data_seed: int | None = None
    repeat: int = 0


# --- seeds ---------------------------------------------------------------------------------------


def drawn(tx: Connection, which: SeedList, scope: Scope, count: int) -> tuple[int, ...]:
    """At most `count` seeds from the head of a list, as far as they have been drawn."""
    number = scope_number(tx, scope, create=False)
    query = (
        select(seeds.c.seed)
        .where(seeds.c.scope == number, seeds.c.list == which.value)
        .order_by(seeds.c.position)
        .limit(count)
    )
    return tuple(tx.execute(query).scalars())


def draw(tx: Connection, which: SeedList, scope: Scope, count: int) -> tuple[int, ...]:
    """The first `count` seeds of a list, drawing those that are missing."""
    number = scope_number(tx, scope, create=True)
    assert number is not None
    return tuple(_draw(tx, which, scope, number, position) for position in range(count))


def _draw(tx: Connection, which: SeedList, scope: Scope, number: int, position: int) -> int:
    """The seed at a position, drawn from the secret unless it was before."""
    at = select(seeds.c.seed).where(
        seeds.c.scope == number, seeds.c.list == which.value, seeds.c.position == position
    )
    known = tx.execute(at).scalar()
    if known is not None:
        return int(known)
    secret = bytes.fromhex(
        tx.execute(select(meta.c.value).where(meta.c.key == "secret")).scalar_one()
    )
    attempt = 0
    while True:
        seed = _hash(secret, [which.value, scope.task, scope.tier, position, attempt])
        taken = select(seeds.c.seed).where(seeds.c.scope == number, seeds.c.seed == seed)
        if tx.execute(taken).first() is None:
            break
        attempt += 1
    tx.execute(insert(seeds).values(scope=number, list=which.value, position=position, seed=seed))
    return seed


def _hash(secret: bytes, what: list[object]) -> int:
    """31 bits of HMAC-SHA256."""
    digest = hmac.new(secret, json.dumps(what).encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def is_result() -> Any:
    """SQL: a run is a result, not a first crash."""
    return or_(runs.c.outcome != Outcome.CRASHED.value, runs.c.attempt == 2)


def _free_seeds(kind: RunKind, number: int, fingerprint: str) -> Select[Any]:
    """SQL: the first drawn seed without a result or a living lease, and its crashes so far."""
    which, _, sharing = _LISTS[kind]
    here = and_(
        runs.c.scope == number,
        runs.c.variant == fingerprint,
        runs.c.kind.in_([one.value for one in sharing]),
        runs.c.seed == seeds.c.seed,
    )
    subject: Any = literal_column(f"'{fingerprint}:{which.value}:' || seeds.position")
    held = exists().where(
        leases.c.scope == number,
        leases.c.subject == subject,
        leases.c.state == literal_column(f"'{_LIVING}'"),
        leases.c.expires_at > CLOCK,
    )
    crashes = select(func.count()).select_from(runs).where(here).scalar_subquery()
    return (
        select(seeds.c.position, seeds.c.seed, crashes.label("crashes"))
        .where(
            seeds.c.scope == number,
            seeds.c.list == which.value,
            ~exists().where(here, is_result()),
            ~held,
        )
        .order_by(seeds.c.position)
        .limit(1)
    )


_NEW_LEASE = (
    insert(leases)
    .values(state=_LIVING, created_at=CLOCK, expires_at=CLOCK + bindparam("ttl_s", type_=Float))
    .returning(*leases.c)
)

# --- giving a lease ------------------------------------------------------------------------------


def see_screening(tx: Connection, request: Request) -> None:
    """Refuse what is plainly not to be had, without the write lock.

    Raises:
        AlreadyRun: the variant was screened.
        AlreadyLeased: somebody screens it at this moment.
    """
    fingerprint = request.variant.fingerprint
    seen = tx.execute(_SCREENING, _named(request, fingerprint)).mappings().first()
    if seen is None:
        return
    _check_not_run(request, seen)
    if seen["leased"]:
        on_it = and_(leases.c.scope == seen["scope"], leases.c.subject == fingerprint)
        living = and_(leases.c.state == _LIVING, leases.c.expires_at > CLOCK)
        held = tx.execute(select(leases).where(on_it, living)).mappings().first()
        if held is not None:
            raise _held_by(held)


def _check_not_run(request: Request, seen: RowMapping) -> None:
    run = seen["run_id"]
    if run is not None:
        raise AlreadyRun(run, f"{request.variant.describe()} was screened as run {run}.")


def lease_screening(tx: Connection, request: Request) -> Lease:
    """A lease on the first screening seed, unless the variant was screened there.

    Everybody's hot path: what is there is read in one statement.
    """
    _check_task(request)
    fingerprint = request.variant.fingerprint
    seen = tx.execute(_SCREENING, _named(request, fingerprint)).mappings().first()
    if seen is None or seen["seed"] is None:
        number = scope_number(tx, request.scope, create=True)
        assert number is not None
        _draw(tx, SeedList.SCREENING, request.scope, number, 0)
        seen = tx.execute(_SCREENING, _named(request, fingerprint)).mappings().one()
    _check_not_run(request, seen)
    if not seen["known"]:
        add_variant(tx, request.variant)
    place = _Place(0, seen["seed"], 1)
    token = None if seen["leased"] else seen["token"]
    return _lease(tx, request, seen["scope"], place, fingerprint, fingerprint, token)


def _named(request: Request, fingerprint: str) -> dict[str, Any]:
    return {"task": request.scope.task, "tier": request.scope.tier, "fingerprint": fingerprint}


def _screening() -> Select[Any]:
    """SQL: all that a lease on a screening run has to know, in one row."""
    fingerprint: Any = bindparam("fingerprint", type_=Text)
    first = (
        select(seeds.c.seed)
        .where(
            seeds.c.scope == scopes.c.number,
            seeds.c.list == SeedList.SCREENING.value,
            seeds.c.position == 0,
        )
        .correlate(scopes)
        .scalar_subquery()
    )
    made = select(runs.c.id).where(
        runs.c.scope == scopes.c.number,
        runs.c.variant == fingerprint,
        runs.c.kind == literal_column(f"'{RunKind.SCREENING.value}'"),
        runs.c.seed == first,
    )
    leased = exists().where(
        leases.c.scope == scopes.c.number,
        leases.c.subject == fingerprint,
        leases.c.state == literal_column(f"'{_LIVING}'"),
    )
    return select(
        scopes.c.number.label("scope"),
        first.label("seed"),
        made.scalar_subquery().label("run_id"),
        exists().where(variants.c.fingerprint == fingerprint).label("known"),
        leased.label("leased"),
        _next_token().label("token"),
    ).where(scopes.c.task == bindparam("task"), scopes.c.tier == bindparam("tier"))


def _next_token() -> Any:
    return select(func.coalesce(func.max(leases.c.token), 0) + 1).scalar_subquery()


_SCREENING = _screening()


def lease_next_seed(tx: Connection, request: Request) -> Lease:
    """A lease on the first seed of the kind's list that is free for the variant."""
    which = _LISTS[request.kind][0]
    number, fingerprint = _known(tx, request)
    place = _first_free(tx, request, number, fingerprint)
    subject = f"{fingerprint}:{which.value}:{place.position}"
    return _lease(tx, request, number, place, subject, fingerprint)


def lease_reproduction(tx: Connection, request: Request, screening_run: str) -> Lease:
    """A lease on the seed of a claim's screening run, unless it was reproduced there."""
    number, fingerprint = _known(tx, request)
    made = select(runs.c.id, runs.c.outcome, runs.c.attempt).where(
        runs.c.claim_id == request.claim_id, runs.c.kind == RunKind.REPRODUCTION.value
    )
    tries = tx.execute(made.order_by(runs.c.number)).mappings().all()
    for row in tries:
        if row["outcome"] != Outcome.CRASHED.value or row["attempt"] == 2:
            raise AlreadyRun(
                row["id"], f"Claim {request.claim_id} was reproduced as run {row['id']}."
            )
    place = _screened_at(tx, screening_run, 1 + len(tries))
    subject = f"reproduction:{request.claim_id}"
    return _lease(tx, request, number, place, subject, fingerprint)


def lease_study(
    tx: Connection, request: Request, position: int, data_position: int | None, repeat: int
) -> Lease:
    """A lease on chosen places of the study list, unless there is a result."""
    number, fingerprint = _known(tx, request)
    seed = draw(tx, SeedList.STUDY, request.scope, position + 1)[position]
    data_seed = None
    if data_position is not None and data_position != position:
        data_seed = draw(tx, SeedList.STUDY, request.scope, data_position + 1)[data_position]
    made = select(runs.c.id, runs.c.outcome, runs.c.attempt).where(
        runs.c.scope == number,
        runs.c.variant == fingerprint,
        runs.c.kind == RunKind.STUDY.value,
        runs.c.seed == seed,
        runs.c.data_seed.is_not_distinct_from(data_seed),
        runs.c.repeat == repeat,
    )
    tries = tx.execute(made.order_by(runs.c.number)).mappings().all()
    for row in tries:
        if row["outcome"] != Outcome.CRASHED.value or row["attempt"] == 2:
            raise AlreadyRun(
                row["id"],
                f"{request.variant.describe()} was run there for a study as run {row['id']}.",
            )
    place = _Place(position, seed, 1 + len(tries), data_seed, repeat)
    order = position if data_position is None else data_position
    subject = f"{fingerprint}:{SeedList.STUDY.value}:{position}:{order}:{repeat}"
    return _lease(tx, request, number, place, subject, fingerprint)


def _check_task(request: Request) -> None:
    """Refuse a variant of another task, whose scores could not be compared."""
    if request.variant.task != request.scope.task:
        raise InvariantViolated(
            f"{request.variant.describe()} is a variant of {request.variant.task}: its scores "
            f"cannot be compared with those of {request.scope.task}."
        )


def _known(tx: Connection, request: Request) -> tuple[int, str]:
    """Scope number and fingerprint of what is asked for, stored if they are new."""
    _check_task(request)
    number = scope_number(tx, request.scope, create=True)
    assert number is not None
    return number, keep_variant(tx, request.variant)


def _screened_at(tx: Connection, run: str, attempt: int) -> _Place:
    at = select(leases.c.position, leases.c.seed).where(leases.c.run_id == run)
    row = tx.execute(at).mappings().one()
    return _Place(row["position"], row["seed"], attempt)


def _first_free(tx: Connection, request: Request, number: int, fingerprint: str) -> _Place:
    which = _LISTS[request.kind][0]
    row = tx.execute(_free_seeds(request.kind, number, fingerprint)).mappings().first()
    if row is not None:
        return _Place(row["position"], row["seed"], 1 + row["crashes"])
    so_far = select(func.count()).where(seeds.c.scope == number, seeds.c.list == which.value)
    position = int(tx.execute(so_far).scalar_one())
    return _Place(position, _draw(tx, which, request.scope, number, position), 1)


def _lease(
    tx: Connection,
    request: Request,
    number: int,
    place: _Place,
    subject: str,
    fingerprint: str,
    token: int | None = None,
) -> Lease:
    """Give the lease: end an expired one on the subject, then insert under the rules.

    `token` is the next one, for callers who know it, and that no lease is on the subject.
    """
    if token is None:
        _sweep(tx, number, subject)
        token = int(tx.execute(select(_next_token())).scalar_one())
    which, split, _ = _LISTS[request.kind]
    values = {
        "token": token,
        "run_id": f"r{token:05d}",
        "scope": number,
        "society": request.society,
        "holder": request.holder,
        "subject": subject,
        "kind": request.kind.value,
        "variant": fingerprint,
        "list": which.value,
        "position": place.position,
        "seed": place.seed,
        "split": split.value,
        "attempt": place.attempt,
        "claim_id": request.claim_id,
        "idea": rows.clean_text(request.idea),
        "data_seed": place.data_seed,
        "repeat": place.repeat,
        "ttl_s": request.ttl_s,
    }
    row = tx.execute(_NEW_LEASE, values).mappings().one()
    return rows.to_lease(row, request.variant)


def _sweep(tx: Connection, number: int, subject: str) -> None:
    """End an expired lease on a subject, or say who holds it.

    Raises:
        AlreadyLeased: the lease is living.
    """
    same = and_(leases.c.scope == number, leases.c.subject == subject)
    tx.execute(_end(LeaseState.EXPIRED).where(same, leases.c.expires_at <= CLOCK))
    held: RowMapping | None = (
        tx.execute(select(leases).where(same, leases.c.state == _LIVING)).mappings().first()
    )
    if held is not None:
        raise _held_by(held)


def _held_by(held: RowMapping) -> AlreadyLeased:
    return AlreadyLeased(
        f"{held['holder']} holds the lease on this ({held['kind']} run {held['run_id']}) "
        f"until {held['expires_at']:.0f}. Do something else, or wait."
    )


# --- holding and ending a lease ------------------------------------------------------------------


def prolong(tx: Connection, lease: Lease, ttl_s: float) -> Lease:
    """The lease with a new deadline."""
    row = (
        tx.execute(
            update(leases)
            .where(leases.c.token == lease.token, leases.c.state == _LIVING)
            .values(expires_at=CLOCK + ttl_s)
            .returning(*leases.c)
        )
        .mappings()
        .first()
    )
    if row is None:
        raise _lost(lease)
    return rows.to_lease(row, lease.variant)


def living(tx: Connection, scope: Scope, known: rows.Variants) -> tuple[Lease, ...]:
    """The living leases of a scope, oldest first."""
    number = scope_number(tx, scope, create=False)
    query = (
        select(leases)
        .where(leases.c.scope == number, leases.c.state == _LIVING, leases.c.expires_at > CLOCK)
        .order_by(leases.c.token)
    )
    found = tx.execute(query).mappings()
    return tuple(rows.to_lease(row, known[row["variant"]]) for row in found)


def ended(tx: Connection, scope: Scope) -> tuple[int, int]:
    """Leases of a scope that have ended, and how many of them left a trace.

    A trace is a run with its outcome, or the mark of having been released or having expired.
    """
    number = scope_number(tx, scope, create=False)
    over = and_(leases.c.scope == number, leases.c.state != _LIVING)
    became = exists().where(runs.c.id == leases.c.run_id)
    traced = and_(over, or_(leases.c.state != LeaseState.FINISHED.value, became))
    counts = (select(func.count()).select_from(leases).where(which) for which in (over, traced))
    total, kept = (int(tx.execute(count).scalar_one()) for count in counts)
    return total, kept


def held(tx: Connection, lease: Lease) -> RowMapping:
    """The row of a lease that its holder has not lost."""
    row = tx.execute(select(leases).where(leases.c.token == lease.token)).mappings().first()
    if row is None or not _still(lease, row):
        raise _lost(lease)
    return row


def check_tier(tx: Connection, row: RowMapping, environment: Environment) -> None:
    """Refuse a run that was made on another hardware tier than its lease is for.

    Its score would stand among those of the lease's tier, where it cannot be compared.

    Raises:
        InvariantViolated: the tiers differ.
    """
    tier = tx.execute(select(scopes.c.tier).where(scopes.c.number == row["scope"])).scalar_one()
    if tier != environment.tier:
        raise InvariantViolated(
            f"Run {row['run_id']} was made on {environment.tier}, and its lease is for {tier}: "
            "scores are compared within one hardware tier only. Lease it for the tier it runs on."
        )


def _still(lease: Lease, row: RowMapping) -> bool:
    """Whether a stored lease is living and the very one its holder was given.

    After a power cut that took a lease with it, its token may name other work.
    """
    given = (lease.run_id, lease.holder, lease.subject, lease.kind.value, lease.seed)
    stored = tuple(row[name] for name in ("run_id", "holder", "subject", "kind", "seed"))
    return bool(row["state"] == _LIVING) and given == stored


def _lost(lease: Lease) -> LeaseLost:
    return LeaseLost(
        f"The lease on run {lease.run_id} (token {lease.token}, {lease.holder}) has ended: it was "
        "finished or released before, or it expired and somebody else took the work."
    )


def release(tx: Connection, lease: Lease) -> None:
    """End a lease without a run, if it is living."""
    tx.execute(_end(LeaseState.RELEASED).where(leases.c.token == lease.token))


def release_all(tx: Connection, society: str) -> int:
    """End a society's living leases, count them, and reopen the hypotheses it had taken."""
    ended = tx.execute(_end(LeaseState.RELEASED).where(leases.c.society == society))
    tx.execute(
        update(hypotheses)
        .where(
            hypotheses.c.taken_in == society,
            hypotheses.c.state == HypothesisState.TAKEN.value,
        )
        .values(state=HypothesisState.OPEN.value, taken_by=None, taken_in=None, taken_until=None)
    )
    return int(ended.rowcount)


def _end(state: LeaseState) -> Any:
    return update(leases).where(leases.c.state == _LIVING).values(state=state.value, ended_at=CLOCK)
