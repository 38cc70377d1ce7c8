"""A real, short society on the reference task: the trainer, the gate and the report together."""

import json

import pytest

from society.memory.ledger import Ledger
from society.records import Outcome, RunKind, Split


@pytest.mark.slow
def test_a_short_society_on_the_reference_task(society, tmp_path):
    lab = tmp_path / "lab"
    done = society("run", "--agents", 4, "--runs", 16, "--seed", 3, "--lab", lab)
    assert done.code == 0, done.err
    assert done.out.strip().splitlines()[-1].endswith("report.html")
    with Ledger.open(lab, read_only=True) as ledger:
        runs = ledger.runs()
        scope = ledger.scopes()[0]
        noise = ledger.noise(scope)
    assert {run.outcome for run in runs} == {Outcome.COMPLETED}
    assert len({run.data_hash for run in runs}) == 1
    assert noise.seeds >= 8
    assert 0.003 < noise.sd < 0.03
    pool = [run for run in runs if run.kind is RunKind.CALIBRATION]
    assert all(run.split is Split.HOLDOUT for run in pool)
    assert all(1.70 < run.score < 1.82 for run in pool)
    again = society("audit", "--lab", lab, "--seeds", 4, "--json")
    if again.code == 0:
        assert json.loads(again.out)["reported"]
    else:
        assert "nothing has been accepted" in again.err.lower()
