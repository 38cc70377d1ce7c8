"""The optimiser's steps for a compiler: the arithmetic of `optim`, each step one fused function.

What changes from step to step (rate, momentum, decay, bias corrections) comes in as 0-d tensors,
which are no part of the compiled code, so that nothing is compiled again; what a run fixes is
compiled in. After nanochat's fused steps (github.com/karpathy/nanochat).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from society.model.optim import ADAM_EPS, AdamGroup, MuonGroup, Steps, orthogonalize


def steps(compiler: Callable[[Callable[..., None]], Callable[..., None]]) -> Steps:
    """Steps for `optim.Optimizer`, compiled by `compiler` (identity: not at all)."""
    adam, muon = compiler(_adam), compiler(_muon)

    def adam_step(
        group: AdamGroup, grad: Tensor, step: int, rate: float = 1.0, decay: float = 1.0
    ) -> None:
        lr = group.lr * rate
        adam(
            group.param,
            grad,
            group.mean,
            group.square,
            group.beta1,
            group.beta2,
            _scalar(lr / (1 - group.beta1**step)),
            _scalar((1 - group.beta2**step) ** 0.5),
            _scalar(1 - lr * decay * group.weight_decay),
        )

    def muon_step(
        group: MuonGroup, grads: Tensor, rate: float, momentum: float, decay: float
    ) -> None:
        rows, columns = group.stacked.shape[-2:]
        muon(
            group.stacked,
            grads,
            group.momentum,
            group.square,
            group.reduced,
            group.polar_steps,
            group.beta2,
            _scalar(group.lr * rate * max(1.0, rows / columns) ** 0.5),
            _scalar(1 - momentum),
            _scalar(decay * group.weight_decay),
        )

    return Steps(adam_step, muon_step)


def _scalar(value: float) -> Tensor:
    """On the host: a kernel takes it as an argument, no copy is queued."""
    return torch.tensor(value, dtype=torch.float32)


def _adam(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    beta1: float,
    beta2: float,
    lr: Tensor,
    root: Tensor,
    keep: Tensor,
) -> None:
    """AdamW in place; `lr` and `root` hold the bias corrections, `keep` what decay leaves."""
    grad = grad.to(param.dtype)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    param.mul_(keep).sub_(lr * mean / (square.sqrt() / root + ADAM_EPS))


def _muon(
    stacked: Tensor,
    grads: Tensor,
    momentum: Tensor,
    square: Tensor,
    reduced: int,
    polar_steps: int,
    beta2: float,
    lr: Tensor,
    fresh: Tensor,
    decay: Tensor,
) -> None:
    """Muon in place; `fresh` is the share of the new gradient in the momentum."""
    grads = grads.to(momentum.dtype)
    momentum.add_((grads - momentum) * fresh)
    update = orthogonalize(grads + (momentum - grads) * (1 - fresh), polar_steps).float()
    size = update.square().mean(reduced, keepdim=True)
    square.lerp_(size, 1 - beta2)
    inverse = square.clamp_min(1e-10).rsqrt()
    before = size.sum((-2, -1), keepdim=True).sqrt()
    after = (size * inverse.square()).sum((-2, -1), keepdim=True).sqrt()
    update = update * (inverse * (before / after.clamp_min(1e-10)))
    agrees = (update * stacked) >= 0
    stacked.sub_(lr * (update + stacked * agrees * decay))
