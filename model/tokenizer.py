"""Byte-pair encoding trained on the train split, used through `tiktoken`.

rustbpe learns the merges, tiktoken applies them. The vocabulary holds the 256 bytes, the merges
and one or more special tokens with the last ids; the first of them (BOS) stands before each
document, the others stand for nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from society.model.files import write_atomically

BOS = "<|bos|>"

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""How text is cut before merging: GPT-4's pattern with numbers of at most two digits (nanochat)."""

Ranks = dict[bytes, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents as tokens, one after the other."""

    tokens: np.ndarray
    """Token ids, uint16, shape (tokens,); BOS before each document."""
    lengths: np.ndarray
    """Tokens of each document, BOS included: int64, shape (documents,)."""


def train_ranks(documents: Iterable[str], vocab: int, special: int = 1) -> Ranks:
    """Learn `vocab - special` byte strings (bytes and merges); the same text, the same ranks."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(documents), vocab - special, pattern=PATTERN)
    return {bytes(piece): rank for piece, rank in trainer.get_mergeable_ranks()}


def special_names(count: int) -> tuple[str, ...]:
    """Names of the special tokens, BOS first."""
    return (BOS, *(f"<|reserved_{index}|>" for index in range(1, count)))


def encoding(ranks: Ranks, special: int = 1) -> tiktoken.Encoding:
    """The ranks as an offline `tiktoken.Encoding`; the special tokens have the last ids."""
    return tiktoken.Encoding(
        name=f"bpe-{len(ranks) + special}",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(special_names(special))},
    )


def bos_of(encoder: tiktoken.Encoding) -> int:
    """The id of the token before each document."""
    return encoder.encode_single_token(BOS)


def encode(encoder: tiktoken.Encoding, documents: Sequence[str]) -> Encoded:
    """All documents in one row; words that look like a special token are words."""
    bos = np.asarray([bos_of(encoder)], dtype=np.uint16)
    pieces, lengths = [], []
    for text in documents:
        ids = encoder.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        pieces += [bos, ids]
        lengths.append(1 + len(ids))
    tokens = np.concatenate(pieces) if pieces else bos[:0]
    return Encoded(tokens, np.asarray(lengths, dtype=np.int64))


def encode_documents(encoder: tiktoken.Encoding, documents: Sequence[str]) -> np.ndarray:
    """All documents in one row, BOS before each: uint16, shape (tokens,)."""
    return encode(encoder, documents).tokens


def token_bytes(encoder: tiktoken.Encoding, *, as_decoded: bool = False) -> np.ndarray:
    """UTF-8 bytes each token stands for: uint16, shape (vocab,); special tokens stand for none.

    Args:
        encoder: The vocabulary.
        as_decoded: Count the bytes of the token decoded by itself, as autoresearch's `prepare.py`
            does: a token that is a part of a character decodes to U+FFFD, three bytes.
    """
    special = len(encoder.special_tokens_set)
    pieces = [encoder.decode_single_token_bytes(i) for i in range(encoder.n_vocab - special)]
    if as_decoded:
        pieces = [piece.decode(errors="replace").encode() for piece in pieces]
    return np.asarray([len(piece) for piece in pieces] + [0] * special, dtype=np.uint16)


def save_ranks(path: Path, ranks: Ranks) -> None:
    """Write the ranks as JSON: a list of base64 byte strings in rank order."""
    pieces = [base64.b64encode(piece).decode() for piece in sorted(ranks, key=ranks.__getitem__)]
    write_atomically(path, json.dumps({"pattern": PATTERN, "pieces": pieces}).encode())


def load_ranks(path: Path) -> Ranks:
    """Read what `save_ranks` wrote."""
    pieces = json.loads(path.read_text())["pieces"]
    return {base64.b64decode(piece): rank for rank, piece in enumerate(pieces)}
