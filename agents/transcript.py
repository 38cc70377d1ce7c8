"""`Transcript`: every request to the language model in full, as JSON lines.

One file per society, `transcripts/<society>.jsonl`, readable by its owner only; one line per
request, written at once. No key is ever in it. A line that a crash tore is left where it is and
skipped by `read_transcript`.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from society import logs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SHORTEST_SECRET = 8
"""A key with fewer characters protects nothing, and hiding it would garble the text."""
HIDDEN = "[key]"


class Redactor:
    """Hides a key wherever it occurs."""

    def __init__(self, key: str | None) -> None:
        """None, or a key that is too short for a secret, hides nothing."""
        self._key = key if key is not None and len(key) >= SHORTEST_SECRET else None

    def __repr__(self) -> str:
        """Without the key."""
        return f"Redactor({'one key' if self._key else 'no key'})"

    def text(self, text: str) -> str:
        """The text without the key."""
        return text if self._key is None else text.replace(self._key, HIDDEN)

    def value(self, value: Any) -> Any:
        """JSON values without the key; names of fields are left alone."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {name: self.value(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(one) for one in value]
        return value


class Transcript:
    """Appends lines; never raises: a full disk costs the transcript, not the society."""

    def __init__(self, path: Path, redactor: Redactor) -> None:
        """Name the file; it is opened with the first line."""
        self.path = path
        self._redactor = redactor
        self._file: int | None = None
        self._torn = False
        self._warned = False

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, and hand it to the operating system."""
        text = json.dumps(self._redactor.value(dict(line)), ensure_ascii=True) + "\n"
        try:
            if self._file is None:
                self._file = self._open()
            self._append(("\n" if self._torn else "") + text)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logs.get("transcript").warning(
                    "the transcript cannot be written; the society goes on without those lines",
                    file=str(self.path), problem=error.strerror or str(error),
                )  # fmt: skip

    def close(self) -> None:
        """Close the file; another line would open it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(file, 0o600)
        size = os.fstat(file).st_size
        self._torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        return file

    def _append(self, text: str) -> None:
        data = text.encode()
        assert self._file is not None
        self._torn = True
        while data:
            data = data[os.write(self._file, data) :]
        self._torn = False


def read_transcript(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a transcript, oldest first, without any that a crash tore."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found
