"""Several folders on one ledger: nothing is done twice, and nobody disturbs anybody."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from conftest import society

from society.agents import graph
from society.errors import InvariantViolated, NotebookDamaged, UsageError
from society.experiments.task import load_task
from society.memory.folder import NotebookFolder, Shared, ledger_address
from society.memory.ledger import Ledger
from society.records import Decision, Noise, Outcome, RunKind, Scope, SocietyState, Variant

TASK = load_task("synthetic", "quick")
BASELINE = Variant(TASK.key)
NOISE = Noise(TASK.key, "cpu-A", 0.01, 0.005, 0.02, 8)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """The address of an empty shared ledger."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.sqlite"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def sqlite(tmp_path):
    """The address of an empty shared ledger in a file."""
    return f"sqlite:///{tmp_path}/shared.sqlite"


@contextmanager
def working(*arguments):
    """The command in a process of its own, killed at the end if it still works."""
    process = subprocess.Popen(
        [sys.executable, "-m", "society", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process):
    """Wait for the end of a command and check that it worked."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def options(lab, url, runs, seed):
    return (
        "run", "--task", "synthetic", "--runs", runs, "--agents", 4, "--slots", 2,
        "--seed", seed, "--ledger", url, "--lab", lab,
    )  # fmt: skip


def reader(url):
    return Ledger.open(url, read_only=True)


def runs_of(url, society=None):
    with reader(url) as ledger:
        return ledger.runs(society=society)


def wait_for_runs(url, count, society, *processes):
    """Until a society has made so many runs, all processes still being at work."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        try:
            if len(runs_of(url, society)) >= count:
                return
        except (UsageError, InvariantViolated, NotebookDamaged):
            pass  # it is being created
        time.sleep(0.05)
    raise AssertionError(f"{society} has not made {count} runs")


def check_nothing_twice(ledger):
    """No work was done twice, and every entry of the champion history rests on the one before."""
    runs = [run for run in ledger.runs() if run.outcome is not Outcome.CRASHED]
    screened = Counter(r.variant.fingerprint for r in runs if r.kind is RunKind.SCREENING)
    pools = Counter(
        (run.variant.fingerprint, run.seed)
        for run in runs
        if run.kind in (RunKind.CALIBRATION, RunKind.VERIFICATION)
    )
    assert max(screened.values()) == 1
    assert max(pools.values()) == 1
    (scope,) = ledger.scopes()
    history, claims = ledger.champions(scope), {claim.id: claim for claim in ledger.claims(scope)}
    assert [entry.number for entry in history] == list(range(len(history)))
    assert history[0].variant.is_baseline
    for before, entry in itertools.pairwise(history):
        if not entry.reverts:
            assert claims[entry.claim_id].reference == before.variant
            assert claims[entry.claim_id].verdict_is(
                Decision.ACCEPTED, Decision.CONFIRMED, Decision.ROLLED_BACK
            )
    for run in runs:
        if run.kind in (RunKind.VERIFICATION, RunKind.REPRODUCTION):
            assert run.agent != claims[run.claim_id].author
    return scope


# ---------------------------------------------------------------------- societies at the same time


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_two_societies_work_on_one_ledger_at_the_same_time(url, tmp_path):
    labs = tmp_path / "ann", tmp_path / "bob"
    Ledger.open(url, 3).close()
    with (
        working(*options(labs[0], url, 36, 1)) as first,
        working(*options(labs[1], url, 36, 2)) as second,
    ):
        ended(first), ended(second)
    with reader(url) as ledger:
        scope, runs = check_nothing_twice(ledger), ledger.runs()
        records = {record.home: record for record in ledger.societies()}
        champion = ledger.champion(scope)
    own = [records[NotebookFolder(lab).home] for lab in labs]
    assert {one.state for one in own} == {SocietyState.FINISHED}
    places = {one.id: [r.number for r in runs if r.society == one.id] for one in own}
    assert [len(numbers) for numbers in places.values()] == [36, 36]
    ((low, *_, end), (start, *_, high)) = sorted(places.values())
    assert low < start < end or low < high < end, "they did not work at the same time"
    for lab, mine, other in zip(labs, own, reversed(own), strict=True):
        told = society("report", "--json", "--lab", lab)
        sentence = f"Society {mine.id} made 36 of the 72 runs; the others are by {other.id}"
        assert sentence in json.loads(told.out)["sentences"][-1]
        found = json.loads(society("status", "--json", "--lab", lab).out)
        assert (found["society"], found["state"]) == (mine.id, "finished")
        assert [one["id"] for one in found["others"]] == [other.id]
        assert found["champion"]["variant"]["overrides"] == dict(champion.variant.overrides)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_society_does_not_disturb_the_other_and_resumes(url, tmp_path):
    labs = tmp_path / "ann", tmp_path / "bob"
    Ledger.open(url, 3).close()
    with working(*options(labs[0], url, 44, 1)) as first:
        wait_for_runs(url, 1, "s001", first)
        with working(*options(labs[1], url, 44, 2)) as second:
            wait_for_runs(url, 12, "s002", second)
            second.send_signal(signal.SIGKILL)
            second.wait()
            before = {run.id: run for run in runs_of(url)}
            ended(first)
    with reader(url) as ledger:
        check_nothing_twice(ledger)
        assert ledger.society("s001").state is SocietyState.FINISHED
        assert ledger.society("s002").state is SocietyState.RUNNING
    status = society("status", "--lab", labs[0])
    assert "also here: s002 (running, last active" in status.out
    with working("run", "--resume", "--lab", labs[1]) as again:
        ended(again)
    with reader(url) as ledger:
        check_nothing_twice(ledger)
        after = {run.id: run for run in ledger.runs()}
        assert len(ledger.societies()) == 2
        assert ledger.society("s002").state is SocietyState.FINISHED
        assert len(ledger.runs(society="s001")) == len(ledger.runs(society="s002")) == 44
    assert before.items() <= after.items()


@pytest.mark.slow
def test_a_society_waits_for_seeds_that_another_one_holds(sqlite, tmp_path):
    """Also when that one dies: then the leases expire, and nothing is written that would tell."""
    done = society(*options(tmp_path / "first", sqlite, 1, 1))
    assert done.code == 0, done.err
    log = tmp_path / "second" / "logs" / "society.jsonl"
    with Ledger.open(sqlite) as ledger:
        other = ledger.start_society(9, {"task": "synthetic"}, home="elsewhere").id
        (scope,) = ledger.scopes()
        held = [
            ledger.lease_next_seed(
                scope, other, holder="a09", variant=BASELINE, kind=RunKind.CALIBRATION, ttl_s=300
            )
            for _ in range(8)
        ]
        with working(*options(tmp_path / "second", sqlite, 30, 2)) as second:
            deadline = time.monotonic() + 120
            while not (log.exists() and "waits for runs of other societies" in log.read_text()):
                assert second.poll() is None, second.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert ledger.noise(scope) is None
            for lease in held:
                ledger.heartbeat(lease, 0.01)
            ended(second)
        assert ledger.noise(scope) is not None
        made = Counter(run.kind for run in ledger.runs(society="s003"))
    assert made[RunKind.CALIBRATION] >= 7
    assert made[RunKind.SCREENING] >= 5


def test_two_calibrations_make_each_run_once(sqlite, tmp_path):
    labs = tmp_path / "ann", tmp_path / "bob"
    for lab in labs:
        done = society("memory", "share", "--ledger", sqlite, "--lab", lab)
        assert done.code == 0, done.err
    wanted = ("calibrate", "--task", "synthetic", "--seeds", 40, "--pairs", 0, "--slots", 2)
    with (
        working(*wanted, "--json", "--lab", labs[0]) as first,
        working(*wanted, "--json", "--lab", labs[1]) as second,
    ):
        results = [json.loads(ended(process))["words"] for process in (first, second)]
    assert results[0] == results[1]
    with reader(sqlite) as ledger:
        (study,) = ledger.studies()
        runs = ledger.runs()
        assert len({(r.variant.fingerprint, r.seed, r.data_seed, r.repeat) for r in runs}) == len(
            runs
        )
        assert set(study.evidence) <= {run.id for run in runs}
        assert len(ledger.societies()) == 2


def test_only_the_folders_own_leases_are_ended(sqlite, tmp_path):
    mine, theirs = (NotebookFolder(tmp_path / name).share(sqlite) for name in ("ann", "bob"))
    assert mine.home != theirs.home
    with Ledger.open(sqlite) as ledger:
        scope = Scope(TASK.key, "cpu-A")
        for folder in (mine, theirs):
            record = ledger.start_society(1, {"task": "synthetic"}, home=folder.home)
            ledger.lease_screening(
                scope, record.id, holder="a01", ttl_s=60,
                variant=Variant(TASK.key, {"depth": record.seed + len(ledger.societies())}),
            )  # fmt: skip
        mine.end_sessions(ledger)
        assert [lease.society for lease in ledger.leases(scope)] == ["s002"]
        states = [record.state for record in ledger.societies()]
    assert states == [SocietyState.STOPPED, SocietyState.RUNNING]


def test_a_society_whose_outcome_is_refused_goes_on():
    """Two societies may come to the same entry at once; the ledger takes the first."""
    written, lapsed = [], []

    class Refusing:
        def now(self):
            return 1.0

        def commit(self, scope, record, agent, entries, *, key, activity, **options):
            if entries:
                raise InvariantViolated("The ledger refused a write: closed before.")
            written.append((key, activity.note))
            return True

    laboratory = SimpleNamespace(
        ledger=Refusing(),
        scope=None,
        record=SimpleNamespace(id="s001"),
        lapsed=lapsed.append,
        room=None,
    )
    state = {
        "cycle": 3, "started_at": 0.5, "note": "accepted",
        "duty": graph.dump_duty(graph.Duty("statistician", "judge", "c0001")),
        "entries": [graph.dump_entry(NOISE)],
    }  # fmt: skip
    agent = SimpleNamespace(name="a01", laboratory=laboratory)
    left = asyncio.run(graph.commit(state, SimpleNamespace(context=agent)))
    assert left["duty"] is None
    assert [duty.subject for duty in lapsed] == ["c0001"]
    ((key, note),) = written
    assert key == "s001/a01/3@0.5"
    assert note.startswith("lapsed: The ledger refused")


# ---------------------------------------------------------------------- what a folder remembers


def test_a_folder_remembers_what_it_shares(sqlite, tmp_path):
    folder = NotebookFolder(tmp_path / "ann")
    assert (folder.ledger, folder.home, folder.exists()) == (folder.own_ledger, "", False)
    folder.share(sqlite, "http://127.0.0.1:8000")
    again = NotebookFolder(tmp_path / "ann").require()
    assert (again.ledger, again.recall_address) == (sqlite, "http://127.0.0.1:8000")
    home = again.home
    assert len(home) == 12
    again.share(sqlite)
    assert again.shared == Shared(sqlite, "http://127.0.0.1:8000", home)
    assert not folder.own_ledger.exists()


def test_facts_are_not_left_behind(sqlite, tmp_path, small_lab):
    with pytest.raises(UsageError, match=r"society memory export .*society memory import"):
        NotebookFolder(small_lab).share(sqlite)
    assert not (small_lab / "shared.json").exists()
    assert not (tmp_path / "shared.sqlite").exists()
    folder = NotebookFolder(tmp_path / "ann").share(sqlite)
    with pytest.raises(UsageError, match=r"belongs to the ledger .*shared.sqlite"):
        folder.share(f"sqlite:///{tmp_path}/other.sqlite")
    assert folder.ledger == sqlite


def test_a_folder_may_join_the_ledger_of_another_folder(small_lab, tmp_path):
    ledger = tmp_path / "ledger.sqlite"
    ledger.write_bytes((small_lab / "ledger.sqlite").read_bytes())
    owner = NotebookFolder(tmp_path).share(f"sqlite:///{ledger}")
    guest = NotebookFolder(tmp_path / "guest").share(f"sqlite:///{ledger}")
    with Ledger.open(ledger, read_only=True) as opened:
        records = opened.societies()
    assert [record.id for record in owner.own(records)] == ["s001"]
    assert guest.own(records) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("postgres://ann@host/db", "expected postgresql://"),
        ("postgresql:///", "expected postgresql://"),
        ("shared.sqlite", "expected postgresql://"),
        ("sqlite://", "expected postgresql://"),
        ("postgresql://ann:hunter2@host/db", "leave the password out"),
        ("postgresql:///db?host=/tmp&password=hunter2", "leave the password out"),
    ],
)
def test_what_is_no_address_is_refused(given, words):
    with pytest.raises(UsageError, match=words) as refused:
        ledger_address(given)
    assert "hunter2" not in str(refused.value)


def test_a_relative_address_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ledger_address("sqlite:///x/../y.sqlite") == f"sqlite:///{tmp_path}/y.sqlite"
    assert ledger_address("postgresql:///db?host=/run/pg") == "postgresql:///db?host=/run/pg"


@pytest.mark.parametrize("written", ["{", "[]", '{"ledgers": "x"}'])
def test_a_damaged_memo_is_said(tmp_path, written):
    (tmp_path / "shared.json").write_text(written)
    done = society("status", "--lab", tmp_path)
    assert done.code == 1
    assert "shared.json cannot be read" in done.err


def test_nothing_is_remembered_of_a_ledger_that_cannot_be_reached(tmp_path):
    done = society(
        "run", "--task", "synthetic", "--runs", 9, "--lab", tmp_path / "lab",
        "--ledger", "postgresql://nobody@127.0.0.1:9/nothing",
    )  # fmt: skip
    assert done.code in (1, 2)
    assert done.err.startswith("error: ")
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "lab" / "shared.json").exists()


# ---------------------------------------------------------------------- reading from another folder


@pytest.mark.slow
def test_everything_can_be_read_and_made_again_from_another_folder(sqlite, tmp_path):
    done = society(*options(tmp_path / "ann", sqlite, 24, 5))
    assert done.code == 0, done.err
    assert done.out.startswith(f"Ledger: {sqlite}\n")
    guest = tmp_path / "guest"
    done = society("memory", "share", "--ledger", sqlite, "--lab", guest)
    assert (done.code, done.out.split()[1]) == (0, sqlite)
    run = runs_of(sqlite)[-1]
    told = json.loads(society("rerun", run.id, "--json", "--lab", guest).out)
    assert (told["same"], told["differences"]) == (True, [])
    assert f"run {run.id}" in society("memory", "show", run.id, "--lab", guest).out
    found = json.loads(society("status", "--json", "--lab", guest).out)
    assert (found["society"], found["state"]) == ("s001", "finished")
    done = society("run", "--resume", "--lab", guest)
    assert done.code == 2
    assert "Nothing to resume" in done.err
    checks = {c["name"]: c for c in json.loads(society("doctor", "--json", "--lab", guest).out)}
    assert checks["ledger"]["health"] == "ok"
    assert "answers in" in checks["ledger"]["found"]
    assert "0 of the societies are this folder's" in checks["notebook"]["found"]


def test_the_doctor_says_what_is_down(tmp_path):
    (tmp_path / "shared.json").write_text(
        json.dumps(
            {"ledger": "postgresql://nobody@127.0.0.1:9/x", "recall": "http://127.0.0.1:9",
             "home": "h"}
        )
    )  # fmt: skip
    done = society("doctor", "--json", "--lab", tmp_path)
    checks = {check["name"]: check for check in json.loads(done.out)}
    assert done.code == 1
    assert checks["ledger"]["health"] == "fail"
    assert checks["recall"]["health"] == "warn"
    assert "does not answer" in checks["recall"]["found"]
