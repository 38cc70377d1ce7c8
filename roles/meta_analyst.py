"""The meta-analyst: reads all results together, posts insights and hypotheses."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from society import exchange
from society.errors import InvalidVariant
from society.experiments.effects import (
    KnobEffect,
    KnobVerdict,
    dead_ends,
    describe,
    describe_dead_end,
    knob_effects,
)
from society.records import HypothesisDropped, HypothesisState, NewHypothesis, NewInsight
from society.roles.base import Duty, Lab, Outcome, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.records import Entry, Run
    from society.roles.view import View

MAX_INSIGHTS = 6
"""Most insights posted by one reading."""
MAX_HYPOTHESES = 2
"""Most hypotheses posted by one reading: no more than will soon be tested."""


class MetaAnalyst(Role):
    """Turns many unverified runs into a few sentences and a few next steps.

    What it posts steers the search and the reader; only the gate decides what is believed.
    """

    name: ClassVar[str] = "meta-analyst"
    about: ClassVar[str] = "fits knob effects over all runs, posts insights and hypotheses"

    def duties(self, view: View) -> Sequence[Duty]:
        """`tidy` when the champion has moved on from an idea; `digest` after so many runs."""
        duties = []
        stale = outdated(view)
        if stale:
            why = f"{len(stale)} ideas about an earlier champion"
            duties.append(Duty(self.name, "tidy", value=55, why=why))
        fresh = unread(view)
        enough = 5 if view.closing else view.charter.digest_every
        if fresh >= enough:
            duties.append(Duty(self.name, "digest", value=40, why=f"{fresh} new results"))
        return duties

    async def perform(self, duty: Duty, lab: Lab) -> Outcome:
        """Drop what is outdated; or fit the effects, say what stands out, propose what promises."""
        view = lab.view
        if duty.kind == "tidy":
            dropped = outdated(view)
            return Outcome(dropped, note=f"dropped {len(dropped)} ideas")
        effects = knob_effects(
            view.screenings, view.space, view.champion.variant.overrides, view.task.direction
        )
        entries: list[Entry] = list(insights(view, effects))
        if not view.closing:
            entries += hypotheses(view, effects)
        note = f"read {len(view.screenings)} screening runs, posted {len(entries)} entries"
        return Outcome(tuple(entries), note=note)


def unread(view: View) -> int:
    """Screening runs that finished since the last digest."""
    last = view.ledger.last_begun(view.society, MetaAnalyst.name, "digest")
    return view.board.ended_after(last or 0.0)


def insights(view: View, effects: Sequence[KnobEffect]) -> list[NewInsight]:
    """The clearest effects and dead ends, in words, with the runs behind them."""
    clear = [e for e in effects if e.verdict in (KnobVerdict.HELPS, KnobVerdict.HURTS)]
    clear.sort(key=lambda effect: -abs(effect.delta) / max(effect.se, 1e-12))
    told = [
        NewInsight(describe(effect, unit=view.task.unit), _varied(view.screenings, effect.knob))
        for effect in clear
    ]
    ends = dead_ends(
        view.screenings, view.space, view.champion.variant.overrides, view.task.direction
    )
    told += [NewInsight(describe_dead_end(end), _varied(view.screenings, end.knob)) for end in ends]
    posted = {_topic(insight.text) for insight in view.ledger.insights(view.scope)}
    return [insight for insight in told if _topic(insight.text) not in posted][:MAX_INSIGHTS]


def _topic(text: str) -> str:
    """What a sentence is about, without its figures: posted once, however often it is found."""
    return re.sub(r"[-+]?\d[\d.e±+-]*", "#", text.split(":")[0])


def hypotheses(view: View, effects: Sequence[KnobEffect]) -> list[NewHypothesis]:
    """The champion with one more change, where the regression expects most of a run.

    See `exchange.expected_value` and `exchange.expected_cost`.
    """
    noise = view.noise.sd if view.noise else 1.0
    known = {run.variant.fingerprint for run in view.screenings}
    posted = {one.variant.fingerprint for one in view.ledger.hypotheses(view.scope)}
    champion = view.champion.variant
    found: list[NewHypothesis] = []
    for effect in effects:
        value = exchange.expected_value(effect.delta, effect.se, noise)
        if value <= 0:
            continue
        overrides = {**champion.overrides, effect.knob: effect.value}
        try:
            variant = view.space.variant(view.task.key, overrides)
        except InvalidVariant:
            continue
        if variant.fingerprint in known | posted or view.space.near(variant, champion):
            continue
        statement = f"{effect.knob}={effect.value} improves the champion."
        rationale = describe(effect, unit=view.task.unit)
        cost = exchange.expected_cost(variant, view.screenings, (effect.knob,))
        found.append(NewHypothesis(statement, rationale, variant, value, cost))
    return sorted(found, key=lambda one: -exchange.worth(one))[:MAX_HYPOTHESES]


def outdated(view: View) -> tuple[HypothesisDropped, ...]:
    """Open hypotheses that the champion has moved on from, each with the reason to drop it."""
    now = view.champion
    if now.number == 0:
        return ()
    history = view.ledger.champions(view.scope)
    found = []
    for one in view.ledger.hypotheses(view.scope, state=HypothesisState.OPEN):
        then = exchange.reigning(history, one.posted_at)
        if then is None or then.number == now.number:
            continue
        if exchange.moved_on(one.variant, then.variant, now.variant):
            reason = (
                f"the champion moved on: this was about {then.variant.describe()}, and now "
                f"{now.variant.describe()} is the champion"
            )
            found.append(HypothesisDropped(one.id, reason))
    return tuple(found)


def _varied(runs: Sequence[Run], knob: str) -> tuple[str, ...]:
    return tuple(run.id for run in runs if knob in run.variant.overrides)
