"""Sentences to vectors, offline: static word vectors, averaged.

The vectors are those of wordllama (https://github.com/dleemiller/WordLlama): 32,000 Llama-2 tokens
of 256 dimensions, distilled from the token embeddings of large language models. Its wheel carries
the weights and the tokenizer as plain files; they are read here directly, because the package's own
loader asks the network. About 0.1 ms per sentence, no model to run, the same bits on every machine.

No embedding tells experiments apart by their numbers: vectors bring up what is *about* the same
thing; whether two experiments are the same is decided by fingerprints and distances of values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from society.errors import RecallUnavailable

PACKAGE = "wordllama"
WEIGHTS = "l2_supercat_256.safetensors"
TOKENIZER = "l2_supercat_tokenizer_config.json"
DIMENSIONS = 256

Vectors = NDArray[np.float32]
"""(number of texts, 256), each row of length 1 (or 0 for a text without words)."""

_ABBREVIATIONS = {
    "bpb": "bits per byte",
    "ffn": "feed forward",
    "init": "initialisation",
    "lr": "learning rate",
    "mlp": "feed forward",
    "opt": "optimiser",
    "wd": "weight decay",
}
"""What recipes shorten, in the words that people search for."""

_STOP = """
a an and any are as at be been by did do does for from had has have how i in is it its of on or so
that the their there this to was we were what when which why will with
"""
_KEPT = 100_000
"""Words and numbers whose tokens are kept."""
_SPACE = "\u2581"
"""Begins a word in the tokenizer's vocabulary."""
_STOP_WORDS = frozenset(_STOP.split())
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+|\d+(?:\.\d+)?(?:e-?\d+)?")


def words(text: str) -> str:
    """Plain words: `warm_down=0.3` -> `warm down 0.3`, `lr` -> `learning rate`."""
    found = _WORD.findall(_CAMEL.sub(" ", text))
    spelled = (_ABBREVIATIONS.get(word.lower(), word.lower()) for word in found)
    kept = [word for word in spelled if word not in _STOP_WORDS]
    return " ".join(kept or found)


class Embedder:
    """Mean of the static vectors of a text's tokens, scaled to length 1. Immutable once made."""

    def __init__(self) -> None:
        """Read the weights and the tokenizer (about 0.1 s).

        Raises:
            RecallUnavailable: the package's files are missing or unreadable.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        weights, tokenizer = _file(WEIGHTS), _file(TOKENIZER)
        try:
            table = load_file(weights)["embedding.weight"]
        except (OSError, KeyError, SafetensorError) as error:
            raise _unreadable(weights) from error
        self._table: Vectors = table.astype(np.float32)  # (tokens, 256)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokens: dict[str, tuple[int, ...]] = {}
        vocabulary = self._tokenizer.get_vocab()
        self._digits: dict[str, int] = {one: vocabulary[one] for one in "0123456789.e-"}
        self._space: int = vocabulary[_SPACE]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One unit vector per text.

        Returns:
            (len(texts), 256).
        """
        vectors = np.zeros((len(texts), DIMENSIONS), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            if tokens := self.tokens(text):
                row[:] = self._table[tokens].mean(axis=0)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: Vectors = vectors / np.maximum(lengths, 1e-12)
        return unit

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text's plain words: what the tokenizer makes of `words(text)`.

        No token of this vocabulary reaches over the end of a word and every digit is one, so that
        words are looked up one by one: four times as fast as tokenizing whole texts.
        """
        found = _WORD.findall(_CAMEL.sub(" ", text))
        kept: list[int] = []
        for word in found:
            known = self._tokens.get(word)
            kept.extend(self._spelled(word) if known is None else known)
        return kept or [token for word in found for token in self._tokenized(word)]

    def _spelled(self, word: str) -> tuple[int, ...]:
        plain = _ABBREVIATIONS.get(word.lower(), word.lower())
        parts = () if plain in _STOP_WORDS else plain.split()
        spelled = tuple(token for part in parts for token in self._tokenized(part))
        if len(self._tokens) < _KEPT:
            self._tokens[word] = spelled
        return spelled

    def _tokenized(self, word: str) -> tuple[int, ...]:
        if word.isalpha():
            return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        return (self._space, *(self._digits[one] for one in word))


@lru_cache(maxsize=1)
def embedder() -> Embedder:
    """The one embedder of this process.

    Raises:
        RecallUnavailable: the package's files are missing or unreadable.
    """
    return Embedder()


def _file(name: str) -> Path:
    """A file of the wordllama wheel, found without importing the package."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise RecallUnavailable(
        f"The offline embedder needs the file {name} of the package {PACKAGE}, which is not "
        f"installed completely. Run `pip install --force-reinstall --no-deps {PACKAGE}`."
    )


def _unreadable(path: Path) -> RecallUnavailable:
    return RecallUnavailable(
        f"The offline embedder cannot read {path}. "
        f"Run `pip install --force-reinstall --no-deps {PACKAGE}`."
    )
