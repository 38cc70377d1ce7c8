"""The experimenter: proposes a variant, has it checked for novelty, screens it, files claims."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from society.errors import LeaseError
from society.experiments import gate
from society.experiments.effects import knob_effects
from society.records import HypothesisDropped, NewClaim, NewInsight, RefusalReason
from society.roles.base import Duty, Lab, Outcome, Role
from society.roles.novelty import choose, fewer_lines, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.experiments.task import Task
    from society.records import Entry, Hypothesis, Run, Variant
    from society.roles.base import Knowledge
    from society.roles.view import Candidate, View


class Experimenter(Role):
    """Screens new variants and claims the best of them.

    Screening is cheap and biased: the best of many runs on one seed is partly luck. So a result
    becomes a claim only once it has stood unbeaten for a while, and the claim is judged on other
    seeds, by others.
    """

    name: ClassVar[str] = "experimenter"
    about: ClassVar[str] = "proposes variants, screens them, files claims"

    def duties(self, view: View) -> Sequence[Duty]:
        """`publish` for what stands, `propose` and, near the end, `isolate` for new runs."""
        duties = [
            Duty(self.name, "publish", one.run.id, value=95, why=f"{one.delta:+.4f} in screening")
            for one in publishable(view)[:1]
        ]
        if view.noise is None or view.champion_screening is None or view.closing:
            return duties
        room = view.budget.runs
        duties.append(
            Duty(self.name, "propose", value=50, needs_slot=True, crew=room, why="a new idea")
        )
        if view.explaining and view.untried_alone and tried_alone(view) < view.charter.explain_most:
            why = "one of the champion's changes alone"
            duties.append(Duty(self.name, "isolate", value=52, needs_slot=True, crew=room, why=why))
        return duties

    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        """File a claim, or find something new and screen it."""
        if duty.kind == "publish":
            return self._publish(lab.view, duty.subject)
        if duty.kind == "isolate":
            return await self._isolate(lab)
        hypothesis, covered = self._take(lab)
        if hypothesis is not None:
            run = await self._test(hypothesis, lab)
            return Outcome(covered, note=f"{hypothesis.id}: {tell(run, lab.view)}")
        choice = await choose(lab)
        entries: tuple[Entry, ...] = (*covered, *choice.refusals, *choice.hypotheses)
        proposal = choice.proposal
        if proposal is None:
            return Outcome(entries, note="no new idea")
        if proposal.model and lab.view.closing:  # it took its time, and others went on
            return Outcome(entries, note="what is left of the budget is kept for deciding")
        run = await lab.screen(proposal.variant, proposal.idea)
        if proposal.simplification and choice.asked is not None:
            entries += simplified(run, choice.asked, lab.view.task)
        return Outcome(entries, note=tell(run, lab.view))

    @staticmethod
    def _publish(view: View, run_id: str) -> Outcome:
        found = {one.run.id: one for one in (*view.single_changes, *view.winners)}
        if run_id not in found:
            return Outcome(note="no longer ahead")
        candidate = found[run_id]
        family = view.family_of(candidate.run.variant)
        claim = NewClaim(
            screening_run=run_id,
            reference_variant=candidate.reference,
            screening_delta=candidate.delta,
            family=family,
            alpha=view.alpha(),
            carried_log_e=view.family_capital(family),
        )
        return Outcome((claim,), note=f"claims {candidate.run.variant.describe()}")

    @staticmethod
    async def _isolate(lab: Lab) -> Outcome:
        """Screen the change that the runs so far say the most for."""
        view = lab.view
        if not view.untried_alone:
            return Outcome(note="all of the champion's changes have been tried alone")
        variant = most_promising_alone(view)
        run = await lab.screen(variant, "One of the champion's changes alone.")
        score = run.outcome.value if run.score is None else f"{run.score:.4f}"
        return Outcome(note=f"alone: {variant.describe()}: {score}")

    @staticmethod
    def _take(lab: Lab) -> tuple[Hypothesis | None, tuple[HypothesisDropped, ...]]:
        """The open hypothesis with most value per cost, and those that a run has answered already.

        None if there is none to be had. What failed nearby before is no reason not to test one: it
        was posted with a rationale by somebody who could see that.
        """
        covered = []
        knowledge, archive = lab.knowledge(), lab.archive()
        for one in lab.open_hypotheses():
            found = judge(one.variant, knowledge, archive)
            if found.reason is RefusalReason.NEAR_DUPLICATE and found.run_id is not None:
                covered.append(HypothesisDropped(one.id, found.note))
            elif found.reason in (None, RefusalReason.DEAD_END):
                with suppress(LeaseError):  # another society was quicker
                    return lab.take(one.id), tuple(covered)
        return None, tuple(covered)

    @staticmethod
    async def _test(hypothesis: Hypothesis, lab: Lab) -> Run:
        """Screen a hypothesis; the notebook closes it with the run, whatever comes out."""
        try:
            return await lab.screen(hypothesis.variant, hypothesis.statement)
        finally:
            lab.give_back(hypothesis.id)


def simplified(run: Run, told: Knowledge, task: Task) -> tuple[NewInsight, ...]:
    """Whether a run shows that less code does as well as the champion's, on the same seed.

    As well: the very same score, or one that is no further off than the noise floor. The champion
    is the one that the author of the run's idea was told about: there may be another one by now.
    """
    level, champion = told.champion_score, told.champion
    if run.score is None or level is None:
        return ()
    away = abs(run.score - level)
    if away > (told.noise_sd or 0.0):
        return ()
    fewer = fewer_lines(task, champion, run.variant)
    if fewer <= 0:
        return ()
    how = "The very same score" if away == 0 else "The same score within the noise floor"
    lines = f"{fewer} fewer line{'s' if fewer > 1 else ''} of code than {champion.describe()}"
    text = f"{how} with {lines}: {run.variant.describe()} in {run.id}, on one seed."
    return (NewInsight(text, (run.id,)),)


def publishable(view: View) -> list[Candidate]:
    """What should become a claim now, the most urgent first.

    A winner must have stood unbeaten for a while and must be better than what is under test. Single
    changes are claimed against the baseline once the search is over, one at a time and while there
    is budget to decide, so that the report can say which changes help by themselves.
    """
    if view.budget.runs < gate.DEFAULTS.n_min:
        return []
    found = [one for one in view.winners[:1] if _stands(view, one)]
    if view.explaining and not view.closing and not view.claims_against(view.baseline):
        found += view.single_changes
    busy = {claim.family for claim in view.open_claims}
    return [one for one in found if view.family_of(one.run.variant) not in busy]


def _stands(view: View, winner: Candidate) -> bool:
    rivals = view.claims_against(view.champion.variant)
    if any(claim.screening_delta >= winner.delta for claim in rivals):
        return False
    return view.closing or view.since(winner.run) >= view.charter.patience


def tried_alone(view: View) -> int:
    """How many of the champion's changes have been tried, or are being tried, alone."""
    champion = view.champion.variant
    changes = len(champion.overrides) + (champion.patch is not None)
    return changes - len(view.untried_alone)


def most_promising_alone(view: View) -> Variant:
    """The champion's untried single change that the regression over all runs expects most of."""
    effects = knob_effects(view.screenings, view.space, {}, view.task.direction)
    expected = {effect.knob: effect.delta for effect in effects}

    def hope(variant: Variant) -> float:
        return sum(expected.get(knob, 0.0) for knob in variant.overrides)

    return max(view.untried_alone, key=hope)


def tell(run: Run, view: View) -> str:
    """What a screening run showed, in a clause."""
    delta = view.screening_delta(run)
    if delta is None:
        return f"{run.outcome.value}: {run.variant.describe()}"
    return f"{delta:+.4f}: {run.variant.describe()}"
