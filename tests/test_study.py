"""The workbench of studies: runs are made once, recorded whatever happens, and resumed."""

import asyncio
import contextlib
import itertools
from dataclasses import replace

import pytest

from society import study
from society.errors import ExecutorError, NotebookInUse, StudyStopped, UnknownName, UsageError
from society.experiments import load_task, variant
from society.memory.folder import FileLock, NotebookFolder
from society.memory.ledger import Ledger
from society.records import (
    Cost,
    Environment,
    Measurement,
    Outcome,
    RunKind,
    Scope,
    SeedList,
    SocietyState,
    Split,
    Variant,
)
from society.study import Job, Workbench, workbench

TASK = load_task("synthetic", "quick")
BASE = Variant(TASK.key)
CHANGED = variant(TASK, {"depth": 3})


NOW = Environment("cpu", "A", 1, "3.11")


class Scripted:
    """An executor that scores a run by its seeds, after as many turns of the loop as it is told.

    `script` has an outcome per run in order of starting; an exception is raised.
    """

    environment = NOW
    data_hash = "d"
    busy_s = 1.0

    def __init__(self, *script, slots=2, watch=lambda work: None):
        self.slots, self.script, self.watch = slots, list(script), watch
        self.works, self.running, self.most = [], 0, 0
        self._turn = asyncio.Semaphore(slots)

    async def run(self, work):
        async with self._turn:
            self.works.append(work)
            outcome = self.script.pop(0) if self.script else Outcome.COMPLETED
            self.running += 1
            self.most = max(self.most, self.running)
            for _ in range(5):
                await asyncio.sleep(0)
            self.watch(work)
            self.running -= 1
        if isinstance(outcome, Exception):
            raise outcome
        score = work.seed + (work.data_seed or 0) / 2**32 if outcome is Outcome.COMPLETED else None
        return Measurement(outcome, score, Cost(wall_s=1.0))


@contextlib.contextmanager
def bench_in(folder, executor):
    with Ledger.open(folder / "ledger.sqlite", secret_seed=5) as ledger:
        record = ledger.start_society(0, {"task": "synthetic", "study": "test"})
        yield Workbench(ledger, Scope(TASK.key, "cpu-A"), TASK, record, executor)


def on_bench(folder, work, executor=None):
    """Do `work(bench)` with a scripted executor."""

    async def main():
        with bench_in(folder, executor or Scripted()) as bench:
            return await work(bench)

    return asyncio.run(main())


def test_a_run_is_made_once(tmp_path):
    async def work(bench):
        first = await bench.run(BASE, 2)
        again = await bench.run(BASE, 2)
        same = await bench.run(BASE, 2, data_position=2)
        return first, again, same, bench.made, len(bench.executor.works)

    first, again, same, made, works = on_bench(tmp_path, work)
    assert first == again == same
    assert (made, works) == (1, 1)
    assert (first.kind, first.split, first.agent) == (RunKind.STUDY, Split.HOLDOUT, "study")


def test_answers_come_in_the_order_of_the_wishes_and_twins_share_a_run(tmp_path):
    wanted = [(BASE, 3), (CHANGED, 0), Job(BASE, 0, 1), Job(BASE, 0, None, 2), (BASE, 3), (BASE, 0)]
    heard = []

    async def work(bench):
        runs = await bench.runs(wanted, lambda done, of: heard.append((done, of)))
        return runs, bench.ledger.seeds(SeedList.STUDY, bench.scope, 4), bench.executor.works

    runs, seeds, works = on_bench(tmp_path, work)
    told = [(run.variant, run.seed, run.data_seed, run.repeat) for run in runs]
    assert told == [
        (BASE, seeds[3], None, 0),
        (CHANGED, seeds[0], None, 0),
        (BASE, seeds[0], seeds[1], 0),
        (BASE, seeds[0], None, 2),
        (BASE, seeds[3], None, 0),
        (BASE, seeds[0], None, 0),
    ]
    assert runs[0] == runs[4]
    assert len(works) == 5
    assert {(work.seed, work.data_seed) for work in works} == {(s, d) for _, s, d, _ in told}
    assert heard == [(done, 6) for done in range(7)]


def test_runs_of_another_program_are_not_mixed_in(tmp_path):
    async def work(bench):
        study._require_environment(bench.ledger, bench.scope, replace(NOW, code="other"))
        await bench.run(BASE, 0)
        study._require_environment(bench.ledger, bench.scope, NOW)
        with pytest.raises(UsageError, match=r"different: code.*--lab"):
            study._require_environment(bench.ledger, bench.scope, replace(NOW, code="other"))

    on_bench(tmp_path, work)


@pytest.mark.parametrize("slots", [1, 3])
def test_all_slots_are_busy(tmp_path, slots):
    executor = Scripted(slots=slots)
    on_bench(tmp_path, lambda bench: bench.runs([(BASE, n) for n in range(12)]), executor)
    assert executor.most == slots


def test_a_crash_is_repeated_once(tmp_path):
    crash = Outcome.CRASHED

    async def work(bench):
        return [await bench.run(BASE, place) for place in range(3)], bench.made, bench.pool(BASE)

    runs, made, pool = on_bench(tmp_path, work, Scripted(crash, crash, crash))
    assert [run.outcome for run in runs] == [crash, Outcome.COMPLETED, Outcome.COMPLETED]
    assert made == 5
    assert list(pool.values()) == [None, runs[1].score, runs[2].score]


def test_a_failed_run_is_a_result(tmp_path):
    async def work(bench):
        return await bench.run(BASE, 0), await bench.run(BASE, 0), bench.made

    first, again, made = on_bench(tmp_path, work, Scripted(Outcome.DIVERGED))
    assert first == again
    assert made == 1


def test_workers_that_fail_leave_what_was_finished(tmp_path):
    """The other run in progress is recorded, nothing else is begun, and the lease is free."""
    error = ExecutorError("no more workers")
    executor = Scripted(Outcome.COMPLETED, error, Outcome.COMPLETED)
    with pytest.raises(ExecutorError, match="no more"):
        on_bench(tmp_path, lambda bench: bench.runs([(BASE, n) for n in range(20)]), executor)
    with Ledger.open(tmp_path) as ledger:
        assert 1 <= len(ledger.runs()) <= 3
        assert ledger.leases(Scope(TASK.key, "cpu-A")) == ()


def test_draining_finishes_what_is_in_progress(tmp_path):
    executor = Scripted()

    async def work(bench):
        executor.watch = lambda work: setattr(bench, "draining", len(executor.works) >= 4)
        with pytest.raises(StudyStopped) as stopped:
            await bench.runs([(BASE, n) for n in range(20)])
        return stopped.value, bench.made, bench.ledger.runs(), bench.ledger.leases(bench.scope)

    stopped, made, runs, leases = on_bench(tmp_path, work, executor)
    assert stopped.made == made == len(runs) == len(executor.works)
    assert 4 <= made < 10
    assert leases == ()
    assert "same command goes on" in str(stopped)


def test_leases_are_prolonged_while_a_run_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEASE_S", 0.06)
    seen = []

    class Slow(Scripted):
        async def run(self, work):
            for _ in range(4):
                await asyncio.sleep(0.05)
                seen.extend(lease.expires_at for lease in self.ledger.leases(self.scope))
            return await super().run(work)

    async def work(bench):
        bench.executor.ledger, bench.executor.scope = bench.ledger, bench.scope
        return await bench.run(BASE, 0)

    assert on_bench(tmp_path, work, Slow()).score is not None
    assert len(set(seen)) > 1
    assert seen == sorted(seen)


def test_a_plan_is_registered_once_and_keeps_its_result(tmp_path):
    async def work(bench):
        run = await bench.run(BASE, 0)
        first = bench.register("noise", "how much", {"seeds": 8, "changes": {"a": {"x": 1}}})
        same = bench.register("noise", "how much", {"changes": {"a": {"x": 1}}, "seeds": 8})
        other = bench.register("noise", "how much", {"seeds": 9, "changes": {}})
        done = bench.conclude(first, {"sd": 0.5}, [run.id, run.id])
        kept = bench.conclude(first, {"sd": 9.0}, [])
        later = bench.register("noise", "how much", first.plan)
        return run, first, same, other, done, kept, later

    run, first, same, other, done, kept, later = on_bench(tmp_path, work)
    assert first == same
    assert other.id != first.id
    assert first.result is None
    assert done == kept == later
    assert (done.result, done.evidence) == ({"sd": 0.5}, (run.id,))


# --- with real workers ---------------------------------------------------------------------------


def opened(lab, work, **options):
    """Do `work(bench)` on a workbench of the synthetic task."""
    settings = {"task": "synthetic", "profile": None, "device": "cpu", "slots": 2}

    async def main():
        async with workbench(
            NotebookFolder(lab), **settings | options, command="test", secret_seed=5
        ) as bench:
            return await work(bench)

    return asyncio.run(main())


def test_a_workbench_goes_on_under_the_same_record(tmp_path):
    wanted = [Job(BASE, 0), Job(BASE, 1), Job(BASE, 0, 1), Job(BASE, 1, 0)]

    async def first(bench):
        return await bench.runs(wanted[:2])

    async def second(bench):
        return await bench.runs(wanted), bench.made

    before = opened(tmp_path, first)
    runs, made = opened(tmp_path, second)
    assert runs[:2] == before
    assert made == 2
    by_place = dict(zip(itertools.product((0, 1), repeat=2), (0, 2, 3, 1), strict=True))
    assert len({runs[place].score for place in by_place.values()}) == 4
    with Ledger.open(tmp_path) as ledger:
        (record,) = ledger.societies()
    assert record.is_study
    assert record.state is SocietyState.FINISHED
    assert record.settings == {
        "task": "synthetic", "profile": "quick", "device": "cpu", "study": "test",
    }  # fmt: skip
    assert record.wall_s > 0
    assert 0 < record.busy < 1


def test_a_body_that_fails_stops_the_study(tmp_path):
    async def work(bench):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opened(tmp_path, work)
    with Ledger.open(tmp_path) as ledger:
        assert [record.state for record in ledger.societies()] == [SocietyState.STOPPED]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": "synthetik"}, UnknownName, "synthetic"),
        ({"profile": "h200"}, UnknownName, "quick"),
        ({"device": "tpu"}, UsageError, "cuda"),
    ],
)
def test_a_wrong_workbench_leaves_nothing(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        opened(tmp_path / "lab", None, **options)
    assert not (tmp_path / "lab").exists()


def test_a_folder_has_one_owner(tmp_path):
    folder = NotebookFolder(tmp_path).create()
    lock = FileLock(folder.owner_lock)
    assert lock.acquire()
    try:
        with pytest.raises(NotebookInUse, match="in use by process"):
            opened(tmp_path, None)
    finally:
        lock.release()
