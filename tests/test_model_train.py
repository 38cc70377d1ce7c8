"""Training and scoring: the same bits, honest budgets, refusals, and a model that learns."""

import itertools
import json
import math
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from society.errors import SocietyError
from society.model import data, evaluate, flops, gpt, ops, train, weights
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.records import Budget, BudgetKind, Split

TINY = Recipe(vocab=300, dim=32, depth=2, seq_len=32, batch_tokens=128, lr_scale=0.3)
FIVE = Budget(BudgetKind.STEPS, 5)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def text(vocab: int = 300, count: int = 6000) -> np.ndarray:
    return (np.random.default_rng(1).zipf(1.3, count) % vocab).astype(np.uint16)


def train_tokens(vocab: int = 300, count: int = 6000) -> data.TrainTokens:
    return data.TrainTokens(text(vocab, count), vocab, "test")


def eval_tokens(vocab: int = 300, count: int = 3000) -> data.EvalTokens:
    lengths = np.full(vocab, 3, np.uint16)
    lengths[-1] = 0
    return data.EvalTokens(text(vocab, count), lengths, vocab, Split.VALIDATION, "test")


def tiny(recipe: Recipe = TINY, budget: Budget = FIVE, seed: int = 1, **more: Any) -> train.Trained:
    return train.train(recipe, budget=budget, seed=seed, tokens=train_tokens(), **more)


def fingerprint(trained: train.Trained) -> str:
    return json.dumps({name: w.double().sum().item() for name, w in trained.weights.items()})


def test_same_seed_same_bits_and_another_seed_others() -> None:
    assert fingerprint(tiny()) == fingerprint(tiny())
    assert fingerprint(tiny()) != fingerprint(tiny(seed=2))


def test_the_two_parts_of_the_seed_can_be_held_apart() -> None:
    one, same = tiny(seed=1), tiny(seed=1, data_seed=1)
    assert fingerprint(one) == fingerprint(same)
    other_order, other_start = tiny(seed=1, data_seed=2), tiny(seed=2, data_seed=1)
    assert len({fingerprint(run) for run in (one, other_order, other_start)}) == 3
    # The start is the seed's: before the first update the loss hardly depends on it.
    first = [run.curve[0] for run in (one, other_order, other_start)]
    assert first[0] == pytest.approx(first[2], abs=1e-3)


def test_what_draws_without_a_generator_of_its_own_gets_its_numbers_from_the_seed() -> None:
    def drawn(seed: int) -> list[float]:
        found: list[float] = []

        def draw(*_: object) -> None:
            found.extend([torch.rand(1).item(), np.random.rand(), random.random()])

        tiny(seed=seed, on_step=draw)
        return found

    one = drawn(1)
    torch.rand(7)
    assert drawn(1) == one
    assert not set(drawn(2)) & set(one)


def _child(queue: Any) -> None:
    queue.put(fingerprint(tiny()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_same_bits_under_fork() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    assert found == fingerprint(tiny())


def test_same_bits_in_a_fresh_process() -> None:
    code = f"import runpy; m = runpy.run_path({__file__!r}); print(m['fresh']())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == fingerprint(tiny())


def fresh() -> str:
    single_thread()
    return fingerprint(tiny())


def test_budgets_are_kept_and_reported() -> None:
    per_step = flops.flops_per_step(TINY)
    for budget, steps in [
        (Budget(BudgetKind.STEPS, 3), 3),
        (Budget(BudgetKind.TOKENS, 3 * 128 + 5), 3),
        (Budget(BudgetKind.FLOPS, 3.9 * per_step), 3),
        (Budget(BudgetKind.FLOPS, 1.0), 1),
    ]:
        trained = tiny(budget=budget)
        assert (trained.steps, trained.tokens) == (steps, steps * 128)
        assert trained.flops == steps * per_step
        assert len(trained.curve) == steps
        assert trained.train_s > 0


def test_a_budget_in_seconds_ends_on_time() -> None:
    trained = tiny(budget=Budget(BudgetKind.SECONDS, 0.3))
    assert trained.steps > 3
    assert 0.3 <= trained.train_s < 3


@pytest.mark.parametrize("amount", [0, -1, math.nan, math.inf])
def test_senseless_budgets_are_refused(amount: float) -> None:
    with pytest.raises(SocietyError, match="positive and finite"):
        tiny(budget=Budget(BudgetKind.STEPS, amount))


def test_on_step_sees_every_step() -> None:
    seen: list[tuple[int, float, float]] = []
    trained = tiny(on_step=lambda *args: seen.append(args))
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5]
    assert tuple(loss for _, loss, _ in seen) == trained.curve
    assert [progress for _, _, progress in seen] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_the_first_loss_is_a_uniform_guess() -> None:
    assert tiny().curve[0] == pytest.approx(math.log(300), abs=0.01)


def test_divergence_is_raised_with_its_numbers() -> None:
    wild = TINY.model_copy(update={"head_lr": 50.0, "lr_scale": 4.0})
    with pytest.raises(train.Diverged, match="step") as caught:
        tiny(wild, Budget(BudgetKind.STEPS, 20))
    assert caught.value.step >= 5
    assert caught.value.loss > math.log(300) + 1
    assert "lr_scale=4 (1), head_lr=50 (0.004)" in str(caught.value)


def test_a_loss_that_is_not_finite_diverges_at_once() -> None:
    with pytest.raises(train.Diverged):
        train._stop_if_diverged(TINY, [math.nan], 0.0)
    train._stop_if_diverged(TINY, [math.log(300) + 2], 0.1)  # early, and finite


def test_tokens_must_fit_the_recipe() -> None:
    with pytest.raises(train.BadTokens, match="vocab=400"):
        train.train(TINY, budget=FIVE, seed=1, tokens=train_tokens(vocab=400))
    with pytest.raises(train.BadTokens, match="seq_len=32"):
        train.train(TINY, budget=FIVE, seed=1, tokens=train_tokens(count=32))


def test_curves_are_thinned_evenly() -> None:
    losses = [float(i) for i in range(1000)]
    curve = train.thinned(losses)
    assert len(curve) == 64
    assert (curve[0], curve[-1]) == (0, 999)
    assert {round(b - a) for a, b in itertools.pairwise(curve)} <= {15, 16}
    assert train.thinned(losses[:10]) == tuple(losses[:10])


def test_the_model_is_causal() -> None:
    recipe = TINY.model_copy(update={"value_embeds": "all"})
    masters = tiny(recipe).weights
    copy = gpt.working_copy(masters, grad=False)
    fixed = gpt.constants(recipe, torch.empty((), dtype=torch.bfloat16))
    ids = torch.from_numpy(text(count=32).astype(np.int64))[None]
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 300
    before, after = (gpt.activations(recipe, copy, fixed, x) for x in (ids, changed))
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:], after[20:])


def test_bf16_gradients_point_where_fp64_ones_do() -> None:
    trained = tiny()
    block = torch.from_numpy(next(train.batches(TINY, train_tokens(), seed=3, steps=1)))
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        copy = gpt.working_copy(trained.weights, grad=True, dtype=dtype)
        fixed = gpt.constants(TINY, torch.empty((), dtype=dtype))
        x = gpt.activations(TINY, copy, fixed, block[:, :-1])
        loss, _ = ops.head_loss(x, copy["head"], block[:, 1:].reshape(-1), ops.LossTerms(15.0))
        found[dtype] = torch.autograd.grad(loss, list(copy.values()))
    pairs = zip(found[torch.bfloat16], found[torch.float64], strict=True)
    for name, (low, high) in zip(trained.weights, pairs, strict=True):
        cosine = torch.cosine_similarity(low.double().flatten(), high.double().flatten(), 0)
        assert cosine > 0.98, name


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    trained = tiny()
    weights.save(trained, tmp_path / "model.safetensors")
    recipe, loaded = weights.load(tmp_path / "model.safetensors")
    assert recipe == TINY
    assert set(loaded) == set(trained.weights)
    assert all(torch.equal(loaded[name], w) for name, w in trained.weights.items())


def spoil(path: Path, **changes: torch.Tensor | None) -> None:
    """Save a tiny model with some tensors replaced (None: left out)."""
    masters = {name: w.clone() for name, w in tiny().weights.items()} | changes
    kept = {name: w for name, w in masters.items() if w is not None}
    save_file(kept, path, metadata={weights.RECIPE_KEY: TINY.model_dump_json()})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"head": None}, "head"),
        ({"extra": torch.zeros(2)}, "extra"),
        ({"head": torch.zeros(299, 32)}, "shape"),
        ({"head": torch.zeros(300, 32, dtype=torch.bfloat16)}, "bfloat16"),
        ({"head": torch.full((300, 32), math.nan)}, "not finite"),
    ],
)
def test_spoilt_models_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], problem: str
) -> None:
    spoil(tmp_path / "model.safetensors", **changes)
    with pytest.raises(weights.BadWeights, match=problem):
        evaluate.evaluate(tmp_path / "model.safetensors", eval_tokens())


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"\x80\x04pickle?")
    save_file({"x": torch.zeros(1)}, tmp_path / "no_recipe")
    for name in ("noise", "no_recipe", "missing"):
        with pytest.raises(weights.BadWeights, match=name):
            weights.load(tmp_path / name)


def test_the_default_profile_learns(tmp_path: Path) -> None:
    """A third of the default budget on the real text; the full one reaches about 1.8."""
    recipe = Recipe()
    data.prepare(tmp_path, recipe.vocab)
    trained = train.train(
        recipe,
        budget=Budget(BudgetKind.FLOPS, 8e10),
        seed=0,
        tokens=data.load_train(tmp_path, recipe.vocab),
    )
    weights.save(trained, tmp_path / "m")
    score = evaluate.evaluate(tmp_path / "m", data.load_eval(tmp_path, 1024, Split.VALIDATION))
    assert trained.steps == 36
    assert 1.8 < score.bpb < 2.4
    assert 31_000 < score.tokens <= 32_768
    assert 99_900 <= score.bytes <= evaluate.SCORED_BYTES
