"""Scoring: which text, in which rows, counted how; and scores that cannot be."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from society.model import evaluate, gpt, train, weights
from society.model.data import EvalTokens, TrainTokens
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.records import Budget, BudgetKind, Split

TINY = Recipe(vocab=300, dim=32, depth=2, seq_len=32, batch_tokens=128, lr_scale=0.3)
BOS = 299
PUBLIC = evaluate.Scoring(tokens=64 * 20, seq_len=64)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    single_thread()


def split(count=3000, vocab=300):
    """Documents of 10 to 90 tokens, three bytes each."""
    rng = np.random.default_rng(1)
    tokens = (rng.zipf(1.3, count) % (vocab - 1)).astype(np.uint16)
    starts = np.cumsum([0, *rng.integers(10, 90, count // 50)])
    starts = starts[starts < count]
    tokens[starts] = vocab - 1
    lengths = np.full(vocab, 3, np.uint16)
    lengths[-1] = 0
    return EvalTokens(
        tokens, lengths, vocab, Split.VALIDATION, "test", starts, (30, len(starts) - 30)
    )


@pytest.fixture(scope="module")
def trained():
    tokens = TrainTokens(split(6000).tokens, 300, "test")
    return train.train(TINY, budget=Budget(BudgetKind.STEPS, 5), seed=1, tokens=tokens)


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    weights.save(trained, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("scoring", [evaluate.Scoring(), PUBLIC])
def test_an_untrained_model_scores_a_uniform_guess(saved, tmp_path, scoring):
    recipe, masters = weights.load(saved)
    save_file(
        dict(masters) | {"head": torch.zeros(300, 32)},
        tmp_path / "m",
        metadata={"recipe": recipe.model_dump_json()},
    )
    score = evaluate.evaluate(tmp_path / "m", split(), scoring=scoring)
    assert score.bytes == 3 * score.tokens
    assert score.bpb == pytest.approx(math.log2(300) / 3, rel=1e-5)


def test_special_tokens_count_in_neither_sum(saved):
    """The loss of predicting where a document ends is no property of the text."""
    tokens = split()
    rows = evaluate.scored_rows(TINY, tokens)
    targets = rows.blocks[:, 1:]
    assert (targets == BOS).any()
    assert not rows.counted[targets == BOS].any()
    score = evaluate.evaluate(saved, tokens)
    assert score.tokens == (tokens.tokens[1:] != BOS).sum()


def test_the_score_is_that_of_a_plain_sum(saved):
    """One row at a time, logits and log-softmax written out."""
    recipe, masters = weights.load(saved)
    tokens = split(600)
    nats = 0.0
    copy = gpt.working_copy(masters, grad=False)
    fixed = gpt.constants(recipe, torch.empty((), dtype=torch.bfloat16))
    rows = evaluate.scored_rows(recipe, tokens)
    for block, counted in zip(rows.blocks.astype(np.int64), rows.counted, strict=True):
        x = gpt.activations(recipe, copy, fixed, torch.from_numpy(block[None, :-1]))
        logits = 15 * torch.tanh((x @ copy["head"].T).float() / 15)
        each = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(block[1:]), reduction="none"
        )
        nats += each[torch.from_numpy(counted)].double().sum().item()
    expected = nats / math.log(2) / (3 * rows.counted.sum())
    assert evaluate.evaluate(saved, tokens).bpb == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [33, 64, 65, 1000])
def test_every_target_counts_once(count):
    tokens = split(count) if count > 200 else split(3000)
    tokens = EvalTokens(tokens.tokens[:count], tokens.token_bytes, 300, tokens.split, "test")
    rows = evaluate.scored_rows(TINY, tokens)
    targets = rows.blocks[:, 1:][rows.counted]
    assert targets.tolist() == [token for token in tokens.tokens[1:] if token != BOS]


def test_every_row_length_is_scored_on_the_same_text():
    tokens = split(60_000)
    found = set()
    for seq_len in (32, 64, 128):
        rows = evaluate.scored_rows(TINY.model_copy(update={"seq_len": seq_len}), tokens)
        found.add(tuple(rows.blocks[:, 1:][rows.counted].tolist()))
    assert len(found) == 1
    size = tokens.token_bytes[list(found.pop())].sum()
    assert evaluate.SCORED_BYTES - 10 <= size <= evaluate.SCORED_BYTES


def test_public_rows_are_those_of_the_public_loader(plain_best_fit):
    tokens = split(20_000)
    documents = np.split(tokens.tokens, tokens.starts[1:])
    expected = plain_best_fit(documents, tokens.groups, 20, 65)
    rows = evaluate.scored_rows(TINY.model_copy(update={"seq_len": 64}), tokens, PUBLIC)
    assert np.array_equal(rows.blocks, expected)
    assert np.array_equal(rows.counted, expected[:, 1:] != BOS)


@pytest.mark.parametrize("seq_len", [16, 24, 64, 100])
def test_public_targets_are_the_same_for_every_row_length(seq_len):
    tokens = split(20_000)
    whole = evaluate.scored_rows(TINY.model_copy(update={"seq_len": 64}), tokens, PUBLIC)
    rows = evaluate.scored_rows(TINY.model_copy(update={"seq_len": seq_len}), tokens, PUBLIC)
    assert rows.blocks.shape[1] == seq_len + 1
    expected = whole.blocks[:, 1:][whole.counted].tolist()
    assert rows.blocks[:, 1:][rows.counted].tolist() == expected


def test_filling_up_a_row_does_not_change_what_counts(saved, tmp_path):
    """A model with longer rows than the public ones predicts the same from the same text."""
    recipe, masters = weights.load(saved)
    longer = recipe.model_copy(update={"seq_len": 64, "window_pattern": "L"})
    short = evaluate.Scoring(tokens=320, seq_len=32)
    scores = []
    for number, one in enumerate((longer.model_copy(update={"seq_len": 32}), longer)):
        path = tmp_path / str(number)
        save_file(dict(masters), path, metadata={"recipe": one.model_dump_json()})
        scores.append(evaluate.evaluate(path, split(), scoring=short))
    assert scores[0].tokens == scores[1].tokens
    assert scores[0].bpb == pytest.approx(scores[1].bpb, rel=2e-3)


def test_the_batch_does_not_matter_beyond_rounding(saved, monkeypatch):
    whole = evaluate.evaluate(saved, split())
    monkeypatch.setitem(evaluate.BATCH_TOKENS, "cpu", 64)
    assert evaluate.evaluate(saved, split()).bpb == pytest.approx(whole.bpb, rel=1e-3)


def test_scoring_is_the_same_every_time(saved):
    assert evaluate.evaluate(saved, split()) == evaluate.evaluate(saved, split())


def test_scores_that_cannot_be_are_refused(saved):
    with pytest.raises(evaluate.BadScore, match="vocab=400"):
        evaluate.evaluate(saved, split(vocab=400))
    with pytest.raises(evaluate.BadScore, match="seq_len=32"):
        evaluate.evaluate(saved, EvalTokens(np.zeros(20, np.uint16), np.ones(300), 300, "x", "y"))
    for bpb in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(evaluate.BadScore, match="bits per byte"):
            evaluate._checked(evaluate.Bpb(bpb, 1, 1), saved)
