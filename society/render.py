"""A report as Markdown and as one HTML file; its words are those of `wording.py`.

Text out of the ledger is cleaned and then escaped for the format it goes into, so that it is inert.
jinja2 and matplotlib are imported when a report is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from society.cleaning import clean, diff_lines
from society.experiments import gate
from society.experiments.effects import describe_dead_end
from society.experiments.task import Direction
from society.records import Decision, Outcome
from society.report import STANDING, Report
from society.wording import (
    amount,
    change_text,
    confinement_sentences,
    delta,
    dollars,
    duration,
    e_value,
    headline_sentences,
    interval,
    last_line,
    moment,
    narrative_paragraphs,
    number,
    overrides_text,
    rejection,
    reproduction,
    savings_sentence,
    shape_of_run,
    usage_words,
)

if TYPE_CHECKING:
    from markupsafe import Markup

    from society.plots import PoolPoint

INSIGHTS_SHOWN = 12
"""Latest insights shown; earlier ones are mostly the same ones on fewer runs."""
FAILURES_SHOWN = 60
"""Failed runs listed one by one; the table of all runs has the rest."""


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.md` (plots in `plots/*.svg`) and a self-contained `report.html`.

    Each file is replaced whole (`os.replace`), the pages after their plots: a reader never sees
    half a file.

    Args:
        report: What to render.
        folder: Created when missing.

    Returns:
        The paths of the Markdown and the HTML file.

    Raises:
        OSError: The folder cannot be written.
    """
    from society.plots import standalone

    plots = draw(report)
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        replace_file(folder / "plots" / f"{name}.svg", standalone(svg))
    markdown, html = folder / "report.md", folder / "report.html"
    replace_file(markdown, render(report, "md", plots))
    replace_file(html, render(report, "html", plots))
    return markdown, html


def draw(report: Report) -> dict[str, str]:
    """The plots of a report by name, as inline SVG; what has nothing to show is left out."""
    from society import plots

    head = report.headline
    lower = report.direction is Direction.MINIMISE
    claims = [finding.claim for finding in report.findings]
    drawn = {
        "progress": plots.progress(
            report.runs, _points(report), lower_is_better=lower, metric=report.metric
        ),
        "claims": plots.forest(
            claims,
            unit=report.unit,
            labels={c.id: change_text(c.variant, c.reference) for c in claims},
        ),
        "knobs": plots.knob_bars(report.effects, unit=report.unit),
        "noise": plots.noise_histogram(head.baseline.scores, report.noise, metric=report.metric),
        "timeline": plots.timeline(report.activities),
    }
    return {name: svg for name, svg in drawn.items() if svg is not None}


def render(report: Report, form: str, plots: Mapping[str, str]) -> str:
    """The text of the report; `form` is `md` or `html`."""
    failures = [run for run in report.failures if run.outcome is not Outcome.REJECTED]
    return fill(
        f"report.{form}.j2",
        form,
        plots,
        report=report,
        head=report.headline,
        sentences=headline_sentences(report),
        accepted=report.decided(*STANDING),
        crowned={entry.claim_id for entry, _ in report.champions},
        closed=report.decided(Decision.REJECTED, Decision.ROLLED_BACK, Decision.SUPERSEDED),
        shown_insights=report.insights[::-1][:INSIGHTS_SHOWN],
        failures=failures,
        shown_failures=failures[:FAILURES_SHOWN],
        shown_rejections=report.rejected[:FAILURES_SHOWN],
        narrative=narrative_paragraphs(report),
        confinement=confinement_sentences(report),
        saved=savings_sentence(report.savings),
        dead_ends=[describe_dead_end(end) for end in report.dead_ends],
        script=reproduction(report),
        script_run=shape_of_run(report),
        fdr=gate.DEFAULTS.certified_fdr,
    )


def fill(template: str, form: str, plots: Mapping[str, str], **values: Any) -> str:
    """A page of `society/templates`, with the filters that make text of the ledger inert in it."""
    from jinja2 import Environment as Templates
    from jinja2 import PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Templates(
        loader=PackageLoader("society", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(_filters(form))
    page = templates.get_template(template)
    return page.render(plots={name: Markup(svg) for name, svg in plots.items()}, **values)


def replace_file(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one, never a half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _points(report: Report) -> list[PoolPoint]:
    from society.plots import PoolPoint

    return [
        PoolPoint(entry, pool.mean, pool.half_width, pool.completed)
        for entry, pool in report.champions
        if pool.mean is not None
    ]


def _filters(form: str) -> dict[str, Callable[..., Any]]:
    return {
        "number": number,
        "delta": delta,
        "spread": lambda value: f"{value:.3g}",
        "interval": interval,
        "e_value": e_value,
        "duration": duration,
        "amount": amount,
        "moment": moment,
        "overrides": overrides_text,
        "change": change_text,
        "last_line": last_line,
        "rejection": rejection,
        "usage": usage_words,
        "dollars": dollars,
        "diff": _diff_md if form == "md" else _diff_html,
        "json": lambda value: json.dumps(value, sort_keys=True, default=str),
        "clean": clean,
        "code": _code_md if form == "md" else _code_html,
        "prose": _prose_md if form == "md" else _prose_html,
        "fenced": _fenced,
    }


def _code_html(text: object) -> Markup:
    from markupsafe import Markup, escape

    return Markup("<code>{}</code>").format(escape(clean(text)))


def _prose_html(text: object) -> Markup:
    """Escaped text in which `...` is set as code."""
    from markupsafe import Markup, escape

    parts = re.split(r"`([^`]*)`", clean(text))
    return Markup("").join(
        _code_html(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def _code_md(text: object) -> Markup:
    """A code span that its content cannot end, fit for a table cell."""
    from markupsafe import Markup

    plain = clean(text).replace("|", "\\|")
    longest = max((len(ticks) for ticks in re.findall(r"`+", plain)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if not plain or plain[0] == "`" or plain[-1] == "`" else ""
    return Markup(f"{fence}{pad}{plain}{pad}{fence}")  # a code span is inert


def _prose_md(text: object) -> Markup:
    """Text whose Markdown and HTML is made inert, in which `...` is set as code."""
    from markupsafe import Markup

    parts = re.split(r"`([^`]*)`", clean(text))
    safe = (_code_md(p) if index % 2 else _inert(p) for index, p in enumerate(parts))
    return Markup("".join(safe))  # every part is escaped above


def _inert(text: str) -> str:
    """Backslashes before what Markdown would read, entities for what HTML would."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text.replace("&", "&amp;"))
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("://", ":&#47;&#47;")


def _diff_md(patch: str) -> Markup:
    """A code change as a fenced block that nothing in it can end."""
    from markupsafe import Markup

    lines = diff_lines(patch)
    longest = max((len(ticks) for line in lines for ticks in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup("\n".join([f"{fence}diff", *lines, fence]))  # a fenced block is inert


def _diff_html(patch: str) -> Markup:
    from markupsafe import Markup, escape

    return Markup('<pre class="diff">{}</pre>').format(escape("\n".join(diff_lines(patch))))


def _fenced(text: str) -> Markup:
    """Program text inside a fenced block of the Markdown report; it is ours, not the ledger's."""
    from markupsafe import Markup

    return Markup(text.replace("`", "'"))  # fenced, and without a fence of its own
