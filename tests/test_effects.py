"""The effect model against worlds whose truth is known."""

from typing import Annotated

import numpy as np
import pytest
from pydantic import create_model

from society.experiments.effects import (
    KnobVerdict,
    dead_ends,
    describe,
    describe_dead_end,
    knob_effects,
)
from society.experiments.space import Space
from society.experiments.task import Direction
from society.knobs import Knob
from society.records import (
    Budget,
    BudgetKind,
    Cost,
    Environment,
    Outcome,
    Run,
    RunKind,
    Split,
)

FIELDS = (
    {f"k{i}": (Annotated[float, Knob(low=0, high=1)], 0.5) for i in range(22)}
    | {f"c{i}": (Annotated[str, Knob(choices=("a", "b", "c"))], "a") for i in range(4)}
    | {f"b{i}": (Annotated[bool, Knob()], False) for i in range(4)}
)
RECIPE = create_model("Recipe", **FIELDS)
SPACE = Space(RECIPE, RECIPE())
HERE = Environment("cpu", "AVX2", 1, "3.11")
TRUE = {"k0": 0.04, "k1": 0.03, "c0": 0.03, "c1": -0.05, "b0": -0.04}
"""Gain of the best (or only effective) value of each knob that does anything."""
NULLS = [name for name in SPACE.knobs if name not in {*TRUE, "k2"}]


def gain(overrides):
    """k0 is linear, k1 a bowl around 0.7, one level of c0 helps, c1=c and b0 hurt."""
    total = 0.04 * (overrides.get("k0", 0.5) - 0.5) / 0.3
    total += 0.03 * (1 - ((overrides.get("k1", 0.5) - 0.7) / 0.2) ** 2)
    total += 0.03 * (overrides.get("c0") == "b") - 0.05 * (overrides.get("c1") == "c")
    return total - 0.04 * overrides.get("b0", False)


def run(index, overrides, score, **changes):
    values = {
        "id": f"r{index}", "society": "s", "agent": "a", "kind": RunKind.SCREENING,
        "variant": SPACE.variant("t", overrides), "seed": 1, "split": Split.VALIDATION,
        "budget": Budget(BudgetKind.STEPS, 10), "outcome": Outcome.COMPLETED, "score": score,
        "cost": Cost(), "environment": HERE, "data_hash": "", "log_tail": "",
        "started_at": 0.0, "finished_at": 1.0, "number": index + 1,
    }  # fmt: skip
    return Run(**(values | changes))


def world(seed, count, *, real=True, sign=-1.0, noise=0.004):
    """What a society leaves: each proposal changes one to three knobs of the best so far."""
    rng = np.random.default_rng(seed)
    runs, best, best_gain = [], {}, -np.inf
    for index in range(count):
        overrides = dict(best)
        for name in rng.choice(list(SPACE.knobs), size=rng.integers(1, 4), replace=False):
            overrides[str(name)] = propose(rng, str(name), overrides)
        measured = (gain(overrides) if real else 0.0) + rng.normal(0, noise)
        if real and overrides.get("k2", 0.5) > 0.95:
            failed = {"outcome": Outcome.DIVERGED}
            runs.append(run(index, overrides, None, **failed))
            continue
        runs.append(run(index, overrides, 2 + sign * measured))
        if measured > best_gain:
            best, best_gain = overrides, measured
    return runs


def propose(rng, name, overrides):
    if name[0] == "k":
        return float(np.clip(overrides.get(name, 0.5) + rng.normal(0, 0.2), 0, 1))
    return str(rng.choice(["a", "b", "c"])) if name[0] == "c" else bool(rng.integers(2))


def by_name(runs, direction=Direction.MINIMISE):
    return {effect.knob: effect for effect in knob_effects(runs, SPACE, {}, direction)}


@pytest.mark.parametrize(
    ("sign", "direction"), [(-1.0, Direction.MINIMISE), (1.0, Direction.MAXIMISE)]
)
def test_known_effects_are_found_with_their_sign_and_size(sign, direction):
    found = by_name(world(1, 150, sign=sign), direction)
    for name, truth in TRUE.items():
        effect = found[name]
        assert effect.verdict is (KnobVerdict.HELPS if truth > 0 else KnobVerdict.HURTS)
        alone = gain({name: effect.value}) - gain({})
        assert effect.delta == pytest.approx(alone, abs=4 * effect.se + 0.005)
    assert found["k0"].value > 0.8
    assert 0.6 < found["k1"].value < 0.8
    assert (found["c0"].value, found["c1"].value, found["b0"].value) == ("b", "c", True)
    assert found["k0"].reference == 0.5


def test_knobs_without_effect_are_rarely_called_anything():
    verdicts = [by_name(world(seed, 100))[name].verdict for seed in range(4) for name in NULLS]
    called = sum(v in (KnobVerdict.HELPS, KnobVerdict.HURTS) for v in verdicts)
    assert called <= 0.05 * len(verdicts)


def test_pure_noise_has_no_effects():
    verdicts = [
        effect.verdict
        for seed in range(10)
        for effect in knob_effects(world(seed, 80, real=False), SPACE, {}, Direction.MINIMISE)
    ]
    assert sum(v in (KnobVerdict.HELPS, KnobVerdict.HURTS) for v in verdicts) <= 4


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_few_runs_say_nothing(count):
    effects = knob_effects(world(3, count), SPACE, {}, Direction.MINIMISE)
    assert len(effects) == (len(SPACE.knobs) if count else 0)
    assert {effect.verdict for effect in effects} <= {KnobVerdict.FEW}


def test_the_reference_may_be_another_variant():
    runs = world(1, 150)
    moved = {e.knob: e for e in knob_effects(runs, SPACE, {"c0": "b"}, Direction.MINIMISE)}
    assert moved["c0"].reference == "b"
    assert moved["c0"].verdict is KnobVerdict.HURTS


def test_diverged_runs_are_counted_apart():
    wild = [run(i, {"k2": 0.99}, None, outcome=Outcome.DIVERGED) for i in range(200, 204)]
    effect = by_name(world(1, 40) + wild)["k2"]
    assert effect.diverged >= 4
    assert effect.runs < 40


def test_runs_that_cannot_be_compared_are_left_out():
    runs = world(5, 60)
    foreign = [
        run(300 + i, {"k9": 0.9}, **({"score": 9.0} | change))
        for i, change in enumerate(
            [
                {"kind": RunKind.AUDIT},
                {"budget": Budget(BudgetKind.STEPS, 99)},
                {"environment": Environment("cuda", "sm_90", 1, "3.11")},
                {"score": float("nan")},
                {"outcome": Outcome.CRASHED, "score": None},
            ]
        )
    ]
    assert knob_effects(runs + foreign, SPACE, {}, Direction.MINIMISE) == knob_effects(
        runs, SPACE, {}, Direction.MINIMISE
    )


def test_one_absurd_score_changes_no_verdict():
    runs = world(7, 120)
    found, again = by_name(runs), by_name([*runs, run(500, {"k15": 0.6}, 50.0)])
    for name in ("k0", "k1"):
        assert again[name].verdict is found[name].verdict is KnobVerdict.HELPS
    assert again["k15"].verdict is not KnobVerdict.HURTS


def test_the_order_of_the_runs_does_not_matter():
    runs = world(2, 50)
    shuffled = list(reversed(runs))
    assert knob_effects(shuffled, SPACE, {}, Direction.MINIMISE) == knob_effects(
        runs, SPACE, {}, Direction.MINIMISE
    )


def test_dead_ends_are_found_and_chance_is_not():
    fine = [
        run(2 * i, {"k0": 0.01 * i, "k5": 0.5 - 0.01 * i}, 2 + 0.003 * (i % 7)) for i in range(40)
    ]
    bad = [run(2 * i + 1, {"k5": 0.9 + 0.01 * i}, 2.5) for i in range(7)]
    wild = [run(2 * i + 21, {"c3": "b"}, None, outcome=Outcome.DIVERGED) for i in range(7)]
    category, high = dead_ends(fine + bad + wild, SPACE, {}, Direction.MINIMISE)
    assert (category.knob, category.low, category.runs, category.diverged) == ("c3", "b", 7, 7)
    assert (high.knob, high.low, high.high, high.runs, high.diverged) == ("k5", 0.9, 0.96, 7, 0)
    assert describe_dead_end(high).startswith("Dead end: `k5` = 0.9 to 0.96 was worse")
    assert "c3` = b was" in describe_dead_end(category)
    noise = [dead_ends(world(s, 80, real=False), SPACE, {}, Direction.MINIMISE) for s in range(8)]
    assert sum(map(len, noise)) <= 6


def test_dead_ends_know_that_the_society_improves():
    """Early runs are worse than late ones whatever they tried; that is nobody's fault."""
    early = [
        run(i, {"k3": 0.8} if i % 2 else {"k4": 0.4}, 2.0 + 0.001 * (i % 5)) for i in range(24)
    ]
    late = [run(30 + i, {"k0": 0.9}, 1.0 + 0.001 * (i % 5)) for i in range(40)]
    assert "k3" not in {end.knob for end in dead_ends(early + late, SPACE, {}, Direction.MINIMISE)}


def test_sentences():
    found = by_name(world(1, 150))
    assert describe(found["c0"], unit="BPB").startswith("`c0` = b instead of a helps: +0.0")
    assert "hurts: -0.0" in describe(found["b0"])
    assert describe(found["c0"]).endswith("not verified.")
    few = by_name(world(1, 5))
    assert describe(few["k0"]).startswith("Too few runs varied `k0`")
    nothing = next(e for e in found.values() if e.verdict is KnobVerdict.NONE)
    assert describe(nothing).startswith(f"No visible effect of `{nothing.knob}`")
