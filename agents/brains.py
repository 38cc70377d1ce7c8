"""Brains by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from society.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Mapping

    from society.agents.endpoint import Accounts
    from society.memory.folder import NotebookFolder
    from society.roles import Brain
    from society.settings import Settings

SEARCH, OPENAI = "search", "openai"
BRAINS = (SEARCH, OPENAI)


def check_brain(settings: Settings, environ: Mapping[str, str]) -> None:
    """Raise early what `load_brain` would.

    Raises:
        UnknownName: There is no such brain.
        UsageError: It needs a key or a price, and there is none.
    """
    if settings.brain not in BRAINS:
        raise UnknownName("brain", settings.brain, BRAINS)
    if settings.brain == OPENAI:
        from society.agents.endpoint import require_key, require_price

        require_key(settings.endpoint, environ)
        require_price(settings.endpoint)


def load_brain(name: str = SEARCH) -> Brain:
    """A brain that needs nothing else.

    Raises:
        UnknownName: There is no such brain, or it needs an endpoint: see `compose_brain`.
    """
    if name != SEARCH:
        raise UnknownName("brain", name, BRAINS)
    from society.agents.search import SearchBrain

    return SearchBrain()


def compose_brain(
    settings: Settings, *, society: str, accounts: Accounts, folder: NotebookFolder
) -> Brain:
    """The brain of a society.

    Args:
        settings: The society's.
        society: Its id, under which calls are recorded.
        accounts: Where they are recorded: the ledger.
        folder: The notebook, which keeps transcripts and answers.

    Raises:
        UnknownName: There is no such brain.
        UsageError: It needs a key, and there is none.
    """
    if settings.brain != OPENAI:
        return load_brain(settings.brain)
    from society.agents.endpoint import Endpoint
    from society.agents.researcher import Researcher, fence_key

    endpoint = Endpoint(settings.endpoint, society=society, accounts=accounts, folder=folder)
    return Researcher(endpoint, settings.endpoint, fence_key(folder.path / "fence.key"))
