"""What a confined process can and cannot do, at every level that this machine offers."""

import ctypes
import faulthandler
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from society.experiments import landlock, sandbox, seccomp
from society.experiments.sandbox import Level, Policy

OFFERED = {reach.level: reach for reach in sandbox.probe()}
NOBODY = 65534
SECRET = "the holdout"
UNIX_PATH_MAX = 100


def _level(level: Level) -> object:
    reach = OFFERED[level]
    why = f"{level}: {reach.problem}"
    return pytest.param(level, marks=pytest.mark.skipif(not reach.works, reason=why), id=level)


FORKED = [_level(level) for level in (Level.FILTERS, Level.NAMESPACES)]
COMMANDS = [_level(level) for level in (Level.FILTERS, Level.NAMESPACES, Level.BUBBLEWRAP)]
forked = pytest.mark.parametrize("level", FORKED)
commands = pytest.mark.parametrize("level", COMMANDS)
apart = pytest.mark.parametrize("level", FORKED[1:])


@dataclass(frozen=True)
class Ended:
    """How a confined process ended, and what it said."""

    status: int
    said: object
    usage: resource.struct_rusage

    @property
    def signal(self) -> int:
        return os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else 0


def confined(
    level: Level, policy: Policy, act: Callable[[], object], before: Callable[[], object] = bool
) -> Ended:
    """Do something in a confined child; what it returns has to go through JSON."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            before()
            sandbox.confine(policy, level)
            os.write(writing, json.dumps(attempt(act)).encode())
        except OSError as error:
            os.write(writing, json.dumps(f"not confined: {error}").encode())
            os._exit(99)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        words = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    return Ended(status, json.loads(words) if words else None, usage)


def attempt(act: Callable[[], object]) -> object:
    """What an action returns, or the name of what it raises."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - what it is, is the result
        return type(error).__name__


def refused(level: Level, policy: Policy, *acts: Callable[[], object]) -> bool:
    """Whether every action fails for want of permission; each is possible outside."""
    said = confined(level, policy, lambda: [attempt(act) for act in acts]).said
    assert said == ["PermissionError"] * len(acts)
    return True


def become(uid: int) -> None:
    """Be another user as if logged in as such; only root can."""
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # like a program that this user has started


@pytest.fixture
def room(tmp_path):
    """A folder with a scratch folder, a secret and something to read."""
    for name in ("scratch", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "data" / "train").write_text("the text")
    return tmp_path


def policy_of(room: Path, **more: object) -> Policy:
    return replace(Policy(read=(room / "data",), write=(room / "scratch",)), **more)


# ------------------------------------------------------------------------------------------ network


@forked
def test_the_network_is_out_of_reach(level, room):
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        assert refused(
            level,
            policy_of(room),
            lambda: socket.create_connection(tcp.getsockname(), 1),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
                b"x", udp.getsockname()
            ),
            lambda: socket.socket(socket.AF_INET6),
            lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).bind(("127.0.0.1", 0)),
        )


@forked
def test_unix_sockets_are_out_of_reach(level, room, tmp_path_factory):
    place = str(room / "scratch" / "s")
    path = place if len(place) < UNIX_PATH_MAX else str(tmp_path_factory.mktemp("s") / "s")
    policy = policy_of(room, write=(Path(path).parent,))
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as hidden:
        named.bind(path)
        named.listen()
        hidden.bind(f"\0society-test-{os.getpid()}")
        hidden.listen()
        assert refused(
            level,
            policy,
            lambda: socket.socket(socket.AF_UNIX).connect(path),
            lambda: socket.socket(socket.AF_UNIX).connect(hidden.getsockname()),
            lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),  # could send anywhere
        )


@forked
def test_an_open_socket_cannot_be_connected(level, room):
    ours, theirs = socket.socket(), socket.socket()
    with ours, theirs:
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        assert refused(
            level,
            policy_of(room),
            lambda: ours.connect(theirs.getsockname()),
            lambda: theirs.accept(),
        )


@forked
def test_a_connected_pair_still_works(level, room):
    def talk():
        one, other = socket.socketpair()
        one.sendall(b"hello")
        return other.recv(5).decode()

    assert confined(level, policy_of(room), talk).said == "hello"


# -------------------------------------------------------------------------------------------- files


@forked
def test_only_what_is_named_can_be_read(level, room):
    assert refused(
        level,
        policy_of(room),
        lambda: (room / "secret").read_text(),
        lambda: os.listdir(room),
        lambda: Path("/etc/passwd").read_text(),
        lambda: os.listdir(Path.home()),
        lambda: os.listdir("/"),
        lambda: os.listdir("/tmp"),
        lambda: Path("/proc/self/environ").read_bytes(),
        lambda: os.open(f"/proc/{os.getppid() or 1}/mem", os.O_RDONLY),
        lambda: os.open(f"/proc/{PARENT}/mem", os.O_RDWR),
        lambda: Path(f"/proc/{PARENT}/environ").read_bytes(),
        lambda: os.listdir("/proc"),
        lambda: os.listdir("/dev/shm"),
    )


PARENT = os.getpid()


@forked
def test_what_is_named_can_be_read(level, room):
    def read():
        import this  # noqa: F401 - a module that nothing has imported yet

        names = os.listdir(room / "data")
        Path("/dev/null").write_text("gone")
        return [(room / "data" / "train").read_text(), names, len(os.urandom(3))]

    assert confined(level, policy_of(room), read).said == ["the text", ["train"], 3]


@forked
def test_only_the_scratch_folder_can_be_written(level, room):
    inside = room / "scratch" / "model"

    def write():
        inside.mkdir()
        (inside / "weights").write_text("1")
        (inside / "weights").rename(room / "scratch" / "moved")
        inside.rmdir()
        return (room / "scratch" / "moved").read_text()

    assert confined(level, policy_of(room), write).said == "1"
    assert refused(
        level,
        policy_of(room),
        lambda: (room / "other").write_text("x"),
        lambda: (room / "data" / "train").write_text("x"),
        lambda: (room / "data" / "train").unlink(),
        lambda: (room / "data" / "train").rename(room / "data" / "renamed"),
        lambda: os.truncate(room / "secret", 0),
        lambda: os.open(room / "data" / "train", os.O_RDONLY | os.O_TRUNC),
        lambda: os.mkdir(room / "folder"),
        lambda: os.open(sandbox.__file__, os.O_WRONLY),
    )
    assert (room / "secret").read_text() == SECRET


@forked
def test_links_lead_nowhere(level, room):
    scratch = room / "scratch"
    (scratch / "symbolic").symlink_to(room / "secret")
    (scratch / "up").symlink_to(room)
    (room / "data" / "symbolic").symlink_to(room / "secret")
    with pytest.raises(AssertionError, match="OSError"):  # EXDEV: from a folder with other rights
        refused(level, policy_of(room), lambda: os.link(room / "secret", scratch / "hard"))
    assert refused(
        level,
        policy_of(room),
        lambda: (scratch / "symbolic").read_text(),
        lambda: (scratch / "up" / "secret").read_text(),
        lambda: (room / "data" / "symbolic").read_text(),
        lambda: (scratch / ".." / "secret").read_text(),
        lambda: (scratch / "made").symlink_to(room / "secret"),
        lambda: os.mkfifo(scratch / "pipe"),
    )


@forked
def test_a_folder_that_was_open_before_leads_nowhere(level, room):
    folder = os.open(room, os.O_RDONLY)
    try:
        assert refused(
            level, policy_of(room), lambda: os.open("secret", os.O_RDONLY, dir_fd=folder)
        )
    finally:
        os.close(folder)


@forked
def test_modes_times_and_owners_stay(level, room):
    secret = room / "secret"
    handle = os.open(room / "data" / "train", os.O_RDONLY)
    try:
        assert refused(
            level,
            policy_of(room),
            lambda: secret.chmod(0),
            lambda: os.chmod(room, 0),
            lambda: os.fchmod(handle, 0),
            lambda: os.utime(secret, (0, 0)),
            lambda: os.chown(secret, NOBODY, NOBODY),
            lambda: os.setxattr(secret, "user.x", b"1"),
        )
    finally:
        os.close(handle)


@forked
def test_a_hidden_package_is_left_out(level, tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    for name in ("corpus", "other"):
        (packages / name / "deep").mkdir(parents=True)
        (packages / name / "deep" / "text").write_text(name)
    (packages / "alias").symlink_to(packages / "corpus")
    (packages / "single.py").write_text("x = 1")
    policy = Policy(read=(packages,), hidden=(packages / "corpus",))
    seen = ("other/deep/text", "single.py")
    found = confined(level, policy, lambda: [(packages / name).read_text() for name in seen]).said
    assert found == ["other", "x = 1"]
    assert refused(
        level,
        policy,
        lambda: (packages / "corpus" / "deep" / "text").read_text(),
        lambda: (packages / "alias" / "deep" / "text").read_text(),
    )


@forked
def test_the_shipped_corpus_can_be_hidden(level):
    import importlib.util

    spec = importlib.util.find_spec("bible")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    file = next(path for path in folder.rglob("*") if path.is_file())
    policy = Policy(hidden=(folder,))
    assert refused(level, policy, lambda: file.read_bytes())
    read_else = confined(level, policy, lambda: len(Path(pytest.__file__).read_text()))
    assert read_else.said == len(Path(pytest.__file__).read_text())


def test_the_runtime_is_no_folder_of_the_user():
    home, found = Path.home(), sandbox.runtime()
    assert all(path.exists() for path in found)
    assert not any(home == path or home.is_relative_to(path) for path in found)
    assert not any(path in (Path("/"), Path("/etc"), Path("/proc"), Path("/tmp")) for path in found)


def test_the_runtime_is_of_modules_whose_files_exist(monkeypatch, tmp_path):
    for number, file in enumerate(["_ops.py", str(tmp_path / "gone.py"), str(tmp_path / "own.py")]):
        module = types.ModuleType(f"module{number}")
        module.__file__ = file
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "own.py").touch()
    found = list(sandbox._imported(()))
    assert str((tmp_path / "own.py").resolve()) in found
    assert all(map(os.path.exists, found))


# -------------------------------------------------------------------------------- other processes


@pytest.fixture
def bystander():
    """Another process of the same user."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@forked
def test_other_processes_are_out_of_reach(level, room, bystander):
    pid = bystander.pid
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *arguments):
        if function(*arguments) < 0:
            raise OSError(ctypes.get_errno(), "refused")

    said = confined(
        level,
        policy_of(room),
        lambda: [
            attempt(act)
            for act in (
                lambda: os.kill(pid, signal.SIGKILL),
                lambda: os.killpg(os.getpgid(0), signal.SIGTERM) if level == "filters" else nope(),
                lambda: os.kill(PARENT, signal.SIGTERM),
                lambda: os.kill(-1, signal.SIGTERM) if level == "filters" else nope(),
                lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)),
                lambda: os.sched_setaffinity(pid, {0}),
                lambda: call(libc.ptrace, 16, pid, 0, 0),
                lambda: call(libc.process_vm_readv, pid, None, 0, None, 0, 0),
                lambda: call(libc.prctl, 1, 0, 0, 0, 0),
            )
        ],
    ).said
    assert set(said) <= {"PermissionError", "ProcessLookupError"}
    assert bystander.poll() is None


def nope():
    raise ProcessLookupError


@forked
def test_no_process_and_no_program_can_be_started(level, room):
    assert refused(
        level,
        policy_of(room),
        os.fork,
        lambda: os.execv("/bin/true", ["true"]),
        lambda: subprocess.run(["/bin/true"], check=True),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
    )


@forked
def test_threads_can_be_started(level, room):
    def count():
        found = []
        threads = [threading.Thread(target=found.append, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(found)

    assert confined(level, policy_of(room), count).said == [0, 1, 2, 3]


@forked
def test_a_process_with_threads_is_not_confined_by_halves(level, room):
    def start():
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    ended = confined(level, policy_of(room), bool, before=start)
    assert "2 threads" in str(ended.said)


@forked
def test_privileges_are_gone(level, room):
    libc = ctypes.CDLL(None, use_errno=True)

    def calls():
        flags = 0x10000000 | 0x00020000  # a user and a mount namespace
        names = {"unshare": (flags,), "chroot": (b"/",), "mount": (b"", b"/", b"", 0, None)}
        return {name: getattr(libc, name)(*words) for name, words in names.items()}

    assert confined(level, policy_of(room), calls).said == {
        "unshare": -1,
        "chroot": -1,
        "mount": -1,
    }
    acts = (lambda: os.setuid(1), lambda: os.setgroups([0]))  # in a namespace, there is no user 1
    said = confined(level, policy_of(room), lambda: [attempt(act) for act in acts]).said
    assert set(said) <= {"PermissionError", "OSError"}


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("level", [Level.LIMITS, *FORKED])
def test_limits(level, room):
    policy = policy_of(room, mem_bytes=64 << 20, file_bytes=1 << 20, open_files=40)
    scratch = room / "scratch"

    def fill():
        return len([(scratch / f"{n}").open("w") for n in range(100)])

    said = confined(
        level,
        policy,
        lambda: [
            attempt(lambda: len(bytearray(256 << 20))),
            attempt(lambda: len(bytearray(16 << 20))),
            attempt(lambda: (scratch / "big").write_bytes(bytes(2 << 20))),
            attempt(fill),
            resource.getrlimit(resource.RLIMIT_CORE)[1],
        ],
    ).said
    assert said == ["MemoryError", 16 << 20, "OSError", "OSError", 0]


@pytest.mark.parametrize("level", [Level.LIMITS, *FORKED])
def test_processor_time_ends_a_run(level, room):
    def spin():
        while True:
            pass

    ended = confined(level, policy_of(room, cpu_s=0.2), spin)
    assert ended.signal == signal.SIGXCPU
    assert ended.usage.ru_utime + ended.usage.ru_stime > 0.2


@forked
def test_files_in_memory_are_refused(level, room):
    assert refused(level, policy_of(room), lambda: os.memfd_create("bomb"))


# --------------------------------------------------------------------------------- how a run ends


@forked
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV])
def test_signals_are_passed_on(level, room, number):
    def die():
        faulthandler.disable()  # it would print where
        os.kill(os.getpid(), number)

    assert confined(level, policy_of(room), die).signal == number


@forked
def test_a_crash_is_passed_on(level, room):
    def crash():
        faulthandler.disable()
        ctypes.string_at(0)

    assert confined(level, policy_of(room), crash).signal == signal.SIGSEGV


@forked
def test_an_exit_code_is_passed_on(level, room):
    ended = confined(level, policy_of(room), lambda: os._exit(7))
    assert os.waitstatus_to_exitcode(ended.status) == 7


@forked
def test_time_and_memory_are_the_runs(level, room):
    def work():
        held = bytearray(80 << 20)
        while time.process_time() < 0.2:
            pass
        return len(held)

    usage = confined(level, policy_of(room), work).usage
    assert usage.ru_utime + usage.ru_stime >= 0.2
    assert usage.ru_maxrss > 80 << 10


def gone(pipe: int, seconds: float = 5.0) -> bool:
    """Whether everybody who held the other end of a pipe is gone soon."""
    ready, _, _ = select.select([pipe], [], [], seconds)
    return bool(ready) and os.read(pipe, 1) == b""


@forked
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_process_that_was_forked(level, room, number):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        sandbox.confine(policy_of(room), level)
        os.write(writing, b"!")
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert gone(reading)
    assert os.WIFSIGNALED(status)
    os.close(reading)


@forked
def test_nothing_outlives_the_parent(level, room):
    """As the harness has it: the run asks to die with its parent, and cannot take that back."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            sandbox.confine(policy_of(room), level)
            os.write(writing, b"!")
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(reading)
    os.close(reading)


@apart
def test_orphans_end_with_the_run(level, room):
    reading, writing = os.pipe()

    def leave_behind():
        os.setsid() if os.getpid() != os.getsid(0) else None
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(writing, b"!")
                time.sleep(60)
            os._exit(0)
        return os.wait()[1]

    pid = os.fork()
    if pid == 0:
        os.close(reading)
        sandbox.confine(policy_of(room, processes=4), level)
        os._exit(leave_behind())
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert gone(reading, 0.0), "all are gone when the run is"
    os.close(reading)


@forked
def test_groups_cannot_be_left_where_nothing_else_would_find_them(level, room):
    def leave():
        pid = os.fork()
        if pid == 0:
            os._exit({"PermissionError": 1, None: 2}[attempt(lambda: os.setsid() and None)])
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    said = confined(level, policy_of(room, processes=2), leave).said
    assert said == (1 if level is Level.FILTERS else 2)


@apart
@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.slow
def test_a_fork_bomb_is_bounded(level, uid):
    if os.getuid():
        uid = os.getuid()
    if uid == 0 and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 14):
        pytest.skip("before Linux 6.14, root's processes cannot be counted without a cgroup")

    def bomb():
        made = 0
        while made < 3_000:
            try:
                if os.fork() == 0:
                    time.sleep(600)  # it is killed long before
                    os._exit(0)
            except (BlockingIOError, OSError):
                return made
            made += 1
        return made

    ended = confined(level, Policy(processes=10), bomb, before=lambda: become(uid))
    assert 10 <= int(str(ended.said)) <= 600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@forked
def test_a_user_without_privileges_is_confined_too(level, room):
    room.chmod(0o777)
    (room / "scratch").chmod(0o777)

    def look():
        return [
            attempt(socket.socket),
            attempt(os.fork),
            attempt(lambda: Path("/etc/passwd").read_text()),
            attempt(lambda: Path("/usr/lib/os-release").exists()),
            os.getuid(),
        ]

    said = confined(level, Policy(), look, before=lambda: become(NOBODY)).said
    assert said == [*["PermissionError"] * 3, True, NOBODY]


@forked
def test_torch_computes_the_same_bits(level, room):
    code = f"""
import os, torch
from pathlib import Path
from society.experiments import sandbox
torch.set_num_threads(1)
def bits():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(64, 64, generator=g, requires_grad=True)
    loss = (torch.randn(32, 64, generator=g) @ w).relu().logsumexp(1).sum()
    loss.backward()
    return w.grad.double().sum().item().hex()
print(bits(), flush=True)
if os.fork() == 0:
    policy = sandbox.Policy(write=(Path({str(room / "scratch")!r}),), mem_bytes=1 << 30)
    sandbox.confine(policy, sandbox.Level({str(level)!r}))
    torch.save(torch.ones(3), {str(room / "scratch" / "x")!r})
    print(bits(), flush=True)
    os._exit(0)
os.wait()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    first, second = done.stdout.split()
    assert (first, done.stderr) == (second, "")


# ---------------------------------------------------------------------------------------- commands


def run(
    argv: list[str], policy: Policy, level: Level, cwd: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        sandbox.wrap(argv, policy, level),
        cwd=cwd, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip


PROBE = """
import os, socket, subprocess, sys
from pathlib import Path
def attempt(act):
    try:
        act()
        return "done"
    except OSError as error:
        return type(error).__name__
room = Path(sys.argv[1])
print(*map(attempt, [
    lambda: Path("out").write_text("1"),
    lambda: (room / "data" / "train").read_text(),
    lambda: subprocess.run(["/bin/true"], check=True),
    lambda: (room / "secret").read_text(),
    lambda: Path("/etc/passwd").read_text(),
    lambda: (room / "data" / "train").write_text("x"),
    lambda: (room / "data" / "train").chmod(0),
    lambda: (Path("/tmp") / "x").write_text("x"),
    socket.socket,
]))
"""


@commands
def test_commands(level, room):
    policy = policy_of(room, processes=4)
    done = run([sys.executable, "-c", PROBE, str(room)], policy, level, room / "scratch")
    words = done.stdout.split()
    assert words[:3] == ["done"] * 3, done.stderr
    assert set(words[3:]) <= {"PermissionError", "FileNotFoundError", "OSError"}
    assert (room / "data" / "train").read_text() == "the text"


@commands
def test_a_command_without_processes_of_its_own(level, room):
    done = run(["sh", "-c", "echo here; /bin/true"], policy_of(room), level, room / "scratch")
    assert done.stdout == "here\n" or "fork" in done.stderr.lower()
    assert done.returncode in (0, 2, 254)  # a shell may replace itself by its last command
    done = run(["sh", "-c", "/bin/true; echo here"], policy_of(room), level, room / "scratch")
    assert done.stdout == ""


@commands
def test_how_a_command_ends(level, room):
    policy, scratch = policy_of(room, processes=4), room / "scratch"
    assert run(["sh", "-c", "exit 7"], policy, level, scratch).returncode == 7
    code = run(["sh", "-c", "kill -ABRT $$"], policy, level, scratch).returncode
    assert code == (128 + signal.SIGABRT if level is Level.BUBBLEWRAP else -signal.SIGABRT)
    assert run(["no-such-program"], policy, level, scratch).returncode == sandbox.NO_COMMAND


@commands
def test_a_hidden_folder_is_hidden_from_commands(level, room):
    policy = Policy(read=(room,), write=(room / "scratch",), hidden=(room / "data",), processes=2)
    done = run(["cat", str(room / "secret")], policy, level, room / "scratch")
    assert done.stdout == SECRET
    done = run(["cat", str(room / "data" / "train")], policy, level, room / "scratch")
    assert (done.stdout, done.returncode) == ("", 1)


@commands
def test_commands_have_limits(level, room):
    policy = policy_of(room, processes=2, mem_bytes=256 << 20, file_bytes=1 << 20)
    hungry = "len(bytearray(1 << 30))"
    done = run([sys.executable, "-c", hungry], policy, level, room / "scratch")
    assert "MemoryError" in done.stderr
    done = run(
        ["dd", "if=/dev/zero", "of=big", "bs=1M", "count=3"], policy, level, room / "scratch"
    )
    assert done.returncode != 0
    assert (room / "scratch" / "big").stat().st_size == 1 << 20


@pytest.mark.parametrize("level", COMMANDS[1:])
def test_a_command_ends_with_what_it_started(level, room):
    script = "(setsid sleep 60 &) ; echo started; sleep 60"
    policy = policy_of(room, processes=8)
    with subprocess.Popen(
        sandbox.wrap(["sh", "-c", script], policy, level),
        stdout=subprocess.PIPE, cwd=room / "scratch",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.terminate()
        assert gone(process.stdout.fileno())


# --------------------------------------------------------------------------------------- probing


def test_the_best_level_is_one_that_works():
    for best in (sandbox.best(), sandbox.best_for_commands()):
        assert OFFERED[best].works
    assert sandbox.best().rank <= Level.NAMESPACES.rank


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert not sandbox._try(Level.FILTERS).works
    assert sandbox._try(Level.FILTERS).todo
    monkeypatch.undo()
    monkeypatch.setattr(seccomp, "machine", lambda: None)
    assert "Arm" in sandbox._try(Level.FILTERS).todo
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert sandbox._try(Level.BUBBLEWRAP).todo == "install bubblewrap"


def test_a_probe_that_fails_offers_limits(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    found = sandbox._tried(Level.FILTERS)
    assert not found[0].works
    assert sandbox._highest(found) is Level.LIMITS


def test_filters_are_small_programs():
    rules = seccomp.Rules(itself=1)
    assert len(seccomp.program(rules)) // 8 < 1_000
    assert all(name in seccomp.CALLS for name in seccomp._answers(rules))
