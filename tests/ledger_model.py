"""The ledger in plain Python: what each call must do, worked out without any database.

Every `*_refusal` answers with the error type that a call must raise, None where it must succeed;
every other method notes that it succeeded. Times are the ones the ledger wrote, because the rules
compare them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from society.errors import (
    AlreadyLeased,
    AlreadyRun,
    ClaimClosed,
    InvariantViolated,
    LeaseLost,
    NotIndependent,
)
from society.records import (
    Champion,
    Claim,
    Crown,
    Decision,
    Hypothesis,
    HypothesisState,
    Lease,
    NewClaim,
    Outcome,
    Run,
    RunKind,
    Scope,
    Split,
    Study,
    Variant,
    Verdict,
)

LISTS = {
    RunKind.SCREENING: "screening",
    RunKind.REPRODUCTION: "screening",
    RunKind.CALIBRATION: "verification",
    RunKind.VERIFICATION: "verification",
    RunKind.AUDIT: "audit",
    RunKind.STUDY: "study",
}
STANDING = (Decision.ACCEPTED, Decision.CONFIRMED)
PROBATION = (Decision.CONFIRMED, Decision.ROLLED_BACK)

Refused = type[Exception] | None


@dataclass(frozen=True)
class Job:
    """A piece of work: what is leased once at a time."""

    scope: Scope
    kind: str
    """The seed list, or `reproduction`: kinds on one list share its places."""
    variant: str
    place: tuple[object, ...]


@dataclass
class Held:
    """A lease as the model knows it."""

    lease: Lease
    job: Job
    society: str
    living: bool = True
    expired: bool = False


@dataclass
class Known:
    """A claim with every verdict on it, and the scope it lies in."""

    claim: Claim
    scope: Scope
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def record(self) -> Claim:
        return dataclasses.replace(self.claim, verdict=self.verdicts[-1] if self.verdicts else None)

    @property
    def accepted(self) -> Verdict | None:
        return next((v for v in self.verdicts if v.decision is Decision.ACCEPTED), None)


@dataclass
class Idea:
    """A hypothesis, its scope, and who has taken it."""

    record: Hypothesis
    scope: Scope
    expired: bool = False
    taken_in: str | None = None


class Model:
    """What the ledger must hold, and what it must refuse."""

    def __init__(self) -> None:
        self.societies: list[str] = []
        self.held: list[Held] = []
        self.runs: list[Run] = []
        self.job_of: dict[str, Job] = {}
        self.claims: list[Known] = []
        self.champions: dict[Scope, list[Champion]] = {}
        self.ideas: list[Idea] = []
        self.studies: list[Study] = []
        self.keys: set[str] = set()
        self.seeds: dict[tuple[str, Scope], tuple[int, ...]] = {}

    # --- leases ------------------------------------------------------------------------------

    def holder(self, job: Job) -> Held | None:
        """Who holds a piece of work, expired or not."""
        return next((one for one in self.held if one.living and one.job == job), None)

    def results(self, job: Job) -> list[Run]:
        """The runs of a piece of work, in order."""
        return [run for run in self.runs if self.job_of[run.id] == job]

    def result(self, job: Job) -> Run | None:
        """The run that settled it: any but a first crash, which is repeated once."""
        made = self.results(job)
        settled = [run for run in made if run.outcome is not Outcome.CRASHED]
        if settled:
            return settled[0]
        return made[1] if len(made) > 1 else None

    def busy(self, job: Job) -> Refused:
        holder = self.holder(job)
        return AlreadyLeased if holder is not None and not holder.expired else None

    def screening_job(self, scope: Scope, variant: Variant) -> Job:
        return Job(scope, "screening", variant.fingerprint, (0,))

    def screening_refusal(self, scope: Scope, variant: Variant) -> Refused:
        job = self.screening_job(scope, variant)
        return AlreadyRun if self.results(job) else self.busy(job)

    def next_job(self, scope: Scope, variant: Variant, which: str) -> Job:
        """The first place of a list without a result and without a holder."""
        place = 0
        while True:
            job = Job(scope, which, variant.fingerprint, (place,))
            if self.result(job) is None and self.busy(job) is None:
                return job
            place += 1

    def claim_refusal(
        self, scope: Scope, holder: str, variant: Variant, kind: RunKind, claim: Known | None
    ) -> Refused:
        """Whether an agent may make a run of this kind of a variant, for a claim."""
        if claim is not None and claim.claim.author == holder:
            return NotIndependent
        if LISTS[kind] == "verification" and any(
            one.scope == scope
            and one.claim.variant == variant
            and one.claim.author == holder
            and not one.verdicts
            for one in self.claims
        ):
            return NotIndependent
        for_claim = kind in (RunKind.VERIFICATION, RunKind.REPRODUCTION)
        if claim is None:
            return InvariantViolated if for_claim else None
        about = [claim.claim.variant] + ([] if for_claim else [claim.claim.reference])
        if claim.scope != scope or variant not in about:
            return InvariantViolated
        closed = any(verdict.decision not in STANDING for verdict in claim.verdicts)
        return ClaimClosed if for_claim and closed else None

    def reproduction_job(self, claim: Known) -> Job:
        return Job(claim.scope, "reproduction", claim.claim.variant.fingerprint, (claim.claim.id,))

    def reproduction_refusal(self, claim: Known, holder: str) -> Refused:
        job = self.reproduction_job(claim)
        if self.result(job) is not None:
            return AlreadyRun
        return self.busy(job) or self.claim_refusal(
            claim.scope, holder, claim.claim.variant, RunKind.REPRODUCTION, claim
        )

    def study_job(
        self, scope: Scope, variant: Variant, position: int, data: int | None, repeat: int
    ) -> Job:
        order = position if data is None else data
        return Job(scope, "study", variant.fingerprint, (position, order, repeat))

    def study_refusal(self, job: Job) -> Refused:
        return AlreadyRun if self.result(job) is not None else self.busy(job)

    def leased(self, lease: Lease, job: Job, society: str, *, expired: bool) -> None:
        """A lease was given; one that had run out on the same work has ended."""
        before = self.holder(job)
        if before is not None:
            before.living = False
        self.held.append(Held(lease, job, society, expired=expired))

    def end_refusal(self, held: Held) -> Refused:
        """Whether its holder may still prolong or finish a lease."""
        return None if held.living else LeaseLost

    def finished(self, held: Held, run: Run) -> None:
        held.living = False
        self.runs.append(run)
        self.job_of[run.id] = held.job
        if run.kind is RunKind.SCREENING:
            self.tested_by_a_run(run)

    def released_all(self, society: str) -> int:
        ended = [one for one in self.held if one.living and one.society == society]
        for one in ended:
            one.living = False
        return len(ended)

    def living(self, scope: Scope) -> list[Lease]:
        """What `Ledger.leases` must list."""
        return [
            one.lease
            for one in self.held
            if one.living and not one.expired and one.job.scope == scope
        ]

    def pool(self, scope: Scope, variant: Variant, which: str) -> dict[int, float | None]:
        """What `Ledger.pool` must answer."""
        found = {}
        for place, seed in enumerate(self.seeds.get((which, scope), ())):
            at = (place, place, 0) if which == "study" else (place,)
            run = self.result(Job(scope, which, variant.fingerprint, at))
            if run is not None:
                found[seed] = run.score
        return found

    # --- claims, verdicts, champions -----------------------------------------------------------

    def filing_refusal(self, scope: Scope, entry: NewClaim) -> Refused:
        run = next((run for run in self.runs if run.id == entry.screening_run), None)
        fine = (
            run is not None
            and run.kind is RunKind.SCREENING
            and run.outcome is Outcome.COMPLETED
            and self.job_of[run.id].scope == scope
            and run.variant != entry.reference_variant
            and not any(
                one.claim.screening_run == run.id and one.claim.reference == entry.reference_variant
                for one in self.claims
            )
        )
        return None if fine else InvariantViolated

    def verdict_refusal(self, claim: Known, decision: Decision, cited: Iterable[str]) -> Refused:
        cited = list(cited)
        decisions = [verdict.decision for verdict in claim.verdicts]
        if decision in PROBATION:
            if decisions != [Decision.ACCEPTED]:
                return InvariantViolated
        elif decisions or (decision is Decision.ACCEPTED and not cited):
            return InvariantViolated
        accepted_now = claim.accepted is not None or decision is Decision.ACCEPTED
        for run_id in cited:
            refused = self.evidence_refusal(claim, run_id, accepted_now=accepted_now)
            if refused is not None:
                return refused
        return None

    def evidence_refusal(self, claim: Known, run_id: str, *, accepted_now: bool) -> Refused:
        """Whether a verdict on a claim may cite a run."""
        run = next((run for run in self.runs if run.id == run_id), None)
        about = claim.claim
        if run is None or run.id == about.screening_run:
            return InvariantViolated
        for_it = run.kind is RunKind.REPRODUCTION and run.claim_id == about.id
        pooled = run.kind in (RunKind.CALIBRATION, RunKind.VERIFICATION)
        if self.job_of[run.id].scope != claim.scope or not (pooled or for_it):
            return InvariantViolated
        if run.variant not in (about.variant, about.reference):
            return InvariantViolated
        own = run.agent == about.author and run.variant == about.variant
        since = run.started_at >= about.filed_at
        accepted = claim.accepted
        settled = accepted is not None and accepted.decided_at <= run.started_at
        return NotIndependent if own and since and not settled else None

    def evidence(self, claim: Known) -> list[str]:
        """Every run that a verdict on a claim may cite."""
        return [
            run.id
            for run in self.runs
            if self.evidence_refusal(claim, run.id, accepted_now=False) is None
        ]

    def crown_refusal(self, scope: Scope, entry: Crown, accepting: Verdict | None) -> Refused:
        """Whether a variant may be crowned, in a commit that brings the verdict `accepting`."""
        history = self.champions.get(scope, [])
        screened = entry.screening_run is None or any(
            run.id == entry.screening_run
            and run.kind is RunKind.SCREENING
            and run.variant == entry.variant
            and self.job_of[run.id].scope == scope
            for run in self.runs
        )
        if entry.reverts:
            fine = entry.variant in [champion.variant for champion in history]
        elif not history:
            fine = entry.claim_id is None
        else:
            fine = self._deserved(scope, entry, accepting)
        return None if fine and screened else InvariantViolated

    def _deserved(self, scope: Scope, entry: Crown, accepting: Verdict | None) -> bool:
        history = self.champions[scope]
        claim = next((one for one in self.claims if one.claim.id == entry.claim_id), None)
        if claim is None or (claim.scope, claim.claim.variant) != (scope, entry.variant):
            return False
        verdict = claim.accepted or accepting
        if verdict is None or verdict.claim_id != claim.claim.id:
            return False
        by_id = {run.id: run for run in self.runs}
        backed = any(
            by_id[run].variant == entry.variant and by_id[run].split is Split.HOLDOUT
            for run in verdict.runs
        )
        crowned = [champion.claim_id for champion in history if not champion.reverts]
        new = entry.claim_id not in crowned
        return backed and new and claim.claim.reference == history[-1].variant

    # --- hypotheses ----------------------------------------------------------------------------

    def proposed(self, scope: Scope, variant: Variant) -> bool:
        """Whether somebody had this idea before, or has run it."""
        had = any((idea.scope, idea.record.variant) == (scope, variant) for idea in self.ideas)
        return had or bool(self.results(self.screening_job(scope, variant)))

    def screener(self, idea: Idea) -> Held | None:
        """Who is screening an idea's variant at this moment."""
        holder = self.holder(self.screening_job(idea.scope, idea.record.variant))
        return holder if holder is not None and not holder.expired else None

    def waits(self, idea: Idea) -> bool:
        """Whether an idea is stored as open, or was taken and ran out."""
        state = idea.record.state
        return state is HypothesisState.OPEN or (state is HypothesisState.TAKEN and idea.expired)

    def now(self, idea: Idea) -> Hypothesis:
        """An idea as all must see it: taken while it is screened, open when a take ran out."""
        record = idea.record
        if record.state not in (HypothesisState.OPEN, HypothesisState.TAKEN):
            return record
        screener = self.screener(idea)
        if screener is not None:
            lease = screener.lease
            taken = HypothesisState.TAKEN
            values = (taken, lease.holder, lease.expires_at)
        elif self.waits(idea):
            values = (HypothesisState.OPEN, None, None)
        else:
            return record
        state, taken_by, taken_until = values
        return dataclasses.replace(record, state=state, taken_by=taken_by, taken_until=taken_until)

    def take_refusal(self, idea: Idea | None) -> Refused:
        if idea is None:
            return InvariantViolated
        free = self.waits(idea) and self.screener(idea) is None
        return None if free else AlreadyLeased

    def tested_by_a_run(self, run: Run) -> None:
        """A screening run has finished: it tests what was said about its variant."""
        for idea in self.ideas:
            about = (idea.scope, idea.record.variant) == (self.job_of[run.id].scope, run.variant)
            if about and idea.record.state in (HypothesisState.OPEN, HypothesisState.TAKEN):
                self.change(idea, state=HypothesisState.TESTED, run_id=run.id)

    @staticmethod
    def change(idea: Idea, **values: object) -> None:
        idea.record = dataclasses.replace(idea.record, **values)  # type: ignore[arg-type]

    def reopen(self, idea: Idea) -> None:
        self.change(idea, state=HypothesisState.OPEN, taken_by=None, taken_until=None)
        idea.expired, idea.taken_in = False, None
