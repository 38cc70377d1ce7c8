"""The processes behind `LocalExecutor`; run as `python -m society.experiments.worker`.

    owner                    the society; talks to the others over socket pairs
    └── zygote               imports the task once, holds no data, forks loops on request
        ├── trainer loop     holds the training split
        │   └── run          one per run: trains, saves to its scratch folder, ends
        └── scorer loop      holds the evaluation splits
            └── run          one per run: scores the saved model, ends

A message is a JSON object behind its length (4 bytes, big-endian). A loop answers each request
after the run has ended, been killed at its time-out or died. Whoever sees its owner's socket close
kills what it started and ends; on Linux the kernel also kills every process whose parent died.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

from society.errors import SocietyError
from society.experiments.executor import (
    check_budget,
    check_score,
    describe,
    describe_error,
    outcome_of,
    recipe_of,
    thin,
    train,
)
from society.experiments.task import Diverged, Limits, Role, Task, TrainReport, load_task
from society.model import device as devices
from society.model.device import is_out_of_memory
from society.records import Budget, BudgetKind, Outcome, Split, Variant, Work

Message = dict[str, Any]
Job = Callable[[], Message]

HEADER = 4
PR_SET_PDEATHSIG = 1
MAX_FILE_BYTES = 4 << 30
"""No run writes a larger file: a log without end must not fill the disk."""
GRACE_S = 1.0
"""How long a process that closed its pipe may take to be gone."""
PREPARE = Limits(timeout_s=1_800, mem_bytes=0)


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


@dataclass(frozen=True, slots=True)
class Ending:
    """How a forked run ended."""

    message: Message = field(default_factory=dict)
    """What it reported; `outcome` is always there."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    mem_bytes: int = 0


def pack(message: Message) -> bytes:
    """A message as it goes over the wire."""
    body = json.dumps(message).encode()
    return len(body).to_bytes(HEADER, "big") + body


def main() -> None:
    """Be the zygote until the owner is gone."""
    order = Order(**json.loads(sys.argv[1]))
    guard(order.owner, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(SystemExit):  # asked to leave: by a signal, or by a closed link
        _be_zygote(order)
    shutil.rmtree(order.scratch, ignore_errors=True)  # kept after an error: it holds the log


def _be_zygote(order: Order) -> None:
    loops: list[int] = []
    try:
        with socket.socket(fileno=order.link) as link:
            task = _start(order, link)
            if task is not None:
                _fork_on_request(order, task, link, loops)
    finally:
        for pid in loops:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def guard(parent: int, death: int) -> None:
    """End with the parent, leave Ctrl-C to the owner, and write no core files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death)
    if os.getppid() != parent:  # it died before we could ask
        os._exit(1)


def _start(order: Order, link: socket.socket) -> Task | None:
    """Import and prepare the task; tells the owner about it, or why it does not work."""
    try:
        task = load_task(order.task, order.profile)
        task.warm_up()
    except (SocietyError, ImportError, OSError) as error:
        link.sendall(pack({"error": describe_error(error)}))
        return None
    hello = fork_run(lambda: _prepare(task, order.device), PREPARE, link, cap=False).message
    if hello["outcome"] != Outcome.COMPLETED:
        link.sendall(pack({"error": hello["error"]}))
        return None
    link.sendall(pack(hello))
    return task


def _prepare(task: Task, device: str) -> Message:
    return {
        "data_hash": task.prepare(),
        "environment": asdict(describe(task, device)),
        "cards": [asdict(card) for card in devices.cards(device)]
        if "torch" in task.packages
        else [],
        "need_bytes": task.limits.mem_bytes,
        "seconds": task.budget.kind is BudgetKind.SECONDS,
    }


def _fork_on_request(order: Order, task: Task, link: socket.socket, loops: list[int]) -> None:
    """Fork one loop for every socket that the owner sends over."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead loops need no burial
    while True:
        body, handles, _, _ = socket.recv_fds(link, 64, 1)
        if not body:
            return
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            link.detach()
            os.close(order.link)
            role, device = body.decode().split()
            _become_loop(replace(order, device=device), task, Role(role), handles[0], zygote)
        os.close(handles[0])
        loops.append(pid)


def _become_loop(order: Order, task: Task, role: Role, handle: int, zygote: int) -> NoReturn:
    """The rest of a loop's life, in the forked process."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        guard(zygote, signal.SIGKILL)
        task.preload(role)
        with socket.socket(fileno=handle) as link:
            link.sendall(pack({"ready": role}))
            _serve(order, task, link)
        code = 0
    except Exception:  # noqa: BLE001 - the owner reads why in the worker's log
        traceback.print_exc()
    finally:
        _leave(code)


def _serve(order: Order, task: Task, link: socket.socket) -> None:
    while (request := receive(link)) is not None:
        cap = order.device == "cpu"
        log = Path(request["log"])
        ending = fork_run(_job(order, task, request), task.limits, link, cap=cap, log=log)
        link.sendall(pack(asdict(ending)))


def _job(order: Order, task: Task, request: Message) -> Job:
    """What the forked run has to do."""
    work, scratch = _work(request["work"]), Path(request["scratch"])
    if request["role"] == Role.TRAINER:
        return lambda: _train(task, work, scratch, order.device)
    return lambda: {
        "score": check_score(task.score(scratch, recipe_of(task, work), work.split, order.device))
    }


def _train(task: Task, work: Work, scratch: Path, device: str) -> Message:
    report = train(task, recipe_of(task, work), work, scratch, device)
    check_budget(work.budget, report)
    return {"report": _plain(report)}


def _plain(report: TrainReport) -> Message:
    return asdict(report) | {"curve": thin(report.curve)}


def _work(values: Message) -> Work:
    """Back from what `dataclasses.asdict` made of it."""
    return Work(
        run_id=values["run_id"],
        variant=Variant(**values["variant"]),
        seed=values["seed"],
        split=Split(values["split"]),
        budget=Budget(BudgetKind(values["budget"]["kind"]), values["budget"]["amount"]),
        data_seed=values["data_seed"],
    )


def receive(link: socket.socket) -> Message | None:
    """The next message, or None when the other side is gone."""
    header = _exactly(link, HEADER)
    body = _exactly(link, int.from_bytes(header, "big")) if header else b""
    return json.loads(body) if body else None


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = link.recv(size - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


def fork_run(
    job: Job, limits: Limits, link: socket.socket, *, cap: bool, log: Path | None = None
) -> Ending:
    """Do a job in a forked process and wait for its end.

    The process and all of its group are killed at the time-out, after its report, and when the
    owner's `link` closes; in that case this process ends too.
    """
    parent, started = os.getpid(), time.monotonic()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        link.close()
        _become_run(job, parent, writing, limits.mem_bytes if cap else 0, log)
    os.close(writing)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # the child does it too; whoever comes first
    payload, in_time = _await_report(reading, link, started + limits.timeout_s, pid)
    os.close(reading)
    status, usage = _bury(pid, GRACE_S if in_time and not payload else 0.0)
    return Ending(
        message=_outcome(payload, in_time, status, limits),
        cpu_s=usage.ru_utime + usage.ru_stime,
        wall_s=time.monotonic() - started,
        mem_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def _become_run(job: Job, parent: int, pipe: int, mem_bytes: int, log: Path | None) -> NoReturn:
    """The whole life of a forked run."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        guard(parent, signal.SIGKILL)
        if log is not None:
            _redirect(log)
        _limit(mem_bytes)
        _report(pipe, _attempt(job))
        code = 0
    finally:
        _leave(code)


def _attempt(job: Job) -> Message:
    try:
        return {"outcome": Outcome.COMPLETED} | job()
    except Exception as error:  # noqa: BLE001 - whatever a run raises is its outcome
        if outcome_of(error) is Outcome.CRASHED and not is_out_of_memory(error):
            traceback.print_exc()
        spent = {"report": _plain(error.report)} if isinstance(error, Diverged) else {}
        return {"outcome": outcome_of(error), "error": describe_error(error)} | spent


def _redirect(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _limit(mem_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    if mem_bytes:
        most = psutil.Process().memory_info().vms + mem_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _report(pipe: int, message: Message) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    left = memoryview(pack(message))
    while left:
        left = left[os.write(pipe, left) :]


def _leave(code: int) -> NoReturn:
    """End a forked process without running what its parent registered."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _await_report(pipe: int, link: socket.socket, deadline: float, pid: int) -> tuple[bytes, bool]:
    """What the run wrote, and whether it ended by itself before the deadline."""
    data = b""
    while len(data) < HEADER or len(data) < HEADER + int.from_bytes(data[:HEADER], "big"):
        left_s = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([pipe, link.fileno()], [], [], left_s)
        if link.fileno() in ready and not link.recv(1, socket.MSG_PEEK):
            _kill_group(pid)
            sys.exit(0)
        if pipe in ready:
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return b"", True
            data += chunk
        elif time.monotonic() >= deadline:
            return b"", False
    return data[HEADER:], True


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _bury(pid: int, grace_s: float) -> tuple[int, resource.struct_rusage]:
    """Wait a moment for the end of a process, then kill it with its group."""
    deadline, pause = time.monotonic() + grace_s, 0.0005
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            _kill_group(pid)  # what it may have left behind
            return status, usage
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    _kill_group(pid)
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def _outcome(payload: bytes, in_time: bool, status: int, limits: Limits) -> Message:
    if payload:
        found: Message = json.loads(payload)
        return found
    if not in_time:
        stop = f"timed out: killed after {limits.timeout_s:g} s"
        return {"outcome": Outcome.TIMED_OUT, "error": stop}
    return {"outcome": Outcome.CRASHED, "error": _cause(status)}


def _cause(status: int) -> str:
    """Why a process ended without a report."""
    if not os.WIFSIGNALED(status):
        return f"crashed: exit code {os.waitstatus_to_exitcode(status)} without a report"
    number = signal.Signals(os.WTERMSIG(status))
    hint = " (the system may have run out of memory)" if number is signal.SIGKILL else ""
    return f"crashed: killed by {number.name}{hint}"


if __name__ == "__main__":
    main()
