"""`society audit`: re-train champion and baseline on fresh seeds and check the reported gain.

The audit seeds are a list of their own, drawn by the ledger: no run that led to the champion has
ever used them. The audit's runs are recorded like all others, and the report shows them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from society import provenance
from society.errors import LeaseError, UsageError
from society.experiments import gate
from society.experiments.local import LocalExecutor
from society.experiments.space import Space
from society.experiments.task import load_task
from society.memory.ledger import Ledger
from society.records import Effect, Outcome, Run, RunKind, Scope, SocietyRecord, Variant, Work
from society.render import write_report
from society.report import build_report

if TYPE_CHECKING:
    from society.experiments.executor import Executor
    from society.experiments.task import Task
    from society.memory.folder import NotebookFolder

LEASE_S = 3600.0
HOLDER = "auditor"


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What the audit found; effects in the task's metric, positive = better."""

    champion: Variant
    seeds: int
    """Fresh seeds on which both have been run."""
    reported: Effect
    """The gain as the report states it, on the verification seeds."""
    audited: Effect
    """The gain on the audit seeds."""
    expected: tuple[float, float]
    """Where the audited mean lies in 95 % of cases if the reported seeds are representative."""
    unit: str
    markdown: Path
    html: Path

    @property
    def confirmed(self) -> bool:
        """Whether the audited mean is one that the reported seeds let expect."""
        return self.expected[0] <= self.audited.mean <= self.expected[1]

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.confirmed:
            return "confirms the reported gain"
        found = "LESS" if self.audited.mean < self.expected[0] else "more"
        return f"finds {found} than was reported: believe the audit"


def audit(
    folder: NotebookFolder,
    *,
    seeds: int = 8,
    slots: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditResult:
    """Run champion and baseline on `seeds` fresh seeds (those already audited are not repeated).

    Args:
        folder: A notebook with an accepted champion.
        seeds: Fresh seeds per recipe.
        slots: Runs at a time; None for one per core.
        progress: Called with (finished, wanted) runs.

    Raises:
        UsageError: Nothing has been accepted yet, so there is no gain to audit.
        SocietyError: The notebook is in use or damaged, or the workers do not start.
    """
    if seeds < 4:
        raise UsageError(f"--seeds {seeds}: an interval needs at least 4 seeds.")
    folder.require()
    with folder.lock(), Ledger.open(folder.ledger) as ledger:
        record = _last_society(ledger, folder)
        name, profile = str(record.settings["task"]), record.settings["profile"]
        task = load_task(name, str(profile))
        device, least = str(record.settings["device"]), provenance.least_level(record.settings)
        executor = LocalExecutor(name, str(profile), slots, device, require=least)
        scope = asyncio.run(_runs(ledger, record, task, executor, seeds, progress))
        report = build_report(ledger, scope, task, Space.of(task), record.id)
        markdown, html = write_report(report, folder.report)
        head = report.headline
        if head.gain is None or head.audit is None:
            raise UsageError("The audit's runs failed; see the failed runs in the report.")
        champion = head.champion.variant
        pools = ledger.pool(scope, Variant(task.key)), ledger.pool(scope, champion)
        expected = gate.expected_gain(*pools, head.audit.seeds, task.direction.sign)
    return AuditResult(champion, seeds, head.gain, head.audit, expected, task.unit, markdown, html)


def _last_society(ledger: Ledger, folder: NotebookFolder) -> SocietyRecord:
    records = [record for record in folder.own(ledger.societies()) if not record.is_study]
    if not records:
        raise UsageError(f"No society has worked in {folder.path} yet.")
    return records[-1]


async def _runs(
    ledger: Ledger,
    record: SocietyRecord,
    task: Task,
    executor: Executor,
    seeds: int,
    progress: Callable[[int, int], None],
) -> Scope:
    ledger.release_all(record.id)
    await executor.start()
    try:
        scope = Scope(task.key, executor.environment.tier)
        champion = ledger.champion(scope)
        if champion is None or champion.variant.is_baseline:
            raise UsageError(
                f"Nothing has been accepted for {scope.task} on this hardware ({scope.tier}): "
                "there is no gain to audit."
            )
        provenance.keep(ledger, task, executor.environment)
        pair = (Variant(task.key), champion.variant)
        wanted = [variant for _ in range(seeds) for variant in pair]
        done = _audited(ledger, scope)
        todo = [v for n, v in enumerate(wanted) if n // 2 >= done.get(v.fingerprint, 0)]
        finished = len(wanted) - len(todo)
        progress(finished, len(wanted))
        for job in asyncio.as_completed(
            [_one(ledger, record, task, scope, executor, variant) for variant in todo]
        ):
            await job
            finished += 1
            progress(finished, len(wanted))
        await executor.close()
        return scope
    finally:
        executor.kill()


def _audited(ledger: Ledger, scope: Scope) -> dict[str, int]:
    counts: dict[str, int] = {}
    for run in ledger.runs(scope, kinds=[RunKind.AUDIT]):
        mark = run.variant.fingerprint
        counts[mark] = counts.get(mark, 0) + (run.outcome is not Outcome.CRASHED)
    return counts


async def _one(
    ledger: Ledger,
    record: SocietyRecord,
    task: Task,
    scope: Scope,
    executor: Executor,
    variant: Variant,
) -> Run | None:
    try:
        lease = ledger.lease_audit(scope, record.id, holder=HOLDER, variant=variant, ttl_s=LEASE_S)
    except LeaseError:
        return None
    work = Work(lease.run_id, lease.variant, lease.seed, lease.split, task.budget)
    measured = await executor.run(work)
    return ledger.finish(lease, measured, executor.environment, task.budget)
