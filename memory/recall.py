"""`Recall`: what the notebook knows about a topic, found by meaning.

A Chroma collection beside the ledger, derived from it and never the only copy of anything: it is
fed from the ledger's outbox with deterministic ids, so that a crash between two steps repeats
nothing visible, and `reindex` rebuilds it from nothing. Vectors are made here (`embed.py`), Chroma
makes none. A Chroma folder belongs to one process (two lose vectors and break the index), so that
the owner holds a lock on `recall.lock`; other processes search with `society.memory.open`.

Every method may raise `RecallUnavailable`; the society goes on without it, with deduplication by
exact match only.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from society.errors import RecallUnavailable
from society.memory.embed import embedder
from society.memory.folder import FileLock, NotebookFolder
from society.memory.ledger import Ledger
from society.memory.prose import Passage, Prose

if TYPE_CHECKING:
    import chromadb
    from chromadb.api.client import Client

COLLECTION = "notebook"
BATCH = 200
"""Lines of the outbox per write: a write costs a commit, whatever its size."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage that is near a query."""

    id: str
    """Kind and id of the record, e.g. `run:r00012`."""
    kind: str
    """`run`, `claim`, `verdict`, `hypothesis` or `insight`."""
    text: str
    similarity: float
    """Cosine, at most 1."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """`kind`, `ref` (id of the record) and `society`."""


class Recall:
    """The semantic index of one notebook. Open it with `Recall.open`; close it when done."""

    def __init__(self, path: Path, lock: FileLock, *, lower_is_better: bool) -> None:
        """Take over a locked folder; use `Recall.open`."""
        self._path = path
        self._lock = lock
        self._lower_is_better = lower_is_better
        with _reported(path):
            self._client: Client = _connect(path)
            self._collection = _collection(self._client)

    @classmethod
    def open(cls, folder: NotebookFolder | Path | str, *, lower_is_better: bool = True) -> Recall:
        """Open the index of a notebook's folder, making an empty one if there is none.

        Args:
            folder: The notebook.
            lower_is_better: Direction of the metric, for the wording of outcomes.

        Raises:
            RecallUnavailable: another process has it open, or it is corrupted.
        """
        place = folder if isinstance(folder, NotebookFolder) else NotebookFolder(folder)
        lock = _locked(place)
        try:
            return cls(place.recall, lock, lower_is_better=lower_is_better)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def rebuild(
        cls, folder: NotebookFolder | Path | str, ledger: Ledger, *, lower_is_better: bool = True
    ) -> Recall:
        """Remove the index, whatever its state, and build a new one from the ledger."""
        place = folder if isinstance(folder, NotebookFolder) else NotebookFolder(folder)
        lock = _locked(place)
        try:
            _remove(place.recall)
            recall = cls(place.recall, lock, lower_is_better=lower_is_better)
            recall.sync(ledger)
        except BaseException:
            lock.release()
            raise
        return recall

    def close(self) -> None:
        """Give the folder back."""
        self._client.close()
        self._lock.release()

    def __enter__(self) -> Recall:
        """The index itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder back."""
        self.close()

    def __len__(self) -> int:
        """Passages in the index."""
        with _reported(self._path):
            return int(self._collection.count())

    def sync(self, ledger: Ledger) -> int:
        """Index what was posted in the ledger since the last time.

        Returns:
            How many lines of the outbox were read.
        """
        cursor = f"recall:{self._collection.id}"
        read = 0
        while posted := ledger.posted(ledger.cursor(cursor), BATCH):
            prose = Prose(ledger, lower_is_better=self._lower_is_better)
            found = {one.id: one for one in map(prose.passage, posted) if one is not None}
            self._upsert(list(found.values()))
            ledger.set_cursor(cursor, posted[-1].seq)
            read += len(posted)
        return read

    def search(
        self, text: str, k: int = 5, kinds: Collection[str] | None = None
    ) -> tuple[Hit, ...]:
        """The `k` passages nearest in meaning to `text`, nearest first.

        Args:
            text: A question, a statement or knob names.
            k: How many at most.
            kinds: Only these kinds of passages (`society.memory.prose.KINDS`); None for all.
        """
        chosen = None if kinds is None else {"kind": {"$in": list(kinds)}}
        with _reported(self._path):
            count = min(k, self._collection.count())
            if count <= 0:
                return ()
            found = self._collection.query(
                query_embeddings=list(embedder().embed([text])),
                n_results=count,
                where=cast("chromadb.Where | None", chosen),
                include=["documents", "distances", "metadatas"],
            )
        return tuple(_hits(found))

    def _upsert(self, passages: Sequence[Passage]) -> None:
        if not passages:
            return
        vectors = embedder().embed([passage.text for passage in passages])
        with _reported(self._path):
            self._collection.upsert(
                ids=[passage.id for passage in passages],
                embeddings=vectors,
                documents=[passage.text for passage in passages],
                metadatas=[_metadata(passage) for passage in passages],
            )


def _metadata(passage: Passage) -> Mapping[str, str]:
    return {"kind": passage.kind, "ref": passage.ref, "society": passage.society}


def _hits(found: chromadb.QueryResult) -> Iterator[Hit]:
    """The rows of a query for one text."""
    documents, distances = found["documents"], found["distances"]
    metadatas = found["metadatas"]
    assert documents is not None
    assert distances is not None
    assert metadatas is not None
    for identity, text, distance, about in zip(
        found["ids"][0], documents[0], distances[0], metadatas[0], strict=True
    ):
        plain = {name: str(value) for name, value in about.items()}
        yield Hit(identity, plain["kind"], text, 1.0 - float(distance), plain)


def _locked(place: NotebookFolder) -> FileLock:
    lock = FileLock(place.recall_lock)
    try:
        place.path.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except OSError as error:
        raise RecallUnavailable(
            f"The semantic index at {place.recall} cannot be opened: {error.strerror}."
        ) from error
    if not held:
        raise RecallUnavailable(
            f"The semantic index at {place.recall} is open in process {lock.holder() or 'unknown'}"
            "; if that one hangs, stop it and run `society memory reindex`."
        )
    return lock


def _connect(path: Path) -> Client:
    import chromadb
    from chromadb.api.shared_system_client import SharedSystemClient
    from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False)
    try:
        return cast("Client", chromadb.PersistentClient(str(path), settings=settings))
    except BaseException:
        # Chroma keeps a half-started system per path and would fail on it for ever.
        SharedSystemClient.clear_system_cache()
        raise


def _collection(client: Client) -> chromadb.Collection:
    """The one collection, checked; closes the client when it is damaged."""
    try:
        collection = client.get_or_create_collection(
            COLLECTION, embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
        )
        collection.count()  # loads the vectors, so that damage shows now
    except BaseException:
        client.close()
        raise
    return collection


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RecallUnavailable(
            f"The semantic index at {path} cannot be removed: {error.strerror}. Remove it by hand, "
            "then run `society memory reindex`."
        ) from error


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn what Chroma raises on a damaged folder into one line that says what to do."""
    from chromadb.errors import ChromaError

    try:
        yield
    except (ChromaError, sqlite3.Error, OSError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Chroma's Rust core; cannot be imported
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> RecallUnavailable:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return RecallUnavailable(
        f"The semantic index at {path} cannot be read ({reason}). "
        "Rebuild it with `society memory reindex`."
    )
