"""One forked process per run: its limits, its report, its end, and that nothing is left of it.

A process that forks runs is a *subreaper*: whatever a run starts and abandons becomes its child, so
that it can be found and killed. `fork_run` returns when all of a run's processes are gone.

A run reports over a pipe in frames: a JSON object behind its length (4 bytes, big-endian). The last
frame is its report. A run with a stranger's code sends another one before that, while all of the
process is ours (its *opening*); whatever comes later is the stranger's word.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil

from society.experiments.executor import describe_error, outcome_of, thin
from society.experiments.task import Diverged, Limits, TrainReport
from society.model.device import is_out_of_memory
from society.records import Outcome

Message = dict[str, Any]

HEADER = 4
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MADV_COLLAPSE = 25
HUGE_PAGE = 2 << 20
MAX_FILE_BYTES = 4 << 30
"""No run writes a larger file: a log without end must not fill the disk."""
OPENING_BYTES = 1 << 20
GRACE_S = 1.0
"""How long a process that closed its pipe may take to be gone, or one that nobody listens to."""
KILLED_S = 0.25
"""How long a process may take to bury the ones that were killed under it."""
ENTRY_BYTES = 16_384
"""What an entry of a folder counts for at least."""
DEEPEST = 2_000
"""Characters of the path of a folder that is looked into."""
TICK_S = 0.25
"""How often a run is looked at while it works."""
TICK_SHARE = 0.02
"""Most of its time that the parent may spend on looking."""
LATEST_TICK_S = 2.0
"""It looks again after so long, whatever that costs: a run may make it slow."""
SWEEP_S = 20.0
"""Killed processes are gone long before that, or the machine is ill."""


@dataclass(frozen=True, slots=True)
class Say:
    """How a run sends its opening."""

    handle: int
    """The pipe's descriptor."""

    def __call__(self, message: Message) -> None:
        """Send a frame."""
        sys.stdout.flush()
        sys.stderr.flush()
        left = memoryview(pack(message))
        while left:
            left = left[os.write(self.handle, left) :]


Job = Callable[[Say], Message]
"""What a run does; returns its report."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What the parent looks at while a run works, beside the clock."""

    folder: Path | None = None
    """Where the run may write; it is stopped when there is more than `disk_bytes`."""
    disk_bytes: int = 0
    line: int | None = None
    """A descriptor; the run is stopped a moment after its other end is closed."""
    stranger: bool = False
    """Whether it sends an opening, and is not to be trusted after that."""
    most_cpu_s: float = math.inf
    """Processor seconds that the run may use from its opening on."""
    report_bytes: int = 1 << 26
    """Longest report."""


PLAIN = Watch()


@dataclass(frozen=True, slots=True)
class Ending:
    """How a forked run ended."""

    message: Message = field(default_factory=dict)
    """What it reported; `outcome` is always there."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    mem_bytes: int = 0


@dataclass(slots=True)
class Watched:
    """What the parent of a run saw of it. Nothing in here but `payload` is the run's own word."""

    stop: str = ""
    """Why it was stopped: `time`, `disk`, `cpu`, `line` or `size`; empty if it came to its end."""
    opening: Message | None = None
    payload: bytes = b""
    """Its last frame; empty if there is none."""
    opened_at: float = 0.0
    """Seconds (monotonic) at which the opening came."""
    ended_at: float = 0.0
    """The same for its last frame, or its end."""
    status: int = 0
    """As `os.wait4` gives it."""
    cpu_s: float = 0.0
    """Processor seconds of all of its processes."""
    wall_s: float = 0.0
    mem_bytes: int = 0


def pack(message: Message) -> bytes:
    """A message as it goes over the wire."""
    body = json.dumps(message).encode()
    return len(body).to_bytes(HEADER, "big") + body


def guard(parent: int, death: int) -> None:
    """End with the parent, leave Ctrl-C to the owner, and write no core files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death)
    if os.getppid() != parent:  # it died before we could ask
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of whatever this process's descendants leave behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def use_huge_pages() -> int:
    """Move this process's memory to huge pages, so that forking it, and ending forks, is cheaper.

    A process that has imported torch has 40,000 pages of its own, each of which a fork must list
    and an exit must strike off: 10 ms together, 3 ms with huge pages. What a fork writes to is
    still copied in small ones. Returns how many huge pages there are; elsewhere than on Linux 6.1
    and later it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return sum(
            madvise(place, HUGE_PAGE, MADV_COLLAPSE) == 0
            for first, end in _own_memory()
            for place in range(-(-first // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE)
        )
    return 0


def _own_memory() -> Iterator[tuple[int, int]]:
    """First and last address of every writable range without a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_, file = [*line.split(maxsplit=5), ""][:6]
        if rights == "rw-p" and file in ("", "[heap]"):
            first, end = (int(address, 16) for address in addresses.split("-"))
            yield first, end


def fork_run(
    job: Job, limits: Limits, link: socket.socket, *, cap: bool, log: Path | None = None
) -> Ending:
    """Do one of our own jobs in a forked process and wait for its end; see `watch_run`."""
    seen = watch_run(job, limits, link, cap=cap, log=log)
    return Ending(_message(seen, limits), seen.cpu_s, seen.wall_s, seen.mem_bytes)


def watch_run(
    job: Job,
    limits: Limits,
    link: socket.socket,
    *,
    cap: bool,
    log: Path | None = None,
    watch: Watch = PLAIN,
) -> Watched:
    """Do a job in a forked process, and return when it and all that it started are gone.

    They are killed at the time-out, after the report, when `watch` says so, and when the owner's
    `link` closes; in that case this process ends too.
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
    try:
        seen = _Observer(pid, reading, link, watch, started + limits.timeout_s).observe()
    finally:
        os.close(reading)
    if seen.stop or (seen.payload and watch is not PLAIN):
        _stop(pid)
        grace_s = KILLED_S
    else:
        grace_s = GRACE_S  # ours ends by itself; whoever waits for it inside must have time to
    seen.status, usage = _bury(pid, grace_s)
    sweep()
    seen.cpu_s = max(seen.cpu_s, usage.ru_utime + usage.ru_stime)
    seen.wall_s = time.monotonic() - started
    seen.mem_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return seen


class _Observer:
    """Listens to a run, and looks at it from time to time."""

    def __init__(
        self, pid: int, pipe: int, link: socket.socket, watch: Watch, deadline: float
    ) -> None:
        self._pid, self._pipe, self._link, self._watch = pid, pipe, link, watch
        self._deadline = deadline
        self._meter = _Meter(pid)
        self._most_cpu_s = math.inf
        self._data, self._hung_up = b"", False
        self._next_tick = time.monotonic() + TICK_S
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)
        self._poll.register(link, select.POLLIN)
        if watch.line is not None:
            self._poll.register(watch.line, 0)  # tells when the other side has hung up
        self.seen = Watched()

    def observe(self) -> Watched:
        """Wait for the report, the end, or a reason to stop it."""
        while not self._is_over():
            ready = dict(self._poll.poll(self._pause_s() * 1e3))
            if self._link.fileno() in ready and not self._link.recv(1, socket.MSG_PEEK):
                _kill_group(self._pid)
                sweep()
                sys.exit(0)
            if self._watch.line is not None and self._watch.line in ready:
                self._poll.unregister(self._watch.line)
                self._deadline = min(self._deadline, time.monotonic() + GRACE_S)
                self._hung_up = True
            if self._pipe in ready:
                chunk = os.read(self._pipe, 1 << 16)
                if not chunk:
                    break
                self._data += chunk
        if self._watch.stranger or self._watch.line is not None:
            self._meter.look()  # what is killed before its parent waits for it is not in rusage
        if self._watch.stranger and not self.seen.stop:
            self._look()  # what it did since the last time
            self.seen.payload = b"" if self.seen.stop else self.seen.payload
        self.seen.ended_at = time.monotonic()
        self.seen.cpu_s = self._meter.total_s
        return self.seen

    def _is_over(self) -> bool:
        if self._framed():
            return True
        now = time.monotonic()
        if now >= self._deadline:
            self.seen.stop = "line" if self._hung_up else "time"
        elif now >= self._next_tick and self._looks:
            self._look()
            cost_s = time.monotonic() - now
            pause_s = min(max(TICK_S, cost_s / TICK_SHARE), LATEST_TICK_S)
            self._next_tick = now + cost_s + pause_s
        return bool(self.seen.stop)

    def _framed(self) -> bool:
        """Whether the last frame is there; takes the opening on the way."""
        while len(self._data) >= HEADER:
            opens = self._watch.stranger and self.seen.opening is None
            size = int.from_bytes(self._data[:HEADER], "big")
            if size > (OPENING_BYTES if opens else self._watch.report_bytes):
                self.seen.stop = "size"
                return True
            if len(self._data) < HEADER + size:
                return False
            frame, self._data = self._data[HEADER : HEADER + size], self._data[HEADER + size :]
            if not opens or "outcome" in (opening := json.loads(frame)):
                self.seen.payload = frame
                return True
            self.seen.opening, self.seen.opened_at = opening, time.monotonic()
            self._most_cpu_s = opening["cpu_s"] + self._watch.most_cpu_s
        return False

    @property
    def _looks(self) -> bool:
        return self._watch.folder is not None or self._watch.stranger

    def _pause_s(self) -> float:
        """Until something is to be done without being woken."""
        until = min(self._deadline, self._next_tick) if self._looks else self._deadline
        return min(max(0.0, until - time.monotonic()), 86_400.0) + 0.001

    def _look(self) -> None:
        watch = self._watch
        if watch.stranger:
            self._meter.look()
            if self._meter.total_s > self._most_cpu_s:
                self.seen.stop = "cpu"
        if watch.folder is not None and self._disk_bytes(watch.folder) > watch.disk_bytes:
            self.seen.stop = "disk"

    def _disk_bytes(self, folder: Path) -> int:
        hidden = self._meter.disk_bytes if self._watch.stranger else 0
        return max(hidden, size_of(folder, self._watch.disk_bytes))


class _Meter:
    """Adds up what a process and all that it started have used, while they live."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen: dict[tuple[int, float], float] = {}
        self._written: dict[tuple[int, float], int] = {}
        self._hidden = 0

    def look(self) -> None:
        """Read the clocks of those that are there now, and what they wrote."""
        self._hidden = 0
        for pid in (self._root, *_descendants(self._root)):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                times, which = process.cpu_times(), (pid, process.create_time())
                self._seen[which] = times.user + times.system
                if sys.platform == "linux":
                    self._written[which] = process.io_counters().write_bytes
            self._hidden += _nameless(pid)

    @property
    def total_s(self) -> float:
        """Seconds, of processes that are gone by now too."""
        return sum(self._seen.values())

    @property
    def disk_bytes(self) -> int:
        """What was written to disks, in files without a name too, or what such files hold now."""
        return max(sum(self._written.values()), self._hidden)


def _nameless(pid: int) -> int:
    """Bytes of open files that were deleted, which no look into a folder finds."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as handles:
        for handle in handles:
            with contextlib.suppress(OSError):
                found = os.stat(handle.path)
                if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                    total += found.st_blocks * 512
    return total


def size_of(folder: Path, enough: int) -> int:
    """Bytes below a folder as far as they take room; stops counting above `enough`.

    Every entry counts: millions of empty ones fill a disk too. What lies so deep that no path leads
    to it counts as too much.
    """
    total, folders = 0, [str(folder)]
    while folders and total <= enough:
        if len(folders[-1]) > DEEPEST:
            return enough + 1
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    total += max(found.st_blocks * 512, ENTRY_BYTES)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    return total


def remove(folder: Path) -> None:
    """Delete a folder with all that a run left in it, however deep.

    `shutil.rmtree` calls itself for every folder in a folder, and so has an end. What it leaves is
    made flat: folders in folders are moved beside each other.
    """
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=folder.parent) as flat:
        rest = [os.path.join(flat, "0")]
        folder.rename(rest[0])
        for number in itertools.count(1):
            if not rest:
                break
            _empty(place := rest.pop(), os.path.join(flat, f"{number}-"), rest)
            os.rmdir(place)


def _empty(place: str, prefix: str, rest: list[str]) -> None:
    """Delete the files of a folder and move its folders to `prefix`; they are added to `rest`."""
    with os.scandir(place) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            os.rename(entry.path, found := f"{prefix}{len(rest)}")
            rest.append(found)


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
        say = Say(pipe)
        say(_attempt(job, say))
        code = 0
    finally:
        leave(code)


def _attempt(job: Job, say: Say) -> Message:
    try:
        return {"outcome": Outcome.COMPLETED} | job(say)
    except Exception as error:  # noqa: BLE001 - whatever a run raises is its outcome
        if outcome_of(error) is Outcome.CRASHED and not is_out_of_memory(error):
            traceback.print_exc()
        spent = {"report": plain(error.report)} if isinstance(error, Diverged) else {}
        return {"outcome": outcome_of(error), "error": describe_error(error)} | spent


def plain(report: TrainReport) -> Message:
    """A report as JSON values."""
    values = {name: getattr(report, name) for name in TrainReport.__slots__}
    return values | {"curve": thin(report.curve)}


def _redirect(log: Path) -> None:
    """Write what is printed to the log, line by line: a killed run leaves its last words."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error is written so anyway
        sys.stdout.reconfigure(line_buffering=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _limit(mem_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    if mem_bytes:
        most = psutil.Process().memory_info().vms + mem_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def leave(code: int) -> NoReturn:
    """End a forked process without running what its parent registered."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _stop(pid: int) -> None:
    """Kill what a process started, so that it can bury that and end; or itself, if it is alone.

    What a process has used is added to its parent's when it is buried, not when both are killed.
    """
    started = list(_descendants(pid))
    for one in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)
    if not started:
        _kill_group(pid)


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


def sweep(spare: frozenset[int] = frozenset()) -> None:
    """Kill and bury every child of this process, and theirs, until none is left but `spare`.

    Raises:
        TimeoutError: One cannot be killed. This process is not to be used any more then.
    """
    deadline, pause = time.monotonic() + SWEEP_S, 0.0002
    while left := set(children(os.getpid())) - spare:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored: buried already
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(left)} of a run cannot be killed")
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def children(pid: int) -> list[int]:
    """The living and unburied children of a process."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        lists = [Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads]
    except OSError:  # it is gone, or the system has no such list
        if sys.platform == "linux" and Path("/proc/self/task").exists():
            return _children_by_parent(pid) if not _LISTED else []
        return _children_by_parent(pid)
    return [int(word) for text in lists for word in text.split()]


_LISTED = Path(f"/proc/self/task/{os.getpid()}/children").exists()
"""Whether the kernel lists the children of a thread (CONFIG_PROC_CHILDREN)."""


def _children_by_parent(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def _descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from _descendants(child)


def _message(seen: Watched, limits: Limits) -> Message:
    if seen.payload:
        found: Message = json.loads(seen.payload)
        return found
    return stopped(seen, limits)


def stopped(seen: Watched, limits: Limits) -> Message:
    """The outcome of a run that sent no report."""
    if seen.stop == "time":
        stop = f"timed out: killed after {limits.timeout_s:g} s"
        return {"outcome": Outcome.TIMED_OUT, "error": stop}
    if seen.stop == "disk":
        stop = "rejected: stopped because it wrote more than its scratch folder may hold"
        return {"outcome": Outcome.REJECTED, "error": stop}
    if seen.stop == "size":
        return {"outcome": Outcome.REJECTED, "error": "rejected: its report is far too long"}
    if seen.stop:
        return {"outcome": Outcome.CRASHED, "error": f"crashed: stopped ({seen.stop})"}
    return {"outcome": Outcome.CRASHED, "error": _cause(seen.status)}


def _cause(status: int) -> str:
    """Why a process ended without a report."""
    if not os.WIFSIGNALED(status):
        return f"crashed: exit code {os.waitstatus_to_exitcode(status)} without a report"
    try:
        name = signal.Signals(os.WTERMSIG(status)).name
    except ValueError:  # a real-time signal
        name = f"signal {os.WTERMSIG(status)}"
    hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
    return f"crashed: killed by {name}{hint}"
