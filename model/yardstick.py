"""What one step takes: processor seconds and FLOPs, measured on random tokens.

A budget in FLOPs pays for the steps of the recipe by the formula of `flops`, which knows the
shipped model only. A step of changed code is charged by the formula times the ratio of two counts:
the matrix products that torch executes in one step of the changed code, and of the shipped code.
Element-wise work is free in both, as in the formula; the harness bounds the processor time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from society.model import gpt, kernels
from society.model.init import initial_weights
from society.model.optim import EAGER, Optimizer
from society.model.recipe import Recipe
from society.model.train import Machine, gradients, objective_of, random_block

PROGRESS = 0.5
"""When in the run a step is measured: not at its ends, where a rate may be zero."""


class Bench:
    """Steps from the initial weights of seed 0; nothing is left of them but this object."""

    def __init__(self, recipe: Recipe, device: str = "cpu", rows: int = 0) -> None:
        """Draw weights and tokens.

        Args:
            recipe: What is trained.
            device: A torch device.
            rows: Rows computed, a divisor of a batch's; 0 for a batch, on an accelerator for one.
        """
        rows = rows or (recipe.rows if device == "cpu" else 1)
        like = torch.empty((), dtype=torch.bfloat16, device=device)
        fixed = kernels.constants(recipe, like)
        self._machine = Machine(objective_of(recipe, fixed), EAGER, rows)
        self._block = random_block(recipe, rows, device)
        self._parts = recipe.rows // rows
        initial = {name: w.to(device) for name, w in initial_weights(recipe, 0).items()}
        self._optimizer = Optimizer(recipe, initial)

    def flops(self) -> float:
        """Take a step and count its matrix products: of a whole batch, and the optimiser's.

        Only the ratio of two such counts means anything: products with what a mask hides are in it.
        """
        with _Counter() as batch:
            grads = self._gradients()
        with _Counter() as updates:
            self._optimizer.step(grads, PROGRESS)
        return float(batch.flops * self._parts + updates.flops)

    def cpu_s(self, steps: int) -> float:
        """Take some steps; processor seconds of one, the median. For a CPU."""
        seconds = []
        for _ in range(steps):
            started = time.process_time()
            self._optimizer.step(self._gradients(), PROGRESS)
            seconds.append(time.process_time() - started)
        return statistics.median(seconds)

    def _gradients(self) -> gpt.Weights:
        return gradients(self._machine, self._optimizer.masters, self._block)[1]


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the FLOPs of matrix products, convolutions and fused attention executed inside it.

    By torch's own formulas (`torch.utils.flop_counter`), in any function and on the way back; the
    class `FlopCounterMode` there takes a second to load the compiler, and misses products in place.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, so there is no compiler to keep out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _formulas().get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


def _formulas() -> Mapping[Any, Callable[..., int]]:
    """Operator -> its FLOPs by its arguments, which are tensors."""
    aten = torch.ops.aten
    return {aten.addmm_: _added, aten.baddbmm_: _added} | flop_registry


def _added(into: Any, first: Any, second: Any, **_: Any) -> int:
    """A product that is added to its first argument."""
    return 2 * int(math.prod(first.shape)) * int(second.shape[-1])
