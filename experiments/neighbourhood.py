"""Which variants lie near another one, and which changes it repeats, among hundred thousands.

One row of a matrix per knob, one column per variant; a number is kept as its position on the knob's
unit scale, a word, flag or patch as a number that is equal or different. A query passes over the
rows with numpy. The matrix is float32, so what it cannot decide (a distance on the very edge) is
decided by `Space` itself: the answers are those of comparing one by one, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from society.errors import InvalidVariant

if TYPE_CHECKING:
    from society.experiments.space import Space
    from society.knobs import Scalar
    from society.records import Variant

SLACK = 1e-6
"""More than float32 can be wrong about a distance on the unit scale."""
FIRST_ROOM = 256
"""Columns before the matrix grows for the first time; it doubles each time."""

PATCH = "patch"
"""Stands beside the knobs for a change of code."""

Numbers = NDArray[np.float32]
Flags = NDArray[np.bool_]
Places = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A variant near another one."""

    key: str
    """What it was added under, e.g. the id of its run."""
    distance: float
    """As `Space.distance` has it, 0..1."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """An earlier change that a variant makes again."""

    key: str
    """What it was added under, e.g. the id of its run."""
    distance: float
    """The largest distance of any changed knob, on its unit scale."""
    changed: frozenset[str]
    """The knobs, and `PATCH` for a change of code."""


class _Matrix:
    """Points of a search space in columns, with what they were added under. Only grows."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.names = tuple(space.knobs)
        self.rows = {name: row for row, name in enumerate((*self.names, PATCH))}
        self.words = [space.is_category(name) for name in self.names] + [True]
        self.keys: list[str] = []
        self.variants: list[Variant] = []
        self._codes: dict[tuple[str, Scalar], float] = {}
        self._patches: dict[str | None, float] = {None: 0.0}
        self._home = [self._place(name, space.default(name)) for name in self.names] + [0.0]
        self._cells: Numbers = np.zeros((len(self._home), FIRST_ROOM), np.float32)

    def point(self, variant: Variant) -> Numbers:
        """One number per row. Raises `InvalidVariant` for a variant of another space."""
        point = self._home.copy()
        for name, value in variant.overrides.items():
            point[self.rows[name]] = self._place(name, value)
        point[-1] = self._patches.setdefault(variant.code, float(len(self._patches)))
        return np.array(point, np.float32)

    def add(self, key: str, variant: Variant, point: Numbers) -> None:
        """Append a column; amortised constant time."""
        count = len(self.keys)
        if count == self._cells.shape[1]:
            wider = np.zeros((len(self._home), 2 * count), np.float32)
            wider[:, :count] = self._cells
            self._cells = wider
        self._cells[:, count] = point
        self.keys.append(key)
        self.variants.append(variant)

    def apart(self, row: int, point: Numbers) -> Numbers:
        """How far every column is from a point in one row, 0..1; NaN where the column is."""
        away: Numbers = np.abs(self._cells[row, : len(self.keys)] - point[row])
        return np.minimum(away, 1, out=away)

    def _place(self, name: str, value: Scalar) -> float:
        """Where a value lies in its row: its unit position, or the code of a word or flag."""
        unit = self.space.unit(name, value)  # refuses what the knob does not allow
        if not self.space.is_category(name):
            return unit
        return self._codes.setdefault((name, value), float(len(self._codes)))


class Neighbourhood:
    """Variants by their place in a search space; grows, never forgets. Not thread-safe."""

    def __init__(self, space: Space) -> None:
        """An empty neighbourhood in `space`."""
        self._space = space
        self._matrix = _Matrix(space)
        self._tolerance = [space.knobs[name].tolerance for name in self._matrix.names] + [0.0]

    def __len__(self) -> int:
        """How many variants have been added."""
        return len(self._matrix.keys)

    def add(self, key: str, variant: Variant) -> bool:
        """Add a variant.

        Returns:
            Whether it has a place: a variant of an older search space may have none in this one.
        """
        try:
            self._matrix.add(key, variant, self._matrix.point(variant))
        except InvalidVariant:
            return False
        return True

    def within(self, variant: Variant) -> tuple[str, ...]:
        """The keys of all variants that are within every knob's tolerance, in order of adding.

        Raises:
            InvalidVariant: `variant` is not one of this space.
        """
        matrix, point = self._matrix, self._matrix.point(variant)
        near: Flags = np.ones(len(self), bool)
        edge: Flags = np.zeros(len(self), bool)
        for row, tolerance in enumerate(self._tolerance):
            apart = matrix.apart(row, point)
            near &= apart <= tolerance + SLACK
            if not matrix.words[row]:
                edge |= apart > tolerance - SLACK
        return tuple(
            matrix.keys[place]
            for place in np.flatnonzero(near).tolist()
            if not edge[place] or self._space.near(variant, matrix.variants[place])
        )

    def nearest(self, variant: Variant, k: int, radius: float = 1.0) -> tuple[Neighbour, ...]:
        """The `k` nearest variants no further than `radius`; of equal ones, the first added.

        Raises:
            InvalidVariant: `variant` is not one of this space.
        """
        matrix, point = self._matrix, self._matrix.point(variant)
        most: Numbers = np.zeros(len(self), np.float32)
        for row in range(len(point)):
            np.maximum(most, matrix.apart(row, point), out=most)
        places = np.flatnonzero(most <= radius + SLACK)
        if len(places) > k:
            last = np.partition(most[places], k - 1)[k - 1]
            places = places[most[places] <= last + 2 * SLACK]
        found = [
            (self._space.distance(variant, matrix.variants[place]), place)
            for place in _no_more_than(k, places, most)
        ]
        close = sorted(one for one in found if one[0] <= radius)
        return tuple(Neighbour(matrix.keys[place], distance) for distance, place in close[:k])


class Changes:
    """What variants changed against a reference each; grows, never forgets. Not thread-safe."""

    def __init__(self, space: Space) -> None:
        """No change, in `space`."""
        self._space = space
        self._matrix = _Matrix(space)
        self._changed: list[frozenset[str]] = []
        self._codes: list[float] = []

    def __len__(self) -> int:
        """How many changes have been added."""
        return len(self._changed)

    def add(self, key: str, variant: Variant, reference: Variant) -> bool:
        """Add what `variant` changes against `reference`.

        Returns:
            Whether there is such a change in this space.
        """
        try:
            point = self._matrix.point(variant)
            changed = self._changes(variant, reference)
        except InvalidVariant:
            return False
        if not changed:
            return False
        told = np.full_like(point, np.nan)
        rows = [self._matrix.rows[name] for name in changed]
        told[rows] = point[rows]
        self._matrix.add(key, variant, told)
        self._changed.append(changed)
        self._codes.append(float(point[-1]))
        return True

    def repeated(
        self, variant: Variant, reference: Variant, radius: float, share: float = 0.5
    ) -> tuple[Repeated, ...]:
        """The changes that `variant` makes as well, whatever else it changes; nearest first.

        That is: it has every value of the change, each within `radius`, and it has changed one of
        those knobs against `reference`. Of what it has changed, a value must also be nearer than
        `share` of the way back to the reference: a step the other way is another change. What was
        changed with other code is another change whatever the knobs.

        Raises:
            InvalidVariant: `variant` or `reference` is not one of this space.
        """
        matrix, point = self._matrix, self._matrix.point(variant)
        reach = self._reach(variant, reference, radius, share)
        other: Flags = np.zeros(len(self), bool)
        fresh: Flags = np.zeros(len(self), bool)
        for name, row in matrix.rows.items():
            apart = matrix.apart(row, point)
            other |= apart > reach.get(name, radius) + SLACK  # false where nothing was changed
            if name in reach:
                fresh |= ~np.isnan(apart)
        found = []
        for place in np.flatnonzero(fresh & ~other).tolist():
            if self._codes[place] != point[-1]:
                continue
            away = self._away(variant, place)
            if all(distance <= reach.get(name, radius) for name, distance in away.items()):
                found.append((max(away.values()), place))
        return tuple(
            Repeated(matrix.keys[place], distance, self._changed[place])
            for distance, place in sorted(found)
        )

    def _reach(
        self, variant: Variant, reference: Variant, radius: float, share: float
    ) -> dict[str, float]:
        """How far a change of each knob that `variant` changes may be from it."""
        space, names = self._space, self._changes(variant, reference) - {PATCH}
        reach = {name: min(radius, share * space.apart(name, variant, reference)) for name in names}
        return reach if variant.code == reference.code else {**reach, PATCH: radius}

    def _changes(self, variant: Variant, reference: Variant) -> frozenset[str]:
        changed = self._space.changes(variant, reference)
        return frozenset(changed if variant.code == reference.code else (*changed, PATCH))

    def _away(self, variant: Variant, place: int) -> dict[str, float]:
        """How far `variant` is from a change, by changed knob."""
        other, changed = self._matrix.variants[place], self._changed[place]
        away = {name: self._space.apart(name, variant, other) for name in changed - {PATCH}}
        return {**away, PATCH: float(variant.code != other.code)} if PATCH in changed else away


def _no_more_than(k: int, places: Places, apart: Numbers) -> list[int]:
    """All places, but of those that differ in a word the first `k`: they are equally far."""
    word = apart[places] == 1
    kept: list[int] = np.concatenate([places[~word], places[word][:k]]).tolist()
    return kept
