"""A stand-in for a training that takes milliseconds: for tests, documentation and trying things.

The true score is a smooth bowl around a known optimum; what a run reports adds the noise of a real
training: a part shared by all variants at one seed (initialisation and data order), a part that
grows with the size of the change, and a part of its own. Paired differences at one seed are thus
far less variable than scores, and validation and holdout scores go together. numpy only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from society.experiments.space import Space
from society.experiments.task import (
    Access,
    Direction,
    Diverged,
    Limits,
    Role,
    TrainReport,
    load_profile,
    parse,
)
from society.knobs import Knob, Span
from society.records import Budget, Split, Variant

FLOOR = 1.6
"""The score of the optimum at the profile's own budget."""
LEVEL = {Split.VALIDATION: 0.0, Split.HOLDOUT: 0.04}
"""How much harder each split is."""
TOKENS_PER_STEP = 1024
FLOPS_PER_TOKEN = 1.0e6
FULL_STEPS = 100
INIT_SD, DATA_SD, SLOPE_SD, OWN_SD, SPLIT_SD = 0.008, 0.0105, 0.004, 0.0015, 0.0016


class SyntheticRecipe(BaseModel):
    """Eleven knobs with the shape of a language model's recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: Annotated[int, Knob(low=1, high=8, unit="layers", group="shape")] = 4
    width: Annotated[int, Knob(choices=(32, 48, 64, 96, 128), unit="channels", group="shape")] = 64
    heads: Annotated[int, Knob(low=1, high=8, unit="heads", group="shape")] = 2
    window: Annotated[
        Literal["full", "half", "quarter"],
        Knob(choices=("full", "half", "quarter"), group="shape"),
    ] = "half"
    batch: Annotated[int, Knob(low=128, high=8192, log=True, unit="tokens", group="data")] = 1024
    lr: Annotated[float, Knob(low=0.002, high=1.0, log=True, group="optimiser")] = 0.04
    momentum: Annotated[float, Knob(low=0.5, high=0.99, group="optimiser")] = 0.85
    weight_decay: Annotated[float, Knob(low=0.0, high=1.0, group="optimiser")] = 0.2
    warm_up: Annotated[float, Knob(low=0.0, high=0.5, unit="of steps", group="schedule")] = 0.0
    warm_down: Annotated[float, Knob(low=0.0, high=1.0, unit="of steps", group="schedule")] = 0.5
    tied: Annotated[bool, Knob(group="shape")] = False

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be split into heads={self.heads}")
        return self


@dataclass(frozen=True, slots=True)
class Bowl:
    """The loss of one knob: zero at its optimum, quadratic near it, linear far away."""

    optimum: float
    """In the knob's own unit."""
    depth: float
    """Loss per `WIDTH` far from the optimum."""


WIDTH = 0.25
BOWLS = {
    "depth": Bowl(2, 0.110),
    "width": Bowl(96, 0.040),
    "batch": Bowl(512, 0.075),
    "lr": Bowl(0.09, 0.250),
    "momentum": Bowl(0.93, 0.100),
    "weight_decay": Bowl(0.1, 0.020),
    "warm_up": Bowl(0.0, 0.060),
    "warm_down": Bowl(0.3, 0.050),
}
WINDOW = {"full": 0.045, "half": 0.02, "quarter": 0.0}
OPTIMUM: dict[str, int | float | str] = {
    "depth": 2,
    "width": 96,
    "batch": 512,
    "lr": 0.09,
    "momentum": 0.93,
    "weight_decay": 0.1,
    "warm_down": 0.3,
    "window": "quarter",
}
"""The overrides that reach `FLOOR`; every other knob is best, or indifferent, at its default."""


class Options(BaseModel):
    """What the profile of this task may set beside budget, limits and recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sleep_s: float = 0.0
    """Seconds every training sleeps, to look like a slow one."""


class Synthetic:
    """The task `synthetic`; see the module."""

    name = "synthetic"
    metric = "val_bpb"
    unit = "BPB"
    direction = Direction.MINIMISE
    recipe = SyntheticRecipe
    packages: tuple[str, ...] = ("numpy",)
    code: tuple[str, ...] = ("society.experiments.synthetic",)
    access = Access()

    def __init__(self, profile: str = "quick") -> None:
        """Read the profile, by name or path."""
        settings = load_profile(self.name, profile)
        self.profile = settings.name
        self.key = f"{self.name}/{settings.name}"
        self.budget: Budget = settings.budget
        self.limits: Limits = settings.limits
        self.baseline = parse(SyntheticRecipe, settings.recipe, profile)
        self.spans: Mapping[str, Span] = settings.knobs
        self.options = parse(Options, settings.options, profile)

    @cached_property
    def space(self) -> Space:
        """The search space around the baseline."""
        return Space.of(self)

    def warm_up(self) -> None:
        """Import numpy's generators, which it loads at their first use, and read the knobs."""
        _normal(0)
        self.expected(self.baseline)

    def prepare(self) -> str:
        """There is no data; the hash of nothing."""
        return "0" * 64

    def preload(self, role: Role) -> None:
        """There is no data to load."""

    def expected(self, recipe: SyntheticRecipe, budget: Budget | None = None) -> float:
        """The score without noise, on the validation split. Tests may look; nobody else."""
        loss: float = FLOOR + WINDOW[recipe.window] + 0.03 * recipe.tied
        for name, bowl in BOWLS.items():
            away = (self._unit(recipe, name) - self.space.unit(name, bowl.optimum)) / WIDTH
            if name == "lr":  # larger batches want larger rates
                away -= 0.5 * (self._unit(recipe, "batch") - self.space.unit("batch", 512))
            loss += bowl.depth * (math.sqrt(1 + away**2) - 1)
        steps = _steps(self.budget if budget is None else budget)
        return loss + 0.15 * (math.sqrt(FULL_STEPS / steps) - 1)

    def train(
        self,
        recipe: SyntheticRecipe,
        seed: int,
        budget: Budget,
        scratch: Path,
        device: str,
        *,
        data_seed: int | None = None,
    ) -> TrainReport:
        """Write what the model would score, without the noise of the splits, to `scratch`."""
        time.sleep(self.options.sleep_s)
        self._check_stable(recipe, seed)
        noise = self._noise(recipe, seed, seed if data_seed is None else data_seed)
        latent = self.expected(recipe, budget) + noise
        (scratch / "model.json").write_text(json.dumps({"latent": latent, "seed": seed}))
        steps = _steps(budget)
        tokens = steps * TOKENS_PER_STEP
        return TrainReport(tokens * FLOPS_PER_TOKEN, tokens, steps, _curve(latent, steps))

    def score(self, scratch: Path, recipe: SyntheticRecipe, split: Split, device: str) -> float:
        """The saved latent score with the split's level and noise."""
        model = json.loads((scratch / "model.json").read_text())
        place = list(Split).index(split)
        shared = _normal(model["seed"], 3, place)
        own = _normal(model["seed"], 4, place, self._digest(recipe))
        return float(model["latent"] + LEVEL[split] + SPLIT_SD * (0.8 * shared + 0.6 * own))

    def _check_stable(self, recipe: SyntheticRecipe, seed: int) -> None:
        """High rates with high momentum and no warm-up leave the finite numbers."""
        heat = math.log10(recipe.lr / 0.04) + 3 * (recipe.momentum - 0.85) - 2 * recipe.warm_up
        heat += 0.05 * _normal(seed, 5)
        if heat > 1.0:
            raise Diverged(f"loss is nan at step {max(1, round(20 / heat))} (lr={recipe.lr})")

    def _noise(self, recipe: SyntheticRecipe, seed: int, data_seed: int) -> float:
        """The part of the initialisation, the part of the data order, and the change's own."""
        shared = INIT_SD * _normal(seed, 0) + DATA_SD * _normal(data_seed, 1)
        slopes = np.random.default_rng([seed, 2]).standard_normal(len(BOWLS))
        moves = [self._unit(recipe, name) - self._unit(self.baseline, name) for name in BOWLS]
        if recipe == self.baseline:
            return shared
        own = OWN_SD * _normal(seed, 6, self._digest(recipe))
        return shared + SLOPE_SD * float(slopes @ np.array(moves)) + own

    def _unit(self, recipe: SyntheticRecipe, name: str) -> float:
        return self.space.unit(name, getattr(recipe, name))

    def _digest(self, recipe: SyntheticRecipe) -> int:
        return int(Variant(self.key, recipe.model_dump()).fingerprint[:12], 16)


def _normal(*key: int) -> float:
    """One standard normal draw that depends on the key alone."""
    return float(np.random.default_rng(key).standard_normal())


def _steps(budget: Budget) -> int:
    per_step = {
        "flops": TOKENS_PER_STEP * FLOPS_PER_TOKEN,
        "tokens": TOKENS_PER_STEP,
        "steps": 1.0,
        "seconds": 0.05,
    }[budget.kind]
    return max(1, int(budget.amount / per_step))


def _curve(final: float, steps: int) -> tuple[float, ...]:
    """A loss that falls to its end, in nats per token (about 3 bytes)."""
    end = final * 3 * math.log(2)
    return tuple(end + 3 * math.exp(-5 * step / steps) for step in range(1, steps + 1))
