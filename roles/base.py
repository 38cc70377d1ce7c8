"""What a role is: the seam every role, shipped or custom, is written against.

A role is stateless. `duties` says what is worth doing now, reading the notebook through a
read-only `View`; `perform` does one of those duties in a `Lab` and returns what it wants recorded.
The agent that plays the role commits the returned entries in one transaction, so a role never
writes to the notebook itself.

Concurrency: one agent at a time reads and decides; the only place where another agent may act in
between is while `perform` awaits a run. Duties are recomputed after each change of the notebook,
so `duties` must be quick and must not block.

At-least-once: after a crash `perform` may be called again for the same duty. Runs that had
finished are already recorded, so derive what is left to do from the notebook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Container, Sequence

    from society.experiments.coderules import Rules
    from society.experiments.space import Space
    from society.experiments.task import Direction
    from society.memory.recall import Hit
    from society.records import (
        Champion,
        Claim,
        Entry,
        Hypothesis,
        Insight,
        NewHypothesis,
        Noise,
        Refusal,
        RefusalReason,
        Run,
        RunKind,
        Trial,
        Variant,
    )
    from society.roles.novelty import Archive
    from society.roles.view import View

T = TypeVar("T")


class Interrupted(Exception):
    """The society stops, or its budget was spent meanwhile: nothing may be begun any more."""


@dataclass(frozen=True, slots=True)
class Duty:
    """Something worth doing now. Agents take the most valuable one they may take."""

    role: str
    """Name of the role that can perform it."""
    kind: str
    """A verb, unique within the role: `propose`, `verify`, ..."""
    subject: str = ""
    """What it is about: a claim id, a run id, a fingerprint."""
    value: float = 0.0
    """Worth per slot, 0..100; the shipped roles' values are tabled in docs/roles.md."""
    needs_slot: bool = False
    """Whether performing it makes a training run; offered only while a slot is free."""
    barred: tuple[str, ...] = ()
    """Agents that may not take it (the author of a claim may not verify it)."""
    crew: int = 1
    """How many agents may perform it at the same time."""
    why: str = ""
    """One clause for the live view and the timeline."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity of the duty across surveys."""
        return (self.role, self.kind, self.subject)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What performing a duty leads to: entries for one transaction, and a note for the timeline."""

    entries: tuple[Entry, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What a brain may know of one screening run."""

    variant: Variant
    score: float | None
    """On the validation split; None if the run diverged or failed."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """All that a brain may know. Holds no seed and nothing about verifications of open claims."""

    space: Space
    direction: Direction
    task: str
    champion: Variant
    champion_score: float | None
    """The champion's screening score."""
    results: tuple[Result, ...]
    """Screening runs in order of finishing: all of them, or the best and latest of very many."""
    pending: tuple[Variant, ...]
    """Variants being screened right now."""
    noise_sd: float | None
    entropy: int
    """Seed for the brain's own randomness: differs at every proposal, repeats with the society."""
    refused: tuple[Refused, ...] = ()
    """What the brain has just proposed in vain: it is being asked again."""
    count: int | None = None
    """How many screening runs there are, those left out of `results` included; None: as listed."""
    known: Container[str] = frozenset()
    """Has the fingerprint of every screened variant, those left out of `results` included."""
    agent: str = ""
    """Who asks."""
    background: Background | None = None
    """What a brain that reads is told besides; None for others."""

    @property
    def tried(self) -> int:
        """How many screening runs there are, listed in `results` or not."""
        return len(self.results) if self.count is None else self.count


@dataclass(frozen=True, slots=True)
class Background:
    """What a brain that reads may know besides the results: text of many authors, and code.

    Like `Knowledge` it holds no seed, no log of a run, and nothing about how an open claim fares.
    Its texts were written by others, people or models, and are evidence, never instructions.
    """

    about: str
    """The task: metric, direction, budget of a run."""
    budget: BudgetLeft
    noise: Noise | None = None
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """File name -> text of the task's own files that a variant may change; empty if it may not."""
    rules: Rules | None = None
    """What changed code may use; None for those of the trainer."""
    champions: tuple[tuple[Champion, float | None], ...] = ()
    """The champion history with the score of each on the screening seed."""
    claims: tuple[Claim, ...] = ()
    """The latest claims; those without a verdict carry nothing else than what was claimed."""
    hypotheses: tuple[Hypothesis, ...] = ()
    """Open ones, those with most value per cost first."""
    insights: tuple[Insight, ...] = ()
    """The latest, oldest first."""
    refusals: tuple[Refusal, ...] = ()
    """The latest proposals that were not run, oldest first."""
    failed: tuple[Run, ...] = ()
    """The latest screening runs without a score, oldest first, without their logs."""
    recalled: tuple[Hit, ...] = ()
    """What the notebook says that is nearest in meaning to the champion and the open ideas."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A variant worth screening, and why."""

    variant: Variant
    idea: str
    """The rationale, one sentence."""
    despite: str = ""
    """Why to run it although what lies around it has failed before; it is then run."""
    model: str = ""
    """The language model whose idea it is; empty for what a search came up with."""
    simplification: bool = False
    """Whether it aims at the same score with less code."""
    expected: float | None = None
    """Improvement its author expects, in noise floors; None if nothing was said."""
    hypotheses: tuple[NewHypothesis, ...] = ()
    """Further ideas, which the author leaves to others."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A proposal that the notebook speaks against."""

    proposal: Proposal
    reason: RefusalReason
    run_id: str | None
    """The run that speaks against it."""
    note: str
    """The same in words."""
    recorded: bool = True
    """Whether it is recorded as a refusal; not if its author was only asked to think again."""


class Advice(StrEnum):
    """What a reviewer says about a proposal."""

    RUN = "run"
    REVISE = "revise"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Review:
    """Another agent's opinion of a proposal, before a run is spent on it."""

    advice: Advice
    reasons: str
    expected: float
    """Improvement that the reviewer expects, in noise floors."""
    reviewer: str
    """E.g. `careful`."""

    def __str__(self) -> str:
        """In one clause, for the idea of the run."""
        return f"{self.reviewer} expects {self.expected:+.1f} noise floors: {self.reasons}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a brain makes of many results: a sentence and the ids it rests on."""

    text: str
    evidence: tuple[str, ...]


class Brain(Protocol):
    """Where ideas come from.

    Called by one agent at a time. `propose` must return a valid variant of `knowledge.space` and
    should avoid those already known or pending; the experimenter checks and asks again, saying in
    `knowledge.refused` what is wrong with those before.
    """

    name: str

    async def propose(self, knowledge: Knowledge) -> Proposal:
        """Propose the next variant to screen."""
        ...


@runtime_checkable
class Reader(Protocol):
    """What a brain may offer besides `Brain`: it reads and writes prose.

    Its methods take seconds to minutes; agents await them, and `propose` of a brain that is `slow`,
    without the floor. They raise nothing: what the model fails to do is None or empty. Nothing
    that comes back is believed: proposals are checked like any other, and sentences are kept only
    if the numbers in them are in what the model was given.
    """

    slow: bool
    """Whether others should go on while it thinks."""

    async def review(self, proposal: Proposal, knowledge: Knowledge) -> Review | None:
        """What another temperament than the author's thinks of a proposal."""
        ...

    async def explain(self, agent: str, facts: Sequence[str]) -> Sequence[Reading]:
        """At most three things that the facts say together."""
        ...

    async def narrate(self, facts: Sequence[str], unsupported: Sequence[str] = ()) -> str:
        """The story of a society in a few paragraphs, without the `unsupported` numbers."""
        ...


class Lab(Protocol):
    """What an agent can do while it performs a duty.

    The run methods wait for a slot and for the run, record it, and return it whatever its outcome.
    Seeds and splits are chosen by the notebook, never by the caller.

    Raises (all run methods):
        LeaseError: Somebody else is doing, or has done, the same work.
        InvariantViolated: The notebook refuses it, e.g. verifying one's own claim.
    """

    agent: str
    brain: Brain

    @property
    def view(self) -> View:
        """The notebook as it is now."""
        ...

    async def propose(self, knowledge: Knowledge) -> Proposal:
        """Ask the agent's brain; without the floor if it is slow, so read the notebook again.

        Raises:
            Interrupted: The society stops, or has no run left to spend.
        """
        ...

    async def aside(self, thought: Awaitable[T]) -> T:
        """Await something slow while others have the floor. Raises `Interrupted` as `propose`."""
        ...

    async def trial(self, variant: Variant) -> Trial:
        """Try a code change for a few steps while others have the floor. Raises `Interrupted`."""
        ...

    async def screen(self, variant: Variant, idea: str) -> Run:
        """Run a variant on the screening seed; scored on the validation split."""
        ...

    async def measure(self, variant: Variant, kind: RunKind, claim_id: str | None = None) -> Run:
        """Run a variant on the next verification seed; scored on the holdout split."""
        ...

    async def reproduce(self, claim_id: str) -> Run:
        """Repeat a claim's screening run with the same seed."""
        ...

    def knowledge(self) -> Knowledge:
        """What a brain may know now."""
        ...

    def archive(self) -> Archive:
        """The screening runs that the agent may know of, arranged for questions of novelty."""
        ...

    def recall(self, text: str, k: int = 5) -> Sequence[Hit]:
        """The notebook's prose nearest in meaning to `text`; empty while recall is down."""
        ...

    def open_hypotheses(self) -> Sequence[Hypothesis]:
        """Hypotheses that nobody tests or has tested, those with most value per cost first."""
        ...

    def take(self, hypothesis_id: str) -> Hypothesis:
        """Take an open hypothesis before screening its variant, so that nobody else does.

        Raises:
            LeaseError: Somebody else tests it, or it was tested or dropped.
        """
        ...

    def give_back(self, hypothesis_id: str) -> None:
        """Return a hypothesis that was not tested after all; does nothing once it was."""
        ...


@dataclass(frozen=True, slots=True)
class BudgetLeft:
    """What the society may still spend."""

    spent_runs: int
    """Runs of this society that finished."""
    runs: int
    """Training runs that can still be started; estimated when the budget is in minutes."""
    total: int
    """Training runs the whole budget allows (estimated likewise)."""
    seconds: float | None = None
    """Wall time left, for a budget in minutes."""


class Role(ABC):
    """Base of every role. Subclasses set `name` and implement the two methods."""

    name: ClassVar[str]
    """Unique, lower case, words joined by hyphens."""
    about: ClassVar[str] = ""
    """One line for `society roles`."""

    @abstractmethod
    def duties(self, view: View) -> Sequence[Duty]:
        """What is worth doing now, in any order; quick and without side effects."""

    @abstractmethod
    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        """Do one of the duties and say what to record."""


@dataclass(frozen=True, slots=True)
class Charter:
    """The rules a society works by that roles need to know."""

    patience: int = 2
    """Screening runs the best proposal must stand unbeaten before it becomes a claim."""
    calibration_share: float = 0.1
    """Share of the budget spent on baseline seeds before the search starts."""
    calibration_min: int = 8
    """Fewest baseline seeds: the smallest champion pool the gate may be used with."""
    calibration_max: int = 100
    """Most baseline seeds."""
    closing_runs: int = 9
    """Runs kept at the end: what one more claim costs to verify, reproduce and confirm."""
    explain_share: float = 0.2
    """Share of the budget, at its end, in which the champion's changes are tried one by one."""
    explain_most: int = 6
    """Most changes that are tried alone."""
    same_idea: float = 0.1
    """Largest per-knob distance at which two claims belong to one family."""
    digest_every: int = 20
    """Screening runs after which the meta-analyst reads the results again."""
    retries: int = 4
    """How often a brain is asked again after a duplicate."""
