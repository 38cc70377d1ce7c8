"""Causal attention with a window, in the form that suits a CPU. Accelerators: see `kernels`.

PyTorch's fused bf16 attention has a slow backward on CPUs; two batched matrix products and a
softmax are faster there for rows of a few hundred tokens. `Projected` is a layer's attention from
its input to its heads' outputs with a derivative written by hand: one product for all projections,
rotation as a complex product in fp32 where it is a single pass, and every copy into the layout
that the next product wants made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from society.model.ops import apply, inverse_rms, norm_backward, wide
from society.model.recipe import Recipe

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer: query (B, H, T, D), key and value (B, kv heads, T, D) -> (B, H, T, D)."""


def per_layer(recipe: Recipe, like: Tensor) -> tuple[Attend, ...]:
    """The attention of every layer, in the type and on the device of `like`."""
    masks = {window: window_mask(recipe.seq_len, window, like) for window in set(recipe.windows)}
    return tuple(partial(attend, mask=masks[window]) for window in recipe.windows)


def window_mask(seq_len: int, window: int, like: Tensor) -> Tensor:
    """0 where a query may look, minus infinity elsewhere: (T, T).

    Position i sees itself and the `window` - 1 positions before it.
    """
    position = torch.arange(seq_len, device=like.device)
    back = position[:, None] - position[None, :]
    hidden = (back < 0) | (back >= window)
    mask = torch.zeros(seq_len, seq_len, device=like.device, dtype=like.dtype)
    return mask.masked_fill_(hidden, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention by matrix products; `mask` is (T, T).

    Key and value heads that serve several query heads are repeated (Ainslie et al. 2023, GQA,
    arXiv:2305.13245).
    """
    batch, heads, length, channels = query.shape
    if key.shape[1] != heads:
        group = heads // key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    flat = (batch * heads, length, channels)
    q, k, v = query.reshape(flat), key.reshape(flat), value.reshape(flat)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=channels**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(query.shape)


class Projections(NamedTuple):
    """The weights that a layer's attention applies to its input, in the working type."""

    query: Tensor
    """(H * D, width)."""
    key: Tensor
    """(kv heads * D, width)."""
    value: Tensor
    """(kv heads * D, width)."""
    gate: Tensor | None = None
    """Of the value embedding, (kv heads, channels); None: it is added as it is."""


@dataclass(frozen=True, slots=True)
class Projected:
    """A layer's attention: input, weights and value embeddings in, the heads' outputs out."""

    heads: int
    kv_heads: int
    scale: float
    """Factor on normalised queries and on normalised keys; with the 1 / sqrt(D) of the scores."""
    mask: Tensor
    """(T, T), 0 or minus infinity."""
    turn: Tensor
    """Rotation of each pair of channels, complex, (T, D / 2)."""
    order: Tensor
    """Rows of the stacked weights such that the two channels of a pair are neighbours."""
    back: Tensor
    """The inverse of `order`."""

    def __call__(self, x: Tensor, weights: Projections, embedded: Tensor | None) -> Tensor:
        """Attention over rows of T tokens.

        Args:
            x: The layer's input, (B * T, width).
            weights: Its projections.
            embedded: Value embeddings of the tokens, (B * T, kv heads * D).

        Returns:
            (B * T, H * D).
        """
        return cast(Tensor, apply(_Projected, x, *weights, embedded, self))


def projected(recipe: Recipe, like: Tensor) -> tuple[Projected, ...]:
    """The hand-written attention of every layer, in the type of `like`; for a CPU."""
    length, channels = recipe.seq_len, recipe.head_dim
    masks = {window: window_mask(length, window, like) for window in set(recipe.windows)}
    rates = recipe.rope_base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rates)
    turn = torch.polar(torch.ones_like(angles), -angles)
    order = _neighbours(recipe)
    return tuple(
        Projected(
            heads=recipe.heads,
            kv_heads=recipe.kv_count,
            scale=recipe.qk_scale * channels**-0.25,
            mask=masks[window],
            turn=turn if like.dtype == torch.float64 else turn.to(torch.complex64),
            order=order,
            back=order.argsort(),
        )
        for window in recipe.windows
    )


def _neighbours(recipe: Recipe) -> Tensor:
    """Channels i and i + D / 2 of queries and keys side by side; values as they are."""
    rotated = recipe.heads + recipe.kv_count
    halves = torch.arange(rotated * recipe.head_dim).view(rotated, 2, -1)
    values = torch.arange(recipe.kv_count * recipe.head_dim) + halves.numel()
    return torch.cat([halves.mT.flatten(), values])


class _Projected(Function):
    """Tensors of heads are (heads, B, T, D): all of a kind in one batch for a matrix product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None,
        embedded: Tensor | None, plan: Projected,
    ) -> Tensor:  # fmt: skip
        weight = torch.cat([query, key, value]).index_select(0, plan.order)
        parts = _by_head(torch.mm(x, weight.T), plan)
        rotated = plan.heads + plan.kv_heads
        turned, inverse = _turned(parts[:rotated], plan)
        gates = None if gate is None else torch.mm(x[:, : gate.shape[1]], gate.T).sigmoid_()
        v = _values(parts[rotated:], gates, embedded, plan)
        q, k = turned[: plan.heads], _for_each_query(turned[plan.heads :], plan)
        probabilities = torch.baddbmm(plan.mask, _batch(q), _batch(k).mT).softmax(-1)
        y = torch.bmm(probabilities, _batch(_for_each_query(v, plan)))
        ctx.plan = plan
        ctx.save_for_backward(x, weight, turned, inverse, v, probabilities, gate, gates, embedded)
        return _by_token(y.view(q.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turned, inverse, v, probabilities, gate, gates, embedded = ctx.saved_tensors
        plan: Projected = ctx.plan
        d_turned, d_v = _core_backward(_by_head(grads[0], plan), turned, v, probabilities, plan)
        parts = torch.empty(len(x), len(weight), dtype=x.dtype)
        by_head = _by_head(parts, plan)
        by_head[: len(d_turned)] = _turned_backward(d_turned, turned, inverse, plan)
        by_head[len(d_turned) :] = d_v
        d_weight = torch.mm(parts.T, x).index_select(0, plan.back)
        d_x = torch.mm(parts, weight)
        d_gate: Tensor | None = None
        d_embedded = None if embedded is None else _by_token(d_v)
        if gate is not None and d_embedded is not None:
            d_gate, d_embedded = _gate_backward(d_x, d_embedded, x, gate, gates, embedded)
        heads = (plan.heads, plan.kv_heads, plan.kv_heads)
        d_weights = torch.split(d_weight, [count * turned.shape[-1] for count in heads])
        return d_x, *d_weights, d_gate, d_embedded, None


def _by_head(x: Tensor, plan: Projected) -> Tensor:
    """A view: (B * T, heads * D) -> (heads, B, T, D)."""
    length, pairs = plan.turn.shape
    return x.view(-1, length, x.shape[1] // (2 * pairs), 2 * pairs).permute(2, 0, 1, 3)


def _by_token(x: Tensor) -> Tensor:
    """(heads, B, T, D) -> (B * T, heads * D)."""
    heads, batch, length, channels = x.shape
    return x.permute(1, 2, 0, 3).reshape(batch * length, heads * channels)


def _batch(x: Tensor) -> Tensor:
    """(heads, B, T, D) -> (heads * B, T, D)."""
    return x.reshape(-1, *x.shape[2:])


def _for_each_query(x: Tensor, plan: Projected) -> Tensor:
    """Repeat key or value heads that serve several query heads (arXiv:2305.13245)."""
    group = plan.heads // plan.kv_heads
    return x if group == 1 else x.repeat_interleave(group, 0)


def _for_each_key(grad: Tensor, plan: Projected) -> Tensor:
    """The gradient of `_for_each_query`."""
    group = plan.heads // plan.kv_heads
    return grad if group == 1 else grad.view(plan.kv_heads, group, *grad.shape[1:]).sum(1)


def _turned(x: Tensor, plan: Projected) -> tuple[Tensor, Tensor]:
    """Rotated and normalised heads, and what they were multiplied by."""
    work = x.contiguous().to(wide(x))
    _complex(work).mul_(plan.turn)
    inverse = inverse_rms(work).mul_(plan.scale)
    return work.mul_(inverse).to(x.dtype), inverse


def _turned_backward(grad: Tensor, turned: Tensor, inverse: Tensor, plan: Projected) -> Tensor:
    work = norm_backward(grad.to(inverse.dtype), turned.to(inverse.dtype), inverse, plan.scale)
    _complex(work).mul_(plan.turn.conj())
    return work


def _complex(x: Tensor) -> Tensor:
    """Neighbouring channels as the parts of one complex number."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def _values(
    value: Tensor, gates: Tensor | None, embedded: Tensor | None, plan: Projected
) -> Tensor:
    """Values with the gated embedding of the token, (kv heads, B, T, D), contiguous."""
    if embedded is None:
        return value.contiguous()
    own = _by_head(embedded, plan)
    if gates is None:
        return (value + own).contiguous()
    return torch.addcmul(value, own, _by_gate(gates, plan), value=2).contiguous()


def _by_gate(gates: Tensor, plan: Projected) -> Tensor:
    """(B * T, kv heads) -> (kv heads, B, T, 1)."""
    return gates.view(-1, len(plan.turn), plan.kv_heads).permute(2, 0, 1)[..., None]


def _gate_backward(
    d_x: Tensor, d_value: Tensor, x: Tensor, gate: Tensor, gates: Tensor, embedded: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the gate's weights and the embeddings; the input's is added to `d_x`."""
    by_head = (len(x), gate.shape[0], -1)
    d_value = d_value.view(by_head)
    d_gates = (d_value * embedded.view(by_head)).sum(-1).mul_(2)
    d_logits = torch.ops.aten.sigmoid_backward(d_gates, gates)
    d_x[:, : gate.shape[1]].addmm_(d_logits, gate)
    d_embedded = d_value * (gates * 2)[..., None]
    return torch.mm(d_logits.T, x[:, : gate.shape[1]]), d_embedded.view(embedded.shape)


def _core_backward(
    d_y: Tensor, turned: Tensor, v: Tensor, probabilities: Tensor, plan: Projected
) -> tuple[Tensor, Tensor]:
    """Gradients of rotated queries and keys in one tensor, and of values."""
    grad = _batch(d_y)
    q, k = turned[: plan.heads], _for_each_query(turned[plan.heads :], plan)
    d_probabilities = torch.bmm(grad, _batch(_for_each_query(v, plan)).mT)
    d_scores = torch.ops.aten._softmax_backward_data(
        d_probabilities, probabilities, -1, probabilities.dtype
    )
    d_turned = torch.empty_like(turned)
    torch.bmm(d_scores, _batch(k), out=_batch(d_turned[: plan.heads]))
    d_k = torch.bmm(d_scores.mT, _batch(q)).view(q.shape)
    d_turned[plan.heads :] = _for_each_key(d_k, plan)
    d_v = torch.bmm(probabilities.mT, grad).view(q.shape)
    return d_turned, _for_each_key(d_v, plan)
