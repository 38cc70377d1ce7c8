"""`Settings`: everything a user can choose about a society, with the defaults in one place.

Read from `--config FILE` (YAML) and the command line; an unknown key is an error that names the
file and the nearest known key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from society.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DEFAULT_ROLES = ("experimenter", "verifier", "statistician", "meta-analyst")


class Price(BaseModel):
    """What a model's tokens cost, in dollars per million."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[float, Field(ge=0)]
    completion: Annotated[float, Field(ge=0)]


PRICES = {
    "gpt-5": Price(prompt=1.25, completion=10.0),
    "gpt-5-mini": Price(prompt=0.25, completion=2.0),
    "gpt-5-nano": Price(prompt=0.05, completion=0.4),
    "gpt-4.1": Price(prompt=2.0, completion=8.0),
    "gpt-4.1-mini": Price(prompt=0.4, completion=1.6),
    "gpt-4.1-nano": Price(prompt=0.1, completion=0.4),
}
"""Used unless `prices` are given: OpenAI's list prices, as others published them in March 2026."""


class Endpoint(BaseModel):
    """The language model that the brain `openai` asks, and what it may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    base_url: str = "https://api.openai.com/v1"
    """Of any server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, ..."""
    model: str = "gpt-5-mini"
    """As the server calls it."""
    key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; a local server needs none."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """None leaves it to the server."""
    context_tokens: Annotated[int, Field(ge=1_000)] = 12_000
    """Tokens of a prompt, at most."""
    answer_tokens: Annotated[int, Field(ge=100)] = 4_000
    """Tokens of an answer, at most."""
    deadline_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest wait for one answer, all attempts and pauses included."""
    attempts: Annotated[int, Field(ge=1)] = 4
    """Requests for one answer, at most."""
    concurrent: Annotated[int, Field(ge=1)] = 8
    """Requests under way at a time, all agents together."""
    env_proxy: bool = False
    """Whether to go through the proxy that HTTPS_PROXY and its like name; they are not used
    otherwise."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """All agents together; None for no limit."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """All agents together, both ways; None for no limit."""
    max_tokens: Annotated[int, Field(gt=0)] | None = 2_000_000
    """Of one society; then the brain `search` goes on. None for no limit."""
    max_tokens_per_agent: Annotated[int, Field(gt=0)] | None = None
    """Of one agent."""
    max_dollars: Annotated[float, Field(gt=0)] | None = 5.0
    """Of one society, by `prices`; None for no limit."""
    max_dollars_per_agent: Annotated[float, Field(gt=0)] | None = None
    """Of one agent."""
    prices: dict[str, Price] = Field(default_factory=lambda: dict(PRICES))
    """Model -> its price; of a model without one only tokens can be counted, not dollars."""
    code: bool = True
    """Whether it may change code where the task allows it, not only knobs."""
    review: bool = True
    """Whether another agent looks at a proposal before a run is spent on it."""

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, value: str) -> str:
        address = urlsplit(value)
        try:
            known = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:  # the port is no number
            known = False
        if not known or "@" in address.netloc or address.query or address.fragment:
            raise ValueError(
                "expected the address of a server that speaks OpenAI's protocol, without user, "
                "password or query, e.g. http://127.0.0.1:8080/v1"
            )
        return value.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _check_key_env(cls, value: str) -> str:
        if not value.isidentifier() or not value.isascii():
            raise ValueError(
                "expected the name of an environment variable, e.g. OPENAI_API_KEY; the key itself "
                "belongs into that variable and nowhere else"
            )
        return value


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
    endpoint: Endpoint = Field(default_factory=Endpoint)
    """Where the brain `openai` finds its model, and what that may cost."""
    sandbox: Literal["limits", "filters", "namespaces", "bubblewrap"] = "filters"
    """The least that foreign code must be confined by; where the machine offers less, a variant
    that changes code is refused."""
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

    Of `endpoint`, single values may be given.

    Raises:
        UsageError: Unreadable file, unknown key, or a value out of range.
    """
    values = _read(config) if config else {}
    given = {name: value for name, value in given.items() if value is not None}
    endpoint = values.get("endpoint")
    if isinstance(endpoint, dict) and "endpoint" in given:
        given["endpoint"] = endpoint | given["endpoint"]
    values |= given
    return validate(values, source=str(config) if config else "command line")


def validate(values: Mapping[str, Any], source: str) -> Settings:
    """Build `Settings`, turning pydantic's findings into one clear line."""
    unknown = sorted(set(values) - set(Settings.model_fields))
    if unknown:
        raise UnknownName(f"setting in {source}", unknown[0], Settings.model_fields)
    try:
        return Settings(**values)
    except ValidationError as error:
        found = error.errors()
        strange = [one for one in found if one["type"] == "extra_forbidden"]
        first = (strange or found)[0]  # a misspelt key is why another one is missing
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        if strange:
            *path, name = first["loc"]
            inside = ".".join(map(str, path))
            known = _fields_at(Settings, path)
            raise UnknownName(f"setting of {inside} in {source}", str(name), known) from None
        raise UsageError(f"{source}: {where}: {first['msg']}") from None


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> Iterable[str]:
    """Names of the fields of the model within a model at a path of field names and keys."""
    if not path:
        return model.model_fields
    annotation: Any = model.model_fields[str(path[0])].annotation
    if get_origin(annotation) is dict:
        return _fields_at(get_args(annotation)[1], path[2:])
    return _fields_at(annotation, path[1:])


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
