"""What a replication compares: the registered plans, the recipes of each, what is on record.

`Desk` registers every finding's plan, makes an `Arm` of every recipe that is to be trained, and
judges an arm on the runs that the notebook holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from society.experiments.findings import (
    Change,
    Finding,
    Intervention,
    Kind,
    Predicted,
    variant_of,
)
from society.experiments.verdicts import Judgement, Rules, judge, screening_rules
from society.records import Run, RunKind, SeedList, Variant

if TYPE_CHECKING:
    from society.compare import Handover, Pair
    from society.records import Study
    from society.study import Workbench

KIND = "replication"
BASELINE_SEEDS = 8
"""Fewest seeds of the baseline, whatever is replicated."""
RULES_OF = {
    Kind.MODEL: ("e_needed", "n_min", "n_max", "first_factor", "margin", "futility", "noise_seeds"),
    Kind.NOISE: ("noise_seeds", "noise_factor", "n_min"),
    Kind.NEGATIVE_RESULTS: ("planted_seeds",),
    Kind.DATA_PIPELINE: ("fdr", "n_min", "screening_seeds", "margin", "futility", "noise_seeds"),
    Kind.MEMORY: ("e_needed", "societies", "society_runs", "society_seeds", "margin"),
}
"""The constants that a plan of each kind rests on."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be replicated, and what it may cost."""

    task: str
    findings: tuple[Finding, ...]
    rules: Rules
    profile: str | None = None
    """None for the task's first one."""
    device: str = "cpu"
    slots: int | None = None
    """None for one per core."""
    minutes: float | None = None
    """Wall time after which nothing is begun; None for as long as it takes."""
    agents: int = 8
    """Of each society."""
    secret_seed: int | None = None
    """Where the seeds of a *new* notebook come from; None draws it."""


@dataclass(slots=True)
class Arm:
    """One recipe that is run on the head of the study list until its rule has decided."""

    finding: Finding
    variant: Variant
    change: Change | None
    """None for what a society handed over."""
    rules: Rules
    stage: int
    """Smaller is run first."""
    cap: int
    """Most seeds."""
    predicted: Predicted = Predicted.BETTER
    judgement: Judgement | None = None
    """None where the number of seeds is fixed."""
    under_way: set[int] = field(default_factory=set)
    """Positions being run."""

    @property
    def size(self) -> float | None:
        """The published size."""
        return self.change.size if isinstance(self.change, Intervention) else None

    @property
    def outcome(self) -> str:
        """The judgement in words; an arm of a screening is better or worse."""
        if self.judgement is None:
            return ""
        words = self.judgement.verdict.value
        if self.finding.kind is Kind.DATA_PIPELINE:
            words = {"replicated": "better", "reversed": "worse"}.get(words, words)
        return f"{words}; {self.judgement.reason}"

    @property
    def judged(self) -> bool:
        """Whether it is compared with the baseline, seed by seed."""
        return self.finding.kind in (Kind.MODEL, Kind.DATA_PIPELINE)


class Desk:
    """The studies, their arms and what has been recorded for them."""

    def __init__(self, bench: Workbench, order: Order, pairs: tuple[Pair, ...]) -> None:
        """Register every finding's plan, then read what is on record."""
        self.bench, self.order, self.pairs = bench, order, pairs
        self.rules = rules = order.rules
        self.direction = bench.task.direction.sign
        self.baseline = Variant(bench.task.key)
        self.studies = {finding.id: self._register(finding) for finding in order.findings}
        self._pools: dict[str, dict[int, float | None]] = {}
        most = max(
            rules.noise_seeds, rules.first.n_max, rules.screening_seeds, rules.planted_seeds,
            rules.society_seeds, BASELINE_SEEDS,
        )  # fmt: skip
        self.seeds = bench.ledger.seeds(SeedList.STUDY, bench.scope, most)
        self.arms = [arm for finding in order.findings for arm in self._arms(finding)]
        for arm in self.arms:
            self.judge(arm)

    # ---- plans

    def _register(self, finding: Finding) -> Study:
        rules = asdict(self.rules)
        plan: dict[str, Any] = {
            "finding": finding.id,
            "kind": finding.kind.value,
            "rules": {name: rules[name] for name in RULES_OF[finding.kind]},
            "changes": [self._planned(change) for change in finding.changes],
            "seeds": "the head of the study list; the baseline runs on the same seeds",
        }
        if finding.size is not None:
            plan["published"] = finding.size
        return self.bench.register(KIND, finding.statement, plan)

    def _planned(self, change: Change) -> dict[str, Any]:
        plan: dict[str, Any] = {"change": self.variant(change).describe()}
        if isinstance(change, Intervention):
            plan |= {"predicted": change.predicted.value, "published": change.size}
        return plan

    def variant(self, change: Change) -> Variant:
        """The recipe that a change makes of the baseline."""
        return variant_of(change, self.bench.space, self.bench.task.key)

    def _arms(self, finding: Finding) -> Iterable[Arm]:
        rules = self.rules
        if finding.kind is Kind.MODEL:
            for place, change in enumerate(finding.interventions):
                mine, stage = (rules, 3) if place else (rules.first, 0)
                yield Arm(
                    finding, self.variant(change), change, mine, stage, mine.n_max,
                    change.predicted,
                )  # fmt: skip
        elif finding.kind is Kind.DATA_PIPELINE:
            each = screening_rules(len(finding.arms), rules)
            for arm in finding.arms:
                yield Arm(finding, self.variant(arm), arm, each, 1, each.n_max)
        elif finding.kind is Kind.NEGATIVE_RESULTS and finding.planted is not None:
            planted = self.variant(finding.planted)
            yield Arm(finding, planted, finding.planted, rules, 0, rules.planted_seeds)
        elif finding.kind is Kind.MEMORY:
            handed = {hand.variant.fingerprint: hand.variant for hand in self._handed()}
            for variant in handed.values():
                if not variant.is_baseline:
                    yield Arm(finding, variant, None, rules, 2, rules.society_seeds)

    def _handed(self) -> Iterable[Handover]:
        return (hand for pair in self.pairs for hand in (pair.shared, pair.own))

    # ---- what is on record

    def recorded(self, variant: Variant, *, fresh: bool = False) -> dict[int, float | None]:
        """A variant's scores by study seed; read again when `fresh`."""
        mark = variant.fingerprint
        if fresh or mark not in self._pools:
            self._pools[mark] = self.bench.pool(variant)
        return self._pools[mark]

    def pool(self, variant: Variant, most: int) -> dict[int, float | None]:
        """Scores on the first `most` study seeds."""
        head = set(self.seeds[:most])
        return {s: score for s, score in self.recorded(variant).items() if s in head}

    def of_baseline(self) -> dict[int, float | None]:
        """The baseline's scores."""
        return self.pool(self.baseline, self.baseline_cap)

    @property
    def baseline_cap(self) -> int:
        """Baseline seeds that the plans ask for."""
        kinds = {finding.kind for finding in self.order.findings}
        caps = [arm.cap for arm in self.arms]
        if kinds & {Kind.MODEL, Kind.NOISE, Kind.DATA_PIPELINE}:
            caps.append(self.rules.noise_seeds)
        return max((*caps, BASELINE_SEEDS))

    def open_positions(self, variant: Variant, most: int, under_way: set[int]) -> list[int]:
        """Places of the study list, below `most`, without a result and not being run."""
        known = self.recorded(variant)
        return [p for p in range(most) if self.seeds[p] not in known and p not in under_way]

    def judge(self, arm: Arm) -> None:
        """Bring an arm's judgement up to date."""
        if arm.judged:
            arm.judgement = judge(
                self.of_baseline(),
                self.pool(arm.variant, arm.cap),
                predicted=arm.predicted,
                size=arm.size,
                direction=self.direction,
                rules=arm.rules,
            )

    def closed(self, arm: Arm) -> bool:
        """Whether an arm wants no more runs."""
        return arm.judgement is not None and arm.judgement.decided

    def runs(self, variant: Variant) -> tuple[Run, ...]:
        """A variant's runs for studies, whatever their outcome."""
        kinds = [RunKind.STUDY]
        return self.bench.ledger.runs(self.bench.scope, kinds=kinds, variant=variant)
