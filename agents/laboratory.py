"""What all agents of a society share: the notebook, the executor, the budget, the floor.

`Laboratory` is the society's; `Bench` is one agent's place in it and implements `roles.Lab`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from society import exchange, logs
from society.experiments.patches import rules_of
from society.provenance import keep_patch
from society.records import (
    Decision,
    HypothesisState,
    NewHypothesis,
    RunKind,
    SocietyState,
    Trial,
    Work,
)
from society.roles.base import Background, BudgetLeft, Interrupted
from society.roles.novelty import Archive, unsaid
from society.roles.view import View

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from society.agents.floor import Floor
    from society.agents.recollection import Recollection
    from society.experiments.executor import Executor
    from society.experiments.space import Space
    from society.experiments.task import Task
    from society.memory.ledger import Ledger
    from society.memory.recall import Hit
    from society.memory.tally import Spent
    from society.records import (
        Entry,
        Hypothesis,
        Insight,
        Lease,
        Run,
        Scope,
        SocietyRecord,
        Variant,
    )
    from society.roles.base import Brain, Charter, Duty, Knowledge, Proposal, Role
    from society.settings import Settings

T = TypeVar("T")

LEASE_S = 120.0
"""Seconds a lease lives without a heartbeat; heartbeats come three times as often."""
SEARCH_KINDS = (
    RunKind.SCREENING, RunKind.CALIBRATION, RunKind.VERIFICATION, RunKind.REPRODUCTION,
)  # fmt: skip
"""Runs that a society's next steps may depend on."""
FIRST_GUESS_S = 5.0
"""Assumed duration of a run until the first one has finished."""
STORYTELLER = "narrator"
"""Who tells a society's story at its end."""
TOLD = 8
"""Latest claims, insights, refusals and failed runs, and nearest passages, that a brain is told."""


@dataclass(slots=True)
class Doing:
    """What an agent is doing, for the live view."""

    role: str = ""
    kind: str = "waiting"
    why: str = ""
    since: float = 0.0


class Laboratory:
    """The shared workplace of one society. Belongs to one event loop."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        recall: Recollection | None,
        executor: Executor,
        task: Task,
        space: Space,
        scope: Scope,
        brain: Brain,
        settings: Settings,
        record: SocietyRecord,
        floor: Floor,
        charter: Charter,
        began: float,
    ) -> None:
        """See `society.app`, which composes it; `began` is when it started (monotonic)."""
        self.ledger, self.recall, self.executor = ledger, recall, executor
        self.task, self.space, self.scope = task, space, scope
        self.brain, self.settings, self.record = brain, settings, record
        self.floor, self.charter = floor, charter
        self.doing: dict[str, Doing] = {}
        self.draining = False
        self._tickets = 0
        self._undecided = 0
        self._thoughts: set[asyncio.Future[Any]] = set()
        self._crews: Counter[tuple[str, str, str]] = Counter()
        self._dry: dict[tuple[str, str, str], int] = {}
        self._surveys: dict[str, tuple[View, list[Duty]]] = {}
        self._view: tuple[tuple[object, ...], View] | None = None
        self._archives: dict[str | None, Archive] = {}
        self._began = began
        self._log = logs.get("laboratory")

    # ---------------------------------------------------------------- budget

    @property
    def wall_s(self) -> float:
        """Seconds this society has worked, earlier sessions included."""
        return self.record.wall_s + time.monotonic() - self._began

    def budget(self) -> BudgetLeft:
        """What may still be spent, runs under way counted as spent."""
        spent = self.ledger.spent(self.record.id)
        limits, seconds = [10**9], None
        if self.settings.runs is not None:
            limits.append(self.settings.runs)
        if self.settings.minutes is not None:
            seconds = max(0.0, 60 * self.settings.minutes - self.wall_s)
            limits.append(self._runs_within(seconds, spent) + spent.runs)
        total = min(limits)
        left = max(0, total - spent.runs - spent.under_way)
        if self.draining or self._reached_goal():
            left = 0
        return BudgetLeft(spent.runs, left, total, seconds)

    def _runs_within(self, seconds: float, spent: Spent) -> int:
        """Runs that can be finished in `seconds`, by the mean duration so far."""
        mean = spent.wall_s / spent.runs if spent.runs else FIRST_GUESS_S
        return int(seconds * self.executor.slots / max(1e-3, mean))

    def _reached_goal(self) -> bool:
        goal = self.settings.until
        if goal is None:
            return False
        champion = self.ledger.champion(self.scope)
        if champion is None or champion.claim_id is None:
            return False
        if not self.ledger.claim(champion.claim_id).verdict_is(Decision.CONFIRMED):
            return False
        pool = self.ledger.pool(self.scope, champion.variant).values()
        scores = [score for score in pool if score is not None]
        mean = sum(scores) / len(scores)
        return self.task.direction.improvement(goal, mean) >= 0

    def save(self, state: SocietyState) -> None:
        """Record where the society stands: wall time and slot utilisation over all sessions."""
        before = self.record.wall_s * (self.record.busy or 0.0)
        busy = (before + self.executor.busy_s / self.executor.slots) / max(1e-9, self.wall_s)
        self.ledger.set_society_state(self.record.id, state, busy=busy, wall_s=self.wall_s)

    def idle(self) -> Doing:
        """What an agent that waits is doing."""
        return Doing(since=time.monotonic())

    def drain(self) -> None:
        """Begin nothing any more: runs under way are finished, thoughts are given up."""
        self.draining = True
        for thought in self._thoughts:
            thought.cancel()
        self.floor.poke()

    # ---------------------------------------------------------------- survey

    def view(self) -> View:
        """The notebook as it is now; one object per state of the notebook."""
        state = (self.ledger.version(), self.draining, self._budget_clock())
        if self._view is None or self._view[0] != state:
            view = View(
                self.ledger,
                scope=self.scope,
                society=self.record.id,
                task=self.task,
                space=self.space,
                charter=self.charter,
                budget=self.budget(),
                entropy=self.record.seed,
            )
            self._view = (state, view)
        return self._view[1]

    def archive(self, agent: str | None = None) -> Archive:
        """All screening runs up to now, or one agent's; only what is new of them is read."""
        if agent not in self._archives:
            self._archives[agent] = Archive(self.space, agent)
        champions = self.ledger.champions(self.scope)
        return self._archives[agent].read(self.view().screenings, champions)

    def _budget_clock(self) -> int:
        """Whole seconds, if the budget runs out by the clock; constant otherwise."""
        return int(self.wall_s) if self.settings.minutes is not None else 0

    def open_duties(self, roles: Sequence[Role], agent: str) -> list[Duty]:
        """What the agent may do now, most valuable first; ties in the order of the roles."""
        view = self.view()
        found = [duty for role in roles for duty in self._survey(role, view)]
        taken = [duty for duty in found if self._may(duty, agent, view)]
        return sorted(taken, key=lambda duty: -duty.value)

    def _survey(self, role: Role, view: View) -> list[Duty]:
        """A role's duties; asked once per view. The view is kept, so that `is` can be relied on."""
        seen, duties = self._surveys.get(role.name, (None, []))
        if seen is not view:
            duties = list(role.duties(view))
            self._surveys[role.name] = (view, duties)
        return duties

    def _may(self, duty: Duty, agent: str, view: View) -> bool:
        if self.draining or agent in duty.barred or self._crews[duty.key] >= duty.crew:
            return False
        if self._dry.get(duty.key) == view.budget.spent_runs:
            return False
        if not duty.needs_slot:
            return True
        return view.budget.runs > self._undecided and self._tickets < self.capacity

    @property
    def capacity(self) -> int:
        """Runs that may be under way or queued.

        One run beside each two slots waits its turn, so that no slot idles while an agent thinks;
        none does with a single slot, which makes such a society repeatable. Where thinking takes as
        long as a run, as with a language model, every agent may be at it.
        """
        if self.thinks_slowly:
            return max(self.settings.agents, self.executor.slots)
        return self.executor.slots + self.executor.slots // 2

    @property
    def thinks_slowly(self) -> bool:
        """Whether others go on while an agent waits for its brain."""
        return bool(getattr(self.brain, "slow", False))

    @property
    def room(self) -> int:
        """How many hypotheses may be open: no more than will soon be tested, see `exchange`."""
        if self.settings.knowledge != "shared":  # nobody would see them
            return 0
        return exchange.room(
            self.executor.slots, self.view().budget.runs, self.charter.closing_runs
        )

    # ---------------------------------------------------------------- other societies

    @property
    def preparing(self) -> bool:
        """Whether the search cannot begin yet: noise floor or the champion's screening are due."""
        view = self.view()
        return view.noise is None or view.champion_screening is None

    def runs_of_others(self) -> frozenset[int]:
        """Runs of other societies on this ledger that may give this one something to do.

        By fencing token; none when this society may make no run of its own any more.
        """
        if self.view().budget.runs <= 0:
            return frozenset()
        return frozenset(
            lease.token
            for lease in self.ledger.leases(self.scope)
            if lease.society != self.record.id and lease.kind in SEARCH_KINDS
        )

    def look_again(self) -> None:
        """Survey anew although nothing was written here: a lease of others may have expired."""
        self._view = None
        self._dry.clear()
        self.floor.poke()

    # ---------------------------------------------------------------- crews and tickets

    def sign_up(self, duty: Duty) -> None:
        """Count an agent into a duty's crew, and its run against the capacity and the budget."""
        self._crews[duty.key] += 1
        self._tickets += duty.needs_slot
        self._undecided += duty.needs_slot

    def committed(self) -> None:
        """An agent that signed up has leased its run: the notebook counts it from now on."""
        self._undecided -= 1

    def sign_off(self, duty: Duty, *, fruitful: bool, committed: bool = True) -> None:
        """Undo `sign_up`; a fruitless duty is not offered again until another run has finished."""
        self._crews[duty.key] -= 1
        self._tickets -= duty.needs_slot
        self._undecided -= duty.needs_slot and not committed
        if not fruitful:
            self._dry[duty.key] = self.view().budget.spent_runs

    def lapsed(self, duty: Duty) -> None:
        """The notebook refused what the duty led to: not offered again before another run."""
        self._dry[duty.key] = self.view().budget.spent_runs

    # ---------------------------------------------------------------- entries

    def unsaid(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The entries, with a refusal for each hypothesis that is on record in other words."""
        if not any(isinstance(entry, NewHypothesis) for entry in entries):
            return tuple(entries)
        return unsaid(entries, self.ledger.hypotheses(self.scope), self.space)

    # ---------------------------------------------------------------- runs

    async def execute(self, lease: Lease) -> Run:
        """Run what is leased while others have the floor; record it whatever its outcome."""
        work = Work(lease.run_id, lease.variant, lease.seed, lease.split, self.task.budget)
        self.floor.leave()
        job = asyncio.ensure_future(self.executor.run(work))
        try:
            while not (await asyncio.wait({job}, timeout=LEASE_S / 3))[0]:
                lease = self.ledger.heartbeat(lease, LEASE_S)
        except asyncio.CancelledError:
            job.cancel()
            raise
        finally:
            await self.floor.come_back()
        run = self.ledger.finish(lease, job.result(), self.executor.environment, self.task.budget)
        self._log.info(
            "run finished", run=run.id, agent=run.agent, kind=run.kind.value,
            outcome=run.outcome.value, score=run.score, variant=run.variant.describe(),
            wall_s=round(run.cost.wall_s, 2),
        )  # fmt: skip
        return run

    # ---------------------------------------------------------------- thoughts

    async def aside(self, thought: Awaitable[T]) -> T:
        """Await something slow while others have the floor; given up when the society stops.

        Raises:
            Interrupted: The society stops.
        """
        job = asyncio.ensure_future(thought)
        if self.draining:
            job.cancel()
        self._thoughts.add(job)
        self.floor.leave()
        try:
            await asyncio.wait({job})
        except asyncio.CancelledError:
            job.cancel()
            raise
        finally:
            self._thoughts.discard(job)
            await self.floor.come_back()
        if self.draining or job.cancelled():
            if not job.cancelled():
                job.exception()  # nobody else will look at it
            raise Interrupted("The society stops.")
        return job.result()

    async def trial(self, variant: Variant) -> Trial:
        """Try a code change for a few steps, aside."""
        tried: Trial = await self.aside(self.executor.trial(variant))
        if tried.problem:
            self._log.info("code not run", variant=variant.describe(), reason=tried.problem)
        return tried

    def background(self, agent: str | None) -> Background:
        """What a brain that reads is told besides; of one agent alone, if it works on its own."""
        view, task = self.view(), self.task
        shared = agent is None
        better = "lower" if task.direction.sign < 0 else "higher"
        budget = f"{task.budget.amount:g} {task.budget.kind.value}"
        failed = [run for run in view.screenings if run.score is None]
        refusals = [one for one in self.ledger.refusals(self.scope) if shared or one.agent == agent]
        waiting = self.waiting() if shared else ()
        return Background(
            about=f"{task.metric}: what is improved, in {task.unit}; {better} is better. "
            f"The task is {task.key}; every training may spend {budget}.",
            budget=view.budget,
            noise=view.noise,
            sources=dict(task.sources()) if hasattr(task, "sources") else {},
            rules=rules_of(task),
            champions=tuple(
                (one, view.board.score(one.variant.fingerprint))
                for one in self.ledger.champions(self.scope)
            ),
            claims=view.claims[-TOLD:] if shared else (),
            hypotheses=tuple(waiting),
            insights=self._insights() if shared else (),
            refusals=tuple(refusals[-TOLD:]),
            failed=tuple([run for run in failed if shared or run.agent == agent][-TOLD:]),
            recalled=tuple(self._recalled(waiting)) if shared else (),
        )

    def waiting(self) -> Sequence[Hypothesis]:
        """Open hypotheses, those with most value per cost first."""
        waiting = self.ledger.hypotheses(self.scope, state=HypothesisState.OPEN)
        return sorted(waiting, key=lambda one: -one.worth)

    def _insights(self) -> tuple[Insight, ...]:
        """The latest; not the stories that were told of finished societies."""
        latest = self.ledger.insights(self.scope, last=2 * TOLD)
        return tuple(one for one in latest if one.author != STORYTELLER)[-TOLD:]

    def _recalled(self, waiting: Sequence[Hypothesis]) -> Sequence[Hit]:
        """The nearest passages to the champion and the best open idea; no story among them."""
        champion = self.view().champion.variant.describe()
        text = " ".join([f"What improves {champion}?", *(one.statement for one in waiting[:1])])
        hits = self.search(text, 2 * TOLD)
        return [hit for hit in hits if hit.passage.agent != STORYTELLER][:TOLD]

    # ---------------------------------------------------------------- recall

    async def remember(self) -> None:
        """Bring recall up to date while others work; the society goes on if it is down."""
        if self.recall is not None:
            await asyncio.to_thread(self.recall.sync)

    def search(self, text: str, k: int) -> Sequence[Hit]:
        """Nearest prose in the notebook; empty while recall is down or off."""
        return () if self.recall is None else self.recall.search(text, k)


class Bench:
    """One agent's place in the laboratory; implements `society.roles.Lab`."""

    def __init__(self, laboratory: Laboratory, agent: str, *, needs_slot: bool = False) -> None:
        """Seat `agent` in `laboratory`; `needs_slot` if its duty is to make a run."""
        self._lab = laboratory
        self.needs_slot = needs_slot
        self.agent = agent
        self.brain = laboratory.brain
        self.runs_made = 0

    @property
    def view(self) -> View:
        """The notebook as it is now."""
        return self._lab.view()

    async def propose(self, knowledge: Knowledge) -> Proposal:
        """See `Lab.propose`."""
        if not self._lab.thinks_slowly:
            return await self.brain.propose(knowledge)
        return await self.aside(self.brain.propose(knowledge))

    async def aside(self, thought: Awaitable[T]) -> T:
        """See `Lab.aside`."""
        self._say("thinks")
        found = await self._lab.aside(thought)
        trouble = getattr(self.brain, "trouble", "")
        self._say(f"by search: {trouble}" if trouble else "has thought")
        self._check_room()
        return found

    async def trial(self, variant: Variant) -> Trial:
        """See `Lab.trial`."""
        self._say("tries its code")
        tried = await self._lab.trial(variant)
        self._check_room()
        return tried

    def _say(self, what: str) -> None:
        """Tell the live view."""
        doing = self._lab.doing.get(self.agent)
        if doing is not None:
            self._lab.doing[self.agent] = replace(doing, why=what)

    def _check_room(self) -> None:
        """Whoever has a ticket and has not begun its run may find the budget spent by now."""
        if self.needs_slot and not self.runs_made and self.view.budget.runs <= 0:
            raise Interrupted("The budget was spent meanwhile.")

    async def screen(self, variant: Variant, idea: str) -> Run:
        """See `Lab.screen`."""
        lab = self._lab
        keep_patch(lab.ledger, lab.task, variant)
        lease = lab.ledger.lease_screening(
            lab.scope, lab.record.id,
            holder=self.agent, variant=variant, idea=idea, ttl_s=LEASE_S,
        )  # fmt: skip
        return await self._run(lease)

    async def measure(self, variant: Variant, kind: RunKind, claim_id: str | None = None) -> Run:
        """See `Lab.measure`."""
        lab = self._lab
        lease = lab.ledger.lease_next_seed(
            lab.scope, lab.record.id,
            holder=self.agent, variant=variant, kind=kind, claim_id=claim_id, ttl_s=LEASE_S,
        )  # fmt: skip
        return await self._run(lease)

    async def reproduce(self, claim_id: str) -> Run:
        """See `Lab.reproduce`."""
        lab = self._lab
        lease = lab.ledger.lease_reproduction(
            lab.scope, lab.record.id, holder=self.agent, claim_id=claim_id, ttl_s=LEASE_S
        )
        return await self._run(lease)

    def knowledge(self) -> Knowledge:
        """See `Lab.knowledge`."""
        alone = None if self._shared else self.agent
        known = replace(self.view.knowledge(alone), agent=self.agent)
        if not self._lab.thinks_slowly:
            return known
        return replace(known, background=self._lab.background(alone))

    def archive(self) -> Archive:
        """See `Lab.archive`."""
        return self._lab.archive(None if self._shared else self.agent)

    def recall(self, text: str, k: int = 5) -> Sequence[Hit]:
        """See `Lab.recall`."""
        return self._lab.search(text, k) if self._shared else ()

    def open_hypotheses(self) -> Sequence[Hypothesis]:
        """See `Lab.open_hypotheses`."""
        if not self._shared:  # they are distilled from everybody's runs
            return ()
        return self._lab.waiting()

    def take(self, hypothesis_id: str) -> Hypothesis:
        """See `Lab.take`."""
        lab = self._lab
        return lab.ledger.take_hypothesis(hypothesis_id, lab.record.id, self.agent, LEASE_S)

    def give_back(self, hypothesis_id: str) -> None:
        """See `Lab.give_back`."""
        lab = self._lab
        lab.ledger.return_hypothesis(hypothesis_id, self.agent, society=lab.record.id)

    @property
    def _shared(self) -> bool:
        """Whether the agent may know what others found."""
        return self._lab.settings.knowledge == "shared"

    async def _run(self, lease: Lease) -> Run:
        if self.needs_slot and not self.runs_made:
            self._lab.committed()
        self.runs_made += 1
        return await self._lab.execute(lease)
