"""Initial weights, each drawn from its own generator keyed by (seed, parameter name).

With one sequential generator, adding one tensor redraws all the later ones; keyed, two recipes
with the same seed differ only where the recipe differs.

    parameter                 distribution                             why
    embed                     normal, sd 1                             normalised right after
    head (and a tied table)   normal, sd 0.001                         starts at uniform guesses
    query, key, value         uniform, sd qkv_scale / sqrt(inputs)     keeps the activations' scale
    expand, swish             uniform, sd mlp_init / sqrt(inputs)      same
    project, contract         uniform, sd project_init / sqrt(inputs)  0: a layer starts as nothing
    gate                      zero                                     2 sigmoid(0) = 1: neutral
    value_embed               value_embed_dist, uniform or normal,
                              sd value_embed_init / sqrt(width)        like the values
    residual_scale            residual_init                            1: a plain residual stream
    x0_scale                  x0_init                                  some of the token itself
    skip                      skip_scale                               some of an early layer

A changed model that needs another parameter adds it to what `initial_weights` returns, fp32, under
a name of its own: `layer0.extra` for a tensor inside a layer. It is trained, saved and given to
`gpt.activations` like all others. How it is trained follows from its name and shape (see `optim`):
a matrix (two dimensions) inside a layer by Muon, or by whatever the recipe trains matrices with;
other tensors of two or more dimensions by AdamW at the rate of embeddings, inside a layer at its
rate for matrices; vectors and scalars by AdamW at `scalar_lr`, without decay. `head` must stay:
the scorer reads it.

After nanochat's `init_weights` (github.com/karpathy/nanochat).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from society.model.flops import shapes
from society.model.recipe import Recipe

EMBED_SD = 1.0
HEAD_SD = 0.001


def initial_weights(recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """All parameters, fp32 on the CPU, name -> tensor; the device is the caller's choice."""
    return {name: _draw(recipe, seed, name, shape) for name, shape in shapes(recipe).items()}


def _draw(recipe: Recipe, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(_key(seed, name))
    kind = name.rpartition(".")[2]
    if kind in _constants(recipe):
        return torch.full(shape, _constants(recipe)[kind])
    sd = _spread(recipe, kind, shape)
    if kind in ("embed", "head") or (kind == "value_embed" and recipe.value_embed_dist == "normal"):
        return torch.randn(shape, generator=generator) * sd
    return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(3**0.5 * sd)


def _constants(recipe: Recipe) -> dict[str, float]:
    """Kinds of parameters that start at one value."""
    return {
        "gate": 0.0,
        "residual_scale": recipe.residual_init,
        "x0_scale": recipe.x0_init,
        "skip": recipe.skip_scale,
    }


def _spread(recipe: Recipe, kind: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a kind of parameter that is drawn."""
    fixed = {"embed": EMBED_SD, "head": HEAD_SD}
    if kind in fixed:
        return fixed[kind]
    if kind == "value_embed":
        return recipe.value_embed_init / math.sqrt(recipe.width)
    scales = dict.fromkeys(("query", "key", "value"), recipe.qkv_scale)
    scales |= dict.fromkeys(("expand", "swish"), recipe.mlp_init)
    scales |= dict.fromkeys(("project", "contract"), recipe.project_init)
    return scales[kind] / math.sqrt(shape[1])


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # torch takes 63 bits
