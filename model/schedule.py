"""How rates, momentum and decay move over a run; `progress` is the share done, 0 to 1.

Everything is a fraction of the run, never a step number: a schedule tuned in steps for long runs
means something else in short ones.
"""

from __future__ import annotations

import math

from society.model.recipe import Recipe


def rate(recipe: Recipe, progress: float) -> float:
    """Factor on every learning rate: linear warm-up, constant, warm-down to `final_lr`.

    The warm-down is linear, half a cosine, or 1 - sqrt (Hägele et al. 2024, arXiv:2405.18392).
    """
    if progress < recipe.warm_up:
        return progress / recipe.warm_up
    left = 1 - progress
    if left >= recipe.warm_down:
        return 1.0
    share = left / recipe.warm_down
    if recipe.warm_down_shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    elif recipe.warm_down_shape == "sqrt":
        share = 1 - math.sqrt(max(0.0, 1 - share))
    return share + (1 - share) * recipe.final_lr


def momentum(recipe: Recipe, progress: float) -> float:
    """Muon's momentum: a linear ramp, then constant."""
    share = 1.0 if progress >= recipe.momentum_ramp else progress / recipe.momentum_ramp
    return (1 - share) * recipe.momentum_start + share * recipe.momentum_final


def decay(recipe: Recipe, progress: float) -> float:
    """Factor on every weight decay: falls to zero by a line or half a cosine, or stays."""
    if recipe.decay_shape == "constant":
        return 1.0
    if recipe.decay_shape == "cosine":
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return 1 - progress
