"""What verdicts `society replicate` reaches on simulated noise: the table of docs/findings.md.

    python benchmarks/findings.py --runs 100

Improvements and published sizes are in standard deviations of the score across seeds; rho is the
correlation of baseline and changed recipe at equal seeds.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

from society.experiments.findings import Predicted
from society.experiments.verdicts import Rules, Verdict, judge

CASES = [(0.0, None), (0.5, None), (0.0, 0.7), (0.3, 0.7), (0.7, 0.7)]
"""(true improvement, published size)"""


def once(rng: random.Random, delta: float, rho: float, size: float | None, rules: Rules):
    """The verdict and the seeds it took."""
    base = {seed: rng.gauss(0, 1) for seed in range(rules.noise_seeds)}
    own = (1 - rho**2) ** 0.5
    changed = {}
    for seed in range(rules.n_max):
        changed[seed] = rho * base[seed] + own * rng.gauss(0, 1) - delta
        if len(changed) >= rules.n_min:
            now = judge(
                base, changed, predicted=Predicted.BETTER, size=size, direction=-1, rules=rules
            )
            if now.decided:
                return now.verdict, len(changed)
    return now.verdict, len(changed)


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="simulations per row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=24, help="most seeds of a change")
    given = parser.parse_args()
    rules = Rules(n_max=given.seeds)
    print(
        "| true | published | rho | replicated | not at this scale | reversed | undecided | seeds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for delta, size in CASES:
        for rho in (0.0, 0.6, 0.9):
            rng = random.Random(given.seed)
            seen = [once(rng, delta, rho, size, rules) for _ in range(given.runs)]
            count = Counter(verdict for verdict, _ in seen)
            shares = " | ".join(f"{count[verdict] / given.runs:.2f}" for verdict in Verdict)
            mean = sum(seeds for _, seeds in seen) / given.runs
            print(f"| {delta:g} | {size or '–'} | {rho:g} | {shares} | {mean:.1f} |", flush=True)


if __name__ == "__main__":
    main()
