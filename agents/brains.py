"""Brains by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from society.errors import UnknownName

if TYPE_CHECKING:
    from society.roles import Brain

BRAINS = ("search",)


def load_brain(name: str) -> Brain:
    """The brain of that name.

    Raises:
        UnknownName: There is no such brain.
    """
    if name not in BRAINS:
        raise UnknownName("brain", name, BRAINS)
    from society.agents.search import SearchBrain

    return SearchBrain()
