"""A recorded run can be made again from the notebook alone, and a difference is explained."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from society.experiments.provenance import Source, profile_digest, profile_text
from society.experiments.task import load_task
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
    Scope,
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


# ---------------------------------------------------------------------- from the ledger alone

PROFILE = """
task: {task}
name: mine
budget: {{kind: steps, amount: {steps}}}
limits: {{timeout_s: 60, mem_bytes: 2_147_483_648}}
recipe: {recipe}
"""


def recorded_run(lab, kind=RunKind.CALIBRATION):
    with Ledger.open(lab, read_only=True) as ledger:
        return next(run for run in ledger.runs() if run.kind is kind)


@pytest.mark.parametrize(
    ("task", "recipe", "changed"),
    [
        ("synthetic", "{momentum: 0.9}", "{momentum: 0.6}"),
        pytest.param("pretrain", "{depth: 2}", "{depth: 3}", marks=pytest.mark.slow),
    ],
)
def test_a_profile_that_was_changed_or_moved_is_not_needed(
    society, tmp_path, task, recipe, changed
):
    lab, file = tmp_path / "lab", tmp_path / "mine.yaml"
    file.write_text(PROFILE.format(task=task, steps=20, recipe=recipe))
    done = society(
        "run", "--task", task, "--profile", file, "--runs", 2, "--agents", 2, "--lab", lab
    )
    assert done.code == 0, done.err
    run = recorded_run(lab)
    told = json.loads(society("rerun", run.id, "--lab", lab, "--json").out)
    assert (told["same"], told["profile"], told["differences"]) == (True, "", [])
    file.write_text(PROFILE.format(task=task, steps=10, recipe=changed))
    told = json.loads(society("rerun", run.id, "--lab", lab, "--json").out)
    assert (told["same"], told["differences"]) == (True, [])
    assert "mine.yaml has been changed" in told["profile"]
    file.unlink()
    done = society("rerun", run.id, "--lab", lab)
    assert done.code == 0, done.err
    assert "the same bits" in done.out
    assert "the recorded one was used, because" in done.out


TASK = """
from society.experiments.synthetic import Synthetic


class Mine(Synthetic):
    code = ("society.experiments.synthetic", "task_of_mine")

    def score(self, *arguments):
        return super().score(*arguments) + {offset}
"""


def test_the_recorded_code_can_be_used_and_written_out(society, tmp_path):
    lab, module = tmp_path / "lab", tmp_path / "task_of_mine.py"
    here = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    module.write_text(TASK.format(offset=0.25))
    profile = ("--task", "task_of_mine:Mine", "--profile", "quick")
    done = society("run", *profile, "--runs", 2, "--agents", 2, "--lab", lab, **here)
    assert done.code == 0, done.err
    run = recorded_run(lab)
    module.write_text(TASK.format(offset=0.75))
    done = society("rerun", run.id, "--lab", lab, **here)
    assert done.code == 0, done.err
    assert "what they depend on has changed: code" in done.out
    assert f"code: {run.environment.code} then, " in done.out
    assert "--recorded-code" in done.out
    told = json.loads(
        society("rerun", run.id, "--recorded-code", "--lab", lab, "--json", **here).out
    )
    assert (told["same"], told["differences"]) == (True, [])
    out = tmp_path / "out"
    done = society("memory", "source", run.id, "--out", out, "--lab", lab)
    assert done.code == 0, done.err
    assert (out / "code" / "task_of_mine.py").read_text() == TASK.format(offset=0.25)
    assert (out / "code/society/experiments/synthetic.py").is_file()
    assert "momentum" in (out / "profile.yaml").read_text()
    again = society("memory", "source", run.environment.code, "--out", out, "--lab", lab)
    assert again.code == 2
    assert "holds something already" in again.err


def test_recorded_code_takes_the_place_of_installed_packages(tmp_path):
    source = Source.installed(["society.experiments.synthetic", "society.model"])
    assert Source.unpack(source.pack()) == source
    assert len(source.pack()) < 300_000
    files = dict(source.modules["society.experiments.synthetic"])
    files["synthetic.py"] = files["synthetic.py"].replace("FLOOR = 1.6", "FLOOR = 9.5")
    model = {"__init__.py": "", "only.py": "here = True\n"}
    old = Source({"society.experiments.synthetic": files, "society.model": model})
    old.install(tmp_path)
    found = subprocess.run(
        [
            sys.executable, "-P", "-c",
            "import society.model.only\n"
            "from society.experiments import provenance, space\n"
            "from importlib import resources\n"
            "names = ('society.experiments.synthetic', 'society.model')\n"
            "print(provenance.Source.installed(names).digest)\n"
            "print((resources.files('society.configs') / 'synthetic-quick.yaml').is_file())\n",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout.split() == [old.digest, "True"], found.stderr


@pytest.mark.parametrize(("task", "profile"), [("pretrain", "h100"), ("synthetic", "quick")])
def test_a_recorded_profile_says_all_that_its_file_said(tmp_path, task, profile):
    said = load_task(task, profile)
    file = tmp_path / "recorded.yaml"
    file.write_text(profile_text(said))
    again = load_task(task, str(file))
    assert (again.key, again.budget, again.limits) == (said.key, said.budget, said.limits)
    assert (again.baseline, again.spans, again.options) == (
        said.baseline,
        said.spans,
        said.options,
    )
    assert profile_digest(again) == profile_digest(said)


def test_what_differs_is_said_with_both_values():
    now = replace(NOW, python="3.12", packages={"torch": "2", "numpy": "2"}, config="new")
    found = Rerun(replace(RUN, environment=replace(NOW, config="old")), OTHER, now)
    assert found.details == (
        "python: 3.11 then, 3.12 now",
        "package numpy: none then, 2 now",
        "package torch: 1 then, 2 now",
        "config: old then, new now",
    )
    assert Rerun(RUN, OTHER, replace(NOW, config="new")).reproduced is False  # it was not known


def test_a_run_without_kept_source_is_refused_clearly(society, tmp_path):
    lab = tmp_path / "lab"
    lab.mkdir()
    with Ledger.open(lab) as ledger:
        record = ledger.start_society(1, {"task": "synthetic", "profile": "quick", "device": "cpu"})
        scope = Scope("synthetic/quick", NOW.tier)
        lease = ledger.lease_screening(
            scope, record.id, holder="a01", variant=Variant("synthetic/quick"), ttl_s=60
        )
        run = ledger.finish(lease, SAME, NOW, Budget(BudgetKind.STEPS, 100))
    done = society("rerun", run.id, "--recorded-code", "--lab", lab)
    assert (done.code, "was not kept" in done.err) == (2, True)
    done = society("memory", "source", run.id, "--out", tmp_path / "out", "--lab", lab)
    assert (done.code, "were kept" in done.err) == (2, True)
