"""The neighbourhood gives the answers that comparing one by one would give."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from society.errors import InvalidVariant
from society.experiments import Space, load_task
from society.experiments.neighbourhood import Changes, Neighbourhood
from society.records import Variant

SPACE = Space.of(load_task("pretrain", "cpu"))
SMALL = Space.of(load_task("synthetic", "quick"))


def value(space, name, rng):
    """A value of the knob; numbers often lie a hair beside the default's tolerance."""
    knob, default = space.knobs[name], space.default(name)
    if isinstance(default, bool):
        return rng.random() < 0.5
    if knob.choices:
        return rng.choice(knob.choices)
    low, high = float(knob.low), float(knob.high)
    unit = rng.random()
    if rng.random() < 0.7:
        step = rng.choice([0.2, 0.99, 1.0, 1.01, 3.0]) * knob.tolerance
        unit = min(1.0, max(0.0, space.unit(name, default) + rng.choice([-1, 1]) * step))
    number = low * (high / low) ** unit if knob.log else low + (high - low) * unit
    number = min(high, max(low, number))
    return round(number) if isinstance(default, int) else float(f"{number:.6g}")


def draw(space, rng, most=4):
    while True:
        names = rng.sample(sorted(space.knobs), rng.randint(0, most))
        patch = rng.choice([None] * 8 + ["+ a", "+ b"])
        try:
            return space.variant("t/p", {name: value(space, name, rng) for name in names}, patch)
        except InvalidVariant:
            continue


@pytest.mark.parametrize("space", [SPACE, SMALL], ids=["pretrain", "synthetic"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 400), k=st.integers(1, 6))
def test_answers_are_those_of_a_scan(space, seed, count, k):
    rng = random.Random(seed)
    near = Neighbourhood(space)
    variants = [draw(space, rng) for _ in range(count)]
    for number, variant in enumerate(variants):
        assert near.add(str(number), variant)
    assert len(near) == count
    radius = rng.choice([0.02, 0.1, 0.5, 1.0])
    for asked in [draw(space, rng), *variants[:5]]:
        expected = [str(i) for i, v in enumerate(variants) if space.near(asked, v)]
        assert near.within(asked) == tuple(expected)
        away = sorted((space.distance(asked, v), i) for i, v in enumerate(variants))
        found = [(one.distance, int(one.key)) for one in near.nearest(asked, k, radius)]
        assert found == [pair for pair in away if pair[0] <= radius][:k]


@pytest.mark.parametrize("space", [SPACE, SMALL], ids=["pretrain", "synthetic"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 400))
def test_repeated_changes_are_those_of_a_scan(space, seed, count):
    rng = random.Random(seed)
    changes, kept = Changes(space), []
    for number in range(count):
        variant, reference = draw(space, rng, 3), draw(space, rng, 1)
        if changes.add(str(number), variant, reference):
            kept.append((number, variant, reference))
    radius = rng.choice([0.02, 0.1, 0.5])
    for asked in [draw(space, rng, 8) for _ in range(5)]:
        champion = draw(space, rng, 1)
        expected = []
        for number, variant, reference in kept:
            changed = space.changes(variant, reference)
            away = {name: space.apart(name, variant, asked) for name in changed}
            new = {
                name: space.apart(name, asked, champion) for name in space.changes(asked, champion)
            }
            if variant.patch != reference.patch:
                away["patch"] = float(variant.patch != asked.patch)
            if asked.patch != champion.patch:
                new["patch"] = 1.0
            reach = {name: min(radius, new.get(name, 2) / 2) for name in away}
            near = all(away[name] <= reach[name] for name in away if name != "patch")
            same = variant.code == asked.code
            if near and same and set(away) & set(new):
                expected.append((max(away.values()), number, set(away)))
        found = changes.repeated(asked, champion, radius)
        told = [(one.distance, int(one.key), one.changed) for one in found]
        assert told == sorted(expected, key=lambda one: one[:2])


def test_each_knob_has_its_own_tolerance():
    def pair(**values):
        (name, (left, right)), *_ = values.items()
        a, b = (SPACE.variant("t/p", {name: value}) for value in (left, right))
        near = Neighbourhood(SPACE)
        near.add("a", a)
        return bool(near.within(b))

    assert pair(lr_scale=(2.0, 2.1))
    assert not pair(lr_scale=(2.0, 2.5))
    assert pair(rope_base=(20000.0, 30000.0))
    assert not pair(adam_beta2=(0.995, 0.999))
    assert not pair(skip_scale=(0.0, 0.01))
    assert pair(label_smoothing=(0.05, 0.052))


def test_a_variant_of_another_space_has_no_place():
    near = Neighbourhood(SMALL)
    assert not near.add("old", Variant("t/p", {"lr": 40.0}))
    assert not near.add("older", Variant("t/p", {"gone": 1}))
    assert len(near) == 0
    with pytest.raises(InvalidVariant):
        near.within(Variant("t/p", {"gone": 1}))


def test_the_default_of_a_profile_is_home():
    space = Space.of(load_task("pretrain", "cpu"))
    near = Neighbourhood(space)
    near.add("base", Variant("t/p"))
    written = Variant("t/p", {"depth": space.default("depth")})
    assert near.within(written) == ("base",)
