"""The benchmark of the memory at a small size: a lawful notebook, and a table with the goals."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from society.memory.ledger import Ledger
from society.records import Decision, RunKind

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_memory"] = module
    spec.loader.exec_module(module)
    return module


def test_the_notebook_has_the_size_that_was_asked_for(benchmark, tmp_path, capsys):
    for _ in range(2):
        benchmark.prepare(tmp_path / "lab", None, 400, 100)
    assert capsys.readouterr().out.count("Built 400 runs") == 1
    with Ledger.open(tmp_path / "lab" / "ledger.sqlite", read_only=True) as ledger:
        [scope] = ledger.scopes()
        counts, posted = ledger.counts(scope), ledger.posted(0, 10_000)
        assert sum(counts.runs.values()) == len(ledger.runs()) == 400
        assert len([line for line in posted if line.kind != "run"]) >= 100
        assert counts.verdicts[Decision.CONFIRMED] == counts.champions - 1 > 0
        assert counts.claims_open > 0
        assert counts.runs[RunKind.REPRODUCTION] == counts.champions - 1


def test_too_few_runs_for_the_prose_are_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="at least"):
        benchmark.prepare(tmp_path / "lab", None, 50, 400)


def test_the_table_names_every_goal(tmp_path):
    command = [sys.executable, SCRIPT, "--runs", "300", "--prose", "60", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--folder", tmp_path / "lab", "--remove"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.endswith(("met", "MISSED"))]
    for what in ("status", "survey", "reindex", "recall,", "recall with", "memory of the owner "):
        assert any(line.startswith(what) for line in told), what
    assert not (tmp_path / "lab").exists()


def test_a_goal_is_met_or_missed_in_the_right_direction(benchmark):
    assert str(benchmark.Figure("a", 10, "ms", 20)).endswith("< 20 met")
    assert str(benchmark.Figure("a", 30, "ms", 20)).endswith("< 20 MISSED")
    assert str(benchmark.Figure("a", 30, "per s", 20, True)).endswith("> 20 met")
    assert str(benchmark.Figure("a", 30, "ms")).endswith("ms")
