"""The meta-analyst: reads all results together, posts insights and hypotheses."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from society import exchange, logs
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
from society.roles.base import Duty, Interrupted, Lab, Outcome, Reader, Role
from society.roles.figures import Facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.records import Claim, Entry, Run
    from society.roles.base import Reading
    from society.roles.view import View

MAX_INSIGHTS = 6
"""Most insights posted by one reading."""
MAX_READINGS = 3
"""Most insights taken over from a brain that explains."""
DECIDED, RANKED = 10, 15
"""Latest claims, best runs and latest runs that it is given."""
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
            view.screenings,
            view.space,
            view.champion.variant.overrides,
            view.task.direction,
            view.champion.variant.code,
        )
        entries: list[Entry] = list(insights(view, effects))
        if not view.closing:
            entries += hypotheses(view, effects)
        if isinstance(lab.brain, Reader):
            facts = findings(view, effects)
            with suppress(Interrupted):  # what was found without it is posted all the same
                readings = await lab.aside(lab.brain.explain(lab.agent, facts))
                entries += believable(readings, facts, lab.agent)
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
        view.screenings,
        view.space,
        view.champion.variant.overrides,
        view.task.direction,
        view.champion.variant.code,
    )
    told += [NewInsight(describe_dead_end(end), _varied(view.screenings, end.knob)) for end in ends]
    posted = {_topic(insight.text) for insight in view.ledger.insights(view.scope)}
    return [insight for insight in told if _topic(insight.text) not in posted][:MAX_INSIGHTS]


def findings(view: View, effects: Sequence[KnobEffect]) -> list[str]:
    """What a brain that explains is given: results, verdicts and effects, a line each with its id.

    Nothing about claims that are still open but that they are.
    """
    direction, unit, level = view.task.direction, view.task.unit, view.champion_screening
    facts = [
        f"The metric is {view.task.metric} in {unit}; "
        f"{'lower' if direction.sign < 0 else 'higher'} is better.",
        f"The champion is {view.champion.variant.describe()}"
        + ("." if level is None else f"; screening score {level:.4f}."),
        f"{len(view.board)} experiments were screened, each on one seed and verified by nobody.",
    ]
    if view.noise is not None:
        facts.append(f"The noise floor is {view.noise.sd:.4f} {unit}.")
    facts += [_decided(claim) for claim in view.claims[-DECIDED:]]
    facts += [
        f"Over all runs: {describe(effect, unit=unit)}"
        for effect in effects
        if effect.verdict in (KnobVerdict.HELPS, KnobVerdict.HURTS)
    ]
    ranked = [run for _, run in view.board.best(direction.sign)][:RANKED]
    shown = {run.id: run for run in (*ranked, *view.screenings[-RANKED:])}
    facts += [_screened(run, view) for run in shown.values()]
    return facts


def _decided(claim: Claim) -> str:
    what = f"{claim.variant.describe()} beats {claim.reference.describe()}"
    told = f"{claim.id}: the claim that {what}"
    if claim.verdict is None:
        return f"{told} is under test."
    effect = claim.verdict.effect
    told += f" was {claim.verdict.decision.replace('_', ' ')}"
    if effect is None:
        return f"{told}."
    return f"{told}: {effect.shrunken:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]."


def _screened(run: Run, view: View) -> str:
    told = f"{run.id}: {run.variant.describe()}: "
    if run.score is None:
        return told + run.outcome.replace("_", " ")
    delta = view.screening_delta(run)
    gain = "" if delta is None else f" ({'better' if delta > 0 else 'worse'} by {abs(delta):.4f})"
    return f"{told}{run.score:.4f}{gain}"


def believable(readings: Sequence[Reading], facts: Sequence[str], agent: str) -> list[NewInsight]:
    """The sentences of a brain that cite what they were given, and no number that was not in it."""
    log, known = logs.get("meta-analyst", agent=agent), Facts(facts)
    ids = {fact.partition(":")[0] for fact in facts}
    kept = []
    for one in readings[:MAX_READINGS]:
        strays = [name for name in one.evidence if name not in ids]
        odd = known.unsupported(one.text)
        if one.text and one.evidence and not strays and not odd:
            kept.append(NewInsight(one.text, one.evidence))
        else:
            log.info("insight dropped", unsupported=odd, unknown=strays, text=one.text)
    return kept


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
            variant = view.space.variant(view.task.key, overrides, champion.patch)
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
