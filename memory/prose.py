"""The ledger in sentences: what the semantic index holds, and what it must never hold.

Indexed: outcomes of screening runs with direction and size of the effect, claims as they were
filed, verdicts, hypotheses and insights. Never indexed: calibration, verification, reproduction and
audit runs, seeds, and any result of a claim that is still open, because agents search this text
before they propose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from society.memory.ledger import Ledger, Posted
from society.records import (
    Champion,
    Claim,
    Decision,
    Hypothesis,
    Insight,
    Outcome,
    Run,
    RunKind,
    Scope,
    Variant,
    Verdict,
)

KINDS = ("run", "claim", "verdict", "hypothesis", "insight")
"""What a passage can be about."""

_FAILED = {
    Outcome.DIVERGED: "training diverged",
    Outcome.CRASHED: "the run crashed",
    Outcome.TIMED_OUT: "the run timed out",
    Outcome.REJECTED: "the guard rejected the run",
}
_CLOSED = {
    Decision.ACCEPTED: "accepted: verification confirmed the improvement",
    Decision.CONFIRMED: "accepted, and confirmed again on probation",
    Decision.REJECTED: "rejected: verification did not confirm the improvement",
    Decision.ROLLED_BACK: "rolled back: it was accepted, then failed probation",
    Decision.SUPERSEDED: "superseded: its reference is no longer the champion",
}


@dataclass(frozen=True, slots=True)
class Passage:
    """One indexed text."""

    id: str
    """Kind and id of the record, e.g. `run:r00012`."""
    kind: str
    """One of `KINDS`."""
    ref: str
    """Id of the record (of the claim for a verdict)."""
    society: str
    text: str


class Prose:
    """Writes passages about one ledger."""

    def __init__(self, ledger: Ledger, *, lower_is_better: bool = True) -> None:
        """Read from `ledger`; the direction of its metric says what an improvement is."""
        self._ledger = ledger
        self._sign = 1.0 if lower_is_better else -1.0
        self._claims: dict[str, Claim] | None = None
        self._hypotheses: dict[str, Hypothesis] | None = None
        self._insights: dict[str, Insight] | None = None
        self._champions: dict[Scope, tuple[Champion, ...]] = {}

    def passage(self, posted: Posted) -> Passage | None:
        """The passage for a line of the outbox; None for what is not indexed."""
        if posted.kind == "run":
            run = self._ledger.run(posted.ref)
            return self._run(run) if run.kind is RunKind.SCREENING else None
        if posted.kind == "claim":
            return self._claim(self._known_claims()[posted.ref])
        if posted.kind == "verdict":
            claim = self._known_claims()[posted.ref]
            return None if claim.verdict is None else self._verdict(claim, claim.verdict)
        if posted.kind == "hypothesis":
            return self._hypothesis(self._known_hypotheses()[posted.ref])
        return self._insight(self._known_insights()[posted.ref])

    def all(self) -> Iterator[Passage]:
        """Every passage, each once, in its latest wording."""
        after, batch, seen = 0, 500, set[tuple[str, str]]()
        while found := self._ledger.posted(after, batch):
            after = found[-1].seq
            for posted in found:
                if (posted.kind, posted.ref) not in seen:
                    seen.add((posted.kind, posted.ref))
                    passage = self.passage(posted)
                    if passage is not None:
                        yield passage

    def _run(self, run: Run) -> Passage:
        reference = self._reference(run)
        text = f"Tried {run.variant.describe()}"
        if reference is not None and reference.variant.fingerprint != run.variant.fingerprint:
            text += f" ({changes(run.variant, reference.variant)})"
        if run.outcome is not Outcome.COMPLETED or run.score is None:
            text += f": {_FAILED.get(run.outcome, run.outcome.value)}."
        else:
            text += f": {self._effect(run, run.score, reference)}."
        if run.idea:
            text += f" Idea: {run.idea}"
        return Passage(f"run:{run.id}", "run", run.id, run.society, text)

    def _effect(self, run: Run, score: float, reference: Reference | None) -> str:
        if reference is None or reference.run == run.id:
            return f"screening score {score:.5f}"
        gain = self._sign * (reference.score - score)
        word = "improved" if gain > 0 else "worsened" if gain < 0 else "did not change"
        return (
            f"screening {word} the score by {abs(gain):.5f}, "
            f"{score:.5f} against {reference.score:.5f} of the champion"
        )

    def _reference(self, run: Run) -> Reference | None:
        """The champion that a screening run was compared with, if it has a score."""
        scope = Scope(run.variant.task, run.tier)
        if scope not in self._champions:
            self._champions[scope] = self._ledger.champions(scope)
        reigning = [one for one in self._champions[scope] if one.since <= run.finished_at]
        if not reigning or reigning[-1].screening_run is None:
            return None
        screened = self._ledger.run(reigning[-1].screening_run)
        if screened.score is None:
            return None
        return Reference(reigning[-1].variant, screened.id, screened.score)

    @staticmethod
    def _claim(claim: Claim) -> Passage:
        text = (
            f"Claim {claim.id}: {claim.variant.describe()} beats {claim.reference.describe()} "
            f"({changes(claim.variant, claim.reference)}); it was "
            f"{claim.screening_delta:.5f} better in screening."
        )
        return Passage(f"claim:{claim.id}", "claim", claim.id, claim.society, text)

    @staticmethod
    def _verdict(claim: Claim, verdict: Verdict) -> Passage:
        text = (
            f"Verdict on claim {claim.id}, {claim.variant.describe()} against "
            f"{claim.reference.describe()}: {_CLOSED[verdict.decision]}."
        )
        effect = verdict.effect
        if effect is not None:
            text += (
                f" Effect {effect.shrunken:+.5f}, 95 % interval {effect.low:+.5f} to "
                f"{effect.high:+.5f} on {effect.seeds} seeds."
            )
        if verdict.reason:
            text += f" {verdict.reason}"
        return Passage(f"verdict:{claim.id}", "verdict", claim.id, claim.society, text)

    @staticmethod
    def _hypothesis(hypothesis: Hypothesis) -> Passage:
        text = f"Hypothesis: {hypothesis.statement} Try {hypothesis.variant.describe()}."
        if hypothesis.rationale:
            text += f" Because: {hypothesis.rationale}"
        if hypothesis.run_id is not None:
            text += f" Tested by run {hypothesis.run_id}."
        return Passage(
            f"hypothesis:{hypothesis.id}", "hypothesis", hypothesis.id, hypothesis.society, text
        )

    @staticmethod
    def _insight(insight: Insight) -> Passage:
        return Passage(
            f"insight:{insight.id}", "insight", insight.id, insight.society, insight.text
        )

    def _known_claims(self) -> dict[str, Claim]:
        if self._claims is None:
            self._claims = {claim.id: claim for claim in self._ledger.claims()}
        return self._claims

    def _known_hypotheses(self) -> dict[str, Hypothesis]:
        if self._hypotheses is None:
            self._hypotheses = {one.id: one for one in self._ledger.hypotheses()}
        return self._hypotheses

    def _known_insights(self) -> dict[str, Insight]:
        if self._insights is None:
            self._insights = {insight.id: insight for insight in self._ledger.insights()}
        return self._insights


@dataclass(frozen=True, slots=True)
class Reference:
    """What a screening run is compared with: the champion's run on the same seed."""

    variant: Variant
    run: str
    score: float


def changes(variant: Variant, reference: Variant) -> str:
    """What sets a variant apart from another, in words.

    E.g. `changes warm_down from 0.2 to 0.3`; `the baseline's` stands for a value without override.
    """
    parts = []
    for name in sorted({*variant.overrides, *reference.overrides}):
        old = reference.overrides.get(name, "the baseline's")
        new = variant.overrides.get(name, "the baseline's")
        if old != new or isinstance(old, bool) != isinstance(new, bool):
            parts.append(f"{name} from {old} to {new}")
    if variant.patch != reference.patch:
        parts.append("the code")
    return "changes " + ", ".join(parts) if parts else "changes nothing"
