"""Societies whose ideas are code, end to end: a good one is accepted, and no bad one is.

The language model is a scripted server; trainer, sandbox, guard and gate are the real ones.
"""

import json
import subprocess
import sys
from itertools import count

import codefiles
import pytest
from scripted_endpoint import ScriptedEndpoint, answers

from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import Decision, Outcome, RefusalReason

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_500)]
TASK = ("--task", "pretrain")
SHORT = """\
task: pretrain
name: short
budget: {kind: flops, amount: 2.2e+10}  # ten steps
limits: {timeout_s: 12, mem_bytes: 1_000_000_000}
"""


def idea(candidate):
    return {
        "idea": candidate.about[:290], "rationale": candidate.about, "expected_gain": 3.0,
        "overrides": [], "edits": [
            {"file": e.file, "search": e.search, "replace": e.replace} for e in candidate.edits
        ], "simplification": False, "despite": "", "hypotheses": [],
    }  # fmt: skip


def trifle(number):
    """A change of no consequence that nobody has proposed yet."""
    value = {"name": "weight_decay", "value": f"{0.2 - 0.015 * (number % 13):.3f}"}
    return {
        "idea": "Less decay.", "rationale": "It may do no harm.", "expected_gain": 0.1,
        "overrides": [value], "edits": [], "simplification": False, "despite": "Nobody tried.",
        "hypotheses": [],
    }  # fmt: skip


def replay(candidates, *, once=False):
    """Each proposal is the next candidate, over and over; reviews are in favour of everything."""
    turns = count()

    def choose(asked):
        if asked.purpose == "propose":
            turn = next(turns)
            if once and turn >= len(candidates):
                return trifle(turn)
            return idea(candidates[turn % len(candidates)])
        if asked.purpose == "review":
            return {"verdict": "run", "reasons": "Worth a run.", "expected_gain": 1.0}
        if asked.purpose == "explain":
            return {"insights": []}
        return {"paragraphs": []}

    return answers(choose)


def run(lab, url, *options):
    command = [sys.executable, "-m", "society", "run", "--lab", str(lab), "--brain", "openai",
               "--base-url", url, "--model", "scripted", "--agents", "4", *options]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=1_400, check=False)


def test_the_gate_accepts_a_code_change_that_helps(tmp_path):
    lab = tmp_path / "lab"
    smear = next(one for one in codefiles.folder("honest") if one.name == "smear")
    with ScriptedEndpoint(replay([smear], once=True)) as server:
        ended = run(lab, server.url, *TASK, "--runs", "40", "--seed", "5")
    assert ended.returncode == 0, ended.stderr
    with Ledger.open(NotebookFolder(lab).require().ledger) as ledger:
        (scope,) = ledger.scopes()
        champion = ledger.champion(scope)
        assert champion.variant.patch is not None
        claim = ledger.claim(champion.claim_id)
        assert claim.verdict_is(Decision.ACCEPTED, Decision.CONFIRMED)
        assert claim.verdict.effect.low > 0
        assert ledger.usage(ledger.societies()[0].id).calls > 0
    report = (lab / "report" / "report.md").read_text()
    assert "+    x0 = fixed.ops.norm((embedded + 0.6 * before)" in report


def test_no_exploit_stops_a_society_or_is_believed(tmp_path):
    lab, profile = tmp_path / "lab", tmp_path / "short.yaml"
    profile.write_text(SHORT)
    exploits = codefiles.folder("exploits")
    with ScriptedEndpoint(replay(exploits)) as server:
        ended = run(lab, server.url, *TASK, "--profile", str(profile), "--runs", "70")
        prompts = json.dumps([asked.user for asked in server.asked])
    assert ended.returncode == 0, ended.stderr
    with Ledger.open(NotebookFolder(lab).require().ledger) as ledger:
        (scope,) = ledger.scopes()
        refused = ledger.refusals(scope)
        broken = {one.variant.fingerprint for one in refused if one.reason is RefusalReason.BROKEN}
        with_code = [run for run in ledger.runs(scope) if run.variant.patch is not None]
        caught = {r.variant.fingerprint for r in with_code if r.outcome is not Outcome.COMPLETED}
        assert not [run for run in with_code if run.outcome is Outcome.COMPLETED]
        assert len(broken) >= 15
        assert len(caught) >= 3
        assert all(run.log_tail.strip() for run in map(ledger.run, [r.id for r in with_code]))
        assert ledger.champion(scope).variant.patch is None
    assert "accept claim c0001" not in prompts
    assert "<|im_start|>" not in prompts
