"""Monte Carlo of the acceptance gate's operating characteristics, vectorised.

    python benchmarks/gate.py                    everything (a few minutes on one core)
    python benchmarks/gate.py single --runs 4000 one table, fewer repetitions

Units: improvements in standard deviations of the score across seeds. The noise is simulated
(normal unless a row says otherwise); champion and candidate have correlation `rho` at equal seeds.
`tests/test_gate.py` checks that `Paths` agrees with `society.experiments.gate` claim by claim.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from society.experiments.gate import DEFAULTS as GATE

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
MAD_TO_SD = 1.4826022185056018
N = GATE.n_max


def log_e(d: Array, v: Array | float, sse: Array, nu: Array | float, g: float) -> Array:
    """`society.experiments.evalue.log_e`, element by element."""
    r = v / (v + g)
    ratio = (sse + d * d / v) / (sse + d * d / (v + g))
    log_bf = 0.5 * np.log(r) + 0.5 * (nu + 1) * np.log(ratio)
    u = d * g / (g + v) / np.sqrt(g * v / (g + v) * (sse + d * d / (v + g)) / (nu + 1))
    tail = special.stdtr(np.asarray(nu + 1, dtype=float), u)
    return np.asarray(log_bf + math.log(2) + np.log(np.maximum(tail, 1e-300)))


def predicted(d: Array, s: Array, v_end: Array | float, g: float, n: int, end: Array, need: Array,
              ) -> Array:  # fmt: skip
    """Probability that the mean of `end` runs exceeds its critical value, given that of `n`."""
    r = v_end / (v_end + g)
    excess = np.maximum(0, need - math.log(2) - 0.5 * np.log(r))
    margin = d - s * np.sqrt(2 * excess / (1 - r) * v_end)
    spread = s * np.sqrt(np.maximum(0, end - n) / (end * n))
    z = np.where(spread > 0, margin / np.where(spread > 0, spread, 1), np.inf * np.sign(margin))
    return np.where(spread > 0, special.ndtr(z), margin > 0)


@dataclass
class Paths:
    """Everything the gate would see after 1, 2, ... runs of R claims; failed runs are NaN."""

    pool: Array
    """Champion losses by seed (R, M_max)."""
    candidate: Array
    """Candidate losses on the same seeds (R, n_max)."""
    size: NDArray[np.int64]
    """Runs in the champion's pool (R,)."""
    s2_base: float = 1.0
    nu_base: Array | float = 99.0

    def __post_init__(self) -> None:
        """Clean the pool once; it does not change while the claim is open."""
        rows, width = self.pool.shape
        self.inside = np.arange(width) < self.size[:, None]
        self.k = np.minimum(np.broadcast_to(self.nu_base, rows), GATE.baseline_dof)
        finite = np.where(self.inside, self.pool, np.nan)
        middle = np.nanmedian(finite, axis=1)[:, None]
        mad = GATE.outlier * MAD_TO_SD * np.nanmedian(abs(finite - middle), axis=1)[:, None]
        count = np.sum(~np.isnan(finite), axis=1)
        mad[(count < 8) | (mad[:, 0] == 0)] = np.inf
        sse = self.k * self.s2_base + _squares(np.clip(finite, middle - mad, middle + mad))
        self.reach = GATE.outlier * np.sqrt(sse / (self.k + count - 1))[:, None]
        self.worst = middle + self.reach
        capped = np.where(np.isnan(self.pool), self.worst, np.minimum(self.pool, self.worst))
        own = np.nanmedian(np.where(self.inside, capped, np.nan), axis=1)[:, None]
        self.clean = np.maximum(capped, own - self.reach)
        masked = np.where(self.inside, self.clean, np.nan)
        self.mean = np.nanmean(masked, axis=1)
        self.sse = self.k * self.s2_base + _squares(masked)

    def cleaned(self, n: int) -> Array:
        """The first n candidate runs, clipped as the gate would after n runs."""
        runs = self.candidate[:, :n]
        capped = np.where(np.isnan(runs), self.worst, np.minimum(runs, self.worst))
        return np.asarray(np.maximum(capped, np.median(capped, axis=1)[:, None] - self.reach))

    def step(self, n: int, need: Array) -> tuple[Array, Array, Array, Mask]:
        """After n runs: log e of the pool and of the pairs, P(accept), clear loser."""
        x, m = self.cleaned(n), self.size
        d, v = self.mean - x.mean(axis=1), 1 / n + 1 / m
        sse, nu = self.sse + _squares(x), self.k + m + n - 2
        pool = log_e(d, v, sse, nu, GATE.g_pool)
        s = np.sqrt(sse / nu)
        likely = predicted(d, s, 1 / N + 1 / m, GATE.g_pool, n, np.full(len(d), N), need)
        loser = d < -GATE.early_loss * s * np.sqrt(v)
        pairs = np.minimum(n, m)
        paired = np.zeros(len(d))
        for size in np.unique(pairs[pairs >= 3]):
            rows = pairs == size
            diff = self.clean[rows, :size] - x[rows, :size]
            mean, ss = diff.mean(axis=1), _squares(diff)
            paired[rows] = log_e(mean, 1 / size, ss, size - 1, GATE.g_paired)
            end = size + np.clip(m[rows] - n, 0, N - n)
            sd = np.sqrt(ss / (size - 1))
            more = need[rows] + math.log(2)
            p = predicted(mean, sd, 1 / end, GATE.g_paired, int(size), end, more)
            likely[rows] = np.maximum(likely[rows], p)
        return pool, paired, likely, loser


def _squares(values: Array) -> Array:
    mean = np.nanmean(values, axis=1)[:, None]
    return np.asarray(np.nansum((values - mean) ** 2, axis=1))


@dataclass
class Stops:
    """How R claims ended."""

    accepted: Mask
    n: NDArray[np.int64]
    log_e: Array


def run_gate(paths: Paths, need: Array | float, pool_only: bool = False) -> Stops:
    """Run every claim to its decision; `pool_only` is the gate without the paired e-value."""
    rows = len(paths.pool)
    need = np.broadcast_to(np.asarray(need, dtype=float), rows)
    accepted, stop = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.int64)
    at_stop = np.zeros(rows)
    for n in range(1, N + 1):
        pool, paired, likely, loser = paths.step(n, need)
        log_mean = np.logaddexp(pool, paired) - math.log(2)
        dropped = np.where(np.minimum(n, paths.size) < 3, loser, likely < GATE.futility)
        if pool_only:
            log_mean, dropped = pool, _pool_futility(paths, n, need)
        accept = (n >= GATE.n_min) & (log_mean >= need)
        now = (stop == 0) & (accept | dropped | (n == N))
        accepted |= now & accept
        at_stop[now], stop[now] = log_mean[now], n
        if stop.all():
            break
    return Stops(accepted, stop, at_stop)


def _pool_futility(paths: Paths, n: int, need: Array) -> Mask:
    x, m = paths.cleaned(n), paths.size
    s = np.sqrt((paths.sse + _squares(x)) / (paths.k + m + n - 2))
    d = paths.mean - x.mean(axis=1)
    p = predicted(d, s, 1 / N + 1 / m, GATE.g_pool, n, np.full(len(d), N), need)
    return np.asarray(p < GATE.futility)


def averaged_at(paths: Paths, n: int, pool_only: bool = False) -> Array:
    """Log of the averaged e-value after n runs (or of the pool's alone)."""
    pool, paired, _, _ = paths.step(n, np.zeros(len(paths.pool)))
    if pool_only:
        return pool
    return np.asarray(np.logaddexp(pool, paired) - math.log(2))


Noise = Callable[[np.random.Generator, tuple[int, int]], Array]


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Standard normal noise."""
    return rng.standard_normal(shape)


def student5(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Student's t with 5 degrees of freedom, scaled to unit variance."""
    return rng.standard_t(5, shape) / math.sqrt(5 / 3)


def skewed(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Exponential noise of unit variance and skewness 2: rare bad runs."""
    return rng.standard_exponential(shape) - 1


def mildly_skewed(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Gamma noise of skewness 0.7 and unit variance."""
    return (rng.standard_gamma(8.0, shape) - 8) / math.sqrt(8)


def claims(
    rng: np.random.Generator,
    rows: int,
    delta: float = 0.0,
    rho: float = 0.0,
    size: int = 20,
    *,
    noise: Noise = normal,
    s2_base: float = 1.0,
    nu_base: float = 99.0,
    diverging: float = 0.0,
    candidate_sd: float = 1.0,
    node_sd: float = 0.0,
) -> Paths:
    """Champion pools and candidates that are truly `delta` better."""
    pool = noise(rng, (rows, max(size, N)))
    own = noise(rng, (rows, N))
    runs = candidate_sd * (rho * pool[:, :N] + math.sqrt(1 - rho * rho) * own) - delta
    runs = runs + node_sd * rng.standard_normal((rows, 1))
    if diverging:
        pool[rng.random(pool.shape) < diverging] = np.nan
        runs[rng.random(runs.shape) < diverging] = np.nan
    return Paths(pool, runs, np.full(rows, size), s2_base, nu_base)


NEED = -math.log(GATE.alpha)


def _share(value: Mask) -> str:
    p = float(value.mean())
    return f"{p:.4f}" if p < 0.03 else f"{p:.3f}"


def single(runs: int, seed: int) -> None:
    """Accept probability and mean seeds of one claim, by correlation and true improvement."""
    rng = np.random.default_rng(seed)
    deltas = (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0, 3.5)
    for size in (20, 12, 8):
        print(f"\nP(accept) / mean seeds; champion pool M={size}, alpha={GATE.alpha}, R={runs}")
        print("rho   gate      " + "".join(f"{d:>14}" for d in deltas))
        for rho in (0.0, 0.4, 0.8, 0.9, 0.95):
            for pool_only in (False, True):
                cells = []
                for delta in deltas:
                    stops = run_gate(claims(rng, runs, delta, rho, size), NEED, pool_only)
                    cells.append(f"{_share(stops.accepted):>8}/{stops.n.mean():.2f}")
                name = "pool only" if pool_only else "adopted"
                print(f"{rho:<6}{name:<10}" + "".join(f"{c:>14}" for c in cells))


def robustness(runs: int, seed: int) -> None:
    """False accepts and power where the assumptions are wrong."""
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, object]] = {
        "base": {},
        "no noise floor (nu_base=0)": {"nu_base": 0.0},
        "claimed sigma x0.5": {"s2_base": 0.25},
        "claimed sigma x2": {"s2_base": 4.0},
        "t5 noise": {"noise": student5},
        "skew 0.7 to the bad side": {"noise": mildly_skewed},
        "skew 2 to the bad side": {"noise": skewed},
        "2 % diverge, both arms": {"diverging": 0.02},
        "candidate sd x1.5": {"candidate_sd": 1.5},
        "candidate sd x2": {"candidate_sd": 2.0},
        "node effect sd 0.5, one node": {"node_sd": 0.5},
    }
    for rho in (0.0, 0.9):
        print(f"\nrho={rho}, M=20, R={runs}: false accepts | power at 1 | power at 2")
        for name, options in rows.items():
            cells = [
                _share(run_gate(claims(rng, runs, d, rho, **options), NEED).accepted)  # type: ignore[arg-type]
                for d in (0.0, 1.0, 2.0)
            ]
            print(f"{name:<32}" + "".join(f"{c:>9}" for c in cells))
    paths = claims(rng, runs * 4, 0.0, 0.0)
    luck = paths.clean[:, :6].mean(axis=1)
    hit = run_gate(paths, NEED).accepted
    print(f"\nfalse accepts by luck of the champion on its first six seeds (rho=0, R={runs * 4})")
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
        a, b = np.quantile(luck, [low, high])
        print(f"  {low:.0%}-{high:.0%} unluckiest last: {_share(hit[(luck >= a) & (luck <= b)])}")


def probation(runs: int, seed: int) -> None:
    """Roll-back after the top-up to eight runs, against the old champion's pool."""
    rng = np.random.default_rng(seed)
    print(f"\nprobation, M=20, R={runs}: accepted -> kept after top-up (share rolled back)")
    for rho in (0.0, 0.4, 0.9):
        for delta in (0.0, 0.5, 1.0, 2.0):
            paths = claims(rng, runs, delta, rho)
            stops = run_gate(paths, NEED)
            at = np.maximum(stops.n, GATE.pool_target)
            e = np.stack([averaged_at(paths, n) for n in range(GATE.pool_target, N + 1)], axis=1)
            final = e[np.arange(runs), at - GATE.pool_target]
            kept = stops.accepted & (final >= math.log(GATE.probation_e))
            lost = 1 - kept.sum() / max(1, stops.accepted.sum())
            print(f"  rho {rho}, delta {delta}: {_share(stops.accepted)} -> {_share(kept)}"
                  f" ({lost:.3f})")  # fmt: skip


def missed_at_stop(rng: np.random.Generator, runs: int, delta: float, rho: float) -> Mask:
    """Whether the one-sided 95 % lower bound exceeds the truth at the gate's own stopping time."""
    paths = claims(rng, runs, delta, rho)
    stop = run_gate(paths, NEED).n
    true = replace(paths, candidate=paths.candidate + delta)
    e = np.stack([averaged_at(true, n) for n in range(1, N + 1)], axis=1)
    return np.asarray(e[np.arange(runs), stop - 1] >= math.log(20))


def coverage(runs: int, seed: int) -> None:
    """Miscoverage of the anytime-valid lower bound where claims stop."""
    rng = np.random.default_rng(seed)
    print(f"\nlower bound above the truth at the stop, M=20, R={runs} (allowed: 0.05)")
    for rho in (0.0, 0.4, 0.9):
        cells = [_share(missed_at_stop(rng, runs, d, rho)) for d in (0.0, 0.5, 1.0, 2.0)]
        print(f"  rho {rho}, delta 0, 0.5, 1, 2: " + " ".join(cells))


def resubmit(
    rng: np.random.Generator, runs: int, rule: str, rho: float, alike: float, shared: bool,
    attempts: int = 20, last_delta: float | None = None,
) -> Mask:  # fmt: skip
    """Whether any of `attempts` null siblings is accepted (or the last, truly better one).

    Args:
        rng: Source of randomness.
        runs: Families simulated.
        rule: `none` (no shared capital), `product` (capital may be positive), `debt` (adopted) or
            `floor` (a debt of at most log 10).
        rho: Correlation of champion and candidate at equal seeds.
        alike: Share of the candidate's own noise variance that siblings have in common.
        shared: All attempts are judged on the same seeds, as the society does.
        attempts: Null siblings.
        last_delta: If given, report acceptance of one more sibling with this improvement.
    """
    pool = rng.standard_normal((runs, 24))
    common = rng.standard_normal((runs, N))
    capital, hit = np.zeros(runs), np.zeros(runs, dtype=bool)
    for attempt in range(attempts + (last_delta is not None)):
        last = attempt == attempts
        if not shared:
            pool, common = (rng.standard_normal(a.shape) for a in (pool, common))
        own = math.sqrt(alike) * common
        own = own + math.sqrt(1 - alike) * rng.standard_normal((runs, N))
        x = rho * pool[:, :N] + math.sqrt(1 - rho * rho) * own
        x = x - (last_delta if last and last_delta is not None else 0.0)
        need = NEED - (0 if rule == "none" else capital)
        stops = run_gate(Paths(pool, x, np.full(runs, 20)), need)
        if last:
            return stops.accepted
        hit |= stops.accepted
        capital = np.where(stops.accepted, 0, capital + stops.log_e)
        if rule in ("debt", "floor"):
            capital = np.minimum(capital, 0)
        if rule == "floor":
            capital = np.maximum(capital, -math.log(10))
    return hit


def duplicates(runs: int, seed: int) -> None:
    """P(any of 20 null siblings is accepted), by rule, and what the rule costs a real one."""
    rng = np.random.default_rng(seed)
    print(f"\n20 null siblings, P(any accepted), M=20, R={runs}")
    print("seeds   rho  alike      none   product      debt     floor")
    for shared, rho, alike in ((False, 0.0, 0.0), (False, 0.9, 0.0), (True, 0.0, 0.0),
                               (True, 0.0, 0.9), (True, 0.9, 0.0), (True, 0.9, 0.9)):  # fmt: skip
        cells = [
            _share(resubmit(rng, runs, rule, rho, alike, shared))
            for rule in ("none", "product", "debt", "floor")
        ]
        where = "same" if shared else "fresh"
        print(f"{where:<8}{rho:<5}{alike:<5}" + "".join(f"{c:>10}" for c in cells))
    print("a real sibling accepted after k null ones (same seeds): rho, delta, rule: k=0 1 3 10")
    for rho, delta in ((0.0, 2.0), (0.0, 3.5), (0.9, 0.5), (0.9, 1.0)):
        for rule in ("debt", "floor"):
            cells = [
                _share(resubmit(rng, runs, rule, rho, 0.0, True, k, delta)) for k in (0, 1, 3, 10)
            ]
            print(f"  {rho}, {delta}, {rule:<6}: " + " ".join(cells))


class Worlds:
    """W societies in lock step: finite real ideas, many nulls, one run budget."""

    def __init__(self, worlds: int, p_real: float, rho: float, budget: int, seed: int) -> None:
        """Draw the ideas and give every world a baseline pool of 24 runs, free of charge."""
        self.rng = np.random.default_rng(seed)
        self.w, self.p_real, self.rho, self.budget = worlds, p_real, rho, budget
        ideas = np.minimum(5, 0.25 + self.rng.exponential(1.25, (worlds, 30)))
        self.ideas, self.open = ideas, np.ones_like(ideas, dtype=bool)
        self.debt = np.zeros_like(ideas)
        self.pool = self.rng.standard_normal((worlds, 24))
        self.size = np.full(worlds, 24)
        self.spent = np.zeros(worlds)
        self.gain = np.zeros(worlds)
        self.first = np.ones(worlds, dtype=bool)
        self.filed = np.zeros(worlds)
        self.accepted = np.zeros(worlds)
        self.in200 = np.zeros((2, worlds))
        self.null_filed = np.zeros(2)
        self.at: dict[int, Array] = {}
        self.marks = (300, 1000, 2000)

    def propose(self) -> tuple[Array, NDArray[np.int64]]:
        """One idea per world: its true improvement, and its number if it is real (else -1)."""
        left = self.open.sum(axis=1)
        u = self.rng.random(self.w)
        real = u < self.p_real * left / 30
        pick = np.where(self.open, self.rng.random(self.open.shape), -1).argmax(axis=1)
        harmful = ~real & (self.rng.random(self.w) < 0.5)
        loss = 0.25 + self.rng.exponential(2, self.w)
        delta = np.where(real, self.ideas[np.arange(self.w), pick], np.where(harmful, -loss, 0.0))
        return delta, np.where(real, pick, -1)

    def note(self) -> None:
        """Record the gain of worlds that have passed a mark."""
        for mark in self.marks:
            values = self.at.setdefault(mark, np.full(self.w, np.nan))
            passed = np.isnan(values) & (self.spent >= mark)
            values[passed] = self.gain[passed]

    def society(
        self, use_probation: bool = True, by_pool: bool = False, pool_only: bool = False
    ) -> None:
        """Screen, file, judge, top up, put on probation, until every budget is spent.

        Args:
            use_probation: Whether a faded champion is rolled back.
            by_pool: Screen on a fresh seed against the pool's mean, not on the same seed.
            pool_only: Judge without the paired e-value.
        """
        self.pool_only = pool_only
        noise = math.sqrt(1 + 1 / GATE.pool_target if by_pool else 2 * (1 - self.rho))
        while (self.spent < self.budget).any():
            delta, idea = self.propose()
            seen = delta + noise * self.rng.standard_normal(self.w)
            self.spent += 1
            rows = np.flatnonzero((seen >= GATE.screening_margin) & (self.spent < self.budget))
            if len(rows):
                self.judge(rows, delta[rows], idea[rows], use_probation)
            self.note()

    def judge(self, rows: NDArray[np.int64], delta: Array, idea: NDArray[np.int64],
              use_probation: bool) -> None:  # fmt: skip
        """One claim in each of the worlds `rows`."""
        real = idea >= 0
        debt = np.where(real, self.debt[rows, idea], 0.0)
        fresh = debt == 0
        level = 0.5 * (self.accepted[rows] + 2) / (self.filed[rows] + 20)
        need = -np.log(np.minimum(GATE.alpha, level)) - debt
        own = self.rng.standard_normal((len(rows), 24))
        x = self.rho * self.pool[rows] + math.sqrt(1 - self.rho**2) * own
        nu = np.where(self.first[rows], 0.0, 10.0)
        paths = Paths(self.pool[rows], x[:, :N] - delta[:, None], self.size[rows], 1.0, nu)
        stops = run_gate(paths, need, self.pool_only)
        self.spent[rows] += stops.n
        at = np.maximum(stops.n, GATE.pool_target)
        log_es = stops.log_e.copy()
        kept = stops.accepted.copy()
        if kept.any():
            for n in np.unique(at[kept]):
                sel = kept & (at == n)
                log_es[sel] = averaged_at(paths, int(n), self.pool_only)[sel]
            self.spent[rows[kept]] += (at - stops.n)[kept]
            if use_probation:
                kept &= log_es >= math.log(GATE.probation_e)
        self.count(rows, delta, kept, fresh)
        grow = np.minimum(24, self.size[rows] + (stops.n + 1) // 2)
        grow = np.where(self.first[rows] | stops.accepted, self.size[rows], grow)
        self.spent[rows] += grow - self.size[rows]
        self.size[rows] = grow
        again = real & ~kept
        self.debt[rows[again], idea[again]] = np.minimum(0, debt + log_es)[again]
        won = rows[kept]
        self.pool[won] = x[kept]
        self.size[won], self.first[won] = at[kept], False
        self.gain[won] += delta[kept]
        self.open[rows[kept & real], idea[kept & real]] = False

    def count(self, rows: NDArray[np.int64], delta: Array, kept: Mask, fresh: Mask) -> None:
        """Book-keeping of true and false acceptances."""
        early = kept & (self.filed[rows] < 200)
        self.in200[0, rows] += early & (delta <= 0)
        self.in200[1, rows] += early
        self.null_filed += [int((delta <= 0).sum()), int((kept & (delta <= 0)).sum())]
        self.filed[rows] += fresh
        self.accepted[rows] += kept

    def greedy(self) -> None:
        """Keep whatever beats the record on one run: the rule of karpathy/autoresearch."""
        record = self.rng.standard_normal(self.w)
        while (self.spent < self.budget).any():
            delta, idea = self.propose()
            self.spent += 1
            x = self.rho * record + math.sqrt(1 - self.rho**2) * self.rng.standard_normal(self.w)
            kept = x - delta < record
            self.filed += kept
            self.count(np.arange(self.w), delta, kept, np.zeros(self.w, dtype=bool))
            record = np.where(kept, x, record)
            self.gain += np.where(kept, delta, 0)
            real = np.flatnonzero(kept & (idea >= 0))
            self.open[real, idea[real]] = False
            self.note()

    def line(self) -> str:
        """FDR over the first 200 filed families and gain at the marks, with standard errors."""
        fdr = self.in200[0] / np.maximum(1, self.in200[1])
        cells = [f"{fdr.mean():.3f}±{fdr.std() / math.sqrt(self.w):.3f}"]
        for mark in self.marks:
            g = self.at[mark]
            cells.append(f"{np.nanmean(g):.1f}±{np.nanstd(g) / math.sqrt(self.w):.1f}")
        cells.append(f"{self.null_filed[1] / max(1, self.null_filed[0]):.4f}")
        return "".join(f"{c:>14}" for c in cells)


def stream(runs: int, seed: int) -> None:
    """Whole societies: false discovery rate and true improvement per run spent."""
    worlds = max(20, runs // 100)
    print(f"\nstreams of 2000 runs, W={worlds}; gain = true improvement of the champion")
    print("p_real rho  rule           FDR of 200      gain 300     gain 1000     gain 2000"
          "     FA/null")  # fmt: skip
    for p_real, rho in ((0.1, 0.0), (0.1, 0.9), (0.02, 0.0), (0.02, 0.9)):
        for rule in ("gate", "no probation", "greedy"):
            w = Worlds(worlds, p_real, rho, 2000, seed)
            if rule == "greedy":
                w.greedy()
            else:
                w.society(use_probation=rule == "gate")
            print(f"{p_real:<7}{rho:<5}{rule:<13}" + w.line(), flush=True)


def variants(runs: int, seed: int) -> None:
    """Other constants, each changed alone; the last column is skew 2 noise at rho 0.9."""
    global GATE
    adopted = GATE
    tried: list[dict[str, float]] = [{}]
    tried += [{"n_min": n} for n in (3, 5, 6, 8)]
    tried += [{"g_paired": g} for g in (1.0, 2.0, 8.0, 16.0)]
    tried += [{"g_pool": g} for g in (1.0, 4.0)]
    tried += [{"early_loss": z} for z in (0.5, 1.0, 2.0)]
    tried += [{"futility": p} for p in (0.05, 0.15, 0.2)]
    print(f"\nP(accept) / mean seeds, M=20, R={runs}")
    cells = [(0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.0, 2.0), (0.9, 0.0), (0.9, 0.5), (0.9, 1.0)]
    print(f"{'':<20}" + "".join(f"{f'{rho}, {d}':>13}" for rho, d in cells) + "    skew 2")
    for change in tried:
        GATE = replace(adopted, **change)  # type: ignore[arg-type]
        rng = np.random.default_rng(seed)
        out = []
        for rho, delta in cells:
            stops = run_gate(claims(rng, runs, delta, rho), NEED)
            out.append(f"{_share(stops.accepted):>7}/{stops.n.mean():.2f}")
        tail = _share(run_gate(claims(rng, runs, 0.0, 0.9, noise=skewed), NEED).accepted)
        name = ", ".join(f"{k}={v:g}" for k, v in change.items()) or "adopted"
        print(f"{name:<20}" + "".join(f"{c:>13}" for c in out) + f"{tail:>10}")
    GATE = adopted


def stream_variants(runs: int, seed: int) -> None:
    """Streams with other constants, each changed alone."""
    global GATE
    adopted = GATE
    worlds = max(20, runs // 100)
    tried: list[dict[str, int]] = [{}]
    tried += [{"pool_target": 4}, {"pool_target": 12}, {"n_min": 6}, {"n_min": 8}]
    print(f"\nstreams, p_real=0.1, W={worlds}: FDR of 200, gain 300, 1000, 2000, FA/null")
    for rho in (0.0, 0.9):
        for change in tried:
            GATE = replace(adopted, **change)
            w = Worlds(worlds, 0.1, rho, 2000, seed)
            w.society()
            name = ", ".join(f"{k}={v}" for k, v in change.items()) or "adopted"
            print(f"{rho:<5}{name:<22}" + w.line(), flush=True)
    GATE = adopted
    for pool_only in (False, True):
        w = Worlds(worlds, 0.1, 0.0, 2000, seed)
        w.society(by_pool=True, pool_only=pool_only)
        name = "by pool, pool only" if pool_only else "screening by pool mean"
        print(f"{0.0:<5}{name:<22}" + w.line(), flush=True)


TABLES = {
    "single": single,
    "robustness": robustness,
    "probation": probation,
    "coverage": coverage,
    "duplicates": duplicates,
    "stream": stream,
    "variants": variants,
    "stream_variants": stream_variants,
}


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description="Operating characteristics of the gate.")
    parser.add_argument("tables", nargs="*", metavar="table", help=", ".join(TABLES))
    parser.add_argument("--runs", type=int, default=20_000, help="repetitions per cell")
    parser.add_argument("--seed", type=int, default=20_260_101)
    asked = parser.parse_args()
    unknown = set(asked.tables) - set(TABLES)
    if unknown:
        parser.error(f"unknown table {', '.join(sorted(unknown))}; known: {', '.join(TABLES)}")
    for name in asked.tables or TABLES:
        start = time.perf_counter()
        TABLES[name](asked.runs, asked.seed)
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
