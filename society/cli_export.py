"""`society export`: the champion's code as a git repository, one commit per accepted change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from society.cli_common import LAB, Lab, opened

if TYPE_CHECKING:
    from society.cli_common import Opened
    from society.gitexport import Commit

app = typer.Typer()


@app.command()
def export(
    git: Annotated[Path, typer.Option("--git", help="New folder for the repository.")],
    patches: Annotated[
        bool, typer.Option("--patches", help="Also write the commits as files of `git am`.")
    ] = False,
    run: Annotated[
        str | None, typer.Option("--run", help="One run's code instead of the champions'.")
    ] = None,
    lab: Lab = LAB,
) -> None:
    """Write the champion's recipe and code as a new git repository.

    The branch `baseline` holds what the task brings along; the branch `champion` has a commit per
    accepted claim on top of it, with the evidence in its message; with --run, the branch is `run`.

    Example: society export --git champion --lab lab
    """
    from society import gitexport

    with opened(lab) as notebook:
        base, commits = _wanted(notebook, run)
    branch = "champion" if run is None else "run"
    written = gitexport.write(git, base, commits, branch, series=patches)
    told = f" and {len(written)} patch files" if patches else ""
    typer.echo(f"{len(commits)} commits on branch {branch}{told} written to {git}")


def _wanted(notebook: Opened, run: str | None) -> tuple[Commit, list[Commit]]:
    from society import gitexport

    where = gitexport.History(notebook.ledger, notebook.scope, notebook.task, notebook.space)
    return where.baseline(), where.champions() if run is None else [where.run(run)]
