"""What the records of a notebook add up to: rows for the frames that answer a question.

Pure functions from records to rows, without a database and without pandas. Effects and gains are
improvements: positive is better, whatever the metric's direction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from society.records import (
    Champion,
    Claim,
    Decision,
    Outcome,
    Refusal,
    Run,
    RunKind,
    Scope,
    Study,
)

Row = dict[str, Any]

LEVEL_Z = 1.959964
"""Standard normal quantile of a 95 % interval."""
STANDING = (Decision.ACCEPTED, Decision.CONFIRMED)
POOLED = (RunKind.CALIBRATION, RunKind.VERIFICATION)


def scope_of(run: Run) -> Scope:
    """Task and tier of a run."""
    return Scope(run.variant.task, run.tier)


def wilson(hits: int, trials: int) -> tuple[float | None, float | None]:
    """Wilson's 95 % interval of a share; (None, None) without trials."""
    if trials == 0:
        return None, None
    z2 = LEVEL_Z**2
    share = hits / trials
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = share * (1 - share) / trials + z2 / (4 * trials**2)
    reach = LEVEL_Z * math.sqrt(spread) / (1 + z2 / trials)
    return max(0.0, middle - reach), min(1.0, middle + reach)


# --- which agent's claims hold up ---


def agent_rows(runs: Iterable[Run], claims: Iterable[Claim]) -> Iterator[Row]:
    """One row per agent of each society: its runs, its claims, and the share that held up.

    A claim holds up when it was accepted and not rolled back. Superseded claims were never decided
    and count for nobody.
    """
    made: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        made.setdefault((run.society, run.agent), []).append(run)
    filed: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        filed.setdefault((claim.society, claim.author), []).append(claim)
    for who in sorted({*made, *filed}):
        yield _agent_row(who, made.get(who, []), filed.get(who, []))


def _agent_row(who: tuple[str, str], runs: Sequence[Run], claims: Sequence[Claim]) -> Row:
    society, agent = who
    decisions = Counter(claim.verdict.decision for claim in claims if claim.verdict is not None)
    held_up = sum(decisions[one] for one in STANDING)
    decided = held_up + decisions[Decision.REJECTED] + decisions[Decision.ROLLED_BACK]
    low, high = wilson(held_up, decided)
    return {
        "society": society,
        "agent": agent,
        "runs": len(runs),
        "screening": sum(run.kind is RunKind.SCREENING for run in runs),
        "failed": sum(run.outcome is not Outcome.COMPLETED for run in runs),
        "wall_s": math.fsum(run.cost.wall_s for run in runs),
        "filed": len(claims),
        "open": sum(claim.is_open for claim in claims),
        "accepted": held_up,
        "rejected": decisions[Decision.REJECTED],
        "rolled_back": decisions[Decision.ROLLED_BACK],
        "superseded": decisions[Decision.SUPERSEDED],
        "hit_rate": held_up / decided if decided else None,
        "hit_low": low,
        "hit_high": high,
    }


# --- what is supported best ---


def support_rows(
    claims: Iterable[Claim], studies: Iterable[Study], runs: Iterable[Run]
) -> list[Row]:
    """Judged claims and concluded studies: what stands first, and in it the largest e-value."""
    known = list(runs)
    rows = [_claim_support(one, known) for one in claims if one.verdict is not None]
    rows += [row for study in studies for row in _study_support(study)]
    return sorted(rows, key=lambda row: (not row["stands"], -_or(row["log_e"], -math.inf)))


def _claim_support(claim: Claim, runs: Sequence[Run]) -> Row:
    verdict = claim.verdict
    assert verdict is not None
    effect = verdict.effect
    return {
        "kind": "claim",
        "id": claim.id,
        "what": claim.variant.describe(),
        "reference": claim.reference.describe(),
        "by": claim.author,
        "verdict": verdict.decision.value,
        "stands": verdict.decision in STANDING,
        "effect": effect.shrunken if effect else None,
        "low": effect.low if effect else None,
        "high": effect.high if effect else None,
        "seeds": effect.seeds if effect else None,
        "log_e": verdict.log_e,
        "e_value": math.exp(min(verdict.log_e, 700.0)),
        "reproduced": _reproduced(claim, runs),
        "decided_at": verdict.decided_at,
    }


def _reproduced(claim: Claim, runs: Sequence[Run]) -> bool | None:
    """Whether somebody else got the bits of the screening run; None where nobody has tried."""
    scores = {run.id: run.score for run in runs if run.id == claim.screening_run}
    again = [
        run.score
        for run in runs
        if run.kind is RunKind.REPRODUCTION
        and run.claim_id == claim.id
        and run.outcome is not Outcome.CRASHED
    ]
    return again[-1] == scores.get(claim.screening_run) if again else None


def _study_support(study: Study) -> Iterator[Row]:
    """A row per change that a concluded study has judged; none for studies of another shape."""
    result = study.result or {}
    arms = result.get("arms") or ([result] if "verdict" in result else [])
    for arm in arms:
        log_e = arm.get("log_e")
        yield {
            "kind": "study",
            "id": study.id,
            "what": arm.get("change") or study.title,
            "reference": "baseline",
            "by": study.kind,
            "verdict": arm.get("verdict"),
            "stands": arm.get("verdict") == "replicated",
            **{name: arm.get(name) for name in ("effect", "low", "high", "seeds")},
            "log_e": log_e,
            "e_value": None if log_e is None else math.exp(min(log_e, 700.0)),
            "reproduced": None,
            "decided_at": study.concluded_at,
        }


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


# --- what was tried around a knob ---


def around_rows(
    knob: str, runs: Iterable[Run], champions: Mapping[Scope, Sequence[Champion]]
) -> Iterator[Row]:
    """Every screening run that changed a knob, and the baselines' own with no value."""
    for run in runs:
        if run.kind is not RunKind.SCREENING:
            continue
        changed = knob in run.variant.overrides
        if not changed and not run.variant.is_baseline:
            continue
        yield {
            "number": run.number,
            "run": run.id,
            "task": run.variant.task,
            "tier": run.tier,
            "society": run.society,
            "agent": run.agent,
            "value": run.variant.overrides.get(knob),
            "baseline": run.variant.is_baseline,
            "others": len(run.variant.overrides) - changed,
            "outcome": run.outcome.value,
            "score": run.score,
            "champion": _rank(run, champions.get(scope_of(run), ())),
            "variant": run.variant.describe(),
            "idea": run.idea,
        }


def _rank(run: Run, history: Sequence[Champion]) -> str:
    """Whether a run's variant is the present champion, a former one, or neither."""
    if history and history[-1].variant == run.variant:
        return "present"
    return "former" if any(one.variant == run.variant for one in history) else ""


# --- where the noise is ---


@dataclass(frozen=True, slots=True)
class Pool:
    """A variant's holdout scores by seed; `failed` counts the runs without a score."""

    variant: str
    fingerprint: str
    scores: Mapping[int, float]
    failed: int


def pools(runs: Iterable[Run]) -> dict[tuple[Scope, str], Pool]:
    """Verification and calibration runs of each variant, one score per seed."""
    found: dict[tuple[Scope, str], list[Run]] = {}
    for run in runs:
        if run.kind in POOLED:
            found.setdefault((scope_of(run), run.variant.fingerprint), []).append(run)
    return {key: _pool(key[1], made) for key, made in found.items()}


def _pool(fingerprint: str, runs: Sequence[Run]) -> Pool:
    scores = {run.seed: run.score for run in runs if run.score is not None}
    return Pool(runs[0].variant.describe(), fingerprint, scores, len(runs) - len(scores))


def spread_rows(
    runs: Iterable[Run], champions: Mapping[Scope, Sequence[Champion]]
) -> Iterator[Row]:
    """One row per variant with holdout scores: their mean, and how far they lie apart."""
    for (scope, fingerprint), pool in pools(runs).items():
        scores = list(pool.scores.values())
        sd = stdev(scores) if len(scores) > 1 else None
        low, high = spread_interval(sd, len(scores))
        history = [one.variant.fingerprint for one in champions.get(scope, ())]
        yield {
            "task": scope.task,
            "tier": scope.tier,
            "variant": pool.variant,
            "fingerprint": fingerprint,
            "seeds": len(scores),
            "failed": pool.failed,
            "mean": fmean(scores) if scores else None,
            "sd": sd,
            "low": low,
            "high": high,
            "champion": fingerprint in history,
        }


def spread_interval(sd: float | None, count: int) -> tuple[float | None, float | None]:
    """Chi-square 95 % interval of a standard deviation; (None, None) where there is none."""
    if sd is None:
        return None, None
    from scipy.special import chdtri

    freedom = count - 1
    return tuple(sd * math.sqrt(freedom / chdtri(freedom, tail)) for tail in (0.025, 0.975))  # type: ignore[return-value]


def paired_rows(claims: Iterable[Claim], runs: Iterable[Run], sign: float) -> Iterator[Row]:
    """One row per claim and seed on which both its variant and its reference have a score.

    Args:
        claims: Which claims.
        runs: Where the scores are.
        sign: -1 where lower scores are better, +1 where higher ones are.
    """
    known = list(runs)
    held = pools(known)
    scopes = {run.id: scope_of(run) for run in known}
    for claim in claims:
        scope = scopes[claim.screening_run]
        mine = held.get((scope, claim.variant.fingerprint))
        other = held.get((scope, claim.reference.fingerprint))
        if mine is None or other is None:
            continue
        for seed, score in mine.scores.items():
            if seed in other.scores:
                yield {
                    "claim_id": claim.id,
                    "variant": claim.variant.describe(),
                    "reference": claim.reference.describe(),
                    "seed": seed,
                    "score": score,
                    "reference_score": other.scores[seed],
                    "gain": sign * (score - other.scores[seed]),
                }


# --- what was refused ---


def saved_rows(refusals: Iterable[Refusal], runs: Iterable[Run]) -> Iterator[Row]:
    """One row per reason: how often, of how many variants, and what running them would have cost.

    A run that was not made is taken to cost what the median screening run did.
    """
    screened = [run.cost for run in runs if run.kind is RunKind.SCREENING]
    wall_s = median(cost.wall_s for cost in screened) if screened else None
    flops = median(cost.flops for cost in screened) if screened else None
    by_reason: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason.value, []).append(refusal)
    for reason, found in by_reason.items():
        yield {
            "reason": reason,
            "refusals": len(found),
            "variants": len({one.variant.fingerprint for one in found}),
            "wall_s": None if wall_s is None else wall_s * len(found),
            "flops": None if flops is None else flops * len(found),
        }
