"""The way to a language model: one answer or one error, in time and within the caps."""

import asyncio
import json
import os
import stat
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import psutil
import pytest
from pydantic import BaseModel, ConfigDict, Field
from scripted_endpoint import (
    ScriptedEndpoint,
    answer,
    answers,
    bomb,
    completion,
    cut_off,
    down,
    drip,
    echo_key,
    half_headers,
    hang,
    huge,
    page,
    raw,
    redirect,
    refuses,
    reset,
    status,
    zipped,
)

from society.agents import tokens
from society.agents.allowance import Allowance
from society.agents.answers import Answers
from society.agents.endpoint import Endpoint, Question, is_local, require_key
from society.agents.forms import MOST_WORDS, Dialect, Form, read, strict_schema, without_bounds
from society.agents.throttle import BURST_S, FAILURES, OPEN_S, Circuit, Gate, Pace
from society.agents.transcript import Redactor, Transcript, read_transcript
from society.errors import AllowanceSpent, BadAnswer, EndpointDown, UnknownName, UsageError
from society.experiments.local import LocalExecutor
from society.memory.folder import NotebookFolder
from society.memory.ledger import Ledger
from society.records import Call, Usage
from society.settings import Endpoint as EndpointSettings
from society.settings import Price, load_settings, validate

KEY = "sk-a-secret-of-the-tests-0123456789"
GOOD = {"idea": "wider", "size": 3}
SLACK_S = 1.0
"""How much later than its deadline an answer may come on a busy machine."""


class Idea(BaseModel):
    model_config = ConfigDict(extra="forbid")

    idea: Annotated[str, Field(max_length=200)]
    size: Annotated[int, Field(ge=1, le=9)] = 1


@dataclass
class Book:
    """Accounts in memory: what the ledger does, for tests that need no database."""

    calls: list[Call] = field(default_factory=list)
    before: Usage = field(default_factory=Usage)

    def record_call(self, call):
        self.calls.append(call)

    def usage(self, society, agent=None):
        return self.before

    @property
    def tokens(self):
        return sum(call.prompt_tokens + call.completion_tokens for call in self.calls)

    @property
    def outcomes(self):
        return [call.outcome for call in self.calls]


def question(user="What next?", agent="a01", purpose="propose"):
    return Question(agent, purpose, "You are a careful researcher.", user, Idea)


def settings(url, **given):
    return EndpointSettings(**{"base_url": url, "model": "m", "deadline_s": 5.0} | given)


def opened(url, book, folder=None, key=KEY, **given):
    environ = {} if key is None else {"OPENAI_API_KEY": key}
    return Endpoint(
        settings(url, **given), society="s01", accounts=book, folder=folder, environ=environ
    )


async def asked(endpoint, *questions):
    """The answers or errors, in order; then it is closed."""
    try:
        return await asyncio.gather(*map(endpoint.ask, questions), return_exceptions=True)
    finally:
        await endpoint.close()


def ask(url, book, *questions, folder=None, key=KEY, **given):
    return asyncio.run(asked(opened(url, book, folder, key, **given), *(questions or [question()])))


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("society.agents.endpoint.BACKOFF_S", 0.01)


# --------------------------------------------------------------------------- an answer


def test_an_answer_is_an_object_of_its_class_and_is_charged_as_reported():
    book = Book()
    with ScriptedEndpoint([answer(GOOD)]) as server:
        (found,) = ask(server.url, book, prices={"m": Price(prompt=1, completion=10)})
    assert found == Idea(**GOOD)
    (call,) = book.calls
    assert (call.outcome, call.model) == ("answered", "m")
    assert (call.purpose, call.agent) == ("propose", "a01")
    assert 0 < call.prompt_tokens < 100
    assert call.dollars == pytest.approx((call.prompt_tokens + 10 * call.completion_tokens) / 1e6)
    (seen,) = server.asked
    assert (seen.path, seen.purpose, seen.agent) == ("/v1/chat/completions", "propose", "a01")
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.body["response_format"]["json_schema"]["strict"] is True
    assert seen.schema["required"] == ["idea", "size"]
    assert seen.schema["additionalProperties"] is False
    assert seen.body["max_tokens"] == 4000
    assert "temperature" not in seen.body
    assert not seen.body.get("stream")


def test_the_server_is_told_the_words_that_a_field_may_say():
    wanted = replace(question(), words={"idea": ["wider", "deeper"]})
    with ScriptedEndpoint([answer(GOOD)]) as server:
        ask(server.url, Book(), wanted)
        (seen,) = server.asked
    assert seen.schema["properties"]["idea"] == {"$ref": "#/$defs/allowed_idea"}
    assert seen.schema["$defs"]["allowed_idea"]["enum"] == ["wider", "deeper"]


def test_a_local_server_needs_no_key():
    with ScriptedEndpoint([answer(GOOD)]) as server:
        assert ask(server.url, Book(), key=None, temperature=0.3) == [Idea(**GOOD)]
    assert server.asked[0].body["temperature"] == 0.3


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{json.dumps(GOOD)}\n```",
        f"Here you are: {json.dumps(GOOD)}. Good luck!",
        f"<think>maybe {{this}}?</think>\n{json.dumps(GOOD)}",
        json.dumps(GOOD) + " " * 1000,
    ],
)
def test_words_around_an_answer_are_tolerated(text):
    assert read(text, Idea) == Idea(**GOOD)


def test_text_within_an_answer_is_left_alone():
    text = "```py\n</think>\n```"
    assert read(json.dumps({"idea": text, "size": 1}), Idea).idea == text


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", "no_json", "one JSON object"),
        ("I would try a wider model.", "no_json", "one JSON object"),
        ('{"idea": "wi', "no_json", "Unterminated"),
        ('{"a":' * 100_000, "no_json", ""),
        ('{"idea": "x", "size": NaN}', "no_json", "NaN"),
        ('["idea"]', "no_json", "one JSON object"),
        ('{"idea": "x", "size": "many"}', "schema", "size"),
        ('{"idea": "x", "size": 10}', "schema", "size"),
        ('{"idea": "x", "size": 1, "and": 2}', "schema", "and"),
        (json.dumps({"idea": "x" * 201, "size": 1}), "schema", "idea"),
        ('{"idea": "\\ud800", "size": 1}', "schema", "idea"),
    ],
)
def test_what_is_no_answer_is_said_to_the_model(text, kind, words):
    with pytest.raises(BadAnswer) as refusal:
        read(text, Idea)
    assert refusal.value.kind == kind
    assert words in refusal.value.feedback
    assert len(refusal.value.feedback) < 700


def test_a_schema_is_made_strict_at_every_level():
    class Edit(BaseModel):
        file: str = Field("a.py", max_length=9)
        kind: Literal["add"] = "add"

    class Plan(BaseModel):
        title: str
        default: int = 3
        edits: Annotated[list[Edit], Field(max_length=2)] = []
        one: Edit | None = None

    schema = strict_schema(Plan)
    assert schema["required"] == ["title", "default", "edits", "one"]
    assert set(schema["properties"]) == set(schema["required"]), "fields are no keywords"
    inner = schema["$defs"]["Edit"]
    assert (inner["required"], inner["additionalProperties"]) == (["file", "kind"], False)
    assert "default" not in inner["properties"]["file"]
    assert "maxItems" in json.dumps(schema)
    bare = json.dumps(without_bounds(schema))
    assert "maxItems" not in bare
    assert "maxLength" not in bare


def test_a_schema_names_the_words_that_a_field_may_say():
    class Edit(BaseModel):
        file: str = Field(max_length=9)

    class Plan(BaseModel):
        title: str
        file: str
        edits: list[Edit]

    many = list(map(str, range(MOST_WORDS + 1)))
    schema = strict_schema(Plan, {"file": ["a.py", "b.py"], "title": many, "nothing": []})
    words = schema["properties"]["file"]
    assert schema["$defs"][words["$ref"].rpartition("/")[2]]["enum"] == ["a.py", "b.py"]
    assert schema["$defs"]["Edit"]["properties"]["file"] == words
    assert schema["properties"]["title"] == {"type": "string"}


# --------------------------------------------------------------------------- bad servers


@dataclass(frozen=True)
class Bad:
    """A behaviour, and what must come of it."""

    behaviour: object
    error: type[Exception]
    outcome: str
    words: str
    full: bool
    """Whether each request is charged in full (else it costs nothing)."""
    requests: int = 1


BAD = {
    "hang": Bad(hang(), EndpointDown, "timeout", "within 0.8 s", True),
    "drip": Bad(drip(), EndpointDown, "timeout", "within 0.8 s", True),
    "half_headers": Bad(half_headers(), EndpointDown, "timeout", "within 0.8 s", True),
    "cut_off_body": Bad(cut_off(), EndpointDown, "broken_off", "broke off", True, 4),
    "reset": Bad(reset(), EndpointDown, "broken_off", "broke off", True, 4),
    "huge": Bad(huge(), BadAnswer, "too_large", "briefly", True),
    "bomb": Bad(bomb(), BadAnswer, "too_large", "briefly", True),
    "html": Bad(page(), EndpointDown, "not_the_protocol", "/v1", True),
    "not_json": Bad(raw(b"{oops"), EndpointDown, "not_the_protocol", "protocol", True),
    "deep": Bad(raw(b"[" * 500_000), EndpointDown, "not_the_protocol", "protocol", True),
    "a_list": Bad(raw(b"[]"), EndpointDown, "not_the_protocol", "protocol", True),
    "no_choice": Bad(raw(b'{"choices": []}'), EndpointDown, "not_the_protocol", "protocol", True),
    "null": Bad(raw(b"null"), EndpointDown, "not_the_protocol", "protocol", True),
    "bytes": Bad(raw(b"\xff\xfe\0"), EndpointDown, "not_the_protocol", "protocol", True),
    "http_500": Bad(status(500), EndpointDown, "http_500", "500", False, 4),
    "http_504": Bad(status(504), EndpointDown, "http_504", "504", True, 4),
    "html_502": Bad(page(code=502), EndpointDown, "http_502", "502", False, 4),
    "http_401": Bad(status(401), EndpointDown, "http_401", "OPENAI_API_KEY", False),
    "http_403": Bad(status(403), EndpointDown, "http_403", "OPENAI_API_KEY", False),
    "http_404": Bad(status(404), EndpointDown, "http_404", "--model", False),
    "http_410": Bad(status(410), EndpointDown, "http_410", "410", False),
    "context": Bad(
        status(400, "This model's maximum context length is 2048 tokens"),
        EndpointDown, "http_400", "endpoint.context_tokens", False,
    ),
    "no_credit": Bad(
        status(429, "quota", error_code="insufficient_quota"),
        EndpointDown, "no_credit", "no credit", False,
    ),
    "retry_after_90": Bad(status(429, Retry_After="90"), EndpointDown, "http_429", "429", False),
    "redirect": Bad(
        redirect("http://127.0.0.1:9/v1"), EndpointDown, "http_307", "redirects to", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_server_costs_no_more_than_its_deadline_and_worst_case(name):
    bad, book = BAD[name], Book()
    began = time.monotonic()
    with ScriptedEndpoint(lambda _: bad.behaviour) as server:
        endpoint = opened(server.url, book, deadline_s=0.8 if bad.outcome == "timeout" else 5.0)
        worst = endpoint._allowance.worst(endpoint._prepared(question()).counted).tokens
        (error,) = asyncio.run(asked(endpoint, question()))
        took = time.monotonic() - began
    assert type(error) is bad.error
    assert bad.words in str(error)
    assert "\n" not in str(error)
    assert took < (0.8 if bad.outcome == "timeout" else 3.0) + SLACK_S
    assert book.outcomes == [bad.outcome] * bad.requests
    assert len(server.asked) == bad.requests
    assert book.tokens == (worst * bad.requests if bad.full else 0)
    assert endpoint.usage.failed == bad.requests
    assert endpoint.standing.last_error == str(error)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (answer(json.dumps(GOOD)[:12], finish="length"), "cut_off"),
        (answer("wider, I think"), "no_json"),
        (answer({"idea": "x", "size": 10}), "schema"),
        (answer("", refusal="I must not."), "refusal"),
        (answer("", finish="content_filter"), "refusal"),
    ],
)
def test_an_unusable_answer_is_charged_as_reported_and_never_asked_again(behaviour, kind):
    book = Book()
    with ScriptedEndpoint([behaviour]) as server:
        (error,) = ask(server.url, book)
    assert isinstance(error, BadAnswer)
    assert (error.kind, book.outcomes, server.unscripted) == (kind, [kind], [])
    assert 0 < book.tokens < 4500


def test_whole_json_counts_although_the_model_was_cut_off_after_it():
    with ScriptedEndpoint([answer(json.dumps(GOOD) + "\n" * 50, finish="length")]) as server:
        assert ask(server.url, Book()) == [Idea(**GOOD)]


@pytest.mark.parametrize("trouble", [status(500), status(429), status(409), reset(), cut_off()])
def test_trouble_that_passes_is_waited_out(trouble):
    book = Book()
    with ScriptedEndpoint([trouble, trouble, trouble, answer(GOOD)]) as server:
        assert ask(server.url, book) == [Idea(**GOOD)]
    assert len(book.calls) == 4


def test_a_server_that_is_down_costs_nothing():
    book = Book()
    (error,) = ask(down(), book)
    assert isinstance(error, EndpointDown)
    assert "cannot be reached" in str(error)
    assert "--base-url" in str(error)
    assert (book.tokens, book.outcomes) == (0, ["unreachable"] * 4)


def test_a_slow_server_within_the_deadline_is_fine():
    with ScriptedEndpoint([answer(GOOD, wait_s=0.5)]) as server:
        assert ask(server.url, Book(), deadline_s=5) == [Idea(**GOOD)]


def test_an_answer_compressed_unasked_is_read():
    with ScriptedEndpoint([zipped(GOOD)]) as server:
        assert ask(server.url, Book()) == [Idea(**GOOD)]
    assert server.asked[0].headers["accept-encoding"] == "identity"


def test_neither_proxy_nor_netrc_of_the_environment_is_used(monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "OPENAI_PROXY"):
        monkeypatch.setenv(name, down())
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("OPENAI_BASE_URL", down())
    with ScriptedEndpoint([answer(GOOD)]) as server:
        assert ask(server.url, Book()) == [Idea(**GOOD)]
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_proxy_of_the_environment_is_used_when_asked_for(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ScriptedEndpoint([answer(GOOD)]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        found = ask("http://model.invalid/v1", Book(), env_proxy=True)
    assert found == [Idea(**GOOD)]
    assert proxy.asked[0].path == "http://model.invalid/v1/chat/completions"


# --------------------------------------------------------------------------- dialects


def _picky(*refused):
    """A server that does not know some parameters."""

    def script(asked):
        for what in refused:
            if refuses(what)(asked):
                return status(400, f"Unsupported parameter: {what}")
        return answer(GOOD)

    return script


@pytest.mark.parametrize(
    ("refused", "requests", "form"),
    [
        (("maxLength",), 2, "json_schema"),
        (("json_schema",), 3, "json_object"),
        (("response_format",), 4, ""),
        (("max_tokens",), 2, "json_schema"),
        (("temperature",), 2, "json_schema"),
        (("temperature", "max_tokens", "response_format"), 6, ""),
    ],
)
def test_a_server_that_knows_less_is_asked_in_its_own_way_from_then_on(refused, requests, form):
    book = Book()
    with ScriptedEndpoint(_picky(*refused)) as server:
        endpoint = opened(server.url, book, attempts=1, temperature=0.5)

        async def twice():
            first = await endpoint.ask(question())
            return first, *(await asked(endpoint, question("And then?")))

        assert asyncio.run(twice()) == (Idea(**GOOD), Idea(**GOOD))
    assert len(server.asked) == requests + 1
    last = server.asked[-1]
    assert last.form == form
    assert ("JSON schema" in last.system) == (form != "json_schema")
    assert book.outcomes == ["http_400"] * (requests - 1) + ["answered"] * 2
    assert book.calls[0].prompt_tokens == 0, "what is refused costs nothing"


def test_a_server_that_refuses_every_form_is_down():
    with ScriptedEndpoint(lambda _: status(400, "no, not max_tokens")) as server:
        (error,) = ask(server.url, Book())
    assert isinstance(error, EndpointDown)
    assert len(server.asked) == 5


def test_a_server_that_breaks_at_the_schema_is_asked_without():
    with ScriptedEndpoint([status(500, "failed to parse grammar"), answer(GOOD)]) as server:
        assert ask(server.url, Book(), attempts=1) == [Idea(**GOOD)]


def test_openai_is_asked_in_its_own_way():
    from society.agents.endpoint import _first_dialect

    assert _first_dialect("https://api.openai.com/v1") == Dialect(
        Form.STRICT, "max_completion_tokens"
    )
    assert _first_dialect("https://notopenai.com/v1") == Dialect()


# --------------------------------------------------------------------------- patience


def test_a_long_wait_that_a_server_asks_for_closes_the_gate_for_all():
    book = Book()

    async def two(url):
        endpoint = opened(url, book, deadline_s=5)
        began = time.monotonic()
        with pytest.raises(EndpointDown) as first:
            await endpoint.ask(question())
        with pytest.raises(EndpointDown) as second:
            await endpoint.ask(question(agent="a02"))
        left = endpoint.standing.retry_in_s
        await endpoint.close()
        return first.value.retry_in_s, second.value, left, time.monotonic() - began

    with ScriptedEndpoint([status(429, Retry_After="90")]) as server:
        wanted, refused, left, took = asyncio.run(two(server.url))
    assert wanted == 90
    assert 85 < refused.retry_in_s <= 90
    assert 85 < left <= 90
    assert took < 2
    assert server.unscripted == []


def test_a_short_wait_that_a_server_asks_for_is_kept_by_all():
    async def both(url):
        endpoint = opened(url, Book(), deadline_s=10)
        first = asyncio.create_task(endpoint.ask(question()))
        while not endpoint.standing.retry_in_s:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        second = await endpoint.ask(question(agent="a02"))
        took = time.monotonic() - began
        await first
        await endpoint.close()
        return second, took

    with ScriptedEndpoint([status(503, Retry_After="1"), answer(GOOD), answer(GOOD)]) as server:
        second, took = asyncio.run(both(server.url))
    assert second == Idea(**GOOD)
    assert 0.8 < took < 5


@pytest.mark.parametrize("told", ["soon", "-5", "nan", "inf", "Fri, 31 Dec 1999 23:59:59 GMT", ""])
def test_a_wait_without_sense_is_ignored(told):
    with ScriptedEndpoint([status(429, Retry_After=told), answer(GOOD)]) as server:
        assert ask(server.url, Book()) == [Idea(**GOOD)]


def test_repeated_failures_open_the_circuit_and_an_answer_closes_it(monkeypatch):
    monkeypatch.setattr("society.agents.throttle.OPEN_S", 0.3)

    async def story(server):
        endpoint, seen = opened(server.url, Book(), attempts=1), []
        for _ in range(FAILURES):
            with pytest.raises(EndpointDown):
                await endpoint.ask(question())
        seen.append((endpoint.standing.circuit, len(server.asked)))
        with pytest.raises(EndpointDown, match="failed repeatedly"):
            await endpoint.ask(question())
        seen.append(len(server.asked))
        await asyncio.sleep(endpoint.standing.retry_in_s)
        found = await asyncio.gather(
            *(endpoint.ask(question(agent=f"a{n}")) for n in range(4)), return_exceptions=True
        )
        seen.append(sorted(type(one).__name__ for one in found))
        seen.append((endpoint.standing.circuit, endpoint.standing.last_error != ""))
        await endpoint.close()
        return seen

    with ScriptedEndpoint([*[status(500)] * FAILURES, answer(GOOD, wait_s=0.2)]) as server:
        seen = asyncio.run(story(server))
    assert seen[:2] == [("open", FAILURES), FAILURES]
    assert seen[2] == ["EndpointDown"] * 3 + ["Idea"], "one trial at a time"
    assert seen[3][0] == "closed"


def test_the_circuit_stays_open_twice_as_long_after_each_failed_trial():
    now = [0.0]
    circuit = Circuit(clock=lambda: now[0])
    late = circuit.enter()
    for _ in range(FAILURES):
        circuit.leave(circuit.enter(), worked=False, problem="down")
    circuit.leave(late, worked=False)  # was under way: no news
    assert circuit.retry_in_s == OPEN_S
    for pause in (60, 120, 240, 480, 600, 600):
        now[0] += circuit.retry_in_s
        trial = circuit.enter()
        with pytest.raises(EndpointDown):
            circuit.enter()
        circuit.leave(trial, worked=False)
        assert circuit.retry_in_s == pause
    now[0] += 600
    given_up = circuit.enter()
    circuit.leave(given_up, worked=None)
    circuit.leave(circuit.enter(), worked=True)
    assert circuit.closed


def test_failures_count_only_in_a_row():
    circuit = Circuit()
    for worked in [False, False, True] * 5:
        circuit.leave(circuit.enter(), worked)
    assert circuit.closed


def test_an_agent_that_is_stopped_is_charged_and_frees_its_place():
    book = Book()

    async def story(server):
        endpoint = opened(server.url, book, concurrent=1)
        stopped = asyncio.create_task(endpoint.ask(question()))
        while not server.asked:
            await asyncio.sleep(0.01)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        found = await endpoint.ask(question("And now?"))
        await endpoint.close()
        return found

    with ScriptedEndpoint([hang(), answer(GOOD)]) as server:
        assert asyncio.run(story(server)) == Idea(**GOOD)
    assert book.outcomes == ["cancelled", "answered"]
    assert book.calls[0].completion_tokens == 4000


def test_no_more_requests_are_under_way_than_allowed():
    questions = [question(agent=f"a{n:02d}") for n in range(12)]
    with ScriptedEndpoint(lambda _: answer(GOOD, wait_s=0.05)) as server:
        found = ask(server.url, Book(), *questions, concurrent=3)
    assert found == [Idea(**GOOD)] * 12
    assert server.most_under_way == 3


def test_waiting_for_a_place_ends_with_the_deadline():
    began = time.monotonic()
    book = Book()
    with ScriptedEndpoint(lambda _: hang()) as server:
        found = ask(server.url, book, *[question(agent=f"a{n}") for n in range(4)],
                    concurrent=1, deadline_s=2)  # fmt: skip
    assert [type(one) for one in found] == [EndpointDown] * 4
    assert time.monotonic() - began < 2 + SLACK_S
    assert len(book.calls) == 1


# --------------------------------------------------------------------------- pace and gate


def test_a_rate_is_shared_first_come_first_served():
    async def story():
        pace, order, began = Pace(6000), [], time.monotonic()
        ends = began + 60

        async def one(name):
            await pace.wait(200, ends)  # 2 s' worth each
            order.append((name, time.monotonic() - began))

        await pace.wait(100 * BURST_S - 50, ends)
        await asyncio.gather(*(one(n) for n in range(2)))
        return order

    order = asyncio.run(story())
    assert [name for name, _ in order] == [0, 1]
    assert order[0][1] < 0.5
    assert 1.2 < order[1][1] < 2.5


def test_a_turn_after_the_deadline_is_refused_at_once_and_uses_nothing_up():
    async def story():
        pace = Pace(60)
        now = time.monotonic()
        await pace.wait(100, now + 1)
        for _ in range(3):
            with pytest.raises(EndpointDown, match="requests_per_minute") as refusal:
                await pace.wait(1, now + 1)
            assert 85 < refusal.value.retry_in_s <= 90
        assert time.monotonic() - now < 0.5

    asyncio.run(story())


def test_turns_move_up_when_less_was_used():
    async def story():
        pace, began = Pace(60), time.monotonic()
        await pace.wait(100, began + 300)
        waiting = asyncio.create_task(pace.wait(1, began + 300))
        await asyncio.sleep(0)
        pace.correct(-99)
        await waiting
        return time.monotonic() - began

    assert asyncio.run(story()) < 1


def test_a_rate_applies_to_all_agents_together():
    with ScriptedEndpoint(lambda _: answer(GOOD)) as server:
        found = ask(server.url, Book(), *[question(agent=f"a{n}") for n in range(6)],
                    requests_per_minute=12, deadline_s=1)  # fmt: skip
    # 5 s each: two at once and a third that is already due use up 10 s; the others would be late.
    assert len(server.asked) in (2, 3)
    assert [type(one) for one in found[:2]] == [Idea, Idea]
    assert all("rate" in str(one) for one in found[3:])


def test_tokens_that_were_not_used_go_back_to_the_rate():
    with ScriptedEndpoint(lambda _: answer(GOOD)) as server:
        found = ask(server.url, Book(), *[question(agent=f"a{n}") for n in range(8)],
                    tokens_per_minute=30_000, concurrent=1)  # fmt: skip
    assert found == [Idea(**GOOD)] * 8


def test_a_gate_never_opens_earlier_and_not_later_than_an_hour():
    now = [0.0]
    gate = Gate(clock=lambda: now[0])
    gate.close(50)
    gate.close(10)
    assert gate.closed_s == 50
    gate.close(1e12)
    assert gate.closed_s == 3600


# --------------------------------------------------------------------------- caps


def test_sixteen_at_once_never_pass_a_cap():
    book = Book()
    with ScriptedEndpoint(lambda _: answer(GOOD, wait_s=0.2)) as server:
        probe = opened(server.url, book)
        worst = probe._allowance.worst(probe._prepared(question()).counted).tokens
        cap = 5 * worst + worst // 2
        endpoint = opened(server.url, book, max_tokens=cap, concurrent=16)
        found = asyncio.run(asked(endpoint, *[question(agent=f"a{n:02d}") for n in range(16)]))
        asyncio.run(probe.close())
    assert [type(one) for one in found].count(Idea) == 5
    spent = [one for one in found if isinstance(one, AllowanceSpent)]
    assert len(spent) == 11
    assert all(one.cap == "max_tokens" and not one.final for one in spent)
    assert len(server.asked) == 5
    assert book.tokens <= cap


@pytest.mark.parametrize("behaviour", [hang(), cut_off(), page()])
def test_charges_in_full_never_pass_a_cap(behaviour):
    book = Book()
    with ScriptedEndpoint(lambda _: behaviour) as server:
        found = ask(server.url, book, *[question(agent=f"a{n:02d}") for n in range(8)],
                    max_tokens=20_000, deadline_s=0.8)  # fmt: skip
    assert all(isinstance(one, EndpointDown | AllowanceSpent) for one in found)
    assert 0 < book.tokens <= 20_000


@pytest.mark.parametrize(
    "cap", ["max_tokens", "max_tokens_per_agent", "max_dollars", "max_dollars_per_agent"]
)
def test_what_was_spent_before_counts(cap):
    book = Book(before=Usage(9, 0, 0, prompt_tokens=900, completion_tokens=100, dollars=1.0))
    limits = {cap: 1.001 if "dollars" in cap else 1_500}
    with ScriptedEndpoint([]) as server:
        (error,) = ask(server.url, book, **limits, prices={"m": Price(prompt=1, completion=1)})
    assert isinstance(error, AllowanceSpent)
    assert (error.cap, error.final) == (cap, True)
    assert f"endpoint.{cap}" in str(error)
    assert server.asked == []
    assert book.calls == []


def test_one_agent_cannot_spend_what_belongs_to_others():
    with ScriptedEndpoint(lambda _: answer(GOOD)) as server:
        found = ask(server.url, Book(), question(), question("More?"), question(agent="a02"),
                    max_tokens_per_agent=5_000)  # fmt: skip
    assert [type(one) for one in found] == [Idea, AllowanceSpent, Idea]


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": -5, "completion_tokens": 3, "total_tokens": -2},
        {"prompt_tokens": 10**15, "completion_tokens": 3, "total_tokens": 10**15},
        {"prompt_tokens": 100, "completion_tokens": 10**12, "total_tokens": 10**12},
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10},
        {"prompt_tokens": "many", "completion_tokens": {}, "total_tokens": "more"},
    ],
)
def test_a_usage_that_cannot_be_is_charged_in_full(usage):
    book = Book()
    with ScriptedEndpoint([answer(GOOD, usage=usage)]) as server:
        assert ask(server.url, book) == [Idea(**GOOD)]
    (call,) = book.calls
    assert call.completion_tokens == 4000
    assert 50 < call.prompt_tokens < 1000


def test_a_server_that_counts_more_is_expected_to_do_so_again():
    allowance = Allowance(EndpointSettings(answer_tokens=1000), lambda _: Usage())
    before = allowance.worst(1000)
    held = allowance.reserve("a01", 1000)
    assert allowance.actual(held, 3000, 1500).tokens == 4500
    after = allowance.worst(1000)
    assert before.tokens < 4500 <= after.tokens


# --------------------------------------------------------------------------- what is kept


@pytest.fixture
def folder(tmp_path):
    return NotebookFolder(tmp_path / "lab")


def test_a_question_asked_again_costs_nothing(folder):
    other = {"idea": "b", "size": 2}
    script = [answer("no json"), answer(GOOD), answer(other), answer(GOOD)]
    with ScriptedEndpoint(script) as server:
        first, again = Book(), Book()
        assert isinstance(ask(server.url, first, folder=folder)[0], BadAnswer)
        assert ask(server.url, first, folder=folder) == [Idea(**GOOD)]
        assert ask(server.url, again, folder=folder) == [Idea(**GOOD)]
        assert (again.outcomes, again.tokens) == (["cached"], 0)
        assert ask(server.url, first, question(agent="a02"), folder=folder) == [Idea(**other)]
        assert ask(server.url, first, folder=folder, temperature=1) == [Idea(**GOOD)]
    assert server.unscripted == []
    lines = list(read_transcript(folder.transcripts / "s01.jsonl"))
    assert [line["outcome"] for line in lines] == [
        "no_json", "answered", "cached", "answered", "answered",
    ]  # fmt: skip


def test_a_cache_that_cannot_be_used_is_done_without(folder, caplog):
    folder.path.mkdir()
    folder.answers.write_bytes(b"this is no database" * 100)
    with ScriptedEndpoint(lambda _: answer(GOOD)) as server:
        assert ask(server.url, Book(), folder=folder) == [Idea(**GOOD)]


def test_the_oldest_answers_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr("society.agents.answers.MOST", 3)
    answers = Answers(tmp_path / "answers.sqlite")
    for number in range(6):
        answers.put(f"k{number}", f"t{number}")
    assert [answers.get(f"k{number}") for number in range(6)] == [None] * 3 + ["t3", "t4", "t5"]
    answers.close()
    assert stat.S_IMODE((tmp_path / "answers.sqlite").stat().st_mode) == 0o600


def test_the_transcript_tells_all_of_a_request(folder):
    with ScriptedEndpoint([status(500), answer(GOOD)]) as server:
        ask(server.url, Book(), folder=folder, prices={"m": Price(prompt=1, completion=1)})
    path = folder.transcripts / "s01.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    failed, answered = read_transcript(path)
    assert (failed["outcome"], failed["attempt"], failed["parsed"]) == ("http_500", 1, None)
    assert "500" in failed["problem"]
    assert answered["messages"][0] == {"role": "system", "content": "You are a careful researcher."}
    assert answered["messages"][1] == {"role": "user", "content": "What next?"}
    assert (answered["parsed"], json.loads(answered["raw"])) == (GOOD, GOOD)
    assert (answered["agent"], answered["purpose"], answered["model"]) == ("a01", "propose", "m")
    assert answered["attempt"] == 2
    assert answered["dollars"] > 0
    assert answered["wall_s"] >= 0


def test_a_torn_line_is_skipped_and_never_joined(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"b": "to')
    transcript = Transcript(path, Redactor(None))
    transcript.write({"c": "\ud800 ü"})
    transcript.close()
    assert list(read_transcript(path)) == [{"a": 1}, {"c": "\ud800 ü"}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_the_transcript_and_not_the_society(folder, monkeypatch):
    folder.transcripts.mkdir(parents=True)
    (folder.transcripts / "s01.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    said = []
    monkeypatch.setattr("society.agents.transcript.logs.get", lambda _: _Log(said))
    with ScriptedEndpoint(lambda _: answer(GOOD)) as server:
        found = ask(server.url, Book(), question(), question("And?"), folder=folder)
    assert found == [Idea(**GOOD)] * 2
    assert len(said) == 1


@dataclass
class _Log:
    said: list

    def info(self, event, **fields):
        pass

    def warning(self, event, **fields):
        self.said.append(event)


def test_calls_in_the_ledger_hold_the_caps_over_sessions(tmp_path):
    server, ledger = ScriptedEndpoint(lambda _: answer(GOOD)), Ledger.open(tmp_path / "l.sqlite")
    with server, ledger:
        society = ledger.start_society(1, {}, home="").id

        def session(*questions):
            endpoint = Endpoint(
                settings(server.url, max_tokens=4_700), society=society, accounts=ledger, environ={}
            )
            return endpoint, asyncio.run(asked(endpoint, *questions))

        endpoint, found = session(question())
        assert found == [Idea(**GOOD)]
        while not isinstance(found[0], AllowanceSpent):
            endpoint, found = session(question())
        assert ledger.usage(society) == endpoint.usage
        assert ledger.usage(society, "a01") == endpoint.usage
        assert 0 < ledger.usage(society).tokens <= 4_700


# --------------------------------------------------------------------------- the key


def test_the_key_is_nowhere(folder, caplog, capfd):
    caplog.set_level("INFO")
    script = [
        echo_key(), echo_key(401), echo_key(400), echo_key(500), echo_key(429), page(KEY),
        answer("", refusal=KEY), answer(f"no {KEY}"), redirect(f"http://127.0.0.1:9/{KEY}"),
    ]  # fmt: skip
    book = Book()
    with ScriptedEndpoint(lambda asked: script[int(asked.user)]) as server:
        endpoint = opened(server.url, book, folder, attempts=1)
        found = []

        async def all_of_them():
            for n in range(len(script)):
                endpoint._circuit = Circuit()
                found.extend(
                    await asyncio.gather(endpoint.ask(question(f"{n}")), return_exceptions=True)
                )
            await endpoint.close()

        asyncio.run(all_of_them())
    assert found[0].idea == "Bearer [key]"
    errors = [one for one in found if isinstance(one, Exception)]
    assert len(errors) == len(found) - 1
    files = [path.read_bytes() for path in folder.path.rglob("*") if path.is_file()]
    assert len(files) == 2
    told = [repr(endpoint), repr(endpoint.__dict__), repr(book), caplog.text, *capfd.readouterr()]
    for error in errors:
        while error is not None:
            told += [repr(error), str(error), repr(getattr(error, "__dict__", {}))]
            error = error.__cause__
    assert all(KEY not in text for text in told)
    assert all(KEY.encode() not in data for data in files)


def test_without_a_key_a_server_elsewhere_is_refused_with_the_alternatives():
    elsewhere = EndpointSettings()
    for environ in ({}, {"OPENAI_API_KEY": " "}):
        with pytest.raises(UsageError) as refusal:
            require_key(elsewhere, environ)
        for word in ("OPENAI_API_KEY", "--brain search", "--base-url", "api.openai.com"):
            assert word in str(refusal.value)
    assert require_key(elsewhere, {"OPENAI_API_KEY": KEY}) == KEY
    assert require_key(EndpointSettings(base_url="http://localhost:1/v1"), {}) is None


@pytest.mark.parametrize("key", ["sk with space", "sk-\u2026", "sk-\x07", "a\nb"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(key):
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as refusal:
        require_key(EndpointSettings(), {"OPENAI_API_KEY": key})
    assert key not in str(refusal.value)


def test_a_cap_in_dollars_needs_a_price():
    environ = {"OPENAI_API_KEY": KEY}
    with pytest.raises(UsageError, match="price of m2"):
        Endpoint(EndpointSettings(model="m2", max_dollars=1), society="s", accounts=Book(),
                 environ=environ)  # fmt: skip
    for fine in ({"model": "m2"}, {"max_dollars": 1}, {"model": "m2", "max_dollars": None}):
        Endpoint(EndpointSettings(**fine), society="s", accounts=Book(), environ=environ)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8/v1", True), ("http://[::1]/v1", True), ("http://localhost/v1", True),
        ("http://127.9.9.9/v1", True), ("https://api.openai.com/v1", False),
        ("http://10.0.0.1/v1", False), ("http://localhost.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(url, local):
    assert is_local(url) is local


def test_workers_do_not_see_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_OWN_TOKEN", KEY)

    async def environments():
        others = set(psutil.Process().children(recursive=True))  # servers of other tests
        executor = LocalExecutor("synthetic", "quick", 1, "cpu")
        try:
            await executor.start()
            children = set(psutil.Process().children(recursive=True)) - others
            found = [Path(f"/proc/{one.pid}/environ").read_bytes() for one in children]
            await executor.close()
            return found
        finally:
            executor.kill()

    found = asyncio.run(environments())
    assert found
    assert all(b"PYTHONHASHSEED" in one for one in found)
    assert all(KEY.encode() not in one for one in found)


# --------------------------------------------------------------------------- tokens and settings


def test_tokens_are_counted_and_cut_without_a_network():
    assert tokens.count("") == 0
    assert tokens.count("hello world") == 2
    assert tokens.count("<|endoftext|>") > 1, "text is never a command"
    assert tokens.count("a" * 200_000) < 200_000
    assert tokens.count("\ud800") > 0


@pytest.mark.parametrize(
    "text", ["hello world, hello", "🙂" * 50, " \n" * 40, "x = 12345678\n" * 900]
)
def test_a_text_that_is_cut_is_a_beginning_and_has_no_more(text):
    whole = tokens.count(text)
    for most in (0, 1, 2, 7, whole - 1, whole, whole + 5):
        found = tokens.clip(text, most)
        assert text.startswith(found)
        assert tokens.count(found) <= max(0, most)
    assert tokens.clip(text, whole) == text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": "m"}, r"endpoint in mine.*'modle'.*Did you mean 'model'"),
        ({"prices": {"m": {"promt": 1, "completion": 2}}}, r"prices\.m in mine.*'prompt'"),
    ],
)
def test_an_unknown_key_within_is_named_with_the_nearest(values, words):
    with pytest.raises(UnknownName, match=words):
        validate({"endpoint": values}, source="mine")


@pytest.mark.parametrize(
    "values",
    [
        {"base_url": "localhost:8080"}, {"base_url": "http://me:secret@host/v1"},
        {"base_url": "http://h/v1?key=secret"}, {"base_url": "http://h:port/v1"},
        {"key_env": "sk-secret-itself"}, {"attempts": 0}, {"max_dollars": 0},
    ],
)  # fmt: skip
def test_an_endpoint_that_cannot_be_is_refused(values):
    with pytest.raises(UsageError, match="endpoint") as refusal:
        validate({"endpoint": values}, source="mine")
    assert "secret" not in str(refusal.value)


def test_the_command_line_changes_single_values_of_the_endpoint(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("endpoint: {model: a, base_url: 'http://h/v1/', max_tokens: 7}\n")
    found = load_settings(config, endpoint={"model": "b"}).endpoint
    assert (found.model, found.base_url, found.max_tokens) == ("b", "http://h/v1", 7)
    assert load_settings(None, endpoint={"model": "b"}).endpoint.model == "b"


def test_a_script_may_be_a_function_of_the_request():
    script = answers(lambda asked: {"idea": f"{asked.purpose} of {asked.agent}", "size": 1})
    with ScriptedEndpoint(script) as server:
        (found,) = ask(server.url, Book(), question(purpose="review", agent="a07"))
    assert found.idea == "review of a07"
    assert completion(server.asked[0], "x")["model"] == "m"
