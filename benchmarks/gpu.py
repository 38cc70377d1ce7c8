"""What the trainer reaches on an accelerator, at a profile's shape, on synthetic tokens.

    python benchmarks/gpu.py                       # the h100 profile on the first card
    python benchmarks/gpu.py --profile gpu --seconds 60
    python benchmarks/gpu.py --cpu-smoke           # the script itself, in seconds, without a card

Prints the card, the attention table (every kernel, every window, forward and backward), the rows
that fit, compile time first and again, and one training by the harness's own clock: tokens per
second, MFU and peak memory. One JSON line at the end holds all of it. Random tokens cost what real
ones do; the score means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from society.errors import SocietyError
from society.experiments.task import cache_dir, load_profile, parse
from society.model import kernels, train
from society.model.data import TrainTokens
from society.model.device import GIB, Execution, cards, identify, peak_flops
from society.model.flops import flops_per_token, parameter_count
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.records import Budget, BudgetKind

TOKENS = 20_000_000
"""Random tokens; the shuffled rows of a run repeat them when they are used up."""
SMOKE = Recipe(vocab=300, dim=32, depth=1, seq_len=32, batch_tokens=128, lr_scale=0.1)


def main() -> int:
    """Measure and print; 2 when there is nothing to measure on."""
    args = _arguments()
    try:
        found = _smoke(args) if args.cpu_smoke else _measure(args)
    except SocietyError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="h100", help="profile of the task pretrain")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=60.0, help="timed training")
    parser.add_argument("--attention", default="auto", help="auto or one family of kernels")
    parser.add_argument("--micro-rows", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--no-compile", action="store_true", help="one operation after the other")
    parser.add_argument("--cold", action="store_true", help="forget what was compiled before")
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny shape on the CPU")
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, on a card."""
    (card,) = cards(args.device)
    recipe = parse(Recipe, load_profile("pretrain", args.profile).recipe, args.profile)
    recipe = recipe.model_copy(update={"packing": "contiguous"})  # one long row of random tokens
    peak = peak_flops(card.name)
    rate = "unknown" if peak is None else f"{peak / 1e12:g} TFLOP/s"
    print(
        f"{card.label}, {card.capability}, {card.free_bytes / GIB:.1f} GiB free, bf16 peak {rate}"
    )
    execution = Execution(
        attention=args.attention,
        compiler="off" if args.no_compile else "auto",
        micro_rows=args.micro_rows,
        cache=cache_dir(),
    )
    with tempfile.TemporaryDirectory() as empty:
        if args.cold:
            execution = replace(execution, cache=Path(empty))
        return _report(recipe, args.device, execution, Budget(BudgetKind.SECONDS, args.seconds))


def _smoke(args: argparse.Namespace) -> dict[str, Any]:
    """The same on a CPU, traced instead of compiled; says nothing about speed."""
    single_thread()
    print(f"{' '.join(identify('cpu'))}: a smoke test of this script, no measurement")
    with tempfile.TemporaryDirectory() as empty:
        execution = Execution("sdpa", "eager", args.micro_rows, Path(empty))
        return _report(SMOKE, "cpu", execution, Budget(BudgetKind.STEPS, 3))


def _report(recipe: Recipe, device: str, execution: Execution, budget: Budget) -> dict[str, Any]:
    print(
        f"depth {recipe.depth}, dim {recipe.width}, {recipe.heads} heads, T {recipe.seq_len}, "
        f"{recipe.batch_tokens:,} tokens a step, {parameter_count(recipe) / 1e6:.1f} M parameters, "
        f"{flops_per_token(recipe) / 1e6:.1f} MFLOP a token"
    )
    tokens = _random_tokens(recipe)
    # One step first: kernels are chosen and compiled, and the next run finds them in the cache.
    first = _run(recipe, device, execution, Budget(BudgetKind.STEPS, 1), tokens)
    choice = _attention(recipe, device, execution, first.micro_rows)
    trained = _run(recipe, device, execution, budget, tokens)
    _print_training(first, trained)
    return {
        "device": identify(device),
        "torch": torch.__version__,
        "recipe": recipe.model_dump(),
        "attention": [asdict(timing) for timing in choice.timings],
        "kernels": trained.attention,
        "micro_rows": trained.micro_rows,
        "untimed_s": {"first": first.compile_s, "again": trained.compile_s},
        "train_s": trained.train_s,
        "steps": trained.steps,
        "tokens_per_s": trained.tokens_per_s,
        "mfu": trained.mfu,
        "device_mem_bytes": trained.device_mem_bytes,
    }


def _random_tokens(recipe: Recipe) -> TrainTokens:
    count = max(4 * recipe.batch_tokens + 1, min(TOKENS, 40 * recipe.batch_tokens))
    drawn = np.random.default_rng(0).integers(recipe.vocab, size=count)
    return TrainTokens(drawn.astype(np.uint16), recipe.vocab, "random")


def _run(
    recipe: Recipe, device: str, execution: Execution, budget: Budget, tokens: TrainTokens
) -> train.Trained:
    return train.train(
        recipe, budget=budget, seed=0, tokens=tokens, device=device, execution=execution
    )


def _attention(recipe: Recipe, device: str, execution: Execution, rows: int) -> kernels.Choice:
    """The table of the kernels, at the rows that are computed at once."""
    choice = kernels.probe(
        recipe, device, rows=rows, option=execution.attention, cache=execution.cache
    )
    print(f"\nattention of one layer, forward and backward, {rows} rows\n")
    print(f"{'window':>7} {'kernel':<15} {'ms':>9}")
    for timing in choice.timings:
        chosen = " <" if choice.kernels[timing.window] == timing.kernel else ""
        told = timing.problem[:70] if timing.ms is None else f"{timing.ms:9.3f}{chosen}"
        print(f"{timing.window:>7} {timing.kernel:<15} {told}")
    return choice


def _print_training(first: train.Trained, trained: train.Trained) -> None:
    mfu = "unknown" if trained.mfu is None else f"{100 * trained.mfu:.1f} %"
    print(f"\nuntimed phase   {first.compile_s:.1f} s first, {trained.compile_s:.1f} s again")
    print(f"rows at once    {trained.micro_rows}")
    print(f"training        {trained.steps} steps in {trained.train_s:.2f} s")
    print(f"tokens/s        {trained.tokens_per_s:,.0f}")
    print(f"MFU             {mfu}")
    print(f"peak memory     {trained.device_mem_bytes / GIB:.2f} GiB on the device\n")


if __name__ == "__main__":
    sys.exit(main())
