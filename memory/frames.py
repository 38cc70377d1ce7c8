"""`Memory`: a notebook as pandas frames, for people who look at it.

It reads the ledger only, in read-only mode, so that it works while a society runs in another
process; each call shows the notebook as it is at that moment. Times are in UTC, scores and effects
in the task's metric, durations in seconds. Some frames hold records one to a row, the others answer
a question; docs/notebook.md lists them all with their columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from society import tiers
from society.exchange import Tested, outcomes
from society.memory import answers
from society.memory.embed import DIMENSIONS, Vectors, embedder
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import ALL, Filter, Passage, Prose
from society.records import Champion, Claim, Hypothesis, Run, Scope

_TIMES = (
    "started_at", "finished_at", "filed_at", "decided_at", "since", "posted_at", "ended_at",
    "registered_at", "concluded_at", "refused_at", "imported_at", "taken_until",
    "called_at",
)  # fmt: skip

RUN_COLUMNS = (
    "number", "id", "society", "agent", "kind", "task", "tier", "variant", "fingerprint", "seed",
    "split", "outcome", "score", "claim_id", "idea", "wall_s", "cpu_s", "gpu_s", "flops", "tokens",
    "steps", "mem_bytes", "train_s", "compile_s", "mfu", "device_mem_bytes", "started_at",
    "finished_at", "data_seed", "repeat",
)  # fmt: skip
CLAIM_COLUMNS = (
    "id", "society", "author", "variant", "reference", "screening_run", "screening_delta",
    "family", "alpha", "filed_at", "verdict", "e_value", "log_e", "effect", "raw_effect", "low",
    "high", "seeds", "reason", "judge", "decided_at",
)  # fmt: skip
CHAMPION_COLUMNS = (
    "task", "tier", "number", "variant", "fingerprint", "claim_id", "screening_run", "score",
    "reverts", "since",
)  # fmt: skip
INSIGHT_COLUMNS = ("id", "society", "author", "text", "evidence", "posted_at")
HYPOTHESIS_COLUMNS = (
    "id", "society", "author", "statement", "rationale", "variant", "priority", "cost", "worth",
    "state", "taken_by", "run_id", "outcome", "gain", "dropped_because", "posted_at",
)  # fmt: skip
ACTIVITY_COLUMNS = (
    "society", "agent", "role", "duty", "subject", "started_at", "ended_at", "note",
)  # fmt: skip
STUDY_COLUMNS = (
    "id", "society", "task", "tier", "kind", "title", "plan", "result", "evidence",
    "registered_at", "concluded_at",
)  # fmt: skip
REFUSAL_COLUMNS = (
    "society", "agent", "task", "variant", "fingerprint", "reason", "run_id", "note", "refused_at",
)  # fmt: skip
CALL_COLUMNS = (
    "society", "agent", "purpose", "model", "outcome", "prompt_tokens", "completion_tokens",
    "dollars", "wall_s", "called_at",
)  # fmt: skip
SAVED_COLUMNS = ("reason", "refusals", "variants", "wall_s", "flops")
PRIOR_COLUMNS = (
    "id", "society", "source", "label", "score", "status", "description", "imported_at",
)  # fmt: skip
AGENT_COLUMNS = (
    "society", "agent", "runs", "screening", "failed", "wall_s", "filed", "open", "accepted",
    "rejected", "rolled_back", "superseded", "hit_rate", "hit_low", "hit_high",
)  # fmt: skip
SUPPORT_COLUMNS = (
    "kind", "id", "what", "reference", "by", "verdict", "stands", "effect", "low", "high", "seeds",
    "log_e", "e_value", "reproduced", "decided_at",
)  # fmt: skip
AROUND_COLUMNS = (
    "number", "run", "task", "tier", "society", "agent", "value", "baseline", "others", "outcome",
    "score", "champion", "variant", "idea",
)  # fmt: skip
SPREAD_COLUMNS = (
    "task", "tier", "variant", "fingerprint", "seeds", "failed", "mean", "sd", "low", "high",
    "champion",
)  # fmt: skip
PAIRED_COLUMNS = (
    "claim_id", "variant", "reference", "seed", "score", "reference_score", "gain",
)  # fmt: skip
BEST_COLUMNS = (
    "task", "tier", "tier_class", "variant", "fingerprint", "claim_id", "score", "seeds",
    "verdict", "effect", "low", "high", "runs", "since",
)  # fmt: skip
NOISE_COLUMNS = ("task", "tier", "sd", "low", "high", "seeds")
HIT_COLUMNS = ("similarity", "kind", "ref", "text")


class Memory:
    """Everything a notebook holds. Open it with `society.memory.open`."""

    def __init__(self, path: Path | str, *, lower_is_better: bool = True) -> None:
        """Open a notebook for reading.

        Args:
            path: Its folder, e.g. `lab`, also one that shares a ledger with others; or the address
                of a shared ledger, e.g. `postgresql://ann@db/lab`.
            lower_is_better: Direction of the metric: what an improvement is.

        Raises:
            NotANotebook: there is none, or one of another version.
            NotebookDamaged: the ledger cannot be read.
            LedgerUnreachable: the server of a shared ledger does not answer.
        """
        self.folder = None if "://" in str(path) else NotebookFolder(path).require()
        place = str(path) if self.folder is None else self.folder.ledger
        self._ledger = Ledger.open(place, read_only=True)
        self._lower_is_better = lower_is_better
        self._sign = -1.0 if lower_is_better else 1.0
        self._vectors: Vectors = np.zeros((0, DIMENSIONS), np.float32)
        self._rows: dict[str, int] = {}

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def __enter__(self) -> Memory:
        """The memory itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the ledger."""
        self.close()

    def runs(self) -> pd.DataFrame:
        """One row per finished run, in order of finishing, whatever its outcome."""
        return _frame(map(_run_row, self._ledger.runs()), RUN_COLUMNS)

    def claims(self) -> pd.DataFrame:
        """One row per claim, in order of filing.

        `verdict` is `open` while there is none; `effect` is the shrunken estimate, `low` and
        `high` its anytime-valid 95 % interval, positive when the candidate is better.
        """
        return _frame(map(_claim_row, self._ledger.claims()), CLAIM_COLUMNS)

    def champions(self) -> pd.DataFrame:
        """The champion history of each scope; `score` is the mean over its holdout runs."""
        history = (
            {
                "task": scope.task,
                "tier": scope.tier,
                "number": one.number,
                "variant": one.variant.describe(),
                "fingerprint": one.variant.fingerprint,
                "claim_id": one.claim_id,
                "screening_run": one.screening_run,
                "score": _mean(self._ledger.pool(scope, one.variant)),
                "reverts": one.reverts,
                "since": one.since,
            }
            for scope in self._ledger.scopes()
            for one in self._ledger.champions(scope)
        )
        return _frame(history, CHAMPION_COLUMNS)

    def insights(self) -> pd.DataFrame:
        """One row per insight, in order of posting; `evidence` is a tuple of ids."""
        return _frame(map(_fields(INSIGHT_COLUMNS), self._ledger.insights()), INSIGHT_COLUMNS)

    def hypotheses(self) -> pd.DataFrame:
        """One row per hypothesis, in order of posting, with what came of it.

        `worth` is priority per cost; `outcome` says e.g. `better`, `within noise` or `waiting`, and
        `gain` by how much the run that tested it beat the champion of that moment.
        """
        rows = (
            _fields(HYPOTHESIS_COLUMNS, without=("outcome", "gain"))(one)
            | {"variant": one.variant.describe(), "state": one.state.value}
            | {"outcome": tested.fate.value, "gain": tested.delta}
            for one, tested in sorted(self._tested(), key=lambda pair: pair[0].posted_at)
        )
        return _frame(rows, HYPOTHESIS_COLUMNS)

    def _tested(self) -> Iterator[tuple[Hypothesis, Tested]]:
        for scope in self._ledger.scopes():
            noise = self._ledger.noise(scope)
            yield from outcomes(
                self._ledger.hypotheses(scope),
                self._ledger.champions(scope),
                self._ledger.run,
                partial(self._ledger.screening_score, scope),
                noise_sd=None if noise is None else noise.sd,
                sign=self._sign,
            )

    def refusals(self) -> pd.DataFrame:
        """One row per proposal that was not run because of what the notebook knew."""
        plain = _fields(("society", "agent", "run_id", "note", "refused_at"))
        rows = (
            plain(one)
            | {"reason": one.reason.value, "task": one.variant.task}
            | {"variant": one.variant.describe(), "fingerprint": one.variant.fingerprint}
            for one in self._ledger.refusals()
        )
        return _frame(rows, REFUSAL_COLUMNS)

    def saved(self) -> pd.DataFrame:
        """What the refusals saved: one row per reason.

        A run that was not made is taken to cost what the median screening run did.
        """
        found = answers.saved_rows(self._ledger.refusals(), self._ledger.runs())
        return _frame(found, SAVED_COLUMNS)

    def calls(self) -> pd.DataFrame:
        """One row per request to a language model, in order; `dollars` by the configured prices."""
        return _frame(map(_fields(CALL_COLUMNS), self._ledger.calls()), CALL_COLUMNS)

    def priors(self) -> pd.DataFrame:
        """One row per result that was brought along from elsewhere; evidence for nothing here."""
        return _frame(map(_fields(PRIOR_COLUMNS), self._ledger.priors()), PRIOR_COLUMNS)

    def agents(self) -> pd.DataFrame:
        """One row per agent of each society: what it ran, what it claimed, and what held up.

        `hit_rate` is the share of its decided claims that were accepted and not rolled back, with
        Wilson's 95 % interval; superseded and open claims do not count.
        """
        found = answers.agent_rows(self._ledger.runs(), self._ledger.claims())
        return _frame(found, AGENT_COLUMNS)

    def support(self) -> pd.DataFrame:
        """Judged claims and the changes that studies tested, what is supported best first.

        `stands` is whether it was accepted and not rolled back (of a study: replicated). What
        stands comes first, in it the largest e-value.
        """
        ledger = self._ledger
        found = answers.support_rows(ledger.claims(), ledger.studies(), ledger.runs())
        return _frame(found, SUPPORT_COLUMNS)

    def around(self, knob: str) -> pd.DataFrame:
        """Every screening run that changed a knob, and the baseline's own, in order of finishing.

        `value` is missing for the baseline; `others` counts further knobs that were changed too;
        `champion` says whether the variant is the `present` champion, a `former` one, or neither.
        """
        found = answers.around_rows(knob, self._ledger.runs(), self._histories())
        return _frame(found, AROUND_COLUMNS)

    def spread(self) -> pd.DataFrame:
        """One row per variant with holdout scores: their mean and standard deviation over seeds.

        `low` and `high` are the chi-square 95 % interval of `sd`; `champion` is whether the variant
        ever was one. Failed runs have no score and are counted beside.
        """
        return _frame(answers.spread_rows(self._ledger.runs(), self._histories()), SPREAD_COLUMNS)

    def paired(self) -> pd.DataFrame:
        """One row per claim and seed on which both its variant and its reference have a score."""
        found = answers.paired_rows(self._ledger.claims(), self._ledger.runs(), self._sign)
        return _frame(found, PAIRED_COLUMNS)

    def best(self) -> pd.DataFrame:
        """The present champion of each task and tier, with its claim's effect.

        Scores of different tiers are not comparable; `tier_class` groups tiers to be read side by
        side.
        """
        rows = (self._best(scope) for scope in self._ledger.scopes())
        return _frame([row for row in rows if row is not None], BEST_COLUMNS)

    def _best(self, scope: Scope) -> dict[str, Any] | None:
        ledger = self._ledger
        champion = ledger.champion(scope)
        if champion is None:
            return None
        pool = ledger.pool(scope, champion.variant)
        latest = ledger.runs(scope, last=1)
        memory = latest[0].environment.mem_bytes if latest else 0
        claim = None if champion.claim_id is None else ledger.claim(champion.claim_id)
        judged = _claim_row(claim) if claim is not None else {}
        return {name: judged.get(name) for name in ("verdict", "effect", "low", "high")} | {
            "task": scope.task,
            "tier": scope.tier,
            "tier_class": tiers.class_of(scope.tier, memory),
            "variant": champion.variant.describe(),
            "fingerprint": champion.variant.fingerprint,
            "claim_id": champion.claim_id,
            "score": _mean(pool),
            "seeds": sum(score is not None for score in pool.values()),
            "runs": sum(ledger.counts(scope).runs.values()),
            "since": champion.since,
        }

    def _histories(self) -> dict[Scope, tuple[Champion, ...]]:
        return {scope: self._ledger.champions(scope) for scope in self._ledger.scopes()}

    def activities(self) -> pd.DataFrame:
        """Who did what when, by society."""
        plain = _fields(ACTIVITY_COLUMNS[1:])
        rows = (
            plain(one) | {"society": society.id}
            for society in self._ledger.societies()
            for one in self._ledger.activities(society.id)
        )
        return _frame(rows, ACTIVITY_COLUMNS)

    def noise(self) -> pd.DataFrame:
        """Noise floors in order of measuring; the last of a scope counts."""
        return _frame(map(_fields(NOISE_COLUMNS), self._ledger.noise_history()), NOISE_COLUMNS)

    def studies(self) -> pd.DataFrame:
        """One row per study, in order of registration; `result` is None while it is not concluded.

        `plan` and `result` are mappings, `evidence` is a tuple of run ids.
        """
        plain = _fields(tuple(name for name in STUDY_COLUMNS if name not in ("task", "tier")))
        rows = (
            plain(one) | {"task": one.scope.task, "tier": one.scope.tier}
            for one in self._ledger.studies()
        )
        return _frame(rows, STUDY_COLUMNS)

    def knob_values(self) -> pd.DataFrame:
        """One row per run and one column per knob; missing where it has the baseline's value.

        The index is the run id; `kind`, `split`, `outcome` and `score` stand before the knobs.
        """
        runs = self._ledger.runs()
        knobs = sorted({name for run in runs for name in run.variant.overrides})
        rows = (
            {
                **run.variant.overrides,
                "run": run.id,
                "kind": run.kind.value,
                "split": run.split.value,
                "outcome": run.outcome.value,
                "score": run.score,
            }
            for run in runs
        )
        columns = ("run", "kind", "split", "outcome", "score", *knobs)
        return _frame(rows, columns).set_index("run")

    def search(self, text: str, k: int = 5, where: Filter = ALL) -> pd.DataFrame:
        """The `k` passages of the notebook nearest in meaning to `text`, nearest first.

        The vectors are made and compared here one by one, without the semantic index, whose folder
        belongs to the process that runs the society; only those of passages that pass the filter.

        Args:
            text: A question, a statement or knob names.
            k: How many at most.
            where: Which passages count.

        Raises:
            UnknownName: there is no such kind or outcome.
            RecallUnavailable: the offline embedder's files are missing.
        """
        prose = Prose(self._ledger, lower_is_better=self._lower_is_better)
        passages = list(prose.all(where.check()))
        if not passages or k <= 0:
            return _frame([], HIT_COLUMNS)
        near = self._embedded(passages) @ embedder().embed([text])[0]  # (passages,)
        best = np.argsort(-near, kind="stable")[:k]
        hits = (
            {"similarity": float(near[at]), "kind": passages[at].kind, "ref": passages[at].ref,
             "text": passages[at].text}
            for at in best
        )  # fmt: skip
        return _frame(hits, HIT_COLUMNS)

    def _embedded(self, passages: Sequence[Passage]) -> Vectors:
        """(passages, 256); what was embedded before is kept."""
        new = dict.fromkeys(one.text for one in passages if one.text not in self._rows)
        if new:
            known = len(self._rows)
            self._rows.update((one, known + at) for at, one in enumerate(new))
            self._vectors = np.vstack([self._vectors, embedder().embed(list(new))])
        return self._vectors[[self._rows[passage.text] for passage in passages]]


def _frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=list(columns))
    for name in _TIMES:
        if name in frame.columns:
            frame[name] = pd.to_datetime(frame[name].astype(float), unit="s", utc=True)
    return frame


def _fields(names: Sequence[str], without: Sequence[str] = ()) -> Any:
    """A function from a record to a row with these of its fields, but for some."""

    def row(record: object) -> dict[str, Any]:
        return {name: getattr(record, name) for name in names if name not in without}

    return row


def _run_row(run: Run) -> dict[str, Any]:
    cost: dict[str, Any] = asdict(run.cost)
    return cost | {
        "number": run.number,
        "id": run.id,
        "society": run.society,
        "agent": run.agent,
        "kind": run.kind.value,
        "task": run.variant.task,
        "tier": run.tier,
        "variant": run.variant.describe(),
        "fingerprint": run.variant.fingerprint,
        "seed": run.seed,
        "split": run.split.value,
        "outcome": run.outcome.value,
        "score": run.score,
        "claim_id": run.claim_id,
        "idea": run.idea,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "data_seed": run.data_seed,
        "repeat": run.repeat,
    }


def _claim_row(claim: Claim) -> dict[str, Any]:
    row: dict[str, Any] = _fields(
        ("id", "society", "author", "screening_run", "screening_delta", "family", "alpha",
         "filed_at")
    )(claim)  # fmt: skip
    row |= {
        "variant": claim.variant.describe(),
        "reference": claim.reference.describe(),
        "verdict": "open",
    }
    verdict = claim.verdict
    if verdict is None:
        return row
    row |= _fields(("log_e", "reason", "judge", "decided_at"))(verdict)
    row |= {"verdict": verdict.decision.value, "e_value": math.exp(min(verdict.log_e, 700.0))}
    effect = verdict.effect
    if effect is not None:
        row |= _fields(("low", "high", "seeds"))(effect)
        row |= {"effect": effect.shrunken, "raw_effect": effect.mean}
    return row


def _mean(pool: Mapping[int, float | None]) -> float | None:
    """Mean of the completed runs; None without any."""
    scores = [score for score in pool.values() if score is not None]
    return sum(scores) / len(scores) if scores else None
