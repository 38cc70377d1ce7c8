"""A noise study in words: sentences, tables, and a Markdown page with its plot."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from society.cleaning import clean
from society.experiments import noise

if TYPE_CHECKING:
    from society.experiments.noise import ClassNoise, NoiseStudy, Spread

HALF = 0.5
"""The improvement that the power is stated for, in noise floors."""
Rows = list[tuple[str, ...]]


def summary(study: NoiseStudy) -> str:
    """One sentence, for a status page."""
    total = study.total
    return (
        f"noise sd {total.sd:.3g} {study.unit} {_range(total.low, total.high)} "
        f"on {total.n} seeds of {study.task}"
    )


def sentences(study: NoiseStudy) -> list[str]:
    """What a user should take away."""
    return [_floor(study), *_sources(study), _repeatable(study), *_power(study)]


def _floor(study: NoiseStudy) -> str:
    total, failed = study.total, study.failed
    text = (
        f"The noise floor of {study.task} on {study.tier} is a standard deviation of "
        f"{total.sd:.3g} {study.unit}, 95 % interval {_range(total.low, total.high)}, on {total.n} "
        f"seeds (winsorised as the gate does it; {study.plain.sd:.3g} without), "
        f"around a mean of {study.mean:.4f}."
    )
    return text + (f" {failed} baseline runs failed and are left out." if failed else "")


def _sources(study: NoiseStudy) -> Iterator[str]:
    init, data, both = study.init, study.data, study.sum
    if init is None or data is None:
        return
    yield (
        f"New initial parameters on the same data order give {init.sd:.3g} "
        f"{_range(init.low, init.high)}, a new data order from the same parameters {data.sd:.3g} "
        f"{_range(data.low, data.high)} ({init.n} and {data.n} runs)."
    )
    if both is not None:
        shape = (
            "which is in line with two sources that simply add up"
            if both.adds_up
            else "more than sources that simply add up would make: they seem to interact"
            if both.share > 1
            else "less than the total: something else varies too, or the held seed is a lucky one"
        )
        yield (
            f"Together they make {both.share:.0%} [{both.low:.0%}, {both.high:.0%}] of the total "
            f"variance, {shape}."
        )


def _repeatable(study: NoiseStudy) -> str:
    found = study.jitter
    if found is None:
        return "Whether the same seeds give the same score is not known: the repetitions failed."
    if found.equal:
        why = ", as they must here" if study.deterministic else ""
        return f"The same seeds, run {found.n} times, gave the same bits{why}: the jitter is 0."
    if study.deterministic:
        return (
            f"WARNING: the same seeds, run {found.n} times, gave different scores (standard "
            f"deviation {found.sd:.3g}), which must not happen on a CPU with a budget that is not "
            "in seconds. No reproduction of a claim can be trusted until this is understood."
        )
    share = found.sd / study.total.sd if study.total.sd else math.inf
    return (
        f"The same seeds, run {found.n} times, differ by a standard deviation of {found.sd:.3g}, "
        f"{share:.0%} of the noise floor: this device or budget is not deterministic."
    )


def _power(study: NoiseStudy) -> Iterator[str]:
    """How many seeds half a noise floor takes, in words."""
    sd = study.total.sd
    if sd == 0:
        yield "There is no noise: one run decides."
        return
    alone = noise.seeds_needed(HALF * sd, math.sqrt(2) * sd)
    yield (
        f"To find an improvement of half a noise floor ({HALF * sd:.3g} {study.unit}) with "
        f"probability {noise.POWER:g} by a one-sided t-test at {noise.ALPHA:g}, baseline and "
        f"candidate need {alone} seeds each if they share nothing."
    )
    paired = [one for one in study.classes if one.pairing is not None]
    if paired:
        yield _paired_power(study, paired)


def _paired_power(study: NoiseStudy, classes: Sequence[ClassNoise]) -> str:
    need = {one.group: int(seeds_for_half(study, one)) for one in classes}
    best, worst = min(need, key=lambda g: need[g]), max(need, key=lambda g: need[g])
    accepts = {
        one.group: noise.gate_power(one.pairing.effective(study.total.sd))
        for one in classes
        if one.pairing is not None
    }
    return (
        f"On the same seeds it takes {need[best]} pairs for a change like that of {best} and "
        f"{need[worst]} for one like that of {worst}. The gate, which may be looked at after every "
        f"run and uses 12 seeds at most, accepts it with probability {accepts[best]:.2f} and "
        f"{accepts[worst]:.2f} (interpolated between its simulations)."
    )


def seeds_for_half(study: NoiseStudy, one: ClassNoise) -> str:
    """Pairs that half a noise floor takes with such a change; empty if that is not known."""
    if one.pairing is None or study.total.sd == 0:
        return ""
    return str(noise.seeds_needed(HALF * study.total.sd, one.pairing.difference.sd))


def spread_rows(study: NoiseStudy) -> Rows:
    """Table of the standard deviations, its heading first."""
    parts: list[tuple[str, Spread | None]] = [
        ("total, winsorised", study.total),
        ("total, plain", study.plain),
        ("initial parameters", study.init),
        ("data order", study.data),
    ]
    rows: Rows = [(f"sd, {study.unit}", "estimate", "95 % interval", "runs")]
    rows += [
        (name, f"{one.sd:.4g}", _range(one.low, one.high), str(one.n))
        for name, one in parts
        if one is not None
    ]
    if study.jitter is not None:
        same = "same bits" if study.jitter.equal else ""
        rows.append(("same seeds again", f"{study.jitter.sd:.4g}", same, str(study.jitter.n)))
    if study.sum is not None:
        one = study.sum
        rows.append(("(init² + data²) / total²", f"{one.share:.3g}", _range(one.low, one.high), ""))
    return rows


def class_rows(study: NoiseStudy) -> Rows:
    """Table of the classes of knobs, its heading first; empty without any."""
    if not study.classes:
        return []
    heading = (
        "class", "change", "mean improvement", "correlation", "95 % interval",
        "sd of difference", "95 % interval", "pairs", "pairs for half a floor",
    )  # fmt: skip
    return [heading, *(_class_row(study, one) for one in study.classes)]


def _class_row(study: NoiseStudy, one: ClassNoise) -> tuple[str, ...]:
    pair = one.pairing
    if pair is None:
        return (one.group, one.change, *["–"] * 5, f"0 ({one.failed} failed)", "–")
    spread = pair.difference
    return (
        one.group,
        one.change,
        f"{pair.delta:+.4g}",
        "–" if pair.correlation is None else f"{pair.correlation:.3f}",
        "–" if pair.low is None or pair.high is None else f"[{pair.low:.3f}, {pair.high:.3f}]",
        f"{spread.sd:.4g}",
        _range(spread.low, spread.high),
        f"{pair.n}" + (f" ({one.failed} failed)" if one.failed else ""),
        seeds_for_half(study, one) or "–",
    )


def write_page(study: NoiseStudy, folder: Path) -> Path:
    """Write `noise-<task>-<tier>.md` and its plot; each file is replaced whole.

    Raises:
        OSError: The folder cannot be written.
    """
    from society.plots import noise_study, standalone
    from society.render import replace_file

    name = "noise-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{study.task}-{study.tier}")
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plot = noise_study(study)
    if plot is not None:
        replace_file(folder / "plots" / f"{name}.svg", standalone(plot))
    page = folder / f"{name}.md"
    replace_file(page, "\n".join(_page(study, f"plots/{name}.svg" if plot else None)))
    return page


def _page(study: NoiseStudy, plot: str | None) -> Iterator[str]:
    yield f"# Noise of {_code(study.task)} on {_code(study.tier)}\n"
    yield (
        f"Study {study.study} of this notebook; {clean(study.metric)} on the holdout split, budget "
        f"{clean(study.budget)} a run. The seeds are on a list of their own, which no brain sees.\n"
    )
    yield from (f"- {clean(sentence)}" for sentence in sentences(study))
    yield ""
    if plot is not None:
        yield f"![Noise by seed, by component and by class of knobs]({plot})\n"
    yield from _table(spread_rows(study))
    if study.classes:
        yield from _table(class_rows(study))
    yield "## How to read this\n"
    yield _EXPLAINED


def _table(rows: Rows) -> Iterator[str]:
    heading, *body = rows
    yield "| " + " | ".join(heading) + " |"
    yield "|" + "---|" * len(heading)
    for row in body:
        yield "| " + " | ".join(clean(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


def _code(text: str) -> str:
    return f"`{clean(text).replace('`', '')}`"


def _range(low: float, high: float) -> str:
    return f"[{low:.3g}, {high:.3g}]"


_EXPLAINED = """\
- **Total** is what a society lives with: a new seed changes initial parameters and data order.
- **Components** hold one of the two at the first seed. Their variances add up to the total's if the
  sources do not interact; an interaction is in both of them and makes the sum larger.
- **Correlation** is that of a small change with the baseline on the same seeds. What is common
  cancels in the paired difference, whose spread is what a comparison has to beat.
- **Pairs for half a floor**: seeds on which a one-sided t-test at .05 finds an improvement of half
  a noise floor with probability .8. The gate looks after every run, and pays for it with more.
- Intervals assume normal scores. One change stands for its class; others in it may pair worse.
"""
