"""The lab notebook: a transactional ledger of every fact, and a semantic index over its prose.

`open(path)` is the read API for notebooks and scripts; `Ledger` is what agents write through.
Everything is imported on first use, because SQLAlchemy, pandas and Chroma are slow to import.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from society.memory.folder import NotebookFolder
    from society.memory.frames import Memory
    from society.memory.ledger import Ledger
    from society.memory.recall import Hit, Recall

__all__ = ["Hit", "Ledger", "Memory", "NotebookFolder", "Recall", "open"]

_HOME = {
    "Hit": "recall",
    "Ledger": "ledger",
    "Memory": "frames",
    "NotebookFolder": "folder",
    "Recall": "recall",
}


def open(path: Path | str) -> Memory:
    """Open a notebook for reading, also while a society works in it.

    Args:
        path: The notebook's folder, e.g. `lab`, or the address of a shared ledger.

    Returns:
        Its contents as pandas frames; close it or use it in a `with` block.

    Raises:
        NotANotebook: there is none, or one of another version.
        NotebookDamaged: the ledger cannot be read.
        LedgerUnreachable: the server of a shared ledger does not answer.
    """
    from society.memory.frames import Memory

    return Memory(path)


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
