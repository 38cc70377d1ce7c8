"""E-values and anytime-valid intervals for a mean with unknown variance. Standard library only.

One statistic serves the whole gate: the right-Haar Bayes factor of a normal mean with unknown
variance (Pérez-Ortiz, Lardy, de Heide & Grünwald, Annals of Statistics 52, 2024; Wang & Ramdas,
"Anytime-valid t-tests and confidence sequences", arXiv:2310.03722), made one-sided by a
half-normal prior on the standardised effect. It is an e-value at every sample size, so a test may
stop, go on or be multiplied with later evidence at will (Grünwald, de Heide & Koolen, "Safe
testing", JRSS B 86, 2024).

Conventions: `d` is an observed improvement (positive = better), `v` its variance in units of
sigma², `sse` a residual sum of squares with `nu` degrees of freedom, `g` the prior variance of the
effect in units of sigma². Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

_TINY = 1e-300
_MAX_TERMS = 10_000
_MAD_TO_SD = 1.4826022185056018
"""Makes the median absolute deviation estimate the standard deviation of a normal."""
_CLIP = 4.0
"""Values further than this many (robust) standard deviations from the median are pulled in."""
_MIN_WINSORISED = 8
"""Below this many values the MAD is too noisy to clip by: it would shrink clean samples."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sufficient statistics of one comparison of two means."""

    d: float
    """Observed improvement, in the metric; positive = better."""
    v: float
    """Variance of `d` in units of sigma²: 1/n for paired, 1/n + 1/M for a pool."""
    sse: float
    """Residual sum of squares, metric²."""
    nu: float
    """Its degrees of freedom; 0 means nothing is known and the e-value is 1."""
    g: float
    """Prior variance of the effect, in units of sigma²."""

    @property
    def s2(self) -> float:
        """Estimate of sigma², metric²; 0 without degrees of freedom."""
        return self.sse / self.nu if self.nu > 0 else 0.0

    @property
    def log_e(self) -> float:
        """Log e-value against "no improvement"."""
        return log_e(self.d, self.v, self.sse, self.nu, self.g)


# --------------------------------------------------------------------------- special functions


def student_t_cdf(t: float, nu: float) -> float:
    """P(T <= t) for Student's t with `nu` > 0 degrees of freedom."""
    return math.exp(log_student_t_cdf(t, nu))


def log_student_t_cdf(t: float, nu: float) -> float:
    """Log of `student_t_cdf`; finite where the probability itself underflows."""
    if not nu > 0:
        raise ValueError(f"degrees of freedom must be positive, got {nu}")
    if t == 0:
        return -math.log(2)
    if t > 0:
        return math.log1p(-math.exp(log_student_t_cdf(-t, nu)))
    odds = t * t / nu
    log_x, log_y = -math.log1p(odds), -math.log1p(1 / odds) if odds else -math.inf
    x = 1 / (1 + odds)
    log_front = 0.5 * (nu * log_x + log_y) - _log_beta_half(nu / 2)
    if x < (nu / 2 + 1) / (nu / 2 + 2.5):
        return log_front + math.log(_beta_fraction(nu / 2, 0.5, x) / nu)
    return math.log(0.5 - math.exp(log_front) * _beta_fraction(0.5, nu / 2, 1 - x))


def _log_beta_half(a: float) -> float:
    """Log of the beta function B(a, 1/2), by a series where two lgamma would lose digits."""
    if a < 20:
        return math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    u = 1 / a
    series = -1 / 8 + u * u * (1 / 192 + u * u * (-1 / 640 + u * u * (17 / 14336)))
    return 0.5 * math.log(math.pi * u) - u * series


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, by the modified Lentz method."""
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 + term * d
            c = 1 + term / c
            d = 1 / (d if abs(d) > _TINY else _TINY)
            c = c if abs(c) > _TINY else _TINY
            value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value


def student_t_quantile(p: float, nu: float) -> float:
    """The t with P(T <= t) = p, for 0.5 <= p < 1 and `nu` > 0 degrees of freedom."""
    if not 0.5 <= p < 1:
        raise ValueError(f"a probability of at least 0.5 and below 1 is needed, got {p}")
    high = 2.0
    while student_t_cdf(high, nu) < p:
        high *= 2
    return _bisect(lambda t: student_t_cdf(t, nu) < p, 0.0, high)


def chi_square_quantile(p: float, nu: float) -> float:
    """The x with P(chi² <= x) = p, for 0 < p < 1 and `nu` > 0 degrees of freedom."""
    if not 0 < p < 1:
        raise ValueError(f"a probability strictly between 0 and 1 is needed, got {p}")
    high = nu + 1.0
    while _gamma_p(nu / 2, high / 2) < p:
        high *= 2
    return _bisect(lambda x: _gamma_p(nu / 2, x / 2) < p, 0.0, high)


def _gamma_p(a: float, x: float) -> float:
    """Regularised lower incomplete gamma function: series below a + 1, continued fraction above."""
    if x <= 0:
        return 0.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for k in range(1, _MAX_TERMS):
            term *= x / (a + k)
            total += term
            if term < total * 1e-16:
                break
        return front * total
    return 1 - front * _gamma_fraction(a, x)


def _gamma_fraction(a: float, x: float) -> float:
    """Continued fraction of the upper incomplete gamma function, by the modified Lentz method."""
    b = x + 1 - a
    c, d = 1 / _TINY, 1 / b
    value = d
    for k in range(1, _MAX_TERMS):
        term = -k * (k - a)
        b += 2
        d = term * d + b
        d = 1 / (d if abs(d) > _TINY else _TINY)
        c = b + term / c
        value *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return value


def _bisect(is_left: Callable[[float], bool], low: float, high: float) -> float:
    """The point between `low` (left) and `high` (not left) where `is_left` changes."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high or high - low <= 1e-13 * max(abs(low), abs(high)):
            break
        if is_left(middle):
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


# --------------------------------------------------------------------------- e-values


def log_e(d: float, v: float, sse: float, nu: float, g: float) -> float:
    """Log e-value of an improvement: one-sided, delta/sigma half-normal with variance `g`.

    Two-sided right-Haar Bayes factor, times the posterior probability that the effect is positive
    over its prior probability 1/2 (the encompassing-prior identity). It increases in `d`, so it is
    valid for the whole null "no better". Without degrees of freedom it is 0 (e = 1).
    """
    if nu <= 0:
        return 0.0
    r = v / (v + g)
    q = sse / d / d if d else math.inf  # residuals in units of d²: no overflow at any scale
    if math.isinf(q):
        return 0.5 * math.log(r)
    log_bf = 0.5 * math.log(r) + 0.5 * (nu + 1) * math.log((q + 1 / v) / (q + 1 / (v + g)))
    spread = math.sqrt(g * v / (g + v) * (q + 1 / (v + g)) / (nu + 1))
    u = math.copysign(g / (g + v), d) / spread
    return log_bf + math.log(2) + log_student_t_cdf(u, nu + 1)


def log_mean_e(log_es: Sequence[float]) -> float:
    """Log of the average of e-values, which is an e-value whatever their dependence."""
    if not log_es:
        raise ValueError("the mean of no e-values is undefined")
    top = max(log_es)
    if math.isinf(top):
        return top
    return top + math.log(fmean(math.exp(value - top) for value in log_es))


def posterior(d: float, v: float, s2: float, g: float) -> tuple[float, float, float]:
    """Half-normal posterior of an effect: location, spread and mean, in the metric.

    Args:
        d: Observed improvement.
        v: Its variance in units of sigma².
        s2: Estimate of sigma², metric².
        g: Prior variance in units of sigma².

    Returns:
        `(mean, sd, shrunken)`: location and spread of the normal before it is truncated at zero,
        and the mean after, which is what is reported. It is never negative.
    """
    mean = d * g / (g + v)
    sd = math.sqrt(g * v * s2 / (g + v))
    if sd == 0:
        return mean, sd, max(mean, 0.0)
    z = mean / sd
    if z < -6:
        return mean, sd, sd / _mills_tail(-z)
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return mean, sd, mean + sd * density / (0.5 * math.erfc(-z / math.sqrt(2)))


def _mills_tail(x: float) -> float:
    """1 / (hazard(x) - x) of the standard normal for x > 0, by Laplace's continued fraction."""
    value = x
    for k in range(60, 1, -1):
        value = x + k / value
    return value


# --------------------------------------------------------------------------- intervals


def lower_bound(comparisons: Sequence[Comparison], alpha: float = 0.05) -> float:
    """Largest delta0 that the averaged e-value still refutes: e(d - delta0) >= 1/alpha.

    The truth lies below it, at any time of a sequential experiment, with probability at most
    `alpha`. Minus infinity if the data cannot refute anything at that level yet.
    """
    need = -math.log(alpha)
    top = max(c.d for c in comparisons)
    scale = max(math.sqrt(c.v * c.s2) for c in comparisons)
    step = max(scale, 1e-12 * max(abs(c.d) for c in comparisons), 1e-150)

    def refuted(delta0: float) -> bool:
        return log_mean_e([replace(c, d=c.d - delta0).log_e for c in comparisons]) >= need

    for _ in range(64):
        if refuted(top - step):
            return _bisect(refuted, top - step, top)
        step *= 2
    return -math.inf


def interval(comparisons: Sequence[Comparison], alpha: float = 0.05) -> tuple[float, float]:
    """Two-sided anytime-valid interval of level 1 - `alpha`: each side at alpha/2.

    Several comparisons of the same two means are combined by averaging their e-values. The
    interval is widened, where that is needed, to contain the first comparison's `d`.
    """
    low = lower_bound(comparisons, alpha / 2)
    high = -lower_bound([replace(c, d=-c.d) for c in comparisons], alpha / 2)
    return min(low, comparisons[0].d), max(high, comparisons[0].d)


# --------------------------------------------------------------------------- robust spread


def winsorise(values: Sequence[float]) -> list[float]:
    """The values, pulled in to the median ± 4 robust standard deviations (1.4826 MAD).

    Fewer than 8 values, or values of which more than half are equal, are returned as they are.
    """
    if len(values) < _MIN_WINSORISED:
        return list(values)
    middle = median(values)
    reach = _CLIP * _MAD_TO_SD * median(abs(value - middle) for value in values)
    if reach == 0:
        return list(values)
    return [min(max(value, middle - reach), middle + reach) for value in values]


def sum_of_squares(values: Sequence[float]) -> float:
    """Sum of squared deviations from the mean."""
    if len(set(values)) < 2:
        return 0.0
    mean = fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def noise_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Winsorised standard deviation of scores across seeds with its 95 % chi-square interval.

    Args:
        values: Scores of the same variant on different seeds; at least two.

    Returns:
        `(sd, low, high)` in the metric.

    Raises:
        ValueError: Fewer than two values.
    """
    nu = len(values) - 1
    if nu < 1:
        raise ValueError(f"a noise floor needs at least two scores, got {len(values)}")
    sse = sum_of_squares(winsorise(values))
    low = math.sqrt(sse / chi_square_quantile(0.975, nu))
    high = math.sqrt(sse / chi_square_quantile(0.025, nu))
    return math.sqrt(sse / nu), low, high
