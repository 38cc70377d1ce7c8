"""The counts: published numbers, and torch's own counter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from society.model import flops, gpt, ops
from society.model.init import initial_weights
from society.model.optim import Optimizer
from society.model.recipe import Recipe
from society.records import Budget, BudgetKind

CPU_BUDGET = Budget(BudgetKind.FLOPS, 2.35e11)


def test_the_default_profile() -> None:
    recipe = Recipe()
    assert flops.parameter_count(recipe) == 458_888
    assert flops.flops_per_token(recipe) == 1_819_392
    steps = flops.planned_steps(recipe, CPU_BUDGET)
    assert steps == 107
    assert steps * recipe.batch_tokens == 109_568


def test_the_optimiser_is_charged() -> None:
    recipe = Recipe()
    assert flops.optimizer_flops(recipe) == 314_578_080
    assert flops.optimizer_flops(recipe.model_copy(update={"polar_steps": 1})) == 62_915_616


def test_other_budgets() -> None:
    recipe = Recipe()
    assert flops.planned_steps(recipe, Budget(BudgetKind.STEPS, 7)) == 7
    assert flops.planned_steps(recipe, Budget(BudgetKind.TOKENS, 5000)) == 4
    assert flops.planned_steps(recipe, Budget(BudgetKind.TOKENS, 5)) == 1
    assert flops.planned_steps(recipe, Budget(BudgetKind.SECONDS, 5)) is None


recipes = st.builds(
    Recipe,
    depth=st.integers(1, 8),
    dim=st.sampled_from([32, 48, 64, 80, 96, 128]),
    heads=st.sampled_from([1, 2, 4, 8]),
    vocab=st.sampled_from([512, 1024, 2048, 4096]),
    seq_len=st.sampled_from([32, 64, 128, 256]),
    batch_tokens=st.sampled_from([512, 1024, 2048, 4096]),
    window_pattern=st.sampled_from(["SSSL", "SSL", "SL", "S", "L"]),
    value_embeds=st.sampled_from(["off", "alternate", "all"]),
    tie_embeddings=st.booleans(),
    residual_scalars=st.sampled_from(["off", "fixed", "learned"]),
    polar_steps=st.integers(1, 8),
)


@given(recipes)
def test_planned_steps_fit_and_no_more_would(recipe: Recipe) -> None:
    steps, each = flops.planned_steps(recipe, CPU_BUDGET), flops.flops_per_step(recipe)
    assert steps is not None
    assert steps == 1 or steps * each <= CPU_BUDGET.amount
    assert (steps + 1) * each > CPU_BUDGET.amount


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("tie", [False, True])
def test_torch_counts_the_same(depth: int, tie: bool) -> None:
    """With long windows everywhere the masked products are dense, so the counts are equal.

    Attention is composed of standard operations: by hand, the gate's product is one less.
    """
    recipe = Recipe(
        depth=depth, tie_embeddings=tie, window_pattern="L", seq_len=32, batch_tokens=256
    )
    optimizer = Optimizer(recipe, initial_weights(recipe, 0))
    weights = gpt.working_copy(optimizer.masters, grad=True)
    fixed = replace(gpt.constants(recipe, torch.empty((), dtype=torch.bfloat16)), projected=())
    ids = torch.arange(256).view(8, 32)
    with FlopCounterMode(display=False) as counter:
        x = gpt.activations(recipe, weights, fixed, ids)
        loss, _ = ops.head_loss(x, weights["head"], ids.flatten(), ops.LossTerms(15.0))
        grads = torch.autograd.grad(loss, list(weights.values()))
    assert counter.get_total_flops() == 256 * flops.flops_per_token(recipe)
    with FlopCounterMode(display=False) as counter:
        optimizer.step(dict(zip(weights, grads, strict=True)), 0.5)
    assert counter.get_total_flops() == flops.optimizer_flops(recipe)
