"""Making a corpus: documents in, the folder that `society.model.data` describes out.

A source yields its documents in groups, each with its split and its domain, and can be read more
than once. The vocabulary is learned from the train split alone. A group is tokenised by one worker
process, and the results are written in the order of the source, so that the number of workers does
not change a byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from society.errors import UsageError
from society.model.data import SPLITS, TRAIN, Corpus, CorpusUnavailable, corpus_at
from society.model.files import building, locked, sha256_of, write_atomically

if TYPE_CHECKING:
    import tiktoken

    from society.model.tokenizer import Encoded, Ranks

FORMAT = 1
MAX_DOMAINS = 2**16
GROUP = 1_024
"""Documents of a group where the source has no grouping of its own."""

OnProgress = Callable[[str, int], None]
"""Called with a name of the step and the UTF-8 bytes of text done so far."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it belongs."""

    text: str
    split: str
    """One of `data.SPLITS`."""
    domain: str = "all"


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """How text becomes tokens, apart from the size of the vocabulary."""

    special: int = 1
    """Special tokens, BOS included; they take the last ids."""
    document_chars: int | None = None
    """The vocabulary is learned from so many characters of a document."""
    total_chars: int | None = None
    """The vocabulary is learned from so many characters in all."""
    bytes_as_decoded: bool = False
    """How `tokenizer.token_bytes` counts."""


class Source(Protocol):
    """Where documents come from."""

    @property
    def name(self) -> str:
        """Name of the corpus."""

    @property
    def about(self) -> str:
        """One sentence for the user."""

    @property
    def plan(self) -> BuildPlan:
        """How its text becomes tokens."""

    def identity(self) -> str:
        """A sha256 that no other text of the same name has."""

    def groups(self) -> Iterator[list[Document]]:
        """All documents in order, the same ones every time."""


def build(
    source: Source,
    cache: Path,
    vocab: int,
    *,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Make a corpus in one vocabulary, or find it made from the same text.

    Safe in several processes at once: one works, the others wait. A process that is killed leaves
    nothing that would pass for a corpus.

    Raises:
        UsageError: The name is taken by another text, the text is too short for the vocabulary, or
            the cache cannot be written.
    """
    corpus = corpus_at(cache, vocab, source.name)
    try:
        with locked(cache / "corpora" / f".{source.name}-{vocab}.lock"):
            if corpus.ready:
                _same(corpus, source)
                return corpus
            with building(corpus.folder) as folder:
                unfinished = Corpus(source.name, vocab, folder)
                _fill(unfinished, source, workers, on_progress or _silent)
    except OSError as error:
        raise UsageError(
            f"The cache folder {cache} cannot be used: {error.strerror}. "
            "Make room, or name another folder in SOCIETY_CACHE."
        ) from error
    return corpus


def _silent(step: str, done: int) -> None:
    """Nobody wants to know."""


def _same(corpus: Corpus, source: Source) -> None:
    if corpus.about()["source"] != source.identity():
        raise UsageError(
            f"The corpus {corpus.name!r} was prepared from another text. Give this one another "
            f"name by --name, or delete the folder {corpus.folder.parent} first."
        )


def _fill(corpus: Corpus, source: Source, workers: int, on_progress: OnProgress) -> None:
    """Write every file of a corpus into its (unfinished) folder."""
    from society.model import tokenizer  # rustbpe and tiktoken are not needed to load

    plan = source.plan
    texts = _watched(_train_texts(source.groups(), plan), on_progress)
    ranks = tokenizer.train_ranks(texts, corpus.vocab, plan.special)
    _check_size(ranks, corpus, plan)
    tokenizer.save_ranks(corpus.tokenizer, ranks)
    encoder = tokenizer.encoding(ranks, plan.special)
    lengths = tokenizer.token_bytes(encoder, as_decoded=plan.bytes_as_decoded)
    names: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        writers = {split: _Writer.open(corpus.split(split), stack) for split in SPLITS}
        done = 0
        for group, encoded in _encoded(source.groups(), ranks, plan.special, workers):
            for split, writer in writers.items():
                done += writer.add(group, encoded, split, names)
            on_progress("tokenising", done)
        bos = tokenizer.bos_of(encoder)
        splits = {s: w.finish(corpus, s, bos, list(names), lengths) for s, w in writers.items()}
    record = {
        "format": FORMAT, "name": corpus.name, "about": source.about, "vocab": corpus.vocab,
        "special": plan.special, "source": source.identity(), "sha256": _joined(splits),
        "domains": list(names), "splits": splits,
    }  # fmt: skip
    write_atomically(corpus.record, json.dumps(record, indent=1).encode())


def _joined(splits: dict[str, dict[str, object]]) -> str:
    """One sha256 for all splits."""
    return hashlib.sha256("".join(str(splits[s]["sha256"]) for s in SPLITS).encode()).hexdigest()


def _check_size(ranks: Ranks, corpus: Corpus, plan: BuildPlan) -> None:
    wanted = corpus.vocab - plan.special
    if len(ranks) != wanted:
        raise UsageError(
            f"The text of {corpus.name!r} gives a vocabulary of {len(ranks) + plan.special} "
            f"tokens, not {corpus.vocab}: use more text, or a smaller --vocab (257 at least)."
        )


def _train_texts(groups: Iterable[list[Document]], plan: BuildPlan) -> Iterator[str]:
    """What the vocabulary is learned from."""
    seen = 0
    for group in groups:
        for document in group:
            if document.split != TRAIN:
                continue
            text = document.text[: plan.document_chars]
            seen += len(text)
            yield text
            if plan.total_chars is not None and seen >= plan.total_chars:
                return


def _watched(texts: Iterator[str], on_progress: OnProgress) -> Iterator[str]:
    done = 0
    for index, text in enumerate(texts):
        done += len(text)
        if index % GROUP == 0:
            on_progress("learning the vocabulary", done)
        yield text


# --------------------------------------------------------------------------- tokenising

_encoder: tiktoken.Encoding | None = None
"""The vocabulary of a worker process."""


def _encoded(
    groups: Iterable[list[Document]], ranks: Ranks, special: int, workers: int
) -> Iterator[tuple[list[Document], Encoded]]:
    """Every group with its tokens, in order; at most two groups a worker are in memory."""
    if workers <= 1:
        from society.model import tokenizer

        encoder = tokenizer.encoding(ranks, special)
        for group in groups:
            yield group, tokenizer.encode(encoder, [document.text for document in group])
        return
    context = multiprocessing.get_context("spawn")
    setup = (ranks, special, os.getpid())
    with ProcessPoolExecutor(workers, context, _start_worker, setup) as pool:
        waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
        for group in groups:
            waiting.append((group, pool.submit(_encode, [one.text for one in group])))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _start_worker(ranks: Ranks, special: int, parent: int) -> None:
    """Build the vocabulary, and end with the parent, even if that is killed."""
    global _encoder
    from society.model import tokenizer

    _encoder = tokenizer.encoding(ranks, special)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    from society.model import tokenizer

    if _encoder is None:  # pragma: no cover - the initialiser ran
        raise CorpusUnavailable("A worker has no vocabulary.")
    return tokenizer.encode(_encoder, texts)


# --------------------------------------------------------------------------- writing


@dataclass(slots=True)
class _Writer:
    """One split while it is written."""

    folder: Path
    file: BinaryIO
    lengths: list[np.ndarray] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    bytes: int = 0

    @classmethod
    def open(cls, folder: Path, stack: contextlib.ExitStack) -> _Writer:
        """Start an empty split."""
        folder.mkdir()
        file = stack.enter_context((folder / "tokens.npy").open("wb"))
        file.write(_header(0))
        return cls(folder, file)

    def add(
        self, group: list[Document], encoded: Encoded, split: str, names: dict[str, int]
    ) -> int:
        """Append the documents of this split; returns their UTF-8 bytes."""
        mine = np.asarray([document.split == split for document in group], dtype=bool)
        if not mine.any():
            return 0
        kept = np.repeat(mine, encoded.lengths)
        self.file.write(encoded.tokens[kept].tobytes())
        self.lengths.append(encoded.lengths[mine])
        self.groups.append(int(mine.sum()))
        size = 0
        for document in (one for one in group if one.split == split):
            self.domains.append(_number(document.domain, names))
            size += len(document.text.encode())
        self.bytes += size
        return size

    def finish(
        self, corpus: Corpus, split: str, bos: int, names: list[str], token_bytes: np.ndarray
    ) -> dict[str, object]:
        """Write the other files and the record; returns the counts."""
        if not self.lengths:
            raise UsageError(f"The corpus {corpus.name!r} has no document in its {split} split.")
        lengths = np.concatenate(self.lengths)
        self.file.seek(0)
        self.file.write(_header(int(lengths.sum())))
        self.file.close()
        np.save(self.folder / "starts.npy", np.cumsum(lengths) - lengths)
        np.save(self.folder / "domains.npy", np.asarray(self.domains, dtype=np.uint16))
        if split != TRAIN:
            np.save(self.folder / "token_bytes.npy", token_bytes)
        counts: dict[str, object] = {
            "documents": len(lengths), "tokens": int(lengths.sum()), "bytes": self.bytes,
        }  # fmt: skip
        files = {path.name: _entry(path) for path in sorted(self.folder.iterdir())}
        digest = "".join(str(entry["sha256"]) for entry in files.values())
        counts["sha256"] = hashlib.sha256(digest.encode()).hexdigest()
        record = counts | {
            "corpus": corpus.name, "vocab": corpus.vocab, "split": split, "bos": bos,
            "domains": names, "groups": self.groups, "files": files,
        }  # fmt: skip
        write_atomically(self.folder / "split.json", json.dumps(record).encode())
        return counts


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _number(domain: str, names: dict[str, int]) -> int:
    """The number of a domain, a new one if it is new."""
    if domain not in names and len(names) == MAX_DOMAINS:
        raise UsageError(f"More than {MAX_DOMAINS} domains; the field `domain` names a few groups.")
    return names.setdefault(domain, len(names))


def _header(tokens: int) -> bytes:
    """The start of an .npy file of so many tokens; of the same length for every number."""
    buffer = io.BytesIO()
    described = {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()
