"""Tables, constraints and indexes of the ledger, as SQLAlchemy Core, for SQLite and PostgreSQL.

What a constraint cannot express is a trigger: see `rules.py`. Whatever is counted here by `number`,
`seq` or `token` grows by one with each row, in the order of the transactions: rows that a reader
has seen up to a number are all there are up to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Dialect,
    FetchedValue,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from society.records import (
    BudgetKind,
    Decision,
    HypothesisState,
    Outcome,
    RefusalReason,
    RunKind,
    SeedList,
    SocietyState,
    Split,
)

SCHEMA_VERSION = 4
"""Raised by one whenever a ledger of the version before cannot be read any more."""


class Clock(FunctionElement[float]):
    """SQL for the database's clock: Unix seconds at this moment, at least to the millisecond."""

    type = Float()
    inherit_cache = True


@compiles(Clock, "sqlite")
def _sqlite_clock(element: Clock, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(Clock, "postgresql")
def _postgres_clock(element: Clock, compiler: Any, **_: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


class Real(TypeDecorator[float]):
    """A double. What is no number is NULL, on every backend as on SQLite."""

    impl = Float
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """NaN becomes NULL."""
        return None if value is None or value != value else value


LONG = BigInteger().with_variant(Integer, "sqlite")
"""64 bits; on SQLite every integer has them."""


class LeaseState(StrEnum):
    """Life of a lease. Only `living` may change."""

    LIVING = "living"
    FINISHED = "finished"
    RELEASED = "released"
    EXPIRED = "expired"
    """It ran out, and somebody else took the work."""


metadata = MetaData()


def _one_of(column: str, values: Iterable[str]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _number(name: str) -> Column[float]:
    return Column(name, Real, nullable=False)


def _counted(name: str = "number") -> Column[int]:
    """A primary key that the database counts up, without gaps."""
    return Column(
        name, Integer, primary_key=True, autoincrement=False, server_default=FetchedValue()
    )


def _unique_where(name: str, condition: str, *columns: str) -> Index:
    """A unique index over the rows that meet a condition; the condition is kept for `rules.py`."""
    where = text(condition)
    return Index(
        name,
        *columns,
        unique=True,
        sqlite_where=where,
        postgresql_where=where,
        info={"where": condition},
    )


def _scope() -> Column[int]:
    return Column("scope", Integer, ForeignKey("scopes.number"), nullable=False)


def _society() -> Column[str]:
    return Column("society", Text, ForeignKey("societies.id"), nullable=False)


def _variant(name: str = "variant") -> Column[str]:
    return Column(name, Text, ForeignKey("variants.fingerprint"), nullable=False)


meta = Table("meta", metadata, Column("key", Text, primary_key=True), _text("value"))
"""`schema` (version), `id` (hex, names the ledger), `secret` (hex, behind all seeds), `created_at`.
"""

counters = Table(
    "counters", metadata, Column("name", Text, primary_key=True), Column("value", LONG)
)
"""`version` grows with each write; `recall:<collection>` is how far an index has read."""

scopes = Table(
    "scopes",
    metadata,
    _counted(),
    _text("task"),
    _text("tier"),
    UniqueConstraint("task", "tier"),
)

societies = Table(
    "societies",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    Column("seed", LONG, nullable=False),
    _text("settings"),
    _text("state"),
    _number("started_at"),
    Column("ended_at", Real),
    Column("busy", Real),
    Column("wall_s", Real, nullable=False, server_default=text("0")),
    Column("home", Text, nullable=False, server_default=text("''")),
    _one_of("state", SocietyState),
)

seeds = Table(
    "seeds",
    metadata,
    Column("scope", Integer, ForeignKey("scopes.number"), primary_key=True),
    Column("list", Text, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("seed", Integer, nullable=False),
    UniqueConstraint("scope", "seed"),
    UniqueConstraint("scope", "list", "position", "seed"),
    _one_of("list", SeedList),
    CheckConstraint("seed BETWEEN 0 AND 2147483647", name="seed_31_bits"),
)

variants = Table(
    "variants",
    metadata,
    Column("fingerprint", Text, primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    _text("task"),
    _text("overrides"),
    Column("patch", Text),
)

_LIST_OF_KIND = CheckConstraint(
    "(kind IN ('screening', 'reproduction') AND list = 'screening' AND split = 'validation')"
    " OR (kind IN ('calibration', 'verification') AND list = 'verification' AND split = 'holdout')"
    " OR (kind = 'audit' AND list = 'audit' AND split = 'holdout')"
    " OR (kind = 'study' AND list = 'study' AND split = 'holdout')",
    name="list_and_split_of_kind",
)


def _study_columns() -> tuple[Column[int], Column[int], CheckConstraint, CheckConstraint]:
    """What only the leases and runs of a study use."""
    return (
        Column("data_seed", Integer),
        Column("repeat", Integer, nullable=False, server_default=text("0")),
        CheckConstraint(
            "kind = 'study' OR (data_seed IS NULL AND repeat = 0)", name="data_seed_of_a_study"
        ),
        CheckConstraint(
            "repeat >= 0 AND (kind <> 'study' OR claim_id IS NULL)", name="study_without_claim"
        ),
    )


leases = Table(
    "leases",
    metadata,
    Column("token", Integer, primary_key=True),
    Column("run_id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("holder"),
    _text("subject"),
    _text("kind"),
    _variant(),
    _text("list"),
    Column("position", Integer, nullable=False),
    Column("seed", Integer, nullable=False),
    _text("split"),
    Column("attempt", Integer, nullable=False),
    Column("claim_id", Text, ForeignKey("claims.id")),
    Column("idea", Text, nullable=False, server_default=text("''")),
    _text("state"),
    _number("created_at"),
    _number("expires_at"),
    Column("ended_at", Real),
    ForeignKeyConstraint(
        ["scope", "list", "position", "seed"],
        ["seeds.scope", "seeds.list", "seeds.position", "seeds.seed"],
    ),
    _one_of("kind", RunKind),
    _one_of("split", Split),
    _one_of("state", LeaseState),
    _LIST_OF_KIND,
    CheckConstraint("attempt IN (1, 2)", name="one_repetition"),
    CheckConstraint(
        "claim_id IS NOT NULL OR kind NOT IN ('verification', 'reproduction')",
        name="verification_of_a_claim",
    ),
    *_study_columns(),
    ForeignKeyConstraint(["scope", "data_seed"], ["seeds.scope", "seeds.seed"]),
    _unique_where("one_living_lease", "state = 'living'", "scope", "subject"),
)

runs = Table(
    "runs",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    Column("token", Integer, ForeignKey("leases.token"), nullable=False, unique=True),
    _scope(),
    _society(),
    _text("agent"),
    _text("kind"),
    _variant(),
    Column("seed", Integer, nullable=False),
    _text("split"),
    Column("attempt", Integer, nullable=False),
    Column("claim_id", Text, ForeignKey("claims.id")),
    _text("budget_kind"),
    _number("budget_amount"),
    _text("outcome"),
    Column("score", Real),
    _text("cost"),
    _text("environment"),
    _text("data_hash"),
    _text("log_tail"),
    _text("curve"),
    _text("idea"),
    _number("started_at"),
    _number("finished_at"),
    _one_of("kind", RunKind),
    _one_of("split", Split),
    _one_of("outcome", Outcome),
    _one_of("budget_kind", BudgetKind),
    CheckConstraint(
        "(score IS NULL) = (outcome <> 'completed') AND (score IS NULL OR score <> 'NaN')",
        name="score_if_completed",
    ),
    Index("runs_of_variant", "scope", "variant", "kind", "seed"),
    Index("runs_of_claim", "claim_id", "kind"),
    Index("runs_in_order", "scope", "number"),
    Index("runs_of_society", "society", "scope", "number"),
    _unique_where("one_screening_per_seed", "kind = 'screening'", "scope", "variant", "seed"),
    _unique_where(
        "two_attempts_per_pool_seed",
        "kind IN ('calibration', 'verification', 'audit')",
        "scope",
        "variant",
        "seed",
        "attempt",
    ),
    *_study_columns(),
    _unique_where(
        "two_attempts_per_study_seed",
        "kind = 'study' AND data_seed IS NULL",
        "scope",
        "variant",
        "seed",
        "repeat",
        "attempt",
    ),
    _unique_where(
        "two_attempts_per_pair_of_study_seeds",
        "kind = 'study' AND data_seed IS NOT NULL",
        "scope",
        "variant",
        "seed",
        "data_seed",
        "repeat",
        "attempt",
    ),
)

claims = Table(
    "claims",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("author"),
    _variant(),
    _variant("reference"),
    Column("screening_run", Text, ForeignKey("runs.id"), nullable=False),
    _number("screening_delta"),
    Column("family", Integer, nullable=False),
    _number("alpha"),
    _number("carried_log_e"),
    _number("filed_at"),
    UniqueConstraint("screening_run", "reference"),
    CheckConstraint("variant <> reference", name="something_is_claimed"),
    CheckConstraint("alpha > 0 AND alpha <= 1", name="alpha_is_a_level"),
    Index("claims_of_variant", "scope", "variant", "author"),
)

verdicts = Table(
    "verdicts",
    metadata,
    _counted(),
    Column("claim_id", Text, ForeignKey("claims.id"), nullable=False),
    _society(),
    _text("decision"),
    _number("log_e"),
    Column("effect", Text),
    _text("reason"),
    _text("judge"),
    _number("decided_at"),
    UniqueConstraint("claim_id", "decision"),
    _one_of("decision", Decision),
    _unique_where(
        "one_closing_verdict", "decision NOT IN ('confirmed', 'rolled_back')", "claim_id"
    ),
    _unique_where("one_probation", "decision IN ('confirmed', 'rolled_back')", "claim_id"),
)

verdict_runs = Table(
    "verdict_runs",
    metadata,
    Column("verdict", Integer, ForeignKey("verdicts.number"), primary_key=True),
    Column("run_id", Text, ForeignKey("runs.id"), primary_key=True),
    Column("place", Integer, nullable=False),
)

champions = Table(
    "champions",
    metadata,
    Column("scope", Integer, ForeignKey("scopes.number"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    _variant(),
    Column("claim_id", Text, ForeignKey("claims.id")),
    Column("screening_run", Text, ForeignKey("runs.id")),
    Column("reverts", Integer, nullable=False),
    _society(),
    _number("since"),
    _unique_where("one_crown_per_claim", "reverts = 0 AND claim_id IS NOT NULL", "claim_id"),
)

insights = Table(
    "insights",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("author"),
    _text("text"),
    _text("evidence"),
    _number("posted_at"),
    Index("insights_of_scope", "scope", "number"),
)

hypotheses = Table(
    "hypotheses",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("author"),
    _text("statement"),
    _text("rationale"),
    _variant(),
    _number("priority"),
    Column("cost", Real, nullable=False, server_default=text("1")),
    _text("state"),
    Column("taken_by", Text),
    Column("taken_in", Text, ForeignKey("societies.id")),
    Column("taken_until", Real),
    Column("run_id", Text, ForeignKey("runs.id")),
    Column("dropped_because", Text),
    _number("posted_at"),
    _unique_where("one_idea_at_a_time", "state IN ('open', 'taken')", "scope", "variant"),
    _one_of("state", HypothesisState),
    CheckConstraint("cost > 0", name="cost_is_positive"),
    CheckConstraint("state <> 'tested' OR run_id IS NOT NULL", name="tested_by_a_run"),
    CheckConstraint(
        "state <> 'taken' OR (taken_by IS NOT NULL AND taken_until IS NOT NULL)",
        name="taken_until_a_deadline",
    ),
    CheckConstraint(
        "(state = 'dropped') = (dropped_because IS NOT NULL)", name="dropped_for_a_reason"
    ),
    Index("hypotheses_by_state", "scope", "state"),
)

refusals = Table(
    "refusals",
    metadata,
    _counted(),
    _scope(),
    _society(),
    _text("agent"),
    _variant(),
    _text("reason"),
    Column("run_id", Text, ForeignKey("runs.id")),
    _text("note"),
    _number("refused_at"),
    _one_of("reason", RefusalReason),
    Index("refusals_of_society", "scope", "society", "reason"),
)
"""Proposals that were not run, because of what the notebook knows."""

priors = Table(
    "priors",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("source"),
    _text("label"),
    Column("score", Real),
    _text("status"),
    _text("description"),
    _number("imported_at"),
    UniqueConstraint("scope", "source", "label", "description"),
)
"""Results somebody brought along. Nobody here made them: they are read, never compared."""

sources = Table(
    "sources",
    metadata,
    Column("digest", Text, primary_key=True),
    _text("content"),
    _number("kept_at"),
)
"""What a run's environment names by its digest: the trainer's code, a profile."""

tallies = Table(
    "tallies",
    metadata,
    Column("scope", Integer, ForeignKey("scopes.number"), primary_key=True),
    Column("society", Text, ForeignKey("societies.id"), primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("outcome", Text, primary_key=True),
    Column("runs", Integer, nullable=False),
    _number("wall_s"),
    _number("flops"),
)
"""How many runs there are, and what they cost; kept by a trigger, so that nothing scans."""

noise = Table(
    "noise",
    metadata,
    _counted(),
    _scope(),
    _society(),
    _number("sd"),
    _number("low"),
    _number("high"),
    Column("seeds", Integer, nullable=False),
    _number("measured_at"),
    CheckConstraint("sd >= 0", name="sd_is_a_spread"),
    Index("noise_of_scope", "scope"),
)

studies = Table(
    "studies",
    metadata,
    _counted(),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("kind"),
    _text("title"),
    _text("plan"),
    _number("registered_at"),
    Index("studies_of_scope", "scope", "kind"),
)

study_results = Table(
    "study_results",
    metadata,
    Column("study", Text, ForeignKey("studies.id"), primary_key=True),
    _society(),
    _text("result"),
    _number("concluded_at"),
)

study_runs = Table(
    "study_runs",
    metadata,
    Column("study", Text, ForeignKey("study_results.study"), primary_key=True),
    Column("run_id", Text, ForeignKey("runs.id"), primary_key=True),
    Column("place", Integer, nullable=False),
)

activities = Table(
    "activities",
    metadata,
    _counted(),
    _society(),
    _text("agent"),
    _text("role"),
    _text("duty"),
    _text("subject"),
    _number("started_at"),
    _number("ended_at"),
    _text("note"),
    Index("activities_of_society", "society", "role", "duty", "started_at"),
)

commits = Table(
    "commits",
    metadata,
    Column("key", Text, primary_key=True),
    _society(),
    _text("agent"),
    _number("at"),
)

calls = Table(
    "calls",
    metadata,
    _counted(),
    _society(),
    _text("agent"),
    _text("purpose"),
    _text("model"),
    _text("outcome"),
    Column("prompt_tokens", LONG, nullable=False),
    Column("completion_tokens", LONG, nullable=False),
    _number("dollars"),
    _number("wall_s"),
    _number("called_at"),
    CheckConstraint("prompt_tokens >= 0 AND completion_tokens >= 0", name="tokens_are_counts"),
    CheckConstraint("dollars >= 0 AND dollars < 1000000000", name="dollars_are_spent"),
    CheckConstraint("wall_s >= 0 AND wall_s < 1000000000", name="wall_s_is_a_time"),
    CheckConstraint("outcome <> 'cached' OR dollars = 0", name="cached_costs_nothing"),
    Index("calls_of_society", "society", "agent"),
)
"""Requests to language models, answered or not: what the society's caps are compared with."""

outbox = Table("outbox", metadata, _counted("seq"), _text("kind"), _text("ref"))
"""What the semantic index has still to read, in order; written by triggers."""

FACTS = (
    scopes, seeds, variants, runs, claims, verdicts, verdict_runs, champions, insights, noise,
    studies, study_results, study_runs, activities, commits, calls, outbox, refusals, priors,
    sources,
)  # fmt: skip
"""Tables whose rows are never updated, deleted or replaced."""


def create_tables(connection: Connection) -> None:
    """Create all tables and indexes in an empty database; the rules are the dialect's.

    From a copy of them: creating tables that refer to each other on PostgreSQL marks their foreign
    keys as added later, and SQLite tables made afterwards in this process would lack them.
    """
    copied = MetaData()
    for table in metadata.tables.values():
        table.to_metadata(copied)
    copied.create_all(connection, checkfirst=False)
