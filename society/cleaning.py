"""Foreign text made harmless to show: without control characters, on one line, bounded. Pure.

Whatever a language model, a candidate's log or another notebook wrote may hold sequences that clear
a terminal, turn the direction of writing, or hide. What a format would read as markup is escaped
where that format is written, see `render.py`.
"""

from __future__ import annotations

import re

_ANSI = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b\][^\x07\x1b]{0,1000}(?:\x07|\x1b\\)"  # titles, links
)


def visible(text: object) -> str:
    """The text with a blank for each character that shows nothing, and `?` for half of one."""
    plain = _ANSI.sub("", str(text).encode("utf-8", "replace").decode("utf-8"))
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() else " " for char in plain)


def clean(text: object) -> str:
    """Text on one line without control, direction-changing or half characters."""
    return " ".join(visible(text).split())


def bounded(text: object, chars: int) -> str:
    """Clean text of so many characters at most; a longer one ends with an ellipsis."""
    plain = clean(str(text)[: 4 * chars])
    cut = len(plain) > chars or len(str(text)) > 4 * chars
    return plain[: chars - 1] + "…" if cut else plain


def clean_lines(text: str, most: int, width: int) -> list[str]:
    """The first lines of a program or a diff, indented as they are, each cut at `width`."""
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    shown = [visible(line[: 4 * width].expandtabs(4)).rstrip() for line in lines[:most]]
    shown = [line if len(line) <= width else line[: width - 1] + "…" for line in shown]
    return [*shown, f"… {len(lines) - most} more lines"] if len(lines) > most else shown


def diff_lines(patch: str, most: int = 200, width: int = 160) -> list[str]:
    """The diffs of a code change (`Variant.patch`), without the lines that only name it."""
    start = patch.find("\n--- ")
    return clean_lines(patch if start < 0 else patch[start + 1 :], most, width)
