"""Every hand-written gradient against autograd's own, in fp64 and in fp32."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from society.model import attention, gpt, ops
from society.model.recipe import Recipe

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
"""Largest absolute difference; values and gradients here are of order one."""


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], tol: float
) -> None:
    """Values and gradients agree, under a random cotangent."""
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().clone().requires_grad_() for x in inputs]
    y, wanted = ours(*mine), plain(*theirs)
    cotangent = draw(*y.shape, dtype=torch.float64, seed=9)
    torch.testing.assert_close(y.double(), wanted, atol=tol, rtol=tol)
    grads = torch.autograd.grad(y, mine, cotangent.to(y.dtype))
    references = torch.autograd.grad(wanted, theirs, cotangent)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad.double(), reference, atol=tol, rtol=tol)


def test_norm(dtype: torch.dtype) -> None:
    same(
        ops.norm,
        lambda x: F.rms_norm(x, x.shape[-1:], eps=ops.EPS),
        [draw(3, 5, 8, dtype=dtype)],
        TOLERANCE[dtype],
    )


def test_norm_and_its_gradient_at_zero() -> None:
    """A layer that adds nothing yet is normalised too, where norms stand behind the layers."""
    x = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    y = ops.norm(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(grad, torch.full_like(grad, ops.EPS**-0.5))


def test_norm_of_a_tiny_tied_table_row_is_a_unit_row() -> None:
    x = draw(4, 64, dtype=torch.float32) * 0.001
    assert ops.norm(x).square().mean().item() == pytest.approx(1, abs=0.15)


def plain_rope(x: Tensor, base: float) -> Tensor:
    """Rotation as multiplication of complex numbers."""
    length, channels = x.shape[-2:]
    rates = base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), rates)
    pairs = torch.complex(x[..., : channels // 2], x[..., channels // 2 :])
    turned = pairs * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([turned.real, turned.imag], -1)


def test_rope(dtype: torch.dtype) -> None:
    x = draw(2, 3, 7, 8, dtype=dtype)
    angles = ops.rotation(7, 8, 1000.0, x)
    same(lambda x: ops.rope(x, angles), lambda x: plain_rope(x, 1000.0), [x], TOLERANCE[dtype])


def test_rope_scores_depend_on_distance_only() -> None:
    angles = ops.rotation(10, 8, 100.0, torch.empty((), dtype=torch.float64))
    q, k = (draw(8, dtype=torch.float64, seed=s).expand(10, 8) for s in (1, 2))
    scores = ops.rope(q, angles) @ ops.rope(k, angles).T
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_relu2(dtype: torch.dtype) -> None:
    same(ops.relu2, lambda x: x.relu().square(), [draw(6, 7, dtype=dtype)], TOLERANCE[dtype])


def test_mix(dtype: torch.dtype) -> None:
    inputs = [draw(2, 3, 4, dtype=dtype, seed=s) for s in (0, 1)]
    scalars = [draw(1, dtype=dtype, seed=s)[0] for s in (2, 3)]
    same(ops.mix, lambda x, x0, a, b: a * x + b * x0, inputs + scalars, TOLERANCE[dtype])


def plain_loss(x: Tensor, head: Tensor, targets: Tensor, terms: ops.LossTerms) -> Tensor:
    logits = terms.softcap * torch.tanh(x @ head.T / terms.softcap)
    loss = F.cross_entropy(logits, targets, label_smoothing=terms.label_smoothing)
    return loss + terms.z_loss * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_head_loss_over_several_chunks(dtype: torch.dtype, smoothing: float, z_loss: float) -> None:
    tokens, dim, vocab = ops.CHUNK_ROWS * 2 + 5, 16, 50
    x, head = draw(tokens, dim, dtype=dtype), draw(vocab, dim, dtype=dtype, seed=1)
    targets = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(2))
    terms = ops.LossTerms(5.0, smoothing, z_loss)
    same(
        lambda x, head: ops.head_loss(x, head, targets, terms)[0],
        lambda x, head: plain_loss(x, head, targets, terms),
        [x, head],
        TOLERANCE[dtype],
    )


def test_head_loss_over_several_blocks_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CHUNK_ROWS", 4)
    monkeypatch.setattr(ops, "BLOCK_LOGITS", 450)  # 8 rows of 50
    x, head = draw(21, 16, dtype=torch.float64), draw(50, 16, dtype=torch.float64, seed=1)
    targets = torch.arange(21) * 2
    terms = ops.LossTerms(5.0, 0.1, 0.01)
    same(
        lambda x, head: ops.head_loss(x, head, targets, terms)[0],
        lambda x, head: plain_loss(x, head, targets, terms),
        [x, head],
        TOLERANCE[torch.float64],
    )


def test_head_loss_reports_plain_nats_whatever_the_objective() -> None:
    x, head = draw(9, 8, dtype=torch.float64), draw(20, 8, dtype=torch.float64, seed=1)
    targets = torch.arange(9)
    _, nats = ops.head_loss(x, head, targets, ops.LossTerms(15.0, 0.1, 0.01))
    wanted = plain_loss(x, head, targets, ops.LossTerms(15.0))
    torch.testing.assert_close(nats, wanted)
    each = ops.token_nats(x, head, targets, 15.0)
    torch.testing.assert_close(each.mean(), wanted)


def test_head_loss_stays_finite_at_the_largest_softcap() -> None:
    x = torch.full((2, 4), 1e4, dtype=torch.bfloat16)
    head = torch.stack([torch.ones(4), -torch.ones(4), torch.zeros(4)]).bfloat16()
    loss, nats = ops.head_loss(x, head, torch.tensor([0, 1]), ops.LossTerms(ops.MAX_SOFTCAP))
    assert nats.item() == pytest.approx(ops.MAX_SOFTCAP)
    assert math.isfinite(loss.item())


def test_head_loss_in_bf16_is_close_to_fp64() -> None:
    x, head = draw(300, 64, dtype=torch.float64), draw(100, 64, dtype=torch.float64, seed=1)
    x, head = x.bfloat16(), (head / 8).bfloat16()  # logits of order one, as in training
    targets = torch.arange(300) % 100
    loss, _ = ops.head_loss(x, head, targets, ops.LossTerms(15.0))
    wanted = plain_loss(x.double(), head.double(), targets, ops.LossTerms(15.0))
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-3)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_attention_equals_torch(dtype: torch.dtype, window: int) -> None:
    inputs = [draw(2, 3, 8, 4, dtype=dtype, seed=s) for s in range(3)]
    mask = attention.window_mask(8, window, inputs[0])
    allowed = torch.ones(8, 8, dtype=torch.bool).tril().triu(1 - window)
    same(
        lambda q, k, v: attention.attend(q, k, v, mask),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed),
        inputs,
        TOLERANCE[dtype],
    )


PROJECTED = {
    "default": {},
    "grouped": {"heads": 4, "kv_heads": 2, "qk_scale": 1.3},
    "one-head": {"heads": 1, "head_size": 12, "window_pattern": "L"},
    "ungated": {"value_gate": "none", "value_embeds": "all"},
    "half": {"value_gate": "fixed"},
    "without": {"value_embeds": "off", "rope_base": 100.0},
}


@pytest.mark.parametrize("knobs", PROJECTED.values(), ids=PROJECTED.keys())
def test_attention_by_hand_equals_the_composed_one(
    dtype: torch.dtype, knobs: dict[str, object]
) -> None:
    recipe = Recipe.model_validate(
        {"vocab": 300, "dim": 32, "depth": 1, "seq_len": 8, "batch_tokens": 24, **knobs}
    )
    like = torch.empty((), dtype=dtype)
    heads, groups = (n * recipe.head_dim for n in (recipe.heads, recipe.kv_count))
    gated = bool(recipe.value_layers) and recipe.value_gate == "learned"
    inputs = [
        draw(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate(
            [(24, 32), (heads, 32), (groups, 32), (groups, 32), (recipe.kv_count, 32), (24, groups)]
        )
    ]

    def by_hand(x: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, own: Tensor) -> Tensor:
        weights = attention.Projections(q, k, v, gate if gated else None)
        y = attention.projected(recipe, like)[0](x, weights, own if recipe.value_layers else None)
        return y + 0 * (gate.sum() + own.sum())

    def composed(x: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, own: Tensor) -> Tensor:
        weights = attention.Projections(q, k, v, gate if gated else None)
        fixed = gpt.constants(recipe, x)
        embedded = own if recipe.value_layers else None
        return gpt._composed(recipe, fixed, 0, x, weights, embedded) + 0 * (gate.sum() + own.sum())

    same(by_hand, composed, inputs, 50 * TOLERANCE[dtype])  # inputs of order 30, not 1


def test_attention_by_hand_keeps_no_gradient_it_is_not_asked_for() -> None:
    recipe = Recipe(vocab=300, dim=32, depth=1, seq_len=8, batch_tokens=24, value_embeds="off")
    with torch.inference_mode():
        weights = attention.Projections(*(torch.ones(32, 32) for _ in range(3)))
        (layer,) = attention.projected(recipe, torch.empty(()))
        assert layer(torch.ones(24, 32), weights, None).shape == (24, 32)
