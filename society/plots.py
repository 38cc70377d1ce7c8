"""The plots of the report, as SVG text: one function each, from records, without global state.

- Figures are built from `matplotlib.figure.Figure`; pyplot is never imported, so plots can be drawn
  from any thread and leave nothing behind.
- Ink is `currentColor` and the ground transparent, so a plot reads on a light and on a dark page.
- Colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart by colour-blind readers;
  shape repeats what colour says.
- What is not verified is labelled so inside the plot, because plots are copied without their text.

Every function returns None when there is nothing to draw. `standalone` turns a plot into a file.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from society.records import (
    Activity,
    Champion,
    Claim,
    Decision,
    Effect,
    Noise,
    Outcome,
    Run,
    RunKind,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from society.experiments.effects import KnobEffect
    from society.experiments.noise import ClassNoise, NoiseStudy, Pairing

INK = "#010203"
"""Stands for the reader's text colour; replaced by `currentColor` in the SVG."""
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, GREY = "#cc79a7", "#56b4e9", "#8c8c8c"
WIDTH = 7.6
"""Inches."""
MAX_ROWS = 40
"""Rows of a forest plot; what is left out is said."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "society",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}
_FAILURES = {
    Outcome.DIVERGED: (VERMILLION, "x"),
    Outcome.CRASHED: (PINK, "s"),
    Outcome.TIMED_OUT: (ORANGE, "d"),
    Outcome.REJECTED: (INK, "P"),
}
_DECISIONS = {
    Decision.CONFIRMED: (GREEN, "o", "accepted, confirmed"),
    Decision.ACCEPTED: (GREEN, "D", "accepted, on probation"),
    Decision.ROLLED_BACK: (VERMILLION, "X", "rolled back"),
    Decision.SUPERSEDED: (PINK, "^", "superseded"),
    Decision.REJECTED: (GREY, "s", "rejected"),
}
_VERDICTS = {
    "replicated": (GREEN, "o"),
    "not at this scale": (BLUE, "s"),
    "reversed": (VERMILLION, "X"),
    "undecided": (GREY, "D"),
}
_ROLES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILLION, GREY)


@dataclass(frozen=True, slots=True)
class PoolPoint:
    """What the holdout says about one champion."""

    champion: Champion
    mean: float
    """Mean score on its verification seeds, holdout split."""
    half_width: float
    """Half width of the plain 95 % interval of that mean; 0 when it has one run only."""
    seeds: int


def progress(
    runs: Sequence[Run], points: Sequence[PoolPoint], *, lower_is_better: bool, metric: str
) -> str | None:
    """Screening scores in order of finishing, above the champion's score on the holdout."""
    screening = [run for run in runs if run.kind is RunKind.SCREENING]
    if not screening:
        return None
    with rc_context(_STYLE):
        figure = _figure(4.6 if points else 3.0)
        if points:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
            _champion_steps(lower, runs, points, metric)
            upper.tick_params(labelbottom=False)
        else:
            upper = lower = figure.subplots()
        _screening_dots(upper, screening, lower_is_better, metric)
        last = max(run.number for run in runs)
        lower.set_xlim(0, last * 1.02 + 1)
        lower.set_xlabel("runs finished (all kinds)")
        return _svg(figure, "progress")


def forest(
    claims: Sequence[Claim], *, unit: str, labels: Mapping[str, str] | None = None
) -> str | None:
    """Effect of every closed claim with its interval, grouped by decision, with a zero line.

    `labels` says in words what a claim changes, by its id; without it the whole variant is named.
    """
    names = labels or {}
    rows = _forest_rows(claims)
    if not rows:
        return None
    shown = rows[:MAX_ROWS]
    with rc_context(_STYLE):
        rows_named: list[str] = []
        figure = _figure(1.0 + 0.26 * (len(shown) + len({decision for _, decision, _ in shown})))
        axes = figure.subplots()
        low, high = _forest_limits([effect for _, _, effect in shown])
        for claim, decision, effect in shown:
            heading = _DECISIONS[decision][2]
            if heading not in rows_named:
                rows_named.append(heading)
            _forest_row(axes, len(rows_named), effect, decision, (low, high))
            rows_named.append(
                _short(f"{claim.id} {names.get(claim.id) or claim.variant.describe()}", 40)
            )
        headings = {words for _, _, words in _DECISIONS.values()}
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows_named) - 0.4, -0.8)
        axes.set_yticks(range(len(rows_named)), rows_named)
        _quiet(axes, "x")
        left_out = len(rows) - len(shown)
        axes.set_xlabel(
            f"improvement over the reference, {unit}\n"
            "marker: shrunken, tick: raw, line: 95 % interval"
            + (f"\n{left_out} more not shown" if left_out else "")
        )
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() in headings else "normal")
        return _svg(figure, "forest")


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One comparison of the forest plot of findings."""

    label: str
    effect: Effect
    verdict: str
    """`replicated`, `not at this scale`, `reversed` or `undecided`."""
    main: bool = False
    """Whether it decides the finding; drawn in bold."""
    published: float | None = None
    """The published improvement, negative for a harm."""
    predicted: float | None = None
    """Its sign, where only that was published."""


def findings_forest(rows: Sequence[ForestRow], *, unit: str) -> str | None:
    """Effect of every change with its interval, its published size and its verdict."""
    rows = [row for row in rows if math.isfinite(row.effect.mean)]
    if not rows:
        return None
    with rc_context(_STYLE):
        figure = _figure(1.5 + 0.27 * len(rows))
        axes = figure.subplots()
        low, high = _forest_limits([row.effect for row in rows])
        for place, row in enumerate(rows):
            _finding_row(axes, place, row, (low, high))
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_short(row.label, 46) for row in rows])
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row.main else "normal")
        _quiet(axes, "x")
        for name, (colour, marker) in _VERDICTS.items():
            axes.plot([], [], marker, color=colour, label=name)
        axes.plot([], [], "|", color=INK, markersize=9, label="published size")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, handlelength=1, fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(
            f"improvement over the baseline, {unit}\n"
            "line: anytime-valid 95 % interval\n"
            "shaded: predicted side; bold: decides"
        )
        return _svg(figure, "findings")


def _finding_row(axes: Axes, place: int, row: ForestRow, limits: tuple[float, float]) -> None:
    colour, marker = _VERDICTS[row.verdict]
    if row.predicted is not None:
        side = [0.0, limits[1] if row.predicted > 0 else limits[0]]
        axes.fill_between(side, place - 0.42, place + 0.42, color=INK, alpha=0.05, linewidth=0)
    low, high = max(row.effect.low, limits[0]), min(row.effect.high, limits[1])
    axes.plot([low, high], [place, place], color=colour, linewidth=1.5, solid_capstyle="butt")
    for end, limit, arrow in ((row.effect.low, limits[0], "<"), (row.effect.high, limits[1], ">")):
        if (end < limit) if arrow == "<" else (end > limit):
            axes.plot([limit], [place], marker=arrow, color=colour, markersize=5, clip_on=False)
    axes.plot([row.effect.mean], [place], marker=marker, color=colour, markersize=6)
    if row.published is not None:
        axes.plot([row.published], [place], "|", color=INK, markersize=12, mew=1.6)


def noise_histogram(scores: Sequence[float], noise: Noise | None, *, metric: str) -> str | None:
    """The baseline's holdout scores over seeds, with the fitted normal and its spread."""
    if len(scores) < 3:
        return None
    mean = sum(scores) / len(scores)
    plain = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    sd = noise.sd if noise is not None and noise.sd > 0 else plain
    if sd <= 0:
        return None
    with rc_context(_STYLE):
        figure = _figure(2.6)
        _distribution(figure.subplots(), scores, mean, sd, _noise_text(noise, sd), metric)
        return _svg(figure, "noise")


def _distribution(
    axes: Axes, scores: Sequence[float], mean: float, sd: float, words: str, metric: str
) -> None:
    """A histogram with the normal of this mean and spread."""
    bins = max(5, min(20, round(1.5 * math.sqrt(len(scores)))))
    _, edges, _ = axes.hist(scores, bins=bins, color=SKY, alpha=0.55, edgecolor="none")
    scale = len(scores) * float(edges[1] - edges[0]) / (sd * math.sqrt(2 * math.pi))
    xs = [mean + sd * (step / 20 - 3.5) for step in range(141)]
    ys = [scale * math.exp(-(((x - mean) / sd) ** 2) / 2) for x in xs]
    axes.plot(xs, ys, color=BLUE, linewidth=1.6)
    axes.plot(scores, [0] * len(scores), "|", color=INK, markersize=9, clip_on=False)
    axes.axvspan(mean - sd, mean + sd, color=BLUE, alpha=0.10, linewidth=0)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
    axes.text(mean, axes.get_ylim()[1], words, ha="center", va="top")
    axes.set_xlabel(f"{metric} of the baseline on the holdout, one tick per seed")
    axes.set_ylabel("runs")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def noise_study(study: NoiseStudy) -> str | None:
    """A noise study: scores over seeds, its components, and how well classes of knobs pair."""
    total = study.total
    if len(study.scores) < 3 or total.sd <= 0:
        return None
    parts = [
        ("total (winsorised)", total, BLUE, "o"),
        ("initial parameters", study.init, ORANGE, "s"),
        ("data order", study.data, GREEN, "D"),
    ]
    spreads = [(name, one, ink, mark) for name, one, ink, mark in parts if one is not None]
    pairs = [(one, pair) for one in study.classes if (pair := one.pairing) is not None]
    heights = [2.6, 0.9 + 0.3 * len(spreads), *([0.9 + 0.3 * len(pairs)] if pairs else [])]
    words = f"sd {total.sd:.3g}  [{total.low:.3g}, {total.high:.3g}], {total.n} seeds"
    with rc_context(_STYLE):
        figure = _figure(sum(heights))
        panels = figure.subplots(len(heights), 1, height_ratios=heights)
        _distribution(panels[0], study.scores, study.mean, total.sd, words, study.metric)
        for row, (_, one, ink, mark) in enumerate(spreads):
            _estimate(panels[1], row, one.sd, (one.low, one.high), ink, mark)
        _rows(panels[1], [name for name, *_ in spreads])
        panels[1].set_xlim(left=0)
        panels[1].set_xlabel(f"standard deviation, {study.unit}, with 95 % interval")
        if pairs:
            _correlations(panels[2], pairs)
        return _svg(figure, "noise-study")


def _correlations(axes: Axes, pairs: Sequence[tuple[ClassNoise, Pairing]]) -> None:
    for row, (_, pair) in enumerate(pairs):
        if pair.correlation is not None:
            ends = (pair.low, pair.high)
            _estimate(axes, row, pair.correlation, ends, PINK, "o")
    _rows(axes, [_short(f"{one.group}: {one.change}", 40) for one, _ in pairs])
    low = min(
        value
        for _, pair in pairs
        for value in (pair.low, pair.correlation, 1.0)
        if value is not None
    )
    if low < 0:
        axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(low - 0.06 * (1 - low) - 0.001, 1 + 0.03 * (1 - low) + 0.001)
    axes.set_xlabel("correlation with the baseline on the same seeds, with 95 % interval")


def _estimate(
    axes: Axes,
    row: int,
    value: float,
    ends: tuple[float | None, float | None],
    colour: str,
    marker: str,
) -> None:
    """A marker on its interval, if it has one."""
    low, high = ends
    if low is not None and high is not None:
        axes.plot([low, high], [row, row], color=colour, linewidth=1.5, solid_capstyle="butt")
    axes.plot([value], [row], marker=marker, color=colour, markersize=6)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _quiet(axes, "x")


def timeline(spans: Sequence[Activity]) -> str | None:
    """Who did what when: one row per agent, coloured by the role taken."""
    spans = [span for span in spans if span.ended_at >= span.started_at]
    if not spans:
        return None
    agents = sorted({span.agent for span in spans}, key=_natural)
    roles = sorted({span.role for span in spans})
    origin = min(span.started_at for span in spans)
    length = max(span.ended_at for span in spans) - origin
    scale, unit = (1.0, "s") if length < 300 else (60.0, "min") if length < 14400 else (3600.0, "h")
    with rc_context(_STYLE):
        figure = _figure(1.1 + 0.3 * len(agents))
        axes = figure.subplots()
        for index, role in enumerate(roles):
            colour = _ROLES[index % len(_ROLES)]
            for row, agent in enumerate(agents):
                bars = [
                    (
                        (span.started_at - origin) / scale,
                        max(span.ended_at - span.started_at, length / 600) / scale,
                    )
                    for span in spans
                    if span.agent == agent and span.role == role
                ]
                axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=colour, edgecolors="none")
            axes.plot([], [], color=colour, linewidth=6, label=role)
        axes.set_ylim(len(agents) - 0.5, -0.5)
        axes.set_yticks(range(len(agents)), [_short(agent, 24) for agent in agents])
        axes.set_xlim(0, max(length, 1e-9) / scale * 1.01)
        axes.set_xlabel(f"{unit} since the first activity")
        axes.tick_params(left=False)
        axes.spines.left.set_visible(False)
        columns = min(len(roles), 5)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handlelength=1.2)
        return _svg(figure, "timeline")


def knob_bars(effects: Sequence[KnobEffect], *, unit: str, limit: int = 20) -> str | None:
    """Estimated improvement by knob with error bars (two standard errors), best first."""
    known = [effect for effect in effects if effect.runs > 0 and effect.se > 0]
    known.sort(key=lambda effect: -abs(effect.delta) / effect.se)
    shown = sorted(known[:limit], key=lambda effect: -effect.delta)
    if not shown:
        return None
    with rc_context(_STYLE):
        figure = _figure(0.9 + 0.27 * len(shown))
        axes = figure.subplots()
        for row, effect in enumerate(shown):
            colour = {"helps": GREEN, "hurts": VERMILLION}.get(effect.verdict, GREY)
            axes.barh(row, effect.delta, height=0.62, color=colour, alpha=0.75)
            bar = 2 * effect.se
            axes.errorbar(effect.delta, row, xerr=bar, color=INK, linewidth=1.0, capsize=2)
        axes.axvline(0, color=INK, linewidth=0.8)
        labels = [_short(f"{e.knob} = {_value(e.value)}", 38) for e in shown]
        axes.set_yticks(range(len(shown)), labels)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        _quiet(axes, "x")
        axes.set_xlabel(
            f"estimated improvement against the baseline's value, {unit} (bars: 2 s.e.)\n"
            "green helps, orange hurts, grey no visible effect; screening runs, not verified"
        )
        return _svg(figure, "knobs")


def standalone(svg: str) -> str:
    """The plot as the text of an .svg file: namespaces, and a ground of its own."""
    style = "<style>svg{color:#1a1a1a;background:#fff}</style>"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = svg.replace("<svg", head, 1)
    cut = text.index(">") + 1
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text[:cut] + style + text[cut:]


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def _svg(figure: Figure, name: str) -> str:
    """The figure as an inline SVG: no prolog, no metadata, own ids, the reader's ink."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1).strip()


def _quiet(axes: Axes, grid: str) -> None:
    """No ticks on the label axis, a faint grid on the other."""
    axes.tick_params(left=False)
    axes.spines.left.set_visible(False)
    if grid == "x":
        axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    else:
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)


def _screening_dots(axes: Axes, runs: Sequence[Run], lower: bool, metric: str) -> None:
    scored = [(run.number, run.score) for run in runs if run.score is not None]
    rows = _failure_rows(runs)
    if scored:
        beyond = _scores(axes, scored, lower)
        if beyond:
            rows.insert(0, (f"{len(beyond)} worse than the scale", BLUE, "^", beyond))
        axes.plot([], [], "o", color=BLUE, alpha=0.55, markersize=4, label="screening score")
        axes.plot([], [], color=BLUE, linestyle="--", label="best so far, not verified")
    else:
        axes.set_yticks([])
    above = axes.get_xaxis_transform()
    for step, (label, colour, marker, xs) in enumerate(rows):
        (marks,) = axes.plot(xs, [1.04 + 0.06 * step] * len(xs), marker, color=colour, label=label)
        marks.set(transform=above, clip_on=False, markersize=4.5)
    place = (0, 1.05 + 0.06 * len(rows))
    axes.legend(loc="lower left", bbox_to_anchor=place, ncols=3, borderaxespad=0, fontsize=9)
    _grid(axes)
    axes.set_ylabel(f"{metric}\nvalidation")


def _scores(axes: Axes, scored: Sequence[tuple[int, float]], lower: bool) -> list[int]:
    """Dots and the best so far; returns the runs too bad for the scale."""
    best, bad = _robust_range([score for _, score in scored], lower)
    inside = [(x, y) for x, y in scored if (y <= bad if lower else y >= bad)]
    axes.plot(*zip(*inside, strict=True), "o", color=BLUE, alpha=0.55, markersize=4, mew=0)
    steps = _best_so_far(scored, lower)
    axes.step(*zip(*steps, strict=True), where="post", color=BLUE, linestyle="--", linewidth=1.2)
    pad = 0.08 * abs(bad - best) or 0.01 * abs(best) or 1.0
    axes.set_ylim(min(best, bad) - pad, max(best, bad) + pad)
    return [x for x, y in scored if (y > bad if lower else y < bad)]


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.ticklabel_format(axis="y", useOffset=False)


def _failure_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[int]]]:
    rows = []
    for outcome, (colour, marker) in _FAILURES.items():
        xs = [run.number for run in runs if run.outcome is outcome]
        if xs:
            rows.append((f"{len(xs)} {outcome.value.replace('_', ' ')}", colour, marker, xs))
    return rows


def _robust_range(scores: Sequence[float], lower: bool) -> tuple[float, float]:
    """The good end (the best score) and a bad end that a few hopeless runs cannot stretch."""
    ordered = sorted(scores, reverse=not lower)
    best, median = ordered[0], ordered[len(ordered) // 2]
    far = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    reach = max(abs(median - best), abs(far - best)) * 1.3
    bad = best + reach if lower else best - reach
    worst = ordered[-1]
    return best, (min(bad, worst) if lower else max(bad, worst))


def _best_so_far(scored: Sequence[tuple[int, float]], lower: bool) -> list[tuple[int, float]]:
    best: list[tuple[int, float]] = []
    for number, score in scored:
        known = best[-1][1] if best else score
        best.append((number, min(known, score) if lower else max(known, score)))
    return best


def _champion_steps(
    axes: Axes, runs: Sequence[Run], points: Sequence[PoolPoint], metric: str
) -> None:
    last = max(run.number for run in runs)
    starts = [_number_at(runs, point.champion.since) for point in points]
    for index, (point, start) in enumerate(zip(points, starts, strict=True)):
        end = starts[index + 1] if index + 1 < len(points) else last
        axes.plot([start, end], [point.mean] * 2, color=GREEN, linewidth=2.2)
        if index + 1 < len(points):
            rise = [point.mean, points[index + 1].mean]
            axes.plot([end, end], rise, color=GREEN, linewidth=0.8)
        band = [point.mean - point.half_width, point.mean + point.half_width]
        axes.fill_between([start, end], band[0], band[1], color=GREEN, alpha=0.15, linewidth=0)
    axes.margins(y=0.25)
    _champion_labels(axes, points, starts, last)
    _grid(axes)
    axes.set_ylabel(f"{metric}\nholdout")


def _champion_labels(
    axes: Axes, points: Sequence[PoolPoint], starts: Sequence[int], last: int
) -> None:
    """Names where there is room, the last one always."""
    taken = float("inf")
    for point, start in reversed(list(zip(points, starts, strict=True))):
        if taken - start < last * 0.14:
            continue
        taken = start
        name = f"champion {point.champion.number}" if point.champion.number else "baseline"
        axes.annotate(
            name,
            (start, point.mean + point.half_width),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=8.5,
            horizontalalignment="right" if start > 0.88 * last else "left",
        )


def _number_at(runs: Sequence[Run], when: float) -> int:
    return max((run.number for run in runs if run.finished_at <= when), default=0)


def _forest_rows(claims: Sequence[Claim]) -> list[tuple[Claim, Decision, Effect]]:
    """Claims with a finite effect by decision, the larger effect first."""
    order = list(_DECISIONS)
    rows = [
        (claim, claim.verdict.decision, claim.verdict.effect)
        for claim in claims
        if claim.verdict is not None
        and claim.verdict.effect is not None
        and math.isfinite(claim.verdict.effect.mean)
    ]
    return sorted(rows, key=lambda row: (order.index(row[1]), -row[2].shrunken))


def _forest_limits(effects: Sequence[Effect]) -> tuple[float, float]:
    """Every estimate, and intervals up to three times the typical half width."""
    means = [value for effect in effects for value in (effect.mean, effect.shrunken)]
    halves = sorted(
        abs(end - effect.mean)
        for effect in effects
        for end in (effect.low, effect.high)
        if math.isfinite(end)
    )
    typical = halves[len(halves) // 2] if halves else 0.0
    reach = 3 * typical
    ends = [max(e.low, e.mean - reach) for e in effects] + [
        min(e.high, e.mean + reach) for e in effects
    ]
    low, high = min(0.0, *means, *ends), max(0.0, *means, *ends)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _forest_row(
    axes: Axes, row: int, effect: Effect, decision: Decision, limits: tuple[float, float]
) -> None:
    colour, marker, _ = _DECISIONS[decision]
    low, high = max(effect.low, limits[0]), min(effect.high, limits[1])
    axes.plot([low, high], [row, row], color=colour, linewidth=1.5, solid_capstyle="butt")
    for end, limit, arrow in ((effect.low, limits[0], "<"), (effect.high, limits[1], ">")):
        if (end < limit) if arrow == "<" else (end > limit):
            axes.plot([limit], [row], marker=arrow, color=colour, markersize=5, clip_on=False)
    axes.plot([effect.mean], [row], "|", color=INK, markersize=9, mew=1.2)
    axes.plot([effect.shrunken], [row], marker=marker, color=colour, markersize=6)


def _noise_text(noise: Noise | None, sd: float) -> str:
    if noise is None:
        return f"sd {sd:.3g} (not calibrated)"
    return f"sd {noise.sd:.3g}  [{noise.low:.3g}, {noise.high:.3g}], {noise.seeds} seeds"


def _natural(name: str) -> tuple[object, ...]:
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)


def _short(text: str, width: int) -> str:
    """At most `width` characters, `$` made harmless (matplotlib would read mathematics)."""
    text = " ".join(text.split())
    text = text if len(text) <= width else text[: width - 1] + "…"
    return text.replace("$", r"\$")


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
