"""The figures of docs/novelty.md: `python benchmarks/novelty.py` and `... --pairs`.

Without an option: how long a question to the neighbourhood takes, asked with random changes of the
trainer's recipe, two to eight knobs each, on one thread. With `--pairs`: how well `same_idea` tells
the labelled pairs of hypotheses apart, beside the cosine of their vectors alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from society.agents.search import choices_of
from society.errors import InvalidVariant
from society.experiments import Space, load_task
from society.experiments.neighbourhood import Changes, Neighbourhood
from society.knobs import Scalar
from society.memory.embed import embedder
from society.memory.sameness import THRESHOLD, same_idea
from society.records import Variant

QUERIES = 200
PAIRS = Path(__file__).parents[1] / "tests/data/hypothesis_pairs.jsonl"


def main() -> None:
    """Fill, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=int, default=100_000)
    parser.add_argument("--task", default="pretrain")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--pairs", action="store_true")
    arguments = parser.parse_args()
    if arguments.pairs:
        compare()
        return
    space = Space.of(load_task(arguments.task, arguments.profile))
    base = Variant("benchmark")
    rng = random.Random(1)
    variants = [draw(space, rng) for _ in range(arguments.variants)]
    near = Neighbourhood(space)
    began = time.perf_counter()
    for number, variant in enumerate(variants):
        near.add(f"r{number:05d}", variant)
    each = (time.perf_counter() - began) / len(variants)
    print(f"{len(near)} variants, {len(space.knobs)} knobs; add {1e6 * each:.0f} us each")
    asked = [draw(space, rng) for _ in range(QUERIES)]
    tell("within", near.within, asked)
    tell("nearest 3 in a radius of 0.1", lambda one: near.nearest(one, 3, 0.1), asked)
    tell("nearest 3, known ones", lambda one: near.nearest(one, 3, 0.1), variants[:QUERIES])
    tell("nearest 3 anywhere", lambda one: near.nearest(one, 3), asked)
    changes = Changes(space)
    for number, variant in enumerate(variants):
        changes.add(f"r{number:05d}", variant, base)
    tell("earlier changes repeated", lambda one: changes.repeated(one, base, 0.1), asked)
    began = time.perf_counter()
    for other in variants[:1000]:
        space.distance(asked[0], other)
    scan = (time.perf_counter() - began) * len(variants) / 1000
    print(f"{'one by one with Space.distance':32} {1000 * scan:8.1f} ms (from 1,000)")


def draw(space: Space, rng: random.Random) -> Variant:
    """A random change of the baseline that the recipe allows."""
    while True:
        names = rng.sample(sorted(space.knobs), rng.randint(2, 8))
        overrides = {name: value(space, name, rng) for name in names}
        try:
            return space.variant("benchmark", overrides)
        except InvalidVariant:
            continue


def value(space: Space, name: str, rng: random.Random) -> Scalar:
    """A random value of one knob."""
    knob, default = space.knobs[name], space.default(name)
    options = choices_of(knob, default)
    if options:
        return rng.choice(options)
    low, high = float(knob.low or 0), float(knob.high or 0)
    unit = rng.random()
    number = low * (high / low) ** unit if knob.log else low + (high - low) * unit
    return round(number) if isinstance(default, int) else float(f"{number:.3g}")


def tell(name: str, ask: Callable[[Variant], object], asked: list[Variant]) -> None:
    """Median and slowest of the queries, in milliseconds, by the clock and of processor time."""
    took, worked = [], []
    for variant in asked:
        began, at = time.perf_counter(), time.thread_time()
        ask(variant)
        took.append(1000 * (time.perf_counter() - began))
        worked.append(1000 * (time.thread_time() - at))
    print(
        f"{name:32} p50 {statistics.median(took):5.1f} ms, slowest {max(took):5.1f} ms; "
        f"processor p50 {statistics.median(worked):5.1f} ms, most {max(worked):5.1f} ms"
    )


def compare() -> None:
    """Precision and recall on the half that the weights were not fitted on."""
    pairs = [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
    held = [pair for pair in pairs if held_out(pair["a"], pair["b"])]
    same = [pair["same"] for pair in held]
    print(f"{len(pairs)} pairs, {len(held)} held out, {sum(same)} of them the same idea")
    likely = [same_idea(pair["a"], pair["b"]) for pair in held]
    for threshold in (0.5, 0.6, 0.7, THRESHOLD, 0.9, 0.95):
        print(f"same_idea {threshold:.2f}: {score(same, likely, threshold)}")
    vectors = embedder().embed([text for pair in held for text in (pair["a"], pair["b"])])
    cosine = [float(vectors[i] @ vectors[i + 1]) for i in range(0, len(vectors), 2)]
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9):
        print(f"cosine    {threshold:.2f}: {score(same, cosine, threshold)}")
    kinds = Counter(pair["kind"] for pair in held)
    right = Counter(
        pair["kind"]
        for pair, found in zip(held, likely, strict=True)
        if (found >= THRESHOLD) == pair["same"]
    )
    for kind, count in kinds.items():
        print(f"{kind:24} {right[kind]:3d} of {count:3d} right")


def held_out(a: str, b: str) -> bool:
    """Whether a pair belongs to the half that is measured on."""
    return hashlib.sha256(f"{a}|{b}".encode()).digest()[-1] % 2 == 1


def score(same: list[bool], found: list[float], threshold: float) -> str:
    """Precision and recall at a threshold, in words."""
    called = [one >= threshold for one in found]
    hits = sum(a and b for a, b in zip(same, called, strict=True))
    precision = hits / sum(called) if any(called) else float("nan")
    return (
        f"precision {precision:.3f}, recall {hits / sum(same):.3f} ({sum(called)} called the same)"
    )


if __name__ == "__main__":
    main()
