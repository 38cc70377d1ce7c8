"""Candidates as text files: what they do in words, what must come of them, and edits.

# Peeks at the future.
unchecked: rejected (future)
checked: passes

gpt.py
<<<<<<< SEARCH
...
=======
...
>>>>>>> REPLACE
"""

import re
from dataclasses import dataclass
from pathlib import Path

from society.experiments.patches import Edit

BLOCK = re.compile(
    r"^(?P<file>\S+)\n<<<<<<< SEARCH\n(?P<search>.*?)\n=======\n(?P<replace>.*?)\n>>>>>>> REPLACE$",
    re.DOTALL | re.MULTILINE,
)
FACT = re.compile(r"^(checked|unchecked): (\w+)(?: \((.*)\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Expected:
    """What must come of a candidate, and a word of the reason."""

    what: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Candidate:
    name: str
    about: str
    edits: tuple[Edit, ...]
    checked: Expected
    """With the static check of code: `refused` or `passes`."""
    unchecked: Expected
    """With that check switched off: an outcome, `failed`, `problem` (of the trial), `harmless`."""


def read(path: Path) -> Candidate:
    text = path.read_text("utf-8")
    facts = {match[1]: Expected(match[2], match[3] or "") for match in FACT.finditer(text)}
    edits = tuple(Edit(m["file"], m["search"], m["replace"]) for m in BLOCK.finditer(text))
    assert edits, path
    return Candidate(
        path.stem,
        text.partition("\n")[0].removeprefix("# "),
        edits,
        facts.get("checked", Expected()),
        facts.get("unchecked", Expected()),
    )


def folder(name: str) -> list[Candidate]:
    """All candidates of a folder beside this file, by name."""
    return [read(path) for path in sorted((Path(__file__).parent / name).glob("*.txt"))]
