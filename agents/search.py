"""The `search` brain: model-based optimisation over the typed search space; no key, no network.

A Gaussian process with expected improvement (Jones et al. 1998; as implemented by Optuna's
`GPSampler`) is told the screening results in the notebook (the best and the latest, where they are
very many) and every variant being screened now. It
is rebuilt for each proposal, so the brain itself keeps no state: whatever agent asks, the answer
depends on the notebook and the entropy alone.

Three habits are added, because a society's budget is a few hundred runs over some sixty knobs:
the first proposals change a few knobs of the baseline instead of all of them; every fourth one
changes one or two knobs of the best variant so far; and of what the model asks for only a few
changes are made to the best variant, drawn anew each time, because among dozens at once one that
ruins the rest is nearly certain (compare dropout in high-dimensional Bayesian optimisation, Li et
al. 2017, IJCAI). What was tried instead: see docs/log.md.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from society.errors import InvalidVariant
from society.records import Variant
from society.roles.base import Knowledge, Proposal

if TYPE_CHECKING:
    from collections.abc import Container

    from optuna.distributions import BaseDistribution

    from society.experiments.space import Space
    from society.knobs import Knob, Scalar
    from society.roles.base import Result

STARTUP = 10
"""Proposals made before the model is asked."""
LOCAL_EVERY = 4
"""One proposal in so many is a small change of the best variant so far."""
TAKEN = (2, 8)
"""Fewest and most changes of the best variant that are taken over from the model's proposal."""
TIDY = 0.03
"""Distance on a knob's unit scale below which a number counts as unchanged."""
TOLD = 250
"""The model is told so many of the best results and of the latest; all, up to twice that."""
ATTEMPTS = 50
"""Samples drawn before giving up on a valid and unknown variant."""


class SearchBrain:
    """See the module. Implements `society.roles.Brain`."""

    name = "search"

    async def propose(self, knowledge: Knowledge) -> Proposal:
        """The next variant to screen; new and valid unless the space is exhausted."""
        if not knowledge.space.knobs:
            return Proposal(knowledge.champion, "There is no knob to vary.")
        rng = random.Random(knowledge.entropy)
        known = {result.variant.fingerprint for result in knowledge.results}
        known |= {variant.fingerprint for variant in knowledge.pending}
        knowledge = with_champions_code(knowledge)
        count = knowledge.tried + len(knowledge.pending)
        proposal = self._propose(knowledge, count, rng)
        for _ in range(ATTEMPTS):
            if proposal is not None and _is_new(proposal.variant, known, knowledge.known):
                return proposal
            proposal = _mutate(knowledge, best_of(knowledge), rng, changes=2)
        return proposal or Proposal(knowledge.champion, "Nothing new was found.")

    def _propose(self, knowledge: Knowledge, count: int, rng: random.Random) -> Proposal | None:
        if count < STARTUP:
            plain = Variant(knowledge.task, patch=knowledge.champion.patch)
            return _mutate(knowledge, plain, rng, changes=rng.randint(2, 5))
        if count % LOCAL_EVERY == 0:
            return _mutate(knowledge, best_of(knowledge), rng, changes=rng.randint(1, 2))
        return _model_based(knowledge, rng)


def _is_new(variant: Variant, *known: Container[str]) -> bool:
    return not any(variant.fingerprint in marks for marks in known)


def with_champions_code(knowledge: Knowledge) -> Knowledge:
    """What is known of variants with the champion's code; the rest tells nothing about its knobs.

    A change of code is carried along with every proposal and never made or undone here.
    """
    code = knowledge.champion.code
    results = tuple(one for one in knowledge.results if one.variant.code == code)
    return replace(
        knowledge,
        results=results,
        pending=tuple(one for one in knowledge.pending if one.code == code),
        count=knowledge.tried - (len(knowledge.results) - len(results)),
    )


def best_of(knowledge: Knowledge) -> Variant:
    """The variant with the best screening score, verified or not."""
    scored = [result for result in knowledge.results if result.score is not None]
    if not scored:
        return knowledge.champion
    sign = knowledge.direction.sign
    return max(scored, key=lambda result: sign * (result.score or 0.0)).variant


def _mutate(
    knowledge: Knowledge, parent: Variant, rng: random.Random, changes: int
) -> Proposal | None:
    """Redraw a few knobs; half of the numeric ones move near their present value."""
    space = knowledge.space
    names = rng.sample(sorted(space.knobs), min(changes, len(space.knobs)))
    drawn = {name: _draw(space, name, parent, rng) for name in names}
    variant = _build(knowledge, {**parent.overrides, **drawn})
    if variant is None:
        return None
    told = ", ".join(f"{name}={value}" for name, value in sorted(drawn.items()))
    return Proposal(variant, f"Change {told} of {parent.describe()}.")


def _draw(space: Space, name: str, parent: Variant, rng: random.Random) -> Scalar:
    knob = space.knobs[name]
    present = parent.overrides.get(name, space.default(name))
    options = choices_of(knob, present)
    if options:
        return rng.choice([option for option in options if option != present] or options)
    low, high = float(knob.low or 0.0), float(knob.high or 0.0)
    unit = rng.random()
    if rng.random() < 0.5:
        unit = min(1.0, max(0.0, rng.gauss(space.unit(name, present), 0.15)))
    value = low * (high / low) ** unit if knob.log else low + (high - low) * unit
    return round(value) if isinstance(present, int) else float(f"{value:.3g}")


def choices_of(knob: Knob, example: Scalar) -> tuple[Scalar, ...]:
    """The closed set of values of a knob; empty for a range."""
    if isinstance(example, bool):
        return (False, True)
    return knob.choices


def _build(knowledge: Knowledge, overrides: dict[str, Scalar]) -> Variant | None:
    """The variant with the champion's code, without the knob that makes it impossible.

    None if there is no repair.
    """
    for _ in range(4):
        try:
            return knowledge.space.variant(knowledge.task, overrides, knowledge.champion.patch)
        except InvalidVariant as error:
            if error.knob not in overrides:
                return None
            overrides = {name: v for name, v in overrides.items() if name != error.knob}
    return None


def _model_based(knowledge: Knowledge, rng: random.Random) -> Proposal | None:
    """Some of what the model asks for, as changes of the best variant so far."""
    best, wanted = best_of(knowledge).overrides, _asked(knowledge, rng.getrandbits(31))
    present = {name: best.get(name, knowledge.space.default(name)) for name in wanted}
    changes = sorted(name for name, value in wanted.items() if value != present[name])
    taken = rng.sample(changes, min(len(changes), rng.randint(*TAKEN)))
    overrides = {**best, **{name: wanted[name] for name in taken}}
    variant = _build(knowledge, overrides)
    if variant is None:
        return None
    return Proposal(variant, f"Model-based, on {knowledge.tried} results.")


def _asked(knowledge: Knowledge, seed: int) -> dict[str, Scalar]:
    """A value for every knob from Optuna's Gaussian process, told all results and pendings."""
    import optuna
    from optuna.study import StudyDirection
    from threadpoolctl import threadpool_limits

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = knowledge.space
    axes = {name: _axis(space, name) for name in space.knobs}
    sampler = optuna.samplers.GPSampler(n_startup_trials=0, seed=seed)
    way = StudyDirection.MINIMIZE if knowledge.direction.sign < 0 else StudyDirection.MAXIMIZE
    study = optuna.create_study(direction=way, sampler=sampler)
    study.add_trials(_trials(knowledge, axes))
    with threadpool_limits(1):  # the other cores are training
        asked = study.ask(axes).params
    return {
        name: _tidy(knowledge, name, _value(space, name, position))
        for name, position in asked.items()
    }


def _tidy(knowledge: Knowledge, name: str, value: Scalar) -> Scalar:
    """A number a person would have written.

    That is the baseline's or the champion's if it is near one of them, otherwise three significant
    digits: fewer pointless changes make a claim readable.
    """
    if not isinstance(value, float) or knowledge.space.knobs[name].choices:
        return value
    space, champion = knowledge.space, knowledge.champion.overrides
    for anchor in (space.default(name), champion.get(name, value)):
        if abs(space.unit(name, value) - space.unit(name, anchor)) <= TIDY:
            return anchor
    return float(f"{value:.3g}")


def _trials(knowledge: Knowledge, axes: dict[str, BaseDistribution]) -> list[Any]:
    """Screenings that the model is told of with their score, those under way as running."""
    from optuna.trial import TrialState, create_trial

    failed = _failure_score(knowledge)
    finished = [
        create_trial(
            params=_positions(knowledge.space, result.variant),
            distributions=axes,
            value=failed if result.score is None else result.score,
        )
        for result in told_to_model(knowledge)
    ]
    running = [
        create_trial(
            params=_positions(knowledge.space, variant),
            distributions=axes,
            state=TrialState.RUNNING,
        )
        for variant in knowledge.pending
    ]
    return finished + running


def told_to_model(knowledge: Knowledge) -> list[Result]:
    """The results that the model is fitted to, in order of finishing.

    Its time and memory grow with their square and more: 500 take seconds, 2,000 minutes.
    """
    results, sign = list(knowledge.results), knowledge.direction.sign
    if len(results) <= 2 * TOLD:
        return results
    scored = [place for place, result in enumerate(results) if result.score is not None]
    scored.sort(key=lambda place: -sign * (results[place].score or 0.0))
    latest = range(len(results) - TOLD, len(results))
    return [results[place] for place in sorted({*scored[:TOLD], *latest})]


def _failure_score(knowledge: Knowledge) -> float:
    """What a failed run counts as: the worst score seen, and a little worse."""
    scores = [result.score for result in knowledge.results if result.score is not None]
    if not scores:
        return math.nan
    sign = knowledge.direction.sign
    worst = min(scores, key=lambda score: sign * score)
    return worst - sign * (max(scores) - min(scores)) * 0.1


def _axis(space: Space, name: str) -> BaseDistribution:
    """Optuna's view of a knob: ordered choices by index, words as categories."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    knob, default = space.knobs[name], space.default(name)
    options = choices_of(knob, default)
    if options and not isinstance(options[0], int | float):
        return CategoricalDistribution(options)
    if options:
        return IntDistribution(0, len(options) - 1)
    if isinstance(default, int):
        return IntDistribution(round(knob.low or 0), round(knob.high or 0), log=knob.log)
    return FloatDistribution(float(knob.low or 0), float(knob.high or 0), log=knob.log)


def _positions(space: Space, variant: Variant) -> dict[str, Any]:
    """A variant's values on Optuna's axes."""
    found: dict[str, Any] = {}
    for name, knob in space.knobs.items():
        value = variant.overrides.get(name, space.default(name))
        options = choices_of(knob, space.default(name))
        ordered = options and isinstance(options[0], int | float)
        found[name] = options.index(value) if ordered else value
    return found


def _value(space: Space, name: str, position: Any) -> Scalar:
    """The knob's value at a position on Optuna's axis."""
    options = choices_of(space.knobs[name], space.default(name))
    ordered = options and isinstance(options[0], int | float)
    value: Scalar = options[position] if ordered else position
    return value
