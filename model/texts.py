"""A corpus of one's own: a folder of text, JSON Lines and Parquet files.

    *.txt, *.md              a file is a document
    *.jsonl, *.ndjson        a line is a document: an object with `text`, and perhaps `domain`
    *.parquet                a row is a document: a column `text`, and perhaps `domain`

Without a `domain` field the domain is the sub-folder of the file. Documents are read in the order
of the paths; empty ones are skipped. Which split a document belongs to is decided by the sha256 of
its text, so that it stays where it is when others are added, and copies of it go to the same split.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from society.errors import UsageError
from society.model.corpora import GROUP, BuildPlan, Document
from society.model.data import TRAIN
from society.records import Split

EVAL_SHARE = 0.05
"""Share of the documents in each evaluation split."""
MIN_BYTES = {TRAIN: 20_000, Split.VALIDATION.value: 2_000, Split.HOLDOUT.value: 2_000}
"""UTF-8 bytes that a split must have; less cannot tell two models apart."""


class Text(NamedTuple):
    """A document as it was read."""

    text: str
    domain: str


@dataclass(frozen=True, slots=True)
class TextFolder:
    """Files of a folder as a source of documents."""

    name: str
    folder: Path
    cuts: tuple[int, int]
    """Documents with a number up to the first are validation, up to the second holdout."""
    digest: str
    about: str
    plan: BuildPlan = field(default_factory=BuildPlan)

    @classmethod
    def scan(cls, folder: Path, name: str) -> TextFolder:
        """Read everything once, and decide where the splits lie.

        Raises:
            UsageError: A file cannot be read, or there is too little text.
        """
        digest = hashlib.sha256()
        numbers, sizes = [], []
        for text, domain in read_folder(folder):
            raw = text.encode()
            own = hashlib.sha256(raw).digest()
            digest.update(own + domain.encode() + b"\0")
            numbers.append(_number(own))
            sizes.append(len(raw))
        found = np.asarray(numbers, dtype=np.uint64)
        bytes_each = np.asarray(sizes, dtype=np.int64)
        cuts = _cuts(folder, found, bytes_each)
        _check_sizes(folder, found, bytes_each, cuts)
        about = f"{len(sizes)} documents, {sum(sizes)} bytes from {folder.name}"
        return cls(name, folder, cuts, digest.hexdigest(), about)

    def identity(self) -> str:
        """A sha256 over all texts and domains, in order."""
        return self.digest

    def groups(self) -> Iterator[list[Document]]:
        """All documents, in order."""
        texts = read_folder(self.folder)
        while group := [self._document(*one) for one in itertools.islice(texts, GROUP)]:
            yield group

    def _document(self, text: str, domain: str) -> Document:
        number = _number(hashlib.sha256(text.encode()).digest())
        return Document(text, split_of(number, self.cuts), domain)


def split_of(number: int, cuts: tuple[int, int]) -> str:
    """The split of a document by its number."""
    if number <= cuts[0]:
        return Split.VALIDATION.value
    return Split.HOLDOUT.value if number <= cuts[1] else TRAIN


def _number(digest: bytes) -> int:
    """The first 64 bits of a sha256."""
    return int.from_bytes(digest[:8])


def _cuts(folder: Path, numbers: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """At `EVAL_SHARE` and twice that, moved up where a split would have too few bytes."""
    distinct = len(np.unique(numbers))
    if distinct < 3:
        raise UsageError(
            f"{folder} holds {distinct} different documents; at least 3 are needed, one for "
            "each split. A .txt file is one document: cut it into several files, or write one "
            "document per line as JSON Lines."
        )
    order = np.argsort(numbers)
    numbers, sizes = numbers[order], sizes[order]
    share = int(EVAL_SHARE * 2**64)
    first = _cut(numbers, sizes, share)
    rest = numbers > first
    return first, max(first, _cut(numbers[rest], sizes[rest], 2 * share))


def _cut(numbers: np.ndarray, sizes: np.ndarray, limit: int) -> int:
    """The limit, or the number of the document that brings enough bytes; numbers ascend."""
    enough = int(np.searchsorted(np.cumsum(sizes), MIN_BYTES[Split.HOLDOUT.value]))
    return max(limit, int(numbers[min(enough, len(numbers) - 1)])) if len(numbers) else limit


def _check_sizes(
    folder: Path, numbers: np.ndarray, sizes: np.ndarray, cuts: tuple[int, int]
) -> None:
    splits = np.asarray([split_of(int(number), cuts) for number in numbers])
    found = {split: int(sizes[splits == split].sum()) for split in MIN_BYTES}
    if any(found[split] < least for split, least in MIN_BYTES.items()):
        have = ", ".join(f"{split} {size}" for split, size in found.items())
        need = ", ".join(f"{split} {size}" for split, size in MIN_BYTES.items())
        raise UsageError(
            f"{folder} holds too little text. Bytes found: {have}; needed: {need}. Splits are "
            "made of whole documents: add text, or cut it into more documents."
        )


# --------------------------------------------------------------------------- reading


def read_folder(folder: Path) -> Iterator[Text]:
    """Every document that is not empty, in the order of the paths.

    Raises:
        UsageError: Nothing to read, or a file cannot be read; names it and the line.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    known = [path for path in files if path.suffix.lower() in READERS and path.is_file()]
    if not known:
        raise UsageError(
            f"{folder} holds no file that ends in {', '.join(READERS)}; give --text a folder (or "
            "one file) of text."
        )
    for path in known:
        inside = path.relative_to(folder).parts if path != folder else (path.name,)
        domain = inside[0] if len(inside) > 1 else "all"
        try:
            for text, own in READERS[path.suffix.lower()](path):
                if text.strip():
                    yield Text(_encodable(text), own or domain)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _encodable(text: str) -> str:
    """Halves of surrogate pairs, which JSON can hold, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    yield path.read_bytes().decode("utf-8-sig"), ""


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(values, dict) or not isinstance(values.get("text"), str):
                raise UsageError(
                    f'{path}, line {number}: expected an object with a string "text", e.g. '
                    '{"text": "...", "domain": "..."}.'
                )
            yield values["text"], str(values.get("domain") or "")


def _read_rows(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "domain") if name in file.schema_arrow.names]
        if "text" not in columns:
            raise UsageError(
                f"{path}: no column 'text'; it has {', '.join(file.schema_arrow.names)}."
            )
        for batch in file.iter_batches(batch_size=GROUP, columns=columns):
            for row in batch.to_pylist():
                if row["text"] is not None and not isinstance(row["text"], str):
                    raise UsageError(f"{path}: the column 'text' does not hold strings.")
                yield row["text"] or "", str(row.get("domain") or "")
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} is not a Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".parquet": _read_rows,
}
"""How files are read, by the end of their name; others are ignored."""
