"""The task `script`: any repository with a training command and a metric, described by a YAML file.

A run gets a copy of the repository's files in its scratch folder, with the researcher's version of
the editable ones and with the values of this run put in where the profile says so. The command runs
there in a sandbox of its own: no network, no file but the copy, the declared data and the
interpreter. The society's processes never load any of the repository's code.

Within the run's scratch folder::

    work/     the copy; the training may write here and in tmp/, and nowhere else
    tmp/      temporary files
    code/     the editable files as they were run, kept from the training
    run.json  the values of this run's placeholders
    output    what the training printed
    score/    another copy, in which the scoring command runs; with its own tmp and output
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from society.errors import SocietyError, UsageError
from society.experiments import sandbox
from society.experiments.coderules import Rules
from society.experiments.scriptfile import (
    Options,
    budget_values,
    check_placeholders,
    fill,
    missing,
    recipe_type,
)
from society.experiments.snapshot import (
    Snapshot,
    Unsafe,
    add_in_place,
    below,
    read_inside,
    relative,
    tracked,
    walk,
)
from society.experiments.task import (
    Direction,
    Diverged,
    Limits,
    Refused,
    Role,
    TrainReport,
    Yardstick,
    load_profile,
    parse,
)
from society.knobs import Scalar, Span
from society.records import Budget, BudgetKind, Split

Values = Mapping[str, Scalar]

GRACE = 0.1
"""Share by which a training may exceed a budget in seconds, beside the profile's `extra_s`."""
OUTPUT_BYTES = 8 << 20
"""The metric is looked for in so much of the end of what was printed."""
JSON_BYTES = 1 << 20
LOG_CHARS = 1_500
"""What is kept of the output in the run's log."""
SHOWN_CHARS = 400
"""What an error shows of the output."""
OPEN_FILES = 1_024
STOP_S = 3.0
"""How long a command that is told to stop may take."""
KEPT = ("TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "CC", "CXX")
KEPT_PREFIXES = ("NVIDIA_", "HIP_", "ROCR_")
"""What the script sees of the society's environment, beside what the profile sets."""
CPU_ONLY = ""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
PROBE = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, *sys.path]))"


class ScriptFailed(SocietyError):
    """The script ended with an error, or its metric is not to be found: a crash of the run."""


@dataclass(frozen=True, slots=True)
class _Ran:
    """A command that has ended."""

    code: int
    wall_s: float
    output: str
    """The end of what it printed."""


class Script:
    """The task `script`; see the module."""

    name = "script"
    code: tuple[str, ...] = (
        "society.experiments.script",
        "society.experiments.scriptfile",
        "society.experiments.snapshot",
    )
    confines_itself = True
    """The command is confined, not the process that starts it: that one runs no foreign code."""
    rules = Rules.none()
    """Of the code: it is somebody's own program, which may read files and print."""

    def __init__(self, profile: str) -> None:
        """Read the profile and look whether what it names is there.

        Raises:
            UsageError: the first mistake in the profile, in one line.
        """
        settings = load_profile(self.name, profile)
        options = parse(Options, settings.options, f"{profile}: options")
        home = Path(profile).resolve().parent / Path(options.folder).expanduser()
        self._where = profile
        self.folder = home.resolve()
        self.options = options.model_copy(update={"folder": str(self.folder)})
        self.profile = settings.name
        self.key = f"{self.name}/{settings.name}"
        self.level: sandbox.Level | None = None
        """How far commands are confined; None for as far as this machine can."""
        self.budget: Budget = settings.budget
        self.limits: Limits = settings.limits
        self.recipe: type[BaseModel] = recipe_type(options.knobs, profile)
        self.baseline: BaseModel = parse(self.recipe, settings.recipe, f"{profile}: recipe")
        self.spans: Mapping[str, Span] = settings.knobs
        check_placeholders(options, settings.budget, profile)
        self._check_folder()
        self._check_limits()
        self._rendered(self.baseline)

    # ------------------------------------------------------------------ what it is

    @property
    def metric(self) -> str:
        """Name of the score."""
        return self.options.metric.name

    @property
    def unit(self) -> str:
        """Its unit; its name where none is given."""
        return self.options.metric.unit or self.options.metric.name

    @property
    def direction(self) -> Direction:
        """Which way of it is better."""
        return self.options.metric.direction

    @property
    def packages(self) -> tuple[str, ...]:
        """What the profile names."""
        return self.options.packages

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader must know before believing the scores, a sentence each."""
        told = []
        if not self.options.score:
            told.append(
                "The score is the script's own word: changed code could print a better one."
            )
        elif self.options.editable:
            told.append(
                "The scoring command runs beside the changed files; where it loads them, its "
                "score is as honest as they are."
            )
        if not self.options.knows_split:
            told.append(
                "There is no separate holdout: screening and verification read the same metric, "
                "on different seeds."
            )
        if self.budget.kind is not BudgetKind.SECONDS:
            told.append(
                f"The budget in {self.budget.kind.value} is told to the script and not measured."
            )
        return tuple(told)

    # ------------------------------------------------------------------ its code

    def sources(self) -> Mapping[str, str]:
        """The editable files."""
        return dict(self._texts)

    def adopt(self, code: Path, own: Yardstick | None = None) -> None:
        """Run these versions of the editable files from now on."""
        self.__dict__["_texts"] = {
            name: (code / name).read_text("utf-8") for name in self.options.editable
        }

    def sample(self, recipe: Any, seed: int, scratch: Path, device: str) -> str:
        """Check that the editable files can be run at all; names their content.

        Nothing is run: how long the shortest useful run of a script takes is not known.
        """
        code = self._filled_in(self._values(recipe, seed, None, self.budget))
        for name, text in code.items():
            if name.endswith(".py"):
                _compile(name, text)
        return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()

    # ------------------------------------------------------------------ a run

    def warm_up(self) -> None:
        """Read the repository, find the interpreter and the sandbox: all runs use what is now."""
        _ = self._files, self._texts, self._interpreter
        sandbox.runtime()
        sandbox.best_for_commands()

    def prepare(self) -> str:
        """Hash everything that a run may read: the repository's files, and what lies elsewhere."""
        for name in self.options.packages:
            try:
                version(name)
            except PackageNotFoundError as error:
                raise UsageError(
                    f"{self._where}: options.packages: {name} is not installed."
                ) from error
        digest = hashlib.sha256()
        self._files.add_to(digest)
        for label in (*self.options.read, *self.options.score_read):
            add_in_place(digest, label, self._place(label))
        return digest.hexdigest()

    def preload(self, role: Role) -> None:
        """There is nothing to load: `warm_up` did it."""

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
        """Run the training command in a fresh copy."""
        if data_seed is not None and not self._takes("data_seed"):
            raise Refused("The script has no second seed: nothing stands for {data_seed}.")
        values = self._values(recipe, seed, data_seed, budget)
        code = self._filled_in(values)
        work, tmp = scratch / "work", scratch / "tmp"
        self._lay_out(work, code, self.options.read)
        _keep(scratch / "code", code)
        (scratch / "run.json").write_text(json.dumps(dict(values)))
        tmp.mkdir()
        words = [fill(word, values) for word in self.options.command_words]
        policy = self._policy((work, tmp), self.options.read, device)
        allowed_s = self._allowed_s(budget)
        ran = self._run(words, values, work, tmp, policy, device, allowed_s)
        sys.stdout.write(ran.output[-LOG_CHARS:])
        self._judge_ending(ran, budget, allowed_s)
        if not self.options.score:
            changed = self._files.changed(work, {*self.options.editable})
            if changed:
                raise Refused(f"The run changed {_named(changed)}, which it may only read.")
        return TrainReport(train_s=ran.wall_s)

    def score(self, scratch: Path, recipe: Any, split: Split, device: str) -> float:
        """The metric: of the scoring command if there is one, else of the training itself."""
        if not self.options.score:
            return self._metric(_tail(scratch / "output"), scratch / "work", split)
        values = json.loads((scratch / "run.json").read_text())
        values["split"] = self.options.splits[split]
        home = scratch / "score"
        work, tmp = home / "work", home / "tmp"
        reads = (*self.options.read, *self.options.score_read)
        code = {name: (scratch / "code" / name).read_text() for name in self.options.editable}
        self._lay_out(work, code, reads)
        tmp.mkdir()
        for name in self.options.artifacts:
            self._bring(scratch / "work", work, name)
        words = [fill(word, values) for word in self.options.score_words]
        policy = self._policy((work, tmp), reads, device)
        ran = self._run(words, values, work, tmp, policy, device, None)
        if ran.code:
            raise ScriptFailed(f"the scoring command ended with code {ran.code}{_shown(ran)}")
        return self._metric(ran.output, work, split)

    # ------------------------------------------------------------------ parts of it

    @cached_property
    def _files(self) -> Snapshot:
        """The repository as it is now; read once."""
        options = self.options
        if options.files is None:
            names = tracked(self.folder)
        else:
            names = [name for entry in options.files for name in walk(self.folder, entry)]
        apart = [*options.read, *options.score_read]
        names = [name for name in (*names, *options.editable) if not below(name, apart)]
        return Snapshot.take(self.folder, names, self._where)

    @cached_property
    def _texts(self) -> dict[str, str]:
        """The editable files: as installed, or as adopted in this process."""
        return self._files.texts(self.options.editable, self._where)

    @cached_property
    def _interpreter(self) -> tuple[Path, ...]:
        """Where the interpreter lies and looks for modules."""
        try:
            done = subprocess.run(
                [self._python, "-I", "-c", PROBE], capture_output=True, check=True, timeout=60
            )
            found = [Path(place) for place in json.loads(done.stdout)]
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise UsageError(
                f"{self._where}: options.python: {self._python} is no Python that runs: {error}"
            ) from error
        return tuple(path for path in found if path.is_absolute() and path != Path("/"))

    @property
    def _python(self) -> str:
        """`{python}`; one in a virtual environment is not resolved, or it would not be one."""
        named = self.options.python
        if named is None:
            return sys.executable
        if "/" not in named:
            return shutil.which(named) or named
        return os.path.abspath(self.folder / Path(named).expanduser())

    def _check_folder(self) -> None:
        """Raise `UsageError` for what is not there."""
        options, where = self.options, self._where
        if not self.folder.is_dir():
            raise UsageError(f"{where}: options.folder: there is no folder {self.folder}.")
        for name in missing(self.folder, options.editable):
            raise UsageError(f"{where}: options.editable: there is no file {name} in {self.folder}")
        for name in options.files or ():
            place = (self.folder / name).resolve()
            if not place.exists() or not place.is_relative_to(self.folder):
                raise UsageError(f"{where}: options.files: there is no {name} in {self.folder}.")
        for name in (*options.read, *options.score_read):
            if not self._place(name).exists():
                raise UsageError(f"{where}: options.read: there is no {self._place(name)}.")
        for file, changes in options.replace.items():
            text = (self.folder / file).read_text("utf-8", errors="replace")
            for old in changes:
                if not old or old not in text:
                    raise UsageError(f"{where}: options.replace: {file} does not contain {old!r}.")

    def _check_limits(self) -> None:
        if self.limits.timeout_s <= 0 or self.budget.amount <= 0:
            raise UsageError(f"{self._where}: budget and limits.timeout_s must be above 0.")
        if self.budget.kind is BudgetKind.SECONDS and self.limits.timeout_s < self.budget.amount:
            raise UsageError(
                f"{self._where}: limits.timeout_s ({self.limits.timeout_s:g}) is less than the "
                f"budget of {self.budget.amount:g} s."
            )

    def _rendered(self, recipe: BaseModel) -> None:
        """Fill everything in once, so that an impossible format is found at once."""
        values = dict(self._values(recipe, 1, None, self.budget))
        for place, text in self.options.training_texts:
            try:
                fill(text, values)
            except UsageError as error:
                raise UsageError(f"{self._where}: options.{place}: {error}") from error

    def _takes(self, placeholder: str) -> bool:
        return any(f"{{{placeholder}" in text for _, text in self.options.training_texts)

    def _values(self, recipe: Any, seed: int, data_seed: int | None, budget: Budget) -> Values:
        """What the placeholders stand for in one training."""
        return {
            **recipe.model_dump(),
            **budget_values(budget),
            "seed": seed,
            "data_seed": seed if data_seed is None else data_seed,
            "python": self._python,
            "home": str(Path.home()),
        }

    def _filled_in(self, values: Values) -> dict[str, str]:
        """The editable files with the values of a run in them. Raises `Refused`."""
        code = dict(self._texts)
        for file, changes in self.options.replace.items():
            for old, new in changes.items():
                if old not in code[file]:
                    raise Refused(
                        f"{file} no longer contains {old!r}, where the values of a run are put in; "
                        "leave this text as it is."
                    )
                code[file] = code[file].replace(old, fill(new, values))
        return code

    def _place(self, name: str) -> Path:
        """Where something lies that is read in place."""
        return self.folder / name

    def _lay_out(self, work: Path, code: Mapping[str, str], reads: Sequence[str]) -> None:
        """A fresh copy, with links to what is read in place."""
        work.mkdir(parents=True)
        self._files.write(work, code)
        for name in reads:
            if relative(name) is not None:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).symlink_to(self._place(name).resolve())

    def _policy(self, write: tuple[Path, ...], reads: Sequence[str], device: str) -> sandbox.Policy:
        places = [self._place(name) for name in reads]
        return sandbox.Policy(
            read=(*self._interpreter, *places, *(place.resolve() for place in places)),
            write=write,
            devices=() if device == "cpu" else sandbox.gpu_devices(),
            processes=self.options.processes,
            mem_bytes=self.limits.mem_bytes,
            open_files=OPEN_FILES,
        )

    def _environment(self, values: Values, tmp: Path, device: str) -> dict[str, str]:
        """What the script sees; no key of any service is among it."""
        path = [str(Path(self._python).parent), "/usr/local/bin", "/usr/bin", "/bin"]
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT or name.startswith(KEPT_PREFIXES)
        }
        own = {
            "PATH": os.pathsep.join(path),
            "HOME": str(tmp),
            "TMPDIR": str(tmp),
            "XDG_CACHE_HOME": str(tmp),
            "TRITON_CACHE_DIR": str(tmp / "triton"),
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUDA_VISIBLE_DEVICES": _cards(device),
            **dict.fromkeys(THREADS, str(self.options.threads)),
        }
        given = {name: fill(str(value), values) for name, value in self.options.env.items()}
        return kept | own | given

    def _allowed_s(self, budget: Budget) -> float | None:
        if budget.kind is not BudgetKind.SECONDS:
            return None
        return budget.amount * (1 + GRACE) + self.options.extra_s

    def _run(
        self,
        words: Sequence[str],
        values: Values,
        work: Path,
        tmp: Path,
        policy: sandbox.Policy,
        device: str,
        allowed_s: float | None,
    ) -> _Ran:
        """Run a command confined, and wait for its end; it is stopped when its time is over."""
        argv = sandbox.wrap(words, policy, self.level or sandbox.best_for_commands())
        limit_s = min(self.limits.timeout_s, allowed_s or math.inf)
        output, began = tmp.parent / "output", time.monotonic()
        with output.open("wb") as file:
            try:
                running = subprocess.Popen(
                    argv,
                    cwd=work,
                    env=self._environment(values, tmp, device),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                raise ScriptFailed(f"{words[0]} cannot be run: {error.strerror}") from error
            try:
                code = running.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                _end(running)
        return _Ran(code, time.monotonic() - began, _tail(output))

    def _judge_ending(self, ran: _Ran, budget: Budget, allowed_s: float | None) -> None:
        """Raise what the end of a training amounts to, unless it is a good one."""
        if allowed_s is not None and ran.wall_s >= allowed_s:
            raise Refused(
                f"Ran for {ran.wall_s:.1f} s; the budget of {budget.amount:g} s allows "
                f"{allowed_s:.1f} s with {self.options.extra_s:g} s for starting and evaluating "
                "(options.extra_s)."
            )
        if ran.wall_s >= self.limits.timeout_s:
            raise ScriptFailed(f"stopped after {self.limits.timeout_s:g} s (limits.timeout_s)")
        if ran.code:
            raise ScriptFailed(f"the command ended with code {ran.code}{_shown(ran)}")

    def _bring(self, source: Path, work: Path, name: str) -> None:
        """Copy what the training left under a declared name; links and the like are refused."""
        if not (source / name).exists():
            raise ScriptFailed(f"the training left no {name} (options.artifacts)")
        files = [name]
        if (source / name).is_dir() and not (source / name).is_symlink():
            files = walk(source, name)
        for file in files:
            if file != name and file in self._files.files:
                continue  # the scoring uses what the repository has
            try:
                _copy_inside(source, work, file)
            except (OSError, Unsafe) as error:
                raise Refused(f"What the training left as {file} cannot be used: {error}") from None

    def _metric(self, output: str, work: Path, split: Split) -> float:
        """The score in a command's output or file. Raises `Diverged` if it is not finite."""
        metric, word = self.options.metric, self.options.splits[split]
        if metric.regex is not None:
            text = _by_regex(metric.regex.replace("{split}", re.escape(word)), output)
        else:
            file = (metric.file or "").replace("{split}", word)
            text = _by_json(work, file, (metric.key or "").replace("{split}", word))
        try:
            value = float(text)
        except (ValueError, OverflowError):
            raise ScriptFailed(f"{self.metric}: {text[:80]!r} is no number") from None
        if not math.isfinite(value):
            raise Diverged(f"{self.metric} is {value}")
        return value


def _end(running: subprocess.Popen[bytes]) -> None:
    """Stop a command, and with it what it started."""
    running.terminate()
    try:
        running.wait(STOP_S)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def _by_regex(pattern: str, output: str) -> str:
    """The group of the last match."""
    matches = re.finditer(pattern, output.replace("\r", "\n"), re.MULTILINE)
    last = deque(matches, maxlen=1)
    if not last or last[0].group(1) is None:
        raise ScriptFailed(
            f"nothing that was printed matches {pattern!r}; it ends with: {_end_of(output)}"
            if output.strip()
            else f"nothing was printed, so nothing matches {pattern!r}"
        )
    return str(last[0].group(1))


def _by_json(work: Path, file: str, key: str) -> str:
    """A number in a JSON file, by its dotted key."""
    try:
        value = json.loads(read_inside(work, file, JSON_BYTES))
    except FileNotFoundError:
        raise ScriptFailed(f"no {file} was written") from None
    except Unsafe as error:
        raise Refused(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ScriptFailed(f"{file} cannot be read: {error}") from None
    for part in filter(None, key.split(".")):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise ScriptFailed(f"{file} has no {key}{_keys(value)}")
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ScriptFailed(f"{file}: {key or 'it'} is no number{_keys(value)}")
    return str(value)


def _keys(value: object) -> str:
    return f"; there is {', '.join(map(str, list(value)[:20]))}" if isinstance(value, dict) else ""


def _compile(name: str, text: str) -> None:
    try:
        compile(text, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        at = f" line {line}:" if line else ""
        raise ScriptFailed(f"{name}:{at} {getattr(error, 'msg', error)}") from error


def _keep(folder: Path, code: Mapping[str, str]) -> None:
    """Put the code of a run where the run cannot reach it."""
    folder.mkdir()
    for name, text in code.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")


def _copy_inside(source: Path, target: Path, name: str) -> None:
    """Copy a plain file of a stranger. Raises `Unsafe` or `OSError`."""
    size = (source / name).lstat().st_size
    data = read_inside(source, name, size + 1)
    place = target / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() or (place.exists() and not stat.S_ISREG(place.lstat().st_mode)):
        raise Unsafe(f"{name} is in the way of something else")
    place.write_bytes(data)


def _cards(device: str) -> str:
    """`CUDA_VISIBLE_DEVICES` for a run on this device."""
    if device == "cpu":
        return CPU_ONLY
    _, _, number = device.partition(":")
    visible = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    if not number:
        return ",".join(visible) or "0"
    return visible[int(number)] if int(number) < len(visible) else number


def _tail(path: Path) -> str:
    """The end of a text file; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - OUTPUT_BYTES))
            return file.read(OUTPUT_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _shown(ran: _Ran) -> str:
    """The end of the output, for a message."""
    text = _end_of(ran.output)
    return f"; its output ends with: {text}" if text else " and printed nothing"


def _end_of(output: str) -> str:
    """What an error shows of an output, on one line."""
    return " ".join(output[-SHOWN_CHARS:].split())


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
