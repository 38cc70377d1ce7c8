"""Commands that make preregistered studies."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from society.cli_common import LAB, Json, Lab, emit_json, emit_table, plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from society.replicate import Progress, Replication

app = typer.Typer()
Slots = Annotated[
    int | None, typer.Option(min=1, help="Training runs at a time.", show_default="one per core")
]
QUIET_S = 10.0
"""Seconds between lines of progress."""


@app.command()
def calibrate(
    seeds: Annotated[int, typer.Option(min=4, help="Seeds of the baseline.")] = 32,
    pairs: Annotated[
        int | None,
        typer.Option(min=0, help="Seeds per class of knobs; 0 for none.", show_default="8"),
    ] = None,
    task: Annotated[str, typer.Option(help="What is measured; see `tasks`.")] = "pretrain",
    profile: Annotated[
        str | None, typer.Option(help="Size of the task: a shipped name or a .yaml file.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    slots: Slots = None,
    seed: Annotated[
        int | None, typer.Option(help="Where the seeds of a new notebook come from.")
    ] = None,
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Measure the noise of a task: its spread over seeds, where it comes from, what pairing gives.

    The plan is registered before the runs. Ctrl-C finishes and records the runs in progress; the
    same command goes on. A page with a plot is written to `report/` in the lab's folder.

    Example: society calibrate --seeds 100 --lab night

    Example: society calibrate --task synthetic --seeds 32 --lab try
    """
    from society.calibrate import measure
    from society.memory.folder import NotebookFolder
    from society.noise_words import class_rows, sentences, spread_rows, write_page

    folder = NotebookFolder(lab)
    found = measure(
        folder, seeds, pairs, _counted(silent=as_json),
        task=task, profile=profile, device=device, slots=slots, secret_seed=seed,
    )  # fmt: skip
    page = write_page(found, folder.report)
    if as_json:
        emit_json(plain(found) | {"page": page, "words": sentences(found)})
        return
    for rows in (spread_rows(found), class_rows(found)):
        if rows:
            typer.echo("")
            emit_table(rows)
    typer.echo("")
    for sentence in sentences(found):
        typer.echo(sentence)
    typer.echo(f"Markdown: {page}")


@app.command()
def replicate(
    task: Annotated[
        str | None, typer.Option(help="What is trained.", show_default="that of the findings")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Size of the task: a shipped name or a .yaml file.")
    ] = None,
    findings: Annotated[
        Path | None, typer.Option(help="YAML file of findings.", show_default="the shipped ten")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Id of a finding to replicate; may be repeated.")
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=4, help="Most seeds of a change; twice as many for the first of a finding."
        ),
    ] = 24,
    noise_seeds: Annotated[int, typer.Option(min=8, help="Seeds of the baseline.")] = 100,
    societies: Annotated[
        int, typer.Option(min=1, help="Pairs of societies, with and without shared memory.")
    ] = 4,
    society_runs: Annotated[int, typer.Option(min=20, help="Training runs of a society.")] = 60,
    lab: Lab = LAB,
    slots: Annotated[
        int | None, typer.Option(help="Training runs at a time.", show_default="one per core")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Begin nothing after so many minutes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test published findings on paired seeds, with verdicts whose rules are registered first.

    Ctrl-C finishes and records the runs in progress; the same command goes on. The report is
    `report/findings.html` in the lab's folder.

    Example: society replicate --profile cpu --lab findings

    Example: society replicate --only windowed-attention --seeds 8 --lab findings
    """
    from society.experiments.findings import load
    from society.experiments.verdicts import Rules, summary

    found = load(findings)
    chosen = found.only(only or ())
    from society.memory.folder import NotebookFolder
    from society.replicate import Order
    from society.replicate import replicate as work

    rules = Rules(
        n_max=seeds,
        screening_seeds=min(seeds, Rules().screening_seeds),
        noise_seeds=noise_seeds,
        societies=societies,
        society_runs=society_runs,
    )
    order = Order(
        task or found.task, chosen, rules, profile=profile, device=device, slots=slots,
        minutes=minutes,
    )  # fmt: skip
    if not as_json:
        typer.echo(f"{len(chosen)} findings on {order.task}; their plans are registered first.")
    done = work(NotebookFolder(lab), order, _Lines(silent=as_json))
    if as_json:
        results = [summary(result) for result in done.results]
        emit_json({"html": done.html, "markdown": done.markdown, "noise": done.noise,
                   "complete": done.complete, "findings": results})  # fmt: skip
        return
    _table(done)


def _counted(*, silent: bool) -> Callable[[int, int], None]:
    """Progress as lines: the first, the last, and one now and then."""
    last = -QUIET_S

    def show(done: int, wanted: int) -> None:
        nonlocal last
        if not silent and (done == wanted or time.monotonic() - last >= QUIET_S):
            last = time.monotonic()
            typer.echo(f"{done} of {wanted} runs")
            sys.stdout.flush()

    return show


class _Lines:
    """Progress as lines: what was decided at once, how far it is now and then."""

    def __init__(self, *, silent: bool) -> None:
        """With `silent`, print nothing."""
        self._silent, self._last = silent, 0.0

    def __call__(self, now: Progress) -> None:
        """Print what is worth a line."""
        from society.wording import duration

        if self._silent:
            return
        if now.news:
            typer.echo(now.news)
        if now.most and time.monotonic() - self._last >= QUIET_S:
            self._last = time.monotonic()
            left = duration(now.left_s)
            typer.echo(f"{now.done} of at most {now.most} runs, about {left} left for these")
            sys.stdout.flush()


def _table(done: Replication) -> None:
    from society.wording import delta, interval

    rows = [("finding", "verdict", f"effect, {done.unit}", "95 % interval", "seeds", "why")]
    for result in done.results:
        effect = result.judgement.effect
        rows.append(
            (
                result.finding.id,
                result.verdict.value,
                delta(effect.mean) if effect else "–",
                interval(effect) if effect else "–",
                str(result.judgement.seeds),
                result.judgement.reason,
            )
        )
    typer.echo("")
    emit_table(rows)
    if not done.complete:
        typer.echo("\nNot everything that was planned has been done; the same command goes on.")
    typer.echo(f"Markdown: {done.markdown}")
    typer.echo(f"Report: {done.html}")
