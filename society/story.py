"""The story of a society in a few paragraphs: a model writes it, its numbers are checked.

It is written from lines of facts out of the ledger, once at the end, and kept as an insight by the
agent `narrator` whose text begins with `Narrative: `, so that a report made later shows the same
one. A text with a number that no fact holds is asked for once more, and then left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from society import logs
from society.agents.laboratory import STORYTELLER
from society.experiments.effects import KnobVerdict, describe, describe_dead_end
from society.records import NewInsight, Outcome
from society.report import build_report
from society.roles import Reader
from society.roles.figures import Facts
from society.wording import change_text, delta, duration, headline_sentences, interval, number

if TYPE_CHECKING:
    from society.agents.laboratory import Laboratory
    from society.report import Finding, Report

MARK = "Narrative: "
"""How the insight begins that is a society's story."""
CITED = 20
"""Most records that it cites."""
SHOWN = 15
"""Most claims that it is told about, the latest."""


async def tell_story(laboratory: Laboratory) -> None:
    """Have the society's brain tell what happened, if it can, and keep what can be checked."""
    brain, log = laboratory.brain, logs.get("story")
    trouble: str = getattr(brain, "trouble", "")
    if not isinstance(brain, Reader) or trouble:
        return
    report = build_report(
        laboratory.ledger, laboratory.scope, laboratory.task, laboratory.space,
        laboratory.record.id,
    )  # fmt: skip
    if not report.runs:
        return
    facts = story_facts(report)
    known, odd = Facts(facts), list[str]()
    for _ in range(2):
        text = await brain.narrate(facts, odd)
        odd = known.unsupported(text)
        if text and not odd:
            _keep(laboratory, report, text)
            return
        if not text:
            break
    log.info("no narrative", unsupported=odd)


def _keep(laboratory: Laboratory, report: Report, text: str) -> None:
    evidence = [finding.claim.id for finding in report.findings[-CITED:]]
    evidence = evidence or [run.id for run in report.runs[-CITED:]]
    laboratory.ledger.commit(
        laboratory.scope,
        laboratory.record.id,
        STORYTELLER,
        [NewInsight(MARK + text, tuple(evidence))],
        key=f"narrative/{laboratory.record.id}/{len(report.runs)}",
    )


def story_facts(report: Report) -> list[str]:
    """What a story may be made of, a line each: every number in it is the ledger's."""
    head, unit = report.headline, report.unit
    better = "lower" if report.direction.sign < 0 else "higher"
    facts = [
        f"The task was {report.task}: {report.metric} in {unit}, {better} is better.",
        *headline_sentences(report),
        f"{head.runs} runs were made in {duration(head.wall_s)}.",
        f"The champion: {head.champion.variant.describe()}.",
    ]
    if report.noise is not None:
        facts.append(
            f"The noise floor, measured on {report.noise.seeds} seeds, is "
            f"{number(report.noise.sd)} {unit}."
        )
    facts += [_counted(report), *(_told(one, unit) for one in report.findings[-SHOWN:])]
    facts += [
        f"Over all screening runs, verified by nobody: {describe(effect, unit=unit)}"
        for effect in report.effects
        if effect.verdict in (KnobVerdict.HELPS, KnobVerdict.HURTS)
    ]
    facts += [f"Dead end: {describe_dead_end(end)}" for end in report.dead_ends]
    return facts


def _counted(report: Report) -> str:
    """How many claims there were, and how the runs ended that did not complete."""
    failed = {one: sum(run.outcome is one for run in report.failures) for one in Outcome}
    words = [f"{count} {one.replace('_', ' ')}" for one, count in failed.items() if count]
    undecided = len(report.undecided)
    return (
        f"{len(report.findings)} claims were filed, {report.headline.accepted} stand accepted, "
        f"{undecided} are undecided. Runs that failed: {', '.join(words) or 'none'}."
    )


def _told(finding: Finding, unit: str) -> str:
    claim = finding.claim
    told = f"{claim.id}: {change_text(claim.variant, claim.reference)}, against {finding.against}"
    if finding.decision is None:
        return f"{told}: undecided."
    told += f": {finding.decision.replace('_', ' ')}"
    effect = finding.effect
    if effect is None:
        return f"{told}."
    return f"{told}; effect {delta(effect.shrunken)} {unit}, interval {interval(effect)}."
