"""What to change when a run fails: the knobs, in words. Pure functions of recipe and baseline.

The memory estimate counts what is held at the peak of a step, from shapes alone; it is meant to say
what dominates, and is right to a factor of about two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from society.model.flops import parameter_count
from society.model.recipe import Recipe

GIB = 2**30

RATES = (
    "lr_scale",
    "matrix_lr",
    "embedding_lr",
    "value_embed_lr",
    "head_lr",
    "scalar_lr",
    "residual_lr",
)
RISKS: Mapping[str, int] = dict.fromkeys(RATES, 1) | {
    "warm_up": -1,
    "momentum_start": 1,
    "momentum_final": 1,
    "adam_beta2": -1,
    "muon_beta2": -1,
    "polar_steps": -1,
    "final_lr": 1,
    "qk_scale": 1,
    "qkv_scale": 1,
    "project_init": 1,
    "mlp_init": 1,
    "residual_init": 1,
    "x0_init": 1,
    "skip_scale": 1,
    "value_embed_init": 1,
    "softcap": 1,
    "weight_decay": 1,
    "adam_decay": 1,
    "batch_tokens": -1,
}
"""Knobs that make a training less stable: 1 when they are raised, -1 when they are lowered."""


def divergence(recipe: Recipe, baseline: Recipe) -> str:
    """Which knobs to turn back after a divergence."""
    risky = [name for name, sign in RISKS.items() if _moved(recipe, baseline, name) * sign > 0]
    if risky:
        told = _against(recipe, baseline, risky)
        return f"Turn back what makes it less stable than the baseline: {told}."
    changed = [name for name in Recipe.model_fields if _differs(recipe, baseline, name)]
    if changed:
        told = _against(recipe, baseline, changed)
        return (
            f"No rate was raised over the baseline; lower lr_scale, raise warm_up, or undo {told}."
        )
    return "The baseline itself diverges: lower lr_scale or raise warm_up."


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run's memory."""

    name: str
    mem_bytes: int
    knobs: tuple[str, ...]
    """What makes it smaller when lowered."""


def memory_parts(
    recipe: Recipe, rows: int | None = None, *, scores: bool = True
) -> tuple[Part, ...]:
    """What a step holds at its peak, the largest part first.

    Args:
        recipe: Gives the shapes.
        rows: Rows computed at once; by default the whole batch.
        scores: Whether the attention holds its scores (fused kernels do not).
    """
    shape = ("depth", _width_knob(recipe))
    tokens = (recipe.rows if rows is None else rows) * recipe.seq_len
    hidden = recipe.mlp_ratio * recipe.width * (3 if recipe.activation == "swiglu" else 2)
    heads = recipe.heads * recipe.head_dim
    # Per token and layer, in the working type: the stream and its norms, queries, keys and values
    # before and after rotation and norm, the attention's output, and the hidden layer.
    held = 6 * recipe.width + 4 * heads + 5 * recipe.kv_count * recipe.head_dim + hidden
    parts = [
        # master, two moments and a gradient in fp32, copy and gradient in bf16
        Part("weights and optimiser", 20 * parameter_count(recipe), (*shape, "vocab")),
        Part(
            "activations", 2 * tokens * recipe.depth * held, ("batch_tokens", *shape, "mlp_ratio")
        ),
        Part("logits", min(6 * tokens * recipe.vocab, 8 * GIB), ("batch_tokens", "vocab")),
    ]
    if scores:
        size = 4 * tokens * recipe.seq_len * recipe.heads * recipe.depth
        parts.append(Part("attention scores", size, ("seq_len", "batch_tokens", "heads", "depth")))
    return tuple(sorted(parts, key=lambda part: -part.mem_bytes))


def memory(
    recipe: Recipe, baseline: Recipe, rows: int | None = None, *, scores: bool = True
) -> str:
    """Which knobs to lower after a failed allocation, and what dominates."""
    parts = memory_parts(recipe, rows, scores=scores)
    total, largest = sum(part.mem_bytes for part in parts), parts[0]
    told = (
        f"By estimate it needs {total / GIB:.2g} GiB, most of it for {largest.name} "
        f"({largest.mem_bytes / GIB:.2g} GiB)"
    )
    raised = [name for name in _memory_knobs(parts) if _moved(recipe, baseline, name) > 0]
    if raised:
        told += f"; larger than in the baseline: {_against(recipe, baseline, raised)}"
    return f"{told}. Lower {_either(raised or largest.knobs)}."


def _memory_knobs(parts: tuple[Part, ...]) -> list[str]:
    return list(dict.fromkeys(knob for part in parts for knob in part.knobs))


def _width_knob(recipe: Recipe) -> str:
    return "aspect_ratio" if recipe.aspect_ratio else "dim"


def _moved(recipe: Recipe, baseline: Recipe, name: str) -> float:
    """How far a number was raised; 0 for what is no number."""
    new, old = getattr(recipe, name), getattr(baseline, name)
    return float(new - old) if isinstance(new, int | float) else 0.0


def _differs(recipe: Recipe, baseline: Recipe, name: str) -> bool:
    return bool(getattr(recipe, name) != getattr(baseline, name))


def _against(recipe: Recipe, baseline: Recipe, names: list[str]) -> str:
    """Values beside the baseline's, e.g. `lr_scale=4 (1)`."""
    return ", ".join(f"{n}={_short(recipe, n)} ({_short(baseline, n)})" for n in names)


def _short(recipe: Recipe, name: str) -> str:
    value = getattr(recipe, name)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _either(names: list[str] | tuple[str, ...]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
