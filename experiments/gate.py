"""The acceptance gate: when a claim is believed, when it is dropped, what it is worth.

A claim says "this candidate beats the champion". Its evidence is the candidate's runs on the first
seeds of a secret list, and the champion's pool of runs on the same list. Two e-values are computed
(see `society.experiments.evalue`) and averaged:

- *paired*: differences on the common seeds, where data order and initialisation are shared;
- *pool*: the candidate's mean against the mean of the whole champion pool, whose residuals also
  estimate the noise.

An average of e-values is an e-value (Wang & Ramdas, "False discovery rate control with e-values",
JRSS B 84, 2022), so nobody has to know how correlated the seeds are. The claim is accepted at the
first n >= 4 with e >= 1/alpha, and dropped as soon as acceptance has become unlikely by both
comparisons. Measured error rates, power and cost: `docs/statistics.md`.

Everything here is a pure function of numbers. Scores are in the task's metric; `delta` is positive
when the candidate is better, whatever the metric's direction. Runs that diverged, crashed twice,
timed out or were refused are `None` (or not finite) and count as very bad runs: they are never
left out. All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist, fmean, median

from society.experiments import evalue
from society.experiments.evalue import Comparison
from society.records import Decision, Effect

LOWER_IS_BETTER = -1
HIGHER_IS_BETTER = +1
_CONFIDENCE = 0.05
"""Reported intervals miss the truth, at any time, at most this often."""
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Every constant of the gate, once."""

    alpha: float = 0.05
    """Cap of the level a family of claims is tested at; also its usual value."""
    n_min: int = 4
    """Candidate runs before a claim may be accepted."""
    n_max: int = 12
    """Candidate runs after which an undecided claim is rejected."""
    g_pool: float = 2.0
    """Prior variance of the effect, pool comparison, in units of the seed variance."""
    g_paired: float = 4.0
    """Prior variance of the effect, paired comparison, in units of the differences' variance."""
    pool_target: int = 8
    """Runs every champion is topped up to, and runs probation needs."""
    pool_max: int = 24
    """Runs beyond which a champion's pool does not grow."""
    screening_margin: float = 0.5
    """Screening improvement worth a claim, in units of the noise floor."""
    probation_e: float = 3.0
    """A topped-up champion whose e-value falls below this is rolled back."""
    baseline_dof: float = 10.0
    """Most degrees of freedom the noise floor of the baseline may contribute."""
    futility: float = 0.1
    """Predicted probability of acceptance below which a claim is dropped."""
    early_loss: float = 1.5
    """Before three pairs: standard errors below the pool mean at which a claim is dropped."""
    outlier: float = 4.0
    """Standard deviations from the median at which scores are clipped and failures are put."""
    certified_fdr: float = 0.1
    """False discovery rate of the "certified" label."""


DEFAULTS = GateSettings()


class Next(StrEnum):
    """What to do with a claim now."""

    ACCEPT = "accept"
    REJECT = "reject"
    CONTINUE = "continue"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The numbers a claim is judged by."""

    champion: Mapping[int, float | None]
    """Champion pool: seed -> score, None for a failed run."""
    candidate: Mapping[int, float | None]
    """Candidate: seed -> score, None for a failed run. Never contains the screening run."""
    s2_base: float = 0.0
    """Seed variance of the baseline (noise floor squared), metric²."""
    nu_base: float = 0.0
    """Its degrees of freedom; 0 if there is none or the pool *is* the baseline's runs."""
    direction: int = LOWER_IS_BETTER
    """-1 if lower scores are better, +1 if higher ones are."""
    carried_log_e: float = 0.0
    """Log capital of the claim's family, see `family_capital`."""
    alpha: float = DEFAULTS.alpha
    """Level frozen when the claim was filed, see `alpha_at`."""

    @property
    def log_need(self) -> float:
        """The log e-value this claim has to reach."""
        return -math.log(self.alpha) - self.carried_log_e


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the gate says about a claim."""

    next: Next
    n: int
    """Candidate runs, failed ones included."""
    mean_delta: float
    """Mean improvement, metric; paired from three pairs on, otherwise against the pool."""
    log_e_pool: float
    log_e_paired: float
    log_e: float
    """Log of the average of the two e-values."""
    log_need: float
    """The log e-value needed for acceptance, family capital included."""
    p_accept: float
    """Predicted probability that the claim will be accepted, 0..1."""
    reason: str
    """The decision in words."""


# --------------------------------------------------------------------------- levels and labels


def alpha_at(accepted: int, filed: int, settings: GateSettings = DEFAULTS) -> float:
    """Level for the next family: tightened while claims fail much more often than they succeed.

    A heuristic, not a theorem; equals the cap while at least one family in ten succeeds.

    Args:
        accepted: Claims accepted so far and not rolled back.
        filed: Families filed so far.
        settings: Constants of the gate.
    """
    return min(settings.alpha, 0.5 * (accepted + 2) / (filed + 20))


def family_capital(stops: Iterable[tuple[float, Decision]]) -> float:
    """Log capital that earlier claims of the same idea hand to the next one; never positive.

    E-values of successive attempts multiply, so an idea that failed has to bring more evidence the
    next time. Luck is not inherited: a surplus is forgotten, because attempts judged on the same
    seeds are no independent evidence and because the champion may have changed in between. An
    acceptance settles the account.

    Args:
        stops: `(log_e, decision)` of the family's closed claims, oldest first.
    """
    capital = 0.0
    for log_e, decision in stops:
        capital = 0.0 if decision is Decision.ACCEPTED else min(0.0, capital + log_e)
    return capital


def certified(log_es: Sequence[float], settings: GateSettings = DEFAULTS) -> tuple[bool, ...]:
    """Which of a society's claims carry the label "certified": the e-BH procedure.

    Controls the false discovery rate whatever the dependence between claims (Wang & Ramdas, JRSS B
    84, 2022), provided all tested families are handed in, not only the accepted ones.
    """
    total = len(log_es)
    order = sorted(range(total), key=lambda i: -log_es[i])
    needed = (math.log(total / (settings.certified_fdr * k)) for k in range(1, total + 1))
    passed = [k for k, need in enumerate(needed, 1) if log_es[order[k - 1]] >= need]
    chosen = set(order[: max(passed, default=0)])
    return tuple(i in chosen for i in range(total))


def worth_filing(
    screening_delta: float, noise_sd: float, settings: GateSettings = DEFAULTS
) -> bool:
    """Whether a screening improvement (metric, positive = better) is worth opening a claim for."""
    return screening_delta >= settings.screening_margin * noise_sd


def champion_runs_owed(
    pool_size: int, rejected: Iterable[int] = (), settings: GateSettings = DEFAULTS
) -> int:
    """How many more runs the champion's pool should get now.

    Args:
        pool_size: Runs the champion has on the verification seeds, failed ones included.
        rejected: Candidate runs of each claim that was rejected since it became champion.
        settings: Constants of the gate.
    """
    grown = settings.pool_target + sum(math.ceil(n / 2) for n in rejected)
    return max(0, min(settings.pool_max, grown) - pool_size)


# --------------------------------------------------------------------------- the claim


def assess(evidence: Evidence, settings: GateSettings = DEFAULTS) -> Assessment:
    """Judge a claim on all its runs so far. May be asked after any run, in any order of seeds."""
    sample = _Sample.of(evidence, settings)
    n = len(evidence.candidate)
    if n == 0 or sample is None:
        missing = "the champion's noise is not known" if n else "no verification has been run"
        return _undecided(evidence, f"{missing} yet")
    pool, paired = sample.pool(settings), sample.paired(settings)
    log_e = evalue.log_mean_e([pool.log_e, paired.log_e])
    p_accept = _predict(sample, evidence.log_need, settings)
    next_, p_accept, why = _decide(evidence, sample, log_e, p_accept, settings)
    mean = sample.best(settings).d
    return Assessment(
        next=next_,
        n=n,
        mean_delta=mean,
        log_e_pool=pool.log_e,
        log_e_paired=paired.log_e,
        log_e=log_e,
        log_need=evidence.log_need,
        p_accept=p_accept,
        reason=f"{why}; mean improvement {mean:+.4g} on {n} seed{'s' if n > 1 else ''}",
    )


def probation(evidence: Evidence, settings: GateSettings = DEFAULTS) -> bool:
    """Whether an accepted claim must be rolled back.

    Args:
        evidence: *All* runs of the new champion, verification and top-up, against the pool of the
            champion it replaced.
        settings: Constants of the gate.

    Returns:
        True if the runs suffice (8 by default) and the e-value has fallen below 3.
    """
    if len(evidence.candidate) < settings.pool_target:
        return False
    sample = _Sample.of(evidence, settings)
    return sample is not None and sample.log_e(settings) < math.log(settings.probation_e)


def effect(evidence: Evidence, settings: GateSettings = DEFAULTS) -> Effect:
    """The improvement with its anytime-valid 95 % interval.

    The mean and its shrunken value use paired differences from three pairs on, otherwise the pool.
    The interval inverts the averaged e-value, the one that decides. Its ends are infinite while
    the data cannot exclude anything.

    Raises:
        ValueError: No candidate run, or a champion pool without known noise.
    """
    sample = _Sample.of(evidence, settings)
    if sample is None or not evidence.candidate:
        raise ValueError("an effect needs a candidate run and a champion pool with known noise")
    both = [sample.paired(settings), sample.pool(settings)]
    if both[0].nu == 0:
        both.reverse()
    return _effect(both, len(evidence.candidate))


def paired_gain(
    baseline: Mapping[int, float | None],
    champion: Mapping[int, float | None],
    direction: int = LOWER_IS_BETTER,
    settings: GateSettings = DEFAULTS,
) -> Effect:
    """Improvement of the champion over the baseline on common seeds, e.g. a final audit's.

    Scores are not clipped; failed runs count as the worst loss seen or the baseline's median plus
    four standard deviations, whichever is worse. The ends of the interval are infinite below four
    common seeds.

    Args:
        baseline: seed -> score, None for a failed run.
        champion: The same for the champion.
        direction: -1 if lower scores are better, +1 if higher ones are.
        settings: Constants of the gate.

    Raises:
        ValueError: No common seed, or a failed run and fewer than two completed baseline runs.
    """
    old, new = _losses(baseline, direction), _losses(champion, direction)
    old = {seed: loss for seed, loss in old.items() if seed in new}
    pairs = [(loss, new[seed]) for seed, loss in old.items()]
    finite = [loss for loss in old.values() if math.isfinite(loss)]
    failures = any(math.isinf(loss) for pair in pairs for loss in pair)
    if not pairs or (failures and len(finite) < 2):
        raise ValueError(
            "a gain needs a common seed, and two completed baseline runs if one failed"
        )
    worst = math.inf
    if failures:
        sd = math.sqrt(evalue.sum_of_squares(evalue.winsorise(finite)) / (len(finite) - 1))
        seen = [loss for pair in pairs for loss in pair if math.isfinite(loss)]
        worst = max(median(finite) + settings.outlier * sd, *seen)
    differences = [min(a, worst) - min(b, worst) for a, b in pairs]
    return _effect([_compare_paired(differences, settings)], len(pairs))


def expected_gain(
    baseline: Mapping[int, float | None],
    champion: Mapping[int, float | None],
    seeds: int,
    direction: int = LOWER_IS_BETTER,
    settings: GateSettings = DEFAULTS,
) -> tuple[float, float]:
    """Where the mean gain on `seeds` other seeds will lie with 95 % probability.

    A prediction interval for normal differences. The interval of `paired_gain` is about the true
    gain; the mean of a few new seeds has noise of its own and misses that interval more often.

    Raises:
        ValueError: Fewer than two common seeds, or a failed run that nothing can place.
    """
    common = [seed for seed in baseline if seed in champion]
    evidence = Evidence(
        {seed: baseline[seed] for seed in common},
        {seed: champion[seed] for seed in common},
        direction=direction,
    )
    sample = _Sample.of(evidence, settings)
    if sample is None or len(common) < 2:
        raise ValueError("a prediction needs two common seeds")
    now = _compare_paired(sample.differences, settings)
    reach = evalue.student_t_quantile(1 - _CONFIDENCE / 2, now.nu)
    reach *= math.sqrt(now.s2 * (1 / len(common) + 1 / seeds))
    return now.d - reach, now.d + reach


# --------------------------------------------------------------------------- inside


@dataclass(frozen=True, slots=True)
class _Sample:
    """Cleaned losses (lower is better, failures placed, outliers clipped) of one claim."""

    champion: list[float]
    candidate: list[float]
    differences: list[float]
    """champion - candidate on common seeds: positive = better."""
    pairs_to_come: int
    """Pool runs on seeds that the candidate has not run yet."""
    sse_base: float
    nu_base: float

    @classmethod
    def of(cls, evidence: Evidence, settings: GateSettings) -> _Sample | None:
        """Clean the evidence; None if nothing is known about the champion's mean or noise."""
        champion = _losses(evidence.champion, evidence.direction)
        candidate = _losses(evidence.candidate, evidence.direction)
        nu_base = min(evidence.nu_base, settings.baseline_dof)
        sse_base = nu_base * evidence.s2_base
        finite = [loss for loss in champion.values() if math.isfinite(loss)]
        nu = nu_base + len(finite) - 1
        if not finite or nu <= 0:
            return None
        sse = sse_base + evalue.sum_of_squares(evalue.winsorise(finite))
        reach = settings.outlier * math.sqrt(sse / nu)
        worst = median(finite) + reach
        champion = _clip(champion, reach, worst)
        candidate = _clip(candidate, reach, worst)
        return cls(
            list(champion.values()),
            list(candidate.values()),
            [champion[seed] - loss for seed, loss in candidate.items() if seed in champion],
            sum(seed not in candidate for seed in champion),
            sse_base,
            nu_base,
        )

    def pool(self, settings: GateSettings) -> Comparison:
        """The candidate's mean against the whole champion pool."""
        sse = sum(map(evalue.sum_of_squares, (self.champion, self.candidate)))
        return Comparison(
            fmean(self.champion) - fmean(self.candidate),
            1 / len(self.candidate) + 1 / len(self.champion),
            self.sse_base + sse,
            self.nu_base + len(self.champion) + len(self.candidate) - 2,
            settings.g_pool,
        )

    def paired(self, settings: GateSettings) -> Comparison:
        """The mean difference on common seeds; says nothing (e = 1) below three pairs."""
        if len(self.differences) < 3:
            return Comparison(0.0, 1.0, 0.0, 0.0, settings.g_paired)
        return _compare_paired(self.differences, settings)

    def best(self, settings: GateSettings) -> Comparison:
        """The comparison that estimates: paired from three pairs on, otherwise the pool."""
        paired = self.paired(settings)
        return paired if paired.nu > 0 else self.pool(settings)

    def log_e(self, settings: GateSettings) -> float:
        """Log of the average of the two e-values."""
        return evalue.log_mean_e([self.pool(settings).log_e, self.paired(settings).log_e])


def _losses(scores: Mapping[int, float | None], direction: int) -> dict[int, float]:
    """Scores turned so that lower is better; failed runs are +infinity."""
    if direction not in (LOWER_IS_BETTER, HIGHER_IS_BETTER):
        raise ValueError(f"direction must be -1 (lower is better) or +1, got {direction}")
    return {
        seed: -direction * score if score is not None and math.isfinite(score) else math.inf
        for seed, score in scores.items()
    }


def _clip(losses: Mapping[int, float], reach: float, worst: float) -> dict[int, float]:
    """Pull in what is worse than `worst` (failures too), or `reach` better than the own median."""
    capped = {seed: min(loss, worst) for seed, loss in losses.items()}
    best = median(capped.values()) - reach if capped else 0.0
    return {seed: max(loss, best) for seed, loss in capped.items()}


def _compare_paired(differences: Sequence[float], settings: GateSettings) -> Comparison:
    n = len(differences)
    sse = evalue.sum_of_squares(differences)
    return Comparison(fmean(differences), 1 / n, sse, n - 1, settings.g_paired)


def _effect(comparisons: Sequence[Comparison], seeds: int) -> Effect:
    """Estimate by the first comparison, interval by the average of all."""
    first = comparisons[0]
    low, high = evalue.interval(comparisons, _CONFIDENCE)
    _, _, shrunken = evalue.posterior(first.d, first.v, first.s2, first.g)
    return Effect(first.d, shrunken, low, high, seeds)


def _predict(sample: _Sample, log_need: float, settings: GateSettings) -> float:
    """Probability of acceptance at n_max given the data: the better of the two comparisons'.

    The mean at n_max is predicted from the mean now; it must exceed the critical value of the
    two-sided normal-theory Bayes factor.
    """
    pool, n = sample.pool(settings), len(sample.candidate)
    v_end = 1 / settings.n_max + 1 / len(sample.champion)
    best = _exceedance(pool, v_end, n, settings.n_max, log_need)
    paired = sample.paired(settings)
    if paired.nu > 0:
        pairs = len(sample.differences)
        end = pairs + max(0, min(settings.n_max - n, sample.pairs_to_come))
        likely = _exceedance(paired, 1 / end, pairs, end, log_need + math.log(2))
        best = max(best, likely)
    return best


def _exceedance(now: Comparison, v_end: float, n: int, n_end: int, log_need: float) -> float:
    """P(the mean of `n_end` runs will exceed its critical value | the mean of the first `n`)."""
    r = v_end / (v_end + now.g)
    excess = max(0.0, log_need - math.log(2) - 0.5 * math.log(r))
    s = math.sqrt(now.s2)
    margin = now.d - s * math.sqrt(2 * excess / (1 - r) * v_end)
    spread = s * math.sqrt(max(0, n_end - n) / (n_end * n))
    if spread == 0:
        return float(margin > 0)
    return _NORMAL.cdf(margin / spread)


def _decide(
    evidence: Evidence, sample: _Sample, log_e: float, p_accept: float, settings: GateSettings
) -> tuple[Next, float, str]:
    """The decision, the probability of acceptance that goes with it, and the words for it."""
    need, n = evidence.log_need, len(sample.candidate)
    shown = f"e = {_number(log_e)}, {_number(need)} needed"
    if n >= settings.n_min and log_e >= need:
        return Next.ACCEPT, 1.0, f"accepted: {shown}"
    if n >= settings.n_max:
        return Next.REJECT, 0.0, f"not convincing after the largest number of seeds: {shown}"
    if len(sample.differences) < 3:
        if _clear_loser(sample.pool(settings), settings):
            return Next.REJECT, p_accept, f"clearly worse than the champion: {shown}"
    elif p_accept < settings.futility:
        return Next.REJECT, p_accept, f"acceptance has become unlikely ({p_accept:.0%}): {shown}"
    return Next.CONTINUE, p_accept, f"undecided: {shown}"


def _clear_loser(pool: Comparison, settings: GateSettings) -> bool:
    return pool.d < -settings.early_loss * math.sqrt(pool.s2 * pool.v)


def _number(log_value: float) -> str:
    """An e-value for readers; huge ones as a power of ten."""
    return f"{math.exp(log_value):.3g}" if log_value < 20 else f"1e{log_value / math.log(10):.0f}"


def _undecided(evidence: Evidence, why: str) -> Assessment:
    n = len(evidence.candidate)
    return Assessment(Next.CONTINUE, n, 0.0, 0.0, 0.0, 0.0, evidence.log_need, 0.5, why)
