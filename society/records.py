"""The vocabulary of the notebook as frozen records: one noun each, a line per field.

Scores are in the task's metric (bits per byte for `pretrain`); `delta_*` is positive when the
candidate is better, whatever the metric's direction. Times ending in `_at` are Unix seconds by the
database's clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from society.codechange import describe_patch
from society.knobs import Scalar


class Split(StrEnum):
    """Which text a run is scored on. No candidate ever trains on either."""

    VALIDATION = "validation"
    HOLDOUT = "holdout"


class BudgetKind(StrEnum):
    """What a training budget counts."""

    FLOPS = "flops"
    TOKENS = "tokens"
    STEPS = "steps"
    SECONDS = "seconds"


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one training run may spend."""

    kind: BudgetKind
    amount: float
    """In the unit of `kind`; FLOPs include the optimiser's own."""


class RunKind(StrEnum):
    """Why a run was made."""

    SCREENING = "screening"
    """A proposal (or its parent) on a screening seed, validation split."""
    CALIBRATION = "calibration"
    """A champion on a verification seed, holdout split: noise floor and champion pool."""
    VERIFICATION = "verification"
    """A claim's variant on a verification seed, holdout split, by somebody else."""
    REPRODUCTION = "reproduction"
    """A screening run repeated by somebody else with the same seed: are the bits the same?"""
    AUDIT = "audit"
    """Champion or baseline on fresh audit seeds, holdout split, after the society has ended."""
    STUDY = "study"
    """A preregistered study's run on a study seed, holdout split; evidence for no claim."""


SOCIETY_KINDS = tuple(kind for kind in RunKind if kind is not RunKind.STUDY)
"""What a society runs, and its displays and report show; a study reports its own."""


class Outcome(StrEnum):
    """How a run ended. All of them are recorded."""

    COMPLETED = "completed"
    DIVERGED = "diverged"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"
    REJECTED = "rejected"
    """The guard refused it (budget overrun, foreign output, impossible probabilities)."""


class Decision(StrEnum):
    """How a claim was closed."""

    ACCEPTED = "accepted"
    CONFIRMED = "confirmed"
    """Accepted before, and still convincing after its pool was topped up (probation passed)."""
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"
    """Accepted, then withdrawn by probation when the champion pool was topped up."""
    SUPERSEDED = "superseded"
    """The reference lost its place to another claim; the question became moot."""


class SeedList(StrEnum):
    """The seed lists the ledger draws per task and tier. None is ever shown to a brain."""

    SCREENING = "screening"
    VERIFICATION = "verification"
    AUDIT = "audit"
    STUDY = "study"


@dataclass(frozen=True, slots=True)
class Scope:
    """Where scores may be compared: one task on one hardware tier."""

    task: str
    """Name and profile of the task, e.g. `pretrain/cpu`."""
    tier: str
    """Hardware tier, as `Environment.tier` names it."""


EMPTY: Mapping[str, Scalar] = MappingProxyType({})
PATCH_MARK = "society-patch 1 "
"""How a code change begins; the sha256 of the code that it amounts to, normalised, follows."""


class _Fingerprinted:
    """Room for a fingerprint once it was computed; no field, so nobody prints or compares it."""

    __slots__ = ("_fingerprint",)


@dataclass(frozen=True, slots=True)
class Variant(_Fingerprinted):
    """A change to a task's baseline, in canonical form (only non-default knobs, sorted by name).

    Build one with `society.experiments.variant(task, overrides)`, which validates and
    canonicalises; the fingerprint is only meaningful for canonical overrides.
    """

    task: str
    """Name and profile of the task, e.g. `pretrain/cpu`."""
    overrides: Mapping[str, Scalar] = field(default_factory=lambda: EMPTY)
    """Knob name -> value, where it differs from the baseline."""
    patch: str | None = None
    """A code change to the baseline's source, as `society.experiments.patches` writes it."""

    @property
    def code(self) -> str | None:
        """What counts of the patch: its first line, which names the code it amounts to.

        Two texts that amount to the same code are one experiment. A text without such a line, which
        no executor runs, counts as it is.
        """
        if self.patch is None or not self.patch.startswith(PATCH_MARK):
            return self.patch
        return self.patch.partition("\n")[0]

    @property
    def fingerprint(self) -> str:
        """The sha256 of the canonical form, 64 hex digits."""
        known: str | None = getattr(self, "_fingerprint", None)
        if known is None:
            form = {
                "task": self.task,
                "overrides": dict(sorted(self.overrides.items())),
                "patch": self.code,
            }
            known = hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()
            object.__setattr__(self, "_fingerprint", known)
        return known

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is changed."""
        return not self.overrides and self.patch is None

    def describe(self) -> str:
        """The change in words, e.g. `depth=2, patch(gpt.py +3 -1)`; `baseline` for none."""
        words = [f"{name}={value}" for name, value in sorted(self.overrides.items())]
        if self.patch is not None:
            words.append(describe_patch(self.patch))
        return ", ".join(words) or "baseline"


@dataclass(frozen=True, slots=True)
class Environment:
    """What the bits of a run depend on. Scores are compared bit for bit only within one."""

    device: str
    """Device type and model, e.g. `cpu` or `cuda:NVIDIA H100`."""
    capability: str
    """Instruction set or compute capability, e.g. `AVX512` or `sm_90`."""
    threads: int
    """Threads per training worker."""
    python: str
    """Python version."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that do the arithmetic, e.g. torch."""
    arithmetic: str = ""
    """What else the bits depend on: maker, matrix instructions, variables that limit them."""
    code: str = ""
    """sha256 of the source that trains and scores, 12 hex digits."""
    config: str = ""
    """sha256 of the effective profile, 12 hex digits; empty in runs made before it was recorded."""
    mem_bytes: int = 0
    """Memory of the accelerator; 0 on a CPU, and in runs made before it was recorded."""
    sandbox: str = ""
    """How far the run was confined, a level of `society.experiments.sandbox`; empty in runs made
    before it was recorded."""

    def differs(self, other: Environment) -> tuple[str, ...]:
        """Names of the fields in which two environments differ; what is not known does not count.

        Bits may be compared where there are none.
        """
        odd = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if not (self.config and other.config):
            odd = [name for name in odd if name != "config"]
        told = ("mem_bytes", "sandbox")  # a driver may keep some of it; no bit depends on it
        return tuple(name for name in odd if name not in told)

    @property
    def tier(self) -> str:
        """The hardware tier within which scores may be compared, e.g. `cpu-AVX512`."""
        return f"{self.device}-{self.capability}".replace(" ", "_")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run spent."""

    wall_s: float = 0.0
    """Seconds from start to end, evaluation included."""
    cpu_s: float = 0.0
    """CPU seconds of the training and scoring processes."""
    gpu_s: float = 0.0
    """Seconds a GPU was held."""
    flops: float = 0.0
    """Training FLOPs charged against the budget."""
    tokens: int = 0
    """Training tokens seen."""
    steps: int = 0
    """Optimiser steps taken."""
    mem_bytes: int = 0
    """Peak resident memory of the training process."""
    train_s: float = 0.0
    """Seconds of the training loop alone: what a budget in seconds counts."""
    compile_s: float = 0.0
    """Seconds an accelerator took to choose kernels and compile, which no budget pays for."""
    mfu: float | None = None
    """Model FLOPs as a share of the device's peak bf16 rate; None on a CPU or an unknown card."""
    device_mem_bytes: int = 0
    """Most memory allocated on an accelerator at once."""

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of the training loop; 0 where it was not measured."""
        return self.tokens / self.train_s if self.train_s else 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """One experiment to execute: everything the executor needs, nothing about why."""

    run_id: str
    variant: Variant
    seed: int
    """Where the initial parameters come from, and the data order unless `data_seed` says it."""
    split: Split
    budget: Budget
    data_seed: int | None = None
    """Where the data order comes from; None for `seed`."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What came back from executing one piece of `Work`."""

    outcome: Outcome
    score: float | None
    """The metric on the split; None unless completed."""
    cost: Cost
    log_tail: str = ""
    """The last lines of the run's output; the error for a run that failed."""
    data_hash: str = ""
    """sha256 of the data it trained and was scored on."""
    curve: tuple[float, ...] = ()
    """Training loss, evenly thinned to at most 64 points, in nats per token."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A few steps with a code change, made before a run is spent on it."""

    problem: str = ""
    """Why it must not be run, in words its author can act on; empty if it may be."""
    same: bool = False
    """Whether it gave the very bits that the recipe gives without the code change."""
    bits: tuple[str, ...] = ()
    """Names what came out; empty where nothing did. Equal for code that computes the same."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a language model, answered or not."""

    society: str
    agent: str
    purpose: str
    """`propose`, `review`, `explain` or `narrate`."""
    model: str
    outcome: str
    """`answered`, `cached`, or the class of the error, e.g. `timeout`."""
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    """By the configured prices; what could not be learnt is charged in full."""
    wall_s: float
    called_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What calls of language models have cost so far."""

    calls: int = 0
    failed: int = 0
    """Calls that brought no usable answer; they are among `calls`, and may cost."""
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        """Both ways."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Lease:
    """The exclusive right to do one piece of work until a deadline."""

    run_id: str
    """Also the id of the run this lease will become."""
    subject: str
    """What is leased; one living lease at most per subject."""
    holder: str
    """Agent name."""
    token: int
    """Fencing token: grows with every lease given; a finish must present the current one."""
    expires_at: float
    kind: RunKind
    variant: Variant
    seed: int
    split: Split
    claim_id: str | None = None
    data_seed: int | None = None
    """Seed of the data order where it is not `seed` (study)."""
    repeat: int = 0
    """Which repetition of the same seeds it is, from 0 (study)."""
    society: str = ""
    """Whose it is: the society that the run is charged to."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished execution of one variant with one seed and one budget. Never changes."""

    id: str
    society: str
    agent: str
    kind: RunKind
    variant: Variant
    seed: int
    split: Split
    budget: Budget
    outcome: Outcome
    score: float | None
    cost: Cost
    environment: Environment
    data_hash: str
    log_tail: str
    started_at: float
    finished_at: float
    claim_id: str | None = None
    """The claim it was made for (verification, reproduction)."""
    idea: str = ""
    """Where the proposal came from, in words (screening)."""
    number: int = 0
    """Order of finishing within the notebook, from 1."""
    curve: tuple[float, ...] = ()
    """Training loss, evenly thinned, in nats per token."""
    data_seed: int | None = None
    """Seed of the data order where it is not `seed` (study)."""
    repeat: int = 0
    """Which repetition of the same seeds it is, from 0 (study)."""

    @property
    def tier(self) -> str:
        """Hardware tier the score belongs to."""
        return self.environment.tier


@dataclass(frozen=True, slots=True)
class Claim:
    """That variant V beats reference R: opened from a screening run, closed by a verdict."""

    id: str
    society: str
    author: str
    """The agent whose screening run it is; may never verify it."""
    variant: Variant
    reference: Variant
    """The champion when it was filed."""
    screening_run: str
    """Prompted the claim; never part of its evidence."""
    screening_delta: float
    """Improvement over the reference on the same screening seed, in the metric."""
    family: int
    """Claims of the same idea share one error budget."""
    alpha: float
    """Level frozen at filing."""
    carried_log_e: float
    """Log capital of the family at filing (0 for a new family)."""
    filed_at: float
    verdict: Verdict | None = None

    @property
    def is_open(self) -> bool:
        """Whether no verdict has closed it."""
        return self.verdict is None

    def verdict_is(self, *decisions: Decision) -> bool:
        """Whether the latest verdict is one of `decisions`."""
        return self.verdict is not None and self.verdict.decision in decisions


@dataclass(frozen=True, slots=True)
class Effect:
    """An estimated improvement with its uncertainty, in the task's metric."""

    mean: float
    """Raw mean improvement over the reference."""
    shrunken: float
    """Posterior mean under the half-normal prior: what is reported."""
    low: float
    """Lower end of the anytime-valid 95 % interval."""
    high: float
    """Upper end of the anytime-valid 95 % interval."""
    seeds: int
    """Candidate runs it rests on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a claim ended, with the evidence that decided it."""

    claim_id: str
    decision: Decision
    log_e: float
    """Natural log of the claim's own e-value at the stop (family capital not included)."""
    effect: Effect | None
    reason: str
    runs: tuple[str, ...]
    """Ids of the runs it rests on."""
    judge: str
    decided_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Champion:
    """One entry of the append-only champion history."""

    number: int
    """0 is the baseline."""
    variant: Variant
    claim_id: str | None
    """None for the baseline."""
    since: float
    screening_run: str | None = None
    """Run whose score proposals are compared with, on the same screening seed."""
    reverts: bool = False
    """Whether this entry restores an earlier champion after a roll-back."""


@dataclass(frozen=True, slots=True)
class Noise:
    """A measured noise floor: seed-to-seed spread of the baseline of a task on a tier."""

    task: str
    tier: str
    sd: float
    """Standard deviation across seeds, residuals winsorised, in the metric."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end of its 95 % interval."""
    seeds: int
    """Baseline runs it was measured on."""


@dataclass(frozen=True, slots=True)
class Study:
    """A plan that was written down before its runs were made, and later what came of it."""

    id: str
    society: str
    """The record it was registered under."""
    kind: str
    """What sort of study it is, e.g. `noise`."""
    title: str
    plan: Mapping[str, Any]
    """What will be run and how it will be judged, as JSON."""
    registered_at: float
    result: Mapping[str, Any] | None = None
    """What was found, as JSON; None until it is concluded."""
    evidence: tuple[str, ...] = ()
    """Ids of the runs the result rests on."""
    concluded_at: float | None = None
    scope: Scope = field(kw_only=True)
    """Task and tier it is about."""


@dataclass(frozen=True, slots=True)
class Insight:
    """What the meta-analyst distilled, with links to its evidence."""

    id: str
    society: str
    author: str
    text: str
    evidence: tuple[str, ...]
    """Ids of runs, claims or insights."""
    posted_at: float = 0.0


class HypothesisState(StrEnum):
    """Life of a hypothesis."""

    OPEN = "open"
    TAKEN = "taken"
    """Somebody tests it, until a deadline; after that it counts as open again."""
    TESTED = "tested"
    """A screening run of its variant has finished, whoever made it."""
    DROPPED = "dropped"
    """Closed without a test, for a recorded reason."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An untested idea with a rationale and a priority."""

    id: str
    society: str
    author: str
    statement: str
    rationale: str
    variant: Variant
    priority: float
    """Expected improvement in units of the noise floor; larger is tried earlier."""
    state: HypothesisState = HypothesisState.OPEN
    run_id: str | None = None
    posted_at: float = 0.0
    cost: float = 1.0
    """Expected cost of a test, in ordinary runs."""
    taken_by: str | None = None
    """Who tests it, or has tested it."""
    taken_until: float | None = None
    dropped_because: str | None = None

    @property
    def worth(self) -> float:
        """Expected value per cost: what hypotheses are ranked by."""
        return self.priority / self.cost


class RefusalReason(StrEnum):
    """Why a proposal was not run."""

    DUPLICATE = "duplicate"
    """The same fingerprint was run, or is being run."""
    NEAR_DUPLICATE = "near_duplicate"
    """A run with the same knobs, each within its tolerance, exists."""
    DEAD_END = "dead_end"
    """What lies around it has failed before, and no reason was given to try again."""
    SAME_IDEA = "same_idea"
    """A hypothesis that says the same is on record."""
    BROKEN = "broken"
    """Its code change does not apply, does not import, or changes nothing."""
    ADVISED_AGAINST = "advised_against"
    """Another agent reviewed it and saw no point in running it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A proposal that was not run: compute that the notebook saved."""

    society: str
    agent: str
    variant: Variant
    reason: RefusalReason
    run_id: str | None
    """The run on record that speaks against it."""
    note: str
    refused_at: float


@dataclass(frozen=True, slots=True)
class Savings:
    """Proposals that were not run because of what the notebook knows, and what that saved."""

    refused: Mapping[RefusalReason, int]
    """Refusals, zeros included."""
    runs: int
    """Different variants among those of a proposal that nobody has run after all."""
    run_s: float
    """Mean wall time of a screening run, in seconds; 0 before the first."""

    @property
    def proposals(self) -> int:
        """Refused proposals of experiments; refused hypotheses are not among them."""
        return sum(self.refused.values()) - self.refused.get(RefusalReason.SAME_IDEA, 0)

    @property
    def seconds(self) -> float:
        """Wall time those runs would have taken."""
        return self.runs * self.run_s


@dataclass(frozen=True, slots=True)
class Prior:
    """A result that a user brought along from elsewhere. Evidence for nothing here."""

    id: str
    society: str
    source: str
    """Where it comes from, e.g. the file's name."""
    label: str
    """What the source calls it, e.g. a commit."""
    score: float | None
    status: str
    """As the source says: `keep`, `discard`, `crash`, ..."""
    description: str
    imported_at: float


@dataclass(frozen=True, slots=True)
class Activity:
    """What one agent did for a while: one bar of the timeline."""

    agent: str
    role: str
    duty: str
    """Kind of duty, e.g. `screen`, `verify`, `judge`."""
    subject: str
    """What it was about: an id, or a variant in words."""
    started_at: float
    ended_at: float
    note: str = ""
    """How it went, in one sentence."""


@dataclass(frozen=True, slots=True)
class NewClaim:
    """Entry: files a claim. Author and variant are those of the screening run."""

    screening_run: str
    reference_variant: Variant
    """The champion that the variant is claimed to beat."""
    screening_delta: float
    """Improvement over the reference on the same screening seed, in the metric."""
    family: int
    alpha: float
    carried_log_e: float


@dataclass(frozen=True, slots=True)
class Crown:
    """Entry: appends to the champion history."""

    variant: Variant
    claim_id: str | None
    """The accepted claim; None for the baseline."""
    screening_run: str | None
    reverts: bool = False
    """Whether it restores an earlier champion after a roll-back."""


@dataclass(frozen=True, slots=True)
class NewInsight:
    """Entry: posts an insight."""

    text: str
    evidence: tuple[str, ...]
    """Ids of runs, claims or insights."""


@dataclass(frozen=True, slots=True)
class NewHypothesis:
    """Entry: posts a hypothesis."""

    statement: str
    rationale: str
    variant: Variant
    priority: float
    """Expected improvement in units of the noise floor."""
    cost: float = 1.0
    """Expected cost of a test, in ordinary runs; positive."""


@dataclass(frozen=True, slots=True)
class HypothesisDropped:
    """Entry: closes a hypothesis that nobody will test."""

    hypothesis_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class NewRefusal:
    """Entry: a proposal was not run because of what the notebook knows."""

    variant: Variant
    reason: RefusalReason
    run_id: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class NewPrior:
    """Entry: a result from elsewhere."""

    source: str
    label: str
    score: float | None
    status: str
    description: str


@dataclass(frozen=True, slots=True)
class NewStudy:
    """Entry: preregisters a study."""

    kind: str
    title: str
    plan: Mapping[str, Any]
    """What will be run and how it will be judged; JSON values only."""


@dataclass(frozen=True, slots=True)
class StudyResult:
    """Entry: concludes a study, once."""

    study_id: str
    result: Mapping[str, Any]
    """JSON values only."""
    evidence: tuple[str, ...]
    """Ids of the runs it rests on."""


Entry = (
    NewClaim
    | Verdict
    | Crown
    | NewInsight
    | NewHypothesis
    | HypothesisDropped
    | NewRefusal
    | NewPrior
    | Noise
    | NewStudy
    | StudyResult
)
"""What an agent may commit to the notebook; runs are recorded by finishing a lease."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much a notebook holds about one scope, for a status page."""

    runs: Mapping[RunKind, int]
    outcomes: Mapping[Outcome, int]
    claims_open: int
    verdicts: Mapping[Decision, int]
    """Claims by their latest verdict."""
    champions: int
    """Entries of the champion history, the baseline included."""
    insights: int
    hypotheses: Mapping[HypothesisState, int]
    leases: int
    """Living leases."""
    wall_s: float
    """Summed over all runs."""
    flops: float
    """Training FLOPs charged, summed over all runs."""


class SocietyState(StrEnum):
    """Where a society stands."""

    RUNNING = "running"
    STOPPED = "stopped"
    """Interrupted with budget left; `--resume` goes on."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SocietyRecord:
    """One society that worked in this notebook."""

    id: str
    seed: int
    settings: Mapping[str, object]
    """The settings it was started with, as JSON."""
    state: SocietyState
    started_at: float
    ended_at: float | None = None
    busy: float | None = None
    """Share of slot time spent on runs, 0..1, measured by the society itself."""
    wall_s: float = 0.0
    """Seconds it has worked, over all its resumes."""
    home: str = ""
    """Identity of the notebook folder that runs it; empty where the ledger lies in the folder."""

    @property
    def is_study(self) -> bool:
        """Whether it is no society but a command that makes a study's runs."""
        return "study" in self.settings
