"""`Workbench`: where a command makes a study's runs: preregistered, resumable, on secret seeds.

A study asks a question about a task with a plan that was written down before its runs: how large is
the noise, does a published finding hold here. Its runs stand on the study list of seeds, holdout
split; they are recorded like all others, but they are evidence for no claim, in no champion's pool,
and no brain sees them.

A run that is recorded is never made again: the same command goes on where it was stopped, by Ctrl-C
or `kill -9`. Ctrl-C lets the runs in progress finish and records them; a second one gives them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from society import provenance
from society.errors import AlreadyLeased, AlreadyRun, ExecutorError, StudyStopped, UsageError
from society.experiments.local import LocalExecutor
from society.experiments.space import Space
from society.experiments.task import default_profile, load_task
from society.memory.ledger import Ledger
from society.records import (
    Environment,
    Lease,
    NewStudy,
    Run,
    RunKind,
    Scope,
    SeedList,
    SocietyRecord,
    SocietyState,
    Study,
    StudyResult,
    Variant,
    Work,
)

if TYPE_CHECKING:
    from society.experiments.executor import Executor
    from society.experiments.task import Task
    from society.memory.folder import NotebookFolder

LEASE_S = 120.0
"""Seconds a lease lives without a heartbeat; heartbeats come three times as often."""
OTHERS_S = 1.0
"""Seconds between looks at a run that another folder makes."""
HOLDER = "study"

Progress = Callable[[int, int], None]
"""Called with (finished, wanted) runs, first before any is made."""


def silent(done: int, wanted: int) -> None:
    """A `Progress` that shows nothing."""


class Job(NamedTuple):
    """One run that a study wants."""

    variant: Variant
    position: int
    """Place of its seed in the study list, from 0."""
    data_position: int | None = None
    """Place of the seed of its data order; None for the same seed."""
    repeat: int = 0
    """Which repetition of the same seeds, from 0."""

    @property
    def key(self) -> tuple[str, int, int, int]:
        """The same for the same run."""
        order = self.position if self.data_position is None else self.data_position
        return self.variant.fingerprint, self.position, order, self.repeat


class Workbench:
    """A notebook, a task and its workers, for one command. Belongs to one event loop."""

    def __init__(
        self, ledger: Ledger, scope: Scope, task: Task, record: SocietyRecord, executor: Executor
    ) -> None:
        """See `workbench`, which opens and closes everything."""
        self.ledger, self.scope, self.task = ledger, scope, task
        self.record, self.executor = record, executor
        self.space = Space.of(task)
        self.made = 0
        """Runs made, and not found recorded, by this workbench."""
        self.draining = False
        """Whether no further run is begun."""
        self._turn = asyncio.Semaphore(executor.slots + 1)  # one waits, so that no slot idles
        self._under_way: dict[tuple[str, int, int, int], asyncio.Task[Run]] = {}

    async def run(
        self,
        variant: Variant,
        position: int,
        *,
        data_position: int | None = None,
        repeat: int = 0,
    ) -> Run:
        """One run on the study list; the recorded one if there is one.

        A crash is repeated once; whatever comes of that is recorded and returned.

        Args:
            variant: What to train.
            position: Place of its seed in the study list, from 0.
            data_position: Place of the seed of its data order; None for the same seed.
            repeat: Which repetition of the same seeds, from 0.

        Raises:
            StudyStopped: Ctrl-C came before the run had begun.
            SocietyError: The notebook or the workers fail.
        """
        job = Job(variant, position, data_position, repeat)
        if job.key not in self._under_way:
            self._under_way[job.key] = asyncio.ensure_future(self._make(job))
        try:
            return await self._under_way[job.key]
        finally:
            self._under_way.pop(job.key, None)

    async def runs(
        self, wanted: Sequence[Job | tuple[Variant, int]], progress: Progress = silent
    ) -> tuple[Run, ...]:
        """Many runs, as many at a time as there are slots; the answers in the order of the wishes.

        When one of them cannot be made, those in progress are finished and recorded first.

        Raises:
            StudyStopped: Ctrl-C; what was finished is recorded.
            SocietyError: The notebook or the workers fail.
        """
        jobs = [Job(*one) for one in wanted]
        made = [asyncio.ensure_future(self._one(job)) for job in jobs]
        progress(0, len(jobs))
        try:
            for done, finished in enumerate(asyncio.as_completed(made), start=1):
                await finished
                progress(done, len(jobs))
        except asyncio.CancelledError:
            for task in made:
                task.cancel()
            raise
        except StudyStopped:
            await asyncio.gather(*made, return_exceptions=True)
            raise StudyStopped(self.made) from None  # now that all are counted
        finally:
            await asyncio.gather(*made, return_exceptions=True)
        return tuple([task.result() for task in made])

    def pool(self, variant: Variant) -> dict[int, float | None]:
        """A variant's holdout scores by study seed, in the order of the list; None: it failed."""
        return self.ledger.pool(self.scope, variant, SeedList.STUDY)

    def register(self, kind: str, title: str, plan: Mapping[str, Any]) -> Study:
        """Write a plan down before its runs; the study recorded before if it is the same plan."""
        text = json.dumps([kind, title, dict(plan)], sort_keys=True)
        known = self._registered(text)
        if known is None:
            self._commit(NewStudy(kind, title, plan), f"study/{_digest(text)}")
            known = self._registered(text)
        assert known is not None
        return known

    def conclude(self, study: Study, result: Mapping[str, Any], evidence: Sequence[str]) -> Study:
        """Record what came of a study; one that has its result keeps it."""
        if self.ledger.study(study.id).result is None:
            entry = StudyResult(study.id, result, tuple(evidence))
            self._commit(entry, f"study-result/{study.id}")
        return self.ledger.study(study.id)

    def _registered(self, text: str) -> Study | None:
        """The study of the same kind, title and plan."""
        for study in self.ledger.studies(self.scope):
            if json.dumps([study.kind, study.title, dict(study.plan)], sort_keys=True) == text:
                return study
        return None

    def _commit(self, entry: NewStudy | StudyResult, key: str) -> None:
        key = f"{key}/{self.scope.task}/{self.scope.tier}"
        self.ledger.commit(self.scope, self.record.id, HOLDER, [entry], key=key)

    async def _one(self, job: Job) -> Run:
        return await self.run(
            job.variant, job.position, data_position=job.data_position, repeat=job.repeat
        )

    async def _make(self, job: Job) -> Run:
        """The recorded result, or a new one; waits for another folder that makes the same run."""
        while True:
            try:
                async with self._turn:
                    return await self._made(job)
            except AlreadyLeased:
                await asyncio.sleep(OTHERS_S)

    async def _made(self, job: Job) -> Run:
        """The recorded result, or lease and run until there is one: a crash is tried again."""
        while True:
            try:
                lease = self._lease(job)
            except AlreadyRun as known:
                return self.ledger.run(known.run_id)
            await self._perform(lease)

    def _lease(self, job: Job) -> Lease:
        if self.draining:
            raise StudyStopped(self.made)
        return self.ledger.lease_study(
            self.scope,
            self.record.id,
            holder=HOLDER,
            variant=job.variant,
            position=job.position,
            data_position=job.data_position,
            repeat=job.repeat,
            ttl_s=LEASE_S,
        )

    async def _perform(self, lease: Lease) -> None:
        """Run what is leased and record it, whatever its outcome."""
        work = Work(
            lease.run_id, lease.variant, lease.seed, lease.split, self.task.budget, lease.data_seed
        )
        job = asyncio.ensure_future(self.executor.run(work))
        try:
            while not (await asyncio.wait({job}, timeout=LEASE_S / 3))[0]:
                lease = self.ledger.heartbeat(lease, LEASE_S)
            measured = job.result()
        except BaseException:
            job.cancel()
            self.draining = True  # the workers or the notebook fail: begin nothing else
            self.ledger.release(lease)
            raise
        self.ledger.finish(lease, measured, self.executor.environment, self.task.budget)
        self.made += 1


@asynccontextmanager
async def workbench(
    folder: NotebookFolder,
    *,
    task: str,
    profile: str | None,
    device: str,
    slots: int | None,
    command: str,
    secret_seed: int | None = None,
) -> AsyncIterator[Workbench]:
    """Open a notebook for a study and start the workers; close both at the end.

    Args:
        folder: The notebook; made when there is none.
        task: Name or `module:Class`.
        profile: Name or file; None for the task's first one.
        device: `cpu`, or a torch device.
        slots: Runs at a time; None for one per core.
        command: Name of the command, recorded with its runs.
        secret_seed: Where the seeds of a *new* notebook come from; None draws it.

    Raises:
        UsageError: No such task, profile or kind of device.
        NotebookInUse: Another process works in the folder.
        StudyStopped: Ctrl-C; what was finished is recorded.
        SocietyError: The notebook is damaged, or the workers do not start.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:NUMBER.")
    profile = default_profile(task) if profile is None else profile
    settings = {"task": task, "profile": profile, "device": device, "study": command}
    loaded = load_task(task, profile)
    executor = LocalExecutor(task, profile, slots, device)
    with (
        folder.lock(),
        Ledger.open(folder.ledger, secret_seed) as ledger,
        _interruptible(executor) as stop,
    ):
        await executor.start()
        record = _open_record(folder, ledger, settings)
        scope = Scope(loaded.key, executor.environment.tier)
        _require_environment(ledger, scope, executor.environment)
        provenance.keep(ledger, loaded, executor.environment)
        bench = Workbench(ledger, scope, loaded, record, executor)
        stop.watch(bench)
        with _kept(ledger, record, executor):
            yield bench
        await executor.close()


def _open_record(
    folder: NotebookFolder, ledger: Ledger, settings: Mapping[str, object]
) -> SocietyRecord:
    """The record to work under: that of the same command in this folder before, if there is one."""
    folder.end_sessions(ledger)
    same = [one for one in folder.own(ledger.societies()) if dict(one.settings) == dict(settings)]
    if not same:
        return ledger.start_society(0, settings, home=folder.home)
    mine = same[-1]
    ledger.set_society_state(mine.id, SocietyState.RUNNING)
    return ledger.society(mine.id)


def _require_environment(ledger: Ledger, scope: Scope, now: Environment) -> None:
    """Refuse to put a study together from runs of different programs or machines."""
    for run in ledger.runs(scope, kinds=[RunKind.STUDY]):
        if odd := run.environment.differs(now):
            raise UsageError(
                f"The study runs in this notebook were made in another environment (different: "
                f"{', '.join(odd)}), and their scores cannot be mixed with new ones. Use another "
                "folder with --lab, or the program and machine that made them."
            )


@contextlib.contextmanager
def _kept(ledger: Ledger, record: SocietyRecord, executor: Executor) -> Iterator[None]:
    """Record how the work ended, how long it took and how busy the slots were."""
    began, state = time.monotonic(), SocietyState.STOPPED
    try:
        yield
        state = SocietyState.FINISHED
    finally:
        wall_s = record.wall_s + time.monotonic() - began
        busy_s = record.wall_s * (record.busy or 0.0) + executor.busy_s / executor.slots
        ledger.set_society_state(record.id, state, busy=busy_s / max(1e-9, wall_s), wall_s=wall_s)


class _Stop:
    """What Ctrl-C does: first let the runs in progress finish, then stop at once."""

    def __init__(self, executor: Executor) -> None:
        """Nothing is caught yet."""
        self.caught = False
        self._executor = executor
        self._bench: Workbench | None = None
        self._main = asyncio.current_task()

    def watch(self, bench: Workbench) -> None:
        """The workers have started; from now on there is something to finish."""
        self._bench = bench

    @property
    def made(self) -> int:
        """Runs recorded so far."""
        return self._bench.made if self._bench is not None else 0

    def signal(self) -> None:
        """A signal came."""
        if self._bench is not None and not self.caught:
            self._bench.draining = True
        else:
            self._executor.kill()
            if self._main is not None:
                self._main.cancel()
        self.caught = True


@contextlib.contextmanager
def _interruptible(executor: Executor) -> Iterator[_Stop]:
    """Signals end the block in order, as `StudyStopped`; the workers never outlive it."""
    stop, loop = _Stop(executor), asyncio.get_running_loop()
    in_main = threading.current_thread() is threading.main_thread()  # signals come to no other
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    for number in numbers:
        loop.add_signal_handler(number, stop.signal)
    try:
        yield stop
    except (asyncio.CancelledError, ExecutorError):
        if not stop.caught:
            raise
        raise StudyStopped(stop.made) from None
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        executor.kill()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
