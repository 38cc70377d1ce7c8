"""The search space of a task: typed knobs, canonical variants, distances.

A variant is canonical when it holds only values that differ from the baseline, under sorted names,
floats rounded to six significant digits. Two spellings of one change ("0.30", 0.3, 3e-1, in any
order, with or without defaults) then have one fingerprint. A recipe may say which of its knobs are
`idle`, i.e. switched off by another one; changes of those are dropped as well.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from society.errors import InvalidVariant
from society.experiments.task import Task
from society.knobs import Knob, Scalar, Span
from society.records import Variant

DIGITS = 6
KINDS: tuple[type, ...] = (bool, int, float, str)
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Space:
    """The knobs of one recipe around one baseline. Immutable and cheap; safe to share."""

    def __init__(
        self,
        recipe_type: type[BaseModel],
        baseline: BaseModel,
        spans: Mapping[str, Span] = MappingProxyType({}),
    ) -> None:
        """Read the knobs off the recipe; `spans` replace their ranges.

        Raises:
            InvalidVariant: the baseline lies outside its own knobs, or a span is for no knob.
            ValueError: a knob has neither a range nor choices.
        """
        self._type = recipe_type
        self._base: dict[str, Any] = baseline.model_dump()
        knobs = _knobs(recipe_type)
        self.knobs: Mapping[str, Knob] = MappingProxyType(knobs)
        """Name -> knob, in the order of the recipe."""
        for name, span in spans.items():
            self._check_name(name)
            knobs[name] = knobs[name].within(span)
        self._kinds = {name: self._kind(name) for name in self.knobs}
        self._default = {name: self._parse(name, self._base[name]) for name in self.knobs}
        self._units: dict[tuple[str, type, Scalar], float] = {}

    @classmethod
    def of(cls, task: Task) -> Space:
        """The space of a task."""
        return cls(task.recipe, task.baseline, task.spans)

    def variant(
        self, task_key: str, overrides: Mapping[str, object], patch: str | None = None
    ) -> Variant:
        """The canonical variant of these overrides.

        Raises:
            InvalidVariant: an unknown knob, a value of the wrong type or out of range, or a
                combination that the recipe refuses.
        """
        values = {name: self._parse(name, value) for name, value in sorted(overrides.items())}
        changed = {name: value for name, value in values.items() if value != self._default[name]}
        idle: Container[str] = getattr(self._build(changed), "idle", ())
        changed = {name: value for name, value in changed.items() if name not in idle}
        return Variant(task_key, MappingProxyType(changed), patch)

    def recipe(self, variant: Variant) -> BaseModel:
        """The baseline with the variant's changes. Raises `InvalidVariant` as `variant` does."""
        return self._build(
            {name: self._parse(name, value) for name, value in variant.overrides.items()}
        )

    def default(self, name: str) -> Scalar:
        """The baseline's value of a knob, in canonical form."""
        self._check_name(name)
        return self._default[name]

    def unit(self, name: str, value: Scalar) -> float:
        """Where a value lies in its knob's range, 0..1, on the knob's own scale.

        Choices lie at even distances, in the order of the knob.

        Raises:
            InvalidVariant: no such knob, or not one of its values.
        """
        key = (name, type(value), value)
        if key not in self._units:
            self._units[key] = self._unit(name, self._parse(name, value))
        return self._units[key]

    def _unit(self, name: str, value: Scalar) -> float:
        knob = self.knobs[name]
        if self._kinds[name] is bool:
            return float(value)
        if knob.choices:
            return knob.choices.index(value) / max(1, len(knob.choices) - 1)
        low, high = _range(name, knob)
        position = float(value)
        if knob.log:
            low, high, position = math.log(low), math.log(high), math.log(position)
        return (position - low) / (high - low)

    def distance(self, a: Variant, b: Variant) -> float:
        """The largest distance of any knob, on its unit scale.

        A differing category, flag or code counts 1; two texts of one code do not differ.
        """
        if a.code != b.code:
            return 1.0
        names = {*a.overrides, *b.overrides}
        return max((self.apart(name, a, b) for name in names), default=0.0)

    def near(self, a: Variant, b: Variant) -> bool:
        """Whether two variants are the same experiment for all practical purposes.

        That is, whether each knob differs by no more than its own tolerance.
        """
        if a.code != b.code:
            return False
        names = {*a.overrides, *b.overrides}
        return all(self.apart(name, a, b) <= self.knobs[name].tolerance for name in names)

    def changes(self, variant: Variant, reference: Variant) -> tuple[str, ...]:
        """The knobs on which two variants differ by more than their tolerance, sorted."""
        names = sorted({*variant.overrides, *reference.overrides})
        return tuple(
            name
            for name in names
            if self.apart(name, variant, reference) > self.knobs[name].tolerance
        )

    def is_category(self, name: str) -> bool:
        """Whether the knob's values are words or flags, which are equal or different."""
        self._check_name(name)
        return self._kinds[name] in (bool, str)

    def apart(self, name: str, a: Variant, b: Variant) -> float:
        """How far two variants are from each other on one knob, 0..1; words and flags 0 or 1."""
        default = self.default(name)
        left, right = a.overrides.get(name, default), b.overrides.get(name, default)
        if left == right:
            return 0.0
        if self._kinds[name] in (bool, str):
            return 1.0
        return abs(self.unit(name, left) - self.unit(name, right))

    def _build(self, changes: Mapping[str, Scalar]) -> BaseModel:
        try:
            return self._type.model_validate(self._base | dict(changes))
        except ValidationError as error:
            raise _refused(error, changes) from error

    def _check_name(self, name: str) -> None:
        if name in self.knobs:
            return
        if name in self._type.model_fields:
            raise InvalidVariant(name, "is fixed; it is part of the task, not of the search.")
        near = get_close_matches(name, self.knobs, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.knobs)}."
        raise InvalidVariant(name, f"there is no such knob; {hint}")

    def _kind(self, name: str) -> type:
        """The plain type of a knob's values: bool, int, float or str."""
        annotation = self._type.model_fields[name].annotation
        choices = self.knobs[name].choices
        sample = choices[0] if choices else self._base[name]
        wanted = annotation if annotation in KINDS else type(sample)
        for kind in KINDS:
            if wanted == kind:
                return kind
        raise ValueError(f"Knob {name!r}: values must be bool, int, float or str.")

    def _parse(self, name: str, value: object) -> Scalar:
        """A value of any spelling in canonical form, checked against its knob."""
        self._check_name(name)
        knob, kind = self.knobs[name], self._kinds[name]
        parsed = _coerce(kind, value)
        if parsed is None:
            raise InvalidVariant(name, f"expected {_allowed(knob, kind)}, found {value!r}.")
        inside = parsed in knob.choices if knob.choices else _within(name, knob, parsed)
        if not inside:
            raise InvalidVariant(name, f"{value!r} is not allowed; {_allowed(knob, kind)}.")
        return parsed


def variant(task: Task, overrides: Mapping[str, object], patch: str | None = None) -> Variant:
    """The canonical variant of a task. Raises `InvalidVariant`."""
    return Space.of(task).variant(task.key, overrides, patch)


def canonical(value: float) -> float:
    """A float rounded to six significant digits, without a negative zero."""
    return float(f"{value:.{DIGITS}g}") + 0.0


def _knobs(recipe_type: type[BaseModel]) -> dict[str, Knob]:
    return {
        name: knob
        for name, field in recipe_type.model_fields.items()
        for knob in field.metadata
        if isinstance(knob, Knob)
    }


def _coerce(kind: type, value: object) -> Scalar | None:
    """The value as `kind`, or None if it cannot be one."""
    if kind is bool:
        return _as_bool(value)
    if kind is str:
        return value if isinstance(value, str) else None
    number = _as_float(value)
    if number is None:
        return None
    if kind is float:
        return canonical(number)
    if isinstance(value, int):
        return int(value)
    return int(number) if number.is_integer() else None


def _as_bool(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return TRUTH.get(value.strip().lower()) if isinstance(value, str) else None


def _as_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _range(name: str, knob: Knob) -> tuple[float, float]:
    low, high = knob.low, knob.high
    if low is None or high is None or low >= high or (knob.log and low <= 0):
        raise ValueError(f"Knob {name!r} needs low < high (low > 0 on a log scale) or choices.")
    return low, high


def _within(name: str, knob: Knob, value: Scalar) -> bool:
    if isinstance(value, bool | str):
        return isinstance(value, bool)
    low, high = _range(name, knob)
    return low <= value <= high


def _allowed(knob: Knob, kind: type) -> str:
    if knob.choices:
        return f"one of {', '.join(map(str, knob.choices))}"
    if kind is bool:
        return "true or false"
    unit = f" {knob.unit}" if knob.unit else ""
    number = "a whole number" if kind is int else "a number"
    return f"{number} from {knob.low:g} to {knob.high:g}{unit}"


def _refused(error: ValidationError, changes: Mapping[str, Scalar]) -> InvalidVariant:
    """The recipe's own refusal, blamed on the change that its message names."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["loc"]:
        return InvalidVariant(str(problem["loc"][0]), message)
    named = [name for name in changes if name in message] or list(changes)
    return InvalidVariant(", ".join(named) or "baseline", message)
