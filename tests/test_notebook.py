"""The Jupyter notebook, executed by a real kernel, and the frames that answer its questions."""

from importlib import resources

import nbformat
import pytest
from nbclient import NotebookClient

import society.memory
from society.memory import Memory
from society.memory.answers import wilson
from society.memory.ledger import Ledger
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Crown,
    Decision,
    Effect,
    Environment,
    HypothesisDropped,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    NewPrior,
    NewRefusal,
    NewStudy,
    Noise,
    Outcome,
    RefusalReason,
    RunKind,
    Scope,
    StudyResult,
    Variant,
    Verdict,
)

NOTEBOOK = resources.files("society.memory") / "inspect_memory.ipynb"
SCOPE = Scope("toy/cpu", "cpu-A")
BASELINE = Variant("toy/cpu")
SECONDS = 90.0


def changed(**overrides):
    return Variant("toy/cpu", overrides)


class Rich:
    """A memory in which everything has happened: see `fill`."""

    def __init__(self, ledger):
        self.ledger = ledger
        self.society = ledger.start_society(1, {}).id
        self.keys = 0

    def commit(self, *entries, agent="ada"):
        self.keys += 1
        self.ledger.commit(SCOPE, self.society, agent, entries, key=f"k{self.keys}")

    def finish(self, lease, score):
        outcome = Outcome.DIVERGED if score is None else Outcome.COMPLETED
        measured = Measurement(outcome, score, Cost(wall_s=SECONDS, flops=1e9))
        environment = Environment("cpu", "A", 1, "3.11")
        return self.ledger.finish(lease, measured, environment, Budget(BudgetKind.STEPS, 1.0))

    def screen(self, variant, score, agent="ada"):
        lease = self.ledger.lease_screening(
            SCOPE, self.society, holder=agent, variant=variant, ttl_s=60
        )
        return self.finish(lease, score)

    def pool(self, variant, scores, kind=RunKind.VERIFICATION, claim=None):
        found = []
        for score in scores:
            lease = self.ledger.lease_next_seed(
                SCOPE, self.society, holder="cyd", variant=variant, kind=kind, claim_id=claim,
                ttl_s=60,
            )  # fmt: skip
            found.append(self.finish(lease, score).id)
        return tuple(found)

    def claim(self, variant, score, gains, agent, reference=BASELINE):
        """A claim of an agent's, verified with these gains over the first baseline scores."""
        run = self.screen(variant, score, agent)
        self.commit(NewClaim(run.id, reference, 1.85 - score, 1, 0.05, 0.0), agent=agent)
        claim = self.ledger.claims()[-1]
        scores = [1.85 + i / 1000 - gain for i, gain in enumerate(gains)]
        return claim, self.pool(variant, scores, claim=claim.id)

    def judge(self, claim, decision, log_e, runs, effect=None):
        self.commit(Verdict(claim.id, decision, log_e, effect, "because", runs, "cyd"))

    def fill(self):
        base = self.screen(BASELINE, 1.85)
        self.commit(Crown(BASELINE, None, base.id))
        self.pool(BASELINE, [1.85 + i / 1000 for i in range(8)], RunKind.CALIBRATION)
        self.commit(Noise(SCOPE.task, SCOPE.tier, 0.0025, 0.0016, 0.005, 8))
        for i, lr in enumerate((0.01, 0.02, 0.03, 0.08)):
            self.screen(changed(lr=lr, depth=4), 1.86 - i / 500, "ben")
        self.screen(changed(lr=0.5), None, "ben")
        self.screen(changed(schedule="cosine"), 1.848)
        good, runs = self.claim(changed(lr=0.04), 1.84, [0.010, 0.012, 0.011, 0.009], "ada")
        lost, others = self.claim(changed(depth=6), 1.845, [0.001, -0.002, 0.0, 0.003], "ben")
        held, back = self.claim(changed(tied=True), 1.843, [0.004, 0.003, 0.005, 0.002], "ada")
        self.judge(lost, Decision.REJECTED, -1.0, others, Effect(0.0005, 0.0003, -0.01, 0.01, 4))
        effect = Effect(0.0105, 0.0095, 0.004, 0.016, 4)
        self.commit(
            Verdict(good.id, Decision.ACCEPTED, 4.0, effect, "e = 55", runs, "cyd"),
            Crown(good.variant, good.id, good.screening_run),
        )
        self.judge(held, Decision.ACCEPTED, 3.2, back, Effect(0.0035, 0.003, 0.001, 0.006, 4))
        self.judge(held, Decision.ROLLED_BACK, 0.1, back, Effect(0.001, 0.0005, -0.002, 0.004, 4))
        lease = self.ledger.lease_reproduction(
            SCOPE, self.society, holder="cyd", claim_id=good.id, ttl_s=60
        )
        self.finish(lease, 1.84)
        self.claim(changed(lr=0.04, depth=3), 1.839, [0.013], "ben", good.variant)
        self.prose(base.id)
        return self

    def prose(self, run):
        self.commit(NewInsight("A rate of 0.04 helps.", (run,)))
        for i, depth in enumerate((8, 9, 10)):
            self.commit(NewHypothesis("Deeper is better.", "why", changed(depth=depth), 1.0 + i))
        self.screen(changed(depth=8), 1.8, "ben")
        self.commit(HypothesisDropped("h0002", "the champion has moved on"))
        for reason in (RefusalReason.DUPLICATE, RefusalReason.DUPLICATE, RefusalReason.DEAD_END):
            self.commit(NewRefusal(changed(lr=0.5), reason, run, "known"))
        self.commit(NewPrior("results.tsv", "a1b2c3", 0.99, "keep", "bigger batch"))
        self.commit(NewStudy("finding", "Does weight decay help?", {"seeds": 8}))
        arm = {"change": "wd=0.1", "verdict": "replicated", "effect": 0.005, "low": 0.001,
               "high": 0.009, "seeds": 8, "log_e": 3.5}  # fmt: skip
        self.commit(StudyResult("st001", {"verdict": "replicated", "arms": [arm]}, ()))


@pytest.fixture(scope="module")
def rich_lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rich")
    with Ledger.open(folder / "ledger.sqlite", secret_seed=1) as ledger:
        Rich(ledger).fill()
    return folder


def execute(folder, monkeypatch, **variables):
    """Run all cells; what they have shown."""
    monkeypatch.setenv("SOCIETY_LAB", str(folder))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.reads(NOTEBOOK.read_text(), as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not [out for out in shown if out.output_type == "error"]
    return shown


def pictures(shown):
    return sum("image/png" in out.get("data", {}) for out in shown)


def text(shown):
    return "\n".join(
        out.get("text", "") + str(out.get("data", {}).get("text/plain", "")) for out in shown
    )


def test_the_notebook_on_a_real_short_run(small_lab, monkeypatch):
    shown = execute(small_lab, monkeypatch)
    assert pictures(shown) >= 7
    assert any("text/html" in out.get("data", {}) for out in shown)


def test_the_notebook_on_a_rich_memory(rich_lab, monkeypatch):
    shown = execute(rich_lab, monkeypatch, SOCIETY_KNOB="lr")
    assert pictures(shown) >= 7
    assert "7 screening runs changed lr, 1 of them failed." in text(shown)
    for found in ("rolled_back", "results.tsv", "dead_end", "wd=0.1", "better"):
        assert found in text(shown)


def test_the_notebook_on_an_empty_memory(tmp_path, monkeypatch):
    Ledger.open(tmp_path / "ledger.sqlite").close()
    shown = execute(tmp_path, monkeypatch)
    assert "No knob was changed yet." in text(shown)


# --- the frames that answer -------------------------------------------------------------------


def test_whose_claims_hold_up(rich_lab):
    with society.memory.open(rich_lab) as memory:
        agents = memory.agents().set_index("agent")
    assert agents.loc["ada", ["filed", "accepted", "rolled_back", "rejected"]].tolist() == [
        2,
        1,
        1,
        0,
    ]
    assert agents.loc["ben", ["filed", "open", "accepted", "rejected"]].tolist() == [2, 1, 0, 1]
    assert agents.loc["ada", "hit_rate"] == 0.5
    assert agents.loc["ben", "hit_rate"] == 0.0
    assert agents.loc["cyd", "filed"] == 0
    assert agents["hit_rate"].isna().tolist() == [False, False, True]
    assert (agents.loc["ben", "failed"], agents.loc["ben", "screening"]) == (1, 8)


def test_wilsons_interval():
    assert wilson(0, 0) == (None, None)
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(3, 3)[1] == 1.0


def test_what_is_supported_best(rich_lab):
    with society.memory.open(rich_lab) as memory:
        support = memory.support()
    assert support["id"].tolist() == ["c0001", "st001", "c0003", "c0002"]
    assert support["stands"].tolist() == [True, True, False, False]
    assert support["verdict"].tolist() == ["accepted", "replicated", "rolled_back", "rejected"]
    assert support["what"].tolist()[1] == "wd=0.1"
    assert support["reproduced"].tolist()[0] is True
    assert support["e_value"].tolist()[0] == pytest.approx(54.6, abs=0.1)


def test_what_was_tried_around_a_knob(rich_lab):
    with society.memory.open(rich_lab) as memory:
        around = memory.around("lr")
        nothing = memory.around("unheard_of")
    tried = around[~around["baseline"]]
    assert tried["value"].tolist() == [0.01, 0.02, 0.03, 0.08, 0.5, 0.04, 0.04]
    assert tried["others"].tolist() == [1, 1, 1, 1, 0, 0, 1]
    assert tried["champion"].tolist() == ["", "", "", "", "", "present", ""]
    assert around[around["baseline"]]["champion"].tolist() == ["former"]
    assert tried["score"].isna().sum() == 1
    assert nothing["baseline"].tolist() == [True]


def test_where_the_noise_is(rich_lab):
    with society.memory.open(rich_lab) as memory:
        spread = memory.spread().set_index("variant")
        paired = memory.paired()
        upside_down = Memory(rich_lab, lower_is_better=False)
        assert upside_down.paired()["gain"].tolist() == [-gain for gain in paired["gain"]]
        upside_down.close()
    base = spread.loc["baseline"]
    assert (base["seeds"], base["champion"]) == (8, True)
    assert base["sd"] == pytest.approx(0.00244949, rel=1e-5)
    assert (base["low"], base["high"]) == pytest.approx((0.00161954, 0.00498546), rel=1e-4)
    gains = paired.loc[paired["claim_id"] == "c0001", "gain"].tolist()
    assert gains == pytest.approx([0.010, 0.012, 0.011, 0.009])
    assert paired["claim_id"].value_counts().to_dict() == {
        "c0001": 4, "c0002": 4, "c0003": 4, "c0004": 1,
    }  # fmt: skip


def test_what_was_refused_and_saved(rich_lab):
    with society.memory.open(rich_lab) as memory:
        refusals, saved = memory.refusals(), memory.saved().set_index("reason")
        priors = memory.priors()
    assert refusals["reason"].tolist() == ["duplicate", "duplicate", "dead_end"]
    assert str(refusals["refused_at"].dt.tz) == "UTC"
    assert saved.loc["duplicate", ["refusals", "variants", "wall_s"]].tolist() == [
        2,
        1,
        2 * SECONDS,
    ]
    assert priors[["source", "label", "status"]].to_numpy().tolist() == [
        ["results.tsv", "a1b2c3", "keep"]
    ]


def test_what_came_of_the_ideas(rich_lab):
    with society.memory.open(rich_lab) as memory:
        ideas = memory.hypotheses()
        best = memory.best()
    assert ideas["state"].tolist() == ["tested", "dropped", "open"]
    assert ideas["outcome"].tolist() == ["better", "dropped", "waiting"]
    assert ideas["gain"].tolist()[0] == pytest.approx(0.04)
    assert ideas["worth"].tolist() == [1.0, 2.0, 3.0]
    assert best[["variant", "verdict", "seeds"]].to_numpy().tolist() == [["lr=0.04", "accepted", 4]]
    assert best["low"].tolist() == [0.004]


def test_the_answers_of_an_empty_memory(tmp_path):
    Ledger.open(tmp_path / "ledger.sqlite").close()
    with society.memory.open(tmp_path) as memory:
        for frame in (
            memory.refusals(), memory.saved(), memory.priors(), memory.agents(), memory.support(),
            memory.around("lr"), memory.spread(), memory.paired(), memory.best(),
        ):  # fmt: skip
            assert len(frame) == 0
            assert len(frame.columns) > 4


def test_a_shared_ledger_is_read_by_its_address_or_through_a_folder(tmp_path):
    address = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    with Ledger.open(address, secret_seed=1) as ledger:
        Rich(ledger).fill()
    folder = society.memory.NotebookFolder(tmp_path / "ann").share(ledger=address)
    with society.memory.open(address) as bare, society.memory.open(folder.path) as through:
        assert len(bare.runs()) == len(through.runs()) > 20
        assert bare.support().equals(through.support())


def test_a_ledger_on_a_server_is_read_by_its_address(postgres_url):
    with Ledger.open(postgres_url, secret_seed=1) as ledger:
        Rich(ledger).fill()
    with society.memory.open(postgres_url) as memory:
        assert memory.support()["id"].tolist() == ["c0001", "st001", "c0003", "c0002"]
        assert len(memory.around("lr")) == 8
