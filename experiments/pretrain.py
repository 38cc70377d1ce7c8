"""The reference workload: GPT pre-training, scored in validation bits per byte.

The work itself is `society.model`; this is how the society runs it. torch is imported in
`warm_up` and later, never with this module.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from society.errors import UsageError
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
from society.knobs import Knob
from society.model import data
from society.model.flops import flops_per_step
from society.model.recipe import Recipe
from society.records import Budget, Split

MODEL_FILE = "model.safetensors"


class Options(BaseModel):
    """This task has no settings of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pretrain:
    """The task `pretrain`: train a small GPT on `society.model`'s corpus."""

    name = "pretrain"
    metric = "val_bpb"
    unit = "BPB"
    direction = Direction.MINIMISE
    recipe = Recipe
    packages: tuple[str, ...] = ("torch", "numpy")

    def __init__(self, profile: str = "cpu") -> None:
        """Read the profile, by name or path; nothing else is touched."""
        settings = load_profile(self.name, profile)
        parse(Options, settings.options, profile)
        self.profile = settings.name
        self.key = f"{self.name}/{settings.name}"
        self.budget: Budget = settings.budget
        self.limits: Limits = settings.limits
        self.baseline = parse(Recipe, settings.recipe, profile)
        self._train: dict[int, data.TrainTokens] = {}
        self._eval: dict[tuple[int, Split], data.EvalTokens] = {}

    @property
    def vocabs(self) -> tuple[int, ...]:
        """Every vocabulary size that a variant may ask for."""
        knobs = [item for item in Recipe.model_fields["vocab"].metadata if isinstance(item, Knob)]
        choices = {int(size) for knob in knobs for size in knob.choices}
        return tuple(sorted(choices | {self.baseline.vocab}))

    def warm_up(self) -> None:
        """Import torch and the whole trainer; one thread from here on.

        Runs must find every module loaded: the code of a society does not change while it works.
        """
        from society.model import evaluate, train, weights  # noqa: F401
        from society.model.threads import single_thread

        single_thread()

    def prepare(self) -> str:
        """Tokenise every split for every vocabulary; cached, a few seconds the first time."""
        digest = hashlib.sha256()
        for vocab in self.vocabs:
            _fill_cache(vocab)
            digest.update(data.load_train(cache_dir(), vocab).data_hash.encode())
            for split in Split:
                digest.update(data.load_eval(cache_dir(), vocab, split).data_hash.encode())
        return digest.hexdigest()

    def preload(self, role: Role) -> None:
        """Load the train split, or both evaluation splits, in every vocabulary."""
        for vocab in self.vocabs:
            if role is Role.TRAINER:
                self._train[vocab] = data.load_train(cache_dir(), vocab)
                continue
            for split in Split:
                self._eval[vocab, split] = data.load_eval(cache_dir(), vocab, split)

    def train(
        self, recipe: Recipe, seed: int, budget: Budget, scratch: Path, device: str
    ) -> TrainReport:
        """Train one model and save it."""
        from society.model import train, weights

        try:
            trained = train.train(
                recipe, budget=budget, seed=seed, tokens=self._train[recipe.vocab], device=device
            )
        except train.Diverged as error:
            spent = TrainReport(
                flops=float(error.step * flops_per_step(recipe)),
                tokens=error.step * recipe.batch_tokens,
                steps=error.step,
            )
            raise Diverged(str(error), spent) from error
        weights.save(trained, scratch / MODEL_FILE)
        return TrainReport(trained.flops, trained.tokens, trained.steps, trained.curve)

    def score(self, scratch: Path, recipe: Recipe, split: Split, device: str) -> float:
        """Bits per byte of the saved model."""
        from society.model import evaluate, weights

        try:
            tokens = self._eval[recipe.vocab, split]
            return evaluate.evaluate(scratch / MODEL_FILE, tokens, device).bpb
        except (evaluate.BadScore, weights.BadWeights) as error:
            raise Refused(str(error)) from error


def _fill_cache(vocab: int) -> None:
    try:
        data.prepare(cache_dir(), vocab)
    except OSError as error:
        raise UsageError(
            f"The cache folder {cache_dir()} cannot be used: {error.strerror}. "
            "Name another one in SOCIETY_CACHE."
        ) from error
