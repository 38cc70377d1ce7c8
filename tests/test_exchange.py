"""The hypothesis exchange: worth, throttle, takes with a deadline, what came out, who sees it."""

import asyncio
import contextlib
import itertools
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from society import app, exchange
from society.agents.laboratory import Bench, Laboratory
from society.errors import AlreadyLeased, ExecutorError, InvariantViolated
from society.exchange import Fate
from society.experiments.effects import KnobEffect, KnobVerdict
from society.experiments.space import Space
from society.experiments.task import load_task
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import (
    Budget,
    BudgetKind,
    Champion,
    Cost,
    Crown,
    Environment,
    Hypothesis,
    HypothesisDropped,
    HypothesisState,
    Measurement,
    NewHypothesis,
    NewInsight,
    Noise,
    Outcome,
    Run,
    RunKind,
    Scope,
    Split,
    Variant,
)
from society.roles.base import BudgetLeft, Charter, Duty
from society.roles.experimenter import Experimenter
from society.roles.meta_analyst import MetaAnalyst, hypotheses, outdated
from society.roles.novelty import Archive
from society.roles.view import View
from society.settings import Settings

OPEN, TAKEN = HypothesisState.OPEN, HypothesisState.TAKEN
TESTED, DROPPED = HypothesisState.TESTED, HypothesisState.DROPPED
TASK = load_task("synthetic", "quick")
SCOPE = Scope(TASK.key, "cpu-test")
BUDGET = Budget(BudgetKind.STEPS, 10)
HERE = Environment("cpu", "test", 1, "3.11")
SPACE = Space.of(TASK)
BASE = Variant(TASK.key)


def change(**overrides):
    return SPACE.variant(TASK.key, overrides)


def idea(priority=1.0, cost=1.0, **overrides):
    variant = change(**overrides)
    return NewHypothesis(f"{variant.describe()} helps", "because", variant, priority, cost)


class Notebook:
    """A ledger with a baseline, and short ways to fill it."""

    def __init__(self, path):
        self.ledger = Ledger.open(path, 7)
        self.society = self.ledger.start_society(1, {}).id
        self._keys = itertools.count()
        self.commit(Crown(BASE, None, None), Noise(SCOPE.task, SCOPE.tier, 0.01, 0.01, 0.01, 20))

    def commit(self, *entries, agent="ada", room=None):
        key = f"key-{next(self._keys)}"
        return self.ledger.commit(SCOPE, self.society, agent, entries, key=key, room=room)

    def lease(self, variant, agent="ada"):
        return self.ledger.lease_screening(
            SCOPE, self.society, holder=agent, variant=variant, ttl_s=60
        )

    def finish(self, lease, score=1.0):
        outcome = Outcome.DIVERGED if score is None else Outcome.COMPLETED
        return self.ledger.finish(lease, Measurement(outcome, score, Cost()), HERE, BUDGET)

    def screen(self, variant, score=1.0, agent="ada"):
        return self.finish(self.lease(variant, agent), score)

    def take(self, id, agent="ada", ttl_s=60):
        return self.ledger.take_hypothesis(id, self.society, agent, ttl_s)

    def open(self):
        return [one.id for one in self.ledger.hypotheses(SCOPE, state=OPEN)]

    def state(self, id):
        return self.ledger.hypothesis(id).state

    def view(self, left=100):
        return View(
            self.ledger, scope=SCOPE, society=self.society, task=TASK, space=SPACE,
            charter=Charter(), budget=BudgetLeft(0, left, 200), entropy=1,
        )  # fmt: skip


@pytest.fixture(scope="session")
def empty_ledger(postgres_server):
    """A database with an empty ledger, to be copied: quicker than making one each time."""
    name = postgres_server.create()
    Ledger.open(postgres_server.url_of(name), 7).close()
    return name


@pytest.fixture(params=["sqlite", "postgres"])
def book(request, tmp_path):
    with contextlib.ExitStack() as made:
        place = tmp_path / "ledger.sqlite"
        if request.param == "postgres":
            server = request.getfixturevalue("postgres_server")
            template = request.getfixturevalue("empty_ledger")
            place = made.enter_context(server.database(template))
        book = Notebook(place)
        made.callback(book.ledger.close)
        yield book


ON_SQLITE = pytest.mark.parametrize("book", ["sqlite"], indirect=True)
"""For what is not about the ledger."""


# ------------------------------------------------------------------------------ taking one


def test_one_agent_at_a_time_tests_an_idea(book):
    book.commit(idea(depth=2))
    taken = book.take("h0001")
    assert (taken.state, taken.taken_by) == (TAKEN, "ada")
    assert taken.taken_until > book.ledger.now()
    with pytest.raises(AlreadyLeased, match="ada tests hypothesis h0001"):
        book.take("h0001", "ben")
    assert book.open() == []
    book.ledger.return_hypothesis("h0001", "ben")
    assert book.state("h0001") is TAKEN
    book.ledger.return_hypothesis("h0001", "ada", society="s999")
    assert book.state("h0001") is TAKEN
    book.ledger.return_hypothesis("h0001", "ada", society=book.society)
    assert book.ledger.hypothesis("h0001") == book.ledger.hypotheses(state=OPEN)[0]
    assert book.take("h0001", "ben").taken_by == "ben"


def test_a_take_that_ran_out_is_open_again_by_the_databases_clock(book):
    book.commit(idea(depth=2))
    book.take("h0001", ttl_s=-1)
    free = book.ledger.hypothesis("h0001")
    assert (free.state, free.taken_by, free.taken_until) == (OPEN, None, None)
    assert book.open() == ["h0001"]
    assert book.ledger.hypotheses(state=TAKEN) == ()
    assert book.take("h0001", "ben").taken_by == "ben"
    book.ledger.return_hypothesis("h0001", "ada")
    assert book.ledger.hypothesis("h0001").taken_by == "ben"


def test_what_is_being_run_is_not_open_whoever_runs_it(book):
    book.commit(idea(depth=2))
    lease = book.lease(change(depth=2), "ben")
    assert book.open() == []
    seen = book.ledger.hypothesis("h0001")
    assert (seen.state, seen.taken_by) == (TAKEN, "ben")
    with pytest.raises(AlreadyLeased, match="ben tests"):
        book.take("h0001")
    book.ledger.release(lease)
    assert book.open() == ["h0001"]


def test_a_take_lasts_as_long_as_its_run(book):
    book.commit(idea(depth=2))
    book.take("h0001", ttl_s=-1)
    lease = book.lease(change(depth=2))
    assert book.state("h0001") is TAKEN
    with pytest.raises(AlreadyLeased):
        book.take("h0001", "ben")
    run = book.finish(lease)
    closed = book.ledger.hypothesis("h0001")
    assert (closed.state, closed.run_id) == (TESTED, run.id)
    book.ledger.return_hypothesis("h0001", "ada")
    assert book.state("h0001") is TESTED
    with pytest.raises(AlreadyLeased, match="tested before"):
        book.take("h0001", "ben")


@pytest.mark.parametrize("score", [0.9, None])
def test_any_run_of_the_variant_closes_it_whoever_made_it_and_however_it_ended(book, score):
    book.commit(idea(depth=2), idea(depth=3))
    run = book.screen(change(depth=2), score, "stranger")
    assert book.ledger.hypothesis("h0001").run_id == run.id
    assert book.open() == ["h0002"]


def test_unknown_and_dropped_ones_cannot_be_taken(book):
    with pytest.raises(InvariantViolated, match="h0001"):
        book.take("h0001")
    with pytest.raises(InvariantViolated, match="h0001"):
        book.ledger.hypothesis("h0001")
    with pytest.raises(InvariantViolated, match="h0001"):
        book.commit(HypothesisDropped("h0001", "why"))
    book.commit(idea(depth=2), HypothesisDropped("h0001", "out of fashion"))
    with pytest.raises(AlreadyLeased, match="out of fashion"):
        book.take("h0001")


def test_dropping_what_somebody_tests_changes_nothing(book):
    book.commit(idea(depth=2), idea(depth=3))
    book.take("h0001")
    book.commit(HypothesisDropped("h0001", "why"))
    assert book.state("h0001") is TAKEN
    book.screen(change(depth=3))
    book.commit(HypothesisDropped("h0002", "why"))
    assert book.state("h0002") is TESTED
    book.ledger.return_hypothesis("h0001", "ada")
    book.take("h0001", ttl_s=-1)
    book.commit(HypothesisDropped("h0001", "nobody came back"))
    assert book.ledger.hypothesis("h0001").dropped_because == "nobody came back"


def test_many_who_want_the_same_idea_get_it_once(book):
    book.commit(idea(depth=2))
    got, start = [], threading.Barrier(8)

    def want(name):
        start.wait()
        with contextlib.suppress(AlreadyLeased):
            got.append(book.take("h0001", name).taken_by)

    threads = [threading.Thread(target=want, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [book.ledger.hypothesis("h0001").taken_by]


def test_the_latest_ones_in_order_of_posting(book):
    book.commit(idea(depth=2), idea(depth=3), idea(width=48))
    book.screen(change(depth=3))
    known = book.ledger.hypotheses(SCOPE, last=2)
    assert [one.id for one in known] == ["h0002", "h0003"]
    assert [one.id for one in book.ledger.hypotheses(SCOPE, state=OPEN, last=1)] == ["h0003"]


# ------------------------------------------------------------------------------ publishing


def test_what_is_known_is_not_published_again_and_the_rest_is(book):
    book.screen(change(depth=3))
    book.commit(idea(depth=2))
    assert book.commit(idea(depth=2), idea(depth=3), idea(width=48), NewInsight("x", ()))
    assert [one.variant.describe() for one in book.ledger.hypotheses()] == ["depth=2", "width=48"]
    assert len(book.ledger.insights()) == 1


def test_a_dropped_idea_does_not_come_back(book):
    book.commit(idea(depth=2), HypothesisDropped("h0001", "why"))
    book.commit(idea(depth=2))
    assert [one.state for one in book.ledger.hypotheses()] == [DROPPED]


@pytest.mark.parametrize(
    ("priority", "cost"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, -1.0)]
)
def test_what_cannot_be_ranked_is_refused(book, priority, cost):
    for room in (None, 5):
        with pytest.raises(InvariantViolated, match="finite"):
            book.commit(idea(priority, cost, depth=2), room=room)
    assert book.ledger.hypotheses() == ()


def test_a_full_exchange_takes_only_what_is_clearly_better(book):
    widths = [32, 48, 96]
    book.commit(*(idea(p, width=w) for p, w in zip((1.0, 3.0, 2.0), widths, strict=True)), room=2)
    assert [one.priority for one in book.ledger.hypotheses()] == [3.0, 2.0]
    book.commit(idea(2.9, depth=2), room=2)  # less than half as much again as the worst
    assert len(book.ledger.hypotheses()) == 2
    book.commit(idea(6.0, cost=2.0, depth=3), NewInsight("kept", ()), room=2)
    worst = book.ledger.hypotheses()[1]
    assert (worst.state, worst.priority) == (DROPPED, 2.0)
    assert "full" in worst.dropped_because
    assert "depth=3 promises 3.00" in worst.dropped_because
    assert [one.worth for one in book.ledger.hypotheses(state=OPEN)] == [3.0, 3.0]
    assert len(book.ledger.insights()) == 1


def test_one_who_publishes_thousands_fills_only_the_room(book):
    flood = [idea(float(n), lr=0.01 + n * 1e-4) for n in range(500)]
    book.commit(*flood, room=4)
    assert sorted(one.priority for one in book.ledger.hypotheses()) == [496.0, 497.0, 498.0, 499.0]
    for part in range(0, 500, 50):
        book.commit(*(idea(1.0, width=32, lr=0.02 + n * 1e-4) for n in range(part)), room=4)
    assert len(book.ledger.hypotheses()) == 4


def test_nothing_gets_in_without_room_and_what_waits_stays(book):
    book.commit(idea(1.0, depth=2))
    book.commit(idea(99.0, depth=3), NewInsight("x", ()), room=0)
    assert book.open() == ["h0001"]
    assert len(book.ledger.insights()) == 1


def test_the_same_idea_twice_in_one_commit_needs_one_place(book):
    book.commit(idea(1.0, depth=2), idea(1.0, depth=2), idea(1.0, depth=3), room=2)
    assert len(book.open()) == 2


def test_what_an_agent_drops_makes_room_at_once(book):
    book.commit(idea(5.0, depth=2), room=1)
    book.commit(idea(1.0, depth=3), HypothesisDropped("h0001", "refuted"), room=1)
    assert [(one.state, one.dropped_because) for one in book.ledger.hypotheses()] == [
        (DROPPED, "refuted"), (OPEN, None),
    ]  # fmt: skip


@pytest.mark.parametrize("cited", ["r99999", "c0001", "i0001", "st001", "h0001", "p00001", ""])
def test_insights_cite_only_what_exists(book, cited):
    book.commit(idea(depth=2))
    run = book.screen(change(depth=3))
    with pytest.raises(InvariantViolated, match="cites"):
        book.commit(NewInsight("x", (run.id, cited)))
    assert book.ledger.insights() == ()
    book.commit(NewInsight("x", (run.id,)))
    book.commit(NewInsight("y", (book.ledger.insights()[0].id,)))
    assert len(book.ledger.insights()) == 2


# ------------------------------------------------------------------------------ worth


def test_expected_value_is_the_effect_times_the_chance_that_it_is_one():
    assert exchange.expected_value(0.02, 0.0, 0.01) == 2.0
    assert exchange.expected_value(0.02, 0.02, 0.01) == pytest.approx(2 * 0.841345, abs=1e-5)
    assert exchange.expected_value(0.02, 1e9, 0.01) == pytest.approx(1.0)
    assert exchange.expected_value(-0.02, 0.01, 0.01) == 0.0


@given(
    st.floats(1e-6, 10), st.floats(0, 10), st.floats(0, 10), st.floats(1e-6, 10)
)  # fmt: skip
def test_more_doubt_is_never_worth_more(delta, se, more, noise):
    doubtful = exchange.expected_value(delta, se + more, noise)
    assert doubtful <= exchange.expected_value(delta, se, noise) <= delta / noise
    assert doubtful >= 0.5 * delta / noise


def made(variant, flops=1e9, outcome=Outcome.COMPLETED, wall_s=1.0, number=1, score=1.0):
    score = score if outcome is Outcome.COMPLETED else None
    return Run(
        f"r{number:05d}", "s001", "ada", RunKind.SCREENING, variant, 1, Split.VALIDATION, BUDGET,
        outcome, score, Cost(wall_s=wall_s, flops=flops), HERE, "", "", 0.0, float(number),
    )  # fmt: skip


def test_cost_is_learned_from_runs_with_the_same_change():
    wide = change(width=96)
    ordinary = [made(change(lr=0.01 + n / 1000)) for n in range(8)]
    assert exchange.expected_cost(wide, ordinary, ["width"]) == 1.0
    assert exchange.expected_cost(wide, [], ["width"]) == 1.0
    dear = [*ordinary, *(made(change(width=96, lr=0.02 + n / 1000), 4e9) for n in range(4))]
    assert exchange.expected_cost(wide, dear, ["width"]) == pytest.approx((4 * 2 + 2) / 6)
    slow = [*ordinary, *(made(change(width=96), outcome=Outcome.TIMED_OUT) for _ in range(2))]
    assert exchange.expected_cost(wide, slow, ["width"]) == pytest.approx((2 * 3 + 2) / 4)
    busy = [*ordinary, made(change(width=96), wall_s=100.0)]
    assert exchange.expected_cost(wide, busy, ["width"]) == 1.0


def test_hypotheses_are_ranked_by_value_per_cost():
    def waiting(priority, cost):
        return Hypothesis("h", "s", "a", "", "", BASE, priority, cost=cost)

    assert waiting(2.0, 1.0).worth > waiting(3.0, 2.0).worth
    assert exchange.worth(idea(3.0, 2.0, depth=2)) == 1.5


def test_room_is_what_will_soon_be_tested():
    assert exchange.room(4, 100, 9) == 8
    assert exchange.room(4, 20, 9) == 5
    assert exchange.room(4, 9, 9) == 0
    assert exchange.room(4, 3, 9) == 0


@given(
    st.lists(st.floats(-5, 5), max_size=8), st.lists(st.floats(-5, 5), max_size=8),
    st.integers(0, 6),
)  # fmt: skip
def test_admission_never_fills_more_than_the_room_and_drops_only_for_better(new, old, limit):
    newcomers = [idea(value, lr=0.01 + n / 1000) for n, value in enumerate(new)]
    waiting = {f"h{n}": value for n, value in enumerate(old)}
    admitted, dropped = exchange.admit(newcomers, waiting, limit)
    gone = {one.hypothesis_id for one in dropped}
    assert len(gone) == len(dropped) <= len(admitted)
    assert gone <= set(waiting)
    left = len(waiting) - len(gone) + len(admitted)
    assert left <= max(limit, len(waiting))
    best = sorted((exchange.worth(one) for one in admitted), reverse=True)
    outside = [one for one in newcomers if one not in admitted]
    assert all(exchange.worth(one) <= min(best) for one in outside if best)
    worst_gone = sorted(waiting[name] for name in gone)
    displacing = best[len(best) - len(dropped) :][::-1] if dropped else []
    assert all(better > worse for better, worse in zip(displacing, worst_gone, strict=True))


# ------------------------------------------------------------------------------ what came out


def test_a_champion_that_moves_towards_an_idea_keeps_it():
    older, newer = change(depth=2), change(depth=2, width=48)
    assert exchange.moved_on(change(depth=2, lr=0.05), older, newer)
    assert not exchange.moved_on(change(depth=2, width=48, lr=0.05), older, newer)
    assert not exchange.moved_on(change(depth=2, lr=0.05), older, older)
    assert exchange.moved_on(newer, newer, older)
    assert exchange.differing(Variant("t", {"a": 1}), Variant("t", {}, "p")) == {"a", "patch"}


def known(state=TESTED, **fields):
    return Hypothesis("h0001", "s", "ada", "", "", change(depth=2), 1.0, state, **fields)


RUN = made(change(depth=2), score=1.0, number=12)


@pytest.mark.parametrize(
    ("hypothesis", "run", "reference", "fate", "words"),
    [
        (known(OPEN), None, None, Fate.WAITING, "waiting"),
        (known(TAKEN, taken_by="ben"), None, None, Fate.TESTING, "being tested by ben"),
        (known(DROPPED, dropped_because="old"), None, None, Fate.DROPPED, "dropped: old"),
        (known(), RUN, 1.05, Fate.BETTER, "better +0.05000 (+5.0 noise sds) in run r00012 by ada"),
        (known(), RUN, 0.95, Fate.WORSE, "worse -0.05000"),
        (known(), RUN, 1.015, Fate.WITHIN_NOISE, "within noise +0.01500 (+1.5 noise sds)"),
        (known(), RUN, None, Fate.UNCOMPARED, "nothing to compare with in run r00012"),
        (known(), made(BASE, outcome=Outcome.TIMED_OUT), 1.0, Fate.FAILED, "failed (timed_out)"),
    ],
)
def test_what_came_out_is_said(hypothesis, run, reference, fate, words):
    found = exchange.outcome_of(hypothesis, run, reference=reference, noise_sd=0.01, sign=-1.0)
    assert found.fate is fate
    assert words in found.describe()


def test_the_direction_of_the_metric_counts_and_any_difference_where_no_noise_is_known():
    assert exchange.outcome_of(known(), RUN, reference=0.99, sign=1.0).fate is Fate.BETTER
    assert exchange.outcome_of(known(), RUN, reference=0.99, sign=-1.0).fate is Fate.WORSE
    assert exchange.outcome_of(known(), RUN, reference=1.0, sign=-1.0).fate is Fate.WITHIN_NOISE


def test_an_idea_is_compared_with_the_champion_of_its_time():
    runs = {
        "r2": made(change(depth=2), score=0.9, number=2),
        "r3": made(change(depth=3), score=0.7, number=40),
    }  # fmt: skip
    scores = {"baseline": 1.0, "width=48": 0.8}

    def scores_of(variant):
        return scores.get(variant.describe())

    history = [
        Champion(0, BASE, None, since=0.5),
        Champion(1, change(width=48), "c1", since=31.0, screening_run="r9"),
    ]

    def deltas(history):
        found = exchange.outcomes(
            [known(run_id="r2"), known(run_id="r3")], history, runs.__getitem__,
            scores_of,
            noise_sd=0.01, sign=-1.0,
        )  # fmt: skip
        return [outcome.delta and round(outcome.delta, 3) for _, outcome in found]

    assert deltas(history) == [0.1, 0.1]
    assert deltas(history[1:]) == [None, 0.1]


# ------------------------------------------------------------------------------ roles


def effect(knob, value, delta, se=0.001):
    return KnobEffect(knob, value, SPACE.default(knob), delta, se, 5, 0, KnobVerdict.HELPS)


@ON_SQLITE
def test_the_meta_analyst_publishes_what_a_run_brings_most_for(book):
    book.screen(BASE)
    sure, doubtful = effect("depth", 2, 0.02), effect("width", 48, 0.03, se=0.3)
    harmful, small = effect("lr", 0.01, -0.5), effect("momentum", 0.5, 0.001)
    found = hypotheses(book.view(), [small, doubtful, harmful, sure])
    assert [one.variant.describe() for one in found] == ["depth=2", "width=48"]
    assert [round(one.priority, 2) for one in found] == [2.0, 1.62]
    book.commit(*found)
    assert [h.variant.describe() for h in hypotheses(book.view(), [sure, small])] == [
        "momentum=0.5"
    ]


def crown(book, variant, run):
    """Another champion, without the claim that the ledger would ask for."""
    real = book.ledger.champions(SCOPE)
    late = Champion(len(real), variant, "c0001", book.ledger.now() + 1, run)
    book.ledger.champions = lambda scope: (*real, late)
    book.ledger.champion = lambda scope: late


@ON_SQLITE
def test_ideas_about_an_earlier_champion_are_dropped_with_a_reason(book):
    book.screen(BASE)
    book.commit(idea(depth=2), idea(depth=2, width=48))
    role = MetaAnalyst()
    assert outdated(book.view()) == ()
    assert "tidy" not in [duty.kind for duty in role.duties(book.view())]
    run = book.screen(change(width=48))
    crown(book, change(width=48), run.id)
    [duty] = [duty for duty in role.duties(book.view()) if duty.kind == "tidy"]
    outcome = asyncio.run(role.perform(duty, Seat(book)))
    [dropped] = outcome.entries
    assert dropped.hypothesis_id == "h0001"
    assert "width=48 is the champion" in dropped.reason
    book.commit(*outcome.entries)
    assert book.open() == ["h0002"]
    assert outdated(book.view()) == ()


class Seat:
    """A lab at one table: runs end with the score the test wants, or as it says."""

    def __init__(self, book, score=1.0, fails=None):
        self.book, self.score, self.fails = book, score, fails
        self.agent, self.screened = "ada", []

    @property
    def view(self):
        return self.book.view()

    @property
    def brain(self):
        return self

    async def propose(self, knowledge):
        raise AssertionError("an open hypothesis comes first")

    def knowledge(self):
        return self.view.knowledge()

    def archive(self):
        return Archive(SPACE).read(self.view.screenings, [self.view.champion])

    def open_hypotheses(self):
        waiting = self.book.ledger.hypotheses(SCOPE, state=OPEN)
        return sorted(waiting, key=lambda one: -one.worth)

    def take(self, id):
        return self.book.take(id)

    def give_back(self, id):
        self.book.ledger.return_hypothesis(id, self.agent)

    async def screen(self, variant, idea):
        assert self.book.ledger.hypotheses(state=TAKEN)[0].variant == variant
        if self.fails is not None:
            raise self.fails
        self.screened.append(variant.describe())
        return self.book.screen(variant, self.score)


PROPOSE = Duty("experimenter", "propose")


@ON_SQLITE
def test_experimenters_test_the_worthiest_first(book):
    book.screen(BASE)
    book.commit(idea(2.0, depth=2), idea(5.0, 4.0, width=48), idea(1.5, depth=3))
    seat = Seat(book)
    for _ in range(3):
        asyncio.run(Experimenter().perform(PROPOSE, seat))
    assert seat.screened == ["depth=2", "depth=3", "width=48"]
    assert [one.state for one in book.ledger.hypotheses()] == [TESTED] * 3
    assert {one.taken_by for one in book.ledger.hypotheses()} == {"ada"}


@ON_SQLITE
@pytest.mark.parametrize("error", [ExecutorError("gone"), AlreadyLeased("x"), KeyError("x")])
def test_an_idea_that_could_not_be_run_is_returned(book, error):
    book.screen(BASE)
    book.commit(idea(depth=2))
    with pytest.raises(type(error)):
        asyncio.run(Experimenter().perform(PROPOSE, Seat(book, fails=error)))
    assert book.open() == ["h0001"]


@ON_SQLITE
def test_a_run_that_failed_closes_the_idea_as_well(book):
    book.screen(BASE)
    book.commit(idea(depth=2))
    asyncio.run(Experimenter().perform(PROPOSE, Seat(book, score=None)))
    assert book.state("h0001") is TESTED


@ON_SQLITE
def test_an_idea_that_somebody_else_took_meanwhile_is_passed_over(book):
    book.screen(BASE)
    book.commit(idea(2.0, depth=2), idea(1.0, depth=3))

    class Late(Seat):
        def open_hypotheses(self):
            seen = super().open_hypotheses()
            if self.book.state("h0001") is OPEN:
                self.book.take("h0001", "ben")
            return seen

        async def screen(self, variant, idea):
            return self.book.screen(variant, self.score)

    asyncio.run(Experimenter().perform(PROPOSE, Late(book)))
    assert [one.state for one in book.ledger.hypotheses()] == [TAKEN, TESTED]


@ON_SQLITE
def test_what_a_run_has_answered_within_tolerance_is_dropped_instead_of_run(book):
    book.screen(BASE)
    run = book.screen(change(lr=0.02))
    book.commit(idea(2.0, lr=0.02 * (1 + 1e-4)), idea(1.0, depth=3))
    seat = Seat(book)
    outcome = asyncio.run(Experimenter().perform(PROPOSE, seat))
    assert seat.screened == ["depth=3"]
    [dropped] = outcome.entries
    assert dropped.hypothesis_id == "h0001"
    assert run.id in dropped.reason


# ------------------------------------------------------------------------------ the laboratory


def laboratory(book, slots=2, left=100, **settings):
    lab = Laboratory.__new__(Laboratory)
    lab.ledger, lab.scope, lab.charter = book.ledger, SCOPE, Charter()
    lab.settings = Settings(task="synthetic", runs=200, **settings)
    lab.record = book.ledger.society(book.society)
    lab.executor = type("Slots", (), {"slots": slots})()
    lab.brain = None
    lab.view = lambda: book.view(left)
    return lab


@ON_SQLITE
def test_the_room_follows_the_budget(book):
    assert laboratory(book).room == 4
    assert laboratory(book, left=13).room == 2
    assert laboratory(book, left=9).room == 0


@ON_SQLITE
def test_agents_that_know_only_their_own_runs_see_no_hypotheses(book):
    book.commit(idea(depth=2))
    assert [one.id for one in Bench(laboratory(book), "a01").open_hypotheses()] == ["h0001"]
    alone = laboratory(book, knowledge="own")
    assert Bench(alone, "a01").open_hypotheses() == ()
    assert alone.room == 0


@ON_SQLITE
def test_a_bench_takes_in_the_name_of_its_agent_and_society(book):
    book.commit(idea(1.0, depth=2), idea(4.0, cost=2.0, depth=3))
    bench = Bench(laboratory(book), "a01")
    assert [one.id for one in bench.open_hypotheses()] == ["h0002", "h0001"]
    assert bench.take("h0001").taken_by == "a01"
    Bench(laboratory(book), "a02").give_back("h0001")
    assert book.state("h0001") is TAKEN
    bench.give_back("h0001")
    assert book.state("h0001") is OPEN


class Watching:
    """A display that counts what is open, several times a second."""

    def start(self, laboratory):
        self.most = 0

    def show(self, laboratory):
        seen = len(laboratory.ledger.hypotheses(laboratory.scope, state=OPEN))
        self.most = max(self.most, seen)

    def stop(self):
        pass


@pytest.mark.parametrize("knowledge", ["shared", "own"])
@pytest.mark.slow
def test_a_role_that_floods_the_exchange_gets_no_more_than_the_room(tmp_path, knowledge):
    chosen = Settings(
        task="synthetic", agents=4, slots=2, runs=50, seed=3, knowledge=knowledge,
        extra_roles=("flooding:Flooder",),
    )  # fmt: skip
    watching = Watching()
    folder = NotebookFolder(tmp_path)
    app.run_society(folder, chosen, resume=False, display=watching, console=False)
    with Ledger.open(tmp_path, read_only=True) as ledger:
        known = ledger.hypotheses()
        floods = len([one for one in ledger.insights() if one.text.startswith("flood")])
        screened = ledger.runs(kinds=[RunKind.SCREENING])
    assert floods >= 5
    if knowledge == "own":
        assert known == ()
        return
    assert watching.most <= exchange.PER_SLOT * 2
    tested = [one for one in known if one.state is TESTED]
    assert len(tested) >= 5
    assert {one.run_id for one in tested} <= {run.id for run in screened}
    full = [one for one in known if one.state is DROPPED]
    assert full
    assert all(one.dropped_because for one in full)
    assert len(known) < floods * 25 / 2
