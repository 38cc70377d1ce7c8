"""The champion history as commits of a git repository, from what the ledger holds.

The texts are those that the runs were made with: the trainer's source as it was kept, and the files
that each champion's patch amounts to. Messages are the ledger's numbers; nothing is written but the
new repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from society.errors import UsageError
from society.experiments import patches
from society.provenance import Recorded, kept_patch, write_files

if TYPE_CHECKING:
    from society.experiments.provenance import Source
    from society.experiments.space import Space
    from society.experiments.task import Task
    from society.memory.reader import LedgerReader
    from society.records import Champion, Claim, Run, Scope, Variant

NAME, MAIL = "Society", "society@localhost"
RECIPE = "recipe.yaml"
PATCH_FOLDER = "patches"
GIT_S = 60.0
"""Seconds after which a git command is given up."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What the repository holds from some moment on."""

    files: Mapping[str, str]
    message: str
    when: float
    """Unix seconds."""


class History:
    """What there is to export from one notebook."""

    def __init__(self, ledger: LedgerReader, scope: Scope, task: Task, space: Space) -> None:
        """Of one task on one tier; reads only."""
        self._ledger, self._scope, self._task, self._space = ledger, scope, task, space
        self._entries = ledger.champions(scope)
        self._texts, self._places = self._base()

    def baseline(self) -> Commit:
        """The task's own files and recipe."""
        from society.records import Variant

        plain = Variant(self._task.key)
        since = self._entries[0].since if self._entries else 0.0
        return Commit(self._files(plain), f"Baseline of {self._task.key}", since)

    def champions(self) -> list[Commit]:
        """One commit per champion after the baseline, roll-backs included, oldest first."""
        pairs = zip(self._entries, self._entries[1:], strict=False)
        return [
            Commit(self._files(entry.variant), self._crowned(entry, before), entry.since)
            for before, entry in pairs
        ]

    def run(self, run_id: str) -> Commit:
        """One run's recipe and code. Raises `InvariantViolated` if there is no such run."""
        run = self._ledger.run(run_id)
        score = run.outcome.value if run.score is None else f"score {run.score:.6g}"
        message = f"{run.id}: {run.variant.describe()}\n\n{run.kind.value}, {score}\nBy {run.agent}"
        return Commit(self._files(run.variant), message, run.finished_at)

    def _base(self) -> tuple[dict[str, str], dict[str, str]]:
        """The whole source by path in the repository, and where each editable file lies."""
        sources = getattr(self._task, "sources", None)
        editable = dict(sources()) if sources is not None else {}
        runs = self._ledger.runs(self._scope, last=1)
        source = Recorded.of(self._ledger, runs[0].environment).source if runs else None
        texts = {} if source is None else _paths(source)
        places = {name: _place(name, texts) for name in editable}
        for name, place in places.items():
            texts.setdefault(place, editable[name])
        return texts, places

    def _files(self, variant: Variant) -> dict[str, str]:
        files = dict(self._texts)
        for name, text in self._patched(variant).items():
            files[self._places.get(name, name)] = text
        recipe = self._space.recipe(variant).model_dump(mode="json")
        files[RECIPE] = yaml.safe_dump(recipe, sort_keys=True)
        return files

    def _patched(self, variant: Variant) -> Mapping[str, str]:
        if variant.patch is None:
            return {}
        kept = kept_patch(self._ledger, variant)
        if kept is not None:
            return kept
        own = {name: self._texts[place] for name, place in self._places.items()}
        return patches.effective(own, variant.patch)

    def _crowned(self, entry: Champion, before: Champion) -> str:
        if entry.reverts:
            return f"Roll back to {entry.variant.describe()}\n\nChampion {entry.number}"
        title = f"{entry.claim_id or 'champion'}: {entry.variant.describe()}"
        if entry.claim_id is None:
            return title
        claim = self._ledger.claim(entry.claim_id)
        return f"{title[:400]}\n\n" + "\n".join(self._evidence(claim, before))

    def _evidence(self, claim: Claim, before: Champion) -> list[str]:
        told = [f"Against: {before.variant.describe()}"]
        verdict = claim.verdict
        if verdict is None:
            return told
        told.append(f"Verdict: {verdict.decision.value}. {verdict.reason}")
        if verdict.effect is not None:
            effect = verdict.effect
            told.append(
                f"Effect: {effect.mean:+.5f} {self._task.unit}, 95 % interval "
                f"{effect.low:+.5f} to {effect.high:+.5f}, {effect.seeds} seeds"
            )
        runs: list[Run] = [self._ledger.run(name) for name in verdict.runs]
        others = sorted({run.agent for run in runs} - {claim.author})
        told.append(f"Runs: {' '.join([claim.screening_run, *verdict.runs])}")
        told.append(f"Author: {claim.author}; judged by {verdict.judge}")
        return [*told, f"Verified by: {', '.join(others)}"] if others else told


def _paths(source: Source) -> dict[str, str]:
    """Path in the repository -> text."""
    found = {}
    for module, files in source.modules.items():
        parts = module.split(".")
        home = parts if "__init__.py" in files else parts[:-1]
        found.update({"/".join([*home, name]): text for name, text in files.items()})
    return found


def _place(name: str, texts: Mapping[str, str]) -> str:
    """Where an editable file lies: in the one module that has it, else under its own name."""
    same = [path for path in texts if path.endswith(f"/model/{name}")]
    same = same or [path for path in texts if path.endswith(f"/{name}")]
    return same[0] if len(same) == 1 else name


def write(
    folder: Path, base: Commit, commits: Sequence[Commit], branch: str, *, series: bool
) -> list[Path]:
    """Write a new repository; returns the files of the patch series, if one is asked for.

    Raises:
        UsageError: the folder holds something, there is no git, or git refuses.
    """
    if shutil.which("git") is None:
        raise UsageError("--git needs the program `git`, which is not on the path: install it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--git {folder}: it holds something already; name a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _git(folder, "init", "--quiet", "--template=", "--initial-branch=baseline")
        _commit(folder, base, {})
        _git(folder, "checkout", "--quiet", "-b", branch)
        before = base
        for commit in commits:
            _commit(folder, commit, before.files)
            before = commit
        if not series:
            return []
        _git(folder, "format-patch", "--quiet", "-o", PATCH_FOLDER, f"baseline..{branch}")
        return sorted((folder / PATCH_FOLDER).glob("*.patch"))
    except OSError as error:
        raise UsageError(f"--git {folder}: {error.strerror or error}.") from error


def _commit(folder: Path, commit: Commit, before: Mapping[str, str]) -> None:
    for name in sorted({*before} - {*commit.files}):
        (folder / name).unlink(missing_ok=True)
    write_files(folder, commit.files)
    _git(folder, "add", "--all", "--force", ".")
    options = ["--quiet", "--allow-empty", "--no-verify", "--cleanup=verbatim", "-F", "-"]
    _git(folder, "commit", *options, when=commit.when, text=commit.message + "\n")


def _git(folder: Path, *arguments: str, when: float = 0.0, text: str = "") -> None:
    """Run git without anybody's configuration, hooks or credentials."""
    date = f"@{int(when)} +0000"
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "LC_ALL": "C",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent),
        "GIT_AUTHOR_NAME": NAME,
        "GIT_AUTHOR_EMAIL": MAIL,
        "GIT_AUTHOR_DATE": date,
        "GIT_COMMITTER_NAME": NAME,
        "GIT_COMMITTER_EMAIL": MAIL,
        "GIT_COMMITTER_DATE": date,
    }
    options = ["-c", f"core.hooksPath={os.devnull}", "-c", "core.autocrlf=false",
               "-c", "commit.gpgSign=false", "-c", "core.symlinks=false"]  # fmt: skip
    try:
        subprocess.run(
            ["git", *options, *arguments], cwd=folder, env=environment, check=True, timeout=GIT_S,
            input=text.encode("utf-8", "replace"), capture_output=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UsageError(f"git {arguments[0]} failed: {said[-1] if said else error}.") from error
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"git {arguments[0]} did not end within {GIT_S:.0f} s.") from error
