"""Variants that change code: what works, every way they go wrong, and what is never believed."""

import asyncio
import json
import os
import socket
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import codetask
import psutil
import pytest
from codetask import patched

from society.errors import ExecutorError
from society.experiments import InlineExecutor, Refused, TrainReport, foreign, loop, processes
from society.experiments.local import LocalExecutor
from society.experiments.sandbox import Level, best
from society.experiments.task import Yardstick
from society.records import Budget, BudgetKind, Outcome, Split, Variant, Work

TASK = "codetask:CodeTask"
RETURN = "    return report"
SHIFT = "vector + np.float32(rate)"

pytestmark = pytest.mark.skipif(
    best().rank < Level.FILTERS.rank, reason="this machine has no sandbox for foreign code"
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def at_end(code):
    """A variant whose training does this with its report at the end."""
    return patched((RETURN, "\n".join(f"    {line}" for line in code.splitlines())))


def in_answer(code):
    """A variant whose model does this before it answers."""
    old = "    return np.float32(question @ vector)"
    return patched((old, "\n".join(f"    {line}" for line in code.splitlines()) + f"\n{old}"))


def work(variant, seed=1, split=Split.VALIDATION, budget=codetask.CodeTask.budget):
    return Work("r", variant, seed, split, budget)


@asynccontextmanager
async def running(task=TASK, **terms):
    executor = LocalExecutor(task, "test", 1, **({"lint": False} | terms))
    await executor.start()
    try:
        yield executor
    finally:
        executor.kill()


def measure(*variants, task=TASK, **terms):
    """One run of each, on one executor."""

    async def main():
        async with running(task, **terms) as executor:
            return [await executor.run(work(variant)) for variant in variants]

    return asyncio.run(main())


def trial(*variants, task=TASK, **terms):
    async def main():
        async with running(task, **terms) as executor:
            return [await executor.trial(variant) for variant in variants]

    return asyncio.run(main())


PLAIN = Variant("codetask/test")
FASTER = patched((SHIFT, "vector + np.float32(2 * rate)"))
RENAMED = patched(
    ("def step(vector, target, rate):", "def step(vector, goal, rate):"),
    ("(target - vector)", "(goal - vector)"),
)


# ------------------------------------------------------------------------------ what works


@pytest.mark.parametrize("level", [Level.LIMITS, Level.FILTERS, Level.NAMESPACES])
def test_an_honest_change_counts_and_a_renaming_gives_the_same_score(level):
    if level.rank > best().rank:
        pytest.skip(f"no {level} here")
    terms = {"sandbox": level, "require": Level.LIMITS}
    plain, same, better = measure(PLAIN, RENAMED, FASTER, **terms)
    assert [m.outcome for m in (plain, same, better)] == [Outcome.COMPLETED] * 3
    assert plain.score == same.score
    assert better.score < plain.score / 10
    assert (better.cost.steps, better.cost.tokens) == (10, 100)
    assert better.cost.cpu_s > 0


def test_what_our_own_code_takes_is_measured_once_and_for_every_recipe():
    dearer = at_end("import dataclasses\nreturn dataclasses.replace(report, step_flops=7.0)")
    other = replace(dearer, overrides={"rate": 0.3})
    variants = dearer, dearer, FASTER, other
    logs = [m.log_tail for m in measure(*variants, task="codetask:Telling")]
    assert ["measured" in log for log in logs] == [True, False, False, True]
    assert "charged 7 last time" in logs[1]
    assert all("charged 0 last time" in logs[n] for n in (0, 2, 3))


def test_a_figure_of_the_machine_is_measured_again_after_a_while(monkeypatch):
    now = 1_000.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    known = loop.Figures()
    known.put("speed", {"cpu_s": 1.0})
    now += loop.KEPT_S - 1
    assert known.get("speed") == {"cpu_s": 1.0}
    now += 2
    assert known.get("speed") is None


def test_the_level_is_part_of_the_environment_and_costs_no_comparison():
    async def main():
        async with running(sandbox=Level.FILTERS) as executor:
            one = executor.environment
        async with running() as executor:
            return one, executor.environment

    one, other = asyncio.run(main())
    assert (one.sandbox, other.sandbox) == ("filters", best())
    assert one.differs(other) == ()


def test_a_task_without_a_guard_is_scored_by_its_own_code():
    plain, better, tricky = measure(
        PLAIN, FASTER, in_answer("return np.float32(np.nan).reshape(1)"), task="codetask:Scored"
    )
    assert better.score < plain.score
    assert tricky.score == plain.score  # nothing of the patch is there when it is scored


def test_trials():
    fine, same, seedless, crash, syntax, unknown, late, dead, broken = trial(
        FASTER,
        RENAMED,
        patched(("default_rng(seed)", "default_rng(1)")),
        patched((SHIFT, "vector + oops * np.float32(rate)")),
        Variant("codetask/test", {}, "nonsense"),
        patched(("import numpy as np", "import numpy as np\nimport not_there")),
        patched((SHIFT, f"__import__('time').sleep(50) or {SHIFT}")),
        patched((SHIFT, f"__import__('os')._exit(3) or {SHIFT}")),
        Variant("codetask/test", {}, "society-patch broken\n[]"),
        task="codetask:Tried",
    )  # fmt: skip
    assert (fine.problem, fine.same) == ("", False)
    assert (same.problem, same.same) == ("", True)
    assert "initial parameters must come from the seed" in seedless.problem
    assert crash.problem == "NameError: name 'oops' is not defined (pull.py, line 13)"
    assert syntax.problem
    assert "ModuleNotFoundError: No module named 'not_there' (pull.py, line 4)" in unknown.problem
    assert late.problem == "A few steps were not finished within 0.5 s."
    assert "exit code 3" in dead.problem
    assert broken.problem
    assert all(len(found.problem) <= 600 for found in (seedless, crash, syntax, unknown))


def test_the_static_check_comes_first_unless_it_is_switched_off():
    reading = at_end("open('/etc/passwd').read()\nreturn report")
    (found,) = trial(reading, lint=True)
    assert found.problem
    (measured,) = measure(reading, lint=True)
    assert (measured.outcome, measured.score) == (Outcome.REJECTED, None)
    (measured,) = measure(reading)
    assert measured.outcome is Outcome.CRASHED
    assert "PermissionError" in measured.log_tail


def test_an_executor_without_a_sandbox_has_no_trials_and_no_runs():
    async def main():
        executor = InlineExecutor(codetask.CodeTask())
        return await executor.trial(FASTER)

    assert "has no sandbox" in asyncio.run(main()).problem


def test_below_the_required_level_nothing_runs():
    async def main():
        async with running(sandbox=Level.LIMITS) as executor:
            return (
                await executor.trial(FASTER),
                await executor.run(work(FASTER)),
                await executor.run(work(PLAIN)),
            )

    tried, patched_run, plain = asyncio.run(main())
    words = "needs at least the sandbox level 'filters'; this machine offers 'limits'"
    assert words in tried.problem
    assert patched_run.outcome is Outcome.REJECTED
    assert words in patched_run.log_tail
    assert plain.outcome is Outcome.COMPLETED


def test_a_level_that_the_machine_has_not_is_an_error():
    async def main():
        async with running(sandbox=Level.BUBBLEWRAP):
            pass

    with pytest.raises(ExecutorError, match="bubblewrap: this machine offers"):
        asyncio.run(main())


# ---------------------------------------------------------------------------- how it fails

BOMB = """blocks = []
while True:
    blocks.append(np.ones(4 << 20))
"""
SPIN = """import time
end = time.process_time() + 8
while time.process_time() < end:
    pass
return report
"""
FILES = """import os, time
for n in range(5):
    with open(os.environ["TMPDIR"] + f"/{n}", "wb") as file:
        file.write(bytes(9 << 20))
time.sleep(8)
"""
MODEL = """import os, pathlib
folder = pathlib.Path(os.environ["TMPDIR"]).parent / "model"
"""


@pytest.mark.parametrize(
    ("end", "outcome", "words"),
    [
        ("raise KeyError('a key')", Outcome.CRASHED, "KeyError: 'a key' (pull.py, line 23)"),
        ("raise SystemExit(0)", Outcome.CRASHED, "without a report"),
        (BOMB, Outcome.CRASHED, "out of memory"),
        (SPIN, Outcome.REJECTED, "of processor time where the recipe takes 0.05 s: at most 1.07"),
        ("import os\nos.fork()\nreturn report", Outcome.CRASHED, "PermissionError"),
        ("import socket\nsocket.socket()", Outcome.CRASHED, "PermissionError"),
        ("return 7", Outcome.CRASHED, "AttributeError"),
        ("import dataclasses\nreturn dataclasses.replace(report, steps=11)", Outcome.REJECTED,
         "Reported 11 steps; the budget pays for 1 to 10"),
        ("import dataclasses\nreturn dataclasses.replace(report, curve=(float('nan'),))",
         Outcome.REJECTED, "NaN is no number"),
        ("import dataclasses\nreturn dataclasses.replace(report, mfu='x' * 300_000)",
         Outcome.REJECTED, "its report is far too long"),
        ("import dataclasses\nreturn dataclasses.replace(report, tokens='many')",
         Outcome.REJECTED, "tokens: no count"),
        (FILES, Outcome.REJECTED, "wrote more than its scratch folder may hold"),
        (MODEL + "(folder / 'model.bin').unlink()\n(folder / 'model.bin').mkdir()\nreturn report",
         Outcome.REJECTED, "failed"),
        (MODEL + "(folder / 'model.bin').unlink()\nreturn report", Outcome.REJECTED, "failed"),
    ],
    ids=["raise", "exit", "bomb", "spin", "fork", "socket", "no-report", "steps", "nan", "long",
         "text", "disk", "folder", "no-model"],
)  # fmt: skip
def test_what_goes_wrong_is_an_outcome_and_the_slot_works_on(end, outcome, words):
    failed, after = measure(at_end(end), PLAIN, disk_bytes=24 << 20)
    assert failed.outcome is outcome, failed.log_tail
    assert failed.score is None
    assert words in failed.log_tail
    assert after.outcome is Outcome.COMPLETED


def test_an_endless_training_is_stopped():
    sleepy = at_end("import time\ntime.sleep(60)")
    (failed,) = measure(sleepy, task="codetask:Hasty")
    assert failed.outcome is Outcome.TIMED_OUT
    assert "killed after 1.5 s" in failed.log_tail


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise KeyError('asked')", "KeyError: 'asked' (pull.py, line 18)"),
        ("import os\nos._exit(5)", "exit code 5"),
        ("return np.zeros(3, np.float32)", "the answer is no number"),
        ("return np.array([np.nan], np.float32)", "the answer is no number"),
        ("import time\ntime.sleep(60)", "timed out"),
        ("import os\nfor n in range(3, 20):\n    try: os.write(n, b'garbage' * 20)\n"
         "    except OSError: pass", "rejected"),
        ("import os\nopen(os.getcwd() + '/x', 'w')", "PermissionError"),
    ],
    ids=["raises", "dies", "shape", "nan", "hangs", "garbage", "writes"],
)  # fmt: skip
def test_a_model_that_does_not_answer_is_rejected(code, words):
    failed, after = measure(in_answer(code), PLAIN, task="codetask:Hasty")
    assert failed.outcome in (Outcome.REJECTED, Outcome.TIMED_OUT), failed.log_tail
    assert failed.score is None
    assert words in failed.log_tail
    assert after.outcome is Outcome.COMPLETED


def test_a_budget_in_seconds_is_measured_around_all_of_it():
    budget = codetask.Seconds.budget
    slow = at_end("import time\ntime.sleep(1.5)\nreturn report")

    async def main():
        async with running("codetask:Seconds") as executor:
            return [await executor.run(work(v, budget=budget)) for v in (FASTER, slow)]

    honest, late = asyncio.run(main())
    assert honest.outcome is Outcome.COMPLETED, honest.log_tail
    assert late.outcome is Outcome.REJECTED
    assert "of wall time; the budget is 0.2 s" in late.log_tail


def test_what_a_stranger_prints_moves_no_cursor():
    loud = at_end("print('\\x1b[2J\\x1b]0;title\\x07red\\u202e\\x00 text')\nreturn report")
    (measured,) = measure(loud)
    assert measured.log_tail == "red text"


def test_nothing_is_left_of_a_run_that_is_given_up():
    async def main():
        async with running() as executor:
            zygote = psutil.Process(executor._zygote.pid)
            run = asyncio.create_task(executor.run(work(at_end("import time\ntime.sleep(60)"))))
            while len(family := zygote.children(recursive=True)) < 3:
                await asyncio.sleep(0.02)
            executor.kill()
            with pytest.raises(ExecutorError):
                await run
            return family

    _, alive = psutil.wait_procs(asyncio.run(main()), timeout=5)
    assert alive == []


# ------------------------------------------------------------------- what is believed: pure


def payload(**changes):
    report = {
        "flops": 1.0, "tokens": 10, "steps": 5, "curve": [1.0], "train_s": 1.0, "compile_s": 0.0,
        "mfu": None, "device_mem_bytes": 0, "step_flops": 0,
    }  # fmt: skip
    return json.dumps({"outcome": "completed", "report": report | changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"outcome": "completed"}',
        b'{"outcome": "timed_out", "error": "x"}', b'{"outcome": "crashed"}',
        b'{"outcome": ["crashed"], "error": "x"}', payload(flops=True), payload(flops=1e400),
        payload(tokens=-1), payload(tokens=1.5), payload(steps=10**30), payload(curve=[1.0] * 65),
        payload(curve=["x"]), payload(train_s=-1.0), payload(more=1), payload(mfu="x"),
        payload(curve="abc"), payload(flops=None), payload(step_flops=-1.0),
    ],
)  # fmt: skip
def test_another_form_of_report_is_refused(data):
    with pytest.raises(Refused, match="its report is not one"):
        foreign.parse(data, report=foreign.report)


def test_a_report_of_the_expected_form_is_read():
    found = foreign.parse(payload(), report=foreign.report)
    assert (found["outcome"], found["report"]["steps"]) == (Outcome.COMPLETED, 5)
    failed = foreign.parse(b'{"outcome": "crashed", "error": "a\\nb\\u001b[1m", "report": 7}')
    assert failed == {"outcome": Outcome.CRASHED, "error": "a b"}


def test_a_completed_run_is_charged_the_whole_budget():
    claim, yard = TrainReport(flops=5.0, steps=4, tokens=1, mfu=0.9), Yardstick(1.0, 8, tokens=80)
    found = foreign.believed(claim, yard, Budget(BudgetKind.FLOPS, 1e9), 1.0, accelerator=False)
    assert (found["flops"], found["tokens"], found["mfu"]) == (1e9, 40, None)
    with pytest.raises(Refused, match="of wall time"):
        foreign.believed(claim, yard, Budget(BudgetKind.FLOPS, 1e9), 20.0, accelerator=True)


def test_answering_is_bounded_too():
    assert foreign.answered(1.0, honest_s=0.0) == ""
    assert foreign.answered(4.4, honest_s=1.0) == ""
    assert "at most 4.5 s" in foreign.answered(4.6, honest_s=1.0)


def test_huge_pages_change_no_byte_of_what_lies_in_them():
    kept = [bytes([number]) * (1 << 20) for number in range(16)]
    before, found = b"".join(kept), processes.use_huge_pages()
    assert b"".join(kept) == before
    assert found >= 0
    if sys.platform != "linux":
        assert found == 0


def test_folders_in_folders_without_end_are_counted_and_removed(tmp_path):
    made, here = tmp_path / "made", Path.cwd()
    made.mkdir()
    try:
        os.chdir(made)
        for _ in range(1_500):
            Path("file").touch()
            Path("folder").mkdir()
            os.chdir("folder")
    finally:
        os.chdir(here)
    assert processes.size_of(made, 1 << 40) > 1 << 40
    processes.remove(made)
    assert list(tmp_path.iterdir()) == []


def test_files_without_a_name_are_counted(tmp_path):
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(b"x" * 100_000)
        file.flush()
        meter = processes._Meter(os.getpid())
        meter.look()
        assert meter.disk_bytes >= 100_000


def test_only_files_of_its_own_are_taken_over(tmp_path):
    def folder(name):
        made = tmp_path / name
        made.mkdir()
        (made / "model.bin").write_bytes(b"x")
        return made

    (folder("link") / "more").symlink_to("/etc/passwd")
    os.link(folder("hard") / "model.bin", tmp_path / "other")
    os.mkfifo(folder("pipe") / "more")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder("sock") / "more"))
        for name, words in {
            "link": "a symbolic link", "hard": "another name", "pipe": "a pipe", "sock": "a socket",
        }.items():  # fmt: skip
            with pytest.raises(Refused, match=words):
                foreign.seal(tmp_path / name, tmp_path / "sealed")
    (tmp_path / "place").symlink_to(tmp_path / "link")
    with pytest.raises(Refused, match="in the place of"):
        foreign.seal(tmp_path / "place", tmp_path / "sealed")
    digest = foreign.seal(folder("fine"), tmp_path / "sealed")
    foreign.check_sealed(tmp_path / "sealed", digest)
    (tmp_path / "sealed" / "model.bin").chmod(0o600)
    (tmp_path / "sealed" / "model.bin").write_bytes(b"y")
    with pytest.raises(Refused, match="changed after"):
        foreign.check_sealed(tmp_path / "sealed", digest)
