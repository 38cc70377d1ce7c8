"""Between rows of the ledger and the frozen records of `society.records`; no SQL in here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from sys import intern
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import RowMapping

from society.errors import InvariantViolated
from society.records import (
    Activity,
    Budget,
    BudgetKind,
    Call,
    Champion,
    Claim,
    Cost,
    Decision,
    Effect,
    Environment,
    Hypothesis,
    HypothesisState,
    Insight,
    Lease,
    Measurement,
    Noise,
    Outcome,
    Prior,
    Refusal,
    RefusalReason,
    Run,
    RunKind,
    Scope,
    SocietyRecord,
    SocietyState,
    Split,
    Study,
    Variant,
    Verdict,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Record = TypeVar("_Record", bound="DataclassInstance")

Variants = Mapping[str, Variant]
"""Variants by fingerprint."""

_NAME_CHARS = 200
"""How much is kept of what a server or a configuration calls a model."""


def clean_text(text: str) -> str:
    """Text that every database can hold: half of a surrogate pair, and NUL, become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def cleaned(record: _Record) -> _Record:
    """A frozen record with its own texts as UTF-8 can hold them; a variant in it is left alone."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    texts = {name: clean_text(value) for name, value in values.items() if type(value) is str}
    return dataclasses.replace(record, **texts)


def dump(record: object) -> str:
    """A frozen record of scalars as JSON."""
    return json.dumps(dataclasses.asdict(record))  # type: ignore[call-overload]


def variant_values(variant: Variant) -> dict[str, Any]:
    """The row of a variant."""
    return {
        "fingerprint": variant.fingerprint,
        "task": variant.task,
        "overrides": json.dumps(dict(sorted(variant.overrides.items()))),
        "patch": variant.patch,
    }


def to_variant(row: RowMapping) -> Variant:
    """A variant from its row."""
    overrides = {intern(name): value for name, value in json.loads(row["overrides"]).items()}
    return Variant(intern(row["task"]), MappingProxyType(overrides), row["patch"])


@lru_cache(maxsize=256)
def _environment(text: str) -> Environment:
    return Environment(**json.loads(text))


@lru_cache(maxsize=256)
def _budget(kind: str, amount: float) -> Budget:
    return Budget(BudgetKind(kind), amount)


def environment_text(environment: Environment) -> str:
    """An environment as JSON; the same text for the same environment."""
    values = {
        field.name: getattr(environment, field.name) for field in dataclasses.fields(environment)
    }
    values["packages"] = dict(sorted(environment.packages.items()))
    return json.dumps(values)


def run_values(
    lease: RowMapping, measurement: Measurement, environment: Environment, budget: Budget
) -> dict[str, Any]:
    """The row of the run that ends a lease, but for the time it ended."""
    kept = (
        "token", "scope", "society", "kind", "variant", "seed", "split", "attempt", "claim_id",
        "data_seed", "repeat",
    )  # fmt: skip
    return {name: lease[name] for name in kept} | {
        "id": lease["run_id"],
        "agent": lease["holder"],
        "idea": lease["idea"],
        "started_at": lease["created_at"],
        "budget_kind": budget.kind.value,
        "budget_amount": budget.amount,
        "outcome": measurement.outcome.value,
        "score": measurement.score,
        "cost": dump(measurement.cost),
        "environment": environment_text(environment),
        "data_hash": measurement.data_hash,
        "log_tail": clean_text(measurement.log_tail),
        "curve": json.dumps(measurement.curve),
    }


def to_run(row: RowMapping, variants: Variants) -> Run:
    """A run from its row."""
    return Run(
        id=row["id"],
        society=intern(row["society"]),
        agent=intern(row["agent"]),
        kind=RunKind(row["kind"]),
        variant=variants[row["variant"]],
        seed=row["seed"],
        split=Split(row["split"]),
        budget=_budget(row["budget_kind"], row["budget_amount"]),
        outcome=Outcome(row["outcome"]),
        score=row["score"],
        cost=Cost(**json.loads(row["cost"])),
        environment=_environment(row["environment"]),
        data_hash=intern(row["data_hash"]),
        log_tail=row["log_tail"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        claim_id=row["claim_id"],
        idea=row["idea"],
        number=row["number"],
        curve=tuple(json.loads(row["curve"])),
        data_seed=row["data_seed"],
        repeat=row["repeat"],
    )


def to_lease(row: RowMapping, variant: Variant) -> Lease:
    """A lease from its row."""
    return Lease(
        run_id=row["run_id"],
        subject=row["subject"],
        holder=row["holder"],
        token=row["token"],
        expires_at=row["expires_at"],
        kind=RunKind(row["kind"]),
        variant=variant,
        seed=row["seed"],
        split=Split(row["split"]),
        claim_id=row["claim_id"],
        data_seed=row["data_seed"],
        repeat=row["repeat"],
        society=row["society"],
    )


def to_verdict(row: RowMapping, runs: tuple[str, ...]) -> Verdict:
    """A verdict from its row and the runs it cites."""
    effect = row["effect"]
    return Verdict(
        claim_id=row["claim_id"],
        decision=Decision(row["decision"]),
        log_e=row["log_e"],
        effect=None if effect is None else Effect(**json.loads(effect)),
        reason=row["reason"],
        runs=runs,
        judge=row["judge"],
        decided_at=row["decided_at"],
    )


def to_claim(row: RowMapping, variants: Variants, verdict: Verdict | None) -> Claim:
    """A claim from its row and its latest verdict."""
    return Claim(
        id=row["id"],
        society=row["society"],
        author=row["author"],
        variant=variants[row["variant"]],
        reference=variants[row["reference"]],
        screening_run=row["screening_run"],
        screening_delta=row["screening_delta"],
        family=row["family"],
        alpha=row["alpha"],
        carried_log_e=row["carried_log_e"],
        filed_at=row["filed_at"],
        verdict=verdict,
    )


def to_champion(row: RowMapping, variants: Variants) -> Champion:
    """A champion from its row."""
    return Champion(
        number=row["number"],
        variant=variants[row["variant"]],
        claim_id=row["claim_id"],
        since=row["since"],
        screening_run=row["screening_run"],
        reverts=bool(row["reverts"]),
    )


def to_insight(row: RowMapping) -> Insight:
    """An insight from its row."""
    return Insight(
        id=row["id"],
        society=row["society"],
        author=row["author"],
        text=row["text"],
        evidence=tuple(json.loads(row["evidence"])),
        posted_at=row["posted_at"],
    )


def to_hypothesis(row: RowMapping, variants: Variants) -> Hypothesis:
    """A hypothesis from its row."""
    return Hypothesis(
        id=row["id"],
        society=row["society"],
        author=row["author"],
        statement=row["statement"],
        rationale=row["rationale"],
        variant=variants[row["variant"]],
        priority=row["priority"],
        state=HypothesisState(row["state"]),
        run_id=row["run_id"],
        posted_at=row["posted_at"],
        cost=row["cost"],
        taken_by=row["taken_by"],
        taken_until=row["taken_until"],
        dropped_because=row["dropped_because"],
    )


def to_refusal(row: RowMapping, variants: Variants) -> Refusal:
    """A refusal from its row."""
    return Refusal(
        society=row["society"],
        agent=row["agent"],
        variant=variants[row["variant"]],
        reason=RefusalReason(row["reason"]),
        run_id=row["run_id"],
        note=row["note"],
        refused_at=row["refused_at"],
    )


def call_values(call: Call) -> dict[str, Any]:
    """The row of a request to a language model, but for when it was made; names are bounded."""
    values = dataclasses.asdict(cleaned(call))
    del values["called_at"]
    return {
        name: value[:_NAME_CHARS] if type(value) is str and name != "society" else value
        for name, value in values.items()
    }


def to_call(row: RowMapping) -> Call:
    """A request to a language model from its row."""
    names = [field.name for field in dataclasses.fields(Call)]
    return Call(**{name: row[name] for name in names})


def to_prior(row: RowMapping) -> Prior:
    """A prior result from its row."""
    names = [field.name for field in dataclasses.fields(Prior)]
    return Prior(**{name: row[name] for name in names})


def to_noise(row: RowMapping) -> Noise:
    """A noise floor from its row joined with its scope."""
    return Noise(row["task"], row["tier"], row["sd"], row["low"], row["high"], row["seeds"])


def study_text(values: Mapping[str, Any], what: str) -> str:
    """A study's plan or result as canonical JSON.

    Raises:
        InvariantViolated: it holds something that JSON does not know, e.g. NaN.
    """
    try:
        return json.dumps(dict(values), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvariantViolated(f"The {what} of a study is not JSON: {error}.") from error


def to_study(row: RowMapping, evidence: tuple[str, ...]) -> Study:
    """A study from its row joined with its scope and result, and the runs it cites."""
    result = row["result"]
    return Study(
        id=row["id"],
        society=row["society"],
        kind=row["kind"],
        title=row["title"],
        plan=MappingProxyType(json.loads(row["plan"])),
        registered_at=row["registered_at"],
        result=None if result is None else MappingProxyType(json.loads(result)),
        evidence=evidence,
        concluded_at=row["concluded_at"],
        scope=Scope(row["task"], row["tier"]),
    )


def to_activity(row: RowMapping) -> Activity:
    """An activity from its row."""
    names = [field.name for field in dataclasses.fields(Activity)]
    return Activity(**{name: row[name] for name in names})


def to_society(row: RowMapping) -> SocietyRecord:
    """A society from its row."""
    return SocietyRecord(
        id=row["id"],
        seed=row["seed"],
        settings=json.loads(row["settings"]),
        state=SocietyState(row["state"]),
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        busy=row["busy"],
        wall_s=row["wall_s"],
        home=row["home"],
    )
