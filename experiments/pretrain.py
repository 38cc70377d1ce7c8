"""The reference workload: GPT pre-training, scored in validation bits per byte.

The work itself is `society.model`; this is how the society runs it. torch is imported in
`warm_up` and later, never with this module.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from society.experiments.adopt import adopt, remember
from society.experiments.task import (
    Access,
    Channel,
    Direction,
    Diverged,
    Limits,
    Refused,
    Role,
    TrainReport,
    Yardstick,
    cache_dir,
    load_profile,
    parse,
)
from society.knobs import Knob, Span
from society.model import advice, data
from society.model.device import Execution, is_out_of_memory, limit_memory
from society.model.flops import flops_per_step, planned_steps
from society.model.pipeline import NoRows
from society.model.recipe import Recipe
from society.records import Budget, BudgetKind, Split

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MODEL_FILE = "model.safetensors"
PACKAGE = "society.model"
EDITABLE = ("attention", "gpt", "init", "optim", "schedule")
"""Modules of the trainer that a patch may change."""
SAMPLE_STEPS = 8
LIKENESS = 0.5
"""Correlation of two seeds' parameters that counts as too much in common."""
TIMED_STEPS = 3
"""Steps that are timed to know what a training takes."""
MOST_STEPS_PER_S = 1_000
"""More than any recipe takes: the bound on what a run may report under a budget in seconds."""
BF16_MAGNITUDE, BF16_INFINITY = 0x7FFF, 0x7F80
"""The bits of a bf16 but for its sign; what is not finite has none below those of infinity."""
COMPILE_S = 60.0
"""What compiling is assumed to take on an accelerator; it is not measured before each run."""


class Options(BaseModel):
    """Settings of this task in a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str = data.KJV
    """Name of a prepared corpus, see `society data list`."""
    eval_tokens: NonNegativeInt = 0
    """Targets scored in best-fit rows, as the public benchmark does; 0 for the default text."""
    eval_seq_len: PositiveInt = 2_048
    """Tokens of such a row."""
    attention: Literal["auto", "flex", "sdpa", "flash", "matmul"] = "auto"
    """Kernel of the attention on an accelerator; `auto` measures which is the fastest."""
    compiler: str = "auto"
    """`auto`: torch.compile on an accelerator only; `off`; or the name of a compiler backend."""
    micro_rows: NonNegativeInt = 0
    """Rows of a batch computed at once; 0 for as many as fit."""


class Pretrain:
    """The task `pretrain`: train a small GPT on a prepared corpus."""

    name = "pretrain"
    metric = "val_bpb"
    unit = "BPB"
    direction = Direction.MINIMISE
    recipe = Recipe
    packages: tuple[str, ...] = ("torch", "numpy")
    code: tuple[str, ...] = ("society.model", "society.experiments.pretrain")

    def __init__(self, profile: str = "cpu") -> None:
        """Read the profile, by name or path; nothing else is touched."""
        settings = load_profile(self.name, profile)
        self.options = parse(Options, settings.options, profile)
        self.profile = settings.name
        self.key = f"{self.name}/{settings.name}"
        self.budget: Budget = settings.budget
        self.limits: Limits = settings.limits
        self.baseline = parse(Recipe, settings.recipe, profile)
        self.spans: Mapping[str, Span] = settings.knobs
        self._train: dict[int, data.TrainTokens] = {}
        self._eval: dict[tuple[int, Split], data.EvalTokens] = {}
        self._own: Yardstick | None = None
        self._adopted: frozenset[str] = frozenset()
        self._sampled: Mapping[str, Tensor] | None = None

    @property
    def access(self) -> Access:
        """Nothing: a run finds its split in memory. What the splits are made of is hidden."""
        return Access(hidden=_corpus_sources())

    @property
    def vocabs(self) -> tuple[int, ...]:
        """Every vocabulary size that a variant may ask for."""
        knobs = [item for item in Recipe.model_fields["vocab"].metadata if isinstance(item, Knob)]
        if "vocab" in self.spans:
            knobs = [knob.within(self.spans["vocab"]) for knob in knobs]
        choices = {int(size) for knob in knobs for size in knob.choices}
        return tuple(sorted(choices | {self.baseline.vocab}))

    @property
    def prepared_vocabs(self) -> tuple[int, ...]:
        """Those that the corpus can be had in; one that is not prepared is refused as a variant.

        The baseline's is always among them, and all are for the corpus that comes with the project.
        """
        if self.options.corpus == data.KJV:
            return self.vocabs
        ready = {one.vocab for one in data.prepared(cache_dir()) if one.name == self.options.corpus}
        return tuple(v for v in self.vocabs if v in ready or v == self.baseline.vocab)

    def warm_up(self) -> None:
        """Import torch and the whole trainer; one thread from here on.

        Runs must find every module loaded: the code of a society does not change while it works.
        """
        from society.model import evaluate, guard, train, weights, yardstick  # noqa: F401
        from society.model.threads import keep_pages, single_thread

        single_thread()
        keep_pages()
        remember(PACKAGE, EDITABLE)
        self.sources()

    def prepare(self) -> str:
        """Check the corpus in every vocabulary; the one that comes with the project is made.

        That takes a few seconds the first time; a large corpus is read once, about a second per
        gigabyte.
        """
        digest = hashlib.sha256()
        for vocab in self.prepared_vocabs:
            corpus = data.prepare(cache_dir(), vocab, self.options.corpus)
            digest.update(corpus.about()["sha256"].encode())
        return digest.hexdigest()

    def preload(self, role: Role) -> None:
        """Load the train split, or both evaluation splits, in every vocabulary."""
        cache, corpus = cache_dir(), self.options.corpus
        for vocab in self.prepared_vocabs:
            if role is Role.TRAINER:
                self._train[vocab] = data.load_train(cache, vocab, corpus)
                continue
            for split in Split:
                self._eval[vocab, split] = data.load_eval(cache, vocab, split, corpus)

    def train(
        self,
        recipe: Recipe,
        seed: int,
        budget: Budget,
        scratch: Path,
        device: str,
        *,
        data_seed: int | None = None,
    ) -> TrainReport:
        """Train one model and save it."""
        from society.model import kernels, train, weights

        if recipe.vocab not in self._train:
            corpus = data.corpus_at(cache_dir(), recipe.vocab, self.options.corpus)
            raise Refused(f"vocab={recipe.vocab}: {data.missing(corpus)}")
        if device != "cpu" and self.limits.mem_bytes:
            limit_memory(device, self.limits.mem_bytes)
        try:
            with self._memory_explained(recipe, device):
                step_flops = self._step_flops(recipe, device)
                trained = train.train(
                    recipe,
                    budget=budget,
                    seed=seed,
                    tokens=self._train[recipe.vocab],
                    device=device,
                    data_seed=data_seed,
                    execution=self.execution_in(scratch),
                    step_flops=step_flops,
                )
        except (NoRows, train.BadTokens, kernels.UnusableShape) as error:
            raise Refused(str(error)) from error
        except train.Diverged as error:
            spent = TrainReport(
                flops=float(error.step * flops_per_step(recipe)),
                tokens=error.step * recipe.batch_tokens,
                steps=error.step,
            )
            advised = f"{error.facts} {advice.divergence(recipe, self.baseline)}"
            raise Diverged(advised, spent) from error
        weights.save(trained, scratch / MODEL_FILE)
        return TrainReport(
            trained.flops,
            trained.tokens,
            trained.steps,
            trained.curve,
            train_s=trained.train_s,
            compile_s=trained.compile_s,
            mfu=trained.mfu,
            device_mem_bytes=trained.device_mem_bytes,
            step_flops=step_flops or 0.0,
        )

    def execution_in(self, scratch: Path) -> Execution:
        """How this profile uses a device. What changed code compiles is kept in its own folder."""
        options = self.options
        return Execution(
            options.attention,
            options.compiler,
            options.micro_rows,
            scratch / "cache" if self._adopted else cache_dir(),
            fused="optim" not in self._adopted,
        )

    @contextmanager
    def _memory_explained(self, recipe: Recipe, device: str) -> Iterator[None]:
        """Name the knobs when an allocation fails."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            rows = self.options.micro_rows or (None if device == "cpu" else 1)
            advised = advice.memory(recipe, self.baseline, rows, scores=device == "cpu")
        else:
            return
        raise MemoryError(advised)  # outside: what the failed run held can be freed

    def score(self, scratch: Path, recipe: Recipe, split: Split, device: str) -> float:
        """Bits per byte of the saved model."""
        from society.model import evaluate, weights

        try:
            tokens = self._eval[recipe.vocab, split]
            scoring = evaluate.Scoring(self.options.eval_tokens, self.options.eval_seq_len)
            with self._memory_explained(recipe, device):
                return evaluate.evaluate(scratch / MODEL_FILE, tokens, device, scoring).bpb
        except (evaluate.BadScore, weights.BadWeights) as error:
            raise Refused(str(error)) from error

    # ----------------------------------------------------------------- runs with changed code

    def sources(self) -> Mapping[str, str]:
        """The files of the model, its initialisation, optimiser and schedule, as installed."""
        return _sources()

    def adopt(self, code: Path, own: Yardstick | None = None) -> None:
        """Use the files in `code`; everything that trains or serves from now on is theirs."""
        installed = self.sources()
        given = {path.name: path.read_text("utf-8") for path in code.glob("*.py")}
        changed = (name for name, text in given.items() if installed.get(name) != text)
        self._adopted = frozenset(Path(name).stem for name in changed)
        self._own = own
        self._sampled = None
        adopt(PACKAGE, code)

    def measure(self, recipe: Recipe, budget: Budget, device: str) -> Yardstick:
        """Time and count a few steps of the shipped code on random tokens.

        About 8 % of a default run. No processor time is named (0) on an accelerator, whose own work
        it does not show: there the harness's clock bounds the run, as it does for every budget in
        seconds.
        """
        from society.model.yardstick import Bench

        bench = Bench(recipe, device)
        step_flops = bench.flops()
        planned = planned_steps(recipe, budget)
        steps = planned or max(1, int(budget.amount * MOST_STEPS_PER_S))
        cpu_s = 0.0
        if device == "cpu":
            cpu_s = steps * bench.cpu_s(min(steps, TIMED_STEPS)) if planned else budget.amount
        return Yardstick(
            cpu_s=cpu_s,
            steps=steps,
            tokens=steps * recipe.batch_tokens,
            flops=float(steps * flops_per_step(recipe)) if planned else 0.0,
            compile_s=0.0 if device == "cpu" or self.options.compiler == "off" else COMPILE_S,
            step_flops=step_flops,
        )

    def answering_s(self, recipe: Recipe, split: Split, device: str) -> float:
        """Processor seconds in which the shipped code answers all of `judge`'s questions.

        Of a few batches, with parameters as they are before training. 0 on an accelerator, as in
        `measure`.
        """
        from society.model import evaluate, guard
        from society.model.init import initial_weights

        if device != "cpu":
            return 0.0
        scoring = evaluate.Scoring(self.options.eval_tokens, self.options.eval_seq_len)
        rows = evaluate.scored_rows(recipe, self._eval[recipe.vocab, split], scoring).blocks
        answer, _ = evaluate.model_of(recipe, initial_weights(recipe, 0), device)
        block = rows[: evaluate.BATCH_TOKENS[device] // recipe.seq_len or 1, :-1].astype("int64")
        answer(block)
        started = time.process_time()
        for _ in range(TIMED_STEPS):
            answer(block)
        each = (time.process_time() - started) / (TIMED_STEPS * len(block))
        return max(len(rows), guard.PROBES) * each

    def _step_flops(self, recipe: Recipe, device: str) -> float | None:
        """FLOPs that a step of changed code is charged with; None for the recipe's own.

        The formula of the recipe, times what the changed code multiplies relative to the shipped
        code. Dearer code takes fewer steps; cheaper code takes no more than the recipe does, or
        hiding work from the count would pay.
        """
        from society.model.yardstick import Bench

        if self._own is None:
            return None
        least = flops_per_step(recipe)
        if self._own.charged_flops:
            return max(least, self._own.charged_flops)
        return least * max(1.0, Bench(recipe, device).flops() / self._own.step_flops)

    def sample(self, recipe: Recipe, seed: int, scratch: Path, device: str) -> str:
        """Train for eight steps; the sha256 of the weights, or where it diverged."""
        from society.model import train

        try:
            trained = train.train(
                recipe,
                budget=Budget(BudgetKind.STEPS, SAMPLE_STEPS),
                seed=seed,
                data_seed=0,
                tokens=self._train[recipe.vocab],
                device=device,
                execution=self.execution_in(scratch),
            )
        except train.Diverged as error:
            return f"diverged at step {error.step} with loss {error.loss.hex()}"
        self._compare_seeds(trained.weights)
        digest = hashlib.sha256()
        for name, weight in sorted(trained.weights.items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _compare_seeds(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse changed code whose parameters do not come from the seed.

        Two samples differ by their seed only. With the shipped code their parameters correlate by
        .2 at most; more in common was drawn from elsewhere.
        """
        last, self._sampled = self._sampled, weights
        if last is None or not self._adopted:
            return
        self._sampled = None
        alike = {name: _correlation(last[name], w) for name, w in weights.items() if name in last}
        name = max(alike, key=lambda name: alike[name])
        if alike[name] > LIKENESS:
            raise Refused(
                f"Two seeds give parameters that are alike (correlation {alike[name]:.2f} in "
                f"{name!r}): the initial parameters must come from the seed."
            )

    def serve(self, scratch: Path, recipe: Recipe, device: str, scorer: Channel) -> None:
        """Answer token ids (B, T) with final activations (B * T, width), bf16 as int16."""
        import torch

        from society.model import evaluate, weights

        masters = weights.load_changed(scratch / MODEL_FILE, recipe)
        answer, _ = evaluate.model_of(recipe, masters, device)
        while (ids := scorer.receive()) is not None:
            scorer.send(answer(ids).to(torch.bfloat16).view(torch.int16).cpu().numpy())

    def judge(
        self,
        scratch: Path,
        recipe: Recipe,
        split: Split,
        device: str,
        models: tuple[Channel, Channel],
    ) -> float:
        """Bits per byte of a served model, if it is honest; see `society.model.guard`."""
        from society.model import evaluate, guard, weights

        scoring = evaluate.Scoring(self.options.eval_tokens, self.options.eval_seq_len)
        first, second = (partial(_asked, recipe, device, model) for model in models)
        try:
            return guard.judge(
                scratch / MODEL_FILE,
                recipe,
                self._eval[recipe.vocab, split],
                device,
                scoring,
                (first, second),
            ).bpb
        except (evaluate.BadScore, weights.BadWeights, guard.Dishonest) as error:
            raise Refused(str(error)) from error


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of the entries of two tensors; 0 for scalars, other shapes and what does not vary."""
    if a.ndim < 2 or a.shape != b.shape:
        return 0.0
    left, right = (x.double().flatten() - x.double().mean() for x in (a, b))
    scale = float(left.norm() * right.norm())
    return float(left @ right) / scale if scale else 0.0


def _asked(recipe: Recipe, device: str, model: Channel, ids: np.ndarray) -> Tensor:
    """A served model's answer to token ids (B, T): activations (B * T, width), bf16, finite."""
    import torch

    model.send(ids)
    wanted = (ids.size, recipe.width)
    answer = model.receive(2 * ids.size * recipe.width)
    if answer is None:
        raise Refused("the model left before it was asked everything")
    if answer.shape != wanted or answer.dtype.name != "int16":
        raise Refused(
            f"the model answered with {answer.dtype} of shape {answer.shape}; expected int16 (the "
            f"bits of bf16) of shape {wanted}"
        )
    if int((answer & BF16_MAGNITUDE).max()) >= BF16_INFINITY:
        raise Refused("the model's activations are not finite")
    return torch.from_numpy(answer).view(torch.bfloat16).to(device)


@cache
def _sources() -> Mapping[str, str]:
    folder = resources.files(PACKAGE)
    return {f"{name}.py": (folder / f"{name}.py").read_text("utf-8") for name in EDITABLE}


@cache
def _corpus_sources() -> tuple[Path, ...]:
    """Where the text of the corpus that comes with the project is installed, all splits of it."""
    package = find_spec("bible")  # finds it without importing it
    places = package.submodule_search_locations if package is not None else None
    return tuple(Path(place) for place in places or ())
