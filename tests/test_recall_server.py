"""A Chroma server that is killed, wiped, hangs or is none: nothing is lost, recall converges."""

import itertools
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from chroma import ChromaServer

from society.agents import recollection
from society.agents.recollection import Recollection
from society.app import run_society
from society.compare import _Silent
from society.errors import RecallUnavailable
from society.memory import recall as recalls
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import Prose
from society.memory.recall import Recall
from society.records import NewHypothesis, NewInsight, Scope, Variant
from society.settings import Settings

SCOPE = Scope("toy/cpu", "cpu-A")


@pytest.fixture
def server(tmp_path):
    """A server of this test alone, to be harmed."""
    with ChromaServer(tmp_path / "chroma") as server:
        yield server


class Notes:
    """A ledger that is written to."""

    def __init__(self, path):
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.ledger = Ledger.open(path / "ledger.sqlite", secret_seed=5)
        self.society = self.ledger.start_society(1, {}).id
        self._keys = itertools.count()

    def write(self, count):
        """So many insights, and a hypothesis."""
        key = next(self._keys)
        notes = [NewInsight(f"note {key} {n}: depth={n} helps", ()) for n in range(count)]
        idea = NewHypothesis(f"idea {key}", "because", Variant("toy/cpu", {"depth": key}), 1.0)
        self.ledger.commit(SCOPE, self.society, "mia", [*notes, idea], key=f"k{key}")

    def open(self, server):
        return Recall.open(self.path, self.ledger, at=server.url)

    def expected(self):
        return {one.id: one for one in Prose(self.ledger).all()}


@pytest.fixture
def notes(tmp_path):
    notes = Notes(tmp_path / "lab")
    yield notes
    notes.ledger.close()


def test_nobody_answers(notes, server):
    server.kill()
    with pytest.raises(RecallUnavailable, match=rf"{server.url}.*chroma run .*--port") as refusal:
        notes.open(server)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "answer", [b"hello", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", None]
)
def test_something_else_answers(notes, monkeypatch, answer):
    """A web server, something that speaks no HTTP, and something that never answers."""
    monkeypatch.setattr(recalls, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once():
            other, _ = listener.accept()
            with other:
                other.recv(4096)
                if answer is None:
                    time.sleep(1)
                else:
                    other.sendall(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RecallUnavailable, match=url):
            Recall.open(notes.path, notes.ledger, at=url)
        thread.join()


def test_a_server_that_died_is_used_again(notes, server):
    notes.write(3)
    with notes.open(server) as recall:
        recall.sync(notes.ledger)
        server.kill()
        notes.write(3)
        with pytest.raises(RecallUnavailable, match="No Chroma server answers"):
            recall.sync(notes.ledger)
        with pytest.raises(RecallUnavailable, match="No Chroma server answers"):
            recall.search("depth")
        assert recall.behind(notes.ledger) == 4
        server.start()
        assert recall.sync(notes.ledger) == 4
        assert recall.passages() == notes.expected()


def test_a_wiped_server_is_filled_again(notes, server):
    notes.write(3)
    with notes.open(server) as recall:
        recall.sync(notes.ledger)
        server.kill()
        shutil.rmtree(server.data)
        server.start()
        assert recall.search("depth") == ()
        recall.sync(notes.ledger)
        assert recall.passages() == notes.expected()


def test_a_reindex_is_noticed_by_the_others(notes, server):
    notes.write(3)
    with notes.open(server) as one, notes.open(server) as two:
        one.sync(notes.ledger)
        for user in (one, two):
            Recall.rebuild(notes.path, notes.ledger, at=server.url).close()
            assert len(user.search("depth", 2)) == 2
        Recall.rebuild(notes.path, notes.ledger, at=server.url).close()
        notes.write(2)
        assert one.sync(notes.ledger) == 3
        assert two.sync(notes.ledger) == 0
        assert one.passages() == two.passages() == notes.expected()


def test_notebooks_share_a_server_without_mixing(notes, server, tmp_path):
    other = Notes(tmp_path / "other")
    notes.write(3)
    other.write(1)
    with notes.open(server) as mine, other.open(server) as yours:
        mine.sync(notes.ledger)
        yours.sync(other.ledger)
        assert mine.passages() == notes.expected()
        assert yours.passages() == other.expected()
    other.ledger.close()


def test_what_changes_while_it_is_written_is_written_again(notes, server, monkeypatch):
    """Another feeder reads and writes the new wording before this one writes the old one."""
    notes.write(0)
    with notes.open(server) as slow, notes.open(server) as quick:
        write, paused = slow._write, []

        def late(passages):
            if not paused:
                paused.append(True)
                _drop(notes)
                quick.sync(notes.ledger)
            return write(passages)

        monkeypatch.setattr(slow, "_write", late)
        slow.sync(notes.ledger)
        assert paused
        assert slow.passages() == notes.expected()
        assert slow.passages()["hypothesis:h0001"].outcome == "dropped"


def _drop(notes):
    from society.records import HypothesisDropped

    entry = HypothesisDropped("h0001", "nobody wants it")
    notes.ledger.commit(SCOPE, notes.society, "mia", [entry], key="drop")


FEEDER = """
    import sys, time
    from society.errors import RecallUnavailable
    from society.memory.ledger import Ledger
    from society.memory.recall import Recall

    folder, url = sys.argv[1:]
    with Ledger.open(folder) as ledger:
        while ledger.posted_last() > 0 and not sys.stdin.closed:
            try:
                with Recall.open(folder, ledger, at=url) as recall:
                    while True:
                        recall.sync(ledger)
                        time.sleep(0.01)
            except RecallUnavailable:
                time.sleep(0.05)
"""


def test_a_server_that_dies_of_its_index_works_without_it(notes, server):
    notes.write(3)
    _agrees(notes, server)
    server._process.send_signal(signal.SIGSEGV)
    server._process.wait()
    with pytest.raises(RecallUnavailable):
        _agrees(notes, server)
    _mend(server)
    _agrees(notes, server)


def test_a_server_whose_index_was_cut_short_is_filled_by_reindex(notes, server):
    notes.write(1_100)  # from 1,000 on Chroma keeps files of vectors
    _agrees(notes, server)
    server.kill()
    cut = next(server.data.rglob("index_metadata.pickle"))
    cut.write_bytes(cut.read_bytes()[:-100])
    server.start()
    with pytest.raises(RecallUnavailable) as refusal:
        _agrees(notes, server)
    _reindex(notes, server, refusal.value)
    _agrees(notes, server)


def test_the_server_is_killed_in_mid_write(notes, server):
    _killed(notes, server, kills=3)


@pytest.mark.slow
def test_the_server_is_killed_in_mid_write_twenty_times(notes, server):
    _killed(notes, server, kills=20)


def _killed(notes, server, kills):
    """Two feeders, one of them in a process of its own, go on while the server dies at random."""
    generator, written = random.Random(11), 0
    notes.write(1)
    script = textwrap.dedent(FEEDER)
    other = subprocess.Popen([sys.executable, "-c", script, notes.path, server.url],
                             stdin=subprocess.DEVNULL)  # fmt: skip
    stop = threading.Event()
    lost = []
    thread = threading.Thread(target=_feed, args=(notes, server, stop, lost))
    thread.start()
    try:
        for _ in range(kills):
            until = time.monotonic() + generator.uniform(0.2, 1.5)
            while time.monotonic() < until:
                notes.write(20)
                written += 21
            server.kill()
            notes.write(20)
            written += 21
            _restart(server)
    finally:
        stop.set()
        thread.join()
        other.kill()
        other.wait()
    assert len(notes.expected()) == written + 2  # every acknowledged record is in the ledger
    try:
        _agrees(notes, server)
    except RecallUnavailable as error:
        if server.crashed:
            _mend(server)
        else:
            _reindex(notes, server, error)
        _agrees(notes, server)
    assert lost


def _agrees(notes, server):
    with notes.open(server) as recall:
        recall.sync(notes.ledger)
        assert recall.passages() == notes.expected()


def _restart(server):
    try:
        server.start()
    except RuntimeError:
        _mend(server)


def _mend(server):
    """After some kills Chroma 1.5.9 dies of its own index whenever that is read: take it away."""
    assert server.crashed
    server.start_over()


def _reindex(notes, server, error):
    """After other kills a file of its index is cut short: do what the error says."""
    assert "society memory reindex" in str(error)
    Recall.rebuild(notes.path, notes.ledger, at=server.url).close()


def _feed(notes, server, stop, lost):
    while not stop.is_set():
        try:
            with notes.open(server) as recall:
                while not stop.is_set():
                    recall.sync(notes.ledger)
                    time.sleep(0.01)
        except RecallUnavailable as error:
            lost.append(error)
            time.sleep(0.02)


# --- a society whose recall goes down -------------------------------------------------------------


def test_a_society_goes_on_and_catches_up(tmp_path, server, monkeypatch):
    monkeypatch.setattr(recollection, "FIRST_RETRY_S", 0.2)
    monkeypatch.setattr(recollection, "LAST_RETRY_S", 0.4)
    monkeypatch.setattr("society.app.PULSE_S", 0.2)
    folder = NotebookFolder(tmp_path / "lab")
    settings = Settings(task="synthetic", profile="quick", agents=4, runs=2000, slots=2, seed=3,
                        recall=server.url)  # fmt: skip
    harm = _Harm(server)
    ended = run_society(folder, settings, resume=False, display=harm, console=False)
    assert harm.done == ["killed", "started"]
    assert harm.behind > 0
    assert ended.report.runs
    lines = (folder.logs / "society.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert sum("recall is off" in event for event in events) == 1
    assert sum("recall is back" in event for event in events) == 1
    with Ledger.open(folder.ledger) as ledger, Recall.open(folder, ledger, at=server.url) as recall:
        assert recall.behind(ledger) == 0
        assert recall.passages() == {one.id: one for one in Prose(ledger).all()}


class _Harm(_Silent):
    """Kills the server under a working society, starts it again, and stops when it is used."""

    def __init__(self, server):
        self.server, self.done, self.behind = server, [], 0

    def show(self, laboratory):
        behind = laboratory.recall.behind()
        self.behind = max(self.behind, behind or 0)
        if not self.done and behind == 0:
            self.server.kill()
            self.done.append("killed")
        elif self.done == ["killed"] and laboratory.recall.is_down:
            self.server.start()
            self.done.append("started")
        elif self.done == ["killed", "started"] and not laboratory.recall.is_down:
            laboratory.draining = True
            laboratory.floor.poke()


def test_attempts_become_rarer(notes, caplog):
    now, attempts = [0.0], []

    def refuse():
        attempts.append(now[0])
        raise RecallUnavailable("down")

    memory = Recollection(notes.ledger, refuse, clock=lambda: now[0])
    for second in range(300):
        now[0] = float(second)
        assert memory.sync() == 0
        assert memory.search("x", 1) == ()
    assert attempts == [0, 5, 15, 35, 75, 135, 195, 255]
    assert memory.is_down
    assert memory.behind() is None
    memory.last_sync()
    assert attempts[-1] == 299
    memory.close()
