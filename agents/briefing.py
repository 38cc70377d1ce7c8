"""What a researcher is told: the notebook in short lines, the most important ones first.

Each function makes one `Section` of a prompt. Numbers are screening results and verdicts that were
given; whatever others wrote goes through a `Quoter`. No log of a run is ever shown: a code variant
prints what it wants. What another agent's refused code failed with is not shown either, for the
same reason.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from society.agents.context import Quoter, Section, outline
from society.codechange import describe_patch
from society.records import RefusalReason, Variant

if TYPE_CHECKING:
    from society.knobs import Knob, Scalar
    from society.records import Claim
    from society.roles import Background, Knowledge, Proposal, Result

BEST, LATEST, WORST = 12, 8, 5
"""Results that are shown."""
CODE_CHARS, ATTEMPT_CHARS = 60_000, 4_000
"""Longest file and longest failed change that are shown."""
PRIVATE = frozenset({RefusalReason.BROKEN, RefusalReason.ADVISED_AGAINST})
"""Refusals of which only the reason is shown: their notes were written by code or by a model."""


class Briefing:
    """The sections of one prompt; see the module."""

    def __init__(self, knowledge: Knowledge, background: Background, quoter: Quoter) -> None:
        """Write about this knowledge; `quoter` makes other people's texts inert."""
        self._known, self._back, self._quoter = knowledge, background, quoter

    def for_proposal(
        self, code: Mapping[str, str], failed: str = "", complaints: Sequence[str] = ()
    ) -> list[Section]:
        """All there is to know before a proposal.

        Args:
            code: The champion's files, empty if they are not shown.
            failed: The reader's own latest code change, if it did not work.
            complaints: What is wrong with it and those before.
        """
        return [
            self.task(), self.refused(), self.attempt(failed), self.champion(), *self.knobs(),
            self.best(), self.latest(), self.worst(), self.verdicts(), self.recalled(),
            self.insights(), self.dead_ends(), self.failed(), self.hypotheses(), self.pending(),
            *self.code(code, complaints),
        ]  # fmt: skip

    def for_review(self, proposal: Proposal, changes: Sequence[str]) -> list[Section]:
        """What is needed to judge a proposal; `changes` are the lines of its code change."""
        known = self._known
        quoted = [
            f"Changes: {self.differs(proposal.variant)}",
            f"Idea: {self._quoter.line(proposal.idea, 'a proposal', 600)}",
        ]
        if proposal.expected is not None:
            quoted.append(f"Its author expects {proposal.expected:+.1f} noise floors.")
        if proposal.despite:
            quoted.append(f"Despite failures: {self._quoter.line(proposal.despite, 'a proposal')}")
        sections = [
            self._section("The proposal", quoted, 0, needed=True, quoted=True),
            self.task(), self.champion(), self.best(), self.verdicts(), self.recalled(),
            self.worst(), self.dead_ends(), self.failed(), self.pending(),
        ]  # fmt: skip
        diff = self._quoter.code("\n".join(changes), f"a patch by {known.agent}", 8_000)
        if changes:
            code = self._section("Its code change", diff.splitlines(), 2, least=5, quoted=True)
            sections.insert(1, code)
        return sections

    def task(self) -> Section:
        """What is improved, what is left to spend, and what is noise."""
        back, known = self._back, self._known
        lines = [back.about, f"Budget left: {back.budget.runs} of {back.budget.total} runs."]
        if back.noise is not None:
            lines.append(
                f"Noise floor: {back.noise.sd:.2g}, one standard deviation between seeds, from "
                f"{back.noise.seeds} runs."
            )
        lines.append(f"Experiments screened so far: {known.tried}.")
        return self._section("The task", lines, 0, needed=True)

    def champion(self) -> Section:
        """What proposals are compared with, and how it came about."""
        known = self._known
        lines = [f"{self.variant(known.champion)}; {self._score(known.champion_score)}"]
        lines += [
            f"before it: {self.variant(one.variant)}; {self._score(score)}"
            for one, score in self._back.champions[-4:-1][::-1]
        ]
        return self._section("The champion", lines, 0, least=1, needed=True)

    def knobs(self) -> list[Section]:
        """Every knob with its range and the champion's value; below, what they do.

        Those that the champion changes come first, the others in an order that differs from prompt
        to prompt, so that a small budget does not always hide the same ones.
        """
        space, champion = self._known.space, self._known.champion.overrides
        names = list(space.knobs)
        random.Random(self._known.entropy).shuffle(names)
        names.sort(key=lambda name: name not in champion)
        values = {name: champion.get(name, space.default(name)) for name in names}
        lines = [knob_line(name, space.knobs[name], values[name]) for name in names]
        told = [name for name in names if space.knobs[name].about]
        about = [f"{name}: {space.knobs[name].about}" for name in told]
        title = "Knobs: the champion's value, and what is allowed"
        return [
            self._section(title, lines, 2, least=4),
            self._section("What knobs do", about, 9),
        ]

    def best(self) -> Section:
        """The best screening results."""
        ranked = sorted(self._scored(), key=self._rank)[:BEST]
        title = "Best screening results, against the champion (one seed, not verified)"
        return self._section(title, list(map(self._result, ranked)), 3, least=2, quoted=True)

    def latest(self) -> Section:
        """The latest screening results that are not among the best."""
        best = {id(one) for one in sorted(self._scored(), key=self._rank)[:BEST]}
        rest = [one for one in self._known.results if id(one) not in best][-LATEST:][::-1]
        return self._section("Latest other results", list(map(self._result, rest)), 6, quoted=True)

    def worst(self) -> Section:
        """The worst screening results."""
        scored = sorted(self._scored(), key=self._rank)
        worst = scored[max(BEST, len(scored) - WORST) :][::-1]
        return self._section("Worst results", list(map(self._result, worst)), 6, quoted=True)

    def verdicts(self) -> Section:
        """The latest claims: how they were decided, or that they are under test."""
        lines = [self._claim(claim) for claim in reversed(self._back.claims)]
        return self._section("Claims", lines, 4, least=1, quoted=True)

    def recalled(self) -> Section:
        """What the notebook says that is nearest in meaning."""
        lines = [
            f"{hit.ref}: {self._quoter.line(hit.text, f'recall, {hit.id}')}"
            for hit in self._back.recalled
        ]
        return self._section("From the notebook, nearest in meaning", lines, 5, quoted=True)

    def insights(self) -> Section:
        """What meta-analysts have found, the latest first."""
        lines = [
            f"{one.id}: {self._quoter.line(one.text, f'insight {one.id} by {one.author}')}"
            for one in reversed(self._back.insights)
        ]
        return self._section("Insights", lines, 4, least=1, quoted=True)

    def dead_ends(self) -> Section:
        """What was proposed and not run."""
        lines = []
        for one in reversed(self._back.refusals):
            note = "" if one.reason in PRIVATE else one.note
            told = f": {self._quoter.line(note, f'refusal by {one.agent}', 160)}" if note else ""
            lines.append(f"{self.differs(one.variant)} ({one.reason.replace('_', ' ')}){told}")
        title = "Refused before, do not repeat"
        return self._section(title, list(dict.fromkeys(lines)), 5, quoted=True)

    def failed(self) -> Section:
        """Runs without a score; why, as the harness puts it."""
        lines = [
            f"{run.id}: {self.differs(run.variant)}: {run.outcome.replace('_', ' ')}"
            for run in reversed(self._back.failed)
        ]
        return self._section("Runs that failed", lines, 5, quoted=True)

    def hypotheses(self) -> Section:
        """Ideas that wait for a test; they will be tested anyway."""
        lines = [
            f"{one.id}: {self.differs(one.variant)}: "
            + self._quoter.line(one.statement, f"hypothesis {one.id} by {one.author}", 200)
            for one in self._back.hypotheses
        ]
        title = "Open hypotheses (will be tested without you)"
        return self._section(title, lines, 7, quoted=True)

    def pending(self) -> Section:
        """What is being screened."""
        lines = [self.differs(variant) for variant in self._known.pending]
        return self._section("Being run right now", lines, 6, quoted=True)

    def refused(self) -> Section:
        """What the reader has just proposed in vain."""
        lines = [
            f"{self.differs(one.proposal.variant)} was refused "
            f"({one.reason.replace('_', ' ')}): {self._quoter.line(one.note, 'a refusal', 600)}"
            for one in reversed(self._known.refused)
        ]
        title = "Your own proposals of just now, refused"
        return self._section(title, lines, 1, least=1, quoted=True)

    def attempt(self, change: str) -> Section:
        """The reader's own code change that did not work: it remembers nothing of it."""
        lines = self._quoter.code(change, "a patch of its reader", ATTEMPT_CHARS).splitlines()
        return self._section("Your last code change, which failed", lines, 1, least=5, quoted=True)

    def code(self, files: Mapping[str, str], complaints: Sequence[str] = ()) -> list[Section]:
        """The champion's code, file by file; signatures where there is no room for it.

        The file that the last broken patch was about comes first, then one drawn at random, so that
        a small budget shows another file to the next reader.
        """
        names = list(files)
        random.Random(self._known.entropy + 1).shuffle(names)
        stumbled = self._stumbled(complaints)
        names.sort(key=lambda name: name not in stumbled)
        return [
            Section(
                f"File {name} (the champion's)",
                (self._quoter.code(files[name], f"the champion's {name}", CODE_CHARS),),
                priority=7 + place,
                short="signatures only; it cannot be edited now:\n"
                + self._quoter.code(outline(files[name]), f"the champion's {name}", 4_000),
                file=name,
                nonce=self._quoter.nonce,
            )
            for place, name in enumerate(names)
        ]

    def _stumbled(self, complaints: Sequence[str]) -> set[str]:
        """Files that an answer was about which has just been refused."""
        refused = [
            describe_patch(one.proposal.variant.patch) + one.note
            for one in self._known.refused
            if one.proposal.variant.patch
        ]
        told = " ".join([*complaints, *refused])
        return {name for name in self._back.sources if name in told}

    # ---------------------------------------------------------------- words

    def variant(self, variant: Variant) -> str:
        """A variant in words."""
        words = [f"{name}={value}" for name, value in sorted(variant.overrides.items())]
        words += [describe_patch(variant.patch)] if variant.patch else []
        return self._quoter.line(", ".join(words) or "the baseline, unchanged", "a variant", 600)

    def differs(self, variant: Variant) -> str:
        """What sets a variant apart from the champion."""
        champion, space = self._known.champion, self._known.space
        mine, other = variant.overrides, champion.overrides
        words = []
        for name in sorted({*mine, *other} & space.knobs.keys()):
            default = space.default(name)
            old, new = other.get(name, default), mine.get(name, default)
            if old != new:
                words.append(f"{name} {old} -> {new}")
        if variant.code != champion.code:
            words.append(describe_patch(variant.patch) if variant.patch else "without its patch")
        text = ", ".join(words) or "the champion itself"
        return self._quoter.line(text, "a variant", 600)

    def _result(self, result: Result) -> str:
        if result.score is None:
            return f"{self.differs(result.variant)}: failed"
        return f"{self.differs(result.variant)}: {result.score:.4f}{self._gain(result.score)}"

    def _gain(self, score: float) -> str:
        known = self._known
        if known.champion_score is None:
            return ""
        gain = known.direction.improvement(known.champion_score, score)
        if not known.noise_sd:
            return f" ({gain:+.4f})"
        return f" ({gain:+.4f}, {gain / known.noise_sd:+.1f} noise floors)"

    def _claim(self, claim: Claim) -> str:
        told = f"{claim.id}: {self.differs(claim.variant)}"
        if claim.verdict is None:
            return f"{told}: under test"
        told += f": {claim.verdict.decision.replace('_', ' ')}"
        effect = claim.verdict.effect
        if effect is None:
            return told
        against = "the baseline" if claim.reference.is_baseline else "the champion of then"
        interval = f"[{effect.low:+.4f}, {effect.high:+.4f}]"
        return f"{told}, {effect.shrunken:+.4f} {interval} against {against}"

    @staticmethod
    def _score(score: float | None) -> str:
        return "not screened yet" if score is None else f"screening score {score:.4f}"

    def _scored(self) -> list[Result]:
        mark = self._known.champion.fingerprint
        return [
            one
            for one in self._known.results
            if one.score is not None and one.variant.fingerprint != mark
        ]

    def _rank(self, result: Result) -> float:
        return -self._known.direction.sign * (result.score or 0.0)

    def _section(
        self,
        title: str,
        items: Sequence[str],
        priority: int,
        *,
        least: int = 0,
        needed: bool = False,
        quoted: bool = False,
    ) -> Section:
        least = min(least, len(items))
        nonce = self._quoter.nonce if quoted else ""
        return Section(title, tuple(items), priority, least, needed=needed, nonce=nonce)


def knob_line(name: str, knob: Knob, value: Scalar) -> str:
    """E.g. `lr = 0.04 (0.002 to 1, logarithmic)`."""
    if isinstance(value, bool):
        allowed = "true or false"
    elif knob.choices:
        allowed = " | ".join(map(str, knob.choices))
    else:
        allowed = f"{knob.low:g} to {knob.high:g}" + (", logarithmic" if knob.log else "")
        allowed += ", whole" if isinstance(value, int) else ""
    unit = f" {knob.unit}" if knob.unit else ""
    return f"{name} = {value}{unit} ({allowed})"
