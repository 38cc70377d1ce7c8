"""What a language model is shown: text of others made inert, packed within a budget of tokens.

Nearly everything in a notebook was written by somebody else: another agent's model, a candidate's
code, a file that a user imported. It is shown as evidence, never as instructions:

- it stands between fences whose name is made from a key that no author knows, so that a text
  cannot close its own fence;
- what models take for the frame of a conversation (`<|im_start|>`, `[INST]`, `### System`) and
  control characters are taken out, and lengths are bounded;
- a text that addresses its reader (`ignore the instructions above`) is withheld, and a warning in
  the log says where it came from.

These make attacks hard, not impossible. What holds is that an answer can only become a proposal,
which is checked like any other, or a sentence, whose numbers are checked; no verdict reads either.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from society import logs

WITHHELD = "(withheld: it reads like instructions)"
LINE_CHARS = 400
"""Longest quoted text of one author, unless said otherwise."""
MARK = "… ({} more left out)"
CUT = "# … (the rest is left out)"
MOST_TOLD = 1_000
"""Texts that the log warns of."""
REMOVALS = 4
"""How often frames are taken out of one text before all that they are made of is."""

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
"""Also what is invisible or reverses the direction of writing."""
_FRAME = re.compile(
    r"<\|[^|<>\n]{0,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|</?(?:system|assistant|user|human|instructions?|tool_call|think)\b[^>\n]{0,40}>"
    r"|^\s*#{1,6}\s*(?:system|assistant|user|human|instructions?)\b[ \t]*:?"
    r"|^\s*(?:system|assistant|user|human)\s*:",
    re.IGNORECASE | re.MULTILINE,
)
_SUBJECT = r"(?:instructions?|prompts?|rules|guidelines|directions|context|messages?)"
_ORDERS = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b.{0,40}\b(?:previous|prior|above|earlier|"
    rf"preceding|all|any|your|these|the)\b.{{0,40}}\b{_SUBJECT}\b"
    rf"|\b(?:new|real|actual|updated|secret)\s+(?:system\s+)?{_SUBJECT}\s*(?::|are\b|is\b)"
    r"|\byou\s+(?:are|must|should|will|have\s+to|need\s+to)\s+(?:now|always|never|instead|only|"
    r"immediately|ignore|propose|answer|reply|respond|approve|accept|output|write|print|act)\b"
    r"|\b(?:attention|note|message|instructions?|important)\b.{0,20}\b(?:to|for)\s+(?:the\s+|all\s+|"
    r"any\s+|other\s+)?(?:ai|llm|language\s+models?|models?|assistants?|agents?|reviewers?|readers?"
    r"|researchers?)\b"
    r"|\bas\s+an?\s+(?:ai|llm|language\s+model|assistant)\b"
    r"|\b(?:system|developer)\s+(?:prompt|message|override)\b"
    r"|\b(?:pretend|act\s+as|role-?play)\b.{0,30}\b(?:you|as|that)\b"
    r"|\b(?:reveal|print|show|repeat|leak)\b.{0,30}\b(?:your|the)\b.{0,20}\b(?:prompt|api\s*key|key"
    r"|secrets?|seeds?|holdout)\b"
    r"|\b(?:always|must)\s+(?:answer|reply|respond|propose|approve|accept|advise)\b",
    re.IGNORECASE | re.DOTALL,
)


def addresses_the_reader(text: str) -> bool:
    """Whether a text reads like instructions to whoever reads it."""
    spaced = re.sub(r"[\s_*`'\"]+", " ", _CONTROL.sub("", text))
    return bool(_ORDERS.search(spaced))


def inert(text: str, limit: int = LINE_CHARS) -> str:
    """A text in one line, without control characters and what frames a conversation.

    One of more than `limit` characters is cut and ends in an ellipsis.
    """
    clean = _unframed(_CONTROL.sub("", text.replace("\r\n", "\n")), " ")
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _unframed(text: str, gap: str) -> str:
    """Without what frames a conversation; what is left after one removal may be another frame."""
    for _ in range(REMOVALS):
        clean = _FRAME.sub(gap, text)
        if clean == text:
            return clean
        text = clean
    return re.sub(r"[<>|\[\]#:]", gap, text)  # nobody nests them so deeply by accident


class Quoter:
    """Quotes the texts of one prompt. Its fences are named after the prompt's content and a key."""

    def __init__(self, key: bytes, content: str, told: set[str] | None = None) -> None:
        """The same key and content give the same fences, so that equal prompts stay equal.

        Args:
            key: What no author knows.
            content: What the prompt is about.
            told: Texts that the log has warned of; those of this prompt are added.
        """
        self.nonce = hmac.new(key, content.encode(), hashlib.sha256).hexdigest()[:16]
        self._told = set() if told is None else told

    def line(self, text: str, source: str, limit: int = LINE_CHARS) -> str:
        """A text of one author in one line; what reads like instructions is withheld."""
        clean = inert(text, limit)
        if addresses_the_reader(text) or addresses_the_reader(clean):
            self._warn(source, text)
            return WITHHELD
        return self._unfenced(clean)

    def code(self, text: str, source: str, limit: int) -> str:
        """Code, in which lines that read like instructions become a comment.

        Line ends and indentation stay, so that what is quoted can be searched for.
        """
        kept = []
        for line in _CONTROL.sub("", text[:limit]).splitlines():
            clean, indent = _unframed(line, ""), line[: len(line) - len(line.lstrip())]
            if addresses_the_reader(line) or addresses_the_reader(clean):
                self._warn(source, line)
                clean = f"{indent}# {WITHHELD}"
            elif clean != line and line.lstrip().startswith("#"):
                clean = f"{indent}# {clean.lstrip('# ')}"
            kept.append(self._unfenced(clean))
        return "\n".join([*kept, CUT] if len(text) > limit else kept)

    def _warn(self, source: str, text: str) -> None:
        """Say in the log what was not shown, and where it came from; of each text once."""
        shown = inert(text, 200)
        if shown not in self._told and len(self._told) < MOST_TOLD:
            self._told.add(shown)
            logs.get("context").warning("withheld from a prompt", source=source, text=shown)

    def _unfenced(self, text: str) -> str:
        return text.replace(self.nonce, "")


def fenced(body: str, nonce: str) -> str:
    """A text between the two lines that say that it is nothing but evidence."""
    return f"<<evidence {nonce}>>\n{body}\n<<end {nonce}>>"


# ------------------------------------------------------------------------------ packing


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a prompt."""

    title: str
    items: tuple[str, ...]
    """Lines or blocks, those that matter most first."""
    priority: int
    """What is more important has a smaller number."""
    least: int = 0
    """Items without which it is left out; it may be cut down to them."""
    short: str = ""
    """What stands in its place when it does not fit, e.g. signatures instead of code."""
    file: str = ""
    """The file that it shows, if it shows one."""
    needed: bool = False
    """Whether it is kept even if the budget does not allow for it."""
    nonce: str = ""
    """Name of the fences around it, if it was written by others."""

    @property
    def text(self) -> str:
        """With its title, as it stands in the prompt; empty without items."""
        if not self.items:
            return ""
        body = "\n".join(self.items)
        return f"## {self.title}\n" + (fenced(body, self.nonce) if self.nonce else body)


def pack(sections: Sequence[Section], budget: int, count: Callable[[str], int]) -> str:
    """The sections in their order, cut so that all together take at most `budget` tokens.

    Each section first gets what it cannot do without, the important ones before the others; then,
    in the same order, what else fits. Sections that must be there are kept whatever they take.

    Args:
        sections: Parts of the prompt, in the order in which they shall stand.
        budget: Tokens.
        count: Tokens of a text.
    """
    order = sorted(range(len(sections)), key=lambda place: sections[place].priority)
    texts: dict[int, str] = {}
    left = budget
    for place in order:
        smallest = _smallest(sections[place])
        cost = _cost(smallest, count)
        if smallest and (cost <= left or sections[place].needed):
            texts[place] = smallest
            left -= cost
    for place in order:
        section = sections[place]
        room = left + _cost(texts.get(place, ""), count)
        best = _largest(section, room, count)
        if best and _cost(best, count) > _cost(texts.get(place, ""), count):
            left = room - _cost(best, count)
            texts[place] = best
    return "\n\n".join(texts[place] for place in sorted(texts))


def _cost(text: str, count: Callable[[str], int]) -> int:
    return count(text) + 2 if text else 0  # and the empty line


def _smallest(section: Section) -> str:
    if section.needed and not section.least:
        return section.text
    return _first(section, section.least) if section.least else ""


def _largest(section: Section, room: int, count: Callable[[str], int]) -> str:
    """As many of the items as fit into `room`; what stands in their place if none do."""
    if _cost(section.text, count) <= room:
        return section.text
    if section.short:
        text = replace(section, items=(section.short,)).text
        return text if _cost(text, count) <= room else ""
    low, high = max(1, section.least), len(section.items)
    if not high or _cost(_first(section, low), count) > room:
        return ""
    while low < high:  # the largest number of items that fits
        middle = (low + high + 1) // 2
        if _cost(_first(section, middle), count) <= room:
            low = middle
        else:
            high = middle - 1
    return _first(section, low)


def _first(section: Section, number: int) -> str:
    """The first items, and how many there are besides."""
    more = len(section.items) - number
    items = section.items[:number]
    return replace(section, items=(*items, MARK.format(more)) if more > 0 else items).text


# ------------------------------------------------------------------------------ code


def outline(source: str) -> str:
    """Classes, functions and their arguments in a Python file; its first lines if it is none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return "\n".join(source.splitlines()[:10])
    return "\n".join(_signatures(tree.body, ""))


def _signatures(body: Sequence[ast.stmt], indent: str) -> list[str]:
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(f"{indent}def {node.name}({ast.unparse(node.args)})")
        elif isinstance(node, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, node.bases))
            found.append(f"{indent}class {node.name}({bases})".replace("()", ""))
            found += _signatures(node.body, indent + "    ")
    return found
