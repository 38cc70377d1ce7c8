"""Whether a proposal is worth a run, judged by what the notebook knows; docs/novelty.md.

Four questions, in this order, each cheaper to defend than the next:

1. Was exactly this run, or is it being run? (fingerprint)
2. Was it run but for differences that no knob tells apart? (every knob within its tolerance)
3. Has it failed before? (the same changes in an earlier run, or all that lies nearest to it)
4. What is on record that reads alike? (recall; this is told, and decides nothing)

The first three decide, and only they: prose cannot tell 0.04 from 0.06. A proposal from a dead end
is run all the same if it says why (`Proposal.despite`). `judge` is a pure function of records;
`Archive` arranges the records for its questions and grows with the notebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from society.experiments import patches
from society.experiments.neighbourhood import Changes, Neighbourhood
from society.memory.sameness import said_before
from society.records import NewHypothesis, NewRefusal, RefusalReason
from society.roles.base import Advice, Proposal, Reader, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from society.experiments.space import Space
    from society.experiments.task import Task
    from society.records import Champion, Entry, Hypothesis, Run, Trial, Variant
    from society.roles.base import Knowledge, Lab, Review

IDEA_CHARS, OWN_CHARS = 1_000, 500
"""Longest idea recorded with a run, and what its author's words may take of that."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When what lies around a proposal counts as a dead end. How it was chosen: docs/novelty.md."""

    radius: float = 0.1
    """How far a comparable value may be, on the unit scale of any knob."""
    share: float = 0.5
    """Nor may it be further than this share of the way from the proposal to the champion."""
    neighbours: int = 3
    """So many nearest neighbours must all have come out badly."""
    worse: float = 2.0
    """Badly: worse than the champion by this many noise standard deviations, or failed."""
    witnesses: int = 2
    """So many runs must have come out badly with changes that the proposal repeats,"""
    worst: float = 4.0
    """or one that was worse by this many noise standard deviations."""


RULE = Rule()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the notebook says about a proposal."""

    reason: RefusalReason | None = None
    """Why not to run it; None if nothing speaks against it."""
    run_id: str | None = None
    """The run that speaks against it; None where that is still under way."""
    note: str = ""
    """The same in words."""

    @property
    def is_new(self) -> bool:
        """Whether nothing on record speaks against it."""
        return self.reason is None


NEW = Judgement()


class Archive:
    """The screening runs that a judge knows of: everybody's, or one agent's. Only grows."""

    def __init__(self, space: Space, agent: str | None = None) -> None:
        """An empty archive; `agent` for one that takes in this agent's runs alone."""
        self.space = space
        self._agent = agent
        self._runs: dict[str, Run] = {}
        self._reference: dict[str, str] = {}
        self._scores: dict[str, float] = {}
        self._near = Neighbourhood(space)
        self._changes = Changes(space)
        self._read = 0

    def __len__(self) -> int:
        """How many variants it knows."""
        return len(self._runs)

    def read(self, screenings: Sequence[Run], champions: Sequence[Champion]) -> Archive:
        """Take in what is new, and return itself.

        Args:
            screenings: All screening runs, in order of finishing.
            champions: The whole champion history.
        """
        for run in screenings[self._read :]:
            if run.score is not None:
                self._scores[run.variant.fingerprint] = run.score
            if self._agent in (None, run.agent):
                self._add(run, _champion_at(run.started_at, champions))
        self._read = len(screenings)
        return self

    def _add(self, run: Run, champion: Variant | None) -> None:
        mark = run.variant.fingerprint
        if mark not in self._runs:
            self._near.add(mark, run.variant)
            if champion is not None and self._changes.add(mark, run.variant, champion):
                self._reference[mark] = champion.fingerprint
        self._runs[mark] = run  # a crash is repeated: the last word counts

    def same(self, variant: Variant) -> Run | None:
        """The run of exactly this variant."""
        return self._runs.get(variant.fingerprint)

    def within(self, variant: Variant) -> Run | None:
        """The first run of a variant that differs by no more than the tolerances."""
        return next((self._runs[mark] for mark in self._near.within(variant)), None)

    def nearest(self, variant: Variant, k: int, radius: float) -> list[Run]:
        """Runs of the `k` nearest variants, nearest first."""
        return [self._runs[one.key] for one in self._near.nearest(variant, k, radius)]

    def repeated(self, variant: Variant, champion: Variant, rule: Rule) -> list[Tried]:
        """Earlier changes of a champion that `variant` makes too, nearest first."""
        return [
            Tried(self._runs[one.key], self._scores.get(self._reference[one.key]), one.changed)
            for one in self._changes.repeated(variant, champion, rule.radius, rule.share)
        ]


@dataclass(frozen=True, slots=True)
class Tried:
    """A run with the score of the champion it was an attempt to improve on, on the same seed."""

    run: Run
    champion_score: float | None
    """None if that champion was not screened."""
    changed: frozenset[str] = frozenset()
    """What it changed about that champion."""


def _champion_at(moment: float, champions: Sequence[Champion]) -> Variant | None:
    earlier = [entry.variant for entry in champions if entry.since <= moment]
    return earlier[-1] if earlier else None


def judge(variant: Variant, knowledge: Knowledge, archive: Archive, rule: Rule = RULE) -> Judgement:
    """What speaks against running `variant`, by the first of the questions that has an answer."""
    return (
        _duplicate(variant, knowledge, archive)
        or _near_duplicate(variant, knowledge, archive)
        or _dead_end(variant, knowledge, archive, rule)
        or NEW
    )


def _duplicate(variant: Variant, knowledge: Knowledge, archive: Archive) -> Judgement | None:
    done = archive.same(variant)
    if done is not None:
        return Judgement(RefusalReason.DUPLICATE, done.id, f"{done.id} is the same experiment.")
    if variant.fingerprint in {other.fingerprint for other in knowledge.pending}:
        return Judgement(RefusalReason.DUPLICATE, None, "The same experiment is under way.")
    if variant.fingerprint == knowledge.champion.fingerprint:
        return Judgement(RefusalReason.DUPLICATE, None, "It is the champion.")
    return None


def _near_duplicate(variant: Variant, knowledge: Knowledge, archive: Archive) -> Judgement | None:
    reason = RefusalReason.NEAR_DUPLICATE
    done = archive.within(variant)
    if done is not None:
        what = f"{done.id} ({done.variant.describe()}) is the same within every knob's tolerance."
        return Judgement(reason, done.id, what)
    if any(archive.space.near(variant, other) for other in knowledge.pending):
        return Judgement(reason, None, "The same within every knob's tolerance is under way.")
    if archive.space.near(variant, knowledge.champion):
        return Judgement(reason, None, "It is the champion within every knob's tolerance.")
    return None


def _dead_end(
    variant: Variant, knowledge: Knowledge, archive: Archive, rule: Rule
) -> Judgement | None:
    return _failed_change(variant, knowledge, archive, rule) or _failed_area(
        variant, knowledge, archive, rule
    )


def _failed_change(
    variant: Variant, knowledge: Knowledge, archive: Archive, rule: Rule
) -> Judgement | None:
    """It repeats changes, perhaps among others, that made an earlier champion clearly worse.

    Unless an earlier run made them and others that the proposal makes too, and was none the worse.
    """
    tried = archive.repeated(variant, knowledge.champion, rule)
    harms = [harm(one.run, one.champion_score, knowledge) for one in tried]
    fine = [one.changed for one, harm in zip(tried, harms, strict=True) if harm < rule.worse]
    bad = [
        (one, harm)
        for one, harm in zip(tried, harms, strict=True)
        if harm >= rule.worse and not any(one.changed <= changed for changed in fine)
    ]
    clear = any(rule.worst <= harm < math.inf for _, harm in bad)
    if not clear and len(bad) < rule.witnesses:
        return None
    told = "; ".join(_told(one, harm) for one, harm in bad[: rule.neighbours])
    note = f"It repeats what came out badly when it was tried before ({told})."
    return Judgement(RefusalReason.DEAD_END, bad[0][0].run.id, note)


def _failed_area(
    variant: Variant, knowledge: Knowledge, archive: Archive, rule: Rule
) -> Judgement | None:
    """All of the nearest comparable runs are clearly worse than the champion of now, or failed.

    Comparable is what lies much nearer to the proposal than to that champion: it makes the same
    changes, and differs little in whatever else it has.
    """
    away = archive.space.distance(variant, knowledge.champion)
    around = archive.nearest(variant, rule.neighbours, min(rule.radius, rule.share * away))
    near = [Tried(run, knowledge.champion_score) for run in around]
    harms = [harm(one.run, one.champion_score, knowledge) for one in near]
    if len(harms) < rule.neighbours or min(harms) < rule.worse:
        return None
    note = f"What lies nearest came out badly ({'; '.join(map(_told, near, harms))})."
    return Judgement(RefusalReason.DEAD_END, around[0].id, note)


def harm(run: Run, level: float | None, knowledge: Knowledge) -> float:
    """How much worse than `level` a screening run is, in noise standard deviations.

    Infinite for one that failed, zero where nothing can be said.
    """
    if run.score is None:
        return math.inf
    if level is None or not knowledge.noise_sd:
        return 0.0
    return -knowledge.direction.improvement(level, run.score) / knowledge.noise_sd


def _told(tried: Tried, harm: float) -> str:
    if tried.run.score is None:
        return f"{tried.run.id} {tried.run.outcome.value.replace('_', ' ')}"
    return f"{tried.run.id} worse by {harm:.1f} noise floors"


@dataclass(frozen=True, slots=True)
class Choice:
    """What came of asking a brain for something new."""

    proposal: Proposal | None
    """None if it proposed only what is known exactly."""
    refusals: tuple[NewRefusal, ...] = ()
    """What it proposed and will not be run; one entry for each variant and reason."""
    hypotheses: tuple[NewHypothesis, ...] = ()
    """Further ideas that came with the proposals."""
    asked: Knowledge | None = None
    """What its author was told; the champion may be another one by now."""


async def choose(lab: Lab) -> Choice:
    """Ask the agent's brain until it proposes something new that runs and is worth a run.

    After the last attempt what was advised against, a dead end, or else a near-duplicate, is better
    than nothing, if its code works and nobody has run it meanwhile. A brain that takes its time is
    asked without the floor, so the notebook is read again after each of its answers.
    """
    started = lab.knowledge().entropy
    asked: list[Knowledge] = []
    refused: list[Refused] = []
    ideas: list[NewHypothesis] = []
    examiner = _Examiner(lab)
    for attempt in range(lab.view.charter.retries):
        entropy = started + 1_000_003 * attempt
        asked.append(replace(lab.knowledge(), entropy=entropy, refused=tuple(refused)))
        proposal = await lab.propose(asked[-1])
        ideas += proposal.hypotheses
        found = await examiner.examine(proposal)
        if isinstance(found, Proposal):
            return Choice(found, _entries(refused), _distinct(ideas), asked[-1])
        refused.append(found)
    for spare in _spare(refused):
        if not await examiner.usable(spare.proposal):
            continue
        others = [one for one in refused if one.proposal.variant != spare.proposal.variant]
        note = f"{spare.note} Run because nothing newer was proposed."
        told = asked[refused.index(spare)]
        return Choice(_in_spite(spare.proposal, note), _entries(others), _distinct(ideas), told)
    return Choice(None, _entries(refused), _distinct(ideas))


class _Examiner:
    """What is asked about the proposals of one duty, the cheapest questions first.

    Does the notebook know it? Does its code run at all, and change anything? Does a reviewer see a
    point in it? A review may send one proposal back; its author may insist, or propose another one.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._trials: dict[str, Trial] = {}
        self._advised = False

    async def examine(self, proposal: Proposal) -> Proposal | Refused:
        """The proposal, with what is known about it in its idea; or why it is not run."""
        found = self._judge(proposal)
        if isinstance(found, Refused):
            return found
        problem = await self._problem(proposal)
        if problem:
            return Refused(proposal, RefusalReason.BROKEN, None, problem)
        review = await self._review(proposal)
        if review is not None:
            if review.advice is not Advice.RUN and not proposal.despite and not self._advised:
                self._advised = True
                recorded = review.advice is Advice.SKIP
                reason = RefusalReason.ADVISED_AGAINST
                return Refused(proposal, reason, None, f"{review.advice}: {review}", recorded)
            self._advised = True
            proposal = replace(proposal, idea=f"{proposal.idea[:OWN_CHARS]} Review: {review}")
        return self._judge(proposal)  # others may have run it while this one was looked at

    async def usable(self, proposal: Proposal) -> bool:
        """Whether a proposal that was refused could be run all the same."""
        if await self._problem(proposal):
            return False
        found = judge(proposal.variant, self._lab.knowledge(), self._lab.archive())
        return found.reason is not RefusalReason.DUPLICATE

    def _judge(self, proposal: Proposal) -> Proposal | Refused:
        found = judge(proposal.variant, self._lab.knowledge(), self._lab.archive())
        if found.reason is None:
            return with_evidence(proposal, self._lab)
        if found.reason is RefusalReason.DEAD_END and proposal.despite:
            return _in_spite(proposal, found.note)
        return Refused(proposal, found.reason, found.run_id, found.note)

    async def _problem(self, proposal: Proposal) -> str:
        """Why its code must not be run; empty for code that is the champion's, or none."""
        variant = proposal.variant
        if variant.patch is None:
            return ""
        champion = self._lab.view.champion.variant
        if variant.code == champion.code:
            return ""
        tried = await self._trial(variant)
        if tried.problem:
            return tried.problem
        if not tried.same and not await self._same_as_now(variant, champion, tried):
            return ""
        if not proposal.simplification:
            return "The code change changes nothing under this recipe: the bits are the same."
        if fewer_lines(self._lab.view.task, champion, variant) <= 0:
            return "The code change gives the same bits as before, and with no less code."
        return ""

    async def _same_as_now(self, variant: Variant, champion: Variant, tried: Trial) -> bool:
        """Whether the champion's code, which is not the task's own, gives the same bits."""
        if champion.patch is None or not tried.bits:
            return False
        now = await self._trial(replace(variant, patch=champion.patch))
        return now.bits == tried.bits

    async def _trial(self, variant: Variant) -> Trial:
        mark = variant.fingerprint
        if mark not in self._trials:
            self._trials[mark] = await self._lab.trial(variant)
        return self._trials[mark]

    async def _review(self, proposal: Proposal) -> Review | None:
        """What another temperament thinks; nothing is asked about what `search` proposed."""
        brain = self._lab.brain
        if not proposal.model or not isinstance(brain, Reader) or self._advised:
            return None
        return await self._lab.aside(brain.review(proposal, self._lab.knowledge()))


def fewer_lines(task: Task, champion: Variant, variant: Variant) -> int:
    """By how many lines of code a variant is shorter than the champion; negative if it is longer.

    Zero for a task without code to change, and for patches that do not apply to what is installed.
    """
    sources = getattr(task, "sources", None)
    if sources is None:
        return 0
    try:
        before, after = (
            patches.lines(patches.effective(sources(), one.patch)) for one in (champion, variant)
        )
    except patches.BadPatch:
        return 0
    return before - after


def _spare(refused: Sequence[Refused]) -> list[Refused]:
    """What is better than nothing, the best first."""
    order = (
        RefusalReason.ADVISED_AGAINST,
        RefusalReason.DEAD_END,
        RefusalReason.NEAR_DUPLICATE,
    )
    return [one for reason in order for one in refused if one.reason is reason]


def _distinct(ideas: Iterable[NewHypothesis]) -> tuple[NewHypothesis, ...]:
    """One for each variant: who is asked again says again what it leaves to others."""
    return tuple({one.variant.fingerprint: one for one in reversed([*ideas])}.values())[::-1]


def _in_spite(proposal: Proposal, note: str) -> Proposal:
    """The proposal with what speaks against it, and why it is run, in its idea."""
    words = (proposal.idea, f"Despite this: {note}", proposal.despite)
    return replace(proposal, idea=" ".join(filter(None, words))[:IDEA_CHARS])


def _entries(refused: Iterable[Refused]) -> tuple[NewRefusal, ...]:
    kept = [one for one in refused if one.recorded]
    first = {(one.proposal.variant.fingerprint, one.reason): one for one in reversed(kept)}
    return tuple(
        NewRefusal(one.proposal.variant, one.reason, one.run_id, one.note)
        for one in reversed([*first.values()])
    )


def with_evidence(proposal: Proposal, lab: Lab) -> Proposal:
    """Add what the notebook says about the nearest earlier work in words to the idea."""
    hits = lab.recall(f"{proposal.variant.describe()}. {proposal.idea}", k=2)
    if not hits:
        return proposal
    known = "; ".join(hit.text for hit in hits)
    return replace(proposal, idea=f"{proposal.idea} Nearest on record: {known}"[:IDEA_CHARS])


def unsaid(
    entries: Sequence[Entry], known: Sequence[Hypothesis], space: Space
) -> tuple[Entry, ...]:
    """The entries, with a refusal in place of each hypothesis that says what one on record says.

    See `sameness.said_before`; dropped hypotheses may be posted again.
    """
    kept: list[Entry] = []
    for entry in entries:
        if not isinstance(entry, NewHypothesis):
            kept.append(entry)
            continue
        said = said_before(entry.statement, entry.variant, known, space.near)
        if said is None:
            kept.append(entry)
            continue
        note = f"{said.id} says the same: {said.statement}"
        kept.append(NewRefusal(entry.variant, RefusalReason.SAME_IDEA, said.run_id, note))
    return tuple(kept)
