"""`society.memory.open`: frames, beside a running society as well, and the Jupyter notebook."""

import subprocess
import sys
from importlib import resources

import nbformat
import pytest

import society.memory
from society.errors import NotANotebook
from society.memory.ledger import Ledger
from society.memory.recall import Recall
from society.records import (
    Activity,
    Budget,
    BudgetKind,
    Cost,
    Crown,
    Decision,
    Effect,
    Environment,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    Noise,
    Outcome,
    RunKind,
    Scope,
    Variant,
    Verdict,
)

SCOPE = Scope("toy/cpu", "cpu-A")
BASELINE = Variant("toy/cpu")
WARM = Variant("toy/cpu", {"warm_down": 0.4, "schedule": "linear"})


def _finish(ledger, lease, score):
    outcome = Outcome.CRASHED if score is None else Outcome.COMPLETED
    environment = Environment("cpu", "A", 1, "3.11")
    measured = Measurement(outcome, score, Cost(wall_s=1.5))
    return ledger.finish(lease, measured, environment, Budget(BudgetKind.STEPS, 1.0))


def _screen(ledger, society, variant, score):
    lease = ledger.lease_screening(SCOPE, society, holder="ada", variant=variant, ttl_s=60)
    return _finish(ledger, lease, score)


def fill(ledger):
    """A baseline, an accepted and an open claim, failures, and prose."""
    society = ledger.start_society(1, {}).id

    def commit(key, *entries):
        activity = Activity("ada", "experimenter", "screen", key, 1.0, 2.0, "done")
        ledger.commit(SCOPE, society, "ada", entries, key=key, activity=activity)

    def verify(claim, score, variant=WARM, kind=RunKind.VERIFICATION):
        lease = ledger.lease_next_seed(
            SCOPE, society, holder="ben", variant=variant, kind=kind, claim_id=claim, ttl_s=60
        )
        return _finish(ledger, lease, score).id

    base = _screen(ledger, society, BASELINE, 1.85)
    commit("base", Crown(BASELINE, None, base.id))
    for i in range(8):
        verify(None, 1.85 + i / 1000, BASELINE, RunKind.CALIBRATION)
    commit("noise", Noise(SCOPE.task, SCOPE.tier, 0.002, 0.001, 0.004, 8))
    warm = _screen(ledger, society, WARM, 1.84)
    commit("claim", NewClaim(warm.id, BASELINE, 0.01, 1, 0.05, 0.0))
    runs = tuple(verify("c0001", 1.84) for _ in range(4))
    effect = Effect(0.01, 0.009, 0.002, 0.016, 4)
    verdict = Verdict("c0001", Decision.ACCEPTED, 4.0, effect, "e = 55", runs, "cyd")
    commit("verdict", verdict, Crown(WARM, "c0001", warm.id))
    deep = _screen(ledger, society, Variant("toy/cpu", {"depth": 6}), 1.839)
    _screen(ledger, society, Variant("toy/cpu", {"depth": 60, "tied": True}), None)
    commit("open", NewClaim(deep.id, WARM, 0.001, 2, 0.05, 0.0))
    commit(
        "prose",
        NewInsight("A longer warm-down helps.", (warm.id,)),
        NewHypothesis("Deeper is better.", "more layers", Variant("toy/cpu", {"depth": 8}), 1.0),
    )


@pytest.fixture
def lab(tmp_path):
    folder = tmp_path / "lab"
    folder.mkdir()
    with Ledger.open(folder / "ledger.sqlite", secret_seed=1) as ledger:
        fill(ledger)
        yield folder


def test_frames(lab):
    with society.memory.open(lab) as memory:
        runs = memory.runs()
        assert len(runs) == 16
        assert list(runs["number"]) == list(range(1, 17))
        assert runs["wall_s"].sum() == pytest.approx(24.0)
        assert str(runs["finished_at"].dt.tz) == "UTC"
        claims = memory.claims().set_index("id")
        assert list(claims["verdict"]) == ["accepted", "open"]
        assert claims.loc["c0001", "low"] == 0.002
        assert claims.loc["c0001", "e_value"] == pytest.approx(54.6, abs=0.1)
        assert claims["effect"].notna().tolist() == [True, False]
        champions = memory.champions()
        assert list(champions["variant"]) == ["baseline", "schedule=linear, warm_down=0.4"]
        assert champions["score"].tolist() == pytest.approx([1.8535, 1.84])
        assert list(memory.noise()["sd"]) == [0.002]
        assert list(memory.insights()["evidence"]) == [("r00010",)]
        assert list(memory.hypotheses()["state"]) == ["open"]
        assert len(memory.activities()) == 6


def test_knob_values(lab):
    with society.memory.open(lab) as memory:
        values = memory.knob_values()
    assert list(values.columns[:4]) == ["kind", "split", "outcome", "score"]
    assert list(values.columns[4:]) == ["depth", "schedule", "tied", "warm_down"]
    assert values["warm_down"].count() == 5
    assert values.loc["r00010", "schedule"] == "linear"


def test_search_needs_no_index(lab):
    with society.memory.open(lab) as memory, Ledger.open(lab) as ledger:
        hits = memory.search("warm down at the end of training", k=3)
        assert hits["text"].str.contains("warm").all()
        assert list(hits["similarity"]) == sorted(hits["similarity"], reverse=True)
        assert not (lab / "recall").exists()
        with Recall.open(lab) as recall:
            recall.sync(ledger)
            found = recall.search("deeper network", k=1)[0]
            best = memory.search("deeper network", k=1).iloc[0]
            assert (best["kind"], best["ref"]) == (found.kind, found.ref)
            assert best["similarity"] == pytest.approx(found.similarity, abs=1e-5)


def test_it_follows_a_society_in_another_process(lab):
    with society.memory.open(lab) as memory:
        before = len(memory.runs())
        script = (
            "import sys\nfrom society.memory.ledger import Ledger\n"
            "from society.records import *\n"
            "scope = Scope('toy/cpu', 'cpu-A')\n"
            "with Ledger.open(sys.argv[1]) as ledger:\n"
            "    lease = ledger.lease_screening(scope, 's001', holder='x',\n"
            "        variant=Variant('toy/cpu', {'width': 3}), ttl_s=60)\n"
            "    ledger.finish(lease, Measurement(Outcome.COMPLETED, 1.0, Cost()),\n"
            "        Environment('cpu', 'A', 1, '3'), Budget(BudgetKind.STEPS, 1.0))\n"
        )
        subprocess.run([sys.executable, "-c", script, str(lab)], check=True)
        assert len(memory.runs()) == before + 1
        assert "width" in memory.knob_values().columns
        assert "width=3" in memory.search("width", k=1)["text"].iloc[0]


def test_an_empty_memory_has_empty_frames(tmp_path):
    Ledger.open(tmp_path / "ledger.sqlite").close()
    with society.memory.open(tmp_path) as memory:
        for frame in (
            memory.runs(), memory.claims(), memory.champions(), memory.insights(),
            memory.hypotheses(), memory.activities(), memory.noise(), memory.studies(),
            memory.knob_values(), memory.search("anything"),
        ):  # fmt: skip
            assert len(frame) == 0
            assert len(frame.columns) > 3


def test_no_notebook(tmp_path):
    with pytest.raises(NotANotebook, match="nothing"):
        society.memory.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_importing_is_light():
    code = (
        "import sys, society.memory; heavy = {'sqlalchemy', 'pandas', 'chromadb', 'numpy'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert society.memory.Ledger is Ledger
    with pytest.raises(AttributeError, match="Nothing"):
        society.memory.Nothing  # noqa: B018


NOTEBOOK = resources.files("society.memory") / "inspect_memory.ipynb"


def _run_notebook(folder):
    """Run the cells in a fresh Python, with a stand-in for Jupyter's `display`."""
    cells = nbformat.reads(NOTEBOOK.read_text(), as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"display = print\n{source}"],
        env={"SOCIETY_LAB": str(folder), "MPLBACKEND": "agg", "PATH": "", "HOME": str(folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_notebook_runs_on_a_memory(lab):
    output = _run_notebook(lab)
    assert "warm_down" in output
    assert "screening runs changed depth" in output


@pytest.mark.parametrize("stage", ["empty", "baseline"])
def test_the_notebook_runs_on_a_young_memory(tmp_path, stage):
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        if stage == "baseline":
            _screen(ledger, ledger.start_society(1, {}).id, BASELINE, 1.85)
    assert "No knob was changed yet." in _run_notebook(tmp_path)


def test_the_notebook_is_stored_without_outputs():
    cells = nbformat.reads(NOTEBOOK.read_text(), as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs")]
