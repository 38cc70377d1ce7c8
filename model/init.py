"""Initial weights, each drawn from its own generator keyed by (seed, parameter name).

With one sequential generator, adding one tensor redraws all the later ones; keyed, two recipes
with the same seed differ only where the recipe differs.

    parameter                    distribution                          why
    embed                        normal, sd 1                          normalised right after
    head (and a tied table)      normal, sd 0.001                      starts at uniform guesses
    query, key, value            uniform, sd qkv_scale / sqrt(dim)     keeps the activations' scale
    expand                       uniform, sd 1 / sqrt(dim)             same
    project, contract            zero                                  each layer starts as nothing
    gate                         zero                                  2 sigmoid(0) = 1: neutral
    value_embed                  uniform, sd value_embed_init / sqrt(dim)   like the values
    residual_scale               one                                   a plain residual stream
    x0_scale                     x0_init                               some of the token itself

After nanochat's `init_weights` (github.com/karpathy/nanochat).
"""

from __future__ import annotations

import hashlib

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
    if kind == "embed":
        return torch.randn(shape, generator=generator) * EMBED_SD
    if kind == "head":
        return torch.randn(shape, generator=generator) * HEAD_SD
    if kind in _uniform_scale(recipe):
        bound = 3**0.5 * recipe.dim**-0.5 * _uniform_scale(recipe)[kind]
        return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(bound)
    return torch.full(shape, {"residual_scale": 1.0, "x0_scale": recipe.x0_init}.get(kind, 0.0))


def _uniform_scale(recipe: Recipe) -> dict[str, float]:
    """Scale of each uniformly drawn kind of parameter, relative to 1 / sqrt(dim)."""
    scales = dict.fromkeys(("query", "key", "value"), recipe.qkv_scale)
    return scales | {"expand": 1.0, "value_embed": recipe.value_embed_init}


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # torch takes 63 bits
