"""The experimenter: proposes a variant, has it checked for novelty, screens it, files claims."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from society.experiments import gate
from society.experiments.effects import knob_effects
from society.records import HypothesisTested, NewClaim
from society.roles.base import Duty, Lab, Outcome, Proposal, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.records import Hypothesis, Run, Variant
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
        for hypothesis in lab.open_hypotheses():
            if is_new(hypothesis.variant, lab.knowledge()):
                return await self._test(hypothesis, lab)
        proposal = await self._novel(lab)
        if proposal is None:
            return Outcome(note="no new idea")
        run = await lab.screen(proposal.variant, proposal.idea)
        return Outcome(note=tell(run, lab.view))

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
    async def _test(hypothesis: Hypothesis, lab: Lab) -> Outcome:
        run = await lab.screen(hypothesis.variant, hypothesis.statement)
        tested = HypothesisTested(hypothesis.id, run.id)
        return Outcome((tested,), note=tell(run, lab.view))

    @staticmethod
    async def _novel(lab: Lab) -> Proposal | None:
        """Ask the brain until it says something new; a near-duplicate is better than nothing."""
        view = lab.view
        knowledge = lab.knowledge()
        spare: Proposal | None = None
        for attempt in range(view.charter.retries):
            asked = replace(knowledge, entropy=knowledge.entropy + 1_000_003 * attempt)
            proposal = await lab.brain.propose(asked)
            if not is_new(proposal.variant, knowledge):
                continue
            if is_new(proposal.variant, knowledge, tolerance=view.charter.near):
                return with_evidence(proposal, lab)
            spare = spare or proposal
        return spare


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
    return len(view.champion.variant.overrides) - len(view.untried_alone)


def most_promising_alone(view: View) -> Variant:
    """The champion's untried single change that the regression over all runs expects most of."""
    effects = knob_effects(view.screenings, view.space, {}, view.task.direction)
    expected = {effect.knob: effect.delta for effect in effects}

    def hope(variant: Variant) -> float:
        return sum(expected.get(knob, 0.0) for knob in variant.overrides)

    return max(view.untried_alone, key=hope)


def is_new(variant: Variant, knowledge: Knowledge, tolerance: float | None = None) -> bool:
    """Whether nobody has screened the variant, or anything within `tolerance` of it."""
    known = [*(result.variant for result in knowledge.results), *knowledge.pending]
    if tolerance is None:
        return variant.fingerprint not in {other.fingerprint for other in known}
    return all(knowledge.space.distance(variant, other) > tolerance for other in known)


def with_evidence(proposal: Proposal, lab: Lab) -> Proposal:
    """Add what the notebook says about the nearest earlier work to the rationale."""
    hits = lab.recall(f"{proposal.variant.describe()}. {proposal.idea}", k=2)
    if not hits:
        return proposal
    known = "; ".join(hit.text for hit in hits)
    return replace(proposal, idea=f"{proposal.idea} Nearest on record: {known}"[:600])


def tell(run: Run, view: View) -> str:
    """What a screening run showed, in a clause."""
    delta = view.screening_delta(run)
    if delta is None:
        return f"{run.outcome.value}: {run.variant.describe()}"
    return f"{delta:+.4f}: {run.variant.describe()}"
