"""A task of milliseconds with one file that variants may change, for tests of the harness.

The "model" is a vector of four numbers. Training pulls it from where the seed put it towards a
target that the trainer alone holds; scoring asks two processes that hold the model what it answers
to some inputs, and compares with the answers that the scorer alone knows.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict

from society.experiments import Direction, Limits, Refused, Role, TrainReport
from society.experiments.patches import Edit, apply_edits, canonical
from society.experiments.task import Access, Yardstick
from society.knobs import Knob
from society.records import Budget, BudgetKind, Variant

TARGET = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
QUESTIONS = 3

SOURCE = '''"""How a vector is pulled towards another one."""

import numpy as np


def start(seed):
    """Where the vector begins."""
    return np.random.default_rng(seed).standard_normal(4).astype(np.float32)


def step(vector, target, rate):
    """One step of the way."""
    return vector + np.float32(rate) * (target - vector)


def answer(vector, question):
    """What the model says."""
    return np.float32(question @ vector).reshape(1)


def run(report):
    """The last word of the training on its report."""
    return report
'''


class Pull(BaseModel):
    model_config = ConfigDict(frozen=True)

    rate: Annotated[float, Knob(low=0.01, high=1.0)] = 0.2


class CodeTask:
    name = "codetask"
    profile = "test"
    key = "codetask/test"
    metric = "error"
    unit = "squares"
    direction = Direction.MINIMISE
    recipe = Pull
    baseline = Pull()
    spans = MappingProxyType({})
    budget = Budget(BudgetKind.STEPS, 10)
    limits = Limits(timeout_s=10.0, mem_bytes=256 << 20)
    packages = ("numpy",)
    code = ("codetask",)
    access = Access()
    yard_s = 0.05

    def __init__(self, profile="test"):
        self.held: list[Role] = []
        self.module = _load(SOURCE, "pull.py")

    def warm_up(self):
        np.random.default_rng(0).standard_normal(1)

    def prepare(self):
        return "cd" * 32

    def preload(self, role):
        self.held.append(role)

    def sources(self):
        return {"pull.py": SOURCE}

    def adopt(self, code, own=None):
        self.own = own
        path = Path(code) / "pull.py"
        self.module = _load(path.read_text(), str(path))

    def measure(self, recipe, budget, device):
        assert self.held == [Role.TRAINER]
        return Yardstick(cpu_s=self.yard_s, steps=int(budget.amount), tokens=100)

    def train(self, recipe, seed, budget, scratch, device, *, data_seed=None):
        assert self.held == [Role.TRAINER]
        report = self._train(recipe, seed, int(budget.amount), scratch)
        return self.module.run(report)

    def _train(self, recipe, seed, steps, scratch):
        vector, curve = self.module.start(seed), []
        for _ in range(steps):
            vector = self.module.step(vector, TARGET, recipe.rate)
            curve.append(float(np.square(vector - TARGET).mean()))
        (scratch / "model.bin").write_bytes(np.asarray(vector, "<f4").tobytes())
        return TrainReport(flops=1.0, tokens=10 * steps, steps=steps, curve=tuple(curve))

    def sample(self, recipe, seed, scratch, device):
        self._train(recipe, seed, 3, scratch)
        return hashlib.sha256((scratch / "model.bin").read_bytes()).hexdigest()

    def score(self, scratch, recipe, split, device):
        vector = np.frombuffer((scratch / "model.bin").read_bytes(), "<f4")
        questions = _questions(split)
        said = [float(self.module.answer(vector, question)[0]) for question in questions]
        return float(np.square(np.array(said) - questions @ TARGET).mean())

    def serve(self, scratch, recipe, device, scorer):
        assert self.held == []
        vector = np.frombuffer((scratch / "model.bin").read_bytes(), "<f4")
        while (question := scorer.receive()) is not None:
            scorer.send(np.asarray(self.module.answer(vector, question)))

    def judge(self, scratch, recipe, split, device, models):
        assert self.held == [Role.SCORER]
        questions = _questions(split)
        said = [[_ask(model, question) for question in questions] for model in models]
        if said[0] != said[1]:
            raise Refused("the two models disagree")
        return float(np.square(np.array(said[0]) - questions @ TARGET).mean())


class Telling(CodeTask):
    """Prints what is measured, and what was measured before."""

    measured = False

    def measure(self, recipe, budget, device):
        self.measured = True
        sys.stdout.write("measured\n")
        return super().measure(recipe, budget, device)

    def train(self, recipe, seed, budget, scratch, device, *, data_seed=None):
        assert not self.measured, "a process that has used the device cannot confine itself"
        sys.stdout.write(f"charged {self.own.charged_flops:g} last time\n")
        return super().train(recipe, seed, budget, scratch, device, data_seed=data_seed)


class Seconds(CodeTask):
    """Its budget is the clock's."""

    budget = Budget(BudgetKind.SECONDS, 0.2)

    def measure(self, recipe, budget, device):
        return Yardstick(cpu_s=budget.amount, steps=10)

    def train(self, recipe, seed, budget, scratch, device, *, data_seed=None):
        end = time.monotonic() + budget.amount / 2
        report = self._train(recipe, seed, 10, scratch)
        time.sleep(max(0.0, end - time.monotonic()))
        return self.module.run(report)


class Scored(CodeTask):
    """Without a guard: what was trained is scored by the task's own code."""

    judge = serve = property()  # type: ignore[assignment]

    def __getattribute__(self, name):
        if name in ("judge", "serve"):
            raise AttributeError(name)
        return super().__getattribute__(name)


class Tried(CodeTask):
    """Its trials must be quick."""

    trial_s = 0.5
    limits = Limits(timeout_s=5.0, mem_bytes=256 << 20)


class Hasty(CodeTask):
    """The time-out comes soon."""

    limits = Limits(timeout_s=1.5, mem_bytes=256 << 20)


def patched(*edits: tuple[str, str], task: type[CodeTask] = CodeTask) -> Variant:
    """A variant with these replacements in `pull.py`."""
    sources = {"pull.py": SOURCE}
    files = apply_edits(sources, [Edit("pull.py", old, new) for old, new in edits])
    return Variant(task.key, {}, canonical(sources, files))


def _load(text, name):
    space: dict[str, object] = {"__name__": "pull"}
    exec(compile(text, name, "exec"), space)
    return type(
        "Module",
        (),
        {key: staticmethod(value) if callable(value) else value for key, value in space.items()},
    )


def _questions(split):
    return np.random.default_rng(7 + len(split)).standard_normal((QUESTIONS, 4)).astype("<f4")


def _ask(model, question):
    model.send(question)
    answer = model.receive()
    if answer is None:
        raise Refused("the model left")
    if answer.shape != (1,) or not np.isfinite(answer).all():
        raise Refused("the answer is no number")
    return float(answer[0])
