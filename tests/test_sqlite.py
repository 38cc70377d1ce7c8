"""The queue of SQLite's writers, and its log: what stands between a lease and its 50 ms."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from society.errors import NotebookDamaged, NotebookInUse
from society.memory import sqlite
from society.memory.ledger import Ledger
from society.records import NewInsight, Scope

SCOPE = Scope("toy/cpu", "cpu-A")


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.start_society(1, {})
        yield ledger


def post(ledger, key, text="x"):
    return ledger.commit(SCOPE, "s001", "ada", [NewInsight(text, ())], key=key)


HOLDER = """
    import sys
    from society.memory.ledger import Ledger
    ledger = Ledger.open(sys.argv[1])
    with ledger._db.write() as tx:
        tx.exec_driver_sql("INSERT INTO scopes (task, tier) VALUES ('half', 'done')")
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def holder(ledger):
    """A process in the middle of a write."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), ledger.address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_urls(ledger):
    with Ledger.open(f"sqlite:///{ledger.address}") as other:
        assert (other.id, other.address, other.shared) == (ledger.id, ledger.address, False)


def test_waiting_has_an_end(ledger, holder, monkeypatch):
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)
    with pytest.raises(NotebookInUse, match="locked by another process"):
        post(ledger, "late")
    assert ledger.insights() == ()
    monkeypatch.undo()
    holder.communicate(b"\n")
    assert post(ledger, "late")


def test_one_who_waited_too_long_does_not_block_the_next(ledger, holder, monkeypatch):
    """The thread that waits for them gets the lock later, and gives it back."""
    monkeypatch.setattr(sqlite, "BUSY_S", 0.1)
    for _ in range(3):
        with pytest.raises(NotebookInUse):
            post(ledger, "late")
    holder.communicate(b"\n")
    monkeypatch.setattr(sqlite, "BUSY_S", 10.0)
    assert post(ledger, "late")


def test_the_kernel_takes_the_turn_from_one_who_is_killed(ledger, holder):
    done = threading.Thread(target=post, args=(ledger, "next"))
    done.start()
    time.sleep(0.2)
    assert ledger.insights() == ()
    os.kill(holder.pid, signal.SIGKILL)
    done.join(10)
    assert len(ledger.insights()) == 1
    assert ("half", "done") not in [(scope.task, scope.tier) for scope in ledger.scopes()]


def test_writers_without_a_place_in_the_queue_are_waited_for(ledger):
    """SQLite's own lock counts as before, e.g. for somebody's shell."""
    with closing(sqlite3.connect(ledger.address, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        writer = threading.Thread(target=post, args=(ledger, "k"))
        writer.start()
        time.sleep(0.2)
        assert ledger.insights() == ()
        shell.execute("COMMIT")
        writer.join(10)
    assert len(ledger.insights()) == 1


def test_the_log_is_kept_short_while_it_is_written(ledger, monkeypatch):
    monkeypatch.setattr(sqlite, "LOG_BYTES", 200_000)
    log = Path(f"{ledger.address}-wal")
    longest = 0
    for number in range(60):
        post(ledger, f"k{number}", "x" * 20_000)
        longest = max(longest, log.stat().st_size)
    assert 200_000 < longest < 600_000
    assert len(ledger.insights()) == 60


def test_a_fact_is_on_the_disk_when_it_is_acknowledged(ledger, monkeypatch):
    """A lease need not be. What a sync covers is the whole log, so also the leases before it."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    post(ledger, "k")
    assert synced == [Path(f"{ledger.address}-wal").stat().st_ino]
    ledger.set_cursor("recall:x", 1)
    assert len(synced) == 1


def test_a_disk_that_fails_is_no_acknowledgement(ledger, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NotebookDamaged, match="Input/output error"):
        post(ledger, "k")
