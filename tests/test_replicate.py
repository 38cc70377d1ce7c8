"""`society replicate`, end to end on the synthetic task: verdicts, report, resume, errors."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest
import yaml

from society import plots
from society.errors import NotANotebook
from society.experiments.findings import load
from society.experiments.verdicts import Rules, Verdict
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.recall import Recall
from society.records import Effect, RunKind, Split
from society.replicate import Order, replicate

FILE = {
    "task": "synthetic",
    "findings": [
        {
            "id": "rate",
            "statement": "A higher rate <helps>.",
            "kind": "model",
            "primary": {"factors": {"lr": 2}, "predicted": "better", "size": 0.02},
            "secondary": [{"overrides": {"window": "full"}, "predicted": "worse", "note": "a|b"}],
            "sources": [{"url": "https://example.org/a", "says": "it *helps*"}],
        },
        {
            "id": "decay",
            "statement": "More decay helps.",
            "kind": "model",
            "primary": {"overrides": {"weight_decay": 0.9}, "predicted": "better"},
        },
        {
            "id": "heads",
            "statement": "More heads help.",
            "kind": "model",
            "primary": {"overrides": {"heads": 4}, "predicted": "better"},
        },
        {"id": "noise", "statement": "Noise is small.", "kind": "noise", "size": 0.012},
        {
            "id": "record",
            "statement": "Failures are kept.",
            "kind": "negative_results",
            "planted": {"overrides": {"lr": 0.9, "momentum": 0.97}},
        },
        {
            "id": "pipeline",
            "statement": "Something is untried.",
            "kind": "data_pipeline",
            "arms": [
                {"overrides": {"batch": 512}},
                {"overrides": {"warm_up": 0.3}},
                {"overrides": {"heads": 1}},
            ],
        },
        {"id": "memory", "statement": "Sharing helps.", "kind": "memory"},
    ],
}
RULES = Rules(n_max=10, noise_seeds=30, societies=1, society_runs=24)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The findings of the synthetic task."""
    path = tmp_path_factory.mktemp("findings") / "mine.yaml"
    path.write_text(yaml.safe_dump(FILE))
    return path


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Where the whole file was replicated. Read only."""
    return tmp_path_factory.mktemp("replicated") / "lab"


@pytest.fixture(scope="module")
def done(lab, file):
    """The whole file, replicated."""
    seen = []
    order = Order("synthetic", load(file).findings, RULES, slots=2, secret_seed=5)
    found = replicate(NotebookFolder(lab), order, seen.append)
    return found, seen


def study_runs(lab):
    with Ledger.open(lab, read_only=True) as ledger:
        return ledger.runs(kinds=[RunKind.STUDY])


def test_every_finding_gets_its_verdict(done):
    found, _ = done
    assert found.complete
    verdicts = {result.finding.id: result.verdict for result in found.results}
    assert verdicts.pop("memory") is Verdict.UNDECIDED  # one pair can decide nothing
    assert verdicts == {
        "rate": Verdict.REPLICATED,
        "decay": Verdict.REVERSED,
        "heads": Verdict.ABSENT,
        "noise": Verdict.REPLICATED,
        "record": Verdict.REPLICATED,
        "pipeline": Verdict.REPLICATED,
    }
    rate, *_, pipeline, memory = found.results
    assert [arm.judgement.verdict for arm in rate.arms] == [Verdict.REPLICATED] * 2
    assert [arm.label for arm in pipeline.arms] == ["better", "worse", ""]
    assert memory.judgement.seeds == 1
    assert memory.runs >= 2 * RULES.society_runs


def test_comparisons_share_the_baseline_and_stop_when_decided(done, lab):
    runs = study_runs(lab)
    by_variant = {}
    for run in runs:
        assert run.split is Split.HOLDOUT
        by_variant.setdefault(run.variant.describe(), []).append(run.seed)
    assert len(by_variant["baseline"]) == RULES.noise_seeds
    for seeds in by_variant.values():
        assert len(seeds) == len(set(seeds))
        assert set(seeds) <= set(by_variant["baseline"])
    assert 4 <= len(by_variant["lr=0.08"]) < RULES.first.n_max


def test_plans_are_registered_before_any_run(done, lab):
    with Ledger.open(lab, read_only=True) as ledger:
        studies, runs = ledger.studies(), ledger.runs(kinds=[RunKind.STUDY])
    assert [study.title for study in studies] == [one["statement"] for one in FILE["findings"]]
    assert max(study.registered_at for study in studies) <= min(run.started_at for run in runs)
    rate = studies[0]
    assert rate.plan["rules"]["n_max"] == 10
    assert rate.plan["changes"][0] == {
        "change": "lr=0.08",
        "predicted": "better",
        "published": 0.02,
    }
    known = {run.id for run in runs}
    for study in studies:
        assert study.result is not None
        assert set(study.evidence) <= known
    assert rate.result["verdict"] == "replicated"


def test_the_conclusions_are_found_by_meaning(done, lab):
    with Ledger.open(lab, read_only=True) as ledger:
        told = ledger.insights()
    assert sum(insight.author == "replicator" for insight in told) == 8  # 7 and a planted failure
    with Recall.open(lab) as recall, Ledger.open(lab) as ledger:
        recall.sync(ledger)
        hits = recall.search("does a higher learning rate lr help?", k=5)
    assert any("lr=0.08" in hit.text and "replicated" in hit.text for hit in hits)


def test_progress_counts_up_and_says_what_was_decided(done):
    _, seen = done
    counted = [now for now in seen if now.most]
    assert all(now.done <= now.most for now in counted)
    assert counted[-1].done == counted[-1].most
    news = " ".join(now.news for now in seen)
    assert "rate: lr=0.08: replicated" in news
    assert "society 1 of 1, knowledge own" in news


def test_the_report_is_two_files_that_need_nothing_else(done):
    found, _ = done
    markdown, html = found.markdown.read_text(), found.html.read_text()
    for text in (markdown, html):
        for words in ("not at this scale", "lr=0.08", "certified better", "0.0200"):
            assert words in text
        assert "<helps>" not in text
    assert "<script" not in html
    assert "src=" not in html
    assert "<svg" in html
    assert all(part.startswith("#") for part in html.split('href="')[1:])
    plot = found.markdown.parent / "plots" / "findings.svg"
    assert ET.parse(plot).getroot().tag.endswith("svg")
    rows = [line for line in markdown.splitlines() if line.startswith("| 1 |")]
    assert len(rows) == 1
    assert "**replicated**" in rows[0]


def test_asking_again_runs_nothing_and_says_the_same(done, lab, file):
    found, _ = done
    before = len(study_runs(lab))
    order = Order("synthetic", load(file).findings, RULES, slots=2)
    again = replicate(NotebookFolder(lab), order)
    assert len(study_runs(lab)) == before
    same = [(r.finding.id, r.verdict, r.judgement.effect) for r in again.results]
    assert same == [(r.finding.id, r.verdict, r.judgement.effect) for r in found.results]


# ------------------------------------------------------------------------------ interrupted


def slow_profile(tmp_path):
    profile = tmp_path / "slow.yaml"
    profile.write_text(
        yaml.safe_dump(
            {
                "task": "synthetic",
                "name": "slow",
                "budget": {"kind": "steps", "amount": 100},
                "limits": {"timeout_s": 30, "mem_bytes": 268_435_456},
                "options": {"sleep_s": 0.15},
            }
        )
    )
    return profile


def words(file, lab, *more):
    return [
        sys.executable, "-m", "society", "replicate", "--findings", str(file), "--lab", str(lab),
        "--seeds", "4", "--noise-seeds", "12", "--slots", "2", *map(str, more),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_replication_goes_on(tmp_path, file, society, number):
    lab, only = tmp_path / "lab", ("--only", "rate", "--only", "noise")
    profile = ("--profile", slow_profile(tmp_path))
    with subprocess.Popen(
        words(file, lab, *only, *profile),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ,
    ) as process:
        recorded = wait_for_runs(lab, 5)
        process.send_signal(number)
        error = process.stderr.read().decode()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "The same command goes on" in error
    assert not (lab / "report" / "findings.html").exists()
    done = society(*words(file, lab, *only, *profile, "--json")[3:])
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["complete"]
    assert [one["seeds"] for one in told["findings"]][1] == 12
    assert told["findings"][0]["verdict"] == "replicated"
    runs = study_runs(lab)
    assert {run.id for run in recorded} <= {run.id for run in runs}
    places = [(run.variant.fingerprint, run.seed) for run in runs]
    assert len(places) == len(set(places))


def wait_for_runs(lab, count):
    for _ in range(600):
        try:
            runs = study_runs(lab)
        except NotANotebook:
            runs = ()
        if len(runs) >= count:
            return runs
        time.sleep(0.05)
    raise AssertionError("no run was recorded within 30 s")


def test_what_the_time_was_too_short_for_is_undecided(tmp_path, file, society):
    lab, only = tmp_path / "lab", ("--only", "rate", "--only", "noise")
    done = society(*words(file, lab, *only, "--minutes", 0.1, "--profile", slow_profile(tmp_path),
                          "--noise-seeds", 400)[3:])  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "Not everything that was planned has been done; the same command goes on." in done.out
    assert "the time was used up" in done.out
    text = (lab / "report" / "findings.md").read_text()
    assert "**undecided**" in text
    with Ledger.open(lab, read_only=True) as ledger:
        results = {study.plan["finding"]: study.result for study in ledger.studies()}
    assert results["noise"] is None


# ------------------------------------------------------------------------------ wrong requests


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--only", "rat"), "Unknown finding 'rat'. Did you mean 'rate'?"),
        (("--task", "pretrain"), "Finding 'rate'"),
        (("--profile", "enormous"), "Unknown profile"),
    ],
)
def test_wrong_requests_end_with_one_line(tmp_path, file, society, more, message):
    done = society(*words(file, tmp_path / "lab", *more)[3:])
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "lab" / "ledger.sqlite").exists()


def test_a_wrong_file_ends_with_one_line(tmp_path, society):
    file = tmp_path / "mine.yaml"
    file.write_text("task: synthetic\nfindings: [{id: x, kind: model, statement: s}]\n")
    done = society(*words(file, tmp_path / "lab")[3:])
    assert done.code == 2
    assert f"{file}: findings.0" in done.err


def test_a_forest_without_rows_is_nothing():
    assert plots.findings_forest([], unit="u") is None
    nothing = plots.ForestRow("x", Effect(float("nan"), 0, 0, 0, 0), "undecided")
    assert plots.findings_forest([nothing], unit="u") is None


def test_a_forest_shows_infinite_intervals_and_published_sizes():
    effects = [Effect(0.01, 0.01, float("-inf"), float("inf"), 3), Effect(-0.1, 0, -0.12, -0.08, 9)]
    rows = [
        plots.ForestRow("a $x$", effects[0], "undecided", main=True, published=0.02, predicted=1.0),
        plots.ForestRow("b", effects[1], "reversed", predicted=1.0),
    ]
    svg = plots.findings_forest(rows, unit="BPB")
    assert "published size" in svg
    ET.fromstring(plots.standalone(svg))


@pytest.mark.slow
def test_two_findings_of_the_real_trainer(tmp_path, society):
    lab = tmp_path / "lab"
    done = society("replicate", "--only", "windowed-attention", "--only", "negative-results",
                   "--seeds", 4, "--noise-seeds", 8, "--lab", lab, "--json")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert told["complete"]
    window, record = told["findings"]
    assert window["effect"] < 0
    assert 4 <= window["seeds"] <= 8
    assert record["verdict"] == "replicated"
    scored = [run for run in study_runs(lab) if run.score is not None]
    assert all(run.variant.task == "pretrain/cpu" for run in scored)
    assert any(run.variant.is_baseline for run in scored)
