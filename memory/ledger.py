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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, exists, func, insert, select, text, update

from society.errors import InvariantViolated, NotANotebook
from society.memory import exchange, feed, leases, links, rows, tally
from society.memory.database import Database, stored
from society.memory.entries import CLOCK, Author, next_number, scope_number, write
from society.memory.feed import Posted
from society.memory.mirror import Board, Docket, Mirror, read_claims, read_runs
from society.memory.schema import (
    activities,
    calls,
    champions,
    claims,
    commits,
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
    Budget,
    Call,
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
    Prior,
    Refusal,
    Run,
    RunKind,
    Savings,
    Scope,
    SeedList,
    SocietyRecord,
    SocietyState,
    Split,
    Study,
    Usage,
    Variant,
)


class Ledger:
    """All facts of one notebook. Open it with `Ledger.open`; use it in a `with` block."""

    def __init__(self, database: Database) -> None:
        """Take over an initialised database; use `Ledger.open`."""
        self._db = database
        self._mirror = Mirror()

    @classmethod
    def open(
        cls, place: Path | str, secret_seed: int | None = None, *, read_only: bool = False
    ) -> Ledger:
        """Open a ledger, creating it when there is none.

        Args:
            place: The SQLite file, the notebook's folder, or a URL: `sqlite:////ABSOLUTE/PATH` or
                `postgresql://USER@HOST/DATABASE` (the password from PGPASSWORD or ~/.pgpass).
            secret_seed: Where the seeds of a *new* ledger come from, for repeatable experiments
                and tests; drawn from the operating system when None. An existing ledger keeps
                its own.
            read_only: Never write, never create; works beside a process that writes.

        Raises:
            UsageError: the URL is none of these.
            NotANotebook: there is none to read, or it has another schema version.
            NotebookDamaged: the database is corrupted, or cannot be reached, created or written.
        """
        if "://" not in str(place):
            file = Path(place)
            place = file / "ledger.sqlite" if file.is_dir() else file
        database = Database(place, read_only=read_only)
        path = database.path
        if read_only and isinstance(path, Path) and not path.is_file():
            raise NotANotebook(f"No ledger at {path}. Name the folder of an existing notebook.")
        try:
            database.initialise(secret_seed)
        except BaseException:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Close all connections. Leases stay as they are."""
        self._db.close()

    def __enter__(self) -> Ledger:
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

    # --- societies -----------------------------------------------------------------------------

    def start_society(
        self, seed: int, settings: Mapping[str, object], *, home: str = ""
    ) -> SocietyRecord:
        """Record a new society, running from now, of the notebook folder with identity `home`."""
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
                    home=home,
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

        That a lease has expired is the passing of time, not a write. It also grows when the
        connection was lost, because a crash of the database may have taken the last leases along;
        it says nothing about the number another process sees.
        """
        with self._db.read() as tx:
            found = select(counters.c.value).where(counters.c.name == "version")
            stored = int(tx.execute(found).scalar_one())
        return stored + (self._db.generation << 40)

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
        with self._db.read() as tx:
            leases.see_screening(tx, request)
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
            return leases.living(tx, scope, self._mirror.known(tx))

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
            InvariantViolated: the run was made on another hardware tier than the lease is for.
        """
        with self._db.write() as tx:
            row = leases.held(tx, lease)
            leases.check_tier(tx, row, environment)
            values = rows.run_values(row, measurement, environment, budget)
            recorded = tx.execute(_NEW_RUN, values).mappings().one()
        return rows.to_run(recorded, {lease.variant.fingerprint: lease.variant})

    # --- the hypothesis exchange ---------------------------------------------------------------

    def take_hypothesis(self, id: str, society: str, holder: str, ttl_s: float) -> Hypothesis:
        """Take an open hypothesis to test it, before its run is leased.

        It stays taken for as long as its variant is being screened, also after the deadline, and
        is closed by whatever screening run of its variant finishes, with any outcome.

        Args:
            id: E.g. `h0007`.
            society: Society that will run it.
            holder: The agent.
            ttl_s: Seconds until somebody else may take it, if no run of it has been leased.

        Raises:
            AlreadyLeased: somebody tests it, or it was tested or dropped.
            InvariantViolated: there is no such hypothesis.
        """
        with self._db.write(durable=False) as tx:
            exchange.take(tx, id, society, holder, ttl_s)
        return self.hypothesis(id)

    def return_hypothesis(self, id: str, holder: str, *, society: str | None = None) -> None:
        """Reopen a hypothesis that its holder does not test after all.

        Does nothing when it has been tested or dropped, or when somebody else has taken it.
        """
        with self._db.write(durable=False) as tx:
            exchange.give_back(tx, id, holder, society)

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
        room: int | None = None,
    ) -> bool:
        """Write all entries, in order, in one transaction; all of them or none.

        Args:
            scope: Task and tier they belong to.
            society: Society they are posted in.
            agent: Who posts them.
            entries: What to write.
            key: Idempotency key. A key that was committed before writes nothing.
            activity: A line for the agents' timeline.
            room: How many hypotheses of the scope may be open. Those that the exchange has no room
                for are left out, or take the place of a clearly worse one, see `society.exchange`;
                None lets all in. One whose variant was proposed or screened before is left out
                anyway.

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
            if room is not None:
                entries = exchange.admitted(tx, number, entries, room)
            for entry in entries:
                write(tx, by, rows.cleaned(entry))
            if activity is not None:
                values = asdict(rows.cleaned(activity))
                tx.execute(insert(activities).values(society=society, **values))
        return True

    def keep_source(self, digest: str, content: str) -> None:
        """Keep what runs name by its digest (the trainer's code, a profile), once."""
        if self.source(digest) is not None:
            return
        with self._db.write() as tx:
            if tx.execute(select(sources.c.digest).where(sources.c.digest == digest)).first():
                return
            tx.execute(insert(sources).values(digest=digest, content=content, kept_at=CLOCK))

    def record_call(self, call: Call) -> None:
        """Record a request to a language model, answered or not, as made now.

        One short transaction that does not wait for the disk, and that `version` does not count:
        the next fact takes it along. (A power cut may take the calls after the last fact.)

        Raises:
            InvariantViolated: there is no such society, or a number is negative or no number.
        """
        with self._db.write(visible=False, durable=False) as tx:
            tx.execute(_NEW_CALL, rows.call_values(call))

    # --- reading -------------------------------------------------------------------------------

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
            row = tx.execute(select(runs).where(runs.c.id == id)).mappings().first()
            if row is None:
                raise InvariantViolated(f"No finished run {id!r} in {self.path}.")
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
            row = tx.execute(exchange.listing(id=id)).mappings().first()
            if row is None:
                raise InvariantViolated(f"No hypothesis {id!r} in {self.path}.")
            return rows.to_hypothesis(row, self._mirror.known(tx))

    def insight(self, id: str) -> Insight:
        """One insight.

        Raises:
            InvariantViolated: there is no such insight.
        """
        with self._db.read() as tx:
            row = tx.execute(select(insights).where(insights.c.id == id)).mappings().first()
        if row is None:
            raise InvariantViolated(f"No insight {id!r} in {self.path}.")
        return rows.to_insight(row)

    def prior(self, id: str) -> Prior:
        """One result that a user brought along.

        Raises:
            InvariantViolated: there is no such result.
        """
        with self._db.read() as tx:
            row = tx.execute(select(priors).where(priors.c.id == id)).mappings().first()
        if row is None:
            raise InvariantViolated(f"No prior result {id!r} in {self.path}.")
        return rows.to_prior(row)

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

    # --- what the semantic index reads ---------------------------------------------------------

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

    def set_cursor(self, name: str, seq: int) -> None:
        """Remember how far a reader of the outbox has come; a cursor never moves backwards."""
        with self._db.write(visible=False, durable=False) as tx:
            tx.execute(
                text(
                    "INSERT INTO counters (name, value) VALUES (:name, :seq)"
                    " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
                    " WHERE excluded.value > counters.value"
                ),
                {"name": name, "seq": seq},
            )


_NEW_CALL = insert(calls).values(called_at=CLOCK)
_NEW_RUN = insert(runs).values(finished_at=CLOCK).returning(*runs.c)


def _scope_of(scope: Scope) -> Any:
    return (
        select(scopes.c.number)
        .where(scopes.c.task == scope.task, scopes.c.tier == scope.tier)
        .scalar_subquery()
    )
