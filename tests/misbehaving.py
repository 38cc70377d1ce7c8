# ruff: noqa: T201 - printing is what these runs are about
"""A task whose runs go wrong in every way the executor must survive; loaded by `module:Class`."""

import os
import signal
import subprocess
import sys
import time
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from society.experiments import Direction, Diverged, Limits, Refused, Role, TrainReport
from society.knobs import Knob
from society.records import Budget, BudgetKind

ACTS = (
    "behave", "diverge", "raise", "exit", "segfault", "hang", "bomb", "linger", "interrupt",
    "talk", "overspend", "cheat", "nan", "score_raises", "score_dies", "kill_parent", "sleep",
    "environment", "forge",
)  # fmt: skip


class Script(BaseModel):
    model_config = ConfigDict(frozen=True)

    act: Annotated[Literal[ACTS], Knob(choices=ACTS)] = "behave"
    sleep_s: Annotated[float, Knob(low=0.0, high=60.0)] = 0.0


class Misbehaving:
    name = "misbehaving"
    profile = "test"
    key = "misbehaving/test"
    metric = "score"
    unit = "points"
    direction = Direction.MAXIMISE
    recipe = Script
    baseline = Script()
    spans = MappingProxyType({})
    budget = Budget(BudgetKind.STEPS, 10)
    limits = Limits(timeout_s=20.0, mem_bytes=200 << 20)
    packages = ("numpy",)
    code = ("misbehaving",)

    def __init__(self, profile):
        self.held = []

    def warm_up(self):
        pass

    def prepare(self):
        return "ab" * 32

    def preload(self, role):
        self.held.append(role)

    def train(self, recipe, seed, budget, scratch, device):
        act = getattr(self, f"_{recipe.act}", None)
        (scratch / "model.txt").write_text(str(seed))
        (scratch / "held.txt").write_text(",".join(self.held))
        if act is not None:
            report = act(recipe, scratch)
            if report is not None:
                return report
        return TrainReport(flops=1e9, tokens=1000, steps=10, curve=tuple(range(200)))

    def score(self, scratch, recipe, split, device):
        if recipe.act == "score_raises":
            raise KeyError("no such split")
        if recipe.act == "score_dies":
            os._exit(7)
        if recipe.act == "cheat":
            raise Refused("impossible probabilities")
        assert self.held in ([Role.SCORER], list(Role))
        assert (scratch / "held.txt").read_text() in ("trainer", "trainer,scorer")
        if recipe.act == "nan":
            return float("nan")
        return float((scratch / "model.txt").read_text()) + (split == "holdout") / 2

    def _diverge(self, recipe, scratch):
        raise Diverged("loss is nan at step 3", TrainReport(steps=3, tokens=300))

    def _raise(self, recipe, scratch):
        print("about to fail")
        raise ZeroDivisionError("one by none")

    def _exit(self, recipe, scratch):
        print("leaving early")
        os._exit(3)

    def _segfault(self, recipe, scratch):
        os.kill(os.getpid(), signal.SIGSEGV)

    def _hang(self, recipe, scratch):
        print("hanging")
        (scratch.parent.parent / "hung").write_text(str(os.getpid()))
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        (scratch.parent.parent / "grandchild").write_text(str(child))
        time.sleep(60)

    def _bomb(self, recipe, scratch):
        blocks = []
        while True:
            blocks.append(np.ones(4 << 20))

    def _linger(self, recipe, scratch):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (scratch.parent.parent / "lingering").write_text(str(child.pid))

    def _interrupt(self, recipe, scratch):
        for pid in (os.getpid(), os.getppid()):
            os.kill(pid, signal.SIGINT)

    def _talk(self, recipe, scratch):
        for number in range(5000):
            print(f"line {number}")
        os.write(2, b"the end\n")

    def _overspend(self, recipe, scratch):
        return TrainReport(flops=1e9, tokens=1000, steps=12)

    def _forge(self, recipe, scratch):
        (scratch / "score").write_text("999")
        return TrainReport(steps=10, curve=(999.0,))

    def _kill_parent(self, recipe, scratch):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    def _sleep(self, recipe, scratch):
        time.sleep(recipe.sleep_s)

    def _environment(self, recipe, scratch):
        print(sorted(os.environ))


class Hasty(Misbehaving):
    """The time-out comes soon."""

    limits = Limits(timeout_s=0.8, mem_bytes=200 << 20)


class Unready(Misbehaving):
    """`prepare` fails."""

    def prepare(self):
        raise PermissionError(13, "Permission denied", "/nowhere/cache")


class Unimportable(Misbehaving):
    """A package is missing."""

    def warm_up(self):
        import a_package_that_nobody_has  # noqa: F401


class Broken(Misbehaving):
    """`warm_up` fails in a way nobody foresaw."""

    def warm_up(self):
        print("some banner")
        raise ZeroDivisionError("one by none")


class Empty(Misbehaving):
    """The loops die while they load their data."""

    def preload(self, role):
        raise ValueError(f"nothing to load for {role}")
