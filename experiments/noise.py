"""The noise of a task in numbers: spread over seeds, its components, what pairing removes. Pure.

What a run scores depends on luck from two sources, the initial parameters and the order of the
data. For a baseline's runs `y(i, d)` with init seed `i` and data seed `d`:

- *total*: standard deviation of `y(s, s)` over seeds `s`, which is the noise a society lives with;
- *init*: of `y(i, 0)` over `i`, the data order held; *data*: of `y(0, d)` over `d`, the init held;
- *sum*: `(init² + data²) / total²`. It is 1 when the sources add up, and larger when they interact,
  because the interaction is in both components but only once in the total;
- *pairing*: how a changed recipe's scores go with the baseline's at equal seeds. The paired
  difference has the variance `2 sd² (1 - rho)`, so a high correlation is as good as many seeds;
- *jitter*: the same seeds run again. Where it is not 0, no two runs are comparable to the last bit.

Intervals are of 95 % and assume normal scores: chi-square for a standard deviation, Fisher's z for
a correlation, an F distribution with Satterthwaite's degrees of freedom for the sum. Scores are in
the task's metric. Failed runs are left out and counted: they have no score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean

from society.experiments import evalue

LEVEL = 0.95
"""Of every interval here."""
POWER = 0.8
"""How likely an effect is found with the number of seeds that `seeds_needed` names."""
ALPHA = 0.05
"""Level of the one-sided test that `seeds_needed` is about."""
MIN_PAIRS = 4
"""Fewest pairs that Fisher's interval is defined for."""

GATE_POWER: Mapping[float, float] = {0.0: 0.115, 0.4: 0.131, 0.8: 0.321, 0.9: 0.613, 0.95: 0.913}
"""Correlation -> how often the gate accepts an improvement of half a noise floor.

Simulated with 20 champion runs, at most 12 seeds, level .05 (`benchmarks/gate.py single`).
"""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Spread:
    """A standard deviation with its chi-square interval."""

    sd: float
    low: float
    high: float
    n: int
    """Scores it was estimated from."""


@dataclass(frozen=True, slots=True)
class Sum:
    """How the variances of the components add up to the total."""

    share: float
    """(init² + data²) / total²; 1 when they simply add up, more when they interact."""
    low: float
    high: float

    @property
    def adds_up(self) -> bool:
        """Whether the interval holds 1."""
        return self.low <= 1.0 <= self.high


@dataclass(frozen=True, slots=True)
class Pairing:
    """A changed recipe against the baseline on the same seeds."""

    n: int
    """Seeds on which both completed."""
    correlation: float | None
    """Pearson's; None where one of the two does not vary."""
    low: float | None
    """Ends of Fisher's interval; None where there is none."""
    high: float | None
    delta: float
    """Mean improvement of the changed recipe over the baseline, in the metric."""
    difference: Spread
    """Standard deviation of the paired difference."""

    def effective(self, sd: float) -> float:
        """The correlation that would give this difference if both had the noise `sd`."""
        return 1.0 - 0.5 * (self.difference.sd / sd) ** 2 if sd > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Jitter:
    """One pair of seeds, run several times."""

    n: int
    """Completed repetitions."""
    equal: bool
    """Whether all scores have the same bits."""
    sd: float
    """Their standard deviation; 0 if they are equal."""


def spread(values: Sequence[float]) -> Spread:
    """The plain standard deviation.

    Raises:
        ValueError: Fewer than two values.
    """
    nu = len(values) - 1
    if nu < 1:
        raise ValueError(f"a standard deviation needs at least two scores, got {len(values)}")
    sse = evalue.sum_of_squares(values)
    tail = 0.5 * (1 - LEVEL)
    low = math.sqrt(sse / evalue.chi_square_quantile(1 - tail, nu))
    high = math.sqrt(sse / evalue.chi_square_quantile(tail, nu))
    return Spread(math.sqrt(sse / nu), low, high, len(values))


def robust_spread(values: Sequence[float]) -> Spread:
    """The standard deviation of winsorised values, as the gate measures its noise floor.

    Raises:
        ValueError: Fewer than two values.
    """
    return Spread(*evalue.noise_interval(values), len(values))


def add_up(total: Spread, init: Spread, data: Spread) -> Sum | None:
    """Whether the components' variances add up to the total's; None without any noise."""
    if total.sd == 0 or init.sd + data.sd == 0:
        return None
    from scipy.special import fdtri

    parts = [(part.sd**2, part.n - 1) for part in (init, data)]
    variance = sum(value for value, _ in parts)
    nu = variance**2 / sum(value**2 / own for value, own in parts)  # Satterthwaite (1946)
    share, tail = variance / total.sd**2, 0.5 * (1 - LEVEL)
    low, high = (float(fdtri(nu, total.n - 1, p)) for p in (tail, 1 - tail))
    return Sum(share, share / high, share / low)


def pairing(
    baseline: Mapping[int, float | None], changed: Mapping[int, float | None], direction: int
) -> Pairing | None:
    """Compare two recipes on their common seeds; None with fewer than two completed pairs.

    Args:
        baseline: seed -> score, None for a failed run.
        changed: The same for the changed recipe.
        direction: -1 if lower scores are better, +1 if higher ones are.
    """
    both = [
        (score, other)
        for seed, score in baseline.items()
        if score is not None and (other := changed.get(seed)) is not None
    ]
    if len(both) < 2:
        return None
    old, new = [a for a, _ in both], [b for _, b in both]
    differences = [direction * (b - a) for a, b in both]
    rho = correlation(old, new)
    low, high = fisher_interval(rho, len(both)) if rho is not None else (None, None)
    return Pairing(len(both), rho, low, high, fmean(differences), spread(differences))


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation, -1..1; None if one side does not vary."""
    mean_a, mean_b = fmean(a), fmean(b)
    scale = math.sqrt(evalue.sum_of_squares(a)) * math.sqrt(evalue.sum_of_squares(b))
    if scale == 0:
        return None
    product = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return min(1.0, max(-1.0, product / scale))


def fisher_interval(rho: float, n: int) -> tuple[float | None, float | None]:
    """Interval of a correlation by Fisher's z; (None, None) below four pairs."""
    if n < MIN_PAIRS:
        return None, None
    if abs(rho) >= 1.0:
        return rho, rho
    z = math.atanh(rho)
    half = _NORMAL.inv_cdf(0.5 + 0.5 * LEVEL) / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)


def jitter(scores: Sequence[float]) -> Jitter | None:
    """How much the same seeds differ from run to run; None below two repetitions."""
    if len(scores) < 2:
        return None
    equal = len(set(scores)) == 1
    return Jitter(len(scores), equal, 0.0 if equal else spread(scores).sd)


def seeds_needed(effect: float, sd: float) -> int:
    """Seeds on which a one-sided t-test (level .05) finds an effect with probability .8.

    The smallest number of at least two whose exact power (non-central t) suffices, searched from
    Guenther's approximation on (The American Statistician 35, 1981).

    Args:
        effect: Size of the mean difference, positive.
        sd: Standard deviation of one difference: of the paired one, or sqrt(2) times the noise
            floor where every run of the two recipes has a seed of its own.
    """
    if sd == 0:
        return 2
    from scipy.special import nctdtr, stdtrit

    z_alpha, z_power = _NORMAL.inv_cdf(1 - ALPHA), _NORMAL.inv_cdf(POWER)
    n = max(2, int(((z_alpha + z_power) * sd / effect) ** 2))
    while nctdtr(n - 1, math.sqrt(n) * effect / sd, stdtrit(n - 1, 1 - ALPHA)) > 1 - POWER:
        n += 1
    return n


def gate_power(rho: float) -> float:
    """How often the gate accepts half a noise floor at a correlation; between `GATE_POWER`'s rows.

    Constant beyond the ends of the table.
    """
    known = sorted(GATE_POWER)
    rho = min(max(rho, known[0]), known[-1])
    for low, high in pairwise(known):
        if rho <= high:
            part = (rho - low) / (high - low)
            return (1 - part) * GATE_POWER[low] + part * GATE_POWER[high]
    return GATE_POWER[known[-1]]


@dataclass(frozen=True, slots=True)
class ClassNoise:
    """One representative change of a class of knobs."""

    group: str
    change: str
    """In words, e.g. `depth=5`."""
    failed: int
    """Runs without a score."""
    pairing: Pairing | None
    """None with fewer than two completed pairs."""


@dataclass(frozen=True, slots=True)
class NoiseStudy:
    """Everything a noise study has found."""

    study: str
    """Id of its record."""
    task: str
    """Name and profile."""
    tier: str
    metric: str
    unit: str
    budget: str
    """Budget of a run, in words."""
    deterministic: bool
    """Whether equal seeds must give equal bits: on a CPU, with a budget that is not in seconds."""
    scores: tuple[float, ...]
    """Completed baseline runs, in the order of the seeds, which stay secret."""
    failed: int
    """Baseline runs without a score."""
    mean: float
    total: Spread
    """Winsorised, as the gate measures it: the noise floor."""
    plain: Spread
    """Of all scores as they are."""
    init: Spread | None
    """None with fewer than two completed runs; so is `data`."""
    data: Spread | None
    sum: Sum | None
    jitter: Jitter | None
    classes: tuple[ClassNoise, ...] = ()
