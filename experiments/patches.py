"""Code changes: search/replace edits on declared files, their canonical text, what they amount to.

A patch text (`Variant.patch`) is a first line that names the resulting code, a second line that
names the code it was made for, and unified diffs of the changed files:

    society-patch 1 <sha256 of the normalised code of all editable files>
    base <sha256 of the same over the task's own files>
    --- a/gpt.py
    +++ b/gpt.py
    @@ -88,7 +88,7 @@ _feed_forward
    ...

Normalised code has no comments, no docstrings and no formatting, so that two texts that compute the
same in the same way are one experiment. It is written in a form of our own, which does not depend
on the version of Python. Files other than Python count as text, without white space at the ends of
lines. A patch is always relative to the task's own files: one on top of a champion's code is the
change of both together. Pure: nothing here reads or writes a file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches, unified_diff
from functools import lru_cache
from typing import Any

from society.errors import SocietyError
from society.experiments.coderules import TRAINER, Rules, violations
from society.records import PATCH_MARK

__all__ = [
    "BROKEN_MARK",
    "TRAINER",
    "BadPatch",
    "Edit",
    "Rules",
    "Summary",
    "apply_edits",
    "broken",
    "canonical",
    "check",
    "digest",
    "effective",
    "executed",
    "lines",
    "reason_of",
    "rules_of",
    "summary",
]

BASE_MARK = "base "
BROKEN_MARK = "society-patch broken"
"""First line of a text that keeps edits which could not be applied; no executor runs it."""

MAX_EDITS = 40
MAX_EDIT_BYTES = 40 * 1024
"""All edits of a proposal together, searched and replaced text, in UTF-8."""
MAX_LINE = 500
"""Characters of a line that an edit writes."""
MAX_PATCH_BYTES = 256 * 1024
"""A patch text: the changes of a whole line of champions."""
MAX_REASON = 2000
"""Characters of the reason that a broken patch keeps."""
CONTEXT = 3
"""Unchanged lines around a change in a diff."""
SHOWN = 12
"""Most lines of a file that a message shows."""
SHOWN_WIDTH = 120

HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: .*)?\Z")
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of which source needs none: controls, bidi marks, surrogates, unassigned."""


class BadPatch(SocietyError):
    """Edits that cannot be applied, or whose result no run may be spent on."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the one place in a file where `search` occurs."""

    file: str
    search: str
    replace: str


@dataclass(frozen=True, slots=True)
class Summary:
    """How large a code change is, in lines of normalised code."""

    added: int
    removed: int
    files: tuple[str, ...]
    """Files whose code differs, sorted."""
    functions: tuple[str, ...]
    """What was added, changed or removed, e.g. `gpt.py:_block`; a method as `Class.method`."""

    @property
    def net(self) -> int:
        """Lines that the code has grown by; negative for less code."""
        return self.added - self.removed


# --- edits ----------------------------------------------------------------------------------------


def apply_edits(sources: Mapping[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """The files after the edits, made one after the other.

    Line ends become those of Unix. White space at the ends of lines may differ if the place is
    still the only one.

    Raises:
        BadPatch: a file that may not be edited, a place that is not there or not the only one, too
            much text, or characters that no source needs. The message says how to put it right.
    """
    _check_size(edits)
    files = {name: _unix(text) for name, text in sources.items()}
    for number, edit in enumerate(edits, 1):
        where = f"Edit {number} ({_shown(edit.file, 80)})" if len(edits) > 1 else edit.file
        if edit.file not in files:
            raise BadPatch(_unknown_file(edit.file, files))
        _check_text(f"Edit {number}, search", _unix(edit.search))
        _check_text(f"Edit {number}, replace", _unix(edit.replace))
        _check_width(f"Edit {number}, replace", _unix(edit.replace).split("\n"))
        files[edit.file] = _replaced(files[edit.file], edit, where)
    return files


def _check_size(edits: Sequence[Edit]) -> None:
    if len(edits) > MAX_EDITS:
        raise BadPatch(f"{len(edits)} edits; at most {MAX_EDITS} are allowed: make fewer changes.")
    size = sum(len(_bytes(edit.search)) + len(_bytes(edit.replace)) for edit in edits)
    if size > MAX_EDIT_BYTES:
        raise BadPatch(
            f"The edits hold {size} bytes; at most {MAX_EDIT_BYTES} are allowed: search for a few "
            "lines only, and change less at once."
        )


def _unknown_file(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    same_name = [one for one in names if one.rsplit("/")[-1] == name.rsplit("/")[-1]]
    near = same_name or get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    allowed = ", ".join(names)
    return f"{_shown(repr(name), 100)} is no file that may be edited.{hint} Allowed: {allowed}."


def _replaced(text: str, edit: Edit, where: str) -> str:
    search, replace = _unix(edit.search), _unix(edit.replace)
    if not search.strip():
        raise BadPatch(f"{where}: `search` is empty; copy the lines that are to be replaced.")
    places = list(_places(text, search))
    if len(places) == 1:
        return text[: places[0]] + replace + text[places[0] + len(search) :]
    if not places:
        return _loosely_replaced(text, search, replace, where)
    rows = ", ".join(str(text.count("\n", 0, place) + 1) for place in places[:8])
    raise BadPatch(
        f"{where}: `search` occurs {len(places)} times (lines {rows}) and must occur exactly once; "
        "add a line before or after it."
    )


def _places(text: str, search: str) -> Iterator[int]:
    """Where a text occurs, overlaps counted."""
    place = text.find(search)
    while place >= 0:
        yield place
        place = text.find(search, place + 1)


def _loosely_replaced(text: str, search: str, replace: str, where: str) -> str:
    """As `_replaced` for whole lines, but for white space at their ends."""
    have = text.split("\n")
    bare = [line.rstrip() for line in have]
    wanted = [line.rstrip() for line in search.strip("\n").split("\n")]
    places = [
        at for at in range(len(bare) - len(wanted) + 1) if bare[at : at + len(wanted)] == wanted
    ]
    if len(places) != 1:
        why = "is not in the file" if not places else f"occurs {len(places)} times"
        raise BadPatch(
            f"{where}: `search` {why} and must occur exactly once, character by character. "
            f"The closest lines are:\n{_closest(have, wanted)}"
        )
    new = replace
    if search.startswith("\n"):
        new = new.removeprefix("\n")
    if search.endswith("\n"):
        new = new.removesuffix("\n")
    gone = search.endswith("\n") and not replace.strip("\n")
    end = places[0] + len(wanted)
    return "\n".join([*have[: places[0]], *([] if gone else [new]), *have[end:]])


def _closest(have: Sequence[str], wanted: Sequence[str]) -> str:
    """The lines most like what was searched for, with their numbers."""
    anchor = next((row for row, line in enumerate(wanted) if line.strip()), 0)
    sought = SequenceMatcher(b=wanted[anchor].strip()[:MAX_LINE], autojunk=False)

    def likeness(row: int) -> float:
        sought.set_seq1(have[row].strip()[:MAX_LINE])
        return sought.ratio() if sought.quick_ratio() > 0.3 else 0.0

    best = sorted(range(len(have)), key=likeness, reverse=True)[:8]
    starts = {max(0, row - anchor) for row in best} or {0}
    block = SequenceMatcher(b="\n".join(wanted)[:MAX_REASON], autojunk=False)

    def closeness(start: int) -> float:
        block.set_seq1("\n".join(have[start : start + len(wanted)])[:MAX_REASON])
        return block.ratio()

    start = max(sorted(starts), key=closeness)
    rows = range(start, min(len(have), start + min(len(wanted) + 2, SHOWN)))
    return "\n".join(f"{row + 1}: {_shown(have[row], SHOWN_WIDTH)}" for row in rows)


def _check_text(what: str, text: str) -> None:
    """Refuse characters that no source needs, and that hide what a text says."""
    for row, line in enumerate(text.split("\n"), 1):
        for char in line:
            if char != "\t" and unicodedata.category(char) in INVISIBLE:
                name = unicodedata.name(char, "a control character")
                raise BadPatch(f"{what}, line {row}: U+{ord(char):04X} ({name}) is not allowed.")


def _check_width(what: str, texts: Iterable[str]) -> None:
    for row, line in enumerate(texts, 1):
        if len(line) > MAX_LINE:
            raise BadPatch(
                f"{what}, line {row}: {len(line)} characters; at most {MAX_LINE} are allowed."
            )


# --- the text of a patch --------------------------------------------------------------------------


def canonical(sources: Mapping[str, str], effective: Mapping[str, str]) -> str | None:
    """The patch text (`Variant.patch`) from `sources` to `effective`; None if nothing changes.

    Raises:
        BadPatch: not the same files, a syntax error, or more change than a text may hold.
    """
    if set(effective) != set(sources):
        raise BadPatch(f"A patch changes files only; they are {', '.join(sorted(sources))}.")
    base, result = digest(sources), digest(effective)
    if base == result:
        return None
    parts = [f"{PATCH_MARK}{result}", f"{BASE_MARK}{base}"]
    for name in sorted(sources):
        parts += _diff(name, _lines(sources[name]), _lines(effective[name]))
    text = "\n".join(parts) + "\n"
    if len(_bytes(text)) > MAX_PATCH_BYTES:
        raise BadPatch(f"The change is larger than {MAX_PATCH_BYTES} bytes; change less.")
    return text


def effective(sources: Mapping[str, str], patch: str | None) -> dict[str, str]:
    """The files that a patch text amounts to; those of the task for None.

    Raises:
        BadPatch: the text is not one that `canonical` wrote for these sources. Nothing in it is
            trusted: the first line must name what the diffs amount to.
    """
    if patch is None:
        return dict(sources)
    reason = reason_of(patch)
    if reason is not None:
        raise BadPatch(reason)
    named, based, diffs = _head(patch)
    if based != digest(sources):
        raise BadPatch(
            "The patch was made for another version of the code "
            f"({based[:12]}; this is {digest(sources)[:12]})."
        )
    files = {name: _unix(text) for name, text in sources.items()}
    for name, hunks in _parsed(diffs, files).items():
        files[name] = _patched(name, _lines(files[name]), hunks)
    if digest(files) != named:
        raise BadPatch("The patch does not amount to the code that its first line names.")
    return files


def digest(files: Mapping[str, str]) -> str:
    """The sha256 of the normalised code of these files, 64 hex digits. Raises `BadPatch`."""
    whole = hashlib.sha256()
    for name in sorted(files):
        for part in (name, _normalised(name, files[name])):
            content = _bytes(part)
            whole.update(b"%d:" % len(content) + content)
    return whole.hexdigest()


def executed(
    files: Mapping[str, str], sources: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The text that is run for these files, and for each line of it that of its author.

    Code that is not the task's own is written anew from its normal form: what the digest does not
    count, no run can depend on (docstrings, comments and line numbers can be read by a program).
    Other files, and those whose code is the task's own, stay as they are, without an entry in the
    second answer.

    Raises:
        BadPatch: Code that cannot be written so.
    """
    texts, rows = dict(files), {}
    for name, text in files.items():
        if not _is_python(name):
            continue
        wanted = _normalised(name, text)
        if wanted == _normalised(name, sources[name]):
            texts[name] = sources[name]
            continue
        tree = _bare(_parse(name, text))
        try:
            texts[name] = ast.unparse(tree) + "\n"
        except (ValueError, RecursionError) as error:
            raise BadPatch(f"{name}: {error}.") from error
        if _normalised(name, texts[name]) != wanted:
            raise BadPatch(f"{name}: the code cannot be written in a normal form; simplify it.")
        rows[name] = _rows(tree, _parse(name, texts[name]))
    return texts, rows


def _rows(tree: ast.Module, other: ast.Module) -> list[int]:
    """For each line of `other`, from 1 (the first entry is 0), that of `tree`, which is equal."""
    found: dict[int, int] = {}
    for theirs, ours in zip(ast.walk(tree), ast.walk(_bare(other)), strict=True):
        if hasattr(theirs, "lineno") and hasattr(ours, "lineno"):
            found.setdefault(ours.lineno, theirs.lineno)
    rows = [0]
    for row in range(1, max(found, default=0) + 1):
        rows.append(found.get(row, rows[-1]))
    return rows


def _head(patch: str) -> tuple[str, str, list[str]]:
    """The digests of the first two lines, and the lines after them."""
    if len(_bytes(patch)) > MAX_PATCH_BYTES:
        raise BadPatch(f"The patch is larger than {MAX_PATCH_BYTES} bytes.")
    first, _, rest = patch.partition("\n")
    second, _, diffs = rest.partition("\n")
    named, based = first.removeprefix(PATCH_MARK), second.removeprefix(BASE_MARK)
    is_patch = first.startswith(PATCH_MARK) and second.startswith(BASE_MARK)
    if not is_patch or not all(re.fullmatch(r"[0-9a-f]{64}", one) for one in (named, based)):
        raise BadPatch(
            f"A patch begins with '{PATCH_MARK}<sha256>' and '{BASE_MARK}<sha256>'; this one with "
            f"{_shown(repr(first), 100)}."
        )
    if not diffs.endswith("\n"):
        raise BadPatch("The patch is cut off, or has no diff.")
    return named, based, diffs[:-1].split("\n")


def _diff(name: str, old: list[str], new: list[str]) -> list[str]:
    """A unified diff whose hunks name the function or class that they change first, as git's do."""
    found = list(unified_diff(old, new, f"a/{name}", f"b/{name}", n=CONTEXT, lineterm=""))
    owners = _owners(name, old)
    for row, line in enumerate(found):
        hunk = HUNK.match(line)
        if hunk is not None:
            same = next(at for at, later in enumerate(found[row + 1 :]) if later[0] != " ")
            owner = owners.get(int(hunk[1]) + same) or owners.get(int(hunk[1]) + same - 1)
            found[row] = f"{line} {owner}" if owner else line
    return found


def _owners(name: str, text: list[str]) -> dict[int, str]:
    """Line number -> the innermost function or class around it."""
    if not _is_python(name):
        return {}
    owners: dict[int, str] = {}
    for path, node in _definitions(_parse(name, "\n".join(text))):
        first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
        owners.update(dict.fromkeys(range(first, (node.end_lineno or first) + 1), path))
    return owners


@dataclass(frozen=True, slots=True)
class _Hunk:
    """One piece of a diff; lines with their marks."""

    old_start: int
    new_start: int
    """Lines before it in the old and the new file."""
    body: tuple[str, ...]


def _parsed(diffs: Sequence[str], files: Mapping[str, str]) -> dict[str, list[_Hunk]]:
    """File -> its hunks; nothing but diffs of these files may be there."""
    found: dict[str, list[_Hunk]] = {}
    at = 0
    while at < len(diffs):
        name = diffs[at].removeprefix("--- a/")
        heads = [f"--- a/{name}", f"+++ b/{name}"]
        if list(diffs[at : at + 2]) != heads or name not in files or name in found:
            raise BadPatch(
                f"Patch, line {at + 3}: {_shown(repr(diffs[at]), 100)} begins no diff of "
                f"an editable file, or of one a second time."
            )
        found[name], at = [], at + 2
        while at < len(diffs) and (match := HUNK.match(diffs[at])):
            hunk, at = _hunk(diffs, at, match)
            found[name].append(hunk)
        if not found[name]:
            raise BadPatch(f"Patch, line {at + 2}: a diff without a change.")
    return found


def _hunk(diffs: Sequence[str], at: int, match: re.Match[str]) -> tuple[_Hunk, int]:
    """The hunk that begins in a line, and the line after it."""
    old_at, old, new_at, new = (1 if group is None else int(group[:9]) for group in match.groups())
    old_start, new_start = old_at - (old > 0), new_at - (new > 0)
    row = at + 1
    while (old or new) and row < len(diffs) and diffs[row][:1] in ("+", "-", " "):
        old -= diffs[row][0] != "+"
        new -= diffs[row][0] != "-"
        row += 1
    if old or new or row == at + 1:
        raise BadPatch(f"Patch, line {at + 3}: the hunk does not have the lines that it announces.")
    return _Hunk(old_start, new_start, tuple(diffs[at + 1 : row])), row


def _patched(name: str, old: list[str], hunks: Iterable[_Hunk]) -> str:
    """The file after its hunks, each of which must fit exactly."""
    result: list[str] = []
    done = 0
    known = set(old)
    for hunk in hunks:
        before = [line[1:] for line in hunk.body if line[0] != "+"]
        after = [line[1:] for line in hunk.body if line[0] != "-"]
        end = hunk.old_start + len(before)
        fits = hunk.old_start >= done and old[hunk.old_start : end] == before
        result += old[done : hunk.old_start]
        if not fits or len(result) != hunk.new_start:
            raise BadPatch(f"{name}, line {hunk.old_start + 1}: the patch does not fit the file.")
        fresh = [line for line in after if line not in known]
        _check_text(f"{name}, added", "\n".join(fresh))
        _check_width(f"{name}, added", fresh)
        result += after
        done = end
    return "".join(f"{line}\n" for line in (*result, *old[done:]))


# --- edits that could not be applied --------------------------------------------------------------


def broken(reason: str, edits: Sequence[Edit]) -> str:
    """A text for `Variant.patch` that keeps edits which do not apply, and why; bounded."""
    kept, room = [], MAX_EDIT_BYTES
    for edit in edits[:MAX_EDITS]:
        parts = {"file": edit.file, "search": edit.search, "replace": edit.replace}
        room -= len(json.dumps(parts))
        if room < 0:
            break
        kept.append(parts)
    content = {"reason": _cut(reason.strip(), MAX_REASON), "edits": kept}
    return f"{BROKEN_MARK}\n{json.dumps(content, sort_keys=True)}\n"


def reason_of(patch: str | None) -> str | None:
    """Why the edits of a broken patch did not apply; None for any other patch."""
    if patch is None or not patch.startswith(BROKEN_MARK):
        return None
    text = patch.removeprefix(BROKEN_MARK).strip()
    try:
        reason = json.loads(text)["reason"]
    except (ValueError, KeyError, TypeError, RecursionError):
        reason = text
    return _cut(str(reason), MAX_REASON) or "The edits do not apply."


# --- what a change uses and amounts to ------------------------------------------------------------


def check(effective: Mapping[str, str], sources: Mapping[str, str], rules: Rules = TRAINER) -> None:
    """Raise `BadPatch` if the changed code uses what candidate code must not use.

    An early and clear answer to an honest mistake, and no security boundary: code that means to get
    around it can. What keeps a run from what is not its own are the sandbox and the guard.
    """
    found = []
    for name in sorted(effective):
        if effective[name] == sources.get(name) or not _is_python(name):
            continue
        before, after = _parse(name, sources.get(name, "")), _parse(name, effective[name])
        found += [f"{name}, {one}" for one in violations(after, before, rules, set(sources))]
    if found:
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise BadPatch(" ".join(found[:5]) + more)


def rules_of(task: object) -> Rules:
    """The rules for a task's code: its attribute `rules`, else those for the trainer."""
    rules = getattr(task, "rules", TRAINER)
    return rules if isinstance(rules, Rules) else TRAINER


def summary(sources: Mapping[str, str], effective: Mapping[str, str]) -> Summary:
    """How large a change is. Raises `BadPatch` for code that cannot be parsed."""
    added = removed = 0
    files, functions = [], []
    for name in sorted({*sources, *effective}):
        old, new = sources.get(name, ""), effective.get(name, "")
        if _normalised(name, old) == _normalised(name, new):
            continue
        files.append(name)
        before, after = _code_lines(name, old), _code_lines(name, new)
        for tag, a, b, c, d in SequenceMatcher(None, before, after, False).get_opcodes():
            if tag != "equal":
                removed, added = removed + b - a, added + d - c
        functions += [f"{name}:{path}" for path in _touched(name, old, new)]
    return Summary(added, removed, tuple(files), tuple(functions))


def lines(effective: Mapping[str, str]) -> int:
    """Lines of normalised code in all files: what "same result, less code" is measured in."""
    return sum(len(_code_lines(name, text)) for name, text in effective.items())


def _code_lines(name: str, text: str) -> list[str]:
    """The lines of a file without comments, docstrings and blank lines."""
    if _is_python(name):
        try:
            text = ast.unparse(_bare(_parse(name, text)))
        except RecursionError as error:
            raise BadPatch(f"{name}: the code is nested too deeply.") from error
    return [line for line in _lines(text) if line.strip()]


def _touched(name: str, old: str, new: str) -> list[str]:
    """The definitions that differ; a class is named only if it differs outside its methods."""
    if not _is_python(name):
        return []
    before, after = _outlines(name, old), _outlines(name, new)
    return sorted(path for path in {*before, *after} if before.get(path) != after.get(path))


def _outlines(name: str, text: str) -> dict[str, list[str]]:
    """Path -> what the definition holds but for definitions within, in normal form."""
    tree = _bare(_parse(name, text))
    found: dict[str, list[str]] = {}
    for path, node in _definitions(tree):
        found.setdefault(path, []).append(_form(_hollow(node)))
    return found


def _hollow(node: Definition) -> ast.AST:
    """The definition without those within it."""
    fields: dict[str, Any] = dict(ast.iter_fields(node))
    fields["body"] = [one for one in node.body if not isinstance(one, DEFINITION)]
    return type(node)(**fields)


# --- normal form ----------------------------------------------------------------------------------

DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@lru_cache(maxsize=64)
def _normalised(name: str, text: str) -> str:
    """What counts of a file: its code without comments, docstrings and formatting, or its text."""
    if not _is_python(name):
        return "\n".join(line.rstrip() for line in _unix(text).rstrip().split("\n"))
    try:
        return _form(_bare(_parse(name, text)))
    except RecursionError as error:
        raise BadPatch(f"{name}: the code is nested too deeply.") from error


def _parse(name: str, text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():  # of odd escapes, which are the author's business
            warnings.simplefilter("ignore")
            return ast.parse(_unix(text))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        found = f": {_shown(error.text.strip(), SHOWN_WIDTH)!r}" if error.text else ""
        raise BadPatch(f"{name}{line}: {error.msg}{found}.") from error
    except (ValueError, RecursionError, MemoryError) as error:
        why = str(error) or "the code is nested too deeply"
        raise BadPatch(f"{name}: {why}.") from error


def _bare(tree: ast.Module) -> ast.Module:
    """The tree without docstrings and other statements that are mere constants."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                kept = [one for one in body if not _is_constant(one)]
                empty = field == "body" and not isinstance(node, ast.Module)
                setattr(node, field, kept or ([ast.Pass()] if empty else []))
    return tree


def _is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _form(node: object) -> str:
    """A tree as text that is the same in every version of Python: no empty field is written."""
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!r}"
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_form(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name not in ("ctx", "type_comment")
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_form, node))}]"
    return repr(node)


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """All functions and classes, with their paths, outer ones first."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, DEFINITION):
            yield f"{prefix}{node.name}", node
            yield from _definitions(node, f"{prefix}{node.name}.")
        else:
            yield from _definitions(node, prefix)


# --- text -----------------------------------------------------------------------------------------


def _is_python(name: str) -> bool:
    return name.endswith(".py")


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str) -> list[str]:
    """The lines of a text; whether the last one is ended does not count."""
    return _unix(text).removesuffix("\n").split("\n") if text else []


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _shown(text: str, length: int) -> str:
    """A bounded text without anything invisible."""
    plain = "".join(
        "?" if unicodedata.category(char) in INVISIBLE else char for char in text[:length]
    )
    return plain if len(text) <= length else f"{plain}..."
