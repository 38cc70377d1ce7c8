"""`Knob`: what the search space knows about one field of a task's recipe.

A recipe is a frozen pydantic model; a field that the society may vary carries a `Knob` in its
annotation, so that bounds, unit and source stand beside the default and nowhere else::

    depth: Annotated[int, Knob(low=1, high=8, unit="layers", source="...")] = 4

Fields without a `Knob` are fixed: an override of one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Knob:
    """Range, unit and provenance of one recipe field.

    Give either `low` and `high` (a number, both inclusive) or `choices` (a closed set). A boolean
    field needs neither.
    """

    low: float | None = None
    """Smallest value the search may propose, inclusive."""
    high: float | None = None
    """Largest value the search may propose, inclusive."""
    log: bool = False
    """Distances and sampling are on a log scale (rates and sizes)."""
    tolerance: float = 0.02
    """Values no further apart on the knob's unit scale count as the same experiment."""
    choices: tuple[Scalar, ...] = ()
    """The closed set of values, for categories and sizes with gaps."""
    unit: str = ""
    """Unit of the value, e.g. `layers`, `tokens`, `fraction of steps`."""
    group: str = ""
    """Section of the docs and the report, e.g. `shape`, `schedule`, `optimiser`."""
    about: str = ""
    """One sentence: what changes when the value does."""
    source: str = ""
    """Where the idea comes from: paper, repository, or a measurement."""

    def within(self, span: Span) -> Knob:
        """This knob with another span of values."""
        return replace(self, low=span.low, high=span.high, choices=span.choices)


@dataclass(frozen=True, slots=True)
class Span:
    """The values that a profile allows for one knob instead of the knob's own.

    A size that suits a large accelerator is not one that suits a CPU core.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[Scalar, ...] = ()
    """A single one fixes the knob."""
