"""What the ledger says: a frozen view of it, for `wording.py` to say and `render.py` to show.

`build_report` derives every number from the ledger at that moment; it writes nothing, keeps
nothing and reads no clock, so two reports of one notebook are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from society.exchange import Fate, Tested, outcomes
from society.experiments import gate
from society.experiments.effects import DeadEnd, KnobEffect, dead_ends, knob_effects
from society.experiments.space import Space
from society.experiments.task import Direction, Task, known_tasks
from society.knobs import Scalar
from society.records import (
    SOCIETY_KINDS,
    Activity,
    Champion,
    Claim,
    Cost,
    Decision,
    Effect,
    Environment,
    Hypothesis,
    Insight,
    Noise,
    Outcome,
    Run,
    RunKind,
    Savings,
    Scope,
    SocietyRecord,
    Usage,
    Variant,
)

if TYPE_CHECKING:
    from society.memory.reader import LedgerReader

NARRATOR, NARRATIVE = "narrator", "Narrative: "
"""Who posts the narrative of a society as an insight, and how it begins."""
STANDING = (Decision.ACCEPTED, Decision.CONFIRMED)
"""Latest decisions of a claim that stands accepted."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A variant's scores on the verification seeds, holdout split."""

    variant: Variant
    mean: float | None
    """Mean of the completed runs; None if there is none."""
    half_width: float
    """Half width of the plain 95 % t-interval of that mean; 0 below two runs."""
    completed: int
    failed: int
    scores: tuple[float, ...]
    """The completed scores, in seed order."""


@dataclass(frozen=True, slots=True)
class Headline:
    """What a reader must know if they read nothing else."""

    baseline: Pool
    champion: Pool
    champion_number: int
    gain: Effect | None
    """Champion over baseline, paired on the common verification seeds; None if not measurable."""
    audit: Effect | None
    """The same on fresh audit seeds, after the society ended; None without an audit."""
    accepted: int
    """Claims that stand accepted."""
    rolled_back: int
    best_screening: Run | None
    """Best screening score: selected as the best of many on one seed, verified by nobody."""
    runs: int
    wall_s: float
    busy: float | None
    """Share of slot time spent on runs, weighted by wall time, 0..1."""

    @property
    def anything_accepted(self) -> bool:
        """Whether the champion is something else than the baseline."""
        return not self.champion.variant.is_baseline


@dataclass(frozen=True, slots=True)
class KnobChange:
    """One line of the champion's recipe."""

    knob: str
    baseline: Scalar
    champion: Scalar
    unit: str
    about: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim with all that is known about it."""

    claim: Claim
    against: str
    """The reference: which champion it was, or its recipe."""
    decision: Decision | None
    """None while undecided."""
    effect: Effect | None
    """None while undecided: interim results of open claims are not published."""
    log_e: float | None
    """Natural log of the claim's own e-value at the verdict."""
    certified: bool
    """e-BH label at the gate's false discovery rate."""
    verifiers: tuple[str, ...]
    """Agents whose verification runs it has, most runs first."""
    verifications: int
    """Verification runs so far."""
    reproduced: bool | None
    """Whether the screening run gave the same score again elsewhere; None if not tried."""


@dataclass(frozen=True, slots=True)
class AgentWork:
    """What one agent did in one society."""

    agent: str
    society: str
    duties: tuple[tuple[str, int, float], ...]
    """Role, number of duties, seconds; most duties first."""
    runs: int
    verifications: int
    """Verification and reproduction runs among them."""
    filed: int
    accepted: int
    """Filed claims that stand accepted."""
    judged: int


@dataclass(frozen=True, slots=True)
class Idea:
    """A hypothesis, who published it, who tested it, and what came out."""

    hypothesis: Hypothesis
    outcome: Tested

    @property
    def waits(self) -> bool:
        """Whether nobody has tested or dropped it."""
        return self.outcome.fate in (Fate.WAITING, Fate.TESTING)

    @property
    def dropped(self) -> bool:
        """Whether it was closed without a test."""
        return self.outcome.fate is Fate.DROPPED

    @property
    def tested(self) -> bool:
        """Whether a run has tested it."""
        return not (self.waits or self.dropped)


@dataclass(frozen=True, slots=True)
class CostLine:
    """What one kind of run cost in total."""

    kind: str
    runs: int
    failed: int
    cost: Cost
    """Sums; the memory is the largest peak."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """How many runs were confined at one level."""

    level: str
    """A level of `society.experiments.sandbox`; empty where it was not recorded."""
    runs: int
    patched: int
    """Those among them whose variant changes code."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What one agent's calls of language models cost."""

    society: str
    agent: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Report:
    """A frozen view of the notebook for one task on one hardware tier."""

    task: str
    loads_as: str
    """What `load_task` takes for it: a known name or `module:Class`."""
    profile: str
    tier: str
    metric: str
    unit: str
    direction: Direction
    as_of: float | None
    """When the last thing in it happened, Unix seconds; None for an empty notebook."""
    headline: Headline
    recipe: tuple[KnobChange, ...]
    patch: str | None
    findings: tuple[Finding, ...]
    """All claims in order of filing."""
    failures: tuple[Run, ...]
    """The runs that did not complete."""
    effects: tuple[KnobEffect, ...]
    dead_ends: tuple[DeadEnd, ...]
    insights: tuple[Insight, ...]
    hypotheses: tuple[Idea, ...]
    """All of them: what waits first, by worth; then in order of posting."""
    agents: tuple[AgentWork, ...]
    noise: Noise | None
    costs: tuple[CostLine, ...]
    """By kind of run; the total comes last."""
    society: str
    """Whose report it is; empty for the notebook's."""
    societies: tuple[SocietyRecord, ...]
    environments: tuple[Environment, ...]
    runs: tuple[Run, ...]
    """All runs in order of finishing."""
    champions: tuple[tuple[Champion, Pool], ...]
    activities: tuple[Activity, ...]
    savings: Savings
    """What was not run because of what was known."""
    caveats: tuple[str, ...]
    """What the task says about itself that a reader must know."""
    narrative: Insight | None
    """The latest text that a language model wrote about the results; not among `insights`."""
    rejected: tuple[Run, ...]
    """The failures that the guard rejected."""
    confinement: tuple[Confinement, ...]
    """Most runs first."""
    spending: tuple[Spending, ...]
    """Per society and agent; only those who asked a language model."""

    def decided(self, *decisions: Decision) -> tuple[Finding, ...]:
        """The findings closed in one of these ways."""
        return tuple(finding for finding in self.findings if finding.decision in decisions)

    @property
    def usage(self) -> Usage:
        """What language models cost in all."""
        each = [line.usage for line in self.spending]
        return Usage(
            calls=sum(one.calls for one in each),
            failed=sum(one.failed for one in each),
            cached=sum(one.cached for one in each),
            prompt_tokens=sum(one.prompt_tokens for one in each),
            completion_tokens=sum(one.completion_tokens for one in each),
            dollars=math.fsum(one.dollars for one in each),
        )

    @property
    def undecided(self) -> tuple[Finding, ...]:
        """The claims still open."""
        return tuple(finding for finding in self.findings if finding.decision is None)


def build_report(
    ledger: LedgerReader, scope: Scope, task: Task, space: Space, society: str = ""
) -> Report:
    """Everything the ledger knows about one task on one tier, as it is now. Only reads.

    Args:
        ledger: What is reported on.
        scope: Task and tier.
        task: The task of the scope.
        space: Its search space.
        society: Whose report it is, by id, where several worked on this task.
    """
    runs = ledger.runs(scope, kinds=SOCIETY_KINDS)
    claims = tuple(ledger.claims(scope))
    champions = _champions(ledger, scope)
    societies = tuple(s for s in ledger.societies() if s.id in _involved(runs, claims, ledger))
    activities = tuple(a for s in societies for a in ledger.activities(s.id))
    headline = _headline(ledger, scope, task, runs, claims, champions, societies)
    champion = headline.champion.variant
    told, insights = _narratives(ledger.insights(scope), society)
    return Report(
        task=task.key,
        loads_as=_loads_as(task),
        profile=task.profile,
        tier=scope.tier,
        metric=task.metric,
        unit=task.unit,
        direction=task.direction,
        as_of=_as_of(runs, claims, activities),
        headline=headline,
        recipe=_recipe(champion, space),
        patch=champion.patch,
        findings=_findings(claims, runs, [entry for entry, _ in champions]),
        failures=tuple(run for run in runs if run.outcome is not Outcome.COMPLETED),
        effects=knob_effects(runs, space, {}, task.direction),
        dead_ends=dead_ends(runs, space, {}, task.direction),
        insights=insights,
        hypotheses=_ideas(ledger, scope, task),
        agents=_agents(societies, ledger, runs, claims),
        noise=ledger.noise(scope),
        costs=_costs(runs),
        society=society,
        societies=societies,
        environments=_environments(runs),
        runs=runs,
        champions=champions,
        activities=activities,
        savings=ledger.savings(scope),
        caveats=tuple(str(one) for one in getattr(task, "caveats", ())),
        narrative=told,
        rejected=tuple(run for run in runs if run.outcome is Outcome.REJECTED),
        confinement=_confinement(runs),
        spending=tuple(
            Spending(one.id, agent, usage)
            for one in societies
            for agent, usage in ledger.usage_by_agent(one.id).items()
        ),
    )


def _narratives(
    insights: Sequence[Insight], society: str
) -> tuple[Insight | None, tuple[Insight, ...]]:
    """The latest narrative, of this society if it has one, and the insights that are none."""
    told = [one for one in insights if one.author == NARRATOR and one.text.startswith(NARRATIVE)]
    own = [one for one in told if one.society == society] or told
    apart = {one.id for one in told}
    return (own[-1] if own else None), tuple(one for one in insights if one.id not in apart)


def _confinement(runs: Iterable[Run]) -> tuple[Confinement, ...]:
    made: Counter[str] = Counter()
    patched: Counter[str] = Counter()
    for run in runs:
        made[run.environment.sandbox] += 1
        patched[run.environment.sandbox] += run.variant.patch is not None
    return tuple(Confinement(level, n, patched[level]) for level, n in made.most_common())


def _involved(runs: Sequence[Run], claims: Sequence[Claim], ledger: LedgerReader) -> set[str]:
    """Societies that worked on this task and tier; all of them while nothing has been run."""
    named = {run.society for run in runs} | {claim.society for claim in claims}
    return named or {one.id for one in ledger.societies() if not one.is_study}


def _as_of(
    runs: Sequence[Run], claims: Sequence[Claim], activities: Sequence[Activity]
) -> float | None:
    moments = [run.finished_at for run in runs] + [claim.filed_at for claim in claims]
    moments += [claim.verdict.decided_at for claim in claims if claim.verdict is not None]
    moments += [activity.ended_at for activity in activities]
    return max(moments, default=None)


def _loads_as(task: Task) -> str:
    if task.name in known_tasks():
        return task.name
    return f"{type(task).__module__}:{type(task).__qualname__}"


def pool_of(ledger: LedgerReader, scope: Scope, variant: Variant) -> Pool:
    """A variant's holdout scores on the verification seeds of one task and tier."""
    from scipy.special import stdtrit

    found = ledger.pool(scope, variant)
    scores = tuple(score for score in found.values() if score is not None)
    n = len(scores)
    mean = math.fsum(scores) / n if n else None
    half = 0.0
    if mean is not None and n > 1:
        variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1)
        half = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
    return Pool(variant, mean, half, n, len(found) - n, scores)


def _champions(ledger: LedgerReader, scope: Scope) -> tuple[tuple[Champion, Pool], ...]:
    history = ledger.champions(scope)
    return tuple((entry, pool_of(ledger, scope, entry.variant)) for entry in history)


def _headline(
    ledger: LedgerReader,
    scope: Scope,
    task: Task,
    runs: Sequence[Run],
    claims: Sequence[Claim],
    champions: Sequence[tuple[Champion, Pool]],
    societies: Sequence[SocietyRecord],
) -> Headline:
    base = Variant(task=task.key)
    entry, champion = champions[-1] if champions else (None, pool_of(ledger, scope, base))
    decisions = Counter(claim.verdict.decision for claim in claims if claim.verdict is not None)
    busy = [(s.busy, s.wall_s) for s in societies if s.busy is not None and s.wall_s > 0]
    weight = math.fsum(wall for _, wall in busy)
    return Headline(
        baseline=pool_of(ledger, scope, base),
        champion=champion,
        champion_number=entry.number if entry is not None else 0,
        gain=_gain(
            ledger.pool(scope, base), ledger.pool(scope, champion.variant), champion.variant, task
        ),
        audit=_audit(runs, champion.variant, task),
        accepted=sum(decisions[decision] for decision in STANDING),
        rolled_back=decisions[Decision.ROLLED_BACK],
        best_screening=_best_screening(runs, task.direction),
        runs=len(runs),
        wall_s=math.fsum(society.wall_s for society in societies),
        busy=math.fsum(b * wall for b, wall in busy) / weight if weight else None,
    )


def _gain(
    baseline: Mapping[int, float | None],
    champion: Mapping[int, float | None],
    variant: Variant,
    task: Task,
) -> Effect | None:
    """The paired gain, or None where there is nothing to compare."""
    if variant.is_baseline or not set(baseline) & set(champion):
        return None
    better = gate.LOWER_IS_BETTER if task.direction is Direction.MINIMISE else gate.HIGHER_IS_BETTER
    try:
        return gate.paired_gain(baseline, champion, better)
    except ValueError:  # a failed run among fewer than two completed ones: nothing to place it by
        return None


def _audit(runs: Iterable[Run], champion: Variant, task: Task) -> Effect | None:
    """The gain on the audit's fresh seeds."""
    scores: dict[str, dict[int, float | None]] = {}
    crashes: Counter[tuple[str, int]] = Counter()
    for run in runs:
        if run.kind is RunKind.AUDIT:
            place = (run.variant.fingerprint, run.seed)
            crashes[place] += run.outcome is Outcome.CRASHED
            if run.outcome is not Outcome.CRASHED or crashes[place] > 1:  # one crash is repeated
                scores.setdefault(place[0], {})[run.seed] = run.score
    base = Variant(task=task.key).fingerprint
    return _gain(scores.get(base, {}), scores.get(champion.fingerprint, {}), champion, task)


def _best_screening(runs: Iterable[Run], direction: Direction) -> Run | None:
    scored = [run for run in runs if run.kind is RunKind.SCREENING and run.score is not None]
    return max(scored, key=lambda run: direction.improvement(0.0, run.score or 0.0), default=None)


def _recipe(champion: Variant, space: Space) -> tuple[KnobChange, ...]:
    return tuple(
        KnobChange(
            name, space.default(name), value, space.knobs[name].unit, space.knobs[name].about
        )
        for name, value in sorted(champion.overrides.items())
    )


def _findings(
    claims: Sequence[Claim], runs: Sequence[Run], champions: Sequence[Champion]
) -> tuple[Finding, ...]:
    by_claim: dict[str, list[Run]] = {}
    for run in runs:
        if run.claim_id is not None:
            by_claim.setdefault(run.claim_id, []).append(run)
    by_id = {run.id: run for run in runs}
    labelled = _certified(claims)
    names = {c.variant.fingerprint: f"champion {c.number}" for c in reversed(champions) if c.number}
    return tuple(
        _finding(
            claim,
            by_claim.get(claim.id, []),
            by_id,
            certified=claim.id in labelled,
            against=names.get(claim.reference.fingerprint, claim.reference.describe()),
        )
        for claim in claims
    )


def _finding(
    claim: Claim,
    runs: Sequence[Run],
    by_id: Mapping[str, Run],
    *,
    certified: bool,
    against: str,
) -> Finding:
    verifiers = Counter(run.agent for run in runs if run.kind is RunKind.VERIFICATION)
    again = [
        run
        for run in runs
        if run.kind is RunKind.REPRODUCTION and run.outcome is not Outcome.CRASHED
    ]
    first = by_id.get(claim.screening_run)
    verdict = claim.verdict
    return Finding(
        claim=claim,
        against=against,
        decision=verdict.decision if verdict is not None else None,
        effect=verdict.effect if verdict is not None else None,
        log_e=verdict.log_e if verdict is not None else None,
        certified=certified,
        verifiers=tuple(agent for agent, _ in verifiers.most_common()),
        verifications=sum(verifiers.values()),
        reproduced=all(run.score == first.score for run in again) if again and first else None,
    )


def _certified(claims: Sequence[Claim]) -> frozenset[str]:
    """Accepted claims whose family passes e-BH among all families ever filed.

    A family's e-value is that of its last closed claim times the capital it started with; families
    without a closed claim count with e = 1, so that filing more makes the label harder to get.
    """
    log_e: dict[int, float] = {}
    for claim in claims:
        log_e.setdefault(claim.family, 0.0)
        if claim.verdict is not None:
            log_e[claim.family] = claim.carried_log_e + claim.verdict.log_e
    passed = dict(zip(log_e, gate.certified(list(log_e.values())), strict=True))
    last = {claim.family: claim for claim in claims if claim.verdict is not None}
    return frozenset(
        claim.id
        for family, claim in last.items()
        if passed[family] and claim.verdict is not None and claim.verdict.decision in STANDING
    )


def _ideas(ledger: LedgerReader, scope: Scope, task: Task) -> tuple[Idea, ...]:
    noise = ledger.noise(scope)
    found = outcomes(
        ledger.hypotheses(scope),
        ledger.champions(scope),
        ledger.run,
        lambda variant: ledger.screening_score(scope, variant),
        noise_sd=noise.sd if noise else None,
        sign=float(task.direction.sign),
    )
    ideas = [Idea(hypothesis, outcome) for hypothesis, outcome in found]
    waiting = sorted((one for one in ideas if one.waits), key=lambda one: -one.hypothesis.worth)
    return (*waiting, *(one for one in ideas if not one.waits))


def _agents(
    societies: Iterable[SocietyRecord],
    ledger: LedgerReader,
    runs: Sequence[Run],
    claims: Sequence[Claim],
) -> tuple[AgentWork, ...]:
    work: list[AgentWork] = []
    for society in societies:
        activities = ledger.activities(society.id)
        names = {activity.agent for activity in activities}
        names |= {run.agent for run in runs if run.society == society.id}
        names |= {claim.author for claim in claims if claim.society == society.id}
        for name in sorted(names, key=_natural):
            mine = [activity for activity in activities if activity.agent == name]
            work.append(_agent(name, society.id, mine, runs, claims))
    return tuple(work)


def _agent(
    name: str,
    society: str,
    activities: Sequence[Activity],
    runs: Sequence[Run],
    claims: Sequence[Claim],
) -> AgentWork:
    count: Counter[str] = Counter(activity.role for activity in activities)
    mine = [run for run in runs if run.agent == name and run.society == society]
    filed = [claim for claim in claims if claim.author == name and claim.society == society]
    verdicts = [c.verdict for c in claims if c.society == society and c.verdict is not None]
    seconds: dict[str, float] = {}
    for activity in activities:
        spent = activity.ended_at - activity.started_at
        seconds[activity.role] = seconds.get(activity.role, 0.0) + spent
    checks = (RunKind.VERIFICATION, RunKind.REPRODUCTION)
    return AgentWork(
        agent=name,
        society=society,
        duties=tuple((role, duties, seconds[role]) for role, duties in count.most_common()),
        runs=len(mine),
        verifications=sum(run.kind in checks for run in mine),
        filed=len(filed),
        accepted=sum(
            claim.verdict is not None and claim.verdict.decision in STANDING for claim in filed
        ),
        judged=sum(verdict.judge == name for verdict in verdicts),
    )


def _costs(runs: Sequence[Run]) -> tuple[CostLine, ...]:
    kinds = [kind for kind in RunKind if any(run.kind is kind for run in runs)]
    lines = [_cost_line(kind.value, [run for run in runs if run.kind is kind]) for kind in kinds]
    return (*lines, _cost_line("total", runs)) if runs else ()


def _cost_line(kind: str, runs: Sequence[Run]) -> CostLine:
    costs = [run.cost for run in runs]
    total = Cost(
        wall_s=math.fsum(cost.wall_s for cost in costs),
        cpu_s=math.fsum(cost.cpu_s for cost in costs),
        gpu_s=math.fsum(cost.gpu_s for cost in costs),
        flops=math.fsum(cost.flops for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        steps=sum(cost.steps for cost in costs),
        mem_bytes=max((cost.mem_bytes for cost in costs), default=0),
        train_s=math.fsum(cost.train_s for cost in costs),
        compile_s=math.fsum(cost.compile_s for cost in costs),
        mfu=_mean_mfu(costs),
        device_mem_bytes=max((cost.device_mem_bytes for cost in costs), default=0),
    )
    failed = sum(run.outcome is not Outcome.COMPLETED for run in runs)
    return CostLine(kind, len(runs), failed, total)


def _mean_mfu(costs: Sequence[Cost]) -> float | None:
    """Mean over the seconds of training; None where no run knew it."""
    known = [(cost.mfu, cost.train_s) for cost in costs if cost.mfu is not None and cost.train_s]
    if not known:
        return None
    seconds = math.fsum(part for _, part in known)
    return math.fsum(mfu * part for mfu, part in known) / seconds


def _environments(runs: Iterable[Run]) -> tuple[Environment, ...]:
    found: list[Environment] = []
    for run in runs:
        if run.environment not in found:
            found.append(run.environment)
    return tuple(found)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `agent-2` before `agent-10`."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts)
