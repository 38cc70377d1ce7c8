"""The ledger in sentences: what the semantic index holds, and what it must never hold.

Indexed: outcomes of screening runs with direction and size of the effect, claims as they were
filed, verdicts, hypotheses with what became of them, insights, and results that users brought along
from elsewhere. Never indexed: calibration, verification, reproduction, audit and study runs, seeds,
and any result of a claim that is still open, because agents search this text before they propose.

A passage says what was known when its record was made: a run is compared with the champion and the
noise floor of that moment, so that passages written at different times agree.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from society.cleaning import bounded
from society.codechange import describe_patch
from society.errors import UnknownName
from society.records import (
    Claim,
    Decision,
    Hypothesis,
    HypothesisState,
    Insight,
    Outcome,
    Prior,
    Scope,
    Variant,
    Verdict,
)

if TYPE_CHECKING:
    from society.memory.feed import Posted, Records, Reign, Screened
    from society.memory.reader import LedgerReader

KINDS = ("run", "claim", "verdict", "hypothesis", "insight", "prior")
"""What a passage can be about."""

BETTER, WORSE, WITHIN_NOISE = "better", "worse", "within_noise"
COMPLETED = Outcome.COMPLETED.value
COMPARED = (BETTER, WORSE, WITHIN_NOISE, COMPLETED)
"""How a completed screening run came out against the champion; `completed` if there was none."""
IDEAS = (HypothesisState.OPEN, HypothesisState.TESTED, HypothesisState.DROPPED)
"""States of a hypothesis that are told apart; one that somebody tests right now is still open."""
OUTCOMES_OF = {
    "run": (*COMPARED, *(one.value for one in Outcome if one is not Outcome.COMPLETED)),
    "verdict": tuple(one.value for one in Decision),
    "hypothesis": tuple(one.value for one in IDEAS),
}
"""Outcomes by kind of passage; the other kinds have none."""
OUTCOMES = tuple(dict.fromkeys(one for some in OUTCOMES_OF.values() for one in some))

_FAILED = {
    Outcome.DIVERGED: "training diverged",
    Outcome.CRASHED: "the run crashed",
    Outcome.TIMED_OUT: "the run timed out",
    Outcome.REJECTED: "the guard rejected the run",
}
_CLOSED = {
    Decision.ACCEPTED: "accepted: verification confirmed the improvement",
    Decision.CONFIRMED: "accepted, and confirmed again on probation",
    Decision.REJECTED: "rejected: verification did not confirm the improvement",
    Decision.ROLLED_BACK: "rolled back: it was accepted, then failed probation",
    Decision.SUPERSEDED: "superseded: its reference is no longer the champion",
}
_NAMED = re.compile(r"\b(?:([a-z]\w*)=|([a-z][a-z0-9]*(?:_[a-z0-9]+)+)\b)")
"""What a free text names as a knob: `name=value`, or a name with an underscore."""
_BATCH = 1000
FOREIGN_CHARS = 1000
"""How much a passage holds of a text that an agent, a model or another program wrote. It goes into
what other agents read."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One indexed text."""

    id: str
    """Kind and id of the record, e.g. `run:r00012`."""
    kind: str
    """One of `KINDS`."""
    ref: str
    """Id of the record (of the claim for a verdict)."""
    society: str
    text: str
    agent: str = ""
    """Who made the record; empty for what a user imported."""
    outcome: str = ""
    """One of `OUTCOMES_OF` its kind; empty for other kinds."""
    knobs: frozenset[str] = frozenset()
    """What was changed against the champion of that time (against the baseline if there was none,
    or nothing was); for an insight and an imported result, the knobs that its text names."""
    at: float = 0.0
    """When the record was made, Unix seconds, to the millisecond."""

    def __post_init__(self) -> None:
        """Keep the milliseconds: not every index gives back more."""
        object.__setattr__(self, "at", milliseconds(self.at) / 1000)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which passages count; a field that is None lets all pass."""

    kinds: Collection[str] | None = None
    """Some of `KINDS`."""
    knob: str | None = None
    outcome: str | None = None
    """One of `OUTCOMES`; `completed` stands for every run that has a score."""
    agent: str | None = None
    since: float | None = None
    """Unix seconds, inclusive."""
    until: float | None = None
    """Unix seconds, exclusive."""

    def check(self) -> Filter:
        """Return the filter if its kinds and outcome exist.

        Raises:
            UnknownName: one does not; the message lists those that do.
        """
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise UnknownName("kind of passage", kind, KINDS)
        if self.outcome is not None and self.outcome not in OUTCOMES:
            raise UnknownName("outcome", self.outcome, OUTCOMES)
        return self

    @property
    def is_empty(self) -> bool:
        """Whether everything passes."""
        return self == Filter()

    def accepts_class(self, kind: str, outcome: str) -> bool:
        """Whether passages of this kind and outcome may pass."""
        if self.kinds is not None and kind not in self.kinds:
            return False
        if self.outcome is None:
            return True
        return outcome == self.outcome or (self.outcome == COMPLETED and outcome in COMPARED)

    def accepts(self, passage: Passage) -> bool:
        """Whether a passage passes."""
        return (
            self.accepts_class(passage.kind, passage.outcome)
            and (self.knob is None or self.knob in passage.knobs)
            and (self.agent is None or self.agent == passage.agent)
            and (self.since is None or milliseconds(passage.at) >= milliseconds(self.since))
            and (self.until is None or milliseconds(passage.at) < milliseconds(self.until))
        )


ALL = Filter()
"""Lets every passage pass."""


class Prose:
    """Writes passages about one ledger."""

    def __init__(self, ledger: LedgerReader, *, lower_is_better: bool = True) -> None:
        """Read from `ledger`; the direction of its metric says what an improvement is."""
        self._ledger = ledger
        self._lower_is_better = lower_is_better

    def passages(self, posted: Sequence[Posted]) -> list[Passage]:
        """The passages for lines of the outbox, each once; nothing for what is not indexed."""
        told = _Teller(self._ledger.told(posted), self._lower_is_better)
        lines = dict.fromkeys((one.kind, one.ref) for one in posted)
        found = (told.passage(kind, ref) for kind, ref in lines)
        return [passage for passage in found if passage is not None]

    def all(self, where: Filter = ALL) -> Iterator[Passage]:
        """Every passage that passes a filter, each once, in its latest wording."""
        after, seen = 0, set[tuple[str, str]]()
        while found := self._ledger.posted(after, _BATCH):
            after = found[-1].seq
            new = [
                one
                for one in found
                if (one.kind, one.ref) not in seen
                and (where.kinds is None or one.kind in where.kinds)
            ]
            seen.update((one.kind, one.ref) for one in new)
            yield from (passage for passage in self.passages(new) if where.accepts(passage))


class _Teller:
    """Puts records into words."""

    def __init__(self, records: Records, lower_is_better: bool) -> None:
        self._records = records
        self._sign = 1.0 if lower_is_better else -1.0

    def passage(self, kind: str, ref: str) -> Passage | None:
        records = self._records
        if kind == "run":
            return self._run(records.runs[ref]) if ref in records.runs else None
        if kind == "claim":
            return self._claim(records.claims[ref])
        if kind == "verdict":
            claim = records.claims[ref]
            return None if claim.verdict is None else self._verdict(claim, claim.verdict)
        if kind == "hypothesis":
            return self._hypothesis(*records.hypotheses[ref])
        if kind == "prior":
            return self._prior(records.priors[ref])
        return self._insight(records.insights[ref])

    def _run(self, run: Screened) -> Passage:
        reign = self._reign(run.scope, run.finished_at)
        text = f"Tried {run.variant.describe()}"
        if reign is not None and reign.score is not None:
            words = changes(run.variant, reign.variant)
            text += "" if words == _UNCHANGED else f" ({words})"
        text += f": {self._came_to(run, reign)}."
        if run.idea:
            text += f" Idea: {_foreign(run.idea)}"
        return Passage(
            f"run:{run.id}", "run", run.id, run.society, text, run.agent,
            self._outcome(run, reign), _touched(run.variant, reign), run.finished_at,
        )  # fmt: skip

    def _came_to(self, run: Screened, reign: Reign | None) -> str:
        """What came out of a screening run, with the effect against the champion of then."""
        if run.outcome is not Outcome.COMPLETED or run.score is None:
            return _FAILED.get(run.outcome, run.outcome.value)
        gain = self._gain(run, reign)
        if gain is None or reign is None:
            return f"screening score {run.score:.5f}"
        word = "improved" if gain > 0 else "worsened" if gain < 0 else "did not change"
        return (
            f"screening {word} the score by {abs(gain):.5f}, "
            f"{run.score:.5f} against {reign.score:.5f} of the champion"
        )

    def _gain(self, run: Screened, reign: Reign | None) -> float | None:
        """Improvement over the champion of then; None where there is nothing to compare with."""
        if reign is None or reign.score is None or run.score is None or reign.run == run.id:
            return None
        return self._sign * (reign.score - run.score)

    def _outcome(self, run: Screened, reign: Reign | None) -> str:
        if run.outcome is not Outcome.COMPLETED:
            return run.outcome.value
        gain = self._gain(run, reign)
        if gain is None:
            return COMPLETED
        known = [one for one in self._records.floors.get(run.scope, ())
                 if one.since <= run.finished_at]  # fmt: skip
        if abs(gain) <= (known[-1].sd if known else 0.0):
            return WITHIN_NOISE
        return BETTER if gain > 0 else WORSE

    def _reign(self, scope: Scope, at: float) -> Reign | None:
        """Who was the champion then."""
        reigning = [one for one in self._records.reigns.get(scope, ()) if one.since <= at]
        return reigning[-1] if reigning else None

    @staticmethod
    def _claim(claim: Claim) -> Passage:
        text = (
            f"Claim {claim.id}: {claim.variant.describe()} beats {claim.reference.describe()} "
            f"({changes(claim.variant, claim.reference)}); it was "
            f"{claim.screening_delta:.5f} better in screening."
        )
        return Passage(
            f"claim:{claim.id}", "claim", claim.id, claim.society, text, claim.author,
            "", changed(claim.variant, claim.reference), claim.filed_at,
        )  # fmt: skip

    @staticmethod
    def _verdict(claim: Claim, verdict: Verdict) -> Passage:
        text = (
            f"Verdict on claim {claim.id}, {claim.variant.describe()} against "
            f"{claim.reference.describe()}: {_CLOSED[verdict.decision]}."
        )
        effect = verdict.effect
        if effect is not None:
            text += (
                f" Effect {effect.shrunken:+.5f}, 95 % interval {effect.low:+.5f} to "
                f"{effect.high:+.5f} on {effect.seeds} seeds."
            )
        if verdict.reason:
            text += f" {_foreign(verdict.reason)}"
        return Passage(
            f"verdict:{claim.id}", "verdict", claim.id, claim.society, text, verdict.judge,
            verdict.decision.value, changed(claim.variant, claim.reference), verdict.decided_at,
        )  # fmt: skip

    def _hypothesis(self, scope: Scope, hypothesis: Hypothesis) -> Passage:
        said = _foreign(hypothesis.statement)
        text = f"Hypothesis: {said} Try {hypothesis.variant.describe()}."
        if hypothesis.rationale:
            text += f" Because: {_foreign(hypothesis.rationale)}"
        state = hypothesis.state if hypothesis.state in IDEAS else HypothesisState.OPEN
        if state is HypothesisState.TESTED:
            text += f" {self._test(hypothesis)}"
        if state is HypothesisState.DROPPED:
            text += f" Dropped without a test: {_foreign(hypothesis.dropped_because or '')}."
        return Passage(
            f"hypothesis:{hypothesis.id}", "hypothesis", hypothesis.id, hypothesis.society, text,
            hypothesis.author, state.value,
            _touched(hypothesis.variant, self._reign(scope, hypothesis.posted_at)),
            hypothesis.posted_at,
        )  # fmt: skip

    def _test(self, hypothesis: Hypothesis) -> str:
        run = self._records.runs.get(hypothesis.run_id or "")
        if run is None:
            return f"Tested by run {hypothesis.run_id}."
        came_to = self._came_to(run, self._reign(run.scope, run.finished_at))
        return f"Tested by {run.agent} in run {run.id}: {came_to}."

    @staticmethod
    def _insight(insight: Insight) -> Passage:
        text = _foreign(insight.text)
        return Passage(
            f"insight:{insight.id}", "insight", insight.id, insight.society, text,
            insight.author, "", _named(text), insight.posted_at,
        )  # fmt: skip

    @staticmethod
    def _prior(prior: Prior) -> Passage:
        score = "without a score" if prior.score is None else f"score {prior.score:.5f}"
        text = (
            f"Elsewhere, not verified here ({_foreign(prior.source)}, {_foreign(prior.label)}): "
            f"{_foreign(prior.description)} [{_foreign(prior.status)}, {score}]"
        )
        return Passage(
            f"prior:{prior.id}", "prior", prior.id, prior.society, text,
            "", "", _named(prior.description), prior.imported_at,
        )  # fmt: skip


def _foreign(text: str) -> str:
    """A text that somebody else wrote: one line without hidden characters, not too long."""
    return bounded(text, FOREIGN_CHARS)


def milliseconds(seconds: float) -> int:
    """Unix milliseconds: what times are compared by."""
    return round(1000 * seconds)


def _touched(variant: Variant, reign: Reign | None) -> frozenset[str]:
    """The knobs that a proposal changes, seen from the champion of then."""
    against_champion = changed(variant, reign.variant) if reign is not None else frozenset[str]()
    return against_champion or frozenset(variant.overrides)


def _named(text: str) -> frozenset[str]:
    return frozenset(with_value or name for with_value, name in _NAMED.findall(text))


def changed(variant: Variant, reference: Variant) -> frozenset[str]:
    """The knobs in which a variant differs from another."""
    mine, other = variant.overrides, reference.overrides
    return frozenset(
        name
        for name in {*mine, *other}
        if name not in mine
        or name not in other
        or mine[name] != other[name]
        or isinstance(mine[name], bool) != isinstance(other[name], bool)
    )


def changes(variant: Variant, reference: Variant) -> str:
    """What sets a variant apart from another, in words.

    E.g. `changes warm_down from 0.2 to 0.3`; `the baseline's` stands for a value without override.
    """
    parts = [
        f"{name} from {reference.overrides.get(name, _BASELINE)}"
        f" to {variant.overrides.get(name, _BASELINE)}"
        for name in sorted(changed(variant, reference))
    ]
    if variant.code != reference.code:
        parts.append(code_change(variant))
    return "changes " + ", ".join(parts) if parts else _UNCHANGED


def code_change(variant: Variant) -> str:
    """What a variant with other code than a reference has, in words."""
    if variant.patch is None:
        return "the code back to the baseline's"
    return f"the code: {describe_patch(variant.patch)}"


_UNCHANGED = "changes nothing"
_BASELINE = "the baseline's"
