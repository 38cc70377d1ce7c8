"""Rows of a fixed number of tokens, cut from documents that lie in one long array.

A row is one or more pieces of the array. Best-fit packing is the algorithm of the loader in
`prepare.py` of github.com/karpathy/autoresearch (from nanochat): every row starts with a document,
the largest document of a buffer that still fits comes next, and if none fits the shortest one is
cropped to fill the row. Its rest is dropped. Nothing is padded.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

BUFFER = 1_000
"""Documents that are considered at least (autoresearch)."""
REFILL = 128
"""Documents that enter the buffer together (autoresearch)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of equal length, as pieces of a token array."""

    begin: np.ndarray
    """First token of each piece: int64, shape (pieces,)."""
    length: np.ndarray
    """Tokens of each piece: int64, shape (pieces,)."""
    pieces: np.ndarray
    """Pieces of each row: int64, shape (rows,)."""

    @classmethod
    def whole(cls, begin: np.ndarray, length: int) -> Rows:
        """Rows of one piece each."""
        return cls(begin, np.full_like(begin, length), np.ones_like(begin))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.pieces)

    @property
    def first(self) -> np.ndarray:
        """First token of each row: int64, shape (rows,)."""
        first: np.ndarray = self.begin[np.cumsum(self.pieces) - self.pieces]
        return first

    def select(self, order: np.ndarray) -> Rows:
        """The rows with these numbers, in this order."""
        ends = np.cumsum(self.pieces)
        chosen = ranges((ends - self.pieces)[order], self.pieces[order])
        return Rows(self.begin[chosen], self.length[chosen], self.pieces[order])

    def block(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens of all rows, in the array's type: shape (rows, T + 1)."""
        if len(self.begin) == len(self):  # one piece each
            places = self.begin[:, None] + np.arange(self.length[0])
        else:
            places = ranges(self.begin, self.length).reshape(len(self), -1)
        block: np.ndarray = tokens[places]
        return block


def ranges(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The numbers begin, begin + 1, ... of every range, one range after the other."""
    before = np.cumsum(length) - length
    return np.repeat(begin - before, length) + np.arange(int(length.sum()))


def document_lengths(starts: np.ndarray, tokens: int) -> np.ndarray:
    """Tokens of each document: int64, shape (documents,)."""
    return np.diff(starts, append=tokens)


def reading_order(groups: Sequence[int], size: int = REFILL) -> Iterator[np.ndarray]:
    """Numbers of the documents as a loader reads them, over and over: at most `size` at a time.

    A batch never crosses the end of a group, because the loader reads group by group.
    """
    ends = np.cumsum(groups)
    while True:
        for begin, end in zip(ends - groups, ends, strict=True):
            for at in range(begin, end, size):
                yield np.arange(at, min(at + size, end))


@dataclass(slots=True)
class BestFit:
    """The packer: an endless stream of documents in, rows out. Ties go to the older document."""

    starts: np.ndarray
    """Where each document starts, shape (documents,)."""
    lengths: np.ndarray
    """Tokens of each document, shape (documents,)."""
    arriving: Iterator[np.ndarray]
    """Numbers of the next documents."""
    capacity: int
    """Tokens of a row, the last target included: T + 1."""
    buffer: int = BUFFER
    _short: list[deque[int]] = field(init=False)
    """Starts of the waiting documents of each length up to the capacity, oldest first."""
    _present: int = 0
    """Bit n is set if a document of n tokens waits."""
    _long: list[tuple[int, int, int]] = field(default_factory=list)
    """Heap of longer ones: (length, arrival, start)."""
    _waiting: int = 0
    _arrived: int = 0

    def __post_init__(self) -> None:
        """Nothing waits at first."""
        self._short = [deque() for _ in range(self.capacity + 1)]

    def take(self, rows: int) -> Rows:
        """The next rows."""
        begin: list[int] = []
        length: list[int] = []
        pieces = [self._fill(begin, length) for _ in range(rows)]
        return Rows(*(np.asarray(part, dtype=np.int64) for part in (begin, length, pieces)))

    def _fill(self, begin: list[int], length: list[int]) -> int:
        """Append the pieces of one row; returns how many."""
        left, pieces = self.capacity, 0
        while left:
            while self._waiting < self.buffer:
                self._refill()
            fitting = (self._present & ((2 << left) - 1)).bit_length() - 1
            if fitting > 0:
                begin.append(self._pop(fitting))
            else:
                begin.append(self._pop_shortest())
                fitting = left
            length.append(fitting)
            left -= fitting
            pieces += 1
        return pieces

    def _refill(self) -> None:
        chosen = next(self.arriving)
        arrivals = zip(self.starts[chosen].tolist(), self.lengths[chosen].tolist(), strict=True)
        for start, length in arrivals:
            if length <= self.capacity:
                self._short[length].append(start)
                self._present |= 1 << length
            else:
                heapq.heappush(self._long, (length, self._arrived, start))
            self._arrived += 1
        self._waiting += len(chosen)

    def _pop(self, length: int) -> int:
        """The oldest document of this length."""
        queue = self._short[length]
        start = queue.popleft()
        if not queue:
            self._present &= ~(1 << length)
        self._waiting -= 1
        return start

    def _pop_shortest(self) -> int:
        if self._present:
            return self._pop((self._present & -self._present).bit_length() - 1)
        self._waiting -= 1
        return heapq.heappop(self._long)[2]
