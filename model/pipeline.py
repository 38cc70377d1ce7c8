"""The data pipeline: which rows a run trains on, and in which order.

Four knobs of the recipe, each a pure function of (recipe, tokens, seed, steps):

    packing      where rows are cut: `contiguous` through all documents; `documents` in whole rows
                 inside each one (what is left of a document after its last whole row is dropped,
                 and so is a document shorter than a row); `best_fit` as in `society.model.packing`
    domain_mix   a row comes from a domain with probability proportional to (tokens of the
                 domain) ** domain_mix; 1 is the text as it is, 0 every domain alike
    repeats      only 1 / repeats of the rows, each seen that often, in reshuffled passes
    data_order   the order of what the run sees

The rows of a run are first the sample that a shuffled run would see in its planned steps (in one
epoch, if the budget is in seconds); `data_order` then orders this sample, so that a short run that
begins with short documents sees as many long ones as any other. One exception: `best_fit` with
`corpus` packs the documents as they lie in the corpus, which is the loader of the public benchmark.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from society.errors import SocietyError
from society.model import packing
from society.model.data import TrainTokens, generator, row_order
from society.model.packing import BestFit, Rows
from society.model.recipe import Recipe

DRAWN = 1_024
"""Rows or documents whose domains are drawn together."""
SCORED = 4_096
"""Rows whose surprisal is computed together."""
COUNTED = 1 << 24
"""Tokens counted together."""

Chunks = Iterator[np.ndarray]


class NoRows(SocietyError):
    """The pipeline that a recipe asks for has no meaning for these tokens; names the knob."""


class _Source(Protocol):
    """An endless stream of rows."""

    @property
    def epoch(self) -> int:
        """Rows that one pass over the text gives (nearly)."""

    def take(self, rows: int) -> Rows:
        """The next rows."""


def batches(
    recipe: Recipe, tokens: TrainTokens, *, seed: int, steps: int | None
) -> Iterator[np.ndarray]:
    """Endless batches of rows, targets shifted by one: int64, (rows, T + 1).

    Args:
        recipe: Its knobs of the group `data`, `seq_len` and `batch_tokens`.
        tokens: The train split.
        seed: Decides the order.
        steps: Planned steps of the run; None when the budget is in seconds.

    Raises:
        NoRows: A knob asks for what these tokens cannot give. Raised at once, not at first use.
    """
    _check(recipe, tokens)
    source = _source(recipe, tokens, seed)
    streams = recipe.data_order == "shuffled" or _as_it_lies(recipe)
    if streams and recipe.repeats == 1:
        run: Iterator[Rows] = (source.take(recipe.rows) for _ in itertools.count())
    else:
        run = _planned(recipe, tokens, source, seed, steps)
    return (rows.block(tokens.tokens).astype(np.int64) for rows in run)


def _as_it_lies(recipe: Recipe) -> bool:
    """Whether documents enter the packer in the order of the corpus."""
    return recipe.packing == "best_fit" and recipe.data_order == "corpus"


def _planned(
    recipe: Recipe, tokens: TrainTokens, source: _Source, seed: int, steps: int | None
) -> Iterator[Rows]:
    """Samples of the length of the run, each ordered and repeated."""
    size = recipe.rows
    total = size * (steps or max(1, source.epoch // size))
    for part in itertools.count():
        sample = source.take(-(-total // recipe.repeats))
        first = part * recipe.repeats
        passes = (
            _ordered(recipe, tokens, sample, seed, first + number)
            for number in range(recipe.repeats)
        )
        order = np.concatenate(list(passes))[:total]
        for at in range(0, total, size):
            yield sample.select(order[at : at + size])


# --------------------------------------------------------------------------- order


def _ordered(
    recipe: Recipe, tokens: TrainTokens, sample: Rows, seed: int, number: int
) -> np.ndarray:
    """One pass over a sample: numbers of its rows in the order of `data_order`."""
    if recipe.data_order == "shuffled" or _as_it_lies(recipe):
        if number % recipe.repeats == 0:
            return np.arange(len(sample))
        return generator(seed, "repeat", number).permutation(len(sample))
    key, sign = ORDERS[recipe.data_order]
    return np.argsort(sign * key(tokens, sample), kind="stable")


def _position(tokens: TrainTokens, sample: Rows) -> np.ndarray:
    return sample.first


def _length(tokens: TrainTokens, sample: Rows) -> np.ndarray:
    """Tokens of the document in which each row starts."""
    lengths = packing.document_lengths(tokens.starts, len(tokens.tokens))
    found: np.ndarray = lengths[_document(tokens, sample.first)]
    return found


def _domain(tokens: TrainTokens, sample: Rows) -> np.ndarray:
    found: np.ndarray = tokens.domains[_document(tokens, sample.first)]
    return found.astype(np.int64)


def _surprisal(tokens: TrainTokens, sample: Rows) -> np.ndarray:
    """Mean surprisal of each row under the train split's token frequencies, in nats: (rows,)."""
    counts = np.zeros(tokens.vocab, dtype=np.int64)
    for at in range(0, len(tokens.tokens), COUNTED):
        counts += np.bincount(tokens.tokens[at : at + COUNTED], minlength=tokens.vocab)
    nats = -np.log(np.maximum(counts, 1) / len(tokens.tokens))
    parts = [np.arange(at, min(at + SCORED, len(sample))) for at in range(0, len(sample), SCORED)]
    return np.concatenate([nats[sample.select(p).block(tokens.tokens)].mean(axis=1) for p in parts])


Key = Callable[[TrainTokens, Rows], np.ndarray]
ORDERS: dict[str, tuple[Key, int]] = {
    "corpus": (_position, 1),
    "reversed": (_position, -1),
    "short_first": (_length, 1),
    "long_first": (_length, -1),
    "easy_first": (_surprisal, 1),
    "hard_first": (_surprisal, -1),
    "by_domain": (_domain, 1),
}
"""What each order sorts by, upwards or downwards; equal rows stay shuffled."""


# --------------------------------------------------------------------------- rows


@dataclass(slots=True)
class _Cut:
    """Rows of one piece, cut at fixed places."""

    places: np.ndarray
    """First token of each row: int64, shape (rows,)."""
    length: int
    numbers: _Stream

    @property
    def epoch(self) -> int:
        return len(self.places)

    def take(self, rows: int) -> Rows:
        return Rows.whole(self.places[self.numbers.take(rows)], self.length)


@dataclass(slots=True)
class _Packed:
    """Rows packed from whole documents."""

    packer: BestFit
    epoch: int

    def take(self, rows: int) -> Rows:
        return self.packer.take(rows)


class _Stream:
    """Chunks of numbers as one long row."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._waiting = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next numbers: int64, shape (count,)."""
        parts, have = [self._waiting], len(self._waiting)
        while have < count:
            parts.append(next(self._chunks))
            have += len(parts[-1])
        joined = np.concatenate(parts)
        self._waiting = joined[count:]
        return joined[:count]


def _source(recipe: Recipe, tokens: TrainTokens, seed: int) -> _Source:
    if recipe.packing == "best_fit":
        return _packed(recipe, tokens, seed)
    places = _places(recipe, tokens)
    domains = tokens.domains[_document(tokens, places)]
    order = _mixed(recipe, domains, np.ones(len(places)), seed)
    return _Cut(places, recipe.seq_len + 1, _Stream(order or _shuffled(len(places), seed)))


def _packed(recipe: Recipe, tokens: TrainTokens, seed: int) -> _Packed:
    lengths = packing.document_lengths(tokens.starts, len(tokens.tokens))
    arriving = _mixed(recipe, tokens.domains, lengths, seed)
    if arriving is None and _as_it_lies(recipe):
        arriving = packing.reading_order(tokens.groups or (len(lengths),))
    arriving = arriving or _shuffled(len(lengths), seed)
    capacity = recipe.seq_len + 1
    packer = BestFit(tokens.starts, lengths, _refills(arriving), capacity)
    return _Packed(packer, max(1, len(tokens.tokens) // capacity))


def _refills(chunks: Chunks) -> Chunks:
    """The same numbers, at most so many at a time as the packer takes in."""
    for chunk in chunks:
        for at in range(0, len(chunk), packing.REFILL):
            yield chunk[at : at + packing.REFILL]


def _places(recipe: Recipe, tokens: TrainTokens) -> np.ndarray:
    """Where rows may start: int64, shape (rows,)."""
    length = recipe.seq_len
    if recipe.packing == "contiguous":
        return np.arange((len(tokens.tokens) - 1) // length) * length
    whole = (packing.document_lengths(tokens.starts, len(tokens.tokens)) - 1) // length
    within = packing.ranges(np.zeros_like(whole), whole)
    places: np.ndarray = np.repeat(tokens.starts, whole) + within * length
    return places


def _document(tokens: TrainTokens, positions: np.ndarray) -> np.ndarray:
    """Number of the document that holds each token."""
    return np.searchsorted(tokens.starts, positions, side="right") - 1


def _shuffled(count: int, seed: int) -> Chunks:
    return (row_order(count, seed, epoch) for epoch in itertools.count())


def _mixed(recipe: Recipe, domains: np.ndarray, sizes: np.ndarray, seed: int) -> Chunks | None:
    """Numbers of rows (or documents) from domains in the wanted proportions; None if natural.

    Args:
        recipe: Its `domain_mix`.
        domains: Domain of each unit, shape (units,).
        sizes: Size of each unit; a domain of larger documents is drawn less often, so that the
            proportions are those of the text.
        seed: Decides the draws, and the order within each domain.
    """
    if recipe.domain_mix == 1:
        return None
    found = [int(number) for number in np.unique(domains)]
    members = [np.flatnonzero(domains == number) for number in found]
    total = np.asarray([sizes[some].sum() for some in members], dtype=np.float64)
    weights = (total / total.sum()) ** recipe.domain_mix * [len(some) for some in members] / total
    streams = [
        _Stream(_within(some, seed, number, shuffle=not _as_it_lies(recipe)))
        for some, number in zip(members, found, strict=True)
    ]
    return _draws(streams, weights / weights.sum(), seed)


def _within(members: np.ndarray, seed: int, domain: int, *, shuffle: bool) -> Chunks:
    """The units of one domain, over and over."""
    for epoch in itertools.count():
        rng = generator(seed, "data", "domain", domain, epoch)
        yield members[rng.permutation(len(members))] if shuffle else members


def _draws(streams: list[_Stream], weights: np.ndarray, seed: int) -> Chunks:
    for number in itertools.count():
        drawn = generator(seed, "mix", number).choice(len(streams), size=DRAWN, p=weights)
        units = np.empty(DRAWN, dtype=np.int64)
        for domain in np.unique(drawn):
            mine = drawn == domain
            units[mine] = streams[domain].take(int(mine.sum()))
        yield units


def _check(recipe: Recipe, tokens: TrainTokens) -> None:
    longest = int(packing.document_lengths(tokens.starts, len(tokens.tokens)).max())
    if recipe.packing == "documents" and longest <= recipe.seq_len:
        raise NoRows(
            f"packing=documents: the longest document has {longest} tokens, and none holds a row "
            f"of seq_len={recipe.seq_len} and its target. Choose a shorter seq_len."
        )
    if recipe.data_order in ("short_first", "long_first") and len(tokens.starts) == 1:
        raise NoRows(f"data_order={recipe.data_order}: the text is a single document.")
    single = len(np.unique(tokens.domains)) == 1
    if single and recipe.data_order == "by_domain":
        raise NoRows("data_order=by_domain: the documents of this corpus are all of one domain.")
    if single and recipe.domain_mix != 1:
        raise NoRows(
            f"domain_mix={recipe.domain_mix:g}: the documents of this corpus are all of one domain."
        )
