"""Societies with and without shared memory: what an agent may know, pairs, resuming."""

import asyncio
import time

import pytest

from society.agents.brains import load_brain
from society.agents.floor import Floor
from society.agents.laboratory import Bench, Laboratory
from society.compare import compare, found_pairs
from society.errors import UsageError
from society.experiments.executor import InlineExecutor
from society.experiments.space import Space
from society.experiments.synthetic import Synthetic
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import Crown, NewHypothesis, RunKind, Scope, SocietyState, Variant, Work
from society.roles import Charter
from society.settings import Settings, validate

COMMON = Settings(task="synthetic", profile="quick", agents=4, runs=30, slots=1)


class Seated:
    """A laboratory of two agents on a ledger of its own, without any society at work."""

    def __init__(self, path, knowledge):
        self.task = Synthetic("quick")
        self.executor = InlineExecutor(self.task)
        asyncio.run(self.executor.start())
        self.ledger = Ledger.open(path / f"{knowledge}.sqlite", secret_seed=1)
        settings = COMMON.model_copy(update={"knowledge": knowledge, "agents": 2})
        record = self.ledger.start_society(1, settings.model_dump(mode="json"))
        self.scope = Scope(self.task.key, self.executor.environment.tier)
        self.society = record.id
        base = Variant(self.task.key)
        self.commit(Crown(base, None, None))
        self.laboratory = Laboratory(
            ledger=self.ledger, recall=None, executor=self.executor, task=self.task,
            space=Space.of(self.task), scope=self.scope, brain=load_brain("search"),
            settings=settings, record=record, floor=Floor(2), charter=Charter(),
            began=time.monotonic(),
        )  # fmt: skip
        for holder, overrides in [("a01", {}), ("a01", {"lr": 0.08}), ("a02", {"depth": 2})]:
            lease = self.lease(holder, overrides)
            measured = asyncio.run(self.executor.run(self.work(lease)))
            self.ledger.finish(lease, measured, self.executor.environment, self.task.budget)
        self.lease("a01", {"heads": 4})
        self.lease("a02", {"tied": True})
        idea = self.laboratory.space.variant(self.task.key, {"depth": 3})
        self.commit(NewHypothesis("shallower", "because", idea, 1.0))

    def lease(self, holder, overrides):
        variant = Space.of(self.task).variant(self.task.key, overrides)
        return self.ledger.lease_screening(
            self.scope, self.society, holder=holder, variant=variant, ttl_s=60
        )

    def work(self, lease):
        return Work(lease.run_id, lease.variant, lease.seed, lease.split, self.task.budget)

    def commit(self, entry):
        key = type(entry).__name__
        self.ledger.commit(self.scope, self.society, "a01", [entry], key=key)

    def knows(self, agent):
        bench = Bench(self.laboratory, agent)
        known = bench.knowledge()
        return (
            [result.variant.describe() for result in known.results],
            [variant.describe() for variant in known.pending],
            len(bench.open_hypotheses()),
        )


def test_shared_memory_knows_everything(tmp_path):
    lab = Seated(tmp_path, "shared")
    everything = (["baseline", "lr=0.08", "depth=2"], ["heads=4", "tied=True"], 1)
    assert lab.knows("a01") == lab.knows("a02") == everything
    lab.ledger.close()


def test_an_agent_on_its_own_knows_its_runs_and_the_champion(tmp_path):
    lab = Seated(tmp_path, "own")
    assert lab.knows("a01") == (["baseline", "lr=0.08"], ["heads=4"], 0)
    assert lab.knows("a02") == (["baseline", "depth=2"], ["tied=True"], 0)
    assert Bench(lab.laboratory, "a02").knowledge().champion_score is not None
    assert Bench(lab.laboratory, "a02").recall("lr") == ()
    lab.ledger.close()


def test_knowledge_is_shared_or_own():
    assert Settings().knowledge == "shared"
    assert validate({"knowledge": "own"}, source="x").knowledge == "own"
    with pytest.raises(UsageError, match="knowledge"):
        validate({"knowledge": "none"}, source="x")


def test_a_pair_is_run_once_and_handed_over(tmp_path):
    folder, told = NotebookFolder(tmp_path / "lab"), []
    assert found_pairs(folder, COMMON, 1) == ()
    [pair] = compare(folder, COMMON, 1, progress=told.append)
    assert [line.split(":")[0] for line in told] == [
        "society 1 of 1, knowledge shared",
        "society 1 of 1, knowledge own",
    ]
    for hand in (pair.shared, pair.own):
        assert hand.seed == 1
        assert hand.runs == COMMON.runs
        assert hand.wall_s > 0
    assert (pair.shared.arm, pair.own.arm) == ("shared", "own")
    places = sorted((tmp_path / "lab" / "societies").glob("*/*"))
    assert [place.name for place in places] == ["1-own", "1-shared"]
    for place, hand in zip(places, (pair.own, pair.shared), strict=True):
        with Ledger.open(place, read_only=True) as ledger:
            [record] = ledger.societies()
            screened = ledger.runs(kinds=[RunKind.SCREENING])
        assert record.state is SocietyState.FINISHED
        assert record.settings["knowledge"] == hand.arm
        best = min(run.score for run in screened if run.score is not None)
        assert hand.score == best
    began = time.monotonic()
    assert compare(folder, COMMON, 1, deadline=began) == (pair,)
    assert compare(folder, COMMON, 2, deadline=began) == (pair,)
    assert found_pairs(folder, COMMON, 2) == (pair,)
