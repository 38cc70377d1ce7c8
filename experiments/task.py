"""The seam between the society and what it improves: a task says how one run is made.

A task is loaded by name (`pretrain`, an entry point of the group `society.tasks`) or as
`module:Class`, together with a profile: a YAML file that fixes the budget, the limits and the
baseline. Everything that a run may depend on is in the recipe, the seed, the budget and the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import import_module, resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from society.errors import UnknownName, UsageError
from society.knobs import Scalar, Span
from society.records import Budget, Split

if TYPE_CHECKING:
    import numpy as np

GROUP = "society.tasks"

Model = TypeVar("Model", bound=BaseModel)


class Direction(StrEnum):
    """Which way of the metric is better."""

    MINIMISE = "minimise"
    MAXIMISE = "maximise"

    @property
    def sign(self) -> int:
        """-1 if lower scores are better, +1 if higher ones are."""
        return -1 if self is Direction.MINIMISE else 1

    def improvement(self, reference: float, candidate: float) -> float:
        """How much better `candidate` is, in the metric's unit; negative when it is worse."""
        gain = reference - candidate
        return gain if self is Direction.MINIMISE else -gain


class Role(StrEnum):
    """What a worker process is for; it holds the data of its role only."""

    TRAINER = "trainer"
    SCORER = "scorer"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use before it is stopped; training and scoring each."""

    timeout_s: float
    """Wall-clock seconds, then the run is killed and recorded as `timed_out`."""
    mem_bytes: int
    """Memory above that of the idle worker; 0 for no limit.

    On an accelerator: the card's own memory. It says how many runs share a card, see `placement`,
    and no run gets more.
    """


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training says about itself. It holds no score: that is measured elsewhere."""

    flops: float = 0.0
    """FLOPs charged against the budget."""
    tokens: int = 0
    """Tokens seen."""
    steps: int = 0
    """Optimiser steps taken."""
    curve: tuple[float, ...] = ()
    """Training loss over time; thinned before it is recorded."""
    train_s: float = 0.0
    """Seconds of the training loop alone."""
    compile_s: float = 0.0
    """Seconds of what no budget pays for: choosing kernels, compiling."""
    mfu: float | None = None
    """Model FLOPs as a share of the device's peak rate, where that is known."""
    device_mem_bytes: int = 0
    """Most memory allocated on an accelerator at once."""
    step_flops: float = 0.0
    """FLOPs that a step of changed code was charged; 0 for what the recipe takes."""


class Diverged(Exception):
    """The training left the finite numbers: an outcome, not an error. Raised by `Task.train`.

    Carries the `report` of what was spent until then.
    """

    def __init__(self, message: str, report: TrainReport | None = None) -> None:
        """Say where it happened, and what was spent by then."""
        self.report = report or TrainReport()
        super().__init__(message)


class Refused(Exception):
    """The task's own guard refuses the run (`Outcome.REJECTED`). Raised by `train` or `score`."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a run of a task may touch beside its scratch folder and the interpreter.

    Runs of a task that has an attribute `access` are confined, and so are those of a `CodeTask`, as
    if it had an empty one. Scoring with the task's own code is not. See `experiments.sandbox`.
    """

    read: tuple[Path, ...] = ()
    """Files and folders that a training may read."""
    hidden: tuple[Path, ...] = ()
    """What it must not read although it lies inside the interpreter's own folders."""
    processes: int = 0
    """Processes that it may start beside its own."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a recipe takes with the task's own code, measured where no other is near."""

    cpu_s: float
    """Processor seconds of a whole training."""
    steps: int
    """Steps that the budget pays for."""
    tokens: int = 0
    """Tokens of these steps."""
    flops: float = 0.0
    """What they are charged, where the budget does not count FLOPs; 0 for unknown."""
    compile_s: float = 0.0
    """Seconds that an accelerator takes to compile, which no budget pays for."""
    step_flops: float = 0.0
    """What one step computes as the task counts it, to compare with changed code; 0 for unknown."""
    charged_flops: float = 0.0
    """What changed code was charged for a step in an earlier run; 0 for unknown."""


class Channel(Protocol):
    """A line between the scorer and one process that holds a candidate's model; arrays only."""

    def send(self, array: np.ndarray) -> None:
        """Send one array."""

    def receive(self, most_bytes: int | None = None) -> np.ndarray | None:
        """The next array; None when the other side has left.

        Args:
            most_bytes: Largest array to take; None for the channel's own bound.

        Raises:
            Refused: what came is no array, is larger than agreed, or took too long.
        """


@runtime_checkable
class CodeTask(Protocol):
    """What a `Task` offers besides when variants may change its code (they carry a `patch`).

    All but `sources` are called in processes of their own:

    - one of ours calls `measure`; the result serves for runs of the same recipe, for some minutes;
    - the training process confines itself, calls `adopt`, and then `train`, all of whose words are
      from then on a stranger's;
    - `sample` is called when a patch is tried, in a process of ours, and in another one after
      `adopt`;
    - a process that never saw an evaluation split confines itself, calls `adopt` and then `serve`;
      there are two of them, which know nothing of each other;
    - the scorer, which loads no foreign code, calls `judge` with a line to each of the two.

    A task with the attribute `confines_itself = True` starts confined commands instead and loads
    nothing of a candidate into these processes. It needs no `measure`, `serve` and `judge`; its
    attribute `level` is set to how far the commands are to be confined.
    """

    def sources(self) -> Mapping[str, str]:
        """File name -> text of every file that a patch may change, as installed."""

    def adopt(self, code: Path, own: Yardstick | None = None) -> None:
        """Use the files in `code`, one for each of `sources`, from now on in this process.

        Before a training it is told what the recipe takes with the task's `own` code.
        """

    def measure(self, recipe: Any, budget: Budget, device: str) -> Yardstick:
        """What this recipe takes with the task's own code."""

    def sample(self, recipe: Any, seed: int, scratch: Path, device: str) -> str:
        """Train a few steps over all of the schedule; names the resulting bits."""

    def serve(self, scratch: Path, recipe: Any, device: str, scorer: Channel) -> None:
        """Answer the scorer's questions with the model in `scratch` until it leaves."""

    def judge(
        self,
        scratch: Path,
        recipe: Any,
        split: Split,
        device: str,
        models: tuple[Channel, Channel],
    ) -> float:
        """The metric of a model that foreign code computes.

        Raises `Refused` if it is no honest model. The score is made with the first channel; the
        second model is asked what the first one must not have known.
        """


class Task(Protocol):
    """What is being improved, and how one run of it is made.

    A task is built as `Class(profile)` with the name of a profile or the path of a YAML file. The
    instance is cheap, imports nothing heavy and touches no file but its profile: the command, every
    agent and every worker each build their own, so nothing may be kept in it but caches.

    Where each method runs (see `society.experiments.local`; `InlineExecutor` runs all of them in
    one process):

    - `warm_up` once in the parent of all workers, before anything is forked: imports only. It must
      start no thread and touch no accelerator, or the forked processes would not be usable.
    - `prepare` once per start, in a short-lived process; it writes what the later ones read from
      the cache folder, and may use threads. Its time is charged to nobody.
    - `preload` once in each long-lived worker, before it forks a process per run. A trainer loads
      the training split and nothing else, a scorer the evaluation splits and nothing else.
    - `train` in a process of its own per run, with a memory limit and a time-out. It sees the
      training split only and leaves the model in `scratch`, an empty folder of this run.
    - `score` in another process, from the files in `scratch` alone. What the training process said
      about itself never reaches the score.

    The same recipe, seed, budget and data give the same score to the last bit in every process of
    one `Environment`, unless the budget counts seconds. `train` raises `Diverged` when the loss is
    not finite; either may raise `Refused`; any other exception is recorded as a crash.
    """

    @property
    def name(self) -> str:
        """Name of the task, e.g. `pretrain`."""

    @property
    def profile(self) -> str:
        """Name of the profile, e.g. `cpu`."""

    @property
    def key(self) -> str:
        """Name and profile, e.g. `pretrain/cpu`: what variants and records are filed under."""

    @property
    def metric(self) -> str:
        """Name of the score, e.g. `val_bpb`."""

    @property
    def unit(self) -> str:
        """Unit of the score, e.g. `BPB`."""

    @property
    def direction(self) -> Direction:
        """Which way of the score is better."""

    @property
    def recipe(self) -> type[BaseModel]:
        """The frozen pydantic model whose fields carry a `Knob`: the search space."""

    @property
    def baseline(self) -> BaseModel:
        """The recipe's defaults with the profile's own changes."""

    @property
    def spans(self) -> Mapping[str, Span]:
        """Knob name -> the values this profile allows, where they are not the knob's own."""

    @property
    def budget(self) -> Budget:
        """What every run of this profile may spend."""

    @property
    def limits(self) -> Limits:
        """When a run is stopped."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions decide the bits, e.g. `("torch",)`."""

    @property
    def code(self) -> tuple[str, ...]:
        """Modules and packages whose source decides the bits, e.g. `("society.model",)`."""

    def warm_up(self) -> None:
        """Import what the runs need and fix the number of threads to one."""

    def prepare(self) -> str:
        """Put the data in place and return the sha256 that identifies it, 64 hex digits."""

    def preload(self, role: Role) -> None:
        """Load the data of this role into memory, so that forked runs find it there."""

    def train(
        self,
        recipe: Any,
        seed: int,
        budget: Budget,
        scratch: Path,
        device: str,
        *,
        data_seed: int | None = None,
    ) -> TrainReport:
        """Train `recipe` (an instance of `self.recipe`) and save the model in `scratch`.

        The initial parameters come from `seed`, and so does the order of the data unless
        `data_seed` is given, which is passed for the noise study only. The two components of the
        noise are measured by holding one of them.
        """

    def score(self, scratch: Path, recipe: Any, split: Split, device: str) -> float:
        """The metric of the model saved in `scratch` on one evaluation split."""


class Profile(BaseModel):
    """One YAML file of `configs/`: a task at one size. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """Name of the task it belongs to."""
    name: str
    """Name of the profile; the shipped file is called `<task>-<name>.yaml`."""
    about: str = ""
    """One sentence for the user."""
    budget: Budget
    limits: Limits
    recipe: dict[str, Scalar] = {}
    """Changes to the recipe's defaults: with them they make the baseline."""
    knobs: dict[str, Span] = {}
    """Values to search at this size, for knobs whose own range does not fit it."""
    options: dict[str, Any] = {}
    """Settings that only this task knows; it checks them itself."""


def parse(model: type[Model], values: Mapping[str, object], where: str) -> Model:
    """Build `model` from `values`; raises `UsageError` that names the place and each problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'values'}: {item['msg']}"
            for item in error.errors()
        )
        raise UsageError(f"{where}: {problems}") from error


def read_profile(text: str, where: str) -> Profile:
    """Parse a profile; raises `UsageError` with the file's name for anything unexpected in it."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected keys and values, found {type(values).__name__}.")
    return parse(Profile, values, where)


def known_profiles(task: str) -> tuple[str, ...]:
    """Names of the shipped profiles of a task."""
    names = (entry.name for entry in resources.files("society.configs").iterdir())
    prefix = f"{task}-"
    return tuple(
        sorted(
            name.removeprefix(prefix).removesuffix(".yaml")
            for name in names
            if name.startswith(prefix) and name.endswith(".yaml")
        )
    )


def default_profile(task: str) -> str:
    """The profile used when none is named: the first one shipped.

    Raises:
        UnknownName: no such task.
        UsageError: a task given as `module:Class`, for which none is shipped.
    """
    profiles = known_profiles(task)
    if profiles:
        return profiles[0]
    if ":" not in task and task not in known_tasks():
        raise UnknownName("task", task, [*known_tasks(), "module:Class"])
    raise UsageError(f"Task {task!r} has no shipped profile: name a .yaml file by --profile.")


def load_profile(task: str, profile: str) -> Profile:
    """A shipped profile by name, or any file that ends in `.yaml` by path.

    Raises:
        UnknownName: no shipped profile has this name.
        UsageError: the file cannot be read, is wrong, or belongs to another task.
    """
    if profile.endswith(".yaml"):
        try:
            found = read_profile(Path(profile).read_text("utf-8"), profile)
        except OSError as error:
            raise UsageError(f"{profile}: {error.strerror}") from error
    elif profile not in known_profiles(task):
        raise UnknownName(f"profile of task {task!r}", profile, known_profiles(task))
    else:
        file = resources.files("society.configs") / f"{task}-{profile}.yaml"
        found = read_profile(file.read_text("utf-8"), file.name)
    if found.task != task:
        raise UsageError(f"{profile}: a profile of task {found.task!r}, not of {task!r}.")
    return found


def known_tasks() -> tuple[str, ...]:
    """Names of the installed tasks, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


def load_task(name: str, profile: str) -> Task:
    """Build a task from an installed name or from `module:Class`.

    Raises:
        UnknownName: no such task, or no such profile; lists the known ones.
        UsageError: the profile's file is wrong.
    """
    return _factory(name)(profile)


@cache
def _installed(name: str) -> str | None:
    """Where an installed task lies; kept, as each look reads the metadata of every package."""
    return next((entry.value for entry in entry_points(group=GROUP, name=name)), None)


def _factory(name: str) -> Callable[[str], Task]:
    module, colon, attribute = name.partition(":")
    if not colon:
        place = _installed(name)
        if place is None:
            raise UnknownName("task", name, [*known_tasks(), "module:Class"])
        module, _, attribute = place.partition(":")
    try:
        return cast(Callable[[str], Task], getattr(import_module(module), attribute))
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not installed
        raise UnknownName("task", name, known_tasks()) from error
    except AttributeError as error:
        raise UnknownName("task", name, known_tasks()) from error


def cache_dir() -> Path:
    """Where prepared data is kept: `$SOCIETY_CACHE`, else `~/.cache/society`. Not created here."""
    chosen = os.environ.get("SOCIETY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "society"
