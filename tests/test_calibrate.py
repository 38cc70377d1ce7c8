"""`society calibrate`: what it measures, what it says, and that nothing stops it for good."""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from society import calibrate, noise_words
from society.cli import main
from society.cli_common import opened
from society.errors import ExecutorError, NotANotebook, UsageError
from society.experiments import InlineExecutor, Space, load_task, noise
from society.experiments.synthetic import DATA_SD, INIT_SD, LEVEL, SPLIT_SD
from society.experiments.task import known_profiles, known_tasks
from society.memory.folder import FileLock, NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import Prose
from society.plots import noise_study
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
)
from society.roles import BudgetLeft, Charter, View
from society.study import Workbench

TASK = load_task("synthetic", "quick")


def on_bench(folder, work, executor=None, secret=6):
    async def main():
        chosen = executor or InlineExecutor(TASK)
        if executor is None:
            await chosen.start()
        with Ledger.open(folder / "ledger.sqlite", secret_seed=secret) as ledger:
            record = ledger.start_society(0, {"task": "synthetic", "study": "calibrate"})
            scope = Scope(TASK.key, chosen.environment.tier)
            return await work(Workbench(ledger, scope, TASK, record, chosen))

    return asyncio.run(main())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A noise study of the synthetic task on many seeds, and the notebook it is in."""
    folder = tmp_path_factory.mktemp("noise")
    return on_bench(folder, lambda bench: calibrate.calibrate(bench, 80, 12)), folder


# --- what is measured ----------------------------------------------------------------------------


def test_the_components_are_those_of_the_task(measured):
    """The synthetic task's own figures; its split adds noise that goes with the init seed."""
    found, _ = measured
    init = math.hypot(INIT_SD, SPLIT_SD)
    assert found.plain.low < math.hypot(init, DATA_SD) < found.plain.high
    assert found.init.low < init < found.init.high
    assert found.data.low < DATA_SD < found.data.high
    assert found.sum.adds_up
    assert (found.plain.n, found.init.n, found.data.n, found.failed) == (80, 20, 20, 0)
    truth = TASK.expected(TASK.baseline) + LEVEL[Split.HOLDOUT]
    assert abs(found.mean - truth) < 4 * found.plain.sd / math.sqrt(80)


def test_small_changes_pair_well(measured):
    found, _ = measured
    assert [one.group for one in found.classes] == ["shape", "data", "optimiser", "schedule"]
    for one in found.classes:
        assert one.pairing.n == 12
        assert one.pairing.correlation > 0.9
        assert one.pairing.difference.sd < found.total.sd / 2


def test_a_deterministic_task_has_no_jitter(measured):
    found, _ = measured
    assert found.deterministic
    assert found.jitter == noise.Jitter(3, True, 0.0)


def test_it_is_recorded_with_its_plan_and_its_runs(measured):
    found, folder = measured
    with Ledger.open(folder, read_only=True) as ledger:
        (study,) = ledger.studies()
        runs = ledger.runs()
        assert ledger.noise_history() == ()  # it is no society's noise floor
        assert ledger.posted(0, 10) == ()  # and nothing for the semantic index
    assert calibrate.recorded(study) == found
    assert study.plan["seeds"] == 80
    assert study.plan["changes"]["shape"] == {"depth": 5}
    assert set(study.evidence) == {run.id for run in runs}
    assert {run.kind for run in runs} == {RunKind.STUDY}
    assert min(run.started_at for run in runs) >= study.registered_at
    # 80 + 19 + 19 + 2 + 4 * 12: what serves two parts is made once
    assert len(runs) == 168


def test_it_does_not_tell_the_seeds(measured):
    found, folder = measured
    with Ledger.open(folder) as ledger:
        (study,) = ledger.studies()
        seeds = set(map(str, ledger.seeds(SeedList.STUDY, study.scope, 80)))
    told = json.dumps([dict(study.plan), dict(study.result)]) + noise_words.summary(found)
    assert not [seed for seed in seeds if f" {seed}," in told or f" {seed}]" in told]


def test_the_same_study_again_makes_no_run(measured):
    found, folder = measured

    async def work(bench):
        return await calibrate.calibrate(bench, 80, 12), bench.made

    assert on_bench(folder, work) == (found, 0)


def test_more_seeds_go_on_from_those_there_are(measured, tmp_path):
    async def work(bench):
        small = await calibrate.calibrate(bench, 8, 4)
        before = bench.made
        large = await calibrate.calibrate(bench, 12, 4)
        return small, large, before, bench.made

    small, large, before, after = on_bench(tmp_path, work)
    assert large.scores[:8] == small.scores
    assert (before, after - before) == (8 + 3 + 3 + 2 + 16, 4)
    assert large.study != small.study


class Failing:
    """Scores by seed; fails where it is told."""

    environment = Environment("cpu", "A", 1, "3.11")
    data_hash, slots, busy_s = "d", 2, 0.0

    def __init__(self, fails):
        self.fails, self.jumps = fails, 0.0

    async def run(self, work):
        if self.fails(work):
            return Measurement(Outcome.DIVERGED, None, Cost(), "loss is nan")
        self.jumps += 1e-9
        return Measurement(Outcome.COMPLETED, work.seed / 2**31 + self.jumps, Cost())


def test_failed_runs_are_left_out_and_counted(tmp_path):
    """A class whose runs all fail, and repetitions that differ."""
    executor = Failing(lambda work: "lr" in work.variant.overrides)
    found = on_bench(tmp_path, lambda bench: calibrate.calibrate(bench, 8, 4), executor)
    lr = next(one for one in found.classes if one.group == "optimiser")
    assert (lr.failed, lr.pairing) == (4, None)
    assert not found.jitter.equal
    words = " ".join(noise_words.sentences(found))
    assert "WARNING" in words
    assert any("4 failed" in cell for row in noise_words.class_rows(found) for cell in row)
    assert noise_study(found) is not None


def test_a_baseline_that_fails_has_no_noise(tmp_path):
    executor = Failing(lambda work: work.variant.is_baseline)
    with pytest.raises(ExecutorError, match=r"Only 0 of 8.*r\d+ diverged: loss is nan"):
        on_bench(tmp_path, lambda bench: calibrate.calibrate(bench, 8), executor)


def test_another_study_is_no_noise_study(tmp_path):
    async def work(bench):
        return bench.register("other", "x", {})

    with pytest.raises(UsageError, match="no concluded noise study"):
        calibrate.recorded(on_bench(tmp_path, work, Failing(bool)))


# --- the change that stands for a class of knobs -------------------------------------------------


@pytest.mark.parametrize(
    ("name", "profile"), [(name, size) for name in known_tasks() for size in known_profiles(name)]
)
def test_every_class_has_one_small_change(name, profile):
    task = load_task(name, profile)
    space = Space.of(task)
    found = calibrate.representatives(space, task.key)
    assert set(found) == {knob.group for knob in space.knobs.values()}
    for group, one in found.items():
        ((knob, value),) = one.overrides.items()
        assert space.knobs[knob].group == group
        if not space.knobs[knob].choices and not isinstance(value, bool):
            moved = abs(space.unit(knob, value) - space.unit(knob, space.default(knob)))
            assert 0 < moved < 0.2


# --- what is said --------------------------------------------------------------------------------


def test_the_page_and_its_plot(measured, tmp_path):
    found, _ = measured
    page = noise_words.write_page(found, tmp_path)
    text = page.read_text()
    assert page.name == f"noise-synthetic-quick-{found.tier}.md"
    assert f"](plots/{page.stem}.svg)" in text
    assert (tmp_path / "plots" / f"{page.stem}.svg").read_text().startswith("<?xml")
    for sentence in noise_words.sentences(found):
        assert sentence in text
    assert "depth=5" in text
    assert text.count("\n| ") == len(
        [*noise_words.spread_rows(found), *noise_words.class_rows(found)]
    )


def changed(found, **values):
    return " ".join(noise_words.sentences(dataclasses.replace(found, **values)))


def test_what_is_said_depends_on_what_was_found(measured):
    found, _ = measured
    assert "same bits, as they must here" in changed(found)
    assert "simply add up" in changed(found)
    assert "interact" in changed(found, sum=noise.Sum(1.8, 1.2, 2.5))
    assert "something else varies" in changed(found, sum=noise.Sum(0.5, 0.3, 0.8))
    apart = noise.Jitter(3, False, found.total.sd / 4)
    assert "WARNING" in changed(found, jitter=apart)
    assert "25% of the noise floor" in changed(found, jitter=apart, deterministic=False)
    assert "repetitions failed" in changed(found, jitter=None)
    assert "2 baseline runs failed" in changed(found, failed=2)
    silent = noise.Spread(0.0, 0.0, 0.0, 8)
    quiet = changed(found, total=silent, plain=silent, sum=None, init=None, data=None)
    assert "There is no noise" in quiet
    assert "same seeds it takes" not in changed(found, classes=())
    still = dataclasses.replace(found, total=silent)
    assert noise_study(still) is None
    assert all(noise_words.class_rows(still))


def test_the_power_is_that_of_the_formula(measured):
    found, _ = measured
    words = changed(found)
    alone = noise.seeds_needed(0.5, math.sqrt(2))
    assert f"need {alone} seeds each" in words
    assert 49 <= alone <= 52  # 2 (1.645 + .842)² / .5² = 49.5, and a little for the t
    assert "probability 0.91" in words


# --- the command ---------------------------------------------------------------------------------

SLOW = (
    "task: synthetic\nname: slow\nbudget: {kind: steps, amount: 100}\n"
    "limits: {timeout_s: 30, mem_bytes: 268_435_456}\noptions: {sleep_s: 0.1}\n"
)


@pytest.fixture
def cli(capsys):
    """Call the command in this process; see `society` for one of its own."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(end.value.code or 0, captured.out, captured.err)

    return call


@dataclasses.dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def slow(tmp_path):
    profile = tmp_path / "slow.yaml"
    profile.write_text(SLOW)
    return ["--task", "synthetic", "--profile", str(profile), "--slots", "2"]


def test_the_command(cli, tmp_path):
    lab = tmp_path / "lab"
    order = ("calibrate", "--task", "synthetic", "--seeds", 8, "--pairs", 4, "--lab", lab)
    done = cli(*order, "--seed", 3)
    assert (done.code, done.err) == (0, "")
    assert "32 of 32 runs" not in done.out  # 36 are wanted, 32 of them made
    assert "36 of 36 runs" not in done.out.splitlines()[0]
    assert "the jitter is 0" in done.out
    last = done.out.strip().splitlines()[-1]
    assert last.startswith("Markdown: ")
    assert last.endswith(".md")
    found = json.loads(cli(*order, "--json").out)
    assert (found["task"], found["total"]["n"]) == ("synthetic/quick", 8)
    assert os.path.exists(found["page"])
    assert f"study {found['study']} noise sd" in cli("status", "--lab", lab).out
    status = json.loads(cli("status", "--lab", lab, "--json").out)
    assert status["society"] is None
    assert status["studies"][0]["concluded"]
    for command in (["report"], ["audit"], ["run", "--resume"]):
        refused = cli(*command, "--lab", lab)
        assert refused.code == 2, command
        assert "ociety" in refused.err
    shown = cli("memory", "show", found["study"], "--lab", lab).out
    assert "evidence" in shown
    exported = cli("memory", "export", "--out", tmp_path / "all.jsonl", "--lab", lab)
    assert exported.code == 0
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    tables = [json.loads(line)["table"] for line in lines[1:]]
    assert (tables.count("studies"), tables.count("runs")) == (1, 32)


def knowledge(lab):
    """What a brain may know, and what claims are judged by."""
    with opened(lab) as notebook:
        view = View(
            notebook.ledger, scope=notebook.scope, society=notebook.record.id, task=notebook.task,
            space=notebook.space, charter=Charter(), budget=BudgetLeft(0, 0, 0), entropy=0,
        )  # fmt: skip
        brain = view.knowledge()
        evidence = [view.evidence(claim) for claim in view.claims]
        passages = [one.text for one in Prose(notebook.ledger).all()]
        return brain.results, brain.pending, brain.noise_sd, brain.entropy, evidence, passages


def test_a_study_beside_a_society_is_not_mistaken_for_it(cli, small_lab, tmp_path):
    """The society of before is shown, resumed and audited; its report has no run of the study."""
    lab = shutil.copytree(small_lab, tmp_path / "lab")
    before = json.loads(cli("status", "--lab", lab, "--json").out)
    known = knowledge(lab)
    order = ("calibrate", "--task", "synthetic", "--seeds", 4, "--pairs", 0, "--lab", lab)
    assert cli(*order).code == 0
    assert knowledge(lab) == known
    after = json.loads(cli("status", "--lab", lab, "--json").out)
    assert after["runs"].pop("study") == 12
    assert before["runs"].pop("study") == 0
    for name in ("society", "state", "runs", "champion", "noise", "claims", "wall_s"):
        assert after[name] == before[name], name
    assert "finished" in cli("run", "--resume", "--lab", lab).err
    assert cli("report", "--lab", lab).code == 0
    text = (lab / "report" / "report.md").read_text()
    assert "study" not in text
    assert f"| Runs | {sum(before['runs'].values())}," in text
    with Ledger.open(lab, read_only=True) as ledger:
        studied = {run.id for run in ledger.runs(kinds=[RunKind.STUDY])}
    assert len(studied) == 12
    assert not [one for one in studied if one in text]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "3"], "--seeds"),
        (["--pairs", "3"], "at least 4 pairs"),
        (["--seeds", "6", "--pairs", "9"], "Take --seeds 9"),
        (["--pairs", "-1"], "--pairs"),
        (["--slots", "0"], "--slots"),
        (["--task", "pretrian"], "Did you mean 'pretrain'"),
        (["--profile", "h200"], "quick"),
        (["--device", "tpu"], "cuda"),
    ],
)
def test_wrong_requests_leave_nothing(cli, tmp_path, options, words):
    base = [] if "--task" in options else ["--task", "synthetic"]
    done = cli("calibrate", *base, *options, "--lab", tmp_path / "lab")
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "lab").exists()


def test_two_at_once_are_refused(cli, tmp_path):
    lock = FileLock(NotebookFolder(tmp_path).create().owner_lock)
    assert lock.acquire()
    try:
        done = cli("calibrate", "--task", "synthetic", "--lab", tmp_path)
    finally:
        lock.release()
    assert done.code == 1
    assert f"process {os.getpid()}" in done.err


def begin(lab, *options):
    """Start the command and wait until some runs are recorded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "society", "calibrate", *options, "--lab", str(lab)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(recorded(lab)) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def recorded(lab):
    with contextlib.suppress(NotANotebook), Ledger.open(lab, read_only=True) as ledger:
        return {run.id: run for run in ledger.runs()}
    return {}  # the file is being made


def finish(society, lab, options, before):
    """The same command again: it ends well, keeps what there was, and makes nothing twice."""
    done = society("calibrate", *options, "--lab", lab)
    assert (done.code, done.err) == (0, "")
    after = recorded(lab)
    assert before.items() <= after.items()
    places = [(run.variant.fingerprint, run.seed, run.data_seed, run.repeat) for run in
              after.values()]  # fmt: skip
    assert len(places) == len(set(places)) == 20 + 4 + 4 + 2
    with Ledger.open(lab, read_only=True) as ledger:
        (record,), (study,) = ledger.societies(), ledger.studies()
        assert ledger.leases(study.scope) == ()
    assert record.state is SocietyState.FINISHED
    assert set(study.evidence) == set(after)


def test_kill_9_loses_nothing(society, tmp_path, slow):
    lab, options = tmp_path / "lab", [*slow, "--seeds", "20", "--pairs", "0"]
    process = begin(lab, *options)
    process.kill()
    process.communicate()
    finish(society, lab, options, recorded(lab))


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_keeps_what_was_finished(society, tmp_path, slow, signals):
    lab, options = tmp_path / "lab", [*slow, "--seeds", "20", "--pairs", "0"]
    process = begin(lab, *options)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("error: Stopped; ")
    assert errors.count("\n") == 1
    before = recorded(lab)
    assert 5 <= len(before) < 30
    assert {run.outcome for run in before.values()} == {Outcome.COMPLETED}
    assert f"Stopped; {len(before)} runs" in errors
    with Ledger.open(lab, read_only=True) as ledger:
        assert ledger.societies()[0].state is SocietyState.STOPPED
        assert ledger.studies()[0].result is None
    assert "not concluded" in society("status", "--lab", lab).out
    finish(society, lab, options, before)


@pytest.mark.slow
def test_the_reference_task(society, tmp_path):
    lab = tmp_path / "lab"
    done = society("calibrate", "--seeds", 4, "--pairs", 0, "--seed", 3, "--lab", lab, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["deterministic"]
    assert found["jitter"] == {"n": 3, "equal": True, "sd": 0.0}
    assert 0.001 < found["total"]["sd"] < 0.05
    assert min(found["init"]["sd"], found["data"]["sd"]) > 0
