"""What runs were made with, kept in the ledger itself: the effective profile, the trainer's source.

A run's environment names both by digest; the texts are kept once, before the first run that names
them. With them `society rerun` needs neither the profile's file nor the version of the program, and
`society memory source` writes them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from society import logs
from society.errors import UsageError
from society.experiments.provenance import Source, profile_digest, profile_text

if TYPE_CHECKING:
    from society.experiments.task import Task
    from society.memory.ledger import Ledger
    from society.records import Environment

PROFILE_FILE = "profile.yaml"
CODE_FOLDER = "code"


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


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is on record of how some run was made."""

    profile: str | None
    """The effective profile as YAML; None when it was not kept."""
    source: Source | None
    """The trainer's source; None when it was not kept."""

    @classmethod
    def of(cls, ledger: Ledger, environment: Environment) -> Recorded:
        """What the ledger holds about an environment."""
        packed = ledger.source(environment.code)
        return cls(
            ledger.source(environment.config), None if packed is None else Source.unpack(packed)
        )

    @classmethod
    def named(cls, ledger: Ledger, name: str) -> Recorded:
        """What is kept under a digest, or belongs to a run.

        Raises:
            InvariantViolated: `name` is no digest that is kept, and no finished run.
        """
        text = ledger.source(name)
        if text is None:
            return cls.of(ledger, ledger.run(name).environment)
        try:
            return cls(None, Source.unpack(text))
        except ValueError:  # a profile is no base64
            return cls(text, None)

    def write(self, folder: Path) -> list[Path]:
        """Write it to a folder: `profile.yaml`, and the modules below `code/`.

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
                written += self.source.write(folder / CODE_FOLDER)
        except OSError as error:
            raise UsageError(f"--out {folder}: {error.strerror or error}.") from error
        return written
