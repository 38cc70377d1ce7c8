"""The ledger on both backends: its API, its rules against raw SQL, races and kill -9."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from society.errors import (
    AlreadyLeased,
    AlreadyRun,
    ClaimClosed,
    InvariantViolated,
    LeaseLost,
    NotANotebook,
    NotebookDamaged,
    NotebookInUse,
    NotIndependent,
)
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import (
    Activity,
    Budget,
    BudgetKind,
    Call,
    Cost,
    Crown,
    Decision,
    Effect,
    Environment,
    HypothesisState,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    NewPrior,
    NewRefusal,
    NewStudy,
    Noise,
    Outcome,
    RefusalReason,
    RunKind,
    Scope,
    SeedList,
    SocietyState,
    Split,
    StudyResult,
    Usage,
    Variant,
    Verdict,
)

SCOPE = Scope("toy/cpu", "cpu-A")
ENVIRONMENT = Environment("cpu", "A", 1, "3.11", {"torch": "2"})
BUDGET = Budget(BudgetKind.STEPS, 10)
BASELINE = Variant("toy/cpu")
VARIANT = Variant("toy/cpu", {"lr": 0.04})


def measured(score=1.0, outcome=Outcome.COMPLETED):
    score = score if outcome is Outcome.COMPLETED else None
    return Measurement(outcome, score, Cost(wall_s=2.0, flops=1e9), curve=(3.0, 2.0))


class Lab:
    """A ledger with one society and short ways to fill it."""

    def __init__(self, place):
        self.ledger = Ledger.open(place, secret_seed=7)
        self.society = self.ledger.start_society(1, {"agents": 2}).id
        self._keys = itertools.count()

    def screen(self, variant, agent="ada", score=1.0, outcome=Outcome.COMPLETED):
        lease = self.ledger.lease_screening(
            SCOPE, self.society, holder=agent, variant=variant, ttl_s=60
        )
        return self.finish(lease, score, outcome)

    def next_seed(self, variant, agent="ben", kind=RunKind.CALIBRATION, claim_id=None, ttl_s=60):
        return self.ledger.lease_next_seed(
            SCOPE, self.society, holder=agent, variant=variant, kind=kind, claim_id=claim_id,
            ttl_s=ttl_s,
        )  # fmt: skip

    def verify(self, claim_id, variant=VARIANT, agent="ben"):
        return self.next_seed(variant, agent, RunKind.VERIFICATION, claim_id)

    def study(self, position=0, variant=BASELINE, **places):
        return self.ledger.lease_study(
            SCOPE, self.society, holder="study", variant=variant, position=position, ttl_s=60,
            **places,
        )  # fmt: skip

    def finish(self, lease, score=1.0, outcome=Outcome.COMPLETED):
        return self.ledger.finish(lease, measured(score, outcome), ENVIRONMENT, BUDGET)

    def commit(self, *entries, agent="ada", key=None):
        key = key or f"key-{next(self._keys)}"
        return self.ledger.commit(SCOPE, self.society, agent, entries, key=key, activity=None)

    def claim(self, variant=VARIANT, reference=BASELINE):
        """A claim on a variant (screened if need be) against a reference."""
        known = self.ledger.runs(kinds=[RunKind.SCREENING], variant=variant)
        run = known[0] if known else self.screen(variant)
        self.commit(NewClaim(run.id, reference, 0.01, 1, 0.05, 0.0))
        return self.ledger.claims()[-1]

    def raw(self, sql, *values):
        """Around the Python API."""
        address = self.ledger.address
        if self.ledger.shared:
            with psycopg.connect(address) as connection:
                connection.execute(sql.replace("?", "%s"), values)
            return
        with contextlib.closing(sqlite3.connect(address)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(sql, values)

    @property
    def replacing(self):
        """What makes an INSERT push the row before it out, where there is such a thing."""
        return "" if self.ledger.shared else "OR REPLACE"

    def without(self, rule):
        """Take one of the rules away."""
        if not self.ledger.shared:
            return self.raw(f"DROP TRIGGER {rule}")
        with self.ledger._db.write() as tx:
            self.ledger._db.backend.create_rules(tx, without={rule})
        return None

    def expire(self, lease):
        self.raw("UPDATE leases SET expires_at = 0 WHERE token = ?", lease.token)


REFUSED = (sqlite3.IntegrityError, psycopg.IntegrityError)
"""How a database refuses raw SQL."""


@pytest.fixture(scope="session")
def made_before(postgres_server):
    """A database with an empty ledger, to be copied: quicker than making one each time."""
    name = postgres_server.create()
    Ledger.open(postgres_server.url_of(name), secret_seed=7).close()
    return name


@pytest.fixture(params=["sqlite", "postgres"])
def new_place(request, tmp_path):
    """A function that returns where a new ledger can be opened; `Lab` takes what it returns."""
    if request.param == "sqlite":
        numbers = itertools.count()
        yield lambda: tmp_path / f"ledger{next(numbers)}.sqlite"
        return
    server, template = (request.getfixturevalue(n) for n in ("postgres_server", "made_before"))
    with contextlib.ExitStack() as made:
        yield lambda: made.enter_context(server.database(template))


@pytest.fixture
def lab(new_place):
    lab = Lab(new_place())
    yield lab
    lab.ledger.close()


@pytest.fixture
def file_lab(tmp_path):
    """On SQLite alone."""
    lab = Lab(tmp_path / "ledger.sqlite")
    yield lab
    lab.ledger.close()


def verdict(claim_id, *runs, decision=Decision.ACCEPTED):
    effect = Effect(0.01, 0.009, 0.001, 0.02, 4)
    return Verdict(claim_id, decision, 3.5, effect, "because", tuple(runs), "cyd")


def accepted(lab, variant=VARIANT, reference=BASELINE):
    """A claim that was accepted on four verifications and crowned."""
    if lab.ledger.champion(SCOPE) is None:
        lab.commit(Crown(BASELINE, None, lab.screen(BASELINE).id))
    claim = lab.claim(variant, reference)
    runs = [lab.finish(lab.verify(claim.id, variant)).id for _ in range(4)]
    lab.commit(verdict(claim.id, *runs), Crown(variant, claim.id, claim.screening_run))
    return lab.ledger.claim(claim.id)


# --- societies, seeds, versions ------------------------------------------------------------------


def test_societies_are_recorded(lab):
    record = lab.ledger.society(lab.society)
    assert (record.seed, record.settings, record.state) == (1, {"agents": 2}, SocietyState.RUNNING)
    lab.ledger.set_society_state(lab.society, SocietyState.FINISHED, busy=0.9, wall_s=12.0)
    record = lab.ledger.society(lab.society)
    assert (record.state, record.busy, record.wall_s) == (SocietyState.FINISHED, 0.9, 12.0)
    assert record.ended_at >= record.started_at
    lab.ledger.set_society_state(lab.society, SocietyState.RUNNING)
    assert lab.ledger.society(lab.society).ended_at is None
    assert lab.ledger.start_society(2, {}).id != lab.society
    assert len(lab.ledger.societies()) == 2
    with pytest.raises(InvariantViolated, match="nobody"):
        lab.ledger.society("nobody")


def test_the_clock_is_the_time(lab):
    assert abs(lab.ledger.now() - time.time()) < 1


def test_seeds_are_drawn_once_and_kept(tmp_path):
    drawn = {}
    for name, secret in (("a", 1), ("b", 1), ("c", 2), ("d", None)):
        with Ledger.open(tmp_path / name, secret_seed=secret) as ledger:
            lists = {
                (which, scope): ledger.seeds(which, scope, 60)
                for which in SeedList
                for scope in (SCOPE, Scope("toy/cpu", "cpu-B"))
            }
            assert ledger.seeds(SeedList.AUDIT, SCOPE, 50) == lists[SeedList.AUDIT, SCOPE][:50]
        drawn[name] = lists
        for scope in (SCOPE, Scope("toy/cpu", "cpu-B")):
            seeds = [seed for which in SeedList for seed in lists[which, scope]]
            assert len(set(seeds)) == len(seeds) == 240
            assert all(0 <= seed < 2**31 for seed in seeds)
    assert drawn["a"] == drawn["b"]
    everything = [set(itertools.chain(*lists.values())) for lists in drawn.values()]
    assert len(everything[0] & everything[2]) == len(everything[0] & everything[3]) == 0


def test_the_seeds_survive_reopening_with_another_secret(tmp_path):
    with Ledger.open(tmp_path / "l", secret_seed=1) as ledger:
        first = ledger.seeds(SeedList.VERIFICATION, SCOPE, 3)
    with Ledger.open(tmp_path / "l", secret_seed=2) as ledger:
        assert ledger.seeds(SeedList.VERIFICATION, SCOPE, 5)[:3] == first


def test_the_version_grows_with_each_write(lab):
    versions = [lab.ledger.version()]
    lease = lab.ledger.lease_screening(SCOPE, lab.society, holder="a", variant=VARIANT, ttl_s=60)
    versions.append(lab.ledger.version())
    lab.ledger.heartbeat(lease, 60)
    assert lab.ledger.version() == versions[-1]
    lab.finish(lease)
    versions.append(lab.ledger.version())
    lab.commit(NewInsight("x", ()))
    versions.append(lab.ledger.version())
    assert versions == sorted(set(versions))


# --- leases --------------------------------------------------------------------------------------


def test_a_lease_becomes_a_run(lab):
    lease = lab.ledger.lease_screening(
        SCOPE, lab.society, holder="ada", variant=VARIANT, ttl_s=60, idea="warmer"
    )
    assert lease.seed == lab.ledger.seeds(SeedList.SCREENING, SCOPE, 1)[0]
    assert lease.subject == VARIANT.fingerprint
    assert lab.ledger.leases(SCOPE) == (lease,)
    run = lab.finish(lease, 0.75)
    assert run == lab.ledger.run(lease.run_id) == lab.ledger.runs()[0]
    assert (run.id, run.agent, run.idea, run.number) == ("r00001", "ada", "warmer", 1)
    assert (run.score, run.curve, run.split) == (0.75, (3.0, 2.0), Split.VALIDATION)
    assert (run.variant, run.environment, run.budget) == (VARIANT, ENVIRONMENT, BUDGET)
    assert run.variant.fingerprint == VARIANT.fingerprint
    assert run.started_at <= run.finished_at
    assert lab.ledger.leases(SCOPE) == ()


def test_one_living_lease_per_fingerprint(lab):
    lease = lab.ledger.lease_screening(SCOPE, lab.society, holder="a", variant=VARIANT, ttl_s=60)
    with pytest.raises(AlreadyLeased, match="a holds"):
        lab.ledger.lease_screening(SCOPE, lab.society, holder="b", variant=VARIANT, ttl_s=60)
    lab.ledger.release(lease)
    lab.ledger.release(lease)
    again = lab.ledger.lease_screening(SCOPE, lab.society, holder="b", variant=VARIANT, ttl_s=60)
    assert again.token > lease.token
    assert again.run_id != lease.run_id
    with pytest.raises(LeaseLost):
        lab.finish(lease)
    with pytest.raises(LeaseLost):
        lab.ledger.heartbeat(lease, 60)


def test_a_screened_variant_is_not_leased_again(lab):
    run = lab.screen(VARIANT, outcome=Outcome.DIVERGED)
    with pytest.raises(AlreadyRun) as caught:
        lab.screen(VARIANT)
    assert caught.value.run_id == run.id
    other = Scope("toy/cpu", "cpu-B")
    lab.ledger.lease_screening(other, lab.society, holder="a", variant=VARIANT, ttl_s=60)


def test_an_expired_lease_goes_to_the_next_one_who_asks(lab):
    lease = lab.ledger.lease_screening(SCOPE, lab.society, holder="a", variant=VARIANT, ttl_s=0.05)
    time.sleep(0.1)
    assert lab.ledger.leases(SCOPE) == ()
    taken = lab.ledger.lease_screening(SCOPE, lab.society, holder="b", variant=VARIANT, ttl_s=60)
    with pytest.raises(LeaseLost, match="somebody else took"):
        lab.finish(lease)
    lab.finish(taken)
    with pytest.raises(LeaseLost):
        lab.finish(taken)


def test_an_expired_lease_that_nobody_took_may_be_finished_or_prolonged(lab):
    lease = lab.ledger.lease_screening(SCOPE, lab.society, holder="a", variant=VARIANT, ttl_s=60)
    lab.expire(lease)
    prolonged = lab.ledger.heartbeat(lease, 60)
    assert prolonged.expires_at > lab.ledger.now()
    lab.expire(lease)
    assert lab.finish(prolonged).id == lease.run_id


def test_a_token_that_names_other_work_finishes_nothing(lab):
    lease = lab.next_seed(VARIANT)
    with pytest.raises(LeaseLost):
        lab.finish(dataclasses.replace(lease, subject="other"))
    with pytest.raises(LeaseLost):
        lab.finish(dataclasses.replace(lease, holder="eve"))
    lab.finish(lease)


def test_release_all_ends_the_leases_of_one_society(lab):
    other = lab.ledger.start_society(2, {}).id
    mine = lab.ledger.lease_screening(SCOPE, lab.society, holder="a", variant=VARIANT, ttl_s=60)
    kept = lab.ledger.lease_screening(SCOPE, other, holder="a", variant=BASELINE, ttl_s=60)
    lab.commit(NewHypothesis("s", "r", VARIANT, 1.0))
    lab.commit(NewHypothesis("s", "r", Variant("toy/cpu", {"lr": 0.08}), 1.0))
    lab.ledger.take_hypothesis("h0002", lab.society, "a", 60)
    assert lab.ledger.release_all(lab.society) == 1
    assert lab.ledger.leases(SCOPE) == (kept,)
    reopened = lab.ledger.hypotheses()
    assert {(one.state, one.taken_until) for one in reopened} == {(HypothesisState.OPEN, None)}
    with pytest.raises(LeaseLost):
        lab.finish(mine)


def test_verification_seeds_are_taken_in_order_and_crashes_repeated_once(lab):
    seeds = lab.ledger.seeds(SeedList.VERIFICATION, SCOPE, 5)
    first, second = lab.next_seed(VARIANT), lab.next_seed(VARIANT, "cyd")
    assert (first.seed, second.seed) == seeds[:2]
    lab.finish(first, outcome=Outcome.CRASHED)
    assert lab.ledger.pool(SCOPE, VARIANT) == {}
    repeat = lab.next_seed(VARIANT)
    assert repeat.seed == seeds[0]
    lab.finish(second, 0.5)
    lab.finish(repeat, outcome=Outcome.CRASHED)
    third = lab.next_seed(VARIANT)
    lab.finish(third, outcome=Outcome.DIVERGED)
    assert lab.next_seed(VARIANT).seed == seeds[3]
    pool = lab.ledger.pool(SCOPE, VARIANT)
    assert list(pool.items()) == [(seeds[0], None), (seeds[1], 0.5), (seeds[2], None)]
    assert lab.next_seed(BASELINE).seed == seeds[0]


def test_a_crash_then_a_success_counts_once(lab):
    lab.finish(lab.next_seed(VARIANT), outcome=Outcome.CRASHED)
    lab.finish(lab.next_seed(VARIANT), 0.25)
    assert list(lab.ledger.pool(SCOPE, VARIANT).values()) == [0.25]


def test_an_expired_verification_seed_is_taken_again(lab):
    lease = lab.next_seed(VARIANT)
    lab.expire(lease)
    again = lab.next_seed(VARIANT, "cyd")
    assert again.seed == lease.seed
    with pytest.raises(LeaseLost):
        lab.finish(lease)


def test_audits_have_their_own_seeds(lab):
    audit = lab.ledger.lease_audit(SCOPE, lab.society, holder="a", variant=VARIANT, ttl_s=60)
    assert audit.seed == lab.ledger.seeds(SeedList.AUDIT, SCOPE, 1)[0]
    assert audit.split is Split.HOLDOUT
    lab.finish(audit)
    assert lab.ledger.pool(SCOPE, VARIANT) == {}


# --- studies -------------------------------------------------------------------------------------


def test_a_studys_runs_stand_on_chosen_places_of_its_own_list(lab):
    seeds = lab.ledger.seeds(SeedList.STUDY, SCOPE, 4)
    run = lab.finish(lab.study(3))
    assert (run.kind, run.seed, run.data_seed, run.repeat) == (RunKind.STUDY, seeds[3], None, 0)
    assert run.split is Split.HOLDOUT
    crossed = lab.finish(lab.study(3, data_position=1))
    assert (crossed.seed, crossed.data_seed) == (seeds[3], seeds[1])
    again = lab.finish(lab.study(3, repeat=2))
    assert (again.seed, again.data_seed, again.repeat) == (seeds[3], None, 2)
    assert lab.ledger.run(crossed.id) == crossed
    assert lab.ledger.seeds(SeedList.STUDY, SCOPE, 4) == seeds


def test_a_place_far_down_the_list_leaves_no_gap_before_it(lab):
    lab.study(5)
    first = lab.ledger.seeds(SeedList.STUDY, SCOPE, 2)
    with Ledger.open(lab.ledger.address) as ledger:
        assert ledger.seeds(SeedList.STUDY, SCOPE, 6)[:2] == first


@pytest.mark.parametrize(
    "places", [{}, {"data_position": 1}, {"data_position": 0}, {"repeat": 1}], ids=str
)
def test_a_studys_run_is_made_once_and_a_crash_repeated_once(lab, places):
    lease = lab.study(0, **places)
    with pytest.raises(AlreadyLeased):
        lab.study(0, **places)
    first = lab.finish(lease, outcome=Outcome.CRASHED)
    second = lab.finish(lab.study(0, **places), outcome=Outcome.CRASHED)
    with pytest.raises(AlreadyRun) as refused:
        lab.study(0, **places)
    assert refused.value.run_id == second.id != first.id
    lab.finish(lab.study(1, **places), outcome=Outcome.DIVERGED)
    with pytest.raises(AlreadyRun):
        lab.study(1, **places)


def test_the_same_place_twice_is_the_same_run(lab):
    """A data order from the very seed is no second seed."""
    run = lab.finish(lab.study(2))
    with pytest.raises(AlreadyRun, match=run.id):
        lab.study(2, data_position=2)


@pytest.mark.parametrize("places", [{"position": -1}, {"data_position": -1}, {"repeat": -1}])
def test_places_of_a_study_count_from_zero(lab, places):
    with pytest.raises(InvariantViolated, match="count from 0"):
        lab.study(**places)


def test_a_studys_pool_is_its_own(lab):
    lab.finish(lab.study(1), 1.5)
    lab.finish(lab.study(0), outcome=Outcome.DIVERGED)
    lab.finish(lab.study(0, data_position=1), 9.0)
    lab.finish(lab.study(1, repeat=1), 9.0)
    lab.finish(lab.next_seed(BASELINE), 1.25)
    seeds = lab.ledger.seeds(SeedList.STUDY, SCOPE, 2)
    assert lab.ledger.pool(SCOPE, BASELINE, SeedList.STUDY) == {seeds[0]: None, seeds[1]: 1.5}
    assert list(lab.ledger.pool(SCOPE, BASELINE).values()) == [1.25]


def test_a_studys_run_is_no_evidence_and_is_not_indexed(lab):
    claim = lab.claim()
    before = lab.ledger.posted(0, 100)
    run = lab.finish(lab.study(0, VARIANT), 0.5)
    assert lab.ledger.posted(0, 100) == before
    with pytest.raises(InvariantViolated, match="evidence is holdout runs"):
        lab.commit(verdict(claim.id, run.id))
    with pytest.raises(InvariantViolated, match="champion's screening run"):
        lab.commit(Crown(BASELINE, None, run.id))
    with pytest.raises(InvariantViolated, match="opened from a completed screening run"):
        lab.commit(NewClaim(run.id, BASELINE, 0.01, 1, 0.05, 0.0))


def test_a_study_is_registered_before_its_result(lab):
    run = lab.finish(lab.study(0))
    with pytest.raises(InvariantViolated, match="registered before"):
        lab.commit(StudyResult("st001", {}, ()))
    lab.commit(NewStudy("noise", "how much?", {"seeds": 4}))
    study = lab.ledger.study("st001")
    assert (study.kind, study.title, study.plan) == ("noise", "how much?", {"seeds": 4})
    assert (study.result, study.evidence, study.concluded_at) == (None, (), None)
    assert (study.scope, study.society) == (SCOPE, lab.society)
    with pytest.raises(InvariantViolated, match="cites runs that exist"):
        lab.commit(StudyResult("st001", {"sd": 0.1}, (run.id, "r99999")))
    assert lab.ledger.study("st001").result is None
    lab.commit(StudyResult("st001", {"sd": 0.1}, (run.id, run.id)))
    study = lab.ledger.study("st001")
    assert (study.result, study.evidence) == ({"sd": 0.1}, (run.id,))
    assert study.concluded_at >= study.registered_at
    with pytest.raises(InvariantViolated, match="holds this already"):
        lab.commit(StudyResult("st001", {"sd": 0.2}, ()))


def test_studies_are_listed_by_scope_and_kind(lab):
    lab.commit(NewStudy("noise", "a", {}), NewStudy("replication", "b", {}))
    assert [study.title for study in lab.ledger.studies()] == ["a", "b"]
    assert [study.title for study in lab.ledger.studies(SCOPE, kind="noise")] == ["a"]
    assert lab.ledger.studies(Scope("toy/cpu", "cpu-B")) == ()
    with pytest.raises(InvariantViolated, match="No study"):
        lab.ledger.study("st009")


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()], ids=["nan", "set", "object"])
def test_a_studys_plan_and_result_are_json(lab, value):
    with pytest.raises(InvariantViolated, match="plan of a study is not JSON"):
        lab.commit(NewStudy("noise", "a", {"x": value}))
    lab.commit(NewStudy("noise", "a", {}))
    with pytest.raises(InvariantViolated, match="result of a study is not JSON"):
        lab.commit(StudyResult("st001", {"x": value}, ()))


def test_a_study_is_no_society(lab):
    record = lab.ledger.start_society(0, {"task": "toy", "study": "calibrate"})
    assert record.is_study
    assert not lab.ledger.society(lab.society).is_study


def test_a_reproduction_repeats_the_screening_run_by_somebody_else(lab):
    claim = lab.claim()
    lease = lab.ledger.lease_reproduction(
        SCOPE, lab.society, holder="ben", claim_id=claim.id, ttl_s=60
    )
    screened = lab.ledger.run(claim.screening_run)
    assert (lease.seed, lease.split) == (screened.seed, screened.split)
    with pytest.raises(AlreadyLeased):
        lab.ledger.lease_reproduction(SCOPE, lab.society, holder="cyd", claim_id=claim.id, ttl_s=60)
    lab.finish(lease, outcome=Outcome.CRASHED)
    again = lab.ledger.lease_reproduction(
        SCOPE, lab.society, holder="cyd", claim_id=claim.id, ttl_s=60
    )
    run = lab.finish(again)
    with pytest.raises(AlreadyRun) as caught:
        lab.ledger.lease_reproduction(SCOPE, lab.society, holder="ben", claim_id=claim.id, ttl_s=60)
    assert caught.value.run_id == run.id


def test_authors_do_not_make_their_own_evidence(lab):
    claim = lab.claim()
    with pytest.raises(NotIndependent):
        lab.verify(claim.id, agent="ada")
    with pytest.raises(NotIndependent):
        lab.next_seed(VARIANT, "ada")
    with pytest.raises(NotIndependent):
        lab.ledger.lease_reproduction(SCOPE, lab.society, holder="ada", claim_id=claim.id, ttl_s=60)
    lab.next_seed(BASELINE, "ada")


def test_closed_claims_are_not_verified(lab):
    claim = lab.claim()
    lab.commit(verdict(claim.id, decision=Decision.REJECTED))
    with pytest.raises(ClaimClosed):
        lab.verify(claim.id)


def test_a_verification_is_of_the_claims_variant(lab):
    claim = lab.claim()
    with pytest.raises(InvariantViolated, match="no such claim"):
        lab.verify(claim.id, variant=BASELINE)
    with pytest.raises(InvariantViolated, match="claim"):
        lab.next_seed(VARIANT, kind=RunKind.VERIFICATION)
    with pytest.raises(InvariantViolated, match="audit"):
        lab.next_seed(VARIANT, kind=RunKind.AUDIT)


# --- commits -------------------------------------------------------------------------------------


def test_a_commit_is_one_transaction_and_happens_once(lab):
    run = lab.screen(BASELINE)
    good, bad = NewInsight("text", (run.id,)), NewClaim("r99999", BASELINE, 0.1, 1, 0.05, 0.0)
    with pytest.raises(InvariantViolated, match="r99999"):
        lab.commit(good, bad, key="k")
    assert lab.ledger.insights() == ()
    activity = Activity("ada", "meta", "digest", "all", 1.0, 2.0, "done")
    for expected in (True, False):
        done = lab.ledger.commit(SCOPE, lab.society, "ada", [good], key="k", activity=activity)
        assert done is expected
    assert [insight.evidence for insight in lab.ledger.insights(SCOPE)] == [(run.id,)]
    assert lab.ledger.activities(lab.society) == (activity,)
    assert lab.ledger.activities("s999") == ()


def test_a_claim_takes_author_and_variant_from_its_run(lab):
    claim = lab.claim()
    assert (claim.author, claim.variant, claim.reference) == ("ada", VARIANT, BASELINE)
    assert claim.is_open
    assert lab.ledger.claims(SCOPE, open_only=True) == (claim,)
    with pytest.raises(InvariantViolated, match="claims"):
        lab.commit(NewClaim(claim.screening_run, BASELINE, 0.01, 1, 0.05, 0.0))
    other = Variant("toy/cpu", {"lr": 0.05})
    lab.commit(NewClaim(claim.screening_run, other, 0.01, 1, 0.05, 0.0))


def test_a_claim_is_accepted_crowned_and_rolled_back(lab):
    claim = accepted(lab)
    assert claim.verdict.decision is Decision.ACCEPTED
    assert claim.verdict.effect.low == 0.001
    assert len(claim.verdict.runs) == 4
    champion = lab.ledger.champion(SCOPE)
    assert (champion.number, champion.variant, champion.claim_id) == (1, VARIANT, claim.id)
    more = lab.finish(lab.next_seed(VARIANT)).id
    lab.commit(
        verdict(claim.id, *claim.verdict.runs, more, decision=Decision.ROLLED_BACK),
        Crown(BASELINE, None, "r00001", reverts=True),
    )
    assert lab.ledger.claim(claim.id).verdict.decision is Decision.ROLLED_BACK
    history = lab.ledger.champions(SCOPE)
    assert [one.variant for one in history] == [BASELINE, VARIANT, BASELINE]
    assert history[-1].reverts
    counts = lab.ledger.counts(SCOPE)
    assert counts.runs[RunKind.VERIFICATION] == 4
    assert counts.verdicts[Decision.ROLLED_BACK] == 1
    assert (counts.champions, counts.claims_open, counts.wall_s) == (3, 0, 14.0)


def test_hypotheses_live_and_are_tested_once(lab):
    lab.commit(NewHypothesis("warmer is better", "theory", VARIANT, 2.0))
    assert lab.ledger.hypotheses(SCOPE, state=HypothesisState.OPEN)[0].variant == VARIANT
    lab.ledger.take_hypothesis("h0001", lab.society, "ada", 60)
    with pytest.raises(AlreadyLeased, match="ada tests"):
        lab.ledger.take_hypothesis("h0001", lab.society, "ben", 60)
    assert lab.ledger.hypotheses(SCOPE, state=HypothesisState.OPEN) == ()
    run = lab.screen(VARIANT)
    tested = lab.ledger.hypotheses()[0]
    assert (tested.state, tested.run_id) == (HypothesisState.TESTED, run.id)


def test_the_latest_noise_counts(lab):
    assert lab.ledger.noise(SCOPE) is None
    for sd in (0.02, 0.01):
        lab.commit(Noise(SCOPE.task, SCOPE.tier, sd, sd / 2, sd * 2, 20))
    assert lab.ledger.noise(SCOPE).sd == 0.01
    assert len(lab.ledger.noise_history()) == 2


def test_reading_filters(lab):
    claim = accepted(lab)
    kinds = [run.kind for run in lab.ledger.runs(SCOPE, split=Split.HOLDOUT)]
    assert kinds == [RunKind.VERIFICATION] * 4
    assert len(lab.ledger.runs(variant=VARIANT)) == 5
    assert len(lab.ledger.runs(Scope("other", "x"))) == 0
    assert len(lab.ledger.runs(society="s999")) == 0
    assert {run.claim_id for run in lab.ledger.runs(kinds={RunKind.VERIFICATION})} == {claim.id}
    assert lab.ledger.scopes() == (SCOPE,)


def test_half_characters_are_written_as_question_marks(lab):
    lease = lab.ledger.lease_screening(
        SCOPE, lab.society, holder="ada", variant=VARIANT, ttl_s=60, idea="an \ud83d idea"
    )
    torn = dataclasses.replace(measured(), log_tail="torn \udcff tail, whole \U0001f600")
    run = lab.ledger.finish(lease, torn, ENVIRONMENT, BUDGET)
    assert (run.idea, run.log_tail) == ("an ? idea", "torn ? tail, whole \U0001f600")
    claim = lab.claim()
    closing = dataclasses.replace(verdict(claim.id, decision=Decision.REJECTED), reason="\ud800")
    insight = NewInsight("\ud800!", (run.id,))
    untried = Variant("toy/cpu", {"lr": 7.0})
    hypothesis = NewHypothesis("\udfff?", "\0.", untried, 1.0)
    done = Activity("cyd", "statistician", "judge", "c", 1.0, 2.0, "\udc00")
    entries = [closing, insight, hypothesis]
    lab.ledger.commit(SCOPE, lab.society, "cyd", entries, key="torn", activity=done)
    assert lab.ledger.claim(claim.id).verdict.reason == "?"
    assert lab.ledger.insights()[0].text == "?!"
    (idea,) = lab.ledger.hypotheses()
    assert (idea.statement, idea.rationale, idea.variant) == ("??", "?.", untried)
    assert lab.ledger.activities()[0].note == "?"


# --- the same rules, around the Python API -------------------------------------------------------

REWRITES = {
    "runs": "score = 0.0",
    "claims": "alpha = 0.9",
    "verdicts": "decision = 'rejected'",
    "verdict_runs": "place = 9",
    "champions": "reverts = 1",
    "seeds": "seed = 1",
    "variants": "overrides = '{}'",
    "insights": "text = 'other'",
    "studies": "plan = '{}'",
    "study_results": "result = '{}'",
    "study_runs": "place = 9",
    "noise": "sd = 0.0",
    "activities": "note = 'other'",
    "commits": "agent = 'other'",
    "scopes": "tier = 'other'",
    "outbox": "ref = 'other'",
    "refusals": "note = 'other'",
    "priors": "score = 0.0",
    "sources": "content = 'other'",
}


@pytest.fixture
def full(lab):
    accepted(lab)
    lab.commit(NewRefusal(VARIANT, RefusalReason.DUPLICATE, "r00001"))
    lab.commit(NewPrior("results.tsv", "abc", 1.0, "keep", "baseline"))
    lab.ledger.keep_source("d1", "print()")
    lab.commit(NewInsight("x", ()), Noise(SCOPE.task, SCOPE.tier, 0.1, 0.1, 0.1, 3))
    activity = Activity("a", "r", "d", "s", 1.0, 2.0)
    lab.ledger.commit(SCOPE, lab.society, "a", [], key="with-activity", activity=activity)
    lab.commit(NewStudy("noise", "how much", {}))
    lab.commit(StudyResult("st001", {}, ("r00001",)))
    return lab


@pytest.mark.parametrize("table", sorted(REWRITES))
def test_facts_are_not_changed_deleted_or_replaced(full, table):
    with pytest.raises(REFUSED, match="nothing in"):
        full.raw(f"UPDATE {table} SET {REWRITES[table]}")
    with pytest.raises(REFUSED, match="nothing is deleted"):
        full.raw(f"DELETE FROM {table}")
    with pytest.raises(REFUSED, match="holds this already"):
        full.raw(f"INSERT {full.replacing} INTO {table} SELECT * FROM {table}")


LEASE = (
    "INSERT {how} INTO leases SELECT token + 100, 'x' || token, scope, society, {holder}, subject,"
    " kind, variant, list, position, {seed}, split, attempt, claim_id, idea, 'living', created_at,"
    " expires_at, NULL, data_seed, repeat FROM leases WHERE run_id = ?"
)


@pytest.mark.parametrize("how", ["", "OR REPLACE", "OR IGNORE"])
def test_raw_second_living_lease(lab, how):
    how = how if not lab.ledger.shared else ""
    lease = lab.next_seed(VARIANT)
    with pytest.raises(REFUSED, match="AlreadyLeased"):
        lab.raw(LEASE.format(how=how, holder="'eve'", seed="seed"), lease.run_id)


def test_raw_second_living_lease_without_the_trigger(lab):
    """The partial unique index refuses as well."""
    lease = lab.next_seed(VARIANT)
    lab.without("leases_one_living")
    with pytest.raises(REFUSED, match=r"(?i)unique"):
        lab.raw(LEASE.format(how="", holder="'eve'", seed="seed"), lease.run_id)


def test_raw_lease_by_the_author(lab):
    run = lab.finish(lab.verify(lab.claim().id))
    with pytest.raises(REFUSED, match="NotIndependent"):
        lab.raw(LEASE.format(how="", holder="'ada'", seed="seed"), run.id)


def test_raw_lease_on_a_chosen_seed(lab):
    run = lab.finish(lab.next_seed(VARIANT))
    with pytest.raises(REFUSED, match=r"(?i)foreign key"):
        lab.raw(LEASE.format(how="", holder="'ben'", seed="4711"), run.id)


@pytest.mark.parametrize(
    "change",
    ["holder = 'eve'", "seed = 1", "token = token + 1", "claim_id = 'c0001'", "run_id = 'r9'"],
)
def test_raw_change_of_a_lease(lab, change):
    lab.claim()
    lab.next_seed(BASELINE)
    with pytest.raises(REFUSED, match=r"what is leased|has ended"):
        lab.raw(f"UPDATE leases SET {change}")


def test_raw_revival_of_an_ended_lease(lab):
    lab.finish(lab.next_seed(VARIANT))
    with pytest.raises(REFUSED, match="has ended"):
        lab.raw("UPDATE leases SET state = 'living'")


RUN = (
    "INSERT {how} INTO runs SELECT NULL, run_id, {token}, scope, society, {agent}, kind, variant,"
    " seed, split, attempt, claim_id, 'steps', 1.0, 'completed', 0.0, '{{}}', '{{}}', '', '',"
    " '[]', '', created_at, created_at, data_seed, repeat FROM leases WHERE run_id = ?"
)


def test_raw_run_with_the_current_token(lab):
    lease = lab.next_seed(VARIANT)
    lab.raw(RUN.format(how="", token="token", agent="holder"), lease.run_id)
    with pytest.raises(LeaseLost):
        lab.finish(lease)


@pytest.mark.parametrize("how", ["", "OR REPLACE", "OR IGNORE"])
def test_raw_run_with_a_stale_token(lab, how):
    how = how if not lab.ledger.shared else ""
    lease = lab.next_seed(VARIANT)
    lab.expire(lease)
    lab.next_seed(VARIANT, "cyd")
    with pytest.raises(REFUSED, match="LeaseLost"):
        lab.raw(RUN.format(how=how, token="token", agent="holder"), lease.run_id)
    with pytest.raises(REFUSED, match="LeaseLost"):
        lab.raw(RUN.format(how=how, token="token + 1", agent="holder"), lease.run_id)


def test_raw_run_by_somebody_else(lab):
    lease = lab.verify(lab.claim().id)
    with pytest.raises(REFUSED, match=r"what its lease says|NotIndependent"):
        lab.raw(RUN.format(how="", token="token", agent="'ada'"), lease.run_id)


STUDY_LEASE = (
    "INSERT INTO leases SELECT token + 100, 'x' || token, scope, society, holder, 'other', {kind},"
    " variant, {list}, position, seed, {split}, attempt, {claim}, idea, 'living', created_at,"
    " expires_at, NULL, {data}, {repeat} FROM leases WHERE run_id = ?"
)
AS_IT_IS = {
    "kind": "kind", "list": "list", "split": "split", "claim": "claim_id", "data": "data_seed",
    "repeat": "repeat",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"split": "'validation'"}, "(?i)check"),
        ({"kind": "'calibration'"}, "(?i)check"),
        ({"repeat": "-1"}, "(?i)check"),
        ({"claim": "'c0001'"}, "(?i)check"),
        ({"data": "4711"}, "a data seed is another seed of the same list"),
        ({"data": "seed"}, "a data seed is another seed of the same list"),
        ({"data": "(SELECT seed FROM seeds WHERE list = 'verification')"}, "same list"),
    ],
    ids=str,
)
def test_raw_study_leases(lab, change, why):
    lab.claim()
    lab.next_seed(VARIANT)
    lease = lab.study(0)
    with pytest.raises(REFUSED, match=why):
        lab.raw(STUDY_LEASE.format(**AS_IT_IS | change), lease.run_id)


@pytest.mark.parametrize("change", ["NULL, 1", "1, 0", "seed, 0"])
def test_raw_study_columns_are_for_studies(lab, change):
    lease = lab.next_seed(VARIANT)
    data, repeat = change.split(", ")
    lab.without("leases_data_seed_of_the_list")
    with pytest.raises(REFUSED, match=r"(?i)check|foreign"):
        lab.raw(STUDY_LEASE.format(**AS_IT_IS | {"data": data, "repeat": repeat}), lease.run_id)


@pytest.mark.parametrize("change", ["NULL, repeat", "data_seed, 7"])
def test_raw_run_of_another_data_seed_or_repetition(lab, change):
    lease = lab.study(0, data_position=1)
    sql = RUN.replace("data_seed, repeat", change).format(how="", token="token", agent="holder")
    with pytest.raises(REFUSED, match="a run is what its lease says"):
        lab.raw(sql, lease.run_id)


@pytest.mark.parametrize("places", [{}, {"data_position": 1}])
def test_raw_second_result_of_a_study(lab, places):
    """The partial unique index refuses without the Python API's look before."""
    lab.finish(lab.study(0, **places))
    lab.raw(STUDY_LEASE.format(**AS_IT_IS), "r00001")
    sql = RUN.format(how="", token="token", agent="holder")
    with pytest.raises(REFUSED, match="holds this already"):
        lab.raw(sql, "x1")


def test_raw_study_results(lab):
    lab.commit(NewStudy("noise", "a", {}))
    with pytest.raises(REFUSED, match="only a result has evidence"):
        lab.raw("INSERT INTO study_runs VALUES ('st001', 'r00001', 0)")
    with pytest.raises(REFUSED, match="registered before"):
        lab.raw("INSERT INTO study_results VALUES ('st002', 's001', '{}', 0.0)")


VERDICT = (
    "INSERT INTO verdicts (claim_id, society, decision, log_e, reason, judge, decided_at)"
    " VALUES (?, 's001', ?, 9.9, '', 'eve', 0.0)"
)


def test_raw_second_verdict(lab):
    claim = accepted(lab)
    for decision in ("accepted", "rejected", "superseded"):
        with pytest.raises(REFUSED, match="already"):
            lab.raw(VERDICT, claim.id, decision)
    lab.raw(VERDICT, claim.id, "confirmed")
    with pytest.raises(REFUSED, match="already"):
        lab.raw(VERDICT, claim.id, "rolled_back")


def test_raw_roll_back_of_an_open_claim(lab):
    with pytest.raises(REFUSED, match="only an accepted"):
        lab.raw(VERDICT, lab.claim().id, "rolled_back")
    with pytest.raises(REFUSED, match=r"(?i)foreign key"):
        lab.raw(VERDICT, "c9999", "rejected")


def test_raw_evidence_that_is_none(lab):
    claim = lab.claim()
    unrelated = lab.finish(lab.next_seed(Variant("toy/cpu", {"lr": 9.0})))
    lab.raw(VERDICT, claim.id, "rejected")
    cite = "INSERT INTO verdict_runs VALUES (1, ?, 0)"
    with pytest.raises(REFUSED, match="screening run is never"):
        lab.raw(cite, claim.screening_run)
    with pytest.raises(REFUSED, match="runs that exist"):
        lab.raw(cite, "r99999")
    with pytest.raises(REFUSED, match="variant or reference"):
        lab.raw(cite, unrelated.id)


def test_raw_evidence_by_the_author(lab):
    claim = lab.claim()
    lab.without("leases_not_by_author_of_open_claim")
    own = lab.finish(lab.next_seed(VARIANT, "ada"))
    lab.raw(VERDICT, claim.id, "rejected")
    with pytest.raises(REFUSED, match="NotIndependent"):
        lab.raw("INSERT INTO verdict_runs VALUES (1, ?, 0)", own.id)


def test_evidence_from_before_the_claim_counts_whoever_made_it(lab):
    lab.screen(VARIANT)
    early = lab.finish(lab.next_seed(VARIANT, "ada"))
    time.sleep(0.01)
    claim = lab.claim()
    lab.commit(verdict(claim.id, early.id, decision=Decision.REJECTED))


CROWN = "INSERT INTO champions VALUES (1, ?, ?, ?, NULL, 0, 's001', 0.0)"


def test_raw_crowns(lab):
    accepted(lab)
    other = lab.claim(Variant("toy/cpu", {"lr": 5.0}), VARIANT)
    fingerprint = other.variant.fingerprint
    with pytest.raises(REFUSED, match="no gaps"):
        lab.raw(CROWN, 7, fingerprint, other.id)
    with pytest.raises(REFUSED, match="needs an accepted claim"):
        lab.raw(CROWN, 2, fingerprint, other.id)
    with pytest.raises(REFUSED, match="needs a claim"):
        lab.raw(CROWN, 2, fingerprint, None)
    with pytest.raises(REFUSED, match="already"):
        lab.raw(CROWN, 2, VARIANT.fingerprint, "c0001")


def test_a_claim_against_a_former_champion_crowns_nobody(lab):
    lab.commit(Crown(BASELINE, None, lab.screen(BASELINE).id))
    late = lab.claim(Variant("toy/cpu", {"lr": 5.0}), BASELINE)
    runs = [lab.finish(lab.verify(late.id, late.variant)).id for _ in range(4)]
    accepted(lab)
    with pytest.raises(InvariantViolated, match="earlier champion"):
        lab.commit(verdict(late.id, *runs), Crown(late.variant, late.id, late.screening_run))
    assert lab.ledger.claim(late.id).is_open


def test_raw_claims(lab):
    run = lab.screen(VARIANT)
    crashed = lab.screen(Variant("toy/cpu", {"lr": 6.0}), outcome=Outcome.CRASHED)
    lab.screen(BASELINE)
    insert = (
        "INSERT INTO claims SELECT NULL, 'cx', scope, society, {author}, variant, ?, id, 0.1, 1,"
        " 0.05, 0.0, 0.0 FROM runs WHERE id = ?"
    )
    with pytest.raises(REFUSED, match="of its author"):
        lab.raw(insert.format(author="'eve'"), BASELINE.fingerprint, run.id)
    with pytest.raises(REFUSED, match="completed screening run"):
        lab.raw(insert.format(author="agent"), BASELINE.fingerprint, crashed.id)
    with pytest.raises(REFUSED, match="something_is_claimed"):
        lab.raw(insert.format(author="agent"), VARIANT.fingerprint, run.id)


HOLDER = "UPDATE hypotheses SET state = 'taken', taken_by = ?, taken_until = ?"


def test_raw_hypotheses(lab):
    run = lab.screen(VARIANT)
    lab.commit(NewHypothesis("s", "r", BASELINE, 1.0))
    for change in ("statement = 'other'", "priority = 9.0", "author = 'eve'", "id = 'h9'"):
        with pytest.raises(REFUSED, match="what a hypothesis says never changes"):
            lab.raw(f"UPDATE hypotheses SET {change}")
    with pytest.raises(REFUSED, match="a screening run of its variant"):
        lab.raw("UPDATE hypotheses SET state = 'tested', run_id = ?", run.id)
    with pytest.raises(REFUSED, match="tested_by_a_run"):
        lab.raw("UPDATE hypotheses SET state = 'tested'")
    lab.raw(HOLDER, "ada", lab.ledger.now() + 60)
    lab.raw(HOLDER, "ada", lab.ledger.now() + 60)
    with pytest.raises(REFUSED, match="AlreadyLeased"):
        lab.raw(HOLDER, "eve", lab.ledger.now() + 60)
    lab.raw(HOLDER, "ada", lab.ledger.now() - 1)
    lab.raw(HOLDER, "ben", lab.ledger.now() + 60)
    with pytest.raises(REFUSED, match="nothing is deleted"):
        lab.raw("DELETE FROM hypotheses")


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.DIVERGED])
@pytest.mark.parametrize("taken", [False, True])
def test_a_screening_run_closes_the_hypothesis_on_its_variant(lab, outcome, taken):
    lab.commit(NewHypothesis("s", "r", VARIANT, 1.0), NewHypothesis("s", "r", BASELINE, 1.0))
    if taken:
        lab.ledger.take_hypothesis("h0001", lab.society, "ada", 60)
    lab.finish(lab.next_seed(VARIANT))
    assert lab.ledger.hypothesis("h0001").run_id is None
    run = lab.screen(VARIANT, "ben", outcome=outcome)
    closed = lab.ledger.hypothesis("h0001")
    assert (closed.state, closed.run_id) == (HypothesisState.TESTED, run.id)
    assert lab.ledger.hypothesis("h0002").state is HypothesisState.OPEN
    for change in ("state = 'open'", "state = 'dropped', dropped_because = 'x'", "taken_by = 'x'"):
        with pytest.raises(REFUSED, match="the hypothesis is closed"):
            lab.raw(f"UPDATE hypotheses SET {change} WHERE id = 'h0001'")


def test_raw_refusals(lab):
    run = lab.screen(VARIANT)
    other = Scope("toy/cpu", "cpu-B")
    lab.ledger.seeds(SeedList.SCREENING, other, 1)
    refusal = (
        "INSERT INTO refusals SELECT NULL, {}, society, agent, variant, 'duplicate', {}, '', 0"
    )
    with pytest.raises(REFUSED, match="names a run of its scope"):
        lab.raw(refusal.format(2, "id") + " FROM runs")
    with pytest.raises(REFUSED, match="names a run of its scope"):
        lab.raw(refusal.format(1, "'r99999'") + " FROM runs")
    lab.raw(refusal.format(1, "id") + " FROM runs")
    assert [one.run_id for one in lab.ledger.refusals()] == [run.id]


def test_tallies_count_the_runs(lab):
    lab.screen(VARIANT)
    lab.screen(BASELINE)
    lab.screen(Variant("toy/cpu", {"lr": 6.0}), outcome=Outcome.CRASHED)
    with lab.ledger._db.read() as tx:
        query = "SELECT kind, outcome, runs, wall_s, flops FROM tallies ORDER BY outcome"
        found = [tuple(row) for row in tx.exec_driver_sql(query)]
    assert found == [("screening", "completed", 2, 4.0, 2e9), ("screening", "crashed", 1, 2.0, 1e9)]


@pytest.mark.parametrize("change", ["runs = 7", "kind = 'audit'", "runs = runs + 1, scope = 2"])
def test_raw_tallies(lab, change):
    lab.screen(VARIANT)
    with pytest.raises(REFUSED, match="one run after the other"):
        lab.raw(f"UPDATE tallies SET {change}")
    with pytest.raises(REFUSED, match="one run after the other"):
        lab.raw("INSERT INTO tallies SELECT scope, society, 'audit', outcome, 2, 0, 0 FROM tallies")
    with pytest.raises(REFUSED, match="nothing is deleted"):
        lab.raw("DELETE FROM tallies")


def test_rules_are_dropped_and_created_again(full):
    """What a migration or an import does in its transaction."""
    with full.ledger._db.write() as tx:
        full.ledger._db.backend.drop_rules(tx)
        tx.exec_driver_sql("UPDATE insights SET text = 'other'")
        full.ledger._db.backend.create_rules(tx)
    with pytest.raises(REFUSED, match="nothing in insights"):
        full.raw("UPDATE insights SET text = 'third'")
    full.screen(Variant("toy/cpu", {"lr": 6.0}))


def test_numbers_have_no_gaps(lab):
    """Also after writes that were undone: readers go by them."""
    for name in "abc":
        with contextlib.suppress(RuntimeError), lab.ledger._db.write() as tx:
            tx.exec_driver_sql(f"INSERT INTO scopes (task, tier) VALUES ('{name}', 'x')")
            tx.exec_driver_sql(f"INSERT INTO outbox (kind, ref) VALUES ('claim', '{name}')")
            if name == "b":
                raise RuntimeError
    with lab.ledger._db.read() as tx:
        for query in ("SELECT number FROM scopes", "SELECT seq FROM outbox"):
            assert sorted(tx.exec_driver_sql(query).scalars()) == [1, 2]


def test_a_score_needs_a_completed_run(lab):
    lease = lab.next_seed(VARIANT)
    with pytest.raises(InvariantViolated, match="score_if_completed"):
        lab.finish(lease, float("nan"))
    assert lab.ledger.leases(SCOPE) == (lease,)


def test_queries_use_indexes(lab):
    """No table that grows with the number of runs is scanned to lease or to judge."""
    accepted(lab)
    queries = (
        "SELECT 1 FROM leases WHERE scope = 1 AND subject = 'x' AND state = 'living'",
        "SELECT id FROM runs WHERE scope = 1 AND variant = 'x' AND kind = 'screening' AND seed = 1",
        "SELECT max(token) FROM leases",
        "SELECT * FROM runs WHERE number > 10 ORDER BY number",
        "SELECT id FROM runs WHERE claim_id = 'c' AND kind = 'reproduction'",
        "SELECT 1 FROM claims WHERE scope = 1 AND variant = 'x' AND author = 'y'",
    )
    if lab.ledger.shared:
        with psycopg.connect(lab.ledger.address) as raw:
            raw.execute("SET enable_seqscan = off")
            seen = [row[0] for sql in queries for row in raw.execute(f"EXPLAIN {sql}")]
        assert not [step for step in seen if "Seq Scan" in step], seen
        return
    with contextlib.closing(sqlite3.connect(lab.ledger.path)) as raw:
        seen = [row[3] for sql in queries for row in raw.execute(f"EXPLAIN QUERY PLAN {sql}")]
    assert all(step.startswith("SEARCH") for step in seen), seen


# --- opening -------------------------------------------------------------------------------------


def test_reading_beside_a_writer(lab):
    lab.screen(VARIANT)
    with Ledger.open(lab.ledger.address, read_only=True) as reader:
        assert len(reader.runs()) == 1
        lab.screen(BASELINE)
        assert len(reader.runs()) == 2
        with pytest.raises(NotebookDamaged, match=r"read-?only"):
            reader.start_society(1, {})


def test_reading_in_threads(lab):
    for i in range(20):
        lab.screen(Variant("toy/cpu", {"lr": float(i)}))
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(len(lab.ledger.runs()))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [20] * 8


def test_a_closed_notebook_opens_again(lab):
    claim = accepted(lab)
    lab.ledger.close()
    for read_only in (False, True):
        with Ledger.open(lab.ledger.address, read_only=read_only) as ledger:
            assert ledger.claim(claim.id) == claim
            assert ledger.champion(SCOPE).variant == VARIANT


def test_what_is_no_ledger(tmp_path):
    with pytest.raises(NotANotebook, match="No ledger"):
        Ledger.open(tmp_path, read_only=True)
    foreign = tmp_path / "foreign.sqlite"
    with contextlib.closing(sqlite3.connect(foreign)) as connection, connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(NotANotebook, match="no notebook's ledger"):
        Ledger.open(foreign)


@pytest.mark.parametrize("version", [1, 99])
def test_another_schema_version(lab, version):
    lab.ledger.close()
    lab.raw(f"UPDATE meta SET value = '{version}' WHERE key = 'schema'")
    with pytest.raises(NotANotebook, match=rf"schema {version}.*--lab"):
        Ledger.open(lab.ledger.address)


@pytest.mark.parametrize("harm", ["garbage", "truncated", "middle"])
def test_a_corrupted_ledger(file_lab, harm):
    lab = file_lab
    for i in range(30):
        lab.screen(Variant("toy/cpu", {"lr": float(i)}))
    lab.ledger.close()
    content = lab.ledger.path.read_bytes()
    damage = {
        "garbage": b"\x17" * len(content),
        "truncated": content[: len(content) // 2],
        "middle": content[:8192] + b"\x17" * (len(content) - 8192),
    }
    lab.ledger.path.write_bytes(damage[harm])
    with pytest.raises(NotebookDamaged, match="backup"):
        Ledger.open(lab.ledger.address)


def test_a_full_disk(file_lab):
    lab = file_lab

    def fill():
        for i in range(1000):
            lab.commit(NewInsight("x" * 10_000, ()), key=f"k{i}")

    with lab.ledger._db.read() as tx:
        tx.exec_driver_sql("PRAGMA max_page_count = 1")
    with pytest.raises(NotebookDamaged, match=r"full.*--resume"):
        fill()
    assert len(lab.ledger.insights()) < 1000


def test_folders(tmp_path):
    with pytest.raises(NotANotebook, match="society run --lab"):
        NotebookFolder(tmp_path).require()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotebookDamaged, match="Cannot write"):
        NotebookFolder(file / "lab").create()
    with pytest.raises(NotebookDamaged):
        Ledger.open(file / "lab" / "ledger.sqlite")
    folder = NotebookFolder(tmp_path / "lab").create()
    assert folder.logs.is_dir()
    assert folder.report.is_dir()
    Ledger.open(folder.ledger).close()
    assert folder.require() is folder


def test_a_notebook_has_one_owner(tmp_path):
    folder = NotebookFolder(tmp_path / "lab")
    script = """
        import sys, time
        from society.memory.folder import NotebookFolder
        with NotebookFolder(sys.argv[1]).lock():
            print("held", flush=True)
            time.sleep(60)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(folder.path)], stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(NotebookInUse, match=str(owner.pid)), folder.lock():
            pass
    finally:
        owner.kill()
        owner.communicate()
    with folder.lock(), pytest.raises(NotebookInUse, match=str(os.getpid())), folder.lock():
        pass
    with folder.lock():
        pass


# --- several processes ---------------------------------------------------------------------------


RACER = """
    import contextlib, json, sys
    from society.errors import AlreadyLeased, AlreadyRun
    from society.memory.ledger import Ledger
    from society.records import *
    path, society, name = sys.argv[1:]
    scope, won = Scope("toy/cpu", "cpu-A"), []
    who = {"holder": name, "ttl_s": 60}
    result = (Measurement(Outcome.COMPLETED, 1.0, Cost()), Environment("cpu", "A", 1, "3.11"),
              Budget(BudgetKind.STEPS, 1.0))
    with Ledger.open(path) as ledger:
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(25):
            with contextlib.suppress(AlreadyLeased, AlreadyRun):
                lease = ledger.lease_screening(
                    scope, society, variant=Variant("toy/cpu", {"lr": float(i)}), **who)
                won.append(["screening", i, lease.token, lease.run_id])
                ledger.finish(lease, *result)
            lease = ledger.lease_next_seed(
                scope, society, variant=Variant("toy/cpu", {"lr": 0.04}),
                kind=RunKind.CALIBRATION, **who)
            won.append(["pool", lease.seed, lease.token, lease.run_id])
            ledger.finish(lease, *result)
    print(json.dumps(won))
"""


def test_processes_race_for_leases(lab):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RACER), lab.ledger.address, lab.society,
             f"agent-{i}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 4
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [item for racer in racers for item in json.loads(racer.communicate()[0])]
    for column in (2, 3):
        assert len({item[column] for item in won}) == len(won)
    assert sorted(item[1] for item in won if item[0] == "screening") == list(range(25))
    pool = [item[1] for item in won if item[0] == "pool"]
    assert sorted(pool) == sorted(lab.ledger.seeds(SeedList.VERIFICATION, SCOPE, 100))
    runs = lab.ledger.runs()
    assert [run.number for run in runs] == list(range(1, 126))


WRITER = """
    import sys
    from society.memory.ledger import Ledger
    from society.records import *
    path, society, start = sys.argv[1], sys.argv[2], int(sys.argv[3])
    scope = Scope("toy/cpu", "cpu-A")
    ledger = Ledger.open(path)
    for i in range(start, start + 10_000):
        lease = ledger.lease_screening(
            scope, society, holder="a", variant=Variant("toy/cpu", {"lr": float(i)}), ttl_s=60)
        run = ledger.finish(
            lease, Measurement(Outcome.COMPLETED, 1.0, Cost()),
            Environment("cpu", "A", 1, "3.11"), Budget(BudgetKind.STEPS, 1.0))
        entries = [NewInsight(f"{run.id} {j}", (run.id,)) for j in range(3)]
        ledger.commit(scope, society, "a", entries, key=run.id, activity=None)
        print(run.id, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(lab):
    acknowledged = []
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), lab.ledger.address, lab.society,
             str(attempt * 10_000)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        acknowledged += [writer.stdout.readline().strip() for _ in range(5)]
        time.sleep(0.03 * attempt)
        writer.send_signal(signal.SIGKILL)
        acknowledged += [line for line in writer.communicate()[0].split("\n")[:-1] if line]
    with Ledger.open(lab.ledger.address) as ledger:
        runs = {run.id for run in ledger.runs()}
        assert set(acknowledged) <= runs
        texts = [insight.text for insight in ledger.insights()]
        by_run = [list(group) for _, group in itertools.groupby(texts, lambda t: t.split()[0])]
        assert all(len(group) == 3 for group in by_run)
        assert {group[0].split()[0] for group in by_run} >= set(acknowledged)
        assert ledger.release_all(lab.society) <= 4
        assert ledger.leases(SCOPE) == ()


# --- the life of a lease, at random --------------------------------------------------------------


class LeaseMachine(RuleBasedStateMachine):
    """Random lease, heartbeat, expiry, release and finish against a model in a dictionary."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.lab = Lab(_PLACES["new"]())
        self.living = {}
        self.expired = set()
        self.done = {}

    def teardown(self):
        self.lab.ledger.close()

    @rule(target=leases, knob=st.integers(0, 5), holder=st.sampled_from(["ada", "ben"]))
    def take(self, knob, holder):
        """Knobs from 3 on stand for the places of a study."""
        current = self.living.get(knob)
        if knob in self.done:
            with pytest.raises(AlreadyRun) as caught:
                self._lease(knob, holder)
            assert caught.value.run_id == self.done[knob]
            return None
        if current is not None and current.token not in self.expired:
            with pytest.raises(AlreadyLeased):
                self._lease(knob, holder)
            return None
        lease = self._lease(knob, holder)
        assert all(lease.token > other.token for other in self.living.values())
        self.living[knob] = lease
        return knob, lease

    def _lease(self, knob, holder):
        if knob >= 3:
            return self.lab.study(1, **({}, {"data_position": 0}, {"repeat": 1})[knob - 3])
        variant = Variant("toy/cpu", {"lr": float(knob)})
        return self.lab.ledger.lease_screening(
            SCOPE, self.lab.society, holder=holder, variant=variant, ttl_s=60
        )

    def _holds(self, item):
        return item is not None and self.living.get(item[0]) == item[1]

    @rule(item=leases)
    def expire(self, item):
        if self._holds(item):
            self.lab.expire(item[1])
            self.expired.add(item[1].token)

    @rule(item=leases)
    def beat(self, item):
        if self._holds(item):
            assert self.lab.ledger.heartbeat(item[1], 60).token == item[1].token
            self.expired.discard(item[1].token)
        elif item is not None:
            with pytest.raises(LeaseLost):
                self.lab.ledger.heartbeat(item[1], 60)

    @rule(item=leases)
    def release(self, item):
        if item is not None:
            self.lab.ledger.release(item[1])
            if self._holds(item):
                del self.living[item[0]]

    @rule(item=consumes(leases))
    def finish(self, item):
        if self._holds(item):
            self.done[item[0]] = self.lab.finish(item[1]).id
            del self.living[item[0]]
        elif item is not None:
            with pytest.raises(LeaseLost):
                self.lab.finish(item[1])

    @rule()
    def release_everything(self):
        assert self.lab.ledger.release_all(self.lab.society) == len(self.living)
        self.living.clear()

    @invariant()
    def the_model_agrees(self):
        listed = {lease.token for lease in self.lab.ledger.leases(SCOPE)}
        living = {lease.token for lease in self.living.values()}
        assert listed == living - self.expired
        assert {run.id for run in self.lab.ledger.runs()} == set(self.done.values())


_PLACES = {}


def test_lease_state_machine(new_place):
    from hypothesis.stateful import run_state_machine_as_test

    _PLACES["new"] = new_place
    run_state_machine_as_test(
        LeaseMachine,
        settings=settings(
            max_examples=10,
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- what language models cost -------------------------------------------------------------------


def called(society, agent="ada", outcome="answered", dollars=0.25, **more):
    numbers = {"prompt_tokens": 100, "completion_tokens": 10, "wall_s": 1.5} | more
    return Call(society, agent, "propose", "a-model", outcome, dollars=dollars, **numbers)


def test_calls_are_summed_by_society_and_agent(lab):
    ledger, mine = lab.ledger, lab.ledger.start_society(1, {}).id
    other = ledger.start_society(2, {}).id
    assert ledger.usage(mine) == Usage()
    version = ledger.version()
    for call in (
        called(mine), called(mine, outcome="cached", dollars=0.0), called(mine, outcome="timeout"),
        called(mine, agent="bob", dollars=0.5, prompt_tokens=3_000_000_000), called(other),
    ):  # fmt: skip
        ledger.record_call(call)
    assert ledger.version() == version
    ada, bob = Usage(3, 1, 1, 200, 20, 0.5), Usage(1, 0, 0, 3_000_000_000, 10, 0.5)
    assert ledger.usage_by_agent(mine) == {"ada": ada, "bob": bob}
    assert (ledger.usage(mine, "ada"), ledger.usage(mine, "nobody")) == (ada, Usage())
    assert ledger.usage(mine) == Usage(4, 1, 1, 3_000_000_200, 30, 1.0)
    assert ada.tokens == 220
    assert [one.outcome for one in ledger.calls(mine)][:3] == ["answered", "cached", "timeout"]
    assert len(ledger.calls()) == 5
    assert abs(ledger.calls()[0].called_at - ledger.now()) < 60


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tokens": -1}, {"completion_tokens": -1}, {"dollars": -0.1}, {"wall_s": -1.0},
        {"dollars": float("nan")}, {"dollars": float("inf")}, {"wall_s": float("inf")},
        {"outcome": "cached"}, {"society": "s999"},
    ],
    ids=str,
)  # fmt: skip
def test_calls_that_cannot_be_are_refused(lab, wrong):
    society = lab.ledger.start_society(1, {}).id
    with pytest.raises(InvariantViolated):
        lab.ledger.record_call(called(**{"society": society} | wrong))
    assert lab.ledger.calls() == ()


def test_hostile_names_in_calls_are_kept_within_bounds(lab):
    society = lab.ledger.start_society(1, {}).id
    lab.ledger.record_call(called(society, outcome="x" * 10_000 + "\ud800\0"))
    (kept,) = lab.ledger.calls(society)
    assert kept.outcome == "x" * 200
    assert lab.ledger.usage(society).failed == 1
