"""`society calibrate`: measure the noise of a task before believing any difference in its scores.

The plan is registered first. Then the baseline runs on the first seeds of the study list, with one
of its two seeds held for the components, on one seed several times for the jitter, and one small
change per class of knobs runs on the same seeds as the baseline. What is computed from the scores
is in `society.experiments.noise`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from society.errors import ExecutorError, InvalidVariant, UsageError
from society.experiments import noise
from society.experiments.noise import ClassNoise, NoiseStudy
from society.noise_words import summary
from society.records import BudgetKind, Run, Variant
from society.study import Job, Progress, Workbench, silent, workbench

if TYPE_CHECKING:
    from society.experiments.space import Space
    from society.knobs import Scalar
    from society.memory.folder import NotebookFolder
    from society.records import Study

KIND = "noise"
MIN_SEEDS = 4
PAIRS = 8
"""Seeds per class of knobs unless chosen."""
REPEATS = 3
"""Runs on the very same seeds."""
STEP = 0.125
"""A small change: this part of the knob's range, on the knob's own scale."""

_STORED = TypeAdapter(NoiseStudy)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every run of a noise study, as it is registered."""

    seeds: int
    """Baseline runs, each on a seed of its own."""
    components: int
    """Runs per component."""
    repeats: int
    pairs: int
    """Seeds per class of knobs, the first of the baseline's; 0 for none."""
    changes: Mapping[str, Mapping[str, Scalar]]
    """Class of knobs -> the change that stands for it."""
    budget: str
    data_hash: str

    @classmethod
    def of(cls, bench: Workbench, seeds: int, pairs: int | None) -> Plan:
        """Fill in what was not chosen.

        Raises:
            UsageError: Too few seeds for an interval, or more pairs than seeds.
        """
        pairs = min(PAIRS, seeds) if pairs is None else pairs
        _check(seeds, pairs)
        changes = representatives(bench.space, bench.task.key) if pairs else {}
        budget = bench.task.budget
        return cls(
            seeds=seeds,
            components=max(MIN_SEEDS, seeds // 4),
            repeats=REPEATS,
            pairs=pairs,
            changes={group: dict(one.overrides) for group, one in changes.items()},
            budget=f"{budget.amount:g} {budget.kind.value}",
            data_hash=bench.executor.data_hash,
        )


async def calibrate(
    bench: Workbench, seeds: int, pairs: int | None = None, progress: Progress = silent
) -> NoiseStudy:
    """Measure the noise of the bench's task; recorded runs are not made again.

    Args:
        bench: Where to run.
        seeds: Baseline runs, at least 4.
        pairs: Seeds per class of knobs, at least 4; 0 skips them, None takes 8.
        progress: Called with (finished, wanted) runs.

    Returns:
        The study as it is recorded; that of before if the same plan was concluded.

    Raises:
        UsageError: Too few seeds, or more pairs than seeds.
        StudyStopped: Ctrl-C; the same call goes on.
        ExecutorError: Fewer than two baseline runs completed.
    """
    plan = Plan.of(bench, seeds, pairs)
    study = bench.register(KIND, f"Noise of {bench.task.key}", asdict(plan))
    if study.result is None:
        wanted = _jobs(bench, plan)
        runs = await bench.runs([job for _, job in wanted], progress)
        made: dict[str, list[Run]] = {}
        for (part, _), run in zip(wanted, runs, strict=True):
            made.setdefault(part, []).append(run)
        found = _evaluate(bench, study, plan, made)
        stored = _STORED.dump_python(found, mode="json") | {"summary": summary(found)}
        study = bench.conclude(study, stored, [run.id for run in runs])
    return recorded(study)


def recorded(study: Study) -> NoiseStudy:
    """What a concluded noise study has found.

    Raises:
        UsageError: It has not been concluded, or is another kind of study.
    """
    if study.kind != KIND or study.result is None:
        raise UsageError(f"Study {study.id} is no concluded noise study.")
    return _STORED.validate_python({k: v for k, v in study.result.items() if k != "summary"})


def measure(
    folder: NotebookFolder,
    seeds: int,
    pairs: int | None = None,
    progress: Progress = silent,
    *,
    task: str = "pretrain",
    profile: str | None = None,
    device: str = "cpu",
    slots: int | None = None,
    secret_seed: int | None = None,
) -> NoiseStudy:
    """`calibrate` on a workbench in `folder`; see both for arguments and errors."""
    _check(seeds, min(PAIRS, seeds) if pairs is None else pairs)  # before anything is started

    async def work() -> NoiseStudy:
        async with workbench(
            folder,
            task=task,
            profile=profile,
            device=device,
            slots=slots,
            command="calibrate",
            secret_seed=secret_seed,
        ) as bench:
            return await calibrate(bench, seeds, pairs, progress)

    return asyncio.run(work())


def representatives(space: Space, task_key: str) -> dict[str, Variant]:
    """One small change per class (group) of knobs, by rule, from the knobs' own data.

    Of each group the first knob, in the order of the recipe, that the baseline may change: knobs
    with a range before those with choices, flags last. It moves by an eighth of its range on its
    own scale (at least 1 for whole numbers), away from the nearer end; a choice moves to the next.
    """
    found: dict[str, Variant] = {}
    names = sorted(space.knobs, key=lambda name: _rank(space, name))  # stable: recipe order
    for name in names:
        group = space.knobs[name].group or name
        if group not in found:
            try:
                one = space.variant(task_key, {name: _neighbour(space, name)})
            except InvalidVariant:  # the recipe refuses it with the baseline's other values
                continue
            if not one.is_baseline:
                found[group] = one
    order = list(dict.fromkeys(knob.group or name for name, knob in space.knobs.items()))
    return {group: found[group] for group in order if group in found}


def _rank(space: Space, name: str) -> int:
    if isinstance(space.default(name), bool):
        return 2
    return 1 if space.knobs[name].choices else 0


def _neighbour(space: Space, name: str) -> Scalar:
    """A value near the baseline's; the baseline's where a profile leaves no other."""
    knob, value = space.knobs[name], space.default(name)
    if isinstance(value, bool):
        return not value
    if knob.choices:
        place = knob.choices.index(value)
        near = place + 1 if place + 1 < len(knob.choices) else max(0, place - 1)
        return knob.choices[near]
    unit, low, high = space.unit(name, value), float(knob.low or 0.0), float(knob.high or 0.0)
    up = unit <= 0.5
    unit += STEP if up else -STEP
    moved = low * (high / low) ** unit if knob.log else low + unit * (high - low)
    if not isinstance(value, int):
        return float(f"{moved:.3g}")
    return max(round(moved), value + 1) if up else min(round(moved), value - 1)


def _check(seeds: int, pairs: int) -> None:
    if seeds < MIN_SEEDS:
        raise UsageError(f"--seeds {seeds}: an interval needs at least {MIN_SEEDS} seeds.")
    if pairs and pairs < noise.MIN_PAIRS:
        raise UsageError(
            f"--pairs {pairs}: a correlation's interval needs at least {noise.MIN_PAIRS} pairs; "
            "0 leaves the classes of knobs out."
        )
    if pairs > seeds:
        raise UsageError(
            f"--pairs {pairs} is more than --seeds {seeds}: pairs are made with the baseline's "
            f"seeds. Take --seeds {pairs}, or fewer pairs."
        )


def _jobs(bench: Workbench, plan: Plan) -> list[tuple[str, Job]]:
    """Every run with the part of the study it is for; what serves two parts is made once."""
    base = Variant(bench.task.key)
    jobs = [("total", Job(base, place)) for place in range(plan.seeds)]
    jobs += [("init", Job(base, place, data_position=0)) for place in range(plan.components)]
    jobs += [("data", Job(base, 0, data_position=place)) for place in range(plan.components)]
    jobs += [("jitter", Job(base, 0, repeat=again)) for again in range(plan.repeats)]
    for group, overrides in plan.changes.items():
        changed = bench.space.variant(bench.task.key, overrides)
        jobs += [(f"class {group}", Job(changed, place)) for place in range(plan.pairs)]
    return jobs


def _evaluate(
    bench: Workbench, study: Study, plan: Plan, made: Mapping[str, Sequence[Run]]
) -> NoiseStudy:
    task, total = bench.task, _scores(made["total"])
    if len(total) < 2:
        failed = next(run for run in made["total"] if run.score is None)
        raise ExecutorError(
            f"Only {len(total)} of {plan.seeds} runs of the baseline completed; there is no noise "
            f"to measure. Run {failed.id} {failed.outcome.value}: {failed.log_tail[-200:]}"
        )
    init, data = (_spread(_scores(made[part])) for part in ("init", "data"))
    plain = noise.spread(total)
    on_cpu = bench.executor.environment.device == "cpu"
    return NoiseStudy(
        study=study.id,
        task=task.key,
        tier=bench.scope.tier,
        metric=task.metric,
        unit=task.unit,
        budget=plan.budget,
        deterministic=on_cpu and task.budget.kind is not BudgetKind.SECONDS,
        scores=tuple(total),
        failed=plan.seeds - len(total),
        mean=fmean(total),
        total=noise.robust_spread(total),
        plain=plain,
        init=init,
        data=data,
        sum=noise.add_up(plain, init, data) if init and data else None,
        jitter=noise.jitter(_scores(made["jitter"])),
        classes=tuple(_class(group, bench, plan, made) for group in plan.changes),
    )


def _class(
    group: str, bench: Workbench, plan: Plan, made: Mapping[str, Sequence[Run]]
) -> ClassNoise:
    runs = made[f"class {group}"]
    return ClassNoise(
        group=group,
        change=bench.space.variant(bench.task.key, plan.changes[group]).describe(),
        failed=sum(run.score is None for run in runs),
        pairing=noise.pairing(_by_seed(made["total"]), _by_seed(runs), bench.task.direction.sign),
    )


def _scores(runs: Sequence[Run]) -> list[float]:
    return [run.score for run in runs if run.score is not None]


def _by_seed(runs: Sequence[Run]) -> dict[int, float | None]:
    return {run.seed: run.score for run in runs}


def _spread(scores: Sequence[float]) -> noise.Spread | None:
    return noise.spread(scores) if len(scores) > 1 else None
