"""`society rerun`: make a recorded run again, from what the notebook holds, and compare the bits.

Everything a run depends on is on record: the change, its seeds, split and budget, the data's hash
and the environment. Nothing is written, so it works beside a running society; the new result is a
check and evidence for nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from society.experiments.local import LocalExecutor
from society.memory.ledger import Ledger
from society.records import BudgetKind, Outcome, Work

if TYPE_CHECKING:
    from society.memory.folder import NotebookFolder
    from society.records import Environment, Measurement, Run


@dataclass(frozen=True, slots=True)
class Rerun:
    """A run on record beside the same run made now."""

    run: Run
    measured: Measurement
    environment: Environment
    """Of the new run."""

    @property
    def same(self) -> bool:
        """Whether outcome and score are the same to the last bit."""
        return (self.run.outcome, self.run.score) == (self.measured.outcome, self.measured.score)

    @property
    def differences(self) -> tuple[str, ...]:
        """What the bits depend on and is not what it was, e.g. `packages`, `data`."""
        then, now = self.run.environment, self.environment
        odd = [f.name for f in fields(now) if getattr(then, f.name) != getattr(now, f.name)]
        if self.run.data_hash != self.measured.data_hash:
            odd.append("data")
        return tuple(odd)

    @property
    def reproduced(self) -> bool | None:
        """Whether the bits came again; None where nothing promises that they do.

        They may differ in another environment, under a budget in seconds, and after a crash or a
        time-out, which are the machine's.
        """
        promised = not self.differences and self.run.budget.kind is not BudgetKind.SECONDS
        accident = {Outcome.CRASHED, Outcome.TIMED_OUT} & {self.run.outcome, self.measured.outcome}
        if self.same or (promised and not accident):
            return self.same
        return None

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        if self.same:
            return "the same bits"
        if self.reproduced is False:
            return "NOT REPRODUCED: other bits in the same environment"
        if self.differences:
            return f"other bits; what they depend on has changed: {', '.join(self.differences)}"
        return (
            "other bits, and nothing promises the same ones (a budget in seconds, or an accident)"
        )


def rerun(folder: NotebookFolder, run_id: str) -> Rerun:
    """Make a recorded run again.

    Raises:
        InvariantViolated: No finished run of this id is in the notebook.
        SocietyError: The notebook cannot be read, the task is gone, or the workers do not start.
    """
    with Ledger.open(folder.require().ledger, read_only=True) as ledger:
        run = ledger.run(run_id)
        settings = ledger.society(run.society).settings
    task, profile = str(settings["task"]), str(settings["profile"])
    executor = LocalExecutor(task, profile, 1, str(settings["device"]))
    return asyncio.run(_again(run, executor))


async def _again(run: Run, executor: LocalExecutor) -> Rerun:
    work = Work(run.id, run.variant, run.seed, run.split, run.budget, run.data_seed)
    try:
        await executor.start()
        measured = await executor.run(work)
        await executor.close()
        return Rerun(run, measured, executor.environment)
    finally:
        executor.kill()
