"""What confinement costs: trainings with and without it, side by side.

    python benchmarks/sandbox.py                     every level against none, 60 s of trainings
    python benchmarks/sandbox.py --seconds 100       longer, for narrower intervals
    python benchmarks/sandbox.py --flops 2e10        other trainings than the default's first fifth
    python benchmarks/sandbox.py --json              the same as JSON on standard output

One process imports torch and holds the data, as the executor's trainer does, and forks one process
for each training. They take turns, in an order drawn anew for every round, and a level is compared
with the plain training of its own round, so that a busy machine slows all of them alike. The time
is that from the fork to the end of the process, as the harness sees it. The interval is a 95 %
bootstrap interval of the median ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from society.experiments import sandbox
from society.experiments.sandbox import Level, Policy
from society.experiments.task import Role, Task, load_task
from society.records import Budget, BudgetKind

PLAIN = "none"
SHARE = 0.2
"""Of the default training's FLOPs, by default."""
CONFINES = 15
"""Processes that confine themselves and end; the median is told."""
DRAWS = 2_000
MEM_BYTES = 4 << 30


@dataclass(frozen=True)
class Cost:
    """What one level costs."""

    level: str
    confine_ms: float
    """Of the call alone, in the run."""
    around_ms: float
    """From the fork to the end of a process that does nothing else, less those of an idle one."""
    ratio: float | None
    """Wall time of a training over the plain one's of the same round, median."""
    low: float | None
    high: float | None
    rounds: int


def main() -> None:
    """Measure, and print a table."""
    options = _options()
    task = load_task("pretrain", "cpu")
    task.warm_up()
    task.prepare()
    task.preload(Role.TRAINER)
    flops = options.flops or SHARE * task.budget.amount
    levels = [Level(level) for level in Level if level.rank <= sandbox.best().rank]
    with tempfile.TemporaryDirectory(prefix="society-benchmark-") as folder:
        policy = _policy(task, Path(folder))
        sandbox.prepare(policy)
        alone = {level: _alone(policy, level) for level in (None, *levels)}
        rounds = _rounds(task, flops, policy, levels, options.seconds)
    costs = [_cost(level, alone, rounds) for level in levels]
    if options.json:
        print(json.dumps({"flops": flops, "costs": [asdict(cost) for cost in costs]}))
    else:
        _show(costs, flops, rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of trainings, in all")
    parser.add_argument("--flops", type=float, help="of one training")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _policy(task: Task, folder: Path) -> Policy:
    access = getattr(task, "access", None)
    hidden = access.hidden if access else ()
    read = access.read if access else ()
    return Policy(read=read, write=(folder,), hidden=hidden, mem_bytes=MEM_BYTES, cpu_s=3_600)


def _fork(act: Callable[[], None]) -> float:
    """Do something in a forked process; wall seconds until it is gone."""
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        _do(act)
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - began
    if status:
        sys.exit(f"a measured process failed: status {status}")
    return took


def _do(act: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        act()
        code = 0
    except Exception:  # noqa: BLE001 - the parent stops at the exit code
        traceback.print_exc()
    finally:
        os._exit(code)


def _alone(policy: Policy, level: Level | None) -> tuple[float, float]:
    """Median milliseconds of confining alone, and of a process that does no more than that."""
    reading, writing = os.pipe()

    def confine() -> None:
        began = time.perf_counter()
        if level is not None:
            sandbox.confine(policy, level)
        os.write(writing, f"{time.perf_counter() - began}\n".encode())

    around = [_fork(confine) for _ in range(CONFINES)]
    os.close(writing)
    with os.fdopen(reading) as pipe:
        inside = [float(line) for line in pipe]
    return 1e3 * statistics.median(inside), 1e3 * statistics.median(around)


def _rounds(
    task: Task, flops: float, policy: Policy, levels: Sequence[Level], seconds: float
) -> list[dict[str, float]]:
    """Wall seconds of one training at each level, for as many rounds as there is time for."""
    budget, folder, found = Budget(BudgetKind.FLOPS, flops), policy.write[0], []
    order: list[Level | None] = [None, *levels]
    shuffler, until = random.Random(0), time.perf_counter() + seconds
    while not found or time.perf_counter() < until:
        shuffler.shuffle(order)
        found.append({})
        for level in order:
            scratch = Path(tempfile.mkdtemp(dir=folder))

            def training(level: Level | None = level, scratch: Path = scratch) -> None:
                if level is not None:
                    sandbox.confine(policy, level)
                task.train(task.baseline, 1, budget, scratch, "cpu")

            found[-1][level or PLAIN] = _fork(training)
            shutil.rmtree(scratch)
    return found


def _cost(
    level: Level, alone: dict[Level | None, tuple[float, float]], rounds: list[dict[str, float]]
) -> Cost:
    ratios = [one[level] / one[PLAIN] for one in rounds]
    low, high = interval(ratios) if len(ratios) > 1 else (None, None)
    inside, around = alone[level]
    ratio = statistics.median(ratios)
    return Cost(level, inside, around - alone[None][1], ratio, low, high, len(rounds))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    drawer = random.Random(0)
    medians = sorted(statistics.median(drawer.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    return medians[round(0.025 * DRAWS)], medians[round(0.975 * DRAWS) - 1]


def _show(costs: Sequence[Cost], flops: float, rounds: Sequence[dict[str, float]]) -> None:
    plain = statistics.median(one[PLAIN] for one in rounds)
    print(f"A plain training of {flops:.3g} FLOPs takes {plain:.2f} s ({len(rounds)} rounds).\n")
    print(f"{'level':12} {'confine':>10} {'in all':>10}  {'ratio':>6}  95 % interval")
    for cost in costs:
        interval = "" if cost.low is None else f"{cost.low:.3f} to {cost.high:.3f}"
        times = f"{cost.confine_ms:7.1f} ms {cost.around_ms:7.1f} ms"
        print(f"{cost.level:12} {times}  {cost.ratio:6.3f}  {interval}")


if __name__ == "__main__":
    main()
