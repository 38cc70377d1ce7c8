"""The statistician: measures the noise, keeps the champion replicated, gives verdicts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from society.experiments import evalue, gate
from society.records import Crown, Decision, Noise, RunKind, Verdict
from society.records import Outcome as RunOutcome
from society.roles.base import Duty, Lab, Outcome, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.records import Claim, Entry, Variant
    from society.roles.view import View

MIN_BASELINE = 4
"""Completed baseline runs below which no noise floor is stated."""


class Statistician(Role):
    """Runs the gate of docs/statistics.md. Trusts nothing that has not been replicated."""

    name: ClassVar[str] = "statistician"
    about: ClassVar[str] = "measures the noise floor, keeps the champion replicated, gives verdicts"

    def duties(self, view: View) -> Sequence[Duty]:
        """Everything that stands between a screening result and a verdict."""
        return [
            *self._calibration(view),
            *self._judgements(view),
            *self._probation(view),
            *self._replication(view),
        ]

    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        """Dispatch by the duty's kind."""
        if duty.kind == "anchor":
            run = await lab.screen(lab.view.champion.variant, "reference on the screening seed")
            return Outcome(note=f"reference {_score(run.score)}")
        if duty.kind in ("calibrate", "confirm", "strengthen", "sharpen"):
            variant = self._measured(duty, lab.view)
            run = await lab.measure(variant, RunKind.CALIBRATION)
            return Outcome(note=f"{variant.describe()}: {_score(run.score)}")
        if duty.kind == "noise":
            return measure_noise(lab.view)
        if duty.kind == "probation":
            return end_probation(lab.view, lab.agent)
        return judge(lab.view, lab.agent, lab.view.ledger.claim(duty.subject))

    # ---------------------------------------------------------------- duties

    def _calibration(self, view: View) -> list[Duty]:
        baseline = view.champion.variant
        duties = []
        if not view.screened(baseline) and not view.under_way(baseline, RunKind.SCREENING):
            duties.append(self._run("anchor", value=92, why="the champion on the screening seed"))
        if view.noise is not None or not baseline.is_baseline:
            return duties
        done, target = len(view.champion_pool), view.calibration_target
        busy = view.under_way(baseline, RunKind.CALIBRATION)
        if done + busy < target:
            why = f"baseline seed {done + busy + 1} of {target}"
            duties.append(self._run("calibrate", value=90, crew=target - done, why=why))
        elif done >= target:
            duties.append(Duty(self.name, "noise", value=100, why="noise floor"))
        return duties

    def _judgements(self, view: View) -> list[Duty]:
        return [
            Duty(self.name, "judge", claim.id, value=100, why=view.assessments[claim.id].reason)
            for claim in view.open_claims
            if is_ripe(view, claim)
        ]

    def _probation(self, view: View) -> list[Duty]:
        claim = on_probation(view)
        if claim is None:
            return []
        short = gate.champion_runs_owed(len(view.champion_pool))
        if short <= 0:
            return [Duty(self.name, "probation", claim.id, value=99, why="all seeds are in")]
        busy = view.under_way(view.champion.variant, RunKind.CALIBRATION, RunKind.VERIFICATION)
        if busy >= short:
            return []
        why = f"{short - busy} more seeds for the new champion"
        return [self._run("confirm", claim.id, value=80, crew=short, why=why)]

    def _replication(self, view: View) -> list[Duty]:
        """Runs that make the champion's mean better known."""
        champion = view.champion.variant
        busy = view.under_way(champion, RunKind.CALIBRATION)
        if on_probation(view) is not None or (champion.is_baseline and view.noise is None):
            return []
        owed = gate.champion_runs_owed(len(view.champion_pool), rejections(view)) - busy
        if owed > 0:
            why = "champion seeds owed for rejected claims"
            return [self._run("strengthen", value=55, crew=owed + busy, why=why)]
        if not view.closing or champion.is_baseline:
            return []
        thinner = min((champion, view.baseline), key=lambda v: len(view.pool(v)))
        busy = view.under_way(thinner, RunKind.CALIBRATION)
        if len(view.pool(thinner)) + busy >= gate.DEFAULTS.pool_max:
            return []
        why = "a sharper headline"
        return [self._run("sharpen", thinner.fingerprint, value=10, crew=busy + 1, why=why)]

    def _run(self, kind: str, subject: str = "", **fields: object) -> Duty:
        return Duty(self.name, kind, subject, needs_slot=True, **fields)  # type: ignore[arg-type]

    @staticmethod
    def _measured(duty: Duty, view: View) -> Variant:
        if duty.kind == "sharpen" and duty.subject != view.champion.variant.fingerprint:
            return view.baseline
        return view.champion.variant


def is_ripe(view: View, claim: Claim) -> bool:
    """Whether the gate has an answer (an acceptance also needs the reproduction run)."""
    verdict = view.assessments[claim.id].next
    if verdict is gate.Next.ACCEPT:
        return bool(view.reproductions(claim))
    return verdict is gate.Next.REJECT


def on_probation(view: View) -> Claim | None:
    """The champion's claim while its acceptance has not been confirmed."""
    claim = view.champion_claim
    return claim if claim is not None and claim.verdict_is(Decision.ACCEPTED) else None


def rejections(view: View) -> list[int]:
    """Candidate runs of each claim rejected against the present champion."""
    return [view.pool_size(claim.variant) for claim in view.rejected]


def measure_noise(view: View) -> Outcome:
    """State the noise floor from the baseline's pool."""
    scores = [score for score in view.champion_pool.values() if score is not None]
    if len(scores) < MIN_BASELINE:
        failed = len(view.champion_pool) - len(scores)
        return Outcome(note=f"{failed} of {len(view.champion_pool)} baseline runs failed")
    sd, low, high = evalue.noise_interval(scores)
    noise = Noise(view.scope.task, view.scope.tier, sd, low, high, len(scores))
    return Outcome((noise,), note=f"noise floor {sd:.4f} on {len(scores)} seeds")


def judge(view: View, judge_name: str, claim: Claim) -> Outcome:
    """Close a claim.

    An acceptance against the champion crowns the variant and makes the champion's other rivals
    moot; one against another reference (a single change against the baseline) is a finding.
    """
    assessment = view.assessments.get(claim.id)
    if assessment is None or not is_ripe(view, claim):
        return Outcome(note=f"{claim.id} is not ripe")
    fault = irreproducible(view, claim)
    accepted = assessment.next is gate.Next.ACCEPT and fault is None
    verdict = Verdict(
        claim.id,
        Decision.ACCEPTED if accepted else Decision.REJECTED,
        assessment.log_e,
        gate.effect(view.evidence(claim)),
        fault or assessment.reason,
        view.runs_of(claim),
        judge_name,
    )
    entries: list[Entry] = [verdict]
    if accepted and claim.reference.fingerprint == view.champion.variant.fingerprint:
        entries.append(Crown(claim.variant, claim.id, claim.screening_run))
        entries += (
            supersede(view, judge_name, other)
            for other in view.claims_against(claim.reference)
            if other.id != claim.id
        )
    return Outcome(tuple(entries), note=f"{claim.id} {verdict.decision.value}: {verdict.reason}")


def supersede(view: View, judge_name: str, claim: Claim) -> Verdict:
    """Close a claim whose reference is no longer the champion."""
    assessment = view.assessments[claim.id]
    known = gate.effect(view.evidence(claim)) if assessment.n else None
    reason = "its reference is no longer the champion"
    runs = view.runs_of(claim)
    return Verdict(claim.id, Decision.SUPERSEDED, assessment.log_e, known, reason, runs, judge_name)


def irreproducible(view: View, claim: Claim) -> str | None:
    """What is wrong with the reproduction run, if anything.

    Within one environment the same seed must give the same bits; across environments (or on a
    device that is not deterministic) the same result within four times the noise floor.
    """
    original = view.ledger.run(claim.screening_run)
    for run in view.reproductions(claim):
        if run.outcome is not RunOutcome.COMPLETED or run.score is None or original.score is None:
            return f"not reproducible: the same seed ended {run.outcome.value} ({run.id})"
        gap = abs(run.score - original.score)
        alike = not run.environment.differs(original.environment)
        exact = alike and run.environment.device == "cpu"
        noise = view.noise.sd if view.noise else math.inf
        if gap > (0.0 if exact else 4 * noise):
            return f"not reproducible: the same seed gave another score, {gap:.2g} off ({run.id})"
    return None


def end_probation(view: View, judge_name: str) -> Outcome:
    """Confirm the new champion on all its seeds, or restore the old one."""
    claim = on_probation(view)
    if claim is None or claim.verdict is None:
        return Outcome(note="nobody is on probation")
    evidence = view.evidence(claim)
    withdrawn = gate.probation(evidence)
    assessment = gate.assess(evidence)
    decision = Decision.ROLLED_BACK if withdrawn else Decision.CONFIRMED
    e_value = math.exp(min(assessment.log_e, 50))
    reason = f"e = {e_value:.3g} on all {assessment.n} seeds"
    verdict = Verdict(
        claim.id, decision, assessment.log_e, gate.effect(evidence), reason,
        view.runs_of(claim), judge_name,
    )  # fmt: skip
    entries: list[Entry] = [verdict]
    if withdrawn:
        entries.append(restore(view, claim))
        moot = view.claims_against(claim.variant)
        entries += (supersede(view, judge_name, other) for other in moot)
    return Outcome(tuple(entries), note=f"{claim.id} {decision.value}: {reason}")


def restore(view: View, claim: Claim) -> Crown:
    """The champion before `claim` takes its place again."""
    former = next(
        entry
        for entry in reversed(view.ledger.champions(view.scope))
        if entry.variant.fingerprint == claim.reference.fingerprint
    )
    return Crown(former.variant, former.claim_id, former.screening_run, reverts=True)


def _score(score: float | None) -> str:
    return "failed" if score is None else f"{score:.4f}"
