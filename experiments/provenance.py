"""What a run depends on, as text that can be kept: the effective profile, the trainer's source.

Both are named by a digest that `Environment` carries (`config`, `code`), so that anybody who holds
the text can tell whether it is the right one. Pure but for reading the source files.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from society.experiments.task import Profile, Task

DIGITS = 12
"""Hex digits of a digest."""
PARTS = ("agents", "configs", "experiments", "memory", "model", "roles")
"""Folders that are installed as subpackages of `society`; not all lie below it on disk."""


def profile_text(task: Task) -> str:
    """The profile that a task was built from, with every value in it, as YAML that loads again.

    It holds the whole baseline and not only the profile's own changes, so that neither a file that
    was edited nor another default of the recipe can change what it says. Empty for a task whose
    baseline does not fit into a profile.
    """
    options = getattr(task, "options", None)
    try:
        profile = Profile(
            task=task.name,
            name=task.profile,
            budget=task.budget,
            limits=task.limits,
            recipe=task.baseline.model_dump(),
            knobs=dict(task.spans),
            options=options.model_dump() if isinstance(options, BaseModel) else {},
        )
    except ValidationError:
        return ""
    return yaml.safe_dump(profile.model_dump(mode="json", exclude={"about"}), sort_keys=True)


def profile_digest(task: Task) -> str:
    """Names the effective profile; empty where there is none to keep."""
    text = profile_text(task)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS] if text else ""


@dataclass(frozen=True, slots=True)
class Source:
    """The source of some modules and packages (their own files, not those of subpackages)."""

    modules: Mapping[str, Mapping[str, str]]
    """Dotted name -> file name -> text, in the order in which they are hashed."""

    @classmethod
    def installed(cls, names: Sequence[str]) -> Source:
        """What these names are on this machine now; one that cannot be found has no file."""
        return cls({name: {f.name: _text(f) for f in _files(name)} for name in names})

    @classmethod
    def unpack(cls, packed: str) -> Source:
        """Back from `pack`."""
        return cls(json.loads(zlib.decompress(base64.b64decode(packed, validate=True))))

    def pack(self) -> str:
        """All of it as one short text."""
        return base64.b64encode(zlib.compress(json.dumps(self.modules).encode(), 9)).decode()

    @property
    def digest(self) -> str:
        """The first hex digits of a sha256 over names and files.

        Whoever changes how a run is made makes another environment, in which other bits are no
        surprise. A module that cannot be found counts by its name.
        """
        digest = hashlib.sha256()
        for name, files in self.modules.items():
            digest.update(name.encode())
            for file, text in files.items():
                digest.update(file.encode() + text.encode(errors="surrogateescape"))
        return digest.hexdigest()[:DIGITS]

    def write(self, folder: Path) -> list[Path]:
        """Write the files where an interpreter that finds `folder` first would import them."""
        written = []
        for name, files in self.modules.items():
            home = folder.joinpath(*_home(name, files))
            home.mkdir(parents=True, exist_ok=True)
            for file, text in files.items():
                (home / file).write_bytes(text.encode(errors="surrogateescape"))
                written.append(home / file)
        return written

    def install(self, folder: Path) -> None:
        """Make `folder` a place to import from: these files, and links to what else is installed.

        The packages around the recorded modules are made of links to what is installed now; the
        recorded packages hold no file but their own and what is no Python source (subpackages,
        data). Whether that is the recorded program, the digest taken by whoever imports it says.
        """
        for part in ("", *(f".{part}" for part in PARTS)):
            _link_package(f"society{part}", folder)
        for name, files in self.modules.items():
            home = _home(name, files)
            for depth in range(1, len(home) + 1):
                _link_package(".".join(home[:depth]), folder)
            place = folder.joinpath(*home)
            stale = place.glob("*.py") if "__init__.py" in files else [place / f for f in files]
            for file in stale:
                file.unlink(missing_ok=True)
        self.write(folder)


def _home(name: str, files: Mapping[str, str]) -> tuple[str, ...]:
    """Folders in which the files of a module or package lie."""
    parts = tuple(name.split("."))
    return parts if "__init__.py" in files else parts[:-1]


def _link_package(name: str, folder: Path) -> None:
    """A folder for an installed package, with a link to each thing in it; once."""
    place = folder.joinpath(*name.split("."))
    if place.is_symlink():
        place.unlink()
    elif place.is_dir():
        return
    place.mkdir(parents=True)
    spec = _spec(name)
    for found in (spec.submodule_search_locations or ()) if spec is not None else ():
        for entry in Path(found).iterdir():
            target = place / entry.name
            if entry.name != "__pycache__" and not target.is_symlink():
                target.symlink_to(entry.resolve())


def _files(name: str) -> list[Path]:
    spec = _spec(name)
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    return sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


def _text(file: Path) -> str:
    return file.read_bytes().decode(errors="surrogateescape")
