"""`Allowance`: hard caps in tokens and dollars, of the society and of each agent.

A request is let through only if its worst case fits every cap beside what was spent and what the
requests under way may yet cost. So the sum cannot pass a cap, however many agents ask at once, as
long as the server keeps to the answer length it was given and counts as this module assumes; where
it does not, it is believed within reason and expected to do so again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from society.errors import AllowanceSpent
from society.records import Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from society.records import Call
    from society.settings import Endpoint, Price

MARGIN = 1.5
"""How many times as many tokens another vocabulary may make of a text, until more was seen."""
OVERHEAD_TOKENS = 64
"""What a chat format adds to the text."""
ODD = 8
"""A reported count that is so many times too large, or too small, is not believed."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens and dollars of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        """Both ways."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Cost) -> Cost:
        """The sum."""
        return Cost(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.dollars + other.dollars,
        )


NOTHING = Cost()


@dataclass(slots=True)
class _Account:
    """Of the society or of one agent."""

    whose: str
    usage: Usage
    max_tokens: int | None
    max_dollars: float | None
    suffix: str = ""
    held: dict[int, Cost] = field(default_factory=dict)
    """Worst cases of the requests under way, by reservation."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room held for one request; must be settled."""

    number: int
    agent: str
    worst: Cost
    counted: int
    """Tokens of the prompt, as counted offline."""


class Allowance:
    """What may still be spent. Belongs to one event loop; nothing in it waits."""

    def __init__(self, limits: Endpoint, spent: Callable[[str | None], Usage]) -> None:
        """`spent` tells what an agent has used so far, earlier sessions included; None: all."""
        self._limits, self._spent = limits, spent
        self._price: Price | None = limits.prices.get(limits.model)
        self._society = _Account("society", spent(None), limits.max_tokens, limits.max_dollars)
        self._agents: dict[str, _Account] = {}
        self._numbers = 0
        self._margin, self._answer = MARGIN, limits.answer_tokens

    @property
    def usage(self) -> Usage:
        """What the society has spent, earlier sessions included."""
        return self._society.usage

    def worst(self, counted: int) -> Cost:
        """The most that a request may cost whose prompt has so many tokens by our count."""
        return self._cost(math.ceil(counted * self._margin) + OVERHEAD_TOKENS, self._answer)

    def check(self, agent: str, counted: int) -> None:
        """See that one more request fits.

        Raises:
            AllowanceSpent: It may pass a cap.
        """
        worst = self.worst(counted)
        for account in (self._society, self._account(agent)):
            _check(account, worst)

    def reserve(self, agent: str, counted: int) -> Reservation:
        """Hold room for one request.

        Raises:
            AllowanceSpent: It may pass a cap.
        """
        self.check(agent, counted)
        self._numbers += 1
        held = Reservation(self._numbers, agent, self.worst(counted), counted)
        for account in (self._society, self._account(agent)):
            account.held[held.number] = held.worst
        return held

    def actual(self, held: Reservation, prompt: int | None, completion: int | None) -> Cost:
        """What a request cost by the server's report; its worst case if that is not credible."""
        least, most = held.counted / ODD, held.counted * ODD + OVERHEAD_TOKENS
        if prompt is None or completion is None or not least <= prompt <= most:
            return held.worst
        if not 0 < completion <= self._limits.answer_tokens * ODD:
            return held.worst
        self._margin = max(self._margin, (prompt - OVERHEAD_TOKENS) / max(1, held.counted))
        self._answer = max(self._answer, completion)
        return self._cost(prompt, completion)

    def settle(self, held: Reservation, call: Call) -> None:
        """Give the room back and count what the request cost."""
        for account in (self._society, self._account(held.agent)):
            account.held.pop(held.number)
        self.count(call)

    def count(self, call: Call) -> None:
        """Count a call that needed no room, or has given it back."""
        for account in (self._society, self._account(call.agent)):
            account.usage = _plus(account.usage, call)

    def _cost(self, prompt: int, completion: int) -> Cost:
        price = self._price
        if price is None:
            return Cost(prompt, completion)
        dollars = (prompt * price.prompt + completion * price.completion) / 1e6
        return Cost(prompt, completion, dollars)

    def _account(self, agent: str) -> _Account:
        if agent not in self._agents:
            limits = self._limits
            self._agents[agent] = _Account(
                f"agent {agent}", self._spent(agent),
                limits.max_tokens_per_agent, limits.max_dollars_per_agent, "_per_agent",
            )  # fmt: skip
        return self._agents[agent]


def _check(account: _Account, worst: Cost) -> None:
    used, held = account.usage, sum(account.held.values(), NOTHING)
    for name, cap, spent, under_way, more in (
        ("max_tokens", account.max_tokens, used.tokens, held.tokens, worst.tokens),
        ("max_dollars", account.max_dollars, used.dollars, held.dollars, worst.dollars),
    ):
        if cap is not None and spent + under_way + more > cap:
            unit = name.removeprefix("max_")
            waiting = f" and {under_way:,.6g} set aside for requests under way" if under_way else ""
            raise AllowanceSpent(
                name + account.suffix,
                f"The allowance of the {account.whose} is spent: {spent:,.6g} of {cap:,.6g} {unit}"
                f"{waiting}, and one more request may cost {more:,.6g}. Raise "
                f"endpoint.{name}{account.suffix} to go on with the model.",
                final=spent + more > cap,
            )


def _plus(usage: Usage, call: Call) -> Usage:
    return Usage(
        calls=usage.calls + 1,
        failed=usage.failed + (call.outcome not in ("answered", "cached")),
        cached=usage.cached + (call.outcome == "cached"),
        prompt_tokens=usage.prompt_tokens + call.prompt_tokens,
        completion_tokens=usage.completion_tokens + call.completion_tokens,
        dollars=usage.dollars + call.dollars,
    )
