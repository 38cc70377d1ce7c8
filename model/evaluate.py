"""Bits per byte of a saved model: the harness's own code, run in another process than training.

Bits per byte = summed nats / (ln 2 x UTF-8 bytes), over the target tokens that stand for bytes. It
compares models with different vocabularies, because the text is counted in bytes. Special tokens
stand for none and count in neither sum, as in `evaluate_bpb` of github.com/karpathy/autoresearch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from society.errors import SocietyError
from society.model import gpt, kernels, packing
from society.model.data import EvalTokens
from society.model.recipe import Recipe
from society.model.weights import load

SCORED_BYTES = 100_000
"""The text that is scored by default: the first bytes of the split, the same for every recipe.

A fixed number of tokens would score recipes with a larger vocabulary on more, and other, text
(measured: up to .01 bits per byte between 1,024 and 2,048 tokens). At the default vocabulary this
is 32 thousand tokens.
"""
BATCH_TOKENS = {"cpu": 2_048, "cuda": 32_768}
"""Tokens in one forward pass; the score does not depend on it beyond rounding."""

Answer = Callable[[np.ndarray], Tensor]
"""A model but for its head: token ids (B, T), int64 -> final activations (B * T, width), bf16."""
Seen = Callable[[slice, Tensor, Tensor], None]
"""Which rows were answered, their activations, and the cross-entropy of each target in nats."""


class BadScore(SocietyError):
    """A model got a score that cannot be: not finite, or not above zero."""


@dataclass(frozen=True, slots=True)
class Bpb:
    """A score with what it was measured on."""

    bpb: float
    """Bits per byte, lower is better."""
    tokens: int
    """Target tokens scored."""
    bytes: int
    """UTF-8 bytes they stand for."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Which text a model is scored on, and how it is cut into rows."""

    tokens: int = 0
    """Targets in best-fit rows, each starting with a document, as the public benchmark does it; 0
    for the first `SCORED_BYTES` bytes of the split, documents one after the other."""
    seq_len: int = 2_048
    """Tokens of a best-fit row. A model with shorter rows reads each of them in pieces."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is fed to the model, and which of its predictions count."""

    blocks: np.ndarray
    """Token ids, (rows, T + 1): each row and the target of its last token."""
    counted: np.ndarray
    """Boolean, (rows, T): every target that stands for bytes counts once."""
    apart: np.ndarray
    """Boolean, (rows,): the row has no text in common with the one before."""


def evaluate(
    path: Path, tokens: EvalTokens, device: str = "cpu", scoring: Scoring = Scoring()
) -> Bpb:
    """Score a saved model on an evaluation split.

    Args:
        path: What `weights.save` wrote.
        tokens: The split in the model's vocabulary.
        device: A torch device.
        scoring: Which text is scored.

    Raises:
        BadWeights: The file is not a usable model.
        BadScore: The vocabularies differ, or the score is impossible.
    """
    recipe, masters = load(path)
    check_tokens(path, recipe, tokens)
    rows = scored_rows(recipe, tokens, scoring)
    answer, weights = model_of(recipe, masters, device)
    return scored(path, tokens, rows, summed_nats(recipe, weights["head"], rows, answer))


def scored(path: Path, tokens: EvalTokens, rows: Rows, nats: float) -> Bpb:
    """A score from the summed cross-entropy of the targets that count; raises `BadScore`."""
    targets = rows.blocks[:, 1:][rows.counted]
    size = int(tokens.token_bytes[targets].sum(dtype=np.int64))
    return _checked(Bpb(nats / (math.log(2) * size), targets.size, size), path)


def scored_rows(recipe: Recipe, tokens: EvalTokens, scoring: Scoring = Scoring()) -> Rows:
    """The scored text in rows of the recipe's length; the targets are the same for every length."""
    text = _public_rows(tokens, scoring) if scoring.tokens else _first_bytes(recipe, tokens)
    blocks, counted = _cut(text, recipe.seq_len)
    return Rows(blocks, counted & (tokens.token_bytes[blocks[:, 1:]] > 0), counted[:, 0])


def _first_bytes(recipe: Recipe, tokens: EvalTokens) -> np.ndarray:
    """The first bytes of the split as one long row: (1, tokens)."""
    start = tokens.tokens[: 2 * SCORED_BYTES]  # enough: no document is empty
    ends = tokens.token_bytes[start].cumsum(dtype=np.int64)
    last = max(recipe.seq_len, int(np.searchsorted(ends, SCORED_BYTES, side="right")) - 1)
    return tokens.tokens[None, : last + 1]


def _public_rows(tokens: EvalTokens, scoring: Scoring) -> np.ndarray:
    """The first best-fit rows of the split: (rows, seq_len + 1)."""
    lengths = packing.document_lengths(tokens.starts, len(tokens.tokens))
    arriving = packing.reading_order(tokens.groups or (len(lengths),))
    packer = packing.BestFit(tokens.starts, lengths, arriving, scoring.seq_len + 1)
    return packer.take(max(1, scoring.tokens // scoring.seq_len)).block(tokens.tokens)


def _cut(text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (rows, N + 1) as pieces of `length` tokens and their targets.

    The last piece of a row reaches back to be whole; what it has in common with the one before
    counts there. A row that is shorter than a piece is filled up at its end, where no prediction
    that counts can see it.
    """
    targets = text.shape[1] - 1
    if targets < length:
        text = np.pad(text, ((0, 0), (0, length - targets)))
    last = text.shape[1] - 1
    starts = np.minimum(np.arange(0, last, length), last - length)
    blocks = text[:, starts[:, None] + np.arange(length + 1)]  # (rows, pieces, length + 1)
    counted = np.ones((*blocks.shape[:2], length), dtype=bool)
    counted[:, -1, : len(starts) * length - last] = False
    if targets < length:
        counted[..., targets:] = False
    return blocks.reshape(-1, length + 1), counted.reshape(-1, length)


def model_of(recipe: Recipe, masters: gpt.Weights, device: str) -> tuple[Answer, gpt.Weights]:
    """A model's answers, and the working weights on the device that it computes them with."""
    on_device = {name: weight.to(device) for name, weight in masters.items()}
    weights = gpt.working_copy(on_device, grad=False)
    fixed = kernels.constants(recipe, torch.empty((), dtype=torch.bfloat16, device=device))

    def answer(ids: np.ndarray) -> Tensor:
        with torch.inference_mode():
            block = torch.from_numpy(ids).to(device)
            return gpt.activations(recipe, weights, fixed, block)

    return answer, weights


def batch_rows(recipe: Recipe, device: torch.device) -> int:
    """Rows that are scored at once."""
    return max(1, BATCH_TOKENS[device.type] // recipe.seq_len)


def summed_nats(
    recipe: Recipe, head: Tensor, rows: Rows, answer: Answer, seen: Seen | None = None
) -> float:
    """Summed cross-entropy of the targets that count, on the device of the head.

    Args:
        recipe: Its row length and soft cap.
        head: Output table in the working type, (vocab, width).
        rows: What is scored.
        answer: Asked one batch after the other, in order.
        seen: Told about each batch.
    """
    device = head.device
    batch = batch_rows(recipe, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for start in range(0, len(rows.blocks), batch):
            part = slice(start, start + batch)
            block = rows.blocks[part].astype(np.int64)
            x = answer(np.ascontiguousarray(block[:, :-1]))
            targets = torch.from_numpy(block[:, 1:].reshape(-1)).to(device)
            counted = torch.from_numpy(rows.counted[part]).to(device).flatten()
            each = kernels.operators(device).token_nats(x, head, targets, recipe.softcap)
            total += each.where(counted, 0.0).sum(dtype=torch.float64)
            if seen is not None:
                seen(part, x, each)
    return total.item()


def check_tokens(path: Path, recipe: Recipe, tokens: EvalTokens) -> None:
    """Raise `BadScore` if a model of this recipe cannot be scored on these tokens."""
    if tokens.vocab != recipe.vocab:
        raise BadScore(
            f"{path} has vocab={recipe.vocab}, the {tokens.split} tokens vocab={tokens.vocab}; "
            "load the split for the model's vocabulary."
        )
    if len(tokens.tokens) <= recipe.seq_len:
        raise BadScore(
            f"The {tokens.split} split holds {len(tokens.tokens)} tokens, less than one row of "
            f"seq_len={recipe.seq_len} and its target."
        )


def _checked(score: Bpb, path: Path) -> Bpb:
    if not math.isfinite(score.bpb) or score.bpb <= 0:
        raise BadScore(f"{path} scored {score.bpb} bits per byte, which no model can.")
    return score
