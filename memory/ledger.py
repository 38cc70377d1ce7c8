"""`Ledger`: the one source of truth. What is true is decided here, in transactions.

Concurrency: every call is one transaction, safe from several threads and processes; writers queue
for at most 30 s, readers never wait. Staleness is decided by the database's clock inside SQL, and
ownership by fencing tokens. Records that are returned are frozen and belong to the caller. Text is
kept as UTF-8: half of a surrogate pair is written as `?`.

Every writing call may raise `InvariantViolated` (a rule of `schema.py`), `NotebookInUse` (the
write lock was held for 30 s) and `NotebookDamaged` (the file cannot be written). What only reads is
in `reader.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, text, update

from society.errors import InvariantViolated, NotANotebook
from society.memory import exchange, leases, rows
from society.memory.database import Database
from society.memory.entries import CLOCK, Author, next_number, scope_number, write
from society.memory.reader import LedgerReader
from society.memory.schema import (
    activities,
    calls,
    commits,
    runs,
    societies,
    sources,
)
from society.records import (
    Activity,
    Budget,
    Call,
    Entry,
    Environment,
    Hypothesis,
    Lease,
    Measurement,
    Run,
    RunKind,
    Scope,
    SeedList,
    SocietyRecord,
    SocietyState,
    Variant,
)


class Ledger(LedgerReader):
    """All facts of one notebook: what `LedgerReader` tells, and what changes them.

    Open it with `Ledger.open`; use it in a `with` block.
    """

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
