"""The semantic index: what is found, what is never indexed, and what happens when it breaks."""

import itertools
import os
import subprocess
import sys

import pytest

from society.errors import RecallUnavailable, UnknownName
from society.memory import embed
from society.memory.embed import embedder, words
from society.memory.frames import Memory
from society.memory.ledger import Ledger
from society.memory.prose import KINDS, OUTCOMES, Filter, Prose, changes
from society.memory.recall import EMBEDDED, Recall
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
    Noise,
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


@pytest.fixture(params=["embedded", "server"])
def at(request):
    """Where the index of a test lies; both modes keep the same promises."""
    if request.param == "server":
        return request.getfixturevalue("chroma_server").url
    return EMBEDDED


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


def test_the_right_record_is_among_the_first_three(story, tmp_path, at):
    with Recall.open(tmp_path, story.ledger, at=at) as recall:
        recall.sync(story.ledger)
        found = {query: [hit.text for hit in recall.search(query, k=3)] for query in QUERIES}
    missed = {q: found[q] for q, part in QUERIES.items() if not any(part in t for t in found[q])}
    assert not missed


def test_hits_and_kinds(story, tmp_path, at):
    with Recall.open(tmp_path, story.ledger, at=at) as recall:
        assert recall.search("anything") == ()
        assert recall.sync(story.ledger) == story.ledger.posted(0, 1000)[-1].seq
        assert recall.sync(story.ledger) == 0
        hits = recall.search("warm down", k=2, where=Filter(kinds=["claim", "verdict"]))
        assert {hit.id for hit in hits} == {"claim:c0001", "verdict:c0001"}
        assert hits[0].ref == "c0001"
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


def test_a_tested_hypothesis_replaces_its_passage(story, tmp_path, at):
    with Recall.open(tmp_path, story.ledger, at=at) as recall:
        recall.sync(story.ledger)
        before = len(recall)
        run = story.screen(variant(muon_momentum=0.97), 1.84)
        recall.sync(story.ledger)
        assert len(recall) == before + 1
        (hit,) = recall.search("momentum of Muon", k=1, where=Filter(kinds=["hypothesis"]))
        assert hit.passage.outcome == "tested"
        assert (
            f"Tested by ada in run {run.id}: screening improved the score by 0.00500, 1.84000 "
            "against 1.84500 of the champion."
        ) in hit.text


def test_a_dropped_hypothesis_says_why(story, tmp_path):
    story.commit(HypothesisDropped("h0001", "the champion moved on"))
    passages = {passage.id: passage for passage in Prose(story.ledger).all()}
    assert passages["hypothesis:h0001"].outcome == "dropped"
    assert "Dropped without a test: the champion moved on." in passages["hypothesis:h0001"].text
    assert passages["hypothesis:h0002"].outcome == "open"


def test_a_result_from_elsewhere_says_so(story):
    story.commit(NewPrior("results.tsv", "a1b2c3d", 0.9979, "keep", "set matrix_lr=0.04"))
    (told,) = [one for one in Prose(story.ledger).all() if one.kind == "prior"]
    assert told.text == (
        "Elsewhere, not verified here (results.tsv, a1b2c3d): set matrix_lr=0.04 "
        "[keep, score 0.99790]"
    )
    assert told.knobs == {"matrix_lr"}
    assert (told.agent, told.outcome) == ("", "")


def test_outcomes_and_knobs_are_seen_from_the_champion_of_then(story):
    """A noise floor that is measured later changes nothing that was said before."""
    before = {one.id: one for one in Prose(story.ledger).all()}
    outcome = {one.text.split(" (")[0].split(":")[0]: one.outcome for one in before.values()}
    assert outcome["Tried baseline"] == "completed"
    assert outcome["Tried warm_down=0.4"] == "better"
    assert outcome["Tried depth=6"] == "worse"
    assert outcome["Tried matrix_lr=0.4"] == "diverged"
    assert outcome["Tried z_loss=0.001"] == "within_noise"
    assert before["verdict:c0001"].outcome == "accepted"
    story.commit(Noise("toy/cpu", "cpu-A", 0.01, 0.008, 0.012, 8))
    accepted = story.ledger.claims()[0]
    story.commit(Crown(accepted.variant, accepted.id, "r00002"))
    run = story.screen(variant(warm_down=0.4, depth=5), 1.843)
    after = {one.id: one for one in Prose(story.ledger).all()}
    assert {id: after[id] for id in before} == before
    assert after[f"run:{run.id}"].outcome == "within_noise"
    assert after[f"run:{run.id}"].knobs == {"depth"}
    assert after["claim:c0001"].knobs == {"warm_down"}


FILTERS = [
    Filter(),
    *(Filter(kinds=[kind]) for kind in KINDS),
    *(Filter(outcome=outcome) for outcome in OUTCOMES),
    Filter(kinds=["run", "verdict"], outcome="rejected"),
    Filter(knob="warm_down"),
    Filter(knob="warm_down", kinds=["run"]),
    Filter(knob="warm_down", outcome="accepted"),
    Filter(knob="warm_down", outcome="worse"),
    Filter(knob="no_such_knob"),
    Filter(agent="cyd"),
    Filter(agent="ada", outcome="completed", knob="depth"),
]


def test_filters_mean_the_same_with_and_without_an_index(story, tmp_path, at, monkeypatch):
    """Also where Chroma applies them, which happens when few of the nearest passages pass."""
    story.commit(NewPrior("results.tsv", "a1b2c3d", None, "crash", "set depth=40"))
    times = sorted(one.at for one in Prose(story.ledger).all())
    middle = times[len(times) // 2]
    ranges = [Filter(since=middle), Filter(until=middle), Filter(since=times[3], until=middle)]
    with (
        Recall.open(tmp_path, story.ledger, at=at) as recall,
        Memory(tmp_path) as memory,
    ):
        recall.sync(story.ledger)
        for where in [*FILTERS, *ranges]:
            scanned = memory.search("warm down", 1000, where=where)
            expected = {
                (one.kind, one.ref) for one in Prose(story.ledger).all() if where.accepts(one)
            }
            assert set(zip(scanned["kind"], scanned["ref"], strict=True)) == expected, where
            for nearest in ((64, 300), (1,), ()):
                monkeypatch.setattr("society.memory.recall.NEAREST", nearest)
                hits = recall.search("warm down", 1000, where)
                assert {(hit.kind, hit.ref) for hit in hits} == expected, (where, nearest)
                first = recall.search("warm down", 2, where)
                assert [hit.id for hit in first] == [hit.id for hit in hits[:2]]


def test_unknown_kinds_and_outcomes_are_named(story, tmp_path):
    with Recall.open(tmp_path) as recall, Memory(tmp_path) as memory:
        for search in (recall.search, memory.search):
            with pytest.raises(UnknownName, match=r"nonsense.*hypothesis"):
                search("x", 1, where=Filter(kinds=["nonsense"]))
            with pytest.raises(UnknownName, match=r"good.*within_noise"):
                search("x", 1, where=Filter(outcome="good"))


def test_what_is_indexed_comes_back_whole(story, tmp_path, at):
    story.commit(NewPrior("results.tsv", "a1b2c3d", None, "crash", "set depth=40"))
    with Recall.open(tmp_path, story.ledger, at=at) as recall:
        assert recall.behind(story.ledger) == story.ledger.posted_last() > 20
        recall.sync(story.ledger)
        assert recall.behind(story.ledger) == 0
        assert recall.passages() == {one.id: one for one in Prose(story.ledger).all()}


def test_off_is_off(tmp_path):
    with pytest.raises(RecallUnavailable, match="--recall embedded"):
        Recall.open(tmp_path, at="off")


def test_a_folder_with_the_index_of_another_ledger_is_filled_anew(story, tmp_path):
    with Recall.open(tmp_path) as recall:
        recall.sync(story.ledger)
    other = Story(_folder(tmp_path / "other"))
    run = other.screen(BASELINE, 1.9)
    with Recall.open(tmp_path) as recall:
        recall.sync(other.ledger)
        assert set(recall.passages()) == {f"run:{run.id}"}
    other.ledger.close()


def _folder(path):
    path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_cursor_never_moves_backwards(tmp_path, kind, request):
    url = request.getfixturevalue("postgres_url") if kind == "postgres" else None
    with Ledger.open(url or tmp_path / "ledger.sqlite") as ledger:
        assert ledger.cursor("recall:x") == 0
        for seq, reached in ((7, 7), (3, 7), (9, 9), (9, 9)):
            ledger.set_cursor("recall:x", seq)
            assert ledger.cursor("recall:x") == reached
        assert ledger.cursor("recall:y") == 0


def test_a_crash_between_index_and_cursor_repeats_nothing(story, tmp_path, at, monkeypatch):
    with Recall.open(tmp_path, story.ledger, at=at) as recall:
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


def test_a_rebuilt_index_answers_the_same(story, tmp_path, at):
    with Recall.open(tmp_path, story.ledger, at=at) as recall:
        recall.sync(story.ledger)
        before = recall.search("warm down")
    with Recall.rebuild(tmp_path, story.ledger, at=at) as recall:
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


def test_words_are_looked_up_as_the_tokenizer_would_read_them(story):
    """Word by word, and the whole text at once: the same tokens."""
    texts = [passage.text for passage in Prose(story.ledger).all()]
    texts += ["", "the", "a an", "lr 1e-10, 3.5e-4, 524288", "naïve matrixLr2B x_y 0.04 FFN bpb"]
    whole = embedder()._tokenizer.encode_batch([words(one) for one in texts],
                                               add_special_tokens=False)  # fmt: skip
    assert [embedder().tokens(one) for one in texts] == [encoding.ids for encoding in whole]


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
