"""A loop: a long-lived process of one post that makes one run after the other, each in a fork."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from society.experiments import foreign, patches
from society.experiments.channel import ArrayChannel
from society.experiments.confinement import confines_itself, enter, takes_code
from society.experiments.executor import check_budget, check_score, recipe_of, train
from society.experiments.orders import Order, Post, receive, work_of
from society.experiments.processes import (
    Ending,
    Message,
    Say,
    Watch,
    Watched,
    fork_run,
    pack,
    plain,
    stopped,
    watch_run,
)
from society.experiments.sandbox import Level
from society.experiments.task import Limits, Refused, Task, Yardstick
from society.records import Outcome, Variant, Work

TRIAL_SEEDS = (20_261_124, 20_261_125)
"""Of the few steps by which a code change is tried; public, and no run has them."""
TRIAL_S, TRIAL_SHARE = 20.0, 0.1
"""Time-out of a trial: this share of a run's, but not less than so many seconds, or than the
task's own `trial_s`."""
KEPT, KEPT_S = 512, 600.0
"""Figures that a loop remembers, and how long, in seconds: the speed of a machine changes."""


class Figures:
    """What was measured lately."""

    def __init__(self) -> None:
        """Know nothing."""
        self._found: dict[str, tuple[float, Message]] = {}

    def get(self, key: str) -> Message | None:
        """A figure that is not too old; None otherwise."""
        measured_at, found = self._found.get(key, (-math.inf, None))
        return found if time.monotonic() < measured_at + KEPT_S else None

    def put(self, key: str, found: Message) -> None:
        """Remember it from now on."""
        if len(self._found) >= KEPT:
            self._found.clear()
        self._found[key] = time.monotonic(), found


class Loop:
    """Makes one run after the other, as the owner asks."""

    def __init__(self, order: Order, task: Task, link: socket.socket) -> None:
        """Take over the link to the owner."""
        self._order, self._task, self._link = order, task, link
        self._on_cpu = order.device == "cpu"
        self._figures = Figures()
        if takes_code(task):  # kept there: no run need find out what the task's own code amounts to
            patches.digest(task.sources())  # type: ignore[attr-defined]

    def serve(self) -> None:
        """Answer requests until the owner hangs up."""
        kinds = {
            "train": self._train,
            "train code": self._train_code,
            "try code": self._try_code,
            "score": self._score,
            "judge": self._judge,
            "model": self._model,
        }
        while (received := receive(self._link)) is not None:
            request, handles = received
            folder, work = Path(request["folder"]), work_of(request["work"])
            try:
                answer = kinds[request["kind"]](work, folder, request, handles)
            finally:
                for handle in handles:
                    os.close(handle)
            self._link.sendall(pack(answer))

    def _train(self, work: Work, folder: Path, request: Message, handles: Sequence[int]) -> Message:
        order, task = self._order, self._task

        def job(_: Say) -> Message:
            recipe = recipe_of(task, work)
            if not confines_itself(task):
                enter(order, task, folder)
            report = train(task, recipe, work, folder / "model", order.device)
            check_budget(work.budget, report)
            return {"report": plain(report)}

        return asdict(
            fork_run(job, task.limits, self._link, cap=self._on_cpu, log=folder / "trainer.log")
        )

    def _score(self, work: Work, folder: Path, request: Message, handles: Sequence[int]) -> Message:
        order, task, sealed = self._order, self._task, request["sealed"]

        def job(_: Say) -> Message:
            code = bool(sealed) or confines_itself(task)
            scratch, recipe = folder / "model", recipe_of(task, work, code=code)
            if sealed:
                scratch = folder / "sealed"
                foreign.check_sealed(scratch, sealed)
            score = task.score(scratch, recipe, work.split, order.device)
            return {"score": check_score(score)}

        return asdict(
            fork_run(job, task.limits, self._link, cap=self._on_cpu, log=folder / "scorer.log")
        )

    # -------------------------------------------------------------------- foreign code

    def _train_code(
        self, work: Work, folder: Path, request: Message, handles: Sequence[int]
    ) -> Message:
        order, task, limits = self._order, self._task, self._task.limits
        if refusal := self._refusal():
            return asdict(Ending(refusal))
        if confines_itself(task):
            return self._train_command(work, folder)
        own = self._own("yardstick", work, folder, limits, self._yardstick)
        if own.message["outcome"] != Outcome.COMPLETED:
            return asdict(own)
        key = json.dumps(["charged", work.variant.patch, recipe_key(work)])
        yard = Yardstick(**own.message["yardstick"] | (self._figures.get(key) or {}))
        most_s = foreign.most_s(yard)

        def job(say: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            lay_out(task, work.variant, folder / "code", lint=order.lint)
            say({"cpu_s": time.process_time()})
            rows = rows_of(folder)
            enter(order, task, folder, most_cpu_s=most_s + 1, keep=(say.handle,), code=True)
            with foreign.blamed(folder / "code", rows):
                task.adopt(folder / "code", yard)  # type: ignore[attr-defined]
                return {"report": plain(train(task, recipe, work, folder / "model", order.device))}

        seen = self._run(job, limits, folder / "trainer.log", self._watch(folder, most_s))
        if seen.opening is None:
            message = json.loads(seen.payload) if seen.payload else stopped(seen, limits)
        else:
            message = foreign.concluded(
                seen, yard, work.budget, limits, accelerator=not self._on_cpu
            )
        sealed = ""
        if message["outcome"] == Outcome.COMPLETED:
            self._figures.put(key, {"charged_flops": message["report"]["step_flops"]})
            try:
                sealed = foreign.seal(folder / "model", folder / "sealed")
            except (Refused, OSError) as error:
                message = foreign.rejected(str(error))
        ending = Ending(message, own.cpu_s + seen.cpu_s, own.wall_s + seen.wall_s, seen.mem_bytes)
        return asdict(ending) | {"sealed": sealed, "judged": is_judged(task)}

    def _own(
        self,
        what: str,
        work: Work,
        folder: Path,
        limits: Limits,
        measure: Callable[[Work, Path], Message],
    ) -> Ending:
        """Measure something with the task's own code in a process of its own, or remember it."""
        key = json.dumps([what, recipe_key(work)])
        if (found := self._figures.get(key)) is not None:
            return Ending(found)
        ending = fork_run(
            lambda _: measure(work, folder),
            limits,
            self._link,
            cap=self._on_cpu,
            log=folder / "trainer.log",
        )
        if ending.message["outcome"] == Outcome.COMPLETED:
            self._figures.put(key, ending.message)
        return ending

    def _yardstick(self, work: Work, folder: Path) -> Message:
        recipe = recipe_of(self._task, work, code=True)
        yard = self._task.measure(recipe, work.budget, self._order.device)  # type: ignore[attr-defined]
        return {"yardstick": asdict(yard)}

    def _samples(self, work: Work, folder: Path) -> Message:
        recipe = recipe_of(self._task, work, code=True)
        return {"samples": sample(self._task, recipe, folder / "own", self._order.device)}

    def _train_command(self, work: Work, folder: Path) -> Message:
        """Train by a command that the task confines; none of its code comes into this process."""
        order, task, limits = self._order, self._task, self._task.limits

        def job(_: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            lay_out(task, work.variant, folder / "code", lint=order.lint)
            task.adopt(folder / "code")  # type: ignore[attr-defined]
            report = train(task, recipe, work, folder / "model", order.device)
            check_budget(work.budget, report)
            return {"report": plain(report)}

        watch = Watch(folder, order.disk_bytes)
        seen = self._run(job, limits, folder / "trainer.log", watch)
        message = json.loads(seen.payload) if seen.payload else stopped(seen, limits)
        return asdict(Ending(message, seen.cpu_s, seen.wall_s, seen.mem_bytes))

    def _try_code(
        self, work: Work, folder: Path, request: Message, handles: Sequence[int]
    ) -> Message:
        """A few steps with the task's own code and with the foreign one."""
        order, task = self._order, self._task
        least_s = getattr(task, "trial_s", TRIAL_S)
        limits = replace(task.limits, timeout_s=max(least_s, TRIAL_SHARE * task.limits.timeout_s))
        if refusal := self._refusal():
            return {"problem": foreign.spoken(refusal["error"]), "same": False}
        own: list[str] = []
        if hasattr(task, "sample"):
            ending = self._own("samples", work, folder, limits, self._samples)
            if ending.message["outcome"] != Outcome.COMPLETED:
                return {"problem": foreign.spoken(ending.message["error"]), "same": False}
            own = ending.message["samples"]

        def job(say: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            try:
                lay_out(task, work.variant, folder / "code", lint=order.lint)
            except Refused as error:
                return {"problem": str(error)}
            if not own:
                return {"problem": ""}
            say({"cpu_s": time.process_time()})
            rows = rows_of(folder)
            enter(order, task, folder, keep=(say.handle,), code=True, limits=limits)
            with foreign.blamed(folder / "code", rows):
                task.adopt(folder / "code")  # type: ignore[attr-defined]
                return {"samples": sample(task, recipe, folder / "model", order.device)}

        seen = self._run(job, limits, folder / "trainer.log", self._watch(folder))
        return foreign.tried(seen, own, limits)

    def _judge(self, work: Work, folder: Path, request: Message, handles: Sequence[int]) -> Message:
        """Have the task question the two models behind `handles`."""
        order, task, sealed = self._order, self._task, folder / "sealed"
        key = json.dumps(["answering", work.split, recipe_key(work)])
        known = self._figures.get(key)

        def job(_: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            deadline = time.monotonic() + task.limits.timeout_s
            foreign.check_sealed(sealed, request["sealed"])
            line, other = handles
            first = ArrayChannel(line, line, deadline=deadline)
            second = ArrayChannel(other, other, deadline=deadline, after=first)
            with first, second:
                score = task.judge(  # type: ignore[attr-defined]
                    sealed, recipe, work.split, order.device, (first, second)
                )
            foreign.check_sealed(sealed, request["sealed"])
            honest = known or {"answering_s": answering_s(task, recipe, work, order.device)}
            return {"score": check_score(score)} | honest

        ending = fork_run(job, task.limits, self._link, cap=self._on_cpu, log=folder / "scorer.log")
        if not known and ending.message["outcome"] == Outcome.COMPLETED:
            self._figures.put(key, {"answering_s": ending.message["answering_s"]})
        return asdict(ending)

    def _model(self, work: Work, folder: Path, request: Message, handles: Sequence[int]) -> Message:
        """Hold a model until the scorer leaves."""
        order, task, (line,) = self._order, self._task, handles
        post = Post(request["post"])

        def job(say: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            deadline = time.monotonic() + task.limits.timeout_s
            channel = ArrayChannel(line, line, deadline=deadline, peer="the scorer")
            rows = rows_of(folder)
            enter(order, task, folder, post=post, keep=(say.handle, line), code=True)
            with foreign.blamed(folder / "code", rows):
                task.adopt(folder / "code")  # type: ignore[attr-defined]
                task.serve(folder / "sealed", recipe, order.device, channel)  # type: ignore[attr-defined]
                return {}

        watch = Watch(
            folder / post if not self._on_cpu else None,
            order.disk_bytes,
            line=line,
            report_bytes=foreign.REPORT_BYTES,
        )
        seen = self._run(job, task.limits, folder / f"{post}.log", watch)
        ending = foreign.served(seen, task.limits)
        return asdict(Ending(ending, seen.cpu_s, seen.wall_s, seen.mem_bytes))

    def _run(self, job: Any, limits: Limits, log: Path, watch: Watch) -> Watched:
        return watch_run(job, limits, self._link, cap=self._on_cpu, log=log, watch=watch)

    def _watch(self, folder: Path, most_cpu_s: float = math.inf) -> Watch:
        return Watch(
            folder,
            self._order.disk_bytes,
            stranger=True,
            most_cpu_s=most_cpu_s if self._on_cpu else math.inf,
            report_bytes=foreign.REPORT_BYTES,
        )

    def _refusal(self) -> Message | None:
        """Why no foreign code runs here."""
        if not takes_code(self._task):
            return foreign.rejected(
                f"The variant changes code, and the task {self._task.name} has none to change."
            )
        level, least = Level(self._order.level), Level(self._order.require)
        if level.rank < least.rank:
            return foreign.rejected(
                f"A variant that changes code needs at least the sandbox level {str(least)!r}; "
                f"this machine offers {str(level)!r}: see society doctor."
            )
        return None


def is_judged(task: Task) -> bool:
    """Whether foreign code computes the model's answers, so that a guard has to question it."""
    return hasattr(task, "judge") and hasattr(task, "serve")


def recipe_key(work: Work) -> str:
    """The same for all work of one recipe and budget."""
    values = dict(work.variant.overrides), work.budget.kind, work.budget.amount
    return json.dumps(values, sort_keys=True)


def lay_out(task: Task, variant: Variant, folder: Path, *, lint: bool) -> None:
    """Write the files that a code change amounts to. Raises `Refused` if it is not one.

    What is loaded into our processes is their normal form; beside the folder is written which line
    of it is which one of the author's.
    """
    sources = task.sources()  # type: ignore[attr-defined]
    try:
        files = patches.effective(sources, variant.patch)
        if lint:
            patches.check(files, sources, patches.rules_of(task))
        rows: dict[str, list[int]] = {}
        if not confines_itself(task):
            files, rows = patches.executed(files, sources)
    except patches.BadPatch as error:
        raise Refused(str(error)) from error
    folder.mkdir()
    foreign.write_code(files, sources, folder)
    folder.with_suffix(".json").write_text(json.dumps(rows))


def answering_s(task: Task, recipe: object, work: Work, device: str) -> float:
    """Processor seconds in which the task's own code answers all that is asked; 0 for unknown."""
    measured = getattr(task, "answering_s", None)
    return 0.0 if measured is None else float(measured(recipe, work.split, device))


def rows_of(folder: Path) -> dict[str, list[int]]:
    """What `lay_out` wrote about lines, to be read before this process is confined."""
    found: dict[str, list[int]] = json.loads((folder / "code.json").read_text())
    return found


def sample(task: Task, recipe: object, scratch: Path, device: str) -> list[str]:
    """The bits after a few steps, at two seeds."""
    found = []
    for seed in TRIAL_SEEDS:
        place = scratch / str(seed)
        place.mkdir(parents=True)
        found.append(task.sample(recipe, seed, place, device))  # type: ignore[attr-defined]
    return found
