"""Societies whose researchers change code, on a task of milliseconds, and what they do wrong."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import codetask
import pytest
from scripted_endpoint import ScriptedEndpoint, answers, hang

from society.experiments import patches
from society.experiments.sandbox import Level, best
from society.memory.ledger import Ledger
from society.records import Outcome, RefusalReason

HERE = Path(__file__).parent
QUICK = ("--task", "codetask:CodeTask", "--profile", "test", "--agents", "2", "--slots", "2",
         "--recall", "off", "--seed", "4")  # fmt: skip
confined = pytest.mark.skipif(
    best().rank < Level.FILTERS.rank, reason="this machine has no sandbox for foreign code"
)

FASTER = ("vector + np.float32(rate)", "vector + np.float32(2 * rate)")
NOTHING = ("np.float32(rate) *", "np.float32(rate + 0) *")
LESS = ("def run(report):\n    \"\"\"The last word of the training on its report.\"\"\"\n"
        "    return report\n", "run = lambda report: report\n")  # fmt: skip
RAISES = ("import numpy as np\n", "import numpy as np\n\nFIRST = np.zeros(2)[5]\n")
NOWHERE = ("def stride(vector):", "def stride(vector, far):")


def idea(*edits, file="pull.py", **changes):
    plain = {
        "idea": "Another pull", "rationale": "It may help", "expected_gain": 2.0, "overrides": [],
        "edits": [{"file": file, "search": old, "replace": new} for old, new in edits],
        "simplification": False, "despite": "", "hypotheses": [],
    }  # fmt: skip
    return {**plain, **changes}


class Script:
    """A model that gives the first agent these ideas, one after the other.

    Otherwise it varies the rate, and it is in favour of everything.
    """

    def __init__(self, *ideas):
        self.ideas, self.count = list(ideas), itertools.count()

    def __call__(self, asked):
        if asked.purpose == "propose":
            if self.ideas and asked.agent == "a01":
                return self.ideas.pop(0)
            rate = 0.02 + 0.01 * (next(self.count) % 90)
            return idea(overrides=[{"name": "rate", "value": f"{rate:.3f}"}])
        if asked.purpose == "review":
            return {"verdict": "run", "reasons": "Worth a run.", "expected_gain": 1.0}
        return {"insights": []} if asked.purpose == "explain" else {"paragraphs": []}


def proposals(server):
    return [one for one in server.asked if one.purpose == "propose"]


@pytest.fixture(scope="module")
def cli():
    def run(*arguments, **more):
        return subprocess.run(
            [sys.executable, "-m", "society", *map(str, arguments)], capture_output=True, text=True,
            timeout=110, check=False, env={**os.environ, "PYTHONPATH": str(HERE)}, **more,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def worked(tmp_path_factory, cli):
    """A finished society: its folder, what was asked of its model, the run with faster code."""
    lab = tmp_path_factory.mktemp("code") / "lab"
    script = Script(idea(FASTER), *[idea(NOWHERE)] * 3, *[idea(RAISES)] * 3, *[idea(NOTHING)] * 3,
                    idea(LESS, simplification=True))  # fmt: skip
    with ScriptedEndpoint(answers(script)) as server:
        done = cli("run", *QUICK, "--runs", 50, "--brain", "openai", "--base-url",
                   server.url, "--model", "scripted", "--lab", lab)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Ledger.open(lab, read_only=True) as ledger:
        faster = codetask.patched(FASTER)
        run = next(one for one in ledger.runs() if one.variant == faster)
        return lab, server, run


@confined
def test_a_code_change_is_run_kept_shown_repeated_and_exported(worked, cli, tmp_path):
    lab, _, run = worked
    assert run.outcome is Outcome.COMPLETED
    out = tmp_path / "source"
    kept = cli("memory", "source", run.id, "--out", out, "--lab", lab)
    print(kept, list(out.rglob("*")))
    shown = cli("memory", "show", run.id, "--lab", lab)
    print(shown)
    again = cli("rerun", run.id, "--lab", lab)
    print(again)
    git = cli("export", "--git", tmp_path / "git", "--lab", lab)
    print(git)
    with Ledger.open(lab, read_only=True) as ledger:
        for r in ledger.refusals():
            print(r)
        for i in ledger.insights(ledger.scopes()[0]): print(i)
        for r in ledger.runs(): print(r.id, r.kind, r.variant.describe(), r.score, r.outcome)
    assert 0
