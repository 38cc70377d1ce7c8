"""Published findings as data: what was claimed, where, and the change that tests it.

A finding says that a change makes the score better or worse, how large the seed noise is, or how a
society works. `configs/findings.yaml` holds the ten of a public volunteer network; any file of the
same form can take its place. How a replication is judged: `society.experiments.verdicts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from society.errors import InvalidVariant, UnknownName, UsageError
from society.experiments.task import parse
from society.knobs import Scalar
from society.records import Variant

if TYPE_CHECKING:
    from society.experiments.space import Space

SHIPPED = "findings.yaml"


class Kind(StrEnum):
    """What a finding is about, which decides how it is tested."""

    MODEL = "model"
    """A change of the recipe, compared with the baseline on paired seeds."""
    NOISE = "noise"
    """The seed-to-seed standard deviation of the baseline."""
    NEGATIVE_RESULTS = "negative_results"
    """Whether failures and negative results stay on record and are found again."""
    DATA_PIPELINE = "data_pipeline"
    """A screening of several changes, with the false discovery rate controlled."""
    MEMORY = "memory"
    """Societies whose agents share what they know against societies whose agents do not."""


class Predicted(StrEnum):
    """The published direction of a change."""

    BETTER = "better"
    WORSE = "worse"


class Source(BaseModel):
    """Where a finding was published, and what it says there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    says: str


class Change(BaseModel):
    """A change of the baseline: values that replace its own, or factors that multiply them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overrides: dict[str, Scalar] = {}
    factors: dict[str, float] = {}
    """Knob -> factor on the baseline's value: the same change at every size of the task."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.overrides and not self.factors:
            raise ValueError("a change needs `overrides` or `factors`")
        if both := self.overrides.keys() & self.factors.keys():
            raise ValueError(f"{sorted(both)[0]!r} is in `overrides` and in `factors`")
        return self


class Intervention(Change):
    """A change whose direction was published."""

    predicted: Predicted
    size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Published size of the effect, in the metric; None when none was published."""
    note: str = ""


class Finding(BaseModel):
    """One published finding and how it is tested here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    statement: str
    kind: Kind
    sources: tuple[Source, ...] = ()
    primary: Intervention | None = None
    """The change that decides (model)."""
    secondary: tuple[Intervention, ...] = ()
    """Further changes, listed with verdicts of their own (model)."""
    size: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The published standard deviation, in the metric (noise)."""
    arms: tuple[Change, ...] = ()
    """The changes that are screened (data_pipeline)."""
    planted: Change | None = None
    """A recipe that must fail, so that there is a failure to look for (negative_results)."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {
            Kind.MODEL: ("primary", self.primary),
            Kind.NOISE: ("size", self.size),
            Kind.DATA_PIPELINE: ("arms", self.arms),
            Kind.NEGATIVE_RESULTS: ("planted", self.planted),
        }.get(self.kind)
        if needed is not None and not needed[1]:
            raise ValueError(f"a finding of kind {self.kind.value!r} needs `{needed[0]}`")
        return self

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The primary change, then the secondary ones."""
        return (self.primary, *self.secondary) if self.primary else ()

    @property
    def changes(self) -> tuple[Change, ...]:
        """Every change that is trained."""
        planted = (self.planted,) if self.planted else ()
        return (*self.interventions, *self.arms, *planted)


class Findings(BaseModel):
    """A file of findings. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = ""
    task: str
    """Task whose knobs the changes name."""
    findings: tuple[Finding, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [finding.id for finding in self.findings]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two findings are called {name!r}")
        return self

    def only(self, wanted: Iterable[str]) -> tuple[Finding, ...]:
        """The findings of these ids, in the order of the file; all for none.

        Raises:
            UnknownName: no finding has this id.
        """
        names = list(wanted)
        known = {finding.id for finding in self.findings}
        for name in names:
            if name not in known:
                raise UnknownName("finding", name, known)
        return tuple(one for one in self.findings if not names or one.id in names)


def load(path: Path | None = None) -> Findings:
    """Read a file of findings; the shipped one for None.

    Raises:
        UsageError: the file cannot be read or says something unexpected; names the place.
    """
    where = str(path) if path else SHIPPED
    try:
        if path is None:
            text = (resources.files("society.configs") / SHIPPED).read_text("utf-8")
        else:
            text = path.read_text("utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected keys and values, found {type(values).__name__}.")
    return parse(Findings, values, where)


def variant_of(change: Change, space: Space, task: str) -> Variant:
    """The canonical variant that a change makes of the baseline of `task`.

    Raises:
        InvalidVariant: the space does not allow it.
    """
    overrides: dict[str, object] = dict(change.overrides)
    for knob, factor in change.factors.items():
        base = space.default(knob)
        if isinstance(base, bool | str):
            raise InvalidVariant(knob, f"a factor needs a number, the baseline has {base!r}.")
        overrides[knob] = base * factor
    return space.variant(task, overrides)


def check(findings: Iterable[Finding], space: Space, task: str) -> None:
    """Make sure that the space allows every change and that each of them changes something.

    Raises:
        UsageError: names the finding, the knob and what is allowed.
    """
    for finding in findings:
        for change in finding.changes:
            try:
                variant = variant_of(change, space, task)
            except InvalidVariant as error:
                raise UsageError(f"Finding {finding.id!r}: {error}") from error
            if variant.is_baseline:
                asked = ", ".join(f"{k}={v}" for k, v in change.overrides.items())
                raise UsageError(
                    f"Finding {finding.id!r}: {asked} is the baseline of {task} already; "
                    "nothing would be compared."
                )
