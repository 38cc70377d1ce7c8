"""The optimiser's steps for a compiler do what the eager ones do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from society.model import fused, optim
from society.model.init import initial_weights
from society.model.recipe import Recipe
from society.model.threads import single_thread

TINY = Recipe(vocab=300, dim=32, depth=2, seq_len=32, batch_tokens=128, skip_scale=0.1)
IDENTITY: Callable[[Any], Any] = lambda function: function  # noqa: E731


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def trained(recipe: Recipe, steps: optim.Steps, turns: int = 3) -> dict[str, torch.Tensor]:
    optimizer = optim.Optimizer(recipe, initial_weights(recipe, 1), steps)
    generator = torch.Generator().manual_seed(2)
    for turn in range(turns):
        grads = {
            name: torch.randn(w.shape, generator=generator).bfloat16()
            for name, w in optimizer.masters.items()
        }
        optimizer.step(grads, turn / turns)
    return copy.copy(optimizer.masters)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw", "adam_decay": 0.1}, {"weight_decay": 0.0, "polar_steps": 2}],
)
def test_fused_steps_equal_the_eager_ones(changes: dict[str, Any]) -> None:
    recipe = TINY.model_copy(update=changes)
    wanted, found = trained(recipe, optim.EAGER), trained(recipe, fused.steps(IDENTITY))
    start = initial_weights(recipe, 1)
    for name, weight in wanted.items():
        moved = (weight - start[name]).norm()
        # The bf16 iterations of Muon amplify the last bit of what goes in.
        assert (found[name] - weight).norm() < 0.02 * moved, name


def test_nothing_is_compiled_again_from_step_to_step() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    steps = fused.steps(lambda f: torch.compile(f, backend=counter, dynamic=False))
    trained(TINY, steps, turns=1)
    after_one = counter.frame_count
    trained(TINY, steps, turns=5)
    assert counter.frame_count == after_one > 0
