"""The reference workload: GPT pre-training, scored in validation bits per byte.

The work itself is `society.model`; this is how the society runs it. torch is imported in
`warm_up` and later, never with this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from society.experiments.task import (
    Direction,
    Diverged,
    Limits,
    Refused,
    Role,
    TrainReport,
    cache_dir,
    load_profile,
    parse,
)
from society.knobs import Knob, Span
from society.model import advice, data
from society.model.device import Execution, is_out_of_memory, limit_memory
from society.model.flops import flops_per_step
from society.model.pipeline import NoRows
from society.model.recipe import Recipe
from society.records import Budget, Split

MODEL_FILE = "model.safetensors"


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
        from society.model import evaluate, train, weights  # noqa: F401
        from society.model.threads import keep_pages, single_thread

        single_thread()
        keep_pages()

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
                trained = train.train(
                    recipe,
                    budget=budget,
                    seed=seed,
                    tokens=self._train[recipe.vocab],
                    device=device,
                    data_seed=data_seed,
                    execution=self.execution,
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
        )

    @property
    def execution(self) -> Execution:
        """How this profile uses a device."""
        options = self.options
        return Execution(options.attention, options.compiler, options.micro_rows, cache_dir())

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
