"""A scripted server that speaks OpenAI's protocol on the loopback, well or badly.

    with ScriptedEndpoint([answer({"idea": "wider"}), status(500), hang()]) as server:
        ... server.url ... server.asked

A script is a list of behaviours, one per request in the order of their arrival (a list that has run
out is an error of the test: the server answers 418 and keeps it in `unscripted`), or a function of
the request. A behaviour is a function of the connection.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Asked:
    """One request, as it arrived."""

    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: dict[str, Any]

    @property
    def purpose(self) -> str:
        return self.headers.get("x-society-purpose", "")

    @property
    def agent(self) -> str:
        return self.headers.get("x-society-agent", "")

    @property
    def system(self) -> str:
        return self._said("system")

    @property
    def user(self) -> str:
        return self._said("user")

    @property
    def form(self) -> str:
        """`json_schema`, `json_object` or, where no form was asked for, nothing."""
        return self.body.get("response_format", {}).get("type", "")

    @property
    def schema(self) -> dict[str, Any]:
        return self.body["response_format"]["json_schema"]["schema"]

    def _said(self, role: str) -> str:
        return "\n".join(one["content"] for one in self.body["messages"] if one["role"] == role)


@dataclass
class Connection:
    """What a behaviour can do."""

    asked: Asked
    handler: BaseHTTPRequestHandler
    over: threading.Event
    """Set when the server stops: nothing hangs longer."""

    def send(self, status: int, body: bytes, /, kind: str = "application/json", **headers: str):
        """A whole answer; underscores in the names of headers are hyphens."""
        self.begin(status, kind=kind, Content_Length=str(len(body)), **headers)
        self.write(body)

    def begin(self, status: int, /, kind: str = "application/json", **headers: str):
        handler = self.handler
        handler.send_response_only(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Connection", "close")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    def write(self, data: bytes):
        self.handler.wfile.write(data)
        self.handler.wfile.flush()


Behaviour = Callable[[Connection], None]
Script = Iterable[Behaviour] | Callable[[Asked], Behaviour]


@dataclass
class ScriptedEndpoint:
    """The server; use it in a `with` statement."""

    script: Script
    asked: list[Asked] = field(default_factory=list)
    """All requests so far."""
    unscripted: list[Asked] = field(default_factory=list)
    """Those that the script had no behaviour for."""
    under_way: int = 0
    most_under_way: int = 0

    def __enter__(self) -> ScriptedEndpoint:
        self._lock, self._over = threading.Lock(), threading.Event()
        self._steps = None if callable(self.script) else iter(self.script)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """To be given as base URL."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        size = int(handler.headers.get("Content-Length") or 0)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(handler.path, headers, json.loads(handler.rfile.read(size) or b"{}"))
        with self._lock:
            self.asked.append(asked)
            behaviour = self._next(asked)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            behaviour(Connection(asked, handler, self._over))
        except OSError:
            pass  # the client went away, as it should from a server like this
        finally:
            with self._lock:
                self.under_way -= 1
            handler.close_connection = True

    def _next(self, asked: Asked) -> Behaviour:
        if self._steps is None:
            return self.script(asked)
        behaviour = next(self._steps, None)
        if behaviour is None:
            self.unscripted.append(asked)
            return status(418, "the script has run out")
        return behaviour


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is none of our errors."""


def _handler(server: ScriptedEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            server.serve(self)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    return Handler


# --------------------------------------------------------------------------- well


def answer(
    content: str | dict[str, Any],
    *,
    finish: str = "stop",
    usage: dict[str, Any] | str | None = "counted",
    refusal: str | None = None,
    wait_s: float = 0.0,
    **headers: str,
) -> Behaviour:
    """A completion. `usage` is what is reported; by default a credible count."""

    def behave(connection: Connection) -> None:
        connection.over.wait(wait_s) if wait_s else None
        body = completion(connection.asked, content, finish, usage, refusal)
        connection.send(200, json.dumps(body).encode(), **headers)

    return behave


def completion(asked, content, finish="stop", usage="counted", refusal=None) -> dict[str, Any]:
    """The JSON of a completion."""
    text = content if isinstance(content, str) else json.dumps(content)
    if usage == "counted":
        prompt = sum(len(one["content"]) for one in asked.body["messages"]) // 4 + 1
        usage = {"prompt_tokens": prompt, "completion_tokens": len(text) // 4 + 1}
        usage["total_tokens"] = sum(usage.values())
    message = {"role": "assistant", "content": text}
    if refusal is not None:
        message |= {"content": None, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    found = {
        "id": "c1", "object": "chat.completion", "created": 1, "model": asked.body["model"],
        "choices": [choice],
    }  # fmt: skip
    return found | ({} if usage is None else {"usage": usage})


def answers(choose: Callable[[Asked], str | dict[str, Any]]) -> Callable[[Asked], Behaviour]:
    """A script: every request gets a completion that is a function of it."""
    return lambda asked: answer(choose(asked))


# --------------------------------------------------------------------------- badly


def status(code: int, message: str = "no", *, error_code: str | None = None, **headers: str):
    """An error in OpenAI's format, e.g. `status(429, Retry_After="90")`."""
    body = {"error": {"message": message, "type": "error", "code": error_code, "param": None}}
    return lambda connection: connection.send(code, json.dumps(body).encode(), **headers)


def refuses(what: str) -> Callable[[Asked], bool]:
    """Whether a request has that parameter, or that form or keyword in its schema."""
    return lambda asked: (
        what
        in json.dumps({name: value for name, value in asked.body.items() if name != "messages"})
    )


def page(text: str = "<html><body>Welcome to the hotel</body></html>", code: int = 200):
    """A page of HTML, as from a captive portal."""
    return lambda connection: connection.send(code, text.encode(), kind="text/html")


def redirect(to: str, code: int = 307) -> Behaviour:
    return lambda connection: connection.send(code, b"", Location=to)


def hang() -> Behaviour:
    """Takes the request and never says anything."""
    return lambda connection: connection.over.wait(60) and None


def drip(every_s: float = 0.05) -> Behaviour:
    """A byte at a time, for ever."""

    def behave(connection: Connection) -> None:
        connection.begin(200, Content_Length=str(MEGABYTE // 2))
        while not connection.over.wait(every_s):
            connection.write(b" ")

    return behave


def half_headers() -> Behaviour:
    """Stops within the headers."""

    def behave(connection: Connection) -> None:
        connection.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
        connection.over.wait(60)

    return behave


def cut_off() -> Behaviour:
    """Closes the connection in the middle of the body."""

    def behave(connection: Connection) -> None:
        body = json.dumps(completion(connection.asked, "{}")).encode()
        connection.begin(200, Content_Length=str(len(body)))
        connection.write(body[: len(body) // 2])

    return behave


def reset() -> Behaviour:
    """Closes the connection without a word, with a reset."""

    def behave(connection: Connection) -> None:
        option = b"\1\0\0\0\0\0\0\0"  # linger for 0 s
        connection.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        connection.handler.connection.close()

    return behave


def huge(size: int = 10 * MEGABYTE) -> Behaviour:
    """A well-formed answer of so many bytes."""
    return lambda connection: answer("x" * size)(connection)


def bomb(size: int = 200 * MEGABYTE) -> Behaviour:
    """A small gzip body that grows to so many bytes."""
    packed = gzip.compress(b" " * size, compresslevel=9)
    return lambda connection: connection.send(200, packed, Content_Encoding="gzip")


def zipped(content: dict[str, Any]) -> Behaviour:
    """An honest answer, compressed although nobody asked for it."""

    def behave(connection: Connection) -> None:
        body = json.dumps(completion(connection.asked, content)).encode()
        connection.send(200, gzip.compress(body), Content_Encoding="gzip")

    return behave


def raw(body: bytes, code: int = 200, kind: str = "application/json") -> Behaviour:
    """Any body."""
    return lambda connection: connection.send(code, body, kind=kind)


def echo_key(code: int = 200) -> Behaviour:
    """Says the key back: as an answer, or within an error."""

    def behave(connection: Connection) -> None:
        key = connection.asked.headers.get("authorization", "")
        (answer({"idea": key, "size": 1}) if code == 200 else status(code, f"bad {key}"))(
            connection
        )

    return behave


def down() -> str:
    """A base URL at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
