"""How far a run is kept from what is not its own: levels, and how they are reached.

A forked process confines itself (`confine`); a command is started through a prefix (`wrap`). Both
work without packages and without root: Landlock decides about files, a seccomp filter about the
network, other processes and what the two cannot express, namespaces see to it that nothing
survives the run. What no level bounds, and the caller has to watch: the wall's time, the sum of
the sizes of all files, and, where several processes are allowed, the sum of their memory and
processor time (the limits hold for each of them).

Fork bombs: without `Policy.processes` there is no second process. With them, the number is bound in
namespaces, by RLIMIT_NPROC for users other than root and by the namespace's pid_max from Linux 6.14
on; all are killed with the run. At the level of filters it is not bound, but none of them can leave
the process group, so killing that gets them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import os
import resource
import shutil
import signal
import site
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from society.experiments import landlock, namespaces, seccomp
from society.experiments.landlock import Grant, Right


class Level(StrEnum):
    """How far a run is confined; each level has all that the ones before it have."""

    LIMITS = "limits"
    """Limits on time, memory, files and processes; the network and all files are in reach."""
    FILTERS = "filters"
    """Landlock and a seccomp filter: no network, no file that the policy does not name."""
    NAMESPACES = "namespaces"
    """And user, network, IPC and process namespaces: what it started ends with it."""
    BUBBLEWRAP = "bubblewrap"
    """And a file system in which nothing else exists. For commands only (`wrap`)."""

    @property
    def rank(self) -> int:
        """Place in the order of the levels, from 0."""
        return list(Level).index(self)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a confined process may do. Paths need not exist."""

    read: tuple[Path, ...] = ()
    """Files and folders it may read, beside `runtime()`."""
    write: tuple[Path, ...] = ()
    """Folders it may write to."""
    hidden: tuple[Path, ...] = ()
    """What it may not read although it lies inside the interpreter's folders."""
    devices: tuple[Path, ...] = ()
    """Device files it may use, e.g. of a GPU."""
    processes: int = 0
    """Processes it may start; 0 for none, not even a thread group of its own."""
    cpu_s: float = 0.0
    """Processor seconds; 0 for no limit."""
    mem_bytes: int = 0
    """Address space above what it has now; 0 for no limit."""
    file_bytes: int = 4 << 30
    """Largest file it may write."""
    open_files: int = 256
    """Files it may have open."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Whether a level works on this machine."""

    level: Level
    works: bool
    problem: str = ""
    """Why it does not."""
    todo: str = ""
    """What to do about it."""


OWN_TASKS = 3
"""Guardian, init and run, see `namespaces`."""
THREADS = 256
"""Threads that a confined process may have, all its children included, where they are counted."""
SYSTEM = (
    "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib",
    "/usr/local/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/nix/store",
    "/dev/urandom", "/dev/random", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu",
    "/sys/devices/system/node",
)  # fmt: skip
"""What programs read to get going; none of it says anything about the user."""
SINKS = ("/dev/null", "/dev/zero")
PROGRAMS = ("/usr", "/bin", "/sbin", "/etc/alternatives")
"""What commands may read and execute beside `runtime()`."""
CUDA = (
    "/proc/driver", "/proc/devices", "/proc/modules", "/proc/self", "/sys/bus/pci", "/sys/devices",
    "/sys/class/drm", "/sys/module", "/usr/local/cuda", "/usr/local/nvidia", "/etc/vulkan",
    "/etc/OpenCL", "/opt/rocm",
)  # fmt: skip
"""What drivers of accelerators read."""
PACKAGES = ("society", "society.configs", "society.experiments", "society.model")
LINKED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
"""Folders of the root that are links on most systems."""
OWN_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
PROBE_S = 10.0
UNCONFINED, NO_COMMAND = 125, 127
"""Exit codes of `wrap`'s command lines when the command was not started."""
NO_NEW_PRIVS = 38
CAPABILITIES = 0x20080522


# ---------------------------------------------------------------------------- what the machine has


@cache
def best() -> Level:
    """The highest level that forked runs can have on this machine, found by trying."""
    return _highest(_for_forks())


@cache
def best_for_commands() -> Level:
    """The highest level that commands can have on this machine, found by trying."""
    return _highest(probe())


def _highest(found: Sequence[Reach]) -> Level:
    """The last level before the first that does not work."""
    works = itertools.takewhile(lambda reach: reach.works, found)
    return [Level.LIMITS, *(reach.level for reach in works)][-1]


@cache
def probe() -> tuple[Reach, ...]:
    """Every level, tried in a process of its own; takes some 100 ms the first time."""
    return (*_for_forks(), *_tried(Level.BUBBLEWRAP))


@cache
def _for_forks() -> tuple[Reach, ...]:
    return (Reach(Level.LIMITS, True), *_tried(Level.FILTERS, Level.NAMESPACES))


def _tried(*levels: Level) -> list[Reach]:
    """Try levels in a small process, because this one may be large and have threads."""
    if sys.platform != "linux":
        return [_not(one, "there are only limits outside Linux", "use Linux") for one in levels]
    command = [*_launcher(), "probe", *levels]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_S, check=True)
        return [Reach(Level(one.pop("level")), **one) for one in json.loads(done.stdout)]
    except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
        return [_not(one, f"could not be tried: {error}") for one in levels]


def _not(level: Level, problem: str, todo: str = "") -> Reach:
    return Reach(level, works=False, problem=problem, todo=todo)


def _try(level: Level) -> Reach:
    """Whether a level works; in a small process."""
    if level is Level.BUBBLEWRAP:
        return _try_bubblewrap()
    if missing := landlock.missing():
        return _not(level, *missing)
    if seccomp.machine() is None:
        return _not(level, f"no system call filter for {os.uname().machine}", "use x86-64 or Arm64")
    problem = _problem(level)
    advice = namespaces.advice() if level is Level.NAMESPACES else "use a newer kernel"
    return _not(level, problem, advice) if problem else Reach(level, True)


def _try_bubblewrap() -> Reach:
    if shutil.which("bwrap") is None:
        return _not(Level.BUBBLEWRAP, "there is no bwrap", "install bubblewrap")
    command = wrap([sys.executable, "-I", "-S", "-c", ""], Policy(), Level.BUBBLEWRAP)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    if done.returncode == 0:
        return Reach(Level.BUBBLEWRAP, True)
    problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return _not(Level.BUBBLEWRAP, problem, "allow bwrap to make user namespaces")


def _problem(level: Level) -> str:
    """Why a forked process cannot be confined so; empty if it can."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            confine(Policy(), level)
            os.write(writing, _leak().encode())
        except OSError as error:
            os.write(writing, (error.strerror or str(error)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        problem = pipe.read()
    _, status = os.waitpid(pid, 0)
    return problem if status == 0 else problem or "the confined process died"


def _leak() -> str:
    """What a confined process can do although it must not; empty if nothing."""
    attempts: dict[str, Callable[[], object]] = {
        "files are in reach": lambda: os.listdir("/etc"),
        "the network is in reach": lambda: socket.socket().close(),
        "processes can be started": os.fork,
    }
    for about, attempt in attempts.items():
        with contextlib.suppress(PermissionError):
            attempt()
            return about
    return ""


def gpu_devices() -> tuple[Path, ...]:
    """Device files of the accelerators here, for `Policy.devices`."""
    nvidia = sorted(Path("/dev").glob("nvidia*"))
    return tuple(path for path in (*nvidia, Path("/dev/dri"), Path("/dev/kfd")) if path.exists())


# -------------------------------------------------------------------------------- what it may read


@cache
def runtime() -> tuple[Path, ...]:
    """What any confined Python may read: itself, installed packages, libraries, this project.

    Of what is imported from elsewhere, e.g. an editable install, it is the packages themselves.
    Call it before forking, and after importing what runs need: it is computed once.
    """
    folders = [*_python(), *(str(path) for path in _packages()), *SYSTEM]
    known = dict.fromkeys(path for path in folders if os.path.exists(path))
    known |= dict.fromkeys(_imported(tuple(os.path.realpath(path) + "/" for path in known)))
    return tuple(Path(path) for path in known)


def _python() -> Iterator[str]:
    """Folders and files of the interpreter and of what is installed into it."""
    for prefix in {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}:
        yield os.path.join(prefix, "bin")
        yield os.path.join(prefix, "pyvenv.cfg")
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield sysconfig.get_path(name)
        yield sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
    yield sysconfig.get_config_var("LIBDIR") or ""
    yield sys.executable
    yield os.path.realpath(sys.executable)
    yield from (path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    if site.ENABLE_USER_SITE:
        yield site.getusersitepackages()


def _packages() -> Iterator[Path]:
    for name in PACKAGES:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec is not None:
                yield from (Path(path) for path in spec.submodule_search_locations or ())
    yield Path(__file__).parent


def _imported(known: tuple[str, ...]) -> Iterator[str]:
    """Imported modules that lie outside the known folders: packages as folders, others as files."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or name == "__main__" or file.startswith(known):
            continue
        if not os.path.isabs(file) or not os.path.exists(file):  # torch.ops says `_ops.py`
            continue
        path = os.path.realpath(file)
        if os.path.basename(path).startswith("__init__."):
            path = os.path.dirname(path)
        if not (path + "/").startswith(known) and not str(Path.home()).startswith(path + "/"):
            yield path


def prepare(policy: Policy) -> None:
    """Look up what `confine` needs, before forking: what is found once is found for all."""
    if landlock.version():
        _readable(runtime(), policy.hidden)


def _grants(policy: Policy, base: tuple[Path, ...], *, programs: bool) -> list[Grant]:
    """Every path with what may be done there."""
    drivers = tuple(Path(path) for path in (*CUDA, *_library_path())) if policy.devices else ()
    tools = tuple(Path(path) for path in PROGRAMS) if programs else ()
    more = _readable((*drivers, *tools, *policy.read), policy.hidden)
    change, read = landlock.CHANGE, [*_readable(base, policy.hidden), *more]
    if programs:  # links are what archives are full of; in a single process they are a trick
        change |= Right.EXECUTE | Right.MAKE_SYM
        read = [(path, _executable(rights)) for path, rights in read]
    return [
        *read,
        *((path, Right.READ_FILE | Right.WRITE_FILE) for path in SINKS),
        *((str(path), landlock.DEVICE) for path in policy.devices),
        *((os.path.realpath(path), change) for path in policy.write),
    ]


def _executable(rights: Right) -> Right:
    return rights | Right.EXECUTE if rights & Right.READ_FILE else rights


@cache
def _readable(paths: tuple[Path, ...], hidden: tuple[Path, ...]) -> list[Grant]:
    """Paths without what is hidden in them, each only once."""
    secrets = [os.path.realpath(path) for path in hidden]
    found: dict[str, Right] = {}
    for folder in dict.fromkeys(os.path.realpath(path) for path in paths):
        for path, rights in _visible(folder, secrets):
            found[path] = found.get(path, Right(0)) | rights
    whole = tuple(path + "/" for path, rights in found.items() if rights & Right.READ_FILE)
    return [(path, rights) for path, rights in found.items() if not path.startswith(whole)]


def _visible(folder: str, hidden: Sequence[str]) -> Iterator[Grant]:
    """A folder without what is hidden in it; names of what is hidden can be listed, not read."""
    inside = [path for path in hidden if path.startswith(folder.rstrip("/") + "/")]
    if any(folder == path or folder.startswith(path + "/") for path in hidden):
        return
    if not inside:
        yield folder, landlock.READ
        return
    yield folder, Right.READ_DIR
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            yield from _visible(path, hidden)


def _library_path() -> list[str]:
    """Folders named in LD_LIBRARY_PATH; those of CUDA may lie anywhere."""
    return [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]


# --------------------------------------------------------------------------------- forked processes


def confine(policy: Policy, level: Level) -> None:
    """Restrict this forked process, and all that it will start, for good.

    To be called in a process with a single thread that needs none of what it has open but what it
    goes on with: files, sockets and memory that it has already stay in reach. At `NAMESPACES` and
    above it goes on in a child, see `namespaces.enter`: the process that was forked waits for it
    and ends as it does. `BUBBLEWRAP` adds nothing here.

    What is refused fails with `PermissionError`. Of modes, owners and times nothing can be changed.
    With `Policy.processes`, programs may be executed too, and a child ends with the process if
    `level` is at least `NAMESPACES`; at `FILTERS` nothing can leave its process group. Processor
    time beyond `cpu_s` ends it with SIGXCPU.

    Raises:
        OSError: The level cannot be had here; the process may be half confined and should end.
    """
    if level.rank >= Level.FILTERS.rank:
        _check_single()
    if level.rank >= Level.NAMESPACES.rank:
        namespaces.enter(policy.processes + THREADS)
    _restrict(policy, level, runtime(), programs=policy.processes > 0)


def _check_single() -> None:
    """Filters and namespaces bind the thread that asks for them and what it starts, no other."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise OSError(0, f"cannot confine a process with {threads} threads")


def _restrict(policy: Policy, level: Level, base: tuple[Path, ...], *, programs: bool) -> None:
    """Everything but the namespaces."""
    alone = level.rank >= Level.NAMESPACES.rank
    limits = _limits(policy, alone=alone)  # while the process can still read about itself
    if level is Level.LIMITS:
        _limit(limits)
        return
    grants = _grants(policy, base, programs=programs)
    rules = seccomp.Rules(
        itself=os.getpid(),
        forks=policy.processes > 0,
        programs=programs,
        alone=alone,
        scoped=landlock.version() >= landlock.SCOPES,
        truncates=landlock.version() >= landlock.TRUNCATES,
        metadata=level is Level.BUBBLEWRAP,
        anonymous=bool(policy.devices),
    )
    filter_ = seccomp.program(rules)
    _drop_privileges()
    landlock.restrict(grants)
    _limit(limits)  # after the rules, for which files had to be opened
    seccomp.install(filter_)


def _drop_privileges() -> None:
    """No capabilities, and none to be had from any program."""
    libc = ctypes.CDLL(None, use_errno=True)
    none = (ctypes.c_uint32 * 6)()
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel has no no_new_privs")
    if libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES, 0), none):
        raise OSError(ctypes.get_errno(), "cannot drop capabilities")


def _limits(policy: Policy, *, alone: bool) -> dict[int, int]:
    """Limits of the process, from what it has used so far."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: policy.file_bytes,
        resource.RLIMIT_NOFILE: policy.open_files,
    }
    if policy.mem_bytes and not policy.devices:  # CUDA reserves more addresses than there is memory
        limits[resource.RLIMIT_AS] = _address_space() + policy.mem_bytes
    if alone:  # counted in the user namespace; before Linux 5.14 it was all of the user's processes
        limits[resource.RLIMIT_NPROC] = OWN_TASKS + policy.processes + THREADS
    if policy.cpu_s:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limits[resource.RLIMIT_CPU] = math.ceil(used.ru_utime + used.ru_stime + policy.cpu_s)
    return limits


def _limit(limits: Mapping[int, int]) -> None:
    for which, most in limits.items():
        grace = 1 if which == resource.RLIMIT_CPU else 0  # SIGXCPU at the one, SIGKILL at the other
        _lower(which, most, most + grace)


def _lower(which: int, soft: int, hard: int) -> None:
    """Set a limit unless a lower one is in force."""
    with contextlib.suppress(ValueError, OSError):  # macOS takes no limit on addresses
        _, now = resource.getrlimit(which)
        if now != resource.RLIM_INFINITY:
            soft, hard = min(soft, now), min(hard, now)
        resource.setrlimit(which, (soft, hard))


def _address_space() -> int:
    """Bytes of addresses in use."""
    with contextlib.suppress(FileNotFoundError):  # only Linux has it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return pages * resource.getpagesize()
    import psutil

    return int(psutil.Process().memory_info().vms)


# ----------------------------------------------------------------------------------------- commands


def wrap(argv: Sequence[str], policy: Policy, level: Level) -> list[str]:
    """A command line that runs `argv` confined, in the folder and environment that it is given.

    It may execute programs (of the system, of `runtime()`, of what it may read or write) and start
    `policy.processes` processes beside itself. It ends as the command does, by the same signal or
    with the same exit code (128 + the signal at `BUBBLEWRAP`); with 125 if the level cannot be had.
    SIGTERM to it ends the command and what that started.
    """
    bubble = level is Level.BUBBLEWRAP
    if bubble:  # the processes to be seen there are its own
        policy = replace(policy, read=(*policy.read, Path("/proc")))
    order = {"policy": asdict(policy), "base": runtime(), "level": level}
    inside = [*_launcher(), "run", json.dumps(order, default=str), *argv]
    if not bubble:
        return inside
    outside = [*_launcher(), "enter", str(policy.processes + THREADS)]
    return [*outside, *_bubblewrap(policy), "--", *inside]


def _launcher() -> list[str]:
    """This module in a process of its own, without the packages around it."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("launcher.py"))]


def _bubblewrap(policy: Policy) -> list[str]:
    """Bubblewrap's command line, up to the command."""
    command = [
        "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--proc", "/proc", "--dev", "/dev",
    ]  # fmt: skip
    drivers = (*CUDA, *_library_path()) if policy.devices else ()
    seen = (*runtime(), *policy.read, *PROGRAMS, *drivers)
    binds = {str(path): "--ro-bind" for path in seen if not _has_its_own(str(path))}
    binds |= {str(path): "--dev-bind" for path in policy.devices}
    binds |= {str(path): "--bind" for path in policy.write}
    for path in sorted(filter(os.path.exists, binds)):  # a folder before what lies in it
        if not _beneath(path, binds, binds[path]):
            command += _bind(path, binds[path])
    for path in filter(os.path.exists, map(os.path.realpath, policy.hidden)):
        command += ["--tmpfs", path] if os.path.isdir(path) else ["--ro-bind", "/dev/null", path]
    return [*command, "--remount-ro", "/"]


def _has_its_own(path: str) -> bool:
    """Whether the new file system has such a path of its own."""
    return path in OWN_DEVICES or path == "/proc" or path.startswith("/proc/")


def _beneath(path: str, binds: Mapping[str, str], kind: str) -> bool:
    """Whether a path is there because a folder above it is, in the same way."""
    return any(path.startswith(one + "/") and binds[one] == kind for one in binds)


def _bind(path: str, kind: str) -> list[str]:
    if path in LINKED and os.path.islink(path):
        return ["--symlink", os.readlink(path), path]
    return [kind, path, path]


def main(arguments: Sequence[str]) -> None:
    """What the launcher does: `probe`, `run ORDER COMMAND...` or `enter TASKS COMMAND...`."""
    word, *rest = arguments
    if word == "probe":
        found = [asdict(_try(Level(name))) for name in rest]
        sys.stdout.write(json.dumps(found))
        return
    try:
        namespaces.enter(int(rest[0])) if word == "enter" else _obey(json.loads(rest[0]))
    except OSError as error:
        sys.stderr.write(f"cannot be confined: {error.strerror or error}\n")
        sys.exit(UNCONFINED)
    _become(rest[1:])


def _obey(order: dict[str, Any]) -> None:
    policy, level = _policy(order["policy"]), Level(order["level"])
    base = tuple(Path(path) for path in order["base"])
    if level is Level.NAMESPACES:
        namespaces.enter(policy.processes + THREADS)
    _restrict(policy, level, base, programs=True)


def _policy(values: dict[str, Any]) -> Policy:
    """Back from JSON."""
    paths = ("read", "write", "hidden", "devices")
    return Policy(**values | {name: tuple(map(Path, values[name])) for name in paths})


def _become(argv: Sequence[str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], list(argv))
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: {error.strerror}\n")
        sys.exit(NO_COMMAND)
