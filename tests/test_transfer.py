"""Exporting a memory and importing it elsewhere: nothing is lost, and nothing wrong gets in."""

import gzip
import io
import json
import lzma
import sqlite3
import tracemalloc
from contextlib import closing

import pyarrow
import pyarrow.parquet
import pytest
import sqlalchemy

from society.cli import main
from society.errors import NotANotebook, UsageError
from society.memory import exports, migrations, schema, transfer
from society.memory.exports import Format
from society.memory.folder import FileLock, NotebookFolder
from society.memory.ledger import Ledger
from society.records import Call, NewPrior, NewRefusal, RefusalReason, SeedList

ODD_TEXTS = ('{"a":1}', '"a"', "[1,  2]", "[NaN]", "null", "", '"', "\u2028 ä 😀 \\ \t\r\n '", "{")
ODD_FLOATS = (0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308, float("inf"), float("-inf"), 1e22)


@pytest.fixture(scope="session")
def _rich(tmp_path_factory, unpack):
    """A notebook with rows in every table, some of them odd."""
    lab = unpack(2, tmp_path_factory.mktemp("transfer") / "lab")
    migrations.upgrade(lab / "ledger.sqlite")
    with Ledger.open(lab) as ledger:
        (scope,) = ledger.scopes()
        society = ledger.societies()[-1].id
        run = ledger.runs(scope)[0]
        entries = [
            NewRefusal(run.variant, RefusalReason.DUPLICATE, run.id, "was run"),
            NewPrior("results.tsv", "a1b2c3d", 0.9979, "keep", "baseline"),
            NewPrior("results.tsv", "d4e5f6a", None, "crash", "double width (OOM)"),
        ]
        assert ledger.commit(scope, society, "a01", entries, key="rich")
        for text in ODD_TEXTS:
            call = Call(society, "a01", "propose", text, text or "answered", 7, 1, 1e-9, 0.1 + 0.2)
            ledger.record_call(call)
    with closing(sqlite3.connect(lab / "ledger.sqlite")) as db:
        db.execute("INSERT INTO sources VALUES ('0abc', 'def main():\n    pass\n', 7.25)")
        for number, text in enumerate(ODD_TEXTS):
            db.execute(
                "INSERT INTO insights (id, scope, society, author, text, evidence, posted_at)"
                " VALUES (?, 1, ?, 'a01', ?, ?, 1.5)", (f"odd{number}", society, text, text),
            )  # fmt: skip
        for number in ODD_FLOATS:
            db.execute(
                "INSERT INTO activities (society, agent, role, duty, subject, started_at, ended_at,"
                " note) VALUES (?, 'a01', 'r', 'd', 's', ?, 2, '')", (society, number),
            )  # fmt: skip
        db.commit()
    return lab


@pytest.fixture
def rich(_rich):
    """The rich notebook, read only."""
    return NotebookFolder(_rich)


@pytest.fixture(scope="session")
def _lines(_rich):
    stream = io.StringIO()
    transfer.write_export(NotebookFolder(_rich), stream)
    return tuple(stream.getvalue().splitlines())


@pytest.fixture
def lines(_lines):
    """The lines of its export."""
    return list(_lines)


@pytest.fixture
def target(tmp_path):
    """A folder without a ledger."""
    return NotebookFolder(tmp_path / "target").create()


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def whole(folder):
    with closing(sqlite3.connect(folder.own_ledger)) as db:
        return list(db.iterdump())


def stored(folder):
    """table -> rows with the types of their values; what belongs to one ledger left out."""
    found = {}
    with closing(sqlite3.connect(folder.own_ledger)) as db:
        for (table,) in db.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall():
            columns = sorted(row[1] for row in db.execute(f"PRAGMA table_info({table})"))
            if table == "tallies":  # sums of floats, counted in another order: see the test below
                columns = [name for name in columns if name not in ("wall_s", "flops")]
            rows = db.execute(f"SELECT {', '.join(columns)} FROM {table}")
            found[table] = sorted([(type(v).__name__, repr(v)) for v in row] for row in rows)
    found["meta"] = [row for row in found["meta"] if "created_at" in row[0][1]]
    found["counters"] = [row for row in found["counters"] if "recall" not in row[0][1]]
    return found


def exported(folder):
    stream = io.StringIO()
    transfer.write_export(folder, stream)
    return stream.getvalue()


# --- round trips ---------------------------------------------------------------------------------


def test_the_rich_notebook_has_rows_in_every_table(lines):
    header = json.loads(lines[0])
    assert set(header["rows"]) == set(schema.metadata.tables) - {"tallies"}
    assert min(header["rows"].values()) > 0
    assert len(lines) == 1 + sum(header["rows"].values())


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all"])
def test_nothing_is_lost_on_the_way(rich, target, tmp_path, name):
    out = tmp_path / name
    form = Format.JSONL if "." in name else Format.PARQUET
    header = transfer.write_export(rich, out, form)
    assert transfer.read_export(target, out) == header
    before, after = stored(rich), stored(target)
    assert before.keys() == after.keys()
    for table in before:
        assert after[table] == before[table], table
    assert exported(target) == exported(rich)


def test_a_round_trip_over_postgresql(rich, tmp_path, postgres_url):
    pytest.importorskip("psycopg")
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    transfer.write_export(rich, first)
    shared = NotebookFolder(tmp_path / "shared").share(postgres_url)
    transfer.read_export(shared, first)
    transfer.write_export(shared, second)
    assert second.read_text().splitlines() == first.read_text().splitlines()
    transfer.write_export(shared, tmp_path / "parquet", Format.PARQUET)
    back = NotebookFolder(tmp_path / "back").create()
    transfer.read_export(back, tmp_path / "parquet")
    assert exported(back) == first.read_text()
    with pytest.raises(UsageError, match="not empty"):
        transfer.read_export(shared, first)


@pytest.mark.parametrize("change", ["verdict of its own screening run", "missing run"])
def test_postgresql_refuses_what_breaks_a_rule(lines, tmp_path, postgres_url, change):
    shared = NotebookFolder(tmp_path / "shared").share(postgres_url)
    path = write(tmp_path, TAMPERED[change][0](lines))
    with pytest.raises(UsageError, match="Nothing was imported"):
        transfer.read_export(shared, path)
    with Ledger.open(shared.ledger) as ledger:
        assert ledger.runs() == ledger.societies() == ()
        ledger.start_society(1, {})
    transfer_again = NotebookFolder(tmp_path / "again").share(postgres_url)
    with pytest.raises(UsageError, match="not empty"):
        transfer.read_export(transfer_again, path)


def test_rules_hold_and_numbers_go_on_in_an_imported_memory(rich, target, tmp_path):
    transfer.write_export(rich, tmp_path / "all.jsonl")
    transfer.read_export(target, tmp_path / "all.jsonl")
    for statement in ("UPDATE runs SET score = 0", "DELETE FROM claims", "DELETE FROM hypotheses"):
        with (
            closing(sqlite3.connect(target.own_ledger)) as db,
            pytest.raises(sqlite3.IntegrityError, match="InvariantViolated"),
        ):
            db.execute(statement)
    with Ledger.open(target.own_ledger) as ledger:
        scope = ledger.scopes()[0]
        last = ledger.societies()[-1]
        new = ledger.start_society(1, {"task": "synthetic", "profile": "quick"})
        assert new.id > last.id
        variant = ledger.runs(scope)[0].variant
        lease = ledger.lease_audit(scope, new.id, holder="a01", variant=variant, ttl_s=60)
        assert lease.token == 1 + max(row["token"] for row in rows_of(exported(rich), "leases"))


def rows_of(text, table):
    found = (json.loads(line) for line in text.splitlines()[1:])
    return [row for row in found if row["table"] == table]


def test_a_society_goes_on_in_an_imported_memory(unpack, tmp_path, society):
    old, lab = NotebookFolder(unpack(2, tmp_path / "old")), tmp_path / "copy"
    migrations.upgrade(old.own_ledger)
    done = society("memory", "export", "--out", tmp_path / "all.jsonl.gz", "--lab", old.path)
    assert (done.code, done.err) == (0, "")
    done = society("memory", "import", tmp_path / "all.jsonl.gz", "--lab", lab)
    assert (done.code, done.err) == (0, "")
    done = society("run", "--task", "synthetic", "--runs", 5, "--slots", 2, "--lab", lab)
    assert done.code == 0, done.err
    assert len(rows_of(exported(NotebookFolder(lab)), "runs")) >= 5 + len(
        rows_of(exported(old), "runs")
    )


# --- what is not in it ---------------------------------------------------------------------------


def test_the_secret_stays_and_drawn_seeds_come_along(rich, target, tmp_path):
    transfer.write_export(rich, tmp_path / "all.jsonl")
    transfer.read_export(target, tmp_path / "all.jsonl")
    metas = []
    for folder in (rich, target):
        with closing(sqlite3.connect(folder.own_ledger)) as db:
            metas.append(dict(db.execute("SELECT key, value FROM meta")))
    assert metas[0]["secret"] not in (tmp_path / "all.jsonl").read_text()
    assert metas[0]["secret"] != metas[1]["secret"]
    assert metas[0]["id"] != metas[1]["id"]
    assert metas[1]["origin"] == metas[0]["id"]
    assert metas[1]["created_at"] == metas[0]["created_at"]
    drawn = [row for row in rows_of(exported(rich), "seeds") if row["list"] == "verification"]
    with Ledger.open(target.own_ledger) as ledger:
        seeds = ledger.seeds(SeedList.VERIFICATION, ledger.scopes()[0], len(drawn) + 5)
    assert list(seeds[: len(drawn)]) == [row["seed"] for row in drawn]
    assert len(set(seeds)) == len(seeds)


def test_tallies_are_counted_again(rich, target, tmp_path):
    transfer.write_export(rich, tmp_path / "all.jsonl")
    transfer.read_export(target, tmp_path / "all.jsonl")
    with Ledger.open(rich.own_ledger, read_only=True) as old, Ledger.open(target.own_ledger) as new:
        scope = old.scopes()[0]
        before, after = old.counts(scope), new.counts(scope)
    assert after.runs == before.runs
    assert after.wall_s == pytest.approx(before.wall_s, rel=1e-12)
    assert after.flops == pytest.approx(before.flops, rel=1e-12)


# --- how it is written ---------------------------------------------------------------------------


def test_json_columns_are_json_and_floats_have_all_their_digits(rich, lines):
    found = [json.loads(line) for line in lines[1:]]
    runs = [row for row in found if row["table"] == "runs"]
    assert all(isinstance(row["cost"]["wall_s"], float) for row in runs)
    with closing(sqlite3.connect(rich.own_ledger)) as db:
        scores = [score for (score,) in db.execute("SELECT score FROM runs ORDER BY number")]
    assert [row["score"] for row in runs] == scores
    odd = [row["evidence"] for row in found if row.get("id", "").startswith("odd")]
    assert odd == list(ODD_TEXTS)
    assert not any(token in "".join(lines) for token in (": NaN", ": Infinity", ": -Infinity"))


def test_the_same_memory_gives_the_same_bytes(rich, tmp_path):
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for file in files:
        transfer.write_export(rich, file)
    assert files[0].read_bytes() == files[1].read_bytes()


class Growing(io.StringIO):
    """A stream beside which somebody writes to the ledger."""

    def __init__(self, folder):
        super().__init__()
        self._folder = folder

    def write(self, text):
        if super().write(text) and self.getvalue().count("\n") in (1, 400):
            with closing(sqlite3.connect(self._folder.own_ledger)) as db:
                db.execute("INSERT INTO sources VALUES (?, '', 0)", (str(self.tell()),))
                db.commit()
        return len(text)


def test_an_export_is_one_snapshot(unpack, tmp_path):
    folder = NotebookFolder(unpack(2, tmp_path / "lab"))
    migrations.upgrade(folder.own_ledger)
    before = exported(folder)
    stream = Growing(folder)
    transfer.write_export(folder, stream)
    assert stream.getvalue() == before
    assert len(rows_of(exported(folder), "sources")) == 2


def test_memory_does_not_grow_with_the_ledger(unpack, tmp_path):
    peaks = []
    for count in (1_500, 6_000):
        folder = NotebookFolder(unpack(2, tmp_path / str(count)))
        migrations.upgrade(folder.own_ledger)
        with closing(sqlite3.connect(folder.own_ledger)) as db:
            db.execute("DROP TRIGGER activities_no_replace")  # quicker
            db.executemany(
                "INSERT INTO activities (society, agent, role, duty, subject, started_at, ended_at,"
                " note) VALUES ('s001', 'a', 'r', 'd', ?, 1, 2, '')",
                ((f"{number:0100d}",) for number in range(count)),
            )
            db.commit()
        out, back = tmp_path / f"{count}.jsonl.gz", NotebookFolder(tmp_path / f"{count}-back")
        back.create()
        tracemalloc.start()
        transfer.write_export(folder, out)
        transfer.read_export(back, out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# --- bad input -----------------------------------------------------------------------------------


def changed(table, change, which=0):
    """The lines with one row of a table changed by a function, or taken out."""

    def apply(lines):
        places = [i for i, line in enumerate(lines) if json.loads(line).get("table") == table]
        row = json.loads(lines[places[which]])
        new = change(row, lines)
        middle = [] if new is None else [json.dumps(new)]
        return [*lines[: places[which]], *middle, *lines[places[which] + 1 :]]

    return apply


def header(**values):
    return lambda lines: [json.dumps(json.loads(lines[0]) | values), *lines[1:]]


def screening_run(row, lines):
    return row | {"run_id": rows_of("\n".join(lines), "claims")[0]["screening_run"]}


def without(key):
    return lambda row, lines: {name: value for name, value in row.items() if name != key}


def to(**values):
    return lambda row, lines: row | values


TAMPERED = {
    "no header": (lambda lines: lines[1:], "header of an exported memory"),
    "another format": (header(format="other"), "header of an exported memory"),
    "newer schema": (header(schema=schema.SCHEMA_VERSION + 1), "a newer one"),
    "older schema": (header(schema=2), "society memory upgrade"),
    "newer format": (header(version=2), "a newer one"),
    "cut off in a line": (lambda lines: [*lines[:-1], lines[-1][:20]], "may be cut off"),
    "cut off between lines": (lambda lines: lines[:-3], "is incomplete"),
    "a row less": (changed("runs", lambda row, lines: None), "should hold 157 rows of runs"),
    "a row twice": (lambda lines: [*lines, lines[-1]], "refused"),
    "no object": (lambda lines: [*lines[:5], "[1, 2]", *lines[6:]], "line 6"),
    "unknown table": (changed("runs", to(table="run")), "no table 'run'"),
    "no table": (changed("runs", to(table=["runs"])), "no table ['runs']"),
    "unknown column": (changed("claims", to(colour=1)), "no column 'colour'"),
    "missing column": (changed("claims", without("alpha")), "column 'alpha' of claims is missing"),
    "text for a number": (changed("runs", to(score="1.5")), "runs.score cannot be '1.5'"),
    "truth for a number": (changed("seeds", to(seed=True)), "seeds.seed cannot be True"),
    "object for a text": (changed("runs", to(agent={})), "runs.agent cannot be {}"),
    "null": (changed("runs", to(agent=None)), "row of runs is refused"),
    "unknown kind": (changed("runs", to(kind="training")), "row of runs is refused"),
    "missing run": (changed("verdict_runs", to(run_id="r99999")), "missing one of runs"),
    "verdict of its own screening run": (
        changed("verdict_runs", screening_run),
        "never part of its evidence",
    ),
    "another variant": (changed("variants", to(overrides={"depth": 3}), 1), "its fingerprint"),
    "another seed": (changed("runs", to(seed=5)), "a run is what its lease says"),
    "another agent": (changed("runs", to(agent="a77")), "a run is what its lease says"),
    "another author": (changed("claims", to(author="a77")), "screening run of its author"),
    "an unfinished lease": (changed("leases", to(state="released")), "end of its lease"),
    "a champion of nothing": (changed("champions", to(claim_id=None), 1), "needs a claim"),
    "a secret": (changed("meta", to(key="secret", value="00")), "cannot be imported"),
}


def write(tmp_path, lines):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("case", TAMPERED)
def test_what_is_wrong_is_named_and_not_imported(lines, target, tmp_path, case):
    change, words = TAMPERED[case]
    path = write(tmp_path, change(lines))
    with pytest.raises(UsageError) as refused:
        transfer.read_export(target, path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(target.path.glob("*.sqlite*")) == []


@pytest.mark.parametrize("case", ["missing run", "a row less", "text for a number"])
def test_an_empty_ledger_stays_as_it_is(lines, target, tmp_path, case):
    Ledger.open(target.own_ledger, secret_seed=3).close()
    before = whole(target)
    with pytest.raises(UsageError):
        transfer.read_export(target, write(tmp_path, TAMPERED[case][0](lines)))
    assert whole(target) == before
    transfer.read_export(target, write(tmp_path, lines))
    assert exported(target).splitlines() == lines


def test_a_memory_with_something_in_it_is_no_target(lines, target, tmp_path):
    with Ledger.open(target.own_ledger) as ledger:
        ledger.start_society(1, {})
    before = whole(target)
    with pytest.raises(UsageError, match="not empty"):
        transfer.read_export(target, write(tmp_path, lines))
    assert whole(target) == before


@pytest.mark.parametrize("keep", [10, 3000, -20])
def test_a_compressed_file_that_is_cut_off(rich, target, tmp_path, keep):
    path = tmp_path / "all.jsonl.gz"
    transfer.write_export(rich, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"cannot be read|header"):
        transfer.read_export(target, path)
    assert not target.own_ledger.exists()


def test_parquet_folders_are_checked_too(rich, target, tmp_path):
    folder = tmp_path / "all"
    transfer.write_export(rich, folder, Format.PARQUET)
    runs = folder / "runs.parquet"
    kept = runs.read_bytes()

    def refused(words):
        with pytest.raises(UsageError, match=words):
            transfer.read_export(target, folder)
        assert not target.own_ledger.exists()

    runs.write_bytes(b"PAR1")
    refused("no Parquet file")
    runs.unlink()
    refused("runs.parquet")
    table = pyarrow.parquet.read_table(io.BytesIO(kept))
    pyarrow.parquet.write_table(table.slice(1), runs)
    refused("should hold 157 rows of runs")
    pyarrow.parquet.write_table(table.drop_columns(["idea"]), runs)
    refused("column 'idea' of runs is missing")
    agents = pyarrow.array(["a77"] * table.num_rows)
    place = table.column_names.index("agent")
    pyarrow.parquet.write_table(table.set_column(place, "agent", agents), runs)
    refused("a run is what its lease says")
    runs.write_bytes(kept)
    (folder / "colours.parquet").write_bytes(kept)
    refused("no table 'colours'")
    (folder / "colours.parquet").unlink()
    (folder / "memory.json").rename(folder / "other.json")
    refused("memory.json is missing")
    (folder / "other.json").rename(folder / "memory.json")
    transfer.read_export(target, folder)
    assert exported(target) == exported(rich)


def test_every_rule_is_either_checked_again_or_about_the_moment():
    names = {rule.name for rule in transfer.RULES}
    assert set(transfer._LASTING_RULES) <= names


def test_exports_appear_whole_or_not_at_all(rich, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="exists already"):
        transfer.write_export(rich, tmp_path / "full", Format.PARQUET)
    with pytest.raises(UsageError, match="Cannot write"):
        transfer.write_export(rich, tmp_path / "no" / "folder.jsonl")
    kept = tmp_path / "kept.jsonl"
    kept.write_text("before")

    def broken(value):
        raise RuntimeError("stopped")

    monkeypatch.setattr(exports, "_spoken", broken)
    with pytest.raises(RuntimeError):
        transfer.write_export(rich, kept)
    assert kept.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "kept.jsonl"]
    with pytest.raises(NotANotebook):
        transfer.write_export(NotebookFolder(tmp_path / "none"), kept)


# --- the commands --------------------------------------------------------------------------------


def test_the_commands_take_a_memory_elsewhere(rich, tmp_path, cli, lines):
    for name, *options in (("a.jsonl",), ("a.jsonl.gz",), ("a", "--format", "parquet")):
        out, lab = tmp_path / name, tmp_path / f"{name}-lab"
        code, words, err = cli("memory", "export", "--out", out, *options, "--lab", rich.path)
        assert (code, words, err) == (0, f"{len(lines) - 1} records written to {out}\n", "")
        code, words, err = cli("memory", "import", out, "--lab", lab)
        assert (code, err) == (0, "")
        assert words.startswith(f"{len(lines) - 1} records imported")
        assert cli("memory", "export", "--lab", lab)[1].splitlines() == lines
        again = cli("memory", "import", out, "--lab", lab)
        assert again[0] == 2
        assert "not empty" in again[2]
    with gzip.open(tmp_path / "a.jsonl.gz") as packed:
        assert packed.read().decode().splitlines() == lines


def test_what_the_commands_refuse(rich, tmp_path, cli, lines):
    code, _, err = cli("memory", "export", "--format", "parquets", "--lab", rich.path)
    assert (code, "Did you mean 'parquet'?" in err) == (2, True)
    code, _, err = cli("memory", "export", "--format", "parquet", "--lab", rich.path)
    assert (code, "--out" in err) == (2, True)
    code, _, err = cli("memory", "import", tmp_path / "none.jsonl", "--lab", tmp_path / "new")
    assert (code, "none.jsonl cannot be read" in err) == (2, True)
    (tmp_path / "odd").write_bytes(lzma.compress(b"x"))
    code, _, err = cli("memory", "import", tmp_path / "odd", "--lab", tmp_path / "new")
    assert (code, "cannot be read" in err) == (2, True)
    bad = write(tmp_path, lines[1:])
    code, _, err = cli("memory", "import", bad, "--lab", tmp_path / "new")
    assert (code, "header" in err) == (2, True)
    assert not (tmp_path / "new").exists()
    folder = NotebookFolder(tmp_path / "used").create()
    lock = FileLock(folder.owner_lock)
    assert lock.acquire()
    try:
        code, _, err = cli("memory", "import", write(tmp_path, lines), "--lab", folder.path)
    finally:
        lock.release()
    assert (code, "in use by process" in err) == (1, True)


def test_the_tables_of_an_export_are_those_of_the_schema():
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection:
        schema.create_tables(connection)
        names = sqlalchemy.inspect(connection).get_table_names()
    engine.dispose()
    assert set(names) == set(exports.TABLES) | {"tallies"}
