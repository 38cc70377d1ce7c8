"""One training run: a recipe, a budget, a seed and the train tokens in; a trained model out.

One loop for every device. What differs is how a step is executed (`Execution`): on a CPU the
hand-written operators, one operation after the other, so that the same seed gives the same bits; on
an accelerator standard operators through torch.compile, attention by the fastest kernel, batches in
flight ahead of time, losses read some steps late.

A run on an accelerator has two phases. The first, which no budget pays for, chooses the attention,
compiles, and finds how many rows fit: its steps are made on a copy of the weights and on random
tokens, so that nothing is learned in it. The second is the training, and the clock runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from society.errors import SocietyError
from society.model import advice, fused, gpt, kernels, ops
from society.model.data import TrainTokens
from society.model.device import Execution, compile_cache, free_memory, is_out_of_memory, mfu
from society.model.flops import flops_per_step, flops_per_token, planned_steps
from society.model.init import initial_weights
from society.model.loader import Loader
from society.model.optim import EAGER, Optimizer, Steps
from society.model.pipeline import batches
from society.model.recipe import Recipe
from society.model.seeds import set_seeds
from society.model.timeline import Flight, timeline_of
from society.records import Budget

CURVE_POINTS = 64
GRACE = 0.25
"""Share of the run in which a high loss is not yet called divergence."""
WARM_UP_STEPS = 3
"""Untimed steps on a copy: compile the step, then run what was compiled."""
MICRO_TOKENS = 131_072
"""Tokens computed at once on an accelerator; more keep it no busier."""
MEMORY_SHARE = 0.8
"""Share of the free memory that the first guess at the rows may fill, by estimate."""
RECOMPILE_LIMIT = 64
"""Shapes that one function may be compiled for; torch's own limit is below a wide recipe's."""

OnStep = Callable[[int, float, float], None]
"""Called for each step, in order, with its number (from 1), loss in nats per token, and progress.

On an accelerator some steps late.
"""
Objective = Callable[[gpt.Weights, Tensor], tuple[Tensor, Tensor]]
"""Working weights and a block (rows, T + 1) -> objective, and nats per token; both scalars."""


class Diverged(SocietyError):
    """Training left the region where it can recover. Carries `step`, `loss` and `facts`."""

    def __init__(self, step: int, loss: float, limit: float, hint: str = "") -> None:
        """`limit` is the loss that was still allowed, in nats per token; `hint` what to do."""
        self.step, self.loss = step, loss
        self.facts = (
            f"Training diverged at step {step}: loss {loss:.3f} nats per token, at most "
            f"{limit:.3f} allowed."
        )
        super().__init__(f"{self.facts} {hint or 'Lower lr_scale or raise warm_up.'}")


class BadTokens(SocietyError):
    """The tokens do not fit the recipe."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of one training run."""

    recipe: Recipe
    weights: gpt.Weights
    """fp32 master weights on the CPU, name -> tensor."""
    steps: int
    tokens: int
    """Training tokens seen."""
    flops: float
    """FLOPs charged, the optimiser's matrix products included."""
    train_s: float
    """Seconds of the training loop, by the device's clock; the untimed phase is not in it."""
    curve: tuple[float, ...]
    """Training loss in nats per token, thinned evenly to at most 64 points."""
    compile_s: float = 0.0
    """Seconds of the untimed phase: measuring, compiling, finding out what fits."""
    mfu: float | None = None
    """Model FLOPs (without the optimiser's) as a share of the device's peak bf16 rate."""
    device_mem_bytes: int = 0
    """Most memory allocated on an accelerator at once."""
    micro_rows: int = 0
    """Rows computed at once."""
    attention: tuple[str, ...] = ()
    """Kernel of each layer, on an accelerator."""

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of the training loop."""
        return self.tokens / self.train_s if self.train_s else 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """How the steps of one run are executed."""

    objective: Objective
    steps: Steps
    rows: int
    """Rows computed at once."""
    kernels: tuple[str, ...] = ()


class _Pace:
    """How much of the budget is used: by steps where bits matter, by seconds where asked."""

    def __init__(self, planned: int | None, budget: Budget, flight: Flight) -> None:
        self._planned = planned
        self._seconds = budget.amount
        self._flight = flight

    def progress(self) -> float:
        """Share of the run done before the next step; 1 or more when it is over.

        In seconds: when the steps launched so far will be done, which needs no waiting for them.
        """
        if self._planned is None:
            return self._flight.expected_s / self._seconds
        return self._flight.launched / self._planned


def train(
    recipe: Recipe,
    *,
    budget: Budget,
    seed: int,
    tokens: TrainTokens,
    device: str = "cpu",
    data_seed: int | None = None,
    on_step: OnStep | None = None,
    execution: Execution | None = None,
    step_flops: float | None = None,
) -> Trained:
    """Train one model; the same arguments give the same bits on one CPU thread.

    A budget in seconds counts the time of the training itself and gives up that guarantee, as does
    an accelerator.

    Args:
        recipe: What to train and how.
        budget: At least one step is taken, and never more than fit.
        seed: Decides the initial weights, and the order of the data unless `data_seed` does.
        tokens: The train split in the recipe's vocabulary.
        device: A torch device, e.g. `cpu` or `cuda:0`.
        data_seed: Decides the order of the data; None for `seed`.
        on_step: Observer; may raise to stop the run.
        execution: How to use the device.
        step_flops: FLOPs of one step where they are not those of the recipe; see `yardstick`.

    Raises:
        Diverged: The loss is not finite, or above log(vocab) + 1 after the first quarter.
        BadTokens: The tokens have another vocabulary or are fewer than one batch.
    """
    _check(recipe, budget, tokens)
    execution = execution or Execution()
    order = seed if data_seed is None else data_seed
    planned = planned_steps(recipe, budget, step_flops)
    drawn = batches(recipe, tokens, seed=order, steps=planned)
    with _ready(device, execution), _sent(drawn, device) as source:
        set_seeds(seed, "weights", device)
        initial = {name: w.to(device) for name, w in initial_weights(recipe, seed).items()}
        began = time.perf_counter()
        machine = prepare(recipe, initial, device, execution)
        compile_s = time.perf_counter() - began
        run = _Run(recipe, Optimizer(recipe, initial, machine.steps), machine, device, on_step)
        set_seeds(seed, "steps", device)  # what was done until here may have drawn numbers too
        run.go(_Pace(planned, budget, run.flight), source)
        return run.result(compile_s, step_flops)


class _Run:
    """The timed phase of one run."""

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Optimizer,
        machine: Machine,
        device: str,
        on_step: OnStep | None,
    ) -> None:
        self._recipe, self._optimizer, self._machine = recipe, optimizer, machine
        self._device, self._on_step = device, on_step
        self._losses: list[float] = []
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        self.flight = Flight(timeline_of(device))

    def go(self, pace: _Pace, source: Iterator[Tensor]) -> None:
        """Train until the budget is spent."""
        while (progress := pace.progress()) < 1:
            nats, grads = gradients(self._machine, self._optimizer.masters, next(source))
            self._optimizer.step(grads, progress)
            self.flight.launch(nats, progress)
            # The first step is waited for: it says how long one takes.
            self._look(everything=self.flight.launched == 1)
        self._look(everything=True)

    def _look(self, *, everything: bool) -> None:
        """Take notice of steps that have ended."""
        for landed in self.flight.land(everything=everything):
            self._losses.append(landed.loss)
            _stop_if_diverged(self._recipe, self._losses, landed.progress)
            if self._on_step is not None:
                self._on_step(landed.step, landed.loss, landed.progress)

    def result(self, compile_s: float, step_flops: float | None = None) -> Trained:
        """The trained model and what it took."""
        recipe, steps, seconds = self._recipe, len(self._losses), self.flight.seconds
        each = flops_per_step(recipe) if step_flops is None else step_flops
        tokens = steps * recipe.batch_tokens
        held = 0 if self._device == "cpu" else torch.cuda.max_memory_allocated(self._device)
        return Trained(
            recipe=recipe,
            weights={n: w.detach().cpu().clone() for n, w in self._optimizer.masters.items()},
            steps=steps,
            tokens=tokens,
            flops=float(steps * each),
            train_s=seconds,
            curve=thinned(self._losses),
            compile_s=compile_s,
            mfu=mfu(float(tokens * flops_per_token(recipe)), seconds, self._device),
            device_mem_bytes=held,
            micro_rows=self._machine.rows,
            attention=self._machine.kernels,
        )


def thinned(losses: list[float]) -> tuple[float, ...]:
    """At most 64 evenly spaced losses, the first and the last included."""
    if len(losses) <= CURVE_POINTS:
        return tuple(losses)
    places = np.linspace(0, len(losses) - 1, CURVE_POINTS).round().astype(int)
    return tuple(losses[i] for i in places)


def gradients(machine: Machine, masters: gpt.Weights, block: Tensor) -> tuple[Tensor, gpt.Weights]:
    """Loss in nats per token (a scalar on the device) and the gradient of the objective.

    In parts of the batch where the machine says so: their gradients are summed in fp32.
    """
    weights = gpt.working_copy(masters, grad=True)
    parts = torch.split(block, machine.rows)
    loss, nats = machine.objective(weights, parts[0])
    grads = torch.autograd.grad(loss, list(weights.values()))
    if len(parts) > 1:
        grads = tuple(grad.float() for grad in grads)
        for part in parts[1:]:
            loss, more = machine.objective(weights, part)
            nats = nats + more
            for total, grad in zip(
                grads, torch.autograd.grad(loss, list(weights.values())), strict=True
            ):
                total.add_(grad)
        nats = nats / len(parts)
        grads = tuple(grad.div_(len(parts)) for grad in grads)
    return nats, dict(zip(weights, grads, strict=True))


# -------------------------------------------------------------------------- the untimed phase


@contextmanager
def _ready(device: str, execution: Execution) -> Iterator[None]:
    """The device is the current one, and compiled code is kept."""
    with ExitStack() as stack:
        stack.enter_context(compile_cache(execution.cache))
        if device != "cpu":
            stack.enter_context(torch.cuda.device(device))
        yield


@contextmanager
def _sent(drawn: Iterator[np.ndarray], device: str) -> Iterator[Iterator[Tensor]]:
    """Batches as tensors on the device: ahead of time, or on a CPU when they are due."""
    if device == "cpu":
        yield (torch.from_numpy(block) for block in drawn)
        return
    with Loader(drawn, device) as loader:
        yield loader


def prepare(recipe: Recipe, initial: gpt.Weights, device: str, execution: Execution) -> Machine:
    """Choose, compile and rehearse. Nothing of it is left but the machine."""
    like = torch.empty((), dtype=torch.bfloat16, device=device)
    rows = _first_rows(recipe, device, execution)
    compiler = _compiler(device, execution)
    if compiler is None:
        return Machine(objective_of(recipe, gpt.constants(recipe, like)), EAGER, rows)
    choice = kernels.probe(
        recipe, device, rows=rows, option=execution.attention, cache=execution.cache
    )
    objective = compiler(objective_of(recipe, kernels.constants(recipe, like, choice)))
    names = tuple(choice.kernels[window] for window in recipe.windows)
    updates = fused.steps(compiler) if execution.fused else EAGER
    machine = Machine(objective, updates, rows, names)
    return _fitted(recipe, initial, machine, device, fixed=bool(execution.micro_rows))


def _compiler(device: str, execution: Execution) -> Callable[[Any], Any] | None:
    """What makes a function fast; None for a CPU, where nothing is compiled unless asked for."""
    if execution.compiler == "off" or (execution.compiler == "auto" and device == "cpu"):
        return None if device == "cpu" else _as_it_is
    backend = "inductor" if execution.compiler == "auto" else execution.compiler
    torch.compiler.reset()  # another recipe's code counts against the limit
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return lambda function: torch.compile(function, backend=backend, dynamic=False)


def _as_it_is(function: Any) -> Any:
    return function


def _fitted(
    recipe: Recipe, initial: gpt.Weights, machine: Machine, device: str, *, fixed: bool
) -> Machine:
    """Rehearse with fewer and fewer rows at once until it fits the memory."""
    while True:
        try:
            _rehearse(recipe, initial, machine, device)
        except (RuntimeError, MemoryError) as error:
            if fixed or machine.rows == 1 or not is_out_of_memory(error):
                raise
        else:
            return machine
        if device != "cpu":
            torch.cuda.empty_cache()
        machine = replace(machine, rows=_divisor(recipe.rows, machine.rows - 1))


def _rehearse(recipe: Recipe, initial: gpt.Weights, machine: Machine, device: str) -> None:
    """A few steps on a copy of the weights and on random tokens."""
    optimizer = Optimizer(recipe, initial, machine.steps)  # it copies
    block = random_block(recipe, recipe.rows, device)
    for turn in range(WARM_UP_STEPS):
        nats, grads = gradients(machine, optimizer.masters, block)
        optimizer.step(grads, turn / WARM_UP_STEPS)
        nats.item()


def random_block(recipe: Recipe, rows: int, device: str) -> Tensor:
    """Random tokens, always the same: (rows, T + 1)."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, recipe.seq_len + 1)
    return torch.randint(recipe.vocab, size, generator=generator).to(device)


def _first_rows(recipe: Recipe, device: str, execution: Execution) -> int:
    """Rows computed at once: as asked for, all on a CPU, what should fit on an accelerator."""
    if execution.micro_rows:
        return _divisor(recipe.rows, execution.micro_rows)
    if device == "cpu":
        return recipe.rows
    rows = _divisor(recipe.rows, MICRO_TOKENS // recipe.seq_len)
    room = MEMORY_SHARE * free_memory(device)
    while rows > 1 and _needed(recipe, rows) > room:
        rows = _divisor(recipe.rows, rows - 1)
    return rows


def _needed(recipe: Recipe, rows: int) -> int:
    return sum(part.mem_bytes for part in advice.memory_parts(recipe, rows, scores=False))


def _divisor(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most`, and at least 1."""
    return max((n for n in range(1, min(rows, most) + 1) if rows % n == 0), default=1)


def objective_of(recipe: Recipe, fixed: gpt.Constants) -> Objective:
    """The training objective as a function of weights and data."""
    terms = ops.LossTerms(recipe.softcap, recipe.label_smoothing, recipe.z_loss)

    def objective(weights: gpt.Weights, block: Tensor) -> tuple[Tensor, Tensor]:
        x = gpt.activations(recipe, weights, fixed, block[:, :-1])
        return fixed.ops.head_loss(x, weights["head"], block[:, 1:].reshape(-1), terms)

    return objective


# ----------------------------------------------------------------------------------- checks


def _stop_if_diverged(recipe: Recipe, losses: list[float], progress: float) -> None:
    limit = math.log(recipe.vocab) + 1
    loss = losses[-1]
    if not math.isfinite(loss) or (progress >= GRACE and loss > limit):
        raise Diverged(len(losses), loss, limit, advice.divergence(recipe, Recipe()))


def _check(recipe: Recipe, budget: Budget, tokens: TrainTokens) -> None:
    if not budget.amount > 0 or not math.isfinite(budget.amount):
        raise BadTokens(f"A budget must be positive and finite, not {budget.amount}.")
    if tokens.vocab != recipe.vocab:
        raise BadTokens(
            f"The tokens have vocab={tokens.vocab}, the recipe vocab={recipe.vocab}; prepare and "
            "load the data for the recipe's vocabulary."
        )
    if len(tokens.tokens) <= recipe.seq_len:
        raise BadTokens(
            f"{len(tokens.tokens)} tokens hold no row of seq_len={recipe.seq_len} and its target."
        )
