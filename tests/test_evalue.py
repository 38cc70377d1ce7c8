import math
import random
from statistics import stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from society.experiments import evalue
from society.experiments.evalue import Comparison

improvements = st.floats(-20, 20)
sizes = st.integers(1, 40)
dofs = st.integers(1, 60)
residuals = st.floats(0, 100)


@pytest.mark.parametrize(
    ("d", "n", "m", "s2", "nu", "expected"),
    [
        (2.0, 2, 20, 1.0, 30, 2.48844007),
        (1.2, 3, 20, 1.0, 31, 1.25806996),
        (0.0, 5, 20, 1.0, 33, -1.09861229),
        (-0.7, 5, 20, 1.21, 33, -1.83377571),
        (1.0, 12, 24, 0.81, 44, 3.53592399),
    ],
)
def test_log_e_has_its_published_values(d, n, m, s2, nu, expected):
    assert evalue.log_e(d, 1 / n + 1 / m, s2 * nu, nu, 2) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("d", "v", "s2", "nu", "g"), [(1.3, 0.3, 0.8, 9, 2), (-0.4, 0.2, 1.5, 4, 4)]
)
def test_log_e_is_the_likelihood_ratio_averaged_over_the_half_normal_prior(d, v, s2, nu, g):
    """The t statistic is maximal invariant: its noncentral density ratio, prior-averaged, is e."""
    t = d / math.sqrt(v * s2)

    def weighted(delta: float) -> float:
        prior = 2 * stats.norm.pdf(delta, scale=math.sqrt(g))
        return float(prior * stats.nct.pdf(t, nu, delta / math.sqrt(v)))

    average, _ = integrate.quad(weighted, 0, 12, epsabs=1e-13, epsrel=1e-11)
    expected = math.log(average / stats.t.pdf(t, nu))
    assert evalue.log_e(d, v, s2 * nu, nu, g) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("nu", [1, 2, 3, 5, 7.5, 11, 20, 33, 39, 40, 41, 50, 100, 200])
def test_t_cdf_agrees_with_scipy(nu):
    for t in [-40, -10, -5.5, -2.1, -1, -0.3, -0.01, 0, 0.2, 1.7, 3, 9, 30]:
        assert evalue.student_t_cdf(t, nu) == pytest.approx(special.stdtr(nu, t), abs=5e-15)


def test_t_cdf_keeps_its_digits_in_both_extremes():
    assert evalue.student_t_cdf(-1e-9, 1) == pytest.approx(0.5 - 1e-9 / math.pi, abs=1e-16)
    assert evalue.log_student_t_cdf(-1e30, 60) == pytest.approx(_far_tail(1e30, 60), rel=1e-12)
    with pytest.raises(ValueError, match="degrees of freedom"):
        evalue.student_t_cdf(0.5, 0)


def _far_tail(t, nu):
    """Log of the t tail far out: density constant times nu^((nu+1)/2) / (nu t^nu)."""
    log_c = special.gammaln((nu + 1) / 2) - special.gammaln(nu / 2) - 0.5 * math.log(nu * math.pi)
    return log_c + (nu + 1) / 2 * math.log(nu) - math.log(nu) - nu * math.log(t)


@pytest.mark.parametrize("nu", [1, 2, 7, 30, 99, 300])
@pytest.mark.parametrize("p", [0.001, 0.025, 0.5, 0.975, 0.999])
def test_chi_square_quantile_agrees_with_scipy(nu, p):
    assert evalue.chi_square_quantile(p, nu) == pytest.approx(stats.chi2.ppf(p, nu), rel=1e-10)


def test_chi_square_quantile_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match="strictly between"):
        evalue.chi_square_quantile(1.0, 3)


@settings(derandomize=True)
@given(improvements, improvements, sizes, residuals, dofs)
def test_e_increases_with_the_improvement(a, b, n, sse, nu):
    low, high = sorted((a, b))
    values = [evalue.log_e(d, 1 / n, sse, nu, 4) for d in (low, high)]
    assert values[0] <= values[1] + 1e-9


@settings(derandomize=True)
@given(st.floats(-1e6, 0), sizes, residuals, dofs, st.sampled_from([2.0, 4.0]))
def test_the_null_is_never_favoured_over_no_difference(d, n, sse, nu, g):
    at_zero = evalue.log_e(0, 1 / n, sse, nu, g)
    assert at_zero < 0
    assert evalue.log_e(d, 1 / n, sse, nu, g) <= at_zero + 1e-12


@settings(derandomize=True)
@given(improvements, sizes, st.floats(1e-3, 100), dofs, st.floats(1e-9, 1e9))
def test_e_does_not_depend_on_the_unit(d, n, sse, nu, unit):
    plain = evalue.log_e(d, 1 / n, sse, nu, 2)
    assert evalue.log_e(d * unit, 1 / n, sse * unit**2, nu, 2) == pytest.approx(plain, abs=1e-8)


def test_e_is_finite_without_residuals_and_one_without_degrees_of_freedom():
    assert evalue.log_e(0, 0.25, 0, 3, 4) == pytest.approx(0.5 * math.log(1 / 17))
    assert evalue.log_e(1e-200, 0.25, 0, 3, 4) == pytest.approx(1.5 * math.log(17) + 0.69, abs=0.01)
    assert evalue.log_e(5, 1, 0, 0, 2) == 0


@pytest.mark.parametrize("n", [2, 4, 8])
def test_expected_e_under_the_null_is_at_most_one(n):
    rng = random.Random(n)
    es = []
    for _ in range(4000):
        x = [rng.gauss(0, 1) for _ in range(n)]
        es.append(math.exp(evalue.log_e(sum(x) / n, 1 / n, evalue.sum_of_squares(x), n - 1, 4)))
    assert sum(es) / len(es) <= 1 + 4 * stdev(es) / math.sqrt(len(es))


def test_log_mean_e_averages_without_overflow():
    assert evalue.log_mean_e([0.0, math.log(3)]) == pytest.approx(math.log(2))
    assert evalue.log_mean_e([5000.0, -5000.0]) == pytest.approx(5000 - math.log(2))
    assert evalue.log_mean_e([-math.inf, -math.inf]) == -math.inf
    with pytest.raises(ValueError, match="no e-values"):
        evalue.log_mean_e([])


@pytest.mark.parametrize("d", [-8.0, -3.0, -0.5, 0.0, 0.7, 4.0])
def test_posterior_mean_is_that_of_the_truncated_normal(d):
    mean, sd, shrunken = evalue.posterior(d, 0.3, 0.25, 2)
    assert mean == pytest.approx(d * 2 / 2.3)
    expected = stats.truncnorm.mean(-mean / sd, math.inf, loc=mean, scale=sd)
    assert shrunken == pytest.approx(expected, rel=1e-6)


def test_posterior_without_noise_is_the_shrunken_point():
    assert evalue.posterior(1, 1, 0, 4) == (0.8, 0, 0.8)
    assert evalue.posterior(-1, 1, 0, 4)[2] == 0


@settings(derandomize=True, max_examples=40)
@given(improvements, st.integers(4, 12), st.floats(1e-3, 30))
def test_lower_bound_is_where_e_reaches_its_threshold(d, n, sse):
    one = Comparison(d, 1 / n, sse, n + 8, 2)
    low = evalue.lower_bound([one])
    assert low < d
    assert evalue.log_e(d - low, 1 / n, sse, n + 8, 2) == pytest.approx(math.log(20), abs=1e-5)


@settings(derandomize=True, max_examples=40)
@given(improvements, st.integers(5, 12), st.floats(1e-3, 30), st.floats(-100, 100))
def test_interval_moves_with_the_data_and_is_symmetric(d, n, sse, shift):
    low, high = evalue.interval([Comparison(d, 1 / n, sse, n - 1, 4)])
    assert high - d == pytest.approx(d - low, rel=1e-6)
    moved = evalue.interval([Comparison(d + shift, 1 / n, sse, n - 1, 4)])
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_interval_is_infinite_while_nothing_can_be_refuted():
    assert evalue.interval([Comparison(1, 1 / 3, 0.1, 2, 4)]) == (-math.inf, math.inf)


def test_interval_contains_the_estimate_even_if_the_comparisons_disagree():
    narrow, far = Comparison(0, 0.1, 0.01, 9, 4), Comparison(5, 0.1, 0.9, 9, 2)
    low, high = evalue.interval([narrow, far])
    assert low <= 0 <= high


def test_interval_covers_at_every_look():
    """Looking after every run, the truth is ever outside a 90 % interval in < 10 % of sequences."""
    rng, missed, runs = random.Random(0), 0, 80
    for _ in range(runs):
        x = [rng.gauss(0, 1) for _ in range(3)]
        for _ in range(15):
            x.append(rng.gauss(0, 1))
            one = Comparison(sum(x) / len(x), 1 / len(x), evalue.sum_of_squares(x), len(x) - 1, 4)
            low, high = evalue.interval([one], 0.1)
            if not low <= 0 <= high:
                missed += 1
                break
    assert missed / runs <= 0.1


def test_winsorise_pulls_in_outliers_only():
    clean = [1.0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert evalue.winsorise(clean) == clean
    assert evalue.winsorise([*clean[:-1], 1000])[-1] == pytest.approx(5 + 4 * 1.4826022185 * 2)
    assert evalue.winsorise([1, 2, 900]) == [1, 2, 900]
    assert evalue.winsorise([1] * 8 + [900]) == [1] * 8 + [900]


def test_noise_interval_is_the_chi_square_one():
    rng = random.Random(3)
    x = [rng.gauss(5, 0.02) for _ in range(20)]
    sd, low, high = evalue.noise_interval(x)
    assert sd == pytest.approx(stdev(x))
    assert low == pytest.approx(sd * math.sqrt(19 / stats.chi2.ppf(0.975, 19)))
    assert high == pytest.approx(sd * math.sqrt(19 / stats.chi2.ppf(0.025, 19)))
    with pytest.raises(ValueError, match="at least two"):
        evalue.noise_interval([1.0])


@pytest.mark.parametrize("nu", [1, 3, 7, 22, 100])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.975, 0.999])
def test_student_t_quantile_agrees_with_scipy(p, nu):
    assert evalue.student_t_quantile(p, nu) == pytest.approx(stats.t.ppf(p, nu), abs=1e-9)


def test_student_t_quantile_wants_an_upper_probability():
    with pytest.raises(ValueError, match=r"at least 0\.5"):
        evalue.student_t_quantile(0.2, 3)
