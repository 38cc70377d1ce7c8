"""The plain operators are the hand-written ones, in values and in gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from society.model import ops, plain
from society.model.threads import single_thread

PRECISION = {torch.float64: (1e-9, 1e-9), torch.float32: (2e-4, 2e-5)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return drawn.to(dtype).requires_grad_()


def same(operator: str, inputs: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Both implementations give the same outputs and gradients."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = []
    for implementation in (plain.PLAIN, ops.HAND_WRITTEN):
        out = getattr(implementation, operator)(*inputs)
        parts = list(out) if isinstance(out, tuple) else [out]
        weight = torch.arange(1, parts[0].numel() + 1, dtype=dtype).view(parts[0].shape)
        found.append([*parts, *torch.autograd.grad((parts[0] * weight).sum(), wanted)])
    rtol, atol = PRECISION[dtype]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol * float(other.detach().abs().max() + 1)
        )


@pytest.mark.parametrize("dtype", PRECISION)
def test_norm_relu2_mix_and_rope(dtype: torch.dtype) -> None:
    x, x0 = draw(3, 5, 8, dtype=dtype), draw(3, 5, 8, dtype=dtype, seed=1)
    same("norm", (x,), dtype)
    same("relu2", (x,), dtype)
    keep, add = (draw(1, dtype=dtype, seed=seed)[0].detach().requires_grad_() for seed in (2, 3))
    same("mix", (x, x0, keep, add), dtype)
    same("rope", (draw(2, 3, 5, 8, dtype=dtype), ops.rotation(5, 8, 1e4, x.detach())), dtype)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    "terms",
    [ops.LossTerms(15.0), ops.LossTerms(5.0, 0.1), ops.LossTerms(8.0, 0.05, 1e-2)],
    ids=["plain", "smoothed", "both"],
)
@pytest.mark.parametrize("chunk", [3, 1000])
def test_head_loss(
    dtype: torch.dtype, terms: ops.LossTerms, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "LOGIT_BYTES", chunk * 4 * 11)
    x, head = draw(7, 6, dtype=dtype), draw(11, 6, dtype=dtype, seed=1, scale=2.0)
    targets = torch.tensor([3, 0, 10, 5, 5, 1, 9])
    same("head_loss", (x, head, targets, terms), dtype)
    one = plain.token_nats(x, head, targets, terms.softcap)
    other = ops.token_nats(x.detach(), head.detach(), targets, terms.softcap)
    torch.testing.assert_close(one, other)
    assert not one.requires_grad


def test_the_plain_loss_carries_no_gradient() -> None:
    x, head = draw(4, 6, dtype=torch.float64), draw(9, 6, dtype=torch.float64, seed=1)
    loss, nats = plain.head_loss(x, head, torch.tensor([1, 2, 3, 4]), ops.LossTerms(15.0, 0.1))
    assert loss.requires_grad
    assert not nats.requires_grad
