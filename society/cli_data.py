"""`society data`: prepare the text that models are trained and scored on, and list it."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from society.cli_common import Json, emit_json, emit_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from society.experiments.pretrain import Pretrain
    from society.model.corpora import Source
    from society.model.data import Corpus

TASK = "pretrain"
MB = 1e6

app = typer.Typer(
    help="Prepare and list the text that models are trained and scored on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def prepare(
    profile: Annotated[
        str | None,
        typer.Option(help="What this profile of `pretrain` needs: a shipped name or a .yaml file."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="A corpus that can be had without files: kjv or climbmix.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Your own: a folder of .txt, .md, .jsonl or .parquet files."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of your own corpus.", show_default="the folder's name"),
    ] = None,
    vocab: Annotated[
        list[int] | None,
        typer.Option(
            min=257,
            max=65_536,
            help="Size of the vocabulary; may be repeated.",
            show_default="what the profile may ask for",
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Training shards to download.", show_default="10")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Download from here instead of the corpus's own address.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenise.", show_default="one per core"),
    ] = None,
) -> None:
    """Download or read a text, cut it into splits, learn its vocabulary, and tokenise it.

    Whatever was interrupted, by an error, Ctrl-C or kill, goes on when the command is run again.

    Example: society data prepare --profile h100

    Example: society data prepare --text notes --name notes --vocab 1024
    """  # fmt: skip
    from society.errors import UsageError
    from society.model.data import KJV
    from society.model.shards import known

    if (text is not None) == (corpus is not None) and (text or profile is None):
        raise UsageError("Give one of --profile, --corpus and --text (with --text also --profile).")
    task = _task(profile)
    count = workers or _cores()
    if text is not None:
        wanted = name or (task.options.corpus if profile else text.resolve().stem)
        _prepare_text(text, wanted, vocab or task.vocabs, count)
        return
    wanted = corpus or task.options.corpus
    if wanted == KJV:
        _have(KJV, vocab or task.vocabs)
    elif corpus is None and wanted not in known():  # a profile with a corpus of the user's own
        _have(wanted, vocab or [task.baseline.vocab])
    else:
        asked = vocab or (list(task.vocabs) if profile else [])
        _prepare_shards(wanted, asked, shards, base_url, count)


@app.command(name="list")
def list_corpora(as_json: Json = False) -> None:
    """List the prepared corpora: sizes of the splits, vocabularies and hashes.

    Example: society data list
    """
    from society.experiments.task import cache_dir
    from society.model.data import prepared

    found = [_entry(one) for one in prepared(cache_dir())]
    if as_json:
        emit_json(found)
        return
    if not found:
        typer.echo(f"No corpus is prepared in {cache_dir()}; see `society data prepare --help`.")
        return
    rows = [("corpus", "vocab", "split", "documents", "tokens", "MB of text", "sha256")]
    for one in found:
        for split, counts in one["splits"].items():
            rows.append(
                (
                    one["name"], one["vocab"], split, f"{counts['documents']:,}",
                    f"{counts['tokens']:,}", f"{counts['bytes'] / MB:.1f}", counts["sha256"][:12],
                )
            )  # fmt: skip
    emit_table(rows)
    typer.echo("\nA profile names its corpus: options: {corpus: NAME}.")


def _entry(corpus: Corpus) -> dict[str, Any]:
    about = corpus.about()
    known = ("name", "about", "vocab", "sha256", "source", "domains", "splits")
    return {key: about[key] for key in known} | {"folder": str(corpus.folder)}


def _task(profile: str | None) -> Pretrain:
    from society.experiments.pretrain import Pretrain
    from society.experiments.task import default_profile

    return Pretrain(profile or default_profile(TASK))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _have(name: str, vocabs: Iterable[int]) -> None:
    """Say what is there; the corpus that comes with the project is made if it is not."""
    from society.experiments.task import cache_dir
    from society.model.data import prepare as prepare_corpus

    for vocab in vocabs:
        _say(prepare_corpus(cache_dir(), vocab, name))


def _prepare_text(text: Path, name: str, vocabs: Iterable[int], workers: int) -> None:
    from society.errors import UsageError
    from society.model.data import KJV, corpus_at
    from society.model.shards import known
    from society.model.texts import TextFolder

    if name in known():
        raise UsageError(f"The name {name!r} is that of a shipped corpus; choose another --name.")
    corpus_at(Path(), 0, name)  # is the name possible?
    if not text.exists():
        raise UsageError(f"--text {text}: no such folder or file.")
    typer.echo(f"Reading {text}")
    _build(TextFolder.scan(text, name), vocabs, workers)
    typer.echo(f"A profile names it by options: {{corpus: {name}}}; the default one is {KJV}.")


def _prepare_shards(
    name: str, vocabs: list[int], shards: int | None, base_url: str | None, workers: int
) -> None:
    from society.experiments.task import cache_dir
    from society.model import download
    from society.model.shards import Shards, describe

    description = describe(name)
    folder = cache_dir() / "downloads" / name
    wanted = description.wanted(shards, base_url)
    typer.echo(f"{len(wanted)} files to have in {folder}")
    with _bytes_progress() as report:
        digests = download.download(wanted, folder, on_bytes=report)
    source = Shards(description, folder, description.files(shards), digests)
    _build(source, vocabs or [description.vocab], workers)


def _build(source: Source, vocabs: Iterable[int], workers: int) -> None:
    from society.experiments.task import cache_dir
    from society.model.corpora import build

    for vocab in vocabs:
        with _steps_progress(f"{source.name}, vocabulary {vocab}") as report:
            made = build(source, cache_dir(), vocab, workers=workers, on_progress=report)
        _say(made)


def _say(corpus: Corpus) -> None:
    about = corpus.about()
    sizes = ", ".join(f"{split} {one['tokens']:,}" for split, one in about["splits"].items())
    typer.echo(f"{corpus.name} with vocab={corpus.vocab} is ready. Tokens: {sizes}")
    typer.echo(f"sha256 {about['sha256']} in {corpus.folder}")


# --------------------------------------------------------------------------- progress


@contextmanager
def _bytes_progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar per file that is being downloaded; without a terminal, a line per finished file."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(file=sys.stderr)
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)
            if done == total and not console.is_terminal:
                typer.echo(f"{name}  {done / MB:.1f} MB")

        yield report


@contextmanager
def _steps_progress(title: str) -> Iterator[Callable[[str, int], None]]:
    """One line that says what is being done and how far it is."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda step, done: None
        return
    with console.status(title) as status:
        yield lambda step, done: status.update(f"{title}: {step}, {done / MB:.0f} MB")
