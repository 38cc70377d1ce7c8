"""The model: a decoder-only transformer, as functions of a dict of weights.

Design, after nanochat and modded-nanogpt: no biases and no norm weights; rotary positions and
normalised queries and keys; squared ReLU; windowed attention with a long last layer; per layer two
scalars that mix in the token embedding; value embeddings with an input-dependent gate on some
layers; logits with a soft cap. Every choice is a knob of the recipe.

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
from society.model.attention import Attend, Projected, Projections, per_layer, projected
from society.model.recipe import Recipe

Weights = Mapping[str, Tensor]

FIXED_SHARE = 0.5
"""Share of the value embedding under a fixed gate (Zhou et al. 2024, arXiv:2410.17897)."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What a recipe fixes for every batch, and the operators to compute with."""

    angles: ops.Rotation
    attend: tuple[Attend, ...]
    """One per layer."""
    ops: ops.Ops = ops.HAND_WRITTEN
    projected: tuple[Projected, ...] = ()
    """One per layer: all of its attention by hand. Empty: composed of `attend` and `ops`."""


def constants(recipe: Recipe, like: Tensor) -> Constants:
    """Angles and attention in the type and on the device of `like`."""
    angles = ops.rotation(recipe.seq_len, recipe.head_dim, recipe.rope_base, like)
    by_hand = projected(recipe, like) if like.device.type == "cpu" else ()
    return Constants(angles, per_layer(recipe, like), projected=by_hand)


def working_copy(masters: Weights, *, grad: bool, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Copies of the master weights to compute with; scalars keep their type."""
    return {
        name: (master.clone() if master.ndim == 1 else master.to(dtype)).requires_grad_(grad)
        for name, master in masters.items()
    }


def activations(recipe: Recipe, weights: Weights, fixed: Constants, ids: Tensor) -> Tensor:
    """Everything but the head: token ids (B, T) -> final activations (B * T, width)."""
    table = weights["head"] if recipe.tie_embeddings else weights["embed"]
    ids = ids.reshape(-1)
    x0 = fixed.ops.norm(F.embedding(ids, table))  # (B * T, width), as everywhere
    x = x0
    early: list[Tensor] = []
    for i in range(recipe.depth):
        if i >= recipe.depth - recipe.skips:
            x = x + weights["skip"][recipe.depth - 1 - i] * early.pop()
        x = _mixed(recipe, weights, fixed, i, x, x0)
        x = _block(recipe, weights, fixed, i, x, ids)
        if i < recipe.skips:
            early.append(x)
    return fixed.ops.norm(x)


def _mixed(
    recipe: Recipe, weights: Weights, fixed: Constants, i: int, x: Tensor, x0: Tensor
) -> Tensor:
    """The layer's input: the stream with some of the token embedding."""
    if recipe.residual_scalars == "off":
        return x
    if recipe.residual_scalars == "fixed":
        return torch.add(x * recipe.residual_init, x0, alpha=recipe.x0_init)
    return fixed.ops.mix(x, x0, weights["residual_scale"][i], weights["x0_scale"][i])


def _block(
    recipe: Recipe, weights: Weights, fixed: Constants, i: int, x: Tensor, ids: Tensor
) -> Tensor:
    """One layer: attention, then feed-forward, each added to the stream (B * T, width).

    Norms stand before each part (`pre`), after the sum (`post`, Vaswani et al. 2017), or before
    and after each part (`sandwich`, Ding et al. 2021, arXiv:2105.13290).
    """
    norm = fixed.ops.norm
    if recipe.norm_placement == "post":
        x = norm(x + _attention(recipe, weights, fixed, i, x, ids))
        return norm(x + _feed_forward(recipe, weights, fixed, i, x))
    after = norm if recipe.norm_placement == "sandwich" else _as_it_is
    x = x + after(_attention(recipe, weights, fixed, i, norm(x), ids))
    return x + after(_feed_forward(recipe, weights, fixed, i, norm(x)))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _attention(
    recipe: Recipe, weights: Weights, fixed: Constants, i: int, x: Tensor, ids: Tensor
) -> Tensor:
    """One layer's attention: its input (B * T, width) -> its contribution, the same."""
    layer = f"layer{i}."
    query, key, value = (weights[layer + name] for name in ("query", "key", "value"))
    own = Projections(query, key, value, weights.get(layer + "gate"))
    embedded = None
    if i in recipe.value_layers:
        embedded = F.embedding(ids, weights[layer + "value_embed"])
        if recipe.value_gate == "fixed":
            embedded = embedded * FIXED_SHARE
            own = own._replace(value=own.value * (1 - FIXED_SHARE))
    if fixed.projected:
        y = fixed.projected[i](x, own, embedded)
    else:
        y = _composed(recipe, fixed, i, x, own, embedded)
    return F.linear(y, weights[layer + "project"])


def _composed(
    recipe: Recipe, fixed: Constants, i: int, x: Tensor, own: Projections, embedded: Tensor | None
) -> Tensor:
    """What `Projected` computes, of separate operators: (B * T, width) -> (B * T, heads * D)."""
    query, key, value = (F.linear(x, weight) for weight in own[:3])
    if embedded is not None:
        value = value + _gated(recipe, x, own.gate, embedded)
    query, key = (
        fixed.ops.norm(fixed.ops.rope(_split(recipe, part), fixed.angles)) for part in (query, key)
    )
    if recipe.qk_scale != 1:
        query = query * recipe.qk_scale**2  # both scaled by qk_scale, in one pass
    y = fixed.attend[i](query, key, _split(recipe, value))  # (B, H, T, head_dim)
    return y.transpose(1, 2).reshape(len(x), -1)


def _split(recipe: Recipe, x: Tensor) -> Tensor:
    """(B * T, heads * head_dim) -> (B, heads, T, head_dim)."""
    rows = x.view(-1, recipe.seq_len, x.shape[1] // recipe.head_dim, recipe.head_dim)
    return rows.transpose(1, 2).contiguous()


def _gated(recipe: Recipe, x: Tensor, gate: Tensor | None, embedded: Tensor) -> Tensor:
    """The token's own values, (B * T, kv heads * head_dim), times 0 to 2 by the layer's input."""
    if gate is None:
        return embedded
    gates = F.linear(x[:, : gate.shape[1]], gate).sigmoid() * 2  # (B * T, kv heads)
    return (embedded.view(*gates.shape, recipe.head_dim) * gates[..., None]).view(embedded.shape)


def _feed_forward(recipe: Recipe, weights: Weights, fixed: Constants, i: int, x: Tensor) -> Tensor:
    """One layer's feed-forward part: (B * T, width) -> the same."""
    layer = f"layer{i}."
    hidden = F.linear(x, weights[layer + "expand"])  # (B * T, mlp_ratio * width)
    if recipe.activation == "swiglu":
        active = F.silu(F.linear(x, weights[layer + "swish"])) * hidden
    else:
        active = fixed.ops.relu2(hidden) if recipe.activation == "relu2" else F.gelu(hidden)
    return F.linear(active, weights[layer + "contract"])
