"""A real Chroma server on loopback, for tests: `chroma run` as a process of its own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

UP_S = 60.0
"""How long a server may take to answer, on a busy machine."""


class ChromaServer:
    """One server on a free port; the port stays the same over restarts."""

    def __init__(self, folder: Path) -> None:
        """Keep data below `folder`; nothing is started yet."""
        folder.mkdir(parents=True, exist_ok=True)
        self.data, self._log = folder / "data", folder / "chroma.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._code: int | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = Path(sys.executable).with_name("chroma")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "run", "--path", self.data, "--host", "127.0.0.1",
                 "--port", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + UP_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"chroma did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/api/v2/heartbeat", timeout=2).is_success
        return False

    def kill(self) -> None:
        """Kill -9, and wait until the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._code = self._process.wait()
            self._process = None

    @property
    def crashed(self) -> bool:
        """Whether its last process died of a segmentation fault, by itself."""
        code = self._code if self._process is None else self._process.poll()
        return code == -signal.SIGSEGV

    def start_over(self) -> None:
        """Start it with nothing in it."""
        self.kill()
        shutil.rmtree(self.data)
        self.start()

    def __enter__(self) -> ChromaServer:
        """The server, started."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, whatever happened."""
        self.kill()


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChromaServer]:
    """One server for the whole session; each ledger has a collection of its own."""
    with ChromaServer(tmp_path_factory.mktemp("chroma")) as server:
        yield server
