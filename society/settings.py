"""`Settings`: everything a user can choose about a society, with the defaults in one place.

Read from `--config FILE` (YAML) and the command line; an unknown key is an error that names the
file and the nearest known key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from society.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_ROLES = ("experimenter", "verifier", "statistician", "meta-analyst")


class Settings(BaseModel):
    """What a society is and how much it may spend. Frozen; stored with the society."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = "pretrain"
    """A known task, or `module:Class`."""
    profile: str | None = None
    """Profile of the task; None for the task's first one (`cpu` for pretrain)."""
    agents: Annotated[int, Field(ge=2, le=512)] = 8
    """Number of agents; at least two, because nobody verifies their own claim."""
    roles: dict[str, int] = Field(default_factory=dict)
    """Fixed number of agents per role; empty lets every agent choose its duties."""
    extra_roles: tuple[str, ...] = ()
    """Roles beside the usual four: names of the entry-point group, or `module:Class`."""
    brain: str = "search"
    """Where ideas come from."""
    seed: int | None = None
    """Makes a one-slot society repeatable; None draws one."""
    runs: Annotated[int, Field(gt=0)] | None = None
    """Stop after so many training runs."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop after so much wall time; runs in flight are finished."""
    until: float | None = None
    """Stop once a confirmed champion's mean score on the holdout is this good."""
    slots: Annotated[int, Field(ge=1)] | None = None
    """Training runs at a time; None for one per core."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where training runs."""
    patience: Annotated[int, Field(ge=0)] = 2
    """Screening runs that the best proposal must stand unbeaten before a claim is filed."""
    knowledge: Literal["shared", "own"] = "shared"
    """What agents know when they propose: all screening results, or only those of their own runs
    and the champion's. With `own`, searching the notebook by meaning and hypotheses are off too."""
    recall: str = "embedded"
    """Where the semantic index lives: `embedded` in the notebook's folder, on a Chroma server at
    `http://host:port`, or `off`."""

    @field_validator("recall")
    @classmethod
    def _check_recall(cls, value: str) -> str:
        if value in ("embedded", "off"):
            return value
        address = urlsplit(value)
        rest = address.path.strip("/") or address.query or address.fragment
        try:
            known = address.scheme in ("http", "https") and address.hostname and not rest
            if known and "@" not in address.netloc and address.port != 0:
                return value.rstrip("/")
        except ValueError:  # the port is no number
            pass
        raise ValueError(
            f"{value!r} is no place for the semantic index; choose embedded, off or the address "
            "of a Chroma server, e.g. http://127.0.0.1:8000"
        )

    @model_validator(mode="after")
    def _check_roles(self) -> Settings:
        if self.roles and sum(self.roles.values()) != self.agents:
            total = sum(self.roles.values())
            raise ValueError(
                f"--roles names {total} agents but --agents is {self.agents}; make them equal"
            )
        return self

    @property
    def bounded(self) -> bool:
        """Whether any budget ends the society."""
        return any(limit is not None for limit in (self.runs, self.minutes, self.until))


def parse_roles(text: str) -> dict[str, int]:
    """Turn `experimenter=4,verifier=2` into counts.

    Raises:
        UsageError: A part is not `name=count` with a positive count.
    """
    counts: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, count = part.partition("=")
        if not count.isdigit() or int(count) < 1:
            raise UsageError(f"--roles: {part!r} is not name=count, e.g. experimenter=4,verifier=2")
        counts[name.strip()] = int(count)
    return counts


def load_settings(config: Path | None, **given: Any) -> Settings:
    """Merge a YAML file (if any) with what the command line gave (values that are not None).

    Raises:
        UsageError: Unreadable file, unknown key, or a value out of range.
    """
    values = _read(config) if config else {}
    values |= {name: value for name, value in given.items() if value is not None}
    return validate(values, source=str(config) if config else "command line")


def validate(values: Mapping[str, Any], source: str) -> Settings:
    """Build `Settings`, turning pydantic's findings into one clear line."""
    unknown = sorted(set(values) - set(Settings.model_fields))
    if unknown:
        raise UnknownName(f"setting in {source}", unknown[0], Settings.model_fields)
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise UsageError(f"{source}: {where}: {first['msg']}") from None


def _read(config: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(config.read_text())
    except OSError as error:
        raise UsageError(f"{config}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{config}: not YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise UsageError(f"{config}: expected `key: value` lines, found {type(values).__name__}")
    return dict(values or {})
