"""Knobs, canonical variants and distances."""

from typing import Annotated, Literal, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from society.errors import InvalidVariant
from society.experiments import Space, load_task, variant
from society.experiments.space import canonical
from society.knobs import Knob, Span
from society.records import Variant

PROFILE = settings(derandomize=True, deadline=None, max_examples=60)
TASKS = [load_task("synthetic", "quick"), load_task("pretrain", "cpu")]


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True)

    depth: Annotated[int, Knob(low=1, high=9, unit="layers")] = 4
    width: Annotated[int, Knob(choices=(32, 64, 128))] = 64
    lr: Annotated[float, Knob(low=1e-3, high=1.0, log=True)] = 0.04
    decay: Annotated[float, Field(lt=0.9), Knob(low=0.0, high=1.0)] = 0.5
    shift: Annotated[float, Knob(low=-1.0, high=1.0)] = 0.0
    window: Annotated[Literal["full", "half", "quarter"], Knob(choices=("full", "half", "quarter"))]
    window = "full"
    tied: Annotated[bool, Knob()] = False
    vocab: int = 1024

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.depth == 7 and self.width == 32:
            raise ValueError("width 32 is too narrow for depth=7")
        return self


SPACE = Space(Recipe, Recipe())


def make(**overrides) -> Variant:
    return SPACE.variant("toy/one", overrides)


def values(knob: Knob, kind: type) -> st.SearchStrategy:
    if kind is bool:
        return st.booleans()
    if knob.choices:
        return st.sampled_from(knob.choices)
    if kind is int:
        return st.integers(int(knob.low), int(knob.high))
    return st.floats(knob.low, knob.high)


def overrides_of(task) -> st.SearchStrategy:
    space = Space.of(task)
    each = {name: values(k, type(space.default(name))) for name, k in space.knobs.items()}
    return st.fixed_dictionaries({}, optional=each)


def spellings(value) -> list:
    if isinstance(value, bool):
        return [value, str(value), str(value).lower()]
    if isinstance(value, int):
        return [value, float(value), str(value), f"{value}.0"]
    if isinstance(value, float):
        return [value, f"{value:.9e}", f" {value!r} "]
    return [value]


def valid(space: Space, key: str, overrides: dict) -> Variant | None:
    """The variant, or None where the recipe refuses the combination."""
    try:
        return space.variant(key, overrides)
    except InvalidVariant:
        return None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@given(data=st.data())
@PROFILE
def test_spelling_order_and_defaults_do_not_matter(task, data):
    space = Space.of(task)
    overrides = data.draw(overrides_of(task))
    plain = valid(space, task.key, overrides)
    if plain is None:
        return
    others = {name: space.default(name) for name in space.knobs if name not in overrides}
    spelled = {
        name: data.draw(st.sampled_from(spellings(value)))
        for name, value in (overrides | others).items()
    }
    shuffled = dict(data.draw(st.permutations(list(spelled.items()))))
    again = space.variant(task.key, shuffled)
    assert again == plain
    assert again.fingerprint == plain.fingerprint


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@given(data=st.data())
@PROFILE
def test_variants_and_recipes_round_trip(task, data):
    space = Space.of(task)
    found = valid(space, task.key, data.draw(overrides_of(task)))
    if found is None:
        return
    assert space.variant(task.key, found.overrides) == found
    recipe = space.recipe(found)
    assert space.variant(task.key, {name: getattr(recipe, name) for name in space.knobs}) == found
    assert space.distance(found, found) == 0
    for name, value in found.overrides.items():
        assert 0 <= space.unit(name, value) <= 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@given(data=st.data())
@PROFILE
def test_distance_is_a_metric(task, data):
    space = Space.of(task)
    a, b, c = (
        Variant(task.key, data.draw(overrides_of(task).map(lambda o: canonicalised(space, o))))
        for _ in range(3)
    )
    assert space.distance(a, b) == space.distance(b, a)
    assert 0 <= space.distance(a, b) <= 1
    assert space.distance(a, c) <= space.distance(a, b) + space.distance(b, c) + 1e-12


def canonicalised(space: Space, overrides: dict) -> dict:
    return {
        name: canonical(value) if isinstance(value, float) else value
        for name, value in overrides.items()
    }


@given(st.floats(allow_nan=False, allow_infinity=False))
@PROFILE
def test_six_digits_are_idempotent(value):
    assert canonical(canonical(value)) == canonical(value)
    assert str(canonical(-0.0)) == "0.0"


def test_spelling_of_floats():
    same = {make(lr=lr).fingerprint for lr in (0.3, "0.30", "3e-1", 0.3000000001, " .3 ")}
    assert len(same) == 1
    assert make(lr="1e-2").overrides == {"lr": 0.01}
    assert make(lr=1).overrides == {"lr": 1.0}
    assert isinstance(make(lr=1).overrides["lr"], float)
    assert make(depth=2.0).overrides == {"depth": 2}
    assert isinstance(make(depth="2").overrides["depth"], int)
    assert make(tied="true").overrides == {"tied": True}
    assert make(shift=-0.0, decay="0.5", window="full").is_baseline


@pytest.mark.parametrize(
    ("overrides", "knob", "words"),
    [
        ({"dept": 2}, "dept", "did you mean 'depth'"),
        ({"zzz": 2}, "zzz", "known: depth, width"),
        ({"vocab": 2048}, "vocab", "is fixed"),
        ({"depth": 10}, "depth", "10 is not allowed; a whole number from 1 to 9 layers"),
        ({"depth": 2.5}, "depth", "expected a whole number from 1 to 9 layers, found 2.5"),
        ({"depth": True}, "depth", "expected a whole number"),
        ({"depth": "two"}, "depth", "found 'two'"),
        ({"depth": None}, "depth", "found None"),
        ({"width": 65}, "width", "one of 32, 64, 128"),
        ({"lr": 0}, "lr", "from 0.001 to 1"),
        ({"lr": "nan"}, "lr", "expected a number"),
        ({"lr": float("inf")}, "lr", "expected a number"),
        ({"lr": 10**400}, "lr", "expected a number"),
        ({"lr": [0.1]}, "lr", "found [0.1]"),
        ({"lr": False}, "lr", "expected a number"),
        ({"decay": 0.95}, "decay", "less than 0.9"),
        ({"window": "wide"}, "window", "one of full, half, quarter"),
        ({"window": 1}, "window", "expected one of"),
        ({"tied": 1}, "tied", "true or false"),
        ({"tied": "maybe"}, "tied", "true or false"),
        ({"width": 32, "depth": 7, "lr": 0.1}, "depth, width", "too narrow"),
    ],
)
def test_a_refusal_names_the_knob(overrides, knob, words):
    with pytest.raises(InvalidVariant) as caught:
        make(**overrides)
    assert caught.value.knob == knob
    assert words in str(caught.value)


def test_a_real_impossible_shape_is_refused():
    with pytest.raises(InvalidVariant, match="heads"):
        variant(load_task("synthetic", "quick"), {"width": 32, "heads": 5})


def test_units():
    assert SPACE.unit("depth", 5) == 0.5
    assert SPACE.unit("lr", 0.001) == 0
    assert SPACE.unit("lr", 0.0316228) == pytest.approx(0.5, abs=1e-6)
    assert SPACE.unit("width", 64) == 0.5
    assert SPACE.unit("window", "quarter") == 1
    assert SPACE.unit("tied", True) == 1


def test_distances():
    base = make()
    assert SPACE.distance(base, make(depth=5)) == pytest.approx(1 / 8)
    assert SPACE.distance(base, make(window="half")) == 1
    assert SPACE.distance(base, make(tied=True)) == 1
    assert SPACE.distance(base, make(width=128)) == 0.5
    assert SPACE.distance(make(depth=5, lr=0.4), make(depth=5)) == pytest.approx(1 / 3)
    assert SPACE.distance(base, Variant("toy/one", {}, "a patch")) == 1
    assert SPACE.near(base, make(lr=0.042))
    assert not SPACE.near(base, make(lr=0.08))


def test_the_baseline_of_a_profile_is_the_default():
    space = Space(Recipe, Recipe(depth=2))
    assert space.variant("toy/one", {"depth": 2}).is_baseline
    assert space.recipe(space.variant("toy/one", {})) == Recipe(depth=2)
    assert space.variant("toy/one", {"depth": 4}).overrides == {"depth": 4}


def test_a_baseline_outside_its_knobs_is_refused():
    with pytest.raises(InvalidVariant, match="depth"):
        Space(Recipe, Recipe(depth=40))


def test_a_knob_without_a_range_is_a_mistake():
    class Odd(BaseModel):
        lr: Annotated[float, Knob(low=0.0, high=1.0, log=True)] = 0.5

    with pytest.raises(ValueError, match="low > 0 on a log scale"):
        Space(Odd, Odd())


def test_patches_have_their_own_fingerprint():
    task = load_task("synthetic", "quick")
    assert variant(task, {}, "+ x").fingerprint != variant(task, {}).fingerprint


def test_a_profile_may_replace_the_range_of_a_knob():
    space = Space(Recipe, Recipe(depth=40), {"depth": Span(low=20, high=60)})
    assert space.variant("toy/one", {"depth": 50}).overrides == {"depth": 50}
    assert space.unit("depth", 40) == 0.5
    with pytest.raises(InvalidVariant, match="from 20 to 60 layers"):
        space.variant("toy/one", {"depth": 9})
    assert Space(Recipe, Recipe()).knobs["depth"].high == 9
    fixed = Space(Recipe, Recipe(), {"width": Span(choices=(64,))})
    with pytest.raises(InvalidVariant, match="one of 64"):
        fixed.variant("toy/one", {"width": 32})


def test_a_span_for_something_else_names_it():
    with pytest.raises(InvalidVariant, match="did you mean 'depth'"):
        Space(Recipe, Recipe(), {"depht": Span(low=1, high=2)})
