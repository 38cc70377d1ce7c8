"""The rules of the notebook that the database itself keeps, written once for every backend.

A `Rule` refuses a write with a message `Name: reason`, where `Name` is the error that the
Python side raises; an `Action` writes what follows from a write. `sqlite.py` and `postgres.py`
make triggers of them, so that they hold for raw SQL as well:

- facts (runs, claims, verdicts, champions, seeds, ...) are never updated, deleted or replaced;
- one living lease per subject, and it ends only once;
- a run is the end of a living lease and repeats what the lease says (the fencing token decides);
- a seed is one the ledger drew, in the list that the kind of run asks for;
- only a study's run may take its data order from a second seed, or be repeated on the same seeds;
- nobody verifies or reproduces a claim of their own;
- a verdict cites runs of the claim's variant or reference, never the screening run;
- a claim is closed once; only an accepted one is confirmed or rolled back, and only once;
- a champion rests on an accepted claim against the champion before it;
- a study is registered before its result, has one, and cites runs that exist;
- a hypothesis is tested by a screening run of its variant, and stays closed;
- a tally grows by one run at a time.

Conditions are SQL that all backends understand. Where they differ stands a placeholder in braces,
for which each dialect has its words: `{is}` compares with NULL as a value, `{clock}` is the
database's clock, `{wall_s}` and `{flops}` are the numbers in a new run's cost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Table, UniqueConstraint

from society.memory.schema import FACTS, hypotheses, leases

ALWAYS = "TRUE"


@dataclass(frozen=True, slots=True)
class Rule:
    """A write that is refused."""

    name: str
    table: str
    event: str
    """`insert`, `update` or `delete`."""
    condition: str
    """SQL over OLD and NEW: when the write is refused."""
    message: str
    columns: tuple[str, ...] = ()
    """For an update: the rule is about these columns alone; empty means all."""

    def spoken(self, words: Mapping[str, str]) -> Rule:
        """The rule in the words of a dialect."""
        return replace(self, condition=self.condition.format_map(words))


@dataclass(frozen=True, slots=True)
class Action:
    """What the database writes by itself after a write."""

    name: str
    table: str
    event: str
    """`insert` or `update`."""
    condition: str
    statement: str
    columns: tuple[str, ...] = ()

    def spoken(self, words: Mapping[str, str]) -> Action:
        """The action in the words of a dialect."""
        return replace(
            self,
            condition=self.condition.format_map(words),
            statement=self.statement.format_map(words),
        )


def _keys(table: Table) -> list[list[str]]:
    """The column lists that are unique in a table, primary key first."""
    lists = [[column.name for column in table.primary_key]]
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            lists.append([column.name for column in constraint.columns])
    return lists


def _of_new(condition: str, table: Table) -> str:
    """A condition on a stored row as one on the row NEW; words in quotes are left alone."""

    def qualified(match: re.Match[str]) -> str:
        word = match.group()
        return f"NEW.{word}" if word in table.columns else word

    return re.sub(r"'[^']*'|\w+", qualified, condition)


def _same_key(table: Table) -> str:
    """SQL: a row with one of the unique keys of NEW exists (`INSERT OR REPLACE` would drop it)."""
    keys = [(columns, ALWAYS) for columns in _keys(table)]
    for index in table.indexes:
        if index.unique:
            keys.append(([column.name for column in index.columns], str(index.info["where"])))
    return " OR ".join(
        f"({_of_new(where, table)} AND EXISTS (SELECT 1 FROM {table.name} o WHERE {where} AND "
        + " AND ".join(f"o.{column} = NEW.{column}" for column in columns)
        + "))"
        for columns, where in keys
    )


def _kept(table: Table) -> list[Rule]:
    """Rows of this table stay, and none takes the place of another."""
    name = table.name
    return [
        Rule(f"{name}_no_delete", name, "delete", ALWAYS,
             f"InvariantViolated: nothing is deleted from {name}"),
        Rule(f"{name}_no_replace", name, "insert", _same_key(table),
             f"InvariantViolated: {name} holds this already"),
    ]  # fmt: skip


def _immutable(table: Table) -> list[Rule]:
    name = table.name
    return [
        *_kept(table),
        Rule(f"{name}_no_update", name, "update", ALWAYS,
             f"InvariantViolated: nothing in {name} is changed"),
    ]  # fmt: skip


def _others(table: Table, *changing: str) -> tuple[str, ...]:
    """All columns of a table but those that may change."""
    return tuple(column.name for column in table.columns if column.name not in changing)


_CLAIM = "SELECT 1 FROM claims c WHERE c.id = NEW.claim_id"

_LEASE_RULES = [
    Rule("leases_no_delete", "leases", "delete", ALWAYS,
         "InvariantViolated: nothing is deleted from leases"),
    Rule("leases_end_once", "leases", "update", "OLD.state <> 'living'",
         "LeaseLost: the lease has ended"),
    Rule("leases_keep_their_work", "leases", "update", ALWAYS,
         "InvariantViolated: what is leased never changes",
         _others(leases, "state", "expires_at", "ended_at")),
    Rule("leases_grow", "leases", "insert",
         "NEW.token <= (SELECT coalesce(max(token), 0) FROM leases)",
         "InvariantViolated: fencing tokens grow"),
    Rule("leases_run_id", "leases", "insert",
         "EXISTS (SELECT 1 FROM leases WHERE run_id = NEW.run_id)",
         "InvariantViolated: a run id is drawn once"),
    Rule("leases_start_living", "leases", "insert", "NEW.state <> 'living'",
         "InvariantViolated: a lease starts living"),
    Rule("leases_one_living", "leases", "insert",
         "EXISTS (SELECT 1 FROM leases WHERE scope = NEW.scope AND subject = NEW.subject"
         " AND state = 'living')",
         "AlreadyLeased: somebody holds this"),
    Rule("leases_not_by_author", "leases", "insert",
         f"EXISTS ({_CLAIM} AND c.author = NEW.holder)",
         "NotIndependent: nobody verifies or reproduces a claim of their own"),
    Rule("leases_not_by_author_of_open_claim", "leases", "insert",
         "NEW.list = 'verification' AND EXISTS (SELECT 1 FROM claims c WHERE"
         " c.scope = NEW.scope AND c.variant = NEW.variant AND c.author = NEW.holder AND"
         " NOT EXISTS (SELECT 1 FROM verdicts v WHERE v.claim_id = c.id))",
         "NotIndependent: the author of an open claim makes none of its evidence"),
    Rule("leases_of_claim", "leases", "insert",
         f"NEW.claim_id IS NOT NULL AND NOT EXISTS ({_CLAIM} AND c.scope = NEW.scope AND"
         " (c.variant = NEW.variant OR (c.reference = NEW.variant AND"
         " NEW.kind NOT IN ('verification', 'reproduction'))))",
         "InvariantViolated: no such claim about this variant"),
    Rule("leases_of_open_claim", "leases", "insert",
         "NEW.kind IN ('verification', 'reproduction') AND EXISTS (SELECT 1 FROM verdicts v"
         " WHERE v.claim_id = NEW.claim_id AND v.decision NOT IN ('accepted', 'confirmed'))",
         "ClaimClosed: the claim was closed"),
    Rule("leases_same_seed_as_screening", "leases", "insert",
         "NEW.kind = 'reproduction' AND NOT EXISTS (SELECT 1 FROM claims c JOIN runs r"
         " ON r.id = c.screening_run WHERE c.id = NEW.claim_id AND r.seed = NEW.seed)",
         "InvariantViolated: a reproduction has the seed of the screening run"),
    Rule("leases_data_seed_of_the_list", "leases", "insert",
         "NEW.data_seed IS NOT NULL AND (NEW.data_seed = NEW.seed OR NOT EXISTS (SELECT 1"
         " FROM seeds s WHERE s.scope = NEW.scope AND s.list = NEW.list"
         " AND s.seed = NEW.data_seed))",
         "InvariantViolated: a data seed is another seed of the same list"),
]  # fmt: skip

_RUN_RULES = [
    Rule("runs_end_a_lease", "runs", "insert",
         "NOT EXISTS (SELECT 1 FROM leases l WHERE l.token = NEW.token AND l.run_id = NEW.id"
         " AND l.state = 'living')",
         "LeaseLost: no living lease with this token"),
    Rule("runs_repeat_the_lease", "runs", "insert",
         "NOT EXISTS (SELECT 1 FROM leases l WHERE l.token = NEW.token"
         " AND l.scope = NEW.scope AND l.society = NEW.society AND l.holder = NEW.agent"
         " AND l.kind = NEW.kind AND l.variant = NEW.variant AND l.seed = NEW.seed"
         " AND l.split = NEW.split AND l.attempt = NEW.attempt"
         " AND l.claim_id {is} NEW.claim_id AND l.data_seed {is} NEW.data_seed"
         " AND l.repeat = NEW.repeat)",
         "InvariantViolated: a run is what its lease says"),
    Rule("runs_not_by_author", "runs", "insert",
         f"EXISTS ({_CLAIM} AND c.author = NEW.agent)",
         "NotIndependent: nobody verifies or reproduces a claim of their own"),
]  # fmt: skip

_CLAIM_RULES = [
    Rule("claims_come_from_screening", "claims", "insert",
         "NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = NEW.screening_run"
         " AND r.kind = 'screening' AND r.outcome = 'completed' AND r.scope = NEW.scope"
         " AND r.variant = NEW.variant AND r.agent = NEW.author)",
         "InvariantViolated: a claim is opened from a completed screening run of its author"),
]  # fmt: skip

_VERDICT_RULES = [
    Rule("verdicts_close_once", "verdicts", "insert",
         "NEW.decision NOT IN ('confirmed', 'rolled_back') AND EXISTS (SELECT 1 FROM verdicts v"
         " WHERE v.claim_id = NEW.claim_id)",
         "InvariantViolated: the claim has a verdict"),
    Rule("verdicts_try_accepted", "verdicts", "insert",
         "NEW.decision IN ('confirmed', 'rolled_back') AND NOT EXISTS (SELECT 1"
         " FROM verdicts v WHERE v.claim_id = NEW.claim_id AND v.decision = 'accepted')",
         "InvariantViolated: only an accepted claim can be confirmed or rolled back"),
    Rule("evidence_exists", "verdict_runs", "insert",
         "NOT EXISTS (SELECT 1 FROM runs WHERE id = NEW.run_id)",
         "InvariantViolated: a verdict cites runs that exist"),
    Rule("evidence_is_not_the_screening_run", "verdict_runs", "insert",
         "EXISTS (SELECT 1 FROM verdicts v JOIN claims c ON c.id = v.claim_id"
         " WHERE v.number = NEW.verdict AND c.screening_run = NEW.run_id)",
         "InvariantViolated: a claim's screening run is never part of its evidence"),
    Rule("evidence_is_about_the_claim", "verdict_runs", "insert",
         "NOT EXISTS (SELECT 1 FROM verdicts v JOIN claims c ON c.id = v.claim_id"
         " JOIN runs r ON r.id = NEW.run_id WHERE v.number = NEW.verdict"
         " AND r.scope = c.scope AND r.variant IN (c.variant, c.reference)"
         " AND (r.kind IN ('calibration', 'verification')"
         " OR (r.kind = 'reproduction' AND r.claim_id = c.id)))",
         "InvariantViolated: evidence is holdout runs of the claim's variant or reference"),
    Rule("evidence_is_independent", "verdict_runs", "insert",
         "EXISTS (SELECT 1 FROM verdicts v JOIN claims c ON c.id = v.claim_id"
         " JOIN runs r ON r.id = NEW.run_id WHERE v.number = NEW.verdict"
         " AND r.agent = c.author AND r.variant = c.variant AND r.started_at >= c.filed_at"
         " AND NOT EXISTS (SELECT 1 FROM verdicts a WHERE a.claim_id = c.id"
         " AND a.decision = 'accepted' AND a.decided_at <= r.started_at))",
         "NotIndependent: the author of an open claim makes none of its evidence"),
]  # fmt: skip

_CHAMPION_RULES = [
    Rule("champions_in_order", "champions", "insert",
         "NEW.number <> (SELECT count(*) FROM champions WHERE scope = NEW.scope)",
         "InvariantViolated: the history of champions has no gaps"),
    Rule("champions_have_a_claim", "champions", "insert",
         "(NEW.number = 0) <> (NEW.claim_id IS NULL) AND NEW.reverts = 0",
         "InvariantViolated: every champion but the first needs a claim"),
    Rule("champions_were_accepted", "champions", "insert",
         "NEW.number > 0 AND NEW.reverts = 0 AND NOT EXISTS ("
         "SELECT 1 FROM claims c JOIN verdicts v ON v.claim_id = c.id"
         " JOIN verdict_runs e ON e.verdict = v.number"
         " JOIN runs r ON r.id = e.run_id AND r.variant = c.variant AND r.split = 'holdout'"
         " WHERE c.id = NEW.claim_id AND c.scope = NEW.scope AND c.variant = NEW.variant"
         " AND v.decision = 'accepted')",
         "InvariantViolated: a champion needs an accepted claim with holdout runs"),
    Rule("champions_beat_the_last", "champions", "insert",
         "NEW.number > 0 AND NEW.reverts = 0 AND (SELECT c.reference FROM claims c"
         " WHERE c.id = NEW.claim_id) <> (SELECT h.variant FROM champions h"
         " WHERE h.scope = NEW.scope ORDER BY h.number DESC LIMIT 1)",
         "InvariantViolated: a claim against an earlier champion crowns nobody"),
    Rule("champions_revert_to_one", "champions", "insert",
         "NEW.reverts <> 0 AND NOT EXISTS (SELECT 1 FROM champions h"
         " WHERE h.scope = NEW.scope AND h.variant = NEW.variant)",
         "InvariantViolated: a roll-back restores an earlier champion"),
    Rule("champions_screened", "champions", "insert",
         "NEW.screening_run IS NOT NULL AND NOT EXISTS (SELECT 1 FROM runs r"
         " WHERE r.id = NEW.screening_run AND r.variant = NEW.variant"
         " AND r.scope = NEW.scope AND r.kind = 'screening')",
         "InvariantViolated: a champion's screening run is a screening run of its variant"),
]  # fmt: skip


_STUDY_RULES = [
    Rule("study_results_of_a_study", "study_results", "insert",
         "NOT EXISTS (SELECT 1 FROM studies s WHERE s.id = NEW.study)",
         "InvariantViolated: a result needs a study that was registered before"),
    Rule("study_runs_of_a_result", "study_runs", "insert",
         "NOT EXISTS (SELECT 1 FROM study_results r WHERE r.study = NEW.study)",
         "InvariantViolated: only a result has evidence"),
    Rule("study_runs_exist", "study_runs", "insert",
         "NOT EXISTS (SELECT 1 FROM runs WHERE id = NEW.run_id)",
         "InvariantViolated: a study cites runs that exist"),
]  # fmt: skip

_HYPOTHESIS_RULES = [
    *_kept(hypotheses),
    Rule("hypotheses_start_open", "hypotheses", "insert", "NEW.state <> 'open'",
         "InvariantViolated: a hypothesis starts open"),
    Rule("hypotheses_stay_closed", "hypotheses", "update", "OLD.state IN ('tested', 'dropped')",
         "InvariantViolated: the hypothesis is closed"),
    Rule("hypotheses_keep_what_they_say", "hypotheses", "update", ALWAYS,
         "InvariantViolated: what a hypothesis says never changes",
         _others(hypotheses, "state", "taken_by", "taken_in", "taken_until", "run_id",
                 "dropped_because")),
    Rule("hypotheses_have_one_holder", "hypotheses", "update",
         "OLD.state = 'taken' AND NEW.state = 'taken' AND OLD.taken_until > {clock}"
         " AND NOT (OLD.taken_by {is} NEW.taken_by AND OLD.taken_in {is} NEW.taken_in)",
         "AlreadyLeased: somebody tests this hypothesis"),
    Rule("hypotheses_are_tested_by_a_run", "hypotheses", "update",
         "NEW.run_id IS NOT NULL AND (NEW.state <> 'tested' OR NOT EXISTS (SELECT 1 FROM runs r"
         " WHERE r.id = NEW.run_id AND r.kind = 'screening' AND r.scope = NEW.scope"
         " AND r.variant = NEW.variant))",
         "InvariantViolated: a hypothesis is tested by a screening run of its variant"),
]  # fmt: skip

_REFUSAL_RULES = [
    Rule("refusals_name_runs_of_the_scope", "refusals", "insert",
         "NEW.run_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = NEW.run_id"
         " AND r.scope = NEW.scope)",
         "InvariantViolated: a refusal names a run of its scope"),
]  # fmt: skip

_TALLY_RULES = [
    Rule("tallies_no_delete", "tallies", "delete", ALWAYS,
         "InvariantViolated: nothing is deleted from tallies"),
    Rule("tallies_start_with_one", "tallies", "insert", "NEW.runs <> 1",
         "InvariantViolated: a tally counts one run after the other"),
    Rule("tallies_count_up", "tallies", "update",
         "NEW.runs <> OLD.runs + 1 OR NEW.scope <> OLD.scope OR NEW.society <> OLD.society"
         " OR NEW.kind <> OLD.kind OR NEW.outcome <> OLD.outcome",
         "InvariantViolated: a tally counts one run after the other"),
]  # fmt: skip

RULES: tuple[Rule, ...] = (
    *(rule for table in FACTS for rule in _immutable(table)),
    *_LEASE_RULES,
    *_RUN_RULES,
    *_CLAIM_RULES,
    *_VERDICT_RULES,
    *_CHAMPION_RULES,
    *_STUDY_RULES,
    *_HYPOTHESIS_RULES,
    *_REFUSAL_RULES,
    *_TALLY_RULES,
)
"""All rules. Of those for one table and event, the first that is broken speaks."""


def _outbox(name: str, table: str, condition: str, kind: str, ref: str = "id") -> Action:
    return Action(
        f"outbox_{name}", table, "insert", condition,
        f"INSERT INTO outbox (kind, ref) VALUES ('{kind}', NEW.{ref})",
    )  # fmt: skip


ACTIONS: tuple[Action, ...] = (
    Action("runs_finish_the_lease", "runs", "insert", ALWAYS,
           "UPDATE leases SET state = 'finished', ended_at = {clock} WHERE token = NEW.token"),
    Action("runs_are_tallied", "runs", "insert", ALWAYS,
           "INSERT INTO tallies (scope, society, kind, outcome, runs, wall_s, flops)"
           " VALUES (NEW.scope, NEW.society, NEW.kind, NEW.outcome, 1, {wall_s}, {flops})"
           " ON CONFLICT (scope, society, kind, outcome) DO UPDATE SET runs = tallies.runs + 1,"
           " wall_s = tallies.wall_s + excluded.wall_s, flops = tallies.flops + excluded.flops"),
    Action("runs_close_hypotheses", "runs", "insert", "NEW.kind = 'screening'",
           "UPDATE hypotheses SET state = 'tested', run_id = NEW.id WHERE scope = NEW.scope"
           " AND variant = NEW.variant AND state IN ('open', 'taken')"),
    _outbox("run", "runs", "NEW.kind = 'screening'", "run"),
    _outbox("claim", "claims", ALWAYS, "claim"),
    _outbox("verdict", "verdicts", ALWAYS, "verdict", "claim_id"),
    _outbox("insight", "insights", ALWAYS, "insight"),
    _outbox("prior", "priors", ALWAYS, "prior"),
    _outbox("hypothesis", "hypotheses", ALWAYS, "hypothesis"),
    Action("outbox_closed", "hypotheses", "update", "NEW.state IN ('tested', 'dropped')",
           "INSERT INTO outbox (kind, ref) VALUES ('hypothesis', NEW.id)", ("state",)),
)  # fmt: skip
"""What the database writes by itself."""
