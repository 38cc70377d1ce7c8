"""What each knob does, estimated from all screening runs: pure functions over records.

- One Bayesian ridge regression (MacKay 1992; scikit-learn's `BayesianRidge`) over the knobs that
  were varied: a line and a parabola per numeric knob on the search space's own scale, a level per
  category, a level per screening seed. Its prior shrinks knobs nothing is known about to zero, so
  thirty knobs can be fitted to few runs without inventing effects.
- Effects are read off only at values that were tried: no extrapolation.
- Outliers cannot carry an effect: scores are winsorised at 8, residuals at 3 robust standard
  deviations. Diverged runs have no score; they are counted apart.
- These are *associations over runs that nobody verified*: they steer the search and the reader's
  attention, and are evidence for no claim.

numpy and scikit-learn are imported on the first call.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from society.knobs import Knob, Scalar
from society.records import Outcome, Run, RunKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from society.experiments.space import Space
    from society.experiments.task import Direction

    Floats = NDArray[np.float64]

MIN_RUNS = 3
"""Runs that must have varied a knob before anything is said about it."""
MIN_SPARE = 4.0
"""Effective residual degrees of freedom below which nothing is said at all."""
LEVEL = 0.005
"""Two-sided level of a verdict, per knob."""
WINDOW = 20
"""Runs nearest in time that a run is compared with when looking for dead ends."""


class KnobVerdict(StrEnum):
    """What the runs say about a knob."""

    HELPS = "helps"
    HURTS = "hurts"
    NONE = "no visible effect"
    FEW = "too few runs"


@dataclass(frozen=True, slots=True)
class KnobEffect:
    """The estimated effect of one knob, everything else held fixed."""

    knob: str
    value: Scalar
    """The tried value the estimate is for: the best supported one, or the worst if it hurts."""
    reference: Scalar
    """The value it is compared with."""
    delta: float
    """Estimated (shrunken) improvement over the reference value, in the metric; > 0 is better."""
    se: float
    """Standard error of `delta` (posterior standard deviation); both are 0 with too few runs."""
    runs: int
    """Completed screening runs that had another value than the reference."""
    diverged: int
    """Screening runs with another value than the reference that diverged."""
    verdict: KnobVerdict


@dataclass(frozen=True, slots=True)
class DeadEnd:
    """A region of one knob where every run was worse than its contemporaries, or diverged."""

    knob: str
    low: Scalar
    """Smallest value tried in the region (the value itself for a category)."""
    high: Scalar
    """Largest value tried in the region."""
    runs: int
    """Runs in it."""
    diverged: int
    """How many of them diverged."""
    chance: float
    """Probability of so clean a failure if the knob did nothing: 2 ** -runs."""


def knob_effects(
    runs: Iterable[Run],
    space: Space,
    reference_overrides: Mapping[str, Scalar],
    direction: Direction,
    code: str | None = None,
) -> tuple[KnobEffect, ...]:
    """What each knob of the space does, over all screening runs.

    Only runs that can be compared are used: those of the most common task, tier, budget and split,
    with one and the same code.

    Args:
        runs: Any runs; only screening runs are used.
        space: The search space.
        reference_overrides: Overrides of the variant the effects are compared with; `{}` for the
            baseline.
        direction: Which way of the metric is better.
        code: `Variant.code` of the runs to use; None for those without a patch.

    Returns:
        One effect per knob, in the order of the space; none without a comparable run. A knob that
        was never varied has `runs == 0` and the verdict `too few runs`.
    """
    table = _Table.of(runs, space, reference_overrides, direction, code)
    if not table.completed:
        return ()
    fit = _fit(table) if len(table.completed) > MIN_SPARE else None
    return tuple(_effect(table, fit, name) for name in space.knobs)


def dead_ends(
    runs: Iterable[Run],
    space: Space,
    reference_overrides: Mapping[str, Scalar],
    direction: Direction,
    code: str | None = None,
    *,
    min_runs: int = 3,
    max_chance: float = 0.02,
) -> tuple[DeadEnd, ...]:
    """Regions of knob values where everything was worse or diverged.

    A region is everything tried at or beyond some value on one side of the reference, or one
    category. It is dead when it holds at least `min_runs` runs and none of them is in the better
    half of the runs nearest to it in time (20, itself excluded): compared with all runs, what was
    tried early would look dead only because the society has improved since.

    Args:
        runs: Any runs; only completed and diverged screening runs are used.
        space: The search space.
        reference_overrides: Overrides of the variant that stands for "unchanged".
        direction: Which way of the metric is better.
        code: `Variant.code` of the runs to use; None for those without a patch.
        min_runs: Fewest runs in a region.
        max_chance: Largest `DeadEnd.chance` reported; 1 for none. A knob without any effect shows
            three bad runs in a row one time in eight, hence a default that asks for six.

    Returns:
        The widest dead region per knob and side, most certain first.
    """
    table = _Table.of(runs, space, reference_overrides, direction, code)
    worse = _worse_than_contemporaries(table)
    found = []
    for name in space.knobs:
        for nested in _regions(table, name):
            dead = (region for region in nested if all(worse[run_id] for run_id in region))
            widest = next(dead, [])
            if len(widest) >= min_runs and 2.0 ** -len(widest) <= max_chance:
                found.append(_dead_end(table, name, widest))
    return tuple(sorted(found, key=lambda end: (end.chance, end.knob)))


def describe(effect: KnobEffect, *, unit: str = "") -> str:
    """The effect as a sentence, as it is posted as an insight."""
    change = f"`{effect.knob}` = {_text(effect.value)} instead of {_text(effect.reference)}"
    count = f"{effect.runs} screening run{'s' if effect.runs != 1 else ''}"
    ended = f"; {effect.diverged} more diverged" if effect.diverged else ""
    if effect.verdict is KnobVerdict.FEW:
        return f"Too few runs varied `{effect.knob}` to say anything ({count}{ended})."
    amount = f"{effect.delta:+.4f} ± {effect.se:.4f}" + (f" {unit}" if unit else "")
    if effect.verdict is KnobVerdict.NONE:
        best = f"best tried: {change}, {amount}{ended}"
        return f"No visible effect of `{effect.knob}` in {count} ({best})."
    verb = "helps" if effect.verdict is KnobVerdict.HELPS else "hurts"
    return f"{change} {verb}: {amount} over {count}{ended}; an association, not verified."


def describe_dead_end(end: DeadEnd) -> str:
    """The dead end as a sentence."""
    where = _text(end.low) if end.low == end.high else f"{_text(end.low)} to {_text(end.high)}"
    diverged = f", {end.diverged} of them diverged" if end.diverged else ""
    return (
        f"Dead end: `{end.knob}` = {where} was worse than what was tried around the same time "
        f"in all {end.runs} runs{diverged}."
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """The comparable screening runs and their knob values."""

    space: Space
    reference: Mapping[str, Scalar]
    completed: tuple[Run, ...]
    diverged: tuple[Run, ...]
    values: Mapping[str, Mapping[str, Scalar]]
    """Run id -> knob -> value."""
    levels: Mapping[str, tuple[Scalar, ...]]
    """Category -> the levels tried, without the reference's."""
    sign: float
    """+1 when larger scores are better."""

    @classmethod
    def of(
        cls,
        runs: Iterable[Run],
        space: Space,
        reference_overrides: Mapping[str, Scalar],
        direction: Direction,
        code: str | None,
    ) -> _Table:
        usable = _comparable(runs, code)
        base = {name: space.default(name) for name in space.knobs}
        reference = base | {k: v for k, v in reference_overrides.items() if k in space.knobs}
        values = {run.id: base | dict(run.variant.overrides) for run in usable}
        return cls(
            space=space,
            reference=reference,
            completed=tuple(run for run in usable if run.outcome is Outcome.COMPLETED),
            diverged=tuple(run for run in usable if run.outcome is Outcome.DIVERGED),
            values=values,
            levels={
                name: tuple(sorted({v[name] for v in values.values()} - {same}, key=str))
                for name, same in reference.items()
                if _is_category(space.knobs[name], same)
            },
            sign=direction.improvement(0.0, 1.0),
        )

    def varied(self, runs: Sequence[Run], knob: str) -> list[int]:
        """Positions of the runs whose value differs from the reference's."""
        same = self.reference[knob]
        return [i for i, run in enumerate(runs) if self.values[run.id][knob] != same]


def _comparable(runs: Iterable[Run], code: str | None) -> list[Run]:
    """Screening runs with one code, of the most common stratum, in order of finishing."""
    usable = [
        run
        for run in runs
        if run.kind is RunKind.SCREENING
        and run.variant.code == code
        and (run.outcome is Outcome.DIVERGED or _finite(run.score))
        and run.outcome in (Outcome.COMPLETED, Outcome.DIVERGED)
    ]
    if not usable:
        return []

    def stratum(run: Run) -> tuple[str, str, str, float, str]:
        kind, amount = run.budget.kind.value, run.budget.amount
        return (run.variant.task, run.tier, kind, amount, run.split.value)

    [(most, _)] = Counter(stratum(run) for run in usable).most_common(1)
    kept = [run for run in usable if stratum(run) == most]
    return sorted(kept, key=lambda run: (run.number, run.id))


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


@dataclass(frozen=True, slots=True)
class _Fit:
    """The fitted regression, in the units of the metric."""

    columns: Mapping[str, tuple[int, ...]]
    """Knob -> its columns."""
    scale: Floats
    """Divisor of each column, (P,)."""
    coefficients: Floats
    """(P,)"""
    covariance: Floats
    """(P, P)"""
    threshold: float
    """|delta| / se above which an effect is visible."""


def _fit(table: _Table) -> _Fit | None:
    """Bayesian ridge on the completed runs, refitted once with winsorised residuals."""
    import numpy as np
    from sklearn.linear_model import BayesianRidge
    from threadpoolctl import threadpool_limits

    columns, design = _design(table)
    if design.shape[1] == 0:
        return None
    nonzero = np.maximum((design != 0).sum(axis=0), 1)
    scale = np.sqrt((design**2).sum(axis=0) / nonzero)
    scale[scale == 0] = 1.0
    x = design / scale
    y = _winsorise(np.array([table.sign * (run.score or 0.0) for run in table.completed]), 8.0)
    spread = float(y.std())
    if spread <= 0 or not math.isfinite(spread):
        return None
    y = (y - y.mean()) / spread
    with threadpool_limits(limits=1):  # on busy cores BLAS threads made this ten times slower
        fitted = BayesianRidge().fit(x, y).predict(x)
        model = BayesianRidge().fit(x, fitted + _winsorise(y - fitted, 3.0))
    spare = len(y) - 1 - (x.shape[1] - model.lambda_ * float(np.trace(model.sigma_)))
    if spare < MIN_SPARE:  # it follows the noise, and its standard errors would be far too small
        return None
    return _Fit(
        columns=columns,
        scale=scale,
        coefficients=model.coef_ * spread,
        covariance=model.sigma_ * spread**2,
        threshold=_threshold(spare),
    )


def _design(table: _Table) -> tuple[dict[str, tuple[int, ...]], Floats]:
    """Columns per varied knob, zero at the reference; then a level per screening seed."""
    import numpy as np

    columns: dict[str, tuple[int, ...]] = {}
    parts: list[list[float]] = []
    for name in table.space.knobs:
        if not table.varied(table.completed, name):
            continue
        rows = [_features(table, name, table.values[run.id][name]) for run in table.completed]
        block = list(zip(*rows, strict=True))
        columns[name] = tuple(range(len(parts), len(parts) + len(block)))
        parts.extend(list(column) for column in block)
    seeds = Counter(run.seed for run in table.completed)
    for seed in sorted(seed for seed, count in seeds.items() if 1 < count < len(table.completed)):
        parts.append([float(run.seed == seed) for run in table.completed])
    if not columns:
        return columns, np.zeros((len(table.completed), 0))
    return columns, np.array(parts, dtype=np.float64).T


def _features(table: _Table, name: str, value: Scalar) -> list[float]:
    """A knob's value as regression features, all zero at the reference value."""
    same = table.reference[name]
    if name in table.levels:
        return [float(value == level) for level in table.levels[name]]
    away = table.space.unit(name, value) - table.space.unit(name, same)
    return [away, away * away]


def _is_category(knob: Knob, value: Scalar) -> bool:
    """Whether the knob's values have no order worth a slope."""
    if isinstance(value, bool | str):
        return True
    return bool(knob.choices) and not all(
        isinstance(choice, int | float) and not isinstance(choice, bool) for choice in knob.choices
    )


def _winsorise(values: Floats, width: float) -> Floats:
    """Values pulled in to `width` robust standard deviations around the median."""
    import numpy as np

    middle = float(np.median(values))
    mad = 1.4826 * float(np.median(np.abs(values - middle)))
    if mad <= 0:
        return values
    return np.clip(values, middle - width * mad, middle + width * mad)


def _threshold(spare: float) -> float:
    """Student's two-sided critical value at `LEVEL` on the spare degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(spare, 1 - LEVEL / 2))


def _effect(table: _Table, fit: _Fit | None, name: str) -> KnobEffect:
    varied = table.varied(table.completed, name)
    diverged = len(table.varied(table.diverged, name))
    same = table.reference[name]
    if fit is None or len(varied) < MIN_RUNS:
        return KnobEffect(name, same, same, 0.0, 0.0, len(varied), diverged, KnobVerdict.FEW)
    tried = _tried(table, name, [table.values[table.completed[i].id][name] for i in varied])
    estimates = [(value, *_estimate(table, fit, name, value)) for value in tried]
    best = max(estimates, key=lambda e: e[1] - e[2])
    worst = min(estimates, key=lambda e: e[1] + e[2])
    verdict, (value, delta, se) = KnobVerdict.NONE, best
    if best[1] > fit.threshold * best[2]:
        verdict = KnobVerdict.HELPS
    elif worst[1] < -fit.threshold * worst[2]:
        verdict, (value, delta, se) = KnobVerdict.HURTS, worst
    return KnobEffect(name, value, same, delta, se, len(varied), diverged, verdict)


def _tried(table: _Table, name: str, values: Sequence[Scalar]) -> list[Scalar]:
    """The distinct values, at most sixteen spread evenly over their order."""
    if name in table.levels:
        return [level for level in table.levels[name] if level in values]
    ordered = sorted(set(values), key=lambda value: table.space.unit(name, value))
    if len(ordered) <= 16:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / 15)] for i in range(16)]


def _estimate(table: _Table, fit: _Fit, name: str, value: Scalar) -> tuple[float, float]:
    """Improvement over the reference at one value, and its standard error."""
    import numpy as np

    at = list(fit.columns[name])
    phi = np.array(_features(table, name, value)) / fit.scale[at]
    variance = float(phi @ fit.covariance[np.ix_(at, at)] @ phi)
    return float(phi @ fit.coefficients[at]), math.sqrt(max(variance, 0.0))


def _worse_than_contemporaries(table: _Table) -> dict[str, bool]:
    """Run id -> whether it is worse than the median of the runs nearest in time."""
    runs = sorted(table.completed + table.diverged, key=lambda run: (run.number, run.id))
    gains = [
        table.sign * run.score
        if run.outcome is Outcome.COMPLETED and run.score is not None
        else -math.inf
        for run in runs
    ]
    worse = {}
    for index, run in enumerate(runs):
        start = max(0, min(index - WINDOW // 2, len(runs) - WINDOW - 1))
        near = gains[start:index] + gains[index + 1 : start + WINDOW + 1]
        better = sum(gain > gains[index] for gain in near)
        worse[run.id] = gains[index] == -math.inf or 2 * better > len(near)
    return worse


def _regions(table: _Table, name: str) -> list[list[list[str]]]:
    """Run ids by category, or by side of the reference and cut: widest first within a side."""
    runs = table.completed + table.diverged
    same = table.reference[name]
    values = {run.id: table.values[run.id][name] for run in runs}
    if name in table.levels:
        return [[[i for i, v in values.items() if v == level]] for level in table.levels[name]]
    home = table.space.unit(name, same)
    away = {i: table.space.unit(name, value) - home for i, value in values.items()}
    below = sorted({shift for shift in away.values() if shift < 0}, reverse=True)
    above = sorted({shift for shift in away.values() if shift > 0})
    return [
        [[i for i, shift in away.items() if shift <= cut] for cut in below],
        [[i for i, shift in away.items() if shift >= cut] for cut in above],
    ]


def _dead_end(table: _Table, name: str, region: Sequence[str]) -> DeadEnd:
    values = [table.values[run_id][name] for run_id in region]
    if name not in table.levels:
        values.sort(key=lambda value: table.space.unit(name, value))
    members = set(region)
    return DeadEnd(
        knob=name,
        low=values[0],
        high=values[-1],
        runs=len(region),
        diverged=sum(run.id in members for run in table.diverged),
        chance=2.0 ** -len(region),
    )


def _text(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
