"""`Recall`: what the notebook knows about a topic, found by meaning.

A Chroma collection, embedded in the notebook's folder or on a Chroma server, derived from the
ledger and never the only copy of anything: it is fed from the ledger's outbox with deterministic
ids, so that a crash between two steps repeats nothing visible, and `rebuild` makes it from nothing.
Vectors are made here (`embed.py`), Chroma makes none.

An embedded index belongs to one process (two lose vectors and break it), so that the owner holds a
lock on `recall.lock`; other processes search with `society.memory.open`. On a server the collection
is named by the ledger's id: notebooks that share a ledger share it and all of them feed it, others
do not get in each other's way.

Every method may raise `RecallUnavailable`; the society goes on without it, with deduplication by
exact match only. Safe to use from several threads.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from society.errors import RecallUnavailable
from society.memory.embed import embedder
from society.memory.folder import FileLock, NotebookFolder
from society.memory.prose import ALL, KINDS, OUTCOMES_OF, Filter, Passage, Prose, milliseconds

if TYPE_CHECKING:
    import chromadb
    import httpx
    from chromadb.api.client import Client

    from society.memory.embed import Vectors
    from society.memory.feed import Posted
    from society.memory.ledger import Ledger

T = TypeVar("T")

EMBEDDED, OFF = "embedded", "off"
FORMAT = 2
"""Raised whenever passages are stored differently: the collection of another format is not read."""
COLLECTION = f"notebook-{FORMAT}"
"""The collection in a folder."""
BATCH = 1000
"""Lines of the outbox per write: a write costs a commit, whatever its size."""
CONNECT_S = 3.0
"""How long a server may take to accept a connection, and to say that it lives."""
ANSWER_S = 20.0
"""How long a server may take to answer."""
NEAREST = (64, 300)
"""How many of the nearest passages are looked through before Chroma itself applies a filter: it
takes 1-2 us per passage that passes, which is most of the time of a filter that lets many pass."""

_CLASS = "class"
"""Metadata: kind and outcome as one word, so that a filter by both is one condition."""
_KNOB = "knob:"
"""Metadata: one key per knob, its value the class; Chroma indexes words, but not booleans."""
_OWN = frozenset({_CLASS, "society", "agent", "at", "text"})
_MUTABLE = ("hypothesis", "verdict")
"""Kinds whose passage is rewritten when something becomes of them."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage that is near a query."""

    passage: Passage
    similarity: float
    """Cosine, at most 1."""

    @property
    def id(self) -> str:
        """Kind and id of the record, e.g. `run:r00012`."""
        return self.passage.id

    @property
    def kind(self) -> str:
        """One of `society.memory.prose.KINDS`."""
        return self.passage.kind

    @property
    def ref(self) -> str:
        """Id of the record."""
        return self.passage.ref

    @property
    def text(self) -> str:
        """The passage itself."""
        return self.passage.text


class Recall:
    """The semantic index of one ledger. Open it with `Recall.open`; close it when done."""

    def __init__(self, place: Place, *, lower_is_better: bool) -> None:
        """Take over a place; use `Recall.open`."""
        self._place = place
        self._lower_is_better = lower_is_better
        self._feeding = threading.Lock()
        with place.reported():
            self._client: Client = place.connect()
            try:
                self._collection = self._found()
            except BaseException:
                self._client.close()
                raise

    @classmethod
    def open(
        cls,
        folder: NotebookFolder | Path | str,
        ledger: Ledger | None = None,
        *,
        at: Path | str | None = None,
        lower_is_better: bool = True,
    ) -> Recall:
        """Open the index of a notebook, making an empty one if there is none.

        Args:
            folder: The notebook.
            ledger: Its ledger; needed for an index on a server, which is named by it.
            at: `embedded`, `off` or a Chroma server's `http://host:port`; None for what the
                folder remembers.
            lower_is_better: Direction of the metric, for the wording of outcomes.

        Raises:
            RecallUnavailable: it is off; another process has the folder open, or it is corrupted;
                no Chroma server answers.
        """
        place = _place(folder, ledger, at)
        try:
            return cls(place, lower_is_better=lower_is_better)
        except BaseException:
            place.leave()
            raise

    @classmethod
    def rebuild(
        cls,
        folder: NotebookFolder | Path | str,
        ledger: Ledger,
        *,
        at: Path | str | None = None,
        lower_is_better: bool = True,
    ) -> Recall:
        """Remove the index, whatever its state, and build a new one from the ledger.

        Others that use an index on a server go on with the new one.
        """
        place = _place(folder, ledger, at)
        try:
            with place.reported():
                place.remove()
            recall = cls(place, lower_is_better=lower_is_better)
            recall.sync(ledger)
        except BaseException:
            place.leave()
            raise
        return recall

    def close(self) -> None:
        """Give the folder back, or leave the server."""
        with self._feeding:
            self._client.close()
            self._place.leave()

    def __enter__(self) -> Recall:
        """The index itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder back."""
        self.close()

    def __len__(self) -> int:
        """Passages in the index."""
        return self._use(lambda collection: int(collection.count()))

    def __str__(self) -> str:
        """Where the index is."""
        return self._place.name

    def passages(self) -> dict[str, Passage]:
        """Every passage in the index, by its id."""
        found = self._use(lambda collection: collection.get(include=["metadatas"]))
        told = zip(found["ids"], found["metadatas"] or (), strict=True)
        return {identity: _passage(identity, about) for identity, about in told}

    def behind(self, ledger: Ledger) -> int:
        """How many lines of the outbox are still to be indexed; asks the ledger alone."""
        return max(0, ledger.posted_last() - ledger.cursor(self._cursor()))

    def sync(self, ledger: Ledger, *, within_s: float = float("inf")) -> int:
        """Index what was posted in the ledger since the last time, whoever has indexed that.

        Args:
            ledger: What is indexed.
            within_s: Seconds after which no further batch is begun; the rest waits.

        Returns:
            How many lines of the outbox were read.
        """
        prose, read = Prose(ledger, lower_is_better=self._lower_is_better), 0
        until = time.monotonic() + within_s
        with self._feeding:
            self._bind(ledger)
            while time.monotonic() < until:
                cursor = self._cursor()
                posted = ledger.posted(ledger.cursor(cursor), BATCH)
                if not posted:
                    break
                if not self._write(prose.passages(posted)):
                    continue  # into a new collection, which has a cursor of its own
                if self._place.shared:
                    self._catch_up(prose, posted)
                ledger.set_cursor(cursor, posted[-1].seq)
                read += len(posted)
        return read

    def search(self, text: str, k: int = 5, where: Filter = ALL) -> tuple[Hit, ...]:
        """The `k` passages nearest in meaning to `text`, nearest first.

        Args:
            text: A question, a statement or knob names.
            k: How many at most.
            where: Which passages count.

        Raises:
            UnknownName: there is no such kind or outcome.
        """
        where.check()
        if k <= 0:
            return ()
        vector = embedder().embed([text])
        if where.is_empty:
            return self._nearest(vector, k)
        for count in NEAREST:
            near = self._nearest(vector, count)
            hits = tuple(hit for hit in near if where.accepts(hit.passage))
            if len(hits) >= k or len(near) < count:
                return hits[:k]
        return self._nearest(vector, k, where)

    def _nearest(self, vector: Vectors, count: int, where: Filter = ALL) -> tuple[Hit, ...]:
        conditions = _conditions(where)
        found = self._use(
            lambda collection: collection.query(
                query_embeddings=list(vector),
                n_results=count,
                where=cast("chromadb.Where | None", conditions),
                include=["distances", "metadatas"],
            )
        )
        return tuple(_hits(found))

    def _use(self, action: Callable[[chromadb.Collection], T]) -> T:
        """Do something with the collection; when it was made anew meanwhile, with the new one."""
        from chromadb.errors import NotFoundError

        with self._place.reported():
            try:
                return action(self._collection)
            except NotFoundError:
                self._collection = self._found()
                return action(self._collection)

    def _write(self, passages: Sequence[Passage]) -> bool:
        """Write passages; False, and nothing written, when the collection was made anew."""
        if not passages:
            return True
        from chromadb.errors import NotFoundError

        vectors = embedder().embed([passage.text for passage in passages])
        with self._place.reported():
            try:
                self._collection.upsert(
                    ids=[passage.id for passage in passages],
                    embeddings=vectors,
                    metadatas=[_metadata(passage) for passage in passages],
                )
            except NotFoundError:
                self._collection = self._found()
                return False
        return True

    def _catch_up(self, prose: Prose, posted: Sequence[Posted]) -> None:
        """Rewrite what has changed while it was written: another one may have indexed it since."""
        lines = [one for one in posted if one.kind in _MUTABLE]
        written = prose.passages(lines) if lines else []
        while written:
            self._write(written)
            now = prose.passages(lines)
            written = [passage for passage in now if passage not in written]

    def _bind(self, ledger: Ledger) -> None:
        """Make sure that the collection is this ledger's: a folder may hold another one's."""
        if self._place.shared:
            return
        with self._place.reported():
            about = dict(self._collection.metadata or {})
            if about.get("ledger") == ledger.id:
                return
            if "ledger" in about:
                self._client.delete_collection(self._place.collection)
                self._collection = self._found()
            self._collection.modify(metadata={"ledger": ledger.id})

    def _cursor(self) -> str:
        return f"recall:{self._collection.id}"

    def _found(self) -> chromadb.Collection:
        """The one collection, made if it is missing, and checked."""
        collection = self._client.get_or_create_collection(
            self._place.collection,
            embedding_function=None,
            configuration={"hnsw": {"space": "cosine"}},
        )
        collection.count()  # loads the vectors, so that damage shows now
        return collection


# --- passages as Chroma keeps them ----------------------------------------------------------------


def _metadata(passage: Passage) -> Mapping[str, str | int]:
    """The text is metadata as well: as a `document` Chroma would index all its letters."""
    name = _class(passage.kind, passage.outcome)
    return {
        _CLASS: name,
        "society": passage.society,
        "agent": passage.agent,
        "at": milliseconds(passage.at),
        "text": passage.text,
        **{f"{_KNOB}{knob}": name for knob in passage.knobs},
    }


def _passage(identity: str, about: Mapping[str, Any]) -> Passage:
    kind, _, outcome = str(about[_CLASS]).partition("/")
    knobs = (name.removeprefix(_KNOB) for name in about if name not in _OWN)
    return Passage(
        id=identity,
        kind=kind,
        ref=identity.partition(":")[2],
        society=str(about["society"]),
        text=str(about["text"]),
        agent=str(about["agent"]),
        outcome=outcome,
        knobs=frozenset(knobs),
        at=about["at"] / 1000,
    )


def _class(kind: str, outcome: str) -> str:
    return f"{kind}/{outcome}"


def _conditions(where: Filter) -> Mapping[str, Any] | None:
    """A filter in Chroma's words."""
    classes = [
        _class(kind, outcome)
        for kind in KINDS
        for outcome in OUTCOMES_OF.get(kind, ("",))
        if where.accepts_class(kind, outcome)
    ]
    parts: list[Mapping[str, Any]] = []
    if where.knob is not None:
        parts.append({f"{_KNOB}{where.knob}": {"$in": classes or [""]}})
    elif where.kinds is not None or where.outcome is not None:
        parts.append({_CLASS: {"$in": classes or [""]}})
    if where.agent is not None:
        parts.append({"agent": where.agent})
    if where.since is not None:
        parts.append({"at": {"$gte": milliseconds(where.since)}})
    if where.until is not None:
        parts.append({"at": {"$lt": milliseconds(where.until)}})
    return {"$and": parts} if len(parts) > 1 else parts[0] if parts else None


def _hits(found: chromadb.QueryResult) -> Iterator[Hit]:
    """The rows of a query for one text."""
    distances, metadatas = found["distances"], found["metadatas"]
    assert distances is not None
    assert metadatas is not None
    for identity, distance, about in zip(found["ids"][0], distances[0], metadatas[0], strict=True):
        yield Hit(_passage(identity, about), 1.0 - float(distance))


# --- where it lies --------------------------------------------------------------------------------


class Place(ABC):
    """Where an index lies. Its methods may raise whatever Chroma raises, inside `reported`."""

    name: str
    """For messages."""
    collection: str
    """Name of the collection."""
    shared: bool
    """Whether others may feed it at the same time."""

    @abstractmethod
    def connect(self) -> Client:
        """A client of it."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the index, whatever its state."""

    @abstractmethod
    def leave(self) -> None:
        """Let others have it; may be called twice."""

    @abstractmethod
    def unavailable(self, error: BaseException) -> RecallUnavailable:
        """What an error of Chroma means here, and what to do."""

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn what Chroma raises into one line that says what to do."""
        import httpx
        from chromadb.errors import ChromaError

        known = (
            ChromaError, sqlite3.Error, OSError, ValueError, KeyError, RuntimeError,
            httpx.HTTPError,
        )  # fmt: skip
        try:
            yield
        except RecallUnavailable:
            raise
        except known as error:
            raise self.unavailable(error) from error
        except BaseException as error:
            # Chroma raises bare `Exception` for an answer that it does not know, and a panic of its
            # Rust core is a class that cannot be imported.
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise self.unavailable(error) from error


class _Folder(Place):
    """An embedded index: the folder belongs to one process."""

    collection, shared = COLLECTION, False

    def __init__(self, folder: NotebookFolder) -> None:
        self._path = folder.recall
        self.name = str(folder.recall)
        self._lock = _locked(folder)

    def connect(self) -> Client:
        import chromadb
        from chromadb.api.shared_system_client import SharedSystemClient

        try:
            return cast("Client", chromadb.PersistentClient(str(self._path), settings=_settings()))
        except BaseException:
            # Chroma keeps a half-started system per path and would fail on it for ever.
            SharedSystemClient.clear_system_cache()
            raise

    def remove(self) -> None:
        try:
            if self._path.is_dir():
                shutil.rmtree(self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            raise RecallUnavailable(
                f"The semantic index at {self._path} cannot be removed: {error.strerror}. Remove "
                "it by hand, then run `society memory reindex`."
            ) from error

    def leave(self) -> None:
        self._lock.release()

    def unavailable(self, error: BaseException) -> RecallUnavailable:
        return RecallUnavailable(
            f"The semantic index at {self._path} cannot be read ({_reason(error)}). "
            "Rebuild it with `society memory reindex`."
        )


class _Server(Place):
    """An index on a Chroma server."""

    shared = True

    def __init__(self, address: str, ledger: Ledger) -> None:
        self.name = address.rstrip("/")
        self._sessions: tuple[httpx.Client, ...] = ()
        self.collection = f"society-{ledger.id}-{FORMAT}"

    def connect(self) -> Client:
        import chromadb
        import httpx

        self._greet()
        address = urlsplit(self.name)
        secure = address.scheme == "https"
        client = chromadb.HttpClient(
            str(address.hostname), address.port or (443 if secure else 80),
            ssl=secure, settings=_settings(),
        )  # fmt: skip
        # Chroma waits for ever by default and has no setting for it; nor does it close these.
        self.leave()
        owners: tuple[Any, ...] = (client, cast("Any", client)._admin_client)
        self._sessions = tuple(owner._server._session for owner in owners)
        for session in self._sessions:
            session.timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        return cast("Client", client)

    def _greet(self) -> None:
        """Ask quickly whether a Chroma server is there."""
        import httpx

        answer = httpx.get(f"{self.name}/api/v2/heartbeat", timeout=CONNECT_S)
        if "nanosecond heartbeat" not in answer.text:
            raise RecallUnavailable(
                f"What answers at {self.name} is no Chroma server (HTTP {answer.status_code}). "
                "Check the address given with --recall."
            )

    def remove(self) -> None:
        from chromadb.errors import NotFoundError

        client = self.connect()
        try:
            client.delete_collection(self.collection)
        except NotFoundError:
            pass
        finally:
            client.close()
            self.leave()

    def leave(self) -> None:
        for session in self._sessions:
            session.close()
        self._sessions = ()

    def unavailable(self, error: BaseException) -> RecallUnavailable:
        import httpx

        if isinstance(error, httpx.TransportError) or "Could not connect" in str(error):
            host, _, port = urlsplit(self.name).netloc.rpartition(":")
            return RecallUnavailable(
                f"No Chroma server answers at {self.name} ({_reason(error)}). Start it with "
                f"`chroma run --path FOLDER --host {host or 'HOST'} --port {port or 'PORT'}`, or "
                "check the address given with --recall."
            )
        return RecallUnavailable(
            f"The Chroma server at {self.name} reports an error ({_reason(error)}). Look at its "
            "log; `society memory reindex` rebuilds the index of this notebook."
        )


def _place(
    folder: NotebookFolder | Path | str, ledger: Ledger | None, at: Path | str | None
) -> Place:
    home = folder if isinstance(folder, NotebookFolder) else NotebookFolder(folder)
    where = str(home.recall_address if at is None else at)
    if where == OFF:
        raise RecallUnavailable(
            "Recall is off. Choose `--recall embedded` or a server's address to have it."
        )
    if not where.startswith(("http://", "https://")):
        return _Folder(home)
    if ledger is None:
        raise TypeError(f"the index at {where} is named by its ledger, which was not given")
    return _Server(where, ledger)


def _settings() -> Any:
    from chromadb.config import Settings

    return Settings(anonymized_telemetry=False)


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
