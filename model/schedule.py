"""How rates, momentum and decay move over a run; `progress` is the share done, 0 to 1.

Everything is a fraction of the run, never a step number: a schedule tuned in steps for long runs
means something else in short ones.
"""

from __future__ import annotations

from society.model.recipe import Recipe


def rate(recipe: Recipe, progress: float) -> float:
    """Factor on every learning rate: linear warm-up, constant, linear warm-down."""
    if progress < recipe.warm_up:
        return progress / recipe.warm_up
    left = 1 - progress
    if left >= recipe.warm_down:
        return 1.0
    share = left / recipe.warm_down
    return share + (1 - share) * recipe.final_lr


def momentum(recipe: Recipe, progress: float) -> float:
    """Muon's momentum: a linear ramp, then constant."""
    share = 1.0 if progress >= recipe.momentum_ramp else progress / recipe.momentum_ramp
    return (1 - share) * recipe.momentum_start + share * recipe.momentum_final


def decay(recipe: Recipe, progress: float) -> float:
    """Weight decay: falls linearly to zero."""
    return recipe.weight_decay * (1 - progress)
