"""Parameters, FLOPs and planned steps of a recipe: pure counting, nothing is measured.

A multiply-add is two FLOPs and the backward pass costs twice the forward, so a weight used in a
matrix product costs 6 FLOPs per token (Kaplan et al. 2020, arXiv:2001.08361). Attention adds
12 x heads x head size x window per layer and token (PaLM, arXiv:2204.02311, appendix B). Embedding
look-ups, norms, non-linearities and element-wise optimiser arithmetic are not counted; Muon's
matrix products are. The default recipe: 458,888 parameters, 1,819,392 FLOPs per token, and 107
steps (109,568 tokens) in 2.35e11 FLOPs.
"""

from __future__ import annotations

from society.model.recipe import Recipe
from society.records import Budget, BudgetKind

GATE_CHANNELS = 32
"""Channels of the layer's input that the value-embedding gate reads (nanochat)."""


def shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, name -> shape, in a fixed order."""
    found: dict[str, tuple[int, ...]] = {}
    if not recipe.tie_embeddings:
        found["embed"] = (recipe.vocab, recipe.width)
    found["head"] = (recipe.vocab, recipe.width)
    for i in range(recipe.depth):
        found |= {f"layer{i}.{name}": shape for name, shape in _layer(recipe, i).items()}
    if recipe.residual_scalars == "learned":
        found |= {"residual_scale": (recipe.depth,), "x0_scale": (recipe.depth,)}
    if recipe.skips:
        found["skip"] = (recipe.skips,)
    return found


def _layer(recipe: Recipe, i: int) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer: (outputs, inputs) for a matrix."""
    width, hidden = recipe.width, recipe.mlp_ratio * recipe.width
    queries, values = recipe.heads * recipe.head_dim, recipe.kv_count * recipe.head_dim
    found: dict[str, tuple[int, ...]] = {
        "query": (queries, width),
        "key": (values, width),
        "value": (values, width),
        "project": (width, queries),
        "expand": (hidden, width),
        "contract": (width, hidden),
    }
    if recipe.activation == "swiglu":
        found["swish"] = (hidden, width)
    if i in recipe.value_layers:
        if recipe.value_gate == "learned":
            found["gate"] = (recipe.kv_count, min(GATE_CHANNELS, width))
        found["value_embed"] = (recipe.vocab, values)
    return found


def is_matrix(name: str) -> bool:
    """Whether this is a matrix inside a layer, a gate included: what Muon can train."""
    return name.startswith("layer") and not name.endswith(".value_embed")


def parameter_count(recipe: Recipe) -> int:
    """Number of trained weights."""
    return sum(_size(shape) for shape in shapes(recipe).values())


def flops_per_token(recipe: Recipe) -> int:
    """Forward and backward FLOPs of one training token."""
    multiplied = sum(
        _size(shape) for name, shape in shapes(recipe).items() if is_matrix(name) or name == "head"
    )
    return 6 * multiplied + 12 * recipe.heads * recipe.head_dim * sum(recipe.windows)


def optimizer_flops(recipe: Recipe) -> int:
    """FLOPs of one step's polar-express iterations over every matrix.

    One iteration on an (m, n) matrix, m <= n: X Xᵀ (2 m²n), its square (2 m³), and the product
    with X (2 m²n). AdamW multiplies no matrices.
    """
    if recipe.optimizer != "muon":
        return 0
    total = 0
    for name, shape in shapes(recipe).items():
        if is_matrix(name):
            m, n = sorted(shape)
            total += 4 * m * m * n + 2 * m**3
    return total * recipe.polar_steps


def flops_per_step(recipe: Recipe) -> int:
    """FLOPs of one step: the batch's tokens and the optimiser."""
    return recipe.batch_tokens * flops_per_token(recipe) + optimizer_flops(recipe)


def planned_steps(recipe: Recipe, budget: Budget, step_flops: float | None = None) -> int | None:
    """Steps that fit in the budget, at least 1; None for a budget in seconds.

    The single exception to "fits" is a budget below one step: a run takes one step all the same.

    Args:
        recipe: What is trained.
        budget: What may be spent.
        step_flops: FLOPs of one step where they are not `flops_per_step`: of changed code.
    """
    per_step = {
        BudgetKind.FLOPS: flops_per_step(recipe) if step_flops is None else step_flops,
        BudgetKind.TOKENS: recipe.batch_tokens,
        BudgetKind.STEPS: 1,
    }
    if budget.kind is BudgetKind.SECONDS:
        return None
    return max(1, int(budget.amount // per_step[budget.kind]))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
