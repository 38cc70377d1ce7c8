"""`society rerun`: make a recorded run again, from what the notebook holds, and compare the bits.

Everything a run depends on is on record: the change, its seeds, split and budget, the effective
profile, the trainer's source, the data's hash and the environment. Nothing is written, so it works
beside a running society; the new result is a check and evidence for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from society.errors import UsageError
from society.experiments.local import LocalExecutor
from society.experiments.provenance import profile_digest
from society.experiments.task import load_task
from society.memory.ledger import Ledger
from society.provenance import Recorded, least_level
from society.records import BudgetKind, Outcome, Work

if TYPE_CHECKING:
    from society.memory.folder import NotebookFolder
    from society.records import Environment, Measurement, Run

ABSENT = "none"
"""What stands for a package that one of two environments does not name."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """A run on record beside the same run made now."""

    run: Run
    measured: Measurement
    environment: Environment
    """Of the new run."""
    profile: str = ""
    """What became of the profile's file since; empty when it says the same as the record."""
    recorded_code: bool = False
    """Whether the recorded source was used instead of the installed one."""

    @property
    def same(self) -> bool:
        """Whether outcome and score are the same to the last bit."""
        return (self.run.outcome, self.run.score) == (self.measured.outcome, self.measured.score)

    @property
    def differences(self) -> tuple[str, ...]:
        """What the bits depend on and is not what it was, e.g. `packages`, `data`."""
        odd = self.run.environment.differs(self.environment)
        return (*odd, "data") if self.run.data_hash != self.measured.data_hash else odd

    @property
    def details(self) -> tuple[str, ...]:
        """Each difference with both values, e.g. `package torch: 2.12.0 then, 2.13.0 now`."""
        then, now = self.run.environment, self.environment
        told: list[str] = []
        for name in self.differences:
            if name == "packages":
                told += _packages(then.packages, now.packages)
            elif name == "data":
                told.append(_changed("data", self.run.data_hash, self.measured.data_hash))
            else:
                told.append(_changed(name, getattr(then, name), getattr(now, name)))
        return tuple(told)

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


def _changed(name: str, then: object, now: object) -> str:
    return f"{name}: {then or ABSENT} then, {now or ABSENT} now"


def _packages(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield _changed(f"package {name}", then.get(name), now.get(name))


def rerun(folder: NotebookFolder, run_id: str, *, recorded_code: bool = False) -> Rerun:
    """Make a recorded run again.

    The profile is the recorded one, wherever its file is now and whatever it says.

    Args:
        folder: The notebook.
        run_id: Which run.
        recorded_code: Train with the recorded source of the trainer in place of the installed one.

    Raises:
        InvariantViolated: No finished run of this id is in the notebook.
        UsageError: The recorded source is asked for and was not kept.
        SocietyError: The notebook cannot be read, the task is gone, or the workers do not start.
    """
    with Ledger.open(folder.require().ledger, read_only=True) as ledger:
        run = ledger.run(run_id)
        settings = ledger.society(run.society).settings
        recorded = Recorded.of(ledger, run.environment)
    task, device = str(settings["task"]), str(settings["device"])
    with contextlib.ExitStack() as stack:
        profile, note = str(settings["profile"]), ""
        if recorded.profile is not None:
            note = _profile_since(task, profile, run.environment.config)
        if note:
            profile = str(stack.enter_context(_as_file(recorded.profile or "")))
        code = stack.enter_context(_code_of(recorded, run)) if recorded_code else None
        least = least_level(settings)
        executor = LocalExecutor(task, profile, 1, device, code, require=least)
        measured, environment = asyncio.run(_again(run, executor))
    return Rerun(run, measured, environment, note, recorded_code)


def _profile_since(task: str, profile: str, digest: str) -> str:
    """What is different about today's profile; empty when it says what the recorded one says."""
    try:
        today = profile_digest(load_task(task, profile))
    except UsageError as error:
        return f"the recorded one was used, because {profile} cannot be: {error}"
    if today == digest:
        return ""
    return f"the recorded one was used, because {profile} has been changed ({today} now)"


@contextlib.contextmanager
def _as_file(profile: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="society-rerun-") as folder:
        file = Path(folder) / "recorded.yaml"
        file.write_text(profile, "utf-8")
        yield file


@contextlib.contextmanager
def _code_of(recorded: Recorded, run: Run) -> Iterator[Path]:
    if recorded.source is None:
        raise UsageError(
            f"--recorded-code: the source that made {run.id} ({run.environment.code or 'unknown'}) "
            "was not kept. Without the option, the installed one is used."
        )
    with tempfile.TemporaryDirectory(prefix="society-code-") as folder:
        recorded.source.install(Path(folder))
        yield Path(folder)


async def _again(run: Run, executor: LocalExecutor) -> tuple[Measurement, Environment]:
    work = Work(run.id, run.variant, run.seed, run.split, run.budget, run.data_seed)
    try:
        await executor.start()
        measured = await executor.run(work)
        await executor.close()
        return measured, executor.environment
    finally:
        executor.kill()
