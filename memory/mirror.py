"""`Mirror`: what one process keeps of a ledger in memory, so that it reads every fact once.

Only rows that never change are kept, in the order of their numbers; each refresh reads the rows
with larger numbers and nothing else. Numbers are in the order of the transactions, so nothing is
missed, whoever wrote it. What is kept is what agents look at in every cycle: variants, screening
runs (a `Board` per scope), claims with their latest verdict, the champion history, and how many
verification seeds each variant has a result on. A screening run is kept without its log and curve,
which nobody surveys and which weigh more than the rest of it; `Ledger.run` has them.

Thread-safe. What is handed out is frozen or a copy, but for `Board`, which grows.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Select, func, literal, select

from society.memory import leases, rows
from society.memory.schema import champions, claims, runs, variants, verdict_runs, verdicts
from society.records import Champion, Claim, Decision, Outcome, Run, RunKind, Variant, Verdict

BATCH = 500
"""Keys asked for in one statement."""
FEW = 50
"""Up to so many new runs are sorted in one by one."""

_WEIGHTY = ("log_tail", "curve")
_SLIM_RUN = (
    *(column for column in runs.c if column.name not in _WEIGHTY),
    literal("").label("log_tail"),
    literal("[]").label("curve"),
)


class Known(Mapping[str, Variant]):
    """The variants of a ledger by fingerprint, read when they are asked for. Lives in a read."""

    def __init__(self, tx: Connection, cache: dict[str, Variant]) -> None:
        """Read through `tx`, keep in `cache`."""
        self._tx, self._cache = tx, cache

    def __getitem__(self, fingerprint: str) -> Variant:
        """One variant, from memory or from the ledger."""
        if fingerprint not in self._cache:
            self.fetch((fingerprint,))
        return self._cache[fingerprint]

    def __iter__(self) -> Iterator[str]:
        """The fingerprints in memory."""
        return iter(self._cache)

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._cache)

    def fetch(self, fingerprints: Iterable[str]) -> Known:
        """Read those that are not in memory, many in one statement."""
        missing = {one for one in fingerprints if one not in self._cache}
        for part in batches(sorted(missing)):
            query = select(variants).where(variants.c.fingerprint.in_(part))
            for row in self._tx.execute(query).mappings():
                self._cache[row["fingerprint"]] = rows.to_variant(row)
        return self


class Board:
    """All screening runs of one scope: in order of finishing, and best first. Grows by itself.

    The runs are without log and curve.
    """

    def __init__(self) -> None:
        """An empty board."""
        self._lock = threading.RLock()
        self._runs: list[Run] = []
        self._marks: list[str] = []
        self._scores: dict[str, float] = {}
        self._screened: dict[str, int] = {}
        self._ranking: list[tuple[float, int]] = []
        self._alone: list[tuple[float, int]] = []
        self._numbers: list[int] = []
        self._ended: list[float] = []

    def __len__(self) -> int:
        """How many screening runs have finished."""
        return len(self._runs)

    def __contains__(self, fingerprint: object) -> bool:
        """Whether the variant with this fingerprint was screened, whatever came of it."""
        return fingerprint in self._screened

    @property
    def last(self) -> int:
        """Number of the latest run; 0 for none."""
        return self._numbers[-1] if self._numbers else 0

    def extend(self, found: Sequence[tuple[str, Run]]) -> None:
        """Add runs, each with its variant's fingerprint, in order of their numbers."""
        with self._lock:
            ranked, alone = [], []
            for fingerprint, run in found:
                place = len(self._runs)
                self._runs.append(run)
                self._marks.append(fingerprint)
                self._numbers.append(run.number)
                self._screened.setdefault(fingerprint, place)
                if run.outcome is Outcome.COMPLETED and run.score is not None:
                    self._scores[fingerprint] = run.score
                    ranked.append((run.score, place))
                    if len(run.variant.overrides) + (run.variant.patch is not None) == 1:
                        alone.append((run.score, place))
            _merge(self._ranking, ranked)
            _merge(self._alone, alone)
            _merge(self._ended, [run.finished_at for _, run in found])

    def runs(self) -> tuple[Run, ...]:
        """Every run, in order of finishing."""
        with self._lock:
            return tuple(self._runs)

    def scores(self) -> dict[str, float]:
        """Fingerprint -> score of the completed runs."""
        with self._lock:
            return dict(self._scores)

    def score(self, fingerprint: str) -> float | None:
        """The score of a variant; None if it was not screened or did not complete."""
        return self._scores.get(fingerprint)

    def run(self, fingerprint: str) -> Run | None:
        """The first run of a variant; None if it was not screened."""
        place = self._screened.get(fingerprint)
        return None if place is None else self._runs[place]

    def after(self, number: int) -> int:
        """How many runs have a larger number."""
        with self._lock:
            return len(self._numbers) - bisect_right(self._numbers, number)

    def ended_after(self, moment: float) -> int:
        """How many runs finished after a moment, Unix seconds."""
        with self._lock:
            return len(self._ended) - bisect_right(self._ended, moment)

    def best(self, sign: int, *, alone: bool = False) -> Iterator[tuple[str, Run]]:
        """Completed runs with their fingerprints, best first; those that tie in either order.

        Args:
            sign: -1 if lower scores are better, +1 if higher ones are.
            alone: Only variants of one change.
        """
        with self._lock:
            ranking = list(self._alone if alone else self._ranking)
        for _, place in ranking if sign < 0 else reversed(ranking):
            yield self._marks[place], self._runs[place]

    def only(self, wanted: Callable[[Run], bool], fingerprint: str) -> Board:
        """A board of the runs that are wanted, and of those of one variant; walks through all."""
        part = Board()
        with self._lock:
            found = list(zip(self._marks, self._runs, strict=True))
        part.extend([(mark, run) for mark, run in found if mark == fingerprint or wanted(run)])
        return part

    def digest(self, sign: int, count: int) -> tuple[Run, ...]:
        """The `count` best and the `count` latest runs, in order of finishing; all, if few."""
        with self._lock:
            if len(self._runs) <= 2 * count:
                return tuple(self._runs)
            ranked = self._ranking if sign < 0 else reversed(self._ranking)
            places = {place for _, place in islice(ranked, count)}
            places.update(range(len(self._runs) - count, len(self._runs)))
            return tuple(self._runs[place] for place in sorted(places))


class Docket:
    """All claims of one scope at one moment, and what is looked up in them again and again."""

    def __init__(
        self, claims: tuple[Claim, ...], nearest: dict[Any, tuple[int, float, int]]
    ) -> None:
        """The claims in order of filing; `nearest` outlives the docket."""
        self.claims = claims
        self.nearest = nearest
        """Of a variant: how many claims were looked at, the nearest one's distance and family."""

    @cached_property
    def open(self) -> tuple[Claim, ...]:
        """Claims without a verdict."""
        return tuple(claim for claim in self.claims if claim.is_open)

    @cached_property
    def claimed(self) -> frozenset[str]:
        """Fingerprints of all variants that were claimed."""
        return frozenset(claim.variant.fingerprint for claim in self.claims)

    @cached_property
    def settled(self) -> frozenset[str]:
        """Fingerprints of variants whose claim is open, was rejected or was rolled back."""
        return frozenset(
            claim.variant.fingerprint
            for claim in self.claims
            if claim.is_open or claim.verdict_is(Decision.REJECTED, Decision.ROLLED_BACK)
        )

    @cached_property
    def rejected(self) -> Mapping[str, Sequence[Claim]]:
        """The rejected claims by the fingerprint of the variant they were filed against."""
        found: dict[str, list[Claim]] = {}
        for claim in self.claims:
            if claim.verdict_is(Decision.REJECTED):
                found.setdefault(claim.reference.fingerprint, []).append(claim)
        return found


@dataclass(slots=True)
class _Scope:
    """What is kept of one scope."""

    board: Board = field(default_factory=Board)
    champions: list[Champion] = field(default_factory=list)
    claims: dict[str, Claim] = field(default_factory=dict)
    docket: Docket | None = None
    nearest: dict[Any, tuple[int, float, int]] = field(default_factory=dict)
    claims_read: int = 0
    verdicts_read: int = 0
    pools: Counter[str] = field(default_factory=Counter)
    pools_read: int = 0


class Mirror:
    """See the module. Every method takes the transaction to read through."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._lock = threading.Lock()
        self._variants: dict[str, Variant] = {}
        self._scopes: dict[int, _Scope] = {}

    def known(self, tx: Connection) -> Known:
        """The variants of the ledger."""
        return Known(tx, self._variants)

    def board(self, tx: Connection, scope: int) -> Board:
        """The screening runs of a scope, brought up to date."""
        with self._lock:
            board = self._of(scope).board
            query = select(*_SLIM_RUN).where(
                runs.c.scope == scope,
                runs.c.kind == RunKind.SCREENING.value,
                runs.c.number > board.last,
            )
            board.extend(list(read_runs(tx, query.order_by(runs.c.number), self.known(tx))))
            return board

    def docket(self, tx: Connection, scope: int) -> Docket:
        """The claims of a scope in order of filing, each with its latest verdict."""
        with self._lock:
            kept = self._of(scope)
            fresh = select(claims).where(claims.c.scope == scope)
            filed = tx.execute(
                fresh.where(claims.c.number > kept.claims_read).order_by(claims.c.number)
            )
            new = list(filed.mappings())
            judged = tx.execute(
                select(verdicts.c.claim_id, verdicts.c.number)
                .join(claims, claims.c.id == verdicts.c.claim_id)
                .where(claims.c.scope == scope, verdicts.c.number > kept.verdicts_read)
            ).all()
            names = {row["id"] for row in new}
            changed = sorted({claim for claim, _ in judged if claim not in names})
            for part in batches(changed):
                new += tx.execute(fresh.where(claims.c.id.in_(part))).mappings()
            for claim in read_claims(tx, new, self.known(tx)):
                kept.claims[claim.id] = claim
            kept.claims_read = max([kept.claims_read, *(row["number"] for row in new)])
            kept.verdicts_read = max((number for _, number in judged), default=kept.verdicts_read)
            if new or kept.docket is None:
                kept.docket = Docket(tuple(kept.claims.values()), kept.nearest)
            return kept.docket

    def has_claims(self, scope: int) -> bool:
        """Whether the claims of a scope have been read: then little is left to read."""
        return self._of(scope).docket is not None

    def champions(self, tx: Connection, scope: int) -> tuple[Champion, ...]:
        """The champion history of a scope, the baseline first."""
        with self._lock:
            history = self._of(scope).champions
            query = select(champions).where(
                champions.c.scope == scope, champions.c.number >= len(history)
            )
            new = tx.execute(query.order_by(champions.c.number)).mappings().all()
            known = self.known(tx).fetch(row["variant"] for row in new)
            history.extend(rows.to_champion(row, known) for row in new)
            return tuple(history)

    def pool_sizes(self, tx: Connection, scope: int) -> Mapping[str, int]:
        """Fingerprint -> verification seeds with a result, for every variant that has one."""
        with self._lock:
            kept = self._of(scope)
            latest = tx.execute(select(func.max(runs.c.number))).scalar() or 0
            query = select(runs.c.variant).where(
                runs.c.scope == scope,
                runs.c.kind.in_([kind.value for kind in leases.POOL_KINDS]),
                runs.c.number > kept.pools_read,
                runs.c.number <= latest,
                leases.is_result(),
            )
            kept.pools.update(tx.execute(query).scalars())
            kept.pools_read = max(kept.pools_read, latest)
            return kept.pools.copy()

    def _of(self, scope: int) -> _Scope:
        return self._scopes.setdefault(scope, _Scope())


def read_runs(tx: Connection, query: Select[Any], known: Known) -> Iterator[tuple[str, Run]]:
    """The runs that a query finds, each with its variant's fingerprint; read part by part."""
    for part in tx.execute(query).mappings().partitions(BATCH):
        known.fetch(row["variant"] for row in part)
        for row in part:
            yield row["variant"], rows.to_run(row, known)


def read_claims(tx: Connection, found: Sequence[Any], known: Known) -> Iterator[Claim]:
    """The claims of these rows, each with its latest verdict."""
    known.fetch(row[name] for row in found for name in ("variant", "reference"))
    for part in batches(found):
        latest = _latest_verdicts(tx, [row["id"] for row in part])
        for row in part:
            yield rows.to_claim(row, known, latest.get(row["id"]))


def _latest_verdicts(tx: Connection, names: Sequence[str]) -> dict[str, Verdict]:
    """The latest verdict on each of these claims, by claim."""
    query = select(verdicts).where(verdicts.c.claim_id.in_(names)).order_by(verdicts.c.number)
    latest = {row["claim_id"]: row for row in tx.execute(query).mappings()}
    cited: dict[int, list[str]] = {row["number"]: [] for row in latest.values()}
    places = select(verdict_runs.c.verdict, verdict_runs.c.run_id)
    places = places.where(verdict_runs.c.verdict.in_(list(cited))).order_by(verdict_runs.c.place)
    for number, run in tx.execute(places) if cited else ():
        cited[number].append(run)
    return {
        claim: rows.to_verdict(row, tuple(cited[row["number"]])) for claim, row in latest.items()
    }


def batches(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The keys in parts that one statement can name."""
    return (keys[start : start + BATCH] for start in range(0, len(keys), BATCH))


def _merge(kept: list[Any], new: list[Any]) -> None:
    """Add values to a sorted list."""
    if len(new) <= FEW:
        for one in new:
            insort(kept, one)
    else:
        kept.extend(new)
        kept.sort()
