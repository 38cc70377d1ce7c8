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
import os
import signal
import socket
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from society.errors import SocietyError
from society.experiments import sandbox
from society.experiments.confinement import access_of, confines_itself
from society.experiments.executor import describe, describe_error
from society.experiments.loop import Loop
from society.experiments.orders import ROLES, Order, Post
from society.experiments.processes import (
    Message,
    adopt_orphans,
    fork_run,
    guard,
    leave,
    pack,
    remove,
    sweep,
    use_huge_pages,
)
from society.experiments.sandbox import Level, Policy
from society.experiments.task import Limits, Task, load_task
from society.model import device as devices
from society.records import BudgetKind, Outcome

PREPARE = Limits(timeout_s=1_800, mem_bytes=0)


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
        use_huge_pages()
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
            Loop(order, task, link).serve()
        code = 0
    except Exception:  # noqa: BLE001 - the owner reads why in the worker's log
        traceback.print_exc()
    finally:
        leave(code)


if __name__ == "__main__":
    main()
