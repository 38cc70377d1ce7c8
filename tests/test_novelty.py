"""What is run and what is not: every rule of novelty, from records that provoke it."""

import asyncio
from dataclasses import replace

import pytest
from test_compare import Seated

from society.agents import graph
from society.agents import laboratory as lab_bench
from society.agents.graph import Agent
from society.experiments import Direction, Space, load_task
from society.records import (
    Budget,
    BudgetKind,
    Champion,
    Cost,
    Environment,
    Hypothesis,
    HypothesisState,
    NewHypothesis,
    NewInsight,
    NewRefusal,
    Outcome,
    RefusalReason,
    Run,
    RunKind,
    Split,
    Variant,
)
from society.roles import Charter, Duty, Knowledge, Proposal, Role
from society.roles import Outcome as Done
from society.roles.novelty import NEW, Archive, choose, judge, unsaid

TASK = load_task("synthetic", "quick")
SPACE = Space.of(TASK)
BASE = Variant(TASK.key)
SD = 0.01


def make(**overrides):
    return SPACE.variant(TASK.key, overrides)


class Scene:
    """Screening runs, a champion, and what follows from them."""

    def __init__(self, *champions, agent=None):
        self.runs = []
        self.champions = [Champion(0, BASE, None, 0.0)]
        self.agent = agent
        self.pending = ()
        self.archive = Archive(SPACE, agent)
        self.screen(BASE, 1.8)

    def screen(self, variant, score, outcome=None, agent="a01"):
        number = len(self.runs) + 1
        ended = outcome or (Outcome.COMPLETED if score is not None else Outcome.DIVERGED)
        self.runs.append(
            Run(
                id=f"r{number:05d}", society="s001", agent=agent, kind=RunKind.SCREENING,
                variant=variant, seed=1, split=Split.VALIDATION,
                budget=Budget(BudgetKind.STEPS, 100), outcome=ended, score=score, cost=Cost(),
                environment=Environment("cpu", "x", 1, "3"), data_hash="", log_tail="",
                started_at=10.0 * number, finished_at=10.0 * number + 5, number=number,
            )
        )  # fmt: skip
        return self.runs[-1].id

    def crown(self, variant, score):
        self.screen(variant, score)
        moment = self.runs[-1].finished_at + 1
        self.champions.append(Champion(len(self.champions), variant, "c1", moment))

    def knowledge(self):
        champion = self.champions[-1].variant
        scores = {run.variant.fingerprint: run.score for run in self.runs}
        return Knowledge(
            space=SPACE, direction=Direction.MINIMISE, task=TASK.key, champion=champion,
            champion_score=scores.get(champion.fingerprint), results=(), pending=self.pending,
            noise_sd=SD, entropy=1,
        )  # fmt: skip

    def judge(self, **overrides):
        return judge(make(**overrides), self.knowledge(), self.read())

    def read(self):
        return self.archive.read(self.runs, self.champions)


# ------------------------------------------------------------------------------ duplicates


def test_nothing_speaks_against_something_new():
    assert Scene().judge(depth=3) == NEW
    assert Scene().judge(depth=3).is_new


def test_the_same_experiment_in_another_spelling_is_a_duplicate():
    scene = Scene()
    run = scene.screen(make(depth=2, lr=0.08), 1.7)
    found = scene.judge(lr=8e-2, depth="2", heads=2)
    assert (found.reason, found.run_id) == (RefusalReason.DUPLICATE, run)


def test_what_is_under_way_is_known_too():
    scene = Scene()
    scene.pending = (make(depth=2),)
    assert scene.judge(depth=2).reason is RefusalReason.DUPLICATE
    assert scene.judge(depth=2, lr=0.0401).reason is RefusalReason.NEAR_DUPLICATE
    assert scene.judge(depth=2, lr=0.0401).run_id is None


def test_each_number_within_its_tolerance_is_a_near_duplicate():
    scene = Scene()
    run = scene.screen(make(depth=2, lr=0.08), 1.7)
    found = scene.judge(depth=2, lr=0.081)
    assert (found.reason, found.run_id) == (RefusalReason.NEAR_DUPLICATE, run)
    assert "depth=2, lr=0.08" in found.note
    assert scene.judge(depth=2, lr=0.1).is_new
    assert scene.judge(depth=3, lr=0.08).is_new
    assert scene.judge(depth=2, lr=0.08, tied=True).is_new


def test_an_agent_on_its_own_judges_by_its_own_runs_and_the_champion():
    scene = Scene(agent="a02")
    scene.screen(make(depth=2), 1.7, agent="a01")
    mine = scene.screen(make(depth=3), 1.7, agent="a02")
    assert scene.judge(depth=2).is_new
    assert scene.judge(depth=3).run_id == mine
    assert len(scene.read()) == 1
    scene.crown(make(width=96), 1.6)
    assert scene.judge(width=96).reason is RefusalReason.DUPLICATE
    assert scene.judge(width=96, lr=0.0402).reason is RefusalReason.NEAR_DUPLICATE


# ------------------------------------------------------------------------------ dead ends


def test_one_run_that_was_much_worse_makes_its_change_a_dead_end():
    scene = Scene()
    run = scene.screen(make(lr=0.5), 1.8 + 5 * SD)
    found = scene.judge(lr=0.48, depth=2)
    assert (found.reason, found.run_id) == (RefusalReason.DEAD_END, run)
    assert f"{run} worse by 5.0 noise floors" in found.note
    assert scene.judge(lr=0.1, depth=2).is_new, "another value of the knob"
    assert scene.judge(depth=2).is_new, "another change"


def test_a_little_worse_takes_two_witnesses():
    scene = Scene()
    scene.screen(make(lr=0.5), 1.8 + 3 * SD)
    assert scene.judge(lr=0.48, depth=2).is_new
    scene.screen(make(lr=0.52, width=96), 1.8 + 3 * SD)
    assert scene.judge(lr=0.48, depth=2).is_new, "that run also changed the width"
    scene.screen(make(lr=0.46), 1.8 + 3 * SD)
    assert scene.judge(lr=0.48, depth=2).reason is RefusalReason.DEAD_END


@pytest.mark.parametrize("outcome", [Outcome.DIVERGED, Outcome.CRASHED, Outcome.REJECTED])
def test_failures_count_as_bad_but_one_of_them_may_be_an_accident(outcome):
    scene = Scene()
    scene.screen(make(lr=0.9), None, outcome)
    assert scene.judge(lr=0.85, depth=2).is_new
    scene.screen(make(lr=0.8), None, outcome)
    found = scene.judge(lr=0.85, depth=2)
    assert found.reason is RefusalReason.DEAD_END
    assert f"r00002 {outcome.value}" in found.note


def test_within_the_noise_is_no_failure():
    scene = Scene()
    for lr in (0.46, 0.5, 0.52):
        scene.screen(make(lr=lr), 1.8 + 1.5 * SD)
    assert scene.judge(lr=0.49, depth=2).is_new


def test_a_run_that_made_the_change_with_another_and_was_fine_redeems_it():
    scene = Scene()
    scene.screen(make(lr=0.5), 1.8 + 9 * SD)
    assert scene.judge(lr=0.5, batch=4096, depth=2).reason is RefusalReason.DEAD_END
    scene.screen(make(lr=0.5, batch=4096), 1.8)
    assert scene.judge(lr=0.5, batch=4096, depth=2).is_new
    assert scene.judge(lr=0.5, batch=200, depth=2).reason is RefusalReason.DEAD_END


def test_a_run_is_held_against_the_champion_that_it_tried_to_improve_on():
    scene = Scene()
    scene.screen(make(lr=0.08), 1.8 - 3 * SD)
    scene.crown(make(depth=2, width=96), 1.6)
    assert scene.judge(depth=2, width=96, lr=0.082).is_new, "it helped, if not as much"
    scene.screen(make(depth=2, width=96, heads=8), 1.6 + 9 * SD)
    assert scene.judge(depth=2, width=96, heads=8, lr=0.02).reason is RefusalReason.DEAD_END
    assert scene.judge(depth=2, width=96, lr=0.02).is_new


def test_what_the_champion_has_adopted_is_not_held_against_it():
    scene = Scene()
    scene.screen(make(depth=2, lr=0.9), 1.8 + 9 * SD)
    scene.crown(make(depth=2), 1.6)
    assert scene.judge(depth=2, width=96).is_new


def test_a_neighbourhood_below_the_champion_of_now_is_a_dead_end():
    scene = Scene()
    for momentum in (0.82, 0.83, 0.84):
        scene.screen(make(window="full", momentum=momentum), 1.8 + SD)
    assert scene.judge(window="full", momentum=0.86).is_new, "hardly worse than the champion"
    scene.crown(make(lr=0.046), 1.77)
    found = scene.judge(window="full", momentum=0.86)
    assert found.reason is RefusalReason.DEAD_END
    assert found.note.startswith("What lies nearest came out badly (r00004 worse by 4.0")
    assert scene.judge(window="quarter", momentum=0.86).is_new


def test_the_other_side_of_the_champion_is_no_neighbourhood():
    scene = Scene()
    for lr in (0.052, 0.054, 0.056):
        scene.screen(make(lr=lr), 1.8 + 3 * SD)
    assert scene.judge(lr=0.033).is_new


def test_without_a_noise_floor_only_failures_are_bad():
    scene = Scene()
    scene.screen(make(lr=0.5), 3.0)
    known = replace(scene.knowledge(), noise_sd=None)
    assert judge(make(lr=0.5, depth=2), known, scene.read()).is_new


def test_code_that_failed_is_not_held_against_other_code():
    scene = Scene()
    scene.screen(Variant(TASK.key, {}, "+ bad"), 1.8 + 9 * SD)
    bad = Variant(TASK.key, {"depth": 2}, "+ bad")
    assert judge(bad, scene.knowledge(), scene.read()).reason is RefusalReason.DEAD_END
    good = Variant(TASK.key, {"depth": 2}, "+ good")
    assert judge(good, scene.knowledge(), scene.read()).is_new


def test_judging_is_a_function_of_the_records_alone():
    scene = Scene()
    for lr in (0.5, 0.1, 0.7):
        scene.screen(make(lr=lr), 1.8 + 5 * SD)
        scene.judge(depth=2)
    again = Archive(SPACE).read(scene.runs, scene.champions)
    for overrides in ({"lr": 0.48, "depth": 2}, {"lr": 0.3}, {"lr": 0.1}):
        assert judge(make(**overrides), scene.knowledge(), again) == scene.judge(**overrides)


# ------------------------------------------------------------------------------ asking a brain


class Scripted:
    """A brain that proposes what it is told to, in order, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, *proposals):
        self.proposals = list(proposals)
        self.asked = []

    async def propose(self, knowledge):
        self.asked.append(knowledge)
        return self.proposals[len(self.asked) - 1]


class Bench:
    """The part of a lab that `choose` needs."""

    def __init__(self, scene, *proposals, hits=()):
        self.brain = Scripted(*proposals)
        self.scene, self.hits = scene, hits
        self.view = type("View", (), {"charter": Charter()})

    async def propose(self, knowledge):
        return await self.brain.propose(knowledge)

    def knowledge(self):
        return self.scene.knowledge()

    def archive(self):
        return self.scene.read()

    def recall(self, text, k=5):
        return self.hits


@pytest.fixture
def failed():
    """A notebook in which a high rate has failed."""
    scene = Scene()
    scene.screen(make(lr=0.5), 1.8 + 9 * SD)
    return scene


def idea(despite="", **overrides):
    return Proposal(make(**overrides), "An idea.", despite)


def ask(scene, *proposals, **more):
    bench = Bench(scene, *proposals, **more)
    return asyncio.run(choose(bench)), bench.brain


def test_a_brain_is_asked_again_and_told_why(failed):
    choice, brain = ask(failed, idea(lr=0.5), idea(lr=0.48, depth=2), idea(depth=2))
    assert choice.proposal.variant == make(depth=2)
    assert [one.reason for one in choice.refusals] == ["duplicate", "dead_end"]
    assert {one.run_id for one in choice.refusals} == {"r00002"}
    assert [len(known.refused) for known in brain.asked] == [0, 1, 2]
    assert brain.asked[2].refused[1].note == choice.refusals[1].note
    assert len({known.entropy for known in brain.asked}) == 3


def test_a_reason_takes_a_proposal_out_of_a_dead_end(failed):
    choice, _ = ask(failed, idea("With a warm-up it may hold.", lr=0.48, warm_up=0.3))
    assert choice.refusals == ()
    assert "r00002 worse by 9.0 noise floors" in choice.proposal.idea
    assert choice.proposal.idea.endswith("With a warm-up it may hold.")


def test_a_reason_does_not_make_a_duplicate_new(failed):
    choice, _ = ask(failed, idea("I want it.", lr=0.5), idea(depth=2))
    assert [one.reason for one in choice.refusals] == [RefusalReason.DUPLICATE]


def test_each_refusal_is_recorded_once(failed):
    choice, _ = ask(failed, idea(lr=0.5), idea(lr=0.5), idea(lr=0.5), idea(depth=2))
    assert choice.refusals == (
        NewRefusal(
            make(lr=0.5), RefusalReason.DUPLICATE, "r00002", "r00002 is the same experiment."
        ),
    )


def test_a_dead_end_is_better_than_nothing_and_then_not_counted_as_saved(failed):
    near, dead = idea(lr=0.505), idea(lr=0.48, depth=2)
    choice, _ = ask(failed, near, dead, near, dead)
    assert choice.proposal.variant == dead.variant
    assert "nothing newer was proposed" in choice.proposal.idea
    assert [one.reason for one in choice.refusals] == [RefusalReason.NEAR_DUPLICATE]
    choice, _ = ask(failed, *[idea(lr=0.5)] * 4)
    assert choice.proposal is None
    assert len(choice.refusals) == 1


def test_what_reads_alike_is_told_and_decides_nothing(failed):
    hit = type("Hit", (), {"text": "Outcome of run r00002: much worse."})
    choice, _ = ask(failed, idea(depth=2), hits=[hit])
    assert choice.refusals == ()
    assert choice.proposal.idea == "An idea. Nearest on record: Outcome of run r00002: much worse."


# ------------------------------------------------------------------------------ hypotheses


def posted(statement, variant, state=HypothesisState.OPEN):
    return Hypothesis("h00001", "s001", "a01", statement, "", variant, 1.0, state, "r00002")


def test_a_hypothesis_that_is_on_record_in_other_words_is_refused():
    known = [posted("Raise lr to 0.08.", make(lr=0.08), HypothesisState.TESTED)]
    insight = NewInsight("Something else.", ())
    again = NewHypothesis("lr to 0.08: raise it.", "", make(lr=0.0802), 1.0)
    same = NewHypothesis("Raise LR to 0.08", "", make(lr=0.0802), 1.0)
    other = NewHypothesis("Raise lr to 0.08.", "", make(lr=0.2), 1.0)
    kept, refused, new = unsaid([insight, same, other], known, SPACE)
    assert (kept, new) == (insight, other)
    assert refused.reason is RefusalReason.SAME_IDEA
    assert refused.run_id == "r00002"
    assert "h00001 says the same" in refused.note
    dropped = [replace(known[0], state=HypothesisState.DROPPED)]
    assert unsaid([same, again], dropped, SPACE) == (same, again)


# ------------------------------------------------------------------------------ in a society


class Refusing(Role):
    """Does what its test wants, without making a run."""

    name = "refusing"

    def __init__(self, *entries):
        self.entries = entries

    def duties(self, view):
        return [Duty(self.name, "propose", value=50, needs_slot=True)]

    async def perform(self, duty, lab):
        return Done(self.entries, note="no new idea")


def act(lab, role):
    """One cycle of an agent with that role; the agent."""
    agent = Agent("a01", (role,), lab)
    runtime = type("Runtime", (), {"context": agent})

    async def cycle():
        await lab.floor.enter(lambda: True)
        state = await graph.survey({}, runtime)
        state |= await graph.choose(state, runtime)
        state |= await graph.perform(state, runtime)
        await graph.commit(state, runtime)

    asyncio.run(cycle())
    return agent


def test_refusals_are_recorded_and_no_reason_to_ask_again_at_once(tmp_path):
    seated = Seated(tmp_path, "shared")
    lab = seated.laboratory
    refusal = NewRefusal(make(lr=0.08), RefusalReason.DUPLICATE, None, "known")
    agent = act(lab, Refusing(refusal))
    [recorded] = seated.ledger.refusals(seated.scope)
    assert (recorded.agent, recorded.variant) == ("a01", make(lr=0.08))
    assert (recorded.reason, recorded.note) == (RefusalReason.DUPLICATE, "known")
    assert agent.duties() == [], "until another run has finished"
    seated.ledger.close()


def test_a_hypothesis_said_before_is_recorded_as_a_refusal(tmp_path):
    seated = Seated(tmp_path, "shared")
    again = NewHypothesis("Shallower!", "", make(depth=3), 1.0)
    other = NewHypothesis("Wider.", "", make(width=96), 1.0)
    act(seated.laboratory, Refusing(again, other))
    [recorded] = seated.ledger.refusals(seated.scope)
    assert recorded.reason is RefusalReason.SAME_IDEA
    posted = {one.statement for one in seated.ledger.hypotheses(seated.scope)}
    assert posted == {"shallower", "Wider."}
    seated.ledger.close()


@pytest.mark.parametrize(("knowledge", "known"), [("shared", 3), ("own", 2)])
def test_an_archive_is_kept_and_holds_what_the_agent_may_know(tmp_path, knowledge, known):
    seated = Seated(tmp_path, knowledge)
    bench = lab_bench.Bench(seated.laboratory, "a01")
    archive = bench.archive()
    assert len(archive) == known
    assert bench.archive() is archive
    other = lab_bench.Bench(seated.laboratory, "a02").archive()
    assert (other is archive) == (knowledge == "shared")
    seated.ledger.close()
