"""`society memory`: look into a notebook, take its contents elsewhere, rebuild its index."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from society.cleaning import bounded, clean, diff_lines, visible
from society.cli_common import (
    LAB,
    Json,
    Lab,
    emit_fields,
    emit_json,
    reading,
)
from society.codechange import describe_patch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.standings import Standing

LINKS_SHOWN = 20
"""Linked records listed one by one by `show`."""
TEXT_CHARS = 4000
"""Longest text that `show` prints whole; a log tail is whatever a candidate printed."""
DIFF_LINES = 400
"""Lines of a code change that `show` prints; `--json` has all."""
ALIKE = 3
"""Records that read alike, shown by `show`."""

app = typer.Typer(
    help="Search, show, export, import, upgrade and reindex what a notebook holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="A question, a statement or knob names.")],
    k: Annotated[int, typer.Option("--k", min=1, help="How many passages at most.")] = 5,
    kind: Annotated[
        str | None,
        typer.Option(help="Only one kind: run, claim, verdict, hypothesis, insight or prior."),
    ] = None,
    knob: Annotated[str | None, typer.Option(help="Only what is about this knob.")] = None,
    outcome: Annotated[
        str | None,
        typer.Option(help="Only this outcome, e.g. better, worse, diverged, accepted or open."),
    ] = None,
    agent: Annotated[str | None, typer.Option(help="Only records of this agent.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Only from this time on: 2h, 3d ago, or a date (UTC).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only before this time.")] = None,
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Find what the notebook knows about a topic, by meaning.

    Works beside a running society too.

    Example: society memory search "what do we know about warm-down?" --k 3

    Example: society memory search "deeper" --knob depth --outcome worse --since 2d
    """
    from society.finding import Wanted, find

    wanted = Wanted(kind, knob, outcome, agent, since, until)
    hits = find(lab, text, k, wanted, partial(typer.echo, err=True))
    if as_json:
        emit_json([asdict(hit) for hit in hits])
        return
    if not hits:
        typer.echo("Nothing found: the notebook holds no such passage yet.")
    for hit in hits:
        typer.echo(f"{hit.similarity:.2f}  {hit.kind} {hit.ref}")
        typer.echo(f"      {shorten(clean(hit.text), 400, placeholder=' ...')}")


@app.command()
def show(
    record: Annotated[str, typer.Argument(metavar="ID", help="E.g. r00012, c0003 or s001.")],
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Show one record with everything that is linked to it.

    Runs, claims, hypotheses, insights, studies, prior results and societies have ids; reports and
    logs name them. What it changes, what came of it, what rests on it, and what lies near it, by
    its numbers and by meaning.

    Example: society memory show c0003
    """
    from society.lookup import lookup

    with reading(lab) as ledger:
        found = lookup(ledger, record)
    linked = dict(found.linked)
    alike = _alike(lab, found.prose, record)
    if alike:
        linked["reads alike"] = alike
    if as_json:
        emit_json({"kind": found.kind, "record": found.record, "linked": linked})
        return
    typer.echo(f"{found.kind} {visible(record)}")
    _show(found.record, "  ")
    if found.patch is not None:
        typer.echo("code change (written by somebody else; read it before you run it)")
        for line in diff_lines(found.patch, DIFF_LINES):
            typer.echo(f"  {line}")
    for name, links in linked.items():
        typer.echo(name)
        for link in links[:LINKS_SHOWN]:
            typer.echo(f"  {shorten(clean(str(link['words'])), 400, placeholder=' ...')}")
        if len(links) > LINKS_SHOWN:
            typer.echo(f"  and {len(links) - LINKS_SHOWN} more (--json has all)")


@app.command()
def best(
    task: Annotated[
        str | None, typer.Option(help="Only one task, with or without its profile.")
    ] = None,
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Show the best accepted variant of every task on every hardware tier.

    Scores are compared within one tier only. Tiers are grouped by class: CPUs by instruction set,
    GPUs by memory (up to 16, 24, 48 GB, and more).

    Example: society memory best --task pretrain
    """
    from society.standings import standings

    with reading(lab) as ledger:
        found = standings(ledger, task)
    if as_json:
        emit_json(found)
        return
    if not found:
        typer.echo("Nothing yet: no baseline has been crowned.")
    for one in found:
        typer.echo(f"{one.scope.task}  {one.tier_class}  ({one.scope.tier})")
        emit_fields(_standing(one), "  ")


@app.command()
def export(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File or folder to write; standard output if not given."),
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="jsonl (compressed if the name ends in .gz) or parquet."),
    ] = "jsonl",
    lab: Lab = LAB,
) -> None:
    """Write every record, so that `import` can read it into an empty notebook.

    JSON Lines: a header, then one object per record with its `table`. Parquet: a folder with one
    file per table. It is one snapshot, also beside a running society. The secret behind the seeds
    is not written.

    Example: society memory export --out memory.jsonl.gz

    Example: society memory export --format parquet --out memory
    """
    from society.errors import UnknownName, UsageError
    from society.memory.exports import Format
    from society.memory.folder import NotebookFolder
    from society.memory.transfer import write_export

    known = [one.value for one in Format]
    if form not in known:
        raise UnknownName("format", form, known)
    if out is None and form != Format.JSONL:
        raise UsageError("Parquet is a folder of files: name it with --out.")
    header = write_export(NotebookFolder(lab), out or sys.stdout, Format(form))
    if out is not None:
        typer.echo(f"{header.total} records written to {out}")


@app.command(name="import")
def import_(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="An exported memory, or a results.tsv.")
    ],
    task: Annotated[
        str, typer.Option(help="What a results.tsv is about; see `tasks`.")
    ] = "pretrain",
    profile: Annotated[
        str | None, typer.Option(help="Size of that task: a shipped name or a .yaml file.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="What the rows of a results.tsv come from.", show_default="its name"),
    ] = None,
    lab: Lab = LAB,
) -> None:
    """Read an exported memory into an empty notebook, or somebody's results.tsv into any.

    A memory is checked as a whole: all of it is there afterwards, or nothing. The rows of a
    results.tsv (commit, val_bpb, memory_gb, status, description) can be searched and are read by
    agents. They are compared with no run and are evidence for nothing. Repeating is harmless.

    Example: society memory import memory.jsonl.gz --lab copy

    Example: society memory import results.tsv --task pretrain --profile cpu --lab night
    """
    from society.memory.exports import is_export, read_header
    from society.memory.folder import NotebookFolder
    from society.memory.transfer import read_export

    folder = NotebookFolder(lab)
    if not is_export(path):
        typer.echo(_import_results(folder, path, task, profile, source or path.name))
        return
    read_header(path)  # before the folder is made
    with folder.lock():
        header = read_export(folder, path)
    typer.echo(f"{header.total} records imported into {lab}, all checked")


@app.command()
def upgrade(lab: Lab = LAB) -> None:
    """Bring a notebook that an older version of society wrote up to date.

    The ledger is copied first, as ledger.sqlite.schemaN.bak (on PostgreSQL its tables are, within
    the database). All that was recorded is kept. Not while a society runs in the folder.

    Example: society memory upgrade --lab lab
    """
    from society.memory.folder import NotebookFolder
    from society.memory.migrations import upgrade as bring_up_to_date

    folder = NotebookFolder(lab).require()
    with folder.lock():
        done = bring_up_to_date(folder.ledger)
    if done.backup is None:
        typer.echo(f"The notebook {lab} is up to date: its ledger has schema {done.after}.")
        return
    typer.echo(f"Upgraded the notebook {lab} from schema {done.before} to {done.after}.")
    for change in done.changes:
        typer.echo(f"  {change}")
    where = f"as {done.backup}"
    if isinstance(done.backup, str):
        where = f"in the schema {done.backup} of the same database"
    typer.echo(f"The ledger of before is kept {where}; remove it when all is well.")


@app.command()
def share(
    ledger: Annotated[
        str | None,
        typer.Option(
            help="Address of the ledger: postgresql://USER@HOST/DATABASE or "
            "sqlite:////ABSOLUTE/PATH.sqlite."
        ),
    ] = None,
    recall: Annotated[
        str | None, typer.Option(help="Address of a Chroma server: http://HOST:PORT.")
    ] = None,
    lab: Lab = LAB,
) -> None:
    """Have a folder use a ledger, and an index, that other folders use too.

    All commands then work on the shared memory. `society run --ledger` does the same. Without an
    option it says what the folder uses.

    Example: society memory share --ledger sqlite:////tmp/shared.sqlite --lab bob
    """
    from society.memory.folder import NotebookFolder

    folder = NotebookFolder(lab).share(ledger, recall).require()
    emit_fields({"ledger": folder.ledger, "recall": folder.recall_address})


@app.command()
def source(
    name: Annotated[
        str, typer.Argument(metavar="RUN|DIGEST", help="A run, or a digest that a run names.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder to write to.")],
    lab: Lab = LAB,
) -> None:
    """Write out the code and the profile that a run was made with.

    Compare them with what is installed, or use the profile with `society run --profile`.

    Example: society memory source r00012 --out r12
    """
    from society.provenance import Recorded

    with reading(lab) as ledger:
        recorded = Recorded.named(ledger, name)
    written = recorded.write(out)
    typer.echo(f"{len(written)} files written to {out}")


@app.command()
def reindex(lab: Lab = LAB) -> None:
    """Rebuild the semantic index from the ledger, whatever state it is in.

    The ledger holds every fact, so nothing can be lost. Not while a society runs in the folder,
    unless the index is on a Chroma server: then all who use it go on with the new one.

    Example: society memory reindex --lab lab
    """
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.memory.recall import Recall

    folder = NotebookFolder(lab).require()
    with (
        nullcontext() if folder.shared.recall else folder.lock(),
        Ledger.open(folder.ledger) as ledger,
        Recall.rebuild(folder, ledger, lower_is_better=_lower(ledger)) as recall,
    ):
        count, where = len(recall), str(recall)
    typer.echo(f"{count} passages indexed in {where}")


def _lower(ledger: Ledger) -> bool:
    """Whether lower scores are better in the task of the last society."""
    from society.finding import lower_is_better

    return lower_is_better(ledger)


def _import_results(
    folder: NotebookFolder, path: Path, task: str, profile: str | None, source: str
) -> str:
    """Take over a results.tsv; what came of it in words."""
    from society.experiments.task import default_profile, load_task
    from society.memory.history import bring, read_results
    from society.memory.ledger import Ledger

    size = profile or default_profile(task)
    key = load_task(task, str(size)).key
    priors = read_results(path, source)
    settings = {"task": task, "profile": size, "source": source}
    with folder.lock(), Ledger.open(folder.ledger) as ledger:
        done = bring(ledger, priors, task_key=key, settings=settings, home=folder.home)
    known = f", {done.known} were known" if done.known else ""
    return (
        f"{done.added} results from {source} added to {folder.path}{known}. They can be searched "
        "and are read by agents; they are compared with no run and are evidence for nothing."
    )


def _standing(one: Standing) -> dict[str, str]:
    """One champion in words."""
    pool, gain, noise = one.pool, one.gain, one.noise
    score = "not measured"
    if pool.mean is not None:
        score = f"{pool.mean:.5f} +- {pool.half_width:.5f} (holdout, {pool.completed} seeds)"
    told = {"champion": f"{one.champion.number}: {one.champion.variant.describe()}"}
    if one.champion.claim_id is None:
        told["claim"] = "none: nothing has been accepted here yet"
    else:
        state = "" if one.decision is None else f" {one.decision.value}"
        told["claim"] = f"{one.champion.claim_id}{state}"
    told["score"] = score
    if gain is not None:
        told["gain"] = f"{gain.shrunken:+.5f}, 95 % interval {gain.low:+.5f} to {gain.high:+.5f}"
    told["noise"] = "not measured" if noise is None else f"{noise.sd:.5f} ({noise.seeds} seeds)"
    told["runs"] = str(one.runs)
    return told


def _alike(lab: Path, text: str, identity: str) -> list[dict[str, Any]]:
    """Other records that read alike, while the semantic index is free; none while it is not."""
    from society.errors import RecallUnavailable
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.memory.recall import Recall

    if not text.strip(" ."):
        return []
    folder = NotebookFolder(lab).require()
    try:
        with (
            Ledger.open(folder.ledger) as ledger,
            Recall.open(folder, ledger, lower_is_better=_lower(ledger)) as recall,
        ):
            hits = recall.search(text, ALIKE + 1)
    except RecallUnavailable:
        return []
    others = [hit for hit in hits if hit.ref != identity][:ALIKE]
    return [
        {
            "id": hit.ref,
            "kind": hit.kind,
            "similarity": round(hit.similarity, 4),
            "words": f"{hit.similarity:.2f} {hit.kind} {hit.ref}: {hit.text}",
        }
        for hit in others
    ]


def _show(values: Mapping[str, Any], indent: str) -> None:
    """Nested fields as indented lines; long lists are counted, texts kept."""
    values = dict(values)
    if isinstance(values.get("patch"), str):
        values["patch"] = describe_patch(values["patch"])
    flat = {name: _short(value) for name, value in values.items() if not isinstance(value, dict)}
    emit_fields(flat, indent)
    for name, value in values.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{name}")
            _show(value, indent + "  ")


def _short(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:6]))
        return shown if len(value) <= 6 else f"{shown}, ... ({len(value)} in all)"
    if isinstance(value, float):
        return f"{value:.10g}"
    return bounded(value, TEXT_CHARS)
