"""`Executor`: who runs experiments, and the smallest one, which runs them in this process."""

from __future__ import annotations

import asyncio
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from society.errors import InvalidVariant, SocietyError
from society.experiments.provenance import Source, profile_digest
from society.experiments.space import Space
from society.experiments.task import Diverged, Refused, Role, Task, TrainReport
from society.model import device as devices
from society.model.device import arithmetic, identify, is_out_of_memory
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Environment,
    Measurement,
    Outcome,
    Trial,
    Variant,
    Work,
)

CURVE_POINTS = 64
TAIL_CHARS = 2_000
NO_SANDBOX = "The variant changes code, and this executor has no sandbox for code."


class Executor(Protocol):
    """Runs pieces of `Work` and measures them.

    Concurrency: all methods are called from one event loop. `run` may be called any number of
    times at once; `slots` runs are in progress at most, the others wait in the order of the calls.
    The score is computed by the executor from what the training left behind, never by the
    training process. The same work gives the same score in every slot and after a restart.

    A failing experiment is a `Measurement` with its outcome, not an exception. `run` and `start`
    raise `ExecutorError` when the workers themselves cannot work. Cancelling a call of `run`
    stops its experiment.
    """

    @property
    def slots(self) -> int:
        """How many runs can be in progress at once; final once started."""

    @property
    def environment(self) -> Environment:
        """What the bits of the runs depend on; known once started."""

    @property
    def data_hash(self) -> str:
        """sha256 of the task's data; known once started."""

    @property
    def busy_s(self) -> float:
        """Slot-seconds spent on runs so far, those in progress included."""

    async def start(self) -> None:
        """Start the workers and prepare the data. Raises `ExecutorError` with one clear line."""

    async def run(self, work: Work) -> Measurement:
        """Execute one piece of work when a slot is free."""

    async def trial(self, variant: Variant) -> Trial:
        """Try a variant's code change for a few steps, before a run is spent on it.

        It takes a slot like a run, and whatever goes wrong with it is the trial's `problem`.
        """

    async def close(self) -> None:
        """Let the accepted work finish, then stop the workers. May be called again."""

    def kill(self) -> None:
        """Stop everything now; calls of `run` in progress raise `ExecutorError`."""


class InlineExecutor:
    """Runs the task in this process, one run after the other, for debugging.

    It has no limits and no isolation: a run blocks the event loop, and one that crashes the
    interpreter takes the society with it. Scores equal those of the other executors.
    """

    slots = 1

    def __init__(self, task: Task, device: str = "cpu") -> None:
        """Set up; `environment` and `data_hash` are there once started."""
        self.task, self.device = task, device
        self.busy_s = 0.0
        self.data_hash = ""
        self.environment: Environment
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Prepare the data."""
        self.task.warm_up()
        self.environment = describe(self.task, self.device)
        self.data_hash = self.task.prepare()
        for role in Role:
            self.task.preload(role)

    async def run(self, work: Work) -> Measurement:
        """Train and score here and now."""
        async with self._turn:
            started, cpu = time.monotonic(), time.process_time()
            report, outcome, score, log = TrainReport(), Outcome.COMPLETED, None, ""
            with tempfile.TemporaryDirectory(prefix="society-") as scratch:
                try:
                    report, score = self._measure(work, Path(scratch))
                except Exception as error:  # noqa: BLE001 - whatever a run raises is its outcome
                    outcome, log = outcome_of(error), describe_error(error)
                    report = error.report if isinstance(error, Diverged) else report
            wall = time.monotonic() - started
            self.busy_s += wall
        cost = cost_of(report, wall_s=wall, cpu_s=time.process_time() - cpu)
        return Measurement(outcome, score, cost, log, self.data_hash, thin(report.curve))

    def _measure(self, work: Work, scratch: Path) -> tuple[TrainReport, float]:
        recipe = recipe_of(self.task, work)
        report = train(self.task, recipe, work, scratch, self.device)
        check_budget(work.budget, report)
        return report, check_score(self.task.score(scratch, recipe, work.split, self.device))

    async def trial(self, variant: Variant) -> Trial:
        """There is no sandbox here."""
        return Trial(NO_SANDBOX)

    async def close(self) -> None:
        """Nothing is left running."""

    def kill(self) -> None:
        """Nothing can be stopped."""


def train(task: Task, recipe: object, work: Work, scratch: Path, device: str) -> TrainReport:
    """Have the task train; a task that knows no second seed is asked for none."""
    if work.data_seed is None:
        return task.train(recipe, work.seed, work.budget, scratch, device)
    return task.train(recipe, work.seed, work.budget, scratch, device, data_seed=work.data_seed)


def recipe_of(task: Task, work: Work, *, code: bool = False) -> object:
    """The recipe to train. Raises `Refused` for foreign work, impossible shapes, code changes.

    The latter only where there is no sandbox for them; `code` says that there is one.
    """
    if work.variant.task != task.key:
        raise Refused(f"The work is for task {work.variant.task!r}; this executor runs {task.key}.")
    if work.variant.patch is not None and not code:
        raise Refused(NO_SANDBOX)
    try:
        return Space.of(task).recipe(work.variant)
    except InvalidVariant as error:
        raise Refused(str(error)) from error


def check_budget(budget: Budget, report: TrainReport) -> None:
    """Raise `Refused` if a training spent more than its budget (the last step may cross it)."""
    spent = {
        BudgetKind.FLOPS: report.flops,
        BudgetKind.TOKENS: float(report.tokens),
        BudgetKind.STEPS: float(report.steps),
        BudgetKind.SECONDS: 0.0,  # the clock is the time-out's concern
    }[budget.kind]
    last_step = spent / max(1, report.steps)
    if report.steps > 1 and spent - last_step > budget.amount * (1 + 1e-9):
        raise Refused(f"Spent {spent:g} {budget.kind}; the budget is {budget.amount:g}.")


def check_score(score: float) -> float:
    """The score itself; raises `Diverged` if it is not a finite number."""
    if not math.isfinite(score):
        raise Diverged(f"the score is {score}")
    return float(score)


def outcome_of(error: Exception) -> Outcome:
    """How a run that raised `error` is recorded."""
    if isinstance(error, Diverged):
        return Outcome.DIVERGED
    return Outcome.REJECTED if isinstance(error, Refused) else Outcome.CRASHED


def describe_error(error: Exception) -> str:
    """One line for the log: the message of an outcome, type and message of a crash."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        kind = "" if isinstance(error, MemoryError) and text else f"{type(error).__name__}: "
        return f"out of memory: {kind}{text}".removesuffix(": ")
    if isinstance(error, Diverged | Refused):
        return f"{outcome_of(error)}: {text}"
    if isinstance(error, SocietyError):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def cost_of(
    report: TrainReport,
    *,
    wall_s: float,
    cpu_s: float,
    gpu_s: float = 0.0,
    mem_bytes: int = 0,
) -> Cost:
    """What a run spent, from its report and from what was measured around it."""
    return Cost(
        wall_s=wall_s,
        cpu_s=cpu_s,
        gpu_s=gpu_s,
        flops=report.flops,
        tokens=report.tokens,
        steps=report.steps,
        mem_bytes=mem_bytes,
        train_s=report.train_s,
        compile_s=report.compile_s,
        mfu=report.mfu,
        device_mem_bytes=report.device_mem_bytes,
    )


def thin(curve: Sequence[float], points: int = CURVE_POINTS) -> tuple[float, ...]:
    """At most `points` values at even distances, the first and the last included."""
    if len(curve) <= points:
        return tuple(curve)
    last = len(curve) - 1
    return tuple(curve[round(place * last / (points - 1))] for place in range(points))


def describe(task: Task, device: str) -> Environment:
    """The environment of runs in this process. May start an accelerator: call it in a child."""
    name, capability, more, mem_bytes = device, platform.machine(), "", 0
    if "torch" in task.packages:
        (name, capability), more = identify(device), arithmetic(device)
        mem_bytes = next((card.mem_bytes for card in devices.cards(device)), 0)
    return Environment(
        device=name,
        capability=capability,
        threads=1,
        python=platform.python_version(),
        packages={package: version(package) for package in task.packages},
        arithmetic=more,
        code=source_digest(task.code),
        config=profile_digest(task),
        mem_bytes=mem_bytes,
    )


def source_digest(names: Sequence[str]) -> str:
    """Names the source of modules and packages as it is installed now."""
    return Source.installed(names).digest
