"""Societies with and without shared memory, paired by seed, each in a notebook of its own.

Two societies of one pair have the same task, seed, agents and number of runs. In one of them every
agent knows all screening results and can search the notebook; in the other an agent knows its own
runs and the champion only (`Settings.knowledge`). Each hands over the recipe that looked best in
screening; whoever compares them scores both on seeds that neither has seen.

The societies use all slots, one society after the other. With more than one slot the order in which
runs finish is not repeatable, and neither is a society.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from society.app import run_society
from society.errors import StudyStopped
from society.experiments.task import load_task
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import RunKind, SocietyState, Variant
from society.settings import Settings

if TYPE_CHECKING:
    from society.agents.laboratory import Laboratory
    from society.experiments.task import Task

Arm = Literal["shared", "own"]
ARMS: tuple[Arm, Arm] = ("shared", "own")
FIRST_GUESS_S = 3.0
"""Seconds of wall time per run of a society until the first one has ended."""


@dataclass(frozen=True, slots=True)
class Handover:
    """What one society leaves to be scored."""

    arm: Arm
    seed: int
    variant: Variant
    """The recipe with the best screening score; the baseline if nothing was better."""
    score: float | None
    """Its screening score, validation split: selected as the best of many."""
    runs: int
    wall_s: float
    """Of all its runs, summed."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both societies of one seed."""

    shared: Handover
    own: Handover


def compare(
    folder: NotebookFolder,
    settings: Settings,
    seeds: int,
    *,
    deadline: float | None = None,
    progress: Callable[[str], None] = lambda words: None,
) -> tuple[Pair, ...]:
    """Run the pairs that are missing, and say what every complete pair hands over.

    Societies that have ended are not run again; one that was interrupted goes on.

    Args:
        folder: The notebook of the comparison; the societies get notebooks in `societies/` there.
        settings: What both have in common: task, profile, agents, slots and `runs`.
        seeds: Pairs wanted; their seeds are 1, 2, ...
        deadline: Monotonic time after which no pair is begun that is not expected to end by then.
        progress: Called with a clause when a society starts or ends.

    Raises:
        StudyStopped: Ctrl-C; the society in progress is kept and goes on the next time.
        SocietyError: A society could not work.
    """
    pairs, spent = [], FIRST_GUESS_S * (settings.runs or 0)
    for seed in range(1, seeds + 1):
        wanted = [_settings(settings, arm, seed) for arm in ARMS]
        missing = [one for one in wanted if not _ended(_place(folder, one))]
        due = time.monotonic() + spent * len(missing)
        if missing and deadline is not None and due > deadline:
            break
        for one in missing:
            began = time.monotonic()
            progress(f"society {seed} of {seeds}, knowledge {one.knowledge}: {one.runs} runs")
            _run(_place(folder, one), one)
            spent = time.monotonic() - began
        shared, own = (_handover(_place(folder, one), one) for one in wanted)
        pairs.append(Pair(shared, own))
    return tuple(pairs)


def found_pairs(folder: NotebookFolder, settings: Settings, seeds: int) -> tuple[Pair, ...]:
    """The pairs whose societies have both ended, without running any."""
    return compare(folder, settings, seeds, deadline=float("-inf"))


def _settings(common: Settings, arm: Arm, seed: int) -> Settings:
    return common.model_copy(update={"knowledge": arm, "seed": seed})


def _place(folder: NotebookFolder, settings: Settings) -> NotebookFolder:
    name = f"{Path(settings.task).name}-{Path(str(settings.profile)).stem}-{settings.runs}runs"
    name = name.replace(":", "-")
    place = folder.path / "societies" / name / f"{settings.seed}-{settings.knowledge}"
    return NotebookFolder(place)


def _ended(folder: NotebookFolder) -> bool:
    return _state(folder) is SocietyState.FINISHED


def _state(folder: NotebookFolder) -> SocietyState | None:
    if not folder.exists():
        return None
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        records = ledger.societies()
    return records[-1].state if records else None


def _run(folder: NotebookFolder, settings: Settings) -> None:
    resume = _state(folder) is not None
    ended = run_society(folder, settings, resume=resume, display=_Silent(), console=False)
    if ended.record.state is not SocietyState.FINISHED:
        raise StudyStopped(len(ended.report.runs))


def _handover(folder: NotebookFolder, settings: Settings) -> Handover:
    task = load_task(settings.task, str(settings.profile))
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        runs = ledger.runs()
    screened = [run for run in runs if run.kind is RunKind.SCREENING and run.score is not None]
    best = max(screened, key=lambda run: _merit(task, run.score), default=None)
    return Handover(
        settings.knowledge,
        settings.seed or 0,
        best.variant if best else Variant(task.key),
        best.score if best else None,
        len(runs),
        sum(run.cost.wall_s for run in runs),
    )


def _merit(task: Task, score: float | None) -> float:
    return task.direction.improvement(0.0, score or 0.0)


class _Silent:
    """A display that shows nothing; implements `app.Display`."""

    def start(self, laboratory: Laboratory) -> None:
        """Nothing to show."""

    def show(self, laboratory: Laboratory) -> None:
        """Nothing to show."""

    def stop(self) -> None:
        """Nothing to show."""
