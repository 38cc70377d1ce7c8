"""The rules of the hypothesis exchange: what an idea is worth, who gets in, what came out.

Pure functions over records: the ledger applies the admission inside its transaction, roles and
displays use the rest.

- **Worth** is expected value per cost. The value is the estimated improvement in noise sds times
  the probability that it is one at all; the cost is what a test takes, in ordinary runs.
- **Throttle**: no more ideas wait than will soon be tested. When the exchange is full, only a
  clearly better newcomer gets in, in the place of the worst one, which is dropped for that reason.
- **What came out** is derived whenever it is asked for, from the run that tested the idea and the
  champion of that moment. It is a screening result on one seed and evidence for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from society.records import (
    Champion,
    Hypothesis,
    HypothesisDropped,
    HypothesisState,
    NewHypothesis,
    Outcome,
    Run,
    RunKind,
    Variant,
)

PER_SLOT = 2
"""Open hypotheses per slot at most: one that is tested next, and one to choose from."""
SHARE = 0.5
"""Share of the runs left that open hypotheses may ask for; the rest is for other ideas."""
CLEARLY = 1.5
"""How many times the worst one's worth a newcomer to a full exchange must have."""
WITHIN_NOISE = 2.0
"""Noise sds up to which a difference on one seed says nothing."""
TIMEOUT_COST = 3.0
"""Ordinary runs that one costs which ran into its time limit."""
ORDINARY = 2.0
"""Ordinary runs that an estimate of cost starts with: few runs say little about what one takes."""


# --- worth ----------------------------------------------------------------------------------------


def expected_value(delta: float, se: float, noise_sd: float) -> float:
    """What testing a change is expected to bring, in noise sds.

    The estimated improvement times the probability that it is above zero, for an estimate with
    normal error: `delta / noise_sd * Phi(delta / se)`. A large estimate that rests on little is
    therefore worth at most twice as much as the same estimate of a coin flip.

    Args:
        delta: Estimated improvement, in the metric; positive is better.
        se: Its standard error, in the metric; 0 for an estimate taken as certain.
        noise_sd: The noise floor, in the metric.

    Returns:
        At least 0: a change that is expected to hurt is not worth less than nothing.
    """
    if delta <= 0:
        return 0.0
    real = NormalDist().cdf(delta / se) if se > 0 else 1.0
    return delta / noise_sd * real if noise_sd > 0 else math.inf


def expected_cost(variant: Variant, runs: Iterable[Run], changed: Collection[str]) -> float:
    """What a test of a variant is expected to cost, in ordinary runs.

    From the screening runs that had the same value of every changed knob: their training FLOPs
    against the average of all runs, three ordinary runs for one that hit its time limit. Seconds
    are not used: they depend on what else the machine does, and two equal societies would differ.
    With a budget in FLOPs nearly everything costs 1. Two ordinary runs are averaged in, so that a
    single unlucky run does not decide.

    Args:
        variant: What would be run.
        runs: Runs of the same task and tier; only screening runs count.
        changed: Knobs that set the variant apart from what is known.
    """
    screened = [run for run in runs if run.kind is RunKind.SCREENING]
    spent = [run.cost.flops for run in screened if run.outcome is not Outcome.TIMED_OUT]
    ordinary = math.fsum(spent) / len(spent) if spent else 0.0

    def cost(run: Run) -> float:
        if run.outcome is Outcome.TIMED_OUT:
            return TIMEOUT_COST
        return run.cost.flops / ordinary if ordinary > 0 and run.cost.flops > 0 else 1.0

    def alike(run: Run) -> bool:
        here, there = run.variant.overrides, variant.overrides
        return all(knob in here and here[knob] == there.get(knob) for knob in changed)

    known = [cost(run) for run in screened if alike(run)] if changed else []
    return (math.fsum(known) + ORDINARY) / (len(known) + ORDINARY)


# --- throttle -------------------------------------------------------------------------------------


def room(slots: int, runs_left: int, kept: int) -> int:
    """How many hypotheses of a scope may be open: no more than will soon be tested.

    Args:
        slots: Runs that are made at the same time.
        runs_left: Runs that can still be started.
        kept: Runs kept for deciding claims at the end, in which nothing new is tried.
    """
    return min(PER_SLOT * slots, int(SHARE * max(0, runs_left - kept)))


def clearly_better(newcomer: float, worst: float) -> bool:
    """Whether a newcomer's worth is enough to take the place of the worst open hypothesis."""
    return newcomer > worst and newcomer >= CLEARLY * worst


def admit(
    newcomers: Sequence[NewHypothesis], waiting: Mapping[str, float], limit: int
) -> tuple[tuple[NewHypothesis, ...], tuple[HypothesisDropped, ...]]:
    """Which newcomers get into the exchange, and which open hypotheses leave it for them.

    Args:
        newcomers: Ideas nobody has had before.
        waiting: Id -> worth of the open hypotheses.
        limit: How many may be open, see `room`. What waits already stays, also above it.

    Returns:
        The admitted ones in the order they came in, and the dropped ones.
    """
    places = dict(waiting)
    admitted: list[NewHypothesis] = []
    dropped: list[HypothesisDropped] = []
    for one in sorted(newcomers, key=lambda new: -worth(new)):
        if len(places) + len(admitted) < limit:
            admitted.append(one)
            continue
        worst = min(places, key=lambda name: places[name], default=None)
        if limit <= 0 or worst is None or not clearly_better(worth(one), places[worst]):
            break  # the others are worth less
        dropped.append(HypothesisDropped(worst, _crowded_out(places.pop(worst), one)))
        admitted.append(one)
    chosen = {id(one) for one in admitted}
    return tuple(one for one in newcomers if id(one) in chosen), tuple(dropped)


def worth(new: NewHypothesis) -> float:
    """Expected value per cost of a hypothesis that is not posted yet."""
    return new.priority / new.cost


def _crowded_out(old: float, new: NewHypothesis) -> str:
    return (
        f"the exchange is full, and {new.variant.describe()} promises {worth(new):.2f} noise sds "
        f"per run instead of {old:.2f}"
    )


def moved_on(variant: Variant, then: Variant, now: Variant) -> bool:
    """Whether the champion has moved away from an idea since it was posted.

    That is so when the idea differs from the present champion in more than it did from the champion
    of its time: a test of it would give up what has been won since. An idea that the champion
    moved towards stays.
    """
    return len(differing(variant, now)) > len(differing(variant, then))


def differing(variant: Variant, other: Variant) -> frozenset[str]:
    """Knobs in which two variants differ; `patch` for the code."""
    names = {*variant.overrides, *other.overrides}
    differ = {
        name
        for name in names
        if (name in variant.overrides) != (name in other.overrides)
        or variant.overrides.get(name) != other.overrides.get(name)
    }
    return frozenset(differ | ({"patch"} if variant.code != other.code else set()))


# --- what came out --------------------------------------------------------------------------------


class Fate(StrEnum):
    """What has become of a hypothesis."""

    WAITING = "waiting"
    TESTING = "being tested"
    BETTER = "better"
    WORSE = "worse"
    WITHIN_NOISE = "within noise"
    UNCOMPARED = "tested, nothing to compare with"
    """The champion of that moment had no score on the screening seed."""
    FAILED = "failed"
    """The run diverged, crashed, timed out or was rejected."""
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Tested:
    """What came out of a hypothesis, as far as one screening run can tell."""

    fate: Fate
    by: str | None = None
    """Agent that tests or has tested it."""
    run_id: str | None = None
    delta: float | None = None
    """Improvement over the champion of that moment on the same seed, in the metric."""
    noise: float | None = None
    """The same in noise sds."""
    reason: str = ""
    """Why it was dropped, or how the run failed."""

    def describe(self) -> str:
        """In words, e.g. `better by 0.0123 (3.1 noise sds) in run r00012 by a02`."""
        if self.fate in (Fate.WAITING, Fate.DROPPED):
            return f"{self.fate.value}: {self.reason}" if self.reason else self.fate.value
        if self.fate is Fate.TESTING:
            return f"being tested by {self.by}"
        words = f"failed ({self.reason})" if self.fate is Fate.FAILED else self.fate.value
        if self.delta is not None:
            sds = "" if self.noise is None else f" ({self.noise:+.1f} noise sds)"
            words += f" {self.delta:+.5f}{sds}"
        return f"{words} in run {self.run_id} by {self.by}"


def outcome_of(
    hypothesis: Hypothesis,
    run: Run | None = None,
    *,
    reference: float | None = None,
    noise_sd: float | None = None,
    sign: float = -1.0,
) -> Tested:
    """What came out of a hypothesis.

    Args:
        hypothesis: As the ledger lists it now.
        run: The run that tested it (`hypothesis.run_id`); None while there is none.
        reference: Screening score of the champion that reigned when the run finished.
        noise_sd: The noise floor; None while it is unknown: then any difference counts.
        sign: -1 when lower scores are better, +1 when higher ones are.
    """
    if hypothesis.state is HypothesisState.DROPPED:
        return Tested(Fate.DROPPED, reason=hypothesis.dropped_because or "")
    if hypothesis.state is HypothesisState.TAKEN:
        return Tested(Fate.TESTING, hypothesis.taken_by)
    if hypothesis.state is HypothesisState.OPEN or run is None:
        return Tested(Fate.WAITING)
    if run.score is None:
        return Tested(Fate.FAILED, run.agent, run.id, reason=run.outcome.value)
    if reference is None:
        return Tested(Fate.UNCOMPARED, run.agent, run.id)
    delta = sign * (run.score - reference)
    noise = delta / noise_sd if noise_sd else None
    fate = Fate.BETTER if delta > 0 else Fate.WORSE
    if delta == 0 or (noise is not None and abs(noise) <= WITHIN_NOISE):
        fate = Fate.WITHIN_NOISE
    return Tested(fate, run.agent, run.id, delta, noise)


def reigning(history: Sequence[Champion], moment: float) -> Champion | None:
    """The champion at a moment (Unix seconds); None before the baseline was crowned."""
    return next((one for one in reversed(history) if one.since <= moment), None)


def outcomes(
    hypotheses: Iterable[Hypothesis],
    history: Sequence[Champion],
    run_of: Callable[[str], Run],
    score_of: Callable[[Variant], float | None],
    *,
    noise_sd: float | None,
    sign: float,
) -> tuple[tuple[Hypothesis, Tested], ...]:
    """What came out of each hypothesis of one task on one tier.

    Args:
        hypotheses: As the ledger lists them.
        history: The champion history of the same scope.
        run_of: A run by its id, e.g. `ledger.run`.
        score_of: Screening score of a variant in the same scope, e.g. `ledger.screening_score`.
        noise_sd: The noise floor, if it is known.
        sign: -1 when lower scores are better, +1 when higher ones are.
    """

    def outcome(one: Hypothesis) -> Tested:
        run = None if one.run_id is None else run_of(one.run_id)
        champion = None if run is None else reigning(history, run.finished_at)
        reference = None if champion is None else score_of(champion.variant)
        return outcome_of(one, run, reference=reference, noise_sd=noise_sd, sign=sign)

    return tuple((one, outcome(one)) for one in hypotheses)
