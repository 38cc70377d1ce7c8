"""The recipe: defaults, ranges, refusals, and no knob without an effect."""

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from society.experiments.space import Space
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
    "depth": 4,
    "lr_scale": 0.3,
}

OTHER: dict[str, Any] = {
    "depth": 2,
    "dim": 96,
    "aspect_ratio": 24,
    "heads": 4,
    "head_size": 16,
    "kv_heads": 1,
    "mlp_ratio": 3,
    "activation": "gelu",
    "vocab": 1024,
    "tie_embeddings": True,
    "norm_placement": "sandwich",
    "seq_len": 64,
    "window_pattern": "L",
    "short_window": 0.25,
    "rope_base": 1000.0,
    "qk_scale": 1.2,
    "value_embeds": "all",
    "value_gate": "fixed",
    "residual_scalars": "fixed",
    "residual_init": 0.9,
    "x0_init": 0.2,
    "skip_scale": 0.5,
    "qkv_scale": 2.0,
    "project_init": 0.5,
    "mlp_init": 0.4,
    "value_embed_dist": "normal",
    "value_embed_init": 2.0,
    "softcap": 30.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "batch_tokens": 256,
    "lr_scale": 0.2,
    "matrix_lr": 0.02,
    "embedding_lr": 0.3,
    "value_embed_lr": 0.3,
    "head_lr": 0.008,
    "scalar_lr": 1.0,
    "residual_lr": 0.02,
    "warm_up": 0.25,
    "warm_down": 0.3,
    "warm_down_shape": "cosine",
    "final_lr": 0.1,
    "momentum_ramp": 1.0,
    "decay_shape": "constant",
    "optimizer": "adamw",
    "momentum_start": 0.9,
    "momentum_final": 0.9,
    "muon_beta2": 0.9,
    "polar_steps": 3,
    "weight_decay": 0.0,
    "adam_decay": 0.5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "data_order": "reversed",
    "packing": "documents",
    "repeats": 4,
    "domain_mix": 0.0,
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
    """Documents of unequal lengths, a third of them of a second domain."""
    rng = np.random.default_rng(1)
    ranks = rng.zipf(1.3, count) % vocab
    starts = np.unique([0, *rng.integers(0, count, 50)])
    domains = np.arange(len(starts)) % 3 == 0
    return TrainTokens(ranks.astype(np.uint16), vocab, "test", starts, domains)


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


def differs(one: Trained, other: Trained) -> bool:
    """Whether two trainings computed something else: another loss, or other weights at the end."""
    shared = one.weights.keys() & other.weights.keys()
    return one.curve != other.curve or any(
        one.weights[name].shape != other.weights[name].shape
        or not torch.equal(one.weights[name], other.weights[name])
        for name in shared
    )


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_every_knob_changes_what_is_trained(name: str, reference: Trained) -> None:
    assert differs(reference, briefly(Recipe(**(SMALL | {name: OTHER[name]}))))


CLOSED = [name for name in Recipe.model_fields if knob_of(name).choices]


@pytest.mark.parametrize("name", CLOSED)
def test_every_choice_is_another_computation(name: str) -> None:
    """No two values of a closed knob may be the same thing for the default recipe."""
    choices = [value for value in knob_of(name).choices if possible(name, value)]
    seen = [briefly(Recipe(**(SMALL | {name: value}))) for value in choices]
    assert len(seen) > 1
    for one, other in itertools.combinations(seen, 2):
        assert differs(one, other)


def possible(name: str, value: Any) -> bool:
    try:
        Recipe(**(SMALL | {name: value}))
    except ValidationError:
        return False
    return not (name == "vocab" and value > 2048)


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


@pytest.mark.parametrize(
    "switch",
    [
        {"value_embeds": "off"}, {"residual_scalars": "off"}, {"residual_scalars": "fixed"},
        {"optimizer": "adamw"}, {"weight_decay": 0.0}, {"momentum_ramp": 0.0}, {"warm_down": 0.0},
        {"aspect_ratio": 8}, {"tie_embeddings": True}, {"window_pattern": "L"}, {"depth": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_idle_knob_changes_nothing_and_makes_no_new_variant(switch: dict[str, Any]) -> None:
    plain = Recipe(**(SMALL | switch))
    assert plain.idle
    usual = briefly(plain)
    for name in plain.idle:
        assert not differs(usual, briefly(Recipe(**(SMALL | switch | {name: OTHER[name]})))), name
    space = Space(Recipe, Recipe())
    both = space.variant("t", switch | {name: OTHER[name] for name in plain.idle})
    assert both == space.variant("t", switch)


def test_nothing_is_idle_by_default() -> None:
    assert Recipe().idle == frozenset()
