"""One training run: a recipe, a budget, a seed and the train tokens in; a trained model out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from society.errors import SocietyError
from society.model import gpt, ops
from society.model.data import TrainTokens, row_order
from society.model.flops import flops_per_step, planned_steps
from society.model.init import initial_weights
from society.model.optim import Optimizer
from society.model.recipe import Recipe
from society.records import Budget

CURVE_POINTS = 64
GRACE = 0.25
"""Share of the run in which a high loss is not yet called divergence."""

OnStep = Callable[[int, float, float], None]
"""Called after each step with its number (from 1), loss in nats per token, and progress."""


class Diverged(SocietyError):
    """Training left the region where it can recover. Carries `step` and `loss`."""

    def __init__(self, step: int, loss: float, limit: float) -> None:
        """`limit` is the loss that was still allowed, in nats per token."""
        self.step, self.loss = step, loss
        super().__init__(
            f"Training diverged at step {step}: loss {loss:.3f} nats per token, at most "
            f"{limit:.3f} allowed. Lower the learning rates or warm up longer."
        )


class BadTokens(SocietyError):
    """The tokens do not fit the recipe."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of one training run."""

    recipe: Recipe
    weights: gpt.Weights
    """fp32 master weights on the CPU, name -> tensor."""
    steps: int
    tokens: int
    """Training tokens seen."""
    flops: float
    """FLOPs charged, the optimiser's matrix products included."""
    train_s: float
    """Wall-clock seconds of the training loop."""
    curve: tuple[float, ...]
    """Training loss in nats per token, thinned evenly to at most 64 points."""


class _Clock:
    """How much of the budget is used: by steps where bits matter, by seconds where asked."""

    def __init__(self, recipe: Recipe, budget: Budget) -> None:
        self.started = time.perf_counter()
        self._planned = planned_steps(recipe, budget)
        self._seconds = budget.amount

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def progress(self, step: int) -> float:
        """Share of the run done before this step (counted from 0); 1 or more when it is over."""
        if self._planned is None:
            return self.elapsed_s / self._seconds if step else 0.0
        return step / self._planned


def train(
    recipe: Recipe,
    *,
    budget: Budget,
    seed: int,
    tokens: TrainTokens,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Trained:
    """Train one model; the same arguments give the same bits on one CPU thread.

    A budget in seconds counts wall-clock time and gives up that guarantee.

    Args:
        recipe: What to train and how.
        budget: At least one step is taken, and never more than fit.
        seed: Decides the initial weights and the order of the data.
        tokens: The train split in the recipe's vocabulary.
        device: A torch device, e.g. `cpu` or `cuda`.
        on_step: Observer; may raise to stop the run.

    Raises:
        Diverged: The loss is not finite, or above log(vocab) + 1 after the first quarter.
        BadTokens: The tokens have another vocabulary or are fewer than one batch.
    """
    _check(recipe, budget, tokens)
    initial = {name: w.to(device) for name, w in initial_weights(recipe, seed).items()}
    optimizer = Optimizer(recipe, initial)
    fixed = gpt.constants(recipe, torch.empty((), dtype=torch.bfloat16, device=device))
    data = batches(recipe, tokens, seed)
    losses: list[float] = []
    clock = _Clock(recipe, budget)
    while (progress := clock.progress(len(losses))) < 1:
        nats, grads = _gradients(recipe, optimizer.masters, fixed, next(data).to(device))
        optimizer.step(grads, progress)
        losses.append(nats)
        _stop_if_diverged(recipe, losses, progress)
        if on_step is not None:
            on_step(len(losses), nats, progress)
    return Trained(
        recipe=recipe,
        weights={name: w.detach().cpu().clone() for name, w in optimizer.masters.items()},
        steps=len(losses),
        tokens=len(losses) * recipe.batch_tokens,
        flops=float(len(losses) * flops_per_step(recipe)),
        train_s=clock.elapsed_s,
        curve=thinned(losses),
    )


def batches(recipe: Recipe, tokens: TrainTokens, seed: int) -> Iterator[Tensor]:
    """Endless batches of shuffled contiguous rows: int64, (rows, T + 1), targets shifted by one."""
    length = recipe.seq_len
    count = (len(tokens.tokens) - 1) // length
    reach = np.arange(length + 1)
    waiting = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        while len(waiting) < recipe.rows:
            waiting = np.concatenate([waiting, row_order(count, seed, epoch)])
            epoch += 1
        taken, waiting = waiting[: recipe.rows], waiting[recipe.rows :]
        block = tokens.tokens[taken[:, None] * length + reach]
        yield torch.from_numpy(block.astype(np.int64))


def thinned(losses: list[float]) -> tuple[float, ...]:
    """At most 64 evenly spaced losses, the first and the last included."""
    if len(losses) <= CURVE_POINTS:
        return tuple(losses)
    places = np.linspace(0, len(losses) - 1, CURVE_POINTS).round().astype(int)
    return tuple(losses[i] for i in places)


def _gradients(
    recipe: Recipe, masters: gpt.Weights, fixed: gpt.Constants, block: Tensor
) -> tuple[float, gpt.Weights]:
    """Loss in nats per token and the gradient of the objective by every weight."""
    weights = gpt.working_copy(masters, grad=True)
    x = gpt.activations(recipe, weights, fixed, block[:, :-1])
    terms = ops.LossTerms(recipe.softcap, recipe.label_smoothing, recipe.z_loss)
    loss, nats = ops.head_loss(x, weights["head"], block[:, 1:].reshape(-1), terms)
    grads = torch.autograd.grad(loss, list(weights.values()))
    return nats.item(), dict(zip(weights, grads, strict=True))


def _stop_if_diverged(recipe: Recipe, losses: list[float], progress: float) -> None:
    limit = math.log(recipe.vocab) + 1
    loss = losses[-1]
    if not math.isfinite(loss) or (progress >= GRACE and loss > limit):
        raise Diverged(len(losses), loss, limit)


def _check(recipe: Recipe, budget: Budget, tokens: TrainTokens) -> None:
    if not budget.amount > 0 or not math.isfinite(budget.amount):
        raise BadTokens(f"A budget must be positive and finite, not {budget.amount}.")
    if tokens.vocab != recipe.vocab:
        raise BadTokens(
            f"The tokens have vocab={tokens.vocab}, the recipe vocab={recipe.vocab}; prepare and "
            "load the data for the recipe's vocabulary."
        )
    if len(tokens.tokens) <= recipe.seq_len:
        raise BadTokens(
            f"{len(tokens.tokens)} tokens hold no row of seq_len={recipe.seq_len} and its target."
        )
