"""A code change in a few words, read off the headers of its diffs; needs no source. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

FILE = re.compile(r"\+\+\+ b/([\w./ -]{1,80})\Z", re.ASCII)
HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@(?: ([\w.]{1,60}))?\Z", re.ASCII)
BROKEN = "society-patch broken"
MOST_FILES = 3
"""Files that are named; of more, only how many there are."""
MOST_FUNCTIONS = 2
"""Functions of a file that are named."""


@dataclass(slots=True)
class _Change:
    """What a diff says about one file."""

    added: int = 0
    removed: int = 0
    functions: list[str] = field(default_factory=list)

    def words(self, file: str) -> str:
        """E.g. `gpt.py:_feed_forward +3 -1`."""
        named = list(dict.fromkeys(self.functions))
        where = f":{','.join(named)}" if 0 < len(named) <= MOST_FUNCTIONS else ""
        counts = [f"+{self.added}"] * (self.added > 0) + [f"-{self.removed}"] * (self.removed > 0)
        return " ".join([file + where, *counts])


@lru_cache(maxsize=128)
def describe_patch(patch: str) -> str:
    """What a patch text (`Variant.patch`) touches, e.g. `patch(gpt.py:_feed_forward +3 -1)`.

    `patch(broken)` for edits that did not apply, and `patch` for a text that is none. What it says
    is on one line and of plain characters, whatever the text.
    """
    if patch.startswith(BROKEN):
        return "patch(broken)"
    found = _changes(patch.split("\n"))
    if not found:
        return "patch"
    words = [change.words(file) for file, change in found.items()]
    more = [f"{len(words) - MOST_FILES} more files"] * (len(words) > MOST_FILES)
    return f"patch({', '.join([*words[:MOST_FILES], *more])})"


def _changes(rows: list[str]) -> dict[str, _Change]:
    found: dict[str, _Change] = {}
    change: _Change | None = None
    at = 0
    while at < len(rows):
        row, at = rows[at], at + 1
        if match := FILE.match(row):
            change = found.setdefault(match[1], _Change())
        elif change is not None and (match := HUNK.match(row)):
            old, new = (1 if count is None else int(count[:9]) for count in match.groups()[:2])
            at = _count(rows, at, old, new, change)
            change.functions += [match[3]] if match[3] else []
    return found


def _count(rows: list[str], at: int, old: int, new: int, change: _Change) -> int:
    """Count the lines of a hunk; returns the row after it."""
    while at < len(rows) and (old > 0 or new > 0) and rows[at][:1] in ("+", "-", " "):
        mark, at = rows[at][0], at + 1
        old, new = old - (mark != "+"), new - (mark != "-")
        change.added += mark == "+"
        change.removed += mark == "-"
    return at
