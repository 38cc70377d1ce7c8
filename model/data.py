"""Prepared corpora: what a run may see of them, and where it lies.

A corpus is a folder of the cache, with one folder per vocabulary, which holds everything that
training and scoring need; nothing of the text's source is needed once it is there::

    <cache>/corpora/<corpus>/<vocab>/
        corpus.json             what it is and what is in it
        tokenizer.json          the vocabulary, learned from the train split
        train/                  all that a training process may be given
            split.json          counts, names of domains, sha256 of each file below
            tokens.npy          uint16, BOS before each document
            starts.npy          where each document starts, int64
            domains.npy         number of each document's domain, uint16
        validation/             the same, and token_bytes.npy: bytes per token id, uint16
        holdout/                like validation

Token files are memory-mapped: a process pays for the pages that it touches, and all processes
share them. `society.model.corpora` makes these folders, each in one step: whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from society.errors import SocietyError, UsageError
from society.model.files import sha256_of
from society.records import Split

KJV = "kjv"
"""The corpus that comes with the project, prepared when it is first needed."""
TRAIN = "train"
SPLITS = (TRAIN, *(split.value for split in Split))
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class CorpusUnavailable(SocietyError):
    """The corpus, or its cache, is missing or is not what it should be."""


def _one() -> np.ndarray:
    return np.zeros(1, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class TrainTokens:
    """What a training run may see. By default all tokens are one document of one domain."""

    tokens: np.ndarray
    """Token ids, uint16, shape (tokens,)."""
    vocab: int
    data_hash: str
    """sha256 of the split."""
    starts: np.ndarray = field(default_factory=_one)
    """Where each document starts, ascending, the first at 0: int64, shape (documents,)."""
    domains: np.ndarray = field(default_factory=_one)
    """Number of each document's domain, shape (documents,)."""
    domain_names: tuple[str, ...] = ("all",)
    groups: tuple[int, ...] = ()
    """Documents that lay together in the source (a Parquet row group), in order."""


@dataclass(frozen=True, slots=True)
class EvalTokens:
    """What a model is scored on. By default all tokens are one document."""

    tokens: np.ndarray
    """Token ids, uint16, shape (tokens,)."""
    token_bytes: np.ndarray
    """Bytes each token id stands for, uint16, shape (vocab,); 0 for special tokens."""
    vocab: int
    split: Split
    data_hash: str
    """sha256 of the split, byte counts included."""
    starts: np.ndarray = field(default_factory=_one)
    """Where each document starts, ascending, the first at 0: int64, shape (documents,)."""
    groups: tuple[int, ...] = ()
    """Documents that lay together in the source (a Parquet row group), in order."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus in one vocabulary: where everything lies, prepared or not."""

    name: str
    vocab: int
    folder: Path

    @property
    def record(self) -> Path:
        """What the corpus is and holds, JSON."""
        return self.folder / "corpus.json"

    @property
    def tokenizer(self) -> Path:
        """The vocabulary, JSON."""
        return self.folder / "tokenizer.json"

    def split(self, split: str) -> Path:
        """Folder of one split; `train` is all that a training process needs."""
        return self.folder / split

    @property
    def ready(self) -> bool:
        """Whether it is prepared."""
        return self.record.is_file()

    def about(self) -> dict[str, Any]:
        """What `corpus.json` says.

        Raises:
            CorpusUnavailable: The corpus is not prepared, or its record cannot be read.
        """
        if not self.ready:
            raise CorpusUnavailable(missing(self))
        return _read_json(self.record)


def corpus_at(cache: Path, vocab: int, name: str = KJV) -> Corpus:
    """Where a corpus lies in a cache.

    Raises:
        UsageError: The name cannot be one of a corpus.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a corpus: 1 to 64 lower-case letters, digits and . _ - are "
            "allowed, the first one a letter or digit."
        )
    return Corpus(name, vocab, cache / "corpora" / name / str(vocab))


def prepared(cache: Path) -> tuple[Corpus, ...]:
    """Every prepared corpus of a cache, sorted by name and vocabulary."""
    records = [path.parent for path in (cache / "corpora").glob("*/*/corpus.json")]
    found = [Corpus(f.parent.name, int(f.name), f) for f in records if f.name.isdigit()]
    return tuple(sorted(found, key=lambda corpus: (corpus.name, corpus.vocab)))


def prepare(cache: Path, vocab: int, corpus: str = KJV) -> Corpus:
    """Find a corpus prepared and unchanged; make it if it is the one that comes with the project.

    Safe in several processes at once. Every file is read once, about a second per gigabyte.

    Raises:
        CorpusUnavailable: It is not prepared (the message says by which command), was changed,
            or its text is not installed.
    """
    found = corpus_at(cache, vocab, corpus)
    if not found.ready:
        if corpus != KJV:
            raise CorpusUnavailable(missing(found))
        from society.model.corpora import build
        from society.model.kjv import KingJames

        build(KingJames(), cache, vocab)
    verify(found)
    return found


def verify(corpus: Corpus) -> None:
    """Read every token file and compare it with what was recorded when it was made.

    Raises:
        CorpusUnavailable: A file is missing, or was changed since.
    """
    for split in SPLITS:
        folder = corpus.split(split)
        for name, entry in _read_json(folder / "split.json")["files"].items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                raise CorpusUnavailable(_damaged(path, "its sha256 is not the recorded one"))


def check_sizes(corpus: Corpus) -> None:
    """Look at every token file without reading it.

    Raises:
        CorpusUnavailable: A file is missing, or does not have its recorded size.
    """
    for split in SPLITS:
        _load(corpus, split)


def load_train(cache: Path, vocab: int, corpus: str = KJV) -> TrainTokens:
    """The train split of a prepared corpus; reads nothing but the train folder.

    Raises:
        CorpusUnavailable: The corpus was not prepared in this vocabulary, or was changed.
    """
    found = corpus_at(cache, vocab, corpus)
    record, arrays = _load(found, TRAIN)
    return TrainTokens(
        arrays["tokens"], vocab, record["sha256"], arrays["starts"], arrays["domains"],
        tuple(record["domains"]), tuple(record["groups"]),
    )  # fmt: skip


def load_eval(cache: Path, vocab: int, split: Split, corpus: str = KJV) -> EvalTokens:
    """An evaluation split of a prepared corpus; reads nothing but its own folder.

    Raises:
        CorpusUnavailable: The corpus was not prepared in this vocabulary, or was changed.
    """
    found = corpus_at(cache, vocab, corpus)
    record, arrays = _load(found, split)
    return EvalTokens(
        arrays["tokens"], arrays["token_bytes"], vocab, split, record["sha256"], arrays["starts"],
        tuple(record["groups"]),
    )  # fmt: skip


def data_hash(train: TrainTokens, scored: EvalTokens) -> str:
    """One sha256 for the data a run was trained and scored on."""
    return hashlib.sha256(f"{train.data_hash}{scored.data_hash}".encode()).hexdigest()


def row_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its rows: a permutation, shape (rows,)."""
    return generator(seed, "data", epoch).permutation(rows)


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator of its own for each purpose of a seed."""
    words = "/".join(map(str, (seed, *purpose)))
    digest = hashlib.sha256(words.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16]))


def missing(corpus: Corpus) -> str:
    """Which command prepares a corpus that is not there."""
    shipped = resources.files("society.configs") / f"corpus-{corpus.name}.yaml"
    command = f"society data prepare --corpus {corpus.name}"
    if corpus.name != KJV and not shipped.is_file():
        command = f"society data prepare --text FOLDER --name {corpus.name} --vocab {corpus.vocab}"
    return (
        f"The corpus {corpus.name!r} is not prepared with vocab={corpus.vocab} in "
        f"{corpus.folder.parent}. Run: {command}"
    )


def _load(corpus: Corpus, split: str) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """The record and the arrays of a split; every file has its recorded size."""
    folder = corpus.split(split)
    if not (folder / "split.json").is_file():
        raise CorpusUnavailable(missing(corpus))
    record = _read_json(folder / "split.json")
    arrays = {}
    for name, entry in record["files"].items():
        arrays[name.removesuffix(".npy")] = _mapped(folder / name, entry["bytes"])
    return record, arrays


def _mapped(path: Path, size: int) -> np.ndarray:
    """An array on disk, read-only; only the pages that are used are read."""
    try:
        if path.stat().st_size != size:
            raise CorpusUnavailable(_damaged(path, f"it should have {size} bytes"))
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CorpusUnavailable(_damaged(path, str(error))) from error
    return array.view(np.ndarray)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CorpusUnavailable(_damaged(path, str(error))) from error
    return values


def _damaged(path: Path, problem: str) -> str:
    home = path.parent.parent if path.name != "corpus.json" else path.parent
    return (
        f"The prepared data {path} is missing or was changed ({problem}). Delete the folder {home} "
        "and prepare the corpus again."
    )
