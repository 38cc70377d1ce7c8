"""What the profile of a `script` task says about somebody's repository: `options`, checked.

Every text in which `{seed}` or another placeholder may stand is checked when the profile is read:
a mistake costs one line on the screen, not a run.
"""

from __future__ import annotations

import keyword
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from society.errors import UsageError
from society.experiments.snapshot import below, relative
from society.experiments.task import Direction
from society.knobs import Knob, Scalar
from society.records import Budget, BudgetKind, Split

ALWAYS = ("seed", "data_seed", "python", "home", "amount")
"""Placeholders of every script; `{seconds}` or what else the budget counts is another one."""
SPELT = {"minimize": "minimise", "maximize": "maximise", "lower": "minimise", "higher": "maximise"}
PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")


class Strict(BaseModel):
    """A part of the profile; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: object) -> object:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return values


class MetricOptions(Strict):
    """How the score is read: from a JSON file, or from what was printed."""

    name: str
    unit: str = ""
    """By default the name."""
    direction: Direction = Direction.MINIMISE
    regex: str | None = None
    """Its first group is the score; the last place that matches counts."""
    file: Annotated[str | None, Field(alias="json")] = None
    """A JSON file that the command writes."""
    key: str | None = None
    """Where in that file, e.g. `eval.loss`; by default its only number."""

    @field_validator("direction", mode="before")
    @classmethod
    def _spelling(cls, value: object) -> object:
        return SPELT.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.regex is None) == (self.file is None):
            raise ValueError("say how it is read: either `regex` or `json` (with `key`)")
        if self.key is not None and self.file is None:
            raise ValueError("`key` is a place in a file: name the file by `json`")
        if self.file is not None and relative(self.file) is None:
            raise ValueError(f"json: {self.file!r} must lie below the folder of the run")
        if self.regex is not None:
            _check_regex(self.regex)
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """Where `{split}` may stand."""
        return tuple(text for text in (self.regex, self.file, self.key) if text is not None)


def _check_regex(text: str) -> None:
    try:
        groups = re.compile(text.replace("{split}", "x"), re.MULTILINE).groups
    except re.error as error:
        raise ValueError(f"regex: {error}") from error
    if groups != 1:
        raise ValueError(
            f"regex: it needs one group in parentheses around the number, found {groups}"
        )


class KnobOptions(Strict):
    """One value that may be varied without touching the code."""

    default: Scalar
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Scalar, ...] = ()
    unit: str = ""
    about: str = ""

    @model_validator(mode="after")
    def _ranged(self) -> Self:
        if self.choices:
            if self.low is not None or self.high is not None:
                raise ValueError("give either `low` and `high`, or `choices`")
            if self.default not in self.choices:
                raise ValueError(f"the default {self.default!r} is none of the choices")
        elif not isinstance(self.default, bool):
            self._check_range()
        return self

    def _check_range(self) -> None:
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("give `low` and `high` with low < high, or `choices`")
        if self.log and self.low <= 0:
            raise ValueError("low must be above 0 on a log scale")
        try:
            inside = self.low <= float(self.default) <= self.high
        except ValueError:
            raise ValueError(f"the default {self.default!r} is no number") from None
        if not inside:
            raise ValueError(f"the default {self.default!r} is not from {self.low} to {self.high}")

    @property
    def kind(self) -> type:
        """The type of its values."""
        values = self.choices or (self.default,)
        for kind in (bool, str):
            if self.choices and any(isinstance(value, kind) for value in values):
                return kind
        if not self.choices and isinstance(self.default, bool):
            return bool
        whole = all(isinstance(value, int) for value in values)
        bounds = (self.low or 0.0, self.high or 0.0)
        return int if whole and all(float(bound).is_integer() for bound in bounds) else float

    @property
    def knob(self) -> Knob:
        """As the search knows it."""
        return Knob(
            low=self.low,
            high=self.high,
            log=self.log,
            choices=tuple(self.kind(choice) for choice in self.choices),
            unit=self.unit,
            group="script",
            about=self.about,
        )


class Options(Strict):
    """The `options` of a profile of the task `script`."""

    folder: str = "."
    """The repository; relative to the profile's file."""
    files: tuple[str, ...] | None = None
    """What a run gets a copy of. By default what git tracks; without git all but hidden files."""
    editable: tuple[str, ...] = ()
    """What a researcher may change."""
    command: str | tuple[str, ...]
    """Trains; split into words as a shell would, but run without one."""
    env: dict[str, Scalar] = {}
    """Further environment variables; nothing is passed on by itself that could be a secret."""
    replace: dict[str, dict[str, str]] = {}
    """File -> text in it -> what is put there instead, with placeholders."""
    metric: MetricOptions
    score: str | tuple[str, ...] | None = None
    """Computes the score, after the training and away from it."""
    artifacts: tuple[str, ...] = ()
    """What the training leaves for the scoring: files and folders."""
    read: tuple[str, ...] = ()
    """Files and folders that are read where they lie."""
    score_read: tuple[str, ...] = ()
    """The same for the scoring alone: the training finds nothing there."""
    knobs: dict[str, KnobOptions] = {}
    splits: dict[Split, str] = {split: split.value for split in Split}
    """What `{split}` stands for."""
    python: str | None = None
    """`{python}`; by default the interpreter of the society."""
    packages: tuple[str, ...] = ()
    """Installed distributions whose versions are recorded with each run."""
    processes: Annotated[int, Field(ge=1)] = 64
    """Processes and threads at once, at most."""
    threads: Annotated[int, Field(ge=1)] = 1
    """What libraries are told to use."""
    extra_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds beside a budget in seconds: starting, compiling, evaluating."""

    @field_validator("files", "editable", "artifacts", "packages", mode="before")
    @classmethod
    def _no_single_text(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(f"expected a list, e.g. [{value}]")
        return value

    @field_validator("files", "editable", "artifacts")
    @classmethod
    def _inside(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(_inside(name) for name in names)

    @field_validator("read", "score_read")
    @classmethod
    def _in_place(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        given = (str(Path(name).expanduser()) for name in names)
        return tuple(name if Path(name).is_absolute() else _inside(name) for name in given)

    @field_validator("command", "score")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value is not None and not _words(value):
            raise ValueError("it is empty")
        return value

    @field_validator("splits")
    @classmethod
    def _both(cls, splits: dict[Split, str]) -> dict[Split, str]:
        if set(splits) != set(Split):
            raise ValueError(f"name both of {', '.join(split.value for split in Split)}")
        return splits

    @field_validator("packages")
    @classmethod
    def _named(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not PACKAGE.match(name):
                raise ValueError(f"{name!r} is no name of a distribution")
        return names

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for file in self.replace:
            if file not in self.editable:
                raise ValueError(f"replace: {file} is not among the editable files")
        if self.artifacts and self.score is None:
            raise ValueError("artifacts are for the `score` command; there is none")
        if self.score_read and self.score is None:
            raise ValueError("score_read is for the `score` command; there is none")
        if not self.editable and not self.knobs:
            raise ValueError("nothing can be varied: declare `editable` files or `knobs`")
        for name in self.editable:
            if below(name, (*self.read, *self.score_read)):
                raise ValueError(f"editable: {name} lies in what is only read")
        return self

    @property
    def command_words(self) -> tuple[str, ...]:
        """The training command, word by word, with placeholders."""
        return _words(self.command)

    @property
    def score_words(self) -> tuple[str, ...]:
        """The scoring command; empty if there is none."""
        return () if self.score is None else _words(self.score)

    @property
    def training_texts(self) -> Iterator[tuple[str, str]]:
        """(Place in the profile, text) of everything that is filled in for a training."""
        yield from (("command", word) for word in self.command_words)
        yield from ((f"env.{name}", str(value)) for name, value in self.env.items())
        for file, changes in self.replace.items():
            yield from ((f"replace.{file}", text) for text in changes.values())

    @property
    def knows_split(self) -> bool:
        """Whether screening and verification are told apart."""
        texts = (*self.score_words, *self.metric.texts)
        return any("{split}" in text for text in texts) and len({*self.splits.values()}) > 1


def _words(command: str | tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(command, str):
        return command
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise ValueError(f"{command!r}: {error}") from error


def _inside(name: str) -> str:
    plain = relative(name)
    if plain is None:
        raise ValueError(f"{name!r} must lie below the folder; nothing else can be named")
    return plain


def check_placeholders(options: Options, budget: Budget, where: str) -> None:
    """Raise `UsageError` for an unknown placeholder, an unused knob or a seed that goes nowhere."""
    known = {*ALWAYS, budget.kind.value, *options.knobs}
    used: set[str] = set()
    for place, text in options.training_texts:
        used |= _fields(text, known, f"{where}: options.{place}")
    for word in options.score_words:
        _fields(word, {*known, "split"}, f"{where}: options.score")
    if "seed" not in used:
        raise UsageError(
            f"{where}: the seed is not passed on, so every run would be the same one: put {{seed}} "
            'into `command`, `env` (SEED: "{seed}") or `replace`.'
        )
    for name in options.knobs:
        if name not in used:
            raise UsageError(
                f"{where}: knob {name!r} is not used: put {{{name}}} into `command`, `env` or "
                "`replace`."
            )


def _fields(text: str, known: set[str], where: str) -> set[str]:
    try:
        found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise UsageError(f"{where}: {text!r}: {error}; write {{{{ for a plain brace.") from error
    for name in sorted(found - known):
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {{{near[0]}}}?" if near else ""
        more = " Only `score` and `metric` are told the split." if name == "split" else ""
        raise UsageError(
            f"{where}: unknown placeholder {{{name}}}.{hint}{more} Known: "
            f"{', '.join(sorted(known))}; write {{{{ for a plain brace."
        )
    return found


def fill(text: str, values: Mapping[str, Scalar]) -> str:
    """The text with its placeholders replaced. Raises `UsageError` for an impossible format."""
    try:
        return text.format_map(values)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{text!r} cannot be filled in: {error}") from error


def budget_values(budget: Budget) -> dict[str, Scalar]:
    """`{amount}`, and the same under the name of what is counted; whole numbers as such."""
    amount = int(budget.amount) if float(budget.amount).is_integer() else budget.amount
    return {"amount": amount, budget.kind.value: amount}


def recipe_type(knobs: Mapping[str, KnobOptions], where: str) -> type[BaseModel]:
    """A recipe with these knobs. Raises `UsageError` for a name that cannot be one."""
    taken = {*ALWAYS, *BudgetKind, "split"}
    for name in knobs:
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise UsageError(f"{where}: knob {name!r}: use letters, digits and _ for its name.")
        if name in taken or hasattr(BaseModel, name):
            raise UsageError(f"{where}: knob {name!r}: the name is taken; choose another one.")
    fields: dict[str, Any] = {
        name: (Annotated[knob.kind, knob.knob], knob.kind(knob.default))
        for name, knob in knobs.items()
    }
    config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    return create_model("ScriptRecipe", __config__=config, **fields)


def missing(folder: Path, names: Iterable[str]) -> list[str]:
    """Those that are no plain file whose content lies below the folder."""
    home = folder.resolve()
    return [
        name
        for name in names
        if not (folder / name).is_file() or not (folder / name).resolve().is_relative_to(home)
    ]
