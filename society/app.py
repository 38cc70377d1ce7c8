"""Composition root: puts a society together, lets it live, and leaves a report behind."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from society import logs, provenance
from society.agents.brains import SEARCH, check_brain, compose_brain
from society.agents.floor import Floor
from society.agents.laboratory import Laboratory
from society.agents.recollection import Recollection
from society.agents.society import agent_names, cast_roles, live
from society.errors import UsageError
from society.experiments.local import LocalExecutor
from society.experiments.sandbox import Level
from society.experiments.space import Space
from society.experiments.task import default_profile, load_task
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.recall import EMBEDDED, OFF, Recall
from society.records import Crown, Scope, SocietyRecord, SocietyState, Variant
from society.render import write_report
from society.report import build_report
from society.roles import Charter
from society.settings import validate
from society.story import tell_story

if TYPE_CHECKING:
    from society.experiments.executor import Executor
    from society.experiments.task import Task
    from society.report import Report
    from society.roles import Brain, Role
    from society.settings import Settings

PULSE_S = 1.0
"""Seconds between looks of the live view, and between batches for recall."""
RESUMED_WITH = {
    "base_url", "max_tokens", "max_tokens_per_agent", "max_dollars", "max_dollars_per_agent",
}  # fmt: skip
"""Settings of the endpoint that may change when a society goes on."""
SAVE_S = 5.0
"""Seconds between records of wall time and utilisation."""


class Display(Protocol):
    """What shows a society while it runs."""

    def start(self, laboratory: Laboratory) -> None:
        """The society is about to work."""

    def show(self, laboratory: Laboratory) -> None:
        """Called about once a second, from the event loop."""

    def stop(self) -> None:
        """The society has ended, in whatever way."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a society ended."""

    record: SocietyRecord
    report: Report
    markdown: Path
    html: Path


def resume_settings(folder: NotebookFolder, given: Settings) -> Settings:
    """The interrupted society's settings, with the budgets and the address that are `given` now.

    Raises:
        UsageError: No society in this notebook was interrupted.
    """
    with Ledger.open(folder.require().ledger) as ledger:
        stopped = _unfinished(folder, ledger)
    if stopped is None:
        raise UsageError(
            f"Nothing to resume in {folder.path}: its last society has finished. "
            "Run without --resume to start another one on the same notebook."
        )
    new = {name: getattr(given, name) for name in ("runs", "minutes", "until")}
    new = {name: value for name, value in new.items() if value is not None}
    changed = given.endpoint.model_dump(include=RESUMED_WITH & given.endpoint.model_fields_set)
    before = stopped.settings.get("endpoint")
    endpoint = {**(before if isinstance(before, dict) else {}), **changed}
    values = {**stopped.settings, **new, "endpoint": endpoint}
    return validate(values, source=f"society {stopped.id}")


def resolved(settings: Settings) -> Settings:
    """The settings with the task's default profile filled in (`cpu` for pretrain)."""
    if settings.profile is not None:
        return settings
    return settings.model_copy(update={"profile": default_profile(settings.task)})


def run_society(
    folder: NotebookFolder, settings: Settings, *, resume: bool, display: Display, console: bool
) -> Ended:
    """Start (or resume) a society in `folder`, wait for its end, write the report.

    The first SIGINT or SIGTERM drains: runs in progress are finished and recorded. The second one
    stops at once; what was in progress is given up and can be run again after a resume.

    Raises:
        SocietyError: Anything a user can act on; nothing that was recorded is lost.
    """
    settings = resolved(settings)
    task = load_task(settings.task, str(settings.profile))
    casts = cast_roles(settings)
    check_brain(settings, os.environ)
    _check_searchable(settings, task)
    executor = LocalExecutor(
        settings.task,
        str(settings.profile),
        settings.slots,
        settings.device,
        require=Level(settings.sandbox),
    )
    with folder.lock(), Ledger.open(folder.ledger, settings.seed) as ledger:
        record = _open_society(folder, ledger, settings, resume=resume)
        logs.configure(folder.logs / "society.jsonl", society=record.id, console=console)
        try:
            work = _work(folder, ledger, record, settings, task, executor, casts, display)
            scope = asyncio.run(work)
            report = build_report(ledger, scope, task, Space.of(task), record.id)
            markdown, html = write_report(report, folder.report)
            return Ended(ledger.society(record.id), report, markdown, html)
        finally:
            logs.close()


def _check_searchable(settings: Settings, task: Task) -> None:
    """Raise `UsageError` if the brain has nothing that it could vary."""
    if settings.brain == SEARCH and not Space.of(task).knobs:
        raise UsageError(
            f"The task {task.key} has no knobs, and the brain 'search' varies nothing else: "
            "declare knobs in its profile, or use --brain openai."
        )


async def _work(
    folder: NotebookFolder,
    ledger: Ledger,
    record: SocietyRecord,
    settings: Settings,
    task: Task,
    executor: Executor,
    casts: list[tuple[Role, ...]],
    display: Display,
) -> Scope:
    log, began = logs.get("app"), time.monotonic()
    brain = compose_brain(settings, society=record.id, accounts=ledger, folder=folder)
    async with _closed(brain), _started(executor):
        scope = Scope(task.key, executor.environment.tier)
        provenance.keep(ledger, task, executor.environment)
        _crown_baseline(ledger, scope, record, task)
        with _open_recall(folder, ledger, settings, task) as recall:
            laboratory = Laboratory(
                ledger=ledger,
                recall=recall,
                executor=executor,
                task=task,
                space=Space.of(task),
                scope=scope,
                brain=brain,
                settings=settings,
                record=record,
                floor=Floor(len(casts)),
                charter=Charter(patience=settings.patience),
                began=began,
            )
            log.info("society works", agents=len(casts), slots=executor.slots, tier=scope.tier)
            _warn_of_few_runs(laboratory)
            await _live(laboratory, casts, folder.checkpoints, display)
            if not laboratory.draining:
                await _tell(laboratory)
    return scope


def _warn_of_few_runs(laboratory: Laboratory) -> None:
    """Say so if the runs that were asked for leave none for an idea."""
    view = laboratory.view()
    if laboratory.settings.runs is not None and view.budget.runs < view.runs_to_search:
        logs.get("app").warning(
            "too few runs to try anything",
            runs=view.budget.runs,
            needed=view.runs_to_search,
            why=f"noise floor and champion first, {view.charter.closing_runs} kept for the end",
        )


async def _tell(laboratory: Laboratory) -> None:
    """Have the story told; a signal gives it up, and the report comes without it."""
    telling = asyncio.create_task(tell_story(laboratory))
    with _caught(telling.cancel):
        await asyncio.wait({telling})
    if telling.cancelled():
        logs.get("app").warning("no narrative", reason="interrupted")
    else:
        telling.result()


@contextlib.asynccontextmanager
async def _closed(brain: Brain) -> AsyncIterator[None]:
    """Close a brain that holds something, in the end."""
    try:
        yield
    finally:
        close = getattr(brain, "close", None)
        if close is not None:
            await close()


async def _live(
    laboratory: Laboratory, casts: list[tuple[Role, ...]], checkpoints: Path, display: Display
) -> None:
    """Run the agents with signals handled, the display fed and progress saved."""
    for name in agent_names(len(casts)):
        laboratory.doing.setdefault(name, laboratory.idle())
    state = SocietyState.STOPPED
    display.start(laboratory)
    pulse = asyncio.create_task(_pulse(laboratory, display))
    try:
        with _signals(laboratory, asyncio.current_task()):
            await live(laboratory, casts, checkpoints)
        state = SocietyState.STOPPED if laboratory.draining else SocietyState.FINISHED
    except asyncio.CancelledError:
        laboratory.executor.kill()
        if not laboratory.draining:
            raise
    finally:
        pulse.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pulse
        display.stop()
        if laboratory.recall is not None:
            laboratory.recall.last_sync()
        laboratory.save(state)


async def _pulse(laboratory: Laboratory, display: Display) -> None:
    saved = 0.0
    while True:
        display.show(laboratory)
        await laboratory.remember()
        laboratory.floor.poke()  # another society may have written something
        if laboratory.wall_s - saved >= SAVE_S:
            laboratory.save(SocietyState.RUNNING)
            saved = laboratory.wall_s
        await asyncio.sleep(PULSE_S)


@contextlib.contextmanager
def _signals(laboratory: Laboratory, main: asyncio.Task[None] | None) -> Iterator[None]:
    """First signal: drain. Second: stop at once."""

    def caught() -> None:
        if laboratory.draining:
            if main is not None:
                main.cancel()
            return
        logs.get("app").warning("stopping: runs in progress are finished; again to stop at once")
        laboratory.drain()

    with _caught(caught):
        yield


@contextlib.contextmanager
def _caught(handler: Callable[[], object]) -> Iterator[None]:
    """Have signals to stop call `handler` instead of ending the process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _unfinished(folder: NotebookFolder, ledger: Ledger) -> SocietyRecord | None:
    """The folder's last society, if it was interrupted."""
    records = [record for record in folder.own(ledger.societies()) if not record.is_study]
    if records and records[-1].state is not SocietyState.FINISHED:
        return records[-1]
    return None


def _open_society(
    folder: NotebookFolder, ledger: Ledger, settings: Settings, *, resume: bool
) -> SocietyRecord:
    """The record to work under.

    The caller owns the folder, so every old lease of its societies is dead. Those of other folders
    on the same ledger may be alive; the leases of those that are not end when they expire.
    """
    folder.end_sessions(ledger)
    unfinished = _unfinished(folder, ledger)
    if resume and unfinished is not None:
        ledger.set_society_state(unfinished.id, SocietyState.RUNNING)
        return ledger.society(unfinished.id)
    seed = settings.seed if settings.seed is not None else secrets.randbits(31)
    return ledger.start_society(seed, settings.model_dump(mode="json"), home=folder.home)


def _crown_baseline(ledger: Ledger, scope: Scope, record: SocietyRecord, task: Task) -> None:
    """The baseline is the first champion of every task and tier."""
    crown = Crown(Variant(task.key), None, None)
    key = f"baseline/{scope.task}/{scope.tier}"
    ledger.commit(scope, record.id, "society", [crown], key=key, activity=None)


@contextlib.asynccontextmanager
async def _started(executor: Executor) -> AsyncIterator[None]:
    try:
        starting = asyncio.create_task(executor.start())
        await asyncio.to_thread(_warm_up)
        await starting
        yield
        await executor.close()
    finally:
        executor.kill()


def _warm_up() -> None:
    """Import what agents will need, while the workers start instead of while they wait."""
    for name in ("optuna", "torch", "sklearn.linear_model"):
        importlib.import_module(name)


@contextlib.contextmanager
def _open_recall(
    folder: NotebookFolder, ledger: Ledger, settings: Settings, task: Task
) -> Iterator[Recollection | None]:
    """Recall, opened when it is first used; None if it is off."""
    if settings.recall == OFF:
        yield None
        return
    at = folder.recall if settings.recall == EMBEDDED else settings.recall
    lower = task.direction.sign < 0
    recall = Recollection(ledger, lambda: Recall.open(folder, ledger, at=at, lower_is_better=lower))
    try:
        yield recall
    finally:
        recall.close()
