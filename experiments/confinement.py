"""What a run of a task may touch: the task's own wishes as a policy of the sandbox."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from society.experiments import sandbox
from society.experiments.orders import Order, Post
from society.experiments.processes import MAX_FILE_BYTES
from society.experiments.sandbox import Level, Policy
from society.experiments.task import Access, Limits, Task
from society.model import device as devices

COMPILERS = 64
"""Processes that a run on an accelerator may start, to compile."""
SPARE_CPU_S = 5
"""Processor seconds beyond the time-out, which comes first for a run of one thread."""


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
