"""The command: what it prints, what it refuses, and with which exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import typer.main

from society.cli import DEFAULT_MINUTES, app, main
from society.memory import NotebookFolder
from society.memory.folder import FileLock
from society.settings import Settings

QUICK = ("--task", "synthetic", "--runs", "12", "--agents", "4", "--slots", "2", "--seed", "1")


@pytest.fixture
def cli(capsys):
    """Call the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def lab_copy(small_lab, tmp_path):
    """A notebook that a test may change."""
    return shutil.copytree(small_lab, tmp_path / "copy")


def refused(result, code, *words):
    """One clear line on stderr, nothing else, and the right exit code."""
    found, _, err = result
    assert found == code, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def commands(group=None, path=()):
    """(path, command) of every command of the tree."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


# ------------------------------------------------------------------------- help


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_teaches_with_an_example(cli, path):
    code, out, _ = cli(*path, "--help")
    assert code == 0
    assert f"Example: society {' '.join(path)}" in out


def test_the_help_states_the_real_defaults():
    run = dict(commands())[("run",)]
    for option in run.params:
        if option.name in Settings.model_fields and option.show_default not in (True, False, None):
            default = Settings.model_fields[option.name].default
            shown = "one per core" if option.name == "slots" else str(default)
            assert option.show_default == shown, option.name
    assert f"{DEFAULT_MINUTES} minutes" in run.help


def test_version(cli):
    from society import __version__

    assert cli("--version")[:2] == (0, f"society {__version__}\n")


# ------------------------------------------------------------------------- a finished society


def test_run_says_which_brain_runs_and_ends_with_the_report(small_lab):
    out = (small_lab / "stdout.txt").read_text()
    assert out.startswith("Brain: search (")
    assert "noise floor: sd" in out
    assert out.splitlines()[-1] == f"Report: {small_lab / 'report' / 'report.html'}"


@pytest.mark.parametrize(("runs", "tried"), [(18, 1), (19, 2)])
def test_runs_that_leave_none_for_an_idea_are_warned_of(runs, tried, society, tmp_path):
    done = society("run", *QUICK, "--runs", runs, "--plain", "--lab", tmp_path)
    assert ("too few runs" in done.out + done.err) is (tried == 1)
    found = json.loads(society("status", "--json", "--lab", tmp_path).out)
    assert found["runs"]["screening"] == tried  # the champion's own is one of them


def test_status(cli, small_lab):
    code, out, _ = cli("status", "--lab", small_lab)
    assert code == 0
    assert "s001 (finished), synthetic/quick" in out
    assert "noise floor" in out


def test_status_as_json(cli, small_lab):
    code, out, _ = cli("status", "--json", "--lab", small_lab)
    found = json.loads(out)
    assert code == 0
    assert found["state"] == "finished"
    assert sum(found["runs"].values()) == 40
    assert found["champion"]["mean"] > 0
    assert found["noise"]["seeds"] >= 8


def test_report_is_written_again(cli, lab_copy):
    (lab_copy / "report" / "report.html").unlink()
    code, out, _ = cli("report", "--lab", lab_copy)
    assert code == 0
    assert out.splitlines()[-1] == f"Report: {lab_copy / 'report' / 'report.html'}"
    assert (lab_copy / "report" / "report.html").is_file()


def test_report_as_json(cli, lab_copy):
    code, out, _ = cli("report", "--json", "--lab", lab_copy)
    assert code == 0
    assert json.loads(out)["headline"]["runs"] == 40


def test_audit(cli, lab_copy):
    code, out, _ = cli("audit", "--seeds", 4, "--slots", 2, "--json", "--lab", lab_copy)
    found = json.loads(out)
    assert code == 0
    assert found["seeds"] == 4
    assert found["audited"]["seeds"] == 4
    assert isinstance(found["confirmed"], bool)
    code, out, _ = cli("audit", "--seeds", 4, "--slots", 2, "--lab", lab_copy)
    assert code == 0
    assert "4 fresh seeds" in out


# ------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", [None, "run"])
def test_memory_search(cli, lab_copy, kind):
    choice = () if kind is None else ("--kind", kind)
    code, out, _ = cli("memory", "search", "learning rate", "--k", 3, "--json", *choice,
                       "--lab", lab_copy)  # fmt: skip
    hits = json.loads(out)
    assert code == 0
    assert len(hits) == 3
    assert all(hit["kind"] == (kind or hit["kind"]) for hit in hits)
    assert hits == sorted(hits, key=lambda hit: -hit["similarity"])


def test_memory_search_works_beside_the_owner_of_the_index(cli, lab_copy):
    lock = FileLock(NotebookFolder(lab_copy).recall_lock)
    assert lock.acquire()
    try:
        code, out, err = cli("memory", "search", "depth", "--lab", lab_copy)
    finally:
        lock.release()
    assert code == 0
    assert "run r" in out
    assert "note: " in err


def test_memory_survives_a_corrupted_index_and_rebuilds_it(society, lab_copy):
    (lab_copy / "recall" / "chroma.sqlite3").write_bytes(b"not a database" * 100)
    found = society("memory", "search", "depth", "--lab", lab_copy)
    assert found.code == 0, found.err
    assert "reindex" in found.err
    rebuilt = society("memory", "reindex", "--lab", lab_copy)
    assert rebuilt.code == 0, rebuilt.err
    assert "passages indexed" in rebuilt.out
    again = society("memory", "search", "depth", "--lab", lab_copy)
    assert (again.code, again.err) == (0, "")


def test_memory_show_links_a_run_to_everything(cli, small_lab):
    code, out, _ = cli("memory", "show", "r00001", "--json", "--lab", small_lab)
    found = json.loads(out)
    assert code == 0
    assert found["kind"] == "run"
    assert found["record"]["id"] == "r00001"
    assert cli("memory", "show", "s001", "--lab", small_lab)[1].startswith("society s001\n")


def test_memory_show_of_every_exported_record(cli, small_lab):
    _, out, _ = cli("memory", "export", "--lab", small_lab)
    header, *records = [json.loads(line) for line in out.splitlines()]
    assert header["format"] == "society memory"
    tables = {record["table"] for record in records}
    assert {"societies", "runs", "champions", "noise", "activities"} <= tables
    kinds = {"runs": "run", "claims": "claim", "insights": "insight", "societies": "society"}
    last = {record["table"]: record["id"] for record in records if record["table"] in kinds}
    for table, identity in last.items():
        code, out, _ = cli("memory", "show", identity, "--lab", small_lab)
        assert (code, out.splitlines()[0]) == (0, f"{kinds[table]} {identity}")


def test_memory_export_to_a_file(cli, small_lab, tmp_path):
    code, out, _ = cli("memory", "export", "--out", tmp_path / "all.jsonl", "--lab", small_lab)
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert code == 0
    assert out.startswith(f"{len(lines) - 1} records")


def test_unknown_records_and_kinds(cli, small_lab):
    refused(cli("memory", "show", "r99999", "--lab", small_lab), 2, "r99999", "r00040")
    result = cli("memory", "search", "x", "--kind", "runs", "--lab", small_lab)
    refused(result, 2, "Did you mean 'run'")


# ------------------------------------------------------------------------- what there is


def test_roles(cli):
    found = json.loads(cli("roles", "--json")[1])
    assert {"experimenter", "verifier", "statistician", "meta-analyst"} <= {
        role["name"] for role in found
    }
    assert all(role["about"] for role in found)
    assert "verifier" in cli("roles")[1]


def test_tasks(cli):
    assert "pretrain/cpu" in cli("tasks")[1]
    assert {one["task"] for one in json.loads(cli("tasks", "--json")[1])} >= {"pretrain"}


def test_knobs_of_a_task_have_ranges_units_and_sources(cli):
    knobs = json.loads(cli("tasks", "pretrain", "--json")[1])["knobs"]
    assert len(knobs) >= 15
    assert all(knob["range"] and knob["source"] for knob in knobs)
    assert "depth" in cli("tasks", "synthetic")[1]


def test_doctor(cli, small_lab):
    code, out, _ = cli("doctor", "--json", "--lab", small_lab)
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0, out
    assert checks["notebook"]["found"] == "1 societies, 40 runs"
    assert {"python", "torch", "gpu", "chroma", "corpus", "cache"} <= set(checks)


def test_doctor_fails_on_what_cannot_work(cli, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SOCIETY_CACHE", str(blocked / "cache"))
    code, out, _ = cli("doctor", "--lab", blocked / "lab")
    assert code == 1
    failed = [line for line in out.splitlines() if line.startswith("fail")]
    assert len(failed) == 2
    assert all("->" in line for line in failed)


# ------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--role", "simplfier"], ["simplfier", "verifier"]),
        (["--role", "nowhere:Role"], ["nowhere"]),
        (["--roles", "experimenter=3,verifyer=1"], ["verifyer", "Did you mean 'verifier'"]),
        (["--roles", "experimenter=4"], ["verifier"]),
        (["--roles", "experimenter"], ["name=count"]),
        (["--roles", "experimenter=2,verifier=1", "--agents", "9"], ["--agents is 9"]),
        (["--task", "pretrian"], ["Did you mean 'pretrain'"]),
        (["--profile", "h200"], ["h200", "quick"]),
        (["--brain", "serch"], ["Did you mean 'search'"]),
        (["--agents", "1"], ["agents"]),
        (["--minutes", "0"], ["minutes"]),
        (["--device", "tpu"], ["device"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(cli, tmp_path, options, words):
    lab = tmp_path / "lab"
    base = ["--task", "synthetic"] if "--task" not in options else []
    refused(cli("run", *base, *options, "--lab", lab), 2, *words)
    assert not (lab / "ledger.sqlite").exists()


def test_unknown_config_key(cli, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("task: synthetic\nagnets: 4\n")
    refused(cli("run", "--config", config, "--lab", tmp_path / "lab"), 2, "agnets", "mine.yaml")


def test_unknown_knob(cli, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "task: synthetic\nname: mine\nbudget: {kind: steps, amount: 50}\n"
        "limits: {timeout_s: 5, mem_bytes: 100000000}\nrecipe: {depht: 3}\n"
    )
    result = cli("run", "--task", "synthetic", "--profile", profile, "--lab", tmp_path / "lab")
    refused(result, 2, "depht")


@pytest.mark.parametrize("command", ["status", "report", "audit"])
def test_no_notebook_here(cli, tmp_path, command):
    refused(cli(command, "--lab", tmp_path), 2, "No notebook", "--lab")


def test_nothing_to_resume(cli, lab_copy, tmp_path):
    refused(cli("run", "--resume", "--lab", tmp_path / "none"), 2, "No notebook")
    refused(cli("run", "--resume", "--lab", lab_copy), 2, "finished")


def test_a_folder_in_use(cli, lab_copy):
    lock = FileLock(NotebookFolder(lab_copy).owner_lock)
    assert lock.acquire()
    try:
        result = cli("run", *QUICK, "--lab", lab_copy)
        refused(result, 1, f"process {os.getpid()}")
        refused(cli("memory", "reindex", "--lab", lab_copy), 1, "in use")
    finally:
        lock.release()


def test_a_folder_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("")
    result = cli("run", *QUICK, "--lab", tmp_path / "file" / "lab")
    refused(result, 1, "Cannot write")


def test_a_damaged_ledger(cli, lab_copy):
    for file in lab_copy.glob("ledger.sqlite*"):
        file.write_bytes(b"garbage" * 1000)
    refused(cli("status", "--lab", lab_copy), 1, "ledger.sqlite")
    refused(cli("run", *QUICK, "--lab", lab_copy), 1, "ledger.sqlite")


def test_errors_in_a_real_process(society, tmp_path):
    done = society("status", "--lab", tmp_path)
    refused((done.code, done.out, done.err), 2, "No notebook")


# ------------------------------------------------------------------------- stopping, resuming


def test_ctrl_c_drains_and_resume_goes_on(cli, society, tmp_path):
    lab = tmp_path / "lab"
    command = [sys.executable, "-m", "society", "run", *QUICK, "--runs", "5000", "--lab", str(lab)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("noise floor"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert f"--resume --lab {lab}" in rest
    before = json.loads(cli("status", "--json", "--lab", lab)[1])
    assert before["state"] == "stopped"
    made = sum(before["runs"].values())
    resumed = society("run", "--resume", "--runs", made + 20, "--lab", lab)
    assert resumed.code == 0, resumed.err
    assert "Resuming" in resumed.out
    after = json.loads(cli("status", "--json", "--lab", lab)[1])
    assert (after["society"], after["state"]) == (before["society"], "finished")
    assert made < sum(after["runs"].values()) <= made + 20


def test_an_interrupted_folder_is_pointed_out_and_may_be_used(cli, society, lab_copy):
    from society.memory import Ledger
    from society.records import SocietyState

    with Ledger.open(lab_copy) as ledger:
        ledger.set_society_state("s001", SocietyState.RUNNING)
    state = json.loads(cli("status", "--json", "--lab", lab_copy)[1])["state"]
    assert state.startswith("interrupted")
    done = society("run", *QUICK, "--lab", lab_copy)
    assert done.code == 0, done.err
    assert "--resume" in done.out.splitlines()[0]
    assert json.loads(cli("status", "--json", "--lab", lab_copy)[1])["society"] == "s002"


def test_without_a_budget_the_default_is_said(monkeypatch, cli, tmp_path):
    from society import app as composition
    from society.errors import SocietyError

    seen = []

    def stop_there(folder, settings, **_):
        seen.append(settings.minutes)
        raise SocietyError("far enough")

    monkeypatch.setattr(composition, "run_society", stop_there)
    code, out, _ = cli("run", "--task", "synthetic", "--lab", tmp_path / "lab")
    assert code == 1
    assert f"working for {DEFAULT_MINUTES} minutes" in out
    assert seen == [DEFAULT_MINUTES]


def test_the_live_view_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "society", "run", *QUICK, "--lab", str(tmp_path / "lab")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # the other end has been closed
                break
            if not chunk:
                break
            text += chunk
    os.close(ours)
    assert process.returncode == 0, text
    assert b"Claims under test" in text
    assert b"report.html" in text


# ------------------------------------------------------------------------- memory search: filters


def test_memory_search_filters(cli, lab_copy):
    def found(*options):
        code, out, _ = cli("memory", "search", "learning rate", "--k", 200, "--json", *options,
                           "--lab", lab_copy)  # fmt: skip
        assert code == 0
        return {(hit["kind"], hit["ref"]) for hit in json.loads(out)}

    everything = found()
    worse = found("--outcome", "worse", "--knob", "lr")
    assert worse
    assert worse < found("--knob", "lr") < everything
    assert worse == found("--outcome", "worse", "--knob", "lr", "--kind", "run", "--since", "1d")
    assert found("--until", "1d") == set()
    assert found("--since", "2020-01-01", "--until", "2h") == set()
    agents = [found("--agent", f"a0{number}") for number in range(1, 5)]
    assert set.union(*agents) == everything
    assert sum(map(len, agents)) == len(everything)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "rum"), "Did you mean 'run'"),
        (("--knob", "dept"), "Did you mean 'depth'"),
        (("--outcome", "wors"), "Did you mean 'worse'"),
        (("--since", "yesterday"), "--since 'yesterday' is no time"),
    ],
)
def test_memory_search_names_what_it_does_not_know(cli, small_lab, options, words):
    code, _, err = cli("memory", "search", "x", *options, "--lab", small_lab)
    assert code == 2
    assert words in err
