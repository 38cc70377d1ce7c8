"""The fast training step against the ordinary eager one in `benchmarks/reference.py`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from society.model import gpt, ops
from society.model.flops import is_matrix
from society.model.init import initial_weights
from society.model.optim import Optimizer
from society.model.recipe import Recipe

FP32 = 1e-5
"""Largest relative error of a gradient, in norm: two orders of summation in fp32."""
BF16 = 0.05
"""The same for gradients in bf16, which has 8 bits, against fp32."""
MUON = 0.2
"""The same for an update by Muon, whose iterations in bf16 amplify what is small: .04 is seen for
square matrices, .12 for gates."""

RECIPES = {
    "default": {},
    "grouped-heads": {"heads": 4, "kv_heads": 2, "value_embeds": "all"},
    "one-wide-head": {"heads": 1, "head_size": 48, "window_pattern": "SL", "short_window": 0.25},
    "no-value-embeddings": {"value_embeds": "off", "activation": "gelu", "softcap": 5.0},
    "swiglu": {"activation": "swiglu", "depth": 3, "mlp_ratio": 2, "rope_base": 100.0},
}


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return Recipe(vocab=300, seq_len=32, batch_tokens=256, **RECIPES[request.param])


def perturbed(recipe: Recipe) -> dict[str, Tensor]:
    """Initial weights plus noise: at the start some are zero, and so are others' gradients."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: weight + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in initial_weights(recipe, 0).items()
    }


def rows(recipe: Recipe, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(recipe.vocab, (recipe.rows, recipe.seq_len + 1), generator=generator)


def ours(
    recipe: Recipe, weights: dict[str, Tensor], block: Tensor, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor]]:
    fixed = gpt.constants(recipe, torch.empty((), dtype=dtype))
    copies = gpt.working_copy(weights, grad=True, dtype=dtype)
    x = gpt.activations(recipe, copies, fixed, block[:, :-1])
    targets = block[:, 1:].reshape(-1)
    loss, _ = fixed.ops.head_loss(x, copies["head"], targets, ops.LossTerms(recipe.softcap))
    grads = torch.autograd.grad(loss, list(copies.values()))
    return loss.item(), dict(zip(copies, grads, strict=True))


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(
    ("dtype", "limit", "slack"),
    [(torch.float32, FP32, 1e-6), (torch.bfloat16, BF16, 2e-3)],
    ids=["fp32", "bf16"],
)
def test_loss_and_gradients_are_the_references(
    reference: ModuleType, recipe: Recipe, dtype: torch.dtype, limit: float, slack: float
) -> None:
    weights, block = perturbed(recipe), rows(recipe)
    trainer = reference.Trainer(recipe, weights, autocast=False)
    wanted = trainer.backward(block)
    loss, grads = ours(recipe, weights, block, dtype)
    assert loss == pytest.approx(wanted, rel=slack)
    parameters = trainer.model.by_name()
    assert set(parameters) == set(grads)
    errors = {name: error(grads[name], p.grad) for name, p in parameters.items()}
    assert {name: e for name, e in errors.items() if not e < limit} == {}


def test_one_step_of_the_optimisers_is_the_references(
    reference: ModuleType, recipe: Recipe
) -> None:
    weights, block = perturbed(recipe), rows(recipe)
    trainer = reference.Trainer(recipe, weights, autocast=False)
    trainer.backward(block)
    grads = {name: p.grad.clone() for name, p in trainer.model.by_name().items()}
    trainer.optimizers.step(0.3)
    optimizer = Optimizer(recipe, weights)
    optimizer.step(grads, 0.3)
    for name, parameter in trainer.model.by_name().items():
        wanted = parameter.detach() - weights[name]
        found = optimizer.masters[name] - weights[name]
        assert error(found, wanted) < (MUON if is_matrix(name) else FP32), name


def test_training_goes_the_references_way(reference: ModuleType) -> None:
    recipe = Recipe(vocab=300, seq_len=32, batch_tokens=512)
    weights = initial_weights(recipe, 0)
    trainer = reference.Trainer(recipe, weights, autocast=True)
    optimizer = Optimizer(recipe, weights)
    for step in range(8):
        block = rows(recipe) * (step % 2)  # something to learn
        wanted = trainer.step(block, 0.0)
        loss, grads = ours(recipe, dict(optimizer.masters), block, torch.bfloat16)
        optimizer.step(grads, 0.0)
        assert loss == pytest.approx(wanted, abs=0.1), step


def test_the_reference_says_what_it_does_not_know(reference: ModuleType) -> None:
    with pytest.raises(reference.Uncovered, match="tie_embeddings"):
        reference.GPT(Recipe(tie_embeddings=True))
