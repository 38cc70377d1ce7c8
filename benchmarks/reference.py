"""The same training step as an ordinary eager program: what the trainer is compared with.

Standard PyTorch throughout: modules, `F.rms_norm`, `F.scaled_dot_product_attention`,
`F.cross_entropy`, autograd, `torch.optim.AdamW(fused=True)`, Muon as a `torch.optim.Optimizer`, and
autocast for bf16. Model and hyper-parameters are those of the single-GPU scripts of nanochat and
autoresearch (github.com/karpathy), and so is the style: nothing is left out that they do, and
nothing is made slow. It takes the initial weights and the rows of our trainer, so that losses and
gradients can be compared number by number (`tests/test_reference.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from society.model import schedule
from society.model.flops import GATE_CHANNELS, is_matrix
from society.model.recipe import Recipe

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
REFERENCE_DIM = 768
COVERED = {
    "tie_embeddings": False, "norm_placement": "pre", "qk_scale": 1.0, "value_gate": "learned",
    "residual_scalars": "learned", "skip_scale": 0.0, "label_smoothing": 0.0, "z_loss": 0.0,
    "optimizer": "muon", "adam_decay": 0.0,
}  # fmt: skip
"""Knobs that the reference knows at one value only; every other one it follows."""


class Uncovered(Exception):
    """The recipe uses a knob in a way the reference does not know."""


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm without weights."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-7)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: (B, T, heads, D) and two (1, T, 1, D / 2) -> (B, T, heads, D)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)


class Attention(nn.Module):
    """Causal attention in a window, with normalised queries and keys and value embeddings."""

    def __init__(self, recipe: Recipe, layer: int) -> None:
        """Weights as drawn by torch; `GPT.load` replaces them."""
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = recipe.head_dim, recipe.heads, recipe.kv_count
        values = self.kv_heads * self.head_dim
        self.query = nn.Linear(recipe.width, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(recipe.width, values, bias=False)
        self.value = nn.Linear(recipe.width, values, bias=False)
        self.project = nn.Linear(self.heads * self.head_dim, recipe.width, bias=False)
        self.gate, self.value_embed = None, None
        if layer in recipe.value_layers:
            channels = min(GATE_CHANNELS, recipe.width)
            self.gate = nn.Linear(channels, self.kv_heads, bias=False)
            self.value_embed = nn.Embedding(recipe.vocab, values)
        window = recipe.windows[layer]
        mask = torch.ones(recipe.seq_len, recipe.seq_len, dtype=torch.bool).tril().triu(1 - window)
        self.mask: Tensor | None
        self.register_buffer("mask", None if window >= recipe.seq_len else mask)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> Tensor:
        """(B, T, width) -> the same."""
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, self.heads, self.head_dim)
        k = self.key(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.value(x).view(batch, length, self.kv_heads, self.head_dim)
        if self.gate is not None and self.value_embed is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
            v = v + gate.unsqueeze(-1) * self.value_embed(ids).view(v.shape)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).to(q.dtype),
            attn_mask=self.mask, is_causal=self.mask is None,
            enable_gqa=self.kv_heads != self.heads,
        )  # fmt: skip
        projected: Tensor = self.project(y.transpose(1, 2).contiguous().view(batch, length, -1))
        return projected


class FeedForward(nn.Module):
    """Two linear maps and a non-linearity between them."""

    def __init__(self, recipe: Recipe) -> None:
        """Weights as drawn by torch; `GPT.load` replaces them."""
        super().__init__()
        hidden = recipe.mlp_ratio * recipe.width
        self.activation = recipe.activation
        self.expand = nn.Linear(recipe.width, hidden, bias=False)
        self.contract = nn.Linear(hidden, recipe.width, bias=False)
        if self.activation == "swiglu":
            self.swish = nn.Linear(recipe.width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> the same."""
        hidden: Tensor = self.expand(x)
        if self.activation == "relu2":
            hidden = F.relu(hidden).square()
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            hidden = F.silu(self.swish(x)) * hidden
        contracted: Tensor = self.contract(hidden)
        return contracted


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, recipe: Recipe, index: int) -> None:
        """The layer with this index, counted from 0."""
        super().__init__()
        self.attention = Attention(recipe, index)
        self.feed_forward = FeedForward(recipe)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> Tensor:
        """(B, T, width) -> the same."""
        x = x + self.attention(norm(x), cos, sin, ids)
        x = x + self.feed_forward(norm(x))
        return x


class GPT(nn.Module):
    """The model of the default recipe, of any size."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype = torch.float32) -> None:
        """The residual stream and the rotary angles have this type; weights are fp32.

        Raises:
            Uncovered: The recipe needs what the reference does not know.
        """
        super().__init__()
        for knob, value in COVERED.items():
            if getattr(recipe, knob) != value:
                raise Uncovered(
                    f"The reference has {knob}={value!r} only, not {getattr(recipe, knob)!r}."
                )
        self.recipe, self.dtype = recipe, dtype
        self.embed = nn.Embedding(recipe.vocab, recipe.width)
        self.layers = nn.ModuleList(Layer(recipe, i) for i in range(recipe.depth))
        self.head = nn.Linear(recipe.width, recipe.vocab, bias=False)
        self.residual_scale = nn.Parameter(torch.ones(recipe.depth))
        self.x0_scale = nn.Parameter(torch.zeros(recipe.depth))
        channel = torch.arange(0, recipe.head_dim, 2, dtype=torch.float64)
        rates = recipe.rope_base ** (-channel / recipe.head_dim)
        angles = torch.outer(torch.arange(recipe.seq_len, dtype=torch.float64), rates)
        self.register_buffer("cos", angles.cos()[None, :, None, :].to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None, :].to(dtype), persistent=False)

    def by_name(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that `society.model` gives them."""
        parameters = dict(self.named_parameters())
        found = {name: parameters[f"{name}.weight"] for name in ("embed", "head")}
        for i, layer in enumerate(self.layers):
            for part in layer.children():
                found |= {
                    f"layer{i}.{name.partition('.')[0]}": weight
                    for name, weight in part.named_parameters()
                }
        return found | {"residual_scale": self.residual_scale, "x0_scale": self.x0_scale}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights of `society.model.init.initial_weights`."""
        for name, parameter in self.by_name().items():
            parameter.copy_(weights[name])

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Token ids and targets (B, T) -> mean cross-entropy in nats, scalar."""
        x = norm(self.embed(ids).to(self.dtype))
        x0 = x
        for i, layer in enumerate(self.layers):
            x = self.residual_scale[i] * x + self.x0_scale[i] * x0
            x = layer(x, self.cos, self.sin, ids)
        logits = self.head(norm(x)).float()
        logits = self.recipe.softcap * torch.tanh(logits / self.recipe.softcap)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Muon(torch.optim.Optimizer):
    """Polar express in bf16, NorMuon and cautious decay; one group for each shape."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """Groups carry params, lr, momentum, beta2, steps and weight_decay."""
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        params = group["params"]
        state = self.state[params[0]]
        grads, weights = torch.stack([p.grad for p in params]), torch.stack(list(params))
        tall = weights.shape[-2] >= weights.shape[-1]
        across = -1 if tall else -2
        if not state:
            state["momentum"] = torch.zeros_like(weights)
            state["square"] = torch.zeros_like(weights.mean(across, keepdim=True))
        state["momentum"].lerp_(grads, 1 - group["momentum"])
        update = orthogonalize(grads.lerp_(state["momentum"], group["momentum"]), group["steps"])
        square = update.float().square().mean(across, keepdim=True)
        state["square"].lerp_(square, 1 - group["beta2"])
        scale = state["square"].clamp_min(1e-10).rsqrt()
        before = square.sum((-2, -1), keepdim=True).sqrt()
        after = (square * scale.square()).sum((-2, -1), keepdim=True).sqrt()
        update = update * (scale * (before / after.clamp_min(1e-10))).to(update.dtype)
        lr = group["lr"] * max(1.0, weights.shape[-2] / weights.shape[-1]) ** 0.5
        agrees = (update * weights) >= 0
        weights.sub_(lr * update + lr * group["weight_decay"] * weights * agrees)
        torch._foreach_copy_(params, list(weights.unbind(0)))


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Roughly the nearest orthogonal matrices: (matrices, rows, columns) -> same, bf16."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.shape[-2] > x.shape[-1]
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)]
        gram = x.mT @ x if tall else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for the rest, under the recipe's schedules."""

    def __init__(self, recipe: Recipe, weights: Mapping[str, nn.Parameter]) -> None:
        """Parameters by the names that `society.model` gives them."""
        self._recipe = recipe
        self._muon = Muon(_muon_groups(recipe, weights))
        self._adam = torch.optim.AdamW(
            _adam_groups(recipe, weights),
            betas=(recipe.adam_beta1, recipe.adam_beta2), eps=1e-10, weight_decay=0.0, fused=True,
        )  # fmt: skip
        self._groups = (*self._muon.param_groups, *self._adam.param_groups)
        for group in self._groups:
            group["initial_lr"] = group["lr"]

    def step(self, progress: float) -> None:
        """Update by the parameters' gradients and forget these; `progress` as in `schedule`."""
        rate = schedule.rate(self._recipe, progress)
        for group in self._groups:
            group["lr"] = group["initial_lr"] * rate
        decay = self._recipe.weight_decay * schedule.decay(self._recipe, progress)
        for group in self._muon.param_groups:
            group["momentum"] = schedule.momentum(self._recipe, progress)
            group["weight_decay"] = decay
        for optimizer in (self._muon, self._adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Trainer:
    """Model and optimisers of one run; `step` is one training step."""

    def __init__(self, recipe: Recipe, weights: Mapping[str, Tensor], *, autocast: bool) -> None:
        """Start from `weights`, in fp32 or under autocast to bf16."""
        self.autocast = autocast
        self.model = GPT(recipe, torch.bfloat16 if autocast else torch.float32)
        self.model.load(weights)
        self.optimizers = Optimizers(recipe, self.model.by_name())

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def backward(self, block: Tensor) -> float:
        """Loss in nats per token of (rows, T + 1) tokens; gradients are left in the parameters."""
        with self._precision():
            loss: Tensor = self.model(block[:, :-1], block[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def step(self, block: Tensor, progress: float) -> float:
        """Train on (rows, T + 1) tokens, `progress` through the run; loss in nats per token."""
        loss = self.backward(block)
        self.optimizers.step(progress)
        return loss


def _muon_groups(recipe: Recipe, weights: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for name, weight in weights.items():
        if is_matrix(name):
            by_shape.setdefault(weight.shape, []).append(weight)
    settings = {
        "lr": recipe.matrix_lr * recipe.lr_scale,
        "momentum": recipe.momentum_final,
        "beta2": recipe.muon_beta2,
        "steps": recipe.polar_steps,
        "weight_decay": recipe.weight_decay,
    }
    return [{"params": params, **settings} for params in by_shape.values()]


def _adam_groups(recipe: Recipe, weights: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    scale = recipe.lr_scale * (recipe.width / REFERENCE_DIM) ** -0.5
    rates = {
        "embed": recipe.embedding_lr,
        "head": recipe.head_lr,
        "value_embed": recipe.value_embed_lr,
        "residual_scale": recipe.residual_lr,
        "x0_scale": recipe.scalar_lr,
    }
    return [
        {"params": [weight], "lr": rates[name.rpartition(".")[2]] * scale}
        for name, weight in weights.items()
        if not is_matrix(name)
    ]
