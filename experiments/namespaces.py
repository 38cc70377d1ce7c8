"""User, network, IPC, host-name and process namespaces of Linux, entered by a forked process.

    guardian            the process that called `enter`; outside, waits, ends as the run ends
    ├── init            process 1 inside: the kernel ends all others with it
    └── run             returns from `enter`, in a session of its own

The network of the namespace has no interface that is up. Init ends when the guardian does, however
that ends, because a pipe that only the guardian holds open is closed then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import types
from pathlib import Path
from typing import NoReturn

CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
APART = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
PR_SET_PDEATHSIG = 1
MOST_FILES = 1 << 20
RESERVED = 301
"""Least value of pid_max; after as many forks, only the numbers above it are given out."""


def enter(tasks: int) -> None:
    """Go on in a child that has namespaces of its own; this process never returns.

    It waits for the child and ends with the same exit code or by the same signal; `wait4` of it
    counts the processor time and memory of everything inside. SIGTERM to it ends the run at once,
    SIGKILL too, but then the time is lost. Either way nothing inside survives it.

    Args:
        tasks: Processes and threads that may exist inside at once (and up to 301 more, until the
            first 300 have been started), where the kernel can tell (Linux 6.14).

    Raises:
        OSError: The system gives this process no namespaces.
    """
    uid, gid, parent = os.geteuid(), os.getegid(), os.getppid()
    _unshare()
    _map_ids(uid, gid)
    _die_with(parent)  # again: entering may have cleared the wish
    reading, writing = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(writing)
        _be_init(reading)
    run = os.fork()
    if run:
        _be_guardian(init, run, writing)
    os.setsid()
    os.close(writing)
    _die_with_guardian(reading)
    _limit_tasks(tasks)


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(APART):
        number = ctypes.get_errno()
        raise OSError(number, f"no namespaces: {os.strerror(number)}")


def _map_ids(uid: int, gid: int) -> None:
    """Be the same user inside as outside, and nobody else."""
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as error:
        raise OSError(error.errno, f"no user namespace: {error.strerror}") from error


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we could ask
        os._exit(1)


def _die_with_guardian(pipe: int) -> None:
    """The same for a process whose parent lies outside its namespace and so has no number."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    watch = select.poll()
    watch.register(pipe, 0)
    if watch.poll(0):  # hung up
        os._exit(1)
    os.close(pipe)


def _limit_tasks(tasks: int) -> None:
    """Bound the processes inside by the numbers there are for them.

    Before Linux 6.14 the file is not the namespace's, but the whole machine's.
    """
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release >= (6, 14):
        with contextlib.suppress(OSError):  # an older system call filter may hide it
            Path("/proc/sys/kernel/pid_max").write_text(str(RESERVED + tasks))


def _be_init(pipe: int) -> NoReturn:
    """Bury orphans until the guardian is gone."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, _bury)
        os.closerange(0, pipe)
        os.closerange(pipe + 1, MOST_FILES)
        os.read(pipe, 1)
    finally:
        os._exit(0)


def _bury(number: int, frame: types.FrameType | None) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _be_guardian(init: int, run: int, pipe: int) -> NoReturn:
    """Wait for the run, end what it left behind, and end as it did."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: os.kill(run, signal.SIGKILL))
        os.closerange(3, pipe)
        os.closerange(max(3, pipe + 1), MOST_FILES)
        _, status = os.waitpid(run, 0)
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)  # returns when all inside are gone
        _end_like(status)
    finally:
        os._exit(1)


def _end_like(status: int) -> NoReturn:
    """End by the same signal, or with the same exit code, as a process that was waited for."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


def advice() -> str:
    """What to do about namespaces that could not be had."""
    if sys.platform != "linux":
        return "only Linux has them"
    if _setting("kernel/unprivileged_userns_clone") == 0:
        return "sysctl kernel.unprivileged_userns_clone=1"
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == 1:
        return "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    if _setting("user/max_user_namespaces") == 0:
        return "sysctl user.max_user_namespaces=10000"
    return "allow user namespaces; a container needs a seccomp profile that permits unshare"


def _setting(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys", name).read_text())
    return None
