"""Differentiable pieces with a hand-written backward.

On a CPU the time of a small model goes into many small passes over memory, so each piece makes as
few as it can: statistics in fp32, tensors in the working type (bf16, or fp64 in the tests).
Against autograd's own derivative each is tested to the precision of its type.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

EPS = 1e-7
"""Added to the mean square before its root; the smallest table (sd 0.001) has 1e-6."""

CHUNK_ROWS = 128
"""Tokens whose logits are held at once: 128 x 1024 fp32 logits are 0.5 MB and stay in cache."""

MAX_SOFTCAP = 80.0
"""exp(80) is still an fp32 number, and so is the sum of a vocabulary of them."""


def apply(function: type[Function], *arguments: object) -> object:
    """`function.apply`, which torch leaves untyped."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt().to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse)


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without weights.

    Zhang and Sennrich 2019, arXiv:1910.07467. Any shape (..., channels).
    """
    return cast(Tensor, apply(_Norm, x))


class Rotation(NamedTuple):
    """Angles of the rotary encoding, each of shape (T, head_dim)."""

    cos: Tensor
    """The same for both halves of the channels."""
    sin: Tensor
    """Negated in the second half."""


def rotation(seq_len: int, head_dim: int, base: float, like: Tensor) -> Rotation:
    """Rotary angles for positions 0 to `seq_len` - 1, in the type and on the device of `like`."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), base ** (-channel / head_dim))
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat([cos, cos], -1).to(like), torch.cat([sin, -sin], -1).to(like))


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # Swapping the halves of all channels at once is faster than working on slices.
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        return torch.addcmul(grad * cos, grad.roll(half, -1), sin, value=-1), None, None


def rope(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate each pair of channels by its position's angle: (..., T, head_dim) -> same.

    Su et al. 2021, RoFormer, arXiv:2104.09864. A rotation's derivative is its inverse.
    """
    return cast(Tensor, apply(_Rope, x, angles.cos, angles.sin))


class _Relu2(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(grads[0], positive).mul_(2)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, So et al. 2021, arXiv:2109.08668); any shape."""
    return cast(Tensor, apply(_Relu2, x))


class _Mix(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, keep: Tensor, add: Tensor) -> Tensor:
        ctx.save_for_backward(x, x0, keep, add)
        return torch.addcmul(x * keep, x0, add.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (grad,) = grads
        x, x0, keep, add = ctx.saved_tensors
        d_keep = torch.sum(grad * x, dtype=keep.dtype)
        d_add = torch.sum(grad * x0, dtype=add.dtype)
        return grad * keep, grad * add, d_keep, d_add


def mix(x: Tensor, x0: Tensor, keep: Tensor, add: Tensor) -> Tensor:
    """`keep * x + add * x0`: the stream and the token embedding, with scalar weights.

    Args:
        x: Residual stream, (B, T, dim).
        x0: Normalised token embedding, (B, T, dim).
        keep: Scalar, fp32.
        add: Scalar, fp32.
    """
    return cast(Tensor, apply(_Mix, x, x0, keep, add))


class LossTerms(NamedTuple):
    """Settings of the training objective."""

    softcap: float
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def _capped(x: Tensor, head: Tensor, softcap: float) -> Tensor:
    """`tanh(x headᵀ / softcap)`, the logits in units of the cap: fp32 (or fp64), (rows, vocab)."""
    logits = (x @ head.T).to(_wide(x))
    # tanh(y) = 2 sigmoid(2y) - 1, and torch's sigmoid is four times as fast on a CPU.
    return logits.mul_(2 / softcap).sigmoid_().mul_(2).sub_(1)


def token_nats(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Cross-entropy of each token in nats, without a gradient.

    Args:
        x: Final activations, (tokens, dim).
        head: Output table, (vocab, dim).
        targets: Token ids, (tokens,).
        softcap: Bound on the logits.

    Returns:
        fp32, (tokens,).
    """
    parts = []
    for rows, wanted in zip(
        torch.split(x, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True
    ):
        logits = _capped(rows, head, softcap).mul_(softcap)
        picked = logits.gather(1, wanted[:, None])[:, 0]
        parts.append(logits.exp_().sum(1).log_() - picked)
    return torch.cat(parts)


class _Chunk(NamedTuple):
    """One chunk's share of the objective and its gradient."""

    d_logits: Tensor
    """By the logits before the cap, (rows, vocab)."""
    nats: Tensor
    """Summed cross-entropy, scalar."""
    extra: Tensor | float
    """Summed label smoothing and z-loss, scalar."""


def _chunk(capped: Tensor, targets: Tensor, terms: LossTerms, scale: float) -> _Chunk:
    """Objective and gradient of one chunk; no maximum is subtracted, as the cap bounds the logits.

    Args:
        capped: From `_capped`, (rows, vocab).
        targets: Token ids, (rows,).
        terms: Settings of the objective.
        scale: Factor on the gradient.
    """
    logits = capped * terms.softcap
    picked = logits.gather(1, targets[:, None])[:, 0]
    extra: Tensor | float = 0.0
    if terms.label_smoothing:
        extra = terms.label_smoothing * (picked - logits.mean(1)).sum()
    grad = logits.exp_()
    total = grad.sum(1)
    log_z = total.log()
    if terms.z_loss:
        extra = extra + terms.z_loss * log_z.square().sum()
    grad.mul_(((1 + 2 * terms.z_loss * log_z) * scale / total)[:, None])
    if terms.label_smoothing:
        grad.sub_(scale * terms.label_smoothing / grad.shape[1])
    hit = torch.full_like(log_z, scale * (terms.label_smoothing - 1))
    grad.scatter_add_(1, targets[:, None], hit[:, None])
    grad.addcmul_(grad * capped, capped, value=-1)  # through the cap: 1 - tanh²
    return _Chunk(grad, (log_z - picked).sum(), extra)


class _HeadLoss(Function):
    """Computes its gradients in the forward pass, chunk by chunk (Liger, arXiv:2410.10989)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, terms: LossTerms
    ) -> tuple[Tensor, Tensor]:
        d_x, d_head = torch.empty_like(x), torch.zeros_like(head, dtype=_wide(x))
        nats, extra = d_head.new_zeros(()), d_head.new_zeros(())
        scale = 1 / len(x)
        for start in range(0, len(x), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            chunk = _chunk(_capped(x[part], head, terms.softcap), targets[part], terms, scale)
            d_logits = chunk.d_logits.to(x.dtype)
            d_x[part] = d_logits @ head
            d_head += d_logits.T @ x[part]
            nats += chunk.nats
            extra += chunk.extra
        ctx.save_for_backward(d_x, d_head.to(head.dtype))
        nats *= scale
        ctx.mark_non_differentiable(nats)
        return nats + extra * scale, nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_x, d_head = ctx.saved_tensors
        grad = grads[0].to(d_x.dtype)
        return d_x * grad, d_head * grad, None, None


def head_loss(x: Tensor, head: Tensor, targets: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Output head, soft cap and training objective in one pass over chunks of tokens.

    The objective is the mean cross-entropy with label smoothing (Szegedy et al. 2016) plus z-loss
    (Chowdhery et al. 2022).

    Args:
        x: Final activations, (tokens, dim).
        head: Output table, (vocab, dim).
        targets: Token ids, (tokens,).
        terms: Settings of the objective.

    Returns:
        The objective, and the plain cross-entropy in nats per token (no gradient); both scalars.
    """
    loss, nats = cast(tuple[Tensor, Tensor], apply(_HeadLoss, x, head, targets, terms))
    return loss, nats


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
