"""Roles against a real ledger whose runs are scripted, so that every rule can be provoked."""

import asyncio
import dataclasses

import pytest

from society.errors import NotIndependent, UnknownName, UsageError
from society.experiments import Space, load_task
from society.experiments.gate import DEFAULTS
from society.memory.ledger import Ledger
from society.records import (
    Cost,
    Crown,
    Decision,
    Environment,
    Measurement,
    NewClaim,
    Noise,
    RunKind,
    Scope,
    SeedList,
    Variant,
)
from society.records import (
    Outcome as Ended,
)
from society.roles import BudgetLeft, Charter, View, load_role
from society.roles.experimenter import Experimenter
from society.roles.statistician import Statistician, end_probation, judge
from society.roles.verifier import Verifier

ENVIRONMENT = Environment("cpu", "test", 1, "3")
SCOPE = Scope("synthetic/quick", ENVIRONMENT.tier)
NOISE = 0.01
WHO = {"scope": SCOPE, "society": "s001", "ttl_s": 60}


class Scene:
    """A notebook whose runs end with the scores the test wants."""

    def __init__(self, path):
        self.ledger = Ledger.open(path / "ledger.sqlite", 7)
        self.ledger.start_society(1, {})
        self.task = load_task("synthetic", "quick")
        self.space = Space.of(self.task)
        self.base = Variant(self.task.key)
        self.keys = 0
        self.commit(Crown(self.base, None, None))
        noise = Noise(SCOPE.task, SCOPE.tier, NOISE, 0.008, 0.014, 20)
        self.commit(noise)

    def variant(self, **overrides):
        return self.space.variant(self.task.key, overrides)

    def commit(self, *entries, agent="a09"):
        self.keys += 1
        self.ledger.commit(SCOPE, "s001", agent, entries, key=f"test/{self.keys}")

    def finish(self, lease, score):
        outcome = Ended.COMPLETED if score is not None else Ended.DIVERGED
        measured = Measurement(outcome, score, Cost(wall_s=1.0))
        return self.ledger.finish(lease, measured, ENVIRONMENT, self.task.budget)

    def screen(self, variant, score, agent="a01"):
        lease = self.ledger.lease_screening(holder=agent, variant=variant, **WHO)
        return self.finish(lease, score)

    def measure(self, variant, *scores, kind=RunKind.CALIBRATION, claim=None, agent="a02"):
        for score in scores:
            lease = self.ledger.lease_next_seed(
                holder=agent, variant=variant, kind=kind, claim_id=claim, **WHO
            )
            self.finish(lease, score)

    def reproduce(self, claim, score):
        lease = self.ledger.lease_reproduction(holder="a02", claim_id=claim, **WHO)
        self.finish(lease, score)

    def claim(self, variant, score, delta):
        run = self.screen(variant, score)
        self.commit(NewClaim(run.id, self.view().champion.variant, delta, 1, 0.05, 0.0))
        return self.ledger.claims(SCOPE)[-1]

    def view(self, left=100, **charter):
        return View(
            self.ledger, scope=SCOPE, society="s001", task=self.task, space=self.space,
            charter=Charter(**charter), budget=BudgetLeft(0, left, 200), entropy=1,
        )  # fmt: skip


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    yield scene
    scene.ledger.close()


@pytest.fixture
def opened(scene):
    """A claim of depth=2 by a01 against a baseline with twenty seeds around 1.80."""
    scene.screen(scene.base, 1.80)
    scene.measure(scene.base, *(1.80 + NOISE * (-1) ** i for i in range(20)))
    return scene, scene.claim(scene.variant(depth=2), 1.74, 0.06)


def kinds(duties):
    return [duty.kind for duty in duties]


def settle(scene, claim_id, agent="a03"):
    outcome = judge(scene.view(), agent, scene.ledger.claim(claim_id))
    scene.commit(*outcome.entries, agent=agent)
    return scene.ledger.claim(claim_id)


# ------------------------------------------------------------------------------ experimenter


def test_only_a_standing_winner_is_published(scene):
    scene.screen(scene.base, 1.80)
    role = Experimenter()
    scene.screen(scene.variant(depth=2), 1.80 - 0.6 * NOISE)
    assert "publish" not in kinds(role.duties(scene.view()))
    for width in (32, 48, 96):
        scene.screen(scene.variant(width=width), 1.85)
    duty = role.duties(scene.view())[0]
    assert duty.kind == "publish"
    [claim] = asyncio.run(role.perform(duty, Bench(scene))).entries
    assert claim.screening_delta == pytest.approx(0.6 * NOISE)
    assert claim.reference_variant == scene.base


def test_less_than_half_the_noise_floor_is_no_claim(scene):
    scene.screen(scene.base, 1.80)
    scene.screen(scene.variant(depth=2), 1.80 - 0.4 * NOISE)
    assert scene.view(patience=0).winners == ()
    assert "publish" not in kinds(Experimenter().duties(scene.view(patience=0)))


def test_a_rejected_variant_is_not_claimed_again(opened):
    scene, claim = opened
    assert scene.view().winners == ()
    scene.measure(claim.variant, 1.86, kind=RunKind.VERIFICATION, claim=claim.id)
    assert settle(scene, claim.id).verdict_is(Decision.REJECTED)
    assert scene.view().winners == ()


def test_a_near_copy_of_a_rejected_claim_carries_its_debt(opened):
    scene, claim = opened
    scene.measure(claim.variant, 1.86, kind=RunKind.VERIFICATION, claim=claim.id)
    settle(scene, claim.id)
    view = scene.view()
    near, far = scene.variant(depth=2, lr=0.041), scene.variant(depth=2, lr=0.2)
    assert view.family_of(near) == claim.family
    assert view.family_capital(claim.family) < 0
    assert view.family_of(far) == claim.family + 1
    assert view.family_capital(claim.family + 1) == 0


def test_no_new_ideas_when_the_budget_closes(scene):
    scene.screen(scene.base, 1.80)
    assert "propose" in kinds(Experimenter().duties(scene.view(left=50)))
    assert "propose" not in kinds(Experimenter().duties(scene.view(left=5)))


def test_nothing_is_proposed_before_the_noise_is_known(tmp_path):
    scene = Scene(tmp_path)
    scene.ledger = Ledger.open(tmp_path / "other.sqlite", 7)
    scene.ledger.start_society(1, {})
    scene.commit(Crown(scene.base, None, None))
    assert Experimenter().duties(scene.view()) == []
    assert set(kinds(Statistician().duties(scene.view()))) == {"anchor", "calibrate"}


def test_a_brain_sees_no_seed_and_no_verification(opened):
    scene, claim = opened
    scene.measure(claim.variant, 1.7654321, kind=RunKind.VERIFICATION, claim=claim.id)
    told = repr(dataclasses.replace(scene.view().knowledge(), space=None))
    assert "1.7654321" not in told
    for which in SeedList:
        for seed in scene.ledger.seeds(which, SCOPE, 12):
            assert str(seed) not in told


# ------------------------------------------------------------------------------ verifier


def test_verification_is_barred_to_the_author(opened):
    scene, claim = opened
    [duty] = Verifier().duties(scene.view())
    assert (duty.kind, duty.subject, duty.barred) == ("verify", claim.id, ("a01",))
    with pytest.raises(NotIndependent):
        scene.measure(claim.variant, 1.7, kind=RunKind.VERIFICATION, claim=claim.id, agent="a01")


def test_at_most_two_runs_are_spent_before_the_first_results(opened):
    scene, claim = opened
    for holder in ("a02", "a03"):
        scene.ledger.lease_next_seed(
            holder=holder, variant=claim.variant, kind=RunKind.VERIFICATION, claim_id=claim.id,
            **WHO,
        )  # fmt: skip
    assert Verifier().duties(scene.view()) == []


# ------------------------------------------------------------------------------ statistician


def convincing(scene, claim, runs=4):
    scores = [1.80 + NOISE * (-1) ** i - 0.06 for i in range(runs)]
    scene.measure(claim.variant, *scores, kind=RunKind.VERIFICATION, claim=claim.id)


def test_acceptance_waits_for_the_reproduction(opened):
    scene, claim = opened
    convincing(scene, claim)
    assert kinds(Verifier().duties(scene.view())) == ["reproduce"]
    assert "judge" not in kinds(Statistician().duties(scene.view()))
    scene.reproduce(claim.id, 1.74)
    assert "judge" in kinds(Statistician().duties(scene.view()))
    assert settle(scene, claim.id).verdict_is(Decision.ACCEPTED)
    assert scene.view().champion.variant == claim.variant


def test_a_result_that_cannot_be_reproduced_is_rejected(opened):
    scene, claim = opened
    convincing(scene, claim)
    scene.reproduce(claim.id, 1.7400001)
    closed = settle(scene, claim.id)
    assert closed.verdict_is(Decision.REJECTED)
    assert "not reproducible" in closed.verdict.reason
    assert scene.view().champion.variant.is_baseline


def test_acceptance_makes_other_claims_moot(opened):
    scene, claim = opened
    other = scene.claim(scene.variant(width=32), 1.75, 0.05)
    convincing(scene, claim)
    scene.reproduce(claim.id, 1.74)
    settle(scene, claim.id)
    assert scene.ledger.claim(other.id).verdict_is(Decision.SUPERSEDED)


def accepted(scene, claim):
    convincing(scene, claim)
    scene.reproduce(claim.id, 1.74)
    settle(scene, claim.id)


def end(scene):
    scene.commit(*end_probation(scene.view(), "a04").entries, agent="a04")


def test_a_new_champion_is_topped_up_and_confirmed(opened):
    scene, claim = opened
    accepted(scene, claim)
    [duty] = [d for d in Statistician().duties(scene.view()) if d.kind == "confirm"]
    assert duty.crew == DEFAULTS.pool_target - 4
    scene.measure(claim.variant, *(1.80 + NOISE * (-1) ** i - 0.06 for i in range(4)))
    assert "probation" in kinds(Statistician().duties(scene.view()))
    end(scene)
    closed = scene.ledger.claim(claim.id)
    assert closed.verdict_is(Decision.CONFIRMED)
    assert closed.verdict.effect.low > 0
    assert "probation" not in kinds(Statistician().duties(scene.view()))


def test_a_champion_that_fails_probation_is_rolled_back(opened):
    scene, claim = opened
    accepted(scene, claim)
    scene.measure(claim.variant, 1.90, 1.91, 1.92, 1.93)
    end(scene)
    assert scene.ledger.claim(claim.id).verdict_is(Decision.ROLLED_BACK)
    history = scene.ledger.champions(SCOPE)
    assert [entry.variant.is_baseline for entry in history] == [True, False, True]
    assert history[-1].reverts


def test_a_diverging_variant_is_not_accepted(opened):
    scene, claim = opened
    scores = [1.74, None, 1.74, None]
    scene.measure(claim.variant, *scores, kind=RunKind.VERIFICATION, claim=claim.id)
    view = scene.view()
    assert view.assessments[claim.id].next is not view.assessments[claim.id].next.ACCEPT


def test_rejections_make_the_champions_pool_grow(opened):
    scene, claim = opened
    accepted(scene, claim)
    scene.measure(claim.variant, *(1.80 + NOISE * (-1) ** i - 0.06 for i in range(4)))
    end(scene)
    assert kinds(Statistician().duties(scene.view())) == []
    worse = scene.claim(scene.variant(depth=3), 1.70, 0.04)
    scene.measure(worse.variant, 1.86, kind=RunKind.VERIFICATION, claim=worse.id)
    settle(scene, worse.id)
    assert kinds(Statistician().duties(scene.view())) == ["strengthen"]


# ------------------------------------------------------------------------------ registry


class Bench:
    """The part of a lab that `publish` needs."""

    def __init__(self, scene):
        self.view = scene.view()


def test_unknown_roles_are_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match="experimenter"):
        load_role("experimentor")
    with pytest.raises(UsageError, match="cannot import"):
        load_role("no.such.module:Role")
    with pytest.raises(UsageError, match="no 'Nothing'"):
        load_role("society.roles.base:Nothing")
    with pytest.raises(UsageError, match="not a subclass"):
        load_role("society.records:Variant")


# ------------------------------------------------------------------------------ single changes


@pytest.fixture
def explained(opened):
    """A confirmed champion with two changes, in the last fifth of the budget."""
    scene, _ = opened
    claim = scene.claim(scene.variant(depth=2, width=48), 1.74, 0.06)
    accepted(scene, claim)
    scene.measure(claim.variant, *(1.80 + NOISE * (-1) ** i - 0.06 for i in range(4)))
    end(scene)
    return scene


def test_near_the_end_the_champions_changes_are_tried_alone(explained):
    view = explained.view(left=40)
    assert view.explaining
    assert [variant.describe() for variant in view.untried_alone] == ["width=48"]
    assert "isolate" in kinds(Experimenter().duties(view))
    assert "isolate" not in kinds(Experimenter().duties(explained.view(left=60)))


def test_a_single_change_is_claimed_against_the_baseline_and_crowns_nobody(explained):
    champion = explained.view().champion
    explained.screen(explained.variant(width=48), 1.80 - NOISE, agent="a05")
    duties = Experimenter().duties(explained.view(left=40))
    [duty] = [duty for duty in duties if duty.kind == "publish"]
    bench = Bench(explained)
    bench.view = explained.view(left=40)
    [filed] = asyncio.run(Experimenter().perform(duty, bench)).entries
    assert filed.reference_variant.is_baseline
    explained.commit(filed)
    claim = explained.ledger.claims(SCOPE)[-1]
    convincing(explained, claim)
    explained.reproduce(claim.id, 1.80 - NOISE)
    assert settle(explained, claim.id).verdict_is(Decision.ACCEPTED)
    assert explained.view().champion == champion
    assert kinds(Statistician().duties(explained.view())) == []


def test_an_acceptance_against_the_champion_leaves_single_changes_open(explained):
    explained.screen(explained.variant(width=48), 1.80 - NOISE, agent="a05")
    run = explained.view().screenings[-1]
    explained.commit(NewClaim(run.id, explained.base, NOISE, 9, 0.05, 0.0))
    single = explained.ledger.claims(SCOPE)[-1]
    better = explained.claim(explained.variant(depth=2, width=48, lr=0.06), 1.60, 0.13)
    explained.measure(
        better.variant, *(1.80 + NOISE * (-1) ** i - 0.12 for i in range(4)),
        kind=RunKind.VERIFICATION, claim=better.id,
    )  # fmt: skip
    explained.reproduce(better.id, 1.60)
    settle(explained, better.id)
    assert explained.view().champion.variant == better.variant
    assert explained.ledger.claim(single.id).is_open
