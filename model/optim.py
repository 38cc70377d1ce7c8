"""Muon for the matrices inside the layers, AdamW for the rest.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024) by polar-express iterations
(Amsel et al. 2025, arXiv:2505.16932) in bf16, evens out the size of the update per neuron
(NorMuon, arXiv:2510.05491), and decays a weight only where decay and update agree (cautious,
arXiv:2510.12402). Matrices of one shape are updated together. After the single-GPU scripts of
nanochat and modded-nanogpt. Plain functions on explicit state: nothing is hidden in hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from society.model import schedule
from society.model.flops import is_matrix
from society.model.recipe import Recipe

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients per iteration (arXiv:2505.16932, safety factor 1.02); the last one repeats."""

REFERENCE_DIM = 768
"""AdamW's rates are given for this width and scale with its square root (nanochat)."""
ADAM_EPS = 1e-10
ADAM_MATRIX_RATE = 0.1
"""AdamW's rate for matrices relative to Muon's: an entry of an orthogonal update is about
1 / sqrt(width), one of AdamW's about 1."""


@dataclass(slots=True)
class AdamGroup:
    """One tensor that AdamW trains, with its state."""

    param: Tensor
    lr: float
    beta1: float
    beta2: float
    weight_decay: float = 0.0
    mean: Tensor = field(init=False)
    square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero moments."""
        self.mean = torch.zeros_like(self.param)
        self.square = torch.zeros_like(self.param)


@dataclass(slots=True)
class MuonGroup:
    """Matrices of one shape that Muon trains together, with their state."""

    names: tuple[str, ...]
    stacked: Tensor
    """(matrices, rows, columns), fp32; the masters are views of it."""
    lr: float
    beta2: float
    polar_steps: int
    weight_decay: float = 0.0
    momentum: Tensor = field(init=False)
    square: Tensor = field(init=False)
    """Second moment per row (tall matrices) or column, (matrices, rows, 1) or (…, 1, columns)."""

    def __post_init__(self) -> None:
        """Start from zero moments."""
        self.momentum = torch.zeros_like(self.stacked)
        self.square = torch.zeros_like(self.stacked.mean(self.reduced, keepdim=True))

    @property
    def reduced(self) -> int:
        """Dimension the second moment averages over: the shorter one."""
        rows, columns = self.stacked.shape[-2:]
        return -1 if rows >= columns else -2


def adam_step(
    group: AdamGroup, grad: Tensor, step: int, rate: float = 1.0, decay: float = 1.0
) -> None:
    """One AdamW update in place (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        group: Parameter and state.
        grad: Same shape as the parameter, any float type.
        step: Counted from 1.
        rate: Factor on the group's learning rate.
        decay: Factor on the group's weight decay.
    """
    adamw(
        [group.param],
        [grad.to(group.param.dtype)],
        [group.mean],
        [group.square],
        [],
        [torch.tensor(step - 1.0, device=group.param.device)],
        fused=True,  # one pass over memory instead of eight
        amsgrad=False,
        beta1=group.beta1,
        beta2=group.beta2,
        lr=group.lr * rate,
        weight_decay=group.weight_decay * decay,
        eps=ADAM_EPS,
        maximize=False,
    )


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """The nearest orthogonal matrices, roughly: (matrices, rows, columns) -> same, bf16."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.shape[-2] > x.shape[-1]  # the small square product, without a transposed copy
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)]
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a)
    return x


def _even_out(group: MuonGroup, update: Tensor) -> Tensor:
    """Divide by each neuron's running size, keeping each matrix's norm (NorMuon): fp32."""
    update = update.float()
    square = update.square().mean(group.reduced, keepdim=True)
    group.square.lerp_(square, 1 - group.beta2)
    inverse = group.square.clamp_min(1e-10).rsqrt()
    before = square.sum((-2, -1), keepdim=True).sqrt()
    after = (square * inverse.square()).sum((-2, -1), keepdim=True).sqrt()
    return update * (inverse * (before / after.clamp_min(1e-10)))


def muon_step(group: MuonGroup, grads: Tensor, rate: float, momentum: float, decay: float) -> None:
    """One Muon update in place.

    Args:
        group: Matrices and state.
        grads: (matrices, rows, columns), any float type.
        rate: Factor on the group's learning rate.
        momentum: Fraction of the momentum kept (Nesterov form).
        decay: Factor on the group's weight decay.
    """
    grads = grads.to(group.momentum.dtype)
    group.momentum.lerp_(grads, 1 - momentum)
    update = _even_out(
        group, orthogonalize(grads.lerp(group.momentum, momentum), group.polar_steps)
    )
    rows, columns = group.stacked.shape[-2:]
    lr = group.lr * rate * max(1.0, rows / columns) ** 0.5
    if group.weight_decay:
        agrees = (update * group.stacked).ge_(0)  # fp32: faster than a mask of another type
        update.addcmul_(group.stacked, agrees, value=decay * group.weight_decay)
    group.stacked.sub_(update, alpha=lr)


class Steps(NamedTuple):
    """One implementation of the updates, with the arguments of `adam_step` and `muon_step`."""

    adam: Callable[[AdamGroup, Tensor, int, float, float], None]
    muon: Callable[[MuonGroup, Tensor, float, float, float], None]


EAGER = Steps(adam_step, muon_step)
"""The updates of this module, one operation after the other."""


class Optimizer:
    """All groups of one model. Not thread-safe; owns the master weights it returns."""

    def __init__(self, recipe: Recipe, weights: Mapping[str, Tensor], steps: Steps = EAGER) -> None:
        """Take over fp32 weights; read them back from `masters`."""
        self._recipe, self._steps = recipe, steps
        self._step = 0
        self._muon = _muon_groups(recipe, weights)
        self._adam = {
            name: _adam_group(recipe, name, weight)
            for name, weight in weights.items()
            if not _by_muon(recipe, name, weight)
        }
        matrices = {
            name: group.stacked[i] for group in self._muon for i, name in enumerate(group.names)
        }
        adam = {name: group.param for name, group in self._adam.items()}
        self.masters = {name: (matrices | adam)[name] for name in weights}

    def step(self, grads: Mapping[str, Tensor], progress: float) -> None:
        """Update every master in place; `progress` is the share of the run that is done."""
        self._step += 1
        rate = schedule.rate(self._recipe, progress)
        momentum = schedule.momentum(self._recipe, progress)
        decay = schedule.decay(self._recipe, progress)
        for name, adam in self._adam.items():
            self._steps.adam(adam, grads[name], self._step, rate, decay)
        for muon in self._muon:
            stacked = torch.stack([grads[name] for name in muon.names])
            self._steps.muon(muon, stacked, rate, momentum, decay)


def _by_muon(recipe: Recipe, name: str, weight: Tensor) -> bool:
    return recipe.optimizer == "muon" and is_matrix(name) and weight.ndim == 2


def _muon_groups(recipe: Recipe, weights: Mapping[str, Tensor]) -> list[MuonGroup]:
    by_shape: dict[torch.Size, list[str]] = {}
    for name, weight in weights.items():
        if _by_muon(recipe, name, weight):
            by_shape.setdefault(weight.shape, []).append(name)
    return [
        MuonGroup(
            tuple(names),
            torch.stack([weights[name] for name in names]),
            recipe.matrix_lr * recipe.lr_scale,
            recipe.muon_beta2,
            recipe.polar_steps,
            recipe.weight_decay,
        )
        for names in by_shape.values()
    ]


def _adam_group(recipe: Recipe, name: str, weight: Tensor) -> AdamGroup:
    lr, weight_decay = _adam_rates(recipe, name, weight)
    lr *= recipe.lr_scale
    return AdamGroup(weight.clone(), lr, recipe.adam_beta1, recipe.adam_beta2, weight_decay)


def _adam_rates(recipe: Recipe, name: str, weight: Tensor) -> tuple[float, float]:
    """Learning rate (before `lr_scale`) and weight decay of a tensor that AdamW trains."""
    scale = (recipe.width / REFERENCE_DIM) ** -0.5
    if name == "residual_scale":
        return recipe.residual_lr * scale, 0.0
    if weight.ndim < 2:  # x0_scale, skip
        return recipe.scalar_lr * scale, 0.0
    if is_matrix(name):
        return recipe.matrix_lr * ADAM_MATRIX_RATE, recipe.weight_decay
    tables = {"embed": recipe.embedding_lr, "head": recipe.head_lr}
    return tables.get(name, recipe.value_embed_lr) * scale, recipe.adam_decay
