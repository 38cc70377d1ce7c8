"""How fast the training step is on one core, beside an ordinary eager program for the same step.

    python benchmarks/trainer.py              ours against the reference, default recipe and dim 256
    python benchmarks/trainer.py ladder       what each change brought, switched on one by one
    python benchmarks/trainer.py --json       the same as JSON on standard output

Every contestant is a process of its own with one thread and the same weights and rows. They take
turns, a few steps each, so that a busy machine slows all of them alike: believe the ratios, and
the milliseconds only on a quiet machine. Times are CPU times, which on a free core are the wall's:
waiting for a busy one does not count. A step is forward, backward and optimiser. FLOPs are
counted (`society.model.flops`: the optimiser's matrix products included), and compared with the
best rate at which `torch.mm` multiplied in between.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from society.experiments.task import cache_dir
from society.model import attention, gpt, ops, threads
from society.model.data import TrainTokens, load_train, prepare
from society.model.flops import flops_per_step
from society.model.init import initial_weights
from society.model.optim import Optimizer
from society.model.pipeline import batches
from society.model.plain import PLAIN
from society.model.recipe import Recipe

Step = Callable[[int], float]
"""One training step, by its number from 0; the loss in nats per token."""

RECIPES: Mapping[str, dict[str, Any]] = {
    "default": {},
    "dim256": {"dim": 256, "heads": 4},
}
PROGRESS = 0.3
"""Where in the schedule all steps are taken: full rates, decay on."""
ROWS_HELD = 16
"""Batches that the steps go round in."""
SHAPES = ((256, 256, 256), (512, 512, 512), (1024, 64, 256), (1024, 256, 1024), (1024, 1024, 1024))
"""Matrix products whose best rate counts as the machine's."""


# ------------------------------------------------------------------------------ contestants


@dataclass(frozen=True)
class Rung:
    """A step between the reference and ours, by what of ours it uses."""

    about: str
    ops: ops.Ops = PLAIN
    bf16: bool = False
    """Forward and backward on bf16 copies, without autocast."""
    products: bool = False
    """Attention as two matrix products and a softmax instead of torch's fused one."""
    projected: bool = False
    """All of attention, projections to heads, with one derivative by hand."""
    optimizer: bool = False
    pages: bool = False


def ladder() -> dict[str, Rung]:
    """From the reference's arithmetic to ours, one change after the other."""
    by_hand = replace(ops.HAND_WRITTEN, head_loss=PLAIN.head_loss)
    found = {"plain": Rung("reference's arithmetic as functions of a dict, fp32")}
    found["derivatives"] = Rung("+ derivatives of norm, RoPE, ReLU², mixing by hand", by_hand)
    found["head"] = replace(
        found["derivatives"], about="+ head, soft cap and loss in chunks", ops=ops.HAND_WRITTEN
    )
    found["bf16"] = replace(found["head"], about="+ bf16 throughout, no autocast", bf16=True)
    found["products"] = replace(
        found["bf16"], about="+ attention as matrix products", products=True
    )
    found["projected"] = replace(
        found["products"], about="+ all of attention by hand", projected=True
    )
    found["optimizer"] = replace(
        found["projected"], about="+ stacked Muon, one-pass AdamW", optimizer=True
    )
    found["pages"] = replace(found["optimizer"], about="+ freed pages kept = ours", pages=True)
    return found


CONTESTANTS = ("ours", "reference fp32", "reference autocast", "reference fp32, pages kept")


def contestant(name: str, recipe: Recipe, tokens: TrainTokens) -> Step:
    """A contestant's step, with its weights and rows ready.

    Raises:
        SystemExit: There is no such contestant.
    """
    weights = initial_weights(recipe, seed=0)
    drawn = batches(recipe, tokens, seed=0, steps=None)
    blocks = [torch.from_numpy(next(drawn)) for _ in range(ROWS_HELD)]
    if name.startswith("reference"):
        if name.endswith("pages kept"):
            threads.keep_pages()
        trainer = reference.Trainer(recipe, weights, autocast="autocast" in name)
        return lambda step: trainer.step(blocks[step % ROWS_HELD], PROGRESS)
    rungs = {**ladder(), "ours": ladder()["pages"]}
    if name not in rungs:
        raise SystemExit(f"There is no contestant {name!r}.")
    if rungs[name].pages:
        threads.keep_pages()
    return partial(_rung_step, _Climber(rungs[name], recipe, weights), blocks)


def _rung_step(climber: _Climber, blocks: list[Tensor], step: int) -> float:
    return climber.step(blocks[step % len(blocks)])


class _Climber:
    """Runs a rung: our model with some of our operators, and either optimiser."""

    def __init__(self, rung: Rung, recipe: Recipe, weights: Mapping[str, Tensor]) -> None:
        self._recipe = recipe
        self._dtype = torch.bfloat16 if rung.bf16 else torch.float32
        self._fixed = _constants(rung, recipe, torch.empty((), dtype=self._dtype))
        if rung.optimizer:
            ours = Optimizer(recipe, weights)
            self._masters, self._update = ours.masters, partial(ours.step, progress=PROGRESS)
        else:
            params = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
            optimizers = reference.Optimizers(recipe, params)
            self._masters = {name: param.detach() for name, param in params.items()}
            self._update = partial(_reference_update, params, optimizers)

    def step(self, block: Tensor) -> float:
        recipe = self._recipe
        weights = gpt.working_copy(self._masters, grad=True, dtype=self._dtype)
        x = gpt.activations(recipe, weights, self._fixed, block[:, :-1])
        terms = ops.LossTerms(recipe.softcap, recipe.label_smoothing, recipe.z_loss)
        targets = block[:, 1:].reshape(-1)
        loss, nats = self._fixed.ops.head_loss(x, weights["head"], targets, terms)
        grads = torch.autograd.grad(loss, list(weights.values()))
        self._update(dict(zip(weights, grads, strict=True)))
        return nats.item()


def _constants(rung: Rung, recipe: Recipe, like: Tensor) -> gpt.Constants:
    ours = gpt.constants(recipe, like)
    attend = ours.attend if rung.products else tuple(map(_fused, attention_masks(recipe, like)))
    return replace(
        ours, ops=rung.ops, attend=attend, projected=ours.projected if rung.projected else ()
    )


def attention_masks(recipe: Recipe, like: Tensor) -> Iterator[Tensor]:
    """The additive mask of every layer."""
    return (attention.window_mask(recipe.seq_len, window, like) for window in recipe.windows)


def _fused(mask: Tensor) -> attention.Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)

    return attend


def _reference_update(
    params: Mapping[str, nn.Parameter],
    optimizers: reference.Optimizers,
    grads: Mapping[str, Tensor],
) -> None:
    for name, param in params.items():
        param.grad = grads[name].to(param.dtype)
    optimizers.step(PROGRESS)


# --------------------------------------------------------------------------------- measuring


def serve(connection: Connection, name: str, recipe: Recipe, cache: Path) -> None:
    """A contestant's process: for each number of steps asked, answer their seconds and the loss."""
    torch.set_num_threads(1)
    if name == "matmul":
        while connection.recv():
            connection.send((matmul_rates(), 0.0))
        return
    step = contestant(name, recipe, load_train(cache, recipe.vocab))
    done = 0
    while count := connection.recv():
        seconds, loss = [], 0.0
        for _ in range(count):
            started = time.process_time()
            loss = step(done)
            seconds.append(time.process_time() - started)
            done += 1
        connection.send((seconds, loss))


def matmul_rates() -> dict[str, float]:
    """The best FLOP/s of `torch.mm` on this thread, by type."""
    return {
        name: max(_rate(shape, dtype) for shape in SHAPES)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }


def _rate(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int = 4) -> float:
    m, k, n = shape
    a, b = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - started)
    return 2 * m * k * n / best


@contextmanager
def processes(names: tuple[str, ...], recipe: Recipe, cache: Path) -> Iterator[dict[str, Any]]:
    """One warm process for each contestant, by name: the end of a pipe to it."""
    context = multiprocessing.get_context("spawn")
    running, ends = [], {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, recipe, cache), daemon=True)
        process.start()
        running.append(process)
        ends[name] = ours
    try:
        yield ends
    finally:
        for end in ends.values():
            end.send(0)
        for process in running:
            process.join(timeout=10)


@dataclass(frozen=True)
class Timing:
    """One contestant's result."""

    name: str
    ms_per_step: float
    """Median over the turns of the mean of a turn."""
    tokens_per_s: float
    gflop_per_s: float
    of_matmul: float
    """Fraction of the best matmul rate measured in between."""
    times_ours: float
    """Median over the turns of its time over ours: how many times faster ours is."""
    loss: float
    """Nats per token after the last step, on the same rows for everyone."""


@dataclass(frozen=True)
class Result:
    """Everybody's timings at one recipe."""

    recipe: str
    batch_tokens: int
    flops_per_step: int
    matmul_gflop_per_s: Mapping[str, float]
    timings: tuple[Timing, ...]


def measure(
    title: str, names: tuple[str, ...], recipe: Recipe, cache: Path, turns: int, steps: int
) -> Result:
    """Let everybody take turns; the first turn warms up and does not count."""
    turn_means: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    rates: dict[str, float] = {"bf16": 0.0, "fp32": 0.0}
    with processes((*names, "matmul"), recipe, cache) as ends:
        for turn in range(turns + 1):
            _say(f"{title}: turn {turn} of {turns}" + (" (warm-up)" if turn == 0 else ""))
            for name in names:
                ends[name].send(steps)
                seconds, losses[name] = ends[name].recv()
                if turn:
                    turn_means[name].append(statistics.fmean(seconds))
            ends["matmul"].send(1)
            found, _ = ends["matmul"].recv()
            rates = {dtype: max(rate, found[dtype]) for dtype, rate in rates.items()}
    _say("")
    flops, best, ours = flops_per_step(recipe), max(rates.values()), turn_means[_ours(names)]
    timings = []
    for name in names:
        s = statistics.median(turn_means[name])
        ratio = statistics.median(a / b for a, b in zip(turn_means[name], ours, strict=True))
        timings.append(
            Timing(
                name, s * 1e3, recipe.batch_tokens / s, flops / s / 1e9, flops / s / best, ratio,
                losses[name],
            )
        )  # fmt: skip
    gflops = {dtype: rate / 1e9 for dtype, rate in rates.items()}
    return Result(title, recipe.batch_tokens, flops, gflops, tuple(timings))


def _ours(names: tuple[str, ...]) -> str:
    return "ours" if "ours" in names else names[-1]


# ---------------------------------------------------------------------------------- printing


def table(result: Result, about: Mapping[str, str]) -> str:
    """A result for a terminal."""
    rates = ", ".join(f"{rate:.0f} in {dtype}" for dtype, rate in result.matmul_gflop_per_s.items())
    lines = [
        f"{result.recipe}: {result.batch_tokens} tokens and {result.flops_per_step / 1e9:.2f} GFLOP"
        f" a step; torch.mm at its best {rates} GFLOP/s",
        f"{'':<52}{'ms/step':>9}{'tokens/s':>10}{'GFLOP/s':>9}{'of mm':>7}{'x ours':>8}{'loss':>8}",
    ]
    lines += [
        f"{about.get(t.name, t.name):<52}{t.ms_per_step:>9.1f}{t.tokens_per_s:>10,.0f}"
        f"{t.gflop_per_s:>9.1f}{t.of_matmul:>7.0%}{t.times_ours:>8.2f}{t.loss:>8.3f}"
        for t in result.timings
    ]
    return "\n".join(lines)


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
    elif progress:
        print(progress, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="benchmarks/trainer.py",
        description="Times the training step on one CPU core beside an ordinary eager program.",
        epilog="Examples:  make bench BENCH=trainer    "
        'make bench BENCH=trainer ARGS="ladder --recipe default"    '
        'make bench BENCH=trainer ARGS="--batch 4096 --json"',
    )
    found.add_argument(
        "mode", nargs="?", default="compare", choices=("compare", "ladder"),
        help="compare: ours against the reference; ladder: what each change brought",
    )  # fmt: skip
    found.add_argument(
        "--recipe", action="append", choices=tuple(RECIPES),
        help="the default recipe, or the same at dim 256 with 4 heads (default: both; may be "
        "repeated)",
    )  # fmt: skip
    found.add_argument(
        "--batch", type=int, default=0, metavar="TOKENS", help="tokens a step (the recipe's own)"
    )
    found.add_argument(
        "--turns", type=int, default=9, help="turns each contestant takes (default: 9)"
    )
    found.add_argument("--steps", type=int, default=6, help="steps a turn (default: 6)")
    found.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return found


def main() -> None:
    """Measure and print."""
    arguments = parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    climbing = arguments.mode == "ladder"
    names = ("reference fp32", *ladder()) if climbing else CONTESTANTS
    about = {name: rung.about for name, rung in ladder().items()} if climbing else {}
    results = []
    cache = cache_dir()
    for title in arguments.recipe or (("default",) if climbing else tuple(RECIPES)):
        changes = RECIPES[title] | ({"batch_tokens": arguments.batch} if arguments.batch else {})
        recipe = Recipe(**changes)
        prepare(cache, recipe.vocab)
        result = measure(title, names, recipe, cache, arguments.turns, arguments.steps)
        results.append(result)
        if not arguments.json:
            print(table(result, about), end="\n\n", flush=True)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
