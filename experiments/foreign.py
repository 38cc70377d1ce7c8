"""What a run with a stranger's code says and leaves behind, and how much of it is believed.

Such a run may say anything. Its report must have the expected form; what it says was spent is held
against what our own code takes for the same recipe (the `Yardstick`) and against the clocks of the
process that watched it. What it left behind is taken over once all of its processes are gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from society.errors import SocietyError
from society.experiments.executor import CURVE_POINTS, describe_error
from society.experiments.processes import Message, Watched, stopped
from society.experiments.task import Diverged, Limits, Refused, TrainReport, Yardstick
from society.model.device import is_out_of_memory
from society.records import Budget, BudgetKind, Outcome

REPORT_BYTES = 256 << 10
"""Longest report."""
SLACK, SPARE_S = 1.5, 1.0
"""Of the time that the recipe takes with our own code: how much more a run may take."""
ANSWER_SLACK, ANSWER_SPARE_S = 4.0, 0.5
"""Of the time in which our own code answers: how much more a model may take, and to start."""
COMPILE_SLACK, START_S = 3.0, 5.0
"""The same for what no budget pays for: compiling, and starting an accelerator."""
ERROR_CHARS = 1_000
PROBLEM_CHARS = 600
SAMPLE_CHARS = 128
MOST = float(1 << 53)
"""No honest count is larger."""
MODEL_BYTES, MODEL_FILES = 2 << 30, 100_000
"""What a run may leave behind."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_KEPT = frozenset("\n\t")


class Blamed(SocietyError):
    """Foreign code raised something; says what, and in which of its lines."""


def clean(text: str) -> str:
    """Text of a stranger without what moves a cursor, hides or reorders anything on a screen."""
    text = _ESCAPES.sub("", text)
    return "".join(c for c in text if c in _KEPT or unicodedata.category(c)[0] != "C")


def one_line(text: str, most: int = ERROR_CHARS) -> str:
    """The same on one line, cut."""
    line = " ".join(clean(text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 4] + " ..."


# ---------------------------------------------------------------------------------- reports


def parse(payload: bytes, **wanted: Callable[[object], object]) -> Message:
    """The report of a run, which completed with exactly the keys `wanted`, or failed.

    Raises:
        Refused: It has another form. A value is refused by its function, with `ValueError`.
    """
    try:
        values = json.loads(payload, parse_constant=_no_constant)
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return _checked(values, wanted)
    except (ValueError, OverflowError, RecursionError) as error:  # a count that no float can hold
        raise Refused(f"its report is not one: {one_line(str(error), 200)}") from error


def _checked(values: Message, wanted: Mapping[str, Callable[[object], object]]) -> Message:
    outcome = values.pop("outcome", None)
    if outcome == Outcome.COMPLETED:
        if values.keys() != wanted.keys():
            raise ValueError(f"found {sorted(values)}, expected {sorted(wanted)}")
        return {"outcome": Outcome.COMPLETED} | {
            name: check(values[name]) for name, check in wanted.items()
        }
    if outcome not in (Outcome.DIVERGED, Outcome.CRASHED, Outcome.REJECTED):
        raise ValueError("unknown outcome")
    if not isinstance(error := values.get("error"), str):
        raise ValueError("a failure without an error")
    return {"outcome": Outcome(outcome), "error": one_line(error)}


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number")


def report(value: object) -> Message:
    """A check for `parse`: the values of a `TrainReport`."""
    names = set(TrainReport.__slots__)
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"report: expected {sorted(names)}")
    mfu, curve = value["mfu"], value["curve"]
    if not isinstance(curve, list) or len(curve) > CURVE_POINTS:
        raise ValueError(f"curve: expected at most {CURVE_POINTS} numbers")
    counts = {name: _count(name, value[name]) for name in ("tokens", "steps", "device_mem_bytes")}
    seconds = {
        name: _number(name, value[name], least=0)
        for name in ("flops", "train_s", "compile_s", "step_flops")
    }
    return {
        **counts,
        **seconds,
        "curve": [_number("curve", item, least=-1e12, most=1e12) for item in curve],
        "mfu": None if mfu is None else _number("mfu", mfu, least=0),
    }


def samples(value: object) -> list[str]:
    """A check for `parse`: two short words."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("samples: expected two")
    if not all(isinstance(item, str) and len(item) <= SAMPLE_CHARS for item in value):
        raise ValueError("samples: expected short texts")
    return value


def _number(name: str, value: object, *, least: float, most: float = 1e30) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: no number")
    if not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{name}: {value:g} is out of range")
    return float(value)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"{name}: no count")
    return value


# --------------------------------------------------------------------------------- spending


def most_s(yard: Yardstick) -> float:
    """Seconds that a run may take where the recipe takes `yard.cpu_s` with our own code."""
    return SLACK * max(0.0, yard.cpu_s) + SPARE_S


def concluded(
    seen: Watched, yard: Yardstick, budget: Budget, limits: Limits, *, accelerator: bool
) -> Message:
    """The outcome of a training of a stranger's code, and what is believed of its report."""
    cpu_s = seen.cpu_s - float((seen.opening or {}).get("cpu_s", 0.0))
    if not accelerator and (cpu_s > most_s(yard) or seen.stop == "cpu"):
        return rejected(_too_long(cpu_s, yard, "processor time"))
    if not seen.payload:
        return stopped(seen, limits)
    try:
        message = parse(seen.payload, report=report)
        if message["outcome"] == Outcome.COMPLETED:
            claim = TrainReport(**message["report"] | {"curve": tuple(message["report"]["curve"])})
            wall_s = seen.ended_at - seen.opened_at
            message["report"] = believed(claim, yard, budget, wall_s, accelerator=accelerator)
    except Refused as error:
        return rejected(str(error))
    return message


def believed(
    claim: TrainReport, yard: Yardstick, budget: Budget, wall_s: float, *, accelerator: bool
) -> Message:
    """What is recorded of a report. Raises `Refused` if more was spent than the budget pays for.

    A completed run is charged the whole budget. `wall_s` is what we measured around all of it.
    """
    if not 1 <= claim.steps <= yard.steps:
        raise Refused(f"Reported {claim.steps} steps; the budget pays for 1 to {yard.steps}.")
    unpaid_s = COMPILE_SLACK * yard.compile_s + (START_S if accelerator else SPARE_S)
    if budget.kind is BudgetKind.SECONDS:
        if wall_s > (most := budget.amount + unpaid_s):
            raise Refused(
                f"Took {wall_s:.3g} s of wall time; the budget is {budget.amount:g} s, and with "
                f"starting and compiling at most {most:.3g} s are allowed."
            )
    elif accelerator and yard.cpu_s and wall_s > most_s(yard) + unpaid_s:
        raise Refused(_too_long(wall_s, yard, "wall time"))
    spent = budget.amount if budget.kind is BudgetKind.FLOPS else yard.flops
    return {
        "flops": spent,
        "tokens": round(yard.tokens * claim.steps / yard.steps),
        "steps": claim.steps,
        "curve": claim.curve,
        "train_s": min(claim.train_s, wall_s),
        "compile_s": min(claim.compile_s, wall_s),
        "mfu": None,  # by its own clock
        "device_mem_bytes": claim.device_mem_bytes,
        "step_flops": claim.step_flops,
    }


def served(seen: Watched, limits: Limits) -> Message:
    """How a process that held a model ended; one that was left alone ended well."""
    if seen.stop == "line":
        return {"outcome": Outcome.COMPLETED}
    if not seen.payload:
        return stopped(seen, limits)
    try:
        return parse(seen.payload)
    except Refused as error:
        return rejected(str(error))


def answered(cpu_s: float, honest_s: float) -> str:
    """Why a model that took so many processor seconds to answer is refused; empty if it is not.

    What is computed there no budget pays for: a model could train on, or be far larger than it was
    in training. Honest code that multiplies more is the reason for the wide allowance.
    """
    most = ANSWER_SLACK * honest_s + ANSWER_SPARE_S
    if not honest_s or cpu_s <= most:
        return ""
    return (
        f"Took {cpu_s:.3g} s of processor time to answer what the shipped code answers in "
        f"{honest_s:.3g} s: at most {most:.3g} s are allowed."
    )


def tried(seen: Watched, own: Sequence[str], limits: Limits) -> Message:
    """What a trial showed: `problem`, which its author can act on, `same`, and its `bits`.

    `own` is what the same few steps gave with the task's own code.
    """
    if seen.opening is None:
        message = json.loads(seen.payload) if seen.payload else stopped(seen, limits)
        problem = message.get("problem", message.get("error", ""))
        return {"problem": spoken(problem), "same": False}
    if not seen.payload:
        return {"problem": _unfinished(seen, limits), "same": False}
    try:
        message = parse(seen.payload, samples=samples)
    except Refused as error:
        return {"problem": spoken(str(error)), "same": False}
    if message["outcome"] != Outcome.COMPLETED:
        return {"problem": spoken(message["error"]), "same": False}
    one, other = message["samples"]
    if one == other and own[0] != own[1]:
        problem = "Two seeds give the same model: the initial parameters must come from the seed."
        return {"problem": problem, "same": False}
    return {"problem": "", "same": list(own) == [one, other], "bits": [one, other]}


def _unfinished(seen: Watched, limits: Limits) -> str:
    if seen.stop == "time":
        return f"A few steps were not finished within {limits.timeout_s:g} s."
    return spoken(stopped(seen, limits)["error"])


def spoken(error: str) -> str:
    """An error in the words for its author: without the outcome's name, cleaned and cut."""
    for outcome in (Outcome.REJECTED, Outcome.CRASHED):
        error = error.removeprefix(f"{outcome}: ")
    text = clean(error).strip()
    return text if len(text) <= PROBLEM_CHARS else text[: PROBLEM_CHARS - 4] + " ..."


def _too_long(spent_s: float, yard: Yardstick, what: str) -> str:
    return (
        f"Took {spent_s:.3g} s of {what} where the recipe takes {yard.cpu_s:.3g} s: at most "
        f"{most_s(yard):.3g} s are allowed for the same budget."
    )


def rejected(reason: str) -> Message:
    """The outcome of a run that is refused."""
    return {"outcome": Outcome.REJECTED, "error": f"rejected: {reason}"}


# ----------------------------------------------------------------------------------- traces


@contextlib.contextmanager
def blamed(code: Path, rows: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Add the line of the stranger's file to the message of what is raised inside.

    Args:
        code: Folder with the files.
        rows: File -> the author's line for each of its lines, where they are not the same.

    Raises:
        Blamed: Instead of an exception that would be recorded as a crash.
    """
    try:
        yield
    except (Diverged, Refused):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise Blamed(blame(error, code, rows)) from error


def blame(error: BaseException, code: Path, rows: Mapping[str, Sequence[int]] = {}) -> str:
    """Type, message and the line of the stranger's file in which it happened, in one line."""
    text = one_line(describe_error(error) if isinstance(error, Exception) else repr(error))
    if isinstance(error, SyntaxError):
        found = error.filename, error.lineno
        text = f"{type(error).__name__}: {one_line(error.msg)}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno) for frame in frames]
        found = next((p for p in reversed(places) if _inside(p[0], code)), (None, None))
    if not _inside(found[0], code):
        return text
    name = str(Path(str(found[0])).relative_to(code))
    row, known = found[1] or 0, rows.get(name, ())
    return f"{text} ({name}, line {known[row] if row < len(known) else row})"


def _inside(file: str | None, code: Path) -> bool:
    return file is not None and Path(file).is_relative_to(code)


# ------------------------------------------------------------------------------------ files


def write_code(files: Mapping[str, str], names: Mapping[str, str], folder: Path) -> None:
    """Lay the files that a patch amounts to into a folder. Raises `Refused` for other names."""
    if files.keys() != names.keys():
        raise Refused("the patch adds or removes files")
    for name, text in files.items():
        place = folder / name
        if not place.resolve().is_relative_to(folder.resolve()):
            raise Refused(f"{name}: no file of the task")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, "utf-8")


def seal(folder: Path, target: Path) -> str:
    """Take over what a run left in `folder`, and name its bits; no process of it may be alive.

    Raises:
        Refused: There is something else than files of its own, or too much of it.
    """
    found = sorted(_files(folder))
    folder.rename(target)
    for place, names, handles in os.walk(target):
        for name in handles:
            os.chmod(Path(place, name), 0o400)
        for name in names:
            os.chmod(Path(place, name), 0o700)
    return _digest(target, found)


def check_sealed(target: Path, digest: str) -> None:
    """Raise `Refused` if the bits are not those that were sealed."""
    if _digest(target, sorted(_files(target))) != digest:
        raise Refused("the model's files were changed after the training had ended")


def _files(folder: Path) -> list[str]:
    """Relative names of all files. Raises `Refused` for anything but files and folders."""
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise Refused("it put something else in the place of its scratch folder")
    names, size, folders = [], 0, [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                name = os.path.relpath(entry.path, folder)
                shown = one_line(name, 100)
                if stat.S_ISDIR(found.st_mode):
                    folders.append(Path(entry.path))
                elif not stat.S_ISREG(found.st_mode):
                    raise Refused(f"it left {shown}, {_kind(found.st_mode)}, no file")
                elif found.st_nlink != 1:
                    raise Refused(f"it left {shown}, which has another name elsewhere")
                names.append(name)
                size += found.st_size
                if size > MODEL_BYTES or len(names) > MODEL_FILES:
                    raise Refused(f"it left more than {MODEL_BYTES >> 20} MiB behind")
    return names


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((word for test, word in kinds if test(mode)), "a device")


def _digest(folder: Path, names: list[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        place = folder / name
        total.update(f"{name!r}\n".encode(errors="surrogateescape"))
        with contextlib.suppress(IsADirectoryError), place.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
