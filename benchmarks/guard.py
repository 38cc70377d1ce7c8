"""What it costs that a variant changes code: the same training plain and as a patch, side by side.

    python benchmarks/guard.py                  ten rounds of the default run, two minutes
    python benchmarks/guard.py --rounds 40      more of them, for a narrower interval
    python benchmarks/guard.py --json           the same as JSON on standard output

The patch changes an expression and no bit (`1 - progress` becomes `1.0 - progress`), so both
trainings take the same steps and get the same score. They take turns in one executor, and a patched
run is compared with the plain one of its round; the interval is a 95 % bootstrap interval of the
median. Counted are the processor seconds of all processes of a run. What is measured with the
task's own code and then remembered for some minutes is in the first patched run, which is not among
the rounds, and told by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from sandbox import interval

from society.experiments import patches
from society.experiments.local import LocalExecutor
from society.experiments.pretrain import Pretrain
from society.experiments.processes import Message
from society.experiments.task import Role
from society.records import Measurement, Outcome, Split, Variant, Work

CHANGE = patches.Edit("schedule.py", "return 1 - progress", "return 1.0 - progress")
PLAIN, PATCHED = ("training", "scoring"), ("training", "model", "second model", "questions")
"""The processes of a run, in the order in which the executor tells of them."""


class Telling(LocalExecutor):
    """Keeps the processor seconds of every process of its runs."""

    def __init__(self, profile: str) -> None:
        """Set up one slot."""
        super().__init__("pretrain", profile, slots=1)
        self.spent: dict[str, list[float]] = defaultdict(list)

    async def _endings(self, slot: object, work: Work, folder: Path) -> list[Message]:
        endings = await super()._endings(slot, work, folder)
        names = PLAIN if work.variant.patch is None else PATCHED
        kind = "plain" if work.variant.patch is None else "patch"
        for name, ending in zip(names, endings, strict=True):
            self.spent[f"{kind}: {name}"].append(ending["cpu_s"])
        return endings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="cpu", help="profile of the task pretrain")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    found = asyncio.run(measured(args.profile, args.rounds)) | {"own_s": own(args.profile)}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"plain run     {found['cpu_s']:.2f} s of processor time")
    for clock, (ratio, low, high) in (("processor", found["cpu"]), ("wall", found["wall"])):
        print(
            f"as a patch    {100 * (ratio - 1):+.1f} % of {clock} time, "
            f"95 % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"
        )
    for name, seconds in found["processes_s"].items():
        print(f"  {name:20} {seconds:.3f} s")
    print("once in some minutes, for every recipe:")
    for name, seconds in found["own_s"].items():
        print(f"  {name:20} {seconds:.3f} s, {100 * seconds / found['cpu_s']:.1f} %")


async def measured(profile: str, rounds: int) -> dict[str, object]:
    """Runs as they are and patched, of the same seeds, after one of each that is not counted."""
    task = Pretrain(profile)
    sources = task.sources()
    patch = patches.canonical(sources, patches.apply_edits(sources, [CHANGE]))
    executor = Telling(profile)
    await executor.start()
    try:
        pairs = []
        for seed in range(rounds + 1):
            done = [await run(executor, task, seed, code) for code in (None, patch)]
            if done[0].score != done[1].score:
                raise SystemExit(f"Scores differ: {done[0].score} and {done[1].score}.")
            pairs.append((done[0].cost, done[1].cost))
    finally:
        await executor.close()
    return {
        "cpu_s": statistics.median(plain.cpu_s for plain, _ in pairs[1:]),
        "cpu": about([patched.cpu_s / plain.cpu_s for plain, patched in pairs[1:]]),
        "wall": about([patched.wall_s / plain.wall_s for plain, patched in pairs[1:]]),
        "processes_s": {name: statistics.median(s[1:]) for name, s in executor.spent.items()},
    }


async def run(executor: LocalExecutor, task: Pretrain, seed: int, patch: str | None) -> Measurement:
    """One run of the baseline."""
    variant = Variant(task=task.key, overrides={}, patch=patch)
    work = Work(f"{seed}", variant, seed, Split.VALIDATION, task.budget)
    done = await executor.run(work)
    if done.outcome is not Outcome.COMPLETED:
        raise SystemExit(f"{done.outcome}: {done.log_tail}")
    return done


def about(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and a 95 % bootstrap interval of it."""
    return statistics.median(ratios), *interval(ratios)


def own(profile: str) -> dict[str, float]:
    """Processor seconds of what is measured with the task's own code."""
    task = Pretrain(profile)
    task.warm_up()
    task.prepare()
    for role in Role:
        task.preload(role)
    recipe = task.baseline
    return {
        "yardstick": spent(lambda: task.measure(recipe, task.budget, "cpu")),
        "answering": spent(lambda: task.answering_s(recipe, Split.VALIDATION, "cpu")),
    }


def spent(call: Callable[[], object]) -> float:
    """Processor seconds of a call, the first in this process."""
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
