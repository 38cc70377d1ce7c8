"""A recorded run can be made again from the notebook alone, and a difference is explained."""

import json
import shutil
import sqlite3
from dataclasses import replace

import pytest

from society.memory.ledger import Ledger
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Environment,
    Measurement,
    Outcome,
    Run,
    RunKind,
    Split,
    Variant,
)
from society.rerun import Rerun

NOW = Environment("cpu", "A", 1, "3.11", {"torch": "1"}, code="abc")
RUN = Run(
    "r1", "s001", "a1", RunKind.SCREENING, Variant("t"), 7, Split.VALIDATION,
    Budget(BudgetKind.STEPS, 10), Outcome.COMPLETED, 1.5, Cost(), NOW, "data", "", 0.0, 1.0,
)  # fmt: skip
SAME = Measurement(Outcome.COMPLETED, 1.5, Cost(), data_hash="data")
OTHER = replace(SAME, score=1.5000000001)


@pytest.mark.parametrize(
    ("run", "measured", "environment", "reproduced", "words"),
    [
        (RUN, SAME, NOW, True, "the same bits"),
        (RUN, OTHER, NOW, False, "NOT REPRODUCED"),
        (RUN, SAME, replace(NOW, code="x"), True, "the same bits"),
        (RUN, OTHER, replace(NOW, code="x", python="3.12"), None, "python, code"),
        (RUN, replace(OTHER, data_hash="new"), NOW, None, "changed: data"),
        (replace(RUN, budget=Budget(BudgetKind.SECONDS, 9)), OTHER, NOW, None, "seconds"),
        (RUN, Measurement(Outcome.CRASHED, None, Cost(), data_hash="data"), NOW, None, "accident"),
        (RUN, Measurement(Outcome.DIVERGED, None, Cost(), data_hash="data"), NOW, False, "NOT"),
    ],
)
def test_a_comparison_says_what_it_means(run, measured, environment, reproduced, words):
    found = Rerun(run, measured, environment)
    assert found.reproduced is reproduced
    assert words in found.verdict


def test_every_kind_of_run_comes_again(society, small_lab):
    with Ledger.open(small_lab, read_only=True) as ledger:
        runs = {run.kind: run for run in ledger.runs() if run.outcome is Outcome.COMPLETED}
    assert len(runs) >= 3
    for run in runs.values():
        done = society("rerun", run.id, "--lab", small_lab, "--json")
        assert done.code == 0, done.err
        told = json.loads(done.out)
        assert (told["same"], told["reproduced"]) == (True, True)
        assert told["measured"]["score"] == run.score


def test_other_bits_in_the_same_environment_are_an_alarm(society, small_lab, tmp_path):
    lab = tmp_path / "lab"
    shutil.copytree(small_lab, lab)
    with sqlite3.connect(lab / "ledger.sqlite") as database:
        database.execute("DROP TRIGGER runs_no_update")
        changed = "UPDATE runs SET score = score + 1e-9 WHERE score IS NOT NULL"
        database.execute(changed)
        (run,) = database.execute("SELECT id FROM runs WHERE score IS NOT NULL LIMIT 1").fetchone()
    done = society("rerun", run, "--lab", lab)
    assert done.code == 1
    assert "NOT REPRODUCED" in done.out


def test_an_unknown_run_or_folder_is_said(society, small_lab, tmp_path):
    done = society("rerun", "r99999", "--lab", small_lab)
    assert done.code == 1
    assert "No finished run 'r99999'" in done.err
    done = society("rerun", "r00001", "--lab", tmp_path)
    assert done.code == 2
