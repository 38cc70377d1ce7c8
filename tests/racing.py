"""Processes that race for leases on one ledger, some of which are killed; and what came of it.

Run as a program it makes the race described by the JSON of a `Race` on its command line and prints
the JSON of a `Result`. It forks its racers after everything is imported, so it wants a process of
its own: `race` starts one. Used by test_contention.py and by benchmarks/contention.py.

A racer looks for work among the first fingerprints that are not marked as done in memory that all
share, takes a lease, pretends to work, finishes and marks. Only the ledger decides who may.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from society.errors import AlreadyLeased, AlreadyRun, LeaseLost
from society.memory.ledger import Ledger
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Environment,
    Measurement,
    Outcome,
    Scope,
    Variant,
)

SCOPE = Scope("toy/cpu", "cpu-A")
WINDOW = 4
"""Among how many undone fingerprints a racer chooses, for each of the racers."""

_FOUND = Measurement(Outcome.COMPLETED, 1.0, Cost(wall_s=1.0, flops=1e9))
_WHERE = Environment("cpu", "A", 1, "3.11", {"torch": "2"})
_BUDGET = Budget(BudgetKind.STEPS, 1.0)


@dataclass(frozen=True, slots=True)
class Race:
    """Who races for what."""

    address: str
    processes: int
    fingerprints: int
    work_s: float = 0.0
    """How long a racer pretends to work on what it has leased, on average."""
    ttl_s: float = 60.0
    killed: float = 0.0
    """Which part of the racers is killed with SIGKILL, each at a random moment."""
    kill_within_s: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a race. Times in seconds."""

    wall_s: float
    leases: int
    refusals: int
    lease_p50: float
    lease_p99: float
    finish_p50: float
    finish_p99: float
    doubles: int
    """Leases given while another one on the same fingerprint had neither expired nor ended."""
    lost: int
    """Finishes that were acknowledged and are not in the ledger."""
    repeated: int
    """Fingerprints with more than one run."""
    missing: int
    """Fingerprints without a run."""
    killed: int
    orphans: int
    """Leases whose holder was killed."""
    orphans_done_after_s: float
    """How long after its holder's death the last orphaned work was done."""


def race(wanted: Race, timeout_s: float = 600) -> Result:
    """Make a race in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(wanted))],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return Result(**json.loads(done.stdout))


# --- a racer -------------------------------------------------------------------------------------


class Racer:
    """One process. What was acknowledged is on disk before the next step."""

    def __init__(self, wanted: Race, number: int, society: str, done: mmap.mmap, home: Path):
        self.wanted, self.number, self.society, self.done = wanted, number, society, done
        self.name = f"racer-{number}"
        self.home = home
        self.random = random.Random(wanted.seed * 1000 + number)
        self.first = 0
        self.times = {kind: array("d") for kind in ("lease", "refusal", "finish")}

    def run(self, wait: Callable[[], None]) -> None:
        """Race until all is done."""
        with (
            Ledger.open(self.wanted.address) as self.ledger,
            (self.home / f"{self.number}.log").open("ab", buffering=0) as self.log,
        ):
            self.ledger.leases(SCOPE)
            wait()
            time.sleep(self.wanted.work_s * self.random.random())
            while (index := self._choose()) is not None:
                self._attempt(index)
        for kind, times in self.times.items():
            (self.home / f"{self.number}.{kind}").write_bytes(times.tobytes())

    def _choose(self) -> int | None:
        """One of the first fingerprints that are not done; None when all are."""
        self.first = self.done.find(b"\0", self.first, self.wanted.fingerprints)
        if self.first < 0:
            return None
        index = self.first + self.random.randrange(WINDOW * self.wanted.processes)
        return self.first if index >= self.wanted.fingerprints or self.done[index] else index

    def _attempt(self, index: int) -> None:
        begun = time.perf_counter()
        try:
            lease = self.ledger.lease_screening(
                SCOPE, self.society, holder=self.name, variant=variant(index),
                ttl_s=self.wanted.ttl_s,
            )  # fmt: skip
        except AlreadyLeased:
            self.times["refusal"].append(time.perf_counter() - begun)
            time.sleep(self.wanted.work_s * self.random.random() / 4)
            return
        except AlreadyRun:
            self.times["refusal"].append(time.perf_counter() - begun)
            self.done[index] = 1
            return
        self.times["lease"].append(time.perf_counter() - begun)
        time.sleep(self.wanted.work_s * (0.5 + self.random.random()))
        begun = time.perf_counter()
        try:
            run = self.ledger.finish(lease, _FOUND, _WHERE, _BUDGET)
        except LeaseLost:
            return
        self.times["finish"].append(time.perf_counter() - begun)
        self.log.write(f"{run.id}\n".encode())
        self.done[index] = 1


def variant(index: int) -> Variant:
    """What the fingerprint at a place stands for."""
    return Variant(SCOPE.task, {"lr": float(index)})


# --- the race ------------------------------------------------------------------------------------


def _make(wanted: Race, home: Path) -> Result:
    with Ledger.open(wanted.address) as ledger:
        society = ledger.start_society(1, {}).id
    done = mmap.mmap(-1, wanted.fingerprints)
    ready, start = os.pipe(), os.pipe()
    racers = [
        _fork(Racer(wanted, number, society, done, home), ready, start)
        for number in range(wanted.processes)
    ]
    os.close(ready[1])
    os.close(start[0])
    arrived = b""
    while len(arrived) < wanted.processes and (more := os.read(ready[0], 1024)):
        arrived += more
    begun = time.time()
    os.close(start[1])
    deaths = _kill(wanted, racers)
    failed = [number for number, pid in enumerate(racers)
              if os.waitpid(pid, 0)[1] != 0 and number not in deaths]  # fmt: skip
    if failed:
        raise SystemExit(f"racers {failed} have failed")
    return judged(wanted, home, time.time() - begun, deaths)


def _fork(racer: Racer, ready: tuple[int, int], start: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.close(start[1])

        def wait() -> None:
            os.write(ready[1], b".")
            os.read(start[0], 1)

        racer.run(wait)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _kill(wanted: Race, racers: list[int]) -> dict[int, float]:
    """Kill some racers, each at a random moment; number -> when."""
    chance = random.Random(wanted.seed)
    victims = chance.sample(range(len(racers)), round(wanted.killed * len(racers)))
    moments = sorted((chance.uniform(0, wanted.kill_within_s), number) for number in victims)
    begun, deaths = time.time(), {}
    for moment, number in moments:
        time.sleep(max(0.0, begun + moment - time.time()))
        os.kill(racers[number], signal.SIGKILL)
        deaths[number] = time.time()
    return deaths


def judged(wanted: Race, home: Path, wall_s: float, deaths: dict[int, float]) -> Result:
    """Count what the ledger holds against what its callers were told."""
    query = "SELECT subject, state, holder FROM leases"
    with Ledger.open(wanted.address, read_only=True) as ledger:
        runs = ledger.runs(SCOPE)
        with ledger._db.read() as tx:
            given = [tuple(row) for row in tx.exec_driver_sql(query)]
    made = Counter(run.variant.fingerprint for run in runs)
    finished = {run.variant.fingerprint: run.finished_at for run in runs}
    standing = Counter(subject for subject, state, _ in given if state != "expired")
    told = {line for log in home.glob("*.log") for line in log.read_text().split()}
    names = {f"racer-{number}": at for number, at in deaths.items()}
    orphans = [
        (finished.get(subject, float("inf")), names[holder])
        for subject, state, holder in given
        if holder in names and state == "expired"
    ]
    lease, refusal, finish = (_times(home, kind) for kind in ("lease", "refusal", "finish"))
    return Result(
        wall_s=wall_s,
        leases=len(given),
        refusals=len(refusal),
        lease_p50=_quantile(lease, 0.5),
        lease_p99=_quantile(lease, 0.99),
        finish_p50=_quantile(finish, 0.5),
        finish_p99=_quantile(finish, 0.99),
        doubles=sum(count - 1 for count in standing.values()),
        lost=len(told - {run.id for run in runs}),
        repeated=sum(count > 1 for count in made.values()),
        missing=sum(variant(index).fingerprint not in made for index in range(wanted.fingerprints)),
        killed=len(deaths),
        orphans=len(orphans),
        orphans_done_after_s=max((done - died for done, died in orphans), default=0.0),
    )


def _times(home: Path, kind: str) -> list[float]:
    found = array("d")
    for path in home.glob(f"*.{kind}"):
        found.frombytes(path.read_bytes())
    return sorted(found)


def _quantile(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asdict(_make(Race(**json.loads(sys.argv[1])), Path(folder)))))  # noqa: T201
