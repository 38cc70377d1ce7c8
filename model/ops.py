"""Differentiable pieces with a hand-written backward.

On a CPU the time of a small model goes into many small passes over memory, so each piece makes as
few as it can: statistics in fp32, tensors in the working type (bf16, or fp64 in the tests).
Against autograd's own derivative each is tested to the precision of its type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

EPS = 1e-7
"""Added to the mean square before its root; the smallest table (sd 0.001) has 1e-6."""

CHUNK_ROWS = 128
"""Tokens whose fp32 logits are held at once: 128 x 1024 of them are 0.5 MB and stay in cache."""

BLOCK_LOGITS = 1 << 20
"""Most logits in the working type held at once (2 MB in bf16): one matrix product's worth."""

MAX_SOFTCAP = 80.0
"""exp(80) is still an fp32 number, and so is the sum of a vocabulary of them."""


def apply(function: type[Function], *arguments: object) -> object:
    """`function.apply`, which torch leaves untyped."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = inverse_rms(x).to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        return norm_backward(grads[0], y, inverse)


def inverse_rms(x: Tensor) -> Tensor:
    """One over the root mean square of the last dimension: (..., channels) -> (..., 1), wide."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x))
    return size.square_().mul_(1 / x.shape[-1]).add_(EPS).rsqrt_()


def norm_backward(grad: Tensor, y: Tensor, inverse: Tensor, scale: float = 1.0) -> Tensor:
    """Gradient by x of `y = x * inverse`, where `inverse = scale * inverse_rms(x)`.

    `inverse * (grad - y * mean(grad * y) / scale²)`: the same as the gradient of weight norm
    (Salimans and Kingma 2016, arXiv:1602.07868), for which torch has a kernel of a single pass.
    """
    channels = y.shape[-1]
    size = scale * channels**0.5
    rows = (inverse * size).view(-1, 1)
    found, _ = torch.ops.aten._weight_norm_interface_backward(
        grad.reshape(-1, channels),
        y.view(-1, channels),
        rows,
        torch.full(rows.shape, size, dtype=wide(y)),
        0,
    )
    return cast(Tensor, found).view(y.shape)


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
        return torch.addcmul(positive.new_zeros(()), grads[0], positive, value=2)


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
        logits = _halves((rows @ head.T).to(wide(x)).mul_(2 / softcap), softcap)
        logits.sub_(softcap)
        picked = logits.gather(1, wanted[:, None])[:, 0]
        parts.append(logits.exp_().sum(1).log_() - picked)
    return torch.cat(parts)


def _halves(doubled: Tensor, softcap: float) -> Tensor:
    """Capped logits plus the cap, from logits times 2 / softcap, in place: (rows, vocab).

    `softcap tanh(y) + softcap = 2 softcap sigmoid(2y)`, and torch's sigmoid is four times as fast
    on a CPU as its tanh.
    """
    return doubled.sigmoid_().mul_(2 * softcap)


class _Chunk(NamedTuple):
    """One chunk's share of the objective; the gradient is written over the chunk's logits."""

    nats: Tensor
    """Summed cross-entropy, scalar."""
    extra: Tensor | float
    """Summed label smoothing and z-loss, scalar."""


class _Room(NamedTuple):
    """Memory for one chunk after the other: it stays in cache, and its pages stay mapped."""

    gate: Tensor
    """sigmoid(2 logit / softcap), wide, (rows, vocab)."""
    share: Tensor
    """Capped logits, then probabilities, the same."""


def _chunk(logits: Tensor, targets: Tensor, terms: LossTerms, room: _Room) -> _Chunk:
    """Objective and gradient of one chunk of tokens.

    Args:
        logits: Logits times 2 / softcap, (rows, vocab). Afterwards a quarter of the gradient by
            the logits, of the objective summed over the rows.
        targets: Token ids, (rows,).
        terms: Settings of the objective.
        room: Memory to work in.
    """
    gate, share = (part[: len(logits)] for part in room)
    torch.sigmoid(gate.copy_(logits), out=gate)
    capped = torch.mul(gate, 2 * terms.softcap, out=share)  # plus the cap, which changes nothing
    wanted = targets[:, None]
    picked, top = capped.gather(1, wanted)[:, 0], capped.amax(1)
    extra: Tensor | float = 0.0
    if terms.label_smoothing:
        extra = terms.label_smoothing * (picked - capped.mean(1)).sum()
    torch.softmax(capped, 1, out=share)
    log_z = top - share.amax(1).log_()  # the largest probability never underflows
    if terms.z_loss:
        level = log_z - terms.softcap
        extra = extra + terms.z_loss * level.square().sum()
        share.mul_((1 + 2 * terms.z_loss * level)[:, None])
    if terms.label_smoothing:
        share.sub_(terms.label_smoothing / share.shape[1])
    hit = share.new_full((), terms.label_smoothing - 1).expand(wanted.shape)
    share.scatter_add_(1, wanted, hit)
    torch.ops.aten.sigmoid_backward(share, gate, grad_input=share)  # through the cap
    logits.copy_(share)
    return _Chunk((log_z - picked).sum(), extra)


class _HeadLoss(Function):
    """Computes its gradients in the forward pass (Liger, arXiv:2410.10989).

    Matrix products work on blocks of a few MB, everything between them on chunks that stay in
    cache; the gradient by the logits takes the memory of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, terms: LossTerms
    ) -> tuple[Tensor, Tensor]:
        vocab, tokens = len(head), len(x)
        rows = min(tokens, max(CHUNK_ROWS, BLOCK_LOGITS // vocab // CHUNK_ROWS * CHUNK_ROWS))
        d_x, d_head = torch.empty_like(x), torch.zeros_like(head, dtype=wide(x))
        room = _Room(*(d_head.new_empty(min(rows, CHUNK_ROWS), vocab) for _ in range(2)))
        nats, extra, zero = d_head.new_zeros(()), d_head.new_zeros(()), x.new_zeros(())
        for block in map(slice, range(0, tokens, rows), range(rows, tokens + rows, rows)):
            part = x[block]
            logits = torch.addmm(zero, part, head.T, beta=0, alpha=2 / terms.softcap)
            for chunk, wanted in zip(
                torch.split(logits, CHUNK_ROWS),
                torch.split(targets[block], CHUNK_ROWS),
                strict=True,
            ):
                found = _chunk(chunk, wanted, terms, room)
                nats += found.nats
                extra += found.extra
            torch.mm(logits, head, out=d_x[block])
            d_head += logits.T @ part
        ctx.save_for_backward(d_x, d_head.to(head.dtype))
        ctx.scale = 4 / tokens  # 4: the derivative of the cap is 4 gate (1 - gate)
        nats /= tokens
        ctx.mark_non_differentiable(nats)
        return nats + extra / tokens, nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_x, d_head = ctx.saved_tensors
        grad = grads[0] * ctx.scale  # wide; a scalar leaves the tables' type alone
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


def wide(x: Tensor) -> torch.dtype:
    """The type for statistics: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of the model's operators; all of them compute the same mathematics."""

    norm: Callable[[Tensor], Tensor]
    rope: Callable[[Tensor, Rotation], Tensor]
    relu2: Callable[[Tensor], Tensor]
    mix: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    head_loss: Callable[[Tensor, Tensor, Tensor, LossTerms], tuple[Tensor, Tensor]]
    token_nats: Callable[[Tensor, Tensor, Tensor, float], Tensor]


HAND_WRITTEN = Ops(norm, rope, relu2, mix, head_loss, token_nats)
"""The operators of this module: fast on a CPU, where nothing is compiled."""
