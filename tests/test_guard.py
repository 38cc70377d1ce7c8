"""The guard: the same score for honest models, and every way of knowing too much is found."""

import contextlib
import math
import os
import select
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from society.experiments.channel import HEADER, MAGIC, ArrayChannel
from society.experiments.pretrain import MODEL_FILE, Pretrain
from society.experiments.task import Refused
from society.model import evaluate, guard, train, weights
from society.model.data import EvalTokens, TrainTokens
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.records import Budget, BudgetKind, Split

TINY = Recipe(vocab=300, dim=32, depth=2, seq_len=32, batch_tokens=128, lr_scale=0.3)
SCORING = evaluate.Scoring()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    single_thread()


def text(count=20_000, seed=1):
    """Tokens of which many follow from the one before."""
    rng = np.random.default_rng(seed)
    tokens = (rng.zipf(1.3, count) % 299).astype(np.int64)
    for i in range(1, count):
        if rng.random() < 0.5:
            tokens[i] = (tokens[i - 1] * 7 + 3) % 299
    return tokens.astype(np.uint16)


@pytest.fixture(scope="module")
def tokens():
    lengths = np.full(300, 3, np.uint16)
    lengths[-1] = 0
    return EvalTokens(text(), lengths, 300, Split.HOLDOUT, "test")


@pytest.fixture(scope="module")
def trained():
    return train.train(
        TINY,
        budget=Budget(BudgetKind.STEPS, 60),
        seed=1,
        tokens=TrainTokens(text(seed=2), 300, "test"),
    )


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / MODEL_FILE
    weights.save(trained, path)
    return path


class Model:
    """An honest model, or one that cheats by `trick`, which sees all it could see."""

    def __init__(self, path, recipe=TINY, trick=None):
        answer, working = evaluate.model_of(recipe, weights.load_changed(path, recipe), "cpu")
        self.recipe, self.answer, self.trick = recipe, answer, trick
        self.head = working["head"]
        self.calls = 0

    def __call__(self, ids):
        self.calls += 1
        x = self.answer(ids)
        if self.trick is None:
            return x
        x = x.clone().view(*ids.shape, -1)
        return self.trick(self, torch.from_numpy(ids), x).reshape(ids.size, -1)


def judged(path, tokens, first, second, seed=0, recipe=TINY):
    models = (first, second)
    rng = np.random.default_rng(seed)
    return guard.judge(path, recipe, tokens, "cpu", SCORING, models, rng)


def both(saved, tokens, trick, seed=0, behaves=False):
    """A cheater as both models; `behaves`: the second one is honest."""
    second = Model(saved, trick=None if behaves else trick)
    return judged(saved, tokens, Model(saved, trick=trick), second, seed)


# --------------------------------------------------------------------------------- honest

SHAPES = (
    {},
    {"seq_len": 16},
    {"depth": 1, "activation": "swiglu"},
    {"optimizer": "adamw", "norm_placement": "sandwich"},
    {"dim": 48, "heads": 3, "tie_embeddings": True},
    {"seq_len": 128, "value_embeds": "off", "residual_scalars": "off"},
)


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_honest_models_pass_with_the_bits_of_the_plain_score(change, tokens, tmp_path):
    recipe = Recipe(**TINY.model_dump() | change)
    steps = Budget(BudgetKind.STEPS, 5)
    data = TrainTokens(text(seed=2), 300, "test")
    weights.save(train.train(recipe, budget=steps, seed=3, tokens=data), tmp_path / MODEL_FILE)
    plain = evaluate.evaluate(tmp_path / MODEL_FILE, tokens)
    for seed in range(4):
        path = tmp_path / MODEL_FILE
        models = Model(path, recipe), Model(path, recipe)
        assert judged(path, tokens, *models, seed, recipe) == plain


def test_no_bit_of_an_honest_answer_differs(saved, tokens, monkeypatch):
    """Which is why the tolerances never matter on a CPU."""
    none = guard.Tolerance(0.0, 0.0)
    monkeypatch.setitem(guard.TOLERANCES, "cpu", none)
    for seed in range(20):
        judged(saved, tokens, Model(saved), Model(saved), seed)


def test_short_texts_and_few_rows_are_judged_too(saved, tokens):
    for count in (33, 40, 65, 100, 500):
        short = EvalTokens(tokens.tokens[:count], tokens.token_bytes, 300, tokens.split, "t")
        assert judged(saved, short, Model(saved), Model(saved)) == evaluate.evaluate(saved, short)


def test_public_rows_are_judged_too(saved, tokens):
    scoring = evaluate.Scoring(tokens=64 * 20, seq_len=64)
    starts = np.arange(0, len(tokens.tokens), 50)
    split = EvalTokens(tokens.tokens, tokens.token_bytes, 300, tokens.split, "t", starts)
    models = Model(saved), Model(saved)
    found = guard.judge(saved, TINY, split, "cpu", scoring, models)
    assert found == evaluate.evaluate(saved, split, scoring=scoring)


# -------------------------------------------------------------------------------- cheaters


def peek(model, ids, x, where=None, share=0.3):
    """Lean towards the next token's row of the head, at some positions."""
    ahead = torch.nn.functional.pad(model.head[ids[:, 1:]], (0, 0, 0, 1))
    ahead = ahead / ahead.float().norm(dim=-1, keepdim=True).clamp_min(1e-6).to(ahead.dtype)
    size = x.float().norm(dim=-1, keepdim=True).to(x.dtype)
    lean = x + share * size * ahead
    return lean if where is None else torch.where(where[..., None], lean, x)


def last_peek(model, ids, x):
    """The last position of a row peeks at the first token of the next row."""
    following = torch.roll(model.head[ids[:, 0]], -1, 0)
    return torch.cat([x[:, :-1], x[:, -1:] + 30 * following[:, None]], 1)


def convolution(model, ids, x):
    """A convolution with padding on both sides."""
    return (x + torch.roll(x, -1, 1) / 8) * 1.0


def batch_statistics(model, ids, x):
    return x - x.float().mean((0, 1)).to(x.dtype) / 8


def row_statistics(model, ids, x):
    return x - x.float().mean(1, keepdim=True).to(x.dtype) / 8


def longer_context(model, ids, x):
    """The start of a row uses the row before."""
    before = torch.roll(x[:, -1:], 1, 0)
    return torch.cat([x[:, :4] + before / 4, x[:, 4:]], 1)


def remembers(model, ids, x):
    """What was asked before moves the answers."""
    return x * (1 + model.calls / 64)


def by_chance(model, ids, x):
    return x + torch.randn_like(x) / 4


BLATANT = (
    peek,
    convolution,
    batch_statistics,
    row_statistics,
    longer_context,
    remembers,
    by_chance,
)


@pytest.mark.parametrize("behaves", [False, True])
@pytest.mark.parametrize("trick", [*BLATANT, last_peek])
def test_whatever_an_answer_must_not_depend_on_is_found(trick, behaves, saved, tokens):
    for seed in range(3):
        with pytest.raises(guard.Dishonest):
            both(saved, tokens, trick, seed, behaves)


def test_the_reason_names_the_rule(saved, tokens):
    with pytest.raises(guard.Dishonest, match="the future"):
        both(saved, tokens, peek)
    with pytest.raises(guard.Dishonest, match="other rows"):
        both(saved, tokens, batch_statistics)


def rarely(share, salt=1):
    """Peek at a share of the positions, chosen by what is read there."""

    def trick(model, ids, x):
        before = torch.roll(ids, 1, 1)
        draw = ((ids * 7919 + before * 104_729 + salt * 31) % 1000) / 1000
        return peek(model, ids, x, where=draw < share, share=0.1)

    return trick


def caught(saved, tokens, trick, times):
    count = 0
    for seed in range(times):
        try:
            both(saved, tokens, trick, seed, behaves=True)
        except guard.Dishonest:
            count += 1
    return count / times


def test_rare_peeking_is_caught_as_often_as_is_said(saved, tokens):
    """1 - (1 - r)^n by the uniform cuts alone; here they are 110 or so of 128 rows."""
    cuts = guard.PROBES - guard.TARGETED
    for share, times in ((0.05, 8), (0.02, 16)):
        expected = 1 - (1 - share) ** cuts
        noise = 3 * math.sqrt(expected * (1 - expected) / times) + 0.05
        assert caught(saved, tokens, rarely(share), times) >= expected - noise


def test_rare_but_large_gains_are_looked_for(saved, tokens):
    """Certainty about rare tokens at 0.2 % of the positions: uniform cuts alone find it in 20 %."""

    def trick(model, ids, x):
        draw = (ids * 7919 + torch.roll(ids, 1, 1) * 104_729) % 1000 < 30
        rare = torch.nn.functional.pad(ids[:, 1:], (0, 1)) > 100
        return peek(model, ids, x, where=draw & rare, share=20.0)

    assert caught(saved, tokens, trick, 10) >= 0.9


def test_a_small_gain_everywhere_is_found_by_its_mean(saved, tokens):
    def trick(model, ids, x):
        return peek(model, ids, x, share=0.004)

    with pytest.raises(guard.Dishonest):
        both(saved, tokens, trick, behaves=True)


def test_answers_that_make_no_number_are_others(saved, tokens, tmp_path):
    """Finite activations and a finite head whose product is none: NaN is never above a bound."""
    head = weights.load(saved)[1]["head"].clone()
    head[299, -1] = 3.4e38  # infinite in bf16; the text has no such token
    path = broken(saved, tmp_path, head=head)

    def first(model, ids, x):
        x = peek(model, ids, x)
        x[..., -1] = -1
        return x

    def second(model, ids, x):
        x[..., -1] = 0
        return x

    cheaters = Model(path, trick=first), Model(path, trick=second)
    for cheater in cheaters:
        cheater.head = torch.nan_to_num(cheater.head, posinf=0)
    with pytest.raises(guard.Dishonest, match="inf nats"):
        judged(path, tokens, *cheaters)


# ------------------------------------------------------------------- what a model is shown


class Watcher(Model):
    """Keeps all it was asked."""

    def __init__(self, path):
        super().__init__(path)
        self.asked = []

    def __call__(self, ids):
        self.asked.append(ids.copy())
        return super().__call__(ids)


def test_the_second_model_never_sees_how_a_row_goes_on(saved):
    """Every token of this text occurs once, so that a leak could not hide."""
    unique = np.arange(4_000, dtype=np.uint16)
    recipe = Recipe(**TINY.model_dump() | {"vocab": 4_000, "dim": 8, "heads": 2})

    def model(ids):
        return torch.zeros(ids.size, recipe.width, dtype=torch.bfloat16)

    split = EvalTokens(unique, np.full(4_000, 30, np.uint16), 4_000, Split.HOLDOUT, "t")
    rows = evaluate.scored_rows(recipe, split)
    rng = np.random.default_rng(1)
    memory = guard._Memory(rows, rng)
    head = torch.zeros(4_000, 8, dtype=torch.bfloat16)
    evaluate.summed_nats(recipe, head, rows, model, memory.see)
    exam = guard._Examination(recipe, head, rows, memory.held(), model, rng)
    probes = exam._probes(guard._shares(split))
    questions = exam._questions(probes)
    shown = set(questions.flatten().tolist())
    for question, probe in zip(questions, probes, strict=True):
        block = rows.blocks[probe.row]
        assert question[: probe.cut + 1].tolist() == block[: probe.cut + 1].tolist()
        assert int(block[probe.cut + 1]) not in shown
    assert len({probe.row for probe in probes}) == len(probes) > 80
    assert len({probe.cut for probe in probes}) > 20


def test_questions_are_as_large_as_the_first_ones_and_cuts_are_secret(saved, tokens):
    sizes, asked = set(), []
    for seed in (1, 2):
        first, second = Watcher(saved), Watcher(saved)
        judged(saved, tokens, first, second, seed)
        sizes |= {ids.shape for ids in second.asked}
        assert sizes <= {ids.shape for ids in first.asked}
        asked.append(np.concatenate(second.asked))
    assert not np.array_equal(asked[0], asked[1])


# ---------------------------------------------------------------------- what is saved and sent


def broken(saved, tmp_path, **changes):
    found = dict(weights.load(saved)[1]) | changes
    save_file({n: w for n, w in found.items() if w is not None}, tmp_path / MODEL_FILE)
    return tmp_path / MODEL_FILE


def test_a_changed_model_may_have_parameters_of_its_own(saved, tmp_path):
    path = broken(saved, tmp_path, extra=torch.zeros(7), swept=torch.ones(3, 3, 3))
    found = weights.load_changed(path, TINY)
    assert found["extra"].shape == (7,)
    assert found["swept"].sum() == 27


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head": torch.zeros(300, 16)}, "head"),
        ({"head": None}, "head"),
        ({"head": torch.zeros(300, 32).double()}, "float32"),
        ({"extra": torch.tensor([math.nan])}, "finite"),
        ({"extra": torch.zeros(4_000_000)}, "bytes"),
        ({"extra": torch.zeros(3, dtype=torch.int64)}, "float32"),
    ],
)
def test_unusable_weights_are_refused(change, words, saved, tmp_path):
    with pytest.raises(weights.BadWeights, match=words):
        weights.load_changed(broken(saved, tmp_path, **change), TINY)


def test_only_plain_files_of_the_right_form_are_read(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pickled").write_bytes(b"\x80\x04K\x01." * 9)
    (tmp_path / "header").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    (tmp_path / "short").write_bytes(saved.read_bytes()[:-5])
    for name in ("link", "pipe", "pickled", "header", "short", "absent"):
        with pytest.raises(weights.BadWeights):
            weights.load_changed(tmp_path / name, TINY)


def pair(**settings):
    one, other = (end.detach() for end in socket.socketpair())
    return ArrayChannel(one, one, **settings), ArrayChannel(other, other)


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "float32"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (4, 3, 2, 1)])
def test_arrays_arrive_as_they_were_sent(dtype, shape):
    one, other = pair()
    array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    with one, other:
        one.send(array)
        found = other.receive()
        assert found.dtype == array.dtype
        assert found.shape == shape
        assert np.array_equal(found, array)
        one.close()
        assert other.receive() is None


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x80\x04K\x01." + bytes(40), "no array"),
        (HEADER.pack(MAGIC, 9, 1, 0, 1, 0, 0, 0), "no array"),
        (HEADER.pack(MAGIC, 0, 5, 0, 1, 1, 1, 1), "no array"),
        (HEADER.pack(MAGIC, 0, 1, 0, 1, 7, 0, 0), "malformed"),
        (HEADER.pack(MAGIC, 0, 2, 0, 1 << 62, 4, 0, 0), "bytes"),
        (HEADER.pack(MAGIC, 0, 2, 0, 1 << 62, 0, 0, 0), "bytes"),
        (HEADER.pack(MAGIC, 0, 1, 0, 1001, 0, 0, 0), "8008 bytes"),
        (HEADER.pack(MAGIC, 0, 1, 0, 9, 0, 0, 0) + bytes(5), "middle"),
        (HEADER.pack(MAGIC, 0, 1, 0, 9, 0, 0, 0)[:7], "middle"),
    ],
)
def test_anything_else_is_refused(raw, words):
    one, other = socket.socketpair()
    handle = other.detach()
    with one, ArrayChannel(handle, handle, most_bytes=8000) as channel:
        one.sendall(raw)
        one.close()
        with pytest.raises(Refused, match=words):
            channel.receive()


def test_nobody_waits_beyond_the_deadline():
    one, other = pair(deadline=time.monotonic() + 0.05)
    with one, other:
        with pytest.raises(Refused, match="too long"):
            one.receive()
        with pytest.raises(Refused, match="too long"):
            one.send(np.zeros(10_000_000, np.int64))
        other.close()


def test_a_line_is_hung_up_before_the_next_one_is_used():
    """Also where another process holds a copy of its end."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ArrayChannel(os.dup(ours.fileno()), os.dup(ours.fileno())) as first:
        reading, writing = os.pipe()
        with ArrayChannel(reading, writing, after=first) as second:
            assert not select.select([theirs], [], [], 0)[0]
            second.send(np.zeros(1, np.int64))
            assert theirs.recv(1) == b""


def test_what_cannot_be_sent_is_refused():
    one, other = pair()
    with one, other:
        for array in (np.zeros(3, complex), np.zeros((1,) * 5, np.int64), np.array([object()])):
            with pytest.raises(Refused, match="cannot be sent"):
                one.send(array)
        other.close()
        with pytest.raises(Refused, match="left"):
            one.send(np.zeros(1_000_000, np.int64))


# ------------------------------------------------------------------------------- the task


@pytest.fixture
def task(tokens):
    found = Pretrain("cpu")
    found._eval[300, Split.HOLDOUT] = tokens
    return found


def served(task, saved, answers=(None, None)):
    """The score of a task whose models are threads; `answers` alters what they send."""
    ends, threads = [], []

    def serve(channel, alter):
        class Altered:
            receive = staticmethod(channel.receive)

            def send(self, array):
                channel.send(array if alter is None else alter(array))

        with channel, contextlib.suppress(Refused):  # the other side left
            task.serve(saved.parent, TINY, "cpu", Altered())

    for alter in answers:
        ours, theirs = pair(deadline=time.monotonic() + 60)
        ends.append(ours)
        threads.append(threading.Thread(target=serve, args=(theirs, alter)))
        threads[-1].start()
    try:
        return task.judge(saved.parent, TINY, Split.HOLDOUT, "cpu", (ends[0], ends[1]))
    finally:
        for end in ends:
            end.close()
        for thread in threads:
            thread.join(60)


def test_a_served_model_has_the_score_of_the_plain_one(task, saved):
    assert served(task, saved) == task.score(saved.parent, TINY, Split.HOLDOUT, "cpu")


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda x: x[:-1], "shape"),
        (lambda x: x[:, :-1], "shape"),
        (lambda x: np.concatenate([x, x]), "bytes"),
        (lambda x: x.astype(np.float32), "bytes"),
        (lambda x: x[: len(x) // 4].astype(np.int64), "int64"),
        (lambda x: np.full_like(x, 0x7F80), "not finite"),
        (lambda x: np.full_like(x, 0x7FC0), "not finite"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_impossible_answers_are_refused(alter, words, place, task, saved):
    answers = [None, None]
    answers[place] = alter
    with pytest.raises(Refused, match=words):
        served(task, saved, tuple(answers))
