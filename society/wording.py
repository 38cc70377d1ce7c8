"""What a report says in words: its sentences, its numbers as text, and the reproduction script.

Whatever comes out of the ledger may be hostile (a log tail is whatever a candidate printed):
`clean` of `cleaning.py` removes control characters. Escaping for a format is the business of
`render.py`.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from society.cleaning import bounded, clean
from society.codechange import describe_patch
from society.records import Outcome, RefusalReason

if TYPE_CHECKING:
    from society.records import Effect, Run, Savings, Usage, Variant
    from society.report import Report

MESSAGE_CHARS = 240
"""Longest error message shown of a failed run."""
PARAGRAPH_CHARS, PARAGRAPHS = 2000, 12
"""How much of a narrative is shown."""

# ------------------------------------------------------------------------------------ sentences


def headline_sentences(report: Report) -> tuple[str, ...]:
    """The headline in plain words, the most important sentence first."""
    head, unit = report.headline, report.unit
    if not report.runs:
        return ("Nothing has been accepted: the notebook holds no run of this task yet.",)
    if head.anything_accepted:
        sentences = [_accepted_sentence(report)]
        if head.gain is not None:
            sentences.append(_gain_sentence("Gain", head.gain, unit, "common verification seeds"))
        else:
            sentences.append("The gain cannot be measured yet: no common verification seeds.")
        if head.audit is not None:
            sentences.append(_gain_sentence("Audit", head.audit, unit, "fresh seeds afterwards"))
    else:
        sentences = [_nothing_sentence(report)]
    if head.best_screening is not None:
        best = head.best_screening
        sentences.append(
            f"Best screening score: {number(best.score)} {unit} (run {best.id}, one seed, "
            "validation split): not verified, and selected as the best of many."
        )
    if report.society and len(report.societies) > 1:
        sentences.append(_share_sentence(report))
    return tuple(sentences)


def _share_sentence(report: Report) -> str:
    """Which part of it is the society's own."""
    own = sum(run.society == report.society for run in report.runs)
    others = ", ".join(one.id for one in report.societies if one.id != report.society)
    return (
        f"Society {report.society} made {own} of the {len(report.runs)} runs; the others are by "
        f"{others}, on the same ledger and with the same champion."
    )


def _accepted_sentence(report: Report) -> str:
    head = report.headline
    return (
        f"{_standing(head.accepted)} accepted: {report.metric} on the holdout went from "
        f"{number(head.baseline.mean)} (baseline, {head.baseline.completed} seeds) to "
        f"{number(head.champion.mean)} {report.unit} (champion, {head.champion.completed} seeds)."
    )


def _standing(claims: int) -> str:
    return "1 claim stands" if claims == 1 else f"{claims} claims stand"


def _nothing_sentence(report: Report) -> str:
    accepted, rolled = report.headline.accepted, report.headline.rolled_back
    if accepted:
        return f"{_standing(accepted)} accepted, but the champion is still the baseline."
    if rolled:
        what = f"{rolled} accepted claim{'s were' if rolled > 1 else ' was'} rolled back"
        return f"Nothing stands accepted: {what}, and the champion is the baseline."
    filed, undecided = len(report.findings), len(report.undecided)
    return (
        "Nothing has been accepted: the champion is the baseline. "
        f"{filed} claim{'s' if filed != 1 else ''} filed, {undecided} of them undecided."
    )


def _gain_sentence(name: str, effect: Effect, unit: str, seeds: str) -> str:
    return (
        f"{name}: {delta(effect.mean)} {unit}, anytime-valid 95 % interval {interval(effect)}, "
        f"shrunken estimate {delta(effect.shrunken)}, paired on {effect.seeds} {seeds}."
    )


def savings_sentence(savings: Savings) -> str:
    """What was refused, and what the notebook saved, in words; empty if nothing was."""
    words = {
        RefusalReason.DUPLICATE: "duplicate",
        RefusalReason.NEAR_DUPLICATE: "near-duplicate",
        RefusalReason.DEAD_END: "dead end",
    }
    refused = savings.refused
    known = sum(refused.get(reason, 0) for reason in words)
    parts = ", ".join(_counted(refused.get(reason, 0), word) for reason, word in words.items())
    were = "proposals were" if known != 1 else "proposal was"
    sentences = [
        f"{known} {were} not run because the notebook already knew ({parts}), "
        f"about {_counted(savings.runs, 'run')} = {duration(savings.seconds)} saved."
    ] * (known > 0)
    broken, advised = (
        refused.get(reason, 0) for reason in (RefusalReason.BROKEN, RefusalReason.ADVISED_AGAINST)
    )
    more = [f"{_counted(broken, 'code change')} did not work"] * (broken > 0)
    more += [f"another agent advised against {_counted(advised, 'proposal')} on review"] * (
        advised > 0
    )
    if more:
        told = "; ".join(more)
        sentences.append(
            f"{told[0].upper()}{told[1:]}: no run was spent on {_them(broken + advised)}."
        )
    return " ".join(sentences)


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def usage_words(usage: Usage) -> str:
    """What calls of language models have cost, e.g. `12 calls (1 failed), 5200 tokens, $0.31`."""
    aside = [f"{usage.failed} failed"] * (usage.failed > 0)
    aside += [f"{usage.cached} from the cache"] * (usage.cached > 0)
    calls = _counted(usage.calls, "call") + (f" ({', '.join(aside)})" if aside else "")
    return f"{calls}, {amount(usage.tokens)} tokens, {dollars(usage.dollars)}"


def dollars(value: float) -> str:
    """Money for readers: small sums keep their digits."""
    return f"${value:.2f}" if value == 0 or value >= 0.1 else f"${value:.2g}"


def confinement_sentences(report: Report) -> tuple[str, ...]:
    """How far runs were confined; nothing where it was never recorded and no code was changed."""
    lines = report.confinement
    if not any(line.level or line.patched for line in lines):
        return ()
    said = []
    for line in lines:
        how = f"at level `{line.level}`" if line.level else "at a level that was not recorded"
        were = "run was" if line.runs == 1 else "runs were"
        code = f", {line.patched} of them with changed code" if line.patched else ""
        said.append(f"{line.runs} {were} confined {how}{code}.")
    return tuple(said)


def narrative_paragraphs(report: Report) -> tuple[str, ...]:
    """The latest narrative of a language model, bounded; nothing if there is none."""
    if report.narrative is None:
        return ()
    text = report.narrative.text.partition(": ")[2]
    parts = [bounded(part, PARAGRAPH_CHARS) for part in text.split("\n\n")]
    return tuple(part for part in parts if part)[:PARAGRAPHS]


def rejection(run: Run) -> str:
    """Why the guard rejected a run: the first line of the harness's error, bounded.

    The error stands at the end of the log, after what the candidate itself printed.
    """
    lines = [bounded(line, MESSAGE_CHARS) for line in run.log_tail.splitlines()]
    said = [line for line in lines if line]
    marked = [line for line in said if line.startswith("rejected: ")]
    return next(reversed(marked or said), "no reason was recorded")


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


# ------------------------------------------------------------------------------------ numbers


def number(value: float | None) -> str:
    """A score for readers."""
    if value is None:
        return "–"
    plain = value == 0 or 1e-2 <= abs(value) < 1e5
    return f"{value:.4f}" if plain else f"{value:.4g}"


def delta(value: float | None) -> str:
    """An improvement for readers, with its sign."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    text = f"{value:+.4f}" if value == 0 or 5e-3 <= abs(value) < 1e5 else f"{value:+.2g}"
    return text.replace("-", "−", 1)


def interval(effect: Effect) -> str:
    """An interval for readers."""
    return f"[{delta(effect.low)}, {delta(effect.high)}]"


def e_value(log_e: float | None) -> str:
    """An e-value for readers."""
    if log_e is None:
        return "–"
    return f"{math.exp(log_e):.3g}" if log_e < 20 else f"1e{log_e / math.log(10):.0f}"


def duration(seconds: float) -> str:
    """Seconds as `1 h 02 min`, `3 min 05 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: float) -> str:
    """A large count for readers, e.g. `1.2e12`."""
    if value < 10_000:
        return f"{value:.4g}"
    return f"{value:.3e}".replace("e+0", "e").replace("e+", "e")


def moment(seconds: float | None) -> str:
    """Unix seconds as a date, UTC."""
    if seconds is None:
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# ------------------------------------------------------------------------------------ texts


def last_line(text: str) -> str:
    """The last line of a log that says anything, at most `MESSAGE_CHARS` long."""
    lines = [line for line in text.splitlines() if clean(line)]
    return bounded(lines[-1], MESSAGE_CHARS) if lines else ""


def change_text(variant: Variant, reference: Variant) -> str:
    """What differs from the reference, e.g. `lr=0.08, -heads` (a knob back at the baseline's)."""
    new, old = variant.overrides, reference.overrides
    words = [f"{knob}={value}" for knob, value in sorted(new.items()) if old.get(knob) != value]
    words += [f"-{knob}" for knob in sorted(old) if knob not in new]
    if variant.code != reference.code:
        words.append("-patch" if variant.patch is None else describe_patch(variant.patch))
    return ", ".join(words)


def overrides_text(variant: Variant) -> str:
    """A variant's overrides as a Python literal, for the reproduction command."""
    return repr(dict(sorted(variant.overrides.items())))


# ------------------------------------------------------------------------------------ reproduction


def shape_of_run(report: Report) -> Run | None:
    """The run that the reproduction example repeats: the champion's own, else the best scored."""
    scored = [run for run in report.runs if run.outcome is Outcome.COMPLETED]
    champion = report.headline.champion.variant
    own = [run for run in scored if run.variant == champion and run.variant.patch is None]
    plain = [run for run in scored if run.variant.patch is None]
    return next(iter(own or plain), None)


def reproduction(report: Report) -> str:
    """A script that repeats one run of the report, or nothing when no run can be repeated so."""
    run = shape_of_run(report)
    if run is None:
        return ""
    device = run.environment.device.split(":")[0]
    return "\n".join(
        [
            "import asyncio",
            "from society.experiments.executor import InlineExecutor",
            "from society.experiments.space import variant",
            "from society.experiments.task import load_task",
            "from society.records import Budget, BudgetKind, Split, Work",
            "",
            f"task = load_task({report.loads_as!r}, {report.profile!r})",
            f"overrides = {overrides_text(run.variant)}",
            f"budget = Budget(BudgetKind({run.budget.kind.value!r}), {run.budget.amount!r})",
            f"split = Split({run.split.value!r})",
            f'work = Work("again", variant(task, overrides), {run.seed}, split, budget)',
            "",
            "async def again():",
            f"    executor = InlineExecutor(task, {device!r})",
            "    await executor.start()",
            "    return await executor.run(work)",
            "",
            "measured = asyncio.run(again())",
            f"print(measured.score, 'recorded as', {run.score!r})",
        ]
    )
