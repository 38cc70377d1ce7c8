"""kill -9 of writers and of PostgreSQL in mid-write, and a full disk: what was told is kept.

Writers run in processes of their own, print a line after each call that has returned, and go on
through errors of the ledger, with the same `Ledger` object, until they are killed.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ledger_audit import breaches
from postgres import Server

from society.errors import LeaseLost, LedgerUnreachable, NotebookDamaged, SocietyError
from society.memory.feed import Posted
from society.memory.ledger import Ledger
from society.memory.prose import Prose
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Environment,
    Lease,
    Measurement,
    NewInsight,
    Outcome,
    RunKind,
    Scope,
    Variant,
)

SCOPE = Scope("toy/cpu", "cpu-A")
MEASURED = Measurement(Outcome.COMPLETED, 1.0, Cost())
ENVIRONMENT = Environment("cpu", "A", 1, "3.11")
BUDGET = Budget(BudgetKind.STEPS, 1)
NOTES = 3
"""Insights per commit: all of them or none."""

WRITER = """
    import json, sys, time
    from society.errors import (
        AlreadyLeased, AlreadyRun, InvariantViolated, LeaseLost, SocietyError)
    from society.memory.ledger import Ledger
    from society.records import *

    place, society, name, start = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    scope = Scope("toy/cpu", "cpu-A")
    ledger = Ledger.open(place)

    def say(**what):
        print(json.dumps(what), flush=True)

    def insist(call):
        while True:
            try:
                return call()
            except (AlreadyLeased, AlreadyRun, InvariantViolated, LeaseLost):
                raise
            except SocietyError as error:
                say(error=type(error).__name__)
                time.sleep(0.05)

    for i in range(start, start + 100_000):
        variant = Variant("toy/cpu", {"lr": float(i)})
        try:
            lease = insist(lambda: ledger.lease_screening(
                scope, society, holder=name, variant=variant, ttl_s=60))
        except AlreadyLeased:  # given, but the answer was lost with the server
            continue
        say(lease=lease.run_id)
        score = i / 7
        measured = Measurement(Outcome.COMPLETED, score, Cost(wall_s=0.5), curve=(3.0, score))
        try:
            run = insist(lambda: ledger.finish(
                lease, measured, Environment("cpu", "A", 1, "3.11"), Budget(BudgetKind.STEPS, 1)))
        except LeaseLost:  # the answer was lost with the server, or the lease was
            try:
                run = insist(lambda: ledger.run(lease.run_id))
            except InvariantViolated:
                continue
            if (run.agent, run.variant) != (name, variant):
                continue
        say(run=run.id, score=score, lr=float(i))
        notes = [NewInsight(f"{name} {i} {n}", (run.id,)) for n in range(3)]
        idea = NewHypothesis(f"{name} {i}", "", Variant("toy/cpu", {"depth": i}), 1.0)
        insist(lambda: ledger.commit(scope, society, name, [*notes, idea], key=f"{name} {i}"))
        say(commit=f"{name} {i}")
"""


@dataclass
class Said:
    """What writers have printed so far."""

    runs: dict[str, tuple[float, float]]
    commits: list[str]
    leases: list[str]
    errors: list[str]


class Writers:
    """Processes that write to one ledger, and everything they have acknowledged."""

    def __init__(self, place: Path | str, society: str) -> None:
        self.place, self.society = place, society
        self.said = Said({}, [], [], [])
        self.living: list[subprocess.Popen[str]] = []
        self._listeners: list[threading.Thread] = []
        self._started = 0
        self._heard = threading.Condition()

    def start(self) -> None:
        """One more writer, with a name and numbers of its own."""
        self._started += 1
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(self.place), self.society,
             f"w{self._started}", str(self._started * 100_000)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        listener = threading.Thread(target=self._listen, args=(process,))
        listener.start()
        self.living.append(process)
        self._listeners.append(listener)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if not line.endswith("}\n"):
                    break  # cut short by the kill: nothing was acknowledged
                with self._heard:
                    self._take(json.loads(line))
                    self._heard.notify_all()

    def _take(self, what: dict[str, object]) -> None:
        if "run" in what:
            self.said.runs[str(what["run"])] = (float(str(what["score"])), float(str(what["lr"])))
        for name, heard in (
            ("commit", self.said.commits), ("lease", self.said.leases), ("error", self.said.errors),
        ):  # fmt: skip
            if name in what:
                heard.append(str(what[name]))

    def progress(self, commits: int) -> None:
        """Wait until so many more commits were acknowledged."""
        with self._heard:
            wanted = len(self.said.commits) + commits
            assert self._heard.wait_for(lambda: len(self.said.commits) >= wanted, timeout=60)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9."""
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.living.remove(process)

    def end(self) -> Said:
        """Kill all, and hear what they still had to say."""
        for process in list(self.living):
            self.kill(process)
        for listener in self._listeners:
            listener.join()
        return self.said


class Reader(threading.Thread):
    """Follows the outbox from where it stands, as the index does, while others write."""

    def __init__(self, place: Path | str) -> None:
        super().__init__()
        self.place = place
        self.read: list[Posted] = []
        self.errors: list[SocietyError] = []
        self._over = threading.Event()

    def run(self) -> None:
        with Ledger.open(self.place) as ledger:
            while not self._over.is_set():
                try:
                    self.catch_up(ledger)
                except SocietyError as error:
                    self.errors.append(error)
                    time.sleep(0.05)
                time.sleep(0.005)

    def catch_up(self, ledger: Ledger) -> None:
        """Read on until there is no more."""
        while new := ledger.posted(self.read[-1].seq if self.read else 0, 50):
            self.read.extend(new)

    def finish(self) -> None:
        self._over.set()
        self.join()


def check(place: Path | str, society: str, said: Said, reader: Reader, *, leases: bool) -> None:
    """Every acknowledged record is there and equal; nothing is there by half.

    Args:
        place: The ledger.
        society: The one the writers worked for.
        said: What they have acknowledged.
        reader: Who has followed the outbox meanwhile.
        leases: Whether leases must be there too: they wait for no disk, so that a crash of the
            database may take the last ones.
    """
    with Ledger.open(place) as ledger:
        assert breaches(ledger) == {}
        runs = {run.id: run for run in ledger.runs(kinds=[RunKind.SCREENING])}
        stored = {id: (run.score, run.variant.overrides["lr"]) for id, run in runs.items()}
        assert said.runs.items() <= stored.items()
        assert all(run.curve == (3.0, run.score) for run in runs.values())
        whole = [f"{insight.text}" for insight in ledger.insights()]
        ideas = [one.statement for one in ledger.hypotheses()]
        keys = [text.rpartition(" ")[0] for text in whole[::NOTES]]
        assert whole == [f"{key} {n}" for key in keys for n in range(NOTES)]
        assert ideas == keys
        assert len(set(keys)) == len(keys)
        assert set(said.commits) <= set(keys)
        # a lease whose holder was killed waits for its deadline; one society holds them all
        living = {lease.run_id for lease in ledger.leases(SCOPE)}
        assert not leases or set(said.leases) <= living | set(runs)
        assert ledger.release_all(society) == len(living)
        assert ledger.leases(SCOPE) == ()
        # the index converges: what was read while others wrote and died has no gap
        reader.catch_up(ledger)
        assert tuple(reader.read) == ledger.posted(0, 10**7)
        known = {(posted.kind, posted.ref) for posted in reader.read}
        assert {ref for kind, ref in known if kind == "run"} == set(runs)
        assert {(one.kind, one.ref) for one in Prose(ledger).all()} == known


@contextmanager
def at_work(place: Path | str, seed: int, *, leases: bool) -> Iterator[Writers]:
    """Two writers and a reader; at the end all are killed, and what they have left is checked."""
    with Ledger.open(place, secret_seed=seed) as ledger:
        society = ledger.start_society(1, {}).id
    writers, reader = Writers(place, society), Reader(place)
    reader.start()
    try:
        writers.start()
        writers.start()
        writers.progress(2)
        yield writers
    finally:
        said = writers.end()
        reader.finish()
    assert len(said.runs) >= len(said.commits) > 0
    check(place, society, said, reader, leases=leases)


def kill_writers(place: Path | str, rounds: int, seed: int) -> None:
    """Kill one of two writers at a random moment, again and again."""
    chance = random.Random(seed)
    with at_work(place, seed, leases=True) as writers:
        for _ in range(rounds):
            writers.progress(4)
            time.sleep(chance.uniform(0.0, 0.03))
            writers.kill(chance.choice(writers.living))
            writers.start()
    assert not writers.said.errors, "those that were left were not disturbed"


def kill_server(server: Server, rounds: int, seed: int) -> None:
    """Kill the database under two writers and a reader, which go on when it is back."""
    chance = random.Random(seed)
    place = server.url_of(server.create())
    with at_work(place, seed, leases=False) as writers, Ledger.open(place) as bystander:
        for _ in range(rounds):
            writers.progress(4)
            time.sleep(chance.uniform(0.0, 0.03))
            before = bystander.version()
            server.kill9()
            with pytest.raises(LedgerUnreachable):
                bystander.version()
            with pytest.raises(LedgerUnreachable):
                bystander.start_society(1, {})
            server.start()
            assert bystander.version() > before
            writers.progress(4)  # the same processes, with the same ledger
    assert len(writers.said.errors) >= rounds


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def mortal_server() -> Iterator[Server]:
    """A server that nobody else uses."""
    server = Server()
    yield server
    server.remove()


def test_killed_writers_lose_nothing_that_was_acknowledged(place: Path | str) -> None:
    kill_writers(place, rounds=3, seed=1)


@pytest.mark.slow
def test_writers_killed_twenty_times(place: Path | str) -> None:
    kill_writers(place, rounds=20, seed=2)


def test_a_killed_database_loses_nothing_that_was_acknowledged(mortal_server: Server) -> None:
    kill_server(mortal_server, rounds=3, seed=3)


def test_a_lease_that_a_crash_took_confuses_nobody(mortal_server: Server) -> None:
    """Leases wait for no disk: its token, run id and version may be given again."""
    mortal_server.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    mortal_server.restart()
    place = mortal_server.url_of(mortal_server.create())
    with Ledger.open(place, secret_seed=1) as ledger:
        society = ledger.start_society(1, {}).id
        lost = lease(ledger, society, "ada", 1.0)
        before = ledger.version()
        assert ledger.leases(SCOPE) == (lost,)
        mortal_server.restart()
        with Ledger.open(place) as other:
            assert other.leases(SCOPE) == (), "the crash has taken nothing: the test shows nothing"
            given = lease(other, society, "ben", 2.0)
            assert (given.token, given.run_id) == (lost.token, lost.run_id)
            with pytest.raises(LeaseLost):
                ledger.finish(lost, MEASURED, ENVIRONMENT, BUDGET)
            assert ledger.version() > before
            assert ledger.leases(SCOPE) == (given,)
            run = other.finish(given, MEASURED, ENVIRONMENT, BUDGET)
            assert ledger.runs() == (run,)
            assert ledger.run(run.id).variant == given.variant


def lease(ledger: Ledger, society: str, holder: str, lr: float) -> Lease:
    return ledger.lease_screening(
        SCOPE, society, holder=holder, variant=Variant("toy/cpu", {"lr": lr}), ttl_s=60
    )


@pytest.mark.slow
def test_a_database_killed_twenty_times(mortal_server: Server) -> None:
    kill_server(mortal_server, rounds=20, seed=4)


# --- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "society-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("mounting a small disk needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(ledger: Ledger, society: str, name: str) -> list[str]:
    """Commit until the ledger cannot be written, with advice; what was acknowledged."""
    written: list[str] = []

    def commit_on() -> None:
        for i in range(1000):
            notes = [NewInsight(f"{name} {i} {n} " + "x" * 5000, ()) for n in range(NOTES)]
            ledger.commit(SCOPE, society, "ada", notes, key=f"{name} {i}")
            written.extend(note.text for note in notes)

    with pytest.raises(NotebookDamaged, match="Free some disk space"):
        commit_on()
    return written


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """Refused with advice, again and again; nothing by half; goes on once there is room."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * 300_000)
    with Ledger.open(small_disk / "ledger.sqlite", secret_seed=1) as ledger:
        society = ledger.start_society(1, {}).id
        written = fill(ledger, society, "first")
        assert len(written) > NOTES
        written += fill(ledger, society, "second")
        assert [one.text for one in ledger.insights()] == written
        ballast.unlink()
        assert ledger.commit(SCOPE, society, "ada", [NewInsight("z", ())], key="z")
    with Ledger.open(small_disk / "ledger.sqlite") as ledger:
        assert breaches(ledger) == {}
        assert [one.text for one in ledger.insights()] == [*written, "z"]
