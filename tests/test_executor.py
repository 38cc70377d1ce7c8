"""Executors with real processes: every way a run can end, and what must never happen."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from society.errors import ExecutorError
from society.experiments import InlineExecutor, load_task, sandbox, variant
from society.experiments.executor import (
    CURVE_POINTS,
    TAIL_CHARS,
    check_budget,
    source_digest,
    thin,
)
from society.experiments.local import LocalExecutor
from society.experiments.task import Refused, TrainReport
from society.records import Budget, BudgetKind, Outcome, Split, Variant, Work

BAD = "misbehaving:Misbehaving"
BUDGET = Budget(BudgetKind.STEPS, 10)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def bad(act="behave", seed=1, split=Split.VALIDATION, **overrides):
    chosen = {} if act == "behave" else {"act": act}
    return Work("r1", Variant("misbehaving/test", chosen | overrides), seed, split, BUDGET)


def synthetic(seed=1, split=Split.VALIDATION, **overrides):
    task = load_task("synthetic", "quick")
    return Work(f"r{seed}", variant(task, overrides), seed, split, task.budget)


@asynccontextmanager
async def running(task=BAD, profile="test", slots=1):
    executor = LocalExecutor(task, profile, slots)
    await executor.start()
    try:
        yield executor
    finally:
        executor.kill()


def measure(*works, slots=1):
    """Run works of the misbehaving task one after the other on one executor."""

    async def main():
        async with running(slots=slots) as executor:
            return [await executor.run(work) for work in works]

    return asyncio.run(main())


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def gone(pid, within_s=5.0):
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def workers(*, recursive=False):
    """The worker processes under this one, which has other children as well."""
    children = psutil.Process().children(recursive=recursive)
    return [child for child in children if "society.experiments.worker" in child.cmdline()]


async def family_of(size):
    """This process's workers, once there are as many as expected."""
    deadline = time.monotonic() + 10
    while len(found := workers(recursive=True)) != size:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


def test_completed_run_is_fully_described():
    first, second = measure(bad(seed=4), bad(seed=4, split=Split.HOLDOUT))
    assert (first.outcome, first.score, second.score) == (Outcome.COMPLETED, 4.0, 4.5)
    assert (first.cost.flops, first.cost.tokens, first.cost.steps) == (1e9, 1000, 10)
    assert first.cost.wall_s > 0
    assert 0 < first.cost.cpu_s < 1
    assert first.cost.mem_bytes > 1 << 20
    assert first.cost.gpu_s == 0
    assert first.data_hash == "ab" * 32
    assert len(first.curve) == CURVE_POINTS
    assert (first.curve[0], first.curve[-1]) == (0, 199)


@pytest.mark.parametrize(
    ("act", "outcome", "words"),
    [
        ("diverge", Outcome.DIVERGED, ["diverged: loss is nan at step 3"]),
        ("raise", Outcome.CRASHED, ["about to fail", "Traceback", "ZeroDivisionError: one by"]),
        ("exit", Outcome.CRASHED, ["leaving early", "exit code 3"]),
        ("segfault", Outcome.CRASHED, ["killed by SIGSEGV"]),
        ("bomb", Outcome.CRASHED, ["out of memory"]),
        ("overspend", Outcome.REJECTED, ["Spent 12 steps; the budget is 10"]),
        ("cheat", Outcome.REJECTED, ["impossible probabilities"]),
        ("nan", Outcome.DIVERGED, ["the score is nan"]),
        ("score_raises", Outcome.CRASHED, ["KeyError: 'no such split'"]),
        ("score_dies", Outcome.CRASHED, ["exit code 7"]),
    ],
)
def test_every_failure_is_a_measurement_and_the_slot_works_on(act, outcome, words):
    failed, after = measure(bad(act), bad())
    assert failed.outcome is outcome
    assert failed.score is None
    assert all(word in failed.log_tail for word in words)
    assert after.score == 1.0


def test_a_diverged_run_reports_what_it_spent():
    cost = measure(bad("diverge"))[0].cost
    assert (cost.steps, cost.tokens) == (3, 300)


def test_an_unusable_cache_is_named(monkeypatch):
    monkeypatch.setenv("SOCIETY_CACHE", "/dev/null/cache")

    async def main():
        async with running("pretrain", "cpu"):
            pass

    with pytest.raises(ExecutorError, match=r"cache folder /dev/null/cache .*SOCIETY_CACHE"):
        asyncio.run(main())


def test_a_timed_out_run_takes_its_children_along():
    async def main():
        async with running("misbehaving:Hasty") as executor:
            late, after = await executor.run(bad("hang")), await executor.run(bad())
            names = ("hung", "grandchild")
            return late, after, [int((executor._scratch / name).read_text()) for name in names]

    late, after, pids = asyncio.run(main())
    assert (late.outcome, late.score) == (Outcome.TIMED_OUT, None)
    assert late.log_tail == "hanging\ntimed out: killed after 0.8 s"
    assert after.score == 1.0
    assert all(gone(pid) for pid in pids)


def test_a_finished_run_leaves_no_process():
    async def main():
        async with running() as executor:
            measurement = await executor.run(bad("linger"))
            return measurement, int((executor._scratch / "lingering").read_text())

    measurement, pid = asyncio.run(main())
    assert measurement.outcome is Outcome.COMPLETED
    assert gone(pid)


def test_the_log_keeps_its_end():
    (talked,) = measure(bad("talk"))
    assert talked.outcome is Outcome.COMPLETED
    assert len(talked.log_tail) <= TAIL_CHARS
    assert talked.log_tail.endswith("line 4999\nthe end")


def test_workers_ignore_ctrl_c():
    assert measure(bad("interrupt"))[0].outcome is Outcome.COMPLETED


def test_the_score_does_not_come_from_the_training():
    assert measure(bad("forge", seed=5))[0].score == 5.0


def test_workers_see_no_secrets_and_use_one_thread(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    (measurement,) = measure(bad("environment"))
    assert "OPENAI_API_KEY" not in measurement.log_tail
    assert "OMP_NUM_THREADS" in measurement.log_tail


def test_foreign_work_and_code_changes_are_refused():
    foreign = Work("r1", Variant("pretrain/cpu"), 1, Split.VALIDATION, BUDGET)
    patched = Work("r2", Variant("misbehaving/test", {}, "+ x"), 1, Split.VALIDATION, BUDGET)
    for measurement in measure(foreign, patched):
        assert measurement.outcome is Outcome.REJECTED
        assert measurement.score is None


def test_slots_run_at_once():
    async def main():
        async with running(slots=2) as executor:
            started = time.monotonic()
            works = [bad("sleep", sleep_s=0.3, seed=seed) for seed in range(4)]
            found = await asyncio.gather(*[executor.run(work) for work in works])
            return found, time.monotonic() - started, executor.busy_s

    found, wall, busy = asyncio.run(main())
    assert [measurement.score for measurement in found] == [0, 1, 2, 3]
    assert busy > 4 * 0.3
    assert wall < 0.9 * busy


def test_the_data_order_may_have_a_seed_of_its_own():
    """It goes through every executor alike, and the same seed twice is one seed."""

    def work(seed, data_seed):
        return dataclasses.replace(synthetic(seed), data_seed=data_seed)

    works = [work(1, None), work(1, 1), work(1, 2), work(2, 2)]

    async def main():
        inline = InlineExecutor(load_task("synthetic", "quick"))
        await inline.start()
        async with running("synthetic", "quick") as local:
            return [
                [(await executor.run(one)).score for one in works] for executor in (inline, local)
            ]

    inline, local = asyncio.run(main())
    assert inline == local
    assert inline[0] == inline[1]
    assert len(set(inline)) == 3


def test_calls_wait_in_order():
    async def main():
        async with running() as executor:
            done = []

            async def one(number):
                await executor.run(bad(seed=number))
                done.append(number)
                if number < 3:
                    await one(number + 10)  # comes after all that wait already

            await asyncio.gather(*[one(number) for number in range(5)])
            return done

    assert asyncio.run(main()) == [0, 1, 2, 3, 4, 10, 11, 12]


def test_busy_counts_runs_in_progress():
    async def main():
        async with running() as executor:
            run = asyncio.create_task(executor.run(bad("sleep", sleep_s=0.5)))
            await asyncio.sleep(0.25)
            during = executor.busy_s
            await run
            return during, executor.busy_s

    during, after = asyncio.run(main())
    assert 0.1 < during < after


def test_the_same_work_gives_the_same_bits_everywhere():
    works = [synthetic(seed, split, lr=0.06) for seed in (1, 2) for split in Split]

    async def local(slots):
        async with running("synthetic", "quick", slots) as executor:
            await executor.run(synthetic(9))
            results = await asyncio.gather(*[executor.run(work) for work in works])
            return [result.score for result in results], executor.environment

    async def inline():
        executor = InlineExecutor(load_task("synthetic", "quick"))
        await executor.start()
        return [(await executor.run(work)).score for work in works], executor.environment

    two, one, here = asyncio.run(local(2)), asyncio.run(local(1)), asyncio.run(inline())
    assert two == one
    assert one[0] == here[0]
    assert one[1].differs(here[1]) == ()
    assert (one[1].sandbox, here[1].sandbox) == (sandbox.best(), "")
    assert len(set(here[0])) == 4
    assert here[1].threads == 1


def test_inline_outcomes_equal_those_of_processes():
    acts = ("behave", "diverge", "raise", "overspend", "cheat", "nan", "score_raises")

    async def inline():
        executor = InlineExecutor(load_task(BAD, "test"))
        await executor.start()
        results = [await executor.run(bad(act)) for act in acts]
        await executor.close()
        return results

    here, there = asyncio.run(inline()), measure(*[bad(act) for act in acts])
    assert [(m.outcome, m.score) for m in here] == [(m.outcome, m.score) for m in there]
    assert here[0].curve == there[0].curve


def test_a_dead_loop_is_restarted_once():
    async def main():
        async with running() as executor:
            await executor.run(bad())
            (zygote,) = workers()
            for loop in zygote.children():
                loop.kill()
            revived = await executor.run(bad(seed=3))
            with pytest.raises(ExecutorError, match="trainer process died twice"):
                await executor.run(bad("kill_parent"))
            return revived, await executor.run(bad(seed=6))

    revived, after = asyncio.run(main())
    assert (revived.score, after.score) == (3.0, 6.0)


def test_a_dead_zygote_ends_the_executor():
    async def main():
        async with running() as executor:
            workers()[0].kill()
            with pytest.raises(ExecutorError):
                await executor.run(bad())

    asyncio.run(main())


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("misbehaving:Unready", "PermissionError: .*Permission denied: '/nowhere/cache'"),
        ("misbehaving:Unimportable", "No module named 'a_package_that_nobody_has'"),
        ("misbehaving:Broken", r"ended while it started(.|\n)*ZeroDivisionError: one by none"),
        ("misbehaving:Empty", r"trainer process does not start(.|\n)*nothing to load for trainer"),
        ("misbehaving:Missing", "Unknown task"),
        ("nonsense", "Unknown task 'nonsense'.*synthetic"),
    ],
)
def test_startup_errors_are_clear_and_nothing_is_printed(task, words, capfd):
    async def main():
        executor = LocalExecutor(task, "test", 1)
        with pytest.raises(ExecutorError, match=words):
            await executor.start()
        return executor._zygote.pid, executor._scratch

    pid, scratch = asyncio.run(main())
    assert gone(pid)
    assert not scratch.exists()
    assert capfd.readouterr() == ("", "")


def test_close_lets_accepted_work_finish():
    async def main():
        async with running() as executor:
            runs = [
                asyncio.create_task(executor.run(bad("sleep", sleep_s=0.2, seed=seed)))
                for seed in (1, 2)
            ]
            await asyncio.sleep(0)
            await executor.close()
            scores = [(await run).score for run in runs]
            with pytest.raises(ExecutorError, match="not running"):
                await executor.run(bad())
            await executor.close()
            return scores, executor._zygote.pid, executor._scratch

    scores, pid, scratch = asyncio.run(main())
    assert scores == [1.0, 2.0]
    assert gone(pid)
    assert not scratch.exists()


def test_kill_stops_runs_in_progress():
    async def main():
        async with running() as executor:
            run = asyncio.create_task(executor.run(bad("sleep", sleep_s=50)))
            waiting = asyncio.create_task(executor.run(bad()))
            family = await family_of(4)
            executor.kill()
            for call in (run, waiting):
                with pytest.raises(ExecutorError):
                    await call
            return [process.pid for process in family]

    pids = asyncio.run(main())
    assert all(gone(pid) for pid in pids)


def test_a_cancelled_call_stops_its_run_and_frees_the_slot():
    async def main():
        async with running() as executor:
            run = asyncio.create_task(executor.run(bad("sleep", sleep_s=50)))
            family = await family_of(4)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            after = await executor.run(bad(seed=8))
            return after.score, [process.pid for process in family if alive(process.pid)]

    score, left = asyncio.run(main())
    assert score == 8.0
    assert len(left) == 2  # the zygote and the scorer; the run died with its trainer loop


OWNER = """
import asyncio, json, sys
from society.experiments.local import LocalExecutor
from society.records import *

async def main():
    executor = LocalExecutor("misbehaving:Misbehaving", "test", 2)
    await executor.start()
    print(executor._scratch, flush=True)
    variant = Variant("misbehaving/test", {"act": "sleep", "sleep_s": 50.0})
    work = Work("r", variant, 1, Split.VALIDATION, Budget(BudgetKind.STEPS, 10))
    await asyncio.gather(executor.run(work), executor.run(work))

asyncio.run(main())
"""


def test_no_process_outlives_a_killed_owner():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=env) as owner:
        scratch = Path(owner.stdout.readline().decode().strip())
        process, deadline = psutil.Process(owner.pid), time.monotonic() + 5
        while len(family := process.children(recursive=True)) < 7 and time.monotonic() < deadline:
            time.sleep(0.02)
        owner.send_signal(signal.SIGKILL)
    assert len(family) == 7  # zygote, two trainers, two scorers, two runs
    assert all(gone(child.pid) for child in family)
    deadline = time.monotonic() + 5
    while scratch.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not scratch.exists()


def test_pretrain_gives_the_same_bits_in_every_slot_and_after_a_restart():
    task = load_task("pretrain", "cpu")
    tiny = Budget(BudgetKind.STEPS, 2)
    small = variant(task, {"depth": 1, "vocab": 512})

    def work(split):
        return Work("r", small, 3, split, tiny)

    async def main(slots):
        async with running("pretrain", "cpu", slots) as executor:
            works = [work(split) for split in Split] * slots
            found = await asyncio.gather(*[executor.run(w) for w in works])
            return found, executor.environment, executor.data_hash

    found, environment, data_hash = asyncio.run(main(2))
    again, same_environment, same_hash = asyncio.run(main(1))
    assert [m.outcome for m in found] == [Outcome.COMPLETED] * 4
    assert [m.score for m in found] == [m.score for m in again] * 2
    assert found[0].score != found[1].score
    assert 1 < found[0].score < 4
    assert found[0].cost.steps == 2
    assert (environment, data_hash) == (same_environment, same_hash)
    assert environment.capability != ""
    assert set(environment.packages) == {"torch", "numpy"}
    assert environment.code == source_digest(("society.model", "society.experiments.pretrain"))


def test_the_source_is_part_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trainer_of_mine.py").write_text("RATE = 1\n")
    before = source_digest(("trainer_of_mine",))
    assert before == source_digest(("trainer_of_mine",))
    (tmp_path / "trainer_of_mine.py").write_text("RATE = 2\n")
    assert source_digest(("trainer_of_mine",)) != before
    assert source_digest(("society.model",)) != source_digest(("society.experiments",))
    assert len(source_digest(("no_such_module.at_all",))) == 12


def test_a_budget_may_be_crossed_by_the_last_step_only():
    check_budget(Budget(BudgetKind.TOKENS, 1000), TrainReport(tokens=1020, steps=10))
    with pytest.raises(Refused, match="Spent 1120 tokens"):
        check_budget(Budget(BudgetKind.TOKENS, 1000), TrainReport(tokens=1120, steps=10))
    check_budget(Budget(BudgetKind.SECONDS, 1), TrainReport(flops=1e30, steps=10))


def test_thinning_keeps_both_ends():
    assert thin([1.0, 2.0]) == (1.0, 2.0)
    assert thin(range(1000), 4) == (0, 333, 666, 999)


def test_importing_the_package_is_light():
    code = "import sys, json, society.experiments; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert not {"torch", "optuna", "scipy", "pandas"} & set(json.loads(out))
