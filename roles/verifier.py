"""The verifier: re-runs other agents' claims on seeds that nobody chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from society.errors import UsageError
from society.experiments import gate
from society.records import RunKind
from society.roles.base import Duty, Lab, Outcome, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.records import Claim
    from society.roles.view import View


class Verifier(Role):
    """Makes the runs that claims are judged by.

    Claims are verified in the order of their screening result and run to a decision; one that has
    become likely to be accepted goes first.
    """

    name: ClassVar[str] = "verifier"
    about: ClassVar[str] = "re-runs the claims of others on fresh seeds and on their original seed"

    def duties(self, view: View) -> Sequence[Duty]:
        """`verify` for undecided claims, `reproduce` before one is accepted."""
        duties = []
        for rank, claim in enumerate(view.open_claims):
            assessment = view.assessments[claim.id]
            if assessment.next is gate.Next.CONTINUE:
                duties += self._verify(view, claim, assessment, rank)
            elif assessment.next is gate.Next.ACCEPT and not view.reproductions(claim):
                busy = view.under_way(claim.variant, RunKind.REPRODUCTION)
                duties += [
                    Duty(
                        self.name, "reproduce", claim.id, value=85, needs_slot=True,
                        barred=(claim.author,), why="same seed, same bits?",
                    )
                ] * (not busy)  # fmt: skip
        return duties

    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        """One run, on the seed the notebook gives."""
        claim = lab.view.ledger.claim(duty.subject)
        if duty.kind == "reproduce":
            run = await lab.reproduce(claim.id)
        elif duty.kind == "verify":
            run = await lab.measure(claim.variant, RunKind.VERIFICATION, claim.id)
        else:
            raise UsageError(f"A verifier does not {duty.kind!r}.")
        score = "failed" if run.score is None else f"{run.score:.4f}"
        return Outcome(note=f"{claim.id}: {score}")

    def _verify(
        self, view: View, claim: Claim, assessment: gate.Assessment, rank: int
    ) -> list[Duty]:
        """At most two runs at once until there are two results: most false claims end there."""
        busy = view.under_way(claim.variant, RunKind.VERIFICATION)
        ceiling = 2 if assessment.n < 2 else gate.DEFAULTS.n_max
        room = ceiling - assessment.n - busy
        if room <= 0:
            return []
        return [
            Duty(
                self.name, "verify", claim.id, needs_slot=True, crew=busy + room,
                value=60 + 15 * assessment.p_accept - 0.1 * rank, barred=(claim.author,),
                why=f"seed {assessment.n + busy + 1} of {claim.id}",
            )
        ]  # fmt: skip
