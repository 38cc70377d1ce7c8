"""Ledgers of every older version open after an upgrade, with all that was recorded in them."""

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from society.cli import main
from society.errors import NotANotebook, NotebookDamaged
from society.memory import migrations, schema
from society.memory.folder import FileLock, NotebookFolder
from society.memory.ledger import Ledger
from society.records import (
    Call,
    HypothesisState,
    NewInsight,
    NewRefusal,
    RefusalReason,
    RunKind,
    Scope,
    SocietyState,
    Usage,
    Variant,
)

OLD = [1, 2, 3]


@pytest.fixture(params=OLD, ids="schema {}".format)
def version(request):
    return request.param


@pytest.fixture
def lab(version, unpack, tmp_path):
    """A notebook of an older version: two synthetic societies, the second one interrupted."""
    return unpack(version, tmp_path / "lab")


@pytest.fixture
def upgraded(lab):
    migrations.upgrade(lab / "ledger.sqlite")
    return lab


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def raw(lab, *statements):
    """Run statements on a ledger as any program could; the rows of the last one."""
    with closing(sqlite3.connect(lab / "ledger.sqlite", isolation_level=None)) as db:
        rows = []
        for statement in statements:
            rows = db.execute(statement).fetchall()
        return rows


def contents(lab):
    """table -> list of rows as {column: value}, in the order of keeping."""
    names = [name for (name,) in raw(lab, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    with closing(sqlite3.connect(lab / "ledger.sqlite")) as db:
        db.row_factory = sqlite3.Row
        return {
            name: [dict(row) for row in db.execute(f"SELECT * FROM {name} ORDER BY rowid")]
            for name in names
        }


def whole(lab):
    """Everything in the file, rules included, as text."""
    with closing(sqlite3.connect(lab / "ledger.sqlite")) as db:
        return list(db.iterdump())


# --- what is kept --------------------------------------------------------------------------------


def test_stored_ledgers_are_what_they_say(lab, version):
    assert raw(lab, "SELECT value FROM meta WHERE key = 'schema'") == [(str(version),)]
    found = contents(lab)
    for name in ("runs", "claims", "verdicts", "champions", "insights", "activities", "outbox"):
        assert len(found[name]) > 4, name
    states = [row["state"] for row in found["hypotheses"]]
    assert {"open", "taken", "tested"} == set(states) - {"dropped"}
    assert ("studies" in found) == (version >= 2)
    assert ("refusals" in found) == (version >= 3)
    assert "calls" not in found


def test_an_upgrade_keeps_every_row_and_every_value(lab, version):
    before = contents(lab)
    migrations.upgrade(lab / "ledger.sqlite")
    after = contents(lab)
    closed = [row["ref"] for row in after["outbox"][len(before["outbox"]) :]]
    del after["outbox"][len(before["outbox"]) :]
    for name, old_rows in before.items():
        new_rows = after[name]
        if name == "meta" and version < 3:
            new_rows = [row for row in new_rows if row["key"] != "id"]
        assert len(new_rows) == len(old_rows), name
        for old, new in zip(old_rows, new_rows, strict=True):
            may_differ = set()
            if name == "hypotheses" and old["id"] in closed:
                may_differ = {"state", "run_id"}
            if name == "meta" and old["key"] == "schema":
                assert new["value"] == str(schema.SCHEMA_VERSION)
                may_differ = {"value"}
            if name == "societies" and version < 3 and "recall" in json.loads(old["settings"]):
                changed = json.loads(old["settings"])
                changed["knowledge"] = changed.pop("recall")
                assert json.loads(new["settings"]) == changed
                may_differ = {"settings"}
            for column in set(old) - may_differ:
                assert (new[column], type(new[column])) == (old[column], type(old[column])), (
                    name, column,
                )  # fmt: skip


@pytest.mark.parametrize("version", [1, 2], ids="schema {}".format, indirect=True)
def test_ideas_are_closed_for_a_reason_and_read_again(lab):
    before = len(contents(lab)["outbox"])
    migrations.upgrade(lab / "ledger.sqlite")
    found = contents(lab)
    ideas = {row["statement"]: row for row in found["hypotheses"]}
    first = ideas["an open idea"]
    assert (first["state"], first["dropped_because"]) == ("open", None)
    for twin in ("the open idea, had twice", "the open idea, had three times"):
        assert ideas[twin]["state"] == "dropped"
        assert ideas[twin]["dropped_because"] == f"the same as {first['id']}"
        assert ideas[twin]["variant"] == first["variant"]
    taken = ideas["an idea that somebody had taken"]
    assert (taken["state"], taken["taken_by"]) == ("taken", "a03")
    assert taken["taken_until"] <= taken["posted_at"]
    tested = ideas["an idea of what was screened long before"]
    runs = [
        row["id"]
        for row in found["runs"]
        if (row["variant"], row["kind"]) == (tested["variant"], "screening")
    ]
    assert (tested["state"], tested["run_id"]) == ("tested", runs[0])
    again = [(row["kind"], row["ref"]) for row in found["outbox"][before:]]
    closed = [row["id"] for row in ideas.values() if row["dropped_because"]]
    assert sorted(again) == sorted(("hypothesis", one) for one in [*closed, tested["id"]])


def test_variants_are_numbered_in_the_order_of_keeping(lab):
    before = raw(lab, "SELECT fingerprint FROM variants ORDER BY rowid")
    migrations.upgrade(lab / "ledger.sqlite")
    after = raw(lab, "SELECT fingerprint, number FROM variants ORDER BY number")
    assert after == [(mark, place) for place, (mark,) in enumerate(before, start=1)]


def test_runs_are_tallied(upgraded):
    with Ledger.open(upgraded) as ledger:
        scope = ledger.scopes()[0]
        runs, counts = ledger.runs(), ledger.counts(scope)
    assert {kind: count for kind, count in counts.runs.items() if count} == {
        kind: sum(run.kind is kind for run in runs)
        for kind in RunKind
        if any(run.kind is kind for run in runs)
    }
    assert counts.wall_s == pytest.approx(sum(run.cost.wall_s for run in runs))
    assert counts.flops == pytest.approx(sum(run.cost.flops for run in runs))


# --- what it is afterwards -----------------------------------------------------------------------


def shape(connection):
    """Columns, constraints, references and indexes by table, in an order that does not matter."""
    found = sqlalchemy.inspect(connection)

    def index(one):
        where = one.get("dialect_options", {}).get("sqlite_where")
        return (one["name"], *one["column_names"], bool(one["unique"]), str(where))

    return {
        name: {
            "columns": {
                (
                    one["name"],
                    str(one["type"]),
                    one["nullable"],
                    one["default"],
                    one.get("primary_key"),
                )
                for one in found.get_columns(name)
            },
            "key": found.get_pk_constraint(name)["constrained_columns"],
            "checks": {(c["name"], c["sqltext"]) for c in found.get_check_constraints(name)},
            "unique": {tuple(one["column_names"]) for one in found.get_unique_constraints(name)},
            "references": {
                (*one["constrained_columns"], one["referred_table"], *one["referred_columns"])
                for one in found.get_foreign_keys(name)
            },
            "indexes": {index(one) for one in found.get_indexes(name)},
        }
        for name in found.get_table_names()
    }


def tables(lab):
    """The shape of all tables, and the words of all rules (unique keys come in any order)."""
    engine = sqlalchemy.create_engine(f"sqlite:///{lab / 'ledger.sqlite'}")
    with engine.connect() as connection:
        found = shape(connection)
    engine.dispose()
    rules = raw(lab, "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    return found | {"rules": {(name, *sorted(re.findall(r"\w+", sql))) for name, sql in rules}}


def test_an_upgraded_ledger_is_like_a_new_one(upgraded, tmp_path):
    (tmp_path / "new").mkdir()
    Ledger.open(tmp_path / "new").close()
    old, new = tables(upgraded), tables(tmp_path / "new")
    assert old.keys() == new.keys()
    for name in new:
        assert old[name] == new[name], name


def test_the_stored_ledger_of_this_version_needs_no_upgrade(unpack, tmp_path):
    """Fails when tables or rules were changed without raising the version."""
    lab = unpack(schema.SCHEMA_VERSION, tmp_path / "lab")
    before = whole(lab)
    assert migrations.upgrade(lab / "ledger.sqlite").backup is None
    with Ledger.open(lab, read_only=True) as ledger:
        assert len(ledger.priors()) == 4
        assert len(ledger.refusals()) > 0
        assert ledger.usage("s004") == Usage(4, 1, 1, 6100, 380, 0.01)
        assert len(ledger.calls()) == 4
    assert whole(lab) == before
    (tmp_path / "new").mkdir()
    Ledger.open(tmp_path / "new").close()
    assert tables(lab) == tables(tmp_path / "new")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET score = 0 WHERE number = 1",
        "DELETE FROM verdicts",
        "UPDATE seeds SET seed = 7",
        "INSERT OR REPLACE INTO claims SELECT * FROM claims LIMIT 1",
        "UPDATE leases SET holder = 'a99'",
        "INSERT INTO verdict_runs SELECT 1, screening_run, 99 FROM claims LIMIT 1",
    ],
)
def test_the_rules_hold_in_an_upgraded_ledger(upgraded, statement):
    with pytest.raises(sqlite3.IntegrityError, match=r"InvariantViolated|LeaseLost"):
        raw(upgraded, statement)


def test_an_upgraded_ledger_reads_through_all_of_the_interface(upgraded, version):
    with Ledger.open(upgraded) as ledger:
        scope = ledger.scopes()[0]
        assert len(ledger.runs(scope)) == raw(upgraded, "SELECT count(*) FROM runs")[0][0]
        assert ledger.champion(scope).number == len(ledger.champions(scope)) - 1 > 0
        assert all(claim.verdict or claim.is_open for claim in ledger.claims(scope))
        assert ledger.noise(scope).seeds > 0
        open_ideas = ledger.hypotheses(scope, state=HypothesisState.OPEN)
        had = (
            "an idea that somebody has taken" if version == 3 else "an idea that somebody had taken"
        )
        assert [one.statement for one in open_ideas] == ["an open idea", had]
        assert len(ledger.studies()) == (version > 1)
        assert len(ledger.refusals()) == len(ledger.priors()) == (4 if version == 3 else 0)
        assert ledger.calls() == ()
        assert {run.environment.sandbox for run in ledger.runs()} == {""}
        society = ledger.societies()[-1].id
        assert ledger.usage(society) == Usage()
        ledger.record_call(Call(society, "a01", "propose", "m", "answered", 7, 1, 0.5, 2.0))
        assert ledger.usage(society, "a01") == Usage(1, 0, 0, 7, 1, 0.5)
        for reason in RefusalReason:
            ledger.commit(
                scope, society, "a01", [NewRefusal(Variant(scope.task), reason)], key=reason.value
            )


@pytest.mark.parametrize("version", OLD, ids="schema {}".format, indirect=True)
def test_a_society_goes_on_in_an_upgraded_ledger(upgraded, version, society):
    with Ledger.open(upgraded) as ledger:
        before = ledger.societies()[-1]
        made = len(ledger.runs(society=before.id))
    assert before.state is (SocietyState.RUNNING if version == 1 else SocietyState.STOPPED)
    done = society("run", "--resume", "--runs", made + 6, "--lab", upgraded, "--plain")
    assert done.code == 0, done.err
    with Ledger.open(upgraded) as ledger:
        assert [one.id for one in ledger.societies()][-1] == before.id
        assert len(ledger.runs(society=before.id)) >= made + 6
        assert ledger.societies()[-1].state is SocietyState.FINISHED


# --- the backup, and what goes wrong -------------------------------------------------------------


def test_the_ledger_of_before_is_kept(lab, version):
    before = whole(lab)
    first = migrations.upgrade(lab / "ledger.sqlite")
    assert first.backup == lab / f"ledger.sqlite.schema{version}.bak"
    assert sorted(path.name for path in lab.glob("*.bak*")) == [first.backup.name]
    kept = first.backup.read_bytes()
    (lab / "ledger.sqlite").write_bytes(kept)
    assert whole(lab) == before
    second = migrations.upgrade(lab / "ledger.sqlite")
    assert second.backup != first.backup
    assert first.backup.read_bytes() == kept


def test_an_upgrade_that_fails_half_way_changes_nothing(lab, version, monkeypatch):
    before = whole(lab)

    def step(op, connection):
        migrations._to_4(op, connection)
        assert connection.exec_driver_sql("SELECT count(*) FROM calls").scalar_one() == 0
        raise RuntimeError("power cut")

    monkeypatch.setitem(migrations._STEPS, 3, step)
    with pytest.raises(RuntimeError, match="power cut"):
        migrations.upgrade(lab / "ledger.sqlite")
    assert whole(lab) == before
    assert not list(lab.glob("*.bak*"))
    monkeypatch.undo()
    assert migrations.upgrade(lab / "ledger.sqlite").before == version


def test_an_inconsistent_ledger_is_not_upgraded(lab):
    raw(lab, "DROP TRIGGER runs_no_delete", "DELETE FROM runs WHERE number = 3")
    before = whole(lab)
    with pytest.raises(NotebookDamaged, match="cites a missing one of runs"):
        migrations.upgrade(lab / "ledger.sqlite")
    assert whole(lab) == before
    assert not list(lab.glob("*.bak*"))


def test_only_older_ledgers_are_upgraded(upgraded):
    raw(upgraded, "UPDATE meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(NotANotebook, match="schema 99"):
        migrations.upgrade(upgraded / "ledger.sqlite")
    other = upgraded / "other.sqlite"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE meta (key)")
        db.commit()
    with pytest.raises(NotANotebook, match="no notebook's ledger"):
        migrations.upgrade(other)
    with pytest.raises(NotANotebook, match="No ledger at"):
        migrations.upgrade(upgraded / "nothing.sqlite")
    other.write_bytes(b"no database at all" * 100)
    with pytest.raises(NotebookDamaged):
        migrations.upgrade(other)


def test_every_older_version_has_a_step_and_a_stored_ledger():
    assert list(migrations._STEPS) == OLD == list(range(1, schema.SCHEMA_VERSION))
    data = Path(__file__).parent / "data"
    for version in (*OLD, schema.SCHEMA_VERSION):
        assert (data / f"ledger-v{version}.sqlite.xz").stat().st_size < 200_000


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("status",), ("report",), ("run", "--resume"), ("memory", "show", "r00001"),
        ("memory", "search", "depth"), ("memory", "reindex"), ("memory", "export"),
        ("run", "--task", "synthetic", "--runs", "5"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_other_commands_name_the_upgrade(lab, command, cli):
    before = whole(lab)
    code, _, err = cli(*command, "--lab", lab)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert f"society memory upgrade --lab {lab}" in line
    assert whole(lab) == before


def test_the_command_says_what_it_did(lab, version, cli):
    code, out, err = cli("memory", "upgrade", "--lab", lab)
    assert (code, err) == (0, "")
    assert f"from schema {version} to {schema.SCHEMA_VERSION}" in out
    assert f"ledger.sqlite.schema{version}.bak" in out
    assert ("because they repeat an earlier one: 3." in out) == (version < 3)
    assert "what they cost, can be recorded" in out
    again = cli("memory", "upgrade", "--lab", lab)
    assert again[0] == 0
    assert "is up to date" in again[1]
    assert cli("status", "--lab", lab)[0] == 0


def test_a_notebook_in_use_is_not_upgraded(lab, cli):
    before = whole(lab)
    lock = FileLock(NotebookFolder(lab).owner_lock)
    assert lock.acquire()
    try:
        code, _, err = cli("memory", "upgrade", "--lab", lab)
    finally:
        lock.release()
    assert (code, whole(lab)) == (1, before)
    assert "in use by process" in err


def test_the_error_of_an_old_ledger_reaches_the_reader(lab):
    for read_only in (False, True):
        with pytest.raises(NotANotebook, match="society memory upgrade"):
            Ledger.open(lab, read_only=read_only)


# --- a ledger on a server ------------------------------------------------------------------------

REASONS_OF_3 = "reason IN ('duplicate', 'near_duplicate', 'dead_end', 'same_idea')"


@pytest.fixture
def old_on_a_server(postgres_url):
    """A PostgreSQL ledger as schema 3 had it, with a few facts in it."""
    scope = Scope("toy/cpu", "cpu-A")
    with Ledger.open(postgres_url) as ledger:
        society = ledger.start_society(1, {}).id
        refused = NewRefusal(Variant(scope.task), RefusalReason.DUPLICATE, note="as before")
        ledger.commit(scope, society, "ada", [NewInsight("kept", ()), refused], key="k")
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute("DROP TABLE calls")
        server.execute("DROP FUNCTION society_calls_before_insert CASCADE")
        server.execute("ALTER TABLE refusals DROP CONSTRAINT reason_known")
        server.execute(f"ALTER TABLE refusals ADD CONSTRAINT reason_known CHECK ({REASONS_OF_3})")
        server.execute("UPDATE meta SET value = '3' WHERE key = 'schema'")
    return postgres_url


def rules_on(url):
    """The words of all triggers' functions."""
    with psycopg.connect(url) as server:
        query = "SELECT proname, prosrc FROM pg_proc WHERE starts_with(proname, 'society_')"
        return set(server.execute(query).fetchall())


def server_shape(url):
    address = url.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return shape(connection)


def test_a_ledger_on_a_server_is_upgraded(old_on_a_server, postgres_server):
    with pytest.raises(NotANotebook, match="society memory upgrade"):
        Ledger.open(old_on_a_server)
    done = migrations.upgrade(old_on_a_server)
    assert (done.before, done.after, done.backup) == (3, schema.SCHEMA_VERSION, "society_schema3")
    with Ledger.open(old_on_a_server) as ledger:
        assert [one.text for one in ledger.insights()] == ["kept"]
        assert [one.note for one in ledger.refusals()] == ["as before"]
        ledger.record_call(Call("s001", "ada", "propose", "m", "answered", 7, 1, 0.5, 2.0))
        assert ledger.usage("s001") == Usage(1, 0, 0, 7, 1, 0.5)
        refused = NewRefusal(Variant("toy/cpu"), RefusalReason.BROKEN, note="as now")
        assert ledger.commit(ledger.scopes()[0], "s001", "ada", [refused], key="l")
    with psycopg.connect(old_on_a_server) as server:
        kept = server.execute("SELECT text FROM society_schema3.insights").fetchall()
        assert kept == [("kept",)]
        assert server.execute("SELECT value FROM society_schema3.meta WHERE key = 'schema'"
                              ).fetchone() == ("3",)  # fmt: skip
    again = migrations.upgrade(old_on_a_server)
    assert (again.before, again.backup) == (schema.SCHEMA_VERSION, None)
    with postgres_server.database() as new:
        Ledger.open(new).close()
        assert server_shape(old_on_a_server) == server_shape(new)
        assert rules_on(old_on_a_server) == rules_on(new)


def test_an_upgrade_on_a_server_that_fails_changes_nothing(old_on_a_server, monkeypatch):
    def step(op, connection):
        migrations._to_4(op, connection)
        raise RuntimeError("power cut")

    before = server_shape(old_on_a_server), rules_on(old_on_a_server)
    monkeypatch.setitem(migrations._STEPS, 3, step)
    with pytest.raises(RuntimeError, match="power cut"):
        migrations.upgrade(old_on_a_server)
    assert (server_shape(old_on_a_server), rules_on(old_on_a_server)) == before
    with psycopg.connect(old_on_a_server) as server:
        copies = "SELECT count(*) FROM pg_namespace WHERE starts_with(nspname, 'society_')"
        assert server.execute(copies).fetchone() == (0,)


def test_only_older_ledgers_on_a_server_are_upgraded(old_on_a_server):
    with psycopg.connect(old_on_a_server, autocommit=True) as server:
        for found in ("2", "99", "none"):
            server.execute("UPDATE meta SET value = %s WHERE key = 'schema'", (found,))
            with pytest.raises(NotANotebook, match=f"schema {found}; this version"):
                migrations.upgrade(old_on_a_server)
        server.execute("DROP TABLE outbox")
        with pytest.raises(NotANotebook, match="no notebook's ledger"):
            migrations.upgrade(old_on_a_server)
