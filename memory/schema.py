"""Tables, constraints and triggers of the ledger: every invariant that the database itself keeps.

The tables are SQLAlchemy Core; the rules that a constraint cannot express are SQLite triggers. A
trigger refuses with a message `Name: reason`, where `Name` is the error that the Python side
raises, so that a rule is written down once, here, and holds for raw SQL as well:

- facts (runs, claims, verdicts, champions, seeds, ...) are never updated, deleted or replaced;
- one living lease per subject, and it ends only once;
- a run is the end of a living lease and repeats what the lease says (the fencing token decides);
- a seed is one the ledger drew, in the list that the kind of run asks for;
- only a study's run may take its data order from a second seed, or be repeated on the same seeds;
- nobody verifies or reproduces a claim of their own;
- a verdict cites runs of the claim's variant or reference, never the screening run;
- a claim is closed once; only an accepted one is confirmed or rolled back, and only once;
- a champion rests on an accepted claim against the champion before it;
- a study is registered before its result, has one, and cites runs that exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from sqlalchemy import (
    CheckConstraint,
    Column,
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

from society.records import (
    BudgetKind,
    Decision,
    HypothesisState,
    Outcome,
    RunKind,
    SeedList,
    SocietyState,
    Split,
)

SCHEMA_VERSION = 2
"""Raised by one whenever a ledger of the version before cannot be read any more."""

CLOCK = "((julianday('now') - 2440587.5) * 86400.0)"
"""SQL for the database's clock in Unix seconds, to the millisecond."""


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
    return Column(name, Float, nullable=False)


def _scope() -> Column[int]:
    return Column("scope", Integer, ForeignKey("scopes.number"), nullable=False)


def _society() -> Column[str]:
    return Column("society", Text, ForeignKey("societies.id"), nullable=False)


def _variant(name: str = "variant") -> Column[str]:
    return Column(name, Text, ForeignKey("variants.fingerprint"), nullable=False)


meta = Table("meta", metadata, Column("key", Text, primary_key=True), _text("value"))
"""`schema` (version), `secret` (hex, behind all seeds), `created_at`."""

counters = Table(
    "counters", metadata, Column("name", Text, primary_key=True), Column("value", Integer)
)
"""`version` grows with each write; `recall:<collection>` is how far an index has read."""

scopes = Table(
    "scopes",
    metadata,
    Column("number", Integer, primary_key=True),
    _text("task"),
    _text("tier"),
    UniqueConstraint("task", "tier"),
)

societies = Table(
    "societies",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("seed", Integer, nullable=False),
    _text("settings"),
    _text("state"),
    _number("started_at"),
    Column("ended_at", Float),
    Column("busy", Float),
    Column("wall_s", Float, nullable=False, server_default=text("0")),
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
    Column("ended_at", Float),
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
    Index(
        "one_living_lease",
        "scope",
        "subject",
        unique=True,
        sqlite_where=text("state = 'living'"),
    ),
)

runs = Table(
    "runs",
    metadata,
    Column("number", Integer, primary_key=True),
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
    Column("score", Float),
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
    CheckConstraint("(score IS NULL) = (outcome <> 'completed')", name="score_if_completed"),
    Index("runs_of_variant", "scope", "variant", "kind", "seed"),
    Index("runs_of_claim", "claim_id", "kind"),
    Index(
        "one_screening_per_seed",
        "scope",
        "variant",
        "seed",
        unique=True,
        sqlite_where=text("kind = 'screening'"),
        info={"new": "NEW.kind = 'screening'"},
    ),
    Index(
        "two_attempts_per_pool_seed",
        "scope",
        "variant",
        "seed",
        "attempt",
        unique=True,
        sqlite_where=text("kind IN ('calibration', 'verification', 'audit')"),
        info={"new": "NEW.kind IN ('calibration', 'verification', 'audit')"},
    ),
    *_study_columns(),
    Index(
        "two_attempts_per_study_seed",
        "scope",
        "variant",
        "seed",
        "repeat",
        "attempt",
        unique=True,
        sqlite_where=text("kind = 'study' AND data_seed IS NULL"),
        info={"new": "NEW.kind = 'study' AND NEW.data_seed IS NULL"},
    ),
    Index(
        "two_attempts_per_pair_of_study_seeds",
        "scope",
        "variant",
        "seed",
        "data_seed",
        "repeat",
        "attempt",
        unique=True,
        sqlite_where=text("kind = 'study' AND data_seed IS NOT NULL"),
        info={"new": "NEW.kind = 'study' AND NEW.data_seed IS NOT NULL"},
    ),
)

claims = Table(
    "claims",
    metadata,
    Column("number", Integer, primary_key=True),
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
    Column("number", Integer, primary_key=True),
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
    Index(
        "one_closing_verdict",
        "claim_id",
        unique=True,
        sqlite_where=text("decision NOT IN ('confirmed', 'rolled_back')"),
        info={"new": "NEW.decision NOT IN ('confirmed', 'rolled_back')"},
    ),
    Index(
        "one_probation",
        "claim_id",
        unique=True,
        sqlite_where=text("decision IN ('confirmed', 'rolled_back')"),
        info={"new": "NEW.decision IN ('confirmed', 'rolled_back')"},
    ),
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
    Column("number", Integer, primary_key=True),
    _variant(),
    Column("claim_id", Text, ForeignKey("claims.id")),
    Column("screening_run", Text, ForeignKey("runs.id")),
    Column("reverts", Integer, nullable=False),
    _society(),
    _number("since"),
    Index(
        "one_crown_per_claim",
        "claim_id",
        unique=True,
        sqlite_where=text("reverts = 0 AND claim_id IS NOT NULL"),
        info={"new": "NEW.reverts = 0 AND NEW.claim_id IS NOT NULL"},
    ),
)

insights = Table(
    "insights",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("author"),
    _text("text"),
    _text("evidence"),
    _number("posted_at"),
)

hypotheses = Table(
    "hypotheses",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    _scope(),
    _society(),
    _text("author"),
    _text("statement"),
    _text("rationale"),
    _variant(),
    _number("priority"),
    _text("state"),
    Column("taken_by", Text),
    Column("taken_in", Text, ForeignKey("societies.id")),
    Column("run_id", Text, ForeignKey("runs.id")),
    _number("posted_at"),
    _one_of("state", HypothesisState),
    CheckConstraint("state <> 'tested' OR run_id IS NOT NULL", name="tested_by_a_run"),
    Index("hypotheses_by_state", "scope", "state"),
)

noise = Table(
    "noise",
    metadata,
    Column("number", Integer, primary_key=True),
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
    Column("number", Integer, primary_key=True),
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
    Column("number", Integer, primary_key=True),
    _society(),
    _text("agent"),
    _text("role"),
    _text("duty"),
    _text("subject"),
    _number("started_at"),
    _number("ended_at"),
    _text("note"),
    Index("activities_of_society", "society"),
)

commits = Table(
    "commits",
    metadata,
    Column("key", Text, primary_key=True),
    _society(),
    _text("agent"),
    _number("at"),
)

outbox = Table(
    "outbox", metadata, Column("seq", Integer, primary_key=True), _text("kind"), _text("ref")
)
"""What the semantic index has still to read, in order; written by triggers."""

FACTS = (
    scopes, seeds, variants, runs, claims, verdicts, verdict_runs, champions, insights, noise,
    studies, study_results, study_runs, activities, commits, outbox,
)  # fmt: skip
"""Tables whose rows are never updated, deleted or replaced."""


def _refuse(name: str, moment: str, condition: str, message: str) -> str:
    """One trigger that aborts with `message` when `condition` holds."""
    quoted = message.replace("'", "''")
    return (
        f"CREATE TRIGGER {name} BEFORE {moment} WHEN {condition} "
        f"BEGIN SELECT RAISE(ABORT, '{quoted}'); END"
    )


def _keys(table: Table) -> list[list[str]]:
    """The column lists that are unique in a table, primary key first."""
    lists = [[column.name for column in table.primary_key]]
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            lists.append([column.name for column in constraint.columns])
    return lists


def _same_key(table: Table) -> str:
    """SQL: a row with one of the unique keys of NEW exists (`INSERT OR REPLACE` would drop it)."""
    keys = [(columns, "1", "1") for columns in _keys(table)]
    for index in table.indexes:
        if index.unique:
            where = str(index.dialect_options["sqlite"]["where"])
            keys.append(([c.name for c in index.columns], where, index.info["new"]))
    return " OR ".join(
        f"({new} AND EXISTS (SELECT 1 FROM {table.name} o WHERE {old} AND "
        + " AND ".join(f"o.{column} = NEW.{column}" for column in columns)
        + "))"
        for columns, old, new in keys
    )


def _immutable(table: Table) -> list[str]:
    name = table.name
    return [
        _refuse(
            f"{name}_no_delete", f"DELETE ON {name}", "1",
            f"InvariantViolated: nothing is deleted from {name}",
        ),
        _refuse(
            f"{name}_no_update", f"UPDATE ON {name}", "1",
            f"InvariantViolated: nothing in {name} is changed",
        ),
        _refuse(
            f"{name}_no_replace", f"INSERT ON {name}", _same_key(table),
            f"InvariantViolated: {name} holds this already",
        ),
    ]  # fmt: skip


_CLAIM = "SELECT 1 FROM claims c WHERE c.id = NEW.claim_id"

_LEASE_RULES = [
    _refuse("leases_no_delete", "DELETE ON leases", "1",
            "InvariantViolated: nothing is deleted from leases"),
    _refuse("leases_end_once", "UPDATE ON leases", "OLD.state <> 'living'",
            "LeaseLost: the lease has ended"),
    _refuse("leases_keep_their_work",
            "UPDATE OF token, run_id, scope, society, holder, subject, kind, variant, list,"
            " position, seed, split, attempt, claim_id, idea, created_at, data_seed, repeat"
            " ON leases", "1",
            "InvariantViolated: what is leased never changes"),
    _refuse("leases_grow", "INSERT ON leases",
            "NEW.token <= (SELECT coalesce(max(token), 0) FROM leases)",
            "InvariantViolated: fencing tokens grow"),
    _refuse("leases_run_id", "INSERT ON leases",
            "EXISTS (SELECT 1 FROM leases WHERE run_id = NEW.run_id)",
            "InvariantViolated: a run id is drawn once"),
    _refuse("leases_start_living", "INSERT ON leases", "NEW.state <> 'living'",
            "InvariantViolated: a lease starts living"),
    _refuse("leases_one_living", "INSERT ON leases",
            "EXISTS (SELECT 1 FROM leases WHERE scope = NEW.scope AND subject = NEW.subject"
            " AND state = 'living')",
            "AlreadyLeased: somebody holds this"),
    _refuse("leases_not_by_author", "INSERT ON leases",
            f"EXISTS ({_CLAIM} AND c.author = NEW.holder)",
            "NotIndependent: nobody verifies or reproduces a claim of their own"),
    _refuse("leases_not_by_author_of_open_claim", "INSERT ON leases",
            "NEW.list = 'verification' AND EXISTS (SELECT 1 FROM claims c WHERE"
            " c.scope = NEW.scope AND c.variant = NEW.variant AND c.author = NEW.holder AND"
            " NOT EXISTS (SELECT 1 FROM verdicts v WHERE v.claim_id = c.id))",
            "NotIndependent: the author of an open claim makes none of its evidence"),
    _refuse("leases_of_claim", "INSERT ON leases",
            f"NEW.claim_id IS NOT NULL AND NOT EXISTS ({_CLAIM} AND c.scope = NEW.scope AND"
            " (c.variant = NEW.variant OR (c.reference = NEW.variant AND"
            " NEW.kind NOT IN ('verification', 'reproduction'))))",
            "InvariantViolated: no such claim about this variant"),
    _refuse("leases_of_open_claim", "INSERT ON leases",
            "NEW.kind IN ('verification', 'reproduction') AND EXISTS (SELECT 1 FROM verdicts v"
            " WHERE v.claim_id = NEW.claim_id AND v.decision NOT IN ('accepted', 'confirmed'))",
            "ClaimClosed: the claim was closed"),
    _refuse("leases_same_seed_as_screening", "INSERT ON leases",
            "NEW.kind = 'reproduction' AND NOT EXISTS (SELECT 1 FROM claims c JOIN runs r"
            " ON r.id = c.screening_run WHERE c.id = NEW.claim_id AND r.seed = NEW.seed)",
            "InvariantViolated: a reproduction has the seed of the screening run"),
    _refuse("leases_data_seed_of_the_list", "INSERT ON leases",
            "NEW.data_seed IS NOT NULL AND (NEW.data_seed = NEW.seed OR NOT EXISTS (SELECT 1"
            " FROM seeds s WHERE s.scope = NEW.scope AND s.list = NEW.list"
            " AND s.seed = NEW.data_seed))",
            "InvariantViolated: a data seed is another seed of the same list"),
]  # fmt: skip

_RUN_RULES = [
    _refuse("runs_end_a_lease", "INSERT ON runs",
            "NOT EXISTS (SELECT 1 FROM leases l WHERE l.token = NEW.token AND l.run_id = NEW.id"
            " AND l.state = 'living')",
            "LeaseLost: no living lease with this token"),
    _refuse("runs_repeat_the_lease", "INSERT ON runs",
            "NOT EXISTS (SELECT 1 FROM leases l WHERE l.token = NEW.token"
            " AND l.scope = NEW.scope AND l.society = NEW.society AND l.holder = NEW.agent"
            " AND l.kind = NEW.kind AND l.variant = NEW.variant AND l.seed = NEW.seed"
            " AND l.split = NEW.split AND l.attempt = NEW.attempt"
            " AND l.claim_id IS NEW.claim_id AND l.data_seed IS NEW.data_seed"
            " AND l.repeat = NEW.repeat)",
            "InvariantViolated: a run is what its lease says"),
    _refuse("runs_not_by_author", "INSERT ON runs",
            f"EXISTS ({_CLAIM} AND c.author = NEW.agent)",
            "NotIndependent: nobody verifies or reproduces a claim of their own"),
    "CREATE TRIGGER runs_finish_the_lease AFTER INSERT ON runs BEGIN UPDATE leases"
    f" SET state = 'finished', ended_at = {CLOCK} WHERE token = NEW.token; END",
]  # fmt: skip

_CLAIM_RULES = [
    _refuse("claims_come_from_screening", "INSERT ON claims",
            "NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = NEW.screening_run"
            " AND r.kind = 'screening' AND r.outcome = 'completed' AND r.scope = NEW.scope"
            " AND r.variant = NEW.variant AND r.agent = NEW.author)",
            "InvariantViolated: a claim is opened from a completed screening run of its author"),
]  # fmt: skip

_VERDICT_RULES = [
    _refuse("verdicts_close_once", "INSERT ON verdicts",
            "NEW.decision NOT IN ('confirmed', 'rolled_back') AND EXISTS (SELECT 1 FROM verdicts v"
            " WHERE v.claim_id = NEW.claim_id)",
            "InvariantViolated: the claim has a verdict"),
    _refuse("verdicts_try_accepted", "INSERT ON verdicts",
            "NEW.decision IN ('confirmed', 'rolled_back') AND NOT EXISTS (SELECT 1"
            " FROM verdicts v WHERE v.claim_id = NEW.claim_id AND v.decision = 'accepted')",
            "InvariantViolated: only an accepted claim can be confirmed or rolled back"),
    _refuse("evidence_exists", "INSERT ON verdict_runs",
            "NOT EXISTS (SELECT 1 FROM runs WHERE id = NEW.run_id)",
            "InvariantViolated: a verdict cites runs that exist"),
    _refuse("evidence_is_not_the_screening_run", "INSERT ON verdict_runs",
            "EXISTS (SELECT 1 FROM verdicts v JOIN claims c ON c.id = v.claim_id"
            " WHERE v.number = NEW.verdict AND c.screening_run = NEW.run_id)",
            "InvariantViolated: a claim's screening run is never part of its evidence"),
    _refuse("evidence_is_about_the_claim", "INSERT ON verdict_runs",
            "NOT EXISTS (SELECT 1 FROM verdicts v JOIN claims c ON c.id = v.claim_id"
            " JOIN runs r ON r.id = NEW.run_id WHERE v.number = NEW.verdict"
            " AND r.scope = c.scope AND r.variant IN (c.variant, c.reference)"
            " AND (r.kind IN ('calibration', 'verification')"
            " OR (r.kind = 'reproduction' AND r.claim_id = c.id)))",
            "InvariantViolated: evidence is holdout runs of the claim's variant or reference"),
    _refuse("evidence_is_independent", "INSERT ON verdict_runs",
            "EXISTS (SELECT 1 FROM verdicts v JOIN claims c ON c.id = v.claim_id"
            " JOIN runs r ON r.id = NEW.run_id WHERE v.number = NEW.verdict"
            " AND r.agent = c.author AND r.variant = c.variant AND r.started_at >= c.filed_at"
            " AND NOT EXISTS (SELECT 1 FROM verdicts a WHERE a.claim_id = c.id"
            " AND a.decision = 'accepted' AND a.decided_at <= r.started_at))",
            "NotIndependent: the author of an open claim makes none of its evidence"),
]  # fmt: skip

_CHAMPION_RULES = [
    _refuse("champions_in_order", "INSERT ON champions",
            "NEW.number <> (SELECT count(*) FROM champions WHERE scope = NEW.scope)",
            "InvariantViolated: the history of champions has no gaps"),
    _refuse("champions_have_a_claim", "INSERT ON champions",
            "(NEW.number = 0) <> (NEW.claim_id IS NULL) AND NEW.reverts = 0",
            "InvariantViolated: every champion but the first needs a claim"),
    _refuse("champions_were_accepted", "INSERT ON champions",
            "NEW.number > 0 AND NEW.reverts = 0 AND NOT EXISTS ("
            "SELECT 1 FROM claims c JOIN verdicts v ON v.claim_id = c.id"
            " JOIN verdict_runs e ON e.verdict = v.number"
            " JOIN runs r ON r.id = e.run_id AND r.variant = c.variant AND r.split = 'holdout'"
            " WHERE c.id = NEW.claim_id AND c.scope = NEW.scope AND c.variant = NEW.variant"
            " AND v.decision = 'accepted')",
            "InvariantViolated: a champion needs an accepted claim with holdout runs"),
    _refuse("champions_beat_the_last", "INSERT ON champions",
            "NEW.number > 0 AND NEW.reverts = 0 AND (SELECT c.reference FROM claims c"
            " WHERE c.id = NEW.claim_id) <> (SELECT h.variant FROM champions h"
            " WHERE h.scope = NEW.scope ORDER BY h.number DESC LIMIT 1)",
            "InvariantViolated: a claim against an earlier champion crowns nobody"),
    _refuse("champions_revert_to_one", "INSERT ON champions",
            "NEW.reverts <> 0 AND NOT EXISTS (SELECT 1 FROM champions h"
            " WHERE h.scope = NEW.scope AND h.variant = NEW.variant)",
            "InvariantViolated: a roll-back restores an earlier champion"),
    _refuse("champions_screened", "INSERT ON champions",
            "NEW.screening_run IS NOT NULL AND NOT EXISTS (SELECT 1 FROM runs r"
            " WHERE r.id = NEW.screening_run AND r.variant = NEW.variant"
            " AND r.scope = NEW.scope AND r.kind = 'screening')",
            "InvariantViolated: a champion's screening run is a screening run of its variant"),
]  # fmt: skip


_STUDY_RULES = [
    _refuse("study_results_of_a_study", "INSERT ON study_results",
            "NOT EXISTS (SELECT 1 FROM studies s WHERE s.id = NEW.study)",
            "InvariantViolated: a result needs a study that was registered before"),
    _refuse("study_runs_of_a_result", "INSERT ON study_runs",
            "NOT EXISTS (SELECT 1 FROM study_results r WHERE r.study = NEW.study)",
            "InvariantViolated: only a result has evidence"),
    _refuse("study_runs_exist", "INSERT ON study_runs",
            "NOT EXISTS (SELECT 1 FROM runs WHERE id = NEW.run_id)",
            "InvariantViolated: a study cites runs that exist"),
]  # fmt: skip


def _outbox(name: str, moment: str, kind: str, ref: str) -> str:
    return (
        f"CREATE TRIGGER outbox_{name} AFTER {moment} BEGIN "
        f"INSERT INTO outbox (kind, ref) VALUES ('{kind}', NEW.{ref}); END"
    )


_OUTBOX = [
    _outbox("run", "INSERT ON runs WHEN NEW.kind = 'screening'", "run", "id"),
    _outbox("claim", "INSERT ON claims", "claim", "id"),
    _outbox("verdict", "INSERT ON verdicts", "verdict", "claim_id"),
    _outbox("insight", "INSERT ON insights", "insight", "id"),
    _outbox("hypothesis", "INSERT ON hypotheses", "hypothesis", "id"),
    _outbox("tested", "UPDATE OF state ON hypotheses WHEN NEW.state = 'tested'",
            "hypothesis", "id"),
]  # fmt: skip


def statements() -> list[str]:
    """All triggers, in the order to create them.

    SQLite runs the youngest trigger first, so that the rule listed first above speaks first.
    """
    immutable = [statement for table in FACTS for statement in _immutable(table)]
    rules = [
        *immutable,
        *_LEASE_RULES,
        *_RUN_RULES,
        *_CLAIM_RULES,
        *_VERDICT_RULES,
        *_CHAMPION_RULES,
        *_STUDY_RULES,
        *_OUTBOX,
    ]
    return rules[::-1]
