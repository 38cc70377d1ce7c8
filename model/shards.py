"""Corpora that are downloaded: described in YAML, stored in Parquet shards.

The descriptions are `corpus-<name>.yaml` in `society.configs`. Files are kept in
`<cache>/downloads/<name>`, with a lock file that says which bytes belong to each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from society.errors import UnknownName, UsageError
from society.model.corpora import BuildPlan, Document
from society.model.data import KJV, TRAIN, CorpusUnavailable
from society.model.download import Wanted
from society.records import Split

PREFIX = "corpus-"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0)]


class Description(BaseModel):
    """Where a corpus is, and how it is cut into splits and tokens. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    about: str
    base_url: str
    file: str
    """Name of a shard's file; `{:05d}` stands for its number."""
    column: str = "text"
    train_shards: Count
    """Shards that are trained on, from number 0 on, unless the user wants another number."""
    holdout: Count
    """Number of the holdout shard; training shards come before it."""
    validation: Count
    """Number of the validation shard."""
    vocab: int
    special_tokens: Count = 1
    tokenizer_document_chars: Count | None = None
    tokenizer_total_chars: Count | None = None
    bytes_as_decoded: bool = False
    sha256: dict[str, Digest] = {}
    """Known digests by file name."""

    @property
    def plan(self) -> BuildPlan:
        """How its text becomes tokens."""
        return BuildPlan(
            self.special_tokens,
            self.tokenizer_document_chars,
            self.tokenizer_total_chars,
            self.bytes_as_decoded,
        )

    def files(self, shards: int | None = None) -> dict[str, str]:
        """Name of each file -> its split.

        Raises:
            UsageError: There are not so many training shards.
        """
        count = shards or self.train_shards
        most = min(self.holdout, self.validation)
        if not 0 < count <= most:
            raise UsageError(f"--shards: {self.name} has 1 to {most} training shards, not {count}.")
        names = {self.file.format(number): TRAIN for number in range(count)}
        names[self.file.format(self.validation)] = Split.VALIDATION.value
        return names | {self.file.format(self.holdout): Split.HOLDOUT.value}

    def wanted(self, shards: int | None = None, base_url: str | None = None) -> list[Wanted]:
        """What has to be downloaded.

        Raises:
            UsageError: The number of shards or the address is wrong.
        """
        base = (base_url or self.base_url).rstrip("/")
        if not base.startswith(("http://", "https://")):
            raise UsageError(f"--base-url: {base!r} is no address; it starts with https://.")
        names = self.files(shards)
        return [Wanted(name, f"{base}/{name}", self.sha256.get(name)) for name in names]


@dataclass(frozen=True, slots=True)
class Shards:
    """Downloaded shards as a source of documents; a row group stays together."""

    description: Description
    folder: Path
    files: Mapping[str, str]
    """Name -> split."""
    digests: Mapping[str, str]
    """Name -> sha256."""

    @property
    def name(self) -> str:
        """Name of the corpus."""
        return self.description.name

    @property
    def about(self) -> str:
        """One sentence for the user."""
        return self.description.about

    @property
    def plan(self) -> BuildPlan:
        """How its text becomes tokens."""
        return self.description.plan

    def identity(self) -> str:
        """A sha256 over the digests of all files and their splits."""
        parts = [(name, split, self.digests[name]) for name, split in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def groups(self) -> Iterator[list[Document]]:
        """All rows, shard by shard: training, validation, holdout."""
        for name, split in self.files.items():
            for texts in row_groups(self.folder / name, self.description.column):
                yield [Document(text, split) for text in texts]


def row_groups(path: Path, column: str) -> Iterator[list[str]]:
    """The texts of each row group of a Parquet file.

    Raises:
        CorpusUnavailable: It cannot be read, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowInvalid, KeyError, OSError) as error:
        raise CorpusUnavailable(
            f"{path} cannot be read as Parquet with a column {column!r}: {error}. Delete it and "
            "prepare the corpus again."
        ) from error


def known() -> tuple[str, ...]:
    """Names of the corpora that can be prepared without files of one's own."""
    names = [entry.name for entry in resources.files("society.configs").iterdir()]
    described = [name for name in names if name.startswith(PREFIX) and name.endswith(".yaml")]
    return tuple(
        sorted([KJV, *(name.removeprefix(PREFIX).removesuffix(".yaml") for name in described)])
    )


def describe(name: str) -> Description:
    """The shipped description of a corpus.

    Raises:
        UnknownName: There is none of this name.
    """
    if name not in known() or name == KJV:
        raise UnknownName("corpus", name, known())
    file = resources.files("society.configs") / f"{PREFIX}{name}.yaml"
    return read_description(file.read_text("utf-8"), file.name)


def read_description(text: str, where: str) -> Description:
    """Parse a description; raises `UsageError` with the file's name for anything unexpected."""
    try:
        return Description.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "values"
        raise UsageError(f"{where}: {key}: {first['msg']}") from error
