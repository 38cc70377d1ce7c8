import importlib.util
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from society.experiments import evalue, gate
from society.experiments.gate import Evidence, Next, assess
from society.records import Decision

SEED = 7


def _load_simulation() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "gate.py"
    spec = importlib.util.spec_from_file_location("gate_simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_simulation"] = module
    spec.loader.exec_module(module)
    return module


sim = _load_simulation()


def pool(size=20, sd=1.0, mean=0.0, seed=0):
    """A champion pool with exactly this mean and standard deviation."""
    rng = random.Random(seed)
    x = [rng.gauss(0, 1) for _ in range(size)]
    scale = sd / math.sqrt(evalue.sum_of_squares(x) / (size - 1))
    centre = sum(x) / size
    return {i: mean + (value - centre) * scale for i, value in enumerate(x)}


def near(champion, improvement, n, wobble=0.05):
    """A candidate that differs from the champion by an almost constant improvement."""
    return {i: champion[i] - improvement + wobble * (-1) ** i for i in range(n)}


def unrelated(n, improvement, sd=1.0):
    """Candidate runs on seeds the champion has not run, with this mean and this exact spread."""
    base = [(-1) ** i for i in range(n)] if n > 1 else [0]
    sse = evalue.sum_of_squares(base) or 1
    scale = sd * math.sqrt(max(1, n - 1) / sse)
    mean = sum(base) / n
    return {1000 + i: -improvement + (b - mean) * scale for i, b in enumerate(base)}


# ------------------------------------------------------------------ one comparison: boundaries


@pytest.mark.parametrize(
    ("n", "boundary"),
    list(enumerate([1.60, 1.46, 1.35, 1.28, 1.22, 1.17, 1.13, 1.10, 1.07], 4)),
)
def test_accept_boundary_of_the_pool_comparison(n, boundary):
    nu = 10 + 19 + n - 1
    for d, above in ((boundary - 0.006, False), (boundary + 0.006, True)):
        assert (evalue.log_e(d, 1 / n + 1 / 20, nu, nu, 2) >= math.log(20)) is above


@pytest.mark.parametrize(("n", "boundary"), [(4, 1.86), (12, 1.34)])
def test_accept_boundary_of_a_small_pool(n, boundary):
    nu = 10 + 7 + n - 1
    for d, above in ((boundary - 0.006, False), (boundary + 0.006, True)):
        assert (evalue.log_e(d, 1 / n + 1 / 8, nu, nu, 2) >= math.log(20)) is above


@pytest.mark.parametrize(
    ("n", "boundary"),
    list(enumerate([-0.20, 0.20, 0.38, 0.50, 0.59, 0.65, 0.71, 0.76, 0.81, 0.86, 0.91], 1)),
)
def test_futility_boundary_of_the_pool_comparison(n, boundary):
    """Where the predicted probability of acceptance falls below a tenth."""
    for d, unlikely in ((boundary - 0.006, True), (boundary + 0.006, False)):
        now = evalue.Comparison(d, 1 / n + 1 / 20, 30.0, 30.0, 2.0)
        p = gate._exceedance(now, 1 / 12 + 1 / 20, n, 12, math.log(20))
        assert (p < 0.1) is unlikely


# ------------------------------------------------------------------ one claim


def test_a_small_but_steady_improvement_is_accepted_by_its_pairs():
    champion = pool()
    a = assess(Evidence(champion, near(champion, 0.5, 4), 1.0, 10))
    assert a.next is Next.ACCEPT
    assert a.log_e_pool < a.log_need < a.log_e < a.log_e_paired
    assert a.log_e == pytest.approx(np.logaddexp(a.log_e_pool, a.log_e_paired) - math.log(2))
    assert a.mean_delta == pytest.approx(0.5)
    assert a.p_accept == 1
    assert "accepted: e =" in a.reason
    assert "20 needed" in a.reason


def test_nothing_is_accepted_before_four_runs():
    champion = pool()
    for n in (1, 2, 3):
        assert assess(Evidence(champion, near(champion, 5, n), 1.0, 10)).next is Next.CONTINUE


def test_without_common_seeds_the_pool_decides_alone_and_averaging_costs_log_2():
    a = assess(Evidence(pool(), unrelated(6, 2.0), 1.0, 10))
    assert a.next is Next.ACCEPT
    assert a.log_e_paired == 0
    assert a.log_e == pytest.approx(math.log((math.exp(a.log_e_pool) + 1) / 2))
    assert a.mean_delta == pytest.approx(2.0)


@pytest.mark.parametrize(("d", "decision"), [(-2.0, Next.REJECT), (-1.2, Next.CONTINUE)])
def test_before_three_pairs_only_a_clear_loser_is_dropped(d, decision):
    """One run, M=20, s=1: 1.5 standard errors are 1.54."""
    a = assess(Evidence(pool(), {999: -d}, 1.0, 10))
    assert a.next is decision
    assert ("clearly worse" in a.reason) is (decision is Next.REJECT)


def test_futility_needs_both_comparisons_to_be_hopeless():
    champion = pool()
    # Pairs say a steady +0.3 although the pool alone would give up.
    hopeful = assess(Evidence(champion, near(champion, 0.3, 3, wobble=0.2), 1.0, 10))
    assert hopeful.next is Next.CONTINUE
    assert hopeful.p_accept > 0.1
    hopeless = assess(Evidence(champion, near(champion, 0.0, 3, wobble=0.4), 1.0, 10))
    assert hopeless.next is Next.REJECT
    assert hopeless.p_accept < 0.1
    assert "unlikely" in hopeless.reason


def test_the_largest_number_of_seeds_ends_a_claim():
    champion = pool(seed=3)
    a = assess(Evidence(champion, near(champion, 0.4, 12, wobble=0.9), 1.0, 10))
    assert a.next is Next.REJECT
    assert a.p_accept == 0
    assert "largest number" in a.reason


def test_a_change_that_changes_nothing_is_dropped_at_three_pairs():
    champion = pool()
    a = assess(Evidence(champion, {i: champion[i] for i in range(3)}, 1.0, 10))
    assert a.next is Next.REJECT
    assert a.mean_delta == 0


def test_no_evidence_and_unknown_noise_are_said_in_words():
    empty = assess(Evidence(pool(), {}))
    assert (empty.next, empty.n, empty.p_accept) == (Next.CONTINUE, 0, 0.5)
    assert "no verification" in empty.reason
    lonely = assess(Evidence({1: 1.0}, {1: 0.5}))
    assert lonely.next is Next.CONTINUE
    assert "noise is not known" in lonely.reason


def test_family_debt_raises_what_is_needed():
    champion = pool()
    claim = Evidence(champion, near(champion, 0.5, 4, wobble=0.12), 1.0, 10)
    free = assess(claim)
    debt = assess(replace(claim, carried_log_e=-(free.log_e - math.log(20)) - 0.01))
    assert (free.next, debt.next) == (Next.ACCEPT, Next.CONTINUE)
    assert debt.log_need > free.log_need


def test_baseline_degrees_of_freedom_are_capped():
    claim = Evidence(pool(), unrelated(5, 1.0), 0.25, 10)
    assert assess(claim) == assess(replace(claim, nu_base=1e6))
    assert assess(claim) != assess(replace(claim, nu_base=5))


def test_direction_is_only_a_sign():
    champion = pool()
    candidate = near(champion, 0.4, 5, wobble=0.2)
    low = Evidence(champion, candidate, 1.0, 10)
    high = Evidence(
        {seed: -x for seed, x in champion.items()},
        {seed: -x for seed, x in candidate.items()},
        1.0, 10, gate.HIGHER_IS_BETTER,
    )  # fmt: skip
    assert assess(low) == assess(high)
    assert gate.effect(low) == gate.effect(high)
    with pytest.raises(ValueError, match="direction"):
        assess(replace(low, direction=0))


scores = st.floats(-6, 6)
runs_of_a_claim = st.lists(scores, min_size=3, max_size=12)


@settings(derandomize=True)
@given(runs_of_a_claim, st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_only_differences_in_units_of_the_noise_matter(x, unit, shift):
    champion, candidate = pool(), dict(enumerate(x))
    plain = assess(Evidence(champion, candidate, 1.0, 10))
    scaled = assess(
        Evidence(
            {s: unit * (v + shift) for s, v in champion.items()},
            {s: unit * (v + shift) for s, v in candidate.items()},
            unit**2,
            10,
        )
    )
    assert scaled.log_e == pytest.approx(plain.log_e, abs=1e-5)


@settings(derandomize=True)
@given(runs_of_a_claim, st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(x, rng):
    champion, candidate = pool(), dict(enumerate(x))
    mixed = [list(champion.items()), list(candidate.items())]
    for items in mixed:
        rng.shuffle(items)
    a = assess(Evidence(champion, candidate, 1.0, 10))
    b = assess(Evidence(dict(mixed[0]), dict(mixed[1]), 1.0, 10))
    assert b.log_e == pytest.approx(a.log_e, abs=1e-9)


@settings(derandomize=True, max_examples=150)
@given(runs_of_a_claim, st.integers(0, 11), st.sampled_from([None, math.nan, math.inf]))
def test_a_failed_run_never_helps(x, which, failed):
    assume(which < len(x))
    champion, candidate = pool(), dict(enumerate(x))
    before = assess(Evidence(champion, candidate, 1.0, 10))
    after = assess(Evidence(champion, candidate | {which: failed}, 1.0, 10))
    assert after.mean_delta <= before.mean_delta + 1e-12
    assert after.log_e <= max(before.log_e, 0.0) + 1e-9
    if before.next is not Next.ACCEPT:
        assert after.next is not Next.ACCEPT


def test_a_failed_run_counts_four_standard_deviations_against_the_candidate():
    champion = pool()
    a = assess(Evidence(champion, dict.fromkeys(range(3)), 1.0, 10))
    middle = sorted(champion.values())[9:11]
    expected = sum(champion[i] for i in range(3)) / 3 - (sum(middle) / 2 + 4)
    assert a.mean_delta == pytest.approx(expected)
    assert a.next is Next.REJECT


def test_one_miraculous_run_does_not_carry_a_claim():
    champion = pool()
    a = assess(Evidence(champion, near(champion, 0, 5) | {5: -1e6}, 1.0, 10))
    assert a.next is not Next.ACCEPT
    assert a.mean_delta < 1.5


# ------------------------------------------------------------------ levels, families, labels


@pytest.mark.parametrize(
    ("accepted", "filed", "alpha"),
    [(0, 0, 0.05), (0, 1, 1 / 21), (0, 40, 1 / 60), (3, 30, 0.05), (1, 80, 0.015)],
)
def test_alpha_plan(accepted, filed, alpha):
    assert gate.alpha_at(accepted, filed) == pytest.approx(alpha)


def test_debts_are_inherited_and_luck_is_not():
    lost, won = Decision.REJECTED, Decision.ACCEPTED
    assert gate.family_capital([]) == 0
    assert gate.family_capital([(-1.0, lost), (-0.5, Decision.ROLLED_BACK)]) == -1.5
    assert gate.family_capital([(2.5, lost)]) == 0
    assert gate.family_capital([(2.5, Decision.SUPERSEDED), (-1.0, lost)]) == -1
    assert gate.family_capital([(-1.0, lost), (4.5, won)]) == 0


@settings(derandomize=True)
@given(st.lists(st.floats(-5, 5)))
def test_capital_is_never_more_than_the_product(log_es):
    capital = gate.family_capital((e, Decision.REJECTED) for e in log_es)
    assert capital <= min(0, sum(log_es)) + 1e-9


def test_certified_is_e_bh():
    """Four families at 0.1: one e-value needs 40, two need 20 each, three 13.3, four 10."""
    logs = [math.log(e) for e in (21, 1, 25, 0.5)]
    assert gate.certified(logs) == (True, False, True, False)
    assert gate.certified([math.log(e) for e in (39, 1, 19, 0.5)]) == (False,) * 4
    assert gate.certified([math.log(10.01)] * 4) == (True,) * 4
    assert gate.certified([]) == ()


def test_worth_filing_is_half_a_noise_floor():
    assert gate.worth_filing(0.5, 1.0)
    assert not gate.worth_filing(0.49, 1.0)


@pytest.mark.parametrize(
    ("size", "rejected", "owed"),
    [(5, [], 3), (8, [], 0), (8, [3], 2), (10, [3, 4, 12], 8), (24, [12] * 9, 0), (100, [1], 0),
     (8, [12] * 9, 16)],
)  # fmt: skip
def test_pool_growth(size, rejected, owed):
    assert gate.champion_runs_owed(size, rejected) == owed


def test_probation_rolls_back_what_the_top_up_does_not_support():
    champion = pool()
    good = near(champion, 0.5, 8)
    assert not gate.probation(Evidence(champion, good, 1.0, 10))
    faded = near(champion, 0.5, 4) | {i: champion[i] + 1.0 for i in range(4, 8)}
    assert gate.probation(Evidence(champion, faded, 1.0, 10))
    assert not gate.probation(Evidence(champion, {i: faded[i] for i in range(7)}, 1.0, 10))


# ------------------------------------------------------------------ effects


def test_effect_uses_pairs_and_an_interval_of_the_deciding_e_value():
    champion = pool()
    found = gate.effect(Evidence(champion, near(champion, 0.5, 6), 1.0, 10))
    assert found.mean == pytest.approx(0.5)
    assert 0 < found.shrunken < found.mean
    assert 0 < found.low < 0.5 < found.high < 1
    assert found.seeds == 6


def test_effect_falls_back_to_the_pool():
    found = gate.effect(Evidence(pool(), unrelated(6, 1.0), 1.0, 10))
    assert found.mean == pytest.approx(1.0)
    assert found.low < 0.2 < found.shrunken < 1.0 < found.high < math.inf


def test_an_accepted_claim_has_a_positive_lower_bound():
    """Accepting at e >= 20 and the one-sided 95 % bound are the same statement."""
    champion = pool()
    for improvement in (0.05, 0.1, 0.2, 0.4):
        claim = Evidence(champion, near(champion, improvement, 5, wobble=0.1), 1.0, 10)
        sample = gate._Sample.of(claim, gate.DEFAULTS)
        assert sample is not None
        both = [sample.paired(gate.DEFAULTS), sample.pool(gate.DEFAULTS)]
        assert (evalue.lower_bound(both) > 0) is (assess(claim).log_e > math.log(20))


def test_effect_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="candidate run"):
        gate.effect(Evidence(pool(), {}))


def test_paired_gain_for_the_headline():
    old = {1: 1.00, 2: 1.10, 3: 1.20, 4: 0.90, 9: 5.0}
    new = {1: 0.80, 2: 0.95, 3: 1.02, 4: 0.72}
    gain = gate.paired_gain(old, new)
    assert gain.mean == pytest.approx(0.1775)
    assert 0 < gain.low < gain.shrunken < gain.mean < gain.high
    assert gain.seeds == 4
    assert gate.paired_gain(old, new, gate.HIGHER_IS_BETTER).mean == pytest.approx(-0.1775)


def test_paired_gain_of_an_unchanged_champion_is_exactly_zero():
    old = {seed: 1.0 + seed / 7 for seed in range(6)}
    gain = gate.paired_gain(old, old)
    assert (gain.mean, gain.shrunken) == (0, 0)
    assert gain.low == pytest.approx(0, abs=1e-100)
    assert gain.high == pytest.approx(0, abs=1e-100)


def test_paired_gain_counts_failures_and_admits_ignorance():
    old = {1: 1.0, 2: 1.1, 3: 1.2, 4: 0.9}
    whole = gate.paired_gain(old, {s: x - 0.2 for s, x in old.items()})
    failed = gate.paired_gain(old, {s: x - 0.2 for s, x in old.items()} | {4: None})
    assert failed.mean < whole.mean
    assert gate.paired_gain({1: 1.0}, {1: 0.9}).low == -math.inf
    with pytest.raises(ValueError, match="common seed"):
        gate.paired_gain({1: 1.0}, {2: 1.0})
    with pytest.raises(ValueError, match="two completed"):
        gate.paired_gain({1: 1.0}, {1: None})


# ------------------------------------------------------------------ Monte Carlo


@pytest.mark.parametrize(
    ("options", "size"),
    [({"rho": 0.8, "delta": 0.5}, 20), ({"delta": 1.0, "diverging": 0.1}, 20), ({"rho": 0.5}, 8)],
)
def test_the_simulation_is_the_gate(options, size):
    """Vectorised and scalar code agree on every claim: stop, decision, e-value."""
    paths = sim.claims(np.random.default_rng(SEED), 60, size=size, **options)
    stops = sim.run_gate(paths, sim.NEED)
    for row in range(60):
        champion = dict(enumerate(paths.pool[row, :size].tolist()))
        for n in range(1, 13):
            candidate = dict(enumerate(paths.candidate[row, :n].tolist()))
            a = assess(Evidence(champion, candidate, 1.0, 99))
            if a.next is not Next.CONTINUE:
                break
        assert (a.n, a.next is Next.ACCEPT) == (stops.n[row], stops.accepted[row])
        assert a.log_e == pytest.approx(stops.log_e[row], abs=1e-8)


def share_is_within(hits, low, high, sigmas=4.0):
    """Whether a share is inside [low, high], give or take its Monte Carlo error."""
    runs = len(hits)
    return (
        low - sigmas * math.sqrt(low * (1 - low) / runs)
        <= hits.mean()
        <= high + sigmas * math.sqrt(high * (1 - high) / runs)
    )


@pytest.mark.parametrize(
    ("rho", "delta", "accepted", "seeds"),
    # Measured with `python benchmarks/gate.py single --runs 20000`; see docs/statistics.md.
    MEASURED := [
        (0.0, 0.0, 0.0145, 3.95),
        (0.0, 0.5, 0.116, 5.75),
        (0.0, 1.0, 0.477, 7.07),
        (0.0, 2.0, 0.989, 4.70),
        (0.9, 0.0, 0.0091, 4.00),
        (0.9, 0.25, 0.133, 6.39),
        (0.9, 0.5, 0.614, 8.11),
        (0.9, 1.0, 0.995, 5.36),
    ],
)
def test_operating_characteristics(rho, delta, accepted, seeds):
    stops = sim.run_gate(sim.claims(np.random.default_rng(SEED), 3000, delta, rho), sim.NEED)
    assert share_is_within(stops.accepted, accepted, accepted)
    assert abs(stops.n.mean() - seeds) <= 4 * stops.n.std() / math.sqrt(3000) + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("rho", "delta", "accepted", "seeds"), MEASURED)
def test_operating_characteristics_at_scale(rho, delta, accepted, seeds):
    stops = sim.run_gate(sim.claims(np.random.default_rng(SEED), 60_000, delta, rho), sim.NEED)
    assert share_is_within(stops.accepted, accepted, accepted, sigmas=6)
    assert stops.n.mean() == pytest.approx(seeds, abs=0.07)


@pytest.mark.parametrize(
    ("delta", "low", "high", "seeds"),
    [
        (0.0, 0.0055, 0.011, 2.55),
        (-1.0, 0, 0.001, 1.32),
        (1.0, 0.448, 0.48, 5.8),
        (2.0, 0.967, 0.98, 4.5),
        (3.5, 0.998, 1, 4.02),
    ],
)
def test_the_pool_comparison_alone_keeps_its_bars(delta, low, high, seeds):
    paths = sim.claims(np.random.default_rng(SEED), 4000, delta)
    stops = sim.run_gate(paths, sim.NEED, pool_only=True)
    assert share_is_within(stops.accepted, low, high)
    assert stops.n.mean() <= seeds + 4 * stops.n.std() / math.sqrt(4000)


def test_a_stricter_level_gives_fewer_false_accepts():
    stops = sim.run_gate(sim.claims(np.random.default_rng(SEED), 8000), math.log(100))
    assert share_is_within(stops.accepted, 0, 0.004)


@pytest.mark.parametrize(
    "wrong",
    [{"s2_base": 0.25}, {"noise": sim.student5}, {"diverging": 0.02}, {"nu_base": 0.0}],
    ids=["sigma", "tails", "diverging", "no floor"],
)
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_wrong_assumptions_keep_false_accepts_below_five_percent(rho, wrong):
    paths = sim.claims(np.random.default_rng(SEED), 3000, 0.0, rho, **wrong)
    assert share_is_within(sim.run_gate(paths, sim.NEED).accepted, 0, 0.03)


def test_probation_costs_little_power_and_removes_false_accepts():
    for delta, least in ((0.0, 0.15), (2.0, 0.0)):
        paths = sim.claims(np.random.default_rng(SEED), 8000, delta)
        stops = sim.run_gate(paths, sim.NEED)
        e8 = sim.averaged_at(paths, 8)
        early = stops.accepted & (stops.n <= 8)
        lost = (early & (e8 < math.log(3))).sum() / early.sum()
        assert lost >= least
        assert delta == 0 or lost < 0.005


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_the_lower_bound_holds_where_claims_stop(rho):
    for delta in (0.0, 1.0, 2.0):
        missed = sim.missed_at_stop(np.random.default_rng(SEED), 3000, delta, rho)
        assert share_is_within(missed, 0, 0.02)


@pytest.mark.parametrize(("shared", "alike"), [(False, 0.0), (True, 0.9)])
def test_resubmitting_a_dead_idea_twenty_times(shared, alike):
    rng = np.random.default_rng(SEED)
    hits = sim.resubmit(rng, 1000, "debt", 0.0, alike, shared)
    assert share_is_within(hits, 0, 0.045)


def test_without_shared_capital_resubmission_pays():
    """The control of the test above: it can fail."""
    hits = sim.resubmit(np.random.default_rng(SEED), 1000, "none", 0.0, 0.0, False)
    assert hits.mean() > 0.12


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_streams_keep_their_false_discovery_rate(rho):
    worlds = sim.Worlds(200, 0.1, rho, 2000, SEED)
    worlds.society()
    fdr = worlds.in200[0] / np.maximum(1, worlds.in200[1])
    assert fdr.mean() <= 0.05
    greedy = sim.Worlds(200, 0.1, rho, 2000, SEED)
    greedy.greedy()
    false = greedy.in200[0] / np.maximum(1, greedy.in200[1])
    assert false.mean() > 0.4


def test_the_mean_of_fresh_seeds_lies_where_expected_in_95_percent():
    rng = np.random.default_rng(8)
    inside, rounds = 0, 2000
    for _ in range(rounds):
        shared, gains = rng.normal(1.8, 0.01, 12), rng.normal(0.05, 0.004, 20)
        baseline = dict(enumerate(shared))
        champion = {seed: baseline[seed] - gains[seed] for seed in baseline}
        low, high = gate.expected_gain(baseline, champion, 8)
        inside += low <= gains[12:].mean() <= high
    assert abs(inside / rounds - 0.95) < 4 * (0.05 * 0.95 / rounds) ** 0.5


def test_no_expectation_from_a_single_seed():
    with pytest.raises(ValueError, match="two common seeds"):
        gate.expected_gain({1: 1.8}, {1: 1.7, 2: 1.7}, 8)
