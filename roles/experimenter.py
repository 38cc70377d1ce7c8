"""The experimenter: proposes a variant, has it checked for novelty, screens it, files claims."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from society.experiments import gate
from society.records import HypothesisTested, NewClaim
from society.roles.base import Duty, Lab, Outcome, Proposal, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.records import Hypothesis, Run, Variant
    from society.roles.base import Knowledge
    from society.roles.view import View


class Experimenter(Role):
    """Screens new variants and claims the best of them.

    Screening is cheap and biased: the best of many runs on one seed is partly luck. So a result
    becomes a claim only once it has stood unbeaten for a while, and the claim is judged on other
    seeds, by others.
    """

    name: ClassVar[str] = "experimenter"
    about: ClassVar[str] = "proposes variants, screens them, files claims"

    def duties(self, view: View) -> Sequence[Duty]:
        """`propose` while the budget allows new ideas, `publish` for a standing winner."""
        duties = []
        if self._standing_winner(view):
            run, delta = view.winners[0]
            why = f"{delta:+.4f} in screening"
            duties.append(Duty(self.name, "publish", run.id, value=95, why=why))
        if view.noise and view.champion_screening is not None and not view.closing:
            duties.append(
                Duty(
                    self.name,
                    "propose",
                    value=50,
                    needs_slot=True,
                    crew=view.budget.runs,
                    why="a new idea",
                )
            )
        return duties

    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        """File a claim, or find something new and screen it."""
        if duty.kind == "publish":
            return self._publish(lab.view, duty.subject)
        for hypothesis in lab.open_hypotheses():
            if is_new(hypothesis.variant, lab.knowledge()):
                return await self._test(hypothesis, lab)
        proposal = await self._novel(lab)
        if proposal is None:
            return Outcome(note="no new idea")
        run = await lab.screen(proposal.variant, proposal.idea)
        return Outcome(note=tell(run, lab.view))

    @staticmethod
    def _standing_winner(view: View) -> bool:
        if not view.winners or view.budget.runs < gate.DEFAULTS.n_min:
            return False
        run, delta = view.winners[0]
        rivals = view.open_claims
        if any(claim.screening_delta >= delta for claim in rivals):
            return False
        if view.family_of(run.variant) in {claim.family for claim in rivals}:
            return False
        return view.closing or view.since(run) >= view.charter.patience

    @staticmethod
    def _publish(view: View, run_id: str) -> Outcome:
        found = {run.id: (run, delta) for run, delta in view.winners}
        if run_id not in found:
            return Outcome(note="no longer ahead of the champion")
        run, delta = found[run_id]
        family = view.family_of(run.variant)
        claim = NewClaim(
            screening_run=run.id,
            reference_variant=view.champion.variant,
            screening_delta=delta,
            family=family,
            alpha=view.alpha(),
            carried_log_e=view.family_capital(family),
        )
        return Outcome((claim,), note=f"claims {run.variant.describe()}")

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
