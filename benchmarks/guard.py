"""What it costs that a variant changes code: the same training plain and as a patch, side by side.

    python benchmarks/guard.py                  three rounds of the default run, about a minute
    python benchmarks/guard.py --rounds 10      more of them
    python benchmarks/guard.py --json           the same as JSON on standard output

The patch changes an expression and no bit (`1 - progress` becomes `1.0 - progress`), so both
trainings take the same steps and get the same score. They take turns in one executor, and a patched
run is compared with the plain one of its round. Counted are the processor seconds of all processes
of a run: training with its yardstick, scoring, and the two models that are questioned. The parts of
the difference are measured apart from that, in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from society.experiments import patches
from society.experiments.channel import ArrayChannel
from society.experiments.local import LocalExecutor
from society.experiments.pretrain import Pretrain
from society.experiments.task import Role
from society.records import Measurement, Outcome, Split, Variant, Work

CHANGE = patches.Edit("schedule.py", "return 1 - progress", "return 1.0 - progress")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="cpu", help="profile of the task pretrain")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    pairs = asyncio.run(rounds(args.profile, args.rounds))
    found = {
        "cpu_s": statistics.median(plain.cost.cpu_s for plain, _ in pairs),
        "wall_s": statistics.median(plain.cost.wall_s for plain, _ in pairs),
        "cpu_ratio": statistics.median(b.cost.cpu_s / a.cost.cpu_s for a, b in pairs),
        "wall_ratio": statistics.median(b.cost.wall_s / a.cost.wall_s for a, b in pairs),
        "parts_s": parts(args.profile),
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"plain run           {found['cpu_s']:.2f} s of processor time, {found['wall_s']:.2f} s")
    print(f"as a patch          {100 * (found['cpu_ratio'] - 1):+.1f} % of processor time")
    print(f"                    {100 * (found['wall_ratio'] - 1):+.1f} % of wall time")
    for name, seconds in found["parts_s"].items():
        print(f"  {name:18}{seconds:.3f} s, {100 * seconds / found['cpu_s']:.1f} %")


async def rounds(profile: str, count: int) -> list[tuple[Measurement, Measurement]]:
    """Plain and patched runs of the same seeds, after one of each that is not counted."""
    task = Pretrain(profile)
    sources = task.sources()
    patch = patches.canonical(sources, patches.apply_edits(sources, [CHANGE]))
    executor = LocalExecutor("pretrain", profile, slots=1)
    await executor.start()
    try:
        pairs = []
        for seed in range(count + 1):
            done = []
            for number, code in enumerate((None, patch)):
                variant = Variant(task=task.key, overrides={}, patch=code)
                work = Work(f"{seed}-{number}", variant, seed, Split.VALIDATION, task.budget)
                measured = await executor.run(work)
                if measured.outcome is not Outcome.COMPLETED:
                    raise SystemExit(f"{measured.outcome}: {measured.log}")
                done.append(measured)
            if done[0].score != done[1].score:
                raise SystemExit(f"Scores differ: {done[0].score} and {done[1].score}.")
            pairs.append((done[0], done[1]))
        return pairs[1:]
    finally:
        await executor.close()


def parts(profile: str) -> dict[str, float]:
    """Processor seconds of each part of the guard, beyond a plain run's."""
    task = Pretrain(profile)
    task.warm_up()
    task.prepare()
    for role in Role:
        task.preload(role)
    recipe = task.baseline
    with tempfile.TemporaryDirectory(prefix="society-") as folder:
        scratch, code = Path(folder), Path(folder) / "code"
        code.mkdir()
        for name, text in patches.apply_edits(task.sources(), [CHANGE]).items():
            (code / name).write_text(text)
        found = {"yardstick": spent(lambda: task.measure(recipe, task.budget, "cpu"))}
        task.train(recipe, 0, task.budget, scratch, "cpu")
        plain = spent(lambda: task.score(scratch, recipe, Split.VALIDATION, "cpu"))
        found["questions"] = spent(lambda: judged(task, scratch)) - plain
        found["adopting, 3 times"] = 3 * spent(lambda: task.adopt(code))
        found["counted step"] = spent(lambda: task._step_flops(recipe, "cpu"))
    return found


def spent(call: Callable[[], object]) -> float:
    """Processor seconds of a call, by all threads of this process; the second time it is made."""
    call()
    started = time.process_time()
    call()
    return time.process_time() - started


def judged(task: Pretrain, scratch: Path) -> float:
    """The score of a model that is served by two threads of this process."""
    ends = [socket.socketpair() for _ in range(2)]
    threads = [threading.Thread(target=served, args=(task, scratch, end)) for _, end in ends]
    for thread in threads:
        thread.start()
    ours = [channel(end) for end, _ in ends]
    try:
        return task.judge(scratch, task.baseline, Split.VALIDATION, "cpu", (ours[0], ours[1]))
    finally:
        for one in ours:
            one.close()
        for thread in threads:
            thread.join()


def served(task: Pretrain, scratch: Path, end: socket.socket) -> None:
    """One thread's work."""
    with channel(end) as line:
        task.serve(scratch, task.baseline, "cpu", line)


def channel(end: socket.socket) -> ArrayChannel:
    """Our end of a line."""
    handle = end.detach()
    return ArrayChannel(handle, handle)


if __name__ == "__main__":
    main()
