"""Downloading large files: resumed, verified, and the same ever after.

What has arrived of a file is kept as `<name>.part` and continued by an HTTP range request, which
names the version it began with (`If-Range`), so that a file that changed starts anew. A complete
file must have the expected sha256: from the corpus description, from the lock file of an earlier
download, or from the server, where it is a Git LFS store such as Hugging Face. Only then does it
get its name and its line in the lock file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from society.errors import SocietyError
from society.model.files import locked, sha256_of, write_atomically

ATTEMPTS = 6
"""Attempts in a row that bring not a single byte, then the download fails."""
LONGEST_WAIT_S = 30.0
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
"""Seconds without a byte, and seconds to connect, then the attempt has failed."""
JOBS = 4
"""Files at a time."""
PATIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which another attempt makes sense."""
SHA256 = re.compile(r"[0-9a-f]{64}")
LOCK = "lock.json"

OnBytes = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that are there, and the bytes it will have (if known)."""


class DownloadFailed(SocietyError):
    """A file could not be downloaded, or is not the one that was expected."""


class _Again(Exception):
    """The attempt failed in a way that another one may not."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s
        super().__init__(problem)


class _Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to download."""

    name: str
    url: str
    sha256: str | None = None
    """What it must have, if that is known in advance."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What has arrived of a file, and of which version it is."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self) -> str:
        """What the server called the version; empty if a resumed download could not be checked."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads(self.note.read_bytes())["version"])
        return ""

    def drop(self) -> None:
        """Forget what has arrived."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def download(
    wanted: Sequence[Wanted],
    folder: Path,
    *,
    jobs: int = JOBS,
    on_bytes: OnBytes | None = None,
    sleep: Callable[[float], object] | None = None,
) -> dict[str, str]:
    """Have all files in a folder, verified; returns name -> sha256.

    Files that are there and have their recorded sha256 are left alone, others are downloaded again.
    One process at a time works on a folder. After an error or Ctrl-C another call goes on.

    Args:
        wanted: The files.
        folder: Made if needed.
        jobs: Files at a time.
        on_bytes: Progress; called from several threads.
        sleep: Waits between attempts; for tests.

    Raises:
        DownloadFailed: A file is not there, not reachable, or not the expected one; the disk is
            full. Files that were complete by then are kept, and so are beginnings of others.
    """
    stop = threading.Event()
    try:
        with locked(folder / ".lock"), _client() as client:
            store = _Store(folder, client, on_bytes or _silent, sleep or stop.wait, stop)
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    found = list(pool.map(store.ensure, wanted))
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    except OSError as error:
        raise DownloadFailed(_disk_problem(folder, error)) from error
    return dict(zip((one.name for one in wanted), found, strict=True))


def recorded(folder: Path) -> Mapping[str, str]:
    """The lock file: name -> sha256 of every file that was ever complete in the folder.

    Raises:
        DownloadFailed: The lock file is damaged.
    """
    path = folder / LOCK
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadFailed(
            f"The lock file {path} cannot be read ({error}); delete it."
        ) from error


def _silent(name: str, done: int, total: int | None) -> None:
    """Nobody wants to know."""


def _client() -> httpx.Client:
    headers = {"Accept-Encoding": "identity", "User-Agent": "society-research"}
    return httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True)


@dataclass(slots=True)
class _Store:
    """A folder of verified files; `ensure` is called from several threads."""

    folder: Path
    client: httpx.Client
    on_bytes: OnBytes
    sleep: Callable[[float], object]
    stop: threading.Event

    def ensure(self, wanted: Wanted) -> str:
        """Have one file; returns its sha256."""
        target = self.folder / wanted.name
        expected = wanted.sha256 or recorded(self.folder).get(wanted.name)
        if target.is_file():
            digest = sha256_of(target)
            if expected in (None, digest):
                return self._record(wanted.name, digest)
            target.unlink()  # changed since, or not the file that is expected
        part = _Part(self.folder / f"{wanted.name}.part")
        try:
            promised = self._arrive(wanted, part, expected)
            digest = self._verified(wanted, part, expected or promised)
            os.replace(part.path, target)
        except _Stopped:
            return ""  # nobody looks at it
        except OSError as error:
            self.stop.set()
            raise DownloadFailed(_disk_problem(part.path, error)) from error
        except DownloadFailed:
            self.stop.set()
            raise
        part.drop()
        return self._record(wanted.name, digest)

    def _record(self, name: str, digest: str) -> str:
        with _RECORDING:
            known = dict(recorded(self.folder))
            if known.get(name) != digest:
                content = json.dumps({"sha256": known | {name: digest}}, indent=1, sort_keys=True)
                write_atomically(self.folder / LOCK, content.encode())
        return digest

    def _verified(self, wanted: Wanted, part: _Part, expected: str | None) -> str:
        digest = sha256_of(part.path)
        if expected is not None and digest != expected:
            part.drop()
            raise DownloadFailed(
                f"{wanted.url} has the sha256 {digest}, expected {expected}. What was downloaded "
                "has been deleted; run the command again. If it stays so, the file on the server "
                f"is another one: see {self.folder / LOCK} and the description of the corpus."
            )
        return digest

    def _arrive(self, wanted: Wanted, part: _Part, expected: str | None) -> str | None:
        """Attempt until the part is complete; returns the digest that the server promises."""
        failures = 0
        while True:
            before = part.size
            try:
                return self._attempt(wanted, part, expected)
            except (_Again, httpx.TransportError) as error:
                failures = 1 if part.size > before else failures + 1
                problem = str(error) or type(error).__name__
                wait_s = error.wait_s if isinstance(error, _Again) else 0.0
            except (httpx.TooManyRedirects, httpx.InvalidURL) as error:
                raise DownloadFailed(f"{wanted.url}: {error}. Check the address.") from error
            if failures >= ATTEMPTS:
                raise DownloadFailed(
                    f"{wanted.url}: {problem}, {ATTEMPTS} times in a row. Check the network and "
                    f"run the command again; {part.size} bytes are kept."
                )
            self.sleep(min(max(wait_s, 2.0 ** (failures - 1)), LONGEST_WAIT_S))
            self._check_stop()

    def _attempt(self, wanted: Wanted, part: _Part, expected: str | None) -> str | None:
        have, version = part.size, part.version()
        resuming = bool(have and version)
        headers = {"Range": f"bytes={have}-", "If-Range": version} if resuming else {}
        with self.client.stream("GET", wanted.url, headers=headers) as response:
            promised = _promised(response)
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                if _total(response) == have:
                    return promised
                part.drop()
                raise _Again("the file has become shorter")
            _check_status(wanted, response)
            if None not in (expected, promised) and expected != promised:
                raise DownloadFailed(
                    f"{wanted.url} has the sha256 {promised} on the server, expected {expected}: "
                    f"it is another file now. See {self.folder / LOCK} and the description."
                )
            start = _start(response, have, version)
            if start is None:
                part.drop()
                raise _Again("the server continued another version")
            self._receive(wanted, part, response, start)
        return promised

    def _receive(self, wanted: Wanted, part: _Part, response: httpx.Response, start: int) -> None:
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if not start:
            part.drop()
            note = json.dumps({"version": _version(response), "url": wanted.url})
            write_atomically(part.note, note.encode())
        self._check_room(wanted, total, start)
        done = start
        with part.path.open("ab") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                done += len(chunk)
                self.on_bytes(wanted.name, done, total)
                self._check_stop()
        if total is not None and done != total:
            raise _Again(f"the connection ended after {done} of {total} bytes")

    def _check_room(self, wanted: Wanted, total: int | None, have: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if total is not None and total - have > free:
            need = f"{(total - have) / 1e6:.0f} MB more"
            problem = f"{wanted.name} needs {need} and {free / 1e6:.0f} MB are free"
            raise OSError(errno.ENOSPC, problem)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise _Stopped


_RECORDING = threading.Lock()


def _check_status(wanted: Wanted, response: httpx.Response) -> None:
    if response.is_success:
        return
    status = f"{response.status_code} {response.reason_phrase}"
    if response.status_code in PATIENT:
        after = response.headers.get("Retry-After", "")
        raise _Again(f"the server answers {status}", float(after) if after.isdigit() else 0.0)
    raise DownloadFailed(
        f"{wanted.url}: the server answers {status}. Check the address (--base-url) and the "
        "description of the corpus."
    )


def _chain(response: httpx.Response) -> Iterator[httpx.Headers]:
    """Headers of the answer and of the redirects before it."""
    for one in (*response.history, response):
        yield one.headers


def _promised(response: httpx.Response) -> str | None:
    """The sha256 that a Git LFS store states as an entity tag."""
    for name in ("X-Linked-Etag", "ETag"):
        for headers in _chain(response):
            tag = str(headers.get(name, "")).removeprefix("W/").strip('"')
            if SHA256.fullmatch(tag):
                return tag
    return None


def _version(response: httpx.Response) -> str:
    """A validator that may stand in `If-Range`: a strong entity tag, or a date."""
    tag = str(response.headers.get("ETag", ""))
    if tag and not tag.startswith("W/"):
        return tag
    return str(response.headers.get("Last-Modified", ""))


def _start(response: httpx.Response, have: int, version: str) -> int | None:
    """Where the body begins in the file; None if it does not continue what is there."""
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        return 0
    found = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", response.headers.get("Content-Range", ""))
    same = _version(response) in ("", version)
    return have if found and int(found[1]) == have and same else None


def _total(response: httpx.Response) -> int | None:
    found = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _disk_problem(path: Path, error: OSError) -> str:
    return (
        f"Cannot write {path}: {error.strerror}. Make room, or name another folder in "
        "SOCIETY_CACHE, and run the command again; it goes on where it stopped."
    )
