"""The model: a decoder-only transformer, as functions of a dict of weights.

Design, after nanochat and modded-nanogpt: no biases and no norm weights; rotary positions and
normalised queries and keys; squared ReLU; windowed attention with a long last layer; per layer two
scalars that mix in the token embedding; value embeddings with an input-dependent gate on some
layers; logits with a soft cap.

Master weights are fp32. Each step works on copies in bf16 (`working_copy`), without autocast,
which costs more than it saves at this size; only the residual scalars stay fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from society.model import ops
from society.model.attention import attend, window_mask
from society.model.flops import GATE_CHANNELS
from society.model.recipe import Recipe

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Constants:
    """What a recipe fixes for every batch: rotary angles and one mask per layer."""

    angles: ops.Rotation
    masks: tuple[Tensor, ...]
    """Per layer, (T, T), 0 or minus infinity."""


def constants(recipe: Recipe, like: Tensor) -> Constants:
    """Angles and masks in the type and on the device of `like`."""
    angles = ops.rotation(recipe.seq_len, recipe.head_dim, recipe.rope_base, like)
    masks = {window: window_mask(recipe.seq_len, window, like) for window in set(recipe.windows)}
    return Constants(angles, tuple(masks[window] for window in recipe.windows))


def working_copy(masters: Weights, *, grad: bool, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Copies of the master weights to compute with; scalars keep their type."""
    return {
        name: (master.clone() if master.ndim == 1 else master.to(dtype)).requires_grad_(grad)
        for name, master in masters.items()
    }


def activations(recipe: Recipe, weights: Weights, fixed: Constants, ids: Tensor) -> Tensor:
    """Everything but the head: token ids (B, T) -> final activations (B * T, dim)."""
    table = weights["head"] if recipe.tie_embeddings else weights["embed"]
    x0 = ops.norm(F.embedding(ids, table))  # (B, T, dim)
    x = x0
    for i in range(recipe.depth):
        x = _mixed(recipe, weights, i, x, x0)
        x = x + _attention(recipe, weights, fixed, i, ops.norm(x), ids)
        x = x + _feed_forward(recipe, weights, i, ops.norm(x))
    return ops.norm(x).view(-1, recipe.dim)


def _mixed(recipe: Recipe, weights: Weights, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """The layer's input: the stream with some of the token embedding."""
    if recipe.residual_scalars == "off":
        return x
    if recipe.residual_scalars == "fixed":
        return torch.add(x, x0, alpha=recipe.x0_init)
    return ops.mix(x, x0, weights["residual_scale"][i], weights["x0_scale"][i])


def _attention(
    recipe: Recipe, weights: Weights, fixed: Constants, i: int, x: Tensor, ids: Tensor
) -> Tensor:
    """One layer's attention: normalised stream (B, T, dim) -> its contribution (B, T, dim)."""
    layer = f"layer{i}."
    query, key, value = (F.linear(x, weights[layer + name]) for name in ("query", "key", "value"))
    if i in recipe.value_layers:
        value = value + _value_embedding(recipe, weights, layer, x, ids)
    query, key = (ops.norm(ops.rope(_split(recipe, part), fixed.angles)) for part in (query, key))
    y = attend(query, key, _split(recipe, value), fixed.masks[i])  # (B, H, T, head_dim)
    return F.linear(y.transpose(1, 2).reshape(x.shape), weights[layer + "project"])


def _split(recipe: Recipe, x: Tensor) -> Tensor:
    """(B, T, dim) -> (B, H, T, head_dim)."""
    batch, length, _ = x.shape
    return x.view(batch, length, recipe.heads, recipe.head_dim).transpose(1, 2).contiguous()


def _value_embedding(
    recipe: Recipe, weights: Weights, layer: str, x: Tensor, ids: Tensor
) -> Tensor:
    """The token's own value, gated per head between 0 and 2 by the stream: (B, T, dim)."""
    gate = F.linear(x[..., :GATE_CHANNELS], weights[layer + "gate"]).sigmoid() * 2  # (B, T, H)
    embedded = F.embedding(ids, weights[layer + "value_embed"])  # (B, T, dim)
    heads = embedded.view(*gate.shape, recipe.head_dim) * gate[..., None]
    return heads.view(x.shape)


def _feed_forward(recipe: Recipe, weights: Weights, i: int, x: Tensor) -> Tensor:
    hidden = F.linear(x, weights[f"layer{i}.expand"])  # (B, T, mlp_ratio * dim)
    active = ops.relu2(hidden) if recipe.activation == "relu2" else F.gelu(hidden)
    return F.linear(active, weights[f"layer{i}.contract"])
