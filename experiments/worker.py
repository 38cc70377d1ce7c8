"""The processes behind `LocalExecutor`; run as `python -m society.experiments.worker`.

    owner                    the society; talks to the others over socket pairs
    └── zygote               imports the task once, holds no data, forks loops on request
        ├── trainer loop     holds the training split
        │   └── run          one per run: trains, saves to its scratch folder, ends
        ├── scorer loop      holds the evaluation splits
        │   └── run          one per run: scores the saved model, ends
        └── two model loops  hold no data; started when the first code change comes
            └── run          holds a model that foreign code computes, for the scorer's questions

A message is a JSON object behind its length (4 bytes, big-endian). A loop answers each request
after the run has ended, been killed at its time-out or died. Whoever sees its owner's socket close
kills what it started and ends; on Linux the kernel also kills every process whose parent died.

A run's folder, of which a confined run sees `code` and may write to `model` and `tmp`:

    model/       what the training leaves
    tmp/         its temporary files
    code/        the files that a code change amounts to, in normal form
    code.json    which line of theirs is which one of the author's
    sealed/      `model`, once all processes of a training with foreign code are gone
    own/         what is made with the task's own code when a code change is tried
    *.log        what each process prints
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from society.errors import SocietyError
from society.experiments import foreign, patches, sandbox
from society.experiments.executor import (
    check_budget,
    check_score,
    describe,
    describe_error,
    recipe_of,
    train,
)
from society.experiments.processes import (
    HEADER,
    MAX_FILE_BYTES,
    Ending,
    Message,
    Say,
    Watch,
    Watched,
    adopt_orphans,
    fork_run,
    guard,
    leave,
    pack,
    plain,
    remove,
    stopped,
    sweep,
    watch_run,
)
from society.experiments.sandbox import Level, Policy
from society.experiments.task import (
    Access,
    Limits,
    Refused,
    Role,
    Task,
    Yardstick,
    load_task,
)
from society.model import device as devices
from society.records import Budget, BudgetKind, Outcome, Split, Variant, Work

PREPARE = Limits(timeout_s=1_800, mem_bytes=0)
DISK_BYTES = 2 << 30
"""What a run with foreign code may write."""
TRIAL_SEEDS = (20_261_124, 20_261_125)
"""Of the few steps by which a code change is tried; public, and no run has them."""
TRIAL_S, TRIAL_SHARE = 20.0, 0.1
"""Time-out of a trial: this share of a run's, but not less than so many seconds, or than the
task's own `trial_s`."""
KEPT_SAMPLES = 256
"""Recipes whose sample with the task's own code a loop remembers."""
COMPILERS = 64
"""Processes that a run on an accelerator may start, to compile."""
SPARE_CPU_S = 5
"""Processor seconds beyond the time-out, which comes first for a run of one thread."""


class Post(StrEnum):
    """What a loop is for."""

    TRAINER = "trainer"
    SCORER = "scorer"
    MODEL = "model"
    """Holds the model that is scored."""
    PROBE = "probe"
    """Holds the same model, and is asked what the other one must not have known."""


ROLES = {Post.TRAINER: Role.TRAINER, Post.SCORER: Role.SCORER}
"""The data that a loop holds; the others hold none."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is started with; one JSON argument on its command line."""

    task: str
    profile: str
    device: str
    """As the user gave it, `cuda` for all cards; in a loop, the device of its slot."""
    owner: int
    """Process id of the owner."""
    scratch: str
    """Folder of this executor; the zygote removes it at the end."""
    link: int
    """File descriptor of the control socket."""
    level: str = ""
    """How far runs are confined; empty for as far as this machine can."""
    require: str = Level.FILTERS
    """The least for foreign code."""
    lint: bool = True
    """Whether foreign code is looked through before it runs."""
    disk_bytes: int = DISK_BYTES
    """What a run with foreign code may write."""


def main() -> None:
    """Be the zygote until the owner is gone."""
    order = Order(**json.loads(sys.argv[1]))
    guard(order.owner, signal.SIGTERM)
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(SystemExit):  # asked to leave: by a signal, or by a closed link
        _be_zygote(order)
    remove(Path(order.scratch))  # kept after an error: it holds the log


def _be_zygote(order: Order) -> None:
    try:
        with socket.socket(fileno=order.link) as link:
            task, level = _start(order, link)
            if task is not None:
                _fork_on_request(replace(order, level=level), task, link)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sweep()


def _start(order: Order, link: socket.socket) -> tuple[Task | None, str]:
    """Import and prepare the task; tells the owner about it, or why it does not work."""
    try:
        task = load_task(order.task, order.profile)
        task.warm_up()
        if (access := access_of(task)) is not None:  # what is found here is found for all runs
            sandbox.prepare(Policy(read=access.read, hidden=access.hidden))
    except (SocietyError, ImportError, OSError) as error:
        link.sendall(pack({"error": describe_error(error)}))
        return None, ""
    ending = fork_run(lambda _: _prepare(task, order), PREPARE, link, cap=False)
    hello = ending.message
    if hello["outcome"] != Outcome.COMPLETED:
        link.sendall(pack({"error": hello["error"]}))
        return None, ""
    link.sendall(pack(hello))
    if confines_itself(task):
        task.level = Level(hello["level"])  # type: ignore[attr-defined]
    return task, hello["level"]


def _prepare(task: Task, order: Order) -> Message:
    level = _level(order, task)
    confined = level if access_of(task) is not None and order.device == "cpu" else ""
    return {
        "data_hash": task.prepare(),
        "level": level,
        "environment": asdict(replace(describe(task, order.device), sandbox=confined)),
        "cards": [asdict(card) for card in devices.cards(order.device)]
        if "torch" in task.packages
        else [],
        "need_bytes": task.limits.mem_bytes,
        "seconds": task.budget.kind is BudgetKind.SECONDS,
    }


def _level(order: Order, task: Task) -> Level:
    """How far runs are confined. Raises `SocietyError` if this machine cannot do what was asked."""
    best = sandbox.best_for_commands() if confines_itself(task) else sandbox.best()
    asked = Level(order.level) if order.level else best
    if asked.rank > best.rank:
        raise SocietyError(f"Sandbox level {asked!s}: this machine offers {best!s} at most.")
    return asked


def access_of(task: Task) -> Access | None:
    """What the task's runs may touch; None if they are not confined."""
    declared: Access | None = getattr(task, "access", None)
    return Access() if declared is None and takes_code(task) else declared


def takes_code(task: Task) -> bool:
    """Whether variants of this task may change its code."""
    return hasattr(task, "sources") and hasattr(task, "adopt")


def confines_itself(task: Task) -> bool:
    """Whether the task loads no foreign code into our processes: it starts confined commands."""
    return bool(getattr(task, "confines_itself", False))


def is_judged(task: Task) -> bool:
    """Whether foreign code computes the model's answers, so that a guard has to question it."""
    return hasattr(task, "judge") and hasattr(task, "serve")


def _fork_on_request(order: Order, task: Task, link: socket.socket) -> None:
    """Fork one loop for every socket that the owner sends over."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead loops need no burial
    loops: set[int] = set()
    while True:
        body, handles, _, _ = socket.recv_fds(link, 64, 1)
        if not body:
            return
        loops = {pid for pid in loops if _is_there(pid)}
        sweep(spare=frozenset(loops))  # what a run of a loop that died left behind
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            link.detach()
            os.close(order.link)
            post, device = body.decode().split()
            _become_loop(replace(order, device=device), task, Post(post), handles[0], zygote)
        os.close(handles[0])
        loops.add(pid)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _become_loop(order: Order, task: Task, post: Post, handle: int, zygote: int) -> NoReturn:
    """The rest of a loop's life, in the forked process."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        guard(zygote, signal.SIGKILL)
        adopt_orphans()
        if post in ROLES:
            task.preload(ROLES[post])
        with socket.socket(fileno=handle) as link:
            link.sendall(pack({"ready": post}))
            _Loop(order, task, link).serve()
        code = 0
    except Exception:  # noqa: BLE001 - the owner reads why in the worker's log
        traceback.print_exc()
    finally:
        leave(code)


class _Loop:
    """Makes one run after the other, as the owner asks."""

    def __init__(self, order: Order, task: Task, link: socket.socket) -> None:
        self._order, self._task, self._link = order, task, link
        self._on_cpu = order.device == "cpu"
        self._own: dict[str, list[str]] = {}
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

        def job(say: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            lay_out(task, work.variant, folder / "code", lint=order.lint)
            yard = task.measure(recipe, work.budget, order.device)  # type: ignore[attr-defined]
            say({"yardstick": asdict(yard), "cpu_s": time.process_time()})
            most_s, rows = foreign.most_s(yard) + 1, rows_of(folder)
            enter(order, task, folder, most_cpu_s=most_s, keep=(say.handle,), code=True)
            with foreign.blamed(folder / "code", rows):
                task.adopt(folder / "code")  # type: ignore[attr-defined]
                return {"report": plain(train(task, recipe, work, folder / "model", order.device))}

        watch = self._watch(folder, lambda opening: foreign.most_s(yard_of(opening)))
        seen = self._run(job, limits, folder / "trainer.log", watch)
        if seen.opening is None:
            message = json.loads(seen.payload) if seen.payload else stopped(seen, limits)
            return asdict(Ending(message, seen.cpu_s, seen.wall_s, seen.mem_bytes))
        message = foreign.concluded(
            seen, yard_of(seen.opening), work.budget, limits, accelerator=not self._on_cpu
        )
        sealed = ""
        if message["outcome"] == Outcome.COMPLETED:
            try:
                sealed = foreign.seal(folder / "model", folder / "sealed")
            except (Refused, OSError) as error:
                message = foreign.rejected(str(error))
        ending = Ending(message, seen.cpu_s, seen.wall_s, seen.mem_bytes)
        return asdict(ending) | {"sealed": sealed, "judged": is_judged(task)}

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
        key = json.dumps(dict(work.variant.overrides), sort_keys=True)
        known = self._own.get(key)

        def job(say: Say) -> Message:
            recipe = recipe_of(task, work, code=True)
            try:
                lay_out(task, work.variant, folder / "code", lint=order.lint)
            except Refused as error:
                return {"problem": str(error)}
            if not hasattr(task, "sample"):
                return {"problem": ""}
            own = known or sample(task, recipe, folder / "own", order.device)
            say({"own": own, "cpu_s": time.process_time()})
            rows = rows_of(folder)
            enter(order, task, folder, keep=(say.handle,), code=True, limits=limits)
            with foreign.blamed(folder / "code", rows):
                task.adopt(folder / "code")  # type: ignore[attr-defined]
                return {"samples": sample(task, recipe, folder / "model", order.device)}

        seen = self._run(job, limits, folder / "trainer.log", self._watch(folder))
        if seen.opening is not None:
            if len(self._own) >= KEPT_SAMPLES:
                self._own.clear()
            self._own[key] = seen.opening["own"]
        return foreign.tried(seen, limits)

    def _judge(self, work: Work, folder: Path, request: Message, handles: Sequence[int]) -> Message:
        """Have the task question the two models behind `handles`."""
        order, task, sealed = self._order, self._task, folder / "sealed"

        def job(_: Say) -> Message:
            from society.experiments.channel import ArrayChannel

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
            honest_s = answering_s(task, recipe, work, order.device)
            return {"score": check_score(score), "answering_s": honest_s}

        return asdict(
            fork_run(job, task.limits, self._link, cap=self._on_cpu, log=folder / "scorer.log")
        )

    def _model(self, work: Work, folder: Path, request: Message, handles: Sequence[int]) -> Message:
        """Hold a model until the scorer leaves."""
        order, task, (line,) = self._order, self._task, handles
        post = Post(request["post"])

        def job(say: Say) -> Message:
            from society.experiments.channel import ArrayChannel

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

    def _watch(self, folder: Path, most_cpu_s: Any = None) -> Watch:
        return Watch(
            folder,
            self._order.disk_bytes,
            stranger=True,
            most_cpu_s=most_cpu_s if self._on_cpu else None,
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


def yard_of(opening: Message) -> Yardstick:
    """The yardstick that a run reported before any foreign code was near."""
    return Yardstick(**opening["yardstick"])


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


def enter(
    order: Order,
    task: Task,
    folder: Path,
    *,
    code: bool = False,
    post: Post = Post.TRAINER,
    most_cpu_s: float = 0.0,
    limits: Limits | None = None,
    keep: Sequence[int] = (),
) -> None:
    """Confine this process, if runs of the task are confined.

    On an accelerator, whose driver and compiler want files and processes that nobody has listed
    for every machine, only what foreign code does is confined.

    Args:
        order: Of this loop.
        task: Whose run it is.
        folder: Of the run.
        code: Whether foreign code comes next.
        post: A training may write; a process that holds a model may not.
        most_cpu_s: Processor seconds from now on; by default a little above the time-out.
        limits: Where they are not the task's own.
        keep: Descriptors that stay open beside the usual three, when foreign code comes next.
    """
    access = access_of(task)
    if access is None:
        return
    limits, on_cpu = limits or task.limits, order.device == "cpu"
    if not code and not on_cpu:
        return
    write = _writable(folder, post, on_cpu=on_cpu)
    if code and on_cpu:
        _close_all_but({0, 1, 2, *keep})
        with contextlib.suppress(OSError):  # where memory runs out, this process goes first
            Path("/proc/self/oom_score_adj").write_text("1000")
    cpu_s = most_cpu_s or limits.timeout_s + SPARE_CPU_S
    sandbox.confine(
        Policy(
            read=(*access.read, folder / "code", folder / "sealed") if code else access.read,
            write=write,
            hidden=access.hidden,
            devices=() if on_cpu else tuple(sandbox.gpu_devices()),
            processes=access.processes if on_cpu else max(COMPILERS, access.processes),
            cpu_s=math.ceil(cpu_s) if on_cpu and not access.processes else 0.0,
            file_bytes=order.disk_bytes if code else MAX_FILE_BYTES,
        ),
        Level(order.level),
    )


def _writable(folder: Path, post: Post, *, on_cpu: bool) -> tuple[Path, ...]:
    """Where a run may write; its temporary files go there, and what foreign code compiles."""
    trains = post is Post.TRAINER
    if not trains and on_cpu:
        return ()
    room = folder / ("tmp" if trains else post)
    room.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(room)
    if on_cpu:
        return folder / "model", room
    # Nothing that foreign code compiles may ever be found by another run.
    for name in ("SOCIETY_CACHE", devices.COMPILE_CACHE, "TRITON_CACHE_DIR"):
        os.environ[name] = str(room / name.lower())
    return (folder / "model", room) if trains else (room,)


def _close_all_but(keep: set[int]) -> None:
    """Leave nothing open that this process was forked with."""
    last = 0
    for handle in sorted(keep):
        if handle > last:  # an empty range that ends at 0 closes everything
            os.closerange(last, handle)
        last = handle + 1
    os.closerange(last, 1 << 16)


def work_of(values: Message) -> Work:
    """Back from what `dataclasses.asdict` made of it."""
    return Work(
        run_id=values["run_id"],
        variant=Variant(**values["variant"]),
        seed=values["seed"],
        split=Split(values["split"]),
        budget=Budget(BudgetKind(values["budget"]["kind"]), values["budget"]["amount"]),
        data_seed=values["data_seed"],
    )


def receive(link: socket.socket) -> tuple[Message, list[int]] | None:
    """The next message and the descriptors that came with it; None if the other side is gone."""
    header, handles, _, _ = socket.recv_fds(link, HEADER, 4)
    header += _exactly(link, HEADER - len(header)) if header else b""
    body = _exactly(link, int.from_bytes(header, "big")) if header else b""
    return (json.loads(body), handles) if body else None


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = link.recv(size - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


if __name__ == "__main__":
    main()
