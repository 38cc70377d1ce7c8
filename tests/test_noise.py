"""The statistics of the noise study: against published numbers, by simulation and by property."""

import math
import random
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from society.experiments import evalue, noise
from society.experiments.gate import DEFAULTS

SCORES = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=30)


# --- spread --------------------------------------------------------------------------------------


def test_a_chi_square_interval_by_the_book():
    """Ten values of variance 4: 9 * 4 / 19.0228 and 9 * 4 / 2.70039 (chi-square tables)."""
    values = [0.0, 4.0] * 5  # sum of squares 40, so a variance of 40 / 9
    found = noise.spread(values)
    assert found.sd == pytest.approx(math.sqrt(40 / 9))
    assert found.low == pytest.approx(math.sqrt(40 / 19.0228), rel=1e-5)
    assert found.high == pytest.approx(math.sqrt(40 / 2.70039), rel=1e-5)
    assert found.n == 10


@given(SCORES)
def test_a_spread_lies_in_its_interval(values):
    found = noise.spread(values)
    assert found.low <= found.sd <= found.high
    assert found.sd == pytest.approx(stdev(values), abs=1e-9)


@given(SCORES, st.floats(0.1, 10), st.floats(-5, 5))
def test_a_spread_scales_with_the_scores_and_ignores_their_level(values, scale, level):
    old = noise.spread(values)
    new = noise.spread([scale * value + level for value in values])
    for name in ("sd", "low", "high"):
        assert getattr(new, name) == pytest.approx(scale * getattr(old, name), abs=1e-9)


def test_the_robust_spread_is_the_gates():
    rng = random.Random(1)
    values = [rng.gauss(1.8, 0.01) for _ in range(20)] + [3.0]
    found = noise.robust_spread(values)
    assert (found.sd, found.low, found.high) == evalue.noise_interval(values)
    assert found.sd < 0.02 < noise.spread(values).sd


@pytest.mark.parametrize("measure", [noise.spread, noise.robust_spread])
def test_one_score_has_no_spread(measure):
    with pytest.raises(ValueError, match="at least two"):
        measure([1.0])


# --- components ----------------------------------------------------------------------------------


def grid(rng, init_sd, data_sd, both_sd, n, m):
    """Scores as `calibrate` makes them: total, init and data runs of an additive model."""
    inits = [rng.gauss(0, init_sd) for _ in range(n)]
    orders = [rng.gauss(0, data_sd) for _ in range(n)]
    joint = {(i, d): rng.gauss(0, both_sd) for i in range(n) for d in range(n)}

    def run(i, d):
        return inits[i] + orders[d] + joint[i, d]

    return (
        [run(i, i) for i in range(n)],
        [run(i, 0) for i in range(m)],
        [run(0, d) for d in range(m)],
    )


def test_components_add_up_on_an_additive_model():
    """The interval holds 1 about as often as it says, and the spreads are those put in."""
    rng = random.Random(2)
    held, sums = 0, []
    for _ in range(300):
        total, init, data = map(noise.spread, grid(rng, 0.8, 1.05, 0.0, 24, 12))
        found = noise.add_up(total, init, data)
        sums.append((total.sd**2, init.sd**2, data.sd**2))
        held += found.adds_up
    means = [sum(column) / len(sums) for column in zip(*sums, strict=True)]
    assert means == pytest.approx([0.8**2 + 1.05**2, 0.8**2, 1.05**2], rel=0.1)
    assert held / 300 > 0.93


def test_an_interaction_shows_as_more_than_the_sum():
    """The interaction is in both components: (1 + .5 + 1 + .5) / (1 + 1 + .5) = 1.2 for sd² .5."""
    rng = random.Random(3)
    shares = []
    for _ in range(100):
        parts = grid(rng, 1.0, 1.0, math.sqrt(0.5), 60, 60)
        shares.append(noise.add_up(*map(noise.spread, parts)).share)
    assert sum(shares) / len(shares) == pytest.approx(1.2, abs=0.08)


def test_the_sums_interval_is_that_of_an_f_ratio():
    """One component alone: an ordinary F interval with n - 1 and m - 1 degrees of freedom."""
    total, init = noise.Spread(2.0, 1, 3, 21), noise.Spread(1.0, 0.5, 2, 11)
    found = noise.add_up(total, init, noise.Spread(0.0, 0, 0, 11))
    assert found.share == 0.25
    assert found.low == pytest.approx(0.25 / stats.f.ppf(0.975, 10, 20))
    assert found.high == pytest.approx(0.25 / stats.f.ppf(0.025, 10, 20))
    assert not noise.Sum(2.0, 1.1, 3.0).adds_up


def test_no_noise_has_no_components():
    none = noise.Spread(0.0, 0.0, 0.0, 8)
    assert noise.add_up(none, none, none) is None


# --- pairing -------------------------------------------------------------------------------------


def test_fishers_interval_by_the_book():
    """rho .5 on 28 pairs: z = .5493 ± 1.96/5, back to .156 and .736."""
    low, high = noise.fisher_interval(0.5, 28)
    assert (low, high) == (pytest.approx(0.1560, abs=5e-4), pytest.approx(0.7355, abs=5e-4))
    assert noise.fisher_interval(0.9, 3) == (None, None)
    assert noise.fisher_interval(1.0, 8) == (1.0, 1.0)


@given(st.integers(4, 40), st.integers(0, 1000))
def test_a_correlation_lies_in_its_interval(n, seed):
    rng = random.Random(seed)
    a = [rng.gauss(0, 1) for _ in range(n)]
    b = [0.5 * x + rng.gauss(0, 1) for x in a]
    rho = noise.correlation(a, b)
    assert rho == pytest.approx(stats.pearsonr(a, b).statistic)
    low, high = noise.fisher_interval(rho, n)
    assert -1 <= low <= rho <= high <= 1


def test_pairs_are_common_completed_seeds():
    old = {1: 1.0, 2: 2.0, 3: 4.0, 4: None, 5: 9.0}
    new = {3: 4.5, 2: 2.5, 1: 1.5, 4: 1.0, 5: None}
    found = noise.pairing(old, new, +1)
    assert (found.n, found.delta) == (3, pytest.approx(0.5))
    assert noise.pairing(old, new, -1).delta == pytest.approx(-0.5)
    assert found.correlation == pytest.approx(1.0)
    assert found.difference.sd == pytest.approx(0.0)
    assert found.effective(1.0) == pytest.approx(1.0)
    assert noise.pairing(old, {1: 1.0}, +1) is None


def test_a_recipe_without_noise_has_no_correlation():
    found = noise.pairing({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, -1)
    assert (found.correlation, found.low, found.high) == (None, None, None)
    assert found.effective(0.0) == 0.0


@given(st.floats(0.0, 0.99), st.floats(0.001, 10))
def test_the_effective_correlation_undoes_the_variance_of_a_difference(rho, sd):
    difference = noise.Spread(sd * math.sqrt(2 * (1 - rho)), 0, 0, 8)
    assert noise.Pairing(8, rho, 0, 1, 0.0, difference).effective(sd) == pytest.approx(rho)


# --- jitter and power ----------------------------------------------------------------------------


def test_jitter_compares_bits():
    assert noise.jitter([1.5, 1.5, 1.5]) == noise.Jitter(3, True, 0.0)
    apart = noise.jitter([1.5, math.nextafter(1.5, 2), 1.5])
    assert not apart.equal
    assert apart.sd > 0
    assert noise.jitter([1.5]) is None


@pytest.mark.parametrize(("ratio", "exact"), [(2.0, 27), (1.0, 8), (4.0, 101), (0.5, 4)])
def test_seeds_needed_agrees_with_the_exact_power_of_a_t_test(ratio, exact):
    """By the non-central t distribution of scipy.stats."""
    found = noise.seeds_needed(1.0, ratio)

    def power(n):
        return 1 - stats.nct.cdf(stats.t.ppf(0.95, n - 1), n - 1, math.sqrt(n) / ratio)

    assert power(exact - 1) < noise.POWER <= power(exact)
    assert found == exact


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(1.0, 3.0))
def test_more_noise_needs_more_seeds(effect, sd, more):
    assert 2 <= noise.seeds_needed(effect, sd) <= noise.seeds_needed(effect, more * sd)
    assert noise.seeds_needed(more * effect, sd) <= noise.seeds_needed(effect, sd)


def test_the_gates_power_is_its_simulation_in_between():
    assert noise.gate_power(0.9) == noise.GATE_POWER[0.9]
    assert noise.gate_power(0.85) == pytest.approx((0.321 + 0.613) / 2)
    assert noise.gate_power(-1.0) == noise.GATE_POWER[0.0]
    assert noise.gate_power(1.0) == noise.GATE_POWER[0.95]
    assert DEFAULTS.n_max == 12  # the table was simulated for it
    assert DEFAULTS.alpha == 0.05
