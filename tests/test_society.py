"""Whole short societies on the synthetic task: invariants, repeatability, fixed roles, resume."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from society import app
from society.errors import NotebookInUse, UsageError
from society.experiments import load_task, variant
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import (
    Decision,
    NewHypothesis,
    Outcome,
    RunKind,
    SeedList,
    SocietyState,
    Split,
)
from society.settings import Settings


class Silent:
    """A display that remembers the laboratory."""

    def start(self, laboratory):
        self.laboratory = laboratory

    def show(self, laboratory):
        pass

    def stop(self):
        pass


def run(folder, *, resume=False, **settings):
    chosen = Settings(**{"task": "synthetic", "agents": 4, "seed": 1, "slots": 2, **settings})
    return app.run_society(
        NotebookFolder(folder), chosen, resume=resume, display=Silent(), console=False
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    return folder, run(folder, runs=110, seed=4)


@pytest.fixture
def ledger(ended):
    with Ledger.open(ended[0] / "ledger.sqlite") as ledger:
        yield ledger


def test_budget_is_kept_and_the_society_finishes(ended, ledger):
    _, result = ended
    assert result.record.state is SocietyState.FINISHED
    assert 80 < len(ledger.runs()) <= 110
    assert 0 < result.record.busy <= 1
    assert not ledger.leases(ledger.scopes()[0])


def test_something_true_is_accepted_and_confirmed(ledger):
    scope = ledger.scopes()[0]
    confirmed = [c for c in ledger.claims(scope) if c.verdict_is(Decision.CONFIRMED)]
    assert confirmed
    for claim in confirmed:
        assert claim.verdict.effect.low > 0
        assert claim.verdict.effect.seeds >= 8
    assert not ledger.champion(scope).variant.is_baseline


def test_nobody_verifies_their_own_claim(ledger):
    for run in ledger.runs(kinds=[RunKind.VERIFICATION, RunKind.REPRODUCTION]):
        assert run.agent != ledger.claim(run.claim_id).author


def test_evidence_is_on_the_holdout_and_on_verification_seeds_only(ledger):
    scope = ledger.scopes()[0]
    secret = ledger.seeds(SeedList.VERIFICATION, scope, 24)
    for claim in ledger.claims(scope):
        evidence = [ledger.run(id) for id in claim.verdict.runs] if claim.verdict else []
        assert claim.screening_run not in {run.id for run in evidence}
        assert all(run.split is Split.HOLDOUT and run.seed in secret for run in evidence)


def test_verifications_use_the_first_seeds_of_the_list_in_order(ledger):
    scope = ledger.scopes()[0]
    secret = ledger.seeds(SeedList.VERIFICATION, scope, 24)
    for claim in ledger.claims(scope):
        used = list(ledger.pool(scope, claim.variant))
        assert used == list(secret[: len(used)])


def test_an_acceptance_was_reproduced_bit_for_bit(ledger):
    scope = ledger.scopes()[0]
    for claim in ledger.claims(scope):
        if claim.verdict_is(Decision.ACCEPTED, Decision.CONFIRMED):
            repeats = ledger.runs(kinds=[RunKind.REPRODUCTION], variant=claim.variant)
            original = ledger.run(claim.screening_run)
            assert [run.score for run in repeats if run.claim_id == claim.id] == [original.score]


def test_no_experiment_is_made_twice(ledger):
    made = Counter(
        (run.kind, run.variant.fingerprint, run.seed)
        for run in ledger.runs()
        if run.outcome is not Outcome.CRASHED and run.kind is not RunKind.REPRODUCTION
    )
    assert max(made.values()) == 1


def test_failed_runs_are_on_record(tmp_path):
    run(tmp_path, runs=24, seed=9)
    hot = variant(load_task("synthetic", "quick"), {"lr": 1.0, "momentum": 0.99})
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        (scope,), (record,) = ledger.scopes(), ledger.societies()
        idea = NewHypothesis("A rate far too high.", "It must diverge.", hot, 9.0)
        ledger.commit(scope, record.id, "a01", [idea], key="planted")
    run(tmp_path, runs=16, seed=9)
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        failed = [run for run in ledger.runs() if run.outcome is not Outcome.COMPLETED]
    assert hot in [run.variant for run in failed]
    assert all(run.log_tail and run.score is None for run in failed)


def test_every_log_line_names_the_society(ended):
    lines = (ended[0] / "logs" / "society.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    assert {line["society"] for line in parsed} == {"s001"}
    finished = [line for line in parsed if line["event"] == "run finished"]
    assert all(line["agent"] and line["run"] for line in finished)


def test_report_says_what_the_ledger_holds(ended, ledger):
    _, result = ended
    scope = ledger.scopes()[0]
    text = result.markdown.read_text()
    assert result.report.headline.runs == len(ledger.runs(scope))
    for claim in ledger.claims(scope):
        assert claim.id in text
    assert ledger.champion(scope).variant.describe().split(",")[0].split("=")[0] in text


def sequence(folder):
    with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
        return [(r.kind, r.variant.fingerprint, r.seed, r.score, r.agent) for r in ledger.runs()]


def test_one_slot_and_one_seed_give_one_sequence(tmp_path):
    for name in ("one", "two"):
        run(tmp_path / name, runs=60, slots=1, seed=11, agents=6)
    first = sequence(tmp_path / "one")
    assert len(first) >= 50
    assert first == sequence(tmp_path / "two")
    run(tmp_path / "three", runs=30, slots=1, seed=12, agents=6)
    assert sequence(tmp_path / "three")[:30] != first[:30]


def test_fixed_roles_are_kept_to(tmp_path):
    cast = {"experimenter": 2, "verifier": 1, "statistician": 1}
    run(tmp_path, runs=40, roles=cast, agents=4)
    played = {}
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        for activity in ledger.activities():
            played.setdefault(activity.agent, set()).add(activity.role)
    assert all(len(roles) == 1 for roles in played.values())
    assert set().union(*played.values()) == set(cast)


def test_a_cast_without_a_verifier_is_refused(tmp_path):
    with pytest.raises(UsageError, match="verifier"):
        run(tmp_path, runs=10, agents=2, roles={"experimenter": 1, "statistician": 1})
    assert not (tmp_path / "ledger.sqlite").exists()


def test_the_next_society_builds_on_the_notebook(tmp_path):
    run(tmp_path, runs=40)
    run(tmp_path, runs=20, seed=2)
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        scope = ledger.scopes()[0]
        second = ledger.runs(scope, society="s002")
        noise = ledger.noise_history(scope)
    assert len(noise) == 1
    screened = Counter(run.variant.fingerprint for run in second if run.kind is RunKind.SCREENING)
    assert screened
    assert max(screened.values()) == 1


def test_goal_ends_the_society_early(tmp_path):
    result = run(tmp_path, runs=110, seed=4, until=1.79)
    assert result.report.headline.runs < 110
    assert result.report.headline.champion.mean <= 1.79


def test_a_corrupted_index_is_said_once_and_survived(tmp_path, capfd):
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall" / "chroma.sqlite3").write_bytes(b"not a database" * 100)
    result = run(tmp_path, runs=24)
    assert result.record.state is SocietyState.FINISHED
    said = capfd.readouterr().err
    assert said.count("recall is off") == 1
    assert "society memory reindex" in said


def test_a_folder_in_use_is_refused(tmp_path):
    folder = NotebookFolder(tmp_path)
    with folder.lock(), pytest.raises(NotebookInUse, match=str(os.getpid())):
        run(tmp_path, runs=10)


COMMAND = """
import sys
from society import app
from society.memory.folder import NotebookFolder
from society.settings import Settings
from test_society import Silent

folder = NotebookFolder(sys.argv[1])
resume = sys.argv[2] == "resume"
given = Settings(task="synthetic", runs=int(sys.argv[3]), agents=8, slots=2, seed=5)
chosen = app.resume_settings(folder, Settings()) if resume else given
app.run_society(folder, chosen, resume=resume, display=Silent(), console=False)
"""


def start(folder, mode, runs):
    here = os.path.dirname(__file__)
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder), mode, str(runs)],
        env={**os.environ, "PYTHONPATH": here},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def runs_so_far(folder):
    try:
        with Ledger.open(folder / "ledger.sqlite", read_only=True) as ledger:
            return {run.id: run for run in ledger.runs()}
    except UsageError:
        return {}


def wait_for_runs(folder, count, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if len(runs_so_far(folder)) >= count:
            return
        time.sleep(0.05)


@pytest.mark.slow
def test_five_kills_lose_and_repeat_nothing(tmp_path):
    rng, total, seen = random.Random(1), 80, {}
    for attempt in range(5):
        process = start(tmp_path, "resume" if attempt else "new", total)
        wait_for_runs(tmp_path, len(seen) + 8, process)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        now = runs_so_far(tmp_path)
        assert seen.items() <= now.items()
        assert len(now) > len(seen)
        seen = now
    process = start(tmp_path, "resume", total)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        runs = ledger.runs()
        assert seen.items() <= {run.id: run for run in runs}.items()
        made = Counter((r.kind, r.variant.fingerprint, r.seed, r.claim_id) for r in runs)
        assert max(made.values()) == 1
        assert not ledger.leases(ledger.scopes()[0])
        assert ledger.society("s001").state is SocietyState.FINISHED
        assert len(runs) <= total
        text = (tmp_path / "report" / "report.md").read_text()
        assert all(run.id in text for run in runs)


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupt_saves_and_resume_goes_on(tmp_path, signals):
    process = start(tmp_path, "new", 60)
    wait_for_runs(tmp_path, 12, process)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    before = runs_so_far(tmp_path)
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.society("s001").state is SocietyState.STOPPED
    resumed = start(tmp_path, "resume", 60)
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    after = runs_so_far(tmp_path)
    assert before.items() <= after.items()
    assert len(after) > len(before)
