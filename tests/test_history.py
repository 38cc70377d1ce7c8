"""Results that people bring along: which files are understood, and what becomes of the rows."""

import pytest

from society.cli import main
from society.errors import UsageError
from society.memory import NotebookFolder
from society.memory.history import ELSEWHERE, bring, parse_results, read_results
from society.memory.ledger import Ledger
from society.records import NewPrior, SocietyState

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
FILE = (
    f"{HEADER}\n"
    "a1b2c3d\t0.997900\t44.0\tkeep\tbaseline\n"
    "b2c3d4e\t0.993200\t44.2\tkeep\tincrease LR to 0.04\n"
    "c3d4e5f\t1.005000\t44.0\tdiscard\tswitch to GeLU activation\n"
    "d4e5f6a\t0.000000\t0.0\tcrash\tdouble model width (OOM)\n"
)


@pytest.fixture
def cli(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.tsv"
    path.write_text(FILE)
    return path


def parsed(text):
    return list(parse_results(text, "night", "results.tsv"))


# --- reading -------------------------------------------------------------------------------------


def test_each_line_is_a_prior(results):
    assert read_results(results, "night") == (
        NewPrior("night", "a1b2c3d", 0.9979, "keep", "baseline (memory_gb 44.0)"),
        NewPrior("night", "b2c3d4e", 0.9932, "keep", "increase LR to 0.04 (memory_gb 44.2)"),
        NewPrior(
            "night", "c3d4e5f", 1.005, "discard", "switch to GeLU activation (memory_gb 44.0)"
        ),
        NewPrior("night", "d4e5f6a", None, "crash", "double model width (OOM) (memory_gb 0.0)"),
    )


@pytest.mark.parametrize(
    "same",
    [
        FILE.replace("\n", "\r\n"),
        "\ufeff" + FILE,
        "# by hand\n\n" + FILE.replace("b2c3d4e", "# a note\n\nb2c3d4e"),
        FILE.replace("keep", " KEEP ").replace("val_bpb", " Val_BPB "),
        FILE.rstrip("\n"),
    ],
    ids=["CRLF", "byte order mark", "comments", "spaces and case", "no end of line"],
)
def test_small_differences_between_files_do_not_matter(tmp_path, results, same):
    other = tmp_path / "other.tsv"
    other.write_bytes(same.encode())
    assert read_results(other, "night") == read_results(results, "night")


def test_columns_may_be_missing_or_new():
    (row,) = parsed("description\nwider heads")
    assert row == NewPrior("night", "line 2", None, "unknown", "wider heads")
    (row,) = parsed("commit\tscore\na1\t1.5")
    assert row == NewPrior("night", "a1", 1.5, "unknown", "no description")
    (row,) = parsed("status\tcommit\tdepth\tdescription\nkeep\ta1\t8\tdeeper")
    assert row == NewPrior("night", "a1", None, "keep", "deeper (depth 8)")
    (row,) = parsed(f"{HEADER}\na1\t0.9\t1\tkeep")
    assert (row.score, row.description) == (0.9, "no description (memory_gb 1)")
    (row,) = parsed(f"{HEADER}\na1\t0.9\t\tkeep\twith\ttabs in it")
    assert row.description == "with tabs in it"


def test_no_number_is_no_score():
    rows = parsed(
        f"{HEADER}\na\tnan\t\tkeep\tx\nb\tinf\t\tkeep\tx\nc\t\t\tkeep\tx\nd\t0.0\t\tkeep\tx"
    )
    assert [row.score for row in rows] == [None, None, None, 0.0]


def test_the_same_experiment_twice_is_two_results():
    rows = parsed(f"{HEADER}\na\t1.0\t\tkeep\tx\na\t1.1\t\tkeep\tx\na\t1.2\t\tkeep\ty\n")
    assert [(row.label, row.score) for row in rows] == [("a", 1.0), ("a #2", 1.1), ("a", 1.2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected a header"),
        ("a1b2c3d\t0.99\t44.0\tkeep\tbaseline\n", "line 1: expected a header"),
        ("commit,val_bpb,description\n", "line 1: expected a header"),
        ("commit\tcommit\n", "line 1: expected a header"),
        (f"{HEADER}\n# x\na\tgood\t\tkeep\tx\n", "line 3: val_bpb is 'good', expected a number"),
        ("commit\tstatus\na\tkeep\tmore\n", "line 2: 3 cells for 2 columns"),
    ],
)
def test_a_line_that_is_wrong_is_named(text, words):
    with pytest.raises(UsageError, match=words):
        parsed(text)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "latin.tsv").write_bytes(f"{HEADER}\na\t1\t\tkeep\tgr\xf6\xdfer".encode("latin-1"))
    for name in ("latin.tsv", "none.tsv"):
        with pytest.raises(UsageError, match=f"{name} cannot be read"):
            read_results(tmp_path / name, "night")


# --- writing -------------------------------------------------------------------------------------


def test_known_rows_are_skipped(results, tmp_path):
    settings = {"task": "synthetic", "profile": "quick"}
    priors = read_results(results, "night")
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        first = bring(ledger, priors[:3], task_key="synthetic/quick", settings=settings)
        second = bring(ledger, priors, task_key="synthetic/quick", settings=settings)
        third = bring(ledger, priors, task_key="synthetic/quick", settings=settings)
        other = bring(
            ledger, read_results(results, "other"), task_key="synthetic/quick", settings=settings
        )
        found = ledger.priors()
        records = ledger.societies()
        assert [(scope.task, scope.tier) for scope in ledger.scopes()] == [
            ("synthetic/quick", ELSEWHERE)
        ]
    assert [(one.added, one.known) for one in (first, second, third, other)] == [
        (3, 0), (1, 3), (0, 4), (4, 0),
    ]  # fmt: skip
    assert third.society is None
    assert [one.label for one in found[:4]] == [one.label for one in priors]
    assert [one.source for one in found] == ["night"] * 4 + ["other"] * 4
    assert [record.id for record in records] == [first.society, second.society, other.society]
    assert all(record.is_study for record in records)
    assert {record.state for record in records} == {SocietyState.FINISHED}


def test_an_import_that_fails_leaves_no_rows(results, tmp_path):
    priors = read_results(results, "night")
    broken = [*priors[:2], NewPrior("night", None, 1.0, "keep", "no label")]
    settings = {"task": "synthetic", "profile": "quick"}
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(Exception, match="refused"):
            bring(ledger, broken, task_key="synthetic/quick", settings=settings)
        assert ledger.priors() == ()
        assert bring(ledger, priors, task_key="synthetic/quick", settings=settings).added == 4


def test_the_command_says_what_they_are_good_for(results, tmp_path, cli):
    lab = tmp_path / "lab"
    order = ("memory", "import", results, "--task", "synthetic", "--lab", lab)
    code, out, err = cli(*order)
    assert (code, err) == (0, "")
    assert out.startswith("4 results from results.tsv added")
    assert "compared with no run" in out
    assert "evidence for nothing" in out
    assert cli(*order)[1].startswith(f"0 results from results.tsv added to {lab}, 4 were known")
    assert cli(*order, "--source", "mine")[1].startswith("4 results from mine added")


def test_imported_results_are_found_and_shown(results, tmp_path, cli):
    lab = tmp_path / "lab"
    cli("memory", "import", results, "--task", "synthetic", "--lab", lab)
    code, out, _ = cli("memory", "search", "GeLU activation", "--k", 1, "--lab", lab)
    assert code == 0
    assert "GeLU" in out
    code, out, _ = cli("memory", "show", "p00003", "--lab", lab)
    assert code == 0
    assert "GeLU" in out


def test_other_commands_pass_over_imported_results(results, tmp_path, cli, society):
    lab = tmp_path / "lab"
    cli("memory", "import", results, "--task", "synthetic", "--lab", lab)
    for command in (["status"], ["report"], ["audit"], ["run", "--resume"]):
        code, _, err = cli(*command, "--lab", lab)
        assert code == 2, command
        assert "ociety" in err
    done = society("run", "--task", "synthetic", "--runs", 6, "--slots", 2, "--lab", lab)
    assert done.code == 0, done.err
    assert "0.9979" not in done.out
    with Ledger.open(NotebookFolder(lab).ledger, read_only=True) as ledger:
        assert len(ledger.priors()) == 4
        (elsewhere,) = [scope for scope in ledger.scopes() if scope.tier == ELSEWHERE]
        assert ledger.runs(elsewhere) == ()
        assert ledger.champions(elsewhere) == ()
    assert cli("status", "--lab", lab)[0] == 0


def test_bad_results_leave_no_notebook(tmp_path, cli):
    bad = tmp_path / "results.tsv"
    bad.write_text(f"{HEADER}\na\tgood\t\tkeep\tx\n")
    code, _, err = cli("memory", "import", bad, "--task", "synthetic", "--lab", tmp_path / "lab")
    assert (code, "line 2" in err) == (2, True)
    assert not (tmp_path / "lab").exists()
    code, _, err = cli("memory", "import", bad, "--task", "sinthetic", "--lab", tmp_path / "lab")
    assert (code, "Did you mean 'synthetic'?" in err) == (2, True)
