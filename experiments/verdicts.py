"""The rules by which the replication of a published finding is judged: pure functions of numbers.

Verdicts of a change of the recipe, on paired seeds (see `society.experiments.gate` for e-values):

- *replicated*: e >= 20 in the predicted direction, on at least four seeds;
- *reversed*: e >= 20 in the opposite direction, on at least four seeds;
- *not at this scale*: neither, and the interval excludes the published size (or, where none was
  published, lies within half a noise floor of zero);
- *undecided*: none of these after the largest number of seeds, or the time was used up before.

Error rates. A change that does not help in the predicted direction is called *replicated* with
probability at most 1/20, however often one looks, and likewise *reversed*; each end of an interval
misses the true effect with probability at most 1/40. The rates hold per comparison: the findings
share the runs of one baseline, so that their errors are not independent. Failed runs count as very
bad ones and are never left out.

Improvements are positive when the changed recipe is better, whatever the metric's direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean, median

from society.experiments import evalue, gate
from society.experiments.findings import Finding, Kind, Predicted
from society.records import Effect

OUTLIER = gate.DEFAULTS.outlier


class Verdict(StrEnum):
    """What a replication found."""

    REPLICATED = "replicated"
    ABSENT = "not at this scale"
    REVERSED = "reversed"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Rules:
    """Every constant of the verdicts, once; part of the registered plan."""

    e_needed: float = 20.0
    """E-value that decides in either direction."""
    n_min: int = 4
    """Fewest seeds of a verdict on a change."""
    n_max: int = 24
    """Seeds after which a change stays undecided."""
    first_factor: int = 2
    """Times as many seeds for the change that decides a finding."""
    screening_seeds: int = 12
    """The same for each arm of a screening."""
    noise_seeds: int = 100
    """Baseline seeds of the noise study."""
    noise_factor: float = 2.0
    """Factor between standard deviations that counts as the same."""
    margin: float = 0.5
    """Noise floors around zero that count as no effect, where no size was published."""
    futility: float = 0.1
    """Predicted probability of reaching `e_needed` below which a direction is given up."""
    fdr: float = gate.DEFAULTS.certified_fdr
    """False discovery rate of a screening."""
    planted_seeds: int = 4
    """Seeds on which the recipe that must fail is run."""
    societies: int = 4
    """Pairs of societies, with and without shared memory."""
    society_runs: int = 60
    """Training runs of each society."""
    society_seeds: int = 4
    """Seeds on which a society's best recipe is scored again."""

    @property
    def first(self) -> Rules:
        """The rules of the change that decides a finding."""
        return replace(self, n_max=self.first_factor * self.n_max)

    def gate(self) -> gate.GateSettings:
        """The same constants as the gate takes them."""
        return gate.GateSettings(
            alpha=1 / self.e_needed, n_min=self.n_min, n_max=self.n_max, futility=self.futility
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rules say on the runs so far."""

    verdict: Verdict
    decided: bool
    """Whether the rules ask for no more runs."""
    seeds: int
    """Seeds (or societies) it rests on, failed runs included."""
    effect: Effect | None
    """Improvement over the baseline with its anytime-valid 95 % interval."""
    log_e: float
    """Natural log of the e-value in the predicted direction."""
    log_e_opposite: float
    """The same against it."""
    reason: str


def judge(
    baseline: Mapping[int, float | None],
    changed: Mapping[int, float | None],
    *,
    predicted: Predicted,
    size: float | None,
    direction: int,
    rules: Rules,
) -> Judgement:
    """Judge a change of the recipe on all its runs so far; may be asked after any run.

    Args:
        baseline: seed -> score of the baseline, None for a failed run. All of them are used: those
            on common seeds for the paired comparison, the rest for the pool.
        changed: The same for the changed recipe.
        predicted: The published direction.
        size: The published size, positive; None when none was published.
        direction: -1 if lower scores are better, +1 if higher ones are.
        rules: The registered rules.
    """
    n = len(changed)
    pools = _placed(baseline, changed, direction)
    if n == 0 or pools is None:
        missing = "two completed runs of the baseline" if n else "a run"
        return Judgement(
            Verdict.UNDECIDED, False, n, None, 0.0, 0.0, f"there is no verdict without {missing}"
        )
    sign = direction if predicted is Predicted.BETTER else -direction
    settings = rules.gate()
    along, against = (
        gate.assess(gate.Evidence(*pools, direction=way, alpha=settings.alpha), settings)
        for way in (sign, -sign)
    )
    effect = _effect(pools, direction)
    absent = n >= rules.n_min and _excluded(effect, pools[0], predicted, size, rules)
    return _verdict(along, against, effect, absent=absent, size=size, rules=rules)


def _verdict(
    along: gate.Assessment,
    against: gate.Assessment,
    effect: Effect,
    *,
    absent: bool,
    size: float | None,
    rules: Rules,
) -> Judgement:
    """The first rule that applies."""
    n, need = along.n, math.log(rules.e_needed)

    def judgement(verdict: Verdict, decided: bool, reason: str) -> Judgement:
        return Judgement(verdict, decided, n, effect, along.log_e, against.log_e, reason)

    if n >= rules.n_min and along.log_e >= need:
        return judgement(Verdict.REPLICATED, True, f"e = {_e(along.log_e)} as predicted")
    if n >= rules.n_min and against.log_e >= need:
        return judgement(Verdict.REVERSED, True, f"e = {_e(against.log_e)} against the prediction")
    futile = max(along.p_accept, against.p_accept) < rules.futility
    used_up = n >= rules.n_max
    if absent and (futile or used_up):
        what = f"the published {size:g}" if size else f"{rules.margin:g} noise floors"
        return judgement(Verdict.ABSENT, True, f"the interval excludes {what}")
    if used_up:
        return judgement(
            Verdict.UNDECIDED, True, f"neither shown nor excluded after {n} seeds, the most allowed"
        )
    return judgement(Verdict.UNDECIDED, False, f"not decided after {n} seed{'s' * (n != 1)}")


def _placed(
    baseline: Mapping[int, float | None], changed: Mapping[int, float | None], direction: int
) -> tuple[dict[int, float], dict[int, float]] | None:
    """Both sides with failed runs as very bad ones, so that either may be called the better one.

    A failed run counts as the baseline's median plus four standard deviations, or as the worst
    score seen. None with fewer than two completed runs of the baseline.
    """
    finite = [score for score in baseline.values() if _finite(score)]
    if len(finite) < 2:
        return None
    sd, _, _ = evalue.noise_interval([score for score in finite if score is not None])
    seen = [score for score in (*baseline.values(), *changed.values()) if score is not None]
    level = median(score for score in finite if score is not None) - direction * OUTLIER * sd
    worst = min((level, *filter(math.isfinite, seen)), key=lambda score: direction * score)

    def place(scores: Mapping[int, float | None]) -> dict[int, float]:
        return {
            seed: score if score is not None and math.isfinite(score) else worst
            for seed, score in scores.items()
        }

    return place(baseline), place(changed)


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _effect(pools: tuple[dict[int, float], dict[int, float]], direction: int) -> Effect:
    """The improvement with its interval.

    A harmful change is estimated as a harm, because the gate clips what is much worse than its
    champion but not what is much better.
    """
    gain = gate.effect(gate.Evidence(*pools, direction=direction))
    if gain.mean >= 0:
        return gain
    harm = gate.effect(gate.Evidence(*pools, direction=-direction))
    return Effect(-harm.mean, -harm.shrunken, -harm.high, -harm.low, harm.seeds)


def _excluded(
    effect: Effect,
    baseline: Mapping[int, float],
    predicted: Predicted,
    size: float | None,
    rules: Rules,
) -> bool:
    """Whether the interval excludes the published size, or anything worth speaking of."""
    if size is not None:
        most = effect.high if predicted is Predicted.BETTER else -effect.low
        return most < size
    sd, _, _ = evalue.noise_interval(list(baseline.values()))
    margin = rules.margin * sd
    return -margin < effect.low and effect.high < margin


def _e(log_e: float) -> str:
    return f"{math.exp(log_e):.3g}" if log_e < 20 else f"1e{log_e / math.log(10):.0f}"


# ------------------------------------------------------------------------------ the noise


def judge_noise(scores: Sequence[float | None], published: float, rules: Rules) -> Judgement:
    """Is the seed-to-seed standard deviation of the published order?

    *Replicated*: its 95 % interval lies within a factor 2 of the published one. *Not at this
    scale*: the interval lies above that; the published number does not carry over, and what
    follows from it does so all the more. *Reversed*: it lies below. *Undecided*: it straddles.

    Args:
        scores: The baseline's scores, one per seed; None for a failed run, which is left out.
        published: The published standard deviation, in the metric.
        rules: The registered rules.
    """
    finite = [score for score in scores if score is not None and math.isfinite(score)]
    n, complete = len(finite), len(scores) >= rules.noise_seeds
    if n < rules.n_min:
        return Judgement(Verdict.UNDECIDED, complete, n, None, 0.0, 0.0, f"only {n} seeds")
    sd, low, high = evalue.noise_interval(finite)
    spread = Effect(sd, sd, low, high, n)
    found = f"standard deviation {sd:.4g} [{low:.4g}, {high:.4g}], published {published:g}"
    reach = rules.noise_factor
    if low > published * reach:
        verdict, words = Verdict.ABSENT, f"more than {reach:g} times larger here"
    elif high < published / reach:
        verdict, words = Verdict.REVERSED, f"more than {reach:g} times smaller here"
    elif published / reach <= low and high <= published * reach:
        verdict, words = Verdict.REPLICATED, f"within a factor {reach:g}"
    else:
        verdict, words = Verdict.UNDECIDED, "the interval straddles the limits"
    if not complete:
        verdict = Verdict.UNDECIDED
        words += f"; {n} of {rules.noise_seeds} seeds"
    return Judgement(verdict, complete, n, spread, 0.0, 0.0, f"{found}: {words}")


# ------------------------------------------------------------------------------ a screening


def screening_rules(arms: int, rules: Rules) -> Rules:
    """The rules of one arm: e-BH can certify it alone once its e-value reaches 2 K / FDR."""
    return replace(rules, e_needed=2 * arms / rules.fdr, n_max=rules.screening_seeds)


def certified(arms: Sequence[Judgement], rules: Rules) -> tuple[Predicted | None, ...]:
    """What e-BH certifies of each arm: better, worse, or neither.

    Both directions of all arms are tested together, and the false discovery rate over all of them
    is controlled whatever their dependence (Wang & Ramdas, JRSS B 84, 2022).
    """
    settings = replace(gate.DEFAULTS, certified_fdr=rules.fdr)
    log_es = [e for arm in arms for e in (arm.log_e, arm.log_e_opposite)]
    passed = gate.certified(log_es, settings) if log_es else ()
    better, worse = passed[::2], passed[1::2]
    return tuple(
        Predicted.BETTER if up else Predicted.WORSE if down else None
        for up, down in zip(better, worse, strict=True)
    )


def judge_screening(arms: Sequence[Judgement], noise_sd: float, rules: Rules) -> Judgement:
    """Was there something to find among changes that nobody had tried?

    *Replicated*: at least one arm is certified to be better. *Reversed*: every arm is certified to
    be worse. *Not at this scale*: none is better, and every arm's interval excludes an improvement
    of half a noise floor, or it is certified to be worse. *Undecided*: otherwise.

    Args:
        arms: Judgements by `screening_rules`, with the prediction `better`.
        noise_sd: Seed-to-seed standard deviation of the baseline, in the metric.
        rules: The registered rules.
    """
    labels = certified(arms, rules)
    decided = all(arm.decided for arm in arms)
    better, worse = (labels.count(way) for way in (Predicted.BETTER, Predicted.WORSE))
    seeds = sum(arm.seeds for arm in arms)
    shut = [
        label is Predicted.WORSE
        or (arm.effect is not None and arm.effect.high < rules.margin * noise_sd)
        for label, arm in zip(labels, arms, strict=True)
    ]
    reason = f"{better} of {len(arms)} certified better, {worse} worse"
    if not decided:
        reason += "; not all arms are decided"
    verdict = Verdict.UNDECIDED
    if better:
        verdict = Verdict.REPLICATED
    elif arms and worse == len(arms):
        verdict = Verdict.REVERSED
    elif arms and decided and all(shut):
        verdict = Verdict.ABSENT
    return Judgement(verdict, decided, seeds, None, 0.0, 0.0, reason)


# ------------------------------------------------------------------------------ the record


@dataclass(frozen=True, slots=True)
class Trail:
    """What a notebook keeps of work that led to nothing."""

    leases: int
    """Leases given, those still living left out."""
    traced: int
    """Of them, those that ended as a run with an outcome or as an explicit release or expiry."""
    planted: int
    """Runs of the recipe that must fail."""
    failed: int
    """Of them, runs that failed: diverged, crashed, timed out or were refused."""
    told: int
    """Of those, runs recorded with a message."""
    recalled: bool | None
    """Whether a search by meaning finds the failure; None while the index cannot be used."""
    tried: int
    """Variants of the baseline on record."""
    negative: int
    """Of them, those that failed or were no better than the baseline."""


def judge_trail(trail: Trail, rules: Rules) -> Judgement:
    """Are negative results recorded and shared?

    *Replicated*: every ended lease left a trace, every planted failure is on record with a message
    and is found again. *Reversed*: something left no trace or no message. *Not at this scale*:
    recorded, but not found. *Undecided*: the planted recipe did not fail, or the index is down.
    """
    decided = trail.planted >= rules.planted_seeds
    share = f"{trail.negative} of {trail.tried} variants on record are negative results"
    traced = f"{trail.traced} of {trail.leases} leases left a trace"
    planted = f"{trail.told} of {trail.failed} planted failures are on record with a message"
    reason = f"{traced}; {planted}; {share}"

    def judgement(verdict: Verdict, more: str = "") -> Judgement:
        words = f"{reason}; {more}" if more else reason
        return Judgement(verdict, decided, trail.planted, None, 0.0, 0.0, words)

    if trail.traced < trail.leases or trail.told < trail.failed:
        return judgement(Verdict.REVERSED, "something was lost")
    if not decided:
        return judgement(Verdict.UNDECIDED, "not all planted runs have been made")
    if trail.failed == 0:
        return judgement(Verdict.UNDECIDED, "the planted recipe did not fail")
    if trail.recalled is None:
        return judgement(Verdict.UNDECIDED, "the semantic index could not be searched")
    if not trail.recalled:
        return judgement(Verdict.ABSENT, "a search by meaning does not find the failure")
    return judgement(Verdict.REPLICATED, "a search by meaning finds the failure")


# ------------------------------------------------------------------------------ societies


def judge_pairs(differences: Sequence[float], noise_sd: float, rules: Rules) -> Judgement:
    """Do societies reach a better recipe when their agents share what they know?

    The rules are those of a change of the recipe, paired by society seed; no size was published.

    Args:
        differences: Advantage of the society with shared memory, one per society seed.
        noise_sd: Seed-to-seed standard deviation of the baseline, in the metric.
        rules: The registered rules.
    """
    n, complete = len(differences), len(differences) >= rules.societies
    if n == 0:
        return Judgement(Verdict.UNDECIDED, complete, 0, None, 0.0, 0.0, "no pair of societies ran")
    along = _paired(differences)
    against = _paired([-value for value in differences])
    low, high = evalue.interval([along]) if n > 1 else (-math.inf, math.inf)
    effect = Effect(along.d, along.d, low, high, n)
    need, margin = math.log(rules.e_needed), rules.margin * noise_sd
    verdict, reason = Verdict.UNDECIDED, f"neither shown nor excluded by {n} pairs of societies"
    if along.log_e >= need:
        verdict, reason = Verdict.REPLICATED, f"e = {_e(along.log_e)} for shared memory"
    elif against.log_e >= need:
        verdict, reason = Verdict.REVERSED, f"e = {_e(against.log_e)} against shared memory"
    elif -margin < low and high < margin:
        verdict, reason = Verdict.ABSENT, f"the interval excludes {rules.margin:g} noise floors"
    decided = complete or verdict is not Verdict.UNDECIDED
    return Judgement(verdict, decided, n, effect, along.log_e, against.log_e, reason)


def advantage(
    baseline: Mapping[int, float | None],
    one: Mapping[int, float | None],
    other: Mapping[int, float | None],
    direction: int,
) -> float | None:
    """How much better `one` is than `other`, on average over their common seeds.

    Failed runs count as very bad ones. None without a common seed or two completed runs of the
    baseline.
    """
    first, second = (_placed(baseline, scores, direction) for scores in (one, other))
    if first is None or second is None:
        return None
    common = [seed for seed in first[1] if seed in second[1]]
    if not common:
        return None
    return direction * fmean(first[1][seed] - second[1][seed] for seed in common)


def _paired(differences: Sequence[float]) -> evalue.Comparison:
    n = len(differences)
    sse = evalue.sum_of_squares(differences)
    return evalue.Comparison(fmean(differences), 1 / n, sse, n - 1, gate.DEFAULTS.g_paired)


# ------------------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What was found about one change."""

    change: str
    """In words, e.g. `batch_tokens=512`."""
    predicted: Predicted | None
    """None in a screening."""
    size: float | None
    """The published size, in the metric."""
    judgement: Judgement
    runs: int
    failed: int
    wall_s: float
    """Summed over its runs."""
    label: str = ""
    """What a screening certifies: `better`, `worse` or nothing."""


@dataclass(frozen=True, slots=True)
class FindingResult:
    """What was found about one finding."""

    finding: Finding
    verdict: Verdict
    judgement: Judgement
    """Of the primary change, or of the measurement that stands for it."""
    arms: tuple[ArmResult, ...]
    """Primary first; the arms of a screening; empty where no recipe is changed."""
    runs: int
    wall_s: float
    study: str
    """Id of the registered study."""
    complete: bool
    """Whether everything that was planned has been done."""

    @property
    def notes(self) -> tuple[tuple[str, str], ...]:
        """What is to be known about changes of this finding: (change, note)."""
        pairs = zip(self.arms, self.finding.interventions, strict=False)
        return tuple((arm.change, published.note) for arm, published in pairs if published.note)

    @property
    def predicted(self) -> str:
        """The prediction in words."""
        first = self.finding.primary
        if first is not None:
            size = f" by {first.size:g}" if first.size else ""
            return f"{self.arms[0].change} {first.predicted.value}{size}"
        return {
            Kind.NOISE: f"standard deviation {self.finding.size or 0:g}",
            Kind.NEGATIVE_RESULTS: "all on record and found again",
            Kind.DATA_PIPELINE: "some untried change is better",
            Kind.MEMORY: "shared memory is better",
        }[self.finding.kind]


def summary(result: FindingResult) -> dict[str, object]:
    """A result as JSON types; numbers that JSON does not know become None."""
    return {
        "finding": result.finding.id,
        "verdict": result.verdict.value,
        "complete": result.complete,
        "predicted": result.predicted,
        "runs": result.runs,
        "wall_s": result.wall_s,
        **_plain_judgement(result.judgement),
        "arms": [
            {
                "change": arm.change,
                "predicted": arm.predicted.value if arm.predicted else None,
                "published": arm.size,
                "verdict": arm.judgement.verdict.value,
                "certified": arm.label,
                "runs": arm.runs,
                "failed": arm.failed,
                "wall_s": arm.wall_s,
                **_plain_judgement(arm.judgement),
            }
            for arm in result.arms
        ],
    }


def _plain_judgement(judgement: Judgement) -> dict[str, object]:
    effect = judgement.effect
    return {
        "effect": _number(effect.mean) if effect else None,
        "low": _number(effect.low) if effect else None,
        "high": _number(effect.high) if effect else None,
        "seeds": judgement.seeds,
        "log_e": _number(judgement.log_e),
        "log_e_opposite": _number(judgement.log_e_opposite),
        "reason": judgement.reason,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sentence(result: FindingResult, unit: str) -> str:
    """The conclusion in words, as it is posted for everybody to find."""
    text = f"Replication of '{result.finding.statement}': {result.verdict.value}."
    first = result.judgement.effect
    if result.finding.kind is Kind.MODEL and first is not None:
        text += (
            f" {result.arms[0].change} changes the score by {first.mean:+.4f} {unit} "
            f"[{first.low:+.4f}, {first.high:+.4f}] on {first.seeds} seeds, positive is better."
        )
    return f"{text} {result.judgement.reason[:1].upper()}{result.judgement.reason[1:]}."
