"""`Memory`: a notebook as pandas frames, for people who look at it.

It reads the ledger only, in read-only mode, so that it works while a society runs in another
process; each call shows the notebook as it is at that moment. Times are in UTC, scores and effects
in the task's metric, durations in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from society.memory.embed import Vectors, embedder
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import Passage, Prose
from society.records import Claim, Run

_TIMES = (
    "started_at", "finished_at", "filed_at", "decided_at", "since", "posted_at", "ended_at",
    "registered_at", "concluded_at",
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
    "id", "society", "author", "statement", "rationale", "variant", "priority", "state", "run_id",
    "posted_at",
)  # fmt: skip
ACTIVITY_COLUMNS = (
    "society", "agent", "role", "duty", "subject", "started_at", "ended_at", "note",
)  # fmt: skip
STUDY_COLUMNS = (
    "id", "society", "task", "tier", "kind", "title", "plan", "result", "evidence",
    "registered_at", "concluded_at",
)  # fmt: skip
NOISE_COLUMNS = ("task", "tier", "sd", "low", "high", "seeds")
HIT_COLUMNS = ("similarity", "kind", "ref", "text")


class Memory:
    """Everything a notebook holds. Open it with `society.memory.open`."""

    def __init__(self, path: Path | str, *, lower_is_better: bool = True) -> None:
        """Open a notebook's folder for reading.

        Args:
            path: The folder, e.g. `lab`.
            lower_is_better: Direction of the metric, for the wording of search results.

        Raises:
            NotANotebook: the folder holds none, or one of another version.
            NotebookDamaged: the ledger cannot be read.
        """
        self.folder = NotebookFolder(path).require()
        self._ledger = Ledger.open(self.folder.ledger, read_only=True)
        self._lower_is_better = lower_is_better
        self._vectors: dict[str, Vectors] = {}

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
        """One row per hypothesis, in order of posting."""
        rows = (
            _fields(HYPOTHESIS_COLUMNS)(one)
            | {"variant": one.variant.describe(), "state": one.state.value}
            for one in self._ledger.hypotheses()
        )
        return _frame(rows, HYPOTHESIS_COLUMNS)

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

    def search(self, text: str, k: int = 5) -> pd.DataFrame:
        """The `k` passages of the notebook nearest in meaning to `text`, nearest first.

        The vectors are compared here one by one, without the semantic index, whose folder belongs
        to the process that runs the society.

        Raises:
            RecallUnavailable: the offline embedder's files are missing.
        """
        passages = list(Prose(self._ledger, lower_is_better=self._lower_is_better).all())
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
        new = [passage.text for passage in passages if passage.text not in self._vectors]
        if new:
            self._vectors.update(zip(new, embedder().embed(new), strict=True))
        return np.stack([self._vectors[passage.text] for passage in passages])


def _frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=list(columns))
    for name in _TIMES:
        if name in frame.columns:
            frame[name] = pd.to_datetime(frame[name].astype(float), unit="s", utc=True)
    return frame


def _fields(names: Sequence[str]) -> Any:
    """A function from a record to a row with these of its fields."""

    def row(record: object) -> dict[str, Any]:
        return {name: getattr(record, name) for name in names}

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
