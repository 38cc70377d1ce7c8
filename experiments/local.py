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
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from society import logs
from society.errors import ExecutorError
from society.experiments import foreign, patches
from society.experiments.executor import TAIL_CHARS, cost_of
from society.experiments.orders import DISK_BYTES, ROLES, Order, Post, message_of
from society.experiments.placement import place
from society.experiments.processes import HEADER, Message, pack, remove
from society.experiments.sandbox import Level
from society.experiments.task import TrainReport
from society.model.device import ISA_VARIABLES, Card
from society.records import (
    Budget,
    BudgetKind,
    Environment,
    Measurement,
    Outcome,
    Split,
    Trial,
    Variant,
    Work,
)

MODULE = "society.experiments.worker"
START_S = 1_800.0
"""Longest start: the first one prepares the data."""
STOP_S = 10.0
"""How long an idle worker may take to leave before it is killed."""
KILL_S = 2.0
"""How long one that is told to stop at once may take."""
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


class _DiedTwice(ExecutorError):
    """A loop died while it worked, was started again, and died again."""


class _Link:
    """One socket to a worker process; messages go back and forth in turns."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        self._socket = link
        self.in_use = False
        """Whether somebody waits for a message; closing it under them would strand them."""

    async def ask(self, message: Message, handles: Sequence[int] = ()) -> Message:
        """Send a request, with descriptors if need be, and wait for its answer. Raises `_Gone`."""
        data = pack(message)
        try:
            if handles:  # they travel with the first bytes
                socket.send_fds(self._socket, [data[:HEADER]], list(handles))
                data = data[HEADER:]
            await asyncio.get_running_loop().sock_sendall(self._socket, data)
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
    loops: dict[Post, _Link] = field(default_factory=dict)
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
        *,
        sandbox: Level | None = None,
        require: Level = Level.FILTERS,
        lint: bool = True,
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        """Set up, start nothing.

        Args:
            task: Name or `module:Class`, as for `load_task`.
            profile: Name or path of the profile.
            slots: Runs at once, at most; by default one per core, or as many as the cards hold.
            device: `cpu`, `cuda` for all visible cards, or one of them, e.g. `cuda:0`.
            code: Folder in which the workers look for modules first; None for what is installed.
            sandbox: How far runs are confined; None for as far as this machine can.
            require: The least for variants that change code; below it they are rejected.
            lint: Whether their code is looked through first. Without it, the sandbox and the
                task's guard are all there is.
            disk_bytes: What a run of such a variant may write.
        """
        self.task, self.profile, self.device = task, profile, device
        self._code = code
        self._terms: dict[str, Any] = {
            "level": str(sandbox or ""),
            "require": str(require),
            "lint": lint,
            "disk_bytes": disk_bytes,
        }
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
                for post in ROLES:
                    slot.loops[post] = await self._fork(post, slot.device)
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

    async def trial(self, variant: Variant) -> Trial:
        """Try a variant's code change for a few steps."""
        if variant.patch is None:
            return Trial(same=True)
        if reason := patches.reason_of(variant.patch):
            return Trial(foreign.spoken(reason))
        work = Work("trial", variant, 0, Split.VALIDATION, Budget(BudgetKind.STEPS, 1))
        async with self._turn:
            if self._stopped or self._link is None:
                raise ExecutorError("The executor is not running.")
            with self._occupied() as slot, self._folder() as folder:
                try:
                    found = await self._ask(slot, Post.TRAINER, _request("try code", work, folder))
                except _DiedTwice:
                    return Trial("The process that tried it was killed twice.")
                return Trial(found["problem"], found["same"], tuple(found.get("bits", ())))

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
            self._zygote.terminate()  # it takes along what a run may have hidden
            try:
                self._zygote.wait(KILL_S)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
        if self._scratch is not None:
            remove(self._scratch)

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
        with self._folder() as folder:
            endings = await self._endings(slot, work, folder)
            last = endings[-1]["message"]
            log = _tail(folder, last.get("error", ""))
        report = _report(endings[0]["message"])
        on_device = 0.0 if self.device == "cpu" else sum(ending["wall_s"] for ending in endings)
        cost = cost_of(
            report,
            wall_s=time.monotonic() - began,
            cpu_s=sum(ending["cpu_s"] for ending in endings),
            gpu_s=on_device,
            mem_bytes=endings[0]["mem_bytes"],
        )
        outcome = Outcome(last["outcome"])
        return Measurement(outcome, last.get("score"), cost, log, self._data_hash, report.curve)

    async def _endings(self, slot: _Slot, work: Work, folder: Path) -> list[Message]:
        """How the processes of a run ended: first the training, last what decides."""
        foreign_code = work.variant.patch is not None
        request = _request("train code" if foreign_code else "train", work, folder)
        try:
            train = await self._ask(slot, Post.TRAINER, request)
            if train["message"]["outcome"] != Outcome.COMPLETED:
                return [train]
            if train.get("judged"):
                return [train, *await self._judge(slot, work, folder, train["sealed"])]
            request = _request("score", work, folder, sealed=train.get("sealed", ""))
            return [train, await self._ask(slot, Post.SCORER, request)]
        except _DiedTwice as error:
            if not foreign_code:
                raise
            message = foreign.rejected(f"{error} It is taken to be the work of this code.")
            return [{"message": message, "cpu_s": 0.0, "wall_s": 0.0, "mem_bytes": 0}]

    async def _judge(
        self, slot: _Slot, work: Work, folder: Path, sealed: str
    ) -> tuple[Message, ...]:
        """Have the scorer question two processes that hold the model."""
        posts = (Post.SCORER, Post.MODEL, Post.PROBE)
        requests = [
            _request("judge" if post is Post.SCORER else "model", work, folder, sealed, post)
            for post in posts
        ]
        for _ in range(2):
            for post in posts:
                if post not in slot.loops:
                    slot.loops[post] = await self._fork(post, slot.device)
            try:
                judged, *models = await self._questioned(
                    slot, dict(zip(posts, requests, strict=True))
                )
            except _Gone:
                for post in posts:  # they were in the middle of a conversation
                    if post in slot.loops:
                        self._drop(slot.loops.pop(post))
                continue
            judged["message"] = _verdict(judged["message"], models)
            return (*models, judged)
        raise self._died_twice(Post.SCORER)

    async def _questioned(self, slot: _Slot, requests: Mapping[Post, Message]) -> list[Message]:
        """What the scorer says, and the process or processes that it questioned.

        The second one is started when the first one is gone: while both are alive they could speak
        to each other, by lengths of files, locks, or the load of the machine.
        """
        with contextlib.ExitStack() as open_ends:
            ends = [open_ends.enter_context(end) for _ in range(2) for end in socket.socketpair()]
            ours, theirs = ends[::2], ends[1::2]
            asked = [
                self._begin(slot, Post.SCORER, requests, ours),
                self._begin(slot, Post.MODEL, requests, theirs[:1]),
            ]
            try:
                await asyncio.sleep(0)  # each sends what it was given
                for end in (*ours, theirs[0]):
                    end.close()
                await asked[1]
                if not asked[0].done():
                    asked.append(self._begin(slot, Post.PROBE, requests, theirs[1:]))
                    await asyncio.sleep(0)
                theirs[1].close()
                return await asyncio.gather(*asked)
            except (_Gone, asyncio.CancelledError):
                await _settled(asked)
                raise

    def _begin(
        self,
        slot: _Slot,
        post: Post,
        requests: Mapping[Post, Message],
        ends: Sequence[socket.socket],
    ) -> asyncio.Task[Message]:
        handles = [end.fileno() for end in ends]
        return asyncio.create_task(self._ask_once(slot, post, requests[post], handles))

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """A folder for one run; `worker.py` says what is in it."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch))
        try:
            (folder / "model").mkdir()
            yield folder
        finally:
            remove(folder)

    async def _ask(self, slot: _Slot, post: Post, request: Message) -> Message:
        """Have a loop do its part of the work; restart it once if it dies."""
        for _ in range(2):
            if post not in slot.loops:
                slot.loops[post] = await self._fork(post, slot.device)
            with contextlib.suppress(_Gone):
                return await self._ask_once(slot, post, request)
        raise self._died_twice(post)

    async def _ask_once(
        self, slot: _Slot, post: Post, request: Message, handles: Sequence[int] = ()
    ) -> Message:
        """Have a loop do its part of the work. Raises `_Gone`."""
        try:
            return await slot.loops[post].ask(request, handles)
        except _Gone:
            self._drop(slot.loops.pop(post))
            raise
        except asyncio.CancelledError:
            self._drop(slot.loops.pop(post))  # the loop sees it and stops the run
            raise

    def _died_twice(self, post: Post) -> ExecutorError:
        """The error for a loop that does not survive a piece of work."""
        problem = f"The {post} process died twice on one piece of work."
        failed = self._failed(problem)
        return failed if self._stopped else _DiedTwice(str(failed))

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
        order = Order(
            self.task,
            self.profile,
            self.device,
            os.getpid(),
            str(self._scratch),
            link,
            **self._terms,
        )
        return subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE, json.dumps(asdict(order))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[link],
            start_new_session=True,
            env=_environ(self._code),
        )

    async def _fork(self, post: Post, device: str) -> _Link:
        """Have the zygote fork a new loop, and wait until it is ready."""
        async with self._forking:
            if self._stopped or self._link is None:
                raise ExecutorError("The executor was stopped.")
            ours, theirs = socket.socketpair()
            loop = self._new_link(ours)
            try:
                with theirs:
                    self._link.pass_on(f"{post} {device}", theirs)
                await loop.receive()
            except _Gone:
                self._drop(loop)
                raise self._failed(f"The {post} process does not start.") from None
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


def _request(
    kind: str, work: Work, folder: Path, sealed: str = "", post: Post = Post.TRAINER
) -> Message:
    """What a loop is asked."""
    values = {"kind": kind, "folder": str(folder), "sealed": sealed, "post": post}
    return values | {"work": message_of(work)}


async def _settled(asked: Sequence[asyncio.Future[Message]]) -> None:
    """Give up what is still being waited for."""
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


def _verdict(judged: Message, models: Sequence[Message]) -> Message:
    """The outcome of a judged run: when a model's process failed, that is why."""
    if judged["outcome"] == Outcome.COMPLETED:
        slowest_s = max((model["cpu_s"] for model in models), default=0.0)
        problem = foreign.answered(slowest_s, judged["answering_s"])
        return foreign.rejected(problem) if problem else judged
    messages = [model["message"] for model in models]
    failed = [message for message in messages if message["outcome"] != Outcome.COMPLETED]
    if not failed or judged["outcome"] not in (Outcome.REJECTED, Outcome.CRASHED):
        return judged
    why = f"The process that held the model failed: {failed[0]['error']}"
    if judged["outcome"] == Outcome.REJECTED:
        why = f"{judged['error'].removeprefix('rejected: ')}. {why}"
    return foreign.rejected(why)


def _report(message: Message) -> TrainReport:
    """What the training said about itself; empty if it did not get that far."""
    values = dict(message.get("report", {}))
    return TrainReport(**values | {"curve": tuple(values.get("curve", ()))})


def _tail(folder: Path, error: str) -> str:
    """The end of what a run printed, and its error."""
    printed = "".join(foreign.clean(_read_tail(folder / f"{post}.log")) for post in Post).rstrip()
    return "\n".join(part for part in (printed, error) if part)[-TAIL_CHARS:]


def _read_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4 * TAIL_CHARS))
            return file.read().decode(errors="replace")[-TAIL_CHARS:]
    except FileNotFoundError:
        return ""
