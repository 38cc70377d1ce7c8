"""How the collective memory answers when it is large: time, rate and memory, beside the goals.

    python benchmarks/memory.py                              100,000 runs, 20,000 prose records
    python benchmarks/memory.py --runs 2000 --prose 400      a small one, in seconds
    python benchmarks/memory.py --ledger postgresql://me@127.0.0.1/lab

Builds a notebook with a realistic history (champions, claims with verdicts, hypotheses, insights,
the weight of real logs and curves) under all the rules of the database, keeps it in the temporary
folder, and measures in a fresh process: `society status` on a ledger that was just opened; the
survey of all roles after one more run; a proposal of the `search` brain; recall; the resident
memory of the process that did all this. A PostgreSQL database must be empty, or one of this
benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from sqlalchemy import Connection, Table, func, insert, select, update

from society.errors import InvalidVariant
from society.experiments import Space, load_task
from society.memory import rows, schema
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import Filter
from society.records import (
    Cost,
    Crown,
    Environment,
    Measurement,
    Noise,
    Outcome,
    Run,
    RunKind,
    Scope,
    SeedList,
    SocietyRecord,
    Variant,
)
from society.settings import Settings

TASK = ("pretrain", "cpu")
ENVIRONMENT = Environment(
    "cpu", "AVX512", 1, "3.11", {"torch": "2.13.0"}, "avx512f", "6d1b01865f54"
)
AGENTS = [f"a{number:02d}" for number in range(1, 9)]
NOISE_SD = 0.008
VERSION = 1
"""Raised when the notebook that is built changes: older ones are built again."""

CLAIMS, HYPOTHESES, INSIGHTS = 0.2, 0.3, 0.3
"""Shares of the prose records; verdicts are the rest."""
DAY0 = 1_700_000_000.0
_LIST = {
    RunKind.SCREENING: (SeedList.SCREENING, "validation"),
    RunKind.REPRODUCTION: (SeedList.SCREENING, "validation"),
    RunKind.CALIBRATION: (SeedList.VERIFICATION, "holdout"),
    RunKind.VERIFICATION: (SeedList.VERIFICATION, "holdout"),
}


# --------------------------------------------------------------------------- building


@dataclass(slots=True)
class _Made:
    """A finished run, as far as the builder needs it."""

    id: str
    agent: str
    variant: Variant
    score: float | None


@dataclass(slots=True)
class Builder:
    """Writes the history of a large society, era by era; each era ends with a new champion."""

    ledger: Ledger
    runs: int
    prose: int
    rng: random.Random = field(default_factory=lambda: random.Random(4))
    space: Space = field(init=False)
    scope: Scope = field(init=False)
    scope_number: int = 0
    society: str = ""
    champion: Variant = field(init=False)
    level: float = 1.6
    clock: float = DAY0
    seen: set[str] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)
    seeds: dict[SeedList, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look at the task."""
        task = load_task(*TASK)
        self.space = Space.of(task)
        self.scope = Scope(task.key, ENVIRONMENT.tier)
        self.champion = Variant(task.key)

    def build(self) -> None:
        """Write everything."""
        self._begin()
        claims = max(2, round(self.prose * CLAIMS))
        eras = max(2, min(40, claims // 4))
        verifying = round(claims * 2.05) + 22 * eras
        if self.runs < verifying + 10 * eras:
            raise SystemExit(f"Too few runs for {claims} claims: at least {verifying + 10 * eras}.")
        screening = self.runs - verifying - 21
        for era in range(eras):
            share = _share(era, eras)
            with self.ledger._db.write() as tx:
                self._era(tx, share(screening), share(claims), share, last=era == eras - 1)
        with self.ledger._db.write() as tx:
            made = tx.execute(select(func.count()).select_from(schema.runs)).scalar_one()
        self._finish(self.runs - made)

    def _begin(self) -> None:
        settings = Settings(task=TASK[0], profile=TASK[1], runs=2 * self.runs, seed=1)
        self.society = self.ledger.start_society(1, settings.model_dump(mode="json")).id
        sd = NOISE_SD
        self._commit(Crown(self.champion, None, None), Noise(*_key(self.scope), sd, sd, sd, 20))
        for which, count in ((SeedList.SCREENING, 1), (SeedList.VERIFICATION, 40)):
            self.seeds[which] = self.ledger.seeds(which, self.scope, count)
        self.seen.add(self.champion.fingerprint)
        with self.ledger._db.write() as tx:
            number = schema.scopes.c.number
            self.scope_number = tx.execute(select(func.max(number))).scalar_one()
            for name in ("variants", "claims", "verdicts", "hypotheses", "insights"):
                column = schema.metadata.tables[name].c.number
                self.counted[name] = tx.execute(select(func.max(column))).scalar() or 0
            self._run(tx, RunKind.SCREENING, [self.champion], [self.level])
            pool = [self.rng.gauss(self.level, NOISE_SD) for _ in range(20)]
            self._run(tx, RunKind.CALIBRATION, [self.champion] * 20, pool, range(20))

    def _commit(self, *entries: Any) -> None:
        key = f"benchmark/{len(self.counted)}/{self.clock}"
        self.ledger.commit(self.scope, self.society, AGENTS[0], entries, key=key)

    def _era(
        self, tx: Connection, screening: int, claims: int, share: Callable[[float], int], last: bool
    ) -> None:
        """Screen, claim the best, verify them; the very best becomes the champion."""
        variants = [self._variant() for _ in range(screening)]
        self._store(tx, variants)
        self._suppose(tx, variants, share(self.prose * HYPOTHESES))
        scores = [
            None if self.rng.random() < 0.06 else self.level + self.rng.gauss(0.03, 0.02)
            for _ in variants
        ]
        made = self._run(tx, RunKind.SCREENING, variants, scores)
        self._learn(tx, made, share(self.prose * INSIGHTS))
        self._act(tx, made)
        done = sorted((run for run in made if run.score is not None), key=_by_score)
        self._judge(tx, done[:claims], last)

    def _variant(self) -> Variant:
        """The champion with a few more changes; sometimes one change of the baseline alone."""
        while True:
            alone = self.rng.random() < 0.05
            overrides = {} if alone else dict(self.champion.overrides)
            changes = 1 if alone else self.rng.randint(1, 4)
            for name in self.rng.sample(sorted(self.space.knobs), changes):
                overrides[name] = self._draw(name)
            try:
                variant = self.space.variant(self.champion.task, overrides)
            except InvalidVariant:
                continue
            if variant.fingerprint not in self.seen:
                self.seen.add(variant.fingerprint)
                return variant

    def _draw(self, name: str) -> Any:
        knob, default = self.space.knobs[name], self.space.default(name)
        if isinstance(default, bool):
            return self.rng.random() < 0.5
        if knob.choices:
            return self.rng.choice(knob.choices)
        low, high, unit = float(knob.low or 0), float(knob.high or 0), self.rng.random()
        value = low * (high / low) ** unit if knob.log else low + (high - low) * unit
        return round(value) if isinstance(default, int) else float(f"{value:.3g}")

    def _store(self, tx: Connection, variants: Sequence[Variant]) -> None:
        _fill(tx, schema.variants, [
            {"number": self._next("variants"), **rows.variant_values(one)} for one in variants
        ])  # fmt: skip

    def _next(self, name: str) -> int:
        self.counted[name] += 1
        return self.counted[name]

    def _run(
        self,
        tx: Connection,
        kind: RunKind,
        variants: Sequence[Variant],
        scores: Sequence[float | None],
        places: Sequence[int] | None = None,
        claims: Sequence[tuple[str, str]] | None = None,
    ) -> list[_Made]:
        """Lease and finish runs; `claims` names each one's claim and the author to keep out."""
        first = 1 + (tx.execute(select(func.max(schema.leases.c.token))).scalar() or 0)
        leased, ended, made = [], [], []
        which, split = _LIST[kind]
        for index, (variant, score) in enumerate(zip(variants, scores, strict=True)):
            claim, author = claims[index] if claims else (None, None)
            agent = self.rng.choice([one for one in AGENTS if one != author])
            place = places[index] if places else 0
            self.clock += 1.0
            token = first + index
            shared = {
                "token": token, "scope": self.scope_number, "society": self.society,
                "kind": kind.value, "variant": variant.fingerprint,
                "seed": self.seeds[which][place], "split": split, "attempt": 1, "claim_id": claim,
                "idea": f"Model-based, on {token} results. {variant.describe()[:80]}",
            }  # fmt: skip
            subject = variant.fingerprint
            if kind is not RunKind.SCREENING:
                subject = f"{subject}:{which.value}:{place}:{kind.value}"
            leased.append({
                **shared, "run_id": f"r{token:05d}", "holder": agent, "subject": subject,
                "list": which.value, "position": place, "state": "living",
                "created_at": self.clock, "expires_at": self.clock + 1e9,
            })  # fmt: skip
            ended.append(shared | {"id": f"r{token:05d}", "agent": agent} | self._measured(score))
            made.append(_Made(f"r{token:05d}", agent, variant, score))
        _fill(tx, schema.leases, leased)
        _fill(tx, schema.runs, ended)
        return made

    def _measured(self, score: float | None) -> dict[str, Any]:
        curve = [4 - 2.4 * (step / 64) ** 0.3 + self.rng.gauss(0, 0.02) for step in range(64)]
        cost = Cost(30.1, 29.7, 0.0, 7.3e10, 30208, 59, 271_736_832, 28.4)
        failed = "diverged: Training diverged at step 59: loss 8.189 nats per token, at most 7.931."
        return {
            "budget_kind": "seconds", "budget_amount": 30.0,
            "outcome": Outcome.DIVERGED.value if score is None else Outcome.COMPLETED.value,
            "score": score, "cost": rows.dump(cost),
            "environment": rows.environment_text(ENVIRONMENT), "data_hash": "6d1b" * 16,
            "log_tail": failed if score is None else "", "curve": json.dumps(curve),
            "started_at": self.clock - 30, "finished_at": self.clock,
        }  # fmt: skip

    def _suppose(self, tx: Connection, variants: Sequence[Variant], count: int) -> None:
        """Hypotheses about variants that will be screened, which closes them."""
        found = []
        for variant in self.rng.sample(list(variants), min(count, len(variants))):
            number = self._next("hypotheses")
            found.append({
                "number": number, "id": f"h{number:04d}", "scope": self.scope_number,
                "society": self.society, "author": self.rng.choice(AGENTS),
                "statement": f"{variant.describe()} improves the champion.",
                "rationale": f"{next(iter(variant.overrides), 'it')} helped in "
                f"{self.rng.randint(3, 90)} of 100 runs, {self.rng.gauss(0.01, 0.004):+.4f} nats.",
                "variant": variant.fingerprint, "priority": self.rng.random(), "cost": 1.0,
                "state": "open", "posted_at": self.clock,
            })  # fmt: skip
        _fill(tx, schema.hypotheses, found)

    def _learn(self, tx: Connection, made: Sequence[_Made], count: int) -> None:
        found = []
        for _ in range(count):
            number, run = self._next("insights"), self.rng.choice(made)
            knob = self.rng.choice(sorted(self.space.knobs))
            word = self.rng.choice(["helps", "hurts", "does not matter", "diverges above"])
            text = (
                f"{knob} {word}: {self.rng.gauss(0, 0.01):+.4f} nats per token at "
                f"{self._draw(knob)}, by {self.rng.randint(4, 60)} runs."
            )
            found.append({
                "number": number, "id": f"i{number:04d}", "scope": self.scope_number,
                "society": self.society, "author": self.rng.choice(AGENTS), "text": text,
                "evidence": json.dumps([run.id]), "posted_at": self.clock,
            })  # fmt: skip
        _fill(tx, schema.insights, found)

    def _act(self, tx: Connection, made: Sequence[_Made]) -> None:
        _fill(tx, schema.activities, [
            {"society": self.society, "agent": run.agent, "role": role, "duty": duty,
             "subject": "", "started_at": self.clock, "ended_at": self.clock + 1, "note": run.id}
            for index, run in enumerate(made)
            for role, duty in [("experimenter", "propose"), ("meta-analyst", "digest")]
            if duty == "propose" or index % 20 == 0
        ])  # fmt: skip

    def _judge(self, tx: Connection, best: Sequence[_Made], last: bool) -> None:
        """File claims, verify them and give verdicts; in the last era a few stay open."""
        claims = {run.id: self._next("claims") for run in best}
        _fill(tx, schema.claims, [
            {"number": number, "id": f"c{number:04d}", "scope": self.scope_number,
             "society": self.society, "author": run.agent, "variant": run.variant.fingerprint,
             "reference": self.champion.fingerprint, "screening_run": run.id,
             "screening_delta": self.level - (run.score or 0.0), "family": number,
             "alpha": 0.01, "carried_log_e": 0.0, "filed_at": self.clock}
            for run, number in zip(best, claims.values(), strict=True)
        ])  # fmt: skip
        for index, run in enumerate(best):
            claim = f"c{claims[run.id]:04d}"
            if index == 0 and not last:
                self._crown(tx, run, claim)
                continue
            evidence = self._verify(tx, run, claim, range(2))
            if not last or index >= 4:
                self._decide(tx, claim, "rejected", evidence)

    def _verify(
        self, tx: Connection, run: _Made, claim: str, places: Sequence[int], gain: float = 0.0
    ) -> list[str]:
        scores = [self.rng.gauss(self.level - gain, NOISE_SD) for _ in places]
        by = [(claim, run.agent)] * len(places)
        made = self._run(tx, RunKind.VERIFICATION, [run.variant] * len(places), scores, places, by)
        return [one.id for one in made]

    def _crown(self, tx: Connection, run: _Made, claim: str) -> None:
        evidence = self._verify(tx, run, claim, range(8), gain=0.004)
        self._run(tx, RunKind.REPRODUCTION, [run.variant], [run.score], [0], [(claim, run.agent)])
        self._decide(tx, claim, "accepted", evidence)
        crowned = select(func.count()).select_from(schema.champions)
        _fill(tx, schema.champions, [{
            "scope": self.scope_number, "number": tx.execute(crowned).scalar_one(),
            "variant": run.variant.fingerprint, "claim_id": claim, "screening_run": run.id,
            "reverts": 0, "society": self.society, "since": self.clock,
        }])  # fmt: skip
        evidence += self._verify(tx, run, claim, range(8, 20), gain=0.004)
        self._decide(tx, claim, "confirmed", evidence)
        self.champion, self.level = run.variant, run.score or self.level

    def _decide(self, tx: Connection, claim: str, decision: str, evidence: Sequence[str]) -> None:
        number = self._next("verdicts")
        effect = {"mean": 0.004, "shrunken": 0.003, "low": -0.001, "high": 0.007, "seeds": 8}
        _fill(tx, schema.verdicts, [{
            "number": number, "claim_id": claim, "society": self.society, "decision": decision,
            "log_e": self.rng.gauss(0, 1), "effect": json.dumps(effect),
            "reason": f"{decision}: e = {math.exp(self.rng.gauss(0, 1)):.3g}", "judge": "a09",
            "decided_at": self.clock,
        }])  # fmt: skip
        _fill(tx, schema.verdict_runs, [
            {"verdict": number, "run_id": run, "place": place}
            for place, run in enumerate(evidence)
        ])  # fmt: skip

    def _finish(self, missing: int) -> None:
        """Screen until the number of runs is right, and leave a few hypotheses open."""
        with self.ledger._db.write() as tx:
            variants = [self._variant() for _ in range(max(0, missing))]
            self._store(tx, variants)
            scores = [self.level + self.rng.gauss(0.03, 0.02) for _ in variants]
            self._run(tx, RunKind.SCREENING, variants, scores)
            ideas = [self._variant() for _ in range(6)]
            self._store(tx, ideas)
            self._suppose(tx, ideas, len(ideas))
            alive = update(schema.counters).where(schema.counters.c.name == "version")
            tx.execute(alive.values(value=schema.counters.c.value + self.runs))


def _share(era: int, eras: int) -> Callable[[float], int]:
    """The era's part of a whole, so that the parts add up."""
    return lambda whole: round(whole * (era + 1) / eras) - round(whole * era / eras)


def _by_score(run: _Made) -> float:
    return run.score if run.score is not None else math.inf


def _key(scope: Scope) -> tuple[str, str]:
    return scope.task, scope.tier


def _fill(tx: Connection, table: Table, values: list[dict[str, Any]]) -> None:
    if values:
        tx.execute(insert(table), values)


def prepare(folder: Path, ledger: str | None, runs: int, prose: int) -> None:
    """Build the notebook, unless it is there."""
    notebook = NotebookFolder(folder)
    if ledger is not None:
        notebook.share(ledger=ledger, secret_seed=4)
    else:
        notebook.create()
    with Ledger.open(notebook.ledger, 4) as opened:
        made = sum(opened.counts(scope).runs[kind] for scope in opened.scopes() for kind in RunKind)
        if made >= runs:
            return
        if made:
            raise SystemExit(f"{folder} holds {made} runs, not {runs}: remove it, or empty it.")
        began = time.perf_counter()
        Builder(opened, runs, prose).build()
        print(f"Built {runs} runs in {time.perf_counter() - began:.0f} s.", flush=True)


# --------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    more_is_better: bool = False

    def __str__(self) -> str:
        """The value beside its goal."""
        found = f"{self.what:<44} {self.value:>10.4g} {self.unit:<10}"
        if self.goal is None:
            return found.rstrip()
        met = self.value > self.goal if self.more_is_better else self.value < self.goal
        sign = ">" if self.more_is_better else "<"
        return f"{found} {sign} {self.goal:g} {'met' if met else 'MISSED'}"


def timed(what: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    began = time.perf_counter()
    what()
    return 1e3 * (time.perf_counter() - began)


def spread(what: str, times: Sequence[float], goal: float | None) -> list[Figure]:
    """Median and 95th percentile; the goal is for the median."""
    late = sorted(times)[max(0, math.ceil(0.95 * len(times)) - 1)]
    return [
        Figure(f"{what}, median", statistics.median(times), "ms", goal),
        Figure(f"{what}, 95 %", late, "ms"),
    ]


def resident_mb() -> float:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss / 1e6


def status(folder: Path, repeats: int) -> list[Figure]:
    """What `society status` does, on a ledger that is opened anew each time."""
    from society.cli import _status
    from society.cli_common import opened

    def once() -> None:
        with opened(folder) as notebook:
            _status(notebook, folder)

    once()
    return spread("status, ledger opened anew", [timed(once) for _ in range(repeats)], 50)


def survey(lab: Any, repeats: int) -> list[Figure]:
    """A new view and the duties of all roles, after one more run was recorded."""
    from society.roles import load_role
    from society.settings import DEFAULT_ROLES

    cast = [load_role(name) for name in DEFAULT_ROLES]
    first = timed(lambda: lab.open_duties(cast, AGENTS[0]))
    times = []
    for _ in range(repeats):
        _one_more(lab)
        times.append(timed(lambda: lab.open_duties(cast, AGENTS[0])))
    figures = spread("survey after one more run", times, 50)
    return [Figure("first survey of a process", first, "ms"), *figures]


def _one_more(lab: Any) -> Run:
    """A screening run of something new, recorded as agents do it."""
    builder = Builder(lab.ledger, 0, 0, random.Random(time.time_ns()))
    builder.champion = lab.view().champion.variant
    variant = builder._variant()
    while variant.fingerprint in lab.view().board:
        variant = builder._variant()
    who = {"holder": AGENTS[0], "variant": variant, "ttl_s": 60.0}
    lease = lab.ledger.lease_screening(lab.scope, lab.record.id, **who)
    score = lab.view().champion_screening + 0.02
    found = Measurement(Outcome.COMPLETED, score, Cost(30.0, 29.0, flops=7e10))
    run: Run = lab.ledger.finish(lease, found, ENVIRONMENT, lab.task.budget)
    return run


def proposals(lab: Any, repeats: int) -> list[Figure]:
    """What the `search` brain takes to propose one variant, by its model or not."""
    times = []
    for turn in range(repeats):
        view = lab.view()
        times.append(timed(partial(_propose, lab, view)))
        if turn < repeats - 1:
            _one_more(lab)
    return spread("proposal of the search brain", times, None)


def _propose(lab: Any, view: Any) -> None:
    asyncio.run(lab.brain.propose(view.knowledge()))


def laboratory(ledger: Ledger) -> Any:
    """The society's workplace, without an executor."""
    from society.agents.brains import load_brain
    from society.agents.floor import Floor
    from society.agents.laboratory import Laboratory
    from society.roles import Charter

    record: SocietyRecord = ledger.societies()[0]
    task = load_task(*TASK)
    settings = Settings.model_validate(record.settings)
    return Laboratory(
        ledger=ledger, recall=None, executor=SimpleNamespace(slots=2, environment=ENVIRONMENT),
        task=task, space=Space.of(task), scope=Scope(task.key, ENVIRONMENT.tier),
        brain=load_brain("search"), settings=settings, record=record, floor=Floor(8),
        charter=Charter(), began=time.monotonic(),
    )  # fmt: skip


QUESTIONS = (
    "what do we know about warm-down?",
    "a larger batch with a higher learning rate",
    "depth=6 diverged",
    "does rotary attention help",
    "the best supported finding about the optimiser",
    "weight_decay=0.1 against 0.01",
)
FILTERS = (
    Filter(kinds=("insight",)),
    Filter(kinds=("run",), outcome="diverged"),
    Filter(knob="depth", outcome="better"),
    Filter(agent="a03"),
    Filter(since=DAY0 + 50_000, until=DAY0 + 60_000),
    Filter(kinds=("verdict",), outcome="confirmed"),
)


def recall(folder: Path, ledger: Ledger, repeats: int) -> Iterator[Figure]:
    """Build the index from the ledger, then search it; last, the memory of it all."""
    from society.memory.recall import Recall

    began = time.perf_counter()
    with Recall.rebuild(folder, ledger, at="embedded") as index:
        passages, seconds = len(index), time.perf_counter() - began
        yield Figure(f"reindex of {passages} passages", passages / seconds, "records/s", 500, True)
        index.search("warm up")
        rounds = max(1, repeats // len(QUESTIONS))
        asked = [f"{text} {turn}" for turn in range(rounds) for text in QUESTIONS]
        yield from spread("recall", [timed(partial(index.search, text)) for text in asked], 20)
        filtered = [
            timed(partial(index.search, text, where=where)) for text in asked for where in FILTERS
        ]
        yield from spread("recall with a filter", filtered, 150)
        gc.collect()
        yield Figure("memory of the owner", resident_mb(), "MB", 1500)


def measure(folder: Path, repeats: int, with_recall: bool) -> Iterator[Figure]:
    """Everything, in the order in which an owner's memory grows."""
    yield from status(folder, repeats)
    with Ledger.open(NotebookFolder(folder).ledger) as ledger:
        lab = laboratory(ledger)
        yield from survey(lab, repeats)
        yield Figure("first question of novelty", timed(lab.archive), "ms")
        yield from proposals(lab, min(repeats, 4))
        gc.collect()
        yield Figure("memory of the owner, without recall", resident_mb(), "MB", 1500)
        if with_recall:
            yield from recall(folder, ledger, repeats)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure in a fresh process, print."""
    options = _options().parse_args(arguments)
    name = f"society-memory-{VERSION}.{schema.SCHEMA_VERSION}-{options.runs}-{options.prose}"
    folder = options.folder or Path(tempfile.gettempdir()) / name
    if options.stage == "build":
        prepare(folder, options.ledger, options.runs, options.prose)
        return 0
    if options.stage == "measure":
        for figure in measure(folder, options.repeats, not options.no_recall):
            print(figure, flush=True)
        return 0
    told = sys.argv[1:] if arguments is None else list(arguments)
    again = [sys.executable, __file__, *told, "--folder", str(folder)]
    subprocess.run([*again, "--stage", "build"], check=True)
    size = f"{options.runs} runs, {options.prose} prose records, {options.ledger or 'SQLite'}"
    print(size, flush=True)
    subprocess.run([*again, "--stage", "measure"], check=True)
    if options.remove:
        shutil.rmtree(folder)
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time, rate and memory of a large notebook.")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--prose", type=int, default=20_000)
    parser.add_argument("--ledger", help="an empty PostgreSQL database instead of a SQLite file")
    parser.add_argument("--folder", type=Path, help="where the notebook is built and kept")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-recall", action="store_true", help="the ledger alone")
    parser.add_argument("--remove", action="store_true", help="remove the notebook at the end")
    parser.add_argument("--stage", choices=("build", "measure"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
