"""`society memory show`: one record with everything that is linked to it.

Everything is found by ids and indexes, so that it is quick in a large notebook; only the numeric
neighbours look at all screening runs of the task and tier. Whatever is compared is of one tier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from society import exchange, tiers
from society.cli_common import plain
from society.codechange import describe_patch
from society.errors import InvalidVariant, SocietyError, UsageError
from society.experiments.neighbourhood import Neighbourhood
from society.experiments.space import Space
from society.experiments.task import load_task
from society.records import Outcome, RunKind, Variant

if TYPE_CHECKING:
    from society.experiments.task import Task
    from society.memory.links import Links, Whereabouts
    from society.memory.reader import LedgerReader
    from society.records import Champion, Claim, Hypothesis, Run, Study

NEIGHBOURS = 5
"""Nearest variants shown."""
LOADED = 200
"""Linked records of one sort that are read and described; the others are named by id."""


@dataclass(frozen=True, slots=True)
class Found:
    """A record and what is linked to it, as JSON types."""

    kind: str
    """`run`, `claim`, `hypothesis`, `insight`, `study`, `prior` or `society`."""
    record: Mapping[str, Any]
    linked: Mapping[str, Sequence[Mapping[str, Any]]]
    """Sort of link -> what is linked, each with `words` that say it in one line."""
    prose: str
    """What to look for to find other records that read alike; empty for none."""
    patch: str | None = None
    """The code change of the variant it is about."""


def lookup(ledger: LedgerReader, identity: str) -> Found:
    """A record of any kind by its id, with everything that is linked to it.

    Raises:
        UsageError: There is no such record.
    """
    where = ledger.whereabouts(identity)
    if where is None:
        known = ", ".join(f"{kind} {last}" for kind, last in ledger.latest_ids().items())
        raise UsageError(
            f"No record {identity!r} in this notebook. The latest ones: {known or 'none'}."
        )
    return _READERS[where.kind](_Desk(ledger, where), identity)


class _Desk:
    """One task and tier of a ledger, and how to say things about it."""

    def __init__(self, ledger: LedgerReader, where: Whereabouts) -> None:
        self.ledger = ledger
        self.where = where
        self.scope = where.scope
        self.task = None if where.scope is None else _task(ledger, where.scope.task)
        self.space = None if self.task is None else Space.of(self.task)
        self.sign = -1.0 if self.task is None else float(self.task.direction.sign)

    def place(self, memory: int = 0) -> dict[str, Any]:
        """Task, tier and class of the tier."""
        assert self.scope is not None
        tier_class = tiers.class_of(self.scope.tier, memory)
        return {"task": self.scope.task, "tier": self.scope.tier, "tier_class": tier_class}

    def links(self, identity: str, variant: Variant | None = None) -> Links:
        return self.ledger.links(identity, self.where, variant)

    def history(self) -> tuple[Champion, ...]:
        assert self.scope is not None
        return self.ledger.champions(self.scope)

    # ---------------------------------------------------------------- what is linked, in words

    def runs(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return self._described(ids, self.ledger.run, _run_words, _run_facts)

    def claims(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return self._described(ids, self.ledger.claim, _claim_words, _claim_facts)

    def insights(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return self._described(ids, self.ledger.insight, lambda one: one.text, _evidence)

    def studies(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return self._described(ids, self.ledger.study, _study_words, lambda one: {"kind": one.kind})

    def hypotheses(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        return [self._hypothesis(self.ledger.hypothesis(id)) for id in ids]

    def _described(
        self,
        ids: Sequence[str],
        read: Callable[[str], Any],
        words: Callable[[Any], str],
        facts: Callable[[Any], dict[str, Any]],
    ) -> list[dict[str, Any]]:
        records = [read(id) for id in ids[:LOADED]]
        told = [{"id": one.id, **facts(one), "words": f"{one.id} {words(one)}"} for one in records]
        return told + [{"id": id, "words": id} for id in ids[LOADED:]]

    def _hypothesis(self, one: Hypothesis) -> dict[str, Any]:
        came_out = self.outcome(one)
        return {
            "id": one.id,
            "author": one.author,
            "state": one.state.value,
            "outcome": plain(came_out),
            "words": f"{one.id} by {one.author}, {one.statement} {came_out.describe()}",
        }

    def outcome(self, one: Hypothesis) -> exchange.Tested:
        """Who tested a hypothesis, and what came out."""
        scope = self.scope
        assert scope is not None
        noise = self.ledger.noise(scope)
        [(_, found)] = exchange.outcomes(
            [one],
            self.history(),
            self.ledger.run,
            lambda variant: self.ledger.screening_score(scope, variant),
            noise_sd=noise.sd if noise else None,
            sign=self.sign,
        )
        return found

    def evidence(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Records of several kinds that something cites."""
        readers = {
            "run": self.runs, "claim": self.claims, "insight": self.insights,
            "study": self.studies, "hypothesis": self.hypotheses,
        }  # fmt: skip
        told: list[dict[str, Any]] = []
        for id in ids[:LOADED]:
            where = self.ledger.whereabouts(id)
            if where is not None and where.kind in readers:
                told += readers[where.kind]([id])
        return told + [{"id": id, "words": id} for id in ids[LOADED:]]

    # ---------------------------------------------------------------- about a variant

    def about_variant(
        self, variant: Variant, moment: float, links: Links, *, run: str | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """What it changes, what lies near it, and what the notebook says about it."""
        return {
            "changes": self.changes(variant, moment),
            "hypotheses": self.hypotheses(links.hypotheses),
            "champion": [
                {"number": n, "words": f"#{n} in the champion history of this task and tier"}
                for n in links.crowned
            ],
            "neighbours": self.neighbours(variant),
            "refused because of it": [
                _refusal(one) for one in links.refusals if run is not None and one.run_id == run
            ],
            "refused proposals of it": [
                _refusal(one)
                for one in links.refusals
                if one.variant.fingerprint == variant.fingerprint
            ],
            "insights": self.insights(links.insights),
            "studies": self.studies(links.studies),
        }

    def changes(self, variant: Variant, moment: float) -> list[dict[str, Any]]:
        """What a variant changes against the baseline and against the champion of its time."""
        told = [self._change("baseline", variant, Variant(variant.task))]
        champion = exchange.reigning(self.history(), moment)
        if champion is not None and not champion.variant.is_baseline:
            name = f"champion {champion.number}, of that time"
            told.append(self._change(name, variant, champion.variant))
        return told

    def _change(self, name: str, variant: Variant, reference: Variant) -> dict[str, Any]:
        knobs = {
            knob: {"from": self._value(reference, knob), "to": self._value(variant, knob)}
            for knob in sorted(exchange.differing(variant, reference) - {"patch"})
        }
        words = [
            f"{knob} {_said(one['from'])} -> {_said(one['to'])}" for knob, one in knobs.items()
        ]
        code = variant.code != reference.code
        own = "no patch" if variant.patch is None else describe_patch(variant.patch)
        words += [f"code: {own}"] if code else []
        return {
            "against": name,
            "reference": reference.describe(),
            "knobs": knobs,
            "code": code,
            "words": f"against the {name}: {', '.join(words) or 'nothing'}",
        }

    def _value(self, variant: Variant, knob: str) -> Any:
        """A knob's value, the baseline's own where it is not changed; None where nobody knows."""
        if knob in variant.overrides:
            return variant.overrides[knob]
        if self.space is None or knob not in self.space.knobs:
            return None
        return self.space.default(knob)

    def neighbours(self, variant: Variant) -> list[dict[str, Any]]:
        """The nearest variants that were screened on this task and tier, by their numbers."""
        if self.space is None or self.scope is None:
            return []
        board = self.ledger.board(self.scope).runs()
        screened = {run.id: run for run in board}
        near = Neighbourhood(self.space)
        for run in board:
            if run.variant.fingerprint != variant.fingerprint:
                near.add(run.id, run.variant)
        try:
            found = near.nearest(variant, NEIGHBOURS) if len(near) else ()
        except InvalidVariant:  # of a search space that has changed since
            return []
        return [
            {
                "id": one.key,
                "distance": one.distance,
                **_run_facts(screened[one.key]),
                "words": f"{one.key} at distance {one.distance:.3f}: "
                f"{_run_words(screened[one.key])}",
            }
            for one in found
        ]


# ------------------------------------------------------------------------------ each kind


def _run(desk: _Desk, identity: str) -> Found:
    run = desk.ledger.run(identity)
    links = desk.links(identity, run.variant)
    record = plain(run) | desk.place(run.environment.mem_bytes)
    linked = desk.about_variant(run.variant, run.finished_at, links, run=identity)
    linked["claims"] = desk.claims(links.claims)
    linked["runs of the same variant"] = desk.runs(links.runs)
    linked["compared with"] = _comparison(desk, run)
    record["code_kept"] = desk.ledger.source(run.environment.code) is not None
    found = _found("run", record, linked, f"{run.variant.describe()}. {run.idea}")
    return replace(found, patch=run.variant.patch)


def _comparison(desk: _Desk, run: Run) -> list[dict[str, Any]]:
    """A screening run beside the champion of that moment, on the same seed and tier."""
    champion = exchange.reigning(desk.history(), run.finished_at)
    if champion is None or run.kind is not RunKind.SCREENING or run.score is None:
        return []
    screened = desk.ledger.runs(desk.scope, kinds=[RunKind.SCREENING], variant=champion.variant)
    if not screened or screened[0].score is None or screened[0].id == run.id:
        return []
    reference = screened[0]
    delta = desk.sign * (run.score - screened[0].score)
    words = f"{delta:+.6g} against champion {champion.number} in run {reference.id}, same seed"
    return [{"id": reference.id, "delta": delta, "champion": champion.number, "words": words}]


def _claim(desk: _Desk, identity: str) -> Found:
    claim = desk.ledger.claim(identity)
    links = desk.links(identity, claim.variant)
    cited = claim.verdict.runs if claim.verdict else ()
    linked = desk.about_variant(claim.variant, claim.filed_at, links, run=claim.screening_run)
    linked["screening run (never evidence)"] = desk.runs([claim.screening_run])
    linked["runs made for it"] = desk.runs(links.made_for)
    linked["other runs of the verdict"] = desk.runs(
        [id for id in cited if id not in set(links.made_for)]
    )
    linked["other claims about it"] = desk.claims(links.claims)
    text = f"{claim.variant.describe()} beats {claim.reference.describe()}"
    found = _found("claim", plain(claim) | desk.place(), linked, text)
    return replace(found, patch=claim.variant.patch)


def _one_hypothesis(desk: _Desk, identity: str) -> Found:
    one = desk.ledger.hypothesis(identity)
    links = desk.links(identity, one.variant)
    came_out = desk.outcome(one)
    record = plain(one) | desk.place() | {"worth": one.worth, "outcome": plain(came_out)}
    linked = desk.about_variant(one.variant, one.posted_at, links)
    linked["what came out"] = [{**plain(came_out), "words": came_out.describe()}]
    linked["tested by"] = desk.runs([one.run_id] if one.run_id else [])
    linked["claims"] = desk.claims(links.claims)
    linked["runs of the variant"] = desk.runs([id for id in links.runs if id != one.run_id])
    found = _found("hypothesis", record, linked, f"{one.statement} {one.rationale}")
    return replace(found, patch=one.variant.patch)


def _insight(desk: _Desk, identity: str) -> Found:
    one = desk.ledger.insight(identity)
    linked = {
        "evidence": desk.evidence(one.evidence),
        "insights that cite it": desk.insights(desk.links(identity).insights),
    }
    return _found("insight", plain(one) | desk.place(), linked, one.text)


def _study(desk: _Desk, identity: str) -> Found:
    one = desk.ledger.study(identity)
    linked = {
        "evidence": desk.runs(one.evidence),
        "insights that cite it": desk.insights(desk.links(identity).insights),
    }
    return _found("study", plain(one) | desk.place(), linked, one.title)


def _prior(desk: _Desk, identity: str) -> Found:
    one = desk.ledger.prior(identity)
    words = "brought along from elsewhere: compared with no run, and evidence for nothing"
    linked = {"standing": [{"words": words}]}
    return _found("prior", plain(one) | desk.place(), linked, one.description)


def _society(desk: _Desk, identity: str) -> Found:
    holds = [
        {"kind": kind, "count": count, "words": f"{count} {kind}"}
        for kind, count in desk.ledger.held(identity).items()
    ]
    record = plain(desk.ledger.society(identity))
    return _found("society", record, {"holds": holds}, "")


_READERS: Mapping[str, Callable[[_Desk, str], Found]] = {
    "run": _run,
    "claim": _claim,
    "hypothesis": _one_hypothesis,
    "insight": _insight,
    "study": _study,
    "prior": _prior,
    "society": _society,
}


def _found(
    kind: str, record: Mapping[str, Any], linked: Mapping[str, list[dict[str, Any]]], prose: str
) -> Found:
    return Found(kind, record, {name: links for name, links in linked.items() if links}, prose)


# ------------------------------------------------------------------------------ words


def _run_facts(run: Run) -> dict[str, Any]:
    return {
        "kind": run.kind.value,
        "agent": run.agent,
        "outcome": run.outcome.value,
        "score": run.score,
        "variant": run.variant.describe(),
    }


def _run_words(run: Run) -> str:
    ended = run.score if run.outcome is Outcome.COMPLETED else run.outcome.value
    return f"{run.kind.value} by {run.agent}, seed {run.seed}: {ended} ({run.variant.describe()})"


def _claim_facts(claim: Claim) -> dict[str, Any]:
    verdict = claim.verdict
    return {
        "author": claim.author,
        "verdict": None if verdict is None else verdict.decision.value,
        "effect": None if verdict is None else plain(verdict.effect),
    }


def _claim_words(claim: Claim) -> str:
    state = claim.verdict.decision.value if claim.verdict else "open"
    return f"{state}: {claim.variant.describe()} beats {claim.reference.describe()}"


def _study_words(study: Study) -> str:
    return f"{study.kind}: {study.title}"


def _evidence(insight: Any) -> dict[str, Any]:
    return {"author": insight.author, "evidence": list(insight.evidence)}


def _refusal(one: Any) -> dict[str, Any]:
    reason = one.reason.value.replace("_", " ")
    words = f"{one.variant.describe()} by {one.agent} in {one.society}: {reason}. {one.note}"
    return {**plain(one), "words": words.strip()}


def _said(value: Any) -> str:
    return "unset" if value is None else str(value)


def _task(ledger: LedgerReader, key: str) -> Task | None:
    """The task of a scope, as a society was started with it; None where it cannot be loaded."""
    name, _, profile = key.partition("/")
    asked = [(one.settings.get("task"), one.settings.get("profile")) for one in ledger.societies()]
    for task, size in dict.fromkeys([(name, profile), *asked]):
        try:
            loaded = load_task(str(task), str(size))
        except (SocietyError, ImportError, OSError):
            continue
        if loaded.key == key:
            return loaded
    return None
