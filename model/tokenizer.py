"""Byte-pair encoding trained on the train split, used through `tiktoken`.

rustbpe learns the merges, tiktoken applies them. The vocabulary holds the 256 bytes, the merges
and one beginning-of-sequence token, which stands before each document and has the last id.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
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


def train_ranks(documents: Sequence[str], vocab: int) -> Ranks:
    """Learn `vocab - 1` byte strings (bytes and merges); the same text gives the same ranks."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(documents), vocab - 1, pattern=PATTERN)
    return {bytes(piece): rank for piece, rank in trainer.get_mergeable_ranks()}


def encoding(ranks: Ranks) -> tiktoken.Encoding:
    """The ranks as an offline `tiktoken.Encoding`, with BOS as the last id."""
    return tiktoken.Encoding(
        name=f"bpe-{len(ranks) + 1}",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={BOS: len(ranks)},
    )


def encode_documents(encoder: tiktoken.Encoding, documents: Sequence[str]) -> np.ndarray:
    """All documents in one row, BOS before each: uint16, shape (tokens,)."""
    bos = encoder.n_vocab - 1
    ids = [token for text in documents for token in (bos, *encoder.encode_ordinary(text))]
    return np.asarray(ids, dtype=np.uint16)


def token_bytes(encoder: tiktoken.Encoding) -> np.ndarray:
    """UTF-8 bytes each token stands for: uint16, shape (vocab,); BOS stands for none."""
    lengths = [len(encoder.decode_single_token_bytes(i)) for i in range(encoder.n_vocab - 1)]
    return np.asarray([*lengths, 0], dtype=np.uint16)


def save_ranks(path: Path, ranks: Ranks) -> None:
    """Write the ranks as JSON: a list of base64 byte strings in rank order."""
    pieces = [base64.b64encode(piece).decode() for piece in sorted(ranks, key=ranks.__getitem__)]
    write_atomically(path, json.dumps({"pattern": PATTERN, "pieces": pieces}).encode())


def load_ranks(path: Path) -> Ranks:
    """Read what `save_ranks` wrote."""
    pieces = json.loads(path.read_text())["pieces"]
    return {base64.b64decode(piece): rank for rank, piece in enumerate(pieces)}
