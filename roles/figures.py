"""Whether the numbers in a text are those of the facts it was written from.

A language model that writes about results makes numbers up, or copies them wrongly. So each number,
each id and each name with a digit in it must occur among the facts, at the precision it is written
with; what the words around it say about it cannot be checked here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "twice": 2, "dozen": 12, "twenty": 20, "thirty": 30,
    "forty": 40, "fifty": 50, "hundred": 100, "thousand": 1000, "million": 1_000_000,
}  # fmt: skip
"""Words that are numbers wherever they stand; `one` mostly is none."""
EXACT = 1e-9
"""Relative difference below which two numbers are one."""
_NUMBER = re.compile(
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<power>e[-+]?\d+)?"
    r"(?P<percent>\s?%|\spercent)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<![\w.])[^\W\d_]\w*(?:[-_]\w+)*(?!\w)")
SIGNS = {"+": 1, "-": -1, "\u2212": -1, "\u2013": -1}
"""Also the minus of typesetters, and the dash that models write for it."""
_OPEN = re.compile(r"[\s(\[{=:;,<>~\u2248\"'`*]")
"""What may stand before a sign."""
_SCALE = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, slots=True)
class _Figure:
    """A number as it is written."""

    text: str
    value: float
    """Its absolute value."""
    sign: int
    """-1 or 1 if a sign is written before it, else 0."""
    step: float
    """One in its last printed digit."""
    whole: bool
    """Whether it is written without a fraction or a power."""

    def tells(self, fact: _Figure) -> bool:
        """Whether it is what `fact` becomes when it is rounded to this many digits.

        Without a sign it may be either; a fact without one is positive.
        """
        if self.value and self.sign and self.sign != (fact.sign or 1):
            return False
        if abs(self.value - fact.value) <= EXACT * max(self.value, fact.value):
            return True
        if self.whole and not fact.whole and fact.value < 10:
            return False  # any fraction can be rounded to some small number
        if self.whole and fact.whole:
            return False
        return self.value > 0 and abs(self.value - fact.value) <= self.step * 0.5 * (1 + 1e-6)


class Facts:
    """What was given, read once for many texts."""

    def __init__(self, facts: Sequence[str]) -> None:
        """Read the facts."""
        self._text = "\n".join(facts).lower()

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for name in _NAME.findall(self._text) if _has_digit(name))

    @cached_property
    def _figures(self) -> tuple[_Figure, ...]:
        return tuple(way for ways in _figures(self._text) for way in ways)

    def unsupported(self, text: str) -> list[str]:
        """The numbers, ids and names with digits in `text` that no fact holds, as written.

        A sign that is written must be the fact's; a number without one may be a loss or a gain. A
        percentage may stand for a share and the other way round, `k` and `M` are thousands and
        millions, and a number may be rounded; but a fraction below ten does not become a whole
        number.
        """
        lowered = text.lower()
        names = [name for name in _NAME.findall(lowered) if _has_digit(name)]
        odd = [name for name in names if name not in self._names]
        odd += [ways[0].text for ways in _figures(lowered) if not any(map(self._hold, ways))]
        return list(dict.fromkeys(odd))

    def _hold(self, figure: _Figure) -> bool:
        return any(map(figure.tells, self._figures))


def _has_digit(name: str) -> bool:
    return any(letter.isdigit() for letter in name)


def _figures(text: str) -> list[list[_Figure]]:
    """Every number in a lower-case text, in each of the ways it may be meant."""
    text = _NAME.sub(lambda match: "_" if _has_digit(match.group()) else match.group(), text)
    found = [
        _ways(
            match,
            _sign(text[max(0, match.start() - 2) : match.start()]),
            text[match.end() : match.end() + 2],
        )
        for match in _NUMBER.finditer(text)
    ]
    words = [word for word in re.findall(r"[a-z]+", text) if word in WORDS]
    return found + [[_Figure(word, float(WORDS[word]), 0, 1.0, whole=True)] for word in words]


def _sign(before: str) -> int:
    """The sign that the two characters before a number amount to: `8-10` and `+/-1` have none."""
    if not before or before[-1] not in SIGNS or (len(before) > 1 and not _OPEN.match(before)):
        return 0
    return SIGNS[before[-1]]


def _ways(match: re.Match[str], sign: int, after: str) -> list[_Figure]:
    """The number itself; the share that a percentage is; what a `k` or `M` behind it makes it."""
    digits, power = match["digits"].replace(",", ""), match["power"] or ""
    _, point, fraction = digits.partition(".")
    value, step = float(digits + power), 10.0 ** -len(fraction) * float("1" + power)
    text = "-" * (sign < 0) + match.group().strip()
    ways = [_Figure(text, value, sign, step, whole=not (point or power))]
    if match["percent"]:
        ways.append(_Figure(text, value / 100, sign, step / 100, whole=False))
    elif after[:1] in _SCALE and not after[1:2].isalpha():
        scale = _SCALE[after[0]]
        ways.append(_Figure(text, value * scale, sign, step * scale, whole=False))
    return ways
