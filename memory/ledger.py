"""`Ledger`: the one source of truth. What is true is decided here, in transactions.

Concurrency: every call is one transaction, safe from several threads and processes; writers queue
for at most 30 s, readers never wait. Staleness is decided by the database's clock inside SQL, and
ownership by fencing tokens. Records that are returned are frozen and belong to the caller. Text is
kept as UTF-8: half of a surrogate pair is written as `?`.

Every writing call may raise `InvariantViolated` (a rule of `schema.py`), `NotebookInUse` (the
write lock was held for 30 s) and `NotebookDamaged` (the file cannot be written); every reading
call may raise `NotebookDamaged`.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, and_, exists, insert, literal_column, select, update

from society.errors import InvariantViolated, NotANotebook
from society.memory import leases, rows
from society.memory.database import Database
from society.memory.entries import CLOCK, Author, next_number, scope_number, write
from society.memory.schema import (
    activities,
    champions,
    claims,
    commits,
    counters,
    hypotheses,
    insights,
    noise,
    outbox,
    runs,
    scopes,
    seeds,
    societies,
    studies,
    study_results,
    study_runs,
    variants,
    verdict_runs,
    verdicts,
)
from society.records import (
    Activity,
    Budget,
    Champion,
    Claim,
    Counts,
    Decision,
    Entry,
    Environment,
    Hypothesis,
    HypothesisState,
    Insight,
    Lease,
    Measurement,
    Noise,
    Outcome,
    Run,
    RunKind,
    Scope,
    SeedList,
    SocietyRecord,
    SocietyState,
    Split,
    Study,
    Variant,
    Verdict,
)

_Enum = TypeVar("_Enum", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Posted:
    """One line of the outbox: something the semantic index should read."""

    seq: int
    kind: str
    """`run`, `claim`, `verdict`, `insight` or `hypothesis`."""
    ref: str
    """Id of the record; of the claim for a verdict."""


class Ledger:
    """All facts of one notebook. Open it with `Ledger.open`; use it in a `with` block."""

    def __init__(self, database: Database) -> None:
        """Take over an initialised database; use `Ledger.open`."""
        self._db = database
        self._lock = threading.Lock()
        self._variants: dict[str, Variant] = {}
        self._variants_read = 0
        self._runs: list[tuple[int, str, Run]] = []
        self._verdicts: dict[str, Verdict] = {}
        self._verdicts_read = 0

    @classmethod
    def open(
        cls, path: Path | str, secret_seed: int | None = None, *, read_only: bool = False
    ) -> Ledger:
        """Open a ledger, creating it when the file does not exist.

        Args:
            path: The SQLite file, or the notebook's folder.
            secret_seed: Where the seeds of a *new* ledger come from, for repeatable experiments
                and tests; drawn from the operating system when None. An existing ledger keeps
                its own.
            read_only: Never write, never create; works beside a process that writes.

        Raises:
            NotANotebook: there is none to read, or it has another schema version.
            NotebookDamaged: the file is corrupted, or cannot be created or written.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "ledger.sqlite"
        if read_only and not file.is_file():
            raise NotANotebook(f"No ledger at {file}. Name the folder of an existing notebook.")
        database = Database(file, read_only=read_only)
        try:
            database.initialise(secret_seed)
        except BaseException:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Close the file. Leases stay as they are."""
        self._db.close()

    def __enter__(self) -> Ledger:
        """The ledger itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return self._db.path

    # --- societies -----------------------------------------------------------------------------

    def start_society(self, seed: int, settings: Mapping[str, object]) -> SocietyRecord:
        """Record a new society, running from now."""
        with self._db.write() as tx:
            number = next_number(tx, societies)
            identity = f"s{number:03d}"
            tx.execute(
                insert(societies).values(
                    number=number,
                    id=identity,
                    seed=seed,
                    settings=json.dumps(dict(settings), sort_keys=True),
                    state=SocietyState.RUNNING.value,
                    started_at=CLOCK,
                )
            )
        return self.society(identity)

    def set_society_state(
        self,
        id: str,
        state: SocietyState,
        *,
        busy: float | None = None,
        wall_s: float | None = None,
    ) -> None:
        """Record where a society stands; `busy` and `wall_s` keep their value when None.

        Raises:
            InvariantViolated: there is no such society.
        """
        values: dict[str, Any] = {
            "state": state.value,
            "ended_at": None if state is SocietyState.RUNNING else CLOCK,
        }
        if busy is not None:
            values["busy"] = busy
        if wall_s is not None:
            values["wall_s"] = wall_s
        with self._db.write() as tx:
            changed = tx.execute(update(societies).where(societies.c.id == id).values(**values))
            if changed.rowcount != 1:
                raise InvariantViolated(f"No society {id!r} in {self.path}.")

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

        That a lease has expired is the passing of time, not a write.
        """
        with self._db.read() as tx:
            found = select(counters.c.value).where(counters.c.name == "version")
            return int(tx.execute(found).scalar_one())

    # --- seeds ---------------------------------------------------------------------------------

    def seeds(self, which: SeedList, scope: Scope, count: int) -> tuple[int, ...]:
        """The first `count` seeds of a list, drawn once and kept. For the harness, not a brain."""
        with self._db.read() as tx:
            found = leases.drawn(tx, which, scope, count)
        if len(found) < count:
            with self._db.write() as tx:
                found = leases.draw(tx, which, scope, count)
        return found

    # --- leases --------------------------------------------------------------------------------

    def lease_screening(
        self,
        scope: Scope,
        society: str,
        *,
        holder: str,
        variant: Variant,
        ttl_s: float,
        idea: str = "",
    ) -> Lease:
        """Lease a variant's run on the first screening seed, validation split.

        Raises:
            AlreadyLeased: a living lease holds the fingerprint.
            AlreadyRun: it was screened before, with any outcome; carries the run id.
        """
        request = leases.Request(
            scope, society, holder, variant, RunKind.SCREENING, ttl_s, idea=idea
        )
        with self._db.write(durable=False) as tx:
            return leases.lease_screening(tx, request)

    def lease_next_seed(
        self,
        scope: Scope,
        society: str,
        *,
        holder: str,
        variant: Variant,
        kind: RunKind,
        claim_id: str | None = None,
        ttl_s: float,
    ) -> Lease:
        """Lease the first verification seed that this variant has no result on, holdout split.

        A crashed run is repeated once on the same seed; any other outcome, and a second crash,
        is a result. Seeds under a living lease are passed over.

        Args:
            scope: Task and tier.
            society: Society the run is charged to.
            holder: The agent; not the author of `claim_id` or of an open claim on the variant.
            variant: What to run; for a verification, the claim's variant.
            kind: `CALIBRATION` or `VERIFICATION`.
            claim_id: The claim it serves; a verification needs one.
            ttl_s: Seconds until the lease expires without a heartbeat.

        Raises:
            NotIndependent: the holder is the author.
            ClaimClosed: a verification of a claim that was rejected, superseded or rolled back.
        """
        if kind not in leases.POOL_KINDS:
            raise InvariantViolated(f"A {kind.value} run does not stand on verification seeds.")
        request = leases.Request(scope, society, holder, variant, kind, ttl_s, claim_id)
        with self._db.write(durable=False) as tx:
            return leases.lease_next_seed(tx, request)

    def lease_audit(
        self, scope: Scope, society: str, *, holder: str, variant: Variant, ttl_s: float
    ) -> Lease:
        """Lease the first audit seed that this variant has no result on, holdout split."""
        request = leases.Request(scope, society, holder, variant, RunKind.AUDIT, ttl_s)
        with self._db.write(durable=False) as tx:
            return leases.lease_next_seed(tx, request)

    def lease_study(
        self,
        scope: Scope,
        society: str,
        *,
        holder: str,
        variant: Variant,
        position: int,
        data_position: int | None = None,
        repeat: int = 0,
        ttl_s: float,
    ) -> Lease:
        """Lease a variant's run at a place of the study list, holdout split.

        A crashed run is repeated once; any other outcome, and a second crash, is a result.

        Args:
            scope: Task and tier.
            society: Record the run is charged to.
            holder: Who makes it.
            variant: What to run.
            position: Place of its seed in the study list, from 0.
            data_position: Place of the seed of its data order; None for the same seed.
            repeat: Which repetition of the same seeds, from 0.
            ttl_s: Seconds until the lease expires without a heartbeat.

        Raises:
            AlreadyLeased: somebody is at it.
            AlreadyRun: there is a result; carries the run id.
            InvariantViolated: a place or repetition below 0.
        """
        if min(position, position if data_position is None else data_position, repeat) < 0:
            raise InvariantViolated("Places of the study list and repetitions count from 0.")
        request = leases.Request(scope, society, holder, variant, RunKind.STUDY, ttl_s)
        with self._db.write(durable=False) as tx:
            return leases.lease_study(tx, request, position, data_position, repeat)

    def lease_reproduction(
        self, scope: Scope, society: str, *, holder: str, claim_id: str, ttl_s: float
    ) -> Lease:
        """Lease the repetition of a claim's screening run: same seed, same split.

        Raises:
            AlreadyLeased: somebody is at it.
            AlreadyRun: it was reproduced before (a crash may be repeated once).
            NotIndependent: the holder is the author.
            ClaimClosed: the claim was rejected, superseded or rolled back.
        """
        claim = self.claim(claim_id)
        request = leases.Request(
            scope, society, holder, claim.variant, RunKind.REPRODUCTION, ttl_s, claim_id
        )
        with self._db.write(durable=False) as tx:
            return leases.lease_reproduction(tx, request, claim.screening_run)

    def heartbeat(self, lease: Lease, ttl_s: float) -> Lease:
        """Prolong a lease to `ttl_s` seconds from now, also when it ran out and nobody took it.

        Raises:
            LeaseLost: it was taken by somebody else, released or finished.
        """
        with self._db.write(visible=False, durable=False) as tx:
            return leases.prolong(tx, lease, ttl_s)

    def release(self, lease: Lease) -> None:
        """Give a lease back unused; does nothing when it has ended already."""
        with self._db.write(durable=False) as tx:
            leases.release(tx, lease)

    def release_all(self, society: str) -> int:
        """End every living lease of a society and reopen the hypotheses it had taken.

        For the process that owns the notebook, when it starts after a crash.

        Returns:
            How many leases were ended.
        """
        with self._db.write() as tx:
            return leases.release_all(tx, society)

    def leases(self, scope: Scope) -> tuple[Lease, ...]:
        """Living leases, oldest first."""
        with self._db.read() as tx:
            return leases.living(tx, scope, self._read_variants(tx))

    def ended_leases(self, scope: Scope) -> tuple[int, int]:
        """How many leases have ended, and how many of them as a run, a release or an expiry."""
        with self._db.read() as tx:
            return leases.ended(tx, scope)

    def finish(
        self,
        lease: Lease,
        measurement: Measurement,
        environment: Environment,
        budget: Budget,
    ) -> Run:
        """Record the run that a lease became and end the lease, in one transaction.

        A lease that ran out may still be finished while nobody else took the work.

        Raises:
            LeaseLost: the token is stale, or the lease was finished or released before.
        """
        with self._db.write() as tx:
            row = leases.held(tx, lease)
            values = rows.run_values(row, measurement, environment, budget)
            tx.execute(insert(runs).values(**values, finished_at=CLOCK))
        return self.run(lease.run_id)

    # --- writing -------------------------------------------------------------------------------

    def commit(
        self,
        scope: Scope,
        society: str,
        agent: str,
        entries: Sequence[Entry],
        *,
        key: str,
        activity: Activity | None = None,
    ) -> bool:
        """Write all entries, in order, in one transaction; all of them or none.

        Args:
            scope: Task and tier they belong to.
            society: Society they are posted in.
            agent: Who posts them.
            entries: What to write.
            key: Idempotency key. A key that was committed before writes nothing.
            activity: A line for the agents' timeline.

        Returns:
            Whether anything was written; False for a known key.
        """
        with self._db.write() as tx:
            if tx.execute(select(commits.c.key).where(commits.c.key == key)).first() is not None:
                return False
            tx.execute(insert(commits).values(key=key, society=society, agent=agent, at=CLOCK))
            number = scope_number(tx, scope, create=True)
            assert number is not None
            by = Author(number, society, agent)
            for entry in entries:
                write(tx, by, rows.cleaned(entry))
            if activity is not None:
                values = asdict(rows.cleaned(activity))
                tx.execute(insert(activities).values(society=society, **values))
        return True

    # --- reading -------------------------------------------------------------------------------

    def run(self, id: str) -> Run:
        """One finished run.

        Raises:
            InvariantViolated: no run of this id has finished.
        """
        with self._db.read() as tx:
            known = self._read_variants(tx)
            row = tx.execute(select(runs).where(runs.c.id == id)).mappings().first()
        if row is None:
            raise InvariantViolated(f"No finished run {id!r} in {self.path}.")
        return rows.to_run(row, known)

    def runs(
        self,
        scope: Scope | None = None,
        *,
        kinds: Collection[RunKind] | None = None,
        variant: Variant | None = None,
        split: Split | None = None,
        society: str | None = None,
    ) -> tuple[Run, ...]:
        """Finished runs in order of finishing; None means any."""
        with self._db.read() as tx:
            number = None if scope is None else scope_number(tx, scope, create=False)
            log = self._read_runs(tx)
        wanted = None if variant is None else variant.fingerprint
        return tuple(
            run
            for place, fingerprint, run in log
            if (scope is None or place == number)
            and (kinds is None or run.kind in kinds)
            and (wanted is None or fingerprint == wanted)
            and (split is None or run.split is split)
            and (society is None or run.society == society)
        )

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
        query = select(claims).order_by(claims.c.number)
        if scope is not None:
            query = query.where(claims.c.scope == _scope_of(scope))
        if open_only:
            query = query.where(~exists().where(verdicts.c.claim_id == claims.c.id))
        return self._claims(query)

    def _claims(self, query: Select[Any]) -> tuple[Claim, ...]:
        with self._db.read() as tx:
            known = self._read_variants(tx)
            latest = self._read_verdicts(tx)
            found = tx.execute(query).mappings().all()
        return tuple(rows.to_claim(row, known, latest.get(row["id"])) for row in found)

    def champions(self, scope: Scope) -> tuple[Champion, ...]:
        """The champion history, the baseline first."""
        query = select(champions).where(champions.c.scope == _scope_of(scope))
        with self._db.read() as tx:
            known = self._read_variants(tx)
            found = tx.execute(query.order_by(champions.c.number)).mappings()
            return tuple(rows.to_champion(row, known) for row in found)

    def champion(self, scope: Scope) -> Champion | None:
        """The present champion; None before the baseline was crowned."""
        history = self.champions(scope)
        return history[-1] if history else None

    def insights(
        self, scope: Scope | None = None, *, society: str | None = None
    ) -> tuple[Insight, ...]:
        """Insights in order of posting."""
        query = select(insights).order_by(insights.c.number)
        if scope is not None:
            query = query.where(insights.c.scope == _scope_of(scope))
        if society is not None:
            query = query.where(insights.c.society == society)
        with self._db.read() as tx:
            return tuple(rows.to_insight(row) for row in tx.execute(query).mappings())

    def hypotheses(
        self,
        scope: Scope | None = None,
        *,
        state: HypothesisState | None = None,
        society: str | None = None,
    ) -> tuple[Hypothesis, ...]:
        """Hypotheses in order of posting."""
        query = select(hypotheses).order_by(hypotheses.c.number)
        if scope is not None:
            query = query.where(hypotheses.c.scope == _scope_of(scope))
        if state is not None:
            query = query.where(hypotheses.c.state == state.value)
        if society is not None:
            query = query.where(hypotheses.c.society == society)
        with self._db.read() as tx:
            known = self._read_variants(tx)
            return tuple(rows.to_hypothesis(row, known) for row in tx.execute(query).mappings())

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

    def scopes(self) -> tuple[Scope, ...]:
        """All scopes that were worked in, oldest first."""
        query = select(scopes.c.task, scopes.c.tier).order_by(scopes.c.number)
        with self._db.read() as tx:
            return tuple(Scope(task, tier) for task, tier in tx.execute(query))

    def counts(self, scope: Scope) -> Counts:
        """How much there is, for a status page."""
        closed = {claim.id: claim.verdict for claim in self.claims(scope)}
        decisions = [verdict.decision for verdict in closed.values() if verdict is not None]
        finished = self.runs(scope)
        states = [hypothesis.state for hypothesis in self.hypotheses(scope)]
        return Counts(
            runs=_tally(RunKind, (run.kind for run in finished)),
            outcomes=_tally(Outcome, (run.outcome for run in finished)),
            claims_open=len(closed) - len(decisions),
            verdicts=_tally(Decision, decisions),
            champions=len(self.champions(scope)),
            insights=len(self.insights(scope)),
            hypotheses=_tally(HypothesisState, states),
            leases=len(self.leases(scope)),
            wall_s=sum(run.cost.wall_s for run in finished),
            flops=sum(run.cost.flops for run in finished),
        )

    # --- what the semantic index reads ---------------------------------------------------------

    def posted(self, after: int, limit: int) -> tuple[Posted, ...]:
        """The next lines of the outbox after a sequence number."""
        query = select(outbox).where(outbox.c.seq > after).order_by(outbox.c.seq).limit(limit)
        with self._db.read() as tx:
            return tuple(Posted(seq, kind, ref) for seq, kind, ref in tx.execute(query))

    def cursor(self, name: str) -> int:
        """How far a reader of the outbox has come; 0 for a new one."""
        with self._db.read() as tx:
            value = tx.execute(select(counters.c.value).where(counters.c.name == name)).scalar()
        return int(value or 0)

    def set_cursor(self, name: str, seq: int) -> None:
        """Remember how far a reader of the outbox has come."""
        with self._db.write(visible=False, durable=False) as tx:
            tx.exec_driver_sql(
                "INSERT INTO counters (name, value) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (name, seq),
            )

    # --- what is read once and kept: rows that never change -------------------------------------

    def _read_variants(self, tx: Connection) -> rows.Variants:
        rowid: Any = literal_column("variants.rowid")
        query = select(rowid.label("place"), variants).where(rowid > self._variants_read)
        with self._lock:
            for row in tx.execute(query.order_by(rowid)).mappings():
                self._variants[row["fingerprint"]] = rows.to_variant(row)
                self._variants_read = row["place"]
        return self._variants

    def _read_runs(self, tx: Connection) -> list[tuple[int, str, Run]]:
        known = self._read_variants(tx)
        with self._lock:
            last = self._runs[-1][-1].number if self._runs else 0
            new = tx.execute(select(runs).where(runs.c.number > last).order_by(runs.c.number))
            self._runs.extend(
                (row["scope"], row["variant"], rows.to_run(row, known)) for row in new.mappings()
            )
            return list(self._runs)

    def _read_verdicts(self, tx: Connection) -> dict[str, Verdict]:
        """Latest verdict by claim."""
        new = select(verdicts).where(verdicts.c.number > self._verdicts_read)
        with self._lock:
            for row in tx.execute(new.order_by(verdicts.c.number)).mappings().all():
                cited = (
                    select(verdict_runs.c.run_id)
                    .where(verdict_runs.c.verdict == row["number"])
                    .order_by(verdict_runs.c.place)
                )
                verdict = rows.to_verdict(row, tuple(tx.execute(cited).scalars()))
                self._verdicts[verdict.claim_id] = verdict
                self._verdicts_read = row["number"]
            return dict(self._verdicts)


def _scope_of(scope: Scope) -> Any:
    return (
        select(scopes.c.number)
        .where(scopes.c.task == scope.task, scopes.c.tier == scope.tier)
        .scalar_subquery()
    )


def _tally(known: type[_Enum], seen: Iterable[_Enum]) -> Mapping[_Enum, int]:
    """How often each member of an enumeration was seen, zeros included."""
    found = Counter(seen)
    return {member: found[member] for member in known}
