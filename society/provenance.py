"""What runs were made with, kept in the ledger itself: the effective profile, the trainer's source.

A run's environment names both by digest; the texts are kept once, before the first run that names
them. With them `society rerun` needs neither the profile's file nor the version of the program, and
`society memory source` writes them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from society import logs
from society.errors import UsageError
from society.experiments import patches
from society.experiments.provenance import Source, profile_digest, profile_text
from society.experiments.sandbox import Level
from society.records import PATCH_MARK

if TYPE_CHECKING:
    from society.experiments.task import Task
    from society.memory.ledger import Ledger
    from society.memory.reader import LedgerReader
    from society.records import Environment, Variant

PROFILE_FILE = "profile.yaml"
CODE_FOLDER = "code"
PATCHED = "patched"
"""Name under which the files that a patch amounts to are packed."""


def least_level(settings: Mapping[str, object]) -> Level:
    """The least level at which a recorded society runs code that it changed."""
    return Level(str(settings.get("sandbox", Level.FILTERS)))


def keep(ledger: Ledger, task: Task, environment: Environment) -> None:
    """Keep what the runs of this environment are made with; quick when it is there already.

    A text that is not what the workers named (somebody edits the source at this moment) is not
    kept, and a warning says so.
    """
    if ledger.source(environment.config) is None and environment.config == profile_digest(task):
        ledger.keep_source(environment.config, profile_text(task))
    if ledger.source(environment.code) is None:
        source = Source.installed(task.code)
        if source.digest == environment.code:
            ledger.keep_source(environment.code, source.pack())
    lost = [d for d in (environment.code, environment.config) if d and ledger.source(d) is None]
    if lost:
        changed = "the source was changed while the workers started"
        logs.get("provenance").warning("not kept", digests=lost, reason=changed)


def keep_patch(ledger: Ledger, task: Task, variant: Variant) -> None:
    """Keep the files that a variant's patch amounts to, under the digest that it begins with.

    Nothing is kept for a patch that does not apply: no run of it gets anywhere.
    """
    digest, sources = code_digest(variant), getattr(task, "sources", None)
    if digest is None or sources is None or ledger.source(digest) is not None:
        return
    try:
        files = patches.effective(sources(), variant.patch)
    except patches.BadPatch as error:
        logs.get("provenance").warning("not kept", digests=[digest], reason=str(error))
        return
    ledger.keep_source(digest, Source({PATCHED: files}).pack())


def kept_patch(ledger: LedgerReader, variant: Variant) -> Mapping[str, str] | None:
    """The files that `keep_patch` kept; None if there are none, or they are not what they say."""
    digest = code_digest(variant)
    packed = None if digest is None else ledger.source(digest)
    if packed is None:
        return None
    files = Source.unpack(packed).modules.get(PATCHED, {})
    return dict(files) if patches.digest(files) == digest else None


def code_digest(variant: Variant) -> str | None:
    """The sha256 that a patch names in its first line; None without a patch that has one."""
    if variant.code is None or not variant.code.startswith(PATCH_MARK):
        return None
    return variant.code.removeprefix(PATCH_MARK)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is on record of how some run was made."""

    profile: str | None
    """The effective profile as YAML; None when it was not kept."""
    source: Source | None
    """The trainer's source; None when it was not kept."""
    patched: Mapping[str, str] | None = None
    """The files that the run's patch amounts to; None without one."""

    @classmethod
    def of(cls, ledger: LedgerReader, environment: Environment) -> Recorded:
        """What the ledger holds about an environment."""
        packed = ledger.source(environment.code)
        return cls(
            ledger.source(environment.config), None if packed is None else Source.unpack(packed)
        )

    @classmethod
    def named(cls, ledger: LedgerReader, name: str) -> Recorded:
        """What is kept under a digest, or belongs to a run.

        Raises:
            InvariantViolated: `name` is no digest that is kept, and no finished run.
        """
        text = ledger.source(name)
        if text is None:
            run = ledger.run(name)
            made = cls.of(ledger, run.environment)
            return cls(made.profile, made.source, kept_patch(ledger, run.variant))
        try:
            return cls(None, Source.unpack(text))
        except ValueError:  # a profile is no base64
            return cls(text, None)

    def write(self, folder: Path) -> list[Path]:
        """Write it to a folder: `profile.yaml`, and the modules below `code/`, a patch applied.

        Raises:
            UsageError: nothing was kept, or the folder holds something or cannot be written.
        """
        if self.profile is None and self.source is None:
            raise UsageError(
                "Neither code nor profile of this run were kept: it was made before the notebook "
                "did that. `society rerun` uses what is installed."
            )
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--out {folder}: it holds something already; name a new folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written = []
            if self.profile is not None:
                written.append(folder / PROFILE_FILE)
                written[0].write_text(self.profile, "utf-8")
            if self.source is not None:
                written += with_files(self.source, self.patched or {}).write(folder / CODE_FOLDER)
            written += write_files(folder / CODE_FOLDER, elsewhere(self.source, self.patched or {}))
        except OSError as error:
            raise UsageError(f"--out {folder}: {error.strerror or error}.") from error
        return written


def with_files(source: Source, files: Mapping[str, str]) -> Source:
    """The source with these files in place of those of the same names."""
    return Source(
        {
            module: {name: files.get(name, text) for name, text in own.items()}
            for module, own in source.modules.items()
        }
    )


def elsewhere(source: Source | None, files: Mapping[str, str]) -> dict[str, str]:
    """The files that no recorded module has, e.g. those of a user's script."""
    own = {name for module in (source.modules if source else {}).values() for name in module}
    return {name: text for name, text in files.items() if name not in own}


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write files below a folder.

    Raises:
        UsageError: a name that leads out of it.
    """
    written = []
    for name, text in files.items():
        place = PurePosixPath(name)
        astray = {"..", ".git"} & {*place.parts} or "\\" in name or not place.parts
        if place.is_absolute() or astray:
            raise UsageError(f"The file name {name!r} on record leads out of the folder.")
        written.append(folder / place)
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_bytes(text.encode("utf-8", "surrogateescape"))
    return written
