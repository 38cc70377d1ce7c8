"""Bits per byte of a saved model: the harness's own code, run in another process than training.

Bits per byte = summed nats / (ln 2 x UTF-8 bytes of the target tokens). It compares models with
different vocabularies, because the text is counted in bytes; BOS stands for none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from society.errors import SocietyError
from society.model import gpt, ops
from society.model.data import EvalTokens
from society.model.recipe import Recipe
from society.model.weights import load

SCORED_BYTES = 100_000
"""The text that is scored: the first bytes of the split, the same for every recipe.

A fixed number of tokens would score recipes with a larger vocabulary on more, and other, text
(measured: up to .01 bits per byte between 1,024 and 2,048 tokens). At the default vocabulary this
is 32 thousand tokens.
"""
BATCH_TOKENS = 2_048
"""Tokens in one forward pass; the score does not depend on it beyond rounding."""


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
class Rows:
    """What is fed to the model, and which of its predictions count."""

    blocks: Tensor
    """Token ids, int64, (rows, T + 1): each row and the target of its last token."""
    counted: Tensor
    """Boolean, (rows, T): every target counts once."""


def evaluate(path: Path, tokens: EvalTokens, device: str = "cpu") -> Bpb:
    """Score a saved model on an evaluation split.

    Rows of `seq_len` tokens are contiguous, so every token but the first is a target once.

    Args:
        path: What `weights.save` wrote.
        tokens: The split in the model's vocabulary.
        device: A torch device.

    Raises:
        BadWeights: The file is not a usable model.
        BadScore: The vocabularies differ, or the score is impossible.
    """
    recipe, masters = load(path)
    _check(path, recipe, tokens)
    on_device = {name: weight.to(device) for name, weight in masters.items()}
    weights = gpt.working_copy(on_device, grad=False)
    fixed = gpt.constants(recipe, torch.empty((), dtype=torch.bfloat16, device=device))
    rows = scored_rows(recipe, tokens)
    batch = max(1, BATCH_TOKENS // recipe.seq_len)
    nats = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows.blocks), batch):
            part = slice(start, start + batch)
            each = _nats(recipe, weights, fixed, rows.blocks[part].to(device))
            nats += each[rows.counted[part].flatten().to(device)].sum(dtype=torch.float64).item()
    targets = rows.blocks[:, 1:][rows.counted].numpy()
    size = int(tokens.token_bytes[targets].sum(dtype=np.int64))
    return _checked(Bpb(nats / (math.log(2) * size), targets.size, size), path)


def scored_rows(recipe: Recipe, tokens: EvalTokens) -> Rows:
    """Contiguous rows over the scored text; the last one reaches back to be whole."""
    length = recipe.seq_len
    ends = tokens.token_bytes[tokens.tokens].cumsum(dtype=np.int64)
    last = max(length, int(np.searchsorted(ends, SCORED_BYTES, side="right")) - 1)
    starts = np.minimum(np.arange(0, last, length), last - length)[:, None]
    blocks = tokens.tokens[starts + np.arange(length + 1)].astype(np.int64)
    counted = np.ones((len(starts), length), dtype=bool)
    counted[-1, : len(starts) * length - last] = False
    return Rows(torch.from_numpy(blocks), torch.from_numpy(counted))


def _nats(recipe: Recipe, weights: gpt.Weights, fixed: gpt.Constants, block: Tensor) -> Tensor:
    """Cross-entropy of a block's targets: (B, T + 1) -> (B * T,)."""
    x = gpt.activations(recipe, weights, fixed, block[:, :-1])
    return ops.token_nats(x, weights["head"], block[:, 1:].reshape(-1), recipe.softcap)


def _check(path: Path, recipe: Recipe, tokens: EvalTokens) -> None:
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
