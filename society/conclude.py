"""What a replication found: results, conclusions in the notebook, and the report.

`report/findings.md` and a self-contained `report/findings.html` are written from the runs on
record; a finding of which everything that was planned has been done gets its conclusion as the
result of its study, and as an insight, so that a search by meaning finds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from society.arms import KIND, Arm, Desk
from society.errors import RecallUnavailable
from society.experiments import evalue
from society.experiments.findings import Finding, Kind, Predicted
from society.experiments.verdicts import (
    ArmResult,
    FindingResult,
    Judgement,
    Rules,
    Trail,
    Verdict,
    advantage,
    certified,
    judge_noise,
    judge_pairs,
    judge_screening,
    judge_trail,
    sentence,
    summary,
)
from society.memory.recall import Recall
from society.plots import ForestRow, findings_forest, standalone
from society.records import NewInsight, Outcome, Run, RunKind
from society.render import fill, replace_file
from society.wording import last_line

if TYPE_CHECKING:
    from society.memory.folder import NotebookFolder
    from society.records import Variant

AGENT = "replicator"
HITS = 5
"""Passages of a search among which a planted failure must be."""


@dataclass(frozen=True, slots=True)
class Replication:
    """What a replication found."""

    task: str
    tier: str
    metric: str
    unit: str
    results: tuple[FindingResult, ...]
    rules: Rules
    noise: tuple[float, float, float, int] | None
    """Standard deviation of the baseline's scores, its 95 % interval, and the seeds."""
    baseline: float | None
    """Mean score of the baseline, holdout split."""
    runs: int
    wall_s: float
    """Of all those runs, summed."""
    markdown: Path
    html: Path

    @property
    def complete(self) -> bool:
        """Whether everything that was planned has been done."""
        return all(result.complete for result in self.results)


def conclude(desk: Desk, folder: NotebookFolder) -> Replication:
    """Judge everything on record, conclude what is complete, and write the report."""
    found = _results(desk, folder)
    _record(desk, found)
    return _publish(desk, found, folder)


def _results(desk: Desk, folder: NotebookFolder) -> tuple[FindingResult, ...]:
    for arm in desk.arms:
        desk.judge(arm)
    return tuple(_result(desk, finding, folder) for finding in desk.order.findings)


def _result(desk: Desk, finding: Finding, folder: NotebookFolder) -> FindingResult:
    """What is known about one finding now."""
    arms = tuple(_arm_result(desk, arm) for arm in desk.arms if arm.finding is finding)
    runs, wall_s = sum(arm.runs for arm in arms), math.fsum(arm.wall_s for arm in arms)
    if finding.kind is Kind.MODEL:
        judgement = arms[0].judgement
        complete = all(arm.judgement.decided for arm in arms)
    elif finding.kind is Kind.DATA_PIPELINE:
        sd = _noise(desk.of_baseline())[0]
        judgement = judge_screening([arm.judgement for arm in arms], sd, desk.rules)
        complete, arms = judgement.decided, _labelled(arms, desk.rules)
    elif finding.kind is Kind.NOISE:
        made = desk.runs(desk.baseline)
        runs, wall_s = len(made), math.fsum(run.cost.wall_s for run in made)
        scores = list(desk.pool(desk.baseline, desk.rules.noise_seeds).values())
        judgement = _explained(judge_noise(scores, finding.size or 0.0, desk.rules))
        complete = judgement.decided
    elif finding.kind is Kind.NEGATIVE_RESULTS:
        judgement = _explained(judge_trail(_trail(desk, finding, folder), desk.rules))
        complete, arms = judgement.decided, ()
    else:
        judgement = _explained(_judge_memory(desk))
        complete = judgement.decided
        handed = [hand for pair in desk.pairs for hand in (pair.shared, pair.own)]
        runs += sum(hand.runs for hand in handed)
        wall_s += math.fsum(hand.wall_s for hand in handed)
        arms = ()
    return FindingResult(
        finding, judgement.verdict, judgement, arms, runs, wall_s,
        desk.studies[finding.id].id, complete,
    )  # fmt: skip


def _explained(judgement: Judgement) -> Judgement:
    """The judgement; where more runs were wanted, its reason says why there are none."""
    if judgement.decided:
        return judgement
    return replace(judgement, reason=f"{judgement.reason}; the time was used up")


def _arm_result(desk: Desk, arm: Arm) -> ArmResult:
    made = desk.runs(arm.variant)
    fixed = Judgement(Verdict.UNDECIDED, True, arm.cap, None, 0.0, 0.0, "")
    return ArmResult(
        arm.variant.describe(),
        arm.predicted if arm.finding.kind is Kind.MODEL else None,
        arm.size,
        _explained(arm.judgement) if arm.judgement is not None else fixed,
        len(made),
        sum(run.outcome is not Outcome.COMPLETED for run in made),
        math.fsum(run.cost.wall_s for run in made),
    )


def _labelled(arms: Sequence[ArmResult], rules: Rules) -> tuple[ArmResult, ...]:
    """The arms of a screening with what e-BH certifies, instead of verdicts on a prediction."""
    labels = certified([arm.judgement for arm in arms], rules)
    return tuple(
        ArmResult(
            arm.change, None, None, arm.judgement, arm.runs, arm.failed, arm.wall_s,
            label.value if label else "",
        )
        for arm, label in zip(arms, labels, strict=True)
    )  # fmt: skip


# ---- negative results


def _trail(desk: Desk, finding: Finding, folder: NotebookFolder) -> Trail:
    """Audit what the notebook keeps of work that led to nothing."""
    ledger, scope = desk.bench.ledger, desk.bench.scope
    leases, traced = ledger.ended_leases(scope)
    assert finding.planted is not None
    planted = desk.runs(desk.variant(finding.planted))
    failed = [run for run in planted if run.outcome is not Outcome.COMPLETED]
    told = sum(bool(run.log_tail.strip()) for run in failed)
    recalled = None
    if failed:
        _post_failure(desk, finding, failed, len(planted))
        recalled = _recalled(desk, folder, failed[0].variant)
    tried, negative = _negatives(desk)
    return Trail(leases, traced, len(planted), len(failed), told, recalled, tried, negative)


def _post_failure(desk: Desk, finding: Finding, failed: Sequence[Run], planted: int) -> None:
    first = failed[0]
    text = (
        f"Negative result: {first.variant.describe()} failed on {len(failed)} of {planted} seeds "
        f"({first.outcome.value}). {last_line(first.log_tail)}"
    )
    _insight(desk, text, [run.id for run in failed], f"planted/{finding.id}/{len(failed)}")


def _recalled(desk: Desk, folder: NotebookFolder, variant: Variant) -> bool | None:
    """Whether a question about the recipe finds that it failed; None while the index is down."""
    ledger = desk.bench.ledger
    try:
        with Recall.open(folder, ledger, lower_is_better=desk.direction < 0) as recall:
            recall.sync(ledger)
            hits = recall.search(f"What happened with {variant.describe()}?", k=HITS)
    except RecallUnavailable:
        return None
    return any(variant.describe() in hit.text and "failed" in hit.text for hit in hits)


def _negatives(desk: Desk) -> tuple[int, int]:
    """Variants of the baseline on record, and how many of them were no better."""
    kinds = [RunKind.STUDY, RunKind.SCREENING]
    scores: dict[tuple[RunKind, str], dict[int, float | None]] = {}
    for run in desk.bench.ledger.runs(desk.bench.scope, kinds=kinds):
        scores.setdefault((run.kind, run.variant.fingerprint), {})[run.seed] = run.score
    base = desk.baseline.fingerprint
    tried = {mark for _, mark in scores if mark != base}
    better = {
        mark
        for (kind, mark), found in scores.items()
        if mark != base and _better(scores.get((kind, base), {}), found, desk.direction)
    }
    return len(tried), len(tried - better)


def _better(
    old: Mapping[int, float | None], new: Mapping[int, float | None], direction: int
) -> bool:
    """Whether the completed runs are better on average than the baseline on the same seeds."""
    gains = [
        direction * (score - before)
        for seed, score in new.items()
        if score is not None and (before := old.get(seed)) is not None
    ]
    return bool(gains) and all(score is not None for score in new.values()) and sum(gains) > 0


# ---- memory


def _judge_memory(desk: Desk) -> Judgement:
    """The pairs whose recipes have been scored on all their seeds."""
    most, base = desk.rules.society_seeds, desk.of_baseline()
    differences = []
    for pair in desk.pairs:
        shared, own = (desk.pool(hand.variant, most) for hand in (pair.shared, pair.own))
        if len(shared) == len(own) == most:
            gain = advantage(base, shared, own, desk.direction)
            if gain is not None:
                differences.append(gain)
    return judge_pairs(differences, _noise(base)[0], desk.rules)


def _noise(pool: Mapping[int, float | None]) -> tuple[float, float, float]:
    finite = [score for score in pool.values() if score is not None]
    return evalue.noise_interval(finite) if len(finite) > 1 else (0.0, 0.0, math.inf)


# ------------------------------------------------------------------------------ the record


def _record(desk: Desk, results: Sequence[FindingResult]) -> None:
    """Record what is complete, and tell everybody who searches the notebook."""
    for result in results:
        if not result.complete:
            continue
        evidence = [run.id for run in _evidence(desk, result)]
        study = desk.bench.conclude(desk.studies[result.finding.id], summary(result), evidence)
        text = sentence(result, desk.bench.task.unit)
        _insight(desk, text, evidence[:20], f"conclusion/{study.id}")


def _evidence(desk: Desk, result: FindingResult) -> list[Run]:
    variants = [arm.variant for arm in desk.arms if arm.finding is result.finding]
    return [run for variant in [desk.baseline, *variants] for run in desk.runs(variant)]


def _insight(desk: Desk, text: str, evidence: Sequence[str], key: str) -> None:
    bench = desk.bench
    bench.ledger.commit(
        bench.scope,
        bench.record.id,
        AGENT,
        [NewInsight(text, tuple(evidence))],
        key=f"{KIND}/{key}/{bench.scope.task}/{bench.scope.tier}",
    )


# ------------------------------------------------------------------------------ the report


def _publish(desk: Desk, results: tuple[FindingResult, ...], folder: NotebookFolder) -> Replication:
    bench, pool = desk.bench, desk.of_baseline()
    finite = [score for score in pool.values() if score is not None]
    made = [run for arm in desk.arms for run in desk.runs(arm.variant)]
    made += desk.runs(desk.baseline)
    done = Replication(
        bench.task.key,
        bench.scope.tier,
        bench.task.metric,
        bench.task.unit,
        results,
        desk.rules,
        (*_noise(pool), len(finite)) if len(finite) > 1 else None,
        math.fsum(finite) / len(finite) if finite else None,
        len({run.id for run in made}),
        math.fsum({run.id: run.cost.wall_s for run in made}.values()),
        folder.report / "findings.md",
        folder.report / "findings.html",
    )
    write(done)
    return done


def write(done: Replication) -> None:
    """Write `findings.md` (with its plot beside it) and a self-contained `findings.html`."""
    plot = findings_forest(rows(done.results), unit=done.unit)
    plots = {} if plot is None else {"findings": plot}
    for name, svg in plots.items():
        place = done.markdown.parent / "plots" / f"{name}.svg"
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, standalone(svg))
    for path, form in ((done.markdown, "md"), (done.html, "html")):
        replace_file(path, fill(f"findings.{form}.j2", form, plots, done=done))


def rows(results: Iterable[FindingResult]) -> list[ForestRow]:
    """The rows of the forest plot: every change that was compared, and the societies."""
    found = []
    for number, result in enumerate(results, start=1):
        for place, arm in enumerate(result.arms):
            main = place == 0 and result.finding.kind is Kind.MODEL
            if arm.judgement.effect is not None:
                found.append(_row(number, arm, main))
        if result.finding.kind is Kind.MEMORY and result.judgement.effect is not None:
            label = f"{number}  shared memory"
            found.append(ForestRow(label, result.judgement.effect, result.verdict.value, main=True))
    return found


def _row(number: int, arm: ArmResult, main: bool) -> ForestRow:
    effect = arm.judgement.effect
    assert effect is not None
    verdict = arm.judgement.verdict.value
    if arm.predicted is None:
        verdict = {"better": "replicated", "worse": "reversed", "": "undecided"}[arm.label]
    sign = -1.0 if arm.predicted is Predicted.WORSE else 1.0
    return ForestRow(
        f"{number}  {arm.change}",
        effect,
        verdict,
        main=main,
        published=None if arm.size is None else sign * arm.size,
        predicted=None if arm.predicted is None else sign,
    )
