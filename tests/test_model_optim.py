"""AdamW against torch's, Muon against its definition, schedules against their corners."""

import pytest
import torch

from society.model import optim, schedule
from society.model.init import initial_weights
from society.model.recipe import Recipe


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_adamw_equals_torch() -> None:
    start = noise(7, 5)
    group = optim.AdamGroup(start.clone(), 0.01, 0.8, 0.95, weight_decay=0.1)
    param = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW(
        [param], lr=0.01, betas=(0.8, 0.95), eps=optim.ADAM_EPS, weight_decay=0.1
    )
    for step in range(1, 21):
        grad = noise(7, 5, seed=step)
        param.grad = grad.clone()
        theirs.step()
        optim.adam_step(group, grad, step)
    torch.testing.assert_close(group.param, param.data, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 8), (2, 8, 32), (2, 2, 32)])
def test_orthogonalize_flattens_the_spectrum(shape: tuple[int, int, int]) -> None:
    matrices = noise(*shape)
    found = optim.orthogonalize(matrices, 5).float()
    assert found.shape == shape
    sizes = torch.linalg.svdvals(found)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    exact = left @ right
    cosine = (found * exact).sum((1, 2)) / (found.norm(dim=(1, 2)) * exact.norm(dim=(1, 2)))
    assert cosine.min() > 0.98


def test_more_iterations_come_closer() -> None:
    matrices = noise(4, 16, 16)
    spread = [
        (torch.linalg.svdvals(optim.orthogonalize(matrices, n).float()) - 1).abs().mean()
        for n in (1, 3, 5)
    ]
    assert spread[0] > spread[1] > spread[2]


def muon_group(weights: torch.Tensor) -> optim.MuonGroup:
    return optim.MuonGroup(("w",), weights, lr=0.1, beta2=0.9, polar_steps=5, weight_decay=0.6)


def test_evening_out_keeps_the_norm_and_levels_the_rows() -> None:
    group = muon_group(torch.zeros(1, 32, 8))
    update = noise(1, 32, 8) * torch.linspace(0.1, 2, 32)[None, :, None]
    even = optim._even_out(group, update)
    assert even.norm().item() == pytest.approx(update.norm().item(), rel=1e-4)
    rows = even.norm(dim=-1)
    assert (rows.max() / rows.min()).item() == pytest.approx(1, abs=1e-3)


def test_muon_step_is_its_definition() -> None:
    weights, grads = noise(2, 32, 8), noise(2, 32, 8, seed=1)
    group = muon_group(weights.clone())
    optim.muon_step(group, grads, rate=0.5, momentum=0.9, decay=0.5)
    nesterov = (1 - 0.9) * grads + 0.9 * (1 - 0.9) * grads
    update = optim._even_out(muon_group(weights), optim.orthogonalize(nesterov, 5))
    lr = 0.1 * 0.5 * 2  # tall matrices: sqrt(32 / 8)
    agrees = (update * weights >= 0).float()
    wanted = weights - lr * update - lr * 0.3 * weights * agrees
    torch.testing.assert_close(group.stacked, wanted, atol=0.01, rtol=0.02)  # bf16 inside
    assert 0.3 < agrees.mean() < 0.7


def test_matrices_do_not_disturb_each_other() -> None:
    weights, grads = noise(3, 16, 8), noise(3, 16, 8, seed=1)
    together = muon_group(weights.clone())
    optim.muon_step(together, grads, 1.0, 0.9, 0.1)
    alone = muon_group(weights[1:2].clone())
    optim.muon_step(alone, grads[1:2], 1.0, 0.9, 0.1)
    torch.testing.assert_close(together.stacked[1:2], alone.stacked, atol=0.01, rtol=0.02)


def test_the_optimizer_trains_every_parameter_once() -> None:
    recipe = Recipe(vocab=300, dim=32, depth=3)
    weights = initial_weights(recipe, 0)
    optimizer = optim.Optimizer(recipe, weights)
    assert list(optimizer.masters) == list(weights)
    before = {name: w.clone() for name, w in optimizer.masters.items()}
    grads = {name: noise(*w.shape, seed=5).bfloat16() for name, w in weights.items()}
    optimizer.step(grads, 0.0)
    for name, weight in optimizer.masters.items():
        assert not torch.equal(weight, before[name]), name


def test_rates_scale_with_width_except_muons() -> None:
    recipe = Recipe(dim=192, vocab=300)
    optimizer = optim.Optimizer(recipe, initial_weights(recipe, 0))
    adam = optimizer._adam
    assert adam["embed"].lr == pytest.approx(1.2)
    assert adam["layer1.value_embed"].lr == pytest.approx(1.2)
    assert adam["head"].lr == pytest.approx(0.008)
    assert adam["x0_scale"].lr == pytest.approx(1.0)
    assert adam["residual_scale"].lr == pytest.approx(0.01)
    assert {group.lr for group in optimizer._muon} == {0.04}


def test_init_is_keyed_by_name() -> None:
    """Another depth or an extra tensor leaves the other tensors' draws alone."""
    small, large = (initial_weights(Recipe(depth=d), 5) for d in (2, 4))
    assert torch.equal(small["layer0.query"], large["layer0.query"])
    assert torch.equal(small["head"], large["head"])
    without = initial_weights(Recipe(value_embeds="off"), 5)
    assert all(torch.equal(without[name], large[name]) for name in without)
    other = initial_weights(Recipe(), 6)
    assert not torch.equal(other["head"], large["head"])


def test_init_has_the_stated_spread() -> None:
    recipe = Recipe(dim=128, qkv_scale=2.0, value_embed_init=0.5, x0_init=0.3)
    weights = initial_weights(recipe, 0)
    unit = 128**-0.5
    wanted = {
        "embed": 1.0, "head": 0.001, "layer0.query": 2 * unit, "layer0.value": 2 * unit,
        "layer0.expand": unit, "layer1.value_embed": unit / 2, "layer0.project": 0.0,
        "layer0.contract": 0.0, "layer1.gate": 0.0,
    }  # fmt: skip
    for name, sd in wanted.items():
        assert weights[name].std().item() == pytest.approx(sd, rel=0.03), name
    assert weights["residual_scale"].tolist() == [1.0] * 4
    assert weights["x0_scale"].tolist() == pytest.approx([0.3] * 4)


def test_schedules_at_their_corners() -> None:
    recipe = Recipe(warm_up=0.1, warm_down=0.5, final_lr=0.2, momentum_ramp=0.5)
    assert schedule.rate(recipe, 0.0) == 0
    assert schedule.rate(recipe, 0.05) == pytest.approx(0.5)
    assert schedule.rate(recipe, 0.3) == 1
    assert schedule.rate(recipe, 0.75) == pytest.approx(0.6)
    assert schedule.rate(recipe, 1.0) == pytest.approx(0.2)
    assert schedule.momentum(recipe, 0.0) == pytest.approx(0.85)
    assert schedule.momentum(recipe, 0.25) == pytest.approx(0.9)
    assert schedule.momentum(recipe, 0.7) == pytest.approx(0.95)
    assert schedule.decay(recipe, 0.25) == pytest.approx(0.75)


def test_schedules_that_are_switched_off() -> None:
    recipe = Recipe(warm_up=0.0, warm_down=0.0, momentum_ramp=0.0)
    assert {schedule.rate(recipe, p) for p in (0.0, 0.5, 0.999)} == {1.0}
    assert schedule.momentum(recipe, 0.0) == pytest.approx(0.95)
