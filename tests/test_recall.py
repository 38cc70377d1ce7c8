"""The semantic index: what is found, what is never indexed, and what happens when it breaks."""

import itertools
import os
import subprocess
import sys

import pytest

from society.errors import RecallUnavailable
from society.memory import embed
from society.memory.embed import embedder, words
from society.memory.ledger import Ledger
from society.memory.prose import Prose, changes
from society.memory.recall import Recall
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Crown,
    Decision,
    Effect,
    Environment,
    HypothesisTested,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    Outcome,
    RunKind,
    Scope,
    Variant,
    Verdict,
)

SCOPE = Scope("toy/cpu", "cpu-A")
ENVIRONMENT = Environment("cpu", "A", 1, "3.11")
BASELINE = Variant("toy/cpu")


def variant(**overrides):
    return Variant("toy/cpu", overrides)


class Story:
    """Fills a ledger with a small society's work."""

    def __init__(self, path):
        self.ledger = Ledger.open(path / "ledger.sqlite", secret_seed=3)
        self.society = self.ledger.start_society(1, {}).id
        self._keys = itertools.count()

    def screen(self, change, score=None, idea="", outcome=Outcome.DIVERGED):
        lease = self.ledger.lease_screening(
            SCOPE, self.society, holder="ada", variant=change, ttl_s=60, idea=idea
        )
        return self.finish(lease, score, outcome)

    def finish(self, lease, score, outcome=Outcome.DIVERGED):
        outcome = outcome if score is None else Outcome.COMPLETED
        measured = Measurement(outcome, score, Cost())
        return self.ledger.finish(lease, measured, ENVIRONMENT, Budget(BudgetKind.STEPS, 1.0))

    def commit(self, *entries):
        key = f"k{next(self._keys)}"
        self.ledger.commit(SCOPE, self.society, "mia", entries, key=key, activity=None)

    def claim(self, run, delta):
        self.commit(NewClaim(run.id, BASELINE, delta, 1, 0.05, 0.0))
        return self.ledger.claims()[-1]

    def verify(self, claim, score):
        lease = self.ledger.lease_next_seed(
            SCOPE, self.society, holder="ben", variant=claim.variant,
            kind=RunKind.VERIFICATION, claim_id=claim.id, ttl_s=60,
        )  # fmt: skip
        return self.finish(lease, score)


@pytest.fixture
def story(tmp_path):
    story = Story(tmp_path)
    base = story.screen(BASELINE, 1.845)
    story.commit(Crown(BASELINE, None, base.id))
    run = story.screen(
        variant(warm_down=0.4), 1.842, "a longer decay of the learning rate at the end"
    )
    claim = story.claim(run, 0.003)
    runs = [story.verify(claim, 1.84).id for _ in range(4)]
    effect = Effect(0.004, 0.0035, 0.001, 0.006, 4)
    story.commit(Verdict(claim.id, Decision.ACCEPTED, 4.0, effect, "e = 55", tuple(runs), "cyd"))
    story.screen(variant(depth=6), 1.865, "more layers")
    story.screen(variant(matrix_lr=0.4), None, "raise the learning rate of the matrices")
    story.screen(variant(z_loss=0.001), 1.845)
    story.screen(variant(batch_tokens=16384), 1.86, "larger batch")
    story.screen(variant(activation="relu2"), 1.833, "squared ReLU as in Primer")
    story.screen(variant(tie_embeddings=True), 1.88, "share input and output embedding")
    story.screen(variant(init_scale=0.5), 1.843, "smaller initial weights")
    story.screen(variant(n_heads=8), None, "more attention heads", Outcome.CRASHED)
    story.screen(variant(qk_norm=True), 1.84, "normalise queries and keys")
    smooth = story.claim(story.screen(variant(label_smoothing=0.1), 1.844), 0.001)
    story.commit(Verdict(smooth.id, Decision.REJECTED, -1.0, None, "no gain", (), "cyd"))
    story.commit(
        NewHypothesis(
            "Weight decay should be annealed to zero.",
            "late decay shrinks the weights without gain",
            variant(wd_schedule="linear"), 1.0,
        ),
        NewHypothesis(
            "Muon needs more momentum.", "gradients are noisy", variant(muon_momentum=0.97), 2.0
        ),
        NewInsight("The rotary base matters little; the window pattern of attention matters.", ()),
        NewInsight("A grad_clip below 0.5 slows training; above 1.0 it has no effect.", ()),
    )  # fmt: skip
    yield story
    story.ledger.close()


QUERIES = {
    "what do we know about warm-down?": "warm_down",
    "does a deeper network help?": "depth=6",
    "which experiments diverged": "diverged",
    "effect of z-loss": "z_loss",
    "bigger batch size": "batch_tokens",
    "squared relu activation function": "relu2",
    "weight tying of embeddings": "tie_embeddings",
    "label smoothing": "label_smoothing",
    "annealing weight decay": "wd_schedule",
    "momentum of Muon": "muon_momentum",
    "rotary position embeddings": "rotary",
    "gradient clipping": "grad_clip",
    "initialisation of the weights": "init_scale",
    "number of attention heads": "n_heads",
    "normalising queries and keys": "qk_norm",
    "lr too high": "matrix_lr",
}


def test_the_right_record_is_among_the_first_three(story, tmp_path):
    with Recall.open(tmp_path) as recall:
        recall.sync(story.ledger)
        found = {query: [hit.text for hit in recall.search(query, k=3)] for query in QUERIES}
    missed = {q: found[q] for q, part in QUERIES.items() if not any(part in t for t in found[q])}
    assert not missed


def test_hits_and_kinds(story, tmp_path):
    with Recall.open(tmp_path) as recall:
        assert recall.search("anything") == ()
        assert recall.sync(story.ledger) == story.ledger.posted(0, 1000)[-1].seq
        assert recall.sync(story.ledger) == 0
        hits = recall.search("warm down", k=2, kinds=["claim", "verdict"])
        assert {hit.id for hit in hits} == {"claim:c0001", "verdict:c0001"}
        assert hits[0].metadata["ref"] == "c0001"
        assert 1 >= hits[0].similarity >= hits[1].similarity > 0.1
        assert len(recall.search("warm down", k=500)) == len(recall)


def test_what_is_written(story):
    texts = {passage.id: passage.text for passage in Prose(story.ledger).all()}
    assert texts["run:r00001"] == "Tried baseline: screening score 1.84500."
    assert texts["run:r00002"] == (
        "Tried warm_down=0.4 (changes warm_down from the baseline's to 0.4): screening improved "
        "the score by 0.00300, 1.84200 against 1.84500 of the champion. "
        "Idea: a longer decay of the learning rate at the end"
    )
    assert any("depth=6" in t and "worsened the score by 0.02000" in t for t in texts.values())
    assert any("the run crashed" in text for text in texts.values())
    assert "95 % interval +0.00100 to +0.00600 on 4 seeds" in texts["verdict:c0001"]
    higher = {p.id: p.text for p in Prose(story.ledger, lower_is_better=False).all()}
    assert "worsened the score by 0.00300" in higher["run:r00002"]


def test_changes_in_words():
    assert changes(variant(a=2), variant(a=1, b=True)) == (
        "changes a from 1 to 2, b from True to the baseline's"
    )
    assert changes(variant(a=1), variant(a=1)) == "changes nothing"


def test_results_of_open_claims_and_seeds_are_never_indexed(story, tmp_path):
    run = story.screen(variant(secret_knob=1), 1.83)
    claim = story.claim(run, 0.015)
    holdout = [story.verify(claim, 1.7654321 + i / 1e6) for i in range(3)]
    texts = " ".join(passage.text for passage in Prose(story.ledger).all())
    assert "secret_knob" in texts
    assert "1.7654" not in texts
    for run in story.ledger.runs():
        assert str(run.seed) not in texts
    for run in holdout:
        assert run.id not in texts


def test_a_tested_hypothesis_replaces_its_passage(story, tmp_path):
    with Recall.open(tmp_path) as recall:
        recall.sync(story.ledger)
        before = len(recall)
        run = story.screen(variant(muon_momentum=0.97), 1.84)
        story.commit(HypothesisTested("h0002", run.id))
        recall.sync(story.ledger)
        assert len(recall) == before + 1
        (hit,) = recall.search("momentum of Muon", k=1, kinds=["hypothesis"])
        assert f"Tested by run {run.id}" in hit.text


def test_a_crash_between_index_and_cursor_repeats_nothing(story, tmp_path, monkeypatch):
    with Recall.open(tmp_path) as recall:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "set_cursor", _die)
            with pytest.raises(KeyboardInterrupt):
                recall.sync(story.ledger)
        count = len(recall)
        recall.sync(story.ledger)
        assert len(recall) == count == len(list(Prose(story.ledger).all()))


def _die(*_):
    raise KeyboardInterrupt


def test_one_owner(story, tmp_path):
    with Recall.open(tmp_path), pytest.raises(RecallUnavailable, match=str(os.getpid())):
        Recall.open(tmp_path)
    Recall.open(tmp_path).close()


def test_another_process_is_refused(story, tmp_path):
    script = (
        "import sys\nfrom society.errors import RecallUnavailable\n"
        "from society.memory.recall import Recall\n"
        "try:\n    Recall.open(sys.argv[1])\n"
        "except RecallUnavailable as error:\n    print(error)\n"
    )
    with Recall.open(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "society memory reindex" in done.stdout
    assert str(os.getpid()) in done.stdout


@pytest.mark.parametrize("harm", ["garbage", "truncated", "file", "empty"])
def test_a_damaged_folder_says_so_and_is_rebuilt(story, tmp_path, harm):
    with Recall.open(tmp_path) as recall:
        recall.sync(story.ledger)
        size = len(recall)
    _damage(tmp_path / "recall", harm)
    if harm == "empty":
        with Recall.open(tmp_path) as recall:
            assert recall.sync(story.ledger) > 0
            assert len(recall) == size
        return
    with pytest.raises(RecallUnavailable, match="society memory reindex") as caught:
        Recall.open(tmp_path)
    assert "\n" not in str(caught.value)
    with Recall.rebuild(tmp_path, story.ledger) as recall:
        assert len(recall) == size
        assert recall.search("warm down", k=1)


def _damage(folder, harm):
    database = folder / "chroma.sqlite3"
    content = database.read_bytes()
    if harm == "garbage":
        database.write_bytes(b"\x17" * len(content))
    elif harm == "truncated":
        database.write_bytes(content[: len(content) // 2])
    else:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        if harm == "file":
            folder.write_text("not a folder")


def test_damaged_vectors_are_noticed_on_opening(story, tmp_path):
    """Chroma writes vectors to files of their own only beyond 1,000 entries."""
    story.commit(*(NewInsight(f"insight {i}", ()) for i in range(2100)))
    with Recall.open(tmp_path) as recall:
        recall.sync(story.ledger)
        size = len(recall)
    for path in (tmp_path / "recall").rglob("header.bin"):
        path.write_bytes(b"\x17" * 100)
    with pytest.raises(RecallUnavailable, match="society memory reindex"):
        Recall.open(tmp_path)
    with Recall.rebuild(tmp_path, story.ledger) as recall:
        assert len(recall) == size


def test_a_rebuilt_index_answers_the_same(story, tmp_path):
    with Recall.open(tmp_path) as recall:
        recall.sync(story.ledger)
        before = recall.search("warm down")
    with Recall.rebuild(tmp_path, story.ledger) as recall:
        assert [hit.id for hit in recall.search("warm down")] == [hit.id for hit in before]


# --- the embedder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("warm_down=0.3", "warm down 0.3"),
        ("lr=0.04", "learning rate 0.04"),
        ("matrixLr 1e-4", "matrix learning rate 1e-4"),
        ("the", "the"),
        ("", ""),
    ],
)
def test_names_are_split_into_words(text, plain):
    assert words(text) == plain


def test_vectors_are_unit_and_the_same_in_any_batch():
    texts = ["warm down", "a completely different sentence about cooking", ""]
    vectors = embedder().embed(texts)
    assert vectors.shape == (3, 256)
    assert (vectors**2).sum(axis=1) == pytest.approx([1, 1, 0])
    assert (embedder().embed(texts[:1])[0] == vectors[0]).all()


def test_missing_files_are_named(monkeypatch):
    monkeypatch.setattr(embed, "PACKAGE", "no-such-package")
    with pytest.raises(RecallUnavailable, match=r"no-such-package.*pip install"):
        embed.Embedder()


def test_the_package_itself_is_not_imported():
    code = (
        "import sys; from society.memory.embed import embedder; embedder();"
        "assert not {'wordllama', 'torch', 'chromadb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
