"""`Endpoint`: how all agents of a society ask one language model.

One call of `ask` is one answer or one `EndpointError`, within one deadline, whatever the server
does. On its way a question passes: the cache of answers, the circuit breaker, the caps, a free
place among the requests under way, the gate that the server may close, the configured rates. Every
request is charged, recorded in the ledger and written to the transcript, whatever came of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from society import logs
from society.agents import tokens
from society.agents.allowance import NOTHING, Allowance, Cost, Reservation
from society.agents.answers import Answers
from society.agents.forms import Dialect, Form, instruction, read, strict_schema
from society.agents.throttle import Circuit, Gate, Pace
from society.agents.transcript import Redactor, Transcript
from society.agents.wire import Failed, NotUnderstood, Reply, Request, TooLarge, Wire
from society.errors import AllowanceSpent, BadAnswer, EndpointDown, UsageError
from society.records import Call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from society.memory.folder import NotebookFolder
    from society.records import Usage
    from society.settings import Endpoint as EndpointSettings

Answer = TypeVar("Answer", bound=BaseModel)

BACKOFF_S = 0.5
"""Mean pause before the second request; twice as long before each further one."""
LONGEST_BACKOFF_S = 20.0
RAW_CHARS = 100_000
"""How much of an answer the transcript keeps."""
LEAST_LEFT = 0.05
"""Share of the deadline that must be left: a later request would be paid for in vain."""
CLOCK_S = 0.05
"""How much earlier than the deadline its end may be noticed."""


@dataclass(frozen=True, slots=True)
class Question(Generic[Answer]):
    """What one agent asks, and the form of the answer."""

    agent: str
    purpose: str
    """`propose`, `review`, `explain` or `narrate`."""
    system: str
    user: str
    answer: type[Answer]
    """Forbids extra fields and bounds every string and list; all fields are asked for."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What text fields may say, see `forms.strict_schema`; whoever asks checks it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How the endpoint is doing, for the live view."""

    circuit: str
    """`closed`: it is asked; `open`: it failed repeatedly and is left alone for a while."""
    retry_in_s: float
    """Seconds until it is asked again; 0 if it may be asked now."""
    last_error: str
    """The latest failure in one line, without any key; empty after an answer."""


class Accounts(Protocol):
    """Where calls are recorded; the ledger."""

    def record_call(self, call: Call) -> None:
        """Record a request, answered or not."""

    def usage(self, society: str, agent: str | None = None) -> Usage:
        """What a society's requests have cost so far, or those of one agent."""


@dataclass(slots=True)
class _Asked(Generic[Answer]):
    """A question on its way."""

    question: Question[Answer]
    request: Request
    counted: int
    """Tokens of the prompt and the schema, as counted offline."""
    began: float
    ends: float
    attempt: int = 0


@dataclass(slots=True)
class _Sent:
    """One request, while it is under way and until it is recorded."""

    held: Reservation
    began: float
    dialect: Dialect
    outcome: str = "cancelled"
    words: str = ""
    raw: str = ""
    parsed: dict[str, Any] | None = None
    cost: Cost = field(default=NOTHING)


class Endpoint:
    """The way to one language model. One per society; belongs to one event loop.

    `ask` may be called by many agents at once.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        society: str,
        accounts: Accounts,
        folder: NotebookFolder | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is sent; takes a second, because it imports langchain.

        Args:
            settings: Where the model is and what it may cost.
            society: Id of the society that asks and pays.
            accounts: The ledger; what is recorded there already counts against the caps.
            folder: Keeps transcript and known answers; None keeps neither.
            environ: Holds the key; the process environment if not given.

        Raises:
            UsageError: There is no key, or no price for the cap in dollars that was asked for, and
                the server is not on this machine.
        """
        key = require_key(settings, os.environ if environ is None else environ)
        require_price(settings)
        self._settings, self._society, self._accounts = settings, society, accounts
        self._redactor = Redactor(key)
        self._wire = Wire(settings, key, self._redactor)
        self._dialect = _first_dialect(settings.base_url)
        self._allowance = Allowance(settings, lambda agent: accounts.usage(society, agent))
        self._circuit, self._gate = Circuit(), Gate()
        self._requests = Pace(settings.requests_per_minute)
        self._tokens = Pace(settings.tokens_per_minute)
        self._places = asyncio.Semaphore(settings.concurrent)
        self._answers = Answers(folder.answers if folder else None)
        self._transcript = (
            Transcript(folder.transcripts / f"{society}.jsonl", self._redactor) if folder else None
        )
        self._last_error = ""
        self._caps_told: set[str] = set()
        self._log = logs.get("endpoint")

    def __repr__(self) -> str:
        """Without the key."""
        return f"Endpoint({self._settings.base_url!r}, {self._settings.model!r})"

    @property
    def usage(self) -> Usage:
        """What the society's questions have cost, earlier sessions included."""
        return self._allowance.usage

    @property
    def standing(self) -> Standing:
        """How it is doing."""
        left = max(self._circuit.retry_in_s, self._gate.closed_s)
        return Standing("closed" if self._circuit.closed else "open", left, self._last_error)

    async def close(self) -> None:
        """Close connections and files; questions under way fail."""
        await self._wire.close()
        self._answers.close()
        if self._transcript is not None:
            self._transcript.close()

    async def ask(self, question: Question[Answer]) -> Answer:
        """Ask the model, and return its answer as an object of the question's class.

        The same question of the same agent in the same society is answered from the cache.

        Raises:
            EndpointDown: No answer within `deadline_s`; or none to be expected, which is said at
                once.
            BadAnswer: The model refused, was cut off, or answered in another form.
            AllowanceSpent: The answer might cost more than a cap allows.
        """
        asked = self._prepared(question)
        known = self._known(asked)
        if known is not None:
            return known
        self._check_caps(asked)
        admitted = self._circuit.enter()
        worked: bool | None = None
        problem = ""
        try:
            answer = await self._answered(asked)
            worked = True
        except BadAnswer as error:
            worked, self._last_error = True, str(error)
            raise
        except EndpointDown as error:
            if asked.attempt:  # else nothing was asked, so nothing was learnt
                worked, problem = False, str(error)
            self._failed(str(error))
            raise
        except AllowanceSpent as error:
            self._tell_cap(error)
            raise
        finally:
            self._leave(admitted, worked, problem)
        self._last_error = ""
        return answer

    # ---------------------------------------------------------------- before and after

    def _prepared(self, question: Question[Answer]) -> _Asked[Answer]:
        schema = strict_schema(question.answer, question.words)
        request = Request(question.system, question.user, schema, question.purpose, question.agent)
        texts = (question.system, question.user, instruction(schema))
        now = time.monotonic()
        return _Asked(
            question, request, sum(map(tokens.count, texts)), now, now + self._settings.deadline_s
        )

    def _key(self, asked: _Asked[Answer]) -> str:
        """Identity of a question. Agents are told apart: they are asked for their own opinion."""
        request, settings = asked.request, self._settings
        form = [
            settings.base_url, settings.model, settings.temperature, request.system, request.user,
            request.schema, self._society, request.agent,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()

    def _known(self, asked: _Asked[Answer]) -> Answer | None:
        """The answer from the cache, if there is one and it still has the right form."""
        text = self._answers.get(self._key(asked))
        if text is None:
            return None
        try:
            answer = asked.question.answer.model_validate_json(text)
        except ValidationError:
            return None
        sent = _Sent(Reservation(0, asked.request.agent, NOTHING, 0), asked.began, self._dialect)
        sent.outcome, sent.raw, sent.parsed = "cached", text, answer.model_dump(mode="json")
        call = self._call(asked, sent)
        self._accounts.record_call(call)
        self._allowance.count(call)
        self._write(asked, sent, call)
        return answer

    def _check_caps(self, asked: _Asked[Answer]) -> None:
        try:
            self._allowance.check(asked.request.agent, asked.counted)
        except AllowanceSpent as error:
            self._tell_cap(error)
            raise

    def _tell_cap(self, error: AllowanceSpent) -> None:
        """Say once that a cap is reached."""
        if error.final and error.cap not in self._caps_told:
            self._caps_told.add(error.cap)
            self._log.warning("the language model is not asked any more", reason=str(error))

    def _failed(self, words: str) -> None:
        """Remember a failure; the first one after an answer is said aloud."""
        if not self._last_error:
            self._log.warning("the language model does not answer", reason=words)
        self._last_error = words

    def _leave(self, admitted: Any, worked: bool | None, problem: str) -> None:
        before = self._circuit.closed
        self._circuit.leave(admitted, worked, problem)
        if before and not self._circuit.closed:
            self._log.warning(
                "the language model is left alone for a while",
                seconds=round(self._circuit.retry_in_s), reason=problem,
            )  # fmt: skip
        elif self._circuit.closed and not before:
            self._log.warning("the language model answers again")

    # ---------------------------------------------------------------- attempts

    async def _answered(self, asked: _Asked[Answer]) -> Answer:
        """Make requests until one is answered or the deadline is over."""
        latest: Failed | None = None
        try:
            async with asyncio.timeout_at(_loop_time(asked.ends)):
                while True:
                    try:
                        return await self._attempt(asked)
                    except Failed as failure:
                        latest = failure
                    await self._pause(asked, latest)
        except TimeoutError:
            last = f" Last: {latest.words}" if latest else ""
            raise EndpointDown(
                f"{self._settings.base_url} gave no answer within {self._settings.deadline_s:g} s "
                f"(endpoint.deadline_s).{last}"
            ) from None

    async def _pause(self, asked: _Asked[Answer], failure: Failed) -> None:
        """Wait before the next attempt.

        Raises:
            EndpointDown: There is no point in another one.
        """
        if isinstance(failure, NotUnderstood) and self._adapted(asked, failure):
            return
        if failure.after_s is not None:
            self._gate.close(failure.after_s)
        if not failure.transient or asked.attempt >= self._settings.attempts:
            self._no_more(failure)
        mean = min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (asked.attempt - 1))
        pause = max(failure.after_s or 0.0, mean * random.uniform(0.5, 1.5))
        if time.monotonic() + pause >= asked.ends:
            self._no_more(failure)
        await asyncio.sleep(pause)

    def _no_more(self, failure: Failed) -> NoReturn:
        raise EndpointDown(failure.words, retry_in_s=failure.after_s) from None

    def _adapted(self, asked: _Asked[Answer], failure: NotUnderstood) -> bool:
        """Whether there is another way to put the request; it is used from now on."""
        dialect = failure.dialect.after_refusal(failure.words)
        if dialect is None:
            return False
        asked.attempt -= 1  # the refusal cost nothing, and each way is tried once
        if self._dialect == failure.dialect:
            self._dialect = dialect
            self._log.info("the server wants requests in another form", form=dialect.form.value,
                           limit=dialect.limit, reason=failure.words)  # fmt: skip
        return True

    async def _attempt(self, asked: _Asked[Answer]) -> Answer:
        """Wait for a place and for the turn, then make one request."""
        async with self._places:
            worst = await self._turn(asked)
            sent = _Sent(
                self._allowance.reserve(asked.request.agent, asked.counted),
                time.monotonic(),
                self._dialect,
            )
            asked.attempt += 1
            sent.cost = sent.held.worst  # until something better is known
            try:
                return await self._exchanged(asked, sent)
            except asyncio.CancelledError:
                if time.monotonic() >= asked.ends - CLOCK_S:
                    sent.outcome, sent.words = "timeout", "no answer within the deadline"
                raise
            finally:
                self._tokens.correct(sent.cost.tokens - worst)
                self._record(asked, sent)

    async def _turn(self, asked: _Asked[Answer]) -> int:
        """Wait until a request may be made; return the tokens it was given room for.

        Raises:
            EndpointDown: That would be after the deadline.
            AllowanceSpent: The caps have no room for it any more.
        """
        await self._gate.wait(asked.ends)
        await self._requests.wait(1, asked.ends)
        worst = self._allowance.worst(asked.counted).tokens
        try:
            await self._tokens.wait(worst, asked.ends)
        except (EndpointDown, asyncio.CancelledError):
            self._requests.correct(-1)
            raise
        try:
            self._allowance.check(asked.request.agent, asked.counted)
        except AllowanceSpent:
            self._requests.correct(-1)
            self._tokens.correct(-worst)
            raise
        if asked.ends - time.monotonic() < LEAST_LEFT * self._settings.deadline_s:
            self._requests.correct(-1)
            self._tokens.correct(-worst)
            raise EndpointDown("Requests of other agents left no time for this one.")
        return worst

    async def _exchanged(self, asked: _Asked[Answer], sent: _Sent) -> Answer:
        """Send one request and read the answer; `sent` is told what came of it."""
        try:
            reply = await self._wire.send(asked.request, sent.dialect)
        except TooLarge as failure:
            sent.outcome, sent.words = failure.outcome, failure.words
            raise BadAnswer("too_large", "The answer was far too long; answer briefly.") from None
        except Failed as failure:
            sent.outcome, sent.words = failure.outcome, failure.words
            sent.cost = sent.held.worst if failure.costs else NOTHING
            raise
        sent.cost = self._allowance.actual(sent.held, reply.prompt_tokens, reply.completion_tokens)
        sent.raw = self._redactor.text(reply.text)
        try:
            answer = self._understood(reply, sent.raw, asked.question.answer)
        except BadAnswer as error:
            sent.outcome, sent.words = error.kind, error.feedback
            raise
        sent.outcome, sent.parsed = "answered", answer.model_dump(mode="json")
        self._answers.put(self._key(asked), answer.model_dump_json())
        return answer

    def _understood(self, reply: Reply, text: str, form: type[Answer]) -> Answer:
        """The answer in a reply. Whole JSON counts even if the model was cut off after it."""
        if reply.refusal:
            said = self._redactor.text(reply.refusal)[:300]
            raise BadAnswer("refusal", f"The model refused: {said}")
        try:
            return read(text, form)
        except BadAnswer:
            if reply.cut_off:
                most = self._settings.answer_tokens
                raise BadAnswer(
                    "cut_off", f"The answer was cut off after {most} tokens; answer more briefly."
                ) from None
            raise

    # ---------------------------------------------------------------- records

    def _record(self, asked: _Asked[Answer], sent: _Sent) -> None:
        """Count, record and write down one request; runs also while a task is being cancelled."""
        call = self._call(asked, sent)
        self._allowance.settle(sent.held, call)
        self._write(asked, sent, call)
        self._log.info(
            "the language model was asked", agent=call.agent, purpose=call.purpose,
            outcome=call.outcome, tokens=call.prompt_tokens + call.completion_tokens,
            wall_s=round(call.wall_s, 2),
        )  # fmt: skip
        self._accounts.record_call(call)

    def _call(self, asked: _Asked[Answer], sent: _Sent) -> Call:
        return Call(
            society=self._society, agent=asked.request.agent, purpose=asked.request.purpose,
            model=self._settings.model, outcome=sent.outcome,
            prompt_tokens=sent.cost.prompt_tokens, completion_tokens=sent.cost.completion_tokens,
            dollars=sent.cost.dollars, wall_s=time.monotonic() - sent.began, called_at=time.time(),
        )  # fmt: skip

    def _write(self, asked: _Asked[Answer], sent: _Sent, call: Call) -> None:
        if self._transcript is None:
            return
        messages = [
            {"role": role, "content": text} for role, text in asked.request.messages(sent.dialect)
        ]
        self._transcript.write(
            {
                "time": call.called_at, "society": call.society, "agent": call.agent,
                "purpose": call.purpose, "model": call.model, "messages": messages,
                "schema": asked.request.schema, "form": sent.dialect.form.value,
                "attempt": asked.attempt, "outcome": call.outcome, "problem": sent.words,
                "raw": sent.raw[:RAW_CHARS], "parsed": sent.parsed,
                "prompt_tokens": call.prompt_tokens, "completion_tokens": call.completion_tokens,
                "dollars": call.dollars, "wall_s": round(call.wall_s, 3),
            }
        )  # fmt: skip


def require_key(settings: EndpointSettings, environ: Mapping[str, str]) -> str | None:
    """The key for the server; None if it is on this machine and the variable is not set.

    Raises:
        UsageError: There is none, and the server is elsewhere; or it cannot be one.
    """
    key = environ.get(settings.key_env, "").strip()
    if not key.isascii() or any(char.isspace() or not char.isprintable() for char in key):
        raise UsageError(
            f"The environment variable {settings.key_env} holds characters that no key has, such "
            "as a space or a typographic mark; set it again."
        )
    if key:
        return key
    if is_local(settings.base_url):
        return None
    raise UsageError(
        f"The brain openai asks {settings.base_url}, which wants a key, but the environment "
        f"variable {settings.key_env} is not set. Set it (to anything, for a server that wants "
        "none); or name a server on this machine, e.g. --base-url http://127.0.0.1:8080/v1; or use "
        "--brain search, which needs neither key nor network."
    )


def require_price(settings: EndpointSettings) -> None:
    """See that a cap in dollars that somebody chose can be kept.

    Raises:
        UsageError: The model has no price, and the server is not on this machine.
    """
    usual = type(settings).model_fields["max_dollars"].default
    chosen = settings.max_dollars not in (None, usual) or settings.max_dollars_per_agent is not None
    if chosen and settings.model not in settings.prices and not is_local(settings.base_url):
        known = ", ".join(sorted(settings.prices)) or "none"
        raise UsageError(
            f"A cap in dollars needs the price of {settings.model}; known: {known}. Give it in the "
            f"--config file as endpoint: {{prices: {{{settings.model}: {{prompt: 1.0, completion: "
            "4.0}}}, in dollars per million tokens, or cap tokens by --max-tokens."
        )


def is_local(url: str) -> bool:
    """Whether a server is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _first_dialect(url: str) -> Dialect:
    """OpenAI's models know the new name of the limit and no bounds; most servers the opposite."""
    host = urlsplit(url).hostname or ""
    ours = host.endswith((".openai.com", ".openai.azure.com"))
    return Dialect(Form.STRICT, "max_completion_tokens") if ours else Dialect()


def _loop_time(monotonic: float) -> float:
    """A time of the monotonic clock on the clock of the event loop."""
    return asyncio.get_running_loop().time() + monotonic - time.monotonic()
