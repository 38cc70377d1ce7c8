"""How a recipe is executed must not change what is computed: parts, compilers, clocks, memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from society.model import data, train
from society.model.device import Execution
from society.model.init import initial_weights
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.records import Budget, BudgetKind

TINY = Recipe(vocab=300, dim=32, depth=2, seq_len=32, batch_tokens=128, lr_scale=0.1)
FIVE = Budget(BudgetKind.STEPS, 5)
EAGERLY = Execution(attention="matmul", compiler="eager")
"""The path of an accelerator on a CPU: traced, and run operation by operation."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def tokens() -> data.TrainTokens:
    drawn = np.random.default_rng(1).zipf(1.3, 6000) % 300
    return data.TrainTokens(drawn.astype(np.uint16), 300, "test")


def run(recipe: Recipe = TINY, budget: Budget = FIVE, **more: Any) -> train.Trained:
    return train.train(recipe, budget=budget, seed=1, tokens=tokens(), **more)


def block(rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(300, (rows, 33), generator=generator)


def machine(recipe: Recipe = TINY, execution: Execution | None = None) -> train.Machine:
    masters = initial_weights(recipe, 1)
    return train.prepare(recipe, masters, "cpu", execution or Execution())


# ------------------------------------------------------------------- parts of a batch


def moved(recipe: Recipe) -> dict[str, Tensor]:
    """Weights away from the start, where much of the gradient is zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: w + 0.02 * torch.randn(w.shape, generator=generator)
        for name, w in initial_weights(recipe, 1).items()
    }


@pytest.mark.parametrize("rows", [1, 2])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(rows: int) -> None:
    whole, masters = machine(), moved(TINY)
    nats, wanted = train.gradients(whole, masters, block())
    parts_nats, found = train.gradients(replace(whole, rows=rows), masters, block())
    assert parts_nats.item() == pytest.approx(nats.item(), rel=1e-4)
    for name, grad in wanted.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - grad.float()).norm() / grad.float().norm()
        assert error < 0.02, name  # the whole batch's gradient is rounded to bf16


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (2, 2), (3, 2), (4, 4), (100, 4)])
def test_the_rows_at_once_divide_the_batch(asked: int, used: int) -> None:
    assert run(execution=Execution(micro_rows=asked)).micro_rows == used


def test_a_run_in_parts_learns_the_same() -> None:
    whole, parts = run(), run(execution=Execution(micro_rows=1))
    assert parts.curve == pytest.approx(whole.curve, abs=5e-3)
    assert (parts.steps, parts.tokens, parts.flops) == (whole.steps, whole.tokens, whole.flops)


# ------------------------------------------------------------------ the compiled path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1, "head_size": 16, "activation": "swiglu", "norm_placement": "sandwich"},
        {"optimizer": "adamw", "tie_embeddings": True, "residual_scalars": "off"},
        {"skip_scale": 0.1, "value_gate": "none", "z_loss": 1e-3, "label_smoothing": 0.1},
    ],
)
def test_the_path_of_accelerators_learns_the_same(changes: dict[str, Any]) -> None:
    recipe = TINY.model_copy(update=changes)
    compiled = run(recipe, execution=EAGERLY)
    assert compiled.curve == pytest.approx(run(recipe).curve, abs=5e-3)
    assert compiled.attention == ("matmul", "matmul")
    assert compiled.compile_s > 0


def test_the_path_of_accelerators_has_the_gradient_of_the_cpus() -> None:
    recipe = TINY.model_copy(update={"value_embeds": "all", "kv_heads": 1})
    masters = moved(recipe)
    _, wanted = train.gradients(machine(recipe), masters, block())
    _, found = train.gradients(machine(recipe, EAGERLY), masters, block())
    for name, grad in wanted.items():
        error = (found[name].float() - grad.float()).norm() / grad.float().norm()
        assert error < 0.05, name  # both are bf16 all the way


def test_steps_are_traced_once_and_in_one_piece() -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    run(execution=EAGERLY)
    after_one = counters["stats"]["unique_graphs"]
    counters.clear()
    run(budget=Budget(BudgetKind.STEPS, 20), execution=EAGERLY)
    assert counters["stats"]["unique_graphs"] == after_one > 0
    assert not counters["graph_break"]


def test_the_untimed_phase_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it does, the training starts from the seed's own weights."""
    monkeypatch.setattr(train, "WARM_UP_STEPS", 0)
    without = run(execution=EAGERLY)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 7)
    with_steps = run(execution=EAGERLY)
    assert with_steps.curve == without.curve
    assert all(torch.equal(w, without.weights[name]) for name, w in with_steps.weights.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, at its import
def test_compiled_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    kept = Execution(attention="matmul", compiler="inductor", cache=tmp_path)
    first = run(execution=kept)
    assert any((tmp_path / "compile").iterdir())
    counters = torch._dynamo.utils.counters
    counters.clear()
    again = run(execution=kept)
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert not counters["inductor"]["fxgraph_cache_miss"]
    assert again.curve == first.curve
    assert first.curve == pytest.approx(run().curve, abs=0.02)  # fused bf16 rounds less often


# ------------------------------------------------------------------------------ memory


def out_of_memory_above(rows: int, tried: list[int]) -> Callable[..., Any]:
    def rehearse(recipe: Recipe, initial: Any, made: train.Machine, device: str) -> None:
        tried.append(made.rows)
        if made.rows > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    return rehearse


def test_rows_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    recipe = TINY.model_copy(update={"batch_tokens": 32 * 12})
    monkeypatch.setattr(train, "_rehearse", out_of_memory_above(3, tried))
    assert machine(recipe, EAGERLY).rows == 3
    assert tried == [12, 6, 4, 3]


def test_what_does_not_fit_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(train, "_rehearse", out_of_memory_above(0, tried))
    with pytest.raises(torch.OutOfMemoryError):
        machine(TINY, EAGERLY)
    assert tried == [4, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):  # and asked-for rows are kept
        machine(TINY, replace(EAGERLY, micro_rows=2))
    assert tried == [4, 2, 1, 2]


# --------------------------------------------------------------- budgets by a late clock


class LateClock:
    """Every step takes `per_step` seconds; the host is allowed to run ahead."""

    ahead = 3

    def __init__(self, per_step: float) -> None:
        self.per_step, self.made, self.waited = per_step, 0, 0

    def start(self) -> None:
        pass

    def mark(self, value: Tensor) -> Any:
        self.made += 1
        number, loss, clock = self.made, value.item(), self

        class Reached:
            def read(self) -> tuple[float, float]:
                clock.waited += 1
                return number * clock.per_step, loss

        return Reached()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> LateClock:
    late = LateClock(2.0)
    monkeypatch.setattr(train, "timeline_of", lambda device: late)
    return late


def test_a_budget_in_seconds_counts_the_steps_under_way(clock: LateClock) -> None:
    seen: list[float] = []
    trained = run(
        budget=Budget(BudgetKind.SECONDS, 20.0), on_step=lambda n, loss, done: seen.append(done)
    )
    assert trained.steps == clock.made == 10
    assert trained.train_s == 20.0
    assert seen == pytest.approx([n / 10 for n in range(10)])
    assert trained.tokens_per_s == trained.tokens / 20.0


def test_losses_read_late_are_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = run()
    monkeypatch.setattr(train, "timeline_of", lambda device: LateClock(1.0))
    late = run()
    assert late.curve == at_once.curve
    assert all(torch.equal(w, at_once.weights[name]) for name, w in late.weights.items())


def test_divergence_is_found_a_few_steps_late_and_by_its_own_step(clock: LateClock) -> None:
    wild = TINY.model_copy(update={"head_lr": 50.0, "lr_scale": 4.0})
    with pytest.raises(train.Diverged) as caught:
        run(wild, Budget(BudgetKind.STEPS, 40))
    assert clock.made - caught.value.step <= clock.ahead
