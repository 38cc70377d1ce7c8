"""Hardware tiers: classes for display, and nothing compared across them, however hard one tries."""

import dataclasses
import itertools
import json

import pytest

from society import tiers
from society.errors import InvariantViolated, SocietyError
from society.experiments.executor import describe
from society.experiments.space import Space
from society.experiments.task import load_task
from society.lookup import lookup
from society.memory.folder import NotebookFolder
from society.memory.frames import Memory
from society.memory.ledger import Ledger
from society.memory.rows import environment_text
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Crown,
    Decision,
    Effect,
    Environment,
    HypothesisState,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewRefusal,
    Noise,
    Outcome,
    RefusalReason,
    RunKind,
    Scope,
    Variant,
    Verdict,
)
from society.report import build_report
from society.roles.base import BudgetLeft, Charter
from society.roles.view import View
from society.standings import standings

GIB = 2**30
TASK = load_task("synthetic", "quick")
SPACE = Space.of(TASK)
BASE = Variant(TASK.key)
SMALL = Environment("cpu", "AVX2", 1, "3.11")
LARGE = Environment("cuda:NVIDIA H100 80GB HBM3", "sm_90", 1, "3.11", mem_bytes=79 * GIB)
BUDGET = Budget(BudgetKind.STEPS, 10)


def change(**overrides):
    return SPACE.variant(TASK.key, overrides)


class Notebook:
    """One ledger in which two machines of different tiers work on one task."""

    def __init__(self, folder):
        self.folder = NotebookFolder(folder)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger.open(self.folder.ledger, 7)
        self._keys = itertools.count()
        settings = {"task": "synthetic", "profile": "quick"}
        self.society = self.ledger.start_society(1, settings).id

    def scope(self, environment):
        return Scope(TASK.key, environment.tier)

    def commit(self, environment, *entries, agent="ada"):
        key = f"key-{next(self._keys)}"
        self.ledger.commit(self.scope(environment), self.society, agent, entries, key=key)

    def finish(self, lease, environment, score):
        measured = Measurement(Outcome.COMPLETED, score, Cost(flops=1e9))
        return self.ledger.finish(lease, measured, environment, BUDGET)

    def lease(self, environment, variant, agent="ada"):
        return self.ledger.lease_screening(
            self.scope(environment), self.society, holder=agent, variant=variant, ttl_s=60
        )

    def screen(self, environment, variant, score, agent="ada"):
        return self.finish(self.lease(environment, variant, agent), environment, score)

    def measure(self, environment, variant, score, agent="ben", claim=None):
        kind = RunKind.CALIBRATION if claim is None else RunKind.VERIFICATION
        lease = self.ledger.lease_next_seed(
            self.scope(environment), self.society, holder=agent, variant=variant, kind=kind,
            claim_id=claim, ttl_s=60,
        )  # fmt: skip
        return self.finish(lease, environment, score)

    def begin(self, environment, score, sd):
        self.commit(environment, Crown(BASE, None, None))
        run = self.screen(environment, BASE, score)
        for n in range(4):
            self.measure(environment, BASE, score + sd * (-1) ** n)
        self.commit(environment, Noise(TASK.key, environment.tier, sd, sd, sd, 4))
        return run

    def crown(self, environment, variant, score, gain=0.1):
        run = self.screen(environment, variant, score)
        self.commit(environment, NewClaim(run.id, BASE, gain, 1, 0.05, 0.0))
        claim = self.ledger.claims(self.scope(environment))[-1]
        made = [self.measure(environment, variant, score, claim=claim.id) for _ in range(4)]
        effect = Effect(gain, gain, gain / 2, 2 * gain, 4)
        ids = tuple(run.id for run in made)
        self.commit(
            environment,
            Verdict(claim.id, Decision.ACCEPTED, 4.0, effect, "", ids, "cyd"),
            Crown(variant, claim.id, run.id),
            agent="cyd",
        )
        return claim

    def view(self, environment):
        return View(
            self.ledger, scope=self.scope(environment), society=self.society, task=TASK,
            space=SPACE, charter=Charter(), budget=BudgetLeft(0, 100, 200), entropy=1,
        )  # fmt: skip


@pytest.fixture
def book(tmp_path):
    """Scores around 2.0 on the small machine and around 1.0 on the large one."""
    book = Notebook(tmp_path / "lab")
    book.begin(SMALL, 2.0, 0.02)
    book.begin(LARGE, 1.0, 0.001)
    yield book
    book.ledger.close()


# ------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("tier", "memory", "expected"),
    [
        ("cpu-AVX512", 0, "CPU AVX512"),
        ("cpu-x86_64", 0, "CPU x86_64"),
        ("cuda:Tesla_T4_15GB-sm_75", int(14.7 * GIB), "GPU up to 16 GB"),
        ("cuda:NVIDIA_GeForce_RTX_4090_24GB-sm_89", 25386352640, "GPU up to 24 GB"),
        ("cuda:NVIDIA_GeForce_RTX_4090_24GB-sm_89", 0, "GPU up to 24 GB"),
        ("cuda:NVIDIA_RTX_A6000_48GB-sm_86", int(47.5 * GIB), "GPU up to 48 GB"),
        ("cuda:NVIDIA_RTX_5090_32GB-sm_120", 0, "GPU up to 48 GB"),
        ("cuda:NVIDIA_H100_80GB_HBM3-sm_90", 0, "GPU over 48 GB"),
        ("cuda:NVIDIA_H100_80GB_HBM3_MIG_1g.10gb-sm_90", 0, "GPU up to 16 GB"),
        ("cuda:NVIDIA_H100_80GB_HBM3_MIG_1g.10gb-sm_90", 10 * GIB, "GPU up to 16 GB"),
        ("cuda:Some_card-sm_90", 0, "GPU of unknown memory"),
    ],
)
def test_the_class_of_a_tier(tier, memory, expected):
    assert tiers.class_of(tier, memory) == expected


def test_classes_are_sorted_cpus_first_then_by_memory():
    names = [
        "GPU of unknown memory", "GPU over 48 GB", "GPU up to 48 GB", "GPU up to 16 GB",
        "CPU AVX512", "GPU up to 24 GB",
    ]  # fmt: skip
    assert sorted(names, key=tiers.order) == [names[4], *names[3:4], names[5], *names[2::-1]]


def test_environments_from_before_memory_was_recorded_are_read(book):
    text = json.loads(environment_text(SMALL))
    del text["mem_bytes"]
    assert Environment(**text) == SMALL
    assert describe(TASK, "cpu").mem_bytes == 0
    grown = dataclasses.replace(LARGE, mem_bytes=0)
    assert grown.differs(LARGE) == ()
    assert grown.tier == LARGE.tier


# ------------------------------------------------------------------------------ the ledger


def test_a_run_of_another_tier_is_not_recorded(book):
    lease = book.lease(SMALL, change(depth=2))
    with pytest.raises(InvariantViolated, match=r"made on cuda:NVIDIA_H100.*lease is for cpu-AVX2"):
        book.finish(lease, LARGE, 0.9)
    assert book.finish(lease, SMALL, 1.9).tier == SMALL.tier


def test_a_variant_of_another_task_is_not_leased_or_proposed(book):
    other = Variant("pretrain/cpu", {"depth": 2})
    with pytest.raises(InvariantViolated, match="variant of pretrain/cpu"):
        book.lease(SMALL, other)
    with pytest.raises(InvariantViolated, match="variant of pretrain/cpu"):
        book.commit(SMALL, NewHypothesis("x", "y", other, 1.0))


def test_both_tiers_screen_the_same_variant_on_their_own_seeds(book):
    runs = [book.screen(env, change(depth=2), score) for env, score in ((SMALL, 1.9), (LARGE, 0.9))]
    assert runs[0].seed != runs[1].seed
    assert {run.tier for run in runs} == {SMALL.tier, LARGE.tier}


def refused(book, environment, *entries):
    before = len(book.ledger.claims()), book.ledger.champions(book.scope(environment))
    with pytest.raises(SocietyError):
        book.commit(environment, *entries, agent="cyd")
    assert before == (len(book.ledger.claims()), book.ledger.champions(book.scope(environment)))


def test_no_claim_verdict_crown_or_refusal_crosses_tiers(book):
    run = book.screen(LARGE, change(depth=2), 0.9)
    refused(book, SMALL, NewClaim(run.id, BASE, 1.1, 1, 0.05, 0.0))
    book.screen(SMALL, change(depth=2), 1.9)
    book.commit(SMALL, NewClaim(book.ledger.runs(book.scope(SMALL))[-1].id, BASE, 0.1, 1, 0.05, 0))
    claim = book.ledger.claims(book.scope(SMALL))[-1]
    foreign = [book.measure(LARGE, change(depth=2), 0.9) for _ in range(4)]
    ids = tuple(one.id for one in foreign)
    effect = Effect(1.1, 1.1, 1.0, 1.2, 4)
    accepted = Verdict(claim.id, Decision.ACCEPTED, 9.0, effect, "", ids, "cyd")
    refused(book, SMALL, accepted)
    refused(book, LARGE, accepted)
    refused(book, SMALL, Crown(change(depth=2), claim.id, run.id))
    with pytest.raises(InvariantViolated):
        book.commit(SMALL, NewRefusal(change(depth=2), RefusalReason.DUPLICATE, run.id))
    with pytest.raises(SocietyError):  # a claim of one tier is not verified on another
        book.measure(LARGE, change(depth=2), 0.9, claim=claim.id)
    with pytest.raises(SocietyError):
        book.ledger.lease_reproduction(
            book.scope(LARGE), book.society, holder="ben", claim_id=claim.id, ttl_s=60
        )


def test_a_champion_of_one_tier_is_none_of_another(book):
    claim = book.crown(LARGE, change(depth=2), 0.9)
    assert book.ledger.champion(book.scope(SMALL)).variant == BASE
    refused(book, SMALL, Crown(change(depth=2), claim.id, claim.screening_run))
    assert book.ledger.pool(book.scope(SMALL), change(depth=2)) == {}
    assert set(book.ledger.pool(book.scope(LARGE), change(depth=2)).values()) == {0.9}
    assert book.ledger.noise(book.scope(SMALL)).sd == 0.02
    assert book.ledger.noise(book.scope(LARGE)).sd == 0.001


def test_a_hypothesis_is_tested_on_its_own_tier(book):
    idea = NewHypothesis("Shallow.", "", change(depth=2), 1.0)
    book.commit(SMALL, idea)
    book.commit(LARGE, idea)  # known there, new here
    book.screen(LARGE, change(depth=2), 0.9)
    small, large = book.ledger.hypothesis("h0001"), book.ledger.hypothesis("h0002")
    assert (small.state, large.state) == (HypothesisState.OPEN, HypothesisState.TESTED)
    lease = book.lease(LARGE, change(depth=3))
    book.commit(SMALL, NewHypothesis("Deeper.", "", change(depth=3), 1.0))
    assert book.ledger.hypotheses(book.scope(SMALL), state=HypothesisState.OPEN)[-1].id == "h0003"
    book.ledger.release(lease)


# ------------------------------------------------------------------------------ what reads it


def test_agents_are_shown_one_tier(book):
    book.screen(LARGE, change(depth=2), 0.9)
    view = book.view(SMALL)
    assert view.champion_screening == 2.0
    assert [run.tier for run in view.screenings] == [SMALL.tier]
    assert view.winners == ()
    assert [result.score for result in view.knowledge().results] == [2.0]
    assert book.view(LARGE).winners[0].delta == pytest.approx(0.1)


def test_the_report_and_what_came_out_are_of_one_tier(book):
    book.commit(SMALL, NewHypothesis("Shallow.", "", change(depth=2), 1.0))
    book.crown(LARGE, change(depth=2), 0.9)
    book.screen(SMALL, change(depth=2), 1.5)
    report = build_report(book.ledger, book.scope(SMALL), TASK, SPACE)
    assert report.headline.champion_number == 0
    assert {run.tier for run in report.runs} == {SMALL.tier}
    [idea] = report.hypotheses
    assert idea.outcome.delta == pytest.approx(0.5)
    assert idea.outcome.noise == pytest.approx(25)
    best = report.headline.best_screening
    assert best is not None
    assert best.score == 1.5


def test_one_record_is_shown_beside_its_own_tier(book):
    book.crown(LARGE, change(depth=2), 0.9)
    run = book.screen(SMALL, change(depth=2), 1.5)
    found = lookup(book.ledger, run.id)
    [compared] = found.linked["compared with"]
    assert compared["delta"] == pytest.approx(0.5)
    assert "champion" not in found.linked
    assert "claims" not in found.linked
    assert found.record["tier_class"] == "CPU AVX2"
    seen = {one["id"] for links in found.linked.values() for one in links if "id" in one}
    large = {one.id for one in book.ledger.runs(book.scope(LARGE))}
    assert not seen & large


def test_prose_compares_with_the_champion_of_the_tier(book):
    book.crown(LARGE, change(depth=2), 0.9)
    book.crown(SMALL, change(depth=3), 1.9)
    book.screen(SMALL, change(width=48), 1.95)
    with Memory(book.folder.path) as memory:
        frame = memory.search("width=48", k=50)
        (text,) = [text for text in frame["text"] if text.startswith("Tried width=48")]
        champions = memory.champions()
        noise = memory.noise()
    assert "0.05000" in text
    assert "1.90000 of the champion" in text
    rows = champions.set_index(["tier", "number"])["score"]
    assert rows[(SMALL.tier, 0)] == pytest.approx(2.0)
    assert rows[(LARGE.tier, 1)] == pytest.approx(0.9)
    assert set(noise["tier"]) == {SMALL.tier, LARGE.tier}


# ------------------------------------------------------------------------------ best per tier


def test_the_best_of_every_tier_is_listed_side_by_side(book):
    book.crown(LARGE, change(depth=2), 0.9)
    small, large = standings(book.ledger)
    assert (small.tier_class, large.tier_class) == ("CPU AVX2", "GPU over 48 GB")
    assert small.champion.variant == BASE
    assert (small.decision, small.gain) == (None, None)
    assert small.pool.mean == pytest.approx(2.0)
    assert large.champion.variant == change(depth=2)
    assert large.decision is Decision.ACCEPTED
    assert large.gain.shrunken == 0.1
    assert large.pool.mean == pytest.approx(0.9)
    assert (small.noise.sd, large.noise.sd) == (0.02, 0.001)
    assert (small.runs, large.runs) == (5, 10)


def test_the_best_of_one_task(book):
    assert len(standings(book.ledger, "synthetic")) == 2
    assert len(standings(book.ledger, "synthetic/quick")) == 2
    assert standings(book.ledger, "pretrain") == ()


def test_the_command_lists_them(book, society):
    book.crown(LARGE, change(depth=2), 0.9)
    done = society("memory", "best", "--lab", book.folder.path)
    assert done.code == 0, done.err
    heads = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert heads == [
        "synthetic/quick  CPU AVX2  (cpu-AVX2)",
        "synthetic/quick  GPU over 48 GB  (cuda:NVIDIA_H100_80GB_HBM3-sm_90)",
    ]
    assert "1: depth=2" in done.out
    found = json.loads(society("memory", "best", "--json", "--lab", book.folder.path).out)
    assert [one["runs"] for one in found] == [5, 10]
    assert found[1]["pool"]["mean"] == pytest.approx(0.9)
    assert society("memory", "best", "--task", "nothing", "--lab", book.folder.path).out.strip()


# ------------------------------------------------------------------------------ memory show


def test_every_kind_of_record_is_shown_with_its_links(book):
    from society.records import NewInsight, NewPrior

    claim = book.crown(SMALL, change(depth=2), 1.5)
    book.commit(
        SMALL,
        NewInsight("Shallow is good.", (claim.id, claim.screening_run)),
        NewHypothesis("Width.", "why", change(depth=2, width=48), 2.0, 0.5),
        NewRefusal(change(depth=2), RefusalReason.DUPLICATE, claim.screening_run, "run before"),
        NewPrior("old.tsv", "abc", 1.4, "keep", "wider"),
    )
    run = book.screen(SMALL, change(depth=2, width=48), 1.4, "dan")
    shown = {
        id: lookup(book.ledger, id)
        for id in (claim.screening_run, claim.id, "h0001", "i0001", "p00001", "s001", run.id)
    }
    first = shown[claim.screening_run].linked
    assert [one["id"] for one in first["claims"]] == [claim.id]
    assert [one["id"] for one in first["insights"]] == ["i0001"]
    assert len(first["runs of the same variant"]) == 4
    assert "run before" in first["refused because of it"][0]["words"]
    assert first["champion"][0]["number"] == 1
    assert first["neighbours"][0]["id"]
    about = shown[claim.id].linked
    assert [one["id"] for one in about["screening run (never evidence)"]] == [claim.screening_run]
    assert len(about["runs made for it"]) == 4
    tested = shown["h0001"]
    assert tested.record["outcome"]["fate"] == "better"
    assert tested.record["worth"] == 4.0
    assert "by dan" in tested.linked["what came out"][0]["words"]
    against = {one["against"]: one for one in tested.linked["changes"]}
    assert set(against["baseline"]["knobs"]) == {"depth", "width"}
    assert set(against["champion 1, of that time"]["knobs"]) == {"width"}
    assert [one["id"] for one in shown["i0001"].linked["evidence"]] == [
        claim.id,
        claim.screening_run,
    ]
    assert shown["p00001"].record["description"] == "wider"
    assert {one["kind"]: one["count"] for one in shown["s001"].linked["holds"]}["claims"] == 1
    assert shown[run.id].linked["compared with"][0]["delta"] == pytest.approx(0.1)
    for found in shown.values():
        assert all(one["words"] for links in found.linked.values() for one in links)
        json.dumps(found.linked)


def test_showing_a_record_asks_for_it_alone(book, monkeypatch):
    claim = book.crown(SMALL, change(depth=2), 1.5)

    def whole(*_, **__):
        raise AssertionError("the whole notebook was read")

    runs = book.ledger.runs

    def few(*scope, variant, **which):
        return runs(*scope, variant=variant, **which)

    monkeypatch.setattr(book.ledger, "runs", few)
    for name in ("claims", "hypotheses", "insights", "refusals", "priors", "activities"):
        monkeypatch.setattr(book.ledger, name, whole)
    for id in (claim.screening_run, claim.id, "s001"):
        assert lookup(book.ledger, id).record


def test_an_unknown_id_names_the_latest_ones(book):
    with pytest.raises(SocietyError, match=r"'x1'.*run r00010, society s001"):
        lookup(book.ledger, "x1")
