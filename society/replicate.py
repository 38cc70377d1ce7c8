"""`society replicate`: published findings, tested here by preregistered studies.

Every finding is registered with its rules before any run. All comparisons share the baseline's
runs; the runs of all comparisons are interleaved, so that no slot idles, and a comparison gets no
more seeds once its rule has decided. In which order the time is spent:

1. the first seeds of the baseline, then the primary change of every finding, seed by seed;
2. the rest of the noise study and the screening of the data pipeline;
3. societies with and without shared memory, and the scores of what they found;
4. the secondary changes.

What is recorded is never run again, so the same command goes on after Ctrl-C or `kill -9`. When the
time is used up, what is not decided is reported as undecided and can be gone on with.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from society.arms import KIND, Arm, Desk, Order
from society.compare import Pair, compare, found_pairs
from society.conclude import Replication, conclude
from society.experiments.findings import Kind, check
from society.experiments.space import Space
from society.experiments.task import default_profile, load_task
from society.settings import Settings, validate
from society.study import workbench

if TYPE_CHECKING:
    from society.memory.folder import NotebookFolder

__all__ = ["Order", "Progress", "Replication", "replicate"]

FIRST_GUESS_S = 5.0
"""Assumed seconds of a run until the first one has finished."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replication is."""

    done: int
    """Runs on record that the plan asked for."""
    most: int
    """Runs if nothing is decided before its largest number of seeds."""
    left_s: float
    """Estimated wall time that is left."""
    news: str = ""
    """What has just been decided or begun."""


def replicate(
    folder: NotebookFolder, order: Order, progress: Callable[[Progress], None] = lambda now: None
) -> Replication:
    """Register, run, judge and report; resumes what an earlier call began.

    Args:
        folder: The notebook; made when there is none.
        order: What to replicate.
        progress: Called after every run, and when something is decided.

    Raises:
        UsageError: The task's space does not allow a change of a finding.
        StudyStopped: Ctrl-C; what was finished is recorded and the report is not written.
        SocietyError: The notebook or the workers fail.
    """
    profile = order.profile or default_profile(order.task)
    task = load_task(order.task, profile)
    check(order.findings, Space.of(task), task.key)
    deadline = math.inf if order.minutes is None else time.monotonic() + 60 * order.minutes
    if all(finding.kind is not Kind.MEMORY for finding in order.findings):
        return asyncio.run(_session(folder, order, deadline, progress, pairs=(), last=True))
    common = _common(order, profile)
    pairs = found_pairs(folder, common, order.rules.societies)
    if len(pairs) < order.rules.societies:
        asyncio.run(_session(folder, order, deadline, progress, pairs=pairs, last=False))
        pairs = compare(
            folder,
            common,
            order.rules.societies,
            deadline=None if order.minutes is None else deadline - _scoring_s(order),
            progress=lambda words: progress(Progress(0, 0, math.nan, words)),
        )
    return asyncio.run(_session(folder, order, deadline, progress, pairs=pairs, last=True))


def _scoring_s(order: Order) -> float:
    """Time kept for scoring what the societies hand over, or they had been run for nothing."""
    return 2 * order.rules.societies * order.rules.society_seeds * FIRST_GUESS_S


def _common(order: Order, profile: str) -> Settings:
    """What all societies of the comparison have in common."""
    given = {
        "task": order.task,
        "profile": profile,
        "agents": order.agents,
        "runs": order.rules.society_runs,
        "slots": order.slots,
        "device": order.device,
    }
    return validate(given, source="society replicate")


async def _session(
    folder: NotebookFolder,
    order: Order,
    deadline: float,
    progress: Callable[[Progress], None],
    *,
    pairs: tuple[Pair, ...],
    last: bool,
) -> Replication:
    """Open the notebook, make the runs that are wanted now, and report what is known."""
    async with workbench(
        folder,
        task=order.task,
        profile=order.profile,
        device=order.device,
        slots=order.slots,
        command=KIND,
        secret_seed=order.secret_seed,
    ) as bench:
        desk = Desk(bench, order, pairs)
        queue = _Queue(desk, deadline, progress, secondary=last)
        await queue.drain()
        return conclude(desk, folder)


class _Queue:
    """Which run comes next, until nothing is wanted or the time is used up."""

    def __init__(
        self,
        desk: Desk,
        deadline: float,
        progress: Callable[[Progress], None],
        *,
        secondary: bool,
    ) -> None:
        """With `secondary`, also what comes after the societies."""
        self.desk, self.deadline, self.progress = desk, deadline, progress
        self.arms = [arm for arm in desk.arms if secondary or arm.stage < 2]
        self.later = 0 if secondary else len(desk.arms) - len(self.arms)
        self.under_way: set[int] = set()
        """Positions of the baseline being run."""
        self._spent = [FIRST_GUESS_S]

    async def drain(self) -> None:
        """Make every run that is wanted; those in progress are finished even if one fails.

        At the end every arm is judged again, because the baseline's pool has grown since some of
        them were closed; those that are open again get more seeds. What is reported is thus a
        function of what is on record, in whatever order it came.
        """
        made = -1
        while made != len(self._spent):
            made = len(self._spent)
            slots = self.desk.bench.executor.slots
            workers = [self._work() for _ in range(slots + 1)]  # one waits: no slot idles
            for ended in await asyncio.gather(*workers, return_exceptions=True):
                if isinstance(ended, BaseException):
                    raise ended
            for arm in self.arms:
                self.desk.judge(arm)

    async def _work(self) -> None:
        while (wanted := self._next()) is not None:
            arm, position = wanted
            busy = arm.under_way if arm else self.under_way
            busy.add(position)
            try:
                variant = arm.variant if arm else self.desk.baseline
                run = await self.desk.bench.run(variant, position)
                self.desk.recorded(variant, fresh=True)
            finally:
                busy.discard(position)
            self._spent.append(run.cost.wall_s)
            self._tell(arm)

    def _next(self) -> tuple[Arm | None, int] | None:
        """The most urgent run; the baseline's stand one seed ahead of everybody's."""
        if time.monotonic() + self.mean_s > self.deadline:
            return None
        wanted: list[tuple[tuple[int, float, int], Arm | None, int]] = []
        cap = self.desk.baseline_cap
        for position in self.desk.open_positions(self.desk.baseline, cap, self.under_way)[:1]:
            stage = 0 if position < self._ahead else 1
            wanted.append(((stage, position - 1.5, -1), None, position))
        for order, arm in enumerate(self.arms):
            if not self.desk.closed(arm):
                for position in self._open(arm)[:1]:
                    wanted.append(((arm.stage, position, order), arm, position))
        if not wanted:
            return None
        _, chosen, place = min(wanted, key=lambda one: one[0])
        return chosen, place

    def _open(self, arm: Arm) -> list[int]:
        return self.desk.open_positions(arm.variant, arm.cap, arm.under_way)

    @property
    def _ahead(self) -> int:
        """Baseline seeds that come before everything else: those that arms are paired on."""
        return max((arm.cap for arm in self.arms if arm.judged), default=0)

    @property
    def mean_s(self) -> float:
        """Mean duration of a run so far."""
        known = self._spent[1:] or self._spent
        return sum(known) / len(known)

    def _tell(self, arm: Arm | None) -> None:
        """Judge the arm that has a new run, and say how far everything is."""
        desk, news = self.desk, ""
        if arm is not None and arm.judged and not desk.closed(arm):
            desk.judge(arm)
            if arm.judgement is not None and arm.judgement.decided:
                news = f"{arm.finding.id}: {arm.variant.describe()}: {arm.outcome}"
        self.progress(self._now(news))

    def _now(self, news: str) -> Progress:
        desk, cap = self.desk, self.desk.baseline_cap
        left: float = len(desk.open_positions(desk.baseline, cap, set()))
        done, most = cap - int(left), cap
        for arm in self.arms:
            missing = len(desk.open_positions(arm.variant, arm.cap, set()))
            done += arm.cap - missing
            if desk.closed(arm):
                most += arm.cap - missing
                continue
            most += arm.cap
            fewest = max(0, arm.rules.n_min - (arm.cap - missing)) if arm.judged else missing
            left += max(fewest, missing / 2)  # about half of the arms decide early
        return Progress(done, most, left * self.mean_s / desk.bench.executor.slots, news)
