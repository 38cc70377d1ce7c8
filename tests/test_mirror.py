"""What a process keeps of the ledger in memory: the same as plain SQL, and read only once."""

import contextlib
import importlib.util
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from sqlalchemy import event, select

from society.agents import search
from society.experiments import Space, load_task
from society.experiments.gate import worth_filing
from society.experiments.task import Direction
from society.memory import schema
from society.memory.ledger import Ledger
from society.memory.mirror import Board
from society.records import (
    SOCIETY_KINDS,
    Activity,
    Cost,
    Crown,
    Decision,
    Environment,
    HypothesisState,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    Noise,
    Outcome,
    RunKind,
    Scope,
    Variant,
    Verdict,
)
from society.roles import BudgetLeft, Charter, View, load_role, view

ENVIRONMENT = Environment("cpu", "test", 1, "3")
TASK = load_task("synthetic", "quick")
SPACE = Space.of(TASK)
SCOPE = Scope(TASK.key, ENVIRONMENT.tier)
OTHER = Scope("toy/cpu", ENVIRONMENT.tier)
BASE = Variant(TASK.key)
AGENTS = ("a01", "a02", "a03")
SD = 0.01


class Writer:
    """Somebody who writes anything that the rules allow, at random but repeatably."""

    def __init__(self, ledger, society, seed=0):
        self.ledger, self.society = ledger, society
        self.rng = random.Random(seed)
        self.steps = 0

    def commit(self, *entries, agent="a01", scope=SCOPE, activity=None):
        self.steps += 1
        key = f"{self.society}/{self.steps}"
        self.ledger.commit(scope, self.society, agent, entries, key=key, activity=activity)

    def finish(self, lease, score):
        outcome = Outcome.COMPLETED if score is not None else self.rng.choice(list(Outcome)[1:])
        curve = (3.0, 2.0)
        found = Measurement(outcome, score, Cost(wall_s=2.0, flops=3.0), "log", "hash", curve)
        return self.ledger.finish(lease, found, ENVIRONMENT, TASK.budget)

    def variant(self):
        if self.rng.random() < 0.3:
            return SPACE.variant(TASK.key, {"lr": round(self.rng.uniform(0.02, 0.4), 4)})
        changes = {"depth": self.rng.randint(1, 5), "width": self.rng.choice((32, 48, 96))}
        changes["lr"] = round(self.rng.uniform(0.02, 0.4), 4)
        return SPACE.variant(TASK.key, changes)

    def score(self):
        """Few different ones, so that many tie."""
        return None if self.rng.random() < 0.2 else 1.8 + round(self.rng.gauss(0, 0.03), 2)

    def screen(self, variant=None, score=None, scope=SCOPE):
        variant = variant or self.variant()
        if self.ledger.runs(scope, kinds=[RunKind.SCREENING], variant=variant):
            return
        lease = self.ledger.lease_screening(
            scope, self.society, holder=self.rng.choice(AGENTS), variant=variant, ttl_s=60
        )
        self.finish(lease, self.score() if score is None else score)

    def measure(self, variant, kind=RunKind.CALIBRATION, claim=None, agent="a09"):
        lease = self.ledger.lease_next_seed(
            SCOPE, self.society, holder=agent, variant=variant, kind=kind, claim_id=claim, ttl_s=60
        )
        self.finish(lease, self.score())

    def claim(self):
        champion = self.ledger.champion(SCOPE).variant
        filed = {claim.screening_run for claim in self.ledger.claims()}
        runs = [
            run
            for run in self.ledger.runs(SCOPE, kinds=[RunKind.SCREENING])
            if run.score is not None and run.id not in filed and run.variant != champion
        ]
        if runs:
            run = self.rng.choice(runs)
            self.commit(NewClaim(run.id, champion, 0.05, len(filed), 0.05, 0.0))

    def judge(self):
        waiting = self.ledger.claims(SCOPE, open_only=True)
        if not waiting:
            return
        claim = self.rng.choice(waiting)
        self.measure(claim.variant, RunKind.VERIFICATION, claim.id)
        runs = self.ledger.runs(SCOPE, kinds=[RunKind.VERIFICATION], variant=claim.variant)
        cited = tuple(run.id for run in runs if run.claim_id == claim.id)
        champion = self.ledger.champion(SCOPE).variant
        crowns = claim.reference == champion and self.rng.random() < 0.5
        word = Decision.ACCEPTED if crowns else self.rng.choice(
            (Decision.REJECTED, Decision.SUPERSEDED)
        )  # fmt: skip
        entries = [Verdict(claim.id, word, 0.5, None, "because", cited, "a09")]
        entries += [Crown(claim.variant, claim.id, claim.screening_run)] * crowns
        self.commit(*entries)
        if crowns and self.rng.random() < 0.8:
            word = self.rng.choice((Decision.CONFIRMED, Decision.ROLLED_BACK))
            self.commit(Verdict(claim.id, word, 0.5, None, "again", cited, "a09"))

    def suppose(self):
        known = {one.variant.fingerprint for one in self.ledger.hypotheses(SCOPE)}
        variant = self.variant()
        screened = self.ledger.runs(SCOPE, kinds=[RunKind.SCREENING], variant=variant)
        if variant.fingerprint not in known and not screened:
            self.commit(NewHypothesis("it helps", "so it seems", variant, 1.0))

    def digest(self):
        now = self.ledger.now()
        done = Activity("a02", "meta-analyst", "digest", "", now, now)
        self.commit(NewInsight(f"insight {self.steps}", ()), activity=done)

    def write(self, steps):
        """So many steps of any kind."""
        doings = (
            self.screen, self.screen, self.screen, self.claim, self.judge, self.suppose,
            self.digest, lambda: self.measure(BASE),
            lambda: self.screen(Variant("toy/cpu", {"x": self.rng.random()}), scope=OTHER),
        )  # fmt: skip
        for _ in range(steps):
            self.rng.choice(doings)()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path):
    """Where a ledger can be made."""
    if request.param == "sqlite":
        return tmp_path / "ledger.sqlite"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def ledger(place):
    with Ledger.open(place, 7) as ledger:
        yield ledger


@pytest.fixture
def writer(ledger):
    return begun(ledger)


def begun(ledger, seed=0):
    writer = Writer(ledger, ledger.start_society(1, {}).id, seed)
    noise = Noise(SCOPE.task, SCOPE.tier, SD, 0.008, 0.014, 20)
    writer.commit(Crown(BASE, None, None), noise)
    writer.screen(BASE, 1.8)
    return writer


def seen(ledger, left=100, **charter):
    return View(
        ledger, scope=SCOPE, society="s001", task=TASK, space=SPACE, charter=Charter(**charter),
        budget=BudgetLeft(0, left, 200), entropy=1,
    )  # fmt: skip


# ------------------------------------------------------------------ the same as plain SQL


def plain_screenings(ledger):
    """Number, fingerprint and score of the screening runs of the scope, by one statement."""
    runs, scopes = schema.runs, schema.scopes
    query = (
        select(runs.c.number, runs.c.variant, runs.c.score, runs.c.finished_at)
        .join(scopes, scopes.c.number == runs.c.scope)
        .where(scopes.c.task == SCOPE.task, runs.c.kind == "screening")
        .order_by(runs.c.number)
    )
    with ledger._db.read() as tx:
        return tx.execute(query).all()


def check_against_sql(ledger):
    rows = plain_screenings(ledger)
    board = ledger.board(SCOPE)
    runs = board.runs()
    assert [(r.number, r.variant.fingerprint, r.score, r.finished_at) for r in runs] == rows
    assert board.scores() == {mark: score for _, mark, score, _ in rows if score is not None}
    assert all(mark in board for _, mark, _, _ in rows)
    assert BASE.fingerprint in board
    assert "unknown" not in board
    middle = rows[len(rows) // 2]
    assert board.after(middle.number) == sum(row.number > middle.number for row in rows)
    late = sum(row.finished_at > middle.finished_at for row in rows)
    assert board.ended_after(middle.finished_at) == late
    best = [run.score for _, run in board.best(-1)]
    assert best == sorted(score for _, _, score, _ in rows if score is not None)
    assert [run.score for _, run in board.best(1)] == best[::-1]
    alone = [run.score for _, run in board.best(-1, alone=True)]
    assert alone == sorted(
        r.score for r in runs if r.score is not None and len(r.variant.overrides) == 1
    )
    check_claims(ledger)
    check_counts(ledger)


def check_claims(ledger):
    claims = [claim for claim in ledger.claims() if claim.variant.task == SCOPE.task]
    assert list(ledger.claims(SCOPE)) == claims
    waiting = [claim for claim in claims if claim.verdict is None]
    assert list(ledger.claims(SCOPE, open_only=True)) == waiting
    assert list(ledger.open_claims(SCOPE)) == waiting
    closed = sorted(
        (claim for claim in claims if claim.verdict), key=lambda claim: claim.verdict.decided_at
    )
    assert {c.id for c in ledger.closed_claims(SCOPE, last=999)} == {c.id for c in closed}
    assert ledger.closed_claims(SCOPE, last=3) == ledger.closed_claims(SCOPE, last=999)[-3:]
    words = [claim.verdict.decision for claim in closed]
    assert ledger.decisions(SCOPE) == {word: words.count(word) for word in Decision}
    sizes = ledger.pool_sizes(SCOPE)
    for claim in claims:
        assert sizes.get(claim.variant.fingerprint, 0) == len(ledger.pool(SCOPE, claim.variant))
    assert sizes.get(BASE.fingerprint, 0) == len(ledger.pool(SCOPE, BASE))


def check_counts(ledger):
    counts, runs = ledger.counts(SCOPE), ledger.runs(SCOPE)
    assert sum(counts.runs.values()) == len(runs)
    assert counts.runs == {k: sum(r.kind is k for r in runs) for k in RunKind}
    assert counts.outcomes == {o: sum(r.outcome is o for r in runs) for o in Outcome}
    assert counts.claims_open == len(ledger.claims(SCOPE, open_only=True))
    assert counts.champions == len(ledger.champions(SCOPE))
    assert counts.insights == len(ledger.insights(SCOPE))
    states = [one.state for one in ledger.hypotheses(SCOPE)]
    assert counts.hypotheses == {s: states.count(s) for s in HypothesisState}
    assert counts.leases == len(ledger.leases(SCOPE))
    assert counts.wall_s == pytest.approx(sum(run.cost.wall_s for run in runs))
    assert counts.flops == pytest.approx(sum(run.cost.flops for run in runs))
    assert ledger.champion(SCOPE) == ledger.champions(SCOPE)[-1]
    assert ledger.spent("s001").runs == len(ledger.runs(society="s001"))


def test_what_is_kept_is_what_plain_sql_finds(place, ledger, writer):
    with Ledger.open(place) as reader:
        for _ in range(6):
            writer.write(20)
            check_against_sql(ledger)
            check_against_sql(reader)
        with Ledger.open(place, read_only=True) as fresh:
            check_against_sql(fresh)
    assert len(ledger.claims(SCOPE)) > 3
    assert len(ledger.champions(SCOPE)) > 1


def test_the_filters_of_runs_are_those_of_the_whole_list(ledger, writer):
    writer.write(60)
    runs = ledger.runs()
    assert [run.number for run in runs] == sorted(run.number for run in runs)
    assert {run.curve for run in runs} == {(3.0, 2.0)}
    for scope in (None, SCOPE, OTHER, Scope("no", "where")):
        mine = [r for r in runs if scope in (None, Scope(r.variant.task, SCOPE.tier))]
        assert list(ledger.runs(scope)) == mine
        assert list(ledger.runs(scope, last=4)) == mine[-4:]
        assert ledger.runs(scope, last=0) == ()
        for variant in (BASE, runs[5].variant):
            assert list(ledger.runs(scope, variant=variant)) == [
                run for run in mine if run.variant == variant
            ]
        some = [run for run in mine if run.kind is RunKind.SCREENING]
        assert list(ledger.runs(scope, kinds=[RunKind.SCREENING])) == some
        assert list(ledger.runs(scope, kinds=SOCIETY_KINDS, society="s001")) == mine
        assert ledger.runs(scope, society="s999") == ()
        assert ledger.runs(scope, kinds=()) == ()
    for run in runs:
        assert ledger.run(run.id) == run


def test_a_surveyed_run_is_whole_but_for_log_and_curve(ledger, writer):
    run = ledger.board(SCOPE).runs()[0]
    whole = ledger.run(run.id)
    assert (run.log_tail, run.curve) == ("", ())
    assert (whole.log_tail, whole.curve) == ("log", (3.0, 2.0))
    names = set(run.__dataclass_fields__) - {"log_tail", "curve"}
    assert all(getattr(run, name) == getattr(whole, name) for name in names)


def test_the_writes_of_another_process_are_seen(place, ledger, writer):
    before = len(ledger.board(SCOPE))
    program = f"""
        from test_mirror import *
        with Ledger.open({str(place)!r}) as ledger:
            writer = Writer(ledger, "s001", seed=9)
            writer.steps = 1000
            for _ in range(12):
                writer.screen()
            writer.claim()
    """
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=here, check=True, timeout=120
    )
    assert len(ledger.board(SCOPE)) > before
    assert len(ledger.claims(SCOPE)) == 1
    check_against_sql(ledger)


def test_readers_in_threads_see_growing_and_in_the_end_all(ledger, writer):
    done, faults = threading.Event(), []

    def read():
        last = 0
        while not done.is_set():
            board = ledger.board(SCOPE)
            numbers = [run.number for run in board.runs()]
            if len(numbers) < last or numbers != sorted(set(numbers)):
                faults.append(numbers)
            last = len(numbers)
            ledger.claims(SCOPE)
            ledger.pool_sizes(SCOPE)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    writer.write(40)
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    check_against_sql(ledger)


# ------------------------------------------------------------------ the view, as it was computed


def plain_winners(ledger, sign):
    """Winners and single changes as the first version computed them: through all runs."""
    runs, claims = ledger.runs(SCOPE, kinds=[RunKind.SCREENING]), ledger.claims(SCOPE)
    scores = {r.variant.fingerprint: r.score for r in runs if r.score is not None}
    champion = ledger.champion(SCOPE).variant

    def better(reference, found):
        level = scores.get(reference.fingerprint)
        if level is None:
            return []
        deltas = [(run, (run.score - level) * sign) for run in found if run.score is not None]
        worth = [one for one in deltas if worth_filing(one[1], SD)]
        return [run.id for run, _ in sorted(worth, key=lambda one: -one[1])]

    settled = {entry.variant.fingerprint for entry in ledger.champions(SCOPE)}
    for claim in claims:
        if claim.is_open or claim.verdict_is(Decision.REJECTED, Decision.ROLLED_BACK):
            settled.add(claim.variant.fingerprint)
    winners = better(champion, [r for r in runs if r.variant.fingerprint not in settled])
    claimed = {claim.variant.fingerprint for claim in claims}
    alone = [r for r in runs if len(r.variant.overrides) == 1]
    alone = [r for r in alone if r.variant.fingerprint not in claimed]
    return winners, [] if champion.is_baseline else better(BASE, alone)


@pytest.mark.parametrize("seed", range(3))
def test_winners_are_those_of_a_walk_through_all_runs(tmp_path, seed):
    with Ledger.open(tmp_path / "ledger.sqlite", 7) as ledger:
        writer = begun(ledger, seed)
        for _ in range(5):
            writer.write(25)
            now = seen(ledger)
            winners, alone = plain_winners(ledger, now.task.direction.sign)
            assert [one.run.id for one in now.winners] == winners
            assert [one.run.id for one in now.single_changes] == alone
            assert [len(now.pool(claim.variant)) for claim in now.rejected] == [
                len(ledger.pool(SCOPE, claim.variant))
                for claim in ledger.claims()
                if claim.verdict_is(Decision.REJECTED)
                and claim.reference == ledger.champion(SCOPE).variant
            ]
        assert winners


def test_no_more_winners_than_can_be_claimed_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "CANDIDATES", 2)
    with Ledger.open(tmp_path / "ledger.sqlite", 7) as ledger:
        writer = begun(ledger)
        for width, score in ((32, 1.71), (48, 1.70), (96, 1.72)):
            writer.screen(SPACE.variant(TASK.key, {"width": width}), score)
        assert [one.run.score for one in seen(ledger).winners] == [1.70, 1.71]


def test_the_family_of_a_variant_takes_in_later_claims(tmp_path):
    with Ledger.open(tmp_path / "ledger.sqlite", 7) as ledger:
        writer = begun(ledger)
        near = SPACE.variant(TASK.key, {"lr": 0.15})
        assert seen(ledger).family_of(near) == 1
        for family, lr in ((4, 0.9), (7, 0.151)):
            variant = SPACE.variant(TASK.key, {"lr": lr})
            writer.screen(variant, 1.7)
            [run] = ledger.runs(SCOPE, variant=variant)
            writer.commit(NewClaim(run.id, BASE, 0.1, family, 0.05, 0.0))
            assert seen(ledger).family_of(near) == (5 if family == 4 else 7)


def test_a_small_notebook_is_told_whole_and_a_large_one_in_part(tmp_path, monkeypatch):
    with Ledger.open(tmp_path / "ledger.sqlite", 7) as ledger:
        writer = begun(ledger)
        for _ in range(40):
            writer.screen()
        runs = ledger.runs(SCOPE, kinds=[RunKind.SCREENING])
        whole = seen(ledger).knowledge()
        assert [(r.variant, r.score) for r in whole.results] == [(r.variant, r.score) for r in runs]
        assert whole.tried == len(runs)
        monkeypatch.setattr(view, "DIGEST", 5)
        part = seen(ledger).knowledge()
        scored = sorted((r for r in runs if r.score is not None), key=lambda r: (r.score, r.number))
        wanted = {run.number for run in (*scored[:5], *runs[-5:])}
        told = [run.variant for run in runs if run.number in wanted]
        assert [result.variant for result in part.results] == told
        assert part.tried == len(runs)
        assert all(run.variant.fingerprint in part.known for run in runs)
        assert part.entropy == whole.entropy
        mine = seen(ledger).knowledge("a02")
        own = [r for r in runs if r.agent == "a02" or r.variant == BASE]
        assert mine.tried == len(own)
        others = [r for r in runs if r not in own]
        assert not any(run.variant.fingerprint in mine.known for run in others)


def test_the_model_is_told_the_best_and_the_latest(tmp_path, monkeypatch):
    with Ledger.open(tmp_path / "ledger.sqlite", 7) as ledger:
        writer = begun(ledger)
        for _ in range(30):
            writer.screen()
        knowledge = seen(ledger).knowledge()
        assert search.told_to_model(knowledge) == list(knowledge.results)
        monkeypatch.setattr(search, "TOLD", 4)
        told = search.told_to_model(knowledge)
        assert told[-4:] == list(knowledge.results[-4:])
        assert search.best_of(knowledge) in [result.variant for result in told]
        assert len(told) <= 8


def test_a_board_of_a_maximised_metric_is_best_from_the_top():
    board = Board()
    assert list(board.best(Direction.MAXIMISE.sign)) == []
    assert (len(board), board.last, board.digest(1, 5)) == (0, 0, ())
    assert board.score("x") is None
    assert board.run("x") is None


def test_only_the_own_leases_count_against_a_budget(tmp_path):
    with Ledger.open(tmp_path / "ledger.sqlite", 7) as ledger:
        mine, other = begun(ledger), Writer(ledger, ledger.start_society(2, {}).id)
        for society, width in (("s001", 32), ("s002", 48), ("s002", 96)):
            variant = SPACE.variant(TASK.key, {"width": width})
            ledger.lease_screening(SCOPE, society, holder="a01", variant=variant, ttl_s=60)
        mine.screen()
        found = {society: ledger.spent(society) for society in ("s001", "s002", "s003")}
        assert {name: one.under_way for name, one in found.items()} == {
            "s001": 1, "s002": 2, "s003": 0,
        }  # fmt: skip
        assert found["s001"].runs == len(ledger.runs(society="s001"))
        assert found["s001"].wall_s == pytest.approx(2.0 * found["s001"].runs)
        assert (found["s002"].runs, other.society) == (0, "s002")


# ------------------------------------------------------------------ nothing scans


@contextlib.contextmanager
def counted(ledger):
    """What the database does meanwhile: statements, and thousands of steps of its machine."""
    engine, found = ledger._db.backend.engine, {"statements": 0, "steps": 0}

    def tick():
        found["steps"] += 1

    def stated(connection, *_):
        found["statements"] += 1
        connection.connection.dbapi_connection.set_progress_handler(tick, 100)

    event.listen(engine, "before_cursor_execute", stated)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", stated)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same society with 400 and with 2,400 runs: folder by number of runs."""
    path = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_memory", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_memory"] = module
    spec.loader.exec_module(module)
    folders = {}
    for runs in (400, 2400):
        folders[runs] = tmp_path_factory.mktemp("large") / "lab"
        module.prepare(folders[runs], None, runs, 100)
    return module, folders


def test_a_status_looks_at_as_much_of_a_large_ledger_as_of_a_small_one(large):
    _, folders = large
    found = {}
    for runs, folder in folders.items():
        with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
            [scope] = ledger.scopes()
            with counted(ledger) as found[runs]:
                counts = ledger.counts(scope)
                ledger.champion(scope)
                ledger.open_claims(scope)
                ledger.noise(scope)
                ledger.spent("s001")
                ledger.last_begun("s001", "meta-analyst", "digest")
                ledger.runs(scope, kinds=SOCIETY_KINDS, society="s001", last=1)
        assert sum(counts.runs.values()) == runs
    assert found[400]["statements"] == found[2400]["statements"]
    assert found[2400]["steps"] <= 1.3 * found[400]["steps"] + 5


def test_a_survey_reads_what_is_new_and_nothing_else(large):
    module, folders = large
    cast = [load_role(name) for name in ("experimenter", "verifier", "statistician")]
    cast.append(load_role("meta-analyst"))
    found = {}
    for runs, folder in folders.items():
        with Ledger.open(folder / "ledger.sqlite") as ledger:
            lab = module.laboratory(ledger)
            lab.open_duties(cast, "a01")
            module._one_more(lab)
            with counted(ledger) as found[runs]:
                assert lab.open_duties(cast, "a01")
                lab.view().knowledge()
    assert found[400]["statements"] == found[2400]["statements"] < 60
    assert found[2400]["steps"] <= 1.3 * found[400]["steps"] + 5
