"""`View`: the notebook as roles see it, read-only, with the gate's opinion on every open claim.

A view is made for one state of the notebook and shared by all agents until something is written;
its facts are computed when first asked for. Screening runs, of which there may be a hundred
thousand, stand on a `Board` that the ledger keeps in memory, beside claims and champions: a new
view reads from the database only what is new.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from society.errors import InvalidVariant, InvariantViolated
from society.experiments import gate
from society.records import Decision, RunKind, Variant
from society.roles.base import BudgetLeft, Charter, Knowledge, Result

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from society.experiments.space import Space
    from society.experiments.task import Task
    from society.memory.mirror import Board, Docket
    from society.memory.reader import LedgerReader
    from society.records import Champion, Claim, Lease, Noise, Run, Scope

CANDIDATES = 100
"""Most screening runs that are offered as claims at a time, the best."""
DIGEST = 1000
"""A brain is told of so many of the best screening runs, and of so many of the latest."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A screening run that could become a claim."""

    run: Run
    reference: Variant
    delta: float
    """Improvement over the reference on the same screening seed, in the metric."""


class View:
    """What is known now. All scores are in the task's metric; `delta` > 0 means better."""

    def __init__(
        self,
        ledger: LedgerReader,
        *,
        scope: Scope,
        society: str,
        task: Task,
        space: Space,
        charter: Charter,
        budget: BudgetLeft,
        entropy: int,
    ) -> None:
        """See `society.app`, which makes views."""
        self.ledger = ledger
        self.scope = scope
        self.society = society
        self.task = task
        self.space = space
        self.charter = charter
        self.budget = budget
        self._entropy = entropy

    # ---------------------------------------------------------------- champion and noise

    @cached_property
    def champion(self) -> Champion:
        """The best accepted variant."""
        champion = self.ledger.champion(self.scope)
        if champion is None:
            raise InvariantViolated(f"{self.scope.task} has no baseline champion yet.")
        return champion

    @cached_property
    def champion_claim(self) -> Claim | None:
        """The claim that crowned the champion; None for the baseline."""
        claim = self.champion.claim_id
        return None if claim is None else self.ledger.claim(claim)

    @property
    def baseline(self) -> Variant:
        """The task's recipe without any change."""
        return Variant(self.task.key)

    @cached_property
    def champion_pool(self) -> Mapping[int, float | None]:
        """The champion's holdout scores by verification seed."""
        return self.pool(self.champion.variant)

    @cached_property
    def noise(self) -> Noise | None:
        """The measured noise floor; None until enough baseline seeds have been run."""
        return self.ledger.noise(self.scope)

    def pool(self, variant: Variant) -> Mapping[int, float | None]:
        """A variant's holdout scores by verification seed; None for a run that failed."""
        mark = variant.fingerprint
        if mark not in self._pools:
            self._pools[mark] = self.ledger.pool(self.scope, variant)
        return self._pools[mark]

    def pool_size(self, variant: Variant) -> int:
        """How many holdout results a variant has; cheaper than its pool."""
        return self._pool_sizes.get(variant.fingerprint, 0)

    @cached_property
    def _pools(self) -> dict[str, Mapping[int, float | None]]:
        return {}

    @cached_property
    def _pool_sizes(self) -> Mapping[str, int]:
        return self.ledger.pool_sizes(self.scope)

    # ---------------------------------------------------------------- screening

    @cached_property
    def board(self) -> Board:
        """The screening runs; asks no more of the database than what is new."""
        return self.ledger.board(self.scope)

    @cached_property
    def screenings(self) -> tuple[Run, ...]:
        """Every screening run, in order of finishing, whatever its outcome.

        Without log and curve, which `ledger.run` has. To look for one run, ask `board` or
        `screened`: they do not walk through all of them.
        """
        return self.board.runs()

    @cached_property
    def screening_scores(self) -> Mapping[str, float]:
        """Fingerprint -> validation score of completed screening runs."""
        return self.board.scores()

    def screened(self, variant: Variant) -> bool:
        """Whether the variant has been screened, whatever came of it."""
        return variant.fingerprint in self.board

    @property
    def champion_screening(self) -> float | None:
        """The champion's own score on the screening seed, which proposals are compared with."""
        return self.board.score(self.champion.variant.fingerprint)

    def screening_delta(self, run: Run) -> float | None:
        """Improvement of a screening run over the champion on the same seed."""
        reference = self.champion_screening
        if reference is None or run.score is None:
            return None
        return self.task.direction.improvement(reference, run.score)

    @cached_property
    def winners(self) -> tuple[Candidate, ...]:
        """Screening runs that could become a claim against the champion, best first."""
        crowned = {entry.variant.fingerprint for entry in self.ledger.champions(self.scope)}
        return self._candidates(self.champion.variant, self._docket.settled | crowned)

    @cached_property
    def single_changes(self) -> tuple[Candidate, ...]:
        """Screening runs of one change alone that could become a claim against the baseline."""
        if self.champion.variant.is_baseline:
            return ()
        return self._candidates(self.baseline, self._docket.claimed, alone=True)

    def _candidates(
        self, reference: Variant, settled: Container[str], *, alone: bool = False
    ) -> tuple[Candidate, ...]:
        """The best that beat `reference` on the same seed by enough to be worth a claim."""
        level = self.board.score(reference.fingerprint)
        if self.noise is None or level is None:
            return ()
        direction = self.task.direction
        found: list[Candidate] = []
        for mark, run in self.board.best(direction.sign, alone=alone):
            delta = direction.improvement(level, run.score or 0.0)
            if len(found) == CANDIDATES or not gate.worth_filing(delta, self.noise.sd):
                break
            if mark not in settled:
                found.append(Candidate(run, reference, delta))
        return tuple(sorted(found, key=lambda one: (-one.delta, one.run.number)))

    @cached_property
    def untried_alone(self) -> tuple[Variant, ...]:
        """Each of the champion's changes alone, where nobody has screened that yet."""
        leased = {lease.variant.fingerprint for lease in self.leases}
        alone = []
        for knob, value in self.champion.variant.overrides.items():
            with suppress(InvalidVariant):  # the recipe may refuse one change without another
                alone.append(self.space.variant(self.task.key, {knob: value}))
        if self.champion.variant.patch is not None:  # its code is one change, however long
            alone.append(Variant(self.task.key, patch=self.champion.variant.patch))
        return tuple(
            variant
            for variant in alone
            if variant.fingerprint not in leased and not self.screened(variant)
        )

    def since(self, run: Run) -> int:
        """Screening runs that finished after `run`."""
        return self.board.after(run.number)

    # ---------------------------------------------------------------- claims

    @cached_property
    def _docket(self) -> Docket:
        return self.ledger.docket(self.scope)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """All claims, oldest first."""
        return self._docket.claims

    @property
    def rejected(self) -> Sequence[Claim]:
        """The claims that were rejected against the present champion."""
        return self._docket.rejected.get(self.champion.variant.fingerprint, ())

    @cached_property
    def open_claims(self) -> tuple[Claim, ...]:
        """Claims without a verdict, the most promising screening result first."""
        waiting = self.ledger.open_claims(self.scope)
        return tuple(sorted(waiting, key=lambda claim: -claim.screening_delta))

    def claims_against(self, reference: Variant) -> list[Claim]:
        """The open claims that somebody beats `reference`."""
        mark = reference.fingerprint
        return [claim for claim in self.open_claims if claim.reference.fingerprint == mark]

    @cached_property
    def assessments(self) -> Mapping[str, gate.Assessment]:
        """The gate's opinion on each open claim, by claim id."""
        return {claim.id: gate.assess(self.evidence(claim)) for claim in self.open_claims}

    def evidence(self, claim: Claim) -> gate.Evidence:
        """The numbers a claim is judged by.

        While the champion is the baseline, its pool *is* the noise measurement, so the noise floor
        is not entered a second time.
        """
        noise = None if claim.reference.is_baseline else self.noise
        return gate.Evidence(
            champion=self.pool(claim.reference),
            candidate=self.pool(claim.variant),
            s2_base=noise.sd**2 if noise else 0.0,
            nu_base=noise.seeds - 1 if noise else 0.0,
            direction=self.task.direction.sign,
            carried_log_e=claim.carried_log_e,
            alpha=claim.alpha,
        )

    def runs_of(self, claim: Claim) -> tuple[str, ...]:
        """Ids of the holdout runs a verdict on the claim rests on."""
        kinds = [RunKind.CALIBRATION, RunKind.VERIFICATION]
        pools = (
            self.ledger.runs(self.scope, kinds=kinds, variant=variant)
            for variant in (claim.variant, claim.reference)
        )
        return tuple(run.id for pool in pools for run in pool)

    def reproductions(self, claim: Claim) -> tuple[Run, ...]:
        """Repeats of the claim's screening run by others."""
        runs = self.ledger.runs(self.scope, kinds=[RunKind.REPRODUCTION], variant=claim.variant)
        return tuple(run for run in runs if run.claim_id == claim.id)

    def family_of(self, variant: Variant) -> int:
        """Family of a would-be claim: that of the nearest earlier claim of the same idea, or new.

        Decided from the notebook by distance in the search space, never by the proposer.
        """
        docket, key = self._docket, (self.space, variant.fingerprint)
        measured, distance, family = docket.nearest.get(key, (0, float("inf"), 0))
        near = [
            (self.space.distance(variant, claim.variant), claim.family)
            for claim in docket.claims[measured:]
        ]
        distance, family = min([(distance, family), *near])
        docket.nearest[key] = (len(docket.claims), distance, family)
        if distance <= self.charter.same_idea:
            return family
        return 1 + max((claim.family for claim in self.claims), default=0)

    def family_capital(self, family: int) -> float:
        """Log capital the family's closed claims hand on; never positive."""
        verdicts = [claim.verdict for claim in self.claims if claim.family == family]
        return gate.family_capital((v.log_e, v.decision) for v in verdicts if v is not None)

    def alpha(self) -> float:
        """The level of a claim filed now."""
        kept = (Decision.ACCEPTED, Decision.CONFIRMED)
        accepted = sum(claim.verdict_is(*kept) for claim in self.claims)
        filed = len({claim.family for claim in self.claims})
        return gate.alpha_at(accepted, filed)

    # ---------------------------------------------------------------- work under way, budget

    @cached_property
    def leases(self) -> tuple[Lease, ...]:
        """Work under way."""
        return self.ledger.leases(self.scope)

    def under_way(self, variant: Variant, *kinds: RunKind) -> int:
        """How many runs of a variant are under way."""
        mark = variant.fingerprint
        return sum(
            lease.kind in kinds and lease.variant.fingerprint == mark for lease in self.leases
        )

    @property
    def closing(self) -> bool:
        """Whether what is left of the budget is kept for deciding and confirming."""
        return self.budget.runs <= self.charter.closing_runs

    @property
    def explaining(self) -> bool:
        """Whether the search is over and the champion's changes are looked at one by one."""
        left = self.charter.explain_share * self.budget.total
        return not self.champion.variant.is_baseline and self.budget.runs <= left

    @property
    def runs_to_search(self) -> int:
        """Runs that the budget must have left for a first idea to be tried."""
        missing = self.calibration_target - len(self.champion_pool) if self.noise is None else 0
        screening = self.champion_screening is None
        return max(0, missing) + screening + 1 + self.charter.closing_runs

    @property
    def calibration_target(self) -> int:
        """Baseline seeds to run before the search starts."""
        wanted = round(self.charter.calibration_share * self.budget.total)
        return max(self.charter.calibration_min, min(self.charter.calibration_max, wanted))

    # ---------------------------------------------------------------- for brains

    def knowledge(self, agent: str | None = None) -> Knowledge:
        """What a brain may know: screening results only, no seeds, no open verifications.

        Of more than `2 * DIGEST` screening runs it is told the `DIGEST` best and the `DIGEST`
        latest; which variants the others were of, it may still ask.

        Args:
            agent: Whose runs it may know beside the champion's; None for everybody's.
        """
        champion, board = self.champion.variant.fingerprint, self.board
        sign = self.task.direction.sign
        if agent is not None:
            board = board.only(lambda run: run.agent == agent, champion)
        told = board.digest(sign, DIGEST)
        return Knowledge(
            space=self.space,
            direction=self.task.direction,
            task=self.task.key,
            champion=self.champion.variant,
            champion_score=self.champion_screening,
            results=tuple(
                Result(run.variant, board.score(run.variant.fingerprint)) for run in told
            ),
            count=len(board),
            known=board,
            pending=tuple(
                lease.variant
                for lease in self.leases
                if lease.kind is RunKind.SCREENING and agent in (None, lease.holder)
            ),
            noise_sd=self.noise.sd if self.noise else None,
            entropy=_digest(self._entropy, len(self.board), len(self.leases)),
        )


def _digest(*numbers: int) -> int:
    """Randomness from which nobody can get back to the society's seed, which secret seeds share."""
    text = "/".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
