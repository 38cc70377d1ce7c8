"""Is it a language model? Questions that a model of unknown code must answer like an honest one.

The code is a stranger's; all that is taken from it are final activations. Head, soft cap, softmax,
targets and the sum are ours (`evaluate.summed_nats`), so every prediction is a distribution. What
is left to cheat with is *what the activations depend on*. An honest answer at position p of a row
depends on the row's tokens up to p, and on nothing else. The first model answers the text that is
scored, and so it sees, in the same call, every token that it is supposed to predict.

A second model, a fresh process of the same code that knows nothing of the first, is asked about the
same rows. Each is cut at a secret position: what follows is replaced, and other rows keep it
company in the batch. It is never shown how a row really goes on. Where it answers other than the
first one at or before the cut, the first one used what it must not know: what follows, the other
rows, or what it was asked before. A model that behaves while it is probed only makes the difference
larger: the question is whether an answer *can be had* without that knowledge.

    what is asked      up to `PROBES` rows, drawn by a secret seed among those scored, one cut each:
                       `TARGETED` cuts where the first model was most surprisingly right (log of its
                       probability over the token's share of the text), the others uniform
    what is compared   every position up to the cut, bit by bit; where bits differ, the whole
                       distribution and the gain at the true next token
    what replaces      the text that follows another occurrence of the cut's token, in the part of
                       a row that the second model is shown anyway; its first token is never the
                       true one. Nothing of it comes from the first model, which could leave a
                       message in it
    and some twice     a last batch is filled up with rows it was asked before: the same question
                       must get the same answer

Memory gains nothing: the first model is asked each row once, in the order of the text, and what it
remembers of earlier rows is an advantage that the second one, asked in another order and about less
text, cannot reproduce; the second one sees no continuation that it could remember. The exception is
a row cut close to its end, whose next row would show how it goes on: that row is not asked.

Power. A cheat that shows at a share r of all positions, and depends on what follows, survives n
uniform cuts with probability (1 - r)^n: with the default 112 of them 1 % is caught in 68 % of the
runs, 2 % in 90 %, 4 % in 99 %, and in every further run of the same variant again (a claim is
accepted after several). If it is worth something per position it is caught at once: it is among
the targeted. One that depends on other rows, on order, or on batch statistics shows at any of the
positions up to the cuts, thousands of them.

Tolerance. On a CPU one thread gives the same bits for a row wherever it lies in a batch of the same
size, so questions are asked in batches of the size in which the first model was asked the row. See
`TOLERANCES` for what is measured and what is allowed beyond.

Cost. The second model's answers are at most `PROBES` rows without the head: at the default size
half as many as are scored, 3 % of a run, and two fresh processes cost as much again and a little
(`benchmarks/guard.py`). On an accelerator, by calculation and not measured: 128 rows of 2,048
tokens beside the 20 million that the public benchmark scores are 1.3 % of the scoring's forward
passes, which are a few seconds of a 300 s run: below 0.1 % of it. The yardstick's and the counted
step are of one row each. What is left is starting two more processes on the device, some seconds:
1 to 2 %.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from society.errors import SocietyError
from society.model import evaluate, gpt
from society.model.data import EvalTokens
from society.model.evaluate import Answer, Bpb, Rows, Scoring
from society.model.recipe import Recipe
from society.model.weights import load_changed

PROBES = 128
"""Rows that the second model is asked about, at most."""
TARGETED = 16
"""Cuts where the first model did surprisingly well, at most an eighth of all."""
CLOSE = 8
"""A row that is cut so close to its end, in tokens, goes on in the next row."""
COMPARED = 512
"""Positions whose distributions are computed, where bits differ."""


class Dishonest(SocietyError):
    """A model's answers depend on what they must not depend on."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two answers to the same question may be apart, in nats."""

    distribution: float
    """Largest difference of any log-probability at one position."""
    gain: float
    """Mean difference at the true next token over all cuts, in favour of the first answers."""


TOLERANCES = {"cpu": Tolerance(0.02, 0.0005), "cuda": Tolerance(0.25, 0.002)}
"""By the kind of device. Honest models on one CPU thread: no bit differs (measured). On an
accelerator the same kernel runs on the same shape, and equal bits are expected too; the allowance
is for kernels that split their sums by load, at bf16's precision."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the first model answered about the rows that may be probed."""

    rows: np.ndarray
    """Their numbers, ascending."""
    x: Tensor
    """Final activations, (rows, T, width), on the host."""
    nats: np.ndarray
    """Cross-entropy of each target, (rows, T)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One row and where it is cut."""

    place: int
    """Place in `Held`."""
    row: int
    """Number among the scored rows."""
    cut: int
    """Last position that is shown; its target is the first one that is not."""


def judge(
    path: Path,
    recipe: Recipe,
    tokens: EvalTokens,
    device: str,
    scoring: Scoring,
    models: tuple[Answer, Answer],
    rng: np.random.Generator | None = None,
) -> Bpb:
    """Score a model by its answers, and find out whether they were honest.

    For unchanged code the score has the bits of `evaluate.evaluate`.

    Args:
        path: The saved model; only its head is used, all of it is checked.
        recipe: What was to be trained, by the harness's own record.
        tokens: The split in the model's vocabulary.
        device: A torch device: where the head is computed.
        scoring: Which text is scored.
        models: Two processes of the same code and weights.
        rng: Where and how it is probed; by default from the system's own randomness.

    Raises:
        BadWeights: The file is not a usable model.
        BadScore: The vocabularies differ, or the score is impossible.
        Dishonest: The answers depend on what they must not.
    """
    rng = rng or np.random.default_rng(int.from_bytes(os.urandom(16)))
    evaluate.check_tokens(path, recipe, tokens)
    head = _head(path, recipe, device)
    rows = evaluate.scored_rows(recipe, tokens, scoring)
    memory = _Memory(rows, rng)
    nats = evaluate.summed_nats(recipe, head, rows, models[0], memory.see)
    score = evaluate.scored(path, tokens, rows, nats)
    _Examination(recipe, head, rows, memory.held(), models[1], rng).sit(_shares(tokens))
    return score


def _head(path: Path, recipe: Recipe, device: str) -> Tensor:
    """The output table in the working type."""
    masters = {"head": load_changed(path, recipe)["head"].to(device)}
    return gpt.working_copy(masters, grad=False)["head"]


def _shares(tokens: EvalTokens) -> np.ndarray:
    """How often each token occurs in the split: what is known without any context, (vocab,)."""
    counts: np.ndarray = np.bincount(tokens.tokens, minlength=tokens.vocab) + 1.0
    return counts / float(counts.sum())


class _Memory:
    """Keeps the first model's answers about a secret sample of rows, in the order of the text."""

    def __init__(self, rows: Rows, rng: np.random.Generator) -> None:
        usable = np.flatnonzero(rows.apart)
        count = min(PROBES, len(usable))
        self._chosen = np.sort(rng.choice(usable, count, replace=False))
        self._length = rows.counted.shape[1]
        self._x: list[Tensor] = []
        self._nats: list[np.ndarray] = []

    def see(self, part: slice, x: Tensor, nats: Tensor) -> None:
        """Keep what belongs to the sample."""
        inside = self._chosen[(self._chosen >= part.start) & (self._chosen < part.stop)]
        if len(inside):
            at = torch.from_numpy(inside - part.start)
            whole = x.view(-1, self._length, x.shape[-1])
            self._x.append(whole[at.to(x.device)].cpu())
            self._nats.append(nats.view(-1, self._length)[at.to(x.device)].cpu().numpy())

    def held(self) -> Held:
        """All of it."""
        return Held(self._chosen, torch.cat(self._x), np.concatenate(self._nats))


class _Examination:
    """The second model's part."""

    def __init__(
        self,
        recipe: Recipe,
        head: Tensor,
        rows: Rows,
        held: Held,
        model: Answer,
        rng: np.random.Generator,
    ) -> None:
        self._recipe, self._head, self._rows, self._held = recipe, head, rows, held
        self._model, self._rng = model, rng
        self._batch = evaluate.batch_rows(recipe, head.device)
        self._tolerance = TOLERANCES[head.device.type]

    def sit(self, shares: np.ndarray) -> None:
        """Ask, compare, and raise `Dishonest` where the answers differ."""
        probes = self._probes(shares)
        questions = self._questions(probes)
        differences = _Differences(self._recipe, self._head, self._rows)
        answers: dict[int, Tensor] = {}
        for batch in self._batches(probes):
            x = self._asked(questions[batch])
            for number, answer in zip(batch, x, strict=True):
                if number in answers and self._apart(answers[number], answer):
                    raise Dishonest(
                        "The model does not answer the same question twice in the same way: its "
                        "answers depend on the other rows of a batch, on what it was asked before, "
                        "or on chance."
                    )
                answers.setdefault(int(number), answer)
        for number, probe in enumerate(probes):
            differences.add(probe, self._held.x[probe.place], answers[number])
        if problem := differences.problem(len(probes), self._tolerance):
            raise Dishonest(f"{problem} {self._cause(probes, differences)}")

    def _apart(self, one: Tensor, other: Tensor) -> bool:
        """Whether two answers (T, width) to the same row differ by more than rounding."""
        places = torch.nonzero((one != other).any(-1)).flatten()[:COMPARED]
        return bool(len(places)) and bool(
            _distances(self._recipe, self._head, one[places], other[places]).max()
            > self._tolerance.distribution
        )

    # ---------------------------------------------------------------------------- questions

    def _probes(self, shares: np.ndarray) -> list[Probe]:
        """Where each row is cut; rows that would show how another one goes on are left out."""
        held, length = self._held, self._recipe.seq_len
        cuts = self._rng.integers(length, size=len(held.rows))
        targets = self._rows.blocks[held.rows, 1:]
        surprise = np.where(
            self._rows.counted[held.rows], -held.nats - np.log(shares[targets]), -np.inf
        )
        best = np.argsort(-surprise.max(1), kind="stable")[: min(TARGETED, len(cuts) // 8 or 1)]
        cuts[best] = surprise[best].argmax(1)
        probes: list[Probe] = []
        for place, (row, cut) in enumerate(zip(held.rows, cuts, strict=True)):
            before = probes[-1] if probes else None
            if before and before.row == row - 1 and before.cut >= length - CLOSE:
                continue
            probes.append(Probe(place, int(row), int(cut)))
        return probes

    def _questions(self, probes: list[Probe]) -> np.ndarray:
        """Token ids, (probes, T): each row up to its cut, and then as another text goes on."""
        shown = [self._rows.blocks[probe.row, : probe.cut + 1] for probe in probes]
        pool = np.concatenate(shown).astype(np.int64)
        questions = self._rows.blocks[[probe.row for probe in probes], :-1].astype(np.int64)
        for question, probe in zip(questions, probes, strict=True):
            after = question[probe.cut + 1 :]
            after[:] = self._elsewhere(pool, probe, len(after))
        return questions

    def _elsewhere(self, pool: np.ndarray, probe: Probe, count: int) -> np.ndarray:
        """A plausible continuation of a row that is not its own, (count,)."""
        token, truth = self._rows.blocks[probe.row, probe.cut : probe.cut + 2]
        follows = np.roll(pool, -1)
        same = np.flatnonzero((pool == token) & (follows != truth))
        other = np.flatnonzero(follows != truth)
        usable = same if len(same) else other
        if not len(usable):  # a text of one token: any other one will do
            return np.full(count, (int(truth) + 1) % self._recipe.vocab)
        start = int(self._rng.choice(usable)) + 1
        return pool[(start + np.arange(count)) % len(pool)]

    def _batches(self, probes: list[Probe]) -> Iterator[np.ndarray]:
        """Numbers of the probes that are asked together, in batches as the first model's.

        Its last batch may have been smaller: rows of it are asked in one of that size again. Rows
        that fill a batch up are asked for the second time.
        """
        total = len(self._rows.blocks)
        rest = total % self._batch
        last = [n for n, probe in enumerate(probes) if probe.row >= total - rest]
        whole = [n for n in range(len(probes)) if n not in set(last)]
        for numbers, size in ((whole, self._batch), (last, rest)):
            order = self._rng.permutation(np.asarray(numbers, dtype=np.int64))
            for start in range(0, len(order), size or 1):
                yield self._filled(order[start : start + size], order, size, len(probes))

    def _filled(self, batch: np.ndarray, order: np.ndarray, size: int, probes: int) -> np.ndarray:
        """A batch of the size, with others of the same kind or, if there are none, of any."""
        others = order[~np.isin(order, batch)]
        if not len(others):
            others = np.setdiff1d(np.arange(probes), batch)
        if not len(others):
            others = batch
        return np.concatenate([batch, self._rng.choice(others, size - len(batch))])

    def _asked(self, ids: np.ndarray) -> Tensor:
        """The second model's answers, on the host: (B, T) -> (B, T, width)."""
        x = self._model(np.ascontiguousarray(ids))
        return x.view(*ids.shape, -1).cpu()

    # -------------------------------------------------------------------------------- causes

    def _cause(self, probes: list[Probe], differences: _Differences) -> str:
        """Which rule was broken: by asking the worst row once more, as it really goes on."""
        worst = probes[differences.worst]
        ids = self._rows.blocks[[probe.row for probe in probes], :-1].astype(np.int64)
        order = np.concatenate([[differences.worst], self._rng.permutation(len(probes))])
        whole = self._asked(ids[np.resize(order, self._batch)])[0]
        if self._apart(whole[: worst.cut + 1], self._held.x[worst.place][: worst.cut + 1]):
            return (
                "They depend on the other rows of a batch or on what was asked before: every row "
                "must be answered from its own tokens alone."
            )
        return "They depend on the future: position t may use tokens up to t only."


class _Differences:
    """Where the second answers are not the first ones, up to the cuts."""

    def __init__(self, recipe: Recipe, head: Tensor, rows: Rows) -> None:
        self._recipe, self._head, self._rows = recipe, head, rows
        self._largest: list[float] = []
        self._gains: list[float] = []
        self._where: list[int] = []

    def add(self, probe: Probe, first: Tensor, second: Tensor) -> None:
        """Compare two answers (T, width) to one row."""
        shown = probe.cut + 1
        places = torch.nonzero((first[:shown] != second[:shown]).any(-1)).flatten()
        if not len(places):
            self._note(0.0, 0.0, 0)
            return
        places = places.flip(0)[:COMPARED]  # the cut first
        distances = _distances(self._recipe, self._head, first[places], second[places])
        gain = 0.0
        if places[0] == probe.cut:
            target = torch.tensor([int(self._rows.blocks[probe.row, probe.cut + 1])])
            gain = sum(
                sign
                * float(
                    _log_probabilities(self._recipe, self._head, x[probe.cut : shown])[0, target]
                )
                for sign, x in ((1, first), (-1, second))
            )
        self._note(float(distances.max()), gain, len(places))

    def _note(self, largest: float, gain: float, count: int) -> None:
        self._largest.append(largest)
        self._gains.append(gain)
        self._where.append(count)

    @property
    def worst(self) -> int:
        """Number of the probe with the largest difference."""
        return int(np.argmax(self._largest))

    def problem(self, probes: int, tolerance: Tolerance) -> str:
        """What is wrong, in one sentence; empty if nothing is."""
        far = sum(one > tolerance.distribution for one in self._largest)
        gain = float(np.mean(self._gains))
        if far:
            return (
                f"Not a language model: {far} of {probes} answers were others when what follows "
                f"them and the rest of the batch were replaced (by up to "
                f"{max(self._largest):.3g} nats)."
            )
        if not gain <= tolerance.gain:
            return (
                f"Not a language model: its answers are better by {gain:.3g} nats per token when "
                "it sees what follows."
            )
        return ""


def _log_probabilities(recipe: Recipe, head: Tensor, x: Tensor) -> Tensor:
    """Activations (n, width) -> log-probabilities (n, vocab), fp32, on the host."""
    with torch.inference_mode():
        logits = (x.to(head.device) @ head.T).float()
        capped = recipe.softcap * torch.tanh(logits / recipe.softcap)
        return capped.log_softmax(-1).cpu()


def _distances(recipe: Recipe, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Largest difference of any log-probability: two (n, width) -> (n,).

    Infinite where one of them is none: NaN, which an answer and a head can make that are finite by
    themselves, is never larger than what is allowed.
    """
    both = (_log_probabilities(recipe, head, x) for x in (one, other))
    return torch.sub(*both).abs().amax(-1).nan_to_num(nan=math.inf)
