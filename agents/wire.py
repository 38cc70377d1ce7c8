"""`Wire`: one request to a server that speaks OpenAI's protocol, and what came of it.

No retries, no redirects, no proxy and no `.netrc` of the environment unless configured. An answer
is read up to `LARGEST_BYTES`, counted after decompression; compression is not asked for.
"""

from __future__ import annotations

import email.utils
import re
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from society.agents.forms import Dialect, instruction

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_core.messages import AIMessage
    from langchain_openai import ChatOpenAI

    from society.agents.transcript import Redactor
    from society.settings import Endpoint

LARGEST_BYTES = 1_000_000
"""Of an answer, after decompression."""
CONNECT_S = 10.0
"""Longest wait for a connection; the answer may take until the deadline."""
WORDS_CHARS = 500
"""How much of a server's error message is kept."""
_TRANSIENT = frozenset({408, 409, 425, 429})
_MAY_HAVE_WORKED = frozenset({408, 504, 524})
"""Statuses of gateways that gave up waiting while the model may have been at work."""
_STRANGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What the client raises at an answer that is none of the protocol."""
_FORM = re.compile(r"grammar|json.?schema|response_format", re.I)
_TOO_LONG = re.compile(r"context.{0,40}(length|size|window)|too many tokens|too long", re.I)


class Failed(Exception):
    """A request that brought no answer. Internal to the endpoint, which decides what follows."""

    def __init__(
        self,
        outcome: str,
        words: str,
        *,
        transient: bool = False,
        costs: bool = False,
        after_s: float | None = None,
    ) -> None:
        """Say what happened, in words for the user.

        Args:
            outcome: One word for the ledger.
            words: One line, without any key.
            transient: Whether the same request may succeed a moment later.
            costs: Whether the server may charge for it.
            after_s: Seconds after which the server wants to be asked again, if it said so.
        """
        self.outcome, self.words = outcome, words
        self.transient, self.costs, self.after_s = transient, costs, after_s
        super().__init__(words)


class NotUnderstood(Failed):
    """The server refuses a parameter; another dialect may help than the one it carries."""

    dialect: Dialect


class TooLarge(Failed):
    """The answer was longer than anything that was asked for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered, not yet read."""

    text: str
    refusal: str
    """Why the model refuses; empty if it does not."""
    cut_off: bool
    """Whether the limit of tokens ended it."""
    prompt_tokens: int | None
    """As reported; None if nothing was."""
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, independent of the dialect."""

    system: str
    user: str
    schema: dict[str, Any]
    purpose: str
    agent: str

    def messages(self, dialect: Dialect) -> list[tuple[str, str]]:
        """Role and text of each message."""
        told = "" if dialect.form.by_schema else instruction(self.schema)
        return [("system", self.system + told), ("user", self.user)]


class Wire:
    """A connection to one server. Belongs to one event loop."""

    def __init__(self, settings: Endpoint, key: str | None, redactor: Redactor) -> None:
        """Nothing is sent yet. Imports langchain, which takes a second."""
        self._settings, self._redactor = settings, redactor
        self._client = _client(settings)
        self._chat = _chat(settings, key, self._client)

    async def send(self, request: Request, dialect: Dialect) -> Reply:
        """Make one request.

        Raises:
            Failed: It brought no answer; `NotUnderstood` and `TooLarge` are kinds of it.
        """
        settings = self._settings
        # `response_format` travels in the extra body: as an argument it would make the client parse
        # the answer, and an answer that is cut off would be lost together with its usage.
        body = dialect.parameters(request.purpose, request.schema)
        body[dialect.limit] = settings.answer_tokens
        if settings.temperature is not None and dialect.temperature:
            body["temperature"] = settings.temperature
        import openai

        headers = {"X-Society-Purpose": request.purpose, "X-Society-Agent": request.agent}
        try:
            message = await self._chat.ainvoke(
                request.messages(dialect), extra_body=body, extra_headers=headers
            )
        except (openai.APIError, httpx.HTTPError, *_STRANGE) as error:
            failure = self._failure(error)
            if isinstance(failure, NotUnderstood):
                failure.dialect = dialect
            raise failure from None
        return _reply(message)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _failure(self, error: Exception) -> Failed:
        """What an exception of the client means."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self._refused(error.status_code, error.response.headers, _words(error))
        causes = list(_causes(error))
        if any(isinstance(cause, _TooLarge) for cause in causes):
            return TooLarge(
                "too_large", f"The answer has more than {LARGEST_BYTES:,} bytes.", costs=True
            )
        if isinstance(error, openai.APIConnectionError | httpx.HTTPError):
            return _broken(self._settings.base_url, causes, self._redactor)
        return Failed(
            "not_the_protocol",
            f"{self._settings.base_url} answers, but not in OpenAI's protocol: is it the right "
            f"address (it often ends in /v1)? Found: {self._said(_words(error))}",
            costs=True,
        )

    def _refused(self, status: int, headers: Mapping[str, str], words: str) -> Failed:
        """What an answer with an error status means."""
        url, said = self._settings.base_url, self._said(words)
        name = f"http_{status}"
        kind: type[Failed] = NotUnderstood if status in (400, 415, 422, 501) else Failed
        if status >= 500 and _FORM.search(words):  # a server that broke at the schema
            kind = NotUnderstood
        elif status in _TRANSIENT or status >= 500:
            if "insufficient_quota" in words:
                return Failed("no_credit", f"The account at {url} has no credit left: {said}")
            return Failed(
                name, f"{url} answered {status}: {said}", transient=True,
                costs=status in _MAY_HAVE_WORKED, after_s=_retry_after(headers),
            )  # fmt: skip
        if status in (401, 403):
            return Failed(
                name, f"{url} refuses the key ({status}): {said}. Put a valid one in the variable "
                f"{self._settings.key_env}, or name another variable by endpoint.key_env.",
            )  # fmt: skip
        if status == 404:
            return Failed(
                name, f"{url} knows no model {self._settings.model!r}, or has no chat at that "
                f"address (404): {said}. Check --model and --base-url (it often ends in /v1).",
            )  # fmt: skip
        if 300 <= status < 400:
            to = self._said(headers.get("location", "nowhere"))
            return Failed(name, f"{url} redirects to {to}; give the final address by --base-url.")
        if status in (400, 413) and _TOO_LONG.search(words):
            return Failed(
                name, f"The prompt is too long for {self._settings.model}: {said}. Lower "
                "endpoint.context_tokens, or give the server a larger context.",
            )  # fmt: skip
        return kind(name, f"{url} refuses the request ({status}): {said}")

    def _said(self, words: str) -> str:
        return self._redactor.text(" ".join(words.split()))[:WORDS_CHARS]


# --------------------------------------------------------------------------- the client


def _client(settings: Endpoint) -> httpx.AsyncClient:
    proxy = _proxy(settings.base_url) if settings.env_proxy else None
    # A connection that is kept may be closed by the server just when it is used again, and nobody
    # would know whether the request was charged for. A new one costs little beside an answer.
    most = httpx.Limits(max_connections=settings.concurrent, max_keepalive_connections=0)
    return httpx.AsyncClient(
        transport=_Bounded(httpx.AsyncHTTPTransport(proxy=proxy, http2=False, limits=most)),
        timeout=_timeout(settings),
        headers={"Accept-Encoding": "identity"},
        follow_redirects=False,
        trust_env=False,  # else ~/.netrc would replace the key
    )


def _timeout(settings: Endpoint) -> httpx.Timeout:
    """Of single steps; the deadline of the whole is the endpoint's."""
    return httpx.Timeout(settings.deadline_s, connect=min(CONNECT_S, settings.deadline_s))


def _proxy(url: str) -> str | None:
    """What the environment says about the way to a server."""
    address = httpx.URL(url)
    if urllib.request.proxy_bypass(address.host):
        return None
    return urllib.request.getproxies().get(address.scheme)


def _chat(settings: Endpoint, key: str | None, client: httpx.AsyncClient) -> ChatOpenAI:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    return ChatOpenAI(
        model=settings.model,
        base_url=settings.base_url,
        api_key=SecretStr(key or "none"),
        timeout=_timeout(settings),
        max_retries=0,
        http_async_client=client,
        openai_proxy=None,  # given, so that it is not taken from the environment
        http_socket_options=(),
        use_responses_api=False,
        cache=False,
    )


class _TooLarge(httpx.ReadError):
    """More bytes than an answer may have."""


class _Bounded(httpx.AsyncBaseTransport):
    """Ends answers that are too large, before anything keeps them."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        headers = response.headers.copy()
        coding = headers.pop("content-encoding", "identity").strip().lower()
        headers.pop("content-length", None)
        stream = _BoundedStream(response.stream, coding)
        return httpx.Response(
            response.status_code, headers=headers, stream=stream, extensions=response.extensions
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class _BoundedStream(httpx.AsyncByteStream):
    """A body, decompressed at most as far as it may be read."""

    def __init__(self, inner: httpx.AsyncByteStream, coding: str) -> None:
        self._inner, self._coding = inner, coding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._coding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise httpx.DecodingError(f"an answer in the coding {self._coding[:20]!r}")
        plain = self._coding in ("identity", "")
        unpack = None if plain else zlib.decompressobj(zlib.MAX_WBITS | 32)
        left = LARGEST_BYTES
        async for packed in self._inner:
            try:
                part = packed if unpack is None else unpack.decompress(packed, left + 1)
            except zlib.error as error:
                raise httpx.DecodingError(str(error)) from None
            if len(part) > left:
                raise _TooLarge("too many bytes")
            left -= len(part)
            yield part

    async def aclose(self) -> None:
        await self._inner.aclose()


# --------------------------------------------------------------------------- reading


def _reply(message: AIMessage) -> Reply:
    usage: Mapping[str, Any] = message.usage_metadata or {}
    refusal = str(message.additional_kwargs.get("refusal") or "")
    reason = message.response_metadata.get("finish_reason")
    if reason == "content_filter" and not refusal:
        refusal = "the server's content filter stopped the answer"
    return Reply(
        text=_clean(message.content if isinstance(message.content, str) else str(message.text)),
        refusal=_clean(refusal),
        cut_off=reason == "length",
        prompt_tokens=_number(usage.get("input_tokens")),
        completion_tokens=_number(usage.get("output_tokens")),
    )


def _clean(text: str) -> str:
    """Half of a surrogate pair cannot be stored."""
    return text.encode("utf-8", "replace").decode()


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: Exception) -> str:
    """What a server said; the message alone where it kept to the protocol."""
    message = str(getattr(error, "message", "") or error)
    code = getattr(error, "code", None)
    return f"{message} ({code})" if code and str(code) not in message else message


def _broken(url: str, causes: list[BaseException], redactor: Redactor) -> Failed:
    """A connection that was not made, or that ended early."""
    first = next((cause for cause in causes if isinstance(cause, httpx.RequestError)), None)
    why = redactor.text(str(first or causes[0]))[:WORDS_CHARS] or type(first).__name__
    if isinstance(first, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return Failed(
            "unreachable", f"{url} cannot be reached: {why}. Is the server up, and the address "
            "right (--base-url)?", transient=True,
        )  # fmt: skip
    if isinstance(first, httpx.DecodingError):
        return Failed("not_the_protocol", f"{url} sent what cannot be read: {why}", costs=True)
    outcome = "timeout" if isinstance(first, httpx.TimeoutException) else "broken_off"
    return Failed(outcome, f"{url} broke off: {why}", transient=True, costs=True)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number of them or a date; None if there is no sensible value."""
    told = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(told)) if float(told) < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
