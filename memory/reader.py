"""`LedgerReader`: every question that a notebook can be asked; nothing here changes it.

Every call is one consistent read, safe from several threads, and waits for no writer. Records that
are returned are frozen and belong to the caller. Every call may raise `NotebookDamaged`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, RowMapping, Select, and_, exists, func, select

from society.errors import InvariantViolated
from society.memory import exchange, feed, leases, links, rows, tally
from society.memory.database import Database, stored
from society.memory.entries import CLOCK, scope_number
from society.memory.feed import Posted
from society.memory.mirror import Board, Docket, Mirror, read_claims, read_runs
from society.memory.schema import (
    activities,
    calls,
    champions,
    claims,
    counters,
    insights,
    noise,
    outbox,
    priors,
    refusals,
    runs,
    scopes,
    seeds,
    societies,
    sources,
    studies,
    study_results,
    study_runs,
    verdicts,
)
from society.memory.tally import Spent
from society.records import (
    Activity,
    Call,
    Champion,
    Claim,
    Counts,
    Decision,
    Hypothesis,
    HypothesisState,
    Insight,
    Lease,
    Noise,
    Prior,
    Refusal,
    Run,
    RunKind,
    Savings,
    Scope,
    SeedList,
    SocietyRecord,
    Split,
    Study,
    Usage,
    Variant,
)


class LedgerReader:
    """What a notebook knows. Whoever only reads asks for this class; `Ledger` is one."""

    def __init__(self, database: Database) -> None:
        """Take over an initialised database; use `Ledger.open`."""
        self._db = database
        self._mirror = Mirror()

    def close(self) -> None:
        """Close all connections. Leases stay as they are."""
        self._db.close()

    def __enter__(self) -> Self:
        """The ledger itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    @property
    def path(self) -> Path | str:
        """The SQLite file, or the address of the database; for messages."""
        return self._db.path

    @property
    def address(self) -> str:
        """What `Ledger.open` opens: a path or a URL, without a password."""
        return self._db.backend.address

    @property
    def shared(self) -> bool:
        """Whether other machines can open this ledger."""
        return self._db.backend.shared

    @property
    def id(self) -> str:
        """Names the ledger wherever it lies: hexadecimal digits, drawn when it was made."""
        with self._db.read() as tx:
            return stored(tx, "id")

    # --- societies and their work -------------------------------------------------------------

    def society(self, id: str) -> SocietyRecord:
        """One society.

        Raises:
            InvariantViolated: there is no such society.
        """
        for record in self.societies():
            if record.id == id:
                return record
        raise InvariantViolated(f"No society {id!r} in {self.path}.")

    def societies(self) -> tuple[SocietyRecord, ...]:
        """All societies that worked here, oldest first."""
        with self._db.read() as tx:
            found = tx.execute(select(societies).order_by(societies.c.number)).mappings()
            return tuple(rows.to_society(row) for row in found)

    def now(self) -> float:
        """The database's clock, Unix seconds."""
        with self._db.read() as tx:
            return float(tx.execute(select(CLOCK)).scalar_one())

    def version(self) -> int:
        """A number that grows with every write but heartbeats: has anything changed?

        That a lease has expired is the passing of time, not a write. It also grows when the
        connection was lost, because a crash of the database may have taken the last leases along;
        it says nothing about the number another process sees.
        """
        with self._db.read() as tx:
            found = select(counters.c.value).where(counters.c.name == "version")
            stored = int(tx.execute(found).scalar_one())
        return stored + (self._db.generation << 40)

    def leases(self, scope: Scope) -> tuple[Lease, ...]:
        """Living leases, oldest first."""
        with self._db.read() as tx:
            return leases.living(tx, scope, self._mirror.known(tx))

    def ended_leases(self, scope: Scope) -> tuple[int, int]:
        """How many leases have ended, and how many of them as a run, a release or an expiry."""
        with self._db.read() as tx:
            return leases.ended(tx, scope)

    # --- language models ----------------------------------------------------------------------

    def usage(self, society: str, agent: str | None = None) -> Usage:
        """What a society's requests to language models have cost so far, or those of one agent."""
        with self._db.read() as tx:
            return tally.usage(tx, society, agent)

    def usage_by_agent(self, society: str) -> Mapping[str, Usage]:
        """What each agent's requests have cost; only those who made some, in order of name."""
        with self._db.read() as tx:
            return tally.usage_by_agent(tx, society)

    def calls(self, society: str | None = None) -> tuple[Call, ...]:
        """Requests to language models in the order in which they were recorded."""
        query = select(calls).order_by(calls.c.number)
        if society is not None:
            query = query.where(calls.c.society == society)
        with self._db.read() as tx:
            return tuple(rows.to_call(row) for row in tx.execute(query).mappings())

    # --- runs ---------------------------------------------------------------------------------

    def source(self, digest: str) -> str | None:
        """What was kept under a digest; None for runs made before sources were kept."""
        with self._db.read() as tx:
            found = tx.execute(select(sources.c.content).where(sources.c.digest == digest))
            return found.scalar_one_or_none()

    def run(self, id: str) -> Run:
        """One finished run.

        Raises:
            InvariantViolated: no run of this id has finished.
        """
        with self._db.read() as tx:
            row = self._row(tx, select(runs).where(runs.c.id == id), "finished run", id)
            return rows.to_run(row, self._mirror.known(tx))

    def runs(
        self,
        scope: Scope | None = None,
        *,
        kinds: Collection[RunKind] | None = None,
        variant: Variant | None = None,
        split: Split | None = None,
        society: str | None = None,
        last: int | None = None,
    ) -> tuple[Run, ...]:
        """Finished runs in order of finishing; None means any. With `last`, the latest so many."""
        if last == 0:
            return ()
        query = select(runs)
        if scope is not None:
            query = query.where(runs.c.scope == _scope_of(scope))
        elif variant is not None:  # the index of variants begins with the scope
            query = query.where(runs.c.scope.in_(select(scopes.c.number)))
        if kinds is not None:
            query = query.where(runs.c.kind.in_([kind.value for kind in kinds]))
        if variant is not None:
            query = query.where(runs.c.variant == variant.fingerprint)
        if split is not None:
            query = query.where(runs.c.split == split.value)
        if society is not None:
            query = query.where(runs.c.society == society)
        query = query.order_by(runs.c.number if last is None else runs.c.number.desc()).limit(last)
        with self._db.read() as tx:
            found = tuple(run for _, run in read_runs(tx, query, self._mirror.known(tx)))
        return found if last is None else found[::-1]

    def screening_score(self, scope: Scope, variant: Variant) -> float | None:
        """Score of a variant on the screening seed; None if it has none there."""
        found = self.runs(scope, kinds=[RunKind.SCREENING], variant=variant)
        return found[0].score if found else None

    def board(self, scope: Scope) -> Board:
        """The screening runs of a scope, kept in memory and brought up to date by each call."""
        with self._db.read() as tx:
            number = scope_number(tx, scope, create=False)
            return Board() if number is None else self._mirror.board(tx, number)

    def pool(
        self, scope: Scope, variant: Variant, which: SeedList = SeedList.VERIFICATION
    ) -> dict[int, float | None]:
        """A variant's results on a list of seeds: seed -> score, in the order of the list.

        None stands for a run that diverged, timed out, was rejected or crashed twice. A seed
        whose first run crashed is absent until it was repeated. Runs of a study count when their
        data order has the same seed, and once.

        Args:
            scope: Task and tier.
            variant: Whose results.
            which: List of seeds; the pool a claim is judged by stands on the verification seeds.
        """
        query = (
            select(seeds.c.seed, runs.c.score)
            .join(runs, and_(runs.c.scope == seeds.c.scope, runs.c.seed == seeds.c.seed))
            .join(scopes, scopes.c.number == seeds.c.scope)
            .where(
                scopes.c.task == scope.task,
                scopes.c.tier == scope.tier,
                seeds.c.list == which.value,
                runs.c.variant == variant.fingerprint,
                runs.c.kind.in_([kind.value for kind in leases.POOL_KINDS_OF[which]]),
                runs.c.data_seed.is_(None),
                runs.c.repeat == 0,
                leases.is_result(),
            )
            .order_by(seeds.c.position)
        )
        with self._db.read() as tx:
            return {seed: score for seed, score in tx.execute(query)}

    def pool_sizes(self, scope: Scope) -> Mapping[str, int]:
        """How many verification seeds each variant has a result on, by fingerprint; no zeros."""
        with self._db.read() as tx:
            number = scope_number(tx, scope, create=False)
            return {} if number is None else self._mirror.pool_sizes(tx, number)

    # --- claims and champions -----------------------------------------------------------------

    def claim(self, id: str) -> Claim:
        """One claim with its latest verdict.

        Raises:
            InvariantViolated: there is no such claim.
        """
        found = self._claims(select(claims).where(claims.c.id == id))
        if not found:
            raise InvariantViolated(f"No claim {id!r} in {self.path}.")
        return found[0]

    def claims(self, scope: Scope | None = None, *, open_only: bool = False) -> tuple[Claim, ...]:
        """Claims in order of filing, each with its latest verdict."""
        if scope is not None and not open_only:
            return self.docket(scope).claims
        query = select(claims).order_by(claims.c.number)
        if open_only:
            query = query.where(~exists().where(verdicts.c.claim_id == claims.c.id))
        if scope is not None:
            query = query.where(claims.c.scope == _scope_of(scope))
        return self._claims(query)

    def docket(self, scope: Scope) -> Docket:
        """The claims of a scope; what is known of them is kept in memory."""
        with self._db.read() as tx:
            number = scope_number(tx, scope, create=False)
            return Docket((), {}) if number is None else self._mirror.docket(tx, number)

    def open_claims(self, scope: Scope) -> tuple[Claim, ...]:
        """Claims without a verdict; does not read the others, if they have not been read."""
        with self._db.read() as tx:
            number = scope_number(tx, scope, create=False)
            if number is not None and self._mirror.has_claims(number):
                return self._mirror.docket(tx, number).open
        return self.claims(scope, open_only=True)

    def closed_claims(self, scope: Scope, *, last: int) -> tuple[Claim, ...]:
        """The claims that had a verdict latest, in order of the verdicts."""
        if last == 0:
            return ()
        later = verdicts.alias()
        query = (
            select(claims)
            .join(verdicts, verdicts.c.claim_id == claims.c.id)
            .where(
                claims.c.scope == _scope_of(scope),
                ~exists().where(
                    later.c.claim_id == claims.c.id, later.c.number > verdicts.c.number
                ),
            )
            .order_by(verdicts.c.number.desc())
            .limit(last)
        )
        return self._claims(query)[::-1]

    def decisions(self, scope: Scope) -> Mapping[Decision, int]:
        """How many claims have which latest verdict, zeros included."""
        with self._db.read() as tx:
            return tally.decisions(tx, scope_number(tx, scope, create=False) or 0)

    def _claims(self, query: Select[Any]) -> tuple[Claim, ...]:
        with self._db.read() as tx:
            found = tx.execute(query).mappings().all()
            return tuple(read_claims(tx, found, self._mirror.known(tx)))

    def champions(self, scope: Scope) -> tuple[Champion, ...]:
        """The champion history, the baseline first."""
        with self._db.read() as tx:
            number = scope_number(tx, scope, create=False)
            return () if number is None else self._mirror.champions(tx, number)

    def champion(self, scope: Scope) -> Champion | None:
        """The present champion; None before the baseline was crowned."""
        query = select(champions).where(champions.c.scope == _scope_of(scope))
        with self._db.read() as tx:
            latest = tx.execute(query.order_by(champions.c.number.desc()).limit(1))
            row = latest.mappings().first()
            return None if row is None else rows.to_champion(row, self._mirror.known(tx))

    # --- what others said and found -----------------------------------------------------------

    def insights(
        self,
        scope: Scope | None = None,
        *,
        society: str | None = None,
        last: int | None = None,
    ) -> tuple[Insight, ...]:
        """Insights in order of posting; with `last`, the latest so many."""
        if last == 0:
            return ()
        query = select(insights).order_by(insights.c.number.desc()).limit(last)
        if scope is not None:
            query = query.where(insights.c.scope == _scope_of(scope))
        if society is not None:
            query = query.where(insights.c.society == society)
        with self._db.read() as tx:
            found = tx.execute(query).mappings().all()
        return tuple(rows.to_insight(row) for row in reversed(found))

    def hypotheses(
        self,
        scope: Scope | None = None,
        *,
        state: HypothesisState | None = None,
        society: str | None = None,
        last: int | None = None,
    ) -> tuple[Hypothesis, ...]:
        """Hypotheses as they are now, in order of posting; with `last`, the latest so many.

        A take that ran out counts as open again; an idea whose variant somebody is screening counts
        as taken, by whoever does it. `state=OPEN` is therefore what is free to be tested.
        """
        query = exchange.listing(scope, state=state, society=society, last=last)
        with self._db.read() as tx:
            found = tx.execute(query).mappings().all()
            known = self._mirror.known(tx).fetch(row["variant"] for row in found)
        ordered = found if last is None else found[::-1]
        return tuple(rows.to_hypothesis(row, known) for row in ordered)

    def hypothesis(self, id: str) -> Hypothesis:
        """One hypothesis as it is now.

        Raises:
            InvariantViolated: there is no such hypothesis.
        """
        with self._db.read() as tx:
            row = self._row(tx, exchange.listing(id=id), "hypothesis", id)
            return rows.to_hypothesis(row, self._mirror.known(tx))

    def insight(self, id: str) -> Insight:
        """One insight.

        Raises:
            InvariantViolated: there is no such insight.
        """
        with self._db.read() as tx:
            query = select(insights).where(insights.c.id == id)
            return rows.to_insight(self._row(tx, query, "insight", id))

    def prior(self, id: str) -> Prior:
        """One result that a user brought along.

        Raises:
            InvariantViolated: there is no such result.
        """
        with self._db.read() as tx:
            query = select(priors).where(priors.c.id == id)
            return rows.to_prior(self._row(tx, query, "prior result", id))

    def refusals(
        self, scope: Scope | None = None, *, society: str | None = None
    ) -> tuple[Refusal, ...]:
        """Proposals that were not run, in order of refusal."""
        query = select(refusals).order_by(refusals.c.number)
        if scope is not None:
            query = query.where(refusals.c.scope == _scope_of(scope))
        if society is not None:
            query = query.where(refusals.c.society == society)
        with self._db.read() as tx:
            found = tx.execute(query).mappings().all()
            known = self._mirror.known(tx).fetch(row["variant"] for row in found)
        return tuple(rows.to_refusal(row, known) for row in found)

    def savings(self, scope: Scope) -> Savings:
        """What was not run because of what is known; counted, so that a status page can show it."""
        with self._db.read() as tx:
            return tally.savings(tx, scope_number(tx, scope, create=False) or 0)

    def priors(self, scope: Scope | None = None) -> tuple[Prior, ...]:
        """Results that users brought along, in order of import."""
        query = select(priors).order_by(priors.c.number)
        if scope is not None:
            query = query.where(priors.c.scope == _scope_of(scope))
        with self._db.read() as tx:
            return tuple(rows.to_prior(row) for row in tx.execute(query).mappings())

    # --- measured noise, studies --------------------------------------------------------------

    def noise(self, scope: Scope) -> Noise | None:
        """The latest noise floor; None before one was measured."""
        history = self.noise_history(scope)
        return history[-1] if history else None

    def noise_history(self, scope: Scope | None = None) -> tuple[Noise, ...]:
        """Noise floors in order of measuring."""
        query = (
            select(noise, scopes.c.task, scopes.c.tier)
            .join(scopes, scopes.c.number == noise.c.scope)
            .order_by(noise.c.number)
        )
        if scope is not None:
            query = query.where(scopes.c.task == scope.task, scopes.c.tier == scope.tier)
        with self._db.read() as tx:
            return tuple(rows.to_noise(row) for row in tx.execute(query).mappings())

    def studies(self, scope: Scope | None = None, *, kind: str | None = None) -> tuple[Study, ...]:
        """Studies in order of registration, each with its result if it has one."""
        query = (
            select(studies, study_results.c.result, study_results.c.concluded_at,
                   scopes.c.task, scopes.c.tier)
            .join(scopes, scopes.c.number == studies.c.scope)
            .outerjoin(study_results, study_results.c.study == studies.c.id)
            .order_by(studies.c.number)
        )  # fmt: skip
        if scope is not None:
            query = query.where(scopes.c.task == scope.task, scopes.c.tier == scope.tier)
        if kind is not None:
            query = query.where(studies.c.kind == kind)
        cited: dict[str, list[str]] = {}
        with self._db.read() as tx:
            found = tx.execute(query).mappings().all()
            places = select(study_runs.c.study, study_runs.c.run_id).order_by(study_runs.c.place)
            for study, run in tx.execute(places):
                cited.setdefault(study, []).append(run)
        return tuple(rows.to_study(row, tuple(cited.get(row["id"], ()))) for row in found)

    def study(self, id: str) -> Study:
        """One study.

        Raises:
            InvariantViolated: there is no such study.
        """
        for one in self.studies():
            if one.id == id:
                return one
        raise InvariantViolated(f"No study {id!r} in {self.path}.")

    # --- who did what -------------------------------------------------------------------------

    def last_begun(self, society: str, role: str, duty: str) -> float | None:
        """When the latest such duty of a society was begun, Unix seconds; None for never."""
        query = select(func.max(activities.c.started_at)).where(
            activities.c.society == society, activities.c.role == role, activities.c.duty == duty
        )
        with self._db.read() as tx:
            begun = tx.execute(query).scalar()
        return None if begun is None else float(begun)

    def activities(
        self, society: str | None = None, *, limit: int | None = None
    ) -> tuple[Activity, ...]:
        """Who did what, in order of recording; with `limit`, the latest so many."""
        query = select(activities).order_by(activities.c.number.desc()).limit(limit)
        if society is not None:
            query = query.where(activities.c.society == society)
        with self._db.read() as tx:
            found = tx.execute(query).mappings().all()
        return tuple(rows.to_activity(row) for row in reversed(found))

    # --- ids and totals -----------------------------------------------------------------------

    def whereabouts(self, id: str) -> links.Whereabouts | None:
        """What kind of record an id names, and its task and tier; None if it names nothing."""
        with self._db.read() as tx:
            return links.whereabouts(tx, id)

    def latest_ids(self) -> Mapping[str, str]:
        """The latest id of each kind of record that there is."""
        with self._db.read() as tx:
            return links.latest(tx)

    def links(
        self, id: str, where: links.Whereabouts, variant: Variant | None = None
    ) -> links.Links:
        """What is linked to a record, found by its id and by the variant it is about."""
        with self._db.read() as tx:
            mark = None if variant is None else variant.fingerprint
            return links.about(tx, id, where, mark, self._mirror.known(tx))

    def held(self, society: str) -> Mapping[str, int]:
        """How many records of each kind a society has made."""
        with self._db.read() as tx:
            return links.held(tx, society)

    def scopes(self) -> tuple[Scope, ...]:
        """All scopes that were worked in, oldest first."""
        query = select(scopes.c.task, scopes.c.tier).order_by(scopes.c.number)
        with self._db.read() as tx:
            return tuple(Scope(task, tier) for task, tier in tx.execute(query))

    def counts(self, scope: Scope) -> Counts:
        """How much there is, for a status page."""
        with self._db.read() as tx:
            return tally.counts(tx, scope, scope_number(tx, scope, create=False) or 0)

    def spent(self, society: str) -> Spent:
        """What a society has made of its budget; leases of other societies are not counted."""
        with self._db.read() as tx:
            return tally.spent(tx, society)

    # --- what the semantic index reads --------------------------------------------------------

    def posted(self, after: int, limit: int) -> tuple[Posted, ...]:
        """The next lines of the outbox after a sequence number."""
        query = select(outbox).where(outbox.c.seq > after).order_by(outbox.c.seq).limit(limit)
        with self._db.read() as tx:
            return tuple(Posted(seq, kind, ref) for seq, kind, ref in tx.execute(query))

    def posted_last(self) -> int:
        """Sequence number of the outbox's last line; 0 while it is empty."""
        with self._db.read() as tx:
            return int(tx.execute(select(func.max(outbox.c.seq))).scalar() or 0)

    def told(self, posted: Sequence[Posted]) -> feed.Records:
        """What lines of the outbox are about, as it is now; a query per kind of record."""
        with self._db.read() as tx:
            return feed.read(tx, posted)

    def cursor(self, name: str) -> int:
        """How far a reader of the outbox has come; 0 for a new one."""
        with self._db.read() as tx:
            value = tx.execute(select(counters.c.value).where(counters.c.name == name)).scalar()
        return int(value or 0)

    def _row(self, tx: Connection, query: Select[Any], kind: str, id: str) -> RowMapping:
        """The row that an id names. Raises `InvariantViolated` if there is none."""
        row = tx.execute(query).mappings().first()
        if row is None:
            raise InvariantViolated(f"No {kind} {id!r} in {self.path}.")
        return row


def _scope_of(scope: Scope) -> Any:
    return (
        select(scopes.c.number)
        .where(scopes.c.task == scope.task, scopes.c.tier == scope.tier)
        .scalar_subquery()
    )
