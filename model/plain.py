"""The operators of `ops` in standard torch operations, with autograd's own derivatives.

A compiler fuses them on an accelerator, and they are the reference that the hand-written
derivatives are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from society.model.ops import EPS, LossTerms, Ops, Rotation

LOGIT_BYTES = 4 << 30
"""Most bytes of fp32 logits held at once. More are computed in chunks, and again in the backward
pass (Chen et al. 2016, arXiv:1604.06174), for 2 x dim x vocab more FLOPs per token."""


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without weights: (..., channels)."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def rope(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate each pair of channels by its position's angle: (..., T, head_dim) -> same."""
    first, second = x.chunk(2, -1)
    return x * angles.cos + torch.cat([second, first], -1) * angles.sin


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU; any shape."""
    return F.relu(x).square()


def mix(x: Tensor, x0: Tensor, keep: Tensor, add: Tensor) -> Tensor:
    """`keep * x + add * x0` with scalar weights."""
    return keep * x + add * x0


def token_nats(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Cross-entropy of each token in nats, without a gradient: (tokens,), fp32 (or fp64)."""
    with torch.no_grad():
        rows_each = _chunk_rows(head)
        parts = zip(torch.split(x, rows_each), torch.split(targets, rows_each), strict=True)
        return torch.cat(
            [
                F.cross_entropy(_logits(rows, head, softcap), wanted, reduction="none")
                for rows, wanted in parts
            ]
        )


def head_loss(x: Tensor, head: Tensor, targets: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """The objective, and the plain cross-entropy in nats per token (no gradient); both scalars."""
    rows = _chunk_rows(head)
    if len(x) <= rows:
        loss, nats = _summed(x, head, targets, terms)
    else:
        losses, plain = [], []
        for part, wanted in zip(torch.split(x, rows), torch.split(targets, rows), strict=True):
            one, other = checkpoint(_summed, part, head, wanted, terms, use_reentrant=False)
            losses.append(one)
            plain.append(other)
        loss, nats = torch.stack(losses).sum(), torch.stack(plain).sum()
    return loss / len(x), (nats / len(x)).detach()


def _summed(x: Tensor, head: Tensor, targets: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Objective and cross-entropy of some tokens, summed."""
    logits = _logits(x, head, terms.softcap)
    nats = F.cross_entropy(logits, targets, reduction="sum")
    loss = nats
    if terms.label_smoothing:
        loss = F.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=terms.label_smoothing
        )
    if terms.z_loss:
        loss = loss + terms.z_loss * logits.logsumexp(1).square().sum()
    return loss, nats.detach()


def _logits(x: Tensor, head: Tensor, softcap: float) -> Tensor:
    """Capped logits, fp32 (or fp64): (tokens, vocab)."""
    logits = F.linear(x, head)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return softcap * torch.tanh(wide / softcap)


def _chunk_rows(head: Tensor) -> int:
    return max(1, LOGIT_BYTES // (4 * len(head)))


PLAIN = Ops(norm, rope, relu2, mix, head_loss, token_nats)
"""The operators of this module."""
