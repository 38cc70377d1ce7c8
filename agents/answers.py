"""`Answers`: what the model answered before, so that a question asked again costs nothing.

A society that resumes may repeat the step that a crash interrupted. The cache holds only answers
that had the form they were asked for. It may be deleted at any time; if it cannot be used, the
society goes on without it.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from society import logs

if TYPE_CHECKING:
    from pathlib import Path

MOST = 5_000
"""Answers that are kept, the latest."""


class Answers:
    """Texts by key in a file of SQLite. Never raises."""

    def __init__(self, path: Path | None) -> None:
        """Name the file; None keeps nothing."""
        self._path = path
        self._database: sqlite3.Connection | None = None

    def get(self, key: str) -> str | None:
        """What was answered, if it is known."""
        try:
            database = self._opened()
            if database is None:
                return None
            found = database.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return None
        return str(found[0]) if found else None

    def put(self, key: str, text: str) -> None:
        """Keep an answer; the oldest ones make room."""
        try:
            database = self._opened()
            if database is None:
                return
            with database:
                database.execute(
                    "INSERT OR REPLACE INTO answers(key, text) VALUES (?, ?)", (key, text)
                )
                database.execute(
                    "DELETE FROM answers WHERE rowid <= (SELECT max(rowid) FROM answers) - ?",
                    (MOST,),
                )
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _opened(self) -> sqlite3.Connection | None:
        if self._database is None and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._database = sqlite3.connect(self._path, timeout=1)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers(key TEXT PRIMARY KEY, text TEXT NOT NULL)"
            )
        return self._database

    def _give_up(self, error: Exception) -> None:
        """Go on without the cache, and say so once."""
        logs.get("answers").warning(
            "known answers of the model cannot be kept or read; the society goes on without them, "
            "and the file may be deleted",
            file=str(self._path), problem=str(error),
        )  # fmt: skip
        self.close()
        self._path = None
