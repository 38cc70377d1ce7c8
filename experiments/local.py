"""`LocalExecutor`: warm workers on this machine, one forked process per run.

Importing torch costs a fifth of a five-second run, a fork three thousandths. One process imports
the task once; each slot has a trainer loop and a scorer loop forked from it, and they fork a
process per run (`worker.py` draws the tree). Nothing is shared between runs but the code and the
data of the role, so the bits do not depend on the slot or on what ran before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, cast

from society import logs
from society.errors import ExecutorError
from society.experiments.executor import TAIL_CHARS, cost_of
from society.experiments.placement import place
from society.experiments.task import Role, TrainReport
from society.experiments.worker import HEADER, Message, Order, pack
from society.model.device import ISA_VARIABLES, Card
from society.records import Environment, Measurement, Outcome, Work

MODULE = "society.experiments.worker"
START_S = 1_800.0
"""Longest start: the first one prepares the data."""
STOP_S = 10.0
"""How long an idle worker may take to leave before it is killed."""
KEPT = (
    "PATH", "HOME", "USER", "TMPDIR", "TZ", "SYSTEMROOT", "VIRTUAL_ENV", "SOCIETY_CACHE", "CC",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", *ISA_VARIABLES,
)  # fmt: skip
KEPT_PREFIXES = (
    "LANG", "LC_", "PYTHON", "LD_", "DYLD_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "COVERAGE_",
    "TORCHINDUCTOR_", "TRITON_",
)  # fmt: skip
"""What workers see of the environment: no key of any service is among it."""
ONE_THREAD = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
}


class _Gone(Exception):
    """The process at the other end of a link ended."""


class _Link:
    """One socket to a worker process; messages go back and forth in turns."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self._socket = link
        self.in_use = False
        """Whether somebody waits for a message; closing it under them would strand them."""

    async def ask(self, message: Message) -> Message:
        """Send a request and wait for its answer. Raises `_Gone`."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, pack(message))
        except OSError as error:
            raise _Gone from error
        return await self.receive()

    async def receive(self) -> Message:
        """The next message. Raises `_Gone`."""
        self.in_use = True
        try:
            header = await self._exactly(HEADER)
            body = await self._exactly(int.from_bytes(header, "big"))
        finally:
            self.in_use = False
        return cast(Message, json.loads(body))

    async def _exactly(self, size: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < size:
            try:
                chunk = await loop.sock_recv(self._socket, size - len(data))
            except OSError as error:
                raise _Gone from error
            if not chunk:
                raise _Gone
            data += chunk
        return data

    def pass_on(self, word: str, other: socket.socket) -> None:
        """Hand another socket over. Raises `_Gone`."""
        try:
            socket.send_fds(self._socket, [word.encode()], [other.fileno()])
        except OSError as error:
            raise _Gone from error

    def hang_up(self) -> None:
        """End the conversation; whoever waits for an answer gets `_Gone`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and free the socket; nobody may be waiting on it."""
        self.hang_up()
        self._socket.close()


@dataclass(slots=True)
class _Slot:
    """A place for one run at a time."""

    device: str
    """Where its runs are made: `cpu`, or one card."""
    loops: dict[Role, _Link] = field(default_factory=dict)
    since: float | None = None
    """When its present run began (monotonic); None while it is free."""


class LocalExecutor:
    """Runs a task on this machine; see `Executor` for the contract.

    A slot whose worker died is restarted once per request; if it dies again, `run` raises
    `ExecutorError` with the end of the worker's log. Workers see no environment variable that could
    hold a secret, ignore Ctrl-C (the owner decides) and never outlive the owner.

    On Linux the workers end with the thread that called `start`: call it from one that lasts.
    """

    def __init__(
        self,
        task: str,
        profile: str,
        slots: int | None = None,
        device: str = "cpu",
        code: Path | None = None,
    ) -> None:
        """Set up, start nothing.

        Args:
            task: Name or `module:Class`, as for `load_task`.
            profile: Name or path of the profile.
            slots: Runs at once, at most; by default one per core, or as many as the cards hold.
            device: `cpu`, `cuda` for all visible cards, or one of them, e.g. `cuda:0`.
            code: Folder in which the workers look for modules first; None for what is installed.
        """
        self.task, self.profile, self.device = task, profile, device
        self._code = code
        self._asked = slots
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self._arrange([device] * (slots or (cores if device == "cpu" else 1)))
        self._forking = asyncio.Lock()
        self._busy_s = 0.0
        self._stopped = False
        self._zygote: subprocess.Popen[bytes] | None = None
        self._link: _Link | None = None
        self._links: set[_Link] = set()
        self._scratch: Path | None = None
        self._environment: Environment | None = None
        self._data_hash = ""

    def _arrange(self, devices: Sequence[str]) -> None:
        """Make one slot per entry, on that device; nothing may be running."""
        self.slots = len(devices)
        self._turn = asyncio.Semaphore(self.slots)
        self._places = [_Slot(device) for device in devices]
        self._free = list(reversed(self._places))

    @property
    def environment(self) -> Environment:
        """What the bits of the runs depend on."""
        if self._environment is None:
            raise ExecutorError("The executor was not started.")
        return self._environment

    @property
    def data_hash(self) -> str:
        """sha256 of the task's data."""
        return self._data_hash

    @property
    def busy_s(self) -> float:
        """Slot-seconds spent on runs so far, those in progress included."""
        now = time.monotonic()
        return self._busy_s + sum(now - s.since for s in self._places if s.since is not None)

    async def start(self) -> None:
        """Start the workers and prepare the data."""
        if self._zygote is not None:
            raise ExecutorError("The executor was started before; make a new one.")
        try:
            hello = await self._hello()
            self._environment = Environment(**hello["environment"])
            self._data_hash = hello["data_hash"]
            self._occupy_cards(hello)
            for slot in self._places:
                for role in Role:
                    slot.loops[role] = await self._fork(role, slot.device)
        except BaseException:
            self.kill()
            raise

    def _occupy_cards(self, hello: Message) -> None:
        """Spread the slots over the accelerators, now that they are known."""
        found = [Card(**card) for card in hello["cards"]]
        if not found:
            return
        plan = place(
            found, need_bytes=hello["need_bytes"], seconds=hello["seconds"], asked=self._asked
        )
        self._arrange(plan.devices)
        logs.get("executor").warning("slots", slots=self.slots, why=plan.reason)

    async def run(self, work: Work) -> Measurement:
        """Execute one piece of work when a slot is free."""
        async with self._turn:
            if self._stopped or self._link is None:
                raise ExecutorError("The executor is not running.")
            with self._occupied() as slot:
                return await self._measure(slot, work)

    async def close(self) -> None:
        """Let the accepted work finish, then stop the workers."""
        for _ in range(self.slots):
            await self._turn.acquire()
        self._stopped = True
        for _ in range(self.slots):
            self._turn.release()
        self._hang_up()
        await self._exit()
        self.kill()

    def kill(self) -> None:
        """Stop everything now."""
        self._stopped = True
        self._hang_up()
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[_Slot]:
        slot = self._free.pop()
        slot.since = time.monotonic()
        try:
            yield slot
        finally:
            self._busy_s += time.monotonic() - slot.since
            slot.since = None
            self._free.append(slot)

    async def _measure(self, slot: _Slot, work: Work) -> Measurement:
        """Train in one process, score in another, put the parts together."""
        began = time.monotonic()
        with self._folder(work) as folder:
            train = await self._ask(slot, Role.TRAINER, work, folder)
            endings, last = [train], train["message"]
            if last["outcome"] == Outcome.COMPLETED:
                endings.append(await self._ask(slot, Role.SCORER, work, folder))
                last = endings[-1]["message"]
            log = _tail(folder, last.get("error", ""))
        report = _report(train["message"])
        on_device = 0.0 if self.device == "cpu" else sum(ending["wall_s"] for ending in endings)
        cost = cost_of(
            report,
            wall_s=time.monotonic() - began,
            cpu_s=sum(ending["cpu_s"] for ending in endings),
            gpu_s=on_device,
            mem_bytes=train["mem_bytes"],
        )
        outcome = Outcome(last["outcome"])
        return Measurement(outcome, last.get("score"), cost, log, self._data_hash, report.curve)

    @contextlib.contextmanager
    def _folder(self, work: Work) -> Iterator[Path]:
        """A folder for one run: the model in `model/`, a log per role beside it."""
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as name:
            (Path(name) / "model").mkdir()
            yield Path(name)

    async def _ask(self, slot: _Slot, role: Role, work: Work, folder: Path) -> Message:
        """Have a loop do its part of the work; restart it once if it dies."""
        request = {
            "work": _plain(work),
            "role": role,
            "scratch": str(folder / "model"),
            "log": str(folder / f"{role}.log"),
        }
        for _ in range(2):
            if role not in slot.loops:
                slot.loops[role] = await self._fork(role, slot.device)
            try:
                return await slot.loops[role].ask(request)
            except _Gone:
                self._drop(slot.loops.pop(role))
            except asyncio.CancelledError:
                self._drop(slot.loops.pop(role))  # the loop sees it and stops the run
                raise
        raise self._failed(f"The {role} process died twice on one piece of work.")

    async def _hello(self) -> Message:
        """Start the zygote and hear that it is ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._link = self._new_link(ours)
            self._scratch = Path(tempfile.mkdtemp(prefix="society-"))
            with self._log.open("wb") as log:
                self._zygote = self._spawn(theirs.fileno(), log)
        try:
            hello = await asyncio.wait_for(self._link.receive(), START_S)
        except _Gone:
            await self._exit()  # its log is complete only then
            raise self._failed("The worker process ended while it started.") from None
        except TimeoutError:
            raise self._failed(f"The worker did not start within {START_S:g} s.") from None
        if "error" in hello:
            raise ExecutorError(f"The worker cannot start: {hello['error']}")
        return hello

    def _spawn(self, link: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        order = Order(self.task, self.profile, self.device, os.getpid(), str(self._scratch), link)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE, json.dumps(asdict(order))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[link],
            start_new_session=True,
            env=_environ(self._code),
        )

    async def _fork(self, role: Role, device: str) -> _Link:
        """Have the zygote fork a new loop, and wait until it is ready."""
        async with self._forking:
            if self._stopped or self._link is None:
                raise ExecutorError("The executor was stopped.")
            ours, theirs = socket.socketpair()
            loop = self._new_link(ours)
            try:
                with theirs:
                    self._link.pass_on(f"{role} {device}", theirs)
                await loop.receive()
            except _Gone:
                self._drop(loop)
                raise self._failed(f"The {role} process does not start.") from None
            except asyncio.CancelledError:
                self._drop(loop)
                raise
            return loop

    async def _exit(self) -> None:
        """Give the zygote a moment to leave by itself."""
        if self._zygote is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._zygote.wait, STOP_S)

    def _new_link(self, end: socket.socket) -> _Link:
        link = _Link(end)
        self._links.add(link)
        return link

    def _drop(self, link: _Link) -> None:
        self._links.discard(link)
        link.close()

    def _hang_up(self) -> None:
        """End all conversations; links in use are closed by who uses them."""
        for link in list(self._links):
            link.hang_up()
            if not link.in_use:
                self._drop(link)

    @property
    def _log(self) -> Path:
        """What the worker processes print outside of runs."""
        return (self._scratch or Path()) / "worker.log"

    def _failed(self, problem: str) -> ExecutorError:
        """The error to raise when workers die."""
        if self._stopped:
            return ExecutorError("The executor was stopped.")
        tail = _read_tail(self._log)
        return ExecutorError(f"{problem} End of the worker's log:\n{tail}" if tail else problem)


def _environ(code: Path | None) -> dict[str, str]:
    """The workers' environment: the same imports, one thread, no secrets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name.startswith(KEPT_PREFIXES)
    }
    first = [] if code is None else [str(code)]
    path = os.pathsep.join([*first, *(entry or os.getcwd() for entry in sys.path)])
    return kept | ONE_THREAD | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}


def _plain(work: Work) -> Message:
    """Work as JSON values."""
    variant = work.variant
    return {
        "run_id": work.run_id,
        "variant": {
            "task": variant.task,
            "overrides": dict(variant.overrides),
            "patch": variant.patch,
        },
        "seed": work.seed,
        "data_seed": work.data_seed,
        "split": work.split,
        "budget": {"kind": work.budget.kind, "amount": work.budget.amount},
    }


def _report(message: Message) -> TrainReport:
    """What the training said about itself; empty if it did not get that far."""
    values = dict(message.get("report", {}))
    return TrainReport(**values | {"curve": tuple(values.get("curve", ()))})


def _tail(folder: Path, error: str) -> str:
    """The end of what a run printed, and its error."""
    printed = "".join(_read_tail(folder / f"{role}.log") for role in Role).rstrip()
    return "\n".join(part for part in (printed, error) if part)[-TAIL_CHARS:]


def _read_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4 * TAIL_CHARS))
            return file.read().decode(errors="replace")[-TAIL_CHARS:]
    except FileNotFoundError:
        return ""
