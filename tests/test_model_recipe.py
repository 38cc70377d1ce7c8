"""The recipe: defaults, ranges, refusals, and no knob without an effect."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from society.knobs import Knob
from society.model.data import TrainTokens
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.model.train import Trained, train
from society.records import Budget, BudgetKind

SMALL: dict[str, Any] = {
    "vocab": 512,
    "seq_len": 32,
    "batch_tokens": 128,
    "depth": 3,
    "lr_scale": 0.3,
}

OTHER: dict[str, Any] = {
    "depth": 2,
    "dim": 32,
    "heads": 4,
    "mlp_ratio": 3,
    "activation": "gelu",
    "vocab": 1024,
    "tie_embeddings": True,
    "seq_len": 64,
    "window_pattern": "L",
    "short_window": 0.25,
    "rope_base": 1000.0,
    "value_embeds": "all",
    "residual_scalars": "fixed",
    "x0_init": 0.2,
    "qkv_scale": 2.0,
    "value_embed_init": 2.0,
    "softcap": 30.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "batch_tokens": 256,
    "lr_scale": 0.2,
    "matrix_lr": 0.02,
    "embedding_lr": 0.3,
    "head_lr": 0.008,
    "scalar_lr": 1.0,
    "warm_up": 0.25,
    "warm_down": 0.3,
    "final_lr": 0.1,
    "momentum_ramp": 1.0,
    "momentum_start": 0.9,
    "momentum_final": 0.9,
    "muon_beta2": 0.9,
    "polar_steps": 3,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
}
"""Another value for every knob."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def knob_of(name: str) -> Knob:
    found = [m for m in Recipe.model_fields[name].metadata if isinstance(m, Knob)]
    assert len(found) == 1, f"{name} needs exactly one Knob"
    return found[0]


def some_tokens(vocab: int, count: int = 20_000) -> TrainTokens:
    ranks = np.random.default_rng(1).zipf(1.3, count) % vocab
    return TrainTokens(ranks.astype(np.uint16), vocab, "test")


def briefly(recipe: Recipe) -> Trained:
    budget = Budget(BudgetKind.STEPS, 5)
    return train(recipe, budget=budget, seed=3, tokens=some_tokens(recipe.vocab))


@pytest.fixture(scope="module")
def reference() -> Trained:
    return briefly(Recipe(**SMALL))


def test_every_field_is_a_knob_with_its_story() -> None:
    assert len(Recipe.model_fields) >= 24
    for name in Recipe.model_fields:
        knob = knob_of(name)
        assert knob.about, name
        assert knob.source, name
        assert knob.group, name


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_defaults_lie_in_the_search_range(name: str) -> None:
    knob, default = knob_of(name), Recipe.model_fields[name].default
    if isinstance(default, bool):
        return
    if knob.choices:
        assert default in knob.choices
        return
    assert knob.low is not None
    assert knob.high is not None
    assert knob.low <= default <= knob.high
    assert not knob.log or knob.low > 0


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_the_recipe_accepts_its_whole_search_range(name: str) -> None:
    knob = knob_of(name)
    for value in knob.choices or (knob.low, knob.high):
        if value is None:
            continue
        field = Recipe.model_fields[name].annotation
        Recipe(**{name: int(value) if field is int else value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 2), ("depth", 8), ("depth", 6), ("vocab", 2048), ("seq_len", 64),
        ("short_window", 0.25), ("head_lr", 0.008), ("head_lr", 0.02), ("momentum_ramp", 1.0),
        ("warm_down", 0.3), ("lr_scale", 0.5), ("lr_scale", 2.0), ("batch_tokens", 2048),
        ("batch_tokens", 512), ("value_embeds", "off"), ("tie_embeddings", True),
        ("window_pattern", "L"), ("warm_up", 0.1), ("residual_scalars", "fixed"),
        ("residual_scalars", "off"), ("label_smoothing", 0.1), ("qkv_scale", 2.0),
        ("z_loss", 1e-4), ("softcap", 30.0), ("value_embed_init", 0.5),
    ],
)  # fmt: skip
def test_known_effects_lie_in_the_search_range(name: str, value: Any) -> None:
    knob = knob_of(name)
    Recipe(**{name: value})
    if knob.choices:
        assert value in knob.choices
    elif not isinstance(value, bool):
        assert knob.low is not None
        assert knob.high is not None
        assert knob.low <= value <= knob.high


def test_other_values_cover_every_knob() -> None:
    assert set(OTHER) == set(Recipe.model_fields)
    for name, value in OTHER.items():
        assert value != SMALL.get(name, Recipe.model_fields[name].default)


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_every_knob_changes_what_is_trained(name: str, reference: Trained) -> None:
    changed = briefly(Recipe(**(SMALL | {name: OTHER[name]})))
    old, new = reference.weights, changed.weights
    if {k: w.shape for k, w in old.items()} != {k: w.shape for k, w in new.items()}:
        return
    assert any(not torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"dim": 50, "heads": 4}, "heads=4 does not divide dim=50"),
        ({"dim": 6, "heads": 2}, "heads=2"),
        ({"seq_len": 256, "batch_tokens": 128}, "batch_tokens=128"),
        ({"seq_len": 96}, "seq_len=96"),
        ({"warm_up": 0.6}, "warm_up=0.6"),
        ({"window_pattern": "SX"}, "window_pattern"),
        ({"value_embeds": "some"}, "value_embeds"),
        ({"matrix_lr": 0.0}, "matrix_lr"),
        ({"head_lr": float("inf")}, "head_lr"),
        ({"vocab": 256}, "vocab"),
        ({"depth": 0}, "depth"),
        ({"widht": 64}, "widht"),
    ],
)
def test_impossible_recipes_are_refused_by_name(overrides: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        Recipe(**overrides)


def test_the_last_layer_is_long() -> None:
    for pattern in ("SSSL", "S", "SL", "L"):
        for depth in (1, 2, 3, 4, 8):
            assert Recipe(window_pattern=pattern, depth=depth).windows[-1] == 128
    assert Recipe().windows == (64, 64, 64, 128)
    assert Recipe(depth=6).windows == (64, 64, 64, 128, 64, 128)


def test_value_embeddings_include_the_last_layer() -> None:
    assert Recipe().value_layers == (1, 3)
    assert Recipe(depth=3).value_layers == (0, 2)
    assert Recipe(value_embeds="all").value_layers == (0, 1, 2, 3)
    assert Recipe(value_embeds="off").value_layers == ()


def test_light_modules_do_not_import_torch() -> None:
    code = (
        "import sys, society.model, society.model.recipe, society.model.flops, "
        "society.model.schedule, society.model.data; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
