"""`society memory best`: the champion of every task on every hardware tier.

Scores are compared within one exact tier; tiers are grouped into classes (CPU by instruction set,
GPU by memory) to be read side by side, and nothing is ranked across them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from society import tiers
from society.records import Decision, RunKind
from society.report import pool_of

if TYPE_CHECKING:
    from society.memory.reader import LedgerReader
    from society.records import Champion, Effect, Noise, Scope
    from society.report import Pool


@dataclass(frozen=True, slots=True)
class Standing:
    """The best accepted variant of one task on one hardware tier."""

    scope: Scope
    tier_class: str
    """E.g. `CPU AVX512` or `GPU up to 24 GB`."""
    champion: Champion
    decision: Decision | None
    """How its claim stands; None for the baseline: nothing has been accepted there yet."""
    pool: Pool
    """Its holdout scores on the verification seeds of this tier, with their mean and interval."""
    gain: Effect | None
    """Its claim's effect over the champion before it, on this tier; None for the baseline."""
    noise: Noise | None
    """The noise floor measured on this tier."""
    runs: int
    """Runs of societies on this task and tier."""


def standings(ledger: LedgerReader, task: str | None = None) -> tuple[Standing, ...]:
    """Where every task stands on every tier, by task, class and tier.

    Args:
        ledger: What is read.
        task: Only this one, with or without its profile; None for all.
    """
    found = [
        _standing(ledger, scope, champion)
        for scope in ledger.scopes()
        if task is None or task in (scope.task, scope.task.partition("/")[0])
        if (champion := ledger.champion(scope)) is not None
    ]
    return tuple(
        sorted(found, key=lambda s: (s.scope.task, tiers.order(s.tier_class), s.scope.tier))
    )


def _standing(ledger: LedgerReader, scope: Scope, champion: Champion) -> Standing:
    claim = None if champion.claim_id is None else ledger.claim(champion.claim_id)
    verdict = None if claim is None else claim.verdict
    counts = ledger.counts(scope)
    return Standing(
        scope=scope,
        tier_class=tiers.class_of(scope.tier, _memory(ledger, scope)),
        champion=champion,
        decision=None if verdict is None else verdict.decision,
        pool=pool_of(ledger, scope, champion.variant),
        gain=None if verdict is None else verdict.effect,
        noise=ledger.noise(scope),
        runs=sum(count for kind, count in counts.runs.items() if kind is not RunKind.STUDY),
    )


def _memory(ledger: LedgerReader, scope: Scope) -> int:
    """Memory of the accelerator that the tier's latest run was made on; 0 where nobody knows."""
    latest = ledger.runs(scope, last=1)
    return latest[0].environment.mem_bytes if latest else 0
